"""From samples to tensors.

A batch holds rows of one policy. A row is either one padded sample, or many samples end to end,
laid out as prefix trees: what samples have in common stands there once, in depth-first order, and
every token sees its ancestors only. What trainers get are flat terms, one per trained token; they
never see rows, so the layout changes speed and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch

from .prefix_trees import Tree, tree_of
from .samples import TrainingSequence

# padded: one sample per row. packed: samples end to end, nothing shared. shared: prefix trees end
# to end. masked: one prefix tree per row, for models whose attention takes nothing but a dense
# mask. Which one a model can have: `model.layouts.choose_layout`.
Layout = Literal["padded", "packed", "shared", "masked"]

# This many comparisons of a query with a key cost about as much as one token's way through the
# linear layers: 2 x parameters / (4 x hidden size x layers) is 800 for a tiny model, 4000 at 135M,
# 30000 at 8B.
PAIRS_PER_TOKEN = 2048


@dataclass(frozen=True)
class Batch:
    """R rows of L tokens of one policy, with N trained tokens (terms) of S turns (sequences).

    input_ids, position_ids: [R, L].
    attention_mask: [R, L] True at tokens, False at padding.
    subtree_end: [R, L] or None. None: rows are plain sequences. Else token k is seen by token q of
        its row if k <= q < subtree_end[k] (k's descendants are the tokens up to there).
    row, column: [N] the position whose hidden state predicts the term.
    target: [N] the sampled token.
    behaviour: [N] its log-probability when sampled.
    advantage, temperature: [N].
    calls: [N] how often the policy was called in the term's episode.
    sequence: [N] number 0 .. S-1 of its turn within the batch; a turn is never split between
        batches.
    turns: S pairs (episode id, turn index), for messages and dumps.
    token_index: [N] the term's number among all trained tokens of the samples given to `pack`, in
        their order: takes numbers that a method keeps per trained token into the batch
        (`numbers[batch.token_index]`) and out of it.
    is_padding: the batch goes through the model and its loss is 0, see `pad_ranks`.
    """

    policy: str
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    subtree_end: torch.Tensor | None
    row: torch.Tensor
    column: torch.Tensor
    target: torch.Tensor
    behaviour: torch.Tensor
    advantage: torch.Tensor
    temperature: torch.Tensor
    calls: torch.Tensor
    sequence: torch.Tensor
    turns: tuple[tuple[str, int], ...]
    token_index: torch.Tensor
    is_padding: bool = False

    @property
    def num_terms(self) -> int:
        return self.target.numel()

    @property
    def cost(self) -> int:
        """Relative cost of its forward: how many keys its queries see, plus the linear layers in
        the same unit."""
        rows, length = self.input_ids.shape
        pairs = (
            rows * length * (length + 1) // 2
            if self.subtree_end is None
            else int((self.position_ids + 1).sum())
        )
        return pairs + rows * length * PAIRS_PER_TOKEN

    @functools.cached_property
    def tree(self) -> Tree:
        """Its rows cut into branches; `subtree_end` has to be set."""
        assert self.subtree_end is not None, "rows of plain sequences are no trees"
        return tree_of(self.position_ids, self.subtree_end, self.attention_mask.sum(1).tolist())

    def to(self, device: torch.device | str) -> Batch:
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(
            **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in moved.items()}
        )

    def visible_keys(self) -> torch.Tensor:
        """[R, 1, L, L] True where token q (third axis) may look at token k (fourth)."""
        index = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        query, key = index[:, None], index[None, :]
        subtree_end = (
            self.input_ids.shape[1] * torch.ones_like(self.input_ids)
            if self.subtree_end is None
            else self.subtree_end
        )
        seen = (key <= query)[None] & (query[None] < subtree_end[:, None, :])
        own = (key == query)[
            None
        ]  # padding sees itself: a row of attention without any key is not a number
        return ((seen & self.attention_mask[:, None, :]) | own)[:, None]


@dataclass
class _Row:
    """One row as lists. `columns`: per sample, the column of each of its input tokens. `plain`: a
    sequence without a fork, which needs no `subtree_end`."""

    samples: list[TrainingSequence]
    columns: list[list[int]]
    ids: list[int]
    positions: list[int]
    subtree_end: list[int]
    plain: bool = False


def _inputs(sample: TrainingSequence) -> tuple[int, ...]:
    """The tokens a forward needs: all before the last trained one."""
    last = max(i for i, m in enumerate(sample.mask) if m)
    if sample.mask[0]:
        raise ValueError(
            f"episode {sample.episode}: the first token of a sample cannot be trained, nothing"
            " predicts it"
        )
    return sample.ids[:last]


def pack(
    samples: Sequence[TrainingSequence],
    *,
    max_tokens: int,
    layout: Layout = "shared",
    parts: int = 1,
) -> list[Batch]:
    """Batches of one policy each, within `max_tokens` computed positions (padding counts; one
    longer sample goes alone).

    `parts`: over how many ranks they will be dealt; rows get smaller where a rank would have none.
    The result depends on the samples only, not on their order.
    """
    batches: list[Batch] = []
    starts: dict[
        int, list[int]
    ] = {}  # of each sample, by identity: the number of its first trained token
    count = 0
    for sample in samples:
        starts.setdefault(id(sample), []).append(count)
        count += sample.num_trained
    for policy in sorted({s.policy for s in samples}):
        mine = sorted(
            (s for s in samples if s.policy == policy),
            key=lambda s: (_inputs(s), s.ids, s.episode, s.sequence, s.logprobs, s.advantages),
        )
        if layout in ("shared", "packed"):
            trees = _cut(mine, max_tokens, parts) if layout == "shared" else [[s] for s in mine]
            groups = [[_row(row)] for row in _end_to_end(trees, max_tokens, parts)]
        else:
            rows = [
                _row([group], plain=True)
                for group in (
                    [[s] for s in mine] if layout == "padded" else _share(mine, max_tokens)
                )
            ]
            groups = _fill(sorted(rows, key=lambda r: len(r.ids), reverse=True), max_tokens)
        batches += [_batch(policy, group, starts) for group in groups]
    return batches


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


class _Sizes:
    """How many tokens a tree of neighbouring samples has. `common[i]`: what sample i shares with
    the one before it."""

    def __init__(self, samples: Sequence[TrainingSequence]) -> None:
        ids = [_inputs(s) for s in samples]
        self.common = [0, *(_common(a, b) for a, b in zip(ids, ids[1:], strict=False))]
        self.ends = list(
            accumulate((len(x) - c for x, c in zip(ids, self.common, strict=True)), initial=0)
        )

    def __call__(self, start: int, end: int) -> int:
        return self.ends[end] - self.ends[start] + self.common[start]


def _cut(
    samples: list[TrainingSequence], max_tokens: int, parts: int
) -> list[list[TrainingSequence]]:
    """Samples in the order of their tokens, cut into trees: between samples that share nothing, and
    where a tree is too large, between those that share least, as near to its middle as may be.
    Then, for ranks that would have none, the largest as evenly as possible.
    """
    size = _Sizes(samples)
    zeros = [i for i, common in enumerate(size.common) if not common]
    open_, cut = list(zip(zeros, [*zeros[1:], len(samples)], strict=True)), []
    while open_:
        start, end = open_.pop()
        if size(start, end) <= max_tokens or end - start == 1:
            cut.append((start, end))
            continue
        at = min(
            range(start + 1, end),
            key=lambda i: (size.common[i], abs(size(start, i) - size(i, end)), i),
        )
        open_ += [(start, at), (at, end)]
    while 0 < len(cut) < parts:
        start, end = max(cut, key=lambda piece: (size(*piece), piece))
        if end - start == 1:
            break
        at = min(range(start + 1, end), key=lambda i: (max(size(start, i), size(i, end)), i))
        if max(size(start, at), size(at, end)) > 0.9 * size(start, end):
            break  # nearly all of it is common
        cut.remove((start, end))
        cut += [(start, at), (at, end)]
    return [samples[start:end] for start, end in sorted(cut)]


def _end_to_end(
    trees: list[list[TrainingSequence]], max_tokens: int, parts: int
) -> list[list[list[TrainingSequence]]]:
    """Trees into rows of at most `max_tokens`, and of at most one of `parts` shares: the largest
    first, each into the first row with room."""
    sizes = [_Sizes(tree)(0, len(tree)) for tree in trees]
    most = min(max_tokens, max([-(-sum(sizes) // parts), *sizes]))
    rows: list[list[list[TrainingSequence]]] = []
    room: list[int] = []
    for size, _, tree in sorted(
        ((size, i, tree) for i, (size, tree) in enumerate(zip(sizes, trees, strict=True))),
        key=lambda x: (-x[0], x[1]),
    ):
        at = next((i for i, left in enumerate(room) if size <= left), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(most)
        rows[at].append(tree)
        room[at] -= size
    return rows


def _share(samples: list[TrainingSequence], max_tokens: int) -> list[list[TrainingSequence]]:
    """Samples in the order of their tokens, cut into rows with a dense mask: one joins the row
    before it if the prefix saves more than that mask costs."""
    rows: list[list[TrainingSequence]] = []
    length = 0
    for sample in samples:
        own = len(_inputs(sample))
        common = _common(_inputs(rows[-1][-1]), _inputs(sample)) if rows else 0
        joined = length + own - common
        extra_pairs = joined * joined - length * length - own * own
        if rows and common and joined <= max_tokens and extra_pairs < common * PAIRS_PER_TOKEN:
            rows[-1].append(sample)
            length = joined
        else:
            rows.append([sample])
            length = own
    return rows


def _row(trees: list[list[TrainingSequence]], plain: bool = False) -> _Row:
    """Lay out samples, sorted by their tokens, as prefix trees in depth-first order. `plain`: one
    sequence alone needs no `subtree_end`."""
    row = _Row([], [], [], [], [])
    for samples in trees:
        path: list[int] = []  # columns of the tokens of the current sample
        previous: Sequence[int] = ()
        for sample in samples:
            tokens = _inputs(sample)
            common = _common(previous, tokens)
            for column in path[common:]:
                row.subtree_end[column] = len(row.ids)
            del path[common:]
            path += range(len(row.ids), len(row.ids) + len(tokens) - common)
            row.ids += tokens[common:]
            row.positions += range(common, len(tokens))
            row.subtree_end += [0] * (len(tokens) - common)
            row.samples.append(sample)
            row.columns.append(list(path))
            previous = tokens
        for column in path:
            row.subtree_end[column] = len(row.ids)
    row.plain = plain and row.positions == list(range(len(row.ids)))
    return row


def _fill(rows: list[_Row], max_tokens: int) -> list[list[_Row]]:
    """Rows, longest first, one under another into batches whose padded size fits; sequences and
    trees do not mix."""
    groups: list[list[_Row]] = []
    for plain in (True, False):
        fresh = True
        for row in (r for r in rows if r.plain is plain):
            if fresh or len(groups[-1][0].ids) * (len(groups[-1]) + 1) > max_tokens:
                groups.append([])
            groups[-1].append(row)
            fresh = False
    return groups


def _batch(policy: str, rows: list[_Row], starts: dict[int, list[int]]) -> Batch:
    length = max(len(r.ids) for r in rows)
    shared = not rows[0].plain
    terms: list[tuple[int, int, int, int]] = []  # row, column, target, sequence
    values: list[tuple[float, ...]] = []  # behaviour, advantage, temperature, calls
    turns: list[tuple[str, int]] = []
    token_index: list[int] = []
    for r, row in enumerate(rows):
        for sample, columns in zip(row.samples, row.columns, strict=True):
            numbers: dict[int, int] = {}
            start = starts[id(sample)].pop(0)
            token_index += range(start, start + sample.num_trained)
            for i, trained in enumerate(sample.mask):
                if trained:
                    turn = sample.sequence[i]
                    if turn not in numbers:
                        numbers[turn] = len(turns)
                        turns.append((sample.episode, turn))
                    terms.append((r, columns[i - 1], sample.ids[i], numbers[turn]))
                    values.append(
                        (
                            sample.logprobs[i],
                            sample.advantages[i],
                            sample.temperatures[i],
                            sample.calls,
                        )
                    )
    row_, column, target, sequence = torch.tensor(terms, dtype=torch.long).unbind(1)
    behaviour, advantage, temperature, calls = torch.tensor(values, dtype=torch.float32).unbind(1)

    def grid(get: Callable[[_Row], Sequence[int]]) -> torch.Tensor:
        return torch.tensor(
            [list(get(r)) + [0] * (length - len(r.ids)) for r in rows], dtype=torch.long
        )

    return Batch(
        policy=policy,
        input_ids=grid(lambda r: r.ids),
        position_ids=grid(lambda r: r.positions),
        attention_mask=grid(lambda r: [1] * len(r.ids)).bool(),
        subtree_end=grid(lambda r: r.subtree_end) if shared else None,
        row=row_,
        column=column,
        target=target,
        behaviour=behaviour,
        advantage=advantage,
        temperature=temperature,
        calls=calls,
        sequence=sequence,
        turns=tuple(turns),
        token_index=torch.tensor(token_index),
    )


def split_over_ranks(batches: Sequence[Batch], num_ranks: int) -> list[list[Batch]]:
    """Batches per rank with nearly equal cost: the costliest first, each to the rank with the least
    so far. Deterministic."""
    ranks: list[list[Batch]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for batch in sorted(batches, key=lambda b: b.cost, reverse=True):
        rank = min(range(num_ranks), key=lambda r: (load[r], r))
        ranks[rank].append(batch)
        load[rank] += batch.cost
    return ranks


def pad_ranks(shares: Sequence[Sequence[Batch]]) -> list[list[Batch]]:
    """The same number of batches for every rank, so that all make as many passes: a rank with fewer
    repeats the cheapest of all as padding."""
    filler = min((batch for mine in shares for batch in mine), key=lambda b: b.cost, default=None)
    most = max(map(len, shares))
    padding = [] if filler is None else [dataclasses.replace(filler, is_padding=True)]
    return [[*mine, *padding * (most - len(mine))] for mine in shares]
