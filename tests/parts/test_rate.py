"""The rate: evenly spaced, learned from what the API says, slowed down by a 429, and back again after a while."""

import itertools

import pytest

import s3_bulk_convert as program
from s3_bulk_convert import RateLimiter, StopFlag


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

    def sleep(self, seconds: float, patience: float = 0.0) -> None:
        """Let the time pass."""
        self._clock.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the program."""
    clock = Clock()
    monkeypatch.setattr(program, "time", clock)
    return clock


def gaps(limiter: RateLimiter, clock: Clock, count: int) -> list[float]:
    """Seconds between the next slots."""
    stop, moments = Waiting(clock), []
    for _ in range(count + 1):
        limiter.acquire(stop)
        moments.append(clock.now)
    return [later - earlier for earlier, later in itertools.pairwise(moments)]


def answered(limiter: RateLimiter, clock: Clock, limit: int = 0) -> RateLimiter:
    """The same after a first answer that says what the limit per minute is, if there is one."""
    headers = {"X-RateLimit-Limit": str(limit), "X-RateLimit-Reset": f"{clock.now + 30:.0f}"} if limit else {}
    limiter.update_limit(headers, clock.now)
    return limiter


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
    assert gaps(answered(RateLimiter(cap, parts), clock, limit), clock, 20) == pytest.approx([seconds] * 20)


def test_the_slot_before_the_first_answer_is_one_of_those_that_are_allowed(clock: Clock) -> None:
    limiter, stop = RateLimiter(None, parts=4), Waiting(clock)
    limiter.acquire(stop)
    began = clock.now
    answered(limiter, clock, 300).acquire(stop)
    assert clock.now - began == pytest.approx(60 * 4 / (300 * 0.99))


def test_a_429_pauses_all_and_lowers_the_pace_which_then_recovers(clock: Clock) -> None:
    limiter = answered(RateLimiter(60), clock)
    gaps(limiter, clock, 1)
    limiter.pause(10)
    before = clock.now
    assert gaps(limiter, clock, 1) == [pytest.approx(1.1, rel=0.02)]
    assert clock.now - before == pytest.approx(10 + 1.1, rel=0.02)
    clock.now += program.RateLimiter.SECONDS_TO_RECOVER_HALF
    assert gaps(limiter, clock, 1) == [pytest.approx(1.05, rel=0.02)]
    clock.now += 10 * program.RateLimiter.SECONDS_TO_RECOVER_HALF
    assert gaps(limiter, clock, 5) == pytest.approx([1] * 5, rel=0.001)


def test_many_workers_that_meet_one_limit_slow_down_once(clock: Clock) -> None:
    alone, many = answered(RateLimiter(60), clock), answered(RateLimiter(60), clock)
    alone.pause(10)
    for _ in range(20):
        many.pause(10)
    assert gaps(many, clock, 1) == pytest.approx(gaps(alone, clock, 1), rel=0.02)


@pytest.mark.parametrize("parts", [1, 4])
def test_429s_without_end_do_not_bring_a_guess_to_a_stand(parts: int, clock: Clock) -> None:
    limiter = answered(RateLimiter(None, parts), clock)
    for _ in range(100):
        limiter.pause(1)
        gaps(limiter, clock, 1)
    # As slow as the smallest plan, and a tenth more.
    assert gaps(limiter, clock, 1)[0] <= 1.1 * 60 * parts / program.RateLimiter.MIN_LIMIT


def test_429s_without_end_do_not_bring_it_to_a_stand(clock: Clock) -> None:
    limiter = answered(RateLimiter(60), clock)
    for _ in range(100):
        limiter.pause(1)
        gaps(limiter, clock, 1)
    assert gaps(limiter, clock, 1)[0] < 1 + program.RateLimiter.MAX_EXCESS


def test_where_nobody_says_a_429_does(clock: Clock) -> None:
    limiter = answered(RateLimiter(None), clock)
    gaps(limiter, clock, 29)
    clock.now += 20
    limiter.pause(40)
    # 30 within a minute were too many: they are one every two seconds, and a tenth slower for now.
    assert gaps(limiter, clock, 1) == [pytest.approx(2.2, rel=0.02)]


@pytest.mark.parametrize(("parts", "seconds"), [(1, 6.6), (4, 26.4)])
def test_a_429_for_the_very_first_request_does_not_hold_up_the_whole_run(
    parts: int, seconds: float, clock: Clock
) -> None:
    limiter = RateLimiter(None, parts)
    limiter.acquire(Waiting(clock))
    limiter.pause(20)
    # Others may have used up the limit, so that nothing is known of it: as if it were the smallest.
    assert gaps(limiter, clock, 1) == [pytest.approx(seconds, rel=0.02)]
    clock.now += 10 * program.RateLimiter.SECONDS_TO_DOUBLE_GUESS
    assert gaps(limiter, clock, 1)[0] < seconds / 1000


def test_a_guess_that_has_grown_too_large_is_taken_back(clock: Clock) -> None:
    limiter = answered(RateLimiter(None), clock)
    gaps(limiter, clock, 59)
    limiter.pause(60)
    sent = throttled = 0
    hour = clock.now + 3600
    window_ends = used = 0.0
    while clock.now < hour:
        limiter.acquire(Waiting(clock))
        sent += 1
        if clock.now >= window_ends:
            window_ends, used = clock.now + 60, 0
        used += 1
        if used > 60:
            throttled += 1
            limiter.pause(window_ends - clock.now)
    assert sent - throttled > 0.7 * 60 * 60
    assert throttled / sent < 0.02


@pytest.mark.parametrize(
    ("headers", "is_learned"),
    [
        ({"X-RateLimit-Limit": "60", "X-RateLimit-Reset": "1000030"}, True),
        ({"X-RateLimit-Limit": "60", "X-RateLimit-Reset": "999970"}, False),
        ({"X-RateLimit-Limit": "60"}, False),
        ({"X-RateLimit-Limit": "many", "X-RateLimit-Reset": "1000030"}, False),
        ({"X-RateLimit-Limit": "-1", "X-RateLimit-Reset": "1000030"}, False),
        ({}, False),
    ],
)
def test_a_limit_is_learned_from_fresh_headers_only(headers: dict[str, str], *, is_learned: bool, clock: Clock) -> None:
    limiter = RateLimiter(None)
    limiter.update_limit(headers, clock.now)
    assert gaps(limiter, clock, 1) == pytest.approx([1 / 0.99 if is_learned else 0.0])


def test_a_limit_that_is_raised_is_learned_too(clock: Clock) -> None:
    limiter = answered(answered(RateLimiter(None), clock, 60), clock, 60)
    assert gaps(limiter, clock, 1) == pytest.approx([1 / 0.99])
    assert gaps(answered(limiter, clock, 300), clock, 3)[1:] == pytest.approx([0.2 / 0.99] * 2)
