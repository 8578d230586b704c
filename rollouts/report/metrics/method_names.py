"""The metrics that single methods write beside the shared ones of `names.py`, each under a key of
its own (`preference/margin`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .metric import Better, Metric

Row = tuple[str, str, str] | tuple[str, str, str, Better]  # name, unit, help, which way is good


def _of(place: str, rows: Iterable[Row]) -> Iterator[Metric]:
    """Metrics below one key, titled by their names; those that are good in no direction are
    detail."""
    for name, unit, help, *better in rows:
        title = name.replace("/*", "").replace("/", " ").replace("_", " ")
        path = f"{place}/{name}" if place else name
        way: Better = better[0] if better else ""
        said = f"{place} {title}".strip().replace("_", " ")
        yield Metric(path, said, unit, help, way, "learning", detail=not way)


PAIRS: tuple[Row, ...] = (
    ("pairs", "pairs", "pairs that were learnt from"),
    ("updates", "updates", "joint updates of the step"),
    ("loss", "", "preference loss, mean over the step's updates", "lower"),
    ("first_loss", "", "preference loss before the step's first update"),
    ("margin", "nat", "log-ratio of the chosen side less that of the rejected", "higher"),
    ("margins/*", "nat", "an agent's part of the margin"),
    ("accuracy", "share", "of pairs whose margin is positive", "higher"),
)
SEARCHED: tuple[Row, ...] = (
    ("score", "", "mean on the validation tasks", "higher"),
    ("num_tasks", "tasks", "tasks that it was measured on"),
    ("adopted", "", "whether it is in force from now on"),
    ("best_score", "", "mean of the best candidate so far", "higher"),
)
METHOD_METRICS: tuple[Metric, ...] = (
    *_of("preference", (*PAIRS, ("without_drafts", "pairs", "left out: no draft was found",
                                 "lower"), ("rows/*", "rows", "rows for TRL, by policy"))),
    *_of("scoreflow", (
        *PAIRS,
        ("pool", "pairs", "ordered pairs that the step's are drawn from"),
        ("trained", "", "programs or turns that were learnt from"),
        ("programs", "programs", "programs of the step"),
        ("kept", "programs", "programs that are imitated"),
        ("valid", "share", "of programs that can be run", "higher"),
        ("score", "", "mean score of the step's programs, invalid ones count 0", "higher"),
        ("score_of_valid", "", "the same of the valid ones", "higher"),
        ("best", "", "mean over tasks of their best program's score", "higher"),
        ("distinct", "share", "of valid programs that differ"),
        ("nodes", "", "calls of operators in a program, mean"),
        ("faults/*", "programs", "why programs cannot be run", "lower"),
        ("nll_before/*", "nat", "NLL of what is imitated, before the step", "lower"),
        ("nll_after/*", "nat", "the same after it", "lower"),
    )),
    *_of("edges", (
        ("loss", "", "policy-gradient loss of the edges"),
        ("grad_norm", "", "gradient norm of the logits"),
        ("entropy", "nat", "mean entropy of an edge; falls as the graph settles"),
        ("on", "edges", "edges that are drawn, mean over episodes"),
        ("skipped", "edges", "edges that were not asked for, mean over episodes"),
        ("kept", "edges", "edges whose probability is above one half"),
        ("episodes", "episodes", "episodes that were learnt from"),
    )),
    *_of("supernet", (
        ("loss", "", "loss of the controller"),
        ("grad_norm", "", "its gradient norm"),
        ("entropy", "nat", "mean entropy of its choices"),
        ("utility", "", "reward less weighted cost, mean", "higher"),
        ("cost", "", "cost of an episode, mean", "lower"),
        ("operators", "", "operators that an episode asks, mean"),
        ("layers", "", "layers that an episode uses, mean"),
        ("early_exit", "share", "of episodes that end before the last layer"),
        ("episodes", "episodes", "episodes that were learnt from"),
    )),
    *_of("autoflow", (
        ("reward", "", "mean reward of the step's workflows", "higher"),
        ("score", "", "mean score of the valid ones", "higher"),
        ("best", "", "best score of the step", "higher"),
        ("in_force_score", "", "score of the workflow in force", "higher"),
        ("valid", "share", "of workflows that can be followed", "higher"),
        ("distinct", "", "workflows that differ"),
        ("invalid/*", "share", "of workflows that cannot be followed, by reason", "lower"),
    )),
    *_of("designs", (("*", "", "mean of a reward of the designs", "higher"),)),
    *_of("w4s", (
        ("episodes", "episodes", "talks of the designer"),
        ("candidates", "programs", "workflows it wrote"),
        ("usable", "share", "of these that can be run", "higher"),
        ("repaired", "", "usable after a repair"),
        ("rewarded", "", "workflows with a reward"),
        ("reward", "", "their mean reward", "higher"),
        ("accuracy", "", "mean accuracy of all workflows", "higher"),
        ("best", "", "accuracy of the best so far", "higher"),
        ("distinct", "", "workflows that differ"),
        ("failed", "episodes", "talks that failed", "lower"),
        ("fitted", "", "whether the designer was trained"),
    )),
    *_of("mas_gpt", (
        ("queries", "queries", "queries to learn from"),
        ("systems", "systems", "systems that differ among the training triples"),
        ("triples", "triples", "training triples"),
        ("score", "", "mean score of the chosen systems", "higher"),
        ("base_score", "", "mean score of the base system on the same queries"),
        ("best_single", "", "mean of the best single system of the pool"),
        ("any_system", "", "share of queries that some system of the pool solves"),
        ("rewritten", "", "systems that were adapted to their query"),
        ("accepted", "", "adapted systems that passed"),
        ("refused", "", "adapted systems that cannot be run", "lower"),
        ("left_out/*", "queries", "queries that are not learnt from, by reason", "lower"),
        ("pool/*/score", "", "mean score of a system of the pool", "higher"),
        ("pool/*/calls", "calls", "calls of one episode of it, mean", "lower"),
        ("pool/*/crashed", "episodes", "episodes in which it raised", "lower"),
        ("pool/*/unscored", "episodes", "episodes without a score", "lower"),
    )),
    *_of("selection", (
        ("*/kept/*", "turns", "an agent's turns that are learnt from, by reason"),
        ("*/dropped/*", "turns", "an agent's turns that are not, by reason"),
        ("changed", "", "whether the module has another model from now on"),
        ("accuracy", "", "of the allocation in force", "higher"),
        ("allocations", "", "allocations that were measured so far"),
    )),
    *_of("repairs", (
        ("talks", "", "talks about failed episodes"),
        ("replays", "", "replays with a repaired turn"),
        ("mended/*", "episodes", "episodes that came out right with an agent's repair", "higher"),
        ("refused/*", "", "repairs that were not replayed, by reason", "lower"),
    )),
    *_of("diversity", (
        ("consensus", "share", "of critics that agree"),
        ("generators/*", "nat", "how far apart the generators are"),
        ("critics/*", "nat", "how far apart the critics are"),
    )),
    *_of("rounds", (("*", "", "accuracy of this round of the debate", "higher"),)),
    *_of("verifier", (
        ("answers", "answers", "answers with a label"),
        ("right", "answers", "of these, right ones"),
        ("kept", "answers", "balanced answers that were learnt from"),
        ("loss_first", "nat", "loss of the first minibatch", "lower"),
        ("loss", "nat", "mean loss of the last ten", "lower"),
        ("updates", "updates", "minibatches"),
    )),
    *_of("candidate", (*SEARCHED, ("runs", "", "bootstrapping runs"),
                       ("demos/*", "", "an agent's demonstrations"))),
    *_of("trial", (
        *SEARCHED,
        ("number", "", "number of the trial"),
        ("failed", "episodes", "episodes that failed", "lower"),
        ("choice/*", "", "the option that a param has"),
        ("full/score", "", "mean on all validation tasks", "higher"),
        ("full/num_tasks", "tasks", "tasks of that measurement"),
        ("full/choice/*", "", "the option that a param has"),
    )),
    *_of("gepa", (
        ("candidates", "", "candidates so far"),
        ("new", "", "new ones of the step"),
        ("asked", "", "proposals that were asked for so far"),
        ("dropped/*", "", "proposals that are not tried, by reason", "lower"),
        ("best_score", "", "mean of the best candidate", "higher"),
        ("front", "", "candidates on the Pareto front"),
        ("calls", "calls", "evaluations of the step"),
    )),
    *_of("mass", (
        ("score", "", "mean of the stage's best", "higher"),
        ("before", "", "mean before the stage"),
        ("influence", "", "score relative to that of one agent"),
        ("agents", "", "agents of the topology"),
        ("measured", "", "topologies that were measured"),
        ("accepted", "", "whether the stage changed the team"),
        ("rejected/*", "", "drawn topologies that are not measured, by reason"),
        ("topology/*", "", "how often a block is used"),
    )),
    *_of("prompts", (
        ("reward/*", "", "mean reward of a candidate in play", "higher"),
        ("round/*/accuracy", "", "mean of a candidate over the round so far", "higher"),
        ("round/*/num_tasks", "tasks", "tasks of that mean"),
        ("round/*/failed", "episodes", "its episodes that failed", "lower"),
        ("round/*/paired/difference", "", "paired difference to the prompts in force", "higher"),
        ("round/*/paired/gained", "tasks", "tasks on which it is better", "higher"),
        ("round/*/paired/lost", "tasks", "tasks on which it is worse", "lower"),
        ("gate/passed", "", "whether a candidate came in force"),
        ("proposals/dropped/*", "", "proposals that are not tried, by reason", "lower"),
        ("proposals/blame/*", "", "share of the loss that an agent is blamed for"),
    )),
    *_of("program", (
        ("score", "", "mean of the new program", "higher"),
        ("best_score", "", "mean of the best program so far", "higher"),
        ("duplicates", "", "proposals of known programs so far", "lower"),
    )),
    *_of("text_feedback", (
        ("judged", "episodes", "episodes with a judgement"),
        ("failed", "episodes", "episodes that failed", "lower"),
        ("feedback/*", "", "pieces of feedback on a value"),
        ("proposals", "", "values that were proposed"),
        ("adopted", "", "whether one is in force from now on"),
        ("unanswered", "replies", "helpers that gave none", "lower"),
        ("truncated", "replies", "of helpers that ended at the token limit", "lower"),
        ("unreadable", "replies", "in another format", "lower"),
        ("refused", "", "values that a param does not take", "lower"),
        ("unchanged", "", "proposals of the value in force", "lower"),
        ("copied", "", "values that hold a training task word for word", "lower"),
    )),
    *_of("symbolic_learning", (
        ("rolled_back", "", "whether the last change was taken back", "lower"),
    )),
    *_of("llm_autodiff", (
        ("chosen", "tasks", "tasks of the moving batch that feedback is asked about"),
        ("kept", "tasks", "tasks of the moving batch"),
    )),
    *_of("meta", (
        ("unreadable", "replies", "of the meta-optimizer, in another format", "lower"),
        ("score", "", "mean of the best optimizer", "higher"),
        ("adopted", "", "whether a new one is in force"),
    )),
    *_of("", (
        ("errors", "episodes", "wrong answers that feedback begins with", "lower"),
        ("importance/*", "", "mean importance of an agent"),
        ("trials", "episodes", "trials so far"),
        ("unmatched", "", "ratings of no agent, mean over trials", "lower"),
        ("unread", "", "ratings that cannot be read, mean over trials", "lower"),
    )),
    *_of("target", (
        ("score", "", "score of the team trained to these losses", "higher"),
        ("best_score", "", "best score so far", "higher"),
        ("of", "", "teams so far"),
        ("target/*", "nat", "validation loss that a policy was to meet"),
        ("achieved/*", "nat", "validation loss that it met"),
        ("reached/*", "", "whether it met the target"),
        ("slope/*", "", "above 0: to learn on would meet it; below: to unlearn"),
        ("predicted", "", "score that the Gaussian process expected"),
        ("deviation", "", "its standard deviation"),
        ("bound", "", "its upper confidence bound"),
        ("team/*/run", "", "the training run whose adapter a policy has"),
        ("team/*/at", "", "the step of that run"),
        ("error", "", "distance of prediction and score", "lower"),
    )),
    *_of("targets", (("limits/*/*", "nat", "range of losses that are searched"),)),
)  # fmt: skip
