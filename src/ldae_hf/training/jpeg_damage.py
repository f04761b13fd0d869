"""Damage inside a JPEG that libjpeg decodes without an error, into a picture that is partly grey or shifted.

A JPEG has no checksum. What can be found is data that does not fit together: markers that are missing or out of order,
pixel data that ends before the last row, and pixel data that is left over after it. A changed bit after which the
codes fall into step again gives another picture that is as valid as the first, and cannot be found; in a progressive
JPEG only the markers are looked at.
"""

import io
import re

from PIL import Image


_START_OF_SCAN, _END, _RESTART_INTERVAL = 0xDA, 0xD9, 0xDD
_SEQUENTIAL = (0xC0, 0xC1)
# After a scan: the end, another scan, tables, a comment, the number of lines, application data.
_AFTER_A_SCAN = {_END, _START_OF_SCAN, 0xC4, 0xDB, 0xDC, _RESTART_INTERVAL, 0xFE, *range(0xE0, 0xF0)}
# In pixel data 0xff is followed by 0x00, or is a restart marker.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_SPARE = 4  # bytes that some encoders leave after the last row


def jpeg_damage(data: bytes) -> str | None:
    """What is wrong inside a JPEG that Pillow decodes, as a sentence; None if nothing can be found."""
    place, codes, scan = 2, set(), None
    while True:
        while data[place : place + 2] == b"\xff\xff":  # fill bytes
            place += 1
        if place + 2 > len(data):
            return "The JPEG has no end marker: its last bytes are missing."
        if data[place] != 0xFF:
            return "The JPEG's data is damaged: bytes that belong to nothing lie between its segments."
        code = data[place + 1]
        codes.add(code)
        if code == _END:
            break
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if code == _START_OF_SCAN:
            marker = _MARKER.search(data, place)
            scan = place, marker.start() if marker else len(data)
            numbers = [number[0] - 0xD0 for number in _RESTART.findall(data, *scan)]
            if numbers != [i % 8 for i in range(len(numbers))] or (numbers and _RESTART_INTERVAL not in codes):
                return "The JPEG's data is damaged: its restart markers are out of order."
            place = scan[1]
            if marker and data[place + 1] not in _AFTER_A_SCAN:
                return "The JPEG's data is damaged: a marker lies inside the pixels' data."
    if scan is None or not codes & set(_SEQUENTIAL):
        return None
    start, stop = scan
    while data[stop - 1] == 0xFF:
        stop -= 1
    try:
        _decode(data[: max(start, stop - _SPARE)])
    except OSError:  # as it should be: every byte is needed
        pass
    else:
        return "The JPEG's data is damaged: some of it is left over after the last row."
    # A decoder that meets the end too early fills up with grey; other bytes in its place change the picture.
    if _decode(data) != _decode(data[:stop] + bytes(2048) + b"\xff\xd9"):
        return "The JPEG's data is damaged: it ends before the last row, and the rest is grey."
    return None


def _decode(data: bytes) -> bytes:
    """Grey values at an eighth of the size: all codes are read, but no pixels computed."""
    image = Image.open(io.BytesIO(data))
    image.draft("L", (1, 1))
    image.load()
    return image.tobytes()
