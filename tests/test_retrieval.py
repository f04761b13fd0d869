import json
import shlex

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.metrics import average_precision_score
from tiny_encoder import pictures, save_tiny_encoder
from typer.testing import CliRunner

from ldae_hf.cli import app
from ldae_hf.evaluation import retrieval as retrieval_module
from ldae_hf.evaluation.retrieval import average_precisions, retrieval, run_retrieval


def clouds(count: int, seed: int, num_classes: int = 5, dim: int = 8):
    """Overlapping clusters; the centres are the same for every seed."""
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(count, dim, generator=generator), labels


def naive(database, database_labels, queries, query_labels, ranks, same=False):
    """Image by image, as the definitions read."""
    database, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (database.numpy(), queries.numpy()))
    precisions, recalls, shares = [], {k: [] for k in ranks}, {k: [] for k in ranks}
    for number, (query, label) in enumerate(zip(queries, query_labels.tolist(), strict=True)):
        others = [i for i in range(len(database)) if not (same and i == number)]
        order = sorted(others, key=lambda i: -float(database[i] @ query))
        matches = [int(database_labels[i]) == label for i in order]
        if not any(matches):
            continue
        precisions.append(np.mean([np.mean(matches[: rank + 1]) for rank, match in enumerate(matches) if match]))
        for k in ranks:
            recalls[k].append(any(matches[:k]))
            shares[k].append(np.mean(matches[:k]))
    return {
        "mean_average_precision": 100 * np.mean(precisions),
        **{f"recall_at_{k}": 100 * np.mean(recalls[k]) for k in ranks},
        **{f"precision_at_{k}": 100 * np.mean(shares[k]) for k in ranks},
    }


@pytest.mark.parametrize("similarities", [2**24, 500], ids=["one chunk", "many chunks"])
def test_the_scores_are_those_of_their_definitions(monkeypatch, similarities):
    monkeypatch.setattr(retrieval_module, "SIMILARITIES", similarities)
    (database, database_labels), (queries, query_labels) = clouds(150, 0), clouds(41, 1)
    found = retrieval(database, database_labels, queries, query_labels, ranks=(1, 5, 10))
    for name, value in naive(database, database_labels, queries, query_labels, (1, 5, 10)).items():
        assert found[name] == pytest.approx(value, abs=1e-4), name
    assert found["queries"] == 41 and found["queries_without_match"] == 0
    assert found["protocol"]["ranking"] == "the whole database"


@pytest.mark.parametrize("similarities", [2**24, 500], ids=["one chunk", "many chunks"])
def test_an_image_of_the_database_does_not_find_itself(monkeypatch, similarities):
    monkeypatch.setattr(retrieval_module, "SIMILARITIES", similarities)
    features, labels = clouds(90, 0)
    found = retrieval(features, labels, features, labels)
    for name, value in naive(features, labels, features, labels, (1, 5, 10), same=True).items():
        assert found[name] == pytest.approx(value, abs=1e-4), name
    assert found["protocol"]["ranking"] == "the whole database without the query itself"


def test_the_average_precision_is_sklearns_also_where_similarities_are_equal():
    generator = torch.Generator().manual_seed(0)
    similarities = torch.randint(0, 7, (20, 60), generator=generator).float()
    relevant = torch.rand(20, 60, generator=generator) < 0.2
    expected = [average_precision_score(r, s) for r, s in zip(relevant.numpy(), similarities.numpy(), strict=True)]
    torch.testing.assert_close(average_precisions(similarities, relevant), torch.tensor(expected).float())


def test_perfect_features_find_every_image_of_a_class_first():
    labels = torch.arange(60) % 3
    features = torch.eye(3)[labels] + 0.01 * torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    found = retrieval(features[:40], labels[:40], features[40:], labels[40:])
    assert {found[name] for name in found if "_at_" in name or name.startswith("mean")} == {100.0}


def test_features_that_say_nothing_give_the_share_of_a_class():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 4
    features = torch.randn(600, 16, generator=generator)
    found = retrieval(features[:400], labels[:400], features[400:], labels[400:])
    assert found["mean_average_precision"] == pytest.approx(25, abs=2)
    assert found["precision_at_10"] == pytest.approx(25, abs=4)
    assert found["recall_at_10"] == pytest.approx(100 * (1 - 0.75**10), abs=4)


def test_a_query_whose_class_the_database_does_not_have_is_left_out_and_counted():
    (database, database_labels), (queries, query_labels) = clouds(80, 0), clouds(20, 1)
    known = retrieval(database, database_labels, queries, query_labels)
    more, more_labels = torch.cat([queries, queries[:3]]), torch.cat([query_labels, torch.full((3,), 77)])
    found = retrieval(database, database_labels, more, more_labels)
    assert found["queries"] == 20 and found["queries_without_match"] == 3
    assert found["mean_average_precision"] == pytest.approx(known["mean_average_precision"])
    with pytest.raises(ValueError, match="No query has an image of its class"):
        retrieval(database, database_labels, queries, query_labels + 50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ranks=(0,)), "must lie in 1 ... 30"),
        (dict(ranks=(31,)), "must lie in 1 ... 30"),
        (dict(queries=torch.full((5, 8), torch.nan), query_labels=torch.zeros(5)), "NaN or infinite"),
        (dict(query_labels=torch.full((5,), -1)), "without a label"),
        (dict(query_labels=torch.zeros(4)), r"must be \(n,D\) and \(n,\)"),
    ],
    ids=["no rank", "a rank too high", "not finite", "no label", "shapes"],
)
def test_what_cannot_be_ranked_is_refused(change, message):
    (database, database_labels), (queries, query_labels) = clouds(30, 0), clouds(5, 1)
    arguments = dict(database=database, database_labels=database_labels, queries=queries, query_labels=query_labels)
    with pytest.raises(ValueError, match=message):
        retrieval(**arguments | change)


# -- From encoders to results -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_tiny_encoder(tmp_path_factory.mktemp("tiny") / "encoder")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Pictures of three kinds: each is one of three, with a little of another laid over."""
    kinds, folder = [image.resize((24, 24)) for image in pictures(3)], tmp_path_factory.mktemp("kinds")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["one", "two", "three"])})
    splits = {}
    for seed, (split, count) in enumerate({"train": 60, "test": 30}.items(), start=1):
        labels = [number % 3 for number in range(count)]
        others = [image.resize((24, 24)) for image in pictures(count, seed)]
        images = [Image.blend(kinds[label], other, 0.3) for label, other in zip(labels, others, strict=True)]
        splits[split] = Dataset.from_dict({"image": images, "label": labels}, features=features)
    DatasetDict(splits).save_to_disk(folder)
    return folder


def test_the_command_shows_a_table_paints_a_picture_and_gives_its_row_again(encoder, dataset, tmp_path):
    def retrieve(words: list[str], name: str, *more: str) -> tuple[dict, str]:
        result = CliRunner().invoke(app, [*words, "--output", str(tmp_path / name), *more], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads((tmp_path / name).read_text()), result.stdout

    arguments = ["retrieve", str(encoder), "--dataset", str(dataset), "--num-workers", "0", "--rank", "3"]
    arguments += ["--floor", "pixels"]
    row, shown = retrieve(arguments, "first.json", "--picture", str(tmp_path / "found.png"))
    assert "mAP  recall@3  precision@3" in shown and "raw pixels" in shown
    assert row["mean_average_precision"] > 60 and row["floors"]["raw pixels"]["mean_average_precision"] > 60
    assert row["task"] == "retrieval" and row["protocol"]["retrieval"]["ranks"] == [3]
    picture = np.asarray(Image.open(tmp_path / "found.png").convert("RGB")).astype(int)
    green = (picture[..., 1] - picture[..., 0] > 100) & (picture[..., 1] - picture[..., 2] > 90)
    assert green.any()
    again, _ = retrieve(shlex.split(row["rerun"])[1:], "again.json")
    assert again["protocol"] == row["protocol"] and again["rerun"] == row["rerun"]
    assert again["mean_average_precision"] == row["mean_average_precision"]


def test_one_split_for_both_leaves_each_query_out_of_its_own_ranking(encoder, dataset):
    options = dict(test_split="train", floors=("untrained",), num_workers=0, progress=False, cache_dir=None)
    [row] = run_retrieval(encoder, dataset, **options)
    assert row["protocol"]["retrieval"]["ranking"] == "the whole database without the query itself"
    assert row["protocol"]["train"]["fingerprint"] == row["protocol"]["test"]["fingerprint"]


def test_a_picture_shows_one_encoder(encoder, dataset, tmp_path):
    with pytest.raises(ValueError, match="one encoder"):
        run_retrieval([encoder, encoder], dataset, picture=tmp_path / "found.png")
