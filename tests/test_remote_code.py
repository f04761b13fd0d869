"""A saved model loads without this package, through `trust_remote_code`, and computes what it computes with it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_encoder import pictures, save_tiny_encoder
from transformers import AutoModel

import ldae_hf
from ldae_hf import LDAEBackbone, LDAEForImageClassification, LDAEImageProcessor, LDAEModel
from ldae_hf.remote_code import write_auto_maps, write_remote_code


LABELS = {0: "cat", 1: "dog", 2: "owl"}

MODULES = (
    "backbone_ldae",
    "configuration_ldae",
    "image_processing_ldae",
    "images",
    "layers_ldae",
    "loading_ldae",
    "modeling_ldae",
    "noise_schedules",
    "patch_covariance",
    "patch_tokenizers",
    "prediction_targets",
)

# Runs in a process in which `import ldae_hf` fails; $1 holds the folders, $2 is where the results go.
STRANGER = """
import os, sys
from pathlib import Path
sys.modules["ldae_hf"] = None
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    pipeline,
)

try:
    import ldae_hf
except ImportError:
    pass
else:
    raise AssertionError("the package is there")
folders, out = Path(sys.argv[1]), Path(sys.argv[2])
trusted = dict(trust_remote_code=True)
image = Image.open(folders / "image.png")

processor = AutoImageProcessor.from_pretrained(folders / "encoder", **trusted)
pixel_values = processor(image, return_tensors="pt")["pixel_values"]
model = AutoModel.from_pretrained(folders / "encoder", **trusted)
model.check_processor(processor)
config = AutoConfig.from_pretrained(folders / "encoder", out_features=["stage1", "stage3"], **trusted)
backbone = AutoBackbone.from_config(config, **trusted)
backbone.load_state_dict(model.state_dict())
whole = AutoModelForPreTraining.from_pretrained(folders / "encoder", subfolder="pretraining", **trusted)
classifier = AutoModelForImageClassification.from_pretrained(folders / "classifier", **trusted)
pooled = pipeline("image-feature-extraction", model=str(folders / "encoder"), **trusted)(image, pool=True)
guess = pipeline("image-classification", model=str(folders / "classifier"), **trusted)(image)[0]["label"]
model.save_pretrained(out / "again")  # a remote model takes its code along
processor.save_pretrained(out / "again")
again = AutoModel.from_pretrained(out / "again", **trusted)

with torch.no_grad():
    results = {
        "pixel_values": pixel_values,
        "encoder": model(pixel_values).last_hidden_state,
        "again": again(pixel_values).last_hidden_state,
        "whole": whole.ldae(pixel_values).last_hidden_state,
        "classifier": classifier(pixel_values).logits,
        "stage1": backbone.eval()(pixel_values).feature_maps[0],
        "pooled": torch.tensor(pooled),
    }
save_file({name: value.contiguous() for name, value in results.items()}, out / "results.safetensors")
(out / "guess").write_text(guess)
"""


def listing(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """An encoder with pretraining/ below it, and a classifier fine-tuned from it, both with their code."""
    folders = tmp_path_factory.mktemp("folders")
    encoder = save_tiny_encoder(folders / "encoder")
    model = ldae_hf.LDAEForPreTraining(LDAEModel.from_pretrained(encoder).config).eval()
    model.ldae.load_state_dict(LDAEModel.from_pretrained(encoder).state_dict())
    model.save_pretrained(encoder / "pretraining")
    classifier = LDAEForImageClassification.from_pretrained(
        encoder, id2label=LABELS, label2id={name: number for number, name in LABELS.items()}
    )
    classifier.save_pretrained(folders / "classifier")
    LDAEImageProcessor.from_pretrained(encoder).save_pretrained(folders / "classifier")
    write_remote_code(encoder)
    write_auto_maps(encoder / "pretraining")
    write_remote_code(folders / "classifier")
    pictures(1)[0].save(folders / "image.png")
    return folders


def test_without_the_package_everything_loads_and_computes_the_same_bit_for_bit(folders, tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, str(folders), str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    theirs = load_file(tmp_path / "results.safetensors")

    encoder = LDAEModel.from_pretrained(folders / "encoder")
    processor = LDAEImageProcessor.from_pretrained(folders / "encoder")
    pixel_values = processor(pictures(1), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = encoder(pixel_values)
        logits = LDAEForImageClassification.from_pretrained(folders / "classifier")(pixel_values).logits
        backbone = LDAEBackbone.from_pretrained(folders / "encoder", out_features=["stage1", "stage3"])
        stage = backbone(pixel_values).feature_maps[0]
    assert torch.equal(theirs["pixel_values"], pixel_values)
    for name in ("encoder", "again", "whole"):
        assert torch.equal(theirs[name], features.last_hidden_state), name
    assert torch.equal(theirs["pooled"], features.pooler_output)
    assert torch.equal(theirs["classifier"], logits)
    assert torch.equal(theirs["stage1"], stage)
    assert (tmp_path / "guess").read_text() == LABELS[int(logits.argmax())]

    # What was saved there is an ordinary folder for the package.
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert type(again) is LDAEModel
    assert torch.equal(again(pixel_values).last_hidden_state, features.last_hidden_state)


def test_the_code_of_an_installed_package_wins_even_if_the_folders_is_trusted(folders, tmp_path):
    folder = shutil.copytree(folders / "encoder", tmp_path / "encoder")
    for file in folder.glob("*.py"):
        file.write_text("raise AssertionError('this code was run')")
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)) is LDAEModel
    assert type(AutoModel.from_pretrained(folder)) is LDAEModel


def test_what_the_package_saves_again_names_no_code_that_is_not_beside_it(folders, tmp_path):
    AutoModel.from_pretrained(folders / "encoder").save_pretrained(tmp_path)
    LDAEImageProcessor.from_pretrained(folders / "encoder").save_pretrained(tmp_path)
    for name in ("config.json", "preprocessor_config.json"):
        assert "auto_map" not in json.loads((tmp_path / name).read_text())
    assert not list(tmp_path.glob("*.py"))


def test_only_the_files_that_are_needed_travel_and_the_rest_stays_as_it_was(tmp_path):
    plain = save_tiny_encoder(tmp_path / "plain")
    folder = shutil.copytree(plain, tmp_path / "with code")
    written = {file.name for file in write_remote_code(folder)}
    code = {f"{module}.py" for module in MODULES}
    assert written == code | {"config.json", "preprocessor_config.json"}
    assert listing(folder) - listing(plain) == code
    for name in ("config.json", "preprocessor_config.json"):
        before, after = (json.loads((where / name).read_text()) for where in (plain, folder))
        assert after.pop("auto_map")
        assert after == before
    again = {file: file.read_bytes() for file in folder.iterdir()}
    write_remote_code(folder)
    assert {file: file.read_bytes() for file in folder.iterdir()} == again


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither config.json nor preprocessor_config.json"):
        write_remote_code(tmp_path)
    assert not list(tmp_path.iterdir())
