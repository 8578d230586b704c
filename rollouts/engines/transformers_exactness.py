"""Exactness of a model of transformers: what is set once, before it samples, scores or learns, so
that a token's log-prob depends on the tokens before it and on nothing else.

Attention is compared with the model's own eager attention (SDPA drops caps of scores and sinks
silently), rows of a padded batch with rows by themselves, and rotary embeddings whose frequencies
follow the longest row of a batch are fixed. torch is imported inside functions only.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

log = logging.getLogger(__name__)

MAX_CONTEXT = 4096  # tokens of context where neither settings nor server say more
FLOAT32_ERROR = 1e-4  # of the mean size of what is compared; anything exact is far below
# The noise of half precision: what states move when embeddings move in their last bit. Twice that
# is rounding, unless rows computed wrongly are that near too.
NUDGE, NOISES = 2.0**-8, 2.0
# what a model's attention may be given, and SDPA's function may not know
EXTRAS = ("softcap", "s_aux", "position_bias")


def fix_rotary(model: Any, context: int = 0) -> int:
    """Fix rotary embeddings of the types `longrope` and `dynamic`, whose frequencies depend on the
    longest row of a batch, as vLLM does. Returns for how many tokens they are right then; 0 if
    there were none to fix.

    longrope takes its long factors if the context is longer than the original one, and its short
    factors else; dynamic scaling stays as it is within the model's context. `context`: in tokens;
    0: the model's own, at most `MAX_CONTEXT`, as for servers.
    """
    lengths = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and _follows_batch(kinds):
            lengths.append(_fix(module, None, kinds, context))
            module.rope_type = "default"
        elif isinstance(kinds, dict):
            for layers in [name for name, kind in kinds.items() if _follows_batch(kind)]:
                lengths.append(_fix(module, layers, kinds[layers], context))
                module.rope_type = {**module.rope_type, layers: "default"}
    return min(lengths, default=0)


def _follows_batch(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _fix(module: Any, layers: str | None, kind: str, context: int) -> int:
    """Set one rotary embedding's frequencies; `layers`: of which kind of layer, None: of all.
    Returns up to how many tokens they are right."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    prefix, config = f"{layers}_" if layers else "", module.config
    parameters = config.rope_parameters[layers] if layers else config.rope_parameters
    length = int(config.max_position_embeddings)
    if kind == "longrope":
        original = int(parameters["original_max_position_embeddings"])
        if (context or min(length, MAX_CONTEXT)) <= original:
            length = original
    more = {"layer_type": layers} if layers else {}
    device = getattr(module, f"{prefix}inv_freq").device
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, device, seq_len=length, **more)
    module.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
    setattr(module, f"{prefix}attention_scaling", scaling)
    return length


@contextlib.contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Let every module compute as when it is served; each gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def eager_attention(model: Any) -> Iterator[bool]:
    """Let the model attend as it is written, without kernels; False if it has no such choice."""
    before = getattr(model.config, "_attn_implementation", None)
    if before == "eager":
        yield True
        return
    try:
        model.set_attn_implementation("eager")
    except (AttributeError, ValueError, ImportError):
        yield False
        return
    try:
        yield model.config._attn_implementation == "eager"
    finally:
        model.set_attn_implementation(before)


def use_exact_attention(model: Any) -> str:
    """Switch the model to eager attention if the one it has differs from it; why, "" if not."""
    import torch

    if getattr(model.config, "_attn_implementation", None) in ("eager", None):
        return ""
    rows = _rows(model)
    with torch.no_grad(), evaluation_mode(model):
        with eager_attention(model) as available:
            if not available:
                return ""
            right = _states(model, rows)
            noise = rounding_noise(model, right, lambda: _states(model, rows))
        dropped = _dropped(model, rows[0])
        why = f"it drops {', '.join(dropped)}" if dropped else ""
        why = why or difference(_states(model, rows), right, noise)
    if not why:
        return ""
    name = model.config._attn_implementation
    model.set_attn_implementation("eager")
    reason = f"attention {name!r} of {type(model).__name__} is not its own ({why})"
    log.warning("%s: eager attention is used, which is slower", reason)
    return reason


def padding_is_exact(model: Any) -> bool:
    """Is a shorter row that is padded on its left what it is by itself?"""
    import torch

    rows = _rows(model)
    with torch.no_grad():
        right = _states(model, rows)
        noise = rounding_noise(model, right, lambda: _states(model, rows))
        return not difference(_padded(model, rows), right, noise)


def rounding_noise(model: Any, right: Any, again: Any) -> float:
    """Mean error that rounding makes in `right`, states that `again` computes; 0 in float32."""
    import torch

    embeddings = model.get_input_embeddings()
    if embeddings.weight.dtype == torch.float32:
        return 0.0

    def nudged(module: Any, inputs: Any, output: Any) -> Any:
        sign = 1 - 2 * (torch.arange(output.shape[-1], device=output.device) % 2)
        return output * (1 + NUDGE * sign.to(output.dtype))

    hook = embeddings.register_forward_hook(nudged)
    try:
        return float((again() - right).abs().mean())
    finally:
        hook.remove()


def difference(states: Any, right: Any, noise: float, wrong: Any = None) -> str:
    """How far states [N, H] are off, "" if by no more than rounding. `noise`: see `rounding_noise`;
    in float32 each of the N has to be right by itself. `wrong`: states as they must not be: half
    precision must tell them apart."""
    scale = float(right.abs().mean())
    errors = (states - right).abs().mean(-1)
    if not noise:
        off, limit = float(errors.max()), FLOAT32_ERROR * scale
    else:
        off, limit = float(errors.mean()), NOISES * noise
        if wrong is not None:
            limit = min(limit, 0.5 * float((wrong - right).abs().mean()))
    return "" if off <= limit else f"off by {off / scale:.1e}, at most {limit / scale:.1e} expected"


def probe_words(model: Any, count: int) -> list[int]:
    """Ids spread over the vocabulary: the first ones are often special tokens, on which half
    precision is off by whole nats."""
    size = model.get_input_embeddings().weight.shape[0]
    return [(101 + 1237 * k) % size for k in range(count)]


def _rows(model: Any) -> list[list[int]]:
    word = probe_words(model, 28)
    return [word[:16], word[16:21], word[21:]]


def _states(model: Any, rows: Sequence[Sequence[int]]) -> Any:
    """Logits [N, V] of all tokens of these rows, each by itself, float32."""
    import torch

    device = model.get_input_embeddings().weight.device
    return torch.cat(
        [
            model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0].float()
            for row in rows
        ]
    )


def _padded(model: Any, rows: Sequence[Sequence[int]]) -> Any:
    """The same from one batch, padded as the sampler pads."""
    import torch

    device, width = model.get_input_embeddings().weight.device, max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + list(r) for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
    ).logits.float()
    return torch.cat([one[width - len(row) :] for one, row in zip(logits, rows, strict=True)])


def _dropped(model: Any, row: Sequence[int]) -> list[str]:
    """What the model gives its attention and SDPA's function does not take: half precision may hide
    it on short rows."""
    import inspect

    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if model.config._attn_implementation != "sdpa":
        return []
    unknown = set(EXTRAS) - set(inspect.signature(sdpa_attention_forward).parameters)
    seen: set[str] = set()

    def record(*inputs: Any, **more: Any) -> Any:
        seen.update(name for name in unknown if more.get(name) is not None)
        return sdpa_attention_forward(*inputs, **more)

    AttentionInterface.register("sdpa", record)
    try:
        _states(model, [row])
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
    return sorted(seen)
