"""The checks of `ldae verify` on a folder with a model: weights, buffers, features, recipe."""

import copy
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import IJepaConfig, IJepaForImageClassification, IJepaModel

from .configuration_ldae import CONVOLUTIONAL_TOKENIZERS, LDAEConfig
from .golden import GOLDEN_FEATURES, golden_difference
from .image_processing_ldae import LDAEImageProcessor
from .modeling_ldae import LDAEForImageClassification, LDAEForPreTraining, LDAEModel, LDAEPreTrainedModel
from .progress import quietly
from .recipes import Recipe


WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
MODELS = {model.__name__: model for model in (LDAEModel, LDAEForPreTraining, LDAEForImageClassification)}
SHAPE = "image_size patch_size num_channels hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
FINGERPRINTS = {"processor_fingerprint", "tokenizer_fingerprint"}  # of the training, which no recipe knows
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}  # of golden features, relative to the largest of them
ROUNDING = 1e-5  # more than the sines and products of another machine differ by
SMALL = 2**24  # values that a model may have in a table, however small its file


class NotChecked(Exception):
    """There is nothing to check; the message says why."""


class Failed(ValueError):
    """A check has failed; the message says what is wrong."""


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
        with quietly():
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

    @torch.no_grad()
    def stock_features(self, stock: Path) -> str:
        """What the folded encoder in transformers' own class makes of the fixed images."""
        stated = json.loads((stock / CONFIG).read_text())
        architectures = stated.get("architectures")
        known = {stock_class.__name__: stock_class for stock_class in (IJepaModel, IJepaForImageClassification)}
        if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in known:
            raise Failed(f"{CONFIG} names the architectures {architectures!r}, not one of {', '.join(known)}")
        shape, ours = IJepaConfig.from_dict(stated), self.config
        if other := [name for name in SHAPE if getattr(shape, name) != getattr(ours, name)]:  # or it could be any size
            raise Failed(f"{CONFIG} is not of the encoder's shape: see {some(other)}")
        golden = load_file(self.folder / GOLDEN_FEATURES)
        settings = dict(dtype=getattr(torch, self.dtype), local_files_only=True, use_safetensors=True)
        with quietly():
            vit = known[architectures[0]].from_pretrained(stock, **settings).base_model
        found = vit((golden["pixels"] / 127.5 - 1).to(vit.dtype)).last_hidden_state.float()
        expected, allowed = golden["last_hidden_state"], TOLERANCES[self.dtype]
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        sentence = f"those of transformers' own class differ by {difference:.1e} in {self.dtype}"
        if not difference <= allowed:
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
        return f"{recipe.name}{f' (tier {recipe.tier})' if recipe.tier else ''} describes the model"

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


def some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
