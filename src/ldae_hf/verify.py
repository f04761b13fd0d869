"""Whether a folder still holds what was written into it, loads again as it was, and computes what it did.

Nothing in it is trusted: no pickle is read and no code is run, and whatever a file leads a library to is a failed
check with a sentence, not a crash.
"""

import copy
import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from .configuration_ldae import CONVOLUTIONAL_TOKENIZERS, LDAEConfig
from .golden import GOLDEN_FEATURES, golden_difference
from .image_processing_ldae import LDAEImageProcessor
from .manifest import MANIFEST, is_intact, read_manifest
from .modeling_ldae import LDAEForImageClassification, LDAEForPreTraining, LDAEModel, LDAEPreTrainedModel
from .recipes import Recipe


OK, FAILED, NOT_CHECKED = "ok", "failed", "not checked"
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}  # of golden features, relative to the largest of them
ROUNDING = 1e-5  # relative; what another machine's sines and products differ by, at most
SMALL = 2**24  # values that a model may have in a table, however small its file
MODELS = {model.__name__: model for model in (LDAEModel, LDAEForPreTraining, LDAEForImageClassification)}
WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
TOKENIZER = "ldae_tokenizer.json"  # latent_tokenizers, which names it too, needs diffusers
FINGERPRINTS = {"processor_fingerprint", "tokenizer_fingerprint"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `status` is ok, failed or not checked, `detail` says what was found."""

    folder: Path
    name: str
    status: str
    detail: str


class NotChecked(Exception):
    """There is nothing to check; the message says why."""


class Failed(ValueError):
    """A check has failed; the message says what is wrong."""


def verify(folder: str | Path, dtype: str = "float32") -> list[Check]:
    """Checks a model's folder, a processor's or a tokenizer's, or all of those in a run's.

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
        return look(folder, {"hashes": lambda: hashes(folder, needs_manifest), **checks})
    found = []
    for part in parts_of_run(folder):
        checks = look(part, {"hashes": lambda part=part: hashes(part, True), **(checks_of(part, dtype) or {})})
        if part.name.endswith(".damaged"):
            checks = [Check(part, "hashes", NOT_CHECKED, "set aside by the run, as damaged")]
        elif not part.is_dir():  # by a run that goes on
            checks = [Check(part, "hashes", NOT_CHECKED, "removed while it was looked at")]
        found += checks
    if not found:
        raise ValueError(f"{folder} is the folder of a run that has written nothing yet.")
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
        model = ModelFolder(folder, dtype)
        names = ("weights", "tables", "basis", "features", "recipe")
        return {name: getattr(model, name) for name in names} | finite
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
    unlisted = sorted(files - set(digests) - {MANIFEST})
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


def processor(folder: Path) -> str:
    """The basis has the fingerprint that the configuration names, or loading fails."""
    loaded = LDAEImageProcessor.from_pretrained(folder)
    if not loaded.fitted:
        raise NotChecked("no PCA basis yet")
    return f"fingerprint {loaded.fingerprint[:12]}"


def tokenizer(folder: Path) -> str:
    """The tensors have the fingerprint that the JSON names, or loading fails."""
    from .latent_tokenizers import LearnedTokenizer

    return f"fingerprint {LearnedTokenizer.from_pretrained(folder).fingerprint[:12]}"


def some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


# ---- a model


@dataclass
class ModelFolder:
    """A folder with a model. The methods without arguments are checks: they return what they found, or raise."""

    folder: Path
    dtype: str

    @cached_property
    def stated(self) -> dict:
        """What config.json says."""
        stated = json.loads((self.folder / CONFIG).read_text())
        if stated.get("model_type") != "ldae":
            raise Failed(f"{CONFIG} is of a model of type {stated.get('model_type')!r}, not 'ldae'")
        return stated

    @cached_property
    def config(self) -> LDAEConfig:
        return LDAEConfig.from_dict(self.stated)

    @cached_property
    def model_class(self) -> type[LDAEPreTrainedModel]:
        architectures = self.stated.get("architectures")
        for name in architectures if isinstance(architectures, list) else []:
            if name in MODELS:
                return MODELS[name]
        raise Failed(f"{CONFIG} names the architectures {architectures!r}; l-DAE's are {', '.join(MODELS)}")

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What the weights' file holds."""
        self.check_shapes()
        return load_file(self.folder / WEIGHTS)

    def check_shapes(self) -> None:
        """The weights' file must hold the tensors that the configuration asks for, before any is loaded."""
        with safe_open(self.folder / WEIGHTS, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        self.check_size(shapes)
        with torch.device("meta"):
            model = self.model_class(copy.deepcopy(self.config))
        expected = {name: tuple(value.shape) for name, value in parts_of(model).items()}
        if missing := sorted(expected.keys() - shapes.keys()):
            raise Failed(f"{WEIGHTS} lacks {some(missing)}")
        if unexpected := sorted(shapes.keys() - expected.keys()):
            raise Failed(f"{WEIGHTS} holds what the model does not have: {some(unexpected)}")
        if other := sorted(name for name in expected if shapes[name] != expected[name]):
            raise Failed(f"not of the shape that {CONFIG} asks for: {some(other)}")

    def check_size(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """A configuration must not make us allocate what it likes."""
        config, values = self.config, sum(torch.Size(shape).numel() for shape in shapes.values())
        numbers = [getattr(config, name) for name in LDAEConfig.__annotations__]
        numbers += [config.patch_dim**2, config.num_patches * config.hidden_size, config.intermediate_size]
        largest = max(number for number in numbers if isinstance(number, int))
        layers = config.num_hidden_layers + config.decoder_num_hidden_layers
        if largest > max(values, SMALL) or layers > 2 * len(shapes) or config.num_labels > max(values, SMALL):
            raise Failed(f"{CONFIG} describes a larger model than {WEIGHTS} can hold")

    def load(self, dtype: str | torch.dtype) -> LDAEPreTrainedModel:
        """The model as a user loads it."""
        self.check_shapes()
        settings = dict(config=copy.deepcopy(self.config), attn_implementation="sdpa", use_safetensors=True)
        return self.model_class.from_pretrained(self.folder, dtype=dtype, local_files_only=True, **settings)

    def weights(self) -> str:
        """What is loaded is what the file holds, bit for bit, and nothing else."""
        loaded = parts_of(self.load("auto"))
        if different := [name for name, value in self.tensors.items() if not same_bits(value, loaded[name])]:
            raise Failed(f"loaded, these are not what {WEIGHTS} holds: {some(different)}")
        return f"{len(loaded)} tensors load bit for bit"

    def tables(self) -> str:
        """Buffers that follow from the configuration, against those of a new model."""
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = 1  # the tables do not depend on the depth
        tensors, prefix = self.tensors, self.prefix
        with torch.random.fork_rng():
            fresh = LDAEModel(config)
        tables = {name: value for name, value in fresh.named_buffers() if not name.startswith("tokenizer.")}
        if other := [name for name, value in tables.items() if not nearly_equal(tensors[prefix + name], value)]:
            raise Failed(f"not the tables of {CONFIG}: {some(other)}")
        return ", ".join(tables)

    def basis(self) -> str:
        """The tokenizer's buffers, against the processor and the learned tokenizer beside the model."""
        if not (self.folder / PROCESSOR).exists():
            raise NotChecked("no processor beside the model")
        tensors, beside = self.tensors, LDAEImageProcessor.from_pretrained(self.folder)
        model = self.load("auto")
        model.check_processor(beside)
        expected = model.base_model.tokenizer.fitted(*beside.basis)
        if self.config.tokenizer_fingerprint is not None:
            learned = self.learned_tokenizer()
            model.set_tokenizer(learned)  # which compares the fingerprints
            expected |= learned.buffers
        names = {name: f"{self.prefix}tokenizer.{name}" for name in expected}
        if other := [name for name, value in expected.items() if not nearly_equal(tensors[names[name]], value)]:
            raise Failed(f"not those of the processor or the tokenizer beside the model: {some(other)}")
        return f"that of the processor {beside.fingerprint[:12]}"

    def features(self) -> str:
        """What the encoder makes of fixed images, against what it made of them when it was saved."""
        if not (self.folder / GOLDEN_FEATURES).exists():
            raise NotChecked("no golden features")
        model = self.load(getattr(torch, self.dtype)).to("cuda" if torch.cuda.is_available() else "cpu")
        if self.config.tokenizer in CONVOLUTIONAL_TOKENIZERS:
            model.set_tokenizer(self.learned_tokenizer())
        difference, allowed = golden_difference(self.folder, model.base_model), TOLERANCES[self.dtype]
        sentence = f"golden features differ by {difference:.1e} in {self.dtype} on {model.device.type}"
        if not difference <= allowed:  # NaN too
            raise Failed(f"{sentence}, more than {allowed:g}")
        return sentence

    def recipe(self) -> str:
        """The recipe's model section, against the configuration."""
        if not (self.folder / "recipe.json").exists():
            raise NotChecked("no recipe.json")
        recipe = Recipe.load(self.folder)
        described, names = recipe.model_config(), LDAEConfig.__annotations__.keys() - FINGERPRINTS
        if other := sorted(name for name in names if getattr(described, name) != getattr(self.config, name)):
            raise Failed(f"recipe.json describes another model than {CONFIG}: see {some(other)}")
        return recipe.title

    @property
    def prefix(self) -> str:
        """Of the encoder's tensors in the file."""
        return "" if self.model_class is LDAEModel else "ldae."

    def learned_tokenizer(self):
        from .latent_tokenizers import LearnedTokenizer

        return LearnedTokenizer.from_pretrained(self.folder, subfolder="tokenizer")


def parts_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, those too that would not be saved."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """NaN is equal to itself here."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(value.detach().reshape(-1).view(torch.uint8) for value in (one, other)))


def nearly_equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    expected = expected.to(found.dtype)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=ROUNDING, atol=ROUNDING)
