"""The (gamma, sigma) tables and the module that holds one inside a model."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from ldae_hf.noise_schedules import (
    SCHEDULES,
    NoiseSchedule,
    clean_target_weight,
    noise_schedule_tables,
    snr_weight,
)


LEVELS = 1000
VARIANCE_PRESERVING = ("ddpm_linear", "linear_gamma_squared")
UNSCALED_SIGNAL = ("linear_sigma", "single_level", "snr_matched_sigma")
MANY_LEVELS = (*VARIANCE_PRESERVING, "linear_sigma", "snr_matched_sigma", "interpolative")


def test_every_schedule_is_under_one_of_the_laws():
    assert {*VARIANCE_PRESERVING, *UNSCALED_SIGNAL, "interpolative"} == set(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_are_float64_on_the_cpu_even_where_a_model_is_built_on_meta(name):
    with torch.device("meta"):
        tables = noise_schedule_tables(name, LEVELS)
    length = 1 if name == "single_level" else LEVELS
    assert all(table.dtype == torch.float64 and table.device.type == "cpu" for table in tables)
    assert all(table.shape == (length,) and table.isfinite().all() for table in tables)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
@pytest.mark.parametrize("levels", [10, LEVELS])
def test_gamma_squared_and_sigma_squared_add_up_to_one(name, levels):
    gammas, sigmas = noise_schedule_tables(name, levels)
    torch.testing.assert_close(gammas**2 + sigmas**2, torch.ones_like(gammas), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", UNSCALED_SIGNAL)
def test_the_signal_is_never_scaled(name):
    gammas, _ = noise_schedule_tables(name, LEVELS)
    assert torch.equal(gammas, torch.ones_like(gammas))


@pytest.mark.parametrize("name", MANY_LEVELS)
def test_signal_to_noise_falls_at_every_level(name):
    gammas, sigmas = noise_schedule_tables(name, LEVELS)
    if name == "snr_matched_sigma":  # its last level repeats the one before
        gammas, sigmas = gammas[:-1], sigmas[:-1]
    assert ((gammas / sigmas).diff() < 0).all()
    assert (clean_target_weight(gammas, sigmas).diff() < 0).all()


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("linear_gamma_squared", (0.999**0.5, 0.001**0.5), (0.0, 1.0)),
        ("linear_sigma", (1.0, 0.0), (1.0, 2**0.5)),
        ("single_level", (1.0, (1 / 3) ** 0.5), (1.0, (1 / 3) ** 0.5)),
        ("snr_matched_sigma", (1.0, (1 / 999) ** 0.5), (1.0, 999**0.5)),
        ("interpolative", (1.0, 0.0), (0.0, 3.0)),
        ("ddpm_linear", (0.9999**0.5, 0.0001**0.5), (0.00635282, 0.99997982)),
    ],
)
def test_the_ends_of_the_tables_have_the_papers_values(name, first, last):
    gammas, sigmas = noise_schedule_tables(name, LEVELS)
    assert (gammas[0].item(), sigmas[0].item()) == pytest.approx(first, rel=1e-12, abs=0)
    assert (gammas[-1].item(), sigmas[-1].item()) == pytest.approx(last, rel=1e-6, abs=0)


def test_linear_schedules_are_linear():
    t = torch.arange(LEVELS, dtype=torch.float64)
    gammas, _ = noise_schedule_tables("linear_gamma_squared", LEVELS)
    torch.testing.assert_close(gammas**2, 1 - (t + 1) / LEVELS, rtol=0, atol=1e-15)
    _, sigmas = noise_schedule_tables("linear_sigma", LEVELS)
    torch.testing.assert_close(sigmas, 2**0.5 * t / (LEVELS - 1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("levels", [2, 10, LEVELS])
def test_interpolative_noise_goes_from_the_tokens_to_three_times_the_noise_on_a_straight_line(levels):
    gammas, sigmas = noise_schedule_tables("interpolative", levels)
    torch.testing.assert_close(gammas + sigmas / 3, torch.ones_like(gammas), rtol=0, atol=1e-15)
    torch.testing.assert_close(sigmas.diff(), torch.full_like(sigmas[1:], 3 / (levels - 1)), rtol=0, atol=1e-12)
    tokens, noise = torch.randn(2, 1, 4, 5, generator=torch.Generator().manual_seed(0)).unbind()
    schedule = NoiseSchedule("interpolative", levels)
    assert torch.equal(schedule.add_noise(tokens, noise, torch.tensor([0])), tokens)
    assert torch.equal(schedule.add_noise(tokens, noise, torch.tensor([levels - 1])), 3 * noise)


def test_the_loss_weight_of_interpolative_noise_falls_from_one_to_nothing_and_its_mean_tends_to_an_integral():
    weights = clean_target_weight(*noise_schedule_tables("interpolative", 100_001))
    assert (weights[0], weights[-1]) == (1, 0)
    # (1-x)² / ((1-x)² + 9x²), integrated over 0 ... 1 by Simpson's rule
    x = torch.linspace(0, 1, 2001, dtype=torch.float64)
    values = (1 - x) ** 2 / ((1 - x) ** 2 + 9 * x**2)
    simpson = (values[0] + 4 * values[1::2].sum() + 2 * values[2:-1:2].sum() + values[-1]) / 6000
    assert weights.mean().item() == pytest.approx(simpson.item(), abs=1e-5)


def test_snr_matched_sigma_has_the_ratios_and_the_loss_weights_of_linear_gamma_squared():
    gammas, sigmas = noise_schedule_tables("linear_gamma_squared", LEVELS)
    unscaled = noise_schedule_tables("snr_matched_sigma", LEVELS)
    expected = ((1 - gammas**2) / gammas**2).sqrt()[:-1]
    torch.testing.assert_close(unscaled[1], torch.cat([expected, expected[-1:]]), rtol=1e-12, atol=0)
    for weight in (clean_target_weight, snr_weight):
        torch.testing.assert_close(weight(*unscaled)[:-1], weight(gammas, sigmas)[:-1], rtol=1e-12, atol=0)


def test_the_largest_sigma_of_linear_sigma_can_be_chosen_and_stretches_its_table():
    _, sigmas = noise_schedule_tables("linear_sigma", LEVELS)
    gammas, stretched = noise_schedule_tables("linear_sigma", LEVELS, sigma_max=4.8 * 2**0.5)
    torch.testing.assert_close(stretched, 4.8 * sigmas, rtol=1e-12, atol=0)
    assert torch.equal(gammas, torch.ones_like(gammas))
    assert torch.equal(NoiseSchedule("linear_sigma", LEVELS, 4.8 * 2**0.5).sigmas, stretched.float())


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "linear_sigma"])
def test_a_schedule_without_a_largest_sigma_to_choose_refuses_one(name):
    with pytest.raises(ValueError, match=f"^sigma_max=2 is for the noise schedule 'linear_sigma', not '{name}'.$"):
        noise_schedule_tables(name, LEVELS, sigma_max=2)


def test_ddpm_linear_is_the_table_of_diffusers():
    gammas, _ = noise_schedule_tables("ddpm_linear", LEVELS)
    reference = DDPMScheduler(num_train_timesteps=LEVELS).alphas_cumprod  # a product in float32
    torch.testing.assert_close((gammas**2).float(), reference, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_the_loss_weight_is_gamma_squared_where_variance_is_preserved(name):
    gammas, sigmas = noise_schedule_tables(name, LEVELS)
    torch.testing.assert_close(clean_target_weight(gammas, sigmas), gammas**2, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", UNSCALED_SIGNAL)
def test_the_loss_weight_is_one_over_one_plus_sigma_squared_where_the_signal_is_not_scaled(name):
    gammas, sigmas = noise_schedule_tables(name, LEVELS)
    torch.testing.assert_close(clean_target_weight(gammas, sigmas), 1 / (1 + sigmas**2), rtol=1e-14, atol=0)


def test_the_loss_weight_does_not_change_with_the_scale_of_signal_and_noise():
    gammas, sigmas = noise_schedule_tables("linear_sigma", LEVELS)
    twin = 1 / (1 + sigmas**2).sqrt()  # the variance-preserving table of the same signal-to-noise ratios
    torch.testing.assert_close(clean_target_weight(twin, twin * sigmas), clean_target_weight(gammas, sigmas))


@pytest.mark.parametrize(("levels", "tolerance"), [(LEVELS, 3e-4), (1_000_000, 3e-7)])
def test_the_mean_loss_weight_of_linear_sigma_tends_to_its_integral(levels, tolerance):
    weights = clean_target_weight(*noise_schedule_tables("linear_sigma", levels))
    assert weights.mean().item() == pytest.approx(math.atan(2**0.5) / 2**0.5, abs=tolerance)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_weight_by_signal_to_noise_is_the_ratio_itself(name):
    gammas, sigmas = noise_schedule_tables(name, LEVELS)
    share = clean_target_weight(gammas, sigmas)
    kept = share < 1  # at sigma = 0 it is infinite
    torch.testing.assert_close(snr_weight(gammas, sigmas)[kept], (share / (1 - share))[kept], rtol=1e-9, atol=0)


def test_an_unknown_schedule_is_refused_with_the_names_of_the_known_ones():
    with pytest.raises(ValueError, match="no noise schedule 'cosine'; the schedules are ddpm_linear, linear_gamma"):
        noise_schedule_tables("cosine", LEVELS)


@pytest.mark.parametrize("levels", [0, -1])
def test_a_schedule_without_levels_is_refused(levels):
    with pytest.raises(ValueError, match=f"num_train_timesteps={levels} must be at least 1"):
        noise_schedule_tables("linear_sigma", levels)


# ------------------------------------------------------------------------------------------------- inside a model


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_tables_travel_with_the_weights_in_float32(name):
    state = NoiseSchedule(name, LEVELS).state_dict()
    for key, table in zip(("gammas", "sigmas"), noise_schedule_tables(name, LEVELS), strict=True):
        assert torch.equal(state.pop(key), table.float())
    assert not state


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_is_added_as_in_equation_1_to_each_sample_at_its_own_level(name):
    schedule = NoiseSchedule(name, LEVELS)
    generator = torch.Generator().manual_seed(0)
    tokens, noise = (torch.randn(3, 4, 5, generator=generator) for _ in range(2))
    timesteps = torch.randint(len(schedule), (3,), generator=generator)
    noisy = schedule.add_noise(tokens, noise, timesteps)
    gammas, sigmas = noise_schedule_tables(name, LEVELS)
    for index, t in enumerate(timesteps):
        expected = gammas[t] * tokens[index].double() + sigmas[t] * noise[index].double()
        torch.testing.assert_close(noisy[index].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_is_added_to_each_token_at_its_own_level_where_tokens_have_timesteps(name):
    schedule = NoiseSchedule(name, LEVELS)
    generator = torch.Generator().manual_seed(0)
    tokens, noise = (torch.randn(3, 4, 5, generator=generator) for _ in range(2))
    timesteps = torch.randint(len(schedule), (3, 4), generator=generator)
    noisy = schedule.add_noise(tokens, noise, timesteps)
    for token in range(4):
        one = slice(token, token + 1)
        expected = schedule.add_noise(tokens[:, one], noise[:, one], timesteps[:, token])
        assert torch.equal(noisy[:, one], expected)
    assert [level.shape for level in schedule.levels(timesteps)] == [(3, 4, 1)] * 2


def test_the_drawn_timesteps_of_tokens_are_uniform_and_independent():
    torch.manual_seed(0)
    timesteps, _ = NoiseSchedule("linear_sigma", 5, timestep_block=1).sample(torch.zeros(20_000, 2, 3))
    assert timesteps.shape == (20_000, 2)
    pairs = torch.bincount(5 * timesteps[:, 0] + timesteps[:, 1], minlength=25) / 20_000
    torch.testing.assert_close(pairs, torch.full((25,), 0.04), rtol=0, atol=0.006)


def test_the_tokens_of_a_block_share_a_timestep_and_blocks_are_independent():
    torch.manual_seed(0)
    schedule = NoiseSchedule("linear_sigma", 5, timestep_block=2)
    timesteps, _ = schedule.sample(torch.zeros(5_000, 16, 3), grid=(4, 4))
    blocks = timesteps.reshape(-1, 2, 2, 2, 2).transpose(2, 3).reshape(-1, 4, 4)  # (B, blocks, their tokens)
    assert (blocks == blocks[..., :1]).all()
    pairs = torch.bincount(5 * blocks[:, 0, 0] + blocks[:, 3, 0], minlength=25) / 5_000
    torch.testing.assert_close(pairs, torch.full((25,), 0.04), rtol=0, atol=0.012)


def test_blocks_of_a_grid_that_is_no_square_are_of_its_rows_and_columns():
    torch.manual_seed(0)
    schedule = NoiseSchedule("linear_sigma", LEVELS, timestep_block=2)
    timesteps, _ = schedule.sample(torch.zeros(2, 16, 3), grid=(2, 8))  # as many tokens as a square has
    columns = timesteps.reshape(2, 2, 8).transpose(1, 2).reshape(2, 4, 4)  # (B, blocks, their tokens)
    assert (columns == columns[..., :1]).all() and len(columns[..., 0].unique()) == 8
    for grid in ((3, 3), (4, 5), None):
        tokens = torch.zeros(2, 9 if grid is None else grid[0] * grid[1], 3)
        with pytest.raises(ValueError, match="patches do not fall into 2x2 blocks; give the timesteps"):
            schedule.sample(tokens, grid=grid)
        assert schedule.sample(tokens, timesteps=1, grid=grid)[0].tolist() == [1, 1]


def test_drawn_timesteps_are_uniform_over_all_levels_and_drawn_noise_is_standard_normal():
    torch.manual_seed(0)
    timesteps, noise = NoiseSchedule("linear_sigma", 5).sample(torch.zeros(20_000, 2, 3))
    frequencies = torch.bincount(timesteps, minlength=5) / 20_000
    torch.testing.assert_close(frequencies, torch.full((5,), 0.2), rtol=0, atol=0.015)
    assert noise.shape == (20_000, 2, 3)
    assert noise.mean().item() == pytest.approx(0, abs=0.015)
    assert noise.var().item() == pytest.approx(1, abs=0.02)


def test_a_given_timestep_and_given_noise_are_used_as_they_are():
    given = torch.randn(4, 2, 3)
    timesteps, noise = NoiseSchedule("linear_sigma", LEVELS).sample(torch.zeros(4, 2, 3), 7, given)
    assert timesteps.tolist() == [7, 7, 7, 7]
    assert torch.equal(noise, given)
    timesteps, _ = NoiseSchedule("linear_sigma", LEVELS).sample(torch.zeros(4, 2, 3), torch.tensor([0, 9, 3, 999]))
    assert timesteps.tolist() == [0, 9, 3, 999]


@pytest.mark.parametrize(
    ("name", "timesteps", "wrong", "last"),
    [
        ("linear_sigma", 1000, 1000, 999),
        ("linear_sigma", -1, -1, 999),
        ("linear_sigma", torch.tensor([0, 1005]), 1005, 999),
        ("linear_sigma", torch.tensor([-3, 5]), -3, 999),
        ("single_level", 1, 1, 0),
    ],
)
def test_a_timestep_outside_the_table_is_refused_by_name(name, timesteps, wrong, last):
    with pytest.raises(ValueError, match=rf"0 \.\.\. {last} for noise schedule '{name}', but {wrong} was asked for"):
        NoiseSchedule(name, LEVELS).sample(torch.zeros(2, 1, 1), timesteps)


@pytest.mark.parametrize("timesteps", [torch.tensor([0.5, 2]), torch.tensor([True, False]), 3.0])
def test_timesteps_that_are_no_integers_are_refused(timesteps):
    with pytest.raises(ValueError, match=r"Timesteps must be integers in 0 \.\.\. 999, not torch"):
        NoiseSchedule("linear_sigma", LEVELS).sample(torch.zeros(2, 1, 1), timesteps)


def test_as_many_timesteps_and_as_much_noise_as_images_are_asked_for():
    schedule, tokens = NoiseSchedule("linear_sigma", LEVELS), torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match="There are 3 timesteps for 2 images; give one, or one each"):
        schedule.sample(tokens, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="There are 6 timesteps for 2 images; give one, .* each of their 4 tokens"):
        schedule.sample(tokens, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"noise must be \(2, 4, 3\) as the tokens, not \(2, 1, 3\)"):
        schedule.add_noise(tokens, tokens[:, :1], torch.tensor([0, 1]))
