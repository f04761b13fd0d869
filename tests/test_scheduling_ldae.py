"""The scheduler against diffusers', against exact laws of Gaussian transitions, and against distributions whose best
denoiser is known."""

import json

import diffusers
import pytest
import torch

from ldae_hf import LDAEScheduler
from ldae_hf.noise_schedules import SCHEDULES, NoiseSchedule, noise_schedule_tables


SAMPLING_SCHEDULES = [name for name in SCHEDULES if name != "single_level"]
ENDING_WITHOUT_SIGNAL = ("linear_gamma_squared", "interpolative")  # gamma is 0 at the last level
SHAPES = [(2, 5, 3), (2, 3, 4, 4)]  # tokens (B,N,K) and images (B,C,H,W)


def network(sample, timestep):
    """A stand-in for a trained network: any smooth function of both arguments."""
    return torch.tanh(sample) * (0.5 + int(timestep) / 2000) + 0.1


def sample_with(scheduler, start, num_steps, model=network, seed=0, **step_arguments):
    """A whole sampling loop, as a user writes it."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(num_steps)
    sample = start
    for timestep in scheduler.timesteps:
        output = model(sample, timestep)
        sample = scheduler.step(output, timestep, sample, generator=generator, **step_arguments).prev_sample
    return sample


def ready(name="linear_sigma", num_steps=10, **settings):
    scheduler = LDAEScheduler(name, **settings)
    scheduler.set_timesteps(num_steps)
    return scheduler


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ----------------------------------------------------------------------------------------- references: diffusers

REFERENCES = {
    "DDPMScheduler": ({}, 1.0),
    "DDIMScheduler": ({"eta": 0.0}, 0.0),
    "DDIMScheduler half way to DDPM": ({"eta": 0.5}, 0.5),
}


def reference_scheduler(kind, prediction_type):
    return getattr(diffusers, kind.split()[0])(
        clip_sample=False, timestep_spacing="trailing", prediction_type=prediction_type
    )


@pytest.mark.parametrize("num_steps", [1, 50, 1000])
@pytest.mark.parametrize("prediction_type", ["sample", "epsilon"])
@pytest.mark.parametrize("kind", REFERENCES)
def test_ddpm_linear_samples_as_diffusers_does(kind, prediction_type, num_steps):
    step_arguments, eta = REFERENCES[kind]
    ours = LDAEScheduler("ddpm_linear", prediction_type=prediction_type)
    stock = reference_scheduler(kind, prediction_type)
    exact = reference_scheduler(kind, prediction_type)
    exact.alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
    start = normal(2, 5, 3)
    # Stock tables are products in float32. With a table in float64 what remains is DDPMScheduler's variance of at
    # least 1e-20, which it adds even on the way to the clean sample.
    expected = sample_with(exact, start, num_steps, **step_arguments)
    torch.testing.assert_close(sample_with(ours, start, num_steps, eta=eta), expected, rtol=1e-9, atol=1e-9)
    expected = sample_with(stock, start.float(), num_steps, **step_arguments)
    torch.testing.assert_close(sample_with(ours, start.float(), num_steps, eta=eta), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", REFERENCES)
def test_linear_sigma_samples_as_diffusers_does_on_its_variance_preserving_twin(kind):
    step_arguments, eta = REFERENCES[kind]
    twin = reference_scheduler(kind, "sample")
    gammas_squared = 1 / (1 + noise_schedule_tables("linear_sigma")[1] ** 2)
    twin.alphas_cumprod = gammas_squared
    start = normal(2, 5, 3)
    ours = sample_with(LDAEScheduler("linear_sigma"), start, 50, eta=eta)
    theirs = sample_with(
        twin,
        start * gammas_squared[-1].sqrt(),
        50,
        model=lambda sample, timestep: network(sample / gammas_squared[timestep].sqrt(), timestep),
        **step_arguments,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_steps", [1, 4, 50, 250, 300, 1000])
def test_timesteps_are_those_of_trailing_spacing(num_steps):
    reference = reference_scheduler("DDPMScheduler", "sample")
    reference.set_timesteps(num_steps)
    assert torch.equal(ready("ddpm_linear", num_steps).timesteps, reference.timesteps)


@pytest.mark.parametrize("name", SAMPLING_SCHEDULES)
def test_every_number_of_steps_gives_that_many_falling_timesteps(name):
    levels = 200
    scheduler = LDAEScheduler(name, num_train_timesteps=levels)
    last = levels - 2 if name in ENDING_WITHOUT_SIGNAL else levels - 1  # the last level with gamma > 0
    for num_steps in range(1, last + 2):
        scheduler.set_timesteps(num_steps)
        timesteps = scheduler.timesteps
        assert timesteps.dtype == torch.int64 and len(timesteps) == num_steps
        assert timesteps[0] == last and timesteps[-1] >= 0 and (timesteps.diff() < 0).all()
    assert timesteps[-1] == 0


# -------------------------------------------------------------------------------------------------- laws of a step


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SAMPLING_SCHEDULES)
def test_a_deterministic_step_of_a_perfect_model_lands_on_the_same_noise_at_the_next_level(name, shape):
    scheduler = ready(name)
    clean, noise = normal(*shape, seed=1), normal(*shape, seed=2)
    for timestep, following in zip(scheduler.timesteps[:-1], scheduler.timesteps[1:], strict=True):
        sample = scheduler.add_noise(clean, noise, int(timestep))
        stepped = scheduler.step(clean, timestep, sample, eta=0).prev_sample
        torch.testing.assert_close(stepped, scheduler.add_noise(clean, noise, int(following)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLING_SCHEDULES)
def test_an_ancestral_step_is_the_posterior_of_the_forward_chain(name):
    scheduler = ready(name, 7)
    gammas, sigmas = noise_schedule_tables(name)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    path = scheduler.timesteps.tolist()
    for t, s in zip(path[:-1], path[1:], strict=True):

        def step(clean, sample, t=t):
            return scheduler.step(clean, t, sample, generator=torch.Generator().manual_seed(0)).prev_sample

        noise = normal(1, seed=0)
        from_noise = step(zero, zero) / noise  # the standard deviation c
        from_sample = step(zero, one) - step(zero, zero)
        from_clean = step(one, zero) - step(zero, zero)
        # Bayes' rule on z_s ~ N(gamma_s z_0, sigma_s²) and z_t | z_s ~ N(a z_s, b²), a = gamma_t / gamma_s.
        a = gammas[t] / gammas[s]
        b_squared = sigmas[t] ** 2 - a**2 * sigmas[s] ** 2
        variance = 1 / (1 / sigmas[s] ** 2 + a**2 / b_squared)
        expected = torch.stack([variance.sqrt(), variance * a / b_squared, variance * gammas[s] / sigmas[s] ** 2])
        torch.testing.assert_close(torch.cat([from_noise, from_sample, from_clean]), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("eta", [0, 0.3, 1])
@pytest.mark.parametrize("name", SAMPLING_SCHEDULES)
def test_predicting_the_clean_sample_or_the_noise_is_the_same_step(name, eta):
    timestep = int(ready(name).timesteps[3])
    sample, clean = normal(2, 5, 3, seed=1), normal(2, 5, 3, seed=2)
    gamma, sigma = (table[timestep] for table in noise_schedule_tables(name))
    outputs = [
        ready(name, prediction_type=prediction_type).step(
            answer, timestep, sample, eta=eta, generator=torch.Generator().manual_seed(0)
        )
        for prediction_type, answer in (("sample", clean), ("epsilon", (sample - gamma * clean) / sigma))
    ]
    torch.testing.assert_close(outputs[0].prev_sample, outputs[1].prev_sample, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(outputs[0].pred_original_sample, outputs[1].pred_original_sample, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_steps", [1, 10, 999])
@pytest.mark.parametrize("name", SAMPLING_SCHEDULES)
def test_the_last_step_returns_the_predicted_clean_sample_and_draws_no_noise(name, num_steps):
    scheduler, generator = ready(name, num_steps), torch.Generator().manual_seed(0)
    before = generator.get_state()
    answer = normal(2, 5, 3, seed=1)
    output = scheduler.step(answer, scheduler.timesteps[-1], normal(2, 5, 3, seed=2), generator=generator)
    assert torch.equal(output.prev_sample, answer)
    assert torch.equal(output.pred_original_sample, answer)
    assert torch.equal(generator.get_state(), before)


# The first goes down to a level without noise, the second begins with two levels that are equal.
@pytest.mark.parametrize("name", ["linear_sigma", "snr_matched_sigma"])
def test_sampling_goes_through_all_levels(name):
    for eta in (0, 1):
        sample = sample_with(LDAEScheduler(name, 50), normal(2, 5, 3), 50, eta=eta)
        assert sample.isfinite().all()


# --------------------------------------------------------------------------- distributions with a known denoiser


@pytest.mark.parametrize("name", SAMPLING_SCHEDULES)
def test_sampling_starts_with_the_variance_of_the_last_level_that_holds_signal(name):
    scheduler = ready(name)
    gammas, sigmas = noise_schedule_tables(name)
    last = 998 if name in ENDING_WITHOUT_SIGNAL else 999
    assert scheduler.timesteps[0] == last
    assert scheduler.init_noise_sigma == pytest.approx((gammas[last] ** 2 + sigmas[last] ** 2).item() ** 0.5)
    expected = {"linear_sigma": 3**0.5, "snr_matched_sigma": 1000**0.5}
    expected |= {"interpolative": (1 + (3 * 998) ** 2) ** 0.5 / 999}
    expected = expected.get(name, 1)
    assert scheduler.init_noise_sigma == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", SAMPLING_SCHEDULES)
def test_unit_gaussian_data_come_back_with_their_standard_deviation_without_any_draw(name):
    gammas, sigmas = noise_schedule_tables(name)

    def best_denoiser(sample, t):
        return gammas[t] / (gammas[t] ** 2 + sigmas[t] ** 2) * sample

    scheduler = LDAEScheduler(name)
    start = torch.full((1, 1), scheduler.init_noise_sigma, dtype=torch.float64)
    errors = [abs(sample_with(scheduler, start, n, best_denoiser, eta=0).item() - 1) for n in (100, 400)]
    assert errors[0] < 0.03
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("eta", [0, 1])
# Of the strong noise of `interpolative` each step takes away more, so that it needs more of them.
@pytest.mark.parametrize(
    ("name", "steps"), [("linear_sigma", 100), ("linear_gamma_squared", 100), ("interpolative", 400)]
)
def test_the_best_denoiser_of_two_unequal_components_recovers_their_moments(name, steps, eta):
    # Mean 0, variance 1, third moment 0.768: the last is 0 for every Gaussian.
    weights, centres = torch.tensor([0.2, 0.8]).double(), torch.tensor([1.6, -0.4]).double()
    spread, count = 0.6, 40_000
    gammas, sigmas = noise_schedule_tables(name)

    def best_denoiser(sample, t):
        variance = gammas[t] ** 2 * spread**2 + sigmas[t] ** 2
        offsets = sample - gammas[t] * centres
        posterior = (weights.log() - offsets**2 / (2 * variance)).softmax(dim=-1)
        means = centres + gammas[t] * spread**2 / variance * offsets
        return (posterior * means).sum(dim=-1, keepdim=True)

    chosen = torch.multinomial(weights, count, replacement=True, generator=torch.Generator().manual_seed(1))
    data = (centres[chosen] + spread * normal(count, seed=2))[:, None]
    scheduler = ready(name)
    start = scheduler.add_noise(data, normal(count, 1, seed=3), int(scheduler.timesteps[0]))
    sampled = sample_with(scheduler, start, steps, best_denoiser, seed=4, eta=eta)
    assert sampled.mean().item() == pytest.approx(0, abs=0.03)
    assert sampled.var().item() == pytest.approx(1, abs=0.06)
    assert (sampled**3).mean().item() == pytest.approx(0.768, abs=0.1)
    assert (sampled > 0.6).double().mean().item() == pytest.approx((data > 0.6).double().mean().item(), abs=0.01)


# -------------------------------------------------------------------------------------- noise, weights, precision


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_is_added_as_in_equation_1_to_samples_of_any_rank(name, shape):
    scheduler = LDAEScheduler(name)
    clean, noise = normal(*shape, seed=1), normal(*shape, seed=2)
    timesteps = torch.tensor([len(scheduler) - 1, 0])
    noisy = scheduler.add_noise(clean, noise, timesteps)
    gammas, sigmas = noise_schedule_tables(name)
    for index, t in enumerate(timesteps):
        assert torch.equal(noisy[index], gammas[t] * clean[index] + sigmas[t] * noise[index])


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_scheduler_adds_the_noise_that_the_model_adds(name):
    scheduler, schedule = LDAEScheduler(name), NoiseSchedule(name, 1000)
    clean, noise = normal(4, 5, 3, dtype=torch.float32), normal(4, 5, 3, seed=1, dtype=torch.float32)
    timesteps = torch.tensor([0, 10, 500, 999]).clamp(max=len(schedule) - 1)
    assert torch.equal(scheduler.gammas, schedule.gammas) and torch.equal(scheduler.sigmas, schedule.sigmas)
    expected = schedule.add_noise(clean, noise, timesteps)
    assert torch.equal(scheduler.add_noise(clean, noise, timesteps), expected)


def test_the_loss_weight_is_lambda_for_clean_samples_and_one_for_noise():
    timesteps = torch.tensor([0, 999])
    torch.testing.assert_close(LDAEScheduler("linear_sigma").loss_weight(timesteps), torch.tensor([1, 1 / 3]))
    torch.testing.assert_close(LDAEScheduler("linear_gamma_squared").loss_weight(timesteps), torch.tensor([0.999, 0.0]))
    torch.testing.assert_close(LDAEScheduler("single_level").loss_weight(0), torch.tensor([0.75]))
    assert LDAEScheduler("linear_sigma", prediction_type="epsilon").loss_weight(timesteps).tolist() == [1, 1]


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_samples_are_rounded_only_once(dtype, prediction_type):
    scheduler = ready(prediction_type=prediction_type)
    sample, other = normal(2, 5, 3, seed=1).to(dtype), normal(2, 5, 3, seed=2).to(dtype)
    noisy = scheduler.add_noise(sample, other, torch.tensor([3, 800]))
    assert noisy.dtype == dtype
    assert torch.equal(noisy, scheduler.add_noise(sample.float(), other.float(), torch.tensor([3, 800])).to(dtype))
    for timestep in scheduler.timesteps:
        low, full = (
            scheduler.step(*arguments, generator=torch.Generator().manual_seed(0))
            for arguments in ((other, timestep, sample), (other.float(), timestep, sample.float()))
        )
        for key in ("prev_sample", "pred_original_sample"):
            assert low[key].dtype == dtype
            assert torch.equal(low[key], full[key].to(dtype))


def test_results_stay_on_the_device_of_the_samples():
    scheduler, sample = ready(), torch.zeros(2, 5, 3, device="meta")
    timestep = int(scheduler.timesteps[0])
    assert scheduler.add_noise(sample, sample, torch.zeros(2, dtype=torch.int64)).device.type == "meta"
    assert scheduler.step(sample, timestep, sample).prev_sample.device.type == "meta"
    assert scheduler.add_noise(torch.zeros(2, 1), torch.zeros(2, 1), 5).device.type == "cpu"
    assert scheduler.gammas.device.type == scheduler.sigmas.device.type == "cpu"


def test_a_scheduler_that_has_served_float32_samples_is_still_exact_for_float64():
    scheduler, clean, noise = LDAEScheduler(), normal(2, 5, 3, seed=1), normal(2, 5, 3, seed=2)
    scheduler.add_noise(clean.float(), noise.float(), 500)
    expected = clean + noise_schedule_tables("linear_sigma")[1][500] * noise
    assert torch.equal(scheduler.add_noise(clean, noise, 500), expected)


def test_the_generator_decides_the_noise_and_a_deterministic_step_draws_none():
    scheduler, start = LDAEScheduler(), normal(2, 5, 3)
    first = sample_with(scheduler, start, 5, seed=1)
    assert torch.equal(sample_with(scheduler, start, 5, seed=1), first)
    assert not torch.equal(sample_with(scheduler, start, 5, seed=2), first)
    deterministic = sample_with(scheduler, start, 5, seed=1, eta=0)
    assert torch.equal(sample_with(scheduler, start, 5, seed=2, eta=0), deterministic)


def test_one_generator_for_each_sample_makes_it_independent_of_its_batch():
    scheduler, sample = ready(), normal(2, 5, 3)
    timestep = scheduler.timesteps[0]
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    together = scheduler.step(network(sample, timestep), timestep, sample, generator=generators).prev_sample
    for index, seed in enumerate((1, 2)):
        alone = sample[index : index + 1]
        generator = torch.Generator().manual_seed(seed)
        expected = scheduler.step(network(alone, timestep), timestep, alone, generator=generator).prev_sample
        assert torch.equal(together[index : index + 1], expected)


def test_a_step_returns_a_named_output_or_a_tuple():
    scheduler, sample = ready(), normal(2, 5, 3)
    timestep = scheduler.timesteps[0]
    output = scheduler.step(network(sample, timestep), timestep, sample, eta=0)
    pair = scheduler.step(network(sample, timestep), timestep, sample, eta=0, return_dict=False)
    assert isinstance(pair, tuple) and len(pair) == 2
    assert torch.equal(pair[0], output.prev_sample) and torch.equal(pair[1], output.pred_original_sample)


def test_it_offers_what_a_diffusers_pipeline_asks_of_a_scheduler():
    scheduler, sample = LDAEScheduler("ddpm_linear", num_train_timesteps=20), normal(2, 5, 3)
    assert isinstance(scheduler, diffusers.SchedulerMixin) and scheduler.order == 1 and len(scheduler) == 20
    assert torch.equal(scheduler.scale_model_input(sample, 3), sample)
    assert scheduler.timesteps.tolist() == list(range(19, -1, -1))
    assert scheduler.compatibles == [LDAEScheduler]


# ------------------------------------------------------------------------------------------------------- save, load


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_saved_scheduler_comes_back_with_its_settings_and_tables(name, tmp_path):
    sigma_max = {"sigma_max": 6.5} if name == "linear_sigma" else {}
    saved = LDAEScheduler(name, num_train_timesteps=100, prediction_type="epsilon", **sigma_max)
    saved.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert {key: value for key, value in settings.items() if not key.startswith("_")} == {
        "noise_schedule": name,
        "num_train_timesteps": 100,
        "prediction_type": "epsilon",
        "sigma_max": sigma_max.get("sigma_max", 2**0.5),
    }
    for loaded in (LDAEScheduler.from_pretrained(tmp_path), LDAEScheduler.from_config(saved.config)):
        assert (loaded.config.noise_schedule, loaded.config.prediction_type) == (name, "epsilon")
        assert torch.equal(loaded.gammas, saved.gammas) and torch.equal(loaded.sigmas, saved.sigmas)
    changed = LDAEScheduler.from_pretrained(tmp_path, prediction_type="sample")
    assert changed.config.prediction_type == "sample" and len(changed) == len(saved)


def test_the_configuration_of_another_scheduler_is_refused():
    with pytest.raises(
        ValueError, match="takes noise_schedule, num_train_timesteps, prediction_type, sigma_max, but not beta_end"
    ):
        LDAEScheduler.from_config(diffusers.DDPMScheduler().config)


def test_a_misspelt_setting_is_refused_on_loading(tmp_path):
    LDAEScheduler().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="but not noise_scedule"):
        LDAEScheduler.from_pretrained(tmp_path, noise_scedule="ddpm_linear")


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_schedule": "cosine"}, "no noise schedule 'cosine'"),
        ({"prediction_type": "v_prediction"}, "prediction_type='v_prediction' is not one of sample, epsilon"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0 must be at least 1"),
        ({"noise_schedule": "ddpm_linear", "sigma_max": 2}, "sigma_max=2 is for the noise schedule 'linear_sigma'"),
        ({"num_train_timesteps": 10.5}, "num_train_timesteps=10.5 must be an integer"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        LDAEScheduler(**settings)
    assert str(error.value).count(". ") == 0


@pytest.mark.parametrize(
    ("name", "steps", "levels"),
    [
        ("linear_sigma", 1001, 1000),
        ("linear_gamma_squared", 1000, 999),
        ("interpolative", 1000, 999),
        ("ddpm_linear", 0, 1000),
        ("ddpm_linear", -5, 1000),
        ("ddpm_linear", 2.5, 1000),
    ],
)
def test_a_number_of_steps_that_the_levels_do_not_allow_is_refused(name, steps, levels):
    with pytest.raises(ValueError, match=rf"num_inference_steps={steps} must be an integer in 1 \.\.\. {levels}"):
        LDAEScheduler(name).set_timesteps(steps)


def test_a_single_level_does_not_sample():
    scheduler, sample = LDAEScheduler("single_level"), torch.zeros(1, 2, 3)
    assert len(scheduler) == 1
    with pytest.raises(ValueError, match="'single_level' knows one level of noise and cannot sample"):
        scheduler.set_timesteps(1)
    with pytest.raises(ValueError, match="'single_level' knows one level of noise and cannot sample"):
        scheduler.step(sample, 0, sample)


def test_a_step_before_set_timesteps_is_refused():
    sample = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="before set_timesteps"):
        LDAEScheduler().step(sample, 999, sample)


@pytest.mark.parametrize("timestep", [998, 1000, -1, torch.tensor(5)])
def test_a_timestep_that_was_not_chosen_is_refused(timestep):
    sample = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=rf"Timestep {int(timestep)} is not one of the 10 .* \(999 \.\.\. 99\)"):
        ready().step(sample, timestep, sample)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_an_eta_outside_zero_to_one_is_refused(eta):
    sample = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=rf"eta={eta} must lie in 0"):
        ready().step(sample, 999, sample, eta=eta)


def test_a_prediction_in_another_space_than_the_sample_is_refused():
    with pytest.raises(ValueError, match=r"model_output \(1, 2, 12\) and sample \(1, 2, 3\) differ in shape; encode"):
        ready().step(torch.zeros(1, 2, 12), 999, torch.zeros(1, 2, 3))


@pytest.mark.parametrize("timesteps", [-1, 1000, torch.tensor([0, 1000])])
def test_noise_and_weights_at_a_level_that_does_not_exist_are_refused(timesteps):
    samples = torch.zeros(2, 2, 3)
    with pytest.raises(ValueError, match=r"Timesteps must lie in 0 \.\.\. 999"):
        LDAEScheduler().add_noise(samples, samples, timesteps)
    with pytest.raises(ValueError, match=r"Timesteps must lie in 0 \.\.\. 999"):
        LDAEScheduler().loss_weight(timesteps)


def test_noise_or_timesteps_that_do_not_fit_the_samples_are_refused():
    scheduler, samples = LDAEScheduler(), torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match=r"noise must be \(2, 5, 3\) as the samples, not \(2, 1, 3\)"):
        scheduler.add_noise(samples, samples[:, :1], 0)
    with pytest.raises(ValueError, match="There are 3 timesteps for 2 images"):
        scheduler.add_noise(samples, samples, torch.tensor([0, 1, 2]))
