"""One user from an empty cache to a published classifier, over a Hub on the loopback; each step is a fresh process."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import Hub, hub_environment
from PIL import Image


TOKEN = "hf_" + "Story00" * 5
EXAMPLES = Path(__file__).parent.parent / "examples"
SETTINGS = ["model.image_size=16", "model.patch_size=4", "model.latent_dim=7", "train.epochs=2"]
SETTINGS += ["train.warmup_epochs=0", "train.global_batch_size=8"]

BY_ITS_NAME = """
import json, sys, torch
import ldae_hf
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline
from PIL import Image

name, picture = sys.argv[1:]
config, processor = AutoConfig.from_pretrained(name), AutoImageProcessor.from_pretrained(name)
model = AutoModel.from_pretrained(name)
stock = AutoModel.from_pretrained(name, subfolder="vit")
pixels = processor(Image.open(picture), return_tensors="pt").pixel_values
with torch.no_grad():
    features, folded = (each(pixels).last_hidden_state for each in (model, stock))
    backbone = ldae_hf.LDAEBackbone.from_pretrained(name)(pixels).feature_maps[-1]
extracted = pipeline("image-feature-extraction", model=name)(picture)
print(json.dumps({
    "size": config.image_size,
    "features": features.tolist(),
    "folded": (folded - features).abs().max().item(),
    "backbone": list(backbone.shape),
    "pipeline": (torch.tensor(extracted) - features).abs().max().item(),
}))
"""

WITHOUT_THE_PACKAGE = """
import json, sys, torch
sys.modules["ldae_hf"] = None
from transformers import AutoImageProcessor, AutoModel
from PIL import Image

name, picture = sys.argv[1:]
model = AutoModel.from_pretrained(name, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
with torch.no_grad():
    features = model(**processor(Image.open(picture), return_tensors="pt")).last_hidden_state
print(json.dumps({"features": features.tolist()}))
"""

FINE_TUNE = """
import sys
import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments
import ldae_hf

encoder, images, repo_id = sys.argv[1:]
data = load_dataset("imagefolder", data_dir=images, split="train")
names = data.features["label"].names
processor = AutoImageProcessor.from_pretrained(encoder)
model = AutoModelForImageClassification.from_pretrained(encoder, id2label=dict(enumerate(names)))

def collate(rows):
    inputs = processor([row["image"] for row in rows], return_tensors="pt")
    return {**inputs, "labels": torch.tensor([row["label"] for row in rows])}

arguments = TrainingArguments(
    "tuned", max_steps=30, per_device_train_batch_size=16, learning_rate=3e-3, remove_unused_columns=False,
    report_to=[], hub_model_id=repo_id, push_to_hub=True, save_strategy="no", use_cpu=True, disable_tqdm=True,
)
trainer = Trainer(model, arguments, train_dataset=data, data_collator=collate, processing_class=processor)
trainer.train()
trainer.push_to_hub()
model.push_to_hub("someone/by-hand"), processor.push_to_hub("someone/by-hand")
"""

CLASSIFY = """
import json, sys
import ldae_hf
from transformers import pipeline

name, *pictures = sys.argv[1:]
print(json.dumps([found[0]["label"] for found in pipeline("image-classification", model=name)(pictures)]))
"""


def draw(folder: Path, count: int = 12) -> None:
    """Images of three classes, which any classifier can learn: a noisy red, green or blue square."""
    for number, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.random.default_rng([number, index]).integers(0, 120, (24, 20, 3))
            pixels[4:20, 4:16, number] += 130
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")


@pytest.fixture
def hub():
    with Hub(tokens={TOKEN: ("someone", True)}) as hub:
        yield hub


def test_a_user_trains_publishes_loads_by_name_fine_tunes_and_classifies(hub, tmp_path):
    images = tmp_path / "images"
    draw(images)
    picture = str(images / "green" / "3.png")

    def run(*arguments, home: str, **others) -> str:
        environment = hub_environment(hub, tmp_path / home, TOKEN, LDAE_HUB_OWNER="someone", **others)
        command = [sys.executable, *map(str, arguments)]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert TOKEN not in result.stdout + result.stderr
        return result.stdout

    # Pre-train, with a push at the end.
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    options = ["--tier", "quickstart", "--dataset", images, "--output-dir", "run", "--num-workers", "0"]
    options += ["--mixed-precision", "no", "--push-to-hub", "someone/ldae-vit-b"]
    printed = run("-m", "ldae_hf.cli", "pretrain", "l_dae", *settings, *options, home="trainer")
    assert "pushed to someone/ldae-vit-b" in printed
    run("-m", "ldae_hf.cli", "verify", "someone/ldae-vit-b", home="trainer")

    # Somebody else, with an empty cache: by the bare name, and then without a network.
    found = json.loads(run("-c", BY_ITS_NAME, "ldae-vit-b", picture, home="reader"))
    assert found["size"] == 16 and found["backbone"] == [1, 128, 4, 4]
    assert found["folded"] < 1e-4 and found["pipeline"] < 1e-6
    asked = len(hub.requests)
    again = json.loads(run("-c", BY_ITS_NAME, "ldae-vit-b", picture, home="reader", HF_HUB_OFFLINE="1"))
    assert again == found and len(hub.requests) == asked

    # Somebody who does not have this package, and trusts the code beside the weights.
    remote = json.loads(run("-c", WITHOUT_THE_PACKAGE, "someone/ldae-vit-b", picture, home="stranger"))
    np.testing.assert_allclose(remote["features"], found["features"], atol=1e-6)

    # Fine-tune with transformers' Trainer, which pushes, and classify with what it pushed.
    run("-c", FINE_TUNE, "ldae-vit-b", images, "someone/colours", home="reader")
    names = ["red", "green", "blue"]
    pictures = [images / name / "5.png" for name in names]
    for pushed in ("someone/colours", "someone/by-hand"):
        assert json.loads(run("-c", CLASSIFY, pushed, *pictures, home="third")) == names

    # And train on.
    onward = [EXAMPLES / "continue_pretraining.py", "someone/ldae-vit-b", "--dataset", images, "--output-dir", "onward"]
    assert "onward/encoder" in run(*onward, home="fourth")
