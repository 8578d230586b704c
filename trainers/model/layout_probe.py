"""The probe of a model: which way of computing rows of several sequences is exact.

A row of small prefix trees is compared, token by token, with the same sequences one by one under
the model's own eager attention. Four ways are tried in this order, each exact or not used:

flex: FlexAttention, on GPUs.
branches: SDPA branch by branch, everywhere.
mask: a dense mask, in any attention that follows one.
positions: sequences end to end told apart by their positions, nothing shared.

none: one padded sequence per row.

In float32 every token has to be right; half precision has to be as near as rounding is, and where
layers are neither attention nor MLP (convolutions, states) it cannot show that they are right.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch

from ...rollouts.engines.transformers_exactness import (
    difference,
    eager_attention,
    evaluation_mode,
    probe_words,
    rounding_noise,
    use_exact_attention,
)
from ..batching.batches import Batch, pack
from ..batching.samples import TrainingSequence
from .tree_attention import KINDS, empty_mask, install, remove, text_config

log = logging.getLogger(__name__)

Way = Literal["flex", "branches", "mask", "positions", "none"]

# classes of layers that mix tokens without being attention, and names of their parameters
_MIXERS = re.compile(
    r"mamba|ssm|deltanet|recurrent|rglru|rwkv|lightning|linear_?attention|retention|[ms]lstm", re.I
)
_STATES = {"A_log", "dt_bias", "time_decay", "recurrent_param"}


@dataclasses.dataclass(frozen=True)
class _Right:
    """The states [N, H] of `samples`' tokens as they should be, and the mean error of rounding."""

    samples: Sequence[TrainingSequence]
    states: torch.Tensor
    noise: float


def exact_way(base: Any) -> tuple[Way, str]:
    """The first way that is exact, and why the best one is not. Leaves the model with an attention
    that is exact for plain rows."""
    with torch.no_grad(), evaluation_mode(base):
        return _exact_way(base)


def _exact_way(base: Any) -> tuple[Way, str]:
    half = base.get_input_embeddings().weight.dtype.itemsize < 4
    if not hasattr(base, "get_decoder"):
        return "none", f"{type(base).__name__} has no get_decoder"
    mixers, chunks = _mixers(base), _chunks(base)
    if (mixers and half) or chunks:
        use_exact_attention(base)
        return "none", (
            f"{chunks}, which rows of several sequences would cut elsewhere"
            if chunks
            else f"its {mixers} are neither attention nor MLP, and half precision cannot show that"
            " they keep sequences apart"
        )
    right = _right(base)
    why = install(base)
    reasons = [why] if why else []
    on_gpu = base.get_input_embeddings().weight.device.type == "cuda"
    ways: list[Way] = [*_tree_ways(on_gpu, not why), "mask", "positions"]
    for way in ways:
        if way == "mask":
            remove(base)
            use_exact_attention(base)
        problem = _why_not(base, way, right)
        if not problem:
            if way != ways[0] or why:
                log.info("trees are computed by %s: %s", way, "; ".join(reasons))
            return way, "; ".join(reasons)
        reasons.append(problem)
    return "none", "; ".join(reasons)


def _tree_ways(on_gpu: bool, installed: bool) -> list[Way]:
    if not installed:
        return []
    return ["flex", "branches"] if on_gpu else ["branches"]


def _mixers(base: Any) -> str:
    """The class of a layer that is neither attention nor MLP; "" if there is none."""
    for module in base.modules():
        name = type(module).__name__
        own = {n for n, _ in module.named_parameters(recurse=False)}
        if isinstance(module, torch.nn.Conv1d) or _MIXERS.search(name) or own & _STATES:
            return name
    return ""


def _chunks(base: Any) -> str:
    """Which layers attend within chunks counted from the begin of a row; "" if there are none."""
    kinds = set(getattr(text_config(base), "layer_types", None) or ())
    return "it has layers of chunked_attention" if "chunked_attention" in kinds else ""


def _right(base: Any) -> _Right:
    word = probe_words(base, 46)
    tails = (word[8:16], [*word[8:10], *word[16:22]], word[22:30])
    samples = [_sample(tuple(ids)) for ids in (*([*word[:8], *t] for t in tails), word[30:])]
    alone = [batch for s in samples for batch in pack([s], max_tokens=1, layout="padded")]

    def states() -> torch.Tensor:
        return torch.cat([_states(base, b, _plain(b)) for b in alone])

    with eager_attention(base):
        right = states()
        return _Right(samples, right, rounding_noise(base, right, states))


def _why_not(base: Any, way: Way, right: _Right) -> str:
    """Why a row of trees would not be exact this way; "" if it is."""
    layout: Any = "packed" if way == "positions" else "shared"
    try:
        (row,) = pack(right.samples, max_tokens=1000, layout=layout)
        # what it would be if every sequence saw those before it
        blind = dataclasses.replace(row, subtree_end=None)
        (padded,) = pack(right.samples, max_tokens=1000, layout="padded")
        plain = _states(base, padded, _plain(padded))
        tree = _states(base, row, _plain(blind) | tree_inputs(base, row, way))
        wrong = _states(base, blind, _plain(blind))
    except Exception as error:  # models, kernels and compilers raise kinds of their own
        return f"{way}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    name = type(base).__name__
    if off := difference(plain, right.states, right.noise):
        return f"{way}: padded rows of {name} are not its own ({off})"
    if off := difference(tree, right.states, right.noise, wrong):
        return f"{way}: attention of {name} does not follow it ({off})"
    return ""


def _plain(batch: Batch) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask,
        "use_cache": False,
    }


def _states(base: Any, batch: Batch, inputs: dict[str, Any]) -> torch.Tensor:
    """The decoder's last hidden states [N, H] where a term is predicted, float32, in the order of
    the samples' tokens."""
    device = base.get_input_embeddings().weight.device
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    states = base.get_decoder()(**moved).last_hidden_state
    found = states[batch.row.to(device), batch.column.to(device)].float()
    ordered = torch.empty_like(found)
    ordered[batch.token_index.to(device)] = found
    return ordered


def tree_inputs(base: Any, batch: Batch, way: Way) -> dict[str, Any]:
    """Keyword arguments by which the model's decoder tells this way what a row's tokens see."""
    if way in ("flex", "branches"):
        return {"attention_mask": empty_mask(batch.input_ids.device), "tree": batch.tree} | (
            {"flex": True} if way == "flex" else {}
        )
    if way == "mask":
        return {"attention_mask": _dense(base, batch)}
    if batch.tree.forks or way == "none":
        raise ValueError(
            f"a row with shared prefixes for a model whose attention can do {way!r}; pack it as"
            " choose_layout says"
        )
    return {"attention_mask": None}


def _dense(base: Any, batch: Batch) -> Any:
    """Additive 4-D mask; one per kind of layer, if there are two."""
    config, visible = text_config(base), batch.visible_keys()
    dtype = base.get_input_embeddings().weight.dtype

    def additive(allowed: torch.Tensor) -> torch.Tensor:
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )

    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if kinds != {"full_attention"} else None
    if not window or int(batch.position_ids.max()) < window:
        return additive(visible)
    if not kinds <= KINDS:
        raise NotImplementedError(f"a mask for layers of {', '.join(sorted(kinds))}")
    near = visible & (
        batch.position_ids[:, None, :, None] - batch.position_ids[:, None, None, :] < window
    )
    if kinds == {"full_attention", "sliding_attention"}:
        return {"full_attention": additive(visible), "sliding_attention": additive(near)}
    return additive(near)


def _sample(ids: tuple[int, ...]) -> TrainingSequence:
    """A sequence of which every token but the first is looked at."""
    trained = (0, *(1,) * (len(ids) - 1))
    zeros = (0.0,) * len(ids)
    return TrainingSequence(
        "probe",
        str(ids),
        ids,
        trained,
        zeros,
        zeros,
        (1.0,) * len(ids),
        tuple(m - 1 for m in trained),
    )
