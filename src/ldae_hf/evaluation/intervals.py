"""What a mean over a few seeds can say: t-intervals, and the smallest effect that so many seeds could have shown."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from scipy.optimize import brentq
from scipy.stats import nct, norm, t


class Interval(NamedTuple):
    """A mean over `count` values and half the width of its interval; None where one value, or none, has no spread."""

    mean: float
    half_width: float | None
    count: int


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of independent runs and its interval by Student's t with n - 1 degrees of freedom.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("There is no mean of no values.")
    count = len(values)
    if count == 1:
        return Interval(float(values[0]), None, 1)
    half_width = float(t.ppf((1 + confidence) / 2, count - 1)) * stdev(values) / math.sqrt(count)
    return Interval(mean(values), half_width, count)


def mean_cell(values: Sequence[float]) -> str:
    """As `41.4 ±0.6 (3)`: the mean, half its 95 % interval where there are several values, their number."""
    if not values:
        return ""
    found = t_interval(values)
    spread = "" if found.half_width is None else f" ±{found.half_width:.1f}"
    return f"{found.mean:.1f}{spread} ({found.count})"


def paired_difference(
    first: Mapping[int, float], second: Mapping[int, float], confidence: float = 0.95
) -> Interval | None:
    """`second` minus `first` over the seeds that both have, and the t-interval of the differences; None without any.

    Args:
        first, second: values by seed.
    """
    differences = [second[seed] - first[seed] for seed in first if seed in second]
    return t_interval(differences, confidence) if differences else None


def wilson_interval(top1: float, images: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's binomial interval of an accuracy on so many test images: the chance of these images, of nothing else.

    It says nothing about seeds: another training of the same recipe may lie outside it.

    Args:
        top1: in percent, as the two ends are that it returns.

    Raises:
        ValueError: no image, or an accuracy outside 0 ... 100.
    """
    if images < 1 or not 0 <= top1 <= 100:
        raise ValueError(f"An accuracy of {top1} % on {images} images is none; it needs 0 ... 100 % of at least one.")
    z, share = float(norm.ppf((1 + confidence) / 2)), top1 / 100
    spread = z * math.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    middle, scale = share + z**2 / (2 * images), 1 + z**2 / images
    low, high = (100 * (middle + sign * spread) / scale for sign in (-1, 1))
    return max(low, 0.0), min(high, 100.0)


def smallest_effect(std: float, count: int, power: float = 0.8, confidence: float = 0.95) -> float:
    """The smallest true mean that a two-sided one-sample t-test of `count` values would find, sign included, with this
    probability.

    For a comparison of two recipes the values are the seed-paired differences. Exact, by the noncentral t.

    Args:
        std: standard deviation of the values, in whose unit the effect is.
        count: seeds, at least two.

    Raises:
        ValueError: fewer than two values, a negative std, or a power that is not between 1 - confidence and 1.
    """
    if count < 2 or std < 0 or not 1 - confidence < power < 1:
        raise ValueError(
            f"A smallest effect needs two values or more, not {count}, a std of at least 0, not {std}, and a power "
            f"between {1 - confidence:g} and 1, not {power}."
        )
    threshold = float(t.ppf((1 + confidence) / 2, count - 1))

    def missing(shift: float) -> float:
        return float(nct.sf(threshold, count - 1, shift)) - power

    shift = brentq(missing, 1e-9, 6 * threshold)  # a mean of that size is as good as never missed
    return shift * std / math.sqrt(count)
