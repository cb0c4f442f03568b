"""Programs of the machine that serve a test: started one after the other, ended together, whatever ends first."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, NoReturn

from tests.standins.s3_server import HOST, end_with_parent

if TYPE_CHECKING:
    from typing_extensions import Self

STOP_SECONDS = 10.0  # for each


def end_all(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """End programs, the last one first, by force if need be."""
    for daemon in reversed(running):
        daemon.terminate()
        try:
            daemon.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


class Daemons:
    """Running programs. They end with the block; the kernel kills them when this process ends in another way."""

    def __init__(self, logs: Path) -> None:
        self._logs, self._running = logs, list[subprocess.Popen[bytes]]()

    def __enter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        end_all(self._running)

    def spawn(self, *command: str, environment: Mapping[str, str] | None = None) -> None:
        """Start a program that stays in the foreground."""
        # Its end of our standard output is what tells S3Server.kill that a daemon is still there.
        witness = os.dup(sys.stdout.fileno())
        with (self._logs / f"{Path(command[0]).name}.out").open("ab") as out:
            daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                pass_fds=(witness,),
                env={**os.environ, **(environment or {})},
            )
        os.close(witness)
        self._running.append(daemon)

    def wait_for(self, what: str, has_come: Callable[[], bool], *, seconds: float) -> None:
        """Wait until something serves; if it does not, or any program ends, leave with their last words."""
        deadline = monotonic() + seconds
        while not has_come():
            ended = [daemon.args for daemon in self._running if daemon.poll() is not None]
            if ended or monotonic() > deadline:
                logs = "".join(path.read_text(errors="replace")[-2000:] for path in self._logs.iterdir())
                raise SystemExit(f"{what} is not ready; ended: {ended}\n{logs}")
            threading.Event().wait(0.05)


def claimed_port(port: int) -> int:
    """A port, or with 0 any that is free. Raises OSError if somebody has it: he would be taken for the server."""
    with socket.create_server((HOST, port)) as listener:
        return int(listener.getsockname()[1])


def listens(port: int) -> bool:
    """Whether somebody takes connections on a port."""
    try:
        socket.create_connection((HOST, port), timeout=5).close()
    except OSError:
        return False
    return True


def missing_programs(names: Sequence[str], packages: str) -> str:
    """What to do when programs are not installed; empty if all are."""
    missing = [name for name in (*names, "setpriv") if shutil.which(name) is None]
    advice = f"apt-get install -y --no-install-recommends {packages} util-linux"
    return f"{', '.join(missing)}: not installed; on Debian: {advice}" if missing else ""


def serve_until_signal(start: Callable[[Daemons], str], logs: Path) -> NoReturn:
    """Start programs, say where they serve, and end them when a signal comes."""
    end_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    with Daemons(logs) as daemons:
        print(f"READY {start(daemons)}", flush=True)
        while True:
            signal.pause()
