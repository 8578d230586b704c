"""A Gaussian process over targets, and the target of the highest upper confidence bound, by botorch
(the extra `bayes`), which is imported when it is first asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ....agents.types import SettingError

RESTARTS, RAW_SAMPLES = 1, 20  # of the search for the highest bound, as in the authors' code
Point = Sequence[float]


@dataclass(frozen=True)
class Kernel:
    """Fixed hyperparameters: length scale and variance of the squared exponential, and the noise's
    variance."""

    length: float
    variance: float
    noise: float


def upper_bound(mean: float, deviation: float, beta: float) -> float:
    """mu + sqrt(beta) sigma (GP-UCB; Srinivas et al., ICML 2010)."""
    return float(mean + beta**0.5 * deviation)


class GaussianProcess:
    """A Gaussian process given observations.

    Args:
        points: [N][d]. values: [N], to be maximised.
        limits: [d], the least and the largest coordinate of a point to try.
        kernel: None finds the hyperparameters of maximum a posteriori, on standardised values and
            points in the unit cube, as botorch's `SingleTaskGP` does; a fixed one is taken as it
            is, with mean 0 and on points and values as they are.

    Raises `SettingError` if botorch is not installed.
    """

    def __init__(
        self,
        points: Sequence[Point],
        values: Sequence[float],
        limits: Sequence[tuple[float, float]],
        kernel: Kernel | None = None,
    ) -> None:
        botorch_module()
        x = torch.tensor([list(point) for point in points], dtype=torch.float64)
        y = torch.tensor(list(values), dtype=torch.float64).unsqueeze(-1)
        self.limits = torch.tensor([list(pair) for pair in limits], dtype=torch.float64).T
        self.model = _fitted(x, y, self.limits) if kernel is None else _fixed(x, y, kernel)

    def predict(self, point: Point) -> tuple[float, float]:
        """(mean, standard deviation) of the value at a point, without the noise of an
        observation."""
        with torch.no_grad():
            found = self.model.posterior(torch.tensor([list(point)], dtype=torch.float64))
            return float(found.mean), float(found.variance) ** 0.5

    def highest(self, beta: float, seed: int) -> list[float]:
        """The point of the highest upper confidence bound within the limits, by a search from
        random starts that the seed draws."""
        from botorch.acquisition import UpperConfidenceBound
        from botorch.optim import optimize_acqf

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)
            best, _ = optimize_acqf(
                UpperConfidenceBound(self.model, beta=beta),
                self.limits,
                q=1,
                num_restarts=RESTARTS,
                raw_samples=RAW_SAMPLES,
                options={"seed": seed % 2**31},
            )
        return [float(value) for value in best[0]]


def _fitted(x: torch.Tensor, y: torch.Tensor, limits: torch.Tensor) -> Any:
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Normalize, Standardize
    from gpytorch.mlls import ExactMarginalLogLikelihood

    cube = torch.cat([limits, x])  # points may lie outside the limits
    cube = torch.stack([cube.min(0).values, cube.max(0).values])
    model = SingleTaskGP(
        x, y, input_transform=Normalize(x.shape[-1], bounds=cube), outcome_transform=Standardize(1)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the restarts where a fit does not converge
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model.eval()


def _fixed(x: torch.Tensor, y: torch.Tensor, kernel: Kernel) -> Any:
    from botorch.models import SingleTaskGP
    from gpytorch.kernels import RBFKernel, ScaleKernel
    from gpytorch.means import ZeroMean

    covariance = ScaleKernel(RBFKernel())
    model = SingleTaskGP(
        x,
        y,
        train_Yvar=torch.full_like(y, kernel.noise),
        covar_module=covariance,
        mean_module=ZeroMean(),
        outcome_transform=None,
    )
    covariance.base_kernel.lengthscale, covariance.outputscale = kernel.length, kernel.variance
    return model.eval()


def botorch_module() -> Any:
    """The package botorch. Raises `SettingError` if it is not installed."""
    try:
        import botorch
    except ImportError as error:
        raise SettingError(
            "abadbo needs the package botorch, which is not installed; pip install 'marlora[bayes]'"
        ) from error
    return botorch
