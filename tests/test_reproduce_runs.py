"""What is missing of a table as commands, and `ldae reproduce` as a user runs it: stopped, gone on with, finished."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from datasets import Dataset, DatasetDict
from forked_runs import dataset_of, encoded
from test_reproduction import TIERS, result
from typer.testing import CliRunner

from ldae_hf.cli import app
from ldae_hf.manifest import MANIFEST
from ldae_hf.recipes import load_recipe
from ldae_hf.reproduction.jobs import Job, Options, missing_jobs, run_folder
from ldae_hf.reproduction.numbers import numbers
from ldae_hf.reproduction.run import run_jobs
from ldae_hf.reproduction.tables import EXPERIMENTS, experiment


EXTRACTOR = Path("extractor")
TINY_TIER = """
why: Seconds on one core, on drawn images.
change:
  model.size: {half_l: quickstart}
  model.image_size: 16
  model.patch_size: 4
  model.latent_dim: {16: 5, 32: 7}
  model.sigma_max: {1.4142135623730951: 1.4142135623730951}
  tokenizer.fit_patches: 1000
  data.dataset: PICTURES
  data.test_split: test
  train.epochs: {400: 2}
  train.warmup_epochs: {100.0: 0.0}
  train.global_batch_size: 8
  train.base_learning_rate: 0.05
  train.ema_half_life_epochs: {null: null, 11.0: 0.5}
"""


def jobs_of(name: str, tier: str | None = "cpu", rows=(), seeds=(0, 1, 2), labels=(), **options) -> list[Job]:
    what = experiment(name, tier)
    return missing_jobs(what, numbers(what, rows, tier), tier, seeds, Options(**options), labels)[0]


def floors_of(job: Job) -> list[str]:
    return [word for before, word in zip(job.words, job.words[1:], strict=False) if before == "--floor"]


# ---- which commands


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("tier", TIERS)
def test_all_seeds_of_a_recipe_come_before_the_next_and_training_before_measurement(name, tier):
    jobs = jobs_of(name, tier, extractor=EXTRACTOR)
    trained = [(job.recipe.name, job.seed) for job in jobs if job.kind == "pretrain"]
    assert len(set(trained)) == len(trained)
    assert trained == [(recipe, seed) for recipe in dict.fromkeys(one for one, _ in trained) for seed in (0, 1, 2)]
    done = set()
    for job in jobs:
        if job.kind == "pretrain":
            done.add((job.recipe.name, job.seed))
            if "--tokenizer" in job.words:
                assert Path(job.words[job.words.index("--tokenizer") + 1]) in done
        elif job.kind == "tokenizer":
            done.add(job.output.parent)
        else:
            assert (job.recipe.name, job.seed) in done


def test_every_command_that_is_run_is_one_that_ldae_understands():
    command = typer.main.get_command(app)
    options = dict(extractor=EXTRACTOR, per_device_batch_size=2, checkpoint_every=5, compile=True)
    options |= dict(perceptual_weights=Path("lpips"))
    jobs = [job for name in EXPERIMENTS for tier in TIERS for job in jobs_of(name, tier, seeds=[0], **options)]
    assert {job.words[0] for job in jobs} == {
        *("tokenizer", "pretrain", "probe", "full-probe", "sweep", "fid", "finetune"),
    }
    for job in jobs:
        words, one = [*job.words, *(["--max-minutes", "0.1"] if job.stops else [])], command
        while hasattr(one, "commands"):
            one = one.commands[words.pop(0)]
        assert one.make_context(job.words[0], words).params  # raises for an option that it does not have


def test_what_the_ledger_has_is_not_run_again():
    have = [result("l_dae", seed, 45.0) for seed in (0, 1, 2)] + [result("single_level", 1, 41.0)]
    jobs = jobs_of("single-level", rows=have)
    assert [(job.recipe.name, job.seed, job.kind) for job in jobs] == [
        ("single_level", seed, kind) for seed in (0, 2) for kind in ("pretrain", "probe")
    ]
    assert jobs_of("single-level", rows=have, seeds=[1]) == []


def test_only_the_row_that_is_asked_for_and_its_reference_are_run():
    jobs = jobs_of("table3", seeds=[0], labels=["image_output"])
    assert {job.recipe.name for job in jobs} == {"image_output", "image_input"}
    with pytest.raises(ValueError, match="table3 has no row 'flip'; choose of patch_pca_k_32, "):
        jobs_of("table3", labels=["flip"])


def write_run(folder: Path, seed: int, recipe: dict, is_finished: bool = True) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"seed": seed, "recipe": recipe}))
    if is_finished:
        (folder / "encoder").mkdir()
        (folder / "encoder" / MANIFEST).write_text("{}")


def test_a_finished_encoder_is_measured_and_not_trained_again(tmp_path):
    recipe = load_recipe("l_dae", "cpu")
    write_run(run_folder(recipe, 0, Options(runs=tmp_path)), 0, recipe.to_dict())
    write_run(run_folder(recipe, 1, Options(runs=tmp_path)), 1, recipe.to_dict(), is_finished=False)
    jobs = jobs_of("single-level", seeds=[0, 1], runs=tmp_path)
    mine = [(job.kind, job.seed) for job in jobs if job.recipe.name == "l_dae"]
    assert mine == [("probe", 0), ("pretrain", 1), ("probe", 1)]


@pytest.mark.parametrize(
    ("seed", "name", "epochs", "message"),
    [
        (1, "l_dae", 4, "seed=1, not 0"),
        (0, "flip", 4, "of flip, not of l_dae"),
        (0, "l_dae", 9, "train.epochs=9, not 4"),
    ],
)
def test_a_folder_that_holds_another_run_is_refused(tmp_path, seed, name, epochs, message):
    recipe = load_recipe("l_dae", "cpu")
    there = recipe.to_dict() | {"name": name, "train": recipe.train | {"epochs": epochs}}
    folder = run_folder(recipe, 0, Options(runs=tmp_path))
    write_run(folder, seed, there)
    with pytest.raises(ValueError, match=message):
        jobs_of("single-level", runs=tmp_path)
    (folder / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="cannot be read as a run; move .* away"):
        jobs_of("single-level", runs=tmp_path)


@pytest.mark.parametrize("tier", TIERS)
def test_learned_tokenizers_are_trained_once_and_shared_by_seeds_and_recipes(tier):
    jobs = jobs_of("table1", tier)
    trained = [job.output.parent for job in jobs if job.kind == "tokenizer"]
    used = [Path(job.words[job.words.index("--tokenizer") + 1]) for job in jobs if job.kind == "pretrain"]
    assert len(set(trained)) == len(trained) < len({job.recipe.name for job in jobs if job.kind == "pretrain"})
    assert set(used) == set(trained)


@pytest.mark.parametrize(("tier", "is_cached"), [("cpu", True), ("desk", False), (None, True)])
def test_latents_are_cached_only_of_convolutional_tokenizers_on_images_that_never_change(tier, is_cached):
    for job in jobs_of("table2", tier, seeds=[0]):
        if job.kind == "pretrain":
            wanted = is_cached and job.recipe.model["tokenizer"] == "conv_vae"
            assert ("--cache-latents" in job.words) == wanted


def test_distances_need_an_extractor_and_are_left_out_with_a_sentence_without():
    what = experiment("table1", "cpu")
    jobs, sentences = missing_jobs(what, numbers(what, [], "cpu"), "cpu", [0], Options())
    assert {job.words[0] for job in jobs} == {"tokenizer", "pretrain", "probe"}
    assert len(sentences) == 1 and "--extractor" in sentences[0]
    jobs, sentences = missing_jobs(what, numbers(what, [], "cpu"), "cpu", [0], Options(extractor=EXTRACTOR))
    assert "fid" in {job.words[0] for job in jobs} and not sentences


@pytest.mark.parametrize("name", ["table1", "table2", "table4", "single-level"])
def test_floors_of_a_recipe_are_measured_once_and_those_that_all_share_once_in_the_experiment(name):
    probes = [job for job in jobs_of(name, "desk", extractor=EXTRACTOR) if job.words[0] == "probe"]
    floors = [floor for job in probes for floor in floors_of(job)]
    assert floors.count("pixels") == floors.count("random_patches") == 1
    assert floors.count("untrained") == len({job.recipe.name for job in probes})
    assert all(floors_of(job) == ["none"] for job in probes if job.seed > 0)


def test_shared_floors_that_the_ledger_has_are_not_measured_again():
    known = jobs_of("single-level", rows=[result("l_dae", 0, 45.0)], seeds=[1])
    assert [floors_of(job) for job in known if job.recipe.name == "l_dae"] == [[], ["none"]]
    floors = {"raw pixels at 32x32": {"top1": 41.0}, "random whitened patches, stride 2": {"top1": 56.0}}
    jobs = jobs_of("single-level", rows=[result("l_dae", 0, 45.0, floors=floors)], seeds=[0])
    assert [floors_of(job) for job in jobs if job.kind == "probe"] == [["latents", "untrained"]]


# ---- running them


def cheap(*words: str, **others) -> Job:
    return Job(f"to {' '.join(words)}", load_recipe("l_dae"), 0, "probe", words, **others)


def test_a_command_that_fails_ends_it_and_says_what_to_do(capfd):
    jobs = [cheap("recipes", "show", "nothing"), cheap("recipes", "tree")]
    with pytest.raises(
        ValueError, match="`ldae recipes show nothing` ended with exit code 2.* is kept: mend it and run"
    ):
        run_jobs(jobs, Options())
    printed = capfd.readouterr()
    assert "[1/2] to recipes show nothing" in printed.out and "[2/2]" not in printed.out
    assert "recipe 'nothing' is unknown" in printed.err


def test_nothing_begins_when_the_time_is_over():
    said = []
    assert run_jobs([cheap("recipes", "show", "nothing")], Options(), 1e-12, said.append) == "time"
    assert said == ["stopped after 1e-12 hours, before to recipes show nothing; the same command goes on"]


def ldae(*arguments: str | Path):
    return CliRunner().invoke(app, ["reproduce", *map(str, arguments)])


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder, with a space in its name, of a tier of its own and its images of two classes."""
    folder = tmp_path_factory.mktemp("at home")

    def drawn(first: int, count: int) -> Dataset:
        images = dataset_of([encoded(number) for number in range(first, first + count)])
        return images.map(lambda _, number: {"label": number % 2}, with_indices=True)

    DatasetDict(train=drawn(0, 32), test=drawn(32, 12)).save_to_disk(folder / "pictures")
    (folder / "tiny.yaml").write_text(TINY_TIER.replace("PICTURES", str(folder / "pictures")))
    return folder


def test_what_is_stopped_goes_on_and_gives_what_one_run_gives_which_is_then_a_table(home, monkeypatch):
    monkeypatch.chdir(home)
    table = ["single-level", "--tier", "tiny.yaml", "--ledger", "my results.jsonl"]
    common = [*table, "--seed", "0", "--num-workers", "0"]
    run = home / "my runs" / "tiny" / "l_dae-seed-0"

    # Ctrl-C in a training: the terminal sends it to all of its processes.
    command = [sys.executable, "-m", "ldae_hf.cli", "reproduce", *common, "--runs", "my runs"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    until = time.monotonic() + 120
    while not (run / "run.json").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 75, printed
    assert "stopped in l_dae (tier tiny), seed 0; the same command goes on" in printed and "so far" in printed
    assert not Path("my results.jsonl").exists() and not (run / "encoder").exists()

    # The same with a limit, which ends before the probe: a training is told how much time is left.
    for _ in range(5):
        stopped = ldae(*common, "--runs", "my runs", "--max-hours", "1e-5")
        assert stopped.exit_code == 0 and "the same command goes on" in stopped.stdout
        assert "--max-minutes 0.1" in stopped.stdout and "[2/4]" not in stopped.stdout and "not run" in stopped.stdout
        if (run / "encoder").exists():  # else 6 seconds were not enough here
            break

    # All of it elsewhere, in one go.
    whole = ldae(*common, "--runs", "other runs")
    assert whole.exit_code == 0, whole.output
    printed = whole.stdout[whole.stdout.index("A single noise level") :]
    rows = [json.loads(line) for line in Path("my results.jsonl").read_text().splitlines()]
    found = [(row["recipe"], row["tier"], row["training"]["seed"]) for row in rows]
    assert found == [("l_dae", "tiny", 0), ("single_level", "tiny", 0)]
    for row in rows:
        assert re.search(rf"^{row['recipe']} .* {row['top1']:.1f} \(1\)", printed, re.MULTILINE)
    assert "too few seeds" in printed and "floor: raw pixels" in printed
    weights = Path("encoder", "model.safetensors")
    assert (run / weights).read_bytes() == (Path("other runs", "tiny", "l_dae-seed-0") / weights).read_bytes()

    # Again: nothing is run.
    assert ldae(*common, "--runs", "other runs").stdout == ldae(*table, "--table-only").stdout == printed
    assert len(Path("my results.jsonl").read_text().splitlines()) == 2

    # Three seeds make a verdict.
    more = [json.dumps(row | {"training": row["training"] | {"seed": seed}}) for row in rows for seed in (1, 2)]
    with open("my results.jsonl", "a") as stream:
        stream.write("\n".join(more) + "\n")
    judged = ldae(*table, "--table-only", "--markdown").stdout
    assert re.search(r"\| `single_level` .* \(3\) \| 0.0 \| (holds|reversed|within noise) \|", judged)
    in_overview = ldae(*table[1:]).stdout.splitlines()
    assert in_overview[0].endswith("tiny.yaml")
    [line] = [line for line in in_overview if line.startswith("single-level")]
    assert re.search("1 (holds|reversed|within noise)$", line)


def test_a_dry_run_names_the_commands_and_the_time_or_why_it_cannot_be_said(home, monkeypatch):
    monkeypatch.chdir(home)
    Path("elsewhere.yaml").write_text(TINY_TIER.replace("PICTURES", "not/here"))
    said = {}
    for tier in ("tiny.yaml", "elsewhere.yaml"):
        words = ["reproduce", "single-level", "--tier", tier, "--ledger", "none.jsonl", "--seed", "0", "--dry-run"]
        # In a process of its own: accelerate keeps one precision per process, and the measurement has its own.
        command = [sys.executable, "-m", "ldae_hf.cli", *words]
        shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=240)
        commands = re.findall(r"ldae (pretrain \w+|probe .+?single_level-seed-0|probe .+?l_dae-seed-0)", shown.stdout)
        assert [command.split()[0] for command in commands] == ["pretrain", "probe", "pretrain", "probe"]
        said[tier] = shown.stdout.strip().splitlines()[-1]
    assert re.fullmatch(r"4 commands, about \d+ (s|min) on this machine, one after the other", said["tiny.yaml"])
    assert "4 commands; how long they take here cannot be said: not/here is not on" in said["elsewhere.yaml"]
    assert not (home / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table9"], "There is no table or figure 'table9'"),
        (["table3", "--tier", "gpu"], "tier 'gpu' is unknown"),
        (["--tier", "gpu"], "tier 'gpu' is unknown"),
        (["table3", "--tier", "absent.yaml"], "tier absent.yaml cannot be read"),
        (["table3", "--row", "flip"], "table3 has no row 'flip'"),
        (["table3", "--max-hours", "0"], "--max-hours 0 is no time"),
        (["table3", "--max-hours", "-1"], "--max-hours -1 is no time"),
        (["table3", "--max-hours", "nan"], "--max-hours nan is no time"),
        (["table3", "--max-hours", "inf"], "--max-hours inf is no time"),
        (["table3", "--table-only", "--dry-run"], "--dry-run means nothing with --table-only"),
        (["table3", "--table-only", "--row", "l_dae"], "--row means nothing with --table-only"),
        (["table3", "--table-only", "--seed", "0"], "--seed means nothing with --table-only"),
        (["table3", "--table-only", "--ledger", "absent.jsonl"], "There is no ledger absent.jsonl"),
        (["table3", "--table-only", "--ledger", "."], "directory"),
        (["table3", "--ledger", "wrong.jsonl", "--table-only"], "Row 2 of the ledger is no linear_probe"),
        (["table1", "--extractor", "absent"], "absent does not exist"),
        (["--table-only"], "--table-only means nothing without a name"),
        (["--output", "table"], "--output means nothing without a name"),
    ],
)
def test_what_a_user_gets_wrong_is_said_in_a_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = [result("l_dae", 0, 45.0), result("l_dae", 1, 45.0, changes={"protocol.test": None})]
    Path("wrong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong))
    found = ldae(*arguments)
    assert found.exit_code == 2 and found.stdout == ""
    assert found.stderr.startswith("Error: ") and message in found.stderr and found.stderr.count("\n") == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["wrong.jsonl"]
