"""A folded encoder is the encoder: every recipe's, at every timestep, in every format."""

import json
from functools import cache
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from transformers import IJepaForImageClassification, IJepaModel

from ldae_hf import SIZES, LDAEConfig, LDAEForImageClassification, LDAEForPreTraining, LDAEModel
from ldae_hf.export import export_program, fold, parity, to_transformers
from ldae_hf.export.graphs import OPSET, write_onnx_file
from ldae_hf.export.timm_vit import timm_arguments
from ldae_hf.export.transformers_vit import ijepa_config
from ldae_hf.recipes import load_recipe, recipe_names


CIFAR10 = Path(__file__).parent.parent / "model_cards" / "ldae-cifar10"
SHAPE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
FOLDABLE = [
    name
    for name in recipe_names()
    for recipe in [load_recipe(name, "cpu")]
    if not recipe.is_masked and recipe.model_config().is_plain_vit
]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def randomise(model):
    """Nothing is left as it starts: no gate at zero, no scale at one, no statistic and no mean at zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    for name, buffer in model.named_buffers():
        random = torch.randn(buffer.shape, generator=generator)
        if name.endswith(("components", "mean")):
            buffer.add_(random, alpha=0.1)
        elif name.endswith(("explained_variance", "running_var")):
            buffer.mul_(0.5 + random.abs())
    return model.eval()


@cache
def config_of(name: str, tier: str = "cpu") -> str:
    """The recipe's model, small, as JSON: many recipes have the same."""
    config = load_recipe(name, tier).model_config()
    keys = {key: getattr(config, key) for key in LDAEConfig.__annotations__ if hasattr(config, key)}
    hidden = None if keys["conditioning_hidden_size"] is None else 8
    return json.dumps(keys | SHAPE | dict(conditioning_hidden_size=hidden), sort_keys=True)


def sizes_of(config: LDAEConfig) -> list[tuple[int, int]]:
    """Square as in training, wide, tall, and as many patches as in training but in another shape."""
    patch, side = config.patch_size, config.image_size // config.patch_size
    grids = [(side, side), (side, side + 3), (2 * side + 1, 1), (side // 2, side * 2)]
    return [(patch * rows, patch * columns) for rows, columns in grids]


@cache
@torch.no_grad()
def differences(keys: str) -> list[tuple]:
    """How far a model's folded form, and the stock class with its weights, are from it: (case, difference, limit)."""
    config, found = LDAEConfig(**json.loads(keys)), []
    for dtype, tolerance in TOLERANCES.items():
        model = randomise(LDAEModel(config)).to(dtype)
        generator = torch.Generator().manual_seed(1)
        for timestep in {config.feature_timestep, config.num_noise_levels - 1}:
            folded, stock = fold(model, timestep), to_transformers(model, timestep)
            for size in sizes_of(config):
                images = torch.randn(2, 3, *size, generator=generator, dtype=dtype)
                expected = model(images, timesteps=timestep)
                tokens, pooled = folded(images)
                through_stock = stock(images, interpolate_pos_encoding=size != 2 * (config.image_size,))
                answers = {
                    "tokens": (tokens, expected.last_hidden_state),
                    "pooled": (pooled, expected.pooler_output),
                    "stock": (through_stock.last_hidden_state, expected.last_hidden_state),
                }
                for answer, pair in answers.items():
                    found.append(((answer, dtype, timestep, size), relative_difference(*pair), tolerance))
    return found


@pytest.mark.parametrize("name", FOLDABLE)
def test_a_recipes_encoder_is_its_folded_form_at_every_timestep_size_and_precision(name):
    far = [(case, found) for case, found, limit in differences(config_of(name)) if not found <= limit]
    assert not far


def test_the_family_has_what_makes_folding_hard():
    configs = [json.loads(config_of(name)) for name in FOLDABLE]
    assert {config["input_space"] for config in configs} == {"latent", "pixel"}
    assert {config["tokenizer"] for config in configs} >= {"patch_ae", "patch_vae", "patch_pca", "pixels"}
    assert {config["latent_scaling"] for config in configs} == {"global", "whiten", "none"}
    assert {config["noise_schedule"] for config in configs} >= {"single_level", "linear_sigma"}


@torch.no_grad()
def test_what_is_folded_matters():
    config = LDAEConfig(**json.loads(config_of("l_dae")))
    model, images = randomise(LDAEModel(config)), torch.randn(2, 3, config.image_size, config.image_size)
    expected = model(images).last_hidden_state
    assert relative_difference(fold(model, 900)(images)[0], expected) > 1e-2
    for part in (model.layers[0].modulation, model.tokenizer):
        before = {name: value.clone() for name, value in part.state_dict().items()}
        for value in part.state_dict().values():
            value.mul_(0.5)
        assert relative_difference(fold(model)(images)[0], expected) > 1e-3
        part.load_state_dict(before)
    assert relative_difference(fold(model)(images)[0], expected) < 1e-5


@pytest.mark.parametrize(("space", "target"), [("latent", "noise"), ("pixel", "image")])
@torch.no_grad()
def test_a_model_with_classes_and_dits_modulation_folds_as_no_class(space, target):
    spaces = dict(input_space=space, prediction_target=target, latent_scaling="whiten", latent_dim=12)
    parts = dict(num_classes=7, conditioning_hidden_size=None, hidden_act="relu", layer_norm_eps=1e-3)
    config = LDAEConfig(image_size=32, patch_size=8, **spaces, **parts, **SHAPE)
    model, images = randomise(LDAEModel(config)).double(), torch.randn(3, 3, 32, 40, dtype=torch.float64)
    assert relative_difference(fold(model)(images)[0], model(images).last_hidden_state) < 1e-12
    assert relative_difference(to_transformers(model)(images[..., :32])[0], model(images[..., :32])[0]) < 1e-12


@torch.no_grad()
def test_a_classifier_folds_with_its_batch_norm_and_its_classes():
    keys = json.loads(config_of("l_dae")) | dict(id2label={0: "cat", 1: "dog", 2: "eel"})
    model = randomise(LDAEForImageClassification(LDAEConfig(**keys)))
    for dtype, tolerance in TOLERANCES.items():
        model = model.to(dtype)
        stock = to_transformers(model)
        assert type(stock) is IJepaForImageClassification and stock.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
        for size in sizes_of(model.config):
            images = torch.randn(2, 3, *size, dtype=dtype)
            expected = model(images).logits
            assert relative_difference(fold(model)(images)[0], expected) < tolerance
            assert relative_difference(stock(images, interpolate_pos_encoding=True).logits, expected) < tolerance


def test_a_model_in_bfloat16_folds_to_bfloat16_and_is_rounded_once():
    model = randomise(LDAEModel(LDAEConfig(**json.loads(config_of("l_dae"))))).to(torch.bfloat16)
    rounded, exact = fold(model), fold(model, dtype=torch.float64)
    for (name, value), precise in zip(rounded.state_dict().items(), exact.state_dict().values(), strict=True):
        assert torch.equal(value, precise.to(torch.bfloat16)), name


def test_what_does_not_fold_is_refused_in_a_sentence():
    encoder = LDAEModel(LDAEConfig(**json.loads(config_of("l_dae"))))
    with pytest.raises(ValueError, match=r"Timesteps must lie in 0 \.\.\. 999"):
        fold(encoder, 1000)
    with pytest.raises(ValueError, match="not a LDAEForPreTraining.* give the encoder, model.ldae"):
        fold(LDAEForPreTraining(encoder.config))
    convolutional = next(name for name in recipe_names() if load_recipe(name).model["tokenizer"] == "vqgan")
    with pytest.raises(ValueError, match="before its first layer stands a convolutional autoencoder"):
        fold(LDAEModel(LDAEConfig(**json.loads(config_of(convolutional)))))
    with pytest.raises(ValueError, match="timm has no activation for hidden_act='laplace'"):
        timm_arguments(LDAEConfig(hidden_act="laplace"))
    with pytest.raises(ValueError, match="layer_norm_eps=1e-05"):
        timm_arguments(LDAEConfig(layer_norm_eps=1e-5))


@pytest.mark.parametrize(("size", "millions"), [("b", 85.6), ("half_l", 151.9), ("l", 303.1)])
def test_folded_sizes_at_256_pixels_are_those_of_the_paper(size, millions):
    config = ijepa_config(LDAEConfig(**SIZES[size], num_labels=1000))
    with torch.device("meta"):
        encoder, classifier = IJepaModel(config), IJepaForImageClassification(config)
    positions = encoder.embeddings.position_embeddings.numel()  # fixed in the model, a parameter of the stock class
    assert round((encoder.num_parameters() - positions) / 1e6, 1) == millions
    if size == "l":
        assert round((classifier.num_parameters() - positions) / 1e6, 1) == 304.1


@pytest.fixture(scope="module")
def encoder() -> LDAEModel:
    return LDAEModel.from_pretrained(CIFAR10).eval()


IMAGES = [(2, 32, 32), (1, 32, 32), (3, 8, 64), (1, 40, 24), (4, 64, 64)]


@pytest.fixture(scope="module")
def onnx_file(encoder, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    write_onnx_file(file, fold(encoder))
    return file


@torch.no_grad()
def test_onnx_takes_images_of_any_number_and_size(encoder, onnx_file):
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["last_hidden_state", "pooler_output"]
    for batch, height, width in [*IMAGES, (1, 4, 4)]:
        images = torch.rand(batch, 3, height, width) * 2 - 1
        expected = encoder(images)
        found = [torch.from_numpy(value) for value in session.run(None, {"pixel_values": images.numpy()})]
        assert relative_difference(found[0], expected.last_hidden_state) < 1e-5
        assert relative_difference(found[1], expected.pooler_output) < 1e-5


def test_an_onnx_file_is_whole_and_says_nothing_of_the_machine_that_wrote_it(onnx_file):
    assert [path.name for path in onnx_file.parent.iterdir()] == ["model.onnx"]
    assert onnx.load(onnx_file).opset_import[0].version == OPSET
    assert str(Path(torch.__file__).parent).encode() not in onnx_file.read_bytes()
    assert b".py" not in onnx_file.read_bytes()


@torch.no_grad()
def test_torch_export_takes_images_of_any_number_and_size(encoder):
    module = export_program(encoder).module()
    for batch, height, width in IMAGES:
        images = torch.rand(batch, 3, height, width) * 2 - 1
        assert relative_difference(module(images)[0], encoder(images).last_hidden_state) < 1e-5


def test_parity_is_measured_at_the_timestep_that_was_asked_for(encoder):
    rows = parity(encoder, timestep=500, targets=["transformers"])
    assert all(row["relative_difference"] < 1e-5 for row in rows)
    assert len({tuple(row["size"]) for row in rows}) == 3
