"""WebDataset tars: a label or JSON member that cannot be parsed ends no run, and a damaged archive is named."""

import io
import json
import logging
from collections.abc import Iterator
from typing import BinaryIO

from datasets import DatasetBuilder
from datasets.packaged_modules.webdataset.webdataset import WebDataset


logger = logging.getLogger(__name__)

_STAND_INS = {int: b"-1", json.loads: b"null"}  # -1 stands for "no label"


def tolerate_bad_members(builder: DatasetBuilder) -> None:
    """Makes a builder of `datasets` read tars as [`_Tars`] does, if it reads tars at all."""
    if isinstance(builder, WebDataset):
        builder.__class__ = _Tars  # `datasets` has no place to hand in such a reader


class _Tars(WebDataset):
    @classmethod
    def _get_pipeline_from_tar(cls, tar_path: str, tar_iterator) -> Iterator[dict]:
        try:
            yield from super()._get_pipeline_from_tar(tar_path, _parsable(tar_path, tar_iterator))
        # tarfile.ReadError of a cut archive, zlib's errors, a decoder's errors, ...
        except Exception as error:
            raise ValueError(f"The archive {tar_path} cannot be read: {error or type(error).__name__}.") from error


def _parsable(tar_path: str, members) -> Iterator[tuple[str, BinaryIO]]:
    """The members of a tar, with a stand-in for each label or JSON that cannot be parsed."""
    warned = False
    for name, file in members:
        decode = WebDataset.DECODERS.get(name.rpartition(".")[2].lower())
        if decode in _STAND_INS:
            content = file.read()
            try:
                decode(content)
            except ValueError as error:
                content = _STAND_INS[decode]
                if not warned:  # an archive whose labels are words has as many of them as images
                    logger.warning("%s: %s cannot be parsed (%s) and counts as none.", tar_path, name, error)
                warned = True
            file = io.BytesIO(content)
        yield name, file
