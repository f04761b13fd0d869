"""What a figure is drawn of, found where a user names it: encoders, processors, learned tokenizers."""

from collections.abc import Sequence
from pathlib import Path

from transformers.utils import IMAGE_PROCESSOR_NAME

from ...image_processing_ldae import LDAEImageProcessor
from ...latent_tokenizers import CONFIG_NAME, LearnedTokenizer
from ..encoders import Encoder, open_encoder


def find_encoder(source: str | Path, **options) -> Encoder:
    """An encoder, of a run's folder too. See [`open_encoder`] for the rest, and for what is raised."""
    inside = Path(source) / "encoder"
    return open_encoder(inside if inside.is_dir() else source, **options)


def find_processor(source: str | Path) -> LDAEImageProcessor:
    """The fitted processor of a run, a checkpoint, an encoder, a tokenizer's run, or a name on the Hub.

    Raises:
        ValueError: there is none in the folder, or it is not fitted.
        OSError: there is no such folder or name.
    """
    folder = Path(source)
    if folder.is_dir():
        # The folder of a tokenizer lies beside its processor's, or in a checkpoint.
        places = (folder / "processor", folder, folder / "encoder", folder.parent / "processor", folder.parent)
        places = [place for place in places if (place / IMAGE_PROCESSOR_NAME).is_file()]
        if not places:
            raise ValueError(f"{source} holds no processor; name a run, an encoder, or a processor's own folder.")
        source = places[0]
    processor = LDAEImageProcessor.from_pretrained(source)
    if not processor.fitted:
        raise ValueError(f"The processor of {source} has no PCA basis yet; fit it first.")
    return processor


def find_tokenizer(source: str | Path) -> LearnedTokenizer | None:
    """The learned patch-wise tokenizer of a run, a checkpoint or a tokenizer's run; None where there is none.

    Raises:
        ValueError: the tokenizer is convolutional, and so has no filters of the patch's size.
    """
    for folder in (Path(source) / "tokenizer", Path(source) / "encoder" / "tokenizer", Path(source)):
        if (folder / CONFIG_NAME).is_file():
            learned = LearnedTokenizer.from_pretrained(folder)
            if learned.autoencoder is not None:
                raise ValueError(
                    f"{folder} holds a {learned.tokenizer}, which is not patch-wise and has no such filters."
                )
            return learned
    return None


def short_names(sources: Sequence[str | Path]) -> list[str]:
    """Names for a legend: as many of the last parts of each path as it takes to tell them apart.

    Raises:
        ValueError: one is there twice.
    """
    parts = [Path(source).parts for source in sources]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{', '.join(map(str, sources))}: one of them is named twice.")
