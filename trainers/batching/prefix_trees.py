"""Prefix trees cut into branches, so that attention costs what separate sequences cost and every
token is computed once.

A branch is a run of tokens without a fork. Its queries see the keys of its ancestors and, causally,
its own; nothing else of the row is touched. Branches of about equal size are computed together as
one padded block, so small trees do not drown in calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

MAX_BLOCK = 2**24  # scores of one head of a block of several branches; more are split
FAR = 2**40  # depth of a key that is not there: no query is as deep


@dataclass(frozen=True)
class GatherIndex:
    """M rows picked out of a table of N, and the way back: its gradient sums the picks of every
    row, in a fixed order.

    index: [M]. order: [M] the picks sorted by row. offsets: [N + 1] where each row's picks begin in
    `order`.
    """

    index: torch.Tensor
    order: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, index: torch.Tensor, rows: int) -> GatherIndex:
        ends = torch.bincount(index, minlength=rows).cumsum(0)
        return cls(index, index.argsort(stable=True), torch.cat([ends.new_zeros(1), ends]))

    def to(self, device: torch.device) -> GatherIndex:
        return GatherIndex(self.index.to(device), self.order.to(device), self.offsets.to(device))

    def __call__(self, table: torch.Tensor) -> torch.Tensor:
        """table: [N, F] -> [M, F]."""
        return _Gather.apply(table, self.index, self.order, self.offsets)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, index, order, offsets):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(order, offsets)
        return table.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        order, offsets = ctx.saved_tensors
        bags = torch.nn.functional.embedding_bag(
            order, grad.contiguous(), offsets, mode="sum", include_last_offset=True
        )
        return bags, None, None, None


@dataclass(frozen=True)
class Block:
    """B branches computed together, R queries and K keys each, padded at the end.

    query_depth: [B or 1, R], key_depth: [B or 1, K] position of the token in its sequence; a key
    that is not there is `FAR`. One row where all branches are alike. causal: no ancestors, so that
    query i sees keys 0 .. i.
    """

    branches: int
    queries: int
    keys: int
    query_depth: torch.Tensor
    key_depth: torch.Tensor
    causal: bool

    def to(self, device: torch.device) -> Block:
        depths = self.query_depth.to(device), self.key_depth.to(device)
        return Block(self.branches, self.queries, self.keys, *depths, self.causal)

    def visible_keys(self, window: int | None) -> torch.Tensor:
        """[B or 1, R, K] True where the query looks at the key; with a window, at the last `window`
        positions only."""
        query, key = self.query_depth[:, :, None], self.key_depth[:, None, :]
        return (key <= query) & (query - key < window) if window else key <= query


@dataclass(frozen=True)
class Tree:
    """The branches of a batch's rows.

    queries, keys: picks of the flattened tokens [rows x length], block after block.
    back: picks of the blocks' outputs, in the order of the tokens.
    subtree_end, depth: [rows, length] as in `Batch` (`depth` is its `position_ids`).
    deepest: the largest depth. forks: does any branch have ancestors?
    masks: those already computed; all layers use the same few.
    """

    blocks: tuple[Block, ...]
    queries: GatherIndex
    keys: GatherIndex
    back: GatherIndex
    subtree_end: torch.Tensor
    depth: torch.Tensor
    deepest: int
    forks: bool
    masks: dict[tuple, Any] = field(default_factory=dict)

    def mask(
        self, number: int, window: int | None, repeats: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """[B or 1, 1, repeats x R, K] of block `number`: 0 where it sees, minus infinity
        elsewhere."""
        key = (number, window, repeats, dtype)
        if key not in self.masks:
            visible = self.blocks[number].visible_keys(window)
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
                ~visible, -math.inf
            )
            self.masks[key] = mask.repeat(1, repeats, 1)[:, None]
        return self.masks[key]


@dataclass(frozen=True)
class _Branch:
    """Tokens start .. end of the flattened rows, the first at position `depth`, and its ancestors'
    ranges, eldest first."""

    ancestors: tuple[tuple[int, int], ...]
    start: int
    end: int
    depth: int


def branches(
    depths: torch.Tensor, subtree_ends: torch.Tensor, sizes: Sequence[int]
) -> list[_Branch]:
    """Every run without a fork, in the order of the tokens; rows [R, L] as in `Batch`, of which
    `sizes` tokens are no padding."""
    branches: list[_Branch] = []
    length = depths.shape[1]
    for row, (size, depth, subtree_end) in enumerate(
        zip(sizes, depths.tolist(), subtree_ends.tolist(), strict=True)
    ):
        starts = [
            i
            for i in range(size)
            if not i or depth[i] != depth[i - 1] + 1 or subtree_end[i] != subtree_end[i - 1]
        ]
        path: list[tuple[int, tuple[int, int]]] = []  # depth of the first token, range
        for start, end in zip(starts, [*starts[1:], size], strict=True):
            while path and path[-1][0] >= depth[start]:
                path.pop()
            span = (row * length + start, row * length + end)
            branches.append(_Branch(tuple(s for _, s in path), *span, depth[start]))
            path.append((depth[start], span))
    return branches


def tree_of(depths: torch.Tensor, subtree_ends: torch.Tensor, sizes: Sequence[int]) -> Tree:
    """Cut rows into branches and those into blocks. Arguments as for `branches`."""
    tokens, device = depths.numel(), depths.device
    queries, keys, blocks = [], [], []
    back = torch.zeros(tokens, dtype=torch.long)
    count = 0
    runs = branches(depths, subtree_ends, sizes)
    for group in _grouped(runs):
        block, of_block, seen = _block(group)
        for i, branch in enumerate(group):
            back[branch.start : branch.end] = (
                torch.arange(branch.end - branch.start) + count + i * block.queries
            )
        queries.append(of_block.flatten())
        keys.append(seen.flatten())
        blocks.append(block)
        count += of_block.numel()
    query, key, out = (
        GatherIndex.of(index, size).to(device)
        for index, size in ((torch.cat(queries), tokens), (torch.cat(keys), tokens), (back, count))
    )
    forks = any(branch.ancestors for branch in runs)
    return Tree(
        tuple(b.to(device) for b in blocks),
        query,
        key,
        out,
        subtree_ends,
        depths,
        int(depths.max()),
        forks,
    )


def _grouped(runs: list[_Branch]) -> list[list[_Branch]]:
    """Branches of about equal size: at most a quarter more ancestors than the least in the group,
    and half as many tokens more."""
    groups: dict[tuple[int, int], list[_Branch]] = {}
    for branch in runs:
        size = (_grade(branch.depth, 32, 1.25), _grade(branch.end - branch.start, 8, 1.5))
        groups.setdefault(size, []).append(branch)
    split = []
    for group in groups.values():
        most = max(b.end - b.start for b in group)
        each = max(1, MAX_BLOCK // (most * (most + max(b.depth for b in group))))
        split += [group[i : i + each] for i in range(0, len(group), each)]
    return split


def _grade(size: int, least: int, step: float) -> int:
    """0 for nothing, 1 up to `least`, then one more for every factor of `step`."""
    return 0 if not size else 1 + max(0, math.ceil(math.log(size / least, step)))


def _block(group: list[_Branch]) -> tuple[Block, torch.Tensor, torch.Tensor]:
    """The block, and the tokens that are its queries [B, R] and keys [B, K]. What is missing
    repeats a token that is not read and not seen."""
    most, ancestors = max(b.end - b.start for b in group), max(b.depth for b in group)
    query = torch.stack([_padded([(b.start, b.end)], most) for b in group])
    own = torch.arange(most)
    depth = torch.tensor([b.depth for b in group])[:, None]
    length = torch.tensor([b.end - b.start for b in group])[:, None]
    key, key_depth = query, torch.where(own < length, depth + own, FAR)
    if ancestors:
        before = torch.arange(ancestors).expand(len(group), -1)
        key = torch.cat(
            [torch.stack([_padded(list(b.ancestors), ancestors) for b in group]), query], 1
        )
        key_depth = torch.cat([torch.where(before < depth, before, FAR), key_depth], 1)
    query_depth = depth + torch.minimum(
        own, length - 1
    )  # one that is missing stands with the last, and so sees something
    if len({(b.depth, b.end - b.start) for b in group}) == 1:
        query_depth, key_depth = query_depth[:1], key_depth[:1]
    return Block(len(group), most, key.shape[1], query_depth, key_depth, not ancestors), query, key


def _padded(ranges: list[tuple[int, int]], size: int) -> torch.Tensor:
    tokens = torch.cat([torch.arange(start, end) for start, end in ranges])
    return torch.cat([tokens, tokens[:1].expand(size - len(tokens))])
