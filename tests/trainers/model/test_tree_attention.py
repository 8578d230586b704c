"""Attention by branches against a dense mask, for every shape of tree; FlexAttention; what a model
has to hand on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marlora.agents.types import AdapterSpec, PolicySpec, SettingError
from marlora.trainers.batching.batches import Batch, pack
from marlora.trainers.batching.prefix_trees import branches
from marlora.trainers.batching.samples import TrainingSequence
from marlora.trainers.model import tree_attention
from marlora.trainers.model.adapters import Adapters
from marlora.trainers.model.layouts import choose_layout, forced, way_of
from marlora.trainers.model.logprobs import last_hidden, token_logprobs
from marlora.trainers.model.tree_attention import NAME, tree_attention_forward
from tests.trainers.random_models import disturb, random_model

HEADS, KEY_HEADS, SIZE = 4, 2, 8


def sample(ids: list[int], first: int, episode: str, policy: str = "a") -> TrainingSequence:
    mask = tuple(int(i >= first) for i in range(len(ids)))
    zeros = (0.0,) * len(ids)
    return TrainingSequence(
        policy,
        episode,
        tuple(ids),
        mask,
        zeros,
        tuple(map(float, mask)),
        (1.0,) * len(ids),
        tuple(m - 1 for m in mask),
    )


def packed(
    pairs: list[tuple[list[int], list[int]]], budget: int = 1000, **settings: Any
) -> list[Batch]:
    samples = [
        sample(prompt + reply, len(prompt), str(i)) for i, (prompt, reply) in enumerate(pairs)
    ]
    return pack(samples, max_tokens=budget, **settings)


def drawn(batch: Batch) -> list[torch.Tensor]:
    """Queries, keys and values of the batch's rows, laid out as models lay them out."""
    rows, length = batch.input_ids.shape
    generator = torch.Generator().manual_seed(length)
    shapes = [(rows, length, heads, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(s, generator=generator, requires_grad=True) for s in shapes]


def module(window: int | None) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(sliding_window=window),
        layer_idx=0,
        training=True,
        num_key_value_groups=2,
    )


def dense(
    batch: Batch, qkv: list[torch.Tensor], window: int | None, softcap: float | None
) -> torch.Tensor:
    """The plainest thing: all scores, those that are not seen at minus infinity."""
    q, k, v = (x.transpose(1, 2) for x in qkv)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = q @ k.transpose(-1, -2) * SIZE**-0.5
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    sees, depth = batch.visible_keys(), batch.position_ids
    if window:
        sees = sees & (depth[:, None, :, None] - depth[:, None, None, :] < window)
    return (torch.softmax(scores.masked_fill(~sees, -torch.inf), -1) @ v).transpose(1, 2)


def by_branches(
    batch: Batch, qkv: list[torch.Tensor], window: int | None, softcap: float | None
) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv)
    mask = tree_attention.empty_mask(q.device)
    return tree_attention_forward(
        module(window),
        q,
        k,
        v,
        mask,
        tree=batch.tree,
        scaling=SIZE**-0.5,
        sliding_window=window,
        softcap=softcap,
    )[0]


def test_a_tree_is_cut_where_it_forks() -> None:
    (batch,) = packed(
        [([2, 3, 4], [5, 6, 0]), ([2, 3, 4], [5, 7, 8, 0]), ([2, 3, 4], [9, 0]), ([30, 31], [0])]
    )
    found = branches(batch.position_ids, batch.subtree_end, batch.attention_mask.sum(1).tolist())
    ids = batch.input_ids[0].tolist()
    assert sorted(
        ([ids[i] for a, b in x.ancestors for i in range(a, b)], ids[x.start : x.end], x.depth)
        for x in found
    ) == [
        ([], [2, 3, 4], 0),
        ([], [30, 31], 0),
        ([2, 3, 4], [5], 3),
        ([2, 3, 4], [9], 3),
        ([2, 3, 4, 5], [6], 4),
        ([2, 3, 4, 5], [7, 8], 4),
    ]
    blocks = batch.tree.blocks
    assert sum(block.branches for block in blocks) == 6 and len(blocks) == 2, (
        "roots together, and all that hangs on them"
    )
    assert batch.tree.forks and not packed([([2], [3]), ([4], [5])])[0].tree.forks


tokens = st.lists(st.integers(2, 3), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(tokens, tokens), min_size=1, max_size=7),
    st.sampled_from([None, 2, 3]),
    st.sampled_from([None, 1.5]),
    st.sampled_from(["shared", "packed", "masked"]),
)
def test_branches_are_the_dense_mask_whatever_is_shared(pairs, window, softcap, layout) -> None:
    """Duplicates, prefixes, single tokens, disjoint samples, deep forks, rows with padding: outputs
    and gradients."""
    for batch in packed(pairs, budget=25, layout=layout):
        if batch.subtree_end is None:
            continue
        qkv = drawn(batch)
        weight = (
            torch.randn(1, generator=torch.Generator().manual_seed(1))
            * batch.attention_mask[:, :, None, None]
        )
        ours, theirs = (f(batch, qkv, window, softcap) for f in (by_branches, dense))
        assert (ours - theirs)[batch.attention_mask].abs().max() < 1e-5
        grads = [torch.autograd.grad((out.sin() * weight).sum(), qkv) for out in (ours, theirs)]
        for mine, his in zip(*grads, strict=True):
            assert (mine - his).norm() <= 1e-5 * his.norm() + 1e-7


def test_long_branches_make_blocks_of_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marlora.trainers.batching.prefix_trees.MAX_BLOCK", 200)
    (batch,) = packed([([2] * 40, [3 + g] * 12) for g in range(6)])
    blocks = batch.tree.blocks
    assert len(blocks) == 7 and all(b.branches == 1 for b in blocks)
    qkv = drawn(batch)
    assert torch.allclose(
        by_branches(batch, qkv, None, None), dense(batch, qkv, None, None), atol=1e-5
    )


@pytest.mark.slow  # it compiles a kernel
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_flex_attention_sees_the_same(family: str) -> None:
    """Without gradients it runs on a CPU too, which is as far as it can be tested there."""
    model = random_model(family, **({"sliding_window": 6} if family == "gemma2" else {}))
    (batch,) = packed([([2] * 9, [3 + g, 4, 5, 6]) for g in range(3)] + [([20, 21], [22, 23])])
    assert way_of(model) == "branches"
    with torch.no_grad():
        right = last_hidden(model, batch, batch.row, batch.column)
        with forced(model, "flex"):
            flex = last_hidden(model, batch, batch.row, batch.column)
    assert torch.allclose(right, flex, atol=1e-4)


def test_flex_attention_says_that_it_has_no_backward_on_a_cpu() -> None:
    adapters = Adapters(
        random_model(), [PolicySpec("a", adapter=AdapterSpec(2, 4.0, ("q_proj",)))], seed=0
    )
    (batch,) = packed([([2, 3], [4]), ([2, 3], [5])])
    with (
        adapters.active("a") as model,
        forced(model, "flex"),
        pytest.raises(NotImplementedError, match="no backward pass on the CPU"),
    ):
        token_logprobs(model, batch)


def test_a_model_is_asked_once_and_told_what_it_lacks(caplog: pytest.LogCaptureFixture) -> None:
    model = random_model()
    assert (
        choose_layout(model) == "shared"
        and way_of(model) == "branches"
        and model.config._attn_implementation == NAME
    )
    eager = random_model()
    eager.set_attn_implementation("eager")
    assert choose_layout(eager) == "masked" and "its attention is 'eager', not sdpa" in caplog.text
    assert eager.config._attn_implementation == "eager"
    keeps = random_model()
    run = keeps.model.forward
    keeps.model.forward = lambda tree=None, **inputs: run(**inputs)
    assert choose_layout(keeps) == "masked" and "does not pass keyword arguments on" in caplog.text
    assert keeps.config._attn_implementation == "sdpa", "what does not work is taken back"


def test_sequences_are_told_apart_by_positions_where_masks_are_not_followed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    deaf = random_model()
    run = deaf.model.forward

    def forward(attention_mask: Any = None, **inputs: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() == 4:
            raise TypeError("takes masks of two dimensions")
        return run(attention_mask=attention_mask, **inputs)

    deaf.model.forward = forward
    assert choose_layout(deaf) == "packed" and way_of(deaf) == "positions"
    assert (
        "prefixes are not shared in the update, rows are packed: " in caplog.text
        and "takes masks of two" in caplog.text
    )
    with pytest.raises(SettingError, match="layout: shared rows cannot be used"):
        choose_layout(deaf, "shared")
    pairs = [([2] * 9, [3 + g, 4, 5]) for g in range(3)]
    (row,), (tree,), (plain,) = (
        packed(pairs, layout=kind) for kind in ("packed", "shared", "padded")
    )
    with torch.no_grad():
        assert row.input_ids.shape[0] == 1
        assert torch.allclose(
            token_logprobs(deaf, row)[0], token_logprobs(deaf, plain)[0], atol=1e-5
        )
        with pytest.raises(ValueError, match="pack it as choose_layout says"):
            token_logprobs(deaf, tree)


def test_what_a_tree_cannot_have_is_refused() -> None:
    (batch,) = packed([([2, 3], [4, 5]), ([2, 3], [6, 5])])
    q, k, v = (x.transpose(1, 2) for x in drawn(batch))
    mask = tree_attention.empty_mask(q.device)
    with pytest.raises(NotImplementedError, match="s_aux"):
        tree_attention_forward(
            module(None), q, k, v, mask, tree=batch.tree, s_aux=torch.zeros(HEADS)
        )
    with pytest.raises(NotImplementedError, match="a window that the layer was not given"):
        tree_attention_forward(module(4), q, k, v, mask, tree=batch.tree)
    linear = random_model("qwen2")
    linear.config.layer_types = ["linear_attention", "full_attention"]
    assert "it has layers of linear_attention" in tree_attention.install(linear)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_half_precision_trains_the_same_within_its_noise(family: str) -> None:
    """A bfloat16 base, recomputed: trees are as far from float32 as separate rows are."""
    pairs = [([2, 9, 4, 7] * 6, [3 + g, 4, 20 + g, 6]) for g in range(4)]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        adapters = Adapters(
            random_model(family).to(dtype),
            [PolicySpec("a", adapter=AdapterSpec(2, 4.0, ("q_proj", "v_proj")))],
            seed=0,
        )
        disturb(adapters)
        assert choose_layout(adapters.model) == "shared" and way_of(adapters.model) == "branches"
        adapters.checkpoint_activations()
        parameters = adapters.parameters("a")
        for layout in ("padded", "shared"):
            for p in parameters.values():
                p.grad = None
            with adapters.active("a") as model:
                for batch in packed(pairs, layout=layout):
                    token_logprobs(model, batch)[0].sum().backward()
            found[dtype, layout] = torch.cat([p.grad.flatten() for p in parameters.values()])
    right = found[torch.float32, "padded"]
    assert (found[torch.float32, "shared"] - right).norm() < 1e-5 * right.norm()
    noise, ours = (
        (found[torch.bfloat16, layout] - right).norm() / right.norm()
        for layout in ("padded", "shared")
    )
    assert ours < max(2 * noise, 0.02) and noise < 0.3
