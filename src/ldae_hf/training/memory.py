"""The bytes that a device holds while it trains a model. Arithmetic; the tests compare it with what autograd keeps.

N tokens · D width · K latent values of a token · P values of a patch
"""

import math
from typing import NamedTuple

from ..configuration_ldae import LDAEConfig
from .costs import Parameters, ends


LIBRARIES = 2 * 2**30  # bytes that CUDA, cuBLAS, NCCL and a fragmented allocator take; assumed


class Layout(NamedTuple):
    """How a model lies on devices: `sharded` over them by FSDP2 or whole on each (DDP), and whether activations are
    computed again in the backward pass, where they are needed."""

    sharded: bool
    checkpointing: bool

    @property
    def name(self) -> str:
        return ("FSDP2" if self.sharded else "DDP") + (" + recompute" if self.checkpointing else "")

    @property
    def options(self) -> str:
        """What asks for it."""
        asked = ["FSDP2, examples/accelerate/fsdp2_8gpu.yaml,"] if self.sharded else []
        return " ".join(asked + (["--gradient-checkpointing"] if self.checkpointing else [])) or "DDP"


LAYOUTS = [Layout(sharded, checkpointing) for sharded in (False, True) for checkpointing in (False, True)]


def attention_of(device_type: str, mixed_precision: str) -> str:
    """The attention that a training takes where none is named: SDPA, but for bf16 on a CPU, where its backward pass is
    slow, the one that is written out."""
    return "eager" if device_type == "cpu" and mixed_precision == "bf16" else "sdpa"


def block_bytes(config: LDAEConfig, mixed_precision: str, attention: str, device_type: str, width: int = 0) -> int:
    """Bytes that one block keeps of an image for its backward pass.

    Args:
        width: of the block; default the encoder's.
        mixed_precision: `"bf16"` or `"no"`. attention: `"eager"`, or a kernel that keeps no (N,N) weights.
        device_type: outside of CPUs, autocast widens to fp32 what softmax gives and what addcmul takes.
    """
    width, tokens = width or config.hidden_size, config.num_patches + config.num_global_tokens
    heads = config.num_attention_heads * width // config.hidden_size
    low = 2 if mixed_precision == "bf16" else 4
    gated = low if device_type == "cpu" else 4
    token = 2 * 4 * width  # the residual stream before attention and MLP, fp32
    token += 2 * 2 * 4  # mean and deviation of their norms
    token += low * 8 * width  # normalised and modulated states of both; q, k, v and the context
    token += low * 2 * int(width * config.mlp_ratio)  # before and after the activation
    token += gated * 2 * width  # what attention and MLP add to the stream, before its gates
    if attention == "eager":
        token += heads * tokens * (low if gated == low else 4 + low)  # the weights, and what softmax gave in fp32
    else:
        token += heads * 4  # the logarithm of the softmax's sum
    hidden = config.conditioning_hidden_size or config.hidden_size
    condition = low * (8 * width + 2 * hidden) + (gated - low) * 2 * width  # six chunks, two times 1 + scale; the gates
    return tokens * token + math.prod(config.timesteps_shape) * condition


def activation_bytes(
    config: LDAEConfig, mixed_precision: str, attention: str, device_type: str, checkpointing: bool
) -> int:
    """Bytes that an image keeps for the backward pass, of all blocks, or with `checkpointing` their inputs and all of
    one; of the patch embedding, the head and the loss."""
    patches, (shown, answered) = config.num_patches, ends(config)
    tokens = patches + config.num_global_tokens
    low, width = 2 if mixed_precision == "bf16" else 4, config.decoder_width
    stacks = ((config.num_hidden_layers, config.hidden_size), (config.decoder_num_hidden_layers, width))
    blocks = [block_bytes(config, mixed_precision, attention, device_type, of_block) for _, of_block in stacks]
    if checkpointing:
        kept = sum(count * 4 * tokens * of_block for count, of_block in stacks) + max(blocks)
    else:
        kept = sum(count * block for (count, _), block in zip(stacks, blocks, strict=True))
    # Stream, norm, normalised, modulated; and the condition of the last norm.
    head = patches * (4 * width + 8 + low * 2 * width) + math.prod(config.timesteps_shape) * low * 6 * width
    residues = 4 * patches * (answered + (config.latent_dim if answered != config.latent_dim else 0))
    return kept + low * patches * shown + head + residues


def batch_bytes(config: LDAEConfig) -> int:
    """Bytes of an image's inputs and outputs: pixels as uint8 and fp32; tokens, noise, their sum and the answer."""
    pixels = config.num_channels * config.image_size**2
    return pixels * (1 + 4) + 4 * config.num_patches * (3 * config.latent_dim + ends(config)[1])


def device_memory(
    config: LDAEConfig,
    parameters: Parameters,
    layout: Layout,
    *,
    batch_size: int,
    processes: int,
    ema: bool,
    mixed_precision: str,
    device_type: str,
) -> dict[str, float]:
    """Bytes on one device while it trains, by what they hold.

    On a CPU their sum was 0.98 to 1.24 of the measured peak of a step, most above it where weights prevail: as the
    backward pass makes gradients, activations go. A compiled model keeps fewer of those.

    Args:
        batch_size: images of a forward pass. processes: devices that train together.
    """
    weights = 4 * parameters.total / (processes if layout.sharded else 1)
    parts = {"weights": weights, "gradients": weights, "AdamW's moments": 2 * weights}
    if ema:
        parts["EMA"] = weights
    if layout.sharded:  # what is in no block stays; the weights of two blocks and the gradients of one come and go
        parts["gathered"] = 4 * (parameters.total - parameters.blocks + 3 * parameters.block)
    else:
        if mixed_precision == "bf16":
            parts["bf16 copies"] = 2 * parameters.matrices
    attention = attention_of(device_type, mixed_precision)
    kept = activation_bytes(config, mixed_precision, attention, device_type, layout.checkpointing)
    parts["activations"] = batch_size * (kept + batch_bytes(config))
    if device_type != "cpu":
        parts["libraries"] = LIBRARIES
    return parts


def checkpoint_bytes(parameters: Parameters, ema: bool) -> int:
    """Bytes of a checkpoint's tensors: weights, AdamW's moments and the EMA in fp32; buffers are small."""
    return 4 * parameters.total * (4 if ema else 3)
