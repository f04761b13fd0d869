"""What is painted while a run trains: the watched images, what the model is shown of them, what it restores."""

import copy
import json

import numpy as np
import pytest
import torch
from forked_runs import dataset_of, encoded
from PIL import Image
from test_every_recipe import RECIPES, build, config_of, images
from torch import nn

from ldae_hf import LDAEConfig, LDAEImageProcessor
from ldae_hf.noise_schedules import SCHEDULES, NoiseSchedule
from ldae_hf.patch_tokenizers import patchify, unpatchify
from ldae_hf.training import load_images
from ldae_hf.training.pictures import MARGIN, SMALLEST, denoising_picture, mosaic, watched_images, watched_levels


KEYS = ("tokenizer", "noise_schedule", "sigma_max", "input_space", "prediction_target", "latent_dim", "latent_scaling")
COUNT = 3


def new_config(name: str) -> LDAEConfig:
    return LDAEConfig(**json.loads(config_of(name)))


# One recipe for every kind of model: what a picture depends on.
KINDS = {tuple(getattr(new_config(name), key) for key in (*KEYS, "num_classes")): name for name in RECIPES}


def row_of(picture: Image.Image, number: int, size: int) -> np.ndarray:
    """A row of a picture, (H,W,3), without the titles."""
    height = size * max(1, SMALLEST // size) + 2
    return np.asarray(picture)[number * height : (number + 1) * height, MARGIN:].astype(int)


def painted(pixel_values: torch.Tensor, processor) -> np.ndarray:
    return row_of(mosaic([("", pixel_values)], processor), 0, pixel_values.shape[-1])


@pytest.mark.parametrize("name", KINDS.values())
def test_a_picture_has_a_row_of_originals_and_two_for_each_level_and_leaves_no_trace(name):
    model, processor, _ = build(new_config(name))
    size, pixels = processor.image_size, images(processor.image_size)[:COUNT]
    model.train()
    modes, before = [module.training for module in model.modules()], torch.get_rng_state()
    picture = denoising_picture(model, processor, pixels)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    levels, side = len(watched_levels(model.ldae.schedule)), size * max(1, SMALLEST // size) + 2
    assert picture.size == (MARGIN + COUNT * side, (1 + 2 * levels) * side)
    assert (row_of(picture, 0, size) == painted(processor.normalize_pixels(pixels), processor)).all()
    model.eval()
    assert picture.tobytes() == denoising_picture(model, processor, pixels).tobytes()
    assert picture.tobytes() != denoising_picture(model, processor, pixels, seed=1).tobytes()


class Knows(nn.Module):
    """A decoder that gives the answer which was asked for."""

    def __init__(self, answer: torch.Tensor):
        super().__init__()
        self.answer = answer

    def forward(self, hidden_states, conditioning):
        return self.answer


def answer_of(config, tokenizer, patches, tokens, noise):
    """What the network is asked for."""
    if (config.input_space, config.prediction_target) == ("pixel", "noise"):  # footnote 4: s V answer = noise
        centred = patches - tokenizer.mean
        return tokenizer.unproject(noise / tokenizer.scales) + centred - tokenizer.unproject(tokenizer.project(centred))
    return {"noise": noise, "latent": tokens, "image": patches}.get(config.prediction_target, tokenizer.decode(tokens))


@pytest.mark.parametrize("name", KINDS.values())
def test_a_perfect_model_restores_the_image_or_what_the_tokenizer_keeps_of_it_at_every_level(name):
    config = new_config(name)
    model, processor, _ = build(config)
    size, pixels = config.image_size, images(config.image_size)[:COUNT]
    pixel_values, tokenizer = processor.normalize_pixels(pixels), model.ldae.tokenizer
    patches, tokens = patchify(pixel_values, config.patch_size), tokenizer.encode(pixel_values)
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(5))
    model.decoder = Knows(answer_of(config, tokenizer, patches, tokens, noise))
    picture = denoising_picture(model, processor, pixels, seed=5)
    # The tail outside of the latent space is restored only where the target has it.
    has_tail = (config.input_space, config.prediction_target) in (("pixel", "image"), ("pixel", "noise"))
    kept = patches if has_tail else tokenizer.decode(tokens)
    expected = painted(unpatchify(kept, config.patch_size, model.ldae.grid), processor)
    for number, level in enumerate(watched_levels(model.ldae.schedule)):
        noisy = tokenizer.decode(model.ldae.schedule.add_noise(tokens, noise, torch.tensor([level])))
        shown = painted(unpatchify(noisy, config.patch_size, model.ldae.grid), processor)
        assert abs(row_of(picture, 1 + 2 * number, size) - shown).max() <= 1
        assert abs(row_of(picture, 2 + 2 * number, size) - expected).max() <= 1
    assert len(np.unique(expected)) > 50


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_levels_of_all_schedules_have_about_the_same_noise_for_the_signal_they_leave(name):
    schedule = NoiseSchedule(name, 1000)
    levels = watched_levels(schedule)
    ratios = [(schedule.sigmas[level] / schedule.gammas[level]).item() for level in levels]
    wanted = {"single_level": [3**-0.5], "linear_sigma": [0.25, 0.5, 1, 2**0.5]}.get(name, [0.25, 0.5, 1, 2])
    assert ratios == pytest.approx(wanted, rel=0.02)
    assert all(level < len(few) for few in [NoiseSchedule(name, 2)] for level in watched_levels(few))


def test_a_model_that_has_gone_to_pieces_is_still_painted():
    model, processor, _ = build(new_config("l_dae"))
    size = processor.image_size
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(torch.nan)
    picture = denoising_picture(model, processor, images(size)[:2])
    assert row_of(picture, 2, size)[1:-1, 1:60].max() == 0
    assert row_of(picture, 0, size)[1:-1, 1:60].max() > 0


def test_large_images_are_shown_smaller_and_small_ones_larger():
    processor = LDAEImageProcessor(256, 16, 32)
    stripes = torch.zeros(1, 3, 256, 256)  # grey
    stripes[..., 1::2] = 3.0  # clipped to white before it is averaged
    shown = row_of(mosaic([("", stripes)], processor), 0, 128)
    assert shown.shape == (130, 130, 3) and set(shown[1:-1, 1:-1].flatten()) == {191}
    assert mosaic([("", stripes[..., :96, :96])] * 2, processor).size == (MARGIN + 98, 2 * 98)
    assert mosaic([("", stripes[..., :16, :16])] * 2, processor).size == (MARGIN + 66, 2 * 66)


def test_a_compiled_model_is_not_compiled_again_for_a_picture():
    model, processor, _ = build(new_config("l_dae"))
    compiled = []
    model.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    denoising_picture(model, processor, images(processor.image_size)[:2])
    assert not compiled


def test_another_models_processor_is_refused():
    model, _, _ = build(new_config("l_dae"))
    _, other, _ = build(new_config("patch_pca_k_32"))
    other = copy.copy(other)  # the processor is shared by all tests
    other.latent_scaling = "whiten"
    with pytest.raises(ValueError, match="latent_scaling"):
        denoising_picture(model, other, images(other.image_size)[:2])


def test_watched_images_are_spread_over_the_data_set_and_always_the_same():
    contents = [encoded(number) for number in range(20)]
    source = load_images(dataset_of(contents))
    before = torch.get_rng_state()
    watched = watched_images(source, 16, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert watched.shape == (5, 3, 16, 16) and watched.dtype == torch.uint8
    every_fourth = load_images(dataset_of(contents[::4]))
    assert torch.equal(watched, watched_images(every_fourth, 16, 5))
    assert torch.equal(watched_images(every_fourth, 16), watched)  # eight of five are five


def test_a_watched_image_that_cannot_be_read_is_replaced_by_the_next():
    contents = [encoded(number) for number in range(4)]
    broken = [b"no image", *contents[1:]]
    expected = [watched_images(load_images(dataset_of([contents[number]])), 16)[0] for number in (1, 2)]
    assert torch.equal(watched_images(load_images(dataset_of(broken)), 16, 2), torch.stack(expected))


def test_a_stream_is_watched_by_its_first_images():
    contents = [encoded(number) for number in range(6)]
    before = torch.get_rng_state()
    watched = watched_images(load_images(dataset_of(contents), streaming=True), 16, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(watched, watched_images(load_images(dataset_of(contents[:3])), 16, 3))
