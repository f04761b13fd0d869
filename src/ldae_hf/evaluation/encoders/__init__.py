"""Frozen image encoders of three libraries behind one form: `open_encoder` finds out which library's it is given, and
`PooledFeatures` makes one feature vector of an image.
"""

from .base import NOISES, Encoder
from .ldae import load_ldae
from .opening import open_encoder
from .pooling import POOLS, PooledFeatures, pooled_together


__all__ = ["NOISES", "POOLS", "Encoder", "PooledFeatures", "load_ldae", "open_encoder", "pooled_together"]
