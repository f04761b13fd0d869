import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from ldae_hf.training.adversarial import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_layers,
    generator_loss,
    hinge_loss,
)
from ldae_hf.training.perceptual import (
    LPIPS,
    LabelFeatures,
    random_label,
    train_label_features,
    unit_squared_difference,
)


# Names and shapes in torchvision's state dict of VGG-16, without the classifier's six entries.
TORCHVISION_VGG16 = {
    "features.0.weight": (64, 3, 3, 3),
    "features.0.bias": (64,),
    "features.2.weight": (64, 64, 3, 3),
    "features.2.bias": (64,),
    "features.5.weight": (128, 64, 3, 3),
    "features.5.bias": (128,),
    "features.7.weight": (128, 128, 3, 3),
    "features.7.bias": (128,),
    "features.10.weight": (256, 128, 3, 3),
    "features.10.bias": (256,),
    "features.12.weight": (256, 256, 3, 3),
    "features.12.bias": (256,),
    "features.14.weight": (256, 256, 3, 3),
    "features.14.bias": (256,),
    "features.17.weight": (512, 256, 3, 3),
    "features.17.bias": (512,),
    "features.19.weight": (512, 512, 3, 3),
    "features.19.bias": (512,),
    "features.21.weight": (512, 512, 3, 3),
    "features.21.bias": (512,),
    "features.24.weight": (512, 512, 3, 3),
    "features.24.bias": (512,),
    "features.26.weight": (512, 512, 3, 3),
    "features.26.bias": (512,),
    "features.28.weight": (512, 512, 3, 3),
    "features.28.bias": (512,),
}
LPIPS_LINEAR = {
    "lin0.model.1.weight": (1, 64, 1, 1),
    "lin1.model.1.weight": (1, 128, 1, 1),
    "lin2.model.1.weight": (1, 256, 1, 1),
    "lin3.model.1.weight": (1, 512, 1, 1),
    "lin4.model.1.weight": (1, 512, 1, 1),
}


def images(count, size, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def published():
    """Random weights under the names and shapes of the two published files, a classifier's among them."""
    generator = torch.Generator().manual_seed(0)
    vgg = {
        name: torch.randn(shape, generator=generator) * (2 / (9 * shape[1])) ** 0.5
        if len(shape) == 4
        else 0.1 * torch.randn(shape, generator=generator)
        for name, shape in TORCHVISION_VGG16.items()
    }
    linear = {name: torch.rand(shape, generator=generator) for name, shape in LPIPS_LINEAR.items()}
    return vgg | {"classifier.6.bias": torch.zeros(1000)}, linear


@pytest.fixture(scope="module")
def lpips_folder(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    save_file(published[0], folder / "vgg16.safetensors")
    save_file(published[1], folder / "lpips.safetensors")
    return folder


@pytest.fixture(scope="module")
def lpips(lpips_folder):
    return LPIPS.from_folder(lpips_folder)


def lpips_written_out(vgg, linear, first, second):
    """LPIPS v0.1 from its paper (Eq. 1) and torchvision's table "D" of VGG-16, one line per operation."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)

    def features(x):
        x, layer, found = (x - shift) / scale, 0, []
        table = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
        for entry in table:
            if entry == "M":
                found.append(x)
                x = F.max_pool2d(x, kernel_size=2, stride=2)
                layer += 1
            else:
                x = F.conv2d(x, vgg[f"features.{layer}.weight"], vgg[f"features.{layer}.bias"], padding=1)
                x = x.clamp(min=0)
                layer += 2
        return found

    total = 0
    for i, (a, b) in enumerate(zip(features(first), features(second), strict=True)):
        a = a / (a.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
        b = b / (b.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
        total = total + F.conv2d((a - b) ** 2, linear[f"lin{i}.model.1.weight"]).mean([2, 3])[:, 0]
    return total


def test_lpips_is_the_formula(lpips, published):
    first, second = images(2, 48, seed=1), images(2, 48, seed=2)
    found = lpips(first, second)
    assert found.shape == (2,)
    torch.testing.assert_close(found, lpips_written_out(*published, first, second), rtol=1e-5, atol=0)


def test_lpips_has_torchvisions_keys_and_shapes_and_nothing_to_train(lpips):
    state = {name: tuple(value.shape) for name, value in lpips.state_dict().items() if name.startswith("features.")}
    assert state == TORCHVISION_VGG16
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_lpips_ends_each_stage_where_the_side_is_halved(lpips):
    assert [tuple(tap.shape) for tap in lpips.taps(images(1, 33))] == [
        (1, 64, 33, 33),
        (1, 128, 16, 16),
        (1, 256, 8, 8),
        (1, 512, 4, 4),
        (1, 512, 2, 2),
    ]


@pytest.fixture(scope="module", params=["lpips", "label features"])
def distance(request, lpips):
    if request.param == "lpips":
        return lpips
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LabelFeatures(5).requires_grad_(False)


def test_a_perceptual_distance_is_zero_for_equal_images_and_symmetric_and_per_image(distance):
    first, second = images(3, 24, seed=1), images(3, 24, seed=2)
    assert torch.equal(distance(first, first), torch.zeros(3))
    found = distance(first, second)
    assert (found > 0).all()
    torch.testing.assert_close(distance(second, first), found)
    torch.testing.assert_close(torch.stack([distance(first[i : i + 1], second[i : i + 1])[0] for i in range(3)]), found)


def test_a_perceptual_distance_grows_with_the_difference(distance):
    first, noise = images(4, 24, seed=1), images(4, 24, seed=2)
    found = [distance(first, (1 - share) * first + share * noise).mean() for share in (0.05, 0.2, 0.8)]
    assert found == sorted(found)


def test_the_gradient_of_a_perceptual_distance_reaches_the_image_and_no_weight(distance):
    first = images(2, 24, seed=1).requires_grad_()
    distance(first, images(2, 24, seed=2)).sum().backward()
    assert first.grad.isfinite().all() and (first.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(parameter.grad is None for parameter in distance.parameters())


@pytest.mark.parametrize("shapes", [((1, 3, 24, 24), (2, 3, 24, 24)), ((1, 1, 24, 24),) * 2, ((1, 3, 7, 24),) * 2])
def test_a_perceptual_distance_names_the_shapes_that_it_cannot_compare(distance, shapes):
    with pytest.raises(ValueError, match=r"compares two batches \(B,3,H,W\) of one shape") as error:
        distance(*(torch.zeros(shape) for shape in shapes))
    assert str(shapes[0]) in str(error.value)


def test_channel_vectors_of_zeros_give_a_finite_gradient():
    zeros = torch.zeros(1, 4, 2, 2, requires_grad=True)
    unit_squared_difference(zeros.relu(), torch.rand(1, 4, 2, 2)).sum().backward()
    assert zeros.grad.isfinite().all()


def test_half_precision_features_are_compared_in_float32():
    first, second = torch.rand(1, 4, 2, 2).bfloat16(), torch.zeros(1, 4, 2, 2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = unit_squared_difference(first, second)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(dim=1), torch.ones(1, 2, 2))


def test_a_missing_lpips_file_is_answered_with_where_to_get_it(tmp_path, published):
    for name in ("vgg16.safetensors", "lpips.safetensors"):
        with pytest.raises(ValueError) as error:
            LPIPS.from_folder(tmp_path)
        message = str(error.value)
        assert message.startswith(f"There is no file {tmp_path / name}; download ")
        assert "https://download.pytorch.org/models/vgg16-397923af.pth" in message
        assert f"`ldae weights convert FILE --output {tmp_path}/vgg16.safetensors`" in message
        save_file(published[0], tmp_path / "vgg16.safetensors")


def test_lpips_files_with_other_tensors_are_refused(tmp_path, published):
    vgg, linear = published

    def refused(message, vgg=vgg, linear=linear):
        save_file(vgg, tmp_path / "vgg16.safetensors")
        save_file(linear, tmp_path / "lpips.safetensors")
        with pytest.raises(ValueError, match=message):
            LPIPS.from_folder(tmp_path)

    refused("has no tensor 'features.28.bias'", {k: v for k, v in vgg.items() if k != "features.28.bias"})
    refused(r"'features.0.bias' has the shape \(32,\), not \(64,\)", vgg | {"features.0.bias": torch.zeros(32)})
    refused("has no tensor 'lin0.model.1.weight'", linear={"lin0.weight": torch.zeros(1, 64, 1, 1)})
    refused("negative weights", linear=linear | {"lin1.model.1.weight": torch.full((1, 128, 1, 1), -1.0)})
    (tmp_path / "vgg16.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="vgg16.safetensors is not a safetensors file"):
        LPIPS.from_folder(tmp_path)


@pytest.mark.parametrize("size", [8, 9, 32])
def test_label_features_take_images_of_any_size_from_8_pixels_on(size):
    model = LabelFeatures(7, widths=(4, 8, 16))
    assert model(images(2, size), images(2, size, seed=1)).shape == (2,)
    assert model.logits(images(2, size)).shape == (2, 7)
    assert [tap.shape[1:] for tap in model.taps(images(2, size))] == [
        (4, size, size),
        (8, size // 2, size // 2),
        (16, size // 4, size // 4),
    ]


def test_the_distance_of_label_features_is_the_mean_of_its_stages():
    model, first, second = LabelFeatures(7, widths=(4, 8)), images(2, 12), images(2, 12, seed=1)
    expected = 0
    for a, b in zip(model.taps(first), model.taps(second), strict=True):
        cosine = F.cosine_similarity(a, b, dim=1)  # |u - v|² = 2 - 2 cos of unit vectors, where neither is zero
        both = (a.square().sum(1) > 0) & (b.square().sum(1) > 0)
        one = (a.square().sum(1) > 0) ^ (b.square().sum(1) > 0)
        expected = expected + ((2 - 2 * cosine) * both + 1.0 * one).mean(dim=(1, 2)) / 2
    torch.testing.assert_close(model(first, second), expected, rtol=1e-4, atol=1e-6)


def test_label_features_come_back_from_their_folder_frozen(tmp_path):
    model = LabelFeatures(7, widths=(4, 8))
    model.to(memory_format=torch.channels_last).save(tmp_path / "new")
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "label_features.json",
        "label_features.safetensors",
    ]
    loaded = LabelFeatures.load(tmp_path / "new")
    assert (loaded.num_classes, loaded.widths) == (7, (4, 8))
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training


def test_label_features_that_are_missing_or_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="label_features.json does not describe label features"):
        LabelFeatures.load(tmp_path)
    LabelFeatures(7, widths=(4, 8)).save(tmp_path)
    weights = tmp_path / "label_features.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"head.bias": torch.zeros(3)}, weights)
    with pytest.raises(ValueError, match=r"'head.bias' has the shape \(3,\), not \(7,\)"):
        LabelFeatures.load(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="There is no file .*label_features.safetensors; train"):
        LabelFeatures.load(tmp_path)
    (tmp_path / "label_features.json").write_text('{"num_classes": 0, "widths": [4]}')
    with pytest.raises(ValueError, match="positive num_classes"):
        LabelFeatures.load(tmp_path)


def stripes(count=192, seed=0):
    """Images whose stripes run one way (class 0) or the other (class 1), in any colour and phase."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    waves = torch.sin(torch.arange(12.0) * 2 + 6.3 * torch.rand(count, 1, generator=generator))  # (count, 12)
    across = waves[:, None, None, :].expand(count, 3, 12, 12) * torch.rand(count, 3, 1, 1, generator=generator)
    turned = torch.where(labels[:, None, None, None] == 1, across.transpose(2, 3), across)
    pixels = (turned * 100 + 128).clamp(0, 255).to(torch.uint8)
    return {"pixel_values": pixels, "labels": labels, "sample_ids": torch.arange(count) + 1000}


def batches_of(samples, size=16):
    def loader_of_epoch(epoch):
        order = torch.randperm(len(samples["labels"]), generator=torch.Generator().manual_seed(epoch))
        return [{name: value[index] for name, value in samples.items()} for index in order.split(size)]

    return loader_of_epoch


def test_label_features_learn_labels_and_come_back_frozen():
    before = torch.get_rng_state()
    model, figures = train_label_features(batches_of(stripes()), 2, epochs=4, progress=False)
    assert figures["train_top1"] > 95
    assert {"loss", "seconds"} < set(figures) and (figures["images"], figures["random_labels"]) == (192, False)
    test = stripes(seed=1)
    predicted = model.logits(test["pixel_values"] / 127.5 - 1).argmax(dim=1)
    assert (predicted == test["labels"]).float().mean() > 0.95
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_seed_trains_the_same_label_features_and_another_others():
    def trained(seed, random_labels=False):
        loader = batches_of(stripes(count=32))
        return train_label_features(loader, 2, epochs=1, seed=seed, random_labels=random_labels, progress=False)[0]

    first, again, other, random = trained(0), trained(0), trained(1), trained(0, random_labels=True)
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert not torch.equal(first.head.weight, random.head.weight)


def test_a_random_label_belongs_to_its_sample_and_seed():
    labels = [random_label(0, sample_id, 10) for sample_id in range(2000)]
    assert labels == [random_label(0, sample_id, 10) for sample_id in range(2000)]
    assert labels != [random_label(1, sample_id, 10) for sample_id in range(2000)]
    counts = torch.bincount(torch.tensor(labels), minlength=10)
    assert len(counts) == 10 and counts.min() > 150 and counts.max() < 250
    agreement = sum(label == sample_id % 10 for sample_id, label in enumerate(labels)) / 2000
    assert abs(agreement - 0.1) < 0.03


def test_random_labels_are_learned_instead_of_the_true_ones_and_need_none():
    samples = stripes(count=24)
    samples["labels"] = torch.full((24,), -1)
    # Few samples and many epochs: only labels that stay the same from epoch to epoch can be learned by heart.
    _, figures = train_label_features(
        batches_of(samples, size=8), 3, epochs=120, learning_rate=3e-3, random_labels=True, progress=False
    )
    assert figures["random_labels"] and figures["train_top1"] > 90


def test_a_label_that_is_missing_or_out_of_range_is_named_by_its_sample():
    samples = stripes(count=32)
    samples["labels"][5] = -1
    with pytest.raises(ValueError, match="Sample 1005 has no label; label features need a labelled data set"):
        train_label_features(batches_of(samples), 2, epochs=1, progress=False)
    samples["labels"][5] = 2
    with pytest.raises(ValueError, match="Sample 1005 has the label 2, not one of 2 classes"):
        train_label_features(batches_of(samples), 2, epochs=1, progress=False)


def test_label_features_do_not_train_on_nothing_or_to_infinity():
    with pytest.raises(ValueError, match="at least one epoch"):
        train_label_features(batches_of(stripes()), 2, epochs=0, progress=False)
    with pytest.raises(ValueError, match="The loader of epoch 0 has no batch"):
        train_label_features(lambda epoch: [], 2, epochs=1, progress=False)
    with pytest.raises(ValueError, match="The loss of the label features is (nan|inf) in step .* of epoch 0"):
        train_label_features(batches_of(stripes()), 2, epochs=1, learning_rate=1e20, progress=False)


@pytest.mark.parametrize(
    ("size", "layers", "side", "field"),
    [(8, 1, 2, 16), (16, 1, 6, 16), (32, 2, 6, 34), (64, 3, 6, 70), (256, 3, 30, 70)],
)
def test_the_discriminator_fits_the_image(size, layers, side, field):
    assert discriminator_layers(size) == layers
    model = PatchDiscriminator(layers, width=4)
    pixel_values = images(2, size).requires_grad_()
    logits = model(pixel_values)
    assert logits.shape == (2, 1, side, side)
    convolutions = [layer for layer in model.layers if isinstance(layer, nn.Conv2d)]
    reach, stride = 1, 1
    for convolution in convolutions:
        reach, stride = reach + (convolution.kernel_size[0] - 1) * stride, stride * convolution.stride[0]
    assert reach == field and len(convolutions) == layers + 2
    logits.sum().backward()
    assert pixel_values.grad.abs().sum() > 0


def test_the_discriminator_has_pix2pixs_widths_and_initialisation():
    torch.manual_seed(0)
    model = PatchDiscriminator(3, width=64)
    convolutions = [layer for layer in model.layers if isinstance(layer, nn.Conv2d)]
    assert [layer.weight.shape[:2] for layer in convolutions] == [(64, 3), (128, 64), (256, 128), (512, 256), (1, 512)]
    assert [layer.stride for layer in convolutions] == [(2, 2), (2, 2), (2, 2), (1, 1), (1, 1)]
    for layer in convolutions[1:]:
        assert abs(layer.weight.std().item() / 0.02 - 1) < 0.05 and abs(layer.weight.mean().item()) < 0.001
    assert [layer.negative_slope for layer in model.layers if isinstance(layer, nn.LeakyReLU)] == [0.2] * 4


def test_the_discriminator_judges_an_image_whatever_else_is_in_the_batch():
    model, pixel_values = PatchDiscriminator(2, width=6).double(), images(4, 32).double()
    together = model(pixel_values)
    apart = torch.cat([model(pixel_values[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
    assert not list(model.buffers())


def test_a_discriminator_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="at least 6 pixels, not 5"):
        discriminator_layers(5)
    with pytest.raises(ValueError, match="positive num_layers, width and num_channels, not 0, 64 and 3"):
        PatchDiscriminator(0)


def test_the_hinge_loss_is_its_formula():
    real, fake = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    terms = [max(0.0, 1 - x) for x in real.flatten().tolist()] + [max(0.0, 1 + x) for x in fake.flatten().tolist()]
    assert hinge_loss(real, fake).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert hinge_loss(torch.full((1,), 2.0), torch.full((1,), -2.0)) == 0
    assert generator_loss(fake).item() == pytest.approx(-fake.mean().item())


def test_the_adaptive_weight_is_the_quotient_of_the_two_gradients():
    layer = torch.tensor([1.0, 2.0], requires_grad=True)
    reconstruction, adversarial = (3 * layer).sum(), (layer * torch.tensor([0.0, 4.0])).sum()
    found = adaptive_weight(reconstruction, adversarial, layer)
    assert found.item() == pytest.approx(math.sqrt(18) / (4 + 1e-4))
    assert not found.requires_grad and layer.grad is None
    (reconstruction + found * adversarial).backward()  # the graphs are still there
    torch.testing.assert_close(layer.grad, torch.tensor([3.0, 3.0 + 4 * found.item()]))


def test_the_adaptive_weight_is_bounded_where_the_adversarial_gradient_vanishes():
    layer = torch.tensor([1.0, 2.0], requires_grad=True)
    assert adaptive_weight((1e6 * layer).sum(), (0 * layer).sum(), layer) == 1e4


def test_discriminator_and_decoder_play_against_each_other():
    torch.manual_seed(0)
    decoder, model = nn.Conv2d(3, 3, 3, padding=1), PatchDiscriminator(1, width=8)
    real = images(8, 16)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(60):
        loss = hinge_loss(model(real), model(decoder(real).detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5
    weight = adaptive_weight((decoder(real) - real).abs().mean(), generator_loss(model(decoder(real))), decoder.weight)
    assert 0 < weight < 1e4
