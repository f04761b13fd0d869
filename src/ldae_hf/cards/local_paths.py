"""What is published names no folder of the machine that it comes from: of an absolute path the last name is left."""

import re
import shlex


COMMANDS = ("command", "rerun")  # in rows of a ledger
START = r"(?:file:/*|~[\w.-]*)?/|[A-Za-z]:[\\/]"
ABSOLUTE = re.compile(rf"(?P<option>[\w.-]+=)?(?P<path>(?:{START}).*)", re.DOTALL)
IN_A_SENTENCE = re.compile(r"(?<![^\s='\"(\[,])~?/(?:[^\s'\"/]+/)+[^\s'\"),\]]*")


def without_paths(value):
    """A JSON value in whose texts every absolute path is "path/to/" and its last name.

    Raises:
        ValueError: it is nested too deeply.
    """
    try:
        return _public(value, None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _public(value, key: str | None):
    """`key`: under which the value was found; a command is looked at word by word."""
    if isinstance(value, dict):
        return {name: _public(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [_public(each, key) for each in value]
    if not isinstance(value, str):
        return value
    if key not in COMMANDS:
        return _shown(value)
    try:
        words = shlex.split(value)
    except ValueError:  # no shell would take it
        return IN_A_SENTENCE.sub(lambda match: _short(match[0]), value)
    shown = [_shown(word) for word in words]
    return value if shown == words else shlex.join(shown)


def _shown(text: str) -> str:
    """A path, an option's value or an override that is one, or a sentence with paths in it."""
    if match := ABSOLUTE.fullmatch(text):
        return (match["option"] or "") + _short(match["path"])
    return IN_A_SENTENCE.sub(lambda match: _short(match[0]), text)


def _short(path: str) -> str:
    return "path/to/" + re.split(r"[\\/]", path.rstrip("\\/"))[-1]
