"""What can go wrong between us and the Hub: failures that pass are waited for, refusals are put in a sentence.

huggingface_hub tries most requests 6 times within about 24 seconds; this goes on for minutes where it gives up.
"""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from datasets import config
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants, get_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import httpx


logger = logging.getLogger(__name__)

# `datasets` would read on in a connection that has failed twice, find nothing more, and take a tar for ended there.
config.STREAMING_READ_MAX_RETRIES = 1

TRIES = 10
LONGEST_WAIT = 120  # seconds between two tries; all of them together come to about 6 minutes
INSTEAD = "or give a folder of images or local Parquet files instead"
Result = TypeVar("Result")


class Patience:
    """Waits after each failure in a row, twice as long as before and at random up to a quarter more.

    Args:
        doing: for messages, as in "Opening cifar10".
        name: of the data set.
    """

    def __init__(self, doing: str, name: str):
        self.doing, self.name, self.failures = doing, name, 0

    def wait(self, error: Exception) -> None:
        """Sleeps, if the error is one that passes; a server's Retry-After is the least that it waits.

        Raises:
            ConnectionError: this was the last try.
            ValueError: the Hub refused.
            Exception: `error` itself, if it is none of these.
        """
        if not _passes(error):
            if refusal := _refusal(error, self.name):
                raise ValueError(refusal) from error
            raise error
        self.failures += 1
        if self.failures == TRIES:
            raise ConnectionError(
                f"{self.doing} failed {TRIES} times, the last time with: {_in_a_line(error)}. Try again later."
            ) from error
        seconds = min(LONGEST_WAIT, 2 ** (self.failures - 1)) * random.uniform(1, 1.25)
        seconds = max(seconds, _retry_after(error))
        logger.warning(
            "%s failed (%s); try %d of %d in %.0f s.",
            self.doing,
            _in_a_line(error),
            self.failures + 1,
            TRIES,
            seconds,
        )
        time.sleep(seconds)

    def reset(self) -> None:
        """Something went well: the next failure is a first one again."""
        self.failures = 0


def patiently(do: Callable[[], Result], doing: str, name: str) -> Result:
    """What `do()` returns, however often it has to be tried; raises as [`Patience.wait`] does."""
    patience = Patience(doing, name)
    while True:
        try:
            return do()
        except Exception as error:
            patience.wait(error)


def _chain(error: BaseException | None):
    """An error and what it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _passes(error: Exception) -> bool:
    """Whether the same request may succeed later; the outermost error that says so decides."""
    if constants.HF_HUB_OFFLINE:
        return False
    for each in _chain(error):
        if isinstance(each, (DatasetNotFoundError, RepositoryNotFoundError)):
            return False
        if isinstance(each, HfHubHTTPError) and each.response is not None:
            return each.response.status_code in (408, 429) or each.response.status_code >= 500
        # `datasets` hides what came before the last of these: no answer, or one that was no refusal.
        if isinstance(each, (httpx.TransportError, ConnectionError, TimeoutError, LocalEntryNotFoundError)):
            return True
    return False


def _refusal(error: Exception, name: str) -> str | None:
    """A sentence if the Hub does not give us the data set."""
    page = f"{constants.ENDPOINT}/datasets/{name}"
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    for each in _chain(error):
        # `datasets` turns the first into the second, and hides that it did.
        missing = isinstance(each, (RepositoryNotFoundError, DatasetNotFoundError))
        if isinstance(each, GatedRepoError) or (missing and "gated dataset" in str(each)):
            token = "the token that was found has no access" if get_token() else "no token was found"
            return f"{name} is gated: accept its terms on {page}, then {log_in} ({token}), {INSTEAD}."
        if missing:
            return f"The Hub has no data set {name}, or a private one: check the name, or {log_in}, {INSTEAD}."
        if isinstance(each, HfHubHTTPError) and each.response is not None and each.response.status_code in (401, 403):
            return f"The Hub refused {name} ({_in_a_line(each)}): {log_in} anew, {INSTEAD}."
    return None


def _retry_after(error: Exception) -> float:
    for each in _chain(error):
        if isinstance(each, HfHubHTTPError) and each.response is not None:
            seconds = each.response.headers.get("Retry-After", "")
            return float(seconds) if seconds.isdigit() else 0.0
    return 0.0


def _in_a_line(error: Exception) -> str:
    """What happened, without the sentences that others have wrapped it in."""
    at_the_root = [each for each in _chain(error) if isinstance(each, (HfHubHTTPError, httpx.TransportError))]
    text = str(at_the_root[0] if at_the_root else error)
    return next((line for line in text.splitlines() if line.strip()), type(error).__name__).rstrip(" .")
