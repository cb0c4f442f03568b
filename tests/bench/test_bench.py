"""The ruler of `make bench`: its stand-ins list what they say they hold, and its checkpoints are the program's own."""

import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from botocore.config import Config

from tests.bench import parts
from tests.bench.harness import BUCKET, PROJECT, Standins, finished_checkpoint, run_program, standins
from tests.bench.keys import HASH_FOLDERS, HASHES, LONG, PLAIN, Keys
from tests.bench.report import Target, replace_section, target_table

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

COUNT, FOLDERS = 5_300, 3  # no folder ends where a block of a thousand or a page does
KEYS = Keys(COUNT, FOLDERS)
LIMIT = 3


@pytest.fixture(scope="module")
def servers() -> Iterator[Standins]:
    """The stand-ins with a bucket in folders and a limit of LIMIT conversions."""
    with standins(keys=COUNT, folders=FOLDERS, latency=0.0, put_latency=0.0, per_minute=LIMIT) as running:
        yield running


@pytest.fixture(scope="module")
def client(servers: Standins) -> "S3Client":
    """A boto3 client of them."""
    return boto3.session.Session("bench", "bench").client(
        "s3", endpoint_url=servers.url, region_name="us-east-1", config=Config(s3={"addressing_style": "path"})
    )


def listed(client: "S3Client", **request: Any) -> list[tuple[str, str]]:
    """Keys and ETags as boto3 reads them."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, **request)
    return [(entry["Key"], entry["ETag"].strip('"')) for page in pages for entry in page.get("Contents", [])]


def expected(numbers: range) -> list[tuple[str, str]]:
    return [(KEYS.key(number), KEYS.etag(number)) for number in numbers]


def test_boto3_lists_every_key_once_and_in_order(client: "S3Client") -> None:
    assert listed(client) == expected(range(COUNT)) == sorted(expected(range(COUNT)))


@pytest.mark.parametrize(("folders", "names"), [(0, PLAIN), (3, PLAIN), (HASH_FOLDERS, HASHES), (1000, LONG)])
def test_keys_of_each_layout_are_in_order_and_found_again(folders: int, names: str) -> None:
    keys = Keys(COUNT, folders, names=names)
    made = [keys.key(number) for number in range(COUNT)]
    written = re.findall(r"<Key>(.*?)</Key>.*?<ETag>&quot;(\w+)", b"".join(keys.xml(0, COUNT)).decode())
    assert made == sorted(set(made)) == [key for key, _ in written]
    assert [keys.number_of(key) for key in made[::99]] == list(range(0, COUNT, 99))
    assert written[-1][1] == keys.etag(COUNT - 1)


@pytest.mark.slow
def test_a_listing_can_begin_anywhere_and_be_of_any_prefix(client: "S3Client") -> None:
    first = KEYS.per_folder
    assert listed(client, StartAfter="d0000/00001234.png", MaxKeys=7)[:7] == expected(range(1235, 1242))
    assert listed(client, Prefix="d0001/") == expected(range(first, 2 * first))
    assert listed(client, Prefix="converted/") == listed(client, Prefix="d0009/") == []


def test_folders_are_listed_a_page_at_a_time(client: "S3Client") -> None:
    page = client.list_objects_v2(Bucket=BUCKET, Delimiter="/", MaxKeys=2)
    rest = client.list_objects_v2(Bucket=BUCKET, Delimiter="/", ContinuationToken=page["NextContinuationToken"])
    folders = [entry["Prefix"] for entry in page["CommonPrefixes"] + rest["CommonPrefixes"]]
    assert (folders, rest["IsTruncated"]) == (["d0000/", "d0001/", "d0002/"], False)


def test_a_limit_admits_so_many_and_no_more(servers: Standins) -> None:
    servers.counts(reset=True)
    statuses = []
    for _ in range(LIMIT + 2):
        try:
            with urllib.request.urlopen(f"{servers.url}/v1/convert", data=b"x" * 100_000) as reply:
                statuses.append((reply.status, len(reply.read())))
        except urllib.error.HTTPError as refusal:
            statuses.append((refusal.code, int(refusal.headers["Retry-After"]) // 61))
    assert statuses == [(200, 20_000)] * LIMIT + [(429, 0)] * 2


@pytest.mark.slow
def test_a_checkpoint_that_was_made_knows_every_object(servers: Standins) -> None:
    with finished_checkpoint(servers, COUNT, FOLDERS, KEYS.size) as path:
        cost = run_program(servers, "--limit", "1", checkpoint=path)  # one that knows them not ends at once
    assert (cost.exit_code, cost.summary["already_done"], cost.counts["conversions"]) == (0, COUNT, 0)


def status_of(url: str, body: bytes, key: str) -> int:
    request = urllib.request.Request(url, data=body, headers={"Idempotency-Key": key})
    try:
        with urllib.request.urlopen(request) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as refusal:
        return refusal.code


def test_what_is_paid_is_remembered_by_key_for_a_day_and_what_is_put_for_ever() -> None:
    with standins(keys=9, latency=0.0, put_latency=0.0, remembers=True) as servers:
        url, source = f"{servers.url}/v1/convert", b"file_url=http%3A%2F%2Fhost%2Fbench%2Fa%2F1.png%3Fsigned%3D"
        sent = [(source + b"1", "k"), (source + b"1", "k"), (source + b"2", "k"), (source + b"2", "other")]
        statuses = [status_of(url, *each) for each in sent]
        before = servers.counts()
        servers.let_a_day_pass()
        statuses.append(status_of(url, source + b"2", "k"))
        put = {"x-amz-meta-mark": "ours"}
        output = f"{servers.url}/bench/converted/1.jpg"
        urllib.request.urlopen(urllib.request.Request(output, b"jpeg", put, method="PUT")).close()
        with urllib.request.urlopen(urllib.request.Request(output, method="HEAD")) as reply:
            mark = reply.headers["x-amz-meta-mark"]
        after = servers.counts()
    assert (statuses, mark) == ([200, 200, 422, 200, 200], "ours")
    assert [(each["paid"], each["paid_twice"], each["stored"]) for each in (before, after)] == [(2, 1, 0), (3, 2, 1)]


@pytest.mark.slow
def test_listing_and_growth_make_their_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PAGE_SECONDS", (0.0,))
    monkeypatch.setattr(parts, "LAYOUTS", parts.LAYOUTS[1:2])
    monkeypatch.setattr(parts, "installed", {}.get)
    numbers = {"keys": 2000, "few_keys": 1000, "growth_keys": (1000,), "kept_keys": 1000, "first_files": (1, 3)}
    scale = replace(parts.QUICK, **numbers)  # type: ignore[arg-type]
    [listed], [grown, bill] = parts.listing(scale).tables, parts.growth(scale).tables
    whats = [row.split(" | ")[1:4] for row in listed.splitlines()[2:]]
    assert [(what, keys) for what, keys, _ in whats] == [
        *((what, "1,000") for what in (*parts.LISTERS, parts.OURS)),
        (parts.OURS, "2,000"),
    ]
    assert [rate == "not installed" for *_, rate in whats] == [False, True, True, True, False, False]
    assert grown.splitlines()[2].startswith("| 1,000 |")
    assert "| first run: each object more | 0 | 3 | 1 | 1 | 0.0000066 |" in bill


@pytest.mark.slow
def test_a_peer_pays_twice_what_ours_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PEER_WORKERS", 2), ("API_SECONDS", 0.4), ("PEERS", (parts.OURS, parts.THREADS))):
        monkeypatch.setattr(parts, name, value)
    _, told = parts.peers(replace(parts.QUICK, peer_files=8)).tables
    rows = [row.strip("| ").split(" | ") for row in told.splitlines()[2:]]
    ours, threads = ([row[2:3] + row[4:] for row in rows if row[0] == who] for who in parts.PEERS)
    assert [ours[at] for at in (0, 1, 3, 4)] == [
        ["0", "8", "0", "0"],
        ["0", "0", "0", "0"],
        ["0", str(8 - int(ours[2][1])), "0", "0"],
        ["0", "0", "0", "0"],
    ]
    assert (threads[1], threads[2][0], threads[3][0]) == (["0", "8", "8", "0"], "-9", "1")


def test_the_bench_says_which_parts_there_are() -> None:
    command = [sys.executable, "-m", "tests.bench", "nothing"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (done.returncode, "throughput" in done.stderr) == (2, True)


def test_a_target_says_what_it_is_and_whether_it_is_met() -> None:
    cheap = Target("CPU", 7.5, most=7, first=4.0)
    rows = target_table([cheap, Target("CPU", 7.0, most=7), Target("filled", 98.4, least=98.5)]).splitlines()[2:]
    assert rows == [
        "| CPU | ≤ 7 | 7.50 | 4.00 | **no** |",
        "| CPU | ≤ 7 | 7.00 | – | yes |",
        "| filled | ≥ 98.5 | 98.4 | – | **no** |",
    ]


def test_a_part_that_is_measured_again_replaces_its_own_section_only(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n\nWritten by hand.\n")
    for name, section in (("one", "old"), ("two", "other"), ("one", "new")):
        replace_section(path, name, section)
    words = [line for line in path.read_text().splitlines() if line and not line.startswith("<!--")]
    assert words == ["# Results", "Written by hand.", "## Measurements", "new", "other"]
