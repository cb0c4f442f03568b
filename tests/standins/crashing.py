"""Run s3_bulk_convert.py and kill it, as kill -9 does, just before or just after the n-th time that it does a thing.

usage: python -m tests.standins.crashing EFFECT before|after NTH [ARGUMENT OF THE PROGRAM ...]

The program knows nothing of this: its functions are wrapped from outside.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import s3_bulk_convert as program

EFFECTS: dict[str, tuple[Any, str]] = {
    "source-looked-at": (program.Bucket, "look_at_source"),
    "output-looked-at": (program.Bucket, "look_at_output"),
    "request-recorded": (program.Journal, "mark_sent"),
    "request-sent": (program.Conversation, "_exchange"),
    "answer-read": (program.ConvertedFile, "receive"),
    "source-looked-at-again": (program.Bucket, "require_unchanged"),
    "page-put": (program.Bucket, "_put"),
    "output-put": (program.Bucket, "store"),
    "source-tagged": (program.Bucket, "tag_source"),
    "failure-written": (program.OutputFile, "append"),
    "outcomes-committed": (program.Journal, "settle"),
    "summary-written": (program.OutputFile, "replace"),
}
HALF_READ = "half-answer-read"


def die() -> None:
    """End this process as SIGKILL does: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()


class Countdown:
    """Says, once, that the n-th call has come. Safe to use from several threads."""

    def __init__(self, nth: int) -> None:
        self._left = nth
        self._lock = threading.Lock()

    def is_over(self) -> bool:
        """Count one call; true for the n-th."""
        with self._lock:
            self._left -= 1
            return self._left == 0


def wrap(effect: str, when: str, nth: int) -> None:
    """Make the n-th time of an effect the last thing that happens."""
    owner, name = EFFECTS[effect]
    original: Callable[..., Any] = getattr(owner, name)
    countdown = Countdown(nth)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        is_the_one = countdown.is_over()
        if is_the_one and when == "before":
            die()
        result = original(*arguments, **named)
        if is_the_one:
            die()
        return result

    setattr(owner, name, wrapped)


class HalfBody:
    """The raw body of an answer that ends the process after its first bytes."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._pieces = self._read()

    def _read(self) -> Iterator[bytes]:
        yield self._raw.read(16, decode_content=False)
        die()

    def read(self, *_: Any, **__: Any) -> bytes:
        """The first bytes, then the end of the process."""
        return next(self._pieces)


def wrap_reading(nth: int) -> None:
    """Die in the middle of the n-th answer."""
    owner, name = EFFECTS["answer-read"]
    original: Callable[..., Any] = getattr(owner, name)
    countdown = Countdown(nth)

    def wrapped(answer: Any, **named: Any) -> Any:
        answer.raw = HalfBody(answer.raw) if countdown.is_over() else answer.raw
        return original(answer, **named)

    setattr(owner, name, wrapped)


def main() -> None:
    """Arm one effect and run the program."""
    effect, when, nth, *arguments = sys.argv[1:]
    # Few objects come to few commits if one waits for others.
    program.COMMIT_SECONDS = 0.0
    if effect == HALF_READ:
        wrap_reading(int(nth))
    else:
        wrap(effect, when, int(nth))
    program.leave(program.main(arguments))


if __name__ == "__main__":
    main()
