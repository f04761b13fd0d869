"""One pass over a data set, before a run: what is wrong with its images, and a quarantine file of those to leave out.

Every image is decoded as training decodes it. *Unusable* is what a training would replace by another image; anything
else is a *warning*: a training would use the image, and may be better off without it.
"""

import io
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from .. import __version__
from ..images import read_image
from ..manifest import write_text
from ..progress import progress_bar
from .jpeg_damage import jpeg_damage
from .quarantine import digest, quarantine_text
from .sources import BadImageError, ImageSource
from .streaming import read_rows
from .workers import shield_from_signals


# Kind -> what it means.
UNUSABLE = {
    "missing": "the row has no image, or its file cannot be opened",
    "empty": "a file of 0 bytes",
    "unreadable": "no image format that Pillow knows",
    "truncated": "the file ends before its last pixel",
    "corrupt": "the decoder fails",
    "oversized": "more pixels than are allowed, by the header",
    "values": "numbers that are no colours, such as floats outside of 0...1",
}
WARNINGS = {
    "damaged": "decodes, but a PNG's checksum is wrong, or a JPEG's data does not fit together",
    "tiny": "a side is shorter than is allowed",
    "duplicate": "the same file as an earlier image, or another one with the same pixels",
    "mode": "CMYK, 16 bits, floats, transparency, ...: converted to 8-bit RGB with a loss",
    "aspect": "much longer than wide, or wider than long",
    "animated": "several frames, of which the first is used",
}
LEFT_OUT = (*UNUSABLE, "damaged", "tiny", "duplicate")
# The end of a reason of `read_image` -> kind; any other failure to decode is "corrupt".
_REASONS = {
    "has no image": "missing",
    "cannot be opened": "missing",
    "is empty": "empty",
    "knows no such format": "unreadable",
    "too many pixels": "oversized",
    "must have values": "values",
    "truncated": "truncated",
    "end of file": "truncated",
}
_MODES = {"CMYK": "CMYK, its profile ignored", "F": "floats", "LAB": "LAB", "HSV": "HSV", "YCbCr": "YCbCr"}


@dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
        num_images: looked at. findings: a dictionary for each, as in the file. file: the quarantine file.
    """

    num_images: int
    findings: list[dict]
    file: Path

    def table(self) -> str:
        """Kinds, counts and meanings in aligned columns, and two lines on the whole."""
        lines = [f"{'kind':<11}{'severity':<10}{'images':>9}{'left out':>10}"] if self.findings else []
        counts = Counter((finding["kind"], finding["left_out"]) for finding in self.findings)
        for kind, meaning in (UNUSABLE | WARNINGS).items():
            left_out, kept = counts[kind, True], counts[kind, False]
            if left_out + kept:
                severity = "unusable" if kind in UNUSABLE else "warning"
                lines.append(f"{kind:<11}{severity:<10}{left_out + kept:>9,}{left_out:>10,}  {meaning}")
        found = len({finding["index"] for finding in self.findings})
        left_out = len({finding["index"] for finding in self.findings if finding["left_out"]})
        lines.append(f"{self.num_images:,} images, something found in {found:,}, left out {left_out:,}.")
        return "\n".join([*lines, str(self.file)])


def check_images(
    source: ImageSource,
    output: str | Path = "quarantine.jsonl",
    *,
    min_side: int = 32,
    max_aspect: float = 8.0,
    keep: Iterable[str] = (),
    drop: Iterable[str] = (),
    num_workers: int = 2,
) -> Report:
    """Looks at every image once and writes the quarantine file, whole or, if interrupted, not at all.

    Of images with the same pixels the first that is not itself left out stays. It takes about 0.4 kB of memory for each
    image to remember what was seen.

    Args:
        source: of [`load_images`]; its `max_pixels` says what is oversized.
        min_side: a shorter side makes an image tiny. max_aspect: a larger ratio of its sides is listed.
        keep, drop: kinds that are not, or also, left out; by default all unusable ones, damaged, tiny and duplicate.
        num_workers: processes that decode.

    Raises:
        ValueError: a kind is unknown.
    """
    if unknown := {*keep, *drop} - {*UNUSABLE, *WARNINGS}:
        kinds = ", ".join((*UNUSABLE, *WARNINGS))
        raise ValueError(f"There is no kind {', '.join(sorted(unknown))}; there are {kinds}.")
    leave_out = ({*LEFT_OUT} | {*drop}) - {*keep}
    findings, seen, fingerprint, num_images = [], {}, 0, 0
    with progress_bar(total=source.num_images, unit=" images", desc=f"checking {source.name}") as bar:
        for batch in _inspections(source, min_side, max_aspect, num_workers):
            for index, path, file, pixels, found in batch:
                if pixels and not any(kind in leave_out for kind, _ in found):
                    first, first_file = seen.setdefault(pixels, (index, file))
                    if first != index:
                        same = "file" if file == first_file else "pixels"
                        found.append(("duplicate", f"It has the same {same} as image {first}."))
                for kind, reason in found:
                    findings.append(
                        {"index": index}
                        | ({"path": path} if path else {})
                        | {"kind": kind, "severity": "unusable" if kind in UNUSABLE else "warning", "reason": reason}
                        | {"left_out": kind in leave_out, "digest": file}
                    )
                # A sum, since the order in which workers bring a stream's rows depends on their number.
                fingerprint = (fingerprint + int(digest(f"{index} {file}".encode()), 16)) % 2**64
            num_images += len(batch)
            bar.update(len(batch))
            bar.set_postfix(found=len(findings), refresh=False)
    header = {
        "dataset": source.name,
        "split": source.dataset.split and str(source.dataset.split),
        "streaming": source.streaming,
        "num_images": num_images,
        "fingerprint": f"{fingerprint:016x}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "limits": {"min_side": min_side, "max_aspect": max_aspect, "max_pixels": source.max_pixels},
        "left_out": sorted(leave_out),
    }
    write_text(Path(output), quarantine_text(header, findings))
    return Report(num_images, findings, Path(output))


def _inspections(source: ImageSource, min_side: int, max_aspect: float, num_workers: int) -> DataLoader:
    """Batches of what [`inspect`] says of each image, in order; those of a stream worker by worker."""
    if source.streaming:
        rows = _InspectedStream(source, min_side, max_aspect)
        num_workers = max(1, min(num_workers, source.dataset.num_shards))
    else:
        rows = _InspectedImages(source, min_side, max_aspect)
    return DataLoader(rows, batch_size=32, num_workers=num_workers, collate_fn=list, worker_init_fn=shield_from_signals)


class _InspectedImages(Dataset):
    def __init__(self, source: ImageSource, *limits):
        self.source, self.limits = source, limits

    def __len__(self) -> int:
        return self.source.num_images

    def __getitem__(self, index: int) -> tuple:
        return inspect(self.source, index, self.source.dataset[index], *self.limits)


class _InspectedStream(IterableDataset):
    def __init__(self, source: ImageSource, *limits):
        self.source, self.limits = source, limits

    def __iter__(self) -> Iterator[tuple]:
        worker = get_worker_info()
        shards = range(worker.id, self.source.dataset.num_shards, worker.num_workers)
        for _, _, name, row in read_rows(self.source, list(shards), 0, 1):
            yield inspect(self.source, name, row, *self.limits)


def inspect(
    source: ImageSource, index: int | str, row: dict, min_side: int, max_aspect: float
) -> tuple[int | str, str | None, str, bytes | None, list[tuple[str, str]]]:
    """One image: its index, its path, digests of its file and of its pixels (None if it is unusable), and what is found
    about it as (kind, reason)."""
    facts = index, (row[source.image_column] or {}).get("path"), source.digest(row)
    with warnings.catch_warnings(action="ignore"):  # Pillow's, about what is to be found out here
        try:
            content = source.file_bytes(row)
            rgb = read_image(content, source.max_pixels)
        except (BadImageError, ValueError) as error:
            reason = str(error)
            kind = next((kind for words, kind in _REASONS.items() if words in reason), "corrupt")
            return *facts, None, [(kind, reason)]
        found = [("damaged", damage)] if (damage := _damage(content)) else []
        found += _peculiarities(content)
    width, height = rgb.size
    if min(width, height) < min_side:
        found.append(("tiny", f"It has {width}x{height} pixels; a side is shorter than {min_side}."))
    if max(width, height) > max_aspect * min(width, height):
        found.append(("aspect", f"It has {width}x{height} pixels, a ratio of more than {max_aspect:g}."))
    return *facts, sha256(b"%dx%d" % rgb.size + rgb.tobytes()).digest()[:16], found


def _damage(content: bytes) -> str | None:
    """What is wrong inside a file that can be decoded; other formats than these two have nothing to check it by."""
    image = Image.open(io.BytesIO(content))
    if image.format in ("JPEG", "MPO"):
        return jpeg_damage(content)
    if image.format == "PNG":
        try:
            image.verify()
        except Exception as error:  # SyntaxError, OSError, struct.error, ...
            return f"The PNG's data is damaged: {error}."
    return None


def _peculiarities(content: bytes) -> list[tuple[str, str]]:
    image, found = Image.open(io.BytesIO(content)), []
    mode = "16 or more bits" if image.mode.startswith("I") else _MODES.get(image.mode)
    frames = getattr(image, "n_frames", 1)
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        mode = f"{image.mode} with transparent pixels, laid over white"
    if mode:
        found.append(("mode", f"Its colours are {mode}."))
    if frames > 1 and image.format != "MPO":  # in which cameras store a preview
        found.append(("animated", f"It has {frames} frames, of which the first is used."))
    return found
