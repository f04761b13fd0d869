"""The probe's protocol: the paper's values, what it leaves open, and what a smaller data set changes."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...training.optimization import Plan
from ...training.session import RunError


TASK = "full_linear_probe"
BATCH_SIZE = 16_384
BASE_LEARNING_RATES = {"lars": 0.1, "adamw": 1e-4}  # · batch / 256: 6.4 (MAE's) and the paper's 6.4e-3 at 16,384
MOMENTUM = 0.1  # of BatchNorm's running statistics, torch's default
EPSILON = 1e-6  # added to BatchNorm's variance, as in MAE's probe
INITIAL_STD = 0.01  # of the weights, as there
CROP_SCALE = (0.08, 1.0)
LARGEST = 256  # images of a forward pass, where it is not given
OPTIMIZERS = {
    "lars": "LARS, momentum 0.9, trust coefficient 0.001 (none for biases), no weight decay",
    "adamw": "AdamW, betas 0.9 and 0.999, no weight decay",
}


@dataclass(frozen=True)
class Protocol:
    """What a probe's number depends on, beside features and images.

    Attributes:
        optimizer: `"lars"` or `"adamw"`; the paper does not say which it was.
        learning_rates: peaks; a classifier is trained with each, and the first one's is the result.
        warmup_epochs: of linear warm-up from 0, before half a cosine to 0. batch_size: images of a step.
    """

    optimizer: str
    learning_rates: tuple[float, ...]
    epochs: int
    warmup_epochs: float
    batch_size: int
    seed: int

    @classmethod
    def resolve(
        cls,
        num_images: int,
        *,
        optimizer: str = "lars",
        learning_rates: Sequence[float] | None = None,
        epochs: int = 90,
        warmup_epochs: float | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> "Protocol":
        """The protocol with its defaults for a training set of so many images.

        Args:
            learning_rates: default 0.1 (LARS) or 1e-4 (AdamW) · batch / 256.
            warmup_epochs: default a ninth of the epochs, 10 of 90.
            batch_size: default 16,384, or the largest multiple of 256 that a smaller data set has.

        Raises:
            RunError: a value is out of range.
        """
        if optimizer not in OPTIMIZERS:
            raise RunError(f"The optimizer is {optimizer!r}, but must be one of {', '.join(OPTIMIZERS)}.")
        if batch_size is None:
            batch_size = min(BATCH_SIZE, num_images // 256 * 256 or num_images)
        if not 2 <= batch_size <= num_images:
            raise RunError(
                f"The batch is {batch_size} images, but must be at least 2, and at most the {num_images} of the "
                "training set; leave --batch-size out for the largest."
            )
        rates = tuple(learning_rates or [BASE_LEARNING_RATES[optimizer] * batch_size / 256])
        warmup_epochs = epochs / 9 if warmup_epochs is None else warmup_epochs
        if epochs < 1 or not 0 <= warmup_epochs <= epochs or min(rates) <= 0 or len(set(rates)) < len(rates):
            raise RunError(
                f"epochs={epochs} must be at least 1, warmup_epochs={warmup_epochs:g} in 0...epochs, and the learning "
                f"rates {', '.join(f'{rate:g}' for rate in rates)} positive and different."
            )
        return cls(optimizer, rates, epochs, warmup_epochs, batch_size, seed)

    def plan(self, num_images: int, num_processes: int, per_device_batch_size: int | None) -> Plan:
        """The steps, and how a batch is spread.

        Raises:
            RunError: the batch does not split over the processes and forward passes.
        """
        share, rest = divmod(self.batch_size, num_processes)
        if per_device_batch_size is None:
            per_device_batch_size = max(size for size in range(1, min(share, LARGEST) + 1) if share % size == 0)
        if rest or per_device_batch_size < 1 or share % per_device_batch_size:
            raise RunError(
                f"A batch of {self.batch_size} images does not split over {num_processes} process(es) and forward "
                f"passes of {per_device_batch_size}; give another --batch-size or --per-device-batch-size."
            )
        steps_per_epoch = num_images // self.batch_size
        return Plan(
            num_images=num_images,
            steps_per_epoch=steps_per_epoch,
            total_steps=steps_per_epoch * self.epochs,
            warmup_steps=round(steps_per_epoch * self.warmup_epochs),
            learning_rate=self.learning_rates[0],
            global_batch_size=self.batch_size,
            num_processes=num_processes,
            per_device_batch_size=per_device_batch_size,
            accumulation=share // per_device_batch_size,
            ema_decay=None,
        )

    def lines(self, plan: Plan) -> list[str]:
        """As [`Plan.lines`], with a warning where BatchNorm's running statistics, by which it is tested, still hold
        much of the mean of 0 and the variance of 1 that they begin with."""
        lines = plan.lines()
        if (share := (1 - MOMENTUM) ** plan.total_steps) > 0.01:
            lines.append(
                f"warning: after {plan.total_steps} steps {share:.0%} of BatchNorm's running statistics are still "
                "their start, by which the test loses points; take more --epochs or a smaller --batch-size"
            )
        return lines

    def stamp(self, plan: Plan) -> dict:
        """All of it in words and numbers, for the result."""
        smaller = "" if self.batch_size == BATCH_SIZE else f" (the paper's is {BATCH_SIZE:,})"
        return {
            "head": f"BatchNorm without affine (eps {EPSILON:g}, momentum {MOMENTUM:g}), linear; weights begin "
            f"truncated normal, std {INITIAL_STD:g}, biases at 0",
            "optimizer": OPTIMIZERS[self.optimizer],
            "learning_rates": list(self.learning_rates),
            "selection": "top1: the first learning rate, after the last step",
            "schedule": f"linear warm-up over {self.warmup_epochs:g} epochs, half-cycle cosine to 0",
            "epochs": self.epochs,
            "batch": f"{self.batch_size:,} images{smaller}: frozen features collected, one BatchNorm and linear step "
            "on all; the incomplete batch at an epoch's end is dropped",
            "batch_size": self.batch_size,
            "steps": plan.total_steps,
            "augmentation": f"random resized crop (scale {CROP_SCALE[0]:g}...{CROP_SCALE[1]:g}, ratio 3/4...4/3, "
            "bicubic) and flip; test: one centre crop",
            "seed": self.seed,
        }
