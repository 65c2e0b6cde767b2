"""Finds within seconds the problems of a cluster file that `ray up` would find after minutes.

Usage: python launch/check_cluster.py CLUSTER.yaml
    (launch/up.sh runs it first; exit code 2 if there is a problem)

Examples are missing credentials and a host that does not answer. The check starts and changes
nothing. The file itself is checked without the network, against the schema of Ray.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

Config = dict[str, Any]
"""A cluster file of Ray, or a section of it."""
SSH_SECONDS = 10
HOST_NEEDS = (
    'command -v rsync >/dev/null || echo "rsync is not installed"; '
    'python3 -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || '
    'echo "python3 is older than 3.11 or lacks venv"'
)
"""Prints the missing requirements of a host."""


def problems(path: Path) -> list[str]:
    """Return the problems of a cluster file and of what it names, one sentence for each.

    What it names are hosts, files and keys.
    """
    try:
        text = path.read_text()
        config = yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        return [f"{path} cannot be read: {error}"]
    in_file = unedited(path, text) + refused_by_ray(config)
    if in_file:
        return in_file

    checks = [missing_files, missing_programs]
    provider = config["provider"]["type"]
    if provider == "aws":
        checks += [aws_names, aws_credentials]
    elif provider == "local":
        checks.append(hosts)

    for check in checks:
        missing = check(config)
        if missing:
            return missing
    return []


def unedited(path: Path, text: str) -> list[str]:
    """Return the lines that still contain a placeholder."""
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        without_comment, _, _ = line.partition("#")
        for word in re.findall(r"[\w.-]*REPLACE", without_comment):
            lines.append(f"{path}:{number}: replace {word}; docs/cluster.md says by what")
    return lines


def refused_by_ray(config: Any) -> list[str]:
    """Return the problem that Ray finds in the file, if any."""
    import logging

    import click
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    provider = config.get("provider") if isinstance(config, dict) else None
    if not isinstance(provider, dict) or "type" not in provider:
        return ["a cluster file needs at least `cluster_name` and `provider: {type: ...}`"]
    # Ray warns that mounted files are not folders.
    logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)
    try:
        validate_config(prepare_config(config))
    except ValidationError as error:
        return [f"`{'.'.join(map(str, error.absolute_path)) or 'the file'}`: {error.message}"]
    except click.ClickException:
        return ["Ray refuses the file; its own message is above"]
    except (ValueError, RuntimeError) as error:
        return [str(error)]
    return []


def missing_files(config: Config) -> list[str]:
    """Return the files that the cluster file names and that do not exist on this machine."""
    named = {"auth.ssh_private_key": config.get("auth", {}).get("ssh_private_key")}
    for remote, local in config.get("file_mounts", {}).items():
        named[f"file_mounts.{remote}"] = local
    return [
        f"`{key}`: there is no {local} (looked from {Path.cwd()})"
        for key, local in named.items()
        if local and not Path(local).expanduser().exists()
    ]


def missing_programs(_: Config) -> list[str]:
    """Return the programs that `ray up` needs on this machine and that are not installed."""
    missing = [program for program in ("ssh", "rsync") if not shutil.which(program)]
    return [f"{program} is not installed on this machine: `ray up` needs it" for program in missing]


def aws_names(config: Config) -> list[str]:
    """Return the values that cannot name an image, a subnet or a security group.

    The AWS CLI prints None if it finds nothing.
    """
    begins = {"ImageId": "ami-", "SubnetIds": "subnet-", "SecurityGroupIds": "sg-"}
    places = {}
    for kind, settings in config["available_node_types"].items():
        machine = settings["node_config"]
        for key in begins.keys() & machine.keys():
            names = machine[key]
            if not isinstance(names, list):
                names = [names]
            for name in names or [None]:
                if not re.fullmatch(f"{begins[key]}[0-9a-f]+", str(name)):
                    # Node types share most settings, so report each value once.
                    places.setdefault((key, name), f"available_node_types.{kind}.node_config.{key}")
    return [
        f"`{place}` must be {begins[key]} and hexadecimal digits, got {name!r}: see what step 1 "
        "of docs/cluster.md printed, mend it and repeat steps 1 and 2"
        for (key, name), place in sorted(places.items(), key=str)
    ]


def aws_credentials(config: Config) -> list[str]:
    """Return the reason why AWS does not accept the credentials, if any."""
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return ["`ray up` on AWS needs boto3: bash launch/setup.sh cluster"]
    quick = Config(connect_timeout=5, read_timeout=5, retries={"max_attempts": 1})
    try:
        session = boto3.Session(region_name=config["provider"].get("region"))
        if session.get_credentials() is None:
            remedy = "run `aws configure`, or set AWS_PROFILE or AWS_ACCESS_KEY_ID and so on"
            return [f"no AWS credentials were found: {remedy}"]
        session.client("sts", config=quick).get_caller_identity()
    except (BotoCoreError, ClientError) as error:
        return [f"AWS refuses the credentials or cannot be reached: {error}"]
    return []


def hosts(config: Config) -> list[str]:
    """Return the hosts that do not answer or lack a requirement.

    Workers are reached through the head, as Ray does it.
    """
    auth = config["auth"]
    provider = config["provider"]
    workers = provider["worker_ips"]
    if provider["head_ip"] in workers:
        remedy = "leave it out; the head runs trials, too"
        return [f"`provider.worker_ips` has the head, {provider['head_ip']}: {remedy}"]

    head = provider.get("external_head_ip") or provider["head_ip"]
    problem = host_problem(auth, head)
    if problem:
        return [problem]
    with ThreadPoolExecutor(16) as pool:
        answers = pool.map(lambda worker: host_problem(auth, worker, by_way_of=head), workers)
    return [answer for answer in answers if answer]


def host_problem(auth: Config, host: str, by_way_of: str | None = None) -> str | None:
    """Return the reason why Ray cannot be installed on a host, if any."""
    done = on_host(auth, host, HOST_NEEDS, seconds=SSH_SECONDS, by_way_of=by_way_of)
    if done.returncode:
        reason = re.sub(r"\s+", " ", done.stderr).strip() or f"exit code {done.returncode}"
        way = f" by way of {by_way_of}" if by_way_of else ""
        return f"{auth['ssh_user']}@{host} cannot be reached over ssh{way}: {reason}"
    lacking = ", ".join(done.stdout.splitlines())
    return f"{host}: {lacking}" if lacking else None


def on_host(
    auth: Config, host: str, command: str, seconds: float, by_way_of: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a bash command on a host over ssh, as Ray does.

    The account and the key are those of the cluster file; host keys are not checked, and ssh asks
    no questions.
    """
    options = (
        f"-o BatchMode=yes -o ConnectTimeout={SSH_SECONDS} -o StrictHostKeyChecking=no "
        "-o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    ).split()
    key = auth.get("ssh_private_key")
    if key:
        options += ["-o", "IdentitiesOnly=yes", "-i", str(Path(key).expanduser())]

    proxy = auth.get("ssh_proxy_command")
    by_proxy = ["-o", f"ProxyCommand={proxy}"] if proxy else []
    if by_way_of:
        way = f"{auth['ssh_user']}@{by_way_of}"
        hop = shlex.join(["ssh", *options, *by_proxy, "-W", "%h:%p", way])
        by_proxy = ["-o", f"ProxyCommand={hop}"]

    target = f"{auth['ssh_user']}@{host}"
    on_target = f"bash --login -c {shlex.quote(command)}"
    limit = seconds * 2
    try:
        return subprocess.run(
            ["ssh", *options, *by_proxy, target, on_target],
            capture_output=True,
            text=True,
            timeout=limit,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        return subprocess.CompletedProcess(error.cmd, 255, "", f"no answer within {limit:g} s")


def main() -> None:
    """Print one line for each problem, and exit with code 2 if there is any."""
    if len(sys.argv) != 2:
        sys.exit("usage: check_cluster.py CLUSTER.yaml")
    lines = [f"error: {problem}" for problem in problems(Path(sys.argv[1]))]
    if lines:
        print(*lines, sep="\n", file=sys.stderr)
        sys.exit(2)
    print("the cluster file is complete, and what it names answers")


if __name__ == "__main__":
    main()
