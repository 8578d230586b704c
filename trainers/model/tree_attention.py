"""Attention over prefix trees, inside the models of transformers.

transformers looks an attention function up by name for every layer. Ours is registered there: rows
that come with a `Tree` are computed by branches (SDPA, any device) or by FlexAttention (GPUs); all
others go to the function the model had before. `layouts` tries once per model, against separate
rows, which of these is exact; a model that does not call our function gets a dense mask, plain
packing or padding.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ..batching.prefix_trees import Block, Tree

log = logging.getLogger(__name__)

NAME = "marlora_tree"
KINDS = {"full_attention", "sliding_attention"}


def register() -> None:
    """Register the function with transformers; rows that are no trees get SDPA's masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, tree_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def install(base: Any) -> str:
    """Make the model's layers call `tree_attention_forward`. Returns the reason that they cannot,
    "" if they do."""
    config = text_config(base)
    before = getattr(base.config, "_attn_implementation", None)
    if before not in (NAME, "sdpa"):
        return f"its attention is {before!r}, not sdpa"
    odd = set(getattr(config, "layer_types", None) or ()) - KINDS
    if odd:
        return f"it has layers of {', '.join(sorted(odd))}"
    if not hasattr(base, "set_attn_implementation"):
        return f"{type(base).__name__} is no model of transformers"
    register()
    base.set_attn_implementation(NAME)
    return (
        ""
        if base.config._attn_implementation == NAME
        else f"{type(base).__name__} does not use transformers' attention functions"
    )


def remove(base: Any) -> None:
    """Undo `install`."""
    if getattr(base.config, "_attn_implementation", None) == NAME:
        base.set_attn_implementation("sdpa")


def text_config(base: Any) -> Any:
    return base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config


def empty_mask(device: torch.device) -> torch.Tensor:
    """A mask without entries, passed where a tree defines what is visible: models pass any mask of
    four dimensions on to their attention."""
    return torch.zeros((1, 1, 0, 0), device=device)


def tree_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    tree: Tree | None = None,
    flex: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function. query: [rows, heads, length, size]; key, value: [rows, key
    heads, length, size].

    Returns [rows, length, heads, size]. Raises NotImplementedError for what a tree cannot have
    (sinks, biases of positions), and if the model does not pass the tree on, or not the window
    that its configuration names for this layer.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if tree is None:
        if attention_mask is not None and not attention_mask.numel():
            raise NotImplementedError(
                "the model does not pass keyword arguments on to its attention"
            )
        if softcap:
            return _plain_capped(query, key, value, attention_mask, scaling, softcap), None
        rest = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, **more}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
    extra = [name for name in ("s_aux", "position_bias") if more.get(name) is not None]
    if extra or sliding_window != _window(module):
        raise NotImplementedError(
            f"attention with {', '.join(extra) or 'a window that the layer was not given'}"
        )
    if flex:
        return _flex(module, query, key, value, tree, scaling, sliding_window, softcap), None
    if sliding_window and tree.deepest < sliding_window:
        sliding_window = None
    return _by_branches(query, key, value, tree, scaling, dropout, sliding_window, softcap), None


def _window(module: Any) -> int | None:
    """The window this layer should have by the model's configuration."""
    config = module.config
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[module.layer_idx] == "full_attention":
        return None
    return getattr(config, "sliding_window", None)


def _by_branches(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: Tree,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    rows, heads, length, size = query.shape
    dtype = query.dtype
    # SDPA's kernel on the CPU takes up to three times as long in half precision as in float32
    if query.device.type == "cpu" and dtype.itemsize < 4:
        query, key, value = query.float(), key.float(), value.float()
    q = tree.queries(_flat(query))
    k, v = tree.keys(_flat(key)), tree.keys(_flat(value))
    outputs, here, there = [], 0, 0
    for number, block in enumerate(tree.blocks):
        to_here, to_there = (
            here + block.branches * block.queries,
            there + block.branches * block.keys,
        )
        mine = (
            q[here:to_here].view(block.branches, block.queries, heads, size),
            k[there:to_there].view(block.branches, block.keys, key.shape[1], size).transpose(1, 2),
            v[there:to_there].view(block.branches, block.keys, key.shape[1], -1).transpose(1, 2),
        )
        outputs.append(
            _block(tree, number, block, mine, scaling, dropout, window, softcap).reshape(
                to_here - here, -1
            )
        )
        here, there = to_here, to_there
    return tree.back(torch.cat(outputs).to(dtype)).view(rows, length, heads, -1)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[rows, heads, length, size] -> [rows x length, heads x size]; a view, as models lay their
    tensors out."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


def _block(
    tree: Tree,
    number: int,
    block: Block,
    mine: tuple[torch.Tensor, ...],
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """[B, R, heads, size]. The query heads that share a key head stand one after another as queries
    of it: no key is repeated."""
    q, k, v = mine
    branches, queries, heads, size = q.shape
    if block.causal and not window and not softcap:
        return sdpa(
            q.transpose(1, 2),
            k,
            v,
            is_causal=True,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=True,
        ).transpose(1, 2)
    repeats = heads // k.shape[1]
    q = (
        q.view(branches, queries, k.shape[1], repeats, size)
        .permute(0, 2, 3, 1, 4)
        .reshape(branches, k.shape[1], -1, size)
    )
    mask = tree.mask(number, window, repeats, q.dtype)
    if softcap:
        out = _capped(q, k, v, mask, scaling, softcap)
    else:
        out = sdpa(q, k, v, attn_mask=mask, scale=scaling, dropout_p=dropout)
    return out.view(branches, k.shape[1], repeats, queries, -1).permute(0, 3, 1, 2, 4)


def _capped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Attention whose scores are capped (Gemma 2), which no kernel of SDPA does."""
    scores = q @ k.transpose(-1, -2) * (scaling or 1 / math.sqrt(q.shape[-1]))
    scores = torch.tanh(scores / softcap) * softcap + mask
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


def _plain_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """The same for rows that are no trees: SDPA would silently ignore the cap."""
    length, keys = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones((length, keys), dtype=torch.bool, device=query.device).tril(keys - length)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(
            ~mask, torch.finfo(query.dtype).min
        )
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return _capped(query, key, value, mask, scaling, softcap).transpose(1, 2)


def _flex(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: Tree,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """FlexAttention without the blocks of the tree that no query sees. It has no backward pass on
    CPUs."""
    from torch.nn.attention.flex_attention import create_block_mask
    from transformers.integrations.flex_attention import flex_attention_forward

    if query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
        raise NotImplementedError(
            "FlexAttention has no backward pass on the CPU; trees are computed by branches there"
        )
    name = ("flex", window)
    if name not in tree.masks:
        subtree_end, depth = tree.subtree_end, tree.depth

        def visible(
            row: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor
        ) -> torch.Tensor:
            seen = (k <= q) & ((q < subtree_end[row, k]) | (q == k))
            return seen & (depth[row, q] - depth[row, k] < window) if window else seen

        rows, length = subtree_end.shape
        tree.masks[name] = create_block_mask(
            visible, rows, None, length, length, device=query.device
        )
    return flex_attention_forward(
        module, query, key, value, tree.masks[name], scaling=scaling, softcap=softcap
    )[0]
