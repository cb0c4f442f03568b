"""A listing that breaks, once or for good: all objects and outputs are seen all the same, or the run stops."""

import re
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from tests.standins.conversion_api import ConversionApi
from tests.standins.converters import Conversion, marking
from tests.standins.program import lose_checkpoint, script_with
from tests.standins.promises import PNG, assert_all_promises_are_kept
from tests.standins.relay import Relay, Spoilt

Cli = Callable[..., Any]

PAGE_OF_FOUR = "program.PAGE_KEYS = 4"
# Keys that S3 writes otherwise in a listing that is asked for URL-encoded; in S3's order, Zebra comes between them.
NAMES = ["Zebra", "Zürich", "a+b", "my photo", "my%20photo", "100%", "ü/ö & ä", "~x", "b (1)", "c", "d=e", "f#g?"]
TOKEN = rb"<NextContinuationToken>[^<]*</NextContinuationToken>"


def put_sources(bucket: Any) -> dict[str, bytes]:
    """Put a source for each name; the key and the bytes of each output that they must come to."""
    sources = {name: PNG + name.encode() for name in NAMES}
    for name, source in sources.items():
        bucket.put(f"{name}.png", source)
    return {
        f"converted/{name}.jpg": marking(Conversion(source, "png", "jpg", None)).body
        for name, source in sources.items()
    }


def asked_page(path: str) -> tuple[tuple[str, str], ...]:
    """Which page of which listing a request asks for, however it is signed; nothing if it asks for no page."""
    asked = {name.lower(): value for name, value in parse_qsl(urlsplit(path).query)}
    named = ("prefix", "start-after", "continuation-token", "delimiter")
    return tuple((name, asked.get(name, "")) for name in named) if "list-type" in asked else ()


class Breaks:
    """Spoils the answer to the first request for some pages of a listing; a second request for them works."""

    def __init__(self, spoilt: Spoilt, *, prefix: str = "", first: int = 0, pages: int = 1) -> None:
        self._spoilt, self._prefix, self._first, self._most = spoilt, prefix, first, pages
        self._seen: set[tuple[tuple[str, str], ...]] = set()
        self._lock = threading.Lock()
        self.struck = 0

    def __call__(self, method: str, path: str) -> Spoilt:
        """What becomes of this request's answer."""
        page = asked_page(path) if method == "GET" else ()
        with self._lock:
            if not page or page in self._seen or page[0][1] != self._prefix:
                return Spoilt()
            self._seen.add(page)
            is_hit = self._first < len(self._seen) <= self._first + self._most
            self.struck += is_hit
        return self._spoilt if is_hit else Spoilt()


@pytest.mark.needs("pages")
@pytest.mark.parametrize(
    "spoilt",
    [
        pytest.param(Spoilt(status=503), id="503", marks=pytest.mark.slow),
        pytest.param(Spoilt(status=500), id="500", marks=pytest.mark.slow),
        pytest.param(Spoilt(is_cut=True), id="a cut page"),
        pytest.param(Spoilt(is_reset=True), id="a connection reset", marks=pytest.mark.slow),
    ],
)
def test_one_page_that_breaks_changes_neither_what_is_converted_nor_what_is_paid(
    spoilt: Spoilt, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    api.behaviour.convert = marking
    expected = put_sources(bucket)
    relay.spoil = of_sources = Breaks(spoilt, first=1)
    run = run_cli(command=script_with(PAGE_OF_FOUR), AWS_ENDPOINT_URL_S3=relay.url)
    assert of_sources.struck == 1
    assert_all_promises_are_kept(run, api, bucket, expected)
    lose_checkpoint(run.workdir)
    relay.spoil = of_outputs = Breaks(spoilt, prefix="converted/")
    run = run_cli(command=script_with(PAGE_OF_FOUR), AWS_ENDPOINT_URL_S3=relay.url)
    assert of_outputs.struck == 1
    assert_all_promises_are_kept(run, api, bucket, expected)


def without_token(left: bytes) -> Callable[[bytes], bytes]:
    """Rewrites pages so that those that are not the last do not say where to go on."""
    return lambda body: re.sub(TOKEN, left, body)


@pytest.mark.needs("pages")
@pytest.mark.parametrize(
    "left",
    [
        b"",
        *(
            pytest.param(left, marks=pytest.mark.slow)
            for left in (b"<NextContinuationToken></NextContinuationToken>", b"<NextContinuationToken/>")
        ),
    ],
)
def test_where_pages_do_not_say_how_to_go_on_it_is_after_their_last_key(
    left: bytes, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    api.behaviour.convert = marking
    expected = put_sources(bucket)
    relay.rewrite = without_token(left)
    run = run_cli(command=script_with(PAGE_OF_FOUR), AWS_ENDPOINT_URL_S3=relay.url)
    assert_all_promises_are_kept(run, api, bucket, expected)
    lose_checkpoint(run.workdir)
    run = run_cli(command=script_with(PAGE_OF_FOUR), AWS_ENDPOINT_URL_S3=relay.url)
    assert_all_promises_are_kept(run, api, bucket, expected)


@pytest.mark.slow
@pytest.mark.needs("pages")
def test_so_it_is_where_the_pages_break_in_addition(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    api.behaviour.convert = marking
    expected = put_sources(bucket)
    relay.rewrite = without_token(b"")
    relay.spoil = Breaks(Spoilt(status=503), pages=3)
    run = run_cli(command=script_with(PAGE_OF_FOUR), AWS_ENDPOINT_URL_S3=relay.url)
    assert_all_promises_are_kept(run, api, bucket, expected)


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        pytest.param(rb"<Contents>.*</Contents>|<KeyCount>.*?</KeyCount>|" + TOKEN, b"", id="no key, no token"),
        pytest.param(rb"^.*<ListBucketResult.*$", b"<html><body><p>Please log in</p></body></html>", id="a web page"),
        pytest.param(rb"<IsTruncated>true</IsTruncated>|" + TOKEN, b"", id="not a word of whether it is the last"),
    ],
)
def test_what_is_no_page_to_go_on_from_ends_the_run_as_unfinished(
    *, pattern: bytes, left: bytes, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    api.behaviour.convert = marking
    put_sources(bucket)
    relay.rewrite = lambda body: re.sub(pattern, left, body, flags=re.DOTALL)
    run = run_cli(command=script_with(PAGE_OF_FOUR), AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.failures) == (3, [])
    assert ("the listing of" in run.summary["stopped_because"], run.summary["stopped_code"]) == (True, "listing")


def test_outputs_that_cannot_be_listed_to_their_end_are_not_paid_again(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    api.behaviour.convert = marking
    expected = put_sources(bucket)
    run = run_cli()
    assert run.exit_code == 0
    lose_checkpoint(run.workdir)
    outputs = rb"(?s)<Contents><Key>converted.*</Contents>|<KeyCount>.*?</KeyCount>|" + TOKEN
    relay.rewrite = lambda body: re.sub(outputs, b"", body) if b"<Prefix>converted" in body else body
    run = run_cli(command=script_with(PAGE_OF_FOUR), AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.failures) == (3, [])
    assert len(api.paid) == len(expected)
