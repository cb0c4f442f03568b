#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["boto3>=1.36", "requests>=2.31", "tqdm>=4.60", "urllib3>=2.0.2"]
# ///
"""Convert every object of an S3 bucket once through the ChangeThisFile API and put the results back into S3.

How data flows; each word is a function below, in this order:

    list_pages -> select -> unfinished -> claim -> begin -> | queue | -> convert -> store -> Outcome
    `----------- one feeder thread, page by page ---------'          `- worker threads -'      |
                                                              record: journal, failures file, report

Memory does not depend on the size of the bucket: at most one page of the listing and a bounded queue exist at a time.

Files written: the checkpoint (SQLite, with its `-wal` and `-shm`, and a `.lock` beside it), the failures file (JSON
lines, appended), a run summary (JSON) and metrics (Prometheus textfile) where `run.summary`, `run.metrics` name them.

Exit codes: 0 nothing is left to do; 1 finished, but some objects failed; 2 usage or configuration error,
nothing was started; 3 stopped early, work is left; 4 another run holds the checkpoint; 130, 143 interrupted.

SIGINT, SIGTERM, SIGHUP: nothing new is sent, what is in flight gets `run.shutdown_grace` to finish. A second signal
ends the program at once. Nothing is lost either way: what was sent is in the checkpoint and is resumed by the next run.
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
import hmac
import http.client
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
import zlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import Field, dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from enum import Enum, IntEnum
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, TypeVar, cast
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
        MetadataRetrievalError,
        NoCredentialsError,
        PartialCredentialsError,
        ProxyConnectionError,
        SSLError,
        TokenRetrievalError,
        UnauthorizedSSOTokenError,
    )
    from requests.adapters import HTTPAdapter
    from tqdm import tqdm
    from urllib3.filepost import encode_multipart_formdata
    from urllib3.util.retry import Retry
except ImportError as missing:
    # Debian's and Homebrew's Python refuse pip outside a virtual environment (PEP 668).
    is_managed = os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"))
    in_venv = is_managed and sys.prefix == sys.base_prefix
    installer = "venv/bin/pip" if in_venv else f"{sys.executable} -m pip"
    sys.stderr.write(f"error: the package {missing.name} is missing\n")
    sys.stderr.write(
        f"hint: run: {'python3 -m venv venv && ' * in_venv}{installer} install boto3 requests tqdm urllib3\n"
    )
    if in_venv:
        sys.stderr.write("then start this program with venv/bin/python\n")
    raise SystemExit(2) from None

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from mypy_boto3_s3.client import S3Client

__version__ = "0.1.0"

log = logging.getLogger("s3_bulk_convert")

########################################################################################################################
# Limits and names. Every number that is not an option of the user's, with its reason.
########################################################################################################################

CONNECT_TIMEOUT_SECONDS = 10
OUTAGE_SECONDS = 300  # as long as a router takes to start anew; after that, it is for the next run
OUTAGE_PAUSE_SECONDS = 15  # between two attempts in it, at most: a network that is back is soon noticed
BACKOFF_CAP_SECONDS = 64  # the API's own advice for 429 without Retry-After
SHARE_OF_LIMIT = 0.99  # of the API's rate limit; the rest is for the unevenness of networks at a window's border
SLOTS_REMEMBERED = 10_000  # of the last minute, while the API's limit is unknown
SECONDS_TO_RECOVER_HALF = 60.0  # of what a 429 has taken off the pace
SECONDS_TO_DOUBLE_GUESS = 300.0  # of a limit that nobody says; the next 429 takes a fifth off it
SMALLEST_LIMIT = 10  # requests per minute, of the API's plans; no guess is lower
MOST_EXCESS = 7.0  # an eighth of the pace is as slow as 429s make it
FIRST_ANSWER_SECONDS = 5  # to wait for the first answer, which says what the API's limit is
RETRY_AFTER_CAP_SECONDS = 300  # its windows last a minute: more is a mistake or an attack
WAIT_DEADLINE_SECONDS = 30 * 60  # 429 and 409 cost no attempts, but not for ever; the API's own cap on a call is 120 s
IDEMPOTENCY_WINDOW_SECONDS = 24 * 3600  # for so long the API replays an answer for free
URL_LIFE_SECONDS = IDEMPOTENCY_WINDOW_SECONDS  # a resumed request carries the same URL, so it lives as long
JOB_POLL_SECONDS = (2, 3, 5, 8, 15)  # growing; the last one repeats
JOB_DEADLINE_SECONDS = 6 * 3600
ROUNDING_SECONDS = 2  # of two times that the API tells in whole seconds
TIMEOUTS_BEFORE_JOBS = 2  # one may be a gateway's; a second one says that the object is too slow for the call
PIPE_POLL_SECONDS = 0.01  # how soon an idle worker process gets a task
DEATHS_ENDURED = 3  # of worker processes, over one object or without any result
SLOWEST_BYTES_PER_SECOND = 1_000  # of an answer, on the average; what is slower than a modem drips
LOOK_SECONDS = 60  # for an answer that no conversion waits for
ERROR_BODY_BYTES = 65_536  # of an error page; its first part says what there is to say
POLLS_BEFORE_LOST = 5  # that a job is not known by, half a minute: a new one may not be known everywhere at once
MOST_SUCCESSORS = 9  # of a key; each failed job within a day takes one
MOST_TAKEN_KEYS = 2  # each checkpoint that is lost within a day takes one; a third refusal is about the file
MESSAGE_CHARACTERS = 1_000  # of what the API says of a failure
CHUNK_BYTES = 256 * 1024
MEMORY_BODY_BYTES = 1 << 20  # a larger answer goes through a temporary file
MULTIPART_BYTES = 100 * 10**6  # a larger output is put in parts, each of which is in memory twice; one PUT is streamed
PART_BYTES = 5 << 20  # the least that S3 takes
S3_TIMEOUT_SECONDS = 60
S3_ATTEMPTS = 5  # about 8 s, in all
PAGE_KEYS = 1000  # what S3 lists at once
LIST_THREADS = 16  # pages at a time, at most: 100,000 keys/s where a page takes 160 ms
PAGE_WAIT_SECONDS = 0.02  # as long as it takes to read a page is no reason to have more of them read at a time
LIST_URL_SECONDS = 300
FAST_FAILURES_ENDURED = 3  # in a row; after them boto3 lists alone
FOLDER_LEVELS_PROBED = 4  # for folders to list side by side
PAGES_WORTH_A_SPAN = 4  # a shorter one is read to its end by whoever reads it: its last page is read by two
DIGITS_OF_A_KEY = 6  # by which it is told where keys lie
LAST_KEY = "\U0010ffff" * (1024 // 4)  # no key comes after it
MOST_CUTS_BY_FOLDERS = 4 * LIST_THREADS  # so that one large folder among small ones does not hold up the end
HEADS_AT_A_TIME = 16  # S3 takes thousands; more would starve the workers' own requests
FOLDERS_REMEMBERED = 1_000  # of which it is known whether outputs lie there; in those beyond, nobody looks
KEYS_REMEMBERED = 50_000  # of a file of keys, because it may name one twice
LINE_BYTES = 8 << 20  # of a file of keys: a manifest may be one line, a key's line is far shorter
SQL_VARIABLES = 900  # SQLite before 3.32 takes 999
SENT_KEPT_SECONDS = 7 * 86_400  # an unsettled request that no run has met for so long belongs to a deleted object
FOUND_KEPT = 10_000  # more than the notes that can wait for the recorder: 8 for each of at most 1,000 workers
LATENCIES_KEPT = 10_000  # the percentiles are those of the newest
FAILURES_BEFORE_RATE_COUNTS = 50
REFUSALS_ENDURED = 10  # in a row, for the same reason: fewer may be about these objects, so many are about all
COMMIT_SECONDS = 0.05  # that an outcome waits for others: a commit for each would cost more than its conversion
CODES_KEPT = 20  # codes of failures that are counted by name; an API that invents more of them fills no memory
MOST_SHOWN = 200  # characters of a key or a message in the summary; the failures file has all of them
IDLE_TO_BUSY = 9  # of the thread that counts the total: a tenth of a processor at the most
LEAST_BAR = len(" |") + 10 + len("| ")
DRAW_SECONDS = 0.2  # between two states of the bar
PUBLISHED_LATENCY_SECONDS = 0.8  # the API's own median for files under 5 MB
LINE_SECONDS = 60  # between two lines where there is no terminal, even if nothing finishes
SILENCE_SECONDS = 30  # without news, what is being waited for is said
RATE_SECONDS = 60  # the rate that is shown is that of the last minute
METRICS_SECONDS = 15  # as often as Prometheus asks, by default
METADATA_KEY_BYTES = 1_400  # S3 takes 2 KB of metadata in all; a longer key is stored as its digest
S3_KEY_BYTES = 1_024
SCARCE_DISK_BYTES, LITTLE_DISK_BYTES = 100 * 10**6, 10**9  # a failure, a warning of --check
SYNC_LIMIT_BYTES = 100 * 10**6  # what /v1/convert takes, in the smaller reading of MB
MOST_SHARDS = 10_000  # the largest array job of AWS Batch and of Cloud Run

OLDEST_PACKAGES = {"boto3": "1.36", "requests": "2.31", "tqdm": "4.60", "urllib3": "2.0.2"}
CONVERT_PATH, JOBS_PATH, USAGE_PATH = "/v1/convert", "/v1/jobs", "/v1/usage"
JOB_LOST = "job_lost"
# About the account or the address, if the API says so; a filter on the way says it of a single object.
REFUSALS = frozenset({*range(300, 400), 401, 402, 403, 404, 405})
UNKNOWN_TO_API = "not_found"  # its code for a job that it does not know
FORMAT_ALIASES = {
    "jpeg": "jpg",
    "jpe": "jpg",
    "tif": "tiff",
    "htm": "html",
    "mpg": "mpeg",
    "yml": "yaml",
    "markdown": "md",
}
BUCKET_NAME = r"[A-Za-z0-9._-]{1,255}|arn:aws.*:s3.*:accesspoint[/:][A-Za-z0-9.-]+"  # what boto3 lets through
# How globs are written for other programs -> what to write here. A key may hold a comma, a brace or a backslash.
GLOB_MISTAKES = {
    r".*,|.*,\*.*": "separate globs by spaces, without commas",
    r".*\{.*,.*\}.*": "give a glob of its own for each, as in *.jpg *.png",
    r"/.*": "keys do not begin with /",
    r".*\\\..*": "expected globs such as *.png, and no regular expressions",
    r"""(["']).*\1""": "expected globs such as *.png",
    r"[^*?[]*/": "did you mean {}*?",
    r"[^*?[./]+": "did you mean *.{}?",
}
TEMPLATE_FIELDS = ("key", "dir", "name", "stem", "ext", "target", "job")
DROPPINGS = (".DS_Store", "Thumbs.db", "desktop.ini", "._*", "*.aae")  # of macOS, Windows and iOS: nobody's content
ARCHIVE_CLASSES = frozenset({"GLACIER", "DEEP_ARCHIVE"})  # storage classes that cannot be read before a restore
UNMATCHED, FOLDER, EMPTY, ARCHIVED = "not_matched", "folder", "empty", "archived"
SAME_FORMAT, OWN_OUTPUT, FAILED_BEFORE = "same_format", "own_output", "failed_before"
LISTED, ALREADY_DONE, LEFT_TO_DO = "listed", "already_done", "left"
RETRIED = "retried"  # of those that are to do: their last attempt failed
TO_CONVERT, TO_RESUME, TO_COPY = "convert", "resume", "copy"

# What a file of a format begins with: (offset, bytes). A format that is not here is judged by its media type alone.
SIGNATURES: Mapping[str, Sequence[tuple[int, bytes]]] = {
    "jpg": [(0, b"\xff\xd8\xff")],
    "jfif": [(0, b"\xff\xd8\xff")],
    "png": [(0, b"\x89PNG\r\n\x1a\n")],
    "apng": [(0, b"\x89PNG\r\n\x1a\n")],
    "gif": [(0, b"GIF87a"), (0, b"GIF89a")],
    "webp": [(8, b"WEBP")],
    "avif": [(4, b"ftyp")],
    "heic": [(4, b"ftyp")],
    "tiff": [(0, b"II*\0"), (0, b"MM\0*"), (0, b"II+\0"), (0, b"MM\0+")],
    "bmp": [(0, b"BM")],
    "ico": [(0, b"\0\0\1\0")],
    "pdf": [(0, b"%PDF-")],
    "ai": [(0, b"%PDF-"), (0, b"%!PS")],
    "zip": [(0, b"PK\3\4"), (0, b"PK\5\6")],
    "gz": [(0, b"\x1f\x8b")],
    "mp4": [(4, b"ftyp")],
    "mov": [(4, b"ftypqt"), (4, b"moov"), (4, b"wide"), (4, b"free"), (4, b"mdat")],
    "m4a": [(4, b"ftyp")],
    "mp3": [(0, b"ID3"), (0, b"\xff\xfb"), (0, b"\xff\xfa"), (0, b"\xff\xf3"), (0, b"\xff\xf2"), (0, b"\xff\xe3")],
    "wav": [(8, b"WAVE")],
    "avi": [(8, b"AVI ")],
    "flac": [(0, b"fLaC")],
    "ogg": [(0, b"OggS")],
    "webm": [(0, b"\x1a\x45\xdf\xa3")],
    "mkv": [(0, b"\x1a\x45\xdf\xa3")],
    "rtf": [(0, b"{\\rtf")],
}
# What a whole file ends with, where nothing else in it says how long it is. None of these is likely where one is cut.
ENDINGS: Mapping[str, bytes] = {
    **dict.fromkeys(("jpg", "jfif"), b"\xff\xd9"),
    **dict.fromkeys(("png", "apng"), b"\0\0\0\0IEND\xaeB`\x82"),
    "gif": b"\0;",
    "pdf": b"%%EOF",
}
RIFF_BASED = frozenset({"webp", "wav", "avi"})
ZIP_BASED = frozenset(
    {
        *("zip", "docx", "xlsx", "pptx", "odt", "ods", "odp", "epub", "jar", "apk", "cbz", "kmz", "xps", "oxps", "3mf"),
        *("docm", "dotx", "dotm", "xlsm", "xlsb", "xltx", "xltm", "pptm", "ppsx", "ppsm", "potx", "potm", "vsdx"),
        *("odg", "odf", "ott", "ots", "otp", "otg", "pages", "numbers", "key", "idml", "usdz"),
    }
)
JSON_TYPES = frozenset({"application/json", "application/problem+json", "text/json"})
JSON_FORMATS = frozenset(
    {"json", "ndjson", "jsonl", "geojson", "topojson", "jsonld", "ipynb", "har", "webmanifest", "gltf", "lottie"}
)
ANY_JSON = frozenset({"json", "ndjson", "jsonl"})  # those of them that may begin as the API's error does
GENERIC_TYPES = frozenset({"", "application/octet-stream", "binary/octet-stream"})
PACKINGS = frozenset({"br", "compress", "deflate", "gzip", "zstd"})  # Content-Encodings under which bytes are others
HTML_FORMATS = frozenset({"html", "xhtml", "mhtml"})
TEXT_FORMATS = frozenset({"html", "xhtml", "xml", "svg", "md", "txt", "csv", "json", "yml", "rst", "tex"})
MARKUP_FORMATS = frozenset({"svg", "xml"})
UNPACKED_HERE = frozenset({"gzip", "x-gzip", "deflate"})  # those of an answer that can be told by how they begin
# HEIC and AVIF have the boxes of MP4: their brands tell them apart. Those of the last row say an image, and not which.
BRANDS = {
    "avif": frozenset({b"avif", b"avis"}),
    "heic": frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}),
    "": frozenset({b"mif1", b"msf1", b"miaf", b"MA1A", b"MA1B"}),
}
EXTRA_MEDIA_TYPES = {"webp": "image/webp", "heic": "image/heic", "avif": "image/avif", "md": "text/markdown"}


########################################################################################################################
# Failures. UserError is for people: what happened, and what to do. ObjectFailed is one object's; RunStopped ends the
# run without blaming an object. Anything else is a bug of this script and keeps its traceback.
#   - Each of them is caught in one place: UserError by `main`, ObjectFailed by `convert_object`, RunStopped by whoever
#     runs a thread (`Feeder.run`, `convert_object`, `Recorder`), which then asks the whole run to stop.
#   - Their arguments go to `super().__init__` unchanged, so that they survive being pickled.
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


@dataclass(frozen=True)
class Stop:
    """Why a run ends before its work does: one sentence why, one sentence what to do."""

    because: str
    hint: str
    exit_code: ExitCode = ExitCode.STOPPED
    is_limit: bool = False  # of time, conversions or failures: if the very last object meets it, it stops nothing

    @property
    def is_by_signal(self) -> bool:
        """Whether somebody waits for it: only then has what is in flight to hurry."""
        return self.exit_code in {ExitCode.SIGINT, ExitCode.SIGTERM}


def counted(count: int, noun: str) -> str:
    """So many of something."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class UserError(Exception):
    """An expected failure: `hint` tells the person what to do, `exit_code` tells the shell."""

    def __init__(self, message: str, hint: str, exit_code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message, hint, exit_code)
        self.message, self.hint, self.exit_code = message, hint, exit_code


class ConfigError(UserError):
    """Every problem of the configuration at once, one a line. `path`: of the INI file, if any of them is in it."""

    def __init__(self, path: Path | None, problems: Sequence[str]) -> None:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        look = "compare it with config.example.ini" if path else "see --help and config.example.ini"
        super().__init__(
            f"{path or 'the configuration'} has {counted(len(problems), 'problem')}{lines}",
            f"{look}; nothing was listed or converted",
        )


class RunStopped(Exception):
    """The whole run must end; the object in hand is not to blame."""

    def __init__(self, because: str, hint: str) -> None:
        super().__init__(because, hint)
        self.stop = Stop(because, hint)


class Interrupted(Exception):
    """A wait ended because the run is stopping. The object stays to do."""


class ObjectFailed(Exception):
    """One object could not be converted. `permanent`: not tried again before it changes. `status`: HTTP, 0 for none."""

    def __init__(self, code: str, message: str, *, permanent: bool, status: int = 0) -> None:
        super().__init__(code, message)
        self.code, self.message, self.permanent, self.status = code, message, permanent, status


class JobFailed(ObjectFailed):
    """A job of the API's came to nothing. `is_old`: it is older than the request that was answered with it."""

    def __init__(self, code: str, message: str, *, permanent: bool, is_old: bool = False) -> None:
        super().__init__(code, message, permanent=permanent)
        self.is_old = is_old


class BadAnswer(Exception):
    """A 200 whose body is not the result: cut, empty, an error page. Asking again with the same key costs nothing."""

    def __init__(self, code: str, message: str, *, permanent: bool = False) -> None:
        super().__init__(code, message)
        self.code, self.message, self.permanent = code, message, permanent


########################################################################################################################
# Records. What crosses a border between rooms: frozen, and made of strings and numbers only.
#   - A Task holds all that must be the same when its request is sent again after a crash; a worker needs nothing else.
#   - An Outcome says all that the journal, the failures file and the report will ever know of a task.
########################################################################################################################


class S3Object(NamedTuple):
    """One line of a listing. A tuple, because millions of finished objects are made, looked up and dropped."""

    key: str  # as S3 has it: any characters, up to 1,024 bytes of UTF-8
    etag: str  # without quotes
    size: int  # bytes
    last_modified: str  # ISO 8601 in UTC, as S3 writes it; few objects ever need it as a number
    archived: bool = False  # in GLACIER or DEEP_ARCHIVE, and not restored at the moment

    @property
    def modified(self) -> float:
        """When it was written, in Unix seconds."""
        return unix_seconds(self.last_modified)


class Page(NamedTuple):
    """One page of a listing. `token` asks for the next one; without one, what comes next is after the last key."""

    objects: list[S3Object]
    folders: list[str]  # what lies behind the delimiter, if one was asked for: keys up to and including it
    token: str = ""
    is_truncated: bool = False  # S3 says that there is more, whether or not it gives a token

    @property
    def is_last(self) -> bool:
        """Whether nothing comes after it."""
        return not (self.token or self.is_truncated)


class Candidate(NamedTuple):
    """An object that a job wants."""

    job: "Job"
    source: S3Object
    is_known: bool = False  # the journal has a row of another version of it


@dataclass(frozen=True)
class Task:
    """One conversion to make, with everything that must be the same when it is sent again after a crash."""

    job: str
    fingerprint: str  # of the job: see Job
    key: str
    etag: str
    size: int
    target: str
    quality: int | None
    output_key: str  # as planned; an archive of pages gets ".zip" behind it
    idempotency_key: str  # as url and path: of the request that is sent first, or was sent last
    url: str = ""  # presigned; empty: the bytes are uploaded
    path: str = CONVERT_PATH
    sent_at: float = 0.0  # Unix seconds, when it was first sent; 0: not yet
    doubled: bool = False  # another request for this very version may have been paid as well
    copy: bool = False  # already in the target format: a server-side copy, nothing is sent to the API
    resumed: bool = False  # a run before this one may have sent it already
    overdue: bool = False  # so long ago that the API has forgotten the key
    traced: bool = False  # the journal knows of it: another version, other options, or a request
    look_first: bool = False  # its output may be there already: see whether it is this version's
    among_sources: bool = False  # outputs lie between sources, and must not overwrite one
    job_id: str = ""  # the API's, where it has accepted this as a job already

    @property
    def may_be_done(self) -> bool:
        """Whether the API may have its result. It knows a job for longer than the key of the request that made it."""
        return self.resumed or bool(self.job_id)

    @property
    def is_doubtful(self) -> bool:
        """Whether the API may have been paid for it already, under another key or under one that it has forgotten."""
        return self.overdue or self.doubled


class Sent(NamedTuple):
    """An unsettled request of an earlier run, as the journal has it. `sent_at` in Unix seconds."""

    etag: str
    idempotency_key: str
    url: str  # as it was sent, to the character: another URL would be another body
    sent_at: float
    job_id: str = ""  # of the job that the API has made of it
    path: str = CONVERT_PATH
    doubled: bool = False


# The newest journal row of an object: key, ETag, event, and 1 if it is permanent. As SQLite makes it, because a pass
# over finished objects fetches millions.
State = tuple[str, str, str, int]


class Event(str, Enum):
    """How a task ended. The first three are events of the journal; LEFT is to do, for the next run."""

    CONVERTED = "converted"
    FAILED = "failed"
    FOUND = "found"
    LEFT = "left"


@dataclass(frozen=True)
class Outcome:
    """How one task ended, with what it took. `unsettled`: the API may know of the request, so it is kept."""

    task: Task
    event: Event
    code: str = ""  # the API's own, or one of this program's
    message: str = ""
    status: int = 0  # HTTP status of the API's last reply; 0 if there was none
    permanent: bool = False
    unsettled: bool = False
    output_key: str = ""  # where the output really is
    bytes_out: int = 0
    seconds: float = 0.0  # from the worker's first step to its last, waits included
    requests: int = 0
    throttled: int = 0  # answers 429
    replayed: bool = False
    maybe_paid_twice: bool = False
    remaining: int | None = None


@dataclass(frozen=True)
class InFlight:
    """What the journal has to know of a task: what is sent for it next, or which job the API has made of that."""

    task: Task  # as it was handed out
    request: Task  # as it would be sent again


@dataclass(frozen=True)
class Heard:
    """What one worker has heard from the API that concerns all of them."""

    limit: int = 0  # requests per minute that the API allows; 0: it did not say
    throttled_seconds: float = 0.0  # for how long nobody may send
    slots: int = 0  # requests sent beside the one that the feeder has made room for: retries, polls
    url_taken: bool | None = None  # whether it takes presigned URLs


@dataclass(frozen=True)
class Asking:
    """A worker process is about to send a request of any kind."""


@dataclass(frozen=True)
class Counted:
    """What the feeder disposed of without a worker: (job, name of the count) -> how many; no job's own under ""."""

    counts: Mapping[tuple[str, str], int]  # "listed", "already_done", "left", RETRIED, and reasons to skip


@dataclass(frozen=True)
class TotalKnown:
    """A count over the whole listing has come to its end: how many objects this run is to try."""

    total: int


@dataclass(frozen=True)
class FeedEnded:
    """The feeder has handed out all it will. `stop` says why, if that was not all there is."""

    stop: Stop | None
    is_complete: bool = False  # the listing was read to its end


class Verdict(Enum):
    """What an error reply means for a batch."""

    RETRY = "the same request again, it uses up an attempt"
    WAIT = "the same request again later, free of charge"
    NEW_KEY = "the idempotency key is taken by another body"
    GIVE_UP = "this object cannot be converted"
    REFUSED = "this request was refused, and whether all others will be is for them to show"
    STOP_RUN = "no object can be converted"


@dataclass
class Exchange:
    """What one task's requests have come to so far. Belongs to one worker; carried through every retry."""

    task: Task
    request: Task  # the one in hand, as the journal has it
    requests: int = 0  # of every kind: conversions, polls, downloads
    throttled: int = 0
    maybe_done: bool = False  # the API may have done the request in hand, and this program does not have the answer
    left_open: Task | None = None  # a request before the one in hand of which that is true
    replayed: bool = False
    taken_keys: int = 0
    unknown_polls: int = 0  # in a row, to which the API has said that it knows no such job
    asked_at: float = -math.inf  # monotonic seconds; when the call in hand was first sent
    failed_jobs: int = 0  # that may not fail again
    timeouts: int = 0  # 504s: the conversion takes longer than the API's synchronous call may
    remaining: int | None = None

    @property
    def may_be_paid(self) -> bool:
        """Whether the API may hold an answer that this program can still ask for."""
        return self.maybe_done or self.left_open is not None

    @property
    def is_open(self) -> bool:
        """Whether the API may know of it. Of what it has put off, it may remember the body: no other may be sent."""
        return self.may_be_paid or self.throttled > 0 or self.request.is_doubtful


@dataclass
class Result:
    """A whole, judged answer of the API, ready to be stored. `body` is positioned at its start."""

    body: IO[bytes]
    size: int
    media_type: str
    suffix: str = ""  # ".zip" for an archive of pages


########################################################################################################################
# Settings. An option is declared once, as a field of one of the four sections; the INI file, the environment, the
# command line, the checks and the tests of the documentation all read those declarations.
#   - A value is text with a place of origin (Given) until its reader has read it; problems are collected, not raised,
#     so that a person sees all of them at once.
#   - A secret is never a part of a message, not even a wrong one.
########################################################################################################################

T = TypeVar("T")


@dataclass(frozen=True)
class OptionSpec:
    """How an option is read from text, and what it is for. `reader` raises ValueError with what it accepts."""

    reader: Callable[[str], Any]
    purpose: str
    required: bool = False
    secret: bool = False  # never shown


def option(
    reader: Callable[[str], Any], purpose: str, *, default: T, required: bool = False, secret: bool = False
) -> T:
    """Declare a field of a section as an option."""
    declared: Any = field(default=default, metadata={"spec": OptionSpec(reader, purpose, required, secret)})
    return cast(T, declared)


def text(given: str) -> str:
    """Any text."""
    return given


def key_text(given: str) -> str:
    """What may stand in a key."""
    try:
        given.encode()
    except UnicodeEncodeError:
        raise ValueError("expected UTF-8, for S3 has no other keys; check the terminal's locale") from None
    return given


def bucket_name(option: str) -> Callable[[str], str]:
    """A reader of a bucket's name, or the ARN of an access point; `option`: which one is read."""

    def read(given: str) -> str:
        address = re.fullmatch(r"s3://([^/]+)/*(.*?)/*", given)
        if address:
            below = f" and prefix = {address[2]}/" if address[2] and option == "bucket" else ""
            raise ValueError(f"expected a bucket's name; did you mean {option} = {address[1]}{below}?")
        if given and not re.fullmatch(BUCKET_NAME, given):
            raise ValueError("expected a bucket's name")
        return given

    return read


def key_prefix(given: str) -> str:
    """What keys begin with. Any text may be one, but not what is surely meant for another program."""
    if given.startswith("s3://"):
        raise ValueError("give only what follows the bucket")
    if is_quoted(given):
        raise ValueError("expected the beginning of a key")
    return key_text(given)


def globs(given: str) -> tuple[str, ...]:
    """Globs separated by white space. What can hardly match a key is refused: a run would silently convert nothing."""
    patterns = tuple(given.split())
    for pattern in patterns:
        for mistake, said in GLOB_MISTAKES.items():
            if re.fullmatch(mistake, pattern):
                raise ValueError(said.format(pattern))
    return patterns


def is_quoted(given: str) -> bool:
    """Whether a value stands in quotes, as other programs want it."""
    return re.fullmatch(r"""(["']).*\1""", given, re.DOTALL) is not None


def boolean(given: str) -> bool:
    """What configparser takes for a boolean."""
    states = configparser.ConfigParser.BOOLEAN_STATES
    if given.lower() not in states:
        raise ValueError("expected yes or no")
    return states[given.lower()]


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A reader of whole numbers from `least` to `most`."""
    expected = f"a whole number of {least} or more" if most is None else f"a whole number from {least} to {most}"

    def read(given: str) -> int:
        if not re.fullmatch(r"\d{1,12}", given) or int(given) < least or (most is not None and int(given) > most):
            raise ValueError(f"expected {expected}")
        return int(given)

    return read


def size(given: str) -> int:
    """Bytes, from `500`, `100MB` (10^6) or `5 GiB` (2^30)."""
    units = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", given.lower())
    if match is None or match[2] not in units:
        raise ValueError("expected a size such as 500, 100MB or 5GiB")
    return int(float(match[1]) * units[match[2]])


def duration(given: str) -> float:
    """Seconds, from `150s`, `10m`, `2h` or `7d`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", given.lower())
    if match is None:
        raise ValueError("expected a duration such as 150s, 10m, 2h or 7d")
    # A number alone is refused: nobody should have to guess whether 150 is seconds or minutes.
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def positive_duration(given: str) -> float:
    """Seconds, and more than none."""
    seconds = duration(given)
    if not seconds:
        raise ValueError("expected a duration of more than 0, such as 150s")
    return seconds


def rate(given: str) -> float:
    """A fraction of 1, from `2%`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", given)
    if match is None or float(match[1]) > 100:
        raise ValueError("expected a rate such as 2%")
    return float(match[1]) / 100


def file_format(given: str) -> str:
    """A format by its extension, in lower case and without a dot."""
    name = given.lower().lstrip(".")
    if not re.fullmatch(r"[a-z0-9]{1,10}", name):
        raise ValueError("expected a file extension such as jpg or pdf")
    return name


def url(given: str) -> str:
    """The address of a server, without a slash at its end."""
    expected = "expected an address such as https://changethisfile.com"
    try:
        parts = urllib.parse.urlsplit(given)
        is_complete = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        raise ValueError(expected) from None
    if not is_complete or parts.query or parts.fragment or re.search(r"\s", given):
        raise ValueError(expected)
    return given.rstrip("/")


def one_of(*choices: str) -> Callable[[str], str]:
    """A reader of one of some words."""

    def read(given: str) -> str:
        if given.lower() not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return given.lower()

    return read


def unless(word: str, reader: Callable[[str], T]) -> Callable[[str], T | None]:
    """A reader that reads `word`, and an empty value, as None."""

    def read(given: str) -> T | None:
        if given.lower() in {word, ""}:
            return None
        try:
            return reader(given)
        except ValueError as problem:
            raise ValueError(f"{problem}, or {word}") from None

    return read


@dataclass(frozen=True)
class Shard:
    """One of the parts into which several machines divide the work; as it stands, the only one: everything."""

    index: int = 0  # from 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def named(self) -> str:
        """How a sentence about the run goes on; empty if there is but one shard."""
        return f" for shard {self}" if self.count > 1 else ""

    def owns(self, text: str) -> bool:
        """Whether this shard is the one that a text belongs to.

        Asked of the claim of a planned output; an object that no job wants belongs to the shard that owns its key.
        """
        # Not `hash`, which differs from process to process. A key may hold anything: half a surrogate pair as well.
        digested = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digested, "big") % self.count == self.index

    def share(self, total: int) -> int:
        """The part of a whole number that falls to this shard; those of all shards add up to it."""
        return total // self.count + (self.index < total % self.count)

    def file(self, path: str) -> str:
        """The shard's own name for a file: `a.json` is `a.0-of-8.json`. A device is no file and keeps its name."""
        stem, ending = os.path.splitext(path)
        return path if self.count == 1 or path.startswith("/dev/") else f"{stem}.{self.index}-of-{self.count}{ending}"


def shard(given: str) -> Shard:
    """One of N parts, from `I/N`."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", given)
    if match is None or not int(match[1]) < int(match[2]) <= MOST_SHARDS:
        raise ValueError(f"expected I/N such as 0/8, with I from 0 to N - 1 and N at most {MOST_SHARDS}")
    return Shard(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class S3Options:
    """The options of [s3]."""

    bucket: str = option(bucket_name("bucket"), "bucket to read from", default="", required=True)
    prefix: str = option(key_prefix, "only keys that begin so", default="")
    output_bucket: str = option(bucket_name("output_bucket"), "bucket to write to, if it is another", default="")
    output_key: str = option(
        key_text,
        "key of an output; fields {key} {dir} {name} {stem} {ext} {target} {job}",
        default="converted/{dir}{stem}.{target}",
    )
    endpoint_url: str | None = option(unless("none", url), "any S3-compatible store", default=None)
    region: str | None = option(unless("none", text), "region, if boto3 does not know it", default=None)
    profile: str | None = option(unless("none", text), "profile of the AWS configuration", default=None)
    storage_class: str | None = option(unless("none", text), "storage class of outputs", default=None)
    sse: str | None = option(unless("none", text), "server-side encryption: AES256 or aws:kms", default=None)
    sse_kms_key_id: str | None = option(unless("none", text), "key for aws:kms", default=None)
    acl: str | None = option(unless("none", text), "canned ACL of outputs", default=None)
    cache_control: str | None = option(unless("none", text), "Cache-Control of outputs", default=None)
    requester_pays: bool = option(boolean, "the requester pays for S3 requests", default=False)

    @property
    def written_bucket(self) -> str:
        """The bucket that outputs go to."""
        return self.output_bucket or self.bucket

    @property
    def is_one_bucket(self) -> bool:
        """Whether outputs go to where the sources are."""
        return self.written_bucket == self.bucket


@dataclass(frozen=True)
class ConvertOptions:
    """The options of [convert], which a [job NAME] may override."""

    target: str = option(file_format, "format to convert to", default="", required=True)
    include: tuple[str, ...] = option(globs, "globs of what to convert", default=("*",))
    exclude: tuple[str, ...] = option(globs, "globs of what to leave out", default=DROPPINGS)
    min_size: int | None = option(unless("none", size), "only objects of at least this size", default=None)
    max_size: int | None = option(unless("none", size), "only objects of at most this size", default=None)
    newer_than: float | None = option(unless("none", duration), "only objects changed within this time", default=None)
    older_than: float | None = option(unless("none", duration), "only objects not changed for this time", default=None)
    quality: int | None = option(unless("none", whole(1, 100)), "quality, for lossy formats", default=None)
    same_format: str = option(
        one_of("skip", "copy", "convert"), "a source that is in the target format already", default="skip"
    )


@dataclass(frozen=True)
class ApiOptions:
    """The options of [api]."""

    url: str = option(url, "address of the API", default="https://changethisfile.com")
    key: str = option(text, "API key; better in the environment as CTF_API_KEY", default="", secret=True)
    key_file: str = option(text, "file that holds the API key", default="")
    transfer: str = option(
        one_of("auto", "url", "upload"),
        "send a presigned URL, or the bytes; auto: URL if the API takes it",
        default="auto",
    )
    requests_per_minute: int | None = option(
        unless("auto", whole(1)), "cap on the rate; auto: what the API allows", default=None
    )
    max_conversions: int | None = option(
        unless("none", whole(1)), "conversions to ask for in one run, failed ones included", default=None
    )
    keep_remaining: int = option(whole(0), "stop when the month has so many conversions left", default=0)
    timeout: float = option(positive_duration, "how long to wait for an answer", default=150.0)
    retries: int = option(whole(0, 20), "transient failures that one object may have", default=5)
    jobs_above: int | None = option(unless("never", size), "larger objects go through /v1/jobs", default=100 * 10**6)
    max_size: int = option(size, "larger objects are not sent", default=5 * 10**9)


@dataclass(frozen=True)
class RunOptions:
    """The options of [run]."""

    workers: int = option(whole(1, 1000), "conversions at a time, over all processes", default=10)
    processes: int = option(whole(1, 64), "processes that share the workers out among them", default=1)
    checkpoint: str = option(text, "SQLite file that remembers what is done", default="s3_bulk_convert.sqlite3")
    failures: str = option(
        text, "file that failures are appended to, a JSON line each", default="conversion_failures.jsonl"
    )
    max_failure_rate: float | None = option(
        unless("never", rate), "stop when more fail, after 50 finished objects", default=0.02
    )
    skip_existing: bool = option(boolean, "an output newer than its source counts as done", default=True)
    shutdown_grace: float = option(duration, "time for what is in flight after SIGINT or SIGTERM", default=30.0)
    max_runtime: float | None = option(unless("none", duration), "take no new objects after this", default=None)
    summary: str | None = option(unless("none", text), "file for a JSON summary of the run", default=None)
    metrics: str | None = option(unless("none", text), "file for metrics, in Prometheus' text format", default=None)
    log_every: int = option(whole(1), "a line of progress every so many objects, without a terminal", default=100)

    @property
    def consumers(self) -> int:
        """How many threads of this process take tasks off the queue: the workers, or one for each process of them."""
        return self.workers if self.processes == 1 else self.processes


SECTIONS: Mapping[str, Any] = {"s3": S3Options, "convert": ConvertOptions, "api": ApiOptions, "run": RunOptions}
SHARDED_FILES = (
    "checkpoint",
    "failures",
    "summary",
    "metrics",
)  # options of [run] that name what one run alone may write
JOB_OPTIONS = (*(part.name for part in fields(ConvertOptions)), "prefix", "output_key")
NO_KEY = "[api] key is missing: set CTF_API_KEY, or api.key or api.key_file"
ENVIRONMENT = {
    "CTF_API_KEY": ("api", "key"),
    "S3_BUCKET": ("s3", "bucket"),
    "SOURCE_PREFIX": ("s3", "prefix"),
    "TARGET_FORMAT": ("convert", "target"),
    "CONCURRENCY": ("run", "workers"),
}


@dataclass(frozen=True)
class Engine:
    """An array-job engine, and the variables in which it tells a task which of how many it is.

    Slurm's indexes begin anywhere and go up in steps, so that the rank has to be worked out.
    """

    name: str
    index: str
    count: str
    first: str = ""
    last: str = ""
    step: str = ""

    @property
    def needed(self) -> list[str]:
        """The variables without which nothing can be said; only the step may be missing."""
        return [name for name in (self.index, self.count, self.first, self.last) if name]


ENGINES = (
    Engine("AWS Batch", "AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE"),
    Engine(
        "Slurm",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_ARRAY_TASK_COUNT",
        "SLURM_ARRAY_TASK_MIN",
        "SLURM_ARRAY_TASK_MAX",
        "SLURM_ARRAY_TASK_STEP",
    ),
    Engine("Cloud Run", "CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT"),
    # Kubernetes has no variable for the count: the Job's author sets this one. The index alone may be another's.
    Engine("Kubernetes", "JOB_COMPLETION_INDEX", "SHARD_COUNT"),
)


@dataclass(frozen=True)
class Given:
    """A value as a person wrote it. `named`: how the place it came from is called in messages."""

    section: str
    name: str
    value: str
    named: str


@dataclass(frozen=True)
class Job:
    """One route: which objects, to which format, under which keys.

    `fingerprint` stands for everything that makes the output another one: target, options, where it is put. The name
    of a job counts only where it is part of the output key.
    """

    name: str
    prefix: str
    output_key: str
    options: ConvertOptions
    fingerprint: str


@dataclass(frozen=True)
class Settings:
    """A complete and checked configuration."""

    s3: S3Options
    api: ApiOptions
    run: RunOptions
    jobs: tuple[Job, ...]
    shard: Shard = Shard()
    retry_failed: bool = False
    keys_from: str | None = None
    quiet: bool = False
    log_format: str = "text"
    key_problem: str = ""  # why there is no API key, for commands that can do without

    def for_shard(self, shard: Shard) -> "Settings":
        """The same for one shard: with files of its own and its share of the cap, which may be 0.

        The rate stays: it is the pacer that divides it, because what the API allows is divided too.
        """
        run, most = self.run, self.api.max_conversions
        named: dict[str, Any] = {name: shard.file(path) for name in SHARDED_FILES if (path := getattr(run, name))}
        share = None if most is None else shard.share(most)
        return replace(self, api=replace(self.api, max_conversions=share), run=replace(run, **named), shard=shard)

    @property
    def own_prefixes(self) -> tuple[str, ...]:
        """Where outputs lie in the bucket of the sources."""
        literals = {literal_prefix(job.output_key) for job in self.jobs}
        return tuple(filter(None, literals)) if self.s3.is_one_bucket else ()

    def puts_among_sources(self, job: Job) -> bool:
        """Whether a job's outputs lie between the sources, because no prefix of their own sets them apart."""
        return self.s3.is_one_bucket and not literal_prefix(job.output_key)

    def hide(self, message: str) -> str:
        """A text of the API's without secrets, the key itself among them."""
        return redacted(message.replace(self.api.key or "\0", "..."))


def specs_of(section: str) -> dict[str, OptionSpec]:
    """The options of a section, by name."""
    parts: Sequence[Field[Any]] = fields(SECTIONS[section])
    return {part.name: part.metadata["spec"] for part in parts}


def read_ini(path: Path, *, required: bool) -> list[Given]:
    """The values in an INI file, without interpolation. Raises UserError if it cannot be read."""
    # No interpolation: a % in a key is a %. No default section: its options would turn up in every other one.
    parser = configparser.ConfigParser(interpolation=None, default_section="\0")
    try:
        with path.open(encoding="utf-8-sig") as lines:
            parser.read_file(lines)
            refuse_exposed_key(path, os.fstat(lines.fileno()).st_mode, parser)
    except FileNotFoundError:
        if not required:
            return []
        raise UserError(f"{path} does not exist", "give the INI file with -c, or copy config.example.ini") from None
    except configparser.Error as problem:
        line, what = syntax_problem(problem)
        raise UserError(f"{path}, line {line}: {what}", "compare it with config.example.ini") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory", "give the INI file with -c, or copy config.example.ini") from None
    except OSError as problem:
        raise UserError(
            f"{path} cannot be read: {problem.strerror}",
            "let this user read it (chmod, chown), or give another with -c",
        ) from None
    except UnicodeDecodeError as problem:
        raise UserError(f"{path} cannot be read: {problem}", "compare it with config.example.ini") from None
    # A section counts without options too: it may be misspelt, or a job that overrides nothing.
    return [
        Given(section, name, value.strip(), f"[{section}] {name}")
        for section in parser.sections()
        for name, value in [("", ""), *parser.items(section)]
    ]


def syntax_problem(problem: configparser.Error) -> tuple[int, str]:
    """Where an INI file is none, and why: never the line itself, which may be the one with the key."""
    line = getattr(problem, "lineno", None) or next((number for number, _ in getattr(problem, "errors", ())), 0)
    if isinstance(problem, configparser.DuplicateOptionError):
        return line, f"[{problem.section}] {problem.option} is given twice"
    if isinstance(problem, configparser.DuplicateSectionError):
        return line, f"[{problem.section}] is there twice"
    if isinstance(problem, configparser.MissingSectionHeaderError):
        return line, "no [section] above it; begin with [s3]"
    return line, "expected NAME = VALUE"


def refuse_exposed_key(path: Path, mode: int, parser: configparser.ConfigParser) -> None:
    """Raise UserError if the file holds the API key and others can read it."""
    if parser.get("api", "key", fallback="") and os.name == "posix" and mode & (stat.S_IRGRP | stat.S_IROTH):
        raise UserError(
            f"{path} holds the API key and others can read it (mode {stat.S_IMODE(mode):04o})",
            f"run: chmod 600 {path}",
        )


def read_environment(environ: Mapping[str, str]) -> list[Given]:
    """The values in the environment variables whose names are fixed."""
    return [
        Given(section, name, environ[variable].strip(), f"{variable} ([{section}] {name})")
        for variable, (section, name) in ENVIRONMENT.items()
        if environ.get(variable)
    ]


def read_shard(flag: str | None, environ: Mapping[str, str], problems: list[str]) -> Shard:
    """The shard that the command line names or, only if it names none, an array job's environment."""
    if flag is None:
        return shard_from_environment(environ, problems)
    try:
        return shard(flag.strip())
    except ValueError as expected:
        problems.append(f"--shard = {flag}: {expected}")
        return Shard()


def shard_from_environment(environ: Mapping[str, str], problems: list[str]) -> Shard:
    """The shard that the array-job engine names which started this task; everything, if there is none.

    What is incomplete or ambiguous is a problem, never a guess: a wrong one would leave objects out, unnoticed.
    """
    found: dict[Shard, str] = {}
    for engine in ENGINES:
        given = {name: environ[name].strip() for name in (*engine.needed, engine.step) if environ.get(name)}
        shown = ", ".join(f"{name} = {value}" for name, value in given.items())
        try:
            if engine.index in given or engine.count in given:
                found.setdefault(engine_shard(engine, given), f"{engine.name} ({shown})")
        except ValueError as problem:
            problems.append(f"{shown}: {problem}, or give --shard 0/1 to convert everything here")
    if len(found) > 1:
        named = " and ".join(f"{shown} names shard {shard}" for shard, shown in found.items())
        problems.append(f"{named}: unset what is not meant, or give --shard 0/1 to convert everything here")
    return next(iter(found), Shard())


def engine_shard(engine: Engine, given: Mapping[str, str]) -> Shard:
    """The shard that an engine's variables name. Raises ValueError with what would have to be otherwise."""
    if missing := [name for name in engine.needed if name not in given]:
        raise ValueError(f"set {' and '.join(missing)} too")
    numbers = {name: whole(1 if name in {engine.count, engine.step} else 0)(value) for name, value in given.items()}
    index, count = numbers[engine.index], numbers[engine.count]
    first, step = numbers.get(engine.first, 0), numbers.get(engine.step, 1)
    last = numbers.get(engine.last, count - 1)
    if first + (count - 1) * step != last:
        raise ValueError("expected indexes without a hole, such as --array=0-15")
    rank, rest = divmod(index - first, step)
    if rest or not 0 <= rank < count:
        raise ValueError(f"expected an index from {first} to {last}" + (f" in steps of {step}" if step > 1 else ""))
    if count > MOST_SHARDS:
        raise ValueError(f"expected at most {MOST_SHARDS} shards")
    return Shard(rank, count)


def unknown_name_problem(given: Given) -> str | None:
    """What is wrong with the name of an option, with the name that was probably meant."""
    if given.section.startswith("job "):
        names: Sequence[str] = JOB_OPTIONS
    elif given.section in SECTIONS:
        names = list(specs_of(given.section))
    else:
        return f"[{given.section}] is not a section{did_you_mean(given.section, [*SECTIONS, 'job NAME'])}"
    if not given.name or given.name in names:
        return None
    elsewhere = [f"[{section}] {given.name}" for section in SECTIONS if given.name in specs_of(section)]
    meant = f"; did you mean {elsewhere[0]}?" if elsewhere else did_you_mean(given.name, names)
    return f"{given.named} is not an option{meant}"


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The rest of a sentence that names what is probably meant, in whatever case it was written."""
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


@contextlib.contextmanager
def noting_problem(problems: list[str], given: Given, spec: OptionSpec) -> Iterator[None]:
    """Turn what a reader refuses into a line of `problems`. A secret is not shown."""
    try:
        yield
    except ValueError as expected:
        shown = "(not shown)" if spec.secret else given.value
        problems.append(f"{given.named} = {shown}: {expected}{what_to_take_away(given.value)}")


def what_to_take_away(value: str) -> str:
    """The rest of a sentence about what stands around a value in other programs' files."""
    if is_quoted(value):
        return "; take the quotes away"
    return "; comments stand on lines of their own" if re.search(r"\s[;#]", value) else ""


def read_values(specs: Mapping[str, OptionSpec], given: Iterable[Given], problems: list[str]) -> dict[str, Any]:
    """The values of the options that are given; where one is given twice, the later one counts."""
    values: dict[str, Any] = {}
    for name, entry in {entry.name: entry for entry in given if entry.name in specs}.items():
        with noting_problem(problems, entry, specs[name]):
            values[name] = specs[name].reader(entry.value)
    return values


def from_its_place(problem: str, named: Mapping[str, str]) -> str:
    """A problem under the name of the place where its option was given: a variable, a flag, the INI file."""
    option, equals, rest = problem.partition(" = ")
    return named.get(option, option) + equals + rest


def in_section(section: str, given: Iterable[Given]) -> list[Given]:
    """The values that belong to a section."""
    return [entry for entry in given if entry.section == section]


def read_jobs(given: Sequence[Given], s3: S3Options, problems: list[str]) -> tuple[Job, ...]:
    """The routes of the run: one for each [job NAME], or the one named default."""
    shared = read_values(specs_of("convert"), in_section("convert", given), problems)
    # Sorted, so that the first job, which keeps an output key, is the same in every run.
    sections = sorted({entry.section for entry in given if entry.section.startswith("job ")}) or ["convert"]
    jobs = []
    for section in sections:
        own = in_section(section, given) if section != "convert" else []
        options = ConvertOptions(**{**shared, **read_values(specs_of("convert"), own, problems)})
        placed = read_values({name: specs_of("s3")[name] for name in ("prefix", "output_key")}, own, problems)
        target_is_given = any(entry.name == "target" and entry.value for entry in own + in_section("convert", given))
        if not target_is_given:
            problems.append(f"[{section}] target is missing")
        name = section.removeprefix("job ").strip() if own else "default"
        jobs.append(make_job(name, replace(s3, **placed), options))
        problems += [*template_problems(jobs[-1], s3), *size_problems(section, options)]
    problems += crossing_problems(jobs, s3)
    return tuple(jobs)


def make_job(name: str, s3: S3Options, options: ConvertOptions) -> Job:
    """A job with the fingerprint of all that decides what its outputs are and where they lie."""
    # A job may be renamed for free, unless its name decides where its outputs lie.
    place = [s3.written_bucket, s3.output_key.replace("{job}", name)]
    return Job(name, s3.prefix, s3.output_key, options, digest([options.target, options.quality, *place]))


def digest(parts: Sequence[str | int | None]) -> str:
    """32 hex digits of SHA-256 over values whose borders cannot be confused."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def template_problems(job: Job, s3: S3Options) -> list[str]:
    """What is wrong with a job's output key template."""
    template = job.output_key
    problems: list[str] = []
    named = set(re.findall(r"\{(\w+)\}", template))
    problems += [
        f"[s3] output_key = {template}: {{{unknown}}} is not a field{did_you_mean(unknown, TEMPLATE_FIELDS)}"
        for unknown in sorted(named - set(TEMPLATE_FIELDS))
    ]
    if not named & {"key", "name", "stem"}:
        problems.append(
            f"[s3] output_key = {template}: every output would get the same key; expected {{stem}}, {{name}} or {{key}}"
        )
    literal = literal_prefix(template)
    if literal and job.prefix.startswith(literal) and s3.is_one_bucket:
        problems.append(
            f"[s3] prefix = {job.prefix}: lies under the outputs ({literal}), and outputs are never converted"
        )
    return problems


def crossing_problems(jobs: Sequence[Job], s3: S3Options) -> list[str]:
    """Jobs whose sources are another job's outputs."""
    literals = {job.name: literal_prefix(job.output_key) for job in jobs if s3.is_one_bucket}
    return [
        f"[job {job.name}] prefix = {job.prefix}: lies under the outputs of [job {other}] ({literal}), "
        "and outputs are never converted"
        for job, (other, literal) in itertools.product(jobs, literals.items())
        if literal not in {"", literals[job.name]} and job.prefix.startswith(literal)
    ]


def literal_prefix(template: str) -> str:
    """What every key that a template makes begins with."""
    return template.partition("{")[0]


def path_problems(run: RunOptions) -> list[str]:
    """A checkpoint without a name, and files that would be written over each other."""
    problems = []
    if not Path(run.checkpoint).name:
        problems.append(f"[run] checkpoint = {run.checkpoint}: expected the path of a file")
    named = {"checkpoint": run.checkpoint, "failures": run.failures, "summary": run.summary, "metrics": run.metrics}
    paths = {name: Path(path).absolute() for name, path in named.items() if path}
    problems += [
        f"[run] {second} = {named[second]}: is the {first} file as well"
        for first, second in itertools.combinations(paths, 2)
        if paths[first] == paths[second]
    ]
    return problems


def size_problems(section: str, options: ConvertOptions) -> list[str]:
    """Limits that leave nothing between them."""
    if options.min_size is None or options.max_size is None or options.min_size <= options.max_size:
        return []
    return [f"[{section}] min_size is larger than max_size: no object can be converted"]


def read_key(api: ApiOptions, problems: list[str]) -> ApiOptions:
    """The options with the API key from its file, if that is where it is."""
    key = api.key
    if not key and api.key_file:
        try:
            key = read_key_file(api.key_file)
        except ValueError as problem:
            problems.append(f"[api] key_file = {api.key_file}: {problem}")
            return api
    if not key:
        problems.append(NO_KEY)
    elif not re.fullmatch(r"[!-~]+", key):
        problems.append("[api] key = (not shown): expected printable ASCII without spaces")
    return replace(api, key=key)


def read_key_file(path: str) -> str:
    """The key in a file. Raises ValueError with what is wrong."""
    try:
        found = Path(path).expanduser().read_text(encoding="ascii").split()
    except OSError as problem:
        raise ValueError(problem.strerror) from None
    except (UnicodeDecodeError, RuntimeError):
        raise ValueError("not a text file") from None
    if len(found) != 1:
        raise ValueError("expected the key and nothing else" if found else "the file is empty")
    return found[0]


def load_settings(
    path: Path | None,
    environ: Mapping[str, str],
    command_line: Sequence[Given],
    shard_flag: str | None = None,
    *,
    needs_key: bool = True,
) -> Settings:
    """The configuration: command line over environment over INI file over defaults.

    `needs_key`: whether a missing API key is a problem. Raises ConfigError with every problem at once, UserError if the
    file cannot be read.
    """
    # A later value replaces an earlier one: this order is the precedence.
    ini = read_ini(path or Path("config.ini"), required=path is not None)
    given = [*ini, *read_environment(environ), *command_line]
    problems = [problem for problem in map(unknown_name_problem, given) if problem]
    sections = {name: read_values(specs_of(name), in_section(name, given), problems) for name in ("s3", "api", "run")}
    s3, api, run = S3Options(**sections["s3"]), ApiOptions(**sections["api"]), RunOptions(**sections["run"])
    if not any(entry.name == "bucket" and entry.value for entry in in_section("s3", given)):
        problems.insert(0, "[s3] bucket is missing")
    problems += path_problems(run)
    if run.processes > run.workers:
        problems.append(f"[run] processes = {run.processes}: more than the {run.workers} workers that they share")
    jobs = read_jobs(given, s3, problems)
    key_problems: list[str] = []
    api = read_key(api, problems if needs_key else key_problems)
    own_shard = read_shard(shard_flag, environ, problems)
    if problems:
        named = {f"[{entry.section}] {entry.name}": entry.named for entry in given}
        told = list(dict.fromkeys(from_its_place(problem, named) for problem in problems))
        is_in_file = any(problem.startswith("[") for problem in told)
        raise ConfigError((path or Path("config.ini")) if ini and is_in_file else None, told)
    return Settings(s3, api, run, jobs, key_problem="".join(key_problems)).for_shard(own_shard)


########################################################################################################################
# Rules. Pure: no files, no network, no clock. Everything that decides what is paid for and what is stored.
#   - Keys are data: they are never a path, a format string or a pattern.
#   - A change to `idempotency_key` or `make_job` makes every finished object new work that is paid for again.
########################################################################################################################


@dataclass(frozen=True)
class KeyParts:
    """A key taken apart as text. Keys are not paths: nothing is normalised."""

    folder: str  # ends in "/" or is empty
    name: str
    stem: str
    ext: str  # without the dot, as written


def split_key(key: str) -> KeyParts:
    """Take a key apart; only a short alphanumeric end after a dot, with a letter in it, is an extension."""
    folder, slash, name = key.rpartition("/")
    stem, _, ext = name.rpartition(".")
    # A hidden file's name is no extension, and neither is the end of a sentence, or of a date as in "scan 12.05.2023".
    if not stem or not re.fullmatch(r"(?=[0-9]*[A-Za-z])[A-Za-z0-9]{1,10}", ext):
        stem, ext = name, ""
    return KeyParts(folder + slash, name, stem, ext)


def canonical(ext: str) -> str:
    """One name for each format: jpeg is jpg."""
    return FORMAT_ALIASES.get(ext.lower(), ext.lower())


def source_format(key: str) -> str:
    """The format that a key's extension names, in lower case; empty if it has none."""
    return split_key(key).ext.lower()


def output_key(job: Job, key: str) -> str:
    """The key that the output of an object is planned to have."""
    parts = split_key(key)
    values = {
        "key": key,
        "dir": parts.folder,
        "name": parts.name,
        "stem": parts.stem,
        "ext": parts.ext,
        "target": job.options.target,
        "job": job.name,
    }
    # One pass over the template: braces inside a key are a part of the key.
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], job.output_key)


def made_keys(planned_key: str) -> tuple[str, str]:
    """The keys that an output may really get: the planned one, or, for an archive of pages, that with `.zip` behind."""
    return planned_key, planned_key + ".zip"


def claim_of(key: str) -> str:
    """The name under which an output key is claimed: the same for both `made_keys`."""
    return key.removesuffix(".zip")


def idempotency_key(bucket: str, source: S3Object, target: str, quality: int | None, place: str) -> str:
    """The API's key for one conversion; another object, version, target, option or place has another.

    `place`: of the output. Two jobs that differ in nothing else send two requests, with URLs signed at two moments:
    under one key the API would refuse the second (docs/idempotency).
    """
    return digest(["s3_bulk_convert/2", bucket, source.key, source.etag, source.size, target, quality, place])


def is_forgotten(sent_at: float) -> bool:
    """Whether the API has forgotten a request, so that to send it again may pay again. `sent_at` in Unix seconds."""
    return time.time() - sent_at > IDEMPOTENCY_WINDOW_SECONDS


def has_dot_segments(key: str) -> bool:
    """Whether HTTP clients would normalise the key's path, so that a presigned URL for it cannot be fetched."""
    return any(segment in {".", ".."} for segment in key.split("/"))


def upload_filename(key: str) -> str:
    """A file name for the multipart form: plain ASCII with the right extension."""
    parts = split_key(key)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", parts.stem)[-60:] or "file"
    # The API would take what stands behind a dot for the format.
    return f"{stem}.{parts.ext}" if parts.ext else stem.replace(".", "_")


def glob_pattern(patterns: Sequence[str], *, with_slash: bool) -> re.Pattern[str] | None:
    """One expression for the globs with a slash (matched against keys), or for those without (against names)."""
    chosen = [fnmatch.translate(pattern) for pattern in patterns if ("/" in pattern) is with_slash]
    return re.compile("|".join(chosen), re.IGNORECASE) if chosen else None


def globs_match(patterns: Sequence[str]) -> Callable[[str], bool]:
    """A predicate on keys: any of the globs matches, without regard to case."""
    on_key, on_name = glob_pattern(patterns, with_slash=True), glob_pattern(patterns, with_slash=False)

    def matches(key: str) -> bool:
        name = key.rpartition("/")[2]
        return bool((on_name and on_name.match(name)) or (on_key and on_key.match(key)))

    return matches


def unix_seconds(date: str) -> float:
    """A date in ISO 8601 as S3 writes it (`2026-11-24T08:17:00.000Z`), in Unix seconds. Raises ValueError."""
    # Python 3.10 does not read the Z.
    return datetime.fromisoformat(date.replace("Z", "+00:00")).timestamp()


def job_filter(job: Job, now: float) -> Callable[[S3Object], bool]:
    """A predicate on listed objects: the job wants it, by prefix, globs, size and age. `now` in Unix seconds."""
    wanted = job.options
    included, excluded = globs_match(wanted.include), globs_match(wanted.exclude)
    takes_all, leaves_out = "*" in wanted.include, bool(wanted.exclude)
    least = wanted.min_size or 0
    most = float("inf") if wanted.max_size is None else wanted.max_size
    oldest = float("-inf") if wanted.newer_than is None else now - wanted.newer_than
    newest = float("inf") if wanted.older_than is None else now - wanted.older_than
    has_ages = wanted.newer_than is not None or wanted.older_than is not None

    def wants(source: S3Object) -> bool:
        if not source.key.startswith(job.prefix) or not least <= source.size <= most:
            return False
        if has_ages and not oldest <= source.modified <= newest:
            return False
        return (takes_all or included(source.key)) and not (leaves_out and excluded(source.key))

    return wants


def plain_type(media_type: str) -> str:
    """A media type without its parameters."""
    return media_type.partition(";")[0].strip()


def media_kind(media_type: str) -> str:
    """The format that a media type names; empty if it says nothing."""
    plain = plain_type(media_type).lower()
    if plain in JSON_TYPES:
        return "json"
    if plain in GENERIC_TYPES:
        return ""
    for ext, extra in EXTRA_MEDIA_TYPES.items():
        if extra == plain:
            return ext
    return canonical((mimetypes.guess_extension(plain) or "").lstrip("."))


def media_type_of(target: str) -> str:
    """The usual media type of a format."""
    return EXTRA_MEDIA_TYPES.get(target) or mimetypes.guess_type(f"x.{target}")[0] or "application/octet-stream"


def begins_like(kind: str, head: bytes) -> bool:
    """Whether the first bytes of a body can begin a file of a format that has a signature."""
    major = head[8:12] if head[4:8] == b"ftyp" else b""
    # A film may be compatible with an image's brand; it is the other way round that no image is a film.
    if kind in {"mp4", "m4a", "mov"} and any(major in brands for brands in BRANDS.values()):
        return False
    if kind in BRANDS and not has_brand_of(kind, head):
        return False
    signatures = SIGNATURES["zip" if kind in ZIP_BASED else kind]
    return any(head[offset : offset + len(magic)] == magic for offset, magic in signatures)


def has_brand_of(kind: str, head: bytes) -> bool:
    """Whether HEIC, or AVIF, is among the brands of a file: its major one and those that it is compatible with."""
    end = int.from_bytes(head[:4], "big")  # of the box that lists them
    found = {head[8:12], *(head[start : start + 4] for start in range(16, min(end, len(head)), 4))}
    # With nothing nearer than "an image", it is the older of the two.
    return bool(found & BRANDS[kind]) or (kind == "heic" and bool(found & BRANDS[""]) and not found & BRANDS["avif"])


def looks_like_html(head: bytes) -> bool:
    """Whether a body begins as an error page does."""
    return re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|head)\b", head, re.IGNORECASE) is not None


def looks_like_json_error(head: bytes) -> bool:
    """Whether a body begins as the API's error envelope does."""
    return re.match(rb"\s*\{\s*\"error\"\s*:", head) is not None


def is_error_envelope(body: bytes) -> bool:
    """Whether JSON is the API's error envelope and nothing else, so that it cannot be a file about some error."""
    try:
        told = read_json(body)
    except (ValueError, RecursionError):
        return False
    error = told.get("error") if isinstance(told, dict) and len(told) == 1 else None
    if not isinstance(error, dict) or not error.keys() <= {"code", "message", "details"}:
        return False
    return isinstance(error.get("code"), str)


def looks_like_error_words(body: bytes) -> bool:
    """Whether a text is nothing but what servers call an error, such as `502 Bad Gateway`."""
    phrases = "|".join(re.escape(status.phrase) for status in http.HTTPStatus if status >= 400)
    # The last are nginx's spelling and what Envoy says.
    phrases += "|Gateway Time-out|no healthy upstream|upstream request timeout|upstream connect error.*"
    words = rf"\s*(error:?\s+)?(\d{{3}}:?\s+)?({phrases})[.!]?\s*|\s*error code: \d+\s*"
    return re.fullmatch(words.encode(), body, re.IGNORECASE) is not None


def looks_like_error_element(head: bytes) -> bool:
    """Whether a body is the element that S3, and what speaks as it does, answers with in place of a file."""
    return re.match(rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?<Error[\s>].*<Code>", head, re.DOTALL) is not None


def looks_like_markup(head: bytes) -> bool:
    """Whether a body begins as XML does, in UTF-8 or UTF-16."""
    return re.match(rb"(\xef\xbb\xbf)?\s*<|\xff\xfe<\0|\xfe\xff\0<", head) is not None


def is_whole_file(kind: str, size: int, head: bytes, tail: bytes) -> bool:
    """Whether a file of a format says by itself that nothing is missing at its end. False: no, or it cannot say so."""
    if kind in ENDINGS:
        return tail.rstrip().endswith(ENDINGS[kind])
    if kind in RIFF_BASED:
        return 8 + int.from_bytes(head[4:8], "little") == size
    if kind == "bmp":
        return int.from_bytes(head[2:6], "little") == size
    # The end record of a ZIP, without a comment, says how long is what comes before it.
    record = tail[-22:]
    told = int.from_bytes(record[12:16], "little") + int.from_bytes(record[16:20], "little") + len(record)
    return kind in ZIP_BASED and record.startswith(b"PK\5\6") and told == size


@dataclass(frozen=True)
class Identity:
    """What a body is: the media type to store it under, and what its key gets at the end."""

    media_type: str
    suffix: str = ""


def identify_result(target: str, media_type: str, disposition: str, head: bytes) -> Identity:
    """What the body of a 200 is, from its headers and first bytes, never from the target alone (docs/conversions/sync).

    Raises BadAnswer if it cannot be a file of the target format: an error page, a JSON error, another format.
    """
    kind, declared = canonical(target), media_kind(media_type)
    # A gateway's error page comes with 200 as well, and sometimes under the media type of the file.
    if kind not in HTML_FORMATS and (declared == "html" or looks_like_html(head)):
        raise BadAnswer("html_answer", "the API answered with an HTML page instead of the file")
    is_error = looks_like_json_error(head) and (kind not in ANY_JSON or is_error_envelope(head))
    if is_error or (declared == "json" and kind not in JSON_FORMATS):
        raise BadAnswer("json_answer", "the API answered with JSON instead of the file")
    if is_archive_of_pages(kind, media_type, disposition, head):
        return Identity("application/zip", ".zip")
    has_signature = kind in SIGNATURES or kind in ZIP_BASED
    refuse_wrong_beginning(target, media_type, head)
    if not has_signature and any(begins_like(other, head) for other in ("png", "jpg", "pdf", "zip", "gif")):
        raise BadAnswer("wrong_type", f"the answer is of another format than {target}", permanent=True)
    # The first bytes are right; where the media type contradicts them, they are believed.
    contradicts = declared in SIGNATURES and has_signature and not begins_like(declared, head)
    plain = plain_type(media_type)
    says_nothing = contradicts or plain.lower() in GENERIC_TYPES
    return Identity(media_type_of(kind) if says_nothing else media_type if kind in TEXT_FORMATS else plain)


def refuse_wrong_beginning(target: str, media_type: str, head: bytes) -> None:
    """Raise BadAnswer where a body does not begin as a file of the target format does, or is an error in words."""
    kind, plain = canonical(target), plain_type(media_type).lower()
    begins_wrongly = (kind in SIGNATURES or kind in ZIP_BASED) and not begins_like(kind, head)
    begins_wrongly |= kind in MARKUP_FORMATS and not looks_like_markup(head)
    # In a `txt` the words may be the file's own: nobody can tell.
    is_error = kind != "txt" and (
        (plain == "text/plain" and looks_like_error_words(head)) or looks_like_error_element(head)
    )
    if is_error or (begins_wrongly and plain in {"text/plain", "text/xml", "application/xml"}):
        raise BadAnswer("text_answer", "the API answered with plain text instead of the file")
    # A body that begins wrongly was paid for: it is permanent, because a second payment would buy the same.
    if begins_wrongly:
        raise BadAnswer("wrong_type", f"the answer does not begin as a {target} file does", permanent=True)


def is_archive_of_pages(kind: str, media_type: str, disposition: str, head: bytes) -> bool:
    """Whether the answer is a ZIP of one file a page, as for a PDF with several pages to jpg."""
    said = media_kind(media_type) == "zip" or disposition.lower().rstrip('"; ').endswith(".zip")
    # Where nothing says it, a format that is known to begin otherwise cannot be anything else.
    is_told_apart = kind in SIGNATURES or kind in TEXT_FORMATS
    said |= is_told_apart and plain_type(media_type).lower() in GENERIC_TYPES
    return said and kind not in ZIP_BASED and begins_like("zip", head)


def judge_reply(status: int, code: str) -> Verdict:
    """What an error reply means (docs/errors). The status comes first, then the code."""
    # The API's own word on its key or on the month, and a proxy's on its password, are said of every request.
    if code == "quota_exceeded" or status == 407 or (status == 401 and code):
        return Verdict.STOP_RUN
    if status in {409, 429}:
        return Verdict.WAIT
    if status == 422 and code == "bad_request":
        return Verdict.NEW_KEY
    if status in REFUSALS:
        return Verdict.REFUSED
    if status in {408, 425} or status >= 500 or status < 300:
        return Verdict.RETRY
    return Verdict.GIVE_UP


def is_about_key(failure: ObjectFailed) -> bool:
    """Whether a refusal says that the idempotency key is taken by another body."""
    return judge_reply(failure.status, failure.code) is Verdict.NEW_KEY


def judge_poll(status: int, code: str) -> Verdict:
    """What an error reply to the question for a job means. GIVE_UP: the job is lost; nothing else is about the job."""
    # A gateway's 404 is about the address.
    if status in {404, 410} and code == UNKNOWN_TO_API:
        return Verdict.GIVE_UP
    # Without the API's code it is the word of something on the way, about this question.
    if (status in {401, 403} and code) or code == "quota_exceeded":
        return Verdict.STOP_RUN
    return Verdict.WAIT if status == 429 else Verdict.RETRY


def judge_download(status: int, _code: str) -> Verdict:
    """What an error reply to the request for a result means. GIVE_UP: the link is stale, whoever says so and why."""
    if status == 429:
        return Verdict.WAIT
    return Verdict.GIVE_UP if 300 <= status < 500 and status not in {408, 425} else Verdict.RETRY


def read_json(body: bytes) -> Any:
    """What JSON says; `?` for half of a surrogate pair, which no file takes. Raises ValueError, RecursionError."""
    return json.loads(json.dumps(json.loads(body), ensure_ascii=False).encode("utf-8", "replace"))


def parse_error(body: bytes) -> tuple[str, str]:
    """Code and message of an error body; empty where it is HTML, cut, or in another form."""
    try:
        error = read_json(body).get("error")
    except (ValueError, AttributeError, RecursionError):
        return "", ""
    if isinstance(error, str):
        return "", error
    if not isinstance(error, dict):
        return "", ""
    return str(error.get("code") or ""), str(error.get("message") or "")


def age_of_job(job: Mapping[str, Any], now: str) -> float:
    """For how many seconds there has been a job, by the API's own clock (an HTTP date); 0 where it does not say."""
    try:
        made = datetime.fromisoformat(str(job.get("created_at")).replace("Z", "+00:00"))
        # A time without a zone must not be taken for this machine's.
        age = email.utils.parsedate_to_datetime(now) - made.replace(tzinfo=made.tzinfo or timezone.utc)
    except (TypeError, ValueError):
        return 0.0
    return age.total_seconds()


def is_older(headers: Mapping[str, str], asked: float) -> bool:
    """Whether an answer was made before it was asked for, in Unix seconds: the API repeats it, headers and all."""
    reset = headers.get("X-RateLimit-Reset", "")
    if reset.isdigit() and int(reset) < asked:
        return True
    try:
        made = email.utils.parsedate_to_datetime(headers.get("Date", ""))
        return made.replace(tzinfo=made.tzinfo or timezone.utc).timestamp() < math.floor(asked)
    except (TypeError, ValueError, OverflowError, OSError):
        return False


def retry_after_seconds(header: str | None, now: float) -> float | None:
    """What `Retry-After` asks for, capped: seconds or an HTTP date; None if it is absent or makes no sense."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(header)
            # An HTTP date is GMT; one without a zone must not be taken for the server's local time.
            seconds = date.replace(tzinfo=date.tzinfo or timezone.utc).timestamp() - now
        except (ValueError, OverflowError, OSError):
            return None
    # NaN fails both comparisons.
    return min(max(seconds, 0.0), RETRY_AFTER_CAP_SECONDS) if seconds >= 0 or seconds < 0 else None


def seconds_to_wait(attempt: int, asked: float | None, jitter: float) -> float:
    """How long to wait before the next attempt: what the server asked plus 0 to 50 %, else 2^attempt, capped.

    `jitter` from 0 to 1. After many waits in a row the server's word is not enough: it would be asked too often.
    """
    # Also bounds urllib3's recursion, one level for each retry, within the deadline.
    patience = min(2.0 ** min(attempt, 20), BACKOFF_CAP_SECONDS)
    if asked is None:
        return patience * (0.5 + jitter / 2)
    return max(asked, patience if attempt > 8 else 0.0) * (1 + jitter / 2)


def redacted(message: str) -> str:
    """A text without API keys and without what stands behind the `?` of a URL (a presigned URL's signature)."""
    # S3's and the API's own messages may repeat the URL that they were asked for.
    message = re.sub(r"(https?://[^\s\"'<>?]*)\?[^\s\"'<>]*", r"\1?...", message)
    message = re.sub(r"(?i)(X-Amz-(?:Signature|Credential|Security-Token))=[^\s&\"'<>]*", r"\1=...", message)
    return re.sub(r"ctf_[A-Za-z]+_[A-Za-z0-9_-]+", "ctf_...", message)


########################################################################################################################
# Stopping. A signal handler only sets a flag; whoever waits, waits on the flag.
#   - The feeder stops between two tasks; what it has not handed out is left to do.
#   - A worker finishes the request that it has sent and gives back queued tasks unsent. A wait for a retry ends.
#   - The recorder goes on until all workers have left, or, after a signal, until the grace is over.
########################################################################################################################


STOP_SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__]


class StopFlag:
    """The one way in which a run is asked to end. The first reason counts, and a signal before any other.

    `tell`: what else to do when it is asked for the first time; a worker process tells its parent.
    """

    def __init__(self, tell: Callable[[Stop], None] = lambda _: None) -> None:
        self._event, self._tell, self._lock = threading.Event(), tell, threading.Lock()
        self._asked: Stop | None = None  # by any thread, under the lock
        self._by_signal: Stop | None = None  # by the handler alone, which must not wait for a lock
        self.since = 0.0
        self.in_flight: Callable[[], int] = lambda: 0  # how many requests a second signal would cut off

    @property
    def stop(self) -> Stop | None:
        """Why the run is to end; None as long as it is not."""
        return self._by_signal or self._asked

    @property
    def requested(self) -> bool:
        """Whether the run is to end."""
        return self.stop is not None

    def request(self, stop: Stop, *, is_told: bool = False) -> None:
        """Ask the run to end. `is_told`: whoever would be told has said it."""
        with self._lock:
            if self.requested:
                return
            self._asked, self.since = stop, time.monotonic()
        self._event.set()
        if not is_told:
            self._tell(stop)

    def pass_on(self) -> None:
        """Wake whoever waits, if there was a signal. Its handler cannot: it may have cut in where others are woken."""
        if self._by_signal:
            self._event.set()

    def sleep(self, seconds: float) -> None:
        """Wait. Raises Interrupted as soon as the run is to end."""
        if self._event.wait(seconds) or self.requested:
            raise Interrupted

    def install(self) -> None:
        """Handle SIGINT, SIGTERM and SIGHUP; a second one ends the process at once."""
        for number in STOP_SIGNALS:
            # Under nohup SIGHUP is ignored, and stays so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        code = ExitCode.SIGINT if number == signal.SIGINT else ExitCode.SIGTERM
        if self._by_signal:
            leave_at_once(f"ended at once: {self.in_flight()} in flight are asked for again by the next run", code)
        name = signal.Signals(number).name
        self.since = time.monotonic()
        self._by_signal = Stop(f"interrupted by {name}", "run it again: it goes on where this run ended", code)


def leave_at_once(said: str, code: ExitCode) -> NoReturn:
    """End the process from within a signal handler, with a line of its own."""
    # The stream may be in the middle of a write of its own: only the system call can be relied upon.
    with contextlib.suppress(OSError):
        os.write(2, f"\n{said}\n".encode())
    os._exit(code)


def leave_on_interrupt() -> None:
    """Let Ctrl-C end a command that has nothing to finish, in one word."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, lambda *_: leave_at_once("interrupted", ExitCode.SIGINT))


########################################################################################################################
# Outages. What cannot be reached at all meets every object, and none is to blame.
#   - What has not answered in this run yet is a wrong address, or a machine without a network: some attempts, no more.
#   - What has answered before is waited for, and waiting costs no object an attempt.
#   - A proxy that the environment names is on the way to everything, so the words for it name it.
########################################################################################################################

PROXY_HINT = (
    "check HTTPS_PROXY (HTTP_PROXY for an http address) and NO_PROXY, and run it again; "
    "SOCKS does not work for S3, and for the API only with the package PySocks"
)


class Reach:
    """Whether the API, or S3, can be reached, as all threads of a process find out together."""

    def __init__(self, name: str) -> None:
        self._name, self._lock = name, threading.Lock()
        self._missed_since: float | None = None  # monotonic seconds; None while it can be reached
        self.has_answered = False

    def found(self) -> None:
        """It has answered, whatever it said."""
        self.has_answered = True
        # Looked at without the lock, because this is called for every answer.
        if self._missed_since is not None:
            with self._lock:
                was_missed, self._missed_since = self._missed_since is not None, None
            if was_missed:
                fields = told("outage", name=self._name, is_over=True)
                log.warning("%s can be reached again", self._name, extra=fields)

    def may_come_back(self) -> bool:
        """Note that no connection could be made; whether to wait for one."""
        now = time.monotonic()
        with self._lock:
            is_new = self._missed_since is None
            self._missed_since = since = now if self._missed_since is None else self._missed_since
        if is_new and self.has_answered:
            fields = told("outage", name=self._name, is_over=False)
            log.warning("%s cannot be reached; waiting up to %d s for it", self._name, OUTAGE_SECONDS, extra=fields)
        return self.has_answered and now - since < OUTAGE_SECONDS


def outage_pause(attempt: int) -> float:
    """How long to wait before the next attempt to connect, in seconds."""
    return min(seconds_to_wait(attempt, None, random.random()), OUTAGE_PAUSE_SECONDS)


def proxy_for(address: str) -> str:
    """Host and port of the proxy that the environment names for an address; empty if it names none."""
    named = requests.utils.select_proxy(address, requests.utils.get_environ_proxies(address)) or ""
    # It may hold a password, which is nobody's to read, and it may be no address at all.
    host = re.sub(r"[/?#].*", "", named.rpartition("://")[2]).rpartition("@")[2]
    return host or ("without a host" if named else "")


def connection_problem(error: Any) -> str:
    """What a failed connection's error says, without the names of Python's objects."""
    # requests and urllib3 wrap the error that says what happened, each in its own way.
    if isinstance(error, requests.RequestException):
        wrapped = error.args[0] if error.args else None
        return connection_problem(getattr(wrapped, "reason", None) or wrapped or type(error).__name__)
    if isinstance(error, urllib3.exceptions.ProxyError):
        error = error.original_error
    said = str(error.args[-1]) if isinstance(error, Exception) and error.args else str(error)
    return re.sub(r"^.*?: (?=Failed )", "", said)


def certificate_problem(error: Exception) -> str:
    """Why a certificate is not trusted; empty if that is not the problem."""
    # The second is urllib3's own, which boto3 has it look for.
    found = re.search(r"certificate verify failed: ([^(]*[^(. ])|(hostname '.*' doesn't match [^)]*)", str(error))
    return found.group(found.lastindex or 0) if found else ""


def never_sent(error: Any) -> bool:
    """Whether no connection was made, so that the server cannot have seen the request."""
    # urllib3 takes whatever breaks on the way through a proxy for a ProxyError, after the request was sent as well.
    cause = error.original_error if isinstance(error, urllib3.exceptions.ProxyError) else error
    failed = (urllib3.exceptions.ConnectTimeoutError, urllib3.exceptions.NewConnectionError)
    return isinstance(cause, failed) or "Tunnel connection failed" in str(cause)


SCARCE_HINT = "set fewer run.workers or run.processes, or raise the limit (ulimit -u, a container's pids and memory)"
CA_BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # as requests looks for them


def trouble_around(error: Exception, address: str) -> RunStopped | None:
    """The end of the run for what the system, the environment or a connection's set-up refuses; None for a bug.

    `address`: the API's, which is the only one that is asked without boto3.
    """
    if isinstance(error, MemoryError):
        return RunStopped("the system has no more memory", SCARCE_HINT)
    if "can't start new thread" in str(error):
        return RunStopped("the system starts no more threads", SCARCE_HINT)
    if isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.InvalidSchema):
        return api_unreachable(address, error)
    if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
        where = f": {error.filename}" if error.filename else ""
        return RunStopped(
            redacted(f"the system refuses what the program needs: {error.strerror or error}{where}"),
            "allow it to this user, or free what is short of it, and run it again",
        )
    return None


@contextlib.contextmanager
def blaming_the_environment(address: str) -> Iterator[None]:
    """Raise RunStopped in place of what is neither a bug nor an object's failure; see `trouble_around`."""
    try:
        yield
    except Exception as error:
        trouble = trouble_around(error, address)
        if trouble is None:
            raise
        raise trouble from None


def refuse_wrong_certificates(address: str, *variables: str) -> None:
    """Raise UserError if TLS cannot be set up for an address with what these variables of the environment name."""
    named = {name: os.environ[name] for name in (*variables, "SSLKEYLOGFILE") if os.environ.get(name)}
    bundle = next((named[name] for name in variables if name in named), None)
    if not named or not address.startswith("https:"):
        return
    try:
        is_folder = bundle is not None and os.path.isdir(bundle)
        ssl.create_default_context(cafile=None if is_folder else bundle, capath=bundle if is_folder else None)
    except OSError as problem:
        told = ", ".join(f"{name} = {path}" for name, path in named.items())
        hint = f"set {' or '.join(named)} to a file that is there and can be used, or to nothing"
        raise UserError(f"TLS cannot be set up with {told}: {problem.strerror or problem}", hint) from None


def api_unreachable(address: str, error: Exception) -> RunStopped:
    """The end of the run where no connection to the API can be made."""
    why, proxy = redacted(connection_problem(error)), proxy_for(address)
    if proxy:
        return RunStopped(f"the API cannot be reached through the proxy {proxy}: {why}", PROXY_HINT)
    host = urllib.parse.urlsplit(address).netloc
    return RunStopped(f"the API cannot be reached at {host}: {why}", "check api.url and the network, and run it again")


########################################################################################################################
# Wire. How answers are read off a connection, by every session of this program.
#   - An interim answer (102, 103) is read over: http.client takes it for the answer, and then each answer for the next.
#   - A connection on which anything was odd is never used again: what comes next on it may be another request's answer.
#   - An answer has a time in which to come in all: a timeout for each read never ends one that comes byte by byte.
########################################################################################################################


class Arriving(io.RawIOBase):
    """The bytes of one answer as they come. Raises TimeoutError when they take too long, all together.

    The head has the connection's timeout. So has the body, and each byte of it gives back the time for one byte, so
    that a large one may come slowly; time that was not needed is not kept for what drips later.
    """

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._connection, self._bytes = connection, connection.makefile("rb", buffering=0)
        self._patience = connection.gettimeout() or WAIT_DEADLINE_SECONDS
        self._deadline = time.monotonic() + self._patience
        self._seconds_for_a_byte = 0.0  # of the head
        self.is_over = self.has_surplus = False

    def begin_body(self) -> None:
        """Note that the head has come."""
        self._deadline = time.monotonic() + self._patience
        self._seconds_for_a_byte = 1 / SLOWEST_BYTES_PER_SECOND

    def readable(self) -> bool:
        """It can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for some bytes, but not beyond the deadline."""
        if self.is_over:
            return 0
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer did not end in time")
        self._connection.settimeout(left)
        count = self._bytes.readinto(buffer) or 0
        given_back = self._deadline + count * self._seconds_for_a_byte
        self._deadline = min(given_back, time.monotonic() + self._patience)
        return count

    def hang_up(self) -> None:
        """End the connection for both sides. Whoever would use it again finds it closed."""
        # TLS within TLS, through a proxy, has no such thing in urllib3.
        with contextlib.suppress(OSError, AttributeError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of the connection, which lives on."""
        self._bytes.close()
        super().close()


class AnswerBuffer(io.BufferedReader):
    """What has been read ahead of an answer."""

    def __init__(self, arriving: Arriving) -> None:
        super().__init__(arriving)
        self._arriving = arriving

    def close(self) -> None:
        """Let go of the connection. If more has come than the answer, nobody may use it again."""
        if not self.closed:
            self._arriving.is_over = True
            if self.peek(1):
                self._arriving.has_surplus = True
                self._arriving.hang_up()
        super().close()


class Reply(http.client.HTTPResponse):
    """An answer as http.client reads it, without what it gets wrong."""

    def __init__(self, sock: socket.socket, *arguments: Any, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        self.fp.close()
        self._arriving = Arriving(sock)
        self.fp = AnswerBuffer(self._arriving)

    def begin(self, **named: Any) -> None:
        """Read the head of the answer. Raises HTTPException if it makes no sense."""
        super().begin(**named)
        while self.status < 200:
            self.will_close = True
            if self.status == http.HTTPStatus.SWITCHING_PROTOCOLS:
                break
            cast(Any, self).headers = None  # as before the first of them
            super().begin(**named)
            self.will_close = True
        self._agree_on_length()
        self._arriving.begin_body()

    @property
    def has_surplus(self) -> bool:
        """Whether more has come than the answer has announced, as far as it is known when the answer has been read."""
        return self._arriving.has_surplus

    def _agree_on_length(self) -> None:
        """Leave one Content-Length where the same was said twice, and none that is no number."""
        said = self.headers.get_all("Content-Length", [])
        lengths = {length.strip() for value in said for length in value.split(",")}
        if len(lengths) > 1:
            raise http.client.HTTPException(f"Content-Length is {' and '.join(sorted(lengths))}")
        del self.headers["Content-Length"]
        for length in lengths:
            if re.fullmatch("[0-9]+", length):
                self.headers["Content-Length"] = length
                # http.client has not understood a list.
                self.length = int(length) if self.length is None and not self.chunked else self.length


def reading_with_care(manager: Any) -> Any:
    """Have a pool manager of urllib3's make connections whose answers are read as Reply does."""
    pools = {}
    for scheme, pool in manager.pool_classes_by_scheme.items():
        # Their names are in messages.
        connection = type(pool.ConnectionCls.__name__, (pool.ConnectionCls,), {"response_class": Reply})
        pools[scheme] = type(pool.__name__, (pool,), {"ConnectionCls": connection})
    manager.pool_classes_by_scheme = pools
    return manager


class Adapter(HTTPAdapter):
    """The way of every session of this program to its connections."""

    def init_poolmanager(self, *arguments: Any, **named: Any) -> None:
        """Make the connections to servers."""
        super().init_poolmanager(*arguments, **named)
        reading_with_care(self.poolmanager)

    def proxy_manager_for(self, proxy: Any, **named: Any) -> Any:
        """Make the connections through a proxy, once for each."""
        is_known = proxy in self.proxy_manager
        manager = super().proxy_manager_for(proxy, **named)
        return manager if is_known else reading_with_care(manager)


def mount(session: requests.Session, adapter: HTTPAdapter) -> None:
    """Have a session send everything through an adapter."""
    session.mount("https://", adapter)
    session.mount("http://", adapter)


class Unpacking:
    """Takes off a body the packing that nobody asked for. Raises BadAnswer if it cannot."""

    def __init__(self, coding: str) -> None:
        self._inflate = self._inflater() if coding in UNPACKED_HERE else None
        if coding not in {"", "identity", *UNPACKED_HERE}:
            raise BadAnswer("packed_answer", f"the answer is packed as {coding}, which nobody asked for")
        # A few bytes may become a thousand times as many.
        self.piece_bytes = CHUNK_BYTES // 64 if self._inflate else CHUNK_BYTES

    @staticmethod
    def _inflater() -> Any:
        # It tells gzip and deflate by how they begin.
        return zlib.decompressobj(zlib.MAX_WBITS + 32)

    def __call__(self, piece: bytes) -> bytes:
        """What a piece of the body stands for."""
        if not self._inflate:
            return piece
        unpacked = b""
        try:
            while piece:
                # A file may be packed in several parts.
                self._inflate = self._inflater() if self._inflate.eof else self._inflate
                unpacked += self._inflate.decompress(piece)
                piece = self._inflate.unused_data
        except zlib.error as error:
            raise BadAnswer("cut_answer", f"the answer cannot be unpacked: {error}") from None
        return unpacked

    @property
    def is_whole(self) -> bool:
        """Whether the last part has come to its end."""
        return self._inflate is None or self._inflate.eof


########################################################################################################################
# Journal. The checkpoint, and the only SQL. Invariants:
#   - `log` is only ever appended to; the newest row of a (bucket, key, fingerprint) is that object's state.
#   - A request is sent only after its `in_flight` row is on the disk, and that row leaves in the transaction that
#     appends the outcome. Another request of the same conversation takes the row over before it is sent. Whatever is in
#     `in_flight` at the start of a run may have been paid for.
#   - An outcome that leaves the API's part unknown keeps its row, so that the same request can be sent again.
#   - An output key belongs to the first source that claims it, by a row of `log` or of `in_flight`.
########################################################################################################################

JOURNAL_VERSION = 3
APPLICATION_ID = 0x53334243  # "S3BC"
SCHEMA = """
CREATE TABLE log (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, bucket TEXT NOT NULL, key TEXT NOT NULL, etag TEXT NOT NULL,
    size INTEGER NOT NULL, job TEXT NOT NULL, target TEXT NOT NULL, fingerprint TEXT NOT NULL,
    event TEXT NOT NULL CHECK (event IN ('converted', 'failed', 'found')), output_bucket TEXT NOT NULL,
    output_key TEXT NOT NULL, claim TEXT NOT NULL, idempotency_key TEXT NOT NULL, requests INTEGER NOT NULL,
    seconds REAL NOT NULL, bytes_out INTEGER NOT NULL, code TEXT NOT NULL, message TEXT NOT NULL,
    permanent INTEGER NOT NULL
);
CREATE INDEX log_state ON log (bucket, fingerprint, key, id, etag, event, permanent);
CREATE INDEX log_claim ON log (output_bucket, claim) WHERE event IN ('converted', 'found');
CREATE TRIGGER log_keeps_its_rows BEFORE DELETE ON log BEGIN SELECT RAISE(ABORT, 'log is append-only'); END;
CREATE TRIGGER log_replaces_no_rows BEFORE INSERT ON log WHEN EXISTS (SELECT 1 FROM log WHERE id = NEW.id)
    BEGIN SELECT RAISE(ABORT, 'log is append-only'); END;
CREATE TRIGGER log_keeps_its_values BEFORE UPDATE ON log BEGIN SELECT RAISE(ABORT, 'log is append-only'); END;
CREATE TABLE in_flight (
    bucket TEXT NOT NULL, key TEXT NOT NULL, fingerprint TEXT NOT NULL, etag TEXT NOT NULL, output_bucket TEXT NOT NULL,
    claim TEXT NOT NULL, idempotency_key TEXT NOT NULL, url TEXT NOT NULL, sent_at REAL NOT NULL,
    job_id TEXT NOT NULL DEFAULT '', path TEXT NOT NULL DEFAULT '/v1/convert', doubled INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (bucket, fingerprint, key)
) WITHOUT ROWID;
CREATE INDEX in_flight_claim ON in_flight (output_bucket, claim);
"""
# What brings a checkpoint of a version to the next one.
UPGRADES: Mapping[int, Sequence[str]] = {
    1: (
        "DROP INDEX log_state",
        "CREATE INDEX log_state ON log (bucket, fingerprint, key, id, etag, event, permanent)",
        "ALTER TABLE in_flight ADD COLUMN job_id TEXT NOT NULL DEFAULT ''",
    ),
    2: (
        "ALTER TABLE in_flight ADD COLUMN path TEXT NOT NULL DEFAULT '/v1/convert'",
        "ALTER TABLE in_flight ADD COLUMN doubled INTEGER NOT NULL DEFAULT 0",
    ),
}


def real_file(path: Path) -> Path:
    """Where a link leads: SQLite keeps its `-wal` there, and all names of one checkpoint must come to one lock."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


# Where the bytes begin that a run locks of its checkpoint: far behind those that SQLite locks, and behind its end.
PID_BYTES, TIME_BYTES = 1 << 40, 1 << 50


def ask_lock(descriptor: int, *, take: bool, start: int, length: int) -> int:
    """Take an exclusive lock on some bytes of a file, or ask how many bytes another one has that is in its way.

    It belongs to the open file, unlike SQLite's own, which a process loses as soon as it closes the file anywhere.
    Raises OSError; BlockingIOError if another one is in the way. Only Linux has such locks: elsewhere there are none.
    """
    if sys.platform != "linux":
        return 0
    wanted = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    found = fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK if take else fcntl.F_OFD_GETLK, wanted)
    kind, _, _, length, _ = struct.unpack("hhqqi0q", found)
    return 0 if kind == fcntl.F_UNLCK else int(length)


class RunLock:
    """An exclusive lock on the checkpoint, held as long as the process lives, whatever ends it.

    It is taken twice. By `flock` on a file beside the checkpoint, which all systems have, and which says in words who
    has it. And on the checkpoint itself, where it holds whatever name the file is called by and whatever becomes of the
    other one. SQLite would be in the way of a `flock` there on macOS and on network file systems.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = real_file(checkpoint)
        self.path = self._checkpoint.with_name(self._checkpoint.name + ".lock")
        self._handle: IO[str] | None = None
        self._descriptor = -1

    def __enter__(self) -> "RunLock":
        try:
            self._handle = self.path.open("a+", encoding="ascii")
        except OSError as problem:
            raise UserError(
                f"{self.path} cannot be written: {problem.strerror}",
                "make the directory writable, or set run.checkpoint to a path that is",
            ) from None
        self._acquire(self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle:
            self._handle.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def _acquire(self, handle: IO[str]) -> None:
        if sys.platform == "win32":
            return
        try:
            take_lock(handle, self.path)
        except BlockingIOError:
            raise self._refused(self.path, self._holder(handle)) from None
        self._acquire_checkpoint()
        # The PID is for the message that another run prints; the lock itself is the kernel's.
        handle.seek(0)
        handle.truncate()
        handle.write(f"{os.getpid()} {int(time.time())}\n")
        handle.flush()

    def _acquire_checkpoint(self) -> None:
        # A system or a file system may have no such locks, and what else is wrong with the file the journal will say.
        with contextlib.suppress(OSError):
            self._descriptor = os.open(self._checkpoint, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                # How many bytes are locked is all that another process can learn of whoever has locked them.
                ask_lock(self._descriptor, take=True, start=PID_BYTES, length=os.getpid())
                ask_lock(self._descriptor, take=True, start=TIME_BYTES, length=int(time.time()))
            except BlockingIOError:
                raise self._refused(self._checkpoint, self._holder_of(self._descriptor)) from None

    @staticmethod
    def _refused(path: Path, holder: str) -> UserError:
        hint = "wait for it to end, or give this run another run.checkpoint"
        return UserError(f"another run holds {path} ({holder})", hint, ExitCode.LOCKED)

    @staticmethod
    def _holder_of(descriptor: int) -> str:
        pid = ask_lock(descriptor, take=False, start=PID_BYTES, length=1)
        since = ask_lock(descriptor, take=False, start=TIME_BYTES, length=1)
        return holder_words(pid, since) if pid else ""

    @staticmethod
    def _holder(handle: IO[str]) -> str:
        handle.seek(0)
        match = re.fullmatch(r"(\d+) (\d+)\n", handle.read(100))
        return holder_words(int(match[1]), int(match[2])) if match else holder_words(0, 0)

    def holder(self) -> str:
        """Who holds the lock, in words; empty if nobody does. Takes none, which would turn a starting run away.

        To be asked before this process opens the checkpoint: to close a file is to give up SQLite's locks on it.
        """
        try:
            descriptor = os.open(self._checkpoint, os.O_RDONLY)
            try:
                if said := self._holder_of(descriptor):
                    return said
            finally:
                os.close(descriptor)
        except OSError:
            pass
        try:
            with self.path.open(encoding="ascii") as handle:
                said = self._holder(handle)
        except (OSError, ValueError):
            return ""
        pid = "".join(re.findall(r"process (\d+)", said))
        return said if pid and holds_a_lock(pid) else ""


def holder_words(pid: int, since: int) -> str:
    """Who holds a lock, and for how long. `since` in Unix seconds."""
    if not (pid and since):
        return "it has only just started"
    return f"process {pid}, for {max(0, int(time.time()) - since)} s"


def take_lock(handle: IO[Any], path: Path) -> None:
    """Take an exclusive lock. Raises BlockingIOError if another has it, UserError where the file system has none."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as problem:
        # Without it two runs might pay for the same objects.
        raise UserError(
            f"{path} cannot be locked: {problem.strerror}", "set run.checkpoint to a path on a local disk"
        ) from None


def holds_a_lock(pid: str) -> bool:
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


@contextlib.contextmanager
def explaining_sqlite(path: Path) -> Iterator[None]:
    """Say what an SQLite error means for a person. A full disk stops the run; nothing is overwritten."""
    try:
        yield
    except (sqlite3.Error, OSError) as problem:
        said = str(getattr(problem, "strerror", None) or problem)
        if "is locked" in said:
            hint = "wait until that has ended (a backup, an sqlite3 shell), and run it again"
            raise UserError(
                f"the checkpoint {path} is locked by another program: {said}", hint, ExitCode.STOPPED
            ) from None
        if "not a database" in said or "malformed" in said:
            hint = "move it away to start over: with run.skip_existing, finished objects are found in the output bucket"
            raise UserError(f"the checkpoint {path} is damaged: {said}", hint, ExitCode.STOPPED) from None
        if "full" in said or "disk I/O" in said:
            raise RunStopped(
                f"the checkpoint {path} cannot be written: {said}", "free some space and run it again"
            ) from None
        hint = "make it and its directory readable and writable, or set run.checkpoint to another path"
        raise UserError(f"the checkpoint {path} cannot be used: {said}", hint) from None


def set_mode(path: Path, mode: int) -> None:
    """Say who may use a file of the checkpoint's. Raises UserError if it is another user's."""
    try:
        path.chmod(mode)
    except PermissionError:
        hint = "start this program as that user, or set run.checkpoint to another path"
        raise UserError(f"the checkpoint {path} belongs to another user", hint) from None


def chunks(values: Sequence[T], length: int) -> Iterator[Sequence[T]]:
    """A sequence in parts."""
    for start in range(0, len(values), length):
        yield values[start : start + length]


ELSEWHERE = "s3://"  # begins the name of a source in another bucket
SOURCE = f"CASE bucket WHEN ? THEN key ELSE '{ELSEWHERE}' || bucket || '/' || key END"  # its key, if it lies here
LOGGED = frozenset({Event.CONVERTED, Event.FAILED, Event.FOUND})


class Journal:
    """The checkpoint of one source bucket and one output bucket. Safe to use from several threads."""

    horizon = sys.maxsize  # rows of the log behind it are as if they were not there

    def __init__(self, path: Path, bucket: str, output_bucket: str) -> None:
        self.path, self.bucket, self.output_bucket = real_file(path), bucket, output_bucket
        # The feeder and the recorder share one connection: SQLite has one writer anyway, and this one needs no waiting.
        self._lock = threading.Lock()
        with explaining_sqlite(self.path):
            self._create_private()
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=30)
            with contextlib.ExitStack() as on_failure:
                on_failure.callback(self._db.close)
                self._refuse_foreign()
                self._make_private()
                self._open_schema()
                on_failure.pop_all()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._db.close()

    def _create_private(self) -> None:
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))

    def _make_private(self) -> None:
        # It holds presigned URLs. SQLite gives -wal and -shm the mode of the database when it makes them.
        for path in (self.path, *(self.path.with_name(self.path.name + end) for end in ("-wal", "-shm"))):
            if os.name == "posix" and path.exists() and stat.S_IMODE(path.stat().st_mode) != 0o600:
                set_mode(path, 0o600)

    def _is_new(self) -> bool:
        return not self._db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def _refuse_foreign(self) -> None:
        version = self._version()
        owner = self._db.execute("PRAGMA application_id").fetchone()[0]
        if owner != APPLICATION_ID and not self._is_new():
            raise UserError(f"{self.path} is not a checkpoint of this program", "set run.checkpoint to another path")
        if version > JOURNAL_VERSION:
            raise UserError(
                f"the checkpoint {self.path} has version {version}, this program knows {JOURNAL_VERSION}",
                "use the newer s3_bulk_convert.py that made it",
            )

    def _open_schema(self) -> None:
        # On a file system without shared memory SQLite stays with the rollback journal, which is as safe.
        self._db.execute("PRAGMA journal_mode = WAL")
        # A commit that a power cut can undo would be a request that was sent and is not known.
        self._db.execute("PRAGMA synchronous = FULL")
        # On macOS a disk may otherwise say that it has written what it still holds.
        self._db.execute("PRAGMA fullfsync = 1")
        self._db.execute("PRAGMA journal_size_limit = 67108864")
        if self._is_new():
            statements = list(filter(None, map(str.strip, re.split(r";\n(?=CREATE|$)", SCHEMA))))
        else:
            statements = [step for version in range(self._version(), JOURNAL_VERSION) for step in UPGRADES[version]]
        if statements:
            with self._transaction() as db:
                for statement in statements:
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {JOURNAL_VERSION}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, explaining_sqlite(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                # The commit itself may have failed and ended the transaction.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _rows_about(
        self, columns: str, table: str, where: str, scope: Sequence[str | int], keys: Sequence[str]
    ) -> Iterator[Any]:
        """Rows of a table whose last column of `where` is one of `keys`, in the order in which they were appended."""
        # The rows are fetched before they are yielded: nobody may hold the lock, or an open read, while others work.
        for part in chunks(keys, SQL_VARIABLES):
            marks = ",".join("?" * len(part))
            order = "ORDER BY id" if table.startswith("log") else ""
            query = f"SELECT {columns} FROM {table} WHERE {where} IN ({marks}) {order}"
            with self._lock, explaining_sqlite(self.path):
                rows = self._db.execute(query, (*scope, *part)).fetchall()
            yield from rows

    def states(self, fingerprint: str, keys: Sequence[str]) -> dict[str, State]:
        """What the log says last about those of the keys that it knows, and about some that lie between them."""
        columns, where = "key, etag, event, permanent", "bucket = ? AND fingerprint = ? AND id <= ? AND key"
        scope = (self.bucket, fingerprint, self.horizon)
        # A page of a listing is a range of keys. Where most of what lies in it is gone, its keys are looked up.
        query = f"SELECT {columns} FROM log INDEXED BY log_state WHERE {where} BETWEEN ? AND ? ORDER BY key, id LIMIT ?"
        most = 4 * len(keys)
        limits = (min(keys, default=""), max(keys, default=""), most)
        with self._lock, explaining_sqlite(self.path):
            found: Any = self._db.execute(query, (*scope, *limits)).fetchall()
        if len(found) == most:
            found = self._rows_about(columns, "log", where, scope, keys)
        return {state[0]: state for state in found}

    def knows_only(self, fingerprint: str) -> bool:
        """Whether no other job, of whatever bucket, has ever left a row here."""
        # Four looks into the index; `!=` would read all of it.
        query = " UNION ALL ".join(
            f"SELECT * FROM (SELECT 1 FROM log INDEXED BY log_state WHERE {others} LIMIT 1)"
            for others in (
                "bucket < :bucket",
                "bucket > :bucket",
                "bucket = :bucket AND fingerprint < :fingerprint",
                "bucket = :bucket AND fingerprint > :fingerprint",
            )
        )
        with self._lock, explaining_sqlite(self.path):
            known = {"bucket": self.bucket, "fingerprint": fingerprint}
            return self._db.execute(query, known).fetchone() is None

    def sent(self, fingerprint: str, keys: Sequence[str]) -> dict[str, Sent]:
        """The unsettled requests of earlier runs for those of the keys that have one."""
        where = "bucket = ? AND fingerprint = ? AND key"
        columns = "key, etag, idempotency_key, url, sent_at, job_id, path, doubled"
        rows = self._rows_about(columns, "in_flight", where, (self.bucket, fingerprint), keys)
        return {key: Sent(*row) for key, *row in rows}

    def owners(self, claims: Sequence[str]) -> dict[str, str]:
        """The sources that have an output under those of the claims that are taken; see SOURCE."""
        return self._outputs_under(claims, SOURCE, self.bucket)

    def makers(self, claims: Sequence[str]) -> dict[str, str]:
        """The fingerprints of the jobs that made what lies under those of the claims that are taken."""
        return self._outputs_under(claims, "fingerprint")

    def senders(self, claims: Sequence[str]) -> dict[str, str]:
        """The fingerprints of the jobs whose unsettled requests would bring an output under those of the claims."""
        return dict(
            self._rows_about(
                "claim, fingerprint", "in_flight", "output_bucket = ? AND claim", (self.output_bucket,), claims
            )
        )

    def _outputs_under(self, claims: Sequence[str], column: str, *values: str) -> dict[str, str]:
        # Sources of other buckets count too: several checkpoints' worth of buckets may share one output bucket.
        where = "event IN ('converted', 'found') AND output_bucket = ? AND claim"
        table = "log INDEXED BY log_claim"
        return dict(self._rows_about(f"claim, {column}", table, where, (*values, self.output_bucket), claims))

    def claimants(self, claims: Sequence[str]) -> dict[str, str]:
        """The sources whose unsettled requests would bring an output under those of the claims; see SOURCE."""
        scope = (self.bucket, self.output_bucket)
        return dict(self._rows_about(f"claim, {SOURCE}", "in_flight", "output_bucket = ? AND claim", scope, claims))

    def begin(self, tasks: Sequence[Task], now: float) -> None:
        """Make it durable that these are about to be sent. `now` in Unix seconds. Raises RunStopped on a full disk."""
        rows = [self._in_flight_row(task, now) for task in tasks if not task.may_be_done]
        # What may be done keeps its row as it is: the request is the same, and so is the time when it was first sent.
        with self._transaction() as db:
            db.executemany(f"INSERT OR REPLACE INTO in_flight VALUES (?{', ?' * 11})", rows)

    def note(self, request: Task) -> None:
        """Make it durable that this is out for its object now. Raises RunStopped or UserError where it cannot be."""
        columns = "idempotency_key = ?, url = ?, sent_at = ?, job_id = ?, path = ?, doubled = ?"
        where = (self.bucket, request.fingerprint, request.key, request.etag)
        with self._transaction() as db:
            db.execute(
                f"UPDATE in_flight SET {columns} WHERE (bucket, fingerprint, key, etag) = (?, ?, ?, ?)",
                (*self._as_sent(request, request.sent_at), *where),
            )

    def end(self, outcomes: Sequence[Outcome], now: float) -> None:
        """Append outcomes and settle their requests, in one transaction. Raises RunStopped on a full disk."""
        # A failure without an ETag is about a key that a file names and that is not there: of the object that was, and
        # may be again, it says nothing.
        outcomes = [outcome for outcome in outcomes if outcome.task.etag or outcome.event is not Event.FAILED]
        with self._transaction() as db:
            db.executemany(
                f"INSERT INTO log VALUES (NULL{', ?' * 19})",
                [self._log_row(outcome, now) for outcome in outcomes if outcome.event in LOGGED],
            )
            db.executemany(
                "DELETE FROM in_flight WHERE bucket = ? AND fingerprint = ? AND key = ?",
                [(self.bucket, o.task.fingerprint, o.task.key) for o in outcomes if not o.unsettled],
            )

    def newest_row(self) -> int:
        """The id of the last row of the log; 0 if there is none."""
        with self._lock, explaining_sqlite(self.path):
            return int(self._db.execute("SELECT coalesce(max(id), 0) FROM log").fetchone()[0])

    def failed_for_good(self, jobs: Iterable[Job]) -> int:
        """How many objects the log knows last as failed for good, by any of the jobs."""
        newest = "SELECT MAX(id) FROM log WHERE (bucket, fingerprint, key) = (it.bucket, it.fingerprint, it.key)"
        query = f"SELECT COUNT(*) FROM log AS it WHERE bucket = ? AND fingerprint = ? AND permanent AND id = ({newest})"
        with self._lock, explaining_sqlite(self.path):
            return sum(
                self._db.execute(query, (self.bucket, fingerprint)).fetchone()[0]
                for fingerprint in {job.fingerprint for job in jobs}
            )

    def forget_sent_before(self, then: float) -> None:
        """Drop this bucket's unsettled requests from before `then` (Unix seconds), which a whole run has not met.

        Their objects are gone or are no longer wanted. Of other buckets, of which a checkpoint may know too, a run
        says nothing.
        """
        with self._transaction() as db:
            db.execute("DELETE FROM in_flight WHERE bucket = ? AND sent_at < ?", (self.bucket, then))

    def _in_flight_row(self, task: Task, now: float) -> tuple[object, ...]:
        claim = (self.output_bucket, claim_of(task.output_key))
        return (self.bucket, task.key, task.fingerprint, task.etag, *claim, *self._as_sent(task, now))

    def _as_sent(self, task: Task, now: float) -> tuple[object, ...]:
        # Of what is overdue, an earlier request may have been paid.
        return (task.idempotency_key, task.url, now, task.job_id, task.path, int(task.is_doubtful))

    def _log_row(self, outcome: Outcome, now: float) -> tuple[object, ...]:
        task = outcome.task
        made = outcome.output_key or task.output_key
        return (
            *(now, self.bucket, task.key, task.etag, task.size, task.job, task.target, task.fingerprint),
            *(outcome.event.value, self.output_bucket, made, claim_of(made), task.idempotency_key),
            *(outcome.requests, round(outcome.seconds, 3), outcome.bytes_out),
            *(outcome.code, outcome.message, int(outcome.permanent)),
        )


@dataclass(frozen=True)
class Tally:
    """What the checkpoint knows of one bucket and fingerprint. `states`: (event, is permanent, code) -> objects."""

    bucket: str
    fingerprint: str
    job: str
    target: str
    output_bucket: str
    states: Mapping[tuple[str, bool, str], int]
    in_flight: int
    oldest_sent_at: float | None  # Unix seconds


class JournalReader(Journal):
    """The checkpoint as it is, while a run may be at work on it: no file is made or changed. A missing one is empty."""

    def __init__(self, path: Path, bucket: str, output_bucket: str) -> None:
        self.path, self.bucket, self.output_bucket = real_file(path), bucket, output_bucket
        self._lock = threading.Lock()
        with explaining_sqlite(self.path):
            self.is_there = self.path.exists()
            self._db = sqlite3.connect(
                self._address(), isolation_level=None, check_same_thread=False, uri=True, timeout=30
            )
            with contextlib.ExitStack() as on_failure:
                on_failure.callback(self._db.close)
                if self.is_there:
                    self._db.execute("PRAGMA query_only = 1")
                    self._refuse_foreign()
                    self._refuse_older()
                else:
                    self._open_schema()
                on_failure.pop_all()

    def __enter__(self) -> "JournalReader":
        return self

    def _refuse_older(self) -> None:
        if self._version() < JOURNAL_VERSION:
            raise UserError(
                f"the checkpoint {self.path} is of an older version of this program",
                "start a run, which brings it up to date; --limit 1 is enough",
            )

    def _address(self) -> str:
        if not self.is_there:
            return "file::memory:"
        # What a killed run has left is not merged into the checkpoint by who only looks at it.
        if self.path.with_name(self.path.name + "-wal").exists():
            how = "mode=ro"
        elif os.access(self.path, os.W_OK) and os.access(self.path.absolute().parent, os.W_OK):
            # The locks and the shared memory of a run that may start beside it: without them, what it merges into the
            # checkpoint would look like damage. Both files go when it is closed.
            how = "mode=rw"
        else:
            # SQLite cannot make them here.
            how = "mode=ro&immutable=1"
        return f"{self.path.absolute().as_uri()}?{how}"

    def bytes_on_disk(self) -> int:
        """The size of the checkpoint, with what is not yet merged into it."""
        paths = (self.path, self.path.with_name(self.path.name + "-wal"))
        return sum(path.stat().st_size for path in paths if path.exists())

    def last_activity(self) -> float | None:
        """When the last outcome was written, or the last request was made durable, in Unix seconds."""
        newest = "SELECT max((SELECT time FROM log ORDER BY id DESC LIMIT 1), 0), (SELECT max(sent_at) FROM in_flight)"
        logged, sent = self._ask(newest)[0]
        return max(logged or 0, sent or 0) or None

    def fingerprints(self) -> list[tuple[str, str]]:
        """The buckets and fingerprints that there are rows of."""
        found: list[tuple[str, str]] = []
        # Requests before outcomes: what is settled in between is in both answers, and never in neither.
        for table in ("in_flight", "log"):
            group: Any = ("", "")
            # A blob sorts behind every text: each step jumps over all keys of the last group.
            step = f"SELECT bucket, fingerprint FROM {table} WHERE (bucket, fingerprint, key) > (?, ?, x'') "
            while rows := self._ask(step + "ORDER BY bucket, fingerprint, key LIMIT 1", *group):
                group = rows[0]
                found.append(group)
        return sorted(set(found))

    def tallies(self) -> Iterator[Tally]:
        """The states of all objects, counted by SQLite within one index, so that ten million take seconds."""
        for bucket, fingerprint in self.fingerprints():
            scope = (bucket, fingerprint)
            about = "SELECT job, target, output_bucket FROM log WHERE bucket = ? AND fingerprint = ? "
            described = self._ask(about + "ORDER BY key DESC, id DESC LIMIT 1", *scope)
            job, target, output_bucket = described[0] if described else ("", "", "")
            sent = "SELECT count(*), min(sent_at) FROM in_flight WHERE bucket = ? AND fingerprint = ?"
            [(count, oldest)] = self._ask(sent, *scope)
            yield Tally(*scope, job, target, output_bucket, self._states(scope), count, oldest)

    def _states(self, scope: tuple[str, str]) -> dict[tuple[str, bool, str], int]:
        rows = "FROM log WHERE bucket = ? AND fingerprint = ? GROUP BY key"
        # With max(), SQLite takes the other columns from the row that has it: the newest one.
        newest = f"(SELECT max(id) AS newest, event, permanent {rows}) AS state"
        code = "CASE event WHEN 'failed' THEN (SELECT code FROM log WHERE id = newest) ELSE '' END"
        others = f"SELECT event, permanent, {code}, count(*) FROM {newest} WHERE event <> 'converted' GROUP BY 1, 2, 3"
        # Most are converted: those are what is left of all, which is counted without looking at their states.
        query = f"SELECT 'all', 0, '', count(*) FROM (SELECT 1 {rows}) UNION ALL SELECT * FROM ({others})"
        counts = {(event, bool(lasting), code): count for event, lasting, code, count in self._ask(query, *scope * 2)}
        everything = counts.pop(("all", False, ""))
        return {(Event.CONVERTED.value, False, ""): everything - sum(counts.values()), **counts}

    def history(self, key: str, most: int) -> list[dict[str, Any]]:
        """The newest rows of one object in every job, newest first."""
        # By name, because the index has the fingerprint before the key: without it, all keys would be read.
        known = [fingerprint for bucket, fingerprint in self.fingerprints() if bucket == self.bucket]
        where = f"bucket = ? AND key = ? AND fingerprint IN ({','.join('?' * len(known))})"
        return self._named(f"SELECT * FROM log WHERE {where} ORDER BY id DESC LIMIT {most}", self.bucket, key, *known)

    def requests_of(self, key: str) -> list[dict[str, Any]]:
        """The unsettled requests for one object, without their URLs."""
        columns = "fingerprint, etag, claim, sent_at"
        return self._named(f"SELECT {columns} FROM in_flight WHERE bucket = ? AND key = ?", self.bucket, key)

    def latencies(self) -> list[float]:
        """How many seconds the newest conversions took, of at most a thousand rows."""
        newest = "SELECT event, seconds FROM log ORDER BY id DESC LIMIT 1000"
        return [seconds for (seconds,) in self._ask(f"SELECT seconds FROM ({newest}) WHERE event = 'converted'")]

    def _ask(self, query: str, *values: str) -> list[Any]:
        with self._lock, explaining_sqlite(self.path):
            return self._db.execute(query, values).fetchall()

    def _named(self, query: str, *values: str) -> list[dict[str, Any]]:
        with self._lock, explaining_sqlite(self.path):
            cursor = self._db.execute(query, values)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor]


class JournalInMind(JournalReader):
    """The checkpoint as it is, and what a run would claim, in a temporary table: neither in it nor all in memory."""

    def __init__(self, path: Path, bucket: str, output_bucket: str) -> None:
        super().__init__(path, bucket, output_bucket)
        # It counts a temporary table as a change.
        self._db.execute("PRAGMA query_only = 0")
        # SQLite spills a temporary table to a file without a name, whatever the database itself allows.
        columns = "claim TEXT PRIMARY KEY, key TEXT NOT NULL, fingerprint TEXT NOT NULL"
        self._db.execute(f"CREATE TEMP TABLE claimed ({columns}) WITHOUT ROWID")

    def __enter__(self) -> "JournalInMind":
        return self

    def claim(self, tasks: Iterable[Task]) -> None:
        """Take note of whose the output keys are."""
        with self._lock, explaining_sqlite(self.path):
            rows = [(claim_of(task.output_key), task.key, task.fingerprint) for task in tasks]
            self._db.executemany("INSERT OR IGNORE INTO claimed VALUES (?, ?, ?)", rows)

    def owners(self, claims: Sequence[str]) -> dict[str, str]:
        """The source keys that have, or would have, an output under those of the claims that are taken."""
        return {**dict(self._rows_about("claim, key", "claimed", "claim", (), claims)), **super().owners(claims)}

    def senders(self, claims: Sequence[str]) -> dict[str, str]:
        """The fingerprints of the jobs that send, or would send, something for those of the claims."""
        would = dict(self._rows_about("claim, fingerprint", "claimed", "claim", (), claims))
        return {**would, **super().senders(claims)}


########################################################################################################################
# Listing. Pages of a bucket, several at a time where the reader is hungry for them. The key space is cut into spans
# that are read side by side:
#   - Spans are disjoint and cover everything: a cut ends one span where the next begins, so each key is listed once,
#     whatever is guessed about where keys lie.
#   - All spans are owned by the thread that reads, which also parses: the pool's threads only fetch. Python would let
#     no two of them parse at a time, and they would only get in each other's way.
#   - No more pages are on their way than the reader has a use for, and than it takes to keep it from waiting.
########################################################################################################################


def number_of(key: str, skipped: int) -> int:
    """Where a key lies behind its first characters, if keys were numbers with the printable characters as digits."""
    number = 0
    for position in range(skipped, skipped + DIGITS_OF_A_KEY):
        # Characters that are not printable ASCII count as the nearest that is.
        digit = min(max(ord(key[position]) - 0x20, 0), 94) if position < len(key) else 0
        number = number * 95 + digit
    return number


@dataclass
class Span:
    """Keys that are not listed yet: those after `after`, up to and including `until`."""

    after: str
    until: str
    token: str = ""  # where a page has been read: S3's own word for where it goes on
    pages: float = math.inf  # that it probably has

    def _common(self) -> int:
        pairs = enumerate(zip(self.after, self.until, strict=False))
        return next((at for at, (one, other) in pairs if one != other), min(len(self.after), len(self.until)))

    def cut(self, at: str) -> "Span | None":
        """End this span at a key inside of it; the span of what comes behind, or None if the key is not inside."""
        if not self.after < at < self.until:
            return None
        behind = Span(at, self.until)
        self.until = at
        return behind

    def part(self, share: float) -> str:
        """A key that lies a part of the way into the span, as if keys were evenly spread over it.

        Where they are not, spans turn out empty, and are cut again closer to where keys are.
        """
        common = self._common()
        low, high = number_of(self.after, common), number_of(self.until, common)
        number = low + int((high - low) * share)
        digits = [number // 95**power % 95 for power in reversed(range(DIGITS_OF_A_KEY))]
        return self.after[:common] + "".join(chr(0x20 + digit) for digit in digits)

    def share_of(self, page: Page) -> list[S3Object]:
        """The objects of a page that lie within this span, as it is now."""
        objects, until = page.objects, self.until
        if not objects or objects[-1].key <= until:
            return objects
        return [source for source in objects if source.key <= until]

    def rest(self, page: Page) -> "Span | None":
        """What is left of this span after a page; None if nothing is."""
        last = page.objects[-1].key if page.objects else self.after
        if page.is_last or last >= self.until:
            return None
        common = self._common()
        start, now, end = (number_of(key, common) for key in (self.after, last, self.until))
        is_known = now > start and not self.until.endswith(LAST_KEY)
        return Span(last, self.until, page.token, (end - now) / (now - start) if is_known else math.inf)


def refuse_disorder(page: Page, after: str) -> None:
    """Raise RunStopped unless the keys of a page ascend and come after a key: spans would miss some, or never end."""
    keys = [after, *map(operator.itemgetter(0), page.objects)]
    if not all(map(operator.lt, keys, keys[1:])):
        because = "this server does not list keys in the order that S3 promises, so that some would be missed"
        raise RunStopped(because, "name the keys with --keys-from, and set run.skip_existing = no")


FetchedPage = Callable[[], Page]  # a page that has come in; calling it parses it


class PageReader(Protocol):
    """Fetches a page of keys that begin with a prefix; `where` names its Delimiter, StartAfter or ContinuationToken."""

    def __call__(self, prefix: str, **where: str) -> FetchedPage:
        """Fetch it. Raises RunStopped if the listing is refused or breaks off; so may the parsing."""


class Listing:
    """The pages of all keys that begin with a prefix. `hunger` says how many pages may be on their way at the most."""

    def __init__(self, fetch_page: PageReader, prefix: str, hunger: Callable[[], int]) -> None:
        self._fetch_page, self._prefix, self._hunger = fetch_page, prefix, hunger
        self._waiting = [Span("", prefix + LAST_KEY)]
        self._reading: dict[Future[FetchedPage], Span] = {}
        self._folders: Future[list[str]] | None = None
        self._is_cut_by_folders = False
        self._width = 1  # pages at a time; it grows while the reader has to wait for them

    def pages(self) -> Generator[list[S3Object], None, None]:
        """The objects, a page at a time; in the order of their keys where one page is read at a time.

        Raises RunStopped if the listing is refused or breaks off.
        """
        pool = ThreadPoolExecutor(LIST_THREADS, thread_name_prefix="listing")
        try:
            while self._waiting or self._reading:
                self._read_on(pool)
                since = time.monotonic()
                ready = wait(self._reading, return_when=FIRST_COMPLETED).done
                if time.monotonic() - since > PAGE_WAIT_SECONDS:
                    self._width = min(2 * self._width, LIST_THREADS)
                for done in ready:
                    span, page = self._reading.pop(done), done.result()()
                    refuse_disorder(page, span.after)
                    objects, rest = span.share_of(page), span.rest(page)
                    self._waiting += [rest] if rest else []
                    # Before the reader gets this one, so that the next is there when it comes back.
                    self._read_on(pool)
                    yield objects
        finally:
            # A reader that has stopped does not wait for pages that nobody wants.
            pool.shutdown(wait=False, cancel_futures=True)

    def _read_on(self, pool: ThreadPoolExecutor) -> None:
        wanted = max(1, min(self._width, self._hunger()))
        if wanted > 1:
            self._cut_by_folders(pool)
        self._cut_in_parts(wanted - len(self._reading) - len(self._waiting))
        while self._waiting and len(self._reading) < wanted:
            span = self._waiting.pop()
            where = {"ContinuationToken": span.token} if span.token else {"StartAfter": span.after}
            self._reading[pool.submit(self._fetch_page, self._prefix, **where)] = span

    def _cut_by_folders(self, pool: ThreadPoolExecutor) -> None:
        """Cut the spans at folders, which are asked for once, on the side."""
        if self._folders is None:
            self._folders = pool.submit(self._probe_folders)
        elif self._folders.done() and not self._is_cut_by_folders:
            self._is_cut_by_folders = True
            # Nothing depends on the answer: where there is none, spans are cut by guessing.
            folders = [] if self._folders.exception() else self._folders.result()
            for folder in folders[:: max(1, len(folders) // MOST_CUTS_BY_FOLDERS)]:
                spans = [*self._waiting, *self._reading.values()]
                self._waiting += filter(None, [span.cut(folder) for span in spans])

    def _probe_folders(self) -> list[str]:
        """The folders directly below the prefix, or below the only one that is there; at most a page of them."""
        level, folders = self._prefix, [""]
        for _ in range(FOLDER_LEVELS_PROBED):
            page = self._fetch_page(level, Delimiter="/")()
            folders = page.folders
            if len(folders) != 1:
                break
            level = folders[0]
        return folders

    def _cut_in_parts(self, wanted: int) -> None:
        """Cut the span that waits into as many more parts as are wanted, if each would have some pages."""
        if wanted > 0 and self._waiting:
            span = self._waiting[-1]
            for part in range(int(min(wanted, span.pages / PAGES_WORTH_A_SPAN)), 0, -1):
                behind = span.cut(span.part(part / (part + 1)))
                self._waiting += [behind] if behind else []


########################################################################################################################
# S3. Errors come out as what they mean: RunStopped for what would meet every object, ObjectFailed for one object.
#   - One client for all threads, made before the first task is handed out: clients are thread-safe, sessions are not.
#   - A source is read with If-Match, so that the bytes are those of the version that the journal speaks of.
#   - Nothing depends on conditional writes, which not every S3 has.
########################################################################################################################

REFUSED_BY_S3 = frozenset(
    {
        *("401", "403", "AccessDenied", "AccountProblem", "AllAccessDisabled", "ExpiredToken", "ExpiredTokenException"),
        *("InvalidAccessKeyId", "InvalidSecurity", "InvalidToken", "InvalidTokenId", "NoSuchBucket", "NotSignedUp"),
        *(
            "407",
            "AuthorizationHeaderMalformed",
            "RequestExpired",
            "RequestTimeTooSkewed",
            "SignatureDoesNotMatch",
            "TokenRefreshRequired",
            "UnauthorizedAccess",
        ),
    }
)


# About how outputs are to be written (s3.storage_class, s3.sse, s3.acl), which is the same for all of them.
REFUSED_OPTIONS = frozenset(
    {
        *("AccessControlListNotSupported", "InvalidArgument", "InvalidEncryptionAlgorithmError"),
        *("InvalidStorageClass", "NotImplemented"),
    }
)
NO_CONNECTION = (EndpointConnectionError, ConnectTimeoutError, ProxyConnectionError)
FOR_ALL_OBJECTS = (
    *(NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, MetadataRetrievalError),
    *(TokenRetrievalError, UnauthorizedSSOTokenError, *NO_CONNECTION, SSLError),
)


# What to do about a refusal of S3's, by its code.
S3_HINTS = {
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY is wrong (or that of the profile): correct it, and run it again",
    "InvalidAccessKeyId": "AWS_ACCESS_KEY_ID is unknown there (or that of the profile): correct it, and run it again",
    "AccessDenied": "allow the action to these AWS credentials, and run it again",
    "RequestTimeTooSkewed": "set this machine's clock (chronyd, ntpd), and run it again",
    "RequestExpired": "set this machine's clock (chronyd, ntpd), and run it again",
    "AuthorizationHeaderMalformed": "correct s3.region (or that of the AWS configuration), and run it again",
}


def refused(error: Exception, doing: str) -> RunStopped:
    """The end of the run for an S3 error that would meet every object."""
    if not isinstance(error, ClientError):
        return s3_unreachable(error, doing)
    said = error.response.get("Error", {})
    if said.get("Code") == "407":
        # Only to an http address a proxy answers itself.
        because = f"the proxy {proxy_for('http://s3')} wants a password: 407 {said.get('Message', '')}".rstrip()
        return RunStopped(because, PROXY_HINT)
    return RunStopped(
        redacted(f"S3 refused {doing}: {said.get('Code', '')} {said.get('Message', '')}".rstrip()),
        S3_HINTS.get(
            error_code(error), "check the bucket's name, the AWS credentials and their permissions, and run it again"
        ),
    )


def s3_unreachable(error: Exception, doing: str) -> RunStopped:
    """The end of the run where S3 gives no answer."""
    untrusted = certificate_problem(error)
    if untrusted:
        return RunStopped(
            f"S3's certificate is not trusted: {untrusted}",
            "for a private CA, set AWS_CA_BUNDLE to its file; else check s3.endpoint_url and this machine's clock",
        )
    # Of a failed connection, boto3 says where to, and keeps why to itself.
    cause = error.kwargs.get("error") if isinstance(error, (*NO_CONNECTION, HTTPClientError)) else None
    why = f": {connection_problem(cause)}" if cause and isinstance(error, NO_CONNECTION) else ""
    proxy = proxy_for("https://s3") or proxy_for("http://s3")
    # Its own words for what comes of an address that is none would sound like a bug.
    is_set_up = type(error) is HTTPClientError and bool(proxy)
    said = f"through the proxy {proxy}: {cause}" if is_set_up else f"{error}{why}"
    because = redacted(f"S3 could not be reached for {doing}: {said}")
    if is_set_up or isinstance(error, ProxyConnectionError):
        return RunStopped(because, PROXY_HINT)
    return RunStopped(
        because, "check the network, s3.endpoint_url, s3.region and the AWS credentials, and run it again"
    )


def error_code(error: Exception) -> str:
    """S3's code for an error; for a failed connection, the name of the exception."""
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))
    return type(error).__name__


def is_refusal(error: Exception) -> bool:
    """Whether it is the credentials, the bucket or the network, rather than one object."""
    return error_code(error) in REFUSED_BY_S3 or isinstance(error, FOR_ALL_OBJECTS)


def open_session(address: str, connections: int, ca_bundle: str | None = None) -> requests.Session:
    """A session for one address, with what the environment says of proxies and certificates for it.

    `ca_bundle`: a file to trust instead of what REQUESTS_CA_BUNDLE names.
    """
    session = requests.Session()
    # The environment is asked once: requests would ask it before every request, for longer than the request takes.
    told = session.merge_environment_settings(address, {}, None, ca_bundle, None)
    session.trust_env, session.proxies, session.verify = False, told["proxies"], told["verify"]
    mount(session, Adapter(pool_connections=4, pool_maxsize=connections))
    return session


def is_amazon(address: str) -> bool:
    """Whether an S3 is Amazon's own."""
    return f".{urllib.parse.urlsplit(address).hostname}".endswith((".amazonaws.com", ".amazonaws.com.cn"))


def without_trailers() -> botocore.config.Config:
    """What other S3 servers want: several refuse the checksums that boto3 sends behind a body, unless told not to."""
    names = ("request_checksum_calculation", "response_checksum_validation")
    told: Any = {name: "when_required" for name in names if f"AWS_{name.upper()}" not in os.environ}
    return botocore.config.Config(**told)


def make_s3_client(
    options: S3Options, region: str | None, connections: int
) -> tuple["S3Client", botocore.credentials.Credentials]:
    """The one client, shared by all threads, and the credentials that boto3's usual chain gives it.

    Raises UserError if the profile does not exist or there are no credentials at all.
    """
    # boto3 asks by `getpass`, which takes no other way where there is no terminal.
    vars(getpass)["fallback_getpass"] = refuse_prompt
    config = botocore.config.Config(
        signature_version="s3v4",
        retries={"mode": "standard", "total_max_attempts": S3_ATTEMPTS},
        max_pool_connections=connections,
        connect_timeout=CONNECT_TIMEOUT_SECONDS,
        read_timeout=S3_TIMEOUT_SECONDS,
        user_agent_extra=f"s3_bulk_convert/{__version__}",
    )
    try:
        session = boto3.session.Session(profile_name=options.profile, region_name=region or options.region)
        credentials = session.get_credentials()
        if credentials is None:
            raise UserError(
                "there are no AWS credentials", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or s3.profile"
            )
        client = session.client("s3", endpoint_url=options.endpoint_url, config=config)
        # The address may come from the AWS configuration as well: only a client knows it.
        if not is_amazon(client.meta.endpoint_url):
            client = session.client("s3", endpoint_url=options.endpoint_url, config=config.merge(without_trailers()))
        return client, credentials
    except (BotoCoreError, ValueError, OSError) as problem:
        raise wrong_configuration(problem) from None


def wrong_configuration(problem: Exception) -> UserError:
    """What to say of an AWS configuration that leads nowhere."""
    return UserError(f"the AWS configuration cannot be used: {problem}", "correct it, or [s3] profile, region")


def refuse_prompt(*_: object, **__: object) -> NoReturn:
    """What is asked where there is no terminal, for a profile with `mfa_serial`. Raises UserError."""
    # boto3 would read the code from stdin, and wait for ever.
    hint = "give the keys of a session (aws sts get-session-token), or an s3.profile without mfa_serial"
    raise UserError("the AWS profile wants an MFA code, and there is no terminal to ask for it", hint)


class UrlSigner:
    """Presigns reading the objects of a bucket as boto3 does, at a tenth of its cost (SigV4 with query parameters).

    A URL of boto3's own is its model and its check: where the same request gets another signature there (an access
    point of several regions, say), boto3 goes on signing all of them. `more`: what the query is to say in addition;
    boto3 would sign it as a header, which whoever fetches the URL does not send.
    """

    PROBE = "as boto3/signs it+%~é.png"

    def __init__(
        self, sign: Callable[[str], str], credentials: botocore.credentials.Credentials, more: Mapping[str, str]
    ) -> None:
        self._sign, self._credentials, self._more = sign, credentials, dict[str, str]()
        theirs = urllib.parse.urlsplit(sign(self.PROBE))
        told = dict(urllib.parse.parse_qsl(theirs.query))
        self._host, self._origin = theirs.netloc, f"{theirs.scheme}://{theirs.netloc}"
        self._folder = theirs.path.removesuffix(urllib.parse.quote(self.PROBE, safe="/~"))
        # The access key in front of the scope may hold anything.
        self._scope = told.get("X-Amz-Credential", "").rsplit("/", 4)[2:]
        ours = self._signed(self.PROBE, told.get("X-Amz-Date", ""))
        self._is_like_boto3 = ours.endswith(f"&X-Amz-Signature={told.get('X-Amz-Signature')}")
        self._more = dict(more)

    def sign(self, key: str) -> str:
        """A URL that reads one object for as long as URL_LIFE_SECONDS. Raises RunStopped without credentials."""
        try:
            if not self._is_like_boto3:
                return self._sign(key)
            return self._signed(key, f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}")
        except BotoCoreError as error:
            raise refused(error, "signing a URL") from None

    def _signed(self, key: str, stamp: str) -> str:
        keys = self._credentials.get_frozen_credentials()
        scope = [stamp[:8], *self._scope]
        fields = {
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Credential": f"{keys.access_key}/{'/'.join(scope)}",
            "X-Amz-Date": stamp,
            "X-Amz-Expires": str(URL_LIFE_SECONDS),
            "X-Amz-SignedHeaders": "host",
            **({"X-Amz-Security-Token": keys.token} if keys.token else {}),
            **self._more,
        }
        quote = urllib.parse.quote
        query = "&".join(f"{name}={quote(value, safe='-_.~')}" for name, value in sorted(fields.items()))
        path = self._folder + quote(key, safe="/~")
        canonical = f"GET\n{path}\n{query}\nhost:{self._host}\n\nhost\nUNSIGNED-PAYLOAD"
        wanted = f"AWS4-HMAC-SHA256\n{stamp}\n{'/'.join(scope)}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
        secret = f"AWS4{keys.secret_key}".encode()
        for part in (*scope, wanted):
            secret = hmac.digest(secret, part.encode(), "sha256")
        return f"{self._origin}{path}?{query}&X-Amz-Signature={secret.hex()}"


class Bucket:
    """The source bucket and the output bucket. With a `stop`, an outage of S3 is waited for until the run is to end."""

    def __init__(self, settings: Settings, stop: StopFlag | None = None) -> None:
        self._stop, self._reach = stop, Reach("S3")
        self.options, self.name, self.output_name = settings.s3, settings.s3.bucket, settings.s3.written_bucket
        # botocore's pool holds 10 by default: each worker beyond that would make a new connection for each object.
        self._connections = settings.run.workers + HEADS_AT_A_TIME
        self._payer: Any = {"RequestPayer": "requester"} if settings.s3.requester_pays else {}
        self._connect(None)
        self._has_written = False
        self._refusals = 0  # of sources, since the last one that could be read
        self._most_bytes = settings.api.max_size
        self._presigns = settings.api.transfer != "upload"
        self.pages_asked = 0  # of listings
        refuse_wrong_certificates(self.client.meta.endpoint_url, "AWS_CA_BUNDLE")
        self._lister = open_session(self.client.meta.endpoint_url, LIST_THREADS, os.environ.get("AWS_CA_BUNDLE"))
        self._fast_failures = 0

    def _ride_out(self, caught_exception: Exception | None, attempts: int, **_: Any) -> Any:
        """Have boto3 try again, beyond its own few attempts, while an S3 that has answered before is away."""
        if caught_exception is None:
            self._reach.found()
        elif self._stop and isinstance(caught_exception, NO_CONNECTION) and self._reach.may_come_back():
            self._stop.sleep(outage_pause(attempts - 1))
            return 0
        return None

    def _connect(self, region: str | None) -> None:
        self.client, credentials = make_s3_client(self.options, region, self._connections)
        # As Amazon says for URLs of requester-pays buckets.
        payer = {"x-amz-request-payer": "requester"} if self._payer else {}
        if self._stop:
            self.client.meta.events.register_first("needs-retry.s3", self._ride_out)
        try:
            self.presign = UrlSigner(self._presigned_by_boto3, credentials, payer).sign
        except (BotoCoreError, ClientError) as error:
            raise refused(error, "signing a URL") from None
        except OSError as problem:
            raise wrong_configuration(problem) from None

    def check(self) -> None:
        """Raise RunStopped if a bucket does not exist or cannot be reached. Learns the source bucket's region."""
        for name in dict.fromkeys((self.name, self.output_name)):
            try:
                reply = self.client.head_bucket(Bucket=name)
                headers = reply["ResponseMetadata"]["HTTPHeaders"]
            except ClientError as error:
                headers = error.response["ResponseMetadata"].get("HTTPHeaders", {})
                is_missing = error_code(error) in {"404", "NoSuchBucket"}
                if is_missing and name in self.client.meta.endpoint_url:
                    raise RunStopped(
                        f"the bucket {name} does not exist at {self.client.meta.endpoint_url}",
                        "take the bucket out of s3.endpoint_url, which is the address of all buckets",
                    ) from None
                # 403 is not the last word: a policy may allow listing below a prefix only, or writing only.
                if is_missing:
                    raise RunStopped(
                        f"the bucket {name} does not exist", "correct s3.bucket or s3.output_bucket"
                    ) from None
                if error_code(error) == "407":
                    raise refused(error, f"access to the bucket {name}") from None
                if error_code(error) == "400" and self._presigns:
                    self._refuse_other_region(name)
            except BotoCoreError as error:
                raise refused(error, f"access to the bucket {name}") from None
            self._use_region(headers.get("x-amz-bucket-region"), name)

    def _refuse_other_region(self, name: str) -> None:
        """Raise RunStopped if boto3 finds the region for its own requests alone: URLs would keep the wrong one."""
        try:
            self.client.list_objects_v2(Bucket=name, MaxKeys=1, **self._payer)
        except (ClientError, BotoCoreError):
            # The run's own listing will say why.
            return
        said = f"the bucket {name} is in another region than {self.client.meta.region_name}"
        raise RunStopped(said, "correct s3.region (or that of the AWS configuration), and run it again")

    def _use_region(self, region: str | None, name: str) -> None:
        # A URL signed for another region is refused by Amazon, where a client's own requests are redirected.
        if region and name == self.name and region != self.client.meta.region_name and not self.options.endpoint_url:
            self._connect(region)

    def list_pages(self, prefix: str, hunger: Callable[[], int]) -> Generator[list[S3Object], None, None]:
        """The objects whose keys begin with `prefix`, a page at a time; see Listing. Raises RunStopped."""
        return Listing(functools.partial(self.fetch_page, self.name), prefix, hunger).pages()

    def read_page(self, bucket: str, prefix: str, **where: str) -> Page:
        """One page of a listing. Raises RunStopped if it is refused or breaks off."""
        return self.fetch_page(bucket, prefix, **where)()

    def fetch_page(self, bucket: str, prefix: str, **where: str) -> FetchedPage:
        """One page of a listing, ready to be parsed; see PageReader."""
        request: Any = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": PAGE_KEYS, **where, **self._payer}
        request["OptionalObjectAttributes"] = ["RestoreStatus"]
        self.pages_asked += 1
        if self._fast_failures < FAST_FAILURES_ENDURED:
            try:
                return functools.partial(self._parse, self._fetch_xml(request), request)
            except requests.ConnectionError as error:
                # A network that fails fails boto3 as well; what boto3 alone trusts, or goes around, does not.
                self._fast_failures += isinstance(error, requests.exceptions.SSLError | requests.exceptions.ProxyError)
            except (BadListing, BotoCoreError, requests.RequestException, urllib3.exceptions.HTTPError):
                self._fast_failures += 1
        page = self._ask_boto3(request)
        return lambda: page

    def _parse(self, xml: bytes, request: Mapping[str, Any]) -> Page:
        try:
            page = parse_page(xml)
        except BadListing:
            self._fast_failures += 1
            return self._ask_boto3(request)
        self._fast_failures = 0
        return page

    def _ask_boto3(self, request: Mapping[str, Any]) -> Page:
        """The same page by boto3, which is slow, but knows about redirects, retries and the words for what is wrong."""
        try:
            # It asks for URL-encoded keys and decodes them: XML cannot carry every character that a key may have.
            return page_of_reply(self.client.list_objects_v2(**request))
        except (ClientError, BotoCoreError) as error:
            raise refused(error, f"the listing of {request['Bucket']}") from None
        except BadListing as bad:
            raise RunStopped(
                f"the listing of {request['Bucket']} breaks off: {bad}",
                "check s3.endpoint_url and whether a proxy is on the way, and run it again",
            ) from None

    def _fetch_xml(self, request: Mapping[str, Any]) -> bytes:
        """A page as S3 sends it, because boto3's parser takes ten times as long as all the rest."""
        # A copy, because boto3 writes into it that keys are to come URL-encoded: where a request says so itself, boto3
        # leaves them as they come, and the page that it is asked for instead of this one would have other keys.
        params = dict(request)
        address = self.client.generate_presigned_url("list_objects_v2", Params=params, ExpiresIn=LIST_URL_SECONDS)
        # boto3 signs them with the URL, so they must be sent.
        headers = {"x-amz-optional-object-attributes": "RestoreStatus"}
        if self._payer:
            headers["x-amz-request-payer"] = "requester"
        timeout = (CONNECT_TIMEOUT_SECONDS, S3_TIMEOUT_SECONDS)
        with self._lister.get(address, headers=headers, timeout=timeout, allow_redirects=False, stream=True) as reply:
            self._reach.found()
            if reply.status_code != 200:
                raise BadListing(f"status {reply.status_code}")
            # In one piece: what requests does in pieces of 10 KB takes as long as all the rest of a request.
            return reply.raw.read(decode_content=True)

    def current(self, page: Sequence[S3Object]) -> list[S3Object | ObjectFailed]:
        """The objects of a page in the version that is there now, in the same order; why, where there is none to read.

        Raises RunStopped if S3 refuses them all or cannot be reached.
        """
        with ThreadPoolExecutor(HEADS_AT_A_TIME) as pool:
            heads = list(pool.map(self._head, page))
        is_any_seen = any(isinstance(head, S3Object) for head in heads)
        return [
            head if isinstance(head, S3Object) else self._not_seen(source.key, head, is_any_seen=is_any_seen)
            for source, head in zip(page, heads, strict=True)
        ]

    def _head(self, source: S3Object) -> S3Object | ClientError:
        try:
            head = self.client.head_object(Bucket=self.name, Key=source.key, **self._payer)
        except (ClientError, BotoCoreError) as error:
            if isinstance(error, ClientError) and error.response["ResponseMetadata"]["HTTPStatusCode"] < 500:
                return error
            raise refused(error, f"reading from {self.name}") from None
        if not {"ContentLength", "LastModified"} <= head.keys():
            raise RunStopped(
                f"S3 does not say how long and how old an object of {self.name} is (Content-Length, Last-Modified)",
                "go around the proxy or gateway that hides it, or leave out --keys-from, and run it again",
            )
        return headed_object(source.key, head)

    def _not_seen(self, key: str, error: Exception, *, is_any_seen: bool) -> ObjectFailed:
        if error_code(error) in {"404", "NoSuchKey"}:
            return ObjectFailed("source_gone", "there is no object with this key", permanent=False)
        # A refused HEAD has no body; that of a GET says whether it is the credentials, or this object.
        try:
            self.client.get_object(Bucket=self.name, Key=key, Range="bytes=0-0", **self._payer)["Body"].close()
        except (ClientError, BotoCoreError) as explained:
            error = explained
        if is_any_seen:
            self.note_read()
        # To who may not list, S3 says the same of an object that does not exist.
        failure = self._refused_source(error)
        if isinstance(failure, RunStopped):
            raise failure
        return failure

    @contextlib.contextmanager
    def fetched(self, url: str) -> Iterator[IO[bytes]]:
        """A temporary copy of an object of any bucket, from its `s3://` URL. Raises OSError, RunStopped."""
        name, _, key = url.removeprefix("s3://").partition("/")
        # A copy, because S3 hangs up on a stream that is read no faster than objects are converted.
        with tempfile.TemporaryFile() as copy:
            try:
                shutil.copyfileobj(self.client.get_object(Bucket=name, Key=key, **self._payer)["Body"], copy)
            except (ClientError, BotoCoreError) as error:
                raise refused(error, f"reading {url}") from None
            copy.seek(0)
            yield copy

    def _presigned_by_boto3(self, key: str) -> str:
        request = {"Bucket": self.name, "Key": key}
        return self.client.generate_presigned_url("get_object", Params=request, ExpiresIn=URL_LIFE_SECONDS)

    def open_source(self, task: Task) -> tuple[IO[bytes], int]:
        """A stream over the very version of the object that was listed, and its length, unpacked if it is packed.

        Raises ObjectFailed if it is gone, changed or unreadable, RunStopped if nothing can be read.
        """
        reply = self.read_source(task)
        coding = packing_of(reply.get("ContentEncoding", ""))
        if coding:
            return unpacked(reply["Body"], coding, self._most_bytes)
        # The listing's word counts only where S3 itself does not say how much it sends.
        return reply["Body"], reply.get("ContentLength", task.size)

    def read_source(self, task: Task, **more: str) -> Any:
        """S3's answer with the source's body and headers. Raises ObjectFailed or RunStopped."""
        request: Any = {"IfMatch": f'"{task.etag}"', **more} if task.etag else more
        try:
            reply = self.client.get_object(Bucket=self.name, Key=task.key, **request, **self._payer)
        except (ClientError, BotoCoreError) as error:
            raise self._read_failure(error) from None
        self.note_read()
        return reply

    def note_read(self) -> None:
        """A source was read, by this program or by its URL: whatever is refused is not refused to everybody."""
        self._refusals = 0

    def _read_failure(self, error: Exception) -> RunStopped | ObjectFailed:
        code = error_code(error)
        if code in {"NoSuchKey", "404"}:
            return ObjectFailed("source_gone", "the object was deleted after it was listed", permanent=False)
        if code in {"PreconditionFailed", "412"}:
            return ObjectFailed("source_changed", "the object was overwritten after it was listed", permanent=False)
        return self._refused_source(error)

    def _refused_source(self, error: Exception) -> RunStopped | ObjectFailed:
        """What it means that S3 does not hand out a source: AccessDenied alone does not say whether all are meant.

        It is about this object, its own ACL or its KMS key, until so many in a row are evidence against all. Those stay
        to do, so that the failure does not last.
        """
        code = error_code(error)
        self._refusals += code == "AccessDenied"
        if is_refusal(error) and (code != "AccessDenied" or self._refusals >= REFUSALS_ENDURED):
            return refused(error, f"reading from {self.name}")
        return ObjectFailed("source_unreadable", f"S3: {error}", permanent=code == "InvalidObjectState")

    def _metadata(self, bucket: str, key: str) -> dict[str, str] | None:
        """What an object carries: None if there is none, UNSEEN if this run may not look. Raises ObjectFailed."""
        try:
            return self.client.head_object(Bucket=bucket, Key=key, **self._payer)["Metadata"]
        except (ClientError, BotoCoreError) as error:
            if error_code(error) in {"404", "NoSuchKey"}:
                return None
            if error_code(error) in {"403", "AccessDenied"}:
                return UNSEEN
            if is_refusal(error) or isinstance(error, BotoCoreError):
                raise refused(error, f"looking at objects of {bucket}") from None
            # What was not seen must not count as absent: it might be overwritten.
            raise ObjectFailed("look_failed", f"S3: {error}", permanent=False) from None

    def is_our_output(self, key: str) -> bool:
        """Whether an object of the source bucket carries the metadata of an output of this program.

        Raises ObjectFailed or RunStopped if S3 does not say.
        """
        found = self._metadata(self.name, key) or {}
        return "source-etag" in found and "job" in found

    def has_nothing_of(self, key: str, planned_key: str) -> bool:
        """Whether neither a source nor an output under its planned key is there."""
        outputs = made_keys(planned_key)
        return not self._exists(self.name, key) and not any(self._exists(self.output_name, made) for made in outputs)

    def _exists(self, bucket: str, key: str) -> bool:
        try:
            self.client.head_object(Bucket=bucket, Key=key, **self._payer)
        except (ClientError, BotoCoreError) as error:
            return error_code(error) not in {"404", "NoSuchKey"}
        return True

    def refuse_to_overwrite(self, task: Task) -> None:
        """Raise ObjectFailed if an object that is not this source's output has a key that the output may get."""
        for key in made_keys(task.output_key):
            found = self._metadata(self.output_name, key)
            # Where this run may only write, a listing is all that there is to go by. What has a trace in the journal
            # is looked at because of that, and not because a listing has shown it.
            if found is UNSEEN and task.look_first and not task.traced:
                said = f"{key} may be another's, and this run may not look at it; allow s3:GetObject on the outputs"
                raise ObjectFailed("output_collision", said, permanent=False)
            if found is not None and found is not UNSEEN and not is_made_of(found, self.name, task.key):
                said = f"{key} exists and is no output of this object; put outputs under a prefix of their own"
                raise ObjectFailed("output_collision", said, permanent=True)

    def output_is_of(self, task: Task) -> bool:
        """Whether what lies under a task's output key was made of its source, in whatever version."""
        return bool(self._made_with(task, {}))

    def output_of(self, task: Task) -> str:
        """The key under which this very version's output lies already; empty if it does not."""
        # The fingerprint too: with other options the same version comes to other bytes.
        return self._made_with(task, {"source-etag": task.etag, "job-fingerprint": task.fingerprint})

    def has_output_of_another_bucket(self, task: Task) -> bool:
        """Whether something under a task's output key says that its source lies in another bucket."""
        own = urllib.parse.quote(self.name)
        found = (self._metadata(self.output_name, key) or {} for key in made_keys(task.output_key))
        return any(made.get("source-bucket", own) != own for made in found)

    def _made_with(self, task: Task, wanted: dict[str, str]) -> str:
        for key in made_keys(task.output_key):
            found = self._metadata(self.output_name, key)
            if found and is_made_of(found, self.name, task.key) and wanted.items() <= found.items():
                return key
        return ""

    def existing_outputs(self, prefix: str, keys: Iterable[str]) -> dict[str, float]:
        """Those of the keys that exist in the output bucket, with the Unix seconds when they were written.

        Read from listings, with a jump over what lies between two keys. Raises RunStopped.
        """
        wanted = sorted(set(keys), reverse=True)
        found: dict[str, float] = {}
        after = token = ""
        while wanted:
            # StartAfter leaves out the key itself: a key without its last character sorts before it.
            after = max(after, wanted[-1][:-1])
            where = {"ContinuationToken": token} if token else {"StartAfter": after}
            page = self.read_page(self.output_name, prefix, **where)
            refuse_disorder(page, after)
            # A page may be empty and not the last: then only its token leads on.
            token = "" if page.objects else page.token
            listed = {output.key: output for output in page.objects}
            after = page.objects[-1].key if page.objects else after
            while wanted and (page.is_last or wanted[-1] <= after):
                key = wanted.pop()
                if key in listed:
                    found[key] = listed[key].modified
        return found

    def store(self, task: Task, result: Result) -> str:
        """Put an answer into the output bucket and return its key. A broken transfer leaves nothing there."""
        key = task.output_key + result.suffix
        extra = {**self._output_arguments(task), "ContentType": result.media_type}
        with self._explaining_writes(key):
            if result.size > MULTIPART_BYTES:
                parts = TransferConfig(use_threads=False, multipart_chunksize=PART_BYTES)
                self.client.upload_fileobj(result.body, self.output_name, key, ExtraArgs=extra, Config=parts)
            else:
                self.client.put_object(Bucket=self.output_name, Key=key, Body=result.body, **extra)
        return key

    def copy(self, task: Task) -> None:
        """Copy an object that is in the target format already, within S3, with what it says of itself.

        Raises ObjectFailed or RunStopped.
        """
        source: Any = {"Bucket": self.name, "Key": task.key}
        told = self.read_source(task, Range="bytes=0-0")
        told["Body"].close()
        extra = {**kept_of_source(told, task.target), **self._output_arguments(task), "MetadataDirective": "REPLACE"}
        extra["Metadata"] = {**ascii_only(told["Metadata"]), **extra["Metadata"]}
        with self._explaining_writes(task.output_key):
            parts = TransferConfig(use_threads=False)
            self.client.copy(source, self.output_name, task.output_key, ExtraArgs=extra, Config=parts)

    def _output_arguments(self, task: Task) -> Any:
        options = self.options
        named = {
            "StorageClass": options.storage_class,
            "ServerSideEncryption": options.sse,
            "SSEKMSKeyId": options.sse_kms_key_id,
            "ACL": options.acl,
            "CacheControl": options.cache_control,
        }
        # S3 takes ASCII only in metadata.
        metadata = {**source_key_metadata(task.key), "source-etag": task.etag, "job": urllib.parse.quote(task.job)}
        metadata |= {"job-fingerprint": task.fingerprint, "source-bucket": urllib.parse.quote(self.name)}
        return {"Metadata": metadata, **self._payer, **{name: value for name, value in named.items() if value}}

    def look_up(self, key: str) -> S3Object | None:
        """One object as a listing shows it; None if it is not there. Raises RunStopped."""
        request: Any = {"Bucket": self.name, "Prefix": key, "MaxKeys": 1, **self._payer}
        try:
            # No key that begins with another one sorts before it.
            page: Any = self.client.list_objects_v2(**request, OptionalObjectAttributes=["RestoreStatus"])
        except (ClientError, BotoCoreError) as error:
            raise refused(error, f"the listing of {self.name}") from None
        return next((listed_object(line) for line in page.get("Contents", []) if line["Key"] == key), None)

    def made_of(self, planned_key: str) -> dict[str, dict[str, str]]:
        """Key -> metadata of what lies under a planned key."""
        found = {key: self._metadata(self.output_name, key) for key in made_keys(planned_key)}
        return {key: metadata for key, metadata in found.items() if metadata is not None and metadata is not UNSEEN}

    def read_first_byte(self, key: str) -> None:
        """Read from one source. Raises RunStopped."""
        try:
            self.client.get_object(Bucket=self.name, Key=key, Range="bytes=0-0", **self._payer)["Body"].read()
        except (ClientError, BotoCoreError) as error:
            raise refused(error, f"reading from {self.name}") from None

    def write_probe(self, task: Task) -> str:
        """Write an empty object as an output would be written, and return its version; empty if it has none."""
        with self._explaining_writes(task.output_key):
            written: Any = self.client.put_object(
                Bucket=self.output_name, Key=task.output_key, Body=b"", **self._output_arguments(task)
            )
        return str(written.get("VersionId", ""))

    def delete_probe(self, key: str, version: str) -> None:
        """Delete that version of that object. Raises RunStopped."""
        # Without its version, a versioned bucket would keep it, and a marker in addition.
        which: Any = {"VersionId": version} if version else {}
        try:
            self.client.delete_object(Bucket=self.output_name, Key=key, **which, **self._payer)
        except (ClientError, BotoCoreError) as error:
            raise refused(error, f"deleting from {self.output_name}") from None

    @contextlib.contextmanager
    def _explaining_writes(self, key: str) -> Iterator[None]:
        try:
            yield
            self._has_written = True
        except (ClientError, BotoCoreError, boto3.exceptions.S3UploadFailedError) as error:
            # upload_fileobj wraps the error that says what happened.
            cause = error.__context__ if isinstance(error, boto3.exceptions.S3UploadFailedError) else error
            if isinstance(cause, Exception):
                self._refuse_to_write_on(cause)
            raise ObjectFailed("store_failed", f"S3: {error}", permanent=False) from None

    def _refuse_to_write_on(self, error: Exception) -> None:
        """Raise RunStopped for an error that would meet every output, before the next one is paid for."""
        if is_refusal(error):
            raise refused(error, f"writing to {self.output_name}")
        code = error_code(error)
        # Where others can be written, it is about this one.
        if not self._has_written and (code in REFUSED_OPTIONS or code.startswith("KMS.")):
            raise RunStopped(
                redacted(f"S3 does not take outputs as they are to be written: {error}"),
                "correct s3.storage_class, s3.sse, s3.sse_kms_key_id or s3.acl, and run it again",
            )


UNSEEN = {"unseen": "403"}  # in place of the metadata of an object that this run may not look at


class BadListing(Exception):
    """An answer that is not a page of a listing. boto3 is asked instead; if it has none either, the listing ends."""


# An entry of a page of XML: these elements come in this order everywhere, on some servers with others in between.
# Nothing goes beyond the entry: one that lacks something would be sought in all the others.
BETWEEN = r"\s*(?:<(?!/Contents>)[^>]*>[^<]*)*?"
ENTRY = re.compile(
    rf"<Contents>\s*<Key>([^<]*)</Key>{BETWEEN}<LastModified>([^<]*)</LastModified>{BETWEEN}"
    rf'<ETag>(?:W/)?"?([^<"]*)"?</ETag>{BETWEEN}<Size>(\d+)</Size>({BETWEEN})</Contents>'
)
# Ceph says where a page ends by a key, which may have characters that no parser takes.
PLACE = re.compile(r"<(NextContinuationToken|ContinuationToken|StartAfter)>([^<]*)</\1>")


def parse_page(xml: bytes) -> Page:
    """A page from S3's XML. Raises BadListing if it is not whole, or is something else.

    One expression takes the entries out, at a fifth of what a parser's tree of them costs; the rest is parsed.
    """
    try:
        text = xml.decode().replace("&quot;", '"').replace("&#34;", '"')
        entries = ENTRY.findall(text)
        before, _, behind = text.partition("<Contents>")
        # Without its namespace every name is as the documentation has it.
        frame = re.sub(r' xmlns="[^"]*"', "", before + behind.rpartition("</Contents>")[2], count=1)
        places = dict(PLACE.findall(frame))
        root = ElementTree.fromstring(PLACE.sub("", frame))
        count = int(root.findtext("KeyCount", "-1"))
    except (ElementTree.ParseError, ValueError) as error:
        raise BadListing(str(error)) from None
    folders = [entry.findtext("Prefix", "") for entry in root.findall("CommonPrefixes")]
    # XML Schema has two words for each, and lets white space stand around them.
    truncated = {"1": "true", "0": "false"}.get(said := root.findtext("IsTruncated", "").strip().lower(), said)
    token = unescaped(places.get("NextContinuationToken", ""))
    # What does not add up is no page: a listing that ends early would leave objects out, unnoticed.
    is_whole = count in {-1, len(entries) + len(folders)} and root.find("Contents") is None
    is_whole &= text.count("<Contents>") == text.count("</Contents") == len(entries)
    is_whole &= root.tag == "ListBucketResult" and text.count("<CommonPrefixes>") == len(folders)
    if not is_whole or truncated not in {"true", "false"}:
        raise BadListing(root.tag)
    # XML cannot carry every character that a key may have.
    decode = urllib.parse.unquote_plus if root.findtext("EncodingType") == "url" else str
    return page_of(parsed_objects(entries, decode), list(map(decode, folders)), token, is_truncated=truncated == "true")


def page_of(objects: list[S3Object], folders: list[str], token: str, *, is_truncated: bool) -> Page:
    """A page of these. Raises BadListing if there is more, and nothing from which to go on."""
    if is_truncated and not token and not objects:
        raise BadListing("a page says that there is more, and has neither a key nor a token to go on from")
    return Page(objects, folders, token if is_truncated else "", is_truncated)


def parsed_objects(entries: Sequence[tuple[str, ...]], decode: Callable[[str], str]) -> list[S3Object]:
    """The objects of what ENTRY has found in a page."""
    if not entries:
        return []
    keys, dates, etags, sizes, others = zip(*entries, strict=True)
    if re.search("[&%+]", "\n".join(keys)):
        keys = tuple(decode(unescaped(key)) for key in keys)
    return list(map(S3Object, keys, etags, map(int, sizes), dates, [is_archived(other) for other in others]))


def unescaped(text: str) -> str:
    """XML's text without its escapes, which are others than HTML's. Raises BadListing."""
    if "&" not in text:
        return text
    # No parser takes a reference to a control character, but Ceph writes it.
    pieces = re.split("&#x([01]?[0-9A-Fa-f]);", text)
    try:
        plain = [ElementTree.fromstring(f"<t>{piece}</t>").text or "" for piece in pieces[::2]]
    except ElementTree.ParseError as error:
        raise BadListing(str(error)) from None
    control = [chr(int(code, 16)) for code in pieces[1::2]]
    return "".join(part for pair in zip(plain, [*control, ""], strict=True) for part in pair)


def is_archived(entry: str) -> bool:
    """Whether the end of an entry is that of an object that cannot be read."""
    if ">GLACIER<" not in entry and ">DEEP_ARCHIVE<" not in entry:
        return False
    return "<RestoreExpiryDate>" not in entry or "<IsRestoreInProgress>true<" in entry


def page_of_reply(reply: Any) -> Page:
    """A page as boto3 has parsed it. Raises BadListing if it is none, or none to go on from."""
    # boto3 takes any XML, a web page too, for a page without keys.
    if "IsTruncated" not in reply:
        raise BadListing("a page does not say whether it is the last")
    objects = [listed_object(line) for line in reply.get("Contents", [])]
    folders = [entry["Prefix"] for entry in reply.get("CommonPrefixes", [])]
    return page_of(
        objects,
        folders,
        reply.get("NextContinuationToken") or "",
        is_truncated=reply["IsTruncated"] or "NextContinuationToken" in reply,
    )


def listed_object(line: Any) -> S3Object:
    """One entry of a page that boto3 has parsed."""
    # Restored objects can be read until the restored copy expires, whatever their storage class says.
    restore = line.get("RestoreStatus", {})
    restored = bool(restore.get("RestoreExpiryDate")) and not restore.get("IsRestoreInProgress")
    archived = line.get("StorageClass") in ARCHIVE_CLASSES and not restored
    return S3Object(line["Key"], plain_etag(line), line["Size"], line["LastModified"].isoformat(), archived)


def plain_etag(reply: Any) -> str:
    """The ETag that boto3 has found, without quotes and without the mark of a weak one; empty if there is none."""
    return str(reply.get("ETag", "")).removeprefix("W/").strip('"')


def headed_object(key: str, head: Any) -> S3Object:
    """What the answer to a HEAD says of an object."""
    restored = 'ongoing-request="false"' in head.get("Restore", "")
    archived = head.get("StorageClass") in ARCHIVE_CLASSES and not restored
    return S3Object(key, plain_etag(head), head["ContentLength"], head["LastModified"].isoformat(), archived)


def ascii_only(told: Mapping[str, Any]) -> dict[str, str]:
    """The entries that can be sent: boto3 does not sign others as it sends them, and S3 refuses the request."""
    return {name: value for name, value in told.items() if isinstance(value, str) and value and value.isascii()}


def kept_of_source(told: Mapping[str, Any], target: str) -> dict[str, str]:
    """What a copy says of itself: what its source says; only a type that says nothing gives way to the target's."""
    names = ("ContentType", "ContentEncoding", "ContentDisposition", "ContentLanguage", "CacheControl")
    kept = ascii_only({name: told.get(name) for name in names})
    is_typed = plain_type(kept.get("ContentType", "")) not in GENERIC_TYPES
    return kept if is_typed else {**kept, "ContentType": media_type_of(target)}


def packing_of(encoding: str) -> str:
    """What a Content-Encoding says that the bytes are packed with; empty if that is nothing that compresses them."""
    codings = [coding.strip().lower() for coding in encoding.split(",")]
    # Others are about the transport (aws-chunked), or no codings at all (identity, utf-8).
    return ", ".join(coding for coding in codings if coding.removeprefix("x-") in PACKINGS)


def unpacked(packed: IO[bytes], coding: str, most: int) -> tuple[IO[bytes], int]:
    """A temporary file with the unpacked bytes, and their number, which nobody knows before.

    Raises ObjectFailed if they cannot be had, or are more than `most`.
    """
    said = f"its Content-Encoding is {coding}, and it cannot be unpacked"
    with contextlib.closing(packed), contextlib.ExitStack() as on_failure:
        if coding.removeprefix("x-") != "gzip":
            raise ObjectFailed("source_unreadable", f"{said} here; store it as it is, or in gzip", permanent=True)
        plain = on_failure.enter_context(temporary_file())
        try:
            size = unzipped_into(plain, packed, most)
        except BotoCoreError as error:
            broken = f"reading the source broke off: {type(error).__name__}"
            raise ObjectFailed("network", broken, permanent=False) from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            # One that ends early may have been cut on the way.
            is_damaged = not isinstance(error, EOFError)
            raise ObjectFailed("source_unreadable", f"{said}: {error}", permanent=is_damaged) from None
        on_failure.pop_all()
    return plain, size


def unzipped_into(plain: IO[bytes], packed: IO[bytes], most: int) -> int:
    """Write what is packed with gzip into a file, which is then at its start, and return the length of it."""
    pieces = iter(functools.partial(gzip.GzipFile(fileobj=packed).read, CHUNK_BYTES), b"")
    size = 0
    for piece in pieces:
        with no_space_stops_the_run():
            size += plain.write(piece)
        if size > most:
            raise ObjectFailed(
                "too_large", f"unpacked, it has more than {most} bytes; see api.max_size", permanent=True
            )
    plain.seek(0)
    return size


def is_made_of(metadata: Mapping[str, str], bucket: str, key: str) -> bool:
    """Whether an object is an output of this source. Those of older versions of the program name no bucket."""
    theirs = metadata.get("source-bucket", urllib.parse.quote(bucket))
    return source_key_metadata(key).items() <= metadata.items() and theirs == urllib.parse.quote(bucket)


def source_key_metadata(key: str) -> dict[str, str]:
    """The metadata that names an output's source; a key too long for S3's 2 KB of metadata is named by its digest."""
    quoted = urllib.parse.quote(key, safe="/")
    if len(quoted) > METADATA_KEY_BYTES:
        return {"source-key-sha256": hashlib.sha256(key.encode()).hexdigest()}
    return {"source-key": quoted}


########################################################################################################################
# Keys. From a file instead of a listing: plain keys, an S3 Inventory, or a failures file, told apart by what is in it.
#   - The file is read as a stream. It is the caller's to ask `Bucket.current` for the version of an object that is not
#     done yet: a plain key has none, and an inventory is a day old.
#   - A file that is cut or damaged ends the run as a broken listing does: its rest must not look like done.
########################################################################################################################

INVENTORY_ROW = re.compile(r'"[^"]+","[^"]*"(,"|$)')
INVENTORY_MANIFEST = re.compile(r'"(sourceBucket|fileFormat|fileSchema)"\s*:')
KEYS_HINT = "give keys, one a line in UTF-8; an S3 Inventory in CSV, best its manifest.json; or a failures file"


class Manifest(NamedTuple):
    """What an S3 Inventory says of itself."""

    columns: list[str]
    files: list[tuple[str, str]]  # key in the destination bucket, MD5 in hex
    destination: str  # bucket


def keys_from(source: str, bucket: Bucket) -> Iterator[list[S3Object]]:
    """The objects that a file names, in pages without duplicates; without ETag, size and date where it has only keys.

    `source` is a path, `-` for stdin, or `s3://bucket/key`. Raises UserError for what is wrong with the file, and
    RunStopped once a page is out.
    """
    has_begun = False
    try:
        with opened_lines(source, bucket) as lines:
            objects = objects_named(lines, source, bucket)
            while page := {named.key: named for named in itertools.islice(objects, PAGE_KEYS)}:
                yield list(page.values())
                has_begun = True
    except UserError as error:
        if has_begun:
            raise RunStopped(error.message, error.hint) from None
        raise


@contextlib.contextmanager
def opened_lines(name: str, bucket: Bucket, md5: str = "") -> Iterator[Iterator[str]]:
    """The lines of a file, unpacked if it is gz. Raises UserError if it cannot be read or has another MD5."""
    try:
        with opened_bytes(name, bucket) as file:
            if md5 and md5_of(file) != md5:
                raise UserError(f"{name} is damaged: its MD5 is not the manifest's", "copy it again from its bucket")
            if cast(io.BufferedReader, file).peek(2)[:2] == b"\x1f\x8b":
                unpacked = cast(io.RawIOBase, gzip.GzipFile(fileobj=file))
                yield text_lines(io.BufferedReader(unpacked), name, None)
            else:
                yield text_lines(file, name, size_of(file))
    except (OSError, EOFError, zlib.error) as problem:
        what = getattr(problem, "strerror", None) or problem
        raise UserError(f"{name} cannot be read: {what}", "check that the file is there and whole") from None


def opened_bytes(name: str, bucket: Bucket) -> contextlib.AbstractContextManager[IO[bytes]]:
    """A file, stdin, or a copy of an object. Raises OSError, or RunStopped if S3 refuses."""
    if name == "-":
        if sys.stdin is None:
            raise UserError("stdin is closed", "pipe keys into it, or give a file")
        return contextlib.nullcontext(sys.stdin.buffer)
    if name.startswith("s3://"):
        return bucket.fetched(name)
    return Path(name).open("rb")


def md5_of(file: IO[bytes]) -> str:
    """The MD5 of a file in hex; it can then be read from its beginning."""
    # Before the first line is taken: from a damaged file nothing is converted.
    digest = hashlib.md5(usedforsecurity=False)
    while block := file.read(CHUNK_BYTES):
        digest.update(block)
    file.seek(0)
    return digest.hexdigest()


def size_of(file: IO[bytes]) -> int | None:
    """The bytes in a regular file; None for a pipe."""
    status = os.fstat(file.fileno())
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def text_lines(file: IO[bytes], name: str, size: int | None) -> Iterator[str]:
    """The lines of the first `size` bytes, without their ends. Raises UserError with the number of a bad one."""
    # Not to the file's end: this very run may be appending its failures to it.
    left = sys.maxsize if size is None else size
    number = 0
    while left > 0 and (line := file.readline(LINE_BYTES)):
        number += 1
        left -= len(line)
        if len(line) == LINE_BYTES:
            raise bad_line(name, number, "is too long")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise bad_line(name, number, "is not UTF-8") from None
        yield text.removesuffix("\n").removesuffix("\r")


def bad_line(name: str, number: int, what: str) -> UserError:
    """The error for a line of a file."""
    return UserError(f"{name}: line {number} {what}", KEYS_HINT)


def objects_named(lines: Iterator[str], name: str, bucket: Bucket) -> Iterator[S3Object]:
    """The objects that the lines of a file name, whatever its form. Raises UserError."""
    # A manifest's own names stand in its first lines.
    head = list(itertools.islice(lines, 8))
    first = head[0] if head else ""
    lines = itertools.chain(head, lines)
    if first.lstrip().startswith("{") and INVENTORY_MANIFEST.search("\n".join(head)):
        return inventory_objects(read_manifest("\n".join(lines), name, bucket.name), name, bucket)
    if INVENTORY_ROW.match(first):
        return row_objects(lines, name, ["Bucket", "Key"], bucket.name)
    if is_failure_line(first):
        return failed_objects(lines, name, bucket.name)
    # Names of files decide nothing, but such a file hardly holds plain keys: each would be missed in the bucket.
    if first and name.lower().removesuffix(".gz").endswith((".csv", ".json", ".jsonl")):
        raise bad_line(name, 1, 'is not what is expected there: "bucket","key",... as S3 Inventory writes it, or JSON')
    return (named_object(line, name, number) for number, line in enumerate(lines, 1) if line)


def named_object(key: str, name: str, number: int) -> S3Object:
    """An object of which only the key is known. Raises UserError if it cannot be a key."""
    if not 0 < len(key.encode()) <= S3_KEY_BYTES:
        raise bad_line(name, number, f"is no key: S3 allows 1 to {S3_KEY_BYTES} bytes")
    return S3Object(key, "", 0, "")


def is_failure_line(line: str) -> bool:
    """Whether it is a line of a failures file."""
    try:
        return bool({"bucket", "key"} <= json.loads(line).keys())
    except (ValueError, AttributeError, RecursionError):
        return False


def failed_objects(lines: Iterable[str], name: str, bucket: str) -> Iterator[S3Object]:
    """The objects of this bucket in a failures file. Raises UserError."""
    for number, line in filter(operator.itemgetter(1), enumerate(lines, 1)):
        try:
            failure = json.loads(line)
            if failure["bucket"] == bucket:
                yield named_object(str(failure["key"]), name, number)
        except (ValueError, LookupError, TypeError, RecursionError):
            raise bad_line(
                name, number, 'is no JSON with "bucket" and "key", as the first line is; remove it'
            ) from None


def read_manifest(text: str, name: str, bucket: str) -> Manifest:
    """The manifest of an inventory of `bucket` in CSV. Raises UserError if it is anything else."""
    try:
        content = json.loads(text)
        source, file_format = content["sourceBucket"], content["fileFormat"]
        columns = [column.strip() for column in content["fileSchema"].split(",")]
        files = [(file["key"], file.get("MD5checksum", "")) for file in content["files"]]
        destination = content["destinationBucket"].rpartition(":")[2]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{name} is no whole manifest.json of S3 Inventory", "copy it again from its bucket") from None
    if file_format != "CSV":
        raise UserError(f"{name} is an inventory in {file_format}", "set the format of the S3 Inventory to CSV")
    if source != bucket:
        raise UserError(f"{name} is an inventory of the bucket {source}, not of {bucket}", "correct s3.bucket or FILE")
    if not {"Bucket", "Key"} <= set(columns):
        raise UserError(f"{name} has no columns Bucket and Key", "give the manifest as S3 Inventory wrote it")
    return Manifest(columns, files, destination)


def inventory_objects(manifest: Manifest, name: str, bucket: Bucket) -> Iterator[S3Object]:
    """The objects of an inventory, in the order of its files. Raises UserError."""
    for key, md5 in manifest.files:
        place = local_copy(name, key) or f"s3://{manifest.destination}/{key}"
        with opened_lines(place, bucket, md5) as lines:
            yield from row_objects(lines, place, manifest.columns, bucket.name)


def local_copy(manifest: str, key: str) -> str:
    """Where a file of an inventory lies beside its manifest; empty if it does not."""
    # A copy begins at any folder of the bucket: the files lie in a folder beside the manifest's, or below it.
    parts = key.split("/")
    here = Path(manifest).absolute().parent
    ends = ["/".join(parts[start:]) for start in range(len(parts))]
    places = (folder / end for folder in (here, here.parent) for end in ends if end)
    return next((str(place) for place in places if place.is_file()), "")


def row_objects(lines: Iterable[str], name: str, columns: Sequence[str], bucket: str) -> Iterator[S3Object]:
    """The newest versions in the rows of an inventory; columns beyond those named are not read. Raises UserError."""
    rows = csv.reader(lines, strict=True)
    try:
        for row in filter(None, rows):
            if len(row) < len(columns):
                raise bad_line(name, rows.line_num, f"has fewer columns than {', '.join(columns)}")
            cells = dict(zip(columns, row, strict=False))
            if cells["Bucket"] != bucket:
                raise bad_line(name, rows.line_num, f"is of the bucket {cells['Bucket']}, not of {bucket}")
            if cells.get("IsLatest") != "false" and cells.get("IsDeleteMarker") != "true":
                yield row_object(cells, name, rows.line_num)
    except (csv.Error, ValueError) as problem:
        raise bad_line(name, rows.line_num, f"cannot be read: {problem}") from None


def row_object(cells: Mapping[str, str], name: str, number: int) -> S3Object:
    """The object of a row; a plain key where columns are missing. Raises ValueError, or UserError for a bad key."""
    # S3 writes a space as + and a plus as %2B there. Without "strict", broken UTF-8 would become another key.
    named = named_object(urllib.parse.unquote_plus(cells["Key"], errors="strict"), name, number)
    if not all(cells.get(column) for column in ("ETag", "Size", "LastModifiedDate")):
        return named
    return named._replace(
        etag=cells["ETag"].strip('"'),
        size=int(cells["Size"]),
        last_modified=cells["LastModifiedDate"],
        archived=cells.get("StorageClass") in ARCHIVE_CLASSES,
    )


########################################################################################################################
# Pace. One pace for all workers of all processes, kept by the feeder: it takes a slot for each object, and what a
# worker sends beside that (a retry, a poll) is taken off the next slots. A pause that one worker hears of is for all.
#   - The rate is the smaller of what the user allows and what the API says it allows; unknown, there is none until a
#     429 lets it be guessed. A guess grows until the next 429: others' requests may have been to blame for the last.
#   - Slots are evenly spaced: a burst at the start of a minute would end in 429s at its end.
#   - Each process has a Gate, which its workers ask and tell; the Pacer is in the parent alone.
########################################################################################################################


class Pacer:
    """Spreads requests evenly over time. Safe to use from several threads. `parts`: runs that share the limit."""

    def __init__(self, requests_per_minute: int | None, parts: int = 1) -> None:
        self._cap, self._parts = requests_per_minute, parts
        self._lock = threading.Lock()
        self._interval = 60 * parts / requests_per_minute if requests_per_minute else 0.0
        self._guessed_at: float | None = None  # monotonic seconds; None: the interval is no guess
        # How much slower than that, as a share; a 429 raises it, time brings it back.
        self._excess, self._slowed_at = 0.0, 0.0
        self._next = 0.0
        self.paused_until = 0.0  # monotonic seconds
        self._is_first = True
        self._has_answer = threading.Event()
        # While the limit is unknown: when slots were taken, so that a 429 says how many were too many.
        self._taken: deque[float] = deque(maxlen=SLOTS_REMEMBERED)

    def take(self, stop: StopFlag) -> None:
        """Wait for the next slot. Raises Interrupted when the run is to end.

        Where the user sets no rate, the second slot comes after the first answer, which says what the API allows.
        """
        if not self._is_first and self._cap is None:
            self._wait_for_an_answer(stop)
        self._is_first = False
        stop.sleep(max(0.0, self._next_slot() - time.monotonic()))

    def _wait_for_an_answer(self, stop: StopFlag) -> None:
        patience = time.monotonic() + FIRST_ANSWER_SECONDS
        while not (self._has_answer.is_set() or stop.requested) and time.monotonic() < patience:
            self._has_answer.wait(0.05)
        # An API that takes its time has no say in when the others start.
        self.let_others_start()

    def let_others_start(self) -> None:
        """Hold the second slot back no longer: the API has answered, or the first object is settled without."""
        self._has_answer.set()

    def hear(self, heard: Heard) -> None:
        """Heed what a worker has heard."""
        self.let_others_start()
        with self._lock:
            if heard.limit:
                allowed = min(heard.limit, self._cap or heard.limit)
                self._interval, self._guessed_at = 60 * self._parts / (allowed * SHARE_OF_LIMIT), None
                # The slot before the first answer counts as well: of many shards, each has one.
                self._next = max(self._next, (self._taken or [0.0])[-1] + self._interval)
            if heard.throttled_seconds:
                self._slow_down(heard.throttled_seconds, time.monotonic())
        for _ in range(heard.slots):
            self._next_slot()

    def _next_slot(self) -> float:
        """Use up the next slot; its time in monotonic seconds."""
        with self._lock:
            now = time.monotonic()
            slot = max(self._next, now)
            if not self._interval:
                self._taken.append(slot)
            self._next = slot + self._interval_at(now) * (1 + self._excess_at(now))
        return slot

    def _interval_at(self, now: float) -> float:
        grown = max(0.0, now - self._guessed_at) if self._guessed_at is not None else 0.0
        return self._interval * math.pow(0.5, grown / SECONDS_TO_DOUBLE_GUESS)

    def _excess_at(self, now: float) -> float:
        return self._excess * math.pow(0.5, (now - self._slowed_at) / SECONDS_TO_RECOVER_HALF)

    def _slow_down(self, seconds: float, now: float) -> None:
        # Many workers hear of one and the same limit: only the first slows the pace down.
        if now >= self.paused_until:
            if not self._interval or self._guessed_at is not None:
                self._interval, self._guessed_at = self._guess(now), now + seconds
            self._excess, self._slowed_at = min(self._excess_at(now) * 1.25 + 0.1, MOST_EXCESS), now
        self.paused_until = max(self.paused_until, now + seconds)
        self._next = max(self._next, self.paused_until)

    def _guess(self, now: float) -> float:
        """The interval that a 429 lets be guessed: as many as there were within a minute were too many."""
        if self._interval:
            return self._interval_at(now) * 1.25
        recent = sum(taken > now - 60 for taken in self._taken)
        return 60 / max(recent, SMALLEST_LIMIT / self._parts)


class Gate:
    """The pace as the workers of one process see it. Safe to use from several threads.

    `tell_asking`: where a worker process says of each request that it is about to be sent.
    """

    def __init__(self, tell: Callable[[Heard], None], tell_asking: Callable[[Asking], None] = lambda _: None) -> None:
        self._tell, self._tell_asking = tell, tell_asking
        self._closed_until = 0.0
        self._limit: int | None = None  # as last told; None before the first answer
        self._lock = threading.Lock()
        self.requests = 0  # sent by this process and those that it has started, whether or not they are answered

    def close(self, until: float) -> None:
        """Let nobody through before a time in monotonic seconds, which all processes of a machine share."""
        self._closed_until = max(self._closed_until, until)

    def wait(self, stop: StopFlag) -> None:
        """Wait until it is open. Raises Interrupted when the run is to end."""
        while self._closed_until > time.monotonic():
            stop.sleep(self._closed_until - time.monotonic())

    def count(self, exchange: Exchange) -> None:
        """Note that a request of any kind is about to be sent."""
        exchange.requests += 1
        self.note_asking()
        self._tell_asking(Asking())

    def note_asking(self) -> None:
        """Count one request of this process, or of one that it has started."""
        with self._lock:
            self.requests += 1

    def spend(self) -> None:
        """Say that a request is sent for which the feeder has made no room."""
        self._tell(Heard(slots=1))

    def throttled(self, seconds: float) -> None:
        """Let nobody send for a while: the limit is the key's, and when one worker meets it, all have met it."""
        self.close(time.monotonic() + seconds)
        self._tell(Heard(throttled_seconds=seconds))

    def learn(self, headers: Mapping[str, str], now: float) -> None:
        """Take the limit per minute from an answer's headers; those of a replay may be a day old and do not count."""
        limit, reset = headers.get("X-RateLimit-Limit", ""), headers.get("X-RateLimit-Reset", "")
        is_told = limit.isdigit() and reset.isdigit() and int(reset) >= now
        heard = int(limit) if is_told else self._limit or 0
        if heard != self._limit:
            self._limit = heard
            self._tell(Heard(limit=heard))


########################################################################################################################
# Service. The API client: one Session per worker, one retry policy, bodies streamed in both directions. The API key
# goes to the API's own address only, and no redirect is followed.
#   - A request is repeated only with the same idempotency key and the same bytes: the API then answers from memory.
#   - Another body has another key, derived from the first: `:u` for bytes in place of a URL, `:2` for a key that was
#     taken, `:j` for a job. None is drawn by chance, so that a run after a crash comes to the same answer.
#   - An answer is stored only after it is whole and judged; until then it is in memory or in a temporary file.
########################################################################################################################


class UrlTrust:
    """Whether the API takes presigned URLs, learned from its first replies: only its S3 guide says so.

    Written by all workers without a lock: a refusal that is counted too late costs one more attempt, nothing else.
    `tell`: where a worker process says what it has heard.
    """

    REFUSALS_NEEDED = 3

    def __init__(self, tell: Callable[[Heard], None] = lambda _: None) -> None:
        self.has_accepted, self._refused, self._tell = False, 0, tell

    def accepted(self) -> None:
        """One URL was taken: later refusals are about their object."""
        if not self.has_accepted:
            self.has_accepted = True
            self._tell(Heard(url_taken=True))

    def refused(self) -> None:
        """One URL was refused, and the same object's bytes were taken."""
        self._refused += 1
        self._tell(Heard(url_taken=False))

    def hear(self, heard: Heard) -> None:
        """Heed what a worker process has heard."""
        if heard.url_taken is not None:
            (self.accepted if heard.url_taken else self.refused)()

    @property
    def is_lost(self) -> bool:
        """Whether to upload from now on."""
        return not self.has_accepted and self._refused >= self.REFUSALS_NEEDED


@dataclass(frozen=True)
class Shared:
    """What all workers of a process share."""

    settings: Settings
    stop: StopFlag
    gate: Gate
    bucket: Bucket
    url_trust: UrlTrust
    tell: Callable[["Note"], None]  # the recorder, or the way to it
    note: Callable[[InFlight], None]  # returns when it is in the journal; raises RunStopped where it cannot be
    reach: Reach = field(default_factory=lambda: Reach("the API"))


class RetryPolicy(Retry):
    """The one retry policy: which reply means what, how long to wait, when to give up.

    It never changes; `increment` returns the next one, or raises ObjectFailed or RunStopped. `total` is the number of
    transient failures left. Waiting for 429, 409 and a connection leaves it alone, but `deadline` (monotonic seconds)
    holds. `judge` says what a reply means; `is_elsewhere`: it is that of a download host, which speaks for nobody but
    itself.
    """

    OWN = ("shared", "exchange", "deadline", "judge", "is_elsewhere", "is_unsent", "attempt", "wait_seconds")

    def __init__(self, total: Any, *, shared: Shared, exchange: Exchange, deadline: float, **more: Any) -> None:
        self.shared, self.exchange, self.deadline = shared, exchange, deadline
        self.judge: Callable[[int, str], Verdict] = more.pop("judge", judge_reply)
        self.is_elsewhere: bool = more.pop("is_elsewhere", False)
        self.is_unsent: bool = more.pop("is_unsent", False)  # the last attempt made no connection
        self.attempt: int = more.pop("attempt", 0)
        self.wait_seconds: float = more.pop("wait_seconds", 0.0)
        super().__init__(total, **{**more, "allowed_methods": None, "redirect": False})

    def new(self, **changes: Any) -> "RetryPolicy":
        """A copy with some fields replaced; urllib3 does not know this class's own."""
        return super().new(**{**{name: getattr(self, name) for name in self.OWN}, **changes})

    @property
    def looks_up(self) -> bool:
        """Whether it is for a question after what was asked for before: a job, or its result."""
        return self.judge is not judge_reply

    def is_retry(self, method: str, status_code: int, *_: Any, **__: Any) -> bool:
        """Every reply that is no answer goes to `increment`, which reads its body; most end there."""
        return status_code not in {200, 202}

    def increment(
        self, method: Any = None, url: Any = None, response: Any = None, error: Any = None, *_: Any, **__: Any
    ) -> "RetryPolicy":
        """The policy for the next attempt, after an error reply or a broken exchange."""
        if response is None:
            return self._after_broken_exchange(error)
        if not self.is_elsewhere:
            self.shared.reach.found()
        asked = retry_after_seconds(response.headers.get("Retry-After"), time.time())
        # A refusal may say what the limit is as well.
        if "X-RateLimit-Limit" in response.headers and not self.looks_up:
            self.shared.gate.learn(response.headers, time.time())
        code, message = parse_error(error_body(response))
        verdict = self.judge(response.status, code)
        if response.status == 407 and not proxy_for(self.shared.settings.api.url):
            # Where no proxy is named, it is no proxy's word on all requests.
            verdict = Verdict.REFUSED
        self._note_refusal(response.status, code, verdict)
        if verdict is Verdict.STOP_RUN:
            raise refusal_by_api(response.status, code, message, self.shared.settings.api.url)
        status: int = response.status
        failure = ObjectFailed(
            code or f"http_{status}",
            message,
            # A page of something on the way may not be there tomorrow: only the API knows what it cannot convert.
            permanent=verdict is Verdict.GIVE_UP and bool(code) and not self.exchange.maybe_done,
            status=status,
        )
        self.exchange.timeouts += status == 504
        if verdict in {Verdict.GIVE_UP, Verdict.REFUSED, Verdict.NEW_KEY} or self._is_for_jobs(status, str(url)):
            raise failure
        return self._again(failure, costs_attempt=verdict is Verdict.RETRY or self.is_elsewhere, asked=asked)

    def _note_refusal(self, status: int, code: str, verdict: Verdict) -> None:
        # A 5xx may come from a gateway that lost patience, a 409 says that an earlier attempt is at work, a 429 is said
        # before the key is looked up.
        if self.looks_up or status == 429:
            return
        if verdict in {Verdict.RETRY, Verdict.WAIT}:
            self.exchange.maybe_done = True
        # The API's own word on the object is proof that nothing was made: else it would have repeated that. A gateway's
        # page is none, nor is a word on the account, the address or the key: an earlier attempt may be paid.
        elif verdict is Verdict.GIVE_UP and code:
            self.exchange.maybe_done = False

    def _is_for_jobs(self, status: int, url: str) -> bool:
        may_be_job = url.endswith(CONVERT_PATH) and self.shared.settings.api.jobs_above is not None
        return may_be_job and status == 504 and self.exchange.timeouts == TIMEOUTS_BEFORE_JOBS

    def _after_broken_exchange(self, error: Exception) -> "RetryPolicy":
        if isinstance(error, BadAnswer):
            failure = ObjectFailed(error.code, error.message, permanent=error.permanent, status=200)
            if failure.permanent:
                # The API repeats its answers, so that asking again brings the same.
                self.exchange.maybe_done = False
                raise failure
            return self._again(failure, costs_attempt=True, asked=None)
        failure = ObjectFailed("network", f"{type(error).__name__}: {error}", permanent=False)
        untrusted = certificate_problem(error)
        if untrusted and self.is_elsewhere:
            raise failure
        if untrusted:
            raise RunStopped(
                f"the API's certificate is not trusted: {untrusted}",
                "for a private CA, set REQUESTS_CA_BUNDLE to its file; else check api.url and this machine's clock",
            )
        is_unsent = never_sent(error)
        # Else it may have done the work.
        if not is_unsent:
            self.exchange.maybe_done = True
        # Before the first answer, TLS that fails is a wrong address as well; after it, a connection that broke.
        is_mute = isinstance(error, urllib3.exceptions.SSLError) and not self.shared.reach.has_answered
        if (is_unsent or is_mute) and not self.is_elsewhere:
            return self._without_connection(error)
        return self._again(failure, costs_attempt=True, asked=None)

    def _without_connection(self, error: Exception) -> "RetryPolicy":
        """Wait for a connection: what all objects need, none is to blame for."""
        if self.shared.reach.may_come_back():
            return self.new(attempt=self.attempt + 1, wait_seconds=outage_pause(self.attempt), is_unsent=True)
        # A proxy that says no will not say yes to the next object.
        is_refused = "Tunnel connection failed: 4" in str(error)
        if is_refused or self.shared.reach.has_answered or not self.total:
            raise api_unreachable(self.shared.settings.api.url, error)
        failure = ObjectFailed("network", str(error), permanent=False)
        return self._again(failure, costs_attempt=True, asked=None, is_unsent=True)

    def _again(
        self, failure: ObjectFailed, *, costs_attempt: bool, asked: float | None, is_unsent: bool = False
    ) -> "RetryPolicy":
        left = cast(int, self.total) - costs_attempt
        seconds = seconds_to_wait(self.attempt, asked, random.random())
        is_late = time.monotonic() + seconds > self.deadline
        if failure.status == 429 and not self.is_elsewhere:
            self.exchange.throttled += 1
            self.shared.gate.throttled(seconds)
            # A job's deadline may be over soon after the first of them.
            if is_late and not self.looks_up:
                raise RunStopped(
                    f"the API has answered 429 for {WAIT_DEADLINE_SECONDS // 60} minutes",
                    "run it again later, or set a lower api.requests_per_minute",
                )
        if left < 0 or is_late:
            raise failure
        return self.new(total=left, attempt=self.attempt + 1, wait_seconds=seconds, is_unsent=is_unsent)

    def sleep(self, response: Any = None) -> None:
        """Wait before the next attempt. Raises Interrupted at once when the run is to end."""
        self.shared.stop.sleep(self.wait_seconds)
        self.shared.gate.wait(self.shared.stop)
        # What was not sent has its place in the pace still.
        if not self.is_unsent:
            self.shared.gate.spend()
        self.shared.gate.count(self.exchange)
        # From here on an answer may be a replay of one that was made before.
        self.exchange.replayed = self.exchange.maybe_done


def error_body(response: urllib3.BaseHTTPResponse) -> bytes:
    """The beginning of an error reply's body; empty if it cannot be read."""
    try:
        return response.read(ERROR_BODY_BYTES, decode_content=True)
    except (urllib3.exceptions.HTTPError, OSError):
        return b""
    finally:
        response.close()


def refusal_by_api(status: int, code: str, message: str, address: str = "") -> RunStopped:
    """The end of the run for a reply that every object would get."""
    said = f"{status} {'' if code == f'http_{status}' else code} {message}"
    said = " ".join(said.split())
    if status == 407:
        return RunStopped(f"the proxy {proxy_for(address)} wants a password: {said}", PROXY_HINT)
    if code == "quota_exceeded" or status == 402:
        return RunStopped(f"the quota is used up: {said}", "run it again next month, or after an upgrade of the plan")
    if status == 401:
        return RunStopped(f"the API refused the key: {said}", "check CTF_API_KEY, api.key or api.key_file")
    if status == 403:
        hint = "check the API key and the plan; where the API gives no code, a proxy on the way may have refused it"
        return RunStopped(f"the API refused the account: {said}", hint)
    return RunStopped(f"the API is not at this address: {said}", "check api.url; redirects are not followed")


@dataclass(frozen=True)
class Call:
    """One request to the API, the same in every byte each time it is sent. `open_file` is None in URL mode."""

    path: str
    idempotency_key: str
    fields: tuple[tuple[str, str], ...]
    filename: str = ""
    open_file: Callable[[], tuple[IO[bytes], int]] | None = None  # the file, and how many bytes it has


class FormBody(io.RawIOBase):
    """The multipart body of a call: form fields, then the file, streamed. Rewinding opens the file anew.

    The file is opened at once, because its length is announced before it is sent; what is sent is counted against that.
    The boundary is derived from the idempotency key, so that a request that is sent again is the same to the byte.
    """

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call, self._parts = call, list[IO[bytes]]()
        self._file: IO[bytes] | None = None
        self._size = self._left = 0  # of the file: as it was announced, and what is not read yet
        fields: list[Any] = list(call.fields)
        if call.open_file:
            # The API goes by the file's name; the usual type is another on a machine with other tables.
            fields.append(("file", (call.filename, b"", "application/octet-stream")))
        boundary = "s3bc-" + call.idempotency_key.replace(":", "-")
        form, self.content_type = encode_multipart_formdata(fields, boundary)
        # The file is the last part and stands here with no bytes: they go before the closing boundary.
        end = len(form) - len(f"\r\n--{boundary}--\r\n") if call.open_file else len(form)
        self._head, self._tail = form[:end], form[end:]
        self._at_start = False
        self.seek(0)
        if call.open_file:
            self._file, self._size = call.open_file()

    def __len__(self) -> int:
        return len(self._head) + self._size + len(self._tail)

    def readable(self) -> bool:
        """It can be read."""
        return True

    def tell(self) -> int:
        """Only the start is a position that can be returned to."""
        return 0 if self._at_start else 1

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go back to the start."""
        if offset or whence:
            raise io.UnsupportedOperation("only the start of the body can be sought")
        if not self._at_start:
            self._close_parts()
            self._parts, self._at_start = [io.BytesIO(self._head), io.BytesIO(self._tail)], True
        return 0

    def read(self, length: int = -1) -> bytes:
        """The next bytes. Raises what opening the file raises; ConnectionError if it breaks off."""
        if self._at_start and self._call.open_file:
            file, size = (self._file, self._size) if self._file else self._call.open_file()
            self._file, self._left = file, self._size
            self._parts.insert(1, file)
            self._refuse_other_length(self._size - size)
        self._at_start = False
        while self._parts:
            piece = self._read_part(length)
            if piece:
                return piece
            self._parts.pop(0).close()
        return b""

    def _read_part(self, length: int) -> bytes:
        try:
            piece = self._parts[0].read(CHUNK_BYTES if length < 0 else length)
        except BotoCoreError as error:
            # An OSError is what urllib3 takes for a broken exchange, and tries again.
            raise ConnectionError(f"reading the source broke off: {type(error).__name__}") from None
        if self._parts[0] is self._file:
            self._left -= len(piece)
            self._refuse_other_length(self._left if self._left < 0 or not piece else 0)
        return piece

    @staticmethod
    def _refuse_other_length(difference: int) -> None:
        # The API would wait for what is missing, and take what is too much for the end of the form.
        if difference:
            raise ConnectionError(f"the source differs from its announced length by {difference} bytes")

    def _close_parts(self) -> None:
        for part in (*self._parts, *([self._file] if self._file else [])):
            part.close()
        self._file = None

    def close(self) -> None:
        """Let go of the file."""
        self._close_parts()
        super().close()


class ConvertClient:
    """The API as one worker sees it."""

    def __init__(self, shared: Shared) -> None:
        self.shared, self._api = shared, shared.settings.api
        # One connection, because a worker does one thing at a time; download hosts have a session of their own, which
        # asks the environment for each of them.
        self._session, self._elsewhere = open_session(self._api.url, 1), requests.Session()
        self._adapter = cast(HTTPAdapter, self._session.get_adapter("https://"))
        for session in (self._session, self._elsewhere):
            mount(session, self._adapter)
            # Without `auth`, requests would take credentials for the host from ~/.netrc and replace the key.
            session.auth = self._authorize
            session.headers.update({"User-Agent": f"s3_bulk_convert/{__version__}", "Accept-Encoding": "identity"})

    def close(self) -> None:
        """Close the connections."""
        self._adapter.close()

    def _is_own(self, address: str) -> bool:
        own, asked = urllib.parse.urlsplit(self._api.url), urllib.parse.urlsplit(address)
        return (own.scheme, own.netloc.lower()) == (asked.scheme, asked.netloc.lower())

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._is_own(str(request.url)):
            request.headers["Authorization"] = f"Bearer {self._api.key}"
        return request

    def convert(self, task: Task, exchange: Exchange) -> Result:
        """Have one object converted. Raises ObjectFailed, RunStopped or Interrupted.

        With a URL first, if the task has one; if that is refused, the bytes are uploaded under a successor key, because
        a refusal in URL mode may be about the URL, and is no proof that the object is bad.
        """
        trust = self.shared.url_trust
        if task.url and not task.may_be_done and trust.is_lost:
            self._turn_to(self._with_bytes(task), exchange)
        try:
            return self._result_of_known_job(task, exchange) or self._send(exchange)
        except ObjectFailed as refusal:
            is_about_url = bool(exchange.request.url) and self._may_be_about_url(refusal)
            if is_about_url and self._api.transfer == "url" and not isinstance(refusal, JobFailed):
                return self._exchange_again(task, exchange)
            # Another body would pay a second time for what may be done.
            if not is_about_url or exchange.may_be_paid or self._api.transfer == "url":
                # The URL of an earlier run may have died with its credentials: the next run signs another one.
                refusal.permanent &= not (is_about_url and task.resumed)
                raise
            # A refusal leaves open what became of what an earlier run sent.
            doubled = task.doubled or task.resumed
            self._turn_to(replace(self._with_bytes(task), doubled=doubled), exchange)
            result = self._send(exchange)
            trust.refused()
            return result

    def _turn_to(self, request: Task, exchange: Exchange) -> None:
        """Go on with another request, once it is in the journal: a run after a crash sends again what was sent last."""
        request = replace(request, doubled=request.is_doubtful, overdue=False)
        request = replace(request, resumed=False, job_id="", sent_at=time.time())
        self.shared.note(InFlight(exchange.task, request))
        if exchange.maybe_done:
            exchange.left_open = exchange.request
        exchange.request, exchange.maybe_done, exchange.replayed = request, False, False

    def _with_bytes(self, task: Task) -> Task:
        # Another body than the URL's needs another key.
        return replace(task, url="", idempotency_key=task.idempotency_key.partition(":")[0] + ":u")

    def _send(self, exchange: Exchange) -> Result:
        result = self._exchange(exchange)
        if exchange.request.url:
            self.shared.url_trust.accepted()
            self.shared.bucket.note_read()
        return result

    def _exchange_again(self, task: Task, exchange: Exchange) -> Result:
        """Send a refused URL once more, now that S3 is seen to serve the object: it may have been away in between."""
        self.shared.bucket.read_source(task, Range="bytes=0-0")["Body"].close()
        try:
            return self._send(exchange)
        except ObjectFailed as refusal:
            # The URL of an earlier run may have died with its credentials: the next run signs another one.
            refusal.permanent &= not (task.resumed and self._may_be_about_url(refusal))
            raise

    def _result_of_known_job(self, task: Task, exchange: Exchange) -> Result | None:
        """What has come of the job that an earlier run has started; None if there is none, or none any more."""
        is_lost = False
        if task.job_id:
            try:
                return self._finish_job(task.job_id, exchange)
            except ObjectFailed as failure:
                is_lost = failure.code == JOB_LOST
                if not (is_lost or (isinstance(failure, JobFailed) and not failure.permanent)):
                    raise
        if exchange.request is task:
            exchange.maybe_done = exchange.replayed = task.resumed
        # Its key is forgotten as well, so that this will be another conversion. Without a job, the feeder noted it.
        if task.overdue and task.job_id:
            exchange.maybe_done = False
            self._turn_to(replace(task, doubled=task.doubled or is_lost, overdue=False), exchange)
        elif task.overdue:
            exchange.request = replace(exchange.request, doubled=True)
        elif exchange.request is task and task.resumed and is_forgotten(task.sent_at):
            # It was no older than that when it was planned, and has waited since. The URL has died with the key.
            exchange.maybe_done = False
            url = task.url and self.shared.bucket.presign(task.key)
            self._turn_to(replace(task, url=url, overdue=True), exchange)
        return None

    def _may_be_about_url(self, failure: ObjectFailed) -> bool:
        if failure.code in {"unsupported_route", "file_too_large"}:
            return False
        if isinstance(failure, JobFailed):
            return failure.permanent
        # A 5xx may come after the work: another body would pay for it a second time. What is said of the account or of
        # the address, no other body would change.
        return 400 <= failure.status < 500 and failure.status not in REFUSALS

    def _form_fields(self, task: Task) -> tuple[tuple[str, str], ...]:
        # Without `source`, a URL's query or an unknown extension would leave the format to be guessed from the bytes.
        named = {"target": task.target, "source": source_format(task.key), "quality": str(task.quality or "")}
        return tuple((name, value) for name, value in named.items() if value)

    def _call(self, task: Task) -> Call:
        fields = self._form_fields(task)
        if task.url:
            return Call(task.path, task.idempotency_key, (*fields, ("file_url", task.url)))
        filename, bucket = upload_filename(task.key), self.shared.bucket
        return Call(task.path, task.idempotency_key, fields, filename, lambda: bucket.open_source(task))

    def _exchange(self, exchange: Exchange) -> Result:
        """Send a request until it is answered; under a successor key if the key is taken, as a job if it is slow."""
        while True:
            try:
                return self._answer(self._call(exchange.request), exchange)
            except ObjectFailed as failure:
                successor = self._successor(failure, exchange)
                if successor is None:
                    # A word on this request says nothing of one that was left open.
                    failure.permanent |= is_about_key(failure)
                    failure.permanent &= exchange.left_open is None
                    raise
            self._turn_to(successor, exchange)

    def _successor(self, failure: ObjectFailed, exchange: Exchange) -> Task | None:
        request = exchange.request
        # Successor keys are derived, not drawn: a run that has lost its checkpoint comes to the same ones.
        successors = re.findall(r":\d+", request.idempotency_key)
        successor = replace(request, idempotency_key=f"{request.idempotency_key}:{len(successors) + 2}")
        if is_about_key(failure):
            # Nobody can ask under this key for what is done under it.
            exchange.maybe_done = False
            exchange.taken_keys += 1
            if exchange.taken_keys <= MOST_TAKEN_KEYS:
                return replace(successor, doubled=True)
            # So many keys are not taken: it is about the file, and nothing was charged.
            exchange.request = replace(request, doubled=exchange.task.is_doubtful)
            return None
        # Under its own key the API would only tell of the same job again (docs/errors: resubmit). Once: an API that
        # loses one job after the other is not to be paid for each of them.
        if failure.code == JOB_LOST and not request.doubled:
            exchange.maybe_done = False
            return replace(successor, doubled=True)
        if len(successors) < MOST_SUCCESSORS - 1 and self._is_worth_another_job(failure, exchange):
            return successor
        if failure.status == 504 and request.path == CONVERT_PATH and self._api.jobs_above is not None:
            return replace(request, path=JOBS_PATH, idempotency_key=request.idempotency_key + ":j", doubled=True)
        return None

    def _is_worth_another_job(self, failure: ObjectFailed, exchange: Exchange) -> bool:
        """Whether a job failed that another one may not fail as; waits before that one, and uses up an attempt."""
        if not isinstance(failure, JobFailed):
            return False
        if failure.is_old or failure.permanent:
            # The answer to an earlier run's request; what is permanent is tried once more if the user wants that.
            return failure.is_old and (self.shared.settings.retry_failed or not failure.permanent)
        exchange.failed_jobs += 1
        if exchange.failed_jobs > self._api.retries:
            return False
        self.shared.stop.sleep(seconds_to_wait(exchange.failed_jobs - 1, None, random.random()))
        self.shared.gate.spend()
        return True

    def _answer(self, call: Call, exchange: Exchange) -> Result:
        exchange.asked_at = time.monotonic()
        deadline = exchange.asked_at + WAIT_DEADLINE_SECONDS
        policy = RetryPolicy(self._api.retries, shared=self.shared, exchange=exchange, deadline=deadline)
        while True:
            response = self._post(call, policy)
            try:
                return self._result_of(response, exchange, deadline)
            except (BadAnswer, urllib3.exceptions.HTTPError, OSError) as error:
                # The policy as it is after the attempts that urllib3 made within this exchange.
                policy = cast(RetryPolicy, response.raw.retries).increment(error=as_bad_answer(error))
            finally:
                response.close()
            policy.sleep()

    def _result_of(self, response: requests.Response, exchange: Exchange, deadline: float) -> Result:
        task = exchange.task
        if response.status_code == 202:
            exchange.request = replace(exchange.request, job_id=job_id_of(response))
            # Known to the journal, it is asked for after a crash, and no large object is sent again.
            self.shared.note(InFlight(task, exchange.request))
            return self._finish_job(exchange.request.job_id, exchange)
        is_json = media_kind(response.headers.get("Content-Type", "")) == "json"
        # What was asked for is the file, not an answer about it.
        if not is_json or canonical(task.target) in JSON_FORMATS:
            return self._receive(response, task.target, deadline)
        link, said_size = download_link(json_body(response))
        if not link:
            raise BadAnswer("json_answer", "the API answered with JSON instead of the file")
        return self._download(link, said_size, task.target, exchange, deadline)

    def _post(self, call: Call, policy: RetryPolicy) -> requests.Response:
        self.shared.gate.wait(self.shared.stop)
        self._adapter.max_retries = policy
        with contextlib.closing(FormBody(call)) as body:
            if not policy.attempt:
                self.shared.gate.count(policy.exchange)
            headers = {"Content-Type": body.content_type, "Idempotency-Key": call.idempotency_key}
            response = self._session.post(
                self._api.url + call.path,
                data=body,
                headers=headers,
                stream=True,
                allow_redirects=False,
                timeout=(CONNECT_TIMEOUT_SECONDS, self._api.timeout),
            )
        self._note_success(response, policy.exchange)
        return response

    def _note_success(self, response: requests.Response, exchange: Exchange) -> None:
        self.shared.reach.found()
        exchange.maybe_done = True
        self.shared.gate.learn(response.headers, time.time())
        remaining = response.headers.get("X-CTF-Remaining", "")
        # A replay has the headers of the first answer, which may be a day old. That the API may have done the work
        # before makes no replay: it may as well have done it, and charged for it, just now.
        asked = time.time() - (time.monotonic() - exchange.asked_at)
        if remaining.isdigit() and not (exchange.replayed and is_older(response.headers, asked)):
            exchange.remaining = int(remaining)
            self._keep_remaining(exchange.remaining)

    def _keep_remaining(self, remaining: int) -> None:
        # Here and not at the recorder's desk: by then this worker would have sent the next one.
        if remaining <= self._api.keep_remaining:
            because = f"{remaining} conversions remain this month, and api.keep_remaining is {self._api.keep_remaining}"
            hint = "run it again next month, or lower api.keep_remaining"
            self.shared.stop.request(Stop(because, hint, is_limit=True))

    def _receive(self, response: requests.Response, target: str, deadline: float) -> Result:
        """The whole body of a 200, judged. Raises BadAnswer; leaves nothing behind."""
        length = response.headers.get("Content-Length", "")
        is_told = length.isdigit() or response.headers.get("Transfer-Encoding", "").lower() == "chunked"
        unpack = Unpacking(response.headers.get("Content-Encoding", "").strip().lower())
        is_small = length.isdigit() and int(length) <= MEMORY_BODY_BYTES
        with contextlib.ExitStack() as on_failure:
            body: IO[bytes] = on_failure.enter_context(io.BytesIO() if is_small else temporary_file())
            received = self._spool(response.raw, body, unpack, deadline)
            # `tell` counts the bytes on the wire, which differ where the body is compressed.
            is_cut = length.isdigit() and response.raw.tell() != int(length)
            if received == 0 or is_cut or not unpack.is_whole:
                raise BadAnswer("cut_answer", f"the answer has {received} bytes, and should have {length or 'some'}")
            head, tail = both_ends(body, received)
            # Where neither length nor chunks say where the body ends, or more has come than they say, a cut one looks
            # like a whole one.
            is_told &= not has_surplus(response)
            if not (is_told or any(is_whole_file(kind, received, head, tail) for kind in (canonical(target), "zip"))):
                raise BadAnswer("no_length", "the answer does not say where it ends")
            disposition = response.headers.get("Content-Disposition", "")
            identity = identify_result(target, response.headers.get("Content-Type", ""), disposition, head)
            on_failure.pop_all()
        return Result(body, received, identity.media_type, identity.suffix)

    def _spool(self, raw: Any, body: IO[bytes], unpack: Unpacking, deadline: float) -> int:
        received = 0
        while True:
            piece = raw.read(unpack.piece_bytes, decode_content=False)
            if not piece:
                return received
            with no_space_stops_the_run():
                received += body.write(unpack(piece))
            if time.monotonic() > deadline:
                raise BadAnswer("slow_answer", "the answer did not end in time")

    def _finish_job(self, job_id: str, exchange: Exchange) -> Result:
        """Wait for a job and fetch its result. An unknown state counts as running (docs/conversions/async)."""
        deadline = time.monotonic() + JOB_DEADLINE_SECONDS
        results_left = 3
        exchange.unknown_polls = 0
        for pause in itertools.chain(JOB_POLL_SECONDS, itertools.repeat(JOB_POLL_SECONDS[-1])):
            self.shared.stop.sleep(pause)
            try:
                result = self._result_of_job(self._poll(job_id, exchange, deadline), exchange, deadline)
                if result:
                    return result
            except BadAnswer as bad:
                results_left -= 1
                exchange.maybe_done &= not bad.permanent
                if bad.permanent or not results_left:
                    raise ObjectFailed(bad.code, bad.message, permanent=bad.permanent, status=200) from None
            if time.monotonic() > deadline:
                break
        raise ObjectFailed("job_not_finished", f"the job {job_id} gave no result in time", permanent=False)

    def _result_of_job(self, job: Mapping[str, Any], exchange: Exchange, deadline: float) -> Result | None:
        """What a job has come to; None while it runs. Raises BadAnswer."""
        if job.get("status") != "completed":
            return None
        link, said_size = download_link(job)
        if not link:
            raise BadAnswer("no_link", "the job is completed, and the API does not say where its result is")
        return self._download(link, said_size, exchange.task.target, exchange, deadline)

    def _poll(self, job_id: str, exchange: Exchange, deadline: float) -> dict[str, Any]:
        """What the API says of a job; empty while it does not know it, which it may only not do yet."""
        self.shared.gate.spend()
        try:
            address = f"{self._api.url}{JOBS_PATH}/{urllib.parse.quote(job_id, safe='')}"
            response = self._get(address, judge_poll, exchange, deadline)
        except ObjectFailed as failure:
            if failure.status in {404, 410} and failure.code == UNKNOWN_TO_API:
                exchange.unknown_polls += 1
                if exchange.unknown_polls < POLLS_BEFORE_LOST:
                    return {}
                raise ObjectFailed(JOB_LOST, f"the API does not know the job {job_id}", permanent=False) from failure
            # Its status is an answer to this question; nobody must take it for one to the request that made the job.
            said = f"asked for the job {job_id}: {failure.code} {failure.message}".rstrip()
            raise ObjectFailed("job_not_finished", said, permanent=False) from failure
        exchange.unknown_polls = 0
        with contextlib.closing(response):
            job = json_body(response)
        if job.get("status") == "failed":
            exchange.maybe_done = False
            age = age_of_job(job, response.headers.get("Date", ""))
            raise job_failure(job, is_old=age > time.monotonic() - exchange.asked_at + ROUNDING_SECONDS)
        return job

    def _get(
        self, address: str, judge: Callable[[int, str], Verdict], exchange: Exchange, deadline: float
    ) -> requests.Response:
        is_own = self._is_own(address)
        policy = RetryPolicy(self._api.retries, shared=self.shared, exchange=exchange, deadline=deadline, judge=judge)
        self._adapter.max_retries = policy.new(is_elsewhere=not is_own)
        timeout = (CONNECT_TIMEOUT_SECONDS, self._api.timeout)
        self.shared.gate.count(exchange)
        session = self._session if is_own else self._elsewhere
        response = session.get(address, stream=True, allow_redirects=False, timeout=timeout)
        if is_own:
            self.shared.reach.found()
        return response

    def _download(self, link: str, said_size: int | None, target: str, exchange: Exchange, deadline: float) -> Result:
        """The file behind a download link. Raises BadAnswer if the link is stale, or the file cut or another one."""
        try:
            # The link may be relative, and may point to another host, which then gets no key.
            response = self._get(urllib.parse.urljoin(self._api.url + "/", link), judge_download, exchange, deadline)
        except (ObjectFailed, urllib3.exceptions.HTTPError, OSError) as problem:
            said = f"{problem.code} {problem.message}" if isinstance(problem, ObjectFailed) else type(problem).__name__
            raise BadAnswer("stale_link", f"the API's link to the file does not work: {said}".rstrip()) from None
        with contextlib.closing(response):
            try:
                result = self._receive(response, target, deadline)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise as_bad_answer(error) from None
        # A whole body of the wrong size is a body of something else.
        if said_size is not None and said_size != result.size:
            result.body.close()
            raise BadAnswer("cut_answer", f"the file has {result.size} bytes, and the API says {said_size}")
        return result


@dataclass(frozen=True)
class Usage:
    """What `/v1/usage` says; None for whatever it does not say. Its fields are documented nowhere."""

    plan: str | None = None
    monthly_limit: int | None = None  # conversions
    remaining: int | None = None  # conversions, this month
    requests_per_minute: int | None = None
    bills_overage: bool | None = None


@contextlib.contextmanager
def asking(address: str, **request: Any) -> Iterator[requests.Response]:
    """The answer to a single GET, unread. Raises UserError with the host alone: an address may be signed."""
    try:
        timeout = (CONNECT_TIMEOUT_SECONDS, LOOK_SECONDS)
        with requests.Session() as session:
            mount(session, Adapter())
            # A redirect would carry the key, or the signature, to somebody else.
            with session.get(address, stream=True, allow_redirects=False, timeout=timeout, **request) as answer:
                yield answer
    except OSError as error:
        host, proxy = urllib.parse.urlsplit(address).netloc, proxy_for(address)
        why = certificate_problem(error) or connection_problem(error)
        if proxy:
            raise UserError(f"{host} cannot be reached through the proxy {proxy}: {why}", PROXY_HINT) from None
        hint = "check its address (api.url, or s3.endpoint_url and s3.region) and the network; "
        hint += "for a private CA, set REQUESTS_CA_BUNDLE (AWS_CA_BUNDLE for S3)"
        raise UserError(f"{host} cannot be reached: {why}", hint) from None


def ask_usage(api: ApiOptions) -> Usage:
    """What the API says of the plan and the month. Raises RunStopped for a refusal, UserError for silence."""

    def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {api.key}"
        return request

    with asking(api.url + USAGE_PATH, auth=authorize) as answer:
        status, limit, body = answer.status_code, answer.headers.get("X-RateLimit-Limit", ""), json_body(answer)
    code, message = parse_error(json.dumps(body).encode())
    # An API that has no such page says nothing of the key.
    if status not in {404, 405} and judge_reply(status, code) in {Verdict.STOP_RUN, Verdict.REFUSED}:
        raise refusal_by_api(status, code, message, api.url)
    # No retry: whoever asks wants to know how it is now.
    if status >= 500 or status == 429:
        raise UserError(f"the API answered {status} {code}".rstrip(), "try it again later")
    usage = read_usage(body)
    return replace(usage, requests_per_minute=usage.requests_per_minute or (int(limit) if limit.isdigit() else None))


# What is no number of conversions, though it may be called a limit.
OTHER_LIMIT = (
    r"size|bytes|[kmg]b\b|storage|second|minute|hour|day|daily|rpm|concurren|rate|request|overage|price|cost|file"
)


def read_usage(body: Mapping[str, Any]) -> Usage:
    """What is known of the plan and the month, whatever the fields are called and however deep they lie."""
    told = dict(flattened(body))
    month = {name: value for name, value in told.items() if not re.search(OTHER_LIMIT, name)}
    limit = first_number(month, r"(limit|quota|included|allowance|per_month|(limits|max)_conversions)$")
    remaining = first_number(month, r"(remaining|left|available)$")
    used = first_number(month, r"(used|usage|count|this_month|^(data_|usage_)*conversions)$")
    if remaining is None and limit is not None and used is not None:
        remaining = max(0, limit - used)
    # A price or a prefix of another field may be called so too: only texts are names, only booleans are answers.
    plans = (value for name, value in told.items() if re.search(r"(^|_)plan(_name|_id|_slug)?$", name))
    billed = (value for name, value in told.items() if "overage" in name and isinstance(value, bool))
    per_minute = r"(per_minute|rpm|rate_?limit(_limit)?)$"
    plan = next((value for value in plans if isinstance(value, str)), None)
    return Usage(plan, limit, remaining, first_number(told, per_minute), next(billed, None))


def flattened(body: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested JSON objects, under the names on the way to them, joined by `_`; those on top first."""
    for name, value in sorted(body.items(), key=lambda pair: isinstance(pair[1], dict)):
        # camelCase is one of the spellings.
        spelt = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name)).lower().replace("-", "_")
        joined = f"{path}_{spelt}".strip("_")
        if isinstance(value, dict):
            yield from flattened(value, joined)
        else:
            yield joined, value


def first_number(told: Mapping[str, Any], pattern: str) -> int | None:
    """The first whole number of 0 or more under a name that ends so; one about conversions comes first."""
    named = [(name, str(value)) for name, value in told.items() if re.search(pattern, name)]
    numbers = [(name, int(value)) for name, value in named if re.fullmatch(r"\d{1,15}", value)]
    return next((number for _, number in sorted(numbers, key=lambda pair: "convers" not in pair[0])), None)


@contextlib.contextmanager
def no_space_stops_the_run() -> Iterator[None]:
    """Raise RunStopped where a temporary file cannot be written: every object would meet that."""
    try:
        yield
    except OSError as problem:
        # Where none can be written at all, there is no name either.
        where = tempfile.tempdir or "a temporary folder"
        raise RunStopped(f"{where} cannot be written: {problem.strerror}", "free some space, or set TMPDIR") from None


def temporary_file() -> IO[bytes]:
    """A file without a name, for a body too large for memory; in TMPDIR."""
    with no_space_stops_the_run():
        return cast(IO[bytes], tempfile.TemporaryFile())


def has_surplus(response: requests.Response) -> bool:
    """Whether more has come on the connection than an answer has announced."""
    return bool(getattr(getattr(response.raw, "_original_response", None), "has_surplus", False))


def both_ends(body: IO[bytes], size: int) -> tuple[bytes, bytes]:
    """The first and the last bytes of a body, by which it is told what it is; it then stands at its start."""
    body.seek(0)
    head = body.read(ERROR_BODY_BYTES)
    body.seek(max(0, size - 64))
    tail = body.read()
    body.seek(0)
    return head, tail


def as_bad_answer(error: Exception) -> BadAnswer:
    """What broke while an answer was read."""
    if isinstance(error, BadAnswer):
        return error
    if isinstance(error, urllib3.exceptions.ReadTimeoutError):
        return BadAnswer("slow_answer", "the answer did not end in time")
    return BadAnswer("cut_answer", f"the answer broke off: {type(error).__name__}")


def json_body(response: requests.Response) -> dict[str, Any]:
    """The JSON object in an answer; empty if there is none."""
    try:
        found = read_json(response.raw.read(ERROR_BODY_BYTES, decode_content=True))
    except (ValueError, RecursionError, urllib3.exceptions.HTTPError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def job_id_of(response: requests.Response) -> str:
    """The id in a 202. Raises BadAnswer if there is none."""
    location = urllib.parse.urlsplit(response.headers.get("Location", "")).path
    job_id = str(json_body(response).get("job_id") or location.rstrip("/").rpartition("/")[2])
    if not job_id:
        raise BadAnswer("no_job_id", "the API accepted a job and did not say which")
    return job_id


def download_link(job: Mapping[str, Any]) -> tuple[str, int | None]:
    """Where a completed job's result lies, and its size in bytes if it is said. Pages disagree on the names."""
    result = job.get("result")
    places = [result if isinstance(result, dict) else {}, job]
    link = next((place[name] for place in places for name in ("file_url", "download_url") if place.get(name)), "")
    said = places[0].get("size")
    return str(link), said if isinstance(said, int) else None


def job_failure(job: Mapping[str, Any], *, is_old: bool) -> JobFailed | RunStopped:
    """What a failed job means. Its `error` may be an object, a text, or absent."""
    code, message = parse_error(json.dumps(dict(job)).encode())
    if code == "quota_exceeded":
        return refusal_by_api(429, code, message)
    is_passing = code in {"service_unavailable", "rate_limited"}
    said = message or "the API says that the job failed"
    return JobFailed(code or "job_failed", said, permanent=not is_passing, is_old=is_old)


########################################################################################################################
# Plan. What is to be done of each page of the listing. The feeder asks it, and so do `--dry-run`, `--why` and the count
# of the total: it changes nothing, and owns nothing that grows with the bucket.
#   - The journal is asked once for each page, job and question, never once for each key.
#   - What it disposes of itself it counts, or tells as an outcome.
########################################################################################################################


class Route(NamedTuple):
    """A job with its filters made ready."""

    job: Job
    wants: Callable[[S3Object], bool]
    own_endings: tuple[str, ...]  # of keys that may be in the target format already, and are skipped if they are


def make_route(job: Job, now: float) -> Route:
    """A job made ready. `now` in Unix seconds."""
    target = canonical(job.options.target)
    same = [target, *(alias for alias, name in FORMAT_ALIASES.items() if name == target)]
    return Route(job, job_filter(job, now), tuple(f".{ext}" for ext in same if job.options.same_format == "skip"))


def skip_reason(source: S3Object, own_prefixes: tuple[str, ...]) -> str:
    """Why no job takes this object, whatever it wants; empty if one may."""
    if source.key.startswith(own_prefixes):
        return OWN_OUTPUT
    if source.key.endswith("/"):
        return FOLDER
    if not source.size:
        return EMPTY
    return ARCHIVED if source.archived else ""


def routes_wanting(source: S3Object, routes: Sequence[Route]) -> Sequence[Route]:
    """The routes that want an object; of those that would make the very same output, one."""
    if len(routes) == 1:
        return routes if routes[0].wants(source) else ()
    return list({route.job.fingerprint: route for route in routes if route.wants(source)}.values())


def select(
    page: Iterable[S3Object],
    routes: Sequence[Route],
    own_prefixes: tuple[str, ...],
    shard: Shard,
    counts: Counter[tuple[str, str]],
) -> Iterator[Candidate]:
    """The objects of a page that jobs want; an object counts as listed once for each job that wants it."""
    is_divided = shard.count > 1
    for source in page:
        reason = skip_reason(source, own_prefixes)
        wanting = () if reason else routes_wanting(source, routes)
        if not wanting and not (is_divided and not shard.owns(source.key)):
            counts["", LISTED] += 1
            counts["", reason or UNMATCHED] += 1
        for route in wanting:
            # All sources that want one output key meet in one shard: two shards would both write it.
            if is_divided and not shard.owns(claim_of(output_key(route.job, source.key))):
                continue
            counts[route.job.name, LISTED] += 1
            if source.key.lower().endswith(route.own_endings) and is_in_target_format(source.key, route.job):
                counts[route.job.name, SAME_FORMAT] += 1
            else:
                yield Candidate(route.job, source)


def is_in_target_format(key: str, job: Job) -> bool:
    """Whether a key's extension names the job's target."""
    return canonical(source_format(key)) == canonical(job.options.target)


def unfinished(
    candidates: Sequence[Candidate], journal: Journal, counts: Counter[tuple[str, str]], *, retry: bool
) -> Iterator[Candidate]:
    """The candidates whose version the journal knows neither as done nor, unless `retry`, as failed for good."""
    states = by_job(candidates, journal.states)
    makers = makers_of(candidates, journal)
    failed = Event.FAILED.value
    for candidate in candidates:
        job, source, _ = candidate
        state = states[job.fingerprint].get(source.key)
        _, etag, event, permanent = state or ("", None, "", 0)
        if etag != source.etag:
            yield candidate._replace(is_known=state is not None)
        elif event == failed:
            tries_again = retry or not permanent
            counts[job.name, RETRIED if tries_again else FAILED_BEFORE] += 1
            if tries_again:
                yield candidate
        elif makers and makers.get(claim_of(output_key(job, source.key))) != job.fingerprint:
            # It was done once, and other options have put another output in its place since.
            yield candidate._replace(is_known=True)
        else:
            counts[job.name, ALREADY_DONE] += 1


def makers_of(candidates: Sequence[Candidate], journal: Journal) -> Mapping[str, str]:
    """Which job made what lies under the candidates' claims; empty where there has never been but one job."""
    jobs = {candidate.job.fingerprint for candidate in candidates}
    if len(jobs) <= 1 and all(map(journal.knows_only, jobs)):
        return {}
    return journal.makers([claim_of(output_key(candidate.job, candidate.source.key)) for candidate in candidates])


def interruptible(pages: Iterable[T], stop: StopFlag) -> Iterator[T]:
    """What a source yields that may be silent for long, as a pipe may be. Raises Interrupted when the run is to end."""
    source, pool = iter(pages), ThreadPoolExecutor(1)
    try:
        # A page is a list, so that None is never one.
        while (page := waited_for(pool.submit(next, source, None), stop)) is not None:
            yield page
    finally:
        pool.shutdown(wait=False)


def waited_for(coming: "Future[T]", stop: StopFlag) -> T:
    """What a future comes to. Raises Interrupted when the run is to end first."""
    while not wait([coming], timeout=0.2).done:
        if stop.requested:
            raise Interrupted
    return coming.result()


def by_job(
    candidates: Sequence[Candidate], look_up: Callable[[str, Sequence[str]], Mapping[str, T]]
) -> dict[str, Mapping[str, T]]:
    """What the journal knows of the candidates, by fingerprint and key: one question for each job."""
    keys: dict[str, list[str]] = {}
    for candidate in candidates:
        keys.setdefault(candidate.job.fingerprint, []).append(candidate.source.key)
    return {job: look_up(job, wanted) for job, wanted in keys.items()}


class Planner:
    """Lists, selects, and says what is to be done.

    `counts` and `settled` (the outcomes of what needs no worker) are those of the page in hand, for whoever asks to
    take away: a page that S3 breaks off in the middle of is as if it had not been listed.
    """

    def __init__(self, settings: Settings, bucket: Bucket, journal: Journal, stop: StopFlag) -> None:
        self.settings, self.bucket, self.journal, self.stop = settings, bucket, journal, stop
        self.counts: Counter[tuple[str, str]] = Counter()
        self.settled: list[Outcome] = []
        self.own_prefixes = settings.own_prefixes
        now = time.time()
        self.routes = [make_route(job, now) for job in settings.jobs]
        # Claims of found outputs that the recorder may not have written yet; it is never so many notes behind.
        self._found: dict[str, Task] = {}
        # First folder of keys -> whether the first object that was met there is an output of this program.
        self._folders: dict[str, bool] = {}
        self._shares_outputs = False  # with another source bucket: their outputs lie between ours

    def pages(self, hunger: Callable[[], int]) -> Generator[tuple[list[S3Object], Sequence[Route]], None, None]:
        """What there is, by pages, and the routes that may want it. Jobs with the same prefix share one listing.

        Raises RunStopped, UserError for what is wrong with a file of keys, Interrupted.
        """
        if self.settings.keys_from:
            yield from ((page, self.routes) for page in self._named_pages(self.settings.keys_from))
            return
        for prefix in dict.fromkeys(route.job.prefix for route in self.routes):
            routes = [route for route in self.routes if route.job.prefix == prefix]
            with contextlib.closing(self.bucket.list_pages(prefix, hunger)) as pages:
                yield from ((page, routes) for page in pages)

    def _named_pages(self, source: str) -> Iterator[list[S3Object]]:
        """The objects that a file names, as they are now; those that are done already need not be looked at."""
        # A failures file names an object once for each failure: the second must not go out while the first does.
        recent: dict[str, None] = {}
        for page in interruptible(keys_from(source, self.bucket), self.stop):
            fresh = [named for named in page if named.key not in recent and self._may_be_ours(named.key)]
            recent.update(dict.fromkeys(named.key for named in fresh))
            for key in list(recent)[:-KEYS_REMEMBERED]:
                del recent[key]
            unknown = self._unknown_keys(fresh)
            known = [named for named in fresh if named.key not in unknown]
            yield known + list(self._current([named for named in fresh if named.key in unknown]))

    def _may_be_ours(self, key: str) -> bool:
        """Whether this shard has to look at an object that a file names: a job may want it here, or no job at all."""
        shard = self.settings.shard
        return shard.count == 1 or shard.owns(key) or any(self._is_ours(route.job, key) for route in self.routes)

    def _is_ours(self, job: Job, key: str) -> bool:
        shard = self.settings.shard
        return shard.count == 1 or shard.owns(claim_of(output_key(job, key)))

    def _unknown_keys(self, page: Sequence[S3Object]) -> set[str]:
        """The keys of those objects that are not known to be done in the version that is named."""
        named = [Candidate(route.job, source) for source in page for route in self.routes if source.etag]
        todo = unfinished(named, self.journal, Counter(), retry=self.settings.retry_failed)
        return {source.key for source in page if not source.etag} | {candidate.source.key for candidate in todo}

    def _current(self, page: Sequence[S3Object]) -> Iterator[S3Object]:
        for named, found in zip(page, self.bucket.current(page), strict=True):
            if isinstance(found, S3Object):
                yield found
            elif self._is_ours(self.routes[0].job, named.key):
                self.counts[self.routes[0].job.name, LISTED] += 1
                # What an inventory says of a version that is not there is no news of that version.
                task = self._task(Candidate(self.routes[0].job, named._replace(etag="")), {})
                self.settled.append(Outcome(task, Event.FAILED, found.code, found.message))

    def eligible(self, page: Sequence[S3Object], routes: Sequence[Route]) -> list[Candidate]:
        """The objects of a page that jobs want and that are not done, each once for each job."""
        selected = list(select(page, routes, self.own_prefixes, self.settings.shard, self.counts))
        return list(unfinished(selected, self.journal, self.counts, retry=self.settings.retry_failed))

    def tasks_of(self, page: Sequence[S3Object], routes: Sequence[Route]) -> list[Task]:
        """What is to be done of a page."""
        todo = list(self._without_own_outputs(self.eligible(page, routes)))
        if not todo:
            return []
        sent = by_job(todo, self.journal.sent)
        todo = list(self._unsettled(todo))
        for claim in list(self._found)[:-FOUND_KEPT]:
            del self._found[claim]
        tasks = [self._task(candidate, sent[candidate.job.fingerprint]) for candidate in todo]
        sources = {source.key: source for source in page}
        claimed = list(self._claimed(self._sendable(tasks), sources))
        return self._without_outputs(claimed, sources)

    def _unsettled(self, candidates: Sequence[Candidate]) -> Iterator[Candidate]:
        """The candidates that have not been settled since they were looked up: this run may have listed them before.

        To be asked for after the requests in flight: an object is in neither answer only if it is new.
        """
        since: Counter[tuple[str, str]] = Counter()
        yield from unfinished(candidates, self.journal, since, retry=self.settings.retry_failed)
        self.counts.update({what: count for what, count in since.items() if what[1] != RETRIED})

    def _without_own_outputs(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        """The candidates that are sources. Where outputs lie among them, only an object's metadata tells."""
        for candidate in candidates:
            try:
                if self._is_own_output(candidate):
                    self.counts[candidate.job.name, OWN_OUTPUT] += 1
                else:
                    yield candidate
            except ObjectFailed as failure:
                task = self._task(candidate, {})
                self.settled.append(Outcome(task, Event.FAILED, failure.code, failure.message, unsettled=True))

    def _is_own_output(self, candidate: Candidate) -> bool:
        """Whether an object is an output: this configuration's among its sources, or another configuration's.

        Of the others, the first object of each folder is looked at; only where it is an output, every one is.
        """
        key = candidate.source.key
        folder = key.partition("/")[0] if "/" in key else ""
        is_known = folder in self._folders or len(self._folders) >= FOLDERS_REMEMBERED
        if is_known and not (self._folders.get(folder) or self.settings.puts_among_sources(candidate.job)):
            return False
        found = self.bucket.is_our_output(key)
        if not is_known:
            self._folders[folder] = found
        return found

    def _task(self, candidate: Candidate, sent: Mapping[str, Sent]) -> Task:
        job, source = candidate.job, candidate.source
        earlier = sent.get(source.key)
        # What was sent for another version of the object can never be asked for again.
        if earlier and earlier.etag != source.etag:
            earlier = None
        planned, quality = output_key(job, source.key), job.options.quality
        place = f"{self.settings.s3.written_bucket}/{planned}"
        is_overdue = earlier is not None and is_forgotten(earlier.sent_at)
        task = Task(
            job=job.name,
            fingerprint=job.fingerprint,
            key=source.key,
            etag=source.etag,
            size=source.size,
            target=job.options.target,
            quality=quality,
            output_key=planned,
            idempotency_key=idempotency_key(self.journal.bucket, source, job.options.target, quality, place),
            path=self._path(source.size),
            sent_at=earlier.sent_at if earlier else 0.0,
            doubled=earlier is not None and bool(earlier.doubled),
            copy=job.options.same_format == "copy" and is_in_target_format(source.key, job),
            overdue=is_overdue,
            job_id=earlier.job_id if earlier else "",
            traced=candidate.is_known or source.key in sent,
            look_first=earlier is not None,
            among_sources=self.settings.puts_among_sources(job),
        )
        if earlier and not is_overdue:
            task = replace(task, idempotency_key=earlier.idempotency_key, url=earlier.url, path=earlier.path)
            return replace(task, resumed=True)
        return task

    def _path(self, size: int) -> str:
        above = self.settings.api.jobs_above
        return JOBS_PATH if above is not None and size > above else CONVERT_PATH

    def _sendable(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """The tasks that may be sent at all; the others are failures before anything is paid."""
        api = self.settings.api
        for task in tasks:
            most = min(api.max_size, SYNC_LIMIT_BYTES if api.jobs_above is None else api.max_size)
            if task.size > most:
                self._fail(
                    task, "too_large", f"{task.size} bytes are more than {most}; see api.max_size, api.jobs_above"
                )
            # Nobody knows before it is paid whether an archive of pages comes, and S3 must take its key too.
            elif max(len(key.encode()) for key in made_keys(task.output_key)) > S3_KEY_BYTES:
                said = f"the output key, with .zip behind it for an archive, has more than {S3_KEY_BYTES} bytes"
                self._fail(task, "output_key_too_long", said)
            else:
                yield task

    def _claimed(self, tasks: Iterable[Task], sources: Mapping[str, S3Object]) -> Iterator[Task]:
        """The tasks whose output key is theirs: the first source keeps a key, in this run and in any later one."""
        waiting = list(tasks)
        # Requests before outcomes: what is settled in between is in both answers, and never in neither.
        in_flight = self._claimants(waiting)
        jobs = self._jobs_that_have(waiting, sources)
        logged = self.journal.owners([claim_of(task.output_key) for task in waiting])
        found = self._found_under(waiting)
        owners = {**in_flight, **{claim: task.key for claim, task in found.items()}, **logged}
        owners.update(self._owners_by_output([task for task in waiting if claim_of(task.output_key) not in owners]))
        for task in waiting:
            claim = claim_of(task.output_key)
            # Of two jobs that put the same source's outputs under one key, the first keeps it too.
            owner, job = owners.setdefault(claim, task.key), jobs.setdefault(claim, task.fingerprint)
            is_itself = self.settings.s3.is_one_bucket and task.output_key == task.key
            if owner == task.key and job == task.fingerprint and not is_itself:
                yield replace(task, traced=task.traced or logged.get(claim) == task.key)
            else:
                said = f"belongs to {owner}; put {{ext}} or {{job}} into s3.output_key to keep both"
                if is_itself:
                    said = "would replace its own source: put {target} or a folder into s3.output_key"
                elif owner == task.key:
                    named = next(route.job.name for route in self.routes if route.job.fingerprint == job)
                    said = (
                        f"belongs to job {named}; exclude it there or put {{job}} into the output_key of job {task.job}"
                    )
                elif owner.startswith(ELSEWHERE):
                    said = f"belongs to {owner}; give each bucket's outputs a prefix of their own in s3.output_key"
                self._fail(task, "output_collision", f"{task.output_key}: {said}")

    def _jobs_that_have(self, tasks: Sequence[Task], sources: Mapping[str, S3Object]) -> dict[str, str]:
        """Which job has the output keys of these tasks, by fingerprint, where it still wants their source.

        What was made with options that no job has any more, or by a job that wants the object no more, may be replaced.
        """
        if len(self.routes) == 1:
            return {}
        claims = [claim_of(task.output_key) for task in tasks]
        found = self._found_under(tasks)
        # In this order: see `_claimed`.
        having = {**self.journal.senders(claims), **{claim: task.fingerprint for claim, task in found.items()}}
        having.update(self.journal.makers(claims))
        wanting = {
            (claim_of(task.output_key), route.job.fingerprint)
            for task in tasks
            for route in routes_wanting(sources[task.key], self.routes)
        }
        return {claim: job for claim, job in having.items() if (claim, job) in wanting}

    def _found_under(self, tasks: Sequence[Task]) -> dict[str, Task]:
        """What was found of late under the output keys of these tasks, by claim."""
        claims = (claim_of(task.output_key) for task in tasks)
        return {claim: self._found[claim] for claim in claims if claim in self._found}

    def _claimants(self, tasks: Sequence[Task]) -> dict[str, str]:
        """The sources of unsettled requests that claim these tasks' keys."""
        found = self.journal.claimants([claim_of(task.output_key) for task in tasks])
        for task in tasks:
            claim = claim_of(task.output_key)
            claimant = found.get(claim, task.key)
            # An object that was deleted while it was in flight, and has left no output, holds nobody up. What is in
            # another bucket cannot be told.
            is_another = claimant != task.key and not claimant.startswith(ELSEWHERE)
            if is_another and self.bucket.has_nothing_of(claimant, task.output_key):
                del found[claim]
        return found

    def _owners_by_output(self, tasks: Sequence[Task]) -> Iterator[tuple[str, str]]:
        """The owners of keys that several tasks want and the journal knows nothing of: a lost one may have known.

        An output says itself which source it was made of.
        """
        wanted = Counter(claim_of(task.output_key) for task in tasks)
        for task in tasks:
            if wanted[claim_of(task.output_key)] > 1 and self._output_is_of(task):
                yield claim_of(task.output_key), task.key

    def _output_is_of(self, task: Task) -> bool:
        try:
            return self.bucket.output_is_of(task)
        except ObjectFailed as failure:
            # Whoever comes first would keep the key for good: better nobody does now.
            raise RunStopped(failure.message, "run it again") from None

    def _without_outputs(self, tasks: list[Task], sources: Mapping[str, S3Object]) -> list[Task]:
        """The tasks whose output is not there yet, as run.skip_existing wants it (make's rule); the others are found.

        The rule is for objects without a trace in the journal. For the others the journal knows better: an output may
        have been made with other options, or of a version that was overwritten while it was converted.
        """
        untraced = [task for task in tasks if not task.traced]
        if not (self.settings.run.skip_existing and untraced):
            return tasks
        written = self._written(untraced)
        self._doubt([task for task in untraced if any(key in written for key in made_keys(task.output_key))])
        todo = [task for task in tasks if task.traced]
        for task in untraced:
            made = next((key for key in made_keys(task.output_key) if key in written), "")
            is_trusted = not (task.among_sources or self._shares_outputs)
            if made and is_trusted and written[made] > sources[task.key].modified:
                self._found[claim_of(made)] = task
                self.settled.append(Outcome(task, Event.FOUND, output_key=made))
            else:
                # Listings have whole seconds: of two writes within one, only the output's metadata tells the order.
                todo.append(replace(task, look_first=bool(made)))
        return todo

    def _doubt(self, tasks: Sequence[Task]) -> None:
        """Find out whether another bucket's outputs lie there, of which a listing says nothing: look at some of them.

        One is enough: from then on, workers look at each before it counts as done. RunStopped if S3 does not answer.
        """
        if self.settings.s3.is_one_bucket or self._shares_outputs or not tasks:
            return
        samples = tasks[:: max(1, len(tasks) // HEADS_AT_A_TIME)]
        try:
            with ThreadPoolExecutor(HEADS_AT_A_TIME) as pool:
                self._shares_outputs = any(pool.map(self.bucket.has_output_of_another_bucket, samples))
        except ObjectFailed as failure:
            raise RunStopped(failure.message, "run it again") from None

    def _written(self, tasks: Sequence[Task]) -> dict[str, float]:
        """When the planned outputs were written, of those that exist."""
        prefixes = {job.name: literal_prefix(job.output_key) for job in self.settings.jobs}
        found: dict[str, float] = {}
        for prefix in sorted(set(prefixes.values())):
            keys = [key for task in tasks if prefixes[task.job] == prefix for key in made_keys(task.output_key)]
            found.update(self.bucket.existing_outputs(prefix, keys))
        return found

    def _fail(self, task: Task, code: str, message: str) -> None:
        # That says nothing of what an earlier run has sent.
        self.settled.append(Outcome(task, Event.FAILED, code, message, permanent=True, unsettled=True))


########################################################################################################################
# Feeder. One thread: from what is planned of a page to tasks on the queue.
#   - A batch is no larger than the queue, so that few requests are in the journal that are not with a worker.
#   - Whatever happens, every worker gets its end marker.
########################################################################################################################


class Feeder:
    """Hands out tasks in batches, each of which is in the journal before a worker sees it."""

    def __init__(self, shared: Shared, pacer: Pacer, journal: Journal, tasks: "queue.Queue[Task | None]") -> None:
        self.shared, self.pacer, self.journal, self.tasks, self.tell = shared, pacer, journal, tasks, shared.tell
        self.planner = Planner(shared.settings, shared.bucket, journal, shared.stop)
        self.budget = shared.settings.api.max_conversions
        self._has_begun = False  # a page has come in
        self.is_ahead, self.has_ended = threading.Event(), threading.Event()  # of the workers; for TotalCount

    def run(self) -> None:
        """Feed until everything is handed out or the run is to end; then send the workers home."""
        stop: Stop | None = None
        is_complete = False
        try:
            # In this thread, because the main one must hear signals even while S3 does not answer.
            with blaming_the_environment(self.shared.settings.api.url):
                self.shared.bucket.check()
                stop = self.feed()
            is_complete = not (stop or self.shared.stop.requested)
        except RunStopped as stopped:
            # A listing that broke off is no reason to drop what was handed out.
            stop = stopped.stop
        except UserError as error:
            stop = Stop(error.message, error.hint, ExitCode.STOPPED if self._has_begun else error.exit_code)
        except Interrupted:
            pass
        except Exception:
            log.exception("the feeder failed")
            stop = Stop("the program has a bug (the feeder failed)", "run it again with -v and report what it prints")
        finally:
            self.has_ended.set()
            self.is_ahead.set()
            self.tell(FeedEnded(stop, is_complete))
            self._send_home()

    def _send_home(self) -> None:
        """Put an end marker into the queue for every worker, those that have died among them."""
        markers = self.shared.settings.run.consumers
        while markers:
            try:
                self.tasks.put(None, timeout=0.2)
                markers -= 1
            except queue.Full:
                markers += self._make_room()

    def _make_room(self) -> int:
        """Leave to the next run what nobody may be alive to take; how many markers that has cost."""
        if not self.shared.stop.requested:
            return 0
        try:
            task = self.tasks.get_nowait()
        except queue.Empty:
            return 0
        self._leave([task] if task else [])
        return int(task is None)

    def feed(self) -> Stop | None:
        """Hand out the tasks of every page; why that is not all there is, if it is not."""
        with contextlib.closing(self.planner.pages(self._hunger)) as pages:
            for page, routes in pages:
                self._has_begun = True
                tasks = self.planner.tasks_of(page, routes)
                self._report_page()
                stop = self._hand_out(tasks)
                if stop or self.shared.stop.requested:
                    return stop
        return None

    def _hunger(self) -> int:
        # While there is work, a page that is read early is only a page that grows old.
        return LIST_THREADS if self.tasks.qsize() < self.shared.settings.run.workers else 1

    def _hand_out(self, tasks: Sequence[Task]) -> Stop | None:
        allowed = list(self._within_budget(tasks))
        if len(allowed) < len(tasks):
            self.tell(Counted({("", LEFT_TO_DO): len(tasks) - len(allowed)}))
        waiting = deque(allowed)
        try:
            while waiting and not self.shared.stop.requested:
                self._begin(waiting)
        except Interrupted:
            pass
        finally:
            # Whatever has ended it: what is not with a worker is left to do.
            self._leave(waiting)
        if len(allowed) == len(tasks):
            return None
        settings = self.shared.settings
        return Stop(
            f"the cap of {counted(settings.api.max_conversions or 0, 'conversion')}{settings.shard.named} is reached",
            "run it again to go on, or raise api.max_conversions (--limit); failed ones count, for they may be charged",
            is_limit=True,
        )

    def _within_budget(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """The tasks that the cap admits. It counts what is handed out: none of it can be taken back."""
        for task in tasks:
            if task.copy or self.budget is None:
                yield task
            elif self.budget > 0:
                self.budget -= 1
                yield task

    def _signed(self, task: Task) -> Task:
        # A resumed task keeps what was sent; a key with dot segments cannot be fetched by its URL.
        if task.resumed or task.copy:
            return task
        # What is asked for as a job first keeps the time when it was sent.
        task = task if task.job_id else replace(task, sent_at=time.time())
        wants_url = self.shared.settings.api.transfer != "upload" and not has_dot_segments(task.key)
        if not wants_url or self.shared.url_trust.is_lost:
            return task
        return replace(task, url=self.shared.bucket.presign(task.key))

    def _begin(self, waiting: deque[Task]) -> None:
        """Hand out the first of the tasks, which then no longer wait."""
        signed = [self._signed(task) for task in itertools.islice(waiting, 2 * self.shared.settings.run.workers)]
        self.journal.begin(signed, time.time())
        for task in signed:
            if not task.copy:
                self.pacer.take(self.shared.stop)
            self._put(task)
            waiting.popleft()

    def _put(self, task: Task) -> None:
        while True:
            try:
                return self.tasks.put(task, timeout=0.2)
            except queue.Full:
                self.is_ahead.set()
                if self.shared.stop.requested:
                    raise Interrupted from None

    def _leave(self, tasks: Iterable[Task]) -> None:
        for task in tasks:
            # The row of a doubtful one is all that tells the next run that it may be paid twice.
            self.tell(Outcome(task, Event.LEFT, unsettled=task.may_be_done or task.is_doubtful))

    def _report_page(self) -> None:
        self.tell(Counted(dict(self.planner.counts)))
        for outcome in self.planner.settled:
            self.tell(outcome)
        self.planner.counts.clear()
        self.planner.settled.clear()


class TotalCount(threading.Thread):
    """Counts what a run is to do, over a listing of its own, so that a bar has an end while the feeder is on its way.

    It never holds up the work: it starts when the workers have more than they can do, reads a page at a time, leaves
    the processor to others, and nothing waits for it. What this run has converted by then counts as to do.
    """

    def __init__(self, feeder: Feeder) -> None:
        super().__init__(name="total", daemon=True)
        self._feeder, self._horizon = feeder, feeder.journal.newest_row()

    def run(self) -> None:
        """Count, if there is something to wait for. A total that cannot be had is missed by nobody but the bar."""
        self._feeder.is_ahead.wait()
        try:
            self._count()
        except Exception:
            log.debug("the total could not be counted", exc_info=True)

    def _count(self) -> None:
        """Tell the recorder once it is all counted."""
        shared = self._feeder.shared
        around = blaming_the_environment(shared.settings.api.url)
        with contextlib.suppress(RunStopped, UserError, Interrupted), around, self._own_journal() as journal:
            planner = Planner(shared.settings, shared.bucket, journal, shared.stop)
            total, began = 0, time.thread_time()
            for page, routes in planner.pages(lambda: 1):
                total += len(planner.eligible(page, routes))
                if self._feeder.has_ended.wait(IDLE_TO_BUSY * (time.thread_time() - began)):
                    return
                began = time.thread_time()
            shared.tell(TotalKnown(total))

    def _own_journal(self) -> JournalReader:
        # A connection of its own: the feeder and the recorder never wait for it.
        journal = self._feeder.journal
        reader = JournalReader(journal.path, journal.bucket, journal.output_bucket)
        reader.horizon = self._horizon
        return reader


########################################################################################################################
# Workers. Each has its own client of the API; all share the client of S3. A worker leaves when it takes the end marker.
# When the run is to end, an object in hand is finished, a queued one is given back unsent.
########################################################################################################################


def convert_object(task: Task, shared: Shared, client: ConvertClient) -> Outcome:
    """Take one object through the API and into the output bucket. A bad object is an outcome, not an exception."""
    # An earlier run may have sent it: until the API says otherwise, the work may be done.
    exchange = Exchange(task, task, maybe_done=task.may_be_done, replayed=task.may_be_done)
    # Whatever the API has repeated, no secret gets further than this function: all that it hands on goes through here.
    hide = shared.settings.hide
    started = time.monotonic()
    try:
        with blaming_the_environment(shared.settings.api.url):
            outcome = convert_and_store(task, shared, client, exchange)
    except ObjectFailed as failure:
        # While the API may hold a paid answer, the request is kept, so that the next run can ask for it.
        keeps = exchange.may_be_paid or (exchange.is_open and not failure.permanent)
        outcome = Outcome(
            task, Event.FAILED, failure.code, failure.message, failure.status, failure.permanent, unsettled=keeps
        )
    except RunStopped as stopped:
        shared.stop.request(replace(stopped.stop, because=hide(stopped.stop.because)))
        outcome = Outcome(task, Event.LEFT, unsettled=exchange.is_open)
    except Interrupted:
        outcome = Outcome(task, Event.LEFT, unsettled=exchange.is_open)
    except Exception as bug:
        log.exception("a worker failed")
        message = f"{type(bug).__name__}: {bug}"
        # Nobody knows how far the request has come.
        exchange.maybe_done |= exchange.requests > 0
        outcome = Outcome(task, Event.FAILED, "bug", message, unsettled=exchange.is_open)
    if outcome.unsettled:
        keep_what_is_open(shared, exchange)
    return replace(
        outcome,
        code=hide(outcome.code),
        message=hide(outcome.message)[:MESSAGE_CHARACTERS],
        seconds=time.monotonic() - started,
        requests=exchange.requests,
        throttled=exchange.throttled,
        replayed=exchange.replayed and outcome.event is Event.CONVERTED,
        # Until then the journal knows of the doubt.
        maybe_paid_twice=outcome.event in {Event.CONVERTED, Event.FOUND} and exchange.request.doubled,
        remaining=exchange.remaining,
    )


def keep_what_is_open(shared: Shared, exchange: Exchange) -> None:
    """Where the last request is settled and one before it is not, let the next run ask for that one."""
    if exchange.left_open and not exchange.maybe_done:
        try:
            shared.note(InFlight(exchange.task, exchange.left_open))
        except RunStopped as stopped:
            shared.stop.request(stopped.stop)


def convert_and_store(task: Task, shared: Shared, client: ConvertClient, exchange: Exchange) -> Outcome:
    """The steps for one object. Raises ObjectFailed, RunStopped or Interrupted."""
    # Queued when the run was asked to end: it was never sent.
    if shared.stop.requested:
        raise Interrupted
    if task.look_first:
        done = shared.bucket.output_of(task)
        if done:
            return Outcome(task, Event.FOUND, output_key=done)
    # Something lies there, or may: a lost checkpoint may have known that it is another source's output.
    if task.look_first or task.among_sources:
        shared.bucket.refuse_to_overwrite(task)
    if task.copy:
        shared.bucket.copy(task)
        return Outcome(task, Event.CONVERTED, output_key=task.output_key, bytes_out=task.size)
    result = client.convert(task, exchange)
    with contextlib.closing(result.body):
        key = shared.bucket.store(task, result)
    return Outcome(task, Event.CONVERTED, output_key=key, bytes_out=result.size)


def worker(tasks: "queue.Queue[Task | None]", shared: Shared) -> None:
    """Convert tasks until the end marker comes."""
    with contextlib.closing(ConvertClient(shared)) as client:
        for task in iter(tasks.get, None):
            shared.tell(convert_object(task, shared, client))


########################################################################################################################
# Processes. With `run.processes`, workers are threads of several processes. To each of them the parent has a pipe and a
# thread (WorkerProcess) that hands it tasks from the queue and takes its notes: no lock is shared, so that one that is
# killed holds up nobody.
#   - What a process holds is known here. When it dies, another takes its place and gets the same tasks, marked as
#     resumed: the same requests under the same keys, which the API answers from its memory.
#   - Signals reach the parent alone. It tells the others to stop; when it dies, the pipes close, and the others end.
#   - A process leaves when it has the end marker and its last worker is done.
########################################################################################################################


@dataclass(frozen=True)
class Noted:
    """What the parent answers to an InFlight: it is in the journal, or the run has to stop."""

    task: Task
    stop: Stop | None


class JournalOfParent:
    """The way to the journal from a worker process, whose parent alone writes it."""

    def __init__(self, tell: Callable[[object], None]) -> None:
        self._tell, self._answers = tell, dict[Task, "queue.SimpleQueue[Stop | None]"]()

    def note(self, note: InFlight) -> None:
        """Return when it is written down. Raises RunStopped where it cannot be."""
        answer = self._answers[note.task] = queue.SimpleQueue()
        self._tell(note)
        # Without a parent there is no answer, but then this process ends.
        if stop := answer.get():
            raise RunStopped(stop.because, stop.hint)

    def hear(self, noted: Noted) -> None:
        """Let the worker go on that waits for this."""
        self._answers.pop(noted.task).put(noted.stop)


@dataclass(frozen=True)
class GateClosed:
    """What the parent tells a worker process: nobody may send before this time, in monotonic seconds."""

    until: float


def worker_process(connection: "Connection", settings: Settings, workers: int, *, is_verbose: bool) -> None:
    """The main function of a worker process: tasks come through the pipe, and what its workers say goes back."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    set_up_logging(quiet=settings.quiet, verbose=is_verbose, as_json=settings.log_format == "json")
    sending = threading.Lock()

    def tell(note: object) -> None:
        with sending:
            connection.send(note)

    stop = StopFlag(tell)
    journal = JournalOfParent(tell)
    shared = Shared(settings, stop, Gate(tell, tell), Bucket(settings, stop), UrlTrust(tell), tell, journal.note)
    tasks: queue.Queue[Task | None] = queue.Queue()
    pool = ThreadPoolExecutor(workers)
    try:
        with blaming_the_environment(settings.api.url):
            for _ in range(workers):
                pool.submit(work_until_done, functools.partial(worker, tasks, shared), shared)
            # The last one: before it, no worker has anything to do.
            listen = partial(listen_to_parent, connection, shared, tasks, workers, journal)
            threading.Thread(target=listen, daemon=True).start()
    except RunStopped as stopped:
        stop.request(stopped.stop)
        leave_to_parent(connection)
    pool.shutdown()
    tell(None)


def leave_to_parent(connection: "Connection") -> NoReturn:
    """End a process that cannot work, once its parent has heard why: what it was handed, the parent still has."""
    with contextlib.suppress(EOFError, OSError):
        while not isinstance(connection.recv(), Stop):
            pass
    os._exit(ExitCode.STOPPED)


def listen_to_parent(
    connection: "Connection", shared: Shared, tasks: "queue.Queue[Task | None]", workers: int, journal: JournalOfParent
) -> NoReturn:
    """Do what the parent says, as long as there is one."""
    while True:
        try:
            told = connection.recv()
        except (EOFError, OSError):
            # Nobody is left to write down what comes of it; the next run sends the same requests again.
            os._exit(ExitCode.STOPPED)
        if isinstance(told, GateClosed):
            shared.gate.close(told.until)
        elif isinstance(told, Noted):
            journal.hear(told)
        elif isinstance(told, Stop):
            # Told back, it could meet a parent that is sending as well: neither would read what fills the other's pipe.
            shared.stop.request(told, is_told=True)
        else:
            for _ in range(1 if told else workers):
                tasks.put(told)


class WorkerProcess:
    """One worker process as its thread in the parent sees it. Everything here happens in that thread."""

    def __init__(self, shared: Shared, pacer: Pacer, tasks: "queue.Queue[Task | None]", workers: int) -> None:
        self.shared, self.pacer, self.tasks, self.workers = shared, pacer, tasks, workers
        # A task as it was sent -> as it would be sent again. No more than twice the workers, so that none is idle.
        self._held: dict[Task, Task] = {}
        self._again: deque[Task] = deque()
        self._deaths: Counter[str] = Counter()  # idempotency key of a held task -> processes that died with it
        self._idle_deaths = 0  # in a row, without one outcome in between
        self._is_fed = False  # the end marker has come

    def run(self) -> None:
        """Keep a process at work until everything it was handed is settled, or none stays alive."""
        while True:
            try:
                with running_process(self.shared.settings, self.workers) as connection:
                    return self._serve(connection)
            except RunStopped as stopped:
                self.shared.stop.request(stopped.stop)
            except (EOFError, OSError):
                log.warning("a worker process died with %d objects in its hands", len(self._held))
            self._bury()
            if self.shared.stop.requested:
                return self._give_back()

    def _serve(self, connection: "Connection") -> None:
        """Hand out tasks and take notes until the process leaves. Raises EOFError or OSError when it dies."""
        told: set[object] = set()
        while True:
            for news in self._news():
                if news not in told:
                    told.add(news)
                    connection.send(news)
            for task in self._tasks_at_hand():
                self._held[task] = task
                connection.send(task)
            if connection.poll(PIPE_POLL_SECONDS):
                note = connection.recv()
                if note is None:
                    return
                self._take(note)
                if isinstance(note, InFlight):
                    connection.send(Noted(note.task, self._note(note)))

    def _news(self) -> Iterator[Stop | GateClosed | None]:
        """What a process is to be told once: to stop, to wait, and that no task will come any more."""
        if self.shared.stop.stop:
            yield self.shared.stop.stop
        if self.pacer.paused_until:
            yield GateClosed(self.pacer.paused_until)
        if self._is_fed and not self._again:
            yield None

    def _tasks_at_hand(self) -> Iterator[Task]:
        while len(self._held) < 2 * self.workers:
            if self._again:
                yield self._again.popleft()
            elif self._is_fed or self.tasks.empty():
                return
            else:
                task = self._next_task()
                if task:
                    yield task

    def _next_task(self) -> Task | None:
        try:
            task = self.tasks.get_nowait()
        except queue.Empty:
            # Another process's thread was quicker.
            return None
        self._is_fed = task is None
        return task

    def _note(self, note: InFlight) -> Stop | None:
        """Write down what is out for a task. Why the run has to stop, if that cannot be done."""
        try:
            self.shared.note(note)
        except RunStopped as stopped:
            return stopped.stop
        return None

    def _take(self, note: "Heard | Asking | Stop | Outcome | InFlight") -> None:
        """Pass a note on to whom it concerns."""
        if isinstance(note, Asking):
            self.shared.gate.note_asking()
        elif isinstance(note, Heard):
            self.pacer.hear(note)
            self.shared.url_trust.hear(note)
        elif isinstance(note, Stop):
            self.shared.stop.request(note)
        elif isinstance(note, InFlight):
            self._held[note.task] = note.request
        else:
            held = self._held.pop(note.task)
            del self._deaths[held.idempotency_key]
            self._idle_deaths = 0
            self.shared.tell(note)

    def _bury(self) -> None:
        """Take back what a dead process held: it is sent again, or given up where it may be what kills processes."""
        self._idle_deaths += 1
        if self._idle_deaths >= DEATHS_ENDURED:
            because = f"worker processes died {self._idle_deaths} times in a row without converting anything"
            self.shared.stop.request(Stop(because, "look for what kills them (memory?), or set fewer run.workers"))
        for task in self._held.values():
            self._deaths[task.idempotency_key] += 1
            if self._deaths[task.idempotency_key] < DEATHS_ENDURED or self.shared.stop.requested:
                # What it has sent may have been converted, and may even have been stored.
                self._again.append(replace(task, resumed=True, look_first=True))
            else:
                said = f"{DEATHS_ENDURED} worker processes died while they held this object"
                self.shared.tell(Outcome(task, Event.FAILED, "worker_died", said, unsettled=True))
        self._held.clear()

    def _give_back(self) -> None:
        """Leave to the next run what no process is there for."""
        queued = () if self._is_fed else iter(self.tasks.get, None)
        for task in itertools.chain(self._again, queued):
            self.shared.tell(Outcome(task, Event.LEFT, unsettled=task.may_be_done or task.is_doubtful))


@contextlib.contextmanager
def running_process(settings: Settings, workers: int) -> Iterator["Connection"]:
    """The pipe to a new worker process, which is gone at the end."""
    # Spawned, not forked: a client must not cross a fork, and neither may a lock that another thread holds.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    more = {"is_verbose": log.isEnabledFor(logging.DEBUG)}
    process = context.Process(target=worker_process, args=(theirs, settings, workers), kwargs=more, daemon=True)
    with ours:
        with theirs, blocked_signals(), blaming_the_environment(settings.api.url):
            process.start()
        # Its death shows as the end of the pipe, because nobody else holds the other end any more.
        yield ours
    process.join()


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Start a process in here, and it never sees the signals that are the parent's to handle."""
    if os.name != "posix":
        yield
        return
    # It would unblock them while it starts its own helper.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shares(total: int, parts: int) -> list[int]:
    """A number in whole parts that differ by at most one."""
    return [Shard(part, parts).share(total) for part in range(parts)]


def workforce(shared: Shared, pacer: Pacer, tasks: "queue.Queue[Task | None]") -> Sequence[Callable[[], None]]:
    """What takes tasks off the queue, each to be run in a thread: the workers, or what stands for a process of them."""
    run = shared.settings.run
    if run.processes == 1:
        return [functools.partial(worker, tasks, shared)] * run.workers
    return [WorkerProcess(shared, pacer, tasks, part).run for part in shares(run.workers, run.processes)]


def work_until_done(work: Callable[[], None], shared: Shared) -> None:
    """Do a part of the work in this thread. A bug ends the run, not only the thread."""
    try:
        with blaming_the_environment(shared.settings.api.url):
            work()
    except RunStopped as stopped:
        shared.stop.request(stopped.stop)
    except Exception:
        log.exception("a worker failed")
        shared.stop.request(
            Stop("the program has a bug (a worker failed)", "run it again with -v and report what it prints")
        )


########################################################################################################################
# Recorder. One thread, the main one: the only writer of outcomes, and the owner of every count and line of output.
#   - What has come in by the time the last batch is on the disk is the next batch: a slow disk makes batches larger.
#   - An outcome is counted after it is written. What cannot be written is left to do, and its request stays recorded.
########################################################################################################################

# None: the feeder, a worker, or a process of them, has left.
Note = Outcome | Counted | TotalKnown | FeedEnded | None
# Failures that cost nothing and say nothing of the API: they do not count for run.max_failure_rate.
FREE_FAILURES = ("output_collision", "output_key_too_long", "too_large", "source_gone")
SKIP_REASONS = (UNMATCHED, FOLDER, EMPTY, ARCHIVED, SAME_FORMAT, OWN_OUTPUT, FAILED_BEFORE)


class Report:
    """What a run has come to. Every listed object ends in exactly one count; `close_accounts` checks it."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.counts: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.latencies: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self.examples: dict[str, Outcome] = {}  # code -> the first failure that had it
        self.maybe_paid_twice = ""  # the first key that the API may have been paid for twice
        self.remaining: int | None = None
        self.total: int | None = None  # what `eligible` will come to, if a counting pass has said so
        self.stop: Stop | None = None
        self.is_stopping = False
        self.is_whole = False  # everything there is was listed and handed out

    def add_counts(self, counts: Mapping[tuple[str, str], int]) -> None:
        """Take over what the feeder counted, of all jobs together."""
        for (_, name), count in counts.items():
            self.counts[name] += count

    def add(self, outcome: Outcome) -> None:
        """Count one outcome."""
        self.counts["requests"] += outcome.requests
        self.counts["throttled"] += outcome.throttled
        self.counts["replays"] += outcome.replayed
        self.counts["possible_double_charges"] += outcome.maybe_paid_twice
        if outcome.maybe_paid_twice and not self.maybe_paid_twice:
            self.maybe_paid_twice = outcome.task.key
        # Answers come out of order: the smallest number is the newest.
        if outcome.remaining is not None:
            self.remaining = min(outcome.remaining, outcome.remaining if self.remaining is None else self.remaining)
        if outcome.event is Event.FAILED:
            code = outcome.code if outcome.code in self.failed or len(self.failed) < CODES_KEPT else "other"
            self.failed[code] += 1
            self.examples.setdefault(code, outcome)
            self.counts["failed_for_good"] += outcome.permanent
        elif outcome.event is Event.CONVERTED:
            self.counts["converted"] += 1
            self.counts["bytes_in"] += outcome.task.size
            self.counts["bytes_out"] += outcome.bytes_out
            self.latencies.append(outcome.seconds)
        else:
            self.counts["left" if outcome.event is Event.LEFT else "already_done"] += 1

    @property
    def finished(self) -> int:
        """Objects that were tried and settled in this run."""
        return self.counts["converted"] + self.failed.total()

    @property
    def eligible(self) -> int:
        """Objects listed so far that there was or is something to do for."""
        return self.counts["listed"] - self.counts["already_done"] - sum(self.skipped.values())

    @property
    def expected(self) -> int:
        """Objects that this run is to try, as far as is known by now."""
        return self.eligible if self.is_whole else max(self.eligible, self.total or 0)

    def in_flight(self, workers: int) -> int:
        """Objects that are with the workers: handed out as soon as one is free, so no more than there are workers."""
        return max(0, min(workers, self.unaccounted()))

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> how many."""
        return {reason: self.counts[reason] for reason in SKIP_REASONS if self.counts[reason]}

    def unaccounted(self) -> int:
        """Listed objects that have no count yet; 0 at the end of a run."""
        return self.eligible - self.finished - self.counts["left"]

    def percentile(self, percent: int) -> float | None:
        """Seconds within which so many percent of the newest conversions were done; None before the first."""
        if len(self.latencies) < 2:
            return self.latencies[0] if self.latencies else None
        return statistics.quantiles(self.latencies, n=100, method="inclusive")[percent - 1]

    @property
    def exit_code(self) -> ExitCode:
        """What the whole run amounts to."""
        if self.stop:
            return self.stop.exit_code
        return ExitCode.SOME_FAILED if self.failed else ExitCode.DONE

    def summary(self) -> dict[str, Any]:
        """The run as `run.summary` has it; times in seconds, sizes in bytes."""
        seconds = time.monotonic() - self.started
        p50, p95 = self.percentile(50), self.percentile(95)
        return {
            **{name: self.counts[name] for name in ("listed", "converted", "already_done")},
            "skipped": self.skipped,
            "failed": dict(self.failed.most_common()),
            **{name: self.counts[name] for name in ("left", "bytes_in", "bytes_out")},
            "seconds": round(seconds, 3),
            "per_second": round(self.counts["converted"] / seconds, 3) if seconds else 0.0,
            "p50_seconds": p50 and round(p50, 3),
            "p95_seconds": p95 and round(p95, 3),
            **{name: self.counts[name] for name in ("requests", "throttled", "replays", "possible_double_charges")},
            "remaining": self.remaining,
            "exit_code": int(self.exit_code),
            "stopped_because": self.stop.because if self.stop else None,
        }


def costly(failed: Mapping[str, int]) -> Counter[str]:
    """Of failures by code, those that count for the failure rate."""
    return Counter({code: count for code, count in failed.items() if code not in FREE_FAILURES})


def told(event: str, **fields: Any) -> dict[str, Any]:
    """What a log record says in JSON beside its message: the kind of thing that happened, and its numbers."""
    return {"event": event, "fields": fields}


def local_time(seconds_ago: float = 0.0) -> str:
    """A time of the day in the local zone, with its offset from UTC, so that two servers' logs can be compared."""
    then = datetime.now().astimezone() - timedelta(seconds=seconds_ago)
    return f"{then:%H:%M:%S}{then.isoformat()[-6:]}"


class Progress:
    """What is seen from outside while a run is at work: a bar on a terminal, lines elsewhere, and the metrics file."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._clock, self._quiet = settings.run, clock, settings.quiet
        self.metrics = Metrics(settings, clock)
        # (monotonic seconds, objects finished by then), one a second: the rate is the slope.
        self._pace: deque[tuple[float, int]] = deque([(clock(), 0)], maxlen=RATE_SECONDS)
        self._seen = (0, 0)
        self._moved = self._said_at = clock()
        self._drawn_at, self._columns, self._said = 0.0, 0, 0
        self._report: Report | None = None
        self._bar: tqdm[NoReturn] | None = None
        if not settings.quiet and settings.log_format == "text" and shows_bars(sys.stderr):
            # Its watching thread would only redraw what is drawn five times a second anyway.
            tqdm.monitor_interval = 0
            self._bar = tqdm(bar_format="converting", file=sys.stderr, dynamic_ncols=True, mininterval=0)

    def show(self, report: Report) -> None:
        """Bring what is shown up to date. Called several times a second, whether or not anything has come."""
        self._report, now = report, self._clock()
        self._measure(report, now)
        if self._bar is not None:
            if now - self._drawn_at >= DRAW_SECONDS:
                self._drawn_at = now
                self._draw(self._bar, report, now)
        elif report.finished >= self._said + self._run.log_every or now - self._said_at >= LINE_SECONDS:
            self._said, self._said_at = report.finished - report.finished % self._run.log_every, now
            numbers = self._numbers(report, now)
            log.info("%s", ", ".join(progress_words(numbers)), extra=told("progress", **numbers))
        self.metrics.refresh(report)

    def close(self) -> None:
        """Show the end, and leave the bar as it is."""
        if self._bar is not None:
            if self._report:
                self._draw(self._bar, self._report, self._clock())
            self._bar.close()

    def _measure(self, report: Report, now: float) -> None:
        # A pass over objects that are done already finishes nothing, and is not silent either.
        seen = (report.finished, report.counts["listed"])
        if seen != self._seen:
            self._seen, self._moved = seen, now
        if now - self._pace[-1][0] >= 1:
            self._pace.append((now, report.finished))

    def _numbers(self, report: Report, now: float) -> dict[str, Any]:
        """What the bar, a line and a JSON record say, under the names that the last has."""
        since, before = self._pace[0]
        rate = (report.finished - before) / max(now - since, 0.001)
        left = max(0, report.expected - report.finished)
        silence = now - self._moved
        p95 = report.percentile(95)
        return {
            "done": report.finished,
            "total": report.expected,
            "total_is_final": report.is_whole or report.total is not None,
            "listed": report.counts["listed"],
            "failed": report.failed.total(),
            "per_second": round(rate, 3),
            "eta_seconds": round(left / rate) if rate else None,
            "p95_seconds": p95 and round(p95, 3),
            "remaining": report.remaining,
            "in_flight": report.in_flight(self._run.workers),
            "is_stopping": report.is_stopping,
            "silent_since": local_time(silence) if silence >= SILENCE_SECONDS else None,
        }

    def _draw(self, bar: "tqdm[NoReturn]", report: Report, now: float) -> None:
        # The width is asked for each time, because it is drawn five times a second anyway: no signal need be heard.
        columns = terminal_columns(sys.stderr)
        if columns != self._columns:
            # tqdm pads a line to the length of the last one, which would run over the edge of a window made smaller.
            bar.fp.write("\r\x1b[J")
            bar.sp = bar.status_printer(bar.fp)
            self._columns = columns
        count, *more = progress_words(self._numbers(report, now))
        while more and len(count) + LEAST_BAR + len(", ".join(more)) > columns:
            more.pop()
        bar.bar_format = f"{count} |{{bar}}| {', '.join(more)}"
        bar.n, bar.total = report.finished, report.expected
        bar.refresh()


def terminal_columns(stream: IO[str]) -> int:
    """The width of the terminal behind a stream; 0 if there is none, or none that knows."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


def shows_bars(stream: IO[str]) -> bool:
    """Whether a line that is written again and again looks like one: not in pipes, files, and the logs of CI."""
    is_dumb = os.environ.get("TERM") == "dumb" or os.environ.get("CI", "") not in {"", "0", "false"}
    return stream.isatty() and terminal_columns(stream) > 0 and not is_dumb


def progress_words(numbers: Mapping[str, Any]) -> Iterator[str]:
    """The numbers of a moment in words, the more important ones first: a narrow terminal shows only those."""
    yield f"{numbers['done']} of {'' if numbers['total_is_final'] else '~'}{numbers['total']} done"
    yield f"{numbers['failed']} failed"
    yield f"{numbers['per_second']:.1f} files/s"
    if numbers["is_stopping"]:
        yield f"stopping, {numbers['in_flight']} in flight"
    elif numbers["silent_since"]:
        waiting = f"waiting for {numbers['in_flight']} in flight" if numbers["in_flight"] else "waiting for the listing"
        yield f"nothing since {numbers['silent_since']}: {waiting}"
    elif numbers["eta_seconds"] is not None:
        yield f"ETA {timedelta(seconds=numbers['eta_seconds'])}"
    if numbers["p95_seconds"] is not None:
        yield f"p95 {numbers['p95_seconds']:.2f} s"
    if numbers["remaining"] is not None:
        yield f"quota {numbers['remaining']}"
    if not numbers["total"]:
        yield f"{numbers['listed']} listed"


class Metric(NamedTuple):
    """A family of samples: each has its own labels. A name that ends in `_total` is a counter, any other a gauge."""

    name: str
    about: str
    samples: Sequence[tuple[Mapping[str, str], float]]


# Metric -> the count that it shows. Each run counts from zero, which Prometheus takes for the restart that it is.
COUNTERS = {
    "listed_objects_total": ("listed", "Objects listed in the run."),
    "converted_objects_total": ("converted", "Objects converted in the run."),
    "already_done_objects_total": ("already_done", "Objects that were converted before the run."),
    "source_bytes_total": ("bytes_in", "Size of the objects that were converted in the run."),
    "output_bytes_total": ("bytes_out", "Size of the outputs that were stored in the run."),
    "requests_total": ("requests", "Requests sent to the API in the run."),
    "throttled_requests_total": ("throttled", "Answers 429 in the run."),
    "replays_total": ("replays", "Requests of an earlier run that were answered in this one."),
    "possible_double_charges_total": ("possible_double_charges", "Conversions that may have been charged twice."),
}
# Of the last run that ended, and kept in the file while the next one is at work, and when that one fails.
LAST_SUCCESS, LAST_EXIT_CODE = "last_success_timestamp_seconds", "last_exit_code"
FAILED_FOR_GOOD = "failed_for_good_objects"


def gauge(name: str, value: float | None, about: str) -> Metric:
    """A family with one sample, or with none while nobody knows the value."""
    return Metric(name, about, [] if value is None else [({}, value)])


def metrics_of(report: Report, workers: int) -> Iterator[Metric]:
    """The run so far. What is not known is left out."""
    for name, (count, about) in COUNTERS.items():
        yield Metric(name, about, [({}, report.counts[count])])
    skipped = [({"reason": reason}, report.counts[reason]) for reason in SKIP_REASONS]
    yield Metric("skipped_objects_total", "Objects skipped in the run, by reason.", skipped)
    failed = [({"code": code}, count) for code, count in report.failed.items()]
    yield Metric("failed_objects_total", "Objects that failed in the run, by code.", failed)
    yield gauge("left_objects", report.counts["left"], "Objects that the run has left to do.")
    yield gauge("expected_objects", report.expected, "Objects that the run is to try, as far as they are known.")
    yield gauge("in_flight_objects", report.in_flight(workers), "Objects that are with the workers.")
    yield gauge("run_duration_seconds", time.monotonic() - report.started, "Age of the run, or how long it took.")
    yield gauge("remaining_conversions", report.remaining, "Conversions that the month has left, as the API says.")
    yield gauge("conversion_p50_seconds", report.percentile(50), "Time within which half of the conversions are done.")
    yield gauge("conversion_p95_seconds", report.percentile(95), "Time within which 95 % of the conversions are done.")


def metric_text(metric: Metric, common: Mapping[str, str]) -> str:
    """A family in Prometheus' text format, with labels that all its samples have."""
    name, kind = f"s3_bulk_convert_{metric.name}", "counter" if metric.name.endswith("_total") else "gauge"
    escapes = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
    lines = [f"# HELP {name} {metric.about}", f"# TYPE {name} {kind}"]
    for labels, value in metric.samples:
        shown = ",".join(f'{label}="{text.translate(escapes)}"' for label, text in {**common, **labels}.items())
        lines.append(f"{name}{{{shown}}} {round(value, 3)}")
    return "\n".join(lines) + "\n"


class Metrics:
    """The file that `run.metrics` names: whole at any moment, and never older than 15 s while the run is at work."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = Path(settings.run.metrics) if settings.run.metrics else None
        self._workers, self._clock, self._due, self._has_warned = settings.run.workers, clock, 0.0, False
        # The checkpoint is what sets one run apart from another whose file the same node_exporter reads.
        self._labels = {"bucket": settings.s3.bucket, "checkpoint": settings.run.checkpoint}
        self._sees_all = not settings.keys_from
        self._kept = self._read_kept()

    def _read_kept(self) -> dict[str, float]:
        """What outlives a run that fails, from the file of the last one: an alert asks how old the last success is."""
        try:
            # Who reads from a device or a pipe may wait for ever.
            old = self._path.read_text(encoding="utf-8") if self._path and self._path.is_file() else ""
        except (OSError, UnicodeDecodeError):
            return {}
        pattern = rf"^s3_bulk_convert_({LAST_SUCCESS}|{LAST_EXIT_CODE}|{FAILED_FOR_GOOD})\{{.*\}} ([0-9.]+)$"
        return {name: float(value) for name, value in re.findall(pattern, old, re.MULTILINE)}

    def refresh(self, report: Report) -> None:
        """Write the file if it is time to."""
        if self._path and self._clock() >= self._due:
            self._due = self._clock() + METRICS_SECONDS
            self._write(report, is_running=True)

    def finish(self, report: Report) -> None:
        """Write what the run has come to."""
        self._kept[LAST_EXIT_CODE] = report.exit_code
        for_good = report.counts["failed_for_good"] + report.counts[FAILED_BEFORE]
        # A run that has not seen everything does not know that there are fewer than before.
        self._kept[FAILED_FOR_GOOD] = (
            for_good if self._sees_all and report.is_whole else max(for_good, self._kept.get(FAILED_FOR_GOOD, 0))
        )
        if report.exit_code is ExitCode.DONE:
            self._kept[LAST_SUCCESS] = time.time()
        self._write(report, is_running=False)

    def _write(self, report: Report, *, is_running: bool) -> None:
        kept = self._kept
        metrics = [
            *metrics_of(report, self._workers),
            gauge("running", is_running, "Whether a run is at work."),
            gauge(LAST_SUCCESS, kept.get(LAST_SUCCESS), "When a run last ended with nothing left to do."),
            gauge(FAILED_FOR_GOOD, kept.get(FAILED_FOR_GOOD), "Objects that only --retry-failed tries again."),
            gauge(LAST_EXIT_CODE, kept.get(LAST_EXIT_CODE), "Exit code of the last run that has ended."),
        ]
        try:
            if self._path:
                write_whole(self._path, "".join(metric_text(metric, self._labels) for metric in metrics))
        except OSError as problem:
            if not self._has_warned:
                log.warning("run.metrics = %s cannot be written: %s", self._path, problem.strerror)
            self._has_warned = True


class Recorder:
    """Settles outcomes: failures file, then journal, then report, so that nothing is counted that is not written."""

    def __init__(self, shared: Shared, pacer: Pacer, journal: Journal, report: Report, progress: Progress) -> None:
        self.shared, self.pacer, self.journal, self.report, self.progress = shared, pacer, journal, report, progress
        self.run = shared.settings.run
        self._can_write = True
        self._refusal: tuple[int, str] | None = None  # of the last object that the API had a word on: status and code
        self._refused = 0  # objects in a row, for that reason
        self._announced: Stop | None = None

    def record(self, notes: "queue.Queue[Note]") -> bool:
        """Settle all that comes until every thread has left. False if some had to be abandoned after the grace."""
        working = self.run.consumers + 1  # the feeder, which may outlive the workers and waits for room for its notes
        self.progress.show(self.report)
        while working:
            batch = next_batch(notes)
            self._take([note for note in batch if note is not None])
            working -= len([note for note in batch if note is None])
            self._watch_time()
            self._announce_stop()
            self.progress.show(self.report)
            if self._grace_is_over():
                return False
        return True

    def _take(self, notes: Sequence["Outcome | Counted | TotalKnown | FeedEnded"]) -> None:
        for note in notes:
            if isinstance(note, Counted):
                self.report.add_counts(note.counts)
            elif isinstance(note, TotalKnown):
                self.report.total = note.total
            elif isinstance(note, FeedEnded):
                self.report.stop = self.report.stop or note.stop
                self.report.is_whole = note.is_complete
        outcomes = [note for note in notes if isinstance(note, Outcome)]
        if outcomes:
            self.pacer.let_others_start()
            for outcome in self._settle(outcomes):
                self.report.add(outcome)
                self._watch_refusals(outcome)
            self._watch_results()

    def _settle(self, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        """The outcomes as they are on the disk. What cannot be written is left to do: its request is still recorded."""
        if self._can_write:
            try:
                # Failures first: after a crash in between, a line is there twice, never missing.
                self._append_failures([outcome for outcome in outcomes if outcome.event is Event.FAILED])
                self.journal.end(outcomes, time.time())
                return outcomes
            except (RunStopped, UserError) as error:
                self._can_write = False
                self.shared.stop.request(stop_for(error))
        return [replace(outcome, event=Event.LEFT) for outcome in outcomes]

    def _append_failures(self, failures: Sequence[Outcome]) -> None:
        lines = (json.dumps(self._failure_line(outcome), ensure_ascii=False) + "\n" for outcome in failures)
        try:
            if failures:
                with open(self.run.failures, "a", encoding="utf-8", opener=opened_at_once) as appended:
                    appended.writelines(lines)
        except OSError as problem:
            raise UserError(
                f"run.failures = {self.run.failures} cannot be written: {problem.strerror}",
                "free some space, or set run.failures to another path, and run it again",
            ) from None

    def _failure_line(self, outcome: Outcome) -> dict[str, object]:
        task = outcome.task
        return {
            "ts": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "job": task.job,
            "bucket": self.journal.bucket,
            "key": task.key,
            "etag": task.etag,
            "size": task.size,
            "target": task.target,
            "status": outcome.status,
            "code": outcome.code,
            "message": outcome.message,
            "attempts": outcome.requests,
            "permanent": outcome.permanent,
        }

    def _watch_results(self) -> None:
        most, failed = self.run.max_failure_rate, costly(self.report.failed)
        tried = self.report.counts["converted"] + failed.total()
        if most is not None and tried >= FAILURES_BEFORE_RATE_COUNTS and failed.total() > most * tried:
            reasons = ", ".join(f"{code} {count}" for code, count in failed.most_common(3))
            share = f"run.max_failure_rate = {100 * most:.3g}%"
            because = f"{failed.total()} of {tried} failed ({reasons}), more than {share}"
            hint = f"see {self.run.failures}; then run it again, or raise run.max_failure_rate"
            self.shared.stop.request(Stop(because, hint, is_limit=True))

    def _watch_refusals(self, outcome: Outcome) -> None:
        """Stop the run where one refusal after another shows that it is not the objects that are refused."""
        is_converted = outcome.event is Event.CONVERTED and not outcome.task.copy
        if not (is_converted or (outcome.event is Event.FAILED and outcome.status)):
            return
        refusal = (outcome.status, outcome.code) if outcome.status in REFUSALS else None
        self._refused = self._refused + 1 if refusal == self._refusal else 1
        self._refusal = refusal
        if refusal and self._refused == REFUSALS_ENDURED:
            stop = refusal_by_api(*refusal, outcome.message).stop
            self.shared.stop.request(replace(stop, because=f"{REFUSALS_ENDURED} in a row: {stop.because}"))

    def _watch_time(self) -> None:
        # Looked at at least five times a second, whether or not anything has come.
        limit = self.run.max_runtime
        if limit is not None and time.monotonic() - self.report.started > limit:
            hint = "run it again: it goes on where this run ended"
            self.shared.stop.request(Stop("run.max_runtime is over", hint, is_limit=True))

    def _announce_stop(self) -> None:
        self.shared.stop.pass_on()
        stop = self.shared.stop.stop
        # A signal is news though the run is stopping already: only then is there a grace.
        if stop and stop != self._announced:
            self.report.is_stopping, self._announced = True, stop
            again = (
                f" for up to {self.run.shutdown_grace:.0f} s; once more ends it at once" if stop.is_by_signal else ""
            )
            fields = {"because": stop.because, "hint": stop.hint, "exit_code": int(stop.exit_code)}
            log.warning("%s; waiting for what is in flight%s", stop.because, again, extra=told("stop", **fields))

    def _grace_is_over(self) -> bool:
        flag = self.shared.stop
        return (
            flag.stop is not None and flag.stop.is_by_signal and time.monotonic() - flag.since > self.run.shutdown_grace
        )


def next_batch(notes: "queue.Queue[Note]") -> list[Note]:
    """The notes of a moment, after waiting for the first of them: they are committed together."""
    batch: list[Note] = []
    try:
        # Not for ever: a signal, a time limit and a bar want attention while the API is silent.
        batch.append(notes.get(timeout=0.2))
        closes_at = time.monotonic() + COMMIT_SECONDS
        while len(batch) < 500:
            batch.append(notes.get(timeout=max(0.0, closes_at - time.monotonic())))
    except queue.Empty:
        pass
    return batch


def stop_for(error: RunStopped | UserError) -> Stop:
    """What an error at the recorder's desk means for the run."""
    return error.stop if isinstance(error, RunStopped) else Stop(error.message, error.hint)


# Why a file cannot be replaced that can be written into: it is mounted, or its folder takes no new ones.
NOT_REPLACED = frozenset({errno.EACCES, errno.EBUSY, errno.EPERM, errno.EROFS, errno.EXDEV})


def write_whole(path: Path, content: str) -> None:
    """Put a whole file in place of the old one, or leave that. What cannot be replaced is written into. Raises OSError.

    That is a device, a pipe, an open file of this process (`/dev/stdout`), and a mounted file. A link stays a link.
    """
    number = number_of_open_file(path)
    if number is not None or (path.exists() and not path.is_file()):
        write_into(path if number is None else os.dup(number), content)
        return
    # The same directory is the same file system, on which a rename is atomic.
    real = Path(os.path.realpath(path))
    draft = real.with_name(f"{real.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(content, encoding="utf-8")
        draft.replace(real)
    except OSError as problem:
        if problem.errno not in NOT_REPLACED or not real.exists():
            raise
        write_into(real, content)
    finally:
        with contextlib.suppress(PermissionError):
            draft.unlink(missing_ok=True)


def write_into(place: Path | int, content: str) -> None:
    """Write to what is there already. Raises OSError."""
    with open(place, "w", encoding="utf-8", opener=opened_at_once) as file:
        file.write(content)


def opened_at_once(path: str, flags: int) -> int:
    """Open a file; of a pipe that nobody reads, raise OSError instead of waiting until somebody does."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def number_of_open_file(path: Path) -> int | None:
    """The number of the open file of this process that a path leads to, as /dev/stdout does; None if it leads to none.

    Opened by its path, such a file would be written from its beginning, over what is there.
    """
    own = {os.path.realpath(folder) for folder in ("/dev/fd", "/proc/self/fd")}
    step = os.fspath(path)
    for _ in range(40):
        folder, name = os.path.split(step)
        if name.isdigit() and os.path.realpath(folder) in own:
            return int(name)
        if not os.path.islink(step):
            return None
        step = os.path.join(folder, os.readlink(step))
    return None


########################################################################################################################
# Commands. `run` alone knows all the rooms.
########################################################################################################################


def note_in_flight(journal: Journal, note: InFlight) -> None:
    """Write down what is out for a task. Raises RunStopped where that cannot be done."""
    try:
        journal.note(note.request)
    except UserError as error:
        raise RunStopped(error.message, error.hint) from None


def run(settings: Settings, stop: StopFlag) -> Report:
    """Convert what there is to convert. Raises UserError or RunStopped if nothing could be started."""
    checkpoint = Path(settings.run.checkpoint)
    refuse_unwritable(Path(settings.run.failures), "run.failures")
    refuse_unwritable(Path(settings.run.summary or os.devnull), "run.summary")
    refuse_unwritable(Path(settings.run.metrics or os.devnull), "run.metrics")
    refuse_wrong_certificates(settings.api.url, *CA_BUNDLES)
    with RunLock(checkpoint), Journal(checkpoint, settings.s3.bucket, settings.s3.written_bucket) as journal:
        # What is imported is never garbage: looking at it again and again would cost a third of reading a page.
        gc.freeze()
        tasks: queue.Queue[Task | None] = queue.Queue(2 * settings.run.workers)
        notes: queue.Queue[Note] = queue.Queue(8 * settings.run.workers)
        pacer = Pacer(settings.api.requests_per_minute, settings.shard.count)
        gate = Gate(pacer.hear)
        noting = partial(note_in_flight, journal)
        shared = Shared(settings, stop, gate, Bucket(settings, stop), UrlTrust(), notes.put, noting)
        report, progress = Report(), Progress(settings)
        stop.in_flight = partial(report.in_flight, settings.run.workers)
        say_start(settings, journal)
        # The feeder is one more thread. The pool's own queue has no bound, so each thread runs one loop for its life.
        pool = ThreadPoolExecutor(settings.run.consumers + 1)
        feeder = Feeder(shared, pacer, journal, tasks)
        try:
            for work in workforce(shared, pacer, tasks):
                pool.submit(work_until_done, work, shared).add_done_callback(lambda _: notes.put(None))
            if not (settings.quiet or settings.keys_from):
                TotalCount(feeder).start()
            # The last one: where the system has not enough threads, nothing has been listed or sent.
            pool.submit(work_until_done, feeder.run, shared).add_done_callback(lambda _: notes.put(None))
        except RuntimeError:
            for _ in range(settings.run.consumers):
                tasks.put(None)
            raise
        # The main thread records, because it is the one that signals wake.
        is_complete = Recorder(shared, pacer, journal, report, progress).record(notes)
        pool.shutdown(wait=is_complete)
        progress.close()
        report.stop = stop.stop or report.stop
        # Those of workers that had to be abandoned count too.
        report.counts["requests"] = max(report.counts["requests"], gate.requests)
        close_accounts(report, is_complete=is_complete)
        # A file of keys names some objects, and a request for another one is as much needed as before.
        if not (report.stop or settings.keys_from):
            journal.forget_sent_before(time.time() - SENT_KEPT_SECONDS)
        if settings.run.summary:
            write_summary(Path(settings.run.summary), report)
        progress.metrics.finish(report)
        return report


def say_start(settings: Settings, journal: Journal) -> None:
    """Say what is about to be done."""
    about, workers = describe(settings), settings.run.workers
    fields = {"bucket": settings.s3.bucket, "jobs": [job.name for job in settings.jobs], "workers": workers}
    log.info("converting %s with %d workers", about, workers, extra=told("start", **fields))
    if settings.retry_failed:
        count = journal.failed_for_good(settings.jobs)
        said = f"--retry-failed: {counted(count, 'object')} that failed for good will be tried again"
        log.info("%s", said, extra=told("retry", count=count))


def describe(settings: Settings) -> str:
    """What a run is about, in a few words."""
    routes = (f"s3://{settings.s3.bucket}/{job.prefix} to {job.options.target}" for job in settings.jobs)
    return ", ".join(dict.fromkeys(routes)) + settings.shard.named


def refuse_unwritable(path: Path, name: str) -> None:
    """Raise UserError if a file cannot be appended to; make none."""
    try:
        # Not even for a moment: another run may be making the same file, and an empty one would say "no failures".
        if not path.exists():
            tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))).close()
        # To open a pipe is to wait for its reader, or to tell that reader that this was all.
        elif not path.is_fifo() and number_of_open_file(path) is None:
            path.open("ab").close()
    except OSError as problem:
        raise UserError(
            f"{name} = {path} cannot be written: {problem.strerror}", f"set {name} to another path"
        ) from None


def close_accounts(report: Report, *, is_complete: bool) -> None:
    """Every listed object must have its count. What was abandoned is left to do."""
    missing = report.unaccounted()
    # What a run was stopped for is never replaced by what came of it.
    if not is_complete or (missing and report.stop):
        report.counts["left"] += missing
    elif missing:
        report.stop = Stop(
            f"{missing} of the listed objects have no count", "this is a bug of the program; please report it"
        )
    elif report.is_whole and not report.counts["left"] and report.stop and report.stop.is_limit:
        # The quota, the cap or the time was used up by the very last object: nothing is left that it could stop.
        report.stop = None


def write_summary(path: Path, report: Report) -> None:
    """Write `run.summary`. A failure to do so is said, and is no failure of the run."""
    try:
        write_whole(path, json.dumps(report.summary(), indent=2) + "\n")
    except OSError as problem:
        log.warning("run.summary = %s cannot be written: %s", path, problem.strerror)


def human_bytes(count: float) -> str:
    """A size for people."""
    # Decimal, as S3's price list counts.
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """A duration for people, in its largest unit."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


# What to do about a failure, by its code: the API's, or one of this program's.
REMEDIES = {
    "bad_request": "the API does not take this input: open one of them; it may be damaged, or not what its name says",
    "unsupported_route": "the API does not convert from this format to that: leave it out with convert.exclude",
    "file_too_large": "your plan takes no larger ones: lower api.max_size to skip the attempt, or change the plan",
    "fetch_failed": "the API could not read the presigned URL: set api.transfer = upload",
    "service_unavailable": "the API's converter was down: run it again later",
    "rate_limited": "the API's limit left no room for too long: lower api.requests_per_minute, or run it again later",
    "http_403": "refused without a code of the API's: is there a proxy or a filter on the way? Run it again",
    "http_413": "refused without a code of the API's: if nothing on the way limits the size, lower api.max_size",
    "http_422": "refused without a code of the API's: if it stays so, open one of the files; it may be damaged",
    "too_large": "raise api.max_size, or api.jobs_above from never, if your plan takes such sizes",
    "network": "the connection broke, again and again: check network and proxy, and run it again",
    "html_answer": "a web page came in place of the file: is there a proxy or a captive portal on the way?",
    "json_answer": "an error came in place of the file: run it again",
    "text_answer": "words came in place of the file, such as an error's: run it again",
    "wrong_type": "the API answered with another format and has been paid: ask its support, with the key of an object",
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
    "look_failed": "S3 did not say whether something lies under the output key: run it again",
    "store_failed": "S3 did not take it: allow s3:PutObject on s3.output_key, check the network, and run it again",
    "output_collision": "its output key is taken: its message says what to put into s3.output_key, such as {ext}",
    "output_key_too_long": "shorten s3.output_key",
    "worker_died": "its size may need more memory than there is: give each process fewer workers, and run it again",
    "bug": "a bug of this program: run it again with -v, and report what it prints",
}


PAID_TWICE_HINT = (
    "the API has seen the request before, from a run that this checkpoint does not know; "
    "compare with your account's usage page"
)


def remedy(code: str) -> str:
    """What to do about failures with a code."""
    # The API may have codes that no page of it names; the status, where that is all there is, still says whose fault.
    if code.startswith("http_5"):
        return "the API's side: run it again later"
    if re.fullmatch("http_[134]..", code):
        return REMEDIES.get(code, REMEDIES["http_403"])
    unknown = "open one of the files: it may be damaged or protected by a password; its message says more"
    return REMEDIES.get(code, unknown)


def shown(text: str) -> str:
    """A key or a message of somebody else's on one line: it may hold line ends and orders to the terminal."""
    plain = text if text.isprintable() else json.dumps(text)
    return plain if len(plain) <= MOST_SHOWN else plain[: MOST_SHOWN - 3] + "..."


def failure_lines(report: Report) -> Iterator[str]:
    """The failures by code, the most frequent first: how many, one of them, what was said of it, what to do."""
    for code, count in report.failed.most_common():
        example = report.examples[code]
        yield f"failed        {count} {shown(code)}"
        yield f"              for example {shown(example.task.key)}: {shown(example.message)}"
        yield f"              remedy: {remedy(code)}"


def next_steps(report: Report, settings: Settings) -> Iterator[str]:
    """What to do about what is left."""
    if report.stop:
        yield f"stopped: {report.stop.because}"
        yield f"hint: {report.stop.hint}"
    elif report.counts["left"]:
        yield "next: run it again for what is left to do"
    for_good = report.counts["failed_for_good"]
    # To try again what has been deleted is no plan.
    passing = report.failed.total() - for_good - report.failed["source_gone"]
    if passing:
        yield f"next: the next run tries {passing} of the failures again"
    if for_good:
        yield f"next: {for_good} failed for good; when the cause is removed, run it with --retry-failed"
    if before := report.counts[FAILED_BEFORE]:
        yield f"next: {before} failed for good in an earlier run; --status counts them, --retry-failed tries them again"
    if report.failed:
        yield f"failures are in {settings.run.failures}"


def summary_lines(report: Report, settings: Settings) -> Iterator[str]:
    """The end of a run in words."""
    found = report.summary()
    if report.stop and not report.counts[LISTED]:
        # It never began: zeros would hide why.
        yield from next_steps(report, settings)
        return
    yield f"converted     {found['converted']}"
    yield f"already done  {found['already_done']}"
    yield from (f"skipped       {count} {reason}" for reason, count in found["skipped"].items())
    yield from failure_lines(report)
    if found["left"]:
        yield f"left to do    {found['left']}"
    yield f"bytes         {human_bytes(found['bytes_in'])} in, {human_bytes(found['bytes_out'])} out"
    yield f"time          {found['seconds']:.1f} s, {found['per_second']:.1f} files/s"
    if found["p50_seconds"] is not None:
        yield f"latency       p50 {found['p50_seconds']:.2f} s, p95 {found['p95_seconds']:.2f} s"
    replays = counted(found["replays"], "replay")
    yield f"requests      {found['requests']} ({found['throttled']} throttled, {replays})"
    if found["possible_double_charges"]:
        twice = counted(found["possible_double_charges"], "conversion")
        yield f"warning       {twice} may have been charged twice, for example {shown(report.maybe_paid_twice)}"
        yield f"              {PAID_TWICE_HINT}"
    if found["remaining"] is not None:
        yield f"quota         {counted(found['remaining'], 'conversion')} left"
    yield from next_steps(report, settings)


def summary_line(report: Report) -> str:
    """The end of a run in one line."""
    found = report.summary()
    before = report.counts[FAILED_BEFORE]
    # Outputs between the sources are nothing that anybody would have converted.
    skipped = sum(found["skipped"].values()) - before - report.counts[OWN_OUTPUT]
    return (
        f"converted {found['converted']} in {found['seconds']:.1f} s, already done {found['already_done']}, "
        f"skipped {skipped}, {f'failed before {before}, ' if before else ''}failed {report.failed.total()}, "
        f"left {found['left']}"
    )


########################################################################################################################
# Forecast. `--dry-run` plans the whole bucket by the very rules of a run, and says what it would come to. It sends
# nothing to be converted and writes nothing: what a run would claim is remembered in a temporary table.
########################################################################################################################


class Forecast:
    """What a run would come to."""

    def __init__(self, settings: Settings, journal: JournalInMind) -> None:
        self.settings, self._journal = settings, journal
        self.counts: Counter[tuple[str, str]] = Counter()  # (job, what) -> objects, or bytes; no job's own under ""
        self.failed: Counter[tuple[str, str]] = Counter()  # (job, code) -> objects
        self.examples: dict[str, Outcome] = {}  # code -> the first failure that has it
        self.latencies = journal.latencies()
        self.usage, self.usage_problem = Usage(), ""

    def plan(self, tasks: Sequence[Task], planner: Planner) -> None:
        """Count a page: what is for workers to do, and what needs none, a failure or an output that is there."""
        for task in tasks:
            kind = TO_COPY if task.copy else TO_RESUME if task.may_be_done else TO_CONVERT
            self.counts[task.job, kind] += 1
            self.counts[task.job, "bytes"] += task.size if kind == TO_CONVERT else 0
        for outcome in planner.settled:
            if outcome.event is Event.FAILED:
                self.failed[outcome.task.job, outcome.code] += 1
                self.examples.setdefault(outcome.code, outcome)
            else:
                self.counts[outcome.task.job, ALREADY_DONE] += 1
        found = [outcome.task for outcome in planner.settled if outcome.event is Event.FOUND]
        self._journal.claim([*tasks, *found])
        self.counts.update(planner.counts)
        planner.counts.clear()
        planner.settled.clear()

    def ask_usage(self) -> None:
        """Learn what the month has left, where the API says it; a forecast is one without it, too."""
        try:
            if not self.settings.api.key:
                raise UserError("there is no API key", self.settings.key_problem)
            self.usage = ask_usage(self.settings.api)
        except (UserError, RunStopped) as problem:
            stop = stop_for(problem)
            self.usage_problem = f"{stop.because}; {stop.hint}"

    def total(self, what: str) -> int:
        """A count of all jobs together, and of no job."""
        return sum(count for (_, counted), count in self.counts.items() if counted == what)

    @property
    def conversions(self) -> int:
        """Conversions to pay for at the most: of those in flight, the API may have done none yet."""
        return self.total(TO_CONVERT) + self.total(TO_RESUME)

    @property
    def in_one_run(self) -> int:
        """Those that the cap leaves to the next run."""
        cap = self.settings.api.max_conversions
        return self.conversions if cap is None else min(cap, self.conversions)

    @property
    def requests_per_minute(self) -> float | None:
        """What is known of the rate before anything is sent: this shard's share of the smaller limit."""
        known = [limit for limit in (self.settings.api.requests_per_minute, self.usage.requests_per_minute) if limit]
        return min(known) / self.settings.shard.count if known else None

    @property
    def latency_seconds(self) -> float:
        """The median of the newest conversions, or what the API publishes."""
        return statistics.median(self.latencies) if self.latencies else PUBLISHED_LATENCY_SECONDS

    @property
    def seconds(self) -> float:
        """How long the next run would take, bound by the rate or by its workers."""
        pace = 60 / self.requests_per_minute if self.requests_per_minute else 0.0
        return self.in_one_run * max(pace, self.latency_seconds / self.settings.run.workers)

    def _of_job(self, name: str) -> dict[str, Any]:
        kinds = (TO_CONVERT, "bytes", TO_RESUME, TO_COPY, RETRIED, ALREADY_DONE)
        failed = {code: count for (job, code), count in self.failed.items() if job == name}
        return {**{kind: self.counts[name, kind] for kind in kinds}, "skipped": self._skipped(name), "failed": failed}

    def _skipped(self, name: str) -> dict[str, int]:
        return {reason: self.counts[name, reason] for reason in SKIP_REASONS if self.counts[name, reason]}

    def document(self, pages_asked: int) -> dict[str, Any]:
        """All of it as JSON has it; times in seconds, sizes in bytes. `pages_asked`: of listings."""
        wanted = self.conversions
        examples = {
            code: {"key": failure.task.key, "said": failure.message, "remedy": remedy(code)}
            for code, failure in self.examples.items()
        }
        return {
            "listed": self.total(LISTED),
            "jobs": {job.name: self._of_job(job.name) for job in self.settings.jobs},
            "skipped": self._skipped(""),
            "examples": examples,
            "conversions": wanted,
            "conversions_in_one_run": self.in_one_run,
            "max_conversions": self.settings.api.max_conversions,
            "plan": self.usage.plan,
            "monthly_limit": self.usage.monthly_limit,
            "remaining": self.usage.remaining,
            "requests_per_minute": self.requests_per_minute,
            "latency_seconds": round(self.latency_seconds, 3),
            "latency_is_measured": bool(self.latencies),
            "seconds": round(self.seconds),
            "s3_requests": {"LIST": pages_asked, "COPY": self.total(TO_COPY)} | dict.fromkeys(["GET", "PUT"], wanted),
            "warnings": list(self.warnings()),
        }

    def warnings(self) -> Iterator[str]:
        """What a person should know before the run."""
        if not self.total(LISTED):
            yield from empty_listing_warnings(self.settings)
        yield from quota_warnings(self.in_one_run, self.usage, self.usage_problem, self.settings.api)
        most = self.settings.run.max_failure_rate
        failed = sum(costly({code: count}).total() for (_, code), count in self.failed.items())
        tried = self.conversions + failed
        if most is not None and failed > most * tried and tried >= FAILURES_BEFORE_RATE_COUNTS:
            yield f"{failed} of {tried} would fail, more than run.max_failure_rate: the run would stop early"


def quota_warnings(wanted: int, usage: Usage, problem: str, api: ApiOptions) -> Iterator[str]:
    """What the month's quota means for so many conversions."""
    if usage.remaining is None:
        said = problem or "the API does not say"
        yield f"what the month has left is not known ({said}), and plans may bill what is beyond it: see --limit"
    elif wanted > usage.remaining:
        beyond = wanted - usage.remaining
        what = "are refused, and the run stops there" if usage.bills_overage is False else "are billed as overage"
        yield f"{beyond} conversions more than the month has left {what}; --limit {usage.remaining} keeps within it"
    elif api.keep_remaining and wanted > usage.remaining - api.keep_remaining:
        yield f"the run would stop when {api.keep_remaining} conversions are left (api.keep_remaining)"


def make_forecast(settings: Settings) -> dict[str, Any]:
    """What the next run would do, as JSON has it. Raises UserError or RunStopped where it could not even look."""
    path = Path(settings.run.checkpoint)
    with JournalInMind(path, settings.s3.bucket, settings.s3.written_bucket) as journal:
        bucket, forecast = Bucket(settings), Forecast(settings, journal)
        bucket.check()
        planner = Planner(settings, bucket, journal, StopFlag())
        said_at = time.monotonic()
        for page, routes in planner.pages(lambda: LIST_THREADS):
            forecast.plan(planner.tasks_of(page, routes), planner)
            if time.monotonic() - said_at > LINE_SECONDS:
                said_at = time.monotonic()
                log.info("%d objects listed so far", forecast.total(LISTED))
        forecast.ask_usage()
        return forecast.document(bucket.pages_asked)


def forecast_lines(found: Mapping[str, Any], settings: Settings) -> Iterator[str]:
    """A forecast in words."""
    yield f"{describe(settings)}: {found['listed']} listed"
    for name, job in found["jobs"].items():
        yield from job_forecast_lines(name, job, found["examples"])
    yield from (f"skipped       {count} {reason}" for reason, count in found["skipped"].items())
    cap, left = found["max_conversions"], found["remaining"]
    month = "" if left is None else f"; {left} are left of this month's {found['monthly_limit'] or 'quota'}"
    limit = f", {found['conversions_in_one_run']} of them in the next run (api.max_conversions = {cap})" if cap else ""
    yield f"conversions   {found['conversions']} to pay for at the most{limit}{month}"
    yield f"time          about {human_seconds(found['seconds'])}: {pace_words(found, settings)}"
    yield "S3 requests   " + ", ".join(f"{count} {name}" for name, count in found["s3_requests"].items() if count)
    yield from (f"warning       {warning}" for warning in found["warnings"])
    yield "nothing was sent to be converted, and nothing was written"


def job_forecast_lines(name: str, job: Mapping[str, Any], examples: Mapping[str, Any]) -> Iterator[str]:
    """One job of a forecast in words."""
    yield f"job {name}"
    yield f"  to convert  {job[TO_CONVERT]}, {human_bytes(job['bytes'])}"
    if job[TO_RESUME]:
        yield f"  in flight   {job[TO_RESUME]}, asked for again: free of charge where the API has done the work"
    if job[TO_COPY]:
        yield f"  to copy     {job[TO_COPY]} within S3, free of charge"
    if job[RETRIED]:
        yield f"  of these    {job[RETRIED]} failed before and would be tried again"
    yield f"  done        {job[ALREADY_DONE]} already"
    yield from (f"  skipped     {count} {reason}" for reason, count in job["skipped"].items())
    for code, count in job["failed"].items():
        key, said = shown(examples[code]["key"]), shown(examples[code]["said"])
        yield f"  would fail  {count} {code}, for example {key}: {said}"
        yield f"              remedy: {examples[code]['remedy']}"


def pace_words(found: Mapping[str, Any], settings: Settings) -> str:
    """What bounds the time of a run."""
    source = "as measured" if found["latency_is_measured"] else "as the API publishes"
    workers = f"{settings.run.workers} workers at {found['latency_seconds']:.1f} s each ({source})"
    if found["requests_per_minute"] is None:
        return f"{workers}; the rate limit is not known"
    return f"{found['requests_per_minute']:.0f} requests a minute, {workers}"


########################################################################################################################
# Looking. Commands that convert nothing and leave nothing behind: `--status` reads the checkpoint alone, `--why` asks
# S3 and the very rules of a run, `--check` proves what a run needs. None takes the lock: a run may be at work.
########################################################################################################################


def local_date(seconds: float) -> str:
    """A time (Unix seconds) in the local zone, with how long ago that is."""
    shown = datetime.fromtimestamp(seconds).astimezone().isoformat(sep=" ", timespec="seconds")
    return f"{shown} ({human_seconds(max(0.0, time.time() - seconds))} ago)"


def status_lines(settings: Settings) -> Iterator[str]:
    """What the checkpoint knows. Raises UserError if there is none."""
    path = Path(settings.run.checkpoint)
    holder = RunLock(path).holder()
    with JournalReader(path, settings.s3.bucket, settings.s3.written_bucket) as journal:
        if not journal.is_there:
            raise UserError(f"there is no checkpoint {path}", shards_hint(path) or HINT_WITHOUT_CHECKPOINT)
        last = journal.last_activity()
        yield f"checkpoint     {path}, {human_bytes(journal.bytes_on_disk())}"
        yield f"run            {f'at work: {holder}' if holder else 'none is at work'}"
        yield f"last activity  {local_date(last) if last else 'none'}"
        jobs = {job.fingerprint: job for job in settings.jobs}
        for tally in journal.tallies():
            yield from tally_lines(tally, jobs.get(tally.fingerprint), is_at_work=bool(holder))


HINT_WITHOUT_CHECKPOINT = "start it where the runs are started, or set run.checkpoint"


def shards_hint(checkpoint: Path) -> str:
    """Which shard to ask for, where only the checkpoints of shards are there; empty if none is."""
    stem, ending = os.path.splitext(checkpoint.name)
    for path in sorted(checkpoint.parent.iterdir()) if checkpoint.parent.is_dir() else ():
        if found := re.fullmatch(rf"{re.escape(stem)}\.(\d+)-of-(\d+){re.escape(ending)}", path.name):
            return f"{path.name} is here: give --shard {found[1]}/{found[2]}"
    return ""


def tally_lines(tally: Tally, known: Job | None, *, is_at_work: bool) -> Iterator[str]:
    """The states of the objects of one bucket and fingerprint."""
    # A job may have been renamed since, or have left the configuration.
    job = f"job {known.name}" if known else f"{tally.job}, no job of this configuration"
    place = f"/{known.output_key}" if known else ""
    yield ""
    # Until its first outcome, a fingerprint is a number that says nothing.
    if tally.target:
        yield f"s3://{tally.bucket} to {tally.target} in s3://{tally.output_bucket}{place}: {job}"
    else:
        yield f"s3://{tally.bucket}: {job}, nothing finished yet"
    for event in (Event.CONVERTED, Event.FOUND):
        yield f"  {event.value:<11}  {sum(n for (said, _, _), n in tally.states.items() if said == event.value)}"
    for is_permanent, words in ((True, "for good"), (False, "for now")):
        codes = {
            code: n for (said, lasts, code), n in tally.states.items() if said == "failed" and lasts is is_permanent
        }
        listed = ", ".join(f"{code} {count}" for code, count in sorted(codes.items(), key=lambda pair: -pair[1]))
        yield f"  failed       {sum(codes.values())} {words}{': ' if listed else ''}{listed}"
    oldest = f", the oldest since {local_date(tally.oldest_sent_at)}" if tally.oldest_sent_at else ""
    if is_at_work or not tally.in_flight:
        yield f"  in flight    {tally.in_flight}{oldest}"
    else:
        yield f"  interrupted  {tally.in_flight}, asked for again by the next run{oldest}"


def why_lines(settings: Settings, key: str) -> Iterator[str]:
    """All that is known about one object, and what the next run would do with it, which is the last line."""
    try:
        key.encode()
    except UnicodeEncodeError:
        raise UserError("--why: the key is not UTF-8, and S3 has no such keys", "check the terminal's locale") from None
    key = key.removeprefix(f"s3://{settings.s3.bucket}/")
    if not key:
        raise UserError("--why: there is no key", "give the key of an object, such as photos/a.png")
    path = Path(settings.run.checkpoint)
    with JournalReader(path, settings.s3.bucket, settings.s3.written_bucket) as journal:
        yield f"object         s3://{settings.s3.bucket}/{shown(key)}"
        yield from checkpoint_lines(journal, key)
        bucket, source, would = foresee(settings, journal, key)
        absent = "no" if bucket else "not known (S3 did not answer)"
        yield f"in the bucket  {source_facts(source) if source else absent}"
        for job in settings.jobs:
            yield from output_lines(job, key, journal)
            yield from made_lines(job, key, bucket, source) if bucket else ()
        yield f"the next run would {would}"


def foresee(settings: Settings, journal: JournalReader, key: str) -> tuple[Bucket | None, S3Object | None, str]:
    """The bucket, if it can be reached, the object, if it is there, and what the next run would do with it."""
    bucket = source = None
    try:
        reached = Bucket(settings)
        reached.check()
        source = reached.look_up(key)
        bucket = reached
        if source is None:
            meant = key.lstrip("/")
            near = f"; did you mean {shown(meant)}?" if meant != key and meant and reached.look_up(meant) else ""
            return bucket, None, f"do nothing: it is not in the bucket{near}"
        return bucket, source, steps_of_next_run(settings, journal, bucket, source)
    except RunStopped as stopped:
        return bucket, source, f"stop before it: {stopped.stop.because}; {stopped.stop.hint}"
    except UserError as error:
        return bucket, source, f"not start: {error.message}; {error.hint}"


def source_facts(source: S3Object) -> str:
    """What the listing says of an object."""
    archived = ", archived" if source.archived else ""
    return f"{human_bytes(source.size)}, ETag {source.etag}, written {local_date(source.modified)}{archived}"


def checkpoint_lines(journal: JournalReader, key: str) -> Iterator[str]:
    """What the checkpoint says of one object: at most ten rows, and what is in flight."""
    if not journal.is_there:
        yield f"checkpoint     there is none ({journal.path})"
        return
    # Before the outcomes: what is settled in between is told twice rather than not at all.
    requests_in_flight = journal.requests_of(key)
    # An object that fails in every run has a row of each.
    rows = journal.history(key, 10)
    # No URL is shown: it is signed.
    yield f"checkpoint     {'newest first:' if rows else 'it has not been converted, found or failed'}"
    for row in rows:
        lasting = "for good" if row["permanent"] else "for now"
        failure = f" {lasting}: {shown(row['code'] + ' ' + row['message'])}" if row["event"] == "failed" else ""
        made = f" as {shown(row['output_key'])}" if not failure else ""
        yield f"  {local_date(row['time'])} {row['event']}{failure}{made}, to {row['target']}, ETag {row['etag']}"
    for sent in requests_in_flight:
        yield f"in flight      since {local_date(sent['sent_at'])}, for {shown(sent['claim'])}, ETag {sent['etag']}"


def output_lines(job: Job, key: str, journal: JournalReader) -> Iterator[str]:
    """Where a job puts the output of an object, and whose that key is."""
    planned = output_key(job, key)
    claim = [claim_of(planned)]
    owner = {**journal.claimants(claim), **journal.owners(claim)}.get(claim[0])
    whose = "free" if owner is None else "its own" if owner == key else f"taken by {shown(owner)}"
    yield f"output key     {shown(planned)} (job {job.name}), {whose}"


def made_lines(job: Job, key: str, bucket: Bucket, source: S3Object | None) -> Iterator[str]:
    """What lies under the output key of an object."""
    try:
        found = bucket.made_of(output_key(job, key))
    except ObjectFailed as failure:
        yield f"output         it cannot be told: {shown(failure.message)}"
        return
    for made, metadata in found.items():
        etag = metadata.get("source-etag")
        if not is_made_of(metadata, bucket.name, key):
            version = "no output of this object"
        else:
            version = "made of this version" if source and etag == source.etag else f"made of another version, {etag}"
        yield f"output         {shown(made)} is there, {version}"


def steps_of_next_run(settings: Settings, journal: JournalReader, bucket: Bucket, source: S3Object) -> str:
    """What the next run would do with an object, job by job: asked of the planner, which is what decides it."""
    planner = Planner(settings, bucket, journal, StopFlag())
    routes = [route for route in planner.routes if source.key.startswith(route.job.prefix)]
    steps = {task.fingerprint: step_for(task, bucket) for task in planner.tasks_of([source], routes)}
    # What needs no worker is told to the recorder: failures that cost nothing, and outputs that are found.
    for outcome in planner.settled:
        what = f"fail: {outcome.code}, {outcome.message}" if outcome.code else "take the output that is there"
        steps[outcome.task.fingerprint] = shown(what)
    by_job = {route.job.name: step_of(route, source, planner, steps) for route in planner.routes}
    if len(by_job) == 1:
        return "".join(by_job.values())
    return "; ".join(f"{step} (job {name})" for name, step in by_job.items())


REASONS_TO_LEAVE = {
    FAILED_BEFORE: "it failed for good before; --retry-failed tries it again",
    SAME_FORMAT: "same_format: it is in the target format already; see convert.same_format",
    UNMATCHED: "not_matched: globs, sizes or ages leave it out; see convert.include",
    OWN_OUTPUT: "own_output: it lies where outputs go; see s3.output_key",
}


def step_of(route: Route, source: S3Object, planner: Planner, steps: Mapping[str, str]) -> str:
    """What becomes of an object in one job; `steps`: by fingerprint, which several jobs may share."""
    if not source.key.startswith(route.job.prefix):
        return f"not list it, for its key does not begin with {route.job.prefix}"
    # By itself, so that the only reason that is counted is this job's.
    planner.counts.clear()
    planner.tasks_of([source], [route])
    reasons = [name for _, name in planner.counts if name not in {LISTED, RETRIED}]
    if not reasons and route.job.fingerprint not in steps:
        claim, count = claim_of(output_key(route.job, source.key)), planner.settings.shard.count
        reasons = [
            f"it belongs to shard {each}" for each in (Shard(i, count) for i in range(count)) if each.owns(claim)
        ]
    said = ", ".join(REASONS_TO_LEAVE.get(name, name) for name in reasons)
    return f"leave it: {said}" if said else steps[route.job.fingerprint]


def step_for(task: Task, bucket: Bucket) -> str:
    """What a worker would do with a task."""
    # After a request that an earlier run made, the worker looks before it sends anything.
    try:
        if task.look_first and bucket.output_of(task):
            return "find its output, which is there, and pay nothing"
        if task.look_first or task.among_sources:
            bucket.refuse_to_overwrite(task)
    except ObjectFailed as failure:
        return f"fail: {failure.code}, {shown(failure.message)}"
    if task.copy:
        return "copy it, at no charge"
    if task.may_be_done:
        return "send the request in flight again, which the API answers free of charge if it has done the work"
    return f"convert it to {task.target}, which is paid for"


@dataclass(frozen=True)
class Finding:
    """What one check came to: `OK`, `WARN` or `FAIL`, what was looked at, and what is so or what is to be done."""

    verdict: str
    what: str
    said: str

    def __str__(self) -> str:
        return f"{self.verdict:<4} {self.what}: {self.said}"


class Doubt(UserError):
    """Something that a run may survive, and a person should know of."""


def proved(what: str, proof: Callable[[], str], needs: str = "") -> Finding:
    """The finding of one check: `proof` returns what is so, or raises what is not. `needs`: what would permit it."""
    try:
        return Finding("OK", what, proof())
    except Doubt as doubt:
        return Finding("WARN", what, f"{doubt.message}; {doubt.hint}")
    except UserError as error:
        said, hint = error.message, error.hint
    except RunStopped as stopped:
        said, hint = stopped.stop.because, stopped.stop.hint
    except ObjectFailed as failure:
        said, hint = failure.message, needs
    # Wrong credentials and a wrong bucket have nothing to do with permissions.
    return Finding("FAIL", what, f"{said}; {needs if needs and 'AccessDenied' in said else hint}")


def say(line: str) -> None:
    """Print a line at once, in the characters that the terminal has. Raises UserError if it cannot be written."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        pass  # who does not read on wants no more
    except OSError as problem:
        raise UserError(
            f"stdout cannot be written: {problem.strerror}", "free some space, or send it elsewhere", ExitCode.STOPPED
        ) from None


def check(settings: Settings) -> ExitCode:
    """Prove what a run needs, one line each."""
    verdicts: Counter[str] = Counter()
    for finding in findings(settings):
        # Each line as soon as it is known: the next one may have to wait for the network.
        verdicts[finding.verdict] += 1
        if not (settings.quiet and finding.verdict == "OK"):
            say(settings.hide(str(finding)))
    named = ("FAIL", "WARN") if verdicts["FAIL"] else ("OK", "WARN")
    counts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in named if verdicts[verdict])
    say(f"not ready: {counts}" if verdicts["FAIL"] else f"ready: {counts}")
    return ExitCode.USAGE if verdicts["FAIL"] else ExitCode.DONE


def findings(settings: Settings) -> Iterator[Finding]:
    """Everything that is checked, what is nearest first."""
    yield proved("versions", versions)
    yield Finding("OK", "configuration", describe(settings))
    checkpoint = Path(settings.run.checkpoint)
    yield proved("run.checkpoint", partial(checkpoint_is_usable, settings))
    yield proved("lock", partial(lock_is_free, checkpoint))
    for name in ("failures", "summary", "metrics"):
        if path := getattr(settings.run, name):
            yield proved(f"run.{name}", partial(is_writable, Path(path), f"run.{name}"))
    yield proved("threads", partial(threads_can_be_started, settings.run.workers))
    yield from space_findings(checkpoint.absolute().parent)
    yield from until_all_is_refused(bucket_findings(settings))
    if settings.api.key_file and not settings.key_problem:
        yield proved("api.key_file", partial(key_is_private, Path(settings.api.key_file).expanduser()))
    yield from api_findings(settings)


def threads_can_be_started(count: int) -> str:
    """That there can be as many threads as workers. Raises RunStopped."""
    is_over = threading.Event()
    try:
        with blaming_the_environment(""):
            for _ in range(count):
                threading.Thread(target=is_over.wait, daemon=True).start()
    finally:
        is_over.set()
    return f"{count} workers can be started"


def space_findings(own_folder: Path) -> Iterator[Finding]:
    """Whether there is room beside the checkpoint, and for large answers."""
    try:
        folders = [own_folder, Path(tempfile.gettempdir())]
    except OSError as problem:
        folders = [own_folder]
        yield Finding("FAIL", "temporary folder", f"{problem.strerror}; make one writable, or set TMPDIR")
    for folder in dict.fromkeys(folders):
        yield proved(f"space in {folder}", partial(has_space, folder))


def key_is_private(path: Path) -> str:
    """That only its owner can read a file. Raises Doubt if others can: in a container, there may be no others."""
    # CTF_API_KEY comes before the file, which need not be there then.
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0
    if os.name == "posix" and mode & (stat.S_IRGRP | stat.S_IROTH):
        raise Doubt(f"others can read {path} (mode {mode:04o})", f"run: chmod 600 {path}")
    return f"others cannot read {path}"


def versions() -> str:
    """The versions that are at work. Raises UserError if one is too old."""
    found = {name: str(getattr(sys.modules[name], "__version__", "")) for name in OLDEST_PACKAGES}
    # "2.0a1" has its numbers too.
    old = [
        f"{name}>={oldest}"
        for name, oldest in OLDEST_PACKAGES.items()
        if [int(part) for part in re.findall(r"\d+", found[name])[:3]] < [int(part) for part in oldest.split(".")]
    ]
    if old:
        wanted = " ".join(f"'{name}'" for name in old)
        raise UserError(f"too old for {', '.join(old)}", f"run: {sys.executable} -m pip install {wanted}")
    return ", ".join([f"Python {sys.version.split()[0]}", *(f"{name} {version}" for name, version in found.items())])


def is_writable(path: Path, name: str) -> str:
    """Where a file is or would be. Raises UserError if it cannot be written."""
    refuse_unwritable(path, name)
    return f"{path} can be written"


def checkpoint_is_usable(settings: Settings) -> str:
    """What the checkpoint is. Raises UserError or RunStopped if a run could not use it."""
    path = real_file(Path(settings.run.checkpoint))
    # Before SQLite opens it: to close a file is to give up this process's SQLite locks on it.
    for written in (path, RunLock(path).path, path.with_name(path.name + "-wal")):
        refuse_unwritable(written, "run.checkpoint")
    if os.name == "posix" and path.exists():
        set_mode(path, stat.S_IMODE(path.stat().st_mode))
    with JournalReader(path, settings.s3.bucket, settings.s3.written_bucket) as journal:
        return f"{path} can be written{'' if journal.is_there else '; it does not exist yet'}"


def lock_is_free(checkpoint: Path) -> str:
    """That no run is at work, and that locks can be had there. Raises Doubt if one is, UserError."""
    holder = RunLock(checkpoint).holder()
    # In cron that is as it should be, and no reason to fail.
    if holder:
        raise Doubt(f"a run is at work ({holder})", "another one would exit 4")
    # On a file of its own: a run that starts at this moment must not find its lock taken. Where there can be none, the
    # checkpoint itself has been told of.
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=checkpoint.absolute().parent) as probe:
        take_lock(probe, checkpoint)
    return "no run is at work"


def has_space(folder: Path) -> str:
    """How much is free. Raises UserError or Doubt if that is little."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as problem:
        raise UserError(f"it cannot be read: {problem.strerror}", "correct run.checkpoint or TMPDIR") from None
    if free < SCARCE_DISK_BYTES:
        raise UserError(f"only {human_bytes(free)} are free", "free some space, or set run.checkpoint or TMPDIR")
    if free < LITTLE_DISK_BYTES:
        raise Doubt(f"{human_bytes(free)} are free", "large outputs wait there, one for each worker")
    return f"{human_bytes(free)} are free"


def seconds_ahead(address: str, **request: Any) -> float | None:
    """How far a server's clock is ahead of this one; None if it does not tell the time. Raises UserError."""
    # Without credentials: whatever it answers, it says when, even to a request whose signature is from another time.
    with asking(address, **request) as answer:
        try:
            said = email.utils.parsedate_to_datetime(answer.headers["Date"])
        except (KeyError, ValueError, TypeError):
            return None
    return said.replace(tzinfo=said.tzinfo or timezone.utc).timestamp() - time.time()


def clock_agrees(ahead_seconds: float | None) -> str:
    """That two clocks agree. Raises UserError or Doubt if they do not."""
    if ahead_seconds is None:
        return "it does not tell the time"
    differs = f"it is {abs(ahead_seconds):.0f} s {'ahead of' if ahead_seconds > 0 else 'behind'} this machine's clock"
    # Amazon allows 15 minutes; a clock that is off by 5 is not kept by anybody.
    if abs(ahead_seconds) > 300:
        raise UserError(differs, "set the clock (chronyd, ntpd): S3 refuses requests from another time")
    if abs(ahead_seconds) > 60:
        raise Doubt(differs, "set the clock (chronyd, ntpd)")
    return "this machine's clock agrees"


def until_all_is_refused(found: Iterable[Finding]) -> Iterator[Finding]:
    """Findings up to one whose cause the others would only repeat."""
    for finding in found:
        yield finding
        if finding.verdict == "FAIL" and re.search(CAUSES_OF_ALL, finding.said):
            yield Finding("WARN", "the rest of S3", "not tried")
            return


CAUSES_OF_ALL = "SignatureDoesNotMatch|InvalidAccessKeyId|the bucket .* does not exist"


def bucket_findings(settings: Settings) -> Iterator[Finding]:
    """What a run needs of S3."""
    try:
        bucket = Bucket(settings)
        ahead = seconds_ahead(bucket.client.meta.endpoint_url, verify=trusted_by_boto3())
    except UserError as error:
        # Whatever else is asked of S3 would fail for the same reason.
        yield Finding("FAIL", "S3", f"{error.message}; {error.hint}")
        return
    yield proved("clock of S3", partial(clock_agrees, ahead))
    yield proved("bucket", partial(buckets_are_there, bucket))
    listed: list[S3Object] = []
    # A policy may allow one prefix and not another.
    for prefix in dict.fromkeys(job.prefix for job in settings.jobs):
        where = f"s3://{bucket.name}/{prefix}"
        yield proved(
            f"list {where}", partial(can_list, bucket, prefix, listed), f"allow s3:ListBucket on {bucket.name}"
        )
    if len(settings.jobs) > 1 and listed:
        yield proved("output keys", partial(jobs_are_apart, settings, listed))
    yield from reading_findings(settings, bucket, listed)
    for prefix in dict.fromkeys(literal_prefix(job.output_key) for job in settings.jobs):
        yield from writing_findings(settings, bucket, prefix)


def trusted_by_boto3() -> str | bool:
    """What `requests` is to take for trusted certificates, so that it judges S3 as boto3 does."""
    return os.environ.get("AWS_CA_BUNDLE") or True


def buckets_are_there(bucket: Bucket) -> str:
    """The buckets and the region. Raises RunStopped."""
    bucket.check()
    names = " and ".join(dict.fromkeys((bucket.name, bucket.output_name)))
    return f"{names} there, region {bucket.client.meta.region_name}"


def can_list(bucket: Bucket, prefix: str, listed: list[S3Object]) -> str:
    """What the first page of a listing has; it goes to `listed`. Raises RunStopped, or Doubt if there is nothing."""
    # The first page alone: how many there are is for the run to find out.
    page = bucket.read_page(bucket.name, prefix).objects
    listed += page
    if not page:
        raise Doubt("no key begins with this prefix", "check s3.bucket and s3.prefix")
    return f"{len(page)} objects{' and more' if len(page) == PAGE_KEYS else ''}"


def jobs_are_apart(settings: Settings, listed: Sequence[S3Object]) -> str:
    """That no two jobs want one output key for the same object, as far as it can be told. Raises Doubt if they do."""
    routes = [make_route(job, time.time()) for job in settings.jobs]
    takers: dict[tuple[str, str], Job] = {}
    for job, source, _ in select(listed, routes, settings.own_prefixes, settings.shard, Counter()):
        planned = output_key(job, source.key)
        first = takers.setdefault((source.key, claim_of(planned)), job)
        if first is not job:
            raise Doubt(
                f"job {first.name} and job {job.name} both want {shown(planned)}",
                "one of them fails for such objects (output_collision): exclude them in one, or put {job} into its "
                "output_key",
            )
    return f"no two jobs want the same one, of {counted(len(listed), 'object')} looked at"


def reading_findings(settings: Settings, bucket: Bucket, listed: Sequence[S3Object]) -> Iterator[Finding]:
    """Whether this program, and the API by a presigned URL, can read the first object that can be a source."""
    needs = f"allow s3:GetObject on {bucket.name} (and kms:Decrypt on its key)"
    literals = tuple(filter(None, (literal_prefix(job.output_key) for job in settings.jobs)))
    own_prefixes = literals if settings.s3.is_one_bucket else ()
    # What a run would skip may be unreadable for good reasons: an archived object, a folder of another tool.
    readable = (entry for entry in listed if not skip_reason(entry, own_prefixes) and not has_dot_segments(entry.key))
    source = next(readable, None)
    if source is None:
        yield Finding("WARN", "read", "nothing was listed that could be read; try again when there is something")
        return
    yield proved("read", partial(can_read, bucket, source.key), needs)
    if settings.api.transfer != "upload":
        yield proved("presigned URL", partial(url_works, bucket.presign(source.key)))


def can_read(bucket: Bucket, key: str) -> str:
    """That an object can be read. Raises RunStopped."""
    bucket.read_first_byte(key)
    return f"s3://{bucket.name}/{shown(key)}"


def url_works(address: str) -> str:
    """That a presigned URL can be fetched. Raises UserError."""
    # One byte, in the same way as the API: by an HTTP client that knows nothing of S3.
    with asking(address, headers={"Range": "bytes=0-0"}, verify=trusted_by_boto3()) as answer:
        if answer.status_code not in {200, 206}:
            hint = "check s3.region, s3.endpoint_url and the clock, or set api.transfer = upload"
            raise UserError(f"S3 answers it with {answer.status_code}", hint)
    return "it works from here; the API must be able to reach S3 as well"


def writing_findings(settings: Settings, bucket: Bucket, prefix: str) -> Iterator[Finding]:
    """Whether outputs can be listed and written, proved with an empty object that is deleted again."""
    where = f"s3://{bucket.output_name}/{prefix}"
    if settings.run.skip_existing:
        needs = f"allow s3:ListBucket on {bucket.output_name}, or set run.skip_existing = no"
        yield proved(f"list {where}", partial(can_list_outputs, bucket, prefix), needs)
    # The name is drawn: neither an object of yours nor the probe of another check is ever overwritten.
    key = f"{prefix}.s3_bulk_convert-check-{os.urandom(8).hex()}"
    target = settings.jobs[0].options.target
    probe = Task("check", "", key, "", 0, target, None, output_key=key, idempotency_key="")
    versions: list[str] = []
    needs = f"allow s3:PutObject on {bucket.output_name}/{prefix}* (with s3.acl s3:PutObjectAcl, with a KMS key "
    needs += "kms:GenerateDataKey), and check s3.storage_class, s3.sse, s3.acl"
    yield proved(f"write {where}", partial(can_write, bucket, probe, versions), needs)
    if versions:
        yield proved(f"look at {where}", partial(can_look, bucket, key))
        yield proved(f"delete {where}", partial(can_delete, bucket, key, versions[0]))


def can_list_outputs(bucket: Bucket, prefix: str) -> str:
    """That outputs can be listed. Raises RunStopped."""
    # As a run does it, for a key that is not there.
    bucket.existing_outputs(prefix, [prefix + "-"])
    return "outputs that are there will be found"


def can_write(bucket: Bucket, probe: Task, versions: list[str]) -> str:
    """That an output can be written; its version goes to `versions`. Raises RunStopped or ObjectFailed."""
    versions.append(bucket.write_probe(probe))
    return "with the options of the outputs"


def can_look(bucket: Bucket, key: str) -> str:
    """That an output says what it was made of. Raises Doubt if not: a run works without, and may pay more."""
    if key not in bucket.made_of(key):
        hint = f"allow s3:GetObject on {bucket.output_name}, or a resumed run may pay again for what is there"
        raise Doubt("the metadata of an output cannot be read", hint)
    return "an output says what it was made of"


def can_delete(bucket: Bucket, key: str, version: str) -> str:
    """That the probe is gone. Raises Doubt if it stays: only this check deletes anything, a run does not."""
    try:
        bucket.delete_probe(key, version)
    except RunStopped as stopped:
        hint = f"delete {key}, and allow s3:DeleteObject and s3:DeleteObjectVersion for the next check"
        raise Doubt(stopped.stop.because, hint) from None
    return "the probe is gone; a run deletes nothing"


def api_findings(settings: Settings) -> Iterator[Finding]:
    """What a run needs of the API."""
    api = settings.api
    try:
        refuse_wrong_certificates(api.url, *CA_BUNDLES)
        ahead = seconds_ahead(api.url)
    except UserError as error:
        # A key cannot be tried on an API that is not there.
        yield Finding("FAIL", "API", f"{error.message}; {error.hint}")
        return
    yield proved("clock of the API", partial(clock_agrees, ahead))
    if settings.key_problem:
        yield Finding("FAIL", "API key", settings.key_problem)
        return
    told: list[Usage] = []
    yield proved("API key", partial(key_is_accepted, api, told))
    for usage in told:
        yield proved("quota", partial(quota_is_left, usage, api))
        if usage.requests_per_minute:
            yield Finding("OK", "rate limit", f"{usage.requests_per_minute} requests a minute")


def key_is_accepted(api: ApiOptions, told: list[Usage]) -> str:
    """The plan; what the API says of it goes to `told`. Raises RunStopped or UserError."""
    told.append(ask_usage(api))
    return f"accepted, plan {told[0].plan}" if told[0].plan else "not refused; the API does not name the plan"


def quota_is_left(usage: Usage, api: ApiOptions) -> str:
    """What is left of the month. Raises UserError if nothing is, Doubt if the API does not say."""
    # Its fields are not documented: what cannot be read there is no reason to fail.
    if usage.remaining is None:
        raise Doubt("the API does not say what is left of the month", "cap what a run may cost with --limit")
    said = f"{usage.remaining} conversions are left"
    if usage.monthly_limit is not None:
        said += f" of {usage.monthly_limit}"
    if usage.bills_overage is not None:
        said += ", more are billed" if usage.bills_overage else ", more are refused"
    if usage.remaining <= api.keep_remaining:
        raise UserError(said, f"wait for next month, upgrade, or lower api.keep_remaining ({api.keep_remaining})")
    return said


########################################################################################################################
# Command line. Only `main` decides the exit.
#   - Words for people go to stderr as they come, the summary of a run goes to stdout.
#   - Every line is redacted on its way out, whoever wrote it.
########################################################################################################################

FLAGS = {
    "bucket": ("s3", "bucket"),
    "prefix": ("s3", "prefix"),
    "target": ("convert", "target"),
    "workers": ("run", "workers"),
    "processes": ("run", "processes"),
    "limit": ("api", "max_conversions"),
}


class Parser(argparse.ArgumentParser):
    """A parser that says little and to the point, and does not repeat an API key that stands where it should not."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit 2."""
        usage = f"usage: {self.prog} [-c FILE] [options], which --help names"
        self.exit(ExitCode.USAGE, f"{usage}\n{self.prog}: error: {redacted(message)}\n")

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
    add("--bucket", metavar="NAME", help="bucket to read from (s3.bucket)")
    add("--prefix", metavar="PREFIX", help="only keys that begin so (s3.prefix)")
    add("--target", metavar="FORMAT", help="format to convert to (convert.target)")
    add("--workers", metavar="N", help="conversions at a time (run.workers)")
    add("--processes", metavar="N", help="processes that share the workers out (run.processes)")
    add("--limit", metavar="N", help="conversions to ask for, failed ones included (api.max_conversions)")
    add(
        "--shard",
        metavar="I/N",
        help="only the I-th of N parts, from 0 (default: what an array job's environment says)",
    )
    add("--set", metavar="SECTION.OPTION=VALUE", action="append", default=[], help="any other option; repeatable")
    alone = parser.add_mutually_exclusive_group().add_argument
    alone("--dry-run", action="store_true", help="what a run would convert, skip, pay for and take; convert nothing")
    alone("--check", action="store_true", help="prove configuration, S3, API key, quota and files; convert nothing")
    alone("--status", action="store_true", help="what the checkpoint knows; no network")
    alone("--why", metavar="KEY", help="all that is known about one object, and what the next run would do")
    alone("--retry-failed", action="store_true", help="also try objects whose failure was permanent")
    add("--keys-from", metavar="FILE", help="take keys from FILE (- is stdin) instead of listing; see README")
    log_help = "lines for people, or one JSON object a line (default: text)"
    add("--log-format", choices=("text", "json"), default="text", help=log_help)
    add("-q", "--quiet", action="store_true", help="print only what went wrong, and one line at the end")
    add("-v", "--verbose", action="store_true", help="say more; show tracebacks")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def trimmed(name: str, value: str) -> str:
    """A value of the command line; a space that a shell had to be told to keep is a part of the keys."""
    return value.strip("\r\n") if name in {"prefix", "output_key"} else value.strip()


def read_flags(arguments: argparse.Namespace) -> list[Given]:
    """The options given on the command line. Raises UserError if one has no name."""
    given = []
    for flag, (section, name) in FLAGS.items():
        value = getattr(arguments, flag)
        if value is not None:
            given.append(Given(section, name, trimmed(name, value), f"--{flag} ([{section}] {name})"))
    for assignment in arguments.set:
        # The name of a job may hold dots and spaces: the option is what stands behind the last dot before the "=".
        match = re.fullmatch(r"\s*(?:(job [^=]*|[^.=\s]+)\.)([^.=\s]+)\s*=(.*)", assignment, re.DOTALL)
        if match is None:
            raise UserError(f"--set {assignment}: expected SECTION.OPTION=VALUE", "for example --set run.log_every=10")
        name = match[2].lower()
        given.append(Given(match[1], name, trimmed(name, match[3]), f"--set {match[1]}.{match[2]}"))
    return given


def iso_time(seconds: float) -> str:
    """A time (Unix seconds) in ISO 8601, in the local zone, with its offset."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def without_secrets(value: Any) -> Any:
    """A value of a JSON document, with every text in it redacted."""
    if isinstance(value, dict):
        return {name: without_secrets(part) for name, part in value.items()}
    return redacted(value) if isinstance(value, str) else value


class ConsoleFormatter(logging.Formatter):
    """A line for people, or a JSON object: time in the local zone, no secrets, and a traceback only on demand."""

    def __init__(self, *, verbose: bool, as_json: bool) -> None:
        super().__init__()
        self._verbose, self._as_json = verbose, as_json

    def format(self, record: logging.LogRecord) -> str:
        """One record without secrets."""
        when = iso_time(record.created)
        event, fields = getattr(record, "event", "message"), getattr(record, "fields", {})
        message, trace = record.getMessage(), self._trace(record)
        if self._as_json:
            standard = {"ts": when, "level": record.levelname.lower(), "event": event, "message": message}
            # What stands first in every line is never replaced by a field of the same name.
            told_more = {**fields, **({"traceback": trace} if trace else {})}
            return json.dumps(without_secrets({**standard, **told_more}), ensure_ascii=False)
        if event == "error":
            return redacted(f"{trace}error: {message}\nhint: {fields['hint']}")
        return redacted(f"{when} {message}" + (f"\n{trace.rstrip()}" if trace else ""))

    def _trace(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return ""
        return "".join((traceback.format_exception if self._verbose else traceback.format_exception_only)(error))


class ConsoleHandler(logging.Handler):
    """Writes to stderr above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        with contextlib.suppress(OSError):
            tqdm.write(self.format(record), file=sys.stderr)


def set_up_logging(*, quiet: bool, verbose: bool, as_json: bool) -> None:
    """Send this program's messages to stderr; other libraries' only with -v."""
    # One handler for all: a library's message must not tear the progress bar either.
    handler = ConsoleHandler()
    handler.setFormatter(ConsoleFormatter(verbose=verbose, as_json=as_json))
    logging.basicConfig(level=logging.WARNING if not verbose else logging.INFO, handlers=[handler], force=True)
    # urllib3 warns at each retry, with the path of the request; the summary has the counts.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    if not verbose:
        # What comes of credentials that cannot be had is said where they are needed, once and with its remedy.
        logging.getLogger("botocore.credentials").setLevel(logging.ERROR)
    log.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)


def finish(report: Report, settings: Settings) -> ExitCode:
    """Say what the run came to."""
    if report.is_whole and not report.counts["listed"]:
        for warning in empty_listing_warnings(settings):
            log.warning("%s", warning)
    if settings.log_format == "json":
        log_summary(report)
        text = json.dumps(without_secrets(report.summary()), ensure_ascii=False)
    elif settings.quiet and report.exit_code is ExitCode.DONE:
        text = summary_line(report)
    else:
        text = redacted("\n".join(summary_lines(report, settings)))
    try:
        say(text)
    except UserError as error:
        # What was done stays done.
        log.warning("%s", error.message)
    return report.exit_code


def empty_listing_warnings(settings: Settings) -> Iterator[str]:
    """What may be wrong where a whole listing has nothing in it; a part of the work, or of the keys, may be empty."""
    if settings.keys_from or settings.shard.count > 1:
        return
    for prefix in dict.fromkeys(job.prefix for job in settings.jobs):
        meant = f'; keys rarely begin with "/": did you mean "{prefix.lstrip("/")}"?' if prefix.startswith("/") else ""
        said = f"no key begins with {json.dumps(prefix, ensure_ascii=False)}" if prefix else "there is no object"
        yield f"{said} in s3://{settings.s3.bucket}{meant}"


def log_summary(report: Report) -> None:
    """Send the end of a run to where the log goes, with what to do about its failures."""
    for code, count in report.failed.most_common():
        example = report.examples[code]
        fields = {
            "code": code,
            "count": count,
            "key": example.task.key,
            "said": example.message,
            "remedy": remedy(code),
        }
        log.warning("%d failed: %s", count, code, extra=told("failures", **fields))
    log.info("%s", summary_line(report), extra=told("summary", **report.summary()))


def carry_out(arguments: argparse.Namespace, settings: Settings) -> ExitCode:
    """Do what the command line asks for. Raises UserError or RunStopped."""
    leave_on_interrupt()
    if arguments.check:
        return check(settings)
    if arguments.dry_run:
        return dry_run(settings)
    if arguments.status:
        return print_all(status_lines(settings), settings)
    if arguments.why is not None:
        return print_all(why_lines(settings, arguments.why), settings)
    # Only a run has something to finish: from here on Ctrl-C is a reason to stop.
    stop = StopFlag()
    stop.install()
    return finish(run(settings, stop), settings)


def dry_run(settings: Settings) -> ExitCode:
    """Print a forecast: lines for people, or one JSON document."""
    found = make_forecast(settings)
    if settings.log_format == "json":
        return print_all([json.dumps(without_secrets(found))], settings)
    return print_all(forecast_lines(found, settings), settings)


def print_all(lines: Iterable[str], settings: Settings) -> ExitCode:
    """Print lines as they come, without secrets."""
    for line in lines:
        say(settings.hide(line))
    return ExitCode.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    give_streams()
    arguments = build_parser().read(argv)
    set_up_logging(quiet=arguments.quiet, verbose=arguments.verbose, as_json=arguments.log_format == "json")
    try:
        refuse_json_of(arguments)
        is_free = arguments.check or arguments.status or arguments.dry_run or arguments.why is not None
        settings = load_settings(
            arguments.config, os.environ, read_flags(arguments), arguments.shard, needs_key=not is_free
        )
        named = ("retry_failed", "quiet", "keys_from", "log_format")
        with blaming_the_environment(settings.api.url):
            return carry_out(arguments, replace(settings, **{name: getattr(arguments, name) for name in named}))
    except UserError as error:
        return complain(error.message, error.hint, error.exit_code, verbose=arguments.verbose)
    except RunStopped as stopped:
        return complain(stopped.stop.because, stopped.stop.hint, stopped.stop.exit_code, verbose=arguments.verbose)
    except Exception:
        log.exception("the program has a bug; what was sent is in the checkpoint, and the next run resumes it")
        return ExitCode.STOPPED


def refuse_json_of(arguments: argparse.Namespace) -> None:
    """Raise UserError for a command whose answer is for people alone."""
    for flag in ("check", "status", "why"):
        if arguments.log_format == "json" and getattr(arguments, flag) not in {None, False}:
            raise UserError(f"--log-format json: not with --{flag}", "a run and --dry-run have JSON; leave it out here")


def give_streams() -> None:
    """Let stdout and stderr be written to, even where a daemon's parent has closed them."""
    sys.stdout = sys.stdout or io.TextIOWrapper(io.FileIO(os.devnull, "w"))
    sys.stderr = sys.stderr or io.TextIOWrapper(io.FileIO(os.devnull, "w"))


def complain(message: str, hint: str, exit_code: ExitCode, *, verbose: bool) -> ExitCode:
    """Say what went wrong and what to do."""
    log.error("%s", message, exc_info=verbose, extra=told("error", hint=hint, exit_code=int(exit_code)))
    return exit_code


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
