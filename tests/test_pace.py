"""The pace: evenly spaced, learned from what the API says, slowed down by a 429, and back again after a while."""

import itertools

import pytest

import s3_bulk_convert as program
from s3_bulk_convert import Gate, Heard, Pacer, StopFlag


class Clock:
    """A clock that only moves when somebody waits."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def monotonic(self) -> float:
        """The time, in seconds."""
        return self.now

    time = monotonic


class Waiting(StopFlag):
    """Waits by moving the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def sleep(self, seconds: float) -> None:
        """Let the time pass."""
        self._clock.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the program."""
    clock = Clock()
    monkeypatch.setattr(program, "time", clock)
    return clock


def gaps(pacer: Pacer, clock: Clock, count: int) -> list[float]:
    """Seconds between the next slots."""
    stop, moments = Waiting(clock), []
    for _ in range(count + 1):
        pacer.take(stop)
        moments.append(clock.now)
    return [later - earlier for earlier, later in itertools.pairwise(moments)]


def answered(pacer: Pacer, limit: int = 0) -> Pacer:
    """The same after a first answer that says what the limit per minute is."""
    pacer.hear(Heard(limit=limit))
    return pacer


@pytest.mark.parametrize(
    ("cap", "limit", "parts", "seconds"),
    [
        pytest.param(60, 0, 1, 1.0, id="the user's cap"),
        pytest.param(None, 60, 1, 1 / 0.99, id="the API's limit, less one percent"),
        pytest.param(30, 60, 1, 2 / 0.99, id="the cap is smaller"),
        pytest.param(120, 60, 1, 1 / 0.99, id="the limit is smaller"),
        pytest.param(60, 0, 4, 4.0, id="one of four shards"),
        pytest.param(None, 60, 4, 4 / 0.99, id="the limit of four shards"),
        pytest.param(None, 0, 1, 0.0, id="nobody says"),
    ],
)
def test_slots_are_evenly_spaced_at_the_smaller_limit(
    cap: int | None, limit: int, parts: int, seconds: float, clock: Clock
) -> None:
    assert gaps(answered(Pacer(cap, parts), limit), clock, 20) == pytest.approx([seconds] * 20)


def test_the_slot_before_the_first_answer_is_one_of_those_that_are_allowed(clock: Clock) -> None:
    pacer, stop = Pacer(None, parts=4), Waiting(clock)
    pacer.take(stop)
    began = clock.now
    answered(pacer, 300).take(stop)
    assert clock.now - began == pytest.approx(60 * 4 / (300 * 0.99))


def test_what_is_sent_beside_the_feeder_is_taken_off_the_next_slots(clock: Clock) -> None:
    pacer = answered(Pacer(60))
    gaps(pacer, clock, 1)
    pacer.hear(Heard(slots=3))
    assert gaps(pacer, clock, 2) == pytest.approx([1, 1])
    assert clock.now == pytest.approx(1_000_000 + 1 + 4 + 2)


def test_a_429_pauses_all_and_lowers_the_pace_which_then_recovers(clock: Clock) -> None:
    pacer = answered(Pacer(60))
    gaps(pacer, clock, 1)
    pacer.hear(Heard(throttled_seconds=10))
    before = clock.now
    assert gaps(pacer, clock, 1) == [pytest.approx(1.1, rel=0.02)]
    assert clock.now - before == pytest.approx(10 + 1.1, rel=0.02)
    clock.now += program.SECONDS_TO_RECOVER_HALF
    assert gaps(pacer, clock, 1) == [pytest.approx(1.05, rel=0.02)]
    clock.now += 10 * program.SECONDS_TO_RECOVER_HALF
    assert gaps(pacer, clock, 5) == pytest.approx([1] * 5, rel=0.001)


def test_many_workers_that_meet_one_limit_slow_down_once(clock: Clock) -> None:
    alone, many = answered(Pacer(60)), answered(Pacer(60))
    alone.hear(Heard(throttled_seconds=10))
    for _ in range(20):
        many.hear(Heard(throttled_seconds=10))
    assert gaps(many, clock, 1) == pytest.approx(gaps(alone, clock, 1), rel=0.02)


def test_429s_without_end_do_not_bring_it_to_a_stand(clock: Clock) -> None:
    pacer = answered(Pacer(60))
    for _ in range(100):
        pacer.hear(Heard(throttled_seconds=1))
        gaps(pacer, clock, 1)
    assert gaps(pacer, clock, 1)[0] < 1 + program.MOST_EXCESS


def test_where_nobody_says_a_429_does(clock: Clock) -> None:
    pacer = answered(Pacer(None))
    gaps(pacer, clock, 29)
    clock.now += 20
    pacer.hear(Heard(throttled_seconds=40))
    # 30 within a minute were too many: they are one every two seconds, and a tenth slower for now.
    assert gaps(pacer, clock, 1) == [pytest.approx(2.2, rel=0.02)]


@pytest.mark.parametrize(("parts", "seconds"), [(1, 6.6), (4, 26.4)])
def test_a_429_for_the_very_first_request_does_not_hold_up_the_whole_run(
    parts: int, seconds: float, clock: Clock
) -> None:
    pacer = Pacer(None, parts)
    pacer.take(Waiting(clock))
    pacer.hear(Heard(throttled_seconds=20))
    # Others may have used up the limit, so that nothing is known of it: as if it were the smallest.
    assert gaps(pacer, clock, 1) == [pytest.approx(seconds, rel=0.02)]
    clock.now += 10 * program.SECONDS_TO_DOUBLE_GUESS
    assert gaps(pacer, clock, 1)[0] < seconds / 1000


def test_a_guess_that_has_grown_too_large_is_taken_back(clock: Clock) -> None:
    pacer = answered(Pacer(None))
    gaps(pacer, clock, 59)
    pacer.hear(Heard(throttled_seconds=60))
    sent = throttled = 0
    hour = clock.now + 3600
    window_ends = used = 0.0
    while clock.now < hour:
        pacer.take(Waiting(clock))
        sent += 1
        if clock.now >= window_ends:
            window_ends, used = clock.now + 60, 0
        used += 1
        if used > 60:
            throttled += 1
            pacer.hear(Heard(throttled_seconds=window_ends - clock.now))
    assert sent - throttled > 0.7 * 60 * 60
    assert throttled / sent < 0.02


@pytest.mark.parametrize(
    ("headers", "heard"),
    [
        ({"X-RateLimit-Limit": "60", "X-RateLimit-Reset": "1000030"}, [60]),
        ({"X-RateLimit-Limit": "60", "X-RateLimit-Reset": "999970"}, [0]),
        ({"X-RateLimit-Limit": "60"}, [0]),
        ({"X-RateLimit-Limit": "many", "X-RateLimit-Reset": "1000030"}, [0]),
        ({"X-RateLimit-Limit": "-1", "X-RateLimit-Reset": "1000030"}, [0]),
        ({}, [0]),
    ],
)
def test_a_limit_is_learned_from_fresh_headers_only(headers: dict[str, str], heard: list[int], clock: Clock) -> None:
    told: list[Heard] = []
    gate = Gate(told.append)
    gate.learn(headers, clock.now)
    gate.learn({}, clock.now)
    assert [news.limit for news in told] == heard


def test_a_limit_that_is_raised_is_heard_of(clock: Clock) -> None:
    told: list[Heard] = []
    gate = Gate(told.append)
    for limit in ("60", "60", "300"):
        gate.learn({"X-RateLimit-Limit": limit, "X-RateLimit-Reset": "1000030"}, clock.now)
    assert [news.limit for news in told] == [60, 300]
