"""Several machines simulated on one: each is a process with its own network, process and mount
namespaces.

Every machine has its own name, address, loopback, process ids, /root, /tmp, /run and /dev/shm, and
shares the rest of the file system. A bridge connects them. One machine stands for the user's
laptop; the others run an sshd. All of them are child processes that die with this process, so
nothing remains after a test.
"""

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
from conftest import ROOT, raw_config, run_program, with_keys

Found = TypeVar("Found")

TOOLS = ("ip", "hostname", "nsenter", "unshare", "setpriv", "mount")
SSH = ("ssh-keygen", "rsync", "/usr/sbin/sshd")
"""Further tools for machines with ssh."""
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
    """Skip the calling test without root, or without the tools for machines and these further
    tools."""
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    if missing := [tool for tool in (*TOOLS, *tools) if not shutil.which(tool)]:
        pytest.skip(f"this machine lacks {', '.join(missing)}")


def link_environment(folder: Path, constraints: bytes = b"") -> None:
    """Link this test's environment to `folder/.venv`, so that `launch/setup.sh cluster` finds it
    installed.

    `constraints` is the content of the file that `PIP_CONSTRAINT` names there: `versions.txt` on a
    worker.
    """
    venv = folder / ".venv"
    venv.mkdir(parents=True)
    for name in ("bin", "lib"):
        (venv / name).symlink_to(Path(sys.prefix) / name)
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", venv)
    wanted = hashlib.sha256(
        (ROOT / "pyproject.toml").read_bytes() + constraints + b"cluster "
    ).hexdigest()
    (venv / "qpruner-installed-cluster").write_text(wanted)


def small_config(path: Path, model: Path, output: Path) -> Path:
    """Write the configuration of a small search: three trials, two at a time."""
    search = {"max_trials": 3, "max_concurrent": 2, "resources_per_trial": {"cpu": 1, "gpu": 0}}
    keys = {f"search.{key}": value for key, value in search.items()} | {
        "sensitivity.methods": ["first_order"]
    }
    raw = with_keys(raw_config(model, output), **keys, finetune__compare=False)
    path.write_text(yaml.safe_dump(raw))
    return path


def num_trials(run: Path) -> int:
    """Return the number of trials of a finished run."""
    assert (run / "report.md").exists()
    return sum(
        json.loads(path.read_text())["status"] != "running"
        for path in run.glob("trials/*/*/trial.json")
    )


class Machine:
    """One simulated machine; `home` is the folder that it sees as /root.

    `folder` gives the machine its name and holds its private folders. The folders `visible`, below
    /tmp or /root, are shared with the real machine. `command` runs as the first process, and the
    machine ends with it.
    """

    def __init__(self, folder: Path, visible: Iterable[Path], command: str) -> None:
        self.home = folder / "root"
        self.log = folder / "log"
        temporary = folder / "tmp"
        for path in (self.home, temporary):
            path.mkdir(parents=True)
        private = {Path("/root"): self.home, Path("/tmp"): temporary}
        # The machine must resolve its own name; otherwise Ray waits for a name server at each
        # look-up.
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
        script += [
            "mount -t tmpfs tmpfs /dev/shm",
            "mount -t tmpfs tmpfs /run",
            "mkdir /run/sshd",
            "ip link set lo up",
        ]
        script = ["set -e", *script, f"hostname {folder.name}", f"exec {command}"]
        with self.log.open("w") as log:
            self.holder = subprocess.Popen(
                [*UNSHARE, "bash", "-c", "\n".join(script)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.first = wait_for(
            lambda: next(iter(psutil.Process(self.holder.pid).children()), None), "a first process"
        )

    def run(
        self, command: list[str], environment: Mapping[str, str], folder: Path, seconds: float
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this machine with only `environment`; stderr is part of stdout."""
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
        """Return the words before a command that run it on this machine."""
        target = f"--target={self.first.pid}"
        return ["nsenter", target, "--mount", "--net", "--pid", "--uts", f"--wd={folder}"]

    def processes(self) -> list[str]:
        """Return the command lines of all processes except the first process and those of sshd."""
        lines = []
        for process in self.first.children(recursive=True):
            try:
                line = " ".join(process.cmdline())
            except psutil.NoSuchProcess:
                continue
            if line and not line.startswith("sshd"):
                lines.append(line)
        return lines

    def network(self, command: str) -> None:
        """Run `ip` in the network of this machine, with the process ids of the real machine."""
        run_program("nsenter", f"--net=/proc/{self.first.pid}/ns/net", "ip", *command.split())

    def end(self) -> None:
        """End the first process, and with it all others of this machine."""
        self.holder.kill()
        self.holder.wait()
        psutil.wait_procs([self.first], timeout=10)


class Machines:
    """A laptop, and hosts that it can reach over ssh with `~/.ssh/id_ed25519`."""

    def __init__(self, folder: Path, visible: Iterable[Path], num_hosts: int) -> None:
        visible = [*visible, Path(sys.prefix), Path(sys.base_prefix)]
        self.laptop = Machine(folder / "laptop", visible, "sleep infinity")
        self.hosts: list[Machine] = []
        self.addresses = [f"{NETWORK}.{number}" for number in range(1, num_hosts + 1)]
        try:
            self.laptop.network("link add bridge type bridge")
            self.laptop.network(f"addr add {NETWORK}.254/24 dev bridge")
            self.laptop.network("link set bridge up")
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
        # sshd starts when the host has its address.
        has_address = f"ip -brief addr show dev eth0 2>/dev/null | grep -q {address}"
        up = f"until {has_address}; do sleep 0.1; done"
        host = Machine(
            folder, visible, f"bash -c '{up}; exec /usr/sbin/sshd -D -e -f {folder}/sshd_config'"
        )
        (host.home / ".ssh").mkdir(mode=0o700)
        shutil.copy(
            self.laptop.home / ".ssh" / "id_ed25519.pub", host.home / ".ssh" / "authorized_keys"
        )
        port = f"host{len(self.hosts)}"
        peer = f"peer name eth0 netns {host.first.pid}"
        self.laptop.network(f"link add {port} type veth {peer}")
        self.laptop.network(f"link set {port} master bridge up")
        host.network(f"addr add {address}/24 dev eth0")
        host.network("link set eth0 up")
        wait_for(
            lambda: "Server listening" in host.log.read_text(), f"sshd on {address}: {host.log}"
        )
        return host

    def end(self) -> None:
        """End all machines."""
        for machine in [*self.hosts, self.laptop]:
            machine.end()


@contextmanager
def machines(
    folder: Path, visible: Iterable[Path], num_hosts: int, *tools: str
) -> Iterator[Machines]:
    """Start a laptop and hosts, and end them afterwards; skip where they cannot be made."""
    skip_where_impossible(*SSH, *tools)
    made = Machines(folder, visible, num_hosts)
    try:
        yield made
    finally:
        made.end()


def new_key(path: Path) -> None:
    """Make a new ssh key without a passphrase."""
    run_program("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path)


def wait_for(look: Callable[[], Found | None], what: str, seconds: float = 120.0) -> Found:
    """Call `look` until it returns something true, and return that."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"after {seconds:g} s still missing: {what}"
        time.sleep(0.1)
    return found
