"""A Slurm of one node for tests: munged, slurmctld and slurmd of this machine, in a folder of their
own, on free ports.

Needs root and Debian's packages `slurm-wlm` and `munge`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.repository import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")
CONFIG = """
ClusterName=tests
SlurmctldHost={host}
SlurmctldPort={control}
SlurmdPort={daemon}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
MpiDefault=none
KillWait=20
SchedulerParameters=batch_sched_delay=0,sched_interval=2
NodeName={host} CPUs={cpus} State=UNKNOWN
PartitionName=tests Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no Slurm here; "" if there can."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (Debian: apt install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root"


PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


class SlurmNode:
    """The cluster. `submit` takes sbatch's arguments; `close` ends all daemons and jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.host = folder, socket.gethostname().partition(".")[0]
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self._stack = ExitStack()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        folder = self.folder
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        control, daemon = _free_ports(2)
        values = {
            "host": self.host,
            "control": control,
            "daemon": daemon,
            "folder": folder,
            "cpus": os.cpu_count(),
        }
        (folder / "slurm.conf").write_text(CONFIG.format(**values))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        folder.chmod(0o755)  # munged refuses a socket below a folder that others cannot enter
        files = [
            "--key-file",
            key,
            "--socket",
            folder / "munge.socket",
            "--pid-file",
            folder / "munge.pid",
        ]
        self._daemon(
            "munged",
            *files,
            "--log-file",
            folder / "munge.log",
            "--seed-file",
            folder / "munge.seed",
            "--force",
        )
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D", "-N", self.host)
        self.wait(
            lambda: "idle" in self.run("sinfo", "-h", "-o", "%t"), 60, "the node never became idle"
        )

    def _daemon(self, name: str, *args: object) -> None:
        log = (self.folder / f"{name}.out").open("w")
        self._stack.callback(log.close)
        foreground = ["--foreground"] if name == "munged" else []
        process = subprocess.Popen(
            [name, *foreground, *map(str, args)], stdout=log, stderr=log, env=self.env
        )
        self._stack.callback(_end, process)
        if name == "munged":
            self.wait((self.folder / "munge.socket").exists, 20, "munged never opened its socket")

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def submit(self, *args: str, env: Mapping[str, str] | None = None) -> str:
        """Id of the new job, run from the repository."""
        done = subprocess.run(
            ["sbatch", "--parsable", *args],
            env={**self.env, **(env or {})},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"sbatch {' '.join(args)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by key."""
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def ended(self, job: str, seconds: float) -> str:
        """Wait for the job's end, starting it at once whenever it has been requeued; returns its
        last state."""

        def over() -> bool:
            self.hasten(job)
            return self.state(job) not in (
                "PENDING",
                "RUNNING",
                "COMPLETING",
                "CONFIGURING",
                "REQUEUED",
            )

        self.wait(over, seconds, f"job {job} never ended")
        return self.state(job)

    def hasten(self, job: str) -> None:
        """Start a job at once that was requeued, for which Slurm would wait two minutes.

        Not within the second of its kill: slurmd tells a new start from the killed one by whole
        seconds, and refuses it ("already killed").
        """
        found = self.job(job)
        if found["JobState"] == "PENDING" and found["Reason"] == "BeginTime":
            time.sleep(2.5)
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def wait(self, done: object, seconds: float, problem: str) -> None:
        assert callable(done)
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                logs = "\n".join(
                    f"{p.name}: {p.read_text()[-1500:]}" for p in sorted(self.folder.glob("*.log"))
                )
                raise RuntimeError(f"{problem} within {seconds:.0f} s\n{logs}")
            time.sleep(0.3)

    def close(self) -> None:
        self._stack.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_ports(count: int) -> Sequence[int]:
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]
