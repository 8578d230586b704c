"""Inside a run: what is not a number changes nothing, adapters move alone, the base never."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.types import SettingError
from marlora.rollouts.types import Episode, groups
from marlora.trainers.collection.background import BackgroundLoop, StopSignal
from marlora.trainers.collection.stored_episodes import (
    PlannedEpisodes,
    find_stored,
    training_requests,
)
from marlora.trainers.errors import Stopped
from marlora.trainers.loop.run import RunError, TrainingRun
from marlora.trainers.loop.step_result import StepResult
from marlora.trainers.methods.policy_gradient.grpo import GRPOTrainer
from marlora.trainers.update import optimizer_step
from tests.trainers.small_run import EPISODES, trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def state(run: TrainingRun) -> dict[str, tuple[str, dict[str, list[float]]]]:
    """Per policy: hash of its tensors, and its optimizer's moments."""
    (base,) = run.learner.bases.values()
    return {
        policy: (
            base.adapters.sha256(policy),
            {k: t.flatten().tolist() for k, t in base.optimizers.state(policy).items()},
        )
        for policy in base.policies
    }


def step(made: GRPOTrainer, number: int) -> dict[str, Any]:
    """One step; its row of metrics."""
    made.run.finish(number, made.step(number))
    return json.loads((made.run.spec.config.folder / "metrics.jsonl").read_text().splitlines()[-1])


def nan_loss(made: GRPOTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = made.loss

    def loss(inputs: Any) -> Any:
        value, stats = real(inputs)
        return (value * math.nan if inputs.policy == "first" else value), stats

    monkeypatch.setattr(made, "loss", loss)


def infinite_logprob(made: GRPOTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = optimizer_step.token_logprobs

    def logprobs(model: Any, batch: Any, **kwargs: Any) -> Any:
        logp, entropy = real(model, batch, **kwargs)
        return (
            torch.where(torch.arange(len(logp)) == 1, -math.inf, logp)
            if batch.policy == "first"
            else logp
        ), entropy

    monkeypatch.setattr(optimizer_step, "token_logprobs", logprobs)


def nan_gradient(made: GRPOTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is finite and whose gradient is not."""
    real = made.loss

    def loss(inputs: Any) -> Any:
        if inputs.policy == "first":
            inputs.logp.register_hook(lambda gradient: gradient * math.inf)
        return real(inputs)

    monkeypatch.setattr(made, "loss", loss)


@pytest.mark.parametrize(
    ("inject", "what"),
    [(nan_loss, "loss"), (infinite_logprob, "log-prob"), (nan_gradient, "gradient norm")],
)
def test_what_is_not_finite_is_no_step(
    inject: Any, what: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path / "run", model)
    with made.run as run:
        step(made, 1)
        before = state(run)
        inject(made, monkeypatch)
        row = step(made, 2)
        after = state(run)
        assert after["first"] == before["first"], "neither a tensor nor a moment"
        assert after["last"] != before["last"], "the other policy learns on"
        assert (
            row["policies"]["first"]["applied"] is False
            and what in row["policies"]["first"]["problem"]
        )
        dump = json.loads((tmp_path / "run/dumps/step-000002.json").read_text())
        assert what in dump["problems"]["first"] and "last" not in dump["problems"]
        assert {sample["policy"] for sample in dump["samples"]} == {"first"}
        ids = {episode.id for episode in run.rollouts.store.read(step=2)}
        assert {sample["episode"] for sample in dump["samples"]} <= ids and all(
            s["ids"] for s in dump["samples"]
        )
        monkeypatch.undo()
        made.__dict__.pop("loss", None)
        assert step(made, 3)["policies"]["first"]["applied"] is True
        assert run.log.aborted == 0 and state(run)["first"] != before["first"]


def test_three_steps_that_are_not_finite_end_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path / "run", model, max_steps=9)
    nan_loss(made, monkeypatch)
    with pytest.raises(
        RunError, match=r"three steps in a row were not finite.*dumps/step-000003\.json"
    ):
        made.train()
    assert len(list((tmp_path / "run/dumps").iterdir())) == 3


def test_a_step_without_samples_of_a_policy_leaves_it_alone(model: Path, tmp_path: Path) -> None:
    """Tensors and moments of one policy, while the other is trained; also after loading."""
    folder = tmp_path / "run"
    made = trainer(folder, model)
    with made.run as run:
        step(made, 1)
        for number, silent in ((2, "last"), (3, "first")):
            before = state(run)
            episodes = run.rollouts.collect(number)
            mine = {a: p for a, p in run.learner.policy_of.items() if p != silent}
            found, _ = update_samples(made, episodes, mine)
            done = run.learner.learn(number, found, made.loss)
            run.finish(number, StepResult({"policies": {}}, episodes))
            assert silent not in done and state(run)[silent] == before[silent]
            assert all(state(run)[policy] != before[policy] for policy in done)
        last = state(run)
    again = trainer(folder, model, resume=True, max_steps=4)
    with again.run as run:
        assert state(run) == last
        episodes = run.rollouts.collect(4)
        found, _ = update_samples(again, episodes, {"last": "last"})
        run.learner.learn(4, found, again.loss)
        assert state(run)["first"] == last["first"] and state(run)["last"] != last["last"]


def update_samples(made: GRPOTrainer, episodes: list[Episode], policy_of: dict[str, str]) -> Any:
    from marlora.trainers.batching.samples import samples
    from marlora.trainers.credit.rules import credit

    return samples(episodes, credit(episodes, made.args, made.run.learner.credit_state), policy_of)


def test_the_base_stays_what_it_was(model: Path, tmp_path: Path) -> None:
    """After training, evaluation, saving and loading, in the trainer and in the engine that shares
    its process."""
    made = trainer(tmp_path / "run", model)
    with made.run as run:
        (base,) = run.learner.bases.values()
        before, served = base.adapters.base_sha256(), engine_sha256(run.engines.of[base.name])
        made.train()
        assert base.adapters.base_sha256() == before
    assert all(
        p["sha256_before"] != p["sha256_after"] for p in summary(tmp_path)["policies"].values()
    )
    again = trainer(tmp_path / "run", model, resume=True)
    with again.run as run:
        (base,) = run.learner.bases.values()
        assert base.adapters.base_sha256() == before
        assert run.evaluator.evaluate("once more") is not None
        assert engine_sha256(run.engines.of[base.name]) == served


def engine_sha256(engine: Any) -> str:
    from marlora.trainers.model.adapter_files import base_sha256

    return base_sha256(engine.sampler.model)


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run/summary.json").read_text())


def test_a_base_that_moved_ends_the_run(model: Path, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", model, max_steps=1)
    with made.run as run:
        (base,) = run.learner.bases.values()
        step(made, 1)
        weight = next(p for n, p in base.adapters.model.named_parameters() if "lora_" not in n)
        with torch.no_grad():
            weight.view(-1)[0] += 1e-3
        with pytest.raises(RunError, match="its weights changed during the run"):
            run.summarise(None, None)


# resuming, without a process


def test_the_episodes_of_other_adapters_have_spent_their_ids(model: Path, tmp_path: Path) -> None:
    """A resumed run whose update came out differently plays anew under another name, and what it
    trains on is stored."""
    made = trainer(tmp_path / "run", model)
    with made.run as run:
        tasks, count = run.rollouts.tasks_of(1), EPISODES // len(run.rollouts.tasks_of(1))

        def recalled(version: dict[str, str]) -> PlannedEpisodes:
            return find_stored(
                run.rollouts.store,
                training_requests(tasks, "train-000001", count, 1),
                lambda episode: episode.state.versions == version,
            )

        assert recalled({}).stored == {}
        played = run.rollouts.collect(1)
        known = recalled({})
        assert [job.id for job in known.plan] == [e.id for e in played] and known.stored.keys() == {
            e.id for e in played
        }
        assert known.dropped == []
        known = recalled({"first": "first-v0-other"})
        assert known.stored == {} and all(
            job.id.startswith("train-000001.1/") for job in known.plan
        )
        assert {e.id for e in known.dropped} == {e.id for e in played}, (
            "told, since they are not learnt from"
        )
        assert run.rollouts.collect(1) == played, "the right ones are taken as they are"


def test_an_earlier_run_is_not_overwritten_unasked(model: Path, tmp_path: Path) -> None:
    trainer(tmp_path / "run", model, max_steps=1).train()
    with pytest.raises(
        SettingError, match="holds an earlier run; set resume to go on, overwrite to replace it"
    ):
        trainer(tmp_path / "run", model, max_steps=1).train()
    trainer(tmp_path / "run", model, max_steps=1, overwrite=True).train()
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1


def test_a_run_at_work_is_not_disturbed_by_a_second_one(model: Path, tmp_path: Path) -> None:
    """Neither by one that would replace it nor by one that would go on; a closed run has given the
    folder back."""
    folder = tmp_path / "run"
    with trainer(folder, model).run:
        held = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        for change in ("overwrite", "resume"):
            with pytest.raises(SettingError, match=rf"a run is at work there .*pid {os.getpid()}"):
                trainer(folder, model, **{change: True}).train()
        assert held == {path: path.stat().st_mtime_ns for path in held}
    with trainer(folder, model, resume=True).run:
        pass


def test_a_run_that_cannot_begin_leaves_the_earlier_one(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with trainer(folder, model).run:
        pass
    with pytest.raises(SettingError, match="model"):
        trainer(folder, tmp_path / "no-model", overwrite=True).train()
    assert (folder / "config.yaml").is_file() and (folder / "versions").is_dir()


def test_stopped_work_has_ended_before_the_caller_goes_on() -> None:
    """Cancelled work may still be writing: it is waited for."""
    import asyncio

    background, stop, ended = BackgroundLoop(), StopSignal(), []

    async def work() -> None:
        stop.asked = True
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            ended.append("written")

    async def fail() -> None:
        raise ValueError("the work's own")

    async def time_out() -> None:
        raise TimeoutError

    try:
        with pytest.raises(Stopped):
            background.run(work(), stop)
        assert ended == ["written"]
        with pytest.raises(ValueError, match="the work's own"):
            background.run(fail(), stop)
        with pytest.raises(TimeoutError):
            background.run(time_out())
    finally:
        stop.close()
        background.close()


def test_over_sampling_learns_from_as_many_as_asked_and_counts_what_it_drops(
    model: Path, tmp_path: Path
) -> None:
    """Two more episodes of each task begin; a resumed run finds its step complete and plays
    nothing."""
    made = trainer(tmp_path / "run", model, oversample=2)
    wanted = made.args.num_generations
    with made.run as run:
        row = step(made, 1)
        requests = training_requests(run.rollouts.tasks_of(1), "train-000001", wanted + 2, 1)
        known = find_stored(run.rollouts.store, requests)
        found = run.rollouts.begin(
            "again", known, run.rollouts.runner, run.state, oversample=2
        ).result()
    stored, again = found.episodes, found.oversampled
    assert row["episodes"] == made.args.tasks_per_step * wanted == len(stored)
    assert all(len(group) == wanted for group in groups(stored).values())
    assert row["oversampled"]["dropped"] == 2 * made.args.tasks_per_step
    assert row["oversampled"]["mean_tokens_kept"] > 0 and again["dropped"] == 0
