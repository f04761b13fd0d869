"""LDAEScheduler: the noise schedules behind diffusers' scheduler interface, for sampling and for adding noise.

Between two levels s < t of any table, z_t = gamma_t z_0 + sigma_t eps is a Markov chain whose step backwards is

    z_s = gamma_s z_0 + sqrt(sigma_s² - c²) eps + c · fresh noise,      c² = sigma_s² (1 - SNR_t / SNR_s),

with SNR = gamma² / sigma². It is Bayes' rule on q(z_t | z_s) = N(a z_s, sigma_t² - a² sigma_s²), a = gamma_t / gamma_s,
and needs no gamma² + sigma² = 1. A smaller c leaves the marginals as they are: c = 0 is the deterministic DDIM
(arXiv 2010.02502), the whole c is DDPM's posterior (arXiv 2006.11239, Eq. 6-7).
"""

from dataclasses import dataclass

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .configuration_ldae import SIGMA_MAX, LDAEConfig
from .noise_schedules import NoiseSchedule, clean_target_weight, noise_schedule_tables


PREDICTION_TYPES = ("sample", "epsilon")


@dataclass
class LDAESchedulerOutput(BaseOutput):
    """Output of [`LDAEScheduler.step`], both in the shape and dtype of its `sample`.

    prev_sample: the sample at the next smaller noise level; after the last step the clean sample.
    pred_original_sample: the clean sample as this step's model output has it.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class LDAEScheduler(SchedulerMixin, ConfigMixin):
    """A noise schedule of l-DAE's path in diffusers' style. It holds only settings; saving writes them as JSON.

    Args:
        noise_schedule (`str`): the (gamma_t, sigma_t) table of Eq. 1, a key of `noise_schedules.SCHEDULES`.
        num_train_timesteps (`int`): noise levels T >= 1; `single_level` has one, whatever this says.
        prediction_type (`str`): what the model answers, `"sample"` (the clean sample) or `"epsilon"` (the noise).
        sigma_max (`float`): the largest sigma of `linear_sigma`.

    Attributes:
        gammas, sigmas: (T,) float32 on the CPU, index = timestep.
        init_noise_sigma (`float`): standard deviation to start sampling from, sqrt(gamma² + sigma²) of the last level
            with gamma > 0, for samples of unit variance: 1 where variance is preserved, sqrt(3) for `linear_sigma`.
        timesteps: (n,) int64, falling; every level until `set_timesteps` is called.

    Raises:
        ValueError: an unknown noise schedule, prediction type or setting, a `num_train_timesteps` that is no positive
            integer, or a `sigma_max` for a schedule that has none to choose.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        noise_schedule: str = "linear_sigma",
        num_train_timesteps: int = 1000,
        prediction_type: str = "sample",
        sigma_max: float = SIGMA_MAX,
    ):
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type={prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}.")
        if not isinstance(num_train_timesteps, int):
            raise ValueError(f"num_train_timesteps={num_train_timesteps!r} must be an integer.")
        self._schedule = NoiseSchedule(noise_schedule, num_train_timesteps, sigma_max)
        self.gammas, self.sigmas = self._schedule.gammas, self._schedule.sigmas
        # (2,T) in float64: steps take their coefficients from here, 1 - SNR_t / SNR_s would lose digits in float32.
        self._table = torch.stack(noise_schedule_tables(noise_schedule, num_train_timesteps, sigma_max))
        self._table_copies = {}
        # Where gamma is 0 nothing is left of the signal, so there is nothing to predict noise or SNR from.
        self._num_sampling_levels = int((self._table[0] > 0).sum())
        self.init_noise_sigma = self._table[:, self._num_sampling_levels - 1].norm().item()
        self.num_inference_steps, self._path = None, []
        self.timesteps = torch.arange(len(self) - 1, -1, -1, device="cpu")

    def __len__(self) -> int:
        return len(self._schedule)

    @classmethod
    def for_model(cls, config: LDAEConfig) -> "LDAEScheduler":
        """The scheduler with the noise of a model's configuration, which reads its answers as they are meant."""
        prediction_type = "epsilon" if config.prediction_target == "noise" else "sample"
        return cls(config.noise_schedule, config.num_train_timesteps, prediction_type, config.sigma_max)

    @classmethod
    def from_config(cls, config: dict, return_unused_kwargs: bool = False, **kwargs):
        """A scheduler from a dictionary of settings; `kwargs` go before them.

        Raises:
            ValueError: a setting that this class does not have; diffusers would drop it, and with it the meaning of
                another scheduler's configuration.
        """
        known = cls._get_init_keys(cls) - {"self"}
        unknown = [key for key in {**config, **kwargs} if key not in known and not key.startswith("_")]
        if unknown:
            raise ValueError(f"{cls.__name__} takes {', '.join(sorted(known))}, but not {', '.join(sorted(unknown))}.")
        # diffusers lists settings that were passed by position among those left at their defaults, and forgets them.
        config = {key: value for key, value in config.items() if key != "_use_default_values"}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        # diffusers looks class names up in its own namespace, and none of its schedulers reads these settings.
        return [cls]

    def scale_model_input(self, sample: torch.Tensor, timestep: int | None = None) -> torch.Tensor:
        """The sample itself: the network is shown z_t as it is."""
        return sample

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None):
        """Choose the timesteps of a sampling run: evenly spaced, from the last level with gamma > 0 downwards.

        This is diffusers' `timestep_spacing="trailing"` over those levels. The smallest level is T/n - 1, not 0, since
        the clean sample is what the last step returns anyway.

        Raises:
            ValueError: `num_inference_steps` is not in 1 ... the levels with gamma > 0, or the schedule cannot sample.
        """
        self._refuse_single_level()
        levels, steps = self._num_sampling_levels, num_inference_steps
        if not isinstance(steps, int) or not 1 <= steps <= levels:
            raise ValueError(
                f"num_inference_steps={steps!r} must be an integer in 1 ... {levels}, the levels of noise schedule "
                f"{self.config.noise_schedule!r} that hold signal."
            )
        self.num_inference_steps = steps
        self._path = [round(i * levels / steps) - 1 for i in range(steps, 0, -1)]
        self.timesteps = torch.tensor(self._path, device=device)

    def to_stock(self, scheduler_class: type[SchedulerMixin] | str, **settings) -> SchedulerMixin:
        """One of diffusers' own schedulers, with this schedule's signal-to-noise ratios, to drive the same model.

        diffusers' schedulers preserve variance. z_t / sqrt(gamma_t² + sigma_t²) does too, for any table, and has the
        same ratios: their cumulative product of 1 - beta is gamma² / (gamma² + sigma²), which is what they are given.
        [`LDAEPipeline`] scales what the network is shown back. diffusers' DDIM steps by T // n: it takes the right
        steps only where n divides the levels, of which `linear_gamma_squared` has 999, and is else refused there.

        Args:
            scheduler_class: for example `DPMSolverMultistepScheduler`, `EulerDiscreteScheduler`, or its name.
            settings: further ones of that class.

        Raises:
            ValueError: no scheduler has this name, the class takes no `trained_betas`, or the schedule cannot sample.
        """
        self._refuse_single_level()
        if isinstance(scheduler_class, str):
            name, scheduler_class = scheduler_class, getattr(diffusers, scheduler_class, None)
            if not isinstance(scheduler_class, type) or not issubclass(scheduler_class, SchedulerMixin):
                examples = "DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler"
                raise ValueError(f"{name!r} is no scheduler of diffusers; take for example {examples}.")
        known = scheduler_class._get_init_keys(scheduler_class)
        if "trained_betas" not in known:
            raise ValueError(f"{scheduler_class.__name__} takes no table of betas, so it cannot have this schedule.")
        gammas, sigmas = self._table[:, : self._num_sampling_levels]
        kept = clean_target_weight(gammas, sigmas)  # gamma² / (gamma² + sigma²)
        betas = 1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])
        betas[0].clamp_(min=1e-6)  # some take the logarithm of the first level's noise, which is 0 in `linear_sigma`
        given = {
            "trained_betas": betas.tolist(),
            "num_train_timesteps": len(betas),
            "prediction_type": self.config.prediction_type,
            "timestep_spacing": "trailing",  # from the last level on, as here
            "clip_sample": False,  # latents are not pixels in [-1, 1]
        }
        return scheduler_class(**{key: value for key, value in given.items() if key in known} | settings)

    def agrees_with(self, scheduler: SchedulerMixin) -> bool:
        """Whether another scheduler, of this class or one of diffusers', has these levels and reads answers so."""
        theirs = scheduler.config
        if theirs.get("prediction_type") != self.config.prediction_type or theirs.get("clip_sample", False):
            return False
        if isinstance(scheduler, LDAEScheduler):
            return torch.equal(scheduler._table, self._table)
        kept = clean_target_weight(self.gammas, self.sigmas)[: self._num_sampling_levels]
        products = getattr(scheduler, "alphas_cumprod", kept.new_empty(0))
        return len(products) == len(kept) and torch.allclose(products.cpu(), kept, atol=1e-3)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor
    ) -> torch.Tensor:
        """Eq. 1: gamma_t · original_samples + sigma_t · noise, in the shape and dtype of `original_samples`.

        Args:
            original_samples: (B,...) of any rank, tokens (B,N,K) or images (B,C,H,W). noise: the same shape.
            timesteps: (B,), or one integer for the whole batch, in 0 ... T-1.

        Raises:
            ValueError: an integer or a CPU tensor holds a timestep outside 0 ... T-1, timesteps are no integers or
                neither one nor B, or the noise has another shape.
        """
        if noise.shape != original_samples.shape:
            raise ValueError(f"noise must be {tuple(original_samples.shape)} as the samples, not {tuple(noise.shape)}.")
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        timesteps = self._schedule.as_timesteps(timesteps, original_samples.device, original_samples.shape[0])
        place = (original_samples.device, dtype)
        if place not in self._table_copies:
            self._table_copies[place] = self._table.to(dtype).to(original_samples.device)
        levels = self._table_copies[place][:, timesteps]  # (2, B)
        gammas, sigmas = levels.reshape(2, -1, *[1] * (original_samples.dim() - 1))
        return (gammas * original_samples + sigmas * noise).to(original_samples.dtype)

    def loss_weight(self, timesteps: int | torch.Tensor) -> torch.Tensor:
        """lambda_t (B,) in float32: gamma² / (gamma² + sigma²) for a clean target (Section 4), 1 for noise.

        Raises:
            ValueError: an integer or a CPU tensor holds a timestep outside 0 ... T-1.
        """
        device = timesteps.device if isinstance(timesteps, torch.Tensor) else torch.device("cpu")
        timesteps = self._schedule.as_timesteps(timesteps, device)
        weights = clean_target_weight(self.gammas, self.sigmas)
        return (weights if self.config.prediction_type == "sample" else torch.ones_like(weights)).to(device)[timesteps]

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> LDAESchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step from z_t towards less noise; the last step returns the predicted clean sample whole.

        z_s = gamma_s x + sqrt(sigma_s² - eta² c²) eps + eta c · fresh noise, where x and eps are the clean sample and
        the noise according to the model, and c is the posterior's standard deviation (the head of this file).

        Args:
            model_output: (B,...) the model's answer in the space of `sample`; an image is encoded first.
            timestep: t, a value of `timesteps`. sample: (B,...) z_t.
            eta: 0 deterministic (DDIM) ... 1 ancestral (DDPM).
            generator: of the fresh noise, one or one for each sample, on the CPU or the sample's device.
            return_dict: False for the tuple (prev_sample, pred_original_sample).

        Raises:
            ValueError: `set_timesteps` was not called, `timestep` is not one of its choice, eta is outside 0 ... 1,
                the shapes differ, or the schedule cannot sample.
        """
        self._refuse_single_level()
        if self.num_inference_steps is None:
            raise ValueError("LDAEScheduler.step was called before set_timesteps(num_inference_steps).")
        if int(timestep) not in self._path:
            raise ValueError(
                f"Timestep {int(timestep)} is not one of the {self.num_inference_steps} that set_timesteps chose "
                f"({self._path[0]} ... {self._path[-1]}); loop over scheduler.timesteps."
            )
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} must lie in 0 (deterministic) ... 1 (ancestral).")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output {tuple(model_output.shape)} and sample {tuple(sample.shape)} differ in shape; encode a "
                f"predicted image into latents before the step."
            )
        index = self._path.index(int(timestep))
        gamma, sigma = self._table[:, self._path[index]].tolist()
        out_dtype = sample.dtype
        dtype = torch.promote_types(out_dtype, torch.float32)
        sample, model_output = sample.to(dtype), model_output.to(dtype)

        epsilon_given = self.config.prediction_type == "epsilon"
        clean = (sample - sigma * model_output) / gamma if epsilon_given else model_output
        if index + 1 == len(self._path):
            previous = clean
        else:
            epsilon = model_output if epsilon_given else (sample - gamma * clean) / sigma
            next_gamma, next_sigma = self._table[:, self._path[index + 1]].tolist()
            snr_ratio = (gamma * next_sigma / (next_gamma * sigma)) ** 2  # SNR_t / SNR_s, also where sigma_s is 0
            fresh = eta * next_sigma * (1 - snr_ratio) ** 0.5
            previous = next_gamma * clean + (next_sigma**2 - fresh**2) ** 0.5 * epsilon
            if eta > 0:
                previous = previous + fresh * randn_tensor(sample.shape, generator, sample.device, dtype)
        previous, clean = previous.to(out_dtype), clean.to(out_dtype)
        return LDAESchedulerOutput(previous, clean) if return_dict else (previous, clean)

    def _refuse_single_level(self):
        if self.config.noise_schedule == "single_level":
            raise ValueError(
                "The noise schedule 'single_level' knows one level of noise and cannot sample: there is no path from "
                "pure noise to data, only one denoising of a noisy sample."
            )


__all__ = ["LDAEScheduler", "LDAESchedulerOutput"]
