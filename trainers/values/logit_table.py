"""Logits of decisions, learnt by policy gradient with an Adam of their own. Plain Python floats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...agents.types import Decision, SettingError, nearest
from ...rollouts.types import DecisionKey, Episode
from .parts import JsonPart, json_sha256

Logits = dict[str, dict[str, float]]  # decision -> option -> logit
TOLERANCE = 1e-6  # between a recorded log-prob and the one that its episode's table gives


class LogitTable(JsonPart):
    """A table of logits: P(option) = softmax over the options of one decision. One value of the
    team, `{name: {decision: {option: logit}}}`, however many decisions it has.

    Args:
        name: of the part and of the value; a system reads it by `team.decide(..., table=name)`.
        options: the options of each decision, at least two.
        learning_rate: of Adam; 0 moves nothing.
        initial: logits to begin with; 0 where it has none (`logit(p)` gives a binary decision's).
        reference: an option whose logit stays 0. A binary decision with it has one parameter, and
            P(other option) is its sigmoid, as in GPTSwarm (arXiv:2402.16823). "": none.
        betas, epsilon: of Adam (arXiv:1412.6980), in torch's form.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Sequence[str]],
        learning_rate: float,
        *,
        initial: Mapping[str, Mapping[str, float]] | None = None,
        reference: str = "",
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
    ) -> None:
        super().__init__(name)
        if not math.isfinite(learning_rate) or learning_rate < 0:
            raise SettingError(f"{name}: expected a learning rate from 0, got {learning_rate!r}")
        if not all(0 <= beta < 1 for beta in betas) or not epsilon > 0:
            raise SettingError(
                f"{name}: expected betas from 0 and below 1 and an epsilon above 0, got {betas} and"
                f" {epsilon!r}"
            )
        self.learning_rate, self.reference = learning_rate, reference
        self.betas, self.epsilon = betas, epsilon
        self.logits = _table(name, options)
        self.set_logits(initial or {})
        self._first, self._second = _zeros(self.logits), _zeros(self.logits)
        self._steps = 0

    def set_logits(self, logits: Mapping[str, Mapping[str, float]]) -> None:
        """Set logits by decision and option, such as a team's value of this name; those that are
        not given stay. Raises `SettingError` for a decision or option that the table has not."""
        for decision, row in logits.items():
            self._set_row(decision, row)

    def _set_row(self, decision: str, logits: Mapping[str, float]) -> None:
        row = self._row(decision)
        for option, value in logits.items():
            if option not in row or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise SettingError(
                    f"{self.name}.{decision}: expected a finite logit for each of {list(row)}, got"
                    f" {option!r}: {value!r}"
                )
            if option == self.reference and value:
                raise SettingError(
                    f"{self.name}.{decision}.{option}: the logit of the reference option stays 0,"
                    f" got {value!r}"
                )
            row[option] = float(value) + 0.0  # -0.0 becomes 0.0

    def _row(self, decision: str) -> dict[str, float]:
        if decision not in self.logits:
            raise SettingError(
                f"{self.name}: no decision {decision!r} in this table;"
                f" {nearest(decision, sorted(self.logits))}"
            )
        return self.logits[decision]

    def values(self) -> Mapping[str, Any]:
        return {self.name: _copy(self.logits)}

    def probabilities(self) -> dict[str, dict[str, float]]:
        """P(option) by decision and option."""
        return {decision: softmax(row) for decision, row in self.logits.items()}

    def decisions(self, episodes: Iterable[Episode]) -> dict[DecisionKey, Decision]:
        """The decisions of these episodes that this table made: those with a name of its own.

        Raises `ValueError` if a log-prob differs by more than 1e-6 from the one that the table in
        the episode's own state gives: then that is not what the choice was drawn from.
        """
        own: dict[DecisionKey, Decision] = {}
        for episode in episodes:
            table = episode.state.values.get(self.name)
            for decision in episode.decisions:
                if decision.name in self.logits:
                    _check_recorded(self.name, table, episode, decision)
                    own[episode.id, decision.index] = decision
        return own

    def gradient(
        self, weights: Mapping[DecisionKey, float], decisions: Mapping[DecisionKey, Decision]
    ) -> Logits:
        """Gradient of the loss of `update` by decision and option: -(1/N) sum A (onehot - p)."""
        terms: dict[str, dict[str, list[float]]] = {
            name: {option: [] for option in row} for name, row in self.logits.items()
        }
        for key, weight in weights.items():
            decision = self._weighted(key, weight, decisions)
            row = self.logits[decision.name]
            chances = softmax({option: row[option] for option in decision.options})
            for option, chance in chances.items():
                if option != self.reference:
                    terms[decision.name][option].append(
                        -weight * ((option == decision.choice) - chance)
                    )
        count = max(num_episodes(weights), 1)
        return {
            name: {option: math.fsum(found) / count for option, found in row.items()}
            for name, row in terms.items()
        }

    def update(
        self, weights: Mapping[DecisionKey, float], decisions: Mapping[DecisionKey, Decision]
    ) -> dict[str, float]:
        """One step of Adam down the loss -(1/N) sum of A log p(choice) (REINFORCE).

        Args:
            weights: A by decision (`credit.decisions.decision_credit`). N is the number of
                episodes among its keys, those with weight 0 included.
            decisions: what was decided, from `decisions(episodes)`; those without a weight are
                left out.

        p is the present table's over the options that the decision had. As in torch, a step moves
        every logit by its moments, also one that no decision met; without any weight but 0 there is
        no step. Returns the loss before the step, the gradient's norm, the mean entropy of the
        table (nats), and N. Raises `SettingError` or `ValueError` for a decision or an option that
        is not the table's, or a weight that is not finite.
        """
        gradient = self.gradient(weights, decisions)
        losses = [
            -weight * self.logprob(decisions[key]) for key, weight in weights.items() if weight
        ]
        metrics = {
            "loss": math.fsum(losses) / max(num_episodes(weights), 1),
            "grad_norm": math.sqrt(
                math.fsum(g * g for row in gradient.values() for g in row.values())
            ),
            "entropy": self.entropy(),
            "episodes": num_episodes(weights),
        }
        if losses:
            self._adam(gradient)
        return metrics

    def logprob(self, decision: Decision) -> float:
        """Log-prob of the choice among the options that the decision had, by the present table."""
        row = self._row(decision.name)
        return log_softmax({option: row[option] for option in decision.options})[decision.choice]

    def entropy(self) -> float:
        """Mean over the decisions of -sum p log p, in nats."""
        each = (
            -math.fsum(math.exp(logprob) * logprob for logprob in log_softmax(row).values())
            for row in self.logits.values()
        )
        return math.fsum(each) / len(self.logits)

    def _weighted(
        self, key: DecisionKey, weight: float, decisions: Mapping[DecisionKey, Decision]
    ) -> Decision:
        if key not in decisions:
            raise ValueError(
                f"{self.name}: decision {key} has a weight and is not among those given"
            )
        decision = decisions[key]
        unknown = set(decision.options) - set(self._row(decision.name))
        if unknown:
            raise ValueError(
                f"{self.name}.{decision.name}: decision {key} had the options {sorted(unknown)},"
                f" which have no logit here; the table has {list(self.logits[decision.name])}"
            )
        if not math.isfinite(weight):
            raise ValueError(f"{self.name}: weight {weight} of decision {key} is not finite")
        return decision

    def _adam(self, gradient: Logits) -> None:
        beta1, beta2 = self.betas
        self._steps += 1
        size = self.learning_rate / (1 - beta1**self._steps)
        correction = math.sqrt(1 - beta2**self._steps)
        for decision, row in self.logits.items():
            first, second = self._first[decision], self._second[decision]
            for option, g in gradient[decision].items():
                first[option] += (1 - beta1) * (g - first[option])
                second[option] = beta2 * second[option] + (1 - beta2) * g * g
                spread = math.sqrt(second[option]) / correction + self.epsilon
                row[option] -= size * first[option] / spread

    def sha256(self) -> str:
        return json_sha256(self.logits)

    def state_dict(self) -> dict[str, Any]:
        return {
            "logits": _copy(self.logits),
            "adam": {
                "steps": self._steps,
                "first": _copy(self._first),
                "second": _copy(self._second),
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        adam = state["adam"]
        for table in (state["logits"], adam["first"], adam["second"]):
            self._check_shape(table)
        self.logits, self._first, self._second = (
            {
                decision: {option: float(table[decision][option]) for option in row}
                for decision, row in self.logits.items()
            }
            for table in (state["logits"], adam["first"], adam["second"])
        )
        self._steps = adam["steps"]

    def _check_shape(self, table: Mapping[str, Mapping[str, float]]) -> None:
        for decision in [*self.logits, *table]:
            mine, saved = list(self.logits.get(decision, ())), list(table.get(decision, ()))
            if sorted(mine) != sorted(saved):
                raise SettingError(
                    f"{self.name}.{decision}: this run's options are {mine}, the checkpoint's"
                    f" {saved}; resume with the same system"
                )


def softmax(logits: Mapping[str, float]) -> dict[str, float]:
    """Probabilities by option."""
    return {option: math.exp(logprob) for option, logprob in log_softmax(logits).items()}


def log_softmax(logits: Mapping[str, float]) -> dict[str, float]:
    """Log-probs by option, in nats."""
    top = max(logits.values())
    total = top + math.log(math.fsum(math.exp(value - top) for value in logits.values()))
    return {option: value - total for option, value in logits.items()}


def logit(probability: float) -> float:
    """log(p / (1 - p)): the logit against a reference option of 0 with which P(option) is p."""
    if not 0 < probability < 1:
        raise SettingError(f"probability: expected a number between 0 and 1, got {probability!r}")
    return math.log(probability / (1 - probability))


def num_episodes(keys: Iterable[DecisionKey]) -> int:
    """The number of episodes among these keys."""
    return len({episode for episode, _ in keys})


def _table(name: str, options: Mapping[str, Sequence[str]]) -> Logits:
    """Zeros by decision and option. Raises `SettingError` for a decision without a choice."""
    if not options:
        raise SettingError(f"{name}: expected at least one decision with its options")
    for decision, known in options.items():
        if isinstance(known, str) or len(set(known)) != len(known) or len(known) < 2:
            raise SettingError(
                f"{name}.{decision}: expected at least two different options, got {known!r}"
            )
    return {decision: dict.fromkeys(known, 0.0) for decision, known in options.items()}


def _zeros(table: Logits) -> Logits:
    return {decision: dict.fromkeys(row, 0.0) for decision, row in table.items()}


def _copy(table: Logits) -> Logits:
    return {decision: dict(row) for decision, row in table.items()}


def _check_recorded(name: str, table: Any, episode: Episode, decision: Decision) -> None:
    """Raise `ValueError` unless the recorded log-prob is what the episode's table gives."""
    row = (table or {}).get(decision.name, {})
    logits = {option: row.get(option, 0.0) for option in decision.options}
    expected = log_softmax(logits)[decision.choice]
    if abs(expected - decision.logprob) > TOLERANCE:
        raise ValueError(
            f"episode {episode.id}, decision {decision.index} ({decision.name!r}): log-prob"
            f" {decision.logprob:.6f} of {decision.choice!r}, but the value {name!r} of the"
            f" episode's own state gives {expected:.6f}; the choice was drawn from another table"
        )
