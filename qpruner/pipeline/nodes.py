"""Check the cluster's nodes before anything expensive: one table, and an error that names each unusable node.

Nodes that join later, as an autoscaler's do, are checked where work on them begins (`cluster.probe.packed_check`).
"""

from __future__ import annotations

import contextlib
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qpruner.cluster.node_facts import differences, differing, versions
from qpruner.cluster.probe import Cache, Gpu, NodeFacts, Report, probe
from qpruner.config.schema import RunConfig
from qpruner.errors import CorruptFile, UserError
from qpruner.pipeline.context import Context
from qpruner.pipeline.preflight import amount, check_device, check_gpu
from qpruner.plans.plan import FULL_BITS, Layout
from qpruner.runs.events import Message, TableMade
from qpruner.runs.records import BankRecord
from qpruner.runs.run_dir import BANK_CACHE, RunDir
from qpruner.runs.storage import CACHE, read_progress, remove, storage_at, write_text
from qpruner.wording import counted

HEADINGS = ("node", "CPUs", "GPUs", "bank cache free", "versions", "state")


@dataclass(frozen=True)
class Needs:
    """What a node must have: room for the pruned model, a trial's resources, the driver's versions."""

    config: RunConfig
    layout: Layout
    resources: Mapping[str, float]
    storage: Path
    versions: Mapping[str, str]

    @property
    def copies(self) -> dict[str, tuple[str, int]]:
        """What a node keeps copies of, and their bytes, by the variable that names their folder."""
        levels = [bits for bits in self.config.quantize.bits if bits != FULL_BITS]
        bank_bytes = sum(sum(self.layout.group_bytes(bits)) + self.layout.adapter_bytes for bits in levels)
        model_bytes = self.layout.num_parameters * self.layout.element_bytes
        return {BANK_CACHE: ("the bank", bank_bytes), CACHE: ("the pruned model", model_bytes)}


def look_at_nodes(context: Context) -> None:
    """Ask every node what it is, and show the answers in one table.

    Raises:
        UserError: Naming each node that the run could not use, why, and the remedy.
    """
    resources = context.trial_resources
    needs = Needs(context.config, context.inspection.pruned, resources, context.run_dir.root, versions())
    with _left_in(needs.storage) as (folder, driver):
        reports = probe(folder, driver, _banked(context.run_dir))
        unseen = {report.id for report in reports if read_progress(folder / report.id) != report.id}
    found = {report.id: troubles(report, needs, report.id in unseen) for report in reports}
    context.emit(TableMade(HEADINGS, tuple(row(report, needs, found[report.id]) for report in reports)))
    told = [f"{report.name}: {text}" for report in reports for text in found[report.id].values()]
    if told:
        lines = "\n".join(f"  - {line}" for line in told)
        raise UserError(f"{counted(len(told), 'problem')} with the cluster's nodes:\n{lines}")
    for report in reports:
        if _is_declared(report):
            text = f"warning: Ray counts {report.size.gpus:g} GPUs on {report.name}, which has none that can be seen"
            context.emit(Message("cluster", f"{text}: what holds them runs on the CPU"))
    if _works_on_cpus(reports, resources):
        inspection = context.inspection
        check_device(None, context.config, inspection.model_config, inspection.cuts, inspection.packs)


def _banked(run: RunDir) -> list[str]:
    """List the sha256 of the bank's files, none where there is no bank."""
    with contextlib.suppress(CorruptFile):  # reported where the stage reads its record
        record = run.read_record("bank", BankRecord)
        return list(record.files.values()) if record else []
    return []


@contextlib.contextmanager
def _left_in(storage: Path) -> Iterator[tuple[Path, str]]:
    """Put a file of the driver's into a folder of the run's storage; afterwards remove all that was made for it.

    The names are new each time: a network file system may remember for a while that a name is not there.
    """
    driver = uuid.uuid4().hex
    folder = storage / f".nodes-{driver}"
    made = [place for place in (storage, *storage.parents) if not place.exists()]
    try:
        write_text(folder / driver, driver)
    except OSError as error:
        raise UserError(f"`output`: {storage} cannot be written ({error.strerror}); name another folder") from error
    try:
        yield folder, driver
    finally:
        remove(folder)
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for place in made:
                place.rmdir()


def troubles(report: Report, needs: Needs, is_unseen: bool) -> dict[str, str]:
    """Find what is wrong with a node: short names and sentences.

    `is_unseen` says that the driver does not see what the node wrote to the storage.
    """
    if report.has_left:
        return {}
    facts = report.facts
    if facts is None:
        remedy = "see Ray's log there, or take the node out of the cluster (`ray stop`)"
        return {"no answer": f"it could not be looked at: {report.silence}; {remedy}"}
    found = {
        "other versions": _other_versions(facts, needs.versions),
        "storage": _storage(facts, needs.storage, is_unseen),
    }
    if report.size.fits(needs.resources):
        found["disk"] = _disk(facts.caches, needs.copies)
        if needs.resources.get("gpu"):
            found["GPUs"] = _gpus(report, facts, needs)
    return {word: text for word, text in found.items() if text}


def _other_versions(facts: NodeFacts, own: Mapping[str, str]) -> str:
    found = differences(facts.versions, own)
    remedy = "install the same on every node (`launch/up.sh`, or `launch/setup.sh` there) and start Ray there again"
    return f"{found}; {remedy}" if found else ""


def _storage(facts: NodeFacts, storage: Path, is_unseen: bool) -> str:
    trouble = facts.storage or ("is not shared with it: what it wrote is not here" if is_unseen else "")
    found = storage_at(storage)
    return f"`output`: {found.name} {trouble}; {found.access_remedy}" if trouble else ""


def _disk(caches: Sequence[Cache], copies: Mapping[str, tuple[str, int]]) -> str:
    taken: Counter[int] = Counter()  # several may lie on one disk
    for cache in caches:
        what, size = copies[cache.variable]
        place = f"name another folder by {cache.variable} where the driver is started"
        if not cache.is_writable:
            return f"its copy of {what} would lie in {cache.folder}, which cannot be written; {place}"
        missing, free = max(0, size - cache.held_bytes), cache.free_bytes - taken[cache.disk]
        if missing > free:
            told = f"its copy of {what} takes {amount(missing)} in {cache.folder}, where {amount(free)} are free"
            return f"{told}; make room (what other runs left there may be deleted while none is at work), or {place}"
        taken[cache.disk] += missing
    return ""


def _gpus(report: Report, facts: NodeFacts, needs: Needs) -> str:
    if _is_declared(report):
        return ""
    if facts.gpu_trouble:
        return f"its GPUs cannot be used: {facts.gpu_trouble}; install the packages for its driver"
    if len(facts.gpus) < report.size.gpus:
        seen = f"Ray counts {report.size.gpus:g} GPUs, torch sees {len(facts.gpus)}"
        return f"{seen}; install a torch for its driver (`nvidia-smi` shows that), or a newer driver"
    for gpu in facts.gpus:
        try:
            check_gpu(needs.config, gpu.capability)
        except UserError as error:
            return f"{gpu.kind}: {error}, or that node out of the cluster"
    return ""


def _is_declared(report: Report) -> bool:
    """Whether somebody declared GPUs to Ray that are not there: Ray itself counts none without a driver."""
    facts = report.facts
    return facts is not None and report.size.gpus > 0 and not facts.gpus and not facts.has_hardware


def _works_on_cpus(reports: Sequence[Report], resources: Mapping[str, float]) -> bool:
    with_gpus = [report for report in reports if report.size.gpus]
    return not resources.get("gpu") or (bool(with_gpus) and all(map(_is_declared, with_gpus)))


def row(report: Report, needs: Needs, found: Mapping[str, str]) -> tuple[str, ...]:
    """Make a node's row of the table."""
    facts, size = report.facts, report.size
    state = "left the cluster" if report.has_left else ", ".join(found) or "ok"
    if facts is None:
        return report.name, f"{size.cpus:g}", f"{size.gpus:g}", "", "", state
    others = ", ".join(f"{name} {facts.versions[name]}" for name in differing(facts.versions, needs.versions))
    free = amount(facts.caches[0].free_bytes) if facts.caches else ""
    return report.name, f"{size.cpus:g}", _gpu_text(size.gpus, facts.gpus), free, others or "same", state


def _gpu_text(counted: float, gpus: Sequence[Gpu]) -> str:
    kinds = dict.fromkeys(f"{gpu.kind}, {amount(gpu.memory_bytes)}" for gpu in gpus)
    if counted and not gpus:
        return f"{counted:g}, none seen by torch"
    return " ".join([f"{counted:g}", *(f"x {kind}" for kind in kinds)])
