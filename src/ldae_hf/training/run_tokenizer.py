"""Which learned tokenizer a pre-training run has: the one in its folder, one that it is given, or one trained first."""

from pathlib import Path

from ..configuration_ldae import LEARNED_TOKENIZERS, LDAEConfig
from ..image_processing_ldae import LDAEImageProcessor
from ..latent_tokenizers import CONFIG_NAME, LearnedTokenizer
from ..manifest import write_folder
from ..recipes import Recipe
from .session import RunError, Session, make_accelerator
from .tokenizers import train_with


def tokenizer_for_run(
    output_dir: Path,
    given: str | Path | None,
    recipe: Recipe,
    config: LDAEConfig,
    processor: LDAEImageProcessor,
    session: Session,
    training: dict,
) -> LearnedTokenizer | None:
    """The learned tokenizer of a pre-training run: the one in its folder, else the `given` one, else one trained now.

    Args:
        output_dir: of the pre-training run. given: a folder that `train_tokenizer` wrote, or its `tokenizer/`.
        processor: of the run. training: arguments of `train_tokenizer`.

    Returns:
        The same in all processes; None for a recipe whose tokenizer is not a learned one, and where the time was over
        before it had been trained.

    Raises:
        RunError: a tokenizer is given that is not there, not the one that the run began with, or made for another model
            or processor.
    """
    if config.tokenizer not in LEARNED_TOKENIZERS:
        return None
    folder = output_dir / "tokenizer"
    chosen = None
    if given is not None:
        chosen = LearnedTokenizer.from_pretrained(tokenizer_folder(given))
        check_fits(chosen, config, processor)  # before the run makes it its own
    already_there = (folder / CONFIG_NAME).is_file()
    session.accelerator.wait_for_everyone()  # all have looked before the first one writes
    if already_there:
        learned = LearnedTokenizer.from_pretrained(folder)
        if chosen is not None and chosen.fingerprint != learned.fingerprint:
            raise RunError(f"The run began with the tokenizer in {folder}, not the one in {given}; leave that out.")
        return learned
    if chosen is None:
        training = training | {"processor": output_dir / "processor"}
        # Without the trackers, which belong to the pre-training.
        accelerator = make_accelerator(output_dir, training.pop("mixed_precision"), ())
        with Session(accelerator, output_dir / "tokenizer-training", signals=session.signals) as inner:
            trained = train_with(inner, recipe, **training)
        if trained is None:
            return None
        chosen = LearnedTokenizer.from_pretrained(trained)
    session.on_main(lambda: write_folder(folder, chosen.save_pretrained))
    return chosen


def check_given(given: str | Path | None, output_dir: Path, recipe: Recipe, config: LDAEConfig) -> bool:
    """Whether a pre-training run has its tokenizer, or has none to learn; what it is given has to be there.

    Raises:
        RunError: a tokenizer is given that is not there, or to a recipe that has none to learn.
    """
    learns = config.tokenizer in LEARNED_TOKENIZERS
    if given is not None:
        if not learns:
            raise RunError(f"{recipe.title} has the tokenizer {config.tokenizer}, which is not a learned one to give.")
        tokenizer_folder(given)
    return not learns or given is not None or (output_dir / "tokenizer" / CONFIG_NAME).is_file()


def check_fits(learned: LearnedTokenizer, config: LDAEConfig, processor: LDAEImageProcessor) -> None:
    """Raises RunError unless a tokenizer was made for this model and with this processor."""
    for key in ("tokenizer", "patch_size", "latent_dim"):
        ours, theirs = getattr(config, key), getattr(learned, key)
        if ours != theirs:
            raise RunError(f"The recipe has {key}={ours!r}, but the given tokenizer has {key}={theirs!r}.")
    if learned.processor_fingerprint not in (None, processor.fingerprint):
        raise RunError(
            f"The given tokenizer was trained with the processor {learned.processor_fingerprint[:12]}, not with the "
            f"run's {processor.fingerprint[:12]}; give its whole run, with its processor/, or that as --processor."
        )


def tokenizer_folder(given: str | Path) -> Path:
    """The folder of a tokenizer, given itself or by its run.

    Raises:
        RunError: there is none.
    """
    for folder in (Path(given) / "tokenizer", Path(given)):
        if (folder / CONFIG_NAME).is_file():
            return folder
    raise RunError(f"{given} holds no finished tokenizer; `ldae tokenizer train` makes one.")
