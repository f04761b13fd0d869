"""The demo's page, in a headless Chromium as a person would use it; and what it loads. `make test-demo` runs this."""

import base64
import copy
import importlib.util
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from safetensors.torch import save_file
from test_modeling_ldae import build, fit_processor, smooth_images

from ldae_hf import LDAEPipeline


ROOT = Path(__file__).parents[1]
APP = ROOT / "examples" / "app.py"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# No sandbox, for it does not start as root; and nothing that would look for a network.
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
OPTIONS += ["--disable-background-networking", "--disable-component-update"]
NAME = "tiny <i>model"
STILL = "The pictures are still those of the image before."


def save(folder: Path, model, processor) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processor():
    return fit_processor()


@pytest.fixture(scope="module")
def model(processor):
    return build(processor=processor, dtype=torch.float32)


@pytest.fixture(scope="module")
def address(model, processor, tmp_path_factory):
    """Of the running app; at the end it must have had no error to report."""
    pytest.importorskip("gradio", reason="gradio is not installed here: make test-demo")
    folder = tmp_path_factory.mktemp("app")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, APP, save(folder / NAME, model, processor), "--port", str(port)]
    environment = os.environ | {"GRADIO_TEMP_DIR": str(folder / "uploads")}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        for _ in range(600):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture(scope="module")
def browser(address):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed here: make test-demo")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here; Debian's package is named chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


class Page:
    """The page as a person sees it: pictures by their titles, controls by their labels."""

    def __init__(self, browser, address: str, width: int):
        self.tab = browser.new_page(viewport={"width": width, "height": 800})
        self.complaints, self.requests = [], []
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("console", lambda line: line.type == "error" and self.complaints.append(line.text))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(address)
        self.tab.get_by_text("What they miss").wait_for()

    def picture(self, title: str) -> np.ndarray:
        """(H,W,3) in 0 ... 1, as it was sent."""
        source = self.tab.get_by_alt_text(title).first.get_attribute("src")
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        return np.asarray(Image.open(io.BytesIO(data))) / 255

    def number(self, pattern: str) -> float:
        """What the first group finds in the text of the page."""
        return float(re.search(pattern, self.tab.locator("body").inner_text())[1])

    def set(self, label: str, value: int, then: str) -> None:
        """Moves a slider, and waits for a text."""
        self.tab.get_by_label(f"number input for {label}").fill(str(value))
        self.tab.get_by_text(then).wait_for(timeout=10_000)

    def change(self, title: str, act) -> None:
        """Does something, and waits until a picture is another one."""
        image = self.tab.get_by_alt_text(title).first
        source = image.get_attribute("src")
        act()
        self.tab.wait_for_function(
            "([title, source]) => document.querySelector(`img[alt='${title}']`).src != source",
            arg=[title, source],
            timeout=10_000,
        )

    def upload(self, file: Path) -> None:
        self.tab.locator("input[type=file]").first.set_input_files(file)


@pytest.fixture
def page(browser, address):
    page = Page(browser, address, 1280)
    yield page
    page.tab.close()
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith((address, "data:", "blob:"))] == []


# ---- the page


def test_a_stronger_noise_is_seen_and_taken_off(page):
    seen, captions = {}, []
    for timestep, sigma in ((0, "0.00"), (400, "0.57"), (999, "1.41")):
        page.set("Level t", timestep, f"σ = {sigma}.")
        seen[timestep] = [page.picture(title) for title in ("Noisy", "Restored", "Of the noisy image")]
        captions.append(page.number(rf"γ = 1\.00, σ = {sigma}\. RMS error: (\d\.\d+)"))
    errors = [np.square(noisy - seen[0][0]).mean() for noisy, _, _ in seen.values()]
    assert errors[0] == 0 < errors[1] < errors[2] and captions == sorted(set(captions))
    assert all((one != other).any() for one, other in zip(seen[400], seen[999], strict=True))
    page.change("Noisy", page.tab.get_by_text("Other noise of this level").click)


def test_more_directions_of_the_pca_come_nearer_to_the_image(page, processor):
    image, errors = page.picture("What the model is given"), []
    directions = page.picture("Directions")
    for count in (1, 3, 12, 30, 48):
        page.set("Directions K", count, f"From {count} of 48 directions")
        errors.append(np.square(page.picture(f"From {count} of 48 directions") - image).mean())
        share = processor.explained_variance[:count].sum() / processor.explained_variance.sum()
        assert page.number(r"They hold ([\d.]+)% of the variance") == pytest.approx(100 * share.item(), abs=0.051)
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.01 and errors[-1] == 0
    assert page.picture("Directions").std() > directions.std()  # none is pale any more


def test_an_uploaded_image_is_shown_as_the_processor_crops_it(page, processor, tmp_path):
    before = {title: page.picture(title) for title in ("Noisy", "Of the image", "What they miss")}
    samples = {"wide.png": Image.fromarray(smooth_images(1, seed=3, size=40)[0]).resize((60, 40))}
    samples["clear.png"] = Image.new("RGBA", (30, 30), (200, 30, 30, 90))
    samples["deep.png"] = Image.fromarray(np.linspace(0, 65535, 900).reshape(30, 30).astype(np.uint16))
    for name, image in samples.items():
        image.save(tmp_path / name)
        page.change("What the model is given", lambda name=name: page.upload(tmp_path / name))
        expected = processor.crop(image)[0].transpose(1, 2, 0) / 255
        assert page.picture("What the model is given") == pytest.approx(expected, abs=0.003)
        assert all((page.picture(title) != picture).any() for title, picture in before.items())
    page.change("What the model is given", page.tab.locator(".thumbnail-item").nth(1).click)


def test_of_a_file_that_is_no_image_the_page_says_why_and_keeps_its_pictures(page, tmp_path):
    stream = io.BytesIO()
    Image.fromarray(smooth_images(1, seed=0, size=40)[0]).save(stream, "PNG")
    whole, dot, bomb = stream.getvalue(), tmp_path / "dot.png", tmp_path / "bomb.png"
    Image.new("RGB", (1, 1)).save(dot)
    Image.new("1", (20_000, 9_500)).save(bomb)
    files = {
        "The image file is unreadable": b"nothing of the kind",
        "The image file cannot be decoded": whole[:-400],
        "The image file is empty": b"",
        "The image has 1 × 1 pixels": dot.read_bytes(),
        "The image has too many pixels": bomb.read_bytes(),
    }
    before = page.picture("What the model is given")
    for sentence, data in files.items():
        (tmp_path / "broken.png").write_bytes(data)
        page.upload(tmp_path / "broken.png")
        page.tab.locator(".wrong").get_by_text(sentence).wait_for(timeout=10_000)
        assert page.tab.locator(".wrong").inner_text().endswith(STILL)
        assert (page.picture("What the model is given") == before).all()
    page.tab.locator(".thumbnail-item").nth(2).click()
    page.tab.locator(".wrong").wait_for(state="hidden")


@pytest.mark.parametrize("width", [390, 1280])
def test_pictures_are_large_and_nothing_is_wider_than_the_screen(browser, address, width):
    page = Page(browser, address, width)
    assert NAME in page.tab.locator("body").inner_text()  # a name is no markup
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= width
    pictures = page.tab.locator("figure img").all()
    assert len(pictures) == 8
    for picture in pictures:
        box = picture.bounding_box()
        assert 0 <= box["x"] and box["x"] + box["width"] <= width and box["width"] >= 150
        assert picture.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    page.tab.close()


# ---- what it loads


@pytest.fixture(scope="module")
def app():
    pytest.importorskip("gradio", reason="gradio is not installed here: make test-demo")
    spec = importlib.util.spec_from_file_location("app", APP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_encoder_alone_shows_all_but_the_restored_image(app, model, processor, tmp_path):
    viewer = app.Viewer(*app.load(str(save(tmp_path, model.ldae, processor))))
    picture = viewer.look_at(app.drawings()[0])
    noise, features = viewer.noise(picture, 500, 0)
    whole = app.Viewer(model, processor).noise(picture, 500, 0)
    assert noise.count("<img") == 1 and "takes the decoder" in noise
    assert noise.partition("</figure>")[0] == whole[0].partition("</figure>")[0] and features == whole[1]


def test_a_model_is_found_in_a_run_a_repository_and_a_pipeline(app, model, processor, tmp_path):
    save(tmp_path / "run" / "checkpoints" / "step-00000007", model, processor)
    save(tmp_path / "run" / "checkpoints" / "step-00000012", model, processor)
    save(tmp_path / "repository", model.ldae, processor)
    save(tmp_path / "repository" / "pretraining", model, processor)
    LDAEPipeline(model, processor).save_pretrained(tmp_path / "pipeline")
    for kind in ("run", "repository", "pipeline"):
        loaded, its_processor = app.load(str(tmp_path / kind))
        assert its_processor.fingerprint == processor.fingerprint
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    average = {name: value.detach() + 1 for name, value in model.named_parameters()}
    (tmp_path / "repository" / "pretraining" / "training").mkdir()
    save_file(average, tmp_path / "repository" / "pretraining" / "training" / "ema.safetensors")
    loaded, _ = app.load(str(tmp_path / "repository"))
    assert all(torch.equal(parameter, average[name]) for name, parameter in loaded.named_parameters())


def test_a_plain_map_of_features_is_grey(app, model, processor):
    encoder = copy.deepcopy(model.ldae)
    encoder.position_embeddings.zero_()  # of a plain image all patches are the same now, but for rounding
    viewer = app.Viewer(encoder, processor)
    picture = viewer.look_at(Image.new("RGB", (40, 40), "teal"))
    assert viewer.in_colour(picture.features, picture) == pytest.approx(torch.full((1, 3, 4, 4), 0.5), abs=0.01)


def test_a_name_without_a_model_is_one_sentence(tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed here: make test-demo")
    environment = os.environ | {"LDAE_DEMO_MODEL": str(tmp_path)}
    result = subprocess.run([sys.executable, APP], capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    [line] = result.stderr.strip().splitlines()
    assert line.startswith(f"Error: {tmp_path} is neither a folder nor a repository with a model")


# ---- its environment


def test_what_the_demo_is_tested_with_is_pinned_inside_the_range_that_users_get():
    lines = [line for line in (ROOT / "constraints-demo.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pins = dict(line.split("==") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["optional-dependencies"]["demo"] + project["dependencies"]:
        requirement = Requirement(line)
        assert requirement.name not in pins or pins[requirement.name] in requirement.specifier
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert {line.partition("==")[0] for line in pinned} & pins.keys() == {"pillow"}
