"""The noise schedules of the path: how much signal (gamma_t) and how much noise (sigma_t) at each level t.

z_t = gamma_t · z_0 + sigma_t · noise (Eq. 1), t = 0 ... T-1. Torch only.
"""

import torch
from torch import nn

from .configuration_ldae import SIGMA_MAX


def ddpm_linear(num_train_timesteps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """DDPM and DiT: gamma² = prod(1 - beta), beta linear from 1e-4 to 0.02; variance preserving."""
    betas = torch.linspace(1e-4, 0.02, num_train_timesteps, dtype=torch.float64)
    gammas_squared = torch.cumprod(1 - betas, dim=0)
    return gammas_squared.sqrt(), (1 - gammas_squared).sqrt()


def linear_gamma_squared(num_train_timesteps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Section 4.2: gamma² falls linearly, 1 > gamma² >= 0; variance preserving."""
    steps = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64)
    gammas_squared = 1 - steps / num_train_timesteps
    return gammas_squared.sqrt(), (1 - gammas_squared).sqrt()


def linear_sigma(num_train_timesteps: int, sigma_max: float = SIGMA_MAX) -> tuple[torch.Tensor, torch.Tensor]:
    """Section 4.3, l-DAE: the signal is never scaled, sigma grows linearly from 0 to `sigma_max`."""
    sigmas = torch.linspace(0, sigma_max, num_train_timesteps, dtype=torch.float64)
    return torch.ones_like(sigmas), sigmas


def single_level(num_train_timesteps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Section 5, "single noise level": sigma = sqrt(1/3) always, so the table has one entry."""
    return torch.ones(1, dtype=torch.float64), torch.full((1,), 3**-0.5, dtype=torch.float64)


def snr_matched_sigma(num_train_timesteps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A control that the paper lacks: the signal-to-noise ratios of `linear_gamma_squared`, but the signal unscaled.

    `linear_sigma` takes the scale away and the strongest noise with it; this takes away the scale only. The last level
    of `linear_gamma_squared` has no signal, which no finite sigma matches: it repeats the level before.
    """
    gammas_squared = (linear_gamma_squared(num_train_timesteps)[0] ** 2).clamp(min=1 / num_train_timesteps)
    return torch.ones_like(gammas_squared), ((1 - gammas_squared) / gammas_squared).sqrt()


def interpolative(num_train_timesteps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A variant that the paper lacks: from the tokens to noise on a straight line, gamma = 1 - tau, sigma = 3 tau.

    tau = t / (T-1) grows from 0 to 1. Tokenizers that are trained as latent denoisers (arXiv 2507.15856) take such
    noise, 3 times as strong as the latents themselves.
    """
    taus = torch.linspace(0, 1, num_train_timesteps, dtype=torch.float64)
    return 1 - taus, 3 * taus


SCHEDULES = {
    "ddpm_linear": ddpm_linear,
    "linear_gamma_squared": linear_gamma_squared,
    "linear_sigma": linear_sigma,
    "single_level": single_level,
    "snr_matched_sigma": snr_matched_sigma,
    "interpolative": interpolative,
}


def noise_schedule_tables(
    name: str, num_train_timesteps: int = 1000, sigma_max: float = SIGMA_MAX
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(gammas, sigmas)` of a schedule, each (T,) in float64 on the CPU (T = 1 for `single_level`).

    Raises:
        ValueError: no schedule has this name, there is not even one timestep, or a `sigma_max` is given to a schedule
            that has none to choose.
    """
    if name not in SCHEDULES:
        raise ValueError(f"There is no noise schedule {name!r}; the schedules are {', '.join(SCHEDULES)}.")
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps={num_train_timesteps} must be at least 1.")
    chosen = {"sigma_max": sigma_max} if sigma_max != SIGMA_MAX else {}
    if chosen and name != "linear_sigma":
        raise ValueError(f"sigma_max={sigma_max} is for the noise schedule 'linear_sigma', not {name!r}.")
    with torch.device("cpu"):  # also where a model is being built on the meta device
        return SCHEDULES[name](num_train_timesteps, **chosen)


def clean_target_weight(gammas: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """lambda_t = gamma² / (gamma² + sigma²), the loss weight of every clean target (1 / (1 + sigma²) for l-DAE)."""
    return gammas**2 / (gammas**2 + sigmas**2)


def snr_weight(gammas: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """lambda_t = gamma² / sigma², which makes predicting clean data the same loss as predicting noise."""
    return gammas**2 / sigmas**2


LOSS_WEIGHTS = {"signal_share": clean_target_weight, "snr": snr_weight}


class NoiseSchedule(nn.Module):
    """A schedule's table inside a model: draws timesteps and noise, and corrupts tokens.

    The tables are persistent buffers, kept in fp32 whatever the model's dtype and filled by the model's
    `_init_weights`: a model that is built on the meta device would otherwise come back with empty memory in them.

    Timesteps are (B,), one for each image, or (B,N), one for each token, wherever they are given. Where none are,
    squares of `timestep_block` x `timestep_block` patches draw one together, or with None all of an image.
    """

    def __init__(
        self, name: str, num_train_timesteps: int, sigma_max: float = SIGMA_MAX, timestep_block: int | None = None
    ):
        super().__init__()
        self.name, self.num_train_timesteps, self.sigma_max = name, num_train_timesteps, sigma_max
        self.timestep_block = timestep_block
        gammas, sigmas = self.tables()
        self.register_buffer("gammas", gammas)
        self.register_buffer("sigmas", sigmas)

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The fp32 tables that belong in the buffers."""
        tables = noise_schedule_tables(self.name, self.num_train_timesteps, self.sigma_max)
        return tuple(table.float() for table in tables)

    def __len__(self) -> int:
        return self.gammas.shape[0]

    def as_timesteps(
        self,
        timesteps: int | torch.Tensor,
        device: torch.device,
        batch_size: int | None = None,
        num_tokens: int | None = None,
    ) -> torch.Tensor:
        """Timesteps as a tensor, (1,) for one integer that a whole batch shares, (B,) or, with `num_tokens`, (B,N).

        Raises:
            ValueError: timesteps that are no integers, outside 0 ... T-1, or neither one nor `batch_size` nor
                `num_tokens` for each. On an accelerator tensors are not read back, so there only the range of integers
                is checked.
        """
        if not isinstance(timesteps, torch.Tensor):
            timesteps = torch.tensor(timesteps, device="cpu")
        if timesteps.is_floating_point() or timesteps.dtype == torch.bool:
            raise ValueError(f"Timesteps must be integers in 0 ... {len(self) - 1}, not {timesteps.dtype}.")
        for_tokens = timesteps.shape == (batch_size, num_tokens)
        if batch_size is not None and timesteps.numel() not in (1, batch_size) and not for_tokens:
            tokens = "" if num_tokens is None else f", or one for each of their {num_tokens} tokens"
            raise ValueError(
                f"There are {timesteps.numel()} timesteps for {batch_size} images; give one, or one each{tokens}."
            )
        if timesteps.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(timesteps.min()), int(timesteps.max())
            if low < 0 or high >= len(self):
                raise ValueError(
                    f"Timesteps must lie in 0 ... {len(self) - 1} for noise schedule {self.name!r}, "
                    f"but {low if low < 0 else high} was asked for."
                )
        return (timesteps if for_tokens else timesteps.reshape(-1)).to(device)

    def sample(
        self,
        tokens: torch.Tensor,
        timesteps: int | torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps (B,) or (B,N), uniform, and noise (B,N,K), standard normal; what is given is not drawn.

        Args:
            tokens: (B,N,K). grid: their (rows, columns); default one row.
        """
        if timesteps is None:
            timesteps = self.draw(len(tokens), grid or (1, tokens.shape[1]), tokens.device)
        else:
            timesteps = self.as_timesteps(timesteps, tokens.device, *tokens.shape[:2])
            timesteps = timesteps.expand(tokens.shape[: timesteps.ndim])
        noise = torch.randn_like(tokens) if noise is None else noise.to(tokens)
        return timesteps, noise

    def draw(self, batch_size: int, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
        """Uniform timesteps, (B,), or (B,N) of a grid of N = rows · columns patches.

        Raises:
            ValueError: squares of patches share a timestep, and the grid is none of such squares.
        """
        block = self.timestep_block
        if block is None:
            return torch.randint(len(self), (batch_size,), device=device)
        if any(side % block for side in grid):
            rows, columns = grid
            raise ValueError(f"{rows}x{columns} patches do not fall into {block}x{block} blocks; give the timesteps.")
        drawn = torch.randint(len(self), (batch_size, *(side // block for side in grid)), device=device)
        return drawn.repeat_interleave(block, 1).repeat_interleave(block, 2).flatten(1)

    def levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """gamma_t and sigma_t, each (B,1,1), or (B,N,1) of timesteps (B,N)."""
        return tuple(table[timesteps].reshape(len(timesteps), -1, 1) for table in (self.gammas, self.sigmas))

    def add_noise(self, tokens: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Eq. 1: gamma_t · tokens + sigma_t · noise, (B,N,K).

        Raises:
            ValueError: the noise has another shape than the tokens.
        """
        if noise.shape != tokens.shape:
            raise ValueError(f"noise must be {tuple(tokens.shape)} as the tokens, not {tuple(noise.shape)}.")
        gammas, sigmas = self.levels(timesteps)
        return gammas * tokens + sigmas * noise
