"""--verify and --repair: what lies in the output bucket is told apart from what was stored, and made again if asked."""

import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.standins.conversion_api import ConversionApi, Fault
from tests.standins.program import lose_checkpoint, script_with
from tests.standins.relay import Asked, Relay
from tests.standins.samples import photo

pytestmark = pytest.mark.usefixtures("cheap")
Cli = Callable[..., Any]
LARGE = 9_000_000
IN_PARTS = script_with("program.MULTIPART_BYTES = 8_500_000")
FOUND = ("verified", "missing", "altered", "not_converted", "failed_before", "orphans", "unknown")


def picture(text: str = "") -> bytes:
    """What a PNG begins with."""
    return b"\x89PNG\r\n\x1a\n" + text.encode()


def put_pictures(bucket: Any, count: int, first: int = 0) -> None:
    """So many objects, named by their numbers."""
    for number in range(first, first + count):
        bucket.put(f"in/{number:03}.png", picture(str(number)))


def verified(run_cli: Cli, *arguments: str) -> tuple[int, dict[str, int], dict[str, list[str]]]:
    """Exit code, counts, and the output keys of what was found, by kind."""
    run = run_cli("--verify", "--log-format", "json", *arguments)
    document = json.loads(run.out)
    found: dict[str, list[str]] = {}
    for each in document["findings"]:
        found.setdefault(each["kind"], []).append(each["output_key"])
    assert {kind: len(keys) for kind, keys in found.items()} == {
        kind: count for kind, count in document.items() if kind in FOUND[1:] and count
    }
    counts = {kind: document[kind] for kind in FOUND if document[kind]}
    return run.exit_code, counts, {kind: sorted(keys) for kind, keys in found.items()}


def damage(bucket: Any, count: int = 20) -> None:
    """Of so many outputs 3 are deleted, 2 replaced, 1 source is deleted; 4 sources are added, and a stranger's file."""
    for number in (3, 4, 19):
        bucket.client.delete_object(Bucket=bucket.name, Key=f"converted/in/{number:03}.jpg")
    bucket.put("converted/in/007.jpg", b"another size")
    size = len(bucket.read("converted/in/008.jpg"))
    bucket.put("converted/in/008.jpg", b"x" * size)
    bucket.client.delete_object(Bucket=bucket.name, Key="in/012.png")
    put_pictures(bucket, 4, first=count)
    bucket.put("converted/notes.txt", b"mine")


@pytest.mark.parametrize("count", [20, pytest.param(1_000, marks=pytest.mark.slow)])
def test_verify_names_what_is_wrong_and_repair_makes_again_what_is_missing_and_nothing_else(
    count: int, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    put_pictures(bucket, count)
    assert run_cli().exit_code == 0
    assert verified(run_cli) == (0, {"verified": count}, {})
    damage(bucket, count)
    before = bucket.outputs()
    expected = {
        "missing": ["converted/in/003.jpg", "converted/in/004.jpg", "converted/in/019.jpg"],
        "altered": ["converted/in/007.jpg", "converted/in/008.jpg"],
        "not_converted": [f"converted/in/{number:03}.jpg" for number in range(count, count + 4)],
        "orphans": ["converted/in/012.jpg"],
        "unknown": ["converted/notes.txt"],
    }
    counts = {"verified": count - 6, **{kind: len(keys) for kind, keys in expected.items()}}
    assert verified(run_cli) == (1, counts, expected)
    assert (len(api.paid), bucket.outputs()) == (count, before)

    forecast = json.loads(run_cli("--dry-run", "--repair", "--log-format", "json").out)
    assert (forecast["conversions"], forecast["jobs"]["default"]["already_done"]) == (7, count - 4)
    assert any("2 outputs" in warning and "007.jpg" in warning for warning in forecast["warnings"])
    assert (len(api.paid), bucket.outputs()) == (count, before)

    run = run_cli("--repair")
    assert run.exit_code == 0, run.err
    assert "2 outputs altered since" in run.err
    assert (len(api.paid), run.summary["converted"], run.summary["possible_double_charges"]) == (count + 7, 7, 0)
    assert bucket.read("converted/in/007.jpg") == b"another size"
    rest = {kind: expected[kind] for kind in ("altered", "orphans", "unknown")}
    assert verified(run_cli) == (1, {"verified": count + 1, "altered": 2, "orphans": 1, "unknown": 1}, rest)
    assert run_cli("--repair").exit_code == 0
    assert len(api.paid) == count + 7
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/in/007.jpg")
    assert (run_cli("--repair").exit_code, len(api.paid)) == (0, count + 8)
    assert [row["event"] for row in run.rows() if row["key"] == "in/007.png"] == ["converted", "lost", "converted"]


def test_verify_says_what_to_do_in_words(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    put_pictures(bucket, 20)
    assert run_cli().exit_code == 0
    clean = run_cli("--verify")
    assert (clean.exit_code, clean.out.splitlines()[-1]) == (0, "verified 20 of 20")
    damage(bucket)
    run, lines = run_cli("--verify", "-q"), run_cli("--verify", "-v").out.splitlines()
    assert (run.exit_code, len(run.out.splitlines())) == (1, 1)
    assert run.out.startswith(
        "verified 14 of 19; 3 missing: --repair converts them again, which is paid for; 2 altered: "
    )
    assert lines[-1] == run.out.rstrip()
    assert "missing       converted/in/003.jpg (of in/003.png): it was stored, and is not there" in lines
    assert [line for line in lines if re.fullmatch(r"(missing|altered) +\d", line)] == [
        "missing       3",
        "altered       2",
    ]
    assert len(api.paid) == 20


def test_verify_without_a_checkpoint_looks_at_what_outputs_say_of_themselves(
    run_cli: Cli, bucket: Any, work: Path
) -> None:
    put_pictures(bucket, 4)
    assert run_cli().exit_code == 0
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/in/003.jpg")
    another = {"Bucket": bucket.name, "Key": "converted/in/001.jpg"}
    bucket.client.copy_object(Bucket=bucket.name, Key="converted/in/002.jpg", CopySource=another)
    lose_checkpoint(work)
    code, counts, found = verified(run_cli)
    assert (code, counts) == (0, {"verified": 2, "not_converted": 2})
    assert found == {"not_converted": ["converted/in/002.jpg", "converted/in/003.jpg"]}
    run = run_cli("--verify", "-v")
    assert "there is no checkpoint" in run.err
    assert re.search("^not_converted converted/in/002.jpg .*belongs to in/001.png", run.out, re.MULTILINE)


def test_each_job_and_each_shard_verifies_its_own_outputs_and_a_file_of_keys_those_of_its_keys(
    run_cli: Cli, bucket: Any
) -> None:
    put_pictures(bucket, 12)
    ini = run_cli("--version").workdir / "config.ini"
    ini.write_text(
        "[job small]\nquality = 50\noutput_key = converted/small/{stem}.{target}\n[job large]\nquality = 90\n"
    )
    assert run_cli().exit_code == 0
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/small/005.jpg")
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/in/006.jpg")
    missing = {"missing": ["converted/in/006.jpg", "converted/small/005.jpg"]}
    assert verified(run_cli) == (1, {"verified": 22, "missing": 2}, missing)
    ini.unlink()
    keys = ini.with_name("keys")
    keys.write_text("in/005.png\nin/006.png\nin/no.png\n")
    arguments = ("--set", "job small.quality=50", "--set", "job small.output_key=converted/small/{stem}.{target}")
    code, counts, found = verified(run_cli, *arguments, "--keys-from", "keys")
    counts_of_keys = {"verified": 1, "missing": 1, "not_converted": 1}  # the last one has no object
    assert (code, counts, found["missing"]) == (1, counts_of_keys, ["converted/small/005.jpg"])
    said = run_cli(*arguments, "--verify", "--keys-from", "keys").out
    assert re.search("there is no object with this key\n +remedy: a run converts those that it can; --why KEY", said)
    run = run_cli(*arguments, "--repair", "--keys-from", "keys")
    assert (run.exit_code, run.summary["converted"], run.summary["failed"]) == (1, 1, {"source_gone": 1})
    # Each shard has a checkpoint of its own.
    for index in (0, 1):
        assert run_cli("--shard", f"{index}/2").exit_code == 0
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/in/011.jpg")
    shards = [verified(run_cli, "--shard", f"{index}/2") for index in (0, 1)]
    assert sum(counts.get("verified", 0) for _, counts, _ in shards) == 11
    assert [found["missing"] for _, _, found in shards if "missing" in found] == [["converted/in/011.jpg"]]
    # The other job's outputs are none of this configuration.
    assert sum(counts["unknown"] for _, counts, _ in shards) == 12


def test_what_is_stored_anew_while_it_is_verified_is_no_finding(
    run_cli: Cli, start: Cli, bucket: Any, relay: Relay
) -> None:
    put_pictures(bucket, 3)
    there = {"AWS_ENDPOINT_URL_S3": relay.url}
    assert run_cli(**there).exit_code == 0
    listed, go_on = threading.Event(), threading.Event()

    def wait_at_the_outputs(asked: Asked) -> None:
        if asked.is_listing and asked.query["prefix"] == "converted/" and not listed.is_set():
            listed.set()
            assert go_on.wait(30)

    relay.instead = wait_at_the_outputs
    verifying = start("--verify", **there)
    assert listed.wait(30)
    bucket.put("in/001.png", picture("another"))
    assert run_cli(**there).exit_code == 0
    go_on.set()
    run = verifying.wait()
    assert (run.exit_code, run.out.splitlines()[-1]) == (0, "verified 2 of 2"), run.out


def test_an_archived_source_and_one_that_a_glob_leaves_out_by_now_have_outputs_to_be_proved(
    run_cli: Cli, bucket: Any
) -> None:
    put_pictures(bucket, 3)
    assert run_cli().exit_code == 0
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/in/001.jpg")
    left_out = ("--set", "convert.exclude=001.png 002.png")
    assert verified(run_cli, *left_out) == (1, {"verified": 2, "missing": 1}, {"missing": ["converted/in/001.jpg"]})
    assert "1 missing: --repair converts them again, which is paid for, but for 1 whose sources are left out" in (
        run_cli("--verify", "-q", *left_out).out
    )
    # It is not wanted, and so it is not made again; and it stays missing.
    run = run_cli("--repair", *left_out)
    assert (run.exit_code, run.summary["converted"], run.summary["skipped"]["not_matched"]) == (0, 0, 2)
    assert "--repair: 0 outputs missing, to be converted again" in run.err
    assert "1 output missing whose sources are left out by now" in run.err
    assert verified(run_cli, *left_out)[:2] == (1, {"verified": 2, "missing": 1})
    assert (run_cli("--repair").summary["converted"], verified(run_cli)[0]) == (1, 0)


def test_an_output_in_whose_place_another_source_has_put_its_own_is_missing(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("a.heic", picture("1"))
    assert run_cli().exit_code == 0
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/a.jpg")
    bucket.put("a.png", picture("2"))
    assert (run_cli().exit_code, len(api.paid)) == (0, 2)
    assert verified(run_cli) == (1, {"verified": 1, "missing": 1}, {"missing": ["converted/a.jpg"]})
    before = bucket.outputs()
    run = run_cli("--repair")
    assert (run.exit_code, run.summary["failed"], len(api.paid)) == (1, {"output_collision": 1}, 2)
    assert bucket.outputs() == before


def test_an_output_of_a_job_that_wants_its_source_no_more_is_not_said_to_have_none(run_cli: Cli, bucket: Any) -> None:
    put_pictures(bucket, 2)
    jobs = ("--set", "job a.target=webp", "--set", "job b.target=jpg")
    assert run_cli(*jobs).exit_code == 0
    run = run_cli("--verify", "-v", *jobs, "--set", "job b.exclude=001.png")
    said = "converted/in/001.jpg (of in/001.png): its source is gone, or left out by now"
    assert (run.exit_code, f"orphans       {said}" in run.out.splitlines()) == (0, True), run.out


def test_a_source_that_is_left_as_it_is_hides_nothing_that_lies_where_its_output_would(
    run_cli: Cli, bucket: Any
) -> None:
    bucket.put("a.png", picture())
    for key in ("a.jpg", "b.jpg"):
        bucket.put(key, photo(1, "jpg"))
    assert run_cli().exit_code == 0
    bucket.client.delete_object(Bucket=bucket.name, Key="a.png")
    bucket.put("converted/b.jpg", b"a stranger's")
    counts, found = verified(run_cli)[1:]
    assert counts == {"orphans": 1, "unknown": 1}
    assert found == {"orphans": ["converted/a.jpg"], "unknown": ["converted/b.jpg"]}


def test_what_is_left_out_by_now_is_proved_by_the_shard_that_has_stored_it(run_cli: Cli, bucket: Any) -> None:
    put_pictures(bucket, 8)
    for index in (0, 1):
        assert run_cli("--shard", f"{index}/2").exit_code == 0
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/in/003.jpg")
    left_out = ("--set", "convert.exclude=*.png")
    shards = [verified(run_cli, *left_out, "--shard", f"{index}/2") for index in (0, 1)]
    assert sum(counts.get("verified", 0) for _, counts, _ in shards) == 7
    assert [found for _, _, found in shards if found] == [{"missing": ["converted/in/003.jpg"]}]


@pytest.mark.parametrize("keys", [pytest.param("/dev/stdin", marks=pytest.mark.slow), "fifo"])
def test_repair_reads_a_pipe_of_keys_once(keys: str, start: Cli, run_cli: Cli, bucket: Any, work: Path) -> None:
    put_pictures(bucket, 2)
    assert run_cli().exit_code == 0
    for key in bucket.keys("converted/"):
        bucket.client.delete_object(Bucket=bucket.name, Key=key)
    os.mkfifo(work / "fifo")
    reading, writing = os.pipe()
    os.write(writing, b"in/001.png\n")
    os.close(writing)
    # Whoever opens the FIFO to write waits for its first reader; a second one would wait for another writer.
    threading.Thread(target=lambda: (work / "fifo").write_text("in/001.png\n"), daemon=True).start()
    run = start("--repair", "--keys-from", keys, stdin=reading)
    os.close(reading)
    assert (run.wait(10).exit_code, run.summary["converted"]) == (0, 1), run.out
    assert bucket.keys("converted/") == ["converted/in/001.jpg"]


@pytest.mark.parametrize("status", [403, pytest.param(501, marks=pytest.mark.slow)])
def test_outputs_that_may_not_be_listed_are_no_bug(status: int, run_cli: Cli, bucket: Any, relay: Relay) -> None:
    put_pictures(bucket, 2)
    there = {"AWS_ENDPOINT_URL_S3": relay.url}
    keys = run_cli(**there).workdir / "keys"
    keys.write_text("in/000.png\nin/001.png\n")
    relay.refuse = lambda method, path: method == "GET" and "prefix=converted" in path
    relay.refusal_status = status
    for command in ("--verify", "--repair"):
        run = run_cli(command, "--keys-from", "keys", **there)
        said = run.out + run.err
        assert ("bug" in said, "Traceback" in said, run.exit_code in {0, 2, 3}) == (False, False, True), said
        assert run.exit_code == 0 or "S3 refused the listing of " in said or status != 403


def test_repair_keeps_to_the_cap_and_goes_on_after_a_kill(
    run_cli: Cli, start: Cli, bucket: Any, api: ConversionApi, release: threading.Event
) -> None:
    put_pictures(bucket, 6)
    assert run_cli().exit_code == 0
    for number in range(4):
        bucket.client.delete_object(Bucket=bucket.name, Key=f"converted/in/{number:03}.jpg")
    run = run_cli("--repair", "--limit", "1")
    assert (run.exit_code, len(api.paid)) == (3, 7)
    assert "lost         3" in run_cli("--status").out
    fault = api.faults.add(Fault.stalled_answer(release))
    run = start("--workers", "1")  # what is written down as lost needs no second --repair
    assert fault.reached.wait(30)
    run.process.kill()
    run.wait()
    api.faults.clear()
    assert (run_cli().exit_code, len(api.paid)) == (0, 10)
    assert verified(run_cli) == (0, {"verified": 6}, {})


@pytest.mark.parametrize("transfer", ["auto", pytest.param("upload", marks=pytest.mark.slow)])
def test_any_run_goes_on_with_a_repair_that_failed_and_pays_nothing_more(
    transfer: str, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    flags = ("--set", f"api.transfer={transfer}", "--set", "api.retries=0", "--workers", "1")
    own = {"AWS_ENDPOINT_URL_S3": relay.url}
    put_pictures(bucket, 3)
    assert run_cli(*flags, **own).exit_code == 0
    for key in bucket.keys("converted/"):
        bucket.client.delete_object(Bucket=bucket.name, Key=key)
    # A request is turned away, an answer breaks off, and what comes last cannot be stored.
    api.faults.add(Fault.status_reply(503, "service_unavailable", times=1))
    api.faults.add(Fault.cut_after_work(times=1))
    relay.refuse = lambda method, _: method == "PUT"
    run = run_cli(*flags, "--repair", **own)
    assert run.summary["failed"] == {"service_unavailable": 1, "network": 1, "store_failed": 1}
    relay.refuse = lambda *_: False
    run = run_cli(*flags, **own)
    assert (run.exit_code, run.summary["converted"], run.summary["possible_double_charges"]) == (0, 3, 0)
    assert len(api.paid) == 6


def test_repair_is_a_run_and_no_other_command(run_cli: Cli) -> None:
    for command in (["--status"], ["--check"], ["--why", "a.png"], ["--verify"]):
        run = run_cli("--repair", *command)
        assert (run.exit_code, run.err.splitlines()[0]) == (2, f"error: --repair: not with {command[0]}")


def test_where_no_etags_are_shown_outputs_are_told_apart_by_size(run_cli: Cli, bucket: Any, relay: Relay) -> None:
    put_pictures(bucket, 2)
    there = {"AWS_ENDPOINT_URL_S3": relay.url}
    of_outputs = re.compile(rb"(<Key>converted/.*?)<ETag>[^<]*</ETag>")
    relay.rewrite = lambda body: of_outputs.sub(rb"\1", body)
    assert run_cli(**there).exit_code == 0
    bucket.put("converted/in/001.jpg", b"another size")
    run = run_cli("--verify", "-q", **there)
    assert (run.exit_code, run.out[:25]) == (1, "verified 1 of 2; 1 altere"), run.out


def test_what_is_lost_is_made_again_before_what_failed(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    put_pictures(bucket, 2)
    api.faults.add(Fault.status_reply(503, "service_unavailable"))
    one_by_one = ("--workers", "1", "--set", "api.retries=0", "--set", "api.transfer=upload")
    assert run_cli(*one_by_one).summary["failed"] == {"service_unavailable": 1}
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/in/001.jpg")
    assert run_cli(*one_by_one, "--repair").exit_code == 0
    made = [charge.source_sha256 for charge in api.paid]
    assert (made[0], len(made), len(set(made[1:]))) == (made[1], 3, 2)


def test_what_is_lost_keeps_its_place_before_whatever_else_wants_it(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("a.png", picture("1"))
    jobs = [part for name in "bc" for part in ("--set", f"job {name}.quality={ord(name) - 50}")]
    assert (run_cli(*jobs).summary["failed"], len(api.paid)) == ({"output_collision": 1}, 1)
    bucket.put("a.heic", picture("2"))
    before = bucket.outputs()
    assert (run_cli(*jobs).summary["failed"], len(api.paid)) == ({"output_collision": 3}, 1)
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/a.jpg")
    assert json.loads(run_cli(*jobs, "--dry-run", "--repair", "--log-format", "json").out)["conversions"] == 1
    run = run_cli(*jobs, "--repair")
    assert (run.summary["converted"], run.summary["failed"], len(api.paid)) == (1, {"output_collision": 3}, 2)
    assert bucket.outputs() == before


def test_what_is_deleted_while_a_repair_looks_is_counted_by_no_pass(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    put_pictures(bucket, 2)
    api.faults.add(Fault.status_reply(503, "service_unavailable"))
    there = {"AWS_ENDPOINT_URL_S3": relay.url}
    run = run_cli("--workers", "1", "--set", "api.retries=0", "--set", "api.transfer=upload", **there)
    failed = run.failures[0]["key"]
    relay.asked.clear()

    def delete_it(asked: Asked) -> None:
        passes = [each for each in relay.asked if each.is_listing and not each.query["prefix"]]
        if asked.is_listing and len(passes) == 2:
            bucket.client.delete_object(Bucket=bucket.name, Key=failed)

    relay.instead = delete_it
    run = run_cli("--repair", "-q", **there)
    assert (run.exit_code, run.summary["failed"], run.summary["already_done"]) == (0, {}, 1), run.out


def test_outputs_that_were_put_in_parts_are_proved_by_the_etags_that_s3_gave_them(run_cli: Cli, bucket: Any) -> None:
    bucket.put("large.png", picture() + bytes(LARGE))
    bucket.put("large.jpg", picture() + bytes(LARGE))
    copying = ("--set", "convert.same_format=copy", "--set", "s3.output_key=converted/{name}.{target}")
    assert run_cli(*copying, command=IN_PARTS).exit_code == 0
    run = run_cli(*copying, "--verify")
    assert (run.exit_code, run.out.splitlines()[-1]) == (0, "verified 2 of 2"), run.out
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/large.png.jpg")
    assert run_cli(*copying, "--verify").exit_code == 1
    assert run_cli(*copying, "--repair", command=IN_PARTS).summary["converted"] == 1
    assert run_cli(*copying, "--verify", "-q").out == "verified 2 of 2\n"


def test_a_repair_looks_for_an_output_that_a_listing_does_not_show(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    put_pictures(bucket, 1)
    there = {"AWS_ENDPOINT_URL_S3": relay.url}
    assert run_cli(**there).exit_code == 0
    outputs = rb"(?s)<Contents>(?:(?!</Contents>).)*<Key>converted/.*?</Contents>|<KeyCount>.*?</KeyCount>"
    relay.rewrite = lambda body: re.sub(outputs, b"", body)
    assert run_cli("--repair", **there).exit_code == 0
    assert len(api.paid) == 1


def test_an_output_whose_length_s3_does_not_say_is_as_it_was_stored(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    put_pictures(bucket, 1)
    assert run_cli().exit_code == 0
    relay.hidden = {"content-length"}
    another, there = ("--set", "run.checkpoint=another.sqlite3"), {"AWS_ENDPOINT_URL_S3": relay.url}
    assert run_cli(*another, **there).summary["already_done"] == 1
    assert run_cli("--verify", *another, **there).exit_code == 0
    assert len(api.paid) == 1


def test_what_a_repair_has_found_lost_is_not_bought_beside_another_source_s(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("b.png", picture())
    assert run_cli().exit_code == 0
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/b.jpg")
    api.faults.add(Fault.status_reply(402, "quota_exceeded", times=None))
    assert run_cli("--repair").exit_code == 3
    api.faults.clear()
    bucket.put("b.bmp", b"BM" + picture())
    run = run_cli()
    assert (run.summary["failed"], len(api.paid)) == ({"output_collision": 1}, 2)
