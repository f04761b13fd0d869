"""What the Fréchet distance sees of an image: Inception's features, or those of a classifier trained on a data set's
labels (`ldae extractor train`). Distances of different extractors cannot be compared.
"""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ..manifest import check_folder
from ..training.extractor import TRAINING
from ..training.perceptual import LABEL_FEATURES, LabelFeatures
from .inception import FEATURES, GET_INCEPTION, SIDE, Inception


class Extractor(Protocol):
    """A feature map (feature_maps.py) that says what it is; any object of this form goes wherever an extractor does.

    `protocol` holds JSON values, and stands beside each result. `fingerprint` names all that the features depend on.

        class MeanColour:
            name, dim = "mean colour", 3
            protocol = {"network": "none: the mean of each colour channel, in 0 ... 255"}
            fingerprint = json.dumps(protocol)

            def __call__(self, pixels, sample_ids):  # uint8 (B,3,H,W), (B,) -> (B,dim)
                return pixels.float().mean(dim=(2, 3))
    """

    name: str
    dim: int
    protocol: dict
    fingerprint: str

    def __call__(self, pixels: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor: ...


class NetworkFeatures:
    """The features that a function takes from a frozen network, which follows the images from device to device.

    Raises:
        ValueError: on a call with anything but uint8 images (B,3,H,W).
    """

    def __init__(self, name: str, network: nn.Module, dim: int, features: Callable, protocol: dict):
        self.name, self.network, self.dim, self.features = name, network, dim, features
        weights = tensors_fingerprint({name: value for name, value in network.state_dict().items() if value.ndim})
        self.protocol = protocol | {"weights": weights, "dtype": "float32"}
        self.fingerprint = json.dumps(self.protocol, sort_keys=True)

    def __call__(self, pixels: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(
                f"{self.name} sees uint8 images (B,3,H,W), not {pixels.dtype} of {tuple(pixels.shape)}; bring values "
                "to 0...255 and round them."
            )
        return self.features(self.network.to(pixels.device), pixels)


def load_extractor(source: str | Path | Extractor, device: str | torch.device | None = None) -> Extractor:
    """The extractor that `source` names.

    Args:
        source: a .safetensors file with the weights of FID's Inception; a folder of `ldae extractor train`; or an
            [`Extractor`], which comes back as it is.
        device: of the network; by default the GPU if there is one.

    Raises:
        ValueError: it is neither, or damaged; the message says how to get one.
    """
    if not isinstance(source, (str, Path)):
        return source
    source, device = Path(source), device or ("cuda" if torch.cuda.is_available() else "cpu")
    if source.suffix == ".safetensors":
        return inception_features(Inception.from_file(source).to(device))
    if (source / f"{LABEL_FEATURES}.json").is_file():
        return label_features(source, device)
    raise ValueError(
        f"{source} is no extractor. For FID's Inception give a .safetensors file: {GET_INCEPTION} For images that are "
        "nothing like ImageNet's, or without a download, train one on a data set's labels: `ldae extractor train "
        "--dataset DATASET --output-dir FOLDER`, and give the folder."
    )


def inception_features(network: Inception) -> NetworkFeatures:
    """The features of FID."""
    protocol = {
        "network": "Inception-v3, TensorFlow's of 2015-12-05",
        "layer": f"the last average pool, {FEATURES} values",
        "resize": f"to {SIDE}x{SIDE}, TensorFlow 1's bilinear: no half-pixel centres, aligned corners or antialiasing",
    }
    return NetworkFeatures("Inception-v3", network, FEATURES, Inception.__call__, protocol)


def label_features(folder: Path, device: str | torch.device) -> NetworkFeatures:
    """The features of a classifier that `ldae extractor train` wrote.

    Raises:
        ValueError: a file is missing, or not as it was written.
    """
    check_folder(folder, needed=(TRAINING,))
    network, training = LabelFeatures.load(folder).to(device), json.loads((folder / TRAINING).read_text())
    keys = ("dataset", "train_split", "test_split", "test_top1", "image_size")
    if missing := [key for key in keys if key not in training]:
        raise ValueError(f"{folder / TRAINING} has no {missing[0]}: it is not of `ldae extractor train`; train one.")
    side, dim = training["image_size"], network.widths[-1]

    def features(network: LabelFeatures, pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.float()
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        return network.taps(pixels / 127.5 - 1)[-1].mean(dim=(2, 3))

    protocol = {
        "network": f"a classifier of {network.num_classes} classes, widths {', '.join(map(str, network.widths))}",
        "training": {key: training[key] for key in keys},
        "layer": f"mean over places of the last stage, {dim} values",
        "resize": f"to {side}x{side} where the sides differ, bilinear with antialiasing",
    }
    name = f"classifier of {training['dataset'] or 'a data set'}"
    return NetworkFeatures(name, network, dim, features, protocol)


def tensors_fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 (hex) over names, types, shapes and values of tensors, in the order of their names."""
    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
