"""`ldae data check`: every kind of bad image is found and no good one, and training leaves out what the file names."""

import io
import json
import os
import signal
import tarfile
import time
from itertools import islice

import datasets
import numpy as np
import pytest
from PIL import Image
from proofs.bad_images import BAD_FILES, MAX_PIXELS, encoded, large, picture, run
from typer.testing import CliRunner

from ldae_hf.cli.data import app
from ldae_hf.training.data import eval_loader, load_images, train_loader
from ldae_hf.training.data_check import LEFT_OUT, UNUSABLE, WARNINGS, check_images
from ldae_hf.training.jpeg_damage import jpeg_damage


def dataset_of(files: list[bytes | None]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = [None if file is None else {"bytes": file, "path": None} for file in files]
    return datasets.Dataset.from_dict({"image": rows, "label": list(range(len(files)))}, features)


def good(number: int) -> bytes:
    return encoded(picture(number), "PNG")


@pytest.fixture
def check(tmp_path):
    """Checks files as a data set: what is found, without the digests."""

    def check(files, streaming=False, **options):
        data = dataset_of(files)
        source = load_images(data.to_iterable_dataset(2) if streaming else data, max_pixels=MAX_PIXELS)
        report = check_images(source, tmp_path / "quarantine.jsonl", num_workers=0, **options)
        return [{name: value for name, value in row.items() if name != "digest"} for row in report.findings]

    return check


def labels_of(batches) -> list[int]:
    return [label for batch in batches for label in batch["labels"].tolist()]


def train(source, steps: int, **options) -> list[dict]:
    settings = dict(image_size=16, num_timesteps=10, tokens_shape=(1, 1), global_batch_size=2, micro_batch_size=2)
    return list(train_loader(source, num_steps=steps, **settings | options))


# ---- what is found


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_each_kind_is_found_once_with_a_reason_and_where_it_stands(check, kind, streaming):
    (found,) = check([good(0), encoded(picture(0), quality=90), good(2), BAD_FILES[kind](3)], streaming)
    assert found.pop("reason").endswith(".") or kind in UNUSABLE
    assert found == {
        "index": "1:1" if streaming else 3,
        "kind": kind,
        "severity": "unusable" if kind in UNUSABLE else "warning",
        "left_out": kind in LEFT_OUT,
    }


def test_every_kind_has_an_example():
    assert set(BAD_FILES) == {*UNUSABLE, *WARNINGS}


@pytest.mark.slow
def test_the_proof_holds_at_a_small_size():
    figures = run(images=100 * len(BAD_FILES))
    assert figures["failed"] == [] and figures["listed"] == len(BAD_FILES)


def test_an_image_can_have_several_peculiarities(check):
    tiny_and_long = encoded(picture(1, (300, 20)).convert("CMYK"))
    assert [found["kind"] for found in check([tiny_and_long])] == ["mode", "tiny", "aspect"]


def test_transparency_is_listed_only_where_something_is_transparent(check):
    opaque, transparent = picture(1).convert("RGBA"), picture(2).convert("RGBA")
    transparent.putpixel((3, 3), (1, 2, 3, 0))
    (found,) = check([encoded(opaque, "PNG"), encoded(transparent, "PNG")])
    assert (found["index"], found["kind"]) == (1, "mode") and "transparent" in found["reason"]


def test_the_first_of_several_equal_images_that_is_not_itself_left_out_stays(check):
    pixels = Image.open(io.BytesIO(encoded(large(1), "PNG")))
    sound, compressed = encoded(pixels, "PNG"), encoded(pixels, "BMP")
    place = sound.index(b"IEND") - 8
    wrong_checksum = sound[:place] + b"oops" + sound[place + 4 :]
    found = check([wrong_checksum, sound, compressed, sound])
    assert [(row["index"], row["kind"]) for row in found] == [(0, "damaged"), (2, "duplicate"), (3, "duplicate")]
    assert found[1]["reason"] == "It has the same pixels as image 1."
    assert found[2]["reason"] == "It has the same file as image 1."


# ---- damage inside a JPEG


JPEG_OPTIONS = [
    dict(),
    dict(quality=20),
    dict(subsampling=0),
    dict(subsampling=1),
    dict(optimize=True),
    dict(progressive=True),
    dict(restart_marker_rows=1),
    dict(restart_marker_blocks=3),
    dict(comment=b"\xff\xd8 a comment"),
]


@pytest.mark.parametrize("options", JPEG_OPTIONS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_sound_jpeg_has_no_damage(options, mode):
    for number in range(5):
        for image in (picture(number, (33 + number, 47)), large(number), Image.new("RGB", (50, 50), (128, 128, 128))):
            file = encoded(image.convert(mode), **options)
            assert jpeg_damage(file) is None and jpeg_damage(file + b"bytes of a camera") is None


def test_a_photo_with_a_preview_behind_it_has_no_damage(check):
    file = encoded(large(1), "MPO", save_all=True, append_images=[picture(2)])
    assert Image.open(io.BytesIO(file)).n_frames == 2 and check([file]) == []


DAMAGES = {
    "has no end marker": lambda file, middle: file[:-2] + bytes(range(1, 100)),
    "and the rest is grey": lambda file, middle: file[:middle] + b"\xff\xd9",
    "left over after the last row": lambda file, middle: file[:-2] + bytes(range(1, 100)) + b"\xff\xd9",
    "a marker lies inside": lambda file, middle: file[:middle] + b"\xff\x01" + file[middle + 2 :],
    "out of order": lambda file, middle: file.replace(b"\xff\xd1", b"\xff\xd5", 1),
    "lie between its segments": lambda file, middle: file[:20] + bytes(2) + file[20:],  # behind the first segment
}


@pytest.mark.parametrize("words", DAMAGES)
def test_damage_that_pillow_does_not_mind_is_found(check, words):
    file = encoded(large(1), restart_marker_rows=2 if words == "out of order" else 0)
    damaged = DAMAGES[words](file, len(file) * 2 // 3)
    Image.open(io.BytesIO(damaged)).load()
    (found,) = check([damaged])
    assert found["kind"] == "damaged" and words in found["reason"]


# ---- the file, and training with it


@pytest.fixture(scope="module")
def files() -> list[bytes | None]:
    """Twelve images; 2, 5 and 11 are bad, 7 repeats 1."""
    files = [good(i) for i in range(12)]
    files[2], files[5], files[11], files[7] = None, files[5][:-500], BAD_FILES["damaged"](11), files[1]
    return files


LEFT = [0, 1, 3, 4, 6, 8, 9, 10]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_training_leaves_out_what_the_file_names_and_replaces_nothing(files, tmp_path, streaming):
    file = tmp_path / "quarantine.jsonl"
    data = dataset_of(files).to_iterable_dataset(3) if streaming else dataset_of(files)
    report = check_images(load_images(data), file, num_workers=2)
    clean = load_images(data, quarantine=file, **dict(num_images=12) if streaming else {})
    assert len(clean) == 8 and clean.left_out["images"] == 4
    for loader in (eval_loader(clean, 16, 3, 2), train(clean, 4, num_workers=1)):
        batches = list(loader)
        assert sorted(labels_of(batches)) == LEFT and not any(batch["bad_images"] for batch in batches)
    assert {row["index"] for row in report.findings if row["left_out"]} == set(
        ["0:2", "1:1", "1:3", "2:3"] if streaming else [2, 5, 7, 11]
    )


def test_a_stream_that_leaves_images_out_resumes_where_it_stopped(files, tmp_path):
    file, data = tmp_path / "quarantine.jsonl", dataset_of(files).to_iterable_dataset(3)
    check_images(load_images(data), file)
    clean = load_images(data, quarantine=file, num_images=12)
    settings = dict(image_size=16, num_timesteps=10, tokens_shape=(1, 1), global_batch_size=2, micro_batch_size=2)
    loader = train_loader(clean, num_steps=9, shuffle_buffer=3, **settings)
    whole = labels_of(list(islice(loader, 5)))
    state = json.loads(json.dumps(loader.state_dict()))
    rest = labels_of(train_loader(clean, num_steps=9, shuffle_buffer=3, start_step=5, state=state, **settings))
    unbroken = labels_of(train_loader(clean, num_steps=9, shuffle_buffer=3, **settings))
    assert whole + rest == unbroken and sorted(unbroken[:8]) == LEFT


def test_the_hash_of_what_is_left_out_depends_on_the_images_and_not_on_the_day(files, tmp_path):
    one, other, fewer = (tmp_path / name for name in ("one", "other", "fewer"))
    source = load_images(dataset_of(files))
    check_images(source, one, num_workers=0)
    time.sleep(1)
    check_images(source, other, num_workers=2)
    check_images(source, fewer, keep=["duplicate"])
    assert one.read_text() != other.read_text()
    hashes = [load_images(dataset_of(files), quarantine=file).left_out["sha256"] for file in (one, other, fewer)]
    assert hashes[0] == hashes[1] != hashes[2] and source.left_out is None


def test_what_is_left_out_can_be_chosen_by_kind_and_by_editing_the_file(files, tmp_path):
    file, data = tmp_path / "quarantine.jsonl", dataset_of([*files, encoded(picture(50).convert("CMYK"))])
    check_images(load_images(data), file, keep=["duplicate", "missing"], drop=["mode"])
    assert load_images(data, quarantine=file).left_out["images"] == 3  # truncated, damaged, mode
    file.write_text(file.read_text().replace('"left_out": true', '"left_out": false'))
    assert len(load_images(data, quarantine=file)) == 13
    with pytest.raises(ValueError, match="no kind blurred; there are missing, empty, .*animated"):
        check_images(load_images(data), file, drop=["blurred"])


@pytest.fixture(scope="module")
def quarantine(files, tmp_path_factory):
    file = tmp_path_factory.mktemp("quarantine") / "quarantine.jsonl"
    check_images(load_images(dataset_of(files)), file, num_workers=0)
    return file


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda files: files[:-1], "with 12 images, but the data set has 11"),
        (lambda files: [*files[:5], good(99), *files[6:]], "image 5 of the data set is another one"),
        (lambda files: [*files[1:], files[0]], "is another one there: check this data set"),
    ],
)
def test_the_quarantine_of_another_data_set_is_refused(files, quarantine, change, message):
    with pytest.raises(ValueError, match=message):
        load_images(dataset_of(change(files)), quarantine=quarantine)


def test_the_quarantine_of_another_stream_is_refused_when_the_row_comes_by(files, tmp_path):
    file = tmp_path / "quarantine.jsonl"
    check_images(load_images(dataset_of(files).to_iterable_dataset(3)), file)
    other = dataset_of([*files[:5], good(99), *files[6:]]).to_iterable_dataset(3)
    with pytest.raises(ValueError, match="image 1:1 of the data set is another one"):
        train(load_images(other, quarantine=file, num_images=12), 4)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "There is no quarantine file"),
        ("", "is no quarantine file, or a damaged one"),
        ('{"step": 1}\n', "is no quarantine file, or a damaged one"),
        ("[1]\n", "is no quarantine file, or a damaged one"),
    ],
)
def test_a_file_that_is_no_quarantine_is_refused(files, tmp_path, content, message):
    if content is not None:
        (tmp_path / "file").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_images(dataset_of(files), quarantine=tmp_path / "file")


def test_a_quarantine_cut_short_or_of_the_other_way_of_reading_is_refused(files, quarantine, tmp_path):
    (tmp_path / "cut").write_bytes(quarantine.read_bytes()[:-20])
    with pytest.raises(ValueError, match="a damaged one"):
        load_images(dataset_of(files), quarantine=tmp_path / "cut")
    with pytest.raises(
        ValueError, match="of a data set on disk, but the data set is read as a stream: .* with --stream"
    ):
        load_images(dataset_of(files), streaming=True, quarantine=quarantine)


def test_an_interrupted_check_leaves_the_folder_as_it_was(files, tmp_path):
    def rows():
        for number in range(500):
            if number == 100:
                os.kill(os.getppid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C reaches the workers too
            time.sleep(0.01 if number > 100 else 0)
            yield {"image": {"bytes": good(1), "path": None}}

    features = datasets.Features({"image": datasets.Image()})
    (tmp_path / "quarantine.jsonl").write_text("an older one")
    with pytest.raises(KeyboardInterrupt):
        check_images(
            load_images(datasets.IterableDataset.from_generator(rows, features)), tmp_path / "quarantine.jsonl"
        )
    assert [file.name for file in tmp_path.iterdir()] == ["quarantine.jsonl"]
    assert (tmp_path / "quarantine.jsonl").read_text() == "an older one"


# ---- the command


def test_the_command_prints_a_table_and_its_exit_code_says_what_was_found(files, tmp_path):
    for name, some in (("good", files[:2]), ("bad", files)):
        dataset_of(some).save_to_disk(tmp_path / name)

    def run(*arguments):
        return CliRunner().invoke(app, ["check", *map(str, arguments), "--output", str(tmp_path / "found.jsonl")])

    result = run(tmp_path / "good")
    assert result.exit_code == 0 and "2 images, something found in 0, left out 0." in result.stdout
    result = run(tmp_path / "bad", "--keep", "duplicate", "--num-workers", 0)
    assert result.exit_code == 1
    assert [line.split()[:4] for line in result.stdout.splitlines()[:5]] == [
        ["kind", "severity", "images", "left"],
        ["missing", "unusable", "1", "1"],
        ["truncated", "unusable", "1", "1"],
        ["damaged", "warning", "1", "1"],
        ["duplicate", "warning", "1", "0"],
    ]
    assert result.stdout.splitlines()[5:] == [
        "12 images, something found in 4, left out 3.",
        str(tmp_path / "found.jsonl"),
    ]
    header = json.loads((tmp_path / "found.jsonl").read_text().splitlines()[0])
    assert header["dataset"] == str(tmp_path / "bad") and header["num_images"] == 12 and header["fingerprint"]
    for arguments in ([tmp_path / "absent"], [tmp_path / "bad", "--drop", "ugly"]):
        result = run(*arguments)
        assert result.exit_code == 2 and result.stderr.startswith("Error: There is no")


def test_the_help_names_every_kind():
    text = CliRunner().invoke(app, ["check", "--help"]).stdout
    assert all(kind in text for kind in (*UNUSABLE, *WARNINGS))


# ---- WebDataset


def write_tars(folder, changes: dict[str, bytes] | None = None) -> list[str]:
    """Two tars of eight samples; `changes` replaces members."""
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(shard * 8, shard * 8 + 8):
                members = {f"{i:03d}.jpg": encoded(picture(i)), f"{i:03d}.cls": b"%d" % i, f"{i:03d}.json": b"{}"}
                for name, content in (members | {n: c for n, c in (changes or {}).items() if n in members}).items():
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return [str(folder / "0.tar"), str(folder / "1.tar")]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_bad_member_of_a_tar_ends_no_run(tmp_path, caplog, streaming):
    bad = {"002.jpg": encoded(picture(2))[:-300], "003.cls": b"cat", "009.json": b"{", "004.json": b"nonsense"}
    tars = write_tars(tmp_path, bad)
    source = load_images(tars, streaming=streaming, **dict(num_images=16) if streaming else {})
    report = check_images(source, tmp_path / "quarantine.jsonl")
    (found,) = report.findings
    assert (found["index"], found["kind"]) == ("0:2" if streaming else 2, "truncated") and report.num_images == 16
    assert found["path"] == "002.jpg"
    clean = load_images(
        tars, streaming=streaming, quarantine=tmp_path / "quarantine.jsonl", **dict(num_images=16) if streaming else {}
    )
    labels = labels_of(eval_loader(clean, 16, 4))
    assert labels == [0, 1, -1, *range(4, 16)]  # a label that is no number counts as none
    assert len(train(source, 16)) == 16
    if not streaming:
        assert f"{tmp_path / '0.tar'}: 003.cls cannot be parsed" in caplog.text


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_tar_that_is_cut_off_is_an_error_that_names_it(tmp_path, streaming):
    tars = write_tars(tmp_path)
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) // 2 + 700])
    with pytest.raises(ValueError, match="The archive .*1.tar cannot be read: unexpected end of data"):
        list(eval_loader(load_images(tars, streaming=streaming), 16, 4))


def test_what_is_checked_is_the_pixels_that_training_sees(files):
    data = dataset_of(files)
    rows = load_images(data).dataset
    for number in LEFT:
        image, label = load_images(data).read(rows[number])
        assert label == number and np.array_equal(image, picture(number))
