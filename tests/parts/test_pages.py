"""Archives of pages as only who means harm would send them: what is no page is taken for none, and memory is flat."""

from __future__ import annotations

import contextlib
import io
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Sequence
from typing import IO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import s3_bulk_convert as program
from tests.standins.converters import wrapped, zip_of_pages

PAGES = [wrapped(b"page %d" % number, "jpg") for number in (1, 2, 3)]
GOOD = zip_of_pages(PAGES, "jpg").body
NO_PAGES = b"PK\5\6" + bytes(18)
ZIP_TYPE = program.FileType("application/zip", ".zip")
DAMAGED, FOR_GOOD = "damaged", "for good"


def archive_of(body: bytes | IO[bytes]) -> program.ConvertedFile:
    """A judged answer that is an archive."""
    return program.ConvertedFile(io.BytesIO(body) if isinstance(body, bytes) else body, 0, ZIP_TYPE)


def bodies(body: bytes | IO[bytes], target: str = "jpg") -> list[bytes]:
    """The pages of an archive."""
    return [page.body.read() for page in archive_of(body).unpacked(target)]


def packed(*files: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """An archive of some files."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for name, body in files:
            archive.writestr(name, body)
    return made.getvalue()


def set_in_both_headers(archive: bytes, offset: int, value: int) -> bytes:
    """An archive with another half word in all its headers; the offset is that of the local ones."""
    changed = bytearray(archive)
    for signature, shift in ((b"PK\3\4", 0), (b"PK\1\2", 2)):
        start = changed.find(signature)
        while start >= 0:
            struct.pack_into("<H", changed, start + offset + shift, value)
            start = changed.find(signature, start + 4)
    return bytes(changed)


PACKED = packed(("1.jpg", wrapped(bytes(range(256)), "jpg")))
BAD = {
    "encrypted": (set_in_both_headers(GOOD, 6, 1), FOR_GOOD),
    "strongly encrypted": (set_in_both_headers(GOOD, 6, 0x41), FOR_GOOD),
    "of a later version": (set_in_both_headers(GOOD, 4, 99), FOR_GOOD),
    "packed by BZIP2": (packed(("1.jpg", PAGES[0]), method=zipfile.ZIP_BZIP2), FOR_GOOD),
    "packed by LZMA": (packed(("1.jpg", PAGES[0]), method=zipfile.ZIP_LZMA), FOR_GOOD),
    "packed by nobody knows": (set_in_both_headers(GOOD, 8, 77), FOR_GOOD),
    "without a page": (NO_PAGES, FOR_GOOD),
    "of folders alone": (packed(("a/", b"")), FOR_GOOD),
    "with an empty page": (packed(("1.jpg", PAGES[0]), ("2.jpg", b"")), FOR_GOOD),
    "with an archive in it": (packed(("1.jpg", PAGES[0]), ("2.jpg", GOOD)), FOR_GOOD),
    "with another format": (packed(("1.jpg", PAGES[0]), ("2.jpg", b"\x89PNG\r\n\x1a\n")), FOR_GOOD),
    "with an error page": (packed(("1.jpg", b"<html>502</html>")), FOR_GOOD),
    "with what is no page": (packed(("1.jpg", PAGES[0]), ("__MACOSX/._1.jpg", b"\0\5\x16\7")), FOR_GOOD),
    "cut": (GOOD[:-30], DAMAGED),
    "no archive": (b"PK\3\4" + bytes(100), DAMAGED),
    "short": (b"PK\3\4", DAMAGED),
    "altered": (GOOD.replace(b"page 2", b"page X"), DAMAGED),
    "altered where it is packed": (PACKED[:40] + b"\xff" * 9 + PACKED[49:], DAMAGED),
    "of no UTF-8 names": (set_in_both_headers(GOOD, 6, 0x800).replace(b"page-001", b"\xff\xfe\xfdx-001"), DAMAGED),
    "before its own beginning": (GOOD[50:], DAMAGED),
}


@pytest.mark.parametrize(("body", "how"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("is_large", [False, True], ids=["in memory", "in a file"])
def test_an_archive_that_is_no_archive_of_pages_is_refused(body: bytes, how: str, *, is_large: bool) -> None:
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(program.temporary_file()) if is_large else io.BytesIO()
        file.write(body)
        with pytest.raises(program.InvalidResponse) as refused:
            bodies(file)
        assert (refused.value.code, refused.value.permanent) == ("bad_pages", how == FOR_GOOD)
        assert file.tell() == 0


def test_pages_come_in_the_archive_s_order_whatever_they_are_called() -> None:
    names = ["10.jpg", "2.jpg", "../../etc/passwd", "/abs", "C:\\x", "2.jpg", "a\nb\0c", "ü" * 300]
    files = [(name, wrapped(b"%d" % number, "jpg")) for number, name in enumerate(names)]
    with pytest.warns(UserWarning, match="Duplicate"):
        archive = packed(("a/", b""), *files[:3], ("b/c/", b""), *files[3:])
    body = io.BytesIO(archive)
    assert bodies(body) == [page for _, page in files]
    assert body.tell() == 0
    # A name of no length, and the byte that it had for something else.
    nameless = set_in_both_headers(set_in_both_headers(packed(("x", PAGES[0])), 26, 0), 28, 1)
    assert bodies(nameless) == PAGES[:1]


@pytest.mark.parametrize(
    ("target", "page", "media_type"),
    [("svg", b"<svg/>", "image/svg+xml"), ("txt", b"words", "text/plain"), ("png", b"\x89PNG\r\n\x1a\n", "image/png")],
)
def test_a_page_has_the_media_type_of_the_target(target: str, page: bytes, media_type: str) -> None:
    (found,) = archive_of(packed(("a", page))).unpacked(target)
    assert (found.type, found.size) == (program.FileType(media_type), len(page))


def test_a_bomb_is_counted_while_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    page = wrapped(bytes(600_000), "jpg")
    archive = packed(("1.jpg", page), ("2.jpg", page))
    monkeypatch.setattr(program, "UNPACKED_BYTES", 2 * len(page))
    assert bodies(archive) == [page, page]
    monkeypatch.setattr(program, "UNPACKED_BYTES", 2 * len(page) - 1)
    with pytest.raises(program.InvalidResponse, match=r"more than 1\.2 MB") as refused:
        bodies(archive)
    assert refused.value.permanent


def test_so_many_pages_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "MAX_PAGES", 3)
    assert bodies(GOOD) == PAGES
    monkeypatch.setattr(program, "MAX_PAGES", 2)
    with pytest.raises(program.InvalidResponse, match="it has 3 pages") as refused:
        bodies(GOOD)
    assert refused.value.permanent


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that Python has held at a time, in addition."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_neither_a_large_page_nor_a_long_table_of_contents_is_held_in_memory() -> None:
    page = wrapped(bytes(50_000_000), "jpg")
    with program.temporary_file() as body:
        body.write(packed(("1.jpg", page)))
        assert peak_of(lambda: [each.size for each in archive_of(body).unpacked("jpg")]) < 3_000_000
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    contents = entry * 400_000
    with program.temporary_file() as body:
        body.write(contents + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, len(contents), 0, 0))

        def refuse() -> None:
            with pytest.raises(program.InvalidResponse, match="table of contents is too long"):
                bodies(body)

        assert peak_of(refuse) < 3_000_000


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.sampled_from([GOOD, packed(*((f"{number}.jpg", page) for number, page in enumerate(PAGES)))]),
    st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=8)), max_size=4),
    st.integers(0, 2000),
)
def test_whatever_is_altered_in_an_archive_no_altered_page_comes_out(
    archive: bytes, changes: Sequence[tuple[int, bytes]], length: int
) -> None:
    changed = bytearray(archive)
    for start, put in changes:
        place = start % len(changed)
        changed[place : place + len(put)] = put
    with contextlib.suppress(program.InvalidResponse):
        assert set(bodies(bytes(changed[: length or None]))) <= set(PAGES)
