"""Small images that are read again and again, kept decoded in memory."""

from PIL import Image

from ..progress import progress_bar
from .sources import ImageSource


class DecodedImages:
    """Reads every image of a source once and keeps as many as fit; the same images as from the source, to the last bit.

    Worker processes that are forked share them. Each training process of a node has its own.

    Args:
        source: no stream. limit: bytes of memory, at 4 for a pixel (Pillow's); the images that come after are decoded
            each time.
    """

    def __init__(self, source: ImageSource, limit: int, progress: bool = True):
        self.source, self.kept, used = source, [], 0
        if limit <= 0:
            return
        for index in progress_bar(
            range(len(source)), desc=f"decoding {source.name}", leave=False, disable=not progress
        ):
            found = source.read_or_replace(index)
            used += 4 * found[0].width * found[0].height
            if used > limit:
                return
            self.kept.append(found)

    def read_or_replace(self, index: int) -> tuple[Image.Image, int, list[dict]]:
        """As that of [`ImageSource`]."""
        return self.kept[index] if index < len(self.kept) else self.source.read_or_replace(index)
