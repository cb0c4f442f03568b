"""What the end of a run says in words: each failure has its remedy, each doubt about charges its example."""

import re
from dataclasses import replace

import s3_bulk_convert as program
from tests.standins.program import SCRIPT

TASK = program.Task("default", "f", program.SourceObject("a.png", "e", 1), "jpg", None, "o")


def test_what_may_have_been_paid_twice_is_named_with_a_hint() -> None:
    settings = program.load_settings(None, {"CTF_API_KEY": "k", "S3_BUCKET": "b", "TARGET_FORMAT": "jpg"}, [])
    report = program.Report(settings)
    converted = program.Outcome(TASK, program.OutcomeKind.CONVERTED, possible_double_charge=True)
    report.add(replace(converted, is_replay=True, remaining=1))
    lines = list(report.lines())
    assert "warning       1 conversion may have been charged twice, for example a.png" in lines
    assert lines[lines.index("quota         1 conversion left") - 1].strip() == (
        "the API has seen the request before, from a run that this checkpoint does not know; "
        "compare with your account's usage page"
    )
    assert "requests      0 (0 throttled, 1 replay)" in lines
    report.add(replace(converted, task=replace(TASK, source=program.SourceObject("b.png", "e", 1))))
    assert "warning       2 conversions may have been charged twice, for example a.png" in report.lines()


def test_each_code_of_this_program_has_a_hint() -> None:
    source = SCRIPT.read_text()
    codes = set(re.findall(r'(?:ObjectFailed|InvalidResponse)\(\s*"(\w+)"', source))
    codes |= set(re.findall(r'OutcomeKind\.FAILED, "(\w+)"', source)) | set(re.findall(r'code or "(\w+)"', source))
    codes |= set(re.findall(r'replace\(outcome, code="(\w+)"', source))
    assert {"not_stored", "cut_answer", "bug", "job_failed", "worker_died", "gave_up"} < codes
    assert (codes | program.FREE_FAILURES) - set(program.HINTS) == set()
