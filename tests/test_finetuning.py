"""The parts of fine-tuning: the classifier at its start, rates by layer, dropped paths, mixing, augmentation, plan."""

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_encoder import TINY, pictures, save_tiny_encoder, tiny_processor
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    IJepaConfig,
    IJepaModel,
    PreTrainedModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    ViTMSNConfig,
    ViTMSNModel,
)

from ldae_hf import LDAEModel
from ldae_hf.evaluation.encoders import open_encoder
from ldae_hf.evaluation.finetuning.augmentation import OPERATIONS, RandAugment, RandomErasing
from ldae_hf.evaluation.finetuning.classifiers import build_classifier
from ldae_hf.evaluation.finetuning.drop_path import DropPath
from ldae_hf.evaluation.finetuning.layer_decay import layered_adamw
from ldae_hf.evaluation.finetuning.mixing import Mixing
from ldae_hf.evaluation.finetuning.recipe import FineTuningPlan, FineTuningRecipe
from ldae_hf.export.transformers_vit import stock_processor
from ldae_hf.training import RunError


PEERS = Path(os.environ.get("LDAE_PEERS") or Path(__file__).parent.parent / ".venv-peers")
NAMES = ["cat", "dog", "eel"]
SHAPE = dict(
    image_size=16,
    patch_size=4,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=64,
    layer_norm_eps=1e-6,
)
STOCK = {
    "vit": (ViTModel, ViTConfig),
    "vit_mae": (ViTMAEModel, ViTMAEConfig),
    "ijepa": (IJepaModel, IJepaConfig),
    "dinov2": (Dinov2Model, Dinov2Config),
}


@pytest.fixture(scope="module")
def ldae_folder(tmp_path_factory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("ldae"))


def save_stock(folder: Path, model: PreTrainedModel) -> str:
    """With weights of all scales, and a processor whose statistics are its own."""
    for name, parameter in model.named_parameters():
        if not (name.endswith("position_embeddings") and not parameter.requires_grad):
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor = tiny_processor()
    processor.image_mean, processor.image_std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    stock_processor(processor).save_pretrained(folder)
    return str(folder)


def pixels_of(count: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def classifier_of(source, **options):
    encoder = open_encoder(source, device="cpu")
    return encoder, build_classifier(encoder, NAMES, **options)


# ---- where it starts


@torch.no_grad()
def test_an_ldae_starts_as_the_same_function_with_a_head_on_its_features(ldae_folder):
    encoder, classifier = classifier_of(ldae_folder)
    images = classifier.processor.normalize_pixels(pixels_of())
    expected = LDAEModel.from_pretrained(ldae_folder)(images).pooler_output
    found = classifier.model.eval().ijepa(images).last_hidden_state.mean(dim=1)
    assert (found - expected).abs().max() <= 1e-5
    head = classifier.model.classifier
    torch.testing.assert_close(classifier.model(images).logits, head(expected), rtol=0, atol=1e-7)
    assert head.weight.std() < 4e-5 and (head.bias == 0).all()
    assert all(parameter.requires_grad for parameter in classifier.model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("kind", STOCK)
def test_a_stock_encoder_starts_with_the_tokens_that_it_had(kind, tmp_path):
    model_class, config_class = STOCK[kind]
    source = save_stock(tmp_path, model_class(config_class(**SHAPE)))
    encoder, classifier = classifier_of(source)
    uint8 = pixels_of()
    [stream] = encoder.hidden_states(uint8, torch.arange(4), [3])
    [tokens] = encoder.tokens(uint8, torch.arange(4), [3])
    expected = {
        "vit": lambda: torch.nn.functional.layer_norm(stream[:, 1:].mean(dim=1), (32,), eps=1e-6),
        "vit_mae": lambda: torch.nn.functional.layer_norm(stream[:, 1:].mean(dim=1), (32,), eps=1e-6),
        "ijepa": lambda: tokens.mean(dim=1),
        "dinov2": lambda: torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1),
    }[kind]()
    nn.init.normal_(classifier.model.classifier.weight)
    images = classifier.processor.normalize_pixels(uint8)
    logits = classifier.model.eval()(images).logits
    torch.testing.assert_close(logits, classifier.model.classifier(expected), rtol=1e-4, atol=1e-4)
    assert classifier.model.config.id2label == dict(enumerate(NAMES))


@pytest.mark.parametrize("kind", ["ldae", "vit_mae"])
def test_from_scratch_it_keeps_the_positions_that_no_training_changed_and_nothing_else(kind, tmp_path, ldae_folder):
    source = ldae_folder if kind == "ldae" else save_stock(tmp_path, ViTMAEModel(ViTMAEConfig(**SHAPE)))
    trained, fresh = (classifier_of(source, from_scratch=new)[1].model.state_dict() for new in (False, True))
    assert trained.keys() == fresh.keys()
    same = {name for name in trained if torch.equal(trained[name], fresh[name])}
    alike = {name for name in same if name.endswith("position_embeddings")}
    assert len(alike) == 1
    assert not {name for name in same - alike if fresh[name].ndim > 1 and not name.startswith("classifier")}
    again = classifier_of(source, from_scratch=True)[1].model.state_dict()
    other = classifier_of(source, from_scratch=True, seed=1)[1].model.state_dict()
    assert all(torch.equal(fresh[name], again[name]) for name in fresh)
    assert not all(torch.equal(fresh[name], other[name]) for name in fresh)


@torch.no_grad()
def test_a_kept_projection_takes_out_what_the_latents_do_not_hold(ldae_folder):
    encoder, classifier = classifier_of(ldae_folder)
    weight = classifier.model.ijepa.embeddings.patch_embeddings.projection.weight
    before = weight.clone()
    classifier.project_patch_embedding()
    torch.testing.assert_close(weight, before, rtol=0, atol=1e-5)  # it starts in the subspace
    nn.init.normal_(weight)
    classifier.project_patch_embedding()
    directions = tiny_processor().components.float()
    assert (weight.flatten(1) @ directions[TINY["latent_dim"] :].T).abs().max() < 1e-5
    assert (weight.flatten(1) @ directions[: TINY["latent_dim"]].T).abs().max() > 0.1


def test_a_model_without_a_form_of_fine_tuning_is_named(tmp_path):
    source = save_stock(tmp_path, ViTMSNModel(ViTMSNConfig(**SHAPE)))
    with pytest.raises(ValueError, match="is a ViTMSNModel, for which there is no fine-tuning; there is for l-DAE"):
        classifier_of(source)


# ---- rates by layer


@pytest.mark.parametrize("kind", ["ldae", "vit_mae"])
def test_layers_learn_the_slower_the_lower_they_are_and_only_matrices_decay(kind, tmp_path, ldae_folder):
    source = ldae_folder if kind == "ldae" else save_stock(tmp_path, ViTMAEModel(ViTMAEConfig(**SHAPE)))
    _, classifier = classifier_of(source)
    optimizer = layered_adamw(classifier.model, classifier.blocks, 0.5, 0.05, (0.9, 0.999))
    names = {parameter: name for name, parameter in classifier.model.named_parameters()}
    found = {
        names[parameter]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found.keys() == set(names.values())
    prefix = classifier.model.base_model_prefix
    expected = {  # three blocks: 0.5^4 for the embedding, 0.5^3, 0.5^2 and 0.5 for them, 1 for what comes after
        f"{prefix}.embeddings.patch_embeddings.projection.weight": (0.0625, 0.05),
        f"{prefix}.embeddings.patch_embeddings.projection.bias": (0.0625, 0.0),
        f"{prefix}.embeddings.position_embeddings": (0.0625, 0.0),
        f"{prefix}.layers.0.attention.q_proj.weight": (0.125, 0.05),
        f"{prefix}.layers.1.layernorm_before.weight": (0.25, 0.0),
        f"{prefix}.layers.1.mlp.fc1.bias": (0.25, 0.0),
        f"{prefix}.layers.2.mlp.fc2.weight": (0.5, 0.05),
        "classifier.weight": (1.0, 0.05),
        "classifier.bias": (1.0, 0.0),
    }
    expected |= {
        "ldae": {"ijepa.layernorm.weight": (1.0, 0.0)},
        "vit_mae": {"beit.embeddings.cls_token": (0.0625, 0.0), "beit.pooler.layernorm.weight": (1.0, 0.0)},
    }[kind]
    assert {name: found[name] for name in expected} == expected


# ---- dropped paths


class Branch(nn.Module):
    """x + end(x)."""

    def __init__(self):
        super().__init__()
        self.end = nn.Identity()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + self.end(states)


def test_a_path_is_dropped_for_whole_images_and_scaled_so_that_its_mean_stays():
    block = Branch()
    drop_path = DropPath([[nn.Identity()], [block.end]], 0.25)  # the second and last block: 0.25
    images = torch.ones(8192, 2, 3)
    drop_path.draw(0, range(8192), 8192, "cpu")
    added = block(images) - images
    kept = added[:, 0, 0] != 0
    assert (added == added[:, :1, :1]).all()
    torch.testing.assert_close(added[kept], torch.full_like(added[kept], 1 / 0.75))
    assert kept.float().mean().item() == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 8192) ** 0.5)
    block.eval()
    assert torch.equal(block(images), 2 * images)


def test_rates_rise_linearly_with_depth_and_both_branches_of_a_block_have_the_same(ldae_folder):
    _, classifier = classifier_of(ldae_folder)
    names = list(classifier.model.state_dict())
    drop_path = DropPath(classifier.branch_ends(), 0.2)
    assert drop_path.rates.tolist() == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2])
    assert list(classifier.model.state_dict()) == names


def test_what_is_dropped_depends_on_seed_step_and_place_but_not_on_how_a_batch_is_split():
    def factors(step: int, places: range, seed: int = 0) -> torch.Tensor:
        drop_path = DropPath([[nn.Identity(), nn.Identity()]] * 3, 0.5, seed)
        drop_path.draw(step, places, 64, "cpu")
        return drop_path.factors

    whole = factors(3, range(64))
    assert torch.equal(torch.cat([factors(3, range(40)), factors(3, range(40, 64))], dim=1), whole)
    assert not torch.equal(factors(4, range(64)), whole) and not torch.equal(factors(3, range(64), seed=1), whole)


def test_a_model_without_dropped_paths_is_what_it_was(ldae_folder):
    _, classifier = classifier_of(ldae_folder)
    images = classifier.processor.normalize_pixels(pixels_of())
    model = classifier.model.train()
    nn.init.normal_(model.classifier.weight)
    before = model(images).logits
    drop_path = DropPath(classifier.branch_ends(), 0.9)
    drop_path.draw(0, range(4), 4, "cpu")
    assert not torch.allclose(model(images).logits, before)
    assert torch.equal(model.eval()(images).logits, before)


# ---- mixing


def test_mixed_targets_sum_to_one_and_say_which_pixels_are_whose():
    labels = torch.arange(10)
    images = labels[:, None, None, None].expand(10, 3, 16, 16).double()  # each holds its own label
    mixing, kinds = Mixing(num_classes=10, smoothing=0.0), set()
    for step in range(40):
        mixed, targets = mixing(images, labels, step)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(10, dtype=torch.float64))
        # The mean pixel is the mean label, whichever way they were mixed.
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), targets @ labels.double())
        assert all(set(targets[n].nonzero().flatten().tolist()) <= {n, n ^ 1} for n in range(10))
        kinds.add(len(mixed[0].unique()))
    assert kinds == {1, 2}  # MixUp has one value a picture here, CutMix two
    assert torch.equal(images[3], torch.full_like(images[3], 3))


def test_labels_are_smoothed_with_mixing_or_without():
    for mixing in (Mixing(5, smoothing=0.1), Mixing(5, mixup=0, cutmix=0, smoothing=0.1)):
        _, targets = mixing(torch.zeros(2, 3, 8, 8), torch.tensor([2, 2]), 0)
        torch.testing.assert_close(targets[0], torch.tensor([0.02, 0.02, 0.92, 0.02, 0.02]))


def test_the_draws_follow_their_distributions_and_a_lone_kind_is_the_only_one():
    draws = [Mixing(10).draw(step, 1000) for step in range(2000)]
    assert np.mean([draw.box is None for draw in draws]) == pytest.approx(0.5, abs=0.05)
    kept = np.array([draw.kept for draw in draws if draw.box is None])
    assert kept.mean() == pytest.approx(0.5, abs=0.04)
    assert kept.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.015)  # of Beta(0.8, 0.8)
    assert all(Mixing(10, mixup=0).draw(step, 32).box for step in range(20))
    assert not any(Mixing(10, cutmix=0).draw(step, 32).box for step in range(20))


def test_a_mixture_does_not_depend_on_how_a_batch_is_split():
    images, labels = torch.rand(8, 3, 16, 16), torch.randint(0, 4, (8,))
    for step in range(6):
        whole = Mixing(4)(images, labels, step)
        parts = [Mixing(4)(images[half], labels[half], step) for half in (slice(0, 2), slice(2, 8))]
        for one, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(one, torch.cat(pieces))


# ---- augmentation


def picture(size: int = 48) -> np.ndarray:
    return np.asarray(pictures(1)[0].resize((size, size))).transpose(2, 0, 1).copy()


def test_augmentation_is_a_function_of_the_generator_and_leaves_the_crop_alone():
    crop, different = picture(), set()
    before = crop.copy()
    for step in (RandAugment(), RandomErasing(1.0)):
        for seed in range(20):
            one, again = (step(crop, np.random.default_rng(seed)) for _ in range(2))
            assert one.dtype == np.uint8 and one.shape == crop.shape and np.array_equal(one, again)
            different.add(one.tobytes())
    assert len(different) > 25 and np.array_equal(crop, before)


def timm_augment():
    """timm's own module, which imports nothing but Pillow and NumPy."""
    file = PEERS / "timm" / "data" / "auto_augment.py"
    if not file.is_file():
        pytest.skip(f"timm is not in {PEERS}")
    spec = importlib.util.spec_from_file_location("timm_auto_augment", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TIMMS = {
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "colour": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_timms_at_every_strength(name):
    timm, fill = timm_augment(), (120, 110, 100)
    assert list(TIMMS.values()) == timm._RAND_INCREASING_TRANSFORMS
    image = Image.fromarray(picture().transpose(1, 2, 0))
    for magnitude in (0.0, 3.3, 8.1, 9.0, 9.9):
        settings = dict(img_mean=fill, interpolation=Image.Resampling.BICUBIC)
        theirs = timm.AugmentOp(TIMMS[name], prob=1.0, magnitude=magnitude, hparams=settings)
        ours = [np.asarray(OPERATIONS[name](image, magnitude / 10, sign, fill)) for sign in (-1, 1)]
        seen = set()
        for seed in range(8):
            random.seed(seed)
            answer = np.asarray(theirs(image))
            matches = [np.array_equal(answer, each) for each in ours]
            assert any(matches)
            seen.add(matches.index(True))
        assert len(seen) == (1 if np.array_equal(*ours) else 2)


def test_augmented_images_differ_from_the_crop_as_much_as_timms_do():
    timm, image, count = timm_augment(), picture(), 1500
    settings = dict(img_mean=(128, 128, 128), interpolation=Image.Resampling.BICUBIC)
    # At 10, which "rand-m9-mstd0.5-inc1" draws now and then, timm's posterize is refused by today's Pillow.
    theirs = timm.rand_augment_transform("rand-m8-mstd0.3-inc1", settings)
    random.seed(0), np.random.seed(0)
    generator = np.random.default_rng(0)

    def distance(answer: np.ndarray) -> float:
        return np.abs(answer.astype(float) - image).mean()

    shown = Image.fromarray(image.transpose(1, 2, 0))
    found = np.array([distance(RandAugment(8, 0.3)(image, generator)) for _ in range(count)])
    expected = np.array([distance(np.asarray(theirs(shown)).transpose(2, 0, 1)) for _ in range(count)])
    error = np.sqrt((found.var() + expected.var()) / count)
    assert found.mean() == pytest.approx(expected.mean(), abs=4 * error)
    assert (found == 0).mean() == pytest.approx((expected == 0).mean(), abs=4 * np.sqrt(0.25 / count * 2))


def test_a_quarter_of_the_images_lose_a_rectangle_to_noise():
    crop, generator = np.zeros((3, 64, 64), np.uint8), np.random.default_rng(0)
    erased = [RandomErasing()(crop, generator) for _ in range(2000)]
    areas = np.array([(each != 0).any(axis=0).mean() for each in erased])
    hit = areas[areas > 0]
    assert len(hit) / 2000 == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 2000))
    assert hit.min() > 0.01 and hit.max() < 0.35 and hit.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    values = np.concatenate([each[:, each.any(axis=0)].T for each in erased if each.any()])
    assert values.mean(axis=0) == pytest.approx([123.7, 116.3, 103.5], abs=3)


# ---- the plan


def test_the_defaults_are_the_papers_for_imagenet():
    plan = FineTuningPlan.of(FineTuningRecipe().for_width(1024), 1_281_167, 8, 128)
    assert (plan.steps_per_epoch, plan.total_steps, plan.accumulation) == (1251, 125_100, 1)
    assert (
        FineTuningRecipe().for_width(1024).layer_decay == 0.65 and FineTuningRecipe().for_width(768).layer_decay == 0.85
    )
    assert plan.learning_rate_at(0) == pytest.approx(4e-3 / 6255)
    assert plan.learning_rate_at(6254) == plan.learning_rate_at(6255) == pytest.approx(4e-3)
    middle = 6255 + (125_100 - 6255) // 2
    assert plan.learning_rate_at(middle) == pytest.approx((4e-3 + 1e-6) / 2, rel=1e-3)
    assert plan.learning_rate_at(125_099) == pytest.approx(1e-6, rel=1e-2)
    assert not any("warning" in line for line in plan.lines())


def test_an_average_that_would_hardly_move_is_warned_of():
    lines = FineTuningPlan.of(FineTuningRecipe(epochs=10), 50_000, 1, 128).lines()
    assert "half-life of 6,931 steps, of a training of 480" in lines[-1]


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(epochs=0), "epochs is 0, but must be in 1...inf"),
        (dict(drop_path=1.0), "drop_path is 1.0, but must be in 0...1"),
        (dict(layer_decay=1.5), "layer_decay is 1.5"),
        (dict(ema_decay=1.0), "ema_decay is 1.0"),
        (dict(warmup_epochs=101), "warmup_epochs is 101, but must be in 0...100"),
        (dict(learning_rate=0.0, min_learning_rate=0.0), "learning_rate is 0.0, but must be in 1e-12...inf"),
        (dict(crop_scale=(0, 1)), r"crop_scale is \(0, 1\), but must be 0 < smallest <= largest <= 1"),
    ],
)
def test_a_recipe_out_of_range_is_refused(change, words):
    with pytest.raises(RunError, match=words):
        FineTuningRecipe(**change)


@pytest.mark.parametrize(
    "images, processes, per_device, words",
    [
        (100, 1, None, "There are 100 training images, fewer than a global batch of 1024"),
        (5000, 3, None, "does not split over 3 processes"),
        (5000, 1, 100, "cannot be split into batches of 100"),
        (5000, 1, 1, "1 in a forward pass are no pairs"),
    ],
)
def test_a_batch_that_cannot_be_made_is_refused(images, processes, per_device, words):
    with pytest.raises(RunError, match=words):
        FineTuningPlan.of(FineTuningRecipe(), images, processes, per_device)


# ---- timm


TIMM = """
import sys, torch
from pathlib import Path
folder, peers = sys.argv[1:3]
sys.path.append(peers)
if torch.version.cuda is None:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification
from ldae_hf.evaluation.encoders import open_encoder
from ldae_hf.evaluation.finetuning.classifiers import build_classifier
from ldae_hf.evaluation.finetuning.drop_path import DropPath
from ldae_hf.evaluation.finetuning.layer_decay import layered_adamw

torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
save_file(model.state_dict(), f"{folder}/tiny.safetensors")
encoder = open_encoder(f"timm:vit_tiny_patch16_224@{folder}/tiny.safetensors", device="cpu")
classifier = build_classifier(encoder, ["cat", "dog"])
pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
with torch.no_grad():
    [stream] = encoder.hidden_states(pixels, torch.arange(2), [12])
    expected = torch.nn.functional.layer_norm(stream[:, 1:].mean(1), (192,), eps=1e-6)
    images, head = classifier.processor.normalize_pixels(pixels), classifier.model.timm_model.head
    torch.nn.init.normal_(head.weight)
    found = classifier.model.eval()(images).logits
    torch.testing.assert_close(found, head(expected), rtol=1e-4, atol=1e-4)
    classifier.model.save_pretrained(f"{folder}/model")
    loaded = AutoModelForImageClassification.from_pretrained(f"{folder}/model")
    torch.testing.assert_close(loaded(images).logits, found)
assert DropPath(classifier.branch_ends(), 0.1).rates.shape == (24,)
groups = layered_adamw(classifier.model, classifier.blocks, 0.5, 0.05, (0.9, 0.999)).param_groups
assert sorted({group["lr_scale"] for group in groups}) == [0.5**n for n in range(13, -1, -1)]
scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
inner = classifier.model.timm_model
assert scales[id(inner.pos_embed)] == scales[id(inner.cls_token)] == 0.5**13 and scales[id(inner.fc_norm.weight)] == 1
"""


@pytest.mark.slow
def test_a_vision_transformer_of_timm_is_fine_tuned_as_the_class_that_wraps_it(tmp_path):
    if not (PEERS / "timm").is_dir():
        pytest.skip(f"timm is not in {PEERS}")
    subprocess.run([sys.executable, "-c", TIMM, tmp_path, PEERS], check=True)
