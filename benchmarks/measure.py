"""What the benchmarks share: interleaved clocks, peak memory, a model's own matrix products, a table and a JSON file.

A ratio is taken pair by pair: A B C A B C ..., so that whatever else the machine does falls on all of them, and the
spread over the pairs says how much it did.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


PACKAGES = ("ldae-hf", "torch", "transformers", "diffusers", "timm", "scikit-learn", "numpy")


def parser(description: str) -> argparse.ArgumentParser:
    """A command line with the options that every benchmark has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--repeats", type=int, default=5, help="interleaved repetitions, after one that is not counted")
    result.add_argument("--json", type=Path, metavar="FILE", help="also write results, machine, versions here")
    return result


def torch_parser(description: str) -> argparse.ArgumentParser:
    """`parser` with the options of benchmarks that run networks."""
    result = parser(description)
    result.add_argument("--batch", type=int, default=8, help="images per batch")
    result.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    result.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--compile", action="store_true", help="torch.compile for every model")
    result.add_argument("--no-memory", action="store_true", help="do not start a process per model for its peak memory")
    result.add_argument("--memory-of", metavar="MODEL", help=argparse.SUPPRESS)  # how that process is told what to run
    return result


# ------------------------------------------------------------------------------------------------------------- time


def seconds(run: Callable[[], object], device: str, calls: int = 1) -> float:
    """Wall seconds of one call, the mean of `calls`, the accelerator's work included."""
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronise()
    return (time.perf_counter() - start) / calls


def interleave(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each run answers (its seconds), in rounds A B C A B C ...; the first round is not counted."""
    rounds = [{name: run() for name, run in runs.items()} for _ in range(repeats + 1)]
    return {name: [answers[name] for answers in rounds[1:]] for name in runs}


def ratio(numerators: list[float], denominators: list[float], factor: float = 1.0) -> dict[str, float]:
    """Median, minimum and maximum of factor · numerator / denominator over the pairs."""
    pairs = [factor * a / b for a, b in zip(numerators, denominators, strict=True)]
    return {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}


# ----------------------------------------------------------------------------------------------------------- memory


def peak_mib(build: Callable[[], Callable[[], object]], device: str) -> float | None:
    """Peak memory in MiB that building a model and then calling it twice adds to this process.

    On a CPU this is resident memory as Linux keeps it in /proc (getrusage's figure would count the parent's too), on
    CUDA what torch allocated. None elsewhere.
    """

    def resident(key: str) -> float:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status[key].split()[0]) / 1024

    if device == "cpu" and not Path("/proc/self/status").exists():
        return None
    gc.collect()
    before = resident("VmRSS") if device == "cpu" else 0.0
    run = build()
    run()
    run()
    return resident("VmHWM") - before if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20


def peak_mib_in_a_process(model: str, *options: object) -> float | None:
    """`peak_mib` of one model of this benchmark in a fresh process: the same command line, these options on top."""
    command = [sys.executable, *sys.argv, *map(str, options), "--memory-of", model]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(answer.splitlines()[-1])


# -------------------------------------------------------------------------------------------------- matrix products


class WrittenOutAttention(TorchFunctionMode):
    """Attention as its two matrix products and a softmax, so that those who count products see them.

    They are 2 in the forward pass and 4 in the backward pass, whatever a fused kernel computes again. The scale is
    left out: it is no product, and nobody looks at the values.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            return torch.matmul(torch.matmul(query, key.transpose(-2, -1)).softmax(dim=-1), value)
        return func(*args, **(kwargs or {}))


class MatrixProducts(TorchDispatchMode):
    """Counts the matrix products that run inside it, by operator, shapes, strides and dtypes."""

    operators = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")}

    def __init__(self):
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.operators:
            layouts = tuple((tuple(x.shape), x.stride(), x.dtype) for x in args)
            self.counts[func, layouts, tuple((kwargs or {}).items())] += 1
        return func(*args, **(kwargs or {}))

    def seconds(self, device: str) -> float:
        """The sum over all of them, each kind measured alone on operands of the same layout, already in the cache."""
        total = 0.0
        for (operator, layouts, options), count in self.counts.items():
            operands = [
                torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_()
                for shape, stride, dtype in layouts
            ]
            run = lambda: operator(*operands, **dict(options))  # noqa: B023, E731 - it does not outlive this turn
            run()
            total += count * seconds(run, device, calls=3)
        return total


# ----------------------------------------------------------------------------------------------------------- report


def spread(values: dict[str, float]) -> str:
    """A ratio as "1.23 (1.20–1.31)"."""
    return f"{values['median']:.2f} ({values['min']:.2f}–{values['max']:.2f})"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A markdown table with aligned columns."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def machine() -> dict[str, object]:
    """Processor, cores, load and accelerator of this machine."""
    names = [line.split(":")[1].strip() for line in cpuinfo() if line.startswith("model name")]
    result = {"processor": names[0] if names else platform.processor(), "cores": os.cpu_count()}
    result |= {"load": os.getloadavg()[0], "platform": platform.platform()}
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
    return result


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def versions() -> dict[str, str]:
    """Python and those of `PACKAGES` that are installed, peers in a folder of their own included."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """The commit of this checkout, marked where the working tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    answers = [
        subprocess.run([*git, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    ]
    if answers[0].returncode:
        return "no git checkout"
    return answers[0].stdout.strip() + (" with local changes" if answers[1].stdout else "")


def report(args: argparse.Namespace, columns: list[str], rows: list[list[str]], results: list[dict], notes=()) -> None:
    """Prints the table and what it was measured on; writes all of it, unrounded, to `--json`."""
    record = {
        "benchmark": Path(sys.argv[0]).stem,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "notes": list(notes),
        "results": results,
    }
    print(table(columns, rows))
    print()
    for note in notes:
        print(f"- {note}")
    for facts in (record["machine"], record["versions"], {"commit": record["commit"]}):
        print("- " + ", ".join(f"{name} {fact}" for name, fact in facts.items()))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
