"""The README's words: tables that commands print, and commands that exist."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from ldae_hf.cli import app
from ldae_hf.evaluation.path_results import path_groups, path_text
from ldae_hf.evaluation.probe_results import probe_cells
from ldae_hf.evaluation.reconstruction import reconstruction_markdown
from ldae_hf.recipes import load_recipe, sweep_names
from ldae_hf.recipes.display import path_markdown


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PENDING = (ROOT / "benchmarks" / "pending.md").read_text(encoding="utf-8")
REPRODUCED = sorted((ROOT / "benchmarks" / "results" / "reproduce").glob("*/*.md"))
LEDGER = ROOT / "benchmarks" / "results" / "ledger.jsonl"
COMPARISONS = re.findall(r"<!-- comparison: ldae (.+?) -->\n(.*?)<!-- end of comparison -->", README, re.DOTALL)


def between(start: str, end: str) -> str:
    assert README.count(start) == README.count(end) == 1
    return README.partition(start)[2].partition(end)[0].strip()


def test_the_path_table_is_what_the_command_prints():
    start = "<!-- path table: ldae recipes tree --markdown -->"
    assert between(start, "<!-- end of path table -->") == path_markdown(probe_cells(LEDGER))


def test_the_table_of_tokenizers_is_what_the_command_prints():
    start = "<!-- tokenizer errors: ldae tokenizer table -->"
    assert between(start, "<!-- end of tokenizer errors -->") == reconstruction_markdown(LEDGER)


def test_the_table_of_distances_is_what_the_command_prints():
    start = "<!-- probe and distance: ldae results path --tier cpu --markdown -->"
    [group] = path_groups(LEDGER, "cpu")
    assert between(start, "<!-- end of probe and distance -->") == path_text(group, markdown=True)


@pytest.mark.parametrize(("command", "table"), COMPARISONS)
def test_a_comparison_is_what_its_command_prints(command, table, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0 and result.stdout.strip() == table.strip()


def test_the_states_of_the_papers_tables_are_what_the_command_prints(monkeypatch):
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, ["reproduce", "--markdown"])
    assert between("<!-- states: ldae reproduce --markdown -->", "<!-- end of states -->") == result.stdout.strip()


@pytest.mark.parametrize("file", REPRODUCED, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_reproduced_table_is_what_the_command_prints(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["reproduce", file.stem, "--tier", file.parent.name, "--table-only", "--markdown"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and result.stdout.strip() == file.read_text(encoding="utf-8").strip()


def commands() -> list[str]:
    """Every `ldae …` line in the README's and pending.md's blocks of shell, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README + PENDING, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip().startswith("ldae ")]


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_readme_has_its_options_and_its_recipe(line):
    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app)
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        assert words[0] in command.commands, f"there is no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("--"):
            assert word in options, f"there is no option {word}"
    if command.name in ("pretrain", "train", "show") and not words[0].startswith(("-", "$", '"$')):
        tier = words[words.index("--tier") + 1] if "--tier" in words else None
        load_recipe(words[0], tier)


def test_every_sweep_is_named():
    for name in sweep_names():
        assert f"`{name}`" in README, f"the README does not name the sweep {name}"
