"""An encoder of any library gives what the library itself gives, for each image alone, or says why it cannot."""

import io
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from forked_runs import Child
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_encoder import save_tiny_encoder, tiny_model, tiny_processor
from transformers import (
    AutoModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from ldae_hf import LDAEModel
from ldae_hf.evaluation.encoders import PooledFeatures, open_encoder
from ldae_hf.evaluation.encoders.timm_vit import read_weights
from ldae_hf.evaluation.features import centre_crops, extract
from ldae_hf.evaluation.floors import FLOORS, build_floors
from ldae_hf.evaluation.ledger import read_ledger, result_table
from ldae_hf.evaluation.online import online_evaluation
from ldae_hf.evaluation.run import evaluate_encoders
from ldae_hf.export import write_timm, write_transformers
from ldae_hf.image_processing_ldae import LDAEImageProcessor
from ldae_hf.recipes import load_recipe
from ldae_hf.training.data import load_images


PEERS = Path(os.environ.get("LDAE_PEERS") or Path(__file__).parent.parent / ".venv-peers")
SIZE = 16
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
SHAPE = dict(image_size=SIZE, patch_size=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=2)
VIT = SHAPE | dict(intermediate_size=64)
DECODER = dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
MODELS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**VIT)),
    "vit_mae": lambda: ViTMAEForPreTraining(ViTMAEConfig(**VIT, **DECODER, decoder_intermediate_size=16)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SHAPE)),
    "dinov2_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SHAPE, num_register_tokens=3)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**VIT, num_register_tokens=2)),
    "ijepa": lambda: IJepaModel(IJepaConfig(**VIT)),
    "swin": lambda: SwinModel(
        SwinConfig(image_size=SIZE, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    ),
}
PREFIXES = {"vit": 1, "vit_mae": 1, "dinov2": 1, "dinov2_registers": 4, "dinov3": 3, "ijepa": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A saved model of every kind, with weights of all scales, and an l-DAE."""
    root = tmp_path_factory.mktemp("encoders")
    for kind, build in MODELS.items():
        torch.manual_seed(0)
        model = build()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(root / kind)
        size = {"height": SIZE, "width": SIZE}
        ViTImageProcessorPil(size=size, image_mean=MEAN, image_std=STD).save_pretrained(root / kind)
    save_tiny_encoder(root / "ldae")
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (5, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


IDS = torch.arange(5)


def images_of(count: int, seed: int):
    """A labelled source; the class is the sign of a slope in brightness."""
    generator, rows = np.random.default_rng(seed), {"image": [], "label": []}
    for label in generator.integers(0, 2, count).tolist():
        slope = np.linspace(-30, 30, 24) * (1 if label else -1)
        picture = 128 + slope[:, None, None] * generator.uniform(0.3, 1, 3) + generator.normal(0, 90, (24, 20, 3))
        file = io.BytesIO()
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, "PNG")
        rows["image"].append({"bytes": file.getvalue(), "path": None})
        rows["label"].append(label)
    return load_images(Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "label": Value("int64")})))


@pytest.fixture(scope="module")
def train_source():
    return images_of(80, 0)


@pytest.fixture(scope="module")
def test_source():
    return images_of(40, 1)


@pytest.fixture
def options(tmp_path):
    return {"num_workers": 0, "progress": False, "cache_dir": tmp_path / "cache"}


def nearest_mean(train, test, device) -> dict:
    """A task that needs no training."""
    found = {}
    for name, features in train.items():
        means = torch.stack([features.features[features.labels == label].mean(dim=0) for label in (0, 1)])
        guesses = torch.cdist(test[name].features, means).argmin(dim=1)
        found[name] = 100 * (guesses == test[name].labels).float().mean().item()
    return {"top1": next(iter(found.values())), "by_map": found, "protocol": {"distance": "euclidean"}, "seconds": 0.0}


# -- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PREFIXES)
@torch.no_grad()
def test_tokens_are_the_librarys_hidden_states_after_its_final_norm(folders, pixels, kind):
    encoder = open_encoder(folders[kind], device="cpu")
    model = AutoModel.from_pretrained(folders[kind]).eval()
    inputs = {"pixel_values": (pixels / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]}
    if kind == "vit_mae":
        model.config.mask_ratio = 0.0
        inputs["noise"] = torch.arange(16.0).expand(5, -1)
    expected = model(**inputs, output_hidden_states=True)
    norm = model.norm if kind == "dinov3" else model.layernorm
    first, last = encoder.tokens(pixels, IDS, [1, 3])
    torch.testing.assert_close(last, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first, norm(expected.hidden_states[1]), rtol=1e-5, atol=1e-5)
    assert (encoder.dim, encoder.num_layers, encoder.image_size, encoder.patch_size) == (32, 3, SIZE, 4)
    assert encoder.num_prefix_tokens == PREFIXES[kind] and encoder.has_class_token == (kind != "ijepa")
    assert encoder.facts["library"] == "transformers" and encoder.facts["norm"] == "the model's final norm"


@pytest.mark.parametrize("kind", [*PREFIXES, "ldae"])
def test_an_images_tokens_are_the_same_alone_and_in_a_batch_and_every_time(folders, pixels, kind):
    encoder = open_encoder(folders[kind], device="cpu")
    [together] = encoder.tokens(pixels, IDS, [3])
    [again] = encoder.tokens(pixels, IDS, [3])
    assert torch.equal(together, again)
    alone = torch.cat([encoder.tokens(pixels[i : i + 1], IDS[i : i + 1], [3])[0] for i in range(5)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_mae_sees_every_patch_whatever_its_mask_ratio_which_stays_as_it_was(folders, pixels):
    encoder = open_encoder(folders["vit_mae"], device="cpu")
    [tokens] = encoder.tokens(pixels, IDS, [3])
    assert tokens.shape == (5, 17, 32) and encoder.model.config.mask_ratio == 0.75
    changed = pixels.clone()
    changed[:, :, 12:, 12:] = 255 - changed[:, :, 12:, 12:]  # the last patch
    moved = (encoder.tokens(changed, IDS, [3])[0] - tokens).abs().mean(dim=(0, 2))
    assert moved[1:].argmax() == 15


@pytest.mark.parametrize("kind", PREFIXES)
def test_another_image_size_is_what_the_model_makes_of_it(folders, kind):
    encoder = open_encoder(folders[kind], device="cpu", image_size=24)
    larger = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    assert encoder.tokens(larger, IDS[:2], [3])[0].shape == (2, PREFIXES[kind] + 36, 32)
    with pytest.raises(ValueError, match="image_size=18 is not a positive multiple of the patch, 4"):
        open_encoder(folders[kind], device="cpu", image_size=18)


def test_an_ldae_exported_to_transformers_gives_the_features_that_it_gives_itself(folders, pixels, tmp_path):
    model, processor = (
        LDAEModel.from_pretrained(folders["ldae"]).eval(),
        LDAEImageProcessor.from_pretrained(folders["ldae"]),
    )
    write_transformers(tmp_path / "vit", model, processor)
    ours, stock = open_encoder(folders["ldae"], device="cpu"), open_encoder(tmp_path / "vit", device="cpu")
    assert (ours.facts["library"], stock.facts["library"]) == ("ldae_hf", "transformers")
    assert (stock.image_size, stock.mean, stock.std) == (ours.image_size, ours.mean, ours.std)
    found, expected = (PooledFeatures(encoder)(pixels, IDS) for encoder in (stock, ours))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# -- Layers and pools -------------------------------------------------------------------------------------------------


def test_pools_are_what_their_names_say(folders, pixels):
    encoder = open_encoder(folders["dinov2_registers"], device="cpu")
    [tokens], [raw] = encoder.tokens(pixels, IDS, [2]), encoder.hidden_states(pixels, IDS, [2])
    found = {
        pool: PooledFeatures(encoder, 2, pool)(pixels, IDS) for pool in ("mean", "class", "class_mean", "raw_mean")
    }
    assert torch.equal(found["mean"], tokens[:, 4:].mean(dim=1)) and torch.equal(found["class"], tokens[:, 0])
    assert torch.equal(found["class_mean"], torch.cat([found["class"], found["mean"]], dim=1))
    assert torch.equal(found["raw_mean"], raw[:, 4:].mean(dim=1))
    last, third = PooledFeatures(encoder, "last"), PooledFeatures(encoder, 3)
    assert (last.name, third.name) == ("last/mean", "3/mean") and last.fingerprint == third.fingerprint
    assert PooledFeatures(encoder, 2).fingerprint != last.fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 4}, r"layer=4 must be one of 1 ... 3, the blocks of .*ijepa, or 'last'"),
        ({"layer": 0}, "layer=0 must be one of 1 ... 3"),
        ({"pool": "max"}, "pool='max' must be one of mean, class, class_mean, raw_mean"),
        ({"pool": "class"}, "ijepa has no class token for pool='class'; pool='mean' works for any encoder"),
    ],
    ids=str,
)
def test_layers_and_pools_that_an_encoder_does_not_have_are_refused(folders, arguments, message):
    with pytest.raises(ValueError, match=message):
        PooledFeatures(open_encoder(folders["ijepa"], device="cpu"), **arguments)


def test_several_maps_of_one_encoder_share_one_forward_pass(folders, train_source):
    encoder, calls = open_encoder(folders["vit"], device="cpu"), []
    encoder.model.register_forward_hook(lambda *arguments: calls.append(1))
    maps = [PooledFeatures(encoder, layer, pool) for layer in (1, 2, "last") for pool in ("mean", "class")]
    found = extract(maps, train_source, SIZE, batch_size=40, num_workers=0, cache_dir=None, progress=False)
    assert len(calls) == 2  # batches
    [alone] = extract([maps[3]], train_source, SIZE, batch_size=40, num_workers=0, cache_dir=None, progress=False)
    assert torch.equal(found[3].features, alone.features)


# -- What is no encoder -----------------------------------------------------------------------------------------------


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def test_weights_that_are_missing_or_unknown_are_named(folders, tmp_path):
    folder = copied(folders["dinov2"], tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("mlp.fc1.weight"))
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"damaged is not the weights of this Dinov2Model: it lacks {name}"):
        open_encoder(folder, device="cpu")
    save_file(weights | {"another.weight": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="it holds, unknown to the model, another.weight"):
        open_encoder(folder, device="cpu")


@pytest.mark.parametrize("config", ["[]", "[" * 200_000, "\xff", '"vit"'])
def test_a_configuration_that_describes_no_model_is_a_plain_error(tmp_path, config):
    (tmp_path / "config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(ValueError, match=f"config.json of {tmp_path}"):
        open_encoder(tmp_path)


def test_a_folder_that_is_not_there_or_has_no_configuration_is_called_so(tmp_path):
    with pytest.raises(ValueError, match="There is no folder .*nowhere"):
        open_encoder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no config.json"):
        open_encoder(tmp_path)


def test_damaged_weights_are_a_plain_error(folders, tmp_path):
    folder = copied(folders["vit"], tmp_path / "damaged")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="The weights of .*damaged are damaged"):
        open_encoder(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth"])
def test_pickles_are_not_read(folders, tmp_path, name):
    folder = copied(folders["vit"], tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ValueError, match=f"pickles are not read; ldae weights convert .*{name} --output"):
        open_encoder(folder, device="cpu")


def test_a_folder_without_a_processor_needs_one(folders, pixels, tmp_path):
    folder = copied(folders["vit"], tmp_path / "bare")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match="preprocessor_config.json"):
        open_encoder(folder, device="cpu")
    found = open_encoder(folder, processor=folders["vit"], device="cpu")
    expected = open_encoder(folders["vit"], device="cpu")
    assert found.facts == expected.facts


def test_a_model_without_one_grid_of_patches_is_refused(folders, monkeypatch):
    with pytest.raises(ValueError, match="swin answers an image of 16x16 pixels with .* which is not 4x4 tokens"):
        open_encoder(folders["swin"], device="cpu")


@pytest.mark.parametrize("option", [{"timestep": 5}, {"noise": "frozen"}], ids=str)
def test_timesteps_and_noise_are_for_an_ldae_only(folders, option):
    open_encoder(folders["ldae"], device="cpu", **option)
    with pytest.raises(ValueError, match="vit is no l-DAE; only an l-DAE has a timestep and takes noise"):
        open_encoder(folders["vit"], device="cpu", **option)


def test_another_architecture_or_other_weights_have_another_fingerprint(folders, tmp_path):
    facts = [open_encoder(folders["vit"], device="cpu").facts["encoder"]]
    folder = copied(folders["vit"], tmp_path / "vit")
    assert open_encoder(folder, device="cpu").facts["encoder"] == facts[0]
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_attention_heads": 2', '"num_attention_heads": 4'))
    facts.append(open_encoder(folder, device="cpu").facts["encoder"])
    weights = load_file(folder / "model.safetensors")
    weights["vit.layernorm.bias"] += 1e-6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    facts.append(open_encoder(folder, device="cpu").facts["encoder"])
    assert len(set(facts)) == 3


# -- timm -------------------------------------------------------------------------------------------------------------


def with_timm(function):
    """What the function, given timm, returns in a fork, which alone knows timm and torchvision."""

    def run():
        sys.path.append(str(PEERS))
        if (
            torch.version.cuda is None
        ):  # torchvision's wheels are CUDA builds, and want two operators that are not there
            library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import timm

        return function(timm)

    if not (PEERS / "timm").is_dir():
        pytest.skip(f"timm is not in {PEERS}, the folder that LDAE_PEERS names")
    return Child(run).join()


def test_a_model_of_timm_gives_its_own_intermediate_layers(tmp_path):
    @torch.no_grad()
    def compare(timm):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=10).eval()
        save_file(model.state_dict(), tmp_path / "weights.safetensors")
        encoder = open_encoder(f"timm:test_vit@{tmp_path / 'weights.safetensors'}", device="cpu")
        pixels = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
        values = encoder.normalize_pixels(pixels)
        layers = model.get_intermediate_layers(values, n=[1, 5], norm=True, return_prefix_tokens=True)
        expected = [torch.cat([prefix, patches], dim=1) for patches, prefix in layers]
        for found, tokens in zip(encoder.tokens(pixels, None, [2, 6]), expected, strict=True):
            torch.testing.assert_close(found, tokens, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(expected[1], model.forward_features(values))
        assert (encoder.num_prefix_tokens, encoder.has_class_token, encoder.facts["library"]) == (1, True, "timm")
        smaller = open_encoder(f"timm:test_vit@{tmp_path / 'weights.safetensors'}", device="cpu", image_size=96)
        assert smaller.tokens(pixels[:, :, :96, :96], None, [6])[0].shape == (2, 37, 64)
        fresh = [smaller.untrained(seed).facts["encoder"] for seed in (0, 0, 1)]
        return fresh[0] == fresh[1] != fresh[2] and smaller.facts["encoder"] not in fresh

    assert with_timm(compare)


def test_an_ldae_exported_to_timm_gives_the_features_that_it_gives_itself(pixels, tmp_path):
    model, processor = tiny_model(tiny_processor()).ldae, tiny_processor()
    write_timm(tmp_path / "timm", model, processor)
    expected = PooledFeatures(open_encoder(model, processor=processor))(pixels, IDS)
    found = with_timm(lambda timm: PooledFeatures(open_encoder(tmp_path / "timm", device="cpu"))(pixels, IDS).numpy())
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)


def test_the_layout_of_moco_v3_is_known_by_its_prefixes_and_its_fixed_positions(tmp_path):
    fixed, learned = torch.zeros(1, 5, 8), torch.ones(1, 5, 8)
    layouts = {
        "module.base_encoder.": (fixed, True),
        "module.": (fixed, True),
        "": (fixed, False),  # MAE's, for example
        " module.": (learned, False),
    }
    for prefix, (positions, is_moco) in layouts.items():
        names = {"pos_embed": positions, "norm.weight": torch.ones(8), "head.0.weight": torch.ones(8)}
        weights = {f"{prefix.strip()}{name}": value for name, value in names.items()}
        if prefix == "module.base_encoder.":
            weights["module.momentum_encoder.norm.weight"] = torch.zeros(8)
        save_file(weights, tmp_path / "weights.safetensors")
        found, said = read_weights(tmp_path / "weights.safetensors", "head")
        assert (set(found), said) == ({"pos_embed", "norm.weight"}, is_moco) and found["norm.weight"].all()


@pytest.mark.slow
def test_checkpoints_of_moco_v3_lose_their_prefix_and_head_and_get_their_own_heads_and_normalisation(tmp_path):
    @torch.no_grad()
    def compare(timm):
        model = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12).eval()
        model.pos_embed[:, 0] = 0
        weights = model.state_dict()
        head = {"head.0.weight": torch.zeros(4, 384)}
        pretrained = {f"module.base_encoder.{name}": value for name, value in (weights | head).items()}
        pretrained |= {f"module.momentum_encoder.{name}": value + 1 for name, value in weights.items()}
        probed = {f"module.{name}": value for name, value in (weights | {"head.weight": torch.zeros(9, 384)}).items()}
        pixels = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
        for number, checkpoint in enumerate((pretrained, probed)):
            save_file({name: value.clone() for name, value in checkpoint.items()}, tmp_path / f"{number}.safetensors")
            encoder = open_encoder(f"timm:vit_small_patch16_224@{tmp_path / f'{number}.safetensors'}", device="cpu")
            assert encoder.mean == [0.485, 0.456, 0.406] and encoder.blocks[0].attn.num_heads == 12
            expected = model.forward_features(encoder.normalize_pixels(pixels))
            torch.testing.assert_close(encoder.tokens(pixels, None, [12])[0], expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(encoder.untrained(0).model.pos_embed, model.pos_embed)
        save_file(weights, tmp_path / "plain.safetensors")
        plain = open_encoder(f"timm:vit_small_patch16_224@{tmp_path / 'plain.safetensors'}", device="cpu")
        return plain.blocks[0].attn.num_heads, plain.mean

    assert with_timm(compare) == (6, [0.5, 0.5, 0.5])


def test_weights_that_are_not_those_of_the_timm_model_are_named(tmp_path):
    def messages(timm):
        weights, found = timm.create_model("test_vit", num_classes=0).state_dict(), []
        cases = {
            "fewer": {name: value for name, value in weights.items() if name != "blocks.1.mlp.fc1.bias"},
            "more": weights | {"blocks.9.mlp.fc1.bias": torch.zeros(3)},
            "other": weights | {"blocks.1.mlp.fc1.bias": torch.zeros(3)},
        }
        for name, tensors in cases.items():
            save_file(tensors, tmp_path / f"{name}.safetensors")
        (tmp_path / "pickle.pth").write_bytes(b"a pickle, perhaps")
        sources = [
            *(f"test_vit@{tmp_path / name}.safetensors" for name in cases),
            f"test_vit@{tmp_path / 'pickle.pth'}",
        ]
        for source in [*sources, "test_vit@nowhere.safetensors", "nonsense", "test_vit", "resnet18@x"]:
            try:
                open_encoder(f"timm:{source}", device="cpu")
            except ValueError as error:
                found.append(str(error))
        return found

    fewer, more, other, pickled, nowhere, nonsense, offline, resnet = with_timm(messages)
    assert fewer.endswith("is not the weights of this test_vit: it lacks blocks.1.mlp.fc1.bias.")
    assert more.endswith("it holds, unknown to the model, blocks.9.mlp.fc1.bias.")
    assert "size mismatch for blocks.1.mlp.fc1.bias" in other
    assert "is no safetensors file; ldae weights convert makes one" in pickled
    assert nowhere == "There is no file nowhere.safetensors with weights."
    assert nonsense.startswith("timm has no model 'nonsense'")
    assert offline.startswith("There is no model.safetensors for test_vit, and pickles are not read")
    assert "There is no file x" in resnet


def test_without_timm_a_model_of_it_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="timm:test_vit is a model of timm, which is not installed; pip install timm"):
        open_encoder("timm:test_vit")


# -- Floors and the whole line ----------------------------------------------------------------------------------------


def test_every_encoder_has_all_floors_and_those_that_are_random_come_from_the_seed(folders, train_source, pixels):
    encoder = open_encoder(folders["vit_mae"], device="cpu")
    first, again, other = (build_floors(FLOORS, encoder, train_source, latent_dim=6, seed=seed) for seed in (0, 0, 1))
    assert [floor.name for floor in first] == [
        "raw pixels",
        "PCA latents, K = 6",
        "untrained encoder",
        "random whitened patches",
    ]
    assert [floor.fingerprint for floor in first] == [floor.fingerprint for floor in again]
    same = [one.fingerprint == two.fingerprint for one, two in zip(first, other, strict=True)]
    assert same == [True, False, False, False]
    assert [tuple(floor(pixels, IDS).shape) for floor in first] == [(5, 768), (5, 16 * 6), (5, 32), (5, 32)]
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one(pixels, IDS), two(pixels, IDS))


def test_the_fitted_latents_are_the_projections_on_the_leading_directions_of_training_patches(folders, train_source):
    encoder = open_encoder(folders["vit"], device="cpu")
    [floor] = build_floors(["latents"], encoder, train_source, latent_dim=48)
    crops = torch.cat([batch["pixel_values"] for batch in centre_crops(train_source, SIZE, 40)])
    latents = floor(crops, torch.arange(80)).unflatten(1, (16, 48)).flatten(0, 1).double()
    covariance = torch.cov(latents.T)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3 * covariance.diag().max()  # uncorrelated
    assert (covariance.diag().diff() < 1e-6).all()  # by falling variance
    assert build_floors(["latents"], encoder, train_source)[0].latent_dim == 32


def test_an_untrained_encoder_keeps_what_training_does_not_change(folders):
    encoder = open_encoder(folders["vit_mae"], device="cpu")
    fresh = encoder.untrained(0)
    positions = [one.model.embeddings.position_embeddings for one in (encoder, fresh)]
    assert torch.equal(*positions)
    assert not torch.equal(encoder.model.layers[0].mlp.fc1.weight, fresh.model.layers[0].mlp.fc1.weight)


def test_encoders_in_one_call_are_evaluated_each_and_a_floor_that_they_share_once(
    folders, train_source, test_source, options, tmp_path
):
    calls = []

    def evaluate(train, test, device):
        calls.append(tuple(train))
        return nearest_mean(train, test, device)

    written = dict(ledger=tmp_path / "ledger.jsonl", output=tmp_path / "rows.json")
    sources = [folders["ldae"], folders["vit"], folders["dinov2"]]
    rows = evaluate_encoders(
        "means", evaluate, sources, train_source, test_dataset=test_source, **written, **options, layers=("last", 1)
    )
    assert read_ledger(written["ledger"]) == rows
    assert [row["name"] for row in rows] == [str(source) for source in sources]
    assert [row["protocol"]["features"]["library"] for row in rows] == ["ldae_hf", "transformers", "transformers"]
    assert rows[0]["protocol"]["features"]["layer"] == ["last", 1] and set(rows[0]["by_map"]) == {"last/mean", "1/mean"}
    # l-DAE's own latents; those of ViT and DINOv2 are the same, as are all raw pixels and random patches.
    assert calls.count(("last/mean", "1/mean")) == 3 and len(calls) == 3 + 2 + 2 + 3
    assert rows[1]["floors"]["raw pixels"] == rows[2]["floors"]["raw pixels"]
    assert [row["dim"] for row in rows] == [32, 32, 32] and rows[1]["floors"]["random whitened patches"]["dim"] == 32
    table = result_table(rows).splitlines()
    assert [line.split("  ")[0] for line in table[1:4]] == [str(source) for source in sources]
    assert sum(line.startswith("raw pixels") for line in table) == 1
    assert sum(line.startswith("untrained encoder (") for line in table) == 3
    assert table[0].split() == ["dim", "top-1"]


def test_cached_features_need_no_second_pass(folders, train_source, test_source, options, monkeypatch):
    arguments = ("means", nearest_mean, folders["vit"], train_source)
    [first] = evaluate_encoders(*arguments, test_dataset=test_source, **options)
    monkeypatch.setattr("ldae_hf.evaluation.features.centre_crops", None)
    [second] = evaluate_encoders(*arguments, test_dataset=test_source, **options)
    assert first["top1"] == second["top1"] and first["floors"] == second["floors"]


def test_encoders_of_different_sizes_get_their_own_crops_and_the_table_says_so(
    folders, train_source, test_source, options
):
    rows = []
    for size in (16, 24):
        rows += evaluate_encoders(
            "means",
            nearest_mean,
            folders["vit"],
            train_source,
            test_dataset=test_source,
            floors=["pixels"],
            image_size=size,
            **options,
        )
    assert [row["protocol"]["image_size"] for row in rows] == [16, 24]
    assert [row["floors"]["raw pixels"]["dim"] for row in rows] == [3 * 16**2, 3 * 24**2]
    table = [line.split() for line in result_table(rows).splitlines()]
    assert table[0] == ["px", "dim", "top-1"] and [line[-3] for line in table[1:]] == ["16", "24", "16", "24"]


def test_a_smaller_crop_is_the_centre_of_a_larger_one(train_source, folders, options):
    [cut] = [batch["pixel_values"] for batch in centre_crops(train_source, 16, 80, crop_share=0.8)]
    [whole] = [batch["pixel_values"] for batch in centre_crops(train_source, 20, 80)]
    assert torch.equal(cut, whole[:, :, 2:18, 2:18])
    with pytest.raises(ValueError, match="crop_share=1.5 must be above 0 and at most 1"):
        list(centre_crops(train_source, 16, 80, crop_share=1.5))
    [row] = evaluate_encoders(
        "means",
        nearest_mean,
        folders["vit"],
        train_source,
        test_dataset=train_source,
        crop_share=0.8,
        floors=(),
        **options,
    )
    assert row["protocol"]["preprocessing"].startswith("centre crop, 0.8 of its side, bicubic; mean [0.4, 0.5, 0.6]")


def test_the_recipe_beside_any_encoder_names_data_and_latents(
    folders, train_source, test_source, options, tmp_path, monkeypatch
):
    (tmp_path / "cifar10").mkdir()
    train_source.dataset.to_parquet(tmp_path / "cifar10" / "train-0.parquet")
    test_source.dataset.to_parquet(tmp_path / "cifar10" / "test-0.parquet")
    monkeypatch.setenv("LDAE_DATA", str(tmp_path))
    folder = copied(folders["vit_mae"], tmp_path / "mae")
    recipe = load_recipe("l_dae", "cpu")
    recipe.save(folder)
    (folder / "training.json").write_text('{"seed": 3}')
    [row] = evaluate_encoders("means", nearest_mean, folder, command="knn", command_options={"k": 5}, **options)
    assert (row["recipe"], row["tier"], row["training"]) == ("l_dae", "cpu", {"seed": 3})
    assert f"PCA latents, K = {min(48, recipe.model['latent_dim'])}" in row["floors"]
    assert row["rerun"].startswith(f"ldae knn {folder} --dataset cifar10 --train-split train --test-split test ")
    for words in ("--layer last", "--pool mean", "--floor untrained", "--image-size 16", "--seed 0", "--k 5"):
        assert words in row["rerun"]
    other = copied(folders["vit"], tmp_path / "other")
    load_recipe("l_dae", "desk_cpu").save(other)
    with pytest.raises(ValueError, match="the encoders' recipes name different data .cifar10 and imagenette128.; name"):
        evaluate_encoders("means", nearest_mean, [folder, other], **options)
    with pytest.raises(ValueError, match="no recipe.json beside the encoder names one"):
        evaluate_encoders("means", nearest_mean, folders["vit"], **options)
    with pytest.raises(ValueError, match="One processor cannot be that of several encoders"):
        evaluate_encoders("means", nearest_mean, [folder, other], processor=folder, **options)


def test_a_masked_autoencoder_is_evaluated_while_it_is_trained(folders, train_source, test_source):
    model = ViTMAEForPreTraining.from_pretrained(folders["vit_mae"]).eval()
    processor = LDAEImageProcessor(image_size=SIZE, patch_size=4, latent_dim=1)
    evaluation = online_evaluation(train_source, test_source, epochs=2, num_workers=0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found, again = (evaluation(model, processor) for _ in range(2))
    assert found == again and set(found) == {"probe_top1", "knn_top1"}
    assert torch.equal(torch.get_rng_state(), before) and model.config.mask_ratio == 0.75
