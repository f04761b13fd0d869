"""The paper's figures: both files of each, words that can be read in print, and exactly the numbers that there are."""

import io
import json
import re
from base64 import b64decode
from itertools import combinations
from pathlib import Path

import matplotlib.text
import numpy as np
import pytest
import torch
from PIL import Image
from test_path_results import COMMITTED, ROWS, probe_row
from tiny_encoder import TINY, pictures, tiny_model, tiny_processor
from typer.testing import CliRunner

from ldae_hf import LDAEImageProcessor, LearnedTokenizer
from ldae_hf.cli import app
from ldae_hf.evaluation.figures import (
    curve_figure,
    curve_panels,
    denoising_figure,
    features_figure,
    filters_figure,
    noise_figure,
    path_bars,
    path_figure,
    path_steps,
    pipeline_figure,
    save_both,
    save_figure,
    schedules_figure,
    spectrum_figure,
)
from ldae_hf.evaluation.figures.features import principal_colours
from ldae_hf.evaluation.figures.sources import find_encoder, find_processor, find_tokenizer, short_names
from ldae_hf.evaluation.figures.style import ONE_COLUMN, SERIES, TWO_COLUMNS
from ldae_hf.evaluation.intervals import t_interval
from ldae_hf.evaluation.path_results import path_groups
from ldae_hf.recipes import load_recipe
from ldae_hf.training.pictures import restorations


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A checkpoint's folder as a run has it, with the encoder beside it and a learned tokenizer's run within."""
    folder = tmp_path_factory.mktemp("figures") / "run"
    processor = tiny_processor()
    model = tiny_model(processor)
    model.save_pretrained(folder)
    model.ldae.save_pretrained(folder / "encoder")
    for place in (folder, folder / "encoder", folder / "ae" / "processor"):
        processor.save_pretrained(place)
    components = processor.components[:6].float().flip(0)  # the variances in another order than the rows
    buffers = {"components": components, "decoder_components": components, "mean": processor.mean.float()}
    buffers["explained_variance"] = processor.explained_variance[:6].float().flip(0)
    LearnedTokenizer("patch_ae", 4, 6, buffers).save_pretrained(folder / "ae" / "tokenizer")
    for number, picture in enumerate(pictures(3)):
        picture.save(folder / f"{number}.png")
    return folder


@pytest.fixture
def ledger(tmp_path):
    def write(*rows: dict) -> Path:
        file = tmp_path / "ledger.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return write


def ldae(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def files_of(run: Path) -> list[Path]:
    return [run / "0.png", run / "1.png"]


def crops(size: int = TINY["image_size"]) -> torch.Tensor:
    return torch.from_numpy(LDAEImageProcessor(size, 4, 6).crop(pictures(2)))


def drawn_texts(figure, monkeypatch) -> list[matplotlib.text.Text]:
    """What matplotlib really writes: tick labels out of view and hidden axes are no words of a figure."""
    found, draw = {}, matplotlib.text.Text.draw

    def record(text, renderer, *args, **kwargs):
        if text.get_visible() and text.get_text().strip():
            found[id(text)] = text
        draw(text, renderer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(matplotlib.text.Text, "draw", record)
        figure.canvas.draw()
    return list(found.values())


def svg_text(figure, folder: Path) -> str:
    return save_figure(figure, folder / "figure.svg").read_text()


def words_of(svg: str) -> list[str]:
    return re.findall(r">([^<>\n]+)</text>", svg)


def images_of(svg: str) -> list[np.ndarray]:
    """The images in an SVG, (H,W,3) uint8, row by row as they are drawn."""
    encoded = re.findall(r"data:image/png;base64,([^\"]+)\"", svg)
    return [np.asarray(Image.open(io.BytesIO(b64decode(data))).convert("RGB")) for data in encoded]


def of_tiny_model(draw, *arguments):
    processor = tiny_processor()
    return draw(tiny_model(processor), processor, crops(), *arguments)


FIGURES = {
    "pipeline": lambda run, ledger: of_tiny_model(pipeline_figure, 300),
    "schedules": lambda run, ledger: schedules_figure(),
    "filters": lambda run, ledger: filters_figure([run / "ae"], 5),
    "filters of PCA": lambda run, ledger: filters_figure([run], 6),
    "curve": lambda run, ledger: curve_figure(curve_panels(ledger, "cpu")),
    "curve with floors": lambda run, ledger: curve_figure(curve_panels(COMMITTED, "cpu")),
    "curve of the paper": lambda run, ledger: curve_figure(curve_panels(None)),
    "path": lambda run, ledger: path_bars(path_steps(ledger, "cpu")[0], "ours, cifar10"),
    "path of the paper": lambda run, ledger: path_bars(path_steps(None)[0], "ours"),
    "path with distances": lambda run, ledger: path_figure(path_groups(ledger, "cpu")[0]),
    "noise": lambda run, ledger: noise_figure(tiny_processor(), crops()),
    "noise at several levels": lambda run, ledger: noise_figure(tiny_processor(), crops(), [0.2, 1.5]),
    "denoising": lambda run, ledger: of_tiny_model(denoising_figure),
    "features": lambda run, ledger: features_figure(find_encoder(run, image_size=32), crops(32), [1, 3]),
    "spectrum": lambda run, ledger: spectrum_figure({"tiny": tiny_processor()}),
    "spectra": lambda run, ledger: spectrum_figure({"cifar10": tiny_processor(), "imagenette128": tiny_processor(1)}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_words_are_at_least_7_points_in_print_lie_inside_and_upon_no_other_word(
    name, run, ledger, monkeypatch, tmp_path
):
    figure = FIGURES[name](run, ledger(*ROWS))
    assert figure.get_figwidth() in (ONE_COLUMN, TWO_COLUMNS)
    texts = drawn_texts(figure, monkeypatch)
    assert texts or name == "filters of PCA"
    assert all(text.get_fontsize() >= 7 for text in texts)
    sizes = re.findall(r"font(?:-size)?: (?:[a-z]+ )?([\d.]+)px", svg_text(figure, tmp_path))  # exponents too
    assert all(float(size) >= 7 for size in sizes) and bool(sizes) == bool(texts)
    boxes = {text: text.get_window_extent() for text in texts}
    for text, box in boxes.items():
        assert figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1, text.get_text()
        assert figure.bbox.y0 - 1 <= box.y0 and box.y1 <= figure.bbox.y1 + 1, text.get_text()
    level = [text for text in texts if text.get_rotation() % 90 == 0]  # the box of a slanted word is not the word
    for one, other in combinations(level, 2):
        assert not boxes[one].padded(-0.5).overlaps(boxes[other].padded(-0.5)), (one.get_text(), other.get_text())


def commands(run: Path, ledger: Path) -> dict[str, list]:
    return {
        "pipeline": [run, *files_of(run), "--level", 0.5],
        "schedules": ["linear_sigma", "snr_matched_sigma"],
        "filters": [run / "ae"],
        "curve": ["--ledger", ledger, "--tier", "cpu"],
        "path": ["--ledger", ledger, "--tier", "cpu"],
        "noise": [run, *files_of(run), "--sigma", 0.5],
        "denoising": [run, *files_of(run), "--level", 0.5],
        "features": [run, *files_of(run), "--image-size", 32, "--layer", 1],
        "spectrum": [run, run / "encoder"],
    }


WORDS = {
    "pipeline": ["patches in 6", "PCA directions", "σ = 0.50", "restored by"],
    "schedules": ["linear_sigma", "snr_matched_sigma", "timestep t"],
    "filters": ["PCA", "AE", "1", "6"],
    "curve": ["patch PCA", "conv. VAE", "pixels", "l-DAE", "paper, ImageNet-1k", "ours, cifar10 (tier cpu)", "K"],
    "path": ["dit baseline", "l dae", "57.5", "64.5", "40.0", "top-1 (%)"],
    "noise": ["clean", "noise on pixels", "noise on latents", "σ = 0.50"],
    "denoising": ["clean", "noisy", "σ = 0.50", "denoised"],
    "features": ["image", "features"],
    "spectrum": ["direction", "variance kept (%)"],
}


@pytest.mark.parametrize("name", WORDS)
def test_a_command_writes_a_png_and_an_svg_whose_words_are_text(name, run, ledger, tmp_path):
    result = ldae("figure", name, *commands(run, ledger(*ROWS))[name], "--output", tmp_path / "out" / "figure.png")
    assert result.exit_code == 0, result.output
    png, svg = (tmp_path / "out" / f"figure{ending}" for ending in (".png", ".svg"))
    assert result.stdout.splitlines()[-2:] == [str(png), str(svg)]
    with Image.open(png) as image:
        assert image.width in (round(300 * ONE_COLUMN), round(300 * TWO_COLUMNS))
    assert set(WORDS[name]) <= set(words_of(svg.read_text()))


def test_a_figure_is_the_same_file_whenever_it_is_drawn_and_a_name_with_a_dot_stays_whole(tmp_path):
    first, second = (save_both(schedules_figure(), tmp_path / name / "k-0.5") for name in "ab")
    assert [file.name for file in first] == ["k-0.5.png", "k-0.5.svg"]
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_lines_have_colours_that_colour_blind_people_tell_apart_and_marks_and_dashes_for_grey(tmp_path):
    svg = svg_text(curve_figure(curve_panels(None)), tmp_path)
    for style in SERIES:
        assert style["color"] in svg
    assert (
        len({style["marker"] for style in SERIES}) == len({str(style["linestyle"]) for style in SERIES}) == len(SERIES)
    )


# -- Numbers ----------------------------------------------------------------------------------------------------------


def test_the_curve_has_the_papers_points_by_k():
    [panel] = curve_panels(None)
    curves = {curve.name: dict(curve.points) for curve in panel.curves}
    assert panel.patch_dim == 768
    assert curves["patch PCA"] == {8: [56.0], 16: [63.4], 32: [65.1], 64: [60.0], 128: [53.9], 256: [44.7]}
    assert curves["patch AE"] == {8: [59.9], 16: [64.7], 32: [64.6], 64: [59.9]}
    assert curves["patch VAE"] == {8: [58.3], 16: [64.9], 32: [64.8], 64: [56.8]}
    assert curves["conv. VAE"] == {8: [54.5], 16: [63.4], 32: [62.8], 64: [57.0], 128: [48.1]}
    assert curves["pixels"] == {12: [43.7], 48: [58.5], 192: [53.0], 768: [23.6]}
    assert curves["l-DAE"] == {32: [64.5]}


def test_the_curve_has_the_ledgers_points_at_the_tiers_k_and_no_others(ledger):
    rows = [
        probe_row("patch_pca_k_8", "e1", 40.0),
        probe_row("patch_pca_k_8", "e2", 44.0),
        probe_row("patch_pca", "e3", 47.0),
        probe_row("pixels", "e4", 30.0),
        probe_row("pixels", "e10", 31.0),
        probe_row("pixels", "e11", 35.0),
        probe_row("patch_ae_k_32", "e5", 1.0, tier="desk"),
        probe_row("patch_ae_k_32", "e6", 1.0, overrides=["train.epochs=1"]),
    ]
    elsewhere = probe_row("patch_ae_k_32", "e7", 1.0)
    elsewhere["protocol"]["train"]["dataset"] = "imagenette128"
    block = probe_row("patch_ae_k_32", "e8", 1.0)
    block["protocol"]["features"] |= {"layer": 1}
    token = probe_row("patch_ae_k_32", "e9", 1.0)
    token["protocol"]["features"] |= {"pool": "class token, after LayerNorm without affine"}
    paper, ours = curve_panels(ledger(*rows, elsewhere, block, token), "cpu")
    assert ours.patch_dim == 192 and ours.title == "ours, cifar10 (tier cpu)"
    assert {curve.name: curve.points for curve in ours.curves} == {
        "patch PCA": [(8, [47.0]), (4, [40.0, 44.0])],
        "pixels": [(192, [30.0, 31.0, 35.0])],
    }
    assert not ours.floors


def test_error_bars_of_the_curve_are_t_intervals_over_seeds_and_three_of_them_lie_within_the_panel(ledger):
    tops = {"patch_pca_k_8": [40.0, 44.0], "patch_pca": [47.0], "pixels": [30.0, 31.0, 35.0]}
    rows = [probe_row(name, f"{name} {top1}", top1) for name, values in tops.items() for top1 in values]
    axis = curve_figure(curve_panels(ledger(*rows), "cpu")).axes[1]
    (pca, _, [pca_bars]), (_, _, [pixel_bars]) = axis.containers
    assert pca.get_xydata().tolist() == [[8, 47], [4, 42]]
    bars = [segment[:, 1].tolist() for part in (pca_bars, pixel_bars) for segment in part.get_segments()]
    wanted = [t_interval(tops[name]) for name in ("patch_pca", "patch_pca_k_8", "pixels")]
    assert bars == [pytest.approx([i.mean - (i.half_width or 0), i.mean + (i.half_width or 0)]) for i in wanted]
    low, high = axis.get_ylim()
    assert low < bars[2][0] and bars[1][0] < low and bars[1][1] > high  # two seeds say next to nothing


def test_the_curve_has_the_floors_that_the_ledger_has_as_lines_in_our_panel(ledger, tmp_path):
    rows = [probe_row("patch_pca", "e1", 44.0), probe_row("patch_pca_k_8", "e2", 40.0), probe_row("l_dae", "e3", 43.0)]
    for row, untrained in zip(rows, (28.0, 30.0, 31.0), strict=True):
        row["floors"] = {"untrained encoder": {"top1": untrained}, "PCA latents, K = 8": {"top1": 39.0}}
    rows[0]["floors"]["random whitened patches, stride 2"] = {"top1": 56.0}
    paper, ours = curve_panels(ledger(*rows), "cpu")
    assert not paper.floors
    assert ours.floors == {"random whitened patches": [56.0], "untrained encoder": [28.0, 30.0, 31.0]}
    figure = curve_figure([paper, ours])

    def level(axis) -> list[float]:
        return [line.get_ydata()[0] for line in axis.lines if list(line.get_xdata()) == [0, 1]]

    assert level(figure.axes[0]) == [] and level(figure.axes[1]) == [56, 30]
    assert figure.axes[1].get_ylim()[0] < 30 and figure.axes[1].get_ylim()[1] > 56
    assert {"random whitened patches", "untrained encoder"} <= set(words_of(svg_text(figure, tmp_path)))


def test_a_curve_without_results_of_ours_is_the_papers_alone(ledger):
    panels = curve_panels(ledger(probe_row("size_b", "e1", 40.0)), "cpu")
    assert [panel.title for panel in panels] == ["paper, ImageNet-1k"]
    figure = curve_figure(panels)
    assert figure.get_figwidth() == ONE_COLUMN and len(figure.axes) == 2  # K and K / P


def test_the_bars_of_the_path_are_the_papers_numbers_and_the_ledgers_means_with_their_floors(ledger):
    row = probe_row("l_dae", "e9", 54.0)
    row["floors"] = {"PCA latents, K = 16": {"top1": 41.0}, "random whitened patches": {"top1": 51.0}}
    row["floors"] |= {"untrained encoder": {"top1": 30.0}, "raw pixels": {"top1": 25.0}}
    file = ledger(*[row for row in ROWS if row.get("top1") != 99.0], row)
    steps, dataset = path_steps(file, "cpu")
    assert dataset == "cifar10"
    figure = path_bars(steps, "ours")
    paper, ours = figure.axes
    wanted = {name: load_recipe(name).paper.get("linear_probe_top1") for name in load_recipe("l_dae").steps}
    wanted = {name: number for name, number in wanted.items() if number is not None}
    assert [step.recipe for step in steps] == list(wanted)
    assert [label.get_text() for label in paper.get_yticklabels()] == [name.replace("_", " ") for name in wanted]
    assert [bar.get_width() for bar in paper.patches] == list(wanted.values())
    bars = {steps[round(bar.get_y() + bar.get_height() / 2)].recipe: bar.get_width() for bar in ours.patches}
    assert bars == {"dit_baseline": 40, "patch_pca": 47, "l_dae": pytest.approx(52)}
    assert [text.get_text() for text in ours.texts] == ["40.0", "47.0", "52.0"]
    assert paper.get_xlim()[0] == ours.get_xlim()[0] == 0
    marks = {line.get_marker(): line.get_xydata().tolist() for line in ours.lines if len(line.get_xydata())}
    place = len(steps) - 1
    assert {key: marks[key] for key in "|x+"} == {"|": [[41, place]], "x": [[51, place]], "+": [[30, place]]}


def test_a_floor_above_the_bar_is_seen_and_the_number_stands_beyond_it(ledger):
    row = probe_row("l_dae", "e9", 46.0)
    row["floors"] = {"random whitened patches": {"top1": 56.0}, "untrained encoder": {"top1": 30.0}}
    figure = path_bars(path_steps(ledger(row), "cpu")[0], "ours")
    ours = figure.axes[1]
    colors = {line.get_marker(): line.get_color() for line in ours.lines if len(line.get_xdata())}
    assert colors["x"] == "black" and colors["+"] == "white"
    [text] = ours.texts
    assert 56 < text.get_position()[0] < ours.get_xlim()[1]


def test_a_schedule_is_drawn_as_the_share_of_signal_that_its_table_has():
    axis = schedules_figure(["linear_sigma", "single_level"], 3).axes[0]
    sigma, single = (line.get_ydata().tolist() for line in axis.lines)
    assert sigma == pytest.approx([1, 1 / 1.5, 1 / 3]) and single == pytest.approx([0.75] * 3)


def test_the_spectrum_marks_k_and_says_what_share_it_keeps(tmp_path):
    processor = tiny_processor()
    figure = spectrum_figure({"tiny": processor})
    variance = processor.explained_variance
    share = (100 * variance[:6].sum() / variance.sum()).item()
    left, right = figure.axes
    assert left.lines[0].get_ydata() == pytest.approx(variance.numpy())
    assert right.lines[1].get_xydata()[0] == pytest.approx([6, share])
    assert f"4x4, K = 6, {share:.1f} %" in words_of(svg_text(figure, tmp_path))


# -- Images -----------------------------------------------------------------------------------------------------------


def agree(painted: np.ndarray, image: torch.Tensor) -> bool:
    """Whether an image (C,H,W) in [-1, 1] was painted, pixel by pixel."""
    pixels = ((image + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()
    return painted.shape == pixels.shape and np.abs(painted - 255 * pixels).max() <= 1


def test_the_pipeline_shows_image_projection_noise_restoration_and_the_image(tmp_path):
    processor = tiny_processor()
    model, pixels = tiny_model(processor), crops()
    found = images_of(svg_text(pipeline_figure(model, processor, pixels, 500, seed=3), tmp_path))
    images, [level] = restorations(model, processor, pixels, 3, [500])
    projected = processor.decode(processor.encode(pixels))
    expected = [column[row] for row in (0, 1) for column in (images, projected, level.noisy, level.restored, images)]
    assert len(found) == len(expected)
    for painted, image in zip(found, expected, strict=True):
        assert agree(painted, image)


def test_the_triples_are_those_of_the_picture_that_denoise_paints(tmp_path):
    processor = tiny_processor()
    model, pixels = tiny_model(processor), crops()
    found = images_of(svg_text(denoising_figure(model, processor, pixels, [200, 900], seed=2), tmp_path))
    images, levels = restorations(model, processor, pixels, 2, [200, 900])
    first = [images[0], *(image[0] for level in levels for image in (level.noisy, level.restored))]
    assert len(found) == 2 * len(first)
    for painted, image in zip(found, first, strict=False):
        assert agree(painted, image)


def test_noise_in_the_latent_space_leaves_what_lies_outside_of_it_and_its_strength_is_stated(tmp_path):
    processor, sigma = tiny_processor(), 0.4
    pixels = torch.randint(0, 256, (10, 3, 16, 16), dtype=torch.uint8)
    words = words_of(svg_text(noise_figure(processor, pixels, [sigma]), tmp_path))
    on_pixels, on_latents = (int(word.split()[0]) for word in words if word.endswith("grey levels"))
    assert on_pixels == pytest.approx(sigma * 127.5, rel=0.04)
    # K of P values have noise, each of sigma over the latents' scale.
    assert on_latents == pytest.approx(127.5 * sigma / processor.scale[0].item() * (6 / 48) ** 0.5, rel=0.05)


def test_patches_of_one_kind_have_one_colour_in_all_images_and_another_kind_another():
    torch.manual_seed(0)
    kinds = 5 * torch.randn(4, 32).double()
    tokens = kinds[torch.arange(400) % 4] + 0.01 * torch.randn(400, 32)
    colours = principal_colours(tokens)
    assert colours.shape == (400, 3) and colours.min() == 0 and colours.max() == 1
    means = torch.stack([colours[kind::4].mean(dim=0) for kind in range(4)])
    assert max(colours[kind::4].std(dim=0).max() for kind in range(4)) < 0.02
    assert torch.pdist(means).min() > 0.3
    torch.testing.assert_close(principal_colours(tokens.flip(0)).flip(0), colours)


def test_a_larger_image_has_more_patches_in_colour_and_prefix_tokens_are_left_out(run, tmp_path):
    encoder = find_encoder(run, image_size=32)
    image, features, *_ = images_of(svg_text(features_figure(encoder, crops(32)), tmp_path))
    assert len(np.unique(features.reshape(-1, 3), axis=0)) <= 8 * 8 < len(np.unique(image.reshape(-1, 3), axis=0))
    tokens = encoder.tokens(crops(32), torch.arange(2), [3])[0].flatten(0, 1).double()
    colours = principal_colours(tokens)[:64].unflatten(0, (8, 8)).permute(2, 0, 1)
    assert agree(features, 2 * colours - 1)


def test_filters_of_a_learned_tokenizer_come_by_the_variance_of_their_latents_below_those_of_pca(run, tmp_path):
    found = images_of(svg_text(filters_figure([run / "ae"], 99), tmp_path))  # at most K
    assert len(found) == 12
    # It has PCA's directions, in another order.
    assert all((above == below).all() for above, below in zip(found[:6], found[6:], strict=True))


# -- Where things are -------------------------------------------------------------------------------------------------


def test_a_processor_and_a_tokenizer_are_found_wherever_a_run_keeps_them(run):
    fingerprint = tiny_processor().fingerprint
    for source in (run, run / "encoder", run / "ae", run / "ae" / "tokenizer", run / "ae" / "processor"):
        assert find_processor(source).fingerprint == fingerprint
    assert find_tokenizer(run) is None
    assert find_tokenizer(run / "ae").tokenizer == find_tokenizer(run / "ae" / "tokenizer").tokenizer == "patch_ae"
    assert find_encoder(run).dim == TINY["hidden_size"]


def test_names_in_a_legend_are_as_short_as_they_can_be():
    assert short_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert short_names(["cpu/a", "desk/a", "b"]) == ["cpu/a", "desk/a", "b"]
    with pytest.raises(ValueError, match="named twice"):
        short_names(["runs/a", "runs/a"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["denoising", "RUN"], "Give either image files or --dataset, and not both."),
        (["pipeline", "RUN", "RUN/0.png", "--dataset", "cifar10"], "Give either image files or --dataset"),
        (["pipeline", "RUN", "RUN/0.png", "--level", "-1"], "--level is sigma/gamma"),
        (["noise", "RUN", "RUN/absent.png"], "absent.png cannot be used as an image: No such file"),
        (["noise", "RUN", "RUN/0.png", "--sigma", "0"], "sigma must be a number above 0"),
        (["denoising", "RUN/encoder", "RUN/0.png"], "holds an encoder alone; name the run's folder"),
        (["features", "RUN", "RUN/0.png", "--layer", "4"], "has the layers 1 ... 3, not 4"),
        (["features", "RUN", "RUN/0.png", "--image-size", "33"], "image_size=33"),
        (["filters", "HERE"], "holds no processor; name a run"),
        (["spectrum", "RUN", "RUN"], "named twice"),
        (["schedules", "cosine"], "There is no noise schedule 'cosine'"),
        (["curve", "--ledger", "HERE/absent.jsonl"], "There is no ledger"),
        (["path", "--tier", "nowhere"], "tier 'nowhere' is unknown"),
    ],
)
def test_what_cannot_be_drawn_is_said_and_nothing_is_written(words, message, run, tmp_path):
    words = [word.replace("RUN", str(run)).replace("HERE", str(tmp_path)) for word in words]
    result = ldae("figure", *words, "--output", tmp_path / "figure")
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not list(tmp_path.glob("figure*"))
