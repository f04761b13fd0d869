"""The examples of what to do with a finished encoder, on tiny images."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_encoder import pictures, save_tiny_encoder
from transformers import AutoImageProcessor, AutoModel, pipeline


EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("features", "finetune", "knn_search", "linear_probe")


def function(example: str, name: str):
    """What the example gives to typer."""
    return runpy.run_path(str(EXAMPLES / f"{example}.py"))[name]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return str(save_tiny_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two classes, told apart by their brightness."""
    folder = tmp_path_factory.mktemp("images")
    for split, count, seed in (("train", 24, 0), ("test", 8, 1)):
        for number, picture in enumerate(pictures(count, seed)):
            name = ("bright", "dark")[number % 2]
            file = folder / split / name / f"{number:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.point(lambda value, dark=number % 2: value // 6 if dark else value).save(file)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_an_example_says_at_its_head_how_to_call_it(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert f"python examples/{name}.py" in text.split('"""')[1]
    assert len(text.splitlines()) < 120


def test_features_of_a_folder_are_the_models_in_the_order_of_the_files(encoder, images, tmp_path):
    output = tmp_path / "features.safetensors"
    function("features", "extract")(images / "test", encoder=encoder, output=output, batch_size=3)
    with safe_open(output, "pt") as file:
        names, features = json.loads(file.metadata()["files"]), file.get_tensor("features")
    assert names == sorted(map(str, (images / "test").rglob("*.png")))
    inputs = AutoImageProcessor.from_pretrained(encoder)([Image.open(name) for name in names], return_tensors="pt")
    expected = AutoModel.from_pretrained(encoder)(**inputs).pooler_output
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_an_image_of_the_data_set_is_its_own_nearest_neighbour(encoder, images, tmp_path, capsys):
    query = images / "train" / "dark" / "05.png"
    search = function("knn_search", "search")
    search(query, dataset=str(images), encoder=encoder, count=5, output=tmp_path / "neighbours.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1.000") and lines[0].endswith("dark")
    assert len(lines) == 6
    assert Image.open(tmp_path / "neighbours.png").height > 16


def test_the_probe_is_printed_with_its_floors(encoder, images, tmp_path, capsys):
    output = tmp_path / "probe.json"
    function("linear_probe", "probe")(dataset=str(images), encoder=encoder, epochs=2, output=output)
    printed = capsys.readouterr().out
    assert "raw pixels" in printed and "top-1" in printed
    assert json.loads(output.read_text())["task"] == "linear_probe"


def test_fine_tuning_leaves_a_folder_that_a_pipeline_loads(encoder, images, tmp_path, capsys):
    options = dict(dataset=str(images), encoder=encoder, output_dir=tmp_path / "classifier", num_workers=0)
    function("finetune", "finetune")(epochs=12, batch_size=8, learning_rate=3e-3, **options)
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}/classifier/model: 100.0 % of 8 test images right"
    classify = pipeline("image-classification", model=str(tmp_path / "classifier" / "model"))
    assert not list((tmp_path / "classifier" / "model").glob("*.bin"))
    for name in ("bright", "dark"):
        files = sorted(map(str, (images / "test" / name).iterdir()))
        assert [result[0]["label"] for result in classify(files)] == [name] * len(files)


def test_an_example_runs_as_a_command_and_names_what_it_cannot_find(encoder, images, tmp_path):
    command = [sys.executable, str(EXAMPLES / "features.py"), str(images), "--encoder", encoder]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == "features.safetensors: features of 32 images, 32 values each\n"
    wide = os.environ | {"COLUMNS": "1000"}  # else a long path breaks the sentence where the line ends
    run = subprocess.run([*command[:2], str(tmp_path / "nowhere")], capture_output=True, text=True, env=wide)
    assert run.returncode == 2 and "does not exist" in run.stderr
