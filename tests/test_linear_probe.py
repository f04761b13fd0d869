import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ldae_hf.evaluation.few_shot import few_shot
from ldae_hf.evaluation.knn import knn
from ldae_hf.evaluation.linear_probe import linear_probe, train_and_score


def blobs(count: int, seed: int, spread: float = 1.0, num_classes: int = 4, dim: int = 12):
    """Gaussian clusters of unequal scale; the centres are the same for every seed."""
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=generator)
    scales = torch.logspace(-2, 2, dim)
    return (centres[labels] + spread * torch.randn(count, dim, generator=generator)) * scales + 3, labels


def probe(train, test, **arguments):
    return linear_probe(*train, *test, **{"progress": False, "batch_size": 64} | arguments)


def test_the_probe_reaches_the_accuracy_of_logistic_regression():
    train, test = blobs(2000, 0, spread=1.5), blobs(2000, 1, spread=1.5)
    mean, std = train[0].mean(0), train[0].std(0)
    peer = LogisticRegression(C=np.inf, max_iter=1000).fit((train[0] - mean) / std, train[1])
    expected = 100 * peer.score((test[0] - mean) / std, test[1])
    assert 60 < expected < 95
    assert probe(train, test)["top1"] == pytest.approx(expected, abs=0.7)


def test_separable_classes_are_told_apart_without_an_error():
    result = probe(blobs(400, 0, spread=0.1), blobs(400, 1, spread=0.1))
    assert result["top1"] == result["best_top1"] == 100


def test_random_labels_give_chance():
    generator = torch.Generator().manual_seed(0)
    train, test = (
        (features, labels[torch.randperm(2000, generator=generator)])
        for features, labels in (blobs(2000, 0), blobs(2000, 1))
    )
    assert probe(train, test, epochs=5)["top1"] == pytest.approx(25, abs=4)  # four standard deviations


def test_learning_rates_trained_together_do_what_each_does_alone():
    train, test = blobs(500, 0, spread=2.0), blobs(300, 1, spread=2.0)
    together = probe(train, test, learning_rates=(0.001, 0.03, 1.0), epochs=4)["grid"]
    alone = [probe(train, test, learning_rates=(rate,), epochs=4)["grid"][0] for rate in (0.001, 0.03, 1.0)]
    assert together == alone
    assert len({entry["top1"] for entry in together}) > 1


def test_the_learning_rate_is_selected_without_the_test_set():
    train, (features, labels) = blobs(500, 0, spread=2.0), blobs(300, 1, spread=2.0)
    rates = dict(learning_rates=(1e-5, 1e-2, 1.0), epochs=3)
    result, misled = probe(train, (features, labels), **rates), probe(train, (features, (labels + 1) % 4), **rates)
    for found in (result, misled):
        best = max(found["grid"], key=lambda entry: entry["held_out_top1"])
        assert (found["learning_rate"], found["top1"]) == (best["learning_rate"], best["top1"])
        assert found["best_top1"] == max(entry["top1"] for entry in found["grid"])
    # Where test labels are wrong, the worst learning rate looks best on them, and still is not taken.
    assert misled["learning_rate"] == result["learning_rate"] and misled["best_top1"] > misled["top1"]


def test_the_held_out_part_is_not_trained_on_while_learning_rates_are_compared():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(200, 300, generator=generator), torch.randint(4, (200,), generator=generator)
    result = probe((features, labels), (features, labels), held_out=0.5, learning_rates=(0.1,))
    assert result["top1"] == 100  # noise is learnt by heart where it is trained on
    assert result["grid"][0]["held_out_top1"] < 50


def test_the_probe_is_the_loop_that_torch_would_run():
    (features, labels), (others, _) = blobs(130, 0, spread=2.0), blobs(20, 1, spread=2.0)
    mean, std = features.mean(0), features.std(0, unbiased=False)
    training = dict(learning_rates=(0.1, 0.3), batch_norm=True, epochs=3, batch_size=32, num_classes=4, seed=5)
    _, scores = train_and_score(features, labels, others, **training, on_epoch=lambda: None)
    head = torch.nn.Linear(12, 4)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.3, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / 12)))
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        for batch in torch.randperm(130, generator=generator)[:128].split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head((features[batch] - mean) / std), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(scores, head((others - mean) / std).detach(), rtol=1e-3, atol=1e-3)


def test_units_of_the_features_do_not_matter_to_the_probe():
    train, test = blobs(500, 0, spread=2.0), blobs(300, 1, spread=2.0)
    rescaled = ((train[0] * 8 - 100, train[1]), (test[0] * 8 - 100, test[1]))
    assert probe(*rescaled, epochs=3)["top1"] == pytest.approx(probe(train, test, epochs=3)["top1"], abs=0.7)


def test_the_same_seed_gives_the_same_probe_and_another_seed_another_order():
    train, test = blobs(500, 0, spread=2.0), blobs(300, 1, spread=2.0)
    first, again, other = (probe(train, test, epochs=2, seed=seed) for seed in (3, 3, 4))
    assert first["grid"] == again["grid"] != other["grid"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(learning_rates=()), "positive learning rates"),
        (dict(learning_rates=(0.1, -1.0)), "positive learning rates"),
        (dict(epochs=0), "at least one epoch"),
        (dict(batch_norm=()), "with or without BatchNorm"),
        (dict(held_out=0.0), "held_out=0.0 of 40"),
        (dict(held_out=0.6), "at most half"),
    ],
    ids=str,
)
def test_the_probe_refuses_arguments_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        probe(blobs(40, 0), blobs(20, 1), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:, :5], y), "12 values and the test features 5"),
        (lambda x, y: (x, y[:-1]), "must be"),
        (lambda x, y: (x.log(), y), "NaN or infinite"),
        (lambda x, y: (x, y - 9), "without a label"),
        (lambda x, y: (x, y + 9), "which the training set does not have"),
    ],
)
@pytest.mark.parametrize("evaluation", [linear_probe, knn, few_shot])
def test_features_that_cannot_be_evaluated_are_refused(evaluation, change, message):
    with pytest.raises(ValueError, match=message):
        evaluation(*blobs(40, 0), *change(*blobs(20, 1)))


# -- Feature maps and BatchNorm ---------------------------------------------------------------------------------------


def maps(count: int, seed: int):
    """One map that knows the labels and one of noise, of another width; and the labels."""
    features, labels = blobs(count, seed, spread=1.0)
    noise = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    return {"3/mean": noise, "last/mean": features}, labels


def test_of_several_feature_maps_the_informative_one_is_selected_without_the_test_set():
    train, (features, labels) = maps(500, 0), maps(300, 1)
    result = probe(train, (features, labels), epochs=5)
    assert (result["features"], result["dim"]) == ("last/mean", 12) and result["top1"] > 60
    assert [(entry["features"], entry["learning_rate"]) for entry in result["grid"]] == [
        (name, rate) for name in ("3/mean", "last/mean") for rate in (0.001, 0.005, 0.03, 0.2, 1.0)
    ]
    misled = probe(train, (features, (labels + 1) % 4), epochs=5)  # now noise looks better on the test set
    assert misled["features"] == "last/mean" and misled["best_top1"] > misled["top1"]
    assert [entry["held_out_top1"] for entry in misled["grid"]] == [entry["held_out_top1"] for entry in result["grid"]]


def test_maps_in_one_call_do_what_each_does_alone_with_and_without_batch_norm():
    train, test = maps(300, 0), maps(200, 1)
    together = probe(train, test, epochs=3, batch_norm=(True, False), learning_rates=(0.01, 0.3))["grid"]
    alone = []
    for name in train[0]:
        for normalised in (True, False):
            tensors = (({name: split[name]}, labels) for split, labels in (train, test))
            alone += probe(*tensors, epochs=3, batch_norm=[normalised], learning_rates=(0.01, 0.3))["grid"]
    assert together == alone
    assert len({entry["top1"] for entry in together}) > 4


def test_without_batch_norm_features_are_taken_as_they_are():
    train, test = blobs(400, 0, spread=2.0), blobs(300, 1, spread=2.0)
    mean, std = train[0].mean(0), (train[0].var(0, unbiased=False) + 1e-6).sqrt()
    standardised = (((features - mean) / std, labels) for features, labels in (train, test))
    with_it = probe(train, test, epochs=4)
    without = probe(*standardised, epochs=4, batch_norm=(False,))
    assert [entry["top1"] for entry in without["grid"]] == pytest.approx(
        [entry["top1"] for entry in with_it["grid"]], abs=1.0
    )
    raw = probe(train, test, epochs=4, batch_norm=(False,))
    assert raw["grid"] != without["grid"] and raw["batch_norm"] is False
    assert (with_it["protocol"]["head"], raw["protocol"]["head"]) == (
        "standardisation by the training set, linear",
        "linear",
    )


def test_a_learning_rate_that_makes_a_classifier_diverge_is_not_selected():
    train, test = blobs(400, 0, spread=0.1), blobs(200, 1, spread=0.1)
    result = probe(train, test, batch_norm=(False, True), learning_rates=(3e38, 0.01), epochs=20)
    assert result["learning_rate"] == 0.01 and result["top1"] == 100
    assert [entry["top1"] < 50 for entry in result["grid"]] == [True, False, True, False]


def test_the_protocol_says_what_was_tried_and_how_it_was_selected():
    train, test = maps(200, 0), maps(100, 1)
    one = probe(*((split["last/mean"], labels) for split, labels in (train, test)), epochs=1)
    assert one["features"] == "features" and one["batch_norm"] is True
    assert one["protocol"]["selection"].startswith("top1: best of 5 learning rates on 20 held-out training samples")
    many = probe(train, test, epochs=1, batch_norm=(True, False))
    assert many["protocol"]["selection"].startswith("top1: best of 20 combinations on 20 held-out training samples")
    assert many["protocol"]["head"] == "linear, with and without standardisation by the training set"


@pytest.mark.parametrize("names", [((), ()), (("a",), ("b",)), (("a", "b"), ("a",))])
def test_feature_maps_must_be_the_same_of_both_sets(names):
    (train, labels), (test, test_labels) = blobs(40, 0), blobs(20, 1)
    with pytest.raises(ValueError, match="at least one feature map, and the same ones of both sets"):
        probe((dict.fromkeys(names[0], train), labels), (dict.fromkeys(names[1], test), test_labels))
