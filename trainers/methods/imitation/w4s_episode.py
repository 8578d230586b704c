"""An episode of design (W4S, arXiv:2504.04785): a chat of several turns in which a designer writes
candidates for one program, repairs those that fail, and goes on from the best."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ....agents.programs.program import PROGRAM, Program
from ....agents.settings import Settings, setting
from ....agents.types import AgentSpec, Message, Task, Turn
from ....rollouts.types import Episode, TurnKey
from ...collection.rollout_manager import RolloutManager
from ...values.search import Candidate, Search
from ..workflow_search.proposals import Proposal
from .w4s_rewards import DesignRewardConfig, RewardedChat, design_reward
from .w4s_talk import DesignReply, DesignTalkConfig, DesignTurn, read_reply, repaired_turn

DESIGNER = "designer"  # of candidates in the archive


@dataclass
class DesignEpisodeConfig(Settings):
    """The size of an episode of design."""

    num_turns: int = setting("turns of an episode of design", 2, at_least=1)
    num_candidates: int = setting("candidates of a turn, sampled in one request", 5, at_least=1)
    num_repairs: int = setting("repairs of a candidate that cannot be used, at most", 3, at_least=0)
    num_cases: int = setting(
        "validation tasks that are shown to the designer, with right answers and a program's",
        10,
        at_least=0,
    )


@dataclass(frozen=True)
class Cases:
    """Validation tasks in words, with a program's answers. `right`: how many it solves."""

    text: str = ""
    count: int = 0
    right: int = 0


@dataclass(frozen=True)
class Design:
    """A candidate of a turn as it stands after its repairs.

    Args:
        talk, turn: the episode that holds it, and its turn there; `written` once it was repaired.
        reply: what was sampled, taken apart.
        chat: the turn's prompt and this reply, then its repairs.
        candidate: its program in the archive, None if it has none. fault: why it cannot be used.
        repairs: how many were asked for. reward: None if it is not learnt from.
    """

    talk: Episode
    turn: Turn
    reply: DesignReply
    chat: tuple[Message, ...]
    candidate: Candidate | None
    fault: str
    repairs: int = 0
    reward: float | None = None

    @property
    def accuracy(self) -> float:
        """On the validation tasks; 0 if it cannot be used."""
        return 0.0 if self.fault or self.candidate is None else self.candidate.mean

    @property
    def key(self) -> TurnKey:
        return (self.talk.id, self.turn.index, self.turn.sibling)


@dataclass(frozen=True)
class DesignRecord:
    """An episode of design. `turns`: the candidates of each; `chosen`: of each turn that went on,
    the best; `error`: why the designer could not be asked for another turn."""

    name: str
    turns: tuple[tuple[Design, ...], ...] = ()
    chosen: tuple[Design, ...] = ()
    error: str = ""

    @property
    def designs(self) -> list[Design]:
        return [design for turn in self.turns for design in turn]

    @property
    def chats(self) -> list[RewardedChat]:
        """What is learnt from: each candidate with a reward, after the best ones before it."""
        before = [tuple(design.key for design in self.chosen[:k]) for k in range(len(self.turns))]
        return [
            RewardedChat((*earlier, design.key), design.reward)
            for earlier, turn in zip(before, self.turns, strict=True)
            for design in turn
            if design.reward is not None
        ]

    @property
    def lessons(self) -> list[Episode]:
        """The talks, with repaired turns in place of those that were sampled."""
        return [
            dataclasses.replace(turn[0].talk, turns=tuple(design.turn for design in turn))
            for turn in self.turns
            if turn
        ]

    @property
    def row(self) -> dict[str, Any]:
        """For the method's memory: by turn the program, accuracy, reward and repairs of each
        candidate, and the number of the best."""
        return {
            "name": self.name,
            "turns": [
                {
                    "programs": [d.candidate.id if d.candidate else None for d in turn],
                    "accuracy": [d.accuracy for d in turn],
                    "reward": [d.reward for d in turn],
                    "repairs": [d.repairs for d in turn],
                    "best": turn.index(self.chosen[k]) if k < len(self.chosen) else None,
                }
                for k, turn in enumerate(self.turns)
            ],
        }


@dataclass(frozen=True)
class DesignRunner:
    """What plays episodes of design.

    Args:
        rollouts: plays and finds talks.
        agent: the designer.
        target: the rules of a valid program, and its dry run.
        search: the archive of programs. measure: scores a candidate there, or finds it lost.
        cases: shows a candidate's answers to some validation tasks; its second argument names them.
        talk, size, rewards: settings.
        num_tasks: validation tasks.
    """

    rollouts: RolloutManager
    agent: AgentSpec
    target: Program
    search: Search
    measure: Callable[[Candidate], Candidate]
    cases: Callable[[Candidate, str], Cases]
    talk: DesignTalkConfig
    size: DesignEpisodeConfig
    rewards: DesignRewardConfig
    num_tasks: int

    def play(
        self, name: str, context: Sequence[Candidate], before: Candidate, step: int
    ) -> DesignRecord:
        """One episode. `context`: the programs that its first prompt shows; `before`: the one of
        them that the first turn goes on from."""
        previous, best = before.mean, max(candidate.mean for candidate in context)
        record, history, parent = DesignRecord(name), tuple[Message, ...](), before
        prompt = self.instructed(context, before, name)
        for number in range(1, self.size.num_turns + 1):
            label = f"{name}-{number}"
            episode = self.asked(label, history, prompt)
            if episode.error is not None:
                return dataclasses.replace(record, error=f"{label}: {episode.error}")
            designs = tuple(
                dataclasses.replace(design, reward=self.reward(design, best, previous))
                for design in self.written(episode, history, prompt, parent, step)
            )
            record = dataclasses.replace(record, turns=(*record.turns, designs))
            kept = [design for design in designs if design.reward is not None]
            if not kept:
                return record
            chosen = max(kept, key=lambda design: design.accuracy)
            assert chosen.candidate is not None
            record = dataclasses.replace(record, chosen=(*record.chosen, chosen))
            history += (Message("user", prompt), Message("assistant", chosen.turn.text))
            prompt = self.feedback(chosen, best, previous, label)
            previous, parent = chosen.accuracy, chosen.candidate
            best = max(best, previous) if self.rewards.best_of == "context" else best
        return record

    def reward(self, design: Design, best: float, previous: float) -> float | None:
        """Its reward; None if it cannot be used or solves too little."""
        if design.fault or design.accuracy <= self.rewards.min_accuracy:
            return None
        return design_reward(design.accuracy, best, previous, self.rewards)

    # a turn

    def asked(self, label: str, history: tuple[Message, ...], prompt: str) -> Episode:
        """The talk that a chat goes on with."""
        talk = self.turn(history, self.size.num_candidates)
        task = Task(label, prompt, source="design", split="train")
        (episode,) = self.rollouts.play([task], kind="train", system=talk, rewards=())
        return episode

    def turn(self, history: Sequence[Message], candidates: int) -> DesignTurn:
        """The system that goes on with this chat."""
        return DesignTurn(
            [self.agent],
            target=self.target,
            history=tuple(history),
            candidates=candidates,
            reply_format=self.talk.reply_format,
        )

    def written(
        self,
        episode: Episode,
        history: tuple[Message, ...],
        prompt: str,
        parent: Candidate,
        step: int,
    ) -> list[Design]:
        """The candidates of a talk, repaired and measured."""
        operators = tuple(self.target.callable)
        turns = sorted(episode.turns, key=lambda turn: turn.sibling)
        proposals = self.turn((), len(turns)).proposals(episode)
        designs = []
        for turn, proposal in zip(turns, proposals, strict=True):
            candidate, fault = self.entered(proposal, parent, step, DESIGNER)
            chat = (*history, Message("user", prompt), Message("assistant", turn.text))
            reply = read_reply(turn.text, operators, self.talk.reply_format)
            designs.append(Design(episode, turn, reply, chat, candidate, fault))
        for attempt in range(1, self.size.num_repairs + 1):
            if any(design.fault for design in designs):
                designs = self.repaired(designs, attempt, step)
        return designs

    def entered(
        self, proposal: Proposal, parent: Candidate | None, step: int, proposer: str
    ) -> tuple[Candidate | None, str]:
        """(the proposal's program in the archive, measured, and why it cannot be used)."""
        if not proposal.program:
            return None, proposal.fault
        values = {PROGRAM: proposal.program}
        candidate = self.search.find(values)
        if candidate is None:
            new = Candidate(
                values,
                proposer,
                proposal.note,
                proposal.fault,
                parents=(parent.id,) if parent else (),
                round=step,
            )
            candidate = self.search.add(new)
        if not candidate.fault and not candidate.scores:
            candidate = self.measure(candidate)
        return candidate, candidate.fault

    def repaired(self, designs: Sequence[Design], attempt: int, step: int) -> list[Design]:
        """The candidates, those that cannot be used once more after the error's words."""
        broken = [k for k, design in enumerate(designs) if design.fault]
        chats, questions = {}, []
        for k in broken:
            design = designs[k]
            program = str(design.candidate.values[PROGRAM]) if design.candidate else ""
            prompt = self.talk.prompt("repair", fault=design.fault, program=program)
            chats[k] = (*design.chat, Message("user", prompt))
            task = Task(f"{design.talk.task.id}-repair-{attempt}-{k}", prompt, source="design")
            questions.append((self.turn(design.chat, 1), task, design.talk.id))
        answers = dict(zip(broken, self.rollouts.ask_all(questions), strict=True))
        return [
            self._repaired(design, answers[k], chats[k], step) if k in answers else design
            for k, design in enumerate(designs)
        ]

    def _repaired(
        self, design: Design, answer: Episode, chat: tuple[Message, ...], step: int
    ) -> Design:
        if answer.error is not None:
            fault = f"repair: {answer.error}"
            return dataclasses.replace(design, fault=fault, repairs=design.repairs + 1)
        (turn,) = answer.turns
        (proposal,) = self.turn((), 1).proposals(answer)
        candidate, fault = self.entered(proposal, design.candidate, step, "repair")
        text = design.reply.with_program(proposal.program) if proposal.program else design.turn.text
        return dataclasses.replace(
            design,
            turn=repaired_turn(design.turn, text),
            chat=(*chat, Message("assistant", turn.text)),
            candidate=candidate,
            fault=fault,
            repairs=design.repairs + 1,
        )

    # prompts

    def instructed(self, context: Sequence[Candidate], before: Candidate, name: str) -> str:
        """The first prompt of an episode."""
        target, cases = self.target, self.cases(before, name)
        return self.talk.prompt(
            "instruction",
            role=next((spec.role for spec in target.specs if spec.role), "see below"),
            operators="\n".join(f"- {each}" for each in target.callable.values()),
            max_nodes=target.max_nodes,
            num_tasks=self.num_tasks,
            archive="\n\n".join(map(shown, context)),
            cases=cases.text,
            example=before.values[PROGRAM],
        )

    def feedback(self, design: Design, best: float, previous: float, label: str) -> str:
        """The prompt after a turn's best candidate."""
        assert design.candidate is not None
        cases, accuracy = self.cases(design.candidate, label), design.accuracy
        trend = (
            "higher than"
            if accuracy > previous
            else "lower than"
            if accuracy < previous
            else "as high as"
        )
        return self.talk.prompt(
            "feedback",
            accuracy=f"{accuracy:.4f}",
            previous=f"{previous:.4f}",
            best=f"{max(best, accuracy):.4f}",
            trend=trend,
            cases=cases.text,
            cases_right=cases.right,
            num_cases=cases.count,
            program=design.candidate.values[PROGRAM],
        )


def shown(candidate: Candidate) -> str:
    """A program of the archive with its accuracy, for a prompt."""
    program = candidate.values[PROGRAM]
    return f"Accuracy {candidate.mean:.4f}:\n```python\n{program}\n```"
