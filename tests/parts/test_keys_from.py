"""Keys from a file: every form comes out as the same keys, and nothing that is cut or damaged looks finished."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote_plus

import pytest

import s3_bulk_convert as program
from s3_bulk_convert import ExitCode, RunError, SourceObject
from tests.runs.test_what_is_converted import ODD_KEYS as CONVERTED_KEYS
from tests.standins.key_files import DATE, SCHEMA, SOURCE, full_row, inventory_rows, write, write_manifest
from tests.standins.test_s3_server import DOTTED_KEYS
from tests.standins.test_s3_server import ODD_KEYS as SERVER_KEYS

if TYPE_CHECKING:
    from tests.standins.program import TestBucket
    from tests.standins.s3_server import S3Server


def inventory_file(directory: Path) -> Path:
    return write(directory / "1.csv", inventory_rows([SOURCE, quote_plus(key, safe="/")] for key in ODD_KEYS))


def make_bucket(name: str = SOURCE, **environment: str) -> program.Bucket:
    """A bucket as the program has it."""
    flags = [part for given in (f"s3.bucket={name}", "convert.target=jpg", "api.key=k") for part in ("--set", given)]
    given = program.read_flags(program.build_parser().parse_args(flags))
    return program.Bucket(program.load_settings(None, environment, given))


@pytest.fixture(scope="module")
def source(s3: S3Server) -> Iterator[program.Bucket]:
    """The program's bucket on the real S3 server, which need not exist; what else is made has its environment, too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment().items():
            patch.setenv(name, value)
        yield make_bucket()


def keys_from(path: Path | str, source: program.Bucket) -> Iterator[list[SourceObject]]:
    """What a file names, by pages, for a run that nobody stops."""
    return program.keys_from(str(path), source, program.StopFlag())


def keys(path: Path | str, source: program.Bucket) -> list[str]:
    """All keys that a file names."""
    return [found.key for page in keys_from(path, source) for found in page]


ODD_KEYS = list(dict.fromkeys([*CONVERTED_KEYS, *SERVER_KEYS, *DOTTED_KEYS]))
LINES = [key for key in ODD_KEYS if "\n" not in key]


def failure(key: str, bucket: str = SOURCE) -> str:
    """A line of a failures file."""
    return json.dumps({"ts": DATE, "bucket": bucket, "key": key, "message": '"sourceBucket": x'}, ensure_ascii=False)


def plain_form(directory: Path) -> Path:
    return write(directory / "keys.txt", "\n".join(LINES))


def plain_form_of_windows(directory: Path) -> Path:
    return write(directory / "keys.gz", "\ufeff" + "\r\n".join(["", *LINES, "", ""]))


def whole_inventory_file(directory: Path) -> Path:
    return write(directory / "1.csv.gz", inventory_rows(map(full_row, ODD_KEYS)))


def manifest_form(directory: Path) -> Path:
    return write_manifest(directory, map(full_row, ODD_KEYS))


def failures_form(directory: Path) -> Path:
    return write(directory / "failures.jsonl", "\n".join([failure("no", "other"), *map(failure, ODD_KEYS)]) + "\n")


FORMS = [plain_form, plain_form_of_windows, inventory_file, whole_inventory_file, manifest_form, failures_form]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_odd_keys_come_through_every_form(form: Callable[[Path], Path], source: program.Bucket, tmp_path: Path) -> None:
    expected = LINES if form in {plain_form, plain_form_of_windows} else ODD_KEYS
    assert keys(form(tmp_path), source) == expected


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_stdin_takes_every_form(
    form: Callable[[Path], Path], source: program.Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = form(tmp_path)
    # The data files of a manifest are looked for from where the program runs.
    monkeypatch.chdir(path.parent)
    # A pipe, which can be read once.
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE, text=True) as shown:
        monkeypatch.setattr(sys, "stdin", shown.stdout)
        assert keys("-", source) == keys(path, source)


def test_plain_keys_are_taken_verbatim(source: program.Bucket, tmp_path: Path) -> None:
    given = ["a+b%20c.png", ' "quoted" ', "{braces}", "bucket,key", "{", "[1]", '"', "a\x0bb\x85c\u2028d"]
    assert keys(write(tmp_path / "keys", "\n".join(given)), source) == given


def test_pages_are_bounded_and_name_a_key_once(source: program.Bucket, tmp_path: Path) -> None:
    path = write(tmp_path / "keys", "".join(f"k{number // 2}\n" for number in range(5_000)))
    pages = list(keys_from(path, source))
    assert [len(page) for page in pages] == [500] * 5
    assert [found for page in pages for found in page] == [
        SourceObject(f"k{number}", "", 0, "") for number in range(2_500)
    ]


def test_a_key_is_not_named_again_while_it_may_be_at_work(
    source: program.Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "KEYS_REMEMBERED", 1_000)
    lines = [*range(1_000), *range(1_000), *range(1_000, 2_000), 0]
    path = write(tmp_path / "keys", "".join(f"k{number}\n" for number in lines))
    assert [len(page) for page in keys_from(path, source)] == [1_000, 0, 1_000, 1]


def test_an_empty_file_names_nothing(source: program.Bucket, tmp_path: Path) -> None:
    assert list(keys_from(write(tmp_path / "none.csv.gz", ""), source)) == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(
    source: program.Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "KEYS_REMEMBERED", 1_000)
    path = write(tmp_path / "keys.gz", "".join(f"folder/{number:060}.png\n" for number in range(100_000)))
    tracemalloc.start()
    for page in keys_from(path, source):
        assert len(page) == program.PAGE_KEYS
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_failures_of_this_very_run_are_not_read_again(source: program.Bucket, tmp_path: Path) -> None:
    path = write(tmp_path / "failures.jsonl", "".join(failure(f"k{number}") + "\n" for number in range(1_500)))
    pages = 0
    for page in itertools.islice(keys_from(path, source), 5):
        pages += 1
        with path.open("a", encoding="utf-8") as lines:
            lines.writelines(failure(found.key) + "\n" for found in page)
    assert pages == 2


@contextlib.contextmanager
def ends_with(code: ExitCode, said: str) -> Iterator[pytest.ExceptionInfo[RunError]]:
    """A block that ends with an error that has this exit code, a message and a hint."""
    with pytest.raises(RunError, match=said) as ended:
        yield ended
    assert (ended.value.exit_code, bool(ended.value.hint)) == (code, True)


########################################################################
# S3 Inventory
########################################################################


def test_an_inventory_gives_the_newest_versions_and_nothing_else_that_may_be_old(
    source: program.Bucket, tmp_path: Path
) -> None:
    rows = [
        full_row("a b+c.png"),
        full_row("old.png", latest="false"),
        full_row("gone.png", deleted="true"),
        full_row("cold.png", storage="DEEP_ARCHIVE"),
    ]
    [page] = keys_from(write_manifest(tmp_path, rows), source)
    assert page == [SourceObject("a b+c.png", "e1"), SourceObject("cold.png", "e1")]


def test_a_row_of_an_inventory_without_an_etag_is_a_plain_key(source: program.Bucket, tmp_path: Path) -> None:
    kept = [number for number, column in enumerate(SCHEMA.split(", ")) if column != "ETag"]
    rows = [[row[number] for number in kept] for row in [full_row("a.png")]]
    schema = ", ".join(SCHEMA.split(", ")[number] for number in kept)
    [page] = keys_from(write_manifest(tmp_path, rows, fileSchema=schema), source)
    assert page == [SourceObject("a.png", "", 0, "")]


@pytest.mark.parametrize("root", ["", "inv", "inv/bucket", "inv/bucket/daily"])
def test_an_inventory_is_found_whatever_folder_was_copied(root: str, source: program.Bucket, tmp_path: Path) -> None:
    write_manifest(tmp_path, [full_row("a.png")])
    copied = tmp_path / root
    moved = copied.rename(tmp_path.parent / f"{tmp_path.name}-copied")
    [manifest] = moved.rglob("manifest.json")
    assert keys(manifest, source) == ["a.png"]


def test_an_inventory_is_found_beside_its_manifest(
    source: program.Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_manifest(tmp_path, [full_row("a.png")])
    [part] = tmp_path.rglob("*.csv.gz")
    part.rename(manifest.with_name(part.name))
    monkeypatch.chdir(manifest.parent)
    assert keys("manifest.json", source) == ["a.png"]


@pytest.mark.parametrize("is_local", [True, False])
def test_an_inventory_is_read_from_its_bucket(
    *, is_local: bool, bucket: TestBucket, source: program.Bucket, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path, map(full_row, ODD_KEYS), destinationBucket=f"arn:aws:s3:::{bucket.name}")
    [part] = tmp_path.rglob("*.csv.gz")
    bucket.put("inv/bucket/daily/data/1.csv.gz", part.read_bytes())
    bucket.put("inv/manifest.json", manifest.read_bytes())
    part.unlink()
    assert keys(manifest if is_local else f"s3://{bucket.name}/inv/manifest.json", source) == ODD_KEYS


def test_a_damaged_inventory_gives_no_key(source: program.Bucket, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, [full_row(f"{number}") for number in range(3_000)])
    [part] = tmp_path.rglob("*.csv.gz")
    write(part, inventory_rows([full_row(f"{number}") for number in range(2_000)]))
    with ends_with(ExitCode.USAGE, r"1.csv.gz is damaged"):
        next(keys_from(manifest, source))


def test_an_inventory_that_is_not_there_ends_the_run(source: program.Bucket, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, [])
    [part] = tmp_path.rglob("*.csv.gz")
    part.unlink()
    with ends_with(ExitCode.USAGE, r"S3 refused reading s3://inventories/inv/bucket/daily/data/1.csv.gz"):
        keys(manifest, source)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sourceBucket": "other"}, "an inventory of the bucket other, not of bucket"),
        ({"fileFormat": "ORC", "fileSchema": "struct<bucket:string>"}, "an inventory in ORC"),
        ({"fileFormat": "Parquet"}, "an inventory in Parquet"),
        ({"fileSchema": "Bucket, Size"}, "has no columns Bucket and Key"),
        ({"fileSchema": f"{SCHEMA}, More"}, "line 1 has fewer columns than Bucket, Key, .*More"),
        ({"files": None}, "is no whole manifest.json"),
        ({"files": ["a"]}, "is no whole manifest.json"),
        ({"files": [{"key": 5}]}, "is no whole manifest.json"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    changes: dict[str, Any], said: str, source: program.Bucket, tmp_path: Path
) -> None:
    with ends_with(ExitCode.USAGE, said):
        keys(write_manifest(tmp_path, [full_row("a.png")], **changes), source)


########################################################################
# What is wrong with a file
########################################################################

OTHER_ROW = '"other","a.png"\n'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("keys", b"good\n\nbad\xff\n", "line 3 is not UTF-8"),
        ("keys", "a\n".encode("utf-16"), "line 1 is not UTF-8"),
        ("keys", b"good\n" + b"k" * 1025, "line 2 is no key: S3 allows 1 to 1024 bytes"),
        ("keys.gz", b"k" * (9 << 20), "line 1 is too long"),
        ("keys.csv", b"a.png\nb.png\n", "line 1 is not what is expected there"),
        ("keys.CSV.gz", b"\r\n \nbucket,a.png\n", "line 3 is not what is expected there"),
        ("manifest.json", b"{}\n", "line 1 is not what is expected there"),
        ("manifest.json", b'{"sourceBucket": "bucket", "fileFor', "is no whole manifest.json"),
        ("1.csv", OTHER_ROW.encode(), "line 1 is of the bucket other, not of bucket"),
        ("1.csv", b'"bucket","a.png"\n"bucket"\n', "line 2 has fewer columns"),
        ("1.csv", b'"bucket","a.png"\n"bucket","b.p', "line 2 cannot be read: unexpected end"),
        ("1.csv", b'"bucket","a.png"\n"bucket","%ff"\n', "line 2 cannot be read: 'utf-8'"),
        ("1.csv", b'"bucket","a.png"\n"bucket",""\n', "line 2 is no key"),
        ("1.csv", b'"bucket","a.png"\n"bucket","' + b"k" * 200_000 + b'"\n', "line 2 cannot be read: field larger"),
        ("failures.jsonl", f'{failure("a")}\n{{"bucket": "buck'.encode(), "line 2 is no JSON"),
        ("failures.jsonl", f'{failure("a")}\n{{"bucket": "bucket", "key": "\\ud800"}}'.encode(), "line 2 is no JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_number(
    name: str, content: bytes, said: str, source: program.Bucket, tmp_path: Path
) -> None:
    path = write(tmp_path / name, content)
    with ends_with(ExitCode.USAGE, said) as refused:
        keys(path, source)
    assert refused.value.message.startswith(str(path))


def test_a_file_that_cannot_be_opened_is_named(source: program.Bucket, tmp_path: Path) -> None:
    with ends_with(ExitCode.USAGE, r"none.txt cannot be read: No such file or directory"):
        keys(tmp_path / "none.txt", source)
    with ends_with(ExitCode.USAGE, r"cannot be read: Is a directory"):
        keys(tmp_path, source)


@pytest.mark.parametrize("damage", ["cut", "header", "block", "middle", "checksum"])
def test_a_damaged_gz_is_never_taken_for_whole(damage: str, source: program.Bucket, tmp_path: Path) -> None:
    packed = bytearray(gzip.compress("".join(f"{os.urandom(8).hex()}\n" for _ in range(500)).encode()))
    if damage == "cut":
        del packed[-20:]
    elif damage == "block":
        packed[10] = 0x07  # a kind of block that does not exist
    else:
        packed[{"header": 2, "middle": len(packed) // 2, "checksum": -8}[damage]] ^= 0x55
    path = tmp_path / "keys.gz"
    path.write_bytes(packed)
    with ends_with(ExitCode.USAGE, r"keys.gz"):
        keys(path, source)


def test_trouble_after_the_first_page_stops_the_run(source: program.Bucket, tmp_path: Path) -> None:
    path = write(tmp_path / "keys", b"k\n" * 1_000 + b"\xff\n")
    pages = keys_from(path, source)
    assert next(pages) == [SourceObject("k", "", 0, "")]
    with ends_with(ExitCode.STOPPED, r"line 1001 is not UTF-8") as ended:
        next(pages)
    assert ended.value.code == "listing"


def test_a_manifest_in_a_bucket_that_refuses_stops_the_run(source: program.Bucket) -> None:
    with ends_with(ExitCode.USAGE, r"S3 refused reading s3://no-such-bucket/manifest.json"):
        keys("s3://no-such-bucket/manifest.json", source)
