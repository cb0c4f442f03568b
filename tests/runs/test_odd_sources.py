"""Sources that are packed, of another length than listed, with long keys or not to be read: each is its own affair."""

import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.standins.conversion_api import ConversionApi
from tests.standins.converters import Conversion, Converted, marking
from tests.standins.program import lose_checkpoint
from tests.standins.promises import PNG, assert_all_promises_are_kept, fill
from tests.standins.relay import Relay, Spoilt

Cli = Callable[..., Any]

JPEG = b"\xff\xd8\xff\xe0 a picture that is a JPEG already \xff\xd9"
UPLOAD = ("--set", "api.transfer=upload")


def marked(source: bytes) -> bytes:
    """What a PNG comes to."""
    return marking(Conversion(source, "png", "jpg", None)).body


@pytest.mark.parametrize("name", ["Last-Modified", "Content-Length"])
def test_an_answer_of_s3_that_cannot_be_read_is_no_bug(
    name: str, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    api.behaviour.convert = marking
    expected = fill(bucket, 1)
    relay.hidden, relay.added = {name.lower()}, {name: "many"}
    run = run_cli(AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.summary["failed"], api.requests) == (1, {"source_unreadable": 1}, [])
    assert re.search(
        r"its answer cannot be read \(.*many.*\): is there a proxy or a gateway", run.failures[0]["message"]
    )
    assert_all_promises_are_kept(run_cli(), api, bucket, expected)


########################################################################
# Packed sources, and those of another length than the listing says
########################################################################


@pytest.mark.needs("aws-chunked")
def test_a_packed_source_is_uploaded_unpacked(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    api.behaviour.convert = marking
    sources = {name: PNG + f"{name} ".encode() * 50_000 for name in ("packed", "twice", "plain")}
    once, twice = sources["packed"], sources["twice"]
    # Two members, as what is written in two goes has, under the old name; and one that says that it is not packed.
    stored = {
        "packed": (gzip.compress(once), "gzip"),
        "twice": (gzip.compress(twice[:1000]) + gzip.compress(twice[1000:]), "aws-chunked, x-gzip"),
        "plain": (sources["plain"], "identity"),
    }
    for name, (body, coding) in stored.items():
        bucket.client.put_object(Bucket=bucket.name, Key=f"{name}.png", Body=body, ContentEncoding=coding)
    run = run_cli(*UPLOAD)
    expected = {f"converted/{name}.jpg": marked(source) for name, source in sources.items()}
    assert_all_promises_are_kept(run, api, bucket, expected)


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        pytest.param("br", PNG + b"whatever this is", id="a coding that nothing here unpacks", marks=pytest.mark.slow),
        pytest.param("gzip", gzip.compress(PNG * 1000)[:-20], id="cut"),
        pytest.param("gzip", PNG + b"not packed at all", id="not packed", marks=pytest.mark.slow),
    ],
)
def test_a_source_that_cannot_be_unpacked_fails_alone_and_is_not_paid(
    encoding: str, body: bytes, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = marking
    expected = fill(bucket, 2)
    bucket.client.put_object(Bucket=bucket.name, Key="000-odd.png", Body=body, ContentEncoding=encoding)
    run = run_cli(*UPLOAD)
    assert (run.exit_code, run.summary["failed"], len(api.paid)) == (1, {"source_unreadable": 1}, 2)
    assert [(failure["key"], encoding in failure["message"]) for failure in run.failures] == [("000-odd.png", True)]
    assert bucket.keys("converted/") == sorted(expected)


def test_what_unpacks_to_more_than_may_be_sent_is_too_large(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    api.behaviour.convert = marking
    packed = gzip.compress(PNG + b"\0" * 3_000_000)
    bucket.client.put_object(Bucket=bucket.name, Key="a.png", Body=packed, ContentEncoding="gzip")
    run = run_cli(*UPLOAD, "--set", "api.max_size=2MB")
    assert (run.exit_code, run.summary["failed"], api.requests) == (1, {"too_large": 1}, [])


@pytest.mark.parametrize("listed", [7, pytest.param(7_000_000, marks=pytest.mark.slow)])
def test_a_length_that_the_listing_does_not_know_right_changes_nothing(
    listed: int, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    api.behaviour.convert = marking
    expected = fill(bucket, 2)
    relay.rewrite = lambda body: re.sub(rb"<Size>\d+</Size>", b"<Size>%d</Size>" % listed, body)
    run = run_cli(*UPLOAD, "--set", "api.timeout=5s", AWS_ENDPOINT_URL_S3=relay.url)
    assert_all_promises_are_kept(run, api, bucket, expected)


@pytest.mark.parametrize("listed", [7, 7_000_000])
def test_a_source_whose_only_length_is_wrong_fails_at_once_and_is_not_paid(
    listed: int, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    api.behaviour.convert = marking
    expected = fill(bucket, 2)

    def rewrite(body: bytes) -> bytes:
        return re.sub(rb"(<Key>000.png</Key>.*?<Size>)\d+(</Size>)", rb"\g<1>%d\g<2>" % listed, body, flags=re.DOTALL)

    relay.rewrite = rewrite
    relay.hidden = {"content-length"}
    relay.spoil = lambda _, path: Spoilt(is_unmeasured=urlsplit(path).path.endswith(".png"))
    run = run_cli(*UPLOAD, "--set", "api.timeout=20s", "--set", "api.retries=1", AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.summary["failed"], len(api.paid)) == (1, {"network": 1}, 1)
    assert [failure["key"] for failure in run.failures] == ["000.png"]
    assert bucket.outputs()["converted/001.jpg"][0] == expected["converted/001.jpg"]
    assert run.summary["seconds"] < 15


def test_a_look_that_does_not_say_the_etag_changes_nothing(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    api.behaviour.convert = marking
    expected = fill(bucket, 2)
    for hidden in ({"etag"}, {"etag"}, set[str]()):
        relay.hidden = hidden
        assert_all_promises_are_kept(run_cli(AWS_ENDPOINT_URL_S3=relay.url), api, bucket, expected)


def test_what_is_handed_out_in_place_of_a_source_is_not_sent(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    api.behaviour.convert = marking
    expected, through = fill(bucket, 1), {"AWS_ENDPOINT_URL_S3": relay.url}
    relay.refuse = lambda method, path: method == "GET" and urlsplit(path).path.endswith(".png")
    relay.refusal_status, relay.refusal = 200, b"<html>Welcome to our network</html>"
    run = run_cli(*UPLOAD, **through)
    assert (run.exit_code, run.summary["failed"], api.requests) == (1, {"source_unreadable": 1}, [])
    relay.refuse = lambda *_: False
    assert_all_promises_are_kept(run_cli(*UPLOAD, **through), api, bucket, expected)


########################################################################
# Copies
########################################################################


def test_a_copy_keeps_what_the_source_says_of_itself(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    told = {
        "ContentType": "image/pjpeg",
        "ContentEncoding": "gzip",
        "ContentDisposition": 'attachment; filename="a.jpg"',
        "ContentLanguage": "de",
        "CacheControl": "max-age=60",
    }
    packed = gzip.compress(JPEG)
    bucket.client.put_object(Bucket=bucket.name, Key="a.jpg", Body=packed, Metadata={"camera": "old"}, **told)
    bucket.put("untold.jpg", JPEG)
    assert run_cli("--set", "convert.same_format=copy").exit_code == 0
    copied = bucket.client.get_object(Bucket=bucket.name, Key="converted/a.jpg")
    assert ({name: copied.get(name) for name in told}, copied["Body"].read()) == (told, packed)
    assert {"camera": "old", "source-key": "a.jpg", "job": "default"}.items() <= copied["Metadata"].items()
    # A source without a type of its own gets the target's, as before.
    assert bucket.outputs()["converted/untold.jpg"][:2] == (JPEG, "image/jpeg")
    # What the configuration says goes before what the source says.
    bucket.put("b.jpg", JPEG)
    bucket.client.put_object(Bucket=bucket.name, Key="b.jpg", Body=JPEG, **told)
    assert run_cli("--set", "convert.same_format=copy", "--set", "s3.cache_control=no-store").exit_code == 0
    assert bucket.client.head_object(Bucket=bucket.name, Key="converted/b.jpg")["CacheControl"] == "no-store"
    assert api.requests == []


########################################################################
# Long keys
########################################################################


def test_an_output_key_without_room_for_an_archive_is_too_long_before_anything_is_paid(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    pages = gzip.compress(b"pages")
    api.behaviour.convert = lambda _: Converted(b"PK\x03\x04" + pages, "application/zip", "zip")
    fits, longer = ("p/" + "a" * (length - len("o/p/.jpg")) for length in (1020, 1021))
    for stem in (fits, longer):
        bucket.put(f"{stem}.png", PNG + stem.encode())
    place = ("--set", "s3.output_key=o/{dir}{stem}.{target}")
    run = run_cli(*place)
    assert (run.exit_code, run.summary["failed"], len(api.paid)) == (1, {"output_key_too_long": 1}, 1)
    assert [failure["key"] for failure in run.failures] == [f"{longer}.png"]
    assert bucket.keys("o/") == [f"o/{fits}.jpg.zip"]
    # Without its checkpoint, a run finds the archive by looking at keys of that length.
    lose_checkpoint(run.workdir)
    assert run_cli(*place).summary["failed"] == {"output_key_too_long": 1}
    assert len(api.paid) == 1


########################################################################
# Sources that S3 does not hand out
########################################################################


WAYS = {
    "by URL": (),
    "upload": UPLOAD,
    "named in a file": ("--keys-from", "keys"),
    "copy": ("--set", "convert.same_format=copy", "--set", "convert.target=png"),
}


def hide(relay: Relay, *keys: str) -> None:
    """Have S3 refuse to hand out these objects; all, if none is named."""
    places = [f"/{key}" for key in keys] or [".png"]
    relay.refuse = lambda method, path: (
        method in {"GET", "HEAD"} and urlsplit(path).path.endswith(tuple(places)) and "/converted/" not in path
    )


@pytest.mark.parametrize(
    "way", ["by URL", *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS if way != "by URL")]
)
def test_one_unreadable_source_fails_alone_though_it_is_the_first(
    *, way: str, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay, tmp_path: Path
) -> None:
    api.behaviour.convert = marking
    fill(bucket, 3)
    bucket.put("000-own-acl.png", PNG)
    # Alone in the file: no other key speaks for the credentials.
    (tmp_path / "work" / "keys").write_text("000-own-acl.png\n")
    hide(relay, "000-own-acl.png")
    run = run_cli(*WAYS[way], "--workers", "1", AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.summary["failed"]) == (1, {"source_unreadable": 1})
    assert [(line["key"], line["permanent"]) for line in run.failures] == [("000-own-acl.png", False)]
    assert run.summary["converted"] == (0 if way == "named in a file" else 3)
    relay.refuse = lambda *_: False
    again = run_cli(*WAYS[way], AWS_ENDPOINT_URL_S3=relay.url)
    assert (again.exit_code, again.summary["converted"], api.paid_twice()) == (0, 1, [])


def test_many_unreadable_sources_among_others_hold_up_nobody(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    api.behaviour.convert = marking
    fill(bucket, 24)
    secret = [f"{number:03}.png" for number in range(24) if number % 2]
    hide(relay, *secret)
    run = run_cli("--workers", "1", AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.summary["converted"]) == (1, 12)
    assert sorted(line["key"] for line in run.failures) == secret


@pytest.mark.parametrize(
    "way", ["by URL", *(pytest.param(way, marks=pytest.mark.slow) for way in ("named in a file", "copy"))]
)
def test_where_no_source_can_be_read_the_run_stops_and_all_stays_to_do(
    *, way: str, run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay, tmp_path: Path
) -> None:
    api.behaviour.convert = marking
    expected = fill(bucket, 20)
    (tmp_path / "work" / "keys").write_text("".join(f"{number:03}.png\n" for number in range(20)))
    hide(relay)
    run = run_cli(*WAYS[way], AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.summary["converted"], api.paid) == (3, 0, [])
    assert re.search("10 objects in a row .*: source_unreadable .*AccessDenied", run.summary["stopped_because"])
    # Each is named, and to none has anything happened that the next run would leave out.
    assert {line["permanent"] for line in run.failures} == {False}
    relay.refuse = lambda *_: False
    again = run_cli(*WAYS[way], AWS_ENDPOINT_URL_S3=relay.url)
    assert (again.exit_code, again.summary["converted"], api.paid_twice()) == (0, len(expected), [])


def test_sources_that_nobody_may_read_any_more_stop_the_run_though_others_were_read(
    run_cli: Cli, bucket: Any, api: ConversionApi, relay: Relay
) -> None:
    api.behaviour.convert = marking
    fill(bucket, 25)
    relay.refuse = lambda method, path: method == "GET" and urlsplit(path).path.endswith(".png") and len(api.paid) >= 5
    run = run_cli(*UPLOAD, "--workers", "2", AWS_ENDPOINT_URL_S3=relay.url)
    assert (run.exit_code, run.summary["converted"]) == (3, len(api.paid))
    # The ten, one before the last success, and what the two workers had in hand when the run was stopped.
    assert len(run.failures) <= 10 + 1 + 2
    assert run_cli(*UPLOAD).exit_code == 0
    assert (len(api.paid), api.paid_twice()) == (25, [])
