"""An experiment's figure: every row by its name, the table's numbers and verdicts, and words that can be read."""

import re
from itertools import combinations

import pytest
from matplotlib.figure import Figure
from test_figures import drawn_texts, svg_text, words_of
from test_path_results import COMMITTED

from ldae_hf.evaluation.figures.style import DPI, TWO_COLUMNS
from ldae_hf.evaluation.intervals import t_interval
from ldae_hf.evaluation.ledger import read_ledger
from ldae_hf.reproduction.experiments import Experiment, Row, latent_dims
from ldae_hf.reproduction.figure import experiment_figure
from ldae_hf.reproduction.numbers import Numbers, numbers
from ldae_hf.reproduction.table import verdicts
from ldae_hf.reproduction.tables import experiment
from ldae_hf.reproduction.verdicts import MARGIN


FLOORS = {
    "probe": {
        "raw pixels at 32x32": [41.6],
        "random whitened patches, stride 2": [56.1],
        "untrained encoder": [27.7, 31.0, 32.4],
        "conv_vae latents": [36.2],
        "PCA latents": [40.9, 41.1],
    },
    "distance": {"real": [0.6], "reconstruction": [50.8, 233.9], "noise": [266.9, 417.1]},
}
# A row of each kind: what the paper says of it, by a number, by a word or not at all, and what can be said of it here.
ROWS = (
    Row("l_dae", "l_dae", paper=60.0),
    Row("far_below", "single_level", paper=50.0, against="l_dae"),
    Row("as_good", "flip", paper=60.5, against="l_dae"),
    Row("worse_and_not_better", "random_crop", paper=65.0, against="l_dae"),
    Row("lower_in_a_footnote", "classical_dae", against="l_dae", claim="lower"),
    Row("of_ours_alone", "mae", against="l_dae"),
    Row("two_seeds_apart", "noise_prediction", paper=40.0, against="far_below"),
    Row("never_run", "snr_weighting", paper=63.0, against="far_below"),
)
VALUES = {
    "l_dae": {0: 46.0, 1: 46.5, 2: 45.8},
    "far_below": {0: 40.0, 1: 40.9, 2: 39.5},
    "as_good": {0: 46.2, 1: 46.4, 2: 46.1},
    "worse_and_not_better": {0: 43.0, 1: 43.1, 2: 43.0},
    "lower_in_a_footnote": {0: 30.0, 1: 31.0, 2: 30.5},
    "of_ours_alone": {0: 46.0, 1: 47.5, 2: 44.9, 3: 45.0},
    "two_seeds_apart": {0: 38.0, 1: 46.0},
    "never_run": {},
}
SMALL = Experiment("small", "A table of every kind of row", ROWS)
FOUND = Numbers({(label, "probe"): values for label, values in VALUES.items()}, {"probe": FLOORS["probe"]})


def made(what: Experiment) -> Numbers:
    """Numbers for all rows but some, of one to three seeds, with floors where a measure has any."""
    values = {}
    for place, row in enumerate(what.rows):
        middle = 40 + 0.1 * (row.paper or 60) + place % 5
        seeds = range((3, 3, 2, 3, 1, 3, 0)[place % 7])
        values[row.label, row.measure] = {seed: middle + 0.3 * ((3 * seed + place) % 4) for seed in seeds}
    return Numbers(values, {row.measure: FLOORS.get(row.measure, {}) for row in what.rows})


def empty(what: Experiment) -> Numbers:
    return Numbers({(row.label, row.measure): {} for row in what.rows})


def bars_of(axis) -> list[tuple[float, float, float]]:
    """Mean, low and high end of each interval from the top down; all three equal where there is none."""
    found = []
    for line, _, parts in axis.containers:
        [(mean, _)] = line.get_xydata()
        ends = [part.get_segments()[0][:, 0].tolist() for part in parts] or [[mean, mean]]
        found.append((mean, *ends[0]))
    return found


def diamonds(axis) -> list[float]:
    return [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "D"]


def panels(figure: Figure) -> list:
    """Left and right of each measure."""
    return list(zip(figure.axes[::2], figure.axes[1::2], strict=True))


NAMES = ("table1", "table2", "figure5", "timesteps", "controls", "noise-grid", "residual-weight")
CASES = [*[(name, "cpu", made) for name in NAMES], ("table1", None, made), ("table4", None, empty)]


@pytest.mark.parametrize(("name", "tier", "of"), CASES)
def test_every_row_is_named_and_words_are_at_least_7_points_lie_inside_and_upon_no_other_word(
    name, tier, of, monkeypatch, tmp_path
):
    what = experiment(name, tier)
    figure = experiment_figure(what, of(what), tier)
    figure.set_dpi(DPI)  # as in the file: on the screen hinting makes words narrower
    assert figure.get_figwidth() == TWO_COLUMNS
    texts = drawn_texts(figure, monkeypatch)
    words = [text.get_text() for text in texts]
    dims = latent_dims(what, tier)
    for label in {row.label for row in what.rows}:
        full = f"{label}, K = {dims[label]}" if label in dims else label
        references = sum(row.against == label for row in what.rows) if full == label else 0
        assert words.count(full) == sum(row.label == label for row in what.rows) + references
    assert all(text.get_fontsize() >= 7 for text in texts)
    boxes = {text: text.get_window_extent() for text in texts}
    for text, box in boxes.items():
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text.get_text()
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text.get_text()
    for one, other in combinations(texts, 2):
        assert not boxes[one].padded(-1).overlaps(boxes[other].padded(-1)), (one.get_text(), other.get_text())
    for axis in figure.axes:  # words stand beside the panels, not in them
        inside = axis.get_window_extent()
        assert not [text.get_text() for text, box in boxes.items() if box.padded(-1).overlaps(inside)]
    sizes = re.findall(r"font(?:-size)?: (?:[a-z]+ )?([\d.]+)px", svg_text(figure, tmp_path))
    assert sizes and all(float(size) >= 7 for size in sizes)


def test_intervals_of_the_numbers_are_t_intervals_over_seeds_and_each_seed_is_a_dot():
    [(left, _)] = panels(experiment_figure(SMALL, FOUND, "cpu"))
    wanted = [t_interval(list(values.values())) for values in VALUES.values() if values]
    assert bars_of(left) == [
        pytest.approx((found.mean, found.mean - found.half_width, found.mean + found.half_width)) for found in wanted
    ]
    dots = [line.get_xdata().tolist() for line in left.lines if line.get_marker() == "."]
    assert dots == [list(values.values()) for values in VALUES.values() if values]


def test_differences_are_those_of_the_verdicts_and_the_papers_stand_beside_them():
    [(_, right)] = panels(experiment_figure(SMALL, FOUND, "cpu"))
    said = [verdict.difference for verdict in verdicts(SMALL, FOUND, "cpu").values() if verdict.difference]
    assert bars_of(right) == [
        pytest.approx((found.mean, found.mean - found.half_width, found.mean + found.half_width)) for found in said
    ]
    assert diamonds(right) == [-10, 0.5, 5, -10, 13]
    assert [line.get_marker() for line in right.lines].count("$\\leftarrow$") == 1  # of the footnote
    [band] = right.patches
    assert (band.get_x(), band.get_width()) == (-MARGIN, 2 * MARGIN)
    assert (band.get_y(), band.get_height()) == (1.5, 1)  # the third row, as_good
    assert min(right.get_ylim()) == -0.5 and right.get_ylim()[0] == len(ROWS) - 0.5  # from the top down


def test_the_verdict_stands_at_the_right_of_its_row():
    figure = experiment_figure(SMALL, FOUND, "cpu")
    said = {label: verdict.word for (label, _), verdict in verdicts(SMALL, FOUND, "cpu").items()}
    assert set(said.values()) == {"holds", "reversed", "within noise", "too few seeds", "not run"}
    rows: dict[float, list[str]] = {}
    for text in sorted(figure.texts, key=lambda text: text.get_position()):
        rows.setdefault(text.get_position()[1], []).append(text.get_text())
    found = {words[0].partition(", K = ")[0]: words[1:] for words in rows.values()}
    for row in ROWS:
        assert found[row.label] == ([row.against, said[row.label]] if row.against else [""])


def test_an_interval_of_two_seeds_does_not_make_the_rest_small_and_its_end_is_an_arrow():
    [(left, right)] = panels(experiment_figure(SMALL, FOUND, "cpu"))
    for axis in (left, right):
        low, high = axis.get_xlim()
        mean, begin, end = bars_of(axis)[-1]
        assert begin < low < mean < high < end and high - low < (end - begin) / 1.5
        arrows = {line.get_marker(): line.get_xdata()[0] for line in axis.lines if line.get_marker() in ("<", ">")}
        assert arrows == {"<": low, ">": high}
        for _, begin, end in bars_of(axis)[:-1]:
            assert low < begin and end < high


def test_floors_are_lines_at_their_medians_with_a_band_where_rows_differ_and_stand_in_the_legend(tmp_path):
    figure = experiment_figure(SMALL, FOUND, "cpu")
    [(left, _)] = panels(figure)
    lines = {line.get_label(): line.get_xdata() for line in left.lines if list(line.get_ydata()) == [0, 1]}
    assert lines == {
        "raw pixels 41.6": [41.6, 41.6],
        "random whitened patches 56.1": [56.1, 56.1],
        "untrained encoder 27.7 ... 32.4": [31, 31],
        "latents 36.2 ... 41.1": [40.9, 40.9],
    }
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in left.patches]
    assert [pytest.approx(span) for span in spans] == [(41.6, 41.6), (56.1, 56.1), (27.7, 32.4), (36.2, 41.1)]
    assert set(lines) <= set(words_of(svg_text(figure, tmp_path)))


def test_without_numbers_of_ours_the_figure_is_the_papers_alone(tmp_path):
    what = experiment("table3", "cpu")
    figure = experiment_figure(what, numbers(what, [], "cpu"), "cpu")
    [(left, right)] = panels(figure)
    assert not left.containers and not right.containers
    assert diamonds(left) == [row.paper for row in what.rows]
    assert diamonds(right) == pytest.approx([-2.7, 1.2, 0, 0.3, 0.6])
    words = words_of(svg_text(figure, tmp_path))
    assert "paper" in words and words.count("not run") == 5 and not [word for word in words if word.startswith("ours")]


def test_the_papers_number_stands_beside_ours_only_where_it_is_of_the_same_data():
    of_cpu, of_full = (
        panels(experiment_figure(what, made(what), tier))[0][0]
        for tier in ("cpu", None)
        for what in [experiment("table3", tier)]
    )
    assert diamonds(of_cpu) == [] and len(diamonds(of_full)) == 6
    assert of_cpu.get_title() == "ours, cifar10" and of_full.get_title() == "ours, imagenet-1k"


def test_each_measure_has_its_own_pair_of_panels_and_one_that_compares_nothing_has_one(tmp_path):
    what = experiment("table1", "cpu")
    figure = experiment_figure(what, made(what), "cpu")
    assert [left.get_xlabel() for left, _ in panels(figure)] == ["top-1 (%)", "Fréchet distance"]
    assert [right.get_xlabel() for _, right in panels(figure)] == ["points", "less is better"]
    words = words_of(svg_text(figure, tmp_path))
    assert {"linear probe, top-1 (%)", "raw pixels 41.6", "reconstruction 50.8 ... 233.9"} <= set(words)
    assert words.count("compared with") == 2 and words.count("a seed") == 1
    what = experiment("table4")
    figure = experiment_figure(what, empty(what), None)
    assert [right.axison for _, right in panels(figure)] == [False, True, True]
    assert words_of(svg_text(figure, tmp_path)).count("verdict") == 2


def test_the_figure_of_the_committed_ledger_has_its_numbers():
    what = experiment("figure5", "cpu")
    found = numbers(what, read_ledger(COMMITTED), "cpu")
    [(left, _)] = panels(experiment_figure(what, found, "cpu"))
    means = [t_interval(list(found.of(row).values())).mean for row in what.rows if found.of(row)]
    assert len(means) > 3 and [bar[0] for bar in bars_of(left)] == pytest.approx(means)
