"""Whether a folder still holds what was written into it, loads again as it was, and computes what it did.

Nothing in it is trusted: no pickle is read and no code is run, and whatever a file leads a library to is a failed
check with a sentence, not a crash.
"""

import copy
import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from .golden import GOLDEN_FEATURES
from .image_processing_ldae import LDAEImageProcessor
from .manifest import MANIFEST, is_intact, read_manifest
from .model_checks import (
    CONFIG,
    PROCESSOR,
    TOLERANCES,
    WEIGHTS,
    Failed,
    ModelFolder,
    NotChecked,
    nearly_equal,
    some,
)


OK, FAILED, NOT_CHECKED = "ok", "failed", "not checked"
ON_THE_HUB = (".gitattributes", "README.md")  # which are made or edited there
TOKENIZER = "ldae_tokenizer.json"  # latent_tokenizers, which names it too, needs diffusers
EMA = "training/ema.safetensors"  # training.checkpointing, which names it too, needs accelerate


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `status` is ok, failed or not checked, `detail` says what was found."""

    folder: Path
    name: str
    status: str
    detail: str


def verify(folder: str | Path, dtype: str = "float32") -> list[Check]:
    """Checks a model's folder (with what a published repository has beside it), a processor's or a tokenizer's, or all
    of those in a run's.

    Args:
        dtype: precision in which features are compared with the golden ones, `"float32"` or `"bfloat16"`.

    Raises:
        ValueError: there is no such folder, it is none of these, or the precision is another.
    """
    folder = Path(folder)
    if dtype not in TOLERANCES:
        raise ValueError(f"dtype is {dtype!r}, but must be {' or '.join(TOLERANCES)}.")
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    if not (folder / "run.json").is_file() and not (folder / "checkpoints").is_dir():
        checks = checks_of(folder, dtype)
        if checks is None:
            raise ValueError(f"{folder} holds no model, processor or tokenizer, and is not the folder of a run.")
        needs_manifest = (folder / "training").is_dir() or (folder / GOLDEN_FEATURES).is_file()
        found = look(folder, {"hashes": lambda: hashes(folder, needs_manifest), **checks})
        return found + checks_of_repository(folder, dtype)
    found = []
    for part in parts_of_run(folder):
        if part.name.endswith(".damaged"):
            found.append(Check(part, "hashes", NOT_CHECKED, "set aside by the run, as damaged"))
            continue
        checks = look(part, {"hashes": lambda part=part: hashes(part, True), **(checks_of(part, dtype) or {})})
        gone = [Check(part, "hashes", NOT_CHECKED, "removed by the run while it was looked at")]
        found += checks if part.is_dir() else gone
    if not found:
        raise ValueError(f"{folder} is the folder of a run that has written nothing yet.")
    return found


def checks_of_repository(folder: Path, dtype: str) -> list[Check]:
    """What a published repository has beside the encoder, where it has it."""
    stock, timm, whole, found = folder / "vit", folder / "timm", folder / "pretraining", []
    if stock.is_dir():
        found += look(stock, {"features": lambda: ModelFolder(folder, dtype).stock_features(stock)})
    if timm.is_dir():
        model = ModelFolder(folder, "float32")
        found += look(timm, {"weights": lambda: timm_weights(timm, model), "features": lambda: timm_features(model)})
    if whole.is_dir():
        found += look(whole, {"hashes": lambda: hashes(whole, True), **(checks_of(whole, dtype) or {})})
        noise = whole / "scheduler"
        found += look(noise, {"scheduler": lambda: scheduler(noise, ModelFolder(whole, dtype))}) * noise.is_dir()
    return found


def parts_of_run(folder: Path) -> list[Path]:
    """The folders in a run's, and in that of its tokenizer's training, that have a manifest."""
    runs = [folder, folder / "tokenizer-training"]
    named = [run / name for run in runs for name in ("processor", "tokenizer", "encoder")]
    checkpoints = [part for run in runs for part in sorted((run / "checkpoints").glob("step-*"))]
    return [part for part in (*named, *checkpoints) if part.is_dir()]


def checks_of(folder: Path, dtype: str) -> dict[str, Callable[[], str]] | None:
    """The checks by name that belong to what a folder holds, beside its hashes; None if it holds nothing of ours."""
    finite = {"finite": lambda: finite_values(folder)}
    if (folder / TOKENIZER).exists():  # first: a convolutional one has a config.json too
        return {"tokenizer": lambda: tokenizer(folder)} | finite
    if (folder / CONFIG).exists() or (folder / WEIGHTS).exists():
        if stated(folder / CONFIG, "model_type") == "vit_mae":
            return {"weights": not_ours} | finite
        model = ModelFolder(folder, dtype)
        names = ("weights", "tables", "basis", "features", "recipe")
        mean = {"average": lambda: average(model)} if (folder / EMA).exists() else {}
        return {name: getattr(model, name) for name in names} | mean | finite
    if (folder / PROCESSOR).exists():
        return {"processor": lambda: processor(folder)}
    return finite if (folder / "training").is_dir() else None  # of the training of a tokenizer


def look(folder: Path, checks: dict[str, Callable[[], str]]) -> list[Check]:
    """Carries out checks, each a function that returns what it found."""
    found = []
    for name, check in checks.items():
        try:
            status, detail = OK, check()
        except NotChecked as error:
            status, detail = NOT_CHECKED, str(error)
        except Failed as error:
            status, detail = FAILED, str(error)
        except Exception as error:  # whatever a damaged or hostile file leads a library to
            status, detail = FAILED, f"{type(error).__name__}: {textwrap.shorten(str(error), 300)}"
        if status == FAILED and detail in [check.detail for check in found]:
            status, detail = NOT_CHECKED, "for the reason above"
        plain = "".join(c if c.isprintable() else "?" for c in detail)  # a name may hold what a terminal obeys
        found.append(Check(folder, name, status, plain))
    return found


# ---- files


def hashes(folder: Path, needs_manifest: bool) -> str:
    """Every file that the manifest lists, against its sha256."""
    if not needs_manifest and not (folder / MANIFEST).exists():
        raise NotChecked("no manifest")
    digests = read_manifest(folder)
    if damaged := [name for name, digest in digests.items() if not is_intact(folder, name, digest)]:
        raise Failed(f"missing, or not as written: {some(damaged)}")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    unlisted = sorted(files - set(digests) - {MANIFEST, *ON_THE_HUB})
    return f"{len(digests)} files as written" + (f"; not in the manifest: {some(unlisted)}" if unlisted else "")


def finite_values(folder: Path) -> str:
    """Every floating-point tensor of every file, optimizer and EMA too."""
    bad, seen = [], 0
    for file in sorted(path for path in folder.rglob("*.safetensors") if path.is_file()):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                value = tensors.get_tensor(name)
                seen += value.is_floating_point()
                if value.is_floating_point() and not value.isfinite().all():
                    bad.append(f"{name} in {file.relative_to(folder)}")
    if bad:
        raise Failed(f"NaN or infinite values: {some(bad)}")
    return f"{seen} tensors"


def average(model: ModelFolder) -> str:
    """The moving average has a value of the same shape for every parameter, and for nothing else."""
    model.check_shapes()  # before a model of the configuration's size is made
    with torch.device("meta"):
        parameters = dict(model.model_class(copy.deepcopy(model.config)).named_parameters())
    expected = {name: tuple(value.shape) for name, value in parameters.items()}
    with safe_open(model.folder / EMA, "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    if other := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
        raise Failed(f"{EMA} is not of the model's parameters: see {some(other)}")
    return f"{len(found)} tensors, of the model's parameters"


def scheduler(folder: Path, model: ModelFolder) -> str:
    """The scheduler loads, and has the noise levels of the configuration beside it."""
    try:
        from .scheduling_ldae import LDAEScheduler
    except ImportError:
        raise NotChecked("diffusers is not installed") from None
    expected = LDAEScheduler.for_model(model.config)
    for key, value in expected.config.items():  # before a table as long as it likes is made
        if not key.startswith("_") and stated(folder / "scheduler_config.json", key) != value:
            raise Failed(f"scheduler_config.json is not of the model's noise: see {key}")
    loaded = LDAEScheduler.from_pretrained(folder, local_files_only=True)
    if not expected.agrees_with(loaded):
        raise Failed("loaded, it has other noise levels than the model")
    return f"{len(loaded)} noise levels, those of the model"


def timm_weights(folder: Path, model: ModelFolder) -> str:
    """The folder for timm holds the encoder, folded, under timm's names, and the shape of it."""
    from .export import fold, timm_state_dict
    from .export.timm_vit import timm_arguments

    expected, found = timm_state_dict(fold(model.load(torch.float32))), load_file(folder / WEIGHTS)
    if stated(folder / CONFIG, "model_args") != timm_arguments(model.config):
        raise Failed(f"{CONFIG} is not of the encoder's shape: see model_args")
    other = [name for name in expected.keys() & found.keys() if not nearly_equal(found[name], expected[name])]
    if other := sorted({*other, *(expected.keys() ^ found.keys())}):
        raise Failed(f"{WEIGHTS} does not hold the encoder as timm has it: see {some(other)}")
    return f"{len(found)} tensors, those of the encoder, folded"


@torch.no_grad()
def timm_features(model: ModelFolder) -> str:
    """What timm's own class makes of the fixed images with these weights."""
    from .export import fold
    from .export.parity import NotMeasured, relative_difference, through_timm

    if not (model.folder / GOLDEN_FEATURES).exists():
        raise NotChecked("no golden features")
    golden = load_file(model.folder / GOLDEN_FEATURES)
    loaded = model.load(torch.float32)
    try:
        forward = through_timm(fold(loaded.base_model))
    except NotMeasured as error:
        raise NotChecked("timm is not installed" if "No module named 'timm'" in str(error) else str(error)) from None
    difference = relative_difference(forward(golden["pixels"] / 127.5 - 1), golden["last_hidden_state"])
    sentence = f"those of timm's own class differ by {difference:.1e} in float32"
    if not difference <= TOLERANCES["float32"]:
        raise Failed(f"{sentence}, more than {TOLERANCES['float32']:g}")
    return sentence


def stated(file: Path, key: str) -> object:
    """What a configuration says of itself, if it does."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found.get(key) if isinstance(found, dict) else None


def not_ours() -> str:
    """Of the baseline, whose class is transformers'."""
    raise NotChecked("a masked autoencoder, which transformers loads; its hashes are checked")


def processor(folder: Path) -> str:
    """The basis has the fingerprint that the configuration names, or loading fails."""
    if str(stated(folder / PROCESSOR, "image_processor_type")).startswith("Perceiver"):
        raise NotChecked("a stock image processor, to which nothing was fitted")
    loaded = LDAEImageProcessor.from_pretrained(folder)
    if not loaded.fitted:
        raise NotChecked("no PCA basis yet")
    return f"fingerprint {loaded.fingerprint[:12]}"


def tokenizer(folder: Path) -> str:
    """The tensors have the fingerprint that the JSON names, or loading fails."""
    from .latent_tokenizers import LearnedTokenizer

    return f"fingerprint {LearnedTokenizer.from_pretrained(folder).fingerprint[:12]}"
