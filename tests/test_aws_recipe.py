"""Run the AWS recipe of docs/cluster.md against a simulation of AWS (moto), with the AWS CLI and
Ray's node provider.

The simulation has roles, networks, machines and buckets, but checks no permissions and starts no
machines.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkouts import copy_checkout
from conftest import run_program
from doc_blocks import blocks
from object_store import Store, object_store

pytestmark = pytest.mark.docs

REGION = "us-west-2"
IMAGE = "Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 24.04)"
START = """
import sys, yaml
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME, TAG_RAY_USER_NODE_TYPE
config = bootstrap_aws(prepare_config(yaml.safe_load(open("cluster.yaml"))))
provider = AWSNodeProvider(config["provider"], config["cluster_name"])
for name, kind in config["available_node_types"].items():
    provider.create_node(kind["node_config"], {TAG_RAY_USER_NODE_TYPE: name}, 1)
"""
"""Program that requests a machine of each type from AWS, as `ray up` and the autoscaler do."""


@dataclass(frozen=True)
class Account:
    """An empty AWS account, a checkout, and the environment variables of a shell with the keys."""

    store: Store
    checkout: Path
    environment: dict[str, str]

    def run(self, *command: str, code: int = 0) -> str:
        """Run a command in the checkout, which must exit with this code; return its stderr."""
        done = run_program(
            *command, code=code, folder=self.checkout, environment=self.environment, minutes=3
        )
        return done.stderr

    def follow(self, *starts: str, options: tuple[str, ...] = ("-euo", "pipefail")) -> None:
        """Run blocks of docs/cluster.md in one shell, found by their first words."""
        found = [block for block in blocks() if block.page == "docs/cluster.md"]
        texts = [
            next(block.text for block in found if block.first.startswith(start)) for start in starts
        ]
        self.run("bash", *options, "-c", "\n".join(texts))


@pytest.fixture
def account(tmp_path: Path) -> Iterator[Account]:
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if not shutil.which("aws", path=tools):
        pytest.skip("needs the AWS CLI: pip install 'qpruner[dev]'")
    checkout = copy_checkout(tmp_path / "checkout")
    bin = tmp_path / "bin"
    images = tmp_path / "images.json"
    image = {
        "ami_id": "ami-0123456789abcdef0",
        "name": f"{IMAGE} 20261101",
        "creation_date": "2026-11-01T00:00:00Z",
    }
    images.write_text(json.dumps([image]))
    bin.mkdir()
    # the public address of this machine
    (bin / "curl").write_text("#!/bin/sh\necho 198.51.100.7\n")
    (bin / "curl").chmod(0o755)
    with object_store(MOTO_AMIS_PATH=str(images), MOTO_IAM_LOAD_MANAGED_POLICIES="true") as store:
        own = {"PATH": f"{bin}:{tools}", "HOME": str(tmp_path), "AWS_PAGER": ""}
        yield Account(store, checkout, os.environ | store.environment | own)


def test_the_recipe_makes_machines_and_removes_everything(account: Account, tmp_path: Path) -> None:
    ec2, iam, s3 = (account.store.client(service, REGION) for service in ("ec2", "iam", "s3"))
    before = [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]
    account.follow("export AWS_DEFAULT_REGION=us-west-2", "sed -i.bak")
    [bucket] = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]} - set(before)
    for role in ("qpruner-head", "qpruner-worker"):
        policy = iam.get_role_policy(RoleName=role, PolicyName="bucket")["PolicyDocument"]
        assert policy["Statement"][0]["Resource"] == [
            f"arn:aws:s3:::{bucket}",
            f"arn:aws:s3:::{bucket}/*",
        ]

    files = [account.checkout / name for name in ("aws_ids.sh", "cluster.yaml")]
    names, edited = (file.read_text() for file in files)
    # The AWS CLI prints None for missing things.
    assert "None" not in names
    files[1].write_text(edited.replace("ami-0123456789abcdef0", "").replace("subnet-", "None-"))
    # without -e, as in a terminal
    account.follow("export AWS_DEFAULT_REGION=us-west-2", "sed -i.bak", options=())
    # A second time gives the same files.
    assert [file.read_text() for file in files] == [names, edited]
    # launch/up.sh names the cluster before it checks the file.
    files[1].write_text(edited.replace("NAME-REPLACE", "qpruner-of-a-test"))
    if shutil.which("rsync"):  # the script needs it
        account.run(sys.executable, "launch/check_cluster.py", "cluster.yaml")
    account.run(sys.executable, "-c", START)
    machines = [
        each for group in ec2.describe_instances()["Reservations"] for each in group["Instances"]
    ]
    tags = [{tag["Key"]: tag["Value"] for tag in machine["Tags"]} for machine in machines]
    roles = {
        tag["ray-user-node-type"]: machine["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        for tag, machine in zip(tags, machines, strict=True)
    }
    assert roles == {
        "head": "qpruner-head",
        "gpu_on_demand": "qpruner-worker",
        "gpu_spot": "qpruner-worker",
    }

    # The key is Ray's.
    assert len(ec2.describe_key_pairs()["KeyPairs"]) == 1
    ec2.terminate_instances(InstanceIds=[machine["InstanceId"] for machine in machines])
    s3.put_object(Bucket=bucket, Key="runs/mine/run.json", Body=b"{}")
    account.follow("source aws_ids.sh")
    assert [each["Name"] for each in s3.list_buckets()["Buckets"]] == before
    assert iam.list_roles()["Roles"] == []
    assert iam.list_instance_profiles()["InstanceProfiles"] == []
    assert [
        each
        for each in ec2.describe_security_groups()["SecurityGroups"]
        if each["GroupName"] == "qpruner"
    ] == []
    assert ec2.describe_key_pairs()["KeyPairs"] == []
    assert not list((tmp_path / ".ssh").glob("*.pem"))


def test_results_in_a_bucket_are_fetched(account: Account, tmp_path: Path) -> None:
    expected = {
        "report.html",
        "report.md",
        "pictures/kept.png",
        "results.json",
        "records/prune.json",
    }
    expected |= {"final/adapter/weights"}
    for name in (*expected, "bank/large", "records.txt", "finals/x"):
        account.store.write(f"runs/mine/{name}", name.encode())
    run, mistyped = map(account.store.uri, ("runs/mine", "runs/mien"))
    mine = tmp_path / "mine"
    part = tmp_path / "part"
    fetch = ("bash", "launch/fetch.sh", "cluster.yaml")
    account.run(*fetch, f"{run}/", str(mine))
    assert {str(path.relative_to(mine)) for path in mine.rglob("*") if path.is_file()} == expected
    refused = account.run(*fetch, mistyped, str(mine), "report.html", "final", code=1)
    # This holds even if files were fetched before.
    assert f"not fetched: report.html final; is {mistyped} the run's folder?" in refused
    assert "not fetched: record; " in account.run(*fetch, run, str(part), "final", "record", code=1)
    assert (part / "final" / "adapter" / "weights").is_file()
    endpoint = "https://minio.example:9000"
    refused = account.run(*fetch, f"{run}?endpoint_override={endpoint}&region=here", "x", code=1)
    assert f"AWS_ENDPOINT_URL={endpoint} bash launch/fetch.sh cluster.yaml {run} x" in refused
