"""`ldae verify` finds what the hashes cannot: each kind of damage is made with a manifest that is right again."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_runs import Child, dataset_of, encoded
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ldae_hf import LDAEConfig, LDAEForPreTraining, LDAEImageProcessor, LDAEModel, LearnedTokenizer
from ldae_hf.cli import app
from ldae_hf.golden import golden_pixels
from ldae_hf.latent_tokenizers import build_autoencoder
from ldae_hf.manifest import MANIFEST, check_folder, manifest_text, sha256, write_folder
from ldae_hf.training import checkpoints, pretrain
from ldae_hf.training.publishing import save_encoder
from ldae_hf.verify import FAILED, NOT_CHECKED, OK, verify


CARD = Path(__file__).parent.parent / "model_cards" / "ldae-cifar10"
SETTINGS = [
    "model.image_size=16",
    "model.patch_size=4",
    "model.latent_dim=7",
    "train.epochs=2",
    "train.warmup_epochs=0",
]
SETTINGS += ["train.global_batch_size=8", "train.base_learning_rate=0.05", "train.ema_half_life_epochs=1"]
MODEL_CHECKS = {"hashes", "weights", "tables", "basis", "features", "recipe", "finite"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a finished run of four steps, with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    images = dataset_of([encoded(number) for number in range(20)])
    options = dict(tier="quickstart", overrides=SETTINGS, dataset=images, num_workers=0, mixed_precision="no")
    Child(lambda: pretrain("l_dae", output_dir=folder, watched=0, **options)).join()
    return folder


@pytest.fixture
def encoder(trained, tmp_path) -> Path:
    """One that a test may damage."""
    return shutil.copytree(trained / "encoder", tmp_path / "encoder")


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    return shutil.copytree(checkpoints(trained / "checkpoints")[-1], tmp_path / "checkpoint")


def statuses(folder: Path, dtype: str = "float32") -> dict[str, str]:
    return {check.name: check.status for check in verify(folder, dtype)}


def failed(folder: Path, dtype: str = "float32") -> dict[str, str]:
    """What has failed, with what was found."""
    return {check.name: check.detail for check in verify(folder, dtype) if check.status == FAILED}


def write_manifest(folder: Path) -> None:
    """A manifest of what is there now."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    digests = {str(file.relative_to(folder)): sha256(file) for file in files}
    (folder / MANIFEST).write_text(manifest_text(digests))
    check_folder(folder)


def change_tensors(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# ---- what is as it was


def test_a_run_passes_and_says_what_was_looked_at(trained):
    found = verify(trained)
    by_folder = {}
    for check in found:
        by_folder.setdefault(check.folder.name, {})[check.name] = check.status
    assert by_folder["processor"] == {"hashes": OK, "processor": OK}
    assert by_folder["encoder"] == dict.fromkeys(MODEL_CHECKS, OK)
    for step in (2, 4):
        assert by_folder[f"step-{step:08d}"] == dict.fromkeys(MODEL_CHECKS, OK) | {
            "features": NOT_CHECKED,
            "average": OK,
        }
    assert all(check.detail for check in found)
    assert "l_dae (tier quickstart) describes the model" in [check.detail for check in found]


def test_features_in_bfloat16_are_near_the_golden_ones_but_not_as_near_as_in_float32(encoder):
    assert failed(encoder, "bfloat16") == {}
    difference = {}
    for dtype in ("float32", "bfloat16"):
        (detail,) = [check.detail for check in verify(encoder, dtype) if check.name == "features"]
        difference[dtype] = float(detail.split()[4])
    assert difference["float32"] <= 1e-5 < 1e-3 < difference["bfloat16"] < 2e-2


def test_golden_images_are_the_same_everywhere_and_have_every_scale():
    pixels = golden_pixels(32, 3)
    assert pixels.shape == (2, 3, 32, 32) and pixels.dtype == torch.uint8
    assert pixels.sum().item() == golden_pixels(32, 3).sum().item() == 741_996
    assert pixels.float().std() > 40 and (pixels[..., 1:].float() - pixels[..., :-1].float()).abs().mean() > 10


def test_a_folder_without_manifest_and_golden_features_is_checked_for_the_rest():
    expected = dict.fromkeys(MODEL_CHECKS, OK) | {"hashes": NOT_CHECKED, "features": NOT_CHECKED}
    assert statuses(CARD) == expected


def test_a_model_that_was_saved_in_bfloat16_passes(encoder):
    LDAEModel.from_pretrained(encoder, dtype=torch.bfloat16).save_pretrained(encoder)
    write_manifest(encoder)
    assert failed(encoder, "bfloat16") == {}


def test_a_folder_may_have_further_files_which_are_named(encoder):
    (encoder / "notes.md").write_text("mine")
    (detail,) = [check.detail for check in verify(encoder) if check.name == "hashes"]
    assert failed(encoder) == {} and detail.endswith("not in the manifest: notes.md")


# ---- damage that the hashes find


def test_a_flipped_bit_in_any_file_is_found_and_the_file_named(checkpoint):
    for file in [path for path in checkpoint.rglob("*") if path.is_file()]:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 8
        file.write_bytes(content)
        assert file.name in failed(checkpoint)["hashes"]
        content[len(content) // 2] ^= 8
        file.write_bytes(content)
    assert failed(checkpoint) == {}


@pytest.mark.parametrize("kind", ["encoder", "checkpoint"])
def test_a_manifest_that_a_run_wrote_must_be_there(request, kind):
    folder = request.getfixturevalue(kind)
    (folder / MANIFEST).unlink()
    assert list(failed(folder)) == ["hashes"]


def test_a_missing_file_is_named_and_ends_no_other_check(checkpoint):
    (checkpoint / "training" / "ema.safetensors").unlink()
    assert failed(checkpoint) == {"hashes": "missing, or not as written: training/ema.safetensors"}


# ---- damage with a manifest that is right


def test_a_weight_that_is_not_finite_is_named(encoder):
    name = "patch_embedding.weight"
    change_tensors(encoder / "model.safetensors", lambda tensors: tensors[name][3, 4:5].fill_(torch.nan))
    write_manifest(encoder)
    found = failed(encoder)
    assert found.keys() == {"finite", "features"}
    assert found["finite"] == f"NaN or infinite values: {name} in model.safetensors"


def test_a_moving_average_of_another_model_is_found(checkpoint):
    def cut(tensors):
        tensors["decoder.renamed"] = tensors.pop(next(name for name in tensors if name.startswith("decoder.")))

    change_tensors(checkpoint / "training" / "ema.safetensors", cut)
    write_manifest(checkpoint)
    assert failed(checkpoint).keys() == {"average"}


@pytest.mark.parametrize("file", ["optimizer", "ema"])
def test_optimizer_and_ema_are_finite_too(checkpoint, file):
    def change(tensors):
        (name,) = [name for name in tensors if name.startswith("decoder.head.weight")][:1]
        tensors[name].view(-1)[0] = torch.inf

    change_tensors(checkpoint / "training" / f"{file}.safetensors", change)
    write_manifest(checkpoint)
    found = failed(checkpoint)
    assert found.keys() == {"finite"}
    assert "decoder.head.weight" in found["finite"] and found["finite"].endswith(f"in training/{file}.safetensors")


@pytest.mark.parametrize("table", ["schedule.sigmas", "schedule.gammas", "position_embeddings"])
def test_a_table_that_is_not_the_configurations_is_named(encoder, table):
    change_tensors(encoder / "model.safetensors", lambda tensors: tensors[table].view(-1)[5].add_(0.01))
    write_manifest(encoder)
    assert table in failed(encoder)["tables"]


def test_another_processor_than_that_of_the_weights_is_found(encoder):
    crops = np.random.default_rng(1).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    other = LDAEImageProcessor(image_size=16, patch_size=4, latent_dim=7).fit(list(crops), progress=False)
    other.save_pretrained(encoder)
    write_manifest(encoder)
    assert failed(encoder).keys() == {"basis"}
    assert "is not the one this model was built with" in failed(encoder)["basis"]


@pytest.mark.parametrize("buffer", ["components", "mean", "explained_variance"])
def test_a_basis_that_is_not_the_processors_is_found(encoder, buffer):
    change_tensors(encoder / "model.safetensors", lambda tensors: tensors[f"tokenizer.{buffer}"].view(-1)[3].mul_(1.01))
    write_manifest(encoder)
    assert "basis" in failed(encoder)


def test_weights_that_changed_by_one_per_cent_have_other_features(encoder):
    def change(tensors):
        generator = torch.Generator().manual_seed(0)
        for name, value in tensors.items():
            if not name.startswith(("tokenizer", "schedule", "position")):
                value.mul_(1 + 0.01 * torch.randn(value.shape, generator=generator))

    change_tensors(encoder / "model.safetensors", change)
    write_manifest(encoder)
    found = failed(encoder)
    assert found.keys() == {"features"} and "more than 0.001" in found["features"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop("patch_embedding.bias"), "lacks patch_embedding.bias"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "holds what the model does not have: more"),
        (lambda tensors: tensors.update({"\x1b[2J": torch.zeros(1)}), "does not have: ?[2J"),
        (lambda tensors: tensors.update({"patch_embedding.bias": torch.zeros(3)}), "shape that config.json asks for"),
        (
            lambda tensors: tensors.update({"patch_embedding.bias": tensors["patch_embedding.bias"].double()}),
            "not what model.safetensors holds: patch_embedding.bias",
        ),
    ],
)
def test_weights_that_are_not_those_of_the_configuration_are_named(encoder, change, message):
    change_tensors(encoder / "model.safetensors", change)
    write_manifest(encoder)
    assert message in failed(encoder)["weights"]


def test_a_recipe_of_another_model_is_found(encoder):
    recipe = json.loads((encoder / "recipe.json").read_text())
    recipe["model"]["latent_scaling"] = "whiten"
    change_json(encoder / "recipe.json", model=recipe["model"])
    write_manifest(encoder)
    assert failed(encoder) == {"recipe": "recipe.json describes another model than config.json: see latent_scaling"}


# ---- learned tokenizers


def learned_patch_autoencoder(processor: LDAEImageProcessor) -> LearnedTokenizer:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(7, 48, generator=generator) for name in ("components", "decoder_components")}
    buffers = weights | {"mean": processor.mean.float(), "explained_variance": torch.rand(7, generator=generator) + 1}
    return LearnedTokenizer("patch_ae", 4, 7, buffers, processor_fingerprint=processor.fingerprint)


def learned_convolutional_autoencoder(processor: LDAEImageProcessor) -> LearnedTokenizer:
    autoencoder = build_autoencoder(image_size=16, stride=4, base_width=4, residual_blocks=1, latent_channels=7)
    return LearnedTokenizer("conv_vae", 4, 7, {"explained_variance": torch.ones(7)}, autoencoder.eval())


@pytest.fixture(params=[learned_patch_autoencoder, learned_convolutional_autoencoder])
def with_learned_tokenizer(request, trained, tmp_path) -> Path:
    torch.manual_seed(0)
    processor = LDAEImageProcessor.from_pretrained(trained / "processor")
    learned = request.param(processor)
    sizes = dict(hidden_size=16, num_hidden_layers=1, decoder_num_hidden_layers=1, num_attention_heads=2)
    keys = dict(tokenizer=learned.tokenizer, input_space="latent", prediction_target="latent")
    model = LDAEForPreTraining(LDAEConfig(image_size=16, patch_size=4, latent_dim=7, **sizes, **keys)).eval()
    model.set_processor(processor)
    model.set_tokenizer(learned)

    def extras(path: Path) -> None:
        processor.save_pretrained(path)
        learned.save_pretrained(path / "tokenizer")

    save_encoder(tmp_path / "encoder", model, extras)
    return tmp_path / "encoder"


def test_a_learned_tokenizer_is_compared_and_used(with_learned_tokenizer):
    folder = with_learned_tokenizer
    assert statuses(folder) == dict.fromkeys(MODEL_CHECKS, OK) | {"recipe": NOT_CHECKED}
    assert statuses(folder / "tokenizer") == {"hashes": NOT_CHECKED, "tokenizer": OK, "finite": OK}
    file = folder / "tokenizer" / "ldae_tokenizer.safetensors"
    change_tensors(file, lambda tensors: tensors["explained_variance"][0].add_(1))
    write_manifest(folder)
    assert "do not have the fingerprint" in failed(folder)["basis"]
    assert "do not have the fingerprint" in failed(folder / "tokenizer")["tokenizer"]


def test_latent_scales_that_are_not_the_learned_tokenizers_are_found(with_learned_tokenizer):
    folder = with_learned_tokenizer
    change_tensors(folder / "model.safetensors", lambda tensors: tensors["tokenizer.explained_variance"][0].add_(1))
    write_manifest(folder)
    assert "explained_variance" in failed(folder)["basis"]


# ---- folders that mean no good


@pytest.mark.parametrize(
    "config, message",
    [
        ("", "JSONDecodeError"),
        ("[]", "AttributeError"),
        ("[" * 100_000, "RecursionError"),
        ({"model_type": "bert"}, "is of a model of type 'bert', not 'ldae'"),
        ({"architectures": ["Evil"]}, "names the architectures ['Evil']"),
        ({"architectures": 3}, "names the architectures 3"),
        ({"hidden_size": -4}, "hidden_size=-4 must be positive"),
        ({"num_hidden_layers": 250}, "describes a larger model than model.safetensors can hold"),
        ({"num_hidden_layers": 10**9}, "the largest that is taken"),
        ({"hidden_size": 2**40, "num_attention_heads": 1}, "the largest that is taken"),
        ({"image_size": 4 * 10**6}, "too many for hidden_size"),
        ({"patch_size": 2**20, "image_size": 2**20, "latent_dim": 7}, "the most that are taken"),
        ({"num_train_timesteps": 10**12}, "the largest that is taken"),
        ({"mlp_ratio": 1e300}, "the largest that is taken"),
        ({"num_train_timesteps": 999}, "not of the shape that config.json asks for: schedule.gammas, schedule.sigmas"),
        ({"dtype": "float16"}, "loaded, these are not what model.safetensors holds"),
        ({"dtype": "no_such"}, "no_such"),
    ],
)
def test_a_configuration_that_lies_is_a_failed_check_in_one_sentence(encoder, config, message):
    if isinstance(config, str):
        (encoder / "config.json").write_text(config)
    else:
        change_json(encoder / "config.json", **config)
    write_manifest(encoder)
    found = failed(encoder)["weights"]
    assert message in found and len(found) < 400 and "\n" not in found


def test_no_code_and_no_pickle_of_a_folder_is_run(encoder, tmp_path, monkeypatch):
    marker = tmp_path / "was-run"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (encoder / "evil.py").write_text(f"import os; os.mkdir({str(marker)!r})")
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForPreTraining"), "evil.Evil")
    for name in ("config.json", "preprocessor_config.json"):
        change_json(encoder / name, auto_map=auto_map | {"AutoImageProcessor": "evil.Evil"})
    write_manifest(encoder)
    assert failed(encoder) == {}
    (encoder / "model.safetensors").unlink()
    (encoder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    write_manifest(encoder)
    assert "weights" in failed(encoder)
    (encoder / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    write_manifest(encoder)
    assert "weights" in failed(encoder)
    assert not marker.exists()


def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(encoder):
    (encoder / "training.json").unlink()
    os.mkfifo(encoder / "training.json")
    assert "training.json" in failed(encoder)["hashes"]


# ---- runs, and folders that are none


def test_a_checkpoint_that_was_set_aside_fails_nothing_but_one_without_manifest_does(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    older, newer = checkpoints(run / "checkpoints")
    newer.rename(newer.with_name(f"{newer.name}.damaged"))
    assert failed(run) == {}
    assert [c.detail for c in verify(run) if c.status == NOT_CHECKED][-1] == "set aside by the run, as damaged"
    (older / MANIFEST).unlink()
    assert failed(run).keys() == {"hashes"}


def ldae(*arguments) -> tuple[int, list[str], str]:
    """Exit code, lines, and errors of the command, in a process of its own."""

    def run():
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, result.stdout.splitlines(), result.stderr

    return Child(run).join()


def test_the_command_prints_a_line_for_each_check_and_exits_with_1_if_one_fails(trained, encoder):
    code, lines, errors = ldae("verify", trained)
    assert code == 0 and "FAILED" not in "".join(lines) and "Loading" not in errors
    assert len(lines) == 1 + len(verify(trained))
    assert lines[-1].endswith(f"4 folders, {len(lines) - 1} checks, 0 failed")
    assert "ok           encoder  weights: 36 tensors load bit for bit" in lines
    (encoder / "training.json").write_text("{}")
    code, lines, _ = ldae("verify", encoder, "--dtype", "bfloat16")
    assert code == 1
    assert "FAILED       hashes: missing, or not as written: training.json" in lines
    assert lines[-1].endswith("1 folder, 7 checks, 1 failed")


@pytest.mark.parametrize(
    "make, arguments, message",
    [
        (lambda folder: folder / "nothing", [], "There is no folder"),
        (lambda folder: folder, [], "holds no model, processor or tokenizer, and is not the folder of a run"),
        (lambda folder: write_folder(folder / "checkpoints", lambda path: None) or folder, [], "written nothing yet"),
        (lambda folder: folder, ["--dtype", "int8"], "dtype is 'int8', but must be float32 or bfloat16"),
    ],
)
def test_a_users_error_is_one_sentence_and_exit_code_2(tmp_path, make, arguments, message):
    code, lines, errors = ldae("verify", make(tmp_path), *arguments)
    assert code == 2 and lines == []
    assert errors.startswith("Error: ") and message in errors and errors.count("\n") == 1
