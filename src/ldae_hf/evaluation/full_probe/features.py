"""What the probe stands on: the pooled tokens of an encoder, or one of its floors."""

from dataclasses import dataclass

import torch

from ...training.data import ImageSource
from ..encoders import PooledFeatures, open_encoder
from ..feature_maps import FeatureMap
from ..floors import build_floors


NOISES = ("clean", "fresh", "frozen")


@dataclass(frozen=True)
class ProbedFeatures:
    """A feature map, and what the result says of it.

    Attributes:
        compute: uint8 (B,C,image_size,image_size), ids (B,) -> (B,dim).
        name: in tables. stamp: all that the features depend on. timestep: None where there is none.
    """

    compute: FeatureMap
    name: str
    dim: int
    image_size: int
    preprocessing: str
    timestep: int | None
    stamp: dict


def choose_features(
    encoder,
    source: ImageSource,
    *,
    floor: str | None = None,
    layer: int | str = "last",
    pool: str = "mean",
    noise: str = "clean",
    seed: int = 0,
    **opening,
) -> ProbedFeatures:
    """The features of an encoder, or with `floor` of that one of its floors.

    Args:
        encoder, opening: as for [`open_encoder`]. source: training images, for floors that are fitted.
        noise: `"fresh"` noise is frozen, too, by ids that the caller makes different in every epoch.

    Raises:
        ValueError: from the encoder, or there is no such noise or floor.
    """
    if noise not in NOISES:
        raise ValueError(f"noise={noise!r} must be one of {', '.join(NOISES)}.")
    opened = open_encoder(encoder, noise="frozen" if noise == "fresh" else noise, seed=seed, **opening)
    if floor is None:
        chosen = PooledFeatures(opened, layer, pool, name=opened.name)
    else:
        [chosen] = build_floors([floor], opened, source, layer=layer, pool=pool, seed=seed)
    stamp = getattr(chosen, "protocol", {"floor": chosen.name, "fingerprint": chosen.fingerprint})
    if noise == "fresh" and "noise" in stamp:
        stamp = stamp | {"noise": f"fresh for each image and epoch, in the test frozen by sample id, seed {seed}"}
    blank = torch.zeros(1, 3, opened.image_size, opened.image_size, dtype=torch.uint8, device=opened.device)
    with torch.no_grad():
        dim = chosen(blank, torch.zeros(1, dtype=torch.int64)).shape[1]
    return ProbedFeatures(
        compute=chosen,
        name=chosen.name,
        dim=dim,
        image_size=opened.image_size,
        preprocessing=f"centre crop, bicubic; mean {opened.mean}, std {opened.std}",
        timestep=opened.facts.get("timestep"),
        stamp=stamp,
    )
