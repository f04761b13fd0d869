"""Which numbers may stand side by side: what of two protocols must be equal, and what to say where it is not."""

import json
from collections.abc import Sequence
from functools import cache

from ..recipes import Recipe, RecipeError, load_recipe


# What belongs to the encoder and not to the measurement, with its pixel statistics, which stand in `preprocessing` too.
ENCODERS_OWN = {f"features.{key}" for key in ("encoder", "library", "processor", "norm", "mean", "std")}
SEEDS = {"seed", "floors_seed"}  # chance, not protocol
# `datasets` makes its fingerprint of paths and times: the same images elsewhere have another.
FILES = {f"{name}.fingerprint" for name in ("train", "test", "reference", "floors")}
OWN_TIMESTEP = "the recipe's"


def comparable_protocol(row: dict) -> dict:
    """What the protocols of two rows must have in common to be compared: plain values by dotted names.

    A pool counts without the norm that belongs to the encoder, preprocessing without mean and std. The timestep of
    features is the recipe's own, or none in an encoder without timesteps, or else a number that must be equal.
    """
    values = flat(row["protocol"])
    values["features.timestep"] = _timestep(row)
    values["features.noise"] = str(values.get("features.noise") or "clean").partition(", seed")[0]
    norm = values.get("features.norm", "LayerNorm without affine")  # rows of l-DAE once named no norm but in the pool
    pools = values.get("features.pool")
    pools = [str(pool).removesuffix(f" {norm}") for pool in (pools if isinstance(pools, list) else [pools])]
    values["features.pool"] = ", ".join(pools)
    values["preprocessing"] = str(values.get("preprocessing")).partition("; mean")[0]
    own = ENCODERS_OWN | FILES
    return {key: value for key, value in values.items() if key not in own and key.rpartition(".")[2] not in SEEDS}


def signature(row: dict) -> str:
    """`comparable_protocol` as text, with the task: equal if two rows may be compared."""
    return json.dumps({"task": row["task"]} | comparable_protocol(row), sort_keys=True, ensure_ascii=False)


def floor_signature(row: dict) -> str:
    """The same of what a floor's own row shares with an encoder's: all but features, and the layer decay that only
    pre-trained layers need."""
    values = comparable_protocol(row) | {"task": row["task"]}
    kept = {key: value for key, value in values.items() if not key.startswith("features.") and "layer_decay" not in key}
    return json.dumps(kept, sort_keys=True, ensure_ascii=False)


def differences(first: dict, second: dict) -> dict[str, tuple]:
    """The names whose values differ, with both values; None stands for what one of them does not have."""
    names = dict.fromkeys([*first, *second])
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def refusal(task: str, first: tuple[str, Sequence[dict]], second: tuple[str, Sequence[dict]]) -> str:
    """Why two groups, each a name and its rows of this task, have no number in common: of the two rows that are most
    alike the keys with both values, both commands, and what to do."""
    pairs = [(one, other) for one in first[1] for other in second[1]]
    found = [differences(*map(comparable_protocol, pair)) for pair in pairs]
    place = min(range(len(pairs)), key=lambda index: len(found[index]))
    keys = [f"{key} is {_shown(one)} and {_shown(other)}" for key, (one, other) in found[place].items()]
    more = f" (and {len(keys) - 3} more)" if len(keys) > 3 else ""
    commands = [row.get("rerun") or row["command"] for row in pairs[place]]
    return (
        f"The {task} of {first[0]} and {second[0]} were measured differently, so they are not compared: in their "
        f"protocols {'; '.join(keys[:3])}{more}. The commands were `{commands[0]}` and `{commands[1]}`. Measure one of "
        "them again with the options of the other (`ldae results list` numbers the rows), or choose other tasks with "
        "--task."
    )


def flat(values: dict, above: str = "") -> dict:
    """Nested dicts as one, by dotted names."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def recipes_value(row: dict, key: str):
    """What the recipe of a row says of `section.key` at its tier, before overrides; None where nobody knows it."""
    section, _, name = key.partition(".")
    recipe = _recipe(row.get("recipe"), row.get("tier"))
    return recipe and getattr(recipe, section, {}).get(name)


@cache
def _recipe(name: str | None, tier: str | None) -> Recipe | None:
    try:
        return load_recipe(name, tier) if name else None
    except RecipeError:  # the recipe or the tier was a file of the user's own
        return None


def _timestep(row: dict) -> int | str:
    timestep, own = row["protocol"]["features"].get("timestep"), recipes_value(row, "model.feature_timestep")
    return OWN_TIMESTEP if timestep is None or own is None or timestep == own else timestep


def _shown(value) -> str:
    return "not recorded" if value is None else json.dumps(value, ensure_ascii=False)
