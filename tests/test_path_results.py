"""Probe and distance of the same encoders along the path: never a table of distances that cannot be compared."""

import copy
import json
import re
from pathlib import Path

import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from ldae_hf.cli import app
from ldae_hf.evaluation.figures import path_figure, save_figure
from ldae_hf.evaluation.ledger import read_ledger
from ldae_hf.evaluation.path_results import choose_group, path_groups, path_text
from ldae_hf.recipes import load_recipe


COMMITTED = Path(__file__).parent.parent / "benchmarks" / "results" / "ledger.jsonl"
PATH = load_recipe("l_dae").steps


def probe_row(recipe: str, encoder: str, top1: float, **changes) -> dict:
    features = {"encoder": encoder, "timestep": 10, "noise": "clean"}
    row = {"task": "linear_probe", "recipe": recipe, "tier": "cpu", "overrides": [], "top1": top1}
    return row | {"protocol": {"features": features, "train": {"dataset": "cifar10"}}} | changes


def distance_row(
    recipe: str, encoder: str, distance: float, count: int = 10_000, extractor: str = "a", **changes
) -> dict:
    extractor = {"name": "classifier of cifar10", "layer": "mean of last stage", "fingerprint": extractor * 64}
    reference = {"dataset": "cifar10", "split": "train", "images": 50_000, "image_size": 32}
    samples = {"count": count, "sampler": "ancestral", "steps": 250, "guidance": 1.0, "seed": 0}
    protocol = {
        "extractor": extractor,
        "reference": reference | {"preprocessing": "centre crop, bicubic"},
        "samples": samples | {"dtype": "float32", "weights": "raw"},
        "encoder": encoder,
    }
    floors = {"real": 1.25, "reconstruction": distance / 2, "noise": 400.0}
    row = {"task": "frechet_distance", "recipe": recipe, "tier": "cpu", "overrides": []}
    row |= {"frechet_distance": distance, "protocol": protocol}
    return row | {"floors": {name: {"frechet_distance": value} for name, value in floors.items()}} | changes


ROWS = [
    probe_row("dit_baseline", "e1", 40.0),
    probe_row("l_dae", "e2", 50.0),
    probe_row("l_dae", "e3", 52.0),
    probe_row("l_dae", "e4", 99.0),  # of an encoder without a distance
    probe_row("patch_pca", "e5", 47.0),
    distance_row("dit_baseline", "e1", 20.0),
    distance_row("l_dae", "e2", 100.0),
    distance_row("l_dae", "e3", 110.0),
    distance_row("replace_noise_schedule", "e6", 60.0),
]


@pytest.fixture
def ledger(tmp_path):
    def write(*rows: dict):
        file = tmp_path / "ledger.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return write


def cells(text: str, first: str) -> list[str]:
    """Of the row of a markdown table that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_numbers_of_the_same_encoders_stand_in_one_row_beside_the_papers(ledger):
    (group,) = path_groups(ledger(*ROWS), "cpu")
    text = path_text(group, markdown=True)
    assert [step.recipe for step in group.steps] == list(PATH)
    assert cells(text, "`dit_baseline`") == ["`dit_baseline`", "57.5", "11.6", "40.0 (1)", "20.0 (1)"]
    assert cells(text, "`l_dae`") == ["`l_dae`", "64.5", "", "51.0 ±12.7 (2)", "105.0 ±63.5 (2)"]


def test_what_was_not_measured_is_an_empty_cell(ledger):
    text = path_text(path_groups(ledger(*ROWS), "cpu")[0], markdown=True)
    assert cells(text, "`patch_pca`")[3:] == ["47.0 (1)", ""]
    assert cells(text, "`replace_noise_schedule`") == ["`replace_noise_schedule`", "63.4", "93.2", "", "60.0 (1)"]
    assert cells(text, "`retrain_vqgan`")[1:] == ["", "", "", ""]


def test_a_table_names_its_number_without_a_seed_and_ends_with_the_floors(ledger):
    (group,) = path_groups(ledger(*ROWS), "cpu")
    for markdown in (False, True):
        first, *_, real, reconstruction, noise = path_text(group, markdown).splitlines()
        assert first.startswith("FD-10K (classifier of cifar10 aaaaaaaa, mean of last stage; reference cifar10 train")
        assert "seed" not in first and "250 steps" in first
        assert "floor: real" in real and "1.2" in real and "..." not in real
        assert "10.0 ... 55.0" in reconstruction and "400.0" in noise


def changed(row: dict, section: str, **values) -> dict:
    row = copy.deepcopy(row)
    row["protocol"][section] |= values
    return row


def test_distances_that_cannot_be_compared_never_share_a_table(ledger):
    other = distance_row("l_dae", "e2", 7.0)
    others = [
        distance_row("l_dae", "e2", 7.0, extractor="b"),
        distance_row("l_dae", "e2", 7.0, count=5000),
        changed(other, "samples", sampler="deterministic"),
        changed(other, "samples", weights="ema"),
        changed(other, "reference", split="test"),
    ]
    groups = path_groups(ledger(*ROWS, *others), "cpu")
    assert len(groups) == 6 and len({group.label for group in groups}) == 6
    assert groups[0] == path_groups(ledger(*ROWS), "cpu")[0]
    for group in groups[1:]:
        measured = [step for step in group.steps if step.distance]
        assert [(step.recipe, step.distance, step.top1) for step in measured] == [("l_dae", [7.0], [50.0])]


def test_another_seed_of_the_samples_is_the_same_measure_and_an_encoders_last_one_counts(ledger):
    again = changed(distance_row("dit_baseline", "e1", 22.0), "samples", seed=1)
    (group,) = path_groups(ledger(*ROWS, again), "cpu")
    assert group.steps[0].distance == [22.0]


def test_results_that_are_not_the_recipes_do_not_count(ledger):
    features, data = {"encoder": "e6", "timestep": 10, "noise": "clean"}, {"dataset": "cifar10"}
    noisy = {"features": features | {"noise": "frozen by sample id, seed 0"}, "train": data}
    elsewhere = {"features": features, "train": {"dataset": "imagenette128"}}
    rows = [
        probe_row("replace_noise_schedule", "e6", 1.0, overrides=["train.epochs=1"]),
        probe_row("replace_noise_schedule", "e6", 1.0, tier="desk"),
        probe_row("replace_noise_schedule", "e6", 1.0, protocol=noisy),
        probe_row("replace_noise_schedule", "e6", 1.0, protocol=elsewhere),
        probe_row("size_b", "e7", 1.0),
        distance_row("dit_baseline", "e1", 1.0, overrides=["train.epochs=1"]),
        {"task": "knn", "recipe": "l_dae", "tier": "cpu", "overrides": [], "top1": 1.0},
        {"task": "import_time", "seconds": 1.0},
    ]
    assert path_groups(ledger(*ROWS, *rows), "cpu") == path_groups(ledger(*ROWS), "cpu")


def test_a_ledger_without_distances_at_the_tier_says_where_there_are_some(ledger, tmp_path):
    with pytest.raises(
        ValueError, match="no Fréchet distances of the path's recipes at full size; there are some at cpu"
    ):
        path_groups(ledger(*ROWS))
    with pytest.raises(ValueError, match="at cpu; measure some with `ldae fid --ledger`"):
        path_groups(ledger(*ROWS[:5]), "cpu")
    with pytest.raises(ValueError, match="There is no ledger"):
        path_groups(tmp_path / "absent.jsonl")
    broken = distance_row("l_dae", "e2", 1.0)
    del broken["protocol"]["samples"]
    with pytest.raises(ValueError, match="row 10 is no result"):
        path_groups(ledger(*ROWS, broken), "cpu")


def test_the_command_prints_every_group_and_draws_the_one_that_is_chosen(ledger, tmp_path):
    file = ledger(*ROWS, distance_row("l_dae", "e2", 7.0, extractor="b"))

    def results_path(*more):
        return CliRunner().invoke(app, ["results", "path", "--ledger", str(file), "--tier", "cpu", *map(str, more)])

    both = results_path().stdout
    assert "1. FD-10K (classifier of cifar10 aaaaaaaa" in both and "2. FD-10K (classifier of cifar10 bbbbbbbb" in both
    refused = results_path("--figure", tmp_path / "a.png")
    assert refused.exit_code == 2 and not (tmp_path / "a.png").exists()
    assert "choose a group: 1: FD-10K" in refused.stderr and "; 2: FD-10K" in refused.stderr
    chosen = results_path("--figure", tmp_path / "a.png", "--group", 2)
    assert chosen.exit_code == 0 and "1. FD-10K" not in chosen.stdout and "2. FD-10K" in chosen.stdout
    height, width, _ = imread(tmp_path / "a.png").shape
    assert width > 2 * 3.3 * 150 and height > 300
    assert results_path("--group", 3).exit_code == 2


def test_the_figure_has_words_of_at_least_7_points_and_a_line_for_the_reconstructions(ledger, tmp_path):
    (group,) = path_groups(ledger(*ROWS), "cpu")
    text = save_figure(path_figure(choose_group([group])), tmp_path / "path.svg").read_text()
    for words in ("linear probe, top-1 (%)", "FID-50K", "FD-10K", "dit baseline", "l dae", "reconstruction"):
        assert words in text
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: (?:[a-z]+ )?([\d.]+)px", text)]
    assert sizes and min(sizes) >= 7
    assert "stroke-dasharray" in text
    for step in group.steps:
        step.floors.clear()
    assert "reconstruction" not in save_figure(path_figure(group), tmp_path / "bare.svg").read_text()


def test_every_distance_that_is_committed_lies_between_real_images_and_noise():
    rows = [row for row in read_ledger(COMMITTED) if row["task"] == "frechet_distance"]
    assert len(rows) >= 18
    for row in rows:
        real, noise = (row["floors"][name]["frechet_distance"] for name in ("real", "noise"))
        assert real < row["frechet_distance"] < noise, row["name"]
