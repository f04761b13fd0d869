"""What a ledger says of the paper's tables: the rule of the verdicts, the rows, their numbers and what is printed."""

import copy
import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ldae_hf.evaluation.finetuning.recipe import FineTuningRecipe
from ldae_hf.recipes import RecipeError, load_recipe, recipe_names
from ldae_hf.reproduction.experiments import MEASURES
from ldae_hf.reproduction.numbers import numbers
from ldae_hf.reproduction.table import experiment_text, overview, state, verdicts
from ldae_hf.reproduction.tables import EXPERIMENTS, experiment
from ldae_hf.reproduction.verdicts import MARGIN, claim_of, judge


TIERS = ("cpu", "desk", "desk_cpu", None)
LEDGER = Path(__file__).parent.parent / "benchmarks" / "results" / "ledger.jsonl"


def real_row(task: str, recipe: str = "l_dae") -> dict:
    """The first row of our own ledger of this task and recipe, at the cpu tier and without overrides."""
    rows = [json.loads(line) for line in LEDGER.read_text().splitlines()]
    wanted = (task, recipe, "cpu", [])
    return next(row for row in rows if (row["task"], row["recipe"], row["tier"], row.get("overrides")) == wanted)


PROBE, DISTANCE = real_row("linear_probe"), real_row("frechet_distance", "dit_baseline")


def result(recipe: str, seed: int, number: float, of: dict = PROBE, changes: dict | None = None, **others) -> dict:
    """A row as a measurement of another model would have written it; `changes` by dotted key."""
    row = copy.deepcopy(of) | {"recipe": recipe} | others
    row["training"]["seed"] = seed
    row["frechet_distance" if "frechet_distance" in row else "top1"] = number
    if "features" in row["protocol"]:
        row["protocol"]["features"]["timestep"] = load_recipe(recipe).model["feature_timestep"]
    for key, value in (changes or {}).items():
        *way, last = key.split(".")
        place = row
        for step in way:
            place = place[step]
        place[last] = value
    return row


def by_label(name: str, rows: list[dict], tier: str | None = "cpu", measure: str = "probe") -> dict:
    values = numbers(experiment(name, tier), rows, tier).values
    return {label: found for (label, which), found in values.items() if which == measure and found}


# ---- the rule


def random_pairs():
    rng = np.random.default_rng(0)
    for _ in range(150):
        count = int(rng.integers(3, 7))
        reference = rng.normal(45, 2, count)
        values = reference + rng.normal(rng.uniform(-4, 4), rng.uniform(0.1, 3), count)
        yield values, reference


def by_seed(values) -> dict[int, float]:
    return dict(enumerate(map(float, values)))


def test_a_direction_holds_or_is_reversed_where_a_paired_t_test_says_so():
    seen = set()
    for values, reference in random_pairs():
        test = stats.ttest_rel(values, reference)
        found = None if test.pvalue >= 0.05 else "higher" if test.statistic > 0 else "lower"
        for claim in ("higher", "lower"):
            word = "within noise" if found is None else "holds" if found == claim else "reversed"
            verdict = judge(claim, by_seed(values), by_seed(reference))
            assert verdict.word == word
            assert verdict.difference.mean == pytest.approx(np.mean(values - reference))
            seen.add(word)
        assert judge(None, by_seed(values), by_seed(reference)).word == (found or "within noise")
    assert seen == {"holds", "reversed", "within noise"}


def test_equality_holds_where_two_one_sided_t_tests_say_so_and_is_reversed_outside_the_margin():
    seen = set()
    for values, reference in random_pairs():
        difference = values - reference
        above = stats.ttest_1samp(difference, -MARGIN, alternative="greater").pvalue
        below = stats.ttest_1samp(difference, MARGIN, alternative="less").pvalue
        nearest = MARGIN if difference.mean() > 0 else -MARGIN
        is_outside = abs(difference.mean()) > MARGIN and stats.ttest_1samp(difference, nearest).pvalue < 0.05
        word = "holds" if max(above, below) < 0.05 else "reversed" if is_outside else "within noise"
        assert judge("equal", by_seed(values), by_seed(reference)).word == word
        seen.add(word)
    assert seen == {"holds", "reversed", "within noise"}


@pytest.mark.parametrize(
    ("values", "word"),
    [({}, "not run"), ({7: 1.0}, "not run"), ({0: 9.0}, "too few seeds"), ({0: 9, 1: 9, 7: 9}, None)],
)
def test_only_seeds_that_both_sides_have_count_and_fewer_than_three_give_no_verdict(values, word):
    reference = {0: 1.0, 1: 1.0, 2: 1.0}
    verdict = judge("higher", values, reference)
    assert verdict.word == (word or "too few seeds") and verdict.detectable is None
    assert word == "not run" or verdict.difference.count == len(values.keys() & reference.keys())


def test_a_seed_that_only_one_side_has_changes_nothing():
    reference, values = {0: 40.0, 1: 41.0, 2: 42.0}, {0: 42.0, 1: 43.1, 2: 44.0}
    assert judge("higher", values | {3: 0.0}, reference | {4: 99.0}) == judge("higher", values, reference)


def test_a_point_of_difference_in_the_paper_is_a_direction_and_less_is_equality():
    for tenths in range(0, 990):
        low, high, near = tenths / 10, (tenths + 10) / 10, (tenths + 9) / 10
        assert (claim_of(high, low), claim_of(low, high)) == ("higher", "lower")
        assert claim_of(near, low) == claim_of(low, near) == claim_of(low, low) == "equal"
    assert claim_of(None, 1.0) is claim_of(1.0, None) is None


def test_the_effect_that_would_be_detected_grows_with_the_spread_and_shrinks_with_the_seeds():
    def detectable(spread: float, count: int) -> float:
        pairs = {seed: spread * (-1) ** seed for seed in range(count)}
        return judge(None, pairs, dict.fromkeys(pairs, 0.0)).detectable

    assert detectable(0, 4) == 0
    assert detectable(1, 4) < detectable(2, 4) < detectable(4, 4)
    assert detectable(2, 8) < detectable(2, 4)


# ---- the rows


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("tier", TIERS)
def test_every_experiment_has_rows_that_exist_with_their_references(name, tier):
    what = experiment(name, tier)
    keys = [(row.label, row.measure) for row in what.rows]
    assert len(set(keys)) == len(keys) and what.name == name and what.title
    for row in what.rows:
        assert row.recipe in recipe_names() and row.measure in MEASURES
        reference = what.reference(row)
        assert (reference is None) == (row.against is None)
        assert what.claim(row) in (None, "higher", "lower", "equal")
        if reference is not None:
            assert reference.label == row.against
            assert reference.measure == row.measure or (reference.measure, row.measure) == (
                "cached_probe",
                "best_noisy",
            )
    assert any(row.against is None for row in what.rows)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_others_are_compared_with_is_trained_first(name):
    what = experiment(name, "cpu")
    ordered = what.in_order()
    assert sorted(map(repr, ordered)) == sorted(map(repr, what.rows))
    references = {row.against for row in what.rows}
    is_reference = [row.label in references for row in ordered]
    assert is_reference == sorted(is_reference, reverse=True)


def test_a_name_or_a_tier_that_is_none_is_an_error():
    with pytest.raises(ValueError, match="no table or figure 'table9'; choose one of table1, "):
        experiment("table9")
    with pytest.raises(RecipeError, match="tier 'gpu' is unknown"):
        numbers(experiment("table3"), [], "gpu")


# ---- the numbers


def test_a_result_counts_under_its_recipe_and_seed_and_the_last_one_of_a_seed_wins():
    rows = [
        result("l_dae", 0, 1.0),
        result("l_dae", 1, 45.1),
        result("single_level", 0, 40.5),
        result("l_dae", 0, 44.9),
    ]
    assert by_label("single-level", rows) == {"l_dae": {1: 45.1, 0: 44.9}, "single_level": {0: 40.5}}


@pytest.mark.parametrize(
    "other",
    [
        dict(overrides=["train.epochs=9"]),
        dict(tier="desk"),
        dict(tier=None),
        dict(task="knn"),
        dict(training=None),
        dict(changes={"protocol.test.dataset": "cifar100"}),
        dict(changes={"protocol.features.timestep": 40}),
        dict(changes={"protocol.features.noise": "frozen, seed 0"}),
        dict(changes={"protocol.image_size": 64}),
    ],
)
def test_what_was_not_measured_as_the_recipe_says_does_not_count(other):
    row = result("l_dae", 5, 99.0)
    row = result("l_dae", 5, 99.0, **other) if other.get("training", 0) is not None else row | other
    assert by_label("single-level", [result("l_dae", 0, 45.0), row]) == {"l_dae": {0: 45.0}}
    assert by_label("single-level", [row]) == {}


def test_an_override_that_only_repeats_the_recipe_and_a_dataset_by_its_path_count():
    epochs = load_recipe("l_dae", "cpu").train["epochs"]
    row = result("l_dae", 0, 45.0, overrides=[f"train.epochs={epochs}"])
    row["protocol"]["test"]["dataset"] = "/somewhere/cifar10/"
    assert by_label("single-level", [row]) == {"l_dae": {0: 45.0}}


def test_of_two_protocols_the_one_with_more_models_counts_and_the_rest_is_named():
    short = {"protocol.linear_probe.epochs": 10}
    rows = [result("l_dae", seed, 45.0) for seed in (0, 1)] + [result("single_level", 0, 41.0)]
    rows += [result("l_dae", seed, 30.0, changes=short) for seed in (1, 2)]
    found = numbers(experiment("single-level", "cpu"), rows, "cpu")
    assert found.values == {("l_dae", "probe"): {0: 45.0, 1: 45.0}, ("single_level", "probe"): {0: 41.0}}
    [sentence] = found.left_out
    assert "linear_probe of l_dae, seed 2" in sentence
    assert sentence in experiment_text(experiment("single-level", "cpu"), found, "cpu")


def test_pixels_of_smaller_images_stand_beside_those_of_larger_ones():
    size = load_recipe("pixels_size_64", "cpu").model["image_size"]
    rows = [result("pixels", 0, 30.0), result("pixels_size_64", 0, 35.0, changes={"protocol.image_size": size})]
    assert by_label("figure5", rows) == {"pixels": {0: 30.0}, "pixels_size_64": {0: 35.0}}


def fine_tuned(recipe: str, seed: int, number: float, dim: int, start: str = "the encoder's weights", **settings):
    protocol = json.loads(json.dumps(asdict(FineTuningRecipe(**settings).for_width(dim))))
    row = result(recipe, seed, number, task="fine_tune", dim=dim, tier=None, floors={}, model={"start": start})
    size = load_recipe(recipe).model["image_size"]
    row["protocol"] |= {"fine_tune": protocol, "image_size": size}
    row["protocol"]["test"]["dataset"] = load_recipe(recipe).data["dataset"]
    return row


def test_fine_tuning_of_both_sizes_counts_though_each_has_its_own_layer_decay_but_not_from_scratch():
    rows = [
        fine_tuned("mae_size_b", 0, 83.0, 768),
        fine_tuned("mae_size_l", 0, 85.0, 1024),
        fine_tuned("mae_size_b", 0, 70.0, 768, start="new weights"),
        fine_tuned("mae_size_b", 1, 60.0, 768, layer_decay=0.5),
    ]
    assert by_label("table4", rows, None, "fine_tune") == {"mae_size_b": {0: 83.0}, "mae_size_l": {0: 85.0}}


def test_a_sweep_gives_each_point_its_row_and_the_best_noisy_one_by_held_out_images():
    levels = [dict(timestep=10, noise="clean", top1=50.0, held_out_top1=60.0)]
    levels += [dict(timestep=10, noise="frozen", top1=48.0, held_out_top1=49.0)]
    levels += [dict(timestep=20, noise="frozen", top1=47.0, held_out_top1=50.0)]
    swept = dict(task="sweep_timestep", points=levels)
    changes = {"protocol.features.timestep": [10, 20], "protocol.features.noise": ["clean", "frozen"]}
    changes |= {"protocol.sweep_timestep": PROBE["protocol"]["linear_probe"]}
    rows = [result("l_dae", 0, 50.0, changes=changes, **swept)]
    found = by_label("timesteps", rows, measure="timesteps")
    assert found == {"t = 10, clean": {0: 50.0}, "t = 10, frozen": {0: 48.0}, "t = 20, frozen": {0: 47.0}}
    rows = [result("size_b_epochs_1600", 0, 50.0, changes=changes, **swept)]
    assert by_label("table4", rows, measure="best_noisy") == {"size_b_epochs_1600": {0: 47.0}}


def test_distances_are_compared_only_by_one_extractor_and_have_floors_of_their_own():
    rows = [result(name, 0, 200.0, of=DISTANCE) for name in ("dit_baseline", "remove_class_labels")]
    rows += [result("dit_baseline", 1, 9.0, of=DISTANCE, changes={"protocol.extractor.fingerprint": "another"})]
    found = numbers(experiment("table1", "cpu"), rows, "cpu")
    assert found.values["dit_baseline", "distance"] == found.values["remove_class_labels", "distance"] == {0: 200.0}
    assert set(found.floors["distance"]) == {"real", "reconstruction", "noise"} and len(found.left_out) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"top1": None},
        {"top1": "45"},
        {"top1": float("nan")},
        {"protocol": {}},
        {"protocol.features": None},
        {"protocol.test": "cifar10"},
        {"protocol.test.dataset": 7},
        {"floors": {"raw pixels": 41.0}},
        {"floors": {"raw pixels": {"top1": "high"}}},
        {"training.seed": 1, "protocol.image_size": 32, "floors": {"PCA latents": {"top1": [1]}}},
    ],
)
def test_a_malformed_row_is_an_error_that_names_it(changes):
    rows = [result("l_dae", 0, 45.0), result("l_dae", 1, 45.0, changes=changes)]
    with pytest.raises(ValueError, match="Row 2 of the ledger is no linear_probe as our commands write it"):
        numbers(experiment("single-level", "cpu"), rows, "cpu")


def test_shared_floors_come_from_any_recipe_and_the_others_only_from_the_rows_of_the_table():
    floors = {"raw pixels": {"top1": 41.0}, "PCA latents, K = 8": {"top1": 40.0}}
    rows = [
        result("l_dae", 0, 45.0, floors={"untrained encoder": {"top1": 30.0}}),
        result("flip", 0, 1.0, floors=floors),
    ]
    rows += [result("flip", 1, 1.0, floors={"raw pixels": {"top1": 77.0}}, changes={"protocol.linear_probe.epochs": 9})]
    found = numbers(experiment("single-level", "cpu"), rows, "cpu")
    assert found.floors == {"probe": {"untrained encoder": [30.0], "raw pixels": [41.0]}}


# ---- what is printed


def three_seeds() -> list[dict]:
    values = {"l_dae": (45.0, 45.5, 46.0), "single_level": (41.0, 41.6, 42.1)}
    floors = {"raw pixels": {"top1": 41.6}}
    return [
        result(name, seed, number, floors=floors) for name, each in values.items() for seed, number in enumerate(each)
    ]


def test_a_table_says_paper_ours_difference_and_verdict_with_its_rule_below():
    what = experiment("single-level", "cpu")
    found = numbers(what, three_seeds(), "cpu")
    text = experiment_text(what, found, "cpu")
    [line] = [line for line in text.splitlines() if line.startswith("single_level")]
    cells = ["single_level", "61.5", "41.6 ±1.4 (3)", "l_dae", "-3.0", "-3.9 ±0.1 (3)", "0.2", "holds"]
    assert " ".join(line.split()) == " ".join(cells)
    assert re.search(r"floor: raw pixels +41\.6\n", text) and "95 %" in text.splitlines()[-1]
    marked = [row for row in experiment_text(what, found, "cpu", markdown=True).splitlines() if row.startswith("|")]
    assert {row.count("|") for row in marked} == {9}
    assert state(what, found, "cpu") == "1 holds"


def test_an_overview_says_how_far_each_experiment_is_at_each_tier():
    names = ("single-level", "table3")
    lines = overview([experiment(name) for name in names], three_seeds(), ("cpu", "full")).splitlines()
    assert lines[0].split() == ["name", "what", "cpu", "ImageNet"]
    assert lines[1].startswith("single-level") and lines[1].endswith("1 holds  runs")
    assert lines[2].split()[-1] == "runs"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_printed_from_nothing_and_says_that_nothing_was_run(name):
    for tier in TIERS:
        what = experiment(name, tier)
        found = numbers(what, [], tier)
        assert {verdict.word for verdict in verdicts(what, found, tier).values()} <= {"not run", "not testable"}
        text = experiment_text(what, found, tier)
        assert all(row.label in text for row in what.rows) and state(what, found, tier) == "runs"
