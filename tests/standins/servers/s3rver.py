"""s3rver for the tests, on 127.0.0.1.

    python -m tests.standins.servers.s3rver DIRECTORY [PORT [CERTIFICATE]]    in the foreground, until SIGTERM

It is a package of npm.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import ClassVar

from tests.standins.s3_server import HOST
from tests.standins.servers.daemons import missing_programs
from tests.standins.servers.packaged import Command, Packaged, serve


class S3rver(Packaged):
    """A running s3rver, with its objects on the disk."""

    name = package = "s3rver"
    module = "tests.standins.servers.s3rver"
    program = "node_modules/s3rver/bin/s3rver.js"
    access_key = secret_key = "S3RVER"  # it has no others
    lacks: ClassVar = {
        "secrets": "it takes any",
        "cut puts": "what a killed client was putting is there as far as it came, without its metadata",
    }

    @classmethod
    def version(cls) -> str:
        """What its package says."""
        told = json.loads((Path(cls.installed()).parents[1] / "package.json").read_text())
        return f"s3rver {told['version']}"

    @classmethod
    def missing(cls) -> str:
        """What to do when it is not installed; empty if it is."""
        return missing_programs(["node"], "nodejs") or super().missing()


def command(root: Path, port: int, certificate: str) -> Command:
    """What starts it."""
    tls = ["--key", certificate, "--cert", certificate] if certificate else []
    served = [
        "--directory",
        str(root / "data"),
        "--address",
        HOST,
        "--port",
        str(port),
        "--silent",
        "--no-vhost-buckets",
    ]
    return Command(["node", S3rver.installed(), *served, *tls], {})


if __name__ == "__main__":
    serve(S3rver.name, command, sys.argv[1:])
