"""Settings that must stand before a Hugging Face library is imported, and the fixtures that all tests share."""

import os
import signal
import tempfile
from pathlib import Path

import pytest


_hf_home = tempfile.TemporaryDirectory(prefix="ldae-hf-home-", ignore_cleanup_errors=True)
os.environ |= {
    "HF_HOME": _hf_home.name,  # nothing is read from, or left in, the user's cache
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_XET": "1",  # else the Hub client asks a server for a token
    "MPLBACKEND": "Agg",
}
# A shell starts what it puts in the background with Ctrl-C ignored, nohup with SIGHUP; some tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Tests are small: threads would cost more than they bring, and their number changes the last bits of a sum.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# On an AMD processor MKL's last bits depend on where in memory a matrix lies, and weights of a file lie anywhere.
os.environ.setdefault("MKL_CBWR", "AUTO")


@pytest.fixture(scope="session")
def ldae_data() -> Path:
    """The folder of image sets that $LDAE_DATA names."""
    if not os.environ.get("LDAE_DATA"):
        pytest.skip("LDAE_DATA is not set: this test reads a data set from the folder that it names")
    folder = Path(os.environ["LDAE_DATA"])
    if not folder.is_dir():
        pytest.skip(f"LDAE_DATA={folder} is not a folder")
    return folder


FORKING = (
    "test_workers.py",
    "test_session.py",
    "test_pretrain.py",
    "test_sharding.py",
    "test_planning.py",
    "test_verify.py",
    "test_tokenizer_training.py",
    "test_every_recipe.py",
    "test_samples.py",
    "test_fid.py",
    "test_finetuning_runs.py",
    "test_repository.py",
    "test_push.py",
    "test_full_probe.py",
    "test_encoders.py",
    "test_variants.py",
    "test_interrupts.py",
)
LONG = ("test_user_story.py", "test_reproduce_runs.py", "test_export_folders.py", "test_weights.py", "test_imports.py")


def pytest_collection_modifyitems(items):
    """The tests that fork go first: a fork of a process in which other tests have left threads behind can hang. Then
    the files that take longest, so that of several processes none has one of them left when the others are done."""
    items.sort(key=lambda item: (item.path.name not in FORKING, item.path.name not in LONG))
