import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from tiny_encoder import TINY, save_tiny_encoder, tiny_model, tiny_processor
from typer.testing import CliRunner

from ldae_hf import LDAEConfig, LDAEModel
from ldae_hf.cli import app
from ldae_hf.evaluation.features import extract_features
from ldae_hf.evaluation.linear_probe import linear_probe
from ldae_hf.evaluation.sweep_figure import sweep_figure
from ldae_hf.evaluation.sweep_text import sweep_table
from ldae_hf.evaluation.sweeps import (
    depth_range,
    run_depth_sweep,
    run_layer_sweep,
    run_timestep_sweep,
    timestep_range,
)
from ldae_hf.evaluation.whole_network import load_stack, whole_network
from ldae_hf.manifest import write_folder


FAST = dict(epochs=3, learning_rates=(0.1, 1.0), num_workers=0, progress=False)


def stripes(count: int, seed: int) -> Dataset:
    """Horizontal or vertical stripes by class, of random colour and phase, with noise."""
    generator = np.random.default_rng(seed)
    images, labels = [], generator.integers(0, 2, count).tolist()
    for label in labels:
        wave = np.sin(np.arange(16) * 1.3 + generator.uniform(0, 6)) * generator.uniform(20, 60)
        lines = np.broadcast_to(wave[:, None] if label else wave[None], (16, 16))
        pixels = 128 + lines[..., None] * generator.uniform(0.2, 1, 3) + generator.normal(0, 12, (16, 16, 3))
        images.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["vertical", "horizontal"])})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stripes")
    DatasetDict(train=stripes(96, 0), test=stripes(48, 1)).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder as far as sweeps look into it: a checkpoint of three blocks and one, and the encoder."""
    folder, processor = tmp_path_factory.mktemp("run"), tiny_processor()

    def checkpoint(path: Path) -> None:
        tiny_model(processor).save_pretrained(path)
        processor.save_pretrained(path)

    write_folder(folder / "checkpoints" / "step-00000010", checkpoint)
    save_tiny_encoder(folder / "encoder")
    return folder


@pytest.fixture
def options(tmp_path) -> dict:
    return FAST | {"cache_dir": tmp_path / "cache"}


@pytest.mark.parametrize(
    ("encoder", "blocks", "expected"),
    [
        (12, 24, range(9, 16)),  # the paper's
        (6, 12, range(4, 9)),
        (24, 48, range(18, 31)),
        (5, 10, range(3, 8)),
        (4, 8, range(1, 9)),
        (3, 4, range(1, 5)),
    ],
)
def test_depth_is_swept_around_the_encoders_end_or_over_all_of_few_blocks(encoder, blocks, expected):
    assert depth_range(encoder, blocks) == list(expected)


@pytest.mark.parametrize(
    ("levels", "expected"), [(1000, [0, 10, 20, 40, 80]), (500, [0, 5, 10, 20, 40]), (10, [0, 1]), (1, [0])]
)
def test_timesteps_are_the_papers_shares_of_the_noise_levels(levels, expected):
    assert timestep_range(levels) == expected


def test_a_block_of_the_whole_network_is_that_block_of_the_model():
    model = tiny_model(tiny_processor())
    pixel_values = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        conditioning = model.ldae.timestep_embedding(torch.tensor([10]))
        tokens = model.ldae.network_input(model.ldae.tokenizer, model.ldae.tokenizer.encode(pixel_values))
        hidden_states = model.ldae.encode(tokens, conditioning, (4, 4))
        for layer in model.decoder.layers:
            hidden_states = layer(hidden_states, conditioning)
        expected = torch.nn.functional.layer_norm(hidden_states, (32,), eps=model.config.layer_norm_eps)
        found = whole_network(model)(pixel_values).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_a_depth_sweep_probes_each_block_of_a_run(run, dataset, options):
    row = run_depth_sweep(run, dataset, **options)
    points = row["points"]
    assert [(point["block"], point["part"]) for point in points] == [
        (1, "encoder"),
        (2, "encoder"),
        (3, "encoder"),
        (4, "decoder"),
    ]
    assert points[1]["paper_top1"] == 64.5 and "paper_top1" not in points[0]  # a half of all blocks, as 12 of 24
    assert row["encoder_blocks"] == 3 and row["blocks"] == 4 and "note" not in row
    train, test = (extract_features(run / "encoder", dataset, split, num_workers=0) for split in ("train", "test"))
    tensors = (train.features, train.labels, test.features, test.labels)
    alone = linear_probe(*tensors, epochs=3, learning_rates=(0.1, 1.0), progress=False)
    assert {key: points[2][key] for key in ("top1", "learning_rate")} == {
        key: alone[key] for key in ("top1", "learning_rate")
    }
    assert points[row["best"]]["held_out_top1"] == max(point["held_out_top1"] for point in points)
    assert row["top1"] == points[row["best"]]["top1"]


def test_all_blocks_take_one_forward_pass_of_a_batch(run, dataset, options, monkeypatch):
    calls, forward = [], LDAEModel.forward
    monkeypatch.setattr(LDAEModel, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    run_depth_sweep(run, dataset, batch_size=48, **options)
    assert len(calls) == 2 + 1  # batches of the two splits
    run_depth_sweep(run, dataset, batch_size=48, **options)
    assert len(calls) == 3  # the rest is in the cache


def test_of_an_encoder_alone_the_sweep_ends_at_its_last_block_and_says_so(run, dataset, options):
    row = run_depth_sweep(run / "encoder", dataset, **options)
    assert [point["block"] for point in row["points"]] == [1, 2, 3]
    assert row["note"] == "Only an encoder is here: the sweep ends at its last block, 3 of 4."
    assert row["note"] in sweep_table(row)
    with pytest.raises(ValueError, match="has the layers 1 ... 3, not 4|must be one of 1 ... 3"):
        run_depth_sweep(run / "encoder", dataset, blocks=[4], **options)


def test_a_timestep_sweep_probes_clean_and_noisy_input(run, dataset, options):
    row = run_timestep_sweep(run, dataset, **options)
    points = row["points"]
    assert [(point["noise"], point["timestep"]) for point in points] == [
        (noise, timestep) for noise in ("clean", "frozen") for timestep in (0, 10, 20, 40, 80)
    ]
    assert [point["paper_top1"] for point in points[:2]] == [64.1, 64.5] and points[6]["paper_top1"] == 65.0
    assert points[4]["sigma"] == pytest.approx(2**0.5 * 80 / 999, abs=1e-4)
    assert points[0]["top1"] == points[5]["top1"]  # at t = 0 there is no noise
    assert row["protocol"]["features"]["timestep"] == [0, 10, 20, 40, 80]
    for point in (points[4], points[9]):
        condition = {key: point[key] for key in ("timestep", "noise")}
        encoder = run / "encoder"
        train, test = (extract_features(encoder, dataset, s, **condition, num_workers=0) for s in ("train", "test"))
        tensors = (train.features, train.labels, test.features, test.labels)
        alone = linear_probe(*tensors, epochs=3, learning_rates=(0.1, 1.0), progress=False)
        assert point["held_out_top1"] == max(one["held_out_top1"] for one in alone["grid"])
        assert point["top1"] == alone["top1"]
    assert points[4] | {"noise": ""} != points[9] | {"noise": "", "paper_top1": 62.2}


def test_a_model_of_one_noise_level_has_one_timestep(dataset, options, tmp_path):
    processor = tiny_processor()
    torch.manual_seed(0)
    model = LDAEModel(LDAEConfig(**TINY, noise_schedule="single_level"))
    model.set_processor(processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    row = run_timestep_sweep(tmp_path, dataset, **options)
    assert [(point["timestep"], point["noise"]) for point in row["points"]] == [(0, "clean"), (0, "frozen")]
    assert "single_level has one noise level" in sweep_table(row)


def test_a_layer_sweep_is_a_grid_of_layers_and_pools(run, dataset, options):
    row = run_layer_sweep(run, dataset, **options)
    assert [(point["layer"], point["pool"]) for point in row["points"]] == [
        (layer, pool) for layer in (1, 2, 3) for pool in ("mean", "raw_mean")
    ]
    chosen = run_layer_sweep(run, dataset, layers=[2], pools=["mean"], **options)
    assert chosen["points"] == [row["points"][2]]
    given = run_layer_sweep(run, dataset, layers=[2], pools=["mean"], processor=run / "encoder", **options)
    assert f"--processor {run / 'encoder'}" in given["rerun"] and "--processor" not in chosen["rerun"]


@pytest.mark.parametrize("kind", ["depth", "timesteps", "layers"])
def test_the_stored_command_gives_the_row_again_with_its_table_and_figure(run, dataset, tmp_path, kind):
    arguments = ["--dataset", str(dataset), "--epochs", "2", "--learning-rate", "0.3", "--num-workers", "0"]
    arguments += {"depth": ["--block", "2"], "timesteps": ["--timestep", "40"], "layers": ["--layer", "3"]}[kind]

    def sweep(words: list[str], name: str) -> dict:
        files = ["--output", str(tmp_path / f"{name}.json"), "--figure", str(tmp_path / f"{name}.svg")]
        result = CliRunner().invoke(app, [*words, *files], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert "best on held-out samples" in result.stdout and (tmp_path / f"{name}.svg").stat().st_size
        return json.loads((tmp_path / f"{name}.json").read_text())

    first = sweep(["sweep", kind, str(run), *arguments], "first")
    again = sweep(shlex.split(first["rerun"])[1:], "again")
    assert again["points"] == first["points"] and again["protocol"] == first["protocol"]
    assert again["rerun"] == first["rerun"]


def test_words_of_a_figure_have_at_least_seven_points(run, dataset, options, tmp_path):
    for number, row in enumerate([run_depth_sweep(run, dataset, **options), run_layer_sweep(run, dataset, **options)]):
        text = sweep_figure(row, tmp_path / f"{number}.svg").read_text()
        assert 'width="237.6pt"' in text  # 3.3 inches
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", text)]
        assert sizes and min(sizes) >= 7


def test_a_folder_without_a_model_is_refused(dataset, options, tmp_path):
    with pytest.raises(ValueError, match="is no folder of an l-DAE run, checkpoint or encoder"):
        run_depth_sweep(tmp_path, dataset, **options)


def test_a_stack_says_whether_the_decoder_is_there(run):
    whole, alone = load_stack(run), load_stack(run / "encoder")
    assert whole.is_whole and len(whole.model.layers) == 4 and not alone.is_whole and len(alone.model.layers) == 3
    assert whole.num_encoder_blocks == alone.num_encoder_blocks == 3 and whole.num_blocks == alone.num_blocks == 4
