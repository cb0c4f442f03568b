"""Servers whose words are nearly right: nothing is left out, nothing wrong is stored, nothing is condemned."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.standins.conversion_api import Answer, ConversionApi, Fault, Step
from tests.standins.converters import Converted, marking, wrapped
from tests.standins.program import script_with
from tests.standins.promises import assert_all_promises_are_kept, fill
from tests.standins.relay import Relay

Cli = Callable[..., Any]
OUTPUT = "converted/000.{}"


@pytest.mark.needs("pages")
@pytest.mark.parametrize("said", [b"True", pytest.param(b"1", marks=pytest.mark.slow), b" true\n"])
def test_a_page_is_not_the_last_however_its_server_spells_that(
    said: bytes, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    api.behaviour.convert = marking
    expected = fill(bucket, 12)
    relay.rewrite = lambda body: body.replace(b"<IsTruncated>true<", b"<IsTruncated>" + said + b"<")
    run = run_cli(command=script_with("program.PAGE_KEYS = 5"), AWS_ENDPOINT_URL_S3=relay.url)
    assert_all_promises_are_kept(run, api, bucket, expected)


def shorter(answer: Answer) -> Answer:
    """The whole answer under the length of its first half: more comes than was announced."""
    return replace(answer, announced=len(answer.body) // 2)


def test_of_an_answer_that_is_longer_than_it_says_no_half_is_stored(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = marking
    expected = fill(bucket, 1)
    api.faults.add(Fault(Step.DELIVERY, times=1, reshape=shorter))
    assert_all_promises_are_kept(run_cli("--set", "api.transfer=upload"), api, bucket, expected)


XML_ERROR = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>reduce your rate</Message></Error>'


@pytest.mark.parametrize(
    ("target", "media_type", "body"),
    [
        pytest.param("csv", "text/plain", b"no healthy upstream", id="Envoy"),
        pytest.param("csv", "text/plain", b"upstream request timeout", id="Envoy's patience", marks=pytest.mark.slow),
        pytest.param("srt", "text/plain", b"504 Gateway Time-out", id="nginx"),
        pytest.param("svg", "application/xml", XML_ERROR, id="S3's words for a drawing"),
        pytest.param("jpg", "application/xml", XML_ERROR, id="S3's words for a picture"),
    ],
)
def test_words_of_what_is_on_the_way_are_asked_for_again(
    *, target: str, media_type: str, body: bytes, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    true_file = wrapped(b"the file itself", "jpg") if target == "jpg" else b"<svg>the file itself</svg>"
    api.behaviour.convert = lambda _: Converted(true_file, "application/octet-stream", target)
    fill(bucket, 1)
    api.faults.add(Fault.other_file(body, media_type))
    run = run_cli(TARGET_FORMAT=target)
    assert (run.exit_code, len(api.paid), run.summary["failed"]) == (0, 1, {})
    assert bucket.outputs()[OUTPUT.format(target)][0] == true_file


def test_a_format_that_is_json_by_its_media_type_is_stored(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    scene = b'{"asset": {"version": "2.0"}}'
    api.behaviour.convert = lambda _: Converted(scene, "application/json", "gltf")
    fill(bucket, 1)
    assert run_cli(TARGET_FORMAT="gltf").exit_code == 0
    assert bucket.outputs()[OUTPUT.format("gltf")][0] == scene


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "api.timeout=0s"), r"api.timeout = 0s: expected a duration of more than 0"),
        (("--prefix", "\udcff"), r"prefix.* expected UTF-8"),
        (("--limit", ""), r"--limit: expected a value, and it is empty"),
        (("--keys-from", " "), r"--keys-from: expected a value, and it is empty"),
        (("--set", "s3.output_key=\udcff{key}.{target}"), r"output_key.* expected UTF-8"),
    ],
    ids=["a timeout of nothing", "a prefix", "an empty cap", "no file of keys", "an output key"],
)
def test_what_no_run_can_work_with_is_refused_before_it_begins(
    arguments: tuple[str, ...], said: str, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    fill(bucket, 1)
    run = run_cli(*arguments)
    assert (run.exit_code, api.requests) == (2, [])
    assert re.search(said, run.err), run.err


def test_what_refuses_a_run_gives_the_terminal_no_orders_and_does_not_fill_it(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    fill(bucket, 1)
    orders = "no\x1b[2J\nerror: call 555" + "!" * 60_000
    api.faults.add(Fault(status=401, code="invalid_api_key", message=orders))
    told = run_cli().out
    relay.refuse = lambda method, _: method == "GET"
    relay.refusal = (
        f"<Error><Code>AccessDenied</Code><Message>no\nerror: call 555{'!' * 60_000}</Message></Error>".encode()
    )
    for out in (told, run_cli(AWS_ENDPOINT_URL_S3=relay.url).out):
        assert ("stopped: " in out, "\x1b" in out, "\nerror:" in out, len(out) < 1_000) == (True, False, False, True)


def test_a_page_that_wants_a_password_where_there_is_no_proxy_is_one_object_s_failure(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = marking
    fill(bucket, 3)
    api.faults.add(Fault(status=407, body=b"<html>who are you?</html>", content_type="text/html", times=1))
    run = run_cli("--workers", "1", "--set", "api.transfer=upload")
    assert (run.exit_code, run.summary["converted"], run.summary["failed"]) == (1, 2, {"http_407": 1})
