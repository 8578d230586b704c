"""An agentic supernet: layers of operators, of which a controller activates some for each query.

MaAS (Zhang et al., "Multi-agent Architecture Search via Agentic Supernet", arXiv:2502.04180): a
system is drawn layer by layer from pi_l(O | query, earlier layers), every active operator of a
layer reads what the layer before gave, and early exit ends it. The controller sees the query, never
an answer. Against the authors' code: what cannot work is no option rather than drawn and repaired
(early exit and operators that need a solution in the first layer); each draw's log-prob is that of
the draw among what is left, so their sum is the log-prob of the sequence drawn; pi is the softmax
of unbounded scores (cosines bound it: with 8 operators to at most .514); no last step is fixed.

    Supernet(["solver"], operators=["generate", "answer_generate", "self_consistency", "ensemble"])
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..concurrency import gather
from ..execution import ProgramError
from ..lookup import load_function, trusted
from ..settings import setting
from ..state import Param
from ..system import System
from ..team import Team
from ..text.ngrams import ngrams
from ..transcript import Operation, Output
from ..types import Decision, SettingError, Task, nearest
from .chooser import Chooser, ControllerShape
from .operators import Operator, OperatorCall, OperatorContext, prompt_for, resolve_operators
from .solvers import SOLVERS, TEMPLATES, most_common
from .workflow import check_executors

VALUE = "supernet"  # the value that holds the controller's weights
EXIT = "early_exit"  # the option that ends the system with the layer before
DEFAULT = ("generate", "answer_generate", "self_consistency", "ensemble", "self_refine")
ENCODERS: Mapping[str, Callable[[str], Sequence[float]]] = {"ngrams": ngrams}
READS = ("solutions", "solution", "analysis")  # parameters that earlier solutions fill
MAX_CACHED = 4096  # texts whose features are kept
Layers = list[list[str]]  # by layer the operators drawn, `EXIT` included


@trusted("system")
@dataclass
class Supernet(System):
    """Executors, and the operators that they answer for. All agents are executors.

    A layer draws operators until their probabilities sum to `threshold`; a greedy team takes the
    likeliest ones. The decisions of layer l have the name `layerL`, the logits are the
    controller's. The answer is the one that most solutions of the last layer give. An operator that
    fails gives no solution; its operation holds why.

    Args:
        operators: names of `SOLVERS` or `module:NAME` of your own, as a list, or as a mapping from
            a name of your choice, so that one operator may stand there with several `prompts`.
        profiles: by operator, the text that tells the controller what it is; by default its name
            and its function's docstring.
        executors: agent by operator; "" names the one for all others, by default the first agent.
        prompts: templates by operator in place of `solvers.TEMPLATES`, and `review` and `revise`,
            which `self_refine` uses.
        encoder: what makes features of a text: `ngrams`, or `module:function` of your own (text ->
            numbers; frozen: the same text has the same numbers at any time). Such as
            `marlora.trainers.values.text_encoder:mean_pooled(FOLDER_OR_HUB_NAME)`.
        max_text: characters of a solution.
    """

    operators: Sequence[str] | Mapping[str, str] = DEFAULT
    profiles: Mapping[str, str] = field(default_factory=dict)
    executors: Mapping[str, str] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)
    layers: int = setting("layers of operators", 4, at_least=1)
    threshold: float = setting(
        "a layer draws operators until their probabilities sum to this", 0.3, above=0, at_most=1
    )
    early_exit: bool = setting("later layers may end the system", True)
    hidden: int = setting("hidden units of the controller, per layer", 32, at_least=1)
    encoder: str = "ngrams"
    max_text: int = setting("characters of a solution", 20_000, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [spec.name for spec in self.specs]
        self.executors = {"": names[0], **self.executors}
        self.callable = _operators(self.operators)
        self.templates = {
            **TEMPLATES,
            **{
                n: TEMPLATES.get(o.function.__name__, "{problem}") for n, o in self.callable.items()
            },
            **self.prompts,
        }
        for key in {*self.profiles, *self.prompts} - {*self.callable, *TEMPLATES}:
            raise SettingError(
                f"profiles, prompts: {key!r} is no operator of this supernet;"
                f" {nearest(key, self.callable)}"
            )
        own = {name: self.templates[name] for name in self.callable}
        check_executors(self.callable, self.executors, own, names)
        for name in ("review", "revise"):
            prompt_for(name, self.templates, dict.fromkeys(("problem", "solution", "feedback"), ""))
        if not self.options(1):
            raise SettingError(
                "operators: each of them reads an earlier solution, so the first layer has none;"
                " add one that solves the problem, such as generate"
            )
        self.encode = load_function("encoder", self.encoder, ENCODERS)
        self._features_of: dict[str, tuple[float, ...]] = {}  # by text

    # what a controller chooses among

    @property
    def scored(self) -> tuple[str, ...]:
        """The operators and early exit, in the order of their scores."""
        return (*self.callable, EXIT)

    def options(self, layer: int) -> tuple[str, ...]:
        """What layer 1, 2, ... draws from: in the first one what needs no solution."""
        if layer == 1:
            return tuple(name for name, o in self.callable.items() if not _needs_solution(o))
        return self.scored if self.early_exit else tuple(self.callable)

    @property
    def shape(self) -> ControllerShape:
        """The sizes of the controller. Encodes a text, so that an encoder may load its model."""
        size = len(self._features(""))
        return ControllerShape(self.layers, len(self.scored), size, self.hidden)

    def params(self) -> tuple[Param, ...]:
        """The agents' params, and the controller's weights."""
        role = "which operators answer which query"

        def legal(value: Any) -> str | None:
            return self.shape.fault(value) if value else None

        return (*super().params(), Param(VALUE, {}, "weights", role=role, legal=legal))

    def inputs(self, query: str, earlier: Iterable[Sequence[str]]) -> list[float]:
        """What the controller sees before a layer: the query's features, and per earlier layer the
        sum of its operators'."""
        found = [*self._features(query)]
        for operators in earlier:
            vectors = [self._features(self._profile(name)) for name in operators]
            found += [math.fsum(column) for column in zip(*vectors, strict=True)]
        return found

    def _profile(self, name: str) -> str:
        if name == EXIT:
            return "early exit: the answer stands, nothing more is asked"
        operator = self.callable[name]
        return self.profiles.get(name) or f"{name}: {operator.function.__doc__}"

    def _features(self, text: str) -> Sequence[float]:
        if text not in self._features_of:
            if len(self._features_of) >= MAX_CACHED:
                self._features_of.clear()
            self._features_of[text] = tuple(map(float, self.encode(text)))
        return self._features_of[text]

    def probabilities(
        self, weights: Mapping[str, str] | None, query: str, earlier: Sequence[Sequence[str]] = ()
    ) -> dict[str, float]:
        """pi of the layer after the `earlier` ones, by option."""
        return self._pi(Chooser(weights, self.shape), query, earlier)[1]

    def _pi(
        self, chooser: Chooser, query: str, earlier: Sequence[Sequence[str]]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Scores and probabilities of a layer's options."""
        layer = len(earlier) + 1
        found = chooser.scores(layer, self.inputs(query, earlier))
        by_name = dict(zip(self.scored, found, strict=True))
        scores = {name: by_name[name] for name in self.options(layer)}
        return scores, softmax(scores)

    # playing

    def draw(self, query: str, team: Team) -> Layers:
        """The operators of each layer, as decisions of the team. After early exit nothing is
        drawn."""
        chooser = Chooser(team.values.get(VALUE), self.shape)
        drawn: Layers = []
        for layer in range(1, self.layers + 1):
            scores, pi = self._pi(chooser, query, drawn)
            drawn.append(activate(team, f"layer{layer}", scores, pi, self.threshold))
            if EXIT in drawn[-1]:
                break
        return drawn

    async def run(self, task: Task, team: Team) -> Output:
        width = sum(operator.calls for operator in self.callable.values())
        context = OperatorContext(
            team, task, None, self.executors, self.templates, self.layers * width, self.max_text
        )
        solutions: list[Operation] = []
        for number, names in enumerate(self.draw(task.prompt, team), start=1):
            # Not in a coroutine: turn indices are reserved in the order of the operators.
            calls = [OperatorCall(context, self.callable[n]) for n in names if n != EXIT]
            texts = [str(solution) for solution in solutions]
            found = await gather(_solve(call, texts) for call in calls)
            given = [
                note(f"layer{number}", call, *each) for call, each in zip(calls, found, strict=True)
            ]
            solutions = [operation for operation in given if not operation.error] or solutions
            context.noted = solutions
        answer = most_common(map(str, solutions))
        return Output(answer, solutions)


def activate(
    team: Team, name: str, scores: Mapping[str, float], pi: Mapping[str, float], threshold: float
) -> list[str]:
    """The active operators of a layer: drawn without replacement, or by descending score if the
    team is greedy, until the probabilities `pi` of those drawn sum to the threshold, or early exit
    is drawn."""
    drawn: list[str] = []
    left = list(scores)
    while left and EXIT not in drawn and math.fsum(pi[each] for each in drawn) < threshold:
        logits = {option: scores[option] for option in left}
        drawn.append(team.decide(name, left, logits=logits))
        left.remove(drawn[-1])
    return drawn


def layers_of(decisions: Iterable[Decision]) -> Layers:
    """The operators drawn in each layer, from the decisions of an episode."""
    found: dict[str, list[str]] = {}
    for decision in decisions:
        found.setdefault(decision.name, []).append(decision.choice)
    return list(found.values())


def softmax(scores: Mapping[str, float]) -> dict[str, float]:
    """Probabilities by option."""
    top = max(scores.values())
    weights = {option: math.exp(score - top) for option, score in scores.items()}
    total = math.fsum(weights.values())
    return {option: weight / total for option, weight in weights.items()}


def note(layer: str, call: OperatorCall, text: str, error: str) -> Operation:
    """An operator's solution on record, or why it has none."""
    reads = {each.index: each for each in [*call.turns, *call.context.reads([text])]}
    name = f"{layer}.{call.operator.name}"
    return call.context.team.record(name, text, reads=[*reads.values()], error=error)


async def _solve(call: OperatorCall, solutions: Sequence[str]) -> tuple[str, str]:
    """(solution, why there is none) of an operator that is given the solutions of the layer
    before."""
    parameters = call.operator.signature.parameters
    best = most_common(solutions)
    given = {"solutions": [*solutions], "solution": best, "analysis": best}
    arguments = {name: given[name] for name in parameters if name in given}
    try:
        text = str(await call.operator(call, **arguments))
    except ProgramError as error:
        return "", str(error)
    if len(text) > call.context.max_text:
        return "", f"a solution of more than {call.context.max_text} characters"
    return text, "" if text.strip() else "an empty solution"


def _needs_solution(operator: Operator) -> bool:
    parameters = operator.signature.parameters
    return any(p.name in READS and p.default is p.empty for p in parameters.values())


def _operators(given: Sequence[str] | Mapping[str, str]) -> dict[str, Operator]:
    """Operators by the name they have in a supernet."""
    if isinstance(given, str) or not given:
        raise SettingError(
            f"operators: expected names of operators, such as {', '.join(DEFAULT)}; got {given!r}"
        )
    named = given if isinstance(given, Mapping) else {}
    found: dict[str, Operator] = {}
    for alias in given:
        name = str(named.get(alias, alias))
        ((shipped, operator),) = _resolved(name).items()
        found[alias if named else shipped] = (
            dataclasses.replace(operator, alias=alias) if named else operator
        )
    if EXIT in found:
        raise SettingError(f"operators: {EXIT!r} is an option of every layer; choose another name")
    for name, operator in found.items():
        unknown = [
            p.name
            for p in operator.signature.parameters.values()
            if p.name not in READS and p.default is p.empty
        ]
        if unknown:
            raise SettingError(
                f"operators.{name}: it needs {', '.join(unknown)}, which a supernet cannot give; it"
                f" gives {', '.join(READS)}"
            )
    return found


def _resolved(name: str) -> dict[str, Operator]:
    return {name: SOLVERS[name]} if name in SOLVERS else resolve_operators([name])
