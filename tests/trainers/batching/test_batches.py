"""The oracle: every layout, padding, micro-batch size and deal gives the gradients of one unpadded
sequence at a time."""

import dataclasses
import functools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marlora.agents.types import AdapterSpec, PolicySpec, SettingError
from marlora.trainers.batching.batches import Batch, pack, split_over_ranks
from marlora.trainers.batching.samples import TrainingSequence
from marlora.trainers.model.adapters import Adapters
from marlora.trainers.model.layouts import choose_layout, forced, way_of
from marlora.trainers.model.logprobs import _head_works, token_logprobs
from tests.trainers.random_models import FAMILIES, VOCAB, disturb, random_model

TARGETS = AdapterSpec(r=2, alpha=4.0, targets=("q_proj", "v_proj", "down_proj"))


def sample(
    ids: list[int],
    trained: list[int],
    policy: str = "a",
    episode: str = "e",
    turns: list[int] | None = None,
) -> TrainingSequence:
    """A sample whose `trained` positions have advantages, behaviour and temperatures that depend on
    the position only."""
    mask = tuple(int(i in trained) for i in range(len(ids)))
    numbers = dict(zip(trained, turns or [0] * len(trained), strict=True))
    return TrainingSequence(
        policy,
        episode,
        tuple(ids),
        mask,
        tuple(-1.0 - 0.01 * i if m else 0.0 for i, m in enumerate(mask)),
        tuple(math.sin(i + len(ids)) if m else 0.0 for i, m in enumerate(mask)),
        tuple((0.7 if i % 2 else 1.3) if m else 1.0 for i, m in enumerate(mask)),
        tuple(numbers.get(i, -1) for i in range(len(ids))),
    )


def crowd(seed: int = 0) -> list[TrainingSequence]:
    """Two prompts with several replies each, chats of two turns, a duplicate, a prefix of another,
    a lone one; eos inside."""
    rng = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [rng.choice([1, *range(2, VOCAB)]) for _ in range(n)]

    made: list[TrainingSequence] = []
    for p in range(2):
        prompt = tokens(9 + 4 * p)
        for g in range(3):
            first, glue, second = tokens(2 + g), tokens(3), tokens(1 + g)
            ids = prompt + first + glue + second
            start = len(prompt)
            trained = [*range(start, start + len(first)), *range(len(ids) - len(second), len(ids))]
            made.append(
                sample(ids, trained, episode=f"{p}.{g}", turns=[0] * len(first) + [4] * len(second))
            )
        made.append(
            sample(prompt + first, list(range(start, start + len(first))), episode=f"{p}.prefix")
        )
    made.append(dataclasses.replace(made[0], episode="twin"))
    made.append(sample(tokens(3), [2], episode="short"))
    return made


def terms_of(batches: list[Batch], model) -> tuple[dict, torch.Tensor]:
    """logp per (episode, turn, place in turn), and the sum of the losses: a nonlinear function of
    every field of a term."""
    found, losses = {}, []
    for batch in batches:
        logp, entropy = token_logprobs(model, batch, chunk=7, entropy_grad=True)
        place: dict[int, int] = {}
        for i, s in enumerate(batch.sequence.tolist()):
            place[s] = place.get(s, -1) + 1
            found[(*batch.turns[s], place[s])] = (logp[i].item(), entropy[i].item())
        losses.append((batch.advantage * torch.exp(logp - batch.behaviour) - 0.1 * entropy).sum())
    return found, sum(losses, torch.zeros(()))


def gradients(adapters: Adapters, batches: list[Batch]) -> tuple[dict, torch.Tensor]:
    parameters = adapters.parameters("a")
    for p in parameters.values():
        p.grad = None
    with adapters.active("a") as model:
        found, loss = terms_of(batches, model)
        loss.backward()
    return found, torch.cat([p.grad.flatten() for p in parameters.values()])


def single(s: TrainingSequence) -> Batch:
    return pack([s], max_tokens=1, layout="padded")[0]


def left_padded(samples: list[TrainingSequence]) -> Batch:
    """One batch with padding in front, made by hand."""
    rows = [single(s) for s in samples]
    length = max(b.input_ids.shape[1] for b in rows)
    gaps = [length - b.input_ids.shape[1] for b in rows]
    offsets = [sum(len(b.turns) for b in rows[:i]) for i in range(len(rows))]

    def front(name: str) -> torch.Tensor:
        return torch.cat(
            [
                torch.nn.functional.pad(getattr(b, name), (g, 0), value=1)
                for b, g in zip(rows, gaps, strict=True)
            ]
        )

    return Batch(
        "a",
        front("input_ids"),
        front("position_ids"),
        torch.cat(
            [
                torch.nn.functional.pad(b.attention_mask, (g, 0))
                for b, g in zip(rows, gaps, strict=True)
            ]
        ),
        None,
        torch.cat([b.row + i for i, b in enumerate(rows)]),
        torch.cat([b.column + g for b, g in zip(rows, gaps, strict=True)]),
        *(
            torch.cat([getattr(b, n) for b in rows])
            for n in ("target", "behaviour", "advantage", "temperature", "calls")
        ),
        torch.cat([b.sequence + o for b, o in zip(rows, offsets, strict=True)]),
        tuple(t for b in rows for t in b.turns),
        torch.arange(sum(b.num_terms for b in rows)),
    )


LAYOUTS = {
    "one by one": lambda s: [single(x) for x in s],
    "padded": lambda s: pack(s, max_tokens=10_000, layout="padded"),
    "padded, small": lambda s: pack(s, max_tokens=40, layout="padded"),
    "left": lambda s: [left_padded(s)],
    "shared": lambda s: pack(s, max_tokens=10_000, layout="shared"),
    "shared, small": lambda s: pack(s, max_tokens=30, layout="shared"),
    "masked": lambda s: pack(s, max_tokens=200, layout="masked"),
    "dense mask": lambda s: pack(s, max_tokens=60, layout="shared"),
    "packed": lambda s: pack(s, max_tokens=10_000, layout="packed"),
    "two ranks": lambda s: [
        b for rank in split_over_ranks(pack(s, max_tokens=60), 2) for b in rank
    ],
    "another order": lambda s: pack(s[::-1], max_tokens=60),
}
WINDOWS = {
    "mistral, window": ("mistral", {"sliding_window": 6}),
    "qwen2, window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "gemma2, window": ("gemma2", {"sliding_window": 6}),
}


def one_by_one(model, samples: list[TrainingSequence]) -> tuple[dict, torch.Tensor]:
    """The plainest thing: full logits of every sample alone, no padding, no mask."""
    found, losses = {}, []
    for s in samples:
        logits = model(input_ids=torch.tensor([s.ids]), use_cache=False).logits[0]
        place: dict[int, int] = {}
        for i, trained in enumerate(s.mask):
            if trained:
                logps = torch.log_softmax(logits[i - 1] / s.temperatures[i], -1)
                entropy = -(logps.exp() * logps).sum()
                turn = s.sequence[i]
                place[turn] = place.get(turn, -1) + 1
                found[(s.episode, turn, place[turn])] = (logps[s.ids[i]].item(), entropy.item())
                losses.append(
                    s.advantages[i] * torch.exp(logps[s.ids[i]] - s.logprobs[i]) - 0.1 * entropy
                )
    return found, torch.stack(losses).sum()


@pytest.mark.parametrize("family", [*FAMILIES, *WINDOWS, "cohere"])
def test_every_layout_gives_the_same_gradients(family):
    name, more = WINDOWS.get(family, (family, {}))
    adapters = Adapters(
        random_model(name, **more),
        [PolicySpec("a", adapter=TARGETS), PolicySpec("b", adapter=TARGETS)],
        seed=0,
    )
    disturb(adapters)
    samples = crowd()
    base = adapters.model.get_base_model()
    with adapters.active("a") as model:
        base.set_attn_implementation(
            "eager"
        )  # another attention, which also caps scores as Gemma 2 wants it
        expected, loss = one_by_one(model, samples)
        loss.backward()
        base.set_attn_implementation("sdpa")
        assert choose_layout(model, "shared") == "shared" and way_of(model) == "branches"
    truth = torch.cat([p.grad.flatten() for p in adapters.parameters("a").values()])
    assert truth.norm() > 1e-2
    for checkpointing in (False, True):
        if checkpointing:
            adapters.checkpoint_activations()
            adapters.model.train()
        for kind, layout in LAYOUTS.items():
            if (checkpointing or family != "llama") and kind not in (
                "left",
                "padded",
                "shared",
                "shared, small",
                "dense mask",
            ):
                continue
            with forced(adapters.model, "mask" if kind in ("masked", "dense mask") else "branches"):
                found, grad = gradients(adapters, layout(samples))
            assert found.keys() == expected.keys(), kind
            for key, values in expected.items():
                assert found[key] == pytest.approx(values, abs=1e-4), (kind, key)
            assert ((grad - truth).norm() / truth.norm()).item() < 1e-5, kind
    assert all(p.grad is None for p in adapters.parameters("b").values())


tokens = st.lists(st.integers(2, 4), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=6), st.integers(8, 40))
def test_a_tree_holds_every_sample_whatever_they_share(pairs, budget):
    """Duplicates, prefixes, single tokens, disjoint and last-token differences: each term sees
    exactly its own sample's past."""
    samples = [
        sample(prompt + reply, list(range(len(prompt), len(prompt) + len(reply))), episode=str(i))
        for i, (prompt, reply) in enumerate(pairs)
    ]
    for layout in ("shared", "packed", "masked", "padded"):
        batches = pack(samples, max_tokens=budget, layout=layout)
        seen: dict[str, list[tuple]] = {}
        for batch in batches:
            sees = batch.visible_keys()
            rows, length = batch.input_ids.shape
            assert rows == 1 or rows * length <= budget
            for r, c, target, s in zip(
                batch.row, batch.column, batch.target, batch.sequence, strict=True
            ):
                visible = sees[r, 0, c].nonzero()[:, 0]
                assert batch.position_ids[r, visible].tolist() == list(range(len(visible)))
                past = tuple(batch.input_ids[r, visible].tolist())
                seen.setdefault(batch.turns[s][0], []).append((past, int(target)))
        for i, (prompt, reply) in enumerate(pairs):
            whole = prompt + reply
            assert seen[str(i)] == [
                (tuple(whole[:j]), whole[j]) for j in range(len(prompt), len(whole))
            ]


@functools.cache
def small_team() -> Adapters:
    adapters = Adapters(random_model(), [PolicySpec("a", adapter=TARGETS)], seed=0)
    disturb(adapters)
    return adapters


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(tokens, tokens), min_size=1, max_size=6),
    st.integers(8, 60),
    st.sampled_from([1, 2, 3]),
)
def test_gradients_are_those_of_separate_rows_whatever_they_share(pairs, budget, ranks):
    """The same trees through a model: by branches and by a dense mask, in one go or many, on one
    rank or several."""
    samples = [
        sample(prompt + reply, list(range(len(prompt), len(prompt) + len(reply))), episode=str(i))
        for i, (prompt, reply) in enumerate(pairs)
    ]
    adapters = small_team()
    expected, truth = gradients(adapters, [single(s) for s in samples])
    for way, layout in (
        ("branches", "shared"),
        ("branches", "packed"),
        ("mask", "shared"),
        ("mask", "masked"),
    ):
        dealt = split_over_ranks(
            pack(samples, max_tokens=budget, layout=layout, parts=ranks), ranks
        )
        with forced(adapters.model, way):
            parts = [gradients(adapters, batches) for batches in dealt if batches]
        found = {key: value for part, _ in parts for key, value in part.items()}
        assert found.keys() == expected.keys()
        assert all(
            found[key] == pytest.approx(values, abs=1e-4) for key, values in expected.items()
        )
        assert (sum(grad for _, grad in parts) - truth).norm() <= 1e-5 * truth.norm(), (way, layout)


def test_a_shared_row_computes_every_token_once_and_the_terms_stay():
    prompt = list(range(2, 12))
    samples = [sample(prompt + [20 + g, 30 + g, 5], [10, 11, 12], episode=str(g)) for g in range(4)]
    (batch,) = pack(samples, max_tokens=100, layout="shared")
    assert batch.input_ids.tolist() == [[*prompt, 20, 30, 21, 31, 22, 32, 23, 33]]
    assert batch.position_ids.tolist() == [[*range(10), 10, 11, 10, 11, 10, 11, 10, 11]]
    assert batch.subtree_end.tolist() == [[18] * 10 + [12, 12, 14, 14, 16, 16, 18, 18]]
    assert batch.column.tolist() == [9, 10, 11, 9, 12, 13, 9, 14, 15, 9, 16, 17]
    assert batch.target.tolist() == [20, 30, 5, 21, 31, 5, 22, 32, 5, 23, 33, 5]
    assert batch.sequence.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert batch.turns == (("0", 0), ("1", 0), ("2", 0), ("3", 0))
    (padded,) = pack(samples, max_tokens=100, layout="padded")
    assert (
        padded.input_ids.shape == (4, 12)
        and padded.subtree_end is None
        and padded.attention_mask.all()
    )
    assert pack(samples, max_tokens=100, layout="masked")[0].input_ids.shape == (1, 18)
    (packed,) = pack(samples, max_tokens=100, layout="packed")
    assert packed.input_ids.shape == (1, 48) and packed.position_ids.tolist() == [
        list(range(12)) * 4
    ]
    assert packed.subtree_end.tolist() == [[12 * (1 + i // 12) for i in range(48)]]


def test_a_dense_mask_does_not_share_where_the_prefix_is_too_short_to_pay():
    samples = [
        sample([2, *[(g * 7 + i) % 30 + 3 for i in range(300)]], [300], episode=str(g))
        for g in range(4)
    ]
    assert all(b.subtree_end is None for b in pack(samples, max_tokens=5000, layout="masked"))
    assert any(b.subtree_end is not None for b in pack(samples, max_tokens=5000))


def grown(*lengths: tuple[int, int, int]) -> list[TrainingSequence]:
    """Of each (word, prompt, replies): a prompt of `prompt` tokens that begin with `word`, and as
    many replies of 10 tokens."""
    return [
        sample(
            [word] * prompt + [g + 3] * 10, list(range(prompt, prompt + 10)), episode=f"{word}.{g}"
        )
        for word, prompt, replies in lengths
        for g in range(replies)
    ]


def test_trees_that_are_too_large_are_cut_where_they_share_least():
    system = [2] * 5
    tasks = [
        sample(system + [10 + t] * 40 + [20 + g] * 11, list(range(45, 56)), episode=f"{t}.{g}")
        for t in range(4)
        for g in range(4)
    ]
    rows = pack(tasks, max_tokens=190)  # a task is 5 + 40 + 4 x 10 tokens
    assert [r.input_ids.shape[1] for r in rows] == [165, 165], (
        "two tasks a row, the system prompt twice"
    )
    assert sorted({t[0][0] for t in row.turns} for row in rows) == [{"0", "1"}, {"2", "3"}]


def test_small_trees_fill_rows_and_every_rank_gets_some():
    samples = grown((10, 50, 3), (11, 30, 3), (12, 20, 3), (13, 9, 3))  # 77, 57, 47 and 36 tokens
    assert [b.input_ids.shape[1] for b in pack(samples, max_tokens=120)] == [113, 104]
    assert [b.input_ids.shape[1] for b in pack(samples, max_tokens=1000)] == [217]
    assert [b.input_ids.shape[1] for b in pack(samples, max_tokens=1000, parts=2)] == [77, 104, 36]
    one = grown((10, 20, 8))
    assert [b.input_ids.shape[1] for b in pack(one, max_tokens=1000)] == [92]
    assert [b.input_ids.shape[1] for b in pack(one, max_tokens=1000, parts=2)] == [56, 56], (
        "the prompt twice, in place of an idle rank"
    )
    assert len(pack(grown((10, 500, 2)), max_tokens=1000, parts=2)) == 1, (
        "nearly all of it is common"
    )


def test_policies_never_share_a_batch_even_with_equal_tokens():
    same = [sample([2, 3, 4, 5], [3], policy=p, episode=p) for p in ("b", "a", "b")]
    batches = pack(same, max_tokens=100, layout="shared")
    assert [b.policy for b in batches] == ["a", "b"] and [b.num_terms for b in batches] == [1, 2]


def test_packing_ignores_order_and_dealing_balances_squares():
    samples = crowd()
    shuffled = random.Random(3).sample(samples, len(samples))
    for one, other in zip(pack(samples, max_tokens=50), pack(shuffled, max_tokens=50), strict=True):
        assert (
            torch.equal(one.input_ids, other.input_ids)
            and torch.equal(one.advantage, other.advantage)
            and one.turns == other.turns
        )
    batches = [
        single(sample(list(range(2, 3 + n)), [n], episode=str(n)))
        for n in (30, 29, 20, 19, 10, 9, 8)
    ]
    ranks = split_over_ranks(batches, 2)
    assert sorted(b.turns for r in ranks for b in r) == sorted(b.turns for b in batches)
    loads = [sum(b.cost for b in rank) for rank in ranks]
    assert max(loads) / min(loads) < 1.15
    assert [[b.turns for b in r] for r in split_over_ranks(batches, 2)] == [
        [b.turns for b in r] for r in ranks
    ]
    assert split_over_ranks(batches[:1], 3)[1:] == [[], []]


def test_a_first_token_cannot_be_trained():
    with pytest.raises(ValueError, match="first token"):
        pack([sample([2, 3], [0])], max_tokens=10)


def test_backward_outside_the_adapter_is_refused():
    adapters = Adapters(
        random_model(), [PolicySpec("a", adapter=TARGETS), PolicySpec("b", adapter=TARGETS)], seed=0
    )
    with adapters.active("a") as model:
        logp, _ = token_logprobs(model, single(sample([2, 3, 4], [2])))
    with adapters.active("b"), pytest.raises(RuntimeError, match="put it inside active"):
        logp.sum().backward()


def test_sharing_is_refused_where_it_is_not_exact(caplog):
    dropping = Adapters(
        random_model(), [PolicySpec("a", adapter=dataclasses.replace(TARGETS, dropout=0.1))], seed=0
    )
    assert choose_layout(dropping.model, "auto") == "packed" and "dropout is on" in caplog.text
    with pytest.raises(SettingError, match="layout: shared rows cannot be used"):
        choose_layout(dropping.model, "shared")
    blind = random_model()
    run = blind.model.forward
    blind.model.forward = lambda tree=None, **inputs: (
        run(  # attention that ignores masks and positions
            **(
                inputs
                | {
                    "attention_mask": None,
                    "position_ids": torch.arange(inputs["input_ids"].shape[1])[None],
                }
            )
        )
    )
    assert (
        choose_layout(blind, "auto") == "padded"
        and "mask: attention of LlamaForCausalLM does not follow it" in caplog.text
    )
    for dtype in (torch.float32, torch.bfloat16):
        assert choose_layout(random_model().to(dtype), "auto") == "shared"


def test_heads_of_other_shapes_are_found_and_go_through_the_model(caplog):
    assert _head_works(random_model("gemma2")) and _head_works(random_model("llama"))
    assert not _head_works(random_model("cohere", logit_scale=0.25))
    assert "log-probs go through the model's own head" in caplog.text
