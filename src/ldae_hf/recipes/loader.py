"""From a recipe's name to every value of a run.

One recipe, the root, is complete. Every other names its `parent` and the values that it changes; a sweep is a file of
several such recipes, the points of one curve; a tier is an overlay
that translates values for a smaller image set and machine; overrides come from the command line. Only YAML is read
here: nothing is built, and neither torch nor transformers is imported.
"""

import math

from .files import SECTIONS, RecipeError, nearest, parse, read
from .recipe import Recipe


# Keys that may be null, with their types when they are not. Every other key keeps the type that it has in the root.
NULLABLE = {
    "model.num_classes": (int,),
    "model.conditioning_hidden_size": (int, str),
    "model.feature_timestep": (int,),
    "model.mask_ratio": (float,),
    "tokenizer.pretrained": (str,),
    "tokenizer.perceptual_loss": (str,),
    "train.max_grad_norm": (float,),
    "train.ema_half_life_epochs": (float,),
}
# A step that changes the key may change the section too.
TOGETHER = {"model.tokenizer": "tokenizer", "model.mask_ratio": "train"}
# What the other sections accept. The model section is for LDAEConfig to judge, but for what no l-DAE has.
RULES = {
    "model.mask_ratio": (lambda v: v is None or 0 < v < 1, "null (l-DAE), or the share of masked patches, 0 to 1"),
    "tokenizer.fit_patches": (lambda v: v >= 1, "at least 1"),
    "tokenizer.pretrained": (lambda v: v != "", "null (trained here), or a folder or name on the Hub"),
    "tokenizer.stride": (lambda v: v >= 2 and v & (v - 1) == 0, "a power of two, 2 or more"),
    "tokenizer.base_width": (lambda v: v >= 1 and v & (v - 1) == 0, "a power of two"),  # groups of channels divide it
    "tokenizer.residual_blocks": (lambda v: v >= 1, "at least 1"),
    "tokenizer.reconstruction_loss": (lambda v: v in ("l1", "squared"), "l1 or squared"),
    "tokenizer.kl_weight": (lambda v: v >= 0, "0 or more"),
    "tokenizer.perceptual_loss": (
        lambda v: v in (None, "lpips", "labels", "random_labels"),
        "lpips, labels, random_labels or null",
    ),
    "tokenizer.adversarial_weight": (lambda v: v >= 0, "0 (no discriminator) or more"),
    "tokenizer.adversarial_start_epochs": (lambda v: v >= 0, "0 or more"),
    "tokenizer.epochs": (lambda v: v >= 1, "at least 1"),
    "tokenizer.global_batch_size": (lambda v: v >= 1, "at least 1"),
    "tokenizer.learning_rate": (lambda v: v > 0, "above 0"),
    "tokenizer.betas": (lambda v: all(0 <= beta < 1 for beta in v), "two numbers, each 0 or more and below 1"),
    "data.crop": (lambda v: v in ("centre", "random_resized"), "centre or random_resized"),
    "data.crop_scale": (lambda v: 0 < v[0] <= v[1] <= 1, "two shares of the image's area, 0 < smaller <= larger <= 1"),
    "train.epochs": (lambda v: v >= 1, "at least 1"),
    "train.warmup_epochs": (lambda v: v >= 0, "0 or more"),
    "train.global_batch_size": (lambda v: v >= 1, "at least 1"),
    "train.base_learning_rate": (lambda v: v > 0, "above 0"),
    "train.betas": (lambda v: all(0 <= beta < 1 for beta in v), "two numbers, each 0 or more and below 1"),
    "train.weight_decay": (lambda v: v >= 0, "0 or more"),
    "train.max_grad_norm": (lambda v: v is None or v > 0, "null (no clipping) or above 0"),
    "train.ema_half_life_epochs": (lambda v: v is None or v > 0, "null (no EMA) or above 0"),
}


def load_recipe(name: str, tier: str | None = None, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Resolves a recipe: root, then each step's change, then the tier, then the overrides.

    Args:
        name: a packaged recipe, or the path of your own `.yaml` file whose parent is a packaged one.
        tier: a packaged tier, or the path of your own `.yaml` overlay.
        overrides: texts such as `"train.epochs=2"`, read as the type of the value that they replace.

    Raises:
        RecipeError: one sentence that names the file and the key.
    """
    root, *children = steps = _steps(name)
    values = {f"{section}.{key}": value for section in SECTIONS for key, value in root[section].items()}
    origins = {}

    for step in children:
        file, change = step["file"], step["change"]
        new = {key: _typed(key, value, values, file) for key, value in change.items()}
        sections = sorted({key.partition(".")[0] for key in change})
        # Another tokenizer is trained in another way, and so is another method: that is one step.
        together = {key: ["model", section] for key, section in TOGETHER.items() if key in change}
        if len(sections) > 1 and sections not in together.values():
            raise RecipeError(
                f"{file}: change touches {' and '.join(sections)}; a step changes one section, or model and tokenizer "
                "where it changes model.tokenizer."
            )
        for key, value in new.items():
            if value == values[key]:
                raise RecipeError(f"{file}: {key} is already {value!r} in parent {step['parent']}; leave it out.")
        values |= new
        origins |= dict.fromkeys(new, step["name"])

    if tier is not None:
        overlay = read(tier, "tier")
        file, tier = overlay["file"], overlay["name"]
        for key, value in overlay["change"].items():
            _known(key, values, file)
            if isinstance(value, dict):
                if values[key] not in list(value):
                    raise RecipeError(f"{file}: {key} has no translation for {values[key]!r}, the value of {name}.")
                value = value[values[key]]
            elif key in origins:
                raise RecipeError(f"{file}: {key} would hide the change made by {origins[key]}; map the values.")
            values[key], origins[key] = _typed(key, value, values, file), f"tier {tier}"

    for text in overrides:
        where = f"override {text!r}"
        key, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"{where}: write it as section.key=value, for example train.epochs=2.")
        _known(key, values, where)
        if key in NULLABLE or not isinstance(values[key], str):
            value = parse(value, where)
        values[key], origins[key] = _typed(key, value, values, where), "override"

    if values["train.warmup_epochs"] > values["train.epochs"]:
        raise RecipeError(
            f"{name}: train.warmup_epochs={values['train.warmup_epochs']:g} is longer than "
            f"train.epochs={values['train.epochs']}; change both."
        )
    resolved = {section: {} for section in SECTIONS}
    for key, value in values.items():
        section, _, short = key.partition(".")
        resolved[section][short] = value
    head = {key: steps[-1][key] for key in ("name", "parent", "why", "paper")}
    path = [step["name"] for step in steps]
    return Recipe(**head, steps=path, tier=tier, overrides=list(overrides), origins=origins, **resolved)


def _steps(name: str) -> list[dict]:
    """The files on the way from the root to `name`."""
    steps = [read(name, "recipe")]
    while parent := steps[0]["parent"]:
        if parent in [step["name"] for step in steps]:
            raise RecipeError(f"{steps[0]['file']}: parent {parent} closes a circle; the way must end at the root.")
        steps.insert(0, read(parent, "recipe", asked_by=steps[0]["file"]))
    return steps


def _known(key: str, values: dict, where) -> None:
    if key not in values:
        raise RecipeError(f"{where}: key {key!r} is unknown{nearest(key, values)}")


def _typed(key: str, value, values: dict, where):
    """`value` in the type of the one that it replaces, and in its range; an int is welcome where a float belongs."""
    _known(key, values, where)
    old = values[key]
    if isinstance(old, list):
        if not isinstance(value, list) or len(value) != len(old):
            raise RecipeError(f"{where}: {key} must be a list of {len(old)}, like {old!r}; it is {value!r}.")
        kinds, items = (type(old[0]),), value
    else:
        kinds, items = (*NULLABLE[key], type(None)) if key in NULLABLE else (type(old),), [value]
    items = [float(str(item)) if float in kinds and type(item) is int else item for item in items]
    for item in items:
        if type(item) not in kinds or (type(item) is float and not math.isfinite(item)):
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise RecipeError(f"{where}: {key} must be {names}, like {old!r}; it is {value!r}.")
    value = items if isinstance(old, list) else items[0]
    accepts, sentence = RULES.get(key, (lambda _: True, ""))
    if not accepts(value):
        raise RecipeError(f"{where}: {key} must be {sentence}; it is {value!r}.")
    return value
