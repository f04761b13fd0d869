"""An experiment as a table: step, paper, ours, verdict; as plain text or markdown."""

from collections import Counter
from collections.abc import Sequence

from ..evaluation.intervals import t_interval
from ..recipes import load_recipe
from ..recipes.display import END_OF_PATH
from .experiments import MEASURES, Experiment, Row, latent_dims, not_testable
from .numbers import Numbers, numbers
from .tables import experiment
from .verdicts import RULE, Verdict, judge


HEAD = ("step", "paper", "ours", "compared with", "paper's difference", "ours, paired", "detectable", "verdict")
CELLS = "± is half the 95 % t-interval over seeds, their number in brackets."


def verdicts(what: Experiment, found: Numbers, tier: str | None) -> dict[tuple[str, str], Verdict]:
    """The verdict on each row that is compared with another, by label and measure."""
    said = {}
    for row in what.rows:
        reference = what.reference(row)
        if reference is None:
            continue
        if not_testable(row, reference, tier):
            said[row.label, row.measure] = Verdict("not testable")
        else:
            said[row.label, row.measure] = judge(what.claim(row), found.of(row), found.of(reference))
    return said


def experiment_text(what: Experiment, found: Numbers, tier: str | None, markdown: bool = False) -> str:
    """The table with its title, the floors as its last lines, and below what its cells and words mean."""
    said, dims, parts = verdicts(what, found, tier), latent_dims(what, tier), []
    where = f"tier {tier}" if tier else "full size"
    title = f"{what.title} ({where})"
    parts.append(f"**{title}**" if markdown else title)
    for measure in dict.fromkeys(row.measure for row in what.rows):
        rows = [HEAD]
        for row in (row for row in what.rows if row.measure == measure):
            rows.append(_cells(row, what, found, said.get((row.label, measure)), dims.get(row.label), markdown))
        for name, values in sorted(found.floors.get(measure, {}).items()):
            rows.append((f"floor: {name}", "", _range(values), "", "", "", "", ""))
        parts += ["", f"{MEASURES[measure]}:", "", *_aligned(rows, markdown)]
    reasons = {}
    for row in what.rows:
        if reason := not_testable(row, what.reference(row), tier):
            reasons[f"{row.label} is not testable here: {reason}"] = True
    foot = [*what.notes, *reasons, *found.left_out]
    if found.machines:
        rate = load_recipe(END_OF_PATH, tier).train["base_learning_rate"]
        foot.append(f"base learning rate {rate:g} in all rows; trained on {' and '.join(sorted(found.machines))}")
    parts += ["", " ".join([CELLS, RULE]), *(f"- {note}" for note in foot)]
    return "\n".join(parts)


def _cells(
    row: Row, what: Experiment, found: Numbers, verdict: Verdict | None, latent_dim: int | None, markdown: bool
) -> tuple:
    reference, values = what.reference(row), found.of(row)
    name = (f"`{row.label}`" if markdown else row.label) + (f", K = {latent_dim}" if latent_dim else "")
    paper = "" if row.paper is None else f"{row.paper:.1f}"
    mean = "" if not values else _interval(*t_interval(list(values.values())))
    if reference is None or verdict is None:
        return (name, paper, mean, "", "", "", "", "")
    known = None not in (row.paper, reference.paper)
    claimed = f"{row.paper - reference.paper:+.1f}" if known else what.claim(row) or ""
    paired = "" if verdict.difference is None else _interval(*verdict.difference, sign=True)
    detectable = "" if verdict.detectable is None else f"{verdict.detectable:.1f}"
    against = f"`{row.against}`" if markdown else row.against
    return (name, paper, mean, against, claimed, paired, detectable, verdict.word)


def _interval(mean: float, half_width: float | None, count: int, sign: bool = False) -> str:
    number = f"{mean:+.1f}" if sign else f"{mean:.1f}"
    return f"{number}{'' if half_width is None else f' ±{half_width:.1f}'} ({count})"


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} ... {high}"


def _aligned(rows: list[tuple[str, ...]], markdown: bool) -> list[str]:
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def overview(experiments: Sequence[Experiment], rows: list[dict], tiers: Sequence[str], markdown: bool = False) -> str:
    """How far each experiment is: that it runs, and its verdicts at each tier.

    Args:
        experiments: for their names and titles. tiers: columns; "full" is the paper's size, on ImageNet.
    """
    head = ("name", "what", *("ImageNet" if tier == "full" else tier for tier in tiers))
    lines = [head]
    for one in experiments:
        states = []
        for name in tiers:
            tier = None if name == "full" else name
            at_tier = experiment(one.name, tier)
            states.append(state(at_tier, numbers(at_tier, rows, tier), tier))
        lines.append((f"`{one.name}`" if markdown else one.name, one.title, *states))
    return "\n".join(_aligned(lines, markdown))


def state(what: Experiment, found: Numbers, tier: str | None) -> str:
    """The verdicts of an experiment in a few words, as `4 holds, 1 reversed`; `runs` where nothing has been run."""
    counts = Counter(verdict.word for verdict in verdicts(what, found, tier).values())
    if not counts.keys() - {"not run", "not testable"}:
        return "runs"
    return ", ".join(f"{count} {word}" for word, count in counts.items())
