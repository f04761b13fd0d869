"""ldae-hf: latent denoising autoencoders (l-DAE, arXiv 2401.14404) as a Hugging Face model hub package.

Importing this package registers l-DAE with transformers' Auto classes. The names that need diffusers, datasets or
accelerate are loaded at first use.
"""

from importlib import import_module

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)

from . import hub_names
from .backbone_ldae import LDAEBackbone
from .configuration_ldae import SIZES, LDAEConfig
from .image_processing_ldae import LDAEImageProcessor
from .modeling_ldae import LDAEForImageClassification, LDAEForPreTraining, LDAEModel


__version__ = "0.1.0"

_LAZY = {
    "LDAEPipeline": ".pipeline_ldae",
    "LDAEScheduler": ".scheduling_ldae",
    "LearnedTokenizer": ".latent_tokenizers",
}

__all__ = [
    "SIZES",
    "LDAEBackbone",
    "LDAEConfig",
    "LDAEForImageClassification",
    "LDAEForPreTraining",
    "LDAEImageProcessor",
    "LDAEModel",
    *_LAZY,
]

AutoConfig.register("ldae", LDAEConfig, exist_ok=True)
AutoModel.register(LDAEConfig, LDAEModel, exist_ok=True)
AutoModelForPreTraining.register(LDAEConfig, LDAEForPreTraining, exist_ok=True)
AutoModelForImageClassification.register(LDAEConfig, LDAEForImageClassification, exist_ok=True)
AutoBackbone.register(LDAEConfig, LDAEBackbone, exist_ok=True)
# One class serves both back ends: it needs Pillow only, and "torchvision" is asked for where torchvision is installed.
AutoImageProcessor.register(
    LDAEConfig,
    image_processor_classes={"pil": LDAEImageProcessor, "torchvision": LDAEImageProcessor},
    exist_ok=True,
)
hub_names.install()  # our bare names mean OWNER/NAME where they are read


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
