"""Running the tests against other S3 servers: what cannot be run is said, and is never a silent skip."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.real.servers import PYTEST, Plan, plans, result_of
from tests.standins.s3_server import PROJECT
from tests.standins.servers.kinds import KINDS


def pytest_says(*arguments: str, **environment: str) -> str:
    """What pytest prints with these arguments."""
    done = subprocess.run(
        [*PYTEST, "--collect-only", "-q", *arguments, "tests/standins/test_s3_server.py"],
        cwd=PROJECT,
        env={"PATH": str(Path(sys.executable).parent), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.slow
def test_what_a_server_cannot_do_is_left_out_by_name_and_with_the_reason() -> None:
    left_out = (
        "left out: standins/test_s3_server.py::test_a_wrong_secret_is_refused: it checks the signatures of presigned"
    )
    assert left_out in pytest_says("--s3", "ministack")
    assert "left out" not in pytest_says("--s3", "swift")


@pytest.mark.slow
def test_with_a_server_s_name_only_tests_that_need_one_are_run() -> None:
    said = pytest_says("--s3", "swift")
    assert "test_an_odd_key_round_trips" in said
    assert "test_a_picture_without_a_number_is_told" not in said


def test_several_processes_do_not_empty_one_bucket() -> None:
    said = pytest_says("--s3", "external", "-n", "2", S3_TEST_BUCKET="only")
    assert "S3_TEST_BUCKET is for one process at a time" in said


def test_a_server_that_is_not_installed_fails_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    passed, line = result_of(Plan("ceph", "ceph", ()))
    assert not passed
    assert "FAILED: ceph, ceph-mon, ceph-osd" in line
    assert "ceph-common" in line


def test_each_kind_of_server_is_run_and_ours_over_tls_too() -> None:
    names = {plan.name for plan in plans()}
    assert names == {*KINDS, "rest", *(f"{name}-tls" for name in KINDS if name not in {"external", "s3rver"})}
    files = {part for plan in plans() for part in plan.arguments if part.endswith(".py")}
    assert all((PROJECT / name).exists() for name in files)
