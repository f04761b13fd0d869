"""What the network is shown, and what it is asked for: the two keys `input_space` and `prediction_target` of the path.

A prediction target compares (`squared_error`, Σ_i w_i r_i² of each token) and reads an answer: the noise or the clean
latents (`in_latents`, (B,N,K)), and what it says of the patch outside the K directions (`outside`, (B,N,P)). V is
orthonormal, so the part of an error outside the K directions has the squared length |e|² - |V e|² (Pythagoras): Eq. 4
never needs the other P - K directions.

B images · N tokens · P values of a patch · K latent values of a token
"""

import torch

from .configuration_ldae import LDAEConfig
from .noise_schedules import LOSS_WEIGHTS
from .patch_tokenizers import PatchTokenizer, Tokenizer


def latent_input(tokenizer: Tokenizer, noisy_tokens: torch.Tensor) -> torch.Tensor:
    """The network sees z_t, (B,N,K)."""
    return noisy_tokens


def pixel_input(tokenizer: PatchTokenizer, noisy_tokens: torch.Tensor) -> torch.Tensor:
    """The network sees the image x_t = mean + Vᵀ z_t / s, (B,N,P)."""
    return tokenizer.decode(noisy_tokens)


def equal_weight(gammas: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """lambda_t = 1, of every noise target."""
    return torch.ones_like(gammas)


class LatentAnswer:
    """The answer has K values per token, and says nothing of the rest."""

    answers_in_latents = True

    def in_latents(self, tokenizer, prediction):
        return prediction

    def outside(self, tokenizer, prediction):
        return 0


class PredictNoise(LatentAnswer):
    """The answer is eps, (B,N,K)."""

    predicts_noise = True

    def __init__(self, config: LDAEConfig):
        self.loss_weight = equal_weight

    def squared_error(self, tokenizer, prediction, patches, tokens, noise):
        return (noise - prediction).square().sum(-1)


class PredictLatent(LatentAnswer):
    """The answer is z, (B,N,K)."""

    predicts_noise = False

    def __init__(self, config: LDAEConfig):
        self.loss_weight = LOSS_WEIGHTS[config.loss_weighting]

    def squared_error(self, tokenizer, prediction, patches, tokens, noise):
        return (tokens - prediction).square().sum(-1)


class PredictReconstruction:
    """The answer is decode(z), (B,N,P): the image without its tail outside the K directions."""

    answers_in_latents, predicts_noise = False, False

    def __init__(self, config: LDAEConfig):
        self.loss_weight = LOSS_WEIGHTS[config.loss_weighting]

    def squared_error(self, tokenizer, prediction, patches, tokens, noise):
        return tokenizer.loss_scale**2 * (tokenizer.decode(tokens) - prediction).square().sum(-1)

    def in_latents(self, tokenizer, prediction):
        return tokenizer.encode_patches(prediction)

    def outside(self, tokenizer, prediction):
        return tokenizer.outside(prediction - tokenizer.mean)


class PredictImage(PredictReconstruction):
    """l-DAE: the answer is the original image, (B,N,P), with the tail weighted down (Eq. 4)."""

    def __init__(self, config: LDAEConfig):
        super().__init__(config)
        self.residual_weight = config.residual_weight

    def squared_error(self, tokenizer, prediction, patches, tokens, noise):
        error = patches - prediction
        inside = tokenizer.project(error).square().sum(-1)
        weight = self.residual_weight
        return tokenizer.loss_scale**2 * (weight * error.square().sum(-1) + (1 - weight) * inside)


class PredictNoiseInImage:
    """Footnote 4: noise prediction in the final model. s V answer is eps; the tail is the image's, weighted down."""

    answers_in_latents, predicts_noise = False, True

    def __init__(self, config: LDAEConfig):
        self.loss_weight = equal_weight
        self.residual_weight = config.residual_weight

    def squared_error(self, tokenizer, prediction, patches, tokens, noise):
        inside = (noise - tokenizer.project(prediction) * tokenizer.scales).square().sum(-1)
        error = patches - tokenizer.mean - prediction
        tail = error.square().sum(-1) - tokenizer.project(error).square().sum(-1)
        return inside + self.residual_weight * tokenizer.loss_scale**2 * tail

    def in_latents(self, tokenizer, prediction):
        return tokenizer.project(prediction) * tokenizer.scales

    def outside(self, tokenizer, prediction):
        return tokenizer.outside(prediction)


def clean_latents(target, tokenizer, prediction, noisy_tokens, gammas, sigmas) -> torch.Tensor:
    """(B,N,K) the clean latents according to an answer to `noisy_tokens`."""
    answer = target.in_latents(tokenizer, prediction)
    return (noisy_tokens - sigmas * answer) / gammas if target.predicts_noise else answer


def clean_patches(target, tokenizer, prediction, latents) -> torch.Tensor:
    """(B,N,P) what clean latents decode to, with what the answer says outside of the K directions."""
    return tokenizer.decode(latents) + target.outside(tokenizer, prediction)


NETWORK_INPUTS = {"latent": latent_input, "pixel": pixel_input}

PREDICTIONS = {
    ("latent", "noise"): PredictNoise,
    ("latent", "latent"): PredictLatent,
    ("pixel", "noise"): PredictNoiseInImage,
    ("pixel", "latent"): PredictLatent,
    ("pixel", "reconstruction"): PredictReconstruction,
    ("pixel", "image"): PredictImage,
}
