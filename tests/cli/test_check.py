"""`qpruner check`: the sizes, memory, hours and warnings that it prints before a run."""

import json
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from conftest import Raw, assert_has, command, with_key
from conftest import with_keys as changed

from qpruner.config.load import validate_config
from qpruner.errors import UserError
from qpruner.pipeline import preflight
from qpruner.pipeline.run import run
from qpruner.plans.plan import EMBEDDINGS, HEAD
from qpruner.runs.lock import hold_run


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def check(raw: Raw, *options: str, code: int = 0, verb: str = "check") -> str:
    """Run the command and return its whole output."""
    Path("config.yaml").write_text(yaml.safe_dump(raw))
    done = command(verb, "config.yaml", *options)
    assert done.exit_code == code, done.output
    return done.output


def facts(raw: Raw, *options: str) -> Raw:
    return json.loads(check(raw, "--json", *options).splitlines()[-1])


def test_memory_is_printed_by_kind_of_work_and_part(tiny_raw: Raw) -> None:
    said = check(tiny_raw)
    told = facts(tiny_raw)
    assert list(told["memory"]) == [
        "trial, training",
        "trial, scoring",
        "prune",
        "sensitivity",
        "comparison",
    ]
    parts = told["memory"]["trial, training"]["parts"]
    names = [
        "weights",
        "adapters",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "unpacked weights",
    ]
    assert sorted(parts) == sorted(names)
    training = (
        r"    trial, training +\S+ MB: a step of 4 rows x 64 tokens .*, in the final fine-tune "
        r"too\n(.*)\n"
    )
    [line] = re.findall(training, said)
    sizes = {
        name: float(size) for name, size in re.findall(r"((?:unpacked )?\w+) ([\d.]+) MB", line)
    }
    assert sizes == {name: round(size / 1e6, 1) for name, size in parts.items()}
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert "free here" in said
    assert told["memory_free"] > 0
    assert re.search(r"disk: +about [\d.]+ [MG]iB at most; [\d.]+ [MG]iB free here\n", said)
    assert told["disk_needed"] > 0
    # A batch whose logits fit no machine.
    warning = (
        r"warning: +\S+ GB of memory are needed at most, and \S+ GB are free here: lower `eval"
    )
    assert re.search(warning, check(with_key(tiny_raw, "evaluate.batch_size", 10**8)))


def test_hours_are_estimated_only_with_measure(tiny_raw: Raw) -> None:
    assert "time:        not estimated; `--measure` times" in check(tiny_raw)
    assert facts(tiny_raw)["hours"] is None
    raw = changed(tiny_raw, prune__selection="per_layer")
    said = check(raw, "--measure")
    assert re.search(r"time: +about .* on \d+ slots?, .* of slot time: ", said)
    assert re.search(r"slot time: prune .*\n", said)
    assert "measured on 1 CPU core: 4 rows x 64 tokens take" in said
    # No stage is shown to take no time.
    assert " 0 s" not in said
    assert "give only one of them" in check(raw, "--measure", "--gpu", code=2)


def test_gpu_settings_can_be_checked_without_a_gpu(tiny_raw: Raw) -> None:
    """Settings for a cluster, as docs/cluster.md recommends them, can be checked on a laptop."""
    gpus = {"search__max_gpu_hours": 2, "search__resources_per_trial": {"cpu": 4, "gpu": 1}}
    workers = {"finetune__num_workers": 4, "training__micro_batch_size": 1}
    raw = changed(tiny_raw, **gpus, **workers, model__dtype="float16")
    told = facts(raw, "--gpu")
    assert_has(told, concurrent_trials=1, memory_free=None)
    halves = changed(
        raw, finetune__num_workers=1, search__resources_per_trial={"cpu": 4, "gpu": 0.5}
    )
    assert facts(halves, "--gpu")["concurrent_trials"] == 2
    refused = check(changed(raw, search__resources_per_trial={"gpu": 0}), "--gpu", code=2)
    # These trials hold no GPU anywhere.
    assert "use `search.max_hours`" in refused


def test_the_verdict_is_the_last_line(tiny_raw: Raw) -> None:
    Path("config.yaml").write_text(yaml.safe_dump(tiny_raw))
    done = command("check", "config.yaml")
    assert done.stderr == "[check] model, rows, tasks and machine of config.yaml ...\n"
    assert done.stdout.endswith(
        "The configuration is valid; `--show-config` prints every key in effect.\n"
    )
    keys, _, answer = command("check", "config.yaml", "--show-config").stdout.partition("\n\n")
    assert yaml.safe_load(keys) == validate_config(tiny_raw).model_dump(mode="json")
    assert answer.splitlines()[-1] == "The configuration is valid."
    quiet = command("check", "config.yaml", "--quiet", "--set", "search.max_trials=2")
    assert quiet.stdout == "The configuration is valid.\n"
    assert quiet.stderr.startswith("warning:     ")
    assert "`search.max_trials`" in quiet.stderr


def test_rows_samples_and_questions_of_every_step_are_counted(tiny_raw: Raw) -> None:
    said = check(changed(tiny_raw, data__confirmation__0__limit=15))
    assert (
        "48 train, 16 validation, 15 confirmation (8 fresh ones choose the winner, 7 judge it)"
        in said
    )
    assert (
        "8 samples of 128 tokens packed from 48 rows of `data.train` for importance; 32 rows of"
        in said
    )
    assert "test:        8 questions (qpruner_everyday_test 8)\n" in said
    assert "search:" not in said
    tasks = {
        "search__tasks": ["qpruner_everyday_validation"],
        "search__limit": 6,
        "search__metric": "accuracy",
    }
    raw = changed(tiny_raw, **tasks)
    said = check(raw)
    six = "6 questions (qpruner_everyday_validation 6)"
    assert f"search:      {six} score the trials; {six}, fresh, choose the winner\n" in said
    assert facts(raw)["questions"]["fresh"] == {"qpruner_everyday_validation": 6}


def test_truncated_rows_are_told(tiny_raw: Raw) -> None:
    Path("rows.jsonl").write_text(
        "".join(f'{{"text": "{number} {"word " * 400}"}}\n' for number in range(3))
    )
    rows = {"data__validation": [{"source": "rows.jsonl", "format": "text"}]}
    text = check(changed(tiny_raw, data__max_length=256, **rows))
    assert "; about 3 validation lose their ends (`data.max_length` 256)" in text


def test_a_running_command_and_an_earlier_cut_are_named(tiny_raw: Raw, tmp_path: Path) -> None:
    raw = changed(tiny_raw, prune__first_layer=1)
    run(validate_config(raw), lambda event: None, until="prune")
    with hold_run(tmp_path / "run", print):
        said = check(raw)
    assert (
        f"warning:     process {os.getpid()} on {socket.gethostname()} works on "
        f"{tmp_path / 'run'}: `qpruner" in said
    )
    assert "works on" not in check(raw)
    again = changed(raw, output="again", model__source="run/cuts/cut-20")
    said = check(again)
    assert re.search(r"parameters: +(\S+ M) -> \1 \(pruned earlier: the cut is skipped\)\n", said)


def all_in(name: str, groups: Iterable[str]) -> dict[str, str]:
    """Return the plan with every block in one format."""
    return {group: "bf16" if group in (EMBEDDINGS, HEAD) else name for group in groups}


def test_a_plan_is_compared_with_the_budget_after_the_cut(tiny_raw: Raw) -> None:
    """With global selection the widths are known only after the cut."""
    groups = preflight.inspect(validate_config(tiny_raw)).shapes.reference.names
    for name, size in (("nf4", "4"), ("int8", "8")):
        Path(f"{size}.yaml").write_text(yaml.safe_dump(all_in(name, groups)))
    said = check(tiny_raw, "--plan", "8.yaml")
    assert "its bytes are compared with the budget once the model is pruned" in said
    run(validate_config(tiny_raw), lambda event: None, until="prune")
    # The widths are those of the pruned model.
    assert "(estimate" not in check(tiny_raw)
    assert "left of the budget" in check(tiny_raw, "--plan", "4.yaml")
    assert facts(tiny_raw, "--plan", "4.yaml")["concurrent_trials"] == 1
    assert "more than the budget of" in check(tiny_raw, "--plan", "8.yaml", code=2)


def test_the_number_of_blocks_after_the_cut_is_shown(tiny_raw: Raw) -> None:
    """nf4 on a CPU needs a multiple of 64 channels: where it is not offered, `check` says why."""
    raw = changed(tiny_raw, prune__units=["block"], prune__rate=0.5)
    assert re.search(
        r"^parameters: .* M -> \S+ M, 2 -> 1 blocks \(50 % pruned\)$", check(raw), re.MULTILINE
    )
    cut = ("--set", "prune.units=[mlp]", "--set", "prune.rate=0.2", "--set", "prune.round_to=32")
    said = check(raw, *cut)
    which = (
        r"nf4 for 7 groups, not for 1 group \(layers.0.down: \S+: on a CPU bitsandbytes decodes "
        r"\d+ columns wrongly"
    )
    assert re.search(
        rf"^formats: +{which}, .*\); int8 for 8 groups; bf16 for embeddings$", said, re.MULTILINE
    )
    assert "prune.round_to" in check(raw, *cut, "--set", "quantize.bits=[4]", code=2)


def test_a_plan_is_read_if_the_number_of_blocks_is_known(tiny_raw: Raw, tmp_path: Path) -> None:
    """Blocks of equal size are cut in a known number, and groups are numbered by the remaining
    blocks."""
    raw = changed(tiny_raw, prune__units=["block", "mlp"], prune__depth_share=0.5, prune__rate=0.5)
    inspection = preflight.inspect(validate_config(raw))
    before, after = (
        [group.name for group in layout.groups]
        for layout in (inspection.shapes.base, inspection.shapes.reference)
    )
    assert len(set(before) - set(after)) == len(set(after) - {EMBEDDINGS, HEAD})
    assert set(after) < set(before)
    plan = tmp_path / "plan.yaml"
    raw = with_key(raw, "search.plan", str(plan))
    plan.write_text(yaml.safe_dump(all_in("nf4", after)))
    read = preflight.inspect(validate_config(raw)).shapes.plan
    assert read.as_dict() == all_in("nf4", after)
    plan.write_text(yaml.safe_dump(all_in("nf4", before)))
    with pytest.raises(
        UserError,
        match=f"`{next(name for name in before if name not in after)}` is not a group of this "
        "model",
    ):
        preflight.inspect(validate_config(raw))


@pytest.mark.parametrize(("key", "verb"), [("--plan", "run"), ("search.plan", "check")])
def test_a_plan_over_the_budget_is_refused(
    key: str, verb: str, tiny_raw: Raw, tmp_path: Path
) -> None:
    """The message names the option or the key, whichever gave the plan."""
    raw = with_key(tiny_raw, "prune.selection", "per_layer")
    inspection = preflight.inspect(validate_config(raw))
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(inspection.shapes.reference.uniform("int8").as_dict()))
    options = (key, str(plan)) if key == "--plan" else ("--set", f"search.plan={plan}")
    said = check(raw, *options, code=2, verb=verb)
    assert f"error: `{key}`: the plan in {plan} takes " in said
    told = re.search(r"takes [\d.]+ MB, ([\d.]+) MB more than the budget of", said)
    over = (
        inspection.shapes.reference.plan_bytes(inspection.shapes.reference.uniform("int8"))
        - inspection.shapes.budget_bytes
    )
    # The number is rounded up, never down.
    assert 0 <= float(told[1]) * 1e6 - over < 101


def test_a_plan_s_bytes_are_those_of_its_cut(tiny_raw: Raw, tmp_path: Path) -> None:
    """A cut that takes too many multiply-adds is told, and no plan of it is taken."""
    budget = {"bytes": 200_000, "flops_fraction": 0.9}
    keys = {"prune__rate": None, "prune__rates": [0, 0.2], "prune__selection": "per_layer"}
    raw = changed(tiny_raw, **keys, quantize__budget=budget)
    layout = preflight.inspect(validate_config(raw)).shapes.layouts["cut-20"]
    plan = tmp_path / "plan.yaml"
    small = layout.smallest()
    plan.write_text(yaml.safe_dump({"cut": "cut-20", **small.as_dict()}))
    assert facts(raw, "--set", f"search.plan={plan}")["bytes_plan"] == layout.plan_bytes(small)
    assert re.search(r"100\.0% of the multiply-adds, too many to win \(not pruned\)", check(raw))
    plan.write_text(yaml.safe_dump({"cut": "base", **small.as_dict()}))
    assert "got base: `cut: NAME`, of cut-20" in check(
        raw, "--set", f"search.plan={plan}", code=2
    ).replace("\n", " ")
