"""What a resolved recipe is."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .files import RecipeError, nearest


@dataclass(frozen=True)
class Recipe:
    """One resolved recipe: where it comes from, and every value of its five sections.

    `steps` are the recipes from the root to this one, `tier` is the overlay or None, `overrides` the `key=value` texts
    in their order; `origins` says of each dotted key that does not have the root's value who set it last: a step,
    `tier NAME` or `override`. `paper` holds the paper's numbers for `name`: they belong to no tier and no override.
    """

    name: str
    parent: str | None
    why: str
    paper: dict
    steps: list[str]
    tier: str | None
    overrides: list[str]
    origins: dict[str, str]
    model: dict
    tokenizer: dict
    data: dict
    train: dict
    eval: dict

    @property
    def title(self) -> str:
        """The recipe's name with its tier and overrides, for tables and logs."""
        return " ".join([self.name, *([f"(tier {self.tier})"] if self.tier else []), *self.overrides])

    @property
    def is_masked(self) -> bool:
        """Whether it is a masked autoencoder, the baseline, and no l-DAE."""
        return self.model.get("mask_ratio") is not None  # older recipes do not have the key

    def model_config(self):
        """The `LDAEConfig` of the model section, with the widths and depths of its size.

        Raises:
            RecipeError: an unknown size, values that LDAEConfig refuses, a tokenizer section that is for another
                tokenizer than the model's, or a masked autoencoder, which has no such configuration.
        """
        from huggingface_hub.errors import StrictDataclassError

        from ldae_hf.configuration_ldae import SIZES, LDAEConfig

        if self.is_masked:
            raise RecipeError(
                f"{self.title} is a masked autoencoder (model.mask_ratio), no l-DAE; `ldae pretrain` trains it, "
                "and the commands that evaluate take its encoder/ folder."
            )
        keys = {key: value for key, value in self.model.items() if key != "mask_ratio"}
        size = keys.pop("size")
        if size not in SIZES:
            raise RecipeError(f"{self.title}: model.size {size!r} is unknown{nearest(size, SIZES)}")
        try:
            config = LDAEConfig(**SIZES[size], **keys)
        except (ValueError, StrictDataclassError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise RecipeError(f"{self.title}: the model section is not a model: {reason}") from error
        self._check_tokenizer(config)
        return config

    def _check_tokenizer(self, config) -> None:
        """Raises RecipeError unless the tokenizer section is one for the model's tokenizer."""
        from ldae_hf.configuration_ldae import CONVOLUTIONAL_TOKENIZERS

        # A recipe that was saved before there were learned tokenizers has none of these keys.
        unused = {"pretrained": None, "perceptual_loss": None, "adversarial_weight": 0.0}
        used = [f"tokenizer.{key}" for key, value in unused.items() if self.tokenizer.get(key, value) != value]
        name = config.tokenizer
        if name == "vqgan" and not used:
            raise RecipeError(
                f"{self.title}: model.tokenizer 'vqgan' without pretrained weights, perceptual and adversarial loss is "
                "'conv_vae'; call it that, or set one of them in the tokenizer section."
            )
        if name != "vqgan" and used:
            raise RecipeError(
                f"{self.title}: model.tokenizer {name!r} has no use for {', '.join(used)}, only 'vqgan' has; set null "
                "there, 0.0 for the weight."
            )
        if name in CONVOLUTIONAL_TOKENIZERS:
            stride = self.tokenizer["stride"]
            if config.patch_size % stride:
                raise RecipeError(
                    f"{self.title}: model.patch_size {config.patch_size} is not a multiple of tokenizer.stride "
                    f"{stride}, the side of a latent's square of pixels."
                )
            if config.latent_dim % (places := (config.patch_size // stride) ** 2):
                raise RecipeError(
                    f"{self.title}: model.latent_dim {config.latent_dim} is not a multiple of the {places} latent "
                    f"places of a patch, (model.patch_size {config.patch_size} / tokenizer.stride {stride})²."
                )

    def to_dict(self) -> dict:
        """The fields as plain values, a copy."""
        return asdict(self)

    def to_json(self) -> str:
        """The fields as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, folder) -> Path:
        """Writes `recipe.json` into an existing folder, so that the recipe travels with the weights."""
        file = Path(folder) / "recipe.json"
        file.write_text(self.to_json(), encoding="utf-8")
        return file

    @classmethod
    def load(cls, folder) -> "Recipe":
        """Reads the `recipe.json` that `save` wrote.

        Raises:
            RecipeError: no such file, or not the fields of a recipe.
        """
        file = Path(folder) / "recipe.json"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(f"{file} cannot be read as a saved recipe: {error}") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            wrong = names.symmetric_difference(values if isinstance(values, dict) else ())
            raise RecipeError(f"{file} is not a recipe as this version saves it: see {', '.join(sorted(wrong))}.")
        return cls(**values)
