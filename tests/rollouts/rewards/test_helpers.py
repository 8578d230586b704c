"""Helpers of rewards: the settings that make each again, and judges that are bound to them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from marlora.agents.types import SettingError
from marlora.rollouts.rewards.builtin import exact, resolve_rewards
from marlora.rollouts.rewards.helpers import asked_helpers, helpers_of, served

OUTSIDE = {"url": "http://127.0.0.1:9/v1", "base": "m", "key_env": "HOME"}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"prompt": "Judge.", "role": "judge"},
        {"base": "another"},
        OUTSIDE,
        {**OUTSIDE, "price": {"currency": "EUR", "prompt": 1.0, "sampled": 2.0}},
        {"sampling": {"temperature": 0.5, "max_tokens": 9}},
    ],
)
def test_its_settings_make_it_again(given: dict[str, Any]) -> None:
    helper = helpers_of({"critic": given}, ())["critic"]
    written = json.loads(json.dumps(helper.settings()))
    assert helpers_of({"critic": written}, ())["critic"] == helper
    assert set(written) == set(given), "what is a default is not written"


def test_only_judges_of_helpers_are_bound_and_named() -> None:
    names = ["judge(critic)", "exact"]
    helpers = helpers_of({"critic": OUTSIDE, "proposer": {}}, ())
    loose = resolve_rewards(names)
    assert asked_helpers(loose) == {}, "nobody knows its model yet"
    bound = served(loose, helpers)
    assert asked_helpers(bound) == {"critic": helpers["critic"]} and bound[1] is exact
    assert asked_helpers(resolve_rewards("judge(http://127.0.0.1:9/v1, m)")) == {}
    assert served(loose, {}) == loose


def test_a_name_of_the_team_is_refused() -> None:
    with pytest.raises(SettingError, match=r"helpers\.a: the team has an agent or a policy of"):
        helpers_of({"a": {}}, {"a"})
