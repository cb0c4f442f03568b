"""The S3 server of the tests refuses what Amazon refuses, and the sample pictures keep their numbers."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from io import BytesIO
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote_plus, urlsplit

import pytest
import requests
from botocore.exceptions import ClientError
from mypy_boto3_s3 import S3Client
from PIL import Image

from tests.standins.s3_server import PROJECT, S3Server
from tests.standins.samples import PIL_NAMES, number_in, photo, photo_samples
from tests.standins.servers.kinds import KINDS

NewServer = Callable[..., S3Server]
ODD_KEYS = [
    "with space.png",
    "a+b&c=d?e#f.png",
    "100%.png",
    "%2F and %20.png",
    "Grüße/日本/😀.png",
    "line\nbreak.png",
    "a//b.png",
    "/leading.png",
    "tail/",
    "k" * 1024,
]
DOTTED_KEYS = ["up/../here.png", "./here.png", "../.."]


def each_of(*keys: str) -> list[Any]:
    """A case for each key."""
    return [pytest.param(key, marks=pytest.mark.needs(*["newlines"] if "\n" in key else [])) for key in keys]


@pytest.fixture
def client(s3: S3Server) -> S3Client:
    """A client with the right keys."""
    return s3.client()


@pytest.fixture
def bucket(s3: S3Server, client: S3Client) -> Iterator[str]:
    """The name of an empty bucket."""
    name = s3.new_bucket(client)
    yield name
    s3.drop_bucket(client, name)


def presigned(client: S3Client, bucket: str, key: str) -> str:
    """A URL that is good for a minute after its signing."""
    return client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=60)


def fetched(s3: S3Server, url: str) -> requests.Response:
    """What requests, and so many a service, gets from a URL."""
    return requests.get(url, timeout=30, verify=s3.ca_bundle or True)


def get_plainly(s3: S3Server, url: str) -> tuple[int, bytes]:
    """Status and body by http.client, which sends a URL exactly as it is."""
    parts, connection = urlsplit(url), s3.connection()
    try:
        connection.request("GET", f"{parts.path}?{parts.query}")
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


########################################################################
# The server
########################################################################


@pytest.mark.needs("secrets")
def test_a_wrong_secret_is_refused(s3: S3Server, bucket: str) -> None:
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        s3.client(secret_key="not the secret").put_object(Bucket=bucket, Key="a", Body=b"")


@pytest.mark.needs("url signatures")
def test_a_presigned_url_works_until_a_byte_of_it_changes(s3: S3Server, client: S3Client, bucket: str) -> None:
    client.put_object(Bucket=bucket, Key="a.png", Body=b"body")
    client.put_object(Bucket=bucket, Key="b.png", Body=b"other")
    url = presigned(client, bucket, "a.png")
    good, bad = fetched(s3, url), fetched(s3, url.replace("a.png", "b.png"))
    assert (good.status_code, good.content) == (200, b"body")
    assert bad.status_code == 403
    assert "SignatureDoesNotMatch" in bad.text


@pytest.mark.needs("url signatures")
def test_an_expired_presigned_url_is_refused(
    s3: S3Server, client: S3Client, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.put_object(Bucket=bucket, Key="a.png", Body=b"body")
    for minutes, status in ((0.5, 200), (2, 403)):
        signed = datetime.now(timezone.utc).replace(tzinfo=None) - timedelta(minutes=minutes)
        with monkeypatch.context() as past:
            # The clock of botocore, which had another name in the oldest version that is admitted.
            clock = SimpleNamespace(datetime=SimpleNamespace(utcnow=lambda signed=signed: signed))
            past.setattr("botocore.auth.datetime", clock)
            past.setattr("botocore.auth.get_current_datetime", clock.datetime.utcnow, raising=False)
            url = presigned(client, bucket, "a.png")
        reply = fetched(s3, url)
        assert reply.status_code == status, reply.text


@pytest.mark.parametrize("key", each_of(*ODD_KEYS, *DOTTED_KEYS))
def test_an_odd_key_round_trips(s3: S3Server, client: S3Client, bucket: str, key: str) -> None:
    client.put_object(Bucket=bucket, Key=key, Body=key.encode())
    assert client.get_object(Bucket=bucket, Key=key)["Body"].read() == key.encode()
    assert get_plainly(s3, presigned(client, bucket, key)) == (200, key.encode())


@pytest.mark.parametrize("key", each_of(*ODD_KEYS))
def test_requests_fetches_an_odd_key_by_its_presigned_url(
    s3: S3Server, client: S3Client, bucket: str, key: str
) -> None:
    client.put_object(Bucket=bucket, Key=key, Body=b"body")
    assert fetched(s3, presigned(client, bucket, key)).content == b"body"


@pytest.mark.needs("newlines", "pages")
def test_odd_keys_are_listed_in_the_order_of_their_bytes(client: S3Client, bucket: str) -> None:
    keys = [*ODD_KEYS, *DOTTED_KEYS, "Z", "a", "é", "\uffee", "\U0001f600"]  # UTF-16 would swap the last two
    for key in keys:
        client.put_object(Bucket=bucket, Key=key, Body=b"")
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket=bucket, EncodingType="url", PaginationConfig={"PageSize": 4}
    )
    listed = [unquote_plus(entry["Key"]) for page in pages for entry in page.get("Contents", [])]
    assert listed == sorted(keys, key=str.encode)


def test_an_object_may_have_two_kilobytes_of_metadata(client: S3Client, bucket: str) -> None:
    client.put_object(Bucket=bucket, Key="k" * 1024, Body=b"", Metadata={"note": "n" * 2000})
    assert client.head_object(Bucket=bucket, Key="k" * 1024)["Metadata"] == {"note": "n" * 2000}


@pytest.mark.needs("strict tags")
def test_tags_are_taken_and_refused_as_amazon_does(client: S3Client, bucket: str) -> None:
    def tags_of(key: str) -> dict[str, str]:
        return {tag["Key"]: tag["Value"] for tag in client.get_object_tagging(Bucket=bucket, Key=key)["TagSet"]}

    def put(key: str, *pairs: tuple[str, str]) -> None:
        tags: Any = [{"Key": name, "Value": value} for name, value in pairs]
        client.put_object_tagging(Bucket=bucket, Key=key, Tagging={"TagSet": tags})

    odd = "Grüße/日本 1.png"
    client.put_object(Bucket=bucket, Key=odd, Body=b"", Tagging="a=b%20c&d=")
    modified = client.head_object(Bucket=bucket, Key=odd)["LastModified"]
    assert tags_of(odd) == {"a": "b c", "d": ""}
    source: Any = {"Bucket": bucket, "Key": odd}
    client.copy_object(Bucket=bucket, Key="copied", CopySource=source, Tagging="not=taken")
    client.copy_object(Bucket=bucket, Key="replaced", CopySource=source, TaggingDirective="REPLACE", Tagging="e=f")
    assert (tags_of("copied"), tags_of("replaced")) == ({"a": "b c", "d": ""}, {"e": "f"})
    put(odd, ("x", "y"), ("é", "1"))
    assert (tags_of(odd), client.head_object(Bucket=bucket, Key=odd)["LastModified"]) == (
        {"x": "y", "é": "1"},
        modified,
    )
    refused: list[tuple[str, list[tuple[str, str]]]] = [
        ("BadRequest", [(str(number), "") for number in range(11)]),
        ("InvalidTag", [("a", "1"), ("a", "2")]),
        ("InvalidTag", [("a*", "")]),
        ("InvalidTag", [("a", "v" * 257)]),
        ("InvalidTag", [("aws:a", "")]),
    ]
    for code, pairs in refused:
        with pytest.raises(ClientError, match=code):
            put(odd, *pairs)
    for header in ("a=1&a=2", "a"):
        with pytest.raises(ClientError, match="InvalidArgument"):
            client.put_object(Bucket=bucket, Key="not there", Body=b"", Tagging=header)
    with pytest.raises(ClientError, match="NoSuchKey"):
        put("not there")
    client.put_object(Bucket=bucket, Key=odd, Body=b"another version")
    assert tags_of(odd) == {}
    upload = client.create_multipart_upload(Bucket=bucket, Key="parts", Tagging="g=h")["UploadId"]
    part = client.upload_part(Bucket=bucket, Key="parts", UploadId=upload, PartNumber=1, Body=b"x")["ETag"]
    parts: Any = {"Parts": [{"PartNumber": 1, "ETag": part}]}
    client.complete_multipart_upload(Bucket=bucket, Key="parts", UploadId=upload, MultipartUpload=parts)
    assert tags_of("parts") == {"g": "h"}


@pytest.mark.needs("strict tags")
def test_each_version_of_an_object_has_its_own_tags(client: S3Client, bucket: str) -> None:
    client.put_object(Bucket=bucket, Key="a", Body=b"before", Tagging="is=old")
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    first = client.put_object(Bucket=bucket, Key="a", Body=b"1", Tagging="is=first")["VersionId"]
    client.put_object(Bucket=bucket, Key="a", Body=b"2")
    wanted: Any = {"TagSet": [{"Key": "is", "Value": "named"}]}
    client.put_object_tagging(Bucket=bucket, Key="a", VersionId=first, Tagging=wanted)
    for which, tags in (({"VersionId": first}, wanted["TagSet"]), ({}, [])):
        given: Any = which
        assert client.get_object_tagging(Bucket=bucket, Key="a", **given)["TagSet"] == tags
    with pytest.raises(ClientError, match=r"NoSuchVersion|Invalid"):
        client.get_object_tagging(Bucket=bucket, Key="a", VersionId="no-such")


def test_64_connections_write_and_read_at_a_time(client: S3Client, bucket: str) -> None:
    def round_trip(number: int) -> bytes:
        client.put_object(Bucket=bucket, Key=str(number), Body=str(number).encode())
        return client.get_object(Bucket=bucket, Key=str(number))["Body"].read()

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(round_trip, range(128))) == [str(number).encode() for number in range(128)]


def test_an_upload_that_breaks_off_stores_nothing_and_a_download_that_does_holds_up_nothing(
    s3: S3Server, client: S3Client, bucket: str
) -> None:
    url = urlsplit(client.generate_presigned_url("put_object", Params={"Bucket": bucket, "Key": "cut"}, ExpiresIn=60))
    whole = bytes(range(256)) * 40_000
    for sent in (0, 5, len(whole) - 1):
        connection = s3.connection()
        connection.putrequest("PUT", f"{url.path}?{url.query}")
        connection.putheader("Content-Length", str(len(whole)))
        connection.endheaders(whole[:sent])
        connection.close()
        client.put_object(Bucket=bucket, Key="whole", Body=whole)
        body = client.get_object(Bucket=bucket, Key="whole")["Body"]
        body.read(sent)
        body.close()
        assert client.get_object(Bucket=bucket, Key="whole")["Body"].read() == whole
    assert [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket)["Contents"]] == ["whole"]


def test_a_child_process_finds_the_server_by_its_environment(s3: S3Server, bucket: str) -> None:
    code = "import boto3; print([b['Name'] for b in boto3.client('s3').list_buckets()['Buckets']])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    child = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | s3.environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert bucket in child.stdout


########################################################################
# Its life
########################################################################


@pytest.mark.slow
@pytest.mark.needs("restart", "disk")
@pytest.mark.parametrize("end", [S3Server.stop, S3Server.kill])
def test_objects_outlive_an_end_of_the_server(end: Callable[[S3Server], None], s3: S3Server, bucket: str) -> None:
    before = s3.endpoint
    s3.client().put_object(Bucket=bucket, Key="a", Body=b"body")
    end(s3)
    with pytest.raises(ConnectionRefusedError):
        connect(before)
    s3.start()
    assert s3.endpoint == before
    assert s3.client().get_object(Bucket=bucket, Key="a")["Body"].read() == b"body"


@pytest.mark.needs("restart")
def test_a_server_that_cannot_start_says_why(s3: S3Server, new_server: NewServer, tmp_path: Path) -> None:
    port = urlsplit(s3.endpoint).port
    with pytest.raises(RuntimeError, match="Address already in use"):
        new_server(tmp_path, port).start()


@pytest.mark.needs("restart")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent ended")
def test_a_server_ends_with_a_killed_parent(new_server: NewServer, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tests.standins.servers.kinds import KINDS\n"
        "server = KINDS[sys.argv[1]](Path(sys.argv[2])); server.start()\n"
        "print(server.pid, server.endpoint, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, new_server(tmp_path).name, str(tmp_path)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as parent:
        pid, endpoint = parent.stdout.readline().split() if parent.stdout else ("0", "")
        server = os.pidfd_open(int(pid))
        assert not has_ended(server, seconds=0)
        parent.kill()
    ended = has_ended(server, seconds=10)
    if not ended:
        signal.pidfd_send_signal(server, signal.SIGKILL)  # a failed test must leave nothing running either
    os.close(server)
    assert ended
    # What the process has started, the kernel ends a moment after it.
    assert comes_to_refuse(endpoint, seconds=10)


def connect(endpoint: str) -> None:
    """Connect to a server, and hang up."""
    there = urlsplit(endpoint)
    socket.create_connection((there.hostname or "", there.port or 80), timeout=30).close()


def comes_to_refuse(endpoint: str, *, seconds: float) -> bool:
    """Whether nobody listens at an address within so many seconds."""
    deadline = monotonic() + seconds
    while monotonic() < deadline:
        try:
            connect(endpoint)
        except ConnectionRefusedError:
            return True
    return False


def has_ended(process: int, *, seconds: float) -> bool:
    """Whether the process of a file descriptor ends within so many seconds."""
    return bool(select.select([process], [], [], seconds)[0])


def test_a_suite_can_bring_its_own_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ENDPOINT", "http://127.0.0.1:9"), ("KEY", "their key"), ("SECRET", "their secret")):
        monkeypatch.setenv(f"S3_TEST_{name}", value)
    with KINDS["external"]() as server:
        assert server.pid is None
        assert server.environment()["AWS_ENDPOINT_URL_S3"] == "http://127.0.0.1:9"
        assert (server.access_key, server.secret_key) == ("their key", "their secret")


def test_an_external_server_without_its_variables_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_TEST_ENDPOINT", "http://127.0.0.1:9")
    for name in ("KEY", "SECRET"):
        monkeypatch.delenv(f"S3_TEST_{name}", raising=False)
    with pytest.raises(RuntimeError, match="S3_TEST_KEY, S3_TEST_SECRET: not set"):
        KINDS["external"]().start()


@pytest.mark.parametrize("name", [name for name in KINDS if name not in {"swift", "external"}])
def test_a_server_that_is_not_installed_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match="not installed; on Debian: apt-get install"):
        KINDS[name]().start()


########################################################################
# The samples
########################################################################


@pytest.mark.parametrize("fmt", [fmt for fmt in PIL_NAMES if fmt != "pdf"])  # which Pillow writes, and does not read
@pytest.mark.parametrize("number", [0, 1, 59, 0xABCDEF])
def test_a_number_survives_its_format_and_a_bad_jpeg(fmt: str, number: int) -> None:
    original = photo(number, fmt, size=(160, 120))
    assert number_in(original) == number
    converted = BytesIO()
    with Image.open(BytesIO(original)) as image:
        assert image.format == PIL_NAMES[fmt]
        image.convert("RGB").resize((100, 75)).save(converted, "JPEG", quality=20)
    assert number_in(converted.getvalue()) == number


def test_a_picture_without_a_number_is_told() -> None:
    blank = BytesIO()
    Image.linear_gradient("L").save(blank, "PNG")
    with pytest.raises(ValueError, match="no number"):
        number_in(blank.getvalue())


def test_a_number_or_size_that_cannot_be_shown_is_refused() -> None:
    with pytest.raises(ValueError, match="24 bits"):
        photo(1 << 24, "png")
    with pytest.raises(ValueError, match="too small"):
        photo(1, "png", size=(8, 8))


def test_the_samples_are_always_the_same_and_numbered_in_their_keys() -> None:
    samples = dict(photo_samples(20))
    assert len(samples) == 20
    # Their sizes and not their bytes: the unused bytes of a TIFF with several pages are what memory held.
    assert {key: len(body) for key, body in samples.items()} == {key: len(body) for key, body in photo_samples(20)}
    shown = {key: number_in(body) for key, body in samples.items() if key[-5].isdigit() or key[-6].isdigit()}
    assert len(shown) == 14
    assert all(f"{number:04}." in key for key, number in shown.items())


def test_asked_for_help_it_starts_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.standins.s3_server", "--help"]
    said = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60, cwd=PROJECT, env={"HOME": str(tmp_path)}
    )
    assert said.stdout.startswith("usage: python -m tests.standins.s3_server [-h] DIRECTORY [PORT] [CERTIFICATE]\n")
