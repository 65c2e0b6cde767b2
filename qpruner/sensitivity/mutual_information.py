"""Estimate mutual information between each group's output and the model's prediction: QPruner's sensitivity signal.

Estimator: Ross (2014, doi:10.1371/journal.pone.0087357), the k-nearest-neighbour estimator for a continuous and a
discrete variable that scikit-learn's `mutual_info_classif` uses, here over several components jointly. The continuous
variable is the leading principal components of the group's output at the predicted positions, whitened; the discrete
one is the model's predicted token, rare tokens pooled. At these sample sizes the estimate is biased, so the mean over
shuffled labels is subtracted.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from qpruner.config.schema import SensitivityConfig
from qpruner.data.calibration import Samples, visit_outputs
from qpruner.data.encoding import IGNORED_LABEL
from qpruner.data.losses import Rows
from qpruner.errors import UserError
from qpruner.models.layout import output_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ESTIMATOR = "k-nearest neighbours, continuous-discrete (Ross 2014), joint over whitened principal components"
BIAS = "the mean of the shuffled-label estimates is subtracted; what remains can be slightly negative"

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MutualInformation:
    """Estimates, one a group in model order, and what they are from."""

    raw_nats: tuple[float, ...]
    baseline_nats: tuple[float, ...]
    """Of shuffled labels."""
    num_samples: int
    num_positions: int
    num_classes: int

    @property
    def values(self) -> tuple[float, ...]:
        """Raw estimate less its shuffled-label baseline."""
        return tuple(raw - base for raw, base in zip(self.raw_nats, self.baseline_nats, strict=True))


def measure(
    model: PreTrainedModel, samples: Samples, group: str, settings: SensitivityConfig, seed: int
) -> MutualInformation:
    """Estimate every group's mutual information with the pruned model's prediction, in one pass over the samples.

    `seed` seeds the draw of positions and the shuffles. Progress counts batches, then groups.
    """
    samples = replace(samples, rows=spread_positions(samples.rows, settings.max_positions, seed))
    modules = output_modules(model.config, group)
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    predictions: list[torch.Tensor] = []

    def visit(batch: dict[str, torch.Tensor], predicted: torch.Tensor) -> None:
        predictions.append(predicted)
        for name, paths in modules.items():
            outputs[name].append(torch.cat([batch[path] for path in paths], dim=1).to(model.dtype))

    listened = {path: model.get_submodule(path) for paths in modules.values() for path in paths}
    visit_outputs(model, listened, samples, visit)
    labels = pool_rare(torch.cat(predictions).numpy(), settings.num_neighbors + 1)
    num_classes = len(np.unique(labels))
    if num_classes < 2:
        raise UserError(
            f"`calibration.num_sensitivity_samples`: the model predicts one token at all {len(labels)} positions, so "
            "mutual information says nothing; give more or longer samples"
        )
    shuffled = [np.random.default_rng([seed, turn]).permutation(labels) for turn in range(settings.num_shuffles)]
    raw, baseline = [], []
    for name in modules:
        components = whitened_components(torch.cat(outputs.pop(name)), settings.num_components)
        raw.append(estimate(components, labels, settings.num_neighbors))
        baseline.append(float(np.mean([estimate(components, other, settings.num_neighbors) for other in shuffled])))
        samples.on_progress(len(raw), len(modules))
    return MutualInformation(tuple(raw), tuple(baseline), len(samples.rows), len(labels), num_classes)


def spread_positions(rows: Rows, max_positions: int, seed: int) -> list[dict[str, list[int]]]:
    """Draw positions evenly from all rows, and keep only what it takes to predict there.

    Neighbouring positions of one text say much the same, so the estimate gains by positions from many rows. The rows
    have labels at drawn positions only, are cut behind the last of them, and come the shortest first.
    """
    labelled = [
        (row, at)
        for row, sample in enumerate(rows)
        for at, label in enumerate(sample["labels"][1:], start=1)
        if label != IGNORED_LABEL
    ]
    drawn: dict[int, set[int]] = {}
    for row, at in random.Random(seed).sample(labelled, min(max_positions, len(labelled))):
        drawn.setdefault(row, set()).add(at)
    kept = []
    for row, chosen in drawn.items():
        ids, labels = (rows[row][name][: max(chosen) + 1] for name in ("input_ids", "labels"))
        masked = [label if at in chosen else IGNORED_LABEL for at, label in enumerate(labels)]
        kept.append({"input_ids": ids, "labels": masked})
    return sorted(kept, key=lambda row: len(row["input_ids"]))


def estimate(components: Floats, labels: Integers, num_neighbors: int) -> float:
    """Compute Ross's estimator, ``psi(N) + <psi(k)> - <psi(N_c)> - <psi(m)>``, in nats; may be negative.

    Components are ``(samples, components)``. Every label occurs more than once; one with fewer than `num_neighbors`
    other samples uses as many as it has.
    """
    from scipy.special import digamma
    from sklearn.neighbors import KDTree, NearestNeighbors

    count = len(labels)
    radius, used, members = np.empty(count), np.empty(count), np.empty(count)
    for label in np.unique(labels):
        same = labels == label
        neighbors = min(num_neighbors, int(same.sum()) - 1)
        nearest = NearestNeighbors(n_neighbors=neighbors, metric="chebyshev").fit(components[same])
        # The radius just below the k-th neighbour, so that m counts the points strictly closer, and the point itself.
        radius[same] = np.nextafter(nearest.kneighbors()[0][:, -1], 0)
        used[same], members[same] = neighbors, same.sum()
    closer = KDTree(components, metric="chebyshev").query_radius(components, radius, count_only=True)
    return float(
        digamma(count) + digamma(used).mean() - digamma(members).mean() - digamma(np.maximum(closer, 1)).mean()
    )


def whitened_components(outputs: torch.Tensor, num_components: int) -> Floats:
    """Compute the leading principal components of outputs ``(samples, features)``, scaled to unit variance."""
    centered = outputs.to(torch.float64, copy=True)
    centered -= centered.mean(dim=0)
    left, values, _ = torch.linalg.svd(centered, full_matrices=False)
    kept = max(1, min(num_components, int((values > values[0] * 1e-9).sum())))
    whitened: Floats = (left[:, :kept] * len(outputs) ** 0.5).numpy()
    # The estimator is one of densities: outputs that repeat exactly (the first projections see one token and no
    # context) would carry no information. A little noise separates them, as in scikit-learn's mutual_info_classif.
    return whitened + 1e-6 * np.random.default_rng(0).standard_normal(whitened.shape)


def pool_rare(labels: Integers, minimum: int) -> Integers:
    """Give every label that occurs fewer than `minimum` times the one label -1; a lone leftover joins the largest."""
    values, counts = np.unique(labels, return_counts=True)
    pooled = np.where(np.isin(labels, values[counts >= minimum]), labels, -1)
    if 0 < (pooled == -1).sum() < minimum:
        pooled[pooled == -1] = values[counts.argmax()]
    return pooled
