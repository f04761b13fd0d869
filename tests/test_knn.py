import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from ldae_hf.evaluation import knn as knn_module
from ldae_hf.evaluation.knn import VARIANTS, knn
from ldae_hf.evaluation.whitening import mean_and_std, whitening


def blobs(count: int, seed: int, spread: float = 2.0, num_classes: int = 4, dim: int = 12, decades: float = 2):
    """Gaussian clusters of unequal scale; the centres are the same for every seed."""
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=generator)
    scales = torch.logspace(-decades, decades, dim)
    return (centres[labels] + spread * torch.randn(count, dim, generator=generator)) * scales + 3, labels


def found(result: dict, variant: str, k: int = 20) -> float:
    [entry] = [one for one in result["variants"] if (one["variant"], one["k"]) == (variant, k)]
    return entry["top1"]


@pytest.mark.parametrize("similarities", [2**24, 700], ids=["one chunk", "many chunks"])
def test_knn_equals_sklearns_with_the_same_weights(monkeypatch, similarities):
    monkeypatch.setattr(knn_module, "SIMILARITIES", similarities)
    (train, train_labels), (test, test_labels) = blobs(300, 0), blobs(101, 1)
    result = knn(train, train_labels, test, test_labels, k=(20, 1, 7))
    for k in (20, 1, 7):
        peer = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine", algorithm="brute")
        predicted = peer.fit(train.double(), train_labels).predict(test.double())
        assert found(result, "pooled", k) == pytest.approx(100 * (predicted == test_labels.numpy()).mean())
    assert result["top1"] == found(result, "pooled", 20)


def test_a_very_low_temperature_leaves_the_nearest_neighbour_alone():
    (train, train_labels), (test, test_labels) = blobs(200, 0), blobs(80, 1)
    nearest = knn(train, train_labels, test, test_labels, k=1)["top1"]
    assert knn(train, train_labels, test, test_labels, k=20, temperature=1e-6)["top1"] == nearest


def test_several_ks_and_variants_give_what_each_gives_alone():
    train, test = blobs(200, 0), blobs(80, 1)
    together = knn(*train, *test, k=(20, 3))
    assert [(one["variant"], one["k"]) for one in together["variants"]] == [(v, k) for v in VARIANTS for k in (20, 3)]
    for one in together["variants"]:
        alone = knn(*train, *test, k=one["k"], variants=[one["variant"]])
        assert alone["top1"] == one["top1"]
        assert alone["protocol"]["similarity"] == one["similarity"] == VARIANTS[one["variant"]]
    assert together["protocol"] == {
        "similarity": "cosine",
        "k": 20,
        "temperature": 0.07,
        "weights": "exp(cosine/temperature)",
    }


def test_the_first_dimension_of_large_variance_hides_the_classes_until_features_are_standardised():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    signal = 2.0 * labels[:, None] - 1 + 0.3 * torch.randn(400, 3, generator=generator)
    features = torch.cat([signal, 300 * torch.randn(400, 6, generator=generator)], dim=1)
    result = knn(features[:300], labels[:300], features[300:], labels[300:])
    assert found(result, "pooled") < 75 and found(result, "standardised") > 90


def test_classes_in_a_direction_of_little_variance_across_dimensions_need_whitening():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    shared = 30 * torch.randn(400, 5, generator=generator)  # what pairs of dimensions have in common
    features = torch.cat([shared, shared + 0.3 * torch.randn(400, 5, generator=generator)], dim=1)
    features[:, 0] += 2.0 * labels - 1
    result = knn(features[:300], labels[:300], features[300:], labels[300:])
    assert found(result, "standardised") < 75 and found(result, "whitened") > 85


def test_whitened_training_features_have_the_identity_as_their_covariance():
    features, _ = blobs(500, 0, decades=1)
    mean, matrix = whitening(features)
    whitened = (features - mean) @ matrix
    torch.testing.assert_close(torch.cov(whitened.T, correction=0), torch.eye(12), rtol=0, atol=1e-4)
    torch.testing.assert_close(whitened.mean(dim=0), torch.zeros(12), rtol=0, atol=1e-4)


def test_whitening_leaves_out_directions_that_hold_nothing_but_rounding():
    features, _ = blobs(500, 0, decades=1)
    mean, matrix = whitening(torch.cat([features, features[:, -1:] * 2 + 1], dim=1))  # its last column says nothing new
    assert matrix.shape == (13, 12)
    with pytest.raises(ValueError, match="All images have the same features"):
        whitening(torch.ones(5, 3))


def test_whitening_is_a_rotation_of_zcas():
    features, _ = blobs(500, 0, decades=1)
    mean, matrix = whitening(features)
    covariance = torch.cov(features.double().T, correction=0)
    values, vectors = torch.linalg.eigh(covariance)
    zca = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    white, by_zca = ((features[:50] - mean).double() @ w.double() for w in (matrix, zca))
    torch.testing.assert_close(white @ white.T, by_zca @ by_zca.T, rtol=1e-3, atol=1e-3)


def test_standardised_features_have_mean_0_and_variance_1():
    features, _ = blobs(500, 0)
    mean, std = mean_and_std(features)
    standardised = (features - mean) / std
    torch.testing.assert_close(standardised.mean(dim=0), torch.zeros(12), rtol=0, atol=1e-4)
    # The smallest variance, about 5e-4, is not large beside the 1e-6 that is added to it.
    torch.testing.assert_close(standardised.var(dim=0, correction=0), torch.ones(12), rtol=0, atol=5e-3)


@pytest.mark.parametrize("arguments", [{"k": 0}, {"k": 31}, {"k": ()}, {"k": (1, 31)}, {"temperature": 0.0}], ids=str)
def test_knn_refuses_impossible_neighbours(arguments):
    features, labels = blobs(30, 0)
    with pytest.raises(ValueError, match="must lie in 1 ... 30"):
        knn(features, labels, features, labels, **arguments)


@pytest.mark.parametrize(
    ("variants", "message"),
    [(["zca"], "no variant 'zca'.*pooled, standardised, whitened"), ([], "at least one variant")],
)
def test_knn_refuses_features_that_it_does_not_know(variants, message):
    features, labels = blobs(30, 0)
    with pytest.raises(ValueError, match=message):
        knn(features, labels, features, labels, variants=variants)
