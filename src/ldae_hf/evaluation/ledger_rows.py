"""The rows of a ledger by number, from 1 on, as people choose them."""

from pathlib import Path

from .ledger import read_ledger
from .measures import TASKS, dataset_of


def numbered_rows(ledger: str | Path, wanted: dict[str, str] | None = None) -> dict[int, dict]:
    """The rows of a ledger by their number in it, oldest first; only those whose keys have these values.

    Raises:
        ValueError: there is no ledger, or no such row in it.
    """
    if not Path(ledger).is_file():
        raise ValueError(f"There is no ledger {ledger}; the commands that evaluate write one with --ledger.")
    rows = dict(enumerate(read_ledger(ledger), start=1))
    found = {
        number: row
        for number, row in rows.items()
        if all(row.get(key) == value for key, value in (wanted or {}).items())
    }
    if not found:
        asked = " and ".join(f"{key} {value}" for key, value in (wanted or {}).items()) or "anything"
        raise ValueError(f"None of the {len(rows)} rows of {ledger} is of {asked}; `ldae results list` shows them.")
    return found


def choose_row(rows: dict[int, dict], number: int) -> dict:
    """The row of this number; a negative one counts from the end.

    Raises:
        ValueError: there is none.
    """
    if number in rows:
        return rows[number]
    if -len(rows) <= number < 0:
        return list(rows.values())[number]
    raise ValueError(f"There is no row {number} among those that match, {min(rows)} ... {max(rows)}.")


def rows_text(rows: dict[int, dict]) -> str:
    """A table: number, task, recipe with tier and overrides or the encoder's name, seed, the main number, data."""
    table = [("row", "task", "encoder", "tier", "seed", "result", "data")]
    for number, row in rows.items():
        recipe = " + ".join(map(str, [row["recipe"], *(row.get("overrides") or [])])) if row.get("recipe") else None
        seed = (row.get("training") or {}).get("seed")
        result = row.get(TASKS.get(row.get("task"), ("", row.get("task")))[1])
        table.append(
            (
                str(number),
                str(row.get("task")),
                recipe or str(row.get("name") or ""),
                row.get("tier") or "",
                "" if seed is None else str(seed),
                f"{result:.1f}" if isinstance(result, int | float) and abs(result) < 1e9 else "",
                _data(row),
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n".join(line.rstrip() for line in lines)


def _data(row: dict) -> str:
    try:
        return str(dataset_of(row))
    except (LookupError, TypeError):  # a row that we did not write
        return ""
