"""Feedback on the nodes of graphs, and the order in which it flows from outputs to params."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ...rollouts.types import Episode
from .evaluators import Judgement
from .graph import Graph, Node
from .targets import Target


@dataclass(frozen=True)
class Feedback:
    """What one task taught about one param, or about the output of one node.

    Args:
        text: in words.
        task, episode: ids of what it came from.
        score: of the episode.
        context: the conversation that it is about, as blocks.
        order: index of the node that it came through.
        place: where in a structure that node stood, as the system recorded it.
        saw_gold: it may hold the task's answer.
    """

    text: str
    task: str
    episode: str
    score: float
    context: str = ""
    order: int = -1
    saw_gold: bool = False
    place: str = ""


@dataclass(frozen=True)
class Case:
    """An episode, its graph, and what the evaluator said of it."""

    episode: Episode
    graph: Graph
    judgement: Judgement

    def feedback(self, text: str, context: str = "", order: int = -1, place: str = "") -> Feedback:
        """Feedback that this case gives."""
        return Feedback(
            text,
            self.episode.task.id,
            self.episode.id,
            self.judgement.score,
            context,
            order,
            self.judgement.saw_gold,
            place,
        )


ByParam = dict[str, list[Feedback]]


class Backward:
    """A backward pass over several cases at once, in reverse topological order.

    A node is handed out once every node that reads it has been: then it has one feedback per
    reader that had something to say. Nodes that no param acts at or leads to are left out.

    `of_params` collects what reached each param, cases in order.
    """

    def __init__(self, cases: Sequence[Case], targets: Sequence[Target]) -> None:
        self.cases, self.targets = cases, targets
        self.params = [target.param for target in targets]
        self.of_params: ByParam = {target.name: [] for target in targets}
        self._of_nodes: dict[tuple[int, int], list[Feedback]] = {}
        self._moving = [case.graph.moving(self.params) for case in cases]

    def outputs(self, number: int) -> list[Node]:
        """The nodes that the output of a case was made of and that feedback has to reach."""
        graph = self.cases[number].graph
        return [graph.nodes[i] for i in graph.outputs if i in self._moving[number]]

    def predecessors(self, number: int, node: Node) -> list[Node]:
        """The nodes that a node read and that feedback has to reach."""
        graph = self.cases[number].graph
        return [graph.nodes[i] for i in node.reads if i in self._moving[number]]

    def moves(self, number: int, index: int) -> bool:
        """Whether feedback has to reach the node of this index."""
        return index in self._moving[number]

    def own(self, number: int, node: Node) -> list[Target]:
        """The params that act at a node."""
        names = {p.name for p in self.cases[number].graph.own(node, self.params)}
        return [target for target in self.targets if target.name in names]

    def reached(self, number: int) -> list[Target]:
        """The params that the output of a case depends on; all of them where not a single node was
        recorded, since the first prompt failed."""
        graph = self.cases[number].graph
        if not graph.nodes:
            return list(self.targets)
        names = {p.name for node in graph.minimal.values() for p in graph.own(node, self.params)}
        return [target for target in self.targets if target.name in names]

    def give(self, number: int, node: Node, feedback: Feedback) -> None:
        """Add feedback on the output of a node."""
        self._of_nodes.setdefault((number, node.index), []).append(feedback)

    def of(self, number: int, node: Node) -> list[Feedback]:
        """The feedback on the output of a node, in the order in which it was given."""
        return self._of_nodes.get((number, node.index), [])

    def collect(self, target: Target, feedback: Feedback) -> None:
        """Add feedback on a param."""
        self.of_params[target.name].append(feedback)

    def levels(self) -> Iterator[list[tuple[int, Node]]]:
        """The nodes that have feedback, (number of the case, node), in portions that do not depend
        on one another; those of a portion are looked up once the portions before are done."""
        deepest = max(
            (max(case.graph.levels.values(), default=0) for case in self.cases), default=0
        )
        for level in range(1, deepest + 1):
            yield [
                (number, case.graph.nodes[index])
                for number, case in enumerate(self.cases)
                for index, own in sorted(case.graph.levels.items(), reverse=True)
                if own == level and self._of_nodes.get((number, index))
            ]

    def ordered(self, in_call_order: bool = False) -> ByParam:
        """`of_params` with the feedback of each param in the order of cases, later nodes first, or
        earlier ones first."""
        sign = 1 if in_call_order else -1
        order = {case.episode.id: number for number, case in enumerate(self.cases)}
        return {
            name: sorted(given, key=lambda f: (order[f.episode], sign * f.order))
            for name, given in self.of_params.items()
        }


def without_text(given: ByParam) -> ByParam:
    """The same feedback with nothing said: the control without feedback."""
    return {name: [replace(f, text="", context="") for f in own] for name, own in given.items()}
