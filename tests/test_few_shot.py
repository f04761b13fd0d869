import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression as Peer
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from torch.nn.functional import cross_entropy

from ldae_hf.evaluation.few_shot import few_shot, labelled_subset
from ldae_hf.evaluation.logistic_regression import LogisticRegression, principal_directions


QUICK = dict(strengths=(0.01, 1.0), progress=False)


def blobs(count: int, seed: int, spread: float = 2.0, num_classes: int = 4, dim: int = 12):
    """Gaussian clusters; the centres are the same for every seed."""
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=generator)
    return centres[labels] + spread * torch.randn(count, dim, generator=generator), labels


# -- Logistic regression ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("dim", [12, 80], ids=["fewer dimensions than samples", "more dimensions than samples"])
def test_logistic_regression_is_scikit_learns(strength, dim):
    features, labels = blobs(60, 0, dim=dim)
    features = features * torch.logspace(-1, 1, dim)
    peer = Peer(C=strength, solver="newton-cg", tol=1e-8).fit(features.double(), labels)
    weights, biases = LogisticRegression(features, labels, 4).fit(strength, torch.arange(60))
    expected = torch.from_numpy(peer.predict_proba(features.double()))
    torch.testing.assert_close((features @ weights + biases).softmax(dim=1).double(), expected, rtol=0, atol=2e-3)

    def objective(weights, biases):
        loss = cross_entropy(features.double() @ weights.double() + biases.double(), labels, reduction="sum")
        return (strength * loss + weights.double().square().sum() / 2).item()

    least = objective(torch.from_numpy(peer.coef_.T), torch.from_numpy(peer.intercept_))
    assert objective(weights, biases) == pytest.approx(least, rel=5e-3)


def test_logistic_regression_learns_only_from_the_samples_that_it_is_told():
    features, labels = blobs(60, 0)
    part = torch.arange(0, 60, 2)
    all_of_them = LogisticRegression(features, labels, 4).fit(1.0, part)
    alone = LogisticRegression(features[part], labels[part], 4).fit(1.0, torch.arange(30))
    for one, other in zip(all_of_them, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("shape", [(50, 8), (8, 50)])
def test_principal_directions_are_orthonormal_and_hold_all_of_the_features(shape):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    directions, squares = principal_directions(features)
    assert directions.shape == (shape[1], 8)
    torch.testing.assert_close(directions.T @ directions, torch.eye(8), rtol=0, atol=1e-5)
    coordinates = features @ directions
    torch.testing.assert_close(coordinates @ directions.T, features, rtol=0, atol=1e-4)
    torch.testing.assert_close(coordinates.square().sum(dim=0), squares, rtol=1e-4, atol=1e-4)


# -- Labelled images --------------------------------------------------------------------------------------------------


def test_labelled_subsets_are_balanced_and_belong_to_their_seed():
    labels = torch.arange(1000) % 10
    labels = labels[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    chosen = labelled_subset(labels, 0.1, seed=3)
    assert labels[chosen].bincount().tolist() == 10 * [10]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert chosen.tolist() == labelled_subset(labels, 0.1, seed=3).tolist()
    assert chosen.tolist() != labelled_subset(labels, 0.1, seed=4).tolist()


def test_every_class_has_an_image_and_none_more_than_it_has():
    labels = torch.tensor(90 * [0] + 9 * [1] + [3])  # nobody is of class 2
    assert labels[labelled_subset(labels, 0.001, seed=0)].bincount().tolist() == [1, 1, 0, 1]
    assert labels[labelled_subset(labels, 0.3, seed=0)].bincount().tolist() == [10, 9, 0, 1]


# -- Few-shot ---------------------------------------------------------------------------------------------------------


def test_few_shot_reports_each_fraction_over_its_draws():
    train, test = blobs(500, 0), blobs(400, 1)
    result = few_shot(*train, *test, fractions=(0.04, 0.4), draws=3, **QUICK)
    few, many = result["fractions"]
    assert (few["images"], many["images"]) == (20, 200)
    assert result["top1"] == result["top1_4_percent"] == few["top1"] < many["top1"] == result["top1_40_percent"]
    for entry in (few, many):
        top1s = [draw["top1"] for draw in entry["draws"]]
        assert (len(top1s), entry["top1"]) == (3, pytest.approx(np.mean(top1s)))
        assert entry["top1_std"] == pytest.approx(np.std(top1s, ddof=1)) and entry["top1_std"] > 0
    assert result["protocol"]["images"] == [20, 200] and result["protocol"]["draws"] == 3
    assert few_shot(*train, *test, fractions=(0.04,), draws=1, **QUICK)["fractions"][0]["top1_std"] is None


def test_draws_are_those_of_the_following_seeds():
    train, test = blobs(400, 0), blobs(200, 1)
    options = dict(fractions=(0.05,), **QUICK)
    draws = few_shot(*train, *test, draws=2, seed=5, **options)["fractions"][0]["draws"]
    assert few_shot(*train, *test, draws=1, seed=5, **options)["fractions"][0]["draws"] == draws[:1]


def test_only_the_labelled_images_are_looked_at():
    (features, labels), test = blobs(400, 0), blobs(200, 1)
    chosen = labelled_subset(labels, 0.05, seed=0)
    changed = torch.full_like(features, 1e4)
    changed[chosen] = features[chosen]
    options = dict(fractions=(0.05,), draws=1, **QUICK)
    first, second = (few_shot(values, labels, *test, **options) for values in (features, changed))
    assert first["fractions"] == second["fractions"]


def test_the_strength_is_selected_without_the_test_set():
    train, (features, labels) = blobs(400, 0), blobs(200, 1)
    options = dict(fractions=(0.2,), draws=1, **QUICK)
    results = [few_shot(*train, features, wrong, **options) for wrong in (labels, (labels + 1) % 4)]
    [first, second] = [result["fractions"][0]["draws"][0] for result in results]
    assert first["strength"] == second["strength"] and first["top1"] > 50 > second["top1"]


def test_the_strength_is_the_one_that_scikit_learn_selects_in_the_same_folds():
    (features, labels), (test, test_labels) = blobs(60, 0, dim=20), blobs(50, 1, dim=20)
    strengths = (1e-3, 0.03, 10.0)
    chosen = labelled_subset(labels, 1.0, seed=4)  # not all: the classes are of unequal size
    mean, std = features[chosen].mean(dim=0), features[chosen].std(dim=0, correction=0)
    folds = StratifiedKFold(5, shuffle=True, random_state=4)
    search = GridSearchCV(Peer(max_iter=1000), {"C": strengths}, cv=folds)
    search.fit((features[chosen] - mean) / std, labels[chosen])
    options = dict(fractions=(1.0,), draws=1, strengths=strengths, seed=4, progress=False)
    [draw] = few_shot(features, labels, test, test_labels, **options)["fractions"][0]["draws"]
    assert draw["strength"] == search.best_params_["C"]
    assert draw["top1"] == pytest.approx(100 * search.score((test - mean) / std, test_labels))


def test_one_image_of_each_class_is_enough():
    train, test = blobs(400, 0, spread=0.2), blobs(200, 1, spread=0.2)
    result = few_shot(*train, *test, fractions=(0.01,), draws=2, progress=False)
    assert result["fractions"][0]["images"] == 4 and result["top1"] > 90
    assert {draw["strength"] for draw in result["fractions"][0]["draws"]} == {1.0}


@pytest.mark.parametrize(
    "change",
    [
        {"fractions": ()},
        {"fractions": (0.1, 0.0)},
        {"fractions": (1.5,)},
        {"draws": 0},
        {"strengths": (1.0, 0.0)},
        {"strengths": ()},
    ],
)
def test_few_shot_refuses_arguments_out_of_range(change):
    with pytest.raises(ValueError, match="fractions of the labels in 0 ... 1, and at least one draw|must be positive"):
        few_shot(*blobs(40, 0), *blobs(20, 1), progress=False, **change)
