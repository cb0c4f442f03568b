"""Bad input of every kind: one clear message, the documented exit code, no traceback, nothing started."""

import re
from dataclasses import replace

import s3_bulk_convert as program
from tests.standins.program import SCRIPT


def test_what_may_have_been_paid_twice_is_named_with_a_hint() -> None:
    report, task = program.Report(), program.Task("default", "f", "a.png", "e", 1, "jpg", None, "o", "i")
    for key in ("a.png", "b.png"):
        done = program.Outcome(replace(task, key=key), program.Event.CONVERTED, maybe_paid_twice=True)
        report.add(replace(done, replayed=True, remaining=1))
        if key == "a.png":
            settings = program.load_settings(None, {"CTF_API_KEY": "k", "S3_BUCKET": "b", "TARGET_FORMAT": "jpg"}, [])
            lines = list(program.summary_lines(report, settings))
            assert "warning       1 conversion may have been charged twice, for example a.png" in lines
            assert lines[lines.index("quota         1 conversion left") - 1].strip() == program.PAID_TWICE_HINT
            assert "requests      0 (0 throttled, 1 replay)" in lines
    said = "warning       2 conversions may have been charged twice, for example a.png"
    assert said in program.summary_lines(report, settings)


def test_each_code_of_this_program_has_a_remedy() -> None:
    source = SCRIPT.read_text()
    codes = set(re.findall(r'(?:ObjectFailed|BadAnswer)\(\s*"(\w+)"', source))
    codes |= set(re.findall(r'self\._fail\(\s*task, "(\w+)"', source))
    codes |= set(re.findall(r'Event\.FAILED, "(\w+)"', source)) | set(re.findall(r'code or "(\w+)"', source))
    assert {"output_collision", "cut_answer", "bug", "job_failed"} < codes
    assert codes - set(program.REMEDIES) == set()
