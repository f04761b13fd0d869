import io
import json
import math
import re
import socket
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.metrics import accuracy_score, top_k_accuracy_score

from ldae_hf import LDAEConfig, LDAEForPreTraining, LDAEImageProcessor, LDAEModel, LearnedTokenizer
from ldae_hf.evaluation.encoders import PooledFeatures, open_encoder
from ldae_hf.evaluation.feature_maps import state_fingerprint
from ldae_hf.evaluation.features import cache_file, extract, extract_features, read_features, write_features
from ldae_hf.evaluation.figures import filters_figure, save_figure
from ldae_hf.evaluation.floors import FLOORS, RawPixels, TokenizerLatents, build_floors
from ldae_hf.evaluation.ledger import append_to_ledger, read_ledger, result_table
from ldae_hf.evaluation.ledger_rows import numbered_rows, rows_text
from ldae_hf.evaluation.linear_probe import linear_probe
from ldae_hf.evaluation.metrics import Top1Accuracy, accuracy, ranked_classes
from ldae_hf.evaluation.online import online_evaluation
from ldae_hf.evaluation.random_patches import RandomPatches
from ldae_hf.evaluation.reconstruction import figures, reconstruction_table, run_reconstruction
from ldae_hf.evaluation.tasks import run_knn, run_linear_probe
from ldae_hf.latent_tokenizers import build_autoencoder
from ldae_hf.patch_tokenizers import patchify
from ldae_hf.recipes import load_recipe
from ldae_hf.training.circumstances import commit
from ldae_hf.training.data import load_images


SIZE = 16


def make_images(count: int, seed: int) -> tuple[list[np.ndarray], list[int]]:
    """Stripes, horizontal or vertical by class, of random colour, phase and contrast, with noise."""
    generator = np.random.default_rng(seed)
    images, labels = [], []
    for label in generator.integers(0, 2, count).tolist():
        wave = np.sin(np.arange(SIZE) * 1.3 + generator.uniform(0, 2 * np.pi)) * generator.uniform(20, 60)
        stripes = np.broadcast_to(wave[:, None] if label else wave[None], (SIZE, SIZE))
        pixels = 128 + stripes[..., None] * generator.uniform(0.2, 1, 3) + generator.normal(0, 12, (SIZE, SIZE, 3))
        images.append(pixels.clip(0, 255).astype(np.uint8))
        labels.append(label)
    return images, labels


def as_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_dataset(files: list[bytes], labels: list[int]) -> Dataset:
    rows = {"image": [{"bytes": data, "path": None} for data in files], "label": labels}
    return Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "label": Value("int64")}))


@pytest.fixture(scope="module")
def images():
    return make_images(96, seed=0)


@pytest.fixture(scope="module")
def train_source(images):
    pixels, labels = images
    return load_images(make_dataset([as_png(image) for image in pixels], labels))


@pytest.fixture(scope="module")
def test_source():
    pixels, labels = make_images(48, seed=1)
    return load_images(make_dataset([as_png(image) for image in pixels], labels), "test")


@pytest.fixture(scope="module")
def processor(images):
    return LDAEImageProcessor(image_size=SIZE, patch_size=4, latent_dim=8).fit(images[0], progress=False)


def make_model(processor, seed: int = 0) -> LDAEModel:
    """A small encoder whose blocks do something: a fresh one's are the identity."""
    config = LDAEConfig(
        image_size=SIZE,
        patch_size=4,
        latent_dim=8,
        hidden_size=16,
        num_hidden_layers=2,
        decoder_num_hidden_layers=1,
        num_attention_heads=2,
    )
    torch.manual_seed(seed)
    model = LDAEModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.set_processor(processor)
    return model


@pytest.fixture
def model(processor):
    return make_model(processor)


@pytest.fixture
def options(tmp_path):
    return {"num_workers": 0, "progress": False, "cache_dir": tmp_path / "cache"}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# -- Metric -----------------------------------------------------------------------------------------------------------


def test_accuracies_equal_sklearns_and_need_no_network(no_network):
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(500, 12, generator=generator), torch.randint(12, (500,), generator=generator)
    result = accuracy(scores, labels)
    assert result["top1"] == pytest.approx(100 * accuracy_score(labels, scores.argmax(1)))
    assert result["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, scores, k=5, labels=range(12)))
    assert set(accuracy(scores[:, :9], labels % 9)) == {"top1"}  # below ten classes top-5 says little


def test_the_metric_takes_plain_classes_and_combines_with_others(no_network):
    combined = evaluate.combine([Top1Accuracy(keep_in_memory=True), Top1Accuracy(keep_in_memory=True)])
    result = combined.compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2])
    assert set(result.values()) == {75.0}


def test_of_equal_scores_the_lower_class_is_ranked_first():
    assert ranked_classes(torch.zeros(1, 10)).tolist() == [[0, 1, 2, 3, 4]]


# -- Features and their cache -----------------------------------------------------------------------------------------


def test_features_are_the_pooled_output_of_the_model_on_the_processors_images(
    model, processor, train_source, images, options
):
    found = extract_features(model, train_source, processor=processor, batch_size=40, **options)
    with torch.inference_mode():
        expected = model(**processor(images[0], return_tensors="pt")).pooler_output
    torch.testing.assert_close(found.features, expected, rtol=1e-5, atol=1e-6)
    assert found.features.dtype == torch.float32
    assert found.labels.tolist() == images[1] and found.sample_ids.tolist() == list(range(96))
    assert found.bad_images == 0


def test_a_folder_a_model_and_a_pretraining_model_give_the_same_features(
    model, processor, train_source, options, tmp_path
):
    pretraining = LDAEForPreTraining(model.config)
    pretraining.ldae.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path / "encoder")
    processor.save_pretrained(tmp_path / "encoder")
    options["cache_dir"] = None
    from_folder = extract_features(tmp_path / "encoder", train_source, **options)
    for other in (model, pretraining):
        found = extract_features(other, train_source, processor=processor, **options)
        assert torch.equal(found.features, from_folder.features)


def test_a_second_extraction_reads_the_cache_and_not_the_images(model, processor, train_source, options):
    first = extract_features(model, train_source, processor=processor, **options)
    [file] = options["cache_dir"].iterdir()
    write_features(file, first._replace(features=torch.full((96, 16), 7.0), bad_images=5))
    second = extract_features(model, train_source, processor=processor, **options)
    assert (second.features == 7).all() and second.bad_images == 5
    assert torch.equal(second.labels, first.labels) and torch.equal(second.sample_ids, first.sample_ids)


@pytest.mark.parametrize("change", ["weights", "buffers", "timestep", "noise", "dtype", "images", "size"])
def test_the_cache_forgets_when_anything_changes_that_features_depend_on(
    model, processor, train_source, tmp_path, change
):
    def key(source=train_source, size=SIZE, **arguments):
        encoder = open_encoder(model, processor=processor, **arguments)
        return cache_file(tmp_path, PooledFeatures(encoder), source, size)

    before = key()
    assert key() == before
    if change == "weights":
        model.layers[0].mlp.fc1.weight.data[0, 0] += 1e-6
        after = key()
    elif change == "buffers":
        model.position_embeddings[0, 0, 0] += 1
        after = key()
    elif change == "images":
        rows = train_source.dataset
        after = key(source=load_images(rows.select(range(1, len(rows)))))
    elif change == "size":
        after = key(size=2 * SIZE)
    else:
        after = key(**{change: {"timestep": 11, "noise": "frozen", "dtype": "bfloat16"}[change]})
    assert after != before


def test_a_cached_file_is_whole_or_not_there(tmp_path, model, processor, train_source, options):
    options["cache_dir"] = None
    features = extract_features(model, train_source, processor=processor, **options)
    write_features(tmp_path / "a" / "file.safetensors", features)
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["file.safetensors"]
    restored = read_features(tmp_path / "a" / "file.safetensors")
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(restored, features, strict=True))
    file = tmp_path / "a" / "file.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="file.safetensors in the cache of features is damaged"):
        read_features(file)


def test_features_can_go_into_a_trained_head(model, processor, train_source, options):
    features = extract_features(model, train_source, processor=processor, **options).features
    head = torch.nn.Linear(16, 2)
    head(features).sum().backward()
    assert head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("streaming", [False, True])
def test_unreadable_images_are_left_out_and_counted(model, processor, images, options, streaming):
    pixels, labels = images
    files = [as_png(image) for image in pixels]
    files[0], files[40], files[41], files[95] = b"", files[40][:60], b"no image", files[95][:90]
    good = [index for index in range(96) if index not in (0, 40, 41, 95)]
    options["cache_dir"] = None
    source = load_images(make_dataset(files, labels), streaming=streaming)
    found = extract_features(model, source, processor=processor, batch_size=1, **options)
    assert found.bad_images == 4
    assert found.sample_ids.tolist() == good
    assert found.labels.tolist() == [labels[index] for index in good]
    whole = extract_features(
        model, load_images(make_dataset([as_png(image) for image in pixels], labels)), processor=processor, **options
    )
    torch.testing.assert_close(found.features, whole.features[good], rtol=1e-5, atol=1e-6)


def test_features_of_a_stream_are_the_same_and_are_not_kept(model, processor, images, train_source, options):
    stream = load_images(make_dataset([as_png(image) for image in images[0]], images[1]), streaming=True)
    found = extract_features(model, stream, processor=processor, **options)
    assert not options["cache_dir"].exists()
    expected = extract_features(model, train_source, processor=processor, **options)
    torch.testing.assert_close(found.features, expected.features, rtol=1e-5, atol=1e-6)


def test_frozen_noise_belongs_to_the_sample_and_not_to_the_batch(model, processor, train_source, options):
    options["cache_dir"] = None
    noisy = dict(processor=processor, timestep=300, noise="frozen")
    first = extract_features(model, train_source, batch_size=96, **noisy, **options)
    again = extract_features(model, train_source, batch_size=7, **noisy, **options)
    torch.testing.assert_close(first.features, again.features, rtol=1e-5, atol=1e-6)
    clean = extract_features(model, train_source, processor=processor, timestep=300, **options)
    other = extract_features(model, train_source, seed=1, **noisy, **options)
    for different in (clean, other):
        assert (first.features - different.features).abs().mean() > 1e-2


def test_bfloat16_features_are_near_those_in_float32(model, processor, train_source, options):
    exact, rough = (
        extract_features(model, train_source, processor=processor, dtype=dtype, **options).features
        for dtype in ("float32", "bfloat16")
    )
    error = (exact - rough).norm() / exact.norm()
    assert 0 < error < 0.02


def test_an_encoder_and_another_ones_processor_are_refused(model, processor, images, tmp_path):
    other = LDAEImageProcessor(image_size=SIZE, patch_size=4, latent_dim=8).fit(images[0][:50], progress=False)
    with pytest.raises(ValueError, match="not the one this model was built with"):
        open_encoder(model, processor=other)
    model.save_pretrained(tmp_path / "encoder")
    other.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="not the one this model was built with"):
        open_encoder(tmp_path / "encoder")
    with pytest.raises(ValueError, match="needs its processor too"):
        open_encoder(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(noise="fresh"), "'fresh' must be one of clean, frozen"),
        (dict(dtype="float16"), "'float16' must be one of float32, bfloat16"),
        (dict(timestep=1000), "must lie in 0 ... 999"),
    ],
    ids=str,
)
def test_unknown_ways_to_take_features_are_refused(model, processor, change, message):
    with pytest.raises(ValueError, match=message):
        open_encoder(model, processor=processor, **change)


# -- Floors -----------------------------------------------------------------------------------------------------------


def test_every_floor_has_its_dimension_and_comes_out_the_same_twice(model, processor, train_source, options):
    options["cache_dir"] = None
    encoder = open_encoder(model, processor=processor)
    first, again = (
        extract(build_floors(FLOORS, encoder, train_source), train_source, SIZE, **options) for _ in range(2)
    )
    assert [found.features.shape for found in first] == [(96, 3 * SIZE**2), (96, 16 * 8), (96, 16), (96, 16)]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.features, other.features)
        assert one.features.std(dim=0).min() > 0


def test_another_seed_changes_the_random_floors_only(model, processor, train_source):
    encoder = open_encoder(model, processor=processor)
    fingerprints = [
        [floor.fingerprint for floor in build_floors(FLOORS, encoder, train_source, seed=seed)] for seed in (0, 1)
    ]
    assert [a != b for a, b in zip(*fingerprints, strict=True)] == [False, False, True, True]


def test_an_unknown_floor_is_refused(model, processor, train_source):
    with pytest.raises(ValueError, match="no floor 'ceiling'; the floors are pixels, latents"):
        build_floors(["pixels", "ceiling"], open_encoder(model, processor=processor), train_source)


def test_large_images_are_shrunk_for_the_pixel_floor():
    constant = torch.full((2, 3, 128, 128), 51, dtype=torch.uint8)
    floor = RawPixels(128)
    assert floor.name == "raw pixels at 32x32"
    assert torch.allclose(floor(constant, None), torch.full((2, 3072), 0.2))


def test_the_latent_floor_is_what_the_processor_encodes(model, processor, images):
    floor = TokenizerLatents(model.tokenizer, processor, "patch_pca", None)
    found = floor(torch.from_numpy(processor.crop(images[0][:5])), None)
    torch.testing.assert_close(found, processor.encode(images[0][:5]).flatten(1), rtol=1e-5, atol=1e-5)


def test_the_latent_floor_is_named_after_the_tokenizer_and_kept_apart_by_its_fingerprint(model, processor):
    def floor(kind: str, fingerprint: str | None) -> TokenizerLatents:
        return TokenizerLatents(model.tokenizer, processor, kind, fingerprint)

    assert floor("patch_pca", None).name == "PCA latents"
    assert floor("conv_vae", "ab" * 32).name == "conv_vae latents"
    kinds = [("patch_pca", None), ("pixels", None), ("patch_ae", "ab" * 32), ("patch_ae", "cd" * 32)]
    assert len({floor(*kind).fingerprint for kind in kinds}) == len(kinds)


def test_the_untrained_encoder_has_new_weights_the_same_basis_and_leaves_the_generator_alone(model, processor):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    encoder = open_encoder(model, processor=processor)
    untrained = encoder.untrained(1).model
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(untrained.tokenizer.components, model.tokenizer.components)
    assert state_fingerprint(untrained) != state_fingerprint(model)
    assert state_fingerprint(untrained) == state_fingerprint(encoder.untrained(1).model)


def test_random_patches_see_neither_brightness_nor_more_than_a_factor_of_contrast(train_source):
    floor = RandomPatches(train_source, SIZE, 24)
    pixels = torch.randint(20, 100, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    features = floor(pixels, None)
    assert features.shape == (4, 24) and features.min() > 0
    torch.testing.assert_close(floor(pixels + 50, None), features, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(floor(pixels * 2, None), 2 * features, rtol=1e-4, atol=1e-3)


def test_responses_of_random_patches_to_other_patches_are_white(train_source):
    floor = RandomPatches(train_source, SIZE, 24)
    floor.whitening_epsilon = 1e-8
    patches = floor._draw_patches(torch.Generator().manual_seed(1))
    centred = patches - patches.mean(dim=1, keepdim=True)
    normalised = centred / (centred.var(dim=1, keepdim=True) + floor.contrast_epsilon).sqrt()
    variances = (normalised @ floor.filters.flatten(1).T.double()).var(dim=0)
    torch.testing.assert_close(variances, torch.ones_like(variances), rtol=0.1, atol=0)


def test_random_patches_of_large_images_take_a_stride(train_source):
    pixels = torch.randint(0, 255, (2, 3, 256, 256), dtype=torch.uint8)
    floor = RandomPatches(train_source, 256, 8)
    assert floor.stride == 4 and "stride 4" in floor.name
    exhaustive = RandomPatches(train_source, 256, 8)
    exhaustive.stride = 1
    # A sixteenth of the places is enough for a mean.
    torch.testing.assert_close(floor(pixels, None), exhaustive(pixels, None), rtol=0.15, atol=0)


def test_more_filters_than_patches_are_refused(train_source):
    with pytest.raises(ValueError, match="are fewer than 20001"):
        RandomPatches(train_source, SIZE, 20_001)


# -- Learned tokenizers -----------------------------------------------------------------------------------------------


def make_run(folder: Path, kind: str, processor: LDAEImageProcessor) -> Path:
    """The folder of a tokenizer run, without the run."""
    torch.manual_seed(3)
    buffers, autoencoder = {"explained_variance": torch.rand(8) + 0.5}, None
    if kind == "conv_vae":
        autoencoder = build_autoencoder(SIZE, 2, 8, 1, latent_channels=2).eval()
    else:
        components = processor.components[:8].float() + 0.05 * torch.randn(8, 48)
        buffers |= {"components": components, "decoder_components": components, "mean": processor.mean.float()}
    training = {"recipe": kind, "tier": "cpu", "overrides": ["data.flip=true"], "seed": 5}
    learned = LearnedTokenizer(kind, 4, 8, buffers, autoencoder, processor.fingerprint, training)
    learned.save_pretrained(folder / "tokenizer")
    processor.save_pretrained(folder / "processor")
    return folder


def pixel_values_of(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize("kind", ["patch_ae", "conv_vae"])
def test_reconstruction_errors_are_those_of_each_image_beside_pca_and_enter_the_ledger(
    kind, processor, test_source, options, tmp_path, no_network
):
    run = make_run(tmp_path / "run", kind, processor)
    written = dict(output=tmp_path / "out" / "figures.json", ledger=tmp_path / "ledger.jsonl")
    row = run_reconstruction(run, test_source, batch_size=20, **written, **options)
    assert read_ledger(written["ledger"]) == [row] == [json.loads(written["output"].read_text())]
    learned = LearnedTokenizer.from_pretrained(run / "tokenizer")

    pixels, _ = make_images(48, seed=1)
    pixels = pixel_values_of(pixels)
    patches = patchify(pixels, 4)
    basis, mean = processor.components[:8], processor.mean
    by_pca = mean + (patches.double() - mean) @ basis.T @ basis
    with torch.no_grad():
        if kind == "conv_vae":
            restored = patchify(learned.autoencoder(pixels).sample, 4)
        else:
            encoder, decoder = learned.buffers["components"], learned.buffers["decoder_components"]
            restored = mean + (patches - mean).float() @ encoder.T @ decoder
    for found, answer in ((row, restored), (row["pca"], by_pca)):
        error = (patches - answer).double().square().mean().item()
        assert found["squared_error"] == pytest.approx(error, rel=1e-5)
        assert found["psnr"] == pytest.approx(10 * math.log10(255**2 / (error * 127.5**2)), rel=1e-6)
    assert row["pca"]["squared_error"] < row["squared_error"]

    assert (row["task"], row["tokenizer"], row["latent_dim"]) == ("reconstruction", kind, 8)
    assert (row["recipe"], row["tier"], row["overrides"]) == (kind, "cpu", ["data.flip=true"])
    assert row["training"]["seed"] == 5 and "latents_top1" not in row
    assert row["protocol"]["tokenizer"] == learned.fingerprint
    assert (row["protocol"]["processor"], row["protocol"]["image_size"]) == (processor.fingerprint, SIZE)
    test = row["protocol"]["test"]
    assert (test["split"], test["images"], test["bad_images"]) == ("test", 48, 0)
    table = reconstruction_table(row).splitlines()
    assert table[1].split() == [f"{kind},", "K", "=", "8", f"{row['squared_error']:.5f}", f"{row['psnr']:.2f}"]
    assert table[2].startswith("PCA at the same K") and table[2].endswith(f"{row['pca']['psnr']:.2f}")


def test_a_probe_tells_what_the_latents_say_of_the_labels(
    processor, train_source, test_source, options, tmp_path, no_network
):
    run = make_run(tmp_path / "run", "patch_ae", processor)
    images = {"train": train_source.dataset, "test": test_source.dataset}
    row = run_reconstruction(run, images, probe=True, learning_rates=(0.01, 0.1), seed=4, **options)
    tokenizer = LearnedTokenizer.from_pretrained(run / "tokenizer").module()
    tensors = []
    for count, seed in ((96, 0), (48, 1)):
        pixels, labels = make_images(count, seed)
        tensors += [tokenizer.encode(pixel_values_of(pixels)).flatten(1), torch.tensor(labels)]
    expected = linear_probe(*tensors, learning_rates=(0.01, 0.1), seed=4, progress=False)
    assert row["latents_top1"] == expected["top1"]
    assert row["protocol"]["probe"] == expected["protocol"]
    assert row["protocol"]["train"] == {"split": "train", "images": 96}
    assert reconstruction_table(row).endswith(f"linear probe on the latents: {row['latents_top1']:.1f} %")
    with pytest.raises(ValueError, match="^A probe needs the training images beside the test images; name the data s"):
        run_reconstruction(run, test_source, probe=True, **options)


def test_reconstruction_leaves_out_what_cannot_be_read_and_needs_the_tokenizers_own_processor(
    processor, images, options, tmp_path
):
    run = make_run(tmp_path / "run", "patch_ae", processor)
    files = [as_png(image) for image in images[0][:6]]
    whole = run_reconstruction(run, load_images(make_dataset(files, [0] * 6)), **options)
    damaged = load_images(make_dataset([b"", *files, b"no image"], [0] * 8))
    row = run_reconstruction(run / "tokenizer", damaged, processor=run / "processor", batch_size=3, **options)
    assert row["squared_error"] == pytest.approx(whole["squared_error"], rel=1e-9)
    assert (row["protocol"]["test"]["images"], row["protocol"]["test"]["bad_images"]) == (6, 2)
    with pytest.raises(ValueError, match="of the data set, from number 0 on, cannot be read"):
        run_reconstruction(run, load_images(make_dataset([b"", b"x"], [0, 0])), **options)

    other = LDAEImageProcessor(image_size=SIZE, patch_size=4, latent_dim=8).fit(images[0][:50], progress=False)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="run/tokenizer goes with another processor than this one.$"):
        run_reconstruction(run, load_images(make_dataset(files, [0] * 6)), processor=tmp_path / "other", **options)
    with pytest.raises(ValueError, match="nowhere holds no finished tokenizer"):
        run_reconstruction(tmp_path / "nowhere", load_images(make_dataset(files, [0] * 6)), **options)


def test_a_perfect_reconstruction_has_no_peak_signal_to_noise_ratio():
    assert figures(0.0) == {"squared_error": 0.0, "psnr": None}
    assert figures(4.0)["psnr"] == 0  # as wrong as white for black
    assert figures(0.04)["psnr"] == pytest.approx(20)
    perfect = figures(0.0) | {"tokenizer": "patch_ae", "latent_dim": 48, "pca": figures(0.0)}
    assert reconstruction_table(perfect).splitlines()[1].split()[-2:] == ["0.00000", "-"]


def test_filters_of_patch_wise_tokenizers_are_painted_below_those_of_pca(processor, tmp_path):
    runs = [make_run(tmp_path / kind, kind, processor) for kind in ("patch_ae", "patch_vae")]
    picture = save_figure(filters_figure([runs[0], runs[1] / "tokenizer"], 5), tmp_path / "out" / "filters.svg")
    names = re.findall(r">(PCA|AE|VAE)<", picture.read_text())
    assert sorted(names) == ["AE", "PCA", "VAE"] and picture.read_text().count("<image") == 3 * 5
    drawn = save_figure(filters_figure(runs[:1], 99), tmp_path / "filters.png")  # at most K
    with Image.open(drawn) as image:
        assert image.width > image.height > 50


def test_filters_are_painted_by_falling_variance_of_their_latents(processor, tmp_path):
    # An autoencoder that has found the directions of PCA, in another order.
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    components = processor.components[:8].float()[order]
    buffers = {"components": components, "decoder_components": components, "mean": processor.mean.float()}
    buffers["explained_variance"] = processor.explained_variance[order].float()
    run = make_run(tmp_path / "run", "patch_ae", processor)
    LearnedTokenizer("patch_ae", 4, 8, buffers).save_pretrained(run / "tokenizer")
    picture = save_figure(filters_figure([run]), tmp_path / "filters.svg").read_text()
    drawn = [b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)\"", picture)]
    # The pictures differ in their size by a pixel, not in the colours of their 4x4 squares.
    colours = [Image.open(io.BytesIO(data)).convert("RGB").resize((4, 4), Image.Resampling.NEAREST) for data in drawn]
    assert len({image.tobytes() for image in colours}) == 8
    assert [image.tobytes() for image in colours[:8]] == [image.tobytes() for image in colours[8:]]


def test_filters_that_are_no_patches_are_not_painted(processor, tmp_path):
    run = make_run(tmp_path / "run", "conv_vae", processor)
    with pytest.raises(ValueError, match="run/tokenizer holds a conv_vae, which is not patch-wise and has no such fil"):
        filters_figure([run])


# -- Ledger -----------------------------------------------------------------------------------------------------------


def test_a_row_comes_back_from_the_ledger_with_its_circumstances(tmp_path):
    file = tmp_path / "results" / "ledger.jsonl"
    written = [append_to_ledger({"recipe": "l_dae", "top1": 48.5, "seed": seed}, file) for seed in (0, 1)]
    assert read_ledger(file) == written
    assert [row["seed"] for row in written] == [0, 1]
    assert set(written[0]) == {"time", "command", "commit", "machine", "versions", "recipe", "top1", "seed"}
    assert written[0]["machine"]["cores"] >= 1 and written[0]["versions"]["torch"] == torch.__version__
    assert commit() is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit())


def test_a_broken_line_costs_only_itself(tmp_path):
    file = tmp_path / "ledger.jsonl"
    append_to_ledger({"n": 1}, file)
    with file.open("ab") as stream:
        stream.write(b'{"n": 2, "cut of\n\n[3]\n\xff\xfe\n')
    append_to_ledger({"n": 4}, file)
    with pytest.warns(UserWarning, match="no row of a ledger") as warned:
        assert [row["n"] for row in read_ledger(file)] == [1, 4]
    assert len(warned) == 3
    assert read_ledger(tmp_path / "none.jsonl") == []


def test_a_ledger_from_anywhere_is_read_without_a_crash(tmp_path):
    file = tmp_path / "ledger.jsonl"
    strange = [
        {"task": ["knn"]},
        {"tier": ["cpu"]},
        {"overrides": 5},
        {"floors": [5]},
        {"training": [5]},
        {"protocol": 1},
    ]
    rows = [{"task": "knn", "top1": 10**400, "overrides": [5], "recipe": "l_dae", "protocol": {"test": "x"}}]
    text = "".join(json.dumps(row) + "\n" for row in [*strange, *rows])
    file.write_text(text + "[" * 200_000 + "\n")
    with pytest.warns(UserWarning, match="no row of a ledger") as warned:
        assert read_ledger(file) == rows
        assert "l_dae + 5" in rows_text(numbered_rows(file))
    assert len(warned) == 2 * (len(strange) + 1)


def test_writers_at_the_same_time_lose_no_row(tmp_path):
    file = tmp_path / "ledger.jsonl"
    circumstances = dict(commit=None, machine={}, versions={}, padding="x" * 5000)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: append_to_ledger({"n": n, **circumstances}, file), range(40)))
    assert sorted(row["n"] for row in read_ledger(file)) == list(range(40))


def test_a_number_that_is_none_never_enters_the_ledger(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_to_ledger({"top1": math.nan}, tmp_path / "ledger.jsonl")
    assert not (tmp_path / "ledger.jsonl").exists()


# -- The whole line ---------------------------------------------------------------------------------------------------


def test_a_probe_of_a_folder_states_floors_protocol_and_recipe_and_enters_the_ledger(
    model, processor, train_source, test_source, options, tmp_path, no_network
):
    model.save_pretrained(tmp_path / "encoder")
    processor.save_pretrained(tmp_path / "encoder")
    load_recipe("l_dae", "cpu").save(tmp_path / "encoder")
    (tmp_path / "encoder" / "training.json").write_text('{"seed": 7, "steps": 10}')
    written = dict(output=tmp_path / "out" / "probe.json", ledger=tmp_path / "ledger.jsonl")
    row = run_linear_probe(
        tmp_path / "encoder",
        train_source,
        test_dataset=test_source,
        epochs=20,
        **written,
        **options,
    )
    assert read_ledger(written["ledger"]) == [row] == [json.loads(written["output"].read_text())]
    assert (row["task"], row["recipe"], row["tier"]) == ("linear_probe", "l_dae", "cpu")
    assert row["training"] == {"seed": 7, "steps": 10}
    assert list(row["floors"]) == ["raw pixels", "PCA latents", "untrained encoder", "random whitened patches"]
    assert [entry["dim"] for entry in (row, *row["floors"].values())] == [16, 768, 128, 16, 16]
    # Neither pixels nor latents can tell the direction of stripes of any phase linearly; filters can.
    assert row["floors"]["random whitened patches"]["top1"] > 90 > row["floors"]["raw pixels"]["top1"]
    protocol = row["protocol"]
    assert protocol["features"]["encoder"] == state_fingerprint(model)
    assert protocol["features"]["processor"] == processor.fingerprint
    assert (protocol["features"]["timestep"], protocol["features"]["noise"]) == (10, "clean")
    assert (protocol["train"]["images"], protocol["test"]["images"], protocol["test"]["bad_images"]) == (96, 48, 0)
    assert protocol["linear_probe"]["epochs"] == 20 and protocol["linear_probe"]["batch_size"] == 12
    table = result_table(row)
    for name, entry in row["floors"].items():
        assert re.search(rf"{name} +{entry['dim']} +{entry['top1']:.1f} +{entry['best_top1']:.1f}$", table, re.M)


def test_without_a_data_set_the_encoders_recipe_names_it(
    model, processor, train_source, test_source, options, tmp_path, monkeypatch
):
    model.save_pretrained(tmp_path / "encoder")
    processor.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="no recipe.json beside the encoder names one"):
        run_knn(tmp_path / "encoder", **options)
    load_recipe("l_dae", "cpu").save(tmp_path / "encoder")
    (tmp_path / "cifar10").mkdir()
    train_source.dataset.to_parquet(tmp_path / "cifar10" / "train-0.parquet")
    test_source.dataset.to_parquet(tmp_path / "cifar10" / "test-0.parquet")
    monkeypatch.setenv("LDAE_DATA", str(tmp_path))
    row = run_knn(tmp_path / "encoder", floors=(), **options)
    found = [(row["protocol"][split]["split"], row["protocol"][split]["images"]) for split in ("train", "test")]
    assert found == [("train", 96), ("test", 48)]
    given = run_knn(model, train_source, test_dataset=test_source, processor=processor, floors=(), **options)
    assert row["top1"] == given["top1"]


def test_knn_of_a_model_runs_the_same_line(model, processor, train_source, test_source, options):
    row = run_knn(model, train_source, test_dataset=test_source, processor=processor, k=5, floors=["pixels"], **options)
    assert row["task"] == "knn" and row["recipe"] is None
    assert row["protocol"]["knn"]["k"] == 5 and "best_top1" not in row
    noisy = run_knn(
        model, train_source, test_dataset=test_source, processor=processor, noise="frozen", seed=3, floors=(), **options
    )
    assert noisy["protocol"]["features"]["noise"] == "frozen by sample id, seed 3" and noisy["floors"] == {}
    assert [line.split("  ")[0] for line in result_table(row).splitlines()][1:] == ["encoder", "raw pixels"]


def test_a_data_set_without_labels_is_refused_before_any_work(model, processor, images, options):
    unlabelled = load_images(make_dataset([as_png(image) for image in images[0]], images[1]).remove_columns("label"))
    with pytest.raises(ValueError, match="has no labels"):
        run_knn(model, unlabelled, test_dataset=unlabelled, processor=processor, **options)
    assert not options["cache_dir"].exists()


def test_the_training_loop_can_ask_for_both_accuracies(model, processor, train_source, test_source):
    pretraining = LDAEForPreTraining(model.config)
    pretraining.ldae.load_state_dict(model.state_dict())
    result = online_evaluation(train_source, test_source, epochs=2, num_workers=0)(pretraining, processor)
    assert set(result) == {"probe_top1", "knn_top1"}
    assert all(0 <= value <= 100 for value in result.values())
