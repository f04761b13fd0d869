"""From a recipe to learning rate, steps and accumulation; AdamW and EMA."""

import pytest
import torch
from torch import nn

from ldae_hf.recipes import load_recipe
from ldae_hf.training.optimization import ExponentialMovingAverage, Plan, adamw


IMAGENET = 1_281_167


def plan(num_images=1000, processes=1, per_device=None, **train) -> Plan:
    settings = dict(global_batch_size=100, epochs=10, warmup_epochs=2, base_learning_rate=1e-3) | train
    recipe = load_recipe("l_dae", overrides=[f"train.{key}={value}" for key, value in settings.items()])
    return Plan.derive(recipe, num_images, processes, per_device)


# ---- the plan


def test_the_papers_recipe_on_imagenet_gives_the_papers_numbers():
    found = Plan.derive(load_recipe("l_dae"), IMAGENET, 8, None)
    assert found.learning_rate == pytest.approx(8e-4)
    assert (found.steps_per_epoch, found.warmup_steps, found.total_steps) == (625, 62_500, 250_000)
    assert (found.per_device_batch_size, found.accumulation, found.ema_decay) == (256, 1, None)


def test_the_learning_rate_warms_up_linearly_and_then_falls_as_half_a_cosine_to_zero():
    found = plan()
    rates = [found.learning_rate_at(step) / found.learning_rate for step in range(found.total_steps + 1)]
    assert found.learning_rate == pytest.approx(1e-3 * 100 / 256)
    assert (found.warmup_steps, found.total_steps) == (20, 100)
    assert rates[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert rates[20] == 1 and rates[60] == pytest.approx(0.5) and rates[100] == pytest.approx(0)
    assert all(later < earlier for earlier, later in zip(rates[20:], rates[21:], strict=False))


@pytest.mark.parametrize("warmup, first", [(0, 1.0), (10, 0.01)])
def test_a_run_without_warm_up_or_with_nothing_else_has_a_learning_rate_at_every_step(warmup, first):
    found = plan(warmup_epochs=warmup)
    rates = [found.learning_rate_at(step) / found.learning_rate for step in range(found.total_steps)]
    assert rates[0] == pytest.approx(first) and max(rates) == 1 and min(rates) > 0


@pytest.mark.parametrize(
    "batch, processes, per_device, expected",
    [
        (2048, 1, None, (256, 8)),  # the largest divisor that is at most 256
        (2048, 16, None, (128, 1)),
        (96, 1, None, (96, 1)),
        (300, 1, None, (150, 2)),
        (96, 2, 16, (16, 3)),
    ],
)
def test_accumulation_makes_up_the_global_batch(batch, processes, per_device, expected):
    found = plan(5000, processes, per_device, global_batch_size=batch)
    assert (found.per_device_batch_size, found.accumulation) == expected
    assert found.per_device_batch_size * found.accumulation * processes == batch


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_images=99), "needs 100 images for one step but the data set has 99"),
        (dict(processes=3), "100 does not split over 3 processes"),
        (dict(per_device=40), "40 does not divide the 100 images"),
        (dict(per_device=30, processes=2), "30 does not divide the 50 images that each of 2 processes"),
        (dict(per_device=0), "0 does not divide"),
        (dict(per_device=-4), "-4 does not divide"),
    ],
)
def test_a_batch_that_cannot_be_is_an_error_that_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(**arguments)


def test_the_plan_in_words_names_what_was_derived():
    words = "\n".join(plan(processes=2, per_device=25, ema_half_life_epochs=1).lines())
    for part in (
        "images 1,000",
        "10 steps an epoch",
        "100 steps in all",
        "25 images x 2",
        "0.000391",
        "warm-up 20 steps",
    ):
        assert part in words
    assert "decay 0.933033" in words


# ---- AdamW and EMA


def test_weight_decay_touches_matrices_only_and_the_betas_are_the_recipes():
    recipe = load_recipe("l_dae", overrides=["train.weight_decay=0.5", "train.betas=[0.8, 0.95]"])
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizer = adamw(model, recipe.train["betas"], recipe.train["weight_decay"])
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.95)
        group["lr"] = 0.1
    optimizer.step()
    for parameter in model.parameters():
        decayed = 1 - 0.1 * 0.5 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, decayed))


def test_the_ema_halves_what_is_left_of_the_start_in_its_half_life():
    found = plan(ema_half_life_epochs=0.7)
    assert found.ema_decay ** (0.7 * found.steps_per_epoch) == pytest.approx(0.5)
    # What the recipes' comment says: 0.9999 on ImageNet is a half-life of 11.0 epochs.
    imagenet = Plan.derive(load_recipe("l_dae", overrides=["train.ema_half_life_epochs=11.0"]), IMAGENET, 8, None)
    assert imagenet.ema_decay == pytest.approx(0.9999, abs=1e-6)


def test_the_ema_is_the_weighted_mean_of_all_parameters_in_fp32():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    values = [1.0, 2.0, 4.0, 3.0]
    with torch.no_grad():
        model.weight.fill_(values[0])
        ema = ExponentialMovingAverage(model, decay=0.999)
        for value in values[1:]:
            model.weight.fill_(value)
            ema.update(model)
    expected = 0.999**3 * 1 + 0.001 * (0.999**2 * 2 + 0.999 * 4 + 3)
    assert ema.average["weight"].dtype == torch.float32
    assert ema.average["weight"].item() == pytest.approx(expected, rel=1e-6)  # bf16 would still say 1


def test_the_ema_stands_in_for_the_parameters_and_gives_them_back_even_after_an_error():
    model = nn.Linear(2, 2)
    ema = ExponentialMovingAverage(model, decay=0.5)
    average = {name: value.clone() for name, value in ema.average.items()}
    with torch.no_grad():
        model.weight += 1
    own = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        with ema.in_place_of_parameters(model):
            assert all(torch.equal(value, average[name]) for name, value in model.named_parameters())
            raise KeyboardInterrupt
    assert all(torch.equal(value, own[name]) for name, value in model.named_parameters())
