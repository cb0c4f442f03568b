"""The promise of the crash: killed before or after any effect, the next run finishes, nothing is paid twice or lost."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conversion_api import ConversionApi
from tests.converters import Conversion, marking
from tests.crashing import EFFECTS, HALF_READ
from tests.s3_server import S3Server

ROOT = Path(__file__).parent.parent
OBJECTS = 6
KILLED = -9
MOMENTS = [
    *((effect, when) for effect in EFFECTS if effect != "failure-written" for when in ("before", "after")),
    (HALF_READ, "after"),
]


def run(
    arguments: list[str], workdir: Path, s3: S3Server, api: ConversionApi, bucket: Any
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments, "--set", f"api.url={api.url}", "--set", "run.summary=summary.json"]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        **s3.environment(),
        "CTF_API_KEY": api.api_key,
        "S3_BUCKET": bucket.name,
        "TARGET_FORMAT": "jpg",
        "CONCURRENCY": "3",
    }
    return subprocess.run(
        command, cwd=workdir, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def fill(bucket: Any) -> dict[str, bytes]:
    """Put some sources; the outputs that they must come to."""
    expected = {}
    for number in range(OBJECTS):
        source = b"\x89PNG\r\n\x1a\n" + f"picture {number}".encode() * 400
        bucket.put(f"in/picture {number}.png", source)
        expected[f"converted/in/picture {number}.jpg"] = marking(Conversion(source, "png", "jpg", None)).body
    return expected


def check_promises(workdir: Path, api: ConversionApi, bucket: Any, expected: dict[str, bytes]) -> None:
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["exit_code"] == 0
    assert summary["left"] == 0
    assert summary["possible_double_charges"] == 0
    assert summary["converted"] + summary["already_done"] == OBJECTS
    assert len(api.paid) == OBJECTS
    assert api.paid_twice() == []
    assert {key: body for key, (body, *_) in bucket.outputs().items()} == expected


@pytest.mark.parametrize("transfer", ["url", "upload"])
@pytest.mark.parametrize(("effect", "when"), MOMENTS, ids=lambda value: str(value))
def test_a_run_after_a_kill_finishes_and_pays_nothing_twice(
    effect: str, when: str, transfer: str, s3: S3Server, api: ConversionApi, bucket: Any, tmp_path: Path
) -> None:
    api.behaviour.convert = marking
    api.behaviour.compare_raw_body = True
    api.behaviour.remember_failed_bodies = True
    expected = fill(bucket)
    mode = ["--set", f"api.transfer={transfer}"]
    nth = "1" if effect in {"summary-written", "requests-recorded"} else "3"
    killed = run(["-m", "tests.crashing", effect, when, nth, *mode], tmp_path, s3, api, bucket)
    assert killed.returncode == KILLED, killed.stderr
    second = run([str(ROOT / "s3_bulk_convert.py"), *mode], tmp_path, s3, api, bucket)
    assert second.returncode == 0, second.stderr + second.stdout
    check_promises(tmp_path, api, bucket, expected)


def test_a_kill_between_a_failure_line_and_its_commit_leaves_the_line(
    s3: S3Server, api: ConversionApi, bucket: Any, tmp_path: Path
) -> None:
    bucket.put("broken.png", b"not a picture at all")
    assert (
        run(["-m", "tests.crashing", "failure-written", "after", "1"], tmp_path, s3, api, bucket).returncode == KILLED
    )
    assert run([str(ROOT / "s3_bulk_convert.py")], tmp_path, s3, api, bucket).returncode == 1
    lines = [json.loads(line) for line in (tmp_path / "conversion_failures.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == {"broken.png"}
    assert api.paid == []


def test_a_kill_in_the_middle_of_a_url_refusal_ends_at_the_same_upload(
    s3: S3Server, api: ConversionApi, bucket: Any, tmp_path: Path
) -> None:
    api.behaviour.convert = marking
    api.behaviour.accept_file_url = False
    api.behaviour.compare_raw_body = True
    api.behaviour.remember_failed_bodies = True
    expected = fill(bucket)
    killed = run(["-m", "tests.crashing", "output-put", "before", "3"], tmp_path, s3, api, bucket)
    assert killed.returncode == KILLED
    second = run([str(ROOT / "s3_bulk_convert.py")], tmp_path, s3, api, bucket)
    assert second.returncode == 0, second.stderr
    assert api.paid_twice() == []
    assert {key: body for key, (body, *_) in bucket.outputs().items()} == expected
