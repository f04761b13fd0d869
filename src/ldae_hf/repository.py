"""Everything that a trained model is, as one repository of the Hub: built as a folder, whole or not at all.

config.json, model.safetensors …   the encoder, as `AutoModel` loads it, with its processor and PCA, and its code
tokenizer/                         a learned tokenizer, where there is one
recipe.json, training.json, metrics.jsonl, golden_features.safetensors, exports.json, manifest.json
pictures/, results.jsonl, .eval_results/, README.md
vit/, timm/                        the encoder folded into stock classes, for who does not have this package
pretraining/                       the whole model with decoder, scheduler and moving average, to train on
"""

import fcntl
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from .cards import write_card
from .cards.facts import public_json
from .configuration_ldae import CONVOLUTIONAL_TOKENIZERS, LDAEConfig
from .export import write_exports
from .golden import GOLDEN_FEATURES, write_golden_features
from .hub import check_repo_id, upload, write_token
from .image_processing_ldae import BASIS_NAME, LDAEImageProcessor
from .latent_tokenizers import LearnedTokenizer
from .manifest import MANIFEST, check_folder, write_folder
from .model_checks import CONFIG, PROCESSOR, WEIGHTS, ModelFolder
from .modeling_ldae import LDAEForPreTraining, LDAEPreTrainedModel
from .progress import quietly
from .remote_code import write_auto_maps, write_remote_code
from .scheduling_ldae import LDAEScheduler
from .training.checkpointing import EMA, checkpoints
from .training.pictures import mosaic
from .training.publishing import load_published, newest_in_run
from .training.starting_point import PRETRAINING


BESIDE_THE_MODEL = (PROCESSOR, BASIS_NAME, "recipe.json", "training.json")
FACTS = ("recipe.json", "training.json", "exports.json")
TOKENIZER, PICTURES = "tokenizer", "pictures"
# What an earlier push may have left of these, and this one does not have, is deleted.
PARTS = [f"{folder}/*" for folder in (".eval_results", PICTURES, PRETRAINING, "timm", TOKENIZER, "vit")]
PARTS += ["results.jsonl", "exports.json"]
LOCK = "push.lock"
EDITED = ("README.md",)  # on the Hub's pages too, so that no manifest can list it
DIRECTIONS = 24  # of the PCA, that are painted


def build_repository(
    source: str | Path,
    folder: str | Path,
    *,
    repo_id: str | None = None,
    rows: Iterable[dict] = (),
    pictures: bool = True,
    links: bool = False,
) -> Path:
    """Writes `folder`; one that was built before is replaced when the new one is complete.

    Args:
        source: a run's folder, finished or not, a checkpoint's, or that of an encoder or a classifier.
        repo_id: `owner/name`, for the card.
        rows: of a ledger; the card shows those of this model.
        pictures: with the newest picture that the run painted, which shows images of the data set.
        links: tensors may be further names of the model's own files, so that who writes into one damages that.

    Raises:
        ValueError: there is no such model, it has not been saved yet, or `folder` was not built here.
        DamagedError: the model is not as it was written.
    """
    source, folder = Path(source), Path(folder)
    if folder.exists() and not all((folder / name).is_file() for name in (MANIFEST, *EDITED)):
        raise ValueError(f"{folder} is there, and was not written as a repository; name another folder.")
    if source.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder} is what would be read, or holds it; name another folder.")
    encoder, checkpoint = parts_of(source)
    for part in filter(None, (encoder, checkpoint)):
        if (part / MANIFEST).is_file():
            check_folder(part)

    def write(path: Path) -> None:
        if encoder is not None:
            take(encoder, path, CONFIG, WEIGHTS, GOLDEN_FEATURES, TOKENIZER, *BESIDE_THE_MODEL)
        else:
            with quietly():
                load_published(checkpoint)[0].ldae.save_pretrained(path)
            take(checkpoint, path, TOKENIZER, *BESIDE_THE_MODEL)
        model, processor = load_model(path), LDAEImageProcessor.from_pretrained(path)
        model.check_processor(processor)
        if not (path / GOLDEN_FEATURES).exists():
            write_golden_features(path, model.base_model)
        if model.config.is_plain_vit:
            write_exports(path, model, processor)
        if checkpoint is not None:
            write_folder(path / PRETRAINING, lambda pretraining: write_pretraining(pretraining, checkpoint))
        take(source, path, "metrics.jsonl")
        (path / PICTURES).mkdir()
        directions_picture(processor).save(path / PICTURES / "directions.png")
        names = ("denoising.png", "step-*.png")  # of a repository, of a run
        if pictures and (painted := [file for name in names for file in sorted((source / PICTURES).glob(name))]):
            check_inside(painted[-1], source)
            shutil.copyfile(painted[-1], path / PICTURES / "denoising.png")
        write_remote_code(path)
        hide_paths(path)
        write_card(path, repo_id, rows)
        if not links:
            break_links(path)
        if checkpoint is not None and not checkpoint.is_dir():  # else all that was taken of it was whole
            raise OSError(f"{checkpoint} was removed by its run while it was read; push once more.")

    with ended_by_exception():
        write_folder(folder, write, unlisted=EDITED)
    return folder


def parts_of(source: Path) -> tuple[Path | None, Path | None]:
    """The folders of the encoder and of the whole model, where there are any; both are of one step.

    No encoder: that of the whole model is to be taken.
    """
    if (source / "checkpoints").is_dir():
        encoder = source / "encoder" if (source / "encoder" / MANIFEST).is_file() else None
        if encoder is not None and not checkpoints(source / "checkpoints"):  # they were deleted
            return encoder, None
        checkpoint = newest_in_run(source / "checkpoints")
        if encoder is not None and steps_of(encoder) != steps_of(checkpoint):
            print(
                f"warning: {encoder} is of another step than {checkpoint}, the newest one that is whole; that is taken."
            )
            encoder = None
        return encoder, checkpoint
    if not (source / CONFIG).is_file():
        raise ValueError(f"{source} holds no run, no checkpoint and no encoder; name a folder that does.")
    if (source / PRETRAINING / CONFIG).is_file():  # a repository, downloaded or built before
        return source, source / PRETRAINING
    whole = ModelFolder(source, "float32").model_class is LDAEForPreTraining
    return (None, source) if whole else (source, None)


def steps_of(folder: Path) -> object:
    """For how many steps a model was trained, as its `training.json` says; None if it has none."""
    training = public_json(folder / "training.json") if (folder / "training.json").is_file() else None
    return training.get("steps") if isinstance(training, dict) else None


def load_model(folder: Path) -> LDAEPreTrainedModel:
    """An encoder or a classifier in float32, complete with its tokenizer."""
    model = ModelFolder(folder, "float32").load(torch.float32)
    if model.config.tokenizer in CONVOLUTIONAL_TOKENIZERS:
        model.set_tokenizer(LearnedTokenizer.from_pretrained(folder, subfolder=TOKENIZER))
    return model


def take(source: Path, folder: Path, *names: str) -> None:
    """Files and folders by name, those of them that are there."""
    for name in names:
        for path in (source / name, *(source / name).rglob("*")):
            check_inside(path, source)
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name, copy_function=copy)
        elif (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            copy(source / name, folder / name)


def check_inside(path: Path, folder: Path) -> None:
    """Raises ValueError for a link that leads out of a folder, but for those of huggingface_hub's cache."""
    root, target = folder.resolve(), path.resolve()
    if not target.is_relative_to(root) and target.parent != root.parent.parent / "blobs":
        raise ValueError(f"{path} is a link to {target}, outside of {folder}, and is not published; remove it.")


def copy(source: str | Path, target: str | Path) -> None:
    """A copy; of tensors a second name of the same file where the disk can do that: replace them, never write into."""
    if Path(source).suffix == ".safetensors":
        with suppress(OSError):
            return os.link(Path(source).resolve(), target)
    shutil.copyfile(source, target)


def break_links(folder: Path) -> None:
    """Gives every file of a folder content of its own."""
    for file in [path for path in folder.rglob("*") if path.is_file() and path.stat().st_nlink > 1]:
        aside = file.with_name(f".{file.name}.copy")
        shutil.copyfile(file, aside)
        aside.replace(file)


def write_pretraining(folder: Path, checkpoint: Path) -> None:
    """What it takes to train on: the whole model, its scheduler, the moving average; no optimizer's state."""
    take(checkpoint, folder, CONFIG, WEIGHTS, EMA, TOKENIZER, *BESIDE_THE_MODEL)
    write_auto_maps(folder)  # the code itself lies at the repository's root
    LDAEScheduler.for_model(LDAEConfig.from_pretrained(folder)).save_pretrained(folder / "scheduler")
    hide_paths(folder)


def hide_paths(folder: Path) -> None:
    """Leaves of the absolute paths in a folder's JSON files their last names."""
    for file in folder.rglob("*.json"):
        if (public := public_json(file)) != json.loads(file.read_bytes()):
            file.write_text(json.dumps(public, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def directions_picture(processor: LDAEImageProcessor):
    """The first directions of the PCA as patches, the largest value of each white or black, zero grey."""
    side = processor.patch_size
    directions = processor.components[: min(DIRECTIONS, processor.patch_dim)].reshape(-1, 3, side, side)
    directions = directions / directions.abs().amax(dim=(1, 2, 3), keepdim=True)
    rows = (directions / 2 + 0.5).split(8)
    return mosaic([(f"{8 * number + 1} ...", row) for number, row in enumerate(rows) if len(row) == 8])


def push_repository(
    source: str | Path, repo_id: str, *, private: bool = False, revision: str | None = None, **options
) -> str:
    """Builds the repository, of a run in its `hub/`, and uploads what the Hub does not have of it; broken off, the same
    call goes on. Another push of the same run is waited for: it may be that of a training which was killed.

    Args:
        source, options: as in [`build_repository`]. repo_id: `owner/name`. private: of a repository that is made.
        revision: the branch, default `main`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: a bad name, no access, or what `build_repository` raises.
        OSError: the network, or the disk.
    """
    check_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} names no owner; write OWNER/NAME.")
    write_token(None, repo_id)  # before minutes of work
    source = Path(source)
    is_run = (source / "checkpoints").is_dir()
    with TemporaryDirectory() as elsewhere, one_at_a_time(source / LOCK) if is_run else nullcontext():
        folder = source / "hub" if is_run else Path(elsewhere) / "repository"
        build_repository(source, folder, repo_id=repo_id, links=True, **options)
        whole = (folder / PRETRAINING).is_dir()  # else an earlier push's is not ours to delete
        stale = [pattern for pattern in PARTS if whole or not pattern.startswith(PRETRAINING)]
        return upload(folder, repo_id, private=private or None, revision=revision, delete_patterns=stale)


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Waits while another process is within it; one that has ended, however it did, is not."""
    with open(lock, "ab") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(
                f"{lock.parent} is being pushed by another process; waiting until that ends",
                file=sys.stderr,
                flush=True,
            )
            fcntl.lockf(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def ended_by_exception() -> Iterator[None]:
    """Within it SIGTERM raises SystemExit, so that what was half-written is removed.

    Not in a thread, where it cannot, nor where somebody else deals with the signal.
    """
    is_free = threading.current_thread() is threading.main_thread()
    if not is_free or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
