"""What the bench measures, a function for each part. All figures of a part come from one run, baselines included."""

from __future__ import annotations

import signal
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tests.bench.harness import (
    BUCKET,
    SCRIPT,
    Cost,
    Standins,
    directory,
    finished_checkpoint,
    first_edition,
    installed,
    run_command,
    run_program,
    run_recipe,
    standins,
    version_of,
)
from tests.bench.keys import HASH_FOLDERS, HASHES, LONG, PLAIN, Keys
from tests.bench.report import Cell, Line, Part, Plot, Target, table

API_SECONDS, HEAD_SECONDS, PUT_SECONDS = 0.8, 0.02, 0.03
API_SPREAD = 0.5  # it takes 0.4 to 1.2 s; where all answers take the same time, workers keep in step, see `throughput`
SERVICE_SECONDS = API_SECONDS + 2 * HEAD_SECONDS + PUT_SECONDS  # by URL: the source is looked at before and after
PAGE_SECONDS = (0.03, 0.06, 0.15)
OBJECT_BYTES = 20_000
FOLDERS = 100
OURS, OURS_TWICE, FIRST, RECIPE = "ours", "ours, 2 processes", "first edition", "recipe"
IN_STEP = "ours, in step"
THREADS, THREADS_LOOKING = "threads", "threads, looking"
# What they are started with; {} stands for bucket, workers and the address of the API.
MODULES = {
    RECIPE: "tests.bench.recipe convert {}",
    THREADS: "tests.bench.threads {}",
    THREADS_LOOKING: "tests.bench.threads {} --skip-existing",
}
MB = 10**6
# Nothing has this extension: everything is listed, and nothing is looked up.
WANT_NOTHING = ("--set", "convert.include=*.none")
UPLOAD = ("--set", "api.transfer=upload")
# The most that the recipe has been seen to do is about 25 files a second, whatever its workers.
RECIPE_FILES_PER_SECOND = 20


@dataclass(frozen=True)
class Scale:
    """How much is measured; QUICK is for trying the bench, not for figures."""

    keys: int
    few_keys: int  # for those who list a page at a time
    pass_keys: Sequence[int]
    growth_keys: Sequence[int]
    first_files: Sequence[int]  # of first runs whose requests are counted
    peer_files: int
    kept_keys: int  # most keys that the recipe is asked to keep in memory
    workers: Sequence[tuple[int, int]]  # and the processes that share them out
    recipe_workers: Sequence[int]
    first_workers: Sequence[int]
    rounds: int  # how often both editions are measured in turn, where a figure of theirs is compared
    seconds: float  # that a run of `throughput` would take at best
    sizes: Sequence[int]
    size_bytes: int  # bytes to convert for each size
    process_files: int
    per_minute: int
    windows: int  # of a minute each, that count


FULL = Scale(
    keys=1_000_000,
    few_keys=100_000,
    pass_keys=(10**4, 10**5, 10**6),
    growth_keys=(10**3, 10**4, 10**5, 10**6, 10**7),
    first_files=(10**3, 10**4),
    peer_files=600,
    kept_keys=10**6,
    workers=((1, 1), (10, 1), (50, 1), (200, 1), (200, 2)),
    recipe_workers=(10, 50, 200),
    first_workers=(10, 50),
    rounds=3,
    seconds=60,
    sizes=(1_000, 10_000, 100_000, MB, 10 * MB, 60 * MB, 100 * MB, 500 * MB),
    size_bytes=1_200 * MB,
    process_files=12_000,
    per_minute=300,
    windows=3,
)
QUICK = Scale(
    keys=20_000,
    few_keys=10_000,
    pass_keys=(10**4, 10**5),
    growth_keys=(10**3, 10**4, 10**5),
    first_files=(100, 1000),
    peer_files=60,
    kept_keys=10**4,
    workers=((1, 1), (10, 1), (50, 1), (50, 2)),
    recipe_workers=(10, 50),
    first_workers=(10, 50),
    rounds=1,
    seconds=5,
    sizes=(1_000, MB, 60 * MB, 110 * MB),
    size_bytes=60 * MB,
    process_files=600,
    per_minute=300,
    windows=1,
)


def succeeded(cost: Cost, *, done: int, count: str = "converted") -> Cost:
    """The cost of a run that did what it was to do. Raises RuntimeError with what it said if it did not."""
    if cost.exit_code or cost.summary.get(count) != done:
        found = {name: cost.summary.get(name) for name in ("listed", "converted", "already_done", "failed", "left")}
        raise RuntimeError(f"exit {cost.exit_code}, expected {count} = {done}, found {found}\n{cost.err[-2000:]}")
    return cost


def script_of(name: str) -> Path:
    """The script of an edition."""
    return first_edition() if name == FIRST else SCRIPT


@lru_cache(maxsize=2)
def start_of_program(edition: str = OURS) -> Cost:
    """What the program takes to start, list an empty bucket and end: it is taken off where a rate is wanted."""
    with standins(keys=0) as servers:
        return succeeded(run_program(servers, script=script_of(edition)), done=0)


@lru_cache(maxsize=1)
def start_of_recipe() -> Cost:
    """The same for the recipe."""
    with standins(keys=0) as servers:
        return run_recipe(servers, "list", BUCKET)


def convert_by(who: str, servers: Standins, workers: int, *, checkpoint: Path | None = None, **watched: Any) -> Cost:
    """Convert the whole bucket by one of those that are compared; the program alone has a checkpoint."""
    if who in MODULES:
        command = MODULES[who].format(f"{BUCKET} {workers} {servers.url}")
        return run_command(servers, sys.executable, "-m", *command.split(), **watched)
    flags = ("--workers", str(workers), "--processes", "2" if who == OURS_TWICE else "1")
    return run_program(servers, *flags, script=script_of(who), checkpoint=checkpoint, **watched)


def converted(who: str, cost: Cost, files: int) -> Cost:
    """The cost of a run that has converted so many. Raises RuntimeError if it has not."""
    return succeeded(cost, done=files, count="objects" if who == RECIPE else "converted")


@lru_cache(maxsize=5)
def first_file(who: str) -> Cost:
    """What a run over a single object takes: the start, and what is only done for the first request."""
    with standins(keys=1, latency=0.0) as servers:
        return converted(who, convert_by(who, servers, 1), 1)


def each_ms(cost: Cost, start: Cost, many: int) -> float:
    """Milliseconds of CPU for each of so many, what the start takes taken off."""
    return 1000 * (cost.cpu_seconds - start.cpu_seconds) / max(1, many)


def per_file_ms(cost: Cost, files: int, who: str = OURS) -> float:
    """Milliseconds of CPU for each file but the first, which bears the start."""
    return each_ms(cost, first_file(OURS if who == OURS_TWICE else who), files - 1)


def column(rows: Sequence[Sequence[Cell]], at: int) -> list[float]:
    """The numbers of a column."""
    return [float(row[at] or 0) for row in rows]


########################################################################
# Listing
########################################################################

LISTING_COLUMNS = ("what", "keys", "seconds", "CPU s", "keys/s of CPU", "keys/s", "× CPU", "× time", "peak MB")
ABOUT_RATES = (
    "Rates have the start of the process taken off, measured over an empty bucket in the same run "
    "({ours:.2f} s of CPU for the program, {theirs:.2f} s for the baseline). `×` is against boto3's paginator alone "
    "over the same bucket."
)


class Layout(NamedTuple):
    """What the keys of a synthetic bucket look like."""

    name: str
    folders: int
    names: str
    has_folders: bool = False  # for one who lists a folder at a time


LAYOUTS = (
    Layout("flat", 0, PLAIN),
    Layout(f"in {FOLDERS} folders", FOLDERS, PLAIN, has_folders=True),
    Layout("random hashes", HASH_FOLDERS, HASHES),
    Layout("long common prefixes", FOLDERS, LONG, has_folders=True),
)
BOTO3, RCLONE, RCLONE_FOLDERS, S5CMD = LISTERS = ("boto3's paginator", "rclone", "rclone, folder by folder", "s5cmd")
# They count what they list, and print only the sum; {} stands for the address of S3. `ListR` is rclone's one flat
# listing; without it, rclone lists eight folders at a time.
RCLONE_COMMAND = (
    f"rclone size :s3:{BUCKET} --json --s3-provider Other --s3-env-auth --s3-list-version 2 --s3-region us-east-1 "
    "--s3-endpoint {}"
)
COMMANDS = {
    RCLONE: RCLONE_COMMAND,
    RCLONE_FOLDERS: f"{RCLONE_COMMAND} --disable ListR",
    S5CMD: f"s5cmd --endpoint-url {{}} --json du s3://{BUCKET}/*",
}


def list_by(what: str, servers: Standins) -> Cost | None:
    """List the whole bucket and want nothing of it; None if that program is not installed."""
    if what == BOTO3:
        return run_recipe(servers, "list", BUCKET)
    if what == OURS:
        return run_program(servers, *WANT_NOTHING)
    program, *arguments = COMMANDS[what].format(servers.url).split()
    path = installed(program)
    return run_command(servers, path, *arguments) if path else None


@lru_cache(maxsize=8)
def start_of_lister(what: str) -> Cost | None:
    """What it takes to start and list an empty bucket."""
    with standins(keys=0) as servers:
        return list_by(what, servers)


class Listed(NamedTuple):
    """One bucket listed by one program; costs of the whole bucket, the start taken off. All 0: not installed."""

    keys_per_second: float = 0.0
    cpu_us: float = 0.0  # for each key
    peak_mb: float = 0.0
    lists: int = 0


def listed_by(what: str, servers: Standins, keys: int) -> Listed:
    """List it, and look whether that was all of it."""
    cost, start = list_by(what, servers), start_of_lister(what)
    if cost is None or start is None:
        return Listed()
    succeeded(cost, done=keys, count={OURS: "listed", BOTO3: "objects"}.get(what, "count"))
    rate = keys / max(1e-3, cost.seconds - start.seconds)
    return Listed(rate, 1000 * each_ms(cost, start, keys), cost.peak_mb, int(cost.counts["pages"]))


def list_each_way(layout: Layout, scale: Scale) -> dict[tuple[str, int], list[Listed]]:
    """One layout: who, of how many keys -> what it took, for each latency."""
    found = defaultdict[tuple[str, int], list[Listed]](list)
    peers = [what for what in LISTERS if layout.has_folders or what != RCLONE_FOLDERS]
    measured = (((*peers, OURS), scale.few_keys), ((OURS,), scale.keys))
    for seconds, (listers, keys) in product(PAGE_SECONDS, measured):
        with standins(keys=keys, page_latency=seconds, folders=layout.folders, names=layout.names) as servers:
            for what in listers:
                found[what, keys].append(listed_by(what, servers, keys))
    return found


def listing(scale: Scale) -> Part:
    """Keys listed in a second, beside other programs: each layout of keys, near and far."""
    rows: list[list[Cell]] = []
    for layout in LAYOUTS:
        ways = list_each_way(layout, scale)
        base = ways[BOTO3, scale.few_keys]
        for (what, keys), found in ways.items():
            if not found[0].lists:
                rows.append([layout.name, what, keys, "not installed", *[None] * (2 * len(PAGE_SECONDS) + 2)])
                continue
            lists = max(each.lists for each in found)
            rates = [each.keys_per_second for each in found]
            times = [rate / each.keys_per_second for rate, each in zip(rates, base, strict=True)]
            cpu, peak = median(each.cpu_us for each in found), max(each.peak_mb for each in found)
            rows.append([layout.name, what, keys, *rates, *times, cpu, peak, lists / -(-keys // 1000)])
    each_ms_page = [f"{1000 * seconds:.0f} ms" for seconds in PAGE_SECONDS]
    columns = (
        *("layout", "what", "keys", *(f"keys/s at {each}" for each in each_ms_page)),
        *(*(f"× boto3 at {each}" for each in each_ms_page), "CPU µs/key", "peak MB", "LISTs ÷ pages"),
    )
    versions = ", ".join(filter(None, map(version_of, ("rclone", "s5cmd"))))
    about = (
        "Every key is listed and none is converted: ours wants `*.none`, the others count (`rclone size`, `s5cmd du`; "
        f"{versions or 'neither is installed'}), all with their default number of parallel requests. Programs that "
        f"read one page after another take the same time for each page, so they list {scale.few_keys:,} keys only; "
        f"ours learns where keys lie while it lists, and is measured with {scale.few_keys:,} and {scale.keys:,}. Rates "
        "have the start of the process taken off; CPU is the median of the three latencies, *peak MB* and *LISTs ÷ "
        "pages* are the highest; 1 LIST for each 1,000 keys is the minimum."
    )
    return Part("Listing", about, [table(columns, rows)])


def about_rates() -> str:
    """How to read the rates."""
    return ABOUT_RATES.format(ours=start_of_program().cpu_seconds, theirs=start_of_recipe().cpu_seconds)


def pass_row(what: str, keys: int, cost: Cost, start: Cost, base: Cost) -> list[Cell]:
    """A row of LISTING_COLUMNS; `base` is what boto3's paginator took for the same bucket."""
    cpu, wall = (max(1e-3, cost.cpu_seconds - start.cpu_seconds), max(1e-3, cost.seconds - start.seconds))
    first = start_of_recipe()
    return [
        *(what, keys, cost.seconds, cost.cpu_seconds, keys / cpu, keys / wall),
        *((base.cpu_seconds - first.cpu_seconds) / cpu, (base.seconds - first.seconds) / wall, cost.peak_mb),
    ]


def nothing_to_do(scale: Scale) -> Part:
    """A pass over finished objects beside the first edition's, and how both grow with their number."""
    rows: list[list[Cell]] = []
    ratios: list[float] = []
    peaks: dict[str, list[float]] = {OURS: [], FIRST: []}
    for keys in scale.pass_keys:
        with standins(keys=keys) as servers:
            base = run_recipe(servers, "list", BUCKET)
            passes = passes_of_each(servers, keys, scale.rounds)
        rows.append(pass_row(BOTO3, keys, base, start_of_recipe(), base))
        for edition, costs in passes.items():
            usual = sorted(costs, key=lambda cost: cost.cpu_seconds)[len(costs) // 2]
            rows.append(pass_row(edition, keys, usual, start_of_program(edition), base))
            peaks[edition].append(max(cost.peak_mb for cost in costs))
        pairs = zip(passes[OURS], passes[FIRST], strict=True)
        ratios.append(median(ours.cpu_seconds / first.cpu_seconds for ours, first in pairs))
        rows[-2].append(ratios[-1])
    grown = {edition: each[-1] / each[-2] for edition, each in peaks.items()}
    keys, fewer = scale.pass_keys[-1], scale.pass_keys[-2]
    targets = [
        Target(f"CPU of a pass over {keys:,} finished objects ÷ the first edition's", ratios[-1], most=1.3, first=1.0),
        Target(f"memory with {keys:,} objects ÷ with {fewer:,}", grown[OURS], most=1.05, first=grown[FIRST]),
    ]
    lines = [Line(str(rows[first][0]), column(rows[first::3], 1), column(rows[first::3], 2)) for first in range(3)]
    plot = Plot("pass", "A pass with nothing to do", "keys", "seconds", lines, log_y=True)
    about = (
        f"{about_rates()} Both editions are measured in turn, {scale.rounds} times; a row is the usual run of them, "
        "and *CPU ÷ first edition's* the median of the ratios of two neighbours, their start included."
    )
    columns = (*LISTING_COLUMNS, "CPU ÷ first edition's")
    filled = [[*row, *[None] * (len(columns) - len(row))] for row in rows]
    return Part("A pass with nothing to do", about, [table(columns, filled)], [plot], targets)


def verification(scale: Scale) -> Part:
    """--verify of a bucket whose outputs are all there, beside a pass over it with nothing to do."""
    rows: list[list[Cell]] = []
    ratios: list[float] = []
    peaks: list[float] = []
    for keys in scale.pass_keys[-2:]:
        costs = passes_and_verifications(keys, scale.rounds)
        for name, each in costs.items():
            usual = sorted(each, key=lambda cost: cost.cpu_seconds)[len(each) // 2]
            requests = [int(usual.counts[counted]) for counted in ("pages", "heads")]
            rows.append([name, keys, usual.seconds, usual.cpu_seconds, max(cost.peak_mb for cost in each), *requests])
        pairs = zip(costs["--verify"], costs["a pass"], strict=True)
        ratios.append(median(verify.cpu_seconds / nothing.cpu_seconds for verify, nothing in pairs))
        peaks.append(max(cost.peak_mb for cost in costs["--verify"]))
    keys, fewer = scale.pass_keys[-1], scale.pass_keys[-2]
    targets = [
        Target(f"CPU of --verify ÷ CPU of a pass, {keys:,} objects", ratios[-1], most=2.0),
        Target(f"memory of --verify with {keys:,} objects ÷ with {fewer:,}", peaks[-1] / peaks[-2], most=1.05),
    ]
    about = (
        "A pass over finished objects, and `--verify` of the same bucket with all outputs there, in turn, "
        f"{scale.rounds} times; a row is the usual run, its start included; the ratio is the median of those of two "
        "neighbours."
    )
    columns = ("what", "keys", "seconds", "CPU s", "peak MB", "LISTs", "HEADs")
    return Part("Proving what was stored", about, [table(columns, rows)], [], targets)


def passes_and_verifications(keys: int, rounds: int) -> dict[str, list[Cost]]:
    """Both in turn, with one checkpoint."""
    costs: dict[str, list[Cost]] = {"a pass": [], "--verify": []}
    with (
        standins(keys=keys, has_outputs=True) as servers,
        finished_checkpoint(servers, keys, 0, OBJECT_BYTES, SCRIPT) as path,
    ):
        for _ in range(rounds):
            costs["a pass"].append(succeeded(run_program(servers, checkpoint=path), done=keys, count="already_done"))
            found = run_program(servers, "--verify", checkpoint=path)
            if found.out.strip() != f"verified {keys} of {keys}":
                raise RuntimeError(f"--verify: exit {found.exit_code}: {found.out[-500:]}{found.err[-500:]}")
            costs["--verify"].append(found)
    return costs


def passes_of_each(servers: Standins, keys: int, rounds: int) -> dict[str, list[Cost]]:
    """Passes of both editions in turn, each with a checkpoint of its own."""
    found: dict[str, list[Cost]] = {OURS: [], FIRST: []}
    with ExitStack() as stack:
        numbers = (keys, 0, OBJECT_BYTES)
        checkpoints = {
            edition: stack.enter_context(finished_checkpoint(servers, *numbers, script_of(edition)))
            for edition in found
        }
        for _ in range(rounds):
            for edition, path in checkpoints.items():
                cost = run_program(servers, script=script_of(edition), checkpoint=path)
                found[edition].append(succeeded(cost, done=keys, count="already_done"))
    return found


########################################################################
# Growth
########################################################################

# Dollars for 1,000 requests: list prices of S3 Standard in us-east-1, as far as the author knows them. An input.
WRITE_PRICE, READ_PRICE = 0.005, 0.0004
NIGHTS = 30
REQUESTS = ("pages", "heads", "gets", "puts")


def growth(scale: Scale) -> Part:
    """A pass with nothing to do as the bucket grows to ten million, and what S3 takes for it."""
    rows: list[list[Cell]] = []
    for keys in scale.growth_keys:
        with standins(keys=keys) as servers, finished_checkpoint(servers, keys, 0, OBJECT_BYTES) as path:
            cost = succeeded(run_program(servers, checkpoint=path), done=keys, count="already_done")
            size = sum(each.stat().st_size for each in path.parent.glob(f"{path.name}*"))
            kept = run_recipe(servers, "keep", BUCKET).peak_mb if keys <= scale.kept_keys else None
        requests = [int(cost.counts[name]) for name in ("pages", "heads")]
        # Of a small bucket, the start's own differences are larger than what is asked for.
        cpu = each_ms(cost, start_of_program(), keys) * 1000 if keys >= 10_000 else None
        rows.append([keys, cost.seconds, cost.cpu_seconds, cpu, cost.peak_mb, size / keys, *requests, kept])
    columns = (
        *("finished objects", "seconds", "CPU s", "CPU µs/object", "peak MB", "checkpoint bytes/object"),
        *("LISTs", "HEADs", "recipe: keys in a list, peak MB"),
    )
    kept_rows = [row for row in rows if row[8]]
    plots = [
        Plot(
            *("growth", "A pass with nothing to do, as the bucket grows", "finished objects", "seconds"),
            [Line("wall time", column(rows, 0), column(rows, 1)), Line("CPU", column(rows, 0), column(rows, 2))],
            log_y=True,
        ),
        Plot(
            *("growth-memory", "Its memory", "objects", "peak MB"),
            [
                Line("the program", column(rows, 0), column(rows, 4)),
                Line("recipe: every key in a list", column(kept_rows, 0), column(kept_rows, 8)),
            ],
        ),
    ]
    about = (
        "A pass over objects that are all finished. The peak is the kernel's (`ru_maxrss`), the interpreter and all "
        "modules included; CPU for an object has the start taken off. The checkpoint is filled by copying the row of "
        "one object.\n\n"
        "The second table shows what S3 is asked and what it charges. First runs by URL are counted at the stand-ins; "
        "one GET for each object is the API's own, which reads the URL. *Each object more* is the difference of the "
        "two; the rows below are calculated from it and from the largest pass above. Prices are an input: "
        f"{WRITE_PRICE} $ for 1,000 PUT, COPY, POST or LIST, {READ_PRICE} $ for 1,000 GET or HEAD (list prices of S3 "
        "Standard in us-east-1, as far as the author knows them). Conversions, storage and transfer out of S3 are not "
        "included."
    )
    most, lists, heads = (float(rows[-1][at] or 0) for at in (0, 6, 7))
    return Part("Growth", about, [table(columns, rows), bill(scale, [lists / most, heads / most, 0.0, 0.0])], plots)


def bill(scale: Scale, nightly: Sequence[float]) -> str:
    """The table of what S3 takes; `nightly`: REQUESTS of a pass with nothing to do, for each object."""
    rows: list[list[Cell]] = []
    firsts = [first_requests(files) for files in scale.first_files]
    for files, requests in zip(scale.first_files, firsts, strict=True):
        rows.append(bill_row(f"first run, {files:,} objects: counted", requests))
    more = scale.first_files[-1] - scale.first_files[0]
    each = [(most - least) / more for least, most in zip(firsts[0], firsts[-1], strict=True)]
    rows.append([*("first run: each object more", *(f"{count:.4g}" for count in each)), f"{dollars(each):.7f}"])
    first, night = ([MB * count for count in counts] for counts in (each, nightly))
    nights = [NIGHTS * count for count in night]
    rows += [
        bill_row(f"first run, {MB:,} objects", first),
        bill_row(f"a nightly pass over {MB:,} finished objects", night),
        bill_row(f"{NIGHTS} of them", nights),
        bill_row("a month: the first run and the nights", [sum(both) for both in zip(first, nights, strict=True)]),
    ]
    return table(("what", "LIST", "HEAD", "GET", "PUT", "$"), rows)


def first_requests(files: int) -> list[int]:
    """REQUESTS of a first run over so many, with those of an API that fetches what it is sent the URL of."""
    with standins(keys=files, latency=0.0, put_latency=0.0) as servers:
        cost = succeeded(run_program(servers, "--workers", "20"), done=files)
    return [int(cost.counts[name] + cost.counts["conversions"] * (name == "gets")) for name in REQUESTS]


def bill_row(what: str, requests: Sequence[float]) -> list[Cell]:
    """One row."""
    return [what, *(round(count) for count in requests), f"{dollars(requests):,.3f}"]


def dollars(requests: Sequence[float]) -> float:
    """What S3 takes for so many REQUESTS."""
    lists, heads, gets, puts = requests
    return ((lists + puts) * WRITE_PRICE + (heads + gets) * READ_PRICE) / 1000


########################################################################
# Peers
########################################################################

PEER_WORKERS = 20
PEERS = (OURS, RECIPE, THREADS, THREADS_LOOKING)


def peers(scale: Scale) -> Part:
    """The same files by other programs: what they take, what a second run pays again, what a kill loses."""
    files = scale.peer_files
    takes: list[list[Cell]] = []
    again: list[list[Cell]] = []
    for who in PEERS:
        runs = story(who, files)
        first = runs["first"]
        api, every = (first.counts[name] for name in ("api_requests", "requests"))
        cpu = per_file_ms(first, files, who)
        rate = files / first.counts["span_seconds"]
        takes.append([who, files, rate, cpu, first.peak_mb, (every - api) / files, api / files])
        again += [
            [
                *(who, name, str(run.exit_code), run.seconds),
                *(int(run.counts[each]) for each in ("conversions", "paid_twice")),
                files - int(run.counts["stored"]),
            ]
            for name, run in runs.items()
        ]
    about = (
        f"{files:,} files by URL, {PEER_WORKERS} workers; the API takes {API_SECONDS} s, a PUT "
        f"{1000 * PUT_SECONDS:.0f} ms, a HEAD {1000 * HEAD_SECONDS:.0f} ms. *recipe* is the published one "
        "(recipe.py); *threads* is what people write (threads.py): a bounded pool, a Session for each thread, retries, "
        "an idempotency key, no journal; *threads, looking* first asks S3 whether the output is there. *files/s* "
        "counts from the first request at the API to the last object stored; CPU has a run over one file taken off.\n\n"
        "The second table tells two stories of each program. In the first, a second run follows a day later, when the "
        "API has forgotten its idempotency keys. In the other, SIGKILL ends a run when half of the files are paid; "
        "another run follows at once, and one more a day later. Within the day, the API answers a request that is the "
        "same in every byte with its first answer, unpaid, and refuses other bytes under a known key (422): a URL that "
        "is signed anew is other bytes. *paid twice* and *outputs missing* are totals after the run. No listing shows "
        "the outputs, as if they were in another bucket."
    )
    columns = ("what", "files", "files/s", "CPU ms/file", "peak MB", "requests at S3/file", "at the API/file")
    more = ("what", "run", "exit code", "seconds", "paid in it", "paid twice", "outputs missing")
    return Part("Peers", about, [table(columns, takes), table(more, again)])


def story(who: str, files: int) -> dict[str, Cost]:
    """A run and one a day later; and one that is killed, with those after it."""
    options = {"latency": API_SECONDS, "head_latency": HEAD_SECONDS, "put_latency": PUT_SECONDS, "remembers": True}
    runs: dict[str, Cost] = {}
    with standins(keys=files, **options) as servers, directory() as kept:
        path = kept / "checkpoint.sqlite3"
        runs["first"] = convert_by(who, servers, PEER_WORKERS, checkpoint=path)
        if runs["first"].exit_code or runs["first"].counts["stored"] != files:
            raise RuntimeError(f"{who}: exit {runs['first'].exit_code}: {runs['first'].err[-2000:]}")
        servers.let_a_day_pass()
        runs["a day later"] = convert_by(who, servers, PEER_WORKERS, checkpoint=path)
    with standins(keys=files, **options) as servers, directory() as kept:
        path = kept / "checkpoint.sqlite3"
        watched = {"is_enough": lambda: servers.counts()["conversions"] >= files / 2, "ends_by": signal.SIGKILL}
        runs["killed half-way"] = convert_by(who, servers, PEER_WORKERS, checkpoint=path, **watched)
        runs["at once after it"] = convert_by(who, servers, PEER_WORKERS, checkpoint=path)
        servers.let_a_day_pass()
        runs["a day after that"] = convert_by(who, servers, PEER_WORKERS, checkpoint=path)
    return runs


########################################################################
# Throughput
########################################################################


def run_throughput(workers: int, who: str, files: int, spread: float) -> Cost:
    """Convert so many files with so many workers, the API's times differing by up to `spread` of their mean."""
    latencies = {"latency": API_SECONDS, "head_latency": HEAD_SECONDS, "put_latency": PUT_SECONDS}
    with standins(keys=files, spread=spread, **latencies) as servers:
        return converted(who, convert_by(who, servers, workers), files)


def throughput_row(workers: int, who: str, files: int, spread: float = API_SPREAD) -> list[Cell]:
    """One row: what it did, against workers ÷ service time."""
    cost = run_throughput(workers, who, files, spread)
    heads = cost.counts["heads"] / files
    service = API_SECONDS + heads * HEAD_SECONDS + PUT_SECONDS
    rate = files / cost.counts["span_seconds"]
    whole = files / float(cost.summary["seconds"])
    ideal = workers / service
    cpu = per_file_ms(cost, files, who)
    return [workers, who, files, heads, ideal, rate, 100 * rate / ideal, whole, cpu, cost.peak_mb]


def throughput(scale: Scale) -> Part:
    """Files a second from 1 to 400 workers, with the first edition and the recipe beside it."""
    rows: list[list[Cell]] = []
    for workers, processes in scale.workers:
        files = workers * max(2, round(scale.seconds / SERVICE_SECONDS))
        rows.append(throughput_row(workers, OURS if processes == 1 else OURS_TWICE, files))
        if workers in scale.first_workers and processes == 1:
            rows.append(throughput_row(workers, FIRST, files))
            number, _, *figures = throughput_row(workers, OURS, files, spread=0.0)
            rows.append([number, IN_STEP, *figures])
        if workers in scale.recipe_workers and processes == 1:
            # The recipe gets fewer files: with hundreds of workers it would take half an hour for as many.
            most = max(2 * workers, round(RECIPE_FILES_PER_SECOND * scale.seconds))
            rows.append(throughput_row(workers, RECIPE, min(files, most)))
    columns = ("workers", "what", "files", "HEADs/file", "workers ÷ service time", "files/s", "% of it")
    more = ("files/s of the whole run", "CPU ms/file", "peak MB")
    about = (
        f"The API takes {API_SECONDS} s, {100 * API_SPREAD:.0f} % more or less, a PUT {1000 * PUT_SECONDS:.0f} ms, a "
        f"HEAD {1000 * HEAD_SECONDS:.0f} ms (*in step*: the API always takes as long, so that workers which have begun "
        "together do everything together, and wait for one another at the interpreter, which runs one at a time); the "
        "service time of a file is that of all its requests one after the other, HEADs as they were counted; "
        f"{OBJECT_BYTES:,} bytes come back; each object is sent by URL. *files/s* counts from the first request at the "
        "API to the last object stored, and so has the one answer in it that is waited for at the start, because it "
        "says what the limit is; *of the whole run* counts by the program's own clock, from its start. CPU has a run "
        "over one file taken off; *peak MB* is that of the largest process."
    )
    shares = {(row[0], row[1]): float(row[6] or 0) for row in rows}
    targets = [
        Target(
            f"% of workers ÷ (API + S3 round trips), {workers} workers",
            shares[workers, OURS],
            least=95,
            first=shares.get((workers, FIRST)),
        )
        for workers in scale.first_workers
    ]
    return Part("Throughput", about, [table((*columns, *more), rows)], [throughput_plot(rows)], targets)


def throughput_plot(rows: Sequence[Sequence[Cell]]) -> Plot:
    """Workers against files a second, with Little's law."""
    lines = []
    for who in (RECIPE, FIRST, OURS, OURS_TWICE):
        own = [row for row in rows if row[1] == who]
        lines.append(Line(who, column(own, 0), column(own, 5)))
        if who == OURS:
            ideal = Line("workers ÷ service time", column(own, 0), column(own, 4), is_ideal=True)
    return Plot("throughput", "Throughput", "workers", "files/s", [*lines, ideal], log_y=True)


def sizes(scale: Scale) -> Part:
    """Objects from 1 KB to 500 MB, up and down through six workers."""
    workers = 6
    rows: list[list[Cell]] = []
    for size in scale.sizes:
        files = max(workers, min(300, scale.size_bytes // size))
        options = {"keys": files, "size": size, "answer_bytes": size, "latency": 0.0, "put_latency": PUT_SECONDS}
        with standins(**options) as servers:
            flags = ("--workers", str(workers), *UPLOAD)
            cost = succeeded(run_program(servers, *flags), done=files)
        seconds = cost.counts["span_seconds"]
        cpu = per_file_ms(cost, files)
        moved = size * files / MB
        rows.append([size, files, files / seconds, moved / seconds, cpu, cpu / (size / MB), cost.peak_mb])
    columns = ("bytes", "files", "files/s", "MB/s each way", "CPU ms/file", "CPU ms/MB", "peak MB")
    about = (
        f"{workers} workers, `api.transfer = upload`: each object is read from S3, sent to the API, received and "
        "stored, so its bytes pass through this machine four times. The API answers at once; above 100 MB it is asked "
        "by jobs, whose first poll comes after some seconds."
    )
    xs = column(rows, 0)
    plots = [
        Plot("sizes", "Memory by size", "bytes of an object", "MB", [Line("peak", xs, column(rows, 6))]),
        Plot(
            *("sizes-rate", "Bytes moved by size", "bytes of an object", "MB/s each way"),
            [Line("ours", xs, column(rows, 3))],
        ),
    ]
    return Part("Sizes", about, [table(columns, rows)], plots)


def processes(scale: Scale) -> Part:
    """One process and two, where the CPU is what is short."""
    workers, latency = 100, 0.05
    rows: list[list[Cell]] = []
    base = 0.0
    for number in (1, 2):
        with standins(keys=scale.process_files, latency=latency, put_latency=PUT_SECONDS) as servers:
            flags = ("--workers", str(workers), "--processes", str(number))
            cost = succeeded(run_program(servers, *flags, with_children=True), done=scale.process_files)
        rate = scale.process_files / cost.counts["span_seconds"]
        base = base or rate
        cpu = per_file_ms(cost, scale.process_files)
        theirs = 1000 * cost.counts["cpu_seconds"] / scale.process_files
        rows.append([number, scale.process_files, rate, rate / base, cpu, theirs, cost.peak_mb, cost.family_mb])
    columns = ("processes", "files", "files/s", "× one process", "CPU ms/file", "stand-ins' CPU ms/file")
    about = (
        f"The API takes {1000 * latency:.0f} ms, a PUT {1000 * PUT_SECONDS:.0f} ms, {workers} workers: CPU is what is "
        f"short (without that, {workers / (latency + PUT_SECONDS):,.0f} files/s would be possible). The stand-ins run "
        "on the same cores. *all processes MB* counts what they share once for each."
    )
    return Part("Processes", about, [table((*columns, "largest process MB", "all processes MB"), rows)])


########################################################################
# Pace
########################################################################

WINDOW_SECONDS = 60  # of a limit per minute


def pace(scale: Scale) -> Part:
    """How much of a limit per minute is filled, and how many answers are 429, with nothing configured."""
    workers, limit = 20, scale.per_minute
    # One window more than is counted: where it begins is where the last one that counts has ended.
    files = round(limit * (scale.windows + 1.5))
    options = {"per_minute": limit, "window": WINDOW_SECONDS, "put_latency": PUT_SECONDS, "latency": API_SECONDS}
    with standins(keys=files, **options) as servers:
        cost = run_program(servers, "--workers", str(workers), is_enough=lambda: has_begun(servers, scale.windows + 1))
        windows = cost.counts["windows"]
    if len(windows) <= scale.windows:
        raise RuntimeError(f"only {len(windows)} windows were begun, exit {cost.exit_code}: {cost.err[-2000:]}")
    rows: list[list[Cell]] = []
    for number, (window, following) in enumerate(pairwise(windows[: scale.windows + 1]), 1):
        elapsed = following["began_at"] - window["began_at"]
        rows.append([str(number), *pace_figures([window], limit, elapsed)])
    elapsed = windows[scale.windows]["began_at"] - windows[0]["began_at"]
    rows.append(["all", *pace_figures(windows[: scale.windows], limit, elapsed)])
    columns = ("window", "accepted", "429s", "seconds until the next began", "% of the limit", "429s: % of requests")
    about = (
        f"{workers} workers, nothing configured; the API admits {limit} requests in a window of {WINDOW_SECONDS} s "
        "that begins with the first request after the last one ended. *% of the limit* counts the time until the next "
        "window began, so that a pause between two windows is a loss as well. The first one has in it the wait "
        "for the first answer, which says what the limit is: it is the worst."
    )
    targets = [
        Target("% of the limit per minute that is filled", float(rows[-1][4] or 0), least=98.5),
        Target("429s in % of the requests", float(rows[-1][5] or 0), most=0.5),
    ]
    return Part("Pace", about, [table(columns, rows)], targets=targets)


def has_begun(servers: Standins, number: int) -> bool:
    """Whether so many windows have begun."""
    return len(servers.counts()["windows"]) >= number


def pace_figures(windows: Sequence[dict[str, float]], limit: int, elapsed: float) -> list[Cell]:
    """The row of some windows that took `elapsed` seconds together."""
    accepted = int(sum(each["accepted"] for each in windows))
    refused = int(sum(each["refused"] for each in windows))
    return [
        *(accepted, refused, elapsed, 100 * accepted / (limit * elapsed / WINDOW_SECONDS)),
        100 * refused / max(1, accepted + refused),
    ]


########################################################################
# The checkpoint
########################################################################


def checkpoint(scale: Scale) -> Part:
    """How many bytes a finished object takes in the checkpoint of a run that has converted it."""
    files = scale.process_files
    rows: list[list[Cell]] = []
    for edition in (OURS, FIRST):
        least, most = checkpoint_bytes(edition, 1), checkpoint_bytes(edition, files)
        rows.append([edition, files, least, most, (most - least) / (files - 1)])
    ours, first = column(rows, 4)
    key = Keys(files).key(0)
    about = (
        f"The files of the checkpoint, its write-ahead log included, after a run of 20 workers over so many objects, "
        f"each with a key of {len(key)} bytes, and after one over a single object."
    )
    columns = ("what", "files", "bytes after one file", "bytes after all", "bytes for each of the others")
    targets = [Target("bytes of the checkpoint for a finished object", ours, most=250, first=first)]
    return Part("Checkpoint", about, [table(columns, rows)], targets=targets)


def checkpoint_bytes(edition: str, files: int) -> int:
    """What the checkpoint takes on the disk after a run over so many files."""
    with standins(keys=files, latency=0.0, put_latency=0.0) as servers, directory() as kept:
        path = kept / "checkpoint.sqlite3"
        cost = run_program(servers, "--workers", "20", script=script_of(edition), checkpoint=path)
        succeeded(cost, done=files)
        return sum(each.stat().st_size for each in kept.glob(f"{path.name}*"))


########################################################################
# The ruler itself
########################################################################


def cost(scale: Scale) -> Part:
    """What a file costs, beside the first edition; and what the stand-ins take of it, in the same run."""
    rows = []
    files = scale.process_files // 4
    each: dict[str, list[float]] = {OURS: [], FIRST: []}
    with standins(keys=files, latency=0.0, put_latency=0.0) as servers:
        for _ in range(scale.rounds):
            for edition, found in each.items():
                run = run_program(servers, "--workers", "20", script=script_of(edition))
                found.append(per_file_ms(succeeded(run, done=files), files, edition))
                rows.append(cost_row(f"a file converted, by URL, {edition}", files, run, first_file(edition)))
        run = succeeded(run_program(servers, "--workers", "20", *UPLOAD), done=files)
        rows.append(cost_row("a file converted, by upload", files, run, first_file(OURS)))
    with standins(keys=scale.keys) as servers:
        run = succeeded(run_program(servers, *WANT_NOTHING), done=scale.keys, count="listed")
        rows.append(cost_row("1,000 keys listed", scale.keys // 1000, run, start_of_program()))
        run = run_recipe(servers, "list", BUCKET)
        rows.append(cost_row("1,000 keys listed by boto3", scale.keys // 1000, run, start_of_recipe()))
    columns = ("what", "how many", "requests", "stand-ins: CPU µs/request", "stand-ins: CPU ms each")
    about = (
        "The CPU time of the stand-ins' process, as it reports it itself, beside that of the process that is measured, "
        f"which has its start taken off. Nothing waits; an object has {OBJECT_BYTES:,} bytes, and so has its output."
    )
    ours, first = map(median, each.values())
    targets = [Target("CPU ms for a file by URL, 20 workers", ours, most=7, first=first)]
    more = ("measured: CPU ms each", "stand-ins' share")
    return Part("What a file costs, and the stand-ins", about, [table((*columns, *more), rows)], targets=targets)


def cost_row(what: str, many: int, run: Cost, start: Cost) -> list[Cell]:
    """One row."""
    theirs = 1000 * run.counts["cpu_seconds"] / many
    ours = each_ms(run, start, many)
    requests = int(run.counts["requests"])
    each = 1e6 * run.counts["cpu_seconds"] / requests
    return [what, many, requests, each, theirs, ours, f"{100 * theirs / (theirs + ours):.0f} %"]


PARTS = {
    "cost": cost,
    "listing": listing,
    "pass": nothing_to_do,
    "verify": verification,
    "growth": growth,
    "peers": peers,
    "throughput": throughput,
    "sizes": sizes,
    "processes": processes,
    "pace": pace,
    "checkpoint": checkpoint,
}
