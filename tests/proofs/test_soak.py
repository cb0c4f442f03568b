"""The soak of `make soak`: it works for a few seconds, and can tell what grows from what does not."""

from dataclasses import replace
from typing import Any

import pytest

from tests.proofs import soak
from tests.standins.s3_server import S3Server

LEAN = soak.Weight(rss_mb=80.0, peak_mb=82.0, files=30, threads=12, wal_mb=3.9, in_flight=4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_some_seconds_of_it_pass(s3: S3Server, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code = soak.soak(0.1, 20, 1, s3)
    said = capsys.readouterr().out
    assert exit_code == 0, said
    assert "| paid, paid twice | " in said
    assert "checkpoints lost 1" in said
    assert said.endswith("nothing paid twice, lost or wrong; nothing has grown\n")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_broken_promise_is_named_and_ends_it_with_1(
    s3: S3Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "converted", lambda source: source)
    assert soak.soak(0.02, 20, 1, s3) == 1
    assert "BROKEN: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"rss_mb": 83.0, "files": 33, "in_flight": 9}, []),
        ({"rss_mb": 90.0}, ["rss_mb grew from 80.0 to 90.0, by more than 3.2"]),
        ({"peak_mb": 90.0}, ["peak_mb grew from 82.0 to 90.0, by more than 3.2"]),
        ({"files": 40}, ["files grew from 30.0 to 40.0, by more than 4.0"]),
        ({"threads": 15}, ["threads grew from 12.0 to 15.0, by more than 2.0"]),
        ({"in_flight": 20}, ["in_flight grew from 4.0 to 20.0, by more than 6.0"]),
    ],
)
def test_what_grows_is_named(change: dict[str, Any], said: list[str]) -> None:
    weights = [LEAN] * (soak.WARM_UP + 30) + [replace(LEAN, **change)] * 30
    assert list(soak.growth(weights, 1000)) == said


def test_what_was_too_much_at_any_time_is_named_even_in_a_short_soak() -> None:
    weights = [LEAN, replace(LEAN, wal_mb=9.0, in_flight=31), LEAN]
    assert list(soak.growth(weights, 0)) == ["the write-ahead log had 9.0 MB", "in_flight had 31 rows"]
