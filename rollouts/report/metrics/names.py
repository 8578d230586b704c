"""The metrics that every run may write, under their names: `metrics.jsonl`, the report, the
terminal, trackers and `docs/metrics.md` all say the same word for the same thing.

What a method writes beside these under its own name (`preference/margin`) stands in
`method_names.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .method_names import METHOD_METRICS
from .metric import Metric, find, renamed

TRUNCATED, CONSTANT_GROUPS = "truncated", "constant_groups"
RENAMED = {"cut": TRUNCATED}  # today's names of keys that earlier versions wrote


def _run(name: str, title: str, unit: str, help: str, **more: Any) -> Metric:
    return Metric(name, title, unit, help, **more)


def _policy(name: str, title: str, unit: str, help: str, **more: Any) -> Metric:
    return Metric(f"policies/*/{name}", title, unit, help, **more)


def _critic(name: str, title: str, unit: str, help: str, **more: Any) -> Metric:
    return Metric(f"critics/*/{name}", title, unit, help, detail=True, **more)


# of the step's episodes

OF_STEP = (
    _run("reward", "reward", "", "mean of the first reward over the step's episodes",
         better="higher", group="learning", trl="reward"),
    _run("reward_min", "lowest reward", "", "lowest reward of an episode", better="higher",
         group="learning", detail=True),
    _run("reward_max", "highest reward", "", "highest reward of an episode", better="higher",
         group="learning", detail=True),
    _run("episodes", "episodes", "episodes", "episodes of the step", group="cost", detail=True),
    _run("failed", "failed", "episodes", "episodes in which the system or a call raised",
         better="lower"),
    _run("unscorable", "unscorable", "episodes", "episodes that have no reward", better="lower"),
    _run("sampled_tokens", "sampled tokens", "tokens", "sampled in the step's episodes",
         group="cost", detail=True, trl="num_tokens"),
    _run("tokens_per_s", "tokens per second", "tokens/s", "sampled, while episodes are played",
         better="higher", group="cost"),
    _run("staleness", "staleness", "versions",
         "mean age of the versions that played what is trained on", better="lower"),
    _run("max_staleness", "largest staleness", "versions", "age of the oldest of these versions",
         better="lower", detail=True),
    _run("dropped_stale/episodes", "stale episodes", "episodes",
         "stored episodes that no known version has played; they are played again", better="lower",
         detail=True),
    _run("dropped_stale/tokens/*/*", "stale tokens", "episodes",
         "stale episodes by agent and by tokens sampled, up to so many", better="lower",
         detail=True),
    _run("oversampled/*", "oversampled", "",
         "of `oversample`: episodes that were begun and dropped, and how they differ from those"
         " that were kept", group="cost", detail=True),
    _run("dropped/*", "turns dropped", "turns", "turns not trained on, by agent and reason",
         better="lower", detail=True),
    _run("seconds/total", "seconds", "seconds", "since the run began, running total",
         group="cost", better="lower"),
    _run("seconds/rollout", "rollout", "seconds", "playing episodes, running total",
         group="cost", better="lower"),
    _run("seconds/train", "train", "seconds", "updating weights, running total", group="cost",
         better="lower"),
    _run("seconds/publish", "publish", "seconds",
         "handing versions to the engines and proving them, running total", group="cost",
         better="lower"),
    _run("budget/tokens", "tokens spent", "tokens",
         "prompt and sampled tokens of all but held-out evaluations, running total", group="cost",
         better="lower"),
    _run("budget/calls", "calls spent", "calls", "calls of all but held-out evaluations, running"
         " total", group="cost", better="lower"),
    _run("budget/cost", "cost spent", "money", "what priced policies charged, running total",
         group="cost", better="lower"),
)  # fmt: skip

# of each policy's update

OF_POLICY = (
    _policy("loss", "loss", "", "what the update minimises, in its last pass",
            rounding=1e-6),
    _policy("entropy", "entropy", "nat", "of the policy, mean over trained tokens; near 0 it hardly"
            " explores", trl="entropy"),
    _policy("mismatch_kl", "KL from the engine", "nat",
            "how far the trainer is from the policy that played, per trained token (k3 estimate),"
            " in the update's last pass", better="lower", rounding=1e-6),
    _policy("first_mismatch_kl", "mismatch KL", "nat",
            "how far trainer and engine are apart per trained token (k3 estimate) before any"
            " update, where both should hold one policy", better="lower", rounding=1e-6),
    _policy("clipped", "clipped", "share", "of trained tokens whose ratio was clipped",
            better="lower", trl="clip_ratio/region_mean"),
    _policy("clip_low", "clipped below", "share", "of trained tokens", detail=True,
            better="lower", trl="clip_ratio/low_mean"),
    _policy("clip_high", "clipped above", "share", "of trained tokens", detail=True,
            better="lower", trl="clip_ratio/high_mean"),
    _policy("grad_norm", "gradient norm", "", "of the adapter, before clipping",
            trl="grad_norm"),
    _policy("calls_per_episode", "calls per episode", "calls",
            "how often the policy was called in an episode of the step, whoever spoke as it"),
    _policy(CONSTANT_GROUPS, "constant groups", "share",
            "of groups whose episodes all earned the same: they teach nothing", better="lower",
            trl="frac_reward_zero_std"),
    _policy(TRUNCATED, "truncated", "share", "of replies that ended at the token limit",
            better="lower", trl="completions/clipped_ratio"),
    _policy("tokens", "trained tokens", "tokens", "in the step; 0: nothing was trained",
            group="cost"),
    _policy("sequences", "trained sequences", "sequences", "in the step", group="cost",
            detail=True),
    _policy("learning_rate", "learning rate", "", "of the step", trl="learning_rate"),
    _policy("applied", "applied", "", "false: not finite, no update", detail=True),
    _policy("problem", "problem", "", "why it was not applied", detail=True),
    _policy("moved", "moved", "nat", "mean change of a trained token's log-prob by the run's first"
            " update", detail=True),
    _policy("ratio", "ratio", "", "mean probability ratio of trainer and engine", detail=True),
    _policy("ratio_outside", "ratios off by 0.1", "share", "of trained tokens", better="lower",
            detail=True),
    _policy("dlogp", "log-prob gap", "nat", "mean distance of trainer and engine per trained token",
            better="lower", detail=True),
    _policy("p99_dlogp", "log-prob gap, 99th percentile", "nat",
            "distance of trainer and engine that 1 % of trained tokens exceed", better="lower",
            detail=True),
    _policy("max_dlogp", "largest log-prob gap", "nat",
            "largest distance of trainer and engine at a trained token", better="lower",
            detail=True),
    _policy("corrected", "corrected", "share", "of trained tokens whose importance weight was"
            " capped or masked", better="lower", detail=True),
    _policy("kl", "KL from the reference", "nat", "k3 estimate per trained token", trl="kl"),
    _policy("nll", "negative log-likelihood", "nat", "per trained token", better="lower"),
    _policy("nll_before", "NLL before", "nat", "per token of the step's samples, before it",
            better="lower", detail=True),
    _policy("nll_after", "NLL after", "nat", "per token of the step's samples, after it",
            better="lower",
            detail=True),
    _policy("weight", "sample weight", "", "sum of the samples' weights", detail=True),
    _policy("updates", "updates", "updates", "optimizer steps of the step", detail=True),
    _policy("value", "value", "", "mean of what the critic expects of trained tokens",
            detail=True),
    _policy("value_loss", "value loss", "", "half the critic's mean squared error before the step",
            better="lower"),
    _policy("explained_variance", "explained variance", "",
            "share of the returns' variance that the critic explains", better="higher"),
    _policy("kl_reward", "KL reward", "", "mean KL penalty per token inside the reward",
            detail=True),
)  # fmt: skip

OF_CRITIC = (
    _critic("value", "value", "", "mean of what it expects"),
    _critic("explained_variance", "explained variance", "",
            "share of the returns' variance that it explains", better="higher"),
    _critic("value_loss", "value loss", "", "half its mean squared error before the step",
            better="lower"),
    _critic("value_loss_after", "value loss after", "",
            "half its mean squared error in its last update", better="lower"),
    _critic("value_clipped", "values clipped", "share", "of its last update", better="lower"),
    _critic("kl_reward", "KL reward", "", "mean KL penalty per token inside the reward"),
    _critic("tokens", "trained tokens", "tokens", "in the step"),
    _critic("learning_rate", "learning rate", "", "of the step"),
    _critic("grad_norm", "gradient norm", "", "before clipping"),
    _critic("applied", "applied", "", "false: not finite, no update"),
)  # fmt: skip

OF_PROOF = (
    _run("proof/*/residual", "proof residual", "",
         "relative distance of served and trained adapter (live proof)", better="lower",
         rounding=1e-3),
    _run("proof/*/status", "proof", "", "passed, untrained, failed or identity", detail=True),
)  # fmt: skip

SHARED_METRICS: tuple[Metric, ...] = (*OF_STEP, *OF_POLICY, *OF_CRITIC, *OF_PROOF)
METRICS: tuple[Metric, ...] = (*SHARED_METRICS, *METHOD_METRICS)


def metric_of(path: Sequence[str]) -> Metric | None:
    """The metric that these keys of a row lead to; None for a number that is not listed."""
    return find(METRICS, path)


def policy_metric(key: str) -> Metric | None:
    """The metric of this key of a policy's row."""
    return find(OF_POLICY, ("policies", "", key))


def title_of(key: str) -> str:
    """What a key of a policy's row is called."""
    metric = policy_metric(key)
    return key.replace("_", " ") if metric is None else metric.title


def current(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `metrics.jsonl` under today's names, whichever version wrote it."""
    return renamed(row, RENAMED)
