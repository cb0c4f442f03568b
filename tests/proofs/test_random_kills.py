"""Killed again and again at random moments, it still pays for each object once and loses none."""

import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.standins.conversion_api import ConversionApi
from tests.standins.converters import Conversion, marking

Cli = Callable[..., Any]
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass
class Siege:
    """A bucket that grows by generations of objects, and a program that is killed while it converts them."""

    start: Cli
    bucket: Any
    api: ConversionApi
    moments: random.Random
    sources: dict[str, bytes] = field(default_factory=dict)
    figures: Counter[str] = field(default_factory=Counter)

    def add_generation(self, count: int) -> None:
        """Put more objects, and overwrite some of those that are there."""
        generation = self.figures["generations"] = self.figures["generations"] + 1
        changed = [f"g{generation}/{number:05}.png" for number in range(count)]
        changed += self.moments.sample(sorted(self.sources), len(self.sources) // 20)
        made = {key: PNG + f"{key} in generation {generation}".encode() for key in changed}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self.bucket.put, made.keys(), made.values()))
        self.sources.update(made)
        self.figures["versions"] += len(made)

    def runs(self, kills: int) -> Iterator[Any]:
        """Start the program again and again, and kill it; a run that ends before its time is up is yielded."""
        while self.figures["kills"] < kills:
            run = self.start("--set", "run.log_every=100000")
            # On a busy machine most would be killed before they have sent anything.
            if self.moments.random() < 0.9:
                run.process.stderr.readline()
            try:
                run.process.wait(timeout=self.moments.uniform(0, 1.2))
            except subprocess.TimeoutExpired:
                run.process.kill()
                self.figures["kills"] += 1
            run.wait()
            if run.exit_code != -9:
                yield run

    def assert_promises(self) -> None:
        """Finish, and compare what was paid and what is stored with what was put."""
        last = self.start().wait(600)
        assert last.exit_code == 0, last.err + last.out
        assert last.summary["left"] == 0
        assert last.rows("in_flight") == []
        assert self.api.paid_twice() == []
        assert len(self.api.paid) == self.figures["versions"]
        expected = {f"converted/{key[:-4]}.jpg": self.converted(source) for key, source in self.sources.items()}
        with ThreadPoolExecutor(8) as pool:
            assert dict(zip(expected, pool.map(self.output, expected), strict=True)) == expected

    @staticmethod
    def converted(source: bytes) -> bytes:
        """What a source must come to."""
        return marking(Conversion(source, "png", "jpg", None)).body

    def output(self, key: str) -> bytes:
        """What is stored."""
        body: bytes = self.bucket.client.get_object(Bucket=self.bucket.name, Key=key)["Body"].read()
        return body

    def survive(self, kills: int, objects: int) -> str:
        """Let it be killed so many times; when all is converted too early, there is more to do. The figures."""
        started = time.monotonic()
        self.add_generation(objects)
        for finished in self.runs(kills):
            assert finished.exit_code == 0, finished.err
            self.add_generation(objects // 4)
        self.assert_promises()
        seconds = time.monotonic() - started
        return (
            f"{self.figures['kills']} kills, {self.figures['versions']} versions of {len(self.sources)} objects, "
            f"{len(self.api.requests)} requests, {self.api.replays} replays, {len(self.api.paid)} paid, "
            f"{len(self.api.paid_twice())} paid twice, 0 lost, 0 wrong, {seconds:.0f} s"
        )


@pytest.fixture
def siege(start: Cli, bucket: Any, strict_api: ConversionApi) -> Siege:
    """A strict API that takes its time, and a seed that makes the moments the same in every run."""
    strict_api.behaviour.latency = 0.02
    return Siege(start, bucket, strict_api, random.Random(20261124))


def test_a_few_kills_at_random_moments_cost_nothing(siege: Siege) -> None:
    siege.survive(kills=4, objects=60)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_hundred_kills_at_random_moments_cost_nothing(siege: Siege) -> None:
    print(f"\nrandom kills: {siege.survive(kills=200, objects=2000)}")
