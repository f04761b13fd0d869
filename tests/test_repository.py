"""One repository for all that a model is: what it holds, what it must not touch, and that a run can start from it."""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from forked_runs import Child, dataset_of, encoded, lines
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification
from typer.testing import CliRunner

from ldae_hf import (
    LDAEForImageClassification,
    LDAEForPreTraining,
    LDAEImageProcessor,
    LDAEModel,
    LDAEScheduler,
    repository,
)
from ldae_hf.cli import app
from ldae_hf.golden import golden_pixels
from ldae_hf.manifest import DamagedError
from ldae_hf.recipes import Recipe
from ldae_hf.repository import build_repository
from ldae_hf.training import RunError, checkpoints, pretrain
from ldae_hf.verify import FAILED, OK, verify


CARD = Path(__file__).parent.parent / "model_cards" / "ldae-cifar10"
SETTINGS = {
    "model.image_size": 16,
    "model.patch_size": 4,
    "model.latent_dim": 7,
    "train.epochs": 2,
    "train.warmup_epochs": 0,
    "train.global_batch_size": 8,
    "train.base_learning_rate": 0.05,
    "train.ema_half_life_epochs": 1,
}


def run_in(folder: Path, changes: dict | None = None, **options):
    """A function that makes a run of four steps with checkpoints at 2 and 4."""
    images = dataset_of([encoded(number) for number in range(20)])
    overrides = [f"{key}={value}" for key, value in (SETTINGS | (changes or {})).items()]
    settings = dict(tier="quickstart", overrides=overrides, dataset=images, num_workers=0, mixed_precision="no")
    return lambda: pretrain("l_dae", output_dir=folder, watched=2, log_every=1, **settings | options)


def train(folder: Path, changes: dict | None = None, environment: dict | None = None, **options) -> Path:
    """Such a run, in a fork."""
    Child(run_in(folder, changes, **options), environment).join()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="module")
def published(run, tmp_path_factory) -> Path:
    return build_repository(run, tmp_path_factory.mktemp("built") / "repository", repo_id="someone/encoder")


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def features(model, size: int = 16) -> torch.Tensor:
    with torch.no_grad():
        return model(golden_pixels(size, 3) / 127.5 - 1).last_hidden_state


# ---- what it holds


def test_a_repository_holds_encoder_code_stock_models_the_whole_model_and_what_is_known_of_them(published):
    files = set(contents(published))
    assert files >= {"config.json", "model.safetensors", "preprocessor_config.json", "patch_pca.safetensors"}
    assert files >= {"modeling_ldae.py", "configuration_ldae.py", "image_processing_ldae.py"}
    assert files >= {"README.md", "recipe.json", "training.json", "metrics.jsonl", "exports.json", "manifest.json"}
    assert files >= {"golden_features.safetensors", "pictures/directions.png", "pictures/denoising.png"}
    assert files >= {f"vit/{name}" for name in ("config.json", "model.safetensors", "preprocessor_config.json")}
    assert files >= {"timm/config.json", "timm/model.safetensors"}
    assert files >= {"pretraining/model.safetensors", "pretraining/training/ema.safetensors"}
    assert files >= {"pretraining/patch_pca.safetensors", "pretraining/scheduler/scheduler_config.json"}
    assert not any("optimizer" in name for name in files)  # as large as the rest together


def test_root_and_stock_model_give_the_features_of_the_encoder_and_pretraining_its_raw_weights(run, published):
    expected = features(LDAEModel.from_pretrained(run / "encoder"))
    assert torch.equal(features(AutoModel.from_pretrained(published)), expected)
    stock = AutoModel.from_pretrained(published, subfolder="vit")
    assert type(stock).__name__ == "IJepaModel"
    torch.testing.assert_close(features(stock), expected, rtol=1e-5, atol=1e-5)

    whole = LDAEForPreTraining.from_pretrained(published, subfolder="pretraining")
    raw = load_file(checkpoints(run / "checkpoints")[-1] / "model.safetensors")
    assert all(torch.equal(value, raw[name]) for name, value in whole.state_dict().items())
    assert not torch.equal(features(whole.ldae), expected)  # which is the moving average
    scheduler = LDAEScheduler.from_pretrained(published, subfolder="pretraining/scheduler")
    assert scheduler.agrees_with(LDAEScheduler.for_model(whole.config))


def test_all_of_it_is_verified_and_a_card_may_be_edited(published, tmp_path):
    found = verify(published)
    without = ("pretraining", "timm") if importlib.util.find_spec("timm") is None else ("pretraining",)
    left = [check for check in found if check.name == "features" and check.folder.name in without]
    assert {check.status for check in found if check not in left} == {OK}
    assert {check.folder.name for check in found} == {"repository", "vit", "timm", "pretraining", "scheduler"}
    assert {check.detail for check in left} <= {"no golden features", "timm is not installed"}
    copy = shutil.copytree(published, tmp_path / "copy")
    (copy / "README.md").write_text("mine")
    (copy / ".gitattributes").write_text("the Hub's")
    assert not [check for check in verify(copy) if check.status == FAILED]
    assert "not in the manifest" not in verify(copy)[0].detail


@pytest.mark.parametrize("part", ["vit", "timm", "pretraining", "pictures", "."])
def test_a_flipped_bit_in_any_part_is_found(published, tmp_path, part):
    copy = shutil.copytree(published, tmp_path / "copy")
    file = sorted(path for path in (copy / part).iterdir() if path.suffix in (".safetensors", ".png"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "hashes" in [check.name for check in verify(copy) if check.status == FAILED]


def test_other_weights_in_the_stock_model_are_found_where_the_manifest_is_right(published, tmp_path):
    from test_verify import change_tensors, write_manifest

    copy = shutil.copytree(published, tmp_path / "copy")
    change_tensors(copy / "vit" / "model.safetensors", lambda tensors: tensors["layernorm.weight"].mul_(1.1))
    write_manifest(copy)
    assert [(check.folder.name, check.name) for check in verify(copy) if check.status == FAILED] == [
        ("vit", "features")
    ]


def test_other_weights_for_timm_and_another_scheduler_are_found_where_the_manifest_is_right(published, tmp_path):
    from test_verify import change_json, change_tensors, write_manifest

    copy = shutil.copytree(published, tmp_path / "copy")
    change_tensors(copy / "timm" / "model.safetensors", lambda tensors: tensors["blocks.0.norm1.bias"].add_(0.1))
    change_json(copy / "pretraining" / "scheduler" / "scheduler_config.json", num_train_timesteps=10**12)
    write_manifest(copy / "pretraining")
    write_manifest(copy)
    assert [(check.folder.name, check.name) for check in verify(copy) if check.status == FAILED] == [
        ("timm", "weights"),
        ("scheduler", "scheduler"),
    ]


@pytest.mark.parametrize(
    "lie", [{"num_hidden_layers": 10**9}, {"architectures": ["IJepaModel", 3]}, {"patch_size": {}}]
)
def test_a_stock_model_that_claims_another_shape_is_not_built(published, tmp_path, lie):
    from test_verify import change_json

    copy = shutil.copytree(published, tmp_path / "copy")
    change_json(copy / "vit" / "config.json", **lie)
    [detail] = [check.detail for check in verify(copy) if check.folder.name == "vit" and check.status == FAILED]
    assert len(detail) < 400


# ---- of what it is made


def test_a_run_that_is_not_finished_gives_the_moving_average_of_its_newest_checkpoint(tmp_path):
    run = train(tmp_path / "run", max_steps=2)
    published = build_repository(run, tmp_path / "repository")
    checkpoint = checkpoints(run / "checkpoints")[-1]
    average = load_file(checkpoint / "training" / "ema.safetensors")
    encoder = dict(LDAEModel.from_pretrained(published).named_parameters())
    assert encoder and all(torch.equal(value, average[f"ldae.{name}"]) for name, value in encoder.items())
    assert not [check for check in verify(published) if check.status == FAILED]
    assert "2 of 4" in (published / "README.md").read_text()


def test_building_changes_nothing_in_the_run_and_again_gives_the_same(run, published, tmp_path):
    weights = run / "encoder" / "model.safetensors"
    weights.chmod(0o444)
    before = contents(run)
    again = build_repository(run, tmp_path / "repository", repo_id="someone/encoder")
    assert contents(run) == before and weights.stat().st_mode & 0o777 == 0o444
    assert contents(again) == contents(published)


def test_a_repository_is_replaced_by_a_newer_one_and_nothing_else_is(run, tmp_path):
    folder = build_repository(run, tmp_path / "repository")
    build_repository(run, folder, pictures=False)
    assert [path.name for path in (folder / "pictures").iterdir()] == ["directions.png"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not written as a repository; name another folder"):
        build_repository(run, mine)
    assert (mine / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ValueError, match="not written as a repository"):
        build_repository(run, run / "encoder")  # which has a manifest too


def test_an_encoder_alone_is_a_repository_too_and_only_known_files_go_with_it(tmp_path):
    encoder = shutil.copytree(CARD, tmp_path / "encoder")
    (encoder / ".env").write_text("HF_TOKEN=hf_secret")
    (encoder / "pytorch_model.bin").write_bytes(b"pickled")
    published = build_repository(encoder, tmp_path / "repository")
    files = contents(published)
    assert ".env" not in files and "pytorch_model.bin" not in files and not (published / "pretraining").exists()
    built, saved = (features(LDAEModel.from_pretrained(folder), 32) for folder in (published, CARD))
    assert torch.equal(built, saved)


def test_a_repository_is_published_again_with_all_that_it_has_and_never_over_itself(published, tmp_path):
    again = build_repository(published, tmp_path / "again", repo_id="someone/encoder")
    unlike = {name for name, digest in contents(published).items() if contents(again).get(name) != digest}
    assert unlike <= {"README.md", "manifest.json"}
    with pytest.raises(ValueError, match="is what would be read, or holds it"):
        build_repository(again / "pretraining", again)
    assert (again / "pretraining" / "model.safetensors").is_file()


@pytest.mark.parametrize("link", ["metrics.jsonl", "encoder/tokenizer", "pictures/step-99999999.png"])
def test_a_link_that_leads_out_of_the_run_is_not_published(run, tmp_path, link):
    copy = shutil.copytree(run, tmp_path / "run")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("hf_secret")
    (copy / link).unlink(missing_ok=True)
    (copy / link).symlink_to(secret if link.endswith("tokenizer") else secret / "key")
    with pytest.raises(ValueError, match="is a link to .*, outside of .*, and is not published"):
        build_repository(copy, tmp_path / "repository")


def test_a_classifier_is_published_with_its_head_folded_into_the_stock_class(run, tmp_path):
    names = {0: "cat", 1: "dog", 2: "<other>"}
    model = LDAEForImageClassification.from_pretrained(run / "encoder", id2label=names).eval()
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path / "classifier")
    LDAEImageProcessor.from_pretrained(run / "encoder").save_pretrained(tmp_path / "classifier")
    published = build_repository(tmp_path / "classifier", tmp_path / "repository")
    pixels = golden_pixels(16, 3) / 127.5 - 1
    with torch.no_grad():
        expected = model(pixels).logits
        for subfolder in ("", "vit"):
            loaded = AutoModelForImageClassification.from_pretrained(published, subfolder=subfolder)
            torch.testing.assert_close(loaded(pixels).logits, expected, rtol=1e-4, atol=1e-5)
            assert loaded.config.id2label == names
    assert not [check for check in verify(published) if check.status == FAILED]


def test_a_damaged_model_and_a_folder_without_one_are_not_published(run, tmp_path):
    damaged = shutil.copytree(run, tmp_path / "damaged")
    with open(damaged / "encoder" / "model.safetensors", "r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x7f")
    with pytest.raises(DamagedError, match="missing or damaged"):
        build_repository(damaged, tmp_path / "repository")
    with pytest.raises(ValueError, match="holds no run, no checkpoint and no encoder"):
        build_repository(tmp_path, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_a_checkpoint_that_its_run_removes_meanwhile_gives_no_half_repository(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "run")
    newest = checkpoints(copy / "checkpoints")[-1]
    write = repository.write_pretraining

    def removed_meanwhile(folder, checkpoint):
        (checkpoint / "training" / "ema.safetensors").unlink()
        write(folder, checkpoint)
        newest.rename(newest.with_name(f".{newest.name}.old"))

    monkeypatch.setattr(repository, "write_pretraining", removed_meanwhile)
    with pytest.raises(OSError, match="was removed by its run while it was read; push once more"):
        build_repository(copy, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_the_command_writes_a_repository_without_pushing_it(run, tmp_path):
    arguments = ["push", str(run), "someone/encoder", "--dry-run", str(tmp_path / "repository"), "--no-pictures"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and result.stdout.strip() == str(tmp_path / "repository")
    assert 'from_pretrained("someone/encoder")' in (tmp_path / "repository" / "README.md").read_text()


def test_what_is_written_into_a_dry_run_does_not_reach_the_run(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    before = contents(copy)
    built = build_repository(copy, tmp_path / "repository")
    for file in [path for path in built.rglob("*") if path.is_file()]:
        file.write_bytes(b"overwritten")
    assert contents(copy) == before


def test_nothing_in_a_repository_names_a_place_on_the_machine(tmp_path):
    pictures = tmp_path / "somebodys pictures"
    pictures.mkdir()
    for number in range(20):
        (pictures / f"{number}.png").write_bytes(encoded(number))
    run = train(tmp_path / "run", {"data.dataset": pictures}, dataset=None)
    row = {"task": "unknown", "command": f"ldae probe {run}"}
    built = build_repository(run, tmp_path / "repository", repo_id="someone/encoder", rows=[row])
    named = [path for path in built.rglob("*") if path.is_file() and str(tmp_path).encode() in path.read_bytes()]
    assert named == []
    for folder in (built, built / "pretraining"):
        recipe = Recipe.load(folder)
        assert recipe.data["dataset"] == "path/to/somebodys pictures"
        assert "data.dataset=path/to/somebodys pictures" in recipe.overrides
    assert "--set 'data.dataset=path/to/somebodys pictures'" in (built / "README.md").read_text()
    assert not [check for check in verify(built) if check.status == FAILED]
    assert str(pictures) in (run / "encoder" / "recipe.json").read_text()


def test_a_damaged_newest_checkpoint_gives_a_repository_of_the_one_before_throughout(run, tmp_path, capfd):
    copy = shutil.copytree(run, tmp_path / "run")
    before, newest = checkpoints(copy / "checkpoints")
    with open(newest / "model.safetensors", "r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x7f")
    built = build_repository(copy, tmp_path / "repository")
    assert "is of another step than" in capfd.readouterr().out
    assert {json.loads((part / "training.json").read_text())["steps"] for part in (built, built / "pretraining")} == {2}
    average = load_file(before / "training" / "ema.safetensors")
    encoder = dict(LDAEModel.from_pretrained(built).named_parameters())
    assert all(torch.equal(value, average[f"ldae.{name}"]) for name, value in encoder.items())
    assert "weights of step 2 of 4" in (built / "README.md").read_text()


def test_a_build_that_is_asked_to_end_leaves_nothing_half_written(run, tmp_path, monkeypatch):
    def end(folder):
        assert (tmp_path / ".repository.writing").is_dir()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(repository, "write_remote_code", end)
    with pytest.raises(SystemExit) as ended:
        Child(lambda: build_repository(run, tmp_path / "repository")).join()
    assert ended.value.code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_a_hostile_log_or_note_ends_no_push_with_a_traceback(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    with open(copy / "metrics.jsonl", "ab") as stream:
        stream.write(b'{"step": 1e999, "epoch": 1}\n\xff\n' + b"[" * 100_000)
    arguments = ["push", str(copy), "someone/encoder", "--dry-run", str(tmp_path / "repository")]
    with pytest.warns(UserWarning, match="metrics.jsonl: line .* is no JSON and is left out"):
        assert CliRunner().invoke(app, arguments).exit_code == 0
    (copy / "encoder" / "training.json").write_bytes(b"{\n\xff}")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "training.json, line 2, cannot be read as JSON: these bytes are no UTF-8" in result.stderr


# ---- training on


def test_a_run_starts_from_a_repository_with_its_weights_its_average_and_its_basis(run, published, tmp_path):
    changes = {"train.base_learning_rate": 1e-12, "train.ema_half_life_epochs": 1000}
    onward = train(tmp_path / "onward", changes, start_from=published)
    before, after = (checkpoints(folder / "checkpoints")[-1] for folder in (run, onward))
    for file in ("model.safetensors", "training/ema.safetensors"):
        old, new = load_file(before / file), load_file(after / file)
        assert all(torch.allclose(new[name], old[name], rtol=0, atol=1e-5) for name in old)
    processors = [LDAEImageProcessor.from_pretrained(folder / "processor").fingerprint for folder in (run, onward)]
    assert processors[0] == processors[1]
    assert lines(onward)[0]["loss"] < lines(run)[0]["loss"]


def test_a_run_that_started_from_another_goes_on_when_that_has_gone(run, tmp_path):
    source = shutil.copytree(run, tmp_path / "source")
    folder = train(tmp_path / "run", start_from=source, max_steps=2)
    shutil.rmtree(source)
    train(folder, start_from=source)
    assert json.loads((folder / "run.json").read_text())["start_from"] is not None
    whole = train(tmp_path / "whole", start_from=run)
    results = [load_file(each / "encoder" / "model.safetensors") for each in (folder, whole)]
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        ({"model.latent_dim": 6}, {}, "latent_dim=7, but the model has 6"),
        ({"model.size": "cpu_b"}, {}, "A run cannot start from .* has the shape .* take the recipe"),
        (
            {"model.tokenizer": "patch_ae", "model.input_space": "latent", "model.prediction_target": "latent"},
            {},
            "its tokenizer is patch_pca, the recipe's patch_ae, and one of them is learned",
        ),
        ({}, {"processor": CARD}, "The processor comes with start_from"),
    ],
)
def test_a_start_that_does_not_fit_is_a_sentence_before_anything_is_written(
    published, tmp_path, changes, options, sentence
):
    with pytest.raises(ValueError, match=sentence):
        train(tmp_path / "run", changes, start_from=published, **options)
    assert not (tmp_path / "run").exists()


def test_a_start_from_weights_of_another_task_is_said(published, tmp_path, capfd):
    train(tmp_path / "run", {"model.prediction_target": "reconstruction"}, start_from=published, max_steps=1)
    printed = capfd.readouterr().out
    assert "was trained for another task: prediction_target='image' there, 'reconstruction' here" in printed
    train(tmp_path / "alike", start_from=published, max_steps=1)
    assert "another task" not in capfd.readouterr().out


def test_an_encoder_alone_is_no_start(tmp_path):
    with pytest.raises(RunError, match="holds no run, no checkpoint and no pretraining/"):
        train(tmp_path / "run", start_from=tmp_path)
    damaged = shutil.copytree(CARD, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="The weights in .* are damaged"):
        train(tmp_path / "run", start_from=damaged)
    with pytest.raises(ValueError, match="holds an encoder alone"):
        train(tmp_path / "run", start_from=CARD)
