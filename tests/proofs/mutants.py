"""Plant defects in the program, one at a time, and see whether the tests notice: what cannot fail proves nothing.

    python -m tests.proofs.mutants [WORD ...]      only the defects whose sentence or tests contain one of the words

Each runs its own tests alone, on a copy of the tracked files. First they all run on the program as it is: what fails
there sees nothing. Exit code 1: a defect is not seen, or its row in the table does not fit the program or the tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[2]
SCRIPT = "s3_bulk_convert.py"
PYTEST = (sys.executable, "-m", "pytest", "-c", "tests/pytest.ini", "-m", "not real", "-p", "no:cacheprovider", "-q")


class Defect(NamedTuple):
    """One change that makes the program wrong, and the tests that must see it, by name: the first to fail is enough."""

    sentence: str
    text: str  # in the program, exactly once
    replacement: str
    tests: tuple[str, ...]


def defect(sentence: str, text: str, replacement: str, *tests: str) -> Defect:
    """A row of the table."""
    return Defect(sentence, text, replacement, tests)


def redirected(which: str, where: str, test: str) -> Defect:
    """Two lines keep redirects from being followed; both are taken away where a condition holds."""
    text = """allow_redirects=False, timeout=self._timeout, **named)

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        \"\"\"Nowhere. requests would rewind the body even for a redirect that it is told not to follow.\"\"\"
        return None
"""
    followed = text.replace("allow_redirects=False", f"allow_redirects=({where})")
    followed = followed.replace("return None", "return super().get_redirect_target(resp)")
    return defect(f"redirects of {which} are followed", text, followed, test)


EVERY_KEY = "test_every_key_is_listed_once_though_many_pages_are_read_at_a_time"
OPTIONS_OF_OUTPUTS = "test_conversions_and_copies_are_written_with_the_options_that_are_set"
LARGE_OUTPUT = "test_a_large_output_says_what_it_was_made_of_and_is_found_without_the_checkpoint"
WHO_PAYS = "test_whoever_pays_for_requests_says_so_in_each_of_them"
HIDDEN_KEY = "test_a_key_that_the_api_repeats_is_written_nowhere"
APPEND_ONLY = "test_what_the_log_says_cannot_be_changed_or_taken_away"
A_DAY_LATER = "test_a_request_that_was_first_sent_a_day_ago_is_no_replay_however_often_it_was_sent_again"
PUT_AGAIN = "test_the_same_bytes_put_again_are_paid_once_or_counted"
COUNTS_ALL = "test_the_limit_counts_whatever_may_be_charged_for_one_object"
REMAINDER = "test_the_remainder_is_kept_wherever_it_is_said"
NONSENSE = "test_numbers_and_links_that_make_no_sense_are_as_good_as_none"
ORDER = "test_a_listing_out_of_order_stops_the_run_before_anything_is_paid"
WHOLE_PAGE = "test_a_page_that_lacks_an_entry_is_asked_for_again"
NOT_NEWER = "test_another_program_s_output_that_is_not_newer_than_its_source_is_not_taken_for_done"
SENT_UNWRITTEN = "test_nothing_is_sent_while_the_checkpoint_cannot_be_written"
HIDDEN = "test_secrets_are_taken_out_of_a_message"
WRITTEN_OVER = "test_what_is_read_and_what_the_checkpoint_is_made_of_is_not_written_over"
ORDERS = "test_a_code_of_the_api_s_gives_no_orders_to_the_terminal"
INI_MODE = "test_an_ini_with_the_key_is_its_owner_s_alone"
TAGS_OF_OUTPUTS = "test_outputs_have_the_tags_that_are_set_however_they_are_written"
WHICHEVER_WAY = "test_a_source_gets_its_tag_whichever_way_it_becomes_done"
NOT_TAGGED = "test_a_source_that_may_not_be_tagged_is_tagged_by_the_next_run_and_nothing_is_paid_again"
PAID_FOR_ANEW = "test_what_was_converted_before_with_other_options_is_said_before_it_is_paid_for_anew"

LISTING = (
    defect(
        "the key at which a span was cut is lost",
        "if source.key <= key_range.until]",
        "if source.key < key_range.until]",
        EVERY_KEY,
    ),
    defect(
        "the rest of a span is lost after an empty page that is not the last",
        "if page.is_last or last >= self.until:",
        "if page.is_last or not page.objects or last >= self.until:",
        f"{EVERY_KEY}[empty pages among them]",
    ),
    defect(
        "the rest of a span is lost where a page ends just before a cut",
        "if page.is_last or last >= self.until:",
        "if page.is_last or self._position(last) + 95**5 >= self._position(self.until):",
        EVERY_KEY,
    ),
    defect(
        "keys named twice in a file are taken twice",
        "yield [named for key, named in page.items() if key not in recent]",
        "yield list(page.values())",
        "test_a_key_is_not_named_again_while_it_may_be_at_work",
    ),
    defect(
        "an existing output at the very end of a page is missed",
        "(page.is_last or wanted[-1] <= after)",
        "(page.is_last or wanted[-1] < after)",
        "test_an_output_at_the_very_end_of_a_page_is_found",
    ),
    defect(
        "a page without all its entries is taken",
        "(count is not None and int(count) != len(objects))",
        "False",
        f"{WHOLE_PAGE}[a whole entry]",
    ),
    defect(
        "an entry that is not whole is left out of its page",
        'raise ValueError("an entry without key, size or time")',
        "continue",
        f"{WHOLE_PAGE}[the time of an entry, and of no count]",
    ),
    defect(
        "a page that is not whole is taken for an empty last one",
        'customized_response_dict["Problem"] = str(problem)',
        'customized_response_dict["Page"] = Page([], is_last=True)',
        "test_one_page_that_breaks_changes_neither_what_is_converted_nor_what_is_paid",
    ),
    defect(
        "a listing out of order is taken",
        "if not all(map(operator.lt, keys, keys[1:])):",
        "if code and not all(map(operator.lt, keys, keys[1:])):",
        f"{ORDER}[sources]",
    ),
    defect(
        "a listing of outputs out of order is taken",
        "if not all(map(operator.lt, keys, keys[1:])):",
        "if not code and not all(map(operator.lt, keys, keys[1:])):",
        f"{ORDER}[outputs]",
    ),
    defect(
        "shards by key instead of output",
        "not shard.owns(KeyParts.slot_of(job.output_of(source.key)))",
        "not shard.owns(source.key)",
        "test_two_sources_of_one_output_meet_in_one_shard",
    ),
    defect(
        "the whole cap for every shard",
        "cap = None if api.max_conversions is None else shard.share(api.max_conversions)",
        "cap = api.max_conversions",
        "test_a_share_of_nothing_converts_nothing_and_says_so",
    ),
    defect(
        "an inventory's old versions are taken",
        'cells.get("IsLatest") == "false" or ',
        "",
        "test_what_is_no_newest_version_is_left_out",
    ),
    defect(
        "an inventory's delete markers are taken",
        ' or cells.get("IsDeleteMarker") == "true"',
        "",
        "test_what_is_no_newest_version_is_left_out",
    ),
    defect(
        "an inventory's file of another MD5 is taken",
        'if self._md5 not in {"", digest.hexdigest()}:',
        "if False:",
        "test_of_a_damaged_inventory_nothing_is_converted",
    ),
    defect(
        "an inventory's sizes and ages decide",
        'yield named._replace(version=bare_etag(cells.get("ETag")))',
        'size, time_ = int(cells.get("Size") or 0), cells.get("LastModifiedDate", "")\n                '
        'yield SourceObject(named.key, bare_etag(cells.get("ETag")), size, time_)',
        "test_what_a_row_says_of_size_age_and_storage_decides_nothing",
    ),
    defect(
        "an inventory's version decides what has failed for good",
        "(self.settings.retry_failed or self.settings.keys_from)",
        "self.settings.retry_failed",
        "test_an_object_that_failed_for_good_is_asked_whether_it_is_still_that_one",
    ),
    defect(
        "a job that does not want a named object keeps its output key from others",
        'holder="" if made[owner] == mine else owner',
        "holder=task.holder",
        "test_a_named_object_goes_to_the_job_that_wants_its_size",
    ),
    defect(
        "a named object is judged by one of the jobs that make the same",
        "if mine not in (made[name] for name in wanting):",
        "if f'[job {task.job}]' not in wanting:",
        "test_a_named_object_goes_to_the_job_that_wants_its_size",
    ),
    defect(
        "what is missing of an inventory is repaired though its source is left out",
        "stored = stored._replace(left_out=self._left_out(stored.source_key))",
        "pass",
        "test_what_is_missing_is_left_out_if_a_look_says_so_whatever_the_row_says",
    ),
    defect(
        "a file of keys is judged by a blank line",
        'next(filter(str.strip, head), "")',
        '"".join(head[:1])',
        "test_what_a_file_is_shows_in_its_first_line_that_is_not_blank",
    ),
    defect(
        "why calls an adopted output another's",
        'made_of, maker = "adopted", self._key',
        "pass",
        "test_why_says_what_an_output_is_that_is_adopted",
    ),
    defect(
        "verify says that a run converts what is not there",
        "a run converts those that it can; --why KEY says what it would do",
        "a run converts them",
        "test_each_job_and_each_shard_verifies_its_own_outputs_and_a_file_of_keys_those_of_its_keys",
    ),
    defect(
        "a file that was cut ends the list of keys",
        "except (OSError, EOFError, zlib.error) as problem:\n            what =",
        "except EOFError:\n            return\n        except (OSError, zlib.error) as problem:\n            what =",
        "test_a_file_that_was_cut_is_not_taken_for_whole",
    ),
    defect(
        "a bug is said in place of the feeder's reason",
        "reason = RunError(error.message, error.hint, exit_code, error.code)",
        'reason = RunError("the program has a bug (the feeder failed)", error.hint, exit_code, "bug")',
        "test_a_listing_that_is_refused_is_said_and_is_no_bug",
    ),
)

SOURCES = (
    defect(
        "If-Match is dropped where a source is read",
        '{"IfMatch": source.if_match} if source.if_match else {}',
        "{}",
        "test_a_source_that_is_overwritten_after_it_was_looked_at_is_not_sent_as_what_was_seen",
    ),
    defect(
        "a source is not compared with its listing",
        "if listed.version and not seen.is_version_of(listed):",
        "if False:",
        "test_a_source_that_is_overwritten_after_it_was_listed_is_not_sent_as_what_was_listed",
    ),
    defect(
        "If-Match is dropped where a source is copied",
        'extra["CopySourceIfMatch"] = source.if_match',
        "pass",
        "test_nothing_is_copied_of_a_source_that_is_not_what_was_looked_at",
    ),
    defect(
        "a source that the API has fetched is not looked at again",
        "bucket.require_unchanged(task.source, head)",
        "pass",
        "test_nothing_is_stored_of_a_source_that_was_overwritten_while_it_was_fetched",
    ),
    defect(
        "requester pays is not said when a source is read",
        "Key=source.key, **condition, **self._payer)",
        "Key=source.key, **condition)",
        f"{WHO_PAYS}[upload]",
    ),
    defect(
        "requester pays is not said in a URL",
        '"x-amz-request-payer": "requester"}',
        "}",
        f"{WHO_PAYS}[url]",
    ),
    defect(
        "requester pays is not said in a listing",
        '"MaxKeys": PAGE_KEYS, **where, **self._payer}',
        '"MaxKeys": PAGE_KEYS, **where}',
        WHO_PAYS,
    ),
    defect(
        "requester pays is not said in a look",
        "self.client.head_object(Bucket=bucket, Key=key, **self._payer)",
        "self.client.head_object(Bucket=bucket, Key=key)",
        WHO_PAYS,
    ),
    defect(
        "requester pays is not said when an output is written",
        '{"Metadata": metadata, **self._payer, ',
        '{"Metadata": metadata, ',
        WHO_PAYS,
    ),
)

OUTPUTS = (
    *(
        defect(f"s3.{option} is not sent", f'"{name}": options.{option},', f'"{name}": None,', OPTIONS_OF_OUTPUTS)
        for option, name in {
            "storage_class": "StorageClass",
            "sse": "ServerSideEncryption",
            "sse_kms_key_id": "SSEKMSKeyId",
            "acl": "ACL",
            "cache_control": "CacheControl",
        }.items()
    ),
    defect(
        "a large output is put without metadata and options",
        "upload_fileobj(file.body, self.output_name, key, ExtraArgs=extra,",
        "upload_fileobj(file.body, self.output_name, key, ExtraArgs={},",
        LARGE_OUTPUT,
    ),
    defect(
        "a large output is put with its options and without its metadata",
        "upload_fileobj(file.body, self.output_name, key, ExtraArgs=extra,",
        'upload_fileobj(file.body, self.output_name, key, ExtraArgs={**extra, "Metadata": {}},',
        LARGE_OUTPUT,
    ),
    defect(
        "nothing is looked at before it is overwritten among the sources",
        "is_there = task.output_key in there",
        "is_there = task.output_key in there and not self.settings.puts_among_sources(jobs[task.job])",
        "test_among_the_sources_nothing_is_overwritten_that_nobody_has_looked_at",
    ),
    defect(
        "what the checkpoint knows is overwritten unseen when its source has changed",
        "is_there = task.output_key in there",
        "is_there = task.output_key in there and task.known is None",
        "test_among_the_sources_an_output_that_somebody_has_replaced_is_not_overwritten_when_its_source_changes",
    ),
    defect(
        "an archive's key is not claimed",
        'return output_key.removesuffix(".zip")',
        "return output_key",
        "test_the_key_of_an_archive_that_is_yet_to_be_made_is_taken",
    ),
    defect(
        "an archive's key is not looked at by a worker",
        'for key in (task.output_key, f"{task.output_key}.zip") if task.look else ():',
        "for key in (task.output_key,) if task.look else ():",
        "test_an_archive_of_pages_overwrites_no_other_archive",
    ),
    defect(
        "an archive's key is not looked for in the listing of outputs",
        'made in (key, f"{key}.zip")}',
        "made in (key,)}",
        "test_an_archive_of_pages_overwrites_no_other_archive",
    ),
    defect(
        "an archive is stored before its pages",
        "        self._require_place(task, key)\n        for number",
        "        self._put(task, key, file)\n        for number",
        "test_a_kill_between_the_pages_of_a_document_leaves_no_archive_and_pays_nothing_twice",
    ),
    defect(
        "pages are stored for an archive whose place is taken",
        "        self._require_place(task, key)\n        for number",
        "        for number",
        "test_where_another_s_object_lies_by_then_nothing_is_overwritten",
    ),
    defect(
        "pages are stored while they are judged",
        "for page in file.unpacked(target):\n                    file.pages,",
        "for page in [file]:\n                    file.pages,",
        "test_an_archive_with_what_is_no_page_is_stored_only_as_it_is_and_bought_once",
    ),
    defect(
        "what was paid for an archive with what is no page is forgotten",
        'not in {"not_stored", "bad_pages", "too_large"}',
        'not in {"not_stored", "too_large"}',
        "test_an_archive_with_what_is_no_page_is_stored_only_as_it_is_and_bought_once",
    ),
    defect(
        "a page is whatever is in an archive",
        "if not size or found is None or found.suffix:",
        "if found is None:",
        "test_an_archive_that_is_no_archive_of_pages_is_refused",
    ),
    defect(
        "an archive's own sizes are believed",
        "left -= page.size",
        "left -= entry.compress_size",
        "test_a_bomb_is_counted_while_it_is_unpacked",
    ),
    defect(
        "a table of contents may fill the memory",
        "if size > CONTENTS_BYTES:",
        "if size > 2**40:",
        "test_neither_a_large_page_nor_a_long_table_of_contents_is_held_in_memory",
    ),
    defect(
        "the key of a page may be too long",
        'if self.settings.by_name[task.job].pages == "unpack":',
        'if self.settings.by_name[task.job].pages == "none":',
        "test_an_output_key_that_cannot_be_written_is_never_paid_for",
    ),
    defect(
        "whether pages are unpacked makes another output",
        "return digest([self.target, self.quality])",
        "return digest([self.target, self.quality, self.pages])",
        "test_a_job_may_unpack_and_what_was_stored_before_stays_done",
    ),
    defect(
        "what was claimed on the page before is forgotten",
        'how = "REPLACE" if anew else "IGNORE"',
        'how = self._temporary.execute("DELETE FROM claims") and ("REPLACE" if anew else "IGNORE")',
        "test_a_key_that_is_taken_on_one_page_is_no_other_source_s_on_the_next",
    ),
    defect(
        "a refused look at an output is taken for absent",
        "            head = self._look_at_place(task, key)\n",
        """            try:
                head = self._look_at_place(task, key)
            except ObjectFailed:
                head = None
""",
        "test_an_output_that_may_not_be_looked_at_is_not_overwritten",
    ),
    defect(
        "nothing is looked at right before it is stored",
        "        self._require_place(task, key)\n        extra",
        "        extra",
        "test_what_is_put_there_while_a_source_is_converted_is_not_overwritten",
    ),
    defect(
        "the place of what is put in parts is not looked at once more",
        """        self._require_place(self._storing.task, params["Key"])
""",
        "        pass\n",
        "test_what_is_put_there_while_parts_are_is_not_overwritten_and_no_part_is_left",
    ),
    defect(
        "large outputs are put by a client that looks at no place",
        'preferred_transfer_client="classic"',
        'preferred_transfer_client="auto"',
        "test_a_large_object_comes_out_whole",
    ),
    defect(
        "a job that copies is left out for one that leaves the object as it is",
        'handling = self.same_format if self.is_same_format(key) else "convert"',
        'handling = "convert"',
        "test_a_job_that_copies_is_not_left_out_for_one_that_skips",
    ),
    defect(
        "--check warns of a job that leaves the object as it is",
        "for job in (each for each in wanting if not each.leaves_as_it_is(source.key)):",
        "for job in wanting:",
        "test_a_job_that_copies_is_not_left_out_for_one_that_skips",
    ),
    defect(
        "--check warns of jobs that would make the very same output",
        "if first.result_of(source.key) != job.result_of(source.key):",
        "if first is not job:",
        "test_check_does_not_warn_of_two_jobs_that_make_the_very_same_output",
    ),
    defect(
        "--verify expects outputs of what is left as it is",
        "each.kind is not DecisionKind.DONE and each.reason != SAME_FORMAT:",
        "each.kind is not DecisionKind.DONE:",
        "test_a_source_that_is_left_as_it_is_hides_nothing_that_lies_where_its_output_would",
    ),
    defect(
        "--why calls an output key free that a source of another folder may take",
        'free = "free" if is_of_folder else',
        'free = "free" if True else',
        "test_why_says_of_a_free_key_that_a_source_of_another_folder_may_take_it",
    ),
    defect(
        "a yes of S3's without an ETag is believed",
        'bare_etag(reply.get("ETag")) or bare_etag(self._head_stored(key).get("ETag"))',
        'bare_etag(reply.get("ETag"))',
        "test_what_only_a_portal_says_it_has_taken_is_not_stored",
    ),
    defect(
        "the request of what is given up is forgotten",
        "permanent=True, runs_failed=runs)",
        "permanent=True, runs_failed=runs, pending=None)",
        "test_what_was_paid_for_and_given_up_is_not_paid_for_again",
    ),
    defect(
        "a refused look at a source is taken for absent",
        "except ObjectFailed:\n            return None\n        return head is None",
        "except ObjectFailed:\n            return True\n        return head is None",
        "test_what_was_paid_keeps_its_key_while_its_source_may_not_be_looked_at",
    ),
    defect(
        "an output older than its source is taken for done",
        'is_newer = "LastModified" in head and head["LastModified"].timestamp() > source.modified',
        "is_newer = True",
        f"{NOT_NEWER}[older]",
    ),
    defect(
        "an output as old as its source is taken for done",
        'head["LastModified"].timestamp() > source.modified',
        'head["LastModified"].timestamp() >= source.modified',
        f"{NOT_NEWER}[of the same second]",
    ),
    defect(
        "another bucket's output is replaced",
        "if not is_of_key or bucket != self.name:",
        "if not is_of_key:",
        "test_of_two_buckets_with_one_output_bucket_none_overwrites_the_other_s",
    ),
)

AGAIN = (
    defect(
        "a failure forgets that an output is to be made again",
        "purpose = known.purpose if known and outcome.kind is OutcomeKind.FAILED else None",
        "purpose = None",
        "test_any_run_goes_on_with_a_repair_that_failed_and_pays_nothing_more",
        "test_any_run_goes_on_with_a_repair_of_a_page_that_failed",
    ),
    defect(
        "what is only to be tagged is taken for lost",
        "return None if self.purpose == TAG else self.purpose",
        "return self.purpose",
        "test_what_is_only_to_be_tagged_is_not_made_again_for_a_page_that_is_gone",
    ),
    defect(
        "a failure forgets that a source is only to be tagged",
        "purpose = known.purpose if known and outcome.kind is OutcomeKind.FAILED else None",
        "purpose = known.lost_in if known and outcome.kind is OutcomeKind.FAILED else None",
        "test_a_source_that_may_not_be_tagged_is_tagged_by_the_next_run_and_nothing_is_paid_again[no]",
    ),
    defect(
        "what is given up when its source could not be tagged is made again",
        "purpose = TAG if outcome.is_untagged else purpose",
        "purpose = TAG if outcome.code in {TAG_FAILED, TOO_MANY_TAGS} else purpose",
        "test_a_source_that_could_not_be_tagged_in_the_last_of_five_failed_runs_is_only_tagged_then",
    ),
    defect(
        "what another has put in a page's place is found after it was paid for",
        "are_there = [self._require_place(task, key) for key in keys]",
        "are_there = (self._require_place(task, key) for key in keys)",
        "test_a_page_that_is_another_s_by_now_keeps_a_repair_from_being_paid_in_vain",
    ),
    defect(
        "what was paid in vain counts as free",
        "return self.code in FREE_FAILURES and (self.is_untagged or not self.paid)",
        "return self.code in FREE_FAILURES",
        "test_answers_that_were_paid_for_and_cannot_be_stored_stop_the_run",
    ),
    defect(
        "bytes put again are sent under another key", "if row.url or not is_same:", "if True:", f"{PUT_AGAIN}[upload-1]"
    ),
    defect("bytes put again are not counted", "first.change(is_doubtful=int(is_same))", "pass", f"{PUT_AGAIN}[url-2]"),
    defect("a cap counts objects", "if is_another or not (self._asked_at", "if not (self._asked_at", COUNTS_ALL),
    defect(
        "a cap counts a refused URL",
        "is_failed_job = self.state is RequestState.REJECTED and bool(self.row.job_id)",
        "is_failed_job = self.state is RequestState.REJECTED",
        "test_a_url_that_the_api_refuses_does_not_count_beside_the_bytes",
    ),
    defect(
        "a cap counts what an earlier run has sent, so that no run gets on",
        "if self.is_resumed or self.is_old_job:",
        "if False:",
        "test_under_a_cap_of_one_runs_get_on_with_what_takes_two",
    ),
    defect(
        "two sources of one output are paid where outputs may not be listed",
        "elif task.pending or (task.output_key in there and not self._outputs.refusal):",
        "elif task.output_key in there:",
        "test_of_two_sources_with_one_output_one_is_paid_where_outputs_may_not_be_listed",
    ),
    defect(
        "a named object is handled as another job says",
        'handling = self.same_format if self.is_same_format(key) else "convert"',
        'handling = "skip" if self.leaves_as_it_is(key) else "convert"',
        "test_a_named_object_is_handled_as_the_job_that_wants_its_size_says",
    ),
    defect(
        "what remains is not read where a job is made",
        "if answer.status_code in {200, 202} and remaining",
        "if answer.status_code == 200 and remaining",
        REMAINDER,
    ),
    defect(
        "a number that is said twice is none",
        '.get("X-CTF-Remaining", "").split(",")',
        '.get("X-CTF-Remaining", "").split(";")',
        REMAINDER,
    ),
)
TAGS = (
    defect("s3.tags are not sent", '"Tagging": self._tagging,', '"Tagging": "",', TAGS_OF_OUTPUTS),
    defect(
        "a copy in parts is there before it has its tags",
        'events.register("provide-client-params.s3.CreateMultipartUpload", self._tag_parts)',
        "pass",
        TAGS_OF_OUTPUTS,
    ),
    defect(
        "a copy has the tags of its source",
        '"TaggingDirective": "REPLACE"}',
        '"TaggingDirective": "COPY"}',
        "test_a_copy_has_no_tags_of_its_source",
    ),
    defect(
        "a source whose output is found is not tagged",
        "bucket.tag_source(task.source, head)",
        "existing or bucket.tag_source(task.source, head)",
        WHICHEVER_WAY,
        "test_a_run_after_a_kill_finishes_and_pays_nothing_twice[source-tagged-before-url]",
    ),
    defect(
        "a source is tagged after its output is written down",
        "        bucket.tag_source(task.source, head)\n        return conversation.outcome(kind, output=output)",
        """        self.tell(conversation.outcome(kind, output=output))
        time.sleep(0.5)
        bucket.tag_source(task.source, head)
        return conversation.outcome(OutcomeKind.LEFT)""",
        "test_a_run_after_a_kill_finishes_and_pays_nothing_twice[source-tagged-before-url]",
    ),
    defect("the tags that a source has are lost", "in (had | new).items()]", "in new.items()]", WHICHEVER_WAY),
    defect("a tag that is there is put again", "if new.items() <= had.items():", "if False:", WHICHEVER_WAY),
    defect(
        "an overwritten source is tagged",
        'if "VersionId" not in place:',
        "if False:",
        "test_what_was_overwritten_after_it_was_converted_is_not_tagged",
    ),
    defect(
        "a request for a tag names no version",
        'place["VersionId"] = version',
        "pass",
        "test_what_was_overwritten_after_it_was_converted_is_not_tagged",
    ),
    defect(
        "what could not be tagged is made again",
        "if is_same and (settings.run.skip_existing or task.is_untagged):",
        "if is_same and settings.run.skip_existing:",
        NOT_TAGGED,
    ),
    defect(
        "what could not be tagged is asked for again",
        "is_stored = is_untagged or kind.value in DONE_EVENTS",
        "is_stored = kind.value in DONE_EVENTS",
        NOT_TAGGED,
    ),
    defect(
        "what has no room for a tag is a failure of S3's",
        "FREE_FAILURES |= {TOO_MANY_TAGS}",
        "",
        "test_a_source_that_has_ten_other_tags_is_tried_again_in_every_run",
    ),
)

REQUESTS = (
    defect(
        "a 5xx leaves nothing open",
        "ErrorAction.RETRY: RequestState.UNKNOWN,",
        "ErrorAction.RETRY: RequestState.UNSENT,",
        "test_what_a_gateway_could_not_hand_on_is_asked_for_by_the_next_run_and_not_paid_again",
    ),
    defect(
        "URLs live one hour",
        "ExpiresIn=IDEMPOTENCY_WINDOW_SECONDS",
        "ExpiresIn=3600",
        "test_a_url_lives_as_long_as_the_api_repeats_its_answer",
    ),
    defect(
        "whatever Python calls digits is read as a number of the API's",
        'return int(told) if re.fullmatch("[0-9]{1,15}", told) else None',
        "return int(told) if told.isdigit() else None",
        NONSENSE,
    ),
    defect(
        "a code of the API's is taken for one of this program's",
        'return f"api_{code}" if code in OWN_CODES else code, str(error.get("message") or "")',
        'return code, str(error.get("message") or "")',
        "test_a_word_of_the_api_s_is_not_taken_for_one_of_this_program_s",
        "test_what_the_api_calls_a_tag_does_not_settle_what_it_may_have_done",
    ),
    defect(
        "a cap that is empty is none",
        'parser.filled if flag == "limit" else str',
        "str",
        "test_what_no_run_can_work_with_is_refused_before_it_begins",
    ),
    defect(
        "a password in an address is written",
        """r"\\1...@", message)""",
        """r"\\g<0>", message)""",
        "test_secrets_are_taken_out_of_a_message",
    ),
    defect(
        "a job's address is taken apart as if it were one",
        'location = re.sub(r"^(\\w+:)?//[^/]*|[?#].*", "", answer.headers.get("Location", ""))',
        'location = urllib.parse.urlsplit(answer.headers.get("Location", "")).path',
        NONSENSE,
    ),
    defect(
        "the remaining quota of a replay is believed",
        "is_stale = self._is_replay and ApiReply.is_older(answer.headers, self._asked_at)",
        "is_stale = False",
        "test_what_remains_of_the_month_is_not_taken_from_an_answer_of_another_day",
    ),
    defect(
        "a job that an earlier run was told of is sent again",
        "        if task.pending:\n            known",
        "        if task.pending and not task.pending.job_id:\n            known",
        "test_a_job_is_asked_for_again_after_a_kill_and_paid_once[job-recorded-after-url]",
    ),
    defect(
        "a job under the key of the call before it",
        'current.following(":j", path=JOBS_PATH)',
        'current.following("", path=JOBS_PATH)',
        "test_a_job_in_place_of_a_call_has_a_key_of_its_own",
    ),
    defect(
        "a request goes on while its row is being written",
        "request.change(first_sent=time.time())\n            ledger.mark_sent(self.task, request.row)",
        """request.change(first_sent=time.time())
            threading.Thread(target=ledger.mark_sent, args=(self.task, request.row)).start()""",
        SENT_UNWRITTEN,
    ),
    defect(
        "a request is not written down",
        "request.change(first_sent=time.time())\n            ledger.mark_sent(self.task, request.row)",
        "request.change(first_sent=time.time())",
        SENT_UNWRITTEN,
        "test_a_run_that_was_killed_in_the_middle_is_finished_by_the_next",
    ),
    defect(
        "a resumed request gets a new first time",
        "if is_forgotten or not request.row.first_sent:",
        "if True:",
        A_DAY_LATER,
    ),
    defect(
        "an overdue request is taken for a replay",
        "request.is_paid, request.state = False, RequestState.PUT_OFF",
        "request.is_paid = False",
        A_DAY_LATER,
    ),
    defect(
        "no request is ever overdue",
        "return bool(self.row.first_sent) and time.time() - self.row.first_sent > IDEMPOTENCY_WINDOW_SECONDS",
        "return False",
        A_DAY_LATER,
    ),
    defect(
        "an overdue request counts as no double charge",
        "request.change(url=url, is_doubtful=1)",
        "request.change(url=url)",
        A_DAY_LATER,
    ),
    defect(
        "no ETag in the idempotency key",
        "version = (source.key, source.version, source.size, int(source.modified))",
        "version = (source.key, source.size, int(source.modified))",
        "test_another_version_of_the_same_size_is_asked_for_under_another_key",
    ),
    defect(
        "no time in the idempotency key",
        "version = (source.key, source.version, source.size, int(source.modified))",
        "version = (source.key, source.version, source.size)",
        "test_nothing_is_stored_of_a_source_that_was_overwritten_while_it_was_fetched",
    ),
    defect(
        "no bucket in the idempotency key",
        '"s3_bulk_convert/2", endpoint, bucket, *version',
        '"s3_bulk_convert/2", endpoint, *version',
        "test_the_same_object_in_another_bucket_is_asked_for_under_another_key",
    ),
    defect(
        "no quality in the idempotency key",
        "task.target, task.quality, place, *lost])",
        "task.target, place, *lost])",
        "test_what_was_in_flight_with_another_quality_is_not_taken_for_done",
    ),
    defect(
        "no place in the idempotency key",
        "task.target, task.quality, place, *lost])",
        "task.target, task.quality, *lost])",
        "test_two_jobs_with_equal_options_put_their_outputs_into_two_places",
    ),
    defect(
        "no look before a resumed request",
        "look = is_there or task.pending is not None",
        "look = is_there and task.pending is None",
        "test_what_was_stored_before_a_kill_is_found_and_not_sent_again",
    ),
    defect(
        "409 is a failure",
        'r"(409|429) .*": ErrorAction.WAIT',
        'r"429 .*": ErrorAction.WAIT',
        "test_409_is_waited_for_and_uses_up_no_attempt",
    ),
    defect(
        "409 is an attempt",
        "again.is_free = action is ErrorAction.WAIT and is_own",
        "again.is_free = status == 429 and is_own",
        "test_409_is_waited_for_and_uses_up_no_attempt",
    ),
    redirected("the POST", 'method == "POST"', "test_a_request_follows_no_redirect"),
    redirected(
        "a poll", '"/v1/jobs/" in address and "/download/" not in address', "test_a_redirect_is_not_followed[poll]"
    ),
    redirected("a download", '"/download/" in address', "test_a_redirect_is_not_followed[download]"),
    redirected("/v1/usage", '"/v1/usage" in address', "test_a_redirect_is_not_followed[usage]"),
)

ANSWERS = (
    defect(
        "an answer without length or chunks is taken",
        'is_told = length.isdigit() or answer.headers.get("Transfer-Encoding", "").lower() == "chunked"',
        "is_told = True",
        "test_half_of_an_answer_that_does_not_say_where_it_ends_is_not_stored",
    ),
    defect(
        "an answer that is longer than it says is taken",
        "is_told &= not cast(_Reply, answer.raw._original_response).has_surplus",
        "pass",
        "test_of_an_answer_that_is_longer_than_it_says_no_half_is_stored",
    ),
    defect(
        "a job's size is not compared with its file",
        "if isinstance(size, int) and size != file.size:",
        "if False:",
        "test_a_file_of_another_size_than_its_job_says_is_fetched_again",
    ),
    defect(
        "a compressed body's unpacked bytes are compared with the length on the wire",
        "answer.raw.tell() != int(length)",
        "size != int(length)",
        "test_an_answer_that_somebody_packed_on_the_way_is_stored_unpacked",
    ),
    defect(
        "a body that breaks off is taken for whole",
        "except NETWORK_ERRORS as error:\n            raise InvalidResponse(",
        "except NETWORK_ERRORS as error:\n            return\n            raise InvalidResponse(",
        "test_of_a_large_answer_in_chunks_that_breaks_off_nothing_is_stored",
    ),
    defect(
        "a compressed body that ends early is taken for whole",
        "if not unpacker.eof:",
        "if False:",
        "test_what_comes_packed_is_unpacked_whole_or_not_stored",
    ),
)

FIGURES = (
    defect(
        "a result that came before is paid for once more",
        "self.results += not self.is_paid",
        "self.results += 1",
        "test_with_a_price_each_result_is_counted_once_in_the_run_that_it_first_came_in",
    ),
    defect(
        "a result that could not be stored costs nothing",
        '"paid": outcome.paid}',
        '"paid": outcome.kind is OutcomeKind.CONVERTED and outcome.paid}',
        "test_with_a_price_each_result_is_counted_once_in_the_run_that_it_first_came_in",
    ),
    defect(
        "p95 is p50",
        '"p95_seconds": self.percentile(95),',
        '"p95_seconds": self.percentile(50),',
        "test_the_95th_percentile_is_that_of_the_slow_ones",
    ),
    defect(
        "failures that cost nothing are counted by the brake",
        "self.failed_for_money[code] += not outcome.is_free",
        "self.failed_for_money[code] += 1",
        "test_failures_that_cost_nothing_do_not_stop_a_run",
    ),
    defect(
        "a worker that failed is forgotten when all is done",
        'self.reason = None if self.reason.code in {"quota", "cap", "time"} else self.reason',
        "self.reason = None",
        "test_a_worker_that_dies_when_all_is_done_is_no_success",
    ),
    defect(
        "requests of worker processes are not counted",
        "self._context.limiter.requests += message.requests",
        "pass",
        "test_requests_of_worker_processes_are_counted_though_they_were_given_up",
    ),
)

SECRETS = (
    defect(
        "a query is secret in addresses of http alone",
        "((?<!s3)://",
        "(https?://",
        "test_what_is_secret_in_a_link_of_the_api_is_written_nowhere_whatever_its_scheme",
    ),
    defect(
        "a link that holds a file itself is written whole",
        """(['\\"])data:.*?""",
        """(['\\"])data=.*?""",
        "test_what_is_secret_in_a_link_of_the_api_is_written_nowhere_whatever_its_scheme",
    ),
    defect("a header that a library quotes is written", "(header (?:value|part)", "(header (?:=)", HIDDEN),
    defect("a session's token is written where no = is before it", "[=:>]", "[=]", HIDDEN),
    defect(
        "what AWS is told is sent as it is",
        "if value and not value.isprintable():",
        "if value and not value:",
        "test_what_aws_is_told_and_cannot_be_sent_is_refused_by_its_name_and_not_shown",
        "test_a_profile_whose_keys_cannot_be_sent_is_refused",
    ),
    defect(
        "a region with a line break at its end is sent as it is",
        "for value in (session.region_name, *((",
        "for value in (None, *((",
        "test_what_aws_is_told_and_cannot_be_sent_is_refused_by_its_name_and_not_shown",
    ),
    defect(
        "the API key is sent to the own host by plain http",
        "return self._server_of(address) == self._server_of(self._own)",
        "return self._server_of(address)[1] == self._server_of(self._own)[1]",
        "test_the_key_does_not_go_to_the_own_host_by_plain_http",
    ),
    defect(
        "the API key is sent to any host",
        "if self._key and self.is_own(str(request.url)):",
        "if self._key:",
        "test_the_key_does_not_go_to_the_own_host_by_plain_http",
    ),
    defect(
        "the API's words on an object are written without hiding the key",
        "hide(why.message)[:MESSAGE_CHARACTERS]",
        "why.message[:MESSAGE_CHARACTERS]",
        f"{HIDDEN_KEY}[an object's failure]",
        f"{HIDDEN_KEY}[a job]",
        f"{HIDDEN_KEY}[a download]",
    ),
    defect(
        "the API's code is written without hiding the key",
        "hide(why.code)[:",
        "why.code[:",
        f"{HIDDEN_KEY}[an object's failure]",
    ),
    defect(
        "the reason to stop is written without hiding the key",
        "RunError(hide(error.message), hide(error.hint), error.exit_code, error.code)",
        "error",
        f"{HIDDEN_KEY}[the reason to stop]",
        f"{HIDDEN_KEY}[the reason to stop in JSON]",
    ),
    defect(
        "--check writes the API's words without hiding the key",
        """print_line(self.settings.hide(f"{verdict:<4} {what}: {'; '.join(filter(None, (message, hint)))}"))""",
        """print_line(f"{verdict:<4} {what}: {'; '.join(filter(None, (message, hint)))}")""",
        f"{HIDDEN_KEY}[check]",
    ),
    defect(
        "a command's document has the API's words without hiding the key",
        "return json.dumps(without_secrets(document, self.hide), indent=indent)",
        "return json.dumps(without_secrets(document), indent=indent)",
        f"{HIDDEN_KEY}[dry run]",
    ),
    defect(
        "only what looks like a key is hidden",
        'return redact(message.replace(self.api.key or "\\0", "..."))',
        "return redact(message)",
        f"{HIDDEN_KEY}[an object's failure]",
    ),
    defect(
        "a checkpoint that others can read stays so",
        "if stat.S_IMODE(path.stat().st_mode) != 0o600:",
        "if False:",
        "test_nobody_else_can_read_a_checkpoint",
    ),
    defect(
        "everybody can read a checkpoint",
        "!= 0o600:\n                    self.set_mode(path, 0o600)",
        "!= 0o644:\n                    self.set_mode(path, 0o644)",
        "test_nobody_else_can_read_a_checkpoint",
    ),
    defect(
        "an INI file with the key may be read by all",
        'and os.name == "posix" and mode & (stat.S_IRGRP | stat.S_IROTH):\n            told',
        "and False:\n            told",
        "test_an_ini_with_the_key_that_others_can_read_is_refused",
    ),
    defect(
        "an INI file with the key may be read by a group",
        "mode & (stat.S_IRGRP | stat.S_IROTH):\n            told",
        "mode & stat.S_IROTH:\n            told",
        INI_MODE,
    ),
    defect(
        "an INI file with the key may be read by others",
        "mode & (stat.S_IRGRP | stat.S_IROTH):\n            told",
        "mode & stat.S_IRGRP:\n            told",
        INI_MODE,
    ),
)

CHECKPOINT = (
    defect("what is read is written over", "kept.update(read)", "kept.update({})", WRITTEN_OVER),
    defect(
        "what lies beside the checkpoint is written over",
        'for end in ("", "-wal", "-shm", "-journal", ".lock")}',
        'for end in ("",)}',
        WRITTEN_OVER,
    ),
    defect(
        "a hard link is another file",
        "return os.path.samefile(first, second) and os.path.isfile(first)",
        "pass",
        WRITTEN_OVER,
    ),
    defect(
        "failures are appended to a list of keys",
        'return file.read(100).lstrip()[:1] in b"{"',
        "return True",
        WRITTEN_OVER,
    ),
    defect(
        "what has failed cannot be tried again from its own file",
        'return file.read(100).lstrip()[:1] in b"{"',
        "return False",
        "test_only_the_named_keys_are_converted_and_missing_ones_are_failures",
    ),
    defect("a device cannot be read and written", " and os.path.isfile(first)", "", WRITTEN_OVER),
    defect(
        "with a shard, files are compared by the names that they do not have",
        "paths = {name: shard.file(path) for",
        "paths = {name: path for",
        WRITTEN_OVER,
    ),
    defect(
        "of two requests in flight for one output key, the older one holds it",
        " ORDER BY it.{since}",
        " ORDER BY it.{since} DESC",
        "test_a_deleted_object_that_comes_again_takes_the_key_from_no_request_that_was_sent_since",
    ),
    defect(
        "synchronous is NORMAL instead of FULL",
        "PRAGMA synchronous = FULL;",
        "PRAGMA synchronous = NORMAL;",
        "test_every_commit_waits_for_the_disk",
    ),
    defect(
        "the log lets rows be deleted",
        "BEFORE DELETE ON log BEGIN SELECT RAISE(ABORT, 'log is append-only'); END;",
        "BEFORE DELETE ON log BEGIN SELECT 1; END;",
        APPEND_ONLY,
    ),
    defect(
        "the log lets values be changed",
        "BEFORE UPDATE ON log BEGIN SELECT RAISE(ABORT, 'log is append-only'); END;",
        "BEFORE UPDATE ON log BEGIN SELECT 1; END;",
        APPEND_ONLY,
    ),
    defect(
        "the log lets rows be replaced",
        "AND id = NEW.id)\n    BEGIN SELECT RAISE(ABORT, 'log is append-only'); END;",
        "AND id = NEW.id)\n    BEGIN SELECT 1; END;",
        APPEND_ONLY,
    ),
    defect(
        "a bug is said in place of a full disk",
        'raise RunError(message, hint, code="disk") from None\n            hint = "make it',
        'raise RuntimeError(said) from None\n            hint = "make it',
        "test_a_disk_that_is_full_stops_the_run_and_loses_nothing",
    ),
    defect(
        "a run forgets the old requests of other buckets",
        "WHERE sent_at < ? AND job IN ({ours})",
        "WHERE sent_at < ? AND (1 OR job IN ({ours}))",
        "test_a_run_forgets_no_other_bucket_s_requests",
    ),
)

LOOKING = (
    defect(
        "what is paid for anew is not told apart from what is new",
        "self._former = [number for (number,) in known if number not in self._job_ids.values()]",
        "self._former = []",
        PAID_FOR_ANEW,
    ),
    defect(
        "a changed object is called one that is paid for anew",
        'task.source.version in {"", version} and not (',
        "not (",
        PAID_FOR_ANEW,
    ),
    defect(
        "what will be found is called one that is paid for anew",
        "and not (task.look and fingerprint == task.fingerprint)",
        "",
        PAID_FOR_ANEW,
    ),
    defect(
        "what hides secrets may break a document",
        "return json.dumps(without_secrets(document, self.hide), indent=indent)",
        "return self.hide(json.dumps(without_secrets(document, self.hide), indent=indent))",
        "test_what_the_api_has_said_breaks_no_document",
    ),
    defect(
        "--check prints its lines beside its document",
        """if not (self.settings.log_format == "json" or (self.settings.quiet and verdict == "OK")):""",
        """if not (self.settings.quiet and verdict == "OK"):""",
        "test_check_in_json_is_one_document_with_all_that_the_lines_say",
    ),
    defect(
        "--why does not say that an output is missing",
        """return found | {"state": "missing", "message": message} if was else None""",
        "return None",
        "test_why_says_that_an_output_is_missing_and_how_to_have_it_again",
    ),
    defect(
        "--why does not say that an output is altered",
        "if is_that and any(then and now and then != now for then, now in pairs):",
        "if False:",
        "test_why_says_that_an_output_is_altered_and_who_has_to_delete_it",
    ),
    defect(
        "--why calls altered what another run has stored since",
        "if is_that and any(then and now and then != now for then, now in pairs):",
        "if any(then and now and then != now for then, now in pairs):",
        "test_why_does_not_call_altered_what_was_stored_since_with_another_checkpoint",
    ),
    defect(
        "--why has an output repaired that the next run makes anyway",
        """if job["next"]["kind"] != DecisionKind.DONE.value or states""",
        "if states",
        "test_why_says_that_an_output_is_missing_and_how_to_have_it_again",
    ),
    defect(
        "--repair reads the keys of stdin once, and then finds nothing to do",
        "settings = replace(settings, keys_from=KeyFile.readable_twice(settings.keys_from))",
        "pass",
        "test_what_why_says_of_a_missing_output_converts_that_object_again_and_no_other",
    ),
    defect(
        "a file of keys that breaks off is the environment's trouble",
        """raise (RunError(error.message, error.hint, code="listing") if has_begun else error) from None""",
        "raise (RunError(error.message, error.hint) if has_begun else error) from None",
        "test_trouble_after_the_first_page_stops_the_run",
    ),
)

COPIES = (
    defect(
        "a copy is believed to be of the version that was looked at",
        "            self.require_unchanged(source, seen)\n        except ObjectFailed:",
        "            pass\n        except ObjectFailed:",
        "test_where_the_condition_of_a_copy_is_not_heeded_another_version_s_copy_counts_as_no_output",
    ),
)
FOUND_BY_VERIFY = "test_verify_names_what_is_wrong_and_repair_makes_again_what_is_missing_and_nothing_else[20]"
PAGES_PROVED = "test_pages_are_proved_and_made_again_with_their_archive"
LEFT_OUT = "test_an_archived_source_and_one_that_a_glob_leaves_out_by_now_have_outputs_to_be_proved"
EACH_ITS_OWN = "test_each_job_and_each_shard_verifies_its_own_outputs_and_a_file_of_keys_those_of_its_keys"
VERIFY = (
    defect(
        "--verify compares sizes alone",
        "(expected.etag = there.etag OR '' IN (expected.etag, there.etag)) AND",
        "TRUE AND",
        FOUND_BY_VERIFY,
    ),
    defect(
        "--verify compares ETags alone",
        "coalesce(nullif(expected.size, 0) = there.size, TRUE)",
        "TRUE",
        "test_where_no_etags_are_shown_outputs_are_told_apart_by_size",
    ),
    defect(
        "what was altered is no reason to fail",
        "return ExitCode.SOME_FAILED if self._counts[MISSING] or self._counts[ALTERED] else ExitCode.DONE",
        "return ExitCode.SOME_FAILED if self._counts[MISSING] else ExitCode.DONE",
        FOUND_BY_VERIFY,
    ),
    defect(
        "what was altered is converted again",
        "missing = (each for each in findings if each.kind == MISSING and not each.left_out)",
        "missing = (each for each in findings if each.kind in {MISSING, ALTERED} and not each.left_out)",
        FOUND_BY_VERIFY,
    ),
    defect(
        "orphans are unknown",
        "if source_key:\n                yield [Finding(ORPHANS",
        "if False:\n                yield [Finding(ORPHANS",
        FOUND_BY_VERIFY,
    ),
    defect(
        "what a run stores while --verify looks is altered",
        "if now is None or each in self._outputs_of(name, each.source_key, now[1], each.left_out):",
        "if True:",
        "test_what_is_stored_anew_while_it_is_verified_is_no_finding",
    ),
    defect(
        "the outputs of other shards are unknown",
        "is_any = shard.count == 1 or self._has_pages",
        "is_any = True",
        EACH_ITS_OWN,
    ),
    defect(
        "what is lost loses its place to whatever else wants it",
        "self.claim([(self.slot(output.key), job, key) for key, (_, output) in lost.items()])",
        "pass",
        "test_what_is_lost_keeps_its_place_before_whatever_else_wants_it",
    ),
    defect(
        "what a repair has planned while it looks stays planned",
        "self.expected = 2 * count\n        self._journal.forget_plans()",
        "self.expected = 2 * count",
        "test_what_is_deleted_while_a_repair_looks_is_counted_by_no_pass",
    ),
    defect(
        "pages are asked for in the shard of their own keys",
        "is_any = shard.count == 1 or self._has_pages",
        "is_any = shard.count == 1",
        "test_a_page_belongs_to_the_shard_of_its_document",
    ),
    defect(
        "the pages of other shards are unknown",
        "elif key.startswith(places) and not is_mixed:",
        "elif key.startswith(places):",
        "test_a_page_belongs_to_the_shard_of_its_document",
    ),
    defect(
        "another source's output in its place hides that an output is missing",
        "PRIMARY KEY (output_key, key)\n",
        "PRIMARY KEY (output_key)\n",
        "test_an_output_in_whose_place_another_source_has_put_its_own_is_missing",
    ),
    defect(
        "another source's output is altered",
        "CASE WHEN NOT {is_anothers} THEN there.size END",
        "there.size",
        "test_an_output_in_whose_place_another_source_has_put_its_own_is_missing",
    ),
    defect(
        "what is left out is noted as lost",
        "if each.kind == MISSING and not each.left_out)",
        "if each.kind == MISSING)",
        LEFT_OUT,
    ),
    defect(
        "a repair says nothing of what is left out",
        "        if self.left_out:\n            told",
        "        if False:\n            told",
        LEFT_OUT,
    ),
    defect(
        "pages are wanted where only archives are",
        "range(1, output.pages + 1 if is_unpacked else 1)",
        "range(1, output.pages + 1)",
        PAGES_PROVED,
    ),
    defect(
        "an archive between the sources is foreseen to be converted",
        "self.settings.keys_from or may_be_own)",
        "self.settings.keys_from)",
        "test_an_archive_between_the_sources_is_foreseen_to_be_no_source",
    ),
    defect(
        "without a checkpoint, an archive whose pages are lost is found",
        "(self._settings.repair or is_doubtful)",
        "is_doubtful",
        PAGES_PROVED,
    ),
    defect(
        "outputs of sources that no job wants any more are not proved",
        "settled = [each for each in page if each.kind is DecisionKind.DONE or each.kind is DecisionKind.SKIP]",
        "settled = [each for each in page if each.kind is DecisionKind.DONE]",
        LEFT_OUT,
    ),
    defect(
        "pages are unknown",
        "range(1, output.pages + 1 if is_unpacked else 1)",
        "range(0)",
        PAGES_PROVED,
    ),
    defect(
        "an archive whose pages are lost is found",
        "is_asked = (self._settings.repair or is_doubtful) and",
        "is_asked = False and",
        PAGES_PROVED,
    ),
    defect(
        "what was lost is asked for under its old key",
        "lost = [known.lost_in] if known and known.lost_in else []",
        "lost: list[str] = []",
        FOUND_BY_VERIFY,
    ),
    defect(
        "what was found to be lost comes last, as what failed does",
        "elif is_last or state[2] == LOST or",
        "elif is_last or",
        "test_what_is_lost_is_made_again_before_what_failed",
    ),
    defect(
        "a dry run forgets what it has found to be lost",
        'states[key] = JournalState(*states[key])._replace(event=LOST, purpose="run 0")',
        "pass",
        FOUND_BY_VERIFY,
    ),
)

WORDS = (
    defect(
        "a success that is none says that the file is damaged",
        're.fullmatch("http_[1-4]..", code)',
        're.fullmatch("http_[134]..", code)',
        "test_a_success_that_is_none_says_nothing_of_the_file",
    ),
    defect(
        "a long name has no room for that of its draft",
        "{real.name[-40:]}.{os.getpid()}",
        "{real.name}.{os.getpid()}",
        "test_an_ordinary_file_is_replaced_whole",
    ),
    defect(
        "a label has bytes that are no text",
        'self._settings.run.checkpoint.encode("utf-8", "backslashreplace").decode()',
        "self._settings.run.checkpoint",
        "test_a_checkpoint_whose_path_is_no_text_has_a_label",
    ),
    defect(
        "--status gives the terminal the API's orders",
        '", ".join(f"{printable(code)} {count}" for code, count in by_code',
        '", ".join(f"{code} {count}" for code, count in by_code',
        ORDERS,
    ),
    defect(
        "why a run stops gives the terminal the API's orders",
        'printable(f"{outcome.code} {outcome.message}".rstrip())',
        'f"{outcome.code} {printable(outcome.message)}".rstrip()',
        ORDERS,
    ),
    defect(
        "a rate of failures gives the terminal the API's orders",
        '", ".join(f"{printable(code)} {count}" for code, count in costly',
        '", ".join(f"{code} {count}" for code, count in costly',
        ORDERS,
    ),
    defect(
        "what matches nothing is not named",
        "            if was_any and job.prefix not in self._unmet_prefixes:",
        "            if False:",
        "test_what_was_asked_for_and_matches_nothing_is_named",
    ),
    defect(
        "two asterisks and a slash want a folder",
        'made.replace("\\0", "(?:.*/)?")',
        'made.replace("\\0", ".*/")',
        "test_globs_match_names_or_with_a_slash_whole_keys",
    ),
    defect(
        "sources that end as outputs do are looked past",
        "if any(job.lets_in(key) and not job.leaves_as_it_is(key) for job in jobs):",
        "if not key.endswith(tuple(job.target for job in jobs)):",
        "test_sources_that_end_as_outputs_do_are_named_if_a_job_would_take_them",
    ),
    defect(
        "a target that nobody knows is taken",
        'self._warn("target", ',
        'self._warn("target", () and ',
        "test_a_target_that_nobody_knows_is_asked_about_before_it_is_paid_for",
    ),
    defect(
        "what a run has begun is forgotten at its end",
        "is_too_late = self._has_begun and reason.exit_code is ExitCode.USAGE",
        "is_too_late = False",
        "test_what_another_run_would_meet_as_well_is_exit_2_until_something_was_begun",
    ),
    defect(
        "a key that is refused at the start is worth another run",
        "is_too_late = self._has_begun and reason.exit_code is ExitCode.USAGE",
        "is_too_late = reason.exit_code is ExitCode.USAGE",
        "test_what_another_run_would_meet_as_well_is_exit_2_until_something_was_begun",
    ),
    defect(
        "there is an ETA before the total is known",
        "if rate and is_final else None",
        "if rate else None",
        "test_rate_and_eta_are_those_of_the_last_minute",
    ),
    defect(
        "a shard's forecast sets its part alone against the month",
        "        in_one_run *= parts\n",
        "",
        "test_a_shard_s_forecast_sets_the_work_of_all_shards_against_the_month",
    ),
    defect(
        "--why knows nothing of who wants the same output key",
        "planner.plan([*rivals, source]",
        "planner.plan([source]",
        "test_why_says_what_the_next_run_does",
    ),
    defect(
        "an error in a log has no time",
        "{f'{when} ' if self._quiet else ''}",
        "",
        "test_what_is_quiet_is_read_in_a_log_and_begins_with_the_time",
    ),
    defect(
        "an answer of S3 that cannot be read is a bug",
        "except (ClientError, BotoCoreError, *UNREADABLE) as error:",
        "except (ClientError, BotoCoreError) as error:",
        "test_an_answer_of_s3_that_cannot_be_read_is_no_bug",
    ),
    defect(
        "a file of any length is read for a key",
        "if len(content) > SMALL_FILE_BYTES:",
        "if False:",
        "test_what_leads_nowhere_is_named_at_once",
    ),
    defect(
        "--check reads what an archive keeps",
        "return str(skipped) != ARCHIVED",
        "return True",
        "test_check_reads_nothing_that_an_archive_keeps",
    ),
    defect(
        "what is in flight of deleted objects is told as interrupted alone",
        "WHERE exit_code IN (0, 1)",
        "WHERE 0",
        "test_status_tells_what_is_in_flight_of_objects_that_are_gone",
    ),
    defect(
        "processes are started of a program that is no file",
        "not os.path.isfile(globals()",
        "os.path.isdir(globals()",
        "test_processes_are_refused_where_the_program_is_no_file",
    ),
    defect(
        "the AWS configuration is blamed for a variable",
        "if file and value == file",
        "if False",
        "test_a_wrong_environment_is_named_and_nothing_is_started[key log]",
    ),
)

# What was found by reading.
READ = (
    defect(
        "what a killed run may have replaced is never done again",
        "AND key BETWEEN ? AND ? AND sent_at >= {done_at}",
        "AND key BETWEEN ? AND ?",
        "test_options_that_come_back_after_a_kill_have_their_own_output",
    ),
    defect(
        "what a repair has found lost lies there, if another source wants its key",
        "elif task.pending or (task.output_key in there and not self._outputs.refusal):",
        "elif task.pending or (task.look and not self._outputs.refusal):",
        "test_what_a_repair_has_found_lost_is_not_bought_beside_another_source_s",
    ),
    defect(
        "a place that a HEAD does not show is free",
        "return key not in listed and (page.is_last or listed[-1:] > [key])\n        return False",
        "return True\n        return True",
        "test_a_page_s_place_is_not_written_before_s3_has_said_what_lies_there",
    ),
    defect(
        "an archive proves the pages of another version",
        "        return kind is OutcomeKind.FOUND\n\n    def _look_at_place",
        "        return there is not None\n\n    def _look_at_place",
        "test_an_archive_proves_no_pages_where_those_of_another_version_came_after_it",
    ),
    defect(
        "of an archive that comes back, no pages are asked for",
        "(self._settings.repair or is_doubtful)",
        "(self._settings.repair or task.is_lost)",
        "test_an_archive_proves_no_pages_where_those_of_another_version_came_after_it",
    ),
    defect(
        "what a killed run may have replaced is done",
        "and (sender != own or version != state[1]):",
        "and False:",
        "test_a_version_that_comes_back_after_a_kill_has_its_own_output",
    ),
    defect(
        "what a killed run may have replaced with other options is done",
        "map(str, (own, *self._rivals[job]))",
        "map(str, (own,))",
        "test_options_that_come_back_after_a_kill_have_their_own_output",
    ),
    defect(
        "a named object has another version than the listed one where looks show no ETag",
        "listed.version or self._listed_version(seen)",
        "listed.version or seen.version",
        "test_a_named_object_has_the_version_that_a_listing_shows_where_looks_show_none",
    ),
    defect(
        "bytes without an ETag are those that were seen",
        "if conversation.current.row.url or not task.source.if_match:",
        "if conversation.current.row.url:",
        "test_a_source_without_an_etag_that_is_overwritten_before_it_is_read_is_not_stored_as_what_was_seen",
    ),
    defect(
        "a repair looks for nothing",
        "look = is_there or task.pending is not None or task.is_lost",
        "look = is_there or task.pending is not None",
        "test_a_repair_looks_for_an_output_that_a_listing_does_not_show",
    ),
    defect(
        "an output of unknown length is altered",
        "coalesce(nullif(expected.size, 0) = there.size, TRUE)",
        "coalesce(expected.size = there.size, TRUE)",
        "test_an_output_whose_length_s3_does_not_say_is_as_it_was_stored",
    ),
    defect(
        "what is too large by now was never sent",
        '"bad_pages", "too_large"})',
        '"bad_pages"})',
        "test_what_is_too_large_by_now_forgets_no_request_that_was_paid",
    ),
    defect(
        "cookies are kept",
        "self.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))",
        "pass",
        "test_no_cookie_is_kept",
    ),
    defect(
        "a checkpoint may be made of a file that is read",
        "if any(self._is_same_file(read[name], own) for own in kept.values()):",
        "if False:",
        "test_no_checkpoint_is_made_of_a_file_that_is_read",
    ),
    defect(
        "a list in S3 is blamed for a full disk",
        'with no_space_stops_the_run(), translate_s3_errors(f"reading {url}"):',
        'with translate_s3_errors(f"reading {url}"):',
        "test_a_list_in_s3_for_which_the_disk_has_no_room_is_not_blamed",
    ),
    defect(
        "a job that may not have a key settles the request of the one that has it",
        "if outcome.code == NOT_MATCHED or outcome.task.holder in self._twins(outcome.task.job):",
        "if outcome.code == NOT_MATCHED:",
        "test_a_job_that_may_not_have_a_key_settles_no_request_of_the_one_that_has_it",
    ),
    defect(
        "of two jobs that the journal knows as one, the other's rows say that it is done",
        "        if self.settings.keys_from:\n            return jobs  # of a named",
        "        if True:\n            return jobs  # of a named",
        "test_what_a_job_fails_with_is_no_word_on_the_one_that_has_its_key",
    ),
    defect(
        "two sources adopt one output",
        "yield replace(task, rival=key)",
        "yield task",
        "test_an_output_without_a_mark_is_adopted_by_one_source_and_by_no_other",
    ),
    defect(
        "what is only to be tagged is made again where its output is gone",
        "if task.is_untagged and not (is_there or task.pending or self._settings.repair):",
        "if False:",
        "test_what_is_only_to_be_tagged_is_not_made_again_where_its_output_is_gone",
    ),
    defect(
        "another process signs for the region that is configured",
        "settings = replace(settings, s3=replace(settings.s3, region=self._context.bucket.region))",
        "",
        "test_urls_are_signed_for_the_region_that_s3_tells_in_whatever_process",
    ),
    defect(
        "what a process cannot begin with is a traceback",
        "            except RunError as error:\n                parent._stop.request(error)",
        "            except ZeroDivisionError as error:\n                parent._stop.request(error)",
        "test_credentials_that_a_worker_process_does_not_get_are_named",
    ),
    defect(
        "a download that is only accepted is the file",
        "({200} if call.rules is DOWNLOAD_RULES else {200, 202})",
        "{200, 202}",
        "test_a_download_that_is_only_accepted_is_not_the_file",
    ),
    defect(
        "what a small answer unpacks to is in memory",
        ' and not answer.headers.get("Content-Encoding")',
        "",
        "test_what_a_small_answer_unpacks_to_is_not_in_memory",
    ),
    defect(
        "a key that is named again goes out a second time",
        "self.planner.at_work.add((task.job, task.source.key))",
        "",
        "test_a_key_that_is_named_again_is_paid_once_though_its_url_is_another_by_then",
    ),
    defect(
        "each run spends one more than is to be kept",
        "            if not task.pending:\n                self._require_month()\n",
        "",
        "test_where_the_remainder_is_reached_the_next_runs_use_up_none_of_it",
    ),
    defect(
        "a copy of nobody knows which version has the mark of one",
        'extra["Metadata"]["source-etag"] = "unknown"',
        "pass",
        "test_where_the_condition_of_a_copy_is_not_heeded_another_version_s_copy_counts_as_no_output",
    ),
    defect(
        "two jobs have one name",
        "if not name or name in {job.name for job in jobs.values()}:",
        "if False:",
        "test_two_jobs_have_two_names_and_each_has_one",
    ),
    defect(
        "a bucket's name has no slash",
        'return place.removeprefix(f"{self._output_bucket}/") if place',
        'return place.partition("/")[2] if place',
        "test_an_output_s_key_is_known_again_in_a_bucket_of_any_name",
    ),
    defect(
        "half a line of a failure stays",
        "os.ftruncate(number, size)",
        "os.ftruncate(number, os.fstat(number).st_size)",
        "test_a_failures_file_that_fills_the_disk_midway_is_whole_lines_after_the_next_run",
    ),
    defect(
        "a pipe with a slow reader is a full disk",
        "os.set_blocking(number, True)",
        "pass",
        "test_a_pipe_that_is_read_late_gets_all_failures",
    ),
    defect(
        "a closed stderr takes the characters of the locale alone",
        "for stream in (sys.stdout, sys.stderr):\n        cast(",
        "for stream in (sys.stdout,):\n        cast(",
        "test_a_closed_stream_takes_any_character_in_any_locale",
    ),
    defect(
        "a link to another file of the run's is written over",
        "is_link = self._is_same_file(*pair) and",
        "is_link = False and",
        "test_a_link_to_a_file_that_is_written_as_well_is_refused",
    ),
    defect(
        "failures are written over where a shell has opened their file",
        "            self._write_into(self.path if number is None else number, text, os.O_APPEND)",
        "            self._write_into(self.path, text, os.O_APPEND)",
        "test_both_streams_may_lead_to_one_file_that_a_shell_has_opened",
    ),
    defect(
        "a shard whose part of the cap is nothing has none",
        "{'' if cap is None else in_one_run}",
        "{in_one_run if cap else ''}",
        "test_a_shard_whose_part_of_the_cap_is_nothing_says_so",
    ),
    defect(
        "a draft that cannot be taken away is a file that was not written",
        "            with contextlib.suppress(OSError):\n                draft.unlink",
        "            with contextlib.suppress(PermissionError):\n                draft.unlink",
        "test_files_that_are_mounted_in_a_read_only_folder_are_written_into",
    ),
    defect(
        "a named object is sent that is too large without jobs",
        "if not task.copy and (told := settings.api.too_large(source.size)):",
        "if source.size > settings.api.max_size and (told := settings.api.too_large(source.size)):",
        "test_a_named_object_that_is_too_large_without_jobs_is_not_sent",
    ),
    defect(
        "ages that no object can have are taken",
        "if job.older_than > job.newer_than:",
        "if False:",
        "test_ages_that_no_object_can_have_are_refused",
    ),
    defect(
        "outputs that may not be listed are a bug",
        'OutputLister(self._bucket, code="")',
        "OutputLister(self._bucket)",
        "test_outputs_that_may_not_be_listed_are_no_bug",
    ),
    defect(
        "neighbours that may not be listed are a bug",
        "with contextlib.suppress(ObjectFailed):  # they may not be listed",
        "if True:",
        "test_where_a_key_s_neighbours_may_not_be_listed_why_calls_it_no_bug",
    ),
    defect(
        "counts of other buckets are those of this configuration",
        "for each in self._jobs if is_here and (*buckets,",
        "for each in self._jobs if (*buckets,",
        "test_the_counts_of_a_job_with_other_buckets_are_not_those_of_this_configuration",
    ),
    defect(
        "a pipe of keys is read once for what is missing, and then nothing is left to do",
        "is_stream = (place.is_fifo() or place.is_char_device()) and os.access(name, os.R_OK)",
        "is_stream = False",
        "test_repair_reads_a_pipe_of_keys_once",
    ),
    defect(
        "what is only to be tagged is not made where a repair asks for it",
        "if task.is_untagged and not (is_there or task.pending or self._settings.repair):",
        "if task.is_untagged and not (is_there or task.pending):",
        "test_what_is_only_to_be_tagged_is_made_again_where_that_is_asked_for[repaired]",
    ),
    defect(
        "another output counts as that of what is only to be tagged",
        "if task.is_untagged and not (is_there or task.pending or self._settings.repair):",
        "if task.is_untagged and not (task.pending or self._settings.repair):",
        "test_what_is_only_to_be_tagged_is_made_again_where_that_is_asked_for[another output lies there]",
    ),
    defect(
        "what a job does not want settles the request of its twin",
        "if outcome.code == NOT_MATCHED or outcome.task.holder in",
        "if outcome.task.holder in",
        "test_what_a_job_does_not_want_is_no_word_on_a_request_for_it",
    ),
    defect(
        "a planned key loses its beginning where that is the bucket's name",
        'if row["output_key"] else planned',
        'if row["output_key"] else planned.removeprefix(f"{row[\'output_bucket\']}/")',
        "test_why_knows_the_outputs_in_a_bucket_of_any_name",
    ),
    defect(
        "what is only to be tagged is foreseen to be made",
        "bool(task.look or task.holder or task.is_untagged or",
        "bool(task.look or task.holder or",
        "test_what_is_only_to_be_tagged_is_not_made_again_where_its_output_is_gone",
    ),
    defect(
        "a guess of the rate comes to a stand",
        "self._extra = min(extra * 1.375 or 1.1 * 60 / max(recent, 1), slowest)",
        "self._extra = extra * 1.375 or 1.1 * 60 / max(recent, 1)",
        "test_429s_without_end_do_not_bring_a_guess_to_a_stand",
    ),
    defect(
        "a job that is paid is left when the run is to end",
        "return 0.0 if call.open_body else self._api.timeout",
        "return 0.0",
        "test_jobs_that_are_accepted_when_the_remainder_is_reached_are_waited_for",
    ),
    defect(
        "an answer that is here is dropped where S3 is busy and the run is to end",
        "            if attempts >= S3_ATTEMPTS:\n                raise",
        "            if True:\n                raise",
        "test_an_answer_that_is_here_when_the_run_is_to_end_is_stored_though_s3_is_busy",
    ),
    defect(
        "--check reads what no job wants",
        "if any(job.wants(each) for job in self.settings.jobs)] or sources",
        "if True]",
        "test_check_reads_what_some_job_wants",
    ),
    defect(
        "a reason that no flag has is told without its remedy in JSON",
        "if (reason := report.reason) and reason is not report.announced:",
        "if False and (reason := report.reason):",
        "test_a_cap_that_is_reached_is_told_with_its_remedy",
    ),
    defect(
        "what is left out by now is another shard's than its output",
        "shard.owns(KeyParts.slot_of(jobs[0].output_of(source.key)))):",
        "shard.owns(source.key)):",
        "test_what_is_left_out_by_now_is_proved_by_the_shard_that_has_stored_it",
    ),
    defect(
        "a part of a proxy's password is taken for its host",
        'return re.sub(r"[/?#].*", "", address.rpartition("://")[2].rpartition("@")[2])',
        'return re.sub(r"[/?#].*", "", address.rpartition("://")[2]).rpartition("@")[2]',
        "test_a_proxy_s_password_is_taken_out_though_it_is_written_as_no_url_wants_it",
    ),
    defect(
        "what was deleted in flight has a place for ever",
        'return "", holder',
        'return holder, ""',
        "test_what_took_the_place_of_an_object_that_was_deleted_in_flight_keeps_it",
    ),
    defect(
        "a copy says what its source says of pages",
        'if name not in {"page", "pages"}}',
        "}",
        "test_a_copy_does_not_say_what_its_source_says_of_pages",
    ),
)

DEFECTS = (
    *LISTING,
    *SOURCES,
    *OUTPUTS,
    *AGAIN,
    *TAGS,
    *REQUESTS,
    *ANSWERS,
    *FIGURES,
    *SECRETS,
    *CHECKPOINT,
    *LOOKING,
    *COPIES,
    *VERIFY,
    *WORDS,
    *READ,
)


def copy_of_the_checkout(folder: Path) -> Path:
    """The tracked files as they stand, in a folder."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (PROJECT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, folder / name)
    return folder


def places_of_tests() -> dict[str, list[str]]:
    """Test function -> the files that have one of that name."""
    found: dict[str, list[str]] = {}
    for path in sorted((PROJECT / "tests").rglob("test_*.py")):
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            found.setdefault(name, []).append(str(path.relative_to(PROJECT)))
    return found


def problem_of(planted: Defect, program: str, places: dict[str, list[str]]) -> str:
    """Why a row of the table cannot be used; empty if it can."""
    if (count := program.count(planted.text)) != 1:
        return f"its text is there {count} times: {planted.text.splitlines()[0].strip()}"
    for test in planted.tests:
        if (count := len(places.get(test.partition("[")[0], ()))) != 1:
            return f"there are {count} tests {test}"
    try:
        compile(program.replace(planted.text, planted.replacement), SCRIPT, "exec")
    except SyntaxError as error:
        return f"the program with it is no Python: {error}"
    return ""


def run_tests(folder: Path, tests: list[str], *options: str) -> tuple[list[str], str]:
    """The tests that failed, as pytest names them, and what kept it from running them all, if anything did."""
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)  # the change may be of the same size and second
    environment = {**os.environ, "COLUMNS": "400"}
    command = [*PYTEST, *options, *tests]  # a test that hangs has failed after the time in pytest.ini
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    failed = re.findall(r"^FAILED (?:\S*/)?(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if crash := re.search(r"\b(NameError|UnboundLocalError|AttributeError): .*", done.stdout):
        return [], f"the program with it has names that are not there: {crash[0]}"
    is_usual = done.returncode == 0 or (done.returncode == 1 and failed)
    said = (done.stdout + done.stderr).strip().splitlines()[-1:]
    return failed, "" if is_usual else f"pytest ended with {done.returncode}: {''.join(said)}"


def addresses(tests: tuple[str, ...], places: dict[str, list[str]]) -> list[str]:
    """How pytest finds tests."""
    return [f"{places[test.partition('[')[0]][0]}::{test}" for test in tests]


def main() -> int:
    """Plant what is asked for; 1 if any of it is not seen."""
    words = [word.lower() for word in sys.argv[1:]]
    told = {each: f"{each.sentence} {each.tests}".lower() for each in DEFECTS}
    chosen = [each for each in DEFECTS if not words or any(word in told[each] for word in words)]
    program, places = (PROJECT / SCRIPT).read_text(encoding="utf-8"), places_of_tests()
    problems = {each: problem_of(each, program, places) for each in chosen}
    needed = {test: None for each in chosen if not problems[each] for test in addresses(each.tests, places)}
    seen = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = copy_of_the_checkout(Path(name))
        broken, trouble = run_tests(folder, list(needed)) if needed else ([], "")
        said = trouble or f"{len(broken)} failed {broken or ''}".strip()
        print(f"{len(needed)} tests on the program as it is: {said}", flush=True)
        for each in chosen:
            started, failed, problem = monotonic(), list[str](), problems[each]
            if not problem:
                changed = program.replace(each.text, each.replacement)
                (folder / SCRIPT).write_text(changed, encoding="utf-8")
                failed, problem = run_tests(folder, addresses(each.tests, places), "-x")
            is_seen = bool(failed) and not problem and failed[0] not in broken
            seen += is_seen
            verdict, by = ("seen", failed[0]) if is_seen else ("NOT SEEN", problem or f"by {', '.join(each.tests)}")
            print(f"{verdict:<8} {monotonic() - started:4.0f} s  {each.sentence}: {by}", flush=True)
    print(f"{len(chosen)} defects, {seen} seen")
    return 0 if chosen and seen == len(chosen) and not (broken or trouble) else 1


if __name__ == "__main__":
    raise SystemExit(main())
