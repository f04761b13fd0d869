"""LDAEConfig: strict, one clear sentence for whatever is wrong, the same after JSON, the paper's sizes."""

import json
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from ldae_hf import SIZES, LDAEConfig, LDAEForPreTraining, LDAEModel
from ldae_hf.configuration_ldae import (
    INPUT_SPACES,
    LATENT_SCALINGS,
    LEARNED_TOKENIZERS,
    LEGAL_COMBINATIONS,
    LOSS_WEIGHTINGS,
    NOISE_SCHEDULES,
    ORTHONORMAL_TOKENIZERS,
    PREDICTION_TARGETS,
    SIGMA_MAX,
    TOKENIZERS,
)
from ldae_hf.noise_schedules import LOSS_WEIGHTS, SCHEDULES
from ldae_hf.patch_tokenizers import TOKENIZERS as TOKENIZER_MODULES
from ldae_hf.prediction_targets import NETWORK_INPUTS, PREDICTIONS


def test_the_defaults_are_the_papers_final_method():
    config = LDAEConfig()
    path = (config.tokenizer, config.noise_schedule, config.input_space, config.prediction_target)
    assert path == ("patch_pca", "linear_sigma", "pixel", "image")
    assert {key: getattr(config, key) for key in SIZES["half_l"]} == SIZES["half_l"]
    assert (config.latent_dim, config.latent_scaling, config.residual_weight) == (32, "global", 0.1)
    assert (config.patch_dim, config.num_patches, config.num_train_timesteps) == (768, 256, 1000)
    assert (config.conditioning_hidden_size, config.feature_timestep) == (256, 10)
    assert (config.sigma_max, config.loss_weighting) == (SIGMA_MAX, "signal_share") == (2**0.5, "signal_share")
    assert (config.num_classes, config.timestep_freq_shift) == (None, 0)
    assert config.processor_fingerprint is None and config.tokenizer_fingerprint is None


# -- derived values -----------------------------------------------------------------------------------------------


def test_features_are_taken_at_timestep_10_and_at_0_where_there_is_one_level():
    assert LDAEConfig().feature_timestep == 10
    assert LDAEConfig(noise_schedule="single_level").feature_timestep == 0
    assert LDAEConfig(noise_schedule="single_level").num_noise_levels == 1
    assert LDAEConfig(feature_timestep=40).feature_timestep == 40


def test_the_conditioning_width_is_a_quarter_a_number_or_the_form_of_dit():
    assert LDAEConfig(hidden_size=768, num_attention_heads=12).conditioning_hidden_size == 192
    assert LDAEConfig(conditioning_hidden_size=48).conditioning_hidden_size == 48
    assert LDAEConfig(conditioning_hidden_size=None).conditioning_hidden_size is None


# -- JSON ---------------------------------------------------------------------------------------------------------

VARIANTS = [
    {},
    # 256 is the default at the default width only: dropped from the file, it would come back as 128.
    {"hidden_size": 512, "num_attention_heads": 8, "conditioning_hidden_size": 256},
    {"conditioning_hidden_size": None, "mlp_ratio": 2.5, "hidden_act": "gelu", "layer_norm_eps": 1e-5},
    {"noise_schedule": "single_level", "latent_scaling": "whiten", "residual_weight": 0},
    {"input_space": "latent", "prediction_target": "noise", "image_size": 32, "patch_size": 4, "latent_dim": 48},
    {"num_labels": 7, "processor_fingerprint": "ab" * 32, "feature_timestep": 0, "num_train_timesteps": 20},
    {"tokenizer": "pixels", "latent_dim": 768, "sigma_max": 6.5},
    {"timestep_scope": "token", "image_size": 32},
    {"timestep_scope": "block", "decoder_hidden_size": 512, "decoder_num_hidden_layers": 48},
    {"num_global_tokens": 4},
    {"tokenizer": "random_projection", "noise_schedule": "linear_gamma_squared", "loss_weighting": "snr"},
    {
        "tokenizer": "vqgan",
        "input_space": "latent",
        "prediction_target": "noise",
        "num_classes": 1000,
        "class_dropout_prob": 0,
        "timestep_freq_shift": 1,
        "tokenizer_fingerprint": "cd" * 32,
    },
    {"id2label": {0: "cat", 1: "dog", 2: "eel"}, "label2id": {"cat": 0, "dog": 1, "eel": 2}, "dtype": "bfloat16"},
]


@pytest.mark.parametrize("keys", VARIANTS)
def test_a_configuration_comes_back_from_json_unchanged(keys, tmp_path):
    config = LDAEConfig(**keys)
    config.save_pretrained(tmp_path)
    for loaded in (LDAEConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is LDAEConfig
        loaded.name_or_path = config.name_or_path  # where it came from
        assert loaded.to_dict() == config.to_dict()
    assert LDAEConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()


def test_a_saved_configuration_says_every_key_of_the_model(tmp_path):
    LDAEConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert set(LDAEConfig.__annotations__) <= set(saved)


# -- what is refused ----------------------------------------------------------------------------------------------


def message_of(error: pytest.ExceptionInfo) -> str:
    """The message, after checking that it is one sentence."""
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 300
    assert message.endswith((".", "?"))
    return message


WRONG_TYPES = [
    ("hidden_size", "1024"),
    ("hidden_size", 1024.0),
    ("num_hidden_layers", True),
    ("mlp_ratio", "4"),
    ("residual_weight", None),
    ("tokenizer", 1),
    ("latent_dim", [32]),
    ("feature_timestep", 10.5),
    ("processor_fingerprint", 12),
    ("conditioning_hidden_size", 0.25),
    ("num_classes", 10.0),
    ("num_classes", "10"),
    ("sigma_max", "1.4"),
    ("tokenizer_fingerprint", 12),
]


@pytest.mark.parametrize(("key", "value"), WRONG_TYPES)
def test_a_value_of_the_wrong_type_is_refused_with_its_key(key, value):
    with pytest.raises(StrictDataclassError, match=f"Field '{key}'.*{type(value).__name__}"):
        LDAEConfig(**{key: value})


def test_a_wrong_type_is_refused_on_assignment_too():
    config = LDAEConfig()
    with pytest.raises(StrictDataclassError, match="Field 'latent_dim' expected int, got str"):
        config.latent_dim = "32"


WRONG_VALUES = [
    ("tokenizer", "pca", "tokenizer='pca' is not one of vqgan, conv_vae, patch_vae, patch_ae, patch_pca, pixels"),
    ("noise_schedule", "cosine", "noise_schedule='cosine' is not one of ddpm_linear, linear_gamma_squared"),
    ("input_space", "image", "input_space='image' is not one of latent, pixel"),
    ("prediction_target", "v", "prediction_target='v' is not one of noise, latent, reconstruction, image"),
    ("latent_scaling", "standard", "latent_scaling='standard' is not one of global, whiten, none"),
    ("loss_weighting", "min_snr", "loss_weighting='min_snr' is not one of signal_share, snr"),
    ("hidden_act", "gelu_tanh", "hidden_act='gelu_tanh' is not one of gelu"),
    ("image_size", 0, "image_size=0 must be positive"),
    ("patch_size", -16, "patch_size=-16 must be positive"),
    ("num_channels", 0, "num_channels=0 must be positive"),
    ("hidden_size", -4, "hidden_size=-4 must be positive"),
    ("num_hidden_layers", 0, "num_hidden_layers=0 must be positive"),
    ("decoder_num_hidden_layers", 0, "decoder_num_hidden_layers=0 must be positive"),
    ("num_attention_heads", 0, "num_attention_heads=0 must be positive"),
    ("mlp_ratio", math.nan, "mlp_ratio=nan must be positive and finite"),
    ("mlp_ratio", math.inf, "mlp_ratio=inf must be positive and finite"),
    ("layer_norm_eps", 0, "layer_norm_eps=0 must be positive"),
    ("latent_dim", 0, "latent_dim=0 must be positive"),
    ("num_train_timesteps", 0, "num_train_timesteps=0 must be positive"),
    ("residual_weight", 1.5, "residual_weight=1.5 must lie in 0 ... 1"),
    ("residual_weight", -0.1, "residual_weight=-0.1 must lie in 0 ... 1"),
    ("residual_weight", math.nan, "residual_weight=nan must lie in 0 ... 1"),
    ("conditioning_hidden_size", "half", "conditioning_hidden_size='half' must be a positive integer"),
    ("conditioning_hidden_size", 0, "conditioning_hidden_size=0 must be a positive integer"),
    ("feature_timestep", -1, "feature_timestep=-1 must lie in 0 ... 999"),
    ("sigma_max", 0, "sigma_max=0 must be positive and finite"),
    ("sigma_max", math.inf, "sigma_max=inf must be positive and finite"),
    ("num_classes", 0, "num_classes=0 must be positive, or None for no class labels"),
    ("class_dropout_prob", 1.1, "class_dropout_prob=1.1 must lie in 0 ... 1"),
    ("timestep_freq_shift", -1, "timestep_freq_shift=-1 must lie in 0 ... 1"),
]


@pytest.mark.parametrize(("key", "value", "sentence"), WRONG_VALUES)
def test_a_wrong_value_is_one_clear_sentence(key, value, sentence):
    with pytest.raises(ValueError) as error:
        LDAEConfig(**{key: value})
    assert message_of(error).startswith(sentence)


CONTRADICTIONS = [
    ({"image_size": 250}, "image_size=250 is not a multiple of patch_size=16."),
    ({"hidden_size": 1020}, "hidden_size=1020 must be a multiple of 4 (2-D positions) and of num_attention_heads=16."),
    ({"hidden_size": 18, "num_attention_heads": 2}, "hidden_size=18 must be a multiple of 4"),
    ({"mlp_ratio": 1e-4}, "mlp_ratio=0.0001 leaves no MLP at hidden_size=1024."),
    ({"mlp_ratio": 1e-2, "decoder_hidden_size": 64}, "mlp_ratio=0.01 leaves no MLP at decoder_hidden_size=64."),
    ({"latent_dim": 769}, "latent_dim=769 exceeds the 768 values of a 16x16x3 patch."),
    ({"patch_size": 2}, "latent_dim=32 exceeds the 12 values of a 2x2x3 patch."),
    ({"feature_timestep": 1000}, "feature_timestep=1000 must lie in 0 ... 999 for noise_schedule='linear_sigma'."),
    (
        {"num_train_timesteps": 10, "feature_timestep": 12},
        "feature_timestep=12 must lie in 0 ... 9 for noise_schedule='linear_sigma'.",
    ),
    (
        {"noise_schedule": "single_level", "feature_timestep": 10},
        "feature_timestep=10 must lie in 0 ... 0 for noise_schedule='single_level'.",
    ),
    (
        {"tokenizer": "pixels"},
        "tokenizer='pixels' keeps all 768 values of a patch: latent_dim=32 must be 768.",
    ),
    *(
        (
            {"noise_schedule": schedule, "sigma_max": 2},
            f"sigma_max=2 is for noise_schedule='linear_sigma' only; '{schedule}' has its own largest sigma.",
        )
        for schedule in NOISE_SCHEDULES
        if schedule != "linear_sigma"
    ),
    (
        {"noise_schedule": "single_level", "timestep_scope": "token"},
        "timestep_scope='token' draws a noise level for each token, but noise_schedule='single_level' has one",
    ),
    (
        {"timestep_scope": "block", "image_size": 240},
        "timestep_scope='block' needs a multiple of 2 patches a side, but image_size=240 and patch_size=16 make 15.",
    ),
    ({"num_global_tokens": -1}, "num_global_tokens=-1 must be 0 or more."),
    (
        {"num_global_tokens": 4, "timestep_scope": "token"},
        "num_global_tokens=4 with timestep_scope='token' is not defined: a global token has no noise",
    ),
    ({"decoder_hidden_size": 0}, "decoder_hidden_size=0 must be positive, or None."),
    ({"decoder_hidden_size": 96}, "decoder_hidden_size=96 must be a multiple of a head's 64."),
    ({"decoder_hidden_size": 2**17}, "decoder_hidden_size=131072 is more than 65536, the largest that is taken."),
    ({"loss_weighting": "snr"}, "loss_weighting='snr' weights clean targets by gamma² / sigma²: it goes neither with"),
    (
        {"loss_weighting": "snr", "noise_schedule": "interpolative"},
        "loss_weighting='snr' weights clean targets by gamma² / sigma²: it goes neither with",
    ),
    (
        {"loss_weighting": "snr", "noise_schedule": "ddpm_linear", "prediction_target": "noise"},
        "loss_weighting='snr' weights clean targets by gamma² / sigma²: it goes neither with",
    ),
]


@pytest.mark.parametrize(("keys", "sentence"), CONTRADICTIONS)
def test_keys_that_contradict_each_other_are_one_clear_sentence(keys, sentence):
    with pytest.raises(ValueError) as error:
        LDAEConfig(**keys)
    assert message_of(error).startswith(sentence)


@pytest.mark.parametrize("space", INPUT_SPACES)
@pytest.mark.parametrize("target", PREDICTION_TARGETS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_what_the_table_of_combinations_lists_can_be_built_and_nothing_else(tokenizer, space, target):
    keys = {"tokenizer": tokenizer, "input_space": space, "prediction_target": target}
    keys |= {"latent_dim": 768} if tokenizer == "pixels" else {}
    if tokenizer in LEGAL_COMBINATIONS.get((space, target), ()):
        for schedule in NOISE_SCHEDULES:
            config = LDAEConfig(**keys, **SIZES["quickstart"], noise_schedule=schedule)
            with torch.device("meta"):
                assert LDAEForPreTraining(config).config.prediction_target == target
    else:
        # An image target needs the image as input, and the image as input orthonormal directions.
        image_without_image = space == "latent" and target in ("reconstruction", "image")
        assert image_without_image or (space == "pixel" and tokenizer in LEARNED_TOKENIZERS)
        with pytest.raises(ValueError) as error:
            LDAEConfig(**keys)
        assert message_of(error).startswith(f"input_space={space!r} with prediction_target={target!r} is not defined")
        legal = "latent+noise, latent+latent"
        if tokenizer in ORTHONORMAL_TOKENIZERS:
            legal += ", pixel+noise, pixel+latent, pixel+reconstruction, pixel+image"
        assert str(error.value).endswith(f"for tokenizer={tokenizer!r}; choose one of {legal}.")


def test_every_name_that_the_configuration_knows_has_its_part():
    assert set(TOKENIZERS) == set(TOKENIZER_MODULES)
    assert set(NOISE_SCHEDULES) == set(SCHEDULES)
    assert set(LOSS_WEIGHTINGS) == set(LOSS_WEIGHTS)
    assert set(INPUT_SPACES) == set(NETWORK_INPUTS)
    assert set(LEGAL_COMBINATIONS) == set(PREDICTIONS)
    assert LATENT_SCALINGS == ("global", "whiten", "none")


def test_an_unknown_key_is_refused_and_the_nearest_one_named():
    with pytest.raises(ValueError, match=r"^LDAEConfig has no key 'latent_dims'; did you mean 'latent_dim'\?$"):
        LDAEConfig(latent_dims=16)
    with pytest.raises(ValueError, match=r"^LDAEConfig has no key 'qwertyuiop'\.$"):
        LDAEConfig(qwertyuiop=1)


def test_an_unknown_key_in_a_file_is_refused(tmp_path):
    LDAEConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_register_tokens": 4}))
    with pytest.raises(ValueError, match="no key 'num_register_tokens'"):
        AutoConfig.from_pretrained(tmp_path)


# -- keys beside a saved configuration -----------------------------------------------------------------------------


def test_keys_given_at_loading_are_checked_together_with_the_saved_ones(tmp_path):
    LDAEConfig(**SIZES["quickstart"]).save_pretrained(tmp_path)
    assert LDAEConfig.from_pretrained(tmp_path, feature_timestep=40).feature_timestep == 40
    assert AutoConfig.from_pretrained(tmp_path, conditioning_hidden_size="quarter").conditioning_hidden_size == 32
    with pytest.raises(ValueError, match="latent_dim=769 exceeds the 768 values"):
        LDAEConfig.from_pretrained(tmp_path, latent_dim=769)
    with pytest.raises(ValueError, match="feature_timestep=10 must lie in 0 ... 0"):
        AutoConfig.from_pretrained(tmp_path, noise_schedule="single_level")
    with pytest.raises(StrictDataclassError, match="Field 'latent_dim' expected int, got str"):
        LDAEConfig.from_pretrained(tmp_path, latent_dim="16")


def test_a_configuration_that_was_spoilt_after_its_check_builds_no_model():
    config = LDAEConfig(**SIZES["quickstart"])
    config.latent_dim = 1000
    with pytest.raises(ValueError, match="^latent_dim=1000 exceeds the 768 values of a 16x16x3 patch.$"):
        LDAEModel(config)


# -- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [size for size in SIZES if not size.endswith("_deep_narrow")])
def test_the_decoder_of_every_size_is_as_large_as_its_encoder(size):
    config = LDAEConfig(**SIZES[size])
    assert config.decoder_num_hidden_layers == config.num_hidden_layers
    assert config.hidden_size // config.num_attention_heads >= 32


def folded_parameters(config: LDAEConfig) -> int:
    """Parameters of the encoder as a plain ViT: at a fixed t the condition becomes two LayerNorm affines per block."""
    with torch.device("meta"):
        model = LDAEModel(config)
    conditioning = ("timestep_embedding", "modulation")
    own = sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in conditioning))
    return own + config.num_hidden_layers * 4 * config.hidden_size


@pytest.mark.parametrize(("size", "millions"), [("b", 85.6), ("l", 303.1)])
def test_the_folded_encoder_has_the_papers_number_of_parameters(size, millions):
    config = LDAEConfig(**SIZES[size])
    assert round(folded_parameters(config) / 1e6, 1) == millions


def test_the_large_encoder_with_a_head_for_1000_classes_has_304_million_parameters():
    config = LDAEConfig(**SIZES["l"])
    head = 1000 * (config.hidden_size + 1)
    assert round((folded_parameters(config) + head) / 1e6, 1) == 304.1


def test_half_l_is_the_first_half_of_the_blocks_of_dit_l():
    assert SIZES["half_l"]["hidden_size"] == SIZES["l"]["hidden_size"] == 1024
    assert SIZES["half_l"]["num_hidden_layers"] + SIZES["half_l"]["decoder_num_hidden_layers"] == 24
