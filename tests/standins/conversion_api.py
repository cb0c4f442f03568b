"""A conversion API for tests: a real HTTP server on 127.0.0.1 that keeps the contract, or breaks it when told to.

    with ConversionApi(latency=0.05) as api:
        api.faults.add(Fault.cut_after_work(times=1))
        ...                                     # run a client against api.url with api.api_key
        assert api.paid_twice() == []

One request passes through these steps; a fault belongs to one of them:

    ARRIVAL  -> key, minute limit -> idempotency -> WORK -> convert, charge -> RESULT -> remember -> DELIVERY
    a gateway                        replays,      engine                      what is         what becomes of
    fails                            409, 422      fails                       remembered      it on the wire

A conversion is charged exactly once, at the moment it succeeds, whatever becomes of the answer.

In the foreground: `python -m tests.standins.conversion_api [--latency S]` prints `READY url key`; SIGTERM: its counts.
"""

from __future__ import annotations

import argparse
import ctypes
import email.utils
import hashlib
import io
import json
import math
import re
import signal
import socket
import socketserver
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePath
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit

import requests
from requests.structures import CaseInsensitiveDict
from werkzeug.formparser import MultiPartParser
from werkzeug.http import parse_options_header

from tests.standins import converters
from tests.standins.converters import Conversion, Convert, Converted, UnconvertibleError, UnsupportedRouteError

# ----------------------------------------------------------------------------------------------------------------------
# Names of the contract
# ----------------------------------------------------------------------------------------------------------------------

API_KEY = "ctf_sk_test_0123456789abcdef"
CONVERT, JOBS, DOWNLOAD, USAGE = "/v1/convert", "/v1/jobs", "/v1/jobs/download/", "/v1/usage"
CHARGED_PATHS = frozenset({CONVERT, JOBS})

# The syntax of an Idempotency-Key.
KEY_SYNTAX = re.compile(r"[A-Za-z0-9._\-:+/]{1,128}")

# What the headers say when no limit is set: so much that no client slows down for it.
AS_GOOD_AS_UNLIMITED = 100_000

SECONDS_IN_A_DAY = 86_400
SECONDS_FOR_A_FETCH = 30
DRIPPING_END = 400  # bytes

EVENTS = ("request_received", "work_done", "half_answer_sent", "answered")
Event = Literal["request_received", "work_done", "half_answer_sent", "answered"]

# ----------------------------------------------------------------------------------------------------------------------
# Records
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Request:
    """One request as the server saw it. It is filled in while it is served; bodies are kept as digests only."""

    method: str
    path: str
    headers: CaseInsensitiveDict[str]
    listener: Literal["api", "download"]
    started: float  # monotonic seconds, when the head was read
    idempotency_key: str | None = None
    fields: dict[str, str] = field(default_factory=dict)  # the text fields, file_url among them
    filename: str | None = None
    file_media_type: str | None = None
    file_sha256: str | None = None
    raw_sha256: str = ""
    status: int | None = None  # None: still served, or the connection was lost first
    finished: float | None = None
    replayed: bool = False
    charged: bool = False
    delivered: bool = False  # the whole answer was handed to the network

    @property
    def is_conversion(self) -> bool:
        """Whether it asks for a conversion, at once or as a job."""
        return self.method == "POST" and self.path in CHARGED_PATHS


@dataclass(frozen=True)
class Charge:
    """One conversion that the customer pays for."""

    idempotency_key: str | None
    source_sha256: str
    source_format: str
    target: str
    quality: int | None
    at: float  # by the server's clock


class Wire(Enum):
    """How much of an answer reaches the client before the connection is closed."""

    WHOLE = auto()
    HALF = auto()
    NOTHING = auto()


@dataclass(frozen=True)
class Answer:
    """One answer, before it is put on the wire."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    wire: Wire = Wire.WHOLE
    chunked: bool = False
    announced: int | None = None  # bytes, where the length that the head says is not the body's
    until_close: bool = False  # nothing but the end of the connection says where the body ends
    drips_from: Literal["head", "body", "end"] | None = None  # from there on, a byte at a time
    is_repeated: bool = False  # a line end follows it, and the next request on its connection is answered with it again
    stall: threading.Event | None = None  # after the first half, wait for this
    is_scripted: bool = False  # a fault's own answer: nothing to remember, nothing to spoil

    @property
    def succeeded(self) -> bool:
        """Whether the API remembers it under the request's key."""
        return self.status in {200, 202} and not self.is_scripted


@dataclass(frozen=True)
class Form:
    """A parsed request body. `problem` says why there is none."""

    file: bytes | None = None
    problem: str | None = None


class RefusalError(Exception):
    """The API says no, in its envelope."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        details: dict[str, object] | None = None,
        retry_after: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {} if retry_after is None else {"Retry-After": retry_after}
        self.error: dict[str, object] = {"code": code, "message": message}
        if details:
            self.error["details"] = details


# ----------------------------------------------------------------------------------------------------------------------
# Behaviour
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)  # so that a misspelt field is an error and not a test of nothing
class Behaviour:
    """What a lawful API may do one way or the other. Every field may be changed while the server runs."""

    convert: Convert = converters.convert
    latency: float = 0.0  # seconds of work per conversion

    accept_file_url: bool = True  # False: 400, as the reference pages have it
    fetch_failure_status: int = 422  # with the code "fetch_failed"
    ca_bundle: str = ""  # a file to trust when it fetches, in place of the usual authorities
    max_size: int | None = None  # bytes that the plan allows, else 413

    compare_raw_body: bool = False  # True: another multipart boundary is another body
    remember_failed_bodies: bool = False  # True: after a failure, too, another body is refused
    keys_shared_by_endpoints: bool = False  # True: a key used for /v1/convert is taken for /v1/jobs
    keep_memory: float = SECONDS_IN_A_DAY  # seconds for which a successful answer is replayed
    in_flight_retry_after: str | None = "1"

    per_minute: int | None = None
    window_seconds: float = 60.0  # a window begins with the first request after the last one ended
    retry_after_as_date: bool = False
    month_quota: int | None = None
    rate_headers: bool = True
    stale_rate_headers: bool = False  # True: the reset lies an hour back, and nothing remains

    interim: bytes = b""  # sent as soon as a request is read, before the work and the answer
    answer_form: Literal["binary", "envelope"] = "binary"  # Accept: application/json always gets an envelope
    envelope_link: Literal["file_url", "download_url", "result.file_url"] = "file_url"

    job_states: tuple[str, ...] = ("queued", "processing", "completed")  # one step per poll, the last one stays
    job_error: Literal["object", "string", "absent"] = "object"
    stale_links: int = 0  # so many first links of each job answer 403
    separate_download_host: bool = False  # True: links lead to the second port


# ----------------------------------------------------------------------------------------------------------------------
# Faults
# ----------------------------------------------------------------------------------------------------------------------


class Step(Enum):
    """Where on a request's way a fault strikes. The module's docstring has the picture."""

    ARRIVAL = auto()
    WORK = auto()
    RESULT = auto()
    DELIVERY = auto()


Reshape = Callable[[Answer], Answer]


def unchanged(answer: Answer) -> Answer:
    """Leave an answer as it is."""
    return answer


@dataclass(eq=False)
class Fault:
    """Something that goes wrong, `times` times or always (None), for the requests that `where` picks.

    Without `where` it strikes requests for a conversion only (POST /v1/convert and /v1/jobs), never a poll, a download
    or a look at the usage. Each constructor says whether the conversion is charged.
    """

    step: Step = Step.ARRIVAL
    times: int | None = 1
    where: Callable[[Request], bool] | None = None
    status: int | None = None  # answer this instead of doing the work
    code: str | None = None
    message: str = "a scripted fault"
    headers: Mapping[str, str] = field(default_factory=dict)
    retry_after: str | None = None
    body: bytes | None = None  # None: an error envelope if there is a code, else nothing
    content_type: str = "application/json"
    drips_from: Literal["head", "body", "end"] | None = None
    cut: Literal["before"] | None = None
    hang: threading.Event | None = None
    as_job: bool = False
    reshape: Reshape = unchanged
    struck: int = 0  # how often it did
    reached: threading.Event = field(default_factory=threading.Event)  # set when it first does

    # -- instead of the work: never charged -----------------------------------------------------------------------

    @classmethod
    def status_reply(
        cls,
        status: int,
        code: str | None = None,
        *,
        retry_after: str | None = None,
        times: int | None = 1,
        where: Callable[[Request], bool] | None = None,
    ) -> Fault:
        """Answer this status before any work; without a code the body is empty. Not charged."""
        return cls(status=status, code=code, retry_after=retry_after, times=times, where=where)

    @classmethod
    def work_lost(cls, status: int = 504, code: str | None = None, *, times: int | None = 1) -> Fault:
        """Answer this status from inside the work: a replay is still served, only new work is struck. Not charged."""
        return cls(Step.WORK, status=status, code=code, times=times)

    @classmethod
    def html_page(cls, status: int = 200, *, times: int | None = 1) -> Fault:
        """Answer a web page, as a gateway or a captive portal would, even with status 200. Not charged."""
        page = b"<!DOCTYPE html><html><body><h1>One moment please</h1></body></html>"
        return cls(status=status, body=page, content_type="text/html; charset=utf-8", times=times)

    @classmethod
    def json_in_200(cls, body: Mapping[str, object] | None = None, *, times: int | None = 1) -> Fault:
        """Answer 200 with JSON where a file is expected, by default an error envelope. Not charged."""
        told = body or {"error": {"code": "service_unavailable", "message": "engine down"}}
        return cls(status=200, body=json.dumps(told).encode(), times=times)

    @classmethod
    def redirect(cls, to: str, status: int = 307, *, times: int | None = 1) -> Fault:
        """Send the client elsewhere, where its API key has no business. Not charged."""
        return cls(status=status, headers={"Location": to}, times=times)

    @classmethod
    def cut_before_work(cls, *, times: int | None = 1) -> Fault:
        """Close the connection once the request is read, without work or answer. Not charged."""
        return cls(cut="before", times=times)

    @classmethod
    def hang_until(cls, event: threading.Event, *, times: int | None = 1) -> Fault:
        """Hold the work, with the key in flight, until the event; then convert as usual. Charged, then."""
        return cls(Step.WORK, hang=event, times=times)

    # -- another lawful answer: charged, and remembered as it is ---------------------------------------------------

    @classmethod
    def accepted_as_job(cls, *, times: int | None = 1) -> Fault:
        """Answer /v1/convert with 202 and a job. Charged once, and a retry is told of the same job."""
        return cls(Step.WORK, as_job=True, times=times)

    @classmethod
    def json_envelope(cls, *, times: int | None = 1) -> Fault:
        """Answer 200 with JSON and a download link (`envelope_link` has its shape) instead of the file. Charged."""
        return cls(Step.RESULT, content_type="envelope", times=times)

    @classmethod
    def zip_of_pages(cls, pages: int, *, times: int | None = 1) -> Fault:
        """Answer a ZIP with the result as each of so many pages, as for a multi-page source. Charged once."""

        def packed(answer: Answer) -> Answer:
            extension = PurePath(suggested_name(answer)).suffix.lstrip(".")
            archive = converters.zip_of_pages([answer.body] * pages, extension)
            return with_file(answer, archive.body, archive.media_type, archive.extension)

        return cls(Step.RESULT, reshape=packed, times=times)

    @classmethod
    def other_file(cls, body: bytes, media_type: str, *, kept: bool = False, times: int | None = 1) -> Fault:
        """Deliver other bytes than the result. Charged; a retry gets the true file, or with `kept` these again."""

        def exchanged(answer: Answer) -> Answer:
            return replace(answer, body=body, headers={**answer.headers, "Content-Type": media_type})

        return cls(Step.RESULT if kept else Step.DELIVERY, reshape=exchanged, times=times)

    # -- a good answer spoilt on its way: charged, and replayed in full to a retry ---------------------------------

    @classmethod
    def empty_answer(cls, *, kept: bool = False, times: int | None = 1) -> Fault:
        """Answer 200 without a body. Charged; a retry gets the file, or with `kept` the empty answer again."""
        return cls(
            Step.RESULT if kept else Step.DELIVERY, reshape=lambda answer: replace(answer, body=b""), times=times
        )

    @classmethod
    def shortened_answer(cls, *, times: int | None = 1) -> Fault:
        """Deliver half of the file with a Content-Length that fits it: only the format tells. Charged."""
        return cls(
            Step.DELIVERY,
            reshape=lambda answer: replace(answer, body=answer.body[: len(answer.body) // 2]),
            times=times,
        )

    @classmethod
    def truncated_answer(cls, *, chunked: bool = False, times: int | None = 1) -> Fault:
        """Announce the whole file (or chunks), send half of it, and close. Charged; a retry gets the file, free."""
        return cls(Step.DELIVERY, reshape=lambda answer: replace(answer, wire=Wire.HALF, chunked=chunked), times=times)

    @classmethod
    def without_length(cls, *, cut: bool = False, times: int | None = 1) -> Fault:
        """Deliver as HTTP/1.0 does: the body ends with the connection; with `cut` after half of it. Charged."""
        wire = Wire.HALF if cut else Wire.WHOLE
        return cls(Step.DELIVERY, reshape=lambda answer: replace(answer, until_close=True, wire=wire), times=times)

    @classmethod
    def repeated_answer(cls, *, times: int | None = 1) -> Fault:
        """Deliver the file and a line end too many; the connection's next request gets it again. Charged."""
        return cls(Step.DELIVERY, reshape=lambda answer: replace(answer, is_repeated=True), times=times)

    @classmethod
    def dripping_answer(cls, drips_from: Literal["head", "body", "end"] = "body", *, times: int | None = 1) -> Fault:
        """Deliver the file a byte at a time, from a place on. Charged; a retry gets it at once, free."""
        return cls(Step.DELIVERY, reshape=lambda answer: replace(answer, drips_from=drips_from), times=times)

    @classmethod
    def cut_after_work(cls, *, times: int | None = 1) -> Fault:
        """Close the connection when the work is done, without a byte. Charged; a retry gets the file, free."""
        return cls(Step.DELIVERY, reshape=lambda answer: replace(answer, wire=Wire.NOTHING), times=times)

    @classmethod
    def stalled_answer(cls, event: threading.Event, *, times: int | None = 1) -> Fault:
        """Send half of the file, and the rest after the event. Charged; a retry meanwhile gets the file, free."""
        return cls(Step.DELIVERY, reshape=lambda answer: replace(answer, stall=event), times=times)

    @classmethod
    def changed_headers(cls, changes: Mapping[str, str | None], *, times: int | None = 1) -> Fault:
        """Deliver the file with other headers; None takes one away. Charged; a retry gets the true headers."""

        def changed(answer: Answer) -> Answer:
            headers = {**answer.headers, **changes}
            return replace(answer, headers={name: value for name, value in headers.items() if value is not None})

        return cls(Step.DELIVERY, reshape=changed, times=times)

    # -- what the server asks ----------------------------------------------------------------------------------------

    def at(self, where: Callable[[Request], bool]) -> Fault:
        """Strike the requests that `where` picks, whatever their path, and return the fault."""
        self.where = where
        return self

    def strikes(self, request: Request, step: Step) -> bool:
        """Whether this request, at this step, is one of those meant."""
        if step is not self.step or (self.times is not None and self.struck >= self.times):
            return False
        return request.is_conversion if self.where is None else self.where(request)

    def reply(self) -> Answer:
        """Build the answer that takes the place of the work."""
        if self.cut == "before":
            return Answer(0, {}, wire=Wire.NOTHING, is_scripted=True)
        body = self.body
        if body is None and self.code is not None:
            body = json.dumps({"error": {"code": self.code, "message": self.message}}).encode()
        headers = {"Content-Type": self.content_type} if body else {}
        if self.retry_after is not None:
            headers["Retry-After"] = self.retry_after
        headers = {**headers, **self.headers}
        return Answer(self.status or 500, headers, body or b"", drips_from=self.drips_from, is_scripted=True)


class Faults:
    """The faults in force, oldest first. A request meets at most one at each step."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        """Put a fault in force, and return it so that a test can ask how often it `struck`."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Let everything go right again."""
        with self._lock:
            self._faults.clear()

    def take(self, request: Request, step: Step) -> Fault | None:
        """Return the fault that strikes here, and count it."""
        with self._lock:
            struck = next((fault for fault in self._faults if fault.strikes(request, step)), None)
            if struck:
                struck.struck += 1
                struck.reached.set()
            return struck


# ----------------------------------------------------------------------------------------------------------------------
# Accounts
# ----------------------------------------------------------------------------------------------------------------------


class Books:
    """What tests ask about afterwards. The only owner of these counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._paid: list[Charge] = []
        self._requests: list[Request] = []
        self._in_flight: set[Request] = set()
        self._in_flight_samples: list[int] = []
        self._replays = 0

    @property
    def paid(self) -> list[Charge]:
        """Every conversion charged, in order."""
        with self._lock:
            return list(self._paid)

    @property
    def requests(self) -> list[Request]:
        """Every request whose head was read, in order, of both ports."""
        with self._lock:
            return list(self._requests)

    @property
    def in_flight_samples(self) -> list[int]:
        """How many requests for a conversion were in flight when each of them began, itself included."""
        with self._lock:
            return list(self._in_flight_samples)

    @property
    def max_in_flight(self) -> int:
        """The most conversions ever in flight at once."""
        return max(self.in_flight_samples, default=0)

    @property
    def replays(self) -> int:
        """How many answers came from the idempotency memory."""
        with self._lock:
            return self._replays

    def paid_twice(self) -> list[tuple[str, str, int | None]]:
        """Return each (source_sha256, target, quality) that was charged more than once."""
        counts = Counter((charge.source_sha256, charge.target, charge.quality) for charge in self.paid)
        return [combination for combination, count in counts.items() if count > 1]

    def forget_counts(self) -> None:
        """Begin the lists and counts anew. Idempotency, the month's use and the minute's window stay as they are."""
        with self._lock:
            self._paid.clear()
            self._requests.clear()
            self._in_flight_samples.clear()
            self._replays = 0

    def begin(self, request: Request) -> None:
        """Note that a request's head was read."""
        with self._lock:
            self._requests.append(request)
            if request.is_conversion:
                self._in_flight.add(request)
                self._in_flight_samples.append(len(self._in_flight))

    def finish(self, request: Request, status: int | None) -> None:
        """Note that a request is answered, once. This happens before the answer's last byte leaves.

        A client may react to that byte faster than this thread goes on. Counted later, its next request would
        seem to overlap this one, and a test that looks at the counts could come too early.
        """
        with self._lock:
            if request.finished is None:
                request.finished, request.status = time.monotonic(), status
            self._in_flight.discard(request)

    def charge(self, request: Request, charge: Charge) -> None:
        """Note a charge."""
        with self._lock:
            self._paid.append(charge)
            request.charged = True

    def replayed(self, request: Request) -> None:
        """Note that an answer came from memory."""
        with self._lock:
            self._replays += 1
            request.replayed = True


class Meter:
    """The two limits: requests in a window, conversions in the month."""

    def __init__(self, behaviour: Behaviour, clock: Callable[[], float]) -> None:
        self._lock = threading.Lock()
        self._behaviour = behaviour
        self._clock = clock
        self._window_ends = -math.inf
        self._window_used = 0
        self._month_used = 0
        self._month_reserved = 0

    def admit_request(self) -> None:
        """Count a request, or refuse it until the window ends."""
        with self._lock:
            now, limit = self._clock(), self._behaviour.per_minute
            if now >= self._window_ends:
                self._window_ends, self._window_used = now + self._behaviour.window_seconds, 0
            if limit is None or self._window_used < limit:
                self._window_used += 1
                return
            wait, ends = max(1, math.ceil(self._window_ends - now)), self._window_ends
        as_date = self._behaviour.retry_after_as_date
        retry_after = email.utils.formatdate(math.ceil(ends), usegmt=True) if as_date else str(wait)
        raise RefusalError(429, "rate_limited", "too many requests", {"limit": limit, "retry_after": wait}, retry_after)

    def reserve_conversion(self) -> None:
        """Set one conversion of the month aside, or refuse: two at once must not both take the last one."""
        with self._lock:
            limit, used = self._behaviour.month_quota, self._month_used
            if limit is not None and used + self._month_reserved >= limit:
                raise RefusalError(429, "quota_exceeded", "the month is used up", {"limit": limit, "used": used})
            self._month_reserved += 1

    def settle_conversion(self, *, charged: bool) -> None:
        """Use the conversion that was set aside, or give it back."""
        with self._lock:
            self._month_reserved -= 1
            self._month_used += charged

    def usage(self) -> dict[str, int]:
        """Return the month's limit, used and remaining."""
        with self._lock:
            limit = self._behaviour.month_quota
            limit = AS_GOOD_AS_UNLIMITED if limit is None else limit
            return {"limit": limit, "used": self._month_used, "remaining": max(0, limit - self._month_used)}

    def headers(self) -> dict[str, str]:
        """Return the rate headers of this moment, or of an hour ago, or none."""
        if not self._behaviour.rate_headers:
            return {}
        with self._lock:
            limit = self._behaviour.per_minute
            limit = AS_GOOD_AS_UNLIMITED if limit is None else limit
            remaining, reset = max(0, limit - self._window_used), self._window_ends
        if self._behaviour.stale_rate_headers:
            remaining, reset = 0, self._clock() - 3600
        return {
            "X-RateLimit-Limit": str(limit),
            "X-RateLimit-Remaining": str(remaining),
            "X-RateLimit-Reset": str(math.ceil(reset) if math.isfinite(reset) else 0),
            "X-CTF-Remaining": str(self.usage()["remaining"]),
        }


# ----------------------------------------------------------------------------------------------------------------------
# Idempotency
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remembered:
    """What is known of one key. In flight: no answer yet. Failed: no answer any more."""

    body: str  # a digest
    at: float
    in_flight: bool = True
    answer: Answer | None = None


class Memory:
    """Which keys were seen, with which body, and the answers of those that succeeded."""

    def __init__(self, behaviour: Behaviour, clock: Callable[[], float]) -> None:
        self._lock = threading.Lock()
        self._behaviour = behaviour
        self._clock = clock
        self._remembered: dict[str, Remembered] = {}

    def claim(self, key: str, body: str) -> Answer | None:
        """Return the answer to replay, or None when the key is now the caller's, to be settled by it."""
        with self._lock:
            known = self._remembered.get(key)
            if known and not known.in_flight and self._clock() - known.at >= self._behaviour.keep_memory:
                known = None
            if known and known.body != body:
                raise RefusalError(422, "bad_request", "this Idempotency-Key was used with another body")
            if known and known.in_flight:
                wait = self._behaviour.in_flight_retry_after
                raise RefusalError(409, "bad_request", "the first request with this key is running", None, wait)
            if known and known.answer:
                return known.answer
            self._remembered[key] = Remembered(body, self._clock())
            return None

    def settle(self, key: str, body: str, answer: Answer | None) -> None:
        """Remember a success. Forget a failure, or only its answer if the behaviour says so."""
        with self._lock:
            if answer and answer.succeeded:
                self._remembered[key] = Remembered(body, self._clock(), in_flight=False, answer=answer)
            elif self._behaviour.remember_failed_bodies:
                self._remembered[key] = Remembered(body, self._clock(), in_flight=False)
            else:
                self._remembered.pop(key, None)

    def note_failure(self, key: str, body: str) -> None:
        """Remember the body of a request that failed at the gateway, unless more is known of its key."""
        if self._behaviour.remember_failed_bodies:
            with self._lock:
                self._remembered.setdefault(key, Remembered(body, self._clock(), in_flight=False))


# ----------------------------------------------------------------------------------------------------------------------
# Jobs and links
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One queued conversion. Its result is there from the start; the script says when it is told."""

    identity: str
    conversion: Conversion
    states: tuple[str, ...]
    created: float
    result: Converted | None
    problem: str
    polls: int = 0
    links: int = 0

    @property
    def state(self) -> str:
        """The state as of the last poll."""
        return self.states[min(max(self.polls - 1, 0), len(self.states) - 1)]


@dataclass(frozen=True)
class Link:
    """Where a signed link leads."""

    converted: Converted
    is_stale: bool


class Shelf:
    """The jobs, and the files that links lead to."""

    def __init__(self, behaviour: Behaviour, clock: Callable[[], float]) -> None:
        self._lock = threading.Lock()
        self._behaviour = behaviour
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._links: dict[str, Link] = {}

    def add_job(self, conversion: Conversion, result: Converted | None, problem: str) -> Job:
        """Queue a job. One without a result ends as failed, whatever the script says."""
        states = self._behaviour.job_states
        if result is None and states[-1] == "completed":
            states = (*states[:-1], "failed")
        job = Job(str(uuid.uuid4()), conversion, states, self._clock(), result, problem)
        with self._lock:
            self._jobs[job.identity] = job
        return job

    def polled(self, identity: str) -> Job:
        """Take one step in a job's script."""
        with self._lock:
            job = self._jobs.get(identity)
            if job is None:
                raise RefusalError(404, "not_found", "no such job")
            job.polls += 1
            return job

    def make_older(self, seconds: float) -> None:
        """Have every job made so much earlier."""
        with self._lock:
            for job in self._jobs.values():
                job.created -= seconds

    def listing(self) -> list[dict[str, object]]:
        """Tell of every job, newest first."""
        with self._lock:
            return [{"job_id": job.identity, "status": job.state} for job in reversed(self._jobs.values())]

    def link_to(self, converted: Converted, job: Job | None = None) -> str:
        """Make a new link, and return its path. A job's first links may be born stale."""
        token = uuid.uuid4().hex
        with self._lock:
            is_stale = job is not None and job.links < self._behaviour.stale_links
            if job is not None:
                job.links += 1
            self._links[token] = Link(converted, is_stale)
        return DOWNLOAD + token

    def linked(self, token: str) -> Converted:
        """Return the file behind a link."""
        with self._lock:
            link = self._links.get(token)
        if link is None:
            raise RefusalError(404, "not_found", "no such file")
        if link.is_stale:
            raise RefusalError(403, "link_expired", "this link has expired")
        return link.converted


# ----------------------------------------------------------------------------------------------------------------------
# The API
# ----------------------------------------------------------------------------------------------------------------------


class ConversionApi(Books):
    """The server, from `with` to the end of the block. Every field of `Behaviour` may be given by keyword."""

    def __init__(
        self, *, api_key: str = API_KEY, clock: Callable[[], float] = time.time, port: int = 0, **behaviour: object
    ) -> None:
        super().__init__()
        self.api_key = api_key
        self._behaviour = Behaviour()
        for name, value in behaviour.items():
            if not hasattr(self._behaviour, name):
                raise TypeError(f"Behaviour has no {name}")
            setattr(self._behaviour, name, value)
        self.faults = Faults()
        self.closing = threading.Event()
        # Bugs of this stand-in or of a callback. They surface at the end of the block: on the wire they would look like
        # one more network failure, which a good client survives.
        self.bugs: list[BaseException] = []
        self._clock = clock
        self._callbacks: dict[str, list[Callable[[Request], object]]] = {name: [] for name in EVENTS}
        self._meter = Meter(self.behaviour, clock)
        self._memory = Memory(self.behaviour, clock)
        self.shelf = Shelf(self.behaviour, clock)
        self._listener = Listener(self, "api", port)
        self._download_listener = Listener(self, "download", 0)

    def __enter__(self) -> ConversionApi:
        self._listener.start()
        self._download_listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._listener.stop()
        self._download_listener.stop()
        if kind is None and self.bugs:
            raise AssertionError("the stand-in itself failed") from self.bugs[0]

    @property
    def behaviour(self) -> Behaviour:
        """What may be changed while the server runs: field by field, since all its parts share this one object."""
        return self._behaviour

    @property
    def url(self) -> str:
        """Where the API is."""
        return self._listener.url

    @property
    def download_url(self) -> str:
        """Where the second port is, which serves downloads only."""
        return self._download_listener.url

    def on(self, event: Event, callback: Callable[[Request], object]) -> None:
        """Call back at a moment of every request, in the server's thread, which waits for it.

        "request_received": the body is read, nothing is done yet. "work_done": a conversion was charged and is
        remembered, no byte is sent. "half_answer_sent": half of a file is on the wire (answers are sent in two halves
        only while someone listens). "answered": the answer was sent whole.
        """
        self._callbacks[event].append(callback)

    def tell(self, event: Event, request: Request) -> None:
        """Call everyone who waits for this moment."""
        for callback in tuple(self._callbacks[event]):
            callback(request)

    def has_listener(self, event: Event) -> bool:
        """Whether anyone waits for this moment."""
        return bool(self._callbacks[event])

    # -- one request ---------------------------------------------------------------------------------------------------

    def answer(self, request: Request, raw_body: bytes) -> Answer:
        """Serve one request up to the answer, spoilt if a fault says so."""
        form = parsed_form(request, raw_body)
        self.tell("request_received", request)
        try:
            answer = self._respond(request, form)
        except RefusalError as refusal:
            answer = self._json(refusal.status, {"error": refusal.error}, refusal.headers)
        if request.charged:
            self.tell("work_done", request)
        if answer.succeeded and (fault := self.faults.take(request, Step.DELIVERY)):
            answer = fault.reshape(answer)
        return answer

    def _respond(self, request: Request, form: Form) -> Answer:
        if fault := self.faults.take(request, Step.ARRIVAL):
            if request.idempotency_key is not None and fault.cut is None:
                self._memory.note_failure(self._scope(request), self._body_digest(request))
            return fault.reply()
        if request.method == "GET" and request.path.startswith(DOWNLOAD):
            return self._file(self.shelf.linked(request.path[len(DOWNLOAD) :]), "converted")
        if request.listener == "download":
            raise RefusalError(404, "not_found", "this host has downloads only")
        if request.headers.get("Authorization") != f"Bearer {self.api_key}":
            raise RefusalError(401, "invalid_api_key", "missing or revoked key")
        self._meter.admit_request()
        return self._convert_once(request, form) if request.is_conversion else self._look_up(request)

    def _look_up(self, request: Request) -> Answer:
        if request.method == "GET" and request.path == USAGE:
            return self._json(200, {"plan": "test", "conversions": self._meter.usage()})
        if request.method == "GET" and request.path == JOBS:
            return self._json(200, {"jobs": self.shelf.listing()})
        if request.method == "GET" and request.path.startswith(JOBS + "/"):
            return self._json(200, self._told(self.shelf.polled(request.path[len(JOBS) + 1 :])))
        raise RefusalError(404, "not_found", f"nothing at {request.method} {request.path}")

    def _convert_once(self, request: Request, form: Form) -> Answer:
        if request.idempotency_key is None:
            return self._convert(request, form)
        if not KEY_SYNTAX.fullmatch(request.idempotency_key):
            raise RefusalError(400, "bad_request", "malformed Idempotency-Key")
        key, body = self._scope(request), self._body_digest(request)
        if replay := self._memory.claim(key, body):
            self.replayed(request)
            return replay
        answer = None
        try:
            answer = self._convert(request, form)
            return answer
        finally:
            self._memory.settle(key, body, answer)

    def _scope(self, request: Request) -> str:
        path = "" if self.behaviour.keys_shared_by_endpoints else request.path
        return f"{path} {request.idempotency_key}"

    def _body_digest(self, request: Request) -> str:
        """Digest what counts as the body: the parsed fields and file, and on demand the raw bytes."""
        parts = [request.path, sorted(request.fields.items()), request.filename, request.file_media_type]
        parts += [request.file_sha256, request.raw_sha256 if self.behaviour.compare_raw_body else None]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    # -- the work ------------------------------------------------------------------------------------------------------

    def _convert(self, request: Request, form: Form) -> Answer:
        fault = self.faults.take(request, Step.WORK)
        if fault and fault.hang:
            self.wait_for(fault.hang)
        if fault and fault.status:
            return fault.reply()
        conversion = self._ordered(request, form)
        if request.path == JOBS or (fault and fault.as_job):
            return self._queue(request, conversion)
        try:
            converted = self._work(request, conversion, as_job=False)
        except UnconvertibleError as problem:
            raise RefusalError(422, "conversion_failed", str(problem)) from problem
        fault = self.faults.take(request, Step.RESULT)
        if self._wants_envelope(request) or (fault and fault.content_type == "envelope"):
            return self._envelope(conversion, converted)
        answer = self._file(converted, stem(request))
        return fault.reshape(answer) if fault else answer

    def wait_for(self, event: threading.Event) -> None:
        """Wait, but not beyond the end of the server."""
        while not event.wait(0.1) and not self.closing.is_set():
            pass

    def _ordered(self, request: Request, form: Form) -> Conversion:
        """Read from the request what is to be converted, as strictly as the contract has it."""
        target, source = request.fields.get("target"), form.file
        if form.problem or not target:
            raise RefusalError(400, "bad_request", form.problem or "target is required")
        quality = checked_quality(request.fields.get("quality"))
        file_url = request.fields.get("file_url")
        if file_url is not None and not self.behaviour.accept_file_url:
            raise RefusalError(400, "bad_request", "file is required")
        if (source is None) == (file_url is None):
            raise RefusalError(400, "bad_request", "exactly one of file and file_url is required")
        if source is None:
            source = self._fetched(file_url or "")
        limit = self.behaviour.max_size
        if limit is not None and len(source) > limit:
            raise RefusalError(413, "file_too_large", "over the plan's size", {"limit": limit})
        return Conversion(source, source_format(request, source), converters.format_name(target), quality)

    def _fetched(self, url: str) -> bytes:
        # Without a proxy from the environment, and closed at once: each fetch is a stranger to the last one.
        with requests.Session() as session:
            session.trust_env = False
            session.verify = self.behaviour.ca_bundle or True
            try:
                reply = session.get(url, timeout=SECONDS_FOR_A_FETCH)
                reply.raise_for_status()
            except (requests.RequestException, ValueError) as problem:
                status = self.behaviour.fetch_failure_status
                raise RefusalError(status, "fetch_failed", f"cannot fetch file_url: {problem}") from problem
            return reply.content

    def _work(self, request: Request, conversion: Conversion, *, as_job: bool) -> Converted:
        """Convert, and charge exactly when that succeeds. A job's client waits by polling, so not here."""
        self._meter.reserve_conversion()
        converted = None
        try:
            if not as_job:
                self.closing.wait(self.behaviour.latency)
            converted = self.behaviour.convert(conversion)
        except UnsupportedRouteError as problem:
            route = f"{conversion.source_format}-to-{conversion.target}"
            raise RefusalError(422, "unsupported_route", str(problem), {"route": route}) from problem
        finally:
            self._meter.settle_conversion(charged=converted is not None)
        self.charge(request, self._charge(request, conversion))
        return converted

    def _charge(self, request: Request, conversion: Conversion) -> Charge:
        return Charge(
            request.idempotency_key,
            hashlib.sha256(conversion.source).hexdigest(),
            conversion.source_format,
            conversion.target,
            conversion.quality,
            self._clock(),
        )

    def _queue(self, request: Request, conversion: Conversion) -> Answer:
        """Make a job. It is charged here, once, unless it cannot succeed or is scripted to fail."""
        result, problem = None, "the engine gave up"
        if "failed" not in self.behaviour.job_states:
            try:
                result = self._work(request, conversion, as_job=True)
            except UnconvertibleError as unconvertible:
                problem = str(unconvertible)
        job = self.shelf.add_job(conversion, result, problem)
        status_url = f"{self.url}{JOBS}/{job.identity}"
        told = {"job_id": job.identity, "status": "queued", "status_url": status_url}
        return self._json(202, told, {"Location": status_url})

    # -- answers -------------------------------------------------------------------------------------------------------

    def _wants_envelope(self, request: Request) -> bool:
        return self.behaviour.answer_form == "envelope" or "application/json" in request.headers.get("Accept", "")

    def _file(self, converted: Converted, name: str) -> Answer:
        headers = {
            "Content-Type": converted.media_type,
            "Content-Disposition": f'attachment; filename="{name}.{converted.extension}"',
            "X-Conversion-Time": f"{round(self.behaviour.latency * 1000)}ms",
        }
        return Answer(200, {**self._common_headers(), **headers}, converted.body)

    def _json(self, status: int, told: Mapping[str, object], headers: Mapping[str, str] | None = None) -> Answer:
        all_headers = {**self._common_headers(), "Content-Type": "application/json", **(headers or {})}
        return Answer(status, all_headers, json.dumps(told).encode())

    def _common_headers(self) -> dict[str, str]:
        # Made with the answer and not when it is sent: a replay has its original's headers, the date included.
        return {"Date": email.utils.formatdate(self._clock(), usegmt=True), **self._meter.headers()}

    def _envelope(self, conversion: Conversion, converted: Converted) -> Answer:
        link = self._link(converted)
        formats = {"source_format": conversion.source_format, "target_format": conversion.target}
        told: dict[str, object] = {"size": len(converted.body), **formats}
        if self.behaviour.envelope_link == "result.file_url":
            return self._json(200, {"result": {"file_url": link, **told}})
        return self._json(200, {self.behaviour.envelope_link: link, **told})

    def _link(self, converted: Converted, job: Job | None = None) -> str:
        host = self.download_url if self.behaviour.separate_download_host else self.url
        return host + self.shelf.link_to(converted, job)

    def _told(self, job: Job) -> dict[str, object]:
        """Tell of a job what its state allows."""
        formats = {"source_format": job.conversion.source_format, "target_format": job.conversion.target}
        times = {"created_at": iso_time(job.created), "updated_at": iso_time(self._clock())}
        told: dict[str, object] = {"job_id": job.identity, "status": job.state, **times, **formats}
        if job.state == "completed" and job.result:
            size = {"size": len(job.result.body), "duration_ms": round(self.behaviour.latency * 1000)}
            told["result"] = {"file_url": self._link(job.result, job), **size, **formats}
        if job.state == "failed" and self.behaviour.job_error != "absent":
            as_object = {"code": "conversion_failed", "message": job.problem}
            told["error"] = as_object if self.behaviour.job_error == "object" else job.problem
        return told


# ----------------------------------------------------------------------------------------------------------------------
# Reading requests (pure)
# ----------------------------------------------------------------------------------------------------------------------


def parsed_form(request: Request, raw_body: bytes) -> Form:
    """Parse a multipart body, and note in the request what a test may ask for."""
    request.raw_sha256 = hashlib.sha256(raw_body).hexdigest()
    media_type, options = parse_options_header(request.headers.get("Content-Type"))
    if media_type != "multipart/form-data" or not options.get("boundary"):
        return Form(problem="the body is not multipart/form-data")
    try:
        parser = MultiPartParser(max_form_memory_size=None)
        fields, files = parser.parse(io.BytesIO(raw_body), options["boundary"].encode(), len(raw_body))
    except ValueError as problem:
        return Form(problem=f"malformed multipart: {problem}")
    request.fields = fields.to_dict()
    part = files.get("file")
    if part is None:
        return Form()
    file = part.read()
    request.filename, request.file_media_type = part.filename, part.content_type
    request.file_sha256 = hashlib.sha256(file).hexdigest()
    return Form(file)


def source_format(request: Request, source: bytes) -> str:
    """Tell the source format: by the field, then the filename of an upload, then the first bytes."""
    named = request.fields.get("source") or PurePath(request.filename or "").suffix
    told = converters.format_name(named) if named else converters.sniffed_format(source)
    if not told:
        raise RefusalError(400, "bad_request", "cannot tell the source format")
    return told


def checked_quality(text: str | None) -> int | None:
    """Read a quality from 1 to 100."""
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= 100:
        raise RefusalError(400, "bad_request", "quality is a whole number from 1 to 100")
    return int(text)


def stem(request: Request) -> str:
    """Return the name that the answer suggests, without extension and nothing that could end a header."""
    name = PurePath(request.filename or "").stem or "converted"
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def suggested_name(answer: Answer) -> str:
    """Return the file name in an answer's Content-Disposition."""
    return parse_options_header(answer.headers.get("Content-Disposition"))[1].get("filename", "converted.bin")


def with_file(answer: Answer, body: bytes, media_type: str, extension: str) -> Answer:
    """Return the answer with another file in it, named for what it is."""
    name = PurePath(suggested_name(answer)).stem
    disposition = f'attachment; filename="{name}.{extension}"'
    headers = {**answer.headers, "Content-Type": media_type, "Content-Disposition": disposition}
    return replace(answer, body=body, headers=headers)


def iso_time(seconds: float) -> str:
    """Write a time as the API's JSON has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


# ----------------------------------------------------------------------------------------------------------------------
# The wire
# ----------------------------------------------------------------------------------------------------------------------


class Listener(ThreadingHTTPServer):
    """One port, with a thread per connection. It knows its connections, so that stopping closes them all."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(self, api: ConversionApi, name: Literal["api", "download"], port: int) -> None:
        self.api = api
        self.name = name
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Exchange)

    @property
    def url(self) -> str:
        """Where this port is."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of this machine's name, which can take seconds."""
        socketserver.TCPServer.server_bind(self)

    def start(self) -> None:
        """Serve in a thread of its own."""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Stop accepting, and close what is open: a client sees the end at once, not at its timeout."""
        self.shutdown()
        self.server_close()
        with self._lock:
            for connection in self._connections:
                shut(connection)

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        """Accept a connection, and keep it in mind."""
        connection, address = super().get_request()
        with self._lock:
            self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        """Close a connection."""
        with self._lock:
            self._connections.discard(request if isinstance(request, socket.socket) else request[1])
        super().shutdown_request(request)


def shut(connection: socket.socket) -> None:
    """Shut a connection that its client may have shut already."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


class Exchange(BaseHTTPRequestHandler):
    """One connection: reads requests, puts answers on the wire."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Listener
    repeated: bytes = b""  # an answer that is still to be sent once more

    def do_GET(self) -> None:
        """Serve a GET."""
        self._serve()

    def do_POST(self) -> None:
        """Serve a POST."""
        self._serve()

    def handle(self) -> None:
        """Serve until either side closes. What a client breaks is its own affair; a bug here is kept for the test."""
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True
        except Exception as bug:
            self.server.api.bugs.append(bug)
            raise

    def _serve(self) -> None:
        api = self.server.api
        headers = CaseInsensitiveDict(self.headers.items())
        path = urlsplit(self.path).path
        request = Request(self.command, path, headers, self.server.name, time.monotonic())
        request.idempotency_key = headers.get("Idempotency-Key")
        api.begin(request)
        try:
            body = self._read_body()
            if body is not None:
                self.wfile.write(self.repeated + api.behaviour.interim)
                self._send(request, api.answer(request, body))
        finally:
            api.finish(request, None)

    # -- reading -------------------------------------------------------------------------------------------------------

    def _read_body(self) -> bytes | None:
        """Read a body of either kind, or return None when the client leaves halfway."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            return self._read_chunks()
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) == length:
            return body
        self.close_connection = True
        return None

    def _read_chunks(self) -> bytes | None:
        chunks: list[bytes] = []
        while line := self.rfile.readline():
            size = int(line.split(b";")[0], 16)
            chunk = self.rfile.read(size)
            is_whole = len(chunk) == size and self.rfile.readline() == b"\r\n"
            if not is_whole:
                break
            if size == 0:
                return b"".join(chunks)
            chunks.append(chunk)
        self.close_connection = True
        return None

    # -- writing -------------------------------------------------------------------------------------------------------

    def _send(self, request: Request, answer: Answer) -> None:
        api = self.server.api
        self.close_connection = self.close_connection or answer.wire is not Wire.WHOLE or answer.until_close
        first, rest = self._halves(answer)
        if answer.wire is Wire.WHOLE and not first:
            rest = self._head(answer) + rest
        elif answer.wire is not Wire.NOTHING:
            self.wfile.write(self._head(answer) + first)
            api.tell("half_answer_sent", request)
        if answer.stall:
            api.wait_for(answer.stall)
        api.finish(request, answer.status)
        if answer.is_repeated:
            self.repeated, rest = rest, rest + b"\r\n"
        if answer.drips_from:
            dripping = {"head": len(rest), "body": len(answer.body), "end": DRIPPING_END}[answer.drips_from]
            rest = self._dripped(rest, max(0, len(rest) - dripping))
        if answer.wire is Wire.WHOLE:
            self._send_last(request, rest)
            api.tell("answered", request)

    def _dripped(self, sent: bytes, start: int) -> bytes:
        """Send all but the last byte, which is returned: the first part at once, the others twenty in a second."""
        self.wfile.write(sent[:start])
        for place in range(start, len(sent) - 1):
            self.server.api.closing.wait(0.05)
            self.wfile.write(sent[place : place + 1])
        return sent[-1:]

    def _send_last(self, request: Request, rest: bytes) -> None:
        # Noted before it is true, for the reason that `Books.finish` gives, and taken back if it does not come true.
        request.delivered = True
        try:
            self.wfile.write(rest)
        except ConnectionError:
            request.delivered = False
            raise

    def _halves(self, answer: Answer) -> tuple[bytes, bytes]:
        """Cut the body in two where someone is interested in the middle; else all of it is the second part."""
        wants_middle = answer.wire is Wire.HALF or answer.stall or self.server.api.has_listener("half_answer_sent")
        middle = len(answer.body) // 2 if wants_middle else 0
        first = answer.body[:middle]
        if answer.chunked:
            first = f"{len(first):x}\r\n".encode() + first + b"\r\n"
        return first, answer.body[middle:]

    def _head(self, answer: Answer) -> bytes:
        announced = len(answer.body) if answer.announced is None else answer.announced
        length = ("Transfer-Encoding", "chunked") if answer.chunked else ("Content-Length", str(announced))
        framing = [] if answer.until_close else [length]
        lines = [f"HTTP/{'1.0' if answer.until_close else '1.1'} {answer.status} {reason(answer.status)}"]
        lines += [f"{name}: {value}" for name, value in (*answer.headers.items(), *framing)]
        if self.close_connection and answer.wire is Wire.WHOLE:
            lines.append("Connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def reason(status: int) -> str:
    """Return a status line's words, also for a status that nobody has defined."""
    return HTTPStatus(status).phrase if status in HTTPStatus.__members__.values() else "Unknown"


# ----------------------------------------------------------------------------------------------------------------------
# In the foreground
# ----------------------------------------------------------------------------------------------------------------------


def die_with_parent() -> None:
    """Ask Linux to end this process with its parent: a killed test run must leave no server behind."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def main() -> int:
    """Serve until SIGTERM, then print the counts as one line of JSON."""
    parser = argparse.ArgumentParser(description="a conversion API for tests")
    parser.add_argument("--latency", type=float, default=0.0, metavar="S", help="seconds of work per conversion")
    parser.add_argument("--port", type=int, default=0, help="default: any free one")
    parser.add_argument("--marking", action="store_true", help="mark instead of converting: cheap, for big counts")
    options = parser.parse_args()
    die_with_parent()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    convert = converters.marking if options.marking else converters.convert
    with ConversionApi(port=options.port, latency=options.latency, convert=convert) as api:
        print(f"READY {api.url} {api.api_key}", flush=True)
        stop.wait()
    counts = {"paid": len(api.paid), "paid_twice": len(api.paid_twice()), "requests": len(api.requests)}
    print(json.dumps({**counts, "replays": api.replays}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
