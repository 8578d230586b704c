"""The joint search of MIPRO: which option of every param a trial takes, and which candidate is
evaluated in full. Pure Python, but for `tpe`, which asks optuna.

A choice is the number of an option by the name of its param. Every suggestion follows from the
trials so far and a seed alone, so a resumed search goes on as the uninterrupted one.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .....agents.seeds import derive_seed
from .....agents.types import SettingError

Choice = Mapping[str, int]


@dataclass(frozen=True)
class Trial:
    """A choice that was evaluated.

    Args:
        choice: see above.
        candidate: its id in the archive.
        score: its mean over the tasks it was evaluated on.
        full: were these all validation tasks?
    """

    choice: Choice
    candidate: str
    score: float
    full: bool


# sizes


def default_trials(num_agents: int, demos: bool, num_candidates: int) -> int:
    """T = int(max(2 v log2 N, 3/2 N)), with v = agents x (2 if demonstrations are searched, else 1)
    and N candidates per param."""
    variables = num_agents * (2 if demos else 1)
    return int(max(2 * variables * math.log2(num_candidates), 1.5 * num_candidates))


def num_evaluations(num_trials: int, full_eval_steps: int) -> int:
    """Evaluations of a search on minibatches: the trials, the team as it began, and a full one
    after every `full_eval_steps` trials and after the last."""
    whole, rest = divmod(num_trials, full_eval_steps)
    return num_trials + whole + 1 + (rest > 0)


def program_runs(
    num_trials: int, full_eval_steps: int, minibatch_size: int, num_val_tasks: int
) -> int:
    """Runs of the team that these evaluations ask for, at most: those that were played before with
    the same state are taken from the store. A minibatch of 0 stands for all validation tasks."""
    if not minibatch_size:
        return num_val_tasks * (num_trials + 1)
    full = num_evaluations(num_trials, full_eval_steps) - num_trials
    return minibatch_size * num_trials + num_val_tasks * full


# what comes next


def next_full(trials: Sequence[Trial]) -> str | None:
    """The candidate with the highest mean of its minibatch scores among those that were not yet
    evaluated in full, the first of equal ones; None if there is none."""
    scores: dict[str, list[float]] = {}
    for trial in trials:
        if not trial.full:
            scores.setdefault(trial.candidate, []).append(trial.score)
    done = {trial.candidate for trial in trials if trial.full}
    means = {id: math.fsum(own) / len(own) for id, own in scores.items() if id not in done}
    return max(means, key=means.__getitem__) if means else None


def minibatch(num_tasks: int, size: int, seed: int, trial: int) -> list[int]:
    """The numbers of `size` random tasks, drawn for this trial, ascending; all for a size of 0."""
    if not size:
        return list(range(num_tasks))
    rng = random.Random(derive_seed(seed, "minibatch", trial))
    return sorted(rng.sample(range(num_tasks), size))


def uniform(space: Mapping[str, int], trials: Sequence[Trial], seed: int) -> dict[str, int]:
    """Random search: every option of every param with equal chances.

    Args:
        space: how many options a param has, by its name.
        trials: not asked.
        seed: of this suggestion alone; another one gives another choice.
    """
    rng = random.Random(seed)
    return {name: rng.randrange(count) for name, count in space.items()}


def tpe(space: Mapping[str, int], trials: Sequence[Trial], seed: int) -> dict[str, int]:
    """The suggestion of a multivariate tree-structured Parzen estimator (Bergstra et al., NeurIPS
    2011): it splits the trials at a quantile of their scores and takes what is likely among the
    good and unlikely among the bad. The first ten are random. Arguments: see `uniform`; raises
    `SettingError` if optuna is not installed.

    The trials are replayed into a fresh study, so nothing else has to be remembered.
    """
    optuna = optuna_module()
    spaces = {
        name: optuna.distributions.CategoricalDistribution(range(count))
        for name, count in space.items()
    }
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():  # optuna 4 calls `multivariate` experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=seed % 2**32, multivariate=True)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for trial in trials:
            params = {name: trial.choice[name] for name in space}
            study.add_trial(
                optuna.trial.create_trial(params=params, distributions=spaces, value=trial.score)
            )
        return {name: int(number) for name, number in study.ask(spaces).params.items()}
    finally:
        optuna.logging.set_verbosity(before)


def optuna_module() -> Any:
    """The package optuna. Raises `SettingError` if it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise SettingError(
            "sampler: tpe needs the package optuna, which is not installed; pip install"
            " 'marlora[search]', or set sampler to random"
        ) from error
    return optuna


SAMPLERS: Mapping[str, Callable[[Mapping[str, int], Sequence[Trial], int], dict[str, int]]] = {
    "tpe": tpe,
    "random": uniform,
}
