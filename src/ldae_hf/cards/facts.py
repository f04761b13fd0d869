"""What the folder of a model tells its card."""

import json
import re
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..configuration_ldae import LDAEConfig
from ..modeling_ldae import LDAEModel
from ..recipes import Recipe, load_recipe
from .local_paths import without_paths
from .results import Result, results_of_model


# Checkpoints that are planned, by name: the paper's three sizes at 400 epochs, all probed under one protocol.
PLANNED = {"ldae-vit-b": "size_b", "ldae-vit-half-l": "random_crop", "ldae-vit-l": "size_l"}
PLANNED_FILES = ("vit/config.json", "timm/config.json", "pretraining/config.json")


@dataclass(frozen=True)
class CardFacts:
    """What a folder tells: `training` and `exports` as its JSON files have them, `total_steps` of the whole training if
    known, `files` by relative path, `remote_code` if it brings its own, `labels` of a classifier, else none."""

    name: str
    config: LDAEConfig
    recipe: Recipe | None
    training: dict = field(default_factory=dict)
    exports: list = field(default_factory=list)
    total_steps: int | None = None
    files: frozenset = frozenset()
    remote_code: bool = False
    labels: tuple = ()

    @property
    def has_weights(self) -> bool:
        return any(re.fullmatch(r"model[^/]*\.safetensors", name) for name in self.files)

    @property
    def tokenizer_learned_labels(self) -> bool:
        """Whether the tokenizer's perceptual loss is on features of a network that was trained on labels."""
        return self.recipe is not None and self.recipe.tokenizer.get("perceptual_loss") in ("labels", "lpips")

    def results(self, rows: Iterable[dict]) -> list[Result]:
        """Those of this encoder, without local paths; a classifier's weights are others, and no row is of them."""
        if self.recipe is None or self.labels:
            return []
        return results_of_model(map(without_paths, rows), self.recipe, self.config, self.training)


def read_facts(folder: str | Path) -> CardFacts:
    """Reads a model repository's folder; what it tells of recipe and training names no folder of this machine.

    Raises:
        OSError, ValueError: there is no such folder, no configuration of ours in it, or a broken JSON file.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model (config.json), and is none of the planned {', '.join(PLANNED)}.")
    content, config = _json(folder / "config.json", {}), LDAEConfig.from_pretrained(folder)
    recipe = None
    if (folder / "recipe.json").exists():
        public = public_json(folder / "recipe.json")  # first: it says the line in which it is none
        Recipe.load(folder)  # which looks at the keys
        recipe = Recipe(**public)
    training = _json(folder / "training.json", {})
    classifies = any(name.endswith("ForImageClassification") for name in config.architectures or ())
    return CardFacts(
        name=folder.resolve().name.removeprefix(".").removesuffix(".writing"),  # it may still be written aside
        config=config,
        recipe=recipe,
        training=training,
        exports=_json(folder / "exports.json", []),
        total_steps=_total_steps(folder, recipe) if recipe else None,
        files=frozenset(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()),
        remote_code="auto_map" in content,
        labels=tuple(config.id2label.values()) if classifies else (),
    )


def planned_facts(name: str) -> CardFacts:
    """Of a checkpoint that does not exist yet, by its name in `PLANNED`."""
    recipe = load_recipe(PLANNED[name])
    return CardFacts(name, recipe.model_config(), recipe, files=frozenset(PLANNED_FILES), remote_code=True)


def encoder_parameters(config: LDAEConfig) -> int:
    """Of the encoder as it is saved."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LDAEModel(config).parameters())


def folded_parameters(config: LDAEConfig) -> int | None:
    """Of the plain ViT that the encoder folds into; None where it folds into none."""
    if not config.is_plain_vit:
        return None
    width, inner = config.hidden_size, config.intermediate_size
    block = 4 * (width**2 + width) + 2 * width * inner + inner + width + 4 * width
    return (config.patch_dim + 1) * width + config.num_hidden_layers * block


def _total_steps(folder: Path, recipe: Recipe) -> int | None:
    """Of the whole training, from the last line of its log that knows its epoch; a broken line is warned of."""
    file, total = folder / "metrics.jsonl", None
    for number, text in enumerate(file.read_bytes().splitlines() if file.exists() else (), start=1):
        try:
            report = json.loads(text or b"{}")
        except (ValueError, RecursionError):  # also of bytes that are no text, and of brackets without end
            warnings.warn(f"{file}: line {number} is no JSON and is left out.", stacklevel=2)
            continue
        with suppress(ValueError, LookupError, TypeError, ArithmeticError):  # it may be of an evaluation
            total = round(report["step"] / report["epoch"] * recipe.train["epochs"])
    return total


def public_json(file: Path):
    """The content of a JSON file, [`without_paths`].

    Raises:
        ValueError: it is none; the message names the file, and the line where there is one to blame.
    """
    content = file.read_bytes()
    try:
        return without_paths(json.loads(content.decode()))
    except json.JSONDecodeError as error:
        line, reason = error.lineno, error.msg
    except UnicodeDecodeError as error:
        line, reason = content[: error.start].count(b"\n") + 1, "these bytes are no UTF-8"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        line, reason = None, error
    raise ValueError(f"{file}{f', line {line},' if line else ''} cannot be read as JSON: {reason}.")


def _json(file: Path, default):
    """What `public_json` finds, `default` if there is no file. Raises ValueError if it is of another type."""
    content = public_json(file) if file.exists() else default
    if not isinstance(content, type(default)):
        raise ValueError(f"{file} should hold a JSON {type(default).__name__}, not a {type(content).__name__}.")
    return content
