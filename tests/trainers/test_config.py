"""Configs are mixins: shallow, none a method's inheriting another method's, every field checked."""

import dataclasses
import importlib

import pytest

from marlora.agents.settings import Settings
from marlora.trainers.config import RunConfig
from tests.repository import ROOT

METHODS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "trainers" / "methods").rglob("*.py"))
]


def config_classes() -> list[type[Settings]]:
    modules = [importlib.import_module(f"marlora.{name}") for name in METHODS]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Settings)
        and value.__module__ == module.__name__
    ]


def depth(cls: type) -> int:
    """How many classes stand between this one and `Settings`."""
    return 1 + max(
        (depth(base) for base in cls.__bases__ if base not in (object, Settings)), default=-1
    )


@pytest.mark.parametrize("cls", config_classes(), ids=lambda cls: cls.__name__)
def test_configs_are_mixins_of_depth_two_at_most(cls: type[Settings]) -> None:
    assert depth(cls) <= 2
    runs = [base for base in cls.__mro__[1:] if issubclass(base, RunConfig)]
    assert runs in ([], [RunConfig]), "a method's config inherits no other method's"
    assert all("__post_init__" not in vars(c) for c in cls.__mro__ if c is not Settings)


@pytest.mark.parametrize("cls", config_classes(), ids=lambda cls: cls.__name__)
def test_every_setting_has_a_line_of_help(cls: type[Settings]) -> None:
    assert all(f.metadata.get("help") for f in dataclasses.fields(cls))  # type: ignore[arg-type]


def test_the_mixins_of_a_run_share_no_setting() -> None:
    names = [f.name for base in RunConfig.__bases__ for f in dataclasses.fields(base)]
    assert len(names) == len(set(names)) == len(dataclasses.fields(RunConfig))


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", {1: 0.5, 2: 1.0, 3: 1.0, 10: 1.0}),
        ("linear", {1: 0.5, 2: 1.0, 3: 1.0, 7: 0.5, 10: 0.125}),
        ("cosine", {1: 0.5, 2: 1.0, 3: 1.0, 7: 0.5, 5: 0.85355339}),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(
    schedule: str, rates: dict[int, float]
) -> None:
    """Two steps of warm-up, then the share of the other eight steps that lies behind."""
    config = RunConfig(lr_scheduler_type=schedule, warmup_steps=2, max_steps=10)
    for step, rate in rates.items():
        assert config.learning_rate_at(step, 1.0) == pytest.approx(rate), step
