"""What a node says of itself, by a process that Ray gave no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch


@pytest.mark.gpu
def test_gpus_that_ray_hides_from_the_probe_are_seen() -> None:
    told = "json.dumps(node_facts_here('', '', '', {}, True, False))"
    code = f"import json; from qpruner.cluster.node_facts import node_facts_here; print({told})"
    command, hidden = [sys.executable, "-c", code], os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=hidden, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["gpus"]) == torch.cuda.device_count() > 0
    assert found["gpu_trouble"] == "" and found["has_hardware"]
