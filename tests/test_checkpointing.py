"""A checkpoint is whole or not there: what is damaged is found before it is used, what is half-written is not seen."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import logging

from ldae_hf import LDAEConfig, LDAEForPreTraining
from ldae_hf.recipes import load_recipe
from ldae_hf.training.checkpointing import (
    MANIFEST,
    CheckpointError,
    check_folder,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
    sha256,
    write_folder,
    write_text,
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
    optimizer, ema = adamw(model, RECIPE.train["betas"]), ExponentialMovingAverage(model, 0.5)
    for _ in range(2):
        model(torch.randn(2, 3, 8, 8)).loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
        ema.update(model)
    return model, optimizer, ema


def save(folder, step: int, trained=None, keep: int = 2, extras=lambda path: None):
    return save_checkpoint(folder, step, *(trained or parts(step)), {"step": step}, extras, keep)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    return save(tmp_path_factory.mktemp("saved"), 7, parts(0))


@pytest.fixture
def saved(saved_once, tmp_path):
    """A checkpoint of step 7 that a test may damage."""
    return shutil.copytree(saved_once, tmp_path / saved_once.name)


def tensors_of(model, optimizer, ema) -> dict[str, torch.Tensor]:
    state = {f"{i}.{key}": value for i, slot in optimizer.state_dict()["state"].items() for key, value in slot.items()}
    return model.state_dict() | state | {f"ema.{name}": value for name, value in ema.average.items()}


# ---- what a checkpoint holds


def test_weights_optimizer_ema_rng_and_state_come_back_bit_for_bit(tmp_path):
    trained, other = parts(0), parts(1)
    expected = {name: value.clone() for name, value in tensors_of(*trained).items()}
    folder = save(tmp_path, 7, trained)
    drawn = torch.rand(3)
    assert load_checkpoint(folder, *other) == {"step": 7}
    assert torch.equal(torch.rand(3), drawn)
    found = tensors_of(*other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


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
    before = {name: value.clone() for name, value in tensors_of(*trained).items()}
    for file in files_of(saved):
        content = file.read_bytes()
        # In the manifest every third byte, else the first, a middle and the last one.
        for place in range(0, len(content), 3) if file.name == MANIFEST else (0, len(content) // 2, len(content) - 1):
            damaged = bytearray(content)
            damaged[place] ^= 1
            if file.name == MANIFEST and json_or_none(damaged) == json.loads(content):
                continue  # a space that became another space
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                load_checkpoint(saved, *trained)
        file.write_bytes(content)
    assert all(torch.equal(value, before[name]) for name, value in tensors_of(*trained).items())
    load_checkpoint(saved, *trained)


def json_or_none(content: bytes):
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_a_truncated_or_missing_file_is_found_and_named(saved):
    for file in files_of(saved):
        content = file.read_bytes()
        for cut in (0, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:cut])
            with pytest.raises(CheckpointError, match=file.name):
                load_checkpoint(saved, *parts(1))
        file.unlink()
        with pytest.raises(CheckpointError, match=file.name):
            load_checkpoint(saved, *parts(1))
        file.write_bytes(content)


@pytest.mark.parametrize("manifest", ["[]", "3", "null", '"model.safetensors"'])
def test_a_manifest_that_is_no_list_of_files_is_refused(saved, manifest):
    (saved / MANIFEST).write_text(manifest)
    with pytest.raises(CheckpointError, match="has no readable manifest.json"):
        check_folder(saved)


def test_a_manifest_that_leaves_out_a_file_does_not_let_it_through(saved):
    (saved / "training" / "optimizer.safetensors").write_bytes(b"anything")
    manifest = json.loads((saved / MANIFEST).read_text())
    del manifest["training/optimizer.safetensors"]
    (saved / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="optimizer.safetensors is missing or damaged"):
        load_checkpoint(saved, *parts(1))


@pytest.mark.parametrize("inside", ["../secret", "training/../../secret", "{absolute}", "\0", "\ud800", "training", ""])
def test_a_manifest_cannot_name_what_is_outside_the_folder_or_no_file(saved, inside):
    secret = saved.parent / "secret"
    secret.write_text("not yours")
    name = inside.format(absolute=secret)
    (saved / MANIFEST).write_text(json.dumps({**json.loads((saved / MANIFEST).read_text()), name: sha256(secret)}))
    with pytest.raises(CheckpointError, match="missing or damaged"):
        check_folder(saved)


def test_weights_of_another_model_are_refused_in_one_line(saved):
    model = LDAEForPreTraining(LDAEConfig(**parts(0)[0].config.to_diff_dict() | {"latent_dim": 6}))
    with pytest.raises(CheckpointError, match="step-00000007 does not fit this run") as caught:
        load_checkpoint(saved, model, adamw(model, RECIPE.train["betas"]), None)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_run_with_an_ema_does_not_go_on_from_a_checkpoint_without_one(tmp_path):
    model, optimizer, ema = parts(0)
    folder = save_checkpoint(tmp_path, 1, model, optimizer, None, {"step": 1}, lambda path: None, 2)
    with pytest.raises(CheckpointError, match="ema.safetensors"):
        load_checkpoint(folder, model, optimizer, ema)


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


def test_an_error_while_saving_leaves_the_older_ones_and_the_next_save_clears_up(tmp_path):
    trained = parts(0)
    first = save(tmp_path, 1, trained, keep=1)

    def full_disk(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, trained, keep=1, extras=full_disk)
    assert checkpoints(tmp_path) == [first]
    check_folder(first)
    second = save(tmp_path, 3, trained, keep=1)
    assert list(tmp_path.iterdir()) == [second]


def test_old_checkpoints_go_only_when_the_new_one_is_there(tmp_path):
    trained, seen = parts(0), []

    def look(path):
        seen.append([checkpoint.name for checkpoint in checkpoints(tmp_path)])

    for step in (1, 2, 3, 4):
        save(tmp_path, step, trained, keep=2, extras=look)
    assert [len(names) for names in seen] == [0, 1, 2, 2]
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "encoder"
    for content in ("old", "new"):
        write_folder(folder, lambda path, content=content: (path / f"{content}.txt").write_text(content))
        check_folder(folder, needed=(f"{content}.txt",))
    assert {path.name for path in folder.iterdir()} == {"new.txt", MANIFEST}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_text_file_is_replaced_as_a_whole(tmp_path):
    write_text(tmp_path / "run.json", "old")
    write_text(tmp_path / "run.json", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"run.json": "new"}
