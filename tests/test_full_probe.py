"""The paper's linear probe: its optimizer, its batch of collected features, and the run as a whole."""

import io
import json
import os
import shlex
import shutil
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forked_runs import Child, in_processes, lines
from PIL import Image
from safetensors.torch import load_file
from tiny_encoder import save_tiny_encoder
from typer.testing import CliRunner

from ldae_hf.cli import app
from ldae_hf.evaluation.full_probe import run_full_probe
from ldae_hf.evaluation.full_probe.head import ProbeHead, make_optimizer, set_learning_rates
from ldae_hf.evaluation.full_probe.lars import LARS
from ldae_hf.evaluation.full_probe.protocol import Protocol
from ldae_hf.training import RunError, checkpoints, load_images
from ldae_hf.training.data import labelled_loader
from ldae_hf.training.session import Interrupted


EPOCHS, STEPS = 3, 9  # of three batches of 16, and four images that are left out


def picture(number: int, label: int) -> bytes:
    """Noise of its own on the colour of its class, as a PNG."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 120, (18, 20 + number % 5, 3))
    pixels[:, :, label] += 100
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with an encoder, and a data set of 52 training and 20 test images of three classes."""
    folder = tmp_path_factory.mktemp("full-probe")
    save_tiny_encoder(folder / "encoder")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    splits, first = datasets.DatasetDict(), 0
    for split, count in (("train", 52), ("test", 20)):
        images = [{"bytes": picture(first + n, n % 3), "path": None} for n in range(count)]
        rows = {"image": images, "label": [n % 3 for n in range(count)]}
        splits[split], first = datasets.Dataset.from_dict(rows, features), 1000
    splits.save_to_disk(folder / "images")
    return folder


def probe(files: Path, output_dir: Path, processes: int = 1, **options):
    """A probe in a fork, or in several."""
    settings = dict(epochs=EPOCHS, batch_size=16, per_device_batch_size=4, num_workers=0, cache_dir=None) | options
    return in_processes(
        lambda: run_full_probe(files / "encoder", files / "images", output_dir=output_dir, **settings), processes
    )


def trained(output_dir: Path) -> dict[str, torch.Tensor]:
    """Weights, BatchNorm's statistics and the optimizer's state after the last step."""
    last = checkpoints(output_dir / "checkpoints")[-1]
    return load_file(last / "head.safetensors") | load_file(last / "training/head_optimizer.safetensors")


def assert_equal(one: dict, other: dict):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- LARS and the head


def test_lars_takes_the_steps_that_one_computes_by_hand():
    direction = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    weight, bias = torch.nn.Parameter(5 * direction), torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = LARS([weight, bias], lr=2.0)
    velocity, length = 0.0, 5.0  # of the weight, whose gradient points where it does itself
    for expected_bias in (0.0, -1.9):  # 1 - 2 · 0.5, and then - 2 · (0.9 · 0.5 + 0.5)
        weight.grad, bias.grad = direction.clone(), torch.full_like(bias, 0.5)
        optimizer.step()
        velocity = 0.9 * velocity + 0.001 * length
        length -= 2.0 * velocity
        torch.testing.assert_close(weight.data, length * direction, rtol=1e-14, atol=0)
        torch.testing.assert_close(bias.data, torch.full_like(bias, expected_bias), rtol=1e-14, atol=1e-15)


def test_lars_leaves_a_gradient_as_it_is_where_there_is_nothing_to_compare_it_with():
    weight = torch.nn.Parameter(torch.zeros(1, 2))
    weight.grad = torch.tensor([[1.0, 2.0]])
    LARS([weight], lr=0.5).step()
    assert weight.tolist() == [[-0.5, -1.0]]


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_a_step_on_collected_features_is_that_of_the_whole_batch(optimizer):
    generator = torch.Generator().manual_seed(0)
    features = 3 + 2 * torch.randn(64, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (64,), generator=generator)
    protocol = Protocol.resolve(64, optimizer=optimizer, batch_size=64)
    head = ProbeHead(5, 4).double()
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in head.classifiers[0].parameters())

    losses, _ = head.losses(torch.cat(features.split(8)), labels)
    losses.sum().backward()
    mean, variance = features.mean(dim=0), features.var(dim=0, unbiased=False)
    loss = F.cross_entropy((features - mean) / (variance + 1e-6).sqrt() @ weight.T + bias, labels)
    loss.backward()

    torch.testing.assert_close(losses, loss[None], rtol=1e-12, atol=0)
    torch.testing.assert_close(head.classifiers[0].weight.grad, weight.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(head.norm.running_mean, 0.1 * mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(head.norm.running_var, 0.9 + 0.1 * features.var(dim=0), rtol=1e-12, atol=0)
    before = head.classifiers[0].weight.detach().clone()
    stepper = make_optimizer(head, protocol)
    set_learning_rates(stepper, protocol, 0.5)
    stepper.step()
    assert stepper.param_groups[0]["lr"] == 0.5 * protocol.learning_rates[0]
    assert not torch.equal(before, head.classifiers[0].weight)


def test_the_test_sees_the_running_statistics_and_the_next_step_the_batchs_own_again():
    head = ProbeHead(3, 2)
    features = torch.randn(6, 3) + 10
    [scores] = head.scores(features, batch_size=4)
    expected = features / (1 + 1e-6) ** 0.5 @ head.classifiers[0].weight.T  # nothing has been seen yet
    torch.testing.assert_close(scores, expected.detach())
    assert head.training and head.norm.num_batches_tracked == 0


def test_the_protocol_is_the_papers_and_says_where_a_data_set_is_too_small_for_it():
    paper = Protocol.resolve(1_281_167)
    assert (paper.batch_size, paper.epochs, paper.warmup_epochs, paper.learning_rates) == (16_384, 90, 10, (6.4,))
    assert Protocol.resolve(1_281_167, optimizer="adamw").learning_rates == pytest.approx((6.4e-3,))
    plan = paper.plan(1_281_167, num_processes=8, per_device_batch_size=None)
    assert (plan.total_steps, plan.warmup_steps, plan.per_device_batch_size, plan.accumulation) == (7020, 780, 256, 8)
    assert plan.learning_rate_at(779) == 6.4 and plan.learning_rate_at(7019) < 1e-4
    small = Protocol.resolve(9_469)
    assert small.batch_size == 9_216 and small.learning_rates == (3.6,)
    assert "the paper's is 16,384" in small.stamp(small.plan(9_469, 1, None))["batch"]
    assert "the paper's" not in paper.stamp(plan)["batch"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(optimizer="sgd"), "must be one of lars, adamw"),
        (dict(batch_size=200), "at most the 100 of the training set"),
        (dict(learning_rates=[1.0, 1.0]), "positive and different"),
        (dict(epochs=5, warmup_epochs=6), "warmup_epochs=6 must|must be at least 1, warmup_epochs=6"),
    ],
)
def test_a_protocol_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(RunError, match=message):
        Protocol.resolve(100, **options)


# ---- its loader


def batches_of(source, decoded_bytes=0, **layout) -> list[dict]:
    """All that the processes of a layout see, in the order of the steps and processes."""
    world_size = layout.pop("world_size", 1)
    told = dict(image_size=12, global_batch_size=16, num_steps=6, seed=3, decoded_bytes=decoded_bytes, progress=False)

    def augment(pixels, generator):
        return pixels ^ generator.integers(0, 8, pixels.shape, dtype=np.uint8)

    loaders = [
        labelled_loader(source, augment=augment, rank=rank, world_size=world_size, **told, **layout)
        for rank in range(world_size)
    ]
    micro = 16 // layout["micro_batch_size"] // world_size
    parts = [list(loader) for loader in loaders]
    return [part for step in range(6) for rank in parts for part in rank[step * micro : (step + 1) * micro]]


@pytest.mark.parametrize(
    "layout",
    [
        dict(micro_batch_size=4),
        dict(micro_batch_size=4, world_size=2),
        dict(micro_batch_size=16, num_workers=2),
        dict(micro_batch_size=8, decoded_bytes=10**6),
        dict(micro_batch_size=8, decoded_bytes=10**4),  # a part of the images
    ],
)
def test_labelled_images_are_the_same_whatever_the_layout_and_however_they_are_kept(files, layout):
    source = load_images(files / "images")
    whole, parts = batches_of(source, micro_batch_size=16), batches_of(source, **layout)
    for key in ("pixel_values", "labels", "sample_ids"):
        assert torch.equal(torch.cat([one[key] for one in whole]), torch.cat([one[key] for one in parts]))
    first, again = whole[0], whole[3]  # of the first epoch, and of the second
    assert first["pixel_values"].dtype == torch.uint8 and not torch.equal(first["sample_ids"], again["sample_ids"])
    assert torch.equal(first["labels"], first["sample_ids"] % 3)


def test_an_augmentation_draws_from_a_stream_of_its_own(files):
    source, told = load_images(files / "images"), dict(image_size=12, micro_batch_size=16, num_steps=1)
    [plain] = labelled_loader(source, global_batch_size=16, **told)
    [drawn] = labelled_loader(source, global_batch_size=16, augment=lambda pixels, generator: pixels, **told)
    assert torch.equal(plain["pixel_values"], drawn["pixel_values"])


# ---- the run


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory) -> tuple[Path, dict]:
    """The folder and the result of an undisturbed probe."""
    folder = tmp_path_factory.mktemp("straight") / "probe"
    return folder, probe(files, folder, output=folder.parent / "out.json", ledger=folder.parent / "ledger.jsonl")


def test_a_result_is_complete(straight):
    folder, row = straight
    assert row["task"] == "full_linear_probe" and row["dim"] == 32 and row["floors"] == {}
    assert 0 <= row["top1"] <= 100 and row["best_top1"] == row["top1"]
    protocol = row["protocol"]
    assert protocol["train"]["images"] == 52 and protocol["test"]["images"] == 20
    assert protocol["features"]["noise"] == "clean" and protocol["features"]["layer"] == "last"
    probe = protocol["full_linear_probe"]
    assert (probe["epochs"], probe["batch_size"], probe["steps"], probe["seed"]) == (EPOCHS, 16, STEPS, 0)
    assert probe["optimizer"].startswith("LARS") and "0.08...1" in probe["augmentation"]
    steps = [line for line in lines(folder) if "loss" in line]
    tests = [line for line in lines(folder) if "test_top1" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["step"] for line in tests] == [3, 6, 9] and tests[-1]["test_top1"] == row["top1"]
    [kept] = lines(folder.parent, "ledger.jsonl")
    assert kept == row == json.loads((folder.parent / "out.json").read_text())


def test_the_same_command_again_gives_the_finished_result_and_does_nothing(files, straight):
    folder, row = straight
    before = (folder / "sessions.jsonl").read_bytes()
    assert probe(files, folder, ledger=folder.parent / "ledger.jsonl") == row
    assert (folder / "sessions.jsonl").read_bytes() == before and len(lines(folder.parent, "ledger.jsonl")) == 1


def test_a_finished_result_still_goes_where_it_is_asked_for(files, straight, tmp_path):
    folder, row = straight
    output, ledger = tmp_path / "late" / "out.json", tmp_path / "late.jsonl"
    for _ in range(2):
        assert probe(files, folder, output=output, ledger=ledger) == row
    assert json.loads(output.read_text()) == row and lines(tmp_path, "late.jsonl") == [row]


@pytest.mark.parametrize("options", [{}, dict(optimizer="adamw", noise="fresh")], ids=["lars", "adamw"])
def test_a_resumed_probe_is_the_undisturbed_one_to_the_last_bit(files, straight, tmp_path, options):
    whole, row = straight
    if options:
        whole, row = tmp_path / "whole", probe(files, tmp_path / "whole", **options)
    assert probe(files, tmp_path / "parts", max_steps=4, **options) is None
    assert probe(files, tmp_path / "parts", num_workers=1, **options)["top1"] == row["top1"]
    assert_equal(trained(tmp_path / "parts"), trained(whole))
    one, other = ([line["loss"] for line in lines(folder) if "loss" in line] for folder in (tmp_path / "parts", whole))
    assert one == other


def test_a_signal_stops_it_within_a_step_and_nothing_is_lost(files, straight, tmp_path):
    folder, options = tmp_path / "probe", dict(epochs=EPOCHS, batch_size=16, per_device_batch_size=1, num_workers=0)
    child = Child(
        lambda: run_full_probe(files / "encoder", files / "images", output_dir=folder, cache_dir=None, **options)
    )
    log = folder / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.01)
    os.kill(child.process.pid, signal.SIGTERM)
    with pytest.raises(Interrupted) as interrupted:
        child.join()
    assert interrupted.value.code == 75
    steps = [line["step"] for line in lines(folder) if "loss" in line]
    assert checkpoints(folder / "checkpoints")[-1].name == f"step-{steps[-1]:08d}" and steps[-1] < STEPS
    again = probe(files, folder, per_device_batch_size=1)
    assert again["top1"] == straight[1]["top1"]
    assert len([line for line in lines(folder) if "loss" in line]) == STEPS


def test_a_probe_whose_running_statistics_are_still_their_start_is_warned_of():
    short, whole = (Protocol.resolve(9469, epochs=epochs) for epochs in (3, 90))  # a step an epoch
    assert short.lines(short.plan(9469, 1, None))[-1].startswith("warning: after 3 steps 73%")
    assert "warning" not in whole.lines(whole.plan(9469, 1, None))[-1]
    norm = ProbeHead(4, 2).norm
    for _ in range(3):
        norm(torch.full((8, 4), 10.0))
    assert torch.allclose(norm.running_mean, torch.full((4,), 10 * (1 - 0.9**3)))


@pytest.mark.slow
def test_two_processes_are_one(files, straight, tmp_path):
    row = probe(files, tmp_path / "two", processes=2)
    assert row["top1"] == straight[1]["top1"]
    assert_equal(trained(tmp_path / "two"), trained(straight[0]))


def test_another_learning_rate_beside_it_changes_nothing(files, straight, tmp_path):
    rate = straight[1]["protocol"]["full_linear_probe"]["learning_rates"][0]
    row = probe(files, tmp_path / "rates", learning_rates=[rate, 100.0])
    assert row["top1"] == straight[1]["top1"] and [one["learning_rate"] for one in row["learning_rates"]] == [rate, 100]
    assert row["best_top1"] == max(one["top1"] for one in row["learning_rates"])
    together = trained(tmp_path / "rates")
    alone = trained(straight[0])
    assert_equal({name: together[name] for name in alone}, alone)


def test_a_floor_stands_in_the_encoders_place(files, tmp_path):
    row = probe(files, tmp_path / "floor", floor="pixels", optimizer="adamw", learning_rates=[0.1])
    assert row["name"] == "raw pixels" and row["dim"] == 3 * 16 * 16 and row["recipe"] is None
    assert row["protocol"]["features"]["floor"] == "raw pixels" and row["top1"] > 60  # the class is a colour


def test_a_folder_is_kept_from_another_probe(files, straight, tmp_path):
    with pytest.raises(RunError, match="full_linear_probe.optimizer='lars', not 'adamw'"):
        probe(files, straight[0], optimizer="adamw")
    with pytest.raises(RunError, match="features.noise='clean', not 'fresh"):
        probe(files, straight[0], noise="fresh")
    shutil.copytree(files / "images", tmp_path / "other")  # as many images in splits of the same names
    options = dict(output_dir=straight[0], epochs=EPOCHS, batch_size=16, num_workers=0, cache_dir=None)
    with pytest.raises(RunError, match="train.dataset='images', not 'other'"):
        Child(lambda: run_full_probe(files / "encoder", tmp_path / "other", **options)).join()


def test_the_stamp_gives_the_number_again(files, straight, tmp_path):
    words = shlex.split(straight[1]["rerun"])
    assert words[:2] == ["ldae", "full-probe"]

    def again():
        result = CliRunner().invoke(app, [*words[1:], "--output-dir", str(tmp_path / "again")])
        return result.exit_code, result.output

    code, output = Child(again).join()
    assert code == 0, output
    assert_equal(trained(tmp_path / "again"), trained(straight[0]))
