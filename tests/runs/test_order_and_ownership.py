"""What listings and looks say when they are cut, out of order, old or refused; and whose an output's key then is."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_resume import killed_when_paid, until_next_second
from tests.standins.conversion_api import ConversionApi, Fault
from tests.standins.key_files import write
from tests.standins.program import lose_checkpoint, script_with, shard_of
from tests.standins.promises import PNG, assert_all_promises_are_kept, fill
from tests.standins.relay import Asked, Relay

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]
PRECIOUS = b"somebody's own"
ENTRY = re.compile(rb"<Contents>.*?</Contents>", re.DOTALL)


@pytest.fixture
def there(relay: Relay) -> dict[str, str]:
    """The environment of a run that reaches S3 through the relay."""
    return {"AWS_ENDPOINT_URL_S3": relay.url}


def shows(key: str) -> Callable[[str, str], bool]:
    """Whether a request is one for an object, or for what is known of it."""
    return lambda method, path: method in {"GET", "HEAD"} and path.split("?")[0].endswith(f"/{key}")


def reversed_entries(body: bytes) -> bytes:
    """A page of a listing with its entries the other way round."""
    entries = ENTRY.findall(body)
    return body.replace(b"".join(entries), b"".join(reversed(entries)))


########################################################################
# Listings
########################################################################


@pytest.mark.parametrize(
    "lost",
    [
        pytest.param(b"", id="a whole entry"),
        pytest.param(rb"</ETag>", id="a part of an entry, and of no count"),
        pytest.param(rb"<LastModified>[^<]*</LastModified>", id="the time of an entry, and of no count"),
    ],
)
def test_a_page_that_lacks_an_entry_is_asked_for_again(
    *, lost: bytes, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay, there: dict[str, str]
) -> None:
    expected = fill(bucket, 3)
    damaged: list[bytes] = []

    def lose_the_second(body: bytes) -> bytes:
        entries = ENTRY.findall(body)
        if len(entries) != 3 or damaged:
            return body
        damaged.append(body)
        if not lost:
            return body.replace(entries[1], b"")
        # Not every server says how many there are.
        uncounted = re.sub(rb"<KeyCount>\d+</KeyCount>", b"", body)
        return uncounted.replace(entries[1], re.sub(lost, b"", entries[1]))

    relay.rewrite = lose_the_second
    assert_all_promises_are_kept(run_cli(**there), api, bucket, expected)
    assert damaged


@pytest.mark.parametrize("what", ["sources", "outputs"])
def test_a_listing_out_of_order_stops_the_run_before_anything_is_paid(
    *, what: str, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay, there: dict[str, str], tmp_path: Path
) -> None:
    fill(bucket, 3)
    paid = 0
    if what == "outputs":
        assert run_cli(**there).exit_code == 0
        paid = 3
        lose_checkpoint(tmp_path / "work")
    relay.rewrite = lambda body: reversed_entries(body) if (what == "sources") is (b"<Key>000.png<" in body) else body
    run = run_cli(**there)
    assert run.exit_code == 2, run.out
    assert "order" in run.summary["stopped_because"]
    assert len(api.paid) == paid


def test_a_listing_that_is_refused_is_said_and_is_no_bug(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay, there: dict[str, str]
) -> None:
    fill(bucket, 1)
    relay.refuse = lambda _, path: "list-type=2" in path
    run = run_cli(**there)
    assert (run.exit_code, api.requests) == (2, [])
    assert "S3 refused the listing" in run.summary["stopped_because"]
    assert "bug" not in run.out + run.err


########################################################################
# Whose a key is
########################################################################


def test_the_key_of_an_archive_of_pages_is_taken(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    api.faults.add(Fault.zip_of_pages(2, times=None))
    bucket.put("a.png", PNG + b"the first")
    assert run_cli().summary["converted"] == 1
    before = bucket.outputs()
    assert list(before) == ["converted/a.jpg.zip"]
    bucket.put("a.heic", b"the second")
    # So that it is the checkpoint, and no look, that tells whose it is.
    run = run_cli("--set", "run.skip_existing=no")
    assert (run.exit_code, run.summary["failed"], run.summary["already_done"]) == (1, {"output_collision": 1}, 1)
    assert (bucket.outputs(), len(api.paid)) == (before, 1)


def test_the_key_of_an_archive_that_is_yet_to_be_made_is_taken(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    api.faults.add(Fault.zip_of_pages(2))
    for key in ("scan", "scan.zip"):
        bucket.put(key, PNG + key.encode())
    # The pages of the first are put where the other one's output would be, of which nothing is to be seen beforehand.
    run = run_cli("--workers", "1", "--set", "s3.output_key=converted/{name}")
    assert [(line["key"], line["code"]) for line in run.failures] == [("scan.zip", "output_collision")]
    assert (run.exit_code, list(bucket.outputs()), len(api.paid)) == (1, ["converted/scan.zip"], 1)


def test_a_key_that_is_taken_on_one_page_is_no_other_source_s_on_the_next(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay, there: dict[str, str]
) -> None:
    for key in ("a.heic", "a.png"):
        bucket.put(key, PNG + key.encode())
    is_second_planned = threading.Event()

    def look(asked: Asked) -> None:
        """Before the second is planned, the first is not even written down."""
        if (asked.method, asked.key) == ("HEAD", "a.heic"):
            # By a worker; and for the plan, which looks whether the source that has the key is there.
            if sum((other.method, other.key) == ("HEAD", "a.heic") for other in relay.asked) == 2:
                is_second_planned.set()
            is_second_planned.wait(20)

    relay.instead = look
    run = run_cli(command=script_with("program.PAGE_KEYS = 1"), **there)
    assert is_second_planned.is_set()
    assert [(line["key"], line["code"]) for line in run.failures] == [("a.png", "output_collision")]
    assert (run.exit_code, run.summary["converted"], len(api.paid)) == (1, 1, 1)


def test_an_output_that_was_found_is_no_other_source_s_on_the_next_page(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    bucket.put("a.heic", b"the first")
    bucket.put("a.png", PNG + b"the second")
    until_next_second()  # so that the output is newer than both
    assert run_cli("--set", "convert.include=a.heic").summary["converted"] == 1
    lose_checkpoint(tmp_path / "work")
    # A page for each, and what was found on the first is not in the checkpoint when the second is planned.
    run = run_cli(command=script_with("program.PAGE_KEYS, program.COMMIT_SECONDS = 1, 1"))
    assert [(line["key"], line["code"]) for line in run.failures] == [("a.png", "output_collision")]
    assert (run.exit_code, run.summary["already_done"], len(api.paid)) == (1, 1, 1)


def test_two_sources_of_one_output_meet_in_one_shard(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    pairs = [(f"{n}.heic", f"{n}.png") for n in range(99)]
    apart = next(pair for pair in pairs if shard_of(pair[0], 2) != shard_of(pair[1], 2))
    for key in apart:
        bucket.put(key, PNG + key.encode())
    # Without a look at what is there, so that two shards that both took one would overwrite each other's output.
    runs = [run_cli("--shard", f"{shard}/2", "--set", "run.skip_existing=no") for shard in (0, 1)]
    assert sorted(run.exit_code for run in runs) == [0, 1]
    # Side by side, neither would see what the other is about to write: so one has both, and the other has none.
    assert ["converted     1\n" in run.out for run in runs if run.exit_code == 1] == [True]
    assert len(api.paid) == 1


def test_a_key_of_a_file_is_converted_by_the_shard_of_its_output(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    both = [(f"{n}.png", f"converted/{n}.jpg") for n in range(99)]
    crossing = [pair for pair in both if shard_of(pair[0], 2) != shard_of(pair[1], 2)]
    named = [next(pair for pair in crossing if shard_of(pair[1], 2) == shard) for shard in (0, 1)]
    for key, _ in named:
        bucket.put(key, PNG + key.encode())
    file = write(tmp_path / "keys", "".join(f"{key}\n" for key, _ in named))
    for shard in (0, 1):
        run = run_cli("--keys-from", str(file), "--shard", f"{shard}/2")
        assert run.exit_code == 0
        assert named[shard][1] in bucket.outputs()
    assert len(api.paid) == 2


########################################################################
# Looks
########################################################################


def test_an_output_that_may_not_be_looked_at_is_not_overwritten(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay, there: dict[str, str]
) -> None:
    bucket.put("converted/a.jpg", PRECIOUS)
    until_next_second()  # so that it does not count as done
    bucket.put("a.png", PNG)
    relay.refuse = shows("converted/a.jpg")
    run = run_cli(**there)
    assert (run.exit_code, run.summary["failed"], api.requests) == (1, {"look_failed": 1}, [])
    assert bucket.read("converted/a.jpg") == PRECIOUS


def test_what_was_paid_keeps_its_key_while_its_source_may_not_be_looked_at(
    start: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    bucket.put("a.png", PNG + b"the first")
    through = ("--set", f"s3.endpoint_url={relay.url}", "--set", "api.transfer=upload")
    killed_when_paid(start, api, *through)
    bucket.put("a.heic", b"the second")
    relay.refuse = lambda method, path: method == "HEAD" and shows("a.png")(method, path)
    # The second comes on a page before the first.
    run = start(*through, command=script_with("program.PAGE_KEYS = 1")).wait()
    assert {line["key"]: line["code"] for line in run.failures}["a.heic"] == "output_collision"
    assert len(api.paid) == 1
    assert all(b"the first" in body for body, *_ in bucket.outputs().values())


@pytest.mark.parametrize("is_same_second", [False, True], ids=["older", "of the same second"])
def test_an_output_that_is_not_newer_than_its_source_is_not_taken_for_done(
    *,
    is_same_second: bool,
    run_cli: Cli,
    bucket: Any,
    api: ConversionApi,
    relay: Relay,
    there: dict[str, str],
    tmp_path: Path,
) -> None:
    bucket.put("a.png", PNG + b"version 1")
    assert run_cli(**there).summary["converted"] == 1
    lose_checkpoint(tmp_path / "work")
    if is_same_second:
        same = b"<LastModified>2026-01-02T03:04:05.000Z</LastModified>"
        relay.rewrite = lambda body: re.sub(rb"<LastModified>[^<]*</LastModified>", same, body)
    else:
        until_next_second()
    bucket.put("a.png", PNG + b"version 2")
    run = run_cli(**there)
    assert (run.exit_code, run.summary["converted"], len(api.paid)) == (0, 1, 2)
    assert b"version 2" in bucket.read("converted/a.jpg")


@pytest.mark.parametrize("is_same_second", [False, True], ids=["older", "of the same second"])
def test_another_program_s_output_that_is_not_newer_than_its_source_is_not_taken_for_done(
    *, is_same_second: bool, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay, there: dict[str, str]
) -> None:
    bucket.put("converted/a.jpg", PRECIOUS)
    if is_same_second:
        relay.tell_one_time()
    else:
        until_next_second()
    bucket.put("a.png", PNG)
    run = run_cli(**there)
    assert (run.exit_code, run.summary["failed"], api.requests) == (1, {"output_collision": 1}, [])
    assert bucket.read("converted/a.jpg") == PRECIOUS


def test_what_took_the_place_of_an_object_that_was_deleted_in_flight_keeps_it(
    run_cli: Cli, start: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("a.png", PNG)
    killed_when_paid(start, api)
    bucket.client.delete_object(Bucket=bucket.name, Key="a.png")
    bucket.put("a.heic", PNG + b"another")
    assert run_cli().summary["converted"] == 1
    run = run_cli("--set", "convert.quality=50")
    assert (run.exit_code, run.summary["converted"]) == (0, 1)
