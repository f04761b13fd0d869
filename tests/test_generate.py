"""Every recipe generates, from Python and from the command line; pictures of it; the folder of a pipeline."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_every_recipe import RECIPES, build, config_of, images
from typer.testing import CliRunner

from ldae_hf import LDAEConfig, LDAEPipeline
from ldae_hf.cli import app
from ldae_hf.evaluation.generators import load_generator
from ldae_hf.evaluation.sample_noise import noise_generators
from ldae_hf.evaluation.sample_pictures import image_grid, sample_images, strip_picture
from ldae_hf.manifest import check_folder
from ldae_hf.recipes import load_recipe


EXAMPLE = Path(__file__).parent.parent / "examples" / "generate.py"
LABELLED = "dit_baseline"  # convolutional too


@cache
def pipeline_of(keys: str) -> LDAEPipeline:
    """Of a model whose gates and head are not at the zero that they start from."""
    model, processor, learned = build(LDAEConfig(**json.loads(keys)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    pipeline = LDAEPipeline(model, processor, vae=learned and learned.autoencoder)
    pipeline.set_progress_bar_config(disable=True)
    return load_generator(pipeline, device="cpu").pipeline


def pipeline_for(recipe: str) -> LDAEPipeline:
    return pipeline_of(config_of(recipe))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """The pipelines of a few recipes, each in a folder of its own, and a checkpoint."""
    root = tmp_path_factory.mktemp("folders")
    for name in ("l_dae", LABELLED, "single_level"):
        pipeline_for(name).save_pretrained(root / name)
    checkpoint, pipeline = root / "checkpoint", pipeline_for("l_dae")
    pipeline.model.save_pretrained(checkpoint)
    pipeline.processor.save_pretrained(checkpoint)
    load_recipe("l_dae", "cpu").save(checkpoint)
    (checkpoint / "training.json").write_text('{"steps": 7}')
    return root


def ldae(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments) -> str:
    result = ldae(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def array(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


# ---- every recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_generates_images_or_says_that_it_cannot(name):
    pipeline = pipeline_for(name)
    config, schedule = pipeline.model.config, load_recipe(name, "cpu").model["noise_schedule"]
    labels = None if config.num_classes is None else [0, 1]
    options = dict(output_type="pt", num_inference_steps=3)
    if schedule == "single_level":
        with pytest.raises(ValueError, match="knows one level of noise and cannot sample"):
            sample_images(pipeline, range(2), labels, **options)
        return
    generated = torch.stack(sample_images(pipeline, range(2), labels, **options))
    assert generated.shape == (2, 3, config.image_size, config.image_size)
    assert generated.isfinite().all() and generated.min() >= 0 and generated.max() <= 1
    assert (generated[0] - generated[1]).abs().max() > 0.01


# ---- images by seed and number


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", ["l_dae", LABELLED])
def test_an_image_depends_on_its_seed_and_number_and_not_on_the_others(name, eta):
    pipeline = pipeline_for(name)
    labels = None if pipeline.model.config.num_classes is None else [4, 7, 1]
    options = dict(class_labels=labels, output_type="pt", num_inference_steps=3, eta=eta)
    together = torch.stack(sample_images(pipeline, range(8), **options))
    in_batches = torch.stack(sample_images(pipeline, range(8), batch_size=3, **options))
    alone = torch.stack(sample_images(pipeline, [5], **options))
    torch.testing.assert_close(in_batches, together, atol=1e-4, rtol=0)
    torch.testing.assert_close(alone[0], together[5], atol=1e-4, rtol=0)
    assert not torch.allclose(torch.stack(sample_images(pipeline, [5], seed=1, **options))[0], together[5], atol=0.01)


def test_the_images_of_a_seed_never_share_their_noise():
    seeds = [generator.initial_seed() for generator in noise_generators(0, range(50_000))]
    assert len(set(seeds)) == 50_000
    assert max(seeds) < 2**32 and seeds[5] == noise_generators(0, [5])[0].initial_seed()
    assert not set(seeds) & {generator.initial_seed() for generator in noise_generators(1, range(50_000))}


@pytest.mark.parametrize(
    "scheduler", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"]
)
@pytest.mark.parametrize("name", ["l_dae", LABELLED])
def test_the_schedulers_that_an_error_names_do_drive_a_model(name, scheduler):
    pipeline, own = pipeline_for(name), pipeline_for(name).scheduler
    options = dict(output_type="pt", num_inference_steps=10)
    ours = sample_images(pipeline, range(2), **options)
    try:
        pipeline.scheduler = own.to_stock(scheduler)
        theirs = sample_images(pipeline, range(2), **options)
    finally:
        pipeline.scheduler = own
    assert (torch.stack(theirs) - torch.stack(ours)).abs().mean() < 0.05


# ---- pictures


def test_a_grid_is_nearly_square_with_small_images_enlarged_and_a_pixel_between():
    tiles = [Image.new("RGB", (32, 32), (number, 0, 0)) for number in range(7)]
    grid = image_grid(tiles)
    assert grid.size == (3 * 65 + 1, 3 * 65 + 1)
    pixels = np.asarray(grid)
    assert [pixels[1 + 65 * (n // 3), 1 + 65 * (n % 3), 0] for n in range(7)] == list(range(7))
    assert [pixels[64 + 65 * (n // 3), 64 + 65 * (n % 3), 0] for n in range(7)] == list(range(7))
    assert (pixels[::65] == 255).all() and (pixels[:, ::65] == 255).all() and (pixels[131:, 66:] == 255).all()
    assert image_grid([Image.new("RGB", (96, 96))] * 2).size == (2 * 97 + 1, 98)


def test_classes_have_columns_of_a_grid_where_they_fit():
    tile = Image.new("RGB", (64, 64))
    assert image_grid([tile] * 64, 10).size == (10 * 65 + 1, 7 * 65 + 1)
    assert image_grid([tile] * 64, 1000).size == (8 * 65 + 1, 8 * 65 + 1)
    assert image_grid([tile] * 64, 1).size == (8 * 65 + 1, 8 * 65 + 1)
    assert image_grid([tile] * 3, 4).size == (3 * 65 + 1, 65 + 1)


def test_a_strip_goes_from_noise_to_the_image_that_is_generated():
    pipeline = pipeline_for("l_dae")
    options = dict(num_inference_steps=20, seed=2)
    strip = np.asarray(strip_picture(pipeline, range(2), **options)).astype(int)[16:, 64:]
    side = 66
    assert strip.shape == (4 * side, 9 * side, 3)
    cells = strip.reshape(4, side, 9, side, 3).transpose(0, 2, 1, 3, 4)[:, :, 1:-1:2, 1:-1:2]  # of 32 pixels again
    for number, image in enumerate(sample_images(pipeline, range(2), **options)):
        for row in (2 * number, 2 * number + 1):
            assert abs(cells[row, -1] - np.asarray(image)).max() <= 1
        # What the network is shown gets nearer to the image at every column.
        distances = [abs(cell - cells[2 * number, -1]).mean() for cell in cells[2 * number]]
        assert distances == sorted(distances, reverse=True) and distances[0] > 10
    # It begins with the noise that the seed and the number give.
    shape = (pipeline.model.config.num_patches, pipeline.model.config.latent_dim)
    latents = [torch.randn(shape, generator=generator) for generator in noise_generators(2, range(2))]
    noise = pipeline.decode(torch.stack(latents) * pipeline.scheduler.init_noise_sigma)
    for number, image in enumerate(noise):
        assert abs(cells[2 * number, 0] - np.asarray(image)).max() <= 1
        assert abs(cells[2 * number + 1, 0] - np.asarray(image)).max() > 10


# ---- the commands


def test_generate_writes_grid_strip_and_images(folders, tmp_path):
    grid, strip, each = tmp_path / "new" / "grid.png", tmp_path / "strip.png", tmp_path / "each"
    said = done(
        *("generate", folders / "checkpoint", "--num-images", 6, "--steps", 3, "--seed", 4, "--batch-size", 4),
        *("--output", grid, "--strip", strip, "--images-dir", each),
    )
    assert "6 images of" in said and "(l_dae, raw weights, float32), 3 deterministic steps, seed 4" in said
    assert [file.name for file in sorted(each.iterdir())] == [f"{number:06d}.png" for number in range(6)]
    expected = sample_images(pipeline_for("l_dae"), range(6), seed=4, num_inference_steps=3)
    for number, image in enumerate(expected):
        assert abs(array(each / f"{number:06d}.png") - np.asarray(image)).max() <= 1
    assert abs(array(grid) - np.asarray(image_grid(expected))).max() <= 1
    assert Image.open(strip).size == (64 + 4 * 66, 16 + 12 * 66)
    options = ("--num-images", 6, "--steps", 3, "--seed", 4, "--output", strip)
    said = done("generate", folders / "checkpoint", "--scheduler", "DPMSolverMultistepScheduler", *options)
    assert "3 steps of DPMSolverMultistepScheduler, seed 4" in said
    assert abs(array(strip) - array(grid)).max() > 1
    again = ldae("generate", folders / "l_dae", "--images-dir", each)
    assert again.exit_code == 2 and "is there already; name a new folder" in again.stderr


def test_classes_are_taken_in_turn_all_of_them_the_chosen_or_none(folders, tmp_path):
    def generated(*options):
        done("generate", folders / LABELLED, "--num-images", 4, "--steps", 2, "--output", tmp_path / "a.png", *options)
        return array(tmp_path / "a.png")

    def expected(labels, columns=None, **options):
        made = sample_images(pipeline_for(LABELLED), range(4), labels, num_inference_steps=2, **options)
        return np.asarray(image_grid(made, columns)).astype(int)

    assert abs(generated() - expected([0, 1, 2, 3])).max() <= 1
    assert abs(generated("--no-class") - expected(None)).max() <= 1
    assert abs(generated("--no-class") - generated()).max() > 5
    chosen = generated("--class-label", 3, "--class-label", 5, "--guidance", 3, "--sampler", "ancestral")
    assert abs(chosen - expected([3, 5], guidance_scale=3.0, eta=1.0)).max() <= 1
    assert abs(chosen - expected([3, 5], eta=1.0)).max() > 5
    options = dict(generator=noise_generators(0, range(4)), num_inference_steps=2, eta=1.0, guidance_scale=3.0)
    by_hand = pipeline_for(LABELLED)(class_labels=[3, 5, 3, 5], **options).images
    assert abs(chosen - np.asarray(image_grid(by_hand, 2))).max() <= 1
    assert abs(generated() - generated("--dtype", "bfloat16")).mean() < 10


def test_denoise_paints_images_of_a_data_set_or_of_files_at_the_levels_that_are_asked_for(folders, tmp_path):
    output, files = tmp_path / "denoised.png", []
    for number, image in enumerate(images(40)[:3]):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(files[-1])
    done("denoise", folders / "l_dae", *files, "--output", output)
    assert Image.open(output).size == (64 + 3 * 66, 9 * 66)
    original = pipeline_for("l_dae").processor.crop(Image.open(files[1]))[0].transpose(1, 2, 0)
    assert (array(output)[1:65:2, 64 + 67 : 64 + 131 : 2] == original).all()
    done("denoise", folders / "l_dae", *files, "--level", 0.5, "--level", 1, "--output", output)
    assert Image.open(output).size[1] == 5 * 66
    at_half = array(output)[66 : 3 * 66]
    done("denoise", folders / "l_dae", *files, "--timestep", 353, "--output", output)
    assert Image.open(output).size[1] == 3 * 66 and (array(output)[66:, 64:] == at_half[:, 64:]).all()
    done("denoise", folders / "single_level", *files, "--output", output)
    assert Image.open(output).size[1] == 3 * 66
    (tmp_path / "set" / "test").mkdir(parents=True)
    for file in files:
        file.rename(tmp_path / "set" / "test" / file.name)
    done("denoise", folders / LABELLED, "--dataset", tmp_path / "set", "--num-images", 2, "--output", output)
    assert Image.open(output).size == (64 + 2 * 66, 9 * 66)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("generate l_dae --output a.txt", "has the ending of no picture that can be written"),
        ("generate l_dae --strip a", "has the ending of no picture that can be written"),
        ("generate l_dae --sampler ddpm", "--sampler 'ddpm' is not one of ancestral, deterministic"),
        ("generate l_dae --scheduler DPM", "'DPM' is no scheduler of diffusers; take for example DPMSolverMultistep"),
        ("generate l_dae --scheduler AutoencoderKL", "'AutoencoderKL' is no scheduler of diffusers"),
        ("generate l_dae --guidance 2", "trained without class labels"),
        ("generate l_dae --class-label 0", "trained without class labels"),
        ("generate l_dae --steps 0", "num_inference_steps=0 must be an integer in"),
        ("generate l_dae --weights ema", "is a pipeline, with the weights that it was saved with"),
        (f"generate {LABELLED} --class-label 1 --no-class", "contradict each other"),
        (f"generate {LABELLED} --no-class --guidance 2", "guides towards classes"),
        (f"generate {LABELLED} --class-label 10", "must be integers in 0 ... 9"),
        ("generate single_level", "knows one level of noise and cannot sample"),
        ("generate .", "holds no run, no checkpoint and no pipeline"),
        ("denoise l_dae", "Give either image files or --dataset"),
        ("denoise l_dae a.png --dataset cifar10", "Give either image files or --dataset"),
        ("denoise l_dae absent.png", "absent.png cannot be used as an image: No such file or directory"),
        ("denoise l_dae broken.png", "broken.png cannot be used as an image: The image file is unreadable"),
        ("denoise l_dae broken.png --level 1 --timestep 3", "Give either --level or --timestep"),
        ("denoise l_dae broken.png --level 0", "a number above 0"),
        ("denoise l_dae good.png --timestep 1000", "Timesteps must lie in 0 ... 999"),
        ("pipeline l_dae l_dae", "l_dae is there already, and nothing is written over it"),
    ],
)
def test_a_users_error_is_one_sentence_and_leaves_no_file(folders, command, sentence, tmp_path, monkeypatch):
    for folder in folders.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = ldae(*command.split())
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and sentence in errors[0]
    assert sorted(tmp_path.iterdir()) == before


# ---- the folder of a pipeline, and the example, in fresh processes

LOADER = """
import sys
import torch, ldae_hf
for folder in sys.argv[1:]:
    pipeline = ldae_hf.LDAEPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    print(pipeline(2, output_type="pt", generator=generator, num_inference_steps=3).images.double().sum().item())
"""


def fresh_process(*arguments) -> str:
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_written_pipeline_loads_in_a_fresh_process_and_has_its_recipe_beside_it(folders, tmp_path):
    said = done("pipeline", folders / "checkpoint", tmp_path / "patch-wise")
    assert said.splitlines() == [
        "import ldae_hf",
        f"pipeline = ldae_hf.LDAEPipeline.from_pretrained('{tmp_path / 'patch-wise'}')",
        'pipeline().images[0].save("sample.png")',
    ]
    assert "class_labels=[0]" in done("pipeline", folders / LABELLED, tmp_path / "convolutional")
    assert "pipeline.denoise(open(" in done("pipeline", folders / "single_level", tmp_path / "single")
    sums = fresh_process("-c", LOADER, tmp_path / "patch-wise", tmp_path / "convolutional").split()
    for total, name in zip(map(float, sums), ("l_dae", LABELLED), strict=True):
        generator = torch.Generator().manual_seed(0)
        made = pipeline_for(name)(2, output_type="pt", generator=generator, num_inference_steps=3).images
        assert total == pytest.approx(made.double().sum().item(), rel=1e-6)
    check_folder(tmp_path / "patch-wise", needed=("model_index.json", "recipe.json", "training.json"))
    facts = load_generator(tmp_path / "patch-wise", device="cpu").facts
    assert (facts["recipe"], facts["tier"], facts["training"]) == ("l_dae", "cpu", {"steps": 7})


def test_the_example_generates_denoises_and_changes_the_scheduler(folders, tmp_path):
    fresh_process(EXAMPLE, folders / LABELLED, "--output-dir", tmp_path, "--count", 4)
    assert {file.name for file in tmp_path.iterdir()} == {
        *("samples.png", "noisy.png", "restored.png", "samples_dpm_solver.png")
    }
    assert Image.open(tmp_path / "samples.png").size == (2 * 65 + 1, 2 * 65 + 1)
    assert (array(tmp_path / "samples.png") != array(tmp_path / "samples_dpm_solver.png")).any()


def test_an_encoder_alone_is_refused_with_where_the_decoder_is(tmp_path):
    pipeline_for("l_dae").model.ldae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds an encoder alone; name the run's folder"):
        load_generator(tmp_path)


def test_models_are_shown_one_below_the_other_each_column_from_the_same_noise(folders, tmp_path):
    output = tmp_path / "rows.png"
    names = sorted(str(folder) for folder in folders.iterdir() if (folder / "model_index.json").is_file())
    result = ldae(
        "results", "samples", names[0], names[0], "--num-images", "3", "--steps", "3", "--output", str(output)
    )
    assert result.exit_code == 0, result.output
    pixels = np.asarray(Image.open(output))
    first, second = np.split(pixels[:, -3 * 66 :], 2)
    assert (first == second).all() and first.std() > 10
    assert (pixels[:, :60] < 128).any()  # a title
