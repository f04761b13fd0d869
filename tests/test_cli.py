import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ldae_hf.cli import app
from ldae_hf.cli.evaluation_options import evaluation_options
from ldae_hf.cli.options import EXTRAS
from ldae_hf.recipes import load_recipe, recipe_names, tier_names


PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def ldae(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_tree_shows_every_recipe_with_the_papers_number_and_every_tier():
    result = ldae("recipes", "tree")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for name in recipe_names():
        (line,) = [line for line in lines if line.lstrip(" │├└─").split(" ")[0] == name]
        assert str(load_recipe(name).paper.get("linear_probe_top1", "")) in line
    for tier in tier_names():
        assert any(line.startswith(f"  {tier} ") for line in lines)
    assert any("train.epochs: 400 → 800" in line for line in lines)


def test_tree_shows_the_results_of_a_ledger_by_default_the_one_of_the_current_folder(tmp_path, monkeypatch):
    features = {"encoder": "a", "timestep": 10, "noise": "clean"}
    protocol = {"features": features, "train": {"dataset": "cifar10"}}
    row = {"task": "linear_probe", "recipe": "l_dae", "tier": "cpu", "top1": 41.4, "protocol": protocol}
    monkeypatch.chdir(tmp_path)
    assert "cpu 41.4" not in ldae("recipes", "tree").stdout
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    assert "cpu 41.4 (1)" in ldae("recipes", "tree", "--ledger", "mine.jsonl").stdout
    usual = tmp_path / "benchmarks" / "results" / "ledger.jsonl"
    usual.parent.mkdir(parents=True)
    usual.write_text(json.dumps(row | {"top1": 43.0}) + "\n")
    assert "cpu 43.0 (1)" in ldae("recipes", "tree").stdout
    assert ldae("recipes", "tree", "--markdown").stdout.splitlines()[-1].endswith("| 64.5 | cpu 43.0 (1) |")


def test_tree_names_a_ledger_that_is_not_there(tmp_path):
    result = ldae("recipes", "tree", "--ledger", str(tmp_path / "absent.jsonl"))
    assert result.exit_code == 2
    assert "absent.jsonl" in result.stderr and result.stderr.count("\n") == 1


def test_show_says_who_set_each_value():
    result = ldae("recipes", "show", "size_b", "--tier", "cpu", "--set", "train.epochs=2")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "size: cpu_b # tier cpu" in lines
    assert "crop: random_resized # random_crop" in lines
    assert "epochs: 2 # override" in lines
    assert "patch_size: 8 # tier cpu" in lines
    assert "tokenizer: patch_pca # patch_pca" in lines


def test_diff_shows_only_what_differs():
    result = ldae("recipes", "diff", "l_dae", "epochs_800")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows == [
        ["key", "l_dae", "epochs_800"],
        ["data.crop", "centre", "random_resized"],
        ["train.epochs", "400", "800"],
    ]


def test_diff_says_so_when_a_tier_makes_two_recipes_equal():
    result = ldae("recipes", "diff", "l_dae", "random_crop", "--tier", "desk")
    assert result.stdout == "l_dae (tier desk) and random_crop (tier desk) have the same values.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "sizeb"], "recipe 'sizeb' is unknown; did you mean 'size_b'?"),
        (["show", "l_dae", "--tier", "gpu"], "tier 'gpu' is unknown"),
        (["show", "l_dae", "--set", "train.epoch=2"], "key 'train.epoch' is unknown; did you mean 'train.epochs'?"),
        (["diff", "l_dae", "size_b", "--tier", "cifar10"], "model.size has no translation for 'b'"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(arguments, message):
    result = ldae("recipes", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("missing", "extra", "arguments"),
    [
        ("datasets", "train", ["probe", "encoder"]),
        ("accelerate", "train", ["pretrain", "l_dae", "--output-dir", "run"]),
        ("scipy", "eval", ["compare", "l_dae", "mae"]),
        ("matplotlib", "eval", ["figure", "schedules"]),
    ],
)
def test_what_a_plain_installation_lacks_is_named_with_the_extra_that_brings_it(
    missing, extra, arguments, monkeypatch, tmp_path
):
    script = f"import sys; sys.modules[{missing!r}] = None; from ldae_hf.cli import app; app({arguments!r})"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 2
    remedy = f"Error: This needs {missing}, which is not installed; pip install 'ldae-hf[{extra}]' brings it."
    assert remedy in shown.stderr and "Traceback" not in shown.stderr


def test_the_extras_are_those_of_the_project():
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        distribution = {"sklearn": "scikit-learn"}.get(package, package)
        assert any(requirement.startswith(distribution) for requirement in extras[extra])


def test_a_bug_is_not_dressed_up_as_a_users_error(monkeypatch):
    def broken(*arguments):
        raise IndexError("a bug")

    monkeypatch.setattr("ldae_hf.cli.recipes.tree_text", broken)
    assert isinstance(ldae("recipes", "tree").exception, IndexError)


COMMANDS = [
    [],
    ["card"],
    ["compare"],
    ["recipes"],
    ["recipes", "tree"],
    ["recipes", "show"],
    ["recipes", "diff"],
    ["plan"],
    ["data"],
    ["data", "check"],
    ["denoise"],
    ["download"],
    ["export"],
    ["finetune"],
    ["extractor"],
    ["extractor", "train"],
    ["generate"],
    ["pipeline"],
    ["pretrain"],
    ["replay"],
    ["report"],
    ["probe"],
    ["knn"],
    ["few-shot"],
    ["attentive-probe"],
    ["fid"],
    ["full-probe"],
    ["retrieve"],
    ["segment"],
    ["sweep"],
    ["sweep", "depth"],
    ["sweep", "layers"],
    ["sweep", "timesteps"],
    ["figure"],
    ["figure", "curve"],
    ["figure", "denoising"],
    ["figure", "features"],
    ["figure", "filters"],
    ["figure", "noise"],
    ["figure", "path"],
    ["figure", "pipeline"],
    ["figure", "schedules"],
    ["figure", "spectrum"],
    ["results"],
    ["results", "list"],
    ["results", "path"],
    ["results", "rerun"],
    ["results", "samples"],
    ["tokenizer"],
    ["tokenizer", "train"],
    ["tokenizer", "evaluate"],
    ["tokenizer", "filters"],
    ["tokenizer", "table"],
    ["verify"],
    ["weights"],
    ["weights", "convert"],
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    result = ldae(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout and len(result.stdout.splitlines()) > 5


def test_a_bare_command_shows_its_help():
    assert "ldae recipes tree" in ldae().output


def test_floors_are_all_of_them_the_chosen_ones_or_none():
    assert evaluation_options({"seed": 1, "floors": None}) == {"seed": 1}  # the function's own default: all
    assert evaluation_options({"floors": ["latents", "untrained"]}) == {"floors": ("latents", "untrained")}
    assert evaluation_options({"floors": ["none"]}) == {"floors": ()}


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["probe", "runs/none"], "--ledger"),
        (["knn", "runs/none"], "--output"),
        (["finetune", "runs/none", "--output-dir", "runs/finetuned"], "--ledger"),
        (["full-probe", "runs/none", "--output-dir", "runs/probe"], "--output"),
        (["segment", "runs/none", "--dataset", "none"], "--ledger"),
        (["retrieve", "runs/none"], "--picture"),
        (["sweep", "depth", "runs/none"], "--figure"),
        (["figure", "schedules"], "--output"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(command, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    refused = ldae(*command, option, "file/result.png")
    assert refused.exit_code == 2 and refused.stderr.startswith("Error: file/result.png")
    assert "cannot be written" in refused.stderr and refused.stderr.count("\n") == 1


def test_a_figure_may_be_called_like_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schedules").mkdir()
    assert ldae("figure", "schedules").exit_code == 0 and (tmp_path / "schedules.svg").is_file()
