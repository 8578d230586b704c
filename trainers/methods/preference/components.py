"""Trainable components of a system besides its language models, which learn by the same loss: a
diffusion model, a retriever, a table of choices."""

from __future__ import annotations

from typing import Protocol

import torch

from ....rollouts.types import Episode


class Component(Protocol):
    """One part with a name, parameters and an optimizer of its own. The run neither publishes nor
    saves it: that is its owner's.

    `log_ratio` is asked twice per update, first for its value, then for its gradient, with the same
    `draw` both times: noise must follow from it. Every rank asks for every episode, so replicas on
    several ranks stay equal.
    """

    name: str

    def log_ratio(self, episode: Episode, draw: int) -> torch.Tensor:
        """Scalar: log of what it made in this episode under its parameters over that under its
        reference, or a surrogate of it."""
        ...

    def step(self) -> None:
        """Move along the gradients that have been added up, and clear them."""
        ...


def diffusion_log_ratio(
    losses: torch.Tensor, reference_losses: torch.Tensor, num_steps: int
) -> torch.Tensor:
    """num_steps x sum(reference's denoising loss - the model's): stands for a diffusion model's
    log-ratio, which has no closed form.

    By Jensen's inequality the preference loss of this surrogate bounds the true one from above
    (SysDPO, section on diffusion).

    Args:
        losses, reference_losses: [I] denoising error (mean square) of I images, at one level of
            noise each, the same noise for both.
        num_steps: T, steps of the diffusion process.
    """
    return num_steps * (reference_losses - losses).sum()
