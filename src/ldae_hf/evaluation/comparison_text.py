"""A comparison as a table: floors, means with their intervals, and the gaps to the first group."""

from collections.abc import Mapping
from statistics import mean

from .comparison import Comparison, Line
from .intervals import Interval, paired_difference, t_interval, wilson_interval


SEEDS = "± is half the 95 % t-interval over seeds, their number in brackets"
ONE_SEED = "[ ] is the 95 % Wilson interval of one seed's test images alone and says nothing about seeds"
FLOORS = "a floor is its range over the rows"


def comparison_text(comparison: Comparison, markdown: bool = False) -> str:
    """The budgets, the table and what its cells mean, as plain text or markdown.

    A row is a task under one protocol; all numbers are in percent.
    """
    names = [f"`{group.name}`" if markdown else group.name for group in comparison.groups]
    head = ["", *comparison.floors, *names, *(f"gap of {name}" for name in names[1:])]
    rows = [head, *(_cells(line, comparison) for line in comparison.lines)]
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines.insert(1, "|---" * len(head) + "|")
    else:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
    text = "".join(cell for row in rows for cell in row)
    foot = [SEEDS] if "±" in text else []
    foot += [ONE_SEED] if "[" in text else []
    foot += [f"gaps are to {names[0]}, paired by seed", *([FLOORS] if comparison.floors else []), *comparison.notes]
    budgets = [f"- {budget}" if markdown else budget for budget in comparison.budgets]
    title = f"**{comparison.dataset}**" if markdown else comparison.dataset
    return "\n".join([title, "", *budgets, "", *lines, "", f"{'; '.join(foot)}."])


def _cells(line: Line, comparison: Comparison) -> list[str]:
    floors = [_range(line.floors.get(name, [])) for name in comparison.floors]
    values = [_mean(found, line.test_images) for found in line.values]
    return [line.name, *floors, *values, *(_gap(line.values[0], found) for found in line.values[1:])]


def _mean(values: Mapping, test_images: int | None) -> str:
    found = t_interval(list(values.values()))
    if found.half_width is not None:
        return f"{found.mean:.1f} ±{found.half_width:.1f} ({found.count})"
    if test_images is None:
        return f"{found.mean:.1f} (1)"
    low, high = wilson_interval(found.mean, test_images)
    return f"{found.mean:.1f} [{low:.1f}, {high:.1f}] (1)"


def _gap(first: Mapping, second: Mapping) -> str:
    found = paired_difference(first, second)
    if found is None:  # no seed in common
        return f"{mean(second.values()) - mean(first.values()):+.1f} (unpaired)"
    return f"{found.mean:+.1f}{_half(found)} ({found.count})"


def _half(interval: Interval) -> str:
    return "" if interval.half_width is None else f" ±{interval.half_width:.1f}"


def _range(values: list[float]) -> str:
    if not values:
        return ""
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} ... {high}"
