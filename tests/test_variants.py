"""The variants of the final method: what each changes, what it leaves as it is, and what it costs."""

import numpy as np
import pytest
import torch
from forked_runs import Child, dataset_of, encoded
from torch.utils.flop_counter import FlopCounterMode

from ldae_hf import LDAEBackbone, LDAEConfig, LDAEForPreTraining, LDAEImageProcessor, LDAEModel
from ldae_hf.configuration_ldae import SIZES
from ldae_hf.evaluation.encoders.ldae import LDAEEncoder
from ldae_hf.evaluation.whole_network import whole_network
from ldae_hf.export import fold
from ldae_hf.recipes import load_recipe
from ldae_hf.repository import build_repository
from ldae_hf.training import pretrain
from ldae_hf.training.costs import forward_flops_per_image
from ldae_hf.training.sampling import Corruption
from ldae_hf.verify import FAILED, verify


def test_a_samples_timesteps_are_shared_in_blocks_and_its_noise_is_that_of_every_scope():
    of_image, of_tokens, of_blocks = (Corruption(1000, (16, 6), 3, block) for block in (None, 1, 2))
    timesteps, noise = of_blocks(2, 7)
    grid = timesteps.reshape(4, 4)
    for row, column in np.ndindex(2, 2):
        assert len(set(grid[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].ravel())) == 1
    assert len(set(timesteps)) == 4 and timesteps.dtype == np.int64
    for other in (of_image, of_tokens):
        assert np.array_equal(other(2, 7)[1], noise)
    assert np.array_equal(of_blocks(2, 7)[0], timesteps) and not np.array_equal(of_blocks(3, 7)[0], timesteps)


@pytest.mark.parametrize("name", sorted(name for name in SIZES if name.endswith("_deep_narrow")))
def test_a_deep_narrow_decoder_has_the_flops_of_a_broad_one_and_the_same_encoder(name):
    narrow, broad = (LDAEConfig(**SIZES[size]) for size in (name, name.removesuffix("_deep_narrow")))
    assert narrow.decoder_width * 2 == broad.hidden_size == narrow.hidden_size
    assert narrow.decoder_num_hidden_layers == 4 * broad.decoder_num_hidden_layers
    tokens = narrow.num_patches
    attention = 2 * 2 * tokens**2 * broad.hidden_size * broad.num_hidden_layers  # as much again
    difference = forward_flops_per_image(narrow) - forward_flops_per_image(broad) - attention
    assert abs(difference) < 0.03 * forward_flops_per_image(broad)
    with torch.device("meta"):
        shapes = [
            {name: value.shape for name, value in LDAEModel(config).state_dict().items()} for config in (narrow, broad)
        ]
    assert shapes[0] == shapes[1]


def test_the_linear_layers_of_a_deep_narrow_decoder_are_counted_to_be_as_many_flops():
    counted = []
    for name in ("l_dae", "deep_narrow_decoder"):
        config = load_recipe(name, "cpu").model_config()
        decoder = LDAEForPreTraining(config).decoder
        states, condition = (torch.zeros(2, tokens, config.hidden_size) for tokens in (config.num_patches, 1))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            decoder(states, condition)
        counted.append(counter.get_flop_counts()["Global"][torch.ops.aten.addmm])
    assert counted[1] == pytest.approx(counted[0], rel=0.01)


def test_a_decoder_of_its_own_width_is_trained_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    config = load_recipe("deep_narrow_decoder", "cpu").model_config()
    model = LDAEForPreTraining(config)
    for parameter in model.parameters():  # as they begin, every block is the identity
        torch.nn.init.normal_(parameter, std=0.05)
    pixel_values, noise = torch.randn(2, 3, 32, 32), torch.randn(2, 16, config.latent_dim)
    loss = model(pixel_values, timesteps=300, noise=noise).loss
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = LDAEForPreTraining.from_pretrained(tmp_path)
    assert loaded.config.decoder_hidden_size == 64 and len(loaded.decoder.layers) == 12
    torch.testing.assert_close(loaded(pixel_values, timesteps=300, noise=noise).loss, loss, rtol=1e-5, atol=0)


def test_a_narrow_decoders_blocks_do_not_go_on_as_an_encoder():
    model = LDAEForPreTraining(load_recipe("deep_narrow_decoder", "cpu").model_config())
    with pytest.raises(ValueError, match="The decoder is 64 wide and the encoder 128.*`ldae sweep layers`"):
        whole_network(model)


@pytest.fixture
def with_global_tokens() -> LDAEForPreTraining:
    torch.manual_seed(0)
    model = LDAEForPreTraining(load_recipe("global_tokens", "cpu").model_config()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_global_tokens_are_in_no_output_but_the_hidden_states(with_global_tokens):
    pixel_values = torch.randn(2, 3, 32, 48)  # not the size of the training images
    with torch.no_grad():
        assert with_global_tokens(pixel_values).prediction.shape == (2, 24, 192)
        outputs = with_global_tokens.ldae(pixel_values, output_hidden_states=True)
    assert outputs.last_hidden_state.shape == (2, 24, 128) and outputs.pooler_output.shape == (2, 128)
    assert {states.shape for states in outputs.hidden_states} == {(2, 28, 128)}
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state.mean(1))
    stem = outputs.hidden_states[0][:, :4]
    assert torch.equal(stem, with_global_tokens.ldae.global_tokens.weight.expand(2, -1, -1))


def test_patches_hear_of_global_tokens_through_attention_only(with_global_tokens):
    encoder, pixel_values = with_global_tokens.ldae, torch.randn(2, 3, 32, 32)

    @torch.no_grad()
    def states():
        return [found[:, 4:] for found in encoder(pixel_values, output_hidden_states=True).hidden_states]

    before = states()
    torch.nn.init.normal_(encoder.global_tokens.weight, std=5.0)
    after = states()
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])


def test_the_feature_maps_of_a_backbone_hold_patches_only(with_global_tokens, tmp_path):
    with_global_tokens.ldae.save_pretrained(tmp_path)
    pixel_values = torch.randn(2, 3, 32, 32)
    backbone = LDAEBackbone.from_pretrained(tmp_path, out_indices=[0, 3])
    with torch.no_grad():
        stem, last = backbone(pixel_values).feature_maps
        features = with_global_tokens.ldae(pixel_values).last_hidden_state
    assert stem.shape == last.shape == (2, 128, 4, 4)
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), features, rtol=0, atol=1e-6)


def test_an_evaluated_layer_leaves_global_tokens_out(with_global_tokens):
    processor = LDAEImageProcessor(image_size=32, patch_size=8, latent_dim=16)
    pixels = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    processor.fit(list(pixels), num_patches=1000)
    with_global_tokens.set_processor(processor)
    encoder = LDAEEncoder(with_global_tokens.ldae, processor)
    assert encoder.num_prefix_tokens == 4
    [tokens] = encoder.tokens(pixels, torch.arange(16), [3])
    expected = with_global_tokens.ldae(processor.normalize_pixels(pixels)).last_hidden_state
    torch.testing.assert_close(tokens[:, 4:], expected.detach(), rtol=0, atol=1e-5)


def test_what_does_not_go_with_global_tokens_is_said(with_global_tokens):
    with pytest.raises(ValueError, match="num_global_tokens=4 does not fold into a Vision Transformer"):
        fold(with_global_tokens.ldae)
    with pytest.raises(ValueError, match="takes one timestep for an image, not one for each token"):
        with_global_tokens(torch.randn(2, 3, 32, 32), timesteps=torch.zeros(2, 16, dtype=torch.int64))


def test_global_tokens_start_small_and_are_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = LDAEForPreTraining(load_recipe("global_tokens", "cpu").model_config())
    weight = model.ldae.global_tokens.weight
    assert weight.shape == (4, 128) and weight.std().item() == pytest.approx(0.02, rel=0.1)
    model.save_pretrained(tmp_path)
    assert torch.equal(LDAEForPreTraining.from_pretrained(tmp_path).ldae.global_tokens.weight, weight)


def test_a_run_with_global_tokens_is_trained_verified_and_published_without_stock_models(tmp_path):
    def run():
        settings = {"model.image_size": 16, "model.patch_size": 4, "model.latent_dim": 7, "train.epochs": 1}
        settings |= {"train.warmup_epochs": 0, "train.global_batch_size": 8}
        overrides = [f"{key}={value}" for key, value in settings.items()]
        images = dataset_of([encoded(number) for number in range(16)])
        pretrain(
            "global_tokens",
            tier="cpu",
            overrides=overrides,
            dataset=images,
            output_dir=tmp_path / "run",
            num_workers=0,
            mixed_precision="no",
        )

    Child(run).join()
    published = build_repository(tmp_path / "run", tmp_path / "repository", repo_id="someone/encoder")
    for folder in (tmp_path / "run", published):
        found = verify(folder)
        assert found and not [check for check in found if check.status == FAILED]
    files = {path.name for path in published.iterdir()}
    assert files.isdisjoint({"vit", "timm", "exports.json"}) and files >= {"layers_ldae.py", "pretraining"}
    for folder, part in ((published, LDAEModel), (published / "pretraining", LDAEForPreTraining)):
        loaded = part.from_pretrained(folder)
        assert loaded.base_model.global_tokens.weight.shape == (4, 128)
