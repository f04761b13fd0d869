"""The Inception-v3 of FID: the TensorFlow network of 2015-12-05, by whose features published FIDs are measured.

It is not torchvision's: its average pools do not count the padding, its last block has a maximum pool, and its images
are resized as TensorFlow 1 did. The weights are not ours to ship: download them once and convert them (a PyTorch
checkpoint is a pickle, and ldae reads safetensors only):

    curl -LO https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth
    ldae weights convert pt_inception-2015-12-05-6726825d.pth --output inception.safetensors

The download has 95,628,359 bytes and the sha256 6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..training.perceptual import read_tensors


SIDE = 299
FEATURES = 2048
NUM_CLASSES = 1008  # torchvision's network has the same tensors but for these: 1000
GET_INCEPTION = (
    "download https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth and run `ldae weights convert pt_inception-2015-12-05-6726825d.pth --output "
    "inception.safetensors`."
)

# A convolution is (width, rows, columns of its kernel), with a stride after these if it is not 1. It keeps the sides,
# but with a stride has no padding. A branch is a chain of them, after a pool if there is one; `ENDS` are two side by
# side, at a chain's end. Names in the state dict follow: branch5x5_1, branch5x5_2; branch3x3_1, branch3x3_2a, ..._2b.
ENDS = [(384, 1, 3), (384, 3, 1)]


def _block_a(pool: int) -> dict:
    return {
        "branch1x1": [(64, 1, 1)],
        "branch5x5": [(48, 1, 1), (64, 5, 5)],
        "branch3x3dbl": [(64, 1, 1), (96, 3, 3), (96, 3, 3)],
        "branch_pool": ["average", (pool, 1, 1)],
    }


def _block_c(width: int) -> dict:
    row, column = (width, 1, 7), (width, 7, 1)
    return {
        "branch1x1": [(192, 1, 1)],
        "branch7x7": [(width, 1, 1), row, (192, 7, 1)],
        "branch7x7dbl": [(width, 1, 1), column, row, column, (192, 1, 7)],
        "branch_pool": ["average", (192, 1, 1)],
    }


def _block_e(pool: str) -> dict:
    return {
        "branch1x1": [(320, 1, 1)],
        "branch3x3": [(384, 1, 1), ENDS],
        "branch3x3dbl": [(448, 1, 1), (384, 3, 3), ENDS],
        "branch_pool": [pool, (192, 1, 1)],
    }


BLOCKS = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": {
        "branch3x3": [(384, 3, 3, 2)],
        "branch3x3dbl": [(64, 1, 1), (96, 3, 3), (96, 3, 3, 2)],
        "branch_pool": ["reduce"],
    },
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": {
        "branch3x3": [(192, 1, 1), (320, 3, 3, 2)],
        "branch7x7x3": [(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2)],
        "branch_pool": ["reduce"],
    },
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("max"),
}
POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "max": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "reduce": lambda x: F.max_pool2d(x, 3, stride=2),
}


class Convolution(nn.Module):
    """Convolution, BatchNorm with the running statistics, ReLU."""

    def __init__(self, before: int, width: int, rows: int, columns: int, stride: int = 1, padding: bool = True):
        super().__init__()
        padding = (rows // 2, columns // 2) if padding and stride == 1 else 0
        self.conv = nn.Conv2d(before, width, (rows, columns), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu_(self.bn(self.conv(x)))


class Block(nn.Module):
    """Branches beside each other, joined along the channels. `width` is what comes out."""

    def __init__(self, before: int, branches: dict):
        super().__init__()
        self.branches, self.width = [], 0  # of each, the steps: a pool's name, or names of convolutions
        for branch, chain in branches.items():
            width, steps = before, [step for step in chain if isinstance(step, str)]
            convolutions = chain[len(steps) :]  # a pool comes first
            for number, step in enumerate(convolutions, start=1):
                if step is ENDS:
                    together = {f"{branch}_{number}a": step[0], f"{branch}_{number}b": step[1]}
                else:
                    together = {branch if len(convolutions) == 1 else f"{branch}_{number}": step}
                for name, convolution in together.items():
                    self.add_module(name, Convolution(width, *convolution))
                steps.append(list(together))
                width = sum(convolution[0] for convolution in together.values())
            self.branches.append(steps)
            self.width += width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for steps in self.branches:
            y = x
            for step in steps:
                y = POOLS[step](y) if isinstance(step, str) else torch.cat([self.get_submodule(n)(y) for n in step], 1)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


class Inception(nn.Module):
    """uint8 images (B,3,H,W) of any size -> the 2048 values (B,2048) of the last average pool, frozen.

    As constructed its weights are random; [`Inception.from_file`] reads the published ones.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 3, 2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, 3, padding=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, 3, padding=False)
        width = 192
        for name, branches in BLOCKS.items():
            block = Block(width, branches)
            self.add_module(name, block)
            width = block.width
        self.requires_grad_(False).eval()

    @classmethod
    def from_file(cls, file: str | Path) -> "Inception":
        """The network with the weights of a safetensors file.

        Raises:
            ValueError: the file is not there or holds something else; the message says how to get it.
        """
        model = cls()
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if value.ndim}
        # The classifier is not used, but its classes tell this network from others of the same shapes.
        classifier = {"fc.weight": (NUM_CLASSES, FEATURES)}
        state = read_tensors(Path(file), shapes | classifier, GET_INCEPTION)
        model.load_state_dict(model.state_dict() | {name: state[name] for name in shapes})
        return model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = (resize_as_tensorflow_1(pixels.float(), SIDE) - 128) / 128
        with torch.backends.cudnn.flags(allow_tf32=False):  # which a GPU would round convolutions to
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B,64,147,147)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(POOLS["reduce"](x)))  # (B,192,71,71)
            x = POOLS["reduce"](x)
            for name in BLOCKS:
                x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))


def resize_as_tensorflow_1(images: torch.Tensor, side: int) -> torch.Tensor:
    """(B,C,H,W) -> (B,C,side,side), bilinear: pixel i is read at i · H / side, with neither half-pixel centres nor
    aligned corners, from its two neighbours alone, however much smaller the result is."""
    for dim in (-1, -2):
        size = images.shape[dim]
        place = torch.arange(side, dtype=torch.float32, device=images.device) * (size / side)
        lower = place.long()
        upper = (lower + 1).clamp(max=size - 1)
        share = (place - lower) if dim == -1 else (place - lower)[:, None]
        low, high = images.index_select(dim, lower), images.index_select(dim, upper)
        images = low + (high - low) * share
    return images
