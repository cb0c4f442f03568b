"""Show the program at work on this machine: a bucket full of real files is converted, and then not converted again.

It starts a real S3 server and a conversion API on 127.0.0.1, runs the program twice as a user would, and checks what it
says about it. Exit code 0: all of it is true; 1: something is not, and is named; 128 + n: ended by signal n.

    python -m tests.demo
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # a Ctrl-C while all this is imported ends the demo without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import io
import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tests.standins.conversion_api import ConversionApi
from tests.standins.s3_server import HOST, PROJECT, S3Server
from tests.standins.samples import number_in, photo_samples

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BUCKET = "demo-photos"
OUTPUT_PREFIX = "converted/"  # the program's default
SAMPLES = 60
LATENCY_SECONDS = 0.15  # so that the progress bar can be watched
SAMPLES_SHOWN = slice(0, None, 13)  # from each kind of folder one
OUTPUTS_SHOWN = slice(0, None, 10)  # the same, and the archive of pages
MESSAGE_WIDTH = 60
CHILD_SECONDS = 10  # what is in flight takes less than one to finish

PROGRAM = PROJECT / "s3_bulk_convert.py"
FAILURES = "conversion_failures.jsonl"
# The samples have more broken files than the 2 % at which the program would stop, and it would log each hundredth only.
FLAGS = ("--set", "run.max_failure_rate=never", "--set", "run.log_every=20")

# What a user may have set, and what would lead the program or this demo to other servers than these two.
FOREIGN_SETTINGS = ("AWS_", "CTF_", "S3_", "SOURCE_PREFIX")

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A terminal sends these to every process in it, but the program needs the S3 server to finish what is in flight.
SIGNALS_OF_TERMINALS = (signal.SIGINT, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asks to end. It is no Exception, because boto3 would take that for a failure of the network."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass(frozen=True)
class Output:
    """One object that the program has stored."""

    key: str
    media_type: str
    size: int
    etag: str
    numbers: tuple[int | None, ...]  # what each of its pictures shows; None: it is no picture with a number


@dataclass(frozen=True)
class Servers:
    """The two servers, and the directory in which the program runs."""

    s3: S3Server
    api: ConversionApi
    directory: Path


class Claims:
    """What the demo says about the program. Each sentence is checked when it is said."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def claim(self, sentence: str, *, is_true: bool) -> None:
        """Print a sentence, and whether it is true."""
        print(f"  {'yes' if is_true else 'NOT TRUE'}: {sentence}")
        if not is_true:
            self.wrong.append(sentence)


########################################################################
# The story
########################################################################


def demonstrate(claims: Claims) -> None:
    """Show everything, between the start of both servers and their end."""
    with running_servers() as servers:
        endpoints = (servers.s3.endpoint, servers.api.url)
        say("Two servers, on this machine only:")
        print(f"  {endpoints[0]}  OpenStack Swift, a real S3 server")
        print(f"  {endpoints[1]}  a conversion API that does convert, and takes {LATENCY_SECONDS} s for each file")
        bucket = servers.s3.client()
        samples = fill(bucket)
        show_forecast(servers, claims)
        outputs = show_first_run(servers, bucket, samples, claims)
        show_second_run(servers, bucket, outputs, claims)
    files = [path for path in (servers.s3.directory, servers.directory) if path is None or path.exists()]
    is_over = not files and not any(is_listening(url) for url in endpoints)
    claims.claim("both servers have ended, and no files are left behind", is_true=is_over)


def show_forecast(servers: Servers, claims: Claims) -> None:
    """Ask what a run would come to."""
    say("What would it come to? In an empty directory, with nothing but environment variables and flags:")
    code = run_program(servers, "--dry-run")
    sent = [request.path for request in servers.api.requests if request.is_conversion]
    is_forecast = code == 0 and not sent and not list(servers.directory.iterdir())
    claims.claim(f"conversions asked for: {len(sent)}, files written: 0", is_true=is_forecast)


def show_first_run(servers: Servers, bucket: S3Client, samples: dict[str, bytes], claims: Claims) -> list[Output]:
    """Convert the bucket, and check what came of it."""
    say("Convert them all to JPEG:")
    code = run_program(servers)
    outputs, failures = outputs_in(bucket), read_failures(servers.directory / FAILURES)
    show_outputs(outputs)
    show_failures(failures)
    say("Is that what should have come out?")
    claims.claim(f"exit code {code}: finished, but some objects failed", is_true=code == 1)
    check_outputs(samples, outputs, claims)
    check_failures(samples, failures, claims)
    paid = len(servers.api.paid)
    is_fair = paid == len(outputs) and not servers.api.paid_twice()
    claims.claim(f"conversions paid, by the API's own count: {paid}, one for each output", is_true=is_fair)
    return outputs


def show_second_run(servers: Servers, bucket: S3Client, outputs: list[Output], claims: Claims) -> None:
    """Run the same command again, and check that it did nothing."""
    requests_before, paid_before = len(servers.api.requests), len(servers.api.paid)
    say("The same again. Nothing has changed, so nothing may be sent, not even the broken files:")
    code = run_program(servers)
    requests, paid = len(servers.api.requests) - requests_before, len(servers.api.paid) - paid_before
    say("Was nothing sent again?")
    claims.claim(f"exit code {code}: nothing left to do", is_true=code == 0)
    claims.claim(f"by the API's own count, requests: {requests}, paid: {paid}", is_true=not requests and not paid)
    claims.claim("the outputs are the same as before", is_true=bool(outputs) and outputs_in(bucket) == outputs)


def check_outputs(samples: dict[str, bytes], outputs: Sequence[Output], claims: Claims) -> None:
    """Compare what the pictures show; the demo reads the samples itself, it does not ask the program."""
    good = [output for output in outputs if None not in output.numbers]
    all_open = bool(good) and len(good) == len(outputs)
    claims.claim(f"{len(good)} of {len(outputs)} outputs open as images", is_true=all_open)
    expected = sorted(number for number in map(shown_number, samples.values()) if number is not None)
    shown = [output.numbers[0] for output in good]
    is_own = sorted(number for number in shown if number is not None) == expected
    is_own &= shown == [number_in_key(output.key) for output in good]
    claims.claim("each shows the picture of its own source, and every readable source has one", is_true=is_own)


def check_failures(samples: dict[str, bytes], failures: Sequence[dict[str, object]], claims: Claims) -> None:
    """Compare the failures with the samples that cannot be read; what has no content is not tried at all."""
    unreadable = sorted(key for key, body in samples.items() if body and shown_number(body) is None)
    is_right = sorted(str(failure["key"]) for failure in failures) == unreadable
    claims.claim(f"failures: {len(failures)}, the unreadable files and no others", is_true=is_right)


########################################################################
# The bucket
########################################################################


def fill(bucket: S3Client) -> dict[str, bytes]:
    """Make a bucket of sample files, and say what is in it."""
    samples = dict(photo_samples(SAMPLES))
    bucket.create_bucket(Bucket=BUCKET)
    for key, body in samples.items():
        bucket.put_object(Bucket=BUCKET, Key=key, Body=body)
    endings = Counter(PurePosixPath(key).suffix.lower().lstrip(".") or "folder" for key in samples)
    kinds = ", ".join(f"{count} {ending}" for ending, count in endings.most_common())
    say(f"The bucket {BUCKET} has {len(samples)} real objects ({kinds}; some are broken), among them:")
    for key in list(samples)[SAMPLES_SHOWN]:
        print(f"  {key}")
    return samples


def outputs_in(bucket: S3Client) -> list[Output]:
    """Everything below the output prefix, in the order of keys; less than one page of a listing."""
    outputs = []
    for listed in bucket.list_objects_v2(Bucket=BUCKET, Prefix=OUTPUT_PREFIX).get("Contents", []):
        stored = bucket.get_object(Bucket=BUCKET, Key=listed["Key"])
        body = stored["Body"].read()
        outputs.append(Output(listed["Key"], stored["ContentType"], len(body), stored["ETag"], shown_numbers(body)))
    return outputs


def shown_numbers(body: bytes) -> tuple[int | None, ...]:
    """The number that each picture in a file shows: one file, or an archive of pages."""
    if not zipfile.is_zipfile(io.BytesIO(body)):
        return (shown_number(body),)
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        return tuple(shown_number(archive.read(name)) for name in archive.namelist()) or (None,)


def shown_number(body: bytes) -> int | None:
    """The number that a picture shows; None if Pillow cannot read it."""
    try:
        return number_in(body)
    except (OSError, ValueError, SyntaxError):
        return None


def number_in_key(key: str) -> int | None:
    """The number that the key of a sample, and so of its output, has."""
    match = re.search(r"[ _](\d{4})\.", key)
    return int(match[1]) if match else None


########################################################################
# The program
########################################################################


def run_program(servers: Servers, *flags: str) -> int:
    """Run the program as a user would, after showing the command, and return its exit code."""
    variables = {
        "CTF_API_KEY": servers.api.api_key,
        "S3_BUCKET": BUCKET,
        "TARGET_FORMAT": "jpg",
        "CONCURRENCY": "10",
        **servers.s3.environment(),
    }
    command = [sys.executable, str(PROGRAM), "--set", f"api.url={servers.api.url}", *FLAGS, *flags]
    if flags:
        show_command(servers.directory, variables, command)
    else:
        print("$ (the same command, but for --dry-run)", flush=True)
    # Output and errors go where the demo's own go, so that on a terminal there is a progress bar.
    process = subprocess.Popen(command, cwd=servers.directory, env=os.environ | variables)
    with surely_ended(process):
        return process.wait()


@contextmanager
def surely_ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leave no process behind. After a Ctrl-C, which it has got, too, it may finish; a second signal would cut it."""
    try:
        yield
    finally:
        for hurry in (process.terminate, process.kill):
            try:
                process.wait(CHILD_SECONDS)
            except subprocess.TimeoutExpired:
                hurry()
        process.wait()


def read_failures(path: Path) -> list[dict[str, object]]:
    """The lines of the failures file, none if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


########################################################################
# The servers
########################################################################


@contextmanager
def running_servers() -> Iterator[Servers]:
    """Both servers and an empty directory, all gone afterwards."""
    with ExitStack() as stack:
        with signals_held_back():
            s3 = stack.enter_context(S3Server())
        api = stack.enter_context(ConversionApi(latency=LATENCY_SECONDS))
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="demo-"))
        yield Servers(s3, api, Path(directory))


@contextmanager
def signals_held_back() -> Iterator[None]:
    """A process started in here does not get what a terminal sends for as long as it lives; this one gets it later."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_OF_TERMINALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS_OF_TERMINALS)


def is_listening(url: str) -> bool:
    """Whether something accepts connections there."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, urlsplit(url).port or 80)) == 0


def stay_on_this_machine() -> None:
    """Forget settings of the user's that would lead elsewhere, and no proxy for what is here."""
    for name in list(os.environ):
        if name.startswith(FOREIGN_SETTINGS):
            del os.environ[name]
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = HOST


########################################################################
# Words
########################################################################


def say(sentence: str) -> None:
    """Print a sentence after an empty line."""
    print(f"\n{sentence}")


def show_command(directory: Path, variables: dict[str, str], command: Sequence[str]) -> None:
    """Print the command as one would type it, a few words to the line."""
    words = [f"{name}={shlex.quote(value)}" for name, value in variables.items()] + list(map(shlex.quote, command))
    cuts = [0, 4, 7, len(variables), len(variables) + 2, len(words)]
    lines = [" ".join(words[start:end]) for start, end in itertools.pairwise(cuts)]
    print(f"$ cd {shlex.quote(str(directory))}")
    print("$", " \\\n    ".join(lines), flush=True)


def show_outputs(outputs: Sequence[Output]) -> None:
    """Print a table of some outputs, from the first to the last."""
    shown = outputs[OUTPUTS_SHOWN]
    say(f"What came out, every tenth of {len(outputs)} (key, media type, size):")
    width = max((len(output.key) for output in shown), default=0)
    for output in shown:
        print(f"  {output.key:{width}}  {output.media_type:15}  {output.size:>7,}")
    print(f"  ... and {len(outputs) - len(shown)} more")


def show_failures(failures: Sequence[dict[str, object]]) -> None:
    """Print the failures file, without what is of no interest here."""
    say(f"What could not be converted, from {FAILURES} (key, code, message):")
    width = max((len(str(failure["key"])) for failure in failures), default=0)
    for failure in failures:
        print(f"  {failure['key']!s:{width}}  {failure['code']!s:17}  {shortened(str(failure['message']))}")


def shortened(message: str) -> str:
    """The beginning of a message, on one line."""
    line = " ".join(message.split())
    return line if len(line) <= MESSAGE_WIDTH else f"{line[: MESSAGE_WIDTH - 3]}..."


########################################################################
# Beginning and end
########################################################################


def end_in_order(number: int, _frame: FrameType | None) -> None:
    """Begin to end, once: the clean-up is short, and a second signal must not break it off."""
    for one in ENDING_SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    raise Interrupted(number)


def verdict(claims: Claims) -> int:
    """Print what was shown, and return the exit code."""
    if claims.wrong:
        say(f"{len(claims.wrong)} of the sentences above are NOT TRUE:")
        print("\n".join(f"  {sentence}" for sentence in claims.wrong))
        return 1
    say("Shown: each picture is converted and paid once, each broken file has its reason, a second run sends nothing.")
    return 0


def main() -> int:
    """Run the demo and return the exit code."""
    for number in ENDING_SIGNALS:
        signal.signal(number, end_in_order)
    stay_on_this_machine()
    claims = Claims()
    try:
        demonstrate(claims)
        return verdict(claims)
    except Interrupted as signalled:
        say("Interrupted. What was started is stopped.")
        return 128 + signalled.number
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        return 1
    except RuntimeError as problem:  # the S3 server did not start; it says why
        print(problem, file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
