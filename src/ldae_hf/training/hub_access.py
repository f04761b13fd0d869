"""What can go wrong on the way to a data set of the Hub, and how a user gets access to one that is gated."""

from collections.abc import Callable

from datasets import config
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants, get_token
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from .. import patience
from ..patience import LOG_IN, Result, chain, in_a_line, status


# `datasets` would read on in a connection that has failed twice, find nothing more, and take a tar for ended there.
config.STREAMING_READ_MAX_RETRIES = 1

INSTEAD = "or give a folder of images or local Parquet files instead"


class Patience(patience.Patience):
    """With a data set.

    Args:
        doing: for messages, as in "Opening cifar10".
        name: of the data set.
    """

    missing = (DatasetNotFoundError, RepositoryNotFoundError)

    def __init__(self, doing: str, name: str):
        super().__init__(doing)
        self.name = name

    def refusal(self, error: Exception) -> str | None:
        name, page = self.name, f"{constants.ENDPOINT}/datasets/{self.name}"
        for each in chain(error):
            # `datasets` turns the first into the second, and hides that it did.
            missing = isinstance(each, self.missing)
            if isinstance(each, GatedRepoError) or (missing and "gated dataset" in str(each)):
                token = "the token that was found has no access" if get_token() else "no token was found"
                return f"{name} is gated: accept its terms on {page}, then {LOG_IN} ({token}), {INSTEAD}."
            if missing:
                return f"The Hub has no data set {name}, or a private one: check the name, or {LOG_IN}, {INSTEAD}."
            if status(each) in (401, 403):
                return f"The Hub refused {name} ({in_a_line(each)}): {LOG_IN} anew, {INSTEAD}."
        return None


def patiently(do: Callable[[], Result], doing: str, name: str) -> Result:
    """What `do()` returns, however often it has to be tried; raises as [`Patience.wait`] does."""
    return patience.patiently(do, Patience(doing, name))
