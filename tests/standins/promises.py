"""Sources, what they must come to, and what holds when a run has finished, whatever befell the runs before it."""

from __future__ import annotations

from typing import Any

from tests.standins.conversion_api import ConversionApi
from tests.standins.converters import Conversion, marking

PNG = b"\x89PNG\r\n\x1a\n"


def converted(source: bytes, target: str = "jpg") -> bytes:
    """What the API that marks makes of a source."""
    return marking(Conversion(source, "png", target, None)).body


def fill(bucket: Any, count: int, *, first: int = 0, name: str = "{:03}", repeated: int = 50) -> dict[str, bytes]:
    """Put sources of some 10 bytes, `repeated`; the key and the bytes of each output that they must come to.

    Those before the `first` are there already: one that is put again is another object, at another time.
    """
    expected = {}
    for number in range(first, count):
        source = PNG + f"picture {number:03}".encode() * repeated
        key = name.format(number)
        bucket.put(f"{key}.png", source)
        expected[f"converted/{key}.jpg"] = converted(source)
    return expected


def assert_all_promises_are_kept(run: Any, api: ConversionApi, bucket: Any, expected: dict[str, bytes]) -> None:
    """All is converted and stored as it must be, nothing was paid twice, nothing is left to settle."""
    assert run.exit_code == 0, run.err + run.out
    assert run.summary["left"] == 0
    assert run.summary["converted"] + run.summary["already_done"] == len(expected)
    assert len(api.paid) == len(expected)
    assert api.paid_twice() == []
    assert run.rows("in_flight") == []
    # Each by its key as well: after a kill, Swift has in no listing what it had not yet acknowledged.
    assert set(bucket.keys("converted/")) <= set(expected)
    assert {key: bucket.read(key) for key in expected} == expected
