"""The conversion API and an S3 for the bench: one process, one event loop, as cheap as Python can be.

    python -m tests.bench.standins [options]     prints READY http://127.0.0.1:PORT, serves until its parent ends

It checks nothing and remembers nothing but counts: the strict ones are those in tests/standins. With --remembers it
knows what was paid under which idempotency key, until `POST /day` says that a day has passed, and what was put.
`GET /counts` says what was asked for, how long it took and the process's own CPU time since the last `POST /counts`.

Its cost is checked by `python -m tests.bench cost`: the CPU time of this process for each request, and of the program
for each file, in the same run. With others at work on the same two cores a request took 0.09 to 0.10 ms, most of it
the kernel's, and all requests of a file 4 to 5 % of the CPU time of both; a page of a listing, which is put together
from prepared pieces (see keys.py), 0.5 ms, where boto3 takes 130 ms to read it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote
from xml.sax.saxutils import escape

from tests.bench.keys import LAST_CHARACTER, NAMES, PLAIN, Keys
from tests.standins.s3_server import HOST, end_on_signals, end_with_parent

BACKLOG = 4096
WHOLE_BYTES = 1 << 20  # a longer body is sent in pieces of this size
MD5_MOST_BYTES = 16 << 20  # the ETag of a put output is its true MD5 up to this size
CONVERSIONS_LEFT = 1_000_000_000
PAGE_KEYS = 1000
JPEG_HEAD = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
PIECE = JPEG_HEAD + bytes(WHOLE_BYTES - len(JPEG_HEAD))
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
XML = "application/xml"
REASONS = {200: "OK", 202: "Accepted", 204: "No Content", 404: "Not Found", 422: "Unprocessable", 429: "Too Many"}


class Answer(NamedTuple):
    """What is sent after `delay` seconds; `length` bytes of picture follow where the body is not given."""

    head: bytes
    body: bytes = b""
    length: int = 0
    delay: float = 0.0
    then: Callable[[], None] | None = None  # called when it is sent


def answer(
    body: bytes = b"", *, status: int = 200, media_type: str = "", length: int | None = None, more: str = ""
) -> Answer:
    """An answer with a given body, or with one of `length` bytes that begins as a JPEG."""
    kind = f"Content-Type: {media_type}\r\n" if media_type else ""
    size = len(body) if length is None else length
    head = f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Length: {size}\r\n{kind}{more}\r\n"
    if length is None:
        return Answer(head.encode(), body)
    return Answer(head.encode(), PIECE[:size], 0) if size <= WHOLE_BYTES else Answer(head.encode(), b"", size)


def as_json(content: object, *, status: int = 200, more: str = "") -> Answer:
    """A JSON answer."""
    return answer(json.dumps(content).encode(), status=status, media_type="application/json", more=more)


########################################################################
# HTTP
########################################################################


class Connection(asyncio.Protocol):
    """One kept-alive connection. A request's body is counted and dropped as it comes, but for what is remembered."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._buffer = b""
        self._left = 0  # bytes of the body that are still to come
        self._is_chunked = False
        self._request: tuple[str, str] | None = None  # method and target
        self._sent = b""  # its headers, and its body where that is remembered
        self._keeps_body = False
        self._to_send = 0
        self._is_paused = False
        self._then: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        """Take what has come, as far as it makes whole requests."""
        if self._left > len(data):
            self._left -= len(data)
            self._sent += data if self._keeps_body else b""
            return
        data = self._buffer + data if self._buffer else data
        self._buffer = b""
        while data:
            rest = self._take(data)
            if rest is None:
                self._buffer = data
                return
            data = rest

    def _take(self, data: bytes) -> bytes | None:
        """What is left after the next whole thing in it; None if that is not whole yet."""
        if self._left:
            eaten = min(self._left, len(data))
            self._left -= eaten
            self._sent += data[:eaten] if self._keeps_body else b""
            if not self._left and not self._is_chunked:
                self._finish()
            return data[eaten:]
        if self._is_chunked:
            return self._take_chunk_head(data)
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return None
        self._start(data[: end + 2])
        return data[end + 4 :]

    def _take_chunk_head(self, data: bytes) -> bytes | None:
        end = data.find(b"\r\n")
        if end < 0:
            return None
        # The line that ends the chunk before is empty; so is the one that ends the trailer.
        size = int(data[:end].split(b";")[0] or b"-1", 16)
        if size == 0:
            last = data.find(b"\r\n\r\n", end)
            if last < 0:
                return None
            self._is_chunked = False
            self._finish()
            return data[last + 4 :]
        self._left = max(0, size)
        return data[end + 2 :]

    def _start(self, head: bytes) -> None:
        line, _, rest = head.partition(b"\r\n")
        method, target, _ = line.decode("latin-1").split(" ")
        fields = rest.lower()
        self._left = header_number(fields, b"content-length:")
        self._is_chunked = b"transfer-encoding: chunked" in fields
        self._request, self._sent = (method, target), rest + b"\r\n"
        self._keeps_body = self._service.memory is not None and target.startswith("/v1/")
        if b"expect: 100-continue" in fields:
            self._transport.write(CONTINUE)
        if not self._left and not self._is_chunked:
            self._finish()

    def _finish(self) -> None:
        if self._request is None:
            return
        (method, target), self._request = self._request, None
        reply = self._service.answer(method, target, self._sent)
        if reply.delay:
            asyncio.get_running_loop().call_later(reply.delay, self._send, reply)
        else:
            self._send(reply)

    def _send(self, reply: Answer) -> None:
        if self._transport.is_closing():
            return
        if reply.length:
            self._transport.write(reply.head)
            self._to_send, self._then = reply.length, reply.then
            self._pump()
            return
        self._transport.write(reply.head + reply.body if len(reply.body) < 65_536 else reply.head)
        if len(reply.body) >= 65_536:
            self._transport.write(reply.body)
        if reply.then:
            reply.then()

    def _pump(self) -> None:
        while self._to_send and not self._is_paused and not self._transport.is_closing():
            self._transport.write(PIECE if self._to_send >= WHOLE_BYTES else PIECE[: self._to_send])
            self._to_send -= min(self._to_send, WHOLE_BYTES)
        if not self._to_send and self._then:
            then, self._then = self._then, None
            then()

    def pause_writing(self) -> None:
        """The peer reads slowly."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """The peer has read."""
        self._is_paused = False
        self._pump()


def header_number(fields: bytes, name: bytes) -> int:
    """The number in a header; 0 where it is not given. `fields` in lower case."""
    start = fields.find(b"\r\n" + name) + 2 if not fields.startswith(name) else 0
    if start == 1:
        return 0
    return int(fields[start + len(name) : fields.index(b"\r\n", start)])


########################################################################
# What is asked for
########################################################################


class Counts:
    """What was asked for since the start, or since the last reset."""

    def __init__(self) -> None:
        self.requests = self.api_requests = self.conversions = self.throttled = 0
        self.heads = self.gets = self.puts = self.pages = 0
        self.windows: list[dict[str, float]] = []
        self.first_conversion_at = self.last_put_at = 0.0
        self._cpu = time.process_time()

    def conversion(self) -> None:
        """Note one that was accepted."""
        self.conversions += 1
        self.first_conversion_at = self.first_conversion_at or time.monotonic()

    def put(self) -> None:
        """Note an object that is stored."""
        self.puts += 1
        self.last_put_at = time.monotonic()

    def report(self) -> dict[str, Any]:
        """All of it; `span_seconds` is the time from the first conversion asked for to the last object stored."""
        names = ("requests", "api_requests", "conversions", "throttled", "heads", "gets", "puts", "pages", "windows")
        return {
            **{name: getattr(self, name) for name in names},
            "span_seconds": max(0.0, self.last_put_at - self.first_conversion_at),
            "cpu_seconds": time.process_time() - self._cpu,
        }


OUTPUTS = "converted/"


class Memory:
    """What is paid and what is stored. The API replays under a key what it has done under it, for a day."""

    def __init__(self) -> None:
        self.paid = Counter[str]()  # by source
        self.outputs: dict[str, str] = {}  # key -> the headers that a HEAD of it has
        self._bodies: dict[bytes, bytes] = {}  # by idempotency key

    def pay(self, sent: bytes) -> bool | None:
        """Whether this conversion is paid now, rather than replayed; None: its key came with another body."""
        head, _, body = sent.partition(b"\r\n\r\n")
        named = re.search(rb"(?i)^idempotency-key: *(\S+)", head, re.MULTILINE)
        if named and (known := self._bodies.get(named[1])):
            return False if known == body else None
        if named:
            self._bodies[named[1]] = body
        source = re.search(r"://[^/]+/[^/]+/([^?]+)\?", unquote(body.decode("latin-1")))
        self.paid[source[1] if source else ""] += 1
        return True

    def put(self, key: str, head: bytes) -> None:
        """Know an object with its metadata."""
        fields = re.findall(r"(?im)^x-amz-meta-[^\r]*", head.decode("latin-1"))
        self.outputs[key] = "".join(f"{field}\r\n" for field in fields)

    def forget_keys(self) -> None:
        """Let a day pass."""
        self._bodies.clear()

    def report(self) -> dict[str, int]:
        """What was paid and stored since the start."""
        twice = self.paid.total() - len(self.paid)
        return {"paid": self.paid.total(), "paid_twice": twice, "stored": len(self.outputs)}


class Service:
    """Both servers."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.keys = Keys(options.keys, options.folders, options.size, options.names)
        self.counts = Counts()
        self.memory = Memory() if options.remembers else None
        self.random = random.Random(1)
        self._window_ends = 0.0
        self._in_parts = set[str]()  # keys that were put in parts: the program looks whether they are there
        body = PIECE[: options.answer_bytes] + bytes(max(0, min(options.answer_bytes, MD5_MOST_BYTES) - WHOLE_BYTES))
        self._answer_md5 = hashlib.md5(body).hexdigest()
        self._put = answer(more=f'ETag: "{self._answer_md5}"\r\n')._replace(
            delay=options.put_latency, then=self._note_put
        )

    def _note_put(self) -> None:
        # Looked up when it happens: a reset replaces the counts.
        self.counts.put()

    def answer(self, method: str, target: str, sent: bytes) -> Answer:
        """The answer to a request; `sent`: its headers, and its body where that is remembered."""
        if target == "/counts":
            report = self.counts.report() | (self.memory.report() if self.memory else {})
            self.counts = Counts() if method == "POST" else self.counts
            return as_json(report)
        if target == "/day" and self.memory:
            self.memory.forget_keys()
            return answer()
        self.counts.requests += 1
        if target.startswith("/v1/"):
            self.counts.api_requests += 1
            return self._api(method, target, sent)
        path, _, query = target.partition("?")
        bucket, _, key = path[1:].partition("/")
        if key and method == "PUT" and self.memory:
            self.memory.put(unquote(key), sent)
        return self._object(method, unquote(key), query) if key else self._bucket(method, bucket, query)

    # The conversion API

    def _api(self, method: str, target: str, sent: bytes) -> Answer:
        if target == "/v1/usage":
            return as_json({"plan": "bench", "conversions": {"used": self.counts.conversions, "limit": 10**9}})
        if target.startswith("/v1/jobs/download/"):
            return answer(media_type="image/jpeg", length=self.options.answer_bytes)
        more = self._rate_limit() if self.options.per_minute else ""
        if more is None:
            return self._refusal()
        if method == "POST":
            return self._conversion(target, more, sent)
        job = target.rpartition("/")[2]
        result = {"file_url": f"/v1/jobs/download/{job}", "size": self.options.answer_bytes}
        return as_json({"job_id": job, "status": "completed", "result": result}, more=more)

    def _conversion(self, target: str, more: str, sent: bytes) -> Answer:
        if self.memory and not (is_new := self.memory.pay(sent)):
            if is_new is None:
                error = {"code": "bad_request", "message": "this key came with another body"}
                return as_json({"error": error}, status=422, more=more)
            return answer(media_type="image/jpeg", length=self.options.answer_bytes, more=more)
        self.counts.conversion()
        more += f"X-CTF-Remaining: {CONVERSIONS_LEFT - self.counts.conversions}\r\n"
        if target == "/v1/jobs":
            job = f"{self.counts.conversions:032x}"
            reply = {"job_id": job, "status": "queued", "status_url": f"/v1/jobs/{job}"}
            return as_json(reply, status=202, more=more)
        found = answer(media_type="image/jpeg", length=self.options.answer_bytes, more=more)
        spread = self.options.spread
        return found._replace(delay=self.options.latency * self.random.uniform(1 - spread, 1 + spread))

    def _rate_limit(self) -> str | None:
        """The headers that tell of the limit; None if the request is beyond it."""
        now, limit = time.time(), self.options.per_minute
        if now >= self._window_ends or not self.counts.windows:
            self._window_ends = now + self.options.window
            self.counts.windows.append({"began_at": now, "accepted": 0, "refused": 0})
        window = self.counts.windows[-1]
        if window["accepted"] >= limit:
            window["refused"] += 1
            self.counts.throttled += 1
            return None
        window["accepted"] += 1
        return self._limit_headers(int(limit - window["accepted"]))

    def _limit_headers(self, left: int) -> str:
        limit, reset = self.options.per_minute, math.ceil(self._window_ends)
        return f"X-RateLimit-Limit: {limit}\r\nX-RateLimit-Remaining: {left}\r\nX-RateLimit-Reset: {reset}\r\n"

    def _refusal(self) -> Answer:
        seconds = max(1, math.ceil(self._window_ends - time.time()))
        error = {"code": "rate_limited", "message": "the limit per minute is reached"}
        return as_json({"error": error}, status=429, more=f"{self._limit_headers(0)}Retry-After: {seconds}\r\n")

    # S3

    def _bucket(self, method: str, bucket: str, query: str) -> Answer:
        if method == "HEAD":
            return answer(more="x-amz-bucket-region: us-east-1\r\n")
        self.counts.pages += 1
        wanted = {name: values[-1] for name, values in parse_qs(query, keep_blank_values=True).items()}
        if self.options.has_outputs and wanted.get("prefix", "").startswith(OUTPUTS):
            body = self._outputs(bucket, wanted)
        else:
            body = Page(self.keys, bucket, wanted).xml()
        return answer(body, media_type=XML)._replace(delay=self.options.page_latency)

    def _outputs(self, bucket: str, wanted: dict[str, str]) -> bytes:
        """A page of the outputs of all objects, each as it was answered and put."""
        wanted["prefix"] = wanted["prefix"].removeprefix(OUTPUTS)
        after = wanted.get("start-after", "")
        wanted["start-after"] = after.removeprefix(OUTPUTS)
        if match := re.fullmatch(r"(.*[0-9]{8})\.(.*)", wanted["start-after"]):
            wanted["start-after"] = match[1] + (".png" if match[2] >= "jpg" else "")
        elif after > OUTPUTS and not after.startswith(OUTPUTS):
            wanted["start-after"] = LAST_CHARACTER
        page = Page(self.keys, bucket, wanted).xml().replace(b"<Key>", b"<Key>converted/").replace(b".png<", b".jpg<")
        page = re.sub(rb"&quot;[0-9a-f]{32}", b"&quot;" + self._answer_md5.encode(), page)
        return page.replace(b"<Size>%d<" % self.keys.size, b"<Size>%d<" % self.options.answer_bytes)

    def _object(self, method: str, key: str, query: str) -> Answer:
        if method == "PUT":
            return self._put._replace(then=None) if query.startswith("partNumber") else self._put
        if method == "POST":
            return self._multipart(query, key)
        if method == "DELETE":
            return answer(status=204)
        if method == "HEAD":
            self.counts.heads += 1
            return self._head(key)._replace(body=b"", length=0, delay=self.options.head_latency)
        self.counts.gets += 1
        return self._source(key)

    def _head(self, key: str) -> Answer:
        if self.memory and key in self.memory.outputs:
            more = f'ETag: "{self._answer_md5}"\r\n{self.memory.outputs[key]}'
            return answer(media_type="image/jpeg", length=self.options.answer_bytes, more=more)
        if key in self._in_parts:
            return answer(more=f'ETag: "{self._answer_md5}-2"\r\n')
        return self._source(key)

    def _source(self, key: str) -> Answer:
        size = self._source_size(key)
        if size is None:
            missing = b"<Error><Code>NoSuchKey</Code><Message>none</Message></Error>"
            return answer(missing, status=404, media_type=XML)
        number = self.keys.number_of(key) or 0
        more = f'ETag: "{self.keys.etag(number)}"\r\nLast-Modified: Fri, 02 Jan 2026 03:04:05 GMT\r\n'
        return answer(media_type="image/png", length=size, more=more)

    def _source_size(self, key: str) -> int | None:
        stem = key.rpartition("/")[2].partition(".")[0]
        if stem.startswith("big-") and stem[4:].isdigit():
            return int(stem[4:])
        return self.keys.size if self.keys.number_of(key) is not None else None

    def _multipart(self, query: str, key: str) -> Answer:
        if query.startswith("uploads"):
            name = "InitiateMultipartUploadResult"
            text = f"<Bucket>b</Bucket><Key>{escape(key)}</Key><UploadId>1</UploadId>"
        else:
            self.counts.put()
            self._in_parts.add(key)
            name, text = "CompleteMultipartUploadResult", f'<ETag>"{self._answer_md5}-2"</ETag>'
        return answer(f"<{name}>{text}</{name}>".encode(), media_type=XML)


########################################################################
# Listings
########################################################################


class Page:
    """One answer to ListObjectsV2."""

    def __init__(self, keys: Keys, bucket: str, wanted: dict[str, str]) -> None:
        self._keys, self._bucket, self._wanted = keys, bucket, wanted
        self._prefix = wanted.get("prefix", "")
        self._most = min(int(wanted.get("max-keys", PAGE_KEYS)), PAGE_KEYS)
        self._delimiter = wanted.get("delimiter", "")
        self._is_empty = bucket.endswith("-empty") or self._prefix.startswith(OUTPUTS)

    def _first(self, start: int) -> int:
        token, after = self._wanted.get("continuation-token"), self._wanted.get("start-after")
        if token:
            return int(base64.b64decode(token))
        return max(start, self._keys.after(after)) if after else start

    def xml(self) -> bytes:
        """The body of the answer."""
        start, end = (0, 0) if self._is_empty else self._keys.range_of(self._prefix)
        first = self._first(start)
        if self._delimiter:
            entries, count, following = self._grouped(first, end)
        else:
            following = min(first + self._most, end)
            entries, count = self._keys.xml(first, following), max(0, following - first)
        return b"".join([self._head(count, following if following < end else None), *entries, b"</ListBucketResult>"])

    def _grouped(self, first: int, end: int) -> tuple[list[bytes], int, int]:
        """Entries, how many there are, and the number of the key after them."""
        entries: list[bytes] = []
        groups: list[bytes] = []
        while first < end and len(entries) + len(groups) < self._most:
            key = self._keys.key(first)
            cut = key.find(self._delimiter, len(self._prefix))
            if cut < 0:
                entries += self._keys.xml(first, first + 1)
                first += 1
            else:
                group = key[: cut + len(self._delimiter)]
                groups.append(f"<CommonPrefixes><Prefix>{self._text(group)}</Prefix></CommonPrefixes>".encode())
                first = self._keys.range_of(group)[1]
        return entries + groups, len(entries) + len(groups), first

    def _text(self, value: str) -> str:
        return quote(value, safe="/-_.*") if self._wanted.get("encoding-type") == "url" else escape(value)

    def _head(self, count: int, following: int | None) -> bytes:
        parts = {
            "Name": self._bucket,
            "Prefix": self._text(self._prefix),
            "StartAfter": self._text(self._wanted.get("start-after", "")),
            "ContinuationToken": escape(self._wanted.get("continuation-token", "")),
            "NextContinuationToken": base64.b64encode(b"%024d" % following).decode() if following is not None else "",
            "KeyCount": count,
            "MaxKeys": self._most,
            "Delimiter": self._text(self._delimiter),
            "EncodingType": self._wanted.get("encoding-type", ""),
            "IsTruncated": "true" if following is not None else "false",
        }
        text = "".join(f"<{name}>{value}</{name}>" for name, value in parts.items() if value != "" or name == "Prefix")
        opening = '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        return f'<?xml version="1.0" encoding="UTF-8"?>\n{opening}{text}'.encode()


########################################################################
# The process
########################################################################


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.standins", allow_abbrev=False)
    add = parser.add_argument
    add("--latency", type=float, default=0.8, metavar="S", help="seconds that a conversion takes")
    add("--spread", type=float, default=0.0, metavar="X", help="by how much of that it takes more or less, at most")
    add("--answer-bytes", type=int, default=20_000, metavar="N", help="length of a converted file")
    add("--per-minute", type=int, default=0, metavar="N", help="limit of the API in a window; 0: none")
    add("--window", type=float, default=60.0, metavar="S", help="length of the window in seconds")
    add("--put-latency", type=float, default=0.03, metavar="S", help="seconds that a PUT takes")
    add("--head-latency", type=float, default=0.0, metavar="S", help="seconds that a HEAD of an object takes")
    add("--page-latency", type=float, default=0.0, metavar="S", help="seconds that a page of a listing takes")
    add("--keys", type=int, default=1000, metavar="N", help="objects in the bucket")
    add("--has-outputs", action="store_true", help="each object has its output below converted/")
    add("--folders", type=int, default=0, metavar="N", help="folders that the objects lie in; 0: a flat prefix")
    add("--names", choices=NAMES, default=PLAIN, help="what keys look like")
    add("--remembers", action="store_true", help="know what is paid and what is stored")
    add("--size", type=int, default=20_000, metavar="N", help="bytes of each object")
    return parser


async def serve(options: argparse.Namespace) -> None:
    """Serve until the process ends."""
    service = Service(options)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(service), HOST, 0, backlog=BACKLOG)
    print(f"READY http://{HOST}:{server.sockets[0].getsockname()[1]}", flush=True)
    service.counts = Counts()
    await server.serve_forever()


def main() -> None:
    """Serve as the command line says."""
    options = build_parser().parse_args()
    end_with_parent()
    end_on_signals()
    # The tests of the stand-ins do without uvloop; every figure is measured with it.
    run = import_module("uvloop").run if find_spec("uvloop") else asyncio.run
    run(serve(options))


if __name__ == "__main__":
    main()
