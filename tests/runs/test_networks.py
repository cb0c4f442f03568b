"""Networks that fail between script, API and S3: the run ends by itself, says what is wrong and blames no object.

On either way, whatever breaks once is survived; what lasts stops the run or leaves transient failures, and the next run
finishes. Nothing is paid twice, lost, or stored wrong.
"""

import itertools
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from tests.standins.conversion_api import ConversionApi
from tests.standins.converters import Conversion, marking
from tests.standins.program import Run, script_with
from tests.standins.s3_server import S3Server
from tests.standins.tcp_proxy import Does, Fault, ForwardProxy, PrivateCa, TcpProxy, Weather

# What is no option is made shorter; BACKOFF_CAP_SECONDS is how long the script waits before each attempt.
SHORT = {"S3_TIMEOUT_SECONDS": 2, "BACKOFF_CAP_SECONDS": 0.1, "OUTAGE_PAUSE_SECONDS": 0.1}
SECONDS = 60  # in which every run here must have ended, on a slow machine; each wait in it is 2 s
CONVERT, LIST, READ, HEAD, PUT = (
    rb"^POST /v1/convert",
    rb"^GET \S*list-type=2",
    rb"^GET \S*\.png",
    rb"^HEAD ",
    rb"^PUT ",
)
IN_THE_MIDDLE, IN_THE_HEAD = 100_000, 100  # bytes: of a body, of an answer's first lines
COUNT = 3


def with_constants(constants: Mapping[str, float], inside: str) -> tuple[str, str]:
    """The script as it is, but for some numbers; `inside`: the beginning of a command that takes it elsewhere."""
    numbers = {**SHORT, **constants}
    command = script_with("; ".join(f"program.{name} = {value}" for name, value in numbers.items()))
    elsewhere = f"import os, sys; os.execvp('ip', [*{inside.split()}, sys.executable, *{command!r}, *sys.argv[1:]])"
    return ("-c", elsewhere) if inside else command


def picture(number: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + f"picture {number}".encode() * 20_000


class Site:
    """Script, API and S3, with a network on each of the two ways."""

    def __init__(
        self, start: Callable[..., Run], bucket: Any, api: ConversionApi, to_s3: TcpProxy, to_api: TcpProxy
    ) -> None:
        self._start, self.bucket, self.api, self.to_s3, self.to_api = start, bucket, api, to_s3, to_api
        self._first_output = Fault(Does.NOTHING, on=PUT)
        to_s3.faults.append(self._first_output)

    def put(self, count: int = COUNT) -> None:
        """Put so many objects into the bucket."""
        for number in range(count):
            self.bucket.put(f"{number:03}.png", picture(number))

    def begin(
        self, *options: str, constants: Mapping[str, float] | None = None, inside: str = "", **environment: str
    ) -> Run:
        """Start the script, which uploads, and waits 2 s for an answer."""
        given = [f"api.url={self.to_api.url}", "api.timeout=2s", "api.transfer=upload", *options]
        return self._start(
            *(part for option in given for part in ("--set", option)),
            command=with_constants(constants or {}, inside),
            **{"AWS_ENDPOINT_URL_S3": self.to_s3.url, **environment},
        )

    def wait_for_first_output(self) -> None:
        """Wait until an answer has come whole, because it is on its way into the bucket."""
        assert self._first_output.reached.wait(SECONDS)

    def run(self, *options: str, **named: Any) -> Run:
        """Run it to its end."""
        return self.begin(*options, **named).wait(SECONDS)

    def assert_finished(self, run: Run, count: int = COUNT) -> None:
        """All is converted, and each object was paid for once, in however many runs."""
        assert run.exit_code == 0, run.out + run.err
        good = {
            f"converted/{number:03}.jpg": marking(Conversion(picture(number), "png", "jpg", None)).body
            for number in range(count)
        }
        assert {key: body for key, (body, *_) in self.bucket.outputs().items()} == good
        assert (len(self.api.paid), self.api.paid_twice()) == (count, [])
        assert run.summary["possible_double_charges"] == 0

    def assert_stopped(self, run: Run, because: str, hint: str, exit_code: int = 3, code: str = "") -> None:
        """The run ends once for all objects, with these words, and blames none."""
        assert run.exit_code == exit_code, run.out + run.err
        assert re.search(because, run.summary["stopped_because"]), run.summary["stopped_because"]
        assert run.summary["stopped_code"] == (code or ("s3" if "S3" in run.summary["stopped_because"] else "api"))
        assert hint in run.out
        assert "Traceback" not in run.err
        assert (run.failures, run.summary["failed"]) == ([], {})


@pytest.fixture
def site(start: Any, bucket: Any, api: ConversionApi, s3: S3Server) -> Iterator[Site]:
    """A network that works, until a test says otherwise."""
    api.behaviour.convert = marking
    with TcpProxy(s3.endpoint) as to_s3, TcpProxy(api.url) as to_api:
        yield Site(start, bucket, api, to_s3, to_api)


########################################################################
# What happens once
########################################################################


API_PLACES = {
    "connect": Fault(Does.NOTHING),
    "middle of request": Fault(Does.NOTHING, on=CONVERT, after=IN_THE_MIDDLE),
    "before answer": Fault(Does.NOTHING, on=CONVERT, way="down"),
    "middle of answer": Fault(Does.NOTHING, on=CONVERT, way="down", after=IN_THE_MIDDLE),
}
S3_PLACES = {
    "connect": Fault(Does.NOTHING),
    "look at the bucket": Fault(Does.NOTHING, on=HEAD, way="down"),
    "listing before answer": Fault(Does.NOTHING, on=LIST, way="down"),
    "middle of listing": Fault(Does.NOTHING, on=LIST, way="down", after=IN_THE_HEAD),
    "source before answer": Fault(Does.NOTHING, on=READ, way="down"),
    "middle of source": Fault(Does.NOTHING, on=READ, way="down", after=IN_THE_MIDDLE),
    "middle of PUT": Fault(Does.NOTHING, on=PUT, after=IN_THE_MIDDLE),
    "PUT before answer": Fault(Does.NOTHING, on=PUT, way="down"),
}


# Places for which others stand, and with what each peer that falls silent stands for its like.
ALIKE = {"look at the bucket", "listing before answer", "source before answer", "middle of request"}
QUIET = {"before answer": Does.VANISH, "middle of answer": Does.STALL, "middle of PUT": Does.STALL}


def breaks(places: Iterable[str]) -> list[Any]:
    """Each place with each thing that may happen there; what another case stands for is slow."""
    cases = []
    for place, does in itertools.product(places, (Does.RESET, Does.CLOSE, Does.VANISH, Does.STALL)):
        stands_for_its_like = QUIET.get(place) is does or (does is Does.RESET and place not in ALIKE)
        marks = () if stands_for_its_like else (pytest.mark.slow,)
        cases.append(pytest.param(place, does, marks=marks, id=f"{place}-{does.name}"))
    return cases


def break_once(network: TcpProxy, does: Does, place: Fault) -> Fault:
    network.faults.append(Fault(does, place.on, place.way, place.after))
    return network.faults[-1]


@pytest.mark.parametrize(("place", "does"), breaks(API_PLACES))
def test_what_breaks_once_on_the_way_to_the_api_costs_nothing(place: str, does: Does, site: Site) -> None:
    site.put()
    fault = break_once(site.to_api, does, API_PLACES[place])
    run = site.run()
    assert fault.struck == 1
    site.assert_finished(run)
    # The answer to an object that was paid for already comes from the API's memory.
    assert site.api.replays > 0 or "answer" not in place


@pytest.mark.parametrize(("place", "does"), breaks(S3_PLACES))
def test_what_breaks_once_on_the_way_to_s3_costs_nothing(place: str, does: Does, site: Site) -> None:
    site.put()
    fault = break_once(site.to_s3, does, S3_PLACES[place])
    run = site.run()
    assert fault.struck == 1
    site.assert_finished(run)


@pytest.mark.needs("pages")
def test_a_listing_of_many_pages_is_whole_though_each_second_one_breaks(site: Site) -> None:
    site.put(12)
    fault = Fault(Does.RESET, on=LIST, way="down", after=IN_THE_HEAD, times=3)
    site.to_s3.faults.append(fault)
    run = site.run(constants={"PAGE_KEYS": 4})
    assert (fault.struck, run.summary["listed"]) == (3, 12 + run.summary["skipped"].get("own_output", 0))
    site.assert_finished(run, 12)


@pytest.mark.slow
def test_a_network_that_is_bad_all_the_time_only_takes_longer(site: Site) -> None:
    site.put(8)
    for network in (site.to_api, site.to_s3):
        network.up = network.down = Weather(delay=0.01, jitter=0.05, loss=0.05, bytes_per_second=20e6)
        network.faults.append(Fault(Does.RESET, on=rb"^(POST|PUT) ", way="down", times=2))
    run = site.run("api.timeout=20s", constants={"S3_TIMEOUT_SECONDS": 20})
    assert [network.faults[-1].struck for network in (site.to_api, site.to_s3)] == [2, 2]
    site.assert_finished(run, 8)


@pytest.fixture
def lossy_host() -> Iterator[tuple[str, str]]:
    """A network namespace of its own, to and from which each 20th packet is lost, and the address of this end of it."""
    name, here, there = f"s3b{os.getpid()}", "10.213.7.1", "10.213.7.2"
    enter = f"ip netns exec {name} "
    chains = [
        f"chain {hook} {{\ntype filter hook {hook} priority 0\nnumgen random mod 100 < 5 counter drop\n}}\n"
        for hook in ("input", "output")
    ]
    try:
        for command in (
            f"ip netns add {name}",
            f"ip link add {name} type veth peer name inside netns {name}",
            f"ip address add {here}/30 dev {name}",
            f"ip link set {name} up",
            f"{enter}ip address add {there}/30 dev inside",
            f"{enter}ip link set inside up",
        ):
            subprocess.run(command.split(), check=True)
        subprocess.run(
            [*enter.split(), "nft", "-f", "-"], input=f"table inet loss {{\n{''.join(chains)}}}\n".encode(), check=True
        )
        yield enter, here
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.mark.real
def test_a_network_that_loses_packets_only_takes_longer(
    lossy_host: tuple[str, str], start: Any, bucket: Any, api: ConversionApi, s3: S3Server
) -> None:
    enter, here = lossy_host
    api.behaviour.convert = marking
    with TcpProxy(s3.endpoint, host=here) as to_s3, TcpProxy(api.url, host=here) as to_api:
        site = Site(start, bucket, api, to_s3, to_api)
        site.put(30)
        run = site.run("api.timeout=20s", constants={"S3_TIMEOUT_SECONDS": 20}, inside=enter)
    site.assert_finished(run, 30)
    counted = subprocess.run([*enter.split(), "nft", "list", "ruleset"], check=True, capture_output=True, text=True)
    assert sum(map(int, re.findall(r"counter packets (\d+)", counted.stdout))) > 20


@pytest.mark.slow
def test_a_peer_that_vanished_between_two_requests_costs_one_wait(site: Site) -> None:
    site.put(2)
    run = site.begin("run.workers=1", "api.requests_per_minute=20")
    site.wait_for_first_output()
    site.to_api.vanish_all()
    run.wait(SECONDS)
    site.assert_finished(run, 2)
    # Sent into a dead connection, and again on a new one: the API has seen nothing twice.
    assert (run.summary["requests"], site.api.replays, site.to_api.connections) == (3, 0, 2)


########################################################################
# What lasts
########################################################################


LASTING = ("api.retries=1",)
FEW_ATTEMPTS = {"S3_ATTEMPTS": 2}


@pytest.mark.parametrize(
    "does", [Does.RESET, pytest.param(Does.VANISH, marks=pytest.mark.slow)], ids=lambda does: does.name
)
def test_an_api_whose_answers_never_come_leaves_transient_failures_and_one_bill(does: Does, site: Site) -> None:
    site.put()
    site.to_api.faults.append(Fault(does, on=CONVERT, way="down", times=None))
    run = site.run(*LASTING)
    assert (run.exit_code, run.summary["failed"]) == (1, {"network": COUNT})
    assert not any(line["permanent"] for line in run.failures)
    assert (site.api.paid_twice(), site.bucket.outputs()) == ([], {})
    site.to_api.faults.clear()
    site.assert_finished(site.run())
    assert site.api.replays >= COUNT


@pytest.mark.parametrize(
    "does", [Does.RESET, pytest.param(Does.VANISH, marks=pytest.mark.slow)], ids=lambda does: does.name
)
def test_an_s3_that_takes_no_output_leaves_transient_failures_and_one_bill(does: Does, site: Site) -> None:
    site.put()
    site.to_s3.faults.append(Fault(does, on=PUT, after=IN_THE_MIDDLE, times=None))
    run = site.run(constants=FEW_ATTEMPTS)
    assert (run.exit_code, run.summary["failed"]) == (1, {"store_failed": COUNT})
    assert (len(site.api.paid), site.bucket.outputs()) == (COUNT, {})
    site.to_s3.faults.clear()
    site.assert_finished(site.run())


@pytest.mark.parametrize(
    "place", [pytest.param(HEAD, id="bucket", marks=pytest.mark.slow), pytest.param(LIST, id="listing")]
)
def test_an_s3_that_lists_nothing_stops_the_run(place: bytes, site: Site) -> None:
    site.put()
    site.to_s3.faults.append(Fault(Does.RESET, on=place, way="down", times=None))
    run = site.run(constants=FEW_ATTEMPTS)
    site.assert_stopped(run, "^S3 could not be reached for (access to the bucket|the listing of) ", "check the network")
    assert site.api.requests == []
    site.to_s3.faults.clear()
    site.assert_finished(site.run())


def test_an_output_that_cannot_be_looked_at_is_not_overwritten(site: Site) -> None:
    site.bucket.put("converted/000.jpg", b"somebody else's")
    site.put(1)
    site.to_s3.faults.append(Fault(Does.RESET, on=rb"^HEAD \S*converted", way="down", times=None))
    run = site.run(constants=FEW_ATTEMPTS)
    assert (run.exit_code, run.summary["failed"]) == (1, {"look_failed": 1})
    site.to_s3.faults.clear()
    assert site.run().summary["failed"] == {"output_collision": 1}
    assert site.bucket.outputs()["converted/000.jpg"][0] == b"somebody else's"
    assert site.api.paid == []


########################################################################
# No connection at all
########################################################################


def test_an_api_that_cannot_be_found_stops_the_run_and_blames_none_of_sixty_objects(site: Site) -> None:
    for number in range(60):
        site.bucket.put(f"{number:03}.png", b"\x89PNG\r\n\x1a\n")
    run = site.run("api.url=https://api.invalid", "api.retries=2")
    words = r"^the API cannot be reached at api\.invalid: Failed to resolve 'api\.invalid' "
    site.assert_stopped(run, words, "hint: check api.url and the network")
    # Ten workers with three attempts each: nobody went through all the objects.
    assert (run.summary["left"], run.summary["requests"] <= 30) == (60, True)


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_api_that_refuses_connections_stops_the_run_and_the_next_one_finishes(processes: int, site: Site) -> None:
    site.put()
    with site.to_api.refusing():
        run = site.run("api.retries=1", f"run.processes={processes}")
    words = r"^the API cannot be reached at 127\.0\.0\.1:\d+: .*Connection refused"
    site.assert_stopped(run, words, "hint: check api.url and the network")
    assert run.rows("in_flight") == []
    site.assert_finished(site.run())


@pytest.mark.parametrize("scheme", [pytest.param("http", marks=pytest.mark.slow), "https"])
def test_an_address_with_the_wrong_scheme_stops_the_run(scheme: str, site: Site, tmp_path: Path) -> None:
    site.put()
    if scheme == "https":
        run = site.run(f"api.url={site.to_api.url.replace('http:', 'https:')}", "api.retries=1")
        site.assert_stopped(run, "^the API cannot be reached at .*(wrong version number|record layer)", "check api.url")
        return
    with TcpProxy(site.api.url, PrivateCa(tmp_path).server_context()) as to_api:
        run = site.run(f"api.url=http://localhost:{to_api.port}", "api.retries=1")
    assert (run.exit_code, run.summary["failed"]) == (1, {"network": COUNT})


@pytest.mark.parametrize("endpoint", [pytest.param("http://s3.invalid", marks=pytest.mark.slow), "refusing"])
def test_an_s3_without_a_connection_stops_the_run(endpoint: str, site: Site) -> None:
    site.put()
    with site.to_s3.refusing():
        address = site.to_s3.url if endpoint == "refusing" else endpoint
        run = site.run(constants=FEW_ATTEMPTS, AWS_ENDPOINT_URL_S3=address)
    words = f"^S3 could not be reached for access .*{address}/.*: Failed to (resolve|establish a new connection)"
    site.assert_stopped(run, words, "hint: check the network, s3.endpoint_url")
    site.assert_finished(site.run())


def said(run: Run, words: str) -> None:
    """Read what the run says until it says this."""
    assert run.process.stderr
    line = next((line for line in run.process.stderr if words in line), None)
    assert line is not None, "the run ended without saying it"


@pytest.mark.parametrize("away", ["the API", pytest.param("S3", marks=pytest.mark.slow)])
def test_an_outage_in_the_middle_of_a_run_is_waited_for(away: str, site: Site) -> None:
    site.put(8)
    network = site.to_api if away == "the API" else site.to_s3
    run = site.begin("run.workers=2", "api.requests_per_minute=240", constants=FEW_ATTEMPTS)
    site.wait_for_first_output()
    with network.refusing():
        network.reset_all()
        said(run, f"{away} cannot be reached; waiting up to 300 s for it")
    run.wait(SECONDS)
    assert f"{away} can be reached again" in run.err
    site.assert_finished(run, 8)
    assert run.failures == []


@pytest.mark.parametrize("away", [pytest.param("the API", marks=pytest.mark.slow), "S3"])
def test_an_outage_that_lasts_stops_the_run_and_the_next_one_finishes(away: str, site: Site) -> None:
    site.put(8)
    network = site.to_api if away == "the API" else site.to_s3
    constants = {**FEW_ATTEMPTS, "OUTAGE_SECONDS": 1}
    run = site.begin("run.workers=2", "api.requests_per_minute=240", constants=constants)
    site.wait_for_first_output()
    with network.refusing():
        network.reset_all()
        run.wait(SECONDS)
    site.assert_stopped(run, f"^{away} (cannot|could not) be reached ", "check ")
    assert run.summary["left"] > 0
    site.assert_finished(site.run(), 8)


########################################################################
# TLS with a private CA
########################################################################


@pytest.fixture
def authorities(tmp_path: Path) -> tuple[PrivateCa, PrivateCa]:
    """The CA of the API and that of S3, so that trust in one is no trust in the other."""
    (tmp_path / "api").mkdir()
    (tmp_path / "s3").mkdir()
    return PrivateCa(tmp_path / "api"), PrivateCa(tmp_path / "s3")


Authorities = tuple[PrivateCa, PrivateCa]


@pytest.fixture
def safe(start: Any, bucket: Any, api: ConversionApi, s3: S3Server, authorities: Authorities) -> Iterator[Site]:
    """API and S3 by https only."""
    api.behaviour.convert = marking
    theirs, ours = (authority.server_context() for authority in authorities)
    with TcpProxy(s3.endpoint, ours) as to_s3, TcpProxy(api.url, theirs) as to_api:
        yield Site(start, bucket, api, to_s3, to_api)


def trusting(authorities: Authorities) -> dict[str, str]:
    return {"REQUESTS_CA_BUNDLE": str(authorities[0].bundle), "AWS_CA_BUNDLE": str(authorities[1].bundle)}


def test_api_and_s3_have_a_private_ca_each(safe: Site, authorities: Authorities) -> None:
    safe.put()
    listing = Fault(Does.NOTHING, on=LIST, times=None)
    safe.to_s3.faults.append(listing)
    safe.assert_finished(safe.run(**trusting(authorities)))
    assert listing.struck > 0


@pytest.mark.parametrize("untrusted", ["REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"])
def test_a_private_ca_that_is_not_trusted_stops_the_run(untrusted: str, safe: Site, authorities: Authorities) -> None:
    safe.put()
    trusted = trusting(authorities)
    run = safe.run(**{**trusted, untrusted: trusted["AWS_CA_BUNDLE" if untrusted[0] == "R" else "REQUESTS_CA_BUNDLE"]})
    whose = "the API's" if untrusted[0] == "R" else "S3's"
    words = f"^{whose} certificate is not trusted: (unable to get local issuer|self.signed)"
    safe.assert_stopped(run, words, f"hint: for a private CA, set {untrusted} to its file")
    safe.assert_finished(safe.run(**trusted))


@pytest.mark.parametrize(
    ("problem", "whose"),
    [
        pytest.param("certificate has expired", "the API's", id="expired-API", marks=pytest.mark.slow),
        pytest.param("Hostname mismatch", "the API's", id="other host-API"),
        pytest.param("hostname 'localhost' doesn't match", "S3's", id="other host-S3"),
    ],
)
def test_a_certificate_of_another_time_or_host_stops_the_run(
    problem: str, whose: str, site: Site, authorities: Authorities
) -> None:
    site.put()
    yesterday = datetime.now(timezone.utc) - timedelta(days=1)
    is_s3 = whose == "S3's"
    context = (
        authorities[is_s3].server_context(not_after=yesterday)
        if "expired" in problem
        else authorities[is_s3].server_context("another.example")
    )
    with TcpProxy(site.bucket.client.meta.endpoint_url if is_s3 else site.api.url, context) as wrong:
        changed = {"AWS_ENDPOINT_URL_S3": wrong.url} if is_s3 else {}
        options = () if is_s3 else (f"api.url={wrong.url}",)
        run = site.run(*options, constants=FEW_ATTEMPTS, **changed, **trusting(authorities))
    site.assert_stopped(run, f"^{whose} certificate is not trusted: {problem}", "this machine's clock")


########################################################################
# HTTP proxies
########################################################################


def test_https_goes_through_the_proxy(safe: Site, authorities: Authorities) -> None:
    safe.put()
    with ForwardProxy() as proxy:
        run = safe.run(**proxy.environment(), **trusting(authorities))
    safe.assert_finished(run)
    assert set(proxy.destinations) == {f"localhost:{safe.to_api.port}", f"localhost:{safe.to_s3.port}"}
    assert proxy.connections == safe.to_api.connections + safe.to_s3.connections


def test_http_goes_through_the_proxy(site: Site) -> None:
    site.put()
    with ForwardProxy() as proxy:
        run = site.run(**proxy.environment())
    site.assert_finished(run)
    assert set(proxy.destinations) == {f"127.0.0.1:{site.to_api.port}", f"127.0.0.1:{site.to_s3.port}"}


def test_no_proxy_goes_around_it(site: Site, authorities: Authorities) -> None:
    site.put()
    with ForwardProxy() as proxy, TcpProxy(site.api.url, authorities[0].server_context()) as to_api:
        run = site.run(f"api.url={to_api.url}", **proxy.environment(no_proxy="127.0.0.1"), **trusting(authorities))
    site.assert_finished(run)
    assert set(proxy.destinations) == {f"localhost:{to_api.port}"}
    assert site.to_s3.connections > 0


@pytest.mark.slow
def test_an_answer_that_breaks_behind_a_proxy_is_paid_once(site: Site) -> None:
    site.put()
    fault = Fault(Does.RESET, on=CONVERT, way="down", times=None)
    site.to_api.faults.append(fault)
    with ForwardProxy() as proxy:
        run = site.run(*LASTING, **proxy.environment())
        assert (run.exit_code, run.summary["failed"]) == (1, {"network": COUNT})
        assert len(run.rows("in_flight")) == COUNT
        fault.times = 0
        site.assert_finished(site.run(**proxy.environment()))
    assert site.api.replays >= COUNT


@pytest.mark.parametrize("leg", ["API", pytest.param("S3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheme", [pytest.param("http", marks=pytest.mark.slow), "https"])
def test_a_proxy_that_refuses_stops_the_run_and_is_named(
    scheme: str, leg: str, site: Site, safe: Site, authorities: Authorities
) -> None:
    used = safe if scheme == "https" else site
    used.put()
    with ForwardProxy(b"407 Proxy Authentication Required") as proxy:
        around = {} if leg == "S3" else {"AWS_ENDPOINT_URL_S3": site.to_s3.url.replace("127.0.0.1", "localhost")}
        no_proxy = "" if leg == "S3" else f"localhost:{site.to_s3.port}"
        environment = {**proxy.environment(no_proxy=no_proxy), **trusting(authorities), **around}
        run = used.run("api.retries=1", constants=FEW_ATTEMPTS, **environment)
    # In a tunnel, all that is known is that no connection was made.
    exit_code = 2 if scheme == "http" else 3
    used.assert_stopped(run, f"proxy.*{proxy.port}.* 407", "hint: check HTTPS_PROXY", exit_code, leg.lower())
    assert used.api.requests == []


@pytest.mark.parametrize(("scheme", "leg"), [("http", "S3"), pytest.param("https", "API", marks=pytest.mark.slow)])
def test_a_proxy_that_cannot_be_reached_stops_the_run_and_is_named(
    scheme: str, leg: str, site: Site, safe: Site, authorities: Authorities
) -> None:
    used = safe if scheme == "https" else site
    used.put()
    with ForwardProxy() as proxy, proxy.refusing():
        around = {} if leg == "S3" else {"AWS_ENDPOINT_URL_S3": site.to_s3.url.replace("127.0.0.1", "localhost")}
        no_proxy = "" if leg == "S3" else f"localhost:{site.to_s3.port}"
        environment = {**proxy.environment(no_proxy=no_proxy), **trusting(authorities), **around}
        run = used.run("api.retries=1", constants=FEW_ATTEMPTS, **environment)
    used.assert_stopped(run, f"proxy.*{proxy.port}.*Connection refused", "hint: check HTTPS_PROXY")
    used.assert_finished(used.run(**trusting(authorities)))


def test_check_names_a_proxy_that_refuses(run_cli: Callable[..., Run]) -> None:
    with ForwardProxy(b"407 Proxy Authentication Required") as proxy:
        around = proxy.environment(no_proxy="127.0.0.1")
        run = run_cli("--check", "--set", "api.url=https://localhost:1", **around)
    said = f"localhost:1 cannot be reached through the proxy 127.0.0.1:{proxy.port}: Tunnel connection failed: 407"
    assert (said in run.out, run.exit_code) == (True, 2)
