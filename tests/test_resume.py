"""A state machine that adds, overwrites, deletes, plants faults, kills, loses the checkpoint, and knows the bill."""

import itertools
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.conftest import Run, TestBucket, launch
from tests.conversion_api import ConversionApi, Fault
from tests.converters import Conversion, marking
from tests.s3_server import S3Server

KEYS = ["a.png", "b \u00fc.png", "c/d.png", "c/e+%.png"]
COLLIDING = "a.gif"  # its output is that of a.png, which comes later in the listing
SIGNATURES = {"png": b"\x89PNG\r\n\x1a\n", "gif": b"GIF89a"}
TARGETS = ["jpg", "webp"]
PASSING = [
    Fault.cut_before_work,
    Fault.cut_after_work,
    Fault.truncated_answer,
    Fault.html_page,
    lambda: Fault.status_reply(503),
]
MOMENTS = ["request_received", "work_done", "half_answer_sent", "answered"]
serials = itertools.count()


class ResumeMachine(RuleBasedStateMachine):
    """The bucket as it should be, beside the bucket as it is.

    In URL mode two sources share an output key. In upload mode the checkpoint may be lost: a new presigned URL would be
    another body, which the API cannot replay, and which of two sources an output is of only the checkpoint knows.
    """

    s3: S3Server

    @initialize(transfer=st.sampled_from(["url", "upload"]))
    def open(self, transfer: str) -> None:
        """Start with an empty bucket and a strict API."""
        self.transfer = transfer
        self.client = self.s3.client()
        self.bucket = TestBucket(f"machine-{next(serials)}", self.client)
        self.client.create_bucket(Bucket=self.bucket.name)
        self.api = ConversionApi(convert=marking, compare_raw_body=True, remember_failed_bodies=True).__enter__()
        self.directory = tempfile.TemporaryDirectory()
        self.sources: dict[str, bytes] = {}
        self.ever: dict[str, set[bytes]] = {}  # output key -> all that may ever have been stored there
        self.target = "jpg"

    def teardown(self) -> None:
        """Leave nothing running."""
        if hasattr(self, "api"):
            self.api.__exit__(None, None, None)
            self.directory.cleanup()

    @rule(key=st.sampled_from([*KEYS, COLLIDING]))
    def put(self, key: str) -> None:
        """Add an object, or overwrite it; no two versions have the same bytes."""
        if self.transfer == "upload" and key == COLLIDING:
            return
        self.sources[key] = SIGNATURES[key[-3:]] + f"{key} number {next(serials)} ".encode() * 20
        self.bucket.put(key, self.sources[key])
        for target in TARGETS:
            self.ever.setdefault(self.output_key(key, target), set()).add(self.converted(key, target))

    @precondition(lambda self: self.sources)
    @rule(choice=st.randoms(use_true_random=False))
    def delete(self, choice: Any) -> None:
        """Take an object away; its output stays."""
        key = choice.choice(sorted(self.sources))
        del self.sources[key]
        self.client.delete_object(Bucket=self.bucket.name, Key=key)

    @rule(fault=st.sampled_from(PASSING))
    def plant(self, fault: Callable[[], Fault]) -> None:
        """Let something go wrong once."""
        self.api.faults.add(fault())

    @rule(wanted=st.sampled_from(TARGETS))
    def change_target(self, wanted: str) -> None:
        """Want something else from now on."""
        self.target = wanted

    @precondition(lambda self: self.transfer == "upload")
    @rule()
    def lose_checkpoint(self) -> None:
        """Move to a new server."""
        for path in Path(self.directory.name).glob("s3_bulk_convert.sqlite3*"):
            path.unlink()

    @rule(event=st.sampled_from(MOMENTS), nth=st.integers(1, 3))
    def run_and_kill(self, event: Any, nth: int) -> None:
        """Kill a run at the n-th time that the API comes to a point; if it never does, the run ends by itself."""
        run, countdown = self._start(), itertools.count(1)
        is_armed = threading.Event()
        is_armed.set()
        self.api.on(event, lambda _: run.process.kill() if is_armed.is_set() and next(countdown) == nth else None)
        run.wait()
        is_armed.clear()

    @rule()
    def run_to_the_end(self) -> None:
        """Everything that can be converted is; what was paid and stored is what the model says."""
        run = self._start().wait()
        assert run.exit_code in {0, 1}, run.err + run.out
        assert set(run.summary["failed"]) <= {"output_collision"}
        assert run.summary["left"] == run.summary["possible_double_charges"] == 0
        parts = Counter(run.summary["skipped"]) + Counter(run.summary["failed"])
        assert run.summary["listed"] == parts.total() + run.summary["converted"] + run.summary["already_done"]
        self.compare_outputs(collided={row["key"] for row in run.rows() if row["code"] == "output_collision"})

    def compare_outputs(self, collided: set[str]) -> None:
        """Each source has its own output, but for one that came second; nothing else was ever stored."""
        stored = {key: body for key, (body, *_) in self.bucket.outputs().items()}
        assert collided <= {"a.png", COLLIDING}
        for key in self.sources:
            output = self.output_key(key, self.target)
            if stored.get(output) != self.converted(key, self.target):
                assert key in collided
        assert all(body in self.ever[key] for key, body in stored.items())

    def converted(self, key: str, target: str) -> bytes:
        """What a source must come to."""
        return marking(Conversion(self.sources[key], key[-3:], target, None)).body

    @staticmethod
    def output_key(key: str, target: str) -> str:
        """Where it must lie."""
        return f"converted/{key[:-4]}.{target}"

    @invariant()
    def nothing_is_paid_twice(self) -> None:
        """The API remembers for a day what it was paid for; nobody may pay for it under another key."""
        if hasattr(self, "api"):
            assert self.api.paid_twice() == []

    def _start(self) -> Run:
        options = ("--workers=2", "--set=run.max_failure_rate=never", f"--set=api.transfer={self.transfer}")
        workdir = Path(self.directory.name)
        servers: Any = {"s3": self.s3, "api": self.api, "bucket": self.bucket}
        return launch(*options, workdir=workdir, **servers, TARGET_FORMAT=self.target)


def machine_on(server: S3Server) -> type[ResumeMachine]:
    """The machine, on a server."""
    return type("ResumeMachineOnServer", (ResumeMachine,), {"s3": server})


def prove(server: S3Server, examples: int, steps: int) -> None:
    """Run the machine through so many examples."""
    how = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    machine: Any = machine_on(server)
    machine.TestCase.settings = how
    machine.TestCase().runTest()


def test_whatever_happens_in_whatever_order_the_bill_is_right(s3: S3Server) -> None:
    prove(s3, examples=5, steps=10)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whatever_happens_in_many_more_orders_the_bill_is_right(s3: S3Server) -> None:
    prove(s3, examples=60, steps=20)
