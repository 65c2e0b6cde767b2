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
    provider = config["provider"]
    if provider["type"] != "aws":
        return
    import boto3

    ec2 = boto3.client("ec2", region_name=provider["region"])
    named = [{"Name": "tag:ray-cluster-name", "Values": [config["cluster_name"]]}]
    pages = ec2.get_paginator("describe_instances").paginate(Filters=named)
    machines = [
        each for page in pages for group in page["Reservations"] for each in group["Instances"]
    ]
    left = {
        each["InstanceId"]: each["State"]["Name"]
        for each in machines
        if each["State"]["Name"] not in GONE
    }
    if left:
        ids = " ".join(left)
        print(
            f"error: {len(left)} machines are left in {provider['region']}: {left}", file=sys.stderr
        )
        print(
            f"  end them: aws ec2 terminate-instances --region {provider['region']} --instance-ids {ids}"
        )
        sys.exit(1)
    print(
        f"== no machine of {config['cluster_name']} is left in {provider['region']}; file systems and buckets are"
    )


if __name__ == "__main__":
    main()
