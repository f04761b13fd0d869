"""`ldae fid`: generates, measures, and says what the number is called and what it may be compared with."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from forked_runs import encoded, in_processes
from safetensors.torch import load_file
from test_modeling_ldae import build, fit_processor
from typer.testing import CliRunner

from ldae_hf import LDAEImageProcessor, LDAEModel, LDAEPipeline
from ldae_hf.cli import app
from ldae_hf.evaluation import samples as samples_module
from ldae_hf.evaluation.distances import comparable, distance_label, distance_table
from ldae_hf.evaluation.extractors import load_extractor
from ldae_hf.evaluation.feature_maps import state_fingerprint
from ldae_hf.evaluation.fid import run_fid
from ldae_hf.evaluation.frechet import FeatureStatistics, frechet_distance
from ldae_hf.evaluation.generators import load_generator
from ldae_hf.evaluation.rerun import differing, rerun
from ldae_hf.evaluation.sample_noise import noise_generators
from ldae_hf.evaluation.samples import to_uint8
from ldae_hf.recipes import load_recipe
from ldae_hf.training.data import load_images
from ldae_hf.training.extractor import train_extractor


OPTIONS = dict(num_samples=20, steps=3, batch_size=4, num_workers=0, progress=False)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of Parquet files: 96 training and 32 test images of two classes."""
    folder = tmp_path_factory.mktemp("images")
    for split, numbers in (("train", range(96)), ("test", range(96, 128))):
        rows = {"image": [{"bytes": encoded(number), "path": None} for number in numbers]}
        rows["label"] = [number % 2 for number in numbers]
        columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, columns).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def extractor(images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("extractor") / "small"
    train_extractor(str(images), folder, image_size=16, epochs=1, widths=(4, 8), num_workers=0, progress=False)
    return folder


@pytest.fixture(scope="module")
def processor():
    return fit_processor()


@pytest.fixture(scope="module")
def checkpoint(processor, images, tmp_path_factory) -> Path:
    """A run's folder with one checkpoint, whose recipe names the images."""
    run = tmp_path_factory.mktemp("run")
    folder = run / "checkpoints" / "step-00000010"
    build(processor=processor, dtype=torch.float32).save_pretrained(folder)
    processor.save_pretrained(folder)
    load_recipe("l_dae", "cpu", [f"data.dataset={images}"]).save(folder)
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(samples_module, "SHARD_IMAGES", 8)


@pytest.fixture(scope="module")
def row(checkpoint, extractor, tmp_path_factory) -> dict:
    return run_fid(checkpoint, extractor=extractor, **OPTIONS, samples_dir=tmp_path_factory.mktemp("samples"))


def test_the_command_generates_resumes_and_writes_a_row(checkpoint, extractor, tmp_path):
    ledger, folder = tmp_path / "ledger.jsonl", checkpoint.parents[1] / "samples"
    arguments = ["fid", checkpoint, "--extractor", extractor, "--steps", 3, "--num-workers", 0, "--ledger", ledger]

    def ldae_fid(*more) -> tuple[dict, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in (*arguments, *more)])
        assert result.exit_code == 0, result.output
        return json.loads(ledger.read_text().splitlines()[-1]), result.stdout

    first, printed = ldae_fid("--num-samples", 20)
    assert first["task"] == "frechet_distance" and first["images_per_second"] > 0
    assert (first["recipe"], first["tier"], len(first["overrides"])) == ("l_dae", "cpu", 1)
    assert list(first["floors"]) == ["real", "reconstruction", "noise"]
    assert [floor["images"] for floor in first["floors"].values()] == [32, 32, 20]
    real, _, noise = (floor["frechet_distance"] for floor in first["floors"].values())
    assert 0 < real < noise and first["frechet_distance"] > 0
    assert first["protocol"]["reference"] | {"images": 96, "split": "train"} == first["protocol"]["reference"]
    assert printed.splitlines()[-1] == first["label"] and "reconstruction" in printed

    (kept,) = folder.iterdir()
    (kept / "shard-00001.safetensors").unlink()
    again, _ = ldae_fid("--num-samples", 20)
    assert again["frechet_distance"] == first["frechet_distance"] and again["floors"] == first["floors"]
    nothing, _ = ldae_fid("--num-samples", 20)
    assert nothing["images_per_second"] is None and nothing["frechet_distance"] == first["frechet_distance"]
    more, _ = ldae_fid("--num-samples", 24)
    assert more["protocol"]["samples"]["count"] == 24 and [kept] == list(folder.iterdir())
    assert more["frechet_distance"] != first["frechet_distance"]
    ldae_fid("--num-samples", 20, "--seed", 1)
    assert len(list(folder.iterdir())) == 2
    assert len(ledger.read_text().splitlines()) == 5


def test_the_distance_is_that_of_the_kept_samples_and_the_references_features(
    checkpoint, processor, extractor, tmp_path
):
    row = run_fid(checkpoint, extractor=extractor, **OPTIONS, samples_dir=tmp_path)
    samples = torch.cat([load_file(shard)["images"] for shard in sorted(tmp_path.glob("shard-*"))])
    reference = torch.from_numpy(processor.crop([encoded(number) for number in range(96)]))
    network = load_extractor(extractor, "cpu")
    generated, real = (
        FeatureStatistics(network.fingerprint, network.dim).update(network(pixels, torch.arange(len(pixels))))
        for pixels in (samples, reference)
    )
    assert (generated.count, real.count) == (20, 96)
    assert row["frechet_distance"] == pytest.approx(frechet_distance(generated, real), rel=1e-5)
    assert row["protocol"]["encoder"] == state_fingerprint(LDAEModel.from_pretrained(checkpoint))


def test_the_floor_of_noise_is_what_generation_begins_with(checkpoint, processor, extractor, row):
    begun = []

    def note(pipeline, step, timestep, seen):
        begun.append(seen["noisy_latents"])

    pipeline = load_generator(checkpoint, device="cpu").pipeline
    pipeline(20, num_inference_steps=1, generator=noise_generators(0, range(20)), callback_on_step_end=note)
    reference = torch.from_numpy(processor.crop([encoded(number) for number in range(96)]))
    network = load_extractor(extractor, "cpu")
    noise, real = (
        FeatureStatistics(network.fingerprint, network.dim).update(network(pixels, torch.arange(len(pixels))))
        for pixels in (to_uint8(pipeline.decode(begun[0], "pt")), reference)
    )
    assert row["floors"]["noise"]["frechet_distance"] == pytest.approx(frechet_distance(noise, real), rel=1e-4)


def test_a_row_names_the_images_of_its_floors_and_the_command_that_gives_it_again(checkpoint, extractor, images, row):
    floors = row["protocol"]["floors"]
    assert (floors["dataset"], floors["split"], floors["images"]) == (str(images), "test", 32)
    assert f"ldae fid {checkpoint} --dataset {images} --split train --test-split test" in row["rerun"]
    again = rerun(row)
    assert again.differs == [] and again.command == row["rerun"]
    assert again.row["rerun"] == row["rerun"]


def test_rows_from_before_floors_were_described_are_compared_as_ever(row):
    old = copy.deepcopy(row)
    del old["protocol"]["floors"], old["rerun"]
    assert comparable(old, row) and comparable(row, old)
    assert differing(old, row, 0)[0] == []


def test_a_row_of_objects_in_memory_has_no_command(checkpoint, extractor, row, tmp_path):
    pipeline, dataset = load_generator(checkpoint).pipeline, row["protocol"]["reference"]["dataset"]
    measured = run_fid(pipeline, dataset, extractor=extractor, **OPTIONS, samples_dir=tmp_path)
    assert measured["rerun"] is None and measured["frechet_distance"] == row["frechet_distance"]


def test_two_processes_measure_what_one_does(checkpoint, extractor, row, tmp_path):
    def run():
        return run_fid(checkpoint, extractor=extractor, **OPTIONS, samples_dir=tmp_path)

    shared = in_processes(run, 2)
    assert shared["frechet_distance"] == pytest.approx(row["frechet_distance"], rel=1e-9)
    assert shared["protocol"] == row["protocol"] and shared["floors"] == row["floors"]
    assert len(list(tmp_path.glob("shard-*"))) == 3


@pytest.mark.slow
def test_torchrun_starts_processes_that_share_the_samples(checkpoint, extractor, row, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["ldae_hf.cli", "fid", checkpoint, "--extractor", extractor, "--num-samples", "20", "--steps", "3"]
    command += ["--batch-size", "4", "--num-workers", "0", "--samples-dir", tmp_path, "--output", tmp_path / "row.json"]
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("reconstruction") == 1  # only the main process prints a table
    found = json.loads((tmp_path / "row.json").read_text())
    assert found["frechet_distance"] == pytest.approx(row["frechet_distance"], rel=1e-9)


def test_a_loaded_pipeline_with_any_extractor_and_data_set_is_measured_too(checkpoint, processor, images, tmp_path):
    class MeanColour:
        name, dim = "mean colour", 3
        protocol = {"network": "none: the mean of each colour channel, in 0 ... 255"}
        fingerprint = json.dumps(protocol)

        def __call__(self, pixels, sample_ids):
            return pixels.float().mean(dim=(2, 3))

    model = build(processor=processor, dtype=torch.float32, num_classes=2, noise_schedule="ddpm_linear")
    data = {split: datasets.load_dataset("parquet", data_dir=str(images), split=split) for split in ("train", "test")}
    options = OPTIONS | dict(extractor=MeanColour(), dataset=data, guidance=1.5, sampler="deterministic")
    row = run_fid(LDAEPipeline(model, processor), **options, samples_dir=tmp_path)
    assert row["recipe"] is None and row["protocol"]["samples"]["guidance"] == 1.5
    assert (
        row["label"].startswith("FD-20 (mean colour ")
        and "deterministic, 3 steps, guidance 1.5, seed 0)" in row["label"]
    )
    with pytest.raises(ValueError, match="name a samples_dir"):
        run_fid(LDAEPipeline(model, processor), **options)
    with pytest.raises(ValueError, match="has the weights that it was made with; leave weights out"):
        run_fid(LDAEPipeline(model, processor), **options, weights="ema", samples_dir=tmp_path)
    streams = {split: images.to_iterable_dataset() for split, images in data.items()}
    with pytest.raises(ValueError, match="give a data set that is not a stream"):
        run_fid(LDAEPipeline(model, processor), **options | {"dataset": streams}, samples_dir=tmp_path)


def test_fewer_samples_than_dimensions_are_warned_of(checkpoint, extractor, row, tmp_path):
    few = run_fid(checkpoint, extractor=extractor, **OPTIONS | {"num_samples": 7}, samples_dir=tmp_path)
    (warning,) = few["warnings"]
    assert "fewer samples (7) than values in a feature (8)" in warning and warning in distance_table(few)
    assert row["warnings"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "ddim"}, "sampler='ddim' is not one of"),
        ({"guidance": 2.0}, "trained without labels"),
        ({"steps": 2000}, "num_inference_steps=2000 must be"),
        ({"dataset": "/no/such/images"}, "/no/such/images"),
        ({"test_split": "validation"}, "no split 'validation'"),
        ({"extractor": "no-such-extractor"}, "no-such-extractor is no extractor"),
        ({"num_samples": 0}, "0 samples are too few"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_generated(checkpoint, extractor, tmp_path, changes, message):
    options = dict(extractor=extractor, samples_dir=tmp_path / "samples") | OPTIONS | changes
    with pytest.raises(ValueError, match=message):
        run_fid(checkpoint, **options)
    assert not (tmp_path / "samples").exists()


def test_images_that_are_missing_are_refused_before_anything_is_generated(checkpoint, extractor, tmp_path):
    columns = datasets.Features({"image": datasets.Image()})
    rows = {"image": [{"bytes": None, "path": str(tmp_path / f"{number}.png")} for number in range(8)]}
    data = {split: datasets.Dataset.from_dict(rows, columns) for split in ("train", "test")}
    with pytest.raises(ValueError, match="cannot be opened"):
        run_fid(checkpoint, data, extractor=extractor, **OPTIONS, samples_dir=tmp_path / "samples", cache_dir=None)
    assert not list((tmp_path / "samples").glob("shard-*"))


def test_a_model_of_one_level_and_a_hub_name_without_folder_are_refused(processor, extractor, images, tmp_path):
    single = build(processor=processor, dtype=torch.float32, noise_schedule="single_level")
    options = OPTIONS | dict(extractor=extractor, dataset=str(images), samples_dir=tmp_path)
    with pytest.raises(ValueError, match="cannot sample"):
        run_fid(LDAEPipeline(single, processor), **options)
    with pytest.raises(ValueError, match="No data set is given"):
        run_fid(LDAEPipeline(build(processor=processor, dtype=torch.float32), processor), **options | {"dataset": None})


def test_a_number_is_called_fid_50k_only_if_it_is_one(row):
    protocol = copy.deepcopy(row["protocol"])
    assert distance_label(protocol).startswith("FD-20 (classifier of")
    protocol["samples"]["count"] = 50_000
    assert distance_label(protocol).startswith("FD-50K (classifier of")
    protocol["extractor"]["name"] = "Inception-v3"
    assert distance_label(protocol).startswith("FID-50K (Inception-v3 ")
    protocol["samples"]["count"] = 10_000
    assert distance_label(protocol).startswith("FD-10K (Inception-v3 ")
    assert distance_label(protocol).endswith("ancestral, 3 steps, guidance 1, raw weights, seed 0)")
    assert distance_label(protocol, seed=False).endswith("guidance 1, raw weights)")


@pytest.mark.parametrize(
    ("key", "value", "may"),
    [
        ("samples.seed", 1, True),
        ("samples.labels", "the sample's number modulo 10", True),
        ("samples.scheduler", {"class": "LDAEScheduler", "noise_schedule": "ddpm_linear"}, True),
        ("samples.count", 21, False),
        ("samples.steps", 4, False),
        ("samples.sampler", "deterministic", False),
        ("samples.guidance", 1.5, False),
        ("samples.dtype", "bfloat16", False),
        ("samples.weights", "ema", False),
        ("extractor.weights", "0" * 64, False),
        ("reference.split", "test", False),
        ("reference.images", 95, False),
    ],
)
def test_distances_are_compared_only_if_they_were_measured_alike(row, key, value, may):
    other = copy.deepcopy(row) | {"name": "another model", "frechet_distance": 1.0}
    section, _, name = key.partition(".")
    assert comparable(row, other) and other["protocol"][section][name] != value
    other["protocol"][section][name] = value
    assert comparable(row, other) is may


@pytest.mark.slow
def test_on_cifar10_real_images_lie_closer_than_reconstructions_and_these_closer_than_noise(ldae_data, tmp_path):
    """The model is untrained: its samples are as far away as noise."""
    folder = tmp_path / "extractor"
    options = dict(train_split="train[:4000]", test_split="test[:1000]", num_workers=0, progress=False)
    train_extractor("cifar10", folder, image_size=32, epochs=2, widths=(8, 16), **options)
    source = load_images("cifar10", "train[:2000]")
    processor = LDAEImageProcessor(image_size=32, patch_size=8, latent_dim=16)
    processor.fit((source.read(source.dataset[index])[0] for index in range(2000)), progress=False)
    model = build(processor=processor, dtype=torch.float32, image_size=32, patch_size=8, latent_dim=16)
    options = OPTIONS | dict(num_samples=200, dataset="cifar10", split="train[:4000]", test_split="test[:1000]")
    row = run_fid(LDAEPipeline(model, processor), extractor=folder, **options, samples_dir=tmp_path / "samples")
    real, reconstruction, noise = (floor["frechet_distance"] for floor in row["floors"].values())
    assert real < reconstruction < noise and real < row["frechet_distance"]
