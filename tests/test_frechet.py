import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance

from ldae_hf.evaluation.frechet import FeatureStatistics, frechet_distance


def features(count, dim, seed=0):
    """Correlated, of different scales, and like a ReLU's far from zero."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    shift = 3 + torch.rand(dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing + shift


def statistics(values, extractor="mine"):
    return FeatureStatistics(extractor, values.shape[1]).update(values)


def with_moments(mean, covariance, count=1000):
    """Statistics of exactly this mean and covariance."""
    state = {"count": torch.tensor(count), "mean": mean, "scatter": covariance * (count - 1)}
    return FeatureStatistics.from_state_dict(state, "mine")


def rotation(dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q


def by_scipy(first, second):
    """The distance as its formula reads."""
    covariances = [np.cov(values.numpy(), rowvar=False) for values in (first, second)]
    difference = (first.mean(dim=0) - second.mean(dim=0)).square().sum().item()
    return difference + np.trace(covariances[0] + covariances[1]) - 2 * np.trace(sqrtm(np.matmul(*covariances)).real)


def test_statistics_are_numpys_mean_and_covariance():
    values = features(50, 6)
    found = statistics(values.float())
    expected = values.float().double().numpy()
    np.testing.assert_allclose(found.mean, expected.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(expected, rowvar=False), rtol=1e-10, atol=1e-14)
    assert found.count == 50 and found.mean.dtype == found.covariance.dtype == torch.float64


def test_a_mean_far_from_zero_costs_no_precision():
    values = features(200, 4)
    far = statistics(values + 1e6).covariance
    torch.testing.assert_close(far, statistics(values).covariance, rtol=1e-8, atol=1e-9)


def test_commuting_gaussians_have_the_distance_of_the_closed_form():
    axes = rotation(5)
    variances = torch.tensor([[4.0, 1.0, 0.25, 9.0, 0.0], [1.0, 1.0, 4.0, 0.01, 2.0]], dtype=torch.float64)
    means = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    pair = [with_moments(mean, axes * row @ axes.T) for mean, row in zip(means, variances, strict=True)]
    closed = (means[0] - means[1]).square().sum() + (variances[0].sqrt() - variances[1].sqrt()).square().sum()
    assert frechet_distance(*pair) == pytest.approx(closed.item(), rel=1e-12)


@pytest.mark.parametrize("count", [5, 400], ids=["fewer samples than dimensions", "more"])
def test_the_distance_is_scipys_and_symmetric_and_zero_for_equal_sets(count):
    first, second = features(count, 20), features(count + 3, 20, seed=1)
    pair = statistics(first), statistics(second)
    assert frechet_distance(*pair) == pytest.approx(by_scipy(first, second), rel=1e-6)
    assert frechet_distance(*reversed(pair)) == pytest.approx(frechet_distance(*pair), rel=1e-12)
    assert 0 <= frechet_distance(pair[0], statistics(first.flip(0))) < 1e-12 * pair[0].covariance.trace()


def test_singular_covariances_cost_no_precision():
    first, second = features(6, 40), features(9, 40, seed=1)
    # Without any covariance: their roots are the centred samples themselves.
    roots = [(values - values.mean(dim=0)) / math.sqrt(len(values) - 1) for values in (first, second)]
    exact = (first.mean(dim=0) - second.mean(dim=0)).square().sum() + sum(root.square().sum() for root in roots)
    exact -= 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    assert frechet_distance(statistics(first), statistics(second)) == pytest.approx(exact.item(), rel=1e-12)


def test_constant_features_are_a_point_each():
    first, second = torch.ones(3, 4), torch.full((2, 4), 3.0)
    assert frechet_distance(statistics(first), statistics(second)) == pytest.approx(16.0)


def test_turning_and_shifting_both_sets_moves_no_distance():
    first, second = features(300, 12), features(200, 12, seed=1)
    plain = frechet_distance(statistics(first), statistics(second))
    turn, shift = rotation(12), torch.arange(12.0, dtype=torch.float64)
    moved = frechet_distance(statistics(first @ turn + shift), statistics(second @ turn + shift))
    assert moved == pytest.approx(plain, rel=1e-9)
    assert frechet_distance(statistics(first @ turn), statistics(second)) > 1.1 * plain


def test_torchmetrics_measures_the_same_distance():
    class Passed(torch.nn.Module):
        num_features = 16

        def forward(self, images):
            return images.flatten(1)

    first, second = (features(120, 16, seed).float() for seed in (0, 1))
    metric = FrechetInceptionDistance(feature=Passed(), normalize=True, input_img_size=(1, 16)).set_dtype(torch.float64)
    for values, real in ((first, True), (second, False)):
        for batch in values.split(50):
            metric.update(batch[:, None, None], real=real)
    expected = metric.compute().item()  # it computes in float64 and answers in float32
    assert frechet_distance(statistics(first), statistics(second)) == pytest.approx(expected, rel=1e-6)


def test_batches_and_merges_in_any_order_give_what_one_pass_gives():
    values = features(2500, 8)
    whole = statistics(values)
    parts = values.split([1, 700, 0, 1200, 599])
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        batchwise = FeatureStatistics("mine", 8)
        merged = FeatureStatistics("mine", 8)
        for index in order:
            batchwise.update(parts[index])
            merged.merge(statistics(parts[index]))
        for found in (batchwise, merged):
            assert found.count == whole.count
            torch.testing.assert_close(found.mean, whole.mean, rtol=1e-10, atol=0)
            torch.testing.assert_close(found.scatter, whole.scatter, rtol=1e-10, atol=1e-10 * whole.scatter.max())


def test_a_state_dict_holds_all_of_the_statistics():
    first = statistics(features(30, 5))
    state = first.state_dict()
    first.update(features(1, 5))  # a state shares no memory with what goes on
    found = FeatureStatistics.from_state_dict(state, "mine")
    assert found.extractor == "mine" and found.count == 30
    assert all(torch.equal(found.state_dict()[name], state[name]) for name in state)


def test_features_of_different_extractors_never_meet():
    mine = statistics(features(10, 4), "Inception abc")
    for other in (statistics(features(10, 4), "classifier def"), statistics(features(10, 5), "Inception abc")):
        for meet in (frechet_distance, FeatureStatistics.merge):
            with pytest.raises(ValueError, match=r"different extractors.*Inception abc \(4 values\) and .*same one"):
                meet(mine, other)


def test_one_sample_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 images, but there are 1"):
        frechet_distance(statistics(features(1, 4)), statistics(features(9, 4)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused_by_the_image(bad):
    values = features(6, 3)
    values[4, 1] = bad
    found = statistics(features(10, 3))
    with pytest.raises(ValueError, match="features of image 14 are not finite"):
        found.update(values)
    assert found.count == 10


@pytest.mark.parametrize("values", [torch.zeros(3, 5), torch.zeros(4), torch.zeros(3, 4, dtype=torch.int64)])
def test_features_of_another_form_are_refused(values):
    with pytest.raises(ValueError, match=r"shape \(B, 4\)"):
        FeatureStatistics("mine", 4).update(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scatter": None}, "hold count, mean and scatter, not count, mean"),
        ({"scatter": torch.zeros(3, 4)}, r"scatter .* shape \(4, 4\).*has the shape \(3, 4\)"),
        ({"mean": torch.full((4,), math.nan)}, "mean .* must be finite"),
        ({"count": torch.tensor(-1)}, "no count is negative"),
    ],
)
def test_a_state_that_is_none_is_refused(changes, message):
    state = statistics(features(9, 4)).state_dict() | changes
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.from_state_dict(state, "mine")
