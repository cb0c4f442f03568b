"""Answers of the API as they are received: however little of one is on the wire, memory is flat."""

from __future__ import annotations

import contextlib
import gzip
import time
import tracemalloc

import pytest

import s3_bulk_convert as program
from tests.standins.conversion_api import ConversionApi, Fault
from tests.standins.converters import wrapped

LARGE = 48_000_000


@pytest.mark.parametrize("coding", ["gzip", pytest.param("x-gzip", marks=pytest.mark.slow)])
def test_what_a_small_answer_unpacks_to_is_not_in_memory(coding: str, api: ConversionApi) -> None:
    made = wrapped(bytes(LARGE), "jpg")
    packed = gzip.compress(made, compresslevel=9)
    assert len(packed) < 100_000
    answered = Fault(status=200, body=packed, content_type="image/jpeg", headers={"Content-Encoding": coding})
    api.faults.add(answered.at(lambda _: True))
    tracemalloc.start()
    try:
        with program.Session(10) as session, contextlib.closing(session.ask("GET", api.url)) as answer:
            file = program.ConvertedFile.receive(answer, "jpg", time.monotonic() + 60)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    with contextlib.closing(file.body):
        assert peak < LARGE / 3, f"{peak / 1e6:.0f} MB"
        assert file.size == len(made)
        assert file.body.read() == made


def test_no_cookie_is_kept(api: ConversionApi) -> None:
    answered = Fault(status=200, body=b"{}", content_type="text/plain", headers={"Set-Cookie": "a=b"}, times=None)
    api.faults.add(answered.at(lambda _: True))
    with program.Session(10) as session:
        for number in range(2):
            with session.ask("GET", f"{api.url}/download/{number}/a.jpg") as answer:
                assert answer.headers["Set-Cookie"] == "a=b"
        assert not session.cookies
