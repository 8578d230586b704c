"""Episodes as JSON values of fixed columns, and back: what one line of a store holds.

Every line has the same columns with the same types, so that `datasets` reads the files as they are.
What has no fixed shape (an answer, private meta, sampling, decisions) is JSON text, an
optional text is "" when absent, an optional number -1, an unscorable reward null.

A turn is stored as what it adds: `extends` [index, sibling] names an earlier turn, and `messages`
and `prompt_ids` hold only what comes after that turn's prompt and reply. Where `extends` names a
sibling (the same index) the prompt is the same. [-1, 0]: nothing is shared.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ...agents.state import TeamState
from ...agents.transcript import Operation
from ...agents.types import (
    CORRECTION_SPLIT,
    Decision,
    Message,
    Reward,
    Sampling,
    Task,
    Turn,
    Usage,
    from_json,
    to_json,
)
from ..types import Episode, Kind

SCHEMA = 2
READABLE = (1, 2)  # 1: values and adapter versions stand in every line, and there are no kinds

States = Callable[[str], TeamState]  # the state of a key


def _text(value: Any) -> str:
    return json.dumps(to_json(value), ensure_ascii=False)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _pack_message(message: Message) -> dict[str, Any]:
    extra = {
        "name": message.name,
        "tool_calls": to_json(message.tool_calls),
        "tool_call_id": message.tool_call_id,
    }
    extra = {key: value for key, value in extra.items() if value not in (None, [])}
    return {
        "role": message.role,
        "content": message.content,
        "extra": _text(extra) if extra else "",
    }


def _unpack_message(data: Mapping[str, Any]) -> Message:
    extra = json.loads(data["extra"]) if data["extra"] else {}
    return from_json(Message, {"role": data["role"], "content": data["content"], **extra})


def _after(turn: Turn, same_call: bool) -> tuple[tuple[int, ...], tuple[Message, ...]]:
    """Token ids and messages of the chat after `turn`; for another answer to the same call, those
    before it."""
    if same_call:
        return turn.prompt_ids, turn.messages
    return turn.prompt_ids + turn.token_ids, (*turn.messages, Message("assistant", turn.text))


def _extended(turn: Turn, earlier: Iterable[Turn]) -> Turn | None:
    """The earlier turn of the same agent whose ids and messages are the longest prefix of this
    turn's prompt; None if there is none."""
    best, longest = None, (0, 0)
    whole = (len(turn.prompt_ids), len(turn.messages))
    for other in earlier:
        same_call = other.index == turn.index
        ids, messages = _after(other, same_call)
        size = (len(ids), len(messages))
        if other.agent != turn.agent or size <= longest or (same_call and size != whole):
            continue
        if turn.messages[: size[1]] == messages and turn.prompt_ids[: size[0]] == ids:
            best, longest = other, size
    return best


def _unpack_sampling(text: str) -> Sampling:
    """Turns of a run differ in nothing but the seed: the rest is read once."""
    before, name, rest = text.partition('"seed": ')
    seed, comma, after = rest.partition(", ")
    if not comma:
        return _sampling_of(text)
    drawn = None if seed == "null" else int(seed)
    return dataclasses.replace(_sampling_of(f"{before}{name}null, {after}"), seed=drawn)


@functools.lru_cache(maxsize=256)
def _sampling_of(text: str) -> Sampling:
    return from_json(Sampling, json.loads(text))


def _pack_turn(turn: Turn, earlier: Iterable[Turn]) -> dict[str, Any]:
    base = _extended(turn, earlier)
    ids, messages = _after(base, base.index == turn.index) if base else ((), ())
    return {
        "index": turn.index,
        "sibling": turn.sibling,
        "agent": turn.agent,
        "taken": turn.taken,
        "source": turn.source,
        "saw_gold": turn.saw_gold,
        "extends": [base.index, base.sibling] if base else [-1, 0],
        "messages": [_pack_message(m) for m in turn.messages[len(messages) :]],
        "text": turn.text,
        "reads": _text(turn.reads),
        "prompt_ids": list(turn.prompt_ids[len(ids) :]),
        "token_ids": list(turn.token_ids),
        "logprobs": [_number(x) for x in turn.logprobs],
        "finish_reason": turn.finish_reason,
        "policy": turn.policy,
        "version": turn.version,
        "sampling": _text(turn.sampling),
        "usage": "" if turn.usage is None else _text(turn.usage),
    }


def _unpack_turn(data: Mapping[str, Any], earlier: Mapping[tuple[int, int], Turn]) -> Turn:
    index, sibling = data["extends"]
    ids, messages = (
        _after(earlier[index, sibling], index == data["index"]) if index >= 0 else ((), ())
    )
    plain = (
        "index",
        "sibling",
        "agent",
        "taken",
        "source",
        "saw_gold",
        "text",
        "finish_reason",
        "policy",
        "version",
    )
    return Turn(
        **{name: data[name] for name in plain},
        messages=messages + tuple(_unpack_message(m) for m in data["messages"]),
        reads=tuple(json.loads(data["reads"])),
        prompt_ids=ids + tuple(data["prompt_ids"]),
        token_ids=tuple(data["token_ids"]),
        logprobs=tuple(math.nan if x is None else x for x in data["logprobs"]),
        sampling=_unpack_sampling(data["sampling"]),
        usage=from_json(Usage, json.loads(data["usage"])) if data.get("usage") else None,
    )


def _pack_reward(reward: Reward) -> dict[str, Any]:
    return {
        **to_json(reward),
        "value": _number(reward.value),
        "agent": reward.agent or "",
        "turn": -1 if reward.turn is None else reward.turn,
        "decision": -1 if reward.decision is None else reward.decision,
    }


def _unpack_reward(data: Mapping[str, Any]) -> Reward:
    value = math.nan if data["value"] is None else data["value"]
    turn = None if data["turn"] < 0 else data["turn"]
    decision = data.get("decision", -1)
    about = {"turn": turn, "decision": None if decision < 0 else decision}
    return Reward(**{**data, "value": value, "agent": data["agent"] or None, **about})


def pack(episode: Episode) -> dict[str, Any]:
    """An episode as one line's JSON value. NaN and infinities become null, which reads back as
    NaN."""
    turns: list[dict[str, Any]] = []
    seen: dict[tuple[int, int], Turn] = {}
    for turn in episode.turns:
        turns.append(_pack_turn(turn, seen.values()))
        seen.setdefault((turn.index, turn.sibling), turn)
    task = episode.task
    return {
        "schema": SCHEMA,
        "id": episode.id,
        "group": episode.group,
        "kind": episode.kind,
        "parent": episode.parent or "",
        "follows": episode.follows,
        "split": episode.split,
        "step": episode.step,
        "seed": episode.seed,
        "stop_reason": episode.stop_reason,
        "error": "" if episode.error is None else episode.error or "(no message)",
        "answered": episode.output is not None,
        "output": episode.output or "",
        "task": {
            "id": task.id,
            "prompt": task.prompt,
            "answer": _text(task.answer),
            "source": task.source,
            "split": task.split,
            "meta": _text(task.meta),
        },
        "rewards": [_pack_reward(r) for r in episode.rewards],
        "usage": [
            {"agent": agent, **to_json(usage), "seconds": float(usage.seconds)}
            for agent, usage in episode.usage.items()
        ],
        "state": episode.state.key,
        "decisions": _text(episode.decisions),
        "operations": _text(episode.operations),
        "output_from": _text(episode.output_from),
        "turns": turns,
    }


def unpack(data: Mapping[str, Any], states: States) -> Episode:
    """The episode of one line's JSON value: what `pack` was given. `states` finds the state of its
    key."""
    turns: dict[tuple[int, int], Turn] = {}
    ordered = []
    for item in data["turns"]:
        turn = _unpack_turn(item, turns)
        turns.setdefault((turn.index, turn.sibling), turn)
        ordered.append(turn)
    task = {
        **data["task"],
        "answer": json.loads(data["task"]["answer"]),
        "meta": json.loads(data["task"]["meta"]),
    }
    plain = ("id", "group", "split", "step", "seed", "stop_reason")
    return Episode(
        **{name: data[name] for name in plain},
        parent=data["parent"] or None,
        error=data["error"] or None,
        output=data["output"] if data["answered"] else None,
        task=from_json(Task, task),
        rewards=tuple(_unpack_reward(r) for r in data["rewards"]),
        usage={
            u["agent"]: Usage(**{k: v for k, v in u.items() if k != "agent"}) for u in data["usage"]
        },
        **_since_schema_2(data, states),
        decisions=tuple(from_json(Decision, d) for d in json.loads(data["decisions"])),
        turns=tuple(ordered),
    )


def filter_row(data: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a packed episode that a store is filtered by; of schema 1 too."""
    row = {**data, "task": data["task"]["id"], "parent": data["parent"] or None}
    if data["schema"] > 1:
        return row
    return {**row, "kind": kind_of(data), "follows": "", "state": _state_of_schema_1(data).key}


def kind_of(data: Mapping[str, Any]) -> Kind:
    """The kind of a packed episode; in lines of schema 1 it follows from group and split."""
    if data["schema"] > 1:
        kind: Kind = data["kind"]
        return kind
    if data["group"].startswith("eval-") or data["split"] == "eval":
        return "eval"
    return "aside" if data["split"] == CORRECTION_SPLIT else "train"


def _since_schema_2(data: Mapping[str, Any], states: States) -> dict[str, Any]:
    """The fields that a line of schema 1 does not have, or has in another way."""
    if data["schema"] == 1:
        return {"kind": kind_of(data), "state": _state_of_schema_1(data)}
    return {
        "kind": data["kind"],
        "follows": data["follows"],
        "state": states(data["state"]),
        "operations": tuple(from_json(Operation, o) for o in json.loads(data["operations"])),
        "output_from": tuple(json.loads(data["output_from"])),
    }


def _state_of_schema_1(data: Mapping[str, Any]) -> TeamState:
    return TeamState(json.loads(data["team_version"]), json.loads(data["values"]))
