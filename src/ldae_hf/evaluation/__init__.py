"""How good an encoder is: features, extracted once and cached; linear probe and k-NN on them, with floors beside; the
ledger of results.
"""

from .features import Features, extract_features, load_encoder
from .knn import knn
from .ledger import append_to_ledger, read_ledger, result_table
from .linear_probe import linear_probe
from .metrics import Top1Accuracy
from .run import run_knn, run_linear_probe


__all__ = [
    "Features",
    "Top1Accuracy",
    "append_to_ledger",
    "extract_features",
    "knn",
    "linear_probe",
    "load_encoder",
    "read_ledger",
    "result_table",
    "run_knn",
    "run_linear_probe",
]
