"""Whatever happens between its runs, and whenever it is killed: each version is paid once, and the right one stored."""

import hashlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Container
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.standins.conversion_api import ConversionApi, Event, Fault, Request
from tests.standins.converters import Conversion, Converted, marking
from tests.standins.program import AS_A_MODULE, SCRIPT, Run, TestBucket, lose_checkpoint
from tests.standins.s3_server import S3Server

Cli = Callable[..., Any]
Version = tuple[str, str, int | None]  # SHA-256 of the source, target, quality: what is paid for
PNG = b"\x89PNG\r\n\x1a\n"
KEYS = ["a.heic", "a.png", "\u00fcber uns/Foto 1 (2).png", "b/c.png", "b/c.tiff"]
WORKERS = 3


def overloaded() -> Fault:
    """Answer one request with 503."""
    return Fault.status_reply(503, "service_unavailable", retry_after="0")


PASSING_TROUBLES: list[Callable[[], Fault]] = [
    Fault.cut_after_work,
    Fault.cut_before_work,
    Fault.truncated_answer,
    Fault.html_page,
    overloaded,
]
SECONDS_TO_END = 60
run_machine: Callable[..., None] = run_state_machine_as_test  # which Hypothesis has not annotated


def converted(conversion: Conversion) -> Converted:
    """Mark a source with the target and, other than `marking` alone, with the quality."""
    return marking(replace(conversion, source=conversion.source + f" in quality {conversion.quality}".encode()))


def output_key(key: str, target: str) -> str:
    """Where the output of a source goes."""
    return f"converted/{key.rpartition('.')[0]}.{target}"


# ----------------------------------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What a run has to do."""

    convert: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    collide: list[str] = field(default_factory=list)  # looked at again in every run


@dataclass
class Model:
    """What must be stored and paid. After a kill it knows less: what may be stored, what may be paid."""

    target: str = "jpg"
    quality: int | None = None
    live: dict[str, bytes] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)  # output key -> the source that keeps it
    done: dict[tuple[str, str, int | None], bytes] = field(default_factory=dict)
    stored: dict[str, set[bytes | None]] = field(default_factory=dict)  # output key -> what may be there
    due: set[Version] = field(default_factory=set)
    maybe_due: set[Version] = field(default_factory=set)
    unsettled: set[Version] = field(default_factory=set)  # sent by a run that was killed
    in_flight: set[str] = field(default_factory=set)  # sources of which the checkpoint has a request
    exposed: Counter[Version] = field(default_factory=Counter)  # how often more than once it may be paid, and why
    had_other_options: bool = False
    was_lost: bool = False

    def work(self, key: str) -> tuple[str, str, int | None]:
        """One object under the present options."""
        return (key, self.target, self.quality)

    def version(self, key: str) -> Version:
        """What is paid for an object as it is now."""
        return (hashlib.sha256(self.live[key]).hexdigest(), self.target, self.quality)

    def output(self, key: str) -> bytes:
        """What an object must come to."""
        return converted(Conversion(self.live[key], key.rpartition(".")[2], self.target, self.quality)).body

    def plan(self, stored: Container[str]) -> Plan:
        """Give each output key to the first source that wants it, and say what is left to do.

        A source that was deleted before it left an output among those `stored` gives its claim up.
        """
        plan = Plan()
        given_up = {key: owner for key, owner in self.owners.items() if not (owner in self.live or key in stored)}
        self.owners = {key: owner for key, owner in self.owners.items() if key not in given_up}
        for key in sorted(self.live, key=str.encode):
            source, work = self.live[key], self.work(key)
            if self.owners.setdefault(output_key(key, self.target), key) != key:
                plan.collide.append(key)
            else:
                (plan.done if self.done.get(work) == source else plan.convert).append(key)
        # What is in flight of it makes its claim good again when it is put back, unless another has taken the key.
        self.owners = {**{key: owner for key, owner in given_up.items() if owner in self.in_flight}, **self.owners}
        return plan

    def killed(self, plan: Plan, held: Container[str]) -> None:
        """Of what was to be done, any part is done. An output key belongs to what lies there or was sent: `held`."""
        for key in plan.convert:
            planned = output_key(key, self.target)
            self.maybe_due.add(self.version(key))
            self.unsettled.add(self.version(key))
            self.stored.setdefault(planned, {None}).add(self.output(key))
            if not (key in held or planned in held):
                del self.owners[planned]

    def completed(self, plan: Plan) -> None:
        """All is done that was to be done."""
        for key in plan.convert:
            self.due.add(self.version(key))
            self.stored[output_key(key, self.target)] = {self.output(key)}
            self.done[self.work(key)] = self.live[key]
        self.unsettled.clear()

    def can_lose_checkpoint(self) -> bool:
        """Whether what is stored tells all that the checkpoint knew: which source an output key belongs to, say."""
        is_owner = [self.owners.get(output_key(key, self.target), key) == key for key in self.live]
        all_owners_live = set(self.owners.values()) <= set(self.live)
        return bool(self.live) and all(is_owner) and all_owners_live and not (self.had_other_options or self.was_lost)

    def lose_checkpoint(self) -> None:
        """What was sent and not stored is sent again, perhaps in another form: each may be paid once more."""
        self.exposed.update(self.unsettled)
        self.was_lost = True


# ----------------------------------------------------------------------------------------------------------------------
# The machine
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Trap:
    """Kills a process when the API sees an event for the n-th time."""

    event: Event
    nth: int
    process: Any = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def spring(self, event: Event) -> None:
        """Note an event, in the API's own thread: before it goes on, the process is dead."""
        with self.lock:
            self.nth -= event == self.event
            if self.nth == 0 and self.process and event == self.event:
                os.kill(self.process.pid, signal.SIGKILL)


MOMENTS = st.builds(Trap, st.sampled_from(get_args(Event)), st.integers(1, 3))
SOME_KEYS = st.sets(st.sampled_from(KEYS), min_size=1, max_size=3)
TROUBLES = st.lists(st.sampled_from(PASSING_TROUBLES), max_size=2)  # fewer than an object may have


class Resuming(RuleBasedStateMachine):
    """Objects come, change and go; the API has its troubles; the program is run, killed and run again."""

    def __init__(self, s3: S3Server) -> None:
        super().__init__()
        self.model = Model()
        self.transfer = "auto"
        self.puts = 0
        self.is_broken = self.is_changed = False
        self.trap: Trap | None = None
        self.open = ExitStack()
        self.workdir = Path(self.open.enter_context(tempfile.TemporaryDirectory()))
        self.api = self.open.enter_context(
            ConversionApi(convert=converted, compare_raw_body=True, remember_failed_bodies=True)
        )
        for event in get_args(Event):
            self.api.on(event, self._listener(event))
        self.api.behaviour.ca_bundle = s3.ca_bundle
        client = s3.client()
        self.bucket = TestBucket(s3.new_bucket(client), client)
        self.open.callback(s3.drop_bucket, client, self.bucket.name)
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.workdir),
            "PYTHONPATH": str(SCRIPT.parent),
            **s3.environment(),
            "CTF_API_KEY": self.api.api_key,
            "S3_BUCKET": self.bucket.name,
        }

    def _listener(self, event: Event) -> Callable[[Request], None]:
        def listen(_: Request) -> None:
            if self.trap:
                self.trap.spring(event)

        return listen

    def teardown(self) -> None:
        """Whatever has happened, one run brings it to the end."""
        with self.open:
            if not self.is_broken:
                self._run(None)

    # -- rules ---------------------------------------------------------------------------------------------------------

    @initialize(
        transfer=st.sampled_from(["auto", "url", "upload"]),
        accepts=st.booleans(),
        keys=SOME_KEYS,
    )
    def begin(self, *, transfer: str, accepts: bool, keys: set[str]) -> None:
        """Some objects, a way to send them, and an API that takes presigned URLs or does not."""
        self.transfer = transfer
        self.api.behaviour.accept_file_url = accepts or transfer == "url"
        self.put(keys)

    @rule(keys=SOME_KEYS)
    def put(self, keys: set[str]) -> None:
        """Add or overwrite objects, each time with something new."""
        self.is_changed = True
        for key in sorted(keys):
            self.puts += 1
            source = PNG + f"put number {self.puts}: {key}".encode() * 20
            self.bucket.put(key, source)
            self.model.live[key] = source

    @precondition(lambda self: self.model.live)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        """Delete an object. Its output stays, and so does its claim."""
        key = data.draw(st.sampled_from(sorted(self.model.live)))
        self.bucket.client.delete_object(Bucket=self.bucket.name, Key=key)
        del self.model.live[key]

    @rule(is_other_target=st.booleans(), is_other_quality=st.booleans())
    def change_options(self, *, is_other_target: bool, is_other_quality: bool) -> None:
        """Ask for the other target, for a quality that was not asked for before, or change the way of sending."""
        # Not a precondition: when a kill strikes is no part of the example, and a precondition must be.
        if self.model.was_lost:
            return
        self.is_changed = True
        if is_other_target:
            self.model.target = "webp" if self.model.target == "jpg" else "jpg"
        if is_other_quality:
            self.model.quality = (self.model.quality or 100) - 1
        if self.transfer != "url" and not (is_other_target or is_other_quality):
            self.transfer = "upload" if self.transfer == "auto" else "auto"
        self.model.had_other_options |= is_other_target or is_other_quality

    @precondition(lambda self: self.is_changed)
    @rule(troubles=TROUBLES)
    def run_to_the_end(self, troubles: list[Callable[[], Fault]]) -> None:
        """Run, through some passing troubles."""
        self.plant(troubles)
        self._run(None)
        self.is_changed = False

    @rule(keys=SOME_KEYS, troubles=TROUBLES, trap=MOMENTS)
    def run_and_kill(self, *, keys: set[str], troubles: list[Callable[[], Fault]], trap: Trap) -> None:
        """Run, and kill it at a moment of the API's; if that never comes, the run ends by itself."""
        self.put(keys)
        self.plant(troubles)
        self._run(replace(trap))

    @rule(trap=MOMENTS)
    def kill_and_lose_checkpoint(self, trap: Trap) -> None:
        """Lose the checkpoint of a run that was killed; what is stored tells the next one what is done."""
        if not self.model.can_lose_checkpoint():
            return
        self.put(set(self.model.live))
        self._run(replace(trap))
        if not self.model.can_lose_checkpoint():
            return
        lose_checkpoint(self.workdir)
        self.model.lose_checkpoint()
        self._run(None)

    def plant(self, troubles: list[Callable[[], Fault]]) -> None:
        """Let some of the next requests go wrong."""
        for trouble in troubles:
            self.api.faults.add(trouble())

    # -- runs ----------------------------------------------------------------------------------------------------------

    def _run(self, trap: Trap | None) -> None:
        """Run the real script, let the model follow, and compare."""
        self.is_broken = True
        extra_before = self._charges_too_many()
        plan = self.model.plan(self.bucket.keys("converted/"))
        run = self._start(trap).wait(SECONDS_TO_END)
        self.trap = None
        self._wait_for_the_api()
        if trap and run.exit_code == -signal.SIGKILL:
            self.model.killed(plan, {*self.bucket.keys("converted/"), *(row["key"] for row in run.rows("in_flight"))})
        else:
            self._compare_summary(plan, run)
            self.model.completed(plan)
            assert self._charges_too_many() - extra_before <= run.summary["possible_double_charges"]
        self.model.in_flight = {row["key"] for row in run.rows("in_flight")}
        self._compare_paid()
        self._compare_stored()
        self.is_broken = False

    def _start(self, trap: Trap | None) -> Run:
        options = [
            f"api.url={self.api.url}",
            f"api.transfer={self.transfer}",
            "api.requests_per_minute=60000",
            "run.summary=summary.json",
            f"run.workers={WORKERS}",
            f"convert.target={self.model.target}",
            f"convert.quality={self.model.quality or 'none'}",
        ]
        command = [sys.executable, *AS_A_MODULE, *(part for option in options for part in ("--set", option))]
        self.trap = trap
        run = Run(command, self.workdir, self.environment)
        if trap:
            trap.process = run.process
        return run

    def _wait_for_the_api(self) -> None:
        """The request of a dead client is served to its end all the same."""
        patience = time.monotonic() + SECONDS_TO_END
        while any(request.finished is None for request in self.api.requests):
            assert time.monotonic() < patience
            self.api.closing.wait(0.005)

    # -- comparisons ---------------------------------------------------------------------------------------------------

    def _compare_summary(self, plan: Plan, run: Run) -> None:
        summary = run.summary
        skipped, failed = summary["skipped"], summary["failed"]
        assert run.exit_code == (1 if plan.collide else 0), run.err + run.out
        assert failed == ({"output_collision": len(plan.collide)} if plan.collide else {}), run.err
        settled = summary["converted"] + summary["already_done"]
        assert settled == len(plan.convert) + len(plan.done)
        assert summary["left"] == 0
        outputs = skipped.pop("own_output", 0)
        assert summary["listed"] == len(self.model.live) + outputs
        assert skipped == {}
        if not self.model.unsettled:
            assert summary["converted"] == len(plan.convert)
            assert bool(summary["requests"]) == bool(plan.convert)
        recorded = {line["key"] for line in run.failures if line["code"] == "output_collision"}
        assert set(plan.collide) <= recorded

    def _compare_paid(self) -> None:
        paid, model = self._paid(), self.model
        assert model.due <= set(paid) <= model.due | model.maybe_due
        assert all(count <= 1 + model.exposed[version] for version, count in paid.items()), paid

    def _paid(self) -> Counter[Version]:
        return Counter((charge.source_sha256, charge.target, charge.quality) for charge in self.api.paid)

    def _charges_too_many(self) -> int:
        return sum(self._paid().values()) - len(self._paid())

    def _compare_stored(self) -> None:
        stored = {key: body for key, (body, *_) in self.bucket.outputs().items()}
        assert set(stored) <= set(self.model.stored)
        for key, allowed in self.model.stored.items():
            assert stored.get(key) in allowed, (key, stored.get(key), allowed)


def check(s3: S3Server, **budget: Any) -> None:
    """Run the machine."""
    given = settings(
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # an example takes seconds: a failing one is printed as it is
        **budget,
    )
    run_machine(lambda: Resuming(s3), settings=given)


@pytest.mark.slow
def test_a_few_histories_end_as_the_model_says(s3: S3Server) -> None:
    check(s3, max_examples=3, stateful_step_count=8, derandomize=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_histories_end_as_the_model_says(s3: S3Server) -> None:
    check(s3, max_examples=150, stateful_step_count=14)


# ----------------------------------------------------------------------------------------------------------------------
# Histories that the machine does not tell
# ----------------------------------------------------------------------------------------------------------------------


def killed_when_paid(start: Cli, api: ConversionApi, *options: str) -> None:
    """Run until the API has charged a conversion, and kill it before it gets the answer."""
    trap = Trap("work_done", 1)
    api.on("work_done", lambda _: trap.spring("work_done"))
    run = start(*options)
    trap.process = run.process
    assert run.wait().exit_code == -signal.SIGKILL


def test_a_request_of_a_deleted_object_takes_the_key_from_no_other_request(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = converted
    bucket.put("a.png", PNG + b"a picture")
    killed_when_paid(start, api)
    bucket.client.delete_object(Bucket=bucket.name, Key="a.png")
    bucket.put("a.heic", PNG + b"another picture")
    killed_when_paid(start, api)
    run = run_cli()
    assert (run.exit_code, run.summary["converted"], run.summary["replays"], len(api.paid)) == (0, 1, 1, 2)


@pytest.mark.parametrize(("gone", "paid"), [("a.png", "a.heic"), ("a.heic", "a.png")])
def test_a_deleted_object_that_comes_again_takes_the_key_from_no_request_that_was_sent_since(
    *, gone: str, paid: str, start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = converted
    bucket.put(gone, PNG + b"a picture")
    killed_when_paid(start, api)
    bucket.client.delete_object(Bucket=bucket.name, Key=gone)
    bucket.put(paid, PNG + b"another picture")
    killed_when_paid(start, api)
    bucket.put(gone, PNG + b"a third picture")
    run = run_cli()
    assert [(line["key"], line["code"]) for line in run.failures] == [(gone, "output_collision")]
    assert (run.exit_code, run.summary["replays"], len(api.paid)) == (1, 1, 2)


def test_a_return_to_an_earlier_quality_stores_that_quality_again(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = converted
    bucket.put("a.png", PNG + b"a picture")
    for quality in (None, 50, None):
        assert run_cli("--set", f"convert.quality={quality or 'none'}").exit_code == 0
        expected = converted(Conversion(PNG + b"a picture", "png", "jpg", quality)).body
        assert bucket.outputs()["converted/a.jpg"][0] == expected, quality


def test_what_was_in_flight_with_another_quality_is_not_taken_for_done(
    start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = converted
    bucket.put("a.png", PNG + b"a picture")
    assert run_cli().exit_code == 0
    killed_when_paid(start, api, "--set", "convert.quality=50")
    run = run_cli("--set", "convert.quality=50")
    assert (run.exit_code, run.summary["replays"], run.summary["possible_double_charges"]) == (0, 1, 0)
    expected = converted(Conversion(PNG + b"a picture", "png", "jpg", 50)).body
    assert bucket.outputs()["converted/a.jpg"][0] == expected
    assert len(api.paid) == 2


def test_bytes_are_sent_for_what_was_in_flight_as_a_url_that_the_api_refuses(
    start: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = converted
    api.behaviour.accept_file_url = False
    bucket.put("a.png", PNG + b"a picture")
    killed_when_paid(start, api, "--set", "api.transfer=auto")
    run = start("--set", "api.transfer=upload").wait()
    assert run.exit_code == 0, run.failures
    assert "converted/a.jpg" in bucket.outputs()
    assert len(api.paid) <= 1 + run.summary["possible_double_charges"]


@pytest.mark.parametrize(("transfer", "paid"), [("upload", 1), ("url", 2)])
def test_the_same_bytes_put_again_are_paid_once_or_counted(
    *, transfer: str, paid: int, start: Cli, run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    flags = ("--set", f"api.transfer={transfer}")
    api.behaviour.convert = converted
    bucket.put("a.png", PNG + b"a picture")
    killed_when_paid(start, api, *flags)
    until_next_second()
    bucket.put("a.png", PNG + b"a picture")
    run = run_cli(*flags)
    # By URL, nobody knows what the API has read in between.
    assert (run.exit_code, len(api.paid), run.summary["possible_double_charges"]) == (0, paid, paid - 1)


# The program on a machine whose table of media types was changed, by a package or by another Python.
WITH_OTHER_TYPES = """
import mimetypes
mimetypes.add_type("application/x-other", ".png")
import s3_bulk_convert as program
program.leave(program.main())
"""


def test_an_upload_is_the_same_to_the_byte_where_other_media_types_are_known(
    start: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.convert = converted
    bucket.put("a.png", PNG + b"a picture")
    killed_when_paid(start, api, "--set", "api.transfer=upload")
    run = start("--set", "api.transfer=upload", command=("-c", WITH_OTHER_TYPES)).wait()
    assert (run.exit_code, run.summary["possible_double_charges"], len(api.paid)) == (0, 0, 1), run.err


def test_a_checkpoint_lost_twice_within_a_day_keeps_no_object_from_being_converted(
    start: Cli, bucket: Any, api: ConversionApi, tmp_path: Path
) -> None:
    api.behaviour.convert = converted
    bucket.put("a.png", PNG + b"a picture")
    by_url = ("--set", "api.transfer=url")
    for _ in range(2):
        killed_when_paid(start, api, *by_url)
        lose_checkpoint(tmp_path / "work")
        until_next_second()  # in which a presigned URL is another one
    run = start(*by_url).wait()
    assert run.exit_code == 0, run.failures
    assert run.summary["possible_double_charges"] == 1
    assert "converted/a.jpg" in bucket.outputs()


def until_next_second() -> None:
    """Wait for the clock."""
    now = time.time()
    while int(time.time()) == int(now):
        time.sleep(0.01)
