"""Runs side by side: means and gaps over seeds with their intervals, and never numbers of two protocols in one row."""

import copy
import json
import math
import re
import shutil
from pathlib import Path

import pytest
from matplotlib.image import imread
from scipy.stats import t
from tiny_encoder import save_tiny_encoder
from typer.testing import CliRunner

from ldae_hf.cli import app
from ldae_hf.evaluation.comparison import compare
from ldae_hf.evaluation.comparison_text import comparison_text
from ldae_hf.evaluation.groups import encoder_fingerprint
from ldae_hf.evaluation.ledger import read_ledger


COMMITTED = Path(__file__).parent.parent / "benchmarks" / "results" / "ledger.jsonl"
RATE = "train.base_learning_rate"


def row(recipe: str, seed: int, top1: float, /, *, task: str = "linear_probe", **changes) -> dict:
    """A row in the form of the committed ledger; a change of `a__b` is one of row["protocol"]["a"]["b"]."""
    fingerprint = f"{recipe}-{seed}-{changes.get('overrides') or []}"
    split = {"dataset": "cifar10", "bad_images": 0}
    features = {"encoder": fingerprint, "processor": "p", "library": "ldae_hf", "mean": [0.5] * 3, "std": [0.5] * 3}
    features |= {"layer": "last", "pool": "mean over tokens, after LayerNorm without affine", "timestep": 10}
    if recipe.startswith("mae"):
        features |= {"library": "transformers", "norm": "the model's final norm", "timestep": None, "mean": [0.48] * 3}
        features["pool"] = "mean over tokens, after the model's final norm"
    protocol = {
        "features": features | {"noise": "clean", "dtype": "float32"},
        "image_size": 32,
        "preprocessing": f"centre crop, bicubic; mean {features['mean']}, std {features['std']}",
        "train": split | {"split": "train", "images": 50_000, "fingerprint": "a"},
        "test": split | {"split": "test", "images": 10_000, "fingerprint": "b"},
        "floors_seed": 0,
        task: {"epochs": 90, "batch_size": 512, "seed": 0} if task != "knn" else {"similarity": "cosine", "k": 20},
    }
    found = {
        "recipe": recipe,
        "tier": "cpu",
        "overrides": [],
        "training": {"seed": seed, "steps": 1560, "images_seen": 199_680},
        "task": task,
        "name": f"runs/{recipe}-{seed}/encoder",
        "top1": top1,
        "floors": {"raw pixels": {"top1": 39.0}, "untrained encoder": {"top1": 30.0 + seed}},
        "protocol": protocol,
        "command": f"ldae probe runs/{recipe}-{seed}/encoder",
        "machine": {"cpu": "a processor", "gpu": None},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            protocol[section][name] = value
        else:
            found[key] = value
    return copy.deepcopy(found)


L_DAE = [row("l_dae", seed, top1) for seed, top1 in enumerate([44.0, 46.0, 45.0])]
MAE = [row("mae", seed, top1) for seed, top1 in enumerate([47.0, 48.5, 49.0])]


def only(sources: list[str], rows: list[dict], **options):
    [comparison] = compare(sources, rows, tier="cpu", **options)
    return comparison


def cells(comparison, first: str) -> list[str]:
    """Of the row of its markdown table that begins so."""
    lines = comparison_text(comparison, markdown=True).splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_has_floors_means_with_intervals_and_the_gap_paired_by_seed():
    comparison = only(["l_dae", "mae"], [*L_DAE, *MAE])
    first, second = t.ppf(0.975, 2) * 1.0 / 3**0.5, t.ppf(0.975, 2) * 1.040833 / 3**0.5
    gap = t.ppf(0.975, 2) * 0.763763 / 3**0.5  # of 3.0, 2.5 and 4.0
    assert cells(comparison, "linear probe") == [
        "linear probe",
        "39.0",
        "30.0 ... 32.0",
        f"45.0 ±{first:.1f} (3)",
        f"48.2 ±{second:.1f} (3)",
        f"+3.2 ±{gap:.1f} (3)",
    ]
    assert comparison.floors == ["raw pixels", "untrained encoder"]


def test_what_belongs_to_the_encoder_may_differ_and_so_may_the_files_of_the_images():
    other = [row("mae", 0, 47.0, test__fingerprint="of another copy", linear_probe__seed=5)]
    comparison = only(["l_dae", "mae"], [*L_DAE, *other])  # another library, norm, mean and std, no timestep
    assert len(comparison.lines) == 1
    assert "read from several files" in comparison_text(comparison)
    assert "read from several files" not in comparison_text(only(["l_dae", "mae"], [*L_DAE, *MAE]))


def test_several_pools_of_one_probe_are_compared_without_the_norms_too():
    pools = {
        name: [f"mean over tokens, {place} {norm}" for place in ("after", "before")]
        for name, norm in (("l_dae", "LayerNorm without affine"), ("mae", "the model's final norm"))
    }
    rows = [row(name, 0, 45.0, features__pool=pools[name]) for name in pools]
    assert only(["l_dae", "mae"], rows).lines[0].values == [{0: 45.0}, {0: 45.0}]
    with pytest.raises(ValueError, match="features.pool"):
        only(["l_dae", "mae"], [rows[0], row("mae", 0, 45.0)])


@pytest.mark.parametrize(
    ("change", "key", "values"),
    [
        ({"linear_probe__epochs": 30}, "linear_probe.epochs", "is 90 and 30"),
        ({"features__pool": "class token, after the model's final norm"}, "features.pool", '"class token, after"'),
        ({"features__layer": 4}, "features.layer", 'is "last" and 4'),
        ({"features__dtype": "bfloat16"}, "features.dtype", 'is "float32" and "bfloat16"'),
        ({"features__noise": "frozen by sample id, seed 0"}, "features.noise", "frozen by sample id"),
        ({"features__timestep": 40}, "features.timestep", 'is "the recipe\'s" and 40'),
        ({"train__images": 5000}, "train.images", "is 50000 and 5000"),
        ({"linear_probe__augmentation": "flip"}, "linear_probe.augmentation", 'is not recorded and "flip"'),
    ],
)
def test_numbers_of_two_protocols_are_refused_with_the_key_both_values_and_both_commands(change, key, values):
    with pytest.raises(ValueError) as refused:
        only(["l_dae", "mae"], [*L_DAE, row("mae", 0, 47.0, **change)])
    message = str(refused.value)
    assert f"{key} {values}" in message or key in message and values in message
    assert "`ldae probe runs/l_dae-0/encoder`" in message and "`ldae probe runs/mae-0/encoder`" in message
    assert "Measure one of them again" in message


def test_a_stored_rerun_is_the_command_that_a_refusal_names():
    with pytest.raises(ValueError, match="ldae probe runs/mae-0/encoder --epochs 30 --seed 0"):
        other = row("mae", 0, 47.0, linear_probe__epochs=30, rerun="ldae probe runs/mae-0/encoder --epochs 30 --seed 0")
        only(["l_dae", "mae"], [*L_DAE, other])


def test_of_two_protocols_the_shared_one_counts_and_what_is_left_out_is_said():
    more = [row("mae", 0, 99.0, linear_probe__epochs=30)]
    comparison = only(["l_dae", "mae"], [*L_DAE, *MAE, *more])
    assert comparison.lines == only(["l_dae", "mae"], [*L_DAE, *MAE]).lines
    assert comparison.notes == ["linear probe: 1 of mae under another protocol left out"]


def test_few_shot_has_a_row_for_each_share_of_the_labels_with_the_floors_of_that_share():
    shares = {"fractions": [{"fraction": 0.01}, {"fraction": 0.1}], "top1_10_percent": 40.0}
    floors = {"raw pixels": {"top1": 20.0, "top1_1_percent": 20.0, "top1_10_percent": 30.0}}
    rows = [row(name, 0, 25.0, task="few_shot", **shares, floors=floors) for name in ("l_dae", "mae")]
    rows = [one | {"top1_1_percent": 25.0} for one in rows]
    few, more = only(["l_dae", "mae"], rows).lines
    assert (few.name, few.values[0], few.floors) == ("few-shot, 1 %", {0: 25.0}, {"raw pixels": [20.0, 20.0]})
    assert (more.name, more.values[0], more.floors) == ("few-shot, 10 %", {0: 40.0}, {"raw pixels": [30.0, 30.0]})


def test_several_shared_protocols_are_rows_that_name_what_they_differ_in():
    rows = [row(name, 0, 40.0 + k, task="knn", knn__k=k) for name in ("l_dae", "mae") for k in (5, 20)]
    names = [line.name for line in only(["l_dae", "mae"], rows).lines]
    assert names == ["k-NN, k 5", "k-NN, k 20"]


def test_a_task_of_one_group_only_is_named_and_has_no_row():
    comparison = only(["l_dae", "mae"], [*L_DAE, *MAE, row("mae", 0, 40.0, task="knn")])
    assert [line.name for line in comparison.lines] == ["linear probe"]
    assert comparison.notes == ["k-NN: only of mae"]


def test_tasks_can_be_chosen_which_leaves_a_refused_one_out():
    rows = [*L_DAE, *MAE, row("l_dae", 0, 40.0, task="knn"), row("mae", 0, 40.0, task="knn", knn__k=5)]
    with pytest.raises(ValueError, match=r"k-NN of l_dae and mae .* knn.k is 20 and 5"):
        only(["l_dae", "mae"], rows)
    assert len(only(["l_dae", "mae"], rows, tasks=["linear_probe"]).lines) == 1
    with pytest.raises(ValueError, match="--task probe is not one of linear_probe"):
        only(["l_dae", "mae"], rows, tasks=["probe"])


def test_the_last_result_of_an_encoder_counts_and_of_one_seed_the_encoder_measured_last():
    again = row("l_dae", 0, 44.5)
    assert only(["l_dae", "mae"], [*L_DAE, *MAE, again]).lines[0].values[0] == {0: 44.5, 1: 46.0, 2: 45.0}
    retrained = row("l_dae", 0, 50.0, features__encoder="trained again")
    comparison = only(["l_dae", "mae"], [*L_DAE, *MAE, retrained])
    assert comparison.lines[0].values[0] == {0: 50.0, 1: 46.0, 2: 45.0}
    assert comparison.notes == ["l_dae: seed 0 was trained twice; the encoder measured last counts"]


def test_one_seed_has_the_interval_of_its_test_images_and_the_table_says_that_it_is_not_one_of_seeds():
    comparison = only(["l_dae", "mae"], [*L_DAE, MAE[1]])
    *_, mean, gap = cells(comparison, "linear probe")
    assert mean == "48.5 [47.5, 49.5] (1)" and gap == "+2.5 (1)"
    assert "one seed's test images alone and says nothing about seeds" in comparison_text(comparison)
    assert "Wilson" not in comparison_text(only(["l_dae", "mae"], [*L_DAE, *MAE]))


def test_groups_without_a_seed_in_common_have_an_unpaired_gap_without_an_interval():
    *_, gap = cells(only(["l_dae", "mae"], [*L_DAE[:2], row("mae", 7, 48.0)]), "linear probe")
    assert gap == "+3.0 (unpaired)"


def test_an_override_is_a_group_of_its_own_however_its_number_is_written():
    fast = [row("mae", seed, 50.0, overrides=[f"{RATE}=2.0e-3"]) for seed in (0, 1)]
    comparison = only(["l_dae", f"mae+{RATE}=0.002"], [*L_DAE, *MAE, *fast])
    assert comparison.lines[0].values[1] == {0: 50.0, 1: 50.0}
    assert only(["l_dae", "mae"], [*L_DAE, *MAE, *fast]).lines[0].values[1] == {0: 47.0, 1: 48.5, 2: 49.0}
    with pytest.raises(ValueError, match="write an override as"):
        only(["l_dae", "mae+fast"], [*L_DAE, *MAE])


def probe(recipe: str, seed: int, top1: float, held_out: float, rate: str | None = None) -> dict:
    entries = [{"learning_rate": 0.1, "held_out_top1": held_out}, {"learning_rate": 1.0, "held_out_top1": 1.0}]
    overrides = [f"{RATE}={rate}"] if rate else []
    return row(recipe, seed, top1, overrides=overrides, learning_rate=0.1, learning_rates=entries)


def test_choosing_takes_the_value_that_is_best_on_held_out_images_for_every_task_and_says_so():
    rows = [probe("mae", 0, top1=60.0, held_out=40.0), probe("mae", 0, top1=50.0, held_out=48.0, rate="3.0e-3")]
    rows += [probe("mae", 1, top1=51.0, held_out=46.0, rate="0.003"), probe("l_dae", 0, 45.0, 44.0)]
    rows += [row("mae", 0, 33.0, task="knn", overrides=[f"{RATE}=3.0e-3"]), row("mae", 0, 99.0, task="knn")]
    rows += [row("l_dae", 0, 30.0, task="knn")]
    comparison = only(["l_dae", "mae"], rows, choose=RATE)
    values = {line.name: line.values for line in comparison.lines}
    assert values["linear probe"][1] == {0: 50.0, 1: 51.0}  # not the 60 % that the test images would choose
    assert values["k-NN"][1] == {0: 33.0}
    (said,) = [note for note in comparison.notes if note.startswith("mae:")]
    assert f"{RATE} = 0.003 of " in said and "0.003 (48.0 %)" in said and "(40.0 %)" in said and "n = 1" in said


def test_choosing_compares_the_values_on_the_seeds_that_all_of_them_have():
    slow = [probe("mae", seed, 50.0, held_out) for seed, held_out in ((0, 48.0), (1, 40.0), (2, 40.0))]
    fast = [probe("mae", 0, 50.0, 47.0, "3.0e-3")]  # better than the mean of the others, worse for its own seed
    comparison = only(["l_dae", "mae"], [probe("l_dae", 0, 45.0, 44.0), *slow, *fast], choose=RATE)
    assert comparison.lines[0].values[1] == {0: 50.0, 1: 50.0, 2: 50.0}
    with pytest.raises(ValueError, match="have no seed in common"):
        only(["l_dae", "mae"], [probe("l_dae", 0, 45.0, 44.0), *slow[1:], *fast], choose=RATE)


def test_latents_of_an_encoder_without_its_own_are_the_floor_of_those_with():
    ours, theirs = row("l_dae", 0, 45.0), row("mae", 0, 47.0)
    ours["floors"], theirs["floors"] = {"PCA latents": {"top1": 40.0}}, {"PCA latents, K = 16": {"top1": 41.0}}
    [line] = only(["l_dae", "mae"], [ours, theirs]).lines
    assert list(line.floors) == ["PCA latents"] and set(line.floors["PCA latents"]) == {40.0, 41.0}


def test_choosing_reads_the_grid_of_a_probe_over_several_features_too():
    slow, fast = (probe("mae", 0, 50.0, held_out, rate) for held_out, rate in ((40.0, None), (48.0, "3.0e-3")))
    for one, best in ((slow, 40.0), (fast, 48.0)):
        del one["learning_rates"]
        one["grid"] = [{"features": "last/mean", "held_out_top1": value} for value in (1.0, best)]
    comparison = only(["l_dae", "mae"], [probe("l_dae", 0, 45.0, 44.0), slow, fast], choose=RATE)
    assert f"mae: {RATE} = 0.003 of" in " ".join(comparison.notes)


def test_choosing_among_values_that_were_measured_differently_is_refused():
    slow, fast = probe("mae", 0, 50.0, 40.0), probe("mae", 0, 50.0, 48.0, "3.0e-3")
    fast["protocol"]["linear_probe"]["epochs"] = 30
    with pytest.raises(ValueError, match="share no protocol"):
        only(["l_dae", "mae"], [probe("l_dae", 0, 45.0, 44.0), slow, fast], choose=RATE)
    with pytest.raises(ValueError, match="mae has no linear probe by which"):
        only(["l_dae", "mae"], [probe("l_dae", 0, 1.0, 1.0), row("mae", 0, 1.0, task="knn")], choose=RATE)


def test_floors_that_have_rows_of_their_own_stand_beside_the_encoders_of_their_protocol():
    rows = [row(name, 0, 50.0, task="full_linear_probe", floors={}) for name in ("l_dae", "mae")]
    pixels = row("", 0, 38.0, task="full_linear_probe", recipe=None, tier=None, training=None, floors={})
    pixels["protocol"]["features"] = {"floor": "raw pixels", "fingerprint": "raw_pixels size=32"}
    other = copy.deepcopy(pixels) | {"top1": 1.0}
    other["protocol"]["full_linear_probe"]["epochs"] = 1
    comparison = only(["l_dae", "mae"], [*rows, pixels, other])
    assert comparison.lines[0].floors == {"raw pixels": [38.0]}


def test_fine_tuning_from_scratch_is_a_floor_and_no_result_of_its_recipe():
    rows = [row(name, 0, 80.0, task="fine_tune", floors={}, fine_tune__layer_decay=0.85) for name in ("l_dae", "mae")]
    scratch = row("mae", 0, 60.0, task="fine_tune", floors={}, fine_tune__layer_decay=1.0)
    comparison = only(["l_dae", "mae"], [*rows, scratch | {"model": {"start": "new weights"}}])
    assert comparison.lines[0].values == [{0: 80.0}, {0: 80.0}]
    assert comparison.lines[0].floors == {"from scratch": [60.0]}


def test_budgets_tell_epochs_from_flops():
    comparison = only(["l_dae", "mae"], [*L_DAE, *MAE])
    first, second = comparison.budgets
    assert first.startswith("l_dae: seeds 0, 1, 2; 4 epochs; 199,680 images seen; ")
    assert first.endswith("measured on a processor; features at t = 10")
    flops = [float(re.search(r"([\d.e+]+) training FLOPs", sentence)[1]) for sentence in (first, second)]
    assert flops[1] < flops[0]  # MAE's encoder sees a quarter of the patches
    short = row("mae", 3, 40.0, training={"seed": 3, "images_seen": 1000})
    assert "1,000 or 199,680 images seen" in only(["l_dae", "mae"], [*L_DAE, *MAE, short]).budgets[1]


def test_every_data_set_that_all_groups_share_has_a_table_of_its_own():
    elsewhere = [row(name, 0, 60.0, test__dataset="data/imagenette128") for name in ("l_dae", "mae")]
    one_only = [row("mae", 0, 60.0, test__dataset="faces")]
    found = compare(["l_dae", "mae"], [*L_DAE, *MAE, *elsewhere, *one_only], tier="cpu")
    assert [comparison.dataset for comparison in found] == ["cifar10", "data/imagenette128"]
    assert (
        only(["l_dae", "mae"], [*L_DAE, *elsewhere, *MAE], dataset="imagenette128").lines[0].values == [{0: 60.0}] * 2
    )


def test_errors_say_what_there_is():
    with pytest.raises(
        ValueError, match=r"no rows of size_b at tier cpu. There are some of: l_dae \(cpu\), mae \(cpu\)"
    ):
        only(["l_dae", "size_b"], [*L_DAE, *MAE])
    with pytest.raises(ValueError, match="unheard is neither a recipe, nor a folder of a run, nor the name"):
        only(["l_dae", "unheard"], L_DAE)
    with pytest.raises(ValueError, match="rows of these groups at cpu, desk; choose one of them with --tier"):
        compare(["l_dae", "mae"], [*L_DAE, *MAE, row("mae", 0, 1.0, tier="desk")])
    with pytest.raises(ValueError, match="l_dae: linear_probe on cifar10; mae: knn on cifar10"):
        only(["l_dae", "mae"], [*L_DAE, row("mae", 0, 1.0, task="knn")])
    with pytest.raises(ValueError, match="l_dae is given twice"):
        only(["l_dae", "l_dae"], L_DAE)
    broken = row("mae", 0, 1.0)
    del broken["protocol"]["features"]
    with pytest.raises(ValueError, match="Row 4 is no linear_probe as our commands write it"):
        only(["l_dae", "mae"], [*L_DAE, broken])


@pytest.mark.parametrize("number", [math.inf, math.nan, -5.0, 10**400, "many", None])
def test_a_number_that_is_no_percentage_is_refused(number):
    rows = [row("l_dae", 0, 44.0), row("mae", 0, number)]
    with pytest.raises(ValueError, match="Row 2 is no linear_probe as our commands write it"):
        only(["l_dae", "mae"], rows)
    with pytest.raises(ValueError, match="Row 2 is no linear_probe as our commands write it"):
        only(["l_dae", "mae"], [rows[0], row("mae", 0, 1.0, training={"seed": [0]})])
    if number is not None:
        with pytest.raises(ValueError, match="Row 2 is no linear_probe as our commands write it"):
            only(["l_dae", "mae"], [rows[0], row("mae", 0, 1.0, floors={"raw pixels": {"top1": number}})])


def test_choosing_by_a_key_that_nobody_knows_is_refused():
    rows = [probe("mae", 0, 60.0, 40.0), probe("l_dae", 0, 45.0, 44.0)]
    with pytest.raises(ValueError, match="No linear probe of l_dae says its train.learning_rat"):
        only(["l_dae", "mae"], rows, choose="train.learning_rat")


def test_an_encoder_from_elsewhere_is_named_as_it_was_evaluated():
    stranger = row("mae", 0, 70.0, recipe=None, tier=None, overrides=None, training=None, name="timm:vit_small")
    comparison = only(["l_dae", "timm:vit_small"], [*L_DAE, stranger])
    *_, mean, gap = cells(comparison, "linear probe")
    assert mean.startswith("70.0 [") and gap == "+25.0 (unpaired)"
    assert comparison.budgets[1] == "timm:vit_small: encoder mae-0-[]; measured on a processor"


def test_three_seeds_of_the_committed_ledger_give_the_published_means():
    comparison = only(["dit_baseline", "remove_class_labels"], read_ledger(COMMITTED))
    *_, first, second, gap = cells(comparison, "linear probe")
    assert first == "46.7 ±0.8 (3)" and second == "47.3 ±1.4 (3)" and gap == "+0.6 ±2.2 (3)"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs' folders with an encoder and a log each, and a ledger with a row for each encoder."""
    folder = tmp_path_factory.mktemp("runs")
    save_tiny_encoder(folder / "one" / "encoder")
    shutil.copytree(folder / "one", folder / "two")
    config = json.loads((folder / "two" / "encoder" / "config.json").read_text())
    (folder / "two" / "encoder" / "config.json").write_text(json.dumps(config | {"feature_timestep": 40}))
    for seed, name in enumerate(("one", "two")):
        lines = [{"step": step, "epoch": step / 10, "loss": 1 / step} for step in (10, 20, 30)]
        lines.append({"step": 30, "probe_top1": 40.0 + seed})
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        row("l_dae", seed, 45.0 + seed, features__encoder=encoder_fingerprint(folder / name))
        for seed, name in enumerate(("one", "two"))
    ]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*rows, *L_DAE, *MAE]))
    return folder


def ldae_compare(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_a_runs_folder_finds_the_rows_of_its_encoder_and_a_glob_those_of_all(runs):
    ledger = ("--ledger", runs / "ledger.jsonl")
    alone = ldae_compare(runs / "one", "mae", *ledger)
    assert alone.exit_code == 0 and "45.0 [44.0, 46.0] (1)" in alone.stdout
    both = ldae_compare(runs / "*o*", "mae", *ledger)
    assert "45.5 ±6.4 (2)" in both.stdout
    (runs / "empty").mkdir(exist_ok=True)
    nothing = ldae_compare(runs / "empty", "mae", *ledger)
    assert nothing.exit_code == 2 and "holds no encoder" in nothing.stderr


def test_the_command_prints_a_table_and_draws_it_with_the_curves_of_the_runs(runs, tmp_path):
    ledger = ("--ledger", runs / "ledger.jsonl")
    drawn = ldae_compare("l_dae", "mae", "--tier", "cpu", *ledger, "--figure", tmp_path / "one.png", "--markdown")
    assert drawn.exit_code == 0 and "| linear probe |" in drawn.stdout and "gap of `mae`" in drawn.stdout
    assert imread(tmp_path / "one.png").shape[1] == pytest.approx(3.3 * 300, abs=2)
    ldae_compare(runs / "one", runs / "two", *ledger, "--figure", tmp_path / "two.svg")
    text = (tmp_path / "two.svg").read_text()
    assert "online probe, top-1 (%)" in text and "epoch" in text and "raw pixels" in text
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: (?:[a-z]+ )?([\d.]+)px", text)]
    assert sizes and min(sizes) >= 7


def test_the_command_refuses_on_one_line(runs, tmp_path):
    (tmp_path / "ledger.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in [*L_DAE, row("mae", 0, 1.0, linear_probe__epochs=30)])
    )
    refused = ldae_compare("l_dae", "mae", "--tier", "cpu", "--ledger", tmp_path / "ledger.jsonl")
    assert refused.exit_code == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1
    assert "linear_probe.epochs is 90 and 30" in refused.stderr
    assert "There is no ledger" in ldae_compare("l_dae", "mae", "--ledger", tmp_path / "absent.jsonl").stderr
    assert "two groups or more" in ldae_compare("l_dae", "--ledger", runs / "ledger.jsonl").stderr
    asked = ("l_dae", "mae", "--tier", "cpu", "--ledger", runs / "ledger.jsonl", "--figure")
    for figure, message in (
        (tmp_path / "figure.pdf", "must end in .png or .svg"),
        (tmp_path / "ledger.jsonl" / "figure.png", "cannot be written"),
    ):
        refused = ldae_compare(*asked, figure)
        assert refused.exit_code == 2 and refused.stdout == "" and message in refused.stderr
