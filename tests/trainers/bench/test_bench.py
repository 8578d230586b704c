"""Every suite of `marlora bench` at the size of a test: what is counted, and that nothing is told
unless the same work was done."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.types import SettingError
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.vllm.server_args import GUARD, ServerSettings, command
from marlora.trainers.batching.batches import pack
from marlora.trainers.bench import (
    agents,
    ahead,
    geometry,
    loop,
    measure,
    publish,
    rollout,
    serve,
    update,
)
from marlora.trainers.bench.measure import Options, Time, Way, race
from marlora.trainers.bench.suites import SUITES
from marlora.trainers.errors import RunError
from marlora.trainers.testbeds.tiny import tiny_network
from tests.live_server import Live

TINY = Options(repeats=1, size="tiny", device="cpu")


# the race


def test_ways_run_in_turns_after_a_round_that_does_not_count():
    ran: list[str] = []

    def way(name: str) -> Way:
        return Way(name, lambda: ran.append(name))

    times = race("x", [way("a"), way("b")], 2, measure.same, 0.0)
    assert ran == ["a", "b"] * 3
    assert {name: (len(t.wall), len(t.process)) for name, t in times.items()} == {
        "a": (2, 2),
        "b": (2, 2),
    }


def test_a_way_that_does_other_work_is_told_and_there_are_no_numbers():
    laps: list[int] = []

    def other() -> torch.Tensor:
        laps.append(1)
        return torch.tensor([3.0, 4.0 + 1e-3])

    with pytest.raises(
        RunError,
        match=(
            r"bench x: what 'other' does is 2\.0e-04 from what 'ours' does \(at most 1e-05\); no"
            r" ratio"
        ),
    ):
        race(
            "x",
            [Way("ours", lambda: torch.tensor([3.0, 4.0])), Way("other", other)],
            5,
            measure.apart,
            1e-5,
        )
    assert len(laps) == 1  # refused before anything is timed


def test_not_a_number_is_no_agreement():
    nan = torch.tensor([float("nan")])
    with pytest.raises(RunError, match="no ratio"):
        race(
            "x",
            [Way("ours", lambda: torch.ones(1)), Way("nan", lambda: nan)],
            1,
            measure.apart,
            1e-5,
        )


def test_medians_and_ratios():
    times = {
        "ours": Time([9.0, 1.0, 2.0], [0.5, 0.5, 4.0]),
        "padded": Time([8.0] * 3, [1.0, 2.0, 9.0]),
    }
    assert times["padded"].to_json()["seconds"]["process"] == {"median": 2.0, "smallest": 1.0}
    assert measure.ratios(times, "ours", "4.5") == {
        "padded@4.5": 2.0 / 0.5 if not torch.cuda.is_available() else 8.0 / 2.0
    }


def test_memory_above_rest_is_what_a_way_takes():
    """Three runs of two ways: 64 MiB are told apart from none, whatever the process holds."""
    held = torch.ones(2**24)  # 64 MiB at rest

    def much() -> None:
        torch.ones(2**24).sum()

    times = race("x", [Way("none", lambda: None), Way("much", much)], 2, measure.same, 0.0)
    assert held.sum() == 2**24
    assert times["none"].bytes is not None and times["much"].bytes is not None
    assert times["none"].bytes < 2**24 <= 2**26 <= times["much"].bytes + 2**20 < 2**27


def test_flops_of_attention_are_counted_on_a_cpu():
    query, key, value = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3))

    def attend() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()

    times = race("x", [Way("attention", attend)], 1, measure.same, 0.0, count=True)
    # forward: two products of 8 x 4 x 8 in two heads; backward: five
    assert times["attention"].flops == 7 * 2 * 2 * 8 * 4 * 8


# what a step needs


def test_flops_of_a_step_by_hand():
    """Two replies of two tokens to one prompt of three: tokens 3 + 2 x 1 (the last of a reply
    predicts nothing), pairs 1+2+3 + 2 x 4."""
    model = tiny_network()
    work = geometry.needed(model, update.recorded(update.Case(2, 3, 2)))
    assert (work.unique, work.pairs, work.terms) == (5, 14, 4)
    assert (work.layers, work.width, work.head) == (3, 128, 264 * 128)
    per_layer = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 384
    assert work.linear == 3 * per_layer
    assert work.adapter == 16 * 3 * ((128 + 128) + 2 * (128 + 64) + (128 + 128) + 3 * (128 + 384))
    assert (
        work.entrance == 128 * (128 + 64 + 64) + 3 * 16 * 128
    )  # q, k and v of the first layer, and their A
    through = 4 * work.linear + 6 * work.adapter - 2 * work.entrance
    assert work.flops == through * 5 + 14 * 3 * 128 * 14 + 4 * work.head * 4


@pytest.mark.parametrize(
    ("size", "millions"),
    [("135m", 134.5), ("qwen3-0.6b", 596), ("qwen3-4b", 4022), ("qwen3-8b", 8191)],
)
def test_geometries_have_the_size_of_their_name(size: str, millions: float):
    model = geometry.network(size, "meta", torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize("case", update.CASES, ids=lambda case: f"{case.rho:g}")
def test_the_shares_of_common_tokens(case: update.Case):
    samples = update.recorded(case)
    work = geometry.needed(tiny_network(), samples)
    raw = sum(len(sample.ids) - 1 for sample in samples)
    assert case.rho in (1, 2, 3, 4.5, 6, 8)
    assert raw / work.unique == pytest.approx(
        case.rho, rel=0.07
    )  # the last token of a reply is no input


# the suites


@pytest.mark.usefixtures("one_thread")
def test_update_against_padded_rows_single_turns_and_trl(monkeypatch: pytest.MonkeyPatch):
    cases = (
        update.Case(4, 0, 8, full=True),
        update.Case(4, 24, 4, full=True),
        update.Case(4, 8, 4),
    )
    monkeypatch.setattr(update, "CASES", cases)
    found = SUITES["update"](TINY)
    everyone = {f"{name}@{rho}" for name in update.OPPONENTS for rho in ("1", "2.8")}
    assert set(found["ratios"]) == everyone | {"padded@2"} and all(
        ratio > 0 for ratio in found["ratios"].values()
    )
    for case, result in zip(cases, found["results"], strict=True):
        assert all(way["difference"] <= 1e-5 for way in result["ways"].values())
        # to the last one: more than needed are only the pairs of a token and a later one, which the
        # counter charges, and the entropy
        (batch,) = pack(update.recorded(case), max_tokens=10_000, layout="shared")
        unseen = sum(b.branches * b.queries * b.keys for b in batch.tree.blocks) - int(
            (batch.position_ids + 1).sum()
        )
        extra = 14 * 3 * 128 * unseen + 2 * batch.num_terms * 264
        assert (
            result["ways"]["ours"]["flops_spent"] - result["flops_useful"]
            == extra
            > 2 * batch.num_terms * 264
        )
    shared = found["results"][1]["ways"]
    assert shared["padded"]["flops_spent"] > 1.5 * shared["ours"]["flops_spent"]
    assert shared["trl"]["flops_spent"] > shared["trl_compact_head"]["flops_spent"]
    assert found["results"][1]["trl_old_s"] > 0 and "trl_old_s" not in found["results"][2]
    assert shared["ours"]["roofline"] > 0 and found["device_rates"]["flops_per_s"] > 0
    assert [row[0] for row in found["rows"]] == ["1", "2.8", "2"]


def test_update_takes_the_cases_it_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(update, "CASES", (update.Case(4, 0, 4), update.Case(4, 8, 4)))
    assert set(SUITES["update"](dataclasses.replace(TINY, rho=(2.0,)))["ratios"]) == {"padded@2"}
    assert set(
        SUITES["update"](dataclasses.replace(TINY, rho=(1.0,), opponents=("per_turn",)))["ratios"]
    ) == {"per_turn@1"}
    with pytest.raises(SettingError, match=r"--rho 9: expected some of 1, 2"):
        update.update(dataclasses.replace(TINY, rho=(9.0,)))
    with pytest.raises(
        SettingError,
        match=(
            r"--opponents comlrl: the update is raced against padded, per_turn, trl,"
            r" trl_compact_head"
        ),
    ):
        update.update(dataclasses.replace(TINY, opponents=("comlrl",)))


@pytest.mark.parametrize("broken", ["padded", "trl"])
def test_update_gives_no_ratio_if_a_gradient_differs(broken: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(update, "CASES", (update.Case(4, 8, 4, full=True),))
    real = update.race

    def off(suite: str, ways: list[Way], *how: Any, **more: Any) -> Any:
        made = {way.name: way for way in ways}
        run = made[broken].run
        made[broken] = Way(broken, lambda: run() * (1 + 3e-5))
        return real(suite, list(made.values()), *how, **more)

    monkeypatch.setattr(update, "race", off)
    with pytest.raises(RunError, match=f"'{broken}' does is 3.0e-05 from what 'ours'"):
        update.update(TINY)


def test_agents_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch):
    """One in a process of its own; the others in this one, for a process is seconds of imports."""
    monkeypatch.setattr(agents, "NUMBERS", (1, 2))
    real = agents._child
    monkeypatch.setattr(
        agents,
        "_child",
        lambda *how: (real if how[:2] == ("adapters", 2) else agents.measured)(*how),
    )
    found = agents.agents(TINY)
    for way in ("agents", "copies"):
        assert set(found[way]) == {"1", "2"}
        assert all(set(one) == {"tokens_per_second", "peak_bytes"} for one in found[way].values())
        assert all(
            one["tokens_per_second"] > 0 and one["peak_bytes"] > 2**27
            for one in found[way].values()
        )
    assert (
        found["peak_of_most_over_one"]
        == found["agents"]["2"]["peak_bytes"] / found["agents"]["1"]["peak_bytes"]
    )


def test_agents_that_learnt_something_else_are_not_compared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agents, "NUMBERS", (1,))
    monkeypatch.setattr(
        agents,
        "_child",
        lambda way, n, options: {"tokens_per_second": 1.0, "peak_bytes": 1, "sha256": [way]},
    )
    with pytest.raises(RunError, match="learnt other weights"):
        agents.agents(TINY)


def test_publish_in_this_process():
    found = publish.publish(dataclasses.replace(TINY, engine="transformers"))
    median = found["median"]["transformers"]
    assert (
        0 < median["publish"] < median["first_token"]
        and 0 < median["prove_trainer"] < median["prove"]
    )
    (lap,) = found["results"]["transformers"]
    assert lap["residual"] < 0.005 and lap["forwards"] >= 3 * len(
        publish.POLICIES
    )  # base, amplified and decoded, of each


def test_rollouts_play_the_same_with_and_without_a_barrier(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rollout, "TASKS", 3)
    found = rollout.rollout(TINY)
    assert set(found["ratios"]) == {"barrier@1", "oversampled@1"}
    # of ten of each task eight are kept (two may end in the same turn of the loop, then the later
    # one is dropped all the same)
    assert (found["oversampled"]["begun"], found["oversampled"]["dropped"]) == (30, 6)


@pytest.mark.slow
@pytest.mark.process
def test_ranks_that_play_are_counted_by_what_a_call_costs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rollout, "MANY", 24)
    found = rollout.rank_rollouts((1, 2), 1)
    assert set(found) == {"1", "2"}
    for row in found.values():
        assert row["cpu_ms_per_call"] >= row["cpu_ms_of_rank_0"] > 0 < row["calls_per_second"]
    assert found["2"]["cpu_ms_per_call"] > found["2"]["cpu_ms_of_rank_0"]


@pytest.mark.slow
def test_steps_are_counted_at_every_bound_of_staleness(monkeypatch: pytest.MonkeyPatch):
    for name, value in dict(BOUNDS=(0, 1), STEPS=4, TASKS=2, SAMPLES=2, MEDIAN=0.02).items():
        monkeypatch.setattr(ahead, name, value)
    found = ahead.ahead(TINY)
    assert [(r["bound"], len(r["seconds"]), r["oldest"]) for r in found["results"]] == [
        (0, 2, 0),
        (1, 2, 1),
    ]
    assert set(found["median"]) == {"0", "1"} and len(found["rows"]) == 2


@pytest.mark.timeout(900)
def test_loop_beside_trl():
    found = loop.loop(dataclasses.replace(TINY, engine="transformers"))
    both = found["results"]["transformers"]
    assert {name: one["tokens_per_step"] for name, one in both.items()} == {
        "ours": pytest.approx(64, abs=63),
        "trl": pytest.approx(64, abs=63),
    }
    assert found["ratios"]["trl@transformers"] == both["trl"]["seconds"] / both["ours"]["seconds"]


def test_a_baton_is_held_by_one_at_a_time_and_a_loop_that_fails_is_told():
    baton, ran = loop.Baton(["a", "b"]), []

    def go(name: str, steps: int) -> None:
        for step in range(steps):
            baton.step(name)
            ran.append((name, step))
        baton.leave(name)

    other = threading.Thread(target=go, args=("b", 3))
    other.start()
    go("a", 3)
    other.join(timeout=30)
    assert ran == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert {name: len(laps) for name, laps in baton.laps.items()} == {"a": 2, "b": 2}
    baton = loop.Baton(["b", "a"])
    baton.leave("b", ValueError("no"))
    baton.step("a")  # alone now
    assert isinstance(baton.error, ValueError)


@pytest.mark.server
def test_serving_on_the_live_server(server: Live, monkeypatch: pytest.MonkeyPatch):
    """The measurement itself, on a server that runs already."""
    monkeypatch.setattr(serve, "PREFIX", 320)
    monkeypatch.setattr(serve, "ADAPTERS", (0, 1, 2))
    folders = {
        name: server.adapter(f"{name}-v1-bench", seed)
        for seed, name in enumerate(("solver", "critic"))
    }

    async def go() -> dict[str, Any]:
        engine = server.engine()
        try:
            refs = [
                ModelRef(policy, version)
                for policy, version in (await engine.publish(folders)).items()
            ]
            return await serve.measured(engine, refs, callers=4, repeats=1)
        finally:
            await engine.close()

    found = asyncio.run(go())
    assert set(found["tokens_per_second"]) == {"0", "1", "2"} and all(
        rate > 0 for rate in found["tokens_per_second"].values()
    )
    assert found["miss"] > 0 and found["hit"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_serve_and_publish_with_servers_of_their_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "ADAPTERS", (0, 1, 2))
    found = serve.serve(dataclasses.replace(TINY, engine="vllm"))
    assert set(found["servers"]) == {"guard", "open"}
    assert {"miss_over_hit@384", "base_over_adapters@2", "open_over_guard@0"} <= set(
        found["ratios"]
    )
    found = publish.publish(dataclasses.replace(TINY, engine="vllm"))
    assert set(found["median"]) == {"vllm"} and found["median"]["vllm"]["prove"] > 0


def test_a_server_without_the_guard_is_the_same_command_but_for_it(model: Path):
    settings = ServerSettings(str(model), model)
    made = []
    for guard in (GUARD, ""):
        made.append(command(dataclasses.replace(settings, guard=guard), 1, True))
    assert [flag for flag in made[0] if flag not in made[1]] == [
        "--middleware=marlora.rollouts.engines.vllm.auth.Guard"
    ]
    assert [flag for flag in made[1] if flag not in made[0]] == []
