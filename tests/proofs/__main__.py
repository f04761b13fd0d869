"""Runs the proofs one after the other, each in a fork of one warmed process, and ends with exit code 1 if one fails.

python tests/proofs [--long] [name ...]
"""

import argparse
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable


# Before huggingface_hub is imported, which reads it then: the Hub on the loopback knows no Xet.
os.environ["HF_HUB_DISABLE_XET"] = "1"
# A shell starts what it puts in the background with Ctrl-C ignored, nohup with SIGHUP; some proofs send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

PROOFS = {  # name -> what it is told for the long form
    "damage": [],
    "bad_images": [],
    "faults": [],
    "uploads": ["--count", "500"],
    "layouts": ["--long"],
    "signals": ["--repeat", "2", "--compile"],
    "kills": ["--count", "200"],
    "cifar10": [],
}
LONG = {"cifar10"}  # only in the long form


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--long", action="store_true", help="with the larger numbers")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(PROOFS)}; default all")
    options = parser.parse_args()
    if unknown := set(options.names) - set(PROOFS):
        parser.error(f"there is no proof {', '.join(sorted(unknown))}")
    began, failed = time.monotonic(), []
    names = options.names or [name for name in PROOFS if options.long or name not in LONG]
    proofs = {name: importlib.import_module(name) for name in names}
    for name, proof in proofs.items():
        # A fork each, since a proof may leave threads behind, and what they fork must not have any.
        arguments = [name, *(PROOFS[name] if options.long else [])]
        process = multiprocessing.get_context("fork").Process(target=call, args=(proof.main, arguments))
        process.start()
        process.join()
        if process.exitcode:
            failed.append(name)
    verdict = f"failed: {', '.join(failed)}" if failed else "all hold"
    print(f"{len(names)} proofs in {(time.monotonic() - began) / 60:.1f} minutes: {verdict}")
    return int(bool(failed))


def call(proof: Callable[[], int], arguments: list[str]) -> None:
    sys.argv = arguments
    raise SystemExit(proof())


if __name__ == "__main__":
    raise SystemExit(main())
