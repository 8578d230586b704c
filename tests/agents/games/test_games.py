"""The two-player games: payoffs by hand, what a player is told, what the referee lets pass."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marlora.agents.games.base import Game, Illegal, Offer, message_of
from marlora.agents.games.exchange import Exchange
from marlora.agents.games.trade import Trade
from marlora.agents.games.ultimatum import Ultimatum
from marlora.agents.team import Team
from marlora.agents.testing import fake_team
from marlora.agents.types import Message, SettingError, Task
from tests.conformance import check_system

MONEY = Task("u", "Share 100 dollars.", meta={"total": 100})
LAMP = Task("t", "A lamp.", meta={"highest": 99, "own": [{"cost": 41}, {"value": 63}]})
NUTS = Task(
    "e",
    "Apples and nuts.",
    meta={
        "kinds": ["apples", "nuts"],
        "holdings": [[25, 5], [5, 25]],
        "own": [{"worth": [1, 733]}, {"worth": [877, 2]}],
    },
)
PLAYED: list[tuple[type[Game], Task]] = [(Ultimatum, MONEY), (Trade, LAMP), (Exchange, NUTS)]


def play(game: Game, task: Task, replies: list[str]) -> tuple[dict[str, Any], Team]:
    """The referee's record and the team; replies in the order in which they are asked for, the last
    one for ever."""
    queue = list(replies)
    team = fake_team(
        game.specs, lambda agent, messages: queue.pop(0) if len(queue) > 1 else queue[0]
    )
    return json.loads(asyncio.run(game.run(task.public(), team))), team


def told(team: Team, agent: str) -> str:
    return "\n".join(
        m.content
        for t in team.turns
        if t.agent == agent
        for m in t.messages
        if m.role != "assistant"
    )


# payoffs


def test_ultimatum_by_hand() -> None:
    record, _ = play(
        Ultimatum(["a", "b"]),
        MONEY,
        ["Move: offer 20", "Move: offer 55", "Move: offer 40", "Move: accept"],
    )
    assert record == {
        "players": ["a", "b"],
        "moves": [["a", "offer 20"], ["b", "offer 55"], ["a", "offer 40"], ["b", "accept"]],
        "refused": {"a": 0, "b": 0},
        "ended": "deal",
        "deal": ["a", 40],
        "payoffs": {"a": 60.0, "b": 40.0},
    }
    record, _ = play(Ultimatum(["a", "b"]), MONEY, ["20", "55", "accept"])
    assert record["payoffs"] == {"a": 55.0, "b": 45.0}, "b offered a 55 and keeps the rest"


def test_trade_by_hand() -> None:
    record, _ = play(
        Trade(["seller", "buyer"]),
        LAMP,
        ["Move: offer 70", "Move: offer 45", "Move: offer $52.", "Move: accept"],
    )
    assert record["payoffs"] == {"seller": 11.0, "buyer": 11.0}  # 52 - 41, 63 - 52
    record, _ = play(Trade(["seller", "buyer"]), LAMP, ["offer 30", "accept"])
    assert record["payoffs"] == {"seller": -11.0, "buyer": 33.0}, "a bad bargain is legal"


def test_exchange_by_hand() -> None:
    record, _ = play(
        Exchange(["a", "b"]), NUTS, ["Move: offer 3 apples for 2 nuts", "Move: accept"]
    )
    assert record["deal"] == ["a", 3, 0, 2, 1]
    assert record["payoffs"] == {"a": 2 * 733 - 3 * 1, "b": 3 * 877 - 2 * 2}
    record, _ = play(
        Exchange(["a", "b"]), NUTS, ["4 apples for 4 nuts", "offer 1 Nuts for 2 Apples", "accept"]
    )
    assert record["moves"][1] == ["b", "offer 1 nuts for 2 apples"]
    assert record["payoffs"] == {"a": 1 * 733 - 2 * 1, "b": 2 * 877 - 1 * 2}


def test_with_equal_worths_an_exchange_is_one_gains_what_the_other_loses() -> None:
    even = Task("e", "", meta={**NUTS.meta, "own": [{"worth": [1, 1]}, {"worth": [1, 1]}]})
    record, _ = play(Exchange(["a", "b"]), even, ["offer 3 apples for 8 nuts", "accept"])
    assert record["payoffs"] == {"a": 5.0, "b": -5.0}


@pytest.mark.parametrize(
    ("game", "task", "replies"),
    [
        (
            Ultimatum(["a", "b"]),
            MONEY,
            ["offer 40", "offer 60"],
        ),  # b would keep 40, which is what it is offered
        (Ultimatum(["a", "b"]), MONEY, ["offer 40", "offer 75"]),  # and here even less
        (Trade(["a", "b"]), LAMP, ["offer 50", "offer 50"]),
        (
            Trade(["a", "b"]),
            LAMP,
            ["offer 50", "offer 58"],
        ),  # a buyer who bids over the price pays the price
        (Trade(["a", "b"]), LAMP, ["offer 60", "offer 50", "offer 49"]),
        (Exchange(["a", "b"]), NUTS, ["3 apples for 2 nuts", "2 nuts for 3 apples"]),
        (Exchange(["a", "b"]), NUTS, ["3 apples for 2 nuts", "4 nuts for 1 apples"]),
    ],
)
def test_an_offer_that_asks_no_more_than_the_standing_one_gives_accepts_it(
    game: Game, task: Task, replies: list[str]
) -> None:
    by_accepting, _ = play(type(game)(game.agents), task, [*replies[:-1], "accept"])
    record, _ = play(game, task, replies)
    assert (
        record["ended"] == "deal"
        and record["payoffs"] == by_accepting["payoffs"]
        and record["deal"] == by_accepting["deal"]
    )


@pytest.mark.parametrize(
    ("replies", "ended", "moves"),
    [
        (["offer 1"] * 8, "moves", 8),
        (["offer 1", "reject"], "reject", 2),
        (["offer 1", "perhaps", "offer 101", "offer 99"], "illegal", 1),
        (["accept", "accept"], "illegal", 0),
    ],
)
def test_without_a_deal_nobody_has_anything(replies: list[str], ended: str, moves: int) -> None:
    record, team = play(Ultimatum(["a", "b"]), MONEY, replies)
    assert (record["ended"], len(record["moves"]), record["deal"]) == (ended, moves, None)
    assert record["payoffs"] == {"a": 0.0, "b": 0.0}
    assert len(team.turns) == moves + 2 * (ended == "illegal")


# what is said


def test_a_player_hears_the_message_and_the_offer_and_nothing_else() -> None:
    replies = [
        "They look poor.\nMessage: Take it or leave it!\nMove: offer 7",
        "Greedy.\nMessage: no\nMove: offer 50",
        "accept",
    ]
    _, team = play(Ultimatum(["a", "b"]), MONEY, replies)
    assert told(team, "b").endswith(
        "The other player says: Take it or leave it!\n\nThe other player's offer: 7\n\nYour move; 7"
        " moves are left."
    )
    assert (
        team.turns[2].messages[-1].content
        == "The other player says: no\n\nThe other player's offer: 50\n\nYour move; 6 moves are"
        " left."
    )
    assert "poor" not in told(team, "b") and "Greedy" not in told(team, "a")
    assert [turn.reads for turn in team.turns] == [(), (0,), (1,)]


def test_a_refused_move_is_told_to_its_player_only_and_does_not_count() -> None:
    record, team = play(
        Ultimatum(["a", "b"]), MONEY, ["offer 500", "Message: sorry\nMove: offer 50", "accept"]
    )
    assert record["refused"] == {"a": 1, "b": 0} and record["moves"] == [
        ["a", "offer 50"],
        ["b", "accept"],
    ]
    assert (
        team.turns[1].messages[-1].content
        == "The referee refuses this: expected a whole number from 0 to 100. Move again."
    )
    assert "500" not in told(team, "b") and team.turns[2].reads == (1,)


def test_nobody_is_told_what_only_the_other_knows() -> None:
    """Whatever is said, costs, values and worths of one player stand in no message to the other."""
    for game, task, secrets in (
        (Trade(["a", "b"]), LAMP, ({"41"}, {"63"})),
        (Exchange(["a", "b"]), NUTS, ({"733"}, {"877"})),
    ):
        for views in (
            {},
            {"a": "{prompt} {offer} {message} {left}", "b": "{prompt} {offer} {message} {left}"},
        ):
            game.views = views
            _, team = play(
                game,
                task,
                [
                    "Message: hm\nMove: 5",
                    "Message: hm\nMove: 3 apples for 1 nuts",
                    "Move: 7",
                    "what?",
                    "accept",
                ],
            )
            numbers = {agent: set(re.findall(r"\d+", told(team, agent))) for agent in "ab"}
            assert not numbers["a"] & secrets[1] and not numbers["b"] & secrets[0]
            assert views or secrets[0] <= numbers["a"]


def test_views_take_the_place_of_our_words() -> None:
    game = Trade(
        ["s", "b"], max_moves=3, views={"s": "{cost} {offer}", "b": "{value} {offer} {left}"}
    )
    _, team = play(game, LAMP, ["60", "50", "accept"])
    assert [turn.messages[-1].content for turn in team.turns] == ["41 -", "63 60 2", "41 50"]
    with pytest.raises(
        SettingError, match=r"views.s: unknown field \{value\} for task 't'; known: "
    ):
        play(Trade(["s", "b"], views={"s": "{value}"}), LAMP, ["60"])


@pytest.mark.parametrize(
    ("text", "move"),
    [
        ("Move: accept", "accept"),
        ("I could offer 9.\n**Move:** Offer 12.", 12),
        ("Move: offer 5\nNo, wait.\nMove: offer 6", 6),
        ("`$8`", 8),
        ("Message: I accept\nmove : reject", "reject"),
    ],
)
def test_moves_are_read(text: str, move: str | int) -> None:
    read = Trade(["s", "b"]).read(text, 1, Offer(0, (50,)), LAMP)
    assert read == (Offer(1, (move,)) if isinstance(move, int) else move)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "100",
        "-1",
        "4.5",
        "offer",
        "Move: offer ٣",
        "yes\nno",
        "Move: accept that",
        "10000000000",
    ],
)
def test_other_replies_are_refused(text: str) -> None:
    with pytest.raises(Illegal):
        Trade(["s", "b"]).read(text, 1, Offer(0, (50,)), LAMP)


def test_the_last_message_of_a_reply_counts() -> None:
    assert message_of("Message: one\nMessage:  two \nMove: 3") == "two"
    assert message_of("Move: 3") == ""


# the referee lets nothing illegal pass

NUMBERS = st.integers(-3, 130).map(str)
LEGAL_LOOKING = st.one_of(
    st.sampled_from(
        [
            "accept",
            "reject",
            "Move: accept",
            "Message: hello\nMove: reject",
            "offer",
            "Move:",
            "",
            "\n\n",
        ]
    ),
    NUMBERS,
    NUMBERS.map("Move: offer {}".format),
    st.tuples(
        NUMBERS,
        st.sampled_from(["apples", "nuts", "Apples", "pears"]),
        NUMBERS,
        st.sampled_from(["apples", "nuts"]),
    ).map(lambda t: "Move: offer {} {} for {} {}".format(*t)),
    st.text(max_size=30),
)


def legal(task: Task, seat: int, move: str, standing: str | None) -> bool:
    """The rules once more, by other means: on the spelling of a move."""
    if move in ("accept", "reject"):
        return move == "reject" or standing is not None
    words = move.removeprefix("offer ").split(" ")
    if "holdings" not in task.meta:
        return len(words) == 1 and 0 <= int(words[0]) <= task.meta.get(
            "total", task.meta.get("highest", -1)
        )
    mine, theirs = (
        dict(zip(("apples", "nuts"), task.meta["holdings"][s], strict=True))
        for s in (seat, 1 - seat)
    )
    given, kind, _, wanted, other = words
    return kind != other and 0 <= int(given) <= mine[kind] and 0 <= int(wanted) <= theirs[other]


@settings(max_examples=300, deadline=None)
@given(
    number=st.integers(0, 2),
    replies=st.lists(LEGAL_LOOKING, min_size=1, max_size=14),
    refusals=st.integers(0, 2),
)
def test_no_illegal_move_passes(number: int, replies: list[str], refusals: int) -> None:
    game, task = PLAYED[number]
    record, team = play(game(["a", "b"], refusals=refusals), task, [*replies, "no move"])
    standing = None
    for at, (player, move) in enumerate(record["moves"]):
        assert player == "ab"[at % 2] and at < 8
        assert legal(task, at % 2, move, standing), (standing, move)
        standing = move
    assert sum(record["refused"].values()) + len(record["moves"]) == len(team.turns)
    assert max(record["refused"].values()) <= (refusals + 1) * 4
    one, two = record["payoffs"].values()
    if record["ended"] != "deal":
        assert record["deal"] is None and (one, two) == (0.0, 0.0)
    elif game is Ultimatum:
        assert one + two == 100 and min(one, two) >= 0
    elif game is Trade:
        assert one + two == 63 - 41


# systems


@pytest.mark.parametrize("number", range(3))
def test_games_conform(number: int) -> None:
    game, task = PLAYED[number]
    offers = (
        ["offer 12", "offer 17"]
        if number < 2
        else ["offer 3 apples for 9 nuts", "offer 4 nuts for 9 apples"]
    )

    def haggling(agent: str, messages: tuple[Message, ...], marker: str) -> str:
        return f"Hm.\nMessage: {marker}\nMove: {offers[agent == 'b']}"

    check_system(game(["a", "b"]), [task], haggling)
    check_system(game(["a", "b"], refusals=0), [task])  # a number of ten digits is no legal move


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"agents": ["a"]}, "two agents expected"),
        ({"agents": ["a", "b"], "max_moves": 0}, "max_moves: expected at least 1"),
        ({"agents": ["a", "b"], "views": {"c": ""}}, "views.c: no such player; known: 'a', 'b'"),
        ({"agents": ["a", "b"], "views": {"a": "{"}}, "views.a: unpaired"),
        ({"agents": ["a", "b"], "views": {"a": 3}}, "views.a: expected a template"),
    ],
)
def test_wrong_settings_are_named(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        Trade(**arguments)


@pytest.mark.parametrize("number", range(3))
def test_a_task_of_another_kind_is_named(number: int) -> None:
    game, _ = PLAYED[number]
    with pytest.raises(
        SettingError, match=f"task 'sum': its meta has no .*which {game.__name__} is played with"
    ):
        play(game(["a", "b"]), Task("sum", "1+1"), ["1"])
