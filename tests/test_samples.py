"""Generated images in a folder: the same whoever makes them, in whatever pieces, after whatever went wrong."""

import json
import os
import signal
import time
from pathlib import Path

import diffusers
import pytest
import torch
from forked_runs import Child, in_processes
from test_modeling_ldae import build, fit_processor

from ldae_hf import LDAEPipeline
from ldae_hf.evaluation import samples as samples_module
from ldae_hf.evaluation.fid import processes
from ldae_hf.evaluation.samples import SampleStore, Sampling, ShardedSamples


SAMPLING = Sampling(steps=3)


@pytest.fixture(scope="module")
def processor():
    return fit_processor()


@pytest.fixture(scope="module")
def pipeline(processor):
    return LDAEPipeline(build(processor=processor, dtype=torch.float32), processor)


@pytest.fixture(scope="module")
def labelled(processor):
    model = build(processor=processor, dtype=torch.float32, num_classes=3, noise_schedule="ddpm_linear")
    return LDAEPipeline(model, processor)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Of four images, in this process and its forks."""
    monkeypatch.setattr(samples_module, "SHARD_IMAGES", 4)


def samples_of(pipeline, folder, count=10, sampling=SAMPLING, batch_size=2, **layout) -> ShardedSamples:
    store = SampleStore(folder, sampling.facts(pipeline, "the model"), 16, count)
    store.check()
    store.begin()
    return ShardedSamples(store, sampling, pipeline, batch_size=batch_size, progress=False, **layout)


def make(*arguments, **options) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The images, their labels, and how many of them had to be made."""
    samples = samples_of(*arguments, **options)
    images, labels = zip(*samples, strict=True)
    return torch.cat(images), torch.cat(labels), samples.made


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but hidden ones, which are what a kill may leave behind."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if not file.name.startswith(".")}


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory):
    """Ten samples in three shards, made in one go."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples_module, "SHARD_IMAGES", 4)
        make(pipeline, folder)
    return folder


def test_samples_are_grey_levels_in_shards_with_all_that_they_are_a_function_of(pipeline, whole, tmp_path):
    images, labels, made = make(pipeline, tmp_path)
    assert (images.dtype, images.shape, made) == (torch.uint8, (10, 3, 16, 16), 10)
    assert labels.tolist() == [-1] * 10
    assert len({image.numpy().tobytes() for image in images}) == 10
    assert list(contents(tmp_path)) == ["samples.json", *(f"shard-0000{shard}.safetensors" for shard in range(3))]
    facts = json.loads((tmp_path / "samples.json").read_text())
    assert (facts["model"], facts["seed"], facts["steps"], facts["sampler"]) == ("the model", 0, 3, "ancestral")
    assert contents(tmp_path) == contents(whole)


def test_a_sample_is_what_the_pipeline_gives_for_its_number_whatever_shard_or_batch_it_is_in(
    pipeline, whole, tmp_path, monkeypatch
):
    expected = make(pipeline, whole)[0].int()
    alone = SAMPLING.draw(pipeline, range(7, 8)).int()
    assert (alone[0] - expected[7]).abs().max() <= 1
    monkeypatch.setattr(samples_module, "SHARD_IMAGES", 1000)
    assert (make(pipeline, tmp_path, batch_size=10)[0].int() - expected).abs().max() <= 1
    assert (make(pipeline, tmp_path / "other", sampling=Sampling(steps=3, seed=1))[0].int() - expected).abs().max() > 9


def test_samples_of_a_model_with_classes_take_them_in_turn(labelled, tmp_path):
    sampling = Sampling("deterministic", steps=3, guidance=2.0)
    images, labels, _ = make(labelled, tmp_path, sampling=sampling)
    assert labels.tolist() == [number % 3 for number in range(10)]
    assert "modulo 3" in json.loads((tmp_path / "samples.json").read_text())["labels"]
    unguided = Sampling("deterministic", steps=3).draw(labelled, range(2))
    assert (images[:2].int() - unguided.int()).abs().max() > 1


def test_two_processes_make_what_one_makes(pipeline, whole, tmp_path):
    def run():
        state = processes()
        if state.is_main_process:
            samples_of(pipeline, tmp_path)  # says what the folder will hold
        state.wait_for_everyone()
        layout = dict(process=state.process_index, num_processes=state.num_processes)
        made = make(pipeline, tmp_path, **layout)[2]
        state.wait_for_everyone()
        return made

    assert in_processes(run, 2) == 6  # the first of three shards and the last one, of two
    assert contents(tmp_path) == contents(whole)


def test_one_process_starts_nothing_of_torch_distributed():
    def run():
        return processes().num_processes, torch.distributed.is_initialized()

    assert in_processes(run) == (1, False)


def test_only_what_is_missing_is_made(pipeline, whole, tmp_path):
    make(pipeline, tmp_path)
    assert make(pipeline, tmp_path)[2] == 0
    (tmp_path / "shard-00001.safetensors").unlink()
    before = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
    assert make(pipeline, tmp_path)[2] == 4
    assert contents(tmp_path) == contents(whole)
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == before


def test_a_larger_count_goes_on_and_a_smaller_one_takes_the_first(pipeline, whole, tmp_path):
    assert make(pipeline, tmp_path, count=6)[2] == 6
    before = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
    assert make(pipeline, tmp_path)[2] == 6  # two of them in the shard that was short
    assert contents(tmp_path) == contents(whole)
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == before
    images, _, made = make(pipeline, tmp_path, count=6)
    assert made == 0 and torch.equal(images, make(pipeline, whole)[0][:6])
    assert contents(tmp_path) == contents(whole)


def flip_a_bit(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES = {
    "truncated": lambda content: content[:-100],
    "empty": lambda content: b"",
    "a bit of an image": lambda content: flip_a_bit(content, len(content) - 40),
    "a bit of the checksum": lambda content: flip_a_bit(content, content.index(b"sha256") + 12),
    "other samples": lambda content: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_made_again_with_a_warning(pipeline, whole, tmp_path, capsys, damage):
    make(pipeline, tmp_path)
    file = tmp_path / "shard-00001.safetensors"
    content = DAMAGES[damage](file.read_bytes())
    file.write_bytes((tmp_path / "shard-00000.safetensors").read_bytes() if content is None else content)
    assert make(pipeline, tmp_path)[2] == 4
    printed = capsys.readouterr().out
    assert "shard-00001.safetensors is damaged" in printed and "made again" in printed
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize(
    ("sampling", "difference"),
    [
        (Sampling(steps=3, seed=1), "their seed is 0, not 1"),
        (Sampling(steps=4, seed=1), "their steps is 3, not 4"),
        (Sampling("deterministic", steps=3), "their sampler is 'ancestral', not 'deterministic'"),
    ],
)
def test_a_folder_of_other_samples_is_refused_with_the_first_difference(pipeline, whole, sampling, difference):
    with pytest.raises(ValueError, match=f"holds other samples: {difference}"):
        make(pipeline, whole, sampling=sampling)


def test_shards_that_nothing_is_known_of_are_refused(pipeline, tmp_path):
    make(pipeline, tmp_path)
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(ValueError, match=r"samples\.json is damaged"):
        make(pipeline, tmp_path)
    (tmp_path / "samples.json").unlink()
    with pytest.raises(ValueError, match="does not say what its samples are"):
        make(pipeline, tmp_path)


def test_a_killed_process_loses_only_the_shard_in_work(pipeline, tmp_path):
    sampling, options = Sampling(steps=100), dict(count=40, batch_size=4)
    child = Child(lambda: make(pipeline, tmp_path / "killed", sampling=sampling, **options)[2])
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "killed").glob("shard-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.process.pid, signal.SIGTERM)
    with pytest.raises(ChildProcessError, match="signal 15"):
        child.join()
    there = len(list((tmp_path / "killed").glob("shard-*")))
    assert 3 <= there < 10
    assert make(pipeline, tmp_path / "killed", sampling=sampling, **options)[2] == 40 - 4 * there
    make(pipeline, tmp_path / "unbroken", sampling=sampling, **options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")


def test_a_full_disk_leaves_no_shard_behind(pipeline, whole, tmp_path):
    samples = samples_of(pipeline, tmp_path)
    (tmp_path / ".shard-00000.safetensors.writing").mkdir()  # nothing can be written there
    with pytest.raises(OSError):
        next(iter(samples))
    assert list(contents(tmp_path)) == ["samples.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_a_disk_that_fills_up_is_told_with_the_file_that_does_not_fit(pipeline, tmp_path):
    samples = samples_of(pipeline, tmp_path)
    (tmp_path / ".shard-00000.safetensors.writing").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*/shard-00000\.safetensors"):
        next(iter(samples))
    assert os.listdir(tmp_path) == ["samples.json"]


def test_a_shard_that_cannot_be_read_is_named_and_not_made_again(pipeline, tmp_path):
    make(pipeline, tmp_path, count=4)
    (tmp_path / "shard-00000.safetensors").unlink()
    (tmp_path / "shard-00000.safetensors").mkdir()
    with pytest.raises(OSError, match=r"Is a directory: .*/shard-00000\.safetensors"):
        make(pipeline, tmp_path, count=4)


@pytest.mark.parametrize(("size", "images"), [(32, 1000), (64, 1000), (128, 341), (256, 85), (4096, 1)])
def test_a_shard_holds_16_mb_at_most_or_one_image(size, images, tmp_path, monkeypatch):
    monkeypatch.undo()
    store = SampleStore(tmp_path, {}, size, 10_000)
    assert store.shard_size == images
    assert sum(len(store.numbers(shard)) for shard in range(store.num_shards)) == 10_000


def test_what_cannot_be_drawn_is_refused_before_anything_is(processor, pipeline, labelled, tmp_path):
    with pytest.raises(ValueError, match="sampler='ddim' is not one of ancestral, deterministic"):
        Sampling("ddim").check(pipeline)
    with pytest.raises(ValueError, match="guidance=2 guides towards classes, and this model was trained without"):
        Sampling(guidance=2).check(pipeline)
    with pytest.raises(ValueError, match="guidance=-1 must be 0 or more"):
        Sampling(guidance=-1).check(labelled)
    with pytest.raises(ValueError, match="num_inference_steps=0 must be an integer in 1 ... 1000"):
        Sampling(steps=0).check(pipeline)
    single = build(processor=processor, dtype=torch.float32, noise_schedule="single_level")
    with pytest.raises(ValueError, match="one level of noise and cannot sample"):
        Sampling().check(LDAEPipeline(single, processor))
    stock = labelled.scheduler.to_stock(diffusers.DPMSolverMultistepScheduler)
    with pytest.raises(ValueError, match="this pipeline has a DPMSolverMultistepScheduler"):
        Sampling().check(LDAEPipeline(labelled.model, processor, stock))
    with pytest.raises(ValueError, match="0 samples are too few"):
        SampleStore(tmp_path, {}, 32, 0)
