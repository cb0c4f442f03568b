"""Documents of several pages: with `convert.pages = unpack`, each page is stored, then the archive, which proves it."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from typing import Any

import pytest

from tests.runs.test_outputs_as_stored import AMONG_SOURCES, written
from tests.runs.test_resume import until_next_second
from tests.standins.conversion_api import ConversionApi
from tests.standins.converters import Conversion, Converted, wrapped
from tests.standins.program import HASTY, lose_checkpoint, script_with, shard_of
from tests.standins.relay import Relay

Cli = Callable[..., Any]
UNPACK = ("--set", "convert.pages=unpack")
PDF = b"%PDF-1.4 "
PRECIOUS = b"somebody's own"
# As no archive of the API's should have them.
NAMES = ["pages/", "pages/b.jpg", "../../a.jpg", "/etc/passwd", "converted/precious.jpg", "a\nb"]
LARGE = 9_000_000
IN_PARTS = script_with("program.MULTIPART_BYTES = 8_500_000")


def page(source: bytes, number: int) -> bytes:
    """A page of a document, which says which it is; that of a large one is large."""
    return wrapped(source + b" page %d" % number + bytes(LARGE if b"large" in source else 0), "jpg")


def pages(source: bytes, count: int) -> dict[str, bytes]:
    """What lies beside the archive of a document, without its folder."""
    return {f"{number:03}.jpg": page(source, number) for number in range(1, count + 1)}


def archive(source: bytes, count: int) -> bytes:
    """The pages of a document as the API packs them: some under names that mean no good."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as packed:
        for number, name in enumerate((*NAMES, *map(str, range(count)))[: count + 1]):
            body = page(source, number) if number else b""
            packed.writestr(zipfile.ZipInfo(name), body, zipfile.ZIP_DEFLATED)
    return made.getvalue()


def paged(conversion: Conversion) -> Converted:
    """A document has as many pages as its last word says; one page comes as it is."""
    count = int(conversion.source.split()[-1])
    if count == 1:
        return Converted(page(conversion.source, 1), "image/jpeg", "jpg")
    return Converted(archive(conversion.source, count), "application/zip", "zip")


@pytest.fixture(autouse=True)
def documents(strict_api: ConversionApi) -> None:
    """An API that converts documents."""
    strict_api.behaviour.convert = paged


def bodies(bucket: Any, prefix: str = "converted/") -> dict[str, bytes]:
    """What lies below a prefix."""
    return {key: body for key, (body, _, _) in bucket.outputs(prefix).items()}


def stored(folder: str, source: bytes, count: int) -> dict[str, bytes]:
    """What an unpacked document comes to."""
    made = {f"{folder}/{name}": body for name, body in pages(source, count).items()}
    return {**made, f"{folder}.jpg.zip": archive(source, count)}


########################################################################
# What is stored
########################################################################


def test_each_page_is_stored_as_an_output_and_the_archive_comes_last(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    three, large, single = PDF + b"3", PDF + b"large 2", PDF + b"1"
    bucket.put("in/three.pdf", three)
    bucket.put("in/large.pdf", large)
    bucket.put("single.pdf", single)
    changed = {"command": IN_PARTS, "AWS_ENDPOINT_URL_S3": relay.url}
    run = run_cli(*UNPACK, "--set", "s3.cache_control=max-age=60", "--workers", "1", **changed)
    assert (run.exit_code, run.summary["converted"], len(api.paid)) == (0, 3, 3), run.out
    expected = stored("converted/in/three", three, 3) | stored("converted/in/large", large, 2)
    expected["converted/single.jpg"] = page(single, 1)
    outputs = bucket.outputs()
    assert {key: body for key, (body, _, _) in outputs.items()} == expected
    assert run.summary["bytes_out"] == sum(map(len, expected.values()))
    # All are written as outputs are, a large page in parts, and each after the pages before it.
    puts = written(relay)
    assert {put.headers.get("Cache-Control") for put in puts.values()} == {"max-age=60"}
    assert [put.key for put in puts.values() if put.method == "POST"] == [
        f"converted/in/large/00{number}.jpg" for number in (1, 2)
    ]
    of_three = [key for key in puts if "three" in key]
    assert of_three == [*(f"converted/in/three/00{number}.jpg" for number in (1, 2, 3)), "converted/in/three.jpg.zip"]
    own = outputs["converted/in/three.jpg.zip"][2]
    assert (own["source-key"], own["pages"], "page" in own) == ("in/three.pdf", "3", False)
    for number, key in enumerate(of_three[:3], 1):
        assert outputs[key][1:] == ("image/jpeg", {**own, "page": str(number)})
    assert not {"page", "pages"} & outputs["converted/single.jpg"][2].keys()
    # All of it is done, whoever asks.
    for _ in range(2):
        again = run_cli(*UNPACK)
        assert (again.exit_code, again.summary["already_done"], again.summary["requests"]) == (0, 3, 0)
        lose_checkpoint(run.workdir)


def test_a_job_may_unpack_and_what_was_stored_before_stays_done(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    jobs = [f"job {name}.{option}" for name in "ab" for option in (f"prefix={name}/", "target=jpg")]
    given = [part for option in (*jobs, "job a.pages=unpack") for part in ("--set", option)]
    for key in ("a/x.pdf", "b/x.pdf"):
        bucket.put(key, PDF + b"2")
    assert run_cli(*given).exit_code == 0
    made = stored("converted/a/x", PDF + b"2", 2)
    assert bodies(bucket) == made | {"converted/b/x.jpg.zip": archive(PDF + b"2", 2)}
    # An option that changes nothing of what the API makes is no reason to pay for it once more.
    bucket.put("b/y.pdf", PDF + b"3")
    for _ in range(2):
        run = run_cli(*given, "--set", "job b.pages=unpack")
        assert (run.exit_code, len(api.paid)) == (0, 3)
        lose_checkpoint(run.workdir)
    assert bodies(bucket, "converted/b/") == {
        "converted/b/x.jpg.zip": archive(PDF + b"2", 2),
        **stored("converted/b/y", PDF + b"3", 3),
    }


def test_a_version_with_fewer_pages_replaces_what_it_has_and_deletes_nothing(run_cli: Cli, bucket: Any) -> None:
    bucket.put("x.pdf", PDF + b"first 4")
    assert run_cli(*UNPACK).exit_code == 0
    bucket.put("x.pdf", PDF + b"second 2")
    run = run_cli(*UNPACK)
    assert (run.exit_code, run.summary["converted"]) == (0, 1)
    outputs = bucket.outputs()
    left = {key: body for key, body in stored("converted/x", PDF + b"first 4", 4).items() if key[-7:] > "002.jpg"}
    assert {key: body for key, (body, _, _) in outputs.items()} == left | stored("converted/x", PDF + b"second 2", 2)
    assert outputs["converted/x.jpg.zip"][2]["pages"] == "2"
    verified = run_cli(*UNPACK, "--verify").out
    assert ("unknown       2" in verified, verified.splitlines()[-1]) == (True, "verified 1 of 1")


def test_pages_among_the_sources_are_converted_by_no_job(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    options = ("job a.include=*.pdf", "job a.target=jpg", "job b.include=*.jpg", "job b.target=webp")
    given = [*AMONG_SOURCES, *UNPACK, *(part for option in options for part in ("--set", option))]
    bucket.put("x.pdf", PDF + b"3")
    assert run_cli(*given).summary["converted"] == 1
    run = run_cli(*given)
    assert (run.exit_code, run.summary["skipped"], len(api.paid)) == (0, {"not_matched": 1, "own_output": 3}, 1)


########################################################################
# What is not stored
########################################################################

BAD: dict[str, Callable[[bytes], bytes]] = {
    "broken": lambda whole: whole.replace(b"PK\5\6", b"PK\0\0"),
    "foreign": lambda _: archive_with(b"GIF89a a page of another format"),
    "empty": lambda _: archive_with(b""),
}


def archive_with(last: bytes) -> bytes:
    """An archive with a good page, and another one."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as packed:
        for name, body in (("1.jpg", page(b"good", 1)), ("2.jpg", last)):
            packed.writestr(zipfile.ZipInfo(name), body)
    return made.getvalue()


def test_an_archive_with_what_is_no_page_is_stored_only_as_it_is_and_bought_once(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    def spoilt(conversion: Conversion) -> Converted:
        made = paged(conversion)
        name = conversion.source.split()[1].decode()
        return Converted(BAD[name](made.body), made.media_type, made.extension) if name in BAD else made

    api.behaviour.convert = spoilt
    for name in (*BAD, "good"):
        bucket.put(f"{name}.pdf", PDF + name.encode() + b" 2")
    never = ("--set", "run.max_failure_rate=never", "--set", "api.retries=1")
    run = run_cli(*UNPACK, *never, command=HASTY)
    assert (run.exit_code, run.summary["failed"]) == (1, {"bad_pages": 3})
    # Only what may have come to harm on its way is asked for again: of the others, the API's copy is the same.
    assert {line["key"]: line["permanent"] for line in run.failures} == {
        "broken.pdf": False,
        "foreign.pdf": True,
        "empty.pdf": True,
    }
    assert bodies(bucket) == stored("converted/good", PDF + b"good 2", 2)
    assert len(api.paid) == 4
    # With another presigned URL, it would be another request.
    until_next_second()
    run = run_cli("--retry-failed", *never)
    assert (run.exit_code, run.summary["converted"], len(api.paid)) == (0, 3, 4)
    for name, spoil in BAD.items():
        assert bucket.read(f"converted/{name}.jpg.zip") == spoil(archive(PDF + name.encode() + b" 2", 2))


@pytest.mark.parametrize("is_archive", [False, True], ids=["a page", "the archive"])
def test_where_another_s_object_lies_by_then_nothing_is_overwritten(
    run_cli: Cli, bucket: Any, api: ConversionApi, *, is_archive: bool
) -> None:
    taken = "converted/x.jpg.zip" if is_archive else "converted/x/002.jpg"

    def convert(conversion: Conversion) -> Converted:
        another_s = {"source-etag": "1", "job": "1"}
        bucket.client.put_object(Bucket=bucket.name, Key=taken, Body=PRECIOUS, Metadata=another_s)
        return paged(conversion)

    api.behaviour.convert = convert
    bucket.put("x.pdf", PDF + b"3")
    run = run_cli(*UNPACK)
    assert (run.exit_code, run.summary["failed"]) == (1, {"output_collision": 1})
    lies_there = {taken: PRECIOUS} if is_archive else {taken: PRECIOUS, "converted/x/001.jpg": page(PDF + b"3", 1)}
    assert bodies(bucket) == lies_there
    # When the place is free, what was paid for is had for nothing.
    bucket.client.delete_object(Bucket=bucket.name, Key=taken)
    assert (run_cli(*UNPACK).exit_code, len(api.paid)) == (0, 1)
    assert bodies(bucket) == stored("converted/x", PDF + b"3", 3)


def test_a_page_and_another_source_s_output_overwrite_each_other_in_no_order(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("a/001.pdf", PDF + b"single 1")
    assert run_cli(*UNPACK).exit_code == 0
    bucket.put("a.pdf", PDF + b"2")
    bucket.put("b.pdf", PDF + b"2")
    run = run_cli(*UNPACK)
    assert (run.summary["converted"], run.summary["failed"]) == (1, {"output_collision": 1})
    assert "converted/a/001.jpg: belongs to a/001.pdf" in run.failures[-1]["message"]
    bucket.put("b/001.pdf", PDF + b"single 1")
    run = run_cli(*UNPACK)
    assert (run.summary["converted"], run.summary["failed"]) == (0, {"output_collision": 2})
    # The document was paid for, once; for the page's rival nothing was.
    assert len(api.paid) == 3
    assert bodies(bucket) == {"converted/a/001.jpg": page(PDF + b"single 1", 1)} | stored("converted/b", PDF + b"2", 2)


def put_documents(bucket: Any, count: int) -> None:
    """So many documents of two pages, of each of which a page's place is taken by what a person has unpacked."""
    for number in range(count):
        bucket.put(f"converted/{number:02}/002.jpg", PRECIOUS)
    until_next_second()
    for number in range(count):
        bucket.put(f"{number:02}.pdf", PDF + b"%d 2" % number)


def test_answers_that_were_paid_for_and_cannot_be_stored_stop_the_run(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    put_documents(bucket, 20)
    run = run_cli(*UNPACK, "--workers", "1", "--set", "api.requests_per_minute=100000")
    # On a busy machine, the worker is some ahead of who counts.
    assert (run.exit_code, run.summary["stopped_code"], len(api.paid) < 20) == (3, "same_failure", True)
    assert run.summary["stopped_because"].startswith("10 objects in a row failed for the same reason: output_collision")
    # All of it is asked for again for nothing, when the places are free.
    for number in range(20):
        bucket.client.delete_object(Bucket=bucket.name, Key=f"converted/{number:02}/002.jpg")
    assert run_cli(*UNPACK).exit_code == 0
    assert (len(api.paid), api.paid_twice()) == (20, [])


def test_any_run_goes_on_with_a_repair_of_a_page_that_failed(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    own = {"AWS_ENDPOINT_URL_S3": relay.url}
    bucket.put("a.pdf", PDF + b"3")
    assert run_cli(*UNPACK, **own).exit_code == 0
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/a/002.jpg")
    relay.refuse = lambda method, _: method == "PUT"
    assert run_cli(*UNPACK, "--repair", **own).summary["failed"] == {"store_failed": 1}
    relay.refuse = lambda *_: False
    run = run_cli(*UNPACK, **own)
    assert (run.exit_code, run.summary["replays"], run.summary["possible_double_charges"]) == (0, 1, 0)
    assert (len(api.paid), bodies(bucket)) == (2, stored("converted/a", PDF + b"3", 3))


def test_what_is_only_to_be_tagged_is_not_made_again_for_a_page_that_is_gone(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    flags, own = (*UNPACK, "--set", "s3.tag_source=converted=yes"), {"AWS_ENDPOINT_URL_S3": relay.url}
    bucket.put("a.pdf", PDF + b"3")
    relay.refuse = lambda _, path: "tagging" in path
    assert run_cli(*flags, **own).summary["failed"] == {"tag_failed": 1}
    relay.refuse = lambda *_: False
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/a/002.jpg")
    run = run_cli(*flags, **own)
    assert (run.exit_code, run.summary["already_done"], run.summary["requests"], len(api.paid)) == (0, 1, 0, 1)


def test_a_page_that_is_another_s_by_now_keeps_a_repair_from_being_paid_in_vain(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("a.pdf", PDF + b"3")
    assert run_cli(*UNPACK).exit_code == 0
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/a/002.jpg")
    until_next_second()
    bucket.put("converted/a/003.jpg", PRECIOUS)
    run = run_cli(*UNPACK, "--repair")
    assert (run.exit_code, run.summary["failed"], len(api.paid)) == (1, {"output_collision": 1}, 1)
    assert bodies(bucket)["converted/a/003.jpg"] == PRECIOUS


def test_pages_are_proved_and_made_again_with_their_archive(
    run_cli: Cli, bucket: Any, strict_api: ConversionApi
) -> None:
    bucket.put("a.pdf", PDF + b"3")
    bucket.put("b.pdf", PDF + b"2")
    assert run_cli(*UNPACK).exit_code == 0
    before = bucket.outputs()
    verified = run_cli(*UNPACK, "--verify")
    assert (verified.exit_code, verified.out.splitlines()[-1]) == (0, "verified 2 of 2")
    assert "unknown       0" in verified.out
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/a/002.jpg")
    verified = run_cli(*UNPACK, "--verify", "-v")
    assert "missing       converted/a/002.jpg (of a.pdf): it was stored, and is not there" in verified.out
    assert verified.exit_code == 1
    run = run_cli(*UNPACK, "--repair")
    assert (run.exit_code, run.summary["converted"], len(strict_api.paid)) == (0, 1, 3)
    assert {key: body for key, (body, *_) in bucket.outputs().items()} == {
        key: body for key, (body, *_) in before.items()
    }
    # Of what was lost, the archive alone proves nothing; of anything else, it does.
    assert (run_cli(*UNPACK, "--repair").exit_code, len(strict_api.paid)) == (0, 3)
    # Nobody wants pages who wants archives alone; without a checkpoint, an archive says how many there are to be.
    bucket.client.delete_object(Bucket=bucket.name, Key="converted/b/002.jpg")
    for _ in range(2):
        assert (run_cli("--verify").exit_code, run_cli("--repair").exit_code, len(strict_api.paid)) == (0, 0, 3)
        lose_checkpoint(run.workdir)
    assert (run_cli(*UNPACK, "--verify").exit_code, run_cli(*UNPACK, "--repair").summary["converted"]) == (1, 1)
    assert (run_cli(*UNPACK, "--verify").exit_code, len(strict_api.paid)) == (0, 4)


def test_a_page_belongs_to_the_shard_of_its_document(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    documents = [f"in/{number}.pdf" for number in range(4)]
    for key in documents:
        bucket.put(key, PDF + b"3")
    shards = [("--shard", f"{index}/2", *UNPACK) for index in (0, 1)]
    assert [run_cli(*shard).exit_code for shard in shards] == [0, 0]
    # One whose key alone would be the other shard's.
    places = [(shard_of(f"converted/in/{number}.jpg", 2), f"converted/in/{number}/001.jpg") for number in range(4)]
    home, page_key = next((home, key) for home, key in places if shard_of(key, 2) != home)
    for gone in (None, page_key):
        found = [json.loads(run_cli("--verify", "--log-format", "json", *shard).out) for shard in shards]
        assert sum(each["verified"] for each in found) == len(documents)
        missing = [(index, each["output_key"]) for index in (0, 1) for each in found[index]["findings"]]
        assert missing == ([(home, gone)] if gone else [])
        bucket.client.delete_object(Bucket=bucket.name, Key=page_key)
    made = [re.findall("^converted +([0-9]+)", run_cli("--repair", *shard).out, re.M) for shard in shards]
    assert made == [[str(int(index == home))] for index in (0, 1)]
    assert len(api.paid) == len(documents) + 1


def test_an_archive_between_the_sources_is_foreseen_to_be_no_source(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("x.pdf", PDF + b"3")
    assert run_cli(*AMONG_SOURCES).exit_code == 0
    assert json.loads(run_cli(*AMONG_SOURCES, "--dry-run", "--log-format", "json").out)["conversions"] == 0
    verified = run_cli(*AMONG_SOURCES, "--verify").out
    assert ("not_converted 0" in verified, verified.splitlines()[-1]) == (True, "verified 1 of 1")
    assert (run_cli(*AMONG_SOURCES).summary["skipped"], len(api.paid)) == ({"own_output": 1}, 1)


@pytest.mark.parametrize("status", [403, 500])
def test_a_page_s_place_is_not_written_before_s3_has_said_what_lies_there(
    status: int, run_cli: Cli, bucket: Any, strict_api: ConversionApi, relay: Relay
) -> None:
    strict_api.behaviour.convert = paged
    bucket.put("converted/x/002.jpg", PRECIOUS)
    until_next_second()
    bucket.put("x.pdf", PDF + b"3")
    # As S3 has it for who may list outputs, and not read them; or where it stands still.
    relay.refusal_status = status
    relay.refuse = lambda method, path: method == "HEAD" and path.startswith(f"/{bucket.name}/converted/")
    run = run_cli(*UNPACK, command=HASTY, AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.summary["failed"]) == (1, {"look_failed": 1})
    assert bodies(bucket)["converted/x/002.jpg"] == PRECIOUS


def test_an_archive_proves_no_pages_where_those_of_another_version_came_after_it(
    start: Cli, bucket: Any, strict_api: ConversionApi
) -> None:
    strict_api.behaviour.convert = paged
    bucket.put("a.pdf", PDF + b"old 2")
    assert start(*UNPACK).wait().exit_code == 0
    bucket.put("converted/a/003.jpg", PRECIOUS)
    until_next_second()
    bucket.put("a.pdf", PDF + b"new 3")
    assert start(*UNPACK).wait().summary["failed"] == {"output_collision": 1}
    until_next_second()
    bucket.put("a.pdf", PDF + b"old 2")
    assert start(*UNPACK).wait().exit_code == 0
    assert bodies(bucket) == stored("converted/a", PDF + b"old 2", 2) | {"converted/a/003.jpg": PRECIOUS}
