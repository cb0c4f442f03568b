"""The listing: every key exactly once, in whatever order pages are read, and with few more requests than pages."""

from __future__ import annotations

import bisect
import hashlib
import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast
from xml.etree.ElementTree import ParseError

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import s3_bulk_convert as program
from s3_bulk_convert import Page, SourceObject
from tests.standins.test_s3_server import DOTTED_KEYS, ODD_KEYS

XML = """<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>{truncated}</IsTruncated>
<KeyCount>{count}</KeyCount><EncodingType>url</EncodingType>{more}</ListBucketResult>"""
ENTRY = """<Contents><Key>{key}</Key><LastModified>2026-09-21T14:13:20.000Z</LastModified><ETag>&quot;e1&quot;</ETag>
<Size>7</Size><StorageClass>{kept}</StorageClass>{more}</Contents>"""
WRITTEN = "2026-09-21T14:13:20.000Z"


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page makes the reader wait long enough to want more at a time."""
    monkeypatch.setattr(program.KeyRange, "PAGE_WAIT_SECONDS", -1.0)


class Listed(program.Bucket):
    """A bucket whose server answers each request for a page by `page`."""

    def __init__(self) -> None:
        self.name, self.output_name, self._payer, self.pages_asked = "in", "out", {}, 0
        self.client = cast(Any, self)
        self.requests: list[dict[str, str]] = []  # where their pages begin
        self._lock = threading.Lock()

    def list_objects_v2(self, **request: Any) -> dict[str, Page]:
        """Answer as boto3 does."""
        where = {name: str(request[name]) for name in request if name in {"StartAfter", "ContinuationToken"}}
        with self._lock:
            self.requests.append(where)
        return {"Page": self.page(request["Prefix"], **where)}

    def page(self, prefix: str, **where: str) -> Page:
        """One page."""
        raise NotImplementedError


class SortedKeys(Listed):
    """A bucket in memory that is listed as S3 lists: in pages, by StartAfter and token.

    `empty`: so many pages come without a key before each one with keys, and with a token that leads on.
    """

    def __init__(self, keys: list[str], page_keys: int = 3, *, empty: int = 0) -> None:
        super().__init__()
        self.keys, self._page_keys, self._empty = sorted(set(keys)), page_keys, empty

    def page(self, prefix: str, **where: str) -> Page:
        """One page."""
        times, _, after = where.get("ContinuationToken", f"0:{where.get('StartAfter', '')}").partition(":")
        if int(times) < self._empty:
            return Page([], is_last=False, token=f"{int(times) + 1}:{after}")
        start = max(bisect.bisect_right(self.keys, after), bisect.bisect_left(self.keys, prefix))
        found = [key for key in self.keys[start : start + self._page_keys + 1] if key.startswith(prefix)]
        shown = found[: self._page_keys]
        is_last = len(found) == len(shown)
        objects = [SourceObject(key, "e1", 7, "") for key in shown]
        return Page(objects, is_last, "" if is_last else f"0:{shown[-1]}")


def listed(bucket: Listed, prefix: str, max_parallel: Callable[[], int]) -> list[str]:
    """The keys of all pages, in the order in which they come."""
    return [found.key for page in bucket.list_pages(prefix, max_parallel) for found in page]


KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
PATHS = st.from_regex(r"(a/|b/|cc/d/|)[0-9]{1,4}\.png", fullmatch=True)


@given(
    keys=st.lists(KEYS | PATHS, max_size=60),
    widths=st.lists(st.integers(1, 20), min_size=1, max_size=9),
    empty=st.integers(0, 2),
)
@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_key_is_listed_exactly_once_however_many_pages_are_read_at_a_time(
    keys: list[str], widths: list[int], empty: int
) -> None:
    turns = iter(widths * 1000)
    bucket = SortedKeys(keys, empty=empty)
    assert sorted(listed(bucket, "", lambda: next(turns))) == bucket.keys


@pytest.mark.parametrize("prefix", ["", "a/", "a/1", "nothing/"])
def test_only_keys_that_begin_with_the_prefix_are_listed(prefix: str) -> None:
    bucket = SortedKeys([f"{folder}/{number}.png" for folder in "abc" for number in range(40)])
    expected = [key for key in bucket.keys if key.startswith(prefix)]
    assert sorted(listed(bucket, prefix, lambda: 16)) == expected


def test_where_one_page_is_read_at_a_time_the_keys_come_in_order_page_by_page() -> None:
    bucket = SortedKeys([f"{number:03}" for number in range(20)])
    assert listed(bucket, "", lambda: 1) == bucket.keys
    assert len(bucket.requests) == 7


def test_one_page_is_read_ahead_and_no_more() -> None:
    bucket = SortedKeys([f"{number:03}" for number in range(20)])
    pages = bucket.list_pages("", lambda: 1)
    assert [found.key for found in next(pages)] == ["000", "001", "002"]
    pages.close()
    assert len(bucket.requests) <= 2


########################################################################
# How many requests it takes
########################################################################


def digest(number: int) -> str:
    """Something that is spread evenly."""
    return hashlib.md5(b"%d" % number).hexdigest()


COUNT, PAGE_KEYS = 3000, 10
DISTRIBUTIONS = {
    "flat": [f"{number:06}.png" for number in range(COUNT)],
    "flat, with a beginning in common": [f"IMG_2026_{number:06}.png" for number in range(COUNT)],
    "folders": [f"{number % 50:02}/{number}.png" for number in range(COUNT)],
    "folders in a folder": [f"all/{number % 50:02}/{number}.png" for number in range(COUNT)],
    "folders by date": [f"photos/2026/{n % 12 + 1:02}/{n % 28 + 1:02}/IMG_{n:05}.heic" for n in range(COUNT)],
    "names that are spread evenly": [f"{digest(number)}.png" for number in range(COUNT)],
    "a folder for each page": [f"users/{digest(number // 10)}/{number % 10}.jpg" for number in range(COUNT)],
    "a long beginning in common": [f"{'x' * 40}/{digest(number)}.png" for number in range(COUNT)],
    "one huge folder among small ones": [
        f"{name}/{number}" for name in "abcdefghijklmnopqrstuvwxyz" for number in "012"
    ]
    + [f"m/huge/IMG_{number:07}.png" for number in range(COUNT)],
}
ADVERSE = {
    "a very long beginning in common": ["x" * 300 + f"{number:06}" for number in range(COUNT)],
    "characters of all kinds": [
        bytes.fromhex(digest(number)).decode("latin-1").replace("\0", " ")[: 1 + number % 16] for number in range(COUNT)
    ],
    "nothing but the last key": ["\U0010ffff" * 256],
    "nothing": [],
    "twice as close each time": [f"{'m' * (number // 10)}{number % 10}" for number in range(COUNT)],
}


@pytest.mark.parametrize("width", [2, 16])
@pytest.mark.parametrize("empty", [0, 1], ids=["full pages", "an empty page before each"])
@pytest.mark.parametrize("name", [*DISTRIBUTIONS, *ADVERSE])
def test_it_takes_at_most_twice_as_many_requests_as_there_are_pages_and_64(name: str, empty: int, width: int) -> None:
    bucket = SortedKeys({**DISTRIBUTIONS, **ADVERSE}[name], PAGE_KEYS, empty=empty)
    assert sorted(listed(bucket, "", lambda: width)) == bucket.keys
    pages = max(1, -(-len(bucket.keys) // PAGE_KEYS))
    assert len(bucket.requests) <= (1 + empty) * (2 * pages + 64)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_pages_are_read_side_by_side_where_the_reader_waits_for_them(name: str) -> None:
    on_their_way, gate = [0, 0], threading.Condition()  # now, and at the most

    class Slow(SortedKeys):
        """Answers when as many requests are on their way as may be; the first ones come alone."""

        def page(self, prefix: str, **where: str) -> Page:
            """One page."""
            with gate:
                on_their_way[0] += 1
                on_their_way[1] = max(on_their_way)
                gate.wait_for(lambda: on_their_way[0] >= 8, timeout=0.002)
                on_their_way[0] -= 1
            return super().page(prefix, **where)

    bucket = Slow(DISTRIBUTIONS[name], PAGE_KEYS)
    assert len(listed(bucket, "", lambda: 8)) == len(bucket.keys)
    assert on_their_way[1] == 8
    # Nearly all of them: what is read one after the other would be a request for each page by its token.
    starts = [where for where in bucket.requests if "StartAfter" in where]
    assert len(starts) > 16


########################################################################
# Listings that break
########################################################################


def test_an_error_of_one_page_is_the_listing_s() -> None:
    class Broken(SortedKeys):
        """Refuses the pages of its end."""

        def page(self, prefix: str, **where: str) -> Page:
            """One page."""
            if where.get("StartAfter", where.get("ContinuationToken", "").removeprefix("0:")) > "011":
                raise program.RunError("S3 refused", "try again")
            return super().page(prefix, **where)

    with pytest.raises(program.RunError, match="S3 refused"):
        listed(Broken([f"{number:03}" for number in range(50)]), "", lambda: 4)


@pytest.mark.parametrize("width", [1, 16])
def test_a_listing_in_another_order_stops_the_run(width: int) -> None:
    bucket = SortedKeys(["a.png", "\uffff.png", "\U00010000.png", "z.png"], page_keys=2)
    # As servers sort that compare UTF-16.
    bucket.keys.sort(key=lambda key: key.encode("utf-16-be"))
    with pytest.raises(program.RunError, match="order that S3 promises"):
        listed(bucket, "", lambda: width)


def test_a_server_that_knows_no_start_after_stops_the_run() -> None:
    class Old(SortedKeys):
        """Begins at the first key, unless there is a token."""

        def page(self, prefix: str, **where: str) -> Page:
            """One page."""
            return super().page(prefix, **{**where, "StartAfter": ""})

    with pytest.raises(program.RunError, match="order that S3 promises"):
        listed(Old([f"{number:03}" for number in range(200)]), "", lambda: 16)


class Outputs(Listed):
    """An output bucket of these pages."""

    def __init__(self, *pages: Page) -> None:
        super().__init__()
        self._pages = list(pages)

    def page(self, prefix: str, **where: str) -> Page:
        """The next page, whatever is asked for."""
        return self._pages.pop(0)


def page_with(*keys: str, token: str = "") -> Page:
    """A page of these keys."""
    return Page([SourceObject(key, "e1", 7, WRITTEN) for key in keys], not token, token)


def test_an_empty_page_of_outputs_that_is_not_the_last_is_not_the_end() -> None:
    outputs = Outputs(page_with(token="more"), page_with(token="yet more"), page_with("a.jpg"))
    assert program.OutputLister(outputs).existing([("", "a.jpg"), ("", "b.jpg")]) == {"a.jpg"}
    assert [next(iter(where.values())) for where in outputs.requests] == ["a.jp", "more", "yet more"]


@pytest.mark.parametrize("keys", [("b.jpg", "a.jpg"), ("a", "b.jpg")])
def test_outputs_that_are_listed_in_another_order_stop_the_run(keys: tuple[str, ...]) -> None:
    with pytest.raises(program.RunError, match="order that S3 promises"):
        program.OutputLister(Outputs(page_with(*keys))).existing([("", "a.jpg"), ("", "c.jpg")])


class Shown(program.Bucket):
    """A source bucket with these pages."""

    def __init__(self, *pages: Page) -> None:
        self._pages = pages

    def list_pages(
        self, prefix: str, max_parallel: Callable[[], int], bucket: str = ""
    ) -> Generator[list[SourceObject], None, None]:
        """All of them."""
        yield from (page.objects for page in self._pages)


@pytest.mark.parametrize("before", [0, 2])
def test_one_object_is_found_behind_empty_pages(before: int) -> None:
    empty = [page_with(token="more")] * before
    assert Shown(*empty, page_with("a", "ab")).find("a") == SourceObject("a", "e1", 7, WRITTEN)
    assert Shown(*empty, page_with("ab", "abc")).find("a") is None
    assert Shown(*empty, page_with()).find("a") is None


########################################################################
# S3's XML
########################################################################


def page_of(*entries: str, truncated: str = "false", count: int | None = None, more: str = "") -> Page:
    """What a page with these entries is parsed as."""
    told = len(entries) if count is None else count
    return Page.parse(XML.format(truncated=truncated, count=told, more="".join(entries) + more).encode())


@pytest.mark.parametrize(
    ("encoded", "key"),
    [("a+b%20c.png", "a b c.png"), ("a%2Bb.png", "a+b.png"), ("%01%0A.png", "\x01\n.png"), ("%C3%BC%25.png", "ü%.png")],
)
def test_keys_are_decoded_as_s3_encodes_them(encoded: str, key: str) -> None:
    assert page_of(ENTRY.format(key=encoded, kept="STANDARD", more="")).objects == [SourceObject(key, "e1", 7, WRITTEN)]


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
        pytest.param(f"{SIZED}{DATED}<ETag>e1</ETag><Key>a.png</Key>", id="another order"),
    ],
)
def test_an_entry_is_read_however_a_server_writes_it(entry: str) -> None:
    whole = f"<Contents>{entry}</Contents>"
    assert (
        page_of(whole, f'<Contents type="file">{entry}</Contents>').objects
        == [SourceObject("a.png", "e1", 7, WRITTEN)] * 2
    )


def test_a_version_without_an_etag_is_size_and_time() -> None:
    (found,) = page_of(f"<Contents><Key>a.png</Key>{DATED}{SIZED}</Contents>").objects
    assert found.version == f"7@{program.unix_seconds(WRITTEN):.0f}"


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(f"<Key>a.png</Key>{DATED}<ETag>e1</ETag>", id="no size"),
        pytest.param(f"<Key>a.png</Key><ETag>e1</ETag>{SIZED}", id="no time"),
        pytest.param(f"{DATED}<ETag>e1</ETag>{SIZED}", id="no key"),
        pytest.param(f"<Key>a.png</Key>{DATED}<ETag>e1</ETag><Size>some</Size>", id="a size that is none"),
        pytest.param(f"<Key>a&copy.png</Key>{DATED}<ETag>e1</ETag>{SIZED}", id="an escape that XML does not know"),
    ],
)
def test_a_page_with_an_entry_that_is_not_understood_is_no_page(entry: str) -> None:
    good = ENTRY.format(key="b.png", kept="STANDARD", more="")
    with pytest.raises((ValueError, ParseError), match=r"."):
        page_of(f"<Contents>{entry}</Contents>", good)


@pytest.mark.parametrize(
    ("written", "key"),
    [("a&amp;copy.png", "a&copy.png"), ("&lt;a&gt;&apos;.png", "<a>'.png"), ("&#xfc;&#10;.png", "ü\n.png")],
)
def test_a_key_s_escapes_are_those_of_xml(written: str, key: str) -> None:
    assert [found.key for found in page_of(ENTRY.format(key=written, kept="STANDARD", more="")).objects] == [key]


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
    [
        ("ZC9l", "ZC9l"),
        ("e&amp;&lt;f", "e&<f"),
        ("&amp;#x01;", "&#x01;"),
        # What no XML can carry is left out, and what is left is no token: the listing goes on after the last key.
        ("a&#x01;/x", ""),
        ("a&#1;/x", ""),
        ("a&#X1F;/x", ""),
        ("a\x01/x", ""),
    ],
)
def test_a_page_may_end_at_a_key_that_no_xml_can_carry(written: str, token: str) -> None:
    more = f"<NextContinuationToken>{written}</NextContinuationToken><StartAfter>{written}</StartAfter>"
    page = page_of(ENTRY.format(key="a", kept="STANDARD", more=""), truncated="true", more=more)
    assert (page.token, page.is_last, [found.key for found in page.objects]) == (token, False, ["a"])


def test_a_key_that_has_lost_a_character_is_no_key() -> None:
    entry = ENTRY.format(key="a\x01", kept="STANDARD", more="")
    body = XML.format(truncated="false", count=1, more=entry).replace("<EncodingType>url</EncodingType>", "")
    with pytest.raises(ValueError, match="control character"):
        Page.parse(body.encode())


@pytest.mark.parametrize(
    "xml",
    [
        pytest.param(b"<html><body>hello</body></html>", id="a web page"),
        pytest.param(b"", id="nothing"),
        pytest.param(XML.format(truncated="false", count=1, more="").encode(), id="fewer keys than it says"),
        pytest.param(XML.format(truncated="true", count=0, more="").encode(), id="no way to go on"),
        pytest.param(XML.format(truncated="", count=0, more="").encode(), id="no word of whether it is the last"),
        pytest.param(XML.format(truncated="false", count=0, more="").encode()[:-5], id="cut"),
        pytest.param(b"<Error><Code>AccessDenied</Code></Error>", id="an error"),
    ],
)
def test_what_is_not_a_whole_page_is_never_taken_for_one(xml: bytes) -> None:
    with pytest.raises((ValueError, ParseError), match=r"."):
        Page.parse(xml)


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
    given = {"S3_BUCKET": bucket.name, "TARGET_FORMAT": "jpg", "CTF_API_KEY": "k"}
    return program.Bucket(program.load_settings(None, {**os.environ, **given}, []))


@pytest.mark.needs("pages")
@pytest.mark.parametrize(
    "layout",
    [
        *list(LAYOUTS)[:1],
        *(pytest.param(layout, marks=pytest.mark.slow) for layout in list(LAYOUTS)[1:-1]),
        pytest.param("odd keys", marks=pytest.mark.needs("newlines")),
    ],
)
def test_a_real_server_s_keys_are_all_listed_once(
    layout: str, bucket: Any, reader: program.Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [key for key in LAYOUTS[layout] if len(key.encode()) <= program.S3_KEY_BYTES]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: bucket.put(key, b"x"), keys))
    monkeypatch.setattr(program, "PAGE_KEYS", 10)
    beginning = keys[0][:2]
    for width in (1, 8):
        listed = [found.key for page in reader.list_pages("", partial(int, width)) for found in page]
        assert sorted(listed) == sorted(keys)
        assert width > 1 or listed == sorted(keys, key=str.encode)
        below = [found.key for page in reader.list_pages(beginning, partial(int, width)) for found in page]
        assert sorted(below) == sorted(key for key in keys if key.startswith(beginning))
    # One object, as a listing shows it; and none where a longer key is all that begins so.
    assert getattr(reader.find(keys[0]), "key", None) == keys[0]
    assert reader.find(f"{max(keys, key=len)}x") is None
