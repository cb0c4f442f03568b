"""Fixtures: the real S3 server, a bucket in it, and the strict stand-in of the API. Tools only, no assertions."""

import functools
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conversion_api import ConversionApi
from tests.converters import marking
from tests.s3_server import S3Server
from tests.servers.kinds import KINDS

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

pytest.register_assert_rewrite("tests.promises")  # so that it says what differs
# Under nohup, or in the background of a script, signals are ignored, and the programs under test would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
SCRIPT = Path(__file__).parent.parent / "s3_bulk_convert.py"
# As a module, because Python keeps a module's bytecode: to compile the script is a sixth of what a start costs.
AS_A_MODULE = ("-m", SCRIPT.stem)
# The interpreter for the script, if it is not the tests' own: see all_pythons.py.
PYTHON = os.environ.get("S3_TEST_PYTHON", sys.executable)


def script_with(changes: str) -> tuple[str, str]:
    """The real script after some statements about `program`, for other numbers: so that no test waits for a minute."""
    return "-c", f"import s3_bulk_convert as program\n{changes}\nprogram.leave(program.main())"


# It waits for a fraction of a second where the API would be given seconds.
HASTY = script_with("program.JOB_POLL_SECONDS, program.BACKOFF_CAP_SECONDS = (0.1, 0.2), 0.2")


@dataclass(frozen=True)
class TestBucket:
    """A bucket of a test's own."""

    __test__ = False
    name: str
    client: "S3Client"

    def put(self, key: str, body: bytes) -> None:
        """Put one object."""
        self.client.put_object(Bucket=self.name, Key=key, Body=body)

    def read(self, key: str) -> bytes:
        """The bytes of one object."""
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def keys(self, prefix: str = "") -> list[str]:
        """The keys that begin so."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def outputs(self, prefix: str = "converted/") -> dict[str, tuple[bytes, str, dict[str, str]]]:
        """Key -> body, media type and metadata of what lies below the output prefix."""
        found = {}
        for key in self.keys(prefix):
            reply = self.client.get_object(Bucket=self.name, Key=key)
            found[key] = (reply["Body"].read(), reply["ContentType"], reply["Metadata"])
        return found


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


@pytest.fixture
def bucket(s3: S3Server) -> Iterator[TestBucket]:
    """An empty bucket."""
    client = s3.client()
    created = TestBucket(s3.new_bucket(client), client)
    yield created
    s3.drop_bucket(client, created.name)


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


class Run:
    """The real script in a subprocess, and what it has left in its working directory."""

    def __init__(
        self,
        command: list[str],
        workdir: Path,
        environment: Mapping[str, str],
        stdin: int | None = None,
        terminal: int | None = None,
    ) -> None:
        self.workdir, self._environment = workdir, environment
        output = subprocess.PIPE if terminal is None else terminal
        self.process = subprocess.Popen(
            command,
            cwd=workdir,
            env=environment,
            stdin=stdin,
            stdout=output,
            stderr=output,
            text=True,
            start_new_session=bool(terminal),
        )
        self.out = self.err = ""
        self.exit_code: int | None = None
        self.summary: dict[str, Any] = {}

    def wait(self, seconds: float = 60) -> "Run":
        """Wait for its end; whatever it says and writes must be free of secrets."""
        out, err = self.process.communicate(timeout=seconds)
        self.out, self.err = out or "", err or ""
        self.exit_code = self.process.returncode
        path = self.workdir / "summary.json"
        # Read at once: the next run in the same directory writes its own.
        self.summary = json.loads(path.read_text()) if path.exists() else {}
        self._refuse_secrets()
        return self

    def _refuse_secrets(self) -> None:
        written = "".join(path.read_text() for path in self.workdir.glob("*.json*"))
        for text in (self.out, self.err, written):
            assert self._environment.get("CTF_API_KEY", "\0") not in text
            assert self._environment["AWS_SECRET_ACCESS_KEY"] not in text
            assert not re.search(r"X-Amz-Signature=(?!\.\.\.)", text)

    @property
    def failures(self) -> list[dict[str, Any]]:
        """The lines of the failures file."""
        path = self.workdir / "conversion_failures.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def rows(self, table: str = "log") -> list[dict[str, Any]]:
        """The rows of a table of the checkpoint."""
        with sqlite3.connect(self.workdir / "s3_bulk_convert.sqlite3") as db:
            db.row_factory = sqlite3.Row
            return [dict(row) for row in db.execute(f"SELECT * FROM {table}")]


def launch(
    *arguments: str,
    workdir: Path,
    s3: S3Server,
    api: ConversionApi,
    bucket: TestBucket,
    command: tuple[str, ...] = AS_A_MODULE,
    stdin: int | None = None,
    terminal: int | None = None,
    **changes: str | None,
) -> Run:
    """Start the script as a user would who has set what is needed to convert the bucket to jpg, and nothing else."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(workdir.parent / "home"),
        "PYTHONPATH": str(SCRIPT.parent),
        **s3.environment(),
        "CTF_API_KEY": api.api_key,
        "S3_BUCKET": bucket.name,
        "TARGET_FORMAT": "jpg",
    }
    changed = {name: value for name, value in {**environment, **changes}.items() if value is not None}
    api.behaviour.ca_bundle = s3.ca_bundle
    given = ["--set", f"api.url={api.url}", "--set", "run.summary=summary.json", *arguments]
    return Run([PYTHON, *command, *given], workdir, changed, stdin, terminal)


@pytest.fixture
def start(s3: S3Server, api: ConversionApi, bucket: TestBucket, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start the script with some arguments, in an empty directory that later calls share."""
    workdir = tmp_path / "work"
    workdir.mkdir()
    started: list[Run] = []

    def start(*arguments: str, **named: Any) -> Run:
        started.append(launch(*arguments, workdir=workdir, s3=s3, api=api, bucket=bucket, **named))
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
