"""Ceph's S3 gateway for the tests, on 127.0.0.1: one monitor, one OSD on a sparse file, and one radosgw.

    python -m tests.standins.servers.ceph DIRECTORY [PORT [CERTIFICATE]]     in the foreground, until SIGTERM or Ctrl-C

CERTIFICATE is a PEM file with the private key in it: then the gateway speaks TLS. The daemons are those of the machine,
everything else is private to the directory. They end, at once, with the process that has started them.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import uuid
from pathlib import Path
from typing import ClassVar, NoReturn

from tests.standins.s3_server import HOST, SECRET_KEY, S3Server
from tests.standins.servers.daemons import (
    STOP_SECONDS,
    Daemons,
    claimed_port,
    listens,
    missing_programs,
    serve_until_signal,
)

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool")
PACKAGES = "ceph-mon ceph-osd radosgw ceph-common"
ACCESS_KEY = "tester"
START_SECONDS = 120  # it takes 20 on an idle machine
OPEN_FILES = 16_384
DISK_BYTES = 20 << 30  # of a sparse file
POOLS = (
    ".rgw.root",
    *(f"default.rgw.{name}" for name in ("log", "control", "meta", "buckets.index", "buckets.data", "buckets.non-ec")),
)

CONFIGURATION = """
[global]
fsid = {cluster}
mon_host = [v2:127.0.0.1:{monitor}/0]
mon_initial_members = a
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_msgr1 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
ms_mon_cluster_mode = crc
ms_mon_service_mode = crc
ms_cluster_mode = crc
ms_service_mode = crc
ms_client_mode = crc
keyring = /dev/null
run_dir = {root}/run
admin_socket = {root}/run/$name.asok
log_file = {root}/log/$name.log
pid_file =
mon_data = {root}/mon.a
osd_data = {root}/osd.0
mon_cluster_log_file = {root}/log/cluster.log
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_data_avail_crit = 1
mon_data_avail_warn = 1
auth_allow_insecure_global_id_reclaim = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
bluestore_block_size = {disk}
osd_memory_target = 1073741824
osd_op_num_shards = 2
osd_class_update_on_start = false
osd_client_watch_timeout = 5
debug_ms = 0
debug_rgw = 0
debug_osd = 0
rgw_frontends = beast {frontend} tcp_nodelay=1
rgw_thread_pool_size = 64
rgw_enable_usage_log = false
rgw_enable_ops_log = false
rgw_data = {root}/run
"""


class Ceph(S3Server):
    """A running Ceph cluster of the smallest kind, and its S3 gateway."""

    name = "ceph"
    module = "tests.standins.servers.ceph"
    access_key = ACCESS_KEY
    start_seconds = START_SECONDS
    stop_seconds = 3 * STOP_SECONDS + 1
    lacks: ClassVar = {
        "strict tags": "its limits of tags were not compared with Amazon's",
        "regions": "it takes signatures for any region",
        "tags of copies": "it drops the tags that a copy is to have",
        "conditional copies": "it takes no notice of x-amz-copy-source-if-match",
    }

    @classmethod
    def version(cls) -> str:
        """The gateway's own words."""
        said = subprocess.run(["radosgw", "--version"], capture_output=True, text=True, check=True).stdout
        return f"Ceph RGW {said.split()[2]}"

    @classmethod
    def missing(cls) -> str:
        """What to do when programs are not installed; empty if all are."""
        return missing_programs(PROGRAMS, PACKAGES)


########################################################################
# The process that starts the three daemons
########################################################################


class Cluster:
    """The cluster of one directory."""

    def __init__(self, root: Path, port: int, certificate: str) -> None:
        self._root, self._port, self._certificate = root, port, certificate
        self._configuration = root / "ceph.conf"
        self._is_new = not self._configuration.exists()

    def start(self, daemons: Daemons) -> str:
        """Start one daemon after the other, each when the one before it serves; the gateway's address."""
        if self._is_new:
            self._make_monitor()
        daemons.spawn(*self._command("ceph-mon", "-i", "a", "-f"))
        daemons.wait_for("the monitor", lambda: "mons at" in self._ask("mon stat"), seconds=START_SECONDS)
        if self._is_new:
            self._make_osd()
        daemons.spawn(*self._command("ceph-osd", "-i", "0", "-f"))
        daemons.wait_for("the OSD", lambda: "1 up" in self._ask("osd stat"), seconds=START_SECONDS)
        if self._is_new:
            self._make_pools_and_user()
        daemons.spawn(*self._command("radosgw", "-n", "client.rgw.a", "-f"))
        daemons.wait_for("the gateway", lambda: listens(self._port), seconds=START_SECONDS)
        return f"{'https' if self._certificate else 'http'}://{HOST}:{self._port}"

    def _command(self, *command: str) -> list[str]:
        return [command[0], "-c", str(self._configuration), *command[1:]]

    def _run(self, *command: str, stdin: str = "") -> str:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, check=False, timeout=START_SECONDS, cwd=self._root
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def _ask(self, *questions: str) -> str:
        """What the monitor answers; one process for all questions, because each takes a second to start."""
        return self._run(*self._command("ceph"), stdin="".join(f"{question}\n" for question in questions))

    def _make_monitor(self) -> None:
        cluster, monitor = str(uuid.uuid4()), claimed_port(0)
        for name in ("run", "mon.a", "osd.0"):
            (self._root / name).mkdir(parents=True)
        frontend = f"endpoint={HOST}:{self._port}"
        if self._certificate:
            frontend = f"ssl_{frontend} ssl_certificate={self._certificate} ssl_private_key={self._certificate}"
        text = CONFIGURATION.format(
            root=self._root, cluster=cluster, monitor=monitor, disk=DISK_BYTES, frontend=frontend
        )
        self._configuration.write_text(text)
        address = f"[v2:{HOST}:{monitor}/0]"
        self._run("monmaptool", "--create", "--fsid", cluster, "--addv", "a", address, "monmap")
        self._run(*self._command("ceph-mon", "--mkfs", "-i", "a", "--monmap", "monmap", "--keyring", "/dev/null"))

    def _make_osd(self) -> None:
        identity = str(uuid.uuid4())
        self._ask(f"osd new {identity}")
        self._run(*self._command("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", identity))
        self._ask("osd crush add osd.0 1.0 host=localhost root=default", "osd set noscrub", "osd set nodeep-scrub")

    def _make_pools_and_user(self) -> None:
        # A gateway that has to make its pools itself hangs on the first PUT.
        self._ask(*(f"osd pool create {name} 8 8" for name in POOLS))
        self._ask(*(f"osd pool application enable {name} rgw" for name in POOLS))
        user = ("--uid=tester", "--display-name=tester", f"--access-key={ACCESS_KEY}", f"--secret={SECRET_KEY}")
        self._run(*self._command("radosgw-admin", "user", "create", *user))


def main(arguments: list[str]) -> NoReturn:
    """Serve the directory that the command line names, until a signal comes."""
    root, port, certificate = (*arguments, *("", "0", "")[len(arguments) :])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(OPEN_FILES, most), most))
    directory = Path(root).resolve()
    cluster = Cluster(directory, claimed_port(int(port)), certificate)
    serve_until_signal(cluster.start, directory / "log")


if __name__ == "__main__":
    main(sys.argv[1:])
