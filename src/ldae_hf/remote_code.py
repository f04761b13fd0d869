"""The files with which a saved model loads where this package is not installed, through `trust_remote_code=True`."""

import json
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME


# What each Auto class makes of a folder: `auto_map` in the JSON file from which transformers reads it.
AUTO_MAPS = {
    CONFIG_NAME: {
        "AutoConfig": "configuration_ldae.LDAEConfig",
        "AutoModel": "modeling_ldae.LDAEModel",
        "AutoModelForPreTraining": "modeling_ldae.LDAEForPreTraining",
        "AutoModelForImageClassification": "modeling_ldae.LDAEForImageClassification",
        "AutoBackbone": "backbone_ldae.LDAEBackbone",
    },
    # As a list, a form that transformers knows too: of a name alone its pipelines make a video processor's, which is
    # none of ours, and ask the user whether to run the code of that.
    IMAGE_PROCESSOR_NAME: {"AutoImageProcessor": ["image_processing_ldae.LDAEImageProcessor"]},
}


def remote_code_files() -> list[Path]:
    """The modules that `AUTO_MAPS` names and what they import of this package: flat siblings, as transformers asks."""
    package = Path(__file__).parent
    references = [*AUTO_MAPS[CONFIG_NAME].values(), *AUTO_MAPS[IMAGE_PROCESSOR_NAME]["AutoImageProcessor"]]
    named = {reference.split(".")[0] for reference in references}
    files = {package / f"{module}.py" for module in named}
    files |= {Path(needed) for file in files for needed in get_relative_import_files(file)}
    return sorted(files)


def write_auto_maps(folder: str | Path) -> list[Path]:
    """Names our classes in the folder's `config.json` and `preprocessor_config.json`, where there is one.

    Enough for a subfolder of a repository: transformers looks for the code at the repository's root.
    """
    written = []
    for name, auto_map in AUTO_MAPS.items():
        file = Path(folder) / name
        if file.exists():
            content = {**json.loads(file.read_text(encoding="utf-8")), "auto_map": auto_map}
            file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            written.append(file)
    return written


def write_remote_code(folder: str | Path) -> list[Path]:
    """Makes a saved model, processor or both loadable without this package; returns the files that were written.

    The classes of an installed and imported ldae_hf win over these files. Call it again after the model or its
    processor was saved into the folder anew.

    Raises:
        FileNotFoundError: the folder holds neither a model nor a processor.
    """
    written = write_auto_maps(folder)
    if not written:
        raise FileNotFoundError(
            f"{folder} holds neither {CONFIG_NAME} nor {IMAGE_PROCESSOR_NAME}; save the model and its processor there "
            "first."
        )
    return written + [Path(shutil.copy(file, folder)) for file in remote_code_files()]


__all__ = ["write_remote_code", "write_auto_maps"]
