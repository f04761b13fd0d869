"""Proof: over a Hub that fails at random an upload arrives whole, once, in one commit, or goes on when started again.

python tests/proofs/uploads.py [--count 50]
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path

from trials import report


def run(count: int) -> dict:
    """Each in a repository of its own; figures, and in `failed` what does not hold."""
    from hostile_uploads import hostile_upload  # which lies where `trials` has looked

    logging.disable(logging.WARNING)  # each failure is one
    with tempfile.TemporaryDirectory() as folder:
        trials = {seed: hostile_upload(seed, Path(folder) / str(seed)) for seed in range(count)}
    return {
        "count": count,
        "arrived": sum(not trial.wrong for trial in trials.values()),
        "again": sum(trial.runs - 2 for trial in trials.values()),
        "faults": sum(trial.faults for trial in trials.values()),
        "waits": sum(trial.waits for trial in trials.values()),
        "hours": sum(trial.seconds for trial in trials.values()) / 3600,
        "failed": [f"upload {seed}: {trial.wrong}" for seed, trial in trials.items() if trial.wrong],
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=50, help="repositories, each uploaded in two versions")
    began, options = time.monotonic(), parser.parse_args()
    line = (
        "uploads: {arrived} of {count} repositories arrived in two versions, byte for byte, in one commit each; "
        "{faults} requests failed, {waits} waits of {hours:.1f} h in all (not slept), {again} commands were given again"
    )
    return report(line, run(options.count), began)


if __name__ == "__main__":
    raise SystemExit(main())
