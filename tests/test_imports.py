"""Who may import whom (downhill only), and where each heavy dependency may come in (one door)."""

import ast
import importlib
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import ldae_hf


PACKAGE = Path(ldae_hf.__file__).parent

# Room (a module or a folder of the package) -> the rooms below it. "ldae_hf" is the package itself: its public names.
LEAVES = {"configuration_ldae", "noise_schedules", "patch_tokenizers", "patch_covariance"}
IMAGES = {"images"}
PARTS = {"layers_ldae", "loading_ldae", "prediction_targets"}
MODELS = LEAVES | PARTS | IMAGES | {"modeling_ldae", "image_processing_ldae", "backbone_ldae"}
BESIDE_THE_MODELS = {"scheduling_ldae", "latent_tokenizers", "pipeline_ldae"}  # they need diffusers
FOLDERS = {"manifest", "golden"}  # what makes a folder checkable
HUB = {"hub", "hub_names", "patience"}  # what touches the network
MAY_IMPORT = {
    "manifest": set(),
    "progress": set(),
    "golden": {"modeling_ldae"},
    "configuration_ldae": set(),
    "noise_schedules": {"configuration_ldae"},
    "patch_tokenizers": {"configuration_ldae"},
    "patch_covariance": {"configuration_ldae"},
    "weights": set(),
    "loading_ldae": {"configuration_ldae"},
    "layers_ldae": {"configuration_ldae"},
    "prediction_targets": {"configuration_ldae", "noise_schedules", "patch_tokenizers"},
    "modeling_ldae": LEAVES | PARTS,
    "backbone_ldae": LEAVES | PARTS | {"modeling_ldae"},
    "images": set(),
    "image_processing_ldae": LEAVES | IMAGES,
    "scheduling_ldae": {"configuration_ldae", "noise_schedules"},
    "latent_tokenizers": {"configuration_ldae", "patch_tokenizers"},
    "pipeline_ldae": MODELS | {"scheduling_ldae", "latent_tokenizers"},
    "patience": set(),
    "hub_names": set(),
    "hub": {"hub_names", "patience"},
    "ldae_hf": MODELS | BESIDE_THE_MODELS | {"hub_names"},
    "recipes": {"configuration_ldae"},
    "remote_code": set(),
    "export": MODELS | {"manifest", "progress"},
    "cards": MODELS | {"manifest", "recipes"},
    "model_checks": MODELS | {"golden", "latent_tokenizers", "progress", "recipes"},
    "verify": {"manifest", "golden", "model_checks", "image_processing_ldae", "latent_tokenizers"}
    | {"scheduling_ldae", "export"},
    "training": MODELS | BESIDE_THE_MODELS | FOLDERS | HUB | {"export", "ldae_hf", "recipes", "progress"},
    "repository": MODELS
    | BESIDE_THE_MODELS
    | FOLDERS
    | HUB
    | {"cards", "export", "model_checks", "progress", "remote_code", "training"},
    "evaluation": MODELS | BESIDE_THE_MODELS | FOLDERS | {"export", "ldae_hf", "recipes", "progress", "training"},
    "reproduction": {"configuration_ldae", "latent_tokenizers", "manifest", "recipes", "training", "evaluation"},
}
MAY_IMPORT["cli"] = {room for room in MAY_IMPORT if not room.endswith("_ldae")}

# Dependency -> the rooms that may know it. torchvision and timm break other parts of the stack just by being there.
DOORS = {
    "diffusers": {"scheduling_ldae", "latent_tokenizers", "pipeline_ldae"},
    "accelerate": {"training", "evaluation"},
    "datasets": {"training", "evaluation"},
    "matplotlib": {"evaluation", "reproduction"},
    "typer": {"cli"},
    "timm": {"evaluation", "export"},
    "torchvision": set(),
}

# What travels to the Hub for trust_remote_code.
REMOTE_CODE = sorted(MODELS)


def room_of(module: str) -> str:
    """The room of a dotted module name inside the package; "ldae_hf" for the package itself."""
    return module.split(".")[1] if "." in module else module


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    names = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = ("ldae_hf", *file.relative_to(PACKAGE).with_suffix("").parts)
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


def imported_modules(name: str, file: Path) -> set[str]:
    """Absolute dotted names of all that a file imports, inside functions and `try` too."""
    found = set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            # `from ldae_hf import cli` names a module, `from ldae_hf import LDAEModel` a public name.
            found.update(f"{base}.{a.name}" if f"{base}.{a.name}" in modules() else base for a in node.names)
    return found


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_what_lies_below_it(name):
    room = room_of(name)
    assert room in MAY_IMPORT, f"{name} is new: say in this file what it may import"
    inside = {m for m in imported_modules(name, modules()[name]) if m.split(".")[0] == "ldae_hf"}
    uphill = {m for m in inside if room_of(m) not in MAY_IMPORT[room] | {room}}
    assert not uphill, f"{name} imports {', '.join(sorted(uphill))}, which lies above it or beside it"


@pytest.mark.parametrize("dependency", DOORS)
def test_a_heavy_dependency_comes_in_through_its_own_door(dependency):
    users = {
        name
        for name, file in modules().items()
        if dependency in {imported.split(".")[0] for imported in imported_modules(name, file)}
    }
    assert {room_of(name) for name in users} <= DOORS[dependency], f"{dependency} is imported by {sorted(users)}"


def test_the_arrows_have_no_cycle():
    below = {room: set(rooms) for room, rooms in MAY_IMPORT.items()}
    while below:
        bottom = {room for room, rooms in below.items() if not rooms}
        assert bottom, f"{', '.join(sorted(below))} may import each other in a circle"
        below = {room: rooms - bottom for room, rooms in below.items() if room not in bottom}


@pytest.mark.parametrize("module", REMOTE_CODE)
def test_remote_code_needs_no_training_library_and_no_file_that_stays_behind(module):
    file = PACKAGE / f"{module}.py"
    # transformers counts every import outside a `try`, function-local ones too, and refuses to load without them.
    required = set(get_imports(file))
    assert not required & {"diffusers", "datasets", "accelerate", "ldae_hf"}
    siblings = {Path(sibling).stem for sibling in get_relative_import_files(file)}
    assert siblings <= set(REMOTE_CODE)
    assert "from __future__ import annotations" not in file.read_text(encoding="utf-8")  # it breaks `config_class`


def test_importing_the_package_adds_none_of_diffusers_datasets_accelerate():
    # transformers itself imports accelerate where it is installed, so what counts is what the package adds.
    script = (
        "import sys\n"
        "from transformers import AutoImageProcessor, AutoModel, PreTrainedModel\n"
        "before = set(sys.modules)\n"
        "import ldae_hf\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    added = set(result.stdout.split())
    assert "ldae_hf" in added
    assert not added & set(DOORS)


def test_every_public_name_resolves():
    siblings = [importlib.import_module(module.name) for module in pkgutil.iter_modules([str(PACKAGE)], "ldae_hf.")]
    for module in (ldae_hf, *siblings):
        for name in getattr(module, "__all__", ()):
            assert getattr(module, name) is not None, f"{module.__name__}.{name}"
    assert set(ldae_hf.__all__) == set(dir(ldae_hf))


def test_a_name_that_the_package_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'LDAEModell'"):
        ldae_hf.LDAEModell  # noqa: B018
