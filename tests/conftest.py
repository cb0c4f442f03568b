"""Fixtures: the real S3 server, a bucket in it, and the strict stand-in of the API. Tools only, no assertions."""

import functools
import gc
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.standins.conversion_api import ConversionApi
from tests.standins.converters import marking
from tests.standins.fork_server import remember_models
from tests.standins.program import Run, TestBucket, launch
from tests.standins.relay import Relay
from tests.standins.s3_server import S3Server
from tests.standins.servers.kinds import KINDS

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

remember_models()
pytest.register_assert_rewrite("tests.standins.promises")  # so that it says what differs
# Under nohup, or in the background of a script, signals are ignored, and the programs under test would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say what `pytest` takes in addition."""
    parser.addoption(
        "--s3", choices=sorted(KINDS), help="run the tests that need an S3, and no other, against this one"
    )
    parser.addoption("--tls", action="store_true", help="speak TLS with the S3 server, by a private CA")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to let several processes empty one bucket."""
    several = config.getoption("numprocesses", default=None)
    if config.getoption("--s3") == "external" and os.environ.get("S3_TEST_BUCKET") and several:
        raise pytest.UsageError("S3_TEST_BUCKET is for one process at a time: leave out -n")


def chosen_kind(config: pytest.Config) -> type[S3Server]:
    """The kind of S3 server that the tests are run against."""
    return KINDS[config.getoption("--s3") or "swift"]


LEFT_OUT = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the chosen S3 server cannot do, and say so; with --s3, what needs none."""
    chosen, lacks = config.getoption("--s3"), chosen_kind(config).lacks
    kept, left_out = [], []
    for item in items:
        fixtures = getattr(item, "fixturenames", [])
        needed = [*fixtures, *(name for mark in item.iter_markers("needs") for name in mark.args)]
        if missing := [lacks[name] for name in needed if name in lacks]:
            left_out.append(f"{item.nodeid}: {missing[0]}")
        elif not chosen or "new_server" in fixtures:
            kept.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    config.stash[LEFT_OUT] = left_out


def pytest_collection_finish() -> None:
    """Count what the tests keep as no garbage: it is more than a run ever has, and would be looked through with it."""
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what was left out to the process that prints the summary, if it is another one."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left_out"] = session.config.stash.get(LEFT_OUT, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take it from there."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name each test that was left out, and why."""
    for line in config.stash.get(LEFT_OUT, []):
        terminalreporter.write_line(f"left out: {line}")


@pytest.fixture(scope="session")
def new_server(request: pytest.FixtureRequest) -> Callable[..., S3Server]:
    """Makes an S3 server of the chosen kind."""
    return functools.partial(chosen_kind(request.config), tls=request.config.getoption("--tls"))


@pytest.fixture(scope="session")
def s3(new_server: Callable[..., S3Server]) -> Iterator[S3Server]:
    """A real S3 server."""
    with new_server() as server:
        yield server


@pytest.fixture(scope="session")
def s3_client(s3: S3Server) -> "S3Client":
    """The client of all buckets."""
    return s3.client()


@pytest.fixture
def bucket(s3: S3Server, s3_client: "S3Client") -> Iterator[TestBucket]:
    """An empty bucket."""
    created = TestBucket(s3.new_bucket(s3_client), s3_client)
    yield created
    s3.drop_bucket(s3_client, created.name)


@pytest.fixture
def other_bucket(s3: S3Server, bucket: TestBucket) -> Iterator[TestBucket]:
    """A second one."""
    created = TestBucket(s3.new_bucket(bucket.client), bucket.client)
    yield created
    s3.drop_bucket(bucket.client, created.name)


@pytest.fixture
def api() -> Iterator[ConversionApi]:
    """A fresh stand-in of the API."""
    with ConversionApi() as server:
        yield server


@pytest.fixture
def strict_api(api: ConversionApi) -> ConversionApi:
    """The API at its strictest: a key belongs to the bytes that were first sent with it, whatever came of them."""
    api.behaviour.convert = marking
    api.behaviour.compare_raw_body = True
    api.behaviour.remember_failed_bodies = True
    return api


STARTED = pytest.StashKey[list[Run]]()  # by a test, in this order


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show each run of a test that fails: its command, its exit code and what it has said."""
    report = yield
    if report.failed:
        started = item.stash.get(STARTED, None) or []
        report.sections += [(f"run {number}", repr(run)) for number, run in enumerate(started, 1)]
    return report


@pytest.fixture
def cheap(api: ConversionApi) -> None:
    """Conversions that cost nothing, and say what they were made of."""
    api.behaviour.convert = marking


@pytest.fixture
def cheap_object(api: ConversionApi, bucket: TestBucket) -> None:
    """One object whose conversion costs nothing."""
    api.behaviour.convert = marking
    bucket.put("a.png", b"\x89PNG\r\n\x1a\n" + b"a")


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """The directory that the script is started in; what was made unreadable there can be removed again."""
    folder = tmp_path / "work"
    folder.mkdir()
    yield folder
    for made in folder.iterdir():
        if made.is_dir() and not made.is_symlink():
            made.chmod(0o700)


@pytest.fixture
def start(
    s3: S3Server, api: ConversionApi, bucket: TestBucket, work: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Run]]:
    """Start the script with some arguments, in an empty directory that later calls share."""
    started: list[Run] = request.node.stash.setdefault(STARTED, [])

    def start(*arguments: str, **named: Any) -> Run:
        started.append(launch(*arguments, workdir=work, s3=s3, api=api, bucket=bucket, **named))
        return started[-1]

    yield start
    for run in started:
        run.process.kill()
        run.process.communicate()


@pytest.fixture
def run_cli(start: Callable[..., Run]) -> Callable[..., Run]:
    """Run the script to its end."""
    return lambda *arguments, **named: start(*arguments, **named).wait()


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """An event for requests to hang on; set at the end, so that no server thread is left waiting."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def relay(s3: S3Server) -> Iterator[Relay]:
    """A running relay."""
    with Relay(s3) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()
