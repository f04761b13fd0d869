"""The encoder as a backbone: the same weights and features, as maps, for the models of transformers that take one."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_encoder import TINY, save_tiny_encoder
from transformers import AutoBackbone, UperNetConfig, UperNetForSemanticSegmentation
from transformers.backbone_utils import load_backbone

from ldae_hf import LDAEBackbone, LDAEConfig, LDAEForPreTraining, LDAEModel


STAGES = ["stem", "stage1", "stage2", "stage3"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


def images(height: int = 16, width: int = 16, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("height, width", [(16, 16), (24, 8), (8, 36)])
def test_the_last_map_is_the_last_hidden_state_on_its_grid(encoder, height, width):
    pixel_values = images(height, width)
    (feature_map,) = LDAEBackbone.from_pretrained(encoder)(pixel_values).feature_maps
    assert feature_map.shape == (2, TINY["hidden_size"], height // 4, width // 4)
    tokens = LDAEModel.from_pretrained(encoder)(pixel_values).last_hidden_state
    assert torch.equal(feature_map.flatten(2).transpose(1, 2), tokens)


def test_a_patch_is_where_it_is_in_the_image(encoder):
    model = LDAEBackbone.from_pretrained(encoder, out_features=["stem"])
    pixel_values = images(16, 24, count=1)
    changed = pixel_values.clone()
    changed[:, :, 4:8, 16:20] += 1  # row 1, column 4 of the patches
    maps = [model(values).feature_maps[0] for values in (pixel_values, changed)]
    assert (maps[0] != maps[1]).any(dim=1)[0].nonzero().tolist() == [[1, 4]]


def test_every_stage_is_the_normalised_hidden_state_of_that_depth(encoder):
    model = LDAEBackbone.from_pretrained(encoder, out_features=STAGES)
    outputs = model(images(), output_hidden_states=True)
    hidden_states = LDAEModel.from_pretrained(encoder)(images(), output_hidden_states=True).hidden_states
    assert len(outputs.feature_maps) == len(hidden_states) == 4
    for feature_map, ours, theirs in zip(outputs.feature_maps, outputs.hidden_states, hidden_states, strict=True):
        assert torch.equal(ours, theirs)
        normalised = torch.nn.functional.layer_norm(theirs, theirs.shape[-1:], eps=1e-6)
        assert torch.equal(feature_map.flatten(2).transpose(1, 2), normalised)
    assert model(images()).hidden_states is None
    assert model.channels == [32, 32, 32, 32]


def test_stages_are_chosen_by_name_or_by_number_and_saved(encoder, tmp_path):
    for chosen in (dict(out_features=["stage1", "stage3"]), dict(out_indices=[1, 3]), dict(out_indices=(1, -1))):
        model = LDAEBackbone.from_pretrained(encoder, **chosen)
        assert model.out_features == ["stage1", "stage3"]
        assert len(model(images()).feature_maps) == 2
    model.save_pretrained(tmp_path)
    loaded = LDAEBackbone.from_pretrained(tmp_path)
    assert loaded.out_features == ["stage1", "stage3"]
    for ours, theirs in zip(model(images()).feature_maps, loaded(images()).feature_maps, strict=True):
        assert torch.equal(ours, theirs)
    assert LDAEModel.from_pretrained(tmp_path).config.out_features == ["stage1", "stage3"]


@pytest.mark.parametrize(
    "chosen, sentence",
    [
        (dict(out_features=["stage9"]), "must be a subset of stage_names"),
        (dict(out_features=["stage2", "stage1"]), "same order as stage_names"),
        (dict(out_features="stage1"), "must be a list"),
        (dict(out_indices=[4]), "must be numbers of the stages"),
        (dict(out_indices=["stage1"]), "must be numbers of the stages"),
        (dict(out_indices=[1, 1]), "must not contain any duplicates"),
    ],
)
def test_a_stage_that_is_not_there_is_refused(chosen, sentence):
    with pytest.raises(ValueError, match=sentence):
        LDAEConfig(**TINY, **chosen)


def test_an_encoder_says_nothing_of_stages(encoder):
    assert not {"out_features", "out_indices", "stage_names"} & json.loads((encoder / "config.json").read_text()).keys()
    assert "out_features" not in LDAEConfig().to_dict()


def test_a_pretraining_checkpoint_is_a_backbone_too(tmp_path):
    model = LDAEForPreTraining(LDAEConfig(**TINY)).eval()
    model.save_pretrained(tmp_path)
    backbone, info = LDAEBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    tokens = model.ldae(images()).last_hidden_state
    assert torch.equal(backbone(images()).feature_maps[0].flatten(2).transpose(1, 2), tokens)


def test_the_noise_level_the_attention_and_the_tuple_are_the_callers_choice(encoder):
    model = LDAEBackbone.from_pretrained(encoder, attn_implementation="eager")
    assert not torch.equal(model(images()).feature_maps[0], model(images(), timesteps=500).feature_maps[0])
    assert len(model(images(), output_attentions=True).attentions) == 3
    (maps,) = model(images(), return_dict=False)
    assert torch.equal(maps[0], model(images()).feature_maps[0])
    with pytest.raises(TypeError, match="no argument 'mask'"):
        model(images(), mask=None)


def test_auto_backbone_makes_one_of_a_configuration():
    model = AutoBackbone.from_config(LDAEConfig(**TINY, out_indices=[2]))
    assert type(model) is LDAEBackbone
    assert model.out_features == ["stage2"]
    assert type(load_backbone(LDAEConfig(**TINY))) is LDAEBackbone


def test_a_segmentation_model_of_transformers_trains_on_it_and_comes_back(encoder, tmp_path):
    config = UperNetConfig(
        backbone_config=LDAEConfig.from_pretrained(encoder, out_features=STAGES),
        hidden_size=16,
        num_labels=5,
        pool_scales=[1, 2],
        use_auxiliary_head=False,
    )
    torch.manual_seed(0)
    model = UperNetForSemanticSegmentation(config)
    model.backbone = LDAEBackbone.from_pretrained(encoder, out_features=STAGES)
    labels = torch.randint(0, 5, (2, 16, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(images(), labels=labels).loss
        loss.backward()
        assert model.backbone.layers[0].mlp.fc1.weight.grad.abs().sum() > 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(loaded.backbone) is LDAEBackbone and loaded.backbone.out_features == STAGES
    assert torch.equal(loaded(images()).logits, model(images()).logits)


def test_a_saved_backbone_is_the_same_in_a_fresh_process(encoder, tmp_path):
    script = (
        "import sys, torch, ldae_hf\n"
        "pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))\n"
        "maps = ldae_hf.LDAEBackbone.from_pretrained(sys.argv[1])(pixels).feature_maps\n"
        "print(maps[0].double().sum().item().hex())"
    )
    command = [sys.executable, "-c", script, str(encoder)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ours = LDAEBackbone.from_pretrained(encoder)(images()).feature_maps[0].double().sum().item()
    assert printed.strip() == ours.hex()
