"""The Gaussian process of the searcher `gp`, conditioned on the scores so far, in float64.

Scores are linear in the effects of `PlanModel`, so the process is a Bayesian linear regression, and
what it predicts needs the mean and the covariance of the effects at the last rung alone. The
correlation of two rungs falls with their distance (intrinsic coregionalization model, Bonilla et
al. 2008), so that a trial stopped early informs the last rung. The hyperparameters are the maximum
a posteriori.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import pad

from qpruner.search.plan_model import AMPLITUDE, NUM_FITTED, Data, PlanModel

JITTER = 1e-8
MIN_VARIANCE = 1e-9
CONSTANT_VARIANCE = 100.0
"""Variance of a rung's mean score, in units of the scores' variance: almost uninformative."""
FREEDOM = 1.0
"""Degrees of freedom of Student's t distribution."""
NUM_STEPS = 10
"""Steps of expectation maximization."""

Values = Mapping[str, Tensor]
"""The hyperparameters by name."""


class Posterior:
    """A `PlanModel` conditioned on scores, which predicts scores at the last rung.

    Plans are rows of `SearchSpace`, and predictions have the unit of the scores. The
    hyperparameters are fitted to `data`.
    """

    def __init__(self, model: PlanModel, data: Data) -> None:
        self._model = model
        self._data = data
        self.plans = data.plans
        """The observed and the pending plans ``(n, groups + 1)``."""
        beliefs = dict(model.beliefs)
        for rank in range(1, data.num_rungs):
            beliefs[f"amplitude {rank}"] = AMPLITUDE
        self._names = list(beliefs)
        medians, self._spreads = torch.tensor(list(beliefs.values()), dtype=torch.float64).T
        self._medians = medians.log()

        self._center, self.unit = self._scale()
        self._scores = (data.scores - self._center) / self.unit
        values = self._values(self._fit())
        parts = self._stretched(values)
        covariance = sum(values[name] * part for name, part in parts.items())
        assert isinstance(covariance, Tensor)

        features = data.features
        gram = self._kernel(values, data, features @ covariance @ features.T)
        factor = torch.linalg.cholesky(gram)
        residual = self._scores - self._prior_mean(values, data)
        at_rung = torch.diag(self._variances_at_rung(values))
        to_last = self._rung_factor(values)[data.ranks, 0, None]
        is_last = (data.ranks == 0)[:, None]
        cross = features @ covariance * to_last + features @ at_rung * is_last  # (n, effects)
        white = solve_triangular(factor, cross, upper=False)
        self._noise = values["noise"] + JITTER
        white_residual = solve_triangular(factor, residual[:, None], upper=False)[:, 0]
        self._mean = values["mean"] * model.mean + white.T @ white_residual
        self._covariance = covariance + at_rung - white.T @ white

    def with_pending(self, plans: Tensor) -> Posterior:
        """Return the posterior that also knows the plans ``(p, groups + 1)`` of running trials.

        Each counts as if its expected score had been observed: the mean stays and the variance
        falls (kriging believer, Ginsbourger et al. 2010).
        """
        features = self._model.features(plans)
        cross = features @ self._covariance
        noise = self._noise * torch.eye(len(plans), dtype=torch.float64)
        factor = torch.linalg.cholesky(cross @ features.T + noise)
        white = solve_triangular(factor, cross, upper=False)
        posterior = copy.copy(self)
        posterior.plans = torch.cat([self.plans, plans])
        posterior._covariance = self._covariance - white.T @ white
        return posterior

    def mean(self, plans: Tensor) -> Tensor:
        """Return the expected scores ``(n,)`` of plans ``(n, groups + 1)``."""
        expected: Tensor = self._center + self.unit * (self._model.features(plans) @ self._mean)
        return expected

    def gap(self, plans: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance ``(n,)`` of the scores of plans minus that of `reference`.

        The reference is one plan ``(1, groups + 1)``.
        """
        moved = self._model.features(plans) - self._model.features(reference)
        variance = (moved @ self._covariance * moved).sum(1).clamp_min(MIN_VARIANCE)
        return moved @ self._mean * self.unit, variance * self.unit**2

    def effects(self, noise: Tensor) -> Tensor:
        """Return samples ``(s, groups, levels)`` of what each level of each group adds to a score.

        Noise is standard normal ``(s, effects)``; where it is zero, the sample is the mean.
        """
        ridge = JITTER * (1 + self._covariance.diagonal().max())
        eye = torch.eye(self._model.num_effects, dtype=torch.float64)
        factor = torch.linalg.cholesky(self._covariance + ridge * eye)
        return self._by_level(self._mean + noise @ factor.T)

    def slopes(self, plans: Tensor, reference: Tensor) -> Tensor:
        """Return how much each level, put into `plans`, lowers the expected improvement.

        ``EI = s (u Phi(u) + phi(u))``, where ``s`` is the standard deviation of the gain over the
        reference plan and ``u`` its mean divided by ``s``. Its derivative, ``-Phi(u)`` by the mean
        score and ``phi(u)`` by ``s``, is here divided by ``Phi(u)``. To first order the plan with
        the least sum of slopes improves at least as much as that in `plans`, as ``s`` is convex in
        the features.

        Args:
            plans: Rows ``(n, groups + 1)``.
            reference: One row ``(1, groups + 1)``.

        Returns:
            The slopes ``(n, groups, levels)``, float64.
        """
        moved = self._model.features(plans) - self._model.features(reference)
        toward = moved @ self._covariance
        deviation = (toward * moved).sum(1).clamp_min(MIN_VARIANCE).sqrt()
        gain = -(moved @ self._mean) / deviation
        log_density = -0.5 * (gain**2 + math.log(2 * math.pi))
        spread = (log_density - torch.special.log_ndtr(gain)).exp() / deviation
        return self._by_level(self._mean - spread[:, None] * toward)

    def _by_level(self, effects: Tensor) -> Tensor:
        """Return those of ``(s, effects)`` that groups have: ``(s, groups, levels)``."""
        is_free = self._model.is_free
        of_groups = effects[:, : is_free.numel()].reshape(-1, *is_free.shape)
        return pad(of_groups.masked_fill(~is_free, 0.0), (0, 1)) * self.unit

    def _values(self, hyper: Tensor) -> Values:
        """Name the hyperparameters, which are given by their logarithms."""
        return dict(zip(self._names, hyper.exp(), strict=True))

    def _scale(self) -> tuple[Tensor, Tensor]:
        """Return the center and the unit of the scores of the rung that has the most.

        The unit is the ratio of the scores' standard deviation to the prior's; 1 if all are equal.
        """
        one = torch.ones((), dtype=torch.float64)
        if not len(self._data.scores):
            return torch.zeros_like(one), one
        data = self._data.subset(self._data.ranks == self._data.ranks.mode().values)
        center = data.scores.mean()
        deviation = data.scores - center
        if not bool(deviation.abs().max() > 0):
            return center, one
        values = self._values(self._medians)
        features = data.features - data.features.mean(0)
        expected = ((features @ self._model.mean * values["mean"]) ** 2).sum()
        for name, part in self._model.parts.items():
            expected += values[name] * (features @ part * features).sum()
        unit: Tensor = ((deviation**2).sum() / expected.clamp_min(1e-12)).sqrt()
        return center, unit

    def _fit(self) -> Tensor:
        """Return the logarithms of the hyperparameters with the largest posterior density."""
        data = self._data
        scores = self._scores
        medians: Tensor = self._medians
        if len(scores) < 2:
            return medians
        if len(scores) > NUM_FITTED:
            half = NUM_FITTED // 2
            order = scores.argsort()
            rest = order[half:][torch.linspace(0, len(order) - half - 1, half).long()]
            rows = torch.cat([order[:half], rest])
            data = data.subset(rows)
            scores = scores[rows]
        features = data.features
        names = list(self._model.parts)
        grams = torch.stack([features @ part @ features.T for part in self._model.parts.values()])

        def negative_log_density(vector: np.ndarray) -> tuple[float, np.ndarray]:
            hyper = torch.tensor(vector, requires_grad=True)
            values = self._values(hyper)
            weights = torch.stack([values[name] for name in names])
            gram = self._kernel(values, data, torch.einsum("c,cnm->nm", weights, grams))
            factor = torch.linalg.cholesky(gram)
            residual = scores - self._prior_mean(values, data)
            white = solve_triangular(factor, residual[:, None], upper=False)
            belief = ((hyper - self._medians) / self._spreads) ** 2
            total = 0.5 * (white**2).sum() + factor.diagonal().log().sum() + 0.5 * belief.sum()
            total.backward()
            assert hyper.grad is not None
            return float(total.detach()), hyper.grad.numpy()

        start = self._medians.numpy()
        reach = 4 * self._spreads.numpy()
        solution = minimize(
            negative_log_density,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(start - reach, start + reach, strict=True)),
            options={"maxfun": 25},
        )
        return torch.tensor(solution.x)

    def _stretched(self, values: Values) -> dict[str, Tensor]:
        """Return the covariance of each part, with more variance for groups that stand out.

        Normal effects of one variance would smooth outliers away. So each group's own effect has
        Student's t distribution: a normal whose scale expectation maximization finds (Tipping 2001;
        Lange et al. 1989).
        """
        model = self._model
        data = self._data
        if len(data.scores) < 2:
            return model.parts
        own = values["group"] * model.parts["group"]
        shared = torch.zeros_like(own)
        for name, part in model.parts.items():
            if name != "group":
                shared += values[name] * part
        features = data.features
        residual = (self._scores - self._prior_mean(values, data))[:, None]
        seen = features * self._rung_factor(values)[data.ranks, 0, None]
        others = features @ shared @ features.T
        counts = model.is_free.sum(1).clamp_min(1)
        scales = torch.ones(model.num_effects, dtype=torch.float64)
        for _ in range(NUM_STEPS):
            scaled = own * torch.outer(scales, scales)
            gram = self._kernel(values, data, others + features @ scaled @ features.T)
            factor = torch.linalg.cholesky(gram)
            white = solve_triangular(factor, seen @ scaled, upper=False)
            mean = white.T @ solve_triangular(factor, residual, upper=False)[:, 0]
            square = mean**2 + scaled.diagonal() - (white**2).sum(0)
            ratio = square / own.diagonal().clamp_min(1e-300)
            ratio = ratio[: model.is_free.numel()].reshape(model.is_free.shape).sum(1) / counts
            of_groups = ((FREEDOM + ratio) / (FREEDOM + 1)).sqrt()
            of_groups = of_groups.repeat_interleave(model.num_levels - 1)
            scales = pad(of_groups, (0, model.num_cuts + 1), value=1.0)
        return model.parts | {"group": model.parts["group"] * torch.outer(scales, scales)}

    def _prior_mean(self, values: Values, data: Data) -> Tensor:
        amplitudes = self._amplitudes(values)[data.ranks]
        return data.features @ self._model.mean * values["mean"] * amplitudes

    def _amplitudes(self, values: Values) -> Tensor:
        """Return the size of effects ``(rungs,)`` at each rung, relative to the last."""
        lower = [values[f"amplitude {rank}"] for rank in range(1, self._data.num_rungs)]
        return torch.stack([torch.ones((), dtype=torch.float64), *lower])

    def _rung_factor(self, values: Values) -> Tensor:
        """Return the covariance ``(rungs, rungs)`` of an effect of variance 1 between rungs."""
        amplitudes = self._amplitudes(values)
        ranks = torch.arange(len(amplitudes))
        decay = (ranks[:, None] - ranks).abs() * values["decorrelation"]
        return torch.outer(amplitudes, amplitudes) * torch.exp(-decay)

    def _variances_at_rung(self, values: Values) -> Tensor:
        """Return the variance ``(effects,)`` of what is independent at each rung.

        It is that of the mean score, of which the prior knows almost nothing, and of cuts there.
        """
        of_groups = torch.zeros(self._model.is_free.numel(), dtype=torch.float64)
        of_cuts = values["offset"].expand(self._model.num_cuts)
        return torch.cat([of_groups, of_cuts, torch.full_like(of_groups[:1], CONSTANT_VARIANCE)])

    def _kernel(self, values: Values, data: Data, additive: Tensor) -> Tensor:
        """Return the covariance ``(n, n)`` of scores, from that of the sums of their effects."""
        at_rung = data.features * self._variances_at_rung(values) @ data.features.T
        rungs = self._rung_factor(values)[data.ranks][:, data.ranks]
        same_rung = data.ranks[:, None] == data.ranks
        noise = (values["noise"] + JITTER) * torch.eye(len(additive), dtype=torch.float64)
        return additive * rungs + at_rung * same_rung + noise
