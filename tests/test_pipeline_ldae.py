"""The pipeline against diffusers' schedulers on the same network, and against what sampling has to leave unchanged."""

import inspect
import json
import os
import subprocess
import sys

import diffusers
import pytest
import torch
from hub_server import Hub
from PIL import Image
from test_every_recipe import build as build_recipe
from test_every_recipe import config_of
from test_modeling_ldae import build, equal_to, fit_processor, processor_for, processors, smooth_images
from torch import nn

from ldae_hf import LDAEConfig, LDAEPipeline, LDAEScheduler
from ldae_hf.configuration_ldae import NOISE_SCHEDULES
from ldae_hf.patch_tokenizers import unpatchify
from ldae_hf.pipeline_ldae import FIXED_STRIDE


__all__ = ["processors"]  # a fixture

SAMPLING = [name for name in NOISE_SCHEDULES if name != "single_level"]
# One model for each way to read an answer.
ANSWERS = {
    "noise": dict(input_space="latent", prediction_target="noise"),
    "latents": dict(input_space="latent", prediction_target="latent"),
    "latents from pixels": dict(input_space="pixel", prediction_target="latent"),
    "reconstruction": dict(input_space="pixel", prediction_target="reconstruction"),
    "image": dict(input_space="pixel", prediction_target="image"),
    "noise in an image": dict(input_space="pixel", prediction_target="noise"),
    "noise of pixels": dict(input_space="latent", prediction_target="noise", tokenizer="pixels"),
    "noise of a VAE's latents": dict(input_space="latent", prediction_target="noise", tokenizer="patch_vae"),
}


def pipeline_of(processors, noise_schedule="linear_sigma", answer="image", **keys) -> LDAEPipeline:
    keys = dict(noise_schedule=noise_schedule) | ANSWERS[answer] | keys
    if keys.get("tokenizer") == "pixels":
        keys["latent_dim"] = 48
    processor = processor_for(processors, **keys)
    return quiet(LDAEPipeline(build(processor=processor, dtype=torch.float32, **keys), processor))


def quiet(pipeline: LDAEPipeline) -> LDAEPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(pipeline, batch_size=2, seed=0, steps=5, **options) -> torch.Tensor:
    options = dict(output_type="pt", generator=generator(seed), num_inference_steps=steps) | options
    return pipeline(batch_size, **options).images


@pytest.fixture(scope="module")
def labelled(processors) -> LDAEPipeline:
    return pipeline_of(processors, "ddpm_linear", "noise", num_classes=5)


# -- against diffusers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["noise", "latents"])
@pytest.mark.parametrize(("name", "eta"), [("DDPMScheduler", 1.0), ("DDIMScheduler", 0.0)])
def test_with_ddpm_linear_a_whole_loop_equals_diffusers_on_the_same_network_and_noise(name, eta, answer, processors):
    pipeline = pipeline_of(processors, "ddpm_linear", answer)
    stock = getattr(diffusers, name)(  # its levels are its own, not taken from ours
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type={"noise": "epsilon", "latents": "sample"}[answer],
    )
    stock.set_timesteps(20)
    noise, model = generator(), pipeline.model
    latents = torch.randn(2, 16, 8, generator=noise)
    with torch.no_grad():
        for timestep in stock.timesteps:
            prediction = model.predict(latents, timestep[None])
            latents = stock.step(prediction, timestep, latents, generator=noise).prev_sample
        pixels = unpatchify(model.ldae.tokenizer.decode(latents), 4, (4, 4)) * 0.5 + 0.5
    equal_to(images(pipeline, steps=20, eta=eta), pixels.clamp(0, 1), 2e-4)
    equal_to(images(pipeline, steps=20, eta=eta).std(), pixels.clamp(0, 1).std(), 1e-4)


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_diffusers_deterministic_schedulers_drive_every_model_along_the_same_path(name, answer, processors):
    for noise_schedule in SAMPLING:
        pipeline = pipeline_of(processors, noise_schedule, answer)
        steps = (
            9 if noise_schedule in ("linear_gamma_squared", "interpolative") else 10
        )  # 999 levels: diffusers' DDIM steps T // n
        ours = images(pipeline, steps=steps)
        pipeline.scheduler = pipeline.scheduler.to_stock(getattr(diffusers, name))
        theirs = images(pipeline, steps=steps)
        assert (ours - theirs).abs().max() < 5e-3 and (ours - theirs).abs().mean() < 1e-4, noise_schedule


@pytest.mark.parametrize("name", sorted(FIXED_STRIDE))
@pytest.mark.parametrize(
    ("noise_schedule", "steps", "advice"),
    [
        ("linear_sigma", 300, "1000 // 300 = 3 levels.*take 250 or 500 steps, or LDAEScheduler"),
        ("linear_sigma", 600, "1000 // 600 = 1 levels.*take 500 or 1000 steps"),
        ("linear_gamma_squared", 10, "999 // 10 = 99 levels.*take 9 or 27 steps"),
    ],
)
def test_a_scheduler_that_would_miss_its_own_levels_is_refused(name, noise_schedule, steps, advice, processors):
    pipeline = pipeline_of(processors, noise_schedule)
    settings = dict(snr_shift_scale=1.0) if name.startswith("Cog") else {}  # else their levels are not the model's
    pipeline.scheduler = pipeline.scheduler.to_stock(name, **settings)
    with pytest.raises(ValueError, match=f"{name} steps by {advice}"):
        images(pipeline, steps=steps)


def test_the_schedulers_with_a_fixed_stride_are_those_of_diffusers_that_the_model_can_have():
    source = "- self.config.num_train_timesteps // self.num_inference_steps"
    found = set()
    for name in dir(diffusers):
        scheduler = getattr(diffusers, name) if name.endswith("Scheduler") else None
        if isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin):
            if "trained_betas" in scheduler._get_init_keys(scheduler) and source in inspect.getsource(scheduler):
                found.add(name)
    assert found - {"DDIMInverseScheduler", "RePaintScheduler"} == FIXED_STRIDE  # these two do not generate


@pytest.mark.parametrize("name", ["DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"])
def test_a_scheduler_that_leads_to_noise_does_not_generate(name, processors):
    pipeline = pipeline_of(processors)
    pipeline.scheduler = pipeline.scheduler.to_stock(name)
    with pytest.raises(ValueError, match="leads from images to noise"):
        images(pipeline)


@pytest.mark.parametrize("noise_schedule", SAMPLING)
def test_ddpm_of_diffusers_draws_what_ours_draws(noise_schedule, processors):
    pipeline = pipeline_of(processors, noise_schedule)
    ours = images(pipeline, eta=1.0)
    pipeline.scheduler = pipeline.scheduler.to_stock(diffusers.DDPMScheduler)
    equal_to(images(pipeline), ours, 1e-3)


@pytest.mark.parametrize("noise_schedule", SAMPLING)
def test_dpm_solver_in_many_steps_ends_where_ddim_in_many_steps_ends(noise_schedule, processors):
    pipeline = pipeline_of(processors, noise_schedule)
    fine = images(pipeline, steps=200)
    coarse = (images(pipeline, steps=20) - fine).abs().mean()
    pipeline.scheduler = pipeline.scheduler.to_stock(diffusers.DPMSolverMultistepScheduler)
    assert (images(pipeline, steps=200) - fine).abs().mean() < 0.3 * coarse + 1e-4


def test_a_scheduler_that_is_not_the_models_is_refused_with_the_way_to_make_one(processors, labelled):
    for scheduler in (
        LDAEScheduler("linear_gamma_squared"),
        LDAEScheduler("linear_sigma", prediction_type="epsilon"),
        LDAEScheduler("linear_sigma", sigma_max=2.0),
        diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample"),
        diffusers.FlowMatchEulerDiscreteScheduler(),
    ):
        pipeline = pipeline_of(processors)
        pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match=rf"{type(scheduler).__name__} has other levels.*to_stock"):
            images(pipeline)
    own = labelled.scheduler
    try:
        labelled.scheduler = diffusers.DDPMScheduler()  # clips latents as if they were pixels
        with pytest.raises(ValueError, match="clips"):
            images(labelled)
        labelled.scheduler = own.to_stock(diffusers.EulerDiscreteScheduler, timestep_spacing="linspace")
        with pytest.raises(ValueError, match="between those that the model was trained on"):
            images(labelled, steps=7)
        labelled.scheduler = own.to_stock(diffusers.DDPMScheduler)
        with pytest.raises(ValueError, match="leaves no choice of eta=0.5"):
            images(labelled, eta=0.5)
        with pytest.raises(ValueError, match="takes no table of betas"):
            own.to_stock(diffusers.FlowMatchEulerDiscreteScheduler)
    finally:
        labelled.scheduler = own


# -- what sampling leaves unchanged -----------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_seed_fixes_the_images_and_another_changes_them(eta, processors):
    pipeline = pipeline_of(processors)
    assert torch.equal(images(pipeline, eta=eta), images(pipeline, eta=eta))
    assert not torch.allclose(images(pipeline, eta=eta), images(pipeline, eta=eta, seed=1))


def test_with_a_generator_each_an_image_does_not_depend_on_its_batch_mates(labelled):
    together = images(labelled, class_labels=[0, 1, 2], generator=[generator(i) for i in range(3)], eta=1.0)
    for i in range(3):
        alone = images(labelled, class_labels=[i], generator=[generator(i)], eta=1.0)
        equal_to(alone[0], together[i], 1e-4)


def test_given_latents_take_the_place_of_the_first_noise(processors):
    pipeline = pipeline_of(processors)
    latents = torch.randn(2, 16, 8, generator=generator())
    assert torch.equal(images(pipeline, latents=latents), images(pipeline))
    with pytest.raises(ValueError, match=r"latents must be \(2, 16, 8\), not \(2, 8, 16\)"):
        images(pipeline, latents=latents.transpose(1, 2))


@pytest.mark.parametrize("answer", ["reconstruction", "image"])
def test_an_image_prediction_is_returned_whole_with_what_lies_outside_of_the_latents(answer, processors):
    pipeline = pipeline_of(processors, "linear_sigma", answer)
    model, latents = pipeline.model, torch.randn(2, 16, 8, generator=generator())
    [level] = pipeline.scheduler.set_timesteps(1) or pipeline.scheduler.timesteps
    with torch.no_grad():
        patches = model.predict(latents * pipeline.scheduler.init_noise_sigma, level[None])
    whole = (unpatchify(patches, 4, (4, 4)) * 0.5 + 0.5).clamp(0, 1)
    equal_to(images(pipeline, steps=1), whole, 1e-5)
    inside = pipeline.decode(model.ldae.tokenizer.encode_patches(patches), "pt")
    assert (inside - whole).abs().max() > 0.01


def test_a_model_that_predicts_the_mean_generates_the_mean_image(processors):
    pipeline = pipeline_of(processors, "linear_sigma", "latents")
    nn.init.zeros_(pipeline.model.decoder.head.weight)
    nn.init.zeros_(pipeline.model.decoder.head.bias)
    mean = unpatchify(pipeline.processor.mean.float().expand(2, 16, 48), 4, (4, 4)) * 0.5 + 0.5
    equal_to(images(pipeline, eta=1.0), mean.clamp(0, 1), 1e-5)


def test_a_callback_sees_each_step_and_may_change_the_latents(processors):
    pipeline, seen = pipeline_of(processors), []

    def look(pipeline, number, timestep, tensors):
        seen.append((number, timestep, {name: value.clone() for name, value in tensors.items()}))

    images(pipeline, callback_on_step_end=look)
    assert [number for number, *_ in seen] == list(range(5))
    assert [timestep for _, timestep, _ in seen] == pipeline.scheduler.timesteps.tolist()
    before, after = seen[0][2], seen[1][2]
    assert torch.equal(before["latents"], after["noisy_latents"])
    assert torch.equal(seen[-1][2]["latents"], seen[-1][2]["clean_latents"])
    shown = torch.randn(2, 16, 8, generator=generator()) * 3**0.5
    equal_to(before["noisy_latents"], shown, 1e-6)
    blank = images(pipeline, callback_on_step_end=lambda *args: {"latents": torch.zeros(2, 16, 8)})
    assert not torch.allclose(blank, images(pipeline))


def test_noisy_latents_are_in_the_models_scale_under_any_scheduler(processors):
    pipeline, paths = pipeline_of(processors), []
    for stock in (None, diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler):
        if stock is not None:
            pipeline.scheduler = LDAEScheduler.for_model(pipeline.model.config).to_stock(stock)
        path = []
        images(pipeline, callback_on_step_end=lambda p, n, t, seen: path.append(seen["noisy_latents"]))  # noqa: B023
        paths.append(torch.stack(path))
    equal_to(paths[1], paths[0], 1e-3)
    equal_to(paths[2], paths[0], 1e-3)


# -- labels and guidance ----------------------------------------------------------------------------------------------


def test_a_class_changes_the_image_and_its_absence_is_no_class(labelled):
    first, second = (images(labelled, class_labels=[c, c]) for c in (0, 1))
    assert not torch.allclose(first, second)
    assert not torch.allclose(images(labelled), first)
    equal_to(images(labelled, class_labels=[3, 3], guidance_scale=0.0), images(labelled), 1e-4)


def test_guidance_goes_on_from_no_class_through_the_class(labelled):
    noise = torch.randn(2, 16, 8, generator=generator())
    level, labels = torch.tensor([999]), torch.tensor([0, 4])
    model, nothing = labelled.model, torch.tensor([5, 5])
    with torch.no_grad():
        with_class = model.predict(noise, level.expand(2), labels)
        without = model.predict(noise, level.expand(2), nothing)
        equal_to(labelled._predict(noise, level, labels, 3.0), without + 3 * (with_class - without), 1e-4)
    assert torch.equal(
        images(labelled, class_labels=[0, 4]), images(labelled, class_labels=torch.tensor([0, 4]), guidance_scale=1)
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(class_labels=[5]), "class_labels must be integers in 0 ... 4"),
        (dict(class_labels=[-1]), "class_labels must be integers in 0 ... 4"),
        (dict(class_labels=[0.5]), "class_labels must be integers in 0 ... 4"),
        (dict(class_labels=[]), "class_labels must be integers in 0 ... 4"),
        (dict(guidance_scale=2.0), "guidance_scale=2.0 guides towards classes: give class_labels"),
        (dict(class_labels=[0], guidance_scale=float("nan")), "guidance_scale=nan must be 0 or more"),
        (dict(num_inference_steps=0), "num_inference_steps=0 must be an integer in 1 ... 1000"),
        (dict(eta=2.0), r"eta=2.0 must lie in 0 \(deterministic\) ... 1"),
        (dict(output_type="latent"), "output_type='latent' is not one of pil, np, pt"),
    ],
)
def test_what_cannot_be_generated_is_one_clear_sentence(options, sentence, labelled):
    with pytest.raises(ValueError, match=sentence):
        labelled(1, **options)


def test_an_unlabelled_model_takes_neither_labels_nor_guidance(processors):
    pipeline = pipeline_of(processors)
    with pytest.raises(ValueError, match="without class labels .*leave class_labels out"):
        pipeline(class_labels=[0])
    with pytest.raises(ValueError, match="without class labels .*leave guidance_scale=2 out"):
        pipeline(guidance_scale=2)


def test_a_single_level_denoises_but_does_not_sample(processors):
    pipeline = pipeline_of(processors, "single_level")
    with pytest.raises(ValueError, match="'single_level' knows one level of noise and cannot sample"):
        pipeline()
    assert len(pipeline.denoise(smooth_images(2, seed=3), 0).images) == 2


# -- images in and out ------------------------------------------------------------------------------------------------


def test_images_come_as_pil_numpy_or_tensors_of_the_same_pixels(processors):
    pipeline = pipeline_of(processors)
    tensors = images(pipeline)
    arrays, pictures = (images(pipeline, output_type=kind) for kind in ("np", "pil"))
    assert tensors.shape == (2, 3, 16, 16) and 0 <= tensors.min() and tensors.max() <= 1
    equal_to(torch.from_numpy(arrays).permute(0, 3, 1, 2), tensors)
    assert isinstance(pictures[0], Image.Image) and pictures[0].size == (16, 16)
    assert pictures[0].getpixel((3, 5)) == tuple((tensors[0, :, 5, 3] * 255).round().int().tolist())
    assert torch.equal(
        pipeline(2, output_type="pt", generator=generator(), return_dict=False)[0], images(pipeline, steps=50)
    )


def test_denoise_is_the_models_own_step_on_images_of_any_kind(labelled):
    pictures = [Image.fromarray(image) for image in smooth_images(3, seed=1, size=20)]
    pixels = labelled.processor(pictures, return_tensors="pt")["pixel_values"]
    noise = torch.randn(3, 16, 8, generator=generator(4))
    timesteps = torch.tensor([0, 400, 998])
    with torch.no_grad():
        noisy, restored = labelled.model.denoise(pixels, timesteps, noise, torch.tensor([0, 1, 2]))
    output = labelled.denoise(pictures, timesteps, class_labels=[0, 1, 2], generator=generator(4), output_type="pt")
    equal_to(output.images, (restored * 0.5 + 0.5).clamp(0, 1))
    equal_to(output.noisy_images, (noisy * 0.5 + 0.5).clamp(0, 1))
    with pytest.raises(ValueError, match="Timesteps must lie in 0 ... 999"):
        labelled.denoise(pictures, 1000)


def test_a_model_of_the_noise_does_not_restore_what_is_all_noise(processors):
    pipeline = pipeline_of(processors, "linear_gamma_squared", "noise")
    with pytest.raises(ValueError, match="At gamma = 0 nothing of the image is left"):
        pipeline.denoise(smooth_images(2, seed=3), 999)
    assert len(pipeline.denoise(smooth_images(2, seed=3), 998).images) == 2


# -- saved and loaded -------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_generates_the_same_images_in_bf16_too(labelled, tmp_path):
    labelled.save_pretrained(tmp_path)
    loaded = quiet(LDAEPipeline.from_pretrained(tmp_path))
    assert torch.equal(images(loaded, class_labels=[0, 1]), images(labelled, class_labels=[0, 1]))
    half = quiet(LDAEPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16))
    assert half.model.dtype == torch.bfloat16 and half.model.ldae.tokenizer.mean.dtype == torch.float32
    difference = images(half, class_labels=[0, 1], eta=1.0) - images(labelled, class_labels=[0, 1], eta=1.0)
    assert 0 < difference.abs().mean() < 0.05


def test_a_pipeline_taken_to_bf16_is_the_one_loaded_in_bf16(labelled, tmp_path):
    labelled.save_pretrained(tmp_path)
    loaded = quiet(LDAEPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16))
    for place in ((torch.bfloat16,), ("cpu", torch.bfloat16)):
        taken = quiet(LDAEPipeline.from_pretrained(tmp_path)).to(*place)
        assert torch.equal(images(taken, class_labels=[0, 1]), images(loaded, class_labels=[0, 1]))
    assert taken.to("cpu").model.dtype == taken.to(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert taken.to(dtype=torch.float32).model.dtype == torch.float32
    with pytest.raises(ValueError, match="one dtype, not torch.bfloat16 and torch.float16"):
        taken.to(torch.bfloat16, dtype=torch.float16)


def test_an_autoencoder_stays_in_fp32_when_its_pipeline_is_taken_to_bf16():
    model, processor, learned = build_recipe(LDAEConfig(**json.loads(config_of("replace_noise_schedule"))))
    pipeline = quiet(LDAEPipeline(model, processor, vae=learned.autoencoder)).to(torch.bfloat16)
    assert pipeline.model.dtype == torch.bfloat16 and pipeline.vae.dtype == torch.float32
    assert images(pipeline).isfinite().all()


def test_a_convolutional_tokenizers_autoencoder_is_saved_as_the_vae(tmp_path):
    model, processor, learned = build_recipe(LDAEConfig(**json.loads(config_of("replace_noise_schedule"))))
    with pytest.raises(ValueError, match="needs the vae of its tokenizer"):
        LDAEPipeline(model, processor)
    pipeline = quiet(LDAEPipeline(model, processor, vae=learned.autoencoder))
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(LDAEPipeline.from_pretrained(tmp_path))
    assert torch.equal(images(loaded), images(pipeline))
    with torch.no_grad():
        next(loaded.vae.parameters()).add_(1)
    loaded.vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="was trained with the tokenizer"):
        LDAEPipeline.from_pretrained(tmp_path)


def test_parts_that_do_not_belong_together_are_refused(processors, labelled):
    with pytest.raises(ValueError, match="is not the one this model was built with"):
        LDAEPipeline(labelled.model, fit_processor(seed=5))
    with pytest.raises(ValueError, match="has no use for a vae"):
        LDAEPipeline(labelled.model, labelled.processor, vae=diffusers.AutoencoderKL())


def test_a_folder_that_names_other_parts_is_refused_before_any_is_loaded(labelled, tmp_path):
    labelled.save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    index = json.loads(file.read_text())
    for wrong in (
        {"model": ["subprocess", "Popen"]},
        {"model": ["transformers", "BertModel"]},
        {"scheduler": ["evil", "LDAEScheduler"]},
        {"scheduler": ["diffusers", "AutoencoderKL"]},
        {"scheduler": ["diffusers", "__loader__"]},
        {"vae": ["torch", "load"]},
        {"safety_checker": ["builtins", "eval"]},
    ):
        file.write_text(json.dumps(index | wrong))
        with pytest.raises(ValueError, match="names other parts than LDAEPipeline has"):
            LDAEPipeline.from_pretrained(tmp_path)
    for text in ("[]", "{", "\x00"):
        file.write_text(text)
        with pytest.raises(ValueError, match="holds no pipeline"):
            LDAEPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["someone/nothing", "no/such/folder", "../outside", "a\0b"])
def test_a_name_that_is_neither_folder_nor_repository_is_said_to_be_neither(name):
    with pytest.raises(OSError, match="is no folder here, and no pipeline can be had from the Hub"):
        LDAEPipeline.from_pretrained(name)


LOAD_FROM_HUB = """
import torch
from ldae_hf import LDAEPipeline
pipeline = LDAEPipeline.from_pretrained("someone/pipeline")
images = pipeline(2, output_type="pt", generator=torch.Generator().manual_seed(0), num_inference_steps=5).images
print(images.double().sum().item())
"""


def test_a_pipeline_loads_from_the_hub_by_name_and_takes_nothing_else_along(processors, tmp_path):
    pipeline = pipeline_of(processors)
    pipeline.save_pretrained(tmp_path / "pipeline")
    files = {str(f.relative_to(tmp_path / "pipeline")): f.read_bytes() for f in (tmp_path / "pipeline").rglob("*.*")}
    files |= {"model/pytorch_model.bin": b"a pickle", "pipeline.py": b"raise SystemExit(9)", "images/0.png": b"large"}
    with Hub(files) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", LOAD_FROM_HUB]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert float(result.stdout) == pytest.approx(images(pipeline).double().sum().item(), rel=1e-6)
        assert not [r for r in hub.requests if "pytorch_model.bin" in r or "pipeline.py" in r or "images/" in r]
