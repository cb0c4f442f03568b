"""The listing: every key exactly once, in whatever order pages are read, and none read that nobody asked for."""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import s3_bulk_convert as program
from s3_bulk_convert import Listing, Page, S3Object
from tests.test_keys_from import make_bucket
from tests.test_s3_server import DOTTED_KEYS, ODD_KEYS

XML = """<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>{truncated}</IsTruncated>
<KeyCount>{count}</KeyCount><EncodingType>url</EncodingType>{more}</ListBucketResult>"""
ENTRY = """<Contents><Key>{key}</Key><LastModified>2026-09-21T14:13:20.000Z</LastModified><ETag>&quot;e1&quot;</ETag>
<Size>7</Size><StorageClass>{kept}</StorageClass>{more}</Contents>"""


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page makes the reader wait long enough to want more at a time."""
    monkeypatch.setattr(program, "PAGE_WAIT_SECONDS", -1.0)


class SortedKeys:
    """A bucket in memory that is listed as S3 lists: in pages, by StartAfter, token and delimiter."""

    def __init__(self, keys: list[str], page_keys: int = 3) -> None:
        self.keys, self._page_keys = sorted(set(keys)), page_keys
        self.requests: list[dict[str, str]] = []
        self._lock = threading.Lock()

    def read_page(self, prefix: str, **where: str) -> Page:
        """One page."""
        with self._lock:
            self.requests.append(where)
        if "Delimiter" in where:
            below = {key[len(prefix) :].partition("/")[0] for key in self.keys if self.is_in_folder(key, prefix)}
            return Page([], [f"{prefix}{name}/" for name in sorted(below)])
        after = where.get("ContinuationToken", where.get("StartAfter", "")).removeprefix("token:")
        found = [key for key in self.keys[bisect.bisect_right(self.keys, after) :] if key.startswith(prefix)]
        shown = found[: self._page_keys]
        token = f"token:{shown[-1]}" if len(found) > len(shown) else ""
        return Page([S3Object(key, "e1", 7, "") for key in shown], [], token)

    def fetch_page(self, prefix: str, **where: str) -> program.FetchedPage:
        """One page, fetched."""
        page = self.read_page(prefix, **where)
        return lambda: page

    @staticmethod
    def is_in_folder(key: str, prefix: str) -> bool:
        """Whether a key lies in a folder below the prefix."""
        return key.startswith(prefix) and "/" in key[len(prefix) :]


def listed(bucket: SortedKeys, prefix: str, hunger: Callable[[], int]) -> list[str]:
    """The keys of all pages, in the order in which they come."""
    return [found.key for page in Listing(bucket.fetch_page, prefix, hunger).pages() for found in page]


KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
PATHS = st.from_regex(r"(a/|b/|cc/d/|)[0-9]{1,4}\.png", fullmatch=True)


@given(keys=st.lists(KEYS | PATHS, max_size=60), hungers=st.lists(st.integers(1, 20), min_size=1, max_size=9))
@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_key_is_listed_exactly_once_however_hungry_the_reader(keys: list[str], hungers: list[int]) -> None:
    turns = iter(hungers * 1000)
    bucket = SortedKeys(keys)
    assert sorted(listed(bucket, "", lambda: next(turns))) == bucket.keys


@pytest.mark.parametrize("prefix", ["", "a/", "a/1", "nothing/"])
def test_only_keys_that_begin_with_the_prefix_are_listed(prefix: str) -> None:
    bucket = SortedKeys([f"{folder}/{number}.png" for folder in "abc" for number in range(40)])
    expected = [key for key in bucket.keys if key.startswith(prefix)]
    assert sorted(listed(bucket, prefix, lambda: 16)) == expected


def test_a_reader_without_hunger_gets_the_keys_in_order_page_by_page() -> None:
    bucket = SortedKeys([f"{number:03}" for number in range(20)])
    assert listed(bucket, "", lambda: 1) == bucket.keys
    assert len(bucket.requests) == 7
    assert not any("Delimiter" in request for request in bucket.requests)


def test_one_page_is_read_ahead_and_no_more() -> None:
    bucket = SortedKeys([f"{number:03}" for number in range(20)])
    pages = Listing(bucket.fetch_page, "", lambda: 1).pages()
    assert [found.key for found in next(pages)] == ["000", "001", "002"]
    pages.close()
    assert len(bucket.requests) <= 2


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param([f"{number:06}.png" for number in range(3000)], id="flat"),
        pytest.param(
            [f"IMG_2026_{number:06}.png" for number in range(3000)], id="flat with a long beginning in common"
        ),
        pytest.param([f"{number % 50:02}/{number}.png" for number in range(3000)], id="folders"),
        pytest.param([f"all/{number % 50:02}/{number}.png" for number in range(3000)], id="folders in a folder"),
    ],
)
def test_a_hungry_reader_s_pages_are_read_side_by_side(keys: list[str]) -> None:
    bucket = SortedKeys(keys, page_keys=10)
    assert sorted(listed(bucket, "", lambda: 8)) == bucket.keys
    pages = [request for request in bucket.requests if "Delimiter" not in request]
    starts = [request for request in pages if "StartAfter" in request]
    assert len(starts) > 8
    # What spans overlap or turn out empty costs less than the pages that hold something.
    assert len(pages) < 2 * len(keys) / 10


def test_an_error_of_one_page_is_the_listing_s() -> None:
    bucket = SortedKeys([f"{number:03}" for number in range(50)])

    def fetch_page(prefix: str, **where: str) -> program.FetchedPage:
        if where.get("ContinuationToken", "").endswith("011"):
            raise program.RunStopped("S3 refused", "try again")
        return bucket.fetch_page(prefix, **where)

    with pytest.raises(program.RunStopped, match="S3 refused"):
        list(Listing(fetch_page, "", lambda: 4).pages())


@pytest.mark.parametrize("hunger", [1, 16])
def test_a_listing_in_another_order_stops_the_run(hunger: int) -> None:
    bucket = SortedKeys(["a.png", "\uffff.png", "\U00010000.png", "z.png"], page_keys=2)
    # As servers sort that compare UTF-16.
    bucket.keys.sort(key=lambda key: key.encode("utf-16-be"))
    with pytest.raises(program.RunStopped, match="order that S3 promises"):
        listed(bucket, "", lambda: hunger)


def test_a_server_that_knows_no_start_after_stops_the_run() -> None:
    bucket = SortedKeys([f"{number:03}" for number in range(200)])

    def fetch_page(prefix: str, **where: str) -> program.FetchedPage:
        return bucket.fetch_page(prefix, **{**where, "StartAfter": ""})

    with pytest.raises(program.RunStopped, match="order that S3 promises"):
        list(Listing(fetch_page, "", lambda: 16).pages())


class Outputs(program.Bucket):
    """An output bucket of these pages."""

    def __init__(self, *pages: Page) -> None:
        self.output_name, self._pages = "out", list(pages)
        self.asked: list[dict[str, str]] = []

    def read_page(self, *_: str, **where: str) -> Page:
        """The next page, whatever is asked for."""
        self.asked.append(where)
        return self._pages.pop(0)


def page_with(*keys: str, token: str = "") -> Page:
    """A page of these keys."""
    return Page([S3Object(key, "e1", 7, WRITTEN) for key in keys], [], token)


def test_an_empty_page_of_outputs_that_is_not_the_last_is_not_the_end() -> None:
    outputs = Outputs(page_with(token="more"), page_with(token="yet more"), page_with("a.jpg"))
    assert list(outputs.existing_outputs("", ["a.jpg", "b.jpg"])) == ["a.jpg"]
    assert [next(iter(where.values())) for where in outputs.asked] == ["a.jp", "more", "yet more"]


@pytest.mark.parametrize("keys", [("b.jpg", "a.jpg"), ("a", "b.jpg")])
def test_outputs_that_are_listed_in_another_order_stop_the_run(keys: tuple[str, ...]) -> None:
    with pytest.raises(program.RunStopped, match="order that S3 promises"):
        Outputs(page_with(*keys)).existing_outputs("", ["a.jpg", "c.jpg"])


########################################################################
# S3's XML
########################################################################


def page_of(*entries: str, truncated: str = "false", count: int | None = None, more: str = "") -> Page:
    """What a page with these entries is parsed as."""
    told = len(entries) if count is None else count
    return program.parse_page(XML.format(truncated=truncated, count=told, more="".join(entries) + more).encode())


@pytest.mark.parametrize(
    ("encoded", "key"),
    [("a+b%20c.png", "a b c.png"), ("a%2Bb.png", "a+b.png"), ("%01%0A.png", "\x01\n.png"), ("%C3%BC%25.png", "ü%.png")],
)
def test_keys_are_decoded_as_s3_encodes_them(encoded: str, key: str) -> None:
    assert page_of(ENTRY.format(key=encoded, kept="STANDARD", more="")).objects == [
        S3Object(key, "e1", 7, "2026-09-21T14:13:20.000Z")
    ]


WRITTEN = "2026-09-21T14:13:20.000Z"
DATED, SIZED = f"<LastModified>{WRITTEN}</LastModified>", "<Size>7</Size>"


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(f'<Key>a.png</Key>{DATED}<ETag>"e1"</ETag>{SIZED}', id="quotes as they are"),
        pytest.param(f"<Key>a.png</Key>{DATED}<ETag>&#34;e1&#34;</ETag>{SIZED}", id="quotes as Go writes them"),
        pytest.param(f"<Key>a.png</Key>{DATED}<ETag>e1</ETag>{SIZED}", id="no quotes"),
        pytest.param(
            f"<Key>a.png</Key><Generation>3</Generation>{DATED}<ETag>e1</ETag><ChecksumAlgorithm>CRC32</ChecksumAlgorithm>"
            f"{SIZED}<Owner><ID>me</ID></Owner><StorageClass>STANDARD</StorageClass>",
            id="more in between",
        ),
        pytest.param(f'<Key>a.png</Key>{DATED}<ETag>W/"e1"</ETag>{SIZED}', id="a weak ETag"),
        pytest.param(f"\n <Key>a.png</Key>\n {DATED}\n <ETag>e1</ETag>\n {SIZED}\n", id="on lines of its own"),
    ],
)
def test_an_entry_is_read_however_a_server_writes_it(entry: str) -> None:
    whole = f"<Contents>{entry}</Contents>"
    assert page_of(whole, whole).objects == [S3Object("a.png", "e1", 7, WRITTEN)] * 2


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(f"<Key>a.png</Key>{DATED}<ETag>e1</ETag>", id="no size"),
        pytest.param(f"<Key>a.png</Key>{SIZED}{DATED}<ETag>e1</ETag>", id="another order"),
    ],
)
def test_an_entry_that_is_not_understood_is_boto3_s_to_read(entry: str) -> None:
    good = ENTRY.format(key="b.png", kept="STANDARD", more="")
    with pytest.raises(program.BadListing):
        page_of(f"<Contents>{entry}</Contents>", good)


@pytest.mark.parametrize("tag", ["", "<ETag>a&quot;b&quot;c</ETag>"])
def test_a_page_of_entries_that_are_not_understood_is_given_up_at_once(tag: str) -> None:
    entries = [f"<Contents><Key>{number}.png</Key>{DATED}{tag}{SIZED}</Contents>" for number in range(1000)]
    began = time.process_time()
    with pytest.raises(program.BadListing):
        page_of(*entries)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("count", ["", "<KeyCount>1</KeyCount>"])
@pytest.mark.parametrize("before", ["", f"<Contents><Key>b.png</Key>{DATED}<ETag>e1</ETag>{SIZED}</Contents>"])
def test_an_entry_with_an_attribute_is_not_overlooked(count: str, before: str) -> None:
    odd = f'<Contents type="file"><Key>a.png</Key>{DATED}<ETag>e1</ETag>{SIZED}</Contents>'
    for entries in (before + odd, odd + before):
        page = f"<ListBucketResult><IsTruncated>false</IsTruncated>{count}{entries}</ListBucketResult>"
        with pytest.raises(program.BadListing):
            program.parse_page(page.encode())


@pytest.mark.parametrize(
    ("written", "key"),
    [("a&amp;copy.png", "a&copy.png"), ("&lt;a&gt;&apos;.png", "<a>'.png"), ("&#xfc;&#10;.png", "ü\n.png")],
)
def test_a_key_s_escapes_are_those_of_xml(written: str, key: str) -> None:
    assert [found.key for found in page_of(ENTRY.format(key=written, kept="STANDARD", more="")).objects] == [key]


def test_a_key_with_an_escape_that_xml_does_not_know_is_boto3_s_to_read() -> None:
    with pytest.raises(program.BadListing):
        page_of(ENTRY.format(key="a&copy.png", kept="STANDARD", more=""))


@pytest.mark.parametrize(("etag", "plain"), [('"e1"', "e1"), ('W/"e1"', "e1"), ("e1", "e1"), (None, "")])
def test_an_etag_is_the_same_whoever_reads_it(etag: str | None, plain: str) -> None:
    line = {"Key": "a", "Size": 7, "ContentLength": 7, "LastModified": datetime(2026, 9, 21, tzinfo=timezone.utc)}
    told = line if etag is None else {**line, "ETag": etag}
    assert (program.listed_object(told).etag, program.headed_object("a", told).etag) == (plain, plain)


@pytest.mark.parametrize(
    ("kept", "restore", "archived"),
    [
        ("STANDARD", "", False),
        ("GLACIER", "", True),
        ("DEEP_ARCHIVE", "<RestoreStatus><IsRestoreInProgress>true</IsRestoreInProgress></RestoreStatus>", True),
        (
            "GLACIER",
            "<RestoreStatus><RestoreExpiryDate>2026-12-21T14:13:20.000Z</RestoreExpiryDate></RestoreStatus>",
            False,
        ),
    ],
)
def test_an_archived_object_counts_as_such_unless_it_is_restored(kept: str, restore: str, *, archived: bool) -> None:
    (found,) = page_of(ENTRY.format(key="a.png", kept=kept, more=restore)).objects
    assert found.archived is archived


@pytest.mark.parametrize(
    ("written", "token"),
    [("ZC9l", "ZC9l"), ("a&#x01;/x", "a\x01/x"), ("e&amp;&lt;f", "e&<f"), ("&amp;#x01;", "&#x01;"), ("\r\n", "\r\n")],
)
def test_a_page_may_end_at_a_key_that_no_xml_can_carry(written: str, token: str) -> None:
    more = f"<NextContinuationToken>{written}</NextContinuationToken><StartAfter>{written}</StartAfter>"
    assert page_of(ENTRY.format(key="a", kept="STANDARD", more=""), truncated="true", more=more).token == token


@pytest.mark.parametrize(
    "xml",
    [
        pytest.param(b"<html><body>hello</body></html>", id="a web page"),
        pytest.param(b"", id="nothing"),
        pytest.param(XML.format(truncated="false", count=1, more="").encode(), id="fewer keys than it says"),
        pytest.param(XML.format(truncated="true", count=0, more="").encode(), id="no way to go on"),
        pytest.param(XML.format(truncated="false", count=0, more="").encode()[:-5], id="cut"),
        pytest.param(b"<Error><Code>AccessDenied</Code></Error>", id="an error"),
    ],
)
def test_what_is_not_a_whole_page_is_never_taken_for_one(xml: bytes) -> None:
    with pytest.raises(program.BadListing):
        program.parse_page(xml)


########################################################################
# A real server
########################################################################

LAYOUTS = {
    "flat": [f"{number:04}.png" for number in range(120)],
    "flat with a long beginning in common": [f"IMG_2026_{number:04}.png" for number in range(120)],
    "folders": [f"{number % 12:02}/{number}.png" for number in range(120)],
    "folders in a folder": [f"all/{number % 12:02}/{number}.png" for number in range(120)],
    "odd keys": [
        f"{folder}{key}" for folder in ("", "ü b/", "c%2F+/", "\U0001f600/") for key in [*ODD_KEYS, *DOTTED_KEYS]
    ]
    + [f"\uffee{number}" for number in range(40)]
    + [f"\x01{number}" for number in range(40)],
}


@pytest.fixture
def reader(bucket: Any, monkeypatch: pytest.MonkeyPatch, s3: Any) -> program.Bucket:
    """The program's bucket on the real S3 server."""
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    return make_bucket(bucket.name)


@pytest.mark.parametrize("hunger", [pytest.param(1, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_real_server_s_keys_are_all_listed_once(
    *, layout: str, hunger: int, bucket: Any, reader: program.Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [key for key in LAYOUTS[layout] if len(key.encode()) <= program.S3_KEY_BYTES]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: bucket.put(key, b"x"), keys))
    monkeypatch.setattr(program, "PAGE_KEYS", 10)
    listed = [found.key for page in reader.list_pages("", lambda: hunger) for found in page]
    assert sorted(listed) == sorted(keys)
    assert hunger > 1 or listed == sorted(keys, key=str.encode)
    assert reader._fast_failures == 0
    beginning = keys[0][:2]
    below = [found.key for page in reader.list_pages(beginning, lambda: hunger) for found in page]
    assert sorted(below) == sorted(key for key in keys if key.startswith(beginning))


def test_a_page_is_the_same_whoever_parses_it(
    bucket: Any, reader: program.Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("a b/ü+%.png", "a b/x.png", "c//d.png", "e.png"):
        bucket.put(key, b"x")
    fast = [
        reader.read_page(bucket.name, "", **where) for where in ({}, {"Delimiter": "/"}, {"StartAfter": "c//d.png"})
    ]
    monkeypatch.setattr(program, "FAST_FAILURES_ENDURED", 0)
    slow = [
        reader.read_page(bucket.name, "", **where) for where in ({}, {"Delimiter": "/"}, {"StartAfter": "c//d.png"})
    ]
    assert [[found._replace(last_modified="") for found in page.objects] for page in fast] == [
        [found._replace(last_modified="") for found in page.objects] for page in slow
    ]
    assert [page.folders for page in fast] == [page.folders for page in slow] == [[], ["a b/", "c/"], []]
    assert [found.modified for found in fast[0].objects] == [found.modified for found in slow[0].objects]
