"""`run.metrics` is what Prometheus reads, and what `promtool check metrics` finds nothing wrong with."""

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import s3_bulk_convert as program


def test_labels_of_any_text_are_read_back_as_they_were() -> None:
    odd = 'a "quoted"\\ line\nand another'
    text = program.metric_text(program.Metric("failed_objects_total", "About.", [({"code": odd}, 1)]), {"bucket": odd})
    ((sample,),) = [family.samples for family in text_string_to_metric_families(text)]
    assert sample.labels == {"bucket": odd, "code": odd}


def test_codes_without_end_become_one_label() -> None:
    report = program.Report()
    task = program.Task("default", "f", "k", "e", 1, "jpg", None, "o", "i")
    for number in range(100):
        report.add(program.Outcome(task, program.Event.FAILED, f"code_{number}", "message"))
    assert len(report.failed) == len(report.examples) == program.CODES_KEPT + 1
    assert report.failed["other"] == 100 - program.CODES_KEPT
    assert report.failed.total() == 100


def test_it_may_not_be_another_file_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "config.ini"
    path.write_text("[s3]\nbucket = b\n[convert]\ntarget = jpg\n[run]\nsummary = x\nmetrics = x\n")
    with pytest.raises(program.ConfigError, match=r"\[run\] metrics = x: is the summary file as well"):
        program.load_settings(path, {"CTF_API_KEY": "k"}, [])
