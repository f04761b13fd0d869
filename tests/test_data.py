"""Data: any source, the same samples on any layout, and nothing lost to a bad image."""

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ldae_hf import LDAEImageProcessor
from ldae_hf.training.data import crop_loader, eval_loader, load_images, train_loader
from ldae_hf.training.sampling import Corruption, Crop, epoch_order, random_generator, random_resized_box


NUM_IMAGES = 22
SETTINGS = dict(image_size=16, num_timesteps=1000, tokens_shape=(4, 6), crop="random_resized", flip=True, seed=3)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    connect = socket.socket.connect

    def local_only(self, address):
        # The workers of a data loader speak through sockets of the file system.
        assert self.family == socket.AF_UNIX, f"a local source asked the network: {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


def picture(number: int) -> Image.Image:
    """A smooth image of its own, taller or wider than it is wide or tall."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return small.resize((40 + number % 3 * 8, 48), Image.Resampling.BICUBIC)


def encoded(number: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    picture(number).save(stream, kind)
    return stream.getvalue()


def dataset_of(contents: list[bytes | None], **columns) -> datasets.Dataset:
    """A data set as Parquet files on the Hub hold it; None stands for a row without an image."""
    rows = [None if content is None else {"bytes": content, "path": None} for content in contents]
    features = datasets.Features({"image": datasets.Image()} | {name: value[0] for name, value in columns.items()})
    return datasets.Dataset.from_dict({"image": rows} | {name: value[1] for name, value in columns.items()}, features)


@pytest.fixture(scope="session")
def images() -> datasets.Dataset:
    classes = datasets.ClassLabel(names=["cat", "dog", "emu"])
    return dataset_of([encoded(i) for i in range(NUM_IMAGES)], label=(classes, [i % 3 for i in range(NUM_IMAGES)]))


@pytest.fixture(scope="session")
def source(images):
    return load_images(images)


@pytest.fixture(scope="session")
def parquet(images, tmp_path_factory):
    """A folder of four Parquet files."""
    folder = tmp_path_factory.mktemp("parquet")
    for shard in range(4):
        images.shard(4, shard, contiguous=True).to_parquet(folder / f"train-{shard:05d}-of-00004.parquet")
    images.select(range(3)).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def batches(source, *, global_batch=8, micro_batch=8, steps=5, **arguments) -> list[dict]:
    settings = SETTINGS | arguments
    return list(
        train_loader(source, global_batch_size=global_batch, micro_batch_size=micro_batch, num_steps=steps, **settings)
    )


def together(parts: list[dict]) -> dict:
    """Batches put behind one another."""
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "bad_images"}
    return tensors | {"bad_images": [bad for part in parts for bad in part["bad_images"]]}


def assert_same(one: dict, other: dict):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


# ---- order, crop, timestep, noise


@pytest.mark.parametrize("workers, processes, micro_batch", [(2, 1, 8), (0, 2, 4), (0, 1, 2), (2, 2, 2), (0, 4, 1)])
def test_a_global_step_holds_the_same_samples_on_any_layout(source, workers, processes, micro_batch):
    accumulation = 8 // (processes * micro_batch)
    ranks = [
        batches(source, micro_batch=micro_batch, rank=rank, world_size=processes, num_workers=workers)
        for rank in range(processes)
    ]
    for step, expected in enumerate(batches(source)):
        own = slice(step * accumulation, (step + 1) * accumulation)
        assert_same(together([batch for rank in ranks for batch in rank[own]]), expected)


def test_a_batch_holds_uint8_pixels_and_what_the_model_needs(source):
    (batch,) = batches(source, steps=1)
    facts = {name: (value.dtype, tuple(value.shape)) for name, value in batch.items() if name != "bad_images"}
    assert facts == {
        "pixel_values": (torch.uint8, (8, 3, 16, 16)),
        "labels": (torch.int64, (8,)),
        "sample_ids": (torch.int64, (8,)),
        "timesteps": (torch.int64, (8,)),
        "noise": (torch.float32, (8, 4, 6)),
    }
    assert batch["bad_images"] == []
    assert batch["labels"].tolist() == [i % 3 for i in batch["sample_ids"].tolist()]


@pytest.mark.parametrize("start, workers", [(1, 0), (2, 2), (4, 0)])
def test_a_run_that_begins_at_a_later_step_goes_on_as_if_unbroken(source, start, workers):
    whole = batches(source, micro_batch=4)
    rest = batches(source, micro_batch=4, start_step=start, num_workers=workers)
    for one, other in zip(whole[2 * start :], rest, strict=True):
        assert_same(one, other)


def test_an_epoch_shows_no_image_twice_and_leaves_out_only_the_remainder(source):
    epochs = together(batches(source, global_batch=5, micro_batch=5, steps=8))["sample_ids"].reshape(2, 20).tolist()
    assert all(len(set(epoch)) == 20 and set(epoch) <= set(range(NUM_IMAGES)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_order_crop_timestep_and_noise_change_with_epoch_and_seed():
    image = picture(0)
    crop, corruption = Crop(16, "random_resized", seed=3), Corruption(1000, (4, 6), seed=3)
    other_crop, other_corruption = Crop(16, "random_resized", seed=4), Corruption(1000, (4, 6), seed=4)
    assert not np.array_equal(epoch_order(3, 0, 50), epoch_order(3, 1, 50))
    assert not np.array_equal(epoch_order(3, 0, 50), epoch_order(4, 0, 50))
    for make in (lambda maker, *key: maker[0](image, *key), lambda maker, *key: maker[1](*key)[1]):
        here = make((crop, corruption), 2, 7)
        assert np.array_equal(here, make((crop, corruption), 2, 7))
        assert not np.array_equal(here, make((crop, corruption), 3, 7))
        assert not np.array_equal(here, make((crop, corruption), 2, 8))
        assert not np.array_equal(here, make((other_crop, other_corruption), 2, 7))


def test_the_timesteps_of_tokens_are_a_function_of_seed_epoch_and_sample_and_move_nothing_else():
    of_image, of_tokens = Corruption(1000, (4, 6), 3), Corruption(1000, (4, 6), 3, 1)
    (timestep, noise), (timesteps, same_noise) = of_image(2, 7), of_tokens(2, 7)
    assert timestep == random_generator(3, "timestep", 2, 7).integers(1000)
    assert timesteps.shape == (4,) and len(set(timesteps.tolist())) > 1
    assert np.array_equal(noise, same_noise) and np.array_equal(timesteps, of_tokens(2, 7)[0])
    for other in (of_tokens(3, 7), of_tokens(2, 8), Corruption(1000, (4, 6), 4, 1)(2, 7)):
        assert not np.array_equal(timesteps, other[0])
    drawn = np.stack([Corruption(10, (16, 8), 1, 1)(0, sample)[0] for sample in range(500)])
    counts = np.bincount(drawn.flatten(), minlength=10)
    assert len(counts) == 10 and counts.min() > 700 and counts.max() < 900


def test_no_two_purposes_epochs_or_samples_share_random_numbers():
    keys = [(s, p, e, i) for s in (0, 1) for p in ("crop", "timestep", "noise") for e in (0, 1) for i in (0, 1, 2**40)]
    draws = {random_generator(*key).integers(2**63) for key in keys}
    assert len(draws) == len(keys)


def test_timesteps_are_uniform_and_noise_is_standard_normal():
    drawn = [Corruption(10, (16, 8), seed=1)(epoch, sample) for epoch in range(4) for sample in range(500)]
    counts = np.bincount([timestep for timestep, _ in drawn], minlength=10)
    assert len(counts) == 10 and counts.min() > 150 and counts.max() < 250
    noise = np.stack([noise for _, noise in drawn])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01 and abs((noise**4).mean() - 3) < 0.1


@pytest.mark.parametrize("size", [(500, 375), (40, 61), (1, 1), (3000, 20), (7, 4000)])
def test_random_boxes_lie_in_the_image_and_keep_area_and_ratio(size):
    width, height = size
    rng = random_generator(0, "crop")
    for left, upper, right, lower in (random_resized_box(width, height, (0.3, 0.9), rng) for _ in range(300)):
        assert 0 <= left < right <= width and 0 <= upper < lower <= height
        if size in [(500, 375), (40, 61)]:
            assert 0.27 < (right - left) * (lower - upper) / (width * height) < 0.93
            assert 0.7 < (right - left) / (lower - upper) < 1.42


def test_switching_flips_on_mirrors_about_half_of_the_crops_and_moves_none():
    image, mirrored = picture(1), 0
    plain, flipped = (Crop(16, "random_resized", flip=flip) for flip in (False, True))
    for sample in range(100):
        one, other = plain(image, 0, sample), flipped(image, 0, sample)
        mirrored += np.array_equal(one[:, :, ::-1], other)
        assert np.array_equal(one, other) or np.array_equal(one[:, :, ::-1], other)
    assert 30 < mirrored < 70


def test_the_centre_crop_is_the_processors_bit_for_bit(source):
    processor = LDAEImageProcessor(image_size=16, patch_size=8, latent_dim=6)
    batch = next(iter(eval_loader(source, 16, 5)))
    expected = processor([picture(i) for i in range(5)], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor.normalize_pixels(batch["pixel_values"]), expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(global_batch=23, micro_batch=23), "has 22 images, fewer than the global batch of 23"),
        (dict(micro_batch=3), "8 images cannot be split into batches of 3 on 1 process"),
        (dict(micro_batch=4, world_size=4), "divides 2"),
        (dict(crop="center"), "'centre' or 'random_resized'"),
        (dict(crop_scale=(0.0, 1.0)), "smallest <= largest"),
        (dict(image_size=0), "at least 1 pixel"),
        (dict(seed=-1), "seed is -1"),
    ],
)
def test_a_wrong_setting_is_an_error_that_says_what_is_wrong(source, arguments, message):
    with pytest.raises(ValueError, match=message):
        batches(source, **arguments)


# ---- bad images


def bad_contents() -> dict[str, tuple[bytes | None, str]]:
    """What can be wrong with an image, and a word of the reason."""
    bomb = io.BytesIO()
    Image.new("1", (3000, 3000)).save(bomb, "PNG")
    return {
        "missing": (None, "no image"),
        "empty": (b"", "empty"),
        "unreadable": (b"<html>404 Not Found</html>", "unreadable"),
        "truncated": (encoded(0, "JPEG")[:-200], "truncated"),
        "oversized": (bomb.getvalue(), "3000x3000 is more than 1000000"),
    }


@pytest.mark.parametrize("kind", bad_contents())
def test_a_bad_image_is_replaced_by_the_next_one_every_time_and_listed_with_its_reason(images, source, kind):
    bad, reason = bad_contents()[kind]
    contents = [row["bytes"] for row in images.cast_column("image", datasets.Image(decode=False))["image"]]
    # Two in a row, and the last one, whose neighbour is the first.
    for index in (4, 5, NUM_IMAGES - 1):
        contents[index] = bad
    broken = load_images(dataset_of(contents, label=(images.features["label"], images["label"])), max_pixels=1_000_000)
    seen, clean = (together(batches(each, global_batch=22, micro_batch=22, steps=2)) for each in (broken, source))
    assert_same(seen, together(batches(broken, global_batch=22, micro_batch=11, steps=2, num_workers=2)))
    for name in ("sample_ids", "timesteps", "noise"):
        assert torch.equal(seen[name], clean[name])
    replaced_by = {4: 6, 5: 6, NUM_IMAGES - 1: 0}
    for place, sample in enumerate(seen["sample_ids"].tolist()):
        used = replaced_by.get(sample, sample)
        assert seen["labels"][place] == used % 3
        expected = Crop(16, "random_resized", flip=True, seed=3)(picture(used), place // 22, sample)
        assert np.array_equal(seen["pixel_values"][place], expected)
    assert {row["index"] for row in seen["bad_images"]} == replaced_by.keys()
    assert all(reason in row["reason"] for row in seen["bad_images"])
    assert json.loads(json.dumps(seen["bad_images"])) == seen["bad_images"]


def test_a_file_that_is_gone_is_a_bad_image_named_by_its_path(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    source = load_images(tmp_path)
    (tmp_path / "2.png").unlink()
    (batch,) = eval_loader(source, 16, 4)
    assert batch["bad_images"] == [
        {"index": 2, "path": str(tmp_path / "2.png"), "reason": "The file cannot be opened: No such file or directory."}
    ]
    assert torch.equal(batch["pixel_values"][2], batch["pixel_values"][3])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_without_a_readable_image_is_an_error_and_no_endless_search(streaming):
    with pytest.raises(ValueError, match="images in a row of the data set.* cannot be read.*empty"):
        batches(load_images(dataset_of([b""] * 9), streaming=streaming))


# ---- sources


def write_imagefolder(folder):
    for i in range(NUM_IMAGES):
        file = folder / "train" / ("cat", "dog", "emu")[i % 3] / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(i))
    return dict(source=folder)


def write_webdataset(folder):
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(shard, NUM_IMAGES, 2):
                for extension, content in (("png", encoded(i)), ("cls", str(i % 3).encode())):
                    member = tarfile.TarInfo(f"{i:03d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return dict(source="webdataset", data_files={"train": [str(folder / "0.tar"), str(folder / "1.tar")]})


def save_to_disk(folder, images):
    datasets.DatasetDict(train=images).save_to_disk(folder)
    return dict(source=folder)


SOURCES = {
    "imagefolder": lambda folder, images, parquet: write_imagefolder(folder),
    "imagefolder by name": lambda folder, images, parquet: dict(
        source="imagefolder", data_dir=str(write_imagefolder(folder)["source"])
    ),
    "parquet folder": lambda folder, images, parquet: dict(source=parquet),
    "parquet pattern": lambda folder, images, parquet: dict(source=f"{parquet}/train-*.parquet"),
    "parquet files": lambda folder, images, parquet: dict(source=sorted(parquet.glob("train-*.parquet"))),
    "webdataset": lambda folder, images, parquet: write_webdataset(folder),
    "saved to disk": lambda folder, images, parquet: save_to_disk(folder, images),
    "by split": lambda folder, images, parquet: dict(source=datasets.DatasetDict(train=images)),
    "loaded": lambda folder, images, parquet: dict(source=images),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_images_without_a_network(images, source, parquet, tmp_path, kind, streaming):
    other = load_images(streaming=streaming, **SOURCES[kind](tmp_path, images, parquet))
    one, other = (together(list(eval_loader(each, 16, 5))) for each in (source, other))
    assert other["bad_images"] == [] and other["sample_ids"].tolist() == list(range(NUM_IMAGES))

    def content(batch):
        pixels = [image.tobytes() for image in batch["pixel_values"].numpy()]
        return sorted(zip(batch["labels"].tolist(), pixels, strict=True))

    assert content(one) == content(other)


def test_names_of_classes_and_the_number_of_images_are_known(source, parquet):
    assert source.label_names == ["cat", "dog", "emu"] and len(source) == NUM_IMAGES and not source.streaming
    stream = load_images(parquet, streaming=True, num_images=NUM_IMAGES)
    assert stream.label_names == ["cat", "dog", "emu"] and len(stream) == NUM_IMAGES and stream.streaming


def test_a_name_is_looked_for_in_the_folder_of_data_sets_and_a_split_may_be_a_slice(parquet, monkeypatch):
    monkeypatch.setenv("LDAE_DATA", str(parquet.parent))
    assert len(load_images(parquet.name, "test")) == 3
    assert len(load_images(parquet.name, "train[:7]+test")) == 10


def test_a_name_that_is_not_in_the_folder_of_data_sets_is_one_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("LDAE_DATA", str(tmp_path))
    with pytest.raises(ConnectionError, match="Couldn't reach 'someone/pictures' on the Hub"):
        load_images("someone/pictures")


@pytest.mark.parametrize("image", ["image", "jpg", "jpeg", "png", "img", "webp", "photo"])
@pytest.mark.parametrize("label", ["label", "labels", "cls", "fine_label", None])
def test_columns_are_found_by_their_names(images, image, label):
    columns = {"json": ["{}"] * NUM_IMAGES, image: images["image"]} | ({label: images["label"]} if label else {})
    source = load_images(datasets.Dataset.from_dict(columns))
    assert (source.image_column, source.label_column) == (image, label)
    (batch,) = eval_loader(source, 16, NUM_IMAGES)
    assert batch["labels"].tolist() == [i % 3 if label else -1 for i in range(NUM_IMAGES)]


def test_named_columns_win_and_plain_bytes_are_images(images):
    thumbs = [encoded(i + 100) for i in range(NUM_IMAGES)]
    source = load_images(
        images.add_column("thumb", thumbs).add_column("coarse", [7] * NUM_IMAGES),
        image_column="thumb",
        label_column="coarse",
    )
    image, label = source.read(source.dataset[5])
    assert label == 7 and np.array_equal(image, picture(105)) and source.label_names is None


def test_words_are_not_taken_for_labels(images):
    assert load_images(images.remove_columns("label").add_column("label", ["cat"] * NUM_IMAGES)).label_column is None


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda i, p: load_images(i, image_column="foto"),
            "no column 'foto': the data set has the columns image, label",
        ),
        (lambda i, p: load_images(i, label_column="class"), "no column 'class'"),
        (lambda i, p: load_images(i.select_columns("label")), "No column is named as images are"),
        (lambda i, p: load_images(i, image_column="label"), "'label' of the data set holds no images but ClassLabel"),
        (
            lambda i, p: load_images(i.add_column("word", ["a"] * NUM_IMAGES), label_column="word"),
            "'word' of the data set holds .*string.*, not integers",
        ),
        (lambda i, p: load_images(p, "val"), "has no split 'val'; it has train, test"),
        (lambda i, p: load_images(datasets.DatasetDict(a=i, b=i)), "has no split 'train'; it has a, b"),
        (lambda i, p: load_images(datasets.DatasetDict(a=i), "a[:3]"), "the split must be whole"),
        (lambda i, p: load_images(p / "nothing"), "There is no file or folder .*nothing"),
        (lambda i, p: load_images("./nothing/train"), "There is no file or folder"),
        (lambda i, p: load_images(p / "no-*.parquet"), "There is no file .*no-"),
        (
            lambda i, p: load_images([p / "train-00000-of-00004.parquet", p / "b.parquet"]),
            "There is no file .*b.parquet",
        ),
        (lambda i, p: load_images(__file__), "must be files of one kind"),
        (lambda i, p: load_images(i.select([])), "has no images in its split 'train'"),
        (lambda i, p: load_images(i, num_images=3), "is no stream and has 22 images"),
        (lambda i, p: len(load_images(i, streaming=True)), "does not say how many images"),
        (
            lambda i, p: load_images(datasets.IterableDataset.from_generator(lambda: iter([{"image": None}]))),
            "stream of unknown columns",
        ),
    ],
)
def test_a_source_that_cannot_be_used_is_an_error_that_says_what_there_is(images, parquet, make, message):
    with pytest.raises(ValueError, match=message):
        make(images, parquet)


# ---- streams


@pytest.fixture(scope="session")
def stream(parquet):
    return load_images(parquet, streaming=True)


def picture_numbers(batch: dict) -> list[int]:
    """Which pictures a batch of centre crops holds."""
    known = {Crop(16)(picture(i), 0, 0).tobytes(): i for i in range(NUM_IMAGES)}
    return [known[pixels.tobytes()] for pixels in batch["pixel_values"].numpy()]


@pytest.mark.parametrize("processes, workers", [(1, 1), (1, 2), (2, 2), (3, 2)])
def test_processes_and_workers_share_a_stream_without_overlap(stream, processes, workers):
    seen = [
        together(list(islice(loader, 64)))
        for loader in (
            stream_loader(stream, 1, rank=rank, world_size=processes, num_workers=workers, crop="centre", flip=False)
            for rank in range(processes)
        )
    ]
    shares = [set(picture_numbers(part)) for part in seen]
    assert sorted(number for share in shares for number in share) == list(range(NUM_IMAGES))
    ids = [number for part in seen for number in part["sample_ids"].tolist()]
    assert len(set(ids)) == len(ids)


def stream_loader(source, batch=4, steps=100, **arguments):
    settings = SETTINGS | dict(shuffle_buffer=5) | arguments
    world_size = settings.get("world_size", 1)
    return train_loader(
        source, global_batch_size=batch * world_size, micro_batch_size=batch, num_steps=steps, **settings
    )


def test_a_stream_is_shuffled_anew_in_every_epoch_and_shows_each_image_once(stream):
    loader = stream_loader(stream, 22, 3, crop="centre", flip=False)
    epochs = [picture_numbers(batch) for batch in loader]
    assert all(sorted(epoch) == list(range(NUM_IMAGES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(NUM_IMAGES)]}) == 4


@pytest.mark.parametrize("workers, processes", [(1, 1), (2, 2), (1, 3)])
def test_a_stream_resumed_from_its_saved_state_goes_on_as_if_unbroken(stream, workers, processes):
    layout = dict(num_workers=workers, rank=processes - 1, world_size=processes)
    loader, states = stream_loader(stream, 3, 17, **layout), []
    states.append(json.dumps(loader.state_dict()))
    whole = []
    for batch in loader:
        whole.append(batch)
        states.append(json.dumps(loader.state_dict()))
    assert len(whole) == 17
    # With one lane, seven batches are an epoch; two are a block and the beginning of the next.
    for step in (1, 2, 7, 12):
        again = stream_loader(stream, 3, 17, start_step=step, state=json.loads(states[step]), **layout)
        for one, other in zip(whole[step:], again, strict=True):
            assert_same(one, other)


def test_a_stream_cannot_be_resumed_on_another_layout_or_without_its_state(stream):
    loader = stream_loader(stream)
    state = loader.state_dict()
    with pytest.raises(ValueError, match="saved with num_workers=1, not 2"):
        stream_loader(stream, num_workers=2, state=state)
    with pytest.raises(ValueError, match="begins at step 5, but the stream stands at step 0"):
        stream_loader(stream, start_step=5)
    with pytest.raises(ValueError, match="at least 1 row"):
        stream_loader(stream, shuffle_buffer=0)


def test_a_stream_has_no_more_workers_than_shards(stream, caplog):
    assert stream_loader(stream, num_workers=9).num_workers == 4
    assert "has 4 shard(s)" in caplog.text


@pytest.mark.parametrize("kind", bad_contents())
def test_a_bad_image_in_a_stream_is_left_out_and_listed(images, kind):
    bad, reason = bad_contents()[kind]
    contents = [encoded(i) for i in range(6)]
    contents[0] = contents[3] = contents[5] = bad
    broken = load_images(dataset_of(contents).to_iterable_dataset(num_shards=2), max_pixels=1_000_000)
    names = {"0:0", "1:0", "1:2"}

    epoch = together(list(eval_loader(broken, 16, 2)))
    assert epoch["sample_ids"].tolist() == picture_numbers(epoch) == [1, 2, 4]
    assert {row["index"] for row in epoch["bad_images"]} == names and len(epoch["bad_images"]) == 3

    epochs = together(list(stream_loader(broken, 3, 2, crop="centre", flip=False)))
    assert sorted(picture_numbers(epochs)) == [1, 1, 2, 2, 4, 4]
    assert {row["index"] for row in epochs["bad_images"]} == names
    assert all(reason in row["reason"] for row in epochs["bad_images"])


def test_a_process_that_leaves_a_parquet_stream_half_read_ends_well(images, tmp_path):
    images.to_parquet(tmp_path / "train.parquet", batch_size=1)
    script = f"""
from ldae_hf.training.data import load_images, train_loader
source = load_images({str(tmp_path)!r}, streaming=True)
loader = iter(train_loader(source, image_size=16, num_timesteps=9, tokens_shape=(1, 1), global_batch_size=2,
                           micro_batch_size=2, num_steps=9, shuffle_buffer=2))
print(len(next(loader)["labels"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


# ---- one pass


@pytest.mark.parametrize("kind", ["source", "stream"])
def test_the_crops_for_the_pca_are_those_of_the_first_epoch_once_over_all_processes(request, kind):
    source = request.getfixturevalue(kind)
    settings = {name: SETTINGS[name] for name in ("image_size", "crop", "flip", "seed")}
    crops = torch.cat(
        [crop for rank in (0, 1) for crop in crop_loader(source, rank=rank, world_size=2, num_workers=rank, **settings)]
    )
    assert crops.shape == (NUM_IMAGES, 3, 16, 16) and crops.dtype == torch.uint8
    if kind == "source":
        expected = together(batches(source, global_batch=NUM_IMAGES, micro_batch=NUM_IMAGES, steps=1))["pixel_values"]
        assert {crop.tobytes() for crop in crops.numpy()} == {crop.tobytes() for crop in expected.numpy()}


@pytest.mark.parametrize("kind", ["source", "stream"])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_in_order(request, kind, workers):
    parts = list(eval_loader(request.getfixturevalue(kind), 16, 8, workers))
    assert [len(part["labels"]) for part in parts] == [8, 8, 6]
    assert together(parts)["sample_ids"].tolist() == picture_numbers(together(parts)) == list(range(NUM_IMAGES))


def test_cifar10_is_read_pixel_for_pixel(ldae_data):
    source = load_images(os.fspath(ldae_data / "cifar10"), "test")
    assert len(source) == 10_000 and source.label_names[:2] == ["airplane", "automobile"]
    batch = next(iter(eval_loader(source, 32, 16)))
    decoded = source.dataset.cast_column("image", datasets.Image())[:16]
    assert batch["labels"].tolist() == decoded["label"] and batch["bad_images"] == []
    assert np.array_equal(
        batch["pixel_values"], np.stack([np.asarray(image).transpose(2, 0, 1) for image in decoded["image"]])
    )
