"""What an export writes is loaded where ldae_hf was never installed, by the words that its docstring says."""

import copy
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from test_export import CIFAR10, randomise, relative_difference
from transformers import AutoModel
from typer.testing import CliRunner

from ldae_hf import LDAEConfig, LDAEForImageClassification, LDAEForPreTraining, LDAEImageProcessor, LDAEModel
from ldae_hf.cli import app
from ldae_hf.export import export_folder, to_transformers, write_exports
from ldae_hf.export.transformers_vit import stock_processor
from ldae_hf.manifest import check_folder


ROOT = Path(__file__).parent.parent
PEERS = Path(os.environ.get("LDAE_PEERS") or ROOT / ".venv-peers")
CLASSES = ["cat", "dog", "eel"]


def photographs() -> list[Image.Image]:
    """Square, wide, tall, and odd."""
    one, two = (Image.fromarray(pixels) for pixels in load_sample_images().images)
    return [one.crop((0, 0, 427, 427)), two, one.crop((3, 5, 300, 416)), two.crop((11, 0, 288, 201))]


# A process that cannot import ldae_hf loads every folder as a user does; timm comes last, because beside transformers
# it brings torchvision, which a CPU build of torch cannot load.
LOADER = """
import json, sys
from pathlib import Path
sys.modules["ldae_hf"] = None
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

root, peers = map(Path, sys.argv[1:3])
picture = Image.open(root / "picture.png")
said, tensors = {}, {}
for kind, auto in (("encoder", AutoModel), ("classifier", AutoModelForImageClassification)):
    folder = root / kind / "vit"
    images = load_file(root / kind / "reference.safetensors")["pixel_values"]
    model, processor = auto.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        tensors[f"{kind}.vit"] = model(images)[0]
    tensors[f"{kind}.pixels"] = processor(picture, return_tensors="pt")["pixel_values"]
    said[kind] = [type(model).__name__, type(processor).__name__]
tensors["encoder.subfolder"] = AutoModel.from_pretrained(root / "encoder", subfolder="vit").layernorm.weight
features = pipeline("image-feature-extraction", model=str(root / "encoder" / "vit"))(picture)
tensors["encoder.pipeline"] = torch.tensor(features)
said["labels"] = pipeline("image-classification", model=str(root / "classifier" / "vit"))(picture)

sys.path.append(str(peers))
if torch.version.cuda is None:  # torchvision's wheels are CUDA builds, and want two operators that are not there
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
try:
    import timm
except ImportError as error:
    said["no timm"] = str(error)
else:
    for kind in ("encoder", "classifier"):
        folder = root / kind / "timm"
        images = load_file(root / kind / "reference.safetensors")["pixel_values"]
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        with torch.no_grad():
            tensors[f"{kind}.timm"] = model(images)
            tensors[f"{kind}.timm.tokens"] = model.forward_features(images)
        tensors[f"{kind}.timm.pixels"] = transform(picture)[None]
        arguments = json.loads((folder / "config.json").read_text())["model_args"]
        bare = timm.create_model("vit_base_patch16_224", num_classes=model.num_classes, **arguments)
        said[f"{kind}.strict"] = str(bare.load_state_dict(load_file(folder / "model.safetensors"), strict=True))
        said[f"{kind}.labels"] = model.pretrained_cfg.get("label_names")
save_file({name: value.contiguous() for name, value in tensors.items()}, root / "found.safetensors")
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def processor() -> LDAEImageProcessor:
    return LDAEImageProcessor.from_pretrained(CIFAR10)


@pytest.fixture(scope="module")
def models(processor) -> dict[str, LDAEModel | LDAEForImageClassification]:
    """The trained encoder, and a classifier of three classes that is in no part as it starts."""
    config = LDAEConfig.from_pretrained(CIFAR10, id2label=dict(enumerate(CLASSES)), num_hidden_layers=1)
    classifier = randomise(LDAEForImageClassification(config))
    classifier.set_processor(processor)
    return {"encoder": LDAEModel.from_pretrained(CIFAR10).eval(), "classifier": classifier}


@pytest.fixture(scope="module")
def root(models, processor, tmp_path_factory) -> Path:
    """Both models' exports, each with images and the model's own answer."""
    root = tmp_path_factory.mktemp("exports")
    photographs()[0].save(root / "picture.png")
    for kind, model in models.items():
        write_exports(root / kind, model, processor)
        pixel_values = torch.rand(3, 3, 32, 32) * 2 - 1
        with torch.no_grad():
            expected = {"pixel_values": pixel_values, "tokens": model.base_model(pixel_values).last_hidden_state}
            expected |= {"logits": model(pixel_values).logits} if kind == "classifier" else {}
        save_file(expected, root / kind / "reference.safetensors")
    return root


@pytest.fixture(scope="module")
def found(root) -> tuple[dict[str, torch.Tensor], dict]:
    """What a process without ldae_hf makes of the folders."""
    command = [sys.executable, "-c", LOADER, str(root), str(PEERS)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert process.returncode == 0, process.stderr
    return load_file(root / "found.safetensors"), json.loads(process.stdout.splitlines()[-1])


@pytest.fixture
def timm_found(found):
    if reason := found[1].get("no timm"):
        pytest.skip(f"timm is not in {PEERS}, the folder that LDAE_PEERS names: {reason}")
    return found


def expected_of(root: Path, kind: str) -> dict[str, torch.Tensor]:
    return load_file(root / kind / "reference.safetensors")


def test_transformers_loads_the_vit_without_this_package(root, found):
    tensors, said = found
    assert said["encoder"] == ["IJepaModel", "PerceiverImageProcessorPil"]
    assert said["classifier"][0] == "IJepaForImageClassification"
    assert relative_difference(tensors["encoder.vit"], expected_of(root, "encoder")["tokens"]) < 1e-5
    assert relative_difference(tensors["classifier.vit"], expected_of(root, "classifier")["logits"]) < 1e-5
    assert tensors["encoder.subfolder"].shape == (192,)


def test_the_pipelines_of_transformers_work_on_the_vit(models, processor, found):
    tensors, said = found
    inputs = processor(photographs()[0], return_tensors="pt")
    assert torch.equal(tensors["encoder.pixels"], inputs["pixel_values"])
    with torch.no_grad():
        features, logits = models["encoder"](**inputs).last_hidden_state, models["classifier"](**inputs).logits
    assert relative_difference(tensors["encoder.pipeline"], features) < 1e-5
    scores = dict(zip(CLASSES, logits[0].softmax(0).tolist(), strict=True))
    assert {row["label"]: row["score"] for row in said["labels"]} == pytest.approx(scores, rel=1e-4)


def test_timm_loads_the_folder_and_takes_every_weight(root, timm_found):
    tensors, said = timm_found
    encoder, classifier = (expected_of(root, kind) for kind in ("encoder", "classifier"))
    assert relative_difference(tensors["encoder.timm"], encoder["tokens"].mean(dim=1)) < 1e-5
    assert relative_difference(tensors["encoder.timm.tokens"], encoder["tokens"]) < 1e-5
    assert relative_difference(tensors["classifier.timm"], classifier["logits"]) < 1e-5
    assert said["encoder.strict"] == said["classifier.strict"] == "<All keys matched successfully>"
    assert said["classifier.labels"] == CLASSES and said["encoder.labels"] is None


def test_timms_transform_gives_a_square_images_pixels(processor, timm_found):
    expected = processor(photographs()[0], return_tensors="pt")["pixel_values"]
    assert (timm_found[0]["encoder.timm.pixels"] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("image_size", [32, 224, 256])
def test_the_stock_processors_pixels_are_ours_but_for_the_border(image_size):
    ours = LDAEImageProcessor(image_size, 4, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4))
    for picture in (*photographs(), photographs()[1].convert("L")):
        levels = [
            (processor(picture, return_tensors="np")["pixel_values"][0] * np.array(ours.image_std)[:, None, None]) * 255
            for processor in (ours, stock_processor(ours))
        ]
        difference = np.abs(levels[0] - levels[1])
        if picture.width == picture.height:
            assert difference.max() < 1e-3
        else:
            assert difference.mean() < 0.3 and difference.max() < 13


def test_write_exports_writes_two_folders_and_what_it_measured(root):
    files = sorted(path.relative_to(root / "encoder").as_posix() for path in (root / "encoder").rglob("*.*"))
    vit = [f"vit/{name}" for name in ("config.json", "model.safetensors", "preprocessor_config.json")]
    assert files == ["exports.json", "reference.safetensors", "timm/config.json", "timm/model.safetensors", *vit]
    for kind, output in (("encoder", "last_hidden_state"), ("classifier", "logits")):
        rows = json.loads((root / kind / "exports.json").read_text())
        assert list(dict.fromkeys(row["target"] for row in rows)) == ["transformers", "timm", "onnx", "torch.export"]
        for row in rows:
            if reason := row.get("not_measured"):
                assert row["target"] == "timm" and "cannot be imported here" in reason
            else:
                assert row["relative_difference"] < row["tolerance"] == 1e-5
                assert row["output"] == output and row["versions"]


def test_a_model_with_parts_that_timm_lacks_has_no_timm_folder_and_a_row_that_says_why(processor, tmp_path):
    model = LDAEModel(LDAEConfig.from_pretrained(CIFAR10, layer_norm_eps=1e-5, num_hidden_layers=1))
    rows = write_exports(tmp_path, model, processor)
    assert (tmp_path / "vit").is_dir() and not (tmp_path / "timm").exists()
    (row,) = [row for row in rows if row["target"] == "timm"]
    assert "layer_norm_eps=1e-05" in row["not_measured"]


def test_what_does_not_fold_writes_nothing(processor, tmp_path):
    whole = LDAEForPreTraining(LDAEConfig.from_pretrained(CIFAR10, decoder_num_hidden_layers=1))
    with pytest.raises(ValueError, match="Only an encoder or a classifier folds"):
        write_exports(tmp_path, whole, processor)
    assert not list(tmp_path.iterdir())


def ldae_export(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.fixture(scope="module")
def classifier(models, processor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "classifier"
    models["classifier"].save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("format", "file", "line"),
    [
        ("transformers", "preprocessor_config.json", "AutoModelForImageClassification.from_pretrained('{folder}')"),
        ("timm", "config.json", "timm.create_model('local-dir:{folder}', pretrained=True)"),
        ("onnx", "model.onnx", "onnxruntime.InferenceSession('{folder}/model.onnx')"),
    ],
)
def test_the_command_writes_a_whole_folder_and_says_how_to_load_it(format, file, line, classifier, tmp_path):
    folder = tmp_path / "exports" / "mine"
    result = ldae_export(classifier, folder, "--format", format, "--timestep", "700")
    assert result.exit_code == 0, result.output
    assert line.format(folder=folder) in result.output
    assert f"{format}: " in result.output
    check_folder(folder, (file, "exports.json"))
    rows = json.loads((folder / "exports.json").read_text())
    assert all(row["relative_difference"] < 1e-5 for row in rows if "output" in row)
    names = json.loads((folder / "config.json").read_text())
    assert names["label_names"] == CLASSES if format == "timm" else [*names["id2label"].values()] == CLASSES


def test_the_command_exports_an_encoder(tmp_path):
    result = ldae_export(CIFAR10, tmp_path / "out")
    assert f"AutoModel.from_pretrained('{tmp_path / 'out'}')" in result.output
    assert "transformers: last_hidden_state of 2 x 32x32 px within" in result.output


def test_a_model_that_was_saved_in_half_precision_is_exported_in_full(models, processor, tmp_path):
    half = LDAEModel.from_pretrained(CIFAR10, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    processor.save_pretrained(tmp_path / "half")
    rows, _ = export_folder(tmp_path / "half", tmp_path / "vit")
    assert max(row["relative_difference"] for row in rows) < 1e-5
    pixel_values = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = LDAEModel.from_pretrained(tmp_path / "half", dtype="float32")(pixel_values).last_hidden_state
        found = AutoModel.from_pretrained(tmp_path / "vit")(pixel_values).last_hidden_state
    assert relative_difference(found, expected) < 1e-5


def test_a_classifier_of_several_labels_at_once_stays_one(models):
    model = copy.deepcopy(models["classifier"])
    model.config.problem_type = "multi_label_classification"
    assert to_transformers(model).config.problem_type == "multi_label_classification"


def test_the_command_refuses_in_a_sentence_and_leaves_nothing(tmp_path):
    there, fresh = tmp_path / "there", tmp_path / "fresh"
    there.mkdir()
    for arguments, message in (
        ((CIFAR10, there), "is there already, and nothing is written over it"),
        ((CIFAR10, fresh, "--format", "tensorflow"), "There is no format 'tensorflow'; choose one of transformers"),
        ((CIFAR10, fresh, "--timestep", "1000"), "Timesteps must lie in 0 ... 999"),
        ((tmp_path / "absent", fresh), "absent"),
    ):
        result = ldae_export(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr and result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_example_runs(tmp_path, capsys):
    example = runpy.run_path(str(ROOT / "examples" / "export.py"))
    example["export"](str(CIFAR10), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"vit", "timm", "onnx"}
    assert "transformers: last_hidden_state of 2 x 32x32 px within" in capsys.readouterr().out
