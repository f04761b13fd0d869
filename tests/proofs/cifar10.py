"""A real run, killed at will: l-DAE at the cpu tier on CIFAR-10 for an epoch, with two workers and bf16.

SIGKILL at random moments, again and again, until the run has ended all the same; then every bit of its results and
every line of its log is compared with those of a run that nobody disturbed. Needs $LDAE_DATA.

python tests/proofs/cifar10.py [--count 20]
"""

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from trials import Run, differences, leftovers, orphans, report


def run(count: int = 20, seed: int = 0) -> dict:
    """Figures: `kills`, how many hit while a checkpoint was `half_written`, `steps`, `seconds` of the whole run."""
    settings = dict(tier="cpu", overrides=["train.epochs=1"], mixed_precision="bf16", num_workers=2)
    settings |= dict(checkpoint_every=10, log_every=5, evaluate_every=100)
    draw, half_written = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Run(Path(folder) / "whole", settings), Run(Path(folder) / "killed", settings)
        began = time.monotonic()
        whole.finish()
        seconds = time.monotonic() - began
        kills = 0
        while kills < count and not (killed.folder / "encoder").exists():
            start = killed.start()
            start.processes[0].join(draw.uniform(0.5, 2.5 * seconds / count))
            if start.processes[0].exitcode is None:
                start.signal(signal.SIGKILL)
                kills += 1
            start.join()
            half_written += any(killed.folder.glob("**/.*.writing"))
        killed.finish()
        failed = [f"not the undisturbed run's: {name}" for name in differences(whole.folder, killed.folder)]
        failed += [f"left behind: {name}" for name in leftovers(killed.folder)]
        failed += [f"{left} processes left behind"] if (left := orphans([killed])) else []
        return dict(kills=kills, half_written=half_written, steps=whole.step, seconds=seconds, failed=failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="kills at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not os.environ.get("LDAE_DATA"):
        print("cifar10: LDAE_DATA is not set, so nothing is proved of a real run")
        return 0
    began = time.monotonic()
    figures = run(options.count, options.seed)
    line = (
        "cifar10: a run of {steps} steps ({seconds:.0f} s undisturbed), killed {kills} times, {half_written} of them "
        "while a checkpoint was being written: the same bits in the end"
    )
    return report(line, figures, began)


if __name__ == "__main__":
    raise SystemExit(main())
