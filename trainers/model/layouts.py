"""Which layout a model's attention allows, and a batch in the form that model takes.

Whether a model computes rows of prefix trees exactly is tried once, see `layout_probe`.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel

from ...agents.types import SettingError
from ..batching.batches import Batch, Layout
from .layout_probe import Way, exact_way, tree_inputs
from .tree_attention import text_config

log = logging.getLogger(__name__)

_ways: weakref.WeakKeyDictionary[Any, tuple[Way, str]] = weakref.WeakKeyDictionary()
_layouts: weakref.WeakKeyDictionary[Any, Layout] = weakref.WeakKeyDictionary()


def choose_layout(model: Any, setting: str = "auto") -> Layout:
    """The layout `pack` may use with this model, by the setting `layout`: auto, shared, packed or
    padded.

    `auto` becomes the first of shared, masked, packed and padded that is exact, with a warning that
    says why it is not shared: an attention that cannot be reached, or dropout. An explicit `shared`
    or `packed` raises `SettingError` where it is not exact. Whatever the layout, the model attends
    as its own eager attention does from then on.
    """
    base = _base(model)
    _layouts[base] = layout = _choose(base, setting)
    return layout


def chosen_layout(model: Any) -> Layout:
    """The layout that `choose_layout` last gave for this model; `auto` where it was not asked."""
    base = _base(model)
    return _layouts[base] if base in _layouts else choose_layout(model)


def _choose(base: Any, setting: str) -> Layout:
    way, why = _way(base)
    if setting == "padded":
        return "padded"
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
    return shared | tree_inputs(base, batch, _way(base)[0])


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
        _ways[base] = exact_way(base)
    return _ways[base]
