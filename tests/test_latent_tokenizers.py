"""Learned tokenizers in folders, whole and damaged, against diffusers, and in a model."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldae_hf import LDAEConfig, LDAEForPreTraining, LDAEImageProcessor, LDAEModel, LearnedTokenizer
from ldae_hf.configuration_ldae import CONVOLUTIONAL_TOKENIZERS, LEARNED_TOKENIZERS
from ldae_hf.evaluation.encoders import PooledFeatures, load_ldae, open_encoder
from ldae_hf.latent_tokenizers import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    autoencoder_stride,
    build_autoencoder,
    load_autoencoder,
)
from ldae_hf.patch_covariance import PatchCovariance


N, K, P = 16, 8, 48  # of 16x16 images in 4x4 patches
AUTOENCODER = "diffusion_pytorch_model.safetensors"
AUTOENCODER_CONFIG = "config.json"


def make_learned(kind: str, processor: LDAEImageProcessor | None = None, seed: int = 0, **changes) -> LearnedTokenizer:
    """A small tokenizer that has learned nothing."""
    torch.manual_seed(seed)
    keys = dict(tokenizer=kind, patch_size=4, latent_dim=K, buffers={"explained_variance": torch.rand(K) + 0.5})
    if kind in CONVOLUTIONAL_TOKENIZERS:
        keys["autoencoder"] = build_autoencoder(16, 2, 8, 1, latent_channels=2)
    else:
        keys["buffers"] |= {"components": torch.randn(K, P), "decoder_components": torch.randn(K, P)}
        keys["buffers"]["mean"] = torch.zeros(P) if processor is None else processor.mean.float()
    fingerprint = None if processor is None else processor.fingerprint
    return LearnedTokenizer(**keys | dict(processor_fingerprint=fingerprint, training={"seed": seed}) | changes)


@pytest.fixture(scope="module")
def processor() -> LDAEImageProcessor:
    return make_processor(0)


def make_processor(seed: int) -> LDAEImageProcessor:
    crops = torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    processor = LDAEImageProcessor(image_size=16, patch_size=4, latent_dim=K)
    return processor.set_basis(processor.accumulate(PatchCovariance(P), crops))


@pytest.fixture(scope="module")
def pixel_values() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture(scope="module")
def folders(processor, tmp_path_factory) -> dict[str, Path]:
    """A saved tokenizer of each kind, to be copied before it is changed."""
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in LEARNED_TOKENIZERS:
        make_learned(kind, processor).save_pretrained(root / kind)
    return {kind: root / kind for kind in LEARNED_TOKENIZERS}


def one_sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    return message


# -- folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LEARNED_TOKENIZERS)
def test_a_saved_tokenizer_comes_back_equal(kind, folders, processor, pixel_values):
    learned = make_learned(kind, processor)
    for loaded in (
        LearnedTokenizer.from_pretrained(folders[kind]),
        LearnedTokenizer.from_pretrained(str(folders[kind].parent), subfolder=kind),
    ):
        for key in ("tokenizer", "patch_size", "latent_dim", "processor_fingerprint", "training", "fingerprint"):
            assert getattr(loaded, key) == getattr(learned, key), key
        assert loaded.buffers.keys() == learned.buffers.keys()
        assert all(torch.equal(value, loaded.buffers[name]) for name, value in learned.buffers.items())
        for scaling in ("global", "whiten"):
            ours, theirs = learned.module(scaling), loaded.module(scaling)
            tokens = ours.encode(pixel_values)
            assert tokens.shape == (3, N, K) and torch.equal(theirs.encode(pixel_values), tokens)
            with torch.no_grad():
                assert torch.equal(theirs.decode(tokens), ours.decode(tokens))


@pytest.mark.parametrize("kind", LEARNED_TOKENIZERS)
def test_a_folder_holds_safetensors_and_json_only(kind, folders):
    found = {file.name for file in folders[kind].iterdir()}
    convolutional = {AUTOENCODER, AUTOENCODER_CONFIG} if kind in CONVOLUTIONAL_TOKENIZERS else set()
    assert found == {CONFIG_NAME, WEIGHTS_NAME} | convolutional


def test_the_fingerprint_is_that_of_the_kind_of_every_tensor_and_of_what_is_made_of_them():
    learned = make_learned("conv_vae")
    first = learned.fingerprint
    assert make_learned("conv_vae", training={"seed": 9}).fingerprint == first
    assert make_learned("conv_vae", seed=1).fingerprint != first
    assert make_learned("vqgan").fingerprint != first
    for tensor in (learned.buffers["explained_variance"], learned.autoencoder.decoder.conv_out.bias.data):
        before = tensor.clone()
        tensor[-1] += 1e-6
        assert learned.fingerprint != first
        tensor.copy_(before)
    assert learned.fingerprint == first
    other = type(learned.autoencoder).from_config(dict(learned.autoencoder.config) | dict(norm_num_groups=4))
    other.load_state_dict(learned.autoencoder.state_dict())
    assert make_learned("conv_vae", autoencoder=other).fingerprint != first


def test_a_saved_autoencoder_does_not_say_where_it_came_from(tmp_path):
    learned = make_learned("conv_vae")
    learned.autoencoder.save_pretrained(tmp_path / "released")
    released = load_autoencoder(tmp_path / "released")
    make_learned("conv_vae", autoencoder=released).save_pretrained(tmp_path / "tokenizer")
    assert str(tmp_path) not in (tmp_path / "tokenizer" / AUTOENCODER_CONFIG).read_text()
    loaded = LearnedTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert loaded.buffers["explained_variance"].equal(learned.buffers["explained_variance"])
    assert loaded.fingerprint == learned.fingerprint


def test_a_tokenizer_written_over_another_one_replaces_it(tmp_path):
    for seed in (0, 1):
        make_learned("conv_vae", seed=seed).save_pretrained(tmp_path)
    assert LearnedTokenizer.from_pretrained(tmp_path).fingerprint == make_learned("conv_vae", seed=1).fingerprint


# -- against diffusers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "channels"), [(2, 2), (4, 8), (1, 1)])
@torch.no_grad()
def test_tokens_are_diffusers_latents_cut_into_patches_and_scaled(stride, channels, pixel_values):
    torch.manual_seed(4)
    autoencoder = build_autoencoder(16, stride, 8, 1, channels).eval()
    side = 4 // stride  # of a token, in places of the latents
    latent_dim = channels * side**2
    variance = torch.rand(latent_dim) + 0.5
    learned = LearnedTokenizer("conv_vae", 4, latent_dim, {"explained_variance": variance}, autoencoder)
    tokenizer = learned.module("whiten")
    latents = autoencoder.encode(pixel_values).latent_dist.mean
    assert autoencoder_stride(autoencoder) == stride and latents.shape == (3, channels, 16 // stride, 16 // stride)
    tokens = tokenizer.encode(pixel_values)
    places = {(row, column): 4 * row + column for row in range(4) for column in range(4)}
    for (row, column), token in places.items():
        cut = latents[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side].flatten(1)
        torch.testing.assert_close(tokens[:, token], cut / variance.sqrt())
    decoded, image = tokenizer.decode(tokens), autoencoder.decode(latents).sample
    assert decoded.shape == (3, N, P)
    for (row, column), token in places.items():
        cut = image[:, :, row * 4 : (row + 1) * 4, column * 4 : (column + 1) * 4].flatten(1)
        torch.testing.assert_close(decoded[:, token], cut, rtol=1e-4, atol=1e-5)


def test_oblong_images_are_encoded_but_only_square_ones_decoded(folders, pixel_values):
    tokenizer = LearnedTokenizer.from_pretrained(folders["conv_vae"]).module()
    tokens = tokenizer.encode(pixel_values[..., :12])
    assert tokens.shape == (3, 12, K)
    with pytest.raises(ValueError, match="^A convolutional tokenizer decodes square images only, not 12 tokens.$"):
        tokenizer.decode(tokens)


@pytest.mark.parametrize(("stride", "widths"), [(1, [8]), (2, [8, 16]), (4, [8, 16, 32]), (8, [8, 16, 32, 32])])
def test_an_autoencoder_doubles_its_width_twice_while_it_halves_the_image(stride, widths):
    config = build_autoencoder(32, stride, 8, 1, latent_channels=3).config
    assert list(config.block_out_channels) == widths
    assert (config.latent_channels, config.layers_per_block, config.sample_size) == (3, 1, 32)


def test_latent_diffusions_own_autoencoder_has_its_published_size():
    with torch.device("meta"):
        autoencoder = build_autoencoder(256, 8, 128, 2, latent_channels=4)
    assert autoencoder_stride(autoencoder) == 8
    assert round(sum(p.numel() for p in autoencoder.parameters()) / 1e6, 1) == 83.7


# -- what is refused -----------------------------------------------------------------------------------------------

K_AND_P = {"components": torch.zeros(K, P), "decoder_components": torch.zeros(K, P), "mean": torch.zeros(P)}


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("patch_ae", dict(tokenizer="patch_pca"), "tokenizer='patch_pca' is not one of vqgan, conv_vae, patch_vae"),
        ("patch_ae", dict(latent_dim=49), "latent_dim=49 must lie in 1 ... 48, the values of a patch of 4 pixels."),
        ("patch_ae", dict(latent_dim=0), "latent_dim=0 must lie in 1 ... 48"),
        ("patch_ae", dict(patch_size=-4), "latent_dim=8 must lie in 1 ... 48, the values of a patch of -4 pixels."),
        ("patch_ae", dict(patch_size=100_000), "A patch_ae tokenizer of this size has the tensors {"),
        ("patch_ae", dict(latent_dim=7), "A patch_ae tokenizer of this size has the tensors {"),
        ("patch_vae", dict(buffers=K_AND_P), "A patch_vae tokenizer of this size has the tensors {"),
        (
            "patch_vae",
            dict(buffers=K_AND_P | {"explained_variance": torch.full((K,), torch.nan)}),
            "The tokenizer's tensors hold values that are not finite; train it again.",
        ),
        (
            "patch_vae",
            dict(buffers=K_AND_P | {"explained_variance": torch.arange(K)}),
            "A latent of the tokenizer has no variance: it says nothing; train it again.",
        ),
        ("conv_vae", dict(autoencoder=None), "tokenizer='conv_vae' needs an autoencoder."),
        (
            "conv_vae",
            dict(autoencoder=build_autoencoder(16, 4, 8, 1, latent_channels=2)),
            "The autoencoder has stride 4 and 2 channels: a patch of 4 pixels makes 1² x 2 latent values, not latent_d",
        ),
        (
            "conv_vae",
            dict(autoencoder=build_autoencoder(16, 8, 8, 1, latent_channels=32)),
            "The autoencoder has stride 8 and 32 channels: a patch of 4 pixels makes 0.5² x 32 latent values, not lat",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_is_one_clear_sentence(kind, changes, sentence):
    with pytest.raises(ValueError) as error:
        make_learned(kind, **changes)
    assert one_sentence(error).startswith(sentence)


def test_a_patch_wise_tokenizer_has_no_autoencoder_and_an_autoencoder_sees_colours():
    with pytest.raises(ValueError, match="^tokenizer='patch_ae' has no autoencoder.$"):
        make_learned("patch_ae", autoencoder=build_autoencoder(16, 2, 8, 1, 2))
    grey = make_learned("conv_vae").autoencoder
    grey = type(grey).from_config(dict(grey.config) | dict(in_channels=1, _use_default_values=[]))
    with pytest.raises(ValueError, match="^The autoencoder turns 1 channels into 3; it has to take and give colour im"):
        make_learned("conv_vae", autoencoder=grey)


def stated(**changes):
    """Changes values of the tokenizer's JSON."""
    return lambda folder: edit_json(folder / CONFIG_NAME, changes)


def configured(**changes):
    """Changes values of the autoencoder's JSON."""
    return lambda folder: edit_json(folder / AUTOENCODER_CONFIG, changes)


def edit_json(file: Path, changes: dict) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without(name: str):
    return lambda folder: (folder / name).unlink()


def shortened(name: str):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-5])


def holding(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


def flipped(name: str, position: int):
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[position] ^= 0x40
        (folder / name).write_bytes(content)

    return change


def less_one(folder: Path) -> None:
    tensors = load_file(folder / AUTOENCODER)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, folder / AUTOENCODER)


def reshaped(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    save_file({name: value.flatten() for name, value in tensors.items()}, folder / WEIGHTS_NAME)


NOT_THERE = "holds no learned tokenizer: ldae_tokenizer.json and ldae_tokenizer.safetensors belong there."
DAMAGED = "is damaged ("
UNSTATED = "does not say what it has to: tokenizer, patch_size, latent_dim, fingerprint, training."
EXCHANGED = "do not have the fingerprint that ldae_tokenizer.json names: a file was damaged or exchanged"
NO_AUTOENCODER = "There is no AutoencoderKL in safetensors at"

HOSTILE = {
    "no json": ("patch_ae", without(CONFIG_NAME), NOT_THERE),
    "no weights": ("conv_vae", without(WEIGHTS_NAME), NOT_THERE),
    "weights cut short": ("patch_ae", shortened(WEIGHTS_NAME), DAMAGED),
    "weights empty": ("patch_ae", holding(WEIGHTS_NAME, ""), DAMAGED),
    "header damaged": ("patch_ae", flipped(WEIGHTS_NAME, 5), DAMAGED),
    "byte of the weights": ("patch_ae", flipped(WEIGHTS_NAME, -3), EXCHANGED),
    "byte of the variances": ("vqgan", flipped(WEIGHTS_NAME, -2), EXCHANGED),
    "other shapes": ("patch_vae", reshaped, "A patch_vae tokenizer of this size has the tensors {"),
    "no json text": ("patch_ae", holding(CONFIG_NAME, "{"), DAMAGED),
    "a list": ("patch_ae", holding(CONFIG_NAME, "[]"), UNSTATED),
    "null": ("patch_ae", holding(CONFIG_NAME, "null"), UNSTATED),
    "too little": ("patch_ae", holding(CONFIG_NAME, '{"tokenizer": "patch_ae"}'), UNSTATED),
    "too much": ("patch_ae", stated(buffers={}), UNSTATED),
    "a float": ("patch_ae", stated(latent_dim=8.0), UNSTATED),
    "a bool": ("patch_ae", stated(patch_size=True), UNSTATED),
    "a list for a name": ("patch_ae", stated(tokenizer=["patch_ae"]), UNSTATED),
    "a number for a fingerprint": ("patch_ae", stated(processor_fingerprint=1), UNSTATED),
    "unknown kind": ("patch_ae", stated(tokenizer="vae"), "tokenizer='vae' is not one of vqgan, conv_vae, patch_vae"),
    "kind without training": ("patch_ae", stated(tokenizer="patch_pca"), "tokenizer='patch_pca' is not one of vqgan"),
    "sibling kind": ("patch_ae", stated(tokenizer="patch_vae"), EXCHANGED),
    "other kind": ("patch_ae", stated(tokenizer="conv_vae"), NO_AUTOENCODER),
    "huge latent_dim": ("conv_vae", stated(latent_dim=10**15), "must lie in 1 ... 48, the values of a patch of 4"),
    "huge patch_size": ("patch_ae", stated(patch_size=10**6), "A patch_ae tokenizer of this size has the tensors {"),
    "other latent_dim": ("conv_vae", stated(latent_dim=4), "has the tensors {'explained_variance': (4,)}, not"),
    "other fingerprint": ("conv_vae", stated(fingerprint="ab" * 32), EXCHANGED),
    "no autoencoder": ("conv_vae", without(AUTOENCODER), NO_AUTOENCODER),
    "no autoencoder's json": ("conv_vae", without(AUTOENCODER_CONFIG), NO_AUTOENCODER),
    "autoencoder cut short": ("conv_vae", shortened(AUTOENCODER), NO_AUTOENCODER),
    "autoencoder's header": ("conv_vae", flipped(AUTOENCODER, 5), NO_AUTOENCODER),
    "byte of the autoencoder": ("conv_vae", flipped(AUTOENCODER, -3), EXCHANGED),
    "autoencoder less one": ("conv_vae", less_one, "lacks weights, the first is 'decoder.conv_in.bias'."),
    "autoencoder's json": ("conv_vae", holding(AUTOENCODER_CONFIG, "{"), NO_AUTOENCODER),
    "autoencoder's defaults": ("conv_vae", holding(AUTOENCODER_CONFIG, "{}"), NO_AUTOENCODER),
    "autoencoder's types": ("conv_vae", configured(block_out_channels="no"), NO_AUTOENCODER),
    "autoencoder's depth": ("conv_vae", configured(block_out_channels=[8, 16, 32]), NO_AUTOENCODER),
    "autoencoder's blocks": ("conv_vae", configured(down_block_types=["Down", "Down"]), NO_AUTOENCODER),
    "autoencoder's groups": ("conv_vae", configured(norm_num_groups=3), NO_AUTOENCODER),
    "autoencoder's normalisation": ("conv_vae", configured(norm_num_groups=4), EXCHANGED),
    "autoencoder's activation": ("conv_vae", configured(act_fn="relu"), EXCHANGED),
    "autoencoder's layers": ("conv_vae", configured(use_quant_conv=False), EXCHANGED),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_damaged_folder_is_one_clear_sentence(case, folders, tmp_path):
    kind, change, sentence = HOSTILE[case]
    shutil.copytree(folders[kind], tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(ValueError) as error:
        LearnedTokenizer.from_pretrained(tmp_path / "copy")
    assert sentence in one_sentence(error)


def test_a_folder_that_does_not_exist_holds_no_tokenizer(tmp_path):
    (tmp_path / "empty").mkdir()
    for place, options in ((tmp_path / "nowhere", {}), (tmp_path / "empty", {}), (tmp_path, dict(subfolder="empty"))):
        with pytest.raises(ValueError, match="learned tokenizer") as error:
            LearnedTokenizer.from_pretrained(place, **options)
        assert str(place) in one_sentence(error)
    with pytest.raises(ValueError, match=NO_AUTOENCODER):
        load_autoencoder(tmp_path / "empty")


# -- in a model ----------------------------------------------------------------------------------------------------


def make_model(kind: str, processor: LDAEImageProcessor | None, cls=LDAEForPreTraining, **keys):
    """A small model whose gates and head are not at the zero that they start from."""
    keys = dict(image_size=16, patch_size=4, latent_dim=K, tokenizer=kind, input_space="latent") | keys
    keys |= dict(hidden_size=16, num_hidden_layers=1, decoder_num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = cls(LDAEConfig(**{"prediction_target": "noise"} | keys)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    if processor is not None:
        model.set_processor(processor)
    return model


@pytest.mark.parametrize("kind", LEARNED_TOKENIZERS)
def test_a_model_takes_a_learned_tokenizer_and_remembers_it(kind, processor, pixel_values):
    model, learned = make_model(kind, processor), make_learned(kind, processor)
    held = set(model.state_dict())
    parameters = {id(parameter) for parameter in model.parameters()}
    model.set_tokenizer(learned)
    assert model.config.tokenizer_fingerprint == model.ldae.config.tokenizer_fingerprint == learned.fingerprint
    assert torch.equal(model.ldae.tokenizer.encode(pixel_values), learned.module().encode(pixel_values))
    model.check_processor(processor)
    model.set_tokenizer(learned)  # the same once more
    # Nothing of it is trained or saved as a part of the model, but what the patch-wise ones have as buffers.
    assert set(model.state_dict()) == held == {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    assert {id(parameter) for parameter in model.parameters()} == parameters
    output = model(pixel_values)
    output.loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in learned_parameters(learned))
    with torch.no_grad():
        noisy, clean = model.denoise(pixel_values, 0, torch.zeros(3, N, K))
    assert noisy.shape == clean.shape == pixel_values.shape


def learned_parameters(learned: LearnedTokenizer) -> list:
    return [] if learned.autoencoder is None else list(learned.autoencoder.parameters())


def test_a_tokenizer_is_as_it_was_before_in_training_mode_too(processor, pixel_values):
    model, learned = make_model("conv_vae", processor), make_learned("conv_vae", processor)
    learned.autoencoder.train()
    model.set_tokenizer(learned)
    before = learned.fingerprint
    tokens = model.eval().ldae.tokenizer.encode(pixel_values)
    model.train()
    model(pixel_values).loss.backward()
    assert torch.equal(model.ldae.tokenizer.encode(pixel_values), tokens)
    assert not learned.autoencoder.training and learned.fingerprint == before
    in_double = copy.deepcopy(model).double()
    assert in_double.ldae.tokenizer.encode(pixel_values.double()).dtype == torch.float64
    assert model.ldae.tokenizer.encode(pixel_values).dtype == torch.float32


def test_a_tokenizer_that_does_not_fit_the_model_is_one_clear_sentence(processor, pixel_values):
    small = {name: value[:4] if len(value) == K else value for name, value in make_learned("patch_ae").buffers.items()}
    other = make_processor(1)
    for kind, learned, sentence in (
        (
            "patch_vae",
            make_learned("patch_ae", processor),
            "The model has tokenizer='patch_vae' but the learned tokenizer has tokenizer='patch_ae'.",
        ),
        (
            "patch_pca",
            make_learned("patch_ae", processor),
            "The model has tokenizer='patch_pca' but the learned tokenizer has tokenizer='patch_ae'.",
        ),
        (
            "conv_vae",
            make_learned("conv_vae", patch_size=2, autoencoder=build_autoencoder(16, 1, 8, 1, 2)),
            "The model has patch_size=4 but the learned tokenizer has patch_size=2.",
        ),
        (
            "patch_ae",
            make_learned("patch_ae", latent_dim=4, buffers=small),
            "The model has latent_dim=8 but the learned tokenizer has latent_dim=4.",
        ),
        (
            "patch_ae",
            make_learned("patch_ae", other),
            f"The tokenizer was trained with the processor {other.fingerprint[:12]}, the model has "
            f"{processor.fingerprint[:12]}; call model.set_processor(processor) first, with the processor in the "
            "tokenizer's folder.",
        ),
    ):
        model = make_model(kind, processor)
        with pytest.raises(ValueError) as error:
            model.set_tokenizer(learned)
        assert one_sentence(error) == sentence
        assert model.config.tokenizer_fingerprint is None


def test_a_replaced_tokenizer_and_one_without_its_processor_are_refused(processor):
    model = make_model("conv_vae", None)
    with pytest.raises(ValueError, match=r"the model has none yet; call model.set_processor\(processor\) first"):
        model.set_tokenizer(make_learned("conv_vae", processor))
    model.set_tokenizer(make_learned("conv_vae"))  # a released one names no processor
    first, second = make_learned("conv_vae").fingerprint[:12], make_learned("conv_vae", seed=1).fingerprint[:12]
    with pytest.raises(ValueError) as error:
        model.set_tokenizer(make_learned("conv_vae", seed=1))
    assert one_sentence(error) == (
        f"The model was trained with the tokenizer {first}, not with {second}; load the one in the model's own folder."
    )


def test_a_processor_does_not_replace_a_learned_tokenizer(processor):
    model, learned = make_model("patch_ae", processor), make_learned("patch_ae", processor)
    model.set_tokenizer(learned)
    with pytest.raises(ValueError, match="^This model has its learned tokenizer already, which the basis of a process"):
        model.set_processor(processor)
    assert torch.equal(model.ldae.tokenizer.components, learned.buffers["components"])


@pytest.mark.parametrize("cls", [LDAEModel, LDAEForPreTraining])
def test_a_model_without_its_autoencoder_says_what_to_do(cls, processor, pixel_values):
    model = make_model("vqgan", processor, cls)
    with pytest.raises(ValueError) as error:
        model(pixel_values)
    assert one_sentence(error) == (
        "This model sees the latents of a convolutional autoencoder, which does not travel inside its weights; load "
        'it, LearnedTokenizer.from_pretrained(FOLDER, subfolder="tokenizer"), and hand it to model.set_tokenizer(...).'
    )


@pytest.mark.parametrize("kind", LEARNED_TOKENIZERS)
def test_a_saved_model_gives_equal_features_once_it_has_its_tokenizer_again(kind, processor, pixel_values, tmp_path):
    model, learned = make_model(kind, processor), make_learned(kind, processor)
    model.set_tokenizer(learned)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    learned.save_pretrained(tmp_path / "tokenizer")
    assert not any("encoder.conv_in" in name for name in load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        expected = model.ldae(pixel_values).last_hidden_state
        loaded = LDAEModel.from_pretrained(tmp_path)
        assert loaded.config.tokenizer_fingerprint == learned.fingerprint
        if kind in CONVOLUTIONAL_TOKENIZERS:
            with pytest.raises(ValueError, match="does not travel inside its weights"):
                loaded(pixel_values)
            loaded.set_tokenizer(LearnedTokenizer.from_pretrained(tmp_path, subfolder="tokenizer"))
        assert torch.equal(loaded(pixel_values).last_hidden_state, expected)
        encoder, its_processor = load_ldae(tmp_path, device="cpu")
        assert torch.equal(encoder.eval()(pixel_values).last_hidden_state, expected)
    assert its_processor.fingerprint == processor.fingerprint
    pixels = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.inference_mode():
        features = PooledFeatures(open_encoder(encoder, processor=its_processor))(pixels, torch.arange(2))
        pooled = model.ldae(processor.normalize_pixels(pixels)).pooler_output
    torch.testing.assert_close(features, pooled)


def test_an_encoder_whose_folder_lacks_the_tokenizer_or_holds_another_is_refused(processor, tmp_path):
    model = make_model("conv_vae", processor)
    model.set_tokenizer(make_learned("conv_vae", processor))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(subfolder tokenizer\) holds no learned tokenizer"):
        load_ldae(tmp_path)
    make_learned("conv_vae", processor, seed=1).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="^The model was trained with the tokenizer .* load the one in the model's"):
        load_ldae(tmp_path)
