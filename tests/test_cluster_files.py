"""The cluster files as Ray will read them, and what the launch scripts say before anything costs time or money."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from object_store import object_store

ROOT = Path(__file__).resolve().parent.parent
AWS, ON_PREMISE = ROOT / "cluster.yaml", ROOT / "launch" / "cluster_onprem.yaml"
FILES = pytest.mark.parametrize("path", [AWS, ON_PREMISE], ids=lambda path: path.stem)
SCRIPTS = sorted(path for path in [*(ROOT / "launch").glob("*.sh"), ROOT / "launch" / "slurm.sbatch"])


def prepared(path: Path) -> dict[str, Any]:
    """A cluster file after Ray's own preparation, validated by Ray's own schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    return config


@FILES
def test_ray_accepts_the_file(path: Path) -> None:
    config = prepared(path)
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert any("--autoscaling-config=~/ray_bootstrap_config.yaml" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])


@FILES
def test_the_file_carries_all_that_an_installation_needs(path: Path) -> None:
    mounts = prepared(path)["file_mounts"]
    assert all(remote == f"~/qpruner/{local}" and (ROOT / local).exists() for remote, local in mounts.items())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {"pyproject.toml", "qpruner", "launch", "tune_configs", project["readme"], *project["license-files"]}
    assert set(mounts.values()) == needed


@FILES
def test_no_command_begins_with_a_parenthesis(path: Path) -> None:
    """Ray's launcher puts each in parentheses of its own, and the shell takes two of them for arithmetic."""
    commands = [each for key, value in prepared(path).items() if key.endswith("_commands") for each in value]
    assert commands and not [each for each in commands if each.lstrip().startswith("(")]


@FILES
def test_the_head_settles_versions_and_token_and_both_travel(path: Path) -> None:
    config = prepared(path)
    head, worker = " ; ".join(config["head_setup_commands"]), " ; ".join(config["worker_setup_commands"])
    versions, token = config["cluster_synced_files"]
    assert f"> {versions}" in head
    assert f"PIP_CONSTRAINT={versions} bash ~/qpruner/launch/setup.sh cluster" in worker
    assert "umask 077 && ray get-auth-token --generate" in head, "readable by its owner alone from its first moment"
    assert token == "~/.ray/auth_token" and "get-auth-token" not in worker
    assert "RAY_AUTH_MODE=token" in (ROOT / "launch" / "node_env.sh").read_text()
    assert "source ~/qpruner/launch/node_env.sh" in head and "source ~/qpruner/launch/node_env.sh" in worker


def test_a_token_becomes_its_owners_alone(tmp_path: Path) -> None:
    """As Ray leaves it where somebody called `ray.init()` before; the head goes on with it."""
    files = [yaml.safe_load(path.read_text()) for path in (AWS, ON_PREMISE)]
    [command] = {each for file in files for each in file["head_setup_commands"] if "get-auth-token" in each}
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("a" * 64)
    token.chmod(0o644)
    environment = {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", f"({command})"], env=environment, check=True)  # as Ray calls it
    assert (token.read_text(), f"{token.stat().st_mode & 0o777:o}") == ("a" * 64, "600")


def test_keys_lie_in_a_file_of_their_own_that_git_never_takes(tmp_path: Path) -> None:
    """Every shell of a machine has what `launch/node_secrets.sh` says, where there is one."""
    installed = tmp_path / "qpruner" / "launch"
    shutil.copytree(ROOT / "launch", installed)
    ask = ["bash", "-euc", 'source ~/qpruner/launch/node_env.sh; echo "$RAY_AUTH_MODE ${MY_KEY:-none}"']
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    assert subprocess.check_output(ask, env=environment, text=True) == "token none\n"
    (installed / "node_secrets.sh").write_text("export MY_KEY=secret\n")
    assert subprocess.check_output(ask, env=environment, text=True) == "token secret\n"
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    subprocess.run(["git", "check-ignore", "--quiet", "launch/node_secrets.sh"], cwd=ROOT, check=True)


def test_aws_workers_come_on_demand_and_go_when_idle() -> None:
    config = prepared(AWS)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0} and head["max_workers"] == 0
    assert all(kind["min_workers"] == 0 < kind["max_workers"] <= config["max_workers"] for kind in types.values())
    assert all(kind["resources"]["GPU"] == 1 for kind in types.values())
    markets = [kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") for kind in types.values()]
    assert markets == [None, "spot"]
    assert 0 < config["idle_timeout_minutes"] <= 30
    assert config["provider"]["cache_stopped_nodes"] is False


def test_aws_workers_are_not_given_the_heads_role() -> None:
    config = prepared(AWS)
    types = config["available_node_types"]
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in types.items()}
    head = profiles.pop(config["head_node_type"])
    assert head not in profiles.values() and len(set(profiles.values())) == 1


def ec2_complaints(node_config: dict[str, Any]) -> str:
    """What the AWS client itself would say to launching such a machine, offline."""
    pytest.importorskip("botocore", reason="needs boto3: pip install 'qpruner[cluster]'")
    from botocore.session import get_session
    from botocore.validate import ParamValidator

    given = {key: value for key, value in node_config.items() if key != "SubnetIds"}  # Ray's key: it picks one of them
    run_instances = get_session().get_service_model("ec2").operation_model("RunInstances")
    report = ParamValidator().validate({**given, "MinCount": 1, "MaxCount": 1}, run_instances.input_shape)
    return str(report.generate_report())


def test_aws_node_configs_are_what_ec2_takes() -> None:
    for kind in prepared(AWS)["available_node_types"].values():
        assert ec2_complaints(kind["node_config"]) == ""
    assert "InstanceTyp" in ec2_complaints({"InstanceTyp": "g6e.2xlarge"})


def check(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """launch/check_cluster.py, with no credentials but those given."""
    base = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    return subprocess.run(
        [sys.executable, "launch/check_cluster.py", str(path)],
        cwd=ROOT,
        env=base | {"AWS_EC2_METADATA_DISABLED": "true"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def filled(path: Path, folder: Path, **values: str) -> Path:
    """A cluster file with its placeholders replaced."""
    text = path.read_text()
    for placeholder, value in values.items():
        assert f"{placeholder}-REPLACE" in text
        text = text.replace(f"{placeholder}-REPLACE", value)
    written = folder / path.name
    written.write_text(text)
    return written


@pytest.fixture
def with_programs(tmp_path: Path) -> dict[str, str]:
    """A PATH that ends in what `ray up` calls, where this machine lacks it; what stands in for it is not called."""
    for name in ("ssh", "rsync"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\nexit 9\n")
        program.chmod(0o755)
    return {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:{tmp_path / 'bin'}"}


def filled_aws(folder: Path) -> Path:
    return filled(AWS, folder, ami="ami-0abc", subnet="subnet-0abc", sg="sg-0abc", head="mine", worker="theirs")


def filled_on_premise(folder: Path, head: str = "127.0.0.1", key: str = "") -> Path:
    """Of this machine, with a key that opens nothing."""
    own = folder / "key"
    if not own.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", own], check=True)
    path = filled(ON_PREMISE, folder, HEAD=head, WORKER="127.0.0.2", USER="nobody")
    path.write_text(path.read_text().replace("~/.ssh/id_ed25519", key or str(own)))
    return path


@FILES
def test_an_unedited_file_is_named_line_by_line(path: Path) -> None:
    done = check(path)
    assert done.returncode == 2
    places = [number for number, line in enumerate(path.read_text().splitlines(), 1) if "-REPLACE" in line]
    assert places
    assert all(f"{path}:{number}: replace " in done.stderr for number in places)


def test_a_name_that_aws_cannot_have_given_is_told(tmp_path: Path, with_programs: dict[str, str]) -> None:
    """What the AWS CLI prints for what it did not find, put where the name belongs."""
    path = filled(AWS, tmp_path, ami="None", subnet="None", sg="sg-0abc", head="mine", worker="theirs")
    path.write_text(path.read_text().replace("[sg-0abc]", "[]"))
    done = check(path, **with_programs)
    assert done.returncode == 2
    said = done.stderr.splitlines()
    assert len(said) == 3, "once for all types of machines"
    for key, begins, got in (
        ("ImageId", "ami-", "'None'"),
        ("SubnetIds", "subnet-", "'None'"),
        ("SecurityGroupIds", "sg-", "None"),
    ):
        (line,) = [line for line in said if f"node_config.{key}` must be {begins} and hexadecimal digits" in line]
        assert f"got {got}: see what step 1 of docs/cluster.md printed" in line
    assert "credentials" not in done.stderr, "told before anybody is asked"


def test_without_aws_credentials_it_says_so(tmp_path: Path, with_programs: dict[str, str]) -> None:
    pytest.importorskip("boto3", reason="needs boto3: pip install 'qpruner[cluster]'")
    done = check(filled_aws(tmp_path), HOME=str(tmp_path), **with_programs)
    assert done.returncode == 2
    assert "no AWS credentials were found" in done.stderr


def test_machines_left_at_aws_are_named(tmp_path: Path) -> None:
    pytest.importorskip("moto", reason="needs moto: pip install 'qpruner[dev]'")
    import boto3

    path = filled_aws(tmp_path)
    region = yaml.safe_load(path.read_text())["provider"]["region"]
    with object_store() as store:
        elsewhere = store.environment | {"AWS_DEFAULT_REGION": "eu-north-1"}
        keys = {name.lower(): value for name, value in elsewhere.items() if "KEY" in name}
        ec2 = boto3.client("ec2", region_name=region, endpoint_url=elsewhere["AWS_ENDPOINT_URL"], **keys)
        tags = [{"ResourceType": "instance", "Tags": [{"Key": "ray-cluster-name", "Value": "qpruner"}]}]
        images = ec2.describe_images(Owners=["amazon"])["Images"]
        started = ec2.run_instances(ImageId=images[0]["ImageId"], MinCount=2, MaxCount=2, TagSpecifications=tags)
        ids = [each["InstanceId"] for each in started["Instances"]]
        ec2.stop_instances(InstanceIds=ids[:1])

        def ask() -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "launch/still_there.py", str(path)]
            return subprocess.run(command, cwd=ROOT, env=os.environ | elsewhere, capture_output=True, text=True)

        done = ask()
        assert done.returncode == 1 and "2 machines are left in us-west-2" in done.stderr, done.stderr
        assert all(each in done.stdout for each in ids), "the command that ends them"
        ec2.terminate_instances(InstanceIds=ids)
        done = ask()
        assert done.returncode == 0 and "no machine of qpruner is left in us-west-2" in done.stdout, done.stderr


@FILES
def test_a_machine_without_ssh_is_refused(path: Path, tmp_path: Path) -> None:
    known = {"HEAD": "10.0.0.1", "WORKER": "10.0.0.2", "USER": "nobody"}
    file = filled_aws(tmp_path) if path == AWS else filled(ON_PREMISE, tmp_path, **known)
    file.write_text(file.read_text().replace("~/.ssh/id_ed25519", str(file)))
    done = check(file, PATH="/nowhere")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {program} is not installed on this machine: `ray up` needs it" for program in ("ssh", "rsync")
    ]


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    path = filled_aws(tmp_path)
    path.write_text(path.read_text().replace("idle_timeout_minutes", "idle_timeout_minuts"))
    done = check(path)
    assert done.returncode == 2
    assert "idle_timeout_minuts" in done.stderr


needs_ssh = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs ssh")


@needs_ssh
def test_a_host_without_ssh_is_named_before_ray_starts(tmp_path: Path, with_programs: dict[str, str]) -> None:
    # Whether this machine has no sshd or one that refuses the key: Ray would try for 15 minutes.
    path = filled_on_premise(tmp_path)
    environment = {**os.environ, **with_programs}
    done = subprocess.run(
        ["bash", "launch/up.sh", str(path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "nobody@127.0.0.1 cannot be reached over ssh" in done.stderr
    assert "ray up" not in done.stdout


@needs_ssh
def test_a_missing_key_and_a_head_among_workers_are_named(tmp_path: Path, with_programs: dict[str, str]) -> None:
    done = check(filled_on_premise(tmp_path, key="~/.ssh/not-there"))
    assert "`auth.ssh_private_key`: there is no ~/.ssh/not-there" in done.stderr
    done = check(filled_on_premise(tmp_path, head="127.0.0.2"), **with_programs)
    assert "`provider.worker_ips` has the head, 127.0.0.2" in done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean_and_say_how_they_are_used(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    if shellcheck := shutil.which("shellcheck"):
        done = subprocess.run([shellcheck, "-x", "-P", "SCRIPTDIR", path], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    if path.name not in ("node_env.sh", "ray_commands.sh"):
        assert "# Usage" in path.read_text()


@pytest.mark.parametrize("name", ["up.sh", "submit.sh", "watch.sh", "fetch.sh", "down.sh"])
def test_a_script_that_lacks_arguments_says_which_it_takes(name: str) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", f"launch/{name}"], cwd=ROOT, env={"PATH": path}, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 2
    assert f"usage: bash launch/{name} " in done.stderr


def test_results_in_googles_storage_are_fetched_by_its_own_tool(tmp_path: Path) -> None:
    """Not taken for a folder on the head."""
    command = ["bash", "launch/fetch.sh", "cluster.yaml", "gs://mine/run", str(tmp_path / "here")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and not (tmp_path / "here").exists()
    assert f"gcloud storage rsync -r gs://mine/run {tmp_path / 'here'}" in done.stderr


HEAD = """
import sys
from ray.cluster_utils import Cluster
options = {"num_cpus": 1, "include_dashboard": False, "ray_client_server_port": 10001}
cluster = Cluster(initialize_head=True, head_node_args=options)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
CALLER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print("let in with", ray.get(ray.remote(lambda: 42).remote()))
"""
RIGHT, WRONG, NONE = (
    {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "right" * 13},
    {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong" * 13},
    {"RAY_AUTH_MODE": "disabled"},
)


NAMESPACE = """
set -e
ip link set lo up
ip link add here type veth peer name nowhere
ip addr add 192.0.2.1/24 dev here
ip link set here up
ip link set nowhere up
ip route add default dev here
exec "$@"
"""
"""Without an address besides loopback's, Ray's client server takes nobody (2.60)."""


@pytest.fixture(scope="module")
def guarded() -> Iterator[tuple[str, list[str]]]:
    """The address of a cluster that asks for a token, and what calls a command where it answers.

    That is a network namespace that leads nowhere: on the machine's own network Ray would listen to all.
    """
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("a network namespace needs root, unshare, nsenter and ip")
    head = subprocess.Popen(
        ["unshare", "--net", "bash", "-c", NAMESPACE, "-", sys.executable, "-c", HEAD],
        env=os.environ | RIGHT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert head.stdin and head.stdout
    try:
        yield head.stdout.readline().strip(), ["nsenter", f"--net=/proc/{head.pid}/ns/net"]
    finally:
        head.stdin.close()  # it shuts down; its raylet and control store die with it in any case
        head.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "refusal"),
    [
        pytest.param("{}", "uthentication", id="driver"),
        # The client's own calls are refused, too, but it says no more than that it found nobody.
        pytest.param("ray://127.0.0.1:10001", "ConnectionError", id="client"),
    ],
)
def test_a_caller_without_the_token_is_refused(way: str, refusal: str, guarded: tuple[str, list[str]]) -> None:
    """Whether it joins the cluster or calls Ray's client server, which every head has; with the token both let in."""
    address, there = way.format(guarded[0]), guarded[1]
    callers = [
        subprocess.Popen(
            [*there, sys.executable, "-c", CALLER, address],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in (RIGHT, WRONG, NONE)  # together: Ray tries for 20 s before it gives up
    ]
    let_in, wrong, without = (caller.communicate(timeout=120)[0] for caller in callers)
    assert "let in with 42" in let_in
    assert "let in" not in wrong + without
    assert refusal in wrong and refusal in without
    assert [caller.returncode for caller in callers] == [0, 1, 1]
