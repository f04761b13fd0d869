"""End-to-end fine-tuning for classification with the paper's recipe (appendix B): the model that is trained
(classifiers, drop_path), its recipe (recipe, layer_decay), what is done to images (augmentation, mixing), the training
(run), and what came of it (result).
"""

from .recipe import FineTuningRecipe
from .run import finetune


__all__ = ["FineTuningRecipe", "finetune"]
