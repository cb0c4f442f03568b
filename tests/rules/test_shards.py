"""One of N parts: whose is what, the shares and files of a shard, and what array jobs say in their environments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import s3_bulk_convert as program
from tests.rules.test_settings import COMPLETE
from tests.runs.test_shards import REMEDY, kubernetes

Load = Callable[..., program.Settings]
COUNTS = st.integers(1, 200)
I_OF_N = "expected I/N such as 0/8, with I from 0 to N - 1 and N at most 10000"


def shards(count: int) -> list[program.Shard]:
    return [program.Shard(index, count) for index in range(count)]


def batch(index: str, count: str) -> dict[str, str]:
    return {"AWS_BATCH_JOB_ARRAY_INDEX": index, "AWS_BATCH_JOB_ARRAY_SIZE": count}


def cloud_run(index: str, count: str) -> dict[str, str]:
    return {"CLOUD_RUN_TASK_INDEX": index, "CLOUD_RUN_TASK_COUNT": count}


def slurm(index: str, count: str, first: str, last: str, step: str = "1") -> dict[str, str]:
    names = ("ID", "COUNT", "MIN", "MAX", "STEP")
    return {
        f"SLURM_ARRAY_TASK_{name}": value for name, value in zip(names, (index, count, first, last, step), strict=True)
    }


def without(environ: dict[str, str], name: str) -> dict[str, str]:
    return {variable: value for variable, value in environ.items() if variable != name}


########################################################################
# A shard
########################################################################


@given(st.text(), COUNTS)
def test_every_text_belongs_to_exactly_one_shard(text: str, count: int) -> None:
    assert sum(shard.owns(text) for shard in shards(count)) == 1


@pytest.mark.parametrize(
    ("text", "owners"),
    [
        ("", (0, 0, 4, 876)),
        ("a", (1, 2, 7, 343)),
        ("converted/a.jpg", (0, 1, 2, 922)),
        ("converted/photos/IMG_0001.jpg", (1, 0, 7, 591)),
        ("converted/Überweisung 7.pdf", (0, 1, 0, 112)),
        ("line\nbreak", (0, 1, 4, 644)),
        ("\ud800", (0, 2, 0, 464)),
    ],
)
def test_what_belongs_to_whom_never_changes(text: str, owners: tuple[int, ...]) -> None:
    for count, owner in zip((2, 3, 8, 1000), owners, strict=True):
        assert program.Shard(owner, count).owns(text)


def test_the_shards_are_about_equally_large() -> None:
    keys = [f"converted/photos/IMG_{number:05}.jpg" for number in range(8000)]
    sizes = [sum(map(shard.owns, keys)) for shard in shards(8)]
    assert min(sizes) > 900
    assert max(sizes) < 1100


@given(st.integers(0, 10**9), COUNTS)
def test_the_shares_add_up_and_differ_by_one_at_most(total: int, count: int) -> None:
    shares = [shard.share(total) for shard in shards(count)]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("s3_bulk_convert.sqlite3", "s3_bulk_convert.0-of-8.sqlite3"),
        ("summary.json", "summary.0-of-8.json"),
        ("/var/lib/convert.d/state", "/var/lib/convert.d/state.0-of-8"),
        ("a.b.c", "a.b.0-of-8.c"),
        (".hidden", ".hidden.0-of-8"),
        ("/dev/null", "/dev/null"),
        ("/proc/self/fd/1", "/proc/self/fd/1"),
    ],
)
def test_each_shard_has_a_file_of_its_own(path: str, expected: str) -> None:
    assert program.Shard(0, 8).file(path) == expected
    assert program.Shard().file(path) == path


@pytest.mark.parametrize(("text", "expected"), [("0/1", (0, 1)), ("7/8", (7, 8)), ("9999/10000", (9999, 10_000))])
def test_a_shard_is_read(text: str, expected: tuple[int, int]) -> None:
    assert program.Shard.parse(text) == program.Shard(*expected)


@pytest.mark.parametrize("text", ["", "1", "8/8", "0/0", "-1/8", "1/ 8", "1/8/8", "a/b", "0/10001", "1.0/8", "¹/8"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{I_OF_N}$"):
        program.Shard.parse(text)


########################################################################
# Environments of array jobs
########################################################################


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param({}, (0, 1), id="none"),
        pytest.param({"SLURM_JOB_ID": "7", "AWS_BATCH_JOB_ID": "x"}, (0, 1), id="jobs that are no arrays"),
        pytest.param({"JOB_COMPLETION_INDEX": "", "SHARD_COUNT": ""}, (0, 1), id="empty"),
        pytest.param(batch("3", "16"), (3, 16), id="AWS Batch"),
        pytest.param(cloud_run("0", "1"), (0, 1), id="Cloud Run with one task"),
        pytest.param(cloud_run("4", "5"), (4, 5), id="Cloud Run"),
        pytest.param(kubernetes("15", "16"), (15, 16), id="Kubernetes"),
        pytest.param(slurm("0", "16", "0", "15"), (0, 16), id="Slurm 0-15"),
        pytest.param(slurm("16", "16", "1", "16"), (15, 16), id="Slurm 1-16"),
        pytest.param(slurm("7", "4", "3", "9", "2"), (2, 4), id="Slurm 3-9:2"),
        pytest.param(slurm("5", "1", "5", "5"), (0, 1), id="Slurm 5"),
        pytest.param(without(slurm("2", "3", "1", "3"), "SLURM_ARRAY_TASK_STEP"), (1, 3), id="Slurm without a step"),
        pytest.param({**batch("1", "4"), **kubernetes("1", "4")}, (1, 4), id="two that agree"),
        pytest.param({**slurm("2", "4", "1", "4"), **kubernetes("1", "4")}, (1, 4), id="two that agree by rank"),
    ],
)
def test_the_environment_of_an_array_job_names_the_shard(environ: dict[str, str], expected: tuple[int, int]) -> None:
    problems: list[str] = []
    assert program.Shard.from_environment(environ, problems) == program.Shard(*expected)
    assert problems == []


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param(
            {"JOB_COMPLETION_INDEX": "3"}, "JOB_COMPLETION_INDEX = 3: set SHARD_COUNT too", id="an index alone"
        ),
        pytest.param({"SHARD_COUNT": "8"}, "SHARD_COUNT = 8: set JOB_COMPLETION_INDEX too", id="a count alone"),
        pytest.param(
            {"AWS_BATCH_JOB_ARRAY_SIZE": "8"},
            "AWS_BATCH_JOB_ARRAY_SIZE = 8: set AWS_BATCH_JOB_ARRAY_INDEX too",
            id="another count alone",
        ),
        pytest.param(
            {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"},
            "SLURM_ARRAY_TASK_ID = 3, SLURM_ARRAY_TASK_COUNT = 4: "
            "set SLURM_ARRAY_TASK_MIN and SLURM_ARRAY_TASK_MAX too",
            id="Slurm without its first and last",
        ),
        pytest.param(
            batch("x", "8"),
            "AWS_BATCH_JOB_ARRAY_INDEX = x, AWS_BATCH_JOB_ARRAY_SIZE = 8: expected a whole number of 0 or more",
            id="no number",
        ),
        pytest.param(
            cloud_run("0", "0"),
            "CLOUD_RUN_TASK_INDEX = 0, CLOUD_RUN_TASK_COUNT = 0: expected a whole number of 1 or more",
            id="a count of 0",
        ),
        pytest.param(
            kubernetes("8", "8"),
            "JOB_COMPLETION_INDEX = 8, SHARD_COUNT = 8: expected an index from 0 to 7",
            id="an index beyond the count",
        ),
        pytest.param(
            kubernetes("8", "10001"),
            "JOB_COMPLETION_INDEX = 8, SHARD_COUNT = 10001: expected at most 10000 shards",
            id="too many",
        ),
        pytest.param(
            slurm("3", "3", "0", "5"),
            "SLURM_ARRAY_TASK_ID = 3, SLURM_ARRAY_TASK_COUNT = 3, SLURM_ARRAY_TASK_MIN = 0, SLURM_ARRAY_TASK_MAX = 5, "
            "SLURM_ARRAY_TASK_STEP = 1: expected indexes without a hole, such as --array=0-15",
            id="Slurm with a hole",
        ),
        pytest.param(
            slurm("4", "4", "3", "9", "2"),
            "SLURM_ARRAY_TASK_ID = 4, SLURM_ARRAY_TASK_COUNT = 4, SLURM_ARRAY_TASK_MIN = 3, SLURM_ARRAY_TASK_MAX = 9, "
            "SLURM_ARRAY_TASK_STEP = 2: expected an index from 3 to 9 in steps of 2",
            id="Slurm between two steps",
        ),
        pytest.param(
            slurm("2", "4", "3", "6"),
            "SLURM_ARRAY_TASK_ID = 2, SLURM_ARRAY_TASK_COUNT = 4, SLURM_ARRAY_TASK_MIN = 3, SLURM_ARRAY_TASK_MAX = 6, "
            "SLURM_ARRAY_TASK_STEP = 1: expected an index from 3 to 6",
            id="Slurm before the first",
        ),
        pytest.param(
            {**batch("1", "4"), **kubernetes("1", "8")},
            "AWS Batch (AWS_BATCH_JOB_ARRAY_INDEX = 1, AWS_BATCH_JOB_ARRAY_SIZE = 4) names shard 1/4 and "
            "Kubernetes (JOB_COMPLETION_INDEX = 1, SHARD_COUNT = 8) names shard 1/8: unset what is not meant",
            id="two that differ",
        ),
    ],
)
def test_an_ambiguous_environment_is_a_problem_with_its_remedy(environ: dict[str, str], expected: str) -> None:
    problems: list[str] = []
    program.Shard.from_environment(environ, problems)
    assert problems == [f"{expected}, {REMEDY}"]


def test_a_problem_of_one_engine_is_named_even_if_another_is_complete() -> None:
    problems: list[str] = []
    program.Shard.from_environment({**batch("1", "4"), "JOB_COMPLETION_INDEX": "1"}, problems)
    assert problems == [f"JOB_COMPLETION_INDEX = 1: set SHARD_COUNT too, {REMEDY}"]


########################################################################
# Settings
########################################################################


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a complete configuration with some more lines, for a shard and in an environment."""
    path = tmp_path / "some.ini"

    def load(
        flag: str | None = None,
        environ: Mapping[str, str] | None = None,
        more: str = "",
        given: Sequence[program.RawOption] = (),
    ) -> program.Settings:
        path.write_text(COMPLETE + more, encoding="utf-8")
        path.chmod(0o600)
        return program.load_settings(path, environ or {}, given, flag)

    return load


def test_the_command_line_overrides_any_environment(load: Load) -> None:
    assert load(environ=batch("3", "16")).shard == program.Shard(3, 16)
    assert load("1/2", batch("3", "16")).shard == program.Shard(1, 2)
    assert load("0/1", {"SHARD_COUNT": "x"}).shard == program.Shard()


def test_a_shard_has_its_own_files_and_its_share_of_the_cap_but_the_whole_rate(
    load: Load,
) -> None:
    capped = [
        program.RawOption("api", "max_conversions", "4", ""),
        program.RawOption("api", "requests_per_minute", "60", ""),
    ]
    settings = load("1/3", more="summary = out/s.json\nmetrics = out/s.prom\n", given=capped)
    assert (settings.run.summary, settings.run.metrics) == ("out/s.1-of-3.json", "out/s.1-of-3.prom")
    assert settings.run.checkpoint == "s3_bulk_convert.1-of-3.sqlite3"
    assert settings.run.failures == "conversion_failures.1-of-3.jsonl"
    assert [load(f"{index}/3", given=capped).api.max_conversions for index in range(3)] == [2, 1, 1]
    assert settings.api.requests_per_minute == 60


def test_without_a_shard_nothing_changes(load: Load) -> None:
    settings = load(more="summary = s.json\n")
    assert (settings.run.checkpoint, settings.run.summary) == ("s3_bulk_convert.sqlite3", "s.json")
    assert (settings.shard, settings.shard.named) == (program.Shard(), "")


def test_problems_with_the_shard_come_with_all_the_others(load: Load) -> None:
    with pytest.raises(program.RunError) as refused:
        load("8/8", more="wokers = 1\n")
    assert refused.value.message.split("\n  - ")[1:] == [
        "[run] wokers is not an option; did you mean workers?",
        f"--shard = 8/8: {I_OF_N}",
    ]
    with pytest.raises(program.RunError, match=r"wokers(.|\n)*SHARD_COUNT = 8: set JOB_COMPLETION_INDEX too"):
        load(environ={"SHARD_COUNT": "8"}, more="wokers = 1\n")
