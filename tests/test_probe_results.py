"""Linear probes of recipes out of a ledger: which count, and what a cell says of several seeds."""

import json

import pytest
from typer.testing import CliRunner

from ldae_hf.cli import app
from ldae_hf.evaluation.intervals import t_interval
from ldae_hf.evaluation.probe_results import ProbeResult, last_of_each_seed, probe_cells


@pytest.fixture
def ledger(tmp_path):
    """Writes results, one JSON line each, and returns the file."""

    def write(*rows):
        file = tmp_path / "ledger.jsonl"
        file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        return file

    return write


def result(top1, encoder, recipe="l_dae", tier="cpu", timestep=10, noise="clean", dataset="cifar10", **more):
    features = {"encoder": encoder, "timestep": timestep, "noise": noise}
    protocol = {"features": features, "train": {"dataset": dataset}}
    return {"task": "linear_probe", "recipe": recipe, "tier": tier, "top1": top1, "protocol": protocol} | more


def trained(seed, dataset="cifar10"):
    return {"training": {"seed": seed, "dataset": dataset}}


def test_a_cell_is_the_mean_over_seeds_with_half_of_its_interval(ledger):
    file = ledger(
        result(41.0, "a", **trained(0)),
        result(42.0, "b", **trained(1)),
        result(43.0, "c", **trained(2)),
        result(60.0, "d", tier="desk", **trained(0)),
        result(61.0, "e", tier=None, **trained(0)),
        result(1.0, "f", "flip", **trained(0)),
    )
    cells = probe_cells(file)
    half_width = t_interval([41.0, 42.0, 43.0]).half_width
    assert cells["l_dae"] == [f"cpu 42.0 ±{half_width:.1f} (3)", "desk 60.0 (1)", "full size 61.0 (1)"]
    assert cells["flip"] == ["cpu 1.0 (1)"] and cells["single_level"] == []


def test_a_seed_that_was_trained_twice_counts_once_as_it_was_measured_last(ledger):
    first, again, other = (result(top1, name, **trained(0)) for top1, name in ((40.0, "a"), (44.0, "b"), (41.0, "a")))
    assert probe_cells(ledger(first, again))["l_dae"] == ["cpu 44.0 (1)"]
    assert probe_cells(ledger(first, again, other))["l_dae"] == ["cpu 41.0 (1)"]
    of_no_seed = ProbeResult(1.0, {}, "cifar10")
    assert len(last_of_each_seed({"a": of_no_seed, "b": of_no_seed})) == 2


def test_what_was_not_measured_as_the_recipe_says_does_not_count(ledger):
    others = [
        result(1.0, "b", task="knn"),
        result(1.0, "c", overrides=["train.epochs=2"]),
        result(1.0, "d", timestep=20),
        result(1.0, "e", noise="frozen"),
        result(1.0, "f", recipe="mine"),
        result(1.0, "g", recipe=None),
        result(1.0, "h", **trained(0, dataset="imagenette128")),
        {"task": "fid", "recipe": "l_dae", "tier": "cpu"},
    ]
    file = ledger("\n", *others, result(2.0, "a"), result(41.0, "a", overrides=[]))
    assert probe_cells(file)["l_dae"] == ["cpu 41.0 (1)"]
    assert probe_cells(ledger(result(50.0, "a", recipe="single_level", timestep=0)))["single_level"] == ["cpu 50.0 (1)"]


def test_a_row_that_is_no_result_is_named_and_a_broken_line_left_out_with_a_warning(ledger):
    no_result = {"task": "linear_probe", "recipe": "l_dae", "tier": "cpu"}
    with pytest.raises(ValueError, match="ledger.jsonl: row 2 is no result"):
        probe_cells(ledger(result(41.0, "a"), no_result))
    for line in ("{", "[]", "3"):
        with pytest.warns(UserWarning, match="line 2 is no row of a ledger"):
            assert probe_cells(ledger(result(41.0, "a"), line))["l_dae"] == ["cpu 41.0 (1)"]


def test_the_tree_of_recipes_shows_the_results_of_a_ledger(ledger):
    file = ledger(result(41.0, "a", **trained(0)))
    shown = CliRunner().invoke(app, ["recipes", "tree", "--ledger", str(file)])
    assert shown.exit_code == 0 and "cpu 41.0 (1)" in shown.stdout and f"ours: {file};" in shown.stdout
    refused = CliRunner().invoke(app, ["recipes", "tree", "--ledger", str(file.with_name("absent.jsonl"))])
    assert refused.exit_code == 2 and "There is no ledger" in refused.stderr
