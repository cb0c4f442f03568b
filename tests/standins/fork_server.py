"""A process that has read the script and what it imports, and forks for each run of it: that saves most of a start.

A run that is started so is a process like any other: a child of the tests' own, with its pid, streams, directory,
environment and signals; test_fork_server.py compares the two. What Python and the packages read while they start (the
locale, Python's own variables) is the same in all runs: a run that wants another is started by itself.

S3_TEST_PLAIN_STARTS=1 starts each run by itself.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib.util
import json
import multiprocessing.process
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import boto3
from botocore import hooks
from botocore.loaders import JSONFileLoader, Loader

MODULE = "s3_bulk_convert"
# How code begins that changes the script: see script_with.
IMPORTING = f"import {MODULE} as program\n"
# Variables that are read while Python, its libraries and the packages start. All others a run finds when it looks.
READ_EARLY = ("PYTHON", "LC_", "LANG", "LD_", "MALLOC_", "OPENSSL_", "TQDM_", "TZ")
MESSAGE_BYTES = 150_000
PR_SET_CHILD_SUBREAPER = 36


########################################################################
# In the tests' process
########################################################################


class ForkServer:
    """Forks runs of one interpreter with one environment, until this process ends."""

    def __init__(self, python: str, environment: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._libc = ctypes.CDLL(None)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [python, __file__, str(theirs.fileno())]
            # It ends with this process, whose end of the channel is then closed. Its streams are of the runs' kinds.
            self._process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )

    def fork(self, arguments: list[str], cwd: str, environment: Mapping[str, str], streams: list[int]) -> int:
        """Start a run, which is a child of this process, and return its pid."""
        message = json.dumps([arguments, cwd, dict(environment)]).encode()
        with self._lock:
            # The server's grandchild has no parent any more: for this moment this process takes in its orphans.
            self._libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            socket.send_fds(self._channel, [message], streams)
            pid = self._channel.recv(100)
            self._libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        if not pid:
            raise RuntimeError(f"the fork server has ended:\n{self._process.communicate()[1].decode()}")
        return int(pid)


@functools.cache
def server_for(python: str, path: str, python_path: str) -> ForkServer:
    """The one server of such runs."""
    return ForkServer(python, {"PATH": path, "PYTHONPATH": python_path})


class ForkedRun(subprocess.Popen[str]):
    """A run that a server starts; all else is Popen's own."""

    def _execute_child(self, args: Any, *given: Any) -> None:
        cwd, environment = given[4:6]
        _, _, _, output, _, errors = given[9:15]  # its ends of the pipes
        server = server_for(args[0], environment["PATH"], environment["PYTHONPATH"])
        self.pid = server.fork(args[1:], str(cwd), environment, [0, output, errors])
        self._child_created = True
        os.close(output)
        os.close(errors)


def can_fork(command: list[str], environment: Mapping[str, str], stdin: int | None, terminal: int | None) -> bool:
    """Whether a start by a server is the same as a start by itself."""
    is_script = command[1:3] == ["-m", MODULE] or (command[1] == "-c" and command[2].startswith(IMPORTING))
    early = {name for name in environment if name == "PATH" or name.startswith(READ_EARLY)}
    is_plain = sys.platform != "linux" or bool(os.environ.get("S3_TEST_PLAIN_STARTS"))
    return is_script and early == {"PATH", "PYTHONPATH"} and stdin is terminal is None and not is_plain


########################################################################
# In the server's process, and in those that it forks
########################################################################


def serve(channel: socket.socket) -> tuple[bytes, list[int]]:
    """Fork for each message. Returns it with the streams, in the new process."""
    while True:
        message, streams, *_ = socket.recv_fds(channel, MESSAGE_BYTES, 3)
        if not message:
            os._exit(0)
        reading, writing = os.pipe()
        waiting, starting = os.pipe()
        middle = os.fork()
        if not middle:
            pid = os.fork()
            if pid:
                os.write(writing, str(pid).encode())
                os._exit(0)
            channel.close()
            os.close(starting)
            os.read(waiting, 1)  # until the server has closed the other end
            for number in (reading, writing, waiting):
                os.close(number)
            return message, streams
        # Only then is the run a child of the tests, and finds out no other parent.
        os.waitpid(middle, 0)
        channel.send(os.read(reading, 100))
        for number in (reading, writing, waiting, starting, *streams):
            os.close(number)


def remember_models() -> None:
    """Have what boto3 knows of S3, and what it makes of it, read and made once in this process: it does not change."""
    for name in ("exists", "load_file"):
        setattr(JSONFileLoader, name, staticmethod(functools.cache(getattr(JSONFileLoader(), name))))
    loaders: Any = Loader
    events: Any = hooks
    loaders.list_available_services = staticmethod(functools.cache(Loader().list_available_services))
    events.EventAliaser._alias_event_name = events.EventAliaser(None)._alias_event_name
    events.accepts_kwargs = functools.cache(events.accepts_kwargs)


def read_models() -> None:
    """Read it now: that is half of what is left of a start."""
    os.environ.update(AWS_CONFIG_FILE=os.devnull, AWS_SHARED_CREDENTIALS_FILE=os.devnull)
    remember_models()
    boto3.session.Session().client("s3", "us-east-1", aws_access_key_id="-", aws_secret_access_key="-")


def end_at_once(code: object) -> None:
    """End as Python does, but for taking apart all that is imported, which is half of what a short run costs."""
    if isinstance(code, int):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Statements(dict[str, Any]):
    """The names of a module as its own statements find them: they see that it is not the main module yet."""

    def __init__(self, names: dict[str, Any]) -> None:
        super().__init__(__name__=MODULE)
        self._names = names

    def __setitem__(self, name: str, value: object) -> None:
        self._names[name] = value


def read_script() -> ModuleType:
    """The script as the main module, but for what it does as such, which is left to each run."""
    spec: Any = importlib.util.find_spec(MODULE)
    script = importlib.util.module_from_spec(spec)
    sys.modules["__main__"] = script
    script.__name__ = "__main__"
    exec(spec.loader.get_code(MODULE), vars(script), Statements(vars(script)))
    return script


def main_blocks(path: str) -> list[CodeType]:
    """What the script does as the main module."""
    text = Path(path).read_text()
    blocks = re.finditer(r'^if __name__ == "__main__".*\n(?: .*\n)+', text, re.MULTILINE)
    # Each in its line, which a traceback names.
    return [compile("\n" * text.count("\n", 0, block.start()) + block[0], path, "exec") for block in blocks]


def run_script(script: ModuleType, blocks: list[CodeType], arguments: list[str]) -> None:
    """What `python -m` does now."""
    del sys.modules[MODULE]
    sys.argv = [str(script.__file__), *arguments]
    sys.path.insert(0, os.getcwd())
    for block in blocks:
        exec(block, vars(script))


def run_code(code: str, arguments: list[str]) -> None:
    """What `python -c` does now."""
    sys.argv = ["-c", *arguments]
    sys.path.insert(0, "")
    exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))


def main() -> None:
    """Be the server, and then, in each forked process, what its arguments say."""
    locale = {name: value for name, value in os.environ.items() if name.startswith("LC_")}  # set by Python itself
    del sys.path[0]
    importlib.import_module(MODULE)
    script = read_script()
    blocks = main_blocks(str(script.__file__))
    read_models()
    gc.freeze()
    message, streams = serve(socket.socket(fileno=int(sys.argv[1])))
    (kind, what, *arguments), cwd, environment = json.loads(message)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(cwd)
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()  # type: ignore[attr-defined]
    os.environ.clear()
    os.environ.update({**locale, **environment})
    gc.unfreeze()
    # Under the second name, multiprocessing looks for what its other processes have sent.
    sys.modules["__main__"] = sys.modules["__mp_main__"] = script if kind == "-m" else ModuleType("__main__")
    try:
        if kind == "-m":
            run_script(script, blocks, arguments)
        else:
            run_code(what, arguments)
    except SystemExit as ended:
        end_at_once(ended.code)
        raise


if __name__ == "__main__":
    main()
