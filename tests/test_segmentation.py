import io
import json
import shlex

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import ExifTags, Image, ImageOps
from tiny_encoder import save_tiny_encoder
from typer.testing import CliRunner

from ldae_hf.cli import app
from ldae_hf.evaluation.dense import extract_tokens, run_segmentation, tokens_of
from ldae_hf.evaluation.encoders import open_encoder
from ldae_hf.evaluation.label_maps import BadImageError, label_map_loader, load_label_maps, read_mask
from ldae_hf.evaluation.ledger import read_ledger
from ldae_hf.evaluation.segmentation import (
    PatchClassifier,
    confusion_matrix,
    majority_scores,
    segmentation_probe,
    segmentation_scores,
    token_statistics,
)


SIZE = 32
COLOURS = np.array([[128, 128, 128], [200, 60, 60], [60, 60, 200]])  # of the ground and of two kinds of shapes


def scene(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A textured ground with a red disc and a blue rectangle, (H,W,3) uint8, and their classes (H,W) uint8: 0, 1, 2."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    classes = np.zeros((SIZE, SIZE), dtype=np.uint8)
    y, x, radius = *generator.uniform(6, SIZE - 6, 2), generator.uniform(5, 9)
    classes[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = 1
    top, left, height, width = *generator.integers(0, SIZE - 12, 2), *generator.integers(8, 13, 2)
    classes[top : top + height, left : left + width] = 2
    pixels = COLOURS[classes] + generator.normal(0, 25, (SIZE, SIZE, 1)) + generator.normal(0, 8, (SIZE, SIZE, 3))
    return pixels.clip(0, 255).astype(np.uint8), classes


def scenes(count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(seed)
    return [scene(generator) for _ in range(count)]


def as_png(pixels: np.ndarray, mode: str | None = None) -> dict:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    if mode == "P":
        image = Image.fromarray(pixels, "P")
        image.putpalette(range(255, -1, -1))
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def scene_dataset(pairs, **columns) -> Dataset:
    rows = {"image": [as_png(pixels) for pixels, _ in pairs], "annotation": [as_png(mask) for _, mask in pairs]}
    features = Features({"image": ImageFeature(), "annotation": ImageFeature()})
    for name, (values, feature) in columns.items():
        rows[name], features[name] = values, feature
    return Dataset.from_dict(rows, features=features)


# -- Reading ----------------------------------------------------------------------------------------------------------


def test_images_and_masks_are_cropped_alike():
    rows, columns = np.mgrid[:48, :80]
    mask = (rows // 16 * 5 + columns // 16).astype(np.uint8)
    pixels = np.repeat(mask[..., None] * 10, 3, axis=2)
    source = load_label_maps(scene_dataset([(pixels, mask)]))
    crop, classes = source.read(0, 24)  # the square from column 16 to 64, at half size
    assert crop.shape == (3, 24, 24) and crop.dtype == np.uint8 and classes.dtype == np.int16
    assert (classes == np.kron(mask[::16, 16:64:16], np.ones((8, 8)))).all()
    inside = np.s_[2:6, 2:6]  # away from the edges that the image's resampling blurs
    assert (crop[0][inside] == classes[inside] * 10).all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, -1]),
        (dict(ignore_index=0), [-1, 1, 2, 255]),
        (dict(reduce_labels=True), [-1, 0, 1, -1]),
        (dict(ignore_index=1, reduce_labels=True), [-1, -1, 1, 254]),
    ],
    ids=str,
)
def test_what_is_ignored_is_minus_one_and_reduced_labels_begin_at_the_number_one(options, expected):
    mask = np.repeat(np.array([0, 1, 2, 255], dtype=np.uint8), 4)[None].repeat(16, 0)
    source = load_label_maps(scene_dataset([(np.zeros((16, 16, 3), np.uint8), mask)]), **options)
    assert source.read(0, 4)[1][0].tolist() == expected


@pytest.mark.parametrize("kind", ["L", "P", "I;16", "array", "list"])
def test_a_mask_is_a_picture_of_class_numbers_or_an_array(kind):
    pixels, mask = scenes(1, 0)[0]
    if kind in ("array", "list"):
        feature = {"array": Array2D((SIZE, SIZE), "int64"), "list": None}[kind]
        data = Dataset.from_dict({"image": [as_png(pixels)]}, features=Features({"image": ImageFeature()}))
        data = data.add_column("mask", [mask.astype(int).tolist()])
        if feature:
            data = data.cast_column("mask", feature)
    else:
        stored = as_png(mask.astype(np.uint16)) if kind == "I;16" else as_png(mask, kind)
        features = Features({"image": ImageFeature(), "mask": ImageFeature()})
        data = Dataset.from_dict({"image": [as_png(pixels)], "mask": [stored]}, features=features)
    found, classes = load_label_maps(data).read(0, SIZE)
    assert (classes == mask).all() and (found == pixels.transpose(2, 0, 1)).all()


def test_the_column_of_masks_is_found_or_named():
    pairs, other = scenes(2, 0), scenes(2, 1)
    depth = ([as_png(mask) for _, mask in other], ImageFeature())
    assert load_label_maps(scene_dataset(pairs, depth=depth)).mask_column == "annotation"
    assert load_label_maps(scene_dataset(pairs, depth=depth), mask_column="depth").mask_column == "depth"
    unnamed = scene_dataset(pairs).rename_column("annotation", "regions")
    assert load_label_maps(unnamed).mask_column == "regions"  # the only other picture
    two = scene_dataset(pairs, depth=depth).rename_column("annotation", "regions")
    with pytest.raises(ValueError, match="cannot be told; it has image, regions, depth. Name one"):
        load_label_maps(two)
    with pytest.raises(ValueError, match="There is no column 'msk'"):
        load_label_maps(two, mask_column="msk")
    with pytest.raises(ValueError, match="is a stream"):
        load_label_maps(scene_dataset(pairs).to_iterable_dataset())


def test_rows_that_cannot_be_used_are_left_out_with_their_reasons():
    pairs = scenes(6, 0)
    data = scene_dataset(pairs)
    rows = data.cast_column("image", ImageFeature(decode=False)).cast_column("annotation", ImageFeature(decode=False))
    images, masks = list(rows["image"]), list(rows["annotation"])
    images[1] = {"bytes": b"broken", "path": None}
    masks[2] = {"bytes": masks[2]["bytes"][:60], "path": None}
    masks[3] = as_png(pairs[3][1][:-1])
    masks[4] = as_png(pairs[4][0])
    data = Dataset.from_dict({"image": images, "annotation": masks}, features=data.features)
    [batch] = label_map_loader(load_label_maps(data), SIZE, 10)
    assert batch["sample_ids"].tolist() == [0, 5]
    assert (batch["classes"][1].numpy() == pairs[5][1]).all()
    expected = [
        "row 1: ",
        "row 2: The mask ",
        "row 3: The mask has 32x31 pixels, its image 32x32",
        "row 4: The mask is a ",
    ]
    assert all(found.startswith(start) for found, start in zip(batch["bad"], expected, strict=True)), batch["bad"]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, "no mask"),
        ([[0, 1], [2]], "not all of one length"),
        ([[0.5, 1.0]], "not .height, width. of integers"),
        (np.zeros((2, 2, 2), int), "not .height, width. of integers"),
    ],
)
def test_a_mask_that_is_none_is_refused(mask, message):
    with pytest.raises(BadImageError, match=message):
        read_mask(mask)


TAG = ExifTags.Base.Orientation


def with_orientation(file: dict, orientation: int) -> dict:
    """A file with the same pixels as stored and a tag that says how to turn them."""
    turned, exif = io.BytesIO(), Image.Exif()
    exif[TAG] = orientation
    Image.open(io.BytesIO(file["bytes"])).save(turned, "PNG", exif=exif)
    return {"bytes": turned.getvalue(), "path": None}


def shown(file: dict) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file["bytes"]))))


def turned_scene(orientation: int, height: int = 20) -> tuple[dict, np.ndarray, np.ndarray]:
    """An image file with a tag, its mask as stored, and its mask as shown; a pixel is ten times its class."""
    mask = np.arange(height * 32, dtype=np.uint8).reshape(height, 32) % 23
    image = with_orientation(as_png(np.repeat(mask[..., None] * 10, 3, axis=2)), orientation)
    return image, mask, shown(image)[..., 0] // 10


def read_pair(image: dict, mask: dict | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    stored = mask if isinstance(mask, dict) else as_png(mask)
    features = Features({"image": ImageFeature(), "mask": ImageFeature()})
    source = load_label_maps(Dataset.from_dict({"image": [image], "mask": [stored]}, features=features))
    return source.read(0, 20)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_lies_on_a_turned_image_whether_it_was_drawn_on_the_stored_or_the_shown_one(orientation):
    image, as_stored, as_shown = turned_scene(orientation)
    assert as_stored.shape == as_shown.shape[::-1]
    for mask in (as_stored, as_shown, with_orientation(as_png(as_stored), orientation)):
        pixels, classes = read_pair(image, mask)
        assert (pixels[0] == classes * 10).all()


@pytest.mark.parametrize(("orientation", "height"), [(2, 20), (3, 20), (4, 20), (3, 32), (6, 32)])
def test_a_mask_that_may_belong_to_either_is_refused_unless_it_says_how_it_is_turned(orientation, height):
    image, as_stored, as_shown = turned_scene(orientation, height)
    for mask in (as_stored, as_shown):
        with pytest.raises(BadImageError, match=f"turned by its EXIF orientation {orientation}, and its mask, which"):
            read_pair(image, mask)
    pixels, classes = read_pair(image, with_orientation(as_png(as_stored), orientation))
    if height == 20:
        assert (pixels[0] == classes * 10).all()
    upright = with_orientation(as_png(as_shown), 1), with_orientation(image, 1)
    assert read_pair(upright[1], as_stored)[1].shape == (20, 20)  # an image that is not turned needs nothing said


def test_a_mask_of_another_size_than_the_stored_and_the_shown_image_is_refused():
    image, as_stored, _ = turned_scene(6)
    with pytest.raises(BadImageError, match="The mask has 32x19 pixels, its image 20x32 .as stored 32x20"):
        read_pair(image, as_stored[:-1])


def test_a_mask_of_instances_is_refused():
    mask = np.full((SIZE, SIZE), 5000, dtype=np.uint16)
    with pytest.raises(BadImageError, match="holds the class 5000"):
        load_label_maps(scene_dataset([(scenes(1, 0)[0][0], mask)])).read(0, SIZE)


# -- Scores -----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_their_definitions():
    generator = torch.Generator().manual_seed(0)
    targets, predicted = torch.randint(-1, 4, (6, 9, 9), generator=generator), torch.randint(0, 4, (6, 9, 9))
    targets[targets == 2] = 3  # a class that occurs only in the predictions; class 4 nowhere
    found = segmentation_scores(
        confusion_matrix(targets[:2], predicted[:2], 5) + confusion_matrix(targets[2:], predicted[2:], 5)
    )
    labelled, ious = targets >= 0, []
    for number in range(5):
        truth, guess = (targets == number)[labelled], (predicted == number)[labelled]
        union = (truth | guess).sum().item()
        ious.append(100 * (truth & guess).sum().item() / union if union else None)
    assert found["class_iou"] == pytest.approx(ious) and ious[2] == 0 and ious[4] is None
    assert found["mean_iou"] == pytest.approx(np.mean(ious[:4]))
    assert found["pixel_accuracy"] == pytest.approx(100 * (targets == predicted)[labelled].double().mean().item())


def test_the_majority_floor_takes_every_pixel_for_the_most_frequent_training_class():
    train, test = torch.tensor([[[1, 1], [0, -1]]]), torch.tensor([[[0, 1], [2, -1]]])
    found = majority_scores(train, test, 3)
    assert found["class_iou"] == pytest.approx([0, 100 / 3, 0])
    assert found["mean_iou"] == pytest.approx(100 / 9) and found["pixel_accuracy"] == pytest.approx(100 / 3)


# -- The probe --------------------------------------------------------------------------------------------------------


def maps_of(count: int, seed: int) -> torch.Tensor:
    return torch.stack([torch.from_numpy(mask).short() for _, mask in scenes(count, seed)])


def perfect_tokens(maps: torch.Tensor, patch: int) -> torch.Tensor:
    """(n,N,3): the class of each patch of maps that are constant in patches, as one of three unit vectors."""
    return torch.eye(3)[maps[:, ::patch, ::patch].long()].flatten(1, 2)


def probe(train, test, **options):
    return segmentation_probe(*train, *test, **dict(num_classes=3, epochs=12, progress=False) | options)


def test_perfect_features_segment_without_an_error():
    train, test = (maps_of(count, seed)[:, ::4, ::4] for count, seed in ((80, 0), (30, 1)))
    result = probe((perfect_tokens(train, 1), train), (perfect_tokens(test, 1), test), learning_rates=(0.1,))
    assert result["mean_iou"] == pytest.approx(100) and result["pixel_accuracy"] == pytest.approx(100)


def test_features_without_information_do_no_better_than_the_majority():
    generator = torch.Generator().manual_seed(0)
    train, test = maps_of(60, 0), maps_of(30, 1)
    noise = [torch.randn(len(maps), 64, 8, generator=generator) for maps in (train, test)]
    floor = majority_scores(train, test, 3)
    result = probe((noise[0], train), (noise[1], test), epochs=4)
    assert result["mean_iou"] == pytest.approx(floor["mean_iou"], abs=2)


def test_ignored_pixels_teach_nothing():
    train, test = maps_of(60, 0), maps_of(30, 1)
    tokens = [perfect_tokens(maps, 4) for maps in (train, test)]
    wrong, ignored = (train + 1) % 3, train.clone()
    wrong[:, :12], ignored[:, 12:] = train[:, :12], -1  # all but the upper rows
    options = dict(epochs=4, learning_rates=(0.1,))
    taught, spared = (probe((tokens[0], maps), (tokens[1], test), **options)["mean_iou"] for maps in (wrong, ignored))
    assert spared > 60 > 30 > taught


def test_the_learning_rate_is_selected_on_held_out_images_without_the_test_set():
    train, test = maps_of(60, 0), maps_of(30, 1)
    tokens = [perfect_tokens(maps, 4) + 0.5 * torch.randn(len(maps), 64, 3) for maps in (train, test)]
    options = dict(learning_rates=(1e-6, 3e-2), epochs=4)
    result = probe((tokens[0], train), (tokens[1], test), **options)
    misled = probe((tokens[0], train), (tokens[1], (test + 1) % 3), **options)
    assert result["learning_rate"] == misled["learning_rate"] == 3e-2
    assert result["learning_rates"] == misled["learning_rates"]
    assert result["mean_iou"] > misled["mean_iou"]


@pytest.mark.parametrize("size", [8, 20, 64])
def test_scores_of_patches_are_resized_bilinearly(size):
    classifier = PatchClassifier(torch.zeros(5), torch.ones(5), 3)
    torch.nn.init.normal_(classifier.linear.weight)
    tokens = torch.randn(2, 64, 5)
    scores = classifier.linear(tokens).transpose(1, 2).unflatten(2, (8, 8))
    expected = torch.nn.functional.interpolate(scores, size=(size, size), mode="bilinear", align_corners=False)
    torch.testing.assert_close(classifier(tokens, size), expected, rtol=1e-5, atol=1e-5)


def test_token_statistics_are_those_of_the_chosen_images():
    tokens = torch.randn(150, 9, 4) * torch.tensor([1, 10, 0.1, 5]) + 3
    chosen = torch.randperm(150)[:100]
    mean, std = token_statistics(tokens, chosen)
    torch.testing.assert_close(mean, tokens[chosen].flatten(0, 1).mean(0))
    torch.testing.assert_close(std, tokens[chosen].flatten(0, 1).std(0, unbiased=False), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(learning_rates=()), "positive learning rates"),
        (dict(epochs=0), "at least one epoch"),
        (dict(held_out=0.0), "at least one and at most half"),
        (dict(train_tokens=torch.zeros(20, 7, 3)), "N a square"),
        (dict(test_maps=torch.full((20, 8, 8), -1)), "No pixel of the test set is labelled"),
    ],
    ids=str,
)
def test_what_cannot_be_probed_is_refused(change, message):
    maps = torch.zeros(20, 8, 8, dtype=torch.int16)
    tokens = torch.zeros(20, 4, 3)
    arguments = dict(train_tokens=tokens, train_maps=maps, test_tokens=tokens, test_maps=maps, num_classes=3)
    with pytest.raises(ValueError, match=message):
        segmentation_probe(**arguments | change, progress=False)


# -- From encoders to results -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_tiny_encoder(tmp_path_factory.mktemp("tiny") / "encoder")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    DatasetDict(train=scene_dataset(scenes(80, 0)), validation=scene_dataset(scenes(30, 1))).save_to_disk(folder)
    return folder


def test_shapes_of_two_colours_are_segmented_far_better_than_by_the_majority(encoder, dataset, tmp_path):
    arguments = ["segment", str(encoder), "--dataset", str(dataset), "--test-split", "validation", "--epochs", "12"]
    arguments += ["--image-size", "32", "--num-workers", "0", "--learning-rate", "0.01", "--learning-rate", "0.1"]

    def segment(words: list[str], name: str) -> dict:
        files = ["--output", str(tmp_path / name), "--ledger", str(tmp_path / "ledger.jsonl")]
        result = CliRunner().invoke(app, [*words, *files], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert "mean IoU" in result.stdout and "majority class" in result.stdout
        return json.loads((tmp_path / name).read_text())

    row = segment(arguments, "first.json")
    floors = row["floors"]
    assert list(floors) == ["raw pixels", "PCA latents", "untrained encoder", "majority class"]
    majority = floors["majority class"]["mean_iou"]
    assert majority < 30 and row["mean_iou"] > majority + 25 and floors["raw pixels"]["mean_iou"] > majority + 25
    assert row["task"] == "segmentation_probe" and len(row["class_iou"]) == 3
    assert row["protocol"]["test"]["images"] == 30 and row["protocol"]["test"]["mask_column"] == "annotation"
    assert row["protocol"]["image_size"] == 32 and row["protocol"]["features"]["layer"] == "last"
    again = segment(shlex.split(row["rerun"])[1:], "again.json")
    speed = dict(seconds=0)
    assert again["rerun"] == row["rerun"] and again["protocol"] == row["protocol"]
    assert {**again["floors"]["raw pixels"], **speed} == {**floors["raw pixels"], **speed}
    assert [one["task"] for one in read_ledger(tmp_path / "ledger.jsonl")] == ["segmentation_probe"] * 2


def test_tokens_are_the_encoders_without_prefix_in_memory_or_in_a_file(encoder, dataset):
    opened, source = open_encoder(encoder), load_label_maps(dataset, "validation")
    arguments = dict(token_map=tokens_of(opened, 2), source=source, image_size=16, batch_size=7, num_workers=0)
    held, mapped = (extract_tokens(**arguments, memory=memory, progress=False) for memory in (4.0, 0.0))
    pixels = torch.stack([torch.from_numpy(source.read(index, 16)[0].copy()) for index in range(30)])
    expected = opened.tokens(pixels, torch.arange(30), [2])[0].half()
    torch.testing.assert_close(held[0], expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(held[0], mapped[0]) and torch.equal(held[1], mapped[1]) and held[2] == mapped[2] == []
    assert held[0].shape == (30, 16, 32) and held[1].shape == (30, 16, 16)


def test_a_set_without_a_usable_row_and_tokens_that_overflow_are_refused(encoder, dataset):
    source = load_label_maps(dataset, "validation", mask_column="image")
    with pytest.raises(ValueError, match="No row of .* can be used; the first: row 0: The mask is a picture of"):
        extract_tokens(tokens_of(open_encoder(encoder)), source, 16, num_workers=0, progress=False)
    source = load_label_maps(dataset, "validation")
    with pytest.raises(ValueError, match="not finite in float16"):
        extract_tokens(lambda x, ids: x.flatten(2).transpose(1, 2) * 1e5, source, 16, num_workers=0, progress=False)


def test_an_unknown_floor_is_refused_and_rows_left_out_are_counted(encoder, dataset):
    with pytest.raises(ValueError, match="There is no floor 'random_patches'"):
        run_segmentation(encoder, dataset, floors=["random_patches"])
    pairs = scenes(20, 0)
    pairs[3] = (pairs[3][0], pairs[3][1][:-1])
    data = {"train": scene_dataset(pairs), "test": scene_dataset(scenes(8, 1))}
    with pytest.warns(UserWarning, match="1 rows of .* left out; the first: row 3: The mask has 32x31 pixels"):
        [row] = run_segmentation(encoder, data, floors=(), epochs=1, num_workers=0, progress=False)
    assert row["protocol"]["train"]["images"] == 19 and row["protocol"]["train"]["bad_images"] == 1
    assert row["rerun"] is None  # a data set in memory has no name
