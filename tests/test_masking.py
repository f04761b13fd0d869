"""MAE, the baseline, in the trainer of l-DAE: what it masks, what it starts from, what it leaves behind."""

import json

import pytest
import torch
from forked_runs import Child, dataset_of, encoded
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoImageProcessor, AutoModel, ViTMAEModel

from ldae_hf.configuration_ldae import SIZES
from ldae_hf.recipes import RecipeError, load_recipe
from ldae_hf.training import pretrain
from ldae_hf.training.costs import recipe_flops_per_image
from ldae_hf.training.data import load_images, train_loader
from ldae_hf.training.masking import DECODERS, MaskedAutoencoder, mae_config, mae_flops_per_image
from ldae_hf.verify import verify


CHANGES = ["model.image_size=16", "model.patch_size=4", "train.epochs=3", "train.warmup_epochs=1"]
CHANGES += ["train.global_batch_size=8", "train.ema_half_life_epochs=1"]


@pytest.fixture(scope="module")
def images():
    return dataset_of([encoded(number) for number in range(20)])


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A run of six steps."""
    folder = tmp_path_factory.mktemp("mae") / "run"
    train(folder, images)
    return folder


def train(folder, images, **options):
    settings = dict(tier="quickstart", overrides=CHANGES, num_workers=0, mixed_precision="no", checkpoint_every=3)
    return Child(lambda: pretrain("mae", output_dir=folder, dataset=images, log_every=1, **settings | options)).join()


def model_of(tier: str = "cpu", **options) -> MaskedAutoencoder:
    torch.manual_seed(0)
    model = MaskedAutoencoder._from_config(mae_config(load_recipe("mae", tier)), **options)
    model.initialize_as_mae()
    return model.eval()


@pytest.mark.parametrize("tier", [None, "desk", "desk_cpu", "cpu"])
def test_the_baseline_has_the_encoder_of_l_dae_and_the_same_data(tier):
    ours, theirs = load_recipe("l_dae", tier), load_recipe("mae", tier)
    config = mae_config(theirs)
    shape = {key: getattr(config, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    assert shape.items() <= SIZES[ours.model["size"]].items()
    assert theirs.data == ours.data
    same = {"epochs", "warmup_epochs", "global_batch_size", "base_learning_rate"}
    assert {key: theirs.train[key] for key in same} == {key: ours.train[key] for key in same}
    assert config.mask_ratio == 0.75 and config.norm_pix_loss


@pytest.mark.parametrize("tier", [None, "desk", "desk_cpu", "cpu"])
def test_at_equal_flops_the_baseline_takes_as_many_as_l_dae_within_two_percent(tier):
    ours, theirs = load_recipe("l_dae", tier), load_recipe("mae_equal_flops", tier)
    flops = [recipe_flops_per_image(recipe) * recipe.train["epochs"] for recipe in (ours, theirs)]
    assert flops[1] == pytest.approx(flops[0], rel=0.02)


def test_its_flops_are_those_that_torch_counts():
    model = model_of(attn_implementation="eager")  # the counter does not know every kernel
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32), noise=torch.rand(1, 16, 1))
    assert 3 * counter.get_total_flops() == pytest.approx(mae_flops_per_image(model.config), rel=1e-6)


def test_every_size_of_l_dae_whose_decoder_is_the_papers_has_a_decoder_here():
    assert set(DECODERS) == {size for size, keys in SIZES.items() if "decoder_hidden_size" not in keys}


def test_it_starts_as_mae_does_with_fixed_positions_that_tell_places_apart():
    model = model_of()
    for positions in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        assert not positions.requires_grad and not positions[:, 0].any()
        distances = torch.cdist(positions[0, 1:], positions[0, 1:]) + torch.eye(16)
        assert distances.min() > 0.1  # transformers leaves all of them at zero
    weight = model.vit.layers[0].mlp.fc1.weight
    bound = (6 / sum(weight.shape)) ** 0.5
    assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert model.vit.embeddings.cls_token.std() > 0.01


def test_the_patches_of_smallest_noise_are_seen_and_the_others_count():
    model, noise = model_of(), torch.arange(16.0).flip(0)[None, :, None]
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(images, noise=noise)
        assert output.mask.tolist() == [[1.0] * 12 + [0.0] * 4]
        hidden, seen = images.clone(), images.clone()
        hidden[:, :, :8, :8] += 1  # of the first patch, which is left out: normalised, its target stays
        seen[:, :, 24:, 24:] += 1
        assert model(hidden, noise=noise).logits.equal(output.logits)
        assert not model(seen, noise=noise).logits.allclose(output.logits)


def test_masks_are_a_function_of_seed_epoch_and_sample(images):
    source = load_images(images)
    options = dict(image_size=16, num_timesteps=1, tokens_shape=(16, 1), global_batch_size=8, num_steps=2)
    masks = []
    for micro in (8, 2):
        found = {}
        for batch in train_loader(source, micro_batch_size=micro, **options):
            found |= dict(zip(batch["sample_ids"].tolist(), batch["noise"], strict=True))
        masks.append(found)
    assert masks[0].keys() == masks[1].keys()
    assert all(masks[0][key].equal(masks[1][key]) for key in masks[0])
    orders = {tuple(noise[:, 0].argsort().tolist()) for noise in masks[0].values()}
    assert len(orders) == len(masks[0])


def test_a_run_that_stopped_goes_on_bit_for_bit(finished, images, tmp_path):
    assert train(tmp_path / "run", images, max_steps=3) is None
    train(tmp_path / "run", images)
    for file in ("model.safetensors", "training/optimizer.safetensors", "training/ema.safetensors"):
        expected, found = (load_file(run / "checkpoints/step-00000006" / file) for run in (finished, tmp_path / "run"))
        assert expected.keys() == found.keys()
        assert all(found[name].equal(value) for name, value in expected.items()), file


def test_it_learns_and_the_fixed_positions_stay(finished):
    weights = load_file(finished / "checkpoints/step-00000006/model.safetensors")
    fresh = mae_config(load_recipe("mae", "quickstart", CHANGES))
    torch.manual_seed(0)
    start = MaskedAutoencoder._from_config(fresh)
    start.initialize_as_mae()
    changed = {name for name, value in start.state_dict().items() if not value.equal(weights[name])}
    fixed = {name for name, parameter in start.named_parameters() if not parameter.requires_grad}
    assert fixed == {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    assert changed == start.state_dict().keys() - fixed


def test_the_encoder_is_a_model_of_transformers_that_sees_every_patch(finished):
    encoder, processor = (auto.from_pretrained(finished / "encoder") for auto in (AutoModel, AutoImageProcessor))
    assert type(encoder) is ViTMAEModel and encoder.config.mask_ratio == 0
    assert processor.size == {"height": 16, "width": 16}
    average = load_file(finished / "checkpoints/step-00000006/training/ema.safetensors")
    for name, value in encoder.named_parameters():
        assert value.equal(average[f"vit.{name}"])
    pixels = torch.rand(2, 3, 16, 16)
    assert encoder(pixels, noise=torch.arange(16.0).expand(2, 16)).last_hidden_state.shape == (2, 17, 128)
    assert json.loads((finished / "encoder/recipe.json").read_text())["name"] == "mae"
    assert json.loads((finished / "encoder/training.json").read_text())["steps"] == 6
    assert (finished / "pictures" / "step-00000006.png").is_file()


def test_verify_checks_every_bit_of_its_folders_and_says_what_it_leaves_to_transformers(finished):
    checks = verify(finished)
    assert {check.name for check in checks if check.status == "ok"} == {"hashes", "finite"}
    assert {check.name for check in checks if check.status != "ok"} == {"weights", "processor"}
    assert all(check.status == "not checked" for check in checks if check.name in ("weights", "processor"))


@pytest.mark.parametrize("option", [{"start_from": "runs/other"}, {"tokenizer": "runs/t"}, {"cache_latents": True}])
def test_what_a_masked_autoencoder_has_no_use_for_is_said_and_leaves_no_run(images, tmp_path, option):
    with pytest.raises(ValueError, match=f"trained without {next(iter(option))}"):
        train(tmp_path / "run", images, **option)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_mask_ratio_is_a_share():
    with pytest.raises(RecipeError, match="model.mask_ratio must be null"):
        load_recipe("mae", overrides=["model.mask_ratio=1.5"])
