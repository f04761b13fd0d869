"""FSDP2, as accelerate prepares it: a sharded run trains what an ordinary one does, and either goes on with the other.

accelerate shards on GPUs only; here its state is told that it should, on processes that exchange through gloo.
"""

import sys

import pytest
import torch
from accelerate import DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from forked_runs import dataset_of, encoded, lines
from safetensors.torch import load_file
from test_pretrain import NUM_IMAGES, final_tensors, losses, train, use_float64


@pytest.fixture(scope="module")
def images():
    return dataset_of([encoded(number) for number in range(NUM_IMAGES)])


def shard_in_float64():
    use_float64()
    shard()


def shard():
    module = sys.modules["ldae_hf.training.pretrain"]  # whose name is also that of its function
    make_accelerator = module.make_accelerator

    def with_fsdp2(*arguments):
        accelerator = make_accelerator(*arguments)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LDAELayer"],
            cpu_ram_efficient_loading=False,
        )
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        return accelerator

    module.make_accelerator = with_fsdp2


def checksum(model, processor) -> dict[str, float]:
    return {"checksum": sum(parameter.detach().double().sum().item() for parameter in model.parameters())}


@pytest.mark.slow
def test_a_sharded_run_is_an_ordinary_run_and_each_goes_on_with_the_other(images, tmp_path):
    sharded = dict(prepare=shard_in_float64, processes=2, per_device_batch_size=2, evaluations=[checksum])
    ordinary = dict(prepare=use_float64, evaluations=[checksum])
    train(tmp_path / "ordinary", images, **ordinary)
    train(tmp_path / "sharded", images, max_steps=5, **sharded)
    train(tmp_path / "sharded", images, max_steps=7, **sharded)
    train(tmp_path / "sharded", images, **ordinary | dict(max_steps=8))
    train(tmp_path / "sharded", images, **sharded)

    assert losses(tmp_path / "ordinary") == pytest.approx(losses(tmp_path / "sharded"), rel=1e-12)
    expected, found = final_tensors(tmp_path / "ordinary"), final_tensors(tmp_path / "sharded")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)
    checksums = [
        [line["checksum"] for line in lines(tmp_path / run) if "checksum" in line] for run in ("ordinary", "sharded")
    ]
    assert len(checksums[0]) == 5 and checksums[0] == pytest.approx(checksums[1], rel=1e-12)
    assert "LDAEModel" in (tmp_path / "sharded" / "encoder" / "config.json").read_text()
    assert load_file(tmp_path / "sharded" / "encoder" / "golden_features.safetensors")


@pytest.mark.slow
def test_in_bf16_a_sharded_run_rounds_what_an_ordinary_one_rounds(images, tmp_path):
    options = dict(processes=2, per_device_batch_size=4, mixed_precision="bf16", max_steps=4)
    train(tmp_path / "ordinary", images, **options)
    train(tmp_path / "sharded", images, prepare=shard, **options)
    assert losses(tmp_path / "ordinary") == pytest.approx(losses(tmp_path / "sharded"), rel=1e-5)
