import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from tiny_encoder import pictures, save_tiny_encoder

from ldae_hf.evaluation.attentive_probe import AttentivePooling, attentive_probe
from ldae_hf.evaluation.attentive_run import extract_image_tokens, run_attentive_probe
from ldae_hf.evaluation.dense import tokens_of
from ldae_hf.evaluation.encoders import open_encoder
from ldae_hf.evaluation.ledger import read_ledger, result_table
from ldae_hf.evaluation.linear_probe import linear_probe
from ldae_hf.training.data import load_images


QUICK = dict(epochs=6, batch_size=32, learning_rates=(0.003, 0.03), progress=False)


def marked_tokens(count: int, seed: int, num_tokens: int = 12, num_classes: int = 3, dim: int = 8):
    """Every token shows a class, but only that of one token, in a place by chance and with a mark, is the image's."""
    generator = torch.Generator().manual_seed(seed)
    shown = torch.randint(num_classes, (count, num_tokens), generator=generator)
    place = torch.randint(num_tokens, (count, 1), generator=generator)
    tokens = 0.3 * torch.randn(count, num_tokens, dim, generator=generator)
    tokens[:, :, :num_classes] += torch.nn.functional.one_hot(shown, num_classes)
    tokens[:, :, -1].scatter_add_(1, place, torch.full((count, 1), 3.0))
    return tokens.half(), shown.gather(1, place)[:, 0]


def test_it_finds_a_signal_in_one_token_that_mean_pooling_cannot():
    (train, labels), (test, test_labels) = marked_tokens(1500, 0), marked_tokens(500, 1)
    pooled = linear_probe(train.float().mean(1), labels, test.float().mean(1), test_labels, progress=False)
    attentive = attentive_probe(train, labels, test, test_labels, num_heads=2, **QUICK)
    assert pooled["top1"] < 60 and attentive["top1"] > 90


def test_without_queries_it_is_a_linear_classifier_of_the_mean_over_tokens():
    tokens, _ = marked_tokens(5, 0)
    probes = AttentivePooling(torch.zeros(8), torch.ones(8), 2, num_heads=2, num_classes=3, seed=0)
    with torch.no_grad():
        for query, weights in zip(probes.queries, probes.weights, strict=True):
            query.zero_(), weights.normal_()
        values = torch.cat([probes.values[1][0], probes.values[1][1]], dim=1)
        expected = tokens.float().mean(dim=1) @ values @ probes.weights[1] + probes.biases[1]
        torch.testing.assert_close(probes(tokens)[1], expected, rtol=1e-4, atol=1e-5)


def test_its_attention_is_that_of_a_query_and_projected_keys():
    tokens, _ = marked_tokens(5, 0)
    probes = AttentivePooling(torch.zeros(8), torch.ones(8), 1, num_heads=2, num_classes=3, seed=0)
    key, query, weights = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((2, 8, 4), (2, 4), (8, 3))
    )
    with torch.no_grad():
        probes.queries[0].copy_(torch.einsum("hdk,hk->hd", key, query))
        probes.weights[0].copy_(weights)
        x = tokens.float()
        keys, values = (torch.einsum("bnd,hdk->bhnk", x, one) for one in (key, probes.values[0]))
        heads = torch.nn.functional.scaled_dot_product_attention(
            query[None, :, None].expand(5, -1, -1, -1), keys, values, scale=1.0
        )
        torch.testing.assert_close(probes(tokens)[0], heads[:, :, 0].flatten(1) @ weights, rtol=1e-4, atol=1e-5)


def test_learning_rates_trained_together_do_what_each_does_alone():
    train, test = marked_tokens(200, 0), marked_tokens(100, 1)
    options = QUICK | dict(epochs=2)
    together = attentive_probe(*train, *test, **options)["grid"]
    alone = [
        attentive_probe(*train, *test, **options | {"learning_rates": [rate]})["grid"][0] for rate in (0.003, 0.03)
    ]
    assert [entry["learning_rate"] for entry in together] == [0.003, 0.03]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=2.0)  # products of other shapes round otherwise


def test_the_learning_rate_is_selected_without_the_test_set():
    train, (tokens, labels) = marked_tokens(300, 0), marked_tokens(200, 1)
    options = QUICK | dict(learning_rates=(1e-6, 0.03), num_heads=2)
    result, misled = (
        attentive_probe(*train, tokens, labels, **options),
        attentive_probe(*train, tokens, (labels + 1) % 3, **options),
    )
    assert result["learning_rate"] == misled["learning_rate"] == 0.03
    assert misled["best_top1"] > misled["top1"] and result["best_top1"] == result["top1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(learning_rates=()), "positive learning rates"),
        (dict(num_heads=0), "at least one head"),
        (dict(held_out=0.6), "at most half"),
    ],
    ids=str,
)
def test_it_refuses_arguments_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        attentive_probe(*marked_tokens(40, 0), *marked_tokens(20, 1), **QUICK | change)


def test_it_refuses_tokens_of_different_shapes():
    (train, labels), (test, test_labels) = marked_tokens(40, 0), marked_tokens(20, 1)
    for wrong in (test[:, :5], test[..., :5], test[:, 0]):
        with pytest.raises(ValueError, match="must be .n,N,D. of the same N and D"):
            attentive_probe(train, labels, wrong, test_labels, **QUICK)


# -- The whole line ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources():
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    rows = [
        {"image": pictures(count, seed), "label": [n % 2 for n in range(count)]} for count, seed in ((24, 0), (12, 1))
    ]
    return [load_images(Dataset.from_dict(one, features=features), "train") for one in rows]


def test_a_run_states_floors_and_protocol_and_enters_the_ledger(sources, tmp_path):
    folder = save_tiny_encoder(tmp_path / "encoder")
    written = dict(output=tmp_path / "out" / "probe.json", ledger=tmp_path / "ledger.jsonl")
    train, test = sources
    options = dict(epochs=2, num_workers=0, progress=False, num_heads=4)
    row = run_attentive_probe(folder, train, test_dataset=test, **written, **options)
    assert [row] == read_ledger(written["ledger"]) and row == json.loads(written["output"].read_text())
    assert row["task"] == "attentive_probe" and row["dim"] == 32
    assert {name: floor["dim"] for name, floor in row["floors"].items()} == {
        "raw pixels": 48,
        "PCA latents": 6,
        "untrained encoder": 32,
    }
    assert (row["protocol"]["train"]["images"], row["protocol"]["test"]["images"]) == (24, 12)
    assert row["protocol"]["attentive_probe"]["epochs"] == 2
    assert row["protocol"]["features"]["pool"] == "none: tokens of the patches, kept in float16"
    assert len(result_table(row).splitlines()) == 5
    [again] = run_attentive_probe([folder], train, test_dataset=test, floors=(), **options)
    assert again["grid"] == row["grid"] and again["floors"] == {}


def test_tokens_are_the_encoders_in_memory_or_in_a_file(sources, tmp_path):
    encoder = open_encoder(save_tiny_encoder(tmp_path / "encoder"))
    options = dict(image_size=16, num_workers=0, progress=False)
    kept, filed = (
        extract_image_tokens(tokens_of(encoder), sources[0], memory=memory, **options) for memory in (4.0, 0.0)
    )
    assert kept.features.shape == (24, 16, 32) and kept.features.dtype == torch.float16
    assert torch.equal(kept.features, filed.features) and kept.labels.tolist() == 12 * [0, 1]


def test_a_floor_without_tokens_is_refused(sources):
    with pytest.raises(ValueError, match="'random_patches' is no floor with tokens"):
        run_attentive_probe("nowhere", sources[0], test_dataset=sources[1], floors=["random_patches"])
