"""`ldae report`: what a run's folder tells, on one page that needs nothing else and believes no string."""

import base64
import json
import os
import time
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ldae_hf.cli import app
from ldae_hf.evaluation.curves import curve_svg, linear_ticks, logarithmic_ticks, short, thinned, trend
from ldae_hf.evaluation.html_text import duration, moment
from ldae_hf.evaluation.report import header, write_report
from ldae_hf.evaluation.run_record import number, read_run
from ldae_hf.recipes import load_recipe


VOID = {"meta", "br", "img", "input", "link", "hr"}
NOW = 0.0


@pytest.fixture(autouse=True)
def clock() -> None:
    """A run is alive or dead by the clock, and tests may wait for long between being collected and being run."""
    global NOW
    NOW = time.time()


class Page(HTMLParser):
    """A page that is checked while it is read: every element is closed by its own tag, every id is there once, nothing
    is fetched from elsewhere and nothing runs but the page's own script."""

    def __init__(self, file: Path):
        super().__init__()
        self.open, self.ids, self.sources, self.scripts, self.words, self.policy = [], [], [], [], [], ""
        source = file.read_text(encoding="utf-8")
        self.feed(source)
        self.close()
        assert not self.open
        assert len(self.ids) == len(set(self.ids))
        [script] = self.scripts
        digest = base64.b64encode(sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in self.policy and "default-src 'none'" in self.policy
        assert all(target.startswith("data:image/") or target[1:] in self.ids for target in self.sources)
        assert "http:" not in source.replace("http-equiv", "") and "https:" not in source and "@import" not in source
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert not any(name.startswith("on") or name in ("srcdoc", "srcset", "formaction") for name in attributes)
        self.sources += [attributes[name] for name in ("src", "href", "xlink:href") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)


def write_lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics(first: int, last: int, began: float, every: int = 10, pace: float = 1.0) -> list[dict]:
    """Lines of a training of 400 steps, 100 an epoch, `pace` seconds a step."""
    return [
        {
            "step": step,
            "epoch": step / 100,
            "learning_rate": 1e-3 * step / 400,
            "loss": 1 / step,
            "gradient_norm": 0.5,
            "images_per_second": 128 / pace,
            "data_wait": 0.02,
            "bad_images": 0,
            "time": began + (step - first) * pace,
        }
        for step in range(first + every, last + 1, every)
    ]


def start(step: int, at: float, **facts) -> dict:
    machine = {"cpu": "A processor", "cores": 8, "threads": 4, "gpu": None}
    known = dict(command="ldae pretrain l_dae", commit="abc123", machine=machine, versions={"torch": "2.13.0"})
    return {"event": "start", "time": at, "step": step, "total_steps": 400, "num_processes": 2, **known, **facts}


def end(step: int, at: float, reason: str, detail: str = "") -> dict:
    return {"event": "end", "time": at, "step": step, "reason": reason, "detail": detail}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that began 400 seconds ago, was killed after step 200, and is at step 300."""
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = load_recipe("l_dae", "cpu", ["train.epochs=4"]).to_dict()
    (folder / "run.json").write_text(json.dumps({"seed": 0, "recipe": recipe, "num_images": 12_800}))
    write_lines(folder / "metrics.jsonl", metrics(0, 200, NOW - 400) + metrics(200, 300, NOW - 110))
    write_lines(folder / "sessions.jsonl", [start(0, NOW - 400), start(200, NOW - 110)])
    return folder


def append(file: Path, row: dict) -> None:
    with open(file, "a") as stream:
        stream.write(json.dumps(row) + "\n")


def page_of(run: Path) -> Page:
    return Page(write_report(run))


def paint(file: Path, size: int = 8) -> None:
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file)


# ---- how a run is


def test_a_run_that_lives_says_where_it_is_and_when_it_will_be_done(run):
    page = page_of(run)
    assert "Running at step 300." in page.text
    assert "step 300 of 400 (75.0%)" in page.text
    assert "l_dae (tier cpu) train.epochs=4" in page.text
    assert "in 2 sessions" in page.text
    record = read_run(run)
    assert record.seconds_per_step == pytest.approx(1.0)
    record.now = NOW
    assert f"2 min of training left at the last pace, about {moment(NOW + 100)}" in header(record)


@pytest.mark.parametrize(
    ("reason", "detail", "said"),
    [
        ("finished", "", "Finished at step 300."),
        ("limit", "", "Stopped at step 300 by the limit that it was given"),
        ("SIGTERM", "", "Stopped at step 300 by SIGTERM; the same command goes on"),
        ("error", "RunError: the disk is full", "Failed at step 300: RunError: the disk is full"),
    ],
)
def test_a_run_that_has_ended_says_how(run, reason, detail, said):
    append(run / "sessions.jsonl", end(300, NOW - 5, reason, detail))
    assert said in page_of(run).text


def test_a_run_that_has_been_silent_for_longer_than_it_ever_was_counts_as_dead(run):
    past = NOW - 3600
    write_lines(run / "metrics.jsonl", metrics(0, 300, past - 300))
    write_lines(run / "sessions.jsonl", [start(0, past - 310)])
    status = read_run(run).status()
    assert status.word == "silent" and "Silent since step 300" in status.sentence
    write_lines(run / "metrics.jsonl", metrics(0, 300, past - 300 * 200, pace=200.0))  # half an hour for a line
    assert read_run(run).status().word == "running"


def test_a_session_that_noted_no_end_was_killed_and_is_marked_red(run):
    page = page_of(run)
    assert "Ended without a word, killed most likely: session 1 (from step 0)." in page.text
    assert "the session before ended by: killed; this one went on from step 200" in page.text
    assert (run / "report.html").read_text().count('class="mark failed"') == 5  # one in each curve


def test_time_trained_leaves_out_the_pauses(run):
    rows = [start(0, NOW - 9000), end(100, NOW - 8900, "SIGTERM"), start(100, NOW - 400), end(300, NOW - 200, "error")]
    write_lines(run / "sessions.jsonl", rows)
    assert read_run(run).trained_seconds() == pytest.approx(300)


def test_key_figures_are_the_last_loss_the_best_evaluations_and_the_speed(run):
    for step, probe in ((100, 31.5), (200, 35.25), (300, 33.0)):
        append(run / "metrics.jsonl", {"step": step, "probe_top1": probe, "knn_top1": probe - 5, "time": NOW - 3})
    text = page_of(run).text
    assert "loss now 0.003333 lowest 0.003333 at step 300" in text
    assert "best probe top1 35.2 % at step 200; last 33.0 %" in text and "best knn top1 30.2 %" in text
    assert "images/s 128 " in text and "waiting for data 2.0%" in text and "MFU" not in text
    rows = [line | {"tflops_per_second": 210.0, "mfu": 0.41} for line in metrics(0, 300, NOW - 300)]
    write_lines(run / "metrics.jsonl", rows)
    assert "MFU 41.0% of the device's peak, 210 TFLOP/s" in page_of(run).text


# ---- whatever stands in the folder


def test_a_run_of_a_version_without_sessions_and_pictures_has_a_page(run):
    (run / "sessions.jsonl").unlink()
    write_lines(run / "metrics.jsonl", metrics(0, 400, NOW - 90_000))
    text = page_of(run).text
    assert "Finished at step 400." in text and "step 400 of 400" in text
    assert "This run was made before sessions were noted." in text
    assert text.count("There are none.") == 2  # pictures and checkpoints


def test_the_training_of_a_tokenizer_has_a_page_with_its_own_numbers(run):
    recipe = load_recipe("patch_vae", "cpu", ["tokenizer.epochs=4"]).to_dict()
    (run / "run.json").write_text(json.dumps({"seed": 0, "recipe": recipe, "num_images": 12_800}))
    (run / "sessions.jsonl").unlink()
    own = {"reconstruction": 3.5, "kl": 0.25}
    write_lines(run / "metrics.jsonl", [line | own for line in metrics(0, 200, NOW - 200)])
    append(run / "metrics.jsonl", {"step": 200, "watched_squared_error": 0.02, "time": NOW})
    paint(run / "reconstructions" / "step-00000100.png")
    text = page_of(run).text
    assert "patch_vae (tier cpu) tokenizer.epochs=4, its tokenizer" in text
    assert "step 200 of 400" in text and "below what the tokenizer makes of them" in text
    for name in ("reconstruction", "kl", "watched squared error"):
        assert f" {name} " in text


def test_lines_that_are_torn_or_no_objects_are_counted_and_left_out(run):
    with open(run / "metrics.jsonl", "ab") as stream:
        stream.write(b'[1, 2]\n{"step": 310, "loss": \xff}\n{"loss": 3}\n{"step": 320, "lo')
    text = page_of(run).text
    assert "Running at step 300." in text
    assert "3 lines of metrics.jsonl could not be read" in text


def test_numbers_that_are_none_nan_infinite_or_words_leave_a_gap(run):
    rows = metrics(0, 300, NOW - 300)
    rows[3]["loss"], rows[4]["loss"], rows[5]["loss"], rows[6]["loss"] = None, float("nan"), float("inf"), "much"
    rows[7]["gradient_norm"] = 10**400
    rows[8]["time"], rows[9]["epoch"] = "today", None
    rows.append({"step": "no number", "loss": 1.0})
    write_lines(run / "metrics.jsonl", rows)
    text = page_of(run).text
    assert "loss (4 not finite)" in text and "gradient norm (1 not finite)" in text
    assert [number(value) for value in (True, "1", None, 10**400, float("nan"), -2)] == [None] * 5 + [-2.0]


def test_a_folder_without_a_run_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no run that has reported a step yet"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "tokenizer-training").mkdir()
    with pytest.raises(ValueError, match="its tokenizer comes first: ldae report .*tokenizer-training"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_failed_before_its_first_report_has_a_page(run):
    (run / "metrics.jsonl").unlink()
    (run / "run.json").unlink()
    write_lines(run / "sessions.jsonl", [start(0, NOW - 20), end(0, NOW - 10, "error", "OSError: no space")])
    text = page_of(run).text
    assert "Failed at step 0: OSError: no space" in text and "No step has been reported yet." in text


EVIL = "</script></title></svg><script>alert('1')</script><img src=x onerror=alert(2)>\"'&\ud800\x00"


def test_no_string_of_the_folder_becomes_markup(run, tmp_path):
    recipe = json.loads((run / "run.json").read_text())["recipe"]
    for change in ({"name": EVIL}, {"why": EVIL, "overrides": [EVIL], "steps": [EVIL], "origins": {EVIL: EVIL}}):
        (run / "run.json").write_text(json.dumps({"recipe": recipe | change}))
        write_lines(run / "bad_images.jsonl", [{"index": EVIL, "path": EVIL, "reason": EVIL}])
        rows = [line | {EVIL: 1.5, "top1" + EVIL: 20.0} for line in metrics(0, 300, NOW - 300)]
        write_lines(run / "metrics.jsonl", [*rows, {"step": 300, "top1" + EVIL: 21.0}])
        facts = {"command": EVIL, "commit": EVIL, "machine": {EVIL: EVIL}, "versions": EVIL, EVIL: EVIL}
        events = [start(0, NOW - 9, **facts), end(EVIL, EVIL, EVIL, EVIL), start(100, NOW)]
        write_lines(run / "sessions.jsonl", [*events, end(300, NOW, "error", EVIL)])
        failed = run / "failures" / "<script>alert(3)<"
        failed.mkdir(parents=True, exist_ok=True)
        (failed / "replay.json").write_text(json.dumps(dict.fromkeys(("step", "reason", "command", "loss"), EVIL)))
        (run / "checkpoints" / "step-<script>alert(4)<").mkdir(parents=True, exist_ok=True)
        evil_name = tmp_path / "run <script>alert(5)<"
        run.rename(evil_name)
        page = page_of(evil_name)
        assert page.text.count("<script>alert('1')</script>") > 10
        for place in (4, 5):
            assert f"<script>alert({place})<" in page.text
        evil_name.rename(run)


def test_a_recipe_of_another_version_is_shown_as_it_stands(run):
    (run / "run.json").write_text(json.dumps({"recipe": {"name": "old", "epochs": 3}}))
    assert 'as it stands in run.json: { "name": "old", "epochs": 3 }' in page_of(run).text


# ---- what it lists


def test_the_recipe_is_shown_with_who_set_each_value(run):
    text = page_of(run).text
    assert "dit_baseline › remove_class_labels" in text
    assert "remove_input_scaling model.noise_schedule=linear_sigma" in text
    assert "override train.epochs=4" in text and "prediction_target: image" in text


def test_failures_damaged_checkpoints_and_bad_images_are_listed(run):
    failed = run / "failures" / "step-00000250"
    failed.mkdir(parents=True)
    facts = {"step": 250, "reason": "loss is nan", "loss": "nan", "sample_ids": [1, 2, 3], "command": "ldae replay it"}
    (failed / "replay.json").write_text(json.dumps(facts))
    for name in ("step-00000100", "step-00000200.damaged"):
        (run / "checkpoints" / name / "training").mkdir(parents=True)
        (run / "checkpoints" / name / "training" / "rng.safetensors").write_bytes(bytes(1_500_000))
    write_lines(run / "bad_images.jsonl", [{"index": number, "reason": f"reason {number}"} for number in range(60)])
    text = page_of(run).text
    assert "Step 250: loss is nan loss nan · 3 samples" in text and "To see it again: ldae replay it" in text
    assert "step-00000200.damaged was found damaged" in text
    assert "step-00000100 1.5 MB" in text
    assert "60 images could not be read, the first 50" in text and "reason 49" in text and "reason 50" not in text


def test_sessions_are_shown_with_machine_versions_commit_and_command(run):
    text = page_of(run).text
    assert "ldae pretrain l_dae commit abc123 · num processes 2 · cpu A processor · cores 8 · threads 4 · torch" in text


def test_of_many_pictures_the_first_the_last_and_some_between_are_shown(run):
    for step in range(1, 30):
        paint(run / "pictures" / f"step-{step:08d}.png")
    page = page_of(run)
    shown = [step for step in range(1, 30) if f" step {step} epoch {step / 100:.3g}" in page.text]
    assert len(shown) == 6 and shown[0] == 1 and shown[-1] == 29
    assert sum(target.startswith("data:image/png") for target in page.sources) == 6


def test_a_large_picture_is_made_smaller_and_one_that_is_being_written_is_left_out(run):
    paint(run / "pictures" / "step-00000100.png", 800)
    paint(run / "pictures" / "step-00000200.png")
    data = (run / "pictures" / "step-00000100.png").read_bytes()
    assert len(data) > 1_000_000
    (run / "pictures" / "step-00000300.png").write_bytes(data[:5000])
    page = page_of(run)
    kinds = [target[:15] for target in page.sources if target.startswith("data:")]
    assert kinds == ["data:image/jpeg", "data:image/png;"]
    assert "step-00000300.png cannot be read" in page.text
    assert (run / "report.html").stat().st_size < len(data)


# ---- the file


def test_only_the_page_is_written_into_the_runs_folder(run, tmp_path):
    paint(run / "pictures" / "step-00000100.png")

    def contents() -> dict:
        return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in run.rglob("*") if file != page}

    page = run / "report.html"
    before = contents()
    assert write_report(run) == page and contents() | {run: None} == before | {run: None}
    elsewhere = tmp_path / "pages" / "mine.html"
    page.unlink()
    assert write_report(run, elsewhere) == elsewhere
    assert not page.exists() and os.listdir(elsewhere.parent) == ["mine.html"]


def test_the_command_writes_the_page_and_says_where(run, tmp_path):
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 0 and result.stdout == f"{run / 'report.html'}\n"
    result = CliRunner().invoke(app, ["report", str(tmp_path / "absent")])
    assert result.exit_code == 2 and result.stderr.startswith("Error: There is no folder")


# ---- curves


def test_a_thinned_curve_keeps_every_spike_in_its_place():
    points = [(step, 1 + (step % 7) / 10) for step in range(100_000)]
    points[54_321] = (54_321, 99.0)
    points[77_777] = (77_777, -99.0)
    kept = thinned(points)
    assert len(kept) <= 2000 and kept == sorted(kept)
    assert {(54_321, 99.0), (77_777, -99.0)} <= set(kept) <= set(points)
    for first in range(0, 100_000, 10_000):  # the lowest and the highest of every part are those of the whole
        part, left = (
            [value for step, value in each if first <= step < first + 10_000 and value is not None]
            for each in (points, kept)
        )
        assert (min(part), max(part)) == (min(left), max(left))
    assert thinned(points[:500]) == points[:500]


def test_a_thinned_curve_has_a_gap_where_nothing_is_finite():
    points = [(step, None if 4000 <= step < 5000 else 1.0) for step in range(10_000)]
    assert {step // 1000 for step, value in thinned(points) if value is None} == {4}
    svg = curve_svg("loss", points, 10_000)
    path = svg.partition('class="curve band" d="')[2].partition('"')[0]
    assert path.count("M") == 2
    assert curve_svg("loss", [(1, None)], 1).count("circle") == 0


def test_a_long_curve_is_a_band_with_its_median_in_it():
    points = [(step, 1.0 if step % 3 else 9.0) for step in range(10_000)]
    medians = trend(points)
    assert len(medians) == 120 and {value for _, value in medians} == {1.0}
    assert [medians[0][0], medians[-1][0]] == pytest.approx([41.7, 9957.3], abs=0.1)
    assert curve_svg("loss", points, 10_000).count('class="curve') == 2
    assert trend(points[:400]) == [] and curve_svg("loss", points[:400], 400).count('class="curve') == 1
    assert trend([(5, None)] * 1000) == [] and trend([(5, 2.0)] * 1000) == [(5.5, 2.0)]


def test_a_curve_lies_where_its_numbers_are():
    svg = curve_svg("loss", [(0, 1.0), (50, 2.0), (100, 3.0)], 100, steps_per_epoch=50)
    assert 'class="curve" d="M48.0 160.0L196.0 89.0L344.0 18.0"' in svg
    assert "[[0, 1.0], [50, 2.0], [100, 3.0]]" in svg
    assert ">log<" not in svg and ">log<" in curve_svg("loss", [(0, 0.1), (1, 10.0)], 1)
    assert ">log<" not in curve_svg("rate", [(0, 0.1), (1, 10.0)], 1, from_zero=True)
    assert 'class="curve" d="M48.0 89.0"' in curve_svg("loss", [(0, 7.0)], 0)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 1560), (24.5, 28.75), (-3, 7e9), (1e-9, 3e-9), (5, 5)])
def test_ticks_are_round_and_inside(low, high):
    ticks = linear_ticks(low, high)
    assert 1 <= len(ticks) <= 6 and all(low <= tick <= high * (1 + 1e-12) for tick in ticks)
    assert all(len(short(tick)) <= 7 for tick in ticks)


@pytest.mark.parametrize(("low", "high"), [(0.03, 0.9), (1e-9, 2e-3), (1, 10), (3e-5, 4e12)])
def test_logarithmic_ticks_are_inside_too(low, high):
    ticks = logarithmic_ticks(low, high)
    assert 2 <= len(ticks) <= 6 and all(low <= tick <= high for tick in ticks)


def test_times_are_short():
    assert [duration(seconds) for seconds in (-3, 45, 300, 7500, 400_000)] == [
        "0 s",
        "45 s",
        "5 min",
        "2 h 5 min",
        "4 d 15 h",
    ]
    assert [moment(at) for at in (0, None, "x", 1e99)] == ["1970-01-01 00:00 UTC", "–", "–", "–"]
