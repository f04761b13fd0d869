import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from ldae_hf.cli import app
from ldae_hf.evaluation.extractors import Extractor, load_extractor
from ldae_hf.evaluation.features import extract
from ldae_hf.evaluation.frechet import FeatureStatistics, frechet_distance
from ldae_hf.evaluation.inception import SIDE, Inception, resize_as_tensorflow_1
from ldae_hf.manifest import DamagedError, check_folder, write_folder
from ldae_hf.training.data import load_images
from ldae_hf.training.extractor import measure, train_extractor
from ldae_hf.training.perceptual import LabelFeatures, train_label_features


GOLDEN = json.loads((Path(__file__).parent / "golden" / "inception_features.json").read_text())
SIZE = 16


# ---- Inception


def formula_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Weights that follow from their names and shapes, and under which activations neither vanish nor explode."""
    weights = {}
    for name, shape in shapes.items():
        draw = np.random.RandomState(zlib.crc32(name.encode()))  # its stream will never change
        if len(shape) >= 2:
            values = draw.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5
        elif name.endswith(("running_var", "weight")):
            values = draw.uniform(0.8, 1.2, shape)
        else:
            values = 0.1 * draw.standard_normal(shape)
        weights[name] = torch.from_numpy(values.astype(np.float32))
    return weights


def noise_images(size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(size).randint(0, 256, (2, 3, size, size)).astype(np.uint8))


@pytest.fixture(scope="module")
def weights():
    """As many tensors, under the same names, as the published file has."""
    shapes = {name: tuple(value.shape) for name, value in Inception().state_dict().items() if value.ndim}
    return formula_weights(shapes | {"fc.weight": (1008, 2048), "fc.bias": (1008,)})


@pytest.fixture(scope="module")
def inception_file(weights, tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(weights, file)
    return file


@pytest.fixture(scope="module")
def inception(inception_file):
    return load_extractor(inception_file, "cpu")


@pytest.mark.parametrize("size", [32, 64, 299, 320])
def test_inception_gives_the_features_of_torch_fidelitys_network(inception, size):
    found = inception(noise_images(size), torch.arange(2))
    assert found.shape == (2, inception.dim) == (2, 2048) and found.dtype == torch.float32
    expected = torch.tensor(GOLDEN["features"][str(size)])
    assert (found[:, ::64] - expected).abs().max() < 1e-5 * expected.abs().max()


def test_an_image_is_resized_from_its_corner_and_not_from_its_centre():
    row = torch.tensor([[[[0.0, 10.0, 30.0]]]])
    assert resize_as_tensorflow_1(row, 6)[0, 0].tolist() == [pytest.approx([0, 5, 10, 20, 30, 30])] * 6
    assert resize_as_tensorflow_1(row.mT, 6)[0, 0, :, 0].tolist() == pytest.approx([0, 5, 10, 20, 30, 30])
    peak = torch.zeros(1, 1, 8, 8)
    peak[..., 1, 1] = 64.0  # antialiasing would spread it
    assert resize_as_tensorflow_1(peak, 4).count_nonzero() == 0
    same = torch.rand(1, 3, SIDE, SIDE)
    assert torch.equal(resize_as_tensorflow_1(same, SIDE), same)


def test_inception_is_named_by_its_tensors(inception, inception_file, weights, tmp_path):
    assert load_extractor(inception_file, "cpu").fingerprint == inception.fingerprint
    assert json.loads(inception.fingerprint) == inception.protocol
    assert len(inception.protocol["weights"]) == 64 and "299x299" in inception.protocol["resize"]
    name = "Mixed_7c.branch_pool.bn.bias"
    save_file(weights | {name: weights[name] + 1e-6}, tmp_path / "other.safetensors")
    assert load_extractor(tmp_path / "other.safetensors", "cpu").fingerprint != inception.fingerprint


def test_torchvisions_inception_is_refused(weights, tmp_path):
    file = tmp_path / "inception_v3_google.safetensors"
    save_file(weights | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, file)
    with pytest.raises(ValueError, match=r"'fc.weight' has the shape \(1000, 2048\), not \(1008, 2048\); download"):
        load_extractor(file)


def test_weights_that_are_not_there_are_explained(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*pytorch-fid/releases/download/fid_weights.*ldae weights convert"):
        load_extractor(tmp_path / "inception.safetensors")


@pytest.mark.parametrize("pixels", [torch.rand(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)])
def test_only_uint8_colour_images_have_features(inception, pixels):
    with pytest.raises(ValueError, match=r"Inception-v3 sees uint8 images \(B,3,H,W\)"):
        inception(pixels, torch.arange(2))


# ---- the classifier


def stripes(count: int, seed: int, size: int = SIZE) -> Dataset:
    """Stripes, horizontal or vertical by class, of random colour and phase."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count).tolist()
    images = []
    for label in labels:
        wave = 128 + 90 * np.sin(np.arange(size) * 1.3 + generator.uniform(0, 2 * math.pi))
        pixels = np.broadcast_to(wave[:, None] if label else wave[None], (size, size))
        pixels = pixels[..., None] * generator.uniform(0.5, 1, 3)
        images.append(Image.fromarray(pixels.astype(np.uint8)))
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    return Dataset.from_dict({"image": images, "label": labels}, features)


TINY = dict(image_size=SIZE, epochs=8, widths=(8, 12), num_workers=0, progress=False)


@pytest.fixture(scope="module")
def images():
    return {"train": stripes(512, seed=0), "test": stripes(64, seed=1)}


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "extractor"
    return folder, train_extractor(images, folder, **TINY)


def test_the_classifier_learns_and_its_folder_says_how(trained):
    folder, facts = trained
    check_folder(folder, ("label_features.safetensors", "label_features.json", "training.json"))
    assert json.loads((folder / "training.json").read_text()) == facts
    assert facts["test_top1"] > 90 and facts["train_top1"] > 60 and facts["test_images"] == 64
    assert (facts["epochs"], facts["image_size"], facts["widths"], facts["seed"]) == (8, SIZE, [8, 12], 0)
    assert {"command", "commit", "machine", "versions", "time", "seconds"} <= facts.keys()
    assert [path.name for path in folder.parent.iterdir()] == ["extractor"]


def test_the_test_split_is_measured_on_centre_crops_with_the_saved_weights(trained, images):
    network = LabelFeatures.load(trained[0])
    pixels = np.stack([np.asarray(image) for image in images["test"]["image"]]).transpose(0, 3, 1, 2)
    predicted = network.logits(torch.from_numpy(pixels).float() / 127.5 - 1).argmax(dim=1)
    correct = (predicted == torch.tensor(images["test"]["label"])).sum().item()
    assert trained[1]["test_top1"] == pytest.approx(100 * correct / 64)


def test_an_unreadable_image_does_not_count(trained, images):
    rows = images["test"].cast_column("image", ImageFeature(decode=False))[:]
    rows["image"][5]["bytes"] = b"no image"
    source = load_images(Dataset.from_dict(rows, images["test"].features))
    network = LabelFeatures.load(trained[0])
    kept = images["test"].select([index for index in range(64) if index != 5])
    expected = measure(network, load_images(kept), SIZE, progress=False)
    assert measure(network, source, SIZE, progress=False) == expected and expected["test_images"] == 63


def test_a_finished_folder_is_not_trained_again(trained, images, capsys):
    folder, facts = trained
    before = (folder / "label_features.safetensors").stat().st_mtime_ns
    assert train_extractor(images, folder, **TINY) == facts
    assert "finished and is not trained again" in capsys.readouterr().out
    assert (folder / "label_features.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds an extractor with epochs=8, not 4; choose another"):
        train_extractor(images, folder, **TINY | {"epochs": 4})


def test_a_folder_of_something_else_is_left_as_it_is(images, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else than an extractor"):
        train_extractor(images, tmp_path, **TINY)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_same_seed_gives_the_same_extractor_and_another_one_another(images, tmp_path):
    short = TINY | {"epochs": 1}
    for name, seed in (("first", 3), ("second", 3), ("third", 4)):
        assert train_extractor(images, tmp_path / name, **short, seed=seed)["seed"] == seed
    found = {name: load_extractor(tmp_path / name, "cpu").protocol["weights"] for name in ("first", "second", "third")}
    assert found["first"] == found["second"] != found["third"]


def test_images_without_labels_or_split_are_refused_before_any_training(images, tmp_path):
    unlabelled = {"train": images["train"].remove_columns("label"), "test": images["test"]}
    with pytest.raises(ValueError, match="training split of the data set has no labels.*--label-column"):
        train_extractor(unlabelled, tmp_path / "a", **TINY)
    with pytest.raises(ValueError, match="no split 'validation'; it has train, test"):
        train_extractor(images, tmp_path / "a", **TINY, test_split="validation")
    with pytest.raises(ValueError, match="16 pixels cannot be halved between 6 stages"):
        train_extractor(images, tmp_path / "a", **TINY | {"widths": (4,) * 6})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("label", "message"), [(7, "the label 7, not one of 2 classes"), (-1, "no label")])
def test_a_test_split_with_hidden_or_other_labels_is_refused_before_any_training(images, tmp_path, label, message):
    wrong = {"train": images["train"], "test": images["test"].map(lambda row: {"label": label})}
    with pytest.raises(ValueError, match=f"Sample 0 has {message}"):
        train_extractor(wrong, tmp_path / "a", **TINY | {"epochs": 1})
    assert not list(tmp_path.iterdir())


def test_features_of_the_classifier_are_the_mean_of_its_last_stage(trained, images):
    extractor = load_extractor(trained[0], "cpu")
    pixels = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network = LabelFeatures.load(trained[0])
    features = extractor(pixels, torch.arange(3))
    torch.testing.assert_close(features, network.taps(pixels.float() / 127.5 - 1)[-1].mean(dim=(2, 3)))
    torch.testing.assert_close(network.head(features), network.logits(pixels.float() / 127.5 - 1))
    assert extractor.dim == 12 and extractor.protocol["training"]["test_top1"] == trained[1]["test_top1"]
    # Images of other sizes come to the classifier's own.
    twice = pixels.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert extractor(twice, torch.arange(3)).shape == (3, 12)
    assert (extractor(twice, torch.arange(3)) - features).abs().max() < 0.5 * features.abs().max()


def test_a_classifier_that_was_damaged_or_trained_for_something_else_is_refused(trained, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in trained[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = bytearray((folder / "label_features.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "label_features.safetensors").write_bytes(weights)
    with pytest.raises(DamagedError, match="label_features.safetensors is missing or damaged"):
        load_extractor(folder)
    write_folder(tmp_path / "perceptual", LabelFeatures(2, (4,)).save)
    with pytest.raises(DamagedError, match="training.json is missing"):
        load_extractor(tmp_path / "perceptual")

    def of_a_tokenizer(path):
        LabelFeatures(2, (4,)).save(path)
        (path / "training.json").write_text('{"perceptual_loss": "labels"}')

    write_folder(tmp_path / "perceptual", of_a_tokenizer)
    with pytest.raises(ValueError, match="training.json has no dataset: it is not of `ldae extractor train`"):
        load_extractor(tmp_path / "perceptual")


def test_what_is_no_extractor_is_told_both_ways_to_get_one(tmp_path):
    with pytest.raises(ValueError, match="is no extractor.*ldae weights convert.*ldae extractor train --dataset"):
        load_extractor(tmp_path)


class MeanColour:
    name, dim = "mean colour", 3
    protocol = {"network": "none: the mean of each colour channel, in 0 ... 255"}
    fingerprint = json.dumps(protocol)

    def __call__(self, pixels, sample_ids):
        return pixels.float().mean(dim=(2, 3))


def test_any_object_of_the_protocol_is_an_extractor(images):
    extractor: Extractor = load_extractor(MeanColour())
    extracted = [
        extract([extractor], load_images(images, split), SIZE, num_workers=0, cache_dir=None, progress=False)[0]
        for split in ("train", "test")
    ]
    first, second = (
        FeatureStatistics(extractor.fingerprint, extractor.dim).update(each.features) for each in extracted
    )
    assert 0 < frechet_distance(first, second) < 50


def test_the_command_trains_and_says_how_good_it_is(images, tmp_path):
    data, folder = tmp_path / "data", tmp_path / "extractor"
    for split, rows in images.items():
        rows.to_parquet(data / f"{split}-00000-of-00001.parquet")
    arguments = ["--dataset", str(data), "--output-dir", str(folder), "--image-size", "16", "--epochs", "1"]
    arguments = ["extractor", "train", *arguments, "--widths", "4,6", "--num-workers", "0"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads((folder / "training.json").read_text())
    assert f"test top-1 {facts['test_top1']:.2f} %" in result.stdout
    assert facts["dataset"] == str(data) and facts["widths"] == [4, 6]
    assert "not trained again" in CliRunner().invoke(app, arguments).stdout
    wrong = CliRunner().invoke(app, [*arguments[:-4], "--widths", "4,x"])
    assert wrong.exit_code == 2 and "'4,x' must be whole numbers" in wrong.stderr


def test_label_features_of_given_widths_are_trained(images):
    batches = [{"pixel_values": noise_images(8), "labels": torch.tensor([0, 1]), "sample_ids": torch.arange(2)}]
    network, _ = train_label_features(lambda epoch: batches, 2, widths=(4,), epochs=1, progress=False)
    assert network.widths == (4,)
