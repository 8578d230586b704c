"""The policy as the run began: the reference of every KL and of every preference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from ...agents.types import BASE
from ..model.adapters import Adapters
from ..warm_start import init_folder


def together(adapters: Adapters, policies: Sequence[str]) -> list[list[str]]:
    """The policies by their beginnings: all that began as the bare base in one list, each that has
    an `init` in one of its own."""
    fresh = [name for name in policies if adapters.policies[name].init == "fresh"]
    others = [[name] for name in policies if name not in fresh]
    return ([fresh] if fresh else []) + others


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
