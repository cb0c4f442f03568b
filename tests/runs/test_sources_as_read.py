"""Sources as S3 is asked for them: in the version that was listed, and for the account of whoever reads."""

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.runs.test_resume import until_next_second
from tests.standins.conversion_api import ConversionApi
from tests.standins.promises import PNG, fill
from tests.standins.relay import Asked, Relay

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]


def test_a_source_that_is_overwritten_after_it_was_listed_is_not_sent_as_what_was_listed(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    fill(bucket, 1)
    is_listed = threading.Event()

    def overwrite(body: bytes) -> bytes:
        if b"<Key>000.png</Key>" in body and not is_listed.is_set():
            is_listed.set()
            size = bucket.client.head_object(Bucket=bucket.name, Key="000.png")["ContentLength"]
            bucket.put("000.png", PNG.ljust(size, b"!"))
        return body

    relay.rewrite = overwrite
    run = run_cli("-q", "--set", "api.transfer=upload", AWS_ENDPOINT_URL_S3=relay.url)
    assert is_listed.is_set()
    assert [(line["code"], line["permanent"]) for line in run.failures] == [("source_changed", False)]
    assert (bucket.outputs(), api.paid) == ({}, [])
    again = run_cli("--set", "api.transfer=upload")
    assert (again.exit_code, len(api.paid), len(bucket.outputs())) == (0, 1, 1)


def test_a_source_that_is_overwritten_after_it_was_looked_at_is_not_sent_as_what_was_seen(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    bucket.put("a.png", PNG + b"version 1")
    is_asked_for = threading.Event()

    def overwrite(asked: Asked) -> None:
        if (asked.method, asked.key) == ("GET", "a.png") and not is_asked_for.is_set():
            is_asked_for.set()
            bucket.put("a.png", PNG + b"version 2")

    relay.instead = overwrite
    run = run_cli("--set", "api.transfer=upload", AWS_ENDPOINT_URL_S3=relay.url)
    assert is_asked_for.is_set()
    assert [(line["code"], line["permanent"]) for line in run.failures] == [("source_changed", False)]
    assert (bucket.outputs(), api.paid) == ({}, [])
    again = run_cli("--set", "api.transfer=upload")
    assert (again.exit_code, len(api.paid), len(bucket.outputs())) == (0, 1, 1)


@pytest.mark.parametrize("transfer", ["upload", "url"])
def test_whoever_pays_for_requests_says_so_in_each_of_them(
    transfer: str, run_cli: Cli, bucket: Any, relay: Relay
) -> None:
    bucket.put("a.png", PNG)
    bucket.put("b.jpg", PNG)
    options = [f"api.transfer={transfer}", "s3.requester_pays=yes", "convert.same_format=copy"]
    run = run_cli(*(part for option in options for part in ("--set", option)), AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.summary["converted"]) == (0, 2)
    # Whether the bucket is there costs nobody anything, and S3 has no such word for that question.
    asked = [asked for asked in relay.asked if asked.key or asked.is_listing]
    mute = [
        f"{one.method} {one.path}"
        for one in asked
        if "requester" not in {one.headers.get("x-amz-request-payer"), one.query.get("x-amz-request-payer")}
    ]
    assert mute == []
    assert ("GET", "a.png") in {(one.method, one.key) for one in asked}


def test_a_source_without_an_etag_that_is_overwritten_before_it_is_read_is_not_stored_as_what_was_seen(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    bucket.put("a.png", PNG + b"version 1")

    def overwrite(asked: Asked) -> None:
        if (asked.method, asked.key) == ("GET", "a.png"):
            until_next_second()
            bucket.put("a.png", PNG + b"version 2")

    relay.hidden, relay.instead = {"etag"}, overwrite
    relay.rewrite = lambda body: re.sub(rb"<ETag>[^<]*</ETag>", b"", body)
    run = run_cli("--set", "api.transfer=upload", AWS_ENDPOINT_URL_S3=relay.url)
    assert [(line["code"], line["permanent"]) for line in run.failures] == [("source_changed", False)]
    assert (bucket.outputs(), len(api.paid)) == ({}, 1)
