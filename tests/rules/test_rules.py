"""The pure rules: what is paid for, what is stored and what is said, a table for each."""

from __future__ import annotations

import gzip
import math
import mimetypes
import re
import time
import zlib
from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import s3_bulk_convert as program
from s3_bulk_convert import ErrorAction

NOW = 1_790_000_000.0
LISTED = "2026-09-21T14:13:20.000Z"  # the same moment, as S3 writes it
LATER = "2026-09-21T14:13:21.000Z"
SOURCE = program.SourceObject("photos/a.heic", "0cc175b9c0f1b6a831c399e269772661", 1234, LISTED)
DEFAULT_TEMPLATE = "converted/{dir}{stem}.{target}"
KEYS = st.text(
    alphabet=st.one_of(st.sampled_from("{}./%\n ae+"), st.characters(exclude_categories=["Cs"])), max_size=40
)


def job(template: str = DEFAULT_TEMPLATE, **options: Any) -> program.Job:
    """The job named default, to jpg if nothing else is said."""
    return program.Job(**{"target": "jpg", "output_key": template, **options})


########################################################################
# Keys
########################################################################


@pytest.mark.parametrize(
    ("key", "folder", "name", "stem", "ext"),
    [
        ("a.png", "", "a.png", "a", "png"),
        ("photos/2024/a.HEIC", "photos/2024/", "a.HEIC", "a", "HEIC"),
        ("a.tar.gz", "", "a.tar.gz", "a.tar", "gz"),
        ("no extension", "", "no extension", "no extension", ""),
        ("v1.2 final", "", "v1.2 final", "v1.2 final", ""),
        (".hidden", "", ".hidden", ".hidden", ""),
        ("ends with dot.", "", "ends with dot.", "ends with dot.", ""),
        ("folder.d/file", "folder.d/", "file", "file", ""),
        ("/leading.png", "/", "leading.png", "leading", "png"),
        ("a//b.png", "a//", "b.png", "b", "png"),
        ("up/../b.png", "up/../", "b.png", "b", "png"),
        ("folder/", "folder/", "", "", ""),
        ("..png", "", "..png", ".", "png"),
        ("line\nbreak.png", "", "line\nbreak.png", "line\nbreak", "png"),
        ("a.png\n", "", "a.png\n", "a.png\n", ""),
        ("日本/😀.png", "日本/", "😀.png", "😀", "png"),
        ("a.übung", "", "a.übung", "a.übung", ""),
        ("a.tenletters", "", "a.tenletters", "a", "tenletters"),
        ("a.elevenchars", "", "a.elevenchars", "a.elevenchars", ""),
        ("{stem}.{ext}", "", "{stem}.{ext}", "{stem}.{ext}", ""),
    ],
)
def test_a_key_is_taken_apart_as_text(key: str, folder: str, name: str, stem: str, ext: str) -> None:
    assert program.KeyParts.of(key) == program.KeyParts(key, folder, name, stem, ext)


@given(KEYS)
def test_the_parts_of_a_key_make_up_the_key(key: str) -> None:
    parts = program.KeyParts.of(key)
    assert parts.folder + parts.name == key
    assert parts.name == (f"{parts.stem}.{parts.ext}" if parts.ext else parts.stem)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a.png", "png"),
        ("a.HEIC", "heic"),
        ("a.JPEG", "jpeg"),
        ("archive.tar.gz", "gz"),
        ("README", ""),
        (".png", ""),
        ("folder.png/", ""),
    ],
)
def test_the_source_format_is_the_extension_in_lower_case(key: str, expected: str) -> None:
    assert program.KeyParts.of(key).ext.lower() == expected


@pytest.mark.parametrize(
    ("template", "key", "expected"),
    [
        (DEFAULT_TEMPLATE, "photos/a.heic", "converted/photos/a.jpg"),
        (DEFAULT_TEMPLATE, "a.heic", "converted/a.jpg"),
        (DEFAULT_TEMPLATE, "README", "converted/README.jpg"),
        (DEFAULT_TEMPLATE, "/lead//a.b.png", "converted//lead//a.b.jpg"),
        (DEFAULT_TEMPLATE, "up/../a.png", "converted/up/../a.jpg"),
        (DEFAULT_TEMPLATE, "100% +?#.png", "converted/100% +?#.jpg"),
        (DEFAULT_TEMPLATE, "{key}/{job}.png", "converted/{key}/{job}.jpg"),
        (DEFAULT_TEMPLATE, "{0}{}{{.png", "converted/{0}{}{{.jpg"),
        (DEFAULT_TEMPLATE, r"\1\g<0>.png", r"converted/\1\g<0>.jpg"),
        (DEFAULT_TEMPLATE, "line\nbreak.png", "converted/line\nbreak.jpg"),
        ("{key}.{target}", "photos/a.heic", "photos/a.heic.jpg"),
        ("out/{name}", "photos/a.heic", "out/a.heic"),
        ("{dir}{stem}-{ext}.{target}", "photos/a.HEIC", "photos/a-HEIC.jpg"),
        ("{job}/{stem}", "a.png", "default/a"),
        ("50%/{stem}%s%(x)s", "a.png", "50%/a%s%(x)s"),
    ],
)
def test_an_output_key_fills_in_the_template_and_nothing_else(template: str, key: str, expected: str) -> None:
    assert job(template).output_of(key) == expected


TEMPLATE_PARTS = st.lists(
    st.one_of(
        st.sampled_from(("key", "dir", "name", "stem", "ext", "target", "job")).map("{{{}}}".format),
        st.text(alphabet="ab/%.\\", max_size=4),
    ),
    min_size=1,
    max_size=6,
)


@given(TEMPLATE_PARTS, KEYS)
def test_braces_in_a_key_are_never_interpreted(template: list[str], key: str) -> None:
    parts = program.KeyParts.of(key)
    values = {"key": key, "dir": parts.folder, "name": parts.name, "stem": parts.stem, "ext": parts.ext}
    values |= {"target": "jpg", "job": "default"}
    expected = "".join(values[part[1:-1]] if part.startswith("{") else part for part in template)
    assert job("".join(template)).output_of(key) == expected


@pytest.mark.parametrize(
    ("planned", "slot"),
    [("a.jpg", "a.jpg"), ("a.jpg.zip", "a.jpg"), ("a.zip", "a"), ("zip", "zip"), ("a.zip/b.jpg", "a.zip/b.jpg")],
)
def test_an_archive_of_pages_has_the_slot_of_the_key_that_was_planned(planned: str, slot: str) -> None:
    assert program.KeyParts.slot_of(planned) == slot


@pytest.mark.parametrize(
    ("planned", "number", "count", "expected"),
    [
        ("p/a.jpg", 1, 1, "p/a/001.jpg"),
        ("p/a.jpg", 12, 999, "p/a/012.jpg"),
        ("p/a.jpg", 12, 1000, "p/a/0012.jpg"),
        ("p/a.jpg", 10_000, 10_000, "p/a/10000.jpg"),
        # Only what is the target's is taken away: of what has other endings, each keeps its own.
        ("p/a.pdf", 2, 3, "p/a.pdf/002.jpg"),
        ("p/a", 2, 3, "p/a/002.jpg"),
        ("a.jpg.jpg", 2, 3, "a.jpg/002.jpg"),
    ],
)
def test_pages_lie_below_the_planned_key(planned: str, number: int, count: int, expected: str) -> None:
    assert program.KeyParts.page_key(planned, "jpg", number, count) == expected


@given(KEYS.filter(bool), st.integers(1, 10_000), st.sampled_from(("jpg", "png", "7z")))
def test_pages_sort_as_they_are_numbered(planned: str, count: int, target: str) -> None:
    keys = [program.KeyParts.page_key(planned, target, number, count) for number in range(1, count + 1)]
    assert keys == sorted(set(keys))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a/../b.png", True),
        ("../b.png", True),
        ("./b.png", True),
        ("a/.", True),
        ("..", True),
        (".", True),
        ("a..b/c.png", False),
        (".../c.png", False),
        (".hidden/c.png", False),
        ("a//b", False),
        ("%2e%2e/b", False),
    ],
)
def test_a_key_with_dot_segments_is_recognised(key: str, *, expected: bool) -> None:
    assert program.KeyParts.of(key).has_dot_segments is expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("photos/a.heic", "a.heic"),
        ("photos/My picture (1).HEIC", "My_picture_1_.HEIC"),
        ("日本.png", "_.png"),
        ('quo"te\r\n.png', "quo_te_.png"),
        ("a.tar.gz", "a.tar.gz"),
        ("README", "README"),
        ("folder/", "file"),
        ("k" * 1000 + ".png", "k" * 60 + ".png"),
    ],
)
def test_an_upload_gets_a_plain_file_name_with_its_extension(key: str, expected: str) -> None:
    assert program.KeyParts.of(key).upload_filename == expected


@given(KEYS)
def test_every_upload_name_is_plain_and_tells_the_same_format(key: str) -> None:
    name = program.KeyParts.of(key).upload_filename
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,71}", name)
    assert program.KeyParts.of(name).ext.lower() == program.KeyParts.of(key).ext.lower()


########################################################################
# Packed bodies
########################################################################

TEXT = b"what is packed " * 100
PACKED = gzip.compress(TEXT)


@pytest.mark.parametrize("piece_bytes", [1, 7, 4096])
@pytest.mark.parametrize(
    ("packed", "plain"),
    [
        pytest.param(PACKED, TEXT, id="gzip"),
        pytest.param(zlib.compress(TEXT), TEXT, id="deflate"),
        pytest.param(PACKED + PACKED, TEXT + TEXT, id="in two parts"),
        pytest.param(PACKED + bytes(512), TEXT, id="with zeros behind it, as tar writes them"),
        pytest.param(gzip.compress(b""), b"", id="of nothing"),
        pytest.param(PACKED[:-1], EOFError, id="cut"),
        pytest.param(PACKED + PACKED[:-1], EOFError, id="cut in its second part"),
        pytest.param(b"", EOFError, id="cut at once"),
        pytest.param(PACKED[:-8] + bytes(8), zlib.error, id="spoilt"),
        pytest.param(PACKED + b"more", zlib.error, id="with something else behind it"),
        pytest.param(TEXT, zlib.error, id="not packed"),
    ],
)
def test_what_is_packed_is_unpacked_whole_or_not_at_all(packed: bytes, plain: Any, piece_bytes: int) -> None:
    pieces = (packed[start : start + piece_bytes] for start in range(0, len(packed), piece_bytes))
    if isinstance(plain, bytes):
        assert b"".join(program.inflate(pieces)) == plain
    else:
        with pytest.raises(plain):
            list(program.inflate(pieces))


########################################################################
# The idempotency key
########################################################################


PLACE = "converted/{dir}{stem}.{target}"


def made_key(
    endpoint: str = "https://s3",
    bucket: str = "bucket",
    source: program.SourceObject = SOURCE,
    made: tuple[str, int | None] = ("jpg", None),
    place: str = PLACE,
) -> str:
    """The idempotency key of a conversion; all that is not given is as usual."""
    task = program.Task("default", "", source, *made, "converted/photos/a.jpg")
    return program.idempotency_key(endpoint, bucket, task, place)


def test_the_idempotency_key_of_a_version_never_changes() -> None:
    # Another value here means that a run after an update pays again for what an interrupted one has sent.
    assert made_key() == "4f9efd9850e4f776ca6f7c067b8e9dd3"


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(made_key(endpoint="https://minio"), id="endpoint"),
        pytest.param(made_key(bucket="other"), id="bucket"),
        pytest.param(made_key(source=SOURCE._replace(key="photos/b.heic")), id="key"),
        pytest.param(made_key(source=SOURCE._replace(version="f" * 32)), id="version"),
        pytest.param(made_key(source=SOURCE._replace(size=1235)), id="size"),
        pytest.param(
            made_key(source=SOURCE._replace(last_modified=LATER)), id="time: put back while the API fetched it"
        ),
        pytest.param(made_key(made=("png", None)), id="target"),
        pytest.param(made_key(made=("jpg", 80)), id="quality"),
        pytest.param(made_key(place="elsewhere/{key}.{target}"), id="place"),
        pytest.param(made_key(bucket="bucketphotos", source=SOURCE._replace(key="/a.heic")), id="border"),
    ],
)
def test_each_component_changes_the_idempotency_key(other: str) -> None:
    assert other != made_key()


@given(KEYS, st.text(max_size=40), st.integers(0, 5 * 10**9), st.none() | st.integers(1, 100))
def test_every_idempotency_key_is_one_that_the_api_takes(key: str, etag: str, size: int, quality: int | None) -> None:
    made = made_key(source=SOURCE._replace(key=key, version=etag, size=size), made=("jpg", quality))
    # Successors get a few characters more, of 128.
    assert re.fullmatch(r"[A-Za-z0-9._:+/-]{1,100}", made)


########################################################################
# What a job wants
########################################################################


@pytest.mark.parametrize(
    ("globs", "key", "expected"),
    [
        ("*.heic", "photos/a.heic", True),
        ("*.heic", "photos/A.HEIC", True),
        ("*.HEIC", "a.heic", True),
        ("*.heic", "a.heic/b.png", False),
        ("*.heic *.png", "a.png", True),
        ("*.heic", "a.heic.bak", False),
        ("img_????.png", "x/IMG_0001.png", True),
        ("img_????.png", "x/IMG_00001.png", False),
        ("[ab]*.png", "b1.png", True),
        ("[!ab]*.png", "b1.png", False),
        ("photos/*.png", "photos/a.png", True),
        ("photos/*.png", "photos/2024/a.png", True),
        ("photos/*.png", "my/photos/a.png", False),
        ("PHOTOS/*", "photos/a.png", True),
        ("photos", "photos/a.png", False),
        ("**/*.png", "a.png", True),
        ("**/*.png", "x/y/a.png", True),
        ("**/a.png", "xa.png", False),
        ("x/**/a.png", "x/a.png", True),
        ("x/**/a.png", "x/y/z/a.png", True),
        ("x/**/a.png", "xy/a.png", False),
        ("x/**/y/**/a.png", "x/y/a.png", True),
        ("x**/a.png", "x/a.png", True),
        ("x/**", "x/y/a.png", True),
        ("*", "line\nbreak", True),
        ("*.png", "line\nbreak.png", True),
        ("*.png", "a.png\n", False),
        ("é*", "É.png", True),
        ("a.png|b", "b", False),
        ("", "a.png", False),
    ],
)
def test_globs_match_names_or_with_a_slash_whole_keys(globs: str, key: str, *, expected: bool) -> None:
    assert bool(program.Job.globs_pattern(globs.split()).match(key)) is expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, True, id="no filter"),
        pytest.param({"include": ("*.png",)}, False, id="not included"),
        pytest.param({"include": ("*.png", "*.heic")}, True, id="one glob of two"),
        pytest.param({"exclude": ("a.*",)}, False, id="excluded"),
        pytest.param({"include": ("*.heic",), "exclude": ("photos/*",)}, False, id="exclude beats include"),
        pytest.param({"min_size": 1234}, True, id="exactly the least"),
        pytest.param({"min_size": 1235}, False, id="too small"),
        pytest.param({"max_size": 1234}, True, id="exactly the most"),
        pytest.param({"max_size": 1233}, False, id="too large"),
        pytest.param({"max_size": 0}, False, id="a limit of nothing"),
        pytest.param({"newer_than": 60.0}, True, id="new enough"),
        pytest.param({"newer_than": 59.0}, False, id="too old"),
        pytest.param({"older_than": 60.0}, True, id="old enough"),
        pytest.param({"older_than": 61.0}, False, id="too new"),
    ],
)
def test_a_job_wants_what_passes_all_its_filters(options: dict[str, Any], *, expected: bool) -> None:
    assert job(**options, now=NOW + 60).wants(SOURCE) is expected


########################################################################
# What an answer is
########################################################################

# Beginnings of files as programs write them, written down apart from the program's own table.
HEADS: dict[str, list[bytes]] = {
    "jpg": [b"\xff\xd8\xff\xe0\x00\x10JFIF", b"\xff\xd8\xff\xe1\x00\x10Exif", b"\xff\xd8\xff\xdb"],
    **{kind: [b"\xff\xd8\xff\xe0\x00\x10JFIF"] for kind in ("jfif", "jif", "jfi", "pjpeg", "pjp")},
    "png": [b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"],
    "apng": [b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"],
    "ai": [b"%PDF-1.6\n", b"%!PS-Adobe-3.0\n"],
    "gif": [b"GIF87a\x01\x00", b"GIF89a\x01\x00"],
    "webp": [b"RIFF\x24\x00\x00\x00WEBPVP8 "],
    "avif": [b"\x00\x00\x00\x20ftypavif\x00\x00", b"\x00\x00\x00\x2cftypavis\x00\x00"],
    "heic": [
        b"\x00\x00\x00\x18ftypheic\x00\x00",
        b"\x00\x00\x00\x18ftypheix",
        b"\x00\x00\x00\x18ftyphevc",
        b"\x00\x00\x00\x18ftypmif1",
        b"\x00\x00\x00\x18ftypmsf1",
    ],
    "tiff": [b"II*\x00\x08\x00", b"MM\x00*\x00\x00", b"II+\x00\x08\x00", b"MM\x00+\x00\x08"],
    "bmp": [b"BM\x36\x00\x0c\x00"],
    "ico": [b"\x00\x00\x01\x00\x01\x00\x10\x10"],
    **{kind: [b"%PDF-1.7\n%\xe2\xe3"] for kind in ("pdf", "pdfa")},
    "zip": [b"PK\x03\x04\x14\x00", b"PK\x05\x06" + bytes(18)],
    "gz": [b"\x1f\x8b\x08\x00\x00"],
    "mp4": [b"\x00\x00\x00\x20ftypisom\x00\x00", b"\x00\x00\x00\x18ftypmp42"],
    "mov": [b"\x00\x00\x00\x14ftypqt  \x00\x00", b"\x00\x00\x00\x08wide\x00\x00", b"\x00\x00\x00\x6cmoov\x00\x00"],
    "m4a": [b"\x00\x00\x00\x20ftypM4A \x00\x00"],
    "mp3": [
        b"ID3\x04\x00\x00",
        b"\xff\xfb\x90\x64",
        b"\xff\xfa\x90",
        b"\xff\xf3\x84",
        b"\xff\xf2\x84",
        b"\xff\xe3\x18",
    ],
    "wav": [b"RIFF\x24\x00\x00\x00WAVEfmt ", b"RF64\xff\xff\xff\xffWAVEds64"],
    "avi": [b"RIFF\x24\x00\x00\x00AVI LIST"],
    "flac": [b"fLaC\x00\x00\x00\x22"],
    "ogg": [b"OggS\x00\x02\x00\x00"],
    "webm": [b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81"],
    "mkv": [b"\x1a\x45\xdf\xa3\xa3\x42\x86\x81"],
    "rtf": [b"{\\rtf1\\ansi"],
}
USUAL_TYPES = {
    "jpg": "image/jpeg",
    "png": "image/png",
    "gif": "image/gif",
    "webp": "image/webp",
    "avif": "image/avif",
    "heic": "image/heic",
    "tiff": "image/tiff",
    "pdf": "application/pdf",
    "zip": "application/zip",
    "mp4": "video/mp4",
    "mp3": "audio/mpeg",
    "rtf": "application/rtf",
}
JPEG, PNG, PDF, ZIP = HEADS["jpg"][0], HEADS["png"][0], HEADS["pdf"][0], HEADS["zip"][0]
KMZ = "application/vnd.google-earth.kmz"
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
DOCM = "application/vnd.ms-word.document.macroEnabled.12"
ODG = "application/vnd.oasis.opendocument.graphics"
PAGE = b"<!DOCTYPE html>\n<html><head><title>502 Bad Gateway</title>"
JSON_ERROR = b'{"error": {"code": "service_unavailable", "message": "the engine is down"}}'


def test_there_is_a_sample_for_every_signature() -> None:
    unproved = {
        (kind, offset, magic)
        for kind, signatures in program.SIGNATURES.items()
        for offset, magic in signatures
        if not any(head[offset:].startswith(magic) for head in HEADS["zip" if kind in program.ZIP_BASED else kind])
    }
    # Beginnings of QuickTime files that no common program writes any more.
    assert unproved <= {("mov", 4, b"free"), ("mov", 4, b"mdat")}


@pytest.mark.parametrize(("target", "head"), [(kind, head) for kind, heads in HEADS.items() for head in heads])
def test_a_file_that_begins_as_the_target_does_is_taken(target: str, head: bytes) -> None:
    identity = program.FileType.identify(target, USUAL_TYPES.get(target, ""), "", head)
    assert identity.suffix == ""
    assert identity.media_type == USUAL_TYPES.get(target, identity.media_type)


@pytest.mark.parametrize("target", [kind for kind in HEADS if kind != "zip"])
@pytest.mark.parametrize(
    "head", [b"\x00" * 64, b"x", b"", b"plain words, no file"], ids=["zeros", "x", "empty", "text"]
)
def test_a_body_that_does_not_begin_as_the_target_does_is_refused(target: str, head: bytes) -> None:
    with pytest.raises(program.InvalidResponse) as refused:
        program.FileType.identify(target, program.FileType.media_type_of(target), "", head)
    assert (refused.value.code, refused.value.permanent) == ("wrong_type", True)


@pytest.mark.parametrize(
    ("target", "media_type", "disposition", "head", "expected_type"),
    [
        pytest.param("jpg", "image/jpeg", "", JPEG, "image/jpeg", id="plain"),
        pytest.param("jpeg", "image/jpeg", "", JPEG, "image/jpeg", id="alias"),
        pytest.param("jpg", "IMAGE/JPEG", "", JPEG, "IMAGE/JPEG", id="upper case"),
        pytest.param("jpg", "image/jpeg; charset=binary", "", JPEG, "image/jpeg", id="parameter dropped"),
        pytest.param("jpg", "", "", JPEG, "image/jpeg", id="no type"),
        pytest.param("jpg", "application/octet-stream", "", JPEG, "image/jpeg", id="octet-stream"),
        pytest.param("jpg", "binary/octet-stream", "", JPEG, "image/jpeg", id="binary octet-stream"),
        pytest.param("jpg", "image/png", "", JPEG, "image/jpeg", id="header says png, bytes say jpg"),
        pytest.param("png", "application/pdf", "", PNG, "image/png", id="header says pdf, bytes say png"),
        pytest.param("png", "application/zip", "", PNG, "image/png", id="header says zip, bytes say png"),
        pytest.param("png", "image/png", "attachment; filename=x.zip", PNG, "image/png", id="name says zip, bytes not"),
        pytest.param("png", DOCX, "", PNG, "image/png", id="header says docx, bytes say png"),
        pytest.param("yml", "text/yaml; charset=utf-8", "", b"a: 1", "text/yaml; charset=utf-8", id="alias of a text"),
        pytest.param("docx", DOCX, "", ZIP, DOCX, id="docx is a zip"),
        pytest.param("docx", "", "attachment; filename=a.docx", ZIP, DOCX, id="docx without a type"),
        pytest.param("zip", "application/zip", "", ZIP, "application/zip", id="target zip"),
        pytest.param("csv", "text/csv", "", b"a,b\n1,2\n", "text/csv", id="csv has no signature"),
        pytest.param("txt", "text/plain; charset=utf-8", "", b"hello", "text/plain; charset=utf-8", id="charset kept"),
        pytest.param("html", "text/html; charset=utf-8", "", PAGE, "text/html; charset=utf-8", id="target html"),
        pytest.param("htm", "text/html", "", PAGE, "text/html", id="target htm"),
        pytest.param("json", "application/json", "", b'{"rows": []}', "application/json", id="target json"),
        pytest.param("svg", "image/svg+xml", "", b"<svg xmlns=", "image/svg+xml", id="target svg"),
        pytest.param("md", "text/markdown", "", b"<body> in it", "text/markdown", id="markdown with a tag"),
        pytest.param("jfif", "image/jpeg", "", JPEG, "image/jpeg", id="jfif"),
        pytest.param("apng", "image/apng", "", PNG, "image/apng", id="apng"),
        pytest.param("ai", "application/postscript", "", PDF, "application/postscript", id="ai"),
        pytest.param("geojson", "application/geo+json", "", b'{"type"', "application/geo+json", id="geojson"),
        pytest.param("geojson", "application/json", "", b'{"type"', "application/json", id="geojson as json"),
        pytest.param("ndjson", "application/x-ndjson", "", b'{"error":1}', "application/x-ndjson", id="ndjson"),
        pytest.param("ipynb", "application/x-ipynb+json", "", b'{"cells"', "application/x-ipynb+json", id="ipynb"),
        pytest.param("har", "application/json", "", b'{"log"', "application/json", id="har"),
        pytest.param("odg", ODG, "", ZIP, ODG, id="odg"),
        pytest.param("docm", DOCM, "", ZIP, DOCM, id="docm"),
        pytest.param("pages", "application/vnd.apple.pages", "", ZIP, "application/vnd.apple.pages", id="pages"),
        pytest.param(
            "odg", "application/octet-stream", "", ZIP, program.FileType.media_type_of("odg"), id="odg as bytes"
        ),
        pytest.param("jxl", "image/x-new; q=1", "", b"\xff\x0a", "image/x-new", id="a type that nobody knows"),
    ],
)
def test_a_result_is_stored_under_the_type_that_header_and_bytes_agree_on(
    target: str, media_type: str, disposition: str, head: bytes, expected_type: str
) -> None:
    assert program.FileType.identify(target, media_type, disposition, head) == program.FileType(expected_type)


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without /etc/mime.types, as small containers are."""
    with monkeypatch.context() as patch:
        patch.setattr(mimetypes, "knownfiles", [])
        mimetypes.init()
        yield
    mimetypes.init()


@pytest.mark.usefixtures("bare_machine")
@pytest.mark.parametrize(
    ("target", "media_type", "expected_type"),
    [
        pytest.param("kmz", KMZ, KMZ, id="told"),
        pytest.param("kmz", "", "application/octet-stream", id="not told"),
        pytest.param("kmz", "image/png", "application/octet-stream", id="told wrongly"),
    ],
)
def test_a_type_that_the_machine_does_not_know_is_what_the_api_says(
    target: str, media_type: str, expected_type: str
) -> None:
    assert program.FileType.identify(target, media_type, "", ZIP) == program.FileType(expected_type)


@pytest.mark.parametrize(
    ("target", "media_type", "disposition", "head"),
    [
        pytest.param("jpg", "application/zip", "", ZIP, id="type zip"),
        pytest.param("jpg", "application/zip; x=y", "", ZIP, id="type with a parameter"),
        pytest.param("jpg", "application/octet-stream", "", ZIP, id="octet-stream"),
        pytest.param("jpg", "", "", ZIP, id="no type"),
        pytest.param("png", "image/png", 'attachment; filename="pages.zip"', ZIP, id="only the name says it"),
        pytest.param("png", "image/png", "attachment; filename=PAGES.ZIP", ZIP, id="name in capitals"),
        pytest.param("csv", "application/zip", "", ZIP, id="sheets to csv"),
    ],
)
def test_an_archive_of_pages_is_stored_as_a_zip(target: str, media_type: str, disposition: str, head: bytes) -> None:
    expected = program.FileType("application/zip", ".zip")
    assert program.FileType.identify(target, media_type, disposition, head) == expected


@pytest.mark.parametrize(
    ("target", "media_type", "head", "code"),
    [
        pytest.param("jpg", "text/html", PAGE, "html_answer", id="html for jpg"),
        pytest.param("jpg", "text/html; charset=utf-8", b"oops", "html_answer", id="html by its type alone"),
        pytest.param("jpg", "image/jpeg", PAGE, "html_answer", id="html that says it is jpeg"),
        pytest.param("jpg", "", b"\xef\xbb\xbf \n<HTML>", "html_answer", id="html behind a byte order mark"),
        pytest.param("csv", "text/csv", b"<html lang=en>", "html_answer", id="html that says it is csv"),
        pytest.param("csv", "", b"\r\n<head>", "html_answer", id="html without a type"),
        pytest.param("docx", "text/html", PAGE, "html_answer", id="html for docx"),
        pytest.param("svg", "text/html", PAGE, "html_answer", id="html for svg"),
        pytest.param("md", "text/html", PAGE, "html_answer", id="html for markdown"),
        pytest.param("txt", "text/html; charset=utf-8", PAGE, "html_answer", id="html for txt"),
        pytest.param("jpg", "application/json", b'{"job_id": "1"}', "json_answer", id="json for jpg"),
        pytest.param("csv", "application/json; charset=utf-8", JSON_ERROR, "json_answer", id="json for csv"),
        pytest.param("txt", "application/json", b"{}", "json_answer", id="json for txt"),
        pytest.param("txt", "text/json", b"{}", "json_answer", id="json as text for txt"),
        pytest.param("geojson", "application/json", JSON_ERROR, "json_answer", id="json error for geojson"),
        pytest.param("xyz", "application/x-xyz", ZIP, "wrong_type", id="zip for a format that nobody knows"),
        pytest.param("sxw", "application/vnd.sun.xml.writer", PNG, "wrong_type", id="png for an old Writer's format"),
        pytest.param("csv", "application/problem+json", JSON_ERROR, "json_answer", id="problem json for csv"),
        pytest.param("csv", "text/plain", JSON_ERROR, "json_answer", id="json error that says it is text"),
        pytest.param("md", "", JSON_ERROR, "json_answer", id="json error without a type"),
        pytest.param("jpg", "image/png", PNG, "wrong_type", id="png for jpg"),
        pytest.param("jpg", "image/jpeg", PDF, "wrong_type", id="pdf that says it is jpeg"),
        pytest.param("jpg", "image/jpeg", ZIP, "wrong_type", id="zip that says it is jpeg"),
        pytest.param("docx", DOCX, PDF, "wrong_type", id="pdf for docx"),
        pytest.param("csv", "text/csv", PNG, "wrong_type", id="png for csv"),
        pytest.param("txt", "text/plain", PDF, "wrong_type", id="pdf for txt"),
        pytest.param("mp4", "image/heic", HEADS["heic"][0], "wrong_type", id="heic for mp4"),
        pytest.param("m4a", "image/avif", HEADS["avif"][0], "wrong_type", id="avif for m4a"),
    ],
)
def test_an_answer_that_cannot_be_the_target_is_refused(target: str, media_type: str, head: bytes, code: str) -> None:
    with pytest.raises(program.InvalidResponse) as refused:
        program.FileType.identify(target, media_type, "attachment; filename=converted.bin", head)
    assert refused.value.code == code


########################################################################
# What an error means
########################################################################


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "bad_request", ErrorAction.REJECT),
        (400, "", ErrorAction.FAIL),
        (401, "invalid_api_key", ErrorAction.STOP_RUN),
        (401, "", ErrorAction.FAIL),
        (402, "payment_required", ErrorAction.FAIL),
        (403, "", ErrorAction.FAIL),
        (403, "forbidden", ErrorAction.FAIL),
        (403, "quota_exceeded", ErrorAction.STOP_RUN),
        (407, "", ErrorAction.STOP_RUN),
        (404, "not_found", ErrorAction.FAIL),
        (405, "no such thing", ErrorAction.FAIL),
        (409, "bad_request", ErrorAction.WAIT),
        (409, "", ErrorAction.WAIT),
        (413, "file_too_large", ErrorAction.REJECT),
        (413, "", ErrorAction.FAIL),
        (422, "unsupported_route", ErrorAction.REJECT),
        (422, "bad_request", ErrorAction.NEW_KEY),
        (422, "corrupt_input", ErrorAction.REJECT),
        (422, "two\nlines", ErrorAction.REJECT),
        (422, "", ErrorAction.FAIL),
        (429, "rate_limited", ErrorAction.WAIT),
        (429, "quota_exceeded", ErrorAction.STOP_RUN),
        (429, "", ErrorAction.WAIT),
        (500, "", ErrorAction.RETRY),
        (502, "service_unavailable", ErrorAction.RETRY),
        (503, "", ErrorAction.RETRY),
        (504, "", ErrorAction.RETRY),
        (599, "no such thing", ErrorAction.RETRY),
        (999, "", ErrorAction.RETRY),
        (204, "", ErrorAction.RETRY),
        (408, "", ErrorAction.RETRY),
        (425, "too_early", ErrorAction.RETRY),
        (418, "teapot", ErrorAction.REJECT),
        (301, "", ErrorAction.FAIL),
        (302, "", ErrorAction.FAIL),
        (307, "moved", ErrorAction.FAIL),
    ],
)
def test_an_error_reply_is_judged_as_the_contract_says(status: int, code: str, expected: ErrorAction) -> None:
    assert ErrorAction.choose(program.CONVERSION_RULES, status, code) is expected


@pytest.mark.parametrize(
    ("status", "code", "of_a_job", "of_a_result"),
    [
        (204, "", ErrorAction.RETRY, ErrorAction.RETRY),
        (302, "", ErrorAction.RETRY, ErrorAction.FAIL),
        (400, "bad_request", ErrorAction.RETRY, ErrorAction.FAIL),
        (401, "invalid_api_key", ErrorAction.STOP_RUN, ErrorAction.FAIL),
        (403, "forbidden", ErrorAction.STOP_RUN, ErrorAction.FAIL),
        (403, "quota_exceeded", ErrorAction.STOP_RUN, ErrorAction.FAIL),
        # A gateway's page is about this question, and not about the job, the key or the address.
        (401, "", ErrorAction.RETRY, ErrorAction.FAIL),
        (403, "", ErrorAction.RETRY, ErrorAction.FAIL),
        (404, "", ErrorAction.RETRY, ErrorAction.FAIL),
        (404, "bad_request", ErrorAction.RETRY, ErrorAction.FAIL),
        (404, "not_found", ErrorAction.REJECT, ErrorAction.FAIL),
        (410, "not_found", ErrorAction.REJECT, ErrorAction.FAIL),
        (408, "", ErrorAction.RETRY, ErrorAction.RETRY),
        (409, "", ErrorAction.RETRY, ErrorAction.FAIL),
        (422, "bad_request", ErrorAction.RETRY, ErrorAction.FAIL),
        (425, "", ErrorAction.RETRY, ErrorAction.RETRY),
        (429, "rate_limited", ErrorAction.WAIT, ErrorAction.WAIT),
        (429, "quota_exceeded", ErrorAction.STOP_RUN, ErrorAction.WAIT),
        (502, "", ErrorAction.RETRY, ErrorAction.RETRY),
    ],
)
def test_a_lost_job_or_a_stale_link_is_that_job_s_alone(
    status: int, code: str, of_a_job: ErrorAction, of_a_result: ErrorAction
) -> None:
    assert ErrorAction.choose(program.POLL_RULES, status, code) is of_a_job
    assert ErrorAction.choose(program.DOWNLOAD_RULES, status, code) is of_a_result


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(JSON_ERROR, ("service_unavailable", "the engine is down"), id="documented"),
        pytest.param(b'{"error": {"code": "x"}}', ("x", ""), id="no message"),
        pytest.param(b'{"error": {"message": "y"}}', ("", "y"), id="no code"),
        pytest.param(b'{"error": {"code": null, "message": null}}', ("", ""), id="nulls"),
        pytest.param(b'{"error": {"code": 7, "message": ["a"]}}', ("7", "['a']"), id="not texts"),
        pytest.param(b'{"error": "broken"}', ("", "broken"), id="error is a text"),
        pytest.param(
            b'{"error": {"code": "\\ud83d", "message": "a\\ud83d\\ude00"}}', ("?", "a\U0001f600"), id="half a pair"
        ),
        pytest.param(b'{"error": null}', ("", ""), id="error is null"),
        pytest.param(b'{"error": []}', ("", ""), id="error is a list"),
        pytest.param(b'{"detail": "x"}', ("", ""), id="another form"),
        pytest.param(b"[1]", ("", ""), id="list"),
        pytest.param(b"null", ("", ""), id="null"),
        pytest.param(b"5", ("", ""), id="number"),
        pytest.param(b"", ("", ""), id="empty"),
        pytest.param(PAGE, ("", ""), id="html"),
        pytest.param(JSON_ERROR[:30], ("", ""), id="cut"),
        pytest.param(b"\xff\xfe\xfa", ("", ""), id="not text"),
        pytest.param(b"[" * 60_000, ("", ""), id="nested too deep"),
        pytest.param(b"\xef\xbb\xbf" + JSON_ERROR, ("service_unavailable", "the engine is down"), id="byte order mark"),
    ],
)
def test_an_error_body_gives_code_and_message_or_nothing(body: bytes, expected: tuple[str, str]) -> None:
    assert program.ApiReply.error(program.ApiReply.parse(body)) == expected


@given(st.binary(max_size=60))
def test_no_error_body_breaks_the_reader(body: bytes) -> None:
    assert all(isinstance(part, str) for part in program.ApiReply.error(program.ApiReply.parse(body)))


@pytest.mark.parametrize(
    ("date", "expected"),
    [
        ("2026-11-24T08:17:00Z", 1_795_508_220.0),
        ("2026-11-24T08:17:00.500+00:00", 1_795_508_220.5),
        pytest.param("2026-11-24T08:17:00", 1_795_508_220.0, id="without a zone"),
        ("2026-11-24T10:17:00+02:00", 1_795_508_220.0),
        ("Tue, 24 Nov 2026 08:17:00 GMT", 1_795_508_220.0),
        ("yesterday", math.nan),
        ("", math.nan),
        ("None", math.nan),
        ("1790000000", math.nan),
        (f"Tue, 24 Nov {10**30} 08:17:00 GMT", math.nan),
    ],
)
def test_a_date_is_read_in_both_ways_of_writing_it(date: str, expected: float) -> None:
    assert program.unix_seconds(date) == pytest.approx(expected, abs=0, nan_ok=True)


@given(st.text(max_size=40))
def test_what_is_no_date_is_before_and_after_nothing(date: str) -> None:
    assert isinstance(program.unix_seconds(date), float)


########################################################################
# Waiting
########################################################################


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        pytest.param(None, None, id="absent"),
        pytest.param("", None, id="empty"),
        pytest.param("0", 0.0, id="zero"),
        pytest.param("7", 7.0, id="seconds"),
        pytest.param(" 7 ", 7.0, id="spaces"),
        pytest.param("1.5", 1.5, id="float"),
        pytest.param("-5", 0.0, id="negative"),
        pytest.param("300", 300.0, id="the most"),
        pytest.param("301", 300.0, id="over the most"),
        pytest.param("9" * 400, 300.0, id="absurd"),
        pytest.param("inf", 300.0, id="infinite"),
        pytest.param("nan", None, id="nan"),
        pytest.param("soon", None, id="malformed"),
        pytest.param("12 seconds", None, id="with a unit"),
        pytest.param(formatdate(NOW + 90, usegmt=True), 90.0, id="date"),
        pytest.param(formatdate(NOW - 90, usegmt=True), 0.0, id="past date"),
        pytest.param("Fri, 31 Dec 9999 23:59:59 GMT", 300.0, id="absurd date"),
        pytest.param("Mon, 99 Foo 2026 25:61:61 GMT", None, id="malformed date"),
    ],
)
def test_retry_after_is_read_leniently_and_capped(header: str | None, expected: float | None) -> None:
    assert program.ApiReply.retry_after_seconds(header, NOW) == expected


def test_a_date_without_a_zone_is_read_as_gmt_on_every_server(monkeypatch: pytest.MonkeyPatch) -> None:
    # The third form of a date that HTTP knows, asctime's, has none.
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        asked = program.ApiReply.retry_after_seconds(time.asctime(time.gmtime(NOW + 90)), NOW)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert asked == 90.0


@pytest.mark.parametrize(("moment", "zone"), [("0001-01-01T00", "America/New_York"), ("9999-12-31T23", "Asia/Tokyo")])
def test_a_time_that_is_in_no_year_of_python_s_here_is_told_in_utc(
    moment: str, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        told = program.iso_time(program.unix_seconds(f"{moment}:00:00Z"))
        assert program.local_date(told).startswith(moment.replace("T", " "))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert told == f"{moment}:00:00+00:00"


@given(st.text(max_size=30) | st.floats().map(str) | st.integers().map(str))
def test_whatever_retry_after_says_the_wait_is_within_bounds(header: str) -> None:
    asked = program.ApiReply.retry_after_seconds(header, NOW)
    assert asked is None or 0 <= asked <= 300


@pytest.mark.parametrize(
    ("attempt", "longest"), [(0, 1), (1, 2), (2, 4), (3, 8), (5, 32), (6, 64), (7, 64), (100, 64), (10**6, 64)]
)
def test_without_retry_after_the_wait_doubles_up_to_64_seconds(attempt: int, longest: float) -> None:
    assert program.backoff(attempt, None, 1.0) == longest
    assert program.backoff(attempt, None, 0.0) == longest / 2


@pytest.mark.parametrize("attempt", [0, 1, 5])
@pytest.mark.parametrize("asked", [0.0, 1.5, 60.0, 300.0])
def test_with_retry_after_the_wait_is_that_and_up_to_half_of_it(attempt: int, asked: float) -> None:
    assert program.backoff(attempt, asked, 0.0) == asked
    assert program.backoff(attempt, asked, 1.0) == asked * 1.5


def test_after_many_waits_a_server_that_says_zero_is_not_believed() -> None:
    assert program.backoff(20, 0.0, 0.0) == 64


@given(st.integers(0, 10**6), st.none() | st.floats(0, 300), st.floats(0, 1))
def test_every_wait_lies_between_what_was_asked_and_an_end(attempt: int, asked: float | None, jitter: float) -> None:
    assert (asked or 0) <= program.backoff(attempt, asked, jitter) <= 450


########################################################################
# Secrets
########################################################################

HIDDEN = "https://b.s3.amazonaws.com/a%20b.png?..."
SIGNATURE = "0123456789abcdef" * 4
SIGNED = f"https://b.s3.amazonaws.com/a%20b.png?X-Amz-Credential=AKIA%2F1&X-Amz-Signature={SIGNATURE}"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        pytest.param("nothing to hide", "nothing to hide", id="plain"),
        pytest.param("key ctf_sk_live_a-B_9 refused", "key ctf_... refused", id="api key"),
        pytest.param("Bearer ctf_sk_abc", "Bearer ctf_...", id="bearer"),
        pytest.param("ctf_photos_2024/a.png", "ctf_photos_2024/a.png", id="a key that begins as an api key does"),
        pytest.param("at h%3FX-Amz-Signature%3Dab%26x", "at h%3FX-Amz-Signature%3D...", id="a URL in a URL"),
        pytest.param(f"GET {SIGNED} failed", f"GET {HIDDEN} failed", id="presigned"),
        pytest.param(f'{{"url": "{SIGNED}"}}', f'{{"url": "{HIDDEN}"}}', id="in json"),
        pytest.param(f"{SIGNED} {SIGNED}", f"{HIDDEN} {HIDDEN}", id="two"),
        pytest.param("url: /b/a?X-Amz-Signature=abc&x=1 (", "url: /b/a?X-Amz-Signature=...&x=1 (", id="without host"),
        pytest.param("x-amz-signature=abc", "x-amz-signature=...", id="in lower case"),
        pytest.param("X-Amz-Security-Token=a%2Fb c", "X-Amz-Security-Token=... c", id="session token"),
        pytest.param("at http://me:p@ss@host:1/x, no", "at http://...@host:1/x, no", id="a password"),
        pytest.param("s3://bucket/me@home", "s3://bucket/me@home", id="a key with an at sign"),
        pytest.param("s3://bucket/a?b.png, no", "s3://bucket/a?b.png, no", id="a key with a question mark in a bucket"),
        pytest.param("at 'sftp://h/x?t=1', no", "at 'sftp://h/x?...', no", id="any scheme"),
        pytest.param("""at "data:a,'b' c", no""", 'at "data:...", no', id="data"),
        pytest.param("Invalid header value b'abc\\ndef'", "Invalid header value b'...", id="a header"),
        pytest.param("(s) in header value: 'abc def'", "(s) in header value: '...", id="requests' header"),
        pytest.param("Credential=AK/x, Signature=ab, no", "Credential=..., Signature=..., no", id="authorization"),
        pytest.param("'X-Amz-Security-Token': b'a/b=', 1", "'X-Amz-Security-Token': b'...', 1", id="token's header"),
        pytest.param("<SessionToken>a/b</", "<SessionToken>...</", id="token in XML"),
        pytest.param("renew the session token: it is over", "renew the session token: it is over", id="of a token"),
        pytest.param("is this it? yes", "is this it? yes", id="a question"),
        pytest.param("see https://changethisfile.com/docs", "see https://changethisfile.com/docs", id="plain url"),
        pytest.param("a.png?size=1 is a key", "a.png?size=1 is a key", id="a key with a question mark"),
    ],
)
def test_secrets_are_taken_out_of_a_message(message: str, expected: str) -> None:
    assert program.redact(message) == expected


def test_a_proxy_s_password_is_taken_out_though_it_is_written_as_no_url_wants_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:SES/AME#x?y@proxy:3128")
    assert program.Trouble.proxy_for("https://api") == "proxy:3128"
    told = program.redact("Failed to parse: 'me:SES' is no host; http://me:SES/AME#x?y@proxy:3128")
    assert ("SES" in told, "AME" in told) == (False, False)
    monkeypatch.setenv("HTTPS_PROXY", "http://me:Winter#2026@proxy:3128")
    assert program.redact("2026-11-29T00:00:00 in/2026/a") == "2026-11-29T00:00:00 in/2026/a"
    assert "2026" not in program.redact("cannot connect to http://me:Winter#2026@proxy:3128")


@given(st.text(max_size=30), st.text(alphabet="abc/%20-.", max_size=20), st.sampled_from(["https://h", "HTTP://h", ""]))
def test_no_signature_outlives_redaction(around: str, key: str, host: str) -> None:
    url = f"{host}/bucket/{key}?X-Amz-Expires=86400&X-Amz-Signature={SIGNATURE}&x-id=GetObject"
    assert SIGNATURE not in program.redact(f"{around}{url}{around}")


@given(st.text(max_size=30), st.text(alphabet="abcXYZ019_-", max_size=40), st.sampled_from(["live", "test", "sk"]))
def test_no_api_key_outlives_redaction(around: str, end: str, kind: str) -> None:
    assert "Secret" not in program.redact(f"{around.replace('S', '')}ctf_{kind}_Secret{end} {around.replace('S', '')}")
