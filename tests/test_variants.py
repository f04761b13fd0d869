"""The variants of the final method: what each changes, what it leaves as it is, and what it costs."""

import numpy as np
import pytest
import torch

from ldae_hf import LDAEConfig, LDAEForPreTraining, LDAEModel
from ldae_hf.configuration_ldae import SIZES
from ldae_hf.evaluation.whole_network import whole_network
from ldae_hf.recipes import load_recipe
from ldae_hf.training.costs import forward_flops_per_image
from ldae_hf.training.sampling import Corruption


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
