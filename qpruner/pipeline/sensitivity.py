"""The sensitivity stage: score, by several methods, the harm if a group gets a smaller format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qpruner.config.schema import EXPANSION, INFORMATION, MEASUREMENT
from qpruner.data.encoding import load_encoded
from qpruner.models.loading import load_dense, load_tokenizer
from qpruner.pipeline.context import Context
from qpruner.pipeline.prepare import loading_progress
from qpruner.pipeline.stage import Stage
from qpruner.runs.events import Emit, Progress
from qpruner.runs.records import BankRecord, MethodScores, PruneRecord, SensitivityRecord, digest_of
from qpruner.runs.storage import children, fetch, remove, write_json

Result = TypeVar("Result")
if TYPE_CHECKING:
    from qpruner.sensitivity.methods import Subject

    Score = Callable[[Any, Subject], Result]

# of the run, with a file for each method, named by a digest of what its scores depend on
FOLDER = "sensitivities"


class Sensitivity(Stage[SensitivityRecord]):
    """Score for each group the harm to the model by every format.

    Earlier scores of the same inputs are reused.
    """

    name = "sensitivity"
    help = "Run up to the sensitivities."
    record = SensitivityRecord
    keeps_files = False
    memory_keys = "`sensitivity.batch_size` or `data.max_length`"

    def inputs(self) -> tuple[Any, ...]:
        return (self._scores_digest(), self.config.measured_methods)

    def _scores_digest(self) -> str:
        """Compute the digest of everything that the scores of any method depend on."""
        config = self.config
        return digest_of(
            "scores",
            self.context.record(PruneRecord).cuts[self.context.shapes.reference.cut].digest,
            self.context.record(BankRecord).digest,
            config.sensitivity.model_copy(update={"methods": ()}),
            config.quantize.group,
            self.context.shapes.reference.offered,
            config.seed,
        )

    def detail(self) -> str:
        return ", ".join(self.config.measured_methods) or "nothing to measure"

    def run(self, scratch: Path) -> dict[str, Any]:
        context = self.context
        ending = f"-{self._scores_digest()}.json"
        methods = self.config.measured_methods
        folder = context.run_dir.root / FOLDER
        by_method: dict[str, MethodScores] = {}
        for name in children(folder):
            if not name.endswith(ending):
                remove(folder / name)
                continue
            remedy = "its scores are computed again"
            earlier = self.read_intact(folder / name, MethodScores, folder.parent, remedy)
            if earlier:
                by_method[name.removesuffix(ending)] = earlier
        missing = set(methods) - by_method.keys()
        for method, scores in _scored(context, missing, dict(by_method)):
            write_json(folder / f"{method}{ending}", scores)
            by_method[method] = scores
            self.notify(f"{_range(method, scores)} {scores.unit}, {scores.seconds:.1f} s")
        return {
            "groups": context.shapes.reference.names,
            "methods": {method: by_method[method] for method in methods},
        }

    def summary(self, record: SensitivityRecord) -> str:
        ranges = ", ".join(_range(method, scores) for method, scores in record.methods.items())
        about = f"smallest less largest format: {ranges}" if ranges else "nothing measured"
        return f"{len(record.groups)} groups, {about}"


def _range(method: str, scores: MethodScores) -> str:
    """Format the smallest and largest difference of any group.

    The difference is a group's score in its smallest format minus that in its largest.
    """
    offered = [
        [value for value in of_group if value is not None]
        for of_group in zip(*scores.values.values(), strict=True)
    ]
    rises = [values[0] - values[-1] for values in offered if len(values) > 1] or [0.0]
    return f"{method} {min(rises):.3g} to {max(rises):.3g}"


def _scored(
    context: Context, missing: set[str], known: Mapping[str, MethodScores]
) -> Iterator[tuple[str, MethodScores]]:
    """Yield the scores of the missing methods.

    Scores of other methods that the same passes over the data compute are yielded too.

    `known` has the scores by KL and loss that are there already. Without them, packed embeddings
    are measured alone.
    """
    from qpruner.data.calibration import Samples
    from qpruner.sensitivity import methods as scoring

    config = context.config
    # a mapped file cannot be sent to other machines
    rows = list(load_encoded(context.places.data / "sensitivity"))
    reference = context.shapes.reference
    checkpoint = context.places.checkpoint_of(reference.cut)
    pad_id = int(load_tokenizer(str(checkpoint)).pad_token_id)
    subject = scoring.Subject(
        samples=Samples(rows, pad_id, config.sensitivity.batch_size),
        groups=reference.groups,
        bank=context.places.bank_of(reference.cut),
    )
    few_rows = replace(subject.samples, rows=rows[: config.sensitivity.num_measured_samples])
    measured = replace(subject, samples=few_rows.by_length)
    if missing.intersection(INFORMATION):
        by_information = partial(
            scoring.by_information, settings=config.sensitivity, seed=config.seed
        )
        yield from _on_model(context, subject, INFORMATION, by_information).items()
    if missing.intersection(MEASUREMENT):
        known = _on_model(context, measured, MEASUREMENT, scoring.by_measurement)
        yield from known.items()
    if missing.intersection(EXPANSION):
        if not known.keys() >= set(MEASUREMENT):
            known = {}
            measured = measured.tables
        if measured.groups and not known:
            names = [group.name for group in measured.groups]
            known = _on_model(context, measured, names, scoring.by_measurement)
        rises = scoring.table_rises(known, measured.groups)
        by_expansion = partial(scoring.by_expansion, tables=rises)
        yield from _on_model(context, subject, EXPANSION, by_expansion).items()


def _on_model(
    context: Context, subject: Subject, methods: Sequence[str], score: Score[Result]
) -> Result:
    """Score groups on the pruned model in the executor.

    Progress is reported under the names of the methods.
    """
    work = partial(
        _score,
        context.places.checkpoint_of(context.shapes.reference.cut),
        context.config.model.dtype,
        subject,
        ", ".join(methods),
        score,
    )
    return context.machines.executor.run(work, context.emit)


def _score(
    checkpoint: Path, dtype: str, subject: Subject, names: str, score: Score[Result], emit: Emit
) -> Result:
    """Load the pruned model and score its groups; `names` is the text of the progress."""
    model = load_dense(
        str(fetch(checkpoint)), dtype, on_progress=loading_progress(emit, "sensitivity")
    )
    samples = replace(subject.samples, on_progress=_progress(emit, names))
    return score(
        model, replace(subject, samples=samples, on_group=_progress(emit, f"{names} by group"))
    )


def _progress(emit: Emit, work: str) -> Callable[[int, int], None]:
    """Return a callback that emits the progress of `work`, which is the text to show."""
    return lambda done, total: emit(Progress("sensitivity", done, total, work))
