"""Learned tokenizers as runs: what they converge to, exact resume, and the pre-training that stands on them."""

import json

import datasets
import pytest
import torch
from forked_runs import Child, dataset_of, encoded, in_processes, lines
from PIL import Image
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from ldae_hf import LDAEConfig, LDAEImageProcessor, LearnedTokenizer
from ldae_hf.evaluation.encoders import load_ldae
from ldae_hf.latent_tokenizers import build_autoencoder
from ldae_hf.manifest import DamagedError, check_folder
from ldae_hf.patch_covariance import PatchCovariance
from ldae_hf.patch_tokenizers import patchify
from ldae_hf.recipes import load_recipe
from ldae_hf.training import RunError, checkpoints, load_images, pretrain, train_tokenizer
from ldae_hf.training.autoencoders import ConvolutionalTraining, PatchAutoencoderTraining, kl_to_standard_normal
from ldae_hf.training.data import eval_loader
from ldae_hf.training.sampling import epoch_order


NUM_IMAGES = 20  # two batches of 8 an epoch, and four images that are left out
TINY = {
    "model.size": "quickstart",
    "model.image_size": 16,
    "model.patch_size": 4,
    "model.latent_dim": 4,
    "tokenizer.stride": 2,
    "tokenizer.base_width": 8,
    "tokenizer.epochs": 5,
    "tokenizer.global_batch_size": 8,
    "tokenizer.adversarial_start_epochs": 1.0,
    "train.epochs": 2,
    "train.warmup_epochs": 1,
    "train.global_batch_size": 8,
}
RECIPES = {
    "patch_ae": ["autoencoder"],
    "patch_vae": ["autoencoder"],
    "conv_vae": ["autoencoder"],
    "retrain_vqgan": ["autoencoder", "discriminator"],
}
NAMES = {"conv_vae": "replace_noise_schedule"}  # the recipe of each, where it has another name


def overrides(**changes) -> list[str]:
    values = TINY | changes
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def train(kind: str, output_dir, dataset, changes: dict | None = None, **options):
    """A tokenizer's run of ten steps in a fork."""
    settings = dict(tier="cpu", num_workers=0, mixed_precision="no", log_every=1, checkpoint_every=5)
    settings |= dict(output_dir=output_dir, dataset=dataset, overrides=overrides(**(changes or {}))) | options
    return Child(lambda: train_tokenizer(NAMES.get(kind, kind), **settings)).join()


def pretrain_on(kind: str, output_dir, dataset, changes: dict | None = None, prepare=lambda: None, **options):
    """A pre-training run of four steps in a fork."""
    settings = dict(tier="cpu", num_workers=0, mixed_precision="no", log_every=1)
    settings |= dict(output_dir=output_dir, dataset=dataset, overrides=overrides(**(changes or {}))) | options

    def run():
        prepare()
        return pretrain(NAMES.get(kind, kind), **settings)

    return Child(run).join()


@pytest.fixture(scope="session")
def images() -> datasets.Dataset:
    """Twenty pictures of ten classes."""
    plain = dataset_of([encoded(number) for number in range(NUM_IMAGES)])
    classes = datasets.ClassLabel(names=[str(number) for number in range(10)])
    labels = [number % 10 for number in range(NUM_IMAGES)]
    return plain.remove_columns("label").add_column("label", labels).cast_column("label", classes)


@pytest.fixture(scope="session")
def runs(images, tmp_path_factory):
    """The folders of finished tokenizer runs, each made when it is first asked for."""
    made = {}

    def of(kind: str):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            assert train(kind, made[kind], images) == made[kind] / "tokenizer"
        return made[kind]

    return of


def tensors_of(folder) -> dict[str, torch.Tensor]:
    """All that the last checkpoint and the tokenizer hold."""
    files = [*checkpoints(folder / "checkpoints")[-1].rglob("*.safetensors"), *folder.glob("tokenizer/*.safetensors")]
    return {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}


# ---- what is trained


def toy_patches() -> tuple[LDAEImageProcessor, torch.Tensor]:
    """A processor with K = 2 on patches of 2x2x3 values that lie near a plane, and their images."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    strengths = torch.tensor([60.0, 40.0] + [4.0] * 10)
    patches = 128 + torch.randn(400, 12, generator=generator) * strengths @ plane.T
    crops = patches.clamp(0, 255).round().to(torch.uint8).reshape(400, 3, 2, 2)
    processor = LDAEImageProcessor(image_size=2, patch_size=2, latent_dim=2)
    covariance = PatchCovariance(12)
    processor.accumulate(covariance, crops)
    return processor.set_basis(covariance), processor.normalize_pixels(crops)


def tiny_config(tokenizer: str, **keys) -> LDAEConfig:
    keys = dict(hidden_size=16, num_attention_heads=2, input_space="latent", prediction_target="noise") | keys
    return LDAEConfig(tokenizer=tokenizer, noise_schedule="linear_gamma_squared", **keys)


def test_a_converged_linear_autoencoder_has_the_error_and_the_subspace_of_pca():
    processor, images = toy_patches()
    config = tiny_config("patch_ae", image_size=2, patch_size=2, latent_dim=2)
    torch.manual_seed(0)
    module = PatchAutoencoderTraining(config, processor.mean, kl_weight=0.0).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-2)
    noise = torch.zeros(len(images), 1, 2)
    for step in range(3000):
        terms, _ = module(images.double(), noise)
        optimizer.zero_grad()
        terms["reconstruction"].backward()
        optimizer.param_groups[0]["lr"] = 2e-2 * (1 - step / 3000)
        optimizer.step()
    dropped = processor.explained_variance[2:].sum().item() * (len(images) - 1) / len(images)
    assert terms["reconstruction"].item() == pytest.approx(dropped, rel=1e-6)
    onto = module.decoder.weight.detach() @ module.encoder.weight.detach()  # UᵀV is the projection on the plane
    plane = processor.components[:2]
    torch.testing.assert_close(onto, plane.T @ plane, atol=2e-3, rtol=0)


def test_latent_variances_of_a_linear_autoencoder_are_those_of_its_latents():
    processor, images = toy_patches()
    config = tiny_config("patch_ae", image_size=2, patch_size=2, latent_dim=2)
    module = PatchAutoencoderTraining(config, processor.mean.float(), kl_weight=0.0)
    buffers = module.buffers_for_the_model(processor)
    latents = module.encoder(patchify(images, 2) - module.mean).flatten(0, 1)
    torch.testing.assert_close(buffers["explained_variance"], latents.detach().var(0), rtol=1e-4, atol=0)


def test_the_kl_term_is_that_of_two_normal_distributions():
    mean, log_variance = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    reference = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_to_standard_normal(mean, log_variance), reference)


def test_a_patch_vae_adds_the_posteriors_noise_and_its_kl():
    processor, images = toy_patches()
    config = tiny_config("patch_vae", image_size=2, patch_size=2, latent_dim=2)
    module = PatchAutoencoderTraining(config, processor.mean.float(), kl_weight=0.25)
    noise = torch.randn(len(images), 1, 2)
    terms, reconstruction = module(images, noise)
    patches = patchify(images, 2) - module.mean
    mean, log_variance = module.encoder(patches), module.log_variance(patches)
    drawn = module.decoder(mean + (log_variance / 2).exp() * noise)
    torch.testing.assert_close(patchify(reconstruction, 2), drawn + module.mean)
    torch.testing.assert_close(terms["reconstruction"], (patches - drawn).square().sum(-1).mean())
    torch.testing.assert_close(terms["kl"], 0.25 * kl_to_standard_normal(mean, log_variance).sum(-1).mean())


@pytest.mark.parametrize("reconstruction_loss", ["l1", "squared"])
def test_a_convolutional_autoencoder_is_trained_on_sums_over_the_image(reconstruction_loss):
    config = tiny_config("conv_vae", image_size=16, patch_size=4, latent_dim=8)
    settings = dict(stride=2, base_width=8, residual_blocks=1, kl_weight=0.5, reconstruction_loss=reconstruction_loss)

    class Distance(torch.nn.Module):
        def forward(self, first, second):
            return (first - second).abs().amax((1, 2, 3))

    module = ConvolutionalTraining(config, settings, Distance()).eval()
    images, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 16, 8)
    with torch.no_grad():
        terms, reconstruction = module(images, noise)
        posterior = module.autoencoder.encode(images).latent_dist
        # token = (row, column) of the 4x4 grid, its 8 values = 2 channels of 2x2 places
        places = noise.reshape(2, 4, 4, 2, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 2, 8, 8)
        drawn = module.autoencoder.decode(posterior.mean + posterior.std * places).sample
    torch.testing.assert_close(reconstruction, drawn)
    error = images - drawn
    error = error.abs() if reconstruction_loss == "l1" else error.square()
    torch.testing.assert_close(terms["reconstruction"], error.sum() / 2)
    torch.testing.assert_close(terms["kl"], 0.5 * posterior.kl().mean())
    torch.testing.assert_close(terms["perceptual"], Distance()(images, drawn).mean() * 3 * 16 * 16)
    assert not any("perceptual" in name for name in module.state_dict())


# ---- runs


@pytest.mark.parametrize("kind", RECIPES)
def test_a_run_leaves_a_tokenizer_whose_latents_have_unit_variance(kind, runs, images):
    folder = runs(kind)
    learned = LearnedTokenizer.from_pretrained(folder / "tokenizer")
    assert (learned.tokenizer, learned.patch_size, learned.latent_dim) == (kind.replace("retrain_", ""), 4, 4)
    assert learned.training == {
        "recipe": NAMES.get(kind, kind),
        "tier": "cpu",
        "overrides": overrides(),
        "seed": 0,
        "steps": 10,
        "images_seen": 80,
        "perceptual_loss": "labels" if kind == "retrain_vqgan" else None,
        "adversarial_weight": 0.5 if kind == "retrain_vqgan" else 0.0,
    }
    processor = LDAEImageProcessor.from_pretrained(folder / "processor")
    assert learned.processor_fingerprint == processor.fingerprint
    pixels = torch.cat([batch["pixel_values"] for batch in eval_loader(load_images(images), 16, 8)])
    latents = learned.module("global").encode(processor.normalize_pixels(pixels)).flatten(0, 1)
    assert latents.var(0).mean().item() == pytest.approx(1, rel=1e-3)
    whitened = learned.module("whiten").encode(processor.normalize_pixels(pixels)).flatten(0, 1)
    torch.testing.assert_close(whitened.var(0), torch.ones(4), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", RECIPES)
def test_a_run_learns_logs_every_term_and_paints_every_epoch(kind, runs):
    folder = runs(kind)
    steps = [line for line in lines(folder) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 11))
    assert steps[-1]["reconstruction"] < steps[0]["reconstruction"]
    terms = {"reconstruction"} | ({"kl"} if kind != "patch_ae" else set())
    terms |= {"perceptual"} if kind == "retrain_vqgan" else set()
    for line in steps:
        now = terms | ({"adversarial", "discriminator"} if kind == "retrain_vqgan" and line["step"] > 2 else set())
        assert now == line.keys() & {"reconstruction", "kl", "perceptual", "adversarial", "discriminator"}
        assert line["loss"] == pytest.approx(sum(line[term] for term in now - {"discriminator"}), rel=1e-4)
    pictures = sorted((folder / "reconstructions").iterdir())
    assert [picture.name for picture in pictures] == [f"step-{step:08d}.png" for step in (2, 4, 6, 8, 10)]
    with Image.open(pictures[-1]) as picture:
        # 16 images, originals above, each enlarged fourfold, with a border, and at the left the titles
        assert picture.size == (64 + 16 * 66, 2 * 66)
    for checked in (*checkpoints(folder / "checkpoints"), folder / "tokenizer", folder / "processor"):
        check_folder(checked)


@pytest.mark.parametrize("kind", RECIPES)
def test_ten_steps_are_five_and_a_resumed_five_bit_for_bit(kind, runs, images, tmp_path):
    assert train(kind, tmp_path, images, max_steps=5) is None
    assert not (tmp_path / "tokenizer").exists()
    assert train(kind, tmp_path, images, num_workers=1) == tmp_path / "tokenizer"
    before, after = tensors_of(runs(kind)), tensors_of(tmp_path)
    assert before.keys() == after.keys()
    assert {name.split("/")[0] for name in before} >= {f"{part}.safetensors" for part in RECIPES[kind]}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    losses = [[line.get("loss") for line in lines(folder)] for folder in (runs(kind), tmp_path)]
    assert losses[0] == losses[1]


def in_double(kind: str, output_dir, images, processes: int = 1, **options) -> list[float]:
    """The losses of a run in float64, where the order of a sum does not matter."""

    def run():
        torch.set_default_dtype(torch.float64)
        settings = dict(tier="cpu", num_workers=0, mixed_precision="no", log_every=1, dataset=images)
        settings |= dict(output_dir=output_dir, overrides=overrides()) | options
        return train_tokenizer(NAMES.get(kind, kind), **settings)

    in_processes(run, processes)
    return [line["loss"] for line in lines(output_dir) if "loss" in line]


LAYOUTS = [dict(per_device_batch_size=2), pytest.param(dict(processes=2), marks=pytest.mark.slow)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["accumulation", "two-processes"])
@pytest.mark.parametrize("kind", ["patch_vae", "conv_vae"])
def test_other_layouts_change_nothing_in_float64(kind, layout, images, tmp_path):
    whole = in_double(kind, tmp_path / "whole", images)
    assert len(whole) == 10
    assert in_double(kind, tmp_path / "other", images, **layout) == pytest.approx(whole, rel=1e-10)
    tokenizers = [LearnedTokenizer.from_pretrained(tmp_path / name / "tokenizer") for name in ("whole", "other")]
    for name, value in tokenizers[0].buffers.items():
        torch.testing.assert_close(tokenizers[1].buffers[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_two_processes_train_an_adversary_and_share_its_network_of_labels(images, tmp_path):
    def run():
        settings = dict(tier="cpu", num_workers=0, mixed_precision="no", log_every=1, dataset=images)
        return train_tokenizer("retrain_vqgan", output_dir=tmp_path, overrides=overrides(), **settings)

    assert in_processes(run, 2) == tmp_path / "tokenizer"
    assert lines(tmp_path)[-2]["discriminator"] > 0


@pytest.mark.slow
def test_two_processes_cache_latents_and_train_as_one_does(runs, images, tmp_path):
    tokenizer = runs("patch_ae")

    def run(name):
        def work():
            torch.set_default_dtype(torch.float64)
            settings = dict(tier="cpu", num_workers=0, mixed_precision="no", log_every=1, dataset=images)
            settings |= dict(overrides=overrides(), tokenizer=tokenizer, cache_latents=True)
            return pretrain("patch_ae", output_dir=tmp_path / name, **settings)

        return work

    in_processes(run("one"))
    in_processes(run("two"), 2)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-10)


def test_a_finished_run_returns_at_once_and_looks_at_no_data(runs, capfd):
    assert train("patch_ae", runs("patch_ae"), "no-such-data-set") == runs("patch_ae") / "tokenizer"
    assert "this run is finished" in capfd.readouterr().out


def test_a_damaged_checkpoint_is_named_and_not_trained_on(images, tmp_path):
    train("patch_ae", tmp_path, images, max_steps=5)
    file = tmp_path / "checkpoints" / "step-00000005" / "autoencoder.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError, match="autoencoder.safetensors is missing or damaged"):
        train("patch_ae", tmp_path, images)


def test_the_network_of_the_perceptual_loss_is_trained_once_and_says_on_what(runs, images, tmp_path):
    facts = json.loads((runs("retrain_vqgan") / "perceptual" / "training.json").read_text())
    assert facts["perceptual_loss"] == "labels" and not facts["random_labels"]
    train("perceptual_random_labels", tmp_path, images, max_steps=1)
    facts = json.loads((tmp_path / "perceptual" / "training.json").read_text())
    assert facts["perceptual_loss"] == "random_labels" and facts["random_labels"]
    before = (tmp_path / "perceptual" / "label_features.safetensors").stat().st_mtime_ns
    train("perceptual_random_labels", tmp_path, images, max_steps=2)
    assert (tmp_path / "perceptual" / "label_features.safetensors").stat().st_mtime_ns == before


def test_a_released_autoencoder_is_measured_and_not_trained(images, tmp_path):
    torch.manual_seed(0)
    released = build_autoencoder(16, 2, 8, 1, latent_channels=1)
    released.save_pretrained(tmp_path / "released")
    changes = {"tokenizer.pretrained": str(tmp_path / "released")}
    folder = train("retrain_vqgan", tmp_path / "run", images, changes)
    learned = LearnedTokenizer.from_pretrained(folder)
    assert learned.training == {"pretrained": str(tmp_path / "released")}
    assert learned.processor_fingerprint is None
    for name, value in released.state_dict().items():
        assert torch.equal(learned.autoencoder.state_dict()[name], value)
    assert not (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(ValueError, match="There is no AutoencoderKL in safetensors at"):
        train("retrain_vqgan", tmp_path / "other", images, {"tokenizer.pretrained": str(tmp_path)})


@pytest.mark.parametrize(
    ("kind", "changes", "options", "error", "message"),
    [
        ("l_dae", {}, {}, RunError, "has the tokenizer patch_pca, which is not trained"),
        ("retrain_vqgan", {"tokenizer.perceptual_loss": "lpips"}, {}, RunError, "--perceptual-weights"),
        ("patch_ae", {"tokenizer.global_batch_size": 32}, {}, ValueError, "--set tokenizer.global_batch_size"),
        ("patch_ae", {}, {"log_every": 0}, RunError, "log_every is 0"),
        ("patch_ae", {"model.latent_dim": 49}, {}, ValueError, "exceeds the 48 values"),
        ("conv_vae", {"model.latent_dim": 6}, {}, ValueError, "latent_dim"),
    ],
)
def test_a_wrong_run_is_one_clear_sentence(kind, changes, options, error, message, images, tmp_path):
    with pytest.raises(error, match=message) as caught:
        train(kind, tmp_path / "run", images, changes, **options)
    assert "\n" not in str(caught.value)


def test_another_tokenizer_in_the_same_folder_is_refused(runs, images):
    with pytest.raises(RunError, match="tokenizer.learning_rate=0.001, not 0.002"):
        train("patch_ae", runs("patch_ae"), images, {"tokenizer.learning_rate": 2e-3})


def test_labels_are_needed_only_where_a_network_learns_from_them(images, tmp_path):
    unlabelled = images.remove_columns("label")
    train("patch_ae", tmp_path / "patch", unlabelled, max_steps=1)
    with pytest.raises(RunError, match="has no labels to train the network of the perceptual loss on"):
        train("retrain_vqgan", tmp_path / "vqgan", unlabelled)


# ---- pre-training on them


@pytest.fixture(scope="session")
def pretrained(runs, images, tmp_path_factory):
    """The folders of pre-training runs on the tokenizers of `runs`."""
    made = {}

    def of(kind: str):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(f"pretrained-{kind}")
            assert pretrain_on(kind, made[kind], images, tokenizer=runs(kind)) == made[kind] / "encoder"
        return made[kind]

    return of


@pytest.mark.parametrize("kind", RECIPES)
def test_an_encoder_loads_with_its_tokenizer_and_gives_features(kind, pretrained, runs, images):
    model, processor = load_ldae(pretrained(kind) / "encoder")
    learned = LearnedTokenizer.from_pretrained(runs(kind) / "tokenizer")
    assert model.config.tokenizer_fingerprint == learned.fingerprint
    pixel_values = processor.normalize_pixels(next(iter(eval_loader(load_images(images), 16, 4)))["pixel_values"])
    torch.testing.assert_close(model.tokenizer.encode(pixel_values), learned.module().encode(pixel_values))
    with torch.no_grad():
        assert model.eval()(pixel_values).pooler_output.isfinite().all()


def test_a_recipe_trains_its_tokenizer_first_if_none_is_given(images, runs, tmp_path):
    pretrain_on("patch_ae", tmp_path, images)
    own = LearnedTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert own.fingerprint == LearnedTokenizer.from_pretrained(runs("patch_ae") / "tokenizer").fingerprint
    assert (tmp_path / "tokenizer-training" / "metrics.jsonl").exists()
    assert (tmp_path / "encoder" / "tokenizer" / "ldae_tokenizer.json").exists()


def test_a_pre_training_run_goes_on_with_its_own_tokenizer(pretrained, runs, images, tmp_path):
    assert pretrain_on("patch_ae", tmp_path, images, tokenizer=runs("patch_ae"), max_steps=2) is None
    assert pretrain_on("patch_ae", tmp_path, images) == tmp_path / "encoder"  # not given again, and not trained
    assert not (tmp_path / "tokenizer-training").exists()
    weights = [load_file(folder / "encoder/model.safetensors") for folder in (pretrained("patch_ae"), tmp_path)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def losses(folder) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


@pytest.mark.parametrize("kind", ["patch_ae", "conv_vae"])
def test_cached_latents_train_as_the_images_do(kind, pretrained, runs, images, tmp_path):
    for _ in range(2):  # the second time the cache is there, and the run is resumed
        pretrain_on(kind, tmp_path, images, tokenizer=runs(kind), cache_latents=True, max_steps=2)
        pretrain_on(kind, tmp_path, images, tokenizer=runs(kind), cache_latents=True, num_workers=1)
    assert losses(tmp_path) == pytest.approx(losses(pretrained(kind)), rel=1e-4)
    [cache] = (tmp_path / "latents").iterdir()
    check_folder(cache, ("index.json", "tokens-00000.safetensors"))


def test_bad_images_in_the_cache_are_replaced_and_listed(runs, images, tmp_path):
    rows = [row["image"] for row in images.cast_column("image", datasets.Image(decode=False))]
    broken = dataset_of([row["bytes"] if number != 3 else b"" for number, row in enumerate(rows)])
    for name, cache in (("cached", True), ("plain", False)):
        pretrain_on("patch_ae", tmp_path / name, broken, tokenizer=runs("patch_ae"), cache_latents=cache)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    [bad] = lines(tmp_path / "cached", "bad_images.jsonl")
    assert bad == {"index": 3, "reason": "The image file is empty."}


@pytest.mark.parametrize(
    ("kind", "changes", "options", "message"),
    [
        ("patch_ae", {"data.crop": "random_resized"}, {"cache_latents": True}, "data.crop must be centre"),
        ("patch_ae", {"data.flip": True}, {"cache_latents": True}, "data.flip false"),
        ("l_dae", {}, {"cache_latents": True}, "only where the target is latents"),
        ("l_dae", {}, {"tokenizer": "anywhere"}, "has the tokenizer patch_pca, which is not a learned one to give"),
        ("patch_ae", {}, {"tokenizer": "anywhere"}, "anywhere holds no finished tokenizer"),
        ("patch_ae", {}, {"streaming": True, "num_images": 20}, "A tokenizer is not trained on a stream"),
        ("dit_baseline", {"model.num_classes": 7}, {}, "The recipe has 7 classes, the data set has 10"),
    ],
)
def test_what_does_not_go_together_is_one_clear_sentence(kind, changes, options, message, images, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        pretrain_on(kind, tmp_path / "run", images, changes, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("patch_vae", {}, "has tokenizer='patch_vae', but the given tokenizer has tokenizer='patch_ae'"),
        ("patch_ae", {"model.latent_dim": 5}, "latent_dim=4"),
    ],
)
def test_a_tokenizer_for_another_model_is_refused(kind, changes, message, runs, images, tmp_path):
    with pytest.raises(ValueError, match=message):
        pretrain_on(kind, tmp_path / "run", images, changes, tokenizer=runs("patch_ae"))
    assert not (tmp_path / "run" / "tokenizer").exists()  # the folder is not spoilt for the right one


def test_a_tokenizer_is_measured_on_images_drawn_at_random(images, tmp_path):
    torch.manual_seed(0)
    build_autoencoder(16, 2, 8, 1, latent_channels=1).save_pretrained(tmp_path / "released")
    changes = {"tokenizer.pretrained": str(tmp_path / "released"), "tokenizer.fit_patches": 5 * 16}
    measured = LearnedTokenizer.from_pretrained(train("retrain_vqgan", tmp_path / "run", images, changes))
    source = load_images(images)
    processor = LDAEImageProcessor.from_pretrained(tmp_path / "run" / "processor")
    pixels = torch.stack([batch["pixel_values"][0] for batch in eval_loader(source, 16, 1)])
    chosen = epoch_order(0, 0, len(source))[:5].tolist()
    assert sorted(chosen) != [0, 1, 2, 3, 4]
    latents = measured.module("none").encode(processor.normalize_pixels(pixels[chosen])).flatten(0, 1)
    torch.testing.assert_close(measured.buffers["explained_variance"], latents.var(0), rtol=1e-4, atol=1e-7)


def test_time_that_is_over_stops_the_training_of_a_tokenizer_too(images, tmp_path):
    assert pretrain_on("patch_ae", tmp_path, images, max_minutes=1e-9) is None
    assert not (tmp_path / "tokenizer").exists() and not (tmp_path / "checkpoints").exists()
    assert len(lines(tmp_path / "tokenizer-training")) == 1
    assert pretrain_on("patch_ae", tmp_path, images) == tmp_path / "encoder"


# ---- class labels


def test_the_labelled_baseline_trains_and_drops_the_same_labels_on_every_layout(runs, images, tmp_path):
    def use_float64():
        torch.set_default_dtype(torch.float64)

    shared = dict(tokenizer=runs("retrain_vqgan"), prepare=use_float64)
    pretrain_on("dit_baseline", tmp_path / "whole", images, **shared)
    pretrain_on("dit_baseline", tmp_path / "parts", images, **shared, per_device_batch_size=2, num_workers=1)
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "parts"), rel=1e-9)
    pretrain_on("dit_baseline", tmp_path / "all", images, {"model.class_dropout_prob": 1.0}, **shared)
    pretrain_on("dit_baseline", tmp_path / "none", images, {"model.class_dropout_prob": 0.0}, **shared)
    # The head starts at zero, so labels tell from the third step on.
    assert losses(tmp_path / "all")[3] != losses(tmp_path / "none")[3]


def test_a_labelled_recipe_on_images_without_labels_is_refused(runs, images, tmp_path):
    with pytest.raises(RunError, match="conditions on class labels, but the data set has none"):
        pretrain_on("dit_baseline", tmp_path, images.remove_columns("label"), tokenizer=runs("retrain_vqgan"))


def test_at_full_size_the_autoencoder_is_that_of_latent_diffusion():
    settings = load_recipe("retrain_vqgan").tokenizer
    with torch.device("meta"):
        autoencoder = build_autoencoder(
            256, settings["stride"], settings["base_width"], settings["residual_blocks"], latent_channels=4
        )
    assert sum(parameter.numel() for parameter in autoencoder.parameters()) == 83_653_863  # the released one's
