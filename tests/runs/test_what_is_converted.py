"""Which objects are converted, under which keys and with what beside them; each listed object has exactly one count."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.standins.conversion_api import ConversionApi, Fault
from tests.standins.converters import Conversion, marking
from tests.standins.program import lose_checkpoint
from tests.standins.samples import number_in, photo

Cli = Callable[..., Any]

ODD_KEYS = [
    "with spaces .png",
    "plus+and%25percent%.png",
    "#?&=;:@$,!*'()[]{}~|^`.png",
    "quotes\"and'single.png",
    "composed-\u00e9.png",
    "decomposed-e\u0301.png",
    "emoji-\U0001f600.png",
    "back\\slash.png",
    "tab\there.png",
    "new\nline.png",
    "control-\x01-\x1f.png",
    "a/../b.png",
    "./c.png",
    "double//slash.png",
    "/leading.png",
    "{stem}{nothing}.png",
    "ends.with.dots..png",
    "\u00fc" * 500 + ".png",
    "x" * 1010 + ".png",
]


def counted(summary: dict[str, Any]) -> int:
    """All counts of a summary but that of what was listed."""
    parts = summary["converted"] + summary["already_done"] + summary["left"]
    return int(parts + sum(summary["skipped"].values()) + sum(summary["failed"].values()))


def write_ini(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.needs("newlines")
@pytest.mark.parametrize(
    "transfer", ["url", *(pytest.param(other, marks=pytest.mark.slow) for other in ("auto", "upload"))]
)
def test_odd_keys_work_end_to_end(transfer: str, run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    api.behaviour.convert = marking
    sources = {key: b"\x89PNG\r\n\x1a\n" + key.encode() for key in ODD_KEYS}
    for key, source in sources.items():
        bucket.put(key, source)
    run = run_cli(
        "--set", f"api.transfer={transfer}", "--set", "s3.output_key=o/{key}", "--set", "run.max_failure_rate=never"
    )
    too_long = [key for key in ODD_KEYS if len(f"o/{key}".encode()) > 1024]
    assert run.summary["failed"] == ({"output_key_too_long": len(too_long)} if too_long else {})
    outputs = bucket.outputs("o/")
    for key in set(ODD_KEYS) - set(too_long):
        body, _, metadata = outputs[f"o/{key}"]
        assert body == marking(Conversion(sources[key], "png", "jpg", None)).body, key
        # S3 has room for 2 KB of metadata: a longer name is there as its digest.
        is_long = len(quote(key)) > 1400
        expected = {"source-key-sha256": sha256(key.encode()).hexdigest()} if is_long else {"source-key": quote(key)}
        assert expected.items() <= metadata.items()
    assert run_cli("--set", "s3.output_key=o/{key}").summary["requests"] == 0
    assert len(api.paid) == len(ODD_KEYS) - len(too_long)


def test_each_reason_to_skip_has_its_count(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    for key in ("a.png", "notes.txt", "old.jpg", "photo.JPEG", "converted/x.png"):
        bucket.put(key, photo(1, "png"))
    bucket.put("folder/", b"")
    bucket.put("empty.png", b"")
    summary = run_cli("--set", "convert.include=*.png *.jp*g */ ").summary
    assert summary["skipped"] == {
        "not_matched": 1,
        "folder": 1,
        "empty": 1,
        "same_format": 2,
        "own_output": 1,
    }
    assert (summary["listed"], counted(summary), len(api.paid)) == (7, 7, 1)


def test_of_two_sources_with_one_output_the_first_keeps_it_for_ever(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("a.png", photo(2, "png"))
    bucket.put("a.heic", photo(1, "heic"))
    first = run_cli()
    assert first.exit_code == 1
    assert [(line["key"], line["code"]) for line in first.failures] == [("a.png", "output_collision")]
    assert "{ext}" in first.failures[0]["message"]
    second = run_cli("--retry-failed")
    bucket.put("a.png", photo(3, "png"))
    third = run_cli()
    for run in (second, third):
        assert run.summary["failed"] == {"output_collision": 1}
    assert number_in(bucket.outputs()["converted/a.jpg"][0]) == 1
    assert len(api.paid) == len(api.requests) == 1


def test_the_extension_in_the_template_keeps_both(run_cli: Cli, bucket: Any) -> None:
    bucket.put("a.png", photo(2, "png"))
    bucket.put("a.heic", photo(1, "heic"))
    assert run_cli("--set", "s3.output_key=out/{stem}-{ext}.{target}").exit_code == 0
    assert sorted(bucket.outputs("out/")) == ["out/a-heic.jpg", "out/a-png.jpg"]


def test_an_output_says_what_it_was_made_of(run_cli: Cli, bucket: Any) -> None:
    bucket.put("in/f\u00fcr 100%.png", photo(1, "png"))
    run = run_cli("--set", "s3.cache_control=max-age=60")
    assert run.exit_code == 0
    _, media_type, metadata = bucket.outputs()["converted/in/f\u00fcr 100%.jpg"]
    etag = bucket.client.head_object(Bucket=bucket.name, Key="in/f\u00fcr 100%.png")["ETag"].strip('"')
    assert media_type == "image/jpeg"
    assert metadata.pop("job-fingerprint") == run.rows("jobs")[0]["fingerprint"]
    assert metadata.pop("source-bucket") == bucket.name
    assert metadata == {"source-key": "in/f%C3%BCr%20100%25.png", "source-etag": etag, "job": "default"}


def test_an_overwritten_object_is_converted_again(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    for number in (1, 2):
        bucket.put("a.png", photo(number, "png"))
        assert run_cli().summary["converted"] == 1
        assert number_in(bucket.outputs()["converted/a.jpg"][0]) == number
    assert len(api.paid) == 2


def test_a_multi_page_source_becomes_an_archive_of_pages(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    api.faults.add(Fault.zip_of_pages(3))
    bucket.put("scan.png", photo(1, "png"))
    assert run_cli().exit_code == 0
    body, media_type, _ = bucket.outputs()["converted/scan.jpg.zip"]
    assert (body[:2], media_type) == (b"PK", "application/zip")
    assert run_cli().summary["already_done"] == 1


def test_several_jobs_share_one_listing(run_cli: Cli, bucket: Any, tmp_path: Path, api: ConversionApi) -> None:
    ini = write_ini(
        tmp_path / "jobs.ini",
        "[job small]",
        "target = webp",
        "include = *.png",
        "output_key = small/{stem}.{target}",
        "quality = 50",
        "[job print]",
        "include = *.png *.gif",
        "target = pdf",
        "output_key = print/{stem}.{target}",
    )
    bucket.put("a.png", photo(1, "png"))
    bucket.put("b.gif", photo(2, "gif"))
    run = run_cli("-c", ini, TARGET_FORMAT=None)
    assert run.exit_code == 0, run.err
    assert sorted(bucket.keys()) == ["a.png", "b.gif", "print/a.pdf", "print/b.pdf", "small/a.webp"]
    assert run.summary["listed"] == run.summary["converted"] == len(api.paid) == 3
    again = run_cli("-c", ini, TARGET_FORMAT=None).summary
    assert (again["already_done"], again["requests"]) == (3, 0)


def test_a_source_in_the_target_format_is_copied_within_s3_if_so_wished(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("a.jpg", photo(1, "jpg"))
    assert run_cli("--set", "convert.same_format=copy").exit_code == 0
    body, media_type, metadata = bucket.outputs()["converted/a.jpg"]
    assert (body, media_type) == (photo(1, "jpg"), "image/jpeg")
    assert metadata["source-key"] == "a.jpg"
    assert api.requests == []


def test_a_source_in_the_target_format_is_converted_if_so_wished(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    bucket.put("a.jpg", photo(1, "jpg"))
    assert run_cli("--set", "convert.same_format=convert").exit_code == 0
    assert len(api.paid) == 1


def test_outputs_may_go_to_another_bucket(run_cli: Cli, bucket: Any, other_bucket: Any) -> None:
    other = other_bucket.name
    bucket.put("converted/a.png", photo(1, "png"))
    assert run_cli("--set", f"s3.output_bucket={other}").exit_code == 0
    assert bucket.keys() == ["converted/a.png"]
    assert bucket.client.head_object(Bucket=other, Key="converted/converted/a.jpg")["ContentType"] == "image/jpeg"


def test_sizes_and_globs_choose_what_is_converted(run_cli: Cli, bucket: Any) -> None:
    for key, size in (("a/small.png", 8), ("a/good.PNG", 500), ("a/large.png", 5000), ("b/good.png", 500)):
        bucket.put(key, photo(1, "png")[:8].ljust(size, b"x"))
    options = ("convert.include=A/*.png", "convert.min_size=100", "convert.max_size=1KB", "run.max_failure_rate=never")
    run = run_cli(*(part for option in options for part in ("--set", option)))
    assert run.summary["skipped"] == {"not_matched": 3}
    assert [line["key"] for line in run.failures] == ["a/good.PNG"]


def test_outputs_among_the_sources_overwrite_nothing_and_are_not_converted(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    bucket.put("a.png", photo(1, "png"))
    bucket.put("b.png", photo(2, "png"))
    bucket.put("b.jpg", photo(3, "jpg"))
    beside = ("--set", "s3.output_key={dir}{stem}.{target}")
    run = run_cli(*beside)
    assert run.summary["failed"] == {"output_collision": 1}
    assert bucket.client.get_object(Bucket=bucket.name, Key="b.jpg")["Body"].read() == photo(3, "jpg")
    webp = run_cli(*beside, TARGET_FORMAT="webp")
    assert webp.summary["skipped"]["own_output"] >= 1
    assert len(api.paid) == 3


def test_outputs_that_lie_where_they_lay_before_take_no_key_from_a_source(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    for number in range(3):
        bucket.put(f"photos/{number}.png", photo(number, "png"))
    assert run_cli("--set", "s3.output_key=converted/{stem}.{target}").exit_code == 0
    # Sorted before the sources, the outputs of the first place want the same keys in the second one.
    run = run_cli("--target", "webp", "--set", "s3.output_key=webp/{stem}.{target}")
    assert (run.exit_code, run.summary["converted"], run.summary["skipped"]) == (0, 3, {"own_output": 3})
    assert len(api.paid) == 6


def test_a_lost_checkpoint_pays_nothing_again(run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path) -> None:
    for number in range(5):
        bucket.put(f"in/{number}.png", photo(number, "png"))
    assert run_cli().summary["converted"] == 5
    lose_checkpoint(tmp_path / "work")
    run = run_cli()
    assert (run.exit_code, run.summary["already_done"], len(api.requests)) == (0, 5, 5)
    assert {row["event"] for row in run.rows()} == {"found"}


def test_without_skip_existing_a_lost_checkpoint_converts_again(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    bucket.put("a.png", photo(1, "png"))
    upload = ("--set", "api.transfer=upload", "--set", "run.skip_existing=no")
    run_cli(*upload)
    lose_checkpoint(tmp_path / "work")
    assert run_cli(*upload).summary["converted"] == 1
    # The same bytes under the same key: the API answers from its memory.
    assert (len(api.requests), len(api.paid)) == (2, 1)


def test_another_quality_under_the_same_key_is_converted_again(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    bucket.put("a.png", photo(1, "png"))
    assert run_cli().summary["converted"] == 1
    assert run_cli("--set", "convert.quality=30").summary["converted"] == 1
    assert [charge.quality for charge in api.paid] == [None, 30]


def test_a_lost_checkpoint_does_not_take_one_source_s_output_for_another_s(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    bucket.put("a.png", photo(1, "png"))
    assert run_cli().summary["converted"] == 1
    bucket.put("a.heic", photo(2, "heic"))
    lose_checkpoint(tmp_path / "work")
    run = run_cli()
    assert [(line["key"], line["code"]) for line in run.failures] == [("a.heic", "output_collision")]
    assert number_in(bucket.outputs()["converted/a.jpg"][0]) == 1
    assert len(api.paid) == 1
