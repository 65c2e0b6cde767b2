"""Rank correlation of the sensitivities of a model as it is and of its cuts: may one cut's count
for all?

    for rate in 0 0.1 0.2; do
      .venv/bin/qpruner sensitivity CONFIG --set prune.rate=$rate --set output=runs/rate-$rate
    done
    .venv/bin/python benchmarks/shared_sensitivities.py runs/rate-0 runs/rate-0.1 runs/rate-0.2

For each further run, method and format: Spearman's correlation over the blocks' groups with the
first run, and the sum over the groups in both.
"""

import sys

from scipy.stats import spearmanr

from qpruner.plans.plan import EMBEDDINGS, HEAD
from qpruner.quantization.formats import format_of
from qpruner.runs.records import SensitivityRecord
from qpruner.runs.run_dir import RunDir


def sensitivities(run: str) -> SensitivityRecord:
    """Read a run's sensitivities."""
    record = RunDir(run, create=False).read_record("sensitivity", SensitivityRecord)
    if record is None:
        raise SystemExit(f"{run} has no sensitivities: run `qpruner sensitivity` first")
    return record


def main(first: str, *others: str) -> None:
    """Print the correlations of the other runs with the first."""
    reference = sensitivities(first)
    for run in others:
        record = sensitivities(run)
        assert record.groups == reference.groups, "the cuts must have the same groups"
        for method in record.methods.keys() & reference.methods.keys():
            ours, theirs = (each.methods[method].values for each in (reference, record))
            for level in filter(lambda name: format_of(name).is_packed, ours):
                rows = zip(record.groups, ours[level], theirs[level], strict=True)
                pairs = [
                    (a, b)
                    for name, a, b in rows
                    if name not in (EMBEDDINGS, HEAD) and None not in (a, b)
                ]
                same, found = map(list, zip(*pairs, strict=True))
                sums = f"sum {sum(same):.3g} -> {sum(found):.3g}"
                print(f"{run} {method} {level}: {spearmanr(same, found).statistic:.2f}, {sums}")


if __name__ == "__main__":
    main(*sys.argv[1:])
