"""Whose an output is: nothing that another source, bucket or person has put there is overwritten, taken or converted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.converters import marking
from tests.samples import photo

if TYPE_CHECKING:
    from tests.conversion_api import ConversionApi

Cli = Callable[..., Any]
PNG, JPG = b"\x89PNG\r\n\x1a\n", photo(1, "jpg")
BESIDE = ("--prefix", "in/", "--set", "s3.output_key={stem}.{target}")
PRECIOUS = b"somebody's own"


@pytest.fixture(autouse=True)
def _cheap(api: ConversionApi) -> None:
    """The stand-in does not really convert."""
    api.behaviour.convert = marking


def body_of(bucket: Any, key: str) -> bytes:
    return bytes(bucket.client.get_object(Bucket=bucket.name, Key=key)["Body"].read())


def wait_for_another_second() -> None:
    """Let what is put next be newer than what was put last: listings have whole seconds."""
    time.sleep(1.1 - time.time() % 1)


def refused(run: Any) -> bool:
    """Whether the only object was refused, before anything was sent."""
    return (run.exit_code, run.summary["failed"], run.summary["requests"]) == (1, {"output_collision": 1}, 0)


########################################################################
# Objects that are no outputs
########################################################################


def test_a_copy_overwrites_no_object_among_the_sources(run_cli: Cli, bucket: Any) -> None:
    bucket.put("in/a.jpg", JPG)
    bucket.put("a.jpg", PRECIOUS)
    assert refused(run_cli(*BESIDE, "--set", "convert.same_format=copy"))
    assert body_of(bucket, "a.jpg") == PRECIOUS


def test_a_copy_overwrites_no_object_below_the_output_prefix(run_cli: Cli, bucket: Any) -> None:
    bucket.put("converted/a.jpg", PRECIOUS)
    wait_for_another_second()
    bucket.put("a.jpg", JPG)
    assert "fail: output_collision" in run_cli("--set", "convert.same_format=copy", "--why", "a.jpg").out
    assert refused(run_cli("--set", "convert.same_format=copy"))
    assert body_of(bucket, "converted/a.jpg") == PRECIOUS
