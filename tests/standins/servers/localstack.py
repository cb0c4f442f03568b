"""LocalStack's S3 for the tests, on 127.0.0.1, without Docker.

    python -m tests.standins.servers.localstack DIRECTORY [PORT [CERTIFICATE]]    in the foreground, until SIGTERM

Its objects end with it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

from tests.standins.s3_server import HOST
from tests.standins.servers.packaged import Command, Packaged, serve


class Localstack(Packaged):
    """A running LocalStack that has S3 only."""

    name = "localstack"
    package = "localstack-core"
    module = "tests.standins.servers.localstack"
    lacks: ClassVar = {
        "disk": "its objects end with it",
        "secrets": "it checks no signatures",
        "url signatures": "it checks no signatures",
        "strict tags": "it takes more than ten",
        "pages": "it compares where a page is to begin with keys in percent-encoding, which have another order",
        "aws-chunked": "it takes the body of a PUT apart wherever its coding says so",
        "regions": "it takes signatures for any region",
    }


def command(root: Path, port: int, certificate: str) -> Command:
    """What starts it."""
    environment = {
        "GATEWAY_LISTEN": f"{HOST}:{port}",
        "SERVICES": "s3",
        "DNS_ADDRESS": "0",
        "DISABLE_EVENTS": "1",
        "SKIP_SSL_CERT_DOWNLOAD": "1",
        "OVERRIDE_IN_DOCKER": "0",  # else it takes a container for its own, and writes below /var
        "FILESYSTEM_ROOT": str(root / "files"),
        "TMPDIR": str(root),
        **({"CUSTOM_SSL_CERT_PATH": certificate} if certificate else {}),
    }
    return Command([Localstack.installed(), "-m", "localstack.runtime.main"], environment)


if __name__ == "__main__":
    serve(Localstack.name, command, sys.argv[1:])
