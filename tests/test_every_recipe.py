"""Every recipe of the family, shrunk: it learns, a gradient reaches all that is trained, and it comes back equal."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import datasets
import pytest
import torch
from forked_runs import Child, dataset_of, encoded, lines
from safetensors.torch import save_file
from transformers import AutoConfig

from ldae_hf import LDAEConfig, LDAEForPreTraining, LDAEImageProcessor, LearnedTokenizer
from ldae_hf.configuration_ldae import CONVOLUTIONAL_TOKENIZERS, LEARNED_TOKENIZERS
from ldae_hf.latent_tokenizers import build_autoencoder
from ldae_hf.patch_covariance import PatchCovariance
from ldae_hf.recipes import load_recipe, recipe_names
from ldae_hf.training import pretrain


NARROW = dict(
    hidden_size=16, num_hidden_layers=1, decoder_num_hidden_layers=1, num_attention_heads=2, conditioning_hidden_size=8
)
NARROW_DECODER = dict(decoder_hidden_size=8, decoder_num_hidden_layers=4)  # where it has a width of its own
RECIPES = [name for name in recipe_names() if not load_recipe(name).is_masked]  # the baseline: test_masking.py


@cache
def config_of(name: str) -> str:
    """The recipe's model at the cpu tier, narrow, as JSON: many recipes have the same."""
    config = load_recipe(name, "cpu").model_config()
    keys = {key: getattr(config, key) for key in LDAEConfig.__annotations__ if hasattr(config, key)}
    narrow = NARROW if config.decoder_hidden_size is None else NARROW | NARROW_DECODER
    return json.dumps(keys | narrow, sort_keys=True)


def images(size: int) -> torch.Tensor:
    """Twelve smooth uint8 images (12,3,size,size)."""
    noise = torch.randn(12, 3, size, size, generator=torch.Generator().manual_seed(0)).cumsum(2).cumsum(3)
    low, high = noise.amin((2, 3), keepdim=True), noise.amax((2, 3), keepdim=True)
    return ((noise - low) / (high - low) * 255).round().to(torch.uint8)


@cache
def processor_of(image_size: int, patch_size: int, latent_dim: int, latent_scaling: str) -> LDAEImageProcessor:
    processor = LDAEImageProcessor(image_size, patch_size, latent_dim, latent_scaling)
    covariance = PatchCovariance(processor.patch_dim)
    return processor.set_basis(processor.accumulate(covariance, images(96)))  # enough patches for every K


def tokenizer_of(config: LDAEConfig, processor: LDAEImageProcessor) -> LearnedTokenizer:
    """A tokenizer that has learned nothing yet."""
    torch.manual_seed(1)
    autoencoder = None
    if config.tokenizer in CONVOLUTIONAL_TOKENIZERS:
        stride = config.patch_size // 2
        autoencoder = build_autoencoder(config.image_size, stride, 8, 1, config.latent_dim // 4)
        buffers = {"explained_variance": torch.full((config.latent_dim,), 0.5)}
    else:
        shape = (config.latent_dim, config.patch_dim)
        buffers = {"components": torch.randn(shape), "decoder_components": torch.randn(shape)}
        buffers |= {"mean": processor.mean.float(), "explained_variance": torch.full(shape[:1], 2.0)}
    return LearnedTokenizer(
        tokenizer=config.tokenizer,
        patch_size=config.patch_size,
        latent_dim=config.latent_dim,
        buffers=buffers,
        autoencoder=autoencoder,
        processor_fingerprint=processor.fingerprint,
    )


def build(config: LDAEConfig) -> tuple[LDAEForPreTraining, LDAEImageProcessor, LearnedTokenizer | None]:
    processor = processor_of(config.image_size, config.patch_size, config.latent_dim, config.latent_scaling)
    torch.manual_seed(0)
    model = LDAEForPreTraining(config)
    model.set_processor(processor)
    learned = tokenizer_of(config, processor) if config.tokenizer in LEARNED_TOKENIZERS else None
    if learned is not None:
        model.set_tokenizer(learned)
    return model, processor, learned


def inputs_of(config: LDAEConfig, processor: LDAEImageProcessor, batch: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "pixel_values": processor.normalize_pixels(images(config.image_size)[:batch]),
        "timesteps": torch.randint(config.num_noise_levels, (batch, *config.timesteps_shape), generator=generator),
        "noise": torch.randn(batch, config.num_patches, config.latent_dim, generator=generator),
    }
    if config.num_classes is not None:
        inputs["labels"] = torch.arange(batch)
        inputs["dropped_labels"] = torch.arange(batch) == 0
    return inputs


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_learns_and_a_gradient_reaches_every_parameter(name):
    config = LDAEConfig(**json.loads(config_of(name)))
    model, processor, _ = build(config)
    inputs = inputs_of(config, processor)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3, weight_decay=0)
    losses = []
    # The head, the gates and the modulations start at zero: two steps wake them all.
    for _ in range(3):
        output = model(**inputs)
        optimizer.zero_grad()
        output.loss.backward()
        losses.append(output.loss.item())
        asleep = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        optimizer.step()
    assert all(torch.isfinite(torch.tensor(losses))) and losses[2] < losses[0]
    assert not asleep
    answers_in_latents = config.input_space == "latent" or config.prediction_target == "latent"
    assert output.prediction.shape == (
        4,
        config.num_patches,
        config.latent_dim if answers_in_latents else config.patch_dim,
    )


# Loads every folder anew, with the classes that a user takes, and compares parameters, buffers and outputs.
LOADER = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
import ldae_hf
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining
from ldae_hf import LearnedTokenizer

report = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    reference = load_file(folder / "reference.safetensors")
    inputs = {name[7:]: value for name, value in reference.items() if name.startswith("inputs.")}
    model, encoder = (cls.from_pretrained(folder).eval() for cls in (AutoModelForPreTraining, AutoModel))
    for loaded in (model, encoder):
        loaded.check_processor(AutoImageProcessor.from_pretrained(folder))
        if (folder / "tokenizer").is_dir():
            loaded.set_tokenizer(LearnedTokenizer.from_pretrained(folder, subfolder="tokenizer"))
    held = dict([*model.named_parameters(), *model.named_buffers()])
    wrong = sorted(name for name in held if not torch.equal(held[name], reference[f"model.{name}"]))
    wrong += sorted(name[6:] for name in reference if name.startswith("model.") and name[6:] not in held)
    with torch.no_grad():
        prediction = model(**inputs).prediction
        features = encoder(inputs["pixel_values"]).last_hidden_state
    report[folder.name] = {
        "wrong": wrong,
        "prediction": torch.equal(prediction, reference["prediction"]),
        "features": torch.equal(features, reference["features"]),
    }
print(json.dumps(report))
"""


@pytest.fixture(scope="session")
def report(tmp_path_factory) -> dict[str, dict]:
    """What a fresh process finds in the folder of each model of the family, by the model's configuration."""
    root = tmp_path_factory.mktemp("family")
    names = {}
    for name in RECIPES:
        names.setdefault(config_of(name), name)
    for keys, name in names.items():
        config = LDAEConfig(**json.loads(keys))
        model, processor, learned = build(config)
        with torch.no_grad():
            for parameter in model.parameters():  # no gate or head is left at the zero that it starts from
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.eval().save_pretrained(root / name)
        processor.save_pretrained(root / name)
        if learned is not None:
            learned.save_pretrained(root / name / "tokenizer")
        inputs = inputs_of(config, processor)
        with torch.no_grad():
            reference = {
                "prediction": model(**inputs).prediction,
                "features": model.ldae(inputs["pixel_values"]).last_hidden_state,
            }
        reference |= {f"inputs.{key}": value for key, value in inputs.items()}
        held = [*model.named_parameters(), *model.named_buffers()]
        reference |= {f"model.{key}": value.detach().clone() for key, value in held}
        save_file(reference, root / name / "reference.safetensors")
    source = str(Path(sys.modules["ldae_hf"].__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": source, "TRANSFORMERS_VERBOSITY": "error"}
    process = subprocess.run(
        [sys.executable, "-c", LOADER, str(root)], capture_output=True, text=True, env=environment, cwd=root
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    return {keys: found[name] for keys, name in names.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_model_comes_back_equal_in_a_fresh_process(name, report):
    assert report[config_of(name)] == {"wrong": [], "prediction": True, "features": True}


@pytest.fixture(scope="session")
def pictures() -> datasets.Dataset:
    """Twenty pictures of ten classes."""
    plain = dataset_of([encoded(number) for number in range(20)])
    classes = datasets.ClassLabel(names=[str(number) for number in range(10)])
    labels = [number % 10 for number in range(20)]
    return plain.remove_columns("label").add_column("label", labels).cast_column("label", classes)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_goes_from_images_to_an_encoder(name, pictures, tmp_path):
    overrides = ["train.global_batch_size=8", "tokenizer.global_batch_size=8", "tokenizer.epochs=1"]
    overrides += ["tokenizer.base_width=8", "train.epochs=2", "train.warmup_epochs=1"]
    settings = dict(tier="cpu", dataset=pictures, overrides=overrides, num_workers=0, log_every=1)
    encoder = Child(lambda: pretrain(name, output_dir=tmp_path, **settings)).join()
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 3, 4]
    config = AutoConfig.from_pretrained(encoder)
    assert config.tokenizer == load_recipe(name, "cpu").model["tokenizer"]
    assert (config.tokenizer_fingerprint is not None) == (config.tokenizer in LEARNED_TOKENIZERS)
