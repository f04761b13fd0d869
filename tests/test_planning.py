"""What a run will cost, against what torch counts and autograd keeps; `ldae plan`; the launch configurations."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from forked_runs import dataset_of, encoded, in_processes
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForPreTraining
from typer.testing import CliRunner

from ldae_hf import SIZES, LDAEConfig, modeling_ldae
from ldae_hf.cli import app
from ldae_hf.recipes import load_recipe
from ldae_hf.training import load_images
from ldae_hf.training.costs import (
    count_parameters,
    forward_flops_per_image,
    tokenizer_flops_per_image,
    training_flops_per_image,
)
from ldae_hf.training.dry_run import measure_loading, measure_training
from ldae_hf.training.hardware import DEVICES, find_device, named_device, peak_flops
from ldae_hf.training.memory import (
    Layout,
    activation_bytes,
    block_bytes,
    checkpoint_bytes,
    device_memory,
)
from ldae_hf.training.optimization import Plan, adamw
from ldae_hf.training.planning import MFU, make_plan, plan_run
from ldae_hf.training.run_plan import Known


EXAMPLES = Path(__file__).parents[1] / "examples" / "accelerate"
IMAGENET = Known(1_281_167, "known")
GIB = 2**30
SMALL = LDAEConfig(**SIZES["cpu_b"], image_size=32, patch_size=8)
MEDIUM = LDAEConfig(**SIZES["desk_b"], image_size=128)


# ---- devices


@pytest.mark.parametrize(
    "torch_name, name",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_device_is_known_by_its_whole_name_or_not_at_all(torch_name, name):
    assert find_device(torch_name) == (None if name is None else DEVICES[name])
    assert sum(bool(re.fullmatch(device.pattern, torch_name)) for device in DEVICES.values()) == (name is not None)


def test_the_peaks_are_the_vendors_dense_numbers_and_a_cpu_has_none():
    assert DEVICES["h100"].peak_flops("bf16") == 989.4e12
    assert DEVICES["a100"].peak_flops("no") == 19.5e12
    assert DEVICES["v100"].peak_flops("bf16") is None
    assert all(device.bf16 is None or device.bf16 > device.fp32 for device in DEVICES.values())
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_fp32_has_the_peak_of_tf32_where_that_is_allowed():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert DEVICES["a100"].peak_flops("no") == 156e12
        assert DEVICES["v100"].peak_flops("no") == 15.7e12
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_device_that_is_misspelt_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match="'h10O' is not in the table of peaks; did you mean 'h100'"):
        named_device("h10O")


# ---- FLOPs and parameters


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"prediction_target": "latent"},
        {"input_space": "latent", "prediction_target": "noise"},
        {"timestep_scope": "token"},
        {"timestep_scope": "token", "conditioning_hidden_size": None},
        SIZES["desk_half_l_deep_narrow"],
        {**SIZES["desk_half_l_deep_narrow"], "timestep_scope": "block"},
        {"num_global_tokens": 4},
    ],
)
def test_the_flops_of_an_image_are_those_that_torch_counts_forward_and_in_training(keys):
    config = LDAEConfig(**SIZES["desk_half_l"] | dict(image_size=128) | keys)
    model = AutoModelForPreTraining.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as forward:
        loss = model(torch.zeros(2, 3, 128, 128), noise=torch.zeros(2, 64, 32)).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    counted = forward.get_total_flops() / 2, (forward.get_total_flops() + backward.get_total_flops()) / 2
    assert forward_flops_per_image(config) == pytest.approx(counted[0], rel=0.02)
    assert training_flops_per_image(config) == pytest.approx(counted[1], rel=0.02)


@pytest.mark.parametrize(
    "size, gigaflops, encoder, total",
    [
        ("b", 277, 98_840_064, 197_336_256),
        ("half_l", 484, 175_302_656, 350_081_024),
        ("l", 966, 348_505_088, 696_485_888),
    ],
)
def test_the_costs_of_the_papers_models_are_known(size, gigaflops, encoder, total):
    config = LDAEConfig(**SIZES[size])
    assert training_flops_per_image(config) == pytest.approx(gigaflops * 1e9, rel=0.01)
    parameters = count_parameters(config)
    assert (parameters.encoder, parameters.total) == (encoder, total)


def test_the_parameters_are_those_of_the_model_that_is_trained():
    model = AutoModelForPreTraining.from_config(SMALL)
    found = count_parameters(SMALL)
    assert found.total == sum(parameter.numel() for parameter in model.parameters())
    assert found.block == sum(parameter.numel() for parameter in model.decoder.layers[0].parameters())
    narrow = LDAEConfig(**SIZES["desk_half_l_deep_narrow"])
    model, found = AutoModelForPreTraining.from_config(narrow), count_parameters(narrow)
    layers = [*model.ldae.layers, *model.decoder.layers]
    assert found.blocks == sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    assert found.block * len(model.ldae.layers) != found.blocks / 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("keys", [SIZES["desk_half_l_deep_narrow"], SIZES["desk_half_l"] | {"num_global_tokens": 4}])
def test_a_decoder_of_another_width_and_global_tokens_are_estimated_to_five_percent(keys, checkpointing):
    config = LDAEConfig(**keys, image_size=128)
    expected = 4 * activation_bytes(config, "no", "sdpa", "cpu", checkpointing)
    if checkpointing:
        expected -= 4 * block_bytes(config, "no", "sdpa", "cpu")
    assert kept_by_autograd(config, "no", "sdpa", "cpu", checkpointing, 4) == pytest.approx(expected, rel=0.05)


def test_a_convolutional_tokenizer_adds_flops_and_a_patch_wise_one_none():
    recipe = load_recipe("replace_noise_schedule", tier="cpu")
    assert tokenizer_flops_per_image(recipe.model_config(), recipe.tokenizer) > 1e6
    assert tokenizer_flops_per_image(SMALL, recipe.tokenizer) == 0


# ---- memory


class AutocastOfCuda(TorchFunctionMode):
    """What CUDA's autocast does in our blocks and the CPU's does not: addcmul widens, softmax is in fp32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if torch.is_autocast_enabled("cpu") and function in (torch.addcmul, torch.Tensor.softmax, F.layer_norm):
            wide = function is not torch.addcmul or any(argument.dtype == torch.float32 for argument in args)
            args = [argument.float() if wide and isinstance(argument, torch.Tensor) else argument for argument in args]
        return function(*args, **kwargs or {})


def kept_by_autograd(config, mixed_precision, attention, device_type, checkpointing, batch_size) -> int:
    """Bytes of all storages that a forward pass saves, but for the model's own."""
    model = AutoModelForPreTraining.from_config(config, attn_implementation=attention).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    own = {value.untyped_storage()._cdata for value in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()  # kept, so that no address comes twice
        return tensor

    pixel_values = torch.zeros(batch_size, 3, config.image_size, config.image_size)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"),
        AutocastOfCuda() if device_type == "cuda" else torch.enable_grad(),
    ):
        output = model(pixel_values)
    assert output.loss.requires_grad
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mixed_precision, device_type", [("no", "cpu"), ("bf16", "cpu"), ("bf16", "cuda")])
@pytest.mark.parametrize("config, batch_size", [(SMALL, 32), (MEDIUM, 16)], ids=["small", "medium"])
def test_activations_are_estimated_to_five_percent(
    config, batch_size, mixed_precision, device_type, attention, checkpointing
):
    settings = (config, mixed_precision, attention, device_type)
    expected = batch_size * activation_bytes(*settings, checkpointing)
    if checkpointing:  # the block that is computed again is not there after the forward pass
        expected -= batch_size * block_bytes(*settings)
    elif mixed_precision == "bf16":
        expected += 2 * count_parameters(config).matrices
    assert kept_by_autograd(*settings, checkpointing, batch_size) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("scope", ["image", "block", "token"])
def test_another_target_space_and_conditioning_are_estimated_to_five_percent(scope):
    config = LDAEConfig(
        **SIZES["desk_b"],
        image_size=128,
        input_space="latent",
        prediction_target="noise",
        conditioning_hidden_size=None,
        num_classes=10,
        timestep_scope=scope,
    )
    expected = 8 * activation_bytes(config, "no", "sdpa", "cpu", False)
    assert kept_by_autograd(config, "no", "sdpa", "cpu", False, 8) == pytest.approx(expected, rel=0.05)


def test_sharding_divides_what_a_run_keeps_and_checkpointing_what_it_computes():
    config = LDAEConfig(**SIZES["l"])
    parameters = count_parameters(config)
    settings = dict(batch_size=64, processes=8, ema=True, mixed_precision="bf16", device_type="cuda")
    plain = device_memory(config, parameters, Layout(False, False), **settings)
    sharded = device_memory(config, parameters, Layout(True, False), **settings)
    again = device_memory(config, parameters, Layout(False, True), **settings)
    assert plain["weights"] == 4 * parameters.total == 8 * sharded["weights"]
    assert plain["AdamW's moments"] + plain["EMA"] == 12 * parameters.total
    assert sharded["activations"] == plain["activations"] > 8 * again["activations"]


def test_a_checkpoint_holds_the_weights_and_the_optimizers_moments():
    model = AutoModelForPreTraining.from_config(SMALL)
    optimizer = adamw(model, [0.9, 0.999])
    model(torch.zeros(2, 3, 32, 32)).loss.backward()
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values()] + list(model.parameters())
    held = sum(tensor.nbytes for tensor in tensors)
    assert checkpoint_bytes(count_parameters(SMALL), ema=False) == pytest.approx(held, rel=0.001)
    assert checkpoint_bytes(count_parameters(SMALL), ema=True) == pytest.approx(4 / 3 * held, rel=0.001)


# ---- the plan


def plan(name="size_l_epochs_1600", **options):
    device = DEVICES[options.pop("device", "h100")]
    overrides = options.pop("overrides", ())
    return plan_run(load_recipe(name, overrides=overrides), IMAGENET, device=device, **{"gpus": 8} | options)


def test_the_papers_longest_run_takes_a_week_of_eight_h100s():
    found = plan(workers=8)
    assert found.plan.total_steps == 1_000_000 and found.plan.learning_rate == pytest.approx(8e-4)
    assert found.gpu_hours == pytest.approx(1_390, rel=0.01) and found.days == pytest.approx(7.25, rel=0.01)
    assert found.images_per_second.value == pytest.approx(MFU * 989.4e12 / 969e9, rel=0.01)


def test_what_is_computed_again_takes_a_third_longer():
    assert plan(workers=8, gradient_checkpointing=True).days == pytest.approx(4 / 3 * plan(workers=8).days)


def test_a_run_that_does_not_fit_is_told_what_does():
    found = plan()
    assert found.bottleneck == "memory"
    assert list(found.remedies)[:2] == ["--per-device-batch-size 64", "--gradient-checkpointing"]
    assert all(size <= 80 * GIB for size in found.remedies.values())
    smaller = plan(per_device_batch_size=64, workers=8)
    assert smaller.bottleneck == "network" and smaller.needed == pytest.approx(
        found.remedies["--per-device-batch-size 64"]
    )
    assert smaller.plan.accumulation == 4
    text = "\n".join(plan(device="l4").lines())
    assert "24 GiB are there" in text and "--gradient-checkpointing" in text


def test_too_few_workers_are_the_bottleneck_and_the_plan_says_how_many_keep_up():
    found = plan(per_device_batch_size=64, workers=2)
    assert found.bottleneck == "data" and found.workers_needed == 3
    assert plan(per_device_batch_size=64, workers=3).bottleneck == "network"
    assert found.step == pytest.approx(256 / 400)
    assert any("--num-workers 3 keeps up" in line for line in found.lines())


def test_a_slow_link_between_machines_is_the_bottleneck_and_a_longer_backward_pass_hides_it():
    options = dict(gpus=16, nodes=2, workers=8, per_device_batch_size=16, bandwidth=2)
    found = plan(**options)
    assert found.bottleneck == "gradient exchange"
    assert found.exchange == pytest.approx(2 * 15 / 16 * 4 * 696_485_888)
    assert found.exposed == pytest.approx(found.exchange / 2e9 - 2 / 3 * found.computing / 8)
    assert plan(**options | {"bandwidth": None}).exposed < found.exposed
    assert plan(gpus=8, workers=8).exposed == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(gpus=7), "2048 does not split over 7 processes"),
        (dict(gpus=8, nodes=3), "8 GPUs do not spread evenly over 3 machines"),
        (dict(mfu=0.0), "--mfu is 0.0, but must be above 0"),
        (dict(workers=0), "--workers is 0"),
        (dict(device="v100"), "v100 has no units for bf16"),
        (dict(mixed_precision="fp16"), "must be 'bf16' or 'no'"),
    ],
)
def test_a_plan_that_cannot_be_is_an_error_that_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)


def test_every_number_says_where_it_comes_from():
    lines = plan(workers=8, per_device_batch_size=64).lines()
    text = "\n".join(lines)
    for part in (
        "counted",
        "from the recipe",
        "assumed",
        "known",
        "MFU 0.40, assumed, of h100's 989 TFLOP/s",
        "7.3 days",
    ):
        assert part in text
    assert "MFU 0.50, given" in "\n".join(plan(mfu=0.5).lines())


def test_a_plan_says_that_a_learned_tokenizer_comes_first_and_what_encoding_costs():
    text = "\n".join(plan("replace_noise_schedule").lines())
    assert "its own training comes first" in text and "GFLOP more in its tokenizer" in text
    text = "\n".join(plan("dit_baseline").lines())  # its tokenizer is a released one
    assert "its own training comes first" not in text and "GFLOP more in its tokenizer" in text


# ---- a dry run


def test_a_dry_run_takes_real_steps_and_the_plan_takes_its_speed():
    recipe = load_recipe("l_dae", tier="cpu", overrides=["train.ema_half_life_epochs=1.0"])
    settings = dict(mixed_precision="bf16", gradient_checkpointing=True, seconds=1)
    measured = in_processes(lambda: measure_training(recipe, Plan.derive(recipe, 50_000, 1, 8), **settings))
    assert measured.micro_batches == 4 * measured.updates > 0 and measured.images_per_second > 1
    measured = replace(measured, worker_images_per_second=1000.0)
    found = plan_run(recipe, IMAGENET, device=None, per_device_batch_size=8, measured=measured)
    assert found.images_per_second.value == measured.images_per_second and found.room is None
    assert "measured here, CPU" in "\n".join(found.lines())


def test_a_dry_run_that_would_not_get_through_one_batch_says_so():
    recipe = load_recipe("l_dae", tier="cpu")
    with pytest.raises(ValueError, match="give a smaller --per-device-batch-size"):
        settings = dict(mixed_precision="no", gradient_checkpointing=False, seconds=1e-3)
        in_processes(lambda: measure_training(recipe, Plan.derive(recipe, 50_000, 1, 8), **settings))


def test_a_worker_is_measured_with_the_loader_of_the_training():
    source = load_images(dataset_of([encoded(number) for number in range(40)]))
    assert measure_loading(source, load_recipe("l_dae", tier="cpu"), 0.2) > 10


def test_a_plan_counts_local_images_knows_some_and_asks_for_the_rest(tmp_path):
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    for number in range(30):
        (folder / f"{number}.png").write_bytes(encoded(number))
    recipe = load_recipe("l_dae", overrides=["train.global_batch_size=8"])
    assert make_plan(recipe, dataset=str(folder.parent)).plan.num_images == 30
    assert make_plan(recipe, dataset="cifar10", num_images=100).plan.num_images == 100
    assert make_plan(load_recipe("l_dae")).plan.num_images == 1_281_167
    with pytest.raises(ValueError, match="somebody/images is not on this machine.*give --num-images"):
        make_plan(recipe, dataset="somebody/images")
    with pytest.raises(ValueError, match="--mfu has no place beside --dry-run"):
        make_plan(recipe, num_images=100, mfu=0.3, dry_run=True)


def test_the_command_prints_a_plan_and_a_users_error_in_one_line():
    result = CliRunner().invoke(app, ["plan", "size_l", "--gpus", "8", "--device", "H200", "--num-images", "1281167"])
    assert result.exit_code == 0 and "141 GiB are there" in result.stdout and "device-hours" in result.stdout
    result = CliRunner().invoke(app, ["plan", "l_dae", "--gpus", "7"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "does not split over 7" in result.stderr


# ---- accelerate


@pytest.mark.parametrize("name, processes, machines", [("ddp_8gpu", 8, 1), ("fsdp2_8gpu", 8, 1), ("ddp_2nodes", 16, 2)])
def test_accelerate_loads_each_configuration_and_finds_our_classes(name, processes, machines):
    file = EXAMPLES / f"{name}.yaml"
    config = load_config_from_file(str(file))  # an unknown key is an error
    assert isinstance(config, ClusterConfig)
    assert (config.num_processes, config.num_machines) == (processes, machines)
    assert f"accelerate launch --config_file examples/accelerate/{name}.yaml" in file.read_text()
    if wrapped := config.fsdp_config.get("fsdp_transformer_layer_cls_to_wrap"):
        assert wrapped in modeling_ldae.LDAEPreTrainedModel._no_split_modules and hasattr(modeling_ldae, wrapped)


def test_the_fsdp_configuration_reaches_accelerates_plugin():
    from accelerate.commands.launch import launch_command_parser

    known = {action.dest for action in launch_command_parser()._actions}
    section = yaml.safe_load((EXAMPLES / "fsdp2_8gpu.yaml").read_text())["fsdp_config"]
    assert set(section) <= known
    assert section["fsdp_version"] == 2 and section["fsdp_activation_checkpointing"] is False


@pytest.mark.parametrize("code, requeued", [(75, True), (0, False), (1, False)])
def test_the_slurm_job_queues_itself_again_only_where_the_run_was_stopped_and_saved(tmp_path, code, requeued):
    srun = f'#!/bin/bash\nprintf "%s\\n" "$@" > srun.txt\nexit {code}\n'
    scontrol = '#!/bin/bash\nif [ "$1" = show ]; then echo first; echo second; else echo "$@" > scontrol.txt; fi\n'
    for name, text in ("srun", srun), ("scontrol", scontrol):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = dict(PATH=f"{tmp_path}:/usr/bin:/bin", SLURM_JOB_NODELIST="n[1-2]", SLURM_JOB_ID="17")
    ended = subprocess.run(["bash", str(EXAMPLES / "slurm_2nodes.sh")], cwd=tmp_path, env=environment)
    assert ended.returncode == code and "examples/pretrain.py" in (tmp_path / "srun.txt").read_text()
    assert (tmp_path / "scontrol.txt").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 17\n"
