"""The configuration of l-DAE (arXiv 2401.14404): the sizes, the four keys of the path, and what goes together."""

import math
from dataclasses import fields
from difflib import get_close_matches

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.utils.quantization_config import QuantizationConfigMixin


# Width, blocks of encoder and decoder, heads. The decoder has the encoder's size. "half_l" is the paper's ViT-1/2L: the
# first 12 of DiT-L's 24 blocks are its encoder (section 4). The others are for desks, not in the paper.
SIZES = {
    name: dict(hidden_size=width, num_hidden_layers=blocks, decoder_num_hidden_layers=blocks, num_attention_heads=heads)
    for name, width, blocks, heads in (
        ("l", 1024, 24, 16),
        ("half_l", 1024, 12, 16),
        ("b", 768, 12, 12),
        ("s", 384, 12, 6),
        ("desk_l", 256, 12, 4),
        ("desk_half_l", 256, 6, 4),
        ("desk_b", 192, 6, 3),
        ("cpu_l", 128, 6, 4),
        ("cpu_half_l", 128, 3, 4),
        ("cpu_b", 96, 3, 3),
        ("cifar10", 192, 3, 3),
        ("quickstart", 128, 2, 4),
    )
}
# A variant that the paper lacks: a decoder of half the width and four times the blocks, as many FLOPs in its layers.
SIZES |= {
    f"{name}_deep_narrow": size
    | dict(decoder_hidden_size=size["hidden_size"] // 2, decoder_num_hidden_layers=4 * size["num_hidden_layers"])
    for name, size in SIZES.items()
    if name.endswith("half_l")
}

# The four keys of the path, each with its values in the order in which the paper takes them. `random_projection` and
# `snr_matched_sigma` are controls that the paper does not have, `interpolative` is a variant of later work.
CONVOLUTIONAL_TOKENIZERS = ("vqgan", "conv_vae")
LEARNED_PATCH_TOKENIZERS = ("patch_vae", "patch_ae")
ORTHONORMAL_TOKENIZERS = ("patch_pca", "pixels", "random_projection")
LEARNED_TOKENIZERS = CONVOLUTIONAL_TOKENIZERS + LEARNED_PATCH_TOKENIZERS
TOKENIZERS = LEARNED_TOKENIZERS + ORTHONORMAL_TOKENIZERS
NOISE_SCHEDULES = ("ddpm_linear", "linear_gamma_squared", "linear_sigma", "single_level", "snr_matched_sigma")
NOISE_SCHEDULES += ("interpolative",)
STARTING_WITHOUT_NOISE = ("linear_sigma", "interpolative")  # sigma is 0 at t = 0
INPUT_SPACES = ("latent", "pixel")
PREDICTION_TARGETS = ("noise", "latent", "reconstruction", "image")
LATENT_SCALINGS = ("global", "whiten", "none")
LOSS_WEIGHTINGS = ("signal_share", "snr")
SIGMA_MAX = 2**0.5  # of `linear_sigma` in the paper
# What has a timestep of its own: how many patches of it lie side by side, None for all of the image.
TIMESTEP_SCOPES = {"image": None, "block": 2, "token": 1}

# (input_space, prediction_target) -> the tokenizers for which the pair is defined. Every noise schedule goes with
# every row. A network that sees latents answers in latents; the image input and image targets need orthonormal
# directions, so that what a patch has inside and outside of them adds up.
LEGAL_COMBINATIONS = {
    ("latent", "noise"): TOKENIZERS,
    ("latent", "latent"): TOKENIZERS,
    ("pixel", "noise"): ORTHONORMAL_TOKENIZERS,
    ("pixel", "latent"): ORTHONORMAL_TOKENIZERS,
    ("pixel", "reconstruction"): ORTHONORMAL_TOKENIZERS,
    ("pixel", "image"): ORTHONORMAL_TOKENIZERS,
}

# The largest that are taken, far beyond any model that was ever trained: what is built from a configuration is sized by
# it, and a config.json can come from anywhere.
LARGEST = {
    "hidden_size": 2**16,
    "num_hidden_layers": 2**8,
    "decoder_num_hidden_layers": 2**10,
    "decoder_hidden_size": 2**16,
    "num_channels": 2**10,
    "num_global_tokens": 2**10,
    "mlp_ratio": 2**10,
    "conditioning_hidden_size": 2**20,
    "num_train_timesteps": 2**20,
    "num_classes": 2**20,
    "num_labels": 2**17,
}
LARGEST_PATCH_DIM = 2**12  # its basis has the square of this
LARGEST_POSITION_TABLE = 2**26  # num_patches · hidden_size
DTYPES = ("float64", "float32", "bfloat16", "float16")

# What transformers itself writes into a config.json, or passes to a configuration, beside the declared fields.
_TRANSFORMERS_KEYS = frozenset(
    "_attn_implementation _commit_hash _name_or_path attn_implementation auto_map custom_pipelines "
    "experts_implementation model_type name_or_path num_labels out_features out_indices output_attentions "
    "quantization_config tie_last_hidden_states torch_dtype use_cache".split()
)


@strict
class LDAEConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""Configuration of [`LDAEModel`] and its heads. The defaults are the paper's final method (ViT-1/2L, K = 32).

    Args:
        image_size (`int`): side of the training images in pixels, a multiple of `patch_size`.
        patch_size (`int`): side of a patch in pixels.
        num_channels (`int`): colour channels.
        hidden_size (`int`): width D of the transformer, a multiple of 4 and of `num_attention_heads`.
        num_hidden_layers (`int`): blocks of the encoder.
        decoder_num_hidden_layers (`int`): blocks of the decoder (the paper: as many as the encoder).
        decoder_hidden_size (`int` or `None`): width of the decoder, a multiple of the width of a head; `None` (the
            paper) is the encoder's.
        num_attention_heads (`int`): attention heads.
        num_global_tokens (`int`): learned tokens beside those of the patches, which no feature is taken from; none in
            the paper.
        mlp_ratio (`float`): width of a block's MLP over `hidden_size`.
        hidden_act (`str`): activation of the MLPs, one of transformers' names.
        layer_norm_eps (`float`): epsilon of every layer normalisation.
        conditioning_hidden_size (`int`, `None` or `"quarter"`): hidden width of each block's MLP on the timestep;
            `"quarter"` (Appendix A) becomes `hidden_size // 4`, `None` is DiT's single linear layer.
        timestep_freq_shift (`float`): added to the half-width in the exponent of the timestep's sinusoids; 0 is
            DiT's, 1 diffusers'.
        num_classes (`int` or `None`): classes that the denoiser is conditioned on (the DiT baseline); `None` for none.
        class_dropout_prob (`float`): share of the labels that training replaces by "no class".
        tokenizer (`str`): image to tokens and back, one of `TOKENIZERS`.
        noise_schedule (`str`): the (gamma_t, sigma_t) table, one of `NOISE_SCHEDULES` (Eq. 1).
        sigma_max (`float`): the largest sigma of `linear_sigma`; the others have none to choose.
        timestep_scope (`str`): what training draws a timestep for: each `"image"` (the paper), each `"block"` of 2x2
            patches, or each `"token"`.
        input_space (`str`): `"latent"` (noisy latents) or `"pixel"` (the image they decode to).
        prediction_target (`str`): `"noise"`, `"latent"`, `"reconstruction"` or `"image"` (Eq. 4).
        latent_dim (`int`): K, latent values per token, in 1 ... patch_size² · num_channels.
        latent_scaling (`str`): `"global"` (mean latent variance 1), `"whiten"` (each 1) or `"none"`.
        residual_weight (`float`): weight of the loss outside the K latent directions (Eq. 4: 0.1).
        loss_weighting (`str`): lambda_t of clean targets, `"signal_share"`, gamma² / (gamma² + sigma²), or `"snr"`,
            gamma² / sigma² (tried in the paper, and worse). Predicting noise has lambda = 1.
        num_train_timesteps (`int`): noise levels T; `single_level` has one, whatever this says.
        feature_timestep (`int`): timestep at which features are taken; default 10, or the last if there are fewer.
        processor_fingerprint (`str`): sha256 of the PCA basis in the weights; set by `model.set_processor`.
        tokenizer_fingerprint (`str`): sha256 of a learned tokenizer; set by `model.set_tokenizer`.
        out_features (`list[str]`), out_indices (`list[int]`): the stages that [`LDAEBackbone`] gives, among `stem`,
            `stage1`, `stage2`, …, in this order; by default the last.

    Raises:
        ValueError: an unknown key, a value out of range, or keys that contradict each other.
        StrictDataclassFieldValidationError: a value of the wrong type (from huggingface_hub).
    """

    model_type = "ldae"

    image_size: int = 256
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 1024
    num_hidden_layers: int = 12
    decoder_num_hidden_layers: int = 12
    decoder_hidden_size: int | None = None
    num_attention_heads: int = 16
    num_global_tokens: int = 0
    mlp_ratio: float | int = 4
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float | int = 1e-6
    conditioning_hidden_size: int | str | None = "quarter"
    timestep_freq_shift: float | int = 0
    num_classes: int | None = None
    class_dropout_prob: float | int = 0.1
    tokenizer: str = "patch_pca"
    noise_schedule: str = "linear_sigma"
    sigma_max: float | int = SIGMA_MAX
    timestep_scope: str = "image"
    input_space: str = "pixel"
    prediction_target: str = "image"
    latent_dim: int = 32
    latent_scaling: str = "global"
    residual_weight: float | int = 0.1
    loss_weighting: str = "signal_share"
    num_train_timesteps: int = 1000
    feature_timestep: int | None = None
    processor_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None

    def __post_init__(self, **kwargs):
        names = [field.name for field in fields(self)]  # in `__dataclass_fields__` are the class's variables too
        for key in kwargs:
            if key not in {*names, *_TRANSFORMERS_KEYS}:
                near = get_close_matches(key, names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise ValueError(f"LDAEConfig has no key {key!r}{hint}")
        if self.conditioning_hidden_size == "quarter":
            self.conditioning_hidden_size = max(1, self.hidden_size // 4)
        if self.feature_timestep is None:
            self.feature_timestep = min(10, self.num_noise_levels - 1)
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        if self.dtype is None:  # said always: transformers would open the weights to find out, whatever file they are
            self.dtype = kwargs.pop("torch_dtype", None) or "float32"
        self._check_transformers_keys(**kwargs)
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        super().__post_init__(**kwargs)
        # @strict would run these too, but in alphabetical order, and wrap the sentence in one of its own.
        self.validate_values()
        self.validate_pairs()
        self._out_features = self._out_indices = None
        if out_features is not None or out_indices is not None:
            stages = range(-len(self.stage_names), len(self.stage_names))
            indices = out_indices if isinstance(out_indices, list | tuple) else ()
            if not all(isinstance(index, int) and index in stages for index in indices):
                raise ValueError(f"out_indices={out_indices!r} must be numbers of the stages {self.stage_names}.")
            self.set_output_features_output_indices(out_features, out_indices)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As transformers', but keys given beside the saved ones are checked with them, not written over them later.

        An installed class forgets the `auto_map` of a repository's own code, since what it saves has no code beside
        it. How attention is computed is the caller's choice: a file could name somebody's kernels on the Hub.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This configuration is of a {model_type!r} model, not of {cls.model_type!r}; load it with AutoConfig."
            )
        overrides = {key: kwargs.pop(key) for key in cls.__annotations__ if key in kwargs}
        forgotten = {"attn_implementation", "_attn_implementation"} | (
            {"auto_map"} if cls._auto_class is None else set()
        )
        saved = {key: value for key, value in config_dict.items() if key not in forgotten}
        return super().from_dict({**saved, **overrides}, **kwargs)

    def to_dict(self) -> dict:
        """As transformers', without the stages where none were chosen."""
        stages = {"out_features", "out_indices"}
        return {key: value for key, value in super().to_dict().items() if key not in stages or value is not None}

    @property
    def stage_names(self) -> list[str]:
        """What [`LDAEBackbone`] can give: the input of the first block, and the output of each."""
        return ["stem", *(f"stage{number}" for number in range(1, self.num_hidden_layers + 1))]

    @property
    def patch_dim(self) -> int:
        """P, the values of one patch."""
        return self.patch_size**2 * self.num_channels

    @property
    def num_patches(self) -> int:
        """N, the tokens of a training image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def is_plain_vit(self) -> bool:
        """Whether at a fixed timestep the encoder is a plain Vision Transformer, patches in and tokens out."""
        return self.tokenizer not in CONVOLUTIONAL_TOKENIZERS and not self.num_global_tokens

    @property
    def intermediate_size(self) -> int:
        """Width of a block's MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def decoder_width(self) -> int:
        """Width of the decoder's blocks."""
        return self.decoder_hidden_size or self.hidden_size

    @property
    def num_noise_levels(self) -> int:
        """Length of the noise schedule's table: timesteps run from 0 to this minus 1."""
        return 1 if self.noise_schedule == "single_level" else self.num_train_timesteps

    @property
    def timestep_block(self) -> int | None:
        """Side, in patches, of the squares that training draws a timestep for; None for the whole image."""
        return TIMESTEP_SCOPES[self.timestep_scope]

    @property
    def timesteps_shape(self) -> tuple[int, ...]:
        """Of an image's timesteps in training: () for one, (N,) for one a token, whichever tokens share theirs."""
        return () if self.timestep_block is None else (self.num_patches,)

    def _check_transformers_keys(self, num_labels=None, quantization_config=None, **others):
        """What transformers uses before, or without, looking at it."""
        if str(self.dtype).removeprefix("torch.") not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}.")
        largest = LARGEST["num_labels"]
        if num_labels is not None and not (isinstance(num_labels, int) and 0 < num_labels <= largest):
            raise ValueError(f"num_labels={num_labels!r} must be an integer in 1 ... {largest}.")
        labels = self.id2label
        if labels is not None and (
            not isinstance(labels, dict) or not labels or set(map(str, labels)) != set(map(str, range(len(labels))))
        ):
            raise ValueError("id2label must name every class by its number, from 0 on, without a gap.")
        if not (quantization_config is None or isinstance(quantization_config, dict | QuantizationConfigMixin)):
            raise ValueError(f"quantization_config={quantization_config!r} is no dictionary.")

    def validate_values(self):
        """Each value by itself: one of its names, or in its range."""
        for key, values in (
            ("tokenizer", TOKENIZERS),
            ("noise_schedule", NOISE_SCHEDULES),
            ("timestep_scope", tuple(TIMESTEP_SCOPES)),
            ("input_space", INPUT_SPACES),
            ("prediction_target", PREDICTION_TARGETS),
            ("latent_scaling", LATENT_SCALINGS),
            ("loss_weighting", LOSS_WEIGHTINGS),
            ("hidden_act", tuple(ACT2FN)),
        ):
            if getattr(self, key) not in values:
                raise ValueError(f"{key}={getattr(self, key)!r} is not one of {', '.join(values)}.")
        for key in (
            "image_size",
            "patch_size",
            "num_channels",
            "hidden_size",
            "num_hidden_layers",
            "decoder_num_hidden_layers",
            "num_attention_heads",
            "mlp_ratio",
            "layer_norm_eps",
            "latent_dim",
            "num_train_timesteps",
            "sigma_max",
        ):
            if not 0 < getattr(self, key) < math.inf:  # NaN fails too
                raise ValueError(f"{key}={getattr(self, key)} must be positive and finite.")
        for key, largest in LARGEST.items():
            value = getattr(self, key)
            if not isinstance(value, str | None) and value > largest:
                raise ValueError(f"{key}={value} is more than {largest}, the largest that is taken.")
        for key in ("residual_weight", "class_dropout_prob", "timestep_freq_shift"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}={getattr(self, key)} must lie in 0 ... 1.")
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes} must be positive, or None for no class labels.")
        if self.num_global_tokens < 0:
            raise ValueError(f"num_global_tokens={self.num_global_tokens} must be 0 or more.")
        if self.decoder_hidden_size is not None and self.decoder_hidden_size < 1:
            raise ValueError(f"decoder_hidden_size={self.decoder_hidden_size} must be positive, or None.")
        hidden = self.conditioning_hidden_size
        if isinstance(hidden, str) or (hidden is not None and hidden <= 0):
            raise ValueError(f"conditioning_hidden_size={hidden!r} must be a positive integer, None or 'quarter'.")

    def validate_pairs(self):
        """The values together: nothing contradicts."""
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}.")
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of 4 (2-D positions) and of "
                f"num_attention_heads={self.num_attention_heads}."
            )
        head = self.hidden_size // self.num_attention_heads
        if self.decoder_width % head:
            raise ValueError(f"decoder_hidden_size={self.decoder_hidden_size} must be a multiple of a head's {head}.")
        for key, width in (("hidden_size", self.hidden_size), ("decoder_hidden_size", self.decoder_width)):
            if int(width * self.mlp_ratio) < 1:
                raise ValueError(f"mlp_ratio={self.mlp_ratio} leaves no MLP at {key}={width}.")
        if self.patch_dim > LARGEST_PATCH_DIM:
            raise ValueError(
                f"patch_size={self.patch_size} with num_channels={self.num_channels} makes patches of "
                f"{self.patch_dim} values, more than {LARGEST_PATCH_DIM}, the most that are taken."
            )
        if self.num_patches * self.hidden_size > LARGEST_POSITION_TABLE:
            raise ValueError(
                f"image_size={self.image_size} makes {self.num_patches} patches, too many for "
                f"hidden_size={self.hidden_size}: the table of positions may hold {LARGEST_POSITION_TABLE} values."
            )
        if self.latent_dim > self.patch_dim:
            raise ValueError(
                f"latent_dim={self.latent_dim} exceeds the {self.patch_dim} values of a "
                f"{self.patch_size}x{self.patch_size}x{self.num_channels} patch."
            )
        pair = (self.input_space, self.prediction_target)
        if self.tokenizer not in LEGAL_COMBINATIONS.get(pair, ()):
            legal = ", ".join(
                f"{space}+{target}" for (space, target), names in LEGAL_COMBINATIONS.items() if self.tokenizer in names
            )
            raise ValueError(
                f"input_space={pair[0]!r} with prediction_target={pair[1]!r} is not defined for "
                f"tokenizer={self.tokenizer!r}; choose one of {legal}."
            )
        if self.tokenizer == "pixels" and self.latent_dim != self.patch_dim:
            raise ValueError(
                f"tokenizer='pixels' keeps all {self.patch_dim} values of a patch: latent_dim={self.latent_dim} must "
                f"be {self.patch_dim}."
            )
        if self.sigma_max != SIGMA_MAX and self.noise_schedule != "linear_sigma":
            raise ValueError(
                f"sigma_max={self.sigma_max} is for noise_schedule='linear_sigma' only; "
                f"{self.noise_schedule!r} has its own largest sigma."
            )
        if self.timestep_scope != "image" and self.noise_schedule == "single_level":
            raise ValueError(
                f"timestep_scope={self.timestep_scope!r} draws a noise level for each {self.timestep_scope}, but "
                "noise_schedule='single_level' has one for all; leave timestep_scope='image'."
            )
        if self.timestep_scope != "image" and self.num_global_tokens:
            raise ValueError(
                f"num_global_tokens={self.num_global_tokens} with timestep_scope={self.timestep_scope!r} is not "
                "defined: a global token has no noise, and no noise level of its own."
            )
        if self.image_size // self.patch_size % (self.timestep_block or 1):
            raise ValueError(
                f"timestep_scope={self.timestep_scope!r} needs a multiple of {self.timestep_block} patches a side, but "
                f"image_size={self.image_size} and patch_size={self.patch_size} make "
                f"{self.image_size // self.patch_size}."
            )
        if self.loss_weighting == "snr" and (
            self.prediction_target == "noise" or self.noise_schedule in STARTING_WITHOUT_NOISE
        ):
            raise ValueError(
                "loss_weighting='snr' weights clean targets by gamma² / sigma²: it goes neither with "
                f"prediction_target='noise' nor with {' or '.join(STARTING_WITHOUT_NOISE)}, whose first sigma is 0."
            )
        if not 0 <= self.feature_timestep < self.num_noise_levels:
            raise ValueError(
                f"feature_timestep={self.feature_timestep} must lie in 0 ... {self.num_noise_levels - 1} "
                f"for noise_schedule={self.noise_schedule!r}."
            )


__all__ = ["LDAEConfig", "SIZES"]
