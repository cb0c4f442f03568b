"""S3 servers that are a package of PyPI or npm, each in a directory of its own, made by `make .venv-NAME/ready`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, NoReturn

from tests.standins.s3_server import HOST, PROJECT, S3Server
from tests.standins.servers.daemons import Daemons, claimed_port, listens, missing_programs, serve_until_signal

START_SECONDS = 60
ACCESS_KEY = "tester"


class Packaged(S3Server):
    """A running server of that sort; the package is called `package`, its program stands in its directory."""

    access_key = ACCESS_KEY
    start_seconds = START_SECONDS
    package: ClassVar[str]
    program = "bin/python"

    @classmethod
    def installed(cls) -> str:
        """The path of its program."""
        return str(PROJECT / f".venv-{cls.name}" / cls.program)

    @classmethod
    def version(cls) -> str:
        """What pip knows of it."""
        asked = f"from importlib.metadata import version; print(version({cls.package!r}))"
        said = subprocess.run([cls.installed(), "-c", asked], capture_output=True, text=True, check=True).stdout
        return f"{cls.name} {said.strip()}"

    @classmethod
    def missing(cls) -> str:
        """What to do when it is not installed; empty if it is."""
        is_there = Path(cls.installed()).exists()
        return missing_programs([], "") or ("" if is_there else f"{cls.name}: make .venv-{cls.name}/ready")


class Command(NamedTuple):
    """What starts a server, in the foreground."""

    arguments: Sequence[str]
    environment: Mapping[str, str]


def serve(name: str, command: Callable[[Path, int, str], Command], arguments: Sequence[str]) -> NoReturn:
    """Serve the directory of the command line until a signal comes; `command` is made of it, port and certificate."""
    root, port, certificate = (*arguments, *("", "0", "")[len(arguments) :])
    directory = Path(root).resolve()

    def start(daemons: Daemons) -> str:
        number = claimed_port(int(port))
        made = command(directory, number, certificate)
        daemons.spawn(*made.arguments, environment=made.environment)
        daemons.wait_for(name, lambda: listens(number), seconds=START_SECONDS)
        return f"{'https' if certificate else 'http'}://{HOST}:{number}"

    serve_until_signal(start, directory / "log")
