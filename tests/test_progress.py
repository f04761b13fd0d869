"""How often a progress bar writes: into a log every 30 seconds, and that is so wherever the package shows one."""

import ast
import io
import sys
from pathlib import Path

import pytest

import ldae_hf
from ldae_hf.progress import bar_intervals, progress_bar


PACKAGE = Path(ldae_hf.__file__).parent
# progress itself; lines between bars, and no bar; code that travels with a model, which has nothing else beside it
MAY_USE_TQDM = {"progress.py", "training/metrics_log.py", "image_processing_ldae.py"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_in_five_minutes(stream: io.StringIO, monkeypatch) -> int:
    """Of a bar that moves ten times a second; its clock is not that of the wall."""
    monkeypatch.setattr(sys, "stderr", stream)
    bar = progress_bar(total=3000)
    bar._time = lambda: bar.start_t + bar.n / 10
    for _ in range(3000):
        bar.update()
    written = stream.getvalue().count("\r")
    bar.close()
    return written


def test_a_log_gets_a_line_of_a_bar_every_30_seconds_and_a_terminal_ten_a_second(monkeypatch):
    assert lines_in_five_minutes(io.StringIO(), monkeypatch) <= 12
    assert lines_in_five_minutes(Terminal(), monkeypatch) > 1000


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["log", "terminal"])
def test_what_wakes_a_bar_that_has_become_slow_comes_no_sooner_than_its_next_line(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(total=1) as bar:
        assert bar.maxinterval >= bar.mininterval  # tqdm's monitor writes after maxinterval, whatever mininterval says


def test_an_interval_that_is_asked_for_is_kept(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert bar_intervals()["mininterval"] == 30
    with progress_bar(total=1, mininterval=2) as bar:
        assert bar.mininterval == 2


def test_no_module_makes_a_bar_of_its_own_or_an_interval():
    for path in PACKAGE.rglob("*.py"):
        name, tree = path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        uses = any(module.partition(".")[0] == "tqdm" for module in modules)
        assert not uses or name in MAY_USE_TQDM, f"{name} imports tqdm; progress_bar writes less into a log"
        words = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
        assert "mininterval" not in words, f"{name} has an interval of its own; bar_intervals has that of all bars"
