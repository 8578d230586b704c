"""The graph of an episode that feedback flows over: its turns and operations, what each was shown,
and what the output was made of. Nothing is traced for it: it is read from the record."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from ...agents.state import Param
from ...agents.text.tags import block, nested
from ...agents.transcript import Operation
from ...agents.types import Turn
from ...rollouts.types import Episode


@dataclass(frozen=True)
class Node:
    """A taken turn or an operation of an episode; `reads` are indices of earlier nodes, an agent's
    own earlier turns of the same chat among them."""

    of: Turn | Operation
    reads: tuple[int, ...]

    @property
    def index(self) -> int:
        return self.of.index

    @property
    def text(self) -> str:
        """What it came to; of an operation that failed, the error."""
        error = "" if isinstance(self.of, Turn) else self.of.error
        return error or self.of.text

    @property
    def agent(self) -> str:
        """The agent of a turn, "" of an operation."""
        return self.of.agent if isinstance(self.of, Turn) else ""

    @property
    def name(self) -> str:
        return self.of.agent if isinstance(self.of, Turn) else self.of.name

    @property
    def prompt(self) -> str:
        """A turn's system message, "" if it has none."""
        messages = self.of.messages if isinstance(self.of, Turn) else ()
        return messages[0].content if messages and messages[0].role == "system" else ""

    @property
    def input(self) -> str:
        """What a turn was sent besides its system message: the message, or the chat in lines `ROLE:
        text`; "" of an operation."""
        messages = self.of.messages if isinstance(self.of, Turn) else ()
        if messages and messages[0].role == "system":
            messages = messages[1:]
        if len(messages) == 1:
            return messages[0].content
        return "\n".join(f"{message.role}: {message.content}" for message in messages)


class Graph:
    """The nodes of one episode by index, edges from what is read to what reads it.

    Edges go from lower to higher indices, so the order of indices is a topological one. `outputs`
    are the nodes that the output was made of: those that the system named (`Episode.output_from`);
    where it returned a plain text, the last node with this text; where there is none (an episode
    that failed, a text put together), all nodes that nothing reads.
    """

    def __init__(self, episode: Episode) -> None:
        self.episode = episode
        turns = [turn for turn in episode.turns if turn.taken]
        nodes = [Node(turn, tuple(sorted({*turn.reads, *_chat(turn, turns)}))) for turn in turns]
        nodes += [Node(operation, operation.reads) for operation in episode.operations]
        known = {node.index for node in nodes}
        self.nodes: dict[int, Node] = {
            node.index: Node(node.of, tuple(i for i in node.reads if i in known))
            for node in sorted(nodes, key=lambda node: node.index)
        }
        self.outputs = tuple(i for i in episode.output_from if i in known) or self._outputs()

    def _outputs(self) -> tuple[int, ...]:
        output = self.episode.output
        same = [i for i, node in self.nodes.items() if output is not None and node.text == output]
        if same:
            return (same[-1],)
        read = {i for node in self.nodes.values() for i in node.reads}
        return tuple(i for i in self.nodes if i not in read)

    @functools.cached_property
    def minimal(self) -> dict[int, Node]:
        """The nodes that the output depends on, in order."""
        reached = set(self.outputs)
        for index in sorted(self.nodes, reverse=True):
            if index in reached:
                reached.update(self.nodes[index].reads)
        return {index: node for index, node in self.nodes.items() if index in reached}

    @functools.cached_property
    def levels(self) -> dict[int, int]:
        """By index of a node of the minimal graph: how many edges lie between it and the output at
        most, from 1. Every reader of a node has a lower level."""
        levels = dict.fromkeys(self.outputs, 1)
        for index in sorted(self.minimal, reverse=True):
            for read in self.minimal[index].reads:
                levels[read] = max(levels.get(read, 0), levels[index] + 1)
        return levels

    def own(self, node: Node, params: Sequence[Param]) -> list[Param]:
        """The params that act at a node: those of its agent. A param of the system itself acts at
        the operations that have its name, and where the system records none at the nodes that the
        output was made of."""
        return [p for p in params if self._acts(p, node)]

    def _acts(self, param: Param, node: Node) -> bool:
        if param.agent:
            return param.agent == node.agent
        if param.name in self._operations:
            return isinstance(node.of, Operation) and node.name == param.name
        return node.index in self.outputs

    @functools.cached_property
    def _operations(self) -> frozenset[str]:
        return frozenset(operation.name for operation in self.episode.operations)

    def moving(self, params: Sequence[Param]) -> frozenset[int]:
        """The nodes of the minimal graph that one of these params acts at, or that depend on such
        a node: the only ones that feedback has to reach."""
        moving: set[int] = set()
        for index, node in self.minimal.items():
            if self.own(node, params) or moving.intersection(node.reads):
                moving.add(index)
        return frozenset(moving)

    def conversation(self, node: Node) -> str:
        """A node as blocks: of a turn its system message, input and output; of an operation its
        name, the texts it was made of, and its result."""
        if isinstance(node.of, Turn):
            blocks = [block("SYSTEM", node.prompt)] if node.prompt else []
            blocks += [block("INPUT", node.input), block("OUTPUT", node.text)]
        else:
            blocks = [block("OPERATION", node.of.name)]
            blocks += [block("INPUT", self.nodes[i].text) for i in node.reads]
            blocks.append(block("ERROR" if node.of.error else "OUTPUT", node.text))
        return "\n".join(blocks)

    def listing(self, params: Sequence[Param]) -> str:
        """The minimal graph as blocks, one per node in order: what it is, what it reads and which
        params act at it, and its text."""
        lines = []
        for index, node in self.minimal.items():
            reads = ", ".join(f"n{i}" for i in node.reads) or "the task"
            own = ", ".join(p.name for p in self.own(node, params))
            head = f"n{index} = {node.name}({reads})" + (f" with {own}" if own else "")
            failed = isinstance(node.of, Operation) and node.of.error
            lines.append(f"{head}\n{block('ERROR' if failed else 'TEXT', node.text)}")
        return nested("GRAPH", "\n".join(lines))


def _chat(turn: Turn, turns: Sequence[Turn]) -> list[int]:
    """The agent's own earlier turns of the same chat: those whose messages and text the turn's
    messages begin with."""
    return [
        other.index
        for other in turns
        if other.index < turn.index
        and len(other.messages) < len(turn.messages)
        and turn.messages[: len(other.messages)] == other.messages
        and turn.messages[len(other.messages)].role == "assistant"
        and turn.messages[len(other.messages)].content == other.text
    ]
