"""A checkpoint is what the training was when it was saved: damage is found before it is used, and an error while it is
written leaves the one before.
"""

import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.utils import logging

from ldae_hf import LDAEConfig, LDAEForPreTraining
from ldae_hf.manifest import MANIFEST, DamagedError, check_folder, manifest_text, read_manifest
from ldae_hf.recipes import load_recipe
from ldae_hf.training.checkpointing import (
    CheckpointError,
    CheckpointWriter,
    checkpoints,
    load_checkpoint,
    load_parts,
    newest_intact,
    save_checkpoint,
    save_parts,
    set_aside,
)
from ldae_hf.training.optimization import ExponentialMovingAverage, adamw


RECIPE = load_recipe("l_dae")


def parts(seed: int):
    """A model in the middle of its training, with its optimizer and EMA."""
    torch.manual_seed(seed)
    config = LDAEConfig(
        image_size=8,
        patch_size=4,
        latent_dim=5,
        hidden_size=16,
        num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LDAEForPreTraining(config)
    trained = model, adamw(model, RECIPE.train["betas"]), ExponentialMovingAverage(model, 0.5)
    for _ in range(2):
        take_step(*trained)
    return trained


def take_step(model, optimizer, ema):
    model(torch.randn(2, 3, 8, 8)).loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()
    optimizer.zero_grad()
    ema.update(model)


def save(folder, step: int, trained=None, keep: int = 2, extras=lambda path: None):
    """A checkpoint, once it is on the disk."""
    writer = CheckpointWriter(folder, keep, writes=True)
    save_checkpoint(writer, step, *(trained or parts(step)), {"step": step}, extras)
    writer.wait()
    return folder / f"step-{step:08d}"


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    return save(tmp_path_factory.mktemp("saved"), 7, parts(0))


@pytest.fixture
def saved(saved_once, tmp_path):
    """A checkpoint of step 7 that a test may damage."""
    return shutil.copytree(saved_once, tmp_path / saved_once.name)


def tensors_of(model, optimizer, ema) -> dict[str, torch.Tensor]:
    """Copies of all that is saved."""
    state = {f"{i}.{key}": value for i, slot in optimizer.state_dict()["state"].items() for key, value in slot.items()}
    tensors = model.state_dict() | state | {f"ema.{name}": value for name, value in ema.average.items()}
    return {name: value.clone() for name, value in tensors.items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# ---- what a checkpoint holds


def test_weights_optimizer_ema_rng_and_state_come_back_bit_for_bit(tmp_path):
    trained, other = parts(0), parts(1)
    folder = save(tmp_path, 7, trained)
    drawn = torch.rand(3)
    assert load_checkpoint(folder, *other) == {"step": 7}
    assert torch.equal(torch.rand(3), drawn)
    assert_equal(tensors_of(*other), tensors_of(*trained))


def test_the_loaded_optimizer_takes_the_same_next_step(saved):
    stepped = []
    for seed in (0, 1):
        model, optimizer, ema = parts(seed)
        load_checkpoint(saved, model, optimizer, ema)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()
        stepped.append(model.state_dict())
    assert all(torch.equal(value, stepped[1][name]) for name, value in stepped[0].items())


def test_a_checkpoint_is_a_model_repository_of_safetensors_and_json_only(saved):
    files = {str(file.relative_to(saved)) for file in saved.rglob("*") if file.is_file()}
    training = {f"training/{name}" for name in ("optimizer.safetensors", "ema.safetensors", "rng.safetensors")}
    assert files == {"config.json", "model.safetensors", MANIFEST, "training/state.json"} | training
    for file in saved.rglob("*"):
        if file.suffix == ".safetensors":
            load_file(file)
        elif file.is_file():
            json.loads(file.read_text())
    loaded = LDAEForPreTraining.from_pretrained(saved).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in parts(0)[0].state_dict().items())


def test_saving_shows_no_progress_bar_of_its_own_and_leaves_the_setting_alone(tmp_path, capfd):
    save(tmp_path, 1)
    assert "Writing" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        save(tmp_path, 2)
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


# ---- damage


def files_of(folder) -> list:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_a_flipped_bit_in_any_file_is_found_before_it_is_used(saved):
    trained = parts(1)
    before = tensors_of(*trained)
    for file in files_of(saved):
        content = file.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            damaged = bytearray(content)
            damaged[place] ^= 1
            file.write_bytes(damaged)
            with pytest.raises(DamagedError, match=file.name):
                load_checkpoint(saved, *trained)
        file.write_bytes(content)
    assert_equal(tensors_of(*trained), before)
    load_checkpoint(saved, *trained)


def test_a_truncated_or_missing_file_is_found_and_named(saved):
    trained = parts(1)
    for file in files_of(saved):
        content = file.read_bytes()
        for cut in (0, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:cut])
            with pytest.raises(DamagedError, match=file.name):
                load_checkpoint(saved, *trained)
        file.unlink()
        with pytest.raises(DamagedError, match=file.name):
            load_checkpoint(saved, *trained)
        file.write_bytes(content)


def test_a_manifest_that_leaves_out_a_file_does_not_let_it_through(saved):
    (saved / "training" / "optimizer.safetensors").write_bytes(b"anything")
    digests = read_manifest(saved)
    del digests["training/optimizer.safetensors"]
    (saved / MANIFEST).write_text(manifest_text(digests))
    with pytest.raises(DamagedError, match="optimizer.safetensors is missing or damaged"):
        load_checkpoint(saved, *parts(1))


def test_weights_of_another_model_are_refused_in_one_line(saved):
    model = LDAEForPreTraining(LDAEConfig(**parts(0)[0].config.to_diff_dict() | {"latent_dim": 6}))
    with pytest.raises(CheckpointError, match="step-00000007 does not fit this run") as caught:
        load_checkpoint(saved, model, adamw(model, RECIPE.train["betas"]), None)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_run_with_an_ema_does_not_go_on_from_a_checkpoint_without_one(tmp_path):
    model, optimizer, ema = parts(0)
    folder = save(tmp_path, 1, (model, optimizer, None))
    with pytest.raises(DamagedError, match="ema.safetensors"):
        load_checkpoint(folder, model, optimizer, ema)


def test_the_newest_intact_one_is_found_and_what_is_wrong_with_the_newer_ones_is_said(tmp_path):
    assert newest_intact(tmp_path) == (None, [])
    first, second, third, fourth = [save(tmp_path, step, parts(0), keep=9) for step in (1, 2, 3, 4)]
    assert newest_intact(tmp_path) == (fourth, [])
    (fourth / "config.json").unlink()
    (third / MANIFEST).write_text("")
    newest, problems = newest_intact(tmp_path)
    assert newest == second
    assert [str(file) in problem for file, problem in zip((fourth / "config.json", third), problems, strict=True)]
    assert checkpoints(tmp_path) == [first, second, third, fourth]
    set_aside(tmp_path, newest)
    assert checkpoints(tmp_path) == [first, second]
    assert sorted(path.name for path in tmp_path.iterdir())[2:] == ["step-00000003.damaged", "step-00000004.damaged"]
    assert newest_intact(tmp_path) == (second, [])


def test_a_damaged_one_that_was_set_aside_makes_room_for_the_next_of_its_step(tmp_path):
    first, second = [save(tmp_path, step, parts(0)) for step in (1, 2)]
    for _ in range(2):
        (second / "config.json").unlink()
        set_aside(tmp_path, newest_intact(tmp_path)[0])
        save(tmp_path, 2, parts(0))
    assert checkpoints(tmp_path) == [first, second]
    assert newest_intact(tmp_path) == (second, [])


def test_if_all_are_damaged_that_is_an_error_and_none_is_renamed(tmp_path):
    saved = [save(tmp_path, step, parts(0)) for step in (1, 2)]
    for folder in saved:
        (folder / "training" / "state.json").write_text("{}")
    with pytest.raises(DamagedError, match="No checkpoint is intact; delete .* to begin anew") as caught:
        newest_intact(tmp_path)
    assert all(str(folder) in str(caught.value) for folder in saved)
    assert checkpoints(tmp_path) == saved


# ---- whole or not there


def test_half_written_folders_and_strangers_are_not_checkpoints(tmp_path):
    whole = [save(tmp_path, step, parts(0), keep=9) for step in (9, 10)]
    (tmp_path / "step-00000011").mkdir()  # no manifest
    shutil.copytree(whole[0], tmp_path / "step-12")
    shutil.copytree(whole[0], tmp_path / "step-00000012.bak")
    (tmp_path / ".step-00000013.writing").mkdir()
    shutil.copy(whole[0] / MANIFEST, tmp_path / ".step-00000013.writing")
    assert checkpoints(tmp_path) == whole
    assert checkpoints(tmp_path / "nothing") == []


def test_checkpoints_are_in_the_order_of_their_steps_however_many_digits_these_have(tmp_path):
    steps = [99_999_999, 100_000_000, 5]
    for step in steps:
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / MANIFEST).touch()
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == sorted(steps)


def full_disk(path):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("a bug")])
def test_an_error_in_the_thread_is_raised_by_the_next_wait_or_save_and_leaves_the_older_ones(tmp_path, error):
    def fail(path):
        raise error

    trained = parts(0)
    first = save(tmp_path, 1, trained, keep=1)
    writer = CheckpointWriter(tmp_path, keep=1, writes=True)
    for raises in (writer.wait, lambda: save_checkpoint(writer, 3, *trained, {"step": 3}, lambda path: None)):
        save_checkpoint(writer, 2, *trained, {"step": 2}, fail)
        writer.join()
        assert writer.failed
        with pytest.raises(type(error), match=str(error.args[-1])):
            raises()
        assert not writer.failed
        assert list(tmp_path.iterdir()) == [first]  # nothing of the new one fills the disk
        check_folder(first)
    writer.wait()
    save_checkpoint(writer, 3, *trained, {"step": 3}, lambda path: None)
    writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("where", ["model", "ema", "optimizer"])
def test_what_is_not_finite_is_not_saved_and_takes_no_older_one_away(tmp_path, where):
    model, optimizer, ema = trained = parts(0)
    first = save(tmp_path, 1, trained, keep=1)
    weight = model.decoder.head.weight
    held = {"model": weight.data, "ema": ema.average["decoder.head.weight"]}
    held["optimizer"] = optimizer.state[weight]["exp_avg"]
    held[where][0, 0] = torch.nan
    with pytest.raises(
        CheckpointError, match=f"decoder.head.weight.* of .*{where}.safetensors is not finite after step 2"
    ):
        save(tmp_path, 2, trained, keep=1)
    assert list(tmp_path.iterdir()) == [first]


def test_the_next_save_clears_up_what_a_killed_process_left(tmp_path):
    (tmp_path / ".step-00000001.writing" / "training").mkdir(parents=True)
    (tmp_path / ".step-00000000.old").mkdir()
    folder = save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [folder]


def test_old_checkpoints_go_only_when_the_new_one_is_there(tmp_path):
    trained, seen = parts(0), []

    def look(path):
        seen.append([checkpoint.name for checkpoint in checkpoints(tmp_path)])

    for step in (1, 2, 3, 4):
        save(tmp_path, step, trained, keep=2, extras=look)
    assert [len(names) for names in seen] == [0, 1, 2, 2]
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


# ---- while the training goes on


def test_what_is_saved_does_not_change_when_the_training_goes_on_while_the_thread_writes(tmp_path):
    trained, other = parts(0), parts(1)
    goes_on, has_gone_on = threading.Event(), threading.Event()

    def wait(path):
        goes_on.set()
        assert has_gone_on.wait(60)

    writer = CheckpointWriter(tmp_path, keep=2, writes=True)
    expected, drawn = tensors_of(*trained), torch.get_rng_state()
    save_checkpoint(writer, 7, *trained, {"step": 7}, wait)
    assert goes_on.wait(60) and checkpoints(tmp_path) == []
    take_step(*trained)
    has_gone_on.set()
    writer.wait()
    load_checkpoint(tmp_path / "step-00000007", *other)
    assert_equal(tensors_of(*other), expected)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.equal(expected["decoder.head.weight"], trained[0].decoder.head.weight)


def test_a_save_waits_for_the_one_before_it(tmp_path):
    writer, trained, order = CheckpointWriter(tmp_path, keep=9, writes=True), parts(0), []
    for step in (1, 2, 3):
        save_checkpoint(writer, step, *trained, {"step": step}, lambda path, step=step: order.append(step))
    writer.wait()
    assert order == [1, 2, 3] and len(checkpoints(tmp_path)) == 3


def test_one_writer_saves_each_step_as_it_is_then_though_it_uses_its_memory_again(tmp_path):
    writer, trained, expected = CheckpointWriter(tmp_path, keep=9, writes=True), parts(0), []
    for step in (1, 2, 3):
        take_step(*trained)
        expected.append(tensors_of(*trained))
        save_checkpoint(writer, step, *trained, {"step": step}, lambda path: None)
    writer.wait()
    for step, tensors in enumerate(expected, start=1):
        other = parts(9)
        load_checkpoint(tmp_path / f"step-{step:08d}", *other)
        assert_equal(tensors_of(*other), tensors)


def test_a_process_that_does_not_write_leaves_nothing(tmp_path):
    writer = CheckpointWriter(tmp_path / "checkpoints", keep=2, writes=False)
    save_checkpoint(writer, 1, *parts(0), {"step": 1}, full_disk)
    writer.wait()
    assert list(tmp_path.iterdir()) == []


# ---- several modules


def modules(seed: int) -> dict:
    torch.manual_seed(seed)
    named = {name: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for name in ("autoencoder", "discriminator")}
    return {name: (module, torch.optim.AdamW(module.parameters(), 0.01)) for name, module in named.items()}


def test_parts_come_back_also_one_whose_optimizer_has_taken_no_step_yet(tmp_path):
    writer, trained = CheckpointWriter(tmp_path, keep=9, writes=True), modules(0)

    def step_of(name: str):
        module, optimizer = trained[name]
        module(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def state(parts: dict) -> dict[str, torch.Tensor]:
        found = {}
        for name, (module, optimizer) in parts.items():
            found |= {f"{name}.{key}": value.clone() for key, value in module.state_dict().items()}
            for number, slot in optimizer.state_dict()["state"].items():
                found |= {f"{name}.{number}.{key}": value.clone() for key, value in slot.items()}
        return found

    expected = []
    for step, stepped in enumerate((["autoencoder"], ["autoencoder", "discriminator"]), start=1):
        for name in stepped:
            step_of(name)
        expected.append(state(trained))
        save_parts(writer, step, trained, {"step": step}, lambda path: None)
    writer.wait()
    for step, tensors in enumerate(expected, start=1):
        other = modules(1)
        assert load_parts(tmp_path / f"step-{step:08d}", other) == {"step": step}
        assert_equal(state(other), tensors)


def test_parts_of_other_modules_are_refused(tmp_path):
    writer, trained = CheckpointWriter(tmp_path, keep=2, writes=True), modules(0)
    save_parts(writer, 1, trained, {"step": 1}, lambda path: None)
    writer.wait()
    module = nn.Linear(3, 4)
    with pytest.raises(CheckpointError, match="does not fit this run: .*other tensors"):
        load_parts(tmp_path / "step-00000001", {"autoencoder": (module, torch.optim.AdamW(module.parameters()))})
    with pytest.raises(DamagedError, match="generator.safetensors"):
        load_parts(tmp_path / "step-00000001", {"generator": trained["autoencoder"]})
