"""The YAML files of recipes and tiers: found by name and read strictly. A key that we do not know is an error."""

import re
from difflib import get_close_matches
from pathlib import Path

import yaml


FOLDER = Path(__file__).parent
SECTIONS = ("model", "tokenizer", "data", "train", "eval")
PAPER_KEYS = ("table", "text", "linear_probe_top1", "fine_tune_top1", "protocol")
MAX_BYTES = 65_536  # no recipe comes near


class RecipeError(ValueError):
    """A recipe, tier or override that cannot be used; the message names the file and the key."""


def recipe_names() -> list[str]:
    """The packaged recipes."""
    return list(_packaged("recipe"))


def tier_names() -> list[str]:
    """The packaged tiers."""
    return list(_packaged("tier"))


def nearest(name, names) -> str:
    """The end of an error's sentence: the likely name, or all of them where they are few."""
    names = [str(known) for known in names]
    if near := get_close_matches(str(name), names, n=1):
        return f"; did you mean {near[0]!r}?"
    return f"; choose one of {', '.join(names)}." if len(names) <= 12 else "."


def read(name: str, kind: str, asked_by: Path | None = None) -> dict:
    """Reads one file.

    Args:
        name: a packaged recipe or tier, or the path of the user's own `.yaml` file.
        kind: `"recipe"` or `"tier"`.
        asked_by: the file whose parent this is; a parent is a packaged recipe, never a path.

    Returns:
        The file's keys, `parent`, `paper` and `change` filled in where absent, with its `name` and `file`.

    Raises:
        RecipeError: no such file, not YAML, or keys that do not belong there.
    """
    packaged = _packaged(kind)
    if name in packaged:  # a name is looked up, never joined to a path
        file = packaged[name]
    elif str(name).endswith((".yaml", ".yml")) and asked_by is None:
        file = Path(name)
        if file.stem in packaged:
            raise RecipeError(f"{file}: a packaged {kind} is called {file.stem!r}; give your file another name.")
    else:
        where = f"{asked_by}: parent" if asked_by else kind
        raise RecipeError(f"{where} {name!r} is unknown{nearest(name, packaged)}")
    try:
        content = file.read_bytes()
    except (OSError, ValueError) as error:  # a NUL in a path is a ValueError
        raise RecipeError(f"{kind} {file} cannot be read: {getattr(error, 'strerror', error)}.") from error
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{file}: {len(content)} bytes are too many for a {kind}.")
    content = parse(content, file)
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: a {kind} is a mapping of keys to values.")

    optional = {"paper": dict} if kind == "recipe" else {}
    if kind == "tier":
        needed = {"why": str, "change": dict}
    elif file in packaged.values() and "parent" not in content:  # the root
        needed = {"why": str, **dict.fromkeys(SECTIONS, dict)}
    else:
        needed = {"parent": str, "why": str, "change": dict}
    for key, value in content.items():
        expected = {**needed, **optional}.get(key)
        if expected is None:
            raise RecipeError(f"{file}: key {key!r} is unknown{nearest(key, [*needed, *optional])}")
        if not isinstance(value, expected) or not value:
            raise RecipeError(f"{file}: {key} must be a {'text' if expected is str else 'mapping'}, not {value!r}.")
    if missing := [key for key in needed if key not in content]:
        raise RecipeError(f"{file}: {', '.join(missing)} missing.")
    for key, value in content.get("paper", {}).items():
        if key not in PAPER_KEYS:
            raise RecipeError(f"{file}: paper.{key} is unknown{nearest(key, PAPER_KEYS)}")
        if type(value) not in (int, float, str):
            raise RecipeError(f"{file}: paper.{key} must be a number or a text, not {value!r}.")
    return {"parent": None, "paper": {}, "change": {}, **content, "name": file.stem, "file": file}


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


def _packaged(kind: str) -> dict[str, Path]:
    tiers = FOLDER / "tiers"
    files = [file for file in sorted(FOLDER.rglob("*.yaml")) if (tiers in file.parents) == (kind == "tier")]
    return {file.stem: file for file in files}
