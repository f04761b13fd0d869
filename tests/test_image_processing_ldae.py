import io
import json
import os
import pickle
import subprocess
import sys
import threading
import weakref
from base64 import b64decode
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA
from transformers import AutoImageProcessor, AutoProcessor, pipeline

from ldae_hf import LDAEConfig, LDAEImageProcessor, LDAEModel
from ldae_hf.images import centre_box, read_image, resize_crop, to_rgb
from ldae_hf.patch_covariance import PatchCovariance
from ldae_hf.patch_tokenizers import PatchPCA, dct_basis, patchify


def make_images(count: int = 24, size: int = 16, seed: int = 0) -> list[Image.Image]:
    """Images with structure at several scales, so that their patches have falling variances and full rank."""
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        coarse = Image.fromarray(generator.integers(40, 216, (3, 3, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.int64)
        noisy = smooth + generator.integers(-9, 10, smooth.shape)
        images.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    return images


def make_processor(**kwargs) -> LDAEImageProcessor:
    return LDAEImageProcessor(**{"image_size": 16, "patch_size": 4, "latent_dim": 8} | kwargs)


def as_file(image: Image.Image, file_format: str = "PNG", **kwargs) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **kwargs)
    return file.getvalue()


def normalised_patches(processor: LDAEImageProcessor, images: list[Image.Image]) -> torch.Tensor:
    pixel_values = processor(images, return_tensors="pt")["pixel_values"].double()
    return patchify(pixel_values, processor.patch_size).flatten(0, 1)


@pytest.fixture(scope="module")
def images():
    return make_images()


@pytest.fixture(scope="module")
def fitted(images):
    return make_processor().fit(images, progress=False)


# -- Images -> pixel_values --------------------------------------------------------------------------------------------


def test_every_kind_of_input_gives_the_same_pixel_values(images):
    image = images[0]
    array = np.asarray(image)
    same = {
        "PIL": image,
        "list": [image],
        "nested lists": [[image], []],
        "array (H,W,C)": array,
        "array (C,H,W)": array.transpose(2, 0, 1),
        "array (B,H,W,C)": array[None],
        "tensor (C,H,W)": torch.from_numpy(array.transpose(2, 0, 1).copy()),
        "list of tensors (B,C,H,W)": [torch.from_numpy(array.transpose(2, 0, 1).copy())[None]],
        "int64 tensor": torch.from_numpy(array.astype(np.int64)),
        "float32 in 0...1": array.astype(np.float32) / 255,
        "bfloat16 tensor in 0...1": torch.from_numpy(array.copy()).float().div(255).requires_grad_(),
        "uint16": array.astype(np.uint16) * 257,
        "file bytes": as_file(image),
        "undecoded row": {"bytes": as_file(image), "path": None},
        "row of a dataset": {"label": 3, "image": image},
    }
    expected = (array.transpose(2, 0, 1) / 255 - 0.5) / 0.5
    for name, form in same.items():
        output = make_processor()(form, return_tensors="pt")
        assert list(output) == ["pixel_values"], name
        assert output["pixel_values"].dtype == torch.float32 and output["pixel_values"].shape == (1, 3, 16, 16), name
        assert np.abs(output["pixel_values"][0].numpy() - expected).max() < 1e-6, name


def test_images_of_mixed_sizes_become_one_batch_of_centre_squares():
    sizes = [(16, 16), (31, 20), (20, 31), (5, 300), (1, 1)]
    batch = make_processor()([Image.new("RGB", size, (10, 20, 30)) for size in sizes])["pixel_values"]
    assert isinstance(batch, np.ndarray) and batch.shape == (5, 3, 16, 16)
    assert np.allclose(batch, (np.array([10, 20, 30])[:, None, None] / 255 - 0.5) / 0.5)


def test_the_crop_is_the_centred_square():
    assert centre_box(10, 4) == (3, 0, 7, 4) and centre_box(4, 9) == (0, 2, 4, 6) and centre_box(5, 5) == (0, 0, 5, 5)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 40, 3), dtype=np.uint8))
    assert np.array_equal(make_processor().crop(image)[0], np.asarray(image)[:, 12:28].transpose(2, 0, 1))


def test_the_resize_is_pils_bicubic_with_antialias():
    image = make_images(1, size=64)[0]
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(resize_crop(image, 16, (0, 0, 64, 64)), expected.transpose(2, 0, 1))


@pytest.mark.parametrize("box", [(62, 0, 437, 375), (100, 60, 331, 260), (0, 0, 500, 375), (7, 9, 8, 10)])
def test_a_crop_is_bit_for_bit_what_pil_cuts_out_and_can_be_written_to(box):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8))
    for size in (1, 16, 256):
        crop = resize_crop(image, size, box)
        expected = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
        assert np.array_equal(crop, expected.transpose(2, 0, 1)) and crop.flags.c_contiguous and crop.flags.writeable


def test_mean_and_standard_deviation_are_those_of_the_processor_and_can_be_left_out(images):
    processor = make_processor(image_mean=[0.1, 0.2, 0.3], image_std=(0.5, 0.25, 2))
    pixels = np.asarray(images[0]).transpose(2, 0, 1) / 255
    expected = (pixels - np.array([0.1, 0.2, 0.3])[:, None, None]) / np.array([0.5, 0.25, 2])[:, None, None]
    assert np.allclose(processor(images[0])["pixel_values"][0], expected, atol=1e-6)
    assert np.allclose(processor(images[0], do_normalize=False)["pixel_values"][0], pixels, atol=1e-7)


def test_another_image_size_can_be_asked_for_once(images):
    processor = make_processor()
    assert processor(images[:2], image_size=8)["pixel_values"].shape == (2, 3, 8, 8)
    assert processor.image_size == 16 and processor.size == {"height": 16, "width": 16}
    with pytest.raises(ValueError, match="image_size=10 is not a positive multiple of patch_size=4"):
        processor(images, image_size=10)


def test_the_channel_axis_can_be_named_where_the_shape_does_not_tell():
    array = np.zeros((3, 8, 3), dtype=np.uint8)
    array[0] = 255
    first = make_processor().crop(array, input_data_format="channels_first")
    last = make_processor().crop(array, input_data_format="channels_last")
    assert (first[0, 0] == 255).all() and (first[0, 1:] == 0).all()
    assert (last[0, :, 0] == 255).all() and (last[0, :, -1] == 0).all()
    with pytest.raises(ValueError, match="channels_middle"):
        make_processor().crop(array, input_data_format="channels_middle")


RED = Image.new("RGB", (6, 5), (255, 0, 0))
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA", "PA": "P"}


@pytest.mark.parametrize(
    ("mode", "colour"),
    [(mode, (255, 0, 0)) for mode in ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "HSV")]
    + [(mode, (76, 76, 76)) for mode in ("L", "LA", "La")]
    + [("YCbCr", (254, 0, 0)), ("LAB", (251, 5, 4)), ("1", None)],
)
def test_every_pil_colour_mode_becomes_rgb(mode, colour):
    image = RED.convert(PREMULTIPLIED[mode]).convert(mode) if mode in PREMULTIPLIED else RED.convert(mode)
    assert image.mode == mode
    pixels = np.asarray(to_rgb(image))
    assert pixels.shape == (5, 6, 3) and pixels.dtype == np.uint8
    if mode == "1":
        assert set(pixels.flatten()) == {0, 255}
    else:
        assert np.abs(pixels.astype(int) - colour).max() <= 1


@pytest.mark.parametrize(
    ("image", "grey"),
    [
        (Image.fromarray(np.full((5, 6), 257 * 77, dtype=np.uint16)), 77),
        (Image.fromarray(np.full((5, 6), 257 * 77 + 128, dtype=">u2")), 77),
        (Image.fromarray(np.full((5, 6), 257 * 77 + 129, dtype=np.uint16)), 78),
        (Image.fromarray(np.full((5, 6), 65535, dtype=np.int32)), 255),
        (Image.fromarray(np.full((5, 6), 0.3, dtype=np.float32)), 76),
        (Image.open(io.BytesIO(as_file(Image.fromarray(np.full((5, 6), 32896, dtype=np.uint16))))), 128),
        (np.full((5, 6), True), 255),
        (np.full((5, 6, 1), 9, dtype=np.int8), 9),
        (torch.full((1, 5, 6), 0.5, dtype=torch.float16), 128),
    ],
    ids=lambda value: getattr(value, "mode", None) or str(getattr(value, "dtype", value)),
)
def test_wider_grey_values_are_scaled_to_eight_bits(image, grey):
    assert np.array_equal(np.asarray(to_rgb(image)), np.full((5, 6, 3), grey))


def test_transparent_pixels_become_white_in_every_form_of_transparency():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = np.dstack([np.full((5, 6, 3), (255, 0, 0)), np.full((5, 6), 128)]).astype(np.uint8)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0])
    palette.info["transparency"] = 0
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    keyed.info["transparency"] = (1, 2, 3)
    for image in (clear, clear.convert("RGBa"), clear.convert("LA"), palette, keyed):
        assert (np.asarray(to_rgb(image)) == 255).all(), image.mode
    assert np.abs(np.asarray(to_rgb(half)).astype(int) - (255, 127, 127)).max() <= 1


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    stored = np.zeros((8, 16, 3), dtype=np.uint8)
    stored[:, :8] = 255
    image = read_image(as_file(Image.fromarray(stored), "PNG", exif=exif))
    assert image.size == (8, 16)
    assert (np.asarray(image)[:8] == 255).all() and (np.asarray(image)[8:] == 0).all()


def test_the_first_frame_of_an_animation_is_taken_wherever_it_stands():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("white", "black")]
    data = as_file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (np.asarray(read_image(data)) == 255).all()
    animation = Image.open(io.BytesIO(data))
    animation.seek(1)
    assert (np.asarray(to_rgb(animation)) == 255).all()


def test_a_cmyk_jpeg_is_read_in_its_colours():
    data = as_file(RED.resize((32, 32)).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(np.asarray(read_image(data)).astype(int) - (255, 0, 0)).max() < 6


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 4, 3), np.nan), "Image 0 of the input: A floating-point image must have values in 0...1 without"),
        (np.full((4, 4, 3), np.inf), "without NaN"),
        (np.full((4, 4, 3), 1.01), "in 0...1"),
        (-torch.ones(3, 4, 4), "in 0...1"),
        (Image.new("F", (4, 4), 200), "in 0...1"),
        (Image.new("I", (4, 4), 70000), "in 0...65535"),
        (np.full((4, 4, 3), 256), "dtype int64 must have values in 0...255"),
        (np.full((4, 4, 3), 1j), "complex128"),
        (np.zeros((5, 4, 5)), r"1, 3 or 4 channels, not \(5, 4, 5\)"),
        (np.zeros(7), r"not \(7,\)"),
        (np.zeros((0, 4, 3)), "0x4 pixels"),
        ("image.png", "must be a PIL image, an array, a tensor or bytes, not str"),
        (None, "not NoneType"),
        ({"photo": RED, "label": 1}, "None of the columns photo, label is named image, jpg"),
        (b"", "file is empty"),
        ([], "There is no image"),
    ],
)
def test_an_input_that_is_no_image_is_refused_in_one_sentence(image, message):
    with pytest.raises(ValueError, match=message):
        make_processor()(image)


def test_the_message_about_a_bad_image_gives_its_position(images):
    with pytest.raises(ValueError, match="Image 2 of the input: "):
        make_processor()([images[0], [images[1], np.full((4, 4), np.nan)]])


def test_an_unknown_keyword_is_an_error(images):
    with pytest.raises(TypeError, match="do_rescale"):
        make_processor()(images, do_rescale=False)
    with pytest.raises(TypeError, match="do_rescale"):
        LDAEImageProcessor(do_rescale=False)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "file is empty"),
        (b"no image at all", "unreadable"),
        (as_file(RED)[:20], "unreadable|cannot be decoded"),
        (as_file(make_images(1, size=64)[0], "JPEG")[:-300], "cannot be decoded: image file is truncated"),
        (as_file(Image.new("1", (9000, 12000))), "too many pixels: 9000x12000 is more than 89478485"),
        (as_file(Image.new("1", (20000, 10000))), "too many pixels"),
    ],
    ids=["empty", "garbage", "header only", "truncated", "large", "bomb"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_unreadable_file_is_refused_with_its_reason(data, reason):
    with pytest.raises(ValueError, match=reason):
        read_image(data)


def test_the_pixel_cap_is_checked_before_decoding():
    header_only = as_file(Image.new("RGB", (300, 200)))[:60]
    with pytest.raises(ValueError, match="too many pixels: 300x200 is more than 59999"):
        read_image(header_only, max_pixels=59_999)
    with pytest.raises(ValueError, match="cannot be decoded"):
        read_image(header_only, max_pixels=60_000)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_size": 18}, "image_size=18 is not a positive multiple of patch_size=4"),
        ({"image_size": 16.0}, "image_size=16.0 is not"),
        ({"patch_size": 0}, "patch_size must be a positive integer, not 0"),
        ({"patch_size": True}, "patch_size must be a positive integer, not True"),
        ({"latent_dim": 0}, "latent_dim must be a positive integer, not 0"),
        ({"latent_dim": 49}, "latent_dim=49 is more than the 48 values of a patch"),
        ({"latent_scaling": "local"}, "latent_scaling must be one of global, whiten, none, not 'local'"),
        ({"image_mean": [0.5]}, "image_mean must hold three finite numbers"),
        ({"image_std": [0.5, float("nan"), 1]}, "image_std must hold three finite numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std must be positive"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_sentence(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_processor(**kwargs)


# -- The covariance ----------------------------------------------------------------------------------------------------


def test_sums_of_uint8_patches_are_exact_even_at_the_largest_values():
    generator = np.random.default_rng(0)
    patches = generator.integers(0, 256, (5000, 12), dtype=np.uint8)
    # -128 and -127 after the shift: a chunk of squares comes close to 2^24, and any larger chunk would lose bits.
    patches[:3000, :6] = generator.integers(0, 2, (3000, 6))
    shifted = patches.astype(np.int64) - 128
    state = PatchCovariance(12).update(patches).state_dict()
    assert int(state["count"]) == 5000
    assert np.array_equal(state["sum"].numpy(), shifted.sum(0))
    assert np.array_equal(state["gram"].numpy(), shifted.T @ shifted)


def test_order_batching_merging_and_processes_change_no_bit(tmp_path):
    generator = np.random.default_rng(0)
    patches = generator.integers(0, 256, (3000, 12), dtype=np.uint8)
    whole = PatchCovariance(12).update(patches)
    mixed = PatchCovariance(12)
    for part in np.array_split(patches[generator.permutation(3000)], [1, 40, 41, 1900]):
        mixed.update(torch.from_numpy(part))
    shards = [PatchCovariance(12).update(shard) for shard in np.array_split(patches, [2500, 2500])]
    for index, shard in enumerate(shards):
        save_file(shard.state_dict(), tmp_path / f"{index}.safetensors")
    loaded = [PatchCovariance.from_state_dict(load_file(tmp_path / f"{index}.safetensors")) for index in (2, 0, 1)]
    merged = loaded[0].merge(loaded[1]).merge(loaded[2])
    units = {"scale": torch.full((12,), 1 / 127.5), "offset": -torch.ones(12)}
    for other in (mixed, merged):
        for tensor, same in zip(whole.principal_components(**units), other.principal_components(**units), strict=True):
            assert torch.equal(tensor, same)


def test_states_of_processes_add_up_as_an_all_reduce_would():
    patches = np.random.default_rng(0).integers(0, 256, (900, 12), dtype=np.uint8)
    states = [PatchCovariance(12).update(patches[rank::2]).state_dict() for rank in range(2)]
    total = {name: states[0][name] + states[1][name] for name in states[0]}
    expected = PatchCovariance(12).update(patches).state_dict()
    for name, tensor in PatchCovariance.from_state_dict(total).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_floating_point_grey_levels_give_the_same_covariance_as_uint8():
    patches = np.random.default_rng(0).integers(0, 256, (3000, 12), dtype=np.uint8)
    exact = PatchCovariance(12).update(patches).state_dict()
    floating = PatchCovariance(12).update(torch.from_numpy(patches).float()).state_dict()
    mixed = PatchCovariance(12).update(patches[:7]).update(patches[7:].astype(np.float64)).state_dict()
    for name, tensor in exact.items():
        assert torch.allclose(floating[name], tensor, rtol=1e-12) and torch.allclose(mixed[name], tensor, rtol=1e-12)


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        (np.zeros((5, 11), dtype=np.uint8), r"must have the shape \(M, 12\), not \(5, 11\)"),
        (np.zeros(12, dtype=np.uint8), r"must have the shape \(M, 12\), not \(12,\)"),
        (np.zeros((5, 12), dtype=np.int64), "must be uint8 or floating point, not int64"),
        (np.full((5, 12), np.nan), "without NaN"),
        (np.full((5, 12), -0.5), "grey levels in 0...255"),
    ],
)
def test_patches_that_the_covariance_cannot_take_are_refused_and_change_nothing(patches, message):
    covariance = PatchCovariance(12)
    with pytest.raises(ValueError, match=message):
        covariance.update(patches)
    state = covariance.state_dict()
    assert not state["count"] and not state["gram"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gram": torch.zeros(3, 4)}, "The gram of a covariance state for patches of 3 values"),
        ({"sum": torch.full((3,), torch.nan)}, "The sum of a covariance state .* must be finite"),
        ({"sum": torch.zeros(3, 3)}, "must be one row"),
        ({"sums": torch.zeros(3)}, "holds count, sum and gram, not count, gram, sum, sums"),
    ],
)
def test_a_covariance_state_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PatchCovariance.from_state_dict(PatchCovariance(3).state_dict() | change)


def test_covariances_of_different_patches_are_not_merged():
    with pytest.raises(ValueError, match="patches of 3 values"):
        PatchCovariance(3).merge(PatchCovariance(4))


# -- The laws of the PCA -----------------------------------------------------------------------------------------------


def test_the_pca_equals_scikit_learns(fitted, images):
    reference = PCA(svd_solver="full").fit(normalised_patches(fitted, images).numpy())
    assert np.allclose(fitted.mean, reference.mean_, atol=1e-6)
    assert np.allclose(fitted.explained_variance, reference.explained_variance_, rtol=1e-5)
    for count in (1, 8, 20):
        ours, theirs = fitted.components[:count].numpy(), reference.components_[:count]
        assert np.abs(ours.T @ ours - theirs.T @ theirs).max() < 1e-5


def test_the_components_are_an_orthonormal_basis_by_falling_variance(fitted):
    identity = torch.eye(48, dtype=torch.float64)
    assert fitted.components.dtype == torch.float64
    assert torch.allclose(fitted.components @ fitted.components.T, identity, atol=1e-12)
    assert (fitted.explained_variance.diff() <= 0).all() and fitted.explained_variance[-1] > 0


def test_patches_run_in_channel_row_column_order():
    generator = np.random.default_rng(0)
    # Only one pixel of each patch varies: red in row 1, column 2; the first direction must be that pixel.
    array = np.full((40, 16, 16, 3), 100, dtype=np.uint8)
    array[:, 1::4, 2::4, 0] = generator.integers(0, 256, (40, 4, 4))
    processor = make_processor(latent_dim=1).fit(array, progress=False)
    assert int(processor.components[0].abs().argmax()) == 0 * 16 + 1 * 4 + 2
    # And patches run row by row: with only patch (0,1) bright, token 1 is the one that differs.
    bright = np.full((16, 16, 3), 100, dtype=np.uint8)
    bright[1, 6, 0] = 255
    assert int(processor.encode(bright)[0, :, 0].abs().argmax()) == 1


def test_decoding_an_encoding_at_full_rank_is_the_identity(images):
    for scaling in ("global", "whiten", "none"):
        processor = make_processor(latent_dim=48, latent_scaling=scaling)
        for stage in (processor, processor.fit(images, progress=False)):
            pixel_values = stage(images, return_tensors="pt")["pixel_values"]
            assert torch.allclose(stage.decode(stage.encode(images)), pixel_values, atol=1e-5)


def test_the_reconstruction_error_is_the_sum_of_the_dropped_variances(images):
    for latent_dim in (1, 8, 40):
        processor = make_processor(latent_dim=latent_dim).fit(images, progress=False)
        difference = processor.decode(processor.encode(images)) - processor(images, return_tensors="pt")["pixel_values"]
        patches = patchify(difference.double(), 4).flatten(0, 1)
        error = (patches**2).sum() / (len(patches) - 1)
        assert torch.isclose(error, processor.explained_variance[latent_dim:].sum(), rtol=1e-4)


def test_latents_have_the_variance_that_their_scaling_promises(images):
    variances = {}
    for scaling in ("global", "whiten", "none"):
        processor = make_processor(latent_scaling=scaling).fit(images, progress=False)
        latents = processor.encode(images)
        assert latents.shape == (24, 16, 8) and latents.dtype == torch.float32
        variances[scaling] = latents.double().flatten(0, 1).var(0)
        assert processor.scale.shape == (8,)
    assert torch.isclose(variances["global"].mean(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-4)
    assert torch.allclose(variances["whiten"], torch.ones(8, dtype=torch.float64), rtol=1e-4)
    assert torch.allclose(variances["none"], processor.explained_variance[:8], rtol=1e-4)


def test_the_models_tokenizer_with_this_basis_gives_the_same_latents(fitted, images):
    tokenizer = PatchPCA(4, 3, 8, "global")
    tokenizer.components.copy_(fitted.components[:8])
    tokenizer.mean.copy_(fitted.mean)
    tokenizer.explained_variance.copy_(fitted.explained_variance)
    latents = tokenizer.encode(fitted(images, return_tensors="pt")["pixel_values"])
    assert torch.allclose(latents, fitted.encode(images), atol=1e-5)


def test_before_a_fit_the_basis_is_a_dct(images):
    processor = make_processor()
    assert not processor.fitted
    assert torch.equal(processor.components, dct_basis(4, 3))
    assert not processor.mean.any() and (processor.explained_variance == 1).all() and (processor.scale == 1).all()
    assert processor.decode(processor.encode(images[:2])).shape == (2, 3, 16, 16)


def test_signs_and_fingerprint_do_not_depend_on_the_run(fitted, images):
    again = make_processor().fit(images, progress=False)
    assert torch.equal(again.components, fitted.components) and again.fingerprint == fitted.fingerprint
    # A rotation of the colours in the data turns the components, not their signs.
    direction = torch.from_numpy(np.random.RandomState(0).standard_normal(48))
    assert (fitted.components @ direction > 0).all()


def test_the_fingerprint_tells_bases_and_normalisations_apart_but_not_sizes(fitted, images):
    assert len(fitted.fingerprint) == 64
    assert fitted.fingerprint != make_processor().fingerprint
    assert fitted.fingerprint != make_processor().fit(images[:-1], progress=False).fingerprint
    assert make_processor(image_std=[1, 1, 1]).fingerprint != make_processor().fingerprint
    assert make_processor(image_size=8, latent_dim=3, latent_scaling="none").fingerprint == make_processor().fingerprint


@pytest.mark.parametrize("shape", [(24, 16, 7), (24, 15, 8), (16, 8)])
def test_latents_of_another_shape_are_not_decoded(fitted, shape):
    with pytest.raises(ValueError, match=r"must have the shape \(B, 16, 8\)"):
        fitted.decode(torch.zeros(shape))


# -- Fitting -----------------------------------------------------------------------------------------------------------


def test_a_fit_depends_neither_on_order_nor_on_shards_when_patches_are_drawn(images):
    forward = make_processor().fit(images, num_patches=150, progress=False)
    backward = make_processor().fit(images[::-1], num_patches=150, progress=False)
    assert torch.equal(forward.components, backward.components)

    sharded = make_processor()
    probability = sharded.patch_probability(len(images), num_patches=150)
    total = PatchCovariance(sharded.patch_dim)
    for rank in range(3):
        shard = PatchCovariance(sharded.patch_dim)
        for start in range(rank, len(images), 6):
            crops = sharded.crop(images[start : start + 6 : 3])
            sharded.accumulate(shard, crops, probability)
        total.merge(shard)
    assert sharded.set_basis(total).fingerprint == forward.fingerprint


def test_about_as_many_patches_are_drawn_as_asked_for_and_the_seed_chooses_them():
    processor = make_processor()
    crops = np.random.default_rng(0).integers(0, 256, (400, 3, 16, 16), dtype=np.uint8)
    probability = processor.patch_probability(len(crops), num_patches=1000)
    counts, sums = [], []
    for seed in (0, 0, 1):
        state = processor.accumulate(PatchCovariance(48), crops, probability, seed).state_dict()
        counts.append(int(state["count"]))
        sums.append(state["sum"])
    assert all(abs(count - 1000) < 120 for count in counts)  # four standard deviations
    assert torch.equal(sums[0], sums[1]) and not torch.equal(sums[0], sums[2])
    assert processor.patch_probability(10, num_patches=1_000_000) == 1


def test_datasets_and_streams_of_any_row_give_the_same_fit(fitted, images):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(label=datasets.Value("int64"), img=datasets.Image())
    rows = datasets.Dataset.from_dict({"label": list(range(len(images))), "img": images}, features)
    undecoded = rows.cast_column("img", datasets.Image(decode=False))
    sources = {
        "decoded": rows,
        "undecoded": undecoded,
        "streamed": undecoded.to_iterable_dataset(),
        "generator": (np.asarray(image) for image in images),
        "one array": np.stack([np.asarray(image) for image in images]),
    }
    for name, source in sources.items():
        assert make_processor().fit(source, progress=False).fingerprint == fitted.fingerprint, name


def test_a_file_that_a_row_only_names_is_read(tmp_path, images):
    images[0].save(tmp_path / "0.png")
    row = {"image": {"bytes": None, "path": str(tmp_path / "0.png")}}
    assert np.array_equal(make_processor().crop(row), make_processor().crop(images[0]))


def test_a_fit_holds_no_more_than_the_image_at_hand():
    given, most_alive = [], 0

    def stream():
        nonlocal most_alive
        for seed in range(20):
            image = make_images(1, seed=seed)[0]
            given.append(weakref.ref(image))
            yield image
            del image
            most_alive = max(most_alive, sum(reference() is not None for reference in given))

    make_processor().fit(stream(), progress=False)
    assert len(given) == 20 and most_alive <= 1


def test_the_progress_bar_can_be_switched_off(images, capsys):
    make_processor().fit(images, progress=True)
    assert "Patch PCA" in capsys.readouterr().err
    make_processor().fit(images, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("source", "kwargs", "message"),
    [
        (make_images(3), {}, "needs at least 49 patches, but there are 48"),
        ([], {}, "there are 0"),
        (make_images(), {"num_patches": 1}, "give more images or a larger num_patches"),
        ([Image.new("RGB", (16, 16), "gold")] * 9, {}, "All patches are equal"),
        ([Image.new("L", (16, 16), 128)] * 9, {}, "All patches are equal"),
        (
            [Image.new("L", (16, 16), grey) for grey in range(9)],
            {},
            "vary in 1 directions only, fewer than latent_dim=8",
        ),
        ([make_images(1)[0], np.full((16, 16), np.nan)], {}, "Image 1 of the input: .* without NaN"),
        ([make_images(1)[0], b"not an image"], {}, "Image 1 of the input: .* unreadable"),
        ({"train": make_images()}, {}, "not str"),
    ],
)
def test_images_that_give_no_pca_are_refused_and_the_processor_stays_unfitted(source, kwargs, message):
    processor = make_processor()
    with pytest.raises(ValueError, match=message):
        processor.fit(source, progress=False, **kwargs)
    assert not processor.fitted


# -- Saving and loading ------------------------------------------------------------------------------------------------


def test_an_unfitted_processor_is_saved_as_one_file(tmp_path):
    processor = make_processor(latent_scaling="whiten", image_std=[1, 0.5, 0.25])
    processor.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["preprocessor_config.json"]
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict() and not loaded.fitted


def test_a_fitted_processor_comes_back_whole_through_every_door(fitted, images, tmp_path):
    files = fitted.save_pretrained(tmp_path / "nested" / "folder")
    assert [os.path.basename(file) for file in files] == ["preprocessor_config.json", "patch_pca.safetensors"]
    folder = tmp_path / "nested" / "folder"
    doors = [
        AutoImageProcessor.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(str(folder), backend="torchvision"),
        AutoImageProcessor.from_pretrained(tmp_path / "nested", subfolder="folder"),
        AutoProcessor.from_pretrained(folder),
        LDAEImageProcessor.from_pretrained(folder / "preprocessor_config.json"),
        LDAEImageProcessor.from_json_file(folder / "preprocessor_config.json"),
        pickle.loads(pickle.dumps(fitted)),
    ]
    for loaded in doors:
        assert type(loaded) is LDAEImageProcessor and loaded.fitted
        assert all(torch.equal(one, other) for one, other in zip(loaded.basis, fitted.basis, strict=True))
        assert loaded.fingerprint == fitted.fingerprint and loaded.to_dict() == fitted.to_dict()
        assert torch.equal(loaded.encode(images), fitted.encode(images))


def test_the_configuration_holds_arguments_and_fingerprint_but_no_tensor(fitted, tmp_path):
    fitted.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert config == {
        "image_processor_type": "LDAEImageProcessor",
        "image_size": 16,
        "patch_size": 4,
        "latent_dim": 8,
        "latent_scaling": "global",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "fingerprint": fitted.fingerprint,
    }
    assert json.loads(repr(fitted).removeprefix("LDAEImageProcessor ")) == config


def test_loading_takes_overrides_returns_unused_keywords_and_refuses_unknown_ones(fitted, tmp_path):
    fitted.save_pretrained(tmp_path)
    loaded, unused = AutoImageProcessor.from_pretrained(tmp_path, latent_dim=3, foo=1, return_unused_kwargs=True)
    assert loaded.latent_dim == 3 and loaded.fitted and unused == {"foo": 1}
    for load in (AutoImageProcessor.from_pretrained, LDAEImageProcessor.from_pretrained):
        with pytest.raises(TypeError, match="does not take latent_dims"):
            load(tmp_path, latent_dims=3)
    with pytest.raises(ValueError, match="image_mean or image_std differ"):
        LDAEImageProcessor.from_pretrained(tmp_path, image_mean=[0, 0, 0])
    with pytest.raises(ValueError, match="for patch_size=8"):
        LDAEImageProcessor.from_pretrained(tmp_path, patch_size=8)
    with pytest.raises(ValueError, match="use from_pretrained"):
        LDAEImageProcessor.from_dict(fitted.to_dict())


def damage(folder, how):
    """Changes a saved processor in one way."""
    file, config_file = folder / "patch_pca.safetensors", folder / "preprocessor_config.json"
    config = json.loads(config_file.read_text())
    tensors = load_file(file)
    if how == "no tensor file":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "no safetensors":
        file.write_bytes(b"\xff" * 1000)
    elif how == "flipped bit":
        data = bytearray(file.read_bytes())
        data[-2] ^= 1
        file.write_bytes(data)
    elif how == "wrong shape":
        save_file(tensors | {"components": tensors["components"][:47].contiguous()}, file)
    elif how == "wrong dtype":
        save_file(tensors | {"mean": tensors["mean"].float()}, file)
    elif how == "missing tensor":
        save_file({name: tensor for name, tensor in tensors.items() if name != "mean"}, file)
    elif how == "extra tensor":
        save_file(tensors | {"more": torch.zeros(1)}, file)
    elif how == "not finite":
        tensors["mean"][0] = torch.nan
        save_file(tensors, file)
        # The fingerprint is made to fit: a hostile author can do that.
        digest = sha256(b"patch_pca patch_size=4 image_mean=[0.5, 0.5, 0.5] image_std=[0.5, 0.5, 0.5] ")
        for name in ("mean", "explained_variance", "components"):
            digest.update(tensors[name].numpy().astype("<f4").tobytes())
        config_file.write_text(json.dumps(config | {"fingerprint": digest.hexdigest()}))
    elif how == "no variance":
        save_file(tensors | {"explained_variance": -tensors["explained_variance"]}, file)
    elif how == "unknown key":
        config_file.write_text(json.dumps(config | {"do_resize": True}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no tensor file", "tells of a fitted PCA, but patch_pca.safetensors is not beside it"),
        ("truncated", "is damaged"),
        ("no safetensors", "is damaged"),
        ("flipped bit", "does not have the fingerprint"),
        ("wrong shape", r"must hold .* not .*\[47, 48\]"),
        ("wrong dtype", "must hold .* not .*F32"),
        ("missing tensor", "must hold .*'mean'"),
        ("extra tensor", "must hold .* not .*'more'"),
        ("not finite", "not finite"),
        ("no variance", "vary in 0 directions only"),
        ("unknown key", "preprocessor_config.json holds do_resize, which LDAEImageProcessor does not know"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(fitted, tmp_path, how, message):
    fitted.save_pretrained(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(ValueError, match=message):
        AutoImageProcessor.from_pretrained(tmp_path)


def test_a_pipeline_takes_the_processor_and_the_model_gets_pixel_values_alone(fitted, images, tmp_path):
    config = LDAEConfig(
        image_size=16, patch_size=4, latent_dim=8, hidden_size=24, num_hidden_layers=1, decoder_num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    LDAEModel(config).save_pretrained(tmp_path)
    fitted.save_pretrained(tmp_path)
    extract = pipeline(
        "image-feature-extraction", model=str(tmp_path), model_kwargs={"attn_implementation": "eager"}, device="cpu"
    )
    features = torch.tensor(extract(images[0]))
    with torch.no_grad():
        expected = extract.model(**fitted(images[0], return_tensors="pt")).last_hidden_state
    assert type(extract.image_processor) is LDAEImageProcessor and extract.image_processor.fitted
    assert torch.allclose(features, expected, atol=1e-6)


class HubHandler(BaseHTTPRequestHandler):
    """As much of the Hub as a push and a load of one repository need; `files` is its content."""

    files: dict[str, bytes] = {}
    loads: list[str] = []
    commit = "c" * 40

    def answer(self, body: bytes, status: int = 200, **headers: str):
        self.send_response(status)
        headers |= {"Content-Length": str(len(body)), "X-Repo-Commit": self.commit}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.split("?")[0]
        reply = {}
        if path == "/api/repos/create":
            reply = {"url": f"http://{self.headers['Host']}/me/processor"}
        elif "/preupload/" in path:
            sent = json.loads(body)["files"]
            reply = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in sent]}
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = b64decode(line["value"]["content"])
            reply = {"commitUrl": f"http://{self.headers['Host']}/me/processor/commit/{self.commit}"}
            reply |= {"commitOid": self.commit}
        self.answer(json.dumps(reply).encode())

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith("/api/models/"):
            self.answer(json.dumps({"id": "me/processor", "sha": self.commit, "siblings": []}).encode())
            return
        revision, name = path.split("/resolve/")[1].split("/", 1)
        self.loads.append(f"{revision} {name}")
        if name in self.files:
            self.answer(self.files[name], ETag=f'"{sha256(self.files[name]).hexdigest()}"')
        else:
            self.answer(b"", 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def log_message(self, *_):
        """Keeps the test output quiet."""


def test_a_fresh_process_loads_pushes_and_loads_again_from_the_hub_at_one_commit(fitted, images, tmp_path):
    fitted.save_pretrained(tmp_path / "processor")
    np.save(tmp_path / "image.npy", np.asarray(images[0]))
    np.save(tmp_path / "latents.npy", fitted.encode(images[0]).numpy())
    script = f"""
import numpy as np
import ldae_hf
from transformers import AutoImageProcessor
image, latents = np.load("image.npy"), np.load("latents.npy")
local = AutoImageProcessor.from_pretrained("processor")
assert local.fingerprint == {fitted.fingerprint!r}
assert np.array_equal(local.encode(image).numpy(), latents)
local.save_pretrained("processor", push_to_hub=True, repo_id="me/processor", token="hf_none")
pushed = AutoImageProcessor.from_pretrained("me/processor", token="hf_none")
assert pushed.fingerprint == {fitted.fingerprint!r}
assert np.array_equal(pushed.encode(image).numpy(), latents)
print("all equal")
"""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    try:
        run = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
    finally:
        server.shutdown()
        server.server_close()
    assert run.returncode == 0, run.stderr
    assert run.stdout == "all equal\n"
    for name in ("preprocessor_config.json", "patch_pca.safetensors"):
        assert HubHandler.files[name] == (tmp_path / "processor" / name).read_bytes()
        assert f"{HubHandler.commit} {name}" in HubHandler.loads
