"""When, by which command and code, where and with what: what stands beside every result and every start of a run."""

import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import __version__


PACKAGE = Path(__file__).resolve().parents[1]
PACKAGES = "torch transformers diffusers accelerate datasets evaluate safetensors huggingface_hub numpy pillow".split()


def circumstances() -> dict:
    """`time`, `command`, `commit`, `machine` and `versions`, as plain JSON values."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Python, this package, and what it stands on, as far as that is installed."""
    found = {"python": platform.python_version(), "ldae-hf": __version__}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def command() -> str:
    """This process's command line, without the folder of the program."""
    program, *arguments = sys.argv
    name = Path(program).name
    program = ["python", os.path.relpath(program)] if name.endswith(".py") else [name]
    return shlex.join([*program, *arguments])


def commit() -> str | None:
    """The commit of this package's source, "-dirty" if files of it differ; None where it is not under git."""
    if not _git("ls-files", "--", "__init__.py"):
        return None
    head = _git("rev-parse", "--verify", "HEAD")
    return head and head + ("-dirty" if _git("status", "--porcelain", "--", ".") else "")


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", PACKAGE, *arguments], capture_output=True, text=True)
    except FileNotFoundError:  # git is not installed
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def machine() -> dict:
    """`cpu` model, `cores`, PyTorch's `threads`, and the `gpu` if there is one."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}
