"""A Slurm of one node on 127.0.0.1, for tests of real array jobs: the daemons of the machine, everything else private.

    with Slurm(directory) as slurm:
        subprocess.run(["sbatch", "--wait", ...], env={**os.environ, **slurm.environment})

It needs neither root nor systemd, and leaves /etc alone: munged, slurmctld and slurmd run as the user who starts it,
with a key, a socket and ports of their own. They end with the block.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tests.standins.servers.daemons import end_all

if TYPE_CHECKING:
    from typing_extensions import Self

PACKAGES = "slurmctld slurmd slurm-client munge"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo", "scancel", "squeue")
START_SECONDS = 60
REQUEUE_SECONDS = (
    5  # that a task waits which is to run again: the life of its credentials, and the least that Slurm takes
)
CPUS = 4  # so many tasks run at a time, however many CPUs there are
SBIN = "/usr/sbin:/sbin"  # where Debian has the daemons; not on everyone's PATH

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire={requeue_seconds}
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
KillWait=3
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """The programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None]


def free_ports(count: int) -> list[int]:
    """Ports on which nobody listens at the moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def parent_of(pid: int) -> int:
    """The parent of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


class Slurm:
    """The three daemons. Raises TimeoutError with their last words if they do not come up."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._host = socket.gethostname().partition(".")[0]
        self.environment = {"SLURM_CONF": str(directory / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{SBIN}"}

    def __enter__(self) -> Self:
        try:
            self._configure()
            self._start_munge()
            self._start("slurmctld", "-D")
            self._start_slurmd("idle")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.said("scancel", f"--user={getpass.getuser()}")
        self._wait_for(lambda: not self.said("squeue", "--noheader"))
        self.stop()

    def _configure(self) -> None:
        for name in ("state", "spool"):
            (self._directory / name).mkdir(parents=True)
        text = CONFIGURATION.format(
            host=self._host,
            ports=free_ports(2),
            user=getpass.getuser(),
            directory=self._directory,
            cpus=CPUS,
            requeue_seconds=REQUEUE_SECONDS,
        )
        (self._directory / "slurm.conf").write_text(text, encoding="utf-8")

    def _start_munge(self) -> None:
        key = self._directory / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        paths = {
            "key-file": key,
            **{f"{name}-file": self._directory / f"munge.{name}" for name in ("pid", "seed", "log")},
        }
        socket_path = self._directory / "munge.socket"
        # Forced: it would refuse the permissions of a directory for temporary files.
        self._start(
            "munged", "--foreground", "--force", f"--socket={socket_path}", *(f"--{k}={v}" for k, v in paths.items())
        )
        self._wait_for(socket_path.exists)

    def _start_slurmd(self, state: str) -> None:
        """Start the node's daemon, and wait until it answers and the node is in a state."""
        self._start("slurmd", "-D", "-N", self._host)
        self._wait_for_node(state)

    def _wait_for_node(self, state: str) -> None:
        self._wait_for(lambda: self.said("sinfo", "--noheader", "--responding", "--format=%T") == state)

    def kill_node(self) -> None:
        """End the node as a power cut does, and tell Slurm, as what watches over nodes would."""
        tasks = [int(line.split()[0]) for line in self.said("scontrol", "listpids").splitlines()[1:]]
        # Slurm's own process of each task is its parent.
        stepds = {parent_of(pid) for pid in tasks} - set(tasks)
        slurmd = self._daemons.pop()
        slurmd.kill()
        slurmd.wait()
        for pid in (*stepds, *tasks):
            os.kill(pid, signal.SIGKILL)
        self.said("scontrol", "update", f"NodeName={self._host}", "State=DOWN", "Reason=killed")

    def start_node(self) -> None:
        """Start the node that was killed; what was requeued runs on it."""
        # A task that is sent to a node before its daemon answers is held for ever.
        self._start_slurmd("down")
        self.said("scontrol", "update", f"NodeName={self._host}", "State=RESUME")
        self._wait_for_node("idle")

    def _start(self, *command: str) -> None:
        with (self._directory / f"{command[0]}.out").open("wb") as out:
            program = shutil.which(command[0], path=self.environment["PATH"]) or command[0]
            environment = {**os.environ, **self.environment}
            self._daemons.append(
                subprocess.Popen(
                    [program, *command[1:]], env=environment, stdout=out, stderr=out, start_new_session=True
                )
            )

    def said(self, *command: str) -> str:
        """What a command of Slurm's prints."""
        run = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, **self.environment}
        )
        return run.stdout.strip()

    def _wait_for(self, has_come: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not has_come():
            if time.monotonic() > deadline:
                logs = {path.name: path.read_text(errors="replace")[-1000:] for path in self._directory.glob("*.out")}
                raise TimeoutError(f"Slurm is not ready: {logs}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End the daemons, the last one first."""
        end_all(self._daemons)
