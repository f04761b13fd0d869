"""The recipe of fine-tuning, and what it means on one data set and machine."""

import math
from dataclasses import asdict, dataclass

from ...training.optimization import Plan
from ...training.sampling import micro_batches_per_step
from ...training.session import RunError


WIDTH_OF_LARGE = 1024  # ViT-L's, from which on the layer decay is that of L
LARGEST_FORWARD = 256  # images, where nothing else is asked for
BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class FineTuningRecipe:
    """The paper's for ImageNet (appendix B); where it is silent, MAE's fine-tuning, marked *.

    Args:
        epochs, global_batch_size, weight_decay: as they are called.
        learning_rate: the peak of the head's, as it is (not times the batch over 256).
        warmup_epochs*, min_learning_rate*: linear from 0 to the peak, then half a cosine down to this.
        layer_decay: factor of the learning rate from a layer to the one below; default 0.65 from 1,024 wide on, else
            0.85.
        drop_path: of the last block, rising linearly from 0 in the first.
        mixup, cutmix: of the Beta distributions; 0 for none. cutmix_share*: of the steps, where there are both.
        label_smoothing*: share of a target that is spread over all classes.
        rand_augment: magnitude (of 10; deviation 0.5) of two operations; 0 for none.
        random_erasing*: share of the images. crop_scale*: smallest and largest share of the area of a random crop.
        flip*: mirror half of the images.
        ema_decay: per step, of the average of the weights that is measured; 0 for none. Its half-life, 6,931 steps for
            0.9999, should be a small part of the training.

    Raises:
        RunError: a value is out of range.
    """

    epochs: int = 100
    global_batch_size: int = 1024
    learning_rate: float = 4e-3
    warmup_epochs: float = 5.0
    min_learning_rate: float = 1e-6
    weight_decay: float = 0.05
    layer_decay: float | None = None
    drop_path: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    cutmix_share: float = 0.5
    label_smoothing: float = 0.1
    rand_augment: float = 9.0
    random_erasing: float = 0.25
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    ema_decay: float = 0.9999

    def __post_init__(self):
        ranges = {
            "epochs": (1, math.inf),
            "global_batch_size": (1, math.inf),
            "learning_rate": (1e-12, math.inf),
            "warmup_epochs": (0, self.epochs),
            "min_learning_rate": (0, self.learning_rate),
            "weight_decay": (0, math.inf),
            "drop_path": (0, 1 - 1e-9),
            "mixup": (0, math.inf),
            "cutmix": (0, math.inf),
            "cutmix_share": (0, 1),
            "label_smoothing": (0, 1),
            "rand_augment": (0, 10),
            "random_erasing": (0, 1),
            "ema_decay": (0, 1 - 1e-9),
        }
        ranges |= {} if self.layer_decay is None else {"layer_decay": (1e-9, 1)}
        for name, (least, most) in ranges.items():
            if not least <= getattr(self, name) <= most:
                raise RunError(f"{name} is {getattr(self, name)}, but must be in {least:g}...{round(most, 6):g}.")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise RunError(f"crop_scale is {tuple(self.crop_scale)}, but must be 0 < smallest <= largest <= 1.")

    def for_width(self, width: int) -> "FineTuningRecipe":
        """With the layer decay of an encoder of this width, if none is given."""
        values = asdict(self)
        if self.layer_decay is None:
            values["layer_decay"] = 0.65 if width >= WIDTH_OF_LARGE else 0.85
        return FineTuningRecipe(**values)


@dataclass(frozen=True)
class FineTuningPlan(Plan):
    """A [`Plan`] whose learning rate ends at `min_learning_rate`."""

    min_learning_rate: float = 0.0

    @classmethod
    def of(
        cls, recipe: FineTuningRecipe, num_images: int, num_processes: int, per_device_batch_size: int | None
    ) -> "FineTuningPlan":
        """Resolves a recipe.

        Raises:
            RunError: there are fewer images than a global batch, it does not divide evenly, or images that are mixed
                in pairs do not come in pairs.
        """
        batch = recipe.global_batch_size
        if num_images < batch:
            raise RunError(f"There are {num_images} training images, fewer than a global batch of {batch}; lower it.")
        if batch % num_processes:
            raise RunError(f"A global batch of {batch} does not split over {num_processes} processes.")
        share = batch // num_processes
        if per_device_batch_size is None:
            per_device_batch_size = max(size for size in range(1, min(share, LARGEST_FORWARD) + 1) if share % size == 0)
        try:
            accumulation = micro_batches_per_step(batch, per_device_batch_size, num_processes)
        except ValueError as error:
            raise RunError(str(error)) from error
        if (recipe.mixup or recipe.cutmix) and per_device_batch_size % 2:
            raise RunError(
                f"MixUp and CutMix mix pairs of images, and {per_device_batch_size} in a forward pass are no pairs; "
                "choose an even batch, or turn both off."
            )
        steps_per_epoch = num_images // batch
        return cls(
            num_images=num_images,
            steps_per_epoch=steps_per_epoch,
            total_steps=steps_per_epoch * recipe.epochs,
            warmup_steps=round(steps_per_epoch * recipe.warmup_epochs),
            learning_rate=recipe.learning_rate,
            global_batch_size=batch,
            num_processes=num_processes,
            per_device_batch_size=per_device_batch_size,
            accumulation=accumulation,
            ema_decay=recipe.ema_decay or None,
            min_learning_rate=recipe.min_learning_rate,
        )

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up from 0, then half a cosine to `min_learning_rate`, as MAE."""
        rate, least = super().learning_rate_at(step), self.min_learning_rate
        return rate if step < self.warmup_steps else least + (1 - least / self.learning_rate) * rate

    def lines(self) -> list[str]:
        """As [`Plan.lines`], with a warning where the average would hardly move."""
        lines = super().lines()
        if self.ema_decay and (half_life := math.log(0.5) / math.log(self.ema_decay)) > self.total_steps / 5:
            lines.append(
                f"warning: the average of the weights has a half-life of {half_life:,.0f} steps, of a training of "
                f"{self.total_steps:,}: much of it will be their start; lower --ema-decay, or turn it off with 0"
            )
        return lines
