"""Log-probabilities and entropies of a batch's terms under a model, exactly where a next token is
trained.

The decoder runs once over the rows; the LM head runs on the terms' hidden states only, in chunks,
so no [R, L, vocabulary] logits ever exist. A model whose head is not
`final_logit_softcapping(lm_head(hidden))` is found by comparison at first use and goes through its
own forward instead.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from peft import PeftModel

from ...rollouts.engines.transformers_exactness import evaluation_mode, probe_words
from ..batching.batches import Batch
from .adapters import active_adapters
from .layouts import model_inputs
from .lm_head import logits_of, of_logits, score
from .tree_attention import text_config

log = logging.getLogger(__name__)

_own_head: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def token_logprobs(
    model: Any, batch: Batch, *, chunk: int | None = None, entropy_grad: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(target) and entropy of every term [N], float32, at each term's own temperature.

    Args:
        model: a causal language model or its PEFT wrapper, with the batch's adapter active
            (`Adapters.active`), and still active in backward: anything else raises RuntimeError
            there, because gradient checkpointing would compute another policy.
        chunk: terms whose logits exist at the same time, see `lm_head.score`.
        entropy_grad: let gradients flow through the entropy as well (an entropy bonus).
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if base not in _own_head:
        _own_head[base] = _head_works(base)
    # Terms of trees often are one and the same (equal replies, siblings that begin alike): each is
    # scored once.
    key = torch.stack(
        [
            batch.row.double(),
            batch.column.double(),
            batch.temperature.double(),
            batch.target.double(),
        ],
        dim=1,
    )
    terms, term = key.unique(dim=0, return_inverse=True)  # [U, 4], [N]
    row, column, temperature, target = (
        terms[:, 0].long(),
        terms[:, 1].long(),
        terms[:, 2].float(),
        terms[:, 3].long(),
    )
    if _own_head[base]:
        hidden, cap = (
            last_hidden(model, batch, row, column),
            getattr(text_config(base), "final_logit_softcapping", None),
        )
        head = base.get_output_embeddings()
        logp, entropy = score(
            head, cap, hidden, target, temperature, chunk=chunk, entropy_grad=entropy_grad
        )
    else:  # the model's own head, on the union of the terms' columns
        columns, where = column.unique(return_inverse=True)
        logits = base(**model_inputs(base, batch), logits_to_keep=columns).logits[row, where]
        logp, entropy = of_logits(logits, target, temperature, entropy_grad)
    return guarded(model, logp[term]), entropy[term]


def last_hidden(model: Any, batch: Batch, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """The decoder's last hidden states at these positions of the batch's rows, [U, H] in the
    model's dtype."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.get_decoder()(**model_inputs(base, batch)).last_hidden_state[row, column]


def guarded(model: Any, values: torch.Tensor) -> torch.Tensor:
    """`values` of a forward pass, whose backward raises RuntimeError unless the same adapters are
    active then."""
    if values.requires_grad and isinstance(model, PeftModel):
        values.register_hook(_same_adapter(model, active_adapters(model)))
    return values


def _same_adapter(model: Any, then: tuple[str, ...]) -> Any:
    def check(grad: torch.Tensor) -> None:
        if active_adapters(model) != then:
            raise RuntimeError(
                f"backward with adapters {active_adapters(model)} active, the forward ran with"
                f" {then}: put it inside active()"
            )

    return check


@torch.no_grad()
def _head_works(base: Any) -> bool:
    """True if the decoder's last hidden state, through our head, gives the model's own logits."""
    device = base.get_input_embeddings().weight.device
    ids = torch.tensor([probe_words(base, 8)], device=device)
    cap = getattr(text_config(base), "final_logit_softcapping", None)
    try:
        with evaluation_mode(base):
            expected = base(input_ids=ids, use_cache=False).logits.float()
            ours = logits_of(
                base.get_output_embeddings(),
                cap,
                base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state,
            ).float()
        works = ours.shape == expected.shape and torch.allclose(
            ours, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        )
        why = "its logits are not lm_head(hidden state)"
    except (AttributeError, TypeError, KeyError) as error:
        works, why = False, f"{type(error).__name__}: {error}"
    if not works:
        log.warning(
            "%s: %s; log-probs go through the model's own head, which needs more memory",
            type(base).__name__,
            why,
        )
    return works
