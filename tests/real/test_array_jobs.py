"""Four shards over one bucket, started by array-job engines that really run: GNU parallel and Slurm."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_processes import wait_until
from tests.standins import slurm
from tests.standins.conversion_api import ConversionApi, Fault
from tests.standins.converters import marking
from tests.standins.program import SCRIPT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
Cli = Callable[..., Any]
PNG = b"\x89PNG\r\n\x1a\n"
PICTURES = 60
OTHERS = 5  # each skipped by exactly one shard
# `start` runs Python and puts options of the program at the end; this turns into the shell, with them as "$@".
SHELL = "import os, sys; os.execvp('sh', ['sh', '-c', sys.argv[1], 'sh', *sys.argv[2:]])"
# The program, but for shard 2 of 4, which is killed in the middle of its first run as by kill -9.
KILLED_ONCE = """
import os, pathlib, sys
from tests.standins import crashing

is_the_one = "2/4" in sys.argv or os.environ.get("SLURM_ARRAY_TASK_ID") == "2"
if is_the_one and not pathlib.Path("s3_bulk_convert.2-of-4.sqlite3").exists():
    crashing.wrap("answer-read", "after", 3)
crashing.program.leave(crashing.program.main(sys.argv[1:]))
"""
WITH_PARALLEL = 'seq 0 3 | parallel -j4 "$@" --shard {}/4'
# A task that Slurm has started before says so. `exec`, because this Slurm loses sight of the children of a dead shell.
RUN_BY_SLURM = 'test -z "$SLURM_RESTART_COUNT" || touch ran-again-$SLURM_ARRAY_TASK_ID; exec'
WITH_SLURM = f"sbatch --wait --array=0-3 --output=task-%a.out --wrap '{RUN_BY_SLURM}'\" $*\""
SQUEUE = ("squeue", "--array", "--noheader")
WORKERS = 5  # of each shard: fewer than it has pictures
LIMIT = 300  # requests a minute
SECONDS_FOR_SLURM = 120  # it takes a few; a busy machine may need many


@pytest.fixture
def parallel() -> None:
    """GNU parallel is there. The `parallel` of moreutils is another program."""
    if shutil.which("parallel") is None:
        pytest.fail("GNU parallel is not installed; type: apt-get install -y parallel")


@pytest.fixture(scope="module")
def running_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Slurm]:
    """A Slurm of this module's own."""
    if missing := slurm.missing_programs():
        packages = f"apt-get install -y --no-install-recommends {slurm.PACKAGES}"
        pytest.fail(f"{', '.join(missing)} not installed; type: {packages}")
    with slurm.Slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def slurm_environment(running_slurm: slurm.Slurm) -> dict[str, str]:
    """What the commands of a running Slurm need in their environment."""
    return running_slurm.environment


@pytest.fixture
def killed_once(tmp_path: Path) -> Path:
    """The program with one shard that dies once, as a file."""
    path = tmp_path / "killed_once.py"
    path.write_text(KILLED_ONCE, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def sources(bucket: Any, api: ConversionApi) -> None:
    """Pictures, and some objects that no shard converts."""
    api.behaviour.convert = marking
    api.behaviour.latency = 0.02
    for number in range(PICTURES):
        bucket.put(f"in/{number:03}.png", PNG + str(number).encode())
    for number in range(OTHERS):
        bucket.put(f"in/{number}.jpg", b"\xff\xd8\xff")


def start_array(
    start: Cli, shell: str, *program: str, options: tuple[str, ...] = (), environment: dict[str, str] | None = None
) -> Any:
    """Start an array job of the program or of something in its place."""
    given = (shell, sys.executable, *(program or (str(SCRIPT),)), "--prefix", "in/", *options)
    changes = {"PYTHONPATH": str(SCRIPT.parent), **(environment or {})}
    return start(command=("-c", SHELL, *given), **changes)


def run_array(start: Cli, shell: str, *program: str, environment: dict[str, str] | None = None) -> Any:
    """Run an array job to its end, of the program or of something in its place."""
    return start_array(start, shell, *program, environment=environment).wait(120)


def summaries(run: Any) -> Counter[str]:
    """The counts of all shards' summaries, added up."""
    total: Counter[str] = Counter()
    for path in run.workdir.glob("summary.*-of-4.json"):
        found = json.loads(path.read_text())
        total.update({"files": 1, "skipped": sum(found["skipped"].values()), "failed": sum(found["failed"].values())})
        total.update({name: found[name] for name in ("listed", "converted", "already_done", "left")})
    return total


def assert_everything_is_converted_once(bucket: Any, api: ConversionApi) -> None:
    assert bucket.keys("converted/") == [f"converted/in/{number:03}.jpg" for number in range(PICTURES)]
    assert len(api.paid) == PICTURES
    assert api.paid_twice() == []


def assert_the_shards_add_up(run: Any, *, converted: int = PICTURES) -> None:
    total = summaries(run)
    assert total["files"] == 4
    assert total["listed"] == PICTURES + OTHERS
    assert (total["converted"], total["already_done"]) == (converted, PICTURES - converted)
    assert (total["skipped"], total["failed"], total["left"]) == (OTHERS, 0, 0)


def assert_each_shard_had_some(api: ConversionApi, run: Any) -> None:
    assert len(api.requests) == PICTURES
    assert all(json.loads(path.read_text())["converted"] for path in run.workdir.glob("summary.*-of-4.json"))


@pytest.mark.usefixtures("parallel")
def test_gnu_parallel_converts_each_object_in_one_of_four_shards(start: Cli, bucket: Any, api: ConversionApi) -> None:
    run = run_array(start, WITH_PARALLEL)
    assert run.exit_code == 0, run.err
    assert_everything_is_converted_once(bucket, api)
    assert_the_shards_add_up(run)
    assert_each_shard_had_some(api, run)
    assert_the_shards_add_up(run_array(start, WITH_PARALLEL), converted=0)
    assert len(api.requests) == PICTURES


@pytest.mark.usefixtures("parallel")
def test_gnu_parallel_runs_a_killed_shard_again_and_it_finishes(
    start: Cli, bucket: Any, api: ConversionApi, killed_once: Path
) -> None:
    again = WITH_PARALLEL.replace("-j4", "-j4 --retries 2")
    run = run_array(start, again, str(killed_once))
    assert run.exit_code == 0, run.err
    assert api.replays > 0
    assert_everything_is_converted_once(bucket, api)
    assert summaries(run)["files"] == 4


def test_slurm_converts_each_object_in_one_of_four_tasks(
    start: Cli, bucket: Any, api: ConversionApi, slurm_environment: dict[str, str]
) -> None:
    run = run_array(start, WITH_SLURM, environment=slurm_environment)
    assert run.exit_code == 0, tasks_said(run)
    assert_everything_is_converted_once(bucket, api)
    assert_the_shards_add_up(run)
    assert_each_shard_had_some(api, run)


def test_a_slurm_task_that_was_killed_is_run_again_alone_and_finishes(
    start: Cli, bucket: Any, api: ConversionApi, slurm_environment: dict[str, str], killed_once: Path
) -> None:
    killed = run_array(start, WITH_SLURM, str(killed_once), environment=slurm_environment)
    assert killed.exit_code != 0, tasks_said(killed)
    assert summaries(killed)["files"] == 3
    alone = WITH_SLURM.replace("0-3", "2").replace("$*", "$* --shard 2/4")
    run = run_array(start, alone, environment=slurm_environment)
    assert run.exit_code == 0, tasks_said(run)
    assert api.replays > 0
    assert_everything_is_converted_once(bucket, api)
    assert summaries(run)["files"] == 4


########################################################################
# Tasks that Slurm itself runs again
########################################################################


def start_tasks_that_hang(start: Cli, api: ConversionApi, release: threading.Event, running: slurm.Slurm) -> Any:
    """Start an array; it comes back when each worker of each task waits for the API, which answers at the release."""
    hung = api.faults.add(Fault.hang_until(release, times=None))
    # With a rate of its own, no task waits for a first answer that tells it one.
    options = ("--workers", str(WORKERS), "--set", "api.requests_per_minute=60000")
    again = WITH_SLURM.replace("sbatch", "sbatch --requeue")
    run = start_array(start, again, options=options, environment=running.environment)
    wait_until(lambda: hung.struck == 4 * WORKERS, SECONDS_FOR_SLURM)
    return run


def assert_all_was_done_by_tasks_that_ran_again(run: Any, bucket: Any, api: ConversionApi, restarted: set[str]) -> None:
    assert run.wait(240).exit_code == 0, tasks_said(run)
    assert {path.name for path in run.workdir.glob("ran-again-*")} == restarted
    assert api.replays > 0
    assert_everything_is_converted_once(bucket, api)
    assert summaries(run)["files"] == 4
    assert summaries(run)["left"] == 0


def test_a_slurm_task_that_is_requeued_while_it_runs_pays_nothing_twice(
    start: Cli, bucket: Any, api: ConversionApi, running_slurm: slurm.Slurm, release: threading.Event
) -> None:
    run = start_tasks_that_hang(start, api, release, running_slurm)
    [task] = [task for task in running_slurm.said(*SQUEUE, "--format=%F_%K").split() if task.endswith("_2")]
    running_slurm.said("scontrol", "requeue", task)
    wait_until(lambda: running_slurm.said(*SQUEUE, "--format=%T", f"--jobs={task}") == "PENDING", SECONDS_FOR_SLURM)
    release.set()
    assert_all_was_done_by_tasks_that_ran_again(run, bucket, api, {"ran-again-2"})


def test_tasks_whose_node_dies_run_again_and_pay_nothing_twice(
    start: Cli, bucket: Any, api: ConversionApi, running_slurm: slurm.Slurm, release: threading.Event
) -> None:
    run = start_tasks_that_hang(start, api, release, running_slurm)
    running_slurm.kill_node()
    wait_until(lambda: set(running_slurm.said(*SQUEUE, "--format=%T").split()) == {"PENDING"}, SECONDS_FOR_SLURM)
    release.set()
    running_slurm.start_node()
    assert_all_was_done_by_tasks_that_ran_again(run, bucket, api, {f"ran-again-{index}" for index in range(4)})


########################################################################
# One limit for all shards
########################################################################


@pytest.fixture(params=["parallel", "slurm"])
def engine(request: pytest.FixtureRequest) -> tuple[str, dict[str, str]]:
    """How an engine starts an array, and what that needs in its environment."""
    if request.param == "slurm":
        return WITH_SLURM, request.getfixturevalue("slurm_environment")
    request.getfixturevalue("parallel")
    return WITH_PARALLEL, {}


def test_four_shards_together_keep_a_limit_per_minute_and_fill_it(
    start: Cli, bucket: Any, api: ConversionApi, engine: tuple[str, dict[str, str]]
) -> None:
    shell, environment = engine
    api.behaviour.per_minute = LIMIT
    for number in range(PICTURES, 2 * LIMIT):
        bucket.put(f"in/{number:03}.png", PNG + str(number).encode())
    run = start_array(start, shell, environment=environment).wait(500)
    assert run.exit_code == 0, tasks_said(run)
    assert len(api.paid) == len(bucket.keys("converted/")) == 2 * LIMIT
    posts = sorted(request.started for request in api.requests if request.is_conversion)
    throttled = sum(request.status == 429 for request in api.requests)
    windows = requests_by_minute(posts)
    print(
        f"\n{shell.split()[0]}: {len(posts)} requests in {posts[-1] - posts[0]:.0f} s, {throttled} times 429, ", end=""
    )
    print(f"by minute {windows}, where {LIMIT} are allowed")
    # The API lets no more through than it allows: what is too much is refused.
    assert throttled <= 0.005 * len(posts)
    assert max(windows) >= 0.9 * LIMIT


def requests_by_minute(moments: Sequence[float]) -> list[int]:
    """How many fall into each of the API's windows, which begins with the first that is in none before it."""
    began: list[float] = []
    counts: list[int] = []
    for moment in moments:
        if not began or moment >= began[-1] + 60:
            began.append(moment)
            counts.append(0)
        counts[-1] += 1
    return counts


def tasks_said(run: Any) -> str:
    """What the tasks of a Slurm array wrote."""
    return str(run.err) + "".join(path.read_text() for path in sorted(run.workdir.glob("task-*.out")))


########################################################################
# Without an engine: what may befall a shard
########################################################################


def run_shards(run_cli: Cli, count: int, *arguments: str) -> list[Any]:
    return [run_cli("--prefix", "in/", "--shard", f"{index}/{count}", *arguments) for index in range(count)]


def test_with_another_number_of_shards_what_is_done_is_recognised(
    run_cli: Cli, bucket: Any, api: ConversionApi
) -> None:
    api.behaviour.latency = 0
    assert [run.exit_code for run in run_shards(run_cli, 2)] == [0, 0]
    assert [run.exit_code for run in run_shards(run_cli, 3)] == [0, 0, 0]
    assert len(api.requests) == PICTURES
    assert_everything_is_converted_once(bucket, api)


def test_sources_that_want_one_output_meet_in_one_shard(run_cli: Cli, bucket: Any, api: ConversionApi) -> None:
    for number in range(PICTURES):
        bucket.put(f"in/{number:03}.gif", b"GIF89a" + str(number).encode())
    shards = run_shards(run_cli, 4, "--set", "run.max_failure_rate=never")
    assert {run.exit_code for run in shards} == {1}
    assert summaries(shards[-1])["failed"] == PICTURES
    assert len(api.paid) == len(bucket.keys("converted/")) == PICTURES


def test_a_killed_shard_that_restarts_on_another_machine_pays_nothing_twice(
    start: Cli, bucket: Any, api: ConversionApi, killed_once: Path
) -> None:
    upload = ("--prefix", "in/", "--set", "api.transfer=upload")
    killed = start("--shard", "2/4", *upload, command=(str(killed_once),)).wait()
    assert killed.exit_code == -9
    for path in killed.workdir.glob("*.sqlite3*"):
        path.unlink()
    assert [run.exit_code for run in run_shards(lambda *given: start(*given).wait(), 4, *upload)] == [0] * 4
    assert_everything_is_converted_once(bucket, api)


def test_a_shard_that_runs_twice_at_once_pays_nothing_twice(start: Cli, bucket: Any, api: ConversionApi) -> None:
    api.behaviour.compare_raw_body = True
    upload = ("--prefix", "in/", "--shard", "0/1", "--set", "api.transfer=upload")
    twins = [start(*upload, "--set", f"run.checkpoint={name}.sqlite3") for name in ("one", "another")]
    assert [run.wait().exit_code for run in twins] == [0, 0]
    assert_everything_is_converted_once(bucket, api)
    assert len(api.requests) > PICTURES
