"""Prints the machines of a cluster that still run on AWS; launch/down.sh ends with this.

Usage: python launch/still_there.py CLUSTER.yaml      (exit code 1 if there are any)

Only the region of the cluster file is searched.
"""

import sys
from pathlib import Path

import yaml

GONE = ("shutting-down", "terminated")


def main() -> None:
    """Print the ids of machines that are not ending, and exit with code 1 if there are any."""
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    if config["provider"]["type"] != "aws":
        return
    import boto3

    region = config["provider"]["region"]
    cluster = config["cluster_name"]
    ec2 = boto3.client("ec2", region_name=region)
    of_cluster = [{"Name": "tag:ray-cluster-name", "Values": [cluster]}]
    states = {}
    for page in ec2.get_paginator("describe_instances").paginate(Filters=of_cluster):
        for reservation in page["Reservations"]:
            for machine in reservation["Instances"]:
                states[machine["InstanceId"]] = machine["State"]["Name"]

    left = {machine: state for machine, state in states.items() if state not in GONE}
    if left:
        print(f"error: {len(left)} machines are left in {region}: {left}", file=sys.stderr)
        command = f"aws ec2 terminate-instances --region {region} --instance-ids {' '.join(left)}"
        print(f"  end them: {command}")
        sys.exit(1)
    print(f"== no machine of {cluster} is left in {region}; file systems and buckets are")


if __name__ == "__main__":
    main()
