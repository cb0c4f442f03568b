"""How answers come back: behind interim ones, with bytes too many, without an end, packed, as words, byte by byte.

Whatever is on the wire, an output holds its own source's bytes, all of them, and nothing is paid twice.
"""

import gzip
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.standins.conversion_api import JOBS, USAGE, Answer, ConversionApi, Fault, Request, Step
from tests.standins.converters import Conversion, Converted, marking
from tests.standins.program import HASTY, script_with
from tests.standins.samples import docx, photo
from tests.standins.tcp_proxy import PrivateCa, TcpProxy

Cli = Callable[..., Any]
EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n"
PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"


def source(name: str) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + name.encode() * 50


def good(name: str) -> bytes:
    return marking(Conversion(source(name), "png", "jpg", None)).body


def put(bucket: Any, *names: str) -> None:
    for name in names:
        bucket.put(f"{name}.png", source(name))


def stored(bucket: Any) -> dict[str, bytes]:
    return {key: body for key, (body, *_) in bucket.outputs().items()}


def assert_all_are_right(bucket: Any, api: ConversionApi, *names: str) -> None:
    outputs = stored(bucket)
    wrong = [name for name in names if outputs.get(f"converted/{name}.jpg") != good(name)]
    assert wrong == []
    assert (len(outputs), len(api.paid), api.paid_twice()) == (len(names), len(names), [])


def options(*given: str) -> list[str]:
    return [part for option in given for part in ("--set", option)]


def jobs(folder: Path, targets: Iterable[str]) -> tuple[str, str]:
    """What has each object converted to each of these formats."""
    path = folder / "jobs.ini"
    path.write_text("".join(f"[job {target}]\ntarget = {target}\n" for target in targets))
    return "-c", str(path)


def for_object(fault: Fault, name: str) -> Fault:
    """Strike the requests for one object's conversion."""
    return fault.at(lambda request: request.is_conversion and f"/{name}.png?" in request.fields.get("file_url", ""))


def has_target(target: str) -> Callable[[Request], bool]:
    return lambda request: request.fields.get("target") == target


def changed(change: Callable[[Answer], Answer], times: int | None = 1) -> Fault:
    """Deliver another answer than the right one."""
    return Fault(Step.DELIVERY, reshape=change, times=times)


########################################################################
# Interim answers, and connections that are out of step
########################################################################


@pytest.mark.slow
def test_interim_answers_are_read_over(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    api.behaviour.convert, api.behaviour.latency = marking, 0.02
    api.behaviour.interim = EARLY_HINTS + PROCESSING
    names = [f"{number:02}" for number in range(40)]
    put(bucket, *names)
    run = run_cli("--workers", "4", command=HASTY)
    assert (run.exit_code, run.summary["replays"]) == (0, 0)
    assert_all_are_right(bucket, api, *names)


def test_an_interim_answer_is_read_over_in_jobs_by_https(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    api.behaviour.convert, api.behaviour.interim = marking, EARLY_HINTS
    api.behaviour.job_states = ("completed",)
    names = ["a", "b", "c"]
    put(bucket, *names)
    authority = PrivateCa(tmp_path)
    with TcpProxy(api.url, authority.server_context()) as safe:
        given = options(f"api.url={safe.url}", "api.transfer=upload", "api.jobs_above=1")
        run = run_cli(*given, "--workers", "2", command=HASTY, REQUESTS_CA_BUNDLE=str(authority.bundle))
    assert (run.exit_code, run.failures, run.summary["replays"]) == (0, [], 0)
    assert_all_are_right(bucket, api, *names)


def test_a_connection_that_brought_bytes_too_many_is_not_used_again(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = marking
    api.faults.add(Fault.repeated_answer())
    names = ["a", "b", "c"]
    put(bucket, *names)
    run = run_cli("--workers", "1", command=HASTY)
    assert (run.exit_code, run.summary["replays"]) == (0, 0)
    assert_all_are_right(bucket, api, *names)


########################################################################
# Headers and links that make no sense
########################################################################

NONSENSE = ("\xb2", "9" * 400, "9" * 5000, "-5", "", "1e9")  # the first is a digit to Python, and no number


def test_numbers_and_links_that_make_no_sense_are_as_good_as_none(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = marking
    names = []
    for number, told in enumerate(NONSENSE):
        for of, headers in {
            "left": {"X-CTF-Remaining": told},
            "limit": {"X-RateLimit-Limit": told},
            "reset": {"X-RateLimit-Reset": told},
            "both": {"X-RateLimit-Limit": told, "X-RateLimit-Reset": told},
        }.items():
            names.append(f"{of}{number}")
            api.faults.add(for_object(Fault.changed_headers(headers), names[-1]))
    for number, link in enumerate(("http://[::1", "//[", "http://\u2100/")):
        names += [f"envelope{number}", f"place{number}"]
        api.faults.add(for_object(Fault.json_in_200({"file_url": link}), names[-2]))
        place = link if link.isascii() else "http://host/\xb2["
        api.faults.add(for_object(Fault(status=202, body=b"{}", headers={"Location": place}), names[-1]))
    put(bucket, *names)
    run = run_cli("--workers", "4", command=HASTY)
    assert (run.exit_code, run.failures) == (0, [])
    assert_all_are_right(bucket, api, *names)


########################################################################
# Where an answer ends
########################################################################


def test_a_length_said_twice_is_a_length_and_two_lengths_are_a_broken_answer(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    def with_another(answer: Answer, more: int) -> Answer:
        return replace(answer, headers={**answer.headers, "Content-Length": str(len(answer.body) + more)})

    api.behaviour.convert = marking
    api.faults.add(for_object(changed(lambda answer: with_another(answer, 0), times=None), "same"))
    api.faults.add(for_object(changed(lambda answer: with_another(answer, 7), times=None), "other"))
    put(bucket, "same", "other")
    run = run_cli(*options("api.retries=1"), command=HASTY)
    assert [(line["key"], line["code"], line["permanent"]) for line in run.failures] == [
        ("other.png", "network", False)
    ]
    assert stored(bucket) == {"converted/same.jpg": good("same")}
    assert ("Traceback" in run.err, len(run.rows("in_flight"))) == (False, 1)
    api.faults.clear()
    run_cli()
    assert_all_are_right(bucket, api, "same", "other")


TOLD_BY_THEIR_END: Mapping[str, tuple[bytes, str]] = {
    "jpg": (photo(1, "jpg"), "image/jpeg"),
    "png": (photo(1, "png"), "image/png"),
    "gif": (photo(1, "gif"), "image/gif"),
    "webp": (photo(1, "webp"), "image/webp"),
    "bmp": (photo(1, "bmp", size=(32, 24)), "image/bmp"),
    "pdf": (photo(1, "pdf"), "application/pdf"),
    "docx": (docx(["one", "two"]), "application/vnd.openxmlformats-officedocument.wordprocessingml.document"),
}
NOT_TOLD = ("csv", b"a,b\n1,2\n", "text/csv")


def test_an_answer_without_a_length_is_taken_where_the_file_says_that_it_is_whole(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    files = {**TOLD_BY_THEIR_END, NOT_TOLD[0]: NOT_TOLD[1:]}

    def convert(conversion: Conversion) -> Converted:
        return Converted(*files[conversion.target], conversion.target)

    api.behaviour.convert = convert
    bucket.put("a.tiff", b"II*\0a picture")
    given = (*jobs(tmp_path, files), *options("api.retries=0", "api.transfer=upload"))
    api.faults.add(Fault.without_length(cut=True, times=None))
    cut = run_cli(*given, command=HASTY, TARGET_FORMAT=None)
    assert sorted((line["target"], line["code"], line["permanent"]) for line in cut.failures) == sorted(
        (name, "no_length", False) for name in files
    )
    assert stored(bucket) == {}
    api.faults.clear()
    api.faults.add(Fault.without_length(times=None))
    whole = run_cli(*given, command=HASTY, TARGET_FORMAT=None)
    assert stored(bucket) == {f"converted/a.{name}": body for name, (body, _) in TOLD_BY_THEIR_END.items()}
    assert (whole.summary["failed"], len(api.paid)) == ({"no_length": 1}, len(files))


########################################################################
# What an answer is
########################################################################


def test_json_that_was_asked_for_is_the_file(run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path) -> None:
    # Not only its type: what it says may look like an answer of the API's, too.
    file = b'{"type": "Feature", "file_url": "https://nobody.invalid/"}\n'
    api.behaviour.convert = lambda conversion: Converted(file, "application/json", conversion.target)
    put(bucket, "a")
    targets = ["geojson", "ndjson", "ipynb", "json"]
    run = run_cli(*jobs(tmp_path, targets), *options("api.retries=0"), command=HASTY, TARGET_FORMAT=None)
    assert stored(bucket) == {f"converted/a.{target}": file for target in targets}
    assert (run.exit_code, len(api.paid)) == (0, len(targets))


def test_an_error_of_the_api_s_is_not_stored_as_the_json_that_was_asked_for(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    file = b'{"error": {"of": "measurement", "code": 0.1}}'
    api.behaviour.convert = lambda conversion: Converted(file, "application/json", conversion.target)
    api.faults.add(Fault.json_in_200())
    put(bucket, "a")
    first = run_cli("--target", "json", *options("api.retries=0"))
    assert ([line["code"] for line in first.failures], stored(bucket)) == (["json_answer"], {})
    run_cli("--target", "json")
    assert (stored(bucket), len(api.paid)) == ({"converted/a.json": file}, 1)


def packed(body: bytes, coding: str) -> Fault:
    def change(answer: Answer) -> Answer:
        return replace(answer, body=body, headers={**answer.headers, "Content-Encoding": coding})

    return changed(change, times=None)


def test_what_comes_packed_is_unpacked_whole_or_not_stored(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    api.behaviour.convert = marking
    good_ones = {
        "gzip": packed(gzip.compress(good("gzip")), "gzip"),
        "deflate": packed(zlib.compress(good("deflate")), "deflate"),
        "two": packed(gzip.compress(good("two")[:100]) + gzip.compress(good("two")[100:]), "x-gzip"),
    }
    bad_ones = {
        "br": packed(good("br"), "br"),
        "twice": packed(gzip.compress(good("twice")), "gzip, br"),
        "cut": packed(gzip.compress(good("cut"))[:-12], "gzip"),
        "spoilt": packed(gzip.compress(good("spoilt"))[:-8] + bytes(8), "gzip"),
    }
    for name, fault in {**good_ones, **bad_ones}.items():
        api.faults.add(for_object(fault, name))
    put(bucket, *good_ones, *bad_ones)
    run = run_cli(*options("api.retries=0"), command=HASTY)
    assert stored(bucket) == {f"converted/{name}.jpg": good(name) for name in good_ones}
    assert {line["key"]: line["permanent"] for line in run.failures} == {f"{name}.png": False for name in bad_ones}
    api.faults.clear()
    assert run_cli().exit_code == 0
    assert_all_are_right(bucket, api, *good_ones, *bad_ones)


def test_the_state_of_a_job_may_come_packed(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    api.behaviour.convert, api.behaviour.job_states = marking, ("completed",)

    def change(answer: Answer) -> Answer:
        return replace(answer, body=gzip.compress(answer.body), headers={**answer.headers, "Content-Encoding": "gzip"})

    api.faults.add(changed(change, times=1).at(lambda request: request.path.startswith(JOBS + "/")))
    put(bucket, "a")
    run = run_cli(*options("api.jobs_above=1"), command=HASTY)
    asked = [request for request in api.requests if request.path.startswith(JOBS + "/") and request.method == "GET"]
    assert (run.exit_code, len(asked)) == (0, 2)  # the state, and the file
    assert_all_are_right(bucket, api, "a")


WORDS = {
    "svg": b"upstream says no",  # begins as no XML does
    "csv": b"502 Bad Gateway\n",  # may begin as it likes
    "jpg": b"Internal Server Error",  # is no picture, and may pass
}


def test_words_in_place_of_the_file_are_not_stored(
    run_cli: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    # The type of the file is as vague as that of the words: only the bytes tell them apart.
    files = {"svg": b"\xef\xbb\xbf<!-- made by hand -->\n<svg/>", "csv": b"502 Bad Gateway,1\n", "jpg": good("a")}
    api.behaviour.convert = lambda conversion: Converted(files[conversion.target], "text/plain", conversion.target)
    for target, words in WORDS.items():
        fault = Fault(status=200, body=words, content_type="text/plain")
        api.faults.add(fault.at(has_target(target)))
    put(bucket, "a")
    given = (*jobs(tmp_path, WORDS), *options("api.retries=0"))
    first = run_cli(*given, command=HASTY, TARGET_FORMAT=None)
    failed = {line["target"]: (line["code"], line["permanent"]) for line in first.failures}
    assert failed == dict.fromkeys(WORDS, ("text_answer", False))
    assert stored(bucket) == {}
    run_cli(*given, command=HASTY, TARGET_FORMAT=None)
    assert (stored(bucket), len(api.paid)) == ({f"converted/a.{name}": file for name, file in files.items()}, 3)


########################################################################
# Answers that drip
########################################################################


def is_download(request: Request) -> bool:
    return request.path.startswith(JOBS + "/download/")


@pytest.mark.slow
def test_an_answer_that_drips_is_ended_and_asked_for_by_the_next_run(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert, api.behaviour.job_states = marking, ("completed",)
    names = ["head", "body", "end", "error", "download"]
    put(bucket, "head", "body", "error", "download")
    # What has come fast leaves no time for what comes slowly.
    bucket.put("end.png", source("end") * 2000)
    api.faults.add(for_object(Fault.dripping_answer("head", times=None), "head"))
    api.faults.add(for_object(Fault.dripping_answer("body", times=None), "body"))
    api.faults.add(for_object(Fault.dripping_answer("end", times=None), "end"))
    page = Fault(status=500, body=b"{" * 1000, drips_from="body", times=None)
    api.faults.add(for_object(page, "error"))
    api.faults.add(for_object(Fault(Step.WORK, as_job=True), "download"))
    api.faults.add(Fault.dripping_answer("body", times=None).at(is_download))
    run = run_cli(*options("api.retries=0", "api.timeout=1s", "run.max_failure_rate=never"), command=HASTY)
    codes = {line["key"]: (line["code"], line["permanent"]) for line in run.failures}
    assert codes == {
        "head.png": ("network", False),
        "body.png": ("slow_answer", False),
        "end.png": ("slow_answer", False),
        "error.png": ("http_500", False),
        "download.png": ("slow_answer", False),
    }
    assert (run.exit_code, stored(bucket), len(run.rows("in_flight"))) == (1, {}, len(names))
    api.faults.clear()
    assert run_cli(command=HASTY).exit_code == 0
    assert sorted(stored(bucket)) == sorted(f"converted/{name}.jpg" for name in names)
    assert (len(api.paid), api.paid_twice()) == (len(names), [])


def test_a_run_whose_time_is_over_does_not_wait_for_an_answer_that_drips(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = marking
    put(bucket, "a", "b")
    api.faults.add(Fault.dripping_answer("head", times=None))
    run = run_cli(*options("api.timeout=1s", "run.max_runtime=0.5s"), "--workers", "1", command=HASTY)
    assert (run.exit_code, run.summary["stopped_because"], run.summary["left"]) == (3, "run.max_runtime is over", 2)
    assert (stored(bucket), run.failures, len(api.paid)) == ({}, [], 1)


@pytest.mark.parametrize("drips_from", ["head", pytest.param("body", marks=pytest.mark.slow)])
def test_a_look_at_the_usage_that_drips_is_ended(
    drips_from: Any, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    put(bucket, "a")
    api.faults.add(
        Fault(status=200, body=b'{"plan": "test"}' + b" " * 400, drips_from=drips_from).at(
            lambda request: request.path == USAGE
        )
    )
    run = run_cli("--dry-run", command=script_with("program.LOOK_SECONDS = 1"))
    assert (run.exit_code, "Traceback" in run.err) == (0, False)
    assert api.requests[-1].delivered is False
