"""The ledger: one JSON line for every result, with all that it takes to get it again."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..training.circumstances import circumstances


LEDGER = Path("benchmarks/results/ledger.jsonl")
# A ledger may come from anywhere; what is read of every row is of these kinds, or not there.
TEXTS = ("task", "name", "recipe", "tier", "command", "rerun")
KINDS = (
    dict.fromkeys(TEXTS, str) | {"overrides": list} | dict.fromkeys(("training", "floors", "machine", "protocol"), dict)
)


def append_to_ledger(row: dict, path: str | Path = LEDGER) -> dict:
    """Appends a result with the circumstances of this process: `time`, `command`, `commit`, `machine`, `versions`.

    The line is one write at the end of the file, so that several processes may share a ledger.

    Args:
        row: plain JSON values; what it says of the circumstances is kept.
        path: the ledger, created with its folder if need be.

    Returns:
        The row as it was written.

    Raises:
        ValueError: the row holds what JSON cannot, NaN included.
        OSError: the ledger cannot be written in one piece.
    """
    row = circumstances() | row
    line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(file, line) != len(line):
            raise OSError(f"{path} took only a part of the row; free some space and mend its last line.")
    finally:
        os.close(file)
    return row


def read_ledger(path: str | Path = LEDGER) -> list[dict]:
    """The rows of a ledger, oldest first; none if there is no file. A broken line, and one whose `KINDS` are others, is
    left out with a warning."""
    path, rows = Path(path), []
    if not path.exists():
        return rows
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):  # also of bytes that are no text, and of brackets without end
            row = line
        if isinstance(row, dict) and all(isinstance(row.get(key), kind | None) for key, kind in KINDS.items()):
            rows.append(row)
        elif row is not None:
            warnings.warn(f"{path}: line {number} is no row of a ledger and is left out.", stacklevel=2)
    return rows


COLUMNS = {"top1": "top-1", "best_top1": "best on test"}


def result_table(results: dict | Sequence[dict], columns: Mapping[str, str] = COLUMNS) -> str:
    """Results of one task as plain text: the encoders, and then their floors; one that several share stands there once.

    A linear probe has two columns of accuracies: with the learning rate selected on held-out training samples, and the
    best on the test set. Where the encoders see images of different sizes, a column says so.

    Args:
        results: rows of one task, or one row.
        columns: metric -> its heading; those that no row has are left out.
    """
    results = [results] if isinstance(results, dict) else list(results)
    lines = [(row["name"], row["protocol"]["image_size"], row) for row in results]
    for name in dict.fromkeys(name for row in results for name in row["floors"]):
        found = [(row, row["floors"][name]) for row in results if name in row["floors"]]
        shared = all(entry == found[0][1] for _, entry in found)
        for row, entry in found[:1] if shared else found:
            lines.append((name if shared else f"{name} ({row['name']})", row["protocol"]["image_size"], entry))
    shown = {key: heading for key, heading in columns.items() if any(key in entry for *_, entry in lines)}
    several_sizes = len({size for _, size, _ in lines}) > 1
    rows = [("", *(["px"] if several_sizes else []), "dim", *shown.values())]
    for name, size, entry in lines:
        numbers = (f"{entry[key]:.1f}" if key in entry else "-" for key in shown)
        rows.append((name, *([str(size)] if several_sizes else []), f"{entry['dim']:,}", *numbers))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *aligned]))
    return "\n".join(lines)
