"""Fine-tuning as a whole: exact resume, the same on other layouts, and what the result is of."""

import json
import os
import signal
from pathlib import Path

import datasets
import pytest
import torch
from forked_runs import Child, in_processes, lines
from PIL import Image
from safetensors.torch import load_file
from tiny_encoder import TINY, pictures, save_tiny_encoder, tiny_processor
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTMAEConfig, ViTMAEModel
from typer.testing import CliRunner

from ldae_hf.cli import app
from ldae_hf.evaluation.encoders import open_encoder
from ldae_hf.evaluation.finetuning import FineTuningRecipe, finetune
from ldae_hf.evaluation.finetuning.classifiers import build_classifier
from ldae_hf.export.transformers_vit import stock_processor
from ldae_hf.manifest import check_folder
from ldae_hf.training import checkpoints, load_images
from ldae_hf.training.data import eval_loader


CLASSES = ["bright", "dark"]
RECIPE = dict(epochs=5, global_batch_size=8, warmup_epochs=1, learning_rate=3e-3, ema_decay=0.8, drop_path=0.3)


@pytest.fixture(scope="session")
def images() -> datasets.DatasetDict:
    """Two classes, told apart by their brightness; two global batches of training images, and four left over."""

    def split(count: int, seed: int) -> datasets.Dataset:
        rows = {"image": [], "label": []}
        for number, picture in enumerate(pictures(count, seed)):
            rows["image"].append(picture.point(lambda value, dark=number % 2: value // 6 if dark else value))
            rows["label"].append(number % 2)
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
        return datasets.Dataset.from_dict(rows, datasets.Features(features))

    return datasets.DatasetDict(train=split(20, 0), test=split(10, 1))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


def train(
    encoder, images, output_dir, changes: dict | None = None, processes: int = 1, prepare=lambda: None, **options
):
    """A run of ten steps in forks."""
    settings = dict(num_workers=0, mixed_precision="no", log_every=1, checkpoint_every=5) | options

    def run():
        prepare()
        recipe = FineTuningRecipe(**RECIPE | (changes or {}))
        return finetune(encoder, images, output_dir=output_dir, recipe=recipe, **settings)

    return in_processes(run, processes)


def use_float64():
    torch.set_default_dtype(torch.float64)


@pytest.fixture(scope="session")
def unbroken(encoder, images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    train(encoder, images, folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All that the last checkpoint and the model hold."""
    files = [*checkpoints(folder / "checkpoints")[-1].rglob("*.safetensors"), *folder.glob("model/*.safetensors")]
    return {f"{file}/{name}": value for file in files for name, value in load_file(file).items()}


def numbers_of(folder: Path) -> list[dict]:
    """The log, without what depends on the clock."""
    clocks = ("time", "images_per_second", "data_wait")
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines(folder)]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageClassification.from_pretrained(folder / "model", dtype="auto").state_dict()


def test_a_run_that_is_stopped_and_goes_on_is_the_run_that_was_not_to_the_last_bit(encoder, images, unbroken, tmp_path):
    assert train(encoder, images, tmp_path, max_steps=5) is None
    assert not (tmp_path / "model").exists()
    row = train(encoder, images, tmp_path)
    one, other = tensors_of(unbroken), tensors_of(tmp_path)
    assert [name.replace(str(unbroken), "") for name in one] == [name.replace(str(tmp_path), "") for name in other]
    assert all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))
    assert numbers_of(unbroken) == numbers_of(tmp_path)
    assert row["top1"] == json.loads((unbroken / "result.json").read_text())["top1"]


def test_a_signal_ends_a_run_with_code_75_and_the_same_command_goes_on(encoder, images, unbroken, tmp_path):
    def interrupt_after_three_steps():
        from ldae_hf.training.loop import Loop

        report = Loop.report

        def and_interrupt(loop, step, learning_rate):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return report(loop, step, learning_rate)

        Loop.report = and_interrupt

    with pytest.raises(SystemExit) as ended:
        train(encoder, images, tmp_path, prepare=interrupt_after_three_steps)
    assert ended.value.code == 75
    train(encoder, images, tmp_path)
    found, expected = weights_of(tmp_path), weights_of(unbroken)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("processes, per_device", [(1, 2), (2, 2)])
def test_a_global_batch_is_the_same_in_parts_and_on_two_processes(processes, per_device, encoder, images, tmp_path):
    folders = tmp_path / "whole", tmp_path / "parts"
    exactly = dict(prepare=use_float64, max_steps=10)
    train(encoder, images, folders[0], per_device_batch_size=8, **exactly)
    train(encoder, images, folders[1], processes=processes, per_device_batch_size=per_device, **exactly)
    one, other = map(weights_of, folders)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-9)
    start = weights_of(folders[0])["classifier.weight"]
    assert start.dtype == torch.float64 and start.abs().max() > 1e-3  # it has learned something


def test_the_result_is_that_of_the_averaged_weights_which_a_stock_model_holds(encoder, images, unbroken):
    row = json.loads((unbroken / "result.json").read_text())
    last = [line for line in lines(unbroken) if "test_top1" in line][-1]
    assert last["step"] == 10 and row["top1"] == last["test_top1_ema"]
    checkpoint, weights = checkpoints(unbroken / "checkpoints")[-1], weights_of(unbroken)
    average, raw = (load_file(checkpoint / name) for name in ("training/ema.safetensors", "model.safetensors"))
    start = build_classifier(open_encoder(encoder, device="cpu"), CLASSES).model.state_dict()
    assert all(torch.equal(weights[name], average[name]) for name in weights)
    assert not any(torch.equal(weights[name], others[name]) for name in weights for others in (raw, start))

    check_folder(unbroken / "model")
    model = AutoModelForImageClassification.from_pretrained(unbroken / "model").eval()
    processor = AutoImageProcessor.from_pretrained(unbroken / "model")
    assert type(model).__module__.startswith("transformers.") and type(processor).__module__.startswith("transformers.")
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert (processor.size["height"], *processor.image_mean) == (TINY["image_size"], 0.5, 0.5, 0.5)
    source, right = load_images(images["test"]), 0
    for batch in eval_loader(source, TINY["image_size"], 4):
        shown = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in batch["pixel_values"]]
        logits = model(**processor(shown, return_tensors="pt")).logits
        right += int((logits.argmax(dim=1) == batch["labels"]).sum())
    assert row["top1"] == 100 * right / 10


def test_the_row_says_all_that_the_number_depends_on(encoder, images, unbroken, tmp_path):
    row = json.loads((unbroken / "result.json").read_text())
    assert row["task"] == "fine_tune" and row["name"] == str(encoder) and row["dim"] == TINY["hidden_size"]
    protocol = row["protocol"]
    assert protocol["features"]["timestep"] == 10 and len(protocol["features"]["encoder"]) == 64
    assert (protocol["train"]["images"], protocol["test"]["images"]) == (20, 10)
    recipe = FineTuningRecipe(**RECIPE).for_width(TINY["hidden_size"])
    assert {
        key: protocol["fine_tune"][key] for key in ("layer_decay", "epochs", "ema_decay", "mixup", "steps")
    } == dict(layer_decay=0.85, epochs=5, ema_decay=0.8, mixup=recipe.mixup, steps=10)
    assert row["model"] == {
        "class": "IJepaForImageClassification",
        "head": "LayerNorm of tokens, mean over them, linear",
        "start": "the encoder's weights",
    }
    assert row["floors"] == {} and {"commit", "machine", "versions", "time"} <= row.keys()


def test_without_an_average_the_weights_themselves_are_measured_and_bf16_trains_too(encoder, images, tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    row = train(encoder, images, tmp_path / "run", dict(ema_decay=0, epochs=2), mixed_precision="bf16", ledger=ledger)
    found = lines(tmp_path / "run")
    assert not any("test_top1_ema" in line for line in found)
    assert row["top1"] == [line["test_top1"] for line in found if "test_top1" in line][-1]
    assert [json.loads(line)["task"] for line in ledger.read_text().splitlines()] == ["fine_tune"]
    asked = dict(ledger=ledger, output=tmp_path / "out.json")  # the latter only now
    again = train(encoder, images, tmp_path / "run", dict(ema_decay=0, epochs=2), mixed_precision="bf16", **asked)
    assert again == row == json.loads((tmp_path / "out.json").read_text())
    assert len(ledger.read_text().splitlines()) == 1


def test_from_scratch_is_named_so_and_begins_elsewhere(encoder, images, unbroken, tmp_path):
    row = train(encoder, images, tmp_path, from_scratch=True)
    assert row["name"] == f"{encoder}, from scratch" and row["model"]["start"] == "new weights"
    weight = "ijepa.layers.0.mlp.fc1.weight"
    assert not torch.allclose(weights_of(tmp_path)[weight], weights_of(unbroken)[weight], atol=0.02)


def test_a_kept_projection_stays_in_the_subspace_of_the_latents_and_else_it_is_left(
    encoder, images, unbroken, tmp_path
):
    train(encoder, images, tmp_path, keep_projection=True)
    outside = tiny_processor().components.float()[TINY["latent_dim"] :].T
    name = "ijepa.embeddings.patch_embeddings.projection.weight"
    kept, free = ((weights_of(folder)[name].flatten(1) @ outside).abs().max() for folder in (tmp_path, unbroken))
    assert kept < 1e-5 and free > 1e-4


def test_mae_is_fine_tuned_on_all_patches(images, tmp_path):
    shape = dict(image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    encoder = ViTMAEModel(ViTMAEConfig(**shape, intermediate_size=64, mask_ratio=0.75))
    encoder.save_pretrained(tmp_path / "mae")
    stock_processor(tiny_processor()).save_pretrained(tmp_path / "mae")
    row = train(str(tmp_path / "mae"), images, tmp_path / "run", dict(epochs=2))
    assert row["model"]["class"] == "BeitForImageClassification" and row["recipe"] is None
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model").eval()
    logits = [model(torch.ones(1, 3, 16, 16)).logits for _ in range(2)]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    "changes, options, words",
    [
        (dict(epochs=6), {}, "holds a run with train.epochs=5, not 6; choose another --output-dir"),
        ({}, dict(from_scratch=True), "holds a run with model.from_scratch=False, not True"),
        ({}, dict(seed=1), "holds a run with seed=0, not 1"),
    ],
)
def test_another_run_in_the_folder_is_refused(changes, options, words, encoder, images, unbroken):
    with pytest.raises(ValueError, match=words):
        train(encoder, images, unbroken, changes, **options)


def test_a_folder_of_pre_training_is_refused(encoder, images, tmp_path):
    (tmp_path / "run.json").write_text('{"seed": 0, "recipe": {}}')
    with pytest.raises(ValueError, match="holds a run that is no fine-tuning"):
        train(encoder, images, tmp_path)


def test_a_projection_that_an_encoder_does_not_have_cannot_be_kept(images, tmp_path):
    shape = dict(image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    ViTMAEModel(ViTMAEConfig(**shape)).save_pretrained(tmp_path / "mae")
    stock_processor(tiny_processor()).save_pretrained(tmp_path / "mae")
    with pytest.raises(ValueError, match="is no l-DAE and has no projection to keep"):
        train(tmp_path / "mae", images, tmp_path / "run", keep_projection=True)


def test_the_command_learns_bright_from_dark_and_prints_the_number(encoder, images, tmp_path):
    for name, split in images.items():
        for number, row in enumerate(split):
            file = tmp_path / "images" / name / CLASSES[row["label"]] / f"{number:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(file)
    words = ["finetune", str(encoder), "--dataset", str(tmp_path / "images"), "--output-dir", str(tmp_path / "run")]
    words += "--epochs 30 --batch-size 10 --warmup-epochs 2 --learning-rate 3e-3 --ema-decay 0.8".split()
    words += "--mixup 0 --cutmix 0 --rand-augment 0 --random-erasing 0 --num-workers 0".split()

    def run() -> tuple[int, str]:
        done = CliRunner().invoke(app, words)
        return done.exit_code, done.output.strip()

    exit_code, printed = Child(run).join()
    assert exit_code == 0, printed
    assert printed.splitlines()[-1] == f"{encoder}: top-1 100.00 % of 10 test images"
    rerun = json.loads((tmp_path / "run" / "result.json").read_text())["rerun"]
    assert rerun.startswith(f"ldae finetune {encoder} --dataset {tmp_path}/images --train-split train")
    assert "--layer-decay 0.85" in rerun and "--rand-augment 0" in rerun

    # The same images at another place are the same images.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "images").rename(tmp_path / "elsewhere" / "images")
    words[words.index("--dataset") + 1] = str(tmp_path / "elsewhere" / "images")
    exit_code, printed = Child(run).join()
    assert exit_code == 0 and "this run is finished" in printed, printed
