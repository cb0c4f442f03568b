"""Run s3_bulk_convert.py and kill it, as kill -9 does, just before or just after the n-th time that it does a thing.

The command of a run is `crashing(EFFECT, "before" or "after", NTH)`, and the arguments of the program after it.
The program knows nothing of this: its functions, and those that it uses, are wrapped from outside.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from botocore.client import BaseClient

import s3_bulk_convert as program
from tests.standins.fork_server import IMPORTING


class Effect(NamedTuple):
    """A method, and which of its calls are meant, by their arguments."""

    owner: Any
    method: str
    is_meant: Callable[..., bool] = lambda *_, **__: True


def s3_request(operation: str) -> Effect:
    """One kind of request to S3, as boto3 sends it."""
    return Effect(BaseClient, "_make_api_call", lambda _, name, *__: name == operation)


def api_request(method: str, *, is_download: bool = False) -> Effect:
    """One kind of request to the API: from its first byte to the head of the answer."""
    return Effect(
        program.Session,
        "ask",
        lambda _, asked, address, **__: asked == method and ("/download/" in address) == is_download,
    )


def written_file(option: str) -> Effect:
    """A file that is written whole."""
    return Effect(program.OutputFile, "replace", lambda file, _: file._option == option)


EFFECTS = {
    # Of S3
    "page-listed": Effect(program.Bucket, "read_page"),
    "source-looked-at": Effect(program.Bucket, "look_at_source"),
    "output-looked-at": Effect(program.Bucket, "look_at_output"),
    "url-signed": Effect(program.Bucket, "presign"),
    "source-read": s3_request("GetObject"),
    "source-looked-at-again": Effect(program.Bucket, "require_unchanged"),
    "place-looked-at": Effect(program.Bucket, "_require_place"),
    "output-put": s3_request("PutObject"),  # a page or an archive, too
    "parts-begun": s3_request("CreateMultipartUpload"),
    "part-put": s3_request("UploadPart"),
    "parts-joined": s3_request("CompleteMultipartUpload"),
    "source-copied": s3_request("CopyObject"),
    "stored-looked-at": Effect(program.Bucket, "_head_stored"),
    "tags-read": s3_request("GetObjectTagging"),
    "source-tagged": s3_request("PutObjectTagging"),
    # Of the API
    "request-sent": api_request("POST"),
    "answer-read": Effect(program.ConvertedFile, "receive"),
    "job-asked-for": api_request("GET"),
    "result-asked-for": api_request("GET", is_download=True),
    # Of the checkpoint
    "run-begun": Effect(program.Journal, "begin_run"),
    "loss-recorded": Effect(program.Journal, "mark_lost", lambda _, __, keys, ___: bool(keys)),
    "request-recorded": Effect(program.Journal, "mark_sent", lambda _, __, request: not request.job_id),
    "request-renewed": Effect(program.Journal, "mark_sent", lambda _, __, request: bool(request.is_doubtful)),
    "job-recorded": Effect(program.Journal, "mark_sent", lambda _, __, request: bool(request.job_id)),
    "outcomes-committed": Effect(program.Journal, "settle"),
    "run-ended": Effect(program.Journal, "end_run"),
    # Of other files
    "failure-written": Effect(program.OutputFile, "append"),
    "metrics-written": written_file("run.metrics"),
    "summary-written": written_file("run.summary"),
}
HALF_READ = "half-answer-read"


def crashing(effect: str, when: str, nth: int) -> tuple[str, ...]:
    """The command of a run that is killed there."""
    return "-c", f"{IMPORTING}from tests.standins import crashing\ncrashing.main()", effect, when, str(nth)


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
    owner, name, is_meant = EFFECTS[effect]
    original: Callable[..., Any] = getattr(owner, name)
    countdown = Countdown(nth)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        is_the_one = is_meant(*arguments, **named) and countdown.is_over()
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
    owner, name, _ = EFFECTS["answer-read"]
    original: Callable[..., Any] = getattr(owner, name)
    countdown = Countdown(nth)

    def wrapped(answer: Any, **named: Any) -> Any:
        answer.raw = HalfBody(answer.raw) if countdown.is_over() else answer.raw
        return original(answer, **named)

    setattr(owner, name, wrapped)


def main() -> None:
    """Arm one effect and run the program, with numbers for which few and small objects are enough."""
    effect, when, nth, *arguments = sys.argv[1:]
    # Few objects come to few commits if one waits for others.
    vars(program).update(COMMIT_SECONDS=0.0, JOB_POLL_SECONDS=(0.1, 0.2), MULTIPART_BYTES=8_500_000)
    if effect == HALF_READ:
        wrap_reading(int(nth))
    else:
        wrap(effect, when, int(nth))
    program.leave(program.main(arguments))
