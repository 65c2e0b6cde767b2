"""The cluster files as Ray reads them, and the checks of the launch scripts before `ray up`."""

import getpass
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Raw, run_program
from object_store import object_store

AWS = ROOT / "cluster.yaml"
ON_PREMISE = ROOT / "launch" / "cluster_onprem.yaml"
FILES = pytest.mark.parametrize("path", [AWS, ON_PREMISE], ids=lambda path: path.stem)
SCRIPTS = sorted(
    path for path in [*(ROOT / "launch").glob("*.sh"), ROOT / "launch" / "slurm.sbatch"]
)
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def prepared(path: Path) -> Raw:
    """Prepare and validate a cluster file with the functions of Ray."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: Raw = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    return config


@FILES
def test_ray_accepts_the_file_and_mounts_the_package(path: Path) -> None:
    config = prepared(path)
    mounts = prepared(path)["file_mounts"]
    assert all(
        remote == f"~/qpruner/{local}" and (ROOT / local).exists()
        for remote, local in mounts.items()
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {
        "pyproject.toml",
        "qpruner",
        "launch",
        "tune_configs",
        project["readme"],
        *project["license-files"],
    }
    assert set(mounts.values()) == needed
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    # Ray puts each command in parentheses, and a shell takes double parentheses for arithmetic.
    commands = [
        each for key, value in config.items() if key.endswith("_commands") for each in value
    ]
    assert commands
    assert not [each for each in commands if each.lstrip().startswith("(")]


def test_both_cluster_files_set_machines_up_alike() -> None:
    """So a real `ray up` of one file (tests/cluster) shows that versions and token reach the
    workers."""
    aws = prepared(AWS)
    own = prepared(ON_PREMISE)
    for key in ("file_mounts", "rsync_exclude", "cluster_synced_files"):
        assert aws[key] == own[key]
    assert aws["worker_setup_commands"][-1] == own["worker_setup_commands"][-1]
    assert aws["head_setup_commands"][-3:] == own["head_setup_commands"][-3:]


def test_a_token_becomes_readable_for_its_owner_only(tmp_path: Path) -> None:
    """An earlier `ray.init()` may have left a readable token; the head keeps its value."""
    [command] = [
        each
        for each in yaml.safe_load(AWS.read_text())["head_setup_commands"]
        if "get-auth-token" in each
    ]
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("a" * 64)
    token.chmod(0o644)
    # as Ray does
    run_program("bash", "-c", f"({command})", environment={"HOME": str(tmp_path), "PATH": PATH})
    assert token.read_text() == "a" * 64
    assert f"{token.stat().st_mode & 0o777:o}" == "600"


def test_keys_are_in_a_file_that_git_ignores(tmp_path: Path) -> None:
    """Every shell of a machine reads `launch/node_secrets.sh` if it exists."""
    installed = tmp_path / "qpruner" / "launch"
    shutil.copytree(ROOT / "launch", installed)
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    script = 'source ~/qpruner/launch/node_env.sh; echo "$RAY_AUTH_MODE ${MY_KEY:-none}"'
    ask = partial(run_program, "bash", "-euc", script, environment=environment)
    assert ask().stdout == "token none\n"
    (installed / "node_secrets.sh").write_text("export MY_KEY=secret\n")
    assert ask().stdout == "token secret\n"
    if (ROOT / ".git").exists():
        run_program("git", "check-ignore", "--quiet", "launch/node_secrets.sh", folder=ROOT)


def ec2_complaints(node_config: Raw) -> str:
    """Check the settings of a machine with the AWS client offline, and return its complaints."""
    from botocore.session import get_session
    from botocore.validate import ParamValidator

    # a key of Ray, not of AWS
    given = {key: value for key, value in node_config.items() if key != "SubnetIds"}
    run_instances = get_session().get_service_model("ec2").operation_model("RunInstances")
    report = ParamValidator().validate(
        {**given, "MinCount": 1, "MaxCount": 1}, run_instances.input_shape
    )
    return str(report.generate_report())


def test_aws_machines_start_on_demand_and_end_when_idle() -> None:
    pytest.importorskip("botocore", reason="needs boto3: pip install 'qpruner[cluster]'")
    config = prepared(AWS)
    assert 0 < config["idle_timeout_minutes"] <= 30
    assert config["provider"]["cache_stopped_nodes"] is False
    for name, kind in config["available_node_types"].items():
        assert kind["min_workers"] == 0
        assert (kind["max_workers"] > 0) == (name != config["head_node_type"])
        assert ec2_complaints(kind["node_config"]) == ""
    assert "InstanceTyp" in ec2_complaints({"InstanceTyp": "g6e.2xlarge"})


# ---- checks before `ray up`


def check(
    path: Path, script: str = "check_cluster.py", code: int | None = 2, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script on a cluster file, without the AWS credentials of this machine."""
    base = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    base["AWS_EC2_METADATA_DISABLED"] = "true"
    program = "bash" if script.endswith(".sh") else sys.executable
    return run_program(
        program, f"launch/{script}", path, code=code, folder=ROOT, environment=base | environment
    )


def filled(path: Path, folder: Path, **changes: str) -> Path:
    """Write a cluster file with its placeholders replaced.

    Also write a key that gives access to nothing.
    """
    values = {
        AWS: {
            "NAME": "tested",
            "ami": "ami-0abc",
            "subnet": "subnet-0abc",
            "sg": "sg-0abc",
            "head": "mine",
            "worker": "theirs",
        },
        ON_PREMISE: {"HEAD": "127.0.0.1", "WORKER": "127.0.0.2", "USER": "nobody"},
    }
    text = path.read_text()
    for placeholder, value in ({"NAME": "tested"} | values[path] | changes).items():
        assert f"{placeholder}-REPLACE" in text
        text = text.replace(f"{placeholder}-REPLACE", value)
    key = folder / "key"
    written = folder / path.name
    if path == ON_PREMISE and shutil.which("ssh-keygen") and not key.exists():
        run_program("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    key.touch()
    written.write_text(text.replace("~/.ssh/id_ed25519", str(key)))
    return written


@pytest.fixture
def with_programs(tmp_path: Path) -> dict[str, str]:
    """A PATH with stand-ins for ssh and rsync, used only if this machine lacks them; no test calls
    them."""
    for name in ("ssh", "rsync"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\nexit 9\n")
        program.chmod(0o755)
    return {"PATH": f"{PATH}:{tmp_path / 'bin'}"}


@FILES
def test_an_unedited_file_is_named_line_by_line(path: Path) -> None:
    done = check(path)
    places = [
        number for number, line in enumerate(path.read_text().splitlines(), 1) if "-REPLACE" in line
    ]
    assert places
    assert all(f"{path}:{number}: replace " in done.stderr for number in places)


@FILES
def test_a_machine_without_ssh_is_refused(path: Path, tmp_path: Path) -> None:
    done = check(filled(path, tmp_path), PATH="/nowhere")
    assert done.stderr.splitlines() == [
        f"error: {program} is not installed on this machine: `ray up` needs it"
        for program in ("ssh", "rsync")
    ]


MISTAKES = [
    pytest.param(
        AWS, "idle_timeout_minutes", "idle_timeout_minuts", "idle_timeout_minuts", id="unknown-key"
    ),
    pytest.param(AWS, "", "", "no AWS credentials were found", id="credentials"),
    pytest.param(
        ON_PREMISE, "/key", "/not-there", "`auth.ssh_private_key`: there is no ", id="key"
    ),
    pytest.param(
        ON_PREMISE,
        "[127.0.0.2]",
        "[127.0.0.1]",
        "`provider.worker_ips` has the head, 127.0.0.1",
        id="head-as-worker",
    ),
    # No sshd here, or one that refuses the key; Ray would try for 15 minutes.
    pytest.param(ON_PREMISE, "", "", "nobody@127.0.0.1 cannot be reached over ssh", id="host"),
]


@pytest.mark.parametrize(("path", "right", "wrong", "message"), MISTAKES)
def test_a_mistake_is_named_before_ray_starts(
    path: Path, right: str, wrong: str, message: str, tmp_path: Path, with_programs: dict[str, str]
) -> None:
    pytest.importorskip("boto3", reason="needs boto3: pip install 'qpruner[cluster]'")
    file = filled(path, tmp_path)
    file.write_text(file.read_text().replace(right, wrong) if right else file.read_text())
    done = check(file, "up.sh", HOME=str(tmp_path), **with_programs)
    assert message in done.stderr
    assert "ray up" not in done.stdout


def test_an_impossible_aws_id_is_reported(tmp_path: Path, with_programs: dict[str, str]) -> None:
    """The AWS CLI prints `None` for missing things, and users copy that into the file."""
    path = filled(AWS, tmp_path, ami="None", subnet="None")
    path.write_text(path.read_text().replace("[sg-0abc]", "[]"))
    told = re.findall(
        r"node_config\.(\w+)` must be (\S+) and .* got (\S+): see .*docs/cluster.md",
        check(path, **with_programs).stderr,
    )
    # Each is named once for all types of machines.
    assert sorted(told) == [
        ("ImageId", "ami-", "'None'"),
        ("SecurityGroupIds", "sg-", "None"),
        ("SubnetIds", "subnet-", "'None'"),
    ]


def test_remaining_aws_machines_are_named(tmp_path: Path) -> None:
    pytest.importorskip("moto", reason="needs moto: pip install 'qpruner[dev]'")
    path = filled(AWS, tmp_path)
    with object_store() as store:
        ask = partial(
            check,
            path,
            "still_there.py",
            **store.environment | {"AWS_DEFAULT_REGION": "eu-north-1"},
        )
        ec2 = store.client("ec2", "us-west-2")
        tags = [
            {"ResourceType": "instance", "Tags": [{"Key": "ray-cluster-name", "Value": "tested"}]}
        ]
        image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        started = ec2.run_instances(ImageId=image, MinCount=2, MaxCount=2, TagSpecifications=tags)
        ids = [each["InstanceId"] for each in started["Instances"]]
        ec2.stop_instances(InstanceIds=ids[:1])
        done = ask(code=1)
        assert "2 machines are left in us-west-2" in done.stderr
        # The command that ends them names each.
        assert all(each in done.stdout for each in ids)
        ec2.terminate_instances(InstanceIds=ids)
        assert "no machine of tested is left in us-west-2" in ask(code=0).stdout


# ---- the scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_and_explain_their_usage(path: Path) -> None:
    run_program("bash", "-n", path)
    if shellcheck := shutil.which("shellcheck"):
        run_program(shellcheck, "-x", "-P", "SCRIPTDIR", path, folder=ROOT)
    if path.name not in ("node_env.sh", "ray_commands.sh"):
        assert "# Usage" in path.read_text()
    if path.name in ("up.sh", "submit.sh", "watch.sh", "fetch.sh", "down.sh"):
        done = run_program("bash", path, code=2, environment={"PATH": PATH})
        assert f"launch/{path.name} " in done.stderr


@FILES
def test_a_cluster_is_named_for_its_user_and_folder(path: Path, tmp_path: Path) -> None:
    """Under one name two colleagues in one account would share a cluster, and one take down that of
    the other."""
    names = []
    for mine in (tmp_path / path.name, tmp_path / f"another-{path.name}"):
        mine.write_text(path.read_text())
        done = check(mine, "up.sh", code=None)
        [name] = re.findall(r"^cluster_name: (.+)$", mine.read_text(), re.MULTILINE)
        assert f"== named the cluster {name}, in {mine}" in done.stdout
        assert "NAME-REPLACE" not in done.stderr
        names.append(name)
    begin = re.sub(r"[^A-Za-z0-9-]", "-", f"qpruner-{getpass.getuser()}-{ROOT.name}")[:50]
    assert all(re.fullmatch(rf"{begin}-[0-9a-f]{{6}}", name) for name in names)
    # Both users may be `ubuntu`, with a folder of the same name.
    assert len({*names}) == 2
    # A name stays.
    assert "named the cluster" not in check(mine, "up.sh", code=None).stdout
    if path == AWS:  # without credentials, Ray ends at once
        assert f"== takes down {name}: " in check(mine, "down.sh", code=None).stdout


def test_results_in_google_storage_are_fetched_by_gcloud(tmp_path: Path) -> None:
    """The URI is not taken for a folder on the head."""
    command = ("bash", "launch/fetch.sh", "cluster.yaml", "gs://mine/run", tmp_path / "here")
    done = run_program(*command, code=1, folder=ROOT)
    assert not (tmp_path / "here").exists()
    assert f"gcloud storage rsync -r gs://mine/run {tmp_path / 'here'}" in done.stderr
