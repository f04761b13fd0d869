"""Each tokenizer by its laws, measured on the patches that its PCA was fitted to."""

import copy

import pytest
import torch

from ldae_hf import LDAEConfig, LDAEForPreTraining, LDAEImageProcessor
from ldae_hf.configuration_ldae import (
    CONVOLUTIONAL_TOKENIZERS,
    LATENT_SCALINGS,
    LEARNED_PATCH_TOKENIZERS,
    ORTHONORMAL_TOKENIZERS,
)
from ldae_hf.configuration_ldae import TOKENIZERS as NAMES
from ldae_hf.latent_tokenizers import build_autoencoder
from ldae_hf.noise_schedules import noise_schedule_tables
from ldae_hf.patch_covariance import PatchCovariance
from ldae_hf.patch_tokenizers import TOKENIZERS, PatchPCA, RandomProjection, patchify


N, K, P = 16, 8, 48  # of 16x16 images in 4x4 patches


def equal_to(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def crops() -> torch.Tensor:
    """(60,3,16,16) uint8, smooth, of unequal colours."""
    noise = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(0)).cumsum(2).cumsum(3)
    low, high = noise.amin((2, 3), keepdim=True), noise.amax((2, 3), keepdim=True)
    return ((noise - low) / (high - low) * torch.tensor([255.0, 200, 100])[:, None, None]).round().to(torch.uint8)


@pytest.fixture(scope="module")
def processor(crops) -> LDAEImageProcessor:
    """Its PCA is that of all patches of `crops`."""
    processor = LDAEImageProcessor(image_size=16, patch_size=4, latent_dim=K)
    return processor.set_basis(processor.accumulate(PatchCovariance(P), crops))


@pytest.fixture(scope="module")
def pixel_values(crops) -> torch.Tensor:
    return crops.double() / 127.5 - 1


@pytest.fixture(scope="module")
def patches(pixel_values) -> torch.Tensor:
    """(M,P), the fit set."""
    return patchify(pixel_values, 4).flatten(0, 1)


def fitted(kind: str, processor: LDAEImageProcessor, latent_dim: int = K, latent_scaling: str = "global"):
    """A tokenizer as `model.set_processor` leaves it, but with all digits of float64."""
    tokenizer = TOKENIZERS[kind](4, 3, P if kind == "pixels" else latent_dim, latent_scaling).double()
    for name, value in tokenizer.fitted(*processor.basis).items():
        getattr(tokenizer, name).copy_(value)
    return tokenizer


def trained(kind: str, processor: LDAEImageProcessor, pixel_values: torch.Tensor, latent_scaling: str = "global"):
    """A fitted tokenizer, and a learned one with weights of its own and with the variances of its latents."""
    tokenizer = fitted(kind, processor, latent_scaling=latent_scaling)
    torch.manual_seed(1)
    if kind in LEARNED_PATCH_TOKENIZERS:
        tokenizer.components.copy_(torch.randn(K, P))
        tokenizer.decoder_components.copy_(torch.randn(K, P))
        covariance = processor.components.T * processor.explained_variance @ processor.components
        tokenizer.explained_variance.copy_((tokenizer.components @ covariance * tokenizer.components).sum(1))
    if kind in CONVOLUTIONAL_TOKENIZERS:
        tokenizer.attach(build_autoencoder(16, 2, 8, 1, latent_channels=2).double())
        with torch.no_grad():
            tokenizer.explained_variance.copy_((tokenizer.encode(pixel_values) / tokenizer.scales).flatten(0, 1).var(0))
    return tokenizer


# -- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NAMES)
def test_latents_of_the_fit_set_have_unit_variance_in_the_mean_or_each_or_as_they_come(kind, processor, pixel_values):
    tokenizer = trained(kind, processor, pixel_values)

    def variances(scaling: str) -> torch.Tensor:
        tokenizer.latent_scaling = scaling
        tokens = tokenizer.encode(pixel_values)
        assert tokens.shape == (60, N, tokenizer.latent_dim)
        return tokens.flatten(0, 1).var(0)

    equal_to(variances("global").mean(), torch.ones((), dtype=torch.float64))
    equal_to(variances("whiten"), torch.ones(tokenizer.latent_dim, dtype=torch.float64))
    equal_to(variances("none"), tokenizer.explained_variance[: tokenizer.latent_dim])


@pytest.mark.parametrize("kind", NAMES)
def test_the_scale_of_the_latents_changes_nothing_that_is_decoded(kind, processor, pixel_values):
    tokenizer = trained(kind, processor, pixel_values)
    with torch.no_grad():
        images = []
        for tokenizer.latent_scaling in LATENT_SCALINGS:
            images.append(tokenizer.decode(tokenizer.encode(pixel_values[:2])))
    assert images[0].shape == (2, N, P)
    equal_to(images[1], images[0])
    equal_to(images[2], images[0])


@pytest.mark.parametrize("kind", [kind for kind in NAMES if kind not in CONVOLUTIONAL_TOKENIZERS])
def test_products_under_autocast_stay_in_the_precision_of_the_basis(kind, processor, pixel_values):
    tokenizer = trained(kind, processor, pixel_values).float()
    pixels = pixel_values[:2].float()
    expected = tokenizer.decode(tokenizer.encode(pixels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.decode(tokenizer.encode(pixels)), expected)
    assert tokenizer.encode(pixels.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind", NAMES)
def test_buffers_are_all_that_a_tokenizer_holds_and_they_do_not_depend_on_where_it_is_built(kind):
    size = (4, 3, P if kind == "pixels" else K, "global")
    tokenizer = TOKENIZERS[kind](*size)
    assert not list(tokenizer.parameters())
    assert set(tokenizer.state_dict()) == set(tokenizer.unfitted())
    with torch.device("meta"):
        unfitted = TOKENIZERS[kind](*size).unfitted()
    for name, value in tokenizer.named_buffers():
        assert value.dtype == torch.float32 and torch.equal(unfitted[name], value), name


@pytest.mark.parametrize("kind", NAMES)
def test_a_tokenizer_knows_whose_processors_basis_it_holds(kind, crops, processor, pixel_values):
    tokenizer = trained(kind, processor, pixel_values).float()
    other = LDAEImageProcessor(image_size=16, patch_size=4, latent_dim=K)
    other.set_basis(other.accumulate(PatchCovariance(P), crops[:50]))
    assert tokenizer.holds(processor.components, processor.mean)
    assert tokenizer.holds(other.components, other.mean) == (kind in CONVOLUTIONAL_TOKENIZERS)
    # The mean alone tells where the directions are not those of the PCA.
    assert tokenizer.holds(other.components, processor.mean) == (kind != "patch_pca")


# -- orthonormal directions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_scaling", LATENT_SCALINGS)
@pytest.mark.parametrize("kind", ORTHONORMAL_TOKENIZERS)
def test_decoding_what_was_encoded_at_full_rank_is_the_identity(kind, latent_scaling, processor, pixel_values):
    tokenizer = fitted(kind, processor, P, latent_scaling)
    equal_to(tokenizer.decode(tokenizer.encode(pixel_values)), patchify(pixel_values, 4))


@pytest.mark.parametrize("latent_dim", [1, K, P - 1])
@pytest.mark.parametrize("kind", ["patch_pca", "random_projection"])
def test_the_error_on_the_fit_set_is_the_variance_outside_the_directions(kind, latent_dim, processor, patches):
    tokenizer = fitted(kind, processor, latent_dim)
    error = (patches - tokenizer.decode(tokenizer.encode_patches(patches))).square().sum(-1).mean()
    dropped = processor.explained_variance.sum() - tokenizer.explained_variance[:latent_dim].sum()
    equal_to(error, dropped * (len(patches) - 1) / len(patches))  # a variance divides by n - 1, a mean by n
    if kind == "patch_pca":
        equal_to(dropped, processor.explained_variance[latent_dim:].sum())


def test_no_other_directions_keep_as_much_as_those_of_pca(processor):
    pca, random = (fitted(kind, processor).explained_variance[:K].sum() for kind in ("patch_pca", "random_projection"))
    assert random < pca / 2


def test_pixels_are_the_centred_patch_times_one_scale_and_know_the_variance_of_each(processor, patches, pixel_values):
    tokenizer = fitted("pixels", processor)
    equal_to(tokenizer.explained_variance, patches.var(0))
    tokens = tokenizer.encode(pixel_values).flatten(0, 1)
    equal_to(tokens, (patches - patches.mean(0)) / patches.var(0).mean().sqrt())


def test_a_random_projection_is_orthonormal_and_always_the_same(processor, patches):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = fitted("random_projection", processor)
    assert torch.equal(torch.rand(3), expected)  # the generator of the program was left alone
    equal_to(first.components @ first.components.T, torch.eye(K, dtype=torch.float64), 1e-7)
    again = RandomProjection(4, 3, K, "whiten")
    assert torch.equal(again.components, first.components.float())  # before a fit too
    equal_to(first.explained_variance, (patches @ first.components.T).var(0))
    assert not torch.allclose(first.components, fitted("patch_pca", processor).components, atol=0.1)


@pytest.mark.parametrize("latent_scaling", ["global", "none"])
@pytest.mark.parametrize("target", ["noise", "reconstruction", "image"])
def test_pixels_are_pca_at_full_rank_up_to_a_rotation(target, latent_scaling, processor, pixel_values):
    # V -> RV and noise -> R noise, here with R = Vᵀ, leaves the noisy image alone, and with it all that a network that
    # sees pixels makes of it.
    keys = dict(image_size=16, patch_size=4, latent_dim=P, hidden_size=16, num_hidden_layers=1)
    keys |= dict(decoder_num_hidden_layers=1, num_attention_heads=2, prediction_target=target)
    keys |= dict(noise_schedule="linear_gamma_squared", latent_scaling=latent_scaling)
    torch.manual_seed(2)
    pca = LDAEForPreTraining(LDAEConfig(**keys)).double()
    with torch.no_grad():
        for parameter in pca.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    pca.ldae.tokenizer = fitted("patch_pca", processor, P, latent_scaling)
    schedule = pca.ldae.schedule
    schedule.gammas, schedule.sigmas = noise_schedule_tables("linear_gamma_squared")
    pixels = copy.deepcopy(pca)
    pixels.ldae.tokenizer = fitted("pixels", processor, P, latent_scaling)
    timesteps, noise = torch.tensor([0, 500, 998]), torch.randn(3, N, P, dtype=torch.float64)
    with torch.no_grad():
        expected = pca(pixel_values[:3], timesteps=timesteps, noise=noise)
        rotated = pixels(pixel_values[:3], timesteps=timesteps, noise=noise @ processor.components)
        unrotated = pixels(pixel_values[:3], timesteps=timesteps, noise=noise)
    equal_to(pixels.ldae.tokenizer.decode(rotated.noisy_tokens), pca.ldae.tokenizer.decode(expected.noisy_tokens))
    equal_to(rotated.prediction, expected.prediction, 1e-9)
    equal_to(rotated.loss, expected.loss, 1e-9)
    assert abs(unrotated.loss - expected.loss) > 1e-4


# -- learned patch-wise tokenizers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LEARNED_PATCH_TOKENIZERS)
def test_an_autoencoder_encodes_with_v_and_decodes_with_u(kind, processor, pixel_values):
    tokenizer = trained(kind, processor, pixel_values)
    encoder, decoder = tokenizer.components, tokenizer.decoder_components
    scale = tokenizer.explained_variance.mean().rsqrt()
    tokens = tokenizer.encode(pixel_values)
    equal_to(tokens, (patchify(pixel_values, 4) - processor.mean) @ encoder.T * scale)
    equal_to(tokenizer.decode(tokens), processor.mean + tokens / scale @ decoder)
    decoder.copy_(encoder)
    equal_to(tokenizer.decode(tokens), processor.mean + tokens / scale @ encoder)


def test_before_it_is_trained_an_autoencoder_is_the_pca(processor, pixel_values):
    autoencoder, pca = fitted("patch_ae", processor), fitted("patch_pca", processor)
    tokens = autoencoder.encode(pixel_values)
    assert torch.equal(tokens, pca.encode(pixel_values))
    assert torch.equal(autoencoder.decode(tokens), pca.decode(tokens))
    before, unfitted = TOKENIZERS["patch_ae"](4, 3, K, "global"), PatchPCA(4, 3, K, "global")
    assert torch.equal(before.components, unfitted.components)
    assert torch.equal(before.decoder_components, unfitted.components)


# -- convolutional tokenizers --------------------------------------------------------------------------------------


def test_a_convolutional_tokenizer_without_its_autoencoder_says_what_to_do(pixel_values):
    tokenizer = TOKENIZERS["vqgan"](4, 3, K, "global")
    for verb, argument in ((tokenizer.encode, pixel_values), (tokenizer.decode, torch.zeros(1, N, K))):
        with pytest.raises(ValueError, match="^This model sees the latents of a convolutional autoencoder, which does"):
            verb(argument)


def test_images_that_are_not_made_of_whole_patches_are_refused(processor, pixel_values):
    for kind in NAMES:
        with pytest.raises(ValueError, match="^An image of 16x14 pixels is not made of whole 4x4 patches.$"):
            trained(kind, processor, pixel_values).encode(pixel_values[..., :14])
