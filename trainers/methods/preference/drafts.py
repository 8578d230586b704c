"""SysDPO-Sampling: latent drafts, an output's probability summed over several that could have led
to it (arXiv:2502.17721, section on sampling).

Where only outputs were compared, log p(output | task) = log sum over drafts of p(draft | task)
p(output | task, draft). The sum runs over drafts that the team as it stands has just made: the task
is played again `num_drafts` times up to its last turn, and every output in question is put there.
Siblings of a draft's turns count as drafts of their own, equal drafts once. Against the paper:
drafts are sampled, not found by diverse beam search.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....agents.concurrency import gather
from ....agents.transcript import Call
from ....agents.types import Completion, Turn
from ....rollouts.episodes.completers import Completer, EngineCompleter
from ....rollouts.episodes.runner import EpisodeRequest, EpisodeRunner
from ....rollouts.types import Episode
from ...collection.rollout_manager import RolloutManager
from ...credit.pairs import Pair, said


@dataclass
class Quoting:
    """Speaks as `live` does, but in call `turn.index` it says what `turn` said, in the place where
    it is asked."""

    live: EngineCompleter
    turn: Turn

    async def __call__(self, call: Call, version: str) -> list[Completion]:
        if call.index != self.turn.index or call.agent.name != self.turn.agent:
            return await self.live(call, version)
        prompt = tuple(self.live.prompt(call))
        return [
            dataclasses.replace(
                self.turn.completion, prompt_ids=prompt, logprobs=(), version=version
            )
        ] * call.n

    @property
    def outside(self) -> bool:
        return self.live.outside

    def most_prompt_tokens(self, call: Call) -> int:
        return self.live.most_prompt_tokens(call)


def with_drafts(
    rollouts: RolloutManager, step: int, pairs: Sequence[Pair], num_drafts: int
) -> list[Pair]:
    """The pairs, each side as the alternatives that end in its output, after the same distinct
    drafts; equal on every rank.

    A pair is left out if its outputs were not said at the same place of the conversation, or if no
    draft leads there any more.
    """
    start = time.perf_counter()
    by_task: dict[str, list[Pair]] = {}
    for pair in pairs:
        if output(pair.chosen[0]).index == output(pair.rejected[0]).index:
            by_task.setdefault(pair.chosen[0].task.id, []).append(pair)

    def play() -> list[Pair]:
        player = dataclasses.replace(rollouts.player(), rewards=(), recorded=False)
        room = asyncio.Semaphore(rollouts.config.max_concurrency)

        async def one(number: int, group: Sequence[Pair]) -> list[Pair]:
            async with room:
                return await _drafted(
                    player, group, f"drafts-{step:06d}.{number}", num_drafts, step
                )

        with rollouts.sync.hold(rollouts.sync.current):
            drafted = rollouts.run_rollouts(
                gather(one(n, group) for n, group in enumerate(by_task.values()))
            )
        return [pair for several in drafted for pair in several]

    pairs_with_drafts = rollouts.ranks.share(play, Pair)
    rollouts.log.spend("rollout", time.perf_counter() - start)
    return pairs_with_drafts


def output(episode: Episode) -> Turn:
    """The turn whose text is the system's output: the last one taken."""
    return [turn for turn in episode.turns if turn.taken][-1]


def place(end: Turn) -> tuple[Any, ...]:
    """What makes an output: its place in the conversation, and its tokens."""
    return end.index, end.agent, end.token_ids


async def _drafted(
    player: EpisodeRunner, pairs: Sequence[Pair], label: str, num_drafts: int, step: int
) -> list[Pair]:
    """The pairs of one task with their alternatives."""
    outputs = {
        place(t := output(side[0])): t for pair in pairs for side in (pair.chosen, pair.rejected)
    }
    task, first = pairs[0].chosen[0].task, next(iter(outputs.values()))
    played = await gather(
        _play(player, EpisodeRequest(task, f"{label}/draft", k, step), first)
        for k in range(num_drafts)
    )
    drafts = {
        said(e)[:-1]: e
        for e in played + await _siblings(player, played, first)
        if _arrived(e, first)
    }
    ends: dict[tuple[Any, ...], tuple[Episode, ...]] = {}
    for number, (key, end) in enumerate(outputs.items()):
        again = await gather(
            _play(
                player,
                EpisodeRequest(task, f"{label}/{number}", k, step),
                end,
                [t for t in draft.turns if t.taken and t.index < end.index],
            )
            for k, draft in enumerate(drafts.values())
        )
        ends[key] = tuple(e for e in again if _arrived(e, end))
    sides = [
        (p, ends[place(output(p.chosen[0]))], ends[place(output(p.rejected[0]))]) for p in pairs
    ]
    return [dataclasses.replace(p, chosen=c, rejected=r) for p, c, r in sides if c and r]


async def _play(
    player: EpisodeRunner,
    job: EpisodeRequest,
    end: Turn,
    given: Sequence[Turn] = (),
    replace: Mapping[int, Completion] | None = None,
) -> Episode:
    """Play the task to its end, where `end` is quoted."""
    quoting: dict[str, Completer] = {**player.completers}
    agent = next(spec for spec in player.system.specs if spec.name == end.agent)
    policy = player.state.values.get(f"{agent.name}.policy") or agent.policy
    live = quoting[policy]
    assert isinstance(live, EngineCompleter)  # outside models are refused at start
    quoting[policy] = Quoting(live, end)
    return await dataclasses.replace(player, completers=quoting).play(
        job, given=given, replace=replace
    )


async def _siblings(player: EpisodeRunner, drafts: Sequence[Episode], end: Turn) -> list[Episode]:
    """Drafts that go on from the answers a draft's calls gave besides the taken ones."""
    others = [
        (e, t)
        for e in drafts
        if e.error is None
        for t in e.turns
        if not t.taken and t.index < end.index
    ]
    return await gather(
        _play(
            player,
            EpisodeRequest(e.task, f"{e.id}/sibling", k, e.step),
            end,
            [earlier for earlier in e.turns if earlier.taken and earlier.index < t.index],
            {t.index: t.completion},
        )
        for k, (e, t) in enumerate(others)
    )


def _arrived(episode: Episode, end: Turn) -> bool:
    """Did the conversation reach the place of the output, and end there?"""
    turns = [turn for turn in episode.turns if turn.taken]
    return episode.error is None and bool(turns) and place(turns[-1]) == place(end)
