"""A group of processes trains as one process does, and its job runs again if a process dies."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from qpruner.cluster.connect import connect, disconnect
from qpruner.cluster.node_check import packed_check
from qpruner.cluster.tasks import MAX_DEATHS
from qpruner.config.schema import LoraConfig, TrainingConfig
from qpruner.errors import TrainingDiverged, WorkerDied
from qpruner.quantization.assembly import assemble, attach_adapters
from qpruner.quantization.bank import BankSource
from qpruner.training.finetune import Listener, Schedule, Share, finetune

pytestmark = pytest.mark.slow

STEPS = 14
"""Two epochs and two steps. Of 21 rows in batches of four, the last step of an epoch has one row,
so one of two workers has none."""
MIDDLE = 8  # the step of a checkpoint in the middle of an epoch

Losses = dict[int, float]
Rows = list[dict[str, list[int]]]


@dataclass(frozen=True)
class Training:
    """The arguments of `train`."""

    model: Path
    rows: Rows
    output: Path  # for checkpoints, and for `steps`: the number and the loss of every step
    micro_batch_size: int
    dropout: float = 0.0
    start: Path | None = None  # a checkpoint; by default the newest in `output`
    killed_at: int = 0  # the forward pass at which the second process is killed, once


def train(job: Training) -> Losses:
    """Train for real, in one process or several; return the loss of each step that this process
    took."""
    torch.set_num_threads(1)
    lora = LoraConfig(rank=4, dropout=job.dropout, init="plain")
    bank = BankSource(job.model, job.model, "block", "float32", lora, seed=3)
    model, starts = assemble(bank, {"layers.0": "bf16", "layers.1": "bf16"})
    peft_model = attach_adapters(model, starts, lora, "block", seed=3)
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1
        killed = job.output / "killed"
        if passes == job.killed_at and Share.own().rank == 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    peft_model.register_forward_pre_hook(count)
    losses: Losses = {}

    def on_step(step: int, total: int, loss: float) -> None:
        losses[step] = loss
        with (job.output / "steps").open("a") as file:
            file.write(f"{step} {loss}\n")
        if step == MIDDLE + 1 and not job.start:  # only the newest two stay
            shutil.copytree(
                job.output / f"checkpoint-{MIDDLE}", job.output / "middle", dirs_exist_ok=True
            )

    job.output.mkdir(parents=True, exist_ok=True)
    # This norm clips every step: if each worker clipped its own gradients, the losses would differ
    # at once.
    settings = TrainingConfig(
        learning_rate=1e-2, batch_size=4, micro_batch_size=job.micro_batch_size, max_grad_norm=0.05
    )
    schedule = Schedule(steps=STEPS, rungs=range(2, STEPS + 1, 2))
    listener = Listener(on_step=on_step)
    start = job.start or max(
        job.output.glob("checkpoint-*"), key=lambda path: int(path.name[11:]), default=None
    )
    finetune(
        peft_model,
        job.rows,
        settings,
        schedule,
        job.output,
        seed=5,
        pad_id=1,
        start=start,
        listener=listener,
    )
    return losses


def steps_of(job: Training) -> list[tuple[int, float]]:
    """Return every step of a job in order, including the steps of a killed process."""
    lines = [line.split() for line in (job.output / "steps").read_text().splitlines()]
    return [(int(step), float(loss)) for step, loss in lines]


Trained = dict[str, tuple[Training, Losses]]
"""Trainings and their losses, by name."""
Run = Callable[[Callable[[Any], Any], Path, Any], Any]
"""Runs a function on a job in a group of two processes with one core each; the folder is for Ray
Train."""


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    import ray

    from qpruner.cluster.group import run_groups

    # workers cannot import this file
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    if connect(None).slots().fits({"cpu": 1.0}) < 2:
        pytest.skip("two processes need two cores")

    def in_group(function: Callable[[Any], Any], folder: Path, job: Any) -> Any:
        scratch = folder / "ray-train"
        [(position, found)] = run_groups(
            function, [job], {"cpu": 1.0}, 2, 1, scratch, packed_check({}, None)
        )
        assert position == 0
        assert not scratch.exists()
        return found

    yield in_group
    disconnect()


@pytest.fixture(scope="module")
def trained(
    tiny_model: Path, rows: Rows, tmp_path_factory: pytest.TempPathFactory, run: Run
) -> Trained:
    """The same training in one process (`one`) and in two processes (the others)."""
    folder = tmp_path_factory.mktemp("group")
    one = Training(tiny_model, rows[:21], folder / "one", micro_batch_size=2)
    two = replace(one, output=folder / "two")
    jobs = {
        "two": two,
        "accumulating": replace(one, output=folder / "accumulating", micro_batch_size=1),
        "resumed": replace(one, output=folder / "resumed", start=two.output / "middle"),
        "resumed-from-one": replace(
            one, output=folder / "resumed-from-one", start=one.output / "middle"
        ),
        "dropout": replace(one, output=folder / "dropout", dropout=0.1),
    }
    found = {"one": (one, train(one))}
    losses = run(lambda each: [train(job) for job in each], folder, list(jobs.values()))
    return found | dict(zip(jobs, zip(jobs.values(), losses, strict=True), strict=True))


@pytest.mark.parametrize("name", ["two", "accumulating"])
def test_two_processes_take_the_steps_of_one(name: str, trained: Trained) -> None:
    """In float32 only the order of additions differs: a loss changes by less than 1e-5 of it."""
    alone, one = trained["one"]
    together, two = trained[name]
    assert list(one) == list(range(1, STEPS + 1))
    # Each step has another loss.
    assert len({round(loss, 4) for loss in one.values()}) == STEPS
    assert two == pytest.approx(one, rel=1e-5)
    # Only one process reports.
    assert steps_of(together) == list(two.items())
    learned = [
        load_file(each.output / f"checkpoint-{STEPS}/adapter_model.safetensors")
        for each in (alone, together)
    ]
    torch.testing.assert_close(learned[1], learned[0], rtol=1e-3, atol=1e-5)


def test_two_processes_resume_in_the_middle_of_an_epoch(
    trained: Trained,
) -> None:
    """From their own checkpoint, and from a checkpoint of a single process."""
    expected = {step: loss for step, loss in trained["two"][1].items() if step > MIDDLE}
    assert trained["resumed"][1] == expected
    assert trained["resumed-from-one"][1] == pytest.approx(expected, rel=1e-5)


def test_a_killed_group_resumes_from_its_checkpoint(
    trained: Trained, run: Run, tmp_path: Path
) -> None:
    """With dropout: each process has saved its own random state."""
    undisturbed, losses = trained["dropout"]
    assert losses != pytest.approx(trained["two"][1], rel=1e-5)
    killed = replace(undisturbed, output=tmp_path / "killed", killed_at=6)
    run(train, tmp_path, killed)
    steps = steps_of(killed)
    assert (killed.output / "killed").exists()
    # One forward pass is one step. Step 6 was not finished, and the checkpoint before it is of step
    # 4.
    assert [step for step, _ in steps] == [*range(1, 6), *range(5, STEPS + 1)]
    assert all(loss == losses[step] for step, loss in steps)


@pytest.mark.parametrize(
    ("dies", "error", "message", "groups"),
    [
        (False, TrainingDiverged, "^only the second process$", 1),
        (True, WorkerDied, f"^{MAX_DEATHS} workers died in a row", MAX_DEATHS),
    ],
)
def test_an_error_or_the_last_allowed_death_ends_the_job(
    dies: bool, error: type[Exception], message: str, groups: int, run: Run, tmp_path: Path
) -> None:
    """The error keeps its type, and the other process no longer waits at the barrier."""

    def fail(folder: Path) -> None:
        (folder / f"tried-{os.getpid()}").touch()
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 1:
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            raise TrainingDiverged("only the second process")
        torch.distributed.barrier()

    with pytest.raises(error, match=message):
        run(fail, tmp_path, tmp_path)
    assert len(list(tmp_path.glob("tried-*"))) == 2 * groups


def test_a_process_killed_while_connecting_frees_its_slots(run: Run, tmp_path: Path) -> None:
    """Without `_Backend`, the next group would wait for them."""
    killed = []

    def add_up(job: float) -> float:
        own = torch.tensor(job * (1 + torch.distributed.get_rank()))
        torch.distributed.all_reduce(own)
        return float(own)

    def listens(process: psutil.Process) -> bool:
        """Return True if the others connect to this process: torch listens on all addresses, Ray on
        loopback."""
        with suppress(psutil.Error, OSError):
            return "RayTrainWorker" in " ".join(process.cmdline()) and any(
                each.status == psutil.CONN_LISTEN and each.laddr.ip in ("::", "0.0.0.0")
                for each in process.net_connections("tcp")
            )
        return False

    def kill() -> None:
        deadline = time.monotonic() + 200
        while not killed and time.monotonic() < deadline:
            for process in filter(listens, psutil.Process().children(recursive=True)):
                process.kill()
                killed.append(process.pid)
                return
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    assert run(add_up, tmp_path, 0.5) == 1.5
    killer.join()
    assert killed


class Killed:
    """Kills the process of a group in which it is read first, which is when the function is about
    to start."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __setstate__(self, state: dict[str, Path]) -> None:
        vars(self).update(state)
        if "RayTrainWorker" in " ".join(psutil.Process().cmdline()) and not self.file.exists():
            self.file.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_killed_before_the_function_starts_frees_its_slots(
    run: Run, tmp_path: Path
) -> None:
    from qpruner.cluster.group import WorkerGroupError, _GroupHooks

    assert run(lambda job: job.file.exists(), tmp_path, Killed(tmp_path / "killed"))
    hooks = _GroupHooks(tmp_path, b"")
    hooks.before_worker_group_start(None)
    hooks._placement_group = "a placement group, so a process died while the group started"
    with pytest.raises(WorkerGroupError) as ended:
        hooks.before_worker_group_start(None)
    assert "died" in str(ended.value.worker_failures[0])
