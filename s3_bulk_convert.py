#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["boto3>=1.36", "requests>=2.31", "tqdm>=4.60", "urllib3>=2.0.2"]
# ///
"""Convert every object of an S3 bucket once through the ChangeThisFile API and put the results back into S3.

How data flows; each word is the name of a method below:

  list_pages -> plan -> |queue| -> look_at_source -> look_at_output -> convert -> require_unchanged -> store -> outcome
  `- one feeder thread -'          `--------------------------- worker threads --------------------------'        |
                                                                    record: journal, failures file, report

Memory does not depend on the size of the bucket: a few pages of the listing and a bounded queue exist at a time.

Files written: the checkpoint (SQLite, with its `-wal` and `-shm`, and a `.lock` beside it), the failures file (JSON
lines, appended), a run summary (JSON) and metrics (Prometheus textfile) where `run.summary`, `run.metrics` name them.

Exit codes: 0 nothing is left to do; 1 finished, but some objects failed; 2 usage or configuration error,
nothing was started; 3 stopped early, work is left; 4 another run holds the checkpoint; 130, 143 interrupted.

SIGINT, SIGTERM, SIGHUP: nothing new is sent, what is in flight gets `run.shutdown_grace` to finish. A second signal
ends the program at once. Nothing is lost either way: what was sent is in the checkpoint and is resumed by the next run.

To change what an option is or accepts, go to Settings; what an answer is taken for, to Limits and formats, and Rules;
what is selected, skipped or taken for done, to Plan; what S3 is asked, and whose an output is, to S3; what the API is
sent, and what that costs, to API client; what is on the disk, to Journal; when a run stops, to Recorder; what a person
reads, to Recorder and Looking.
"""

import sys

if sys.version_info < (3, 10):
    sys.stderr.write("error: s3_bulk_convert.py needs Python 3.10 or newer; start it with one, e.g. python3.11\n")
    raise SystemExit(2)

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until `main` has its own way to stop, Ctrl-C ends the process, without a traceback of somebody's import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import configparser
import contextlib
import csv
import difflib
import email.utils
import errno
import fnmatch
import functools
import gc
import getpass
import gzip
import hashlib
import http.client
import http.cookiejar
import io
import itertools
import json
import logging
import math
import mimetypes
import multiprocessing
import multiprocessing.resource_tracker
import operator
import os
import queue
import random
import re
import shlex
import shutil
import socket
import sqlite3
import ssl
import stat
import statistics
import struct
import sysconfig
import tempfile
import threading
import time
import traceback
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from enum import Enum, IntEnum
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TypeVar, cast
from xml.etree import ElementTree

# What other programs' bars are to look like is no concern of this one's, which could not draw its own by it.
for unmeant in [name for name in os.environ if name.startswith("TQDM_")]:
    del os.environ[unmeant]

try:
    import boto3
    import botocore.config
    import botocore.credentials
    import requests
    import urllib3
    from boto3.s3.transfer import TransferConfig
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectTimeoutError,
        CredentialRetrievalError,
        EndpointConnectionError,
        HTTPClientError,
        ParamValidationError,
        ProxyConnectionError,
    )
    from botocore.parsers import ResponseParserError
    from requests.adapters import HTTPAdapter
    from tqdm import tqdm
    from urllib3.filepost import encode_multipart_formdata
    from urllib3.util.retry import Retry
except ImportError as missing:
    # Debian's and Homebrew's Python refuse pip outside a virtual environment (PEP 668).
    is_managed = os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"))
    pip, then = f"{sys.executable} -m pip", ""
    if is_managed and sys.prefix == sys.base_prefix:
        pip, then = "python3 -m venv venv && venv/bin/pip", "then start this program with venv/bin/python\n"
    sys.stderr.write(f"error: the package {missing.name} is missing\n")
    sys.stderr.write(f"hint: run: {pip} install boto3 requests tqdm urllib3\n{then}")
    raise SystemExit(2) from None

if sys.platform != "win32":
    import fcntl
    import resource

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from mypy_boto3_s3.client import S3Client

__version__ = "1.0.0"

log = logging.getLogger("s3_bulk_convert")


########################################################################################################################
# Limits and formats. Every number that is not an option of the user's, with its reason, and what files begin with.
########################################################################################################################

CONNECT_TIMEOUT_SECONDS = 10
OUTAGE_SECONDS = 300  # as long as a router takes to start anew; after that, it is for the next run
OUTAGE_PAUSE_SECONDS = 15  # between two attempts in it, at most: a network that is back is soon noticed
BACKOFF_CAP_SECONDS = 64  # the API's own advice for 429 without Retry-After
WAIT_DEADLINE_SECONDS = 30 * 60  # 429 and 409 cost no attempts, but not for ever; the API's own cap on a call is 120 s
IDEMPOTENCY_WINDOW_SECONDS = 24 * 3600  # for so long the API replays an answer for free
JOB_POLL_SECONDS = (2, 3, 5, 8, 15)  # growing; the last one repeats
KEYS_REMEMBERED = 50_000  # of a file of keys, because it may name one twice
ECHO_SECONDS = 0.2  # after a signal; another one is the same
HANG_SECONDS = 120  # without a sign of life; then a worker process is replaced
ERROR_BODY_BYTES = 65_536  # of an error page; its first part says what there is to say
MAX_PAYMENTS = 2  # for a result that cannot be stored
MESSAGE_CHARACTERS = 1_000  # of what the API says of a failure
CHUNK_BYTES = 256 * 1024
PACKED_BYTES = 4 * 1024  # may become a thousand times as many
MAX_PAGES, UNPACKED_BYTES = 10_000, 5 * 10**9  # of an archive, whatever it says of itself
CONTENTS_BYTES = 4 * 2**20  # of its table of contents, which is in memory as a whole, ten times as large
MULTIPART_BYTES = 100 * 10**6  # a larger output is put in parts, each in memory twice; any other is streamed
S3_TIMEOUT_SECONDS = 60
S3_ATTEMPTS = 5  # about 8 s, in all
MAX_S3_ATTEMPTS = 40  # of one request while S3 is away or asks for less
PAGE_KEYS = 1000  # what S3 lists at once
LIST_THREADS = 16  # pages at a time, at most: 100,000 keys/s where a page takes 160 ms
LAST_KEY = "\U0010ffff" * (1024 // 4)  # no key comes after it
FAILURES_BEFORE_RATE_COUNTS = 50
COMMIT_SECONDS = 0.05  # that an outcome waits for others: a commit for each would cost more than its conversion
LINE_SECONDS = 60  # between two lines where there is no terminal, even if nothing finishes
SILENCE_SECONDS = 30  # without news, what is being waited for is said
S3_KEY_BYTES = 1_024
SMALL_FILE_BYTES = 10**6  # of the configuration, and of the file with the API key
MAX_TAGS = 10  # of an object
SCARCE_DISK_BYTES, LITTLE_DISK_BYTES = 100 * 10**6, 10**9  # a failure, a warning of --check
LOOK_SECONDS = 60  # for an answer that no conversion waits for

OLDEST_PACKAGES = {"boto3": "1.36", "requests": "2.31", "tqdm": "4.60", "urllib3": "2.0.2"}
CONVERT_PATH, JOBS_PATH = "/v1/convert", "/v1/jobs"
JOB_LOST = "job_lost"
TAG_FAILED, TOO_MANY_TAGS = "tag_failed", "too_many_tags"  # the output is stored, and its source has not the tag
# Failures that cost nothing, unless they come after an answer. They are decided anew in every run.
FREE_FAILURES = frozenset({"output_collision", "output_key_too_long", "too_large", "source_gone", "source_changed"})
FREE_FAILURES |= {TOO_MANY_TAGS}
OWN_CODES = FREE_FAILURES | {JOB_LOST, TAG_FAILED, "not_stored", "bad_pages"}  # by which this program decides
LOST = "lost"  # in the journal: an output that was stored is not there any more, and is to be made again
TAG = "tag"  # there, too: an output is stored, and its source is to be tagged
ARCHIVE_CLASSES = frozenset({"GLACIER", "DEEP_ARCHIVE"})  # storage classes that cannot be read before a restore
NETWORK_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)
# Of the server or of a proxy: nothing can be sent there.
NO_ADDRESS = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidSchema,
    urllib3.exceptions.LocationParseError,
)
# How globs are written for other programs -> what to write here. A key may hold a comma, a brace or a backslash.
GLOB_MISTAKES = {
    r".*[,;|]|.*[,;|]\*.*": "separate globs by spaces alone",
    r".*\{.*,.*\}.*|.*\.\{.*\}|.*\.\(.*\)|.*\(.*\|.*\).*": "give a glob of its own for each, as in *.jpg *.png",
    r"s3://.*": "give only what follows the bucket",
    r"(\.{0,2}/).*": "keys do not begin with /, ./ or ../",
    r"!.*": "expected globs without !; include says what to convert, exclude what to leave out",
    r".*\\\..*": "expected globs such as *.png, and no regular expressions",
    r"""(["']).*\1""": "expected globs such as *.png",
    r"[^*?[]*/": "did you mean {}*?",
    r"[^*?[./]+": "did you mean *.{}?",
}

FORMAT_ALIASES = dict.fromkeys(("jpeg", "jpe"), "jpg")
FORMAT_ALIASES |= {"tif": "tiff", "htm": "html", "mpg": "mpeg", "yml": "yaml", "markdown": "md"}
TEXT_FORMATS = frozenset({"html", "xhtml", "xml", "svg", "md", "txt", "csv", "json", "yaml", "rst", "tex"})
JSON_FORMATS = frozenset({"json", "ndjson", "jsonl", "geojson", "topojson", "jsonld", "ipynb", "har", "webmanifest"})
JSON_FORMATS |= {"gltf", "lottie"}
GENERIC_TYPES = frozenset({"", "application/octet-stream", "binary/octet-stream"})
EXTRA_MEDIA_TYPES = {"webp": "image/webp", "heic": "image/heic", "avif": "image/avif", "md": "text/markdown"}
ZIP_BASED = frozenset(
    {
        *("zip", "docx", "xlsx", "pptx", "odt", "ods", "odp", "epub", "jar", "apk", "cbz", "kmz", "xps", "oxps", "3mf"),
        *("docm", "dotx", "dotm", "xlsm", "xlsb", "xltx", "xltm", "pptm", "ppsx", "ppsm", "potx", "potm", "vsdx"),
        *("odg", "odf", "ott", "ots", "otp", "otg", "odm", "odb", "odc", "sxw", "sxc", "sxi", "stw", "ora", "hwpx"),
        *("pages", "numbers", "key", "idml", "usdz", "htmlz", "txtz", "fbz", "mxl", "npz", "dwfx"),
        *("vsdm", "vstx", "xlam", "ppam", "sldx"),
    }
)
# What a file of a format begins with: (offset, bytes). A format that is not here is judged by its media type alone.
SIGNATURES: Mapping[str, Sequence[tuple[int, bytes]]] = {
    **dict.fromkeys(ZIP_BASED, ((0, b"PK\3\4"), (0, b"PK\5\6"))),
    **dict.fromkeys(("jpg", "jfif", "jif", "jfi", "pjpeg", "pjp"), ((0, b"\xff\xd8\xff"),)),
    **dict.fromkeys(("png", "apng"), ((0, b"\x89PNG\r\n\x1a\n"),)),
    **dict.fromkeys(("avif", "heic", "mp4", "m4a"), ((4, b"ftyp"),)),
    **dict.fromkeys(("webm", "mkv"), ((0, b"\x1a\x45\xdf\xa3"),)),
    "mov": [(4, b"ftypqt"), (4, b"moov"), (4, b"wide"), (4, b"free"), (4, b"mdat")],
    "mp3": [(0, b"ID3"), (0, b"\xff\xfb"), (0, b"\xff\xfa"), (0, b"\xff\xf3"), (0, b"\xff\xf2"), (0, b"\xff\xe3")],
    "tiff": [(0, b"II*\0"), (0, b"MM\0*"), (0, b"II+\0"), (0, b"MM\0+")],
    "gif": [(0, b"GIF87a"), (0, b"GIF89a")],
    "ai": [(0, b"%PDF-"), (0, b"%!PS")],
    **dict.fromkeys(("pdf", "pdfa"), ((0, b"%PDF-"),)),
    "rtf": [(0, b"{\\rtf")],
    "bmp": [(0, b"BM")],
    "ico": [(0, b"\0\0\1\0")],
    "gz": [(0, b"\x1f\x8b")],
    "flac": [(0, b"fLaC")],
    "ogg": [(0, b"OggS")],
    "webp": [(8, b"WEBP")],
    "wav": [(8, b"WAVE")],
    "avi": [(8, b"AVI ")],
}
# What a whole file ends with, where nothing else in it says how long it is. None of these is likely where one is cut.
ENDINGS: Mapping[str, bytes] = {
    **dict.fromkeys(("jpg", "jfif"), b"\xff\xd9"),
    **dict.fromkeys(("png", "apng"), b"\0\0\0\0IEND\xaeB`\x82"),
    "gif": b"\0;",
    "pdf": b"%%EOF",
}
# HEIC and AVIF have the boxes of MP4: their brands tell them apart. Those of the last row say an image, and not which.
BRANDS = {
    "avif": frozenset({b"avif", b"avis"}),
    "heic": frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}),
    "": frozenset({b"mif1", b"msf1", b"miaf", b"MA1A", b"MA1B"}),
}

########################################################################################################################
# Words. How things are said, to people and in logs. Every line is redacted on its way out, whoever wrote it.
########################################################################################################################


def pluralize(count: int, noun: str) -> str:
    """A count and its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def printable(text: str) -> str:
    """A key or a message of somebody else's on one line: it may hold line ends and orders to the terminal."""
    plain = text if text.isprintable() else json.dumps(text)
    return plain if len(plain) <= 200 else plain[:197] + "..."


def human_bytes(count: float) -> str:
    """A size for people, in decimal units, as S3's price list counts."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_cost(cost: float) -> str:
    """An amount of money for people. Of little money, the cents say nothing."""
    return f"about {cost:.{4 if 0 < cost < 1 else 2}f}"


def human_seconds(seconds: float) -> str:
    """A duration for people, in its largest unit."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def iso_time(seconds: float) -> str:
    """A time (Unix seconds) in ISO 8601, in the local zone, with its offset."""
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    with contextlib.suppress(ValueError, OverflowError):  # TZ says a day or more; or the year is 0 or 10,000 there
        moment = moment.astimezone()
    return moment.isoformat(timespec="seconds")


def seconds_since(moment: str) -> float:
    """How long ago a time is that `iso_time` has written."""
    return max(0.0, time.time() - datetime.fromisoformat(moment).timestamp())


def local_date(moment: str) -> str:
    """A time that `iso_time` has written, for people, with how long ago that is."""
    return f"{moment.replace('T', ' ')} ({human_seconds(seconds_since(moment))} ago)"


def redact(message: str) -> str:
    """A text without keys and tokens, and without a URL's password and what stands behind its `?`, as a signature."""
    for address in filter(lambda address: "@" in address, urllib.request.getproxies_environment().values()):
        # Of one that is not written as a URL wants it, libraries quote what they take for a host.
        login = address.rpartition("@")[0].rpartition("://")[2]
        host, _, rest = re.sub(r"[/?#]", "\0", login, count=1).partition("\0")
        for part in (f"{login}@", f"{rest}@", host):
            message = message.replace(part, "...") if len(part) > 3 and part != login else message
    # S3's and the API's own messages may repeat the URL that they were asked for; s3://, which is ours, has no query.
    message = re.sub(r"((?<!s3)://(?:(?!://)[^\s\"'<>?])*)\?[^\s\"'<>]*", r"\1?...", message)
    message = re.sub(r"(://)[^\s\"'<>/?#]*@", r"\1...@", message)
    # What libraries quote: an address that holds a file itself, and a header that cannot be sent.
    message = re.sub(r"(?i)(['\"])data:.*?(\1|$)", r"\1data:...\2", message)
    message = re.sub(r"(?i)(header (?:value|part)\b[: (]*b?['\"]).*", r"\1...", message)
    # In a URL within another one, the sign is written as %3D.
    message = re.sub(r"(?i)((?:Signature|Credential)(?:=|%3D))[^\s&\"'<>,]*", r"\1...", message)
    token = r"((?:security|session)[-_]?token['\"]?\s*(?:[=:>]|%3D)\s*b?['\"]?)[^\s&\"'<>,]+"
    message = re.sub(f"(?i){token}", r"\1...", message)
    return re.sub(r"ctf_([a-z]k|live|test)_[A-Za-z0-9_-]+", "ctf_...", message)


def without_secrets(value: Any, hide: Callable[[str], str] = redact) -> Any:
    """A value of a JSON document, with every text in it redacted: names too, which may be codes of the API's."""
    if isinstance(value, dict):
        return {hide(name): without_secrets(part, hide) for name, part in value.items()}
    if isinstance(value, list):
        return [without_secrets(part, hide) for part in value]
    return hide(value) if isinstance(value, str) else value


def log_event(event: str, message: str, *, level: int = logging.WARNING, **fields: Any) -> None:
    """Log a message; as JSON it has the kind of thing that happened, and its numbers."""
    log.log(level, "%s", message, extra={"event": event, "fields": fields})


class ConsoleHandler(logging.Handler):
    """Writes to stderr, above the progress bar: lines for people, or JSON objects; tracebacks only on demand."""

    def __init__(self, *, quiet: bool, verbose: bool, as_json: bool) -> None:
        super().__init__()
        self._quiet, self._verbose, self._as_json = quiet, verbose, as_json

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        with contextlib.suppress(OSError):
            tqdm.write(self.format(record), file=sys.stderr)

    def format(self, record: logging.LogRecord) -> str:
        """One record without secrets."""
        when, error = iso_time(record.created), record.exc_info[1] if record.exc_info else None
        event, fields = getattr(record, "event", "message"), getattr(record, "fields", {})
        told = traceback.format_exception if self._verbose else traceback.format_exception_only
        message, trace = record.getMessage(), "".join(told(error)) if error else ""
        if self._as_json:
            standard = {"ts": when, "level": record.levelname.lower(), "event": event, "message": message}
            return json.dumps(without_secrets(standard | fields | ({"traceback": trace} if trace else {})))
        if event == "error":
            # What is quiet is read later, in a log.
            return redact(f"{trace}{f'{when} ' if self._quiet else ''}error: {message}\nhint: {fields['hint']}")
        return redact(f"{when} {message}" + (f"\n{trace.rstrip()}" if trace else ""))


def set_up_logging(*, quiet: bool, verbose: bool, as_json: bool) -> None:
    """Send this program's messages to stderr; other libraries' only with -v."""
    # One handler for all: a library's message must not tear the progress bar either.
    handler = ConsoleHandler(quiet=quiet, verbose=verbose, as_json=as_json)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler], force=True)
    # urllib3 warns at each retry, with the path of the request; the summary has the counts.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    # What comes of credentials that cannot be had is said where they are needed, once and with its remedy.
    logging.getLogger("botocore.credentials").setLevel(logging.NOTSET if verbose else logging.ERROR)
    log.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)


########################################################################################################################
# Errors and stopping. Two kinds of failure: RunError ends the run (or keeps it from starting) and blames no object;
# ObjectFailed is one object's. Anything else is a bug of this script and keeps its traceback.
#   - RunError is caught by `main`, and by whoever runs a thread, which then asks the whole run to stop.
#   - A signal handler only sets the flag. Every wait is a wait on the flag, and ends as soon as it is set.
#   - Arguments go to `super().__init__` unchanged, so that an error survives being pickled.
########################################################################################################################


class ExitCode(IntEnum):
    """What the shell, cron and an array-job engine see."""

    DONE = 0
    SOME_FAILED = 1
    USAGE = 2
    STOPPED = 3
    LOCKED = 4
    SIGINT = 130
    SIGTERM = 143


# Why a run ends or cannot start, as a word for machines: docs/operations.md says what each means.
StopCode = (
    Literal["signal", "time", "cap", "quota", "api_key", "api", "s3", "listing", "same_failure", "failure_rate"]
    | Literal["disk", "checkpoint", "environment", "usage", "locked", "bug"]
)


class RunError(Exception):
    """Why a run ends or cannot start, what to do, what the shell is told, and a word for machines (`stopped_code`).

    The exit code is USAGE for what another run would meet as well; the shell is told so only if nothing was begun.
    """

    def __init__(
        self, message: str, hint: str, exit_code: ExitCode = ExitCode.STOPPED, code: StopCode = "environment"
    ) -> None:
        super().__init__(message, hint, exit_code, code)
        self.message, self.hint, self.exit_code, self.code = message, hint, exit_code, code

    @property
    def is_by_signal(self) -> bool:
        """Whether a person or a scheduler waits for the end: only then must the work in flight hurry."""
        return self.exit_code in {ExitCode.SIGINT, ExitCode.SIGTERM}


def usage_error(message: str, hint: str) -> RunError:
    """An error before anything was started: the configuration, or a file that it names, cannot be used."""
    return RunError(message, hint, ExitCode.USAGE, "usage")


class StopRequested(Exception):
    """A wait ended because the run is stopping. The object in hand stays to do."""


class ObjectFailed(Exception):
    """One object could not be converted. `permanent`: not tried again before it changes. `status`: HTTP, 0 for none."""

    def __init__(self, code: str, message: str, *, permanent: bool = False, status: int = 0) -> None:
        super().__init__(code, message)
        self.code, self.message, self.permanent, self.status = code, message, permanent, status


class ObjectSkipped(Exception):
    """A look at the source has shown that there is nothing to convert. `reason`: see SKIP_REASONS."""


class TryAgain(ObjectFailed):
    """A failure that another attempt may not meet, unless it is permanent."""

    is_free = False  # that attempt uses up none
    asked: float | None = None  # seconds that the server wants the client to wait
    cap = math.inf  # seconds that the client waits at most


class InvalidResponse(TryAgain):
    """A 200 whose body is not the result: cut, empty, an error page. To ask again with the same key costs nothing."""

    def __init__(self, code: str, message: str, *, permanent: bool = False) -> None:
        super().__init__(code, message, permanent=permanent, status=200)


STOP_SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__]


class StopFlag:
    """The one way in which a run is asked to end. The first reason counts; only a signal replaces another reason."""

    def __init__(self, on_request: Callable[[RunError], None] = lambda _: None) -> None:
        # Reentrant, because a signal handler may interrupt the thread that holds it.
        self._lock, self._event = threading.RLock(), threading.Event()
        self._on_request = on_request  # a worker process tells its parent
        self.reason: RunError | None = None
        self.signalled_at = self._requested_at = math.inf  # monotonic seconds
        self.in_flight: Callable[[], int] = lambda: 0  # how many requests a second signal would cut off

    @property
    def is_set(self) -> bool:
        """Whether the run is to end."""
        return self._event.is_set()

    def request(self, reason: RunError, *, is_from_parent: bool = False) -> None:
        """Ask the run to end. `is_from_parent`: the parent process knows already."""
        with self._lock:
            if self.reason and (self.reason.is_by_signal or not reason.is_by_signal):
                return
            self._requested_at = time.monotonic()
            self.reason, self.signalled_at = reason, self._requested_at if reason.is_by_signal else math.inf
            self._event.set()
        # An echo could fill both pipes, and neither process would read.
        if not is_from_parent:
            self._on_request(reason)

    def sleep(self, seconds: float, patience: float = 0.0) -> None:
        """Wait. Raises StopRequested as soon as the run is to end; by a signal, or `patience` (seconds) later."""
        ends_at = time.monotonic() + max(0.0, seconds)
        if not self._event.wait(max(0.0, seconds)):
            return
        while (now := time.monotonic()) < min(self._requested_at + patience, self.signalled_at):
            if now >= ends_at:
                return
            time.sleep(min(0.1, ends_at - now))
        raise StopRequested

    def install(self) -> None:
        """Handle SIGINT, SIGTERM and SIGHUP; a second one ends the process at once, but for the first one's echo."""
        for number in STOP_SIGNALS:
            # Under nohup SIGHUP is ignored, and stays so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        code = ExitCode.SIGINT if number == signal.SIGINT else ExitCode.SIGTERM
        # `timeout` signals the process, and then its group: the same process again.
        if time.monotonic() - self.signalled_at > ECHO_SECONDS:
            self.exit_at_once(f"ended at once: {self.in_flight()} in flight are asked for again by the next run", code)
        message, hint = f"interrupted by {signal.Signals(number).name}", "run it again: it goes on where this run ended"
        self.request(RunError(message, hint, code, "signal"))

    @staticmethod
    def exit_at_once(message: str, code: ExitCode) -> NoReturn:
        """End the process from within a signal handler, with a line of its own."""
        # The stream may be in the middle of a write of its own: only the system call can be relied upon.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{message}\n".encode())
        os._exit(code)


class OutageMonitor:
    """Whether the API, or S3, can be reached, as all threads of a process find out together.

    What has answered before is waited for at no object's expense, up to OUTAGE_SECONDS; what has never answered is a
    wrong address, or a machine without a network.
    """

    def __init__(self, name: str) -> None:
        self._name, self._lock = name, threading.Lock()
        self._missed_since: float | None = None  # monotonic seconds; None while it can be reached
        self.has_answered = False

    def mark_answered(self) -> None:
        """Note that it has answered, whatever it said."""
        self.has_answered = True
        # Looked at without the lock, because this is called for every answer.
        if self._missed_since is not None:
            with self._lock:
                was_missed, self._missed_since = self._missed_since is not None, None
            if was_missed:
                log_event("outage", f"{self._name} can be reached again", name=self._name, is_over=True)

    def should_wait(self) -> bool:
        """Note that it cannot be reached, or has asked to be left alone; whether to wait for it."""
        with self._lock:
            is_new, now = self._missed_since is None, time.monotonic()
            since = self._missed_since = self._missed_since or now
        if is_new and self.has_answered:
            message = f"{self._name} cannot be reached; waiting up to {OUTAGE_SECONDS} s for it"
            log_event("outage", message, name=self._name, is_over=False)
        return self.has_answered and now - since < OUTAGE_SECONDS


########################################################################################################################
# Rules. Pure: no files, no network, no clock. Everything that decides what is paid for and what is stored.
#   - Keys are data: they are never a path, a format string or a pattern.
#   - A change to `idempotency_key` or `Job.fingerprint` makes every finished object new work that is paid for again.
########################################################################################################################


class KeyParts(NamedTuple):
    """A key taken apart as text. Keys are not paths: nothing is normalised."""

    key: str
    folder: str  # ends in "/" or is empty
    name: str
    stem: str
    ext: str  # without the dot, as written

    @classmethod
    def of(cls, key: str) -> "KeyParts":
        """Take a key apart; only a short alphanumeric end after a dot, with a letter in it, is an extension."""
        folder, slash, name = key.rpartition("/")
        stem, _, ext = name.rpartition(".")
        # A hidden file's name is no extension, and neither is the end of a sentence, or of a date as in "12.05.2023".
        if not (stem and ext.isascii() and ext.isalnum() and not ext.isdigit() and len(ext) <= 10):
            stem, ext = name, ""
        return cls(key, folder + slash, name, stem, ext)

    @staticmethod
    def slot_of(output_key: str) -> str:
        """The slot of an output key: the same for the archive of pages that an answer may turn out to be."""
        return output_key.removesuffix(".zip")

    @staticmethod
    def page_key(output_key: str, target: str, number: int, count: int) -> str:
        """The key of one of the pages, from 1, that belong to a planned output; sorted, they are in their order."""
        return f"{output_key.removesuffix(f'.{target}')}/{number:0{max(3, len(str(count)))}}.{target}"

    @property
    def has_dot_segments(self) -> bool:
        """Whether HTTP clients would normalise the key's path, so that a presigned URL for it cannot be fetched."""
        return not {".", ".."}.isdisjoint(self.key.split("/"))

    @property
    def upload_filename(self) -> str:
        """A file name for the multipart form: plain ASCII with the right extension."""
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", self.stem)[-60:] or "file"
        # The API would take what stands behind a dot for the format.
        return f"{stem}.{self.ext}" if self.ext else stem.replace(".", "_")


def digest(parts: Sequence[str | int | None]) -> str:
    """32 hex digits of SHA-256 over values whose borders cannot be confused."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def idempotency_key(endpoint: str, bucket: str, task: "Task", place: str) -> str:
    """The API's key for one conversion (docs/idempotency): another object, version, option or place has another.

    The time counts as well: what was overwritten and put back while the API fetched it must not be replayed. An output
    that was lost is made anew: the same key with another URL would be taken.
    """
    source, known = task.source, task.known_version
    version = (source.key, source.version, source.size, int(source.modified))
    lost = [known.lost_in] if known and known.lost_in else []
    return digest(["s3_bulk_convert/2", endpoint, bucket, *version, task.target, task.quality, place, *lost])


def unix_seconds(date: str) -> float:
    """A date in ISO 8601 or as HTTP has it, in Unix seconds; NaN, which is before and after nothing, if it is none."""
    try:
        try:
            # Python 3.10 does not read the Z.
            found = datetime.fromisoformat(date.replace("Z", "+00:00"))
        except ValueError:
            found = email.utils.parsedate_to_datetime(date)
        # A date without a zone is GMT, and must not be taken for this machine's.
        return found.replace(tzinfo=found.tzinfo or timezone.utc).timestamp()
    except (TypeError, ValueError, OverflowError, OSError):
        return math.nan


@dataclass(frozen=True)
class FileType:
    """What a body is: the media type to store it under, and what its key gets at the end."""

    # How bodies begin that are no result: an error page, the API's error envelope, S3's; and XML, in UTF-8 or UTF-16.
    HTML = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|head)\b", re.IGNORECASE)
    ERROR_ENVELOPE = re.compile(rb"\s*\{\s*\"error\"\s*:")
    ERROR_ELEMENT = re.compile(rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?<Error[\s>].*<Code>", re.DOTALL)
    MARKUP = re.compile(rb"(\xef\xbb\xbf)?\s*<|\xff\xfe<\0|\xfe\xff\0<")
    # A whole text that is nothing but what servers call an error, such as `502 Bad Gateway`; nginx's and Envoy's too.
    PHRASES = "|".join(re.escape(status.phrase) for status in http.HTTPStatus if status >= 400).encode()
    PHRASES += b"|Gateway Time-out|no healthy upstream|upstream request timeout|upstream connect error.*"
    ERROR_WORDS = re.compile(
        rb"\s*(error:?\s+)?(\d{3}:?\s+)?(%b)[.!]?\s*|\s*error code: \d+\s*" % PHRASES, re.IGNORECASE
    )

    media_type: str
    suffix: str = ""

    @staticmethod
    def canonical(ext: str) -> str:
        """One name for each format: jpeg is jpg."""
        return FORMAT_ALIASES.get(ext.lower(), ext.lower())

    @staticmethod
    def plain_type(media_type: str) -> str:
        """A media type without its parameters."""
        return media_type.partition(";")[0].strip()

    @staticmethod
    def media_kind(media_type: str) -> str:
        """The format that a media type names; empty if it says nothing."""
        plain = FileType.plain_type(media_type).lower()
        if plain in GENERIC_TYPES:
            return ""
        if plain in {"application/json", "application/problem+json", "text/json"}:
            return "json"
        if plain == "application/x-zip-compressed":
            return "zip"
        known = (kind for kind, named in EXTRA_MEDIA_TYPES.items() if named == plain)
        return next(known, None) or FileType.canonical((mimetypes.guess_extension(plain) or "").lstrip("."))

    @staticmethod
    def doubt_of(target: str) -> str:
        """What to say of a target that is perhaps misspelt, for no table knows it; empty for a known format."""
        known = {*SIGNATURES, *TEXT_FORMATS, *JSON_FORMATS, *EXTRA_MEDIA_TYPES, *FORMAT_ALIASES}
        if target in known or mimetypes.guess_type(f"x.{target}", strict=False) != (None, None):
            return ""
        near = difflib.get_close_matches(target, known, n=1)
        return f"{target} is no format that is known here{f': did you mean {near[0]}?' if near else ''}"

    @staticmethod
    def media_type_of(target: str) -> str:
        """The usual media type of a format."""
        return EXTRA_MEDIA_TYPES.get(target) or mimetypes.guess_type(f"x.{target}")[0] or "application/octet-stream"

    @staticmethod
    def begins_like(kind: str, head: bytes) -> bool:
        """Whether the first bytes of a body can begin a file of a format that has a signature."""
        major = head[8:12] if head[4:8] == b"ftyp" else b""
        # A film may be compatible with an image's brand; it is the other way round that no image is a film.
        if kind in {"mp4", "m4a", "mov"} and any(major in brands for brands in BRANDS.values()):
            return False
        if kind in BRANDS:
            # The brands that the file is compatible with follow the major one, up to the end of their box.
            end = min(int.from_bytes(head[:4], "big"), len(head))
            found = {head[8:12], *(head[start : start + 4] for start in range(16, end, 4))}
            # With nothing nearer than "an image", it is the older of the two.
            is_some_image = kind == "heic" and found & BRANDS[""] and not found & BRANDS["avif"]
            if not found & BRANDS[kind] and not is_some_image:
                return False
        return any(head[offset : offset + len(magic)] == magic for offset, magic in SIGNATURES[kind])

    @staticmethod
    def is_whole_file(kind: str, size: int, head: bytes, tail: bytes) -> bool:
        """Whether a file says by itself that nothing is missing at its end. False: no, or it cannot say so."""
        if kind in ENDINGS:
            return tail.rstrip().endswith(ENDINGS[kind])
        if kind in {"webp", "wav", "avi"}:
            return 8 + int.from_bytes(head[4:8], "little") == size
        if kind == "bmp":
            return int.from_bytes(head[2:6], "little") == size
        # The end record of a ZIP, without a comment, says how long is what comes before it.
        record = tail[-22:]
        told = int.from_bytes(record[12:16], "little") + int.from_bytes(record[16:20], "little") + len(record)
        return kind in ZIP_BASED and record.startswith(b"PK\5\6") and told == size

    @classmethod
    def identify(cls, target: str, media_type: str, disposition: str, head: bytes) -> "FileType":
        """What the body of a 200 is (docs/conversions/sync), from its headers and first bytes, never the target alone.

        Raises InvalidResponse if it cannot be a file of the target format: an error page, a JSON error, another format.
        """
        kind, declared, plain = cls.canonical(target), cls.media_kind(media_type), cls.plain_type(media_type)
        # A gateway's error page comes with 200 as well, and sometimes under the media type of the file.
        if kind not in {"html", "xhtml", "mhtml"} and (declared == "html" or cls.HTML.match(head)):
            raise InvalidResponse("html_answer", "the API answered with an HTML page instead of the file")
        is_json = kind in {"json", "ndjson", "jsonl"}  # any JSON, and so perhaps one that begins as the envelope does
        is_error = cls.ERROR_ENVELOPE.match(head) and (not is_json or ApiReply.is_error_alone(head))
        if is_error or (declared == "json" and kind not in JSON_FORMATS):
            raise InvalidResponse("json_answer", "the API answered with JSON instead of the file")
        has_signature, says_nothing = kind in SIGNATURES, plain.lower() in GENERIC_TYPES
        # A ZIP of one file a page, as for a PDF with several pages to jpg. Where nothing says it, a format that is
        # known to begin otherwise cannot be anything else.
        is_archive = declared == "zip" or disposition.lower().rstrip('"; ').endswith(".zip")
        is_archive |= says_nothing and (has_signature or kind in TEXT_FORMATS)
        if is_archive and kind not in ZIP_BASED and cls.begins_like("zip", head):
            return cls("application/zip", ".zip")
        begins_wrongly = has_signature and not cls.begins_like(kind, head)
        begins_wrongly |= kind in {"svg", "xml"} and cls.MARKUP.match(head) is None
        # In a `txt` the words may be the file's own: nobody can tell.
        is_words = plain.lower() == "text/plain" and cls.ERROR_WORDS.fullmatch(head)
        says_error = kind != "txt" and (is_words or cls.ERROR_ELEMENT.match(head))
        if says_error or (begins_wrongly and plain.lower() in {"text/plain", "text/xml", "application/xml"}):
            raise InvalidResponse("text_answer", "the API answered with plain text instead of the file")
        # A body that begins wrongly was paid for: it is permanent, because a second payment would buy the same.
        if begins_wrongly:
            raise InvalidResponse("wrong_type", f"the answer does not begin as a {target} file does", permanent=True)
        if not has_signature and any(cls.begins_like(other, head) for other in ("png", "jpg", "pdf", "zip", "gif")):
            raise InvalidResponse("wrong_type", f"the answer is of another format than {target}", permanent=True)
        # The first bytes are right; where the media type contradicts them, they are believed.
        if says_nothing or (has_signature and declared in SIGNATURES and not cls.begins_like(declared, head)):
            return cls(cls.media_type_of(kind))
        return cls(media_type if kind in TEXT_FORMATS else plain)


class ErrorAction(Enum):
    """What an error reply asks for."""

    RETRY = "the same request again; it uses up an attempt"
    WAIT = "the same request again later, free of charge"
    NEW_KEY = "the key is taken by another body"
    REJECT = "the API's own word on this object; of a job: the API does not know it"
    FAIL = "somebody's refusal of this request; it proves nothing; of a download: the link is stale"
    STOP_RUN = "no object can be converted"

    @staticmethod
    def choose(rules: Mapping[str, "ErrorAction"], status: int, code: str) -> "ErrorAction":
        """The action of the first rule whose pattern matches the status and the API's code, with a space between."""
        told = f"{status} {code}"
        return next(action for pattern, action in rules.items() if re.fullmatch(pattern, told, re.DOTALL))


# Replies to a conversion (docs/errors). The API's own word on its key or on the month, and a proxy's on its password,
# are said of every request. A redirect, a 403, and what comes without the API's code may be a gateway's.
CONVERSION_RULES = {
    r"\d+ quota_exceeded|401 .+|407 .*": ErrorAction.STOP_RUN,
    r"(409|429) .*": ErrorAction.WAIT,
    r"422 bad_request": ErrorAction.NEW_KEY,
    r"(408|425|[125-9]..) .*": ErrorAction.RETRY,
    r"4(?!0[1-5]).. .+": ErrorAction.REJECT,
    r".*": ErrorAction.FAIL,
}
# Replies to the question for a job. That a job is unknown is believed only from the API.
POLL_RULES = {
    r"(404|410) not_found": ErrorAction.REJECT,
    r"\d+ quota_exceeded|(401|403) .+": ErrorAction.STOP_RUN,
    r"429 .*": ErrorAction.WAIT,
    r".*": ErrorAction.RETRY,
}
# Replies to the request for a result. A stale link is stale, whoever says so and why.
DOWNLOAD_RULES = {r"429 .*": ErrorAction.WAIT, r"(?!408|425)[34].. .*": ErrorAction.FAIL, r".*": ErrorAction.RETRY}


class ApiReply:
    """Readers of what the API's replies say. They take whatever may come in the place of a reply."""

    @staticmethod
    def parse(body: bytes) -> dict[str, Any]:
        """A JSON object, with `?` for half of a surrogate pair, which no file takes; empty for anything else."""
        try:
            told = json.loads(json.dumps(json.loads(body), ensure_ascii=False).encode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return {}
        return told if isinstance(told, dict) else {}

    @staticmethod
    def error(told: Mapping[str, Any]) -> tuple[str, str]:
        """Code and message of an error; empty where a reply is HTML, cut, or in another form."""
        error = told.get("error")
        if isinstance(error, dict):
            code = str(error.get("code") or "")
            # The API may have the same word for something else.
            return f"api_{code}" if code in OWN_CODES else code, str(error.get("message") or "")
        return "", error if isinstance(error, str) else ""

    @staticmethod
    def is_error_alone(body: bytes) -> bool:
        """Whether JSON is the API's error envelope and nothing else, so that it cannot be a file about some error."""
        told = ApiReply.parse(body)
        error = told.get("error") if len(told) == 1 else None
        if not isinstance(error, dict) or not error.keys() <= {"code", "message", "details"}:
            return False
        return isinstance(error.get("code"), str)

    @staticmethod
    def number(headers: Mapping[str, str], name: str) -> int | None:
        """The whole number that a header says; None where it says none, or one that makes no sense."""
        told = headers.get(name, "")
        return int(told) if re.fullmatch("[0-9]{1,15}", told) else None

    @staticmethod
    def remaining(headers: Mapping[str, str]) -> int | None:
        """Conversions that are left this month, the fewest where it says several numbers; None if it says none."""
        told = [part.strip() for part in headers.get("X-CTF-Remaining", "").split(",")]
        return min((int(number) for number in told if re.fullmatch("[0-9]{1,15}", number)), default=None)

    @staticmethod
    def is_older(headers: Mapping[str, str], asked: float) -> bool:
        """Whether an answer was made before it was asked for, in Unix seconds: the API repeats it, headers and all."""
        reset = ApiReply.number(headers, "X-RateLimit-Reset")
        is_past = reset is not None and reset < asked
        return is_past or unix_seconds(headers.get("Date", "")) < math.floor(asked)

    @staticmethod
    def retry_after_seconds(header: str | None, now: float) -> float | None:
        """What `Retry-After` asks for, capped: seconds or an HTTP date; None if it is absent or makes no sense."""
        try:
            seconds = float(header or "nan")
        except ValueError:
            seconds = unix_seconds(str(header)) - now
        # The API's windows last a minute: more than five is a mistake or an attack.
        return None if math.isnan(seconds) else min(max(seconds, 0.0), 300.0)


def backoff(attempt: int, asked: float | None, jitter: float) -> float:
    """Seconds before the next attempt: what the server asked for plus 0 to 50 %, else 2^attempt; `jitter`: 0 to 1."""
    grown = min(2.0 ** min(attempt, 20), BACKOFF_CAP_SECONDS)
    if asked is None:
        return grown * (0.5 + jitter / 2)
    # After many waits in a row the server's word is not enough: it would be asked too often.
    return max(asked, grown if attempt > 8 else 0.0) * (1 + jitter / 2)


def inflate(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """What gzip or deflate has packed, told apart by how it begins. Raises EOFError if it ends early, zlib.error."""
    unpacker = zlib.decompressobj(zlib.MAX_WBITS + 32)
    for piece in pieces:
        packed = piece
        # A file may be packed in several parts, and end in zeros.
        while packed := packed.lstrip(b"\0") if unpacker.eof else packed:
            unpacker = zlib.decompressobj(zlib.MAX_WBITS + 32) if unpacker.eof else unpacker
            yield unpacker.decompress(packed)
            packed = unpacker.unused_data
    if not unpacker.eof:
        raise EOFError("it ends early")


########################################################################################################################
# Records. What crosses a border between rooms, threads and processes: frozen, made of strings and numbers only.
#   - A Decision says what becomes of one object in one job; a Task is a Decision that needs a worker.
#   - An Outcome says all that the journal, the failures file and the report will ever know of a task.
########################################################################################################################

# How objects are counted.
LISTED, RETRIED, LEFT = "listed", "retried", "left"
NOT_MATCHED, FOLDER, EMPTY, ARCHIVED = "not_matched", "folder", "empty", "archived"
SAME_FORMAT, OWN_OUTPUT, FAILED_BEFORE, ALREADY_DONE = "same_format", "own_output", "failed_before", "already_done"
SKIP_REASONS = (NOT_MATCHED, FOLDER, EMPTY, ARCHIVED, SAME_FORMAT, OWN_OUTPUT, FAILED_BEFORE)
ANEW = (
    "were converted before with other options or to another key, and are paid for anew; where only some are meant, "
    "name their keys with --keys-from, in a run with a [job NAME] or --set of its own"
)


class SourceObject(NamedTuple):
    """One line of a listing. A tuple, because millions are made, looked up and dropped."""

    key: str  # as S3 has it: any characters, up to 1,024 bytes of UTF-8
    version: str = ""  # the ETag without quotes, or "size@time" where a server gives none; "": not known
    size: int = 0  # bytes
    last_modified: str = ""  # ISO 8601 in UTC, as S3 writes it; rarely needed as a number; "": a file has named it
    archived: bool = False  # in an archive, and not restored at the moment

    @property
    def modified(self) -> float:
        """When it was written, in Unix seconds."""
        return unix_seconds(self.last_modified)

    @property
    def skip_reason(self) -> str:
        """Why no job takes it, whatever it wants; empty if one may."""
        if self.key.endswith("/"):
            return FOLDER
        if not self.last_modified:
            return ""  # a key from a file: the worker looks
        return EMPTY if not self.size else ARCHIVED if self.archived else ""

    @property
    def if_match(self) -> str:
        """The condition under which a request is about this very version; empty where the server gives no ETag."""
        return f'"{self.version}"' if self.version and "@" not in self.version else ""

    def is_version_of(self, listed: "SourceObject") -> bool:
        """Whether a HEAD has shown the version that a listing has. They may round times differently."""
        if "@" in listed.version or "@" in self.version:
            return listed.size == self.size and abs(listed.modified - self.modified) < 2
        return listed.version == self.version


class PendingRequest(NamedTuple):
    """A request that may have reached the API and is not settled. All of it is the same when it is sent again."""

    version: str  # of the source
    idempotency_key: str
    path: str  # /v1/convert or /v1/jobs
    url: str  # presigned, as it was sent, to the character; empty: the bytes were uploaded
    first_sent: float  # Unix seconds: the API remembers it for IDEMPOTENCY_WINDOW_SECONDS after that
    job_id: str = ""  # of the job that the API has made of it
    payments: int = 0  # results of it that came and were not stored, each paid for
    is_doubtful: int = 0  # 1: another request for this version may have been charged as well


class JournalState(NamedTuple):
    """What the newest row of the log says of an object in a job. As SQLite makes it: a pass fetches millions."""

    key: str
    version: str
    event: str  # an OutcomeKind's value
    permanent: int
    runs_failed: int  # in a row, with this version
    code: str
    # What is left to do of a version that was stored once, until it is done: TAG, or "run 7", which has found its
    # output lost. A failure of it changes nothing of that.
    purpose: str | None = None

    @property
    def lost_in(self) -> str | None:
        """The run that has found its output lost, while it is not made again."""
        return None if self.purpose == TAG else self.purpose


class OutcomeKind(str, Enum):
    """How a task ended. LEFT stays to do and is no event of the journal."""

    CONVERTED = "converted"
    FOUND = "found"  # its output lies there
    ADOPTED = "adopted"  # an output without this program's mark, newer than its source, lies there
    SKIPPED = "skipped"  # a look at the source has shown that there is nothing to convert
    FAILED = "failed"
    LEFT = "left"


DONE_EVENTS = frozenset({OutcomeKind.CONVERTED.value, OutcomeKind.FOUND.value, OutcomeKind.ADOPTED.value})


@dataclass(frozen=True)
class Task:
    """One conversion to make; a worker needs nothing else."""

    job: str
    fingerprint: str  # of target and options
    source: SourceObject
    target: str
    quality: int | None
    output_key: str  # as planned; an archive of pages gets ".zip" behind it
    copy: bool = False  # already in the target format: a server-side copy, nothing is sent to the API
    look: bool = False  # something may lie under the output key
    holder: str = ""  # who has the output key: then this object's output can only be found there, never made
    rival: str = ""  # who wants the output key, too, and comes first: what lies there without a mark is that one's
    pending: PendingRequest | None = None
    known: JournalState | None = None  # perhaps of another version
    crashed: int = 0  # worker processes that died with it

    @property
    def known_version(self) -> JournalState | None:
        """What the journal knows of this very version."""
        return self.known if self.known and self.known.version == self.source.version else None

    @property
    def is_lost(self) -> bool:
        """Whether an output of this version was stored, and a run has found that it is not there any more."""
        return self.known_version is not None and self.known_version.lost_in is not None

    @property
    def is_untagged(self) -> bool:
        """Whether an output of this version is stored, and nothing is left to do but to tag the source."""
        return self.known_version is not None and self.known_version.purpose == TAG


class DecisionKind(Enum):
    """What becomes of an object in a job."""

    SKIP = "skipped"  # the reason is one of SKIP_REASONS
    DONE = "already_done"
    FAIL = "failed"  # before anything is paid
    POSTPONE = "postponed"  # it failed last time, and comes after all that has not been tried
    CONVERT = "convert"
    RESUME = "resume"  # a request is in flight: asked for again, free of charge where the API has done the work
    COPY = "copy"


class Decision(NamedTuple):
    """What the plan says of one object in one job. `job` is empty for what no job wants; `task` is there for work."""

    kind: DecisionKind
    source: SourceObject
    job: str = ""
    reason: str = ""  # of SKIP and DONE, under which it is counted; the code of FAIL
    message: str = ""
    task: Task | None = None
    is_retry: bool = False  # it was postponed, and has been counted as listed
    is_anew: bool = False  # the same version was made into the target before, by a job that is not configured now
    output: "StoredOutput | None" = None  # of DONE, where a look has shown it


class StoredOutput(NamedTuple):
    """What S3 has taken."""

    key: str
    etag: str  # empty: not known
    size: int  # bytes; 0: not known, for each output has some
    pages: int = 0  # that were stored beside it, if it is an archive of pages


class ExpectedOutput(NamedTuple):
    """What is to lie in the output bucket, as far as it is known."""

    key: str
    job: str
    source_key: str
    etag: str | None  # empty: not known; None: something of this source may lie there, or nothing
    size: int | None  # bytes; None: not known
    left_out: str = ""  # why a run would skip its source


@dataclass(frozen=True)
class Outcome:
    """How one task ended, with what it took."""

    task: Task
    kind: OutcomeKind
    code: str = ""  # of a failure or a skip: the API's own, or one of this program's
    message: str = ""
    status: int = 0  # HTTP status of the API's last reply; 0 if there was none
    permanent: bool = False
    pending: PendingRequest | None = None  # the request that must be kept, because the API may have its result
    output: StoredOutput | None = None
    is_untagged: bool = False  # a failure after which nothing is left to do but to tag the source
    page_bytes: int = 0  # of the pages that were stored beside it
    seconds: float = 0.0  # from the worker's first step to its last, waits included
    requests: int = 0
    throttled: int = 0  # answers 429
    is_replay: bool = False
    paid: int = 0  # results that came for the first time
    possible_double_charge: bool = False
    remaining: int | None = None  # conversions this month, as the API says
    runs_failed: int = 0  # in a row, this one included

    @property
    def is_free(self) -> bool:
        """Whether it is a failure that has cost nothing in vain, and says nothing of the API or of S3."""
        return self.code in FREE_FAILURES and (self.is_untagged or not self.paid)


class FeederUpdate(NamedTuple):
    """What the feeder has found out, a part at a time."""

    counts: Mapping[tuple[str, str], int] = {}  # of one page, by (job, counter); job "": objects that no job wants
    total: int | None = None  # how many objects this run is to try, as a second pass over the listing has counted them
    reason: RunError | None = None  # why no more is handed out, if that is not all there is
    is_complete: bool = False  # the listing was read to its end, and all of it is handed out


Message = Outcome | FeederUpdate | None  # None: a worker, or a process of them, has left
Tasks = queue.Queue[Task | None]  # None: no more will come


########################################################################################################################
# Settings. An option is declared once, as a field of one of the four sections; the INI file, the environment, the
# command line, the checks and the tests of the documentation all read those declarations.
#   - A value is text with a place of origin (RawOption) until it is read; problems are collected, not raised, so that a
#     person sees all of them at once.
#   - A secret is never a part of a message, not even a wrong one.
########################################################################################################################

T = TypeVar("T")
QUOTED = r"""(["']).*\1"""  # as other programs want values
UNITS: dict[str, float] = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
UNITS |= {"s": 1, "m": 60, "h": 3600, "d": 86400, "%": 0.01}


class OptionSpec(NamedTuple):
    """How an option is read from text, and what it is for."""

    reader: Callable[[str], Any]  # raises ValueError with what it accepts
    purpose: str


def option(reader: Callable[[str], Any], purpose: str, default: T, **without: Any) -> T:
    """Declare a field of a section as an option. `without`: a word, and what it and an empty value stand for."""

    def read(given: str) -> Any:
        ((word, value),) = without.items()
        if given.lower() in {word, ""}:
            return value
        try:
            return reader(given)
        except ValueError as problem:
            raise ValueError(f"{problem}, or {word}") from None

    return field(default=default, metadata={"spec": OptionSpec(read if without else reader, purpose)})


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """How the sentence goes on that refuses a name."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


class Read:
    """Readers of options, from text. Each raises ValueError with what it accepts."""

    @staticmethod
    def matching(pattern: str, expected: str, made: Callable[..., T | None]) -> Callable[[str], T]:
        """What `made` makes of a pattern's groups, in lower case, if the whole value matches; None is refused too."""

        def read(given: str) -> T:
            match = re.fullmatch(pattern, given.lower())
            value = made(*match.groups()) if match else None
            if value is None:
                raise ValueError(f"expected {expected}")
            return value

        return read

    @staticmethod
    def integer(least: int, most: float = math.inf) -> Callable[[str], int]:
        """Whole numbers from `least` to `most`."""
        bounds = f"of {least} or more" if most == math.inf else f"from {least} to {most}"
        expected = f"a whole number {bounds}"
        return Read.matching(r"(\d{1,12})", expected, lambda given: int(given) if least <= int(given) <= most else None)

    @staticmethod
    def choice(*choices: str) -> Callable[[str], str]:
        """One of some words."""
        return Read.matching(f"({'|'.join(choices)})", f"one of {', '.join(choices)}", str)

    @staticmethod
    def header(given: str) -> str:
        """What S3 is told with each output."""
        if not given.isprintable():
            raise ValueError("expected one line")
        return given

    @staticmethod
    def tags(most: int) -> Callable[[str], tuple[tuple[str, str], ...]]:
        """Keys and values of tags, URL-encoded. What S3 would refuse with each object is refused here."""

        def is_fit(text: str, least: int, longest: int) -> bool:
            # S3 takes letters and digits of all languages, and counts in units of UTF-16.
            is_plain = re.fullmatch(r"[\w .:/=+@-]*", text)
            return bool(is_plain) and least <= len(text.encode("utf-16-le")) // 2 <= longest

        def read(given: str) -> tuple[tuple[str, str], ...]:
            try:
                pairs = urllib.parse.parse_qsl(given, keep_blank_values=True, strict_parsing=True, errors="strict")
            except ValueError:
                pairs = []
            if not 1 <= len(pairs) <= most:
                many = "one tag such as converted=yes" if most == 1 else f"1 to {most} tags such as a=b&c=d"
                raise ValueError(f"expected {many}, URL-encoded")
            if not all(is_fit(key, 1, 128) and is_fit(value, 0, 256) for key, value in pairs):
                long = "keys of 1 to 128 and values of up to 256 characters"
                raise ValueError(f"expected {long}: letters, digits, spaces and + - = . _ : / @, URL-encoded")
            if len(dict(pairs)) < len(pairs) or any(key.lower().startswith("aws:") for key, _ in pairs):
                raise ValueError("expected each key once, and none that begins with aws:")
            return tuple(pairs)

        return read

    @staticmethod
    def bucket(name: str, given: str) -> str:
        """A bucket's name, or the ARN of an access point; `name`: which option is read."""
        address = re.fullmatch(r"s3://([^/]+)/*(.*?)/*", given)
        if address:
            below = f" and prefix = {address[2]}/" if address[2] and name == "bucket" else ""
            raise ValueError(f"expected a bucket's name; did you mean {name} = {address[1]}{below}?")
        # As boto3 lets it through.
        if given and not re.fullmatch(r"[A-Za-z0-9._-]{1,255}|arn:aws.*:s3.*:accesspoint[/:][A-Za-z0-9.-]+", given):
            raise ValueError("expected a bucket's name")
        return given

    @staticmethod
    def key(given: str) -> str:
        """Any text that may stand in a key, but not what is surely meant for another program."""
        if given.startswith("s3://"):
            raise ValueError("give only what follows the bucket")
        if re.fullmatch(QUOTED, given, re.DOTALL):
            raise ValueError("expected the beginning of a key")
        # Bytes that are no UTF-8 come from a command line as halves of surrogate pairs.
        if re.search(r"[\ud800-\udfff]", given):
            raise ValueError("expected UTF-8, for S3 has no other keys; check the terminal's locale")
        return given

    @staticmethod
    def template(given: str) -> str:
        """The key of an output, with fields that make another one of each source's."""
        known, named = ("key", "dir", "name", "stem", "ext", "target", "job"), re.findall(r"\{(\w+)\}", given)
        if unknown := next((name for name in named if name not in known), None):
            raise ValueError(f"{{{unknown}}} is not a field{did_you_mean(unknown, known)}")
        if not {"key", "name", "stem"}.intersection(named):
            raise ValueError("every output would get the same key; expected {stem}, {name} or {key}")
        if given.startswith("/") or re.search(r"[{}]", re.sub(r"\{\w+\}", "", given)):
            raise ValueError("expected a key such as converted/{dir}{stem}.{target}")
        return Read.key(given)

    @staticmethod
    def globs(given: str) -> tuple[str, ...]:
        """Globs separated by white space. What can hardly match a key is refused: nothing would be converted."""
        patterns = tuple(given.split())
        for pattern, (mistake, said) in itertools.product(patterns, GLOB_MISTAKES.items()):
            if re.fullmatch(mistake, pattern):
                raise ValueError(said.format(pattern))
        return patterns

    @staticmethod
    def url(given: str) -> str:
        """The address of a server, without a slash at its end."""
        with contextlib.suppress(ValueError):
            parts = urllib.parse.urlsplit(given)
            is_server = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
            str(parts.hostname).encode("idna")  # raises ValueError for two dots in a row, or too long a part
            if is_server and not (parts.query or parts.fragment or re.search(r"\s", given)):
                return given.rstrip("/")
        raise ValueError("expected an address such as https://changethisfile.com")

    @staticmethod
    def amount(number: str, unit: str) -> float:
        """A number of some unit."""
        return float(number) * UNITS[unit]

    @staticmethod
    def seconds(number: str, unit: str) -> float | None:
        """A time; None if no timer takes it."""
        found = Read.amount(number, unit)
        return found if found <= 1e9 else None

    booleans = configparser.ConfigParser.BOOLEAN_STATES
    boolean = matching(f"({'|'.join(booleans)})", "yes or no", booleans.get)
    file_format = matching(r"\.*([a-z0-9]{1,10})", "a file extension such as jpg or pdf", str)
    # A number alone is no duration: is 150 seconds or minutes?
    number, times, sizes = r"(\d{1,12}(?:\.\d{1,9})?)\s*", "([smhd])", "([kmg]i?b|)"
    size = matching(number + sizes, "a size such as 500, 100MB or 5GiB", lambda *parts: int(Read.amount(*parts)))
    duration = matching(number + times, "a duration such as 150s, 10m, 2h or 7d", seconds)
    longer_than_0 = "a duration of more than 0, such as 150s, 10m, 2h or 7d"
    positive_duration = matching("(?=.*[1-9])" + number + times, longer_than_0, seconds)
    percent = matching(r"(\d{1,2}(?:\.\d+)?|100(?:\.0+)?)\s*(%)", "a rate such as 2%", amount)
    price = matching(r"(\d{1,6}(?:\.\d{1,9})?)", "a plain number such as 0.004, without a currency", float)


@dataclass(frozen=True)
class Shard:
    """One of the parts into which several machines divide the work; as it stands, the only one: everything."""

    MAX_SHARDS = 10_000  # the largest array job of AWS Batch and of Cloud Run
    # The variables in which an array-job engine tells a task which of how many it is: index and count; where indexes
    # begin anywhere and go up in steps, then the first, the last and the step. Only the step may be missing.
    SCHEDULERS = (
        ("AWS Batch", ("AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE")),
        ("Slurm", tuple(f"SLURM_ARRAY_TASK_{part}" for part in ("ID", "COUNT", "MIN", "MAX", "STEP"))),
        ("Cloud Run", ("CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT")),
        # Kubernetes has no variable for the count: the Job's author sets this one. The index alone may be another's.
        ("Kubernetes", ("JOB_COMPLETION_INDEX", "SHARD_COUNT")),
    )

    index: int = 0  # from 0
    count: int = 1

    @classmethod
    def parse(cls, given: str) -> "Shard":
        """One of N parts, from `I/N`. Raises ValueError with what it accepts."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", given)
        if match is None or not int(match[1]) < int(match[2]) <= Shard.MAX_SHARDS:
            raise ValueError(f"expected I/N such as 0/8, with I from 0 to N - 1 and N at most {Shard.MAX_SHARDS}")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], problems: list[str]) -> "Shard":
        """The shard that the array-job engine names which started this task; everything, if there is none.

        What is incomplete or ambiguous is a problem, never a guess: a wrong one would leave objects out, unnoticed.
        """
        found: dict[Shard, str] = {}
        for engine, variables in cls.SCHEDULERS:
            given = {name: environ[name].strip() for name in variables if environ.get(name)}
            if given.keys().isdisjoint(variables[:2]):
                continue
            shown = ", ".join(f"{name} = {value}" for name, value in given.items())
            try:
                found.setdefault(cls._from_variables(variables, given), f"{engine} ({shown})")
            except ValueError as problem:
                problems.append(f"{shown}: {problem}, or give --shard 0/1 to convert everything here")
        if len(found) > 1:
            named = " and ".join(f"{shown} names shard {shard}" for shard, shown in found.items())
            problems.append(f"{named}: unset what is not meant, or give --shard 0/1 to convert everything here")
        return next(iter(found), cls())

    @classmethod
    def _from_variables(cls, variables: Sequence[str], given: Mapping[str, str]) -> "Shard":
        if missing := [name for name in variables[:4] if name not in given]:
            raise ValueError(f"set {' and '.join(missing)} too")
        smallest = zip(variables, (0, 1, 0, 0, 1), strict=False)
        index, count, *steps = [Read.integer(least)(given[name]) for name, least in smallest if name in given]
        first, last, step = [*steps, *(0, count - 1, 1)[len(steps) :]]
        if first + (count - 1) * step != last:
            raise ValueError("expected indexes without a hole, such as --array=0-15")
        rank, remainder = divmod(index - first, step)
        if remainder or not 0 <= rank < count:
            raise ValueError(f"expected an index from {first} to {last}" + (f" in steps of {step}" if step > 1 else ""))
        if count > Shard.MAX_SHARDS:
            raise ValueError(f"expected at most {Shard.MAX_SHARDS} shards")
        return cls(rank, count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def named(self) -> str:
        """How a sentence about the run goes on; empty if there is but one shard."""
        return f" for shard {self}" if self.count > 1 else ""

    def owner_of(self, text: str) -> "Shard":
        """The shard that a text belongs to: the slot of a planned output, of what no job wants of the first job's."""
        # Not `hash`, which differs from process to process. A key may hold anything: half a surrogate pair as well.
        digested = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return Shard(int.from_bytes(digested, "big") % self.count, self.count)

    def owns(self, text: str) -> bool:
        """Whether a text belongs to this shard."""
        return self.count == 1 or self.owner_of(text) == self

    def share(self, total: int) -> int:
        """The part of a whole number that falls to this shard; those of all shards add up to it."""
        return total // self.count + (self.index < total % self.count)

    def file(self, path: str) -> str:
        """The shard's own name for a file: `a.json` is `a.0-of-8.json`. A device is no file and keeps its name."""
        stem, ending = os.path.splitext(path)
        is_device = path.startswith(("/dev/", "/proc/"))
        return path if self.count == 1 or is_device else f"{stem}.{self.index}-of-{self.count}{ending}"


@dataclass(frozen=True)
class S3Options:
    """The options of [s3]."""

    bucket: str = option(partial(Read.bucket, "bucket"), "bucket to read from", "")
    prefix: str = option(Read.key, "only keys that begin so", "")
    output_bucket: str = option(partial(Read.bucket, "output_bucket"), "bucket to write to, if it is another", "")
    output_key: str = option(
        Read.template,
        "key of an output; fields {key} {dir} {name} {stem} {ext} {target} {job}",
        "converted/{dir}{stem}.{target}",
    )
    endpoint_url: str | None = option(Read.url, "any S3-compatible store", None, none=None)
    region: str | None = option(str, "region, if boto3 does not know it", None, none=None)
    profile: str | None = option(str, "profile of the AWS configuration", None, none=None)
    storage_class: str | None = option(Read.header, "storage class of outputs", None, none=None)
    sse: str | None = option(Read.header, "server-side encryption: AES256 or aws:kms", None, none=None)
    sse_kms_key_id: str | None = option(Read.header, "key for aws:kms", None, none=None)
    acl: str | None = option(Read.header, "canned ACL of outputs", None, none=None)
    cache_control: str | None = option(Read.header, "Cache-Control of outputs", None, none=None)
    tags: tuple[tuple[str, str], ...] = option(Read.tags(MAX_TAGS), "tags of outputs, as in a=b&c=d", (), none=())
    tag_source: tuple[tuple[str, str], ...] = option(
        Read.tags(1), "tag that a source gets once its output is stored", (), none=()
    )
    requester_pays: bool = option(Read.boolean, "the requester pays for S3 requests", default=False)

    @property
    def is_one_bucket(self) -> bool:
        """Whether outputs go to where the sources are."""
        return self.output_bucket == self.bucket


@dataclass(frozen=True)
class ConvertOptions:
    """The options of [convert], which a [job NAME] may override."""

    target: str = option(Read.file_format, "format to convert to", "")
    include: tuple[str, ...] = option(Read.globs, "globs of what to convert", ("*",))
    exclude: tuple[str, ...] = option(
        Read.globs,
        "globs of what to leave out",
        (".DS_Store", "Thumbs.db", "desktop.ini", "._*", "*.aae"),  # of macOS, Windows, iOS: nobody's content
    )
    min_size: int = option(Read.size, "only objects of at least this size", 0, none=0)
    max_size: float = option(Read.size, "only objects of at most this size", math.inf, none=math.inf)
    newer_than: float = option(Read.duration, "only objects changed within this time", math.inf, none=math.inf)
    older_than: float = option(Read.duration, "only objects not changed for this time", -math.inf, none=-math.inf)
    quality: int | None = option(Read.integer(1, 100), "quality, for lossy formats", None, none=None)
    same_format: str = option(
        Read.choice("skip", "copy", "convert"), "a source that is in the target format already", "skip"
    )
    pages: str = option(Read.choice("zip", "unpack"), "an archive of pages: as it is, or each page too", "zip")


def read_small_file(path: Path, encoding: str) -> tuple[str, int]:
    """The text of a file that a person has written, and its mode. Raises OSError, UnicodeError."""
    # A device may never end.
    with path.open("rb") as file:
        content = file.read(SMALL_FILE_BYTES + 1)
        if len(content) > SMALL_FILE_BYTES:
            raise OSError(errno.EFBIG, f"it has more than {human_bytes(SMALL_FILE_BYTES)}")
        return content.decode(encoding), stat.S_IMODE(os.fstat(file.fileno()).st_mode)


@dataclass(frozen=True)
class ApiOptions:
    """The options of [api]."""

    url: str = option(Read.url, "address of the API", "https://changethisfile.com")
    key: str = option(str, "API key; better in the environment as CTF_API_KEY", "")
    key_file: str = option(str, "file that holds the API key", "")
    transfer: str = option(
        Read.choice("auto", "url", "upload"),
        "send a presigned URL, or the bytes; auto: URL if the API takes it",
        "auto",
    )
    requests_per_minute: int | None = option(
        Read.integer(1), "cap on the rate; auto: what the API allows", None, auto=None
    )
    max_conversions: int | None = option(
        Read.integer(1), "conversions to ask for in one run, failed ones included", None, none=None
    )
    keep_remaining: int = option(Read.integer(0), "stop when the month has so many conversions left", 0)
    timeout: float = option(Read.positive_duration, "how long to wait for an answer", 150.0)
    retries: int = option(Read.integer(0, 20), "transient failures that one object may have", 5)
    jobs_above: int | None = option(Read.size, "larger objects go through /v1/jobs", 100 * 10**6, never=None)
    max_size: int = option(Read.size, "larger objects are not sent", 5 * 10**9)
    price: float | None = option(Read.price, "what one conversion costs, in your account's currency", None, none=None)

    def too_large(self, size: int) -> str:
        """Why an object of so many bytes is not sent; empty if it is."""
        # /v1/convert takes 100 MB, in the smaller reading of MB.
        most = min(self.max_size, 100 * 10**6 if self.jobs_above is None else self.max_size)
        return f"{size} bytes are more than {most}; see api.max_size, api.jobs_above" if size > most else ""

    def read_key(self) -> tuple[str, str]:
        """The API key, from its file if that is where it is; and what is wrong with it."""
        key = self.key
        if not key and self.key_file:
            place = f"[api] key_file = {self.key_file}"
            try:
                words = read_small_file(Path(os.path.expanduser(self.key_file)), "ascii")[0].split()
            except OSError as problem:
                return "", f"{place}: {problem.strerror}"
            except ValueError:
                return "", f"{place}: not a text file"
            if len(words) != 1:
                return "", f"{place}: {'expected the key and nothing else' if words else 'the file is empty'}"
            key = words[0]
        if not key:
            return "", "[api] key is missing: set CTF_API_KEY, or api.key or api.key_file"
        is_readable = re.fullmatch(r"[!-~]+", key)
        return key, "" if is_readable else "[api] key = (not shown): expected printable ASCII without spaces"


@dataclass(frozen=True)
class RunOptions:
    """The options of [run]."""

    workers: int = option(Read.integer(1, 1000), "conversions at a time, over all processes", 10)
    processes: int = option(Read.integer(1, 64), "processes that share the workers out among them", 1)
    checkpoint: str = option(str, "SQLite file that remembers what is done", "s3_bulk_convert.sqlite3")
    failures: str = option(str, "file that failures are appended to, a JSON line each", "conversion_failures.jsonl")
    max_failure_rate: float = option(
        Read.percent, "stop when more fail, after 50 finished objects", 0.02, never=math.inf
    )
    skip_existing: bool = option(
        Read.boolean,
        "an output that lies there counts as done; no: it is made again, but never over another's",
        default=True,
    )
    shutdown_grace: float = option(Read.duration, "time for what is in flight after SIGINT or SIGTERM", 30.0)
    max_runtime: float = option(Read.duration, "take no new objects after this", math.inf, none=math.inf)
    summary: str | None = option(str, "file for a JSON summary of the run", None, none=None)
    metrics: str | None = option(str, "file for metrics, in Prometheus' text format", None, none=None)
    log_every: int = option(Read.integer(1), "a line of progress every so many objects, without a terminal", 100)

    @property
    def consumers(self) -> int:
        """How many threads of this process take tasks off the queue: the workers, or one for each process of them."""
        return self.workers if self.processes == 1 else self.processes


SECTIONS: Mapping[str, Any] = {"s3": S3Options, "convert": ConvertOptions, "api": ApiOptions, "run": RunOptions}
SPECS: dict[str, dict[str, OptionSpec]] = {
    section: {part.name: part.metadata["spec"] for part in fields(declared)} for section, declared in SECTIONS.items()
}
SPECS["job NAME"] = {**SPECS["convert"], **{name: SPECS["s3"][name] for name in ("prefix", "output_key")}}
OUTPUT_FILES = ("checkpoint", "failures", "summary", "metrics")  # what one run alone may write
ENVIRONMENT = {
    "CTF_API_KEY": ("api", "key"),
    "S3_BUCKET": ("s3", "bucket"),
    "SOURCE_PREFIX": ("s3", "prefix"),
    "TARGET_FORMAT": ("convert", "target"),
    "CONCURRENCY": ("run", "workers"),
}


@dataclass(frozen=True)
class Job(ConvertOptions):
    """One route: which objects, to which format, under which keys."""

    name: str = "default"
    prefix: str = ""
    output_key: str = S3Options.output_key
    now: float = field(default_factory=time.time, compare=False)  # Unix seconds; ages are counted from there

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of target and options: all that decides what an output is."""
        return digest([self.target, self.quality])

    @property
    def place(self) -> str:
        """Where outputs are put. A job may be renamed for free, unless its name decides that."""
        return self.output_key.replace("{job}", self.name)

    @property
    def constant_prefix(self) -> str:
        """What the key of every output begins with."""
        return self.output_key.partition("{")[0]

    def output_of(self, key: str) -> str:
        """The key that the output of an object is planned to have."""
        parts = KeyParts.of(key)
        # The template is a format string by its reader; what is filled in is data, whatever braces it has.
        return self.output_key.format(
            key=key,
            dir=parts.folder,
            name=parts.name,
            stem=parts.stem,
            ext=parts.ext,
            target=self.target,
            job=self.name,
        )

    def lets_in(self, key: str) -> bool:
        """Whether prefix and globs let a key in."""
        if not key.startswith(self.prefix) or self._excluded.match(key):
            return False
        return "*" in self.include or self._included.match(key) is not None

    def wants(self, source: SourceObject) -> bool:
        """Whether prefix and globs let an object in; and size and age, unless its key comes from a file."""
        if not self.lets_in(source.key):
            return False
        if not source.last_modified:
            return True
        # Without a limit no date is read: that would take longer than all the rest. By S3's clock, what was written
        # just now may be from the future: it is new.
        is_of_age = self._is_any_age or self.older_than <= self.now - source.modified <= self.newer_than
        return is_of_age and self.min_size <= source.size <= self.max_size

    @functools.cached_property
    def _is_any_age(self) -> bool:
        return (self.older_than, self.newer_than) == (-math.inf, math.inf)

    @functools.cached_property
    def _included(self) -> re.Pattern[str]:
        return self.globs_pattern(self.include)

    @functools.cached_property
    def _excluded(self) -> re.Pattern[str]:
        return self.globs_pattern(self.exclude)

    @staticmethod
    def globs_pattern(globs: Sequence[str]) -> re.Pattern[str]:
        """Matches keys, without regard to case: any glob with a slash the whole key, or any other the name.

        `**/` stands for folders of any number, none among them.
        """
        translated = [(glob, fnmatch.translate(re.sub(r"(?<![^/])\*\*/", "\0", glob))) for glob in globs]
        on_key, on_name = (
            "|".join(made.replace("\0", "(?:.*/)?") for glob, made in translated if ("/" in glob) is with_slash)
            or "(?!)"
            for with_slash in (True, False)
        )
        return re.compile(rf"{on_key}|(?s:.*/)?(?![^/]*/)(?:{on_name})", re.IGNORECASE)

    def is_same_format(self, key: str) -> bool:
        """Whether a key's extension names the target."""
        return key.lower().endswith(self._same_endings) and KeyParts.of(key).ext != ""

    def leaves_as_it_is(self, key: str) -> bool:
        """Whether a key is skipped because it names the target."""
        return self.same_format == "skip" and self.is_same_format(key)

    def result_of(self, key: str) -> tuple[str, str, str, str]:
        """What it makes of an object, or that it leaves it; jobs of one result would make the very same output."""
        handling = self.same_format if self.is_same_format(key) else "convert"
        return handling, self.pages, self.fingerprint, self.output_of(key)

    @functools.cached_property
    def _same_endings(self) -> tuple[str, ...]:
        target = FileType.canonical(self.target)
        return (f".{target}", *(f".{alias}" for alias, name in FORMAT_ALIASES.items() if name == target))


@dataclass(frozen=True)
class Settings:
    """A complete and checked configuration."""

    s3: S3Options
    api: ApiOptions
    run: RunOptions
    jobs: tuple[Job, ...]
    shard: Shard = Shard()
    retry_failed: bool = False
    repair: bool = False
    keys_from: str | None = None
    quiet: bool = False
    log_format: str = "text"
    key_problem: str = ""  # why there is no API key, for commands that can do without

    @functools.cached_property
    def by_name(self) -> Mapping[str, Job]:
        """The jobs by name, in their order: of two that want one output key, the first keeps it, in every run."""
        return {job.name: job for job in self.jobs}

    def puts_among_sources(self, job: Job) -> bool:
        """Whether a job's outputs lie between the sources, because no prefix of their own sets them apart."""
        return self.s3.is_one_bucket and not job.constant_prefix

    @property
    def own_prefixes(self) -> tuple[str, ...]:
        """Where outputs lie in the bucket of the sources."""
        prefixes = {job.constant_prefix for job in self.jobs}
        return tuple(sorted(filter(None, prefixes))) if self.s3.is_one_bucket else ()

    def __str__(self) -> str:
        """What a run is about, in a few words."""
        routes = (f"s3://{self.s3.bucket}/{job.prefix} to {job.target}" for job in self.jobs)
        return ", ".join(dict.fromkeys(routes)) + self.shard.named

    def hide(self, message: str) -> str:
        """A text of the API's without secrets, the key itself among them."""
        return redact(message.replace(self.api.key or "\0", "..."))

    def json(self, document: Mapping[str, Any], indent: int | None = None) -> str:
        """A document without secrets; on one line, if its parts are not to be indented."""
        return json.dumps(without_secrets(document, self.hide), indent=indent)


class RawOption(NamedTuple):
    """A value as a person wrote it."""

    section: str
    name: str  # empty: the section is there, which may be misspelt, or be a job that overrides nothing
    value: str
    named: str  # how the place it came from is called in messages

    @classmethod
    def from_ini(cls, path: Path, *, required: bool) -> "list[RawOption]":
        """The values in an INI file. Raises RunError if it cannot be read."""
        # No interpolation: a % in a key is a %. No default section: its options would turn up in every other one.
        parser = configparser.ConfigParser(interpolation=None, default_section="\0")
        compare, give = "compare it with config.example.ini", "give the INI file with -c, or copy config.example.ini"
        try:
            text, mode = read_small_file(path, "utf-8-sig")
            if "\0" in text:
                raise usage_error(f"{path} cannot be read: it is no text in UTF-8", compare)
            parser.read_file(io.StringIO(text, newline=None))
        except FileNotFoundError:
            if required:
                raise usage_error(f"{path} does not exist", give) from None
            return []
        except IsADirectoryError:
            raise usage_error(f"{path} is a directory", give) from None
        except OSError as problem:
            allow = "let this user read it (chmod, chown), or give another with -c"
            raise usage_error(f"{path} cannot be read: {problem.strerror}", allow) from None
        except UnicodeDecodeError as problem:
            raise usage_error(f"{path} cannot be read: {problem}", compare) from None
        except configparser.Error as problem:
            # Never the line itself, which may be the one with the key.
            said: dict[type[configparser.Error], str] = {
                configparser.DuplicateOptionError: "[{0.section}] {0.option} is given twice",
                configparser.DuplicateSectionError: "[{0.section}] is there twice",
                configparser.MissingSectionHeaderError: "no [section] above it; begin with [s3]",
            }
            line = getattr(problem, "lineno", None) or next((number for number, _ in getattr(problem, "errors", ())), 0)
            told = said.get(type(problem), "expected NAME = VALUE").format(problem)
            raise usage_error(f"{path}, line {line}: {told}", compare) from None
        if parser.get("api", "key", fallback="") and os.name == "posix" and mode & (stat.S_IRGRP | stat.S_IROTH):
            told = f"{path} holds the API key and others can read it (mode {mode:04o})"
            raise usage_error(told, f"run: chmod 600 {path}")
        return [
            cls(section, name, value.strip(), f"[{section}] {name}")
            for section in parser.sections()
            for name, value in [("", ""), *parser.items(section)]
        ]


class SettingsReader:
    """Reads the options that are given, and collects every problem, each under the name of its option."""

    def __init__(self, given: Sequence[RawOption]) -> None:
        # Of two values the later one counts, and what is overridden is not judged.
        self.given = {(entry.section, entry.name): entry for entry in given}
        self.problems: list[str] = []
        self.values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        for section, name, value, named in self.given.values():
            kind = "job NAME" if section.startswith("job ") else section
            if kind not in SPECS:
                self.problems.append(f"[{section}] is not a section{did_you_mean(section, SPECS)}")
                continue
            values, specs = self.values.setdefault(section, {}), SPECS[kind]
            if name and name not in specs:
                elsewhere = next((other for other in SPECS if name in SPECS[other]), None)
                meant = f"; did you mean [{elsewhere}] {name}?" if elsewhere else did_you_mean(name, specs)
                self.problems.append(f"{named} is not an option{meant}")
            elif name:
                try:
                    values[name] = specs[name].reader(value)
                except ValueError as expected:
                    comment = "; comments stand on lines of their own" if re.search(r"\s[;#]", value) else ""
                    advice = "; take the quotes away" if re.fullmatch(QUOTED, value, re.DOTALL) else comment
                    self.problems.append(f"{named} = {value}: {expected}{advice}")

    def require(self, name: str, *sections: str) -> None:
        """Note it where an option is given in none of some sections, or is empty."""
        given = (self.given.get((section, name)) for section in sections)
        if not any(entry and entry.value for entry in given):
            self.problems.append(f"[{sections[0]}] {name} is missing")

    def jobs(self, s3: S3Options) -> tuple[Job, ...]:
        """The routes of the run: one for each [job NAME], or the one named default."""
        jobs: dict[str, Job] = {}
        # Sorted, so that the first job, which keeps an output key, is the same in every run.
        for section in sorted(self.values.keys() - SECTIONS.keys()) or ["convert"]:
            own = {"prefix": s3.prefix, "output_key": s3.output_key, **self.values["convert"], **self.values[section]}
            name = "default" if section == "convert" else section.removeprefix("job ").strip()
            if not name or name in {job.name for job in jobs.values()}:
                told = "there is a job of this name already" if name else "a job needs a name, such as [job photos]"
                told = f"{told}; give it another"
                self.problems.append(f"[{section}]: {told}")
            if not name.isprintable():
                self.problems.append(f"[{section}]: expected a name in UTF-8; check the terminal's locale")
            job = jobs[section] = Job(name=name, **own)
            self.require("target", section, "convert")
            if job.min_size > job.max_size:
                self.problems.append(f"[{section}] min_size is larger than max_size: no object can be converted")
            if job.older_than > job.newer_than:
                self.problems.append(f"[{section}] older_than is longer than newer_than: no object can be converted")
        for section, job in jobs.items() if s3.is_one_bucket else ():
            for other in (job, *jobs.values()):
                constant = other.constant_prefix
                if constant and job.prefix.startswith(constant):
                    place = section if "prefix" in self.values[section] else "s3"
                    whose = "" if other is job else f" of [job {other.name}]"
                    lies = f"lies under the outputs{whose} ({constant}), and outputs are never converted"
                    self.problems.append(f"[{place}] prefix = {job.prefix}: {lies}")
                    break
        return tuple(jobs.values())

    @staticmethod
    def _is_same_file(first: str, second: str) -> bool:
        """Whether two paths lead to one file, by links of any kind, or would. A device is none."""
        with contextlib.suppress(OSError):
            return os.path.samefile(first, second) and os.path.isfile(first)
        return os.path.realpath(first) == os.path.realpath(second)

    @staticmethod
    def number_of_open_file(path: Path, most: int = 9) -> int | None:
        """The number under which a shell has opened a file for this process, as /dev/stdout is 1; None if it has not.

        Opened by its path, such a file would be written from its beginning, over what is there. Both of /dev/stdout and
        /dev/stderr may be one.
        """
        for number in range(1, most + 1):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(path), os.fstat(number)):
                    return number
        return None

    @staticmethod
    def _may_be_failures(path: str) -> bool:
        """Whether a file begins as a failures file does, or nothing can be read of it."""
        with contextlib.suppress(OSError), open(path, "rb") as file:
            return file.read(100).lstrip()[:1] in b"{"
        return True

    def check_run(self, run: RunOptions, shard: Shard, read: Mapping[str, str]) -> None:
        """Note a checkpoint that is no file, files that would be written over others, and idle processes.

        `read`: the path of each file that is read, by what it is called.
        """
        is_other = os.path.exists(run.checkpoint) and not os.path.isfile(run.checkpoint)  # its mode is to be changed
        if is_other or not Path(run.checkpoint).name:
            self.problems.append(f"[run] checkpoint = {run.checkpoint}: expected the path of a file")
        paths = {name: shard.file(path) for name in OUTPUT_FILES if (path := getattr(run, name))}
        checkpoint = os.path.realpath(paths.pop("checkpoint", ""))
        # SQLite and the lock have files of their own beside it.
        kept = {f"checkpoint{end}": checkpoint + end for end in ("", "-wal", "-shm", "-journal", ".lock")}
        for name in read:
            if any(self._is_same_file(read[name], own) for own in kept.values()):
                told = f"is the {name} file as well; give it another path"
                self.problems.append(f"[run] checkpoint = {run.checkpoint}: {told}")
        kept.update(read)
        for first, second in (*itertools.product(kept, paths), *itertools.combinations(paths, 2)):
            if first in kept:
                is_shared = self._is_same_file(kept[first], paths[second])
            else:
                pair = (paths[first], paths[second])
                is_link = self._is_same_file(*pair) and self.number_of_open_file(Path(pair[0])) is None
                is_shared = is_link or os.path.abspath(pair[0]) == os.path.abspath(pair[1])
            # To try again what has failed, a run reads the file that it appends to: but not if that is a list of keys.
            is_fed = (first, second) == ("--keys-from", "failures")
            if is_shared and not (is_fed and self._may_be_failures(paths[second])):
                told = f"is the {first} file as well; give it another path"
                self.problems.append(f"[run] {second} = {getattr(run, second)}: {told}")
        if run.processes > run.workers:
            shared = f"more than the {run.workers} workers that they share"
            self.problems.append(f"[run] processes = {run.processes}: {shared}")


def load_settings(
    path: Path | None,
    environ: Mapping[str, str],
    command_line: Sequence[RawOption],
    shard_flag: str | None = None,
    *,
    needs_key: bool = True,
    keys_from: str | None = None,
) -> Settings:
    """The configuration: command line over environment over INI file over defaults. Raises RunError with all problems.

    `needs_key`: whether a missing API key is one.
    """
    file = path or Path("config.ini")
    ini = RawOption.from_ini(file, required=path is not None)
    variables = [
        RawOption(section, name, environ[variable].strip(), f"{variable} ([{section}] {name})")
        for variable, (section, name) in ENVIRONMENT.items()
        if environ.get(variable)
    ]
    reader = SettingsReader([*ini, *variables, *command_line])
    problems, values = reader.problems, reader.values
    s3, api, run = S3Options(**values["s3"]), ApiOptions(**values["api"]), RunOptions(**values["run"])
    s3 = replace(s3, output_bucket=s3.output_bucket or s3.bucket)
    reader.require("bucket", "s3")
    if s3.is_one_bucket and set(s3.tags) & set(s3.tag_source):
        same = (
            "outputs in this bucket have it as well (s3.tags): give sources another one, which no rule takes for theirs"
        )
        problems.append(f"[s3] tag_source = {urllib.parse.urlencode(s3.tag_source)}: {same}")
    jobs = reader.jobs(s3)
    key, key_problem = api.read_key()
    if needs_key and key_problem:
        problems.append(key_problem)
    shard = Shard()
    try:
        # A shard from the command line overrides whatever the environment says.
        shard = Shard.from_environment(environ, problems) if shard_flag is None else Shard.parse(shard_flag.strip())
    except ValueError as expected:
        problems.append(f"--shard = {shard_flag}: {expected}")
    read = {"configuration": str(file), "--keys-from": keys_from, "API key": api.key_file}
    read["program"] = globals().get("__file__")  # where it is read from stdin, it may have none
    reader.check_run(run, shard, {name: os.path.expanduser(path) for name, path in read.items() if path})
    if problems:
        # Each once, and under the place where its option was given: a variable, a flag, the INI file.
        named = {f"[{section}] {name}": entry.named for (section, name), entry in reader.given.items()}
        split = (problem.partition(" = ") for problem in problems)
        told = list(dict.fromkeys(named.get(option, option) + equals + rest for option, equals, rest in split))
        in_file = ini and any(problem.startswith("[") for problem in told)
        lines = "".join(f"\n  - {problem}" for problem in told)
        look = "compare it with config.example.ini" if in_file else "see --help and config.example.ini"
        message = f"{file if in_file else 'the configuration'} has {pluralize(len(told), 'problem')}{lines}"
        raise usage_error(message, f"{look}; nothing was listed or converted")
    # The rate is not divided here but by the rate limiter, because what the API allows is divided too.
    cap = None if api.max_conversions is None else shard.share(api.max_conversions)
    files: dict[str, Any] = {name: shard.file(path) for name in OUTPUT_FILES if (path := getattr(run, name))}
    api, run = replace(api, key=key, max_conversions=cap), replace(run, **files)
    return Settings(s3, api, run, jobs, shard, key_problem=key_problem, keys_from=keys_from)


########################################################################################################################
# Trouble. What an error of the network, the environment or the system means to a person, and to the run. Only what is
# none of these is called a bug.
########################################################################################################################

PROXY_HINT = (
    "check HTTPS_PROXY (HTTP_PROXY for an http address) and NO_PROXY, and run it again; "
    "SOCKS does not work for S3, and for the API only with the package PySocks"
)


class Trouble:
    """What has gone wrong around the program: in words, and as the end of the run."""

    @staticmethod
    def proxy_for(address: str) -> str:
        """Host and port of the proxy that the environment names for an address; empty if it names none."""
        named = requests.utils.select_proxy(address, requests.utils.get_environ_proxies(address)) or ""
        return Trouble.host_of(named) or ("without a host" if named else "")

    @staticmethod
    def host_of(address: str) -> str:
        """Host and port, without a password, which is nobody's to read; of what may be no address at all."""
        # A password may have been written as it is, with a slash in it.
        return re.sub(r"[/?#].*", "", address.rpartition("://")[2].rpartition("@")[2])

    @staticmethod
    def cause_of(error: Any) -> Any:
        """The error that says what happened: requests and urllib3 wrap it, each in its own way."""
        while isinstance(error, requests.RequestException):
            wrapped = error.args[0] if error.args else None
            error = getattr(wrapped, "reason", None) or wrapped or type(error).__name__
        return error.original_error if isinstance(error, urllib3.exceptions.ProxyError) else error

    @staticmethod
    def connection_problem(error: Any) -> str:
        """What a failed connection's error says, without the names of Python's objects."""
        cause = Trouble.cause_of(error)
        said = str(cause.args[-1]) if isinstance(cause, Exception) and cause.args else str(cause)
        return re.sub(r"^.*?: (?=Failed )", "", said)

    @staticmethod
    def failed_to_connect(error: Any) -> bool:
        """Whether no connection was made, so that the server cannot have seen the request."""
        if isinstance(error, NO_ADDRESS):
            return True  # of the proxy, or of the address itself
        # A proxy's error may have come after the request was sent as well.
        cause = Trouble.cause_of(getattr(error, "reason", error))
        failed = (urllib3.exceptions.ConnectTimeoutError, urllib3.exceptions.NewConnectionError)
        return isinstance(cause, failed) or "Tunnel connection failed" in str(cause)

    @staticmethod
    def certificate_problem(error: Exception) -> str:
        """Why a certificate is not trusted; empty if that is not the problem."""
        # The second is urllib3's own, which boto3 has it look for.
        pattern = r"certificate verify failed: ([^(]*[^(. ])|(hostname '.*' doesn't match [^)]*)"
        found = re.search(pattern, str(error))
        return found.group(found.lastindex or 0) if found else ""

    @staticmethod
    def api_unreachable(address: str, error: Exception) -> RunError:
        """The end of the run where no connection to the API can be made."""
        host, hint = f"at {Trouble.host_of(address)}", "check api.url and the network, and run it again"
        if proxy := Trouble.proxy_for(address):
            host, hint = f"through the proxy {proxy}", PROXY_HINT
        why = redact(Trouble.connection_problem(error))
        return RunError(f"the API cannot be reached {host}: {why}", hint, code="api")

    @staticmethod
    def refusal_by_api(status: int, code: str, message: str, address: str = "") -> RunError:
        """The end of the run for a reply that every object would get."""
        what, hint = "the API refused the key", "check CTF_API_KEY, api.key or api.key_file"
        stopped_code: StopCode = "api_key"
        exit_code = ExitCode.USAGE
        if status == 407:
            what, hint = f"the proxy {Trouble.proxy_for(address)} wants a password", PROXY_HINT
            stopped_code = "api"
        elif code == "quota_exceeded" or status == 402:
            what, hint = "the quota is used up", "run it again next month, or after an upgrade of the plan"
            stopped_code, exit_code = "quota", ExitCode.STOPPED
        elif status == 403:
            what, exit_code = "the API refused the account", ExitCode.STOPPED
            hint = "check the API key and the plan; where the API gives no code, a proxy on the way may have refused it"
        told = printable(f"{status} {code} {message}".strip())
        return RunError(f"{what}: {told}", hint, exit_code, stopped_code)

    @staticmethod
    def unexpected(where: str, error: Exception, address: str) -> RunError:
        """The end of the run for what the system, the environment or a connection's set-up refuses, or for a bug."""
        if isinstance(error, MemoryError) or "can't start new thread" in str(error):
            what = "has no more memory" if isinstance(error, MemoryError) else "starts no more threads"
            hint = (
                "set fewer run.workers or run.processes, or raise the limit (ulimit -u, a container's pids and memory)"
            )
            return RunError(f"the system {what}", hint)
        if isinstance(error, NO_ADDRESS):
            return Trouble.api_unreachable(address, error) if address else usage_error(redact(str(error)), PROXY_HINT)
        if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
            file = f": {error.filename}" if error.filename else ""
            message = redact(f"the system refuses what the program needs: {error.strerror or error}{file}")
            return RunError(message, "allow it to this user, or free what is short of it, and run it again")
        log.error("%s failed", where, exc_info=error)
        hint = "run it again with -v and report what it prints"
        return RunError(f"the program has a bug ({where} failed)", hint, code="bug")

    @staticmethod
    @contextlib.contextmanager
    def explained(where: str, address: str = "", foreseen: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Raise RunError for any exception that is not foreseen: trouble of the environment, or a bug."""
        foreseen += (RunError, StopRequested)
        try:
            yield
        except foreseen:
            raise
        except Exception as error:
            raise Trouble.unexpected(where, error, address) from error

    @staticmethod
    def little_remains(remaining: int, keep: int) -> RunError:
        """Why nothing more is sent this month."""
        message = f"{remaining} conversions remain this month, and api.keep_remaining is {keep}"
        sooner = "lower api.keep_remaining" if keep else "after an upgrade of the plan"
        return RunError(message, f"run it again next month, or {sooner}", code="quota")

    @staticmethod
    def require_open_files(workers: int) -> None:
        """Have the system allow as many open files as so many workers need. Raises RunError where it does not."""
        if sys.platform == "win32":
            return
        needed = 4 * workers + 40  # each: the API, S3, a download, a temporary file
        allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= allowed < needed:  # below 0: no limit
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))
            except ValueError:
                message = f"{pluralize(workers, 'worker')} need {needed} open files, and the system allows {most}"
                raise usage_error(message, "set fewer run.workers, or raise the limit (ulimit -n)") from None

    @staticmethod
    def require_certificates(address: str, *variables: str) -> None:
        """Raise RunError if TLS cannot be set up for an address with what these environment variables name."""
        named = {name: os.environ[name] for name in (*variables, "SSLKEYLOGFILE") if os.environ.get(name)}
        bundle = next((named[name] for name in variables if name in named), None)
        if not named or not address.startswith("https:"):
            return
        try:
            is_folder = bundle is not None and os.path.isdir(bundle)
            ssl.create_default_context(cafile=None if is_folder else bundle, capath=bundle if is_folder else None)
        except OSError as problem:
            told = ", ".join(f"{name} = {path}" for name, path in named.items())
            hint = f"set {' or '.join(named)} to a file that is there and can be used, or unset it"
            raise usage_error(f"TLS cannot be set up with {told}: {problem.strerror or problem}", hint) from None


@contextlib.contextmanager
def no_space_stops_the_run() -> Iterator[None]:
    """Raise RunError where a temporary file cannot be written: every object would meet that."""
    try:
        yield
    except OSError as problem:
        # Where none can be written at all, there is no name either.
        where = tempfile.tempdir or "a temporary folder"
        hint = "free some space, or set TMPDIR"
        raise RunError(f"{where} cannot be written: {problem.strerror}", hint, code="disk") from None


def temporary_file() -> IO[bytes]:
    """A file without a name, for a body too large for memory; in TMPDIR."""
    with no_space_stops_the_run():
        return cast(IO[bytes], tempfile.TemporaryFile())


########################################################################################################################
# Journal. The checkpoint, and the only SQL. Invariants:
#   - `log` is only ever appended to; the newest row of a (job, key) is that object's state.
#   - A request's row is on the disk before the request is made, and leaves in the transaction that appends the outcome
#     (I1). Whatever is in `in_flight` at the start of a run may have been paid for.
#   - Claims of output keys last for one run and live in a temporary database: neither in the checkpoint nor in memory.
########################################################################################################################

JOURNAL_VERSION = 7
APPLICATION_ID = 0x53334243  # "S3BC"
# Clustered by key: a page of a listing is one range of the log, and no index has the keys a second time.
SCHEMA = """
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY, endpoint TEXT NOT NULL, bucket TEXT NOT NULL, output_bucket TEXT NOT NULL,
    fingerprint TEXT NOT NULL, output_key TEXT NOT NULL, name TEXT NOT NULL, target TEXT NOT NULL,
    UNIQUE (endpoint, bucket, output_bucket, fingerprint, output_key)
);
CREATE TABLE log (
    job INTEGER NOT NULL, key TEXT NOT NULL, id INTEGER NOT NULL, time INTEGER NOT NULL, etag TEXT NOT NULL,
    event TEXT NOT NULL CHECK (event IN ('converted', 'found', 'adopted', 'skipped', 'failed', 'lost')),
    permanent INTEGER NOT NULL, runs_failed INTEGER NOT NULL, code TEXT, purpose TEXT, message TEXT,
    output_key TEXT, output_etag TEXT, bytes_out INTEGER, pages INTEGER,
    seconds REAL, requests INTEGER, charged_twice INTEGER,
    PRIMARY KEY (job, key, id)
) WITHOUT ROWID;
CREATE INDEX log_adopted ON log (output_key) WHERE event = 'adopted';
CREATE TRIGGER log_keeps_its_rows BEFORE DELETE ON log BEGIN SELECT RAISE(ABORT, 'log is append-only'); END;
CREATE TRIGGER log_keeps_its_values BEFORE UPDATE ON log BEGIN SELECT RAISE(ABORT, 'log is append-only'); END;
CREATE TRIGGER log_replaces_no_rows BEFORE INSERT ON log
    WHEN EXISTS (SELECT 1 FROM log WHERE job = NEW.job AND key = NEW.key AND id = NEW.id)
    BEGIN SELECT RAISE(ABORT, 'log is append-only'); END;
CREATE TABLE in_flight (
    job INTEGER NOT NULL, key TEXT NOT NULL, etag TEXT NOT NULL, idempotency_key TEXT NOT NULL, path TEXT NOT NULL,
    url TEXT NOT NULL, sent_at REAL NOT NULL, job_id TEXT NOT NULL, payments INTEGER NOT NULL,
    is_doubtful INTEGER NOT NULL, slot TEXT NOT NULL,
    PRIMARY KEY (job, key)
) WITHOUT ROWID;
CREATE INDEX in_flight_slot ON in_flight (slot);
CREATE TABLE runs (id INTEGER PRIMARY KEY, started REAL NOT NULL, ended REAL, exit_code INTEGER);
"""
TEMPORARY_SCHEMA = """
CREATE TABLE claims (slot TEXT PRIMARY KEY, job TEXT NOT NULL, key TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE postponed (job TEXT, key TEXT, etag TEXT, size INTEGER, time TEXT, PRIMARY KEY (job, key)) WITHOUT ROWID;
CREATE TABLE expected (
    output_key TEXT, job TEXT, key TEXT, etag TEXT, size INTEGER, left_out TEXT, PRIMARY KEY (output_key, key)
) WITHOUT ROWID;
CREATE TABLE there (output_key TEXT PRIMARY KEY, etag TEXT, size INTEGER) WITHOUT ROWID;
CREATE TABLE lost (job TEXT, key TEXT, PRIMARY KEY (job, key)) WITHOUT ROWID;
"""


class Journal(contextlib.AbstractContextManager["Journal"]):
    """The checkpoint as one configuration sees it. Safe to use from several threads.

    `read_only`: no file is made or changed, while a run may be at work on it; a missing one is empty. `endpoint`:
    where the buckets are. Each method raises RunError if the checkpoint cannot be used.
    """

    SQL_VARIABLES = 900  # SQLite before 3.32 takes 999
    IS_DONE = f"event IN ({', '.join(map(repr, sorted(DONE_EVENTS)))})"
    # A server without ETags has sizes alone; of pages, nothing is known but that they are to be there.
    IS_SAME = "(expected.etag = there.etag OR '' IN (expected.etag, there.etag)) AND "
    IS_SAME += "coalesce(nullif(expected.size, 0) = there.size, TRUE)"

    def __init__(self, path: Path, endpoint: str, settings: Settings, *, read_only: bool = False) -> None:
        self.path, self._read_only = real_file(path), read_only
        self._files = [self.path.with_name(self.path.name + ending) for ending in ("", "-wal", "-shm")]
        self._sources, self._output_bucket = (endpoint, settings.s3.bucket), settings.s3.output_bucket
        self._jobs, self._by_name = settings.jobs, settings.by_name
        # Feeder, workers and recorder share one connection: SQLite has one writer anyway, and this one need not wait.
        self._lock = threading.RLock()
        self.run_id = self._next_id = 0
        self.horizon = sys.maxsize  # rows with this id or a later one are as if they were not there
        self._job_ids: dict[str, int] = {}  # 0 where a read-only checkpoint does not know the job
        self._has_lost = False  # a dry run has found something to be lost
        self._former: list[int] = []  # jobs of this bucket that are not configured now
        self._rivals: dict[str, list[int]] = {}  # jobs that put their outputs, of other options, under the same keys
        with self._locked(), contextlib.ExitStack() as on_failure:
            self.is_there = self.path.exists()
            self._db = self._connect()
            on_failure.callback(self._db.close)
            self._open_schema()
            self._find_jobs()
            self._temporary = sqlite3.connect("", isolation_level=None, check_same_thread=False)
            self._temporary.executescript(f"PRAGMA journal_mode = OFF; {TEMPORARY_SCHEMA}")
            on_failure.pop_all()

    def __exit__(self, *_: object) -> None:
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._temporary.close()
            self._db.close()

    def _connect(self) -> sqlite3.Connection:
        address = self.path.absolute().as_uri()
        if not self._read_only:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        elif not self.is_there:
            address = "file::memory:"
        elif self._files[1].exists():
            # What a killed run has left is not merged into the checkpoint by a command that only looks.
            address += "?mode=ro"
        elif os.access(self.path, os.W_OK) and os.access(self.path.absolute().parent, os.W_OK):
            # A reader needs the locks and the shared memory of a run that may start beside it: without them, what the
            # run merges into the checkpoint would look like damage. Both files go when it is closed.
            address += "?mode=rw"
        else:
            # Where SQLite cannot make them, nobody else writes either.
            address += "?mode=ro&immutable=1"
        # It waits for another program for up to 30 s.
        return sqlite3.connect(address, isolation_level=None, check_same_thread=False, timeout=30, uri=True)

    def _open_schema(self) -> None:
        # A run that starts beside this reader may be filling it at this moment.
        patience = time.monotonic() + (2 if self._read_only and self.is_there else 0)
        while (is_new := not self._ask("SELECT 1 FROM sqlite_master LIMIT 1")) and time.monotonic() < patience:
            time.sleep(0.02)
        (version,), (owner,) = self._ask("PRAGMA user_version")[0], self._ask("PRAGMA application_id")[0]
        if owner != APPLICATION_ID and not is_new:
            raise usage_error(f"{self.path} is not a checkpoint of this program", "set run.checkpoint to another path")
        if version != JOURNAL_VERSION and not is_new:
            raise usage_error(
                f"the checkpoint {self.path} has version {version}, this program knows {JOURNAL_VERSION}",
                "use the s3_bulk_convert.py that made it, or move it away: finished objects are found in the bucket",
            )
        if self._read_only and self.is_there:
            if is_new:
                raise usage_error(f"the checkpoint {self.path} is empty", "start a run, which fills it")
            self._db.execute("PRAGMA query_only = 1")
            return
        # It holds presigned URLs. SQLite gives -wal and -shm the mode of the database when it makes them.
        for path in () if self._read_only else self._files:
            with contextlib.suppress(FileNotFoundError):
                if stat.S_IMODE(path.stat().st_mode) != 0o600:
                    self.set_mode(path, 0o600)
        self._db.executescript("""
            PRAGMA journal_mode = WAL;  -- without shared memory SQLite stays with the rollback journal: as safe
            PRAGMA synchronous = FULL;  -- a commit that a power cut can undo is a request that nobody knows of
            PRAGMA fullfsync = 1;  -- on macOS a disk may otherwise say that it has written what it still holds
            PRAGMA journal_size_limit = 67108864;
        """)
        if is_new:
            numbers = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {JOURNAL_VERSION};"
            self._db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} {numbers} COMMIT")

    @staticmethod
    def set_mode(path: Path, mode: int) -> None:
        """Set the mode of a checkpoint's file. Raises RunError where another user owns it."""
        try:
            path.chmod(mode)
        except PermissionError:
            hint = "start this program as that user, or set run.checkpoint to another path"
            raise usage_error(f"the checkpoint {path} belongs to another user", hint) from None

    def _find_jobs(self) -> None:
        buckets = (*self._sources, self._output_bucket)
        if not self._read_only:
            rows = [(*buckets, job.fingerprint, job.place, job.name, job.target) for job in self._jobs]
            with self._transaction() as db:
                db.executemany(f"INSERT OR IGNORE INTO jobs VALUES (NULL{', ?' * 7})", rows)
        where = "endpoint = ? AND bucket = ? AND output_bucket = ? AND replace(output_key, '{target}', target) = ?"
        for job in self._jobs:
            place = job.place.replace("{target}", job.target)
            known = self._ask(f"SELECT id, fingerprint, output_key FROM jobs WHERE {where}", *buckets, place)
            own = [job.fingerprint, job.place]
            self._job_ids[job.name] = next((number for number, *made in known if made == own), 0)
            self._rivals[job.name] = [number for number, fingerprint, _ in known if fingerprint != job.fingerprint]
        known = self._ask("SELECT id FROM jobs WHERE endpoint = ? AND bucket = ?", *self._sources)
        self._former = [number for (number,) in known if number not in self._job_ids.values()]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The lock. What an error of SQLite's means for a person is said here; nothing is ever overwritten."""
        try:
            with self._lock:
                yield
        except (sqlite3.Error, OSError) as problem:
            path, said = self.path, str(getattr(problem, "strerror", None) or problem)
            if "is locked" in said:
                message = f"the checkpoint {path} is locked by another program: {said}"
                hint = "wait until that has ended (a backup, an sqlite3 shell), and run it again"
                raise RunError(message, hint, code="checkpoint") from None
            if "not a database" in said or "malformed" in said:
                hint = "move it away to start over: with run.skip_existing, finished objects are found "
                hint += "in the output bucket"
                message = f"the checkpoint {path} is damaged: {said}"
                raise RunError(message, hint, ExitCode.USAGE, "checkpoint") from None
            if "full" in said or "disk I/O" in said:
                hint = "free some space, in TMPDIR too, and run it again"
                message = f"the checkpoint {path} cannot be written, or a temporary file of SQLite's: {said}"
                raise RunError(message, hint, code="disk") from None
            hint = "make it and its directory readable and writable, or set run.checkpoint to another path"
            raise usage_error(f"the checkpoint {path} cannot be used: {said}", hint) from None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._locked():
            self._db.execute("BEGIN IMMEDIATE")
            # Rolls back after an error, unless a commit that failed has done so.
            with self._db:
                yield self._db
                self._db.execute("COMMIT")

    def _ask(self, query: str, *values: object, of: sqlite3.Connection | None = None) -> list[Any]:
        # Rows are fetched before the lock is left: nobody may hold an open read while others work.
        with self._locked():
            return (of or self._db).execute(query, values).fetchall()

    def _ask_about(
        self, query: str, scope: Sequence[object], names: Sequence[str], of: sqlite3.Connection | None = None
    ) -> Iterator[Any]:
        """The rows of a query whose `{}` stands for a list of names, which may be longer than SQLite takes."""
        for start in range(0, len(names), self.SQL_VARIABLES):
            part = names[start : start + self.SQL_VARIABLES]
            yield from self._ask(query.format(",".join("?" * len(part))), *scope, *part, of=of)

    # -- a run's own book-keeping --------------------------------------------------------------------------------------

    def begin_run(self, now: float) -> None:
        """Number this run. Its rows have larger ids than those of all runs before it."""
        with self._transaction() as db:
            self.run_id = db.execute("INSERT INTO runs (started) VALUES (?)", (now,)).lastrowid or 1
        self._next_id = self.run_id << 32

    def end_run(self, now: float, exit_code: int, *, has_seen_all: bool) -> None:
        """Write down how the run ended. `has_seen_all`: what no run has met for a week belongs to deleted objects."""
        with self._transaction() as db:
            db.execute("UPDATE runs SET ended = ?, exit_code = ? WHERE id = ?", (now, exit_code, self.run_id))
            if has_seen_all:
                ours = "SELECT id FROM jobs WHERE endpoint = ? AND bucket = ?"
                old = f"DELETE FROM in_flight WHERE sent_at < ? AND job IN ({ours})"
                db.execute(old, (now - 7 * 86_400, *self._sources))

    def claim(self, claims: Sequence[tuple[str, str, str]], *, anew: bool = False) -> dict[str, tuple[str, str]]:
        """Claim slots for (slot, job, key). Slot -> (job, key) that has it in this run: the first; `anew`: the last."""
        with self._locked():
            how = "REPLACE" if anew else "IGNORE"
            self._temporary.executemany(f"INSERT OR {how} INTO claims VALUES (?, ?, ?)", claims)
            query = "SELECT job, key FROM claims WHERE slot = ?"
            return {slot: self._temporary.execute(query, (slot,)).fetchone() for slot, *_ in claims}

    def postpone(self, sources: Sequence[tuple[str, SourceObject]]) -> None:
        """Set (job, object) aside until all others have been tried."""
        rows = [(job, *source[:4]) for job, source in sources]
        self._set_aside("REPLACE INTO postponed VALUES (?, ?, ?, ?, ?)", rows)

    def forget_plans(self) -> None:
        """Let go of all claims, and of what was set aside: what was planned will be planned anew."""
        with self._locked():
            self._temporary.executescript("DELETE FROM claims; DELETE FROM postponed")

    def postponed(self) -> Iterator[list[tuple[str, SourceObject]]]:
        """What was set aside, by pages."""
        query = f"SELECT * FROM postponed WHERE (job, key) > (?, ?) ORDER BY job, key LIMIT {PAGE_KEYS}"
        rows: list[Any] = [("", "")]
        while rows := self._ask(query, *rows[-1][:2], of=self._temporary):
            yield [(job, SourceObject(*source)) for job, *source in rows]

    # -- objects -------------------------------------------------------------------------------------------------------

    def states(self, job: str, keys: Sequence[str]) -> dict[str, JournalState]:
        """What the log says last about those of the keys that it knows, and about some that lie between them.

        What is done, but whose output was replaced since by that of another job, is not known. Where it may have been
        replaced, the version is none that an object has.
        """
        states: dict[str, JournalState] = self._newest("permanent, runs_failed, code, purpose", job, keys)
        # A run that was killed may have put the result of its request in the place of what was done before it.
        own = self._job_ids[job]
        senders = ",".join(map(str, (own, *self._rivals[job])))
        done_at = f"(SELECT max(time) FROM log WHERE log.job = {own} AND log.key = in_flight.key)"
        query = f"SELECT key, etag, job FROM in_flight WHERE job IN ({senders})"
        limits = (min(keys, default=""), max(keys, default=""))
        for key, version, sender in self._ask(f"{query} AND key BETWEEN ? AND ? AND sent_at >= {done_at}", *limits):
            state = states.get(key)
            if state and state[2] in DONE_EVENTS and (sender != own or version != state[1]):
                states[key] = JournalState(*state)._replace(version="@")
        # What a dry run takes for lost is written down nowhere.
        if self._has_lost:
            query = "SELECT key FROM lost WHERE job = ? AND key IN ({})"
            for (key,) in self._ask_about(query, (job,), keys, of=self._temporary):
                states[key] = JournalState(*states[key])._replace(event=LOST, purpose="run 0")
        return states

    def _newest(self, columns: str, job: str, keys: Sequence[str]) -> dict[str, Any]:
        """Key -> key, etag, event and these columns of its newest row, as `states` says."""
        scope = (self._job_ids[job], self.horizon)
        query = f"SELECT key, etag, event, {columns} FROM log WHERE job = ? AND id < ? AND key"
        # A page of a listing is a range of keys. Where most of what lies in it is gone, its keys are looked up.
        limits = (min(keys, default=""), max(keys, default=""), 4 * len(keys))
        found: Any = self._ask(f"{query} BETWEEN ? AND ? ORDER BY key, id LIMIT ?", *scope, *limits)
        if len(found) == 4 * len(keys):
            found = self._ask_about(f"{query} IN ({{}}) ORDER BY key, id", scope, keys)
        newest = {row[0]: row for row in found}
        for rival in self._rivals[job]:
            newer = "id > (SELECT max(id) FROM log WHERE job = ? AND id < ? AND key = it.key)"
            query = f"SELECT key, event FROM log AS it WHERE job = {rival} AND {newer} AND key IN ({{}})"
            done = [key for key, row in newest.items() if row[2] in DONE_EVENTS]
            for key, event in self._ask_about(query, scope, done):
                if event in DONE_EVENTS:
                    newest.pop(key, None)
        return newest

    def made_before(self, keys: Sequence[str]) -> dict[tuple[str, str], list[tuple[str, str]]]:
        """(target, key) -> (version, fingerprint) of all that was done by jobs that are not configured now."""
        made = defaultdict[tuple[str, str], list[tuple[str, str]]](list)
        query = "SELECT target, key, etag, fingerprint FROM log JOIN jobs ON jobs.id = job "
        query += f"WHERE job = ? AND {self.IS_DONE} AND key IN ({{}})"
        for former in self._former:
            for target, key, version, fingerprint in self._ask_about(query, (former,), keys):
                made[target, key].append((version, fingerprint))
        return made

    def pending(self, job: str, keys: Sequence[str]) -> dict[str, PendingRequest]:
        """The unsettled requests for those of the keys that have one."""
        columns = "key, etag, idempotency_key, path, url, sent_at, job_id, payments, is_doubtful"
        query = f"SELECT {columns} FROM in_flight WHERE job = ? AND key IN ({{}})"
        return {key: PendingRequest(*row) for key, *row in self._ask_about(query, (self._job_ids[job],), keys)}

    def holders(self, slots: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Slot -> (bucket, key) of the source whose request is in flight for it, or that has adopted its output.

        Of several, it is the last: when that was sent, the objects of the others were gone, and held the slot no more.
        """
        found: dict[str, tuple[str, str]] = {}
        # Requests before outcomes: what is settled in between is in both answers, and never in neither.
        tables = (("in_flight", "slot", "", "sent_at"), ("log", "output_key", "event = 'adopted' AND", "time"))
        for table, column, only, since in tables:
            query = f"SELECT it.{column}, bucket, key FROM {table} AS it JOIN jobs ON jobs.id = job WHERE endpoint = ?"
            names = slots if column == "slot" else [*slots, *(f"{slot}.zip" for slot in slots)]
            query += f" AND {only} it.{column} IN ({{}}) ORDER BY it.{since}"
            rows = self._ask_about(query, self._sources[:1], names)
            found |= {KeyParts.slot_of(name): (bucket, key) for name, bucket, key in rows}
        return found

    def slot(self, output_key: str) -> str:
        """The name under which an output key is held: the same for the archive that an answer may turn out to be."""
        return f"{self._output_bucket}/{KeyParts.slot_of(output_key)}"

    def mark_sent(self, task: Task, request: PendingRequest) -> None:
        """Make it durable that a request is about to be sent."""
        with self._transaction() as db:
            self._replace_request(db, task, request)

    def settle(self, outcomes: Sequence[Outcome], now: float) -> None:
        """Append outcomes, and settle or keep their requests, in one transaction."""
        with self._transaction() as db:
            for outcome in outcomes:
                # The rows under its job and key may be those of one that the journal does not tell from it, whose
                # request may be out: what is not wanted, or whose key the other one has, was not sent.
                if outcome.code == NOT_MATCHED or outcome.task.holder in self._twins(outcome.task.job):
                    continue
                if row := self._log_row(outcome, now):
                    db.execute(f"INSERT INTO log VALUES (?{', ?' * 17})", row)
                task = outcome.task
                if outcome.pending:
                    self._replace_request(db, task, outcome.pending)
                else:
                    settled = (self._job_ids[task.job], task.source.key)
                    db.execute("DELETE FROM in_flight WHERE job = ? AND key = ?", settled)

    def _twins(self, job: str) -> Iterator[str]:
        """The jobs, as holders of output keys, that the journal knows as one with a job: `pages` may differ."""
        return (f"[job {name}]" for name, number in self._job_ids.items() if number == self._job_ids[job])

    def _log_row(self, outcome: Outcome, now: float) -> tuple[object, ...] | None:
        """The row that the log is to have of an outcome; None if that would tell the next run nothing new."""
        task, output, known = outcome.task, outcome.output, outcome.task.known_version
        # A key that is not there says nothing of the object that was, and may be again. What a look has shown is seen
        # again by the next run, but for an own output, at which no later run has to look.
        is_seen_again = outcome.kind is OutcomeKind.SKIPPED and outcome.code != OWN_OUTPUT
        # A collision is looked at in every run: a million of them must not write a million rows a day.
        purpose = known.purpose if known and outcome.kind is OutcomeKind.FAILED else None
        purpose = TAG if outcome.is_untagged else purpose
        told = (outcome.kind.value, int(outcome.permanent), outcome.runs_failed, outcome.code, purpose)
        state = (task.source.version, *told)
        is_known = known and known[1:] == state and not (output or outcome.possible_double_charge)
        if not task.source.version or outcome.kind is OutcomeKind.LEFT or is_seen_again or is_known:
            return None
        self._next_id += 1
        place, stored = None, (output.etag, output.size, output.pages or None) if output else (None, None, None)
        # Where an output lies is said by its job already, but for archives and what another program has made.
        if output and (output.key != task.output_key or outcome.kind is OutcomeKind.ADOPTED):
            place = f"{self._output_bucket}/{output.key}"
        took = (round(outcome.seconds, 3), outcome.requests, outcome.possible_double_charge or None)
        row = (self._job_ids[task.job], task.source.key, self._next_id, int(now), *state)
        return (*row, outcome.message, place, *stored, *took)

    def _replace_request(self, db: sqlite3.Connection, task: Task, request: PendingRequest) -> None:
        row = (self._job_ids[task.job], task.source.key, *request, self.slot(task.output_key))
        db.execute(f"INSERT OR REPLACE INTO in_flight VALUES (?{', ?' * 10})", row)

    # -- what was stored -----------------------------------------------------------------------------------------------

    def stored(self, job: str, keys: Sequence[str]) -> dict[str, tuple[str, StoredOutput]]:
        """Key -> the version that was converted, and its output; of those of the keys that are done."""
        newest = self._newest("output_key, output_etag, bytes_out, pages", job, keys)
        return {
            key: (version, StoredOutput(self._output_key(job, key, place), etag or "", size or 0, pages or 0))
            for key, version, event, place, etag, size, pages in map(newest.__getitem__, filter(newest.get, keys))
            if event in DONE_EVENTS
        }

    def _output_key(self, job: str, key: str, place: str | None) -> str:
        """Where an output was put: as its job has it, unless its row says otherwise."""
        # An access point's ARN has a slash as well.
        return place.removeprefix(f"{self._output_bucket}/") if place else self._by_name[job].output_of(key)

    def mark_lost(self, job: str, keys: Sequence[str], now: float) -> None:
        """Take what is done for lost, because its output is not there any more. Read-only: in this process alone."""
        lost = self.stored(job, keys)
        # Its place stays its own, whoever else wants it.
        self.claim([(self.slot(output.key), job, key) for key, (_, output) in lost.items()])
        if self._read_only:
            self._set_aside("IGNORE INTO lost VALUES (?, ?)", [(job, key) for key in lost])
            self._has_lost |= bool(lost)
            return
        rows = []
        for key, (version, output) in lost.items():
            self._next_id += 1
            place = None if output.key == self._by_name[job].output_of(key) else f"{self._output_bucket}/{output.key}"
            purpose = f"run {self.run_id}"
            rows.append((self._job_ids[job], key, self._next_id, int(now), version, LOST, 0, 0, "", purpose, "", place))
        with self._transaction() as db:
            db.executemany(f"INSERT INTO log VALUES (?{', ?' * 11}{', NULL' * 6})", rows)

    def expect(self, outputs: Iterable[ExpectedOutput]) -> None:
        """Set aside what is to be found in the output bucket."""
        known, unknown = list[ExpectedOutput](), list[ExpectedOutput]()
        for output in outputs:
            (unknown if output.etag is None else known).append(output)
        self._set_aside("REPLACE INTO expected VALUES (?, ?, ?, ?, ?, ?)", known)
        self._set_aside("IGNORE INTO expected VALUES (?, ?, ?, ?, ?, ?)", unknown)

    def see(self, outputs: Iterable[SourceObject]) -> None:
        """Set aside what lies in the output bucket."""
        # Without an ETag, a version has the time in it.
        rows = [(each[0], "" if "@" in each[1] else each[1], each[2]) for each in outputs]
        self._set_aside("REPLACE INTO there VALUES (?, ?, ?)", rows)

    def _set_aside(self, insertion: str, rows: Sequence[Sequence[object]]) -> None:
        with self._locked():
            self._temporary.execute("BEGIN")
            self._temporary.executemany(f"INSERT OR {insertion}", rows)
            self._temporary.execute("COMMIT")

    def _set_aside_pages(self, columns: str, where: str) -> Iterator[list[Any]]:
        """Rows of what is expected beside what is there, by pages; each begins with the keys of output and source."""
        query = f"SELECT output_key, key, {columns} FROM {where} AND output_key >= ? AND (output_key, key) > (?, ?) "
        query += f"ORDER BY output_key, key LIMIT {PAGE_KEYS}"
        rows: list[Any] = [("", "")]
        while rows := self._ask(query, rows[-1][0], *rows[-1][:2], of=self._temporary):
            yield rows

    def expected(self) -> Iterator[list[ExpectedOutput]]:
        """All that is to be found, by pages."""
        for rows in self._set_aside_pages("job, etag, size, left_out", "expected WHERE TRUE"):
            yield [ExpectedOutput(output_key, job, key, *known) for output_key, key, job, *known in rows]

    def unlike(self) -> Iterator[dict[ExpectedOutput, StoredOutput | None]]:
        """What was stored -> what lies there and is not that, by pages; None if nothing does, or another's output."""
        is_anothers = f"EXISTS (SELECT 1 FROM expected WHERE output_key = there.output_key AND {self.IS_SAME})"
        columns = "job, expected.etag, expected.size, left_out, there.etag, "
        columns += f"CASE WHEN NOT {is_anothers} THEN there.size END"
        where = "expected LEFT JOIN there USING (output_key) WHERE expected.etag IS NOT NULL AND "
        for rows in self._set_aside_pages(columns, f"{where}(there.size IS NULL OR NOT ({self.IS_SAME}))"):
            yield {
                ExpectedOutput(output_key, job, key, etag, size, left_out): None
                if now_size is None
                else StoredOutput(output_key, now_etag, now_size)
                for output_key, key, job, etag, size, left_out, now_etag, now_size in rows
            }

    def verified(self) -> int:
        """How many outputs lie there as they were stored, without pages."""
        is_output = "expected.size IS NOT NULL"
        query = f"SELECT count(*) FROM expected JOIN there USING (output_key) WHERE {is_output} AND {self.IS_SAME}"
        return int(self._ask(query, of=self._temporary)[0][0])

    def strangers(self) -> Iterator[tuple[str, str]]:
        """(key of an output that nobody expects, key of the source that it was made of; empty if none is known)."""
        unexpected = "there LEFT JOIN expected USING (output_key) WHERE expected.output_key IS NULL"
        is_any = self._ask(f"SELECT 1 FROM {unexpected} LIMIT 1", of=self._temporary)
        query = f"SELECT key, output_key, max(id) FROM log WHERE job = ? AND key > ? AND {self.IS_DONE}"
        query += f" GROUP BY key ORDER BY key LIMIT {PAGE_KEYS}"
        for job in self._jobs if is_any else ():
            rows: list[Any] = [("",)]
            while rows := self._ask(query, self._job_ids[job.name], rows[-1][0]):
                made = {self._output_key(job.name, key, place): key for key, place, _ in rows}
                known = f"SELECT output_key FROM {unexpected} AND there.output_key IN ({{}})"
                orphans = [key for (key,) in self._ask_about(known, (), list(made), of=self._temporary)]
                # From now on they are no strangers.
                self.expect(ExpectedOutput(key, job.name, made[key], None, None) for key in orphans)
                yield from ((key, made[key]) for key in orphans)
        for rows in self._set_aside_pages("1", unexpected):
            yield from ((key, "") for key, *_ in rows)

    # -- for people ----------------------------------------------------------------------------------------------------

    def size_and_time(self) -> tuple[int, float]:
        """Its bytes, with what is not yet merged into it, and when a run last wrote to it (Unix seconds)."""
        # A log without a byte is this reader's own.
        found = [file for path in self._files[:2] if path.exists() and (file := path.stat()).st_size]
        return sum(file.st_size for file in found), max(file.st_mtime for file in found)

    def last_run(self) -> tuple[float, float | None, int | None] | None:
        """When the last run began and ended (Unix seconds), and its exit code; None before the first."""
        return next(iter(self._ask("SELECT started, ended, exit_code FROM runs ORDER BY id DESC LIMIT 1")), None)

    def counts(self) -> Iterator[dict[str, Any]]:
        """All jobs that it knows, with their objects by state, counted by SQLite: ten million take seconds."""
        newest = "SELECT max(id), event, permanent, CASE event WHEN 'failed' THEN code END AS code FROM log"
        query = f"SELECT event, permanent, code, count(*) FROM ({newest} WHERE job = ? GROUP BY key) GROUP BY 1, 2, 3"
        # A run that has left nothing to do has asked for all that it met.
        for found in self._records("""
            WITH last AS (SELECT * FROM (SELECT * FROM runs ORDER BY id DESC LIMIT 1) WHERE exit_code IN (0, 1))
            SELECT id, endpoint, bucket, fingerprint, name AS job, target, output_bucket, output_key,
                (SELECT count(*) FROM in_flight WHERE job = jobs.id) AS in_flight,
                (SELECT min(sent_at) FROM in_flight WHERE job = jobs.id) AS oldest_sent_at,
                (SELECT count(*) FROM in_flight AS sent, last WHERE job = jobs.id AND sent_at < started
                    AND NOT EXISTS (SELECT 1 FROM log WHERE job = sent.job AND key = sent.key AND id >= last.id << 32)
                ) AS not_asked_for,
                (SELECT count(*) FROM log WHERE job = jobs.id AND charged_twice) AS possible_double_charges FROM jobs
        """):
            # A job may have been renamed since, or have left the configuration.
            made = tuple(found[name] for name in ("bucket", "output_bucket", "fingerprint", "output_key"))
            buckets = (self._sources[1], self._output_bucket)
            # --status does not ask S3 where it is.
            is_here = self._sources[0] in {"", found.pop("endpoint")}
            ours = (each.name for each in self._jobs if is_here and (*buckets, each.fingerprint, each.place) == made)
            found |= {
                "configured_as": next(ours, None),
                "converted": 0,
                "found": 0,
                "adopted": 0,
                "skipped": 0,
                LOST: 0,
            }
            found |= {"failed_for_good": {}, "failed_for_now": {}}
            for event, is_permanent, code, count in self._ask(query, found.pop("id")):
                if event == OutcomeKind.FAILED.value:
                    found["failed_for_good" if is_permanent else "failed_for_now"][code] = count
                else:
                    found[event] = count
            yield found

    def history(self, key: str) -> list[dict[str, Any]]:
        """The rows of one object of this bucket in every job, newest first."""
        columns = "log.*, jobs.target, jobs.output_bucket, jobs.output_key AS place, jobs.name"
        query = f"SELECT {columns} FROM jobs JOIN log ON job = jobs.id WHERE endpoint = ? AND bucket = ? AND key = ?"
        return self._records(f"{query} ORDER BY log.id DESC", *self._sources, key)

    def requests_of(self, key: str) -> list[dict[str, Any]]:
        """The unsettled requests for one object, without their URLs."""
        query = "SELECT name, sent_at, output_bucket, slot, etag FROM jobs JOIN in_flight ON job = id"
        return self._records(f"{query} WHERE endpoint = ? AND bucket = ? AND key = ?", *self._sources, key)

    def _records(self, query: str, *values: object) -> list[dict[str, Any]]:
        with self._locked():
            cursor = self._db.execute(query, values)
            cursor.row_factory = sqlite3.Row
            return [dict(row) for row in cursor]

    def has_converted(self, job: str) -> bool:
        """Whether anything was ever converted in a job."""
        return bool(self._ask("SELECT 1 FROM log WHERE job = ? AND event = 'converted' LIMIT 1", self._job_ids[job]))

    def latencies(self) -> list[float]:
        """How many seconds conversions took, of some of them."""
        return [seconds for (seconds,) in self._ask("SELECT seconds FROM log WHERE event = 'converted' LIMIT 1000")]


def real_file(path: Path) -> Path:
    """Where a link leads: SQLite keeps its `-wal` there, and all names of one checkpoint must come to one lock."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


class LockHolder(NamedTuple):
    """The process that holds a checkpoint's lock."""

    pid: int
    since: str  # ISO 8601

    def __str__(self) -> str:
        return f"process {self.pid}, for {seconds_since(self.since):.0f} s"


class RunLock:
    """An exclusive lock on the checkpoint, held as long as the process lives, whatever ends it.

    It is taken twice. By `flock` on a file beside the checkpoint, which all systems have, and which says in words who
    has it. And on the checkpoint itself, where it holds whatever name the file is called by and whatever becomes of the
    other one. SQLite would be in the way of a `flock` there on macOS and on network file systems.
    """

    # The first of the bytes that a run locks of its checkpoint: far behind those that SQLite locks, and behind its end.
    # How many are locked is all that another process can learn: the time in Unix seconds and the PID, in one number.
    _FIRST_BYTE, _PIDS = 1 << 40, 1 << 22

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = real_file(checkpoint)
        self.path = self._checkpoint.with_name(self._checkpoint.name + ".lock")
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> "RunLock":
        with contextlib.ExitStack() as opened:
            try:
                handle = opened.enter_context(self.path.open("ab", buffering=0))
                now = int(time.time())
                if sys.platform != "win32":
                    self._acquire(handle, opened, now)
                # The PID is for the message that another run prints; the lock itself is the kernel's.
                handle.truncate(0)
                handle.write(b"%d %d\n" % (os.getpid(), now))
            except OSError as problem:
                raise usage_error(
                    f"{self.path} cannot be written: {problem.strerror}",
                    "free some space, make it and its directory writable, or set run.checkpoint to a path that is",
                ) from None
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def _acquire(self, handle: IO[bytes], opened: contextlib.ExitStack, now: int) -> None:
        path = self.path
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path = self._checkpoint
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            opened.callback(os.close, descriptor)
            self._ask_lock(descriptor, now * self._PIDS + os.getpid(), take=True)
        except BlockingIOError:
            holder = self.holder(is_held=True) or "it has only just started"
            hint = "wait for it to end, or give this run another run.checkpoint"
            raise RunError(f"another run holds {path} ({holder})", hint, ExitCode.LOCKED, "locked") from None
        except OSError as problem:
            # A file system may have no locks on bytes; what else is wrong with the checkpoint, the journal will say.
            if path == self.path:
                # Without it two runs might pay for the same objects.
                message = f"{self.path} cannot be locked: {problem.strerror}"
                raise usage_error(message, "set run.checkpoint to a path on a local disk") from None

    def _ask_lock(self, descriptor: int, length: int, *, take: bool) -> int:
        """Take an exclusive lock on so many bytes of the checkpoint, or ask how many another run has locked.

        It belongs to the open file, unlike SQLite's own, which a process loses as soon as it closes the file anywhere.
        Raises OSError; BlockingIOError if another run has it. Only Linux has such locks.
        """
        if sys.platform != "linux":
            return 0
        asked = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, self._FIRST_BYTE, length, 0)
        found = fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK if take else fcntl.F_OFD_GETLK, asked)
        kind, _, _, length, _ = struct.unpack("hhqqi0q", found)
        return 0 if kind == fcntl.F_UNLCK else int(length)

    def holder(self, *, is_held: bool = False) -> LockHolder | None:
        """Who holds the lock; None if nobody does. Takes none, which would turn a starting run away.

        To be asked before this process opens the checkpoint: to close a file is to give up SQLite's locks on it.
        `is_held`: that somebody holds it is known.
        """
        pid = since = 0
        with contextlib.suppress(OSError), self._checkpoint.open("rb", buffering=0) as file:
            since, pid = divmod(self._ask_lock(file.fileno(), 1, take=False), self._PIDS)
        with contextlib.suppress(OSError, ValueError):
            match = re.fullmatch(r"(\d+) (\d+)\n", self.path.read_text(encoding="ascii"))
            if match and not pid and (is_held or self._has_flock(match[1])):
                pid, since = int(match[1]), int(match[2])
        return LockHolder(pid, iso_time(since)) if pid else None

    @staticmethod
    def _has_flock(pid: str) -> bool:
        """Whether a process holds a `flock`; where the system does not list them, whether it lives."""
        # On Windows there is no lock, and `kill` would be what it says.
        if sys.platform == "win32":
            return False
        try:
            return re.search(rf"FLOCK +\S+ +WRITE +{pid} ", Path("/proc/locks").read_text(encoding="ascii")) is not None
        except OSError:
            try:
                os.kill(int(pid), 0)
            except OSError as problem:
                return isinstance(problem, PermissionError)
            return True


########################################################################################################################
# Listing. Pages of a bucket, several at a time where the reader waits for them. The key space is split into ranges that
# are read side by side:
#   - Ranges are disjoint and cover everything: a split ends one range where the next begins, so each key is listed
#     once, whatever is guessed about where keys lie. A page ends its range only if S3 says so.
#   - All ranges belong to the thread that reads the listing (`Bucket.list_pages`). The pool's threads only fetch and
#     parse pages.
#   - There are at most 64 splits, and one more for each page that lies within its range as a whole: any distribution of
#     keys is listed with at most twice as many requests as it has pages, plus 64.
########################################################################################################################

# What no XML may hold, as it is or as a reference. Ceph writes it into tokens.
CONTROL_CHARACTER = re.compile(
    rb"&#(x0*([0-8bcef]|1[0-9a-f])|0*([0-8]|1[124-9]|2[0-9]|3[01]));|[\0-\x08\x0b\x0c\x0e-\x1f]", re.IGNORECASE
)


Head = Mapping[str, Any]  # what S3 answers to a HEAD, as boto3 has it


def bare_etag(etag: str | None) -> str:
    """An ETag without quotes and without the mark of a weak one; empty if there is none."""
    return (etag or "").removeprefix("W/").strip('"')


class Page(NamedTuple):
    """One page of a listing. A page that is not the last goes on at `token` or, without one, after its last key."""

    objects: list[SourceObject]
    is_last: bool
    token: str = ""

    @classmethod
    def parse(cls, body: bytes) -> "Page":
        """A page from S3's XML. Raises ValueError or ParseError if it is not whole."""
        try:
            root, is_clean = ElementTree.fromstring(body), True
        except ElementTree.ParseError:
            root, is_clean = ElementTree.fromstring(CONTROL_CHARACTER.sub(b"", body)), False
        space = root.tag.removesuffix("ListBucketResult")
        is_encoded = root.findtext(f"{space}EncodingType") == "url"
        if not (is_clean or is_encoded):
            raise ValueError("a key with a control character that is not encoded")
        decode = urllib.parse.unquote_plus if is_encoded else str
        names = [space + name for name in ("Key", "ETag", "Size", "LastModified", "StorageClass")]
        restore = f"{space}RestoreStatus/{space}"
        objects = []
        for entry in root.iterfind(f"{space}Contents"):
            key, etag, size, modified, storage = map(entry.findtext, names)
            if key is None or size is None or not modified:
                raise ValueError("an entry without key, size or time")
            version = bare_etag(etag) or f"{size}@{round(unix_seconds(modified))}"
            is_archived = storage in ARCHIVE_CLASSES and (
                entry.findtext(f"{restore}IsRestoreInProgress") == "true"
                or not entry.findtext(f"{restore}RestoreExpiryDate")
            )
            # Most keys have nothing to decode, and each step counts: millions come by here.
            decoded = decode(key) if "%" in key or "+" in key else key
            objects.append(SourceObject._make((decoded, version, int(size), modified, is_archived)))
        count = root.findtext(f"{space}KeyCount")
        # XML Schema has two words for each, and lets white space stand around them.
        truncated = root.findtext(f"{space}IsTruncated", "").strip().lower()
        if truncated not in {"true", "1", "false", "0"} or (count is not None and int(count) != len(objects)):
            raise ValueError("the page is not whole")
        is_last = truncated in {"false", "0"}
        # A token without its control characters is another token.
        token = root.findtext(f"{space}NextContinuationToken") if is_clean else ""
        if not (is_last or objects or token):
            raise ValueError("an empty page that is not the last, and does not say where to go on")
        return cls(objects, is_last, token or "")


@dataclass
class KeyRange:
    """Keys that are not listed yet: those after `after`, up to and including `until`."""

    INTERPOLATED_CHARACTERS = 6  # of a key, by which it is told where keys lie
    PAGE_WAIT_SECONDS = 0.02  # as long as it takes to read a page is no reason to have more of them read at a time

    after: str
    until: str
    token: str = ""  # where a page has been read: S3's own word for where it goes on
    pages: float = math.inf  # that it probably has

    def split(self, extra: int, most: int) -> "list[KeyRange]":
        """End this range earlier. Returns what is split off, at most `most` ranges, the last one first.

        They are `extra`, if each would have some pages. Where keys are not as is guessed here, ranges turn out empty,
        and others are split again closer to the keys.
        """
        common = self._common
        if self.until.endswith(LAST_KEY):
            # Nothing is known of what comes: it may differ from the last key at any of its characters.
            steps = [(self.after[:depth], self.after[depth]) for depth in range(len(common), len(self.after))]
            points = [before + chr(ord(char) + 1) for before, char in steps if " " <= char < "~"]
        else:
            low, high = self._position(self.after), self._position(self.until)
            # A range of few pages is read to its end by one reader: its last page is read by two.
            count = int(min(extra, self.pages / 4))
            numbers = [low + (high - low) * part // (count + 1) for part in range(count, 0, -1)]
            powers = [95**power for power in reversed(range(self.INTERPOLATED_CHARACTERS))]
            points = [common + "".join(chr(0x20 + number // power % 95) for power in powers) for number in numbers]
        behind = []
        for point in points[:most]:
            if self.after < point < self.until:
                behind.append(KeyRange(point, self.until))
                self.until = point
        return behind

    def rest(self, page: Page) -> "KeyRange | None":
        """What is left of this range after a page."""
        last = page.objects[-1].key if page.objects else self.after
        if page.is_last or last >= self.until:
            return None
        start, now, end = map(self._position, (self.after, last, self.until))
        pages = (end - now) / (now - start) if now > start else self.pages
        return KeyRange(last, self.until, page.token, pages)

    @property
    def _common(self) -> str:
        differ = (place for place, (one, other) in enumerate(zip(self.after, self.until, strict=False)) if one != other)
        return self.after[: next(differ, None)]

    def _position(self, key: str) -> int:
        """A key behind what all keys of the range begin with, as a number with the printable characters as digits."""
        common, number = len(self._common), 0
        for char in key[common : common + self.INTERPOLATED_CHARACTERS].ljust(self.INTERPOLATED_CHARACTERS):
            # Characters that are not printable ASCII count as the nearest that is.
            number = number * 95 + min(max(ord(char) - 0x20, 0), 94)
        return number


########################################################################################################################
# S3. One boto3 client for all threads. Its errors come out as what they mean: RunError for what would meet every
# object, ObjectFailed for one object.
#   - What S3 cannot say is never taken for "absent" (I2).
#   - A source is read with If-Match, so that the bytes are those of the version that the journal speaks of.
#   - Nothing depends on conditional writes, which not every S3 has.
########################################################################################################################

# The few replies that speak of all objects by themselves: credentials, the clock, the bucket, a proxy's password.
REFUSALS_OF_ALL = re.compile(
    "401|407|AccountProblem|AllAccessDisabled|AuthorizationHeaderMalformed|ExpiredToken(Exception)?|InvalidAccessKeyId|"
    "InvalidSecurity|InvalidToken|NoSuchBucket|NotSignedUp|PermanentRedirect|RequestExpired|RequestTimeTooSkewed|"
    "SignatureDoesNotMatch|TokenRefreshRequired"
)
# Refusals that time, or a person elsewhere, takes away; any other 4xx would meet the next run as well.
PASSING_REFUSALS = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "RequestTimeTooSkewed", "TokenRefreshRequired"}
)
ABSENT = frozenset({"404", "NoSuchKey", "NoSuchVersion"})
NO_CONNECTION = (EndpointConnectionError, ConnectTimeoutError, ProxyConnectionError)
UNREADABLE = (ResponseParserError, ValueError)  # what boto3 raises for a date or a number that is none
# What to do about a refusal of S3's, by its code.
S3_HINTS = {
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY is wrong (or that of the profile): correct it, and run it again",
    "InvalidAccessKeyId": "AWS_ACCESS_KEY_ID is unknown there (or that of the profile): correct it, and run it again",
    **dict.fromkeys(("AccessDenied", "403"), "allow the action to these AWS credentials, and run it again"),
    **dict.fromkeys(
        ("RequestTimeTooSkewed", "RequestExpired"),
        "set this machine's clock (chronyd, ntpd): S3 refuses requests from another time",
    ),
    "ExpiredToken": "the session's credentials are over: renew them, and run it again",
    "AuthorizationHeaderMalformed": "correct s3.region, and run it again",
    "PermanentRedirect": "correct s3.region or s3.endpoint_url, and run it again",
    **dict.fromkeys(("SlowDown", "ServiceUnavailable", "InternalError", "500", "503"), "S3's side: run it again later"),
}
TAGGING_HINT = (
    "allow s3:GetObjectTagging and s3:PutObjectTagging on the sources, "
    "in a versioned bucket s3:GetObjectVersionTagging and s3:PutObjectVersionTagging too"
)
# What S3's codes say of a source that was listed.
SOURCE_CHANGES = {
    **dict.fromkeys(ABSENT, ("source_gone", "the object was deleted after it was listed")),
    **dict.fromkeys(
        ("PreconditionFailed", "412"), ("source_changed", "the object was overwritten after it was listed")
    ),
}


def taken_key(output_key: str, holder: str) -> str:
    """What to say of an output key that another object has: one of this bucket, of another one, or of another job."""
    cure = "put {ext} or {job} into s3.output_key to keep both; only these can be converted anew: see --keys-from"
    if holder.startswith("s3://"):
        cure = "give each bucket's outputs a prefix of their own in s3.output_key"
    return f"{output_key}: belongs to {holder}; {cure}"


def is_own_metadata(metadata: Mapping[str, str]) -> bool:
    """Whether an object says that this program has made it, whatever configuration that was."""
    return "source-etag" in metadata and "job" in metadata


def source_key_metadata(key: str) -> dict[str, str]:
    """The metadata that names an output's source; a key too long for S3's 2 KB of metadata is named by its digest."""
    quoted = urllib.parse.quote(key, safe="/")
    if len(quoted) > 1_400:
        return {"source-key-sha256": hashlib.sha256(key.encode()).hexdigest()}
    return {"source-key": quoted}


def error_code(error: Exception) -> str:
    """S3's code for an error; for a failed connection, the name of the exception."""
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))
    return type(error).__name__


@contextlib.contextmanager
def translate_s3_errors(doing: str, code: str = "", *, is_of_source: bool = False) -> Iterator[None]:
    """Turn an error of S3's into RunError or, with a code, ObjectFailed; of a source it may say that it has changed."""
    try:
        yield
    except (ClientError, BotoCoreError, boto3.exceptions.S3UploadFailedError, *UNREADABLE) as error:
        if isinstance(error, ValueError) and not is_of_source:
            raise  # only what is read has dates and numbers
        # upload_fileobj wraps the error that says what happened.
        cause: Any = (isinstance(error, boto3.exceptions.S3UploadFailedError) and error.__context__) or error
        if is_of_source and error_code(cause) in SOURCE_CHANGES:
            raise ObjectFailed(*SOURCE_CHANGES[error_code(cause)]) from None
        if is_of_source and error_code(cause) == "InvalidObjectState":
            raise ObjectSkipped(ARCHIVED) from None
        raise s3_failure(cause, doing, code) from None


def s3_failure(error: Exception, doing: str, code: str = "") -> RunError | ObjectFailed:
    """What an error means. `code`: that of the failure, if it may be about one object."""
    if code and isinstance(error, HTTPClientError) and type(error) is not HTTPClientError:
        # An exchange that broke says nothing of the next one; only an address that is none is plainly so called.
        return ObjectFailed(code, redact(f"S3, {doing}: {error}"))
    if isinstance(error, UNREADABLE):
        said = f"S3, {doing}: its answer cannot be read ({error}): is there a proxy or a gateway on the way?"
        return ObjectFailed(code or "look_failed", redact(said))
    if not isinstance(error, ClientError):
        return s3_unreachable(error, doing)
    name, said = error_code(error), printable(str(error.response.get("Error", {}).get("Message", "")))
    if name == "407":
        # Only to an http address a proxy answers itself.
        message = f"the proxy {Trouble.proxy_for('http://s3')} wants a password: 407 {said}".rstrip()
        return RunError(message, PROXY_HINT, ExitCode.USAGE, "s3")
    message = redact(f"S3 refused {doing}: {name} {said}".rstrip())
    if code and not REFUSALS_OF_ALL.fullmatch(name):
        return ObjectFailed(code, message)
    other = "check the bucket's name, the AWS credentials and their permissions, and run it again"
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    is_passing = not 400 <= status < 500 or status in {408, 429} or name in PASSING_REFUSALS
    return RunError(message, S3_HINTS.get(name, other), ExitCode.STOPPED if is_passing else ExitCode.USAGE, "s3")


def s3_unreachable(error: Exception, doing: str) -> RunError:
    """The end of the run where S3 gives no answer."""
    if isinstance(error, ParamValidationError) and (wrong := re.search('Invalid bucket name ".*?"', str(error))):
        # Its own words are a regular expression.
        return usage_error(f"S3, {doing}: {wrong[0]}", "correct s3.bucket, s3.output_bucket or FILE")
    untrusted = Trouble.certificate_problem(error)
    if untrusted:
        hint = "for a private CA, set AWS_CA_BUNDLE to its file, and to the system's if REQUESTS_CA_BUNDLE is set "
        hint += "for the API alone; else check s3.endpoint_url and this machine's clock"
        return RunError(f"S3's certificate is not trusted: {untrusted}", hint, code="s3")
    # Of a failed connection, boto3 says where to, and keeps why to itself.
    cause = getattr(error, "kwargs", {}).get("error")
    why = f": {Trouble.connection_problem(cause)}" if cause and isinstance(error, NO_CONNECTION) else ""
    proxy = Trouble.proxy_for("https://s3") or Trouble.proxy_for("http://s3")
    # Its own words for what comes of an address that is none would sound like a bug.
    is_set_up = type(error) is HTTPClientError and bool(proxy)
    said = f"through the proxy {proxy}: {cause}" if is_set_up else f"{error}{why}"
    hint = "check the network, s3.endpoint_url, s3.region and the AWS credentials, and run it again"
    hint = PROXY_HINT if is_set_up or isinstance(error, ProxyConnectionError) else hint
    return RunError(redact(f"S3 could not be reached for {doing}: {said}"), hint, code="s3")


def misconfigured(problem: Exception) -> RunError:
    """What to say of an AWS configuration that leads nowhere."""
    file = getattr(problem, "filename", None)
    if variable := next((name for name, value in os.environ.items() if file and value == file), None):
        hint = f"set {variable} to a file that is there and can be used, or unset it"
        return usage_error(f"{variable} = {file} cannot be used: {getattr(problem, 'strerror', problem)}", hint)
    if isinstance(problem, CredentialRetrievalError) and problem.kwargs.get("provider") != "custom-process":
        # What a role's service does not give now, it may give the next run.
        hint = "run it again; if it stays so, look at the role of this machine, container or task"
        return RunError(f"there are no AWS credentials: {problem}", hint, code="s3")
    return usage_error(f"the AWS configuration cannot be used: {problem}", "correct it, or [s3] profile, region")


class Bucket:
    """The source bucket and the output bucket, by one client for all threads.

    With a `stop`, it waits for an S3 that is away or asks for fewer requests. Raises RunError if the AWS configuration
    cannot be used, or there are no credentials.
    """

    client: "S3Client"  # made anew for another region

    def __init__(self, settings: Settings, stop: StopFlag | None = None) -> None:
        self._settings, self._stop, self._outage = settings, stop, OutageMonitor("S3")
        self.name, self.output_name = settings.s3.bucket, settings.s3.output_bucket
        self._payer: Any = {"RequestPayer": "requester"} if settings.s3.requester_pays else {}
        self._tagging = urllib.parse.urlencode(settings.s3.tags, quote_via=urllib.parse.quote)
        self._quiet_until, self._pause = 0.0, 0.0  # monotonic seconds; seconds
        self._storing = threading.local()  # `task`: whose output this thread is about to put
        self.pages_asked = 0  # of listings
        self.region = settings.s3.region  # None: as boto3 finds it
        self._connect()
        Trouble.require_certificates(self.client.meta.endpoint_url, "AWS_CA_BUNDLE")

    @property
    def endpoint(self) -> str:
        """Where the buckets are, "aws" for Amazon's own S3: a bucket of the same name elsewhere is another one."""
        address = self.client.meta.endpoint_url
        host = f".{urllib.parse.urlsplit(address).hostname}"
        return "aws" if host.endswith((".amazonaws.com", ".amazonaws.com.cn")) else address

    # -- the client ----------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        options = self._settings.s3
        config = botocore.config.Config(
            signature_version="s3v4",
            retries={"mode": "standard", "total_max_attempts": S3_ATTEMPTS},
            # botocore's pool holds 10 by default: each worker beyond that would make a new connection for each object.
            max_pool_connections=self._settings.run.workers + LIST_THREADS,
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            read_timeout=S3_TIMEOUT_SECONDS,
            # It asks of each request what the readers of the options, and S3 itself, see to.
            parameter_validation=False,
            user_agent_extra=f"s3_bulk_convert/{__version__}",
        )
        # boto3 asks by `getpass`, which takes no other way where there is no terminal.
        vars(getpass)["fallback_getpass"] = self._refuse_prompt
        try:
            session = boto3.session.Session(profile_name=options.profile, region_name=self.region)
            self._require_credentials(session)
            self.client = session.client("s3", endpoint_url=options.endpoint_url, config=config)
        except (BotoCoreError, ClientError, ValueError, OSError) as problem:
            raise misconfigured(problem) from None
        # Others than Amazon refuse the checksums that boto3 sends behind a body, unless the user says otherwise. The
        # address may come from the AWS configuration: only a client knows it, and it looks this up for each request.
        checksums = ("request_checksum_calculation", "response_checksum_validation")
        for name in checksums if self.endpoint != "aws" else ():
            if f"AWS_{name.upper()}" not in os.environ:
                setattr(self.client.meta.config, name, "when_required")
        events = self.client.meta.events
        if self._stop:
            events.register_first("needs-retry.s3", partial(self._ride_out, self._stop))
            events.register_first("before-send.s3", partial(self._wait_while_quiet, self._stop))
        # boto3's own way to tag a copy in parts depends on its version, and may do so when the copy is there already.
        if options.tags:
            events.register("provide-client-params.s3.CreateMultipartUpload", self._tag_parts)
        events.register("provide-client-params.s3.CompleteMultipartUpload", self._require_place_of_parts)
        if options.requester_pays:
            events.register("before-sign.s3.GetObject", self._sign_payer)
        # The first wildcard matters: so it comes before botocore's own handler of errors in a 200.
        events.register("before-parse.*.ListObjectsV2", self._parse_page)

    @staticmethod
    def _require_credentials(session: boto3.session.Session) -> None:
        credentials = session.get_credentials()
        if credentials is None:
            hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or s3.profile"
            raise usage_error("there are no AWS credentials", hint)
        # What can be renewed is a service's, and to ask for it here would be one more request. In a header that cannot
        # be sent, the HTTP library would quote all of it.
        can_be_renewed = isinstance(credentials, botocore.credentials.RefreshableCredentials)
        for value in (session.region_name, *(() if can_be_renewed else credentials.get_frozen_credentials())):
            if value and not value.isprintable():
                name = next((name for name, given in os.environ.items() if given == value), "a value of the profile")
                told = f"{name} has a line break or another character that cannot be sent"
                raise usage_error(told, "correct the AWS configuration: of a secret, often the line break at its end")

    @staticmethod
    def _refuse_prompt(*_: object, **__: object) -> NoReturn:
        # For the MFA code of a profile, which boto3 would read from stdin, and wait for ever.
        hint = "give the keys of a session (aws sts get-session-token), or an s3.profile without mfa_serial"
        raise usage_error("the AWS profile wants an MFA code, and there is no terminal to ask for it", hint)

    def _ride_out(
        self, stop: StopFlag, caught_exception: Exception | None, attempts: int, response: Any = None, **_: Any
    ) -> Any:
        """Have boto3 try again, beyond its own few attempts, while S3 is away or asks for fewer requests."""
        pause = min(backoff(attempts - 1, None, random.random()), OUTAGE_PAUSE_SECONDS)
        if caught_exception is None:
            self._outage.mark_answered()
        if response and response[0].status_code in {429, 503} and attempts <= MAX_S3_ATTEMPTS:
            self._quiet_until, self._pause = max(self._quiet_until, time.monotonic() + pause), pause
        elif not isinstance(caught_exception, NO_CONNECTION) or not self._outage.should_wait():
            return None
        try:
            stop.sleep(pause)
        except StopRequested:
            if attempts >= S3_ATTEMPTS:
                raise
            return None  # what is in flight is finished, by boto3's own few attempts
        return 0

    def _wait_while_quiet(self, stop: StopFlag, **_: Any) -> None:
        # What is in flight when the run is to end is finished without waiting. Not all begin again in one moment.
        with contextlib.suppress(StopRequested):
            if (left := self._quiet_until - time.monotonic()) > 0:
                stop.sleep(left + random.random() * self._pause)

    def _tag_parts(self, params: dict[str, Any], **_: Any) -> None:
        params["Tagging"] = self._tagging

    def _require_place_of_parts(self, params: dict[str, Any], **_: Any) -> None:
        # The parts may have taken minutes, and are seen by nobody before this. What it raises has boto3 abort them.
        self._require_place(self._storing.task, params["Key"])

    @staticmethod
    def _sign_payer(request: Any, **_: Any) -> None:
        # Whoever fetches a presigned URL sends no headers of ours: as Amazon says, it stands in the query.
        if request.context.get("is_presign_request"):
            request.params = {**(request.params or {}), "x-amz-request-payer": "requester"}

    @staticmethod
    def _parse_page(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
        # In place of boto3's parser, which takes ten times as long as all the rest.
        if response_dict["status_code"] == 200 and b"<Error" not in response_dict["body"][:300]:
            try:
                customized_response_dict["Page"] = Page.parse(response_dict["body"])
            except (ValueError, ElementTree.ParseError) as problem:
                customized_response_dict["Problem"] = str(problem)
            response_dict["body"] = b"<ListBucketResult/>"

    def check(self) -> None:
        """Raise RunError if a bucket does not exist or cannot be reached. Learns the source bucket's region."""
        for name in dict.fromkeys((self.name, self.output_name)):
            try:
                reply: Any = self.client.head_bucket(Bucket=name)
            except (ClientError, BotoCoreError) as error:
                # 403 is not the last word: a policy may allow listing below a prefix only, or writing only.
                self._require_bucket(name, error_code(error))
                if not isinstance(error, ClientError) or error_code(error) == "407":
                    raise s3_failure(error, f"access to the bucket {name}") from None
                reply = error.response
            except OSError as problem:
                raise misconfigured(problem) from None
            region = reply["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-bucket-region")
            # A URL signed for another region is refused by Amazon, where a client's own requests are redirected.
            is_elsewhere = region and name == self.name and region != self.client.meta.region_name
            if is_elsewhere and not self._settings.s3.endpoint_url:
                self.region = region
                self._connect()

    def _require_bucket(self, name: str, code: str) -> None:
        """Raise RunError if a HEAD's code says that there is no such bucket, or that it is in another region."""
        address = self.client.meta.endpoint_url
        if code in {"404", "NoSuchBucket"}:
            where, hint = "", "correct s3.bucket or s3.output_bucket"
            if name in address:
                where = f" at {address}"
                hint = "take the bucket out of s3.endpoint_url, which is the address of all buckets"
            raise RunError(f"the bucket {name} does not exist{where}", hint, ExitCode.USAGE, "s3")
        if code == "400" and self._settings.api.transfer != "upload":
            # boto3 finds the region for its own requests alone: URLs would keep the wrong one.
            with contextlib.suppress(ClientError, BotoCoreError):  # the run's own listing will say why
                self.client.list_objects_v2(Bucket=name, MaxKeys=1, **self._payer)
                message = f"the bucket {name} is in another region than {self.client.meta.region_name or 'none'}"
                hint = "correct s3.region (or that of the AWS configuration), and run it again"
                raise RunError(message, hint, ExitCode.USAGE, "s3")

    # -- listings ------------------------------------------------------------------------------------------------------

    def list_pages(
        self, prefix: str, max_parallel: Callable[[], int], bucket: str = ""
    ) -> Generator[list[SourceObject], None, None]:
        """The objects whose keys begin with a prefix, by pages; in the order of their keys if one is read at a time.

        `max_parallel` says how many may be on their way at the most. `bucket`: if it is not that of the sources.
        Raises RunError if the listing is refused or breaks off.
        """
        waiting = [KeyRange("", prefix + LAST_KEY)]  # the one that is read next is the last
        reading: dict[Future[Page], KeyRange] = {}
        splits_left = 64  # of the key space, before a page has been read
        width = 1  # pages at a time; it grows while the reader has to wait for them
        objects: list[SourceObject] | None = None
        pool = ThreadPoolExecutor(LIST_THREADS, thread_name_prefix="listing")
        try:
            while waiting or reading:
                at_a_time = max(1, min(width, max_parallel()))
                extra = at_a_time - len(reading) - len(waiting)
                if extra > 0 and waiting:
                    behind = waiting[-1].split(extra, splits_left)
                    splits_left -= len(behind)
                    waiting[-1:-1] = behind
                while waiting and len(reading) < at_a_time:
                    key_range = waiting.pop()
                    where = (prefix, key_range.after, key_range.token)
                    reading[pool.submit(self.read_page, bucket or self.name, *where, code="")] = key_range
                # Only now, so that the next page is there when the reader comes back.
                if objects is not None:
                    yield objects
                since = time.monotonic()
                done = wait(reading, return_when=FIRST_COMPLETED).done.pop()
                if time.monotonic() - since > KeyRange.PAGE_WAIT_SECONDS:
                    width = min(2 * width, LIST_THREADS)
                key_range, page = reading.pop(done), done.result()
                objects = [source for source in page.objects if source.key <= key_range.until]
                if rest := key_range.rest(page):
                    waiting.append(rest)
                    splits_left += bool(objects)
            yield objects or []
        finally:
            # A reader that has stopped does not wait for pages that it will not take.
            pool.shutdown(wait=False, cancel_futures=True)

    def read_page(
        self, bucket: str, prefix: str, after: str = "", token: str = "", code: str = "listing_refused"
    ) -> Page:
        """One page, at a token or else after a key. Raises RunError; if it is refused, ObjectFailed with the code."""
        self.pages_asked += 1
        where = {"ContinuationToken": token} if token else {"StartAfter": after}
        request: Any = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": PAGE_KEYS, **where, **self._payer}
        # A page that is no whole page is asked for again: what ends early would leave objects out, unnoticed.
        for _ in range(S3_ATTEMPTS):
            with translate_s3_errors(f"the listing of {bucket}", code):
                reply: Any = self.client.list_objects_v2(**request, OptionalObjectAttributes=["RestoreStatus"])
            if page := reply.get("Page"):
                # Otherwise ranges would miss some keys, or never end.
                keys = [after, *map(operator.itemgetter(0), page.objects)]
                if not all(map(operator.lt, keys, keys[1:])):
                    raise RunError(
                        "this server does not list keys in the order that S3 promises, so that some would be missed",
                        "name the keys with --keys-from",
                        ExitCode.USAGE,
                        "listing",
                    )
                return cast(Page, page)
        problem = reply.get("Problem", "an error in place of a page")
        hint = "check s3.endpoint_url and whether a proxy is on the way, and run it again"
        raise RunError(f"the listing of {bucket} breaks off: {problem}", hint, code="listing")

    def find(self, key: str) -> SourceObject | None:
        """One object as a listing shows it; None if it is not there. Raises RunError."""
        with contextlib.closing(self.list_pages(key, lambda: 1)) as pages:
            # No key that begins with another one sorts before it; but a page may be empty.
            page = next(filter(None, pages), [])
        return next((source for source in page if source.key == key), None)

    # -- looks ---------------------------------------------------------------------------------------------------------

    def head(self, bucket: str, key: str, code: str = "look_failed") -> Head | None:
        """What a HEAD says; None for an object that is not there. Raises ObjectFailed with the code, RunError."""
        try:
            return self.client.head_object(Bucket=bucket, Key=key, **self._payer)
        except (ClientError, BotoCoreError, *UNREADABLE) as error:
            if error_code(error) in ABSENT:
                return None
            # A server's error is no word on the object.
            is_refusal = isinstance(error, ClientError) and error.response["ResponseMetadata"]["HTTPStatusCode"] < 500
            is_refusal |= isinstance(error, UNREADABLE)
            doing = f"looking at s3://{bucket}/{printable(key)}"
            raise s3_failure(error, doing, code if is_refusal else "look_failed") from None

    def look_at_source(self, listed: SourceObject) -> tuple[SourceObject, Head]:
        """A source as it lies there, in the listed version if one was. Raises ObjectSkipped, ObjectFailed, RunError."""
        try:
            head = self.head(self.name, listed.key, "source_unreadable")
        except ObjectFailed as failure:
            # A HEAD's refusal has no body: a GET says why. To who may not list, S3 refuses what does not exist, too.
            if failure.code == "source_unreadable":
                self.open_source(SourceObject(listed.key))[0].close()
            raise
        if head is None:
            raise ObjectFailed("source_gone", "there is no object with this key")
        if not (listed.version or {"ContentLength", "LastModified"} <= head.keys()):
            raise RunError(
                f"S3 does not say how long and how old an object of {self.name} is (Content-Length, Last-Modified)",
                "go around the proxy or gateway that hides it, or leave out --keys-from, and run it again",
                ExitCode.USAGE,
                "s3",
            )
        size = head.get("ContentLength", listed.size)
        modified = head["LastModified"].isoformat() if "LastModified" in head else listed.last_modified
        etag = bare_etag(head.get("ETag"))
        seen = SourceObject(listed.key, etag or f"{size}@{unix_seconds(modified):.0f}", size, modified)
        if listed.version and not seen.is_version_of(listed):
            raise ObjectFailed(*SOURCE_CHANGES["412"])
        # A gateway may hide the ETag that a listing has: the version keeps its name.
        seen = seen._replace(version=etag or listed.version or self._listed_version(seen))
        # Intelligent-Tiering says in a header of its own that an object cannot be read before it is restored.
        is_archived = head.get("StorageClass") in ARCHIVE_CLASSES or head.get("ArchiveStatus")
        if is_archived and 'ongoing-request="false"' not in head.get("Restore", ""):
            raise ObjectSkipped(ARCHIVED)
        if is_own_metadata(head["Metadata"]):
            raise ObjectSkipped(OWN_OUTPUT)
        if not size:
            raise ObjectSkipped(EMPTY)
        return seen, head

    def _listed_version(self, seen: SourceObject) -> str:
        """What a listing calls a version that was seen without an ETag."""
        with contextlib.suppress(ObjectFailed):
            first = self.read_page(self.name, seen.key).objects[:1]
            if first and first[0].key == seen.key and seen.is_version_of(first[0]):
                return first[0].version
        return seen.version

    def require_unchanged(self, source: SourceObject, seen: Head) -> None:
        """Raise ObjectFailed if a source is not what it was at the first look, or was put there anew."""
        head, names = self.head(self.name, source.key), ("ETag", "LastModified", "VersionId")
        if head is None or any(head.get(name) != seen.get(name) for name in names):
            said = "the object was overwritten or deleted while it was converted: the result is dropped"
            raise ObjectFailed("source_changed", said)

    def look_at_output(self, task: Task) -> tuple[OutcomeKind, StoredOutput] | None:
        """The output that makes a conversion needless, FOUND or ADOPTED; None where a task may write its own.

        The task has its source as it was seen. Raises ObjectFailed if the key is another object's, or if S3 does not
        say what lies there; RunError.
        """
        is_there = False
        for key in (task.output_key, f"{task.output_key}.zip") if task.look else ():
            head = self._look_at_place(task, key)
            is_there |= head is not None
            if head is not None and (kind := self._judge(task, key, head)):
                told = head["Metadata"].get("pages", "") if kind is OutcomeKind.FOUND else ""
                pages = min(int(told), MAX_PAGES) if told.isdecimal() else 0
                output = StoredOutput(key, bare_etag(head.get("ETag")), head.get("ContentLength", 0), pages)
                if self._has_its_pages(task, output):
                    return kind, output
        if task.holder:
            raise ObjectFailed("output_collision", taken_key(task.output_key, task.holder))
        if task.is_untagged and not (is_there or task.pending or self._settings.repair):
            # It was stored, and somebody has taken it away: no later run makes it again, and neither does this one.
            return OutcomeKind.FOUND, StoredOutput(task.output_key, "", 0)
        return None

    def _has_its_pages(self, task: Task, output: StoredOutput) -> bool:
        """Whether the pages are there that an archive proves.

        Asked in a repair, of what one has found lost, and where a failure may have left pages of another version.
        """
        is_doubtful = task.is_lost or (task.known is not None and task.known_version is None)
        is_asked = (self._settings.repair or is_doubtful) and self._settings.by_name[task.job].pages == "unpack"
        numbers = range(1, output.pages + 1) if is_asked else ()
        keys = (KeyParts.page_key(task.output_key, task.target, number, output.pages) for number in numbers)
        # All of them, before anything is paid: one that is another's is in the way of the next archive, too.
        are_there = [self._require_place(task, key) for key in keys]
        return all(are_there)

    def _require_place(self, task: Task, key: str) -> bool:
        """Whether the output of this version lies there. Raises ObjectFailed if another's does, RunError."""
        self._storing.task = task
        there = self._look_at_place(task, key)
        kind = self._judge(task, key, there) if there else None
        if kind is OutcomeKind.ADOPTED:
            raise ObjectFailed("output_collision", f"{key}: another object lies there, which is no output of this one")
        return kind is OutcomeKind.FOUND

    def _look_at_place(self, task: Task, key: str) -> Head | None:
        """What lies under an output's key; None if nothing does. Raises ObjectFailed if S3 does not say, RunError."""
        try:
            return self.head(self.output_name, key)
        except ObjectFailed:
            # To who may list one prefix alone, S3 refuses a HEAD of what does not exist, too: a listing tells.
            if not self._is_free(self._settings.by_name[task.job].constant_prefix, key):
                raise
            return None

    def _is_free(self, prefix: str, key: str) -> bool:
        """Whether a listing shows that nothing lies there: the shortest that does, or that of all with a prefix."""
        for allowed in filter(key.startswith, (key, prefix)):
            with contextlib.suppress(ObjectFailed):
                page = self.read_page(self.output_name, allowed, key[:-1])
                listed = [each.key for each in page.objects]
                return key not in listed and (page.is_last or listed[-1:] > [key])
        return False

    def _judge(self, task: Task, key: str, head: Head) -> OutcomeKind | None:
        """What an object counts as for a task; None if the task may replace it. Raises ObjectFailed if it must not."""
        metadata, source, settings = head["Metadata"], task.source, self._settings
        if not is_own_metadata(metadata):
            # The published recipe's outputs carry no mark. Between the sources, nothing tells them from a source.
            is_newer = "LastModified" in head and head["LastModified"].timestamp() > source.modified
            may_adopt = settings.run.skip_existing and not settings.puts_among_sources(settings.by_name[task.job])
            if is_newer and may_adopt and not (task.holder or task.rival):
                return OutcomeKind.ADOPTED
            said = f"{key} exists and is no output of this object; put outputs under a prefix of their own"
            raise ObjectFailed("output_collision", taken_key(key, task.rival) if task.rival else said)
        bucket, fingerprint = urllib.parse.unquote(metadata.get("source-bucket", "?")), metadata.get("job-fingerprint")
        is_of_key = source_key_metadata(source.key).items() <= metadata.items()
        # The same bytes with the same options, also where the bucket was copied to another name with its outputs.
        is_same = is_of_key and metadata["source-etag"] == source.version and fingerprint == task.fingerprint
        # What is only to be tagged is not to be made again.
        if is_same and (settings.run.skip_existing or task.is_untagged):
            return OutcomeKind.FOUND
        makers = (job.name for job in settings.jobs if job.fingerprint == fingerprint and job.wants(source))
        if not is_of_key or bucket != self.name:
            owner = urllib.parse.unquote(metadata.get("source-key", "another object"))
            owner = printable(owner if bucket == self.name else f"s3://{bucket}/{owner}")
        elif fingerprint != task.fingerprint and (maker := next(makers, None)):
            # What another job has made is replaced only where that job does not want the object any more.
            owner = f"[job {maker}]"
        else:
            return None
        raise ObjectFailed("output_collision", taken_key(key, owner))

    def is_no_source(self, key: str) -> bool | None:
        """Whether nothing is there, or an output of this program, so that it wants no output key; None: unknown."""
        try:
            head = self.head(self.name, key)
        except ObjectFailed:
            return None
        return head is None or is_own_metadata(head["Metadata"])

    # -- reading and writing -------------------------------------------------------------------------------------------

    def presign(self, key: str) -> str:
        """A URL that reads one object for as long as a request can be resumed. Raises RunError without credentials."""
        request: Any = {"Bucket": self.name, "Key": key}
        with translate_s3_errors("signing a URL"):
            return self.client.generate_presigned_url(
                "get_object", Params=request, ExpiresIn=IDEMPOTENCY_WINDOW_SECONDS
            )

    def open_source(self, source: SourceObject) -> tuple[IO[bytes], int]:
        """A stream over the version that was seen, and its length. Raises ObjectFailed, ObjectSkipped, RunError."""
        condition: Any = {"IfMatch": source.if_match} if source.if_match else {}
        with translate_s3_errors(f"reading {printable(source.key)}", "source_unreadable", is_of_source=True):
            reply: Any = self.client.get_object(Bucket=self.name, Key=source.key, **condition, **self._payer)
        if source.if_match and bare_etag(reply.get("ETag")) != source.version:
            reply["Body"].close()
            raise ObjectFailed("source_unreadable", "what was handed out does not have the ETag of the object")
        return reply["Body"], int(reply.get("ContentLength", source.size))

    def open_upload(self, source: SourceObject, head: Head) -> tuple[IO[bytes], int]:
        """The bytes that a source stands for, unpacked, and how many there are. Raises as `open_source`."""
        body, length = self.open_source(source)
        # Other codings are about the transport (aws-chunked), or no codings at all (identity, utf-8).
        codings = [coding.strip().lower() for coding in head.get("ContentEncoding", "").split(",")]
        known = {"br", "compress", "deflate", "gzip", "zstd"}
        packing = ", ".join(coding for coding in codings if coding.removeprefix("x-") in known)
        if not packing:
            return body, length
        said = f"its Content-Encoding is {packing}, and it cannot be unpacked"
        size, most = 0, self._settings.api.max_size
        with contextlib.closing(body), no_space_stops_the_run(), contextlib.ExitStack() as on_failure:
            if packing.removeprefix("x-") != "gzip":
                raise ObjectFailed("source_unreadable", f"{said} here; store it as it is, or in gzip", permanent=True)
            # Nobody knows before how many bytes there are.
            plain = on_failure.enter_context(temporary_file())
            pieces = inflate(iter(partial(body.read, PACKED_BYTES), b""))
            try:
                while size <= most and (piece := next(pieces, None)) is not None:
                    size += plain.write(piece)
            except BotoCoreError as error:
                raise ObjectFailed("network", f"reading the source broke off: {type(error).__name__}") from None
            except (EOFError, zlib.error) as error:
                # One that ends early may have been cut on the way.
                is_damaged = not isinstance(error, EOFError)
                raise ObjectFailed("source_unreadable", f"{said}: {error}", permanent=is_damaged) from None
            if size > most:
                large = f"unpacked, it has more than {most} bytes; see api.max_size"
                raise ObjectFailed("too_large", large, permanent=True)
            plain.seek(0)
            on_failure.pop_all()
        return plain, size

    @contextlib.contextmanager
    def fetched(self, url: str) -> Iterator[IO[bytes]]:
        """A temporary copy of an object of any bucket, from its `s3://` URL. Raises OSError, RunError."""
        name, _, key = url.removeprefix("s3://").partition("/")
        if not (name and key):
            raise usage_error(f"{url} names no object", "give FILE as s3://BUCKET/KEY")
        # A copy, because S3 hangs up on a stream that is read no faster than objects are converted.
        with temporary_file() as copy:
            with no_space_stops_the_run(), translate_s3_errors(f"reading {url}"):
                shutil.copyfileobj(self.client.get_object(Bucket=name, Key=key, **self._payer)["Body"], copy)
            copy.seek(0)
            yield copy

    def store(self, task: Task, file: "ConvertedFile") -> StoredOutput:
        """Put an answer into the output bucket, an archive after its pages. Raises ObjectFailed, RunError.

        So an archive that lies there proves that its pages do, and a run that was killed before puts them again.
        """
        key = task.output_key + file.type.suffix
        if not file.pages:
            return self._put(task, key, file)
        # Before its pages, too: they would be put in vain, in each run.
        self._require_place(task, key)
        for number, page in enumerate(file.unpacked(task.target), 1):
            of_page = KeyParts.page_key(task.output_key, task.target, number, file.pages)
            self._put(task, of_page, page, page=number, pages=file.pages)
        return self._put(task, key, file, pages=file.pages)

    def _put(self, task: Task, key: str, file: "ConvertedFile", **numbers: int) -> StoredOutput:
        """Put one file, whose metadata get the numbers. A broken transfer leaves nothing."""
        self._require_place(task, key)
        extra = {**self.output_arguments(task), "ContentType": file.type.media_type}
        extra["Metadata"] |= {name: str(number) for name, number in numbers.items()}
        with translate_s3_errors(f"writing {printable(key)}", "store_failed"):
            if file.size > MULTIPART_BYTES:
                # What boto3 takes by itself on some machines of Amazon's (CRT) calls none of the client's handlers.
                parts = TransferConfig(
                    use_threads=False, preferred_transfer_client="classic", multipart_chunksize=5 << 20
                )
                self.client.upload_fileobj(file.body, self.output_name, key, ExtraArgs=extra, Config=parts)
                reply: Any = {}
            else:
                reply = self.client.put_object(Bucket=self.output_name, Key=key, Body=file.body, **extra)
        # Without an ETag, it may have been a portal that has said yes.
        etag = bare_etag(reply.get("ETag")) or bare_etag(self._head_stored(key).get("ETag"))
        return StoredOutput(key, etag, file.size, numbers.get("pages", 0))

    def copy(self, task: Task, seen: Head) -> StoredOutput:
        """Copy an object that is in the target format already, within S3, in the version that was looked at."""
        key, source, extra = task.output_key, task.source, self.output_arguments(task)
        # MetadataDirective=REPLACE drops all that is not named again. Of what is not ASCII, boto3 makes a request that
        # S3 refuses.
        names = ("ContentType", "ContentEncoding", "ContentDisposition", "ContentLanguage", "CacheControl")
        said = {name: value for name in names if (value := seen.get(name)) and value.isascii()}
        if FileType.plain_type(said.get("ContentType", "")) in GENERIC_TYPES:
            said["ContentType"] = FileType.media_type_of(task.target)
        # "pages" would be read as what this program says of an archive.
        metadata = {name: value for name, value in seen["Metadata"].items() if name not in {"page", "pages"}}
        own = {name: value for name, value in metadata.items() if value and value.isascii()}
        # Tags of a source are none of its copy's: a rule that deletes tagged sources would delete the copy as well.
        replaced = {"MetadataDirective": "REPLACE", "TaggingDirective": "REPLACE"}
        extra = {**said, **extra, **replaced, "Metadata": {**own, **extra["Metadata"]}}
        if source.if_match:
            extra["CopySourceIfMatch"] = source.if_match
        self._require_place(task, key)
        self._copy(self.name, source.key, key, extra)
        try:
            self.require_unchanged(source, seen)
        except ObjectFailed:
            # Some servers take no notice of the condition: nobody knows of which version these bytes are.
            extra["Metadata"]["source-etag"] = "unknown"
            extra.pop("CopySourceIfMatch", None)
            with contextlib.suppress(ObjectFailed, ObjectSkipped):
                self._copy(self.output_name, key, key, extra)
            raise
        head = self._head_stored(key)
        return StoredOutput(key, bare_etag(head.get("ETag")), head.get("ContentLength", source.size))

    def _copy(self, bucket: str, source_key: str, key: str, extra: dict[str, Any]) -> None:
        with translate_s3_errors(f"writing {printable(key)}", "store_failed", is_of_source=True):
            parts, place = TransferConfig(use_threads=False), {"Bucket": bucket, "Key": source_key}
            self.client.copy(cast(Any, place), self.output_name, key, ExtraArgs=extra, Config=parts)

    def tag_source(self, source: SourceObject, seen: Head) -> None:
        """Put `s3.tag_source` on a source, beside the tags that it has; not if it has been overwritten or deleted.

        Raises ObjectFailed, RunError.
        """
        if not (new := dict(self._settings.s3.tag_source)):
            return
        try:
            place, had = self.tags_of(source, seen)
            tags: Any = [{"Key": key, "Value": value} for key, value in (had | new).items()]
            if new.items() <= had.items():
                return
            if len(tags) > MAX_TAGS:
                raise ObjectFailed(TOO_MANY_TAGS, f"it has {len(had)} tags, and S3 allows no more than {MAX_TAGS}")
            if "VersionId" not in place:
                # Right before, because S3 knows no condition for it.
                self.require_unchanged(source, seen)
            with translate_s3_errors(f"tagging {printable(source.key)}", TAG_FAILED, is_of_source=True):
                self.client.put_object_tagging(**place, Tagging={"TagSet": tags})
        except ObjectFailed as failure:
            # What is gone has no tags, and another version has no output yet.
            if failure.code not in {"source_gone", "source_changed"}:
                failure.code = failure.code.replace("look_failed", TAG_FAILED)
                raise

    def tags_of(self, source: SourceObject, seen: Head) -> tuple[dict[str, Any], dict[str, str]]:
        """How requests name a source as it was seen, and the tags that it has. Raises ObjectFailed, RunError."""
        place: Any = {"Bucket": self.name, "Key": source.key, **self._payer}
        # A version called "null" is overwritten like any object of a bucket without versions.
        if (version := seen.get("VersionId", "null")) != "null":
            place["VersionId"] = version
        with translate_s3_errors(f"the tags of {printable(source.key)}", TAG_FAILED, is_of_source=True):
            return place, {
                tag["Key"]: tag["Value"] for tag in self.client.get_object_tagging(**place).get("TagSet", ())
            }

    def _head_stored(self, key: str) -> Head:
        """What a HEAD says of an output that was just written. Raises ObjectFailed, RunError."""
        if head := self.head(self.output_name, key, "store_failed"):
            return head
        raise ObjectFailed("store_failed", f"{printable(key)} was written, and is not there")

    def output_arguments(self, task: Task) -> dict[str, Any]:
        """How an output is to be written, and what it says of itself."""
        options, source = self._settings.s3, task.source
        named = {
            "StorageClass": options.storage_class,
            "ServerSideEncryption": options.sse,
            "SSEKMSKeyId": options.sse_kms_key_id,
            "ACL": options.acl,
            "CacheControl": options.cache_control,
            "Tagging": self._tagging,
        }
        # S3 takes ASCII only in metadata.
        job, bucket = urllib.parse.quote(task.job), urllib.parse.quote(self.name)
        metadata = {"source-bucket": bucket, "source-etag": source.version, **source_key_metadata(source.key)}
        metadata |= {"job": job, "job-fingerprint": task.fingerprint}
        return {"Metadata": metadata, **self._payer, **{name: value for name, value in named.items() if value}}


########################################################################################################################
# Keys from files, instead of a listing: plain keys, an S3 Inventory, or a failures file, told apart by what is in it.
#   - The file is read as a stream. A plain key has no version, and an inventory's may be a day old: a worker looks.
#   - A file that is cut or damaged ends the run as a broken listing does: its rest must not look like done.
########################################################################################################################

INVENTORY_ROW = re.compile(r'"[^"]+","[^"]*"(,"|$)')
INVENTORY_MANIFEST = re.compile(r'\s*\{[\s\S]*"(sourceBucket|fileFormat|fileSchema)"\s*:')
FAILURE = re.compile(r'\s*\{(?=.*"bucket"\s*:)(?=.*"key"\s*:)')
KEYS_HINT = "give keys, one a line in UTF-8; an S3 Inventory in CSV, best its manifest.json; or a failures file"


def keys_from(source: str, bucket: Bucket, stop: StopFlag) -> Iterator[list[SourceObject]]:
    """The objects that a path, `-` or an `s3://` URL names, by pages. Raises StopRequested, RunError.

    An error is one of usage before the first page only: after it, the run has begun.
    """
    objects, has_begun = KeyFile(source, bucket).objects(), False
    # A failures file names an object once for each failure: the second must not go out while the first does.
    recent: dict[str, None] = {}
    # A pipe may be silent for long: only a thread of its own waits for it.
    pool = ThreadPoolExecutor(1)
    try:
        while True:
            coming = pool.submit(lambda: list(itertools.islice(objects, PAGE_KEYS)))
            while not wait([coming], timeout=0.2).done:
                stop.sleep(0)
            page = {named.key: named for named in coming.result()}
            if not page:
                return
            yield [named for key, named in page.items() if key not in recent]
            recent.update(dict.fromkeys(page))
            for key in list(recent)[:-KEYS_REMEMBERED]:
                del recent[key]
            has_begun = True
    except RunError as error:
        raise (RunError(error.message, error.hint, code="listing") if has_begun else error) from None
    finally:
        pool.shutdown(wait=False)


class KeyFile:
    """A file that names objects of a bucket. Every error names the file, and the line if one is to blame.

    `md5`: what the file must have, in hex. A file of the disk, stdin, and a file in S3 (as a copy) are the same here.
    """

    LINE_BYTES = 8 << 20  # of a file of keys: a manifest may be one line, a key's line is far shorter

    def __init__(self, name: str, bucket: Bucket, md5: str = "") -> None:
        self.name, self._bucket, self._md5 = name, bucket, md5

    @staticmethod
    def readable_twice(name: str) -> str:
        """The name under which a file of keys can be read more than once: "-", for a copy, if it is a pipe.

        Raises RunError.
        """
        place = Path(name)
        is_stream = (place.is_fifo() or place.is_char_device()) and os.access(name, os.R_OK)
        if not (is_stream or (name == "-" and sys.stdin)):
            return name
        with no_space_stops_the_run(), open(0 if name == "-" else name, "rb", closefd=name != "-") as pipe:
            copy: Any = temporary_file()
            shutil.copyfileobj(pipe, copy)
            sys.stdin = io.TextIOWrapper(copy)
        return "-"

    def objects(self) -> Iterator[SourceObject]:
        """The objects that the file names, whatever its form. Raises RunError."""
        lines = self._lines()
        head = list[str]()
        for line in lines:
            head.append(line)
            if len(head) >= 8 and line.strip():
                break  # a manifest's own names stand in its first lines
        first, lines = next(filter(str.strip, head), ""), itertools.chain(head, lines)
        # Names of files decide nothing, but such a file hardly holds plain keys: each would be missed in the bucket.
        is_misnamed = first and self.name.lower().removesuffix(".gz").endswith((".csv", ".json", ".jsonl"))
        if INVENTORY_MANIFEST.match("\n".join(head)):
            yield from self._inventory_objects("\n".join(lines))
        elif INVENTORY_ROW.match(first):
            yield from self._row_objects(lines, ["Bucket", "Key"])
        elif FAILURE.match(first):
            yield from self._failed_objects(lines)
        elif is_misnamed:
            what = 'is not what is expected there: "bucket","key",... as S3 Inventory writes it, or JSON'
            raise self._bad_line(head.index(first) + 1, what)
        else:
            yield from (self._object(line, number) for number, line in enumerate(lines, 1) if line)

    def _lines(self) -> Iterator[str]:
        """The lines of the file, unpacked if it is gz, without their ends."""
        number = 0
        with self._open() as packed:
            # Not to the file's end: this very run may be appending its failures to it.
            status = os.fstat(packed.fileno())
            file, left = packed, status.st_size if stat.S_ISREG(status.st_mode) else sys.maxsize
            if packed.peek(2)[:2] == b"\x1f\x8b":
                file, left = io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=packed))), sys.maxsize
            while left > 0 and (line := file.readline(self.LINE_BYTES)):
                number, left = number + 1, left - len(line)
                if len(line) == self.LINE_BYTES:
                    raise self._bad_line(number, "is too long")
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise self._bad_line(number, "is not UTF-8") from None
                yield text.removesuffix("\n").removesuffix("\r")

    @contextlib.contextmanager
    def _open(self) -> Iterator[io.BufferedReader]:
        """The file, if it is whole by its MD5: of a damaged one, not even the first line is taken."""
        file: Any
        try:
            with contextlib.ExitStack() as held:
                if self.name.startswith("s3://"):
                    file = held.enter_context(self._bucket.fetched(self.name))
                elif self.name != "-":
                    file = held.enter_context(Path(self.name).open("rb"))
                elif sys.stdin is None:
                    raise usage_error("stdin is closed", "pipe keys into it, or give a file")
                else:
                    file = sys.stdin.buffer
                digest = hashlib.md5(usedforsecurity=False)
                while self._md5 and (block := file.read(CHUNK_BYTES)):
                    digest.update(block)
                if self._md5 not in {"", digest.hexdigest()}:
                    message = f"{self.name} is damaged: its MD5 is not the manifest's"
                    raise usage_error(message, "copy it again from its bucket")
                # A copy of stdin may have been read before.
                if self._md5 or (self.name == "-" and file.writable()):
                    file.seek(0)
                yield file
        except (OSError, EOFError, zlib.error) as problem:
            what = getattr(problem, "strerror", None) or problem
            raise usage_error(f"{self.name} cannot be read: {what}", "check that the file is there and whole") from None

    def _bad_line(self, number: int, what: str) -> RunError:
        return usage_error(f"{self.name}: line {number} {what}", KEYS_HINT)

    def _object(self, key: str, number: int) -> SourceObject:
        if not 0 < len(key.encode()) <= S3_KEY_BYTES:
            raise self._bad_line(number, f"is no key: S3 allows 1 to {S3_KEY_BYTES} bytes")
        return SourceObject(key)

    def _failed_objects(self, lines: Iterable[str]) -> Iterator[SourceObject]:
        for number, line in filter(operator.itemgetter(1), enumerate(lines, 1)):
            try:
                failure = json.loads(line)
                if failure["bucket"] == self._bucket.name:
                    yield self._object(str(failure["key"]), number)
            except (ValueError, LookupError, TypeError, RecursionError):
                what = 'is no JSON with "bucket" and "key", as the first line is; remove it'
                raise self._bad_line(number, what) from None

    def _inventory_objects(self, manifest: str) -> Iterator[SourceObject]:
        name, bucket, again = self.name, self._bucket, "copy it again from its bucket"
        try:
            content = json.loads(manifest)
            source, file_format = content["sourceBucket"], content["fileFormat"]
            columns = [column.strip() for column in content["fileSchema"].split(",")]
            files = [(file["key"].split("/"), file.get("MD5checksum", "")) for file in content["files"]]
            destination = content["destinationBucket"].rpartition(":")[2]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise usage_error(f"{name} is no whole manifest.json of S3 Inventory", again) from None
        if file_format != "CSV":
            raise usage_error(f"{name} is an inventory in {file_format}", "set the format of the S3 Inventory to CSV")
        if source != bucket.name:
            what = f"{name} is an inventory of the bucket {source}, not of {bucket.name}"
            raise usage_error(what, "correct s3.bucket or FILE")
        if not {"Bucket", "Key"} <= set(columns):
            raise usage_error(f"{name} has no columns Bucket and Key", "give the manifest as S3 Inventory wrote it")
        # A copy begins at any folder of the bucket: the files lie in a folder beside the manifest's, or below it.
        here = Path(name).absolute().parent
        for parts, md5 in files:
            ends = filter(None, ("/".join(parts[start:]) for start in range(len(parts))))
            places = (folder / end for folder, end in itertools.product((here, here.parent), ends))
            place = next((str(place) for place in places if place.is_file()), f"s3://{destination}/{'/'.join(parts)}")
            part = KeyFile(place, bucket, md5)
            yield from part._row_objects(part._lines(), columns)

    def _row_objects(self, lines: Iterable[str], columns: Sequence[str]) -> Iterator[SourceObject]:
        """The newest versions in the rows of an inventory; columns beyond those named are not read."""
        rows = csv.reader(lines, strict=True)
        try:
            for row in filter(None, rows):
                if len(row) < len(columns):
                    raise self._bad_line(rows.line_num, f"has fewer columns than {', '.join(columns)}")
                cells = dict(zip(columns, row, strict=False))
                if cells["Bucket"] != self._bucket.name:
                    what = f"is of the bucket {cells['Bucket']}, not of {self._bucket.name}"
                    raise self._bad_line(rows.line_num, what)
                if cells.get("IsLatest") == "false" or cells.get("IsDeleteMarker") == "true":
                    continue
                # S3 writes a space as + and a plus as %2B. Without "strict", broken UTF-8 would become another key.
                named = self._object(urllib.parse.unquote_plus(cells["Key"], errors="strict"), rows.line_num)
                # All else that a row says may be a day old, and is what a look says. The version tells what is done.
                yield named._replace(version=bare_etag(cells.get("ETag")))
        except (csv.Error, ValueError) as problem:
            raise self._bad_line(rows.line_num, f"cannot be read: {problem}") from None


########################################################################################################################
# Plan. What becomes of each object of a page, in each job: the feeder, --dry-run, --why and the count of the total all
# consume the same decisions.
#   - Each object and job gets exactly one decision (I3). No request is made per object, but for a look at what another
#     source may hold: one whose request is in flight, or one that has claimed the same key.
#   - The journal is asked once for each page, job and question. Requests in flight are asked for before outputs are
#     listed: what is settled in between lies there by then.
########################################################################################################################


def look(task: Task, bucket: Bucket, settings: Settings) -> tuple[Task, Head]:
    """A task with its source as it lies there, and what the HEAD says. Raises ObjectSkipped, ObjectFailed, RunError.

    Of a key from a file, only now is it known whether the object is wanted, and whether it is done.
    """
    source, head = bucket.look_at_source(task.source)
    if not task.source.version:
        # The plan took every job that lets the key in for one that wants the object: such a job may stand here for one
        # that makes the same, or have claimed the output key.
        jobs, key, mine = settings.jobs, source.key, settings.by_name[task.job].result_of(source.key)
        made = {f"[job {job.name}]": job.result_of(key) for job in jobs}
        named = zip(made, jobs, strict=True)
        wanting = [name for name, job in named if job.wants(source) and not job.leaves_as_it_is(key)]
        if mine not in (made[name] for name in wanting):
            raise ObjectSkipped(NOT_MATCHED)
        if task.holder in made:
            slot = KeyParts.slot_of(task.output_key)
            rivals = [name for name in wanting if KeyParts.slot_of(made[name][-1]) == slot]
            owner = next((name for name in rivals if made[name] == made[task.holder]), rivals[0])
            task = replace(task, holder="" if made[owner] == mine else owner)
        if seen := replace(task, source=source).known_version:
            if seen.event in DONE_EVENTS:
                raise ObjectSkipped(ALREADY_DONE)
            if seen.permanent and not settings.retry_failed:
                raise ObjectSkipped(FAILED_BEFORE)
    if not task.copy and (told := settings.api.too_large(source.size)):
        raise ObjectFailed("too_large", told, permanent=True)
    return replace(task, source=source), head


class Planner:
    """Lists, selects and decides. It owns nothing that grows with the bucket, and no counts."""

    def __init__(self, settings: Settings, bucket: Bucket, journal: Journal, stop: StopFlag) -> None:
        self.settings, self.bucket, self.journal, self._stop = settings, bucket, journal, stop
        self._own_prefixes = settings.own_prefixes
        self._outputs = OutputLister(bucket)
        self._unmarked_looks = 16  # at keys that lie where outputs go, for a warning
        self._holder_looks = 16  # in vain, at sources that have claimed a key: so many collisions are none of outputs
        # What no key has matched yet, for a warning; of a shard's part, that may well be so.
        jobs = settings.jobs if settings.shard.count == 1 else ()
        self._unmet_prefixes = dict.fromkeys(() if settings.keys_from else (job.prefix for job in jobs))
        self._unmet_jobs = {job.name: False for job in jobs}  # name -> whether there was any key at all
        self.warnings: dict[str, str] = {}  # by kind: what a person should know
        self.at_work: set[tuple[str, str]] = set()  # (job, key) of what is handed out and not yet in the journal

    def decisions(self, max_parallel: Callable[[], int]) -> Iterator[list[Decision]]:
        """Decisions for all there is, by pages; at the end for what was postponed, for the second time.

        `max_parallel` says how many pages may be read at a time. Raises RunError, StopRequested.
        """
        doubts = {job.name: doubt for job in self.settings.jobs if (doubt := FileType.doubt_of(job.target))}
        # What was converted to before is a format, whoever knows it.
        self._warn("target", (doubt for name, doubt in doubts.items() if not self.journal.has_converted(name)))
        for page in self.pages(max_parallel):
            decisions = self.plan(page)
            self.journal.postpone([(each.job, each.source) for each in decisions if each.kind is DecisionKind.POSTPONE])
            yield decisions
        self._warn("empty", self._unmatched())
        for postponed in self.journal.postponed():
            yield [decision._replace(is_retry=True) for decision in self._decide(postponed, is_last=True)]

    def _warn(self, kind: str, said: Iterable[str]) -> None:
        if told := "; ".join(dict.fromkeys(said)):
            self.warnings[kind] = told

    def _unmatched(self) -> Iterator[str]:
        """What was asked for and matches nothing, now that everything was listed."""
        where = self.settings.keys_from or f"s3://{self.settings.s3.bucket}"
        for prefix in self._unmet_prefixes:
            near = f'; keys rarely begin with "/": did you mean "{prefix.lstrip("/")}"?' if prefix[:1] == "/" else ""
            found = f"no key begins with {json.dumps(prefix, ensure_ascii=False)}" if prefix else "there is no object"
            yield f"{found} in {where}{near}"
        for name, was_any in self._unmet_jobs.items():
            job = self.settings.by_name[name]
            # Where there is nothing but outputs, all was converted and taken away.
            if was_any and job.prefix not in self._unmet_prefixes:
                asked = {"prefix": job.prefix, "include": " ".join(job.include)}
                asked |= {"exclude": " ".join(job.exclude)} if job.exclude != ConvertOptions.exclude else {}
                told = ", ".join(f"{option} = {value}" for option, value in asked.items() if value)
                yield f"job {name} wants none of the keys in {where}: {told}"

    @staticmethod
    def outermost(prefixes: Iterable[str]) -> list[str]:
        """The prefixes that lie in no other one: listings of these have all keys once."""
        every = sorted(set(prefixes))
        return [prefix for prefix in every if not any(other != prefix and prefix.startswith(other) for other in every)]

    def pages(self, max_parallel: Callable[[], int]) -> Iterator[list[SourceObject]]:
        """What there is, by pages. A prefix inside another is part of its listing. Raises RunError, StopRequested."""
        if self.settings.keys_from:
            names = [job.name for job in self.settings.jobs]
            for page in keys_from(self.settings.keys_from, self.bucket, self._stop):
                # A file may name a key again while it is at work: then it must not go out a second time.
                yield [each for each in page if self.at_work.isdisjoint((name, each.key) for name in names)]
            return
        for prefix in self.outermost(job.prefix for job in self.settings.jobs):
            with contextlib.closing(self.bucket.list_pages(prefix, max_parallel)) as pages:
                yield from pages

    def foreseen(self) -> Iterator[list[Decision]]:
        """Decisions by pages, each as a worker's looks would leave it. Raises RunError."""

        def is_open(task: Task) -> bool:
            # An archive of pages between the sources is no source, and only its metadata say so.
            is_among = self.settings.puts_among_sources(self.settings.by_name[task.job])
            may_be_own = is_among and task.source.key.endswith(".zip")
            return bool(task.look or task.holder or task.is_untagged or self.settings.keys_from or may_be_own)

        with ThreadPoolExecutor(LIST_THREADS) as pool:
            for page in self.decisions(lambda: LIST_THREADS):
                settled, undecided = list[Decision](), list[Decision]()
                for each in page:
                    (undecided if each.task and is_open(each.task) else settled).append(each)
                yield [*settled, *pool.map(self.foresee, undecided)]

    def foresee(self, decision: Decision) -> Decision:
        """A decision as a worker's looks would leave it. Raises RunError."""
        task = decision.task
        if task is None or decision.kind is DecisionKind.FAIL:
            return decision
        try:
            task, _ = look(task, self.bucket, self.settings)
            existing = self.bucket.look_at_output(task)
        except ObjectSkipped as skipped:
            kind = DecisionKind.DONE if str(skipped) == ALREADY_DONE else DecisionKind.SKIP
            return decision._replace(kind=kind, reason=str(skipped))
        except ObjectFailed as failure:
            return decision._replace(kind=DecisionKind.FAIL, reason=failure.code, message=failure.message)
        if existing:
            return decision._replace(kind=DecisionKind.DONE, reason=existing[0].value, output=existing[1])
        return decision._replace(source=task.source)

    def plan(self, page: Sequence[SourceObject], *, is_last: bool = False) -> list[Decision]:
        """One decision for each object of a page and each job that wants it, or none that does. Raises RunError.

        `is_last`: nothing is postponed, because all else has been tried.
        """
        jobs, shard, decisions = self.settings.jobs, self.settings.shard, list[Decision]()
        selected: list[tuple[str, SourceObject]] = []
        for source in page:
            reason = self._is_own(source.key) if source.key.startswith(self._own_prefixes) else source.skip_reason
            if self._unmet_prefixes or self._unmet_jobs:
                self._note_match(source.key, reason)
            wanting = [] if reason else [job for job in jobs if job.wants(source)]
            if len(wanting) > 1:
                # Of jobs that would make the very same output, the first is enough.
                first = {job.result_of(source.key): job for job in reversed(wanting)}
                wanting = self._told_apart([job for job in wanting if job in first.values()], source, decisions)
            # Counted by one shard: the one that would have its output, and may have stored that.
            if not wanting and (shard.count == 1 or shard.owns(KeyParts.slot_of(jobs[0].output_of(source.key)))):
                decisions.append(Decision(DecisionKind.SKIP, source, "", reason or NOT_MATCHED))
            for job in wanting:
                # All sources that want one output key meet in one shard: two shards would both write it.
                if shard.count > 1 and not shard.owns(KeyParts.slot_of(job.output_of(source.key))):
                    continue
                if job.leaves_as_it_is(source.key):
                    decisions.append(Decision(DecisionKind.SKIP, source, job.name, SAME_FORMAT))
                else:
                    selected.append((job.name, source))
        return decisions + self._decide(selected, is_last=is_last)

    def _told_apart(self, jobs: list[Job], source: SourceObject, decisions: list[Decision]) -> list[Job]:
        """The jobs without those that the journal does not tell from one before them, say by `pages`: they fail."""
        if self.settings.keys_from:
            return jobs  # of a named object, only a look tells who wants it
        makers: dict[tuple[str, str], Job] = {}
        for job in [job for job in jobs if not job.leaves_as_it_is(source.key)]:
            maker = makers.setdefault((job.fingerprint, job.place), job)
            if maker is not job and self.settings.shard.owns(KeyParts.slot_of(job.output_of(source.key))):
                task = replace(self._task(job.name, source, None, None), holder=f"[job {maker.name}]")
                said = taken_key(task.output_key, task.holder)
                decisions.append(Decision(DecisionKind.FAIL, source, job.name, "output_collision", said, task))
        return [job for job in jobs if job in makers.values() or job.leaves_as_it_is(source.key)]

    def _note_match(self, key: str, reason: str) -> None:
        for prefix in list(filter(key.startswith, self._unmet_prefixes)):
            del self._unmet_prefixes[prefix]
        for name in () if reason in {OWN_OUTPUT, FOLDER} else list(self._unmet_jobs):
            self._unmet_jobs[name] = True
            if self.settings.by_name[name].lets_in(key):
                del self._unmet_jobs[name]

    def _is_own(self, key: str) -> str:
        """OWN_OUTPUT, of a key that lies where outputs go: it is skipped; a warning names sources among such keys."""
        # A few looks, for a warning alone, at what some job would take if it lay elsewhere.
        jobs = self.settings.jobs if self._unmarked_looks and not key.endswith((".zip", "/")) else ()
        if any(job.lets_in(key) and not job.leaves_as_it_is(key) for job in jobs):
            self._unmarked_looks -= 1
            if self.bucket.is_no_source(key) is False:
                self._unmarked_looks = 0
                self.warnings["unmarked"] = (
                    f"{printable(key)} lies where outputs go and is none of this program's: such keys are skipped; "
                    "if they are sources, give outputs a prefix of their own in s3.output_key"
                )
        return OWN_OUTPUT

    def _decide(self, selected: Sequence[tuple[str, SourceObject]], *, is_last: bool) -> list[Decision]:
        """Decisions for (job, object) by what the journal knows, and by who has their output keys."""
        keys: dict[str, list[str]] = {}
        for job, source in selected:
            keys.setdefault(job, []).append(source.key)
        states = {job: self.journal.states(job, of_job) for job, of_job in keys.items()}
        decisions, todo = list[Decision](), list[tuple[str, SourceObject, JournalState | None]]()
        for job, source in selected:
            state = states[job].get(source.key)
            if state is None or state[1] != source.version:
                todo.append((job, source, JournalState(*state) if state else None))
            elif state[2] in DONE_EVENTS:
                decisions.append(Decision(DecisionKind.DONE, source, job, ALREADY_DONE))
            elif state[2] == OutcomeKind.SKIPPED.value:
                decisions.append(Decision(DecisionKind.SKIP, source, job, state[5]))
            elif state[3] and not (self.settings.retry_failed or self.settings.keys_from):
                decisions.append(Decision(DecisionKind.SKIP, source, job, FAILED_BEFORE))
            elif is_last or state[2] == LOST or state[5] in FREE_FAILURES:
                todo.append((job, source, JournalState(*state)))
            else:
                decisions.append(Decision(DecisionKind.POSTPONE, source, job))
        # What is finished is asked about in no other table: that is most of a bucket, in most runs.
        pending = {job: self.journal.pending(job, of_job) for job, of_job in keys.items()} if todo else {}
        tasks = [self._task(job, source, state, pending[job].get(source.key)) for job, source, state in todo]
        return [*decisions, *self._dispatch(tasks)]

    def _task(self, job: str, source: SourceObject, state: JournalState | None, pending: PendingRequest | None) -> Task:
        settings, chosen = self.settings, self.settings.by_name[job]
        # An inventory's version may be a day old. What was sent for another version can never be asked for again.
        source = source._replace(version="") if settings.keys_from else source
        is_resumable = pending is not None and (not source.version or pending.version == source.version)
        return Task(
            job=job,
            fingerprint=chosen.fingerprint,
            source=source,
            target=chosen.target,
            quality=chosen.quality,
            output_key=chosen.output_of(source.key),
            copy=chosen.same_format == "copy" and chosen.is_same_format(source.key),
            pending=pending if is_resumable else None,
            known=state,
        )

    def _dispatch(self, tasks: Sequence[Task]) -> Iterator[Decision]:
        """Decisions for what the journal does not know as done: it must fail, or goes to a worker."""
        possible = list[Task]()
        for task in tasks:
            if failure := self._impossible(task):
                yield Decision(DecisionKind.FAIL, task.source, task.job, *failure, task)
            else:
                possible.append(task)
        # What the job has met before was told of then.
        made = self.journal.made_before([task.source.key for task in possible if task.known is None])
        for task in self._placed(possible):
            kind = DecisionKind.COPY if task.copy else DecisionKind.RESUME if task.pending else DecisionKind.CONVERT
            # With the same options, what lies under the key is likely to be found.
            is_anew = kind is DecisionKind.CONVERT and any(
                task.source.version in {"", version} and not (task.look and fingerprint == task.fingerprint)
                for version, fingerprint in made.get((task.target, task.source.key), ())
            )
            yield Decision(kind, task.source, task.job, task=task, is_anew=is_anew)

    def _impossible(self, task: Task) -> tuple[str, str] | None:
        """Code and message of a failure that needs no worker to be seen."""
        if not task.copy and (told := self.settings.api.too_large(task.source.size)):
            return "too_large", told
        longest = [f"{task.output_key}.zip"]
        if self.settings.by_name[task.job].pages == "unpack":
            longest.append(KeyParts.page_key(task.output_key, task.target, MAX_PAGES, MAX_PAGES))
        if any(len(key.encode()) > S3_KEY_BYTES for key in longest):
            behind = "with what may come behind it (.zip, a page's number)"
            return "output_key_too_long", f"the output key, {behind}, has more than {S3_KEY_BYTES} bytes"
        if self.settings.s3.is_one_bucket and task.output_key == task.source.key:
            said = "would replace its own source: put {target} or a folder into s3.output_key"
            return "output_collision", f"{task.output_key}: {said}"
        return None

    def _placed(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """The tasks with what is known of their output keys: who holds them, and whether something lies there."""
        here, jobs = self.bucket.name, self.settings.by_name
        slots = [self.journal.slot(task.output_key) for task in tasks]
        held = self.journal.holders(slots)
        there = self._outputs.existing([(jobs[task.job].constant_prefix, task.output_key) for task in tasks])
        if self._outputs.refusal:
            self.warnings["outputs"] = f"outputs cannot be listed ({self._outputs.refusal}): each is looked at instead"
        placed: list[tuple[str, Task]] = []
        for slot, task in zip(slots, tasks, strict=True):
            is_there = task.output_key in there
            holder, rival = self._whose(task, *held.get(slot, (here, task.source.key)), is_there=is_there)
            # Before an output is made again, it is looked for: a listing may be late.
            look = is_there or task.pending is not None or task.is_lost
            placed.append((slot, replace(task, holder=holder, rival=rival, look=look)))
        # A request in flight comes before what is new; what somebody else holds is claimed by nobody here.
        free = sorted((each for each in placed if not each[1].holder), key=lambda each: each[1].pending is None)
        claims = self.journal.claim([(slot, task.job, task.source.key) for slot, task in free])
        for slot, task in placed:
            claim = (slot, task.job, task.source.key)
            job, key = claims.get(slot, claim[1:])
            if task.holder or (job, key) == claim[1:]:
                yield task
            elif key == task.source.key:
                yield replace(task, holder=f"[job {job}]")
            elif task.pending or (task.output_key in there and not self._outputs.refusal):
                # Of different sources, the one has the key whose output lies there: the look tells.
                yield replace(task, rival=key)
            elif self._holder_looks and self.bucket.is_no_source(key):
                # Outputs of other jobs, and of this one when it had another place, are listed as well, and have claimed
                # what they do not want.
                claims |= self.journal.claim([claim], anew=True)
                yield task
            else:
                self._holder_looks = max(0, self._holder_looks - 1)
                yield replace(task, holder=key)

    def _whose(self, task: Task, bucket: str, key: str, *, is_there: bool) -> tuple[str, str]:
        """Who has a task's output key, and who else may: of these, what lies there tells."""
        here = self.bucket.name
        holder = key if bucket == here else f"s3://{bucket}/{key}"
        if (bucket, key) == (here, task.source.key):
            return "", ""
        if is_there and not self._outputs.refusal:
            return "", holder
        # An object that was deleted while it was in flight, and has left no output, holds nobody up.
        is_gone = bucket == here and self.bucket.is_no_source(key)
        return ("" if is_gone else holder), ""


class OutputLister:
    """Which outputs exist, from listings with a jump over what lies between two keys.

    What was seen to be empty is believed for a while: a run's own outputs are among the claims.
    """

    def __init__(self, bucket: Bucket, code: str = "listing_refused") -> None:
        """`code`: see `Bucket.read_page`."""
        self._bucket, self._code, self.refusal = bucket, code, ""  # why outputs may not be listed
        self._empty_after: dict[str, tuple[str, float]] = {}  # prefix -> (key, monotonic seconds)

    def existing(self, places: Sequence[tuple[str, str]]) -> set[str]:
        """Those of the (constant prefix, key) whose key, or that key with `.zip`, exists; all if none may be listed."""
        found: set[str] = set()
        for prefix in sorted({prefix for prefix, _ in places}):
            keys = [key for own, key in places if own == prefix]
            listed: Collection[str] = {made for key in keys for made in (key, f"{key}.zip")}
            try:
                listed = listed if self.refusal else self.listed(prefix, listed)
            except ObjectFailed as failure:
                # What may not be listed is looked at, object by object.
                self.refusal = failure.message
            found.update(key for key in keys if key in listed or f"{key}.zip" in listed)
        return found

    def listed(self, prefix: str, keys: Iterable[str]) -> dict[str, SourceObject]:
        """Those of the keys that exist, which all begin with a prefix. Raises ObjectFailed, RunError."""
        wanted, found = sorted(keys, reverse=True), dict[str, SourceObject]()
        empty_after, seen_at = self._empty_after.get(prefix, ("", -math.inf))
        is_fresh = time.monotonic() - seen_at < 10  # seconds for which an empty listing is believed
        after = token = ""
        while wanted and not (is_fresh and wanted[-1] > empty_after):
            # StartAfter leaves out the key itself: a key without its last character sorts before it.
            after = max(after, wanted[-1][:-1])
            page = self._bucket.read_page(self._bucket.output_name, prefix, after, token, self._code)
            # A page may be empty and not the last: then only its token leads on.
            token = page.token if not page.objects else ""
            after = page.objects[-1].key if page.objects else after
            if page.is_last:
                self._empty_after[prefix] = (after, time.monotonic())
            listed = {output.key: output for output in page.objects}
            while wanted and (page.is_last or wanted[-1] <= after):
                key = wanted.pop()
                found |= {key: listed[key]} if key in listed else {}
        return found


########################################################################################################################
# Verify. The output bucket beside what is known to be stored there: by two listings, in flat memory, with no request
# for each object but where the journal does not know it, and without a lock: a run may be at work.
#   - What is to be there stands in a temporary table until it is seen, so that outputs may lie in any order.
#   - Whatever looks wrong is asked of the journal again: a run may have stored it anew since.
########################################################################################################################

VERIFIED, MISSING, ALTERED, NOT_CONVERTED = "verified", "missing", "altered", "not_converted"
ORPHANS, UNKNOWN = "orphans", "unknown"
# What `--verify` finds -> what to do about it.
FINDINGS = {
    MISSING: "--repair converts them again, which is paid for",
    ALTERED: "delete them if that was not meant, and --repair converts their sources again",
    NOT_CONVERTED: "a run converts those that it can; --why KEY says what it would do",
    FAILED_BEFORE: "--why KEY says what of; --retry-failed tries them again",
    ORPHANS: "keep them, or delete them",
    UNKNOWN: "nothing is ever done with them",
}


class Finding(NamedTuple):
    """Something about one object or output that is not as it is after a run that left nothing to do."""

    kind: str  # a key of FINDINGS
    key: str  # of the source; empty where nobody knows it
    output_key: str
    message: str
    job: str = ""
    left_out: str = ""  # why a run would skip its source, so that --repair cannot help


class Verification:
    """What `--verify` finds, and what `--repair` makes again."""

    def __init__(self, planner: Planner) -> None:
        self._settings, self._bucket, self._journal = planner.settings, planner.bucket, planner.journal
        self._planner = planner
        self.counts = Counter[str]()
        self.examples: dict[str, Finding] = {}  # by kind, the first
        self.seen = 0  # objects listed, sources and outputs
        self.left_out = 0  # of what is missing: its source is skipped, and nothing is made of it
        # They belong to the shard of their archive, and nothing in a key tells whose page it is.
        self._has_pages = any(job.pages == "unpack" for job in self._settings.jobs)
        self.expected = 0  # objects that will be seen in all, at the least; 0 until the sources are listed

    def pages(self) -> Iterator[list[Finding]]:
        """Findings, as pages of both listings bring them; an empty list where a page brings none. Raises RunError."""
        for findings in itertools.chain(self._of_sources(), self._of_outputs(), self._of_strangers()):
            for finding in findings:
                self.counts[finding.kind] += 1
                self.left_out += finding.kind == MISSING and bool(finding.left_out)
                self.examples.setdefault(finding.kind, finding)
            yield findings

    def repair(self) -> Iterator[None]:
        """Have the journal take for lost what is missing, page by page. Raises RunError."""
        for findings in self.pages():
            for name in self._settings.by_name:
                missing = (each for each in findings if each.kind == MISSING and not each.left_out)
                lost = {each.key for each in missing if each.job == name}
                self._journal.mark_lost(name, list(lost), time.time())
            yield

    def _of_sources(self) -> Iterator[list[Finding]]:
        count = 0
        for page in self._planner.foreseen():
            count += len(page)
            self.seen += len(page)
            self._journal.expect(itertools.chain(self._done(page), self._others(page)))
            yield list(self._not_done(page))
        self.expected = 2 * count
        self._journal.forget_plans()

    def _done(self, page: Sequence[Decision]) -> Iterator[ExpectedOutput]:
        """Outputs of what is done; also of what no job wants any more, such as an archived source."""
        settled = [each for each in page if each.kind is DecisionKind.DONE or each.kind is DecisionKind.SKIP]
        for name in self._settings.by_name:
            mine = (each for each in settled if each.job in {"", name} and not each.output)
            decided = {each.source.key: each for each in mine}
            for key, (version, output) in self._journal.stored(name, list(decided)).items():
                now = decided[key]
                expected = self._outputs_of(name, key, output, now.reason if now.kind is DecisionKind.SKIP else "")
                is_same = now.source.version in {"", version}
                yield from expected if is_same else [each._replace(etag=None) for each in expected]

    def _outputs_of(self, job: str, key: str, output: StoredOutput, left_out: str = "") -> list[ExpectedOutput]:
        """An output, and the pages beside it, if they are wanted."""
        expected = [ExpectedOutput(output.key, job, key, output.etag, output.size, left_out)]
        target, is_unpacked = self._settings.by_name[job].target, self._settings.by_name[job].pages == "unpack"
        for number in range(1, output.pages + 1 if is_unpacked else 1):
            page = KeyParts.page_key(KeyParts.slot_of(output.key), target, number, output.pages)
            expected.append(ExpectedOutput(page, job, key, "", None, left_out))
        return expected

    def _others(self, page: Sequence[Decision]) -> Iterator[ExpectedOutput]:
        """Keys under which something of an earlier version may lie, and what a look has shown to be there."""
        for each in page:
            if each.output:
                yield from self._outputs_of(each.job, each.source.key, each.output)
            elif each.job and each.kind is not DecisionKind.DONE and each.reason != SAME_FORMAT:
                planned = self._settings.by_name[each.job].output_of(each.source.key)
                for key in (planned, f"{planned}.zip"):
                    yield ExpectedOutput(key, each.job, each.source.key, None, None)

    def _not_done(self, page: Sequence[Decision]) -> Iterator[Finding]:
        for each in page:
            if each.kind is DecisionKind.DONE or each.kind is DecisionKind.POSTPONE or not each.job:
                continue
            kind = each.reason if each.kind is DecisionKind.SKIP else NOT_CONVERTED
            if kind in FINDINGS:
                planned = self._settings.by_name[each.job].output_of(each.source.key)
                said = (
                    "it failed for good" if kind == FAILED_BEFORE else each.message or "there is none of this version"
                )
                yield Finding(kind, each.source.key, planned, said, each.job)

    def _output_pages(self) -> Iterator[Collection[SourceObject]]:
        jobs = self._settings.by_name
        if not self._settings.keys_from:
            for prefix in self._planner.outermost(job.constant_prefix for job in jobs.values()):
                listing = self._bucket.list_pages(prefix, lambda: LIST_THREADS, self._bucket.output_name)
                with contextlib.closing(listing) as pages:
                    yield from pages
            return
        lister = OutputLister(self._bucket, code="")
        for expected in self._journal.expected():
            for prefix in {jobs[each.job].constant_prefix for each in expected}:
                keys = [each.key for each in expected if jobs[each.job].constant_prefix == prefix]
                yield lister.listed(prefix, keys).values()

    def _of_outputs(self) -> Iterator[list[Finding]]:
        shard, journal = self._settings.shard, self._journal
        for page in self._output_pages():
            self.seen += len(page)
            is_any = shard.count == 1 or self._has_pages
            journal.see(output for output in page if is_any or shard.owns(KeyParts.slot_of(output.key)))
            yield []
        self.counts[VERIFIED] = journal.verified()
        for unlike in journal.unlike():
            yield [self._wrong(each, unlike[each]) for each in self._not_stored_anew(list(unlike))]

    def _wrong(self, stored: ExpectedOutput, now: StoredOutput | None) -> Finding:
        """What is wrong with an output, in whose place something else lies, or nothing of its own."""
        kind, said = MISSING, "it was stored, and is not there"
        if now:
            kind, said = ALTERED, f"it has {now.size} bytes and the ETag {now.etag}, "
            said += f"and what was stored had {stored.size} and {stored.etag}"
        elif self._settings.keys_from and not stored.left_out:
            stored = stored._replace(left_out=self._left_out(stored.source_key))
        said += f"; its source is left out by now ({stored.left_out})" if stored.left_out else ""
        return Finding(kind, stored.source_key, stored.key, said, stored.job, stored.left_out)

    def _left_out(self, key: str) -> str:
        """Why a run would skip a source: of what is done, an inventory's version is all that was looked at."""
        try:
            source, _ = self._bucket.look_at_source(SourceObject(key))
        except ObjectSkipped as skipped:
            return str(skipped)
        except ObjectFailed as failure:
            return failure.code if failure.code == "source_gone" else ""
        return "" if any(job.wants(source) for job in self._settings.jobs) else NOT_MATCHED

    def _not_stored_anew(self, outputs: Sequence[ExpectedOutput]) -> Iterator[ExpectedOutput]:
        """Those in whose place no run has stored anything else in the meantime."""
        for name in self._settings.by_name:
            of_job = [each for each in outputs if each.job == name]
            stored = self._journal.stored(name, [each.source_key for each in of_job])
            for each in of_job:
                now = stored.get(each.source_key)
                if now is None or each in self._outputs_of(name, each.source_key, now[1], each.left_out):
                    yield each

    def warnings(self) -> dict[str, str]:
        """What a repair leaves as it is."""
        told = dict[str, str]()
        if example := self.examples.get(ALTERED):
            count = pluralize(self.counts[ALTERED], "output")
            told[ALTERED] = f"{count} altered since, for example {printable(example.output_key)}: {FINDINGS[ALTERED]}"
        if self.left_out:
            told["left_out"] = f"{pluralize(self.left_out, 'output')} missing whose sources are left out by now: "
            told["left_out"] += "see --verify -v; they are not made again"
        return told

    def _of_strangers(self) -> Iterator[list[Finding]]:
        jobs = self._settings.by_name.values()
        # Between the sources, nothing tells a stranger from a source.
        places = tuple(job.constant_prefix for job in jobs if not self._settings.puts_among_sources(job))
        is_mixed = self._settings.shard.count > 1 and self._has_pages
        for key, source_key in self._journal.strangers():
            if source_key:
                yield [Finding(ORPHANS, source_key, key, "its source is gone, or left out by now")]
            elif key.startswith(places) and not is_mixed:
                yield [Finding(UNKNOWN, "", key, "nothing of this configuration is to be there")]


########################################################################################################################
# Wire. How this program asks by HTTP without boto3, and how it reads answers.
#   - An interim answer (102, 103) is read over: http.client takes it for the answer, and then each answer for the next.
#   - A connection on which anything was odd is never used again: what comes next on it may be another request's answer.
#   - An answer has a time in which to come in all: a timeout for each read never ends one that comes byte by byte.
#   - No redirect is followed: it would carry the key, or a signature, elsewhere.
########################################################################################################################


class _Arriving(io.RawIOBase):
    """The bytes of one answer as they come. Raises TimeoutError when they take too long, all together.

    The head has the connection's timeout. So has the body, and each byte of it gives back the time for one byte, so
    that a large one may come slowly; time that was not needed is not kept for what drips later.
    """

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self.connection, self._bytes = connection, connection.makefile("rb", buffering=0)
        self._timeout = connection.gettimeout() or WAIT_DEADLINE_SECONDS
        self.is_over = False
        self.give_time(0.0)

    def give_time(self, seconds_per_byte: float) -> None:
        self._deadline, self._seconds_per_byte = time.monotonic() + self._timeout, seconds_per_byte

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.is_over:
            return 0
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer did not end in time")
        self.connection.settimeout(left)
        count = self._bytes.readinto(buffer) or 0
        given_back = self._deadline + count * self._seconds_per_byte
        self._deadline = min(given_back, time.monotonic() + self._timeout)
        return count

    def close(self) -> None:
        self._bytes.close()
        super().close()


class _Reply(http.client.HTTPResponse):
    """An answer as http.client reads it, without what it gets wrong."""

    def __init__(self, sock: socket.socket, *arguments: Any, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        self.fp.close()
        self.arriving, self.has_surplus = _Arriving(sock), False
        self.fp = io.BufferedReader(self.arriving)

    def begin(self, **named: Any) -> None:
        super().begin(**named)
        is_odd = self.status < 200
        while self.status < 200 and self.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
            cast(Any, self).headers = None  # as before the first of them
            super().begin(**named)
        self.will_close |= is_odd
        # One Content-Length is left where the same was said twice, and none that is no number.
        said = ",".join(self.headers.get_all("Content-Length", []))
        lengths = {length.strip() for length in said.split(",")}
        if len(lengths) > 1:
            raise http.client.HTTPException(f"Content-Length is {' and '.join(sorted(lengths))}")
        del self.headers["Content-Length"]
        length = lengths.pop()
        if re.fullmatch("[0-9]{1,18}", length):
            self.headers["Content-Length"] = length
            # http.client has not understood a list.
            self.length = int(length) if self.length is None and not self.chunked else self.length
        self.arriving.give_time(1 / 1_000)  # seconds per byte: what is slower than a modem drips

    def _close_conn(self) -> None:
        # The answer is over. If more has come than that, its connection is not used again.
        self.arriving.is_over = True
        self.has_surplus = bool(self.fp.peek(1))
        if self.has_surplus:
            # TLS within TLS, through a proxy, has no such thing in urllib3.
            with contextlib.suppress(OSError, AttributeError):
                self.arriving.connection.shutdown(socket.SHUT_RDWR)
        super()._close_conn()  # type: ignore[misc]


class _Adapter(HTTPAdapter):
    """Makes connections whose answers are read as _Reply does, and which wait as long to send as to receive."""

    def __init__(self, seconds: float) -> None:
        super().__init__(pool_connections=4, pool_maxsize=1)
        self._seconds = seconds
        self._changed(self.poolmanager)

    def proxy_manager_for(self, proxy: Any, **named: Any) -> Any:
        return self._changed(super().proxy_manager_for(proxy, **named))

    def _changed(self, manager: Any) -> Any:
        def connect(connection: Any) -> None:
            cast(Any, super(type(connection), connection)).connect()
            # urllib3 would send with the timeout for connecting.
            connection.sock.settimeout(self._seconds)

        changes, pools = {"response_class": _Reply, "connect": connect}, {}
        for scheme, pool in manager.pool_classes_by_scheme.items():
            if pool.ConnectionCls.response_class is _Reply:
                return manager  # requests keeps one for each proxy
            # Their names are in messages.
            connection_class = type(pool.ConnectionCls.__name__, (pool.ConnectionCls,), changes)
            pools[scheme] = type(pool.__name__, (pool,), {"ConnectionCls": connection_class})
        manager.pool_classes_by_scheme = pools
        return manager


class Session(requests.Session):
    """Asks the server of `address`, which alone gets the `key`, and others. Each has one connection."""

    def __init__(self, seconds: float, address: str = "", key: str = "") -> None:
        super().__init__()
        self._own, self._key, self._timeout = address, key, (CONNECT_TIMEOUT_SECONDS, seconds)
        self._settings: dict[tuple[str, str], Any] = {}
        self.headers.update({"User-Agent": f"s3_bulk_convert/{__version__}", "Accept-Encoding": "identity"})
        # The API knows its customers by their key; cookies would be kept for each link.
        self.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
        # Without one, requests would take credentials for the host from ~/.netrc.
        self.auth = self._authorize
        for scheme in ("https://", "http://"):
            self.mount(scheme, _Adapter(seconds))

    @staticmethod
    def _server_of(address: str) -> tuple[str, str]:
        parts = urllib.parse.urlsplit(address)
        return parts.scheme, parts.netloc.lower()

    def is_own(self, address: str) -> bool:
        """Whether an address is of the server that gets the key."""
        return self._server_of(address) == self._server_of(self._own)

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key and self.is_own(str(request.url)):
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def merge_environment_settings(self, url: Any, *given: Any) -> Any:
        """What the environment says of proxies and certificates, asked once for each server, and not each request."""
        server = self._server_of(url)
        if server not in self._settings:
            self._settings[server] = super().merge_environment_settings(url, *given)
        return self._settings[server]

    def ask(self, method: str, address: str, **named: Any) -> requests.Response:
        """The answer to one request, its body unread."""
        return self.request(method, address, stream=True, allow_redirects=False, timeout=self._timeout, **named)

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Nowhere. requests would rewind the body even for a redirect that it is told not to follow."""
        return None


@contextlib.contextmanager
def http_get(address: str, key: str = "", **request: Any) -> Iterator[requests.Response]:
    """The answer to a single GET, unread. Raises RunError with the host alone: an address may be signed.

    `verify`: a file of certificates to trust instead of what REQUESTS_CA_BUNDLE names.
    """
    try:
        with Session(LOOK_SECONDS, address, key) as session, session.ask("GET", address, **request) as answer:
            yield answer
    except (OSError, *NO_ADDRESS) as error:
        host, proxy = Trouble.host_of(address), Trouble.proxy_for(address)
        why = Trouble.certificate_problem(error) or Trouble.connection_problem(error)
        if proxy:
            raise usage_error(f"{host} cannot be reached through the proxy {proxy}: {why}", PROXY_HINT) from None
        hint = "check its address (api.url, or s3.endpoint_url and s3.region) and the network; "
        hint += "for a private CA, set REQUESTS_CA_BUNDLE (AWS_CA_BUNDLE for S3)"
        raise usage_error(f"{host} cannot be reached: {why}", hint) from None


def json_body(answer: requests.Response) -> dict[str, Any]:
    """The JSON object that an answer begins with; empty if there is none, or it cannot be read."""
    try:
        return ApiReply.parse(answer.raw.read(ERROR_BODY_BYTES, decode_content=True))
    except NETWORK_ERRORS:
        return {}


########################################################################################################################
# Rate. When a request may be sent, and what is known of the API.
#   - No request reaches the API without a slot (I4): conversions, retries and polls alike. A 429 pauses all workers.
#   - The rate is the smaller of what the user allows and what the API says; unknown, there is none until a 429 lets it
#     be guessed. A guess grows until the next 429: others' requests may have been to blame for the last.
#   - Slots are evenly spaced: a burst at the start of a minute would end in 429s at its end.
########################################################################################################################


class RateLimiter:
    """Spreads requests evenly over time. Safe to use from several threads.

    `parts`: shards and processes that share the limit, each of which has a limiter of its own.
    """

    SHARE_OF_LIMIT = 0.99  # of the API's rate limit; the rest is for the unevenness of networks at a window's border
    SECONDS_TO_RECOVER_HALF = 60.0  # of what a 429 has taken off the rate
    SECONDS_TO_DOUBLE_GUESS = 300.0  # of a limit that nobody says; the next 429 takes a quarter off it
    MIN_LIMIT = 10  # requests per minute, of the API's plans; no guess is lower
    MAX_EXCESS = 7.0  # an eighth of the rate is as slow as 429s make it

    def __init__(self, requests_per_minute: int | None, parts: int = 1) -> None:
        self._cap, self._parts = requests_per_minute, parts
        self._lock = threading.RLock()
        self._interval = 60 * parts / requests_per_minute if requests_per_minute else 0.0  # seconds; 0: unknown
        # What a 429 has added to it, in seconds, and since when time takes it back.
        self._extra, self._slowed_at = 0.0, 0.0
        self._next = 0.0
        self.paused_until = 0.0  # monotonic seconds, which all processes of a machine share
        self._is_first = True
        self.has_answer = False  # the API has said what it allows, or has failed to
        # While the limit is unknown: when slots were taken, so that a 429 says how many were too many.
        self._taken: deque[float] = deque(maxlen=10_000)
        self.requests = 0  # slots that were taken, each for one request

    def acquire(self, stop: StopFlag, patience: float = 0.0) -> None:
        """Wait for the next slot and take it. Raises StopRequested when the run is to end; `patience`: as in `sleep`.

        Where the user sets no rate, the second slot comes after the first answer, which says what the API allows.
        """
        with self._lock:
            is_first, self._is_first = self._is_first, False
        if not is_first and self._cap is None:
            deadline = time.monotonic() + 5  # seconds for the first answer, which says what the API's limit is
            while not self.has_answer and time.monotonic() < deadline:
                stop.sleep(0.02)
            # An API that takes its time has no say in when the others start.
            self.has_answer = True
        while True:
            with self._lock:
                now = time.monotonic()
                slot = max(self._next, now)
                if not self._interval:
                    self._taken.append(slot)
                self._next = slot + self._interval + self._extra_at(now)
            stop.sleep(slot - now, patience)
            # A 429 that came meanwhile is for this one, too; after it, slots are as evenly spaced as before.
            if self.paused_until <= time.monotonic():
                break
        with self._lock:
            self.requests += 1

    def update_limit(self, headers: Mapping[str, str], now: float) -> None:
        """Take the limit per minute from an answer's headers; those of a replay may be a day old and do not count."""
        limit, reset = ApiReply.number(headers, "X-RateLimit-Limit"), ApiReply.number(headers, "X-RateLimit-Reset")
        self.has_answer = True
        if not limit or reset is None or reset < now:
            return
        interval = 60 * self._parts / (min(limit, self._cap or limit) * self.SHARE_OF_LIMIT)
        with self._lock:
            if interval != self._interval:
                self._interval, self._extra = interval, 0.0
                # The slot before the first answer counts as well: of many shards, each has one.
                self._next = max(self._next, (self._taken or [0.0])[-1] + interval)

    def pause(self, seconds: float) -> None:
        """Let nobody send for a while, and slow down: the limit is the key's, and one 429 is for all workers."""
        with self._lock:
            now = time.monotonic()
            # Many workers meet one and the same limit: only the first 429 slows the rate down.
            if now >= self.paused_until:
                extra = self._extra_at(now)
                if self._interval:
                    self._extra = min(extra * 1.25 + self._interval / 10, self._interval * self.MAX_EXCESS)
                else:
                    # As many as there were within a minute were too many; the next time, the guess has become so.
                    recent = sum(taken > now - 60 for taken in self._taken)
                    slowest = 1.1 * 60 * self._parts / self.MIN_LIMIT
                    self._extra = min(extra * 1.375 or 1.1 * 60 / max(recent, 1), slowest)
                self._slowed_at = now + seconds
            self.pause_until(now + seconds)
        self.has_answer = True

    def pause_until(self, until: float) -> None:
        """Let nobody send before a time in monotonic seconds: here or in another process, a 429 has come."""
        with self._lock:
            self.paused_until = max(self.paused_until, until)
            self._next = max(self._next, self.paused_until)

    def _extra_at(self, now: float) -> float:
        half_life = self.SECONDS_TO_RECOVER_HALF if self._interval else self.SECONDS_TO_DOUBLE_GUESS
        return self._extra * math.pow(0.5, max(0.0, now - self._slowed_at) / half_life)


@dataclass(frozen=True)
class Usage:
    """What `/v1/usage` says; None for whatever it does not say. Its fields are documented nowhere."""

    plan: str | None = None
    monthly_limit: int | None = None  # conversions
    remaining: int | None = None  # conversions, this month
    requests_per_minute: int | None = None
    bills_overage: bool | None = None

    @classmethod
    def ask(cls, api: ApiOptions) -> "Usage":
        """What the API says of the plan and the month. Raises RunError for a refusal, and for silence."""
        with http_get(f"{api.url}/v1/usage", key=api.key) as answer:
            status, body = answer.status_code, json_body(answer)
            limit = ApiReply.number(answer.headers, "X-RateLimit-Limit")
        code, message = ApiReply.error(body)
        if ErrorAction.choose(CONVERSION_RULES, status, code) is ErrorAction.STOP_RUN or status == 403:
            raise Trouble.refusal_by_api(status, code, message, api.url)
        # No retry: the question is how it is now. An API that has no such page says nothing of the key.
        if status >= 500 or status == 429 or 300 <= status < 400:
            raise usage_error(
                f"the API answered {status} {printable(code)}".rstrip(), "check api.url, or try it again later"
            )
        usage = cls.read(body)
        return replace(usage, requests_per_minute=usage.requests_per_minute or limit)

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> "Usage":
        """What is known of the plan and the month, whatever the fields are called and however deep they lie."""
        values = dict(cls._flattened(body))
        # What is no number of conversions, though it may be called a limit.
        others = r"size|bytes|[kmg]b\b|storage|second|minute|hour|day|daily|rpm|concurren|rate|request"
        others += r"|overage|price|cost|file"
        month = {name: value for name, value in values.items() if not re.search(others, name)}
        limit = cls._first_number(month, r"(limit|quota|included|allowance|per_month|(limits|max)_conversions)$")
        remaining = cls._first_number(month, r"(remaining|left|available)$")
        used = cls._first_number(month, r"(used|usage|count|this_month|^(data_|usage_)*conversions)$")
        if remaining is None and limit is not None and used is not None:
            remaining = max(0, limit - used)
        # A price or a prefix of another field may be called so too: only texts are names, only booleans are answers.
        is_plan = re.compile(r"(^|_)plan(_name|_id|_slug)?$").search
        plans = (value for name, value in values.items() if is_plan(name) and isinstance(value, str))
        billed = (value for name, value in values.items() if "overage" in name and isinstance(value, bool))
        per_minute = cls._first_number(values, r"(per_minute|rpm|rate_?limit(_limit)?)$")
        return cls(next(plans, None), limit, remaining, per_minute, next(billed, None))

    @staticmethod
    def _flattened(body: Any, path: str = "") -> Iterator[tuple[str, Any]]:
        """The values in nested JSON objects, under the names on the way, joined by `_`; those on top first."""
        for name, value in sorted(body.items(), key=lambda pair: isinstance(pair[1], dict)):
            # camelCase is one of the spellings.
            spelt = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name)).lower().replace("-", "_")
            joined = f"{path}_{spelt}".strip("_")
            yield from Usage._flattened(value, joined) if isinstance(value, dict) else [(joined, value)]

    @staticmethod
    def _first_number(values: Mapping[str, Any], pattern: str) -> int | None:
        """The first whole number of 0 or more under a name that ends so; one about conversions comes first."""
        named = sorted((name for name in values if re.search(pattern, name)), key=lambda name: "convers" not in name)
        numbers = (int(values[name]) for name in named if re.fullmatch(r"\d{1,15}", str(values[name])))
        return next(numbers, None)


########################################################################################################################
# Bodies. What is sent to the API, and what comes back.
#   - Both are streamed: what is large waits in a temporary file, never in memory.
#   - Only whole, judged files leave this room (I6).
########################################################################################################################


class MultipartBody:
    """The multipart body of a request: form fields that are not empty, then the file, streamed and counted.

    The boundary is derived from the idempotency key, so that a request that is sent again is the same to the byte.
    """

    def __init__(self, key: str, fields: Mapping[str, str], filename: str, file: tuple[IO[bytes], int] | None) -> None:
        parts: dict[str, Any] = {name: value for name, value in fields.items() if value}
        if file:
            # The API goes by the file's name; the usual type is another on a machine with other tables.
            parts["file"] = (filename, b"", "application/octet-stream")
        boundary = "s3bc-" + key.replace(":", "-")
        form, self.content_type = encode_multipart_formdata(parts, boundary)
        # The file is the last part and stands here with no bytes: they go before the closing boundary.
        end = len(form) - len(f"\r\n--{boundary}--\r\n")
        self._start, self._end = form[:end], form[end:]
        self._file, self._size = file or (io.BytesIO(), 0)

    def __len__(self) -> int:
        return len(self._start) + self._size + len(self._end)

    def __iter__(self) -> Iterator[bytes]:
        """The bytes. Raises ConnectionError if the file has fewer or more of them than were announced."""
        yield self._start
        left = self._size
        try:
            # Each piece has the time of one send: a slow line must be able to take it in that.
            while piece := self._file.read(CHUNK_BYTES // 16):
                left -= len(piece)
                if left < 0:
                    break
                yield piece
        except BotoCoreError as error:
            raise ConnectionError(f"reading the source broke off: {type(error).__name__}") from None
        if left:
            raise ConnectionError("the source has another length than S3 has announced")
        yield self._end

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


class _ArchiveBody:
    """The body of an archive for `zipfile`, which reads a table of contents as a whole, however long it says it is."""

    def __init__(self, body: IO[bytes]) -> None:
        self._body = body

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)

    def read(self, size: int = -1) -> bytes:
        """Some bytes. Raises BadZipFile if they are too many for memory."""
        if size > CONTENTS_BYTES:
            raise zipfile.BadZipFile("its table of contents is too long")
        return self._body.read(size)


@contextlib.contextmanager
def opened_archive(body: IO[bytes]) -> Iterator[zipfile.ZipFile]:
    """An archive of pages; what goes wrong with it is raised as InvalidResponse. It leaves the body at its start."""
    said = "the archive of pages cannot be unpacked"
    try:
        with zipfile.ZipFile(cast(IO[bytes], _ArchiveBody(body))) as archive:
            yield archive
    except RuntimeError as error:
        # Encrypted, or beyond what zipfile or this program can do: the API would send the same again.
        raise InvalidResponse("bad_pages", f"{said}: {error}", permanent=True) from None
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OverflowError, OSError) as error:
        raise InvalidResponse("bad_pages", f"{said}: {error}") from None
    finally:
        body.seek(0)


@dataclass
class ConvertedFile:
    """A whole, judged answer of the API, ready to be stored. `body` is positioned at its start."""

    body: IO[bytes]
    size: int  # bytes
    type: FileType
    pages: int = 0  # of an archive that is to be unpacked
    page_bytes: int = 0  # in all of them

    @classmethod
    def receive(
        cls, answer: requests.Response, target: str, deadline: float, *, is_unpacked: bool = False
    ) -> "ConvertedFile":
        """The whole body of a 200, judged; with `is_unpacked`, an archive's pages as well. Raises InvalidResponse."""
        length = answer.headers.get("Content-Length", "")
        # A larger one goes through a temporary file; and what is compressed, because nobody knows how large that is.
        is_small = length.isdigit() and int(length) <= 1 << 20 and not answer.headers.get("Content-Encoding")
        with contextlib.ExitStack() as on_failure:
            body: IO[bytes] = on_failure.enter_context(io.BytesIO() if is_small else temporary_file())
            size = 0
            for piece in cls._pieces(answer, deadline):
                with no_space_stops_the_run():
                    size += body.write(piece)
            # `tell` counts the bytes on the wire, which differ where the body is compressed.
            if size == 0 or (length.isdigit() and answer.raw.tell() != int(length)):
                raise InvalidResponse("cut_answer", f"the answer has {size} bytes, and should have {length or 'some'}")
            body.seek(max(0, size - 64))
            tail = body.read()
            body.seek(0)
            head = body.read(ERROR_BODY_BYTES)
            body.seek(0)
            # Where neither length nor chunks say where the body ends, or more has come than they say, a cut one looks
            # like a whole one.
            is_told = length.isdigit() or answer.headers.get("Transfer-Encoding", "").lower() == "chunked"
            is_told &= not cast(_Reply, answer.raw._original_response).has_surplus
            kinds = (FileType.canonical(target), "zip")
            if not (is_told or any(FileType.is_whole_file(kind, size, head, tail) for kind in kinds)):
                raise InvalidResponse("no_length", "the answer does not say where it ends")
            disposition = answer.headers.get("Content-Disposition", "")
            found = FileType.identify(target, answer.headers.get("Content-Type", ""), disposition, head)
            file = cls(body, size, found)
            if is_unpacked and found.suffix:
                for page in file.unpacked(target):
                    file.pages, file.page_bytes = file.pages + 1, file.page_bytes + page.size
            on_failure.pop_all()
        return file

    def unpacked(self, target: str) -> Iterator["ConvertedFile"]:
        """The pages of an archive in its order, each judged, and there until the next. Raises InvalidResponse.

        Nothing that the archive says is believed: no name, no size, no number of pages.
        """
        left = UNPACKED_BYTES
        with opened_archive(self.body) as archive:
            entries = [entry for entry in archive.infolist() if not entry.filename.endswith("/")]
            if not 0 < len(entries) <= MAX_PAGES:
                raise NotImplementedError(f"it has {len(entries)} pages, and not 1 to {MAX_PAGES}")
            for number, entry in enumerate(entries, 1):
                # Of what others unpack, nobody knows how much is in memory at once.
                if entry.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                    raise NotImplementedError(f"page {number} is packed by method {entry.compress_type}")
                with archive.open(entry) as packed, temporary_file() as body:
                    page = self._page(number, packed, body, target, left)
                    left -= page.size
                    yield page

    @classmethod
    def _page(cls, number: int, packed: IO[bytes], body: IO[bytes], target: str, left: int) -> "ConvertedFile":
        """One page, unpacked into `body`. Raises NotImplementedError if it is none, or too large."""
        size = 0
        with no_space_stops_the_run():
            while size <= left and (piece := packed.read(CHUNK_BYTES)):
                size += body.write(piece)
            body.seek(0)
        if size > left:
            raise NotImplementedError(f"its pages have more than {human_bytes(UNPACKED_BYTES)}")
        head = body.read(ERROR_BODY_BYTES)
        body.seek(0)
        try:
            found = FileType.identify(target, "", "", head)
        except InvalidResponse:
            found = None
        if not size or found is None or found.suffix:
            raise NotImplementedError(f"page {number} is no {target} file")
        return cls(body, size, found)

    @staticmethod
    def _pieces(answer: requests.Response, deadline: float) -> Iterator[bytes]:
        """A body as it comes, without the packing that nobody asked for. Raises InvalidResponse."""
        coding = answer.headers.get("Content-Encoding", "").strip().lower()
        is_packed = coding in {"gzip", "x-gzip", "deflate"}  # those that can be told by how they begin
        if not (is_packed or coding in {"", "identity"}):
            raise InvalidResponse("packed_answer", f"the answer is packed as {coding}, which nobody asked for")

        def arriving() -> Iterator[bytes]:
            while piece := answer.raw.read(PACKED_BYTES if is_packed else CHUNK_BYTES, decode_content=False):
                yield piece
                if time.monotonic() > deadline:
                    raise InvalidResponse("slow_answer", "the answer did not end in time")

        try:
            yield from inflate(arriving()) if is_packed else arriving()
        except (EOFError, zlib.error) as error:
            raise InvalidResponse("cut_answer", f"the answer cannot be unpacked: {error}") from None
        except urllib3.exceptions.ReadTimeoutError:
            raise InvalidResponse("slow_answer", "the answer did not end in time") from None
        except NETWORK_ERRORS as error:
            raise InvalidResponse("cut_answer", f"the answer broke off: {type(error).__name__}") from None


########################################################################################################################
# API client. One conversation for each object, one Session for each worker, one retry policy. The API key goes to the
# API's own address only.
#   - `_next_request` and `_write_down` are the only places where a body or a key changes (I5). No key is drawn by
#     chance: `:u` for bytes in place of a URL, `:2` for a key that was taken, `:j` for a job; a run after a crash comes
#     to the same ones.
#   - What must be kept, what is permanent and what may be charged twice is derived from the states of the requests.
########################################################################################################################


class RequestState(Enum):
    """How far one request of a conversation has come."""

    UNSENT = "no byte of it has left this machine"
    PUT_OFF = "turned away unread (429, a proxy's page), or forgotten: the API may remember its body, and has no result"
    UNKNOWN = "sent; the API may have done it"
    REJECTED = "the API's own word on the object: nothing was made, and nothing is stored"
    KEY_TAKEN = "the key belongs to another body: some earlier request may have been charged"
    ANSWERED = "its whole result is here"


@dataclass
class ApiRequest:
    """One request for a conversion, the same in every byte each time it is sent."""

    row: PendingRequest  # as the journal is to have it; `first_sent` is 0 until it has it
    state: RequestState = RequestState.UNSENT
    is_resumed: bool = False  # an earlier run has sent it
    is_paid: bool = False  # what the API remembers of it is among the payments
    results: int = 0  # that came in this run, and had not come before
    is_old_job: bool = False  # the job that it was answered with had failed before it was sent

    def change(self, **columns: Any) -> None:
        """Change what the journal is to have."""
        self.row = self.row._replace(**columns)

    def mark_paid(self) -> None:
        """Note that its result came; replays of that result cost nothing."""
        self.results += not self.is_paid
        self.change(payments=self.row.payments + (not self.is_paid))
        self.is_paid = True

    @property
    def may_be_charged(self) -> bool:
        """Whether the API may have done some work for it in this run; a job that has failed is work."""
        if self.is_resumed or self.is_old_job:
            return False  # an earlier run has counted it
        is_failed_job = self.state is RequestState.REJECTED and bool(self.row.job_id)
        return is_failed_job or self.state in {RequestState.UNKNOWN, RequestState.ANSWERED}

    @property
    def is_forgotten(self) -> bool:
        """Whether the API has no memory of it any more, so that it would be paid for anew."""
        return bool(self.row.first_sent) and time.time() - self.row.first_sent > IDEMPOTENCY_WINDOW_SECONDS

    def following(self, suffix: str = ":2", **columns: Any) -> "ApiRequest":
        """Another request for the same conversion, under the next key. It is doubtful if this one may be charged."""
        key = self.row.idempotency_key
        base, _, number = key.rpartition(":")
        is_numbered = suffix == ":2" and base and number.isdigit()
        key = f"{base}:{int(number) + 1}" if is_numbered else key + suffix
        is_doubtful = self.row.is_doubtful or self.state in {RequestState.UNKNOWN, RequestState.KEY_TAKEN}
        fresh = PendingRequest(self.row.version, key, self.row.path, self.row.url, 0.0, is_doubtful=int(is_doubtful))
        return ApiRequest(fresh._replace(**columns))


class RetryPolicy(Retry):
    """How many transient failures an exchange may have, and how long it waits before the next attempt.

    429, 409 and a connection that cannot be made cost no attempt, but the exchange's deadline holds for them.
    """

    attempt, wait_seconds = 0, 0.0

    def after(self, again: TryAgain, deadline: float) -> "RetryPolicy":
        """The policy for the next attempt. Raises the failure if there is none before the deadline (monotonic)."""
        left = cast(int, self.total) - (not again.is_free)
        seconds = min(backoff(self.attempt, again.asked, random.random()), again.cap)
        if left < 0 or time.monotonic() + seconds > deadline:
            raise again
        following = self.new(total=left)
        following.attempt, following.wait_seconds = self.attempt + 1, seconds
        return following


@dataclass(frozen=True)
class HttpCall:
    """One HTTP request of whatever kind, and what its error replies mean."""

    address: str
    rules: Mapping[str, ErrorAction]
    deadline: float  # monotonic seconds
    open_body: Callable[[], MultipartBody] | None = None  # None: a question after a request that was sent before


class Conversation:
    """All that is said with the API about one object. It says afterwards what has become of each request."""

    def __init__(self, context: "WorkerContext", session: Session, task: Task) -> None:
        self._context, self._session, self._stop, self._api = context, session, context.stop, context.settings.api
        self.task = task  # with its source as it was seen last
        self.requests: list[ApiRequest] = []  # the last one is current
        if task.pending:
            known = ApiRequest(task.pending, RequestState.UNKNOWN, is_resumed=True, is_paid=task.pending.payments > 0)
            self.requests.append(known)
        self._started = time.monotonic()
        self._exchanges = 0  # HTTP requests of every kind: conversions, polls, downloads
        self._throttled = 0
        self._remaining: int | None = None
        self._is_replay = False  # the answer was made for a request of an earlier attempt
        self._timeouts = 0  # 504s: the conversion takes longer than the API's synchronous call may
        self._failed_jobs = 0  # that may not fail again
        self._is_url_checked = False  # a refused URL was sent once more, because S3 serves it
        self._page_bytes = 0  # of the answer, if it is an archive that is to be unpacked
        is_unpacked = context.settings.by_name[task.job].pages == "unpack"
        self._receive_file = partial(ConvertedFile.receive, target=task.target, is_unpacked=is_unpacked)
        # Unix seconds; when the current request was first sent in this run. From then on it counts against the cap.
        self._asked_at = 0.0

    @property
    def current(self) -> ApiRequest:
        """The request in hand."""
        return self.requests[-1]

    @property
    def is_open(self) -> bool:
        """Whether the API may have done some of it, and this program does not have the answer."""
        return any(request.state is RequestState.UNKNOWN for request in self.requests)

    def outcome(
        self, kind: OutcomeKind, why: ObjectFailed | None = None, output: StoredOutput | None = None
    ) -> Outcome:
        """How it has ended, without secrets, and with the request that must be kept, if there is one."""
        why, hide = why or ObjectFailed("", ""), self._context.settings.hide
        is_untagged = why.code in {TAG_FAILED, TOO_MANY_TAGS}
        is_stored = is_untagged or kind.value in DONE_EVENTS
        is_settled = is_stored or (why.permanent and why.code not in {"not_stored", "bad_pages", "too_large"})
        # The API may have the result or, after 429, may remember the body.
        kept = ({RequestState.ANSWERED, RequestState.UNKNOWN}, {RequestState.PUT_OFF})
        sent = [request for request in reversed(self.requests) if request.row.first_sent and not is_settled]
        pending = [request.row for states in kept for request in sent if request.state in states]
        # A request before the last may be charged as well. That counts once it is stored, or given up as paid twice.
        last = self.requests[-1] if self.requests else None
        is_over = last and (is_stored or (last.state is RequestState.REJECTED and last.row.payments >= MAX_PAYMENTS))
        return Outcome(
            self.task,
            kind,
            hide(why.code)[:MESSAGE_CHARACTERS],
            hide(why.message)[:MESSAGE_CHARACTERS],
            why.status,
            why.permanent,
            pending=next(iter(pending), None),
            output=output,
            is_untagged=is_untagged,
            page_bytes=self._page_bytes,
            seconds=time.monotonic() - self._started,
            requests=self._exchanges,
            throttled=self._throttled,
            is_replay=self._is_replay and kind is OutcomeKind.CONVERTED,
            paid=sum(request.results for request in self.requests),
            possible_double_charge=bool(last and is_over and last.row.is_doubtful),
            remaining=self._remaining,
        )

    # -- which request -------------------------------------------------------------------------------------------------

    def convert(self, head: Head) -> ConvertedFile:
        """Have the object converted, as a look has shown it. Raises ObjectFailed, RunError or StopRequested."""
        first, pair = self._first_request(), (KeyParts.of(self.task.source.key).ext.lower(), self.task.target)
        # What an earlier run has sent of another version can never be asked for again. Of the same bytes, put anew, it
        # can, if they were sent: by URL, nobody knows what the API has read in between, and both may be charged.
        if self.requests and self.requests[0].row.idempotency_key.partition(":")[0] != first.row.idempotency_key:
            row = self.requests[0].row
            is_same = row.version == self.task.source.version
            if row.url or not is_same:
                first.change(is_doubtful=int(is_same))
                self.requests.clear()
        unsupported = self._context.unsupported
        if pair in unsupported and not self.requests:
            raise ObjectFailed("unsupported_route", unsupported[pair], permanent=True, status=422)
        self.requests = self.requests or [first]
        while True:
            request = self.current
            try:
                file = self._answer(head)
                request.state = RequestState.ANSWERED
                request.mark_paid()
                self._page_bytes = file.page_bytes
                return file
            except ObjectFailed as failure:
                # Some 200s are not the API's, and nobody has paid for them.
                if failure.status == 200 and failure.code not in {"html_answer", "json_answer", "text_answer"}:
                    request.mark_paid()
                    request.state = RequestState.ANSWERED if failure.permanent else request.state
                # Without an extension, the API has gone by the bytes.
                if failure.code == "unsupported_route" and failure.permanent and pair[0]:
                    unsupported[pair] = failure.message
                following = self._next_request(failure)
                if following is None:
                    # While another request may have been done, a word on this one settles this one alone.
                    failure.permanent &= not self.is_open
                    raise
            if following is not request:
                self.requests.append(following)

    def _first_request(self) -> ApiRequest:
        task, context, above = self.task, self._context, self._api.jobs_above
        path = JOBS_PATH if above is not None and task.source.size > above else CONVERT_PATH
        place = context.settings.by_name[task.job].place
        key = idempotency_key(context.bucket.endpoint, context.bucket.name, task, place)
        by_url = self._api.transfer != "upload" and not KeyParts.of(task.source.key).has_dot_segments
        # Once a URL was taken, refusals are about their object.
        by_url &= context.takes_urls or context.urls_refused < 3
        url = context.bucket.presign(task.source.key) if by_url else ""
        return ApiRequest(PendingRequest(task.source.version, key, path, url, first_sent=0.0))

    def _next_request(self, failure: ObjectFailed) -> ApiRequest | None:
        """The request that may still bring a result after a failure of the current one; None if there is none."""
        current = self.current
        if current.state is RequestState.KEY_TAKEN:
            if sum(request.state is RequestState.KEY_TAKEN for request in self.requests) <= 2:
                return current.following()
            # Whatever key it comes with, the API says the same: it is about the object, and nothing was charged.
            failure.permanent, current.state = True, RequestState.REJECTED
            current.change(is_doubtful=self.requests[0].row.is_doubtful)
        # Only the API's word on it lets another body be sent: after anything else, both might be paid for.
        is_rejected = current.state is RequestState.REJECTED and failure.permanent and not self.is_open
        has_other_cause = failure.code in {"unsupported_route", "file_too_large", "not_stored"}
        is_about_url = current.row.url and is_rejected and not has_other_cause
        has_failed_job = current.state is RequestState.REJECTED and current.row.job_id
        following = None
        if failure.code == JOB_LOST and current.is_forgotten:
            current.change(job_id="")
            following = current
        elif failure.code == JOB_LOST:
            # Under its own key the API would tell of the same job. A second one that is lost as well is not replaced.
            following = None if current.row.is_doubtful else current.following()
        elif has_failed_job and self._is_worth_another_job(failure):
            following = current.following()
        elif self._is_too_slow(failure.status):
            following = current.following(":j", path=JOBS_PATH)
        elif is_about_url and self._api.transfer != "url":
            following = current.following(":u", url="")
        elif is_about_url and (self._is_url_checked or has_failed_job):
            # The URL of an earlier run may have died with its credentials: the next run signs another one.
            failure.permanent &= not self.requests[0].is_resumed
        elif is_about_url:
            # Once more, now that S3 is seen to serve the object: S3 may have been away in between.
            self._is_url_checked, following = True, current
            self._context.bucket.look_at_source(self.task.source)
        return following

    def _is_too_slow(self, status: int) -> bool:
        """Whether the API's call has ended too early, again, and the object may be converted by a job."""
        may_be_job = self.current.row.path == CONVERT_PATH and self._api.jobs_above is not None
        return status == 504 and may_be_job and self._timeouts >= 2  # the first may be a gateway's

    def _is_worth_another_job(self, failure: ObjectFailed) -> bool:
        """Whether a job failed that another one may not fail as; waits before that one, and uses up an attempt."""
        if self.current.is_old_job:
            # The answer to an earlier run's request; what is permanent is tried once more if the user wants that.
            return self._context.settings.retry_failed or not failure.permanent
        self._failed_jobs += 1
        if failure.permanent or self._failed_jobs > self._api.retries:
            return False
        self._stop.sleep(backoff(self._failed_jobs - 1, None, random.random()))
        return True

    # -- sending it ----------------------------------------------------------------------------------------------------

    def _answer(self, head: Head) -> ConvertedFile:
        request, task = self.current, self.task
        if request.row.job_id and request.state is RequestState.UNKNOWN:
            self._is_replay = True
            return self._finish_job()
        self._write_down()
        name, url, quality = KeyParts.of(task.source.key), request.row.url, str(task.quality or "")
        fields = {"target": task.target, "source": name.ext.lower(), "quality": quality, "file_url": url}

        def open_body() -> MultipartBody:
            file = None if url else self._context.bucket.open_upload(task.source, head)
            return MultipartBody(request.row.idempotency_key, fields, name.upload_filename, file)

        deadline = time.monotonic() + WAIT_DEADLINE_SECONDS
        call = HttpCall(self._api.url + request.row.path, CONVERSION_RULES, deadline, open_body)
        file = self._exchange(call, self._receive) or self._finish_job()
        context = self._context
        context.takes_urls |= bool(url)
        # A URL of an earlier run may have died with its credentials: that says nothing of the next one.
        was_refused = any(other.row.url and not other.is_resumed for other in self.requests[-2:-1])
        context.urls_refused += was_refused and not url
        return file

    def _write_down(self) -> None:
        """Make the current request durable before it is sent (I1), and count it against the cap."""
        request, ledger, is_forgotten = self.current, self._context.ledger, self.current.is_forgotten
        if is_forgotten and request.row.payments >= MAX_PAYMENTS:
            request.state = RequestState.REJECTED
            message = f"its result was paid for {request.row.payments} times and could not be stored"
            raise ObjectFailed("not_stored", message, permanent=True)
        # One that follows is another conversion, unless the API has said of the one before that it made nothing.
        is_another = not request.row.first_sent and any(before.may_be_charged for before in self.requests[-2:-1])
        if is_another or not (self._asked_at or self.task.pending):
            ledger.reserve(self.task)
        if is_forgotten:
            # The URL has died with the key.
            url = request.row.url and self._context.bucket.presign(self.task.source.key)
            request.change(url=url, is_doubtful=1)
            request.is_paid, request.state = False, RequestState.PUT_OFF
        if is_forgotten or not request.row.first_sent:
            request.change(first_sent=time.time())
            ledger.mark_sent(self.task, request.row)
        self._asked_at = time.time()

    def _exchange(self, call: HttpCall, receive: Callable[[requests.Response], T]) -> T:
        """What `receive` makes of the first good answer. Raises ObjectFailed when there will be none."""
        policy = RetryPolicy(self._api.retries)
        while True:
            try:
                with contextlib.closing(self._send(call)) as answer:
                    return receive(answer)
            except NETWORK_ERRORS as error:
                again = self._broken(call, error, policy)
            except TryAgain as failure:
                if failure.permanent:
                    raise  # the API repeats its answers, so that asking again brings the same
                again = failure
            policy = policy.after(again, call.deadline)
            if again.status == 429 and self._session.is_own(call.address):
                self._context.limiter.pause(policy.wait_seconds)
            self._stop.sleep(policy.wait_seconds, self._patience(call))

    def _patience(self, call: HttpCall) -> float:
        """How long after the run was asked to end a call is made, in seconds: what is paid is waited for."""
        return 0.0 if call.open_body else self._api.timeout

    def _send(self, call: HttpCall) -> requests.Response:
        """A good answer, unread. Raises TryAgain or ObjectFailed for an error reply, RunError, NETWORK_ERRORS."""
        is_own = self._session.is_own(call.address)
        if is_own:
            self._context.limiter.acquire(self._stop, self._patience(call))
        self._exchanges += 1
        if call.open_body:
            with contextlib.closing(call.open_body()) as body:
                answer = self._send_current(call.address, body)
        else:
            answer = self._session.ask("GET", call.address)
        if is_own:
            self._context.outage.mark_answered()
            self._context.limiter.update_limit(answer.headers, time.time())
        # A 202 is no file.
        if answer.status_code not in ({200} if call.rules is DOWNLOAD_RULES else {200, 202}):
            with contextlib.closing(answer):
                raise self._refusal(call, answer)
        return answer

    def _send_current(self, address: str, body: MultipartBody) -> requests.Response:
        """The answer to the current request, which has told all workers what concerns them. Raises NETWORK_ERRORS."""
        request = self.current
        headers = {"Content-Type": body.content_type, "Idempotency-Key": request.row.idempotency_key}
        before, self._is_replay = request.state, request.state is RequestState.UNKNOWN
        # From here on bytes may leave: whatever happens, only what is sure puts the state back.
        request.state = RequestState.UNKNOWN
        try:
            answer = self._session.ask("POST", address, data=body, headers=headers)
        except NETWORK_ERRORS as error:
            request.state = before if Trouble.failed_to_connect(error) else request.state
            raise
        if answer.status_code not in {200, 202}:
            request.state = before  # what the reply means for the request, `_refusal` says
        remaining = ApiReply.remaining(answer.headers)
        # A replay has the headers of the first answer, which may be a day old.
        is_stale = self._is_replay and ApiReply.is_older(answer.headers, self._asked_at)
        if answer.status_code in {200, 202} and remaining is not None and not is_stale:
            self._remaining, keep = remaining, self._api.keep_remaining
            if remaining <= keep:
                # Here, and not where outcomes are recorded: by then this worker would have sent the next one.
                self._stop.request(Trouble.little_remains(remaining, keep))
        return answer

    def _refusal(self, call: HttpCall, answer: requests.Response) -> Exception:
        """The end of the exchange, or of an attempt, that an error reply is."""
        status, is_own = answer.status_code, self._session.is_own(call.address)
        code, message = ApiReply.error(json_body(answer))
        action = ErrorAction.choose(call.rules, status, code)
        if status == 407 and not Trouble.proxy_for(self._api.url):
            action = ErrorAction.FAIL  # where no proxy is named, it is no proxy's word on all requests
        if action is ErrorAction.STOP_RUN:
            return Trouble.refusal_by_api(status, code, message, self._api.url)
        self._throttled += status == 429 and is_own
        permanent = action in {ErrorAction.REJECT, ErrorAction.NEW_KEY}
        is_last = permanent or action is ErrorAction.FAIL
        if call.open_body:
            self._timeouts += status == 504
            # After 5xx or 409 the conversion may still complete. A 429 is rejected before the key lookup and proves
            # nothing; nor does a refusal in which the API says no word on this object.
            is_unknown = status == 409 or self.current.state is RequestState.UNKNOWN
            states = {
                ErrorAction.REJECT: RequestState.REJECTED,
                ErrorAction.NEW_KEY: RequestState.KEY_TAKEN,
                ErrorAction.RETRY: RequestState.UNKNOWN,
            }
            self.current.state = states.get(action, RequestState.UNKNOWN if is_unknown else RequestState.PUT_OFF)
            is_last |= self._is_too_slow(status)
        code = code or f"http_{status}"
        if is_last:
            return ObjectFailed(code, message, permanent=permanent, status=status)
        again = TryAgain(code, message, status=status)
        # A download host speaks for nobody but itself.
        again.is_free = action is ErrorAction.WAIT and is_own
        again.asked = ApiReply.retry_after_seconds(answer.headers.get("Retry-After"), time.time())
        return again

    def _broken(self, call: HttpCall, error: Exception, policy: RetryPolicy) -> TryAgain:
        """What to do after a broken exchange: try again, or wait for the network. Raises RunError if in vain."""
        again = TryAgain("network", f"{type(error).__name__}: {Trouble.connection_problem(error)}")
        outage, untrusted = self._context.outage, Trouble.certificate_problem(error)
        self._context.limiter.has_answer = True
        is_own = self._session.is_own(call.address)
        if untrusted and not is_own:
            raise ObjectFailed(again.code, again.message)
        if untrusted:
            message = f"the API's certificate is not trusted: {untrusted}"
            hint = "for a private CA, set REQUESTS_CA_BUNDLE to its file; else check api.url and this machine's clock"
            raise RunError(message, hint, code="api")
        # Before the first answer, TLS that fails is a wrong address as well; after it, a connection that broke.
        is_mute = isinstance(error, requests.exceptions.SSLError) and not outage.has_answered
        if not is_own or not (Trouble.failed_to_connect(error) or is_mute):
            return again
        if outage.should_wait():
            again.is_free, again.cap = True, OUTAGE_PAUSE_SECONDS
            return again
        # A proxy that says no, or cannot be used at all, will not say yes to the next object.
        is_refused = "Tunnel connection failed: 4" in str(error)
        is_refused |= isinstance(error, NO_ADDRESS)
        if is_refused or outage.has_answered or not policy.total:
            raise Trouble.api_unreachable(self._api.url, error)
        return again

    # -- what comes back -----------------------------------------------------------------------------------------------

    def _receive(self, answer: requests.Response) -> ConvertedFile | None:
        """The file in a 200, or behind its envelope's link; None where a 202 tells of a job. Raises InvalidResponse."""
        if answer.status_code == 202:
            # Only its path counts, and the address before it may be none.
            location = re.sub(r"^(\w+:)?//[^/]*|[?#].*", "", answer.headers.get("Location", ""))
            request = self.current
            job_id = str(json_body(answer).get("job_id") or location.rstrip("/").rpartition("/")[2])
            if not job_id:
                raise InvalidResponse("no_job_id", "the API accepted a job and did not say which")
            if request.row.job_id != job_id:
                request.change(job_id=job_id)
                # Known to the journal, it is asked for after a crash, and no large object is sent again.
                self._context.ledger.mark_sent(self.task, request.row)
            return None
        # A connection of 1 MB/s needs ten minutes for the largest body.
        deadline = time.monotonic() + max(self._api.timeout, 600)
        is_json = FileType.media_kind(answer.headers.get("Content-Type", "")) == "json"
        if not is_json or self.task.target in JSON_FORMATS:
            return self._receive_file(answer, deadline=deadline)
        without_link = InvalidResponse("json_answer", "the API answered with JSON instead of the file")
        return self._download(json_body(answer), deadline, without_link)

    def _finish_job(self) -> ConvertedFile:
        deadline = time.monotonic() + 6 * 3600
        # Five polls are half a minute: a new job may not be known everywhere at once.
        polls_left, results_left = 5, 3
        for pause in itertools.chain(JOB_POLL_SECONDS, itertools.repeat(JOB_POLL_SECONDS[-1])):
            self._stop.sleep(pause, self._api.timeout)
            try:
                if file := self._poll_job(deadline):
                    return file
            except InvalidResponse as bad:
                results_left -= 1
                if bad.permanent or not results_left:
                    raise
            except ObjectFailed as failure:
                polls_left -= 1
                if failure.code != JOB_LOST or not polls_left:
                    raise
            if time.monotonic() > deadline:
                break
        raise ObjectFailed("job_not_finished", f"the job {self.current.row.job_id} gave no result in time")

    def _poll_job(self, deadline: float) -> ConvertedFile | None:
        """The result of a job; None while it runs. An unknown state counts as running (docs/conversions/async).

        Raises InvalidResponse if there is no good result; ObjectFailed, also if the API does not know the job.
        """
        request, job_id = self.current, self.current.row.job_id
        call = HttpCall(f"{self._api.url}{JOBS_PATH}/{urllib.parse.quote(job_id, safe='')}", POLL_RULES, deadline)
        try:
            job, now = self._exchange(call, lambda answer: (json_body(answer), answer.headers.get("Date", "")))
        except ObjectFailed as failure:
            # "Unknown" is believed only from the API, and after a while: a job may be known later than its 202.
            if failure.permanent:
                raise ObjectFailed(JOB_LOST, f"the API does not know the job {job_id}") from None
            # Its status answers this question; it must not be taken for an answer to what made the job.
            message = f"asked for the job {job_id}: {failure.code} {failure.message}".rstrip()
            raise ObjectFailed("job_not_finished", message) from None
        if job.get("status") == "failed":
            code, message = ApiReply.error(job)
            if code == "quota_exceeded":
                raise Trouble.refusal_by_api(429, code, message, self._api.url)
            request.state = RequestState.REJECTED
            # By the API's own clock, which tells both times in whole seconds, so that two may be rounding.
            age = unix_seconds(now) - unix_seconds(str(job.get("created_at")))
            request.is_old_job = age > time.time() - self._asked_at + 2
            permanent = code not in {"service_unavailable", "rate_limited"}
            message = message or "the API says that the job failed"
            raise ObjectFailed(code or "job_failed", message, permanent=permanent)
        if job.get("status") != "completed":
            return None
        message = "the job is completed, and the API does not say where its result is"
        return self._download(job, deadline, InvalidResponse("no_link", message))

    def _download(self, told: Mapping[str, Any], deadline: float, without_link: InvalidResponse) -> ConvertedFile:
        """The file behind the link in an envelope or a job. Pages disagree on the names.

        Raises InvalidResponse if there is no link, or it is stale, or the file is cut or another one.
        """
        result = told.get("result")
        places = [result if isinstance(result, dict) else {}, told]
        links = (str(place[name]) for place in places for name in ("file_url", "download_url") if place.get(name))
        link, size = next(links, ""), places[0].get("size")
        try:
            # The link may be relative, and may point to another host, which then gets no key.
            address = urllib.parse.urljoin(self._api.url + "/", link)
        except ValueError:
            link = ""
        if not link:
            raise without_link
        call = HttpCall(address, DOWNLOAD_RULES, deadline)
        try:
            file = self._exchange(call, partial(self._receive_file, deadline=deadline))
        except InvalidResponse:
            raise
        except ObjectFailed as failure:
            message = f"the API's link to the file does not work: {failure.code} {failure.message}".rstrip()
            raise InvalidResponse("stale_link", message) from None
        # A whole body of the wrong size is a body of something else.
        if isinstance(size, int) and size != file.size:
            file.body.close()
            raise InvalidResponse("cut_answer", f"the file has {file.size} bytes, and the API says {size}")
        return file


########################################################################################################################
# Feeder. One thread: from decisions to tasks on the queue.
#   - The queue is bounded, and so is everything behind it: memory does not grow with the bucket.
#   - Whatever happens, every worker gets its end marker, or the stop flag is set.
########################################################################################################################


class Feeder:
    """Hands out the tasks of every page, and counts what needs no worker."""

    def __init__(self, context: "WorkerContext", journal: Journal) -> None:
        self.context, self._journal, self._tasks, self._tell = context, journal, context.tasks, context.tell
        self._settings, self._stop = context.settings, context.stop
        self.planner = Planner(context.settings, context.bucket, journal, context.stop)
        # For `count_total`: the workers have more than they can do; nothing more will come.
        self.is_ahead, self._has_finished = threading.Event(), threading.Event()
        self._has_begun = self._has_warned = False

    def run(self) -> None:
        """Feed until everything is handed out or the run is to end; then send the workers home."""
        reason: RunError | None = None
        is_complete = False
        try:
            with Trouble.explained("the feeder", self._settings.api.url):
                is_complete = self._feed_all()
        except RunError as error:
            # What was handed out is finished; only where nothing was begun is it as if nothing had been started.
            exit_code = ExitCode.STOPPED if self._has_begun else error.exit_code
            reason = RunError(error.message, error.hint, exit_code, error.code)
        except StopRequested:
            pass
        finally:
            self._has_finished.set()
            self.is_ahead.set()
            self._tell(FeederUpdate(reason=reason, is_complete=is_complete))
            for _ in range(self._settings.run.consumers):
                with contextlib.suppress(StopRequested):
                    self._put(None)

    def _feed_all(self) -> bool:
        # In this thread, because the main one must hear signals even while S3 does not answer.
        self.context.bucket.check()
        workers = self._settings.run.workers
        if self._settings.repair and not self._repair():
            return False
        # While there is work, a page that is read early is only a page that grows old.
        for decisions in self.planner.decisions(lambda: LIST_THREADS if self._tasks.qsize() < workers else 1):
            self._has_begun = True
            self._feed(decisions)
            if self._stop.is_set or self.context.ledger.reason:
                return False
        return not self._stop.is_set

    def _repair(self) -> bool:
        """Take for lost what is missing. False if the run is to end."""
        settings, bucket = self._settings, self.context.bucket
        verification = Verification(Planner(settings, bucket, self._journal, self._stop))
        for _ in verification.repair():
            if self._stop.is_set:
                return False
        self.planner.warnings |= verification.warnings()
        counts = verification.counts
        count = pluralize(counts[MISSING] - verification.left_out, "output")
        log_event("repair", f"--repair: {count} missing, to be converted again", level=logging.INFO, **counts)
        return True

    def _feed(self, decisions: Sequence[Decision]) -> None:
        # Of most objects, in most runs, there is nothing but to count them: without a step of Python's for each.
        listed = Counter(map(operator.attrgetter("job", "is_retry"), decisions))
        counts = {(job, RETRIED if is_retry else LISTED): number for (job, is_retry), number in listed.items()}
        settled = itertools.filterfalse(operator.attrgetter("task"), decisions)
        counts |= Counter(map(operator.attrgetter("job", "reason"), settled))
        tasks, ranks = [each for each in decisions if each.task], {DecisionKind.FAIL: 0, DecisionKind.RESUME: 1}
        if (anew := sum(each.is_anew for each in tasks)) and not self._has_warned:
            # Once, before they are handed out: there is still time to stop the run.
            self._has_warned = True
            log_event("warning", f"{anew} of the objects listed so far {ANEW}; --dry-run counts all", kind="anew")
        # Together with the failures, so that a page that is half handed out has all its objects in the accounts.
        self._tell(FeederUpdate({name: number for name, number in counts.items() if name[1]}))
        # What an earlier run has sent comes first: the API replays it for free, but not for ever.
        for decision in sorted(tasks, key=lambda each: ranks.get(each.kind, 2)):
            task, code = cast(Task, decision.task), decision.reason
            if decision.kind is DecisionKind.FAIL:
                failed = Outcome(task, OutcomeKind.FAILED, code, decision.message, pending=task.pending)
                self._tell(replace(failed, permanent=code == "too_large"))
            else:
                self.planner.at_work.add((task.job, task.source.key))
                self._put(task)

    def _put(self, task: Task | None) -> None:
        """Put a task on the queue. Raises StopRequested: nobody may empty it any more, and workers see the flag."""
        while True:
            try:
                return self._tasks.put(task, timeout=0.0 if self._stop.is_set else 0.2)
            except queue.Full:
                self.is_ahead.set()
                if self._stop.is_set:
                    raise StopRequested from None

    def count_total(self) -> None:
        """Count what the run is to do, over a listing of its own, so that a bar has an end while the feeder is at work.

        It never holds up the work: it starts when the workers have more than they can do, reads a page at a time,
        leaves the processor to others, and nothing waits for it. What this run has converted by then counts as to do.
        """
        self.is_ahead.wait()
        try:
            # A run that is over already closes the checkpoint, and nobody else must have it open then.
            if not self._has_finished.is_set():
                self._count_total()
        except Exception:
            # Without a total, the run goes on as well.
            log.debug("the total could not be counted", exc_info=True)

    def _count_total(self) -> None:
        settings, bucket, journal = self._settings, self.context.bucket, self._journal
        with Journal(journal.path, bucket.endpoint, settings, read_only=True) as own:
            own.horizon = journal.run_id << 32
            planner, finished = Planner(settings, bucket, own, self._stop), {DecisionKind.SKIP, DecisionKind.DONE}
            total, began = 0, time.thread_time()
            for decisions in planner.decisions(lambda: 1):
                total += sum(not each.is_retry and each.kind not in finished for each in decisions)
                # It takes a tenth of a processor at the most.
                if self._has_finished.wait(9 * (time.thread_time() - began)):
                    return
                began = time.thread_time()
            self._tell(FeederUpdate(total=total))


########################################################################################################################
# Workers. Look, slot, convert, look, store. A worker leaves when it takes the end marker; when the run is to end, the
# object in hand is finished first, and a queued one is given back unsent.
#   - `look_at_output`, before anything is paid, and `_require_place`, right before it is stored, are the only guards
#     against overwriting (I8).
#   - All that is said of an object goes through `WorkerContext._convert`, which hides secrets.
########################################################################################################################


class Ledger:
    """What is written down, and counted against the cap, right before a request that may be paid for.

    In a worker process the same door leads through the pipe (see ParentConnection).
    """

    def __init__(self, journal: Journal, settings: Settings) -> None:
        # Makes a request durable before it is sent. Raises RunError.
        self.mark_sent = journal.mark_sent
        self._api, self._cap, self._shard = settings.api, settings.api.max_conversions, settings.shard
        self._lock, self._reserved, self._has_asked = threading.Lock(), 0, False
        self.reason: RunError | None = None  # one more was wanted than may be had: then work is left for sure

    def reserve(self, task: Task) -> None:
        """Take one conversion off the cap. Raises StopRequested where none is left; what has one goes on."""
        with self._lock:
            if not task.pending:
                self._require_month()
            if self._reserved == self._cap:
                message = f"the cap of {pluralize(self._reserved, 'conversion')}{self._shard.named} is reached"
                more = "raise api.max_conversions (--limit); failed ones count, for they may be charged"
                self.reason = RunError(message, f"run it again to go on, or {more}", code="cap")
                raise StopRequested
            self._reserved += 1

    def _require_month(self) -> None:
        """Raise StopRequested where the month has no more than is to be kept: an answer would cost one to say so."""
        if (keep := self._api.keep_remaining) and not self._has_asked:
            self._has_asked, remaining = True, None
            with contextlib.suppress(RunError):  # then the first answer tells
                remaining = Usage.ask(self._api).remaining
            if remaining is not None and remaining <= keep:
                self.reason = Trouble.little_remains(remaining, keep)
        if self.reason and self.reason.code == "quota":
            raise StopRequested


@dataclass
class WorkerContext:
    """The workers of a process: what they share, and what each of them does in a thread of its own."""

    settings: Settings
    stop: StopFlag
    bucket: Bucket
    ledger: "Ledger | ParentConnection"
    tasks: Tasks
    tell: Callable[[Message], None]  # takes outcomes
    # What they learn of the API together. Written without a lock: a refusal that is counted too late costs one more
    # attempt, nothing else.
    takes_urls: bool = False  # it has taken one
    urls_refused: int = 0  # of objects whose bytes it took then
    unsupported: dict[tuple[str, str], str] = field(default_factory=dict)  # (source format, target) -> the API's words

    def __post_init__(self) -> None:
        parts = self.settings.shard.count * self.settings.run.processes
        self.limiter = RateLimiter(self.settings.api.requests_per_minute, parts)
        self.outage = OutageMonitor("the API")

    def guard(self, function: Callable[[], None]) -> None:
        """Do a part of the work in this thread. Trouble ends the run, not only the thread."""
        try:
            with Trouble.explained("a worker", self.settings.api.url):
                function()
        except RunError as error:
            self.stop.request(error)

    def work(self) -> None:
        """Convert tasks until the end marker comes, or the run is to end and nothing is queued."""
        api = self.settings.api
        with Session(api.timeout, api.url, api.key) as session:
            while task := self.next_task():
                self.tell(self._convert(Conversation(self, session, task)))

    def next_task(self) -> Task | None:
        """The next one; None if no more will come."""
        while True:
            try:
                return self.tasks.get(timeout=0.2)
            except queue.Empty:
                if self.stop.is_set:
                    return None

    def _convert(self, conversation: Conversation) -> Outcome:
        """Take one object through the API and into the output bucket. A bad object is an outcome, not an exception."""
        hide = self.settings.hide
        try:
            with Trouble.explained("a worker", self.settings.api.url, foreseen=(ObjectSkipped, ObjectFailed)):
                return self._look_convert_store(conversation)
        except StopRequested:
            pass
        except ObjectSkipped as skipped:
            return conversation.outcome(OutcomeKind.SKIPPED, ObjectFailed(str(skipped), ""))
        except ObjectFailed as failure:
            return conversation.outcome(OutcomeKind.FAILED, failure)
        except RunError as error:
            # A bug is met by this object, and perhaps by no other. The environment's trouble is not the object's.
            if error.code == "bug":
                bug = error.__cause__
                return conversation.outcome(OutcomeKind.FAILED, ObjectFailed("bug", f"{type(bug).__name__}: {bug}"))
            self.stop.request(RunError(hide(error.message), hide(error.hint), error.exit_code, error.code))
        return conversation.outcome(OutcomeKind.LEFT)

    def _look_convert_store(self, conversation: Conversation) -> Outcome:
        # Queued when the run was asked to end: it was never sent.
        if self.stop.is_set:
            raise StopRequested
        if conversation.task.pending:
            # Before the looks, which new objects need less of: under a cap, what may be paid already comes first.
            self.ledger.reserve(conversation.task)
        bucket = self.bucket
        task, head = look(conversation.task, bucket, self.settings)
        conversation.task = task
        existing, kind = bucket.look_at_output(task), OutcomeKind.CONVERTED
        if existing:
            kind, output = existing
        elif task.copy:
            output = bucket.copy(task, head)
        else:
            file = conversation.convert(head)
            with contextlib.closing(file.body):
                if conversation.current.row.url or not task.source.if_match:
                    # By URL, the API has read whatever lay there: nobody knows which version, if it has changed. Nor
                    # does anybody where bytes are read without an ETag.
                    bucket.require_unchanged(task.source, head)
                output = bucket.store(task, file)
        # Before it is written down: what is known as done is not visited again.
        bucket.tag_source(task.source, head)
        return conversation.outcome(kind, output=output)


########################################################################################################################
# Processes. With `run.processes`, workers are threads of several processes. To each of them the parent has a pipe and a
# thread (ProcessSupervisor) that hands it tasks from the queue and takes its messages: no lock is shared, so that one
# that is killed holds up nobody.
#   - What a process holds is known here. When it dies or hangs, another takes its place and gets the same tasks, with
#     the requests that it has made: the same under the same keys, which the API answers from its memory.
#   - Only the parent writes: a request is on the disk when the parent has said so.
#   - Signals reach the parent alone. It tells the others to stop; when it dies, the pipes close, and the others end.
########################################################################################################################


class Pace(NamedTuple):
    """What a process says of the rate, and twice a second as a sign of life."""

    requests: int  # that it has sent since it last said so
    paused_until: float  # nobody may send before; in monotonic seconds, which all processes of a machine share


class LedgerQuestion(NamedTuple):
    """What a worker wants of the ledger: a conversion off the cap, or a request written down; and, back, the answer."""

    thread: int
    task: Task | None = None
    request: PendingRequest | None = None
    is_done: bool = False  # if it comes back without, the run is to end


class ParentConnection:
    """A worker process: tasks come through the pipe, what its workers say goes back.

    The workers take it for the ledger: a question waits for the parent's answer.
    """

    reason = None  # the parent knows whether the cap is reached

    def __init__(self, connection: "Connection", workers: int) -> None:
        self._connection, self._workers, self._sending = connection, workers, threading.Lock()
        self._stop = StopFlag(self._send)
        self._answers = defaultdict[int, queue.SimpleQueue[bool]](queue.SimpleQueue)  # by the thread that waits

    @classmethod
    def serve(cls, connection: "Connection", settings: Settings, workers: int, *, is_verbose: bool) -> NoReturn:
        """Do what the parent says, in a new process, until the parent closes the pipe or dies."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        set_up_logging(quiet=settings.quiet, verbose=is_verbose, as_json=settings.log_format == "json")
        parent = cls(connection, workers)
        # With the parent dead, nobody is left to write down what comes of it; the next run sends the same requests.
        with contextlib.suppress(EOFError, OSError):
            try:
                with Trouble.explained("a worker process", settings.api.url):
                    parent._begin(settings)
            except RunError as error:
                parent._stop.request(error)
                parent._send(None)
                while True:
                    connection.recv()
            while True:
                parent._apply(connection.recv())
        os._exit(ExitCode.STOPPED)

    def _begin(self, settings: Settings) -> None:
        bucket = Bucket(settings, self._stop)
        self._context = context = WorkerContext(settings, self._stop, bucket, self, queue.Queue(), self._send)
        pool = ThreadPoolExecutor(self._workers + 1)
        working = {pool.submit(context.guard, context.work) for _ in range(self._workers)}
        pool.submit(self._show_life, working)

    def mark_sent(self, task: Task | None = None, request: PendingRequest | None = None) -> None:
        """Make a request durable before it is sent; without one, take one conversion off the cap.

        Raises StopRequested if that is not possible.
        """
        thread = threading.get_ident()
        answers = self._answers[thread]
        self._send(LedgerQuestion(thread, task, request))
        if not answers.get():
            raise StopRequested

    reserve = mark_sent

    def _send(self, message: object) -> None:
        with self._sending:
            self._connection.send(message)

    def _show_life(self, workers: "set[Future[None]]") -> None:
        limiter, told = self._context.limiter, 0
        while workers:
            workers = wait(workers, timeout=0.5).not_done
            requests_so_far = limiter.requests
            self._send(Pace(requests_so_far - told, limiter.paused_until))
            told = requests_so_far
        self._send(None)

    def _apply(self, message: object) -> None:
        if isinstance(message, Pace):
            self._context.limiter.pause_until(message.paused_until)
        elif isinstance(message, LedgerQuestion):
            self._answers[message.thread].put(message.is_done)
        elif isinstance(message, RunError):
            self._stop.request(message, is_from_parent=True)
        elif isinstance(message, Task):
            self._context.tasks.put(message)
        else:
            for _ in range(self._workers):
                self._context.tasks.put(None)


class ProcessSupervisor:
    """One worker process as its thread in the parent sees it. Everything here happens in that thread."""

    MAX_DEATHS = 3  # of worker processes, over one object or without any result

    def __init__(self, context: WorkerContext, workers: int) -> None:
        self._context, self._tell, self._workers = context, context.tell, workers
        # (job, key) -> the task as it would be sent again. No more than twice the workers, so that none is idle.
        self._held: dict[tuple[str, str], Task] = {}
        self._idle_deaths = 0  # in a row, without one outcome in between
        self._is_fed = False  # the end marker has come

    def run(self) -> None:
        """Keep a process at work until everything it was handed is settled, or none stays alive."""
        if sys.platform != "win32":
            # A process inherits the mask of the thread that starts it, and signals are the parent's to handle. The
            # helper of multiprocessing has to run before: to start it unblocks them again.
            multiprocessing.resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        # With the first task, and not before, the feeder has looked where the bucket is.
        if not (first := self._context.next_task()):
            return
        self._held[first.job, first.source.key] = first
        settings = self._context.settings
        settings = replace(settings, s3=replace(settings.s3, region=self._context.bucket.region))
        while not self._context.stop.is_set:
            try:
                with running_process(settings, self._workers) as (process, connection):
                    self._serve(process, connection)
                    break
            except (EOFError, OSError):
                log.warning("a worker process died with %d objects in its hands", len(self._held))
            self._requeue_after_crash()
        # What no process is there for is left to the next run.
        for task in self._held.values():
            self._tell(Outcome(task, OutcomeKind.LEFT, pending=task.pending))

    def _serve(self, process: Any, connection: "Connection") -> None:
        """Hand out tasks and take messages until the process leaves. Raises EOFError, OSError when it dies or hangs."""
        told: set[object] = set()
        heard_at = time.monotonic()
        for task in self._held.values():
            connection.send(task)
        while True:
            for news in self._news():
                if news not in told:
                    told.add(news)
                    connection.send(news)
            while len(self._held) < 2 * self._workers and (fresh := self._next()):
                self._held[fresh.job, fresh.source.key] = fresh
                connection.send(fresh)
            if connection.poll(0.01):  # how soon an idle process gets a task
                heard_at = time.monotonic()
                message = connection.recv()
                if message is None:
                    return
                self._apply(message, connection)
            elif time.monotonic() - heard_at > HANG_SECONDS:
                log.warning("a worker process has shown no sign of life for %d s", HANG_SECONDS)
                process.kill()
                raise EOFError

    def _news(self) -> Iterator[RunError | Pace | None]:
        """What a process is to be told once: to stop, to wait, and that no task will come any more."""
        if self._context.stop.reason:
            yield self._context.stop.reason
        yield Pace(0, self._context.limiter.paused_until)
        if self._is_fed or self._context.stop.is_set:
            yield None

    def _next(self) -> Task | None:
        task = None
        if not (self._is_fed or self._context.stop.is_set):
            with contextlib.suppress(queue.Empty):
                task = self._context.tasks.get_nowait()
                self._is_fed = task is None
        return task

    def _apply(self, message: object, connection: "Connection") -> None:
        if isinstance(message, LedgerQuestion):
            connection.send(LedgerQuestion(message.thread, is_done=self._write_down(message)))
        elif isinstance(message, Pace):
            self._context.limiter.pause_until(message.paused_until)
            self._context.limiter.requests += message.requests
        elif isinstance(message, RunError):
            self._context.stop.request(message)
        elif isinstance(message, Outcome):
            self._idle_deaths = 0
            del self._held[message.task.job, message.task.source.key]
            self._tell(message)

    def _write_down(self, question: LedgerQuestion) -> bool:
        try:
            if question.task and not question.request:
                self._context.ledger.reserve(question.task)
            elif question.task and question.request:
                # Before it is written, and it is sent only after that: what is held is never less than what is sent.
                key = (question.task.job, question.task.source.key)
                self._held[key] = replace(self._held[key], pending=question.request, look=True)
                self._context.ledger.mark_sent(question.task, question.request)
        except RunError as error:
            self._context.stop.request(error)
            return False
        except StopRequested:
            return False
        return True

    def _requeue_after_crash(self) -> None:
        """Take back what a dead process held: it is sent again, or given up where it may be what kills processes."""
        self._idle_deaths += 1
        if self._idle_deaths >= self.MAX_DEATHS:
            message = f"worker processes died {self._idle_deaths} times in a row without converting anything"
            hint = "look for what kills them (memory?), or set fewer run.workers"
            self._context.stop.request(RunError(message, hint, code="environment"))
        for key, task in list(self._held.items()):
            if task.crashed + 1 < self.MAX_DEATHS or self._context.stop.is_set:
                self._held[key] = replace(task, crashed=task.crashed + 1, look=True)
            else:
                said = f"{self.MAX_DEATHS} worker processes died while they held this object"
                self._tell(Outcome(task, OutcomeKind.FAILED, "worker_died", said, pending=task.pending))
                del self._held[key]


@contextlib.contextmanager
def running_process(settings: Settings, workers: int) -> Iterator[tuple[Any, "Connection"]]:
    """A new worker process and the pipe to it; it is gone at the end."""
    # Spawned, not forked: a client must not cross a fork, and neither may a lock that another thread holds.
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    target = partial(ParentConnection.serve, is_verbose=log.isEnabledFor(logging.DEBUG))
    process = spawning.Process(target=target, args=(theirs, settings, workers), daemon=True)
    with ours:
        with theirs:
            process.start()
        # Its death shows as the end of the pipe, because nobody else holds the other end any more.
        yield process, ours
    process.join()


########################################################################################################################
# Recorder and report. One thread, the main one: the only writer of outcomes, and the owner of every count and every
# line of output.
#   - What has come in by the time the last batch is on the disk is the next batch: a slow disk makes batches larger.
#   - An outcome is counted after it is written (I1). What cannot be written is left to do: its request stays recorded.
#   - Ten failures in a row for the same reason are evidence against all: they are held back until that is decided.
########################################################################################################################

# Metric -> the figure of the run that it has, and what that is. Each run counts from zero, which Prometheus takes for
# the restart that it is.
METRICS = {
    "listed_objects_total": (LISTED, "Objects listed in the run."),
    "converted_objects_total": ("converted", "Objects converted in the run."),
    "already_done_objects_total": (ALREADY_DONE, "Objects that were converted before the run."),
    "adopted_objects_total": ("adopted", "Objects whose outputs were there without a mark of this program."),
    "left_objects": (LEFT, "Objects that the run has left to do."),
    "source_bytes_total": ("bytes_in", "Size of the objects that were converted in the run."),
    "output_bytes_total": ("bytes_out", "Size of the outputs that were stored in the run."),
    "requests_total": ("requests", "Requests sent to the API in the run."),
    "throttled_requests_total": ("throttled", "Answers 429 in the run."),
    "replays_total": ("replays", "Requests of an earlier run that were answered in this one."),
    "possible_double_charges_total": ("possible_double_charges", "Conversions that may have been charged twice."),
    "run_duration_seconds": ("seconds", "Age of the run, or how long it took."),
    "conversion_p50_seconds": ("p50_seconds", "Time within which half of the conversions are done."),
    "conversion_p95_seconds": ("p95_seconds", "Time within which 95 % of the conversions are done."),
    "cost_total": ("cost", "What the conversions of the run cost, about, by api.price."),
    "remaining_conversions": ("remaining", "Conversions that the month has left, as the API says."),
    "skipped_objects_total": ("skipped", "Objects skipped in the run, by reason."),
    "failed_objects_total": ("failed", "Objects that failed in the run, by code."),
    "expected_objects": ("expected", "Objects that the run is to try, as far as they are known."),
    "in_flight_objects": ("in_flight", "Objects that are with the workers."),
    "running": ("is_running", "Whether a run is at work."),
    "last_success_timestamp_seconds": ("last_success_timestamp_seconds", "When a run last left nothing to do."),
    "failed_for_good_objects": ("failed_for_good_objects", "Objects that only --retry-failed tries again."),
    "last_exit_code": ("last_exit_code", "Exit code of the last run that has ended."),
}
# What to do about a failure, by its code: the API's, or one of this program's.
HINTS = {
    "bad_request": "the API does not take this input: open one of them; it may be damaged, or not what its name says",
    "unsupported_route": "the API does not convert from this format to that: correct convert.target, or leave it out "
    "with convert.exclude",
    "file_too_large": "your plan takes no larger ones: lower api.max_size to skip the attempt, or change the plan",
    "fetch_failed": "the API could not read the presigned URL: set api.transfer = upload",
    "service_unavailable": "the API's converter was down: run it again later",
    "forbidden": "check the API key and the plan: the API refuses the account, or this object to it",
    "rate_limited": "the API's limit left no room for too long: lower api.requests_per_minute, or run it again later",
    "http_403": "answered without a code of the API's: is there a proxy or a filter on the way? Run it again",
    "http_413": "refused without a code of the API's: if nothing on the way limits the size, lower api.max_size",
    "http_422": "refused without a code of the API's: if it stays so, open one of the files; it may be damaged",
    "too_large": "raise api.max_size, or api.jobs_above from never, if your plan takes such sizes",
    "network": "the connection broke, again and again: check network and proxy, and run it again",
    "html_answer": "a web page came in place of the file: is there a proxy or a captive portal on the way?",
    "json_answer": "an error came in place of the file: run it again",
    "text_answer": "words came in place of the file, such as an error's: run it again",
    "wrong_type": "the API answered with another format and has been paid: ask its support, with the key of an object",
    "bad_pages": "damaged, or with what is no page: to store the archive as it is, set convert.pages = zip and run it "
    "with --retry-failed; within a day of the payment that costs nothing",
    "cut_answer": "answers broke off: check network and proxy, and run it again",
    "no_length": "a proxy on the way hides where answers end: go around it",
    "packed_answer": "a proxy on the way packs answers as nobody asked for: go around it",
    "slow_answer": "the answer took too long: raise api.timeout",
    "stale_link": "the API's link to the result did not work: run it again, it is asked for anew",
    "no_link": "the API has done the job and did not say where the result is: run it again, it is asked for anew",
    "no_job_id": "the API started a job and did not say which: run it again",
    "job_not_finished": "the job took too long: run it again, it goes on with the same job",
    "job_lost": "the API has forgotten the job: run it again",
    "job_failed": "the API's converter gave up: open one of the files; it may be damaged or protected by a password",
    "source_gone": "deleted after it was listed: nothing to do; with --keys-from, no object has this key: give keys "
    'without s3://BUCKET/ and without a leading "/"',
    "source_changed": "overwritten after it was listed: the next run converts the new version",
    "source_unreadable": "S3 does not hand it out: allow s3:GetObject and kms:Decrypt, or restore it from the archive",
    "look_failed": "S3 did not say whether something lies under the output key: allow s3:ListBucket and s3:GetObject "
    "on the outputs if it was refused, and run it again",
    "store_failed": "S3 did not take it: allow s3:PutObject on s3.output_key, check the network, and run it again",
    TAG_FAILED: f"the output is stored, and the next run tags its source at no charge: {TAGGING_HINT}",
    TOO_MANY_TAGS: "the output is stored, but its source has no room for s3.tag_source: take one of its tags away",
    "output_collision": "its output key is taken: its message says what to put into s3.output_key, such as {ext}",
    "output_key_too_long": "shorten s3.output_key",
    "worker_died": "its size may need more memory than there is: give each process fewer workers, and run it again",
    "gave_up": "its message says of what: when the cause is removed, run it with --retry-failed",
    "not_stored": "its message says how often it was paid for: allow s3:PutObject, and run it with --retry-failed",
    "bug": "a bug of this program: run it again with -v, and report what it prints",
}


def hint_for(code: str) -> str:
    """What to do about failures with a code."""
    # The API may have codes that no page of it names; the status, where that is all there is, still says whose fault.
    if code.startswith("http_5"):
        return "the API's side: run it again later"
    unknown = "open one of the files: it may be damaged or protected by a password; its message says more"
    return HINTS.get(code, HINTS["http_403"] if re.fullmatch("http_[1-4]..", code) else unknown)


class OutputFile:
    """A file that a run writes for others: summary, metrics, failures. `option` names it in messages."""

    def __init__(self, option: str, path: str | None) -> None:
        self._option, self.path, self._has_warned = option, Path(path or os.devnull), False

    def append(self, text: str) -> None:
        """Add lines. Raises RunError."""
        try:
            # Of streams alone: this program may have opened the same file, to read from it what is to be tried again.
            number = SettingsReader.number_of_open_file(self.path, 2)
            self._write_into(self.path if number is None else number, text, os.O_APPEND)
        except OSError as problem:
            message = f"{self._option} = {self.path} cannot be written: {problem.strerror}"
            hint = f"free some space, or set {self._option} to another path, and run it again"
            raise RunError(message, hint, code="disk") from None

    def replace(self, text: str) -> None:
        """Put a whole text in place of the old one, or leave that, with a warning: the run has not failed."""
        if self.path == Path(os.devnull):
            return
        try:
            number = SettingsReader.number_of_open_file(self.path)
            if number is not None or (self.path.exists() and not self.path.is_file()):
                self._write_into(self.path if number is None else number, text)
            else:
                self._replace_whole(text)
        except OSError as problem:
            if not self._has_warned:
                log.warning("%s = %s cannot be written: %s", self._option, self.path, problem.strerror)
            self._has_warned = True

    def _replace_whole(self, text: str) -> None:
        # A link stays a link. The same directory is the same file system, on which a rename is atomic.
        real = Path(os.path.realpath(self.path))
        # The end of its name sets apart what machines with a common disk write, and leaves room where it is long.
        draft = real.with_name(f"{real.name[-40:]}.{os.getpid()}.tmp")
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(real)
        except OSError as problem:
            # A file that is mounted, or whose folder takes no new ones, can be written into all the same.
            cannot_be_replaced = {errno.EACCES, errno.EBUSY, errno.EPERM, errno.EROFS, errno.EXDEV}
            if problem.errno not in cannot_be_replaced or not real.exists():
                raise
            self._write_into(real, text)
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)

    @staticmethod
    def _write_into(place: Path | int, text: str, how: int = os.O_TRUNC) -> None:
        # A pipe that nobody reads is an OSError, instead of a wait until somebody does.
        how |= os.O_WRONLY | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
        number = os.dup(place) if isinstance(place, int) else os.open(place, how, 0o666)
        if not isinstance(place, int) and sys.platform != "win32":
            os.set_blocking(number, True)  # its reader may be slow
        with open(number, "wb", buffering=0) as file:
            size = os.fstat(number).st_size
            try:
                OutputFile._write_whole(file, text.encode())
            except OSError:
                # The next line would be appended to half of one; only a file can be cut.
                with contextlib.suppress(OSError):
                    os.ftruncate(number, size)
                    os.lseek(number, size, os.SEEK_SET)
                raise

    @staticmethod
    def _write_whole(file: io.FileIO, rest: bytes) -> None:
        while rest:
            if (written := file.write(rest)) is None:
                raise BlockingIOError(errno.EAGAIN, "nobody reads it")
            rest = rest[written:]

    def require_writable(self) -> None:
        """Raise RunError if it cannot be appended to; make no file."""
        path = self.path
        try:
            # Not even for a moment: another run may be making the same file, and an empty one would say "no failures".
            if not path.exists():
                tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))).close()
            # To open a pipe is to wait for its reader, or to tell that reader that this was all.
            elif not path.is_fifo() and SettingsReader.number_of_open_file(path) is None:
                path.open("ab").close()
        except OSError as problem:
            message = f"{self._option} = {path} cannot be written: {problem.strerror}"
            raise usage_error(message, f"set {self._option} to another path") from None


class Report:
    """Counts, exit code, summary and last words of a run. Every listed object ends in exactly one count."""

    CODES_KEPT = 20  # codes of failures that are counted by name; an API that invents more of them fills no memory

    def __init__(self, settings: Settings) -> None:
        self._settings, self.started, self._started_at = settings, time.monotonic(), time.time()
        self.counts, self.skipped, self.failed = Counter[str](), Counter[str](), Counter[str]()
        self.failed_for_money = Counter[str]()  # those that are not free
        self._by_job = {job.name: Counter[str]() for job in settings.jobs}
        self._latencies: deque[float] = deque(maxlen=10_000)  # the newest: the percentiles are theirs
        self.examples: dict[str, Outcome] = {}  # code -> the first failure that had it; "": the first doubt of a charge
        self.remaining: int | None = None  # conversions this month
        self.total: int | None = None  # what `eligible` will come to, if a second pass has said so
        self.reason: RunError | None = None  # why the run ended before its work did
        self.announced: RunError | None = None  # why it is to end, once that was said
        self.is_complete = False  # everything there is was listed and handed out
        self._has_begun = False  # something was stored, or may have been done by the API

    def apply(self, update: FeederUpdate) -> None:
        """Take over what the feeder has to say."""
        for (job, name), number in update.counts.items():
            self._count(job, name, number)
        self.total = self.total if update.total is None else update.total
        self.reason = self.reason or update.reason
        self.is_complete |= update.is_complete

    def add(self, outcome: Outcome) -> None:
        """Count one outcome."""
        kind, task = outcome.kind, outcome.task
        is_new = outcome.pending not in {None, task.pending}
        self._has_begun |= (
            is_new or kind is OutcomeKind.CONVERTED or (kind is OutcomeKind.FAILED and outcome.requests > 0)
        )
        names = {OutcomeKind.SKIPPED: outcome.code, OutcomeKind.FOUND: ALREADY_DONE}
        self._count(task.job, names.get(kind, kind.value))
        numbers = {"requests": outcome.requests, "throttled": outcome.throttled, "replays": outcome.is_replay}
        numbers |= {"possible_double_charges": outcome.possible_double_charge, "paid": outcome.paid}
        self.counts.update(numbers)
        if outcome.possible_double_charge:
            self.examples.setdefault("", outcome)
        # Answers come out of order: the smallest number is the newest.
        if outcome.remaining is not None and (self.remaining is None or outcome.remaining < self.remaining):
            self.remaining = outcome.remaining
        if kind is OutcomeKind.FAILED:
            code = outcome.code if outcome.code in self.failed or len(self.failed) < self.CODES_KEPT else "other"
            self.failed[code] += 1
            self.failed_for_money[code] += not outcome.is_free
            self.examples.setdefault(code, outcome)
            self.counts["failed_permanently"] += outcome.permanent
        elif kind is OutcomeKind.CONVERTED:
            self.counts["bytes_in"] += task.source.size
            self.counts["bytes_out"] += outcome.output.size + outcome.page_bytes if outcome.output else 0
            self._latencies.append(outcome.seconds)

    def _count(self, job: str, name: str, number: int = 1) -> None:
        is_skip = name in SKIP_REASONS
        (self.skipped if is_skip else self.counts)[name] += number
        if job:
            self._by_job[job][f"skipped_{name}" if is_skip else name] += number

    @property
    def finished(self) -> int:
        """Objects that were tried and settled in this run."""
        return self.counts["converted"] + self.failed.total()

    @property
    def eligible(self) -> int:
        """Objects listed so far that there was or is something to do for."""
        return self.counts[LISTED] - self.counts[ALREADY_DONE] - self.counts["adopted"] - self.skipped.total()

    @property
    def expected(self) -> int:
        """Objects that this run is to try, as far as is known by now."""
        return self.eligible if self.is_complete else max(self.eligible, self.total or 0)

    @property
    def unaccounted(self) -> int:
        """Listed objects that have no count yet; 0 at the end of a run."""
        return self.eligible - self.finished - self.counts[LEFT]

    @property
    def in_flight(self) -> int:
        """Objects that are with the workers: handed out as soon as one is free, so no more than there are workers."""
        return max(0, min(self._settings.run.workers, self.unaccounted))

    @property
    def exit_code(self) -> ExitCode:
        """What the whole run amounts to."""
        if self.reason:
            return self.exit_code_of(self.reason)
        return ExitCode.SOME_FAILED if self.failed else ExitCode.DONE

    def exit_code_of(self, reason: RunError) -> ExitCode:
        """What the shell is told if the run ends for a reason now."""
        is_too_late = self._has_begun and reason.exit_code is ExitCode.USAGE
        return ExitCode.STOPPED if is_too_late else reason.exit_code

    @property
    def cost(self) -> float | None:
        """What the results that came in this run cost, as far as is known; None without a price."""
        price = self._settings.api.price
        return None if price is None else round(price * self.counts["paid"], 6)

    def percentile(self, percent: int) -> float | None:
        """Seconds within which so many percent of the newest conversions were done; None before the first."""
        known = sorted(self._latencies)
        return round(known[len(known) * percent // 100], 3) if known else None

    def close_accounts(self, reason: RunError | None, *, is_drained: bool) -> None:
        """Give every listed object its count. `is_drained`: every worker has left; else what it held is left to do."""
        missing = self.unaccounted
        self.reason = reason or self.reason
        if missing and is_drained and not self.reason:
            message = f"{missing} of the listed objects have no count"
            self.reason = RunError(message, "this is a bug of the program; please report it", code="bug")
        elif missing:
            self.counts[LEFT] += missing
            for counts in self._by_job.values():
                counts[LEFT] += 2 * counts[LISTED] + counts[RETRIED] - counts.total()
        elif self.is_complete and not self.counts[LEFT] and self.reason:
            # The limit was reached by the last object. No work is left, so the run succeeded.
            self.reason = None if self.reason.code in {"quota", "cap", "time"} else self.reason

    def summary(self) -> dict[str, Any]:
        """The run as `run.summary` has it; times in seconds, sizes in bytes."""
        seconds, settings, reason = time.monotonic() - self.started, self._settings, self.reason
        jobs = {job.name: {"target": job.target, **self._by_job[job.name]} for job in settings.jobs}
        counted, done = self.counts, self.counts["converted"]
        return {
            "version": __version__,
            "started": iso_time(self._started_at),
            "bucket": settings.s3.bucket,
            "shard": str(settings.shard) if settings.shard.count > 1 else None,
            "jobs": jobs,
            **{name: counted[name] for name in (LISTED, "converted", ALREADY_DONE, "adopted")},
            "skipped": dict(self.skipped.most_common()),
            "failed": dict(self.failed.most_common()),
            **{name: counted[name] for name in (LEFT, "bytes_in", "bytes_out")},
            "seconds": round(seconds, 3),
            "per_second": round(done / max(seconds, 0.001), 3),
            "p50_seconds": self.percentile(50),
            "p95_seconds": self.percentile(95),
            **{name: counted[name] for name in ("requests", "throttled", "replays", "possible_double_charges")},
            "cost": self.cost,
            "remaining": self.remaining,
            "exit_code": int(self.exit_code),
            "stopped_because": reason and reason.message,
            "stopped_code": reason and reason.code,
            "listing_complete": self.is_complete,
        }

    def line(self) -> str:
        """The end of the run in one line."""
        counts, before, seconds = self.counts, self.skipped[FAILED_BEFORE], time.monotonic() - self.started
        # Outputs between the sources are nothing that anybody would have converted.
        skipped = self.skipped.total() - before - self.skipped[OWN_OUTPUT]
        tried = f"converted {counts['converted']} in {seconds:.1f} s, already done {counts[ALREADY_DONE]}"
        failed = f"{f'failed before {before}, ' if before else ''}failed {self.failed.total()}"
        cost = "" if self.cost is None else f", cost {human_cost(self.cost)}"
        return f"{tried}, skipped {skipped}, {failed}, left {counts[LEFT]}{cost}{self._unfinished}"

    def lines(self) -> Iterator[str]:
        """The end of the run in words: what has come of it, and what to do next."""
        # Of a run that never began, zeros would hide why.
        if self.counts[LISTED] or not self.reason:
            yield f"{iso_time(time.time())} ended with exit code {int(self.exit_code)}"
            yield from (f"{name:<14}{text}" for name, text in self._figures(self.summary()))
        if self.reason:
            yield f"{iso_time(time.time())} stopped: {self.reason.message}"
            yield f"hint: {self.reason.hint}"
        elif self.counts[LEFT]:
            yield "next: run it again for what is left to do"
        permanent, earlier = self.counts["failed_permanently"], "--status counts them, --retry-failed tries them again"
        steps = {
            # To try again what has been deleted is no plan.
            "the next run tries {} of the failures again": self.failed.total() - permanent - self.failed["source_gone"],
            "{} failed for good; when the cause is removed, run it with --retry-failed": permanent,
            f"{{}} failed for good in an earlier run; {earlier}": self.skipped[FAILED_BEFORE],
        }
        yield from (f"next: {words.format(count)}" for words, count in steps.items() if count)
        if self.failed:
            yield f"failures are in {self._settings.run.failures}"

    @property
    def _unfinished(self) -> str:
        return "" if self.is_complete else "; the listing was not finished"

    def _figures(self, found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        yield "converted", f"{found['converted']}"
        yield "already done", f"{found['already_done']}"
        if found["adopted"]:
            yield "adopted", f"{found['adopted']}"
        yield from (("skipped", f"{count} {reason}") for reason, count in found["skipped"].items())
        for code, count in found["failed"].items():
            example = self.examples[code]
            yield "failed", f"{count} {printable(code)}"
            yield "", f"for example {printable(example.task.source.key)}: {printable(example.message)}"
            yield "", f"remedy: {hint_for(code)}"
        if found["left"] or not self.is_complete:
            yield "left to do", f"{found['left']}{self._unfinished}"
        yield "bytes", f"{human_bytes(found['bytes_in'])} in, {human_bytes(found['bytes_out'])} out"
        yield "time", f"{found['seconds']:.1f} s, {found['per_second']:.1f} files/s"
        if found["p50_seconds"] is not None:
            yield "latency", f"p50 {found['p50_seconds']:.2f} s, p95 {found['p95_seconds']:.2f} s"
        replays = pluralize(found["replays"], "replay")
        yield "requests", f"{found['requests']} ({found['throttled']} throttled, {replays})"
        if found["possible_double_charges"]:
            twice = pluralize(found["possible_double_charges"], "conversion")
            example = self.examples[""]
            yield "warning", f"{twice} may have been charged twice, for example {printable(example.task.source.key)}"
            why = "the API has seen the request before, from a run that this checkpoint does not know"
            yield "", f"{why}; compare with your account's usage page"
        if self.cost is not None:
            paid, price = pluralize(self.counts["paid"], "conversion"), self._settings.api.price
            yield "cost", f"{human_cost(self.cost)}: the results of {paid}, at {price:g} each (api.price)"
        if found["remaining"] is not None:
            yield "quota", f"{pluralize(found['remaining'], 'conversion')} left"


class Progress:
    """What is seen from outside while a run is at work: a bar on a terminal, lines elsewhere, and the metrics file."""

    # Of the last run that ended, and kept in the metrics while the next one is at work, and when that one fails: an
    # alert asks how old the last success is.
    KEPT = ("last_success_timestamp_seconds", "failed_for_good_objects", "last_exit_code")

    def __init__(self, settings: Settings, report: Report, clock: Callable[[], float] = time.monotonic) -> None:
        self.report, self._settings, self._clock = report, settings, clock
        # (monotonic seconds, objects finished by then), one a second of the last minute: the rate is the slope.
        self._pace: deque[tuple[float, int]] = deque([(clock(), 0)], maxlen=60)
        self._seen, self._moved = (0, 0), clock()  # (finished, listed), and when they last changed
        self._said, self._said_at = 0, clock()  # finished by the last line
        self._drawn_at, self._columns, self._metrics_due = 0.0, 0, 0.0
        self._bar: tqdm[NoReturn] | None = None
        if self.has_bar(settings):
            # Its watching thread would only redraw what is drawn five times a second anyway.
            tqdm.monitor_interval = 0
            self._bar = tqdm(bar_format="converting", file=sys.stderr, dynamic_ncols=True, mininterval=0)
        self._metrics, old = OutputFile("run.metrics", settings.run.metrics), ""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            # Who reads from a device or a pipe may wait for ever.
            old = self._metrics.path.read_text(encoding="utf-8") if self._metrics.path.is_file() else ""
        kept = re.findall(rf"^s3_bulk_convert_({'|'.join(self.KEPT)})\{{.*\}} ([0-9.]+)$", old, re.MULTILINE)
        self._kept = {name: float(value) for name, value in kept}

    @classmethod
    def has_bar(cls, settings: Settings) -> bool:
        """Whether a bar is drawn: for a person, on a terminal."""
        # A line that is written again and again looks like none in pipes, files, and the logs of CI.
        is_dumb = os.environ.get("TERM") == "dumb" or os.environ.get("CI", "") not in {"", "0", "false"}
        is_seen = sys.stderr.isatty() and cls._terminal_columns() > 0 and not is_dumb
        return is_seen and not settings.quiet and settings.log_format == "text"

    def announce(self, journal: Journal) -> None:
        """Say what is about to be done."""
        settings = self._settings
        jobs, workers = [job.name for job in settings.jobs], settings.run.workers
        message = f"converting {settings} with {workers} workers"
        log_event("start", message, level=logging.INFO, bucket=settings.s3.bucket, jobs=jobs, workers=workers)
        if settings.retry_failed:
            count = sum(sum(each["failed_for_good"].values()) for each in journal.counts() if each["configured_as"])
            message = f"--retry-failed: {pluralize(count, 'object')} that failed for good will be tried again"
            log_event("retry", message, level=logging.INFO, count=count)

    def show(self) -> None:
        """Bring what is shown up to date. Called several times a second, whether or not anything has come."""
        report, now, step = self.report, self._clock(), self._settings.run.log_every
        # A pass over objects that are done already finishes nothing, and is not silent either.
        seen = (report.finished, report.counts[LISTED])
        if seen != self._seen:
            self._seen, self._moved = seen, now
        if now - self._pace[-1][0] >= 1:
            self._pace.append((now, report.finished))
        if self._bar is not None:
            if now - self._drawn_at >= 0.2:
                self._drawn_at = now
                self._draw(self._bar)
        elif report.finished >= self._said + step or now - self._said_at >= LINE_SECONDS:
            self._said, self._said_at = report.finished - report.finished % step, now
            numbers = self._numbers()
            log_event("progress", ", ".join(self._words(numbers)), level=logging.INFO, **numbers)
        if now >= self._metrics_due:
            self._metrics_due = now + 15  # seconds, as often as Prometheus asks by default
            # Errors and their tracebacks hold each other, and some are old before they are over; see `main`.
            gc.collect()
            self._write_metrics(is_running=True)

    def finish(self) -> None:
        """Show how the run has ended: leave the bar as it is, and write the last metrics."""
        report, kept = self.report, self._kept
        if self._bar is not None:
            self._draw(self._bar)
            self._bar.close()
        permanent: float = report.counts["failed_permanently"] + report.skipped[FAILED_BEFORE]
        if self._settings.keys_from or not report.is_complete:
            # A run that has not seen everything does not know that there are fewer than before.
            permanent = max(permanent, kept.get("failed_for_good_objects", 0))
        kept |= {"last_exit_code": report.exit_code, "failed_for_good_objects": permanent}
        if report.exit_code is ExitCode.DONE:
            kept["last_success_timestamp_seconds"] = time.time()
        self._write_metrics(is_running=False)

    def _numbers(self) -> dict[str, Any]:
        """What the bar, a line and a JSON record say, under the names that the last has."""
        report, now, (since, before) = self.report, self._clock(), self._pace[0]
        rate = (report.finished - before) / max(now - since, 0.001)
        silence, is_final = now - self._moved, report.is_complete or report.total is not None
        return {
            "done": report.finished,
            "total": report.expected,
            "total_is_final": is_final,
            "listed": report.counts[LISTED],
            "failed": report.failed.total(),
            "per_second": round(rate, 3),
            # As far as it is listed by now, it would be seconds for hours.
            "eta_seconds": round(max(0, report.expected - report.finished) / rate) if rate and is_final else None,
            "p95_seconds": report.percentile(95),
            "remaining": report.remaining,
            "in_flight": report.in_flight,
            "is_stopping": report.announced is not None,
            # The time of the day, with its offset from UTC, so that two servers' logs can be compared.
            "silent_since": iso_time(time.time() - silence)[11:] if silence >= SILENCE_SECONDS else None,
        }

    @staticmethod
    def _words(numbers: Mapping[str, Any]) -> Iterator[str]:
        """The numbers of a moment in words, the more important ones first: a narrow terminal shows only those."""
        yield f"{numbers['done']} of {'' if numbers['total_is_final'] else '~'}{numbers['total']} done"
        yield f"{numbers['failed']} failed"
        yield f"{numbers['per_second']:.1f} files/s"
        if numbers["is_stopping"]:
            yield f"stopping, {numbers['in_flight']} in flight"
        elif numbers["silent_since"]:
            missed = f"{numbers['in_flight']} in flight" if numbers["in_flight"] else "the listing"
            yield f"nothing since {numbers['silent_since']}: waiting for {missed}"
        elif numbers["eta_seconds"] is not None:
            yield f"ETA {timedelta(seconds=numbers['eta_seconds'])}"
        if numbers["p95_seconds"] is not None:
            yield f"p95 {numbers['p95_seconds']:.2f} s"
        if numbers["remaining"] is not None:
            yield f"quota {numbers['remaining']}"
        if not numbers["total"]:
            yield f"{numbers['listed']} listed"

    def _draw(self, bar: "tqdm[NoReturn]") -> None:
        # The width is asked for each time, because it is drawn five times a second anyway: no signal need be heard.
        columns = self._terminal_columns()
        if columns != self._columns:
            # tqdm pads a line to the length of the last one, which would run over the edge of a window made smaller.
            bar.fp.write("\r\x1b[J")
            bar.sp = bar.status_printer(bar.fp)
            self._columns = columns
        count, *more = self._words(self._numbers())
        while more and len(f"{count} |{10 * ' '}| {', '.join(more)}") > columns:
            more.pop()
        bar.bar_format = f"{count} |{{bar}}| {', '.join(more)}"
        bar.n, bar.total = self.report.finished, self.report.expected
        bar.refresh()

    @staticmethod
    def _terminal_columns() -> int:
        try:
            return os.get_terminal_size(sys.stderr.fileno()).columns
        except (OSError, ValueError):
            return 0  # there is no terminal, or none that knows

    def _write_metrics(self, *, is_running: bool) -> None:
        """Write the run so far in Prometheus' text format. What is not known (None) has no sample."""
        report, labelled = self.report, {"skipped": "reason", "failed": "code"}
        known = {**report.summary(), "skipped": {reason: report.skipped[reason] for reason in SKIP_REASONS}}
        known |= {"expected": report.expected, "in_flight": report.in_flight, "is_running": is_running, **self._kept}
        # The checkpoint is what sets one run apart from another whose file the same node_exporter reads.
        # Its path may have bytes that are no text.
        checkpoint = self._settings.run.checkpoint.encode("utf-8", "backslashreplace").decode()
        common = {"bucket": known["bucket"], "checkpoint": checkpoint}
        escapes, lines = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"}), list[str]()
        for name, (figure, about) in METRICS.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP s3_bulk_convert_{name} {about}", f"# TYPE s3_bulk_convert_{name} {kind}"]
            value = known.get(figure)
            samples = value.items() if isinstance(value, dict) else [] if value is None else [("", value)]
            for text, number in samples:
                labels = common | ({labelled[figure]: text} if figure in labelled else {})
                pairs = ",".join(f'{label}="{value.translate(escapes)}"' for label, value in labels.items())
                lines.append(f"s3_bulk_convert_{name}{{{pairs}}} {round(number, 6)}")
        self._metrics.replace("\n".join(lines) + "\n")


class SeenSoFar(contextlib.AbstractContextManager["SeenSoFar"]):
    """How far a command that looks at a whole bucket has come: a bar on a terminal, a line a minute elsewhere."""

    def __init__(self, settings: Settings) -> None:
        self._said_at = time.monotonic()
        self.is_drawn = Progress.has_bar(settings) and not log.isEnabledFor(logging.DEBUG)
        self._bar: tqdm[NoReturn] = tqdm(
            unit=" objects", file=sys.stderr, dynamic_ncols=True, leave=False, disable=not self.is_drawn
        )

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, seen: int, total: int = 0) -> None:
        """Show how many objects were seen, and of how many if that is known."""
        self._bar.total = total if total >= seen else None
        self._bar.update(seen - self._bar.n)
        if not self.is_drawn and time.monotonic() - self._said_at > LINE_SECONDS:
            self._said_at = time.monotonic()
            log.info("%d objects listed so far", seen)


class Recorder:
    """Settles outcomes: failures file, then journal, then report, so that nothing is counted that is not written."""

    def __init__(
        self, settings: Settings, stop: StopFlag, journal: Journal, progress: Progress, at_work: set[tuple[str, str]]
    ) -> None:
        """`at_work`: see Planner; what is settled is taken out of it."""
        self._run, self._bucket, self._stop, self._at_work = settings.run, settings.s3.bucket, stop, at_work
        self._journal, self._report, self._progress = journal, progress.report, progress
        self._failures = OutputFile("run.failures", settings.run.failures)
        self._can_write = True
        # Failures in a row for one reason, not yet settled: the next outcome says whether they speak of all objects.
        self._streak: list[Outcome] = []

    def record(self, messages: queue.Queue[Message]) -> bool:
        """Settle all that comes until every worker has left. False if some had to be abandoned after the grace."""
        # The feeder may outlive the workers, and waits for room for its messages.
        working = self._run.consumers + 1
        self._progress.show()
        while working:
            settled = list[Outcome]()
            for message in self._next_batch(messages):
                if message is None:
                    working -= 1
                elif isinstance(message, Outcome):
                    settled += self._release(message)
                else:
                    self._report.apply(message)
            self._settle(settled)
            if time.monotonic() - self._report.started > self._run.max_runtime:
                hint = "run it again: it goes on where this run ended"
                self._stop.request(RunError("run.max_runtime is over", hint, code="time"))
            self._announce_stop()
            self._progress.show()
            if time.monotonic() - self._stop.signalled_at > self._run.shutdown_grace:
                break
        self._settle(list(map(self._with_history, self._streak)))
        return not working

    @staticmethod
    def _next_batch(messages: queue.Queue[Message]) -> list[Message]:
        """The messages of a moment, after waiting for the first of them: they are committed together."""
        batch: list[Message] = []
        # Not for ever: a signal, a time limit and a bar want attention while the API is silent.
        with contextlib.suppress(queue.Empty):
            batch.append(messages.get(timeout=0.2))
            closes_at = time.monotonic() + COMMIT_SECONDS
            while len(batch) < 500:
                batch.append(messages.get(timeout=max(0.0, closes_at - time.monotonic())))
        return batch

    def _release(self, outcome: Outcome) -> list[Outcome]:
        """What can be settled now: nothing while failures come in a row, all of them when that is over."""
        has_failed = outcome.kind is OutcomeKind.FAILED
        is_own_fault = has_failed and (outcome.permanent or outcome.is_free)
        if is_own_fault or not (has_failed or outcome.kind is OutcomeKind.CONVERTED):
            return [outcome]  # it says nothing of the API, nor of writing to S3
        settled = list[Outcome]()
        if self._streak and not (has_failed and outcome.code == self._streak[0].code):
            settled, self._streak = list(map(self._with_history, self._streak)), []
        if not has_failed:
            return [*settled, outcome]
        self._streak.append(outcome)
        if len(self._streak) < 10:
            return settled
        reason = printable(f"{outcome.code} {outcome.message}".rstrip())
        said = f"{len(self._streak)} objects in a row failed for the same reason: {reason}"
        self._stop.request(RunError(said, hint_for(outcome.code), code="same_failure"))
        held, self._streak = self._streak, []
        return [self._with_history(each, counts=False) for each in held]

    @staticmethod
    def _with_history(outcome: Outcome, *, counts: bool = True) -> Outcome:
        """A failure that knows in how many runs its version has failed: after five, it has failed permanently.

        `counts`: whether this run is one of them. If not, the next one still tries it after all others.
        """
        known = outcome.task.known_version
        runs = counts + (known.runs_failed if known else 0)
        if runs < 5 or not counts:
            return replace(outcome, runs_failed=runs)
        said = f"failed in {runs} runs, at last with {outcome.code}: {outcome.message}"
        return replace(outcome, code="gave_up", message=said, permanent=True, runs_failed=runs)

    def _settle(self, settled: Sequence[Outcome]) -> None:
        """Write outcomes down and count them. What cannot be written is left to do: its request is still recorded."""
        lines = [self._failure_line(outcome) for outcome in settled if outcome.kind is OutcomeKind.FAILED]
        try:
            # Failures first: after a crash in between, a line is there twice, never missing.
            if lines and self._can_write:
                self._failures.append("".join(lines))
            if settled and self._can_write:
                self._journal.settle(settled, time.time())
                self._at_work.difference_update((each.task.job, each.task.source.key) for each in settled)
        except RunError as error:
            self._can_write = False
            self._stop.request(error)
        for outcome in settled:
            self._report.add(outcome if self._can_write else replace(outcome, kind=OutcomeKind.LEFT))
        costly = self._report.failed_for_money
        most, failed = self._run.max_failure_rate, costly.total()
        tried = self._report.counts["converted"] + failed
        if tried >= FAILURES_BEFORE_RATE_COUNTS and failed > most * tried:
            reasons = ", ".join(f"{printable(code)} {count}" for code, count in costly.most_common(3))
            message = f"{failed} of {tried} failed ({reasons}), more than run.max_failure_rate = {100 * most:.3g}%"
            hint = f"see {self._run.failures}; then run it again, or raise run.max_failure_rate"
            self._stop.request(RunError(message, hint, code="failure_rate"))

    def _failure_line(self, outcome: Outcome) -> str:
        task, source = outcome.task, outcome.task.source
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        fields: dict[str, object] = {"ts": now, "job": task.job, "bucket": self._bucket}
        fields |= {"key": source.key, "etag": source.version, "size": source.size, "target": task.target}
        fields |= {"status": outcome.status, "code": outcome.code, "message": outcome.message}
        fields |= {"attempts": outcome.requests, "permanent": outcome.permanent}
        return json.dumps(fields, ensure_ascii=False) + "\n"

    def _announce_stop(self) -> None:
        # A signal takes the place of another reason.
        if (reason := self._stop.reason) is None or reason is self._report.announced:
            return
        self._report.announced = reason
        grace = f" for up to {self._run.shutdown_grace:.0f} s; once more ends it at once"
        message = f"{reason.message}; waiting for what is in flight{grace if reason.is_by_signal else ''}"
        code = int(self._report.exit_code_of(reason))
        log_event("stop", message, because=reason.message, hint=reason.hint, exit_code=code)


########################################################################################################################
# Commands. `run` alone knows all the rooms.
########################################################################################################################


def run(settings: Settings, stop: StopFlag) -> Report:
    """Convert what there is to convert. Raises RunError if nothing could be started."""
    checkpoint = Path(settings.run.checkpoint)
    for name in ("failures", "summary", "metrics"):
        OutputFile(f"run.{name}", getattr(settings.run, name)).require_writable()
    Trouble.require_open_files(settings.run.workers)
    if settings.run.processes > 1 and not os.path.isfile(globals().get("__file__", "")):
        # Other processes read it as well.
        raise usage_error("run.processes needs this program as a file", "save it, and start that; or set it to 1")
    Trouble.require_certificates(settings.api.url, "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
    with contextlib.ExitStack() as held:
        held.enter_context(RunLock(checkpoint))
        bucket = Bucket(settings, stop)
        journal = held.enter_context(Journal(checkpoint, bucket.endpoint, settings))
        journal.begin_run(time.time())
        workers, processes = settings.run.workers, settings.run.processes
        tasks, messages = Tasks(2 * workers), queue.Queue[Message](8 * workers)
        ledger = Ledger(journal, settings)
        context = WorkerContext(settings, stop, bucket, ledger, tasks, messages.put)
        report = Report(settings)
        progress = Progress(settings, report)
        stop.in_flight = lambda: report.in_flight
        progress.announce(journal)
        feeder = Feeder(context, journal)
        consumers = [context.work] * workers
        if processes > 1:
            parts = [Shard(part, processes).share(workers) for part in range(processes)]
            consumers = [ProcessSupervisor(context, part).run for part in parts]
        # The feeder is one more thread. The pool's own queue has no bound, so each thread runs one loop for its life.
        pool = ThreadPoolExecutor(settings.run.consumers + 1)
        try:
            if not (settings.quiet or settings.keys_from):
                threading.Thread(target=feeder.count_total, name="total", daemon=True).start()
            # The feeder comes last: where the system has not enough threads, nothing has been listed or sent.
            for function in (*consumers, feeder.run):
                pool.submit(context.guard, function).add_done_callback(lambda _: messages.put(None))
        except RuntimeError:
            for _ in range(settings.run.consumers):
                tasks.put(None)
            raise
        # The main thread records, because it is the one that signals wake.
        recorder = Recorder(settings, stop, journal, progress, feeder.planner.at_work)
        is_drained = recorder.record(messages)
        pool.shutdown(wait=is_drained)
        # Those of workers that had to be abandoned count too.
        report.counts["requests"] = max(report.counts["requests"], context.limiter.requests)
        report.close_accounts(stop.reason or ledger.reason, is_drained=is_drained)
        progress.finish()
        # All outcomes are settled: that there is no room for this is not the run's failure.
        with contextlib.suppress(RunError):
            # A file of keys names some objects, and a request for another one is as much needed as before.
            has_seen_all = not (report.reason or settings.keys_from)
            journal.end_run(time.time(), report.exit_code, has_seen_all=has_seen_all)
        for kind, warning in feeder.planner.warnings.items():
            log_event("warning", warning, kind=kind)
        OutputFile("run.summary", settings.run.summary).replace(settings.json(report.summary(), indent=2) + "\n")
        return report


########################################################################################################################
# Looking. Commands that convert nothing and leave nothing behind: `--dry-run` and `--why` consume the decisions of the
# plan, with a worker's looks where they decide; `--status` reads the checkpoint alone; `--check` does what a run does.
# None takes the lock: a run may be at work.
########################################################################################################################


def print_line(line: str) -> None:
    """Print a line at once. Raises RunError if it cannot be written."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        pass  # who does not read on wants no more
    except OSError as problem:
        message = f"stdout cannot be written: {problem.strerror}"
        raise RunError(message, "free some space, or send it elsewhere", code="disk") from None


class Estimate:
    """What the next run would do and take: counts of decisions, each as a worker's looks would leave it."""

    def __init__(self, settings: Settings, latencies: Sequence[float]) -> None:
        self.settings, self.usage, self.usage_problem = settings, Usage(), "the API does not say"
        self.listed = self.pages_asked = 0  # objects; pages of listings
        self._found = 0  # outputs that lie there, of objects that the checkpoint does not know as done
        self.plan_warnings: Iterable[str] = ()
        self._latencies = latencies  # seconds, of some conversions
        # As the document has them; under "" what no job wants.
        zeros = dict.fromkeys(("convert", "anew", "bytes", "resume", "copy", RETRIED, ALREADY_DONE), 0)
        self._jobs: dict[str, dict[str, Any]] = {
            name: {**zeros, "skipped": Counter(), "failed": Counter()}
            for name in ("", *(job.name for job in settings.jobs))
        }
        self._examples: dict[str, dict[str, str]] = {}  # of failures, by code

    @classmethod
    def make(cls, settings: Settings) -> "Estimate":
        """Plan all that a run would plan. Raises RunError where it could not even look."""
        bucket, checkpoint = Bucket(settings), Path(settings.run.checkpoint)
        with (
            Journal(checkpoint, bucket.endpoint, settings, read_only=True) as journal,
            SeenSoFar(settings) as so_far,
        ):
            estimate, planner = cls(settings, journal.latencies()), Planner(settings, bucket, journal, StopFlag())
            bucket.check()
            if settings.repair:
                verification = Verification(Planner(settings, bucket, journal, StopFlag()))
                for _ in verification.repair():
                    so_far.show(verification.seen)
                planner.warnings |= verification.warnings()
            for page in planner.foreseen():
                for decision in page:
                    estimate.add(decision)
                so_far.show(estimate.listed)
        estimate.pages_asked, estimate.plan_warnings = bucket.pages_asked, planner.warnings.values()
        # What the month has left, where the API says it; an estimate is one without it, too.
        try:
            if not settings.api.key:
                raise usage_error("there is no API key", settings.key_problem)
            estimate.usage = Usage.ask(settings.api)
        except RunError as problem:
            estimate.usage_problem = f"{problem.message}; {problem.hint}"
        return estimate

    def add(self, decision: Decision) -> None:
        """Count one decision."""
        job, kind, source, code = self._jobs[decision.job], decision.kind, decision.source, decision.reason
        known = decision.task and decision.task.known
        self.listed += not decision.is_retry
        self._found += kind is DecisionKind.DONE and decision.task is not None
        if kind in {DecisionKind.SKIP, DecisionKind.FAIL}:
            job[kind.value][code] += 1
        elif kind is not DecisionKind.POSTPONE:
            job[kind.value] += 1
            job["bytes"] += source.size if kind is DecisionKind.CONVERT else 0
            job["anew"] += kind is DecisionKind.CONVERT and decision.is_anew
            has_failed = known and (known.version, known.event) == (source.version, OutcomeKind.FAILED.value)
            job[RETRIED] += bool(has_failed and kind is not DecisionKind.DONE)
        if kind is DecisionKind.FAIL:
            example = {"key": source.key, "said": decision.message, "remedy": hint_for(code)}
            self._examples.setdefault(code, example)

    def document(self) -> dict[str, Any]:
        """All of it as JSON has it; times in seconds, sizes in bytes."""
        settings, usage, cap, jobs = self.settings, self.usage, self.settings.api.max_conversions, self._jobs.values()
        convert, resume, copy = (sum(job[kind] for job in jobs) for kind in ("convert", "resume", "copy"))
        # At the most: of those in flight, the API may have done none yet.
        conversions = convert + resume
        in_one_run = conversions if cap is None else min(cap, conversions)
        # This shard's share of the smaller limit, as far as limits are known before anything is sent.
        limits = [limit for limit in (settings.api.requests_per_minute, usage.requests_per_minute) if limit]
        rate = min(limits) / settings.shard.count if limits else None
        # Where no latency is known, it is the API's own median for files under 5 MB.
        latency = statistics.median(self._latencies or [0.8])
        price = settings.api.price
        tagged = conversions + copy + self._found if settings.s3.tag_source else 0
        return {
            LISTED: self.listed,
            "skipped": self._jobs[""]["skipped"],
            "jobs": {name: job for name, job in self._jobs.items() if name},
            "examples": self._examples,
            "conversions": conversions,
            "conversions_in_one_run": in_one_run,
            "max_conversions": cap,
            "cost": None if price is None else round(price * conversions, 6),
            "cost_in_one_run": None if price is None else round(price * in_one_run, 6),
            "plan": usage.plan,
            "monthly_limit": usage.monthly_limit,
            "remaining": usage.remaining,
            "requests_per_minute": rate,
            "latency_seconds": round(latency, 3),
            "latency_is_measured": bool(self._latencies),
            "workers_that_fill_the_rate": math.ceil(rate / 60 * latency) if rate else None,
            # Bound by the rate or by the workers.
            "seconds": round(in_one_run * max(60 / rate if rate else 0.0, latency / settings.run.workers)),
            "s3_requests": {"LIST": self.pages_asked, "HEAD": 3 * conversions + tagged, "COPY": copy}
            | dict.fromkeys(("GET", "PUT"), conversions + tagged),
            "warnings": [*self.plan_warnings, *self._warnings(conversions, in_one_run)],
        }

    def _warnings(self, conversions: int, in_one_run: int) -> Iterator[str]:
        left, keep, parts = self.usage.remaining, self.settings.api.keep_remaining, self.settings.shard.count
        of_all = f" for all {parts} shards, if each needs as many," if parts > 1 else ""
        in_one_run *= parts
        if left is None:
            unknown = f"what the month has left is not known ({self.usage_problem})"
            yield f"{unknown}, and plans may bill what is beyond it: see --limit"
        elif keep and in_one_run > left - keep:
            yield f"the run would stop when{of_all} {keep} conversions are left (api.keep_remaining)"
        elif in_one_run > left:
            refuses = self.usage.bills_overage is False
            what = "are refused, and the run stops there" if refuses else "are billed as overage"
            more = f"{in_one_run - left} conversions more than the month has left{of_all} {what}"
            yield f"{more}; --limit {left} keeps within it" if left else more
        if anew := sum(job["anew"] for job in self._jobs.values()):
            yield f"{anew} of the objects to convert {ANEW}"
        by_code = itertools.chain.from_iterable(job["failed"].items() for job in self._jobs.values())
        failures = sum(count for code, count in by_code if code not in FREE_FAILURES)
        tried, most = conversions + failures, self.settings.run.max_failure_rate
        if tried >= FAILURES_BEFORE_RATE_COUNTS and failures > most * tried:
            yield f"{failures} of {tried} would fail, more than run.max_failure_rate: the run would stop early"

    def lines(self) -> Iterator[str]:
        """All of it in words."""
        found, workers = self.document(), self.settings.run.workers
        yield f"{self.settings}: {found[LISTED]} listed"
        if_any = {
            "resume": "  in flight   {}, asked for again: free of charge where the API has done the work",
            "copy": "  to copy     {} within S3, free of charge",
            RETRIED: "  of these    {} failed before and would be tried again",
        }
        for name, job in found["jobs"].items():
            yield f"job {name}"
            yield f"  to convert  {job['convert']}, {human_bytes(job['bytes'])}"
            yield from (text.format(job[what]) for what, text in if_any.items() if job[what])
            yield f"  done        {job[ALREADY_DONE]} already"
            yield from (f"  skipped     {count} {reason}" for reason, count in job["skipped"].items())
            for code, count in job["failed"].items():
                key, said, remedy = found["examples"][code].values()
                yield f"  would fail  {count} {code}, for example {printable(key)}: {printable(said)}"
                yield f"              remedy: {remedy}"
        yield from (f"skipped       {count} {reason}" for reason, count in found["skipped"].items())
        cap, left, rate = found["max_conversions"], found["remaining"], found["requests_per_minute"]
        in_one_run = f", {found['conversions_in_one_run']} of them in the next run (api.max_conversions = {cap})"
        month = "" if left is None else f"; {left} are left of this month's {found['monthly_limit'] or 'quota'}"
        yield f"conversions   {found['conversions']} to pay for at the most{'' if cap is None else in_one_run}{month}"
        if found["cost"] is not None:
            next_run = "" if cap is None else f", {human_cost(found['cost_in_one_run'])} of it in the next run"
            at = f"at {self.settings.api.price:g} each (api.price)"
            yield f"cost          {human_cost(found['cost'])} at the most{next_run}, {at}"
        source = "as measured" if found["latency_is_measured"] else "as the API publishes"
        pace = f"{workers} workers at {found['latency_seconds']:.1f} s each ({source})"
        pace = f"{pace}; the rate limit is not known" if rate is None else f"{rate:.0f} requests a minute, {pace}"
        if (enough := found["workers_that_fill_the_rate"]) not in {None, workers}:
            pace = f"{pace}; {pluralize(enough, 'worker')} would fill that rate (run.workers)"
        yield f"time          about {human_seconds(found['seconds'])}: {pace}"
        asked = ", ".join(f"{count} {name}" for name, count in found["s3_requests"].items() if count)
        unpacks = any(job.pages == "unpack" for job in self.settings.jobs)
        yield f"S3 requests   {asked}{', and a HEAD and a PUT for each page' if unpacks else ''}"
        yield from (f"warning       {warning}" for warning in found["warnings"])
        yield "nothing was sent to be converted, and nothing was written"


class Proof:
    """What `--verify` says: each output beside what was stored."""

    FINDINGS_KEPT = 1_000  # of a kind, in JSON: it fills no memory

    def __init__(self, settings: Settings, verification: Verification) -> None:
        self._settings, self._verification = settings, verification
        self._counts, self._findings = verification.counts, list[dict[str, str]]()

    @classmethod
    def make(cls, settings: Settings) -> "Proof":
        """Look at everything; with -v, print each finding at once. Raises RunError."""
        stop = StopFlag()
        bucket = Bucket(settings, stop)
        bucket.check()
        with (
            Journal(Path(settings.run.checkpoint), bucket.endpoint, settings, read_only=True) as journal,
            SeenSoFar(settings) as so_far,
        ):
            if not journal.is_there:
                log.warning("there is no checkpoint %s: what outputs say of themselves is looked at", journal.path)
            planner = Planner(settings, bucket, journal, stop)
            verification = Verification(planner)
            proof = cls(settings, verification)
            if so_far.is_drawn:
                # As far as the checkpoint tells. To count it takes seconds, and is for a bar alone.
                done = [each for each in journal.counts() if each["configured_as"]]
                verification.expected = 2 * sum(each[event] for each in done for event in DONE_EVENTS)
            for findings in verification.pages():
                so_far.show(verification.seen, verification.expected)
                for finding in findings:
                    proof._take(finding)
        for kind, warning in planner.warnings.items():
            log_event("warning", warning, kind=kind)
        return proof

    @property
    def exit_code(self) -> ExitCode:
        """Whether what was stored is there."""
        return ExitCode.SOME_FAILED if self._counts[MISSING] or self._counts[ALTERED] else ExitCode.DONE

    def _take(self, finding: Finding) -> None:
        is_kept = self._counts[finding.kind] <= self.FINDINGS_KEPT
        if self._settings.log_format == "json" and is_kept:
            self._findings.append(finding._asdict())
        elif self._settings.log_format == "text" and log.isEnabledFor(logging.DEBUG):
            print_line(self._settings.hide(f"{finding.kind:<14}{self._words(finding)}"))

    @staticmethod
    def _words(finding: Finding) -> str:
        source = f" (of {printable(finding.key)})" if finding.key else ""
        return f"{printable(finding.output_key)}{source}: {printable(finding.message)}"

    def document(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        counts = {kind: self._counts[kind] for kind in (VERIFIED, *FINDINGS)}
        return {"bucket": self._settings.s3.bucket, **counts, "findings": self._findings}

    def lines(self) -> Iterator[str]:
        """All of it in words; the last line says what to do."""
        counts, settings = self._counts, self._settings
        if not settings.quiet:
            yield f"{VERIFIED:<14}{counts[VERIFIED]}"
            for kind, remedy in FINDINGS.items():
                yield f"{kind:<14}{counts[kind]}"
                if example := self._verification.examples.get(kind):
                    yield f"              for example {self._words(example)}"
                    yield f"              remedy: {remedy}"
        wrong = [kind for kind in (MISSING, ALTERED) if counts[kind]]
        said = [f"; {counts[kind]} {kind}: {FINDINGS[kind]}" for kind in wrong]
        if left_out := self._verification.left_out:
            said.insert(1, f", but for {left_out} whose sources are left out by now")
        yield f"{VERIFIED} {counts[VERIFIED]} of {sum(counts[kind] for kind in (VERIFIED, *wrong))}{''.join(said)}"


class Status:
    """What `--status` says: all that the checkpoint knows, of these jobs and of others."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def document(self) -> dict[str, Any]:
        """All of it as JSON has it. Raises RunError if there is no checkpoint, or none that can be read."""
        path = Path(self._settings.run.checkpoint)
        holder = RunLock(path).holder()
        with Journal(path, "", self._settings, read_only=True) as journal:
            if not journal.is_there:
                stem, ending = map(re.escape, os.path.splitext(path.name))
                names = sorted(other.name for other in path.parent.glob("*"))
                shards = (re.fullmatch(rf"{stem}\.(\d+)-of-(\d+){ending}", name) for name in names)
                hint = "start it where the runs are started, or set run.checkpoint"
                if found := next(filter(None, shards), None):
                    hint = f"{found[0]} is here: give --shard {found[1]}/{found[2]}"
                raise usage_error(f"there is no checkpoint {path}", hint)
            (size, written), last, jobs = journal.size_and_time(), journal.last_run(), list(journal.counts())
        for job in jobs:
            job["oldest_sent_at"] = job["oldest_sent_at"] and iso_time(job["oldest_sent_at"])
        began, ended, code = last or (None, None, None)
        return {
            "checkpoint": str(path),
            "checkpoint_bytes": size,
            "run": holder and holder._asdict(),
            "last_run": began and {"began": iso_time(began), "ended": ended and iso_time(ended), "exit_code": code},
            "last_activity": iso_time(written),
            "jobs": jobs,
        }

    def lines(self) -> Iterator[str]:
        """All of it in words. Raises RunError as `document` does."""
        found = self.document()
        run, last = found["run"], found["last_run"]
        yield f"checkpoint     {found['checkpoint']}, {human_bytes(found['checkpoint_bytes'])}"
        yield f"run            {f'at work: {LockHolder(**run)}' if run else 'none is at work'}"
        if last and not run:
            how = "did not come to its end"
            if last["ended"]:
                how = f"ended {local_date(last['ended'])} with exit code {last['exit_code']}"
            yield f"last run       began {local_date(last['began'])}, {how}"
        yield f"last activity  {local_date(found['last_activity'])}"
        for job in found["jobs"]:
            ours = job["configured_as"]
            named = f"job {ours}" if ours else f"{job['job']}, no job of this configuration"
            yield ""
            yield f"s3://{job['bucket']} to {job['target']} in s3://{job['output_bucket']}/{job['output_key']}: {named}"
            yield f"  converted    {job['converted']}"
            yield f"  found        {job['found']}"
            if job["adopted"]:
                yield f"  adopted      {job['adopted']}"
            if job[LOST]:
                yield f"  lost         {job[LOST]}, whose outputs are gone, to be converted again by the next run"
            for state, words in (("failed_for_good", "for good"), ("failed_for_now", "for now")):
                by_code = Counter(job[state])
                listed = ", ".join(f"{printable(code)} {count}" for code, count in by_code.most_common())
                yield f"  failed       {by_code.total()} {words}{listed and f': {listed}'}"
            is_interrupted = job["in_flight"] and not run
            step = ", asked for again by the next run" if is_interrupted else ""
            oldest = f", the oldest since {local_date(job['oldest_sent_at'])}" if job["oldest_sent_at"] else ""
            yield f"  {'interrupted' if is_interrupted else 'in flight':<11}  {job['in_flight']}{step}{oldest}"
            if is_interrupted and job["not_asked_for"]:
                gone = "the last run did not meet: deleted, or wanted by no job; forgotten after a week"
                yield f"  of these     {job['not_asked_for']} {gone}"
            if job["possible_double_charges"]:
                twice = pluralize(job["possible_double_charges"], "conversion")
                yield f"  warning      {twice} may have been charged twice"


# How "the next run would" ends: by the reason of what it would do, or else by its kind.
NEXT_STEPS = {
    ALREADY_DONE: f"leave it: {ALREADY_DONE}",
    OutcomeKind.FOUND.value: "find its output, which is there, and pay nothing",
    OutcomeKind.ADOPTED.value: "adopt the output that is there, and pay nothing",
    FAILED_BEFORE: "leave it: it failed for good before; --retry-failed tries it again",
    SAME_FORMAT: "leave it: same_format: it is in the target format already; see convert.same_format",
    NOT_MATCHED: "leave it: not_matched: globs, sizes or ages leave it out; see convert.include",
    OWN_OUTPUT: "leave it: own_output: this program has made it, or it lies where outputs go; see s3.output_key",
    "not_listed": "not list it, for {message}",
    "other_shard": "leave it: {message}",
    "absent": "do nothing: {message}",
    "stopped": "stop before it: {message}",
    DecisionKind.SKIP.value: "leave it: {reason}",
    DecisionKind.FAIL.value: "fail: {reason}, {message}",
    DecisionKind.COPY.value: "copy it, at no charge",
    DecisionKind.RESUME.value: "send the request in flight again, "
    "which the API answers free of charge if it has done the work",
    DecisionKind.CONVERT.value: "convert it to {target}, which is paid for",
}


# What may lie under an output key, in words.
MADE_OF = {
    "this_version": "made of this version",
    "other_options": "made of this version with other options",
    "another_version": "made of another version, {version}",
    "another_object": "no output of this object",
    "unmarked": "without this program's mark",
    "adopted": "without this program's mark, and was adopted",
}


class Why:
    """What `--why` says: all that is known about one object, and what the next run would do with it."""

    HISTORY_ROWS = 10  # an object that fails in every run has a row of each

    def __init__(self, settings: Settings, given: str) -> None:
        try:
            given.encode()
        except UnicodeEncodeError:
            message = "--why: the key is not UTF-8, and S3 has no such keys"
            raise usage_error(message, "check the terminal's locale") from None
        self._settings, self._key = settings, given.removeprefix(f"s3://{settings.s3.bucket}/")
        if not self._key:
            raise usage_error("--why: there is no key", "give the key of an object, such as photos/a.png")

    def document(self) -> dict[str, Any]:
        """The answer as JSON has it. Raises RunError if the checkpoint cannot be read, or if S3 answers no more."""
        settings, bucket, source, problem = self._settings, None, None, ""
        try:
            bucket = Bucket(settings)
            bucket.check()
            source = bucket.find(self._key)
        except RunError as error:
            problem = f"{error.message}; {error.hint}"
        endpoint = bucket.endpoint if bucket else settings.s3.endpoint_url or "aws"
        with Journal(Path(settings.run.checkpoint), endpoint, settings, read_only=True) as journal:
            bucket = None if problem else bucket
            history = [self._event(row) for row in journal.history(self._key)]
            jobs = [self._of_job(job, journal, bucket, source, history) for job in settings.jobs]
            planner = Planner(settings, bucket, journal, StopFlag()) if bucket else None
            for job, (kind, reason, message) in zip(jobs, self._steps(planner, source, problem), strict=True):
                words, said = NEXT_STEPS.get(reason) or NEXT_STEPS[kind], printable(message) if bucket else message
                step = words.format(reason=reason, message=said, target=job["target"])
                job["next"] = {"kind": kind, "reason": reason or None, "message": message or None, "step": step}
                job["repair"] = self._repair(job)
            in_flight = [
                {
                    "job": sent["name"],
                    "sent_at": iso_time(sent["sent_at"]),
                    "output_key": sent["slot"].removeprefix(f"{sent['output_bucket']}/"),
                    "etag": sent["etag"],
                }
                for sent in journal.requests_of(self._key)
            ]
        return {
            "bucket": settings.s3.bucket,
            "key": self._key,
            "checkpoint": str(journal.path),
            "checkpoint_exists": journal.is_there,
            "history": history[: self.HISTORY_ROWS],
            "in_flight": in_flight,  # without URLs, which are signed
            "s3_problem": problem or None,
            "in_bucket": source
            and {
                "bytes": source.size,
                "etag": source.version,
                "modified": iso_time(source.modified),
                "archived": source.archived,
            },
            "jobs": jobs,
        }

    def lines(self) -> Iterator[str]:
        """The answer in words; the last line is about the next run. Raises RunError as `document` does."""
        found = self.document()
        history, source = found["history"], found["in_bucket"]
        yield f"object         s3://{found['bucket']}/{printable(found['key'])}"
        known = "newest first:" if history else "it has not been converted, found or failed"
        absent = f"there is none ({found['checkpoint']})"
        yield f"checkpoint     {known if found['checkpoint_exists'] else absent}"
        for row in history:
            told = f"as {printable(row['output_key'])}" if row["output_key"] else row["code"]
            if row["event"] == OutcomeKind.FAILED.value:
                lasting = "for good" if row["permanent"] else "for now"
                told = f"{lasting}: {printable(' '.join(filter(None, (row['code'], row['message']))))}"
            yield f"  {local_date(row['time'])} {row['event']} {told}, to {row['target']}, ETag {row['etag']}"
        for request in found["in_flight"]:
            since, key = local_date(request["sent_at"]), printable(request["output_key"])
            yield f"in flight      since {since}, for {key}, ETag {request['etag']}"
        facts = "not known (S3 did not answer)" if found["s3_problem"] else "no"
        if source:
            facts = f"{human_bytes(source['bytes'])}, ETag {source['etag']}, written {local_date(source['modified'])}"
            facts += ", archived" if source["archived"] else ""
        yield f"in the bucket  {facts}"
        for job in found["jobs"]:
            taken = f"taken by {printable(job['taken_by'] or '')}"
            # Other folders are not listed for the sake of one object.
            is_of_folder = re.search(r"\{(dir|key)\}", self._settings.by_name[job["job"]].output_key)
            free = "free" if is_of_folder else "free, unless a source of another folder has it and is listed before"
            whose = {"taken": taken, "own": "its own", "unknown": "not known whose"}.get(job["place"], free)
            yield f"output key     {printable(job['output_key'])} (job {job['job']}), {whose}"
            yield from (f"output         {output['message']}" for output in job["outputs"])
            yield from (f"to repair      {job['repair']}" for _ in filter(None, [job["repair"]]))
        steps = [f"{job['next']['step']} (job {job['job']})" for job in found["jobs"]]
        # What is not in the bucket, or cannot be looked at there, has one step in all jobs.
        is_same = len(steps) == 1 or not source
        yield f"the next run would {found['jobs'][0]['next']['step'] if is_same else '; '.join(steps)}"

    def _event(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the log, with the key of its output."""
        planned, made = Job(row["target"], name=row["name"], output_key=row["place"]).output_of(self._key), None
        if row["event"] not in {OutcomeKind.FAILED.value, OutcomeKind.SKIPPED.value}:
            made = row["output_key"].removeprefix(f"{row['output_bucket']}/") if row["output_key"] else planned
        names = ("event", "target", "etag", "output_bucket", "output_etag", "bytes_out", "seconds", "requests")
        return {
            "time": iso_time(row["time"]),
            "job": row["name"],
            **{name: row[name] for name in (*names, "runs_failed")},
            "code": row["code"] or None,
            "message": row["message"] or None,
            "output_key": made,
            "permanent": bool(row["permanent"]),
            "possible_double_charge": bool(row["charged_twice"]),
        }

    def _of_job(
        self, job: Job, journal: Journal, bucket: Bucket | None, source: SourceObject | None, history: Sequence[Any]
    ) -> dict[str, Any]:
        """The output key of one job, who has it, and what lies there. `bucket`: None if S3 does not answer."""
        planned, home = job.output_of(self._key), self._settings.s3.output_bucket
        slot, here = journal.slot(planned), (home, KeyParts.slot_of(planned))
        made = [row for row in history if (row["output_bucket"], KeyParts.slot_of(row["output_key"] or "")) == here]
        # What a run has found to be lost is expected there no more.
        stored = made[0] if made and made[0]["event"] in DONE_EVENTS else {}
        looks = (self._look(bucket, job, key, source, stored) for key in (planned, f"{planned}.zip")) if bucket else ()
        outputs = list(filter(None, looks))
        owner = self._key if made else None
        if held := journal.holders([slot]).get(slot):
            owner = held[1] if held[0] == self._settings.s3.bucket else f"s3://{'/'.join(held)}"
        owner = next((output["source"] for output in outputs if output["made_of"]), owner)
        place = "free" if owner is None else "own" if owner == self._key else "taken"
        if owner is None and (bucket is None or outputs):
            place = "unknown"
        return {
            "job": job.name,
            "target": job.target,
            "output_bucket": home,
            "output_key": planned,
            "place": place,
            "taken_by": owner or None if place == "taken" else None,
            "outputs": outputs,
        }

    def _look(
        self, bucket: Bucket, job: Job, key: str, source: SourceObject | None, stored: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """What lies under a key, and whether that is what was stored there; None if nothing is there, and was not."""
        was = stored if stored.get("output_key") == key else {}
        found = {"output_key": key, "state": "there", "bytes": None, "etag": None, "made_of": None, "source": None}
        try:
            head = bucket.head(bucket.output_name, key)
        except ObjectFailed as failure:
            return found | {"state": "unknown", "message": f"it cannot be told: {printable(failure.message)}"}
        if head is None:
            message = f"it is missing: {printable(key)} was stored, and is not there"
            return found | {"state": "missing", "message": message} if was else None
        metadata, size, etag = head["Metadata"], head.get("ContentLength"), bare_etag(head.get("ETag"))
        made_of, maker = self._origin(metadata, job, source)
        if made_of == "unmarked" and was.get("event") == OutcomeKind.ADOPTED.value:
            made_of, maker = "adopted", self._key
        message = f"{printable(key)} is there, {MADE_OF[made_of].format(version=metadata.get('source-etag'))}"
        found |= {"bytes": size, "etag": etag, "made_of": made_of, "source": maker or None, "message": message}
        # What says of itself that it is of another version was stored since, with another checkpoint, or before a kill.
        is_that = made_of in {"another_object", "unmarked", "adopted"} or metadata["source-etag"] == was.get("etag")
        pairs = ((was.get("output_etag"), etag), (was.get("bytes_out"), size))
        if is_that and any(then and now and then != now for then, now in pairs):
            message += f", {size} bytes with ETag {etag}"
            stored_then = f"{was['bytes_out']} bytes with ETag {was['output_etag']} were stored"
            found |= {"state": "altered", "message": f"it is altered: {message}; {stored_then}"}
        return found

    def _origin(self, metadata: Mapping[str, str], job: Job, source: SourceObject | None) -> tuple[str, str]:
        """What an object was made of, a name of MADE_OF, and the key of its source, if it is known."""
        own_bucket = self._settings.s3.bucket
        home, maker = (urllib.parse.unquote(metadata.get(name, "")) for name in ("source-bucket", "source-key"))
        if not is_own_metadata(metadata):
            return "unmarked", ""
        if source_key_metadata(self._key).items() <= metadata.items():
            if source and source.version == metadata["source-etag"]:
                is_same = metadata.get("job-fingerprint") == job.fingerprint
                return "this_version" if is_same else "other_options", self._key
            if home == own_bucket:
                return "another_version", self._key
        return "another_object", f"s3://{home}/{maker}" if maker and home not in {"", own_bucket} else maker

    def _repair(self, job: Mapping[str, Any]) -> str | None:
        """How to have an output again that is missing or altered, and that the next run takes for done."""
        states = {output["state"]: output["output_key"] for output in job["outputs"]}
        if job["next"]["kind"] != DecisionKind.DONE.value or states.keys().isdisjoint({"missing", "altered"}):
            return None
        step = "run it with --repair"
        if "altered" in states:
            place = printable(f"s3://{job['output_bucket']}/{states['altered']}")
            step = f"what is altered is never overwritten: delete {place}, and {step}"
        # A key with a line end is no line of a file of keys.
        alone = f"printf '%s\\n' {shlex.quote(self._key)} | s3_bulk_convert.py --repair --keys-from -"
        return f"{step}; this object alone: {alone}" if self._key.isprintable() else step

    def _steps(
        self, planner: Planner | None, source: SourceObject | None, problem: str
    ) -> Iterator[tuple[str, str, str]]:
        """Kind, reason and message of what the next run would do with the object in each job."""
        jobs = self._settings.by_name
        if planner is None or source is None:
            meant = self._key.lstrip("/")
            is_near = planner and meant not in {"", self._key} and planner.bucket.find(meant)
            absent = f"it is not in the bucket{f'; did you mean {printable(meant)}?' if is_near else ''}"
            step = (DecisionKind.SKIP.value, "absent", absent) if planner else ("stopped", "", problem)
            yield from [step] * len(jobs)
            return
        # The decisions of the plan, after a worker's looks. Jobs that would make the very same output have one; what no
        # job is asked about has that of "".
        outputs = {name: job.result_of(self._key) for name, job in jobs.items()}
        # Those before it that want the same output key claim it first; most templates keep folder and stem.
        bucket, parts = planner.bucket, KeyParts.of(self._key)

        def slots(key: str) -> set[str]:
            return {KeyParts.slot_of(job.output_of(key)) for job in jobs.values()}

        near: Sequence[SourceObject] = ()
        with contextlib.suppress(ObjectFailed):  # they may not be listed
            near = bucket.read_page(bucket.name, parts.folder + parts.stem).objects
        rivals = [other for other in near if other.key < self._key and slots(other.key) & slots(self._key)]
        decided = [each for each in planner.plan([*rivals, source], is_last=True) if each.source.key == self._key]
        decisions = {outputs.get(each.job): planner.foresee(each) for each in decided}
        for name, job in jobs.items():
            yield self._step(job, source, decisions.get(outputs[name]) or decisions.get(None))

    def _step(self, job: Job, source: SourceObject, decision: Decision | None) -> tuple[str, str, str]:
        """What one job would do. `decision`: None if the object is another shard's."""
        if not self._key.startswith(job.prefix):
            return DecisionKind.SKIP.value, "not_listed", f"its key does not begin with {job.prefix}"
        if not job.wants(source):
            return DecisionKind.SKIP.value, NOT_MATCHED, ""
        if decision is None:
            is_skipped = source.skip_reason or self._key.startswith(self._settings.own_prefixes)
            maker = self._settings.jobs[0] if is_skipped else job
            owner = self._settings.shard.owner_of(KeyParts.slot_of(maker.output_of(self._key)))
            return DecisionKind.SKIP.value, "other_shard", f"it belongs to shard {owner}"
        return decision.kind.value, decision.reason, decision.message


########################################################################################################################
# Check. Proves what a run needs by doing what a run does, and prints a line as soon as it is known: the next proof may
# have to wait for the network.
########################################################################################################################


class CheckWarning(RunError):
    """Something that a run may survive, and a person should know of."""


class Diagnostics:
    """All that `--check` proves, with a line of `OK`, `WARN` or `FAIL` for each proof."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self._checks = settings, list[dict[str, Any]]()

    def run(self) -> ExitCode:
        """Prove everything, what is nearest first."""
        self.check_versions()
        self._report("OK", "configuration", str(self.settings))
        for target in dict.fromkeys(job.target for job in self.settings.jobs):
            if doubt := FileType.doubt_of(target):
                self._report("WARN", "convert.target", doubt)
        self._check_files()
        self._check_threads()
        self.check_space()
        with self._prove("the rest of S3"):
            self._check_s3()
        with contextlib.suppress(CheckWarning):
            self._check_api()
        verdicts = Counter(check["verdict"] for check in self._checks)
        has_failed = verdicts["FAIL"] > 0
        if self.settings.log_format == "json":
            print_line(self.settings.json({"ready": not has_failed, "checks": self._checks}))
        else:
            counts = [(verdicts[verdict], verdict) for verdict in ("FAIL" if has_failed else "OK", "WARN")]
            told = ", ".join(f"{count} {verdict}" for count, verdict in counts if count)
            print_line(f"{'not ready' if has_failed else 'ready'}: {told}")
        return ExitCode.USAGE if has_failed else ExitCode.DONE

    def _report(self, verdict: str, what: str, message: str, hint: str = "") -> None:
        self._checks.append({"verdict": verdict, "what": what, "message": message, "hint": hint or None})
        if not (self.settings.log_format == "json" or (self.settings.quiet and verdict == "OK")):
            print_line(self.settings.hide(f"{verdict:<4} {what}: {'; '.join(filter(None, (message, hint)))}"))

    @contextlib.contextmanager
    def _prove(self, what: str, ok: str = "", *, needs: str = "", is_needed: bool = False) -> Iterator[list[str]]:
        """One proof: the block raises what is not so. What is so, says `ok`, or what the block adds to the list.

        `needs`: what would permit it. `is_needed`: where it fails, the rest makes no sense; raises CheckWarning then.
        """
        proved: list[str] = []
        try:
            with Trouble.explained(what, foreseen=(ObjectFailed, ObjectSkipped)):
                yield proved
        except (ObjectFailed, ObjectSkipped) as failure:
            self._report("FAIL", what, getattr(failure, "message", str(failure)), needs)
        except RunError as error:
            verdict = "WARN" if isinstance(error, CheckWarning) else "FAIL"
            self._report(verdict, what, error.message, error.hint)
            if is_needed and verdict == "FAIL":
                raise CheckWarning("not tried", "correct what failed first") from None
        else:
            if said := "".join(proved) or ok:
                self._report("OK", what, said)

    # -- this machine --------------------------------------------------------------------------------------------------

    def check_versions(self) -> None:
        """Python, and the packages, which must not be too old."""

        def numbers(version: str) -> list[int]:
            # "2.0a1" has its numbers too.
            return [int(part) for part in re.findall(r"\d+", version)[:3]]

        with self._prove("versions") as proved:
            found = {name: str(getattr(sys.modules[name], "__version__", "")) for name in OLDEST_PACKAGES}
            oldest = OLDEST_PACKAGES.items()
            old = [f"{name}>={version}" for name, version in oldest if numbers(found[name]) < numbers(version)]
            if old:
                wanted = " ".join(f"'{name}'" for name in old)
                raise usage_error(f"too old for {', '.join(old)}", f"run: {sys.executable} -m pip install {wanted}")
            python = f"Python {sys.version.split()[0]}"
            proved.append(", ".join([python, *(f"{name} {version}" for name, version in found.items())]))

    def _check_files(self) -> None:
        settings, checkpoint = self.settings, real_file(Path(self.settings.run.checkpoint))
        lock = RunLock(checkpoint)
        with self._prove("run.checkpoint") as proved:
            # Before SQLite opens it: to close a file is to give up this process's SQLite locks on it.
            for written in (checkpoint, lock.path, checkpoint.with_name(checkpoint.name + "-wal")):
                OutputFile("run.checkpoint", str(written)).require_writable()
            if os.name == "posix" and checkpoint.exists():
                # A run sets the mode, which only the owner may do.
                Journal.set_mode(checkpoint, stat.S_IMODE(checkpoint.stat().st_mode))
            with Journal(checkpoint, "", settings, read_only=True) as journal:
                absent = "" if journal.is_there else "; it does not exist yet"
            proved.append(f"{checkpoint} can be written{absent}")
        with self._prove("lock", "no run is at work"):
            # In cron that is as it should be, and no reason to fail.
            if holder := lock.holder():
                raise CheckWarning(f"a run is at work ({holder})", "another one would exit 4")
            # On files of their own: a run that starts at this moment must not find its lock taken. Where there can be
            # none, the checkpoint itself has been told of.
            with contextlib.suppress(OSError):
                folder = tempfile.TemporaryDirectory(dir=checkpoint.absolute().parent)
                with folder, RunLock(Path(folder.name) / checkpoint.name):
                    pass
        for name in ("failures", "summary", "metrics"):
            if path := getattr(settings.run, name):
                with self._prove(f"run.{name}", f"{path} can be written"):
                    OutputFile(f"run.{name}", path).require_writable()
        # CTF_API_KEY comes before the file, which need not be there then.
        key_file = Path(os.path.expanduser(settings.api.key_file))
        if settings.api.key_file and not settings.key_problem:
            with self._prove("api.key_file", f"others cannot read {key_file}"):
                mode = stat.S_IMODE(key_file.stat().st_mode) if key_file.exists() else 0
                if os.name == "posix" and mode & (stat.S_IRGRP | stat.S_IROTH):
                    # In a container, there may be no others.
                    raise CheckWarning(f"others can read {key_file} (mode {mode:04o})", f"run: chmod 600 {key_file}")

    def _check_threads(self) -> None:
        count, is_over = self.settings.run.workers, threading.Event()
        with self._prove("threads", f"{count} workers can be started"):
            Trouble.require_open_files(count)
            try:
                for _ in range(count):
                    threading.Thread(target=is_over.wait, daemon=True).start()
            finally:
                is_over.set()

    def check_space(self) -> None:
        """How much is free beside the checkpoint, and where large answers wait."""
        folders = [Path(self.settings.run.checkpoint).absolute().parent]
        try:
            folders.append(Path(tempfile.gettempdir()))
        except OSError as problem:
            self._report("FAIL", "temporary folder", f"{problem.strerror}", "make one writable, or set TMPDIR")
        for folder in dict.fromkeys(folders):
            with self._prove(f"space in {folder}") as proved:
                free = shutil.disk_usage(folder).free
                if free < SCARCE_DISK_BYTES:
                    hint = "free some space, or set run.checkpoint or TMPDIR"
                    raise usage_error(f"only {human_bytes(free)} are free", hint)
                if free < LITTLE_DISK_BYTES:
                    raise CheckWarning(f"{human_bytes(free)} are free", "large outputs wait there, one for each worker")
                proved.append(f"{human_bytes(free)} are free")

    # -- servers -------------------------------------------------------------------------------------------------------

    def _check_clock(self, server: str, answer: requests.Response) -> None:
        with self._prove(f"clock of {server}", "this machine's clock agrees") as proved:
            ahead = unix_seconds(answer.headers.get("Date", "")) - time.time()
            if math.isnan(ahead):
                proved.append("it does not tell the time")
            differs = f"it is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's clock"
            # Amazon allows 15 minutes; a clock that is off by 5 is not kept by anybody.
            if abs(ahead) > 300:
                raise usage_error(differs, "set the clock (chronyd, ntpd): S3 refuses requests from another time")
            if abs(ahead) > 60:
                raise CheckWarning(differs, "set the clock (chronyd, ntpd)")

    def _check_s3(self) -> None:
        # `requests` is to judge S3 as boto3 does.
        trusted: Any = os.environ.get("AWS_CA_BUNDLE") or True
        with self._prove("S3", is_needed=True):
            bucket = Bucket(self.settings)
            # Without credentials: whatever it answers, it says when, even to a signature from another time.
            with http_get(str(bucket.client.meta.endpoint_url), verify=trusted) as answer:
                self._check_clock("S3", answer)
        with self._prove("bucket", is_needed=True) as proved:
            bucket.check()
            names = " and ".join(dict.fromkeys((bucket.name, bucket.output_name)))
            proved.append(f"{names} there, region {bucket.client.meta.region_name}")
        listed: list[SourceObject] = []
        # A policy may allow one prefix and not another.
        needs = f"allow s3:ListBucket on {bucket.name}"
        for prefix in dict.fromkeys(job.prefix for job in self.settings.jobs):
            with self._prove(f"list s3://{bucket.name}/{prefix}", needs=needs, is_needed=True) as proved:
                # The first page alone: how many there are is for the run to find out.
                page = bucket.read_page(bucket.name, prefix)
                listed += page.objects
                if not page.objects:
                    raise CheckWarning("no key begins with this prefix", "check s3.bucket and s3.prefix")
                proved.append(f"{len(page.objects)} objects{'' if page.is_last else ' and more'}")
        sources = [source for source in listed if not source.key.startswith(self.settings.own_prefixes)]
        if len(self.settings.jobs) > 1 and listed:
            with self._prove("output keys") as proved:
                self._compare_jobs(sources)
                proved.append(f"no two jobs want the same one, of {pluralize(len(listed), 'object')} looked at")
        self._check_reading(bucket, sources, trusted)
        for prefix in dict.fromkeys(job.constant_prefix for job in self.settings.jobs):
            self._check_writing(bucket, prefix)

    def _compare_jobs(self, sources: Sequence[SourceObject]) -> None:
        """Raise CheckWarning if two jobs want one output key for the same object, as far as it can be told."""
        for source in sources:
            takers: dict[str, Job] = {}
            wanting = (job for job in self.settings.jobs if job.wants(source))
            for job in (each for each in wanting if not each.leaves_as_it_is(source.key)):
                planned = job.output_of(source.key)
                first = takers.setdefault(KeyParts.slot_of(planned), job)
                if first.result_of(source.key) != job.result_of(source.key):
                    hint = "one of them fails for such objects (output_collision): exclude them in one, or put {job} "
                    hint += "into its output_key"
                    raise CheckWarning(f"job {first.name} and job {job.name} both want {printable(planned)}", hint)

    def _check_reading(self, bucket: Bucket, sources: Sequence[SourceObject], trusted: Any) -> None:
        """Read the first object that can be a source as a worker does, and as the API does, by a presigned URL."""

        def is_there(source: SourceObject) -> bool:
            try:
                bucket.look_at_source(source)
            except ObjectSkipped as skipped:
                return str(skipped) != ARCHIVED  # of Intelligent-Tiering, no listing says so
            except ObjectFailed as failure:
                return failure.code not in {"source_gone", "source_changed"}
            except RunError:
                pass  # said below
            return True

        # What a run would skip may be unreadable for good reasons: an archived object, a folder of another tool.
        wanted = [each for each in sources if any(job.wants(each) for job in self.settings.jobs)] or sources
        readable = (each for each in wanted if not (each.skip_reason or KeyParts.of(each.key).has_dot_segments))
        source = next(filter(is_there, itertools.islice(readable, 16)), None)
        if source is None:
            self._report("WARN", "read", "nothing was listed that could be read", "try again when there is something")
            return
        needs = f"allow s3:GetObject on {bucket.name} (and kms:Decrypt on its key)"
        seen: Head = {}
        with self._prove("read", f"s3://{bucket.name}/{printable(source.key)}", needs=needs):
            with contextlib.suppress(ObjectSkipped):  # an output of another configuration can be read as well
                source, seen = bucket.look_at_source(source)
            bucket.open_source(source)[0].close()
        if self.settings.s3.tag_source:
            self._check_tagging(bucket, source, seen)
        if self.settings.api.transfer == "upload":
            return
        with (
            self._prove("presigned URL", "it works from here; the API must be able to reach S3 as well"),
            # One byte, in the same way as the API: by an HTTP client that knows nothing of S3.
            http_get(bucket.presign(source.key), headers={"Range": "bytes=0-0"}, verify=trusted) as answer,
        ):
            if answer.status_code not in {200, 206}:
                hint = "check s3.region, s3.endpoint_url and the clock, or set api.transfer = upload"
                raise usage_error(f"S3 answers it with {answer.status_code}", hint)

    def _check_tagging(self, bucket: Bucket, source: SourceObject, seen: Head) -> None:
        """Read the tags of a source, and try to tag what is not there: no source is touched."""
        with self._prove("tag sources", "they may be tagged", needs=TAGGING_HINT):
            place, _ = bucket.tags_of(source, seen)
            place["Key"] = f"{KeyParts.of(source.key).folder}.s3_bulk_convert-check-{os.urandom(8).hex()}"
            try:
                bucket.client.put_object_tagging(**place, Tagging={"TagSet": []})
            except (ClientError, BotoCoreError) as error:
                # Who may not do it is told so before S3 looks for the object.
                if error_code(error) not in ABSENT:
                    raise CheckWarning(f"only a run can tell: S3 says {error_code(error)}", TAGGING_HINT) from None

    def _check_writing(self, bucket: Bucket, prefix: str) -> None:
        """List outputs and write one: an empty object, which is looked at and deleted again."""
        name, where = bucket.output_name, f"s3://{bucket.output_name}/{prefix}"
        needs = f"allow s3:ListBucket on {name}"
        with self._prove(f"list {where}", "outputs that are there will be found", needs=needs):
            # As a run does it, for a key that is not there.
            bucket.read_page(name, prefix, prefix)
        # The key is drawn: neither an object of yours nor the probe of another check is ever overwritten.
        key = f"{prefix}.s3_bulk_convert-check-{os.urandom(8).hex()}"
        task = Task("check", "", SourceObject(key), self.settings.jobs[0].target, None, key)
        needs = f"allow s3:PutObject on {name}/{prefix}* (with s3.acl s3:PutObjectAcl, with s3.tags "
        needs += "s3:PutObjectTagging, with a KMS key kms:GenerateDataKey), and check s3.storage_class, s3.sse, s3.acl"
        with (
            self._prove(f"write {where}", needs=needs) as proved,
            translate_s3_errors(f"writing to {name}", "store_failed"),
        ):
            arguments = bucket.output_arguments(task)
            written: Any = bucket.client.put_object(Bucket=name, Key=key, Body=b"", **arguments)
            proved.append("with the options of the outputs")
        if not proved:
            return
        with self._prove(f"look at {where}", "an output says what it was made of"):
            head = None
            with contextlib.suppress(ObjectFailed):
                head = bucket.head(bucket.output_name, key)
            if head is None or not is_own_metadata(head["Metadata"]):
                hint = f"allow s3:GetObject on {name}, or what lies there can never be found"
                raise CheckWarning("the metadata of an output cannot be read", hint)
        with self._prove(f"delete {where}", "the probe is gone; a run deletes nothing"):
            # Without its version, a versioned bucket would keep it, and a marker in addition.
            which: Any = {"VersionId": written["VersionId"]} if written.get("VersionId") else {}
            try:
                with translate_s3_errors(f"deleting from {name}", "delete_failed"):
                    bucket.client.delete_object(Bucket=name, Key=key, **which)
            except (RunError, ObjectFailed) as failure:
                hint = f"delete {key}, and allow s3:DeleteObject and s3:DeleteObjectVersion for the next check"
                raise CheckWarning(failure.message, hint) from None

    def _check_api(self) -> None:
        api = self.settings.api
        # A key cannot be tried on an API that is not there.
        with self._prove("API", is_needed=True), http_get(api.url) as answer:
            self._check_clock("the API", answer)
        if self.settings.key_problem:
            self._report("FAIL", "API key", self.settings.key_problem)
            return
        with self._prove("API key", is_needed=True) as proved:
            usage = Usage.ask(api)
            plan = f"accepted, plan {usage.plan}" if usage.plan else "not refused; the API does not name the plan"
            proved.append(plan)
        with self._prove("quota") as proved:
            # Its fields are not documented: what cannot be read there is no reason to fail.
            if usage.remaining is None:
                hint = "cap what a run may cost with --limit"
                raise CheckWarning("the API does not say what is left of the month", hint)
            said = f"{usage.remaining} conversions are left"
            if usage.monthly_limit is not None:
                said += f" of {usage.monthly_limit}"
            if usage.bills_overage is not None:
                said += ", more are billed" if usage.bills_overage else ", more are refused"
            if usage.remaining <= api.keep_remaining:
                hint = f"wait for next month, upgrade, or lower api.keep_remaining ({api.keep_remaining})"
                raise usage_error(said, hint)
            proved.append(said)
        if usage.requests_per_minute:
            self._report("OK", "rate limit", f"{usage.requests_per_minute} requests a minute")


########################################################################################################################
# Command line. Only `main` decides the exit.
#   - Words for people go to stderr as they come, the summary of a run goes to stdout.
########################################################################################################################

# Flags that stand for an option: section, name, what the value is called, purpose.
FLAGS = {
    "bucket": ("s3", "bucket", "NAME", "bucket to read from"),
    "prefix": ("s3", "prefix", "PREFIX", "only keys that begin so"),
    "target": ("convert", "target", "FORMAT", "format to convert to"),
    "workers": ("run", "workers", "N", "conversions at a time"),
    "processes": ("run", "processes", "N", "processes that share the workers out"),
    "limit": ("api", "max_conversions", "N", "conversions to ask for, failed ones included"),
}


class Parser(argparse.ArgumentParser):
    """A parser that says little and to the point, and does not repeat an API key that stands where it should not."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit 2."""
        usage = f"usage: {self.prog} [-c FILE] [options], which --help names"
        self.exit(ExitCode.USAGE, f"{usage}\n{self.prog}: error: {redact(message)}\n")

    @staticmethod
    def filled(given: str) -> str:
        """A value that is not empty, as a shell's variable that is not set would leave it. Raises ArgumentTypeError."""
        if not given.strip():
            raise argparse.ArgumentTypeError("expected a value, and it is empty")
        return given

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The command line. What is no option is named, with the one that was probably meant."""
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(f"--{name.lstrip('-').lower()}", self._option_string_actions, n=1)
            self.error(f"{name} is not an option" + "".join(f"; did you mean {meant}?" for meant in near))
        return arguments


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="s3_bulk_convert.py",
        description="Convert each object of an S3 bucket once through the ChangeThisFile API and put the result back.",
        epilog="Exit codes: 0 done; 1 some objects failed; 2 usage or configuration error; 3 stopped early, work is "
        "left; 4 another run holds the checkpoint; 130, 143 interrupted.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-c", "--config", metavar="FILE", type=Path, help="INI file (default: config.ini, if it is there)")
    for flag, (section, name, value, purpose) in FLAGS.items():
        # Without a cap, as without a file of keys, the whole bucket would be paid for.
        kind = parser.filled if flag == "limit" else str
        add(f"--{flag}", metavar=value, type=kind, help=f"{purpose} ({section}.{name})")
    shard_help = "only the I-th of N parts, from 0 (default: what an array job's environment says)"
    add("--shard", metavar="I/N", help=shard_help)
    add("--set", metavar="SECTION.OPTION=VALUE", action="append", default=[], help="any other option; repeatable")
    one_of = parser.add_mutually_exclusive_group().add_argument
    one_of("--dry-run", action="store_true", help="what a run would convert, skip, pay for and take; convert nothing")
    one_of("--check", action="store_true", help="prove configuration, S3, API key, quota and files; convert nothing")
    one_of("--status", action="store_true", help="what the checkpoint knows; no network")
    one_of("--why", metavar="KEY", help="all that is known about one object, and what the next run would do")
    one_of("--verify", action="store_true", help="prove from the bucket that each output is there as it was stored")
    one_of("--retry-failed", action="store_true", help="also try objects whose failure was permanent")
    add("--repair", action="store_true", help="a run that also converts again what --verify would call missing")
    add(
        "--keys-from",
        metavar="FILE",
        type=parser.filled,
        help="take keys from FILE (- is stdin) instead of listing; see README",
    )
    log_help = "lines for people, or JSON, on stderr and stdout (default: text)"
    add("--log-format", choices=("text", "json"), default="text", help=log_help)
    add("-q", "--quiet", action="store_true", help="print only what went wrong, and one line at the end")
    add("-v", "--verbose", action="store_true", help="say more; show tracebacks")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def read_flags(arguments: argparse.Namespace) -> list[RawOption]:
    """The options given on the command line. Raises RunError if one has no name."""
    given = [
        RawOption(section, name, value, f"--{flag} ([{section}] {name})")
        for flag, (section, name, *_) in FLAGS.items()
        if (value := getattr(arguments, flag)) is not None
    ]
    for assignment in arguments.set:
        # The name of a job may hold dots and spaces: the option is what stands behind the last dot before the "=".
        match = re.fullmatch(r"\s*(?:(job [^=]*|[^.=\s]+)\.)([^.=\s]+)\s*=(.*)", assignment, re.DOTALL)
        if match is None:
            hint = "for example --set run.log_every=10"
            raise usage_error(f"--set {assignment}: expected SECTION.OPTION=VALUE", hint)
        given.append(RawOption(match[1], match[2].lower(), match[3], f"--set {match[1]}.{match[2]}"))
    # A space that a shell had to be told to keep is a part of the keys.
    blank = {"prefix": "\r\n", "output_key": "\r\n"}
    return [entry._replace(value=entry.value.strip(blank.get(entry.name))) for entry in given]


def finish(report: Report, settings: Settings) -> ExitCode:
    """Say what the run came to."""
    if settings.log_format == "json":
        for code, count in report.failed.most_common():
            key, said = report.examples[code].task.source.key, report.examples[code].message
            message, remedy = f"{count} failed: {code}", hint_for(code)
            log_event("failures", message, code=code, count=count, key=key, said=said, remedy=remedy)
        if (reason := report.reason) and reason is not report.announced:
            log_event("stop", reason.message, because=reason.message, hint=reason.hint, exit_code=int(report.exit_code))
        log_event("summary", report.line(), level=logging.INFO, **report.summary())
        text = settings.json(report.summary())
    elif settings.quiet and report.exit_code is ExitCode.DONE:
        text = f"{iso_time(time.time())} {report.line()}"
    else:
        text = redact("\n".join(report.lines()))
    try:
        print_line(text)
    except RunError as error:
        # What was done stays done.
        log.warning("%s", error.message)
    return report.exit_code


def run_command(arguments: argparse.Namespace) -> ExitCode:
    """Do what the command line asks for. Raises RunError."""
    commands = ("check", "status", "why", "dry_run", "verify")
    command = next((name for name in commands if getattr(arguments, name) not in {None, False}), "")
    given = read_flags(arguments)
    flags = {"needs_key": not command, "keys_from": arguments.keys_from}
    settings = load_settings(arguments.config, os.environ, given, arguments.shard, **flags)
    if arguments.repair and command not in {"", "dry_run"}:
        raise usage_error(f"--repair: not with --{command}", "it is a run; --dry-run --repair says what it would do")
    named = ("retry_failed", "repair", "quiet", "log_format")
    settings = replace(settings, **{name: getattr(arguments, name) for name in named})
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        # A command that has nothing to finish ends with one word.
        signal.signal(signal.SIGINT, lambda *_: StopFlag.exit_at_once("interrupted", ExitCode.SIGINT))
    if settings.repair and settings.keys_from:
        # It is read once for what is missing, and once for what is to be done.
        settings = replace(settings, keys_from=KeyFile.readable_twice(settings.keys_from))
    if not command:
        # Only a run has something to finish: from here on Ctrl-C is a reason to stop.
        stop = StopFlag()
        stop.install()
        return finish(run(settings, stop), settings)
    if command == "check":
        return Diagnostics(settings).run()
    answer: Estimate | Proof | Status | Why
    if command in {"dry_run", "verify"}:
        answer = (Estimate if command == "dry_run" else Proof).make(settings)
    else:
        answer = Status(settings) if command == "status" else Why(settings, arguments.why)
    is_json = settings.log_format == "json"
    for line in [settings.json(answer.document())] if is_json else map(settings.hide, answer.lines()):
        print_line(line)
    return answer.exit_code if isinstance(answer, Proof) else ExitCode.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    # A daemon's parent may have closed them.
    sys.stdout = sys.stdout or io.TextIOWrapper(io.FileIO(os.devnull, "w"))
    sys.stderr = sys.stderr or io.TextIOWrapper(io.FileIO(os.devnull, "w"))
    # A key may have characters that the terminal has not.
    for stream in (sys.stdout, sys.stderr):
        cast(io.TextIOWrapper, stream).reconfigure(errors="backslashreplace")
    # What is imported is never garbage, and what a page is made of is in no cycle: to look for garbage in it again and
    # again would cost a third of reading it. A run does so by the clock.
    gc.freeze()
    gc.set_threshold(50_000)
    arguments = build_parser().read(argv)
    set_up_logging(quiet=arguments.quiet, verbose=arguments.verbose, as_json=arguments.log_format == "json")
    try:
        with Trouble.explained("the program"):
            return run_command(arguments)
    except RunError as error:
        fields = {"hint": error.hint, "exit_code": int(error.exit_code), "code": error.code}
        log.error("%s", error.message, exc_info=arguments.verbose, extra={"event": "error", "fields": fields})
        return error.exit_code


def leave(code: int) -> None:
    """End the process; at once, if workers had to be abandoned in the middle of a request."""
    is_readable = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            is_readable = False
    # Python would wait for threads at its exit, for as long as the API takes, and would complain of a broken stream.
    if threading.active_count() > 1 or not is_readable:
        os._exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    leave(main())
