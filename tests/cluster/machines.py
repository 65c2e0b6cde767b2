"""Machines on one machine: processes in their own network, process and mount namespaces, joined by a bridge.

Every machine has its own name, address, loopback, process ids, /root, /tmp, /run and /dev/shm; the rest of the file
system is shared. The first one holds the bridge and stands for the user's laptop; the others run an sshd. All of it
lives in the namespaces of child processes that die with this one, so that nothing outlasts a test, however it ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import yaml
from conftest import raw_config, with_key

ROOT = Path(__file__).resolve().parents[2]
Found = TypeVar("Found")

TOOLS = ("ip", "hostname", "nsenter", "unshare", "setpriv", "mount")
SSH = ("ssh-keygen", "rsync", "/usr/sbin/sshd")
"""What machines that are reached over ssh take besides."""
PRIVATE = ["--mount", "--net", "--pid", "--uts", "--fork", "--mount-proc", "--kill-child"]
UNSHARE = ["setpriv", "--pdeathsig", "KILL", "unshare", *PRIVATE]
NETWORK = "10.77.0"

SSHD_CONFIG = """\
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile /root/.ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
Subsystem sftp internal-sftp
"""


def skip_where_impossible(*tools: str) -> None:
    """Skip the test that asks, and say why, where machines cannot be made or more tools are missing."""
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    if missing := [tool for tool in (*TOOLS, *tools) if not shutil.which(tool)]:
        pytest.skip(f"this machine lacks {', '.join(missing)}")


def link_environment(folder: Path, constraints: bytes = b"") -> None:
    """Make `folder/.venv` what `launch/setup.sh cluster` makes there, out of the environment that runs this test.

    `constraints` is the content of the file that `PIP_CONSTRAINT` names there: a worker's `versions.txt`.
    """
    venv = folder / ".venv"
    venv.mkdir(parents=True)
    for name in ("bin", "lib"):
        (venv / name).symlink_to(Path(sys.prefix) / name)
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", venv)
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + constraints + b"cluster ").hexdigest()
    (venv / "qpruner-installed-cluster").write_text(wanted)


def small_config(path: Path, model: Path, output: Path) -> Path:
    """The tests' small search as a file: three trials, two at a time."""
    raw = raw_config(model, output)
    for key, value in {
        "search.max_trials": 3,
        "search.max_concurrent": 2,
        "search.resources_per_trial": {"cpu": 1, "gpu": 0},
        "sensitivity.methods": ["first_order"],
        "finetune.compare": False,
    }.items():
        raw = with_key(raw, key, value)
    path.write_text(yaml.safe_dump(raw))
    return path


def num_trials(run: Path) -> int:
    """Count the trials of a run that has come to its end."""
    assert (run / "report.md").exists()
    return sum(json.loads(path.read_text())["status"] != "running" for path in run.glob("trials/*/*/trial.json"))


class Machine:
    """One set of namespaces and the process that holds them; `home` is what it sees as /root.

    Its private folders go to `folder`, whose name is the machine's. It shares `visible`, folders below /tmp or /root,
    with the real machine. Its first process becomes `command`, and the machine ends with it.
    """

    def __init__(self, folder: Path, visible: Iterable[Path], command: str) -> None:
        self.home, self.log = folder / "root", folder / "log"
        temporary = folder / "tmp"
        for path in (self.home, temporary):
            path.mkdir(parents=True)
        private = {Path("/root"): self.home, Path("/tmp"): temporary}
        # Its own name must resolve: without, each look-up of Ray's waits for a name server.
        (folder / "hosts").write_text(f"127.0.0.1 localhost {folder.name}\n")
        mounts = [("--bind", folder / "hosts", Path("/etc/hosts"))]
        for path in visible:
            for mounted, own in private.items():
                if path.is_relative_to(mounted):
                    target = own / path.relative_to(mounted)
                    target.mkdir(parents=True, exist_ok=True)
                    mounts.append(("--bind", path, target))
        mounts += [("--rbind", own, mounted) for mounted, own in private.items()]
        script = [shlex.join(["mount", kind, str(one), str(other)]) for kind, one, other in mounts]
        script += ["mount -t tmpfs tmpfs /dev/shm", "mount -t tmpfs tmpfs /run", "mkdir /run/sshd", "ip link set lo up"]
        script = ["set -e", *script, f"hostname {folder.name}", f"exec {command}"]
        with self.log.open("w") as log:
            self.holder = subprocess.Popen(
                [*UNSHARE, "bash", "-c", "\n".join(script)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.first = wait_for(lambda: next(iter(psutil.Process(self.holder.pid).children()), None), "a first process")

    def run(
        self, command: list[str], environment: Mapping[str, str], folder: Path, seconds: float
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on it, with nothing but `environment`; stderr goes into stdout."""
        return subprocess.run(
            [*self.entered(folder), *command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )

    def entered(self, folder: Path) -> list[str]:
        """What makes the command that follows one on this machine."""
        return ["nsenter", f"--target={self.first.pid}", "--mount", "--net", "--pid", "--uts", f"--wd={folder}"]

    def processes(self) -> list[str]:
        """Command lines of what runs on it besides its first process and what serves ssh."""
        lines = []
        for process in self.first.children(recursive=True):
            try:
                line = " ".join(process.cmdline())
            except psutil.NoSuchProcess:
                continue
            if line and not line.startswith("sshd"):
                lines.append(line)
        return lines

    def network(self, *command: str) -> None:
        """Run `ip` in its network, but with the real machine's process ids."""
        subprocess.run(["nsenter", f"--net=/proc/{self.first.pid}/ns/net", "ip", *command], check=True)

    def end(self) -> None:
        """Everything in it dies with its first process."""
        self.holder.kill()
        self.holder.wait()
        psutil.wait_procs([self.first], timeout=10)


class Machines:
    """A laptop and hosts that it reaches over ssh with `~/.ssh/id_ed25519`."""

    def __init__(self, folder: Path, visible: Iterable[Path], num_hosts: int) -> None:
        visible = [*visible, Path(sys.prefix), Path(sys.base_prefix)]
        self.laptop = Machine(folder / "laptop", visible, "sleep infinity")
        self.hosts: list[Machine] = []
        self.addresses = [f"{NETWORK}.{number}" for number in range(1, num_hosts + 1)]
        try:
            self.laptop.network("link", "add", "bridge", "type", "bridge")
            self.laptop.network("addr", "add", f"{NETWORK}.254/24", "dev", "bridge")
            self.laptop.network("link", "set", "bridge", "up")
            keys = self.laptop.home / ".ssh"
            keys.mkdir(mode=0o700)
            new_key(keys / "id_ed25519")
            for number, address in enumerate(self.addresses):
                self.hosts.append(self._host(folder / f"host{number}", visible, address))
        except BaseException:
            self.end()
            raise

    def _host(self, folder: Path, visible: list[Path], address: str) -> Machine:
        folder.mkdir()
        new_key(folder / "host_key")
        (folder / "sshd_config").write_text(SSHD_CONFIG.format(address=address, folder=folder))
        # sshd starts once its address is there.
        up = f"until ip -brief addr show dev eth0 2>/dev/null | grep -q {address}; do sleep 0.1; done"
        host = Machine(folder, visible, f"bash -c '{up}; exec /usr/sbin/sshd -D -e -f {folder}/sshd_config'")
        (host.home / ".ssh").mkdir(mode=0o700)
        shutil.copy(self.laptop.home / ".ssh" / "id_ed25519.pub", host.home / ".ssh" / "authorized_keys")
        port = f"host{len(self.hosts)}"
        self.laptop.network("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(host.first.pid))
        self.laptop.network("link", "set", port, "master", "bridge", "up")
        host.network("addr", "add", f"{address}/24", "dev", "eth0")
        host.network("link", "set", "eth0", "up")
        wait_for(lambda: "Server listening" in host.log.read_text(), f"sshd on {address}: {host.log}")
        return host

    def end(self) -> None:
        """End all machines."""
        for machine in [*self.hosts, self.laptop]:
            machine.end()


@contextmanager
def machines(folder: Path, visible: Iterable[Path], num_hosts: int, *tools: str) -> Iterator[Machines]:
    """A laptop and hosts, gone afterwards; skips the test where they or more tools are impossible."""
    skip_where_impossible(*SSH, *tools)
    made = Machines(folder, visible, num_hosts)
    try:
        yield made
    finally:
        made.end()


def new_key(path: Path) -> None:
    """A fresh ssh key without a passphrase."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)


def wait_for(look: Callable[[], Found | None], what: str, seconds: float = 120.0) -> Found:
    """Look again and again until there is something."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not there after {seconds:g} s: {what}"
        time.sleep(0.1)
    return found
