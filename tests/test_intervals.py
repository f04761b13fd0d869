"""What a mean over a few seeds can say, against scipy's own tests and numbers worked out by hand."""

import numpy as np
import pytest
from scipy.stats import binomtest, t, ttest_1samp, ttest_rel

from ldae_hf.evaluation.intervals import paired_difference, smallest_effect, t_interval, wilson_interval


def test_the_t_interval_of_three_values_is_the_one_worked_out_by_hand():
    found = t_interval([46.0, 47.0, 48.0])
    assert found.mean == 47.0 and found.count == 3
    assert found.half_width == pytest.approx(4.302653 * 1.0 / 3**0.5, rel=1e-6)  # t of 2 degrees of freedom


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_t_interval_is_scipys(confidence):
    values = np.random.default_rng(0).normal(50, 2, 7).tolist()
    found, expected = t_interval(values, confidence), ttest_1samp(values, 0).confidence_interval(confidence)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(tuple(expected))


def test_one_value_has_no_interval_over_seeds_and_none_no_mean():
    assert t_interval([41.4]) == (41.4, None, 1)
    with pytest.raises(ValueError, match="no values"):
        t_interval([])


def test_a_difference_is_paired_by_seed_and_leaves_out_seeds_of_one_side():
    first, second = {0: 46.0, 1: 47.5, 2: 45.0, 7: 99.0}, {2: 46.5, 1: 48.5, 0: 46.8, 8: 0.0}
    found = paired_difference(first, second)
    expected = ttest_rel([46.8, 48.5, 46.5], [46.0, 47.5, 45.0]).confidence_interval(0.95)
    assert found.count == 3
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(tuple(expected))
    assert paired_difference({0: 1.0}, {1: 2.0}) is None
    assert paired_difference({0: 1.0}, {0: 3.0}) == (2.0, None, 1)


@pytest.mark.parametrize(("right", "images"), [(4664, 10_000), (0, 50), (50, 50), (1, 3)])
def test_the_binomial_interval_is_wilsons(right, images):
    expected = binomtest(right, images).proportion_ci(0.95, method="wilson")
    found = wilson_interval(100 * right / images, images)
    assert found == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)


@pytest.mark.parametrize(("top1", "images"), [(101.0, 10), (-1.0, 10), (50.0, 0)])
def test_what_is_no_accuracy_has_no_interval(top1, images):
    with pytest.raises(ValueError, match="at least one"):
        wilson_interval(top1, images)


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_an_effect_of_the_smallest_size_is_found_as_often_as_promised(count):
    effect = smallest_effect(2.0, count, power=0.8)
    samples = np.random.default_rng(count).normal(effect, 2.0, (100_000, count))
    statistic = samples.mean(axis=1) / (samples.std(axis=1, ddof=1) / count**0.5)
    assert (statistic > t.ppf(0.975, count - 1)).mean() == pytest.approx(0.8, abs=0.006)


def test_the_smallest_effect_grows_with_the_spread_and_shrinks_with_seeds():
    assert smallest_effect(2.0, 3) == pytest.approx(2 * smallest_effect(1.0, 3))
    effects = [smallest_effect(1.0, count) for count in (2, 3, 5, 10, 100)]
    assert effects == sorted(effects, reverse=True)
    assert effects[-1] == pytest.approx((1.96 + 0.8416) / 10, rel=0.02)  # the normal distribution's
    assert smallest_effect(0.0, 3) == 0.0
    with pytest.raises(ValueError, match="two values"):
        smallest_effect(1.0, 1)
    with pytest.raises(ValueError, match="power"):
        smallest_effect(1.0, 3, power=1.0)
