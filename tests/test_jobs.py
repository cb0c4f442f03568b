"""Jobs: whatever their questions, links and failures come to, each object is paid once, and none is blamed wrongly."""

import time
from types import SimpleNamespace
from typing import cast

import pytest
import urllib3

import s3_bulk_convert as program


@pytest.mark.parametrize(("is_elsewhere", "expected"), [(True, program.ObjectFailed), (False, program.RunStopped)])
def test_only_the_api_s_own_certificate_stops_the_run(*, is_elsewhere: bool, expected: type[Exception]) -> None:
    task = program.Task("default", "f", "a.png", "e", 1, "jpg", None, "a.jpg", "i")
    policy = program.RetryPolicy(
        5,
        shared=cast(program.Shared, SimpleNamespace(reach=program.Reach("the API"))),
        exchange=program.Exchange(task, task),
        deadline=time.monotonic() + 60,
        judge=program.judge_download,
        is_elsewhere=is_elsewhere,
    )
    untrusted = urllib3.exceptions.SSLError("[SSL] certificate verify failed: self-signed certificate (_ssl.c:1006)")
    with pytest.raises(expected):
        policy.new().increment("GET", "/file", error=untrusted)
