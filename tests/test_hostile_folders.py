"""Folders that mean no good: whatever they hold, loading them works or fails with a sentence; nothing else happens."""

import json
import os
import pickle
import resource
import shutil

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_encoder import save_tiny_encoder, tiny_processor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, BertConfig, ViTConfig

from ldae_hf import LDAEConfig, LDAEForImageClassification, LDAEForPreTraining, LDAEImageProcessor, LDAEModel


CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
SENTENCES = (ValueError, StrictDataclassError)
MEMORY = 2**20  # KiB that loading may take beyond what the process has

# Values that a key can have in a JSON file, and some that it should not.
NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, -1, 1, 2, 3, 4, 8, 10**6, 2**31, 2**63, 10**30, 10**400, 1e300, 1e-320])
)
LEAVES = NUMBERS | st.none() | st.booleans() | st.text(max_size=8) | st.sampled_from(["float16", "a/b", "../x", "\0"])
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["0", "1", "x", "__float__"]), inner, max_size=3)
    ),
    max_leaves=6,
)
# transformers writes these, reads them, or has a variable of this name. It looks at `model_type` and `auto_map` itself,
# before any class of ours is asked.
OTHER_KEYS = (
    "_attn_implementation _commit_hash _name_or_path architectures attn_implementation attribute_map "
    "base_model_tp_plan chunk_size_feed_forward custom_pipelines dtype experts_implementation extra_files id2label "
    "is_encoder_decoder label2id name_or_path num_labels out_features out_indices output_attentions "
    "output_hidden_states per_layer_config problem_type quantization_config return_dict sub_configs "
    "tie_last_hidden_states torch_dtype transformers_version transformers_weights use_safetensors"
).split()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_encoder(tmp_path_factory.mktemp("saved") / "encoder")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "encoder")


@pytest.fixture(scope="module")
def spoilt(saved):
    """One folder for all examples of a test, each of which writes the file that it spoils."""
    return shutil.copytree(saved, saved.parent / "spoilt")


def change_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_tensors(file, **changes):
    """None takes a tensor away."""
    tensors = {**load_file(file), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, file, metadata={"format": "pt"})


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---- configurations


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(changes=st.dictionaries(st.sampled_from(sorted([*LDAEConfig.__annotations__, *OTHER_KEYS])), VALUES, min_size=1))
def test_any_value_in_a_configuration_loads_or_is_refused_in_a_sentence(saved, spoilt, changes):
    content = {**json.loads((saved / CONFIG).read_text()), **changes}
    (spoilt / CONFIG).write_text(json.dumps(content))
    before = peak_memory()
    for load in (AutoConfig.from_pretrained, AutoModel.from_pretrained, LDAEForImageClassification.from_pretrained):
        try:
            load(spoilt)
        except SENTENCES as error:
            assert len(str(error)) > 10
    assert peak_memory() - before < MEMORY


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(hidden_size=2**16, num_attention_heads=1), "describes a model of [0-9]+ values"),
        (dict(num_hidden_layers=200), "describes a model of [0-9]+ values"),
        (dict(num_hidden_layers=10**12), "is more than 256"),
        (dict(hidden_size=2**60), "is more than 65536"),
        (dict(mlp_ratio=1e300), "is more than 1024"),
        (dict(num_train_timesteps=10**12), "is more than 1048576"),
        (dict(num_labels=10**12), "must be an integer in 1"),
        (dict(patch_size=2**20, image_size=2**20), "more than 4096"),
        (dict(image_size=2**30), "table of positions may hold"),
        (dict(hidden_size=2**40, num_attention_heads=2**40), "is more than"),
    ],
)
def test_a_configuration_cannot_make_us_build_a_giant(folder, changes, sentence):
    change_json(folder / CONFIG, **changes)
    before = peak_memory()
    for load in (AutoModel.from_pretrained, LDAEForImageClassification.from_pretrained):
        with pytest.raises(ValueError, match=sentence):
            load(folder)
    assert peak_memory() - before < MEMORY


@pytest.mark.parametrize("other", [ViTConfig, BertConfig])
def test_the_configuration_of_another_model_type_is_named(folder, other):
    other().save_pretrained(folder)
    for load in (LDAEConfig.from_pretrained, LDAEModel.from_pretrained, LDAEForPreTraining.from_pretrained):
        with pytest.raises(ValueError, match=f"is of a '{other.model_type}' model, not of 'ldae'"):
            load(folder)


def test_a_file_cannot_choose_kernels_that_would_be_fetched_from_the_hub(folder):
    change_json(folder / CONFIG, attn_implementation="somebody/kernels", _attn_implementation="somebody/kernels")
    assert AutoModel.from_pretrained(folder).config._attn_implementation == "sdpa"
    assert AutoModel.from_pretrained(folder, attn_implementation="eager").config._attn_implementation == "eager"


@pytest.mark.parametrize("key", ["attribute_map", "extra_files", "sub_configs_defaults", "_auto_class", "hidden_sizes"])
def test_a_file_cannot_set_a_variable_of_the_class(folder, key):
    change_json(folder / CONFIG, **{key: {"hidden_size": "patch_size"}})
    with pytest.raises(ValueError, match=f"has no key '{key}'"):
        LDAEModel.from_pretrained(folder)


def test_a_classifier_whose_configuration_asks_for_tuples_still_classifies(folder):
    change_json(folder / CONFIG, return_dict=False)
    model = LDAEForImageClassification.from_pretrained(folder)
    (logits,) = model(torch.zeros(1, 3, 16, 16))
    assert logits.shape == (1, 2)


# ---- weights


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"patch_embedding.weight": None},
            "1 are missing or have another shape, the first is .*patch_embedding.weight'",
        ),
        ({"patch_embedding.weight": torch.zeros(3)}, "the first is .*patch_embedding.weight'"),
        ({"patch_embedding.weight": torch.zeros(32, 47)}, "the first is .*patch_embedding.weight'"),
        ({"layers.2.mlp.fc1.bias": torch.zeros(128, 0)}, "the first is .*layers.2.mlp.fc1.bias'"),
        ({"patch_embedding.weight": torch.zeros(32, 48, dtype=torch.int64)}, "is of the type I64, not floating-point"),
        ({"patch_embedding.bias": torch.zeros(32, dtype=torch.bool)}, "is of the type BOOL, not floating-point"),
        ({"patch_embedding.bias": torch.zeros(32, dtype=torch.complex64)}, "is of the type C64, not floating-point"),
    ],
)
def test_a_tensor_that_is_missing_misshapen_or_of_another_type_is_named(folder, changes, sentence):
    change_tensors(folder / WEIGHTS, **changes)
    for load in (AutoModel.from_pretrained, LDAEForImageClassification.from_pretrained):
        with pytest.raises(ValueError, match=sentence):
            load(folder)


def test_a_tensor_too_many_changes_nothing(saved, folder):
    change_tensors(folder / WEIGHTS, **{"evil.weight": torch.ones(3), "decoder.extra": torch.ones(2)})
    pixel_values = torch.randn(1, 3, 16, 16)
    features = [AutoModel.from_pretrained(where)(pixel_values).last_hidden_state for where in (saved, folder)]
    assert torch.equal(*features)


@pytest.mark.parametrize("share", [0, 0.0001, 0.01, 0.5, 0.9999])
def test_weights_that_were_cut_off_are_damaged(folder, share):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="are damaged .*; copy or download them again"):
        AutoModel.from_pretrained(folder)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(position=st.integers(0, 4000), value=st.integers(0, 255))
def test_a_changed_byte_in_the_header_loads_or_is_refused_in_a_sentence(saved, spoilt, position, value):
    shutil.copyfile(saved / CONFIG, spoilt / CONFIG)
    content = bytearray((saved / WEIGHTS).read_bytes())
    content[position] = value
    (spoilt / WEIGHTS).write_bytes(content)
    try:
        AutoModel.from_pretrained(spoilt)
    except SENTENCES as error:
        assert len(str(error)) > 10
    finally:
        shutil.copyfile(saved / WEIGHTS, spoilt / WEIGHTS)


# ---- pickles


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def set_traps(folder, path, names):
    for name in names:
        (folder / name).write_bytes(pickle.dumps({"patch_embedding.weight": Trap(path)}))


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("use_safetensors", [{}, {"use_safetensors": None}, {"use_safetensors": True}])
def test_a_folder_with_pickled_weights_only_is_refused_and_the_pickle_not_opened(folder, tmp_path, use_safetensors):
    os.remove(folder / WEIGHTS)
    set_traps(folder, tmp_path / "sprung", ["pytorch_model.bin", "model.bin", "adapter_model.bin", "model.pt"])
    for load in (AutoModel.from_pretrained, LDAEForImageClassification.from_pretrained):
        with pytest.raises(OSError, match="holds no model.safetensors; .* is never opened"):
            load(folder, **use_safetensors)
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_is_not_opened_on_request_either(folder, tmp_path):
    set_traps(folder, tmp_path / "sprung", ["pytorch_model.bin"])
    for load in (AutoModel.from_pretrained, LDAEForPreTraining.from_pretrained):
        with pytest.raises(ValueError, match="never from a pickle"):
            load(folder, use_safetensors=False)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("dtype", ["float32", None])
@pytest.mark.parametrize("metadata", [{}, {"dtype": "float32"}])
def test_an_index_that_names_a_pickle_is_refused_and_the_pickle_not_opened(
    folder, tmp_path, monkeypatch, dtype, metadata
):
    # Without a dtype in the configuration transformers would look for one in the first file that the index names.
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was opened"))
    change_json(folder / CONFIG, dtype=dtype)
    os.remove(folder / WEIGHTS)
    set_traps(folder, tmp_path / "sprung", ["pytorch_model.bin"])
    index = {"metadata": metadata, "weight_map": {"patch_embedding.weight": "pytorch_model.bin"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="pytorch_model.bin is not a safetensors file"):
        AutoModel.from_pretrained(folder)
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_under_the_name_of_the_weights_is_damaged_weights(folder, tmp_path):
    set_traps(folder, tmp_path / "sprung", [WEIGHTS])
    with pytest.raises(ValueError, match="are damaged"):
        AutoModel.from_pretrained(folder)
    assert not (tmp_path / "sprung").exists()


# ---- processors


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    changes=st.dictionaries(
        st.sampled_from(
            sorted(["do_resize", "fingerprint", "processor_class", "size", *LDAEImageProcessor().to_dict()])
        ),
        VALUES,
        min_size=1,
    ),
    fitted=st.booleans(),
)
def test_any_value_in_a_processors_file_loads_or_is_refused_in_a_sentence(saved, spoilt, changes, fitted):
    content = {**json.loads((saved / PROCESSOR).read_text()), **changes}
    if not fitted:
        content.pop("fingerprint", None)
    # transformers' Auto class looks at this one itself, before ours is asked.
    content["image_processor_type"] = "LDAEImageProcessor"
    (spoilt / PROCESSOR).write_text(json.dumps(content))
    before = peak_memory()
    try:
        AutoImageProcessor.from_pretrained(spoilt).basis  # noqa: B018
    except SENTENCES as error:
        assert len(str(error)) > 10
    assert peak_memory() - before < MEMORY


def test_the_processor_of_another_basis_is_refused_where_it_meets_the_model(folder):
    tiny_processor(seed=1).save_pretrained(folder)
    model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match="is not the one this model was built with .*; load both from the same folder"):
        model.check_processor(processor)


def test_the_basis_of_another_processor_is_refused_at_loading(folder, tmp_path):
    tiny_processor(seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "patch_pca.safetensors", folder)
    with pytest.raises(ValueError, match="does not have the fingerprint that preprocessor_config.json names"):
        AutoImageProcessor.from_pretrained(folder)
