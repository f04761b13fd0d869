"""The YAML files of recipes and tiers: found by name and read strictly. A key that we do not know is an error."""

import re
from copy import deepcopy
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import yaml


FOLDER = Path(__file__).parent
SECTIONS = ("model", "tokenizer", "data", "train", "eval")
PAPER_KEYS = ("table", "text", "linear_probe_top1", "fine_tune_top1", "fid", "protocol")
MAX_BYTES = 65_536  # no recipe comes near


class RecipeError(ValueError):
    """A recipe, tier or override that cannot be used; the message names the file and the key."""


def recipe_names() -> list[str]:
    """The packaged recipes, the members of sweeps among them."""
    return list(_packaged("recipe", FOLDER)[0])


def sweep_names() -> list[str]:
    """The packaged sweeps: curves, of which each point is a recipe."""
    return list(_packaged("recipe", FOLDER)[1])


def sweep_members(name: str) -> list[str]:
    """The recipes of a sweep, in the order of its file.

    Raises:
        RecipeError: no sweep has this name.
    """
    return [f"{name}_{label}" for label in read_sweep(name)["sweep"]]


def read_sweep(name: str) -> dict:
    """The keys of a sweep's file: `parent`, `why`, `paper` and `sweep`, with its `name` and `file`.

    Raises:
        RecipeError: no sweep has this name.
    """
    sweeps = _packaged("recipe", FOLDER)[1]
    if name not in sweeps:
        raise RecipeError(f"sweep {name!r} is unknown{nearest(name, sweeps)}")
    return deepcopy(sweeps[name])


def tier_names() -> list[str]:
    """The packaged tiers."""
    return [file.stem for file in _files("tier", FOLDER)]


def nearest(name, names) -> str:
    """The end of an error's sentence: the likely name, or all of them where they are few."""
    names = [str(known) for known in names]
    if near := get_close_matches(str(name), names, n=1):
        return f"; did you mean {near[0]!r}?"
    return f"; choose one of {', '.join(names)}." if len(names) <= 12 else "."


def read(name: str, kind: str, asked_by: Path | None = None) -> dict:
    """What a recipe or tier says.

    Args:
        name: a packaged recipe or tier, or the path of the user's own `.yaml` file.
        kind: `"recipe"` or `"tier"`.
        asked_by: the file whose parent this is; a parent is a packaged recipe, never a path.

    Returns:
        The file's keys, `parent`, `paper` and `change` filled in where absent, with its `name` and `file`. Of a sweep's
        member, the sweep's `parent`, `why` and `file`, its own `change`, and the `paper` keys of both.

    Raises:
        RecipeError: no such file, not YAML, keys that do not belong there, or the name of a sweep.
    """
    packaged, sweeps = _packaged(kind, FOLDER)
    if name in packaged:  # a name is looked up, never joined to a path
        return deepcopy(packaged[name])
    where = f"{asked_by}: parent" if asked_by else kind
    if name in sweeps:
        raise RecipeError(f"{where} {name!r} is a sweep; choose one of its members, {', '.join(sweep_members(name))}.")
    if asked_by or not str(name).endswith((".yaml", ".yml")):
        raise RecipeError(f"{where} {name!r} is unknown{nearest(name, [*packaged, *sweeps])}")
    file = Path(name)
    if file.stem in packaged or file.stem in sweeps:
        raise RecipeError(f"{file}: a packaged {kind} is called {file.stem!r}; give your file another name.")
    return _read_file(file, kind, own=True)


@cache  # the packaged files do not change while a program runs
def _packaged(kind: str, folder: Path) -> tuple[dict[str, dict], dict[str, dict]]:
    """The packaged recipes or tiers by name, and the sweeps by name; not to be changed by the caller."""
    recipes, sweeps, taken = {}, {}, {}
    for file in _files(kind, folder):
        content = _read_file(file, kind)
        members = {member["name"]: member for member in _members(content)} if "sweep" in content else {}
        for name in (file.stem, *members):
            if name in taken:
                raise RecipeError(f"{file}: the name {name!r} is taken by {taken[name]}; choose another.")
            taken[name] = file
        recipes |= members or {file.stem: content}
        if members:
            sweeps[file.stem] = content
    return recipes, sweeps


def _read_file(file: Path, kind: str, own: bool = False) -> dict:
    """One file, checked; `own` is the user's, which is neither the root nor a sweep."""
    try:
        content = file.read_bytes()
    except (OSError, ValueError) as error:  # a NUL in a path is a ValueError
        raise RecipeError(f"{kind} {file} cannot be read: {getattr(error, 'strerror', error)}.") from error
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{file}: {len(content)} bytes are too many for a {kind}.")
    content = parse(content, file)
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: a {kind} is a mapping of keys to values.")
    if kind == "tier":
        needed = {"why": str, "change": dict}
    elif own and "sweep" in content:
        raise RecipeError(f"{file}: a sweep's members could not be named; write one file with a `change` for each.")
    elif not own and "parent" not in content:
        needed = {"why": str, **dict.fromkeys(SECTIONS, dict)}
    else:
        needed = {"parent": str, "why": str, "sweep" if "sweep" in content else "change": dict}
    _check(content, file, needed, {"paper": dict} if kind == "recipe" else {})
    return {"parent": None, "paper": {}, "change": {}, **content, "name": file.stem, "file": file}


def _members(sweep: dict) -> list[dict]:
    """The recipes of a sweep's file, checked."""
    members = []
    for label, member in sweep["sweep"].items():
        where = f"{sweep['file']}: sweep.{label}"
        if not re.fullmatch("[a-z0-9.]+", str(label)):
            raise RecipeError(f"{where} must be a plain word or number, of a-z, 0-9 and the point.")
        if not isinstance(member, dict):
            raise RecipeError(f"{where} must be a mapping with change and paper, not {member!r}.")
        _check(member, where, {"change": dict}, {"paper": dict})
        paper = sweep["paper"] | member.get("paper", {})
        shared = {key: sweep[key] for key in ("parent", "why", "file")}
        members.append({**shared, "name": f"{sweep['name']}_{label}", "paper": paper, "change": member["change"]})
    return members


def _check(content: dict, where, needed: dict[str, type], optional: dict[str, type]) -> None:
    """Raises RecipeError unless the keys are these, of these types, not empty."""
    for key, value in content.items():
        expected = {**needed, **optional}.get(key)
        if expected is None:
            raise RecipeError(f"{where}: key {key!r} is unknown{nearest(key, [*needed, *optional])}")
        if not isinstance(value, expected) or not value:
            raise RecipeError(f"{where}: {key} must be a {'text' if expected is str else 'mapping'}, not {value!r}.")
    if missing := [key for key in needed if key not in content]:
        raise RecipeError(f"{where}: {', '.join(missing)} missing.")
    for key, value in content.get("paper", {}).items():
        if key not in PAPER_KEYS:
            raise RecipeError(f"{where}: paper.{key} is unknown{nearest(key, PAPER_KEYS)}")
        if type(value) not in (int, float, str):
            raise RecipeError(f"{where}: paper.{key} must be a number or a text, not {value!r}.")


def parse(text: str | bytes, where):
    """Parses YAML of plain types; `where` names its origin in an error."""
    try:
        return yaml.load(text, _StrictLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{where}: not the YAML of a recipe: {reason}") from error


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without aliases, and without keys written twice, of which PyYAML silently keeps the last."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is written twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, takes 1e-4 for a text: it wants 1.0e-4.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _files(kind: str, folder: Path) -> list[Path]:
    tiers = folder / "tiers"
    return [file for file in sorted(folder.rglob("*.yaml")) if (tiers in file.parents) == (kind == "tier")]
