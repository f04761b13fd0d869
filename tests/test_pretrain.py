"""Pre-training as a whole: exact resume on one layout, equal results on others, nothing lost to a kill."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_runs import Child, dataset_of, encoded, in_processes, lines
from safetensors.torch import load_file
from typer.testing import CliRunner

from ldae_hf import LDAEImageProcessor
from ldae_hf.cli import app
from ldae_hf.manifest import check_folder
from ldae_hf.training import checkpoints, load_images, pretrain
from ldae_hf.training.replay import replay


NUM_IMAGES = 20  # two global batches of 8 an epoch, and four images that are left out
OVERRIDES = {
    "model.image_size": 16,
    "model.patch_size": 4,
    "model.latent_dim": 7,
    "data.crop": "random_resized",
    "data.flip": True,
    "train.epochs": 5,
    "train.warmup_epochs": 1,
    "train.global_batch_size": 8,
    "train.base_learning_rate": 0.05,
    "train.max_grad_norm": 1,
    "train.ema_half_life_epochs": 1,
}
FILE_OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
GOLDEN = Path(__file__).parent / "golden" / "pretrain_losses.txt"
EXAMPLE = Path(__file__).parent.parent / "examples" / "pretrain.py"


# ---- runs, each in a process of its own


def overrides(**changes) -> list[str]:
    values = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in (OVERRIDES | changes).items()
    }
    return [f"{key}={value}" for key, value in values.items()]


def train(output_dir, dataset, changes: dict | None = None, processes: int = 1, prepare=lambda: None, **options):
    """A run on `processes` processes; its result is that of the main one. `prepare` is called in each before it."""
    settings = dict(tier="quickstart", num_workers=0, mixed_precision="no", log_every=1, checkpoint_every=5)
    settings |= dict(output_dir=output_dir, dataset=dataset, overrides=overrides(**(changes or {}))) | options

    def run():
        prepare()
        return pretrain("l_dae", **settings)

    return in_processes(run, processes)


def use_float64():
    torch.set_default_dtype(torch.float64)


@pytest.fixture(scope="session")
def images():
    return dataset_of([encoded(number) for number in range(NUM_IMAGES)])


@pytest.fixture(scope="session")
def parquet(images, tmp_path_factory) -> str:
    """A folder of four Parquet files."""
    folder = tmp_path_factory.mktemp("parquet")
    for shard in range(4):
        images.shard(4, shard, contiguous=True).to_parquet(folder / f"train-{shard:05d}-of-00004.parquet")
    load_images(folder)  # prepared once, not in every fork
    return str(folder)


@pytest.fixture(scope="session")
def unbroken(images, tmp_path_factory) -> Path:
    """The folder of a finished run of ten steps, with checkpoints at 5 and 10."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert train(folder, images) == folder / "encoder"
    return folder


@pytest.fixture
def begun(images, unbroken, tmp_path) -> Path:
    """A run as it stands after five steps."""
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "encoder")
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000010")
    return tmp_path


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(folder) if "loss" in line}


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that the last checkpoint and the encoder hold."""
    files = [
        *checkpoints(folder / "checkpoints")[-1].rglob("*.safetensors"),
        *(folder / "encoder").glob("*.safetensors"),
    ]
    return {
        f"{file.parent.name}/{file.name}/{name}": value for file in files for name, value in load_file(file).items()
    }


def assert_same_run(one: Path, other: Path):
    """Bit for bit: weights, optimizer, EMA, RNG, encoder, and every line of the log, evaluations included."""
    tensors = final_tensors(one), final_tensors(other)
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    assert untimed(one) == untimed(other)


def untimed(folder: Path) -> list[dict]:
    """The lines of the log without what depends on the clock."""
    timed = {"time", "images_per_second", "data_wait", "tflops_per_second"}
    return [{key: value for key, value in line.items() if key not in timed} for line in lines(folder)]


# ---- the numbers of a run


def test_the_losses_are_the_golden_ones(unbroken):
    golden = dict(line.split() for line in GOLDEN.read_text().splitlines() if not line.startswith("#"))
    assert {str(step): loss for step, loss in losses(unbroken).items()} == pytest.approx(
        {step: float(loss) for step, loss in golden.items()}, rel=1e-4
    )


def test_a_run_learns_and_its_log_says_what_it_did(unbroken):
    first, last = lines(unbroken)[0], lines(unbroken)[-1]
    assert [line["step"] for line in lines(unbroken)] == list(range(1, 11))
    assert last["loss"] < 0.6 * first["loss"]
    assert (first["epoch"], last["epoch"]) == (0.5, 5)
    peak = 0.05 * 8 / 256
    assert first["learning_rate"] == pytest.approx(peak / 2) and 0 < last["learning_rate"] < 0.05 * peak
    for line in lines(unbroken):
        assert line["images_per_second"] > 0 and 0 < line["data_wait"] < 1 and line["bad_images"] == 0
        assert line["gradient_norm"] > 0


def test_what_a_run_leaves_behind(unbroken):
    assert {path.name for path in unbroken.iterdir()} == {
        "run.json",
        "processor",
        "checkpoints",
        "metrics.jsonl",
        "sessions.jsonl",
        "run.lock",
        "pictures",
        "encoder",
    }
    assert len(list((unbroken / "pictures").iterdir())) == 5  # one an epoch
    for folder in (*checkpoints(unbroken / "checkpoints"), unbroken / "encoder", unbroken / "processor"):
        check_folder(folder)
    for folder in (*checkpoints(unbroken / "checkpoints"), unbroken / "encoder"):
        assert json.loads((folder / "recipe.json").read_text())["overrides"] == overrides()
        assert (folder / "patch_pca.safetensors").is_file()
    assert "_attn_implementation" not in (unbroken / "encoder" / "config.json").read_text()


# ---- exact resume


def test_ten_steps_are_five_and_a_resumed_five_bit_for_bit(images, unbroken, tmp_path):
    assert train(tmp_path, images, max_steps=5) is None
    assert not (tmp_path / "encoder").exists()
    assert train(tmp_path, images, num_workers=2) == tmp_path / "encoder"
    assert_same_run(unbroken, tmp_path)


def test_a_run_with_a_noise_level_for_each_token_resumes_bit_for_bit_too(images, unbroken, tmp_path):
    changes, (whole, broken) = {"model.timestep_scope": "token"}, (tmp_path / "whole", tmp_path / "broken")
    train(whole, images, changes)
    assert train(broken, images, changes, max_steps=5) is None
    train(broken, images, changes, num_workers=2)
    assert_same_run(whole, broken)
    # Only the timesteps differ: the samples and the noise are those of the run with one for each image.
    assert losses(whole)[10] < 0.7 * losses(whole)[1] and losses(whole)[1] != losses(unbroken)[1]


def test_a_run_killed_at_any_step_goes_on_and_its_log_joins_up(images, unbroken, tmp_path):
    def killed(model, processor):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ChildProcessError, match="signal 9"):
        train(tmp_path, images, evaluations=[killed], evaluate_every=8)
    # Steps 6 and 7 are in the log, but not in a checkpoint; the last line may be torn.
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5, 6, 7, 8]
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 9, "lo')
    train(tmp_path, images)
    assert_same_run(unbroken, tmp_path)


def test_a_run_killed_at_any_file_operation_again_and_again_goes_on(images, unbroken, tmp_path):
    half_written = 0
    for attempt in range(1, 100):

        def die_later(operations=23 * attempt):
            left = operations

            def hook(event, arguments):
                nonlocal left
                if event in FILE_OPERATIONS and str(tmp_path) in str(arguments[0]):
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)

        try:
            encoder = train(tmp_path, images, prepare=die_later, checkpoint_every=2)
            break
        except ChildProcessError as error:
            assert "signal 9" in str(error)
        half_written += any(tmp_path.glob("**/.*.writing"))
        for checkpoint in checkpoints(tmp_path / "checkpoints"):
            check_folder(checkpoint)
    assert encoder == tmp_path / "encoder"
    assert attempt > 5 and half_written > 1
    assert_same_run(unbroken, tmp_path)
    assert not any(tmp_path.glob("**/.*"))


def test_a_finished_run_returns_at_once_and_looks_at_no_data(unbroken, capfd):
    before = sorted((path, path.stat().st_mtime_ns) for path in unbroken.rglob("*"))
    assert train(unbroken, "no-such-data-set") == unbroken / "encoder"
    assert sorted((path, path.stat().st_mtime_ns) for path in unbroken.rglob("*")) == before
    assert "this run is finished" in capfd.readouterr().out


def test_a_run_that_died_before_it_wrote_its_encoder_writes_it_and_trains_no_step(images, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "encoder")
    train(tmp_path, images)
    assert_same_run(unbroken, tmp_path)


def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(images, unbroken, tmp_path, capfd):
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "encoder")
    newest = checkpoints(tmp_path / "checkpoints")[-1]
    with open(newest / "model.safetensors", "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"?")
    train(tmp_path, images)
    assert "model.safetensors is missing or damaged" in capfd.readouterr().out
    assert (newest.parent / f"{newest.name}.damaged").is_dir()
    assert_same_run(unbroken, tmp_path)


def test_a_loss_that_is_not_finite_leaves_a_note_that_repeats_the_step(images, tmp_path):
    wild = {"train.base_learning_rate": 1e30, "train.warmup_epochs": 0}
    with pytest.raises(ValueError, match="ldae replay .*step-00000001` repeats it image by image"):
        train(tmp_path, images, wild)
    [note] = (tmp_path / "failures").iterdir()
    facts = json.loads((note / "replay.json").read_text())
    assert facts["step"] == 1 and facts["seed"] == 0 and facts["epoch"] == 0
    found = Child(lambda: replay(note, dataset=images, batch_size=4)).join()
    assert sorted(row["sample_id"] for row in found["bad"]) == sorted(facts["sample_ids"])
    assert {row["where"] for row in found["bad"]} == {"the loss"} and found["images"] == 8


def test_weights_that_are_not_finite_are_not_saved_over_good_ones(images, tmp_path):
    def spoil(model, processor):
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)
        return {}

    without_ema = {"train.ema_half_life_epochs": None}  # whose weights would be put in place meanwhile
    train(tmp_path, images, without_ema, max_steps=5)
    with pytest.raises(ValueError, match="is not finite after step 6, which is not saved; .*step-00000005 is intact"):
        train(tmp_path, images, without_ema, evaluations=[spoil], max_steps=6, evaluate_every=6)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000005"]


def test_a_run_that_is_told_to_be_deterministic_is_the_same_run(images, unbroken, tmp_path):
    train(tmp_path, images, deterministic=True)
    assert_same_run(unbroken, tmp_path)


def test_the_steps_of_a_run_may_be_limited_by_number_or_by_time(images, tmp_path, capfd):
    assert train(tmp_path, images, max_steps=3) is None
    assert train(tmp_path, images, max_minutes=1e-9) is None
    assert train(tmp_path, images, max_steps=2) is None
    assert list(losses(tmp_path)) == [1, 2, 3, 4]
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000003", "step-00000004"]
    assert "stopped at step 4 of 10; run the same command again" in capfd.readouterr().out


def test_a_line_holds_the_means_since_the_last_one(images, unbroken, tmp_path):
    train(tmp_path, images, log_every=3, max_steps=7)
    each = losses(unbroken)
    means = {3: (1, 2, 3), 5: (4, 5), 6: (6,), 7: (7,)}  # at a checkpoint too
    assert losses(tmp_path) == pytest.approx({step: np.mean([each[s] for s in steps]) for step, steps in means.items()})


# ---- other layouts, other ways to compute the same


@pytest.fixture(scope="session")
def in_double(images, tmp_path_factory) -> Path:
    """The folder of the run in float64, where the order of a sum does not matter."""
    folder = tmp_path_factory.mktemp("float64")
    train(folder, images, prepare=use_float64)
    return folder


@pytest.mark.parametrize(
    "layout",
    [
        dict(per_device_batch_size=4),
        pytest.param(dict(processes=2, per_device_batch_size=2, num_workers=1), marks=pytest.mark.slow),
    ],
    ids=["accumulation", "two processes"],
)
def test_other_layouts_train_the_same_weights_in_float64_without_a_warning(images, in_double, tmp_path, layout, capfd):
    train(tmp_path, images, prepare=use_float64, **layout)
    assert losses(in_double) == pytest.approx(losses(tmp_path), rel=1e-10)
    other = final_tensors(tmp_path)
    for name, value in final_tensors(in_double).items():
        if value.dtype == torch.float64:  # all but the EMA, which is fp32
            torch.testing.assert_close(value, other[name], rtol=1e-10, atol=1e-10)
    assert other["step-00000010/model.safetensors/decoder.head.weight"].dtype == torch.float64
    assert "Warning" not in capfd.readouterr().err


@pytest.mark.slow
def test_two_processes_list_a_bad_image_once(tmp_path):
    contents = [encoded(number) for number in range(NUM_IMAGES)]
    contents[3] = contents[11] = b""
    broken = dataset_of(contents)
    for limit in (2, 4):  # both epochs show at least one of them to either process
        train(tmp_path, broken, {"train.epochs": 3}, processes=2, max_steps=limit)
    assert sorted(row["index"] for row in lines(tmp_path, "bad_images.jsonl")) == [3, 11]
    assert [line["bad_images"] for line in lines(tmp_path)][-1] == 2


@pytest.mark.slow
def test_the_example_on_two_processes_has_the_losses_of_one(parquet, unbroken, tmp_path):
    options = [part for override in overrides() for part in ("--set", override)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(EXAMPLE), "l_dae"]
    command += ["--tier", "quickstart", "--dataset", parquet, "--output-dir", str(tmp_path), *options]
    command += ["--num-workers", "0", "--mixed-precision", "no", "--log-every", "1", "--checkpoint-every", "5"]
    subprocess.run(command, check=True, env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
    assert losses(tmp_path) == pytest.approx(losses(unbroken), rel=1e-5)


def test_gradient_checkpointing_changes_no_loss_and_warns_of_nothing(images, unbroken, tmp_path, capfd):
    train(tmp_path, images, max_steps=4, gradient_checkpointing=True)
    assert losses(tmp_path) == pytest.approx({step: losses(unbroken)[step] for step in (1, 2, 3, 4)}, rel=1e-6)
    assert "Warning" not in capfd.readouterr().err


def test_bf16_is_near_and_keeps_weights_and_checkpoints_in_fp32(images, unbroken, tmp_path):
    train(tmp_path, images, max_steps=4, mixed_precision="bf16")
    each = {step: losses(unbroken)[step] for step in (1, 2, 3, 4)}
    assert losses(tmp_path) == pytest.approx(each, rel=0.02) and losses(tmp_path) != each
    weights = load_file(checkpoints(tmp_path / "checkpoints")[-1] / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_compiled_model_has_the_same_losses(images, unbroken, tmp_path, precision):
    train(tmp_path, images, max_steps=4, compile=True, mixed_precision=precision)
    each = {step: losses(unbroken)[step] for step in (1, 2, 3, 4)}
    assert losses(tmp_path) == pytest.approx(each, rel=1e-4 if precision == "no" else 0.02)


def test_a_setting_of_accelerate_config_does_not_divide_the_loss_once_more(images, unbroken, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train(tmp_path, images, max_steps=2)
    assert losses(tmp_path) == {step: losses(unbroken)[step] for step in (1, 2)}
    assert lines(tmp_path)[0]["gradient_norm"] == lines(unbroken)[0]["gradient_norm"]


# ---- EMA, evaluations, trackers


def test_the_encoder_of_a_run_with_an_ema_has_the_emas_weights(unbroken):
    last = checkpoints(unbroken / "checkpoints")[-1]
    encoder, own = load_file(unbroken / "encoder" / "model.safetensors"), load_file(last / "model.safetensors")
    average = load_file(last / "training" / "ema.safetensors")
    for name, value in encoder.items():
        assert torch.equal(value, average.get(f"ldae.{name}", own[f"ldae.{name}"]))
    assert not torch.equal(encoder["patch_embedding.weight"], own["ldae.patch_embedding.weight"])


def test_the_encoder_of_a_run_without_an_ema_has_its_last_weights(images, tmp_path):
    train(tmp_path, images, {"train.ema_half_life_epochs": None, "train.epochs": 1})
    last = checkpoints(tmp_path / "checkpoints")[-1]
    own = load_file(last / "model.safetensors")
    assert not (last / "training" / "ema.safetensors").exists()
    for name, value in load_file(tmp_path / "encoder" / "model.safetensors").items():
        assert torch.equal(value, own[f"ldae.{name}"])


def test_evaluations_see_the_emas_weights_in_eval_mode_every_so_often_and_leave_no_trace(images, unbroken, tmp_path):
    def evaluation(model, processor):
        torch.rand(7)
        assert not model.training and processor.fingerprint == model.config.processor_fingerprint
        return {
            "weight": model.ldae.patch_embedding.weight.double().sum().item(),
            "modules": len(list(model.modules())),
        }

    train(tmp_path, images, evaluations=[evaluation, lambda model, processor: {"one": 1}], evaluate_every=4)
    evaluated = [line for line in lines(tmp_path) if "loss" not in line]
    assert [(line["step"], "one" in line) for line in evaluated] == [
        (step, one) for step in (4, 8, 10) for one in (False, True)
    ]
    encoder = load_file(tmp_path / "encoder" / "model.safetensors")
    assert evaluated[-2]["weight"] == encoder["patch_embedding.weight"].double().sum().item()
    assert losses(tmp_path) == losses(unbroken)
    assert torch.equal(
        encoder["patch_embedding.weight"], final_tensors(unbroken)["encoder/model.safetensors/patch_embedding.weight"]
    )


def test_a_tracker_is_fed_beside_the_log(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, images, max_steps=2, report_to=["tensorboard"])
    (file,) = (tmp_path / "ldae").glob("events*")
    events = EventAccumulator(str(file)).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(list(losses(tmp_path).values()))


# ---- what goes wrong


def test_a_loss_that_is_not_finite_stops_the_run_before_the_checkpoint_is_overwritten(images, tmp_path):
    wild = {"train.base_learning_rate": 1e30, "train.warmup_epochs": 0}
    with pytest.raises(ValueError, match=r"At step 2 loss is (nan|inf).*step-00000001 is intact"):
        train(tmp_path, images, wild, checkpoint_every=1, keep_checkpoints=1)
    (kept,) = checkpoints(tmp_path / "checkpoints")
    assert kept.name == "step-00000001" and list(losses(tmp_path)) == [1]
    assert all(value.isfinite().all() for value in load_file(kept / "model.safetensors").values())


def test_bad_images_are_replaced_and_listed_once_with_their_reason(images, tmp_path):
    contents = [encoded(number) for number in range(NUM_IMAGES)]
    contents[3], contents[11] = b"", contents[11][:-40]
    for limit in (4, None):
        train(tmp_path, dataset_of(contents), max_steps=limit, num_workers=1)
    listed = {row["index"]: row["reason"] for row in lines(tmp_path, "bad_images.jsonl")}
    assert len(lines(tmp_path, "bad_images.jsonl")) == 2
    assert "empty" in listed[3] and "truncated" in listed[11]
    assert [line["bad_images"] for line in lines(tmp_path)][-1] == 2


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({"train.epochs": 6}, {}, "holds a run with train.epochs=5, not 6; choose another --output-dir"),
        ({"model.latent_scaling": "whiten"}, {}, "model.latent_scaling='global', not 'whiten'"),
        ({}, {"seed": 1}, "holds a run with seed=0, not 1"),
        ({}, {"dataset": dataset_of([encoded(number) for number in range(21)])}, "num_images=20, not 21"),
        ({}, {"streaming": True, "num_images": 20}, "streaming=False, not True"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(images, begun, changes, options, message):
    with pytest.raises(ValueError, match=message):
        train(begun, changes=changes, **{"dataset": images} | options)
    assert [path.name for path in checkpoints(begun / "checkpoints")] == ["step-00000005"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"seed": 0, "recipe": 1}'])
def test_a_folder_whose_run_cannot_be_read_is_refused(images, begun, content):
    (begun / "run.json").write_text(content)
    with pytest.raises(ValueError, match="run.json cannot be read as a run; choose another --output-dir"):
        train(begun, images)


def test_what_an_older_version_did_not_write_is_no_reason_to_refuse(images, begun, unbroken):
    run = json.loads((begun / "run.json").read_text())
    del run["num_images"], run["streaming"], run["recipe"]["train"]["betas"]
    (begun / "run.json").write_text(json.dumps(run))
    train(begun, images)
    assert_same_run(unbroken, begun)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(mixed_precision="fp16"), "mixed_precision is 'fp16', but must be 'bf16' or 'no'"),
        (dict(log_every=0), "log_every is 0, but must be at least 1"),
        (dict(checkpoint_every=0), "checkpoint_every is 0"),
        (dict(keep_checkpoints=0), "keep_checkpoints is 0"),
        (dict(evaluate_every=-1), "evaluate_every is -1"),
        (dict(per_device_batch_size=3), "does not divide the 8 images"),
        (dict(report_to=["wandb"]), "tracker wandb is not installed"),
        (dict(num_images=3), "is no stream"),
        (dict(changes={"train.global_batch_size": 32}), "needs 32 images for one step but the data set has 20"),
    ],
)
def test_a_wrong_option_is_an_error_that_leaves_no_folder(images, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", images, **options)
    assert not (tmp_path / "run").exists()


# ---- a processor of one's own


def fitted(**settings) -> LDAEImageProcessor:
    processor = LDAEImageProcessor(**dict(image_size=16, patch_size=4, latent_dim=7) | settings)
    random = np.random.default_rng(5)
    return processor.fit(list(random.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)), progress=False)


def test_a_fitted_processor_is_used_instead_of_a_new_fit(images, unbroken, tmp_path):
    fitted().save_pretrained(tmp_path / "mine")
    train(tmp_path / "run", images, processor=tmp_path / "mine", max_steps=1)
    used = LDAEImageProcessor.from_pretrained(tmp_path / "run" / "processor")
    assert used.fingerprint == fitted().fingerprint
    assert losses(tmp_path / "run")[1] != losses(unbroken)[1]
    train(tmp_path / "run", images, max_steps=2)  # it is the run's own now
    train(tmp_path / "run", images, processor=tmp_path / "mine", max_steps=3)
    with pytest.raises(ValueError, match="began with the processor in .*, not the one in"):
        fitted(latent_dim=7, image_mean=[0.4, 0.5, 0.5]).save_pretrained(tmp_path / "other")
        train(tmp_path / "run", images, processor=tmp_path / "other")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: None, "There is no folder .* with a processor"),
        (lambda folder: LDAEImageProcessor(16, 4, 7).save_pretrained(folder), "has no PCA basis yet"),
        (lambda folder: fitted(latent_dim=6).save_pretrained(folder), "has latent_dim=6, but the model has 7"),
        (lambda folder: fitted(image_size=32).save_pretrained(folder), "has image_size=32, but the model has 16"),
        (lambda folder: fitted(latent_scaling="none").save_pretrained(folder), "has latent_scaling='none'"),
    ],
)
def test_a_processor_that_does_not_fit_is_refused_and_not_kept(images, tmp_path, make, message):
    make(tmp_path / "mine")
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", images, processor=tmp_path / "mine")
    assert not (tmp_path / "run" / "processor").exists()
    assert train(tmp_path / "run", images, max_steps=1) is None


# ---- streams


@pytest.mark.slow
def test_two_processes_each_resume_where_they_stood_in_a_stream_bit_for_bit(parquet, tmp_path):
    stream = dict(streaming=True, num_images=NUM_IMAGES, num_workers=1, processes=2)
    train(tmp_path / "whole", parquet, **stream)
    for limit in (5, None):
        train(tmp_path / "parts", parquet, max_steps=limit, **stream)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    "layout, message",
    [
        (dict(num_workers=2), "saved with num_workers=1, not 2"),
        (dict(per_device_batch_size=4), "saved with batch_size=8, not 4"),
        pytest.param(dict(processes=2), "saved by 1 processes, not 2", marks=pytest.mark.slow),
    ],
)
def test_a_stream_is_resumed_on_its_layout_only(parquet, tmp_path, layout, message):
    stream = dict(streaming=True, num_images=NUM_IMAGES, num_workers=1)
    train(tmp_path, parquet, max_steps=1, **stream)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, parquet, **stream | layout)


# ---- the command


def ldae(*arguments) -> tuple[int, str]:
    """Exit code and error output of the command, in a process of its own."""

    def run():
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stderr

    return Child(run).join()


def pretrain_command(output_dir, dataset, *arguments) -> tuple[int, str]:
    settings = [part for override in overrides() for part in ("--set", override)]
    fixed = ["--num-workers", "0", "--mixed-precision", "no", "--checkpoint-every", "5", "--log-every", "1"]
    return ldae(
        "pretrain",
        "l_dae",
        "--tier",
        "quickstart",
        "--output-dir",
        output_dir,
        "--dataset",
        dataset,
        *settings,
        *fixed,
        *arguments,
    )


def test_the_command_trains_as_the_function_does_and_resumes(parquet, unbroken, tmp_path):
    for limit in (["--max-steps", "5"], []):
        code, _ = pretrain_command(tmp_path, parquet, *limit)
        assert code == 0
    assert_same_run(unbroken, tmp_path)


def test_the_command_explains_itself():
    result = CliRunner().invoke(app, ["pretrain", "--help"])
    assert result.exit_code == 0
    for option in ("--output-dir", "--num-images", "--streaming", "--compile", "--max-minutes", "--set"):
        assert option in result.stdout


def a_damaged_checkpoint(folder: Path, begun: Path):
    with open(begun / "checkpoints" / "step-00000005" / "training" / "optimizer.safetensors", "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"?")
    return begun, None


def a_stream_of_unknown_length(folder: Path, begun: Path):
    dataset_of([encoded(0)]).to_parquet(folder / "images" / "train.parquet")
    return folder / "run", folder / "images"


def no_readable_image(folder: Path, begun: Path):
    dataset_of([b""] * NUM_IMAGES).to_parquet(folder / "bad" / "train.parquet")
    return folder / "run", folder / "bad"


@pytest.mark.parametrize(
    "make, arguments, message",
    [
        (lambda folder, begun: (folder / "run", "./nothing"), [], "There is no file or folder ./nothing"),
        (lambda folder, begun: (folder / "run", "no-such-data-set-anywhere"), [], "no-such-data-set-anywhere"),
        (a_stream_of_unknown_length, ["--streaming"], "does not say how many images it has; give num_images"),
        (lambda folder, begun: (begun, None), ["--seed", "3"], "holds a run with seed=0, not 3"),
        (a_damaged_checkpoint, [], "optimizer.safetensors is missing or damaged"),
        (no_readable_image, ["--num-workers", "1"], "images in a row of "),
    ],
)
def test_a_users_error_is_one_sentence_and_exit_code_2(parquet, begun, tmp_path_factory, make, arguments, message):
    output_dir, dataset = make(tmp_path_factory.mktemp("error"), begun)
    code, error = pretrain_command(output_dir, dataset or parquet, *arguments)
    last = error.strip().splitlines()[-1]
    assert code == 2
    assert last.startswith("Error: ") and message in last
    assert "Traceback" not in error and error.count("Error: ") == 1


# ---- what is published


def test_checkpoint_and_encoder_load_in_a_fresh_process_and_give_equal_features(unbroken):
    script = """
import sys
import torch
import ldae_hf
from ldae_hf import LDAEForPreTraining
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
checkpoint, encoder = sys.argv[1:]
image = Image.effect_mandelbrot((40, 30), (-3, -2.5, 2, 2.5), 100)
for folder in (checkpoint, encoder):
    processor, model = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    model.check_processor(processor)
    inputs = processor(image, return_tensors="pt")
    with torch.no_grad():
        first, second = (model(**inputs).last_hidden_state for _ in range(2))
    assert first.shape == (1, 16, 128) and first.isfinite().all() and torch.equal(first, second)
    print(model.training, float(first.double().abs().sum()))
model = LDAEForPreTraining.from_pretrained(checkpoint)
with torch.no_grad():
    print(float(model(processor(image, return_tensors="pt")["pixel_values"], timesteps=0).loss))
"""
    folders = [checkpoints(unbroken / "checkpoints")[-1], unbroken / "encoder"]
    done = subprocess.run([sys.executable, "-c", script, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    checkpoint, encoder, loss = done.stdout.split("\n")[:3]
    assert checkpoint != encoder  # the EMA's weights
    assert 0 < float(loss) < math.inf


def write_golden():
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder), dataset_of([encoded(number) for number in range(NUM_IMAGES)]))
        found = losses(Path(folder))
    head = "# Losses of ten steps, see tests/test_pretrain.py; to write them anew: python tests/test_pretrain.py\n"
    GOLDEN.write_text(head + "".join(f"{step} {loss:.7f}\n" for step, loss in found.items()))


if __name__ == "__main__":
    write_golden()
