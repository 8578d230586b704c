"""Prompts as trees: their shape by hand, and that a prompt read in a tree is what it is alone."""

from typing import Any

import pytest
import torch

from marlora.rollouts.engines.transformers_prompts import (
    PromptTree,
    as_cache,
    common,
    read,
    read_trees,
    trees_of,
    why_not_shared,
)
from tests.trainers.random_models import random_model

SHOTS = tuple(range(2, 14))
PROMPTS = [(*SHOTS, 20, 21), (*SHOTS, 20), (*SHOTS[:6], 30, 31, 32), (40,), (*SHOTS, 20, 21)]


def test_a_tree_by_hand() -> None:
    (tree,) = trees_of([(1, 2, 4), (5,), (1, 2), (1, 2, 3), (1, 2, 4)])
    assert tree == PromptTree(
        ids=[1, 2, 3, 4, 5],
        depths=[0, 1, 2, 2, 0],
        ends=[4, 4, 3, 4, 5],
        paths={(1, 2): [0, 1], (1, 2, 3): [0, 1, 2], (1, 2, 4): [0, 1, 3], (5,): [4]},
    )
    assert common((1, 2, 3), (1, 2, 4)) == 2 and common((), (1,)) == 0 and common((1,), (1,)) == 1


def test_a_full_tree_is_followed_by_another() -> None:
    """The next tree reads the common begin again; a prompt beyond the limit has one of its own."""
    trees = trees_of([(1, 2, 3), (1, 2, 4), (1, 2, 5), tuple(range(9, 17))], most=4)
    assert [tree.ids for tree in trees] == [[1, 2, 3, 4], [1, 2, 5], list(range(9, 17))]
    read_by = [prompt for tree in trees for prompt in tree.paths]
    assert read_by == [(1, 2, 3), (1, 2, 4), (1, 2, 5), tuple(range(9, 17))]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
@pytest.mark.parametrize("most", [1000, 15])
def test_prompts_of_a_tree_are_what_they_are_alone(family: str, most: int) -> None:
    model = random_model(family)
    with torch.inference_mode():
        found = read_trees(model, trees_of(PROMPTS, most), PROMPTS)
        out = model(
            input_ids=torch.full((len(PROMPTS), 1), 7),
            attention_mask=torch.cat([found.mask, found.mask.new_ones(len(PROMPTS), 1)], 1),
            position_ids=found.mask.sum(1, keepdim=True),
            past_key_values=as_cache(found.keys, found.values),
        )
        assert found.mask.sum(1).tolist() == [14, 13, 9, 1, 14]
        for row, prompt in enumerate(PROMPTS):
            alone = model(input_ids=torch.tensor([[*prompt, 7]])).logits[0, -2:]
            assert torch.allclose(found.logits[row], alone[0], atol=2e-5)
            assert torch.allclose(out.logits[row, 0], alone[1], atol=2e-5)


def test_trees_are_read_only_where_they_are_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read_tokens = random_model(), []
    forward = type(model).forward

    def counted(self: Any, *args: Any, **inputs: Any) -> Any:
        read_tokens.append(tuple(inputs["input_ids"].shape))
        return forward(self, *args, **inputs)

    monkeypatch.setattr(type(model), "forward", counted)
    with torch.inference_mode():
        for prompts in (PROMPTS, [(2, 3, 4), (5, 6, 7)], [SHOTS] * 8):
            assert len(read(model, prompts).logits) == len(prompts)
    # 18 different tokens of 4 x 14 padded ones; nothing in common; one prompt for eight siblings
    assert read_tokens == [(1, 18), (2, 3), (1, 12)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_keep_every_key_share(dtype: torch.dtype) -> None:
    assert why_not_shared(random_model("llama").to(dtype)) == ""


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("gemma3_text", {}, "DynamicSlidingWindowLayer"),
        ("mistral", {"sliding_window": 8}, "DynamicSlidingWindowLayer"),
        ("lfm2", {"layer_types": ["full_attention", "conv"]}, "its cache is made of"),
        ("recurrent_gemma", {"block_types": ["attention", "recurrent"], "lru_width": 16}, ""),
    ],
)
def test_models_whose_cache_cannot_be_cut_say_why(
    family: str, settings: dict[str, Any], why: str
) -> None:
    reason = why_not_shared(random_model(family, **settings))
    assert reason and why in reason


def test_attention_that_does_not_follow_the_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    forward = type(model).forward

    def causal(self: Any, *args: Any, attention_mask: Any = None, **inputs: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = None
        return forward(self, *args, attention_mask=attention_mask, **inputs)

    monkeypatch.setattr(type(model), "forward", causal)
    assert "off by" in why_not_shared(model)
