"""`run.metrics` is what Prometheus reads, whatever the names in it are, and however many."""

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import s3_bulk_convert as program

INI = "[s3]\nbucket = b\n[convert]\ntarget = jpg\n"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> program.Settings:
    """A complete configuration whose checkpoint and metrics have odd names, in a directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.ini"
    path.write_text(INI + '[run]\nmetrics = x.prom\ncheckpoint = a "quoted"\\ name\n')
    return program.load_settings(path, {"CTF_API_KEY": "k"}, [])


def failed(code: str) -> program.Outcome:
    """A failure with a code of the API's own."""
    source = program.SourceObject("a.png", "etag", 1)
    task = program.Task("default", "fingerprint", source, "jpg", None, "converted/a.jpg")
    return program.Outcome(task, program.OutcomeKind.FAILED, code, "message")


def test_labels_of_any_text_are_read_back_as_they_were(settings: program.Settings) -> None:
    odd = 'a "quoted"\\ line\nand another'
    report = program.Report(settings)
    report.add(failed(odd))
    program.Progress(settings, report).finish()
    families = {family.name: family for family in text_string_to_metric_families(Path("x.prom").read_text())}
    (sample,) = families["s3_bulk_convert_failed_objects"].samples
    assert sample.labels == {"bucket": "b", "checkpoint": 'a "quoted"\\ name', "code": odd}
    assert sample.value == 1


def test_codes_without_end_become_one_label(settings: program.Settings) -> None:
    report = program.Report(settings)
    for number in range(100):
        report.add(failed(f"code_{number}"))
    assert len(report.failed) == len(report.examples) == program.Report.CODES_KEPT + 1
    assert report.failed["other"] == 100 - program.Report.CODES_KEPT
    assert report.failed.total() == 100


def test_it_may_not_be_another_file_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "config.ini"
    path.write_text(INI + "[run]\nsummary = x\nmetrics = x\n")
    with pytest.raises(program.RunError, match=r"\[run\] metrics = x: is the summary file as well"):
        program.load_settings(path, {"CTF_API_KEY": "k"}, [])
