"""Runs side by side out of a ledger: which numbers of theirs may be compared, by seed, with floors and budgets."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .budgets import budget
from .groups import Group, choose_value, overrides_of, parse_group
from .measures import TASKS, Seed, dataset_of, encoder_of, floor_of, numbers_of, seed_of
from .protocols import comparable_protocol, differences, floor_signature, refusal, signature


@dataclass
class Line:
    """One task under one protocol: the numbers of each group by seed, and those of the floors.

    `test_images` is how many images an accuracy was measured on; None if the number is no share of images.
    """

    name: str
    values: list[dict[Seed, float]]
    floors: dict[str, list[float]]
    test_images: int | None


@dataclass
class Comparison:
    """The groups on one data set; `budgets` has a sentence for each, `notes` say what was chosen or left out."""

    dataset: str
    groups: list[Group]
    lines: list[Line]
    budgets: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def floors(self) -> list[str]:
        return list(dict.fromkeys(name for line in self.lines for name in line.floors))


def compare(
    sources: Sequence[str],
    rows: Iterable[dict],
    *,
    tier: str | None = None,
    dataset: str | None = None,
    tasks: Sequence[str] = tuple(TASKS),
    choose: str | None = None,
) -> list[Comparison]:
    """Groups of runs side by side, a comparison for each data set on which all of them were measured.

    Rows count as measured alike only if their protocols are equal in all that does not belong to the encoder
    ([`comparable_protocol`]); of several of one encoder under one protocol the last counts, and of several encoders of
    one seed the one that was measured last.

    Args:
        sources: as for [`parse_group`], the one that the others are compared with first.
        rows: of a ledger. tier, dataset: only rows of these; dataset is the name of the test images' set.
        tasks: only these.
        choose: the key of an override, for example `train.base_learning_rate`: each group of a recipe takes the value
            with the best held-out accuracy ([`choose_value`]).

    Raises:
        ValueError: a source means nothing, rows of several tiers match, a group has no rows or none that the others
            can be compared with, or a task was measured under no protocol that all groups share.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"--task {unknown[0]} is not one of {', '.join(TASKS)}.")
    rows = [_checked(number, row) for number, row in enumerate(rows, start=1) if row.get("task") in TASKS]
    floor_rows, rows = ([row for row in rows if (floor_of(row) is not None) == of_floor] for of_floor in (True, False))
    groups = [parse_group(source, rows) for source in sources]
    if repeated := {group.name for group in groups if sources.count(group.name) > 1}:
        raise ValueError(f"{', '.join(repeated)} is given twice; a comparison needs different groups.")
    there = _listed({_title(row) for row in rows})
    rows = _of_one_tier(groups, rows, tier, choose)
    for group in groups:
        if not any(group.matches(row, choose) for row in rows):
            where = f" at tier {tier}" if tier else ""
            raise ValueError(f"There are no rows of {group.name}{where}. There are some of: {there}.")
    by_dataset: dict[str, list[dict]] = {}
    for row in rows:
        by_dataset.setdefault(dataset_of(row), []).append(row)
    if dataset is not None:
        by_dataset = {name: found for name, found in by_dataset.items() if dataset in (name, name.split("/")[-1])}
    found = []
    for name, of_dataset in by_dataset.items():
        if all(any(group.matches(row, choose) for row in of_dataset) for group in groups):
            floors = [row for row in floor_rows if dataset_of(row) == name]
            found.append(_comparison(name, groups, of_dataset, floors, tasks, choose))
    if not any(comparison.lines for comparison in found):
        there = "; ".join(f"{group.name}: {_what_there_is(group, rows, choose)}" for group in groups)
        raise ValueError(f"No task was measured for all of these groups on one data set. There is, of {there}.")
    return [comparison for comparison in found if comparison.lines]


def _checked(number: int, row: dict) -> dict:
    try:
        signature(row), floor_of(row), encoder_of(row), overrides_of(row)
        {seed_of(row), dataset_of(row), row["protocol"]["features"].get("timestep")}  # noqa: B018, they can be counted
        beside = (row.get("floors") or {}).values()
        for key in numbers_of(row):
            numbers = [float(row[key]), *(float(entry[key]) for entry in beside if entry.get(key) is not None)]
            if not all(0 <= value <= 100 for value in numbers):
                raise ValueError(f"a {key} is no percentage")
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"Row {number} is no {row['task']} as our commands write it: {error!r}.") from error
    return row


def _of_one_tier(groups: list[Group], rows: list[dict], tier: str | None, free: str | None) -> list[dict]:
    """The rows of the groups at the tier; without one, at the only tier that the groups of recipes have rows of."""

    def matched(row: dict) -> bool:
        return any(group.matches(row, free) for group in groups)

    if tier is None:
        tiers = {row["tier"] for row in rows if row.get("recipe") and matched(row)}
        if len(tiers) > 1:
            names = ", ".join(sorted(name or "full size" for name in tiers))
            raise ValueError(f"There are rows of these groups at {names}; choose one of them with --tier.")
    return [row for row in rows if matched(row) and (tier is None or not row.get("recipe") or row["tier"] == tier)]


def _comparison(
    dataset: str,
    groups: list[Group],
    rows: list[dict],
    floor_rows: list[dict],
    tasks: Sequence[str],
    choose: str | None,
) -> Comparison:
    notes, chosen = [], []
    for group in groups:
        if choose and group.recipe and choose not in dict(group.overrides):
            group, note = choose_value(group, rows, choose)
            notes.append(note)
        own, twice = _latest([row for row in rows if group.matches(row)])
        notes += [f"{group.name}: seed {seed} was trained twice; the encoder measured last counts" for seed in twice]
        chosen.append(group.with_rows([row for row in own if row["task"] in tasks]))
    lines = []
    for task in tasks:
        task_lines, left_out = _lines(task, chosen, floor_rows)
        lines, notes = lines + task_lines, notes + left_out
    if _from_several_files(chosen):
        notes.append("images of the same data set were read from several files: their fingerprints differ")
    return Comparison(dataset, chosen, lines, [budget(group) for group in chosen if group.rows], notes)


def _latest(rows: list[dict]) -> tuple[list[dict], list[Seed]]:
    """Of each seed the rows of the encoder measured last, the last of each protocol; the seeds with more encoders."""
    newest, twice = {}, {}
    for row in rows:
        seed, encoder = seed_of(row), encoder_of(row)
        if newest.setdefault(seed, encoder) != encoder:
            twice[seed] = True
        newest[seed] = encoder
    last = {}
    for row in rows:
        seed = seed_of(row)
        if encoder_of(row) == newest[seed]:
            last[seed, signature(row)] = row
    return list(last.values()), list(twice)


def _lines(task: str, groups: list[Group], floor_rows: list[dict]) -> tuple[list[Line], list[str]]:
    """A line for each protocol that all groups share, and notes on what is left out."""
    label, _ = TASKS[task]
    of_task = [(group.name, [row for row in group.rows if row["task"] == task]) for group in groups]
    if not all(rows for _, rows in of_task):
        some = [name for name, rows in of_task if rows]
        return [], [f"{label}: only of {', '.join(some)}"] if some else []
    by_protocol = [{} for _ in groups]
    for found, (_, rows) in zip(by_protocol, of_task, strict=True):
        for row in rows:
            found.setdefault(signature(row), []).append(row)
    shared = [name for name in by_protocol[0] if all(name in found for found in by_protocol)]
    if not shared:
        for other, found in zip(of_task[1:], by_protocol[1:], strict=True):
            if not found.keys() & by_protocol[0].keys():
                raise ValueError(refusal(label, of_task[0], other))
        raise ValueError(f"The {label} has no protocol that all groups share; compare two of them to see why.")
    left_out = [
        f"{label}: {sum(map(len, rest))} of {name} under another protocol left out"
        for (name, _), found in zip(of_task, by_protocol, strict=True)
        if (rest := [rows for protocol, rows in found.items() if protocol not in shared])
    ]
    protocols = [comparable_protocol(by_protocol[0][name][0]) for name in shared]
    lines = []
    for protocol, name in zip(protocols, shared, strict=True):
        keys = sorted({key for other in protocols for key in differences(protocol, other)})
        stated = [f"{key.rpartition('.')[2]} {protocol.get(key)}" for key in keys]
        rows = [found[name] for found in by_protocol]
        images = (rows[0][0]["protocol"].get("test") or {}).get("images")
        for key, what in numbers_of(rows[0][0]).items():
            values = [{seed_of(row): float(row[key]) for row in of_group} for of_group in rows]
            floors = _floors(key, [row for of_group in rows for row in of_group], floor_rows)
            lines.append(Line(", ".join([what, *stated]), values, floors, images if key == "top1" else None))
    return lines, left_out


def _floors(key: str, rows: list[dict], floor_rows: list[dict]) -> dict[str, list[float]]:
    """The number of each floor in rows of one protocol, and in floors' own rows of that protocol."""
    protocols = {floor_signature(row) for row in rows}
    # "PCA latents, K = 16" of an encoder without latents of its own is the same floor as an l-DAE's "PCA latents".
    beside = [(name.partition(", K = ")[0], entry) for row in rows for name, entry in (row.get("floors") or {}).items()]
    beside += [(floor_of(row), row) for row in floor_rows if floor_signature(row) in protocols]
    found = {}
    for name, entry in beside:
        if entry.get(key) is not None:
            found.setdefault(name, []).append(float(entry[key]))
    return found


def _from_several_files(groups: list[Group]) -> bool:
    """Whether a split's images have several fingerprints; what records none says nothing."""
    rows = [row for group in groups for row in group.rows]
    found = [{(row["protocol"].get(split) or {}).get("fingerprint") for row in rows} for split in ("train", "test")]
    return any(len(fingerprints - {None}) > 1 for fingerprints in found)


def _what_there_is(group: Group, rows: list[dict], free: str | None) -> str:
    return _listed({f"{row['task']} on {dataset_of(row)}" for row in rows if group.matches(row, free)})


def _title(row: dict) -> str:
    parts = [row.get("recipe") or row["name"], *(row.get("overrides") or [])]
    return "+".join(parts) + (f" ({row['tier']})" if row.get("tier") else "")


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
