"""The groups of a comparison: which rows of a ledger, and which folders of runs, a recipe, a folder or a name means."""

import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from ..recipes import recipe_names
from .protocols import recipes_value, signature


UNKNOWN = "null"  # what neither the recipe nor an override says, as text


@dataclass(frozen=True)
class Group:
    """What `ldae compare` was given as one side.

    Attributes:
        name: as it was given. recipe: of its rows; None if they are found by encoder or name.
        overrides: that its rows have, and no others, by key. folders: of runs, whose encoders (fingerprints) count.
        rows: of the ledger, oldest first.
    """

    name: str
    recipe: str | None = None
    overrides: tuple[tuple[str, str], ...] = ()
    folders: tuple[Path, ...] = ()
    encoders: frozenset[str] = frozenset()
    rows: tuple[dict, ...] = ()

    def matches(self, row: dict, free: str | None = None) -> bool:
        """Whether a row is of this group; the override of the key `free`, if one is named, may be any."""
        if self.folders:
            return row["protocol"]["features"].get("encoder") in self.encoders
        if self.recipe is None:
            return row.get("name") == self.name
        if row.get("recipe") != self.recipe:
            return False
        wanted, found = (_that_change(row, texts) for texts in (dict(self.overrides), overrides_of(row)))
        return {**wanted, free: None} == {**found, free: None}

    def with_rows(self, rows: Sequence[dict]) -> "Group":
        return replace(self, rows=tuple(rows))


def parse_group(text: str, rows: Sequence[dict]) -> Group:
    """A recipe's name, `recipe+key=value`, a run's folder or a quoted glob of such, or the name that an encoder was
    evaluated under, as a group without rows.

    Args:
        rows: of the ledger, whose recipes, of a user's own files too, are known by name.

    Raises:
        ValueError: it is none of these, or a folder holds no encoder.
    """
    recipe, *changes = text.split("+")
    if recipe in recipe_names() or any(row.get("recipe") == recipe for row in rows):
        wrong = [change for change in changes if "=" not in change]
        if wrong:
            raise ValueError(f"{text}: write an override as +section.key=value, not {wrong[0]!r}.")
        return Group(text, recipe, tuple(sorted(parse_overrides(changes).items())))
    folders = tuple(Path(found) for found in sorted(glob.glob(text)) if Path(found).is_dir())
    if folders:
        return Group(text, folders=folders, encoders=frozenset(map(encoder_fingerprint, folders)))
    if any(row.get("name") == text for row in rows):
        return Group(text)
    raise ValueError(f"{text} is neither a recipe, nor a folder of a run, nor the name of an encoder in the ledger.")


def encoder_fingerprint(folder: Path) -> str:
    """Of the encoder in a run's folder, or in the folder itself, as its rows are stamped with it.

    Raises:
        ValueError: there is no encoder.
    """
    from .encoders import open_encoder  # it needs torch, and groups of recipes do not

    encoder = folder / "encoder" if (folder / "encoder").is_dir() else folder
    if not (encoder / "config.json").is_file():
        raise ValueError(f"{folder} holds no encoder (encoder/config.json); name a run that has saved one.")
    return open_encoder(encoder, device="cpu").facts["encoder"]


def parse_overrides(texts: Sequence[str] | None) -> dict[str, str]:
    """`key=value` texts by key; numbers that are equal have the same text, however they were written."""
    found = {}
    for text in texts or ():
        key, _, value = text.partition("=")
        try:
            value = f"{float(value):g}"
        except ValueError:
            value = value.strip()
        found[key.strip()] = value
    return found


def overrides_of(row: dict) -> dict[str, str]:
    return parse_overrides(row.get("overrides"))


def _that_change(row: dict, overrides: dict[str, str]) -> dict[str, str]:
    """Those that do not just repeat what the recipe of the row says."""
    return {key: value for key, value in overrides.items() if value != _as_text(recipes_value(row, key))}


def _as_text(value) -> str:
    return parse_overrides([f"={json.dumps(value)}"])[""]


def choose_value(group: Group, rows: Sequence[dict], key: str) -> tuple[Group, str]:
    """The group whose override of `key` has the best held-out accuracy of the linear probe, mean over the seeds that
    all values have.

    The accuracy is that of a part of the training images which the probe was not trained on: no test image chooses.

    Args:
        rows: of the ledger, of one data set; those that differ from the group only in this override compete.

    Returns:
        The group with that override, without rows, and a sentence: what was chosen out of what.

    Raises:
        ValueError: no linear probe of the group, or none that all values have under one protocol and of one seed.
    """
    competing: dict[str, dict[str, dict[int | None, float]]] = {}  # value -> protocol -> seed -> held-out accuracy
    for row in rows:
        if row["task"] == "linear_probe" and group.matches(row, free=key):
            value = overrides_of(row).get(key) or _as_text(recipes_value(row, key))
            seed = (row.get("training") or {}).get("seed")
            competing.setdefault(value, {}).setdefault(signature(row), {})[seed] = held_out_top1(row)
    if not competing:
        raise ValueError(f"{group.name} has no linear probe by which --choose {key} could choose; run `ldae probe`.")
    if list(competing) == [UNKNOWN]:
        raise ValueError(
            f"No linear probe of {group.name} says its {key}; --choose takes the key of an override, such as "
            "train.base_learning_rate."
        )
    shared = [name for name in next(iter(competing.values())) if all(name in found for found in competing.values())]
    if not shared:
        raise ValueError(
            f"{group.name}: the linear probes of {key} = {', '.join(competing)} share no protocol, so none can be "
            "chosen; measure them with the same options of `ldae probe`."
        )
    accuracies = {value: found[shared[-1]] for value, found in competing.items()}
    # A value with more seeds than the others is no better or worse for those that they do not have.
    seeds = set.intersection(*map(set, accuracies.values()))
    if not seeds:
        raise ValueError(
            f"{group.name}: the linear probes of {key} = {', '.join(accuracies)} have no seed in common, so none can "
            "be chosen; train one seed with each value."
        )
    scores = {value: mean(found[seed] for seed in seeds) for value, found in accuracies.items()}
    chosen = max(scores, key=scores.__getitem__)
    listed = ", ".join(f"{value} ({scores[value]:.1f} %)" for value in sorted(scores, key=_number))
    said = f"{group.name}: {key} = {chosen} of {listed}, by held-out accuracy of the linear probe, n = {len(seeds)}"
    overrides = tuple(sorted((dict(group.overrides) | {key: chosen}).items()))
    return replace(group, overrides=overrides), said


def held_out_top1(row: dict) -> float:
    """The accuracy by which a linear probe selected its learning rate, or its combination of a grid."""
    if "grid" in row:
        return max(entry["held_out_top1"] for entry in row["grid"])
    [rate] = [entry for entry in row["learning_rates"] if entry["learning_rate"] == row["learning_rate"]]
    return rate["held_out_top1"]


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return 0.0
