"""The fast linear probe beside scikit-learn's logistic regression: seconds, and top-1 on the same features.

    python benchmarks/linear_probe.py                            # both sets of features: about ten minutes
    python benchmarks/linear_probe.py --sets made --strengths 1  # a quick look

The probe is timed whole: 20 learning rates for 90 epochs, once without the held-out tenth of the training set to select
one, once with all. Its floor is its matrix products alone. scikit-learn minimises one objective for each C, on
standardised features; that of few-shot evaluation (`LogisticRegression` of ldae_hf) is the same, by another solver.

Features: "made", 50,000 x 384 with a falling spectrum and 10 classes that no linear classifier tells apart without
errors; "cifar10", those of model_cards/ldae-cifar10 (50,000 x 192), for which $LDAE_DATA or the Hub has the images;
"made-1000", 5,000 x 384 of 1,000 classes, for the probe alone.
"""

import os
import statistics
import warnings
from functools import partial
from pathlib import Path

import measure
import torch


ENCODER = Path(__file__).parents[1] / "model_cards" / "ldae-cifar10"
SETS = ("made", "cifar10", "made-1000")
EPOCHS, BATCH, HELD_OUT = 90, 512, 0.1


def made(count: int, num_classes: int, dim: int = 384):
    """Features whose standard deviation falls a hundredfold over the directions, and labels of a noisy linear rule."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    latent = torch.randn(count + count // 5, dim, generator=generator)
    rule = torch.randn(dim, num_classes, generator=generator)
    noise = torch.randn(len(latent), num_classes, generator=generator)
    labels = (latent @ rule / dim**0.5 + noise).argmax(dim=1)
    labels[:num_classes] = torch.arange(num_classes)  # each class has an example
    features = (latent * torch.logspace(0, -2, dim)) @ rotation
    return features[:count], labels[:count], features[count:], labels[count:]


def features_of(name: str):
    if name != "cifar10":
        return made(5_000, 1_000) if name == "made-1000" else made(50_000, 10)
    from ldae_hf.evaluation.features import extract_features

    train, test = (extract_features(ENCODER, "cifar10", split) for split in ("train", "test"))
    return train.features, train.labels, test.features, test.labels


def product_seconds(count: int, dim: int, rates: int, classes: int, threads: int) -> float:
    """The probe's matrix products on operands that are in the cache: logits and gradient of every step."""
    inputs, weights = torch.randn(BATCH, dim + 1), torch.randn(rates * classes, dim + 1)
    gradient, logits = torch.randn(rates * classes, BATCH), torch.empty(rates * classes, BATCH)

    def step():
        torch.mm(weights, inputs.T, out=logits)
        weights.addmm_(gradient, inputs, beta=0.9)

    step()
    steps = EPOCHS * (count // BATCH + round((1 - HELD_OUT) * count) // BATCH)
    return steps * min(measure.seconds(step, "cpu", calls=20) for _ in range(5))


def probe(features, rates):
    from ldae_hf.evaluation.linear_probe import linear_probe

    result = linear_probe(*features, learning_rates=rates, epochs=EPOCHS, batch_size=BATCH, progress=False)
    return {"top1": result["top1"], "best_top1": result["best_top1"], "learning_rate": result["learning_rate"]}


def standardised(features):
    train, train_labels, test, test_labels = features
    mean, std = train.mean(dim=0), (train.var(dim=0, correction=0) + 1e-6).sqrt()
    return (train - mean) / std, train_labels, (test - mean) / std, test_labels


def scikit_learn(features, strength, max_iterations):
    from sklearn.linear_model import LogisticRegression

    train, train_labels, test, test_labels = (values.numpy() for values in standardised(features))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether it converged is in the result
        model = LogisticRegression(C=strength, max_iter=max_iterations).fit(train, train_labels)
    return {"top1": 100 * model.score(test, test_labels), "iterations": int(model.n_iter_[0])}


def preconditioned(features, strength):
    from ldae_hf.evaluation.logistic_regression import LogisticRegression

    train, train_labels, test, test_labels = standardised(features)
    regression = LogisticRegression(train, train_labels, int(train_labels.max()) + 1)
    weights, biases = regression.fit(strength, torch.arange(len(train)))
    return {"top1": 100 * ((test @ weights + biases).argmax(dim=1) == test_labels).float().mean().item()}


def compare(name: str, args) -> list[dict]:
    features = features_of(name)
    count, dim = features[0].shape
    classes = int(features[1].max()) + 1
    rates = torch.logspace(-3, 1, args.rates).tolist()
    methods = {f"probe, {args.rates} learning rates": partial(probe, features, rates)}
    if name != "made-1000":
        for strength in args.strengths:
            sklearn = partial(scikit_learn, features, strength, args.max_iterations)
            methods[f"scikit-learn, lbfgs, C={strength:g}"] = sklearn
            methods[f"ours, preconditioned L-BFGS, C={strength:g}"] = partial(preconditioned, features, strength)
    found, times = {}, {method: [] for method in methods}

    def run(method: str) -> None:
        found[method] = methods[method]()

    for _ in range(args.repeats):
        for method in methods:
            times[method].append(measure.seconds(partial(run, method), "cpu"))
    results = [
        {"features": f"{name}, {count:,} x {dim}, {classes} classes", "method": method, **found[method]}
        | {"seconds": times[method]}
        for method in methods
    ]
    results[0]["product_seconds"] = product_seconds(count, dim, args.rates, classes, args.threads)
    return results


def main():
    parser = measure.parser(__doc__.splitlines()[0])
    parser.set_defaults(repeats=1)
    parser.add_argument("--sets", nargs="+", default=["made", "cifar10"], choices=SETS)
    parser.add_argument("--rates", type=int, default=20, help="learning rates of the probe, from 0.001 to 10")
    parser.add_argument("--strengths", nargs="+", type=float, default=[0.1, 1.0, 10.0], help="C of scikit-learn")
    parser.add_argument("--max-iterations", type=int, default=1000, help="of scikit-learn's lbfgs")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = [result for name in args.sets for result in compare(name, args)]
    rows = [
        [
            result["features"],
            result["method"],
            f"{result['top1']:.2f}",
            f"{statistics.median(result['seconds']):.1f}",
            f"{result['product_seconds']:.1f}" if "product_seconds" in result else "",
            str(result.get("iterations", "")),
        ]
        for result in results
    ]
    notes = [
        f"{args.threads} threads, {args.repeats} interleaved repetitions, medians; the probe for {EPOCHS} epochs in "
        f"batches of {BATCH}, twice, with its selection; scikit-learn stops at {args.max_iterations} iterations.",
        "Top-1 of the probe is that of the learning rate selected on held-out training samples; of each C it is shown.",
    ]
    columns = ["features", "method", "top-1", "seconds", "its matrix products alone", "iterations"]
    measure.report(args, columns, rows, results, notes)


if __name__ == "__main__":
    main()
