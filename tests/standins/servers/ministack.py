"""ministack's S3 for the tests, on 127.0.0.1.

    python -m tests.standins.servers.ministack DIRECTORY [PORT [CERTIFICATE]]    in the foreground, until SIGTERM

It has a virtual environment of its own, made by `make .venv-ministack/ready`: it insists on another botocore.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import ClassVar, NoReturn

from tests.standins.s3_server import HOST, PROJECT, SECRET_KEY, S3Server
from tests.standins.servers.daemons import Daemons, claimed_port, listens, missing_programs, serve_until_signal

ENVIRONMENT = PROJECT / ".venv-ministack"
PYTHON = ENVIRONMENT / "bin" / "python"
ACCESS_KEY = "tester"
START_SECONDS = 60


class Ministack(S3Server):
    """A running ministack, with its objects on the disk."""

    name = "ministack"
    module = "tests.standins.servers.ministack"
    access_key = ACCESS_KEY
    start_seconds = START_SECONDS
    lacks: ClassVar = {
        "secrets": "it checks the signatures of presigned URLs only",
        "strict tags": "its limits of tags were not compared with Amazon's",
        "tags of copies": "it drops those of a copy in parts",
        "regions": "it takes signatures for any region",
        "whole puts": "what is being put when it is killed is there without its metadata",
    }

    @classmethod
    def version(cls) -> str:
        """What pip knows of it."""
        asked = "from importlib.metadata import version; print(version('ministack'))"
        said = subprocess.run([PYTHON, "-c", asked], capture_output=True, text=True, check=True).stdout
        return f"ministack {said.strip()}"

    @classmethod
    def missing(cls) -> str:
        """What to do when it is not installed; empty if it is."""
        return missing_programs([], "") or ("" if PYTHON.exists() else "ministack: make .venv-ministack/ready")


def start(root: Path, port: int, certificate: str, daemons: Daemons) -> str:
    """Start it, and wait until it serves; its address."""
    environment = {
        "GATEWAY_PORT": str(port),
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "S3_PERSIST": "1",
        "S3_DATA_DIR": str(root / "data"),
        "TMPDIR": str(root),
        "LOG_LEVEL": "WARNING",
    }
    served = ["ministack.app:app", "--bind", f"{HOST}:{port}", "--keep-alive", "75", "--workers", "0"]
    tls = ["--certfile", certificate, "--keyfile", certificate] if certificate else []
    daemons.spawn(str(PYTHON), "-m", "hypercorn", *served, *tls, environment=environment)
    daemons.wait_for("ministack", lambda: listens(port), seconds=START_SECONDS)
    return f"{'https' if certificate else 'http'}://{HOST}:{port}"


def main(arguments: list[str]) -> NoReturn:
    """Serve the directory that the command line names, until a signal comes."""
    root, port, certificate = (*arguments, *("", "0", "")[len(arguments) :])
    directory = Path(root).resolve()
    serve_until_signal(partial(start, directory, claimed_port(int(port)), certificate), directory / "log")


if __name__ == "__main__":
    main(sys.argv[1:])
