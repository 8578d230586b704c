"""Prompts read as a prefix tree: what several of them have in common at their begin is computed
once, in torch.

Siblings ask with equal prompts, groups with prompts that differ by the task or by a draft at their
end. The tokens of a tree stand in one row in depth-first order, and a mask lets each see its own
prompt and nothing else; every prompt's keys and values are then gathered from that row. It needs a
cache that keeps all keys and values, which not every model has: `why_not_shared` tells, by trying.
torch is imported inside functions only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .transformers_exactness import difference, probe_words, rounding_noise

Prompt = tuple[int, ...]

TREE = 1024  # tokens of one tree at most, but for a prompt that is longer: its mask is a square
WORTH = 0.75  # trees are read where they have at most this share of the padded rows' tokens


@dataclass
class PromptTree:
    """Prompts as one row of tokens, of which a common begin stands once.

    `ids` [U]: tokens in depth-first order; `depths` [U]: their positions; `ends` [U]: index behind
    the subtree of each; `paths`: indices of every prompt's tokens.
    """

    ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    paths: dict[Prompt, list[int]] = field(default_factory=dict)

    def add(self, prompt: Prompt, last: Prompt) -> None:
        """Add a prompt that is sorted behind `last`, the one added before it."""
        shared, new = common(prompt, last), len(self.ids)
        before = self.paths.get(last, [])
        for index in before[shared:]:
            self.ends[index] = new
        self.ids += prompt[shared:]
        self.depths += range(shared, len(prompt))
        path = [*before[:shared], *range(new, len(self.ids))]
        self.paths[prompt] = path
        self.ends += [0] * (len(prompt) - shared)
        for index in path:
            self.ends[index] = len(self.ids)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts have in common at their begin."""
    pairs = zip(a, b, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def trees_of(prompts: Iterable[Prompt], most: int = TREE) -> list[PromptTree]:
    """The different ones of these prompts as trees of at most `most` tokens each."""
    trees: list[PromptTree] = []
    last: Prompt = ()
    for prompt in sorted(set(prompts)):
        if not trees or len(trees[-1].ids) + len(prompt) - common(prompt, last) > most:
            trees.append(PromptTree())
            last = ()
        trees[-1].add(prompt, last)
        last = prompt
    return trees


@dataclass
class Read:
    """What the model has read: one row per prompt, padded on its left to a common width W.

    `keys`, `values`: of each layer [B, heads, W, size]; `mask` [B, W]: 1 on tokens; `logits` [B, V]
    of the tokens that come next.
    """

    keys: list[Any]
    values: list[Any]
    mask: Any
    logits: Any


def read(model: Any, prompts: Sequence[Prompt]) -> Read:
    """Read prompts, each as often as it stands there: as trees, or as padded rows where they have
    little in common."""
    import torch

    unique = list(dict.fromkeys(prompts))
    trees = trees_of(unique)
    padded = len(unique) * max(map(len, unique))
    if sum(len(tree.ids) for tree in trees) <= WORTH * padded:
        return read_trees(model, trees, prompts)
    found = _read_padded(model, unique)
    rows = torch.tensor([unique.index(prompt) for prompt in prompts], device=found.mask.device)
    keys, values = ([t.index_select(0, rows) for t in one] for one in (found.keys, found.values))
    return Read(keys, values, found.mask[rows], found.logits[rows])


def _read_padded(model: Any, prompts: Sequence[Prompt]) -> Read:
    import torch

    device, width = model.get_input_embeddings().weight.device, max(map(len, prompts))
    ids = torch.tensor([(0,) * (width - len(p)) + p for p in prompts], device=device)
    mask = _mask(prompts, device)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    layers = out.past_key_values.layers
    return Read([x.keys for x in layers], [x.values for x in layers], mask, out.logits[:, -1])


def _mask(prompts: Sequence[Prompt], device: Any) -> Any:
    import torch

    width = max(map(len, prompts))
    return torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)


def read_trees(model: Any, trees: Sequence[PromptTree], prompts: Sequence[Prompt]) -> Read:
    """Read prompts as these trees have them."""
    import torch

    device, width = model.get_input_embeddings().weight.device, max(map(len, prompts))
    found = Read([], [], _mask(prompts, device), None)
    for tree in trees:
        layers, logits = _forward(model, tree)
        rows = [row for row, prompt in enumerate(prompts) if prompt in tree.paths]
        place = {prompt: k for k, prompt in enumerate(tree.paths)}
        # the padding repeats the tree's first token, which the mask hides
        paths = [tree.paths[prompts[row]] for row in rows]
        index = torch.tensor([[0] * (width - len(p)) + p for p in paths], device=device)
        at = torch.tensor(rows, device=device)
        if found.logits is None:
            for keys, values in layers:
                for into, one in ((found.keys, keys), (found.values, values)):
                    into.append(one.new_zeros(len(prompts), one.shape[1], width, one.shape[-1]))
            found.logits = logits.new_zeros(len(prompts), logits.shape[-1])
        for k, (keys, values) in enumerate(layers):
            found.keys[k][at] = keys[0][:, index].transpose(0, 1)
            found.values[k][at] = values[0][:, index].transpose(0, 1)
        found.logits[at] = logits[torch.tensor([place[prompts[row]] for row in rows])]
    return found


def _forward(model: Any, tree: PromptTree, *, blind: bool = False) -> tuple[list[Any], Any]:
    """Keys and values of each layer [1, heads, U, size], and the logits [P, V] after each prompt.
    `blind`: every token sees all before it."""
    import torch

    weight = model.get_input_embeddings().weight
    place = torch.arange(len(tree.ids), device=weight.device)
    ends = torch.tensor(tree.ends, device=weight.device)
    visible = place[None] <= place[:, None]
    if not blind:
        visible &= place[:, None] < ends[None]
    mask = torch.zeros(visible.shape, dtype=weight.dtype, device=weight.device)
    mask.masked_fill_(~visible, torch.finfo(weight.dtype).min)
    lasts = torch.tensor([path[-1] for path in tree.paths.values()], device=weight.device)
    out = model(
        input_ids=torch.tensor([tree.ids], device=weight.device),
        attention_mask=mask[None, None],
        position_ids=torch.tensor([tree.depths], device=weight.device),
        use_cache=True,
        logits_to_keep=lasts,
    )
    return [(layer.keys, layer.values) for layer in out.past_key_values.layers], out.logits[0]


def as_cache(keys: Sequence[Any], values: Sequence[Any]) -> Any:
    """A cache of transformers that holds these keys and values of each layer."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (one, other) in enumerate(zip(keys, values, strict=True)):
        cache.update(one, other, layer)
    return cache


def why_not_shared(model: Any) -> str:
    """Why prompts of this model cannot be read as trees and its rows cannot come and go; "" if they
    can: prompts with a common begin and a token after each are what they are one by one."""
    import torch

    with torch.inference_mode():
        try:
            return _why_not_shared(model)
        except Exception as error:  # models and kernels raise kinds of their own
            words = str(error).splitlines() or [""]
            return f"{type(error).__name__}: {words[0]}"


def _why_not_shared(model: Any) -> str:
    import torch
    from transformers.cache_utils import DynamicLayer

    word = tuple(probe_words(model, 32))
    prompts = [word[:8], word[:14], word[:8] + word[14:19], word[19:22]]
    device = model.get_input_embeddings().weight.device
    more = torch.tensor([[word[22 + k]] for k in range(len(prompts))], device=device)

    def alone() -> Iterator[Any]:
        for prompt, one in zip(prompts, more, strict=True):
            ids = torch.tensor([[*prompt, int(one)]], device=device)
            yield model(input_ids=ids, use_cache=False).logits[0, -2:].float()

    first = model(input_ids=more[:1], use_cache=True)
    kinds = {type(layer) for layer in getattr(first.past_key_values, "layers", [None])}
    if kinds != {DynamicLayer}:
        return f"its cache is made of {', '.join(sorted(kind.__name__ for kind in kinds))}"
    right = torch.cat(list(alone()))
    noise = rounding_noise(model, right, lambda: torch.cat(list(alone())))
    trees = trees_of(prompts)
    found = read_trees(model, trees, prompts)
    mask = torch.cat([found.mask, found.mask.new_ones(len(prompts), 1)], 1)
    out = model(
        input_ids=more,
        attention_mask=mask,
        position_ids=mask.sum(1, keepdim=True) - 1,
        past_key_values=as_cache(found.keys, found.values),
        use_cache=True,
    )
    states = torch.stack([found.logits.float(), out.logits[:, -1].float()], 1).flatten(0, 1)
    blind = dict(zip(trees[0].paths, _forward(model, trees[0], blind=True)[1], strict=True))
    wrong = right.clone()
    wrong[::2] = torch.stack([blind[prompt].float() for prompt in prompts])
    off = difference(states, right, noise, wrong)
    return f"{off} in its logits" if off else ""
