"""What features are: a feature map is a callable, uint8 crops (B,C,H,W) and sample ids (B,) -> (B,D), with a `name` for
tables and a `fingerprint` of all that its values depend on. An encoder's pooled tokens are one (encoders), and so is
each floor (floors.py).
"""

import json
from hashlib import sha256
from typing import Protocol

import torch
from torch import nn

from ..configuration_ldae import LDAEConfig
from ..modeling_ldae import LDAEModel


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class FeatureMap(Protocol):
    name: str
    fingerprint: str

    def __call__(self, pixels: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor: ...


def state_fingerprint(model: LDAEModel) -> str:
    """sha256 (hex) of an l-DAE encoder's architecture and of its parameters and buffers."""
    return weights_fingerprint({key: getattr(model.config, key) for key in sorted(LDAEConfig.__annotations__)}, model)


def weights_fingerprint(architecture: dict, model: nn.Module) -> str:
    """sha256 (hex) of an architecture, JSON values, and of the parameters and buffers of a model."""
    digest = sha256(json.dumps(architecture).encode())
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
