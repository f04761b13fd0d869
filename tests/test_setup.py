import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PINS = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in LINES}
INSTALLED = [line for name in ("train", "eval", "export") for line in EXTRAS[name]]
DECLARED = PROJECT["dependencies"] + [line for group in EXTRAS.values() for line in group]


@pytest.mark.parametrize("line", [*PROJECT["dependencies"], *INSTALLED, *EXTRAS["dev"][1:]])
def test_what_make_installs_is_pinned_inside_the_range_that_users_get(line):
    requirement = Requirement(line)
    assert PINS[canonicalize_name(requirement.name)] in requirement.specifier


def test_constraints_are_exact_and_without_a_local_build():
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in LINES)
    assert len(PINS) == len(LINES)


def test_every_dependency_is_declared_once():
    names = [Requirement(line).name for line in DECLARED]
    assert sorted(set(names)) == sorted(names)


def test_the_ci_script_runs_the_tests_and_is_executable():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make test" in script.read_text()
