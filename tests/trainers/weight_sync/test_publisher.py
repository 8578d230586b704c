"""Versions and the live proof, with the in-process engine on a tiny random model."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from marlora.agents.types import Completion, Sampling, Task, Turn
from marlora.rollouts.engines.base import EngineInfo, ModelRef, ReplicaLost, TeamVersion
from marlora.rollouts.engines.transformers import TransformersEngine
from marlora.rollouts.engines.transformers_adapters import LoadedAdapters
from marlora.rollouts.types import Episode
from marlora.trainers.model.adapters import Adapters
from marlora.trainers.weight_sync.probes import (
    CONTEXT,
    REPLY,
    SURPRISED,
    Probe,
    ScoredWindow,
    probes,
    trainer_logprobs,
)
from marlora.trainers.weight_sync.publisher import Publisher
from marlora.trainers.weight_sync.verification import SAMPLED, VerificationRecord
from tests.trainers.publishing import (
    PROMPTS,
    BareBase,
    BareBaseButTwins,
    Honest,
    Learner,
    Liar,
    Penalised,
    Previous,
    PreviousButTwins,
    Swapped,
    adapters_on,
    play,
    published,
    with_engine,
)

torch.set_num_threads(1)


def proofs(
    model: Path,
    root: Path,
    wrap: Callable[[TransformersEngine], Any] = lambda engine: engine,
    *,
    learning_rate: float = 1e-3,
    steps: Sequence[int] = (1,),
    temperature: float = 1.0,
    served: str = "float32",
    trained: torch.dtype = torch.float32,
) -> list[VerificationRecord]:
    adapters = adapters_on(model, trained)
    learner = Learner(adapters, learning_rate)
    return with_engine(
        model,
        lambda engine: published(wrap(engine), root, adapters, learner, steps, temperature),
        served,
    )


# right adapters


@pytest.mark.parametrize(
    ("learning_rate", "steps", "temperature"),
    [(1e-5, (1,), 1.0), (1e-3, (1, 1), 0.7), (1e-2, (15,), 1.0)],
    ids=str,
)
def test_right_adapters_pass(
    model: Path, tmp_path: Path, learning_rate: float, steps: Sequence[int], temperature: float
):
    made = proofs(
        model, tmp_path, learning_rate=learning_rate, steps=steps, temperature=temperature
    )
    assert [(proof.policy, proof.status) for proof in made] == [
        ("reviewer", "passed"),
        ("solver", "passed"),
    ]
    for proof in made:
        assert (
            proof.residual < 1e-4 and proof.decode < 1e-4 and proof.noise < 1e-5
        )  # float32 on both sides
        assert proof.step == len(steps) and proof.version.startswith(
            f"{proof.policy}-v{len(steps)}-"
        )
    assert all(proof.amplified > 1000 for proof in made) == (learning_rate == 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("served", "trained"),
    [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")],
)
def test_right_adapters_pass_in_half_precision(
    model: Path, tmp_path: Path, served: str, trained: str
):
    made = proofs(
        model, tmp_path, learning_rate=1e-5, served=served, trained=getattr(torch, trained)
    )
    assert [proof.status for proof in made] == ["passed", "passed"]
    for proof in made:  # half the tolerance at most
        assert 1e-3 < proof.residual < 0.1 and proof.residual_tolerance == 0.2
        assert proof.decode < 0.025 and proof.decode_tolerance >= 0.05


# faults


@pytest.mark.parametrize(
    ("fault", "learning_rate", "steps", "part"),
    [
        (Swapped, 1e-5, (1,), "weights"),
        (Swapped, 1e-2, (10,), "weights"),
        (Previous, 1e-5, (1, 1), "weights"),
        (Previous, 1e-5, (30, 1), "weights"),
        (PreviousButTwins, 1e-2, (3, 1), "decoding"),
        (BareBase, 1e-5, (1,), "weights"),
        (BareBaseButTwins, 1e-2, (3,), "decoding"),
        (Penalised, 1e-5, (1,), "decoding"),
        (Penalised, 1e-2, (10,), "decoding"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_fault_fails_the_proof(
    model: Path,
    tmp_path: Path,
    fault: type[Liar],
    learning_rate: float,
    steps: Sequence[int],
    part: str,
):
    """All of them keep names and folders right: identity alone sees none."""
    made = proofs(model, tmp_path, fault, learning_rate=learning_rate, steps=steps)
    assert [(proof.policy, proof.status) for proof in made] == [
        ("reviewer", "failed"),
        ("solver", "failed"),
    ]
    assert all(proof.reason.startswith(f"{part}: ") for proof in made)


def test_the_detour_of_the_faults_is_none_itself(model: Path, tmp_path: Path):
    assert [proof.status for proof in proofs(model, tmp_path, Honest, steps=(1, 1))] == [
        "passed",
        "passed",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Swapped, Previous, BareBase])
def test_a_fault_fails_the_proof_in_half_precision(model: Path, tmp_path: Path, fault: type[Liar]):
    made = proofs(model, tmp_path, fault, learning_rate=1e-5, steps=(1, 1), served="bfloat16")
    assert all(proof.reason.startswith("weights: ") for proof in made) and len(made) == 2


class StalePrefix(Liar):
    """An adapter reloaded in place: replies come from the new weights, behind keys and values that
    the old ones left of the prompt."""

    true: TransformersEngine

    def __init__(self, true: TransformersEngine) -> None:
        super().__init__(true)
        self.older: dict[str, str] = {}  # version -> the one before it
        self.newest: dict[str, str] = {}

    async def publish(self, adapters: Mapping[str, Path]) -> TeamVersion:
        for policy, folder in adapters.items():
            if "-twin-" not in folder.name:
                self.older[folder.name] = self.newest.get(policy, "")
                self.newest[policy] = folder.name
        return await self.true.publish(adapters)

    async def retire(self, ref: ModelRef) -> None:
        if "-twin-" in ref.version:
            await self.true.retire(ref)

    async def generate(
        self,
        ids: Sequence[int],
        ref: ModelRef,
        sampling: Sampling,
        n: int = 1,
        *,
        replica: str | None = None,
    ) -> list[Completion]:
        return [await self.true._work(lambda: self._reply(tuple(ids), ref, sampling))]

    @torch.inference_mode()
    def _reply(self, ids: tuple[int, ...], ref: ModelRef, sampling: Sampling) -> Completion:
        draw, tokens, logprobs = random.Random(sampling.seed), [], []
        self.true.sampler.activate(ModelRef(ref.policy, self.older.get(ref.version, "")))
        prompt = torch.tensor([ids[:-1]])
        cache = self.true.sampler.model(input_ids=prompt, use_cache=True).past_key_values
        self.true.sampler.activate(ref)
        for _ in range(sampling.max_tokens):
            last = torch.tensor([[tokens[-1] if tokens else ids[-1]]])
            out = self.true.sampler.model(input_ids=last, past_key_values=cache, use_cache=True)
            logits = out.logits[0, -1]
            row = torch.log_softmax(logits / sampling.temperature, -1)
            tokens.append(draw.choices(range(len(row)), row.exp().tolist())[0])
            logprobs.append(float(row[tokens[-1]]))
        return Completion(
            "", ids, tuple(tokens), tuple(logprobs), "length", ref.policy, ref.version
        )


def test_a_reload_in_place_fails_the_proof(model: Path, tmp_path: Path):
    made = proofs(model, tmp_path, StalePrefix, learning_rate=1e-2, steps=(3, 1))
    assert [proof.reason.partition(":")[0] for proof in made] == ["decoding", "decoding"]


def test_an_adapter_that_is_not_copied_into_its_place_fails_the_proof(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In process an adapter takes the place of one that left: with the old tensors in it, that one
    is served. (A twin that is right hides no version: `PreviousButTwins`.)"""
    fill = LoadedAdapters._fill
    monkeypatch.setattr(
        LoadedAdapters, "_fill", lambda adapters, slot, alpha, _: fill(adapters, slot, alpha, {})
    )
    made = proofs(model, tmp_path, learning_rate=1e-3, steps=(3, 1))
    assert [(proof.policy, proof.status) for proof in made] == [
        ("reviewer", "failed"),
        ("solver", "failed"),
    ]
    assert all(proof.reason.startswith("weights: ") for proof in made)


class Cached(Honest):
    """Says that it keeps prompts, and counts what it is asked for."""

    def __init__(self, true: Any) -> None:
        super().__init__(true)
        self.lengths: list[int] = []

    def info(self) -> EngineInfo:
        return replace(super().info(), prefix_cache=True)

    async def generate(
        self, ids: Sequence[int], ref: ModelRef, sampling: Sampling, *args: Any, **more: Any
    ) -> list[Completion]:
        self.lengths.append(sampling.max_tokens)
        return await super().generate(ids, ref, sampling, *args, **more)


class NothingKept(Cached):
    def info(self) -> EngineInfo:
        return replace(super().info(), prefix_cache=False)


@pytest.mark.parametrize(("kind", "times"), [(Cached, 2), (NothingKept, 1)])
def test_prompts_are_served_before_where_they_are_kept(
    model: Path, tmp_path: Path, kind: type[Cached], times: int
):
    """Decoding is proven behind the prefix cache; where there is none, once is enough."""
    engines: list[Cached] = []

    def wrap(true: TransformersEngine) -> Cached:
        engines.append(kind(true))
        return engines[0]

    assert [proof.status for proof in proofs(model, tmp_path, wrap)] == ["passed", "passed"]
    assert sorted(engines[0].lengths[-4 * times :]) == [1] * 4 * (times - 1) + [SAMPLED] * 4


class TwoReplicas(Liar):
    """Replica `b` is another engine than `a`. What is asked of none in particular goes to `a`."""

    def __init__(self, a: Any, b: Any) -> None:
        super().__init__(a)
        self.of: dict[str | None, Any] = {None: a, "a": a, "b": b}

    def info(self) -> EngineInfo:
        return replace(self.of["a"].info(), replicas=("a", "b"))

    async def generate(
        self,
        ids: Sequence[int],
        ref: ModelRef,
        sampling: Sampling,
        n: int = 1,
        *,
        replica: str | None = None,
    ) -> list[Completion]:
        return await self.of[replica].generate(ids, ref, sampling, n)

    async def score(
        self, ids: Sequence[int], ref: ModelRef, replica: str | None = None
    ) -> list[float]:
        return await self.of[replica].score(ids, ref)

    async def publish(self, adapters: Mapping[str, Path]) -> TeamVersion:
        await self.of["b"].publish(adapters)
        return await self.of["a"].publish(adapters)

    async def retire(self, ref: ModelRef) -> None:
        await self.of["b"].retire(ref)
        await self.of["a"].retire(ref)

    async def adapters(self, replica: str) -> Mapping[str, str]:
        return await self.of[replica].adapters("local")


@pytest.mark.parametrize(("fault", "part"), [(BareBase, "weights"), (Penalised, "decoding")])
def test_every_replica_is_proven(model: Path, tmp_path: Path, fault: type[Liar], part: str):
    made = proofs(
        model, tmp_path, lambda engine: TwoReplicas(engine, fault(TransformersEngine(model)))
    )
    assert [(proof.policy, proof.replica, proof.status) for proof in made] == [
        ("reviewer", "a", "passed"),
        ("reviewer", "b", "failed"),
        ("solver", "a", "passed"),
        ("solver", "b", "failed"),
    ]
    assert made[1].reason.startswith(f"{part}: ")


class Blinks(Liar):
    """Is lost the first time that a twin is scored, and back at once."""

    lost = False

    async def score(
        self, ids: Sequence[int], ref: ModelRef, replica: str | None = None
    ) -> list[float]:
        if "-twin-" in ref.version and not self.lost:
            self.lost = True
            raise ReplicaLost("gone for a moment")
        return await super().score(ids, ref, replica)


def test_a_replica_that_was_lost_for_a_moment_is_proven_next_time(model: Path, tmp_path: Path):
    adapters = adapters_on(model, policies=["solver"])
    Learner(adapters, 1e-3).step()

    async def work(engine: TransformersEngine) -> list[VerificationRecord]:
        both = TwoReplicas(engine, Blinks(TransformersEngine(model)))
        publisher = Publisher(tmp_path, adapters, both)
        await publisher.publish(1, ["solver"])
        found = await play(both, publisher)
        assert [(proof.replica, proof.status) for proof in await publisher.verify(1, found)] == [
            ("a", "passed")
        ]
        assert publisher.unproven == {"solver"}
        made = await publisher.verify(2, found)
        assert publisher.unproven == set() and await publisher.verify(3, found) == []
        return made

    assert [(proof.replica, proof.status) for proof in with_engine(model, work)] == [
        ("a", "passed"),
        ("b", "passed"),
    ]


class Slow(Liar):
    """Takes its time to load twins, and to be told that one is to go."""

    def __init__(self, true: Any) -> None:
        super().__init__(true)
        self.loading, self.go_on = asyncio.Event(), asyncio.Event()
        self.twins: set[str] = set()

    async def publish(self, adapters: Mapping[str, Path]) -> TeamVersion:
        twins = {folder.name for folder in adapters.values() if "-twin-" in folder.name}
        if twins:
            self.loading.set()
            await self.go_on.wait()
        self.twins |= twins
        return await super().publish(adapters)

    async def retire(self, ref: ModelRef) -> None:
        await super().retire(ref)
        self.twins.discard(ref.version)


def test_a_proof_that_is_called_off_leaves_no_twin_behind(model: Path, tmp_path: Path):
    """An engine that was given outlives the run: what it has begun to load is unloaded again."""
    adapters = adapters_on(model)
    Learner(adapters, 1e-3).step()

    async def work(true: TransformersEngine) -> None:
        engine = Slow(true)
        publisher = Publisher(tmp_path, adapters, engine)
        await publisher.publish(1, adapters.trainable)
        proving = asyncio.ensure_future(publisher.verify(1, await play(engine, publisher)))
        await engine.loading.wait()
        proving.cancel()
        await asyncio.sleep(0.05)
        engine.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await proving
        (replica,) = engine.info().replicas
        assert engine.twins == set() and set(await engine.adapters(replica)) == set(
            publisher.versions.values()
        )

    with_engine(model, work)


class Lists(Liar):
    """Changes what replicas list."""

    def __init__(
        self, true: TransformersEngine, change: Callable[[str, str], tuple[str, str]]
    ) -> None:
        super().__init__(true)
        self.change = change

    async def adapters(self, replica: str) -> Mapping[str, str]:
        return dict(self.change(*item) for item in (await self.true.adapters(replica)).items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda version, folder: (f"{version}-old", folder), "does not list"),
        (
            lambda version, folder: (version, folder.replace("solver", "reviewer")),
            "serves 'solver-v1-.*' from",
        ),
    ],
)
def test_a_version_listed_otherwise_fails_the_proof(
    model: Path, tmp_path: Path, change: Any, reason: str
):
    solver = proofs(model, tmp_path, lambda engine: Lists(engine, change))[1]
    assert solver.status == "failed" and solver.residual is None
    assert re.match(f"identity: .*{reason}", solver.reason)


# when there is nothing to prove, and when


def test_untrained_then_trained_and_frozen_ones_once(model: Path, tmp_path: Path):
    """Fresh: untrained. Not played yet: still to be proven. Unchanged, whether frozen or without
    signal: proven once, never sent again."""
    adapters = adapters_on(model)
    learner = Learner(adapters, 1e-3)
    del learner.optimizers["reviewer"]  # the reviewer's adapter does not learn

    async def work(engine: TransformersEngine) -> list[VerificationRecord]:
        publisher = Publisher(tmp_path, adapters, engine)
        first = await publisher.publish(0, adapters.trainable)
        found = await play(engine, publisher)
        await publisher.verify(0, found)
        assert await publisher.publish(1, adapters.trainable) == first
        assert await publisher.verify(1, found) == []
        learner.step()
        second = await publisher.publish(2, adapters.trainable)
        assert second == {
            "reviewer": first["reviewer"],
            "solver": f"solver-v2-{adapters.sha256('solver')[:8]}",
        }
        await publisher.verify(2, {"solver": []})
        assert publisher.records[-1].reason == "no turn of this policy to compare yet"
        await publisher.verify(3, found)
        assert await publisher.verify(4, found) == []
        return publisher.records

    records = with_engine(model, work)
    assert [(proof.step, proof.policy, proof.status) for proof in records] == [
        (0, "reviewer", "untrained"),
        (0, "solver", "untrained"),
        (2, "solver", "untrained"),
        (3, "solver", "passed"),
    ]
    assert records[0].reason == "B is zero" and records[0].residual is None


def test_a_frozen_adapter_that_came_trained_is_proven(model: Path, tmp_path: Path):
    donor = adapters_on(model, seed=3)
    Learner(donor, 1e-3, seed=7).step()
    donor.save("solver", tmp_path / "donor")
    spec = replace(donor.policies["solver"], trainable=False, init=str(tmp_path / "donor"))
    adapters = Adapters(
        AutoModelForCausalLM.from_pretrained(model), [spec], seed=0, base_name=str(model)
    )

    async def work(engine: TransformersEngine) -> list[VerificationRecord]:
        publisher = Publisher(tmp_path / "versions", adapters, engine)
        await publisher.publish(0, ["solver"])
        return await publisher.verify(0, await play(engine, publisher))

    (proof,) = with_engine(model, work)
    assert proof.status == "passed" and proof.residual < 1e-4


def test_summary_and_how_often(model: Path, tmp_path: Path):
    adapters = adapters_on(model, policies=["solver"])
    learner = Learner(adapters, 1e-3)

    async def work(engine: TransformersEngine) -> Publisher:
        publisher = Publisher(tmp_path, adapters, engine, proof_every=3)
        for step in range(1, 6):
            learner.step()
            await publisher.publish(step, ["solver"])
            found = await play(engine, publisher)
            await publisher.verify(step, found)
        await publisher.verify(5, found, final=True)
        return publisher

    publisher = with_engine(model, work)
    assert [proof.step for proof in publisher.records] == [1, 3, 5]
    worst = max(proof.residual or 0.0 for proof in publisher.records)
    assert publisher.summary() == {
        "checks": 3,
        "passed": 3,
        "untrained": 0,
        "failed": 0,
        "max_residual": worst,
    }
    assert [
        VerificationRecord(**record) for record in json.loads(json.dumps(publisher.to_json()))
    ] == publisher.records


def test_a_proof_leaves_the_trainer_as_it_was(model: Path, tmp_path: Path):
    adapters = adapters_on(model)
    learner = Learner(adapters, 1e-3)
    seen: list[tuple[Any, ...]] = []

    def state() -> tuple[Any, ...]:
        grads = {full: p.requires_grad for full, p in adapters.model.named_parameters()}
        scalings = [
            dict(m.scaling)
            for m in adapters.model.modules()
            if hasattr(m, "scaling") and isinstance(m.scaling, dict)
        ]
        return (
            {name: adapters.sha256(name) for name in adapters.policies},
            adapters.base_sha256(),
            grads,
            scalings,
        )

    async def work(engine: TransformersEngine) -> None:
        publisher = Publisher(tmp_path, adapters, engine)
        learner.step()
        await publisher.publish(1, adapters.trainable)
        found = await play(engine, publisher)
        seen.append(state())
        await publisher.verify(1, found)
        seen.append(state())

    with_engine(model, work)
    assert seen[0] == seen[1]


def test_probes_take_every_task_once_first_then_short_prompts():
    def turn(index: int, agent: str, prompt: int, reply: int, **more: Any) -> Turn:
        sampling = more.pop("sampling", Sampling(temperature=0.7))
        ids, tokens = tuple(range(prompt)), tuple(range(100, 100 + reply))
        fields = {
            "source": "sampled",
            "text": "",
            "finish_reason": "stop",
            "policy": "q" if agent == "z" else "p",
            "version": "",
            **more,
        }
        return Turn(
            index=index,
            agent=agent,
            messages=(),
            prompt_ids=ids,
            token_ids=tokens,
            logprobs=(0.0,) * reply,
            sampling=sampling,
            **fields,
        )

    def episode(task: str, *turns: Turn) -> Episode:
        return Episode(id=task, group=task, task=Task(task, "?"), turns=turns)

    episodes = [
        episode("a", turn(0, "x", 3, 2), turn(1, "y", 4, 1), turn(2, "x", 9, 100)),
        episode("b", turn(0, "x", 8, 1, sampling=Sampling(top_p=0.5, temperature=0.7))),
        episode("c", turn(0, "x", 2, 0), turn(1, "x", 2, 3, source="written"), turn(2, "z", 1, 5)),
        episode("d", turn(0, "x", 1, 6, policy="q")),  # x spoke as q then
    ]
    found = probes(episodes, "p", count=4)
    assert [(probe.prompt, len(probe.ids), probe.temperature) for probe in found] == [
        (3, 5, 0.7),  # task a, its shortest prompt
        (8, 9, 1.0),  # task b; drawn with top_p, so its temperature is nothing to go by
        (4, 5, 0.7),  # the rest, shortest prompt first
        (9, 9 + REPLY, 0.7),  # cut
    ]
    assert probes(episodes, "p", count=1) == found[:1] and probes(episodes, "r") == []
    assert [(probe.prompt, len(probe.ids)) for probe in probes(episodes, "q")] == [(1, 6), (1, 7)]


def test_a_window_ends_with_the_reply_and_stands_alone():
    """Tokens before it are compared too, for trained tokens are soon so sure that one or two of
    them decide; nothing predicts the first."""
    short, edge, long = (
        Probe(tuple(range(5, 5 + prompt + 6)), prompt, 0.7) for prompt in (4, CONTEXT + 1, 80)
    )
    assert short.window == ScoredWindow(short.ids, 1) and edge.window == ScoredWindow(edge.ids, 1)
    assert long.window == ScoredWindow((5, *range(5 + 80 - CONTEXT, 5 + 80 + 6)), 1 + SURPRISED), (
        "behind the cut a few are passed over"
    )
    assert len(long.window.ids) == 1 + CONTEXT + 6


def test_what_sequences_begin_with_is_computed_once(model: Path):
    """The trainer's numbers are those of every sequence alone; the tokens that go through the model
    are those of the tree."""
    common = tuple(range(5, 45))
    adapters = adapters_on(model)
    Learner(adapters, 1e-2).step()
    tokens: list[int] = []
    embed = adapters.model.get_input_embeddings()
    trainer_logprobs(
        adapters, [ScoredWindow(common)], "solver", 8.0
    )  # the attention is tried at first use
    with_hook = embed.register_forward_hook(
        lambda module, args, out: tokens.append(args[0].numel())
    )
    for first, temperatures in ((1, (1.0, 1.0, 1.0)), (44, (0.5, 1.5, 2.5))):
        asked = [
            ScoredWindow((*common, *range(50 + k, 60 + k)), first, t)
            for k, t in enumerate(temperatures)
        ]
        together = trainer_logprobs(adapters, asked, "solver", 8.0)
        assert tokens == [40 + 3 * 9]  # nobody asks what comes after the last
        alone = [
            value for one in asked for value in trainer_logprobs(adapters, [one], "solver", 8.0)
        ]
        assert together == pytest.approx(alone, abs=1e-5) and len(alone) == 3 * (50 - first)
        ids = torch.tensor([asked[1].ids])
        with torch.no_grad(), adapters.active("solver"), adapters.amplified("solver", 8.0):
            logits = adapters.model(input_ids=ids).logits[0, :-1]
        right = torch.log_softmax(logits / temperatures[1], -1).gather(1, ids[0, 1:, None])[
            first - 1 :, 0
        ]
        assert together[len(right) : 2 * len(right)] == pytest.approx(right.tolist(), abs=1e-5)
        tokens.clear()
    with_hook.remove()


class Counting(Liar):
    """Counts what it is asked."""

    def __init__(self, true: Any) -> None:
        super().__init__(true)
        self.scored: list[str] = []
        self.loaded: list[str] = []
        self.most = 0  # twins loaded at the same time

    async def score(
        self, ids: Sequence[int], ref: ModelRef, replica: str | None = None
    ) -> list[float]:
        self.scored.append("twin" if "-twin-" in ref.version else ref.version or "base")
        return await super().score(ids, ref, replica)

    async def publish(self, adapters: Mapping[str, Path]) -> TeamVersion:
        self.loaded += [folder.name for folder in adapters.values()]
        self.most = max(self.most, sum("-twin-" in name for name in self.loaded))
        return await super().publish(adapters)

    async def retire(self, ref: ModelRef) -> None:
        await super().retire(ref)
        self.loaded.remove(ref.version)


def test_a_later_proof_asks_for_no_more_than_it_needs(model: Path, tmp_path: Path):
    """Of the trainer: base, twin and decoded replies, one pass each. Of the engine: the twin's
    scores; how noisy it is was found out once."""
    adapters = adapters_on(model)
    learner = Learner(adapters, 1e-3)
    passes: list[tuple[str, float]] = []

    def forward(asked: Sequence[ScoredWindow], policy: str, factor: float) -> list[float]:
        passes.append((policy, factor))
        return trainer_logprobs(adapters, asked, policy, factor)

    async def work(true: TransformersEngine) -> Counting:
        engine = Counting(true)
        publisher = Publisher(tmp_path, adapters, engine, forward=forward)
        for step in (1, 2):
            learner.step(
                5 - 4 * (step - 1)
            )  # the second time it moves by little, and needs no other amplification
            await publisher.publish(step, adapters.trainable)
            found = await play(engine, publisher)
            if step == 2:
                assert engine.scored.count("base") == len(PROMPTS), "not once for every policy"
                passes.clear()
                engine.scored.clear()
            assert [proof.status for proof in await publisher.verify(step, found)] == [
                "passed",
                "passed",
            ]
        assert all(proof.noise is not None for proof in publisher.records)
        return engine

    engine = with_engine(model, work)
    assert engine.scored == ["twin"] * 2 * len(PROMPTS)
    assert sorted(policy for policy, _ in passes) == [
        "base",
        "base",
        "reviewer",
        "reviewer",
        "solver",
        "solver",
    ]
    assert engine.most == 1, (
        "one adapter more than versions in force is what servers are given room for"
    )
    assert not any("-twin-" in name for name in engine.loaded)


def test_a_proof_that_is_called_off_waits_for_the_pass_under_way(model: Path, tmp_path: Path):
    """It has switched the adapters: whoever goes on must find them as they were."""
    adapters = adapters_on(model)
    learner = Learner(adapters, 1e-3)
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def forward(asked: Sequence[ScoredWindow], policy: str, factor: float) -> list[float]:
        begun.set()
        assert go_on.wait(60)
        try:
            return trainer_logprobs(adapters, asked, policy, factor)
        finally:
            ended.set()

    async def work(engine: TransformersEngine) -> None:
        publisher = Publisher(tmp_path, adapters, engine, forward=forward)
        learner.step()
        await publisher.publish(1, adapters.trainable)
        proving = asyncio.ensure_future(publisher.verify(1, await play(engine, publisher)))
        assert await asyncio.to_thread(begun.wait, 60)
        proving.cancel()
        await asyncio.sleep(0.05)
        assert not proving.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await proving
        assert ended.is_set()

    with_engine(model, work)
