"""Bases with and without weights: the same adapters, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.types import AdapterSpec, PolicySpec, SettingError
from marlora.trainers.config import RunConfig
from marlora.trainers.model import adapter_files
from marlora.trainers.testbeds.tiny import tiny_random_model
from marlora.trainers.update import learner_base
from marlora.trainers.update.learner_base import LearnerBase, frozen_base, load_base, trained_bases
from marlora.trainers.update.scalar_heads import HeadSpec

SHAPE = AdapterSpec(4, 8.0, ("q_proj", "v_proj"))
CPU = torch.device("cpu")


def both(model: Path, *policies: PolicySpec) -> tuple[LearnerBase, LearnerBase]:
    config = RunConfig(model=str(model), seed=5)
    return (
        load_base(str(model), policies, config, CPU),
        frozen_base(str(model), policies, config, CPU),
    )


def saved(base: LearnerBase, policy: str, folder: Path) -> Path:
    """A folder whose adapter has moved away from its beginning."""
    with torch.no_grad():
        for number, parameter in enumerate(base.adapters.parameters(policy).values()):
            parameter.add_(0.01 * (number + 1))
    return base.adapters.save(policy, folder)


def test_a_base_is_loaded_where_a_policy_or_a_head_learns() -> None:
    frozen, learning = PolicySpec("f", trainable=False), PolicySpec("l")
    groups = {"m": [PolicySpec("base")], "n": [frozen], "o": [frozen, learning]}
    assert trained_bases(groups, (), "m") == {"o"}
    assert trained_bases(groups, [HeadSpec("critic", adapter=SHAPE)], "m") == {"m", "o"}
    head = HeadSpec("critic", adapter=SHAPE, base="n")
    assert trained_bases(groups, [head], "m") == {"n", "o"}
    away = HeadSpec("critic", adapter=SHAPE, base="x")
    with pytest.raises(SettingError, match=r"head 'critic' on base 'x'.*expected one of m, n, o"):
        trained_bases(groups, [away], "m")
    with pytest.raises(SettingError, match=r"head 'critic' on base ''.*all are outside models"):
        trained_bases({}, [HeadSpec("critic", adapter=SHAPE)], "")


def test_a_fresh_adapter_is_the_same_without_weights(model: Path, tmp_path: Path) -> None:
    loaded, frozen = both(model, PolicySpec("a", adapter=SHAPE, trainable=False))
    assert (loaded.weightless, frozen.weightless) == (False, True)
    assert loaded.adapters.sha256("a") == frozen.adapters.sha256("a")
    assert not frozen.adapters.is_trained("a") and frozen.optimizers.of == {}
    assert loaded.tokens.template_hash == frozen.tokens.template_hash
    one = loaded.adapters.save("a", tmp_path / "one")
    two = frozen.adapters.save("a", tmp_path / "two")
    config = adapter_files.CONFIG
    assert (one / config).read_bytes() == (two / config).read_bytes()
    kept = adapter_files.read_adapter(two, "it")
    assert set(kept.meta) == {"format", "policy"}, "nobody has looked at the base's weights"


def test_an_adapter_read_is_written_as_it_was(model: Path, tmp_path: Path) -> None:
    loaded, _ = both(model, PolicySpec("a", adapter=SHAPE))
    folder = saved(loaded, "a", tmp_path / "one")
    spec = PolicySpec("a", adapter=SHAPE, trainable=False, init=str(folder))
    frozen = frozen_base(str(model), [spec], RunConfig(model=str(model)), CPU)
    assert frozen.adapters.is_trained("a")
    assert frozen.adapters.sha256("a") == loaded.adapters.sha256("a")
    again = frozen.adapters.save("a", tmp_path / "two")
    for file in (adapter_files.CONFIG, adapter_files.WEIGHTS):
        assert (folder / file).read_bytes() == (again / file).read_bytes()


def test_a_restarted_adapter_forgets_whose_base_its_file_named(model: Path, tmp_path: Path) -> None:
    loaded, frozen = both(model, PolicySpec("a", adapter=SHAPE, trainable=False))
    frozen.adapters.load("a", saved(loaded, "a", tmp_path / "one"))
    assert (
        "base_sha256"
        in adapter_files.read_adapter(frozen.adapters.save("a", tmp_path / "two"), "it").meta
    )
    frozen.adapters.restart("a")
    kept = adapter_files.read_adapter(frozen.adapters.save("a", tmp_path / "three"), "it")
    assert set(kept.meta) == {"format", "policy"} and not frozen.adapters.is_trained("a")


def test_a_copy_takes_every_tensor_of_one_policy(model: Path, tmp_path: Path) -> None:
    specs = [PolicySpec(name, adapter=SHAPE, trainable=False) for name in ("a", "b")]
    loaded, frozen = both(model, *specs)
    before = loaded.adapters.sha256("b")
    saved(frozen, "a", tmp_path / "moved")
    loaded.adapters.copy("a", frozen.adapters)
    assert loaded.adapters.sha256("a") == frozen.adapters.sha256("a")
    assert loaded.adapters.sha256("b") == before


def test_another_base_is_refused_by_its_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    real = learner_base._read_weights

    def counted(name: str, *rest: Any) -> Any:
        reads.append(name)
        return real(name, *rest)

    loaded, _ = both(model, PolicySpec("a", adapter=SHAPE))
    folder = saved(loaded, "a", tmp_path / "one")
    monkeypatch.setattr(learner_base, "_read_weights", counted)
    spec = PolicySpec("a", adapter=SHAPE, trainable=False, init=str(folder))
    frozen_base(str(model), [spec], RunConfig(model=str(model)), CPU)
    assert reads == [], "it names this base"
    other = str(tiny_random_model(tmp_path / "other", seed=9))
    with pytest.raises(SettingError, match="whose weights differ"):
        frozen_base(other, [spec], RunConfig(model=other), CPU)
    assert reads == [other]


def test_what_does_not_fit_is_refused_as_on_a_loaded_base(model: Path, tmp_path: Path) -> None:
    loaded, _ = both(model, PolicySpec("a", adapter=SHAPE))
    folder = saved(loaded, "a", tmp_path / "one")
    config = RunConfig(model=str(model))

    def refused(shape: AdapterSpec, words: str) -> None:
        spec = PolicySpec("a", adapter=shape, trainable=False, init=str(folder))
        for make in (frozen_base, load_base):
            with pytest.raises(SettingError, match=words):
                make(str(model), [spec], config, CPU)

    refused(AdapterSpec(2, 8.0, SHAPE.targets), "r is 4, the policy says 2")
    refused(AdapterSpec(4, 8.0, ("q_proj",)), "tensors differ in name")
    refused(AdapterSpec(4, 8.0, ("nothing",)), "is not a linear layer")
    data = json.loads((folder / adapter_files.CONFIG).read_text(encoding="utf-8"))
    text = json.dumps(data | {"use_dora": True})
    (folder / adapter_files.CONFIG).write_text(text, encoding="utf-8")
    refused(SHAPE, "use_dora=True: expected a plain LoRA")


def test_without_adapters_not_even_shapes_are_read(tmp_path: Path, model: Path) -> None:
    config = RunConfig(model=str(model))
    bare = frozen_base(str(model), [PolicySpec("base")], config, CPU)
    assert bare.policies == () and list(bare.adapters.model.parameters()) == []
    assert bare.tokens.show([7]) == load_base(str(model), [], config, CPU).tokens.show([7])
