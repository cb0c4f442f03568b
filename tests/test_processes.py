"""Worker processes: the same work in several of them, and none of it lost or paid twice when one dies."""

from __future__ import annotations

import pytest

import s3_bulk_convert as program
from tests.standins.s3_server import S3Server


def test_a_stop_that_comes_from_the_parent_is_not_told_back(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    given = {"S3_BUCKET": "bucket", "TARGET_FORMAT": "jpg", "CTF_API_KEY": "ctf_sk_1"}
    settings = program.load_settings(None, given, [])
    with program.running_process(settings, 1) as connection:
        connection.send(program.Stop("enough", ""))
        connection.send(None)
        assert connection.recv() is None
