"""Propagators: how what is said of an output becomes what is said of the params behind it: edge by
edge, node by node with siblings, along requirements, or not at all with the graph as context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ...agents.text.tags import block, inside, nested, numbered, shortened
from ...agents.types import Turn
from .backward import Backward, ByParam, Case, Feedback, without_text
from .graph import Node
from .helpers import UNREADABLE, Helpers, Question
from .targets import Target

NO_ERROR = "No noticeable error."


class Propagator(Protocol):
    """Takes judgements of outputs to feedback on params."""

    def propagate(
        self, helpers: Helpers, cases: Sequence[Case], targets: Sequence[Target]
    ) -> ByParam:
        """Feedback by name of a param, cases in order; every param has its list."""


@dataclass(frozen=True)
class _Edge:
    """From the judgement (`node` None) or a node to a node it read or a param that acts at it."""

    number: int
    node: Node | None
    to: Node | Target


@dataclass(frozen=True)
class PerEdge:
    """One call per edge, each on its own (TextGrad, arXiv:2406.07496): from the judgement to every
    output, then from every node that has feedback to each node it read and to each of its params.
    Where an episode failed before its first turn, to each param.

    Args:
        helper: its name.
        operations: whether plain operations are asked about: `always`; where they read `several`
            nodes (LLM-AutoDiff, arXiv:2501.16673); or `never`: they hand their feedback on.
        good: an episode whose score is above this gives its params `NO_ERROR`, without a call.
        in_call_order: a param's feedback of one episode stands in the order of calls, not against
            it (time-sequential gradients of LLM-AutoDiff).

    Prompts: `backward_system`; `base` for edges from the judgement, with `{role}`, `{target}` and
    `{conversation}`; `chain` for the others, with `{feedback}` too.
    """

    helper: str = "backward"
    operations: Literal["always", "several", "never"] = "always"
    good: float | None = None
    in_call_order: bool = False

    def propagate(
        self, helpers: Helpers, cases: Sequence[Case], targets: Sequence[Target]
    ) -> ByParam:
        backward = Backward(cases, targets)
        start: list[_Edge] = []
        for number, case in enumerate(cases):
            if self.good is not None and case.judgement.score > self.good:
                for target in backward.reached(number):
                    backward.collect(target, case.feedback(NO_ERROR))
            elif case.judgement.text:
                start += [_Edge(number, None, node) for node in backward.outputs(number)]
                if not case.graph.nodes:
                    start += [_Edge(number, None, t) for t in backward.reached(number)]
        self._send(helpers, backward, start)
        for nodes in backward.levels():
            edges: list[_Edge] = []
            for number, node in nodes:
                edges += [_Edge(number, node, to) for to in backward.predecessors(number, node)]
                edges += [_Edge(number, node, to) for to in backward.own(number, node)]
            self._send(helpers, backward, edges)
        return backward.ordered(self.in_call_order)

    def _send(self, helpers: Helpers, backward: Backward, edges: Sequence[_Edge]) -> None:
        """Take feedback along these edges, all at once."""
        asked = [edge for edge in edges if self._is_asked(edge.node)]
        for edge in edges:
            if edge.node is not None and not self._is_asked(edge.node):
                for feedback in backward.of(edge.number, edge.node):
                    _deliver(backward, edge.number, edge.to, feedback)
        replies = helpers.ask([self._question(helpers, backward, edge) for edge in asked])
        for edge, reply in zip(asked, replies, strict=True):
            if reply is not None:
                order = -1 if edge.node is None else edge.node.index
                context = self._conversation(backward, edge)
                feedback = backward.cases[edge.number].feedback(reply.strip(), context, order)
                _deliver(backward, edge.number, edge.to, feedback)

    def _is_asked(self, node: Node | None) -> bool:
        if node is None or isinstance(node.of, Turn) or self.operations == "always":
            return True
        return self.operations == "several" and len(node.reads) > 1

    def _conversation(self, backward: Backward, edge: _Edge) -> str:
        case = backward.cases[edge.number]
        if edge.node is None:
            return case.judgement.conversation
        return case.graph.conversation(edge.node)

    def _question(self, helpers: Helpers, backward: Backward, edge: _Edge) -> Question:
        case = backward.cases[edge.number]
        fields = {"conversation": nested("CONVERSATION", self._conversation(backward, edge))}
        if isinstance(edge.to, Target):
            fields["role"], value = edge.to.role, str(edge.to.value)
        else:
            fields["role"], value = f"the output of {edge.to.name!r}", edge.to.text
        fields["target"] = block("VARIABLE", shortened(value))
        if edge.node is not None:
            fields["feedback"] = texts(backward.of(edge.number, edge.node))
        name = edge.to.name if isinstance(edge.to, Target) else f"output-{edge.to.index}"
        return Question(
            self.helper,
            helpers.prompt("backward_system"),
            helpers.prompt("base" if edge.node is None else "chain", **fields),
            f"{self.helper}/{case.episode.task.id}/{name}",
            case.episode.id,
            case.judgement.saw_gold,
        )


@dataclass(frozen=True)
class PerNode:
    """One call per node that read others, with all that it read in view (semantic backpropagation,
    arXiv:2412.03624): what is said of the output is the feedback on the output's node; the reply
    has a line `Hint x: ...` for each node that was read. Params get the feedback on their node.

    Args:
        helper: its name.
        siblings: False shows each node that was read alone, one call for each: the ablation.

    Prompts: `backward_system`, and `node` with `{instruction}`, `{task}`, `{hints}` (numbered
    blocks), `{output}` and `{feedback}`.
    """

    helper: str = "backward"
    siblings: bool = True

    def propagate(
        self, helpers: Helpers, cases: Sequence[Case], targets: Sequence[Target]
    ) -> ByParam:
        backward = _begun(cases, targets)
        for nodes in backward.levels():
            for number, node in nodes:
                case = backward.cases[number]
                context = case.graph.conversation(node)
                for target in backward.own(number, node):
                    for feedback in backward.of(number, node):
                        own = case.feedback(feedback.text, context, node.index)
                        backward.collect(target, own)
            asked = [
                (number, node, reads)
                for number, node in nodes
                for reads in self._together(backward, number, node)
            ]
            replies = helpers.ask([self._question(helpers, backward, *each) for each in asked])
            for (number, _, reads), reply in zip(asked, replies, strict=True):
                self._deliver(helpers, backward, number, reads, reply)
        return backward.ordered()

    def _together(self, backward: Backward, number: int, node: Node) -> list[tuple[int, ...]]:
        """The nodes that are shown in one call, for each call about a node."""
        moving = [each.index for each in backward.predecessors(number, node)]
        if self.siblings:
            return [node.reads] if moving else []
        return [(index,) for index in moving]

    def _deliver(
        self,
        helpers: Helpers,
        backward: Backward,
        number: int,
        reads: tuple[int, ...],
        reply: str | None,
    ) -> None:
        """Each line to the node that it is about; a reply without a single line is counted."""
        case = backward.cases[number]
        lines = numbered(reply or "", "Hint", len(reads))
        helpers.counts[UNREADABLE] += reply is not None and not any(lines)
        for index, line in zip(reads, lines, strict=True):
            if line is not None and backward.moves(number, index):
                backward.give(number, case.graph.nodes[index], case.feedback(line))

    def _question(
        self, helpers: Helpers, backward: Backward, number: int, node: Node, reads: tuple[int, ...]
    ) -> Question:
        case = backward.cases[number]
        hints = [block(f"HINT_{k}", case.graph.nodes[i].text) for k, i in enumerate(reads, 1)]
        text = helpers.prompt(
            "node",
            instruction=block("INSTRUCTION", node.prompt),
            task=block("TASK", case.episode.task.prompt),
            hints="\n".join(hints),
            output=block("OUTPUT", node.text),
            feedback=texts(backward.of(number, node)),
        )
        return _about_node(self.helper, helpers, case, node, text)


def _about_node(helper: str, helpers: Helpers, case: Case, node: Node, text: str) -> Question:
    """The question that a helper is asked about one node of a case."""
    about = f"{helper}/{case.episode.task.id}/{node.name}-{node.index}"
    system, gold = helpers.prompt("backward_system"), case.judgement.saw_gold
    return Question(helper, system, text, about, case.episode.id, gold)


@dataclass(frozen=True)
class Requirements:
    """One call per turn, from the output back (agent symbolic learning, arXiv:2406.18532): the
    reply has a suggestion for the turn's own params and a requirement for what it read.

    A param that acts at an operation (`Graph.own`), as a structure does that says who speaks now,
    gets the suggestions on the turns that read the operation, whose text is their `place`.

    Plain operations hand requirements on. Prompts: `backward_system`, and `state` with `{place}`,
    `{instruction}`, `{previous}` (blocks of what it read), `{output}` and `{requirement}`; the
    reply puts `<SUGGESTION>` and `<REQUIREMENT>` around its two texts.
    """

    helper: str = "backward"

    def propagate(
        self, helpers: Helpers, cases: Sequence[Case], targets: Sequence[Target]
    ) -> ByParam:
        backward = _begun(cases, targets)
        for nodes in backward.levels():
            for number, node in nodes:
                if not isinstance(node.of, Turn):
                    for read in backward.predecessors(number, node):
                        for feedback in backward.of(number, node):
                            backward.give(number, read, feedback)
            asked = [(number, node) for number, node in nodes if isinstance(node.of, Turn)]
            replies = helpers.ask([self._question(helpers, backward, *each) for each in asked])
            for (number, node), reply in zip(asked, replies, strict=True):
                if reply is not None:
                    self._deliver(helpers, backward, number, node, reply)
        return backward.ordered()

    def _deliver(
        self, helpers: Helpers, backward: Backward, number: int, node: Node, reply: str
    ) -> None:
        case = backward.cases[number]
        suggestion, requirement = inside(reply, "SUGGESTION"), inside(reply, "REQUIREMENT")
        helpers.counts[UNREADABLE] += suggestion is None and requirement is None
        if suggestion:
            context = case.graph.conversation(node)
            for target in backward.own(number, node):
                backward.collect(target, case.feedback(suggestion, context, node.index))
            for place, target in self._places(backward, number, node):
                told = case.feedback(suggestion, context, node.index, place.text)
                backward.collect(target, told)
        if requirement:
            for read in backward.predecessors(number, node):
                backward.give(number, read, case.feedback(requirement))

    def _places(self, backward: Backward, number: int, node: Node) -> list[tuple[Node, Target]]:
        """The operations that a turn read and that params act at, with these."""
        return [
            (read, target)
            for read in backward.predecessors(number, node)
            if not isinstance(read.of, Turn)
            for target in backward.own(number, read)
        ]

    def _question(self, helpers: Helpers, backward: Backward, number: int, node: Node) -> Question:
        case = backward.cases[number]
        places = {place.index: place.text for place, _ in self._places(backward, number, node)}
        reads = [case.graph.nodes[i].text for i in node.reads if i not in places]
        previous = [block("PREVIOUS", text) for text in reads]
        text = helpers.prompt(
            "state",
            place="\n".join(block("PLACE", text) for text in places.values()),
            instruction=block("INSTRUCTION", node.prompt),
            previous="\n".join(previous or [block("TASK", case.episode.task.prompt)]),
            output=block("OUTPUT", node.text),
            requirement=texts(backward.of(number, node)),
        )
        return _about_node(self.helper, helpers, case, node, text)


@dataclass(frozen=True)
class WholeGraph:
    """No call: every param that the output depends on gets what is said of the output, with the
    task and the minimal graph as context (Trace, arXiv:2406.16218).

    Args:
        good: an episode whose score is above this gives no feedback.
    """

    good: float | None = None

    def propagate(
        self, helpers: Helpers, cases: Sequence[Case], targets: Sequence[Target]
    ) -> ByParam:
        backward = Backward(cases, targets)
        for number, case in enumerate(cases):
            good = self.good is not None and case.judgement.score > self.good
            if case.judgement.text and not good:
                task = block("TASK", case.episode.task.prompt)
                context = f"{task}\n{case.graph.listing(backward.params)}"
                for target in backward.reached(number):
                    backward.collect(target, case.feedback(case.judgement.text, context))
        return backward.of_params


@dataclass(frozen=True)
class Silent:
    """Control: another propagator's feedback on each param, with nothing said. Its calls are made,
    and the rewriter is asked."""

    propagator: Propagator

    def propagate(
        self, helpers: Helpers, cases: Sequence[Case], targets: Sequence[Target]
    ) -> ByParam:
        return without_text(self.propagator.propagate(helpers, cases, targets))


def texts(feedback: Iterable[Feedback]) -> str:
    """The texts of feedback, a block each, in order."""
    return "\n".join(block("FEEDBACK", each.text) for each in feedback)


def _begun(cases: Sequence[Case], targets: Sequence[Target]) -> Backward:
    """A backward pass in which the outputs have what was said of them."""
    backward = Backward(cases, targets)
    for number, case in enumerate(cases):
        if case.judgement.text:
            for node in backward.outputs(number):
                backward.give(number, node, case.feedback(case.judgement.text))
            if not case.graph.nodes:
                for target in backward.reached(number):
                    backward.collect(target, case.feedback(case.judgement.text))
    return backward


def _deliver(backward: Backward, number: int, to: Node | Target, feedback: Feedback) -> None:
    if isinstance(to, Target):
        backward.collect(to, feedback)
    else:
        backward.give(number, to, feedback)
