"""Output that nobody reads any more, as with `| tee log` at a Ctrl-C: it is lost, and the run goes on to save."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Unminding:
    """A text stream that goes quiet when its reader is gone."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self._mute()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            self._mute()

    def _mute(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


@contextmanager
def unminding_output() -> Iterator[None]:
    """Within it neither print nor a progress bar fails because nobody reads it."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Unminding, streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
