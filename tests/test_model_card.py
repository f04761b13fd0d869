import json
import re
import shutil
import tomllib
import warnings
from copy import deepcopy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from typer.testing import CliRunner

from ldae_hf import LDAEConfig
from ldae_hf.cards import model_card
from ldae_hf.cards.facts import PLANNED, folded_parameters, planned_facts, read_facts
from ldae_hf.cards.local_paths import without_paths
from ldae_hf.cards.model_card import code, plain, render_card, write_card
from ldae_hf.cli import app
from ldae_hf.evaluation.ledger import read_ledger
from ldae_hf.hub_names import MODELS
from ldae_hf.manifest import check_folder, write_folder
from ldae_hf.recipes import load_recipe


ROOT = Path(__file__).parent.parent
CARDS = ROOT / "model_cards"
TRAINED = CARDS / "ldae-cifar10"
ROWS = read_ledger(ROOT / "benchmarks" / "results" / "ledger.jsonl")
OWN = [row for row in ROWS if row["tier"] == "cifar10"]
TEMPLATE = Path(model_card.__file__).with_suffix(".md")


@pytest.fixture(scope="module")
def facts():
    return read_facts(TRAINED)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the trained encoder's folder, that a test may change."""
    return shutil.copytree(TRAINED, tmp_path / "ldae-cifar10")


def body(text: str) -> str:
    """What follows the front matter."""
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)


def published(facts):
    """The same as a repository that holds all that one can hold."""
    exported = {"target": "onnx", "output": "last_hidden_state", "size": [32, 48], "batch": 1, "tolerance": 1e-5}
    exported |= {"relative_difference": 6.4e-7, "versions": {"onnxruntime": "1.32.0"}}
    files = facts.files | {"vit/config.json", "timm/config.json", "pretraining/config.json", "pictures/directions.png"}
    exports = [exported, {"target": "timm", "not_measured": "timm cannot be imported here"}]
    return replace(facts, files=files, exports=exports, remote_code=True)


# ---- the cards of this repository


def test_the_cards_of_the_repository_are_what_the_command_writes(tmp_path):
    for name in ("ldae-cifar10", *PLANNED):
        copy = shutil.copytree(CARDS / name, tmp_path / name)
        (copy / "README.md").unlink()
        result = CliRunner().invoke(app, ["card", str(copy), "--ledger", f"{ROOT}/benchmarks/results/ledger.jsonl"])
        assert result.exit_code == 0, result.output
        files = {file.relative_to(copy): file.read_bytes() for file in copy.rglob("*") if file.is_file()}
        committed = {path.relative_to(CARDS / name) for path in (CARDS / name).rglob("*") if path.is_file()}
        assert set(files) == committed
        for file, content in files.items():
            assert content == (CARDS / name / file).read_bytes(), f"run `ldae card model_cards/{name}`: {file} differs"


@pytest.mark.parametrize("name", ["ldae-cifar10", *PLANNED])
def test_every_link_of_a_card_leads_to_a_file_or_a_heading(name):
    text = (CARDS / name / "README.md").read_text()
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)}
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in headings
        elif not target.startswith("https://"):
            assert (CARDS / name / target).is_file(), target


def test_the_template_travels_with_the_package_and_is_seen_beside_the_cards():
    assert (CARDS / "template.md").read_text() == TEMPLATE.read_text()
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["ldae_hf"]
    assert {"cards/model_card.md", "cards/data_terms.yaml"} <= set(data)


# ---- planned checkpoints


@pytest.mark.parametrize(("name", "folded"), [("ldae-vit-b", 85.6), ("ldae-vit-half-l", 151.9), ("ldae-vit-l", 303.1)])
def test_a_planned_card_says_first_that_there_are_no_weights_and_holds_the_papers_numbers_only(name, folded):
    text = (CARDS / name / "README.md").read_text()
    assert body(text).strip().startswith("**No weights exist yet")
    assert f"folded into a plain ViT {folded}M" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| linear probe", "| fine-tuning"))]
    assert all(row[2].strip() == row[3].strip() == "" for row in rows)
    assert str(load_recipe(PLANNED[name]).paper["linear_probe_top1"]) in [row[1] for row in rows]
    assert "does not resolve" in text and "model-index" not in text and not (CARDS / name / ".eval_results").exists()


def test_the_planned_checkpoints_are_those_that_have_short_names():
    assert set(PLANNED) == set(MODELS)


# ---- where the numbers come from


def paths_of(value, path=()):
    """The paths to all numbers in nested JSON."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_of(inner, (*path, key))
    elif type(value) in (int, float):
        yield path


def changed(value, path):
    """A copy in which the number at `path` is another."""
    value = deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] += 3
    return value


SHOWN = {"dim", "top1", "best_top1", "epochs", "batch_size", "k", "temperature", "images", "minutes", "image_size"}
SHOWN |= {"timestep"}
NOT_SHOWN = {
    "learning_rates",
    "grid",
    "variants",
    "fractions",
    "draws",
    "threads",
}  # candidates of a probe; the folder's own word comes before the row's


@pytest.mark.parametrize("number", range(len(OWN)))
def test_a_number_that_changes_in_the_ledger_changes_in_the_card(facts, number):
    before, row = render_card(facts, None, OWN), OWN[number]
    paths = [path for path in paths_of(row) if path[-1] in SHOWN and not NOT_SHOWN & set(path)]
    assert len(paths) > 12
    for path in paths:
        if path[0] == "floors" and path[-1] == "best_top1" or path[:2] == ("floors", "raw pixels"):
            continue
        if number and (path[-1] == "dim" or path[0] == "training"):  # said once, by the first row
            continue
        rows = [changed(row, path) if other is row else other for other in OWN]
        assert render_card(facts, None, rows) != before, path


def test_a_value_that_changes_in_recipe_configuration_or_training_changes_in_the_card(facts):
    before = render_card(facts, None, OWN)
    for section, key, value in [
        ("data", "crop", "random_resized"),
        ("data", "flip", True),
        ("data", "dataset", "imagenette128"),
        ("train", "epochs", 9),
        ("train", "warmup_epochs", 1.0),
        ("train", "global_batch_size", 64),
        ("train", "base_learning_rate", 0.1),
        ("train", "weight_decay", 0.3),
        ("train", "betas", [0.9, 0.5]),
        ("train", "ema_half_life_epochs", 2.0),
        ("train", "max_grad_norm", 1.0),
    ]:
        recipe = replace(facts.recipe, **{section: getattr(facts.recipe, section) | {key: value}})
        assert render_card(replace(facts, recipe=recipe), None, OWN) != before, key
    for key, value in [("image_size", 64), ("num_attention_heads", 2), ("latent_dim", 9), ("num_hidden_layers", 2)]:
        config = LDAEConfig.from_dict(facts.config.to_dict(), **{key: value})
        assert render_card(replace(facts, config=config), None, OWN) != before, key
    assert render_card(replace(facts, training=facts.training | {"images_seen": 1000}), None, OWN) != before


def test_no_number_is_typed_in_the_template():
    text = re.sub(r"\{[{%#].*?[}%#]\}", "", TEMPLATE.read_text(), flags=re.DOTALL).partition("```bibtex")[0]
    # names, code, the batch of one photograph, and the 256 of the paper's images and of the rule for learning rates
    names = ["Apache-2.0", "ImageNet-1k at 256 px", "batch / 256", "float32", "[-1, 1]"]
    for known in (*names, "id2label", "argmax(-1)", "dim=1", "(1, "):
        assert known in text
        text = text.replace(known, "")
    assert re.findall(r"\d+", text) == []


def test_the_front_matter_reads_back_with_every_number():
    card = ModelCard.load(TRAINED / "README.md")
    values = {result.metric_name.partition(" (")[0]: result.metric_value for result in card.data.eval_results}
    assert values == {"linear probe, top-1": OWN[0]["top1"], "20-NN, top-1": OWN[1]["top1"]}
    assert {result.dataset_type for result in card.data.eval_results} == {"uoft-cs/cifar10"}
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-feature-extraction")
    assert (card.data.license, card.data.datasets) == ("other", ["uoft-cs/cifar10"])
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_the_results_stand_in_the_hubs_new_form_too():
    entries = []
    for file in sorted((TRAINED / ".eval_results").glob("*.yaml")):
        entries += parse_eval_result_entries(yaml.safe_load(file.read_text()))
    found = {entry.task_id: (entry.dataset_id, entry.value, entry.date) for entry in entries}
    assert found == {row["task"]: ("uoft-cs/cifar10", row["top1"], row["time"]) for row in OWN}


# ---- which rows are shown, and how


def test_floors_that_are_better_are_said_to_be(facts):
    text = render_card(facts, None, OWN)
    assert "random whitened patches 58.4" in text.partition("## Use")[0]
    assert "**better than it: random whitened patches 58.4**" in text
    weak = [deepcopy(row) for row in OWN]
    for row in weak:
        row["top1"] = 99.0
    assert "better than it:" not in render_card(facts, None, weak)


def test_rows_of_other_trainings_are_not_this_models(facts):
    def other(**changes):
        row = deepcopy(OWN[0])
        for key, value in changes.items():
            (row["training"] if key in row["training"] else row)[key] = value
        row["top1"] = 77.77
        row["protocol"]["features"]["encoder"] = "another"
        return row

    wrong_basis = other()
    wrong_basis["protocol"]["features"]["processor"] = "another"
    rows = [other(seed=1), other(steps=99), other(tier="cpu"), other(tier=None), other(overrides=["train.epochs=9"])]
    text = render_card(facts, None, [*rows, other(recipe="flip"), wrong_basis, other(task="a_new_task")])
    assert "77.8" not in text and "model-index" not in text
    text = render_card(facts, None, [OWN[0], other(seed=1)])
    assert "| **51.4** | 2: 64.6 ±18.7 |" in text


def test_a_number_shares_a_row_with_the_papers_only_if_it_was_measured_alike():
    planned = planned_facts("ldae-vit-l")
    training = {"seed": 0, "steps": 250_000, "images_seen": 512_000_000}
    trained = replace(planned, training=training, files=planned.files | {"model.safetensors"})
    row = deepcopy(OWN[0]) | {"recipe": "size_l", "tier": None, "training": training, "top1": 69.87}
    row["protocol"] |= {"image_size": 256, "test": {**row["protocol"]["test"], "dataset": "ILSVRC/imagenet-1k"}}
    row["protocol"]["features"] |= {"processor": None}
    assert "| linear probe, top-1 | 70.9 | **69.9** | 1 | ImageNet-1k" in render_card(trained, "a/b", [row])
    row["protocol"]["features"]["noise"] = "frozen"
    text = render_card(trained, "a/b", [row])
    assert "| linear probe, top-1 | 70.9 |  |  |" in text and "| linear probe, top-1 |  | **69.9** | 1 |" in text


def test_distances_stand_beside_their_floors_and_are_called_no_fid(facts):
    row = next(row for row in ROWS if row["task"] == "frechet_distance")
    row = row | {key: OWN[0][key] for key in ("recipe", "tier", "training")}
    text = render_card(facts, None, [row])
    assert "FD-10K 210.8, beside its floors: real 0.6" in text and "It is no FID" in text


def test_the_error_of_a_tokenizer_is_shown_with_the_models_that_have_it(facts):
    row = next(row for row in ROWS if row["task"] == "reconstruction")
    config = LDAEConfig.from_dict(facts.config.to_dict(), tokenizer_fingerprint=row["protocol"]["tokenizer"])
    assert "**0.0191**" in render_card(replace(facts, config=config), None, [row])
    assert "0.0191" not in render_card(facts, None, [row])


# ---- where it comes from


def test_a_model_that_began_with_anothers_weights_says_so_and_has_none_of_that_ones_results(facts):
    training = {"seed": 0, "steps": 3120, "start_from": "ab" * 32}
    text = render_card(replace(published(facts), training=training), "a/b", OWN)
    assert "| began with | weights of another training, `abababababab`…" in text
    assert "51.4" not in text and "seen only" not in text and "whatever it was trained on besides" in text
    own = [row | {"training": training, "top1": 33.3} for row in OWN]
    assert "**33.3** | 1 |" in render_card(replace(facts, training=training), "a/b", own + OWN)
    assert "33.3" not in render_card(facts, "a/b", OWN + own)


def test_a_model_of_other_images_names_them_and_trains_on_with_them(facts):
    training = facts.training | {"dataset": "path/to/cats"}
    text = render_card(replace(published(facts), training=training), "a/b", OWN)
    assert "Trained on path/to/cats." in text and "CIFAR-10" not in body(text).partition("## Use")[0]
    assert "ldae pretrain l_dae --tier cifar10 --dataset path/to/cats --start-from a/b" in text
    assert "51.4" not in text and "license: unknown" in text


@pytest.mark.parametrize("loss", ["labels", "lpips"])
def test_a_tokenizer_that_labels_have_taught_is_not_called_self_supervised(facts, loss):
    recipe = replace(facts.recipe, tokenizer=facts.recipe.tokenizer | {"perceptual_loss": loss})
    text = render_card(replace(facts, recipe=recipe), None, ROWS)
    assert "without labels (the perceptual loss of its tokenizer had learned from some)" in text
    assert "self-supervised-learning" in render_card(facts) and "- self-supervised-learning" not in text


# ---- what a folder holds


def test_an_unfinished_training_says_so_first(folder):
    lines = [{"step": 1000, "epoch": 2.5641025}, {"step": 1200, "epoch": 3.0769231}, {"step": 1200, "probe": 40.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12')
    (folder / "training.json").write_text(json.dumps({"seed": 0, "steps": 1200, "images_seen": 153_600}))
    text = render_card(read_facts(folder), None, ROWS)
    assert body(text).strip().startswith("**Unfinished: the weights of step 1,200 of 3,120.**")
    assert "51.4" not in text  # measured on the finished one
    (folder / "training.json").write_text(json.dumps({"seed": 0, "steps": 3120}))
    assert "Unfinished" not in render_card(read_facts(folder), None, ROWS)


def test_a_repository_shows_how_each_of_its_parts_is_loaded_and_how_far_exports_are(facts):
    text = render_card(published(facts), "someone/thing", OWN)
    for line in (
        'AutoModel.from_pretrained("someone/thing", subfolder="vit")',
        'snapshot_download("someone/thing", allow_patterns="timm/*")',
        'AutoModel.from_pretrained("someone/thing", trust_remote_code=True)',
        'LDAEForPreTraining.from_pretrained("someone/thing", subfolder="pretraining")',
        "ldae pretrain l_dae --tier cifar10 --start-from someone/thing",
        "| onnx | 1 × 32×48 | 6.4e-07 | 1e-05 | onnxruntime 1.32.0 |",
        "| timm | | not measured | | timm cannot be imported here |",
        "](pictures/directions.png)",
    ):
        assert line in text
    bare = render_card(replace(facts, exports=[]), "someone/thing", OWN)
    for absent in ('subfolder="', "timm", "trust_remote_code", "## Exports", "## Pictures", "--start-from"):
        assert absent not in bare


def test_an_export_beyond_its_tolerance_is_marked(facts):
    whole = published(facts)
    far = [row | {"relative_difference": value} for value in (2e-4, float("nan")) for row in whole.exports[:1]]
    text = render_card(replace(whole, exports=far))
    assert "**2.0e-04, too far**" in text and "**nan, too far**" in text


def test_code_of_a_repository_is_trusted_only_under_the_name_of_its_owner(facts):
    texts = [render_card(published(facts), "someone/ldae-vit-l", OWN), render_card(published(facts), None, OWN)]
    texts += [(CARDS / name / "README.md").read_text() for name in PLANNED]
    trusting = [line for text in texts for line in text.splitlines() if "trust_remote_code" in line]
    assert len(trusting) == 4  # none of them in the card of a local folder
    assert all(re.search(r'from_pretrained\("[\w-]+/[\w-]+", trust_remote_code=True\)$', line) for line in trusting)


def test_the_lines_of_the_card_run(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.effect_noise((50, 40), 60).convert("RGB").save("photo.jpg")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "to").symlink_to(CARDS)
    found = []
    block = re.search(r"```python\n(.*?)```", (TRAINED / "README.md").read_text(), flags=re.DOTALL)[1]
    exec(block, {"print": lambda *shapes: found.extend(map(tuple, shapes))})
    assert found == [(1, 64, 192), (1, 192)] and str(found[0]) in block and str(found[1]) in block


def test_a_classifier_shows_its_classes_and_no_row_of_the_encoder_it_began_as(folder):
    config = json.loads((folder / "config.json").read_text())
    labels = {str(number): label for number, label in enumerate(["cat", "dog | cat", "<b>"])}
    config |= {"architectures": ["LDAEForImageClassification"], "id2label": labels}
    config |= {"label2id": {label: int(number) for number, label in labels.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    text = render_card(read_facts(folder), None, OWN)
    assert ModelCard(text).data.pipeline_tag == "image-classification"
    assert "`logits` (B, 3): cat, dog &#124; cat, &#60;b&#62; |" in text and "51.4" not in text


def test_a_folder_without_recipe_and_training_still_has_a_card(folder):
    (folder / "recipe.json").unlink()
    (folder / "training.json").unlink()
    text = render_card(read_facts(folder), "a/b", ROWS)
    assert ModelCard(text).data.license == "unknown" and "Nothing was measured." in text


def test_an_encoder_behind_a_convolutional_tokenizer_is_given_it_and_is_not_folded():
    recipe = load_recipe("dit_baseline", "cpu")
    facts = replace(planned_facts("ldae-vit-b"), recipe=recipe, config=recipe.model_config())
    assert folded_parameters(facts.config) is None
    text = render_card(replace(facts, files=frozenset({"model.safetensors"})), "a/b")
    assert 'LearnedTokenizer.from_pretrained("a/b", subfolder="tokenizer")' in text
    assert "trust_remote_code" not in text and "with labels" in text and "It is not the final method." in text


def test_writing_a_card_again_leaves_no_old_result_and_a_manifest_that_holds(folder, tmp_path):
    built = tmp_path / "built"
    write_folder(built, lambda path: shutil.copytree(folder, path, dirs_exist_ok=True), unlisted=("README.md",))
    write_card(built, "a/b", OWN[:1])
    check_folder(built, needed=(".eval_results/linear_probe.yaml", "model.safetensors"))
    assert [file.name for file in (built / ".eval_results").iterdir()] == ["linear_probe.yaml"]
    write_card(built, "a/b")
    check_folder(built)
    assert not list((built / ".eval_results").iterdir())


def test_a_folder_that_is_still_written_aside_has_its_own_name(folder, tmp_path):
    def write(path):
        shutil.copytree(folder, path, dirs_exist_ok=True)
        write_card(path, None, OWN)

    write_folder(tmp_path / "mine", write)
    assert '"path/to/mine"' in (tmp_path / "mine" / "README.md").read_text()


# ---- bad input


class Structure(HTMLParser):
    """The tags of a page, with their addresses."""

    def __init__(self, text: str):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *(value for name, value in attrs if name == "href")))

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")


HOSTILE = [
    "a | b | c",
    "`code` ``` ~~~ **b** _i_ ~~s~~",
    "<script>alert(1)</script> <img src=x onerror=y> &lt; <!--",
    "[l](http://e.example) ![i](x) <http://e.example> https://e.example www.e.example a@e.example",
    "x\n\n# head\n\n---\n- item\n\n    code\n\n```\n",
    "x\r\n---\r\nlicense: mit\r\n---\u2028# h\x00\x1b[1m\x85",
    "{{ 7 * 7 }} {% for x in y %} {# #}",
    "\\| \\` $x$ \ud800 \u202e'\"",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_others_named_breaks_out_of_its_place(facts, text):
    markdown_it = pytest.importorskip("markdown_it")

    def structure(word):
        recipe = replace(facts.recipe, name=word, overrides=[word], why=word, steps=["l_dae", word])
        recipe = replace(recipe, tier=word, data=recipe.data | {"dataset": word, "train_split": word, "crop": word})
        training = facts.training | {"seed": word, "command": word, "commit": word, "machine": {"gpu": word}}
        row = deepcopy(OWN[0]) | {"recipe": word, "tier": word, "overrides": [word], "command": word, "time": word}
        row |= {"floors": {word: row["floors"]["raw pixels"]}, "training": training}
        row["protocol"]["test"] |= {"dataset": word, "split": word}
        row["protocol"] |= {"preprocessing": word}
        exports = [{"target": word, "not_measured": word}]
        picture = word if word.isprintable() and "/" not in word else "other"
        files = facts.files | {f"pictures/{picture}.png", "pictures/never\nshown.png"}
        hostile = replace(facts, name=word, recipe=recipe, training=training, exports=exports, files=files)
        card = render_card(hostile, None, [row])
        metadata = ModelCard(card).data
        assert metadata.license == "unknown" and len(metadata.eval_results) == 1
        page = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(body(card))
        return Structure(page).tags

    assert structure(text) == structure("word")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_label_or_a_reason_is_one_line_without_markup(text):
    for shown in (plain(text), code(text)):
        assert "\n" not in shown and not re.search(r"[|<>`*\[\]]", shown.removeprefix("<code>").removesuffix("</code>"))


@pytest.mark.parametrize("repo_id", ["bare", "a/b/c", "../x", "a/..", 'a/"b', "a/b\n", "", "a/" + 200 * "b", "<b>/x"])
def test_a_name_that_is_none_is_refused(facts, repo_id):
    with pytest.raises(ValueError):
        render_card(facts, repo_id)


@pytest.mark.parametrize("key", ["top1", "floors", "protocol", "recipe"])
def test_a_row_that_is_no_result_is_named(facts, key):
    row = {name: value for name, value in OWN[0].items() if name != key}
    with pytest.raises(ValueError, match=r"2026-11-22.*linear_probe.*`ldae probe`"):
        render_card(facts, None, [row])


@pytest.mark.parametrize("name", ["training.json", "exports.json", "config.json"])
@pytest.mark.parametrize("content", ["{", "3"])
def test_a_broken_file_is_a_users_error(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises((ValueError, OSError)):
        write_card(folder, None)


def test_numbers_that_are_none_are_left_out(folder):
    (folder / "training.json").write_text('{"seed": 0, "steps": "many", "minutes": [], "threads": {}, "machine": 3}')
    assert "many" not in render_card(read_facts(folder), None, OWN)
    (folder / "exports.json").write_text('[{"target": "onnx"}]')
    with pytest.raises(ValueError, match="exports.json"):
        write_card(folder, None)


def test_the_command_names_what_it_cannot_do(tmp_path):
    def error(*arguments):
        result = CliRunner().invoke(app, ["card", *arguments])
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
        return result.stderr

    assert "holds no model" in error(str(tmp_path / "mine"))
    assert "no ledger" in error(str(TRAINED), "--ledger", str(tmp_path / "absent.jsonl"))
    assert "one folder" in error(str(TRAINED), str(TRAINED), "--repo-id", "a/b")


# ---- files and rows that came from elsewhere


NO_JSON = [b"{\n \xff}", b'{\n "steps": }', b"[" * 100_000, b'{"steps": ' + b"1" * 5000 + b"}", b"[" * 900 + b"]" * 900]


@pytest.mark.parametrize("content", NO_JSON, ids=["bytes", "syntax", "brackets", "digits", "nested"])
@pytest.mark.parametrize("name", ["training.json", "recipe.json"])
def test_a_file_that_is_no_json_is_named_in_one_line_with_its_own(folder, name, content):
    (folder / name).write_bytes(content)
    result = CliRunner().invoke(app, ["card", str(folder)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and name in result.stderr
    assert ("line 2" in result.stderr) == (b"\n" in content)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN"])
def test_a_number_that_is_not_finite_is_none(folder, number):
    (folder / "training.json").write_text(f'{{"seed": 0, "steps": {number}, "minutes": {number}, "images_seen": 5}}')
    text = render_card(read_facts(folder))
    assert "inf" not in body(text).split("## Evaluation")[0].split("| length |")[1] and "nan" not in text


def test_a_line_of_the_log_that_is_none_is_left_out_with_a_warning_and_hostile_numbers_without(folder):
    report = '{"step": 3, "epoch": 1}'
    broken = [b"{", b"\xff", b"[" * 100_000]
    epochs = read_facts(folder).recipe.train["epochs"]
    for line in broken:
        (folder / "metrics.jsonl").write_bytes(f"{report}\n".encode() + line)
        with pytest.warns(UserWarning, match="metrics.jsonl: line 2 is no JSON and is left out"):
            assert read_facts(folder).total_steps == 3 * epochs
    hostile = ['{"step": 1e999, "epoch": 1}', '{"step": NaN, "epoch": 2}', '{"step": 1, "epoch": 0}', "[]", "3", ""]
    hostile += ['{"step": "3", "epoch": 2}', f'{{"step": 1{"0" * 400}, "epoch": 0.5}}']
    (folder / "metrics.jsonl").write_text("\n".join([report, *hostile]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_facts(folder).total_steps == 3 * epochs


@pytest.mark.parametrize(
    ("value", "public"),
    [
        ("/home/me/my pictures/", "path/to/my pictures"),
        ("data.dataset=/home/me/pictures", "data.dataset=path/to/pictures"),
        ("~/pictures", "path/to/pictures"),
        ("C:\\Users\\me\\pictures", "path/to/pictures"),
        ("read from /home/me/pictures, then resized", "read from path/to/pictures, then resized"),
        ({"command": "ldae probe '/home/me/my run' --ledger=/home/me/l.jsonl"}, None),
        ({"command": "ldae probe '/home/me/run"}, {"command": "ldae probe 'path/to/run"}),
        ("https://huggingface.co/me/model, and/or 1 / 255", "https://huggingface.co/me/model, and/or 1 / 255"),
        (
            {"command": 'ldae probe  "runs/a"', "n": [1, None, 0.5]},
            {"command": 'ldae probe  "runs/a"', "n": [1, None, 0.5]},
        ),
    ],
)
def test_of_an_absolute_path_the_last_name_is_published_and_all_else_stays(value, public):
    expected = {"command": "ldae probe 'path/to/my run' --ledger=path/to/l.jsonl"} if public is None else public
    assert without_paths(value) == expected


def test_a_row_of_a_model_that_was_trained_on_a_folder_is_found_and_names_no_place(folder, tmp_path):
    place = "/home/somebody/pictures"
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["data"]["dataset"], recipe["overrides"] = place, [f"data.dataset={place}"]
    (folder / "recipe.json").write_text(json.dumps(recipe))
    training = json.loads((folder / "training.json").read_text()) | {"dataset": "path/to/pictures"}
    (folder / "training.json").write_text(json.dumps(training))
    row = deepcopy(OWN[0]) | {"overrides": recipe["overrides"], "command": f"ldae probe {place} --output /a/b.json"}
    row["training"] |= {"dataset": "path/to/pictures"}
    write_card(folder, "a/b", [row])
    assert "ldae probe path/to/pictures --output path/to/b.json" in (folder / "README.md").read_text()
    for name in ("README.md", "results.jsonl"):
        assert "somebody" not in (folder / name).read_text()
