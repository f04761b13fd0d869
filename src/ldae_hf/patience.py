"""What can go wrong between us and the Hub: failures that pass are waited for, refusals are put in a sentence.

huggingface_hub tries most requests 6 times within about 24 seconds; this goes on for minutes where it gives up.
"""

import json
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx


logger = logging.getLogger(__name__)

TRIES = 10
LONGEST_WAIT = 120  # seconds between two tries; all of them together come to about 6 minutes
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
TOKEN = re.compile(r"\bhf_(?:oauth_|jwt_)?[A-Za-z0-9]{16,}[\w.-]*")
Result = TypeVar("Result")


class Patience:
    """Waits after each failure in a row, twice as long as before and at random up to a quarter more.

    Args:
        doing: for messages, as in "Opening cifar10".
        token: one that was given; neither it nor any other is ever part of a message.
    """

    missing: tuple[type[Exception], ...] = (RepositoryNotFoundError,)  # there is nothing to wait for

    def __init__(self, doing: str, token: str | None = None):
        self.doing, self.token, self.failures = doing, token, 0

    def passes(self, error: Exception) -> bool:
        """Whether the same request may succeed later; the outermost error that says so decides."""
        if constants.HF_HUB_OFFLINE:
            return False
        for each in chain(error):
            if isinstance(each, self.missing):
                return False
            if isinstance(each, HfHubHTTPError) and each.response is not None:
                return each.response.status_code in (408, 429) or each.response.status_code >= 500
            # `datasets` hides what came before the last of these: no answer, or one that was no refusal.
            if isinstance(each, (httpx.TransportError, ConnectionError, TimeoutError, LocalEntryNotFoundError)):
                return True
        return False

    def refusal(self, error: Exception) -> str | None:
        """A sentence if the Hub does not give us what we ask for."""
        return None

    def wait(self, error: Exception) -> None:
        """Sleeps, if the error is one that passes; a server's Retry-After is the least that it waits.

        Raises:
            ConnectionError: this was the last try.
            ValueError: the Hub refused.
            Exception: `error` itself, if it is none of these.
        """
        tells = any(masked(str(each), self.token) != str(each) for each in chain(error))
        cause = None if tells else error  # a traceback shows it
        line = masked(in_a_line(error), self.token)
        if not self.passes(error):
            if refusal := self.refusal(error):
                raise ValueError(masked(refusal, self.token)) from cause
            if tells:
                raise RuntimeError(f"{self.doing} failed: {line}.") from None
            raise error
        self.failures += 1
        if self.failures == TRIES:
            raise ConnectionError(
                f"{self.doing} failed {TRIES} times, the last time with: {line}. Try again later."
            ) from cause
        seconds = min(LONGEST_WAIT, 2 ** (self.failures - 1)) * random.uniform(1, 1.25)
        seconds = max(seconds, _retry_after(error))
        logger.warning("%s failed (%s); try %d of %d in %.0f s.", self.doing, line, self.failures + 1, TRIES, seconds)
        time.sleep(seconds)

    def reset(self) -> None:
        """Something went well: the next failure is a first one again."""
        self.failures = 0


class ReadingPatience(Patience):
    """With a model repository that is read.

    Args:
        doing: for messages, as in "Downloading someone/model".
        repo_id: of the repository. token: that is used, or None. revision: that is asked for.
    """

    may_not = "may not read"

    def __init__(self, doing: str, repo_id: str, token: str | None = None, revision: str | None = None):
        super().__init__(doing, token)
        self.repo_id, self.revision = repo_id, revision

    def passes(self, error: Exception) -> bool:
        # huggingface_hub reads the answer to a card's check as JSON before it looks at the status.
        return super().passes(error) or any(isinstance(each, json.JSONDecodeError) for each in chain(error))

    def refusal(self, error: Exception) -> str | None:
        name, tokens, how = self.repo_id, f"{constants.ENDPOINT}/settings/tokens", "`hf auth login` or HF_TOKEN"
        found = "the token that was found has no access" if self.token or get_token() else "no token was found"
        for each in chain(error):
            if isinstance(each, OfflineModeIsEnabled):
                return f"{name} is not in the cache, or not all of it, and HF_HUB_OFFLINE is set: unset it."
            if isinstance(each, GatedRepoError):
                return f"{name} is gated: accept its terms on {constants.ENDPOINT}/{name}, then {LOG_IN} ({found})."
            if isinstance(each, RevisionNotFoundError):
                return f"{name} has no branch, tag or commit {self.revision}."
            if isinstance(each, RepositoryNotFoundError):
                if kind := self._other_kind():
                    return f"{name} is a {kind} on the Hub, not a model."
                return f"The Hub has no model {name}, or a private one: check the name, or {LOG_IN} ({found})."
            if status(each) == 401:
                return f"The Hub does not know the token that was used for {name}: take one from {tokens} ({how})."
            if status(each) == 403:
                return f"The token that was used {self.may_not} {name}: take one that may, from {tokens} ({how})."
            if status(each) is not None:
                return f"The Hub refused {name}: {' '.join(str(error).split()).rstrip('.')}."
        return None

    def _other_kind(self) -> str | None:
        """What else the name is, if it is no model."""
        api = HfApi(token=self.token)
        try:
            return next((kind for kind in ("dataset", "space") if api.repo_exists(self.repo_id, repo_type=kind)), None)
        except (HfHubHTTPError, httpx.TransportError):
            return None


class WritingPatience(ReadingPatience):
    """With a model repository that is written to."""

    may_not = "may not write to"

    def passes(self, error: Exception) -> bool:
        # 412: the branch has moved on, perhaps by a commit of ours whose answer was lost; 409: it is about to.
        return super().passes(error) or any(status(each) in (409, 412) for each in chain(error))


def patiently(do: Callable[[], Result], patience: Patience) -> Result:
    """What `do()` returns, however often it has to be tried; raises as [`Patience.wait`] does."""
    while True:
        try:
            return do()
        except Exception as error:
            patience.wait(error)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status(error: BaseException) -> int | None:
    """Of the answer that made this error, if one did."""
    response = error.response if isinstance(error, HfHubHTTPError) else None
    return None if response is None else response.status_code


def in_a_line(error: Exception) -> str:
    """What happened, without the sentences that others have wrapped it in."""
    at_the_root = [each for each in chain(error) if isinstance(each, (HfHubHTTPError, httpx.TransportError))]
    text = str(at_the_root[0] if at_the_root else error)
    return next((line for line in text.splitlines() if line.strip()), type(error).__name__).rstrip(" .")


def masked(text: str, token: str | None = None) -> str:
    """A text in which every token of the Hub is "hf_…": those that look like one, `token`, and that of the user."""
    for secret in filter(None, (token, get_token())):
        text = text.replace(secret, "hf_…")
    return TOKEN.sub("hf_…", text)


def _retry_after(error: Exception) -> float:
    for each in chain(error):
        if isinstance(each, HfHubHTTPError) and each.response is not None:
            seconds = each.response.headers.get("Retry-After", "")
            return float(seconds) if seconds.isdigit() else 0.0
    return 0.0
