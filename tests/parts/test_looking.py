"""--check and --status: what they say of this machine and of the checkpoint."""

import random
from collections import Counter
from pathlib import Path

import pytest

import s3_bulk_convert as program
from s3_bulk_convert import Journal, Outcome, OutcomeKind, PendingRequest, SourceObject, StoredOutput, Task


def settings(*assignments: str) -> program.Settings:
    """A complete configuration with these options."""
    complete = ("s3.bucket=bucket", "convert.target=jpg", "api.key=ctf_sk_test_1", *assignments)
    flags = [part for assignment in complete for part in ("--set", assignment)]
    return program.load_settings(None, {}, program.read_flags(program.build_parser().parse_args(flags)))


def test_packages_that_are_too_old_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "OLDEST_PACKAGES", {"requests": "99.1"})
    program.Diagnostics(settings()).check_versions()
    assert capsys.readouterr().out.startswith("FAIL versions: too old for requests>=99.1; run: ")


@pytest.mark.parametrize(("limit", "verdict"), [("LITTLE_DISK_BYTES", "WARN"), ("SCARCE_DISK_BYTES", "FAIL")])
def test_a_disk_that_is_nearly_full_is_told(
    limit: str, verdict: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(program, limit, 10**18)
    program.Diagnostics(settings(f"run.checkpoint={tmp_path}/checkpoint")).check_space()
    assert f"{verdict} space in {tmp_path}: " in capsys.readouterr().out


def test_each_object_is_counted_by_its_newest_row(tmp_path: Path) -> None:
    path, dice, newest = (
        tmp_path / "checkpoint.sqlite3",
        random.Random(5),
        dict[tuple[str, str], tuple[str, bool, str]](),
    )
    failures = [(OutcomeKind.FAILED, "x", True), (OutcomeKind.FAILED, "y", False)]
    kinds = [(OutcomeKind.CONVERTED, "", False), (OutcomeKind.FOUND, "", False), *failures]
    wanted = settings("job f.quality=1", "job g.quality=2", "run.checkpoint=none")
    with Journal(path, "aws", wanted) as journal:
        journal.begin_run(1.0)
        for _ in range(300):
            key, job, (kind, code, lasts) = dice.choice("abcdefgh"), dice.choice(wanted.jobs), dice.choice(kinds)
            task = Task(job.name, job.fingerprint, SourceObject(key, "e1", 1), "jpg", None, f"{key}.jpg")
            journal.settle([Outcome(task, kind, code, permanent=lasts)], 1.0)
            newest[job.name, key] = (kind.value, lasts, code)
    with Journal(path, "aws", wanted, read_only=True) as reader:
        counted = {counts["configured_as"]: counts for counts in reader.counts()}
    for name in "fg":
        states = Counter(state for (of, _), state in newest.items() if of == name)
        found = counted[name]
        assert found["converted"] == states["converted", False, ""]
        assert found["found"] == states["found", False, ""]
        assert found["failed_for_good"] == {code: n for (_, lasts, code), n in states.items() if lasts}
        assert found["failed_for_now"] == {code: n for (_, lasts, code), n in states.items() if code and not lasts}


@pytest.mark.parametrize("place", ["arn:aws:s3:us-east-1:123456789012:accesspoint/mine", "out"])
def test_why_knows_the_outputs_in_a_bucket_of_any_name(place: str, tmp_path: Path) -> None:
    # Without credentials, what S3 would say is left out.
    without_s3 = ("s3.profile=nobody", f"run.checkpoint={tmp_path}/checkpoint")
    outputs = (f"s3.output_bucket={place}", "s3.output_key=out/{stem}.{target}")
    wanted = settings(*outputs, *without_s3)
    task = Task("default", wanted.jobs[0].fingerprint, SourceObject("a.png", "e1", 1), "jpg", None, "out/a.jpg")
    request = PendingRequest("e2", "id", "/v1/convert", "https://signed", 1.0, "job-7", 2, 1)
    with Journal(Path(wanted.run.checkpoint), "aws", wanted) as journal:
        journal.begin_run(1.0)
        for seconds, key in enumerate(("out/a.jpg", "out/a.jpg.zip")):
            journal.settle([Outcome(task, OutcomeKind.CONVERTED, output=StoredOutput(key, "e3", 5))], seconds)
        journal.settle([Outcome(task, OutcomeKind.FAILED, "network", pending=request)], 2.0)
    found = program.Why(wanted, "a.png").document()
    assert [row["output_key"] for row in found["history"]] == [None, "out/a.jpg.zip", "out/a.jpg"]
    assert [sent["output_key"] for sent in found["in_flight"]] == ["out/a.jpg"]
