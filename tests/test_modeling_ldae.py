"""The network, the corruption, the target, the loss and the encoder, by law, by reference and across saved folders."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ldae_hf import (
    LDAEConfig,
    LDAEForImageClassification,
    LDAEForPreTraining,
    LDAEImageProcessor,
    LDAEModel,
    LearnedTokenizer,
)
from ldae_hf.configuration_ldae import (
    LATENT_SCALINGS,
    LEARNED_PATCH_TOKENIZERS,
    LEGAL_COMBINATIONS,
    LOSS_WEIGHTINGS,
    NOISE_SCHEDULES,
)
from ldae_hf.layers_ldae import LDAETimestepEmbedding, modulate, sincos_positions
from ldae_hf.noise_schedules import noise_schedule_tables
from ldae_hf.patch_tokenizers import patchify, unpatchify


TINY = dict(
    image_size=16,
    patch_size=4,
    hidden_size=32,
    num_hidden_layers=2,
    decoder_num_hidden_layers=2,
    num_attention_heads=2,
    latent_dim=8,
)
N, K, P, D = 16, 8, 48, 32


# -- builders -----------------------------------------------------------------------------------------------------


def smooth_images(count: int, seed: int, size: int = 16) -> list[np.ndarray]:
    """Images (H,W,3) uint8 whose neighbouring pixels are alike, as in photographs."""
    noise = np.random.RandomState(seed).standard_normal((count, size, size, 3)).cumsum(1).cumsum(2)
    low, high = noise.min((1, 2), keepdims=True), noise.max((1, 2), keepdims=True)
    return list(((noise - low) / (high - low) * 255).astype(np.uint8))


def fit_processor(latent_scaling: str = "global", seed: int = 0, **sizes) -> LDAEImageProcessor:
    sizes = {"image_size": 16, "patch_size": 4, "latent_dim": K} | sizes
    processor = LDAEImageProcessor(latent_scaling=latent_scaling, **sizes)
    return processor.fit(smooth_images(20, seed, sizes["image_size"]), progress=False)


@pytest.fixture(scope="session")
def processors() -> dict[str, LDAEImageProcessor]:
    return {scaling: fit_processor(scaling) for scaling in LATENT_SCALINGS}


@pytest.fixture(scope="session")
def processor(processors) -> LDAEImageProcessor:
    return processors["global"]


def processor_for(processors, tokenizer: str = "patch_pca", latent_scaling: str = "global", **_) -> LDAEImageProcessor:
    """The processor of a model with these keys."""
    return fit_processor(latent_scaling, latent_dim=P) if tokenizer == "pixels" else processors[latent_scaling]


def untrained_tokenizer(kind: str, processor: LDAEImageProcessor) -> LearnedTokenizer:
    """A patch-wise one with weights of its own, and the variances of its latents."""
    components, decoder_components = torch.randn(2, K, P)
    along = (components.double() @ processor.components.T).square()
    buffers = {"components": components, "decoder_components": decoder_components, "mean": processor.mean.float()}
    buffers["explained_variance"] = (along @ processor.explained_variance).float()
    return LearnedTokenizer(kind, 4, K, buffers, processor_fingerprint=processor.fingerprint)


def build(cls=LDAEForPreTraining, processor=None, dtype=torch.float64, **keys):
    """A model in which every part does something: no gate or head is left at the zero that it starts from."""
    torch.manual_seed(0)
    model = cls(LDAEConfig(**TINY | keys)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    # After `to`, so that tables and basis have all the digits of float64.
    schedule = model.base_model.schedule
    tables = noise_schedule_tables(schedule.name, schedule.num_train_timesteps, schedule.sigma_max)
    schedule.gammas.copy_(tables[0])
    schedule.sigmas.copy_(tables[1])
    if processor is not None:
        model.set_processor(processor)
    if model.config.tokenizer in LEARNED_PATCH_TOKENIZERS:
        model.set_tokenizer(untrained_tokenizer(model.config.tokenizer, processor))
    return model


@pytest.fixture(scope="session")
def pretraining(processor) -> LDAEForPreTraining:
    """Shared and not to be changed: take a copy for that."""
    return build(processor=processor)


@pytest.fixture(scope="session")
def encoder(pretraining) -> LDAEModel:
    return pretraining.ldae


@pytest.fixture(scope="session")
def pixel_values(processor) -> torch.Tensor:
    return processor(smooth_images(3, seed=1), return_tensors="pt")["pixel_values"].double()


@pytest.fixture(scope="session")
def noise() -> torch.Tensor:
    return torch.randn(3, N, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


TIMESTEPS = torch.tensor([0, 400, 998])
LABELS = torch.tensor([0, 4, 2])
LABELLED = dict(num_classes=5, input_space="latent", prediction_target="noise")


def equal_to(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# -- the definitions, written out with the whole P x P basis -------------------------------------


def unfolded(pixel_values: torch.Tensor, patch_size: int = 4) -> torch.Tensor:
    """Patches (B,N,P) by torch's own unfold, which orders them as a convolution kernel sees them."""
    return F.unfold(pixel_values, patch_size, stride=patch_size).transpose(1, 2)


def literal_schedule(name: str, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """gamma_t and sigma_t (B,1,1) in float64."""
    t = timesteps.double()[:, None, None]
    if name == "linear_sigma":
        return torch.ones_like(t), math.sqrt(2) * t / 999
    if name == "interpolative":
        return 1 - t / 999, 3 * t / 999
    if name == "single_level":
        return torch.ones_like(t), torch.full_like(t, math.sqrt(1 / 3))
    if name == "snr_matched_sigma":
        return torch.ones_like(t), ((t + 1) / (999 - t)).sqrt()
    if name == "linear_gamma_squared":
        squared = 1 - (t + 1) / 1000
    else:
        squared = torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0)[timesteps][:, None, None]
    return squared.sqrt(), (1 - squared).sqrt()


def literal_basis(model, processor) -> tuple[torch.Tensor, torch.Tensor]:
    """P directions of patches (P,P), of which the first K are those of the latents, and the variance along each.

    A learned tokenizer's are not orthonormal, and no loss of it asks for more than K.
    """
    basis = processor.components
    if model.config.tokenizer == "pixels":
        basis = torch.eye(P, dtype=torch.float64)
    elif model.config.tokenizer != "patch_pca":
        first = model.ldae.tokenizer.components
        others = torch.linalg.svd(first)[2][K:]  # orthogonal to the first
        basis = torch.cat([first, others])
    return basis, (basis @ processor.components.T).square() @ processor.explained_variance


def literal_loss(model, processor, prediction, pixel_values, noise, timesteps) -> torch.Tensor:
    """lambda_t / K · Σ_i w_i r_i² over all P directions, mean over images and tokens."""
    config, K = model.config, model.config.latent_dim
    (basis, variance), mean = literal_basis(model, processor), processor.mean
    patches = unfolded(pixel_values)
    scalar = 1.0 if config.latent_scaling == "none" else variance[:K].mean() ** -0.5
    scales = variance[:K] ** -0.5 if config.latent_scaling == "whiten" else scalar * torch.ones(K, dtype=torch.float64)
    latents = (patches - mean) @ basis[:K].T * scales
    gammas, sigmas = literal_schedule(config.noise_schedule, timesteps)
    weights = torch.ones(P, dtype=torch.float64)
    match config.input_space, config.prediction_target:
        case "latent", "noise":
            residue, weights = noise - prediction, weights[:K]
        case _, "latent":
            residue, weights = latents - prediction, weights[:K]
        case "pixel", "reconstruction":
            target = mean + (latents / scales) @ basis[:K]
            residue = scalar * (target - prediction) @ basis.T
        case "pixel", "image":
            residue = scalar * (patches - prediction) @ basis.T
            weights[K:] = config.residual_weight
        case "pixel", "noise":
            inside = noise - prediction @ basis[:K].T * scales
            tail = scalar * (patches - mean - prediction) @ basis[K:].T
            residue = torch.cat([inside, tail], dim=-1)
            weights[K:] = config.residual_weight
    level_weights = gammas**2 / (gammas**2 + sigmas**2 if config.loss_weighting == "signal_share" else sigmas**2)
    if config.prediction_target == "noise":
        level_weights = torch.ones_like(gammas)
    return (level_weights / K * (weights * residue**2).sum(-1, keepdim=True)).mean()


# -- corruption, target and loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_scaling", LATENT_SCALINGS)
@pytest.mark.parametrize("pair", LEGAL_COMBINATIONS)
def test_every_loss_is_its_literal_formula_over_all_directions(pair, latent_scaling, processors, pixel_values, noise):
    processor = processors[latent_scaling]
    keys = dict(input_space=pair[0], prediction_target=pair[1], latent_scaling=latent_scaling)
    for schedule in NOISE_SCHEDULES:
        model = build(processor=processor, noise_schedule=schedule, **keys)
        timesteps = torch.zeros(3, dtype=torch.long) if schedule == "single_level" else TIMESTEPS
        with torch.no_grad():
            output = model(pixel_values, timesteps=timesteps, noise=noise)
        assert output.prediction.shape == (3, N, K if model.prediction_target.answers_in_latents else P)
        expected = literal_loss(model, processor, output.prediction, pixel_values, noise, timesteps)
        equal_to(output.loss, expected)


OTHER_TOKENIZERS = [
    (tokenizer, pair)
    for tokenizer in ("pixels", "random_projection", "patch_ae", "patch_vae")
    for pair, tokenizers in LEGAL_COMBINATIONS.items()
    if tokenizer in tokenizers
]


@pytest.mark.parametrize("latent_scaling", ["global", "whiten"])
@pytest.mark.parametrize(("tokenizer", "pair"), OTHER_TOKENIZERS)
def test_the_losses_of_the_other_tokenizers_are_the_same_formula(
    tokenizer, pair, latent_scaling, processors, pixel_values
):
    keys = dict(tokenizer=tokenizer, latent_scaling=latent_scaling)
    processor = processor_for(processors, **keys)
    keys |= dict(input_space=pair[0], prediction_target=pair[1], latent_dim=processor.latent_dim)
    noise = torch.randn(3, N, processor.latent_dim, dtype=torch.float64)
    for weighting in LOSS_WEIGHTINGS if pair[1] != "noise" else ("signal_share",):
        model = build(
            processor=processor, noise_schedule="linear_gamma_squared", loss_weighting=weighting, num_classes=5, **keys
        )
        with torch.no_grad():
            output = model(pixel_values, labels=LABELS, timesteps=TIMESTEPS, noise=noise)
        expected = literal_loss(model, processor, output.prediction, pixel_values, noise, TIMESTEPS)
        # A learned tokenizer holds the variances in float32.
        equal_to(output.loss, expected, 1e-7 if tokenizer in LEARNED_PATCH_TOKENIZERS else 1e-11)


@pytest.mark.parametrize("schedule", ["linear_gamma_squared", "ddpm_linear"])
def test_weighted_by_signal_to_noise_predicting_latents_costs_what_predicting_noise_does(
    schedule, processor, pixel_values, noise
):
    # An answer ẑ says that the noise is ε̂ = (z_t - gamma ẑ) / sigma, and gamma² / sigma² |z - ẑ|² = |ε - ε̂|².
    keys = dict(processor=processor, input_space="latent", noise_schedule=schedule)
    latent_model = build(prediction_target="latent", loss_weighting="snr", **keys)
    noise_model = build(prediction_target="noise", **keys)
    with torch.no_grad():
        output = latent_model(pixel_values, timesteps=TIMESTEPS, noise=noise)
        gammas, sigmas = literal_schedule(schedule, TIMESTEPS)
        implied = (output.noisy_tokens - gammas * output.prediction) / sigmas
        equal_to(output.loss, noise_model.loss(implied, None, None, noise, TIMESTEPS), 1e-9)


@pytest.mark.parametrize("pair", LEGAL_COMBINATIONS)
def test_cached_tokens_stand_for_images_where_the_target_is_latents(pair, processor, pixel_values, noise):
    model = build(processor=processor, input_space=pair[0], prediction_target=pair[1])
    tokens = model.ldae.tokenizer.encode(pixel_values)
    given = dict(timesteps=TIMESTEPS, noise=noise)
    with torch.no_grad():
        if not model.prediction_target.answers_in_latents:
            with pytest.raises(ValueError, match="^Cached tokens can stand for images only where the target is"):
                model(tokens=tokens, **given)
            return
        output, expected = model(tokens=tokens, **given), model(pixel_values, **given)
    for name in ("loss", "prediction", "noisy_tokens", "timesteps"):
        assert torch.equal(output[name], expected[name]), name


def test_cached_tokens_of_another_shape_and_no_input_at_all_are_refused(processor):
    model = build(processor=processor, prediction_target="latent")
    for tokens in (torch.zeros(3, 15, K), torch.zeros(3, N, K + 1), torch.zeros(3, N)):
        with pytest.raises(ValueError) as error:
            model(tokens=tokens)
        assert str(error.value) == f"tokens must be (batch, N, 8) with N a square, not {tuple(tokens.shape)}."
    with pytest.raises(ValueError, match="^forward.. needs pixel_values, or tokens in their place.$"):
        model()
    with pytest.raises(ValueError, match="^There are no pixel_values.$"):
        model.ldae(pixel_values=None)


# -- class labels -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def labelled(processor) -> LDAEForPreTraining:
    """Shared and not to be changed: take a copy for that."""
    return build(processor=processor, **LABELLED)


@torch.no_grad()
def test_a_label_changes_the_answer_and_without_one_an_image_is_of_no_class(labelled, pixel_values, noise):
    given = dict(timesteps=TIMESTEPS, noise=noise)
    plain, with_labels = labelled(pixel_values, **given), labelled(pixel_values, labels=LABELS, **given)
    assert (with_labels.prediction - plain.prediction).abs().amax((1, 2)).min() > 1e-3
    null = labelled(pixel_values, labels=torch.full((3,), 5), **given)
    equal_to(null.prediction, plain.prediction)
    equal_to(labelled(pixel_values, labels=LABELS.int(), **given).prediction, with_labels.prediction)


@torch.no_grad()
def test_dropped_labels_are_replaced_by_no_class_in_their_rows_only(labelled, pixel_values, noise):
    given = dict(timesteps=TIMESTEPS, noise=noise)
    plain, with_labels = labelled(pixel_values, **given), labelled(pixel_values, labels=LABELS, **given)
    for mode in (True, False):
        model = copy.deepcopy(labelled).train(mode)
        dropped = torch.tensor([True, False, True])
        output = model(pixel_values, labels=LABELS, dropped_labels=dropped, **given)
        for row, expected in enumerate((plain, with_labels, plain)):
            equal_to(output.prediction[row], expected.prediction[row])


@torch.no_grad()
def test_labels_are_dropped_at_random_in_training_only_and_as_often_as_configured(labelled, pixel_values, noise):
    given = dict(timesteps=TIMESTEPS, noise=noise)
    model = copy.deepcopy(labelled)
    embedding, many = model.ldae.label_embedding, torch.arange(20_000) % 5
    assert torch.equal(embedding.drop(many, None), many)
    torch.manual_seed(13)
    dropped = embedding.train().drop(many, None)
    assert (dropped == 5).double().mean().item() == pytest.approx(0.1, abs=0.01)  # five standard deviations
    assert torch.equal(dropped[dropped != 5], many[dropped != 5])
    for share, labels in ((0, LABELS), (1, None)):
        embedding.dropout_prob = share
        expected = labelled(pixel_values, labels=labels, **given).prediction
        equal_to(model.train()(pixel_values, labels=LABELS, **given).prediction, expected)


@torch.no_grad()
def test_the_encoder_of_a_labelled_model_takes_features_as_no_class(labelled, pixel_values):
    encoder = labelled.ldae
    conditioning = encoder.timestep_embedding(torch.tensor([10])) + encoder.label_embedding.table.weight[5]
    states = encoder.encode(encoder.tokenizer.encode(pixel_values), conditioning, (4, 4))
    equal_to(encoder(pixel_values).last_hidden_state, F.layer_norm(states, (D,), eps=1e-6))


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (torch.tensor([0, 6, 1]), "Labels must lie in 0 ... 4 (num_classes=5), but 6 was given."),
        (torch.tensor([0, -1, 1]), "Labels must lie in 0 ... 4 (num_classes=5), but -1 was given."),
        (torch.tensor([0.0, 1, 2]), "labels must be 3 integers, one for each image, not torch.float32 of shape (3,)."),
        (torch.tensor([0, 1]), "labels must be 3 integers, one for each image, not torch.int64 of shape (2,)."),
        (torch.tensor(1), "labels must be 3 integers, one for each image, not torch.int64 of shape ()."),
        (
            torch.tensor([[0], [1], [2]]),
            "labels must be 3 integers, one for each image, not torch.int64 of shape (3,",
        ),
        (
            torch.ones(3, dtype=torch.uint8),
            "labels must be 3 integers, one for each image, not torch.uint8 of shape (",
        ),
    ],
)
def test_labels_that_do_not_fit_are_one_clear_sentence(labels, sentence, labelled, pixel_values):
    for mode in (True, False):
        with pytest.raises(ValueError) as error:
            copy.deepcopy(labelled).train(mode)(pixel_values, labels=labels, timesteps=0)
        assert str(error.value).startswith(sentence)


def test_a_model_without_classes_refuses_labels(pretraining, pixel_values):
    with pytest.raises(ValueError, match="^This model has no class labels .num_classes=None.; leave `labels` out.$"):
        pretraining(pixel_values, labels=LABELS)


@pytest.mark.parametrize("latent_scaling", LATENT_SCALINGS)
def test_the_network_is_shown_the_noisy_latents_or_the_image_that_they_decode_to(
    latent_scaling, processors, pixel_values, noise
):
    processor = processors[latent_scaling]
    gammas, sigmas = literal_schedule("linear_gamma_squared", TIMESTEPS)
    basis, scales = processor.components[:K], processor.scale
    latents = (unfolded(pixel_values) - processor.mean) @ basis.T * scales
    noisy = gammas * latents + sigmas * noise
    image = processor.mean + (noisy / scales) @ basis  # the mean is never scaled by gamma
    for space, target, shown in (("latent", "latent", noisy), ("pixel", "image", image)):
        keys = dict(input_space=space, prediction_target=target, latent_scaling=latent_scaling)
        model = build(processor=processor, noise_schedule="linear_gamma_squared", **keys)
        output = model(pixel_values, timesteps=TIMESTEPS, noise=noise)
        equal_to(output.noisy_tokens, noisy)
        equal_to(model.ldae.network_input(model.ldae.tokenizer, output.noisy_tokens), shown)
        equal_to(output.timesteps, TIMESTEPS)


def test_a_centred_answer_of_zero_costs_what_the_law_says():
    # One image is the whole data set and every timestep is taken once, so that both expectations are plain means.
    image = smooth_images(1, seed=3)
    processor = LDAEImageProcessor(image_size=16, patch_size=2, latent_dim=4).fit(image, progress=False)
    model = LDAEForPreTraining(LDAEConfig(**TINY | dict(patch_size=2, latent_dim=4, hidden_size=8))).double()
    model.set_processor(processor)
    with torch.no_grad():
        model.decoder.head.bias.copy_(processor.mean)  # the head's weight starts at zero
        pixels = processor(image, return_tensors="pt")["pixel_values"].double().expand(1000, -1, -1, -1)
        loss = model(pixels, timesteps=torch.arange(1000)).loss.item()
    kept, tail = processor.explained_variance[:4].sum().item(), processor.explained_variance[4:].sum().item()
    law = math.atan(math.sqrt(2)) / math.sqrt(2) * (1 + 0.1 * tail / kept)
    law *= 63 / 64  # 64 patches, whose variance is taken over 63
    assert loss == pytest.approx(law, rel=3e-5)  # the law integrates over t, the table has 1000 levels


def test_rotating_latents_and_noise_together_leaves_the_noisy_image_and_the_loss_unchanged(
    pretraining, pixel_values, noise
):
    rotated = copy.deepcopy(pretraining)
    rotation = torch.linalg.qr(torch.randn(K, K, dtype=torch.float64, generator=torch.Generator().manual_seed(4)))[0]
    rotated.ldae.tokenizer.components.copy_(rotation @ pretraining.ldae.tokenizer.components)
    with torch.no_grad():
        plain = pretraining(pixel_values, timesteps=TIMESTEPS, noise=noise)
        turned = rotated(pixel_values, timesteps=TIMESTEPS, noise=noise @ rotation.T)
        unturned = rotated(pixel_values, timesteps=TIMESTEPS, noise=noise)
    equal_to(turned.noisy_tokens, plain.noisy_tokens @ rotation.T)
    equal_to(rotated.ldae.tokenizer.decode(turned.noisy_tokens), pretraining.ldae.tokenizer.decode(plain.noisy_tokens))
    equal_to(turned.prediction, plain.prediction, 1e-10)
    equal_to(turned.loss, plain.loss, 1e-10)
    assert not torch.allclose(unturned.prediction, plain.prediction, atol=1e-3)


def test_the_latent_loss_is_the_subspace_part_of_the_image_loss(processor, pixel_values, noise):
    image_model = build(processor=processor, residual_weight=0)
    latent_model = build(processor=processor, prediction_target="latent")
    tokenizer = image_model.ldae.tokenizer
    with torch.no_grad():
        output = image_model(pixel_values, timesteps=TIMESTEPS, noise=noise)
        tokens = tokenizer.encode(pixel_values)
        answer = tokenizer.encode_patches(output.prediction)
        equal_to(output.loss, latent_model.loss(answer, pixel_values, tokens, noise, TIMESTEPS))


def test_with_all_weights_one_equation_4_is_the_plain_pixel_error(processor, pixel_values, noise):
    model = build(processor=processor, residual_weight=1)
    with torch.no_grad():
        output = model(pixel_values, timesteps=TIMESTEPS, noise=noise)
    _, sigmas = literal_schedule("linear_sigma", TIMESTEPS)
    error = (unfolded(pixel_values) - output.prediction).square().sum(-1, keepdim=True)
    squared_scale = 1 / processor.explained_variance[:K].mean()
    equal_to(output.loss, (squared_scale / K * error / (1 + sigmas**2)).mean())


def test_timesteps_and_noise_are_drawn_only_where_they_are_not_given(pretraining, pixel_values, noise):
    def run(**given):
        torch.manual_seed(5)
        with torch.no_grad():
            return pretraining(pixel_values, **given)

    drawn = run()
    assert drawn.timesteps.shape == (3,) and drawn.timesteps.unique().numel() > 1
    again = run(timesteps=drawn.timesteps)
    assert torch.equal(again.timesteps, drawn.timesteps)
    fixed = run(timesteps=TIMESTEPS, noise=noise)
    torch.manual_seed(6)
    assert torch.equal(pretraining(pixel_values, timesteps=TIMESTEPS, noise=noise).loss, fixed.loss)
    assert torch.equal(run(timesteps=400, noise=noise).timesteps, torch.full((3,), 400))


@pytest.mark.parametrize("pair", LEGAL_COMBINATIONS)
def test_denoise_returns_the_noisy_image_and_the_clean_one_that_the_answer_stands_for(
    pair, processor, pixel_values, noise
):
    model = build(processor=processor, input_space=pair[0], prediction_target=pair[1])
    tokenizer = model.ldae.tokenizer
    with torch.no_grad():
        output = model(pixel_values, timesteps=TIMESTEPS, noise=noise)
        noisy, clean = model.denoise(pixel_values, TIMESTEPS, noise)
    equal_to(unfolded(noisy), tokenizer.decode(output.noisy_tokens))
    sigmas, answer = model.ldae.schedule.sigmas[TIMESTEPS][:, None, None], output.prediction
    if pair[1] == "noise":
        latents = answer if pair[0] == "latent" else answer @ processor.components[:K].T * processor.scale
        # The answer to the true noise would give back the true latents: z = (z_t - sigma eps) / gamma.
        expected = output.noisy_tokens - sigmas * latents
        equal_to(tokenizer.encode(clean), expected, 1e-10)
    elif pair[1] == "latent":
        equal_to(unfolded(clean), tokenizer.decode(answer))
    else:
        equal_to(unfolded(clean), answer)


# -- the encoder --------------------------------------------------------------------------------------------------


def test_the_encoder_gives_the_same_features_every_time_in_training_mode_too(encoder, pixel_values):
    model = copy.deepcopy(encoder)
    with torch.no_grad():
        first = model.eval()(pixel_values)
        for mode in (True, False):
            torch.manual_seed(7)
            assert torch.equal(model.train(mode)(pixel_values).last_hidden_state, first.last_hidden_state)
    assert first.last_hidden_state.shape == (3, N, D)
    equal_to(first.pooler_output, first.last_hidden_state.mean(dim=1))


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_features_do_not_change_when_the_image_changes_off_the_pca_subspace(space, processor, pixel_values):
    # Training shows the encoder the subspace only: what the other input weights make of an image is chance.
    target = {"pixel": "image", "latent": "latent"}[space]
    model = build(LDAEModel, processor, input_space=space, prediction_target=target)
    coefficients = torch.randn(3, N, P, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    off, on = (
        unpatchify(coefficients[..., rows] @ processor.components[rows], 4, (4, 4))
        for rows in (slice(K, None), slice(K))
    )
    with torch.no_grad():
        plain, moved_off, moved_on = (model(x).last_hidden_state for x in (pixel_values, pixel_values + off, off + on))
    equal_to(moved_off, plain, 1e-11)
    assert (moved_on - plain).abs().max() > 0.1


def test_noisy_input_is_what_a_clean_pass_over_the_noisy_image_gives(encoder, processor, pixel_values, noise):
    _, sigmas = literal_schedule("linear_sigma", TIMESTEPS)
    basis = processor.components[:K]
    latents = (unfolded(pixel_values) - processor.mean) @ basis.T * processor.scale
    noisy = unpatchify(processor.mean + (latents + sigmas * noise) / processor.scale @ basis, 4, (4, 4))
    with torch.no_grad():
        on_request = encoder(pixel_values, timesteps=TIMESTEPS, noise=noise).last_hidden_state
        by_hand = encoder(noisy, timesteps=TIMESTEPS).last_hidden_state
        clean = encoder(pixel_values, timesteps=TIMESTEPS).last_hidden_state
    equal_to(on_request, by_hand, 1e-11)
    equal_to(on_request[0], clean[0], 1e-11)  # sigma is 0 at t = 0
    assert (on_request[2] - clean[2]).abs().max() > 0.1


def test_the_encoder_is_the_first_half_of_pre_training(pretraining, pixel_values, noise):
    grid = (4, 4)
    with torch.no_grad():
        output = pretraining(pixel_values, timesteps=TIMESTEPS, noise=noise)
        states = pretraining.ldae(pixel_values, timesteps=TIMESTEPS, noise=noise, output_hidden_states=[-1])
        conditioning = pretraining.ldae.timestep_embedding(TIMESTEPS)
        equal_to(pretraining.decoder(states.hidden_states[-1], conditioning), output.prediction)
        shown = pretraining.ldae.tokenizer.decode(output.noisy_tokens)
        equal_to(pretraining.ldae.encode(shown, conditioning, grid), states.hidden_states[-1])


def test_features_are_taken_at_the_configured_timestep_unless_another_is_given(encoder, pixel_values):
    def features(**given):
        with torch.no_grad():
            return encoder(pixel_values, **given).last_hidden_state

    default = features()
    for same in (10, torch.tensor(10), torch.tensor([10]), np.int64(10)):
        assert torch.equal(features(timesteps=same), default)
    equal_to(features(timesteps=torch.tensor([10, 10, 10])), default)
    assert (features(timesteps=80) - default).abs().max() > 1e-3
    mixed = features(timesteps=torch.tensor([10, 80, 400]))
    for row, t in enumerate((10, 80, 400)):
        equal_to(mixed[row], features(timesteps=t)[row])

    moved = copy.deepcopy(encoder)
    moved.config.feature_timestep = 80
    with torch.no_grad():
        assert torch.equal(moved(pixel_values).last_hidden_state, features(timesteps=80))


def test_a_condition_that_the_batch_shares_modulates_as_one_for_each_image():
    torch.manual_seed(9)
    hidden, shift, scale = torch.randn(3, N, D).double(), torch.randn(1, 1, D).double(), torch.randn(1, 1, D).double()
    shared = modulate(hidden, shift, scale, 1e-6)
    for shape in ((3, 1, D), (3, N, D)):
        equal_to(shared, modulate(hidden, shift.expand(shape), scale.expand(shape), 1e-6))
    mean, variance = hidden.mean(-1, keepdim=True), hidden.var(-1, keepdim=True, correction=0)
    equal_to(shared, (hidden - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift)


def test_the_tokens_of_a_single_image_may_have_conditions_of_their_own():
    torch.manual_seed(9)
    hidden, shift, scale = torch.randn(3, 1, N, D).double().unbind()
    for token in range(N):
        expected = modulate(hidden[:, [token]], shift[:, [token]], scale[:, [token]], 1e-6)
        equal_to(modulate(hidden, shift, scale, 1e-6)[:, [token]], expected)


# -- a noise level for each token -------------------------------------------------------------------------------------

OF_TOKENS = torch.randint(1000, (3, N), generator=torch.Generator().manual_seed(14))


@torch.no_grad()
def test_tokens_that_share_a_timestep_are_restored_as_an_image_with_that_timestep(pretraining, pixel_values, noise):
    expected = pretraining(pixel_values, timesteps=TIMESTEPS, noise=noise)
    found = pretraining(pixel_values, timesteps=TIMESTEPS[:, None].expand(3, N), noise=noise)
    assert found.timesteps.shape == (3, N)
    for name in ("noisy_tokens", "prediction", "loss"):
        equal_to(found[name], expected[name])
    features = pretraining.ldae(pixel_values, timesteps=TIMESTEPS[:, None].expand(3, N), noise=noise)
    equal_to(features[0], pretraining.ldae(pixel_values, timesteps=TIMESTEPS, noise=noise)[0])


@pytest.mark.parametrize("keys", [{}, LABELLED, {"noise_schedule": "linear_gamma_squared"}])
@torch.no_grad()
def test_each_token_has_the_noise_and_the_weight_of_its_own_timestep(keys, processor, pixel_values, noise):
    model = build(processor=processor, **keys)
    output = model(pixel_values, timesteps=OF_TOKENS, noise=noise)
    tokens = model.ldae.tokenizer.encode(pixel_values)
    gammas, sigmas = noise_schedule_tables(model.config.noise_schedule)
    gammas, sigmas = gammas[OF_TOKENS], sigmas[OF_TOKENS]
    equal_to(output.noisy_tokens, gammas[..., None] * tokens + sigmas[..., None] * noise)
    target = model.prediction_target
    patches = patchify(pixel_values, 4)
    errors = target.squared_error(model.ldae.tokenizer, output.prediction, patches, tokens, noise)
    weights = torch.ones_like(gammas) if target.predicts_noise else gammas**2 / (gammas**2 + sigmas**2)
    equal_to(output.loss, (weights * errors).sum() / (3 * N * K))


@torch.no_grad()
def test_the_timestep_of_a_token_reaches_it_in_every_block(pretraining, pixel_values, noise):
    encoder, clean = pretraining.ldae, torch.zeros(3, N, dtype=torch.int64)
    moved = clean.clone()
    moved[1, 5] = 500

    def states(timesteps):
        return encoder(pixel_values, timesteps=timesteps, output_hidden_states=True).hidden_states

    differences = [(one - other).abs().amax(-1) for one, other in zip(states(clean), states(moved), strict=True)]
    assert not differences[0].any()  # positions and patches know no timestep
    assert differences[1][1].argmax() == 5 and not differences[-1][[0, 2]].any()  # no other image hears of it


def test_the_scope_says_for_what_timesteps_are_drawn(processor, pixel_values):
    for scope, shape in (("image", (3,)), ("block", (3, N)), ("token", (3, N))):
        model = build(processor=processor, timestep_scope=scope)
        assert model(pixel_values).timesteps.shape == shape == (3, *model.config.timesteps_shape)
        assert model(pixel_values, timesteps=7).timesteps.tolist() == [7, 7, 7]
    larger = torch.cat([pixel_values, pixel_values], dim=2)
    assert model(larger).timesteps.shape == (3, 2 * N)


def test_blocks_are_of_neighbouring_patches_in_images_of_any_shape(processor, pixel_values):
    model = build(processor=processor, timestep_scope="block")
    wide = torch.cat([pixel_values[..., :8, :], pixel_values[..., 8:, :]], dim=3)  # as many patches, 2x8
    timesteps = model(wide).timesteps.reshape(3, 2, 4, 2).transpose(1, 2).flatten(2)  # (B, blocks, their tokens)
    assert (timesteps == timesteps[..., :1]).all() and len(timesteps.unique()) > 3
    with pytest.raises(ValueError, match="1x16 patches do not fall into 2x2 blocks; give the timesteps"):
        model(torch.cat(wide.split(4, dim=2), dim=3))


def test_what_the_scope_does_not_concern_is_as_before(pretraining, processor, pixel_values, noise, tmp_path):
    model = build(processor=processor, timestep_scope="token")
    model.save_pretrained(tmp_path)
    loaded = LDAEForPreTraining.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.timestep_scope == "token" and loaded(pixel_values).timesteps.shape == (3, N)
    with torch.no_grad():
        equal_to(model.ldae(pixel_values)[0], pretraining.ldae(pixel_values)[0])
        for one, other in zip(
            model.denoise(pixel_values, 400, noise), pretraining.denoise(pixel_values, 400, noise), strict=True
        ):
            equal_to(one, other)


WRONG_INPUTS = [
    (dict(timesteps=1000), "Timesteps must lie in 0 ... 999 for noise schedule 'linear_sigma', but 1000"),
    (dict(timesteps=-1), "Timesteps must lie in 0 ... 999 for noise schedule 'linear_sigma', but -1"),
    (dict(timesteps=torch.tensor([0, 1000, 5])), "Timesteps must lie in 0 ... 999"),
    (
        dict(timesteps=torch.tensor([1, 2])),
        "There are 2 timesteps for 3 images; give one, or one each, or",
    ),
    (
        dict(timesteps=torch.zeros(3, 5).long()),
        "There are 15 timesteps for 3 images; give one, or one each, or one for",
    ),
    (dict(timesteps=10.0), "Timesteps must be integers in 0 ... 999, not torch.float32."),
    (dict(timesteps=torch.tensor([0.1, 0.2, 0.3])), "Timesteps must be integers in 0 ... 999, not torch.float32."),
    (dict(timesteps=1, noise=torch.zeros(1, 1, 1)), r"noise must be (3, 16, 8) as the tokens, not (1, 1, 1)."),
    (dict(pixel_values=torch.zeros(3, 1, 16, 16)), r"pixel_values must be (batch, 3, height, width), not (3, 1, 16"),
    (dict(pixel_values=torch.zeros(3, 16, 16)), r"pixel_values must be (batch, 3, height, width), not (3, 16, 16)."),
    (dict(pixel_values=torch.zeros(3, 3, 18, 16)), "An image of 18x16 pixels is not made of whole 4x4 patches."),
    (
        dict(pixel_values=torch.zeros(3, 3, 16, 16, dtype=torch.uint8)),
        "pixel_values must be normalised by the processor, not torch.uint8.",
    ),
]


@pytest.mark.parametrize(("wrong", "sentence"), WRONG_INPUTS)
@pytest.mark.parametrize("name", ["encoder", "pretraining"])
def test_an_input_that_does_not_fit_is_one_clear_sentence(name, wrong, sentence, pixel_values, request):
    with pytest.raises(ValueError) as error:
        request.getfixturevalue(name)(**{"pixel_values": pixel_values} | wrong)
    assert str(error.value).startswith(sentence)


def test_hidden_states_are_the_raw_residual_stream_of_which_the_features_are_the_normalised_end(encoder, pixel_values):
    with torch.no_grad():
        output = encoder(pixel_values, output_hidden_states=True)
        only_first = encoder(pixel_values, output_hidden_states=[1]).hidden_states
        assert encoder(pixel_values).hidden_states is None
    states = output.hidden_states
    assert [tuple(state.shape) for state in states] == [(3, N, D)] * 3
    equal_to(F.layer_norm(states[-1], (D,), eps=1e-6), output.last_hidden_state)
    patches = encoder.tokenizer.decode(encoder.tokenizer.encode(pixel_values))
    equal_to(states[0], encoder.patch_embedding(patches) + encoder.position_embeddings)
    assert only_first[0] is None and only_first[2] is None and torch.equal(only_first[1], states[1])


def test_outputs_come_as_a_tuple_on_request(encoder, pretraining, pixel_values):
    with torch.no_grad():
        features, pooled = encoder(pixel_values, return_dict=False)
        output = pretraining(pixel_values, timesteps=1, return_dict=False)
    assert features.shape == (3, N, D) and pooled.shape == (3, D)
    assert isinstance(output, tuple) and output[0].shape == ()


def test_eager_attention_equals_sdpa_and_shows_its_weights(encoder, pretraining, pixel_values, noise):
    eager = copy.deepcopy(pretraining)
    eager.set_attn_implementation("eager")
    assert pretraining.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = pretraining(pixel_values, timesteps=TIMESTEPS, noise=noise)
        equal_to(eager(pixel_values, timesteps=TIMESTEPS, noise=noise).prediction, expected.prediction, 1e-11)
        output = eager.ldae(pixel_values, output_attentions=True)
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 2, N, N)] * 2
    equal_to(output.attentions[0].sum(-1), torch.ones(3, 2, N, dtype=torch.float64))
    equal_to(output.last_hidden_state, encoder(pixel_values).last_hidden_state, 1e-11)


def test_other_image_sizes_take_bicubically_resized_positions(encoder, processor):
    pixels = processor(smooth_images(2, 10, size=32), image_size=32, return_tensors="pt")["pixel_values"].double()
    with torch.no_grad():
        assert encoder(pixels).last_hidden_state.shape == (2, 64, D)
        oblong = pixels[..., :24]
        output = encoder(oblong, output_hidden_states=[0])
    assert output.last_hidden_state.shape == (2, 8 * 6, D)
    table = encoder.position_embeddings.reshape(1, 4, 4, D).permute(0, 3, 1, 2)
    resized = F.interpolate(table, size=(8, 6), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    equal_to(encoder.positions((8, 6)), resized)
    patches = encoder.tokenizer.decode(encoder.tokenizer.encode(oblong))
    equal_to(output.hidden_states[0], encoder.patch_embedding(patches) + resized)


def test_pre_training_takes_oblong_images_too(pretraining, processor):
    pixels = processor(smooth_images(2, 10, size=32), image_size=32, return_tensors="pt")["pixel_values"].double()
    oblong = pixels[..., :24, :]
    noisy, clean = pretraining.denoise(oblong, 500)
    assert noisy.shape == clean.shape == oblong.shape
    # At t = 0 there is no noise: what is left is the image on the subspace, each patch in its place.
    on_subspace = pretraining.ldae.tokenizer.decode(pretraining.ldae.tokenizer.encode(oblong))
    equal_to(unfolded(pretraining.denoise(oblong, 0)[0]), on_subspace)


def test_unpatchify_puts_patches_back_where_patchify_took_them():
    pixels = torch.randn(2, 3, 12, 20)
    patches = patchify(pixels, 4)
    assert torch.equal(patches, unfolded(pixels))
    assert torch.equal(unpatchify(patches, 4, (3, 5)), pixels)


# -- the classifier -----------------------------------------------------------------------------------------------


def test_the_classifier_is_a_linear_layer_on_normalised_mean_features(processor, pixel_values):
    model = build(LDAEForImageClassification, processor, num_labels=5)
    labels = torch.tensor([0, 4, 2])
    pooled = model.ldae(pixel_values).pooler_output
    normalised = (pooled - pooled.mean(0)) / (pooled.var(0, correction=0) + model.batch_norm.eps).sqrt()
    output = model.train()(pixel_values, labels=labels)
    equal_to(output.logits, model.classifier(normalised), 1e-10)
    equal_to(output.loss, F.cross_entropy(output.logits, labels))
    assert not list(model.batch_norm.parameters())
    with torch.no_grad():
        twice = [model.eval()(pixel_values, timesteps=80, output_hidden_states=True) for _ in range(2)]
    assert torch.equal(twice[0].logits, twice[1].logits)
    assert len(twice[0].hidden_states) == 3
    assert (twice[0].logits - model(pixel_values).logits).abs().max() > 1e-3  # the timestep reaches the encoder


def test_the_classifiers_loss_divides_by_the_batch_that_a_trainer_accumulates(processor, pixel_values):
    model = build(LDAEForImageClassification, processor, num_labels=5)
    labels = torch.tensor([0, 4, 2])
    with torch.no_grad():
        mean = model(pixel_values, labels=labels).loss
        equal_to(model(pixel_values, labels=labels, num_items_in_batch=12).loss, mean * 3 / 12)


# -- training -----------------------------------------------------------------------------------------------------


def gradients(model, pixel_values, noise) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(pixel_values, timesteps=TIMESTEPS, noise=noise).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_activation_checkpointing_gives_equal_gradients(pretraining, pixel_values, noise):
    model = copy.deepcopy(pretraining).train()
    plain = gradients(model, pixel_values, noise)
    model.activation_checkpointing_enable()
    layers = [*model.ldae.layers, *model.decoder.layers]
    assert all(layer.gradient_checkpointing for layer in layers)
    calls = []
    hooks = [layer.mlp.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    checkpointed = gradients(model, pixel_values, noise)
    for hook in hooks:
        hook.remove()
    assert len(calls) == 2 * len(layers)  # computed once more in the backward pass
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


@pytest.mark.parametrize("pair", LEGAL_COMBINATIONS)
@pytest.mark.parametrize("conditioning_hidden_size", ["quarter", None])
def test_a_gradient_reaches_every_parameter_after_two_steps(
    pair, conditioning_hidden_size, processor, pixel_values, noise
):
    torch.manual_seed(11)
    keys = dict(input_space=pair[0], prediction_target=pair[1], conditioning_hidden_size=conditioning_hidden_size)
    model = LDAEForPreTraining(LDAEConfig(**TINY | keys)).double()
    model.set_processor(processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    # Gates, modulations and head start at zero: the first step wakes the head, the second the gates.
    for _ in range(3):
        loss = model(pixel_values, timesteps=TIMESTEPS, noise=noise).loss
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        asleep = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        optimizer.step()
    assert not asleep
    assert losses[2] < losses[0]


def test_a_new_model_answers_zero_and_every_block_starts_as_the_identity(processor, pixel_values):
    model = LDAEForPreTraining(LDAEConfig(**TINY)).double()
    with torch.no_grad():
        assert not model(pixel_values).prediction.any()
        states = model.ldae(pixel_values, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], states[-1])
    bound = math.sqrt(6 / (D + 3 * D))  # Xavier
    weight = model.ldae.layers[0].attention.qkv.weight
    assert 0.98 * bound < weight.abs().max() <= bound
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias") and "timestep" not in name)
    assert 0.018 < model.ldae.timestep_embedding.fc2.weight.std() < 0.022


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_models_compile_to_one_graph(checkpointing, processor, pixel_values, noise):
    model = build(processor=processor).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    pixel_values, given = pixel_values[:2], dict(timesteps=TIMESTEPS[:2], noise=noise[:2])
    model.ldae(pixel_values, output_hidden_states=True)  # leaves hooks in the encoder, which must not break the graph
    torch.compiler.reset()
    encoder = torch.compile(model.ldae, fullgraph=True, backend="eager")
    whole = torch.compile(model, fullgraph=True, backend="eager")
    equal_to(encoder(pixel_values).last_hidden_state, model.ldae(pixel_values).last_hidden_state)
    equal_to(encoder(pixel_values, **given).pooler_output, model.ldae(pixel_values, **given).pooler_output)
    output = whole(pixel_values, **given)
    equal_to(output.loss, model(pixel_values, **given).loss)
    output.loss.backward()
    assert whole(pixel_values).loss.isfinite()  # timesteps and noise drawn inside the graph
    torch.compiler.reset()


# -- precision ----------------------------------------------------------------------------------------------------

FP32_BUFFERS = ["components", "mean", "explained_variance", "gammas", "sigmas"]


def test_bfloat16_autocast_stays_finite_and_close_with_everything_outside_products_in_float32(processor, pixel_values):
    model = build(processor=processor, dtype=torch.float32).train()
    pixels = pixel_values.float()
    given = dict(timesteps=TIMESTEPS, noise=torch.randn(3, N, K))
    full = model(pixels, **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(pixels, **given)
        features = model.ldae(pixels).last_hidden_state
        tokens = model.ldae.tokenizer.encode(pixels)
        assert torch.equal(model.ldae.tokenizer.decode(tokens), model.ldae.tokenizer.decode(tokens.clone()))
    assert half.loss.dtype == half.prediction.dtype == half.noisy_tokens.dtype == features.dtype == torch.float32
    assert torch.equal(half.noisy_tokens, full.noisy_tokens)  # not rounded to bfloat16 on the way
    assert torch.equal(tokens, model.ldae.tokenizer.encode(pixels))
    assert half.loss.item() == pytest.approx(full.loss.item(), rel=0.02)
    assert not torch.equal(half.prediction, full.prediction)
    half.loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("cls", [LDAEModel, LDAEForPreTraining, LDAEForImageClassification])
def test_a_model_loaded_in_bfloat16_keeps_its_basis_and_tables_in_float32(cls, processor, pixel_values, tmp_path):
    model = build(cls, processor, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    buffers = {name.rpartition(".")[2]: buffer for name, buffer in loaded.named_buffers()}
    original = {name.rpartition(".")[2]: buffer for name, buffer in model.named_buffers()}
    for name in FP32_BUFFERS:
        assert buffers[name].dtype == torch.float32
        assert torch.equal(buffers[name], original[name])
    torch.manual_seed(12)
    for dtype in (torch.float32, torch.bfloat16):
        for output in loaded(pixel_values.to(dtype)).to_tuple():
            assert output.isfinite().all()
    loaded.check_processor(processor)


# -- initial buffers ----------------------------------------------------------------------------------------------


def test_before_a_fit_the_basis_is_orthonormal_and_reconstructs_what_is_smooth(pixel_values):
    tokenizer = LDAEModel(LDAEConfig(**TINY)).tokenizer
    equal_to(tokenizer.components @ tokenizer.components.T, torch.eye(K), 1e-6)
    assert torch.equal(tokenizer.mean, torch.zeros(P)) and torch.equal(tokenizer.explained_variance, torch.ones(P))
    constant = torch.full((1, 3, 16, 16), 0.3)
    equal_to(tokenizer.decode(tokenizer.encode(constant)), torch.full((1, N, P), 0.3), 1e-6)


def test_a_model_that_was_built_without_memory_gets_its_buffers_and_zeros_when_it_is_initialised():
    with torch.device("meta"):
        model = LDAEForImageClassification(LDAEConfig(**TINY))
    for tensor in (model := model.to_empty(device="cpu")).state_dict().values():
        tensor.fill_(7)
    for module in model.modules():
        module._is_hf_initialized = False  # transformers marked them while there was nothing to fill
    model.init_weights()
    reference = LDAEForImageClassification(model.config)
    for (name, buffer), (_, expected) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    assert not any((tensor == 7).any() for tensor in model.state_dict().values())
    assert not model.ldae.layers[0].modulation[-1].weight.any()


def test_all_that_a_model_holds_is_saved():
    for cls in (LDAEModel, LDAEForPreTraining, LDAEForImageClassification):
        model = cls(LDAEConfig(**TINY))
        held = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
        assert held == set(model.state_dict())


# -- references ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def fold(encoder: LDAEModel):
    """The encoder at its fixed timestep as a plain ViT of transformers."""
    from transformers import IJepaConfig, IJepaModel

    config = encoder.config
    vit = IJepaModel(
        IJepaConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            layer_norm_eps=config.layer_norm_eps,
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_channels=config.num_channels,
            qkv_bias=True,
        )
    ).to(encoder.dtype)
    basis, mean = encoder.tokenizer.components, encoder.tokenizer.mean
    weight, projection = encoder.patch_embedding.weight, vit.embeddings.patch_embeddings.projection
    projection.weight.copy_((weight @ basis.T @ basis).view_as(projection.weight))
    projection.bias.copy_(weight @ (mean - basis.T @ (basis @ mean)) + encoder.patch_embedding.bias)
    vit.embeddings.position_embeddings.copy_(encoder.position_embeddings)
    conditioning = encoder.timestep_embedding(torch.tensor([config.feature_timestep]))
    for ours, theirs in zip(encoder.layers, vit.layers, strict=True):
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = ours.modulation(conditioning)[0, 0].chunk(6)
        theirs.layernorm_before.weight.copy_(1 + scale)
        theirs.layernorm_before.bias.copy_(shift)
        theirs.layernorm_after.weight.copy_(1 + mlp_scale)
        theirs.layernorm_after.bias.copy_(mlp_shift)
        attention = theirs.attention
        for part, linear in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
            linear.weight.copy_(ours.attention.qkv.weight.chunk(3)[part])
            linear.bias.copy_(ours.attention.qkv.bias.chunk(3)[part])
        attention.o_proj.weight.copy_(gate[:, None] * ours.attention.projection.weight)
        attention.o_proj.bias.copy_(gate * ours.attention.projection.bias)
        theirs.mlp.fc1.load_state_dict(ours.mlp.fc1.state_dict())
        theirs.mlp.fc2.weight.copy_(mlp_gate[:, None] * ours.mlp.fc2.weight)
        theirs.mlp.fc2.bias.copy_(mlp_gate * ours.mlp.fc2.bias)
    return vit.eval()


@pytest.mark.parametrize("conditioning_hidden_size", ["quarter", None])
def test_the_encoder_at_a_fixed_timestep_is_transformers_plain_vit(conditioning_hidden_size, processor, pixel_values):
    encoder = build(LDAEModel, processor, conditioning_hidden_size=conditioning_hidden_size)
    vit = fold(encoder)
    with torch.no_grad():
        ours = encoder(pixel_values, output_hidden_states=True)
        theirs = vit(pixel_values, output_hidden_states=True)
        for our_state, their_state in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            equal_to(their_state, our_state, 1e-10)
        equal_to(theirs.last_hidden_state, ours.last_hidden_state, 1e-10)
        larger = torch.cat([pixel_values, pixel_values.flip(2)], dim=2)
        theirs = vit(larger, interpolate_pos_encoding=True).last_hidden_state
        equal_to(theirs, encoder(larger).last_hidden_state, 1e-10)


@pytest.mark.parametrize("freq_shift", [0, 1])
@torch.no_grad()
def test_the_labelled_network_in_dits_form_is_diffusers_dit(freq_shift, processor, pixel_values, noise):
    from diffusers import DiTTransformer2DModel
    from diffusers.models.embeddings import Timesteps

    keys = dict(conditioning_hidden_size=None, noise_schedule="ddpm_linear", timestep_freq_shift=freq_shift)
    model = build(processor=processor, **LABELLED, **keys)
    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=D // 2,
        in_channels=K,
        num_layers=4,
        sample_size=4,
        patch_size=1,
        norm_eps=1e-6,
        num_embeds_ada_norm=5,
    )
    dit = dit.double().eval()
    assert dit.pos_embed.pos_embed.shape == model.ldae.position_embeddings.shape
    dit.pos_embed.proj.weight.copy_(model.ldae.patch_embedding.weight[:, :, None, None])
    dit.pos_embed.proj.bias.copy_(model.ldae.patch_embedding.bias)
    for ours, theirs in zip([*model.ldae.layers, *model.decoder.layers], dit.transformer_blocks, strict=True):
        embedding = theirs.norm1.emb
        if freq_shift == 0:  # diffusers shifts the frequencies by one where DiT does not
            embedding.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        embedding.class_embedder.embedding_table.load_state_dict(model.ldae.label_embedding.table.state_dict())
        embedding.timestep_embedder.linear_1.load_state_dict(model.ldae.timestep_embedding.fc1.state_dict())
        embedding.timestep_embedder.linear_2.load_state_dict(model.ldae.timestep_embedding.fc2.state_dict())
        theirs.norm1.linear.load_state_dict(ours.modulation[1].state_dict())
        for part, linear in enumerate((theirs.attn1.to_q, theirs.attn1.to_k, theirs.attn1.to_v)):
            linear.weight.copy_(ours.attention.qkv.weight.chunk(3)[part])
            linear.bias.copy_(ours.attention.qkv.bias.chunk(3)[part])
        theirs.attn1.to_out[0].load_state_dict(ours.attention.projection.state_dict())
        theirs.ff.net[0].proj.load_state_dict(ours.mlp.fc1.state_dict())
        theirs.ff.net[2].load_state_dict(ours.mlp.fc2.state_dict())
    dit.proj_out_1.load_state_dict(model.decoder.modulation[1].state_dict())
    dit.proj_out_2.load_state_dict(model.decoder.head.state_dict())

    given = dict(timesteps=TIMESTEPS, noise=noise)
    third_dropped = dict(labels=LABELS, dropped_labels=torch.tensor([False, False, True]))
    # For diffusers too "no class" is the last row.
    for ours, class_labels in ((dict(labels=LABELS), LABELS), (third_dropped, [0, 4, 5]), ({}, [5, 5, 5])):
        output = model(pixel_values, **given, **ours)
        image = output.noisy_tokens.transpose(1, 2).unflatten(2, (4, 4))
        theirs = dit(image, timestep=TIMESTEPS, class_labels=torch.as_tensor(class_labels)).sample
        equal_to(output.prediction, theirs.flatten(2).transpose(1, 2), 1e-10)


def test_positions_are_the_fixed_2d_sines_and_cosines_of_diffusers():
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    for grid_size in (4, 7):
        theirs = get_2d_sincos_pos_embed(D, grid_size, base_size=grid_size, output_type="pt")
        equal_to(sincos_positions(D, (grid_size, grid_size))[0], theirs.float(), 1e-6)


@pytest.mark.parametrize("freq_shift", [0, 1])
def test_the_timestep_sinusoids_are_those_of_dit_or_of_diffusers(freq_shift):
    from diffusers.models.embeddings import Timesteps

    embedding = LDAETimestepEmbedding(LDAEConfig(**TINY, timestep_freq_shift=freq_shift))
    timesteps = torch.tensor([0, 1, 10, 999])
    shown = []
    embedding.fc1.register_forward_hook(lambda module, args, output: shown.append(args[0]))
    embedding(timesteps)
    expected = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=freq_shift)(timesteps)
    equal_to(shown[0], expected[:, None], 1e-6)
    embedding(timesteps.reshape(2, 2))
    equal_to(shown[1], expected.reshape(2, 2, 256), 1e-6)


# -- processor and model ------------------------------------------------------------------------------------------


def test_set_processor_copies_the_basis_and_both_remember_it(processor, pixel_values):
    model = LDAEForPreTraining(LDAEConfig(**TINY))
    with pytest.raises(ValueError, match="is not the one this model was built with .none yet."):
        model.check_processor(processor)
    model.set_processor(processor)
    model.check_processor(processor)
    model.ldae.check_processor(processor)
    assert model.config.processor_fingerprint == model.ldae.config.processor_fingerprint == processor.fingerprint
    tokenizer = model.ldae.tokenizer
    assert torch.equal(tokenizer.components, processor.components[:K].float())
    assert torch.equal(tokenizer.mean, processor.mean.float())
    images = smooth_images(2, 13)
    equal_to(tokenizer.encode(processor(images, return_tensors="pt")["pixel_values"]), processor.encode(images), 1e-5)


def test_a_processor_that_does_not_fit_the_model_is_refused_in_one_sentence(processor, processors):
    model = LDAEModel(LDAEConfig(**TINY))
    unfitted = LDAEImageProcessor(image_size=16, patch_size=4, latent_dim=K)
    with pytest.raises(ValueError, match="^This processor has no PCA basis yet; call processor.fit"):
        model.set_processor(unfitted)
    for wrong, sentence in (
        (fit_processor(patch_size=2), "The model has patch_size=4 but the processor has patch_size=2."),
        (fit_processor(latent_dim=4), "The model has latent_dim=8 but the processor has latent_dim=4."),
        (processors["whiten"], "The model has latent_scaling='global' but the processor has latent_scaling='whiten'."),
    ):
        for meet in (model.set_processor, model.check_processor):
            with pytest.raises(ValueError) as error:
                meet(wrong)
            assert str(error.value) == sentence
    grey = LDAEModel(LDAEConfig(**TINY | dict(num_channels=1)))
    with pytest.raises(ValueError, match="^The model has patch_dim=16 but the processor has patch_dim=48.$"):
        grey.set_processor(processor)
    assert model.config.processor_fingerprint is None


def test_another_basis_is_noticed_by_its_fingerprint_and_by_the_weights(processor):
    model = LDAEModel(LDAEConfig(**TINY))
    model.set_processor(processor)
    other = fit_processor(seed=1)
    with pytest.raises(ValueError) as error:
        model.check_processor(other)
    assert other.fingerprint[:12] in str(error.value) and processor.fingerprint[:12] in str(error.value)
    without_weights = LDAEModel(model.config)
    with pytest.raises(ValueError, match="but its weights hold another PCA basis; load the weights too"):
        without_weights.check_processor(processor)


# -- saved folders, in a fresh process ----------------------------------------------------------------------------

CROSS_VARIANTS = {
    "l_dae": {},
    "dit_form": dict(conditioning_hidden_size=None, noise_schedule="ddpm_linear"),
    "latent": dict(input_space="latent", prediction_target="latent", latent_scaling="whiten"),
    "single_level": dict(noise_schedule="single_level", prediction_target="reconstruction"),
    "pixels": dict(tokenizer="pixels", latent_dim=P, sigma_max=6.5),
    "random_projection": dict(tokenizer="random_projection", noise_schedule="snr_matched_sigma"),
    "patch_ae": dict(tokenizer="patch_ae", input_space="latent", prediction_target="latent"),
    "labelled": dict(
        LABELLED, tokenizer="patch_vae", noise_schedule="ddpm_linear", timestep_freq_shift=1, latent_scaling="whiten"
    ),
}

# Runs where diffusers, datasets and accelerate cannot be imported: loading an encoder needs none of them.
LOADER = """
import json, sys
from pathlib import Path
for name in ("diffusers", "datasets", "accelerate"):
    sys.modules[name] = None
import ldae_hf
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

AUTO = {"encoder": AutoModel, "pretraining": AutoModelForPreTraining, "classifier": AutoModelForImageClassification}


def compare(model, reference, prefix):
    held = dict([*model.named_parameters(), *model.named_buffers()])
    return sorted(name for name in held if not torch.equal(held[name], reference[prefix + name]))


def load(folder, kind, **keys):
    try:
        return AUTO[kind].from_pretrained(folder, **keys).eval(), None
    except ValueError as error:
        return None, f"ValueError: {error}"


root, report = Path(sys.argv[1]), {}
for case in json.loads((root / "cases.json").read_text()):
    model, refused = load(root / case["folder"], case["into"], **case["keys"])
    result = {"refused": refused}
    if model is not None:
        reference = load_file(root / case["variant"] / "reference.safetensors")
        inputs = {name: reference[name] for name in ("pixel_values", "noise", "labels") if name in reference}
        encoder = model.base_model
        result["class"] = type(model).__name__
        result["wrong_encoder"] = compare(encoder, reference, "pretraining.ldae.")
        with torch.no_grad():
            result["features"] = torch.equal(encoder(inputs["pixel_values"]).last_hidden_state, reference["features"])
            if case["into"] == "pretraining":
                result["wrong"] = compare(model, reference, "pretraining.")
                output = model(**inputs, timesteps=0)
                result["output"] = torch.equal(output.prediction, reference["prediction"])
            if case["into"] == "classifier":
                result["wrong"] = compare(model, reference, "classifier.")
                output = model(inputs["pixel_values"])
                result["output"] = torch.equal(output.logits, reference["logits"])
                norm = model.batch_norm
                result["new_norm"] = not norm.running_mean.any() and bool((norm.running_var == 1).all())
                result["finite"] = bool(output.logits.isfinite().all())
        processor = AutoImageProcessor.from_pretrained(root / case["variant"] / "pretraining")
        model.check_processor(processor)
    report[case["name"]] = result
(root / "report.json").write_text(json.dumps(report))
"""


def damaged(source: Path, target: Path, keep) -> None:
    """A copy of a saved folder without the tensors that `keep` refuses."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {name: tensor for name, tensor in load_file(source / "model.safetensors").items() if keep(name)}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def report(processors, pixel_values, tmp_path_factory) -> dict[str, dict]:
    """What a fresh process finds when it loads every saved folder into every class; one process, it starts slowly."""
    root = tmp_path_factory.mktemp("folders")
    cases = []

    def case(variant, folder, into, name=None, **keys):
        name = name or f"{variant}: {Path(folder).name} into {into}"
        cases.append(dict(name=name, variant=variant, folder=str(folder), into=into, keys=keys))

    pixels = pixel_values.float()
    for variant, keys in CROSS_VARIANTS.items():
        processor = processor_for(processors, **keys)
        inputs = {"pixel_values": pixels, "noise": torch.randn(3, N, processor.latent_dim)}
        if "num_classes" in keys:
            inputs["labels"] = LABELS
        pretraining = build(processor=processor, dtype=torch.float32, **keys)
        classifier = build(LDAEForImageClassification, processor, torch.float32, num_labels=4, **keys)
        classifier.ldae.load_state_dict(pretraining.ldae.state_dict())
        classifier.train()(pixels)  # moves the running statistics away from where they start
        classifier.eval()
        models = {"encoder": pretraining.ldae, "pretraining": pretraining, "classifier": classifier}
        for kind, model in models.items():
            model.save_pretrained(root / variant / kind)
            processor.save_pretrained(root / variant / kind)
        with torch.no_grad():
            reference = inputs | {
                "features": pretraining.ldae(pixels).last_hidden_state,
                "prediction": pretraining(**inputs, timesteps=0).prediction,
                "logits": classifier(pixels).logits,
            }
        for kind in ("pretraining", "classifier"):
            reference |= {f"{kind}.{name}": tensor.clone() for name, tensor in models[kind].state_dict().items()}
        save_file(reference, root / variant / "reference.safetensors")
        for saved in models:
            for into in models:
                case(variant, f"{variant}/{saved}", into)

    source = root / "l_dae" / "pretraining"
    for part in ("patch_embedding.weight", "position_embeddings", "tokenizer.components", "schedule.sigmas"):
        damaged(source, root / f"without_{part}", lambda name, part=part: not name.endswith(part))
        for into in ("encoder", "pretraining", "classifier"):
            case("l_dae", f"without_{part}", into)
    damaged(root / "l_dae" / "classifier", root / "half_a_head", lambda name: name != "classifier.weight")
    case("l_dae", "half_a_head", "classifier")
    for name, keys in {
        "deeper": dict(num_hidden_layers=3),
        "other_latents": dict(latent_dim=4),
        "other_positions": dict(image_size=32),
        "other_positions_unchecked": dict(image_size=32, ignore_mismatched_sizes=True),
        "contradiction": dict(latent_dim=P + 1),
    }.items():
        for into in ("encoder", "pretraining", "classifier"):
            case("l_dae", "l_dae/pretraining", into, f"{name} into {into}", **keys)
    case("l_dae", "l_dae/classifier", "classifier", "other labels", num_labels=9)
    case("l_dae", "l_dae/classifier", "classifier", "other labels allowed", num_labels=9, ignore_mismatched_sizes=True)

    (root / "cases.json").write_text(json.dumps(cases))
    source_folder = str(Path(sys.modules["ldae_hf"].__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": source_folder, "TRANSFORMERS_VERBOSITY": "error"}
    process = subprocess.run(
        [sys.executable, "-c", LOADER, str(root)], capture_output=True, text=True, env=environment, cwd=root
    )
    assert process.returncode == 0, process.stderr
    return json.loads((root / "report.json").read_text())


@pytest.mark.parametrize("variant", CROSS_VARIANTS)
@pytest.mark.parametrize("saved", ["encoder", "pretraining", "classifier"])
def test_an_encoder_loads_from_every_folder_equal_in_parameters_buffers_and_features(report, variant, saved):
    result = report[f"{variant}: {saved} into encoder"]
    assert result == {"refused": None, "class": "LDAEModel", "wrong_encoder": [], "features": True}


@pytest.mark.parametrize("variant", CROSS_VARIANTS)
def test_a_pre_training_model_loads_equal_from_its_own_folder_only(report, variant):
    result = report[f"{variant}: pretraining into pretraining"]
    assert result["class"] == "LDAEForPreTraining"
    assert result["wrong"] == result["wrong_encoder"] == []
    assert result["features"] and result["output"]
    for saved in ("encoder", "classifier"):
        refused = report[f"{variant}: {saved} into pretraining"]["refused"]
        assert "does not hold all weights of LDAEForPreTraining" in refused and "'decoder." in refused


@pytest.mark.parametrize("variant", CROSS_VARIANTS)
def test_a_classifier_loads_equal_and_only_its_head_is_new_elsewhere(report, variant):
    result = report[f"{variant}: classifier into classifier"]
    assert result["class"] == "LDAEForImageClassification"
    assert result["wrong"] == result["wrong_encoder"] == []
    assert result["features"] and result["output"]
    for saved in ("encoder", "pretraining"):
        result = report[f"{variant}: {saved} into classifier"]
        assert result["wrong_encoder"] == [] and result["features"]
        assert {name.split(".")[0] for name in result["wrong"]} <= {"batch_norm", "classifier"}
        assert result["new_norm"] and result["finite"]


@pytest.mark.parametrize("into", ["encoder", "pretraining", "classifier"])
@pytest.mark.parametrize(
    "part", ["patch_embedding.weight", "position_embeddings", "tokenizer.components", "schedule.sigmas"]
)
def test_a_folder_without_some_weights_or_buffers_is_refused_by_name(report, part, into):
    refused = report[f"l_dae: without_{part} into {into}"]["refused"]
    assert "1 are missing or have another shape" in refused and f"{part}'" in refused


def test_half_a_head_is_a_damaged_head(report):
    assert "the first is 'classifier.weight'" in report["l_dae: half_a_head into classifier"]["refused"]


@pytest.mark.parametrize("into", ["encoder", "pretraining", "classifier"])
def test_keys_that_need_other_weights_are_refused(report, into):
    for name in ("deeper", "other_latents", "other_positions", "other_positions_unchecked"):
        assert "missing or have another shape" in report[f"{name} into {into}"]["refused"]
    assert "latent_dim=49 exceeds the 48 values" in report[f"contradiction into {into}"]["refused"]


def test_a_head_for_other_labels_is_new_only_if_that_is_asked_for(report):
    assert "'classifier." in report["other labels"]["refused"]
    result = report["other labels allowed"]
    assert result["wrong"] == ["classifier.bias", "classifier.weight"] and result["finite"]


def test_a_shallower_encoder_is_the_first_blocks_of_the_saved_one(pretraining, pixel_values, tmp_path):
    pretraining.save_pretrained(tmp_path)
    shallow = LDAEModel.from_pretrained(tmp_path, num_hidden_layers=1, dtype=torch.float64)
    with torch.no_grad():
        expected = pretraining.ldae(pixel_values, output_hidden_states=[1]).hidden_states[1]
        state = shallow(pixel_values, output_hidden_states=True).hidden_states[-1]
    equal_to(state, expected, 1e-5)


def test_the_noise_tables_follow_the_configuration_when_a_model_is_loaded_with_another_schedule(processor, tmp_path):
    build(processor=processor, dtype=torch.float32).save_pretrained(tmp_path)
    loaded = LDAEForPreTraining.from_pretrained(tmp_path, noise_schedule="linear_gamma_squared")
    fresh = LDAEForPreTraining(loaded.config)
    assert torch.equal(loaded.ldae.schedule.sigmas, fresh.ldae.schedule.sigmas)
    assert loaded.ldae.schedule.gammas[-1] == 0
    stretched = LDAEForPreTraining.from_pretrained(tmp_path, sigma_max=6.5)
    assert stretched.ldae.schedule.sigmas[-1] == 6.5


def test_loading_can_tell_what_it_loaded(processor, tmp_path):
    build(processor=processor, dtype=torch.float32).save_pretrained(tmp_path)
    model, info = LDAEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is LDAEModel and not info["missing_keys"]


def test_a_misspelt_keyword_is_refused_by_every_forward():
    config = LDAEConfig(image_size=16, patch_size=8, latent_dim=4, hidden_size=16, num_attention_heads=2)
    pixel_values = torch.zeros(2, 3, 16, 16)
    for model in (LDAEModel(config), LDAEForPreTraining(config), LDAEForImageClassification(config)):
        with pytest.raises(TypeError, match="no argument 'timestep'"):
            model(pixel_values, timestep=3)
