"""A model repository's card, from what lies in its folder and the rows of a ledger; no number in it is typed.

The text is a Jinja template, `model_card.md` beside this file, where an installed package finds it; `model_cards/` of
the source links to it. Names that others chose (of recipes, data sets, classes, files) reach the page through `plain`,
`code` and `line` only, which leave nothing in them that markdown or HTML would act upon.
"""

import json
import math
import re
import shlex
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import validate_repo_id
from jinja2 import TemplateError

from ..manifest import MANIFEST, manifest_text, read_manifest, sha256, write_text
from .facts import PLANNED, CardFacts, encoder_parameters, folded_parameters, planned_facts, read_facts
from .results import Result, paper_and_ours


CARD, RESULTS, EVAL_RESULTS = "README.md", "results.jsonl", ".eval_results"
UNKNOWN_DATA = {
    "hub_id": None,
    "licence": {"license": "unknown"},
    "terms": "This card does not know their terms: ask their owners before you use the model.",
    "scope": "these images",
}


def render_card(facts: CardFacts, repo_id: str | None = None, rows: Iterable[dict] = ()) -> str:
    """The card's text; the same for the same arguments.

    Args:
        repo_id: `owner/name` on the Hub; None for a folder, or a checkpoint that is only planned.
        rows: of a ledger; those of this model are shown.

    Raises:
        ValueError: `repo_id` is no owner/name, or a row of this model is no result.
    """
    if repo_id is not None:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise ValueError(f"{repo_id!r} names no owner; write OWNER/NAME.")
    recipe, config, results = facts.recipe, facts.config, facts.results(rows)
    name = line(repo_id.partition("/")[2] if repo_id else facts.name)
    accuracies = [result for result in results if result.is_accuracy]
    trained_on = facts.training.get("dataset") or (recipe and recipe.data["dataset"])
    data_name = trained_on or "images that nothing here names"
    data = data_terms().get(str(data_name), {"title": title(data_name)} | UNKNOWN_DATA)
    try:
        card = ModelCard.from_template(
            _metadata(facts, name, data, results),
            template_path=str(Path(__file__).with_suffix(".md")),
            f=facts,
            c=config,
            recipe=recipe,
            name=name,
            address=json.dumps(repo_id or f"{'path/to' if facts.has_weights else 'OWNER'}/{name}"),
            on_hub=repo_id is not None or not facts.has_weights,
            parameters=encoder_parameters(config),
            folded=folded_parameters(config),
            learned_labels=facts.tokenizer_learned_labels,
            data=data,
            training=_numbers_checked(next((r.row["training"] for r in accuracies), {}) | facts.training),
            results=results,
            table=paper_and_ours(recipe, results) if recipe else [],
            accuracies=list({result.name: result for result in reversed(accuracies)}.values())[::-1],  # one of each
            distances=[result for result in results if result.floors and not result.is_accuracy],
            pictures=sorted(filter(_is_picture, facts.files)),
            **dict(plain=plain, code=code, line=line, argument=argument, quote=quote, title=title),
        )
    except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError, TemplateError) as error:
        files = "recipe.json, training.json, exports.json"
        raise ValueError(f"The files of {name} ({files}), or its rows, hold what no card can show: {error}.") from error
    return re.sub(r"\n{3,}", "\n\n", str(card)).strip() + "\n"


def write_card(folder: str | Path, repo_id: str | None, rows: Iterable[dict] = ()) -> None:
    """Writes `README.md`, `results.jsonl` and `.eval_results/` into a model repository's folder.

    Arguments and errors are those of `read_facts` and `render_card`. In a folder without a model, the name of which is
    that of a planned checkpoint, it writes the card of that.
    """
    folder, rows = Path(folder), list(rows)
    there = (folder / "config.json").exists() or folder.name not in PLANNED
    facts = read_facts(folder) if there else planned_facts(folder.name)
    text, results = render_card(facts, repo_id, rows), facts.results(rows)
    generated = {}
    if results:
        generated[RESULTS] = "".join(json.dumps(result.row, ensure_ascii=False) + "\n" for result in results)
    for task in dict.fromkeys(result.task for result in results if hub_id(result)):
        entries = [_entry(result) for result in results if result.task == task and hub_id(result)]
        content = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
        generated[f"{EVAL_RESULTS}/{task}.yaml"] = content
    before = [RESULTS, *(f"{EVAL_RESULTS}/{file.name}" for file in (folder / EVAL_RESULTS).glob("*.yaml"))]
    folder.mkdir(parents=True, exist_ok=True)
    for name in before:
        (folder / name).unlink(missing_ok=True)
    for name, content in {CARD: text, **generated}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    if (folder / MANIFEST).exists():
        digests = {name: digest for name, digest in read_manifest(folder).items() if name not in before}
        digests |= {name: sha256(folder / name) for name in generated}
        write_text(folder / MANIFEST, manifest_text(digests))


def line(value) -> str:
    """Anything as one line of text."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(value)).split())


def argument(value) -> str:
    """Anything as one argument of a command."""
    return shlex.quote(line(value))


def plain(value) -> str:
    """Anything as one line in which markdown and HTML find nothing to act upon."""
    return re.sub(r"[\\`*_\[\]<>&|~#!$@\"]|(?<=www)\.|(?<=:)/", lambda match: f"&#{ord(match[0])};", line(value))


def code(value) -> str:
    """The same in the face of code; names as we write them stay readable in the source."""
    return f"`{value}`" if re.fullmatch(r"[\w.,=:/-]+", str(value), re.ASCII) else f"<code>{plain(value)}</code>"


@cache
def data_terms() -> dict[str, dict]:
    """What is known of data sets, by their names in recipes."""
    return yaml.safe_load(Path(__file__).with_name("data_terms.yaml").read_text(encoding="utf-8"))


def title(name) -> str:
    """A data set's name for people, as plain text."""
    return data_terms().get(str(name), {"title": plain(name)})["title"]


def hub_id(result: Result) -> str | None:
    """The Hub's name of the data set that a number was measured on."""
    return data_terms().get(str(result.dataset[0]), UNKNOWN_DATA)["hub_id"]


def _is_picture(file: str) -> bool:
    return file.isprintable() and re.fullmatch(r"pictures/[^/]+\.png", file) is not None


def _metadata(facts: CardFacts, name: str, data: dict, results: list[Result]) -> ModelCardData:
    supervised = facts.config.num_classes is not None or facts.labels or facts.tokenizer_learned_labels
    tags = ["ldae", "l-dae", "denoising-autoencoder", "vision-transformer", "arxiv:2401.14404"]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification" if facts.labels else "image-feature-extraction",
        tags=tags + ([] if supervised else ["self-supervised-learning"]),
        datasets=[data["hub_id"]] if data["hub_id"] else None,
        metrics=["accuracy"] if any(result.is_accuracy for result in results) else None,
        model_name=name if results else None,
        eval_results=[_eval_result(result) for result in results] or None,
        **data["licence"],
    )


def _eval_result(result: Result) -> EvalResult:
    dataset, split = result.dataset
    kind = ("unconditional-image-generation" if result.floors else "image-feature-extraction", result.task)
    task, metric = ("image-classification", "accuracy") if result.is_accuracy else kind
    where = dict(dataset_type=hub_id(result) or line(dataset), dataset_name=title(dataset), dataset_split=split)
    name = line(f"{result.what} ({result.protocol})")
    return EvalResult(task_type=task, **where, metric_type=metric, metric_name=name, metric_value=result.value)


def _entry(result: Result) -> EvalResultEntry:
    notes = line(f"{result.what}: {result.protocol}")
    return EvalResultEntry(hub_id(result), result.task, result.value, date=result.row.get("time"), notes=notes)


def _numbers_checked(training: dict) -> dict:
    """Without what should be a number and is none."""
    numbers = ("steps", "images_seen", "minutes", "threads")
    given = {key: training[key] for key in numbers if key in training}
    wrong = [key for key, value in given.items() if type(value) not in (int, float) or not math.isfinite(value)]
    return {key: value for key, value in training.items() if key not in wrong}
