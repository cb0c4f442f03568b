"""One of N parts: whose is what, the shares and files of a shard, and what array jobs say in their environments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.standins.conversion_api import ConversionApi
from tests.standins.converters import marking
from tests.standins.program import shard_of

Cli = Callable[..., Any]
REMEDY = "or give --shard 0/1 to convert everything here"


def kubernetes(index: str, count: str) -> dict[str, str]:
    return {"JOB_COMPLETION_INDEX": index, "SHARD_COUNT": count}


########################################################################
# The script
########################################################################


PNG = b"\x89PNG\r\n\x1a\n picture"
KEY_OF_SHARD_2 = next(key for key in map("{}.png".format, range(99)) if shard_of(f"converted/{key[:-4]}.jpg", 3) == 2)


def test_a_share_of_nothing_converts_nothing_and_says_so(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    api.behaviour.convert = marking
    bucket.put(KEY_OF_SHARD_2, PNG)
    run = run_cli("--shard", "2/3", "--limit", "2")
    assert (run.exit_code, api.requests) == (3, [])
    assert "stopped: the cap of 0 conversions for shard 2/3 is reached" in run.out
    assert run_cli("--shard", "2/3").exit_code == 0
    assert run_cli("--shard", "2/3", "--limit", "2").exit_code == 0


def test_the_script_takes_its_shard_from_the_environment(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    api.behaviour.convert = marking
    bucket.put(KEY_OF_SHARD_2, PNG)
    run = run_cli(**kubernetes("2", "3"))
    assert (run.exit_code, len(api.paid)) == (0, 1), run.err
    assert "for shard 2/3" in run.err
    assert {path.name for path in run.workdir.iterdir()} == {
        "s3_bulk_convert.2-of-3.sqlite3",
        "s3_bulk_convert.2-of-3.sqlite3.lock",
        "summary.2-of-3.json",
    }


def test_a_wrong_environment_starts_nothing(run_cli: Cli, api: ConversionApi) -> None:
    run = run_cli(JOB_COMPLETION_INDEX="3")
    assert (run.exit_code, api.requests, list(run.workdir.iterdir())) == (2, [], [])
    assert f"JOB_COMPLETION_INDEX = 3: set SHARD_COUNT too, {REMEDY}" in run.err
