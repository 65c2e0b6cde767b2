"""Check all nodes of the cluster before the run starts.

A table is shown, and an error is raised that names unusable nodes.

Nodes that join later are checked when work starts on them (`cluster.node_check.check_node`).
"""

import contextlib
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from qpruner.cluster.node_check import NodeReport, look_at_all
from qpruner.config.schema import RunConfig
from qpruner.errors import UserError
from qpruner.pipeline.context import Context
from qpruner.pipeline.preflight import amount, check_device, check_gpu
from qpruner.runs.events import TableMade
from qpruner.runs.storage import read_progress, remove, storage_at, write_text
from qpruner.wording import counted


def look_at_nodes(context: Context) -> None:
    """Check every node and show the results in a table; raise an error if a node has a problem."""
    config = context.config
    resources = context.machines.trial_resources
    root = context.run_dir.root
    with _test_file(root) as (folder, driver):
        reports = look_at_all(folder, driver)
        unseen = {report.id for report in reports if read_progress(folder / report.id) != report.id}
    rows = []
    problems = []
    for report in reports:
        of_node = troubles(report, config, resources, root, report.id in unseen)
        rows.append(row(report, of_node))
        problems += [f"{report.name}: {text}" for text in of_node.values()]
    context.emit(TableMade(("node", "CPUs", "GPUs", "state"), tuple(rows)))
    if problems:
        lines = "\n".join(f"  - {line}" for line in problems)
        raise UserError(f"{counted(len(problems), 'problem')} with the cluster's nodes:\n{lines}")
    # Ray finds no GPUs on a node without a GPU driver, so these GPUs were declared by hand.
    declared = [
        report for report in reports if report.size.gpus and not report.gpus and not report.has_left
    ]
    if not resources.get("gpu") or (declared and not any(report.gpus for report in reports)):
        check_device(None, config, context.inspection.shapes.packs)


@contextlib.contextmanager
def _test_file(storage: Path) -> Iterator[tuple[Path, str]]:
    """Write a test file to a new folder on the storage.

    Yield the folder and the file name, then remove them.

    The names are random because a network file system may cache that a name does not exist.
    """
    driver = uuid.uuid4().hex
    folder = storage / f".nodes-{driver}"
    made = [place for place in (storage, *storage.parents) if not place.exists()]
    try:
        write_text(folder / driver, driver)
    except OSError as error:
        raise UserError(
            f"`output`: {storage} cannot be written ({error.strerror}); name another folder"
        ) from error
    try:
        yield folder, driver
    finally:
        remove(folder)
        with contextlib.suppress(OSError):  # a folder is not empty
            for place in made:
                place.rmdir()


def troubles(
    report: NodeReport,
    config: RunConfig,
    resources: Mapping[str, float],
    storage: Path,
    is_unseen: bool,
) -> dict[str, str]:
    """Return the problems of a node: sentences by keyword, such as `storage` or `GPUs`.

    `is_unseen` is True if the driver cannot see the file that the node wrote to the storage.
    """
    problems = {} if report.has_left else dict(report.problems)
    if report.has_left or "no answer" in problems:
        return problems
    if not (report.size.fits(resources) and resources.get("gpu")):
        problems.pop("GPUs", None)
    elif "GPUs" not in problems:
        for kind, _, capability in report.gpus:
            try:
                check_gpu(config, capability)
            except UserError as error:
                problems["GPUs"] = f"{kind}: {error}, or remove the node from the cluster"
    if is_unseen:
        problems.setdefault(
            "storage",
            "is not shared with this node: the driver cannot see the file that the node wrote",
        )
    if "storage" in problems:
        place = storage_at(storage)
        problems["storage"] = f"`output`: {place.name} {problems['storage']}; {place.access_remedy}"
    return problems


def row(report: NodeReport, problems: Mapping[str, str]) -> tuple[str, ...]:
    """Return the table row of a node: name, CPUs, GPUs and the keywords of its problems."""
    kinds = dict.fromkeys(f"x {kind}, {amount(memory)}" for kind, memory, _ in report.gpus)
    if report.size.gpus and not kinds and "no answer" not in problems:
        kinds = {"(none seen by torch)": None}
    state = "left the cluster" if report.has_left else ", ".join(problems) or "ok"
    return report.name, f"{report.size.cpus:g}", " ".join([f"{report.size.gpus:g}", *kinds]), state
