"""Taking a model to another precision leaves what has to be exact, the basis and the noise tables, in fp32."""

import copy

import pytest
import torch
from test_modeling_ldae import build, pixel_values, processor, processors
from torch import nn

from ldae_hf import LDAEForImageClassification, LDAEForPreTraining, LDAEModel


__all__ = ["pixel_values", "processor", "processors"]  # fixtures

HALVES = {
    "to bf16": lambda model: model.to(torch.bfloat16),
    "to a device and bf16": lambda model: model.to("cpu", torch.bfloat16),
    "bfloat16()": lambda model: model.bfloat16(),
    "half()": lambda model: model.half(),
    "inside another module": lambda model: nn.Sequential(model).to(torch.bfloat16)[0],
}


def exact(model) -> dict[str, torch.Tensor]:
    base = model.base_model
    return {
        f"{part}.{name}": value
        for part in ("tokenizer", "schedule")
        for name, value in getattr(base, part).named_buffers()
    }


@pytest.mark.parametrize("take", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("cls", [LDAEModel, LDAEForPreTraining, LDAEForImageClassification])
def test_a_model_taken_to_half_precision_keeps_its_basis_and_tables(cls, take, processor):
    model = build(cls, processor, dtype=torch.float32)
    taken = take(copy.deepcopy(model))
    assert {p.dtype for p in taken.parameters()} <= {torch.bfloat16, torch.float16}
    for name, value in exact(taken).items():
        assert value.dtype == torch.float32 and torch.equal(value, exact(model)[name])
    taken.check_processor(processor)


def test_a_model_taken_to_bf16_answers_as_the_one_loaded_in_bf16(processor, pixel_values, tmp_path):
    model = build(LDAEModel, processor, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded, taken = LDAEModel.from_pretrained(tmp_path, dtype=torch.bfloat16), model.to(torch.bfloat16)
    with torch.no_grad():
        features = [one(pixel_values.float()).last_hidden_state for one in (loaded, taken)]
    assert torch.equal(*features)


def test_double_precision_and_the_way_back_are_as_ever(processor):
    model = build(processor=processor, dtype=torch.float32)
    double = copy.deepcopy(model).double()
    assert {value.dtype for value in exact(double).values()} == {torch.float64}
    for back in (copy.deepcopy(double).float(), copy.deepcopy(double).bfloat16()):
        assert all(torch.equal(value, exact(model)[name]) for name, value in exact(back).items())


def test_a_model_on_the_meta_device_takes_a_precision_and_a_place(processor):
    with torch.device("meta"):
        model = LDAEModel(build(processor=processor).config)
    placed = model.to(torch.bfloat16).to_empty(device="cpu")
    assert {value.dtype for value in exact(placed).values()} == {torch.float32}
    assert {p.dtype for p in placed.parameters()} == {torch.bfloat16}
