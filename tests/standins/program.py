"""The script as a process: how it is started, what it is told, and all that it has left behind."""

import hashlib
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.standins.conversion_api import ConversionApi
from tests.standins.fork_server import IMPORTING, ForkedRun, can_fork
from tests.standins.s3_server import PROJECT, S3Server

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

SCRIPT = PROJECT / "s3_bulk_convert.py"
# As a module, because Python keeps a module's bytecode: to compile the script is a sixth of what a start costs.
AS_A_MODULE = ("-m", SCRIPT.stem)
# Root may do everything: without its capabilities, it is a user like any other.
IS_ROOT = os.geteuid() == 0
DROPPING = f"['setpriv', '--bounding-set=-all', sys.executable, '-m', '{SCRIPT.stem}', *sys.argv[1:]]"
UNPRIVILEGED = ("-c", f"import os, sys; os.execvp('setpriv', {DROPPING})") if IS_ROOT else AS_A_MODULE
# The interpreter for the script, if it is not the tests' own: see all_pythons.py.
PYTHON = os.environ.get("S3_TEST_PYTHON", sys.executable)


def script_with(changes: str) -> tuple[str, str]:
    """The real script after some statements about `program`, for other numbers: so that no test waits for a minute."""
    return "-c", f"{IMPORTING}{changes}\nprogram.leave(program.main())"


# It waits for a fraction of a second where the API would be given seconds.
HASTY = script_with("program.JOB_POLL_SECONDS, program.BACKOFF_CAP_SECONDS = (0.1, 0.2), 0.2")


def lose_checkpoint(workdir: Path) -> None:
    """Delete the checkpoint that runs have left: then what lies in the bucket is all that says what was paid."""
    for path in workdir.glob("s3_bulk_convert.sqlite3*"):
        path.unlink()


def shard_of(output_key: str, count: int) -> int:
    """The shard that an object belongs to, by the key of its output."""
    digest = hashlib.blake2b(output_key.removesuffix(".zip").encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count


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
        self.command, self.workdir, self._environment = command, workdir, environment
        output = subprocess.PIPE if terminal is None else terminal
        starter = ForkedRun if can_fork(command, environment, stdin, terminal) else subprocess.Popen[str]
        self.process = starter(
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

    def __repr__(self) -> str:
        """What a person would do to see it again, and what was seen: a failing test prints it."""
        told = f"$ {shlex.join(self.command)}\nexit code {self.exit_code}"
        told += f"\n--- stdout\n{self.out}\n--- stderr\n{self.err}"
        for name in ("CTF_API_KEY", "AWS_SECRET_ACCESS_KEY"):
            told = told.replace(self._environment.get(name) or "\0", "(secret)")
        # What is no UTF-8 cannot be handed on to the process that prints it.
        return told.encode("utf-8", "backslashreplace").decode()

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
