"""Where the noise of a generated image comes from: a seed and the image's number, and nothing else."""

import hashlib
from collections.abc import Iterable

import torch


def noise_generators(seed: int, numbers: Iterable[int]) -> list[torch.Generator]:
    """A generator on the CPU for each image, so that an image is the same in any batch, process and set.

    PyTorch's generator on the CPU takes 32 bits of a seed, so that hashes of 50,000 numbers would meet at times. Here
    the seed's hash is where counting begins: the images of one seed never share their noise.
    """
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4])
    return [torch.Generator().manual_seed((start + number) % 2**32) for number in numbers]
