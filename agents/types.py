"""Types of a team's conversations: tasks, messages, agents, policies, turns, decisions, rewards.

Every type is a frozen dataclass made of plain values, so it goes to JSON and back without loss
(``to_json``, ``from_json``). No tensors, no clients, no files here.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")

BASE = "base"  # the reserved policy: the shared base model with every adapter off
CORRECTION_SPLIT = "repair"  # of correction tasks: nothing is learnt from their episodes


class SettingError(ValueError):
    """A setting, name or file that cannot be used; the message says which, what was expected and
    what to do."""


def closest(name: str, known: Collection[str]) -> str | None:
    """The known name most like `name`, None if none is like it."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def nearest(name: str, known: Collection[str]) -> str:
    """A hint for an error message: the known name most like `name`, or the list of all known
    names."""
    close = closest(name, known)
    if close is not None:
        return f"did you mean {close!r}?"
    return f"known: {', '.join(map(repr, known)) or 'none'}"


def to_json(value: Any) -> Any:
    """Dataclasses, tuples and mappings as plain JSON values. Fields are kept in their order of
    declaration."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


def from_json(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from a mapping. Raises `SettingError` at an unknown or missing key,
    naming its path."""
    where = where or cls.__name__
    if not isinstance(data, Mapping):
        raise SettingError(
            f"{where}: expected a mapping of the fields of {cls.__name__}, got {data!r}"
        )
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise SettingError(f"{where}.{key}: unknown field; {nearest(str(key), fields)}")
    for name, f in fields.items():
        if (
            name not in data
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ):
            raise SettingError(f"{where}.{name}: missing; {cls.__name__} needs it")
    return cls(**{key: _build(hints[key], value, f"{where}.{key}") for key, value in data.items()})


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def _build(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        inner = [a for a in args if a is not type(None)]
        return _build(inner[0], value, where) if len(inner) == 1 else value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_json(hint, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_build(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise SettingError(f"{where}: expected a mapping, got {value!r}")
        return {key: _build(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple:
        raise SettingError(f"{where}: expected a list, got {value!r}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (str, int, float, bool) and type(value) is not hint:
        raise SettingError(f"{where}: expected {hint.__name__}, got {value!r}")
    if origin is Literal and value not in args:
        raise SettingError(f"{where}: expected one of {args}, got {value!r}")
    return value


@dataclass(frozen=True)
class Task:
    """One thing to solve. Keys of `meta` that begin with an underscore are private, like the
    answer."""

    id: str
    prompt: str
    answer: Any = None
    source: str = ""
    split: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def public(self) -> Task:
        """What a team may see: no answer, no private meta. Rewards and feedback steps get the whole
        task."""
        meta = {key: value for key, value in self.meta.items() if not key.startswith("_")}
        return dataclasses.replace(self, answer=None, meta=meta)


@dataclass(frozen=True)
class Message:
    """One message of a chat, in the vocabulary of chat templates."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    name: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a reply. Every field is sent with every request, so that no server
    default applies unseen.

    `top_k` 0 means off. `seed` None means: derived from (run seed, episode, agent, turn), see
    `seeds.derive_seed`. A `stop` string is kept in the reply: what was sampled is what is trained
    on. `grammar` is JSON in vLLM's vocabulary, such as `{"json": SCHEMA}`; `logit_bias` is added to
    the logits of these token ids.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int | None = None
    grammar: str = ""
    logit_bias: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.max_tokens < 1 or not 0 < self.top_p <= 1:
            raise SettingError(
                "sampling: temperature >= 0, max_tokens >= 1 and 0 < top_p <= 1 expected, got"
                f" {self}"
            )

    @property
    def on_policy(self) -> bool:
        """True if tokens were drawn from the whole softmax at a temperature above 0, so probability
        ratios are defined."""
        whole = Sampling(
            self.temperature, max_tokens=self.max_tokens, stop=self.stop, seed=self.seed
        )
        return self.temperature > 0 and self == whole


@dataclass(frozen=True)
class AdapterSpec:
    """The LoRA of a policy, in PEFT's terms (`alpha` is `lora_alpha`, `targets` is
    `target_modules`)."""

    r: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha <= 0 or not self.targets:
            raise SettingError(
                f"adapter: r >= 1, alpha > 0 and at least one target module expected, got {self}"
            )


@dataclass(frozen=True)
class PolicySpec:
    """A policy: an adapter on a base model, or an outside model.

    Args:
        name: unique; `base` is reserved for the bare base model and never trained.
        base: model path or hub name; None means the run's model.
        adapter: shape of the LoRA.
        trainable: False keeps the adapter as `init` gave it.
        init: `fresh`, a PEFT folder, or `CHECKPOINT#POLICY` (a policy of an earlier run's
            checkpoint).
        learning_rate: None means the run's.
        url: an OpenAI-compatible endpoint of an outside model (`base` is then its model name);
            never trained.
        key_env: the environment variable that holds the outside model's key; "" means
            `MARLORA_OUTSIDE_KEY`.
        price: of a million tokens: `currency`, `prompt`, `sampled`, `cached`.
    """

    name: str
    base: str | None = None
    adapter: AdapterSpec = AdapterSpec()
    trainable: bool = True
    init: str = "fresh"
    learning_rate: float | None = None
    url: str | None = None
    key_env: str = ""
    price: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_adapter(self) -> bool:
        """Whether it answers with a LoRA adapter: not the bare base, nor an outside model."""
        return self.name != BASE and self.url is None


@dataclass(frozen=True)
class AgentSpec:
    """A named agent of a team.

    Args:
        name: unique in the team; the key of rewards, metrics and adapters.
        role: one line for people and reports.
        prompt: system message of the agent's chats; "" sends none. `team.values["NAME.prompt"]`
            overrides it.
        policy: the policy that answers; "" means the one of the agent's own name. Agents may share
            one.
        sampling: None means the run's sampling.
        tools: names of tools (`marlora.agents.tools.tools`) or `module:function`; () means none.
        demos: worked user/assistant messages put before every chat; `team.values["NAME.demos"]`
            overrides them.
    """

    name: str
    role: str = ""
    prompt: str = ""
    policy: str = ""
    sampling: Sampling | None = None
    tools: tuple[str, ...] = ()
    demos: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "_-" for c in self.name):
            raise SettingError(
                f"agent name {self.name!r}: letters, digits, '_' and '-' expected (it names files"
                " and adapters)"
            )
        if not self.policy:
            object.__setattr__(self, "policy", self.name)


@dataclass(frozen=True)
class Usage:
    """The cost of calls. `prompt_tokens` counts every prompt as sent, `cached_tokens` those that
    were played before and cost nothing now; `seconds` are wall-clock, summed over calls; `cost` is
    money, where the policy has a price."""

    calls: int = 0
    prompt_tokens: int = 0
    sampled_tokens: int = 0
    seconds: float = 0.0
    cached_tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Usage(*(mine + its for mine, its in pairs))


@dataclass(frozen=True)
class Completion:
    """One sampled reply, as the engine returned it.

    `token_ids` [T] are the sampled tokens, the end-of-turn token included when it was sampled;
    `logprobs` [T] are theirs under the distribution they were drawn from. `prompt_ids` [P] is what
    the engine read. All three are empty for outside models and fakes. `version` names the adapter
    version that was sampled from ("" = base). `usage` is what an outside model's server reports of
    the whole request; it stands in the first of its completions.
    """

    text: str
    prompt_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str = "stop"
    policy: str = ""
    version: str = ""
    usage: Usage | None = None


@dataclass(frozen=True)
class Turn:
    """One call of one agent and one of its answers.

    Args:
        index: the order in which `reply` was called in the episode; siblings share it.
        agent, messages: the agent's name, and the whole chat it was sent (without the answer).
        reads: indices of the turns whose text stands in `messages` because the system showed it.
        sibling, taken: number among the answers sampled for one call; `taken` marks the one the
            chat goes on with.
        source: `sampled` by the agent's policy, or `written` otherwise (a correction): fit for SFT,
            never for ratios.
        saw_gold: the prompt held the answer (feedback steps): such a turn never enters a batch.
        sampling: what was sent, the seed included.
        text, prompt_ids, token_ids, logprobs, finish_reason, policy, version, usage: see
            `Completion`.
    """

    index: int
    agent: str
    messages: tuple[Message, ...] = ()
    reads: tuple[int, ...] = ()
    sibling: int = 0
    taken: bool = True
    source: Literal["sampled", "written"] = "sampled"
    saw_gold: bool = False
    sampling: Sampling = Sampling()
    text: str = ""
    prompt_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str = "stop"
    policy: str = ""
    version: str = ""
    usage: Usage | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def completion(self) -> Completion:
        """The reply as the engine returned it."""
        return Completion(
            self.text,
            self.prompt_ids,
            self.token_ids,
            self.logprobs,
            self.finish_reason,
            self.policy,
            self.version,
            self.usage,
        )


@dataclass(frozen=True)
class Decision:
    """A sampled choice that is not tokens: an edge, an operator, a model. `logprob` is of `choice`
    among `options`, `about` the text that the choice was made for."""

    index: int
    name: str
    options: tuple[str, ...]
    choice: str
    logprob: float
    about: str = ""
    version: str = ""


@dataclass(frozen=True)
class Reward:
    """One judgement of an episode.

    `agent` None: the whole team's. `turn`: index of the one turn it is about, with `sibling` for
    its number among siblings; `decision`: index of the one decision. `value` NaN: could not be
    scored (never 0: that would be a signal). `text`: feedback in words. `source`: the scorer's or
    turn's name. A reward counts towards training if its name is in the run's reward weights
    (default: all but `format`-like ones and `length`, weight 0).
    """

    name: str
    value: float
    text: str = ""
    agent: str | None = None
    turn: int | None = None
    sibling: int = 0
    source: str = ""
    decision: int | None = None
