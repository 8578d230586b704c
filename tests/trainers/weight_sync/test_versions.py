"""Adapter versions: named once, never changed, kept as long as anybody can ask for them."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from marlora.agents.types import Sampling
from marlora.rollouts.engines.base import EngineError, ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.engines.transformers import TransformersEngine
from marlora.rollouts.files import adapter_sha256
from marlora.trainers.model.adapter_files import CONFIG, WEIGHTS
from marlora.trainers.weight_sync import publisher as publish
from marlora.trainers.weight_sync.publisher import KEEP_VERSIONS, Publisher
from tests.repository import ROOT
from tests.trainers.publishing import PROMPTS, Learner, adapters_on, with_engine

torch.set_num_threads(1)


def test_a_version_is_a_new_folder_durable_before_it_has_its_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adapters = adapters_on(model, policies=["solver"])
    learner = Learner(adapters, 1e-3)
    events: list[tuple[str, str]] = []
    rename, fsync = Path.rename, publish.fsync
    monkeypatch.setattr(
        publish, "fsync", lambda path: (events.append(("fsync", path.name)), fsync(path))[1]
    )
    monkeypatch.setattr(
        Path, "rename", lambda self, to: (events.append(("rename", self.name)), rename(self, to))[1]
    )

    async def work(engine: TransformersEngine) -> list[str]:
        publisher, names = Publisher(tmp_path / "versions", adapters, engine), []
        for step in range(4):
            learner.step()
            names.append((await publisher.publish(step, ["solver"]))["solver"])
            assert await engine.adapters("local") == {
                names[-1]: str(tmp_path / "versions" / names[-1])
            }
            assert adapter_sha256(tmp_path / "versions" / names[-1] / WEIGHTS) == adapters.sha256(
                "solver"
            )
        return names

    names = with_engine(model, work)
    assert len(set(names)) == 4 and all(
        re.fullmatch(rf"solver-v{step}-[0-9a-f]{{8}}", name) for step, name in enumerate(names)
    )
    one = [
        ("fsync", CONFIG),
        ("fsync", WEIGHTS),
        ("fsync", f".{names[0]}"),
        ("rename", f".{names[0]}"),
        ("fsync", "versions"),
    ]
    assert sorted(events[:2]) + events[2:5] == one and len(events) == 20
    kept = sorted(path.name for path in (tmp_path / "versions").iterdir())
    assert kept == sorted(names)[-KEEP_VERSIONS - 1 :]


def test_a_resumed_run_gives_an_unchanged_adapter_its_name_back(model: Path, tmp_path: Path):
    adapters = adapters_on(model)

    async def publish_all(
        engine: TransformersEngine, step: int, earlier: Mapping[str, str]
    ) -> dict[str, str]:
        return await Publisher(tmp_path, adapters, engine, earlier=earlier).publish(
            step, adapters.trainable
        )

    first = with_engine(model, lambda engine: publish_all(engine, 3, {}))
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert with_engine(model, lambda engine: publish_all(engine, 5, first)) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == written
    Learner(adapters, 1e-3).step()
    assert with_engine(model, lambda engine: publish_all(engine, 5, first))["solver"].startswith(
        "solver-v5-"
    )
    weights = tmp_path / first["solver"] / WEIGHTS
    weights.write_bytes((tmp_path / first["reviewer"] / WEIGHTS).read_bytes())
    adapters = adapters_on(model)  # as fresh as those published first
    with pytest.raises(EngineError, match=f"{first['solver']}: its tensors were changed"):
        with_engine(model, lambda engine: publish_all(engine, 5, first))


def test_versions_in_play_outlive_five_publishes(model: Path, tmp_path: Path):
    """A slow episode speaks with the version it began with; its folder stays until nobody can ask
    for it."""
    adapters = adapters_on(model, policies=["solver"])
    learner = Learner(adapters, 1e-3)
    sampling = Sampling(max_tokens=6, seed=4)

    async def work(engine: TransformersEngine) -> None:
        publisher = Publisher(tmp_path, adapters, engine)
        learner.step()
        versions = await publisher.publish(1, ["solver"])
        ref, folder = ModelRef("solver", versions["solver"]), tmp_path / versions["solver"]
        with (
            publisher.hold(versions),
            publisher.hold({"solver": versions["solver"], "other": "other-v1-00000000"}),
        ):
            (first,) = await engine.generate(PROMPTS[0], ref, sampling)
            for step in range(2, 7):
                learner.step()
                await publisher.publish(step, ["solver"])
                assert (
                    set(await engine.adapters("local"))
                    == {ref.version, publisher.versions["solver"]}
                    and folder.is_dir()
                )
            assert (await engine.generate(PROMPTS[0], ref, sampling)) == [first]
        for step in range(7, 7 + KEEP_VERSIONS):
            assert folder.is_dir()
            learner.step()
            await publisher.publish(step, ["solver"])
            assert list(await engine.adapters("local")) == [publisher.versions["solver"]]
        assert not folder.exists()
        with pytest.raises(EngineError, match=ref.version):
            await engine.generate(PROMPTS[0], ref, sampling)

    with_engine(model, work)


def test_a_publish_waits_for_open_requests_of_the_old_version(model: Path, tmp_path: Path):
    adapters = adapters_on(model, policies=["solver"])
    learner = Learner(adapters, 1e-3)

    async def work(engine: TransformersEngine) -> None:
        publisher = Publisher(tmp_path, adapters, engine)
        old = (await publisher.publish(0, ["solver"]))["solver"]
        talking = asyncio.create_task(
            engine.generate(PROMPTS[0], ModelRef("solver", old), Sampling(max_tokens=40, seed=1))
        )
        await asyncio.sleep(0)
        learner.step()
        new = (await publisher.publish(1, ["solver"]))["solver"]
        assert talking.done() and talking.result()[0].version == old
        assert list(await engine.adapters("local")) == [new]

    with_engine(model, work)


def test_what_a_killed_process_left_behind_goes_as_if_it_had_been_retired(
    model: Path, tmp_path: Path
):
    """Half-written versions and twins at once, versions one by one; other policies' and other
    people's folders stay."""
    adapters = adapters_on(model, policies=["solver"])
    learner = Learner(adapters, 1e-3)
    left = [f"solver-v{step}-0000000{step}" for step in range(1, 7)]
    others = ["critic-v1-00000000", "solver-old", "solver-v1-00000000-copy"]
    for name in [*left, *others, ".solver-v7-00000007", "solver-v6-00000006-twin-0123abcd"]:
        (tmp_path / name).mkdir()

    async def work(engine: TransformersEngine) -> None:
        publisher = Publisher(tmp_path, adapters, engine)
        earlier = (await publisher.publish(6, ["solver"]))["solver"]
        publisher.remove_leftovers()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            [*left[-KEEP_VERSIONS:], *others, earlier]
        )
        for step in (7, 8, 9, 10):
            learner.step()
            await publisher.publish(step, ["solver"])
        kept = sorted(path.name for path in tmp_path.iterdir() if path.name not in others)
        assert (
            len(kept) == KEEP_VERSIONS + 1
            and publisher.versions["solver"] in kept
            and not set(left) & set(kept)
        )

    with_engine(model, work)


def test_a_deletion_that_was_cut_off_leaves_no_half_version(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version's folder is whole or absent; what is left goes when the run is resumed."""
    adapters = adapters_on(model, policies=["solver"])
    names = [f"solver-v{step}-0000000{step}" for step in range(1, KEEP_VERSIONS + 2)]
    for name in names:
        (tmp_path / name).mkdir()
        for file in (WEIGHTS, "adapter_config.json"):
            (tmp_path / name / file).write_text(name)
    engine = ScriptedEngine(lambda prompt, ref, sampling, k: "")

    def cut_off(folder: Path, ignore_errors: bool = False) -> None:
        if folder.exists():
            (folder / WEIGHTS).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(publish.shutil, "rmtree", cut_off)
        with pytest.raises(KeyboardInterrupt):
            Publisher(tmp_path, adapters, engine).remove_leftovers()
    assert not (tmp_path / names[0]).exists()
    Publisher(tmp_path, adapters, engine).remove_leftovers()
    assert sorted(path.name for path in tmp_path.iterdir()) == names[1:]


def test_a_version_that_is_learnt_again_is_no_leftover(model: Path, tmp_path: Path):
    """Resumed from before it: the same adapter gets the folder that lies there, and keeps it while
    it is in force."""
    adapters = adapters_on(model, policies=["solver"])
    Learner(adapters, 1e-3).step()
    publish_it = lambda engine: Publisher(tmp_path, adapters, engine).publish(1, ["solver"])  # noqa: E731
    name = with_engine(model, publish_it)["solver"]
    for step in (
        2,
        3,
    ):  # with these as many as are kept, so that the next one retired pushes the oldest out
        (tmp_path / f"solver-v{step}-0000000{step}").mkdir()

    async def work(engine: TransformersEngine) -> None:
        publisher = Publisher(tmp_path, adapters, engine)
        publisher.remove_leftovers()
        assert (await publisher.publish(1, ["solver"]))["solver"] == name
        async with publisher.verifier._twin("solver", name, 2.0) as twin:
            assert (tmp_path / twin / WEIGHTS).is_file()
        assert (tmp_path / name / WEIGHTS).is_file()

    with_engine(model, work)


def test_versions_of_a_resumed_run_are_loaded_again(model: Path, tmp_path: Path):
    adapters = adapters_on(model, policies=["solver"])
    learner = Learner(adapters, 1e-3)

    async def before(engine: TransformersEngine) -> list[str]:
        publisher, names = Publisher(tmp_path, adapters, engine), []
        for step in (1, 2):
            learner.step()
            names.append((await publisher.publish(step, ["solver"]))["solver"])
        return names

    old, new = with_engine(model, before)

    async def after(engine: TransformersEngine) -> None:
        publisher = Publisher(tmp_path, adapters, engine, earlier={"solver": new})
        await publisher.publish(2, ["solver"])
        assert await publisher.reload("solver", old) and await publisher.reload("solver", new)
        assert set(await engine.adapters("local")) == {old, new}
        assert not await publisher.reload("solver", "solver-v0-00000000"), "its folder is gone"
        with publisher.hold({"solver": old}):
            learner.step()
            await publisher.publish(3, ["solver"])
            assert set(await engine.adapters("local")) == {old, publisher.versions["solver"]}
        shutil.copytree(tmp_path / old, tmp_path / "solver-v9-00000000")
        with pytest.raises(EngineError, match="its tensors were changed"):
            await publisher.reload("solver", "solver-v9-00000000")

    with_engine(model, after)


def test_nothing_of_ours_reloads_in_place():
    sources = [
        path
        for room in ("agents", "rollouts", "trainers", "recipes")
        for path in (ROOT / room).rglob("*.py")
    ]
    assert len(sources) > 50
    assert [str(path) for path in sources if "load_inplace" in path.read_text()] == []
