"""Log-probabilities of whole turns, under the policies as they are or as the run began with them:
what preferences compare."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ...agents.types import BASE
from ...rollouts.types import TurnKey
from ..batching.samples import TrainingSequence
from ..errors import RunError
from ..model.adapters import Adapters, init_folder
from ..model.logprobs import token_logprobs
from .optimizer_step import forward_only

if TYPE_CHECKING:
    from ..loop.run import Run
    from .learner import LearnerBase


def turn_logprobs(
    run: Run, samples: Sequence[TrainingSequence], *, reference: bool = False
) -> dict[TurnKey, float]:
    """log p of every trained turn of the samples, summed over its tokens, at temperature 1 if the
    samples were made for it.

    The same on every rank; each computes its share. `reference`: under the policy as the run began,
    which is the base with adapters off unless the policy has an `init`. Raises `RunError` at a
    log-prob that is not finite.
    """
    found: dict[TurnKey, float] = {}
    bare = run.policies.get(BASE)
    for base in run.bases.values():
        speaks = bare is not None and (bare.base or run.config.model) == base.name
        for policy in (*base.policies, *([BASE] if speaks else [])):
            own = [sample for sample in samples if sample.policy == policy]
            if own:
                found |= _score(run, base, policy, own, reference)
    for (episode, turn, _), value in found.items():
        if not math.isfinite(value):
            raise RunError(
                f"episode {episode}, turn {turn}: its log-probability is {value}; the policy has"
                " diverged"
            )
    return found


def _score(
    run: Run, base: LearnerBase, policy: str, own: Sequence[TrainingSequence], reference: bool
) -> dict[TurnKey, float]:
    keys = [key for sample in own for key in sample.keys]
    model, layout = base.adapters.model, base.optimizers.layout
    with initial_weights(base.adapters, policy) if reference else base.adapters.active(policy):
        logps = forward_only(
            own,
            lambda batch: token_logprobs(model, batch)[0],
            run.config.tokens_per_batch,
            layout,
            run.ranks,
        )
    found: dict[TurnKey, list[float]] = {}
    for key, value in zip(keys, logps.tolist(), strict=True):
        found.setdefault(key, []).append(value)
    return {key: math.fsum(values) for key, values in found.items()}


@contextlib.contextmanager
def initial_weights(adapters: Adapters, policy: str) -> Iterator[None]:
    """The model speaking as this policy did when the run began. Its weights of now are back
    afterwards, to the last bit."""
    spec = adapters.policies.get(policy)
    if spec is None or spec.init == "fresh":  # B was zero: the base itself
        with adapters.active(BASE):
            yield
        return
    parameters = adapters.parameters(policy)
    now = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    try:
        adapters.load(policy, init_folder(spec.init))
        with adapters.active(policy):
            yield
    finally:
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(now[key])
