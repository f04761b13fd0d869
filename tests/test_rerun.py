"""The command that a row carries gives its number again, and no other command of a ledger is ever run."""

import copy
import inspect
import json
import shlex
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import typer
from PIL import Image
from tiny_encoder import pictures, save_tiny_encoder
from typer.testing import CliRunner

from ldae_hf.cli import app
from ldae_hf.evaluation.ledger import read_ledger
from ldae_hf.evaluation.rerun import (
    EVALUATIONS,
    FOLDERS,
    WRITTEN,
    differing,
    evaluation_words,
    rerun,
    rerun_command,
    stored_command,
)


ROW = {
    "time": "2026-01-01",
    "command": "ldae knn runs/a/encoder",
    "commit": "abc",
    "machine": {"cpu": "a processor", "threads": 1},
    "versions": {"torch": "2.13.0"},
    "recipe": "l_dae",
    "tier": "cpu",
    "training": {"seed": 1},
    "task": "knn",
    "name": "runs/a/encoder",
    "top1": 40.0,
    "variants": [{"k": 20, "top1": 40.0}],
    "seconds": 3.0,
    "floors": {"raw pixels": {"top1": 39.0, "seconds": 1.0}},
    "protocol": {
        "features": {"encoder": "e1", "layer": "last"},
        "test": {"dataset": "cifar10", "fingerprint": "f1", "images": 10_000},
        "knn": {"k": 20, "temperature": 0.07},
    },
}


def ldae_results(*arguments):
    return CliRunner().invoke(app, ["results", *map(str, arguments)])


def changed(**values) -> dict:
    """The row with other values; `a__b` is row["a"]["b"], and so on."""
    row = copy.deepcopy(ROW)
    for key, value in values.items():
        *above, last = key.split("__")
        inside = row
        for name in above:
            inside = inside[name]
        inside[last] = value
    return row


def test_a_rerun_spells_out_every_option_and_quotes_what_a_shell_would_take_apart():
    options = {"dataset": Path("my data/cifar10"), "learning_rate": [0.001, 0.1], "num_workers": 0, "floor": ["none"]}
    options |= {"image_column": None, "layer": [], "probe": True, "no-flip": False, "test_split": "test[:10]"}
    command = rerun_command("tokenizer evaluate", options, ["runs/a b/encoder"])
    assert shlex.split(command) == [
        *("ldae", "tokenizer", "evaluate", "runs/a b/encoder", "--dataset", "my data/cifar10"),
        *("--learning-rate", "0.001", "--learning-rate", "0.1", "--num-workers", "0", "--floor", "none"),
        *("--probe", "--test-split", "test[:10]"),
    ]


def test_what_is_only_in_memory_has_no_rerun():
    assert rerun_command("probe", {"seed": 0}, [object()]) is None
    assert rerun_command("probe", {"dataset": object()}, ["runs/a/encoder"]) is None


def test_an_old_row_falls_back_to_the_command_that_was_typed():
    assert stored_command(ROW | {"rerun": "ldae knn x --k 20"}) == ("ldae knn x --k 20", True)
    assert stored_command(ROW | {"rerun": None}) == ("ldae knn runs/a/encoder", False)
    with pytest.raises(ValueError, match="holds no command"):
        stored_command({"task": "knn"})


@pytest.mark.parametrize(
    "command",
    [
        "rm -rf /",
        "python examples/quickstart.py --seed 2",
        "ldae pretrain l_dae --output-dir runs/x",
        "ldae push runs/x you/there",
        "bash -c 'ldae knn x'",
        "ldae",
        "",
    ],
)
def test_no_other_command_of_a_ledger_is_run(command):
    with pytest.raises(ValueError, match="only ldae's commands that evaluate are"):
        evaluation_words(command)


def test_a_command_writes_only_where_it_is_told_now():
    typed = "ldae fid runs/a --steps 5 --samples-dir /etc/x --output=/etc/y --ledger z --report-to wandb --seed 1"
    assert evaluation_words(typed) == ("fid", ["runs/a", "--steps", "5", "--seed", "1"])
    assert evaluation_words("ldae knn 'a; rm -rf b' --k 5") == ("knn", ["a; rm -rf b", "--k", "5"])


def evaluation_commands() -> dict:
    """The commands that append their result to a ledger."""
    found = {}

    def walk(command, name: str) -> None:
        for child, inside in getattr(command, "commands", {}).items():
            walk(inside, f"{name} {child}".strip())
        if any("--ledger" in option.opts and "Append" in (option.help or "") for option in options_of(command)):
            found[name] = command

    walk(typer.main.get_command(app), "")
    return found


def options_of(command) -> list:
    return [parameter for parameter in command.params if parameter.opts[0].startswith("--")]


def test_every_command_that_fills_a_ledger_can_be_run_again():
    assert set(EVALUATIONS) == set(evaluation_commands())


def test_every_path_that_an_evaluation_command_takes_is_known_as_read_or_as_written():
    read = {"--processor", "--extractor"}
    for name, command in evaluation_commands().items():
        hints = get_type_hints(inspect.unwrap(command.callback))
        takes_a_path = {key for key, hint in hints.items() if Path in (hint, *get_args(hint))}
        paths = {option.opts[0] for option in options_of(command) if option.name in takes_a_path}
        assert {"--ledger", "--output"} <= paths
        assert paths <= read | set(WRITTEN), f"ldae {name}"
        if name in FOLDERS:
            assert FOLDERS[name] in {option.opts[0] for option in options_of(command)}


def test_circumstances_and_speeds_may_differ_and_nothing_else():
    other = changed(time="later", commit="def", command="ldae knn b", name="b", seconds=9.0, training={"seed": 2})
    other["floors"]["raw pixels"]["seconds"] = 5.0
    assert differing(ROW, other, 0) == ([], [])
    for key, value in {
        "top1": 40.01,
        "variants": [{"k": 20, "top1": 40.01}],
        "floors__raw pixels__top1": 39.5,
        "protocol__features__encoder": "e2",
        "protocol__features__layer": 3,
        "protocol__knn__k": 21,
    }.items():
        differs, _ = differing(ROW, changed(**{key: value}), 0)
        assert len(differs) == 1, key
    differs, _ = differing(ROW, changed(top1=40.01), 0)
    assert differs == ["top1: 40.0 before, 40.01 now"]


def test_the_tolerance_is_of_measured_numbers_and_not_of_the_protocol():
    assert differing(ROW, changed(top1=40.3), 0.01) == ([], [])
    assert differing(ROW, changed(top1=40.5), 0.01)[0] == ["top1: 40.0 before, 40.5 now"]
    assert len(differing(ROW, changed(protocol__knn__temperature=0.0701), 0.01)[0]) == 1


def test_what_an_old_row_did_not_record_and_files_read_anew_are_notes():
    new = changed(protocol__knn__weights="exp", protocol__test__fingerprint="f2")
    differs, notes = differing(ROW, new, 0)
    assert differs == []
    assert sorted(notes) == [
        "protocol.knn.weights was not recorded; it is 'exp'",
        "protocol.test.fingerprint: 'f1' before, 'f2' now; the images were read from other files",
    ]
    assert differing(new, ROW, 0)[0] == ["protocol.knn.weights: 'exp' before, nothing now"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with a tiny encoder, images of two classes, and a ledger with one result of it."""
    folder = tmp_path_factory.mktemp("measured")
    save_tiny_encoder(folder / "encoder")
    for split, count in (("train", 24), ("test", 12)):
        for number, image in enumerate(pictures(count, seed=count)):
            file = folder / "images" / split / ("dark" if number % 2 else "light") / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            (image if number % 2 else Image.eval(image, lambda value: 128 + value // 2)).save(file)
    ledger = folder / "ledger.jsonl"
    options = ["--dataset", folder / "images", "--rank", 1, "--floor", "pixels", "--num-workers", 0, "--ledger", ledger]
    done = CliRunner().invoke(app, ["retrieve", str(folder / "encoder"), *map(str, options)])
    assert done.exit_code == 0, done.output
    return folder


def test_a_row_that_is_run_again_is_the_same(measured):
    ran = ldae_results("rerun", "--ledger", measured / "ledger.jsonl", "--execute")
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.startswith("ldae retrieve ") and "note: numbers must be equal; the same machine" in ran.stdout
    assert ran.stdout.endswith("The result is the same.\n")


@pytest.mark.slow  # a process of its own
def test_a_row_that_was_tampered_with_is_found_out(measured, tmp_path):
    [row] = read_ledger(measured / "ledger.jsonl")
    row["protocol"]["features"]["encoder"] = "another"
    row["mean_average_precision"] += 1
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text(json.dumps(row) + "\n")
    ran = ldae_results("rerun", "--ledger", ledger, "--execute")
    assert ran.exit_code == 1
    assert "protocol.features.encoder: 'another' before" in ran.stdout and "mean_average_precision: " in ran.stdout
    assert ran.stdout.endswith("2 differences\n")


def test_a_rerun_is_printed_and_not_run_by_default(measured):
    printed = ldae_results("rerun", "--ledger", measured / "ledger.jsonl")
    assert printed.exit_code == 0 and printed.stdout.startswith("ldae retrieve ") and printed.stdout.count("\n") == 1


@pytest.mark.slow  # a process of its own
def test_a_command_that_fails_says_where_it_ran(measured, tmp_path):
    [row] = read_ledger(measured / "ledger.jsonl")
    row["rerun"] = f"ldae retrieve {tmp_path / 'absent'} --dataset {measured / 'images'}"
    with pytest.raises(ValueError, match="ended with exit code 2, run in"):
        rerun(row)


@pytest.fixture
def ledger(tmp_path):
    file = tmp_path / "ledger.jsonl"
    rows = [
        ROW,
        changed(task="linear_probe", top1=47.25, overrides=["train.epochs=8"]),
        changed(name="mine", tier=None),
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_rows_are_listed_by_number(ledger):
    lines = ldae_results("list", "--ledger", ledger).stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["row", "task", "encoder", "tier", "seed", "result", "data"],
        ["1", "knn", "l_dae", "cpu", "1", "40.0", "cifar10"],
        ["2", "linear_probe", "l_dae", "+", "train.epochs=8", "cpu", "1", "47.2", "cifar10"],
        ["3", "knn", "l_dae", "1", "40.0", "cifar10"],
    ]
    assert ldae_results("list", "--ledger", ledger, "--task", "linear_probe").stdout.splitlines()[1].startswith("2 ")


def test_a_row_is_chosen_by_number_from_the_end_or_by_what_it_is_of(ledger):
    def chosen(*arguments):
        return ldae_results("rerun", "--ledger", ledger, *arguments)

    ledger.write_text(
        "".join(json.dumps(row | {"rerun": f"ldae knn {n}"}) + "\n" for n, row in enumerate(read_ledger(ledger), 1))
    )
    assert chosen("2").stdout == "ldae knn 2\n"
    assert chosen("--", "-2").stdout == "ldae knn 2\n"
    assert chosen("--task", "knn").stdout == "ldae knn 3\n"
    assert chosen("--encoder", "runs/a/encoder", "--task", "knn").stdout == "ldae knn 1\n"
    for arguments, message in (
        (["9"], "There is no row 9 among those that match, 1 ... 3"),
        (["--task", "fid"], "None of the 3 rows of"),
    ):
        refused = chosen(*arguments)
        assert refused.exit_code == 2 and message in refused.stderr


def test_a_command_that_is_not_an_evaluation_is_printed_but_never_run(tmp_path):
    ledger, trace = tmp_path / "ledger.jsonl", tmp_path / "trace"
    ledger.write_text(json.dumps(ROW | {"rerun": f"touch {trace}"}) + "\n")
    assert ldae_results("rerun", "--ledger", ledger).stdout == f"touch {trace}\n"
    refused = ldae_results("rerun", "--ledger", ledger, "--execute")
    assert refused.exit_code == 2 and "is not run" in refused.stderr and not trace.exists()
