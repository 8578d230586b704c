"""Which layout a model's attention allows, and a batch in the form that model takes.

Whether an attention computes rows of prefix trees exactly is tried once per model: a small row
against the same sequences one by one. Four ways are tried in this order, each exact or not used:

flex: FlexAttention, on GPUs.
branches: SDPA branch by branch, everywhere.
mask: a dense mask, in any attention that follows one.
positions: sequences end to end told apart by their positions, nothing shared.

none: one padded sequence per row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import weakref
from collections.abc import Iterator
from typing import Any, Literal

import torch
from peft import PeftModel

from ...agents.types import SettingError
from ..batching.batches import Batch, Layout, pack
from ..batching.samples import TrainingSequence
from .tree_attention import empty_mask, install, remove, text_config

log = logging.getLogger(__name__)

Way = Literal["flex", "branches", "mask", "positions", "none"]

_ways: weakref.WeakKeyDictionary[Any, tuple[Way, str]] = weakref.WeakKeyDictionary()


def choose_layout(model: Any, setting: str = "auto") -> Layout:
    """The layout `pack` may use with this model, by the setting `layout`: auto, shared, packed or
    padded.

    `auto` becomes the first of shared, masked, packed and padded that is exact, with a warning that
    says why it is not shared: an attention that cannot be reached, or dropout. An explicit `shared`
    or `packed` raises `SettingError` where it is not exact.
    """
    if setting == "padded":
        return "padded"
    base = _base(model)
    way, why = _way(base)
    dropout = _dropout(base)
    if dropout:
        why = f"dropout is on ({dropout}), and tokens of a shared prefix would be dropped together"
    packed: Layout = "padded" if way in ("mask", "none") else "packed"
    layout: Layout = (
        packed
        if dropout or way in ("positions", "none")
        else "masked"
        if way == "mask"
        else "shared"
    )
    if (setting == "shared" and layout in ("packed", "padded")) or (
        setting == "packed" and packed == "padded"
    ):
        raise SettingError(
            f"layout: {setting} rows cannot be used with this model ({why}); set layout to auto or"
            " padded"
        )
    if setting == "packed":
        return "packed"
    if layout in ("packed", "padded"):
        log.warning("prefixes are not shared in the update, rows are %s: %s", layout, why)
    elif layout == "masked":
        log.warning("prefixes are shared through a dense mask, where that pays: %s", why)
    return layout


def way_of(model: Any) -> Way:
    """How this model computes rows of trees; tried at first use."""
    return _way(_base(model))[0]


@contextlib.contextmanager
def forced(model: Any, way: Way) -> Iterator[None]:
    """Compute trees this way, whatever the probe says. For tests and measurements."""
    base = _base(model)
    before = _way(base)
    _ways[base] = (way, "forced")
    try:
        yield
    finally:
        _ways[base] = before


def model_inputs(base: Any, batch: Batch) -> dict[str, Any]:
    """Keyword arguments of the model's decoder for this batch. Raises ValueError for trees that
    share, if it can only tell sequences apart."""
    shared = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if batch.subtree_end is None:
        return shared | {"attention_mask": batch.attention_mask}
    return shared | _tree_inputs(base, batch, _way(base)[0])


def _tree_inputs(base: Any, batch: Batch, way: Way) -> dict[str, Any]:
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
    near = visible & (
        batch.position_ids[:, None, :, None] - batch.position_ids[:, None, None, :] < window
    )
    if kinds == {"full_attention", "sliding_attention"}:
        return {"full_attention": additive(visible), "sliding_attention": additive(near)}
    return additive(near)


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _dropout(base: Any) -> str:
    """What drops tokens in training; "" if nothing does."""
    name = next(
        (n for n, m in base.named_modules() if isinstance(m, torch.nn.Dropout) and m.p > 0), ""
    )
    return name or (
        "attention_dropout" if getattr(text_config(base), "attention_dropout", 0.0) else ""
    )


def _way(base: Any) -> tuple[Way, str]:
    if base not in _ways:
        _ways[base] = _tried(base)
    return _ways[base]


def _tried(base: Any) -> tuple[Way, str]:
    """The first way that is exact, and why the best one is not."""
    why = install(base)
    reasons = [why] if why else []
    on_gpu = base.get_input_embeddings().weight.device.type == "cuda"
    ways: list[Way] = ([] if why else ["flex", "branches"] if on_gpu else ["branches"]) + [
        "mask",
        "positions",
    ]  # type: ignore[assignment]
    for way in ways:
        if way == "mask":
            remove(base)
        problem = _why_not(base, way)
        if not problem:
            if way != ways[0] or why:
                log.info("trees are computed by %s: %s", way, "; ".join(reasons))
            return way, "; ".join(reasons)
        reasons.append(problem)
    return "none", "; ".join(reasons)


def _why_not(base: Any, way: Way) -> str:
    """Why a row of trees would not be exact this way; "" if it is."""
    word = words(base, 30)
    samples = [
        _sample((*word[:8], *tail)) for tail in (word[8:16], [*word[8:10], *word[16:22]], word[22:])
    ]
    weight = base.get_input_embeddings().weight
    training = base.training
    base.eval()
    try:
        with torch.no_grad():
            (row,) = pack(
                samples, max_tokens=1000, layout="packed" if way == "positions" else "shared"
            )
            row = row.to(weight.device)
            blind = dataclasses.replace(
                row, subtree_end=None
            )  # what it would be if every sequence saw those before it
            alone = [pack([s], max_tokens=1, layout="padded")[0].to(weight.device) for s in samples]
            right = torch.cat([_states(base, b, model_inputs(base, b)) for b in alone])
            tree = _states(base, row, model_inputs(base, blind) | _tree_inputs(base, row, way))
            wrong = _states(base, blind, model_inputs(base, blind))
    except Exception as error:  # models, kernels and compilers raise kinds of their own
        return f"{way}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        base.train(training)
    order = [batch.turns[0] for batch in alone]
    size = len(right) // len(alone)
    tree, wrong = (
        torch.cat([x[i * size : (i + 1) * size] for i in map(row.turns.index, order)])
        for x in (tree, wrong)
    )
    # Half precision is off by a per cent and more, so the error is measured against that of a row
    # without any mask.
    scale = float(right.abs().mean())
    noise = scale * (1e-4 if weight.dtype == torch.float32 else 1e-2)
    off = float((tree - right).abs().mean())
    if not off <= max(noise, 0.25 * float((wrong - right).abs().mean())):
        return (
            f"{way}: attention of {type(base).__name__} does not follow it (off by"
            f" {off / scale:.1e})"
        )
    return ""


def _states(base: Any, batch: Batch, inputs: dict[str, Any]) -> torch.Tensor:
    """The decoder's last hidden states where a term is predicted, float32."""
    return base.get_decoder()(**inputs).last_hidden_state[batch.row, batch.column].float()


def words(base: Any, count: int) -> list[int]:
    """Ids spread over the vocabulary: the first ones are often special tokens, on which half
    precision is off by whole nats."""
    return [(101 + 1237 * k) % base.get_input_embeddings().weight.shape[0] for k in range(count)]


def _sample(ids: tuple[int, ...]) -> TrainingSequence:
    trained = tuple(int(i >= 8) for i in range(len(ids)))
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
