"""Whose an output is: nothing that another source, bucket or person has put there is overwritten or taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from botocore.exceptions import ClientError

import s3_bulk_convert as program
from s3_bulk_convert import ObjectFailed, Task
from tests.test_feeder import FakeBucket, settings, source


class Heads(program.Bucket):
    """A bucket whose server answers each HEAD alike: with an error's code, or with metadata."""

    def __init__(self, answer: str | dict[str, str]) -> None:
        self.name, self.output_name, self._payer, self.client = "in", "out", {}, cast(Any, self)
        self._answer = answer

    def head_object(self, **_: str) -> dict[str, dict[str, str]]:
        """Answer as boto3 does."""
        if isinstance(self._answer, dict):
            return {"Metadata": self._answer}
        status: Any = {"HTTPStatusCode": int(self._answer)}
        raise ClientError({"Error": {"Code": self._answer}, "ResponseMetadata": status}, "HeadObject")


TASK = Task("j", "f", "k.png", "e", 1, "jpg", None, "k.jpg", "i", among_sources=True)
SHOWN = replace(TASK, look_first=True)  # by a listing
OURS = {"source-key": "k.png", "source-etag": "e", "job": "j", "job-fingerprint": "f"}


@pytest.mark.parametrize(
    ("answer", "task", "code", "permanent"),
    [
        ("404", SHOWN, "", False),
        ("500", TASK, "look_failed", False),
        ("503", SHOWN, "look_failed", False),
        ("403", TASK, "", False),
        ("403", replace(SHOWN, traced=True), "", False),
        ("403", SHOWN, "output_collision", False),
        ({}, TASK, "output_collision", True),
        (OURS, TASK, "", False),
        ({**OURS, "source-bucket": "in"}, TASK, "", False),
        ({**OURS, "source-bucket": "another"}, TASK, "output_collision", True),
        ({**OURS, "source-key": "l.png"}, TASK, "output_collision", True),
    ],
)
def test_only_what_is_known_to_be_absent_or_this_source_s_is_written(
    answer: str | dict[str, str], task: Task, code: str, *, permanent: bool
) -> None:
    found = ("", False)
    try:
        Heads(answer).refuse_to_overwrite(task)
    except ObjectFailed as failure:
        found = (failure.code, failure.permanent)
    assert found == (code, permanent)


def test_what_cannot_be_looked_at_is_no_output_and_what_s3_does_not_say_is_a_failure() -> None:
    assert [Heads(answer).is_our_output("k.jpg") for answer in ("404", "403", OURS)] == [False, False, True]
    for look in (Heads("500").is_our_output, Heads("500").output_of):
        with pytest.raises(ObjectFailed, match="500"):
            look(cast(Any, TASK))


def test_of_each_folder_one_object_is_looked_at_and_more_only_among_outputs(tmp_path: Path) -> None:
    looked: list[str] = []

    class Watched(FakeBucket):
        def is_our_output(self, key: str) -> bool:
            looked.append(key)
            return key.startswith("out/")

    names = ["a.png", "b.png", "in/a.png", "in/deep/b.png", "out/a.png", "out/b.png"]
    with program.Journal(tmp_path / "checkpoint", "bucket", "bucket") as journal:
        planner = program.Planner(settings(), Watched([]), journal, program.StopFlag())
        tasks = planner.tasks_of([source(name) for name in names], planner.routes)
        planner.tasks_of([source("in/c.png")], planner.routes)
    assert [task.key for task in tasks] == names[:4]
    assert looked == ["a.png", "in/a.png", "out/a.png", "out/b.png"]
    assert planner.counts["default", program.OWN_OUTPUT] == 2
