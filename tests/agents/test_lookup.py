"""Names in settings: the paths of 0.1 stay valid and trusted."""

from __future__ import annotations

import warnings

import pytest

from marlora.agents.lookup import RENAMED, is_trusted, load_function, object_named, only_trusted
from marlora.agents.system import build_system, system_class
from marlora.agents.types import SettingError

# Every `marlora...:Name` of the YAML files, README and documents of 0.1 that a setting can hold.
NAMES = (
    ("system", "marlora.agents.actor_critic:ActorCritic"),
    ("system", "marlora.agents.chain:Chain"),
    ("system", "marlora.agents.collaboration:Collaboration"),
    ("system", "marlora.agents.debate:Debate"),
    ("system", "marlora.agents.flowreasoner:FlowReasoner"),
    ("system", "marlora.agents.games.trade:Trade"),
    ("system", "marlora.agents.games.ultimatum:Ultimatum"),
    ("system", "marlora.agents.workflow:Workflow"),
    ("system", "marlora.rollouts.own_programs:Command"),
    ("system", "marlora.rollouts.own_programs:Function"),
    ("main", "marlora.recipes.programs.openai_roles:main"),
    ("reward", "marlora.rollouts.actor_critic:roles"),
    ("reward", "marlora.rollouts.games:first_payoff"),
    ("reward", "marlora.rollouts.games:payoff"),
    ("reward", "marlora.rollouts.games:won"),
    ("tasks", "marlora.rollouts.games:trade"),
    ("tasks", "marlora.rollouts.games:ultimatum"),
    ("tasks", "marlora.trainers.tiny:tiny_tasks"),
    ("tasks", "marlora.trainers.tiny_pair:pair_tasks"),
    ("tasks", "marlora.trainers.tiny_programs:program_tasks"),
    ("tasks", "marlora.trainers.tiny_talk:digit_tasks"),
    ("verifier", "marlora.trainers.verifier:learned"),
)
# What an unread checkpoint of 0.1 may use: systems, task sets and rewards that only compute.
TRUSTED = (
    *((kind, name) for kind, name in NAMES if "own_programs" not in name and kind != "main"),
    ("system", "marlora.agents.repair:Repair"),
    ("system", "marlora.agents.vote:Vote"),
    ("system", "marlora.agents.games.exchange:Exchange"),
    ("reward", "marlora.rollouts.games:deal"),
    ("reward", "marlora.rollouts.games:second_payoff"),
    ("tasks", "marlora.rollouts.games:exchange"),
)


def test_the_table_has_no_chain_and_no_current_name() -> None:
    assert not set(RENAMED) & set(RENAMED.values())


@pytest.mark.parametrize("name", RENAMED)
def test_every_old_name_means_an_object_and_warns_of_its_new_name(name: str) -> None:
    with pytest.warns(FutureWarning) as caught:
        item = object_named("name", name)
    assert f"{name} is now {RENAMED[name]}" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert object_named("name", RENAMED[name]) is item


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_every_name_of_the_files_of_0_1_can_be_used(kind: str, name: str) -> None:
    if kind == "system":
        assert system_class(name).__name__ == name.partition(":")[2]
    elif kind == "main":
        pytest.importorskip("openai")
        assert load_function(kind, name, {}).__name__ == "main"
    else:
        assert callable(load_function(kind, name, {}))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("kind", "name"), TRUSTED)
def test_a_trusted_name_stays_trusted_under_its_old_path(kind: str, name: str) -> None:
    mark = "verifier maker" if kind == "verifier" else kind
    assert is_trusted(mark, object_named(kind, name))
    if kind != "verifier":
        with only_trusted():
            object_named(kind, name)


@pytest.mark.parametrize(
    "name", ["marlora.rollouts.own_programs:Command", "marlora.rollouts.own_programs:Function"]
)
def test_what_was_never_trusted_is_not_trusted_now(name: str) -> None:
    with (
        only_trusted(),
        pytest.warns(FutureWarning),
        pytest.raises(SettingError, match="trust_checkpoint"),
    ):
        system_class(name)


def test_an_old_path_that_is_not_in_the_table_names_nothing() -> None:
    with pytest.raises(SettingError, match=r"marlora\.agents\.chain:json.*cannot be imported"):
        object_named("system", "marlora.agents.chain:json")


def test_a_maker_is_found_by_its_old_name() -> None:
    with (
        pytest.warns(FutureWarning, match="verifier:trained"),
        pytest.raises(SettingError, match="nowhere"),
    ):
        load_function("verifier", "marlora.trainers.verifier:learned(nowhere)", {})


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_system_is_built_from_an_old_path() -> None:
    settings = {"class": "marlora.agents.debate:Debate", "agents": ["a", "b"], "rounds": 3}
    system = build_system(settings)
    assert type(system).__module__ == "marlora.agents.patterns.debate"
    assert system.arguments()["rounds"] == 3
