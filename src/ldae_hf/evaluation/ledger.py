"""The ledger: one JSON line for every result, with all that it takes to get it again."""

import json
import os
import warnings
from pathlib import Path

from ..training.circumstances import circumstances


LEDGER = Path("benchmarks/results/ledger.jsonl")


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
    """The rows of a ledger, oldest first; none if there is no file. A broken line is left out with a warning."""
    path, rows = Path(path), []
    if not path.exists():
        return rows
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:  # also of bytes that are no text
            row = line
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None:
            warnings.warn(f"{path}: line {number} is no row of a ledger and is left out.", stacklevel=2)
    return rows


def result_table(result: dict) -> str:
    """A result of `run_linear_probe` or `run_knn` as plain text: name, top-1 in percent, dimension.

    A linear probe has two columns of accuracies: with the learning rate selected on held-out training samples, and the
    best on the test set.
    """
    probe = "best_top1" in result
    rows = [("", "dim", "top-1", "best on test") if probe else ("", "dim", "top-1")]
    for name, entry in {result["name"]: result, **result["floors"]}.items():
        numbers = [entry["top1"], entry["best_top1"]] if probe else [entry["top1"]]
        rows.append((name, f"{entry['dim']:,}", *(f"{number:.1f}" for number in numbers)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *aligned]))
    return "\n".join(lines)
