"""moto's S3 for the tests, on 127.0.0.1.

    python -m tests.standins.servers.moto DIRECTORY [PORT [CERTIFICATE]]    in the foreground, until SIGTERM

Its objects are in its memory, and end with it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

from tests.standins.s3_server import HOST
from tests.standins.servers.packaged import Command, Packaged, serve


class Moto(Packaged):
    """A running moto."""

    name = package = "moto"
    module = "tests.standins.servers.moto"
    lacks: ClassVar = {
        "disk": "its objects end with it",
        "secrets": "it checks no signatures",
        "url signatures": "it checks no signatures",
        "regions": "it takes signatures for any region",
        "strict tags": "it takes two of one name",
        "newlines": "it answers 404 to a PUT of a key with a newline in it",
        "conditional copies": "it takes no notice of x-amz-copy-source-if-match",
    }


def command(root: Path, port: int, certificate: str) -> Command:
    """What starts it."""
    tls = ["--ssl-cert", certificate, "--ssl-key", certificate] if certificate else []
    served = ["-m", "moto.server", "--host", HOST, "--port", str(port), *tls]
    return Command([Moto.installed(), *served], {"TMPDIR": str(root)})


if __name__ == "__main__":
    serve(Moto.name, command, sys.argv[1:])
