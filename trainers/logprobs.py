"""Log-probabilities and entropies of a batch's terms under a model, exactly where a next token is trained.

The decoder runs once over the rows; the LM head runs on the terms' hidden states only, in chunks that are computed again in
backward, so no [R, L, vocabulary] logits ever exist. A model whose head is not `final_logit_softcapping(lm_head(hidden))`
is found by comparison at first use and goes through its own forward instead.
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from typing import Any

import torch
from peft import PeftModel
from torch.utils.checkpoint import checkpoint

from ..agents.types import SettingError
from .adapters import speaking
from .batches import Batch, Layout, pack
from .samples import Sample

log = logging.getLogger(__name__)

_own_head: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def token_logprobs(model: Any, batch: Batch, *, chunk: int = 1024, entropy_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(target) and entropy of every term [N], float32, at each term's own temperature.

    Args:
        model: a causal language model or its PEFT wrapper, with the batch's adapter active (`Adapters.active`), and still active
            in backward: anything else raises RuntimeError there, because gradient checkpointing would compute another policy.
        chunk: positions whose logits exist at the same time.
        entropy_grad: let gradients flow through the entropy as well (an entropy bonus).
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if base not in _own_head:
        _own_head[base] = _head_works(base)
    # Terms of shared rows often stand at one position (equal replies, siblings): the head runs once per position and temperature.
    key = torch.stack([batch.row.double(), batch.column.double(), batch.temperature.double()], dim=1)
    places, place = key.unique(dim=0, return_inverse=True)  # [U, 3], [N]
    row, column, temperature = places[:, 0].long(), places[:, 1].long(), places[:, 2].float()
    if _own_head[base]:
        hidden = last_hidden(model, batch, row, column)
    else:  # the model's own head, on the union of the terms' columns
        columns, where = column.unique(return_inverse=True)
        hidden = base(**_inputs(base, batch), logits_to_keep=columns).logits[row, where]
    order = place.argsort(stable=True)
    parts = []
    for i in range(0, len(places), chunk):
        mine = order[(place[order] >= i) & (place[order] < i + chunk)]
        parts.append(
            _score(base, hidden[i : i + chunk], temperature[i : i + chunk], place[mine] - i, batch.target[mine], entropy_grad)
        )
    back = order.argsort()
    logp, entropy = torch.cat([p[0] for p in parts])[back], torch.cat([p[1] for p in parts])[back]
    return guarded(model, logp), entropy


def last_hidden(model: Any, batch: Batch, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """The decoder's last hidden states at these positions of the batch's rows, [U, H] in the model's dtype."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.get_decoder()(**_inputs(base, batch)).last_hidden_state[row, column]


def guarded(model: Any, values: torch.Tensor) -> torch.Tensor:
    """`values` of a forward pass, whose backward raises RuntimeError unless the same adapters are active then."""
    if values.requires_grad and isinstance(model, PeftModel):
        values.register_hook(_same_adapter(model, speaking(model)))
    return values


def _inputs(base: Any, batch: Batch) -> dict[str, Any]:
    masks = _masks(base, batch)
    return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": masks, "use_cache": False}


def _score(
    base: Any, hidden: torch.Tensor, temperature: torch.Tensor, place: torch.Tensor, target: torch.Tensor, entropy_grad: bool
) -> Any:
    """(log p(target) [M], entropy [M]) of terms at positions `place` [M] of `hidden` [U, H]."""

    def score(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = _head(base, hidden) if _own_head[base] else hidden
        logps = torch.log_softmax(logits.float() / temperature[:, None], dim=-1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_grad):
            entropy = -(logps.exp() * logps).sum(-1)
        return logps[place, target], entropy[place]

    return checkpoint(score, hidden, use_reentrant=False) if torch.is_grad_enabled() else score(hidden)


def _head(base: Any, hidden: torch.Tensor) -> torch.Tensor:
    logits = base.get_output_embeddings()(hidden)
    cap = getattr(_text_config(base), "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def _text_config(base: Any) -> Any:
    return base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config


def _masks(base: Any, batch: Batch) -> Any:
    """The mask in the form the model takes: 2-D for plain rows; additive 4-D for shared ones, per kind of layer if it has two."""
    if batch.reach is None:
        return batch.attention_mask
    config, sees = _text_config(base), batch.sees()
    dtype = base.get_input_embeddings().weight.dtype

    def additive(allowed: torch.Tensor) -> torch.Tensor:
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)

    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if kinds != {"full_attention"} else None
    if not window or int(batch.position_ids.max()) < window:
        return additive(sees)
    near = sees & (batch.position_ids[:, None, :, None] - batch.position_ids[:, None, None, :] < window)
    if kinds == {"full_attention", "sliding_attention"}:
        return {"full_attention": additive(sees), "sliding_attention": additive(near)}
    return additive(near)


def _same_adapter(model: Any, then: tuple[str, ...]) -> Any:
    def check(grad: torch.Tensor) -> None:
        if speaking(model) != then:
            raise RuntimeError(
                f"backward with adapters {speaking(model)} active, the forward ran with {then}: put it inside active()"
            )

    return check


@torch.no_grad()
def _head_works(base: Any) -> bool:
    """True if the decoder's last hidden state, through our head, gives the model's own logits."""
    device = base.get_input_embeddings().weight.device
    ids = torch.tensor([_words(base, 8)], device=device)
    training = base.training
    base.eval()
    try:
        expected = base(input_ids=ids, use_cache=False).logits.float()
        ours = _head(base, base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state).float()
        works = ours.shape == expected.shape and torch.allclose(ours, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        why = "its logits are not lm_head(hidden state)"
    except (AttributeError, TypeError, KeyError) as error:
        works, why = False, f"{type(error).__name__}: {error}"
    finally:
        base.train(training)
    if not works:
        log.warning("%s: %s; log-probs go through the model's own head, which needs more memory", type(base).__name__, why)
    return works


def choose_layout(model: Any, layout: Layout = "auto") -> Layout:
    """The layout `pack` may use with this model. Tries a shared row of random tokens against padded ones.

    `auto` becomes `padded`, with a warning, where sharing is not exact: dropout, or attention that does not follow a 4-D mask.
    An explicit `shared` raises `SettingError` there.
    """
    if layout == "padded":
        return layout
    why = _why_not_shared(model)
    if why and layout == "shared":
        raise SettingError(f"layout: shared rows cannot be used with this model ({why}); set layout to auto or padded")
    if why:
        log.warning("prefixes are not shared in the update: %s", why)
    return "padded" if why else layout


def _why_not_shared(model: Any) -> str:
    """Why shared rows would not be exact; "" if they are."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    dropout = next((n for n, m in base.named_modules() if isinstance(m, torch.nn.Dropout) and m.p > 0), None)
    if dropout or getattr(_text_config(base), "attention_dropout", 0.0):
        return f"dropout is on ({dropout or 'attention_dropout'}), and tokens of a shared prefix would be dropped together"
    word = _words(base, 30)
    samples = [_probe_sample((*word[:8], *tail)) for tail in (word[8:16], [*word[8:10], *word[16:22]], word[22:])]
    training = base.training
    base.eval()
    weight = base.get_input_embeddings().weight
    try:
        with torch.no_grad():
            (shared,), (padded,) = (pack(samples, max_tokens=1000, layout=kind) for kind in ("shared", "padded"))
            blind = dataclasses.replace(shared, reach=None)  # what it would be if every branch saw those before it
            right, tree, wrong = (_by_turn(b, token_logprobs(model, b.to(weight.device))[0]) for b in (padded, shared, blind))
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        return f"{type(base).__name__} does not take a 4-D mask: {type(error).__name__}: {error}"
    finally:
        base.train(training)
    # Half precision moves log-probs by 0.1 and more, so the error is measured against that of a mask without effect.
    noise = 1e-5 if weight.dtype == torch.float32 else 1e-2
    if (tree - right).abs().mean() > max(noise, 0.5 * float((wrong - right).abs().mean())):
        return f"attention of {type(base).__name__} does not follow a 4-D mask"
    return ""


def _by_turn(batch: Batch, logp: torch.Tensor) -> torch.Tensor:
    """Terms in an order that does not depend on the layout: by episode, turn, position."""
    keys = [(*batch.turns[s], i) for i, s in enumerate(batch.sequence.tolist())]
    return logp[torch.tensor([k[2] for k in sorted(keys)], device=logp.device)]


def _words(base: Any, count: int) -> list[int]:
    """Ids spread over the vocabulary: the first ones are often special tokens, on which half precision is off by whole nats."""
    return [(101 + 1237 * k) % base.get_input_embeddings().weight.shape[0] for k in range(count)]


def _probe_sample(ids: tuple[int, ...]) -> Sample:
    trained = tuple(int(i >= 8) for i in range(len(ids)))
    zeros = (0.0,) * len(ids)
    return Sample("probe", str(ids), ids, trained, zeros, zeros, (1.0,) * len(ids), tuple(m - 1 for m in trained))
