"""Whether a run learnt anything, read from its metrics: if not, the likely cause and the setting to
change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
ENDED = "the run ended"  # begins the warning that says why a run could not go on
ALL_TRUNCATED = 0.95  # mean share of truncated replies from which they are the cause


def learnt_nothing(rows: Sequence[Row], config: Mapping[str, Any]) -> str:
    """What the run, or some of its policies, did not learn and why; "" if every policy learnt.

    Args:
        rows: of metrics.jsonl.
        config: the run's settings.
    """
    if any((row.get("verifier") or {}).get("updates") for row in rows):
        return ""  # a head was trained, the policies were not meant to be
    names = list(dict.fromkeys(name for row in rows for name in row.get("policies") or {}))
    flat = _same_reward(rows) is not None and _learns_from_one_reward(config)
    silent = [n for n in names if flat or not any(map(_has_signal, _rows_of(rows, n)))]
    if not silent:
        return ""
    causes = {name: _cause(rows, list(_rows_of(rows, name)), config) for name in silent}
    if silent == names and len(set(causes.values())) == 1:
        return f"This run learnt nothing: {causes[silent[0]]}"
    what = "This run learnt nothing" if silent == names else "Part of the team learnt nothing"
    return f"{what}: " + "; ".join(f"policy {name!r}: {why}" for name, why in causes.items())


def settings_to_change(config: Mapping[str, Any]) -> dict[str, str]:
    """By metric with an alarm, which setting to change and from what value."""
    advice = {
        "truncated": f"raise max_completion_length from {config.get('max_completion_length')}",
        "constant_groups": (
            f"raise num_generations from {config.get('num_generations')} or temperature from"
            f" {config.get('temperature')}, or change tasks or rewards"
        ),
        "clipped": (
            f"lower learning_rate from {config.get('learning_rate')} or num_iterations from"
            f" {config.get('num_iterations')}"
        ),
        "entropy": (
            f"raise entropy_coef from {config.get('entropy_coef', 0)} or lower learning_rate from"
            f" {config.get('learning_rate')}"
        ),
        "mismatch": mismatch_advice(config),
    }
    own = [
        f"agents.{name}.sampling.max_tokens from {limit}"
        for name, limit in _own_limits(config.get("agents"))
    ]
    if own:
        advice["truncated"] += f", and {', '.join(own)}"
    return advice


def mismatch_advice(config: Mapping[str, Any]) -> str:
    """Which settings to change, one at a time, to find out why engine and trainer disagree: those
    that do not have the exact value yet."""
    exact = {"layout": "padded", "dtype": "float32", "engine": "transformers"}
    given = {name: config.get(name) for name in exact}
    tries = [
        f"{name} from {given[name]} to {value}"
        for name, value in exact.items()
        if given[name] != value
    ]
    if tries:
        return f"change {' or '.join(tries)} to find out which of them computes otherwise"
    return "set proof_every to 1 to prove every published version"


def _own_limits(agents: Any) -> Iterator[tuple[str, Any]]:
    """(agent, its own `max_tokens`) of agents whose settings name one."""
    for name, fields in (agents if isinstance(agents, Mapping) else {}).items():
        sampling = fields.get("sampling") if isinstance(fields, Mapping) else None
        if isinstance(sampling, Mapping) and sampling.get("max_tokens") is not None:
            yield name, sampling["max_tokens"]


def _rows_of(rows: Sequence[Row], policy: str) -> Iterator[Row]:
    return (own for row in rows if (own := (row.get("policies") or {}).get(policy)) is not None)


def _has_signal(own: Row) -> bool:
    """Whether a policy's row of a step shows an update from rewards."""
    return (
        bool(own.get("tokens"))
        and bool(own.get("applied", True))
        and own.get("constant_groups", 0.0) < 1.0
        and own.get("learning_rate", 1.0) != 0.0
    )


def _same_reward(rows: Sequence[Row]) -> float | None:
    """The reward that every episode of the run got; None if they differ."""
    ends = {row.get(key) for row in rows for key in ("reward_min", "reward_max")}
    return next(iter(ends)) if len(ends) == 1 else None


def _learns_from_one_reward(config: Mapping[str, Any]) -> bool:
    """Whether a rule of credit sees nothing but the metric."""
    return (
        bool(config.get("credit"))
        and len(config.get("rewards") or ()) == 1
        and not config.get("reward_weights")
        and config.get("credit") != "success"
    )


def _cause(rows: Sequence[Row], own: Sequence[Row], config: Mapping[str, Any]) -> str:
    """Why a policy learnt nothing in any step, in a sentence that names a setting."""
    advice = settings_to_change(config)
    truncated = sum(row.get("truncated", 0.0) for row in own) / len(own)
    if truncated >= ALL_TRUNCATED:
        return f"its replies were truncated (share {truncated:.2f}): {advice['truncated']}."
    updates = [row for row in own if row.get("tokens")]
    if updates and not any(row.get("applied", True) for row in updates):
        return (
            "no update was finite (samples are in dumps): lower learning_rate from"
            f" {config.get('learning_rate')} or set dtype to float32."
        )
    if updates and all(row.get("learning_rate", 1.0) == 0.0 for row in updates):
        return "learning_rate was 0 in every step: raise it (LoRA needs 1e-5 and up)."
    value, metric = _same_reward(rows), _metric(config)
    if value is not None:
        fit = (
            f"the reward may not fit the tasks ({config.get('tasks')}) or the form of the replies:"
            f" read episodes in the report, then change rewards, tasks or the agents' prompts"
            if value <= 0
            else "the tasks may be too easy, or the reward too generous: change tasks or rewards"
        )
        return f"every episode got {metric} {value:g}; {fit}."
    if config.get("num_generations") == 1 and any("constant_groups" in row for row in own):
        return (
            "a group of one episode has nothing to be compared with: raise num_generations from 1."
        )
    if any("constant_groups" in row for row in own):
        return f"episodes that are compared always earned the same: {advice['constant_groups']}."
    return (
        "no episode was good enough to learn from, or none differed: see select,"
        " success_threshold and rewards, and change tasks or rewards."
    )


def _metric(config: Mapping[str, Any]) -> str:
    name = str((config.get("rewards") or ["reward"])[0]).rpartition(":")[2]
    return f"reward {name!r}:" if name != "reward" else "reward"
