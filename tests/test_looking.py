"""--check, --status and --why: what they say is true, and they leave nothing behind, neither a file nor an object."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import s3_bulk_convert as program
from s3_bulk_convert import Event, JournalReader, Usage
from tests.test_journal import converted, task


def test_packages_that_are_too_old_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "OLDEST_PACKAGES", {"requests": "99.1"})
    finding = program.proved("versions", program.versions)
    assert str(finding).startswith("FAIL versions: too old for requests>=99.1; run: ")


def test_a_disk_that_is_nearly_full_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(program, "LITTLE_DISK_BYTES", 10**18)
    assert program.proved("space", lambda: program.has_space(tmp_path)).verdict == "WARN"
    monkeypatch.setattr(program, "SCARCE_DISK_BYTES", 10**18)
    assert program.proved("space", lambda: program.has_space(tmp_path)).verdict == "FAIL"


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        ({"plan": "test", "conversions": {"limit": 5, "used": 1, "remaining": 4}}, Usage("test", 5, 4)),
        ({"plan": "hobby", "conversions_used": 10, "conversions_limit": 50}, Usage("hobby", 50, 40)),
        ({"plan": "free", "conversions": 12, "limit": 1000}, Usage("free", 1000, 988)),
        ({"plan": "free", "conversions": 12, "limit": 10}, Usage("free", 10, 0)),
        (
            {"plan": {"name": "p", "monthly_limit": 50, "requests_per_minute": 30}, "conversions_this_month": 2},
            Usage("p", 50, 48, 30),
        ),
        ({"data": {"plan": "x", "conversionsRemaining": "7", "rateLimit": {"limit": 30}}}, Usage("x", None, 7, 30)),
        (
            {
                "limits": {"conversions": 9, "max_file_size": 25},
                "usage": {"conversions": 1},
                "overage": {"enabled": True},
            },
            Usage(None, 9, 8, None, bills_overage=True),
        ),
        ({"plan": "s", "overage_allowed": False, "overage_price": 0.005}, Usage("s", bills_overage=False)),
        ({"requests": {"limit": 60, "remaining": 59}, "daily_limit": 3}, Usage()),
        ({"plan": 7, "conversions": [1], "limit": -1, "remaining": None, "used": True}, Usage()),
        ({}, Usage()),
    ],
)
def test_usage_is_read_under_any_name(body: dict[str, Any], usage: Usage) -> None:
    assert program.read_usage(body) == usage


def test_the_tallies_count_each_object_by_its_newest_row(tmp_path: Path) -> None:
    path, dice, newest = tmp_path / "checkpoint.sqlite3", random.Random(5), {}
    failures = [(Event.FAILED, "x", True), (Event.FAILED, "y", False)]
    kinds = [(Event.CONVERTED, "", False), (Event.FOUND, "", False), *failures]
    with program.Journal(path, "bucket", "outputs") as opened:
        for _ in range(300):
            key, fingerprint, (event, code, lasts) = dice.choice("abcdefgh"), dice.choice("fg"), dice.choice(kinds)
            done = task(key, f"{key}.jpg", fingerprint)
            opened.end([replace(converted(done), event=event, code=code, permanent=lasts)], 1.0)
            newest[fingerprint, key] = (event.value, lasts, code)
    with JournalReader(path, "bucket", "outputs") as reader:
        counted = {
            tally.fingerprint: {state: n for state, n in tally.states.items() if n} for tally in reader.tallies()
        }
    assert counted == {name: Counter(state for (of, _), state in newest.items() if of == name) for name in "fg"}
