"""Perceptual distances for the convolutional autoencoder (latent diffusion's "VQGAN", section 4.2 of the paper).

Two of them: LPIPS, which stands on VGG-16 trained with ImageNet's labels, and the features of a small network that is
trained here. Both compare unit-normalised channel vectors. That either one has seen labels is the point: the paper's
step "remove perceptual loss" takes away a supervised signal, and random labels are the control for it.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..progress import progress_bar
from .sampling import random_generator


# VGG-16's convolutions by their number in torchvision's `features`, with their widths; a max-pooling opens each stage
# but the first, and the features are taken after the ReLU that ends it: relu1_2, 2_2, 3_3, 4_3, 5_3.
VGG16_STAGES = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
LPIPS_SHIFT = (-0.030, -0.088, -0.188)
LPIPS_SCALE = (0.458, 0.448, 0.450)
LABEL_FEATURES = "label_features"  # .safetensors and .json
EPSILON = 1e-10  # added to a channel vector's norm, as in LPIPS v0.1
_GET_LPIPS = (
    "download https://download.pytorch.org/models/vgg16-397923af.pth and vgg.pth of LPIPS v0.1 (lpips/weights/v0.1 of "
    "github.com/richzhang/PerceptualSimilarity), then run `ldae weights convert FILE --output "
    "{folder}/vgg16.safetensors` with the first and `ldae weights convert FILE --output {folder}/lpips.safetensors` "
    "with the second."
)


def unit_squared_difference(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(B,C,H,W) features of two images -> (B,C,H,W), squared differences of their unit-normalised channel vectors.

    In float32 at least: EPSILON is nothing in half precision.
    """
    dtype = torch.promote_types(first.dtype, torch.float32)
    with torch.autocast(first.device.type, enabled=False):
        first, second = (
            # Unlike sqrt(sum(x²)), this norm has a finite gradient where ReLU left nothing but zeros.
            features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPSILON)
            for features in (first.to(dtype), second.to(dtype))
        )
        return (first - second).square()


def _check_pair(first: torch.Tensor, second: torch.Tensor, smallest: int) -> None:
    """Raises ValueError unless both are (B,3,H,W) with H and W of at least `smallest` pixels."""
    if first.shape != second.shape or first.ndim != 4 or first.shape[1] != 3 or min(first.shape[2:]) < smallest:
        raise ValueError(
            f"A perceptual distance compares two batches (B,3,H,W) of one shape, sides of {smallest} pixels or more, "
            f"not {tuple(first.shape)} and {tuple(second.shape)}."
        )


def read_tensors(file: Path, shapes: dict[str, tuple[int, ...]], remedy: str) -> dict[str, torch.Tensor]:
    """The named tensors as float32, each checked by its shape in the header first; others are ignored.

    Raises:
        ValueError: the file is not there, not safetensors, or has not these tensors in these shapes.
    """
    if not file.is_file():
        raise ValueError(f"There is no file {file}; {remedy}")
    try:
        with safe_open(file, "pt") as tensors:
            names = set(tensors.keys())
            for name, shape in shapes.items():
                if name not in names:
                    raise ValueError(f"{file} has no tensor {name!r}; {remedy}")
                found = tuple(tensors.get_slice(name).get_shape())
                if found != shape:
                    raise ValueError(f"In {file} the tensor {name!r} has the shape {found}, not {shape}; {remedy}")
            return {name: tensors.get_tensor(name).float() for name in shapes}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file, or damaged ({error}); {remedy}") from error


class LPIPS(nn.Module):
    """The learned perceptual distance LPIPS v0.1 on VGG-16 (Zhang et al. 2018), frozen, without torchvision.

    As constructed its weights are random; [`LPIPS.from_folder`] reads the published ones. Parameters take no gradient
    and there is nothing that `train()` would change.
    """

    def __init__(self):
        super().__init__()
        self.features = nn.ModuleDict()  # keys and shapes of torchvision's VGG-16: features.0.weight ...
        width = 3
        for number, next_width in (convolution for stage in VGG16_STAGES for convolution in stage):
            self.features[str(number)] = nn.Conv2d(width, next_width, 3, padding=1)
            width = next_width
        # One non-negative weight per channel and stage.
        self.channel_weights = nn.ParameterList(torch.rand(stage[-1][1]) for stage in VGG16_STAGES)
        self.register_buffer("shift", torch.tensor(LPIPS_SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(LPIPS_SCALE)[:, None, None])
        self.requires_grad_(False).eval()

    @classmethod
    def from_folder(cls, folder: str | Path) -> "LPIPS":
        """LPIPS with the weights in `folder`: `vgg16.safetensors` (torchvision's keys; those of the classifier are
        ignored) and `lpips.safetensors` (`lin0.model.1.weight` ... `lin4.model.1.weight`).

        Raises:
            ValueError: a file is missing (the message says how to get it) or holds something else, or a channel weight
                is negative.
        """
        folder = Path(folder)
        remedy, model = _GET_LPIPS.format(folder=folder), cls()
        own = {name: value for name, value in model.state_dict().items() if name.startswith("features.")}
        state = read_tensors(folder / "vgg16.safetensors", {key: tuple(own[key].shape) for key in own}, remedy)
        shapes = {f"lin{i}.model.1.weight": (1, len(w), 1, 1) for i, w in enumerate(model.channel_weights)}
        linear = read_tensors(folder / "lpips.safetensors", shapes, remedy)
        for i, (name, weight) in enumerate(linear.items()):
            if not (weight >= 0).all():  # NaN fails too
                raise ValueError(f"{folder / 'lpips.safetensors'}: {name!r} has negative weights; {remedy}")
            state[f"channel_weights.{i}"] = weight.flatten()
        model.load_state_dict(state | {"shift": model.shift, "scale": model.scale})
        return model

    def taps(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """(B,3,H,W) in [-1, 1] -> features (B,C,H/2^i,W/2^i) of the five stages."""
        hidden, taps = (pixel_values - self.shift) / self.scale, []
        for i, stage in enumerate(VGG16_STAGES):
            hidden = F.max_pool2d(hidden, 2) if i else hidden
            for number, _ in stage:
                hidden = F.relu(self.features[str(number)](hidden))
            taps.append(hidden)
        return taps

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Two batches (B,3,H,W) in [-1, 1], sides of 16 pixels or more -> distances (B,), 0 for equal images.

        Raises:
            ValueError: the shapes differ or are too small.
        """
        _check_pair(first, second, smallest=16)
        return sum(
            (weight[:, None, None] * unit_squared_difference(a, b)).sum(dim=1).mean(dim=(1, 2))
            for weight, a, b in zip(self.channel_weights, self.taps(first), self.taps(second), strict=True)
        )


class LabelFeatures(nn.Module):
    """A small VGG that learns to classify and then serves as a perceptual distance: LPIPS at the size of a desk.

    A stage is two 3x3 convolutions, each with a ReLU; between stages a max-pooling halves the sides. Features are
    taken at each stage's end and weigh the same. There is no normalisation layer: training and use are one function.

    Args:
        num_classes: classes of the head, which the distance does not use.
        widths: channels of the stages.

    Raises:
        ValueError: an argument is not positive.
    """

    def __init__(self, num_classes: int, widths: tuple[int, ...] = (32, 64, 128)):
        super().__init__()
        if num_classes < 1 or not widths or min(widths) < 1:
            raise ValueError(f"LabelFeatures needs positive num_classes and widths, not {num_classes} and {widths}.")
        self.num_classes, self.widths = num_classes, tuple(widths)
        self.stages = nn.ModuleList(
            nn.ModuleList((nn.Conv2d(before, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)))
            for before, width in zip((3, *self.widths), self.widths, strict=False)
        )
        self.head = nn.Linear(self.widths[-1], num_classes)
        for convolution in (convolution for stage in self.stages for convolution in stage):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            nn.init.zeros_(convolution.bias)

    def taps(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """(B,3,H,W) in [-1, 1] -> features (B,widths[i],H/2^i,W/2^i) of each stage."""
        hidden, taps = pixel_values, []
        for i, stage in enumerate(self.stages):
            hidden = F.max_pool2d(hidden, 2) if i else hidden
            for convolution in stage:
                hidden = F.relu(convolution(hidden))
            taps.append(hidden)
        return taps

    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) in [-1, 1] -> class scores (B,num_classes)."""
        return self.head(self.taps(pixel_values)[-1].mean(dim=(2, 3)))

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Two batches (B,3,H,W) in [-1, 1], sides of 8 pixels or more -> distances (B,) in 0 ... 2.

        Raises:
            ValueError: the shapes differ or are too small.
        """
        _check_pair(first, second, smallest=8)
        pairs = list(zip(self.taps(first), self.taps(second), strict=True))
        return sum(unit_squared_difference(a, b).sum(dim=1).mean(dim=(1, 2)) for a, b in pairs) / len(pairs)

    def save(self, folder: str | Path) -> None:
        """Writes `label_features.safetensors` and `label_features.json` into `folder`, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / f"{LABEL_FEATURES}.safetensors")
        facts = {"num_classes": self.num_classes, "widths": list(self.widths)}
        (folder / f"{LABEL_FEATURES}.json").write_text(json.dumps(facts, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "LabelFeatures":
        """The features that `save` wrote, frozen.

        Raises:
            ValueError: a file is missing, unreadable or does not fit the other.
        """
        folder = Path(folder)
        remedy = "train the label features again."
        file = folder / f"{LABEL_FEATURES}.json"
        try:
            facts = json.loads(file.read_text())
            model = cls(facts["num_classes"], tuple(facts["widths"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} does not describe label features ({error!r}); {remedy}") from error
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        model.load_state_dict(read_tensors(folder / f"{LABEL_FEATURES}.safetensors", shapes, remedy))
        return model.requires_grad_(False).eval()


def random_label(seed: int, sample_id: int, num_classes: int) -> int:
    """A label in 0 ... num_classes - 1 that knows nothing of the image: always the same for one sample and seed."""
    return int(random_generator(seed, "label", sample_id=sample_id).integers(num_classes))


def train_label_features(
    loader_of_epoch: Callable[[int], Iterable[dict]],
    num_classes: int,
    *,
    widths: tuple[int, ...] = (32, 64, 128),
    epochs: int = 3,
    learning_rate: float = 1e-3,
    device: str | torch.device = "cpu",
    random_labels: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> tuple[LabelFeatures, dict]:
    """Trains `LabelFeatures` to classify, with AdamW and cross-entropy, in bfloat16 autocast.

    The learning rate is constant in the first epoch, whose length is known only when it is over, and from there on
    falls along a cosine to 0. torch's own random state is left as it was.

    Args:
        loader_of_epoch: given the epoch, yields batches with `pixel_values` uint8 (B,3,H,W), `labels` and `sample_ids`
            (B,). It shuffles, if anything does.
        num_classes, widths: as in `LabelFeatures`.
        random_labels: learn a fixed random label for each sample instead of its own, the control for what labels bring.
        seed: of the initialisation and of random labels.

    Returns:
        The features, frozen, and figures of the last epoch: `train_top1` in percent and `loss`, both measured while the
        weights still moved, and the number of `images`; with `epochs`, `learning_rate`, `random_labels`, `seed` and the
        `seconds` that it took.

    Raises:
        ValueError: no epoch or no batch, a label that is missing or out of range, or a loss that is not finite.
    """
    if epochs < 1:
        raise ValueError(f"Label features need at least one epoch, not {epochs}.")
    began, device = time.monotonic(), torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LabelFeatures(num_classes, widths)
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    steps_per_epoch = math.inf
    for epoch in range(epochs):
        images, correct, total_loss, step = 0, 0, 0.0, 0
        name = f"label features {epoch + 1}/{epochs}"
        for batch in progress_bar(loader_of_epoch(epoch), desc=name, disable=not progress):
            if random_labels:
                labels = torch.tensor([random_label(seed, int(i), num_classes) for i in batch["sample_ids"]])
            else:
                labels = batch["labels"]
                check_labels(labels, batch["sample_ids"], num_classes)
            labels = labels.to(device)
            pixel_values = batch["pixel_values"].to(device, torch.float32) / 127.5 - 1
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
            done = min(1.0, max(0.0, epoch - 1 + step / steps_per_epoch) / max(1, epochs - 1))
            optimizer.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * done)) / 2
            with torch.autocast(device.type, dtype=torch.bfloat16):
                logits = model.logits(pixel_values)
            loss = F.cross_entropy(logits.float(), labels)
            value = loss.item()
            if not math.isfinite(value):
                raise ValueError(
                    f"The loss of the label features is {value} in step {step} of epoch {epoch}; choose a smaller "
                    f"learning rate than {learning_rate:g}."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            images, step, total_loss = images + len(labels), step + 1, total_loss + value * len(labels)
            correct += int((logits.argmax(dim=1) == labels).sum())
        if not step:
            raise ValueError(f"The loader of epoch {epoch} has no batch to train the label features on.")
        steps_per_epoch = step
    figures = {
        "train_top1": 100 * correct / images,
        "loss": total_loss / images,
        "images": images,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "random_labels": random_labels,
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
    }
    return model.requires_grad_(False).eval(), figures


def check_labels(labels: torch.Tensor, sample_ids: torch.Tensor, num_classes: int) -> None:
    """Raises ValueError at the first label that is not a class."""
    for label, sample_id in zip(labels.tolist(), sample_ids.tolist(), strict=True):
        if not 0 <= label < num_classes:
            missing = "has no label" if label < 0 else f"has the label {label}, not one of {num_classes} classes"
            raise ValueError(f"Sample {sample_id} {missing}; label features need a labelled data set.")
