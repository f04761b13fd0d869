"""The rule by which a claim of the paper holds here or does not. It was written before the runs that it judges.

A claim is about two rows, measured here with the same seeds. Where the paper's numbers differ by a point or more, it is
a *direction*; where they differ by less, it is that both are *equal*. The values are seed-paired differences d_i in
points of the same number, row minus reference, and n is how many seeds both have.

- Direction: the 95 % t-interval of the mean of d lies wholly on the paper's side of 0: `holds`; wholly on the other
  side: `reversed`; else `within noise`, with the smallest effect that n seeds of this spread find in 80 of 100 cases.
- Equal: two one-sided t-tests at 5 % each, against -2 and +2 points (the 90 % interval lies within ±2): `holds`; the
  95 % interval lies wholly outside ±2: `reversed`; else `within noise`.
- No claim in the paper: `higher`, `lower` or `within noise`, by the 95 % interval and 0.
- Fewer than three seeds in common: `not run`, or `too few seeds`. Nothing to compare at a tier: `not testable`, and
  why.

Each claim is judged for itself: of twenty claims that are not true one is expected to look as if it were.
"""

from collections.abc import Mapping
from statistics import stdev
from typing import Literal, NamedTuple

from ..evaluation.intervals import Interval, paired_difference, smallest_effect


Claim = Literal["higher", "lower", "equal"]

EQUAL_BELOW = 1.0  # points in the paper: a smaller difference of its two numbers is a claim of equality
FEWEST = 3  # seeds of a verdict
MARGIN = 2.0  # points: what counts as equal here
RULE = (
    "Verdicts: seed-paired differences to the reference and their 95 % t-interval; a direction holds or is reversed "
    f"if the interval lies on one side of 0; equality (the paper's numbers differ by less than {EQUAL_BELOW:g}) holds "
    f"by two one-sided tests at 5 % against ±{MARGIN:g} points; no verdict on fewer than {FEWEST} seeds. Detectable is "
    "the effect that so many seeds of this spread would show in 80 of 100 cases."
)


class Verdict(NamedTuple):
    """What can be said of a claim: a word of the rule, the paired difference with its interval, and the smallest effect
    that would have been detected; None where there is none."""

    word: str
    difference: Interval | None = None
    detectable: float | None = None


def claim_of(paper: float | None, reference: float | None) -> Claim | None:
    """What the paper's numbers of a row and of its reference claim, in percent; None unless it has both."""
    if paper is None or reference is None:
        return None
    difference = round(paper - reference, 6)  # 64.5 - 63.5 is a point
    if abs(difference) < EQUAL_BELOW:
        return "equal"
    return "higher" if difference > 0 else "lower"


def judge(claim: Claim | None, values: Mapping[int, float], reference: Mapping[int, float]) -> Verdict:
    """The verdict on a claim.

    Args:
        claim: what the row is said to be, compared with the reference; None if the paper does not say.
        values, reference: numbers by seed, of the row and of its reference.
    """
    difference = paired_difference(reference, values)
    if difference is None:
        return Verdict("not run")
    if difference.count < FEWEST:
        return Verdict("too few seeds", difference)
    pairs = [values[seed] - reference[seed] for seed in reference if seed in values]
    detectable = smallest_effect(stdev(pairs), len(pairs))
    low, high = difference.mean - difference.half_width, difference.mean + difference.half_width
    if claim == "equal":
        narrow = paired_difference(reference, values, confidence=0.9)
        if abs(narrow.mean) + narrow.half_width < MARGIN:
            word = "holds"
        else:
            word = "reversed" if low > MARGIN or high < -MARGIN else "within noise"
    else:
        found = "higher" if low > 0 else "lower" if high < 0 else None
        if claim is None:
            word = found or "within noise"
        else:
            word = "within noise" if found is None else "holds" if found == claim else "reversed"
    return Verdict(word, difference, detectable)
