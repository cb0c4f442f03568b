"""The summary and the metrics where they are no ordinary files: devices, links, mounts, pipes, closed folders."""

import fcntl
import itertools
import json
import os
import select
import stat
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from tests.standins.conversion_api import ConversionApi
from tests.standins.program import IS_ROOT, SCRIPT, UNPRIVILEGED

Cli = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("cheap_object")
# In a mount namespace of its own, so that no other process sees it; `mounted` lies over itself there.
MOUNTING = "mount --bind mounted mounted"
MOUNTING_IN_A_READ_ONLY_FOLDER = (
    "mount --bind closed closed && mount -o remount,bind,ro closed && mount --bind mounted closed/kept.sum"
)


def mounted(mounting: str) -> tuple[str, str]:
    """The command of a run that sees these mounts."""
    shell = ["sh", "-c", f'{mounting} && exec "$0" -m s3_bulk_convert "$@"']
    unshared = ["unshare", *(["-m"] if IS_ROOT else ["-rm"]), *shell]
    return "-c", f"import os, sys; os.execvp('unshare', [*{unshared}, sys.executable, *sys.argv[1:]])"


WITH_A_MOUNT, WITH_A_MOUNT_IN_A_READ_ONLY_FOLDER = map(mounted, (MOUNTING, MOUNTING_IN_A_READ_ONLY_FOLDER))


def written(path: str) -> tuple[str, ...]:
    """The options that have both written to one kind of path."""
    return "--set", f"run.summary={path}.sum", "--set", f"run.metrics={path}.prom"


def assert_written(folder: Path, name: str) -> None:
    assert json.loads((folder / f"{name}.sum").read_text())["converted"] == 1
    assert "s3_bulk_convert_last_exit_code{" in (folder / f"{name}.prom").read_text()
    assert list(folder.glob("*.tmp")) == []


def test_the_file_behind_a_link_is_written_and_the_link_stays(run_cli: Cli, work: Path) -> None:
    (work / "elsewhere").mkdir()
    for end in (".sum", ".prom"):
        (work / f"link{end}").symlink_to(f"elsewhere/real{end}")
    # The first time there is nothing behind it, the second time there is.
    for _ in range(2):
        run = run_cli(*written("link"), "--set", "run.checkpoint=elsewhere/c")
        assert (run.exit_code, run.err.count("cannot be written")) == (0, 0)
        assert (work / "link.sum").is_symlink()
        assert (work / "link.prom").is_symlink()
    assert json.loads((work / "elsewhere/real.sum").read_text())["already_done"] == 1
    assert "s3_bulk_convert_last_exit_code{" in (work / "elsewhere/real.prom").read_text()
    assert sorted(path.name for path in (work / "elsewhere").glob("real*")) == ["real.prom", "real.sum"]


@pytest.mark.parametrize("name", ["plain", "l" * 250, "\N{BICYCLE}" * 62], ids=["short", "long", "of few characters"])
def test_an_ordinary_file_is_replaced_whole(name: str, run_cli: Cli, work: Path) -> None:
    (work / f"{name}.sum").write_text("old" * 1000)
    os.link(work / f"{name}.sum", work / "before.sum")
    assert run_cli(*written(name)).exit_code == 0
    assert_written(work, name)
    # Who has the old one open reads it to its end.
    assert (work / "before.sum").read_text() == "old" * 1000


def test_what_is_read_and_what_the_checkpoint_is_made_of_is_not_written_over(
    run_cli: Cli, work: Path, api: ConversionApi
) -> None:
    ini, checkpoint = "[run]\ncheckpoint = kept\n[api]\nkey_file = key\n", "the checkpoint{} file"
    (work / "config.ini").write_text(ini)
    (work / "key").write_text(api.api_key)
    (work / "keys").write_text("a.png\n")
    (work / "kept").touch()
    (work / "to").symlink_to("key")
    os.link(work / "kept", work / "hard")
    refused = {f"kept{end}": checkpoint.format(end) for end in ("-wal", "-shm", "-journal", ".lock")}
    refused |= {
        "hard": checkpoint.format(""),
        "./config.ini": "the configuration file",
        str(SCRIPT): "the program file",
    }
    refused |= {"to": "the API key file", "keys": "the --keys-from file"}
    by_option = itertools.cycle(("run.summary", "run.metrics", "run.failures"))
    assert len(refused) % 3 == 0  # the last of them, to which failures would be appended
    for (path, what), option in zip(refused.items(), by_option, strict=False):
        run = run_cli("--check", "--keys-from", "keys", "--set", f"{option}={path}")
        assert run.exit_code == 2
        assert f"{option} = {path}: is {what} as well; give it another path" in run.err
    # Nothing is lost in a device, and with a shard the files have names of their own.
    run = run_cli("--set", "run.metrics=/dev/null", "--set", "run.summary=key", "--shard=0/2", "--keys-from=/dev/null")
    assert "as well" not in run.err
    assert ((work / "config.ini").read_text(), (work / "key").read_text()) == (ini, api.api_key)


@pytest.mark.parametrize(
    ("link", "other"),
    [
        ("summary", "failures"),
        pytest.param("metrics", "failures", marks=pytest.mark.slow),
        pytest.param("summary", "metrics", marks=pytest.mark.slow),
    ],
)
def test_a_link_to_a_file_that_is_written_as_well_is_refused(link: str, other: str, run_cli: Cli, work: Path) -> None:
    (work / "kept").write_text('{"key": "a.png"}\n')
    (work / "link").symlink_to("kept")
    run = run_cli("--set", f"run.{link}=link", "--set", f"run.{other}=kept")
    assert (run.exit_code, (work / "kept").read_text()) == (2, '{"key": "a.png"}\n'), run.err
    assert "file as well; give it another path" in run.err


def test_files_in_a_folder_where_no_file_may_be_made_are_written_into(run_cli: Cli, work: Path) -> None:
    (work / "closed").mkdir()
    for end in (".sum", ".prom"):
        (work / f"closed/kept{end}").write_text("old" * 5000)
    (work / "closed").chmod(0o555)
    run = run_cli(*written("closed/kept"), command=UNPRIVILEGED)
    assert (run.exit_code, run.err.count("cannot be written")) == (0, 0), run.err
    assert_written(work / "closed", "kept")


def test_mounted_files_are_written_into(run_cli: Cli, work: Path) -> None:
    (work / "mounted").touch()
    given = ("--set", "run.summary=mounted")
    run = run_cli(*given, command=WITH_A_MOUNT)
    assert (run.exit_code, run.err.count("cannot be written")) == (0, 0), run.err
    # Seen from outside the mount, it is the same file.
    assert json.loads((work / "mounted").read_text())["converted"] == 1
    assert list(work.glob("mounted.*")) == []


def test_files_that_are_mounted_in_a_read_only_folder_are_written_into(run_cli: Cli, work: Path) -> None:
    (work / "closed").mkdir()
    for name in ("mounted", "closed/kept.sum"):
        (work / name).touch()
    run = run_cli("--set", "run.summary=closed/kept.sum", command=WITH_A_MOUNT_IN_A_READ_ONLY_FOLDER)
    assert (run.exit_code, run.err.count("cannot be written")) == (0, 0), run.err
    assert json.loads((work / "mounted").read_text())["converted"] == 1
    assert list(work.glob("**/*.tmp")) == []


def test_pipes_are_written_into_and_are_pipes_still(start: Cli, work: Path) -> None:
    read: dict[str, str] = {}

    def reader(name: str) -> threading.Thread:
        os.mkfifo(work / name)
        # Open for both, so that there is a reader from the start and no end before the script has written.
        pipe = os.open(work / name, os.O_RDWR)
        thread = threading.Thread(target=lambda: read.update({name: os.read(pipe, 20).decode()}), daemon=True)
        thread.start()
        return thread

    threads = [reader("pipe.sum"), reader("pipe.prom")]
    run = start(*written("pipe"))
    for thread in threads:
        thread.join(30)
    assert run.wait().exit_code == 0
    assert (read["pipe.sum"][:1], read["pipe.prom"][:7]) == ("{", "# HELP ")
    assert stat.S_ISFIFO((work / "pipe.sum").stat().st_mode)
    assert stat.S_ISFIFO((work / "pipe.prom").stat().st_mode)


def wait_until_full(pipe: IO[Any], run: Any) -> None:
    """Wait until a pipe has no room left for three more lines of a run's, or the run has ended."""
    size, unread = fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ), 0
    while unread < size - 1_000 and run.process.poll() is None:
        time.sleep(0.01)
        unread = int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def read_to_the_end(pipe: IO[bytes], run: Any) -> bytes:
    """All that comes through a pipe until the run has ended."""
    read, has_ended = b"", False
    while not has_ended:
        has_ended = run.process.poll() is not None
        while select.select([pipe], [], [], 0.1)[0]:
            read += pipe.read(4096)
    return read


@pytest.mark.parametrize("stream", ["stdout", pytest.param("stderr", marks=pytest.mark.slow)])
def test_failures_wait_for_a_slow_reader_of_a_stream(stream: str, start: Cli, bucket: Any) -> None:
    for number in range(40):
        bucket.put(f"{number:02}.png", b"\x89PNG\r\n\x1a\n")
    too_large = ("--set", "api.max_size=1", "--set", "run.max_failure_rate=never", "--log-format", "json")
    run = start("-q", *too_large, "--set", f"run.failures=/dev/{stream}")
    pipe = getattr(run.process, stream)
    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
    wait_until_full(pipe, run)
    assert run.wait().exit_code == 1, run.out + run.err
    said = [json.loads(line) for line in (run.out if stream == "stdout" else run.err).splitlines() if line[:1] == "{"]
    keys = [line["key"] for line in said if "key" in line and "event" not in line]
    assert sorted(keys) == [*(f"{number:02}.png" for number in range(40)), "a.png"]


def test_a_pipe_that_is_read_late_gets_all_failures(start: Cli, work: Path, bucket: Any) -> None:
    for number in range(40):
        bucket.put(f"{number:02}.png", b"\x89PNG\r\n\x1a\n")
    os.mkfifo(work / "pipe")
    # Open for both, so that it does not end between two pages of failures.
    with os.fdopen(os.open(work / "pipe", os.O_RDWR), "rb", buffering=0) as pipe:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
        named = ("--set", "api.max_size=1", "--set", "run.max_failure_rate=never", "--set", "run.failures=pipe")
        run = start("-q", *named)
        wait_until_full(pipe, run)
        assert run.process.poll() is None, run.wait()
        lines = read_to_the_end(pipe, run).splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    assert sorted(keys) == [*(f"{number:02}.png" for number in range(40)), "a.png"]
    assert run.wait().exit_code == 1


def test_pipes_that_nobody_reads_hold_up_nothing(start: Cli, work: Path, bucket: Any) -> None:
    for name in ("pipe.sum", "pipe.prom"):
        os.mkfifo(work / name)
    run = start(*written("pipe")).wait(20)
    assert run.exit_code == 0
    assert "pipe.sum cannot be written" in run.err
    assert "pipe.prom cannot be written" in run.err
    assert len(bucket.outputs()) == 1


def device(path: Path) -> None:
    """A device that takes everything, as /dev/null is one; the machine's own is not at risk."""
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))


@pytest.mark.skipif(not IS_ROOT, reason="only root can make a device")
def test_a_device_stays_one(run_cli: Cli, work: Path) -> None:
    device(work / "null.sum")
    device(work / "null.prom")
    run = run_cli(*written("null"))
    assert (run.exit_code, run.err.count("cannot be written")) == (0, 0), run.err
    assert stat.S_ISCHR((work / "null.sum").stat().st_mode)
    assert stat.S_ISCHR((work / "null.prom").stat().st_mode)


def test_the_standard_output_gets_the_summary_before_the_words_for_people(run_cli: Cli, work: Path) -> None:
    # As /dev/stdout is one; the machine's own is not at risk.
    (work / "stdout").symlink_to("/proc/self/fd/1")
    run = run_cli("--set", "run.summary=stdout")
    assert (run.exit_code, run.err.count("cannot be written")) == (0, 0), run.err
    found, end = json.JSONDecoder().raw_decode(run.out)
    assert found["converted"] == 1
    assert run.out[end:].partition(" ")[2].startswith("ended with exit code 0\nconverted ")
    assert (work / "stdout").is_symlink()


def test_the_standard_output_that_is_a_file_keeps_all_that_was_written(start: Cli, work: Path) -> None:
    (work / "stdout").symlink_to("/proc/self/fd/1")
    with (work / "out").open("wb") as out:
        out.write(b"before\n")
        out.flush()
        run = start("--set", "run.summary=stdout", terminal=out.fileno()).wait()
    told = (work / "out").read_text()
    assert run.exit_code == 0
    assert told.startswith("before\n")
    assert '"converted": 1,' in told
    assert "\nconverted     1" in told


@pytest.mark.parametrize(
    "mode", [pytest.param("ab", id="appended to", marks=pytest.mark.slow), pytest.param("wb", id="written anew")]
)
def test_both_streams_may_lead_to_one_file_that_a_shell_has_opened(
    mode: str, start: Cli, work: Path, bucket: Any
) -> None:
    bucket.put("a.heic", b"\x89PNG\r\n\x1a\n")
    for number, name in enumerate(("stdout", "stderr"), 1):
        (work / name).symlink_to(f"/proc/self/fd/{number}")
    with (work / "out").open(mode) as out:
        run = start("--set", "run.summary=stdout", "--set", "run.failures=stderr", terminal=out.fileno()).wait()
    told = (work / "out").read_text()
    assert (run.exit_code, '"converted": 1,' in told, '"code": "output_collision"' in told) == (1, True, True), told
