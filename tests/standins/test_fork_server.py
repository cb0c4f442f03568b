"""A run that the fork server starts is, to itself and to others, what it is when Python starts it."""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.standins.program import Run, script_with

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each run is started by Python")
Both = Callable[..., tuple[Run, Run]]

SELF_PORTRAIT = """
import json, locale, multiprocessing.process, os, random, resource, signal, sys, tempfile, threading, time, zlib
streams = [sys.stdin, sys.stdout, sys.stderr]
umask = os.umask(0o22)
os.umask(umask)
main = sys.modules["__main__"]
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "flags": str(sys.flags), "prefix": sys.prefix,
    "names": sorted(name for name in vars(main) if "__" not in name),
    "main": [main.__name__, main.__dict__ is globals(), main is sys.modules["__mp_main__"]],
    "environment": {name: zlib.crc32(os.environb[name.encode()]) for name in sorted(os.environ)},
    "locale": locale.setlocale(locale.LC_ALL), "zone": time.tzname,
    "directory": os.getcwd(), "first directory": multiprocessing.process.ORIGINAL_DIR, "umask": umask,
    "parent": os.getppid(), "group": os.getpgrp(), "session": os.getsid(0), "nice": os.nice(0),
    "signals": {str(number): str(signal.getsignal(number)) for number in signal.valid_signals()},
    "blocked": str(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "open": [number for number in range(100) if os.path.exists(f"/proc/self/fd/{number}")],
    "streams": [[s.encoding, s.errors, s.line_buffering, s.isatty(), s.fileno(), s.seekable()] for s in streams],
    "limits": {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if "RLIMIT_" in name},
    "threads": [thread.name for thread in threading.enumerate()],
}))
print(random.random(), next(tempfile._get_candidate_names()), file=sys.stderr)
"""


@pytest.fixture
def both(run_cli: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Both:
    """Run the script from the fork server, and by itself."""

    def both(*arguments: str, **named: Any) -> tuple[Run, Run]:
        monkeypatch.delenv("S3_TEST_PLAIN_STARTS", raising=False)
        forked = run_cli(*arguments, **named)
        monkeypatch.setenv("S3_TEST_PLAIN_STARTS", "1")
        plain = run_cli(*arguments, **named)
        assert type(forked.process) is not type(plain.process)
        return forked, plain

    return both


def test_a_forked_run_finds_what_one_that_python_starts_finds(both: Both) -> None:
    forked, plain = both(
        *("--version",), command=script_with(SELF_PORTRAIT), AWS_PROFILE="\udcff", S3_BUCKET=None, HTTP_PROXY="-"
    )
    assert json.loads(forked.out.splitlines()[0]) == json.loads(plain.out.splitlines()[0])
    # Its chance is its own.
    again, _ = both("--version", command=script_with(SELF_PORTRAIT))
    assert len({*forked.err.split(), *plain.err.split(), *again.err.split()}) == 6


@pytest.mark.slow
@pytest.mark.usefixtures("cheap_object")
def test_a_forked_run_says_and_ends_as_one_that_python_starts(both: Both) -> None:
    converts, finds = both("--set", "run.processes=2")
    assert (converts.exit_code, converts.summary["converted"]) == (0, 1)
    assert (finds.exit_code, finds.summary["already_done"]) == (0, 1)
    for arguments in (["--status", "--bucket="], ["--wy"], ["--version"]):
        forked, plain = both(*arguments)
        assert (forked.exit_code, forked.out, forked.err) == (plain.exit_code, plain.out, plain.err)
