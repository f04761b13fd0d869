"""What `import ldae_hf` adds to importing the three names of transformers that anyone who uses it imports.

Fresh processes, one with and one without, in turns. Fails if `import ldae_hf` brings in diffusers, datasets or
accelerate (transformers itself imports accelerate where it is installed: only what is new counts).
"""

import json
import statistics
import subprocess
import sys

import measure


PROGRAM = """
import json, sys, time
start = time.perf_counter()
from transformers import AutoModel, AutoImageProcessor, PreTrainedModel
before, middle = set(sys.modules), time.perf_counter()
{then}
end, new = time.perf_counter(), set(sys.modules) - before
print(json.dumps(dict(total=end - start, added=end - middle, modules=len(new),
                      heavy=sorted(new & {{"diffusers", "datasets", "accelerate"}}))))
"""


def run(then: str) -> dict:
    command = [sys.executable, "-c", PROGRAM.format(then=then)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main():
    parser = measure.parser(__doc__.splitlines()[0])
    parser.set_defaults(repeats=11)
    args = parser.parse_args()
    answers = measure.interleave(
        {"transformers": lambda: run("pass"), "and ldae_hf": lambda: run("import ldae_hf")}, args.repeats
    )
    heavy = sorted({name for answer in answers["and ldae_hf"] for name in answer["heavy"]})
    if heavy:
        raise SystemExit(f"`import ldae_hf` imports {', '.join(heavy)}: load what needs them at first use instead.")
    totals = {name: [answer["total"] for answer in each] for name, each in answers.items()}
    added = [answer["added"] for answer in answers["and ldae_hf"]]
    medians = {name: statistics.median(values) for name, values in totals.items()}
    difference = medians["and ldae_hf"] - medians["transformers"]
    results = [{"seconds": totals, "difference_of_medians": difference, "added_in_process": added}]
    rows = [
        [
            f"{medians['transformers']:.2f}",
            f"{medians['and ldae_hf']:.2f}",
            f"{difference:+.3f}",
            f"{statistics.median(added):.3f} ({min(added):.3f}–{max(added):.3f})",
        ]
    ]
    columns = ["transformers, s", "and ldae_hf, s", "difference of medians, s", "ldae_hf alone in the same process, s"]
    notes = [
        f"{args.repeats} alternating pairs of fresh processes.",
        "diffusers, datasets and accelerate are not imported by ldae_hf.",
    ]
    measure.report(args, columns, rows, results, notes)


if __name__ == "__main__":
    main()
