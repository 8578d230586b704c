"""A swarm: agents as the nodes of a graph whose edges are decisions, so that a method can learn who
should read whom.

GPTSwarm (Zhuge et al., "Language Agents as Optimizable Graphs", arXiv 2402.16823): the edges of an
episode's graph are drawn one after the other, an edge that would close a cycle is not drawn, and an
agent is shown the task and what its predecessors answered. Not copied from there: the draws have by
default another order in each episode (with one order for all, a->b is taken twice as often as
b->a); no graph is without an edge to the output; a tie of the vote follows the episode's seed; an
agent whose answer reaches nobody is not asked; an agent that fails ends the episode, and is not a
missing input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..concurrency import gather
from ..lookup import trusted
from ..settings import setting
from ..state import Param
from ..system import System
from ..team import Team
from ..text.answers import majority
from ..text.templates import fields_in, render
from ..transcript import Output
from ..types import SettingError, Task, Turn, nearest

OUTPUT = "output"  # the node that makes the team's output
TABLE = "edges"  # the value that holds the logits of all edges
ON, OFF = "on", "off"
HEARD = (
    "{task}\n\nOthers answered:\n\n{others}\n\nUse what is right in that, correct what is wrong,"
    " and answer the task."
)
Edge = tuple[str, str]  # (source, target): the target is shown what the source answered


@trusted("system")
@dataclass
class Swarm(System):
    """Each agent is a node; the node `output` makes the team's output of the answers that lead to
    it.

    Possible edges are every ordered pair of agents, and each agent to `output`: N^2 of N agents.
    They are the decisions `SOURCE->TARGET`, `on` or `off`, with the logits `values["edges"][EDGE]`
    (without them an even chance). A greedy team takes those with P(on) >= 1/2 that close no cycle.

    Args:
        fixed: edges that are always there and never decided, such as `writer->critic` inside one
            agent of several nodes, or `writer->output`.
        judge: an agent, besides the nodes, that makes the output of the answers it is shown; ""
            takes the majority (ties: see `answers.majority`).
        views: how the task is put to an agent, by its name, as a template with `prompt` and public
            keys of `task.meta`; others get the task as it is.
        heard: what an agent with predecessors is told, as a template with `task` (its view) and
            `others` (their answers, each under its agent's name). Without `others` agents do not
            read one another: edges between them are decided and change nothing.
    """

    fixed: Sequence[str] = ()
    order: str = setting(
        "in which order edges are decided: random (drawn for each episode; a greedy team begins"
        " with the likeliest) or fixed (pairs of agents as they stand, then edges to the output)",
        "random",
        choices=("random", "fixed"),
    )
    judge: str = ""
    views: Mapping[str, str] = field(default_factory=dict)
    heard: str = HEARD

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fixed = tuple(self.fixed)
        names = [spec.name for spec in self.specs]
        if OUTPUT in names:
            raise SettingError(f"agents: {OUTPUT!r} is a swarm's last node; choose another name")
        if self.judge and self.judge not in names:
            raise SettingError(f"judge: {self.judge!r} is no agent; {nearest(self.judge, names)}")
        if not self.nodes:
            raise SettingError(f"agents: expected others besides the judge {self.judge!r}")
        for name, template in self.views.items():
            if name not in names:
                raise SettingError(f"views.{name}: no such agent; {nearest(name, names)}")
            fields_in(template, setting=f"views.{name}")
        self._quoting("", [])  # checks the template
        if self.judge and not self._quotes:
            raise SettingError(f"heard: without {{others}} the judge {self.judge!r} sees no answer")
        _check_fixed(self.fixed, self.nodes)

    @property
    def _quotes(self) -> bool:
        """Whether agents are shown what others answered."""
        return "others" in fields_in(self.heard, setting="heard")

    @property
    def nodes(self) -> tuple[str, ...]:
        """The agents that are nodes: all but the judge."""
        return tuple(spec.name for spec in self.specs if spec.name != self.judge)

    @property
    def possible_edges(self) -> tuple[Edge, ...]:
        """The edges that are decided: pairs of agents as they stand, then those to `output`."""
        pairs = [(a, b) for a in self.nodes for b in self.nodes if a != b]
        edges = pairs + [(a, OUTPUT) for a in self.nodes]
        return tuple(edge for edge in edges if edge_name(edge) not in self.fixed)

    def params(self) -> tuple[Param, ...]:
        """The agents' params, and the logits of the edges."""
        names = tuple(map(edge_name, self.possible_edges))

        def legal(value: Mapping[str, Mapping[str, float]]) -> str | None:
            for name, logits in value.items():
                if not isinstance(logits, Mapping) or set(logits) - {ON, OFF}:
                    return f"{name}: expected logits of {ON!r} and {OFF!r}, got {logits!r:.60}"
            return None

        role = "who is shown whose answer, and whose answer makes the output"
        edges = Param(TABLE, {}, "logits", role=role, options=names, legal=legal)
        return (*super().params(), edges)

    async def run(self, task: Task, team: Team) -> Output:
        edges = [edge for edge in self.decide(team) if self._quotes or edge[1] == OUTPUT]
        turns: dict[str, Turn] = {}
        for layer in layers(edges, self.nodes):
            prompts = [self._prompt(name, task, self._shown(name, edges, turns)) for name in layer]
            replies = await gather(
                team[name].reply(text, reads=reads)
                for name, (text, reads) in zip(layer, prompts, strict=True)
            )
            turns |= zip(layer, replies, strict=True)
        answers = self._shown(OUTPUT, edges, turns)
        if self.judge and answers:
            text, reads = self._prompt(self.judge, task, answers)
            verdict = await team[self.judge].reply(text, reads=reads)
            return Output(verdict.text, [verdict])
        return Output(majority(answers, team.rng), answers)

    def decide(self, team: Team) -> list[Edge]:
        """The edges of an episode's graph: the fixed ones, then those decided to be on.

        Where there is no choice no decision is recorded: an edge that would close a cycle is left
        out, and the last one to the output is taken if no other leads there.
        """
        edges = [fixed_edge(name) for name in self.fixed]
        order = self._in_order(team)
        last = next((edge for edge in reversed(order) if edge[1] == OUTPUT), None)
        for edge in order:
            if closes_cycle(edge, edges):
                continue
            alone = edge == last and all(target != OUTPUT for _, target in edges)
            if alone or team.decide(edge_name(edge), (ON, OFF), table=TABLE) == ON:
                edges.append(edge)
        return edges

    def _in_order(self, team: Team) -> list[Edge]:
        """The possible edges in the order of an episode's decisions. Of a greedy team the likeliest
        edge to the output (the first of several) comes last, since it is the one to stay."""
        edges = [*self.possible_edges]
        if team.greedy:
            table = team.values.get(TABLE) or {}
            rows = {edge: table.get(edge_name(edge)) or {} for edge in edges}
            logit = {edge: row.get(ON, 0.0) - row.get(OFF, 0.0) for edge, row in rows.items()}
            pairs = [edge for edge in edges if edge[1] != OUTPUT]
            if self.order == "random":
                pairs.sort(key=lambda edge: -logit[edge])
            to_output = [edge for edge in reversed(edges) if edge[1] == OUTPUT]
            edges = pairs + sorted(to_output, key=logit.__getitem__)
        elif self.order == "random":
            team.rng.shuffle(edges)
        return edges

    def _shown(self, node: str, edges: Sequence[Edge], turns: Mapping[str, Turn]) -> list[Turn]:
        """The answers that a node is given, in the order of the team."""
        return [turns[name] for name in self.nodes if (name, node) in edges]

    def _prompt(self, name: str, task: Task, shown: Sequence[Turn]) -> tuple[str, list[Turn]]:
        """What an agent is told, and the turns that are quoted in it."""
        view = render(
            self.views.get(name, "{prompt}"),
            {**task.meta, "prompt": task.prompt},
            setting=f"views.{name}",
            context=f" for task {task.id!r}",
        )
        return (self._quoting(view, shown), [*shown]) if shown else (view, [])

    def _quoting(self, view: str, shown: Sequence[Turn]) -> str:
        others = "\n\n".join(f"[{turn.agent}] {turn.text}" for turn in shown)
        return render(self.heard, {"task": view, "others": others}, setting="heard")


def edge_name(edge: Edge) -> str:
    """`SOURCE->TARGET`, the name of the edge's decision."""
    return "->".join(edge)


def fixed_edge(name: str) -> Edge:
    """The edge of the name `SOURCE->TARGET`."""
    source, _, target = name.partition("->")
    return source, target


def _check_fixed(fixed: Sequence[str], nodes: Sequence[str]) -> None:
    """Refuse what is no edge between these nodes, and fixed edges with a cycle."""
    edges: list[Edge] = []
    for name in fixed:
        source, target = edge = fixed_edge(str(name))
        if source not in nodes or target not in (*nodes, OUTPUT):
            raise SettingError(
                f"fixed: {name!r} is no edge of this swarm; expected AGENT->AGENT or"
                f" AGENT->{OUTPUT} with agents of {', '.join(nodes)}"
            )
        if closes_cycle(edge, edges):
            raise SettingError(f"fixed: {name!r} closes a cycle of fixed edges; leave one out")
        edges.append(edge)


def reached_from(node: str, edges: Iterable[Edge]) -> set[str]:
    """The nodes that a path of these edges leads to, `node` itself included."""
    following: dict[str, list[str]] = {}
    for source, target in edges:
        following.setdefault(source, []).append(target)
    reached, left = {node}, [node]
    while left:
        new = set(following.get(left.pop(), ())) - reached
        reached |= new
        left += new
    return reached


def closes_cycle(edge: Edge, edges: Iterable[Edge]) -> bool:
    """Whether the edge would close a cycle with these, which have none."""
    source, target = edge
    return source in reached_from(target, edges)


def layers(edges: Sequence[Edge], nodes: Sequence[str]) -> list[list[str]]:
    """The nodes from which a path leads to `output`, in layers: each is shown only what layers
    before its own answered. Inside a layer, in the order of `nodes`. The edges have no cycle."""
    needed = reached_from(OUTPUT, [(target, source) for source, target in edges])
    left = [node for node in nodes if node in needed]
    found: list[list[str]] = []
    while left:
        waiting = {target for source, target in edges if source in left}
        found.append([node for node in left if node not in waiting])
        left = [node for node in left if node in waiting]
    return found
