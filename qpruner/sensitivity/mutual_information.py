"""Estimate the mutual information of each group's output and the predicted token.

The QPruner paper scores groups so. The estimator is Ross's (2014,
doi:10.1371/journal.pone.0087357), as in scikit-learn's `mutual_info_classif`, applied jointly to
the leading principal components, whitened, of a group's output at the predicted positions. Rare
tokens are pooled. To reduce the bias, the mean estimate for shuffled labels is subtracted.
"""

import random
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from qpruner.config.schema import SensitivityConfig
from qpruner.data.calibration import OnProgress, Samples, visit_outputs
from qpruner.data.encoding import IGNORED_LABEL
from qpruner.data.losses import Rows
from qpruner.errors import UserError
from qpruner.models.layout import output_modules

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def measure(
    model: PreTrainedModel,
    samples: Samples,
    group: str,
    settings: SensitivityConfig,
    seed: int,
    on_group: OnProgress,
) -> tuple[float, ...]:
    """Estimate every group's mutual information in nats.

    `seed` draws positions and shuffles labels; `on_group` counts groups.
    """
    samples = replace(samples, rows=spread_positions(samples.rows, settings.max_positions, seed))
    modules = output_modules(model.config, group)
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    predictions: list[torch.Tensor] = []

    def visit(batch: dict[str, torch.Tensor], predicted: torch.Tensor) -> None:
        predictions.append(predicted)
        for name, paths in modules.items():
            output = torch.cat([batch[path] for path in paths], dim=1)
            outputs[name].append(output.to(model.dtype))

    all_paths = [path for paths in modules.values() for path in paths]
    visit_outputs(model, {path: model.get_submodule(path) for path in all_paths}, samples, visit)

    labels = pool_rare(torch.cat(predictions).numpy(), settings.num_neighbors + 1)
    if len(np.unique(labels)) < 2:
        raise UserError(
            "`calibration.num_sensitivity_samples`: the model predicts the same token at all "
            f"{len(labels)} positions, so mutual information is zero; give more or longer samples"
        )
    generators = [np.random.default_rng([seed, turn]) for turn in range(settings.num_shuffles)]
    shuffled = [generator.permutation(labels) for generator in generators]

    information: list[float] = []
    for name in modules:
        components = whitened_components(torch.cat(outputs.pop(name)), settings.num_components)
        raw = estimate(components, labels, settings.num_neighbors)
        baseline = [estimate(components, wrong, settings.num_neighbors) for wrong in shuffled]
        information.append(raw - float(np.mean(baseline)))
        on_group(len(information), len(modules))
    return tuple(information)


def spread_positions(rows: Rows, max_positions: int, seed: int) -> list[dict[str, list[int]]]:
    """Keep the labels of `max_positions` randomly drawn positions.

    They are drawn from all rows, because neighbouring positions have similar outputs. Tokens and
    rows that are then not needed are dropped. The shortest row comes first.
    """
    labelled = []
    for index, row in enumerate(rows):
        for position, label in enumerate(row["labels"]):
            if position > 0 and label != IGNORED_LABEL:
                labelled.append((index, position))

    drawn: dict[int, set[int]] = {}
    for index, position in random.Random(seed).sample(labelled, min(max_positions, len(labelled))):
        drawn.setdefault(index, set()).add(position)

    kept = []
    for index, positions in drawn.items():
        end = max(positions) + 1
        labels = [IGNORED_LABEL] * end
        for position in positions:
            labels[position] = rows[index]["labels"][position]
        kept.append({"input_ids": rows[index]["input_ids"][:end], "labels": labels})
    return sorted(kept, key=lambda row: len(row["input_ids"]))


def estimate(components: Floats, labels: Integers, num_neighbors: int) -> float:
    """Estimate mutual information in nats by Ross's estimator; the estimate may be negative.

    It is ``psi(N) + <psi(k)> - <psi(N_c)> - <psi(m)>``. N_c is the number of samples with the same
    label, at least 2. k is `num_neighbors`, or ``N_c - 1`` if that is less. `components` has the
    shape ``(samples, components)``.
    """
    from scipy.special import digamma
    from sklearn.neighbors import KDTree, NearestNeighbors

    count = len(labels)
    radius = np.empty(count)  # of each sample
    used = np.empty(count)  # neighbours
    members = np.empty(count)  # samples with the same label
    for label in np.unique(labels):
        same = labels == label
        neighbors = min(num_neighbors, int(same.sum()) - 1)
        nearest = NearestNeighbors(n_neighbors=neighbors, metric="chebyshev").fit(components[same])
        # Just below the distance of the k-th neighbour, so that m counts strictly closer points and
        # the point itself.
        radius[same] = np.nextafter(nearest.kneighbors()[0][:, -1], 0)
        used[same] = neighbors
        members[same] = same.sum()

    tree = KDTree(components, metric="chebyshev")
    closer = tree.query_radius(components, radius, count_only=True)
    return float(
        digamma(count)
        + digamma(used).mean()
        - digamma(members).mean()
        - digamma(np.maximum(closer, 1)).mean()
    )


def whitened_components(outputs: torch.Tensor, num_components: int) -> Floats:
    """Compute the leading principal components of outputs ``(samples, features)``.

    They are scaled to unit variance.
    """
    centered = outputs.to(torch.float64, copy=True)
    centered -= centered.mean(dim=0)
    left, values, _ = torch.linalg.svd(centered, full_matrices=False)
    kept = max(1, min(num_components, int((values > values[0] * 1e-9).sum())))
    whitened: Floats = (left[:, :kept] * len(outputs) ** 0.5).numpy()

    # The estimator needs distinct points, but the first projections see one token without context,
    # so their outputs repeat exactly. As in scikit-learn's mutual_info_classif, a little noise
    # makes them distinct.
    noise = np.random.default_rng(0).standard_normal(whitened.shape)
    return whitened + 1e-6 * noise


def pool_rare(labels: Integers, minimum: int) -> Integers:
    """Merge labels that occur fewer than `minimum` times into -1.

    If -1 would itself be rare, they are merged into the commonest label.
    """
    values, counts = np.unique(labels, return_counts=True)
    is_common = np.isin(labels, values[counts >= minimum])
    num_rare = (~is_common).sum()
    others = values[counts.argmax()] if num_rare < minimum else -1
    return np.where(is_common, labels, others)
