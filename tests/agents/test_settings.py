"""Settings: bounds at the field, one base class that checks them, help for the command line."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from dataclasses import dataclass, replace
from typing import Any

import pytest

from marlora.agents.settings import Settings, setting
from marlora.agents.types import SettingError


@dataclass
class Credit(Settings):
    """One mixin."""

    credit: str = setting("credit rule", "grpo", choices=("grpo", "rloo", "turn"))
    discount: float = setting("discount per turn", 1.0, at_least=0, at_most=1)
    clip: float | None = setting("None: no clip", None, above=0)

    def check(self) -> None:
        if self.credit != "turn" and self.discount != 1:
            raise SettingError(f"discount: {self.credit} has none")


@dataclass
class Limits(Settings):
    """Another mixin."""

    steps: int = setting("steps", 5, at_least=1)
    devices: int = setting("devices", 0, at_least=0, at_most=8)
    timeout: float = setting("timeout", 9.0, above=0, unit="seconds")
    patience: float = setting("patience", math.inf, at_least=0, finite=False)
    trackers: list[str] = setting("trackers", factory=list, choices={"wandb": 1, "mlflow": 2})
    offset: float = setting("any number", 0.0)
    flag: bool = setting("a flag", False)
    args: dict | str | None = setting("arguments", factory=dict)

    def prepare(self) -> None:
        self.args = dict(self.args or {})  # type: ignore[arg-type]

    def check(self) -> None:
        if self.steps > 100:
            raise SettingError("steps: too many")


@dataclass
class Both(Credit, Limits):
    """A config of two mixins and a check of its own."""

    def check(self) -> None:
        if self.credit == "rloo" and self.steps < 2:
            raise SettingError("steps: rloo needs 2")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"credit": "grop"},
            r"^credit: expected one of grpo, rloo, turn, got 'grop'; did you mean",
        ),
        ({"credit": "x"}, r"^credit: expected one of grpo, rloo, turn, got 'x'$"),
        ({"discount": 1.5}, r"^discount: expected a number from 0 to 1, got 1.5$"),
        ({"discount": math.nan}, r"^discount: expected a number from 0 to 1, got nan$"),
        ({"discount": "1"}, r"^discount: expected float, got '1'$"),
        ({"clip": 0.0}, r"^clip: expected a number above 0, got 0.0$"),
        ({"clip": -1}, r"^clip: expected a number above 0, got -1$"),
        ({"steps": 0}, r"^steps: expected at least 1, got 0$"),
        ({"steps": True}, r"^steps: expected int, got True$"),
        ({"devices": 9}, r"^devices: expected a whole number from 0 to 8, got 9$"),
        ({"timeout": 0.0}, r"^timeout: expected seconds above 0, got 0.0$"),
        ({"timeout": math.inf}, r"^timeout: expected seconds above 0, got inf$"),
        ({"patience": math.nan}, r"^patience: expected a number from 0, got nan$"),
        (
            {"trackers": ["wandb", "mlflw"]},
            r"^trackers: expected one of wandb, mlflow, got 'mlflw'",
        ),
        ({"trackers": [1]}, r"^trackers: expected list\[str\], got \[1\]$"),
        ({"offset": math.nan}, r"^offset: expected a number, got nan$"),
        ({"offset": -math.inf}, r"^offset: expected a number, got -inf$"),
        ({"flag": 1}, r"^flag: expected bool, got 1$"),
        # Every class of the MRO is asked, whatever the others define.
        ({"discount": 0.5}, r"^discount: grpo has none$"),
        ({"steps": 101}, r"^steps: too many$"),
        ({"credit": "rloo", "steps": 1}, r"^steps: rloo needs 2$"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_setting(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        Both(**values)


def test_a_keyword_that_is_no_setting_names_the_nearest() -> None:
    with pytest.raises(SettingError, match=r"^Both: unknown setting 'discont'; did you mean 'disc"):
        Both(discont=0.5)  # type: ignore[call-arg]
    with pytest.raises(SettingError, match="known: 'args', 'clip'"):
        replace(Both(), quixotic=1)  # type: ignore[call-arg]
    assert list(inspect.signature(Both).parameters)[:2] == ["steps", "devices"]
    given = Both(credit="turn", discount=0.5)
    kept = pickle.loads(pickle.dumps(copy.deepcopy(given)))
    assert kept == given


def test_values_within_their_bounds_are_taken_as_they_are() -> None:
    config = Both(credit="turn", discount=0, clip=None, trackers=["mlflow"], args=None)
    assert (config.discount, config.clip, config.patience) == (0, None, math.inf)
    assert config.args == {}


def test_a_wrong_value_of_a_setting_that_may_hold_a_key_is_not_shown() -> None:
    @dataclass
    class Keys(Settings):
        server_key: str = setting("key file", "")

    with pytest.raises(SettingError, match="not shown") as error:
        Keys(server_key=["sk-1"])  # type: ignore[arg-type]
    assert "sk-1" not in str(error.value)


def test_the_command_line_shows_help_and_choices() -> None:
    from transformers import HfArgumentParser

    parser = HfArgumentParser([Both])
    text = " ".join(parser.format_help().split())
    assert "credit rule" in text and "{grpo,rloo,turn}" in text and "{wandb,mlflow}" in text
    (config,) = parser.parse_args_into_dataclasses(args=["--credit", "rloo", "--steps", "3"])
    assert (config.credit, config.steps) == ("rloo", 3)
    with pytest.raises(SettingError, match=r"^credit: expected one of"):
        parser.parse_args_into_dataclasses(args=["--credit", "none"])
