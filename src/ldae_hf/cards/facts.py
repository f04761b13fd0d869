"""What the folder of a model tells its card."""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..configuration_ldae import CONVOLUTIONAL_TOKENIZERS, LDAEConfig
from ..modeling_ldae import LDAEModel
from ..recipes import Recipe, load_recipe
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
        """Those of this encoder; a classifier's weights are others, and no row is of them."""
        if self.recipe is None or self.labels:
            return []
        return results_of_model(rows, self.recipe, self.config, self.training)


def read_facts(folder: str | Path) -> CardFacts:
    """Reads a model repository's folder.

    Raises:
        OSError, ValueError: there is no such folder, no configuration of ours in it, or a broken JSON file.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model (config.json), and is none of the planned {', '.join(PLANNED)}.")
    content, config = _json(folder / "config.json", {}), LDAEConfig.from_pretrained(folder)
    recipe = Recipe.load(folder) if (folder / "recipe.json").exists() else None
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
    """Of the plain ViT that the encoder folds into; None where it cannot, since its tokenizer is a network."""
    if config.tokenizer in CONVOLUTIONAL_TOKENIZERS:
        return None
    width, inner = config.hidden_size, config.intermediate_size
    block = 4 * (width**2 + width) + 2 * width * inner + inner + width + 4 * width
    return (config.patch_dim + 1) * width + config.num_hidden_layers * block


def _total_steps(folder: Path, recipe: Recipe) -> int | None:
    """Of the whole training, from the last line of its log that knows its epoch."""
    total = None
    for text in (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else ():
        with suppress(ValueError, LookupError, TypeError, ZeroDivisionError):  # a line may be torn, or of an evaluation
            report = json.loads(text)
            total = round(report["step"] / report["epoch"] * recipe.train["epochs"])
    return total


def _json(file: Path, default):
    """The content of a JSON file, `default` if there is none. Raises ValueError if it is of another type."""
    content = json.loads(file.read_bytes()) if file.exists() else default
    if not isinstance(content, type(default)):
        raise ValueError(f"{file} should hold a JSON {type(default).__name__}, not a {type(content).__name__}.")
    return content
