import asyncio
import json
import math
import os
import signal
import sys
import threading

import numpy
import pytest

from marlora.agents.types import Reward, SettingError, Task, Turn
from marlora.rollouts.json_values import plain
from marlora.rollouts.rewards import math_check
from marlora.rollouts.rewards.builtin import (
    REWARDS,
    correct,
    exact,
    format_ok,
    graded,
    length,
    per_turn,
    resolve_rewards,
    reward_name,
)
from marlora.rollouts.rewards.scoring import score
from marlora.rollouts.sandbox.scorer import unplain
from marlora.rollouts.tasks.registry import load_tasks
from marlora.rollouts.types import Episode


def task(answer):
    return Task("t", "?", answer)


def said(output, *texts):
    """An episode with this output, in which `a`, `b`, ... said these texts."""
    turns = tuple(
        Turn(i, "abc"[i], text=text, token_ids=(1,) * len(text)) for i, text in enumerate(texts)
    )
    return Episode("e", "g", task(None), turns=turns, output=output)


def scored(rewards, output="4", answer="4", *texts):
    return asyncio.run(score(task(answer), said(output, *texts), rewards))


def is_correct(answer, output):
    return asyncio.run(correct(task(answer), said(output))).value


# correct


@pytest.mark.parametrize(
    ("answer", "output", "value"),
    [
        ("4", "4", 1),
        (4, "2 + 2 is 4.", 1),  # the last number, where a number is asked for
        ("4", "4 or 5", 0),
        ("1000", "Answer: 1,000", 1),
        ("1000", "#### 1000.0", 1),
        ("1/2", r"so \boxed{\frac{2}{4}}", 1),
        ("0.5", "Answer: 1/2", 1),
        (r"\frac{1}{3}", r"\boxed{0.3}", 0),
        ("x+1", "Answer: 1 + x", 1),
        (r"2\sqrt{2}", r"\boxed{\sqrt{8}}", 1),
        ("(1,2)", r"\boxed{(1, 2)}", 1),
        ("Paris", "Answer: paris", 1),
        ("Paris", "Paris", 1),
        ("Paris", "Pairs", 0),  # math-verify would read both as the product a i p r s
        ("Paris", "The 3 best towns", 0),
        (r"\text{Monday}", "Answer: Monday", 1),
        (["no", "none"], "None", 1),
        ("4", "", 0),
        ("4", None, 0),
        ("4", "no idea", 0),
    ],
)
def test_correct(answer, output, value):
    assert is_correct(answer, output) == value


def test_an_answer_that_cannot_be_compared_in_time_is_wrong_and_said_again_costs_nothing(
    monkeypatch,
):
    math_check._math._slow.clear()
    monkeypatch.setattr(math_check._math, "timeout", 0.5)
    bomb = said(r"\boxed{9^{9^{9^{9}}}}")
    first = asyncio.run(correct(task("3"), bomb))
    assert first.value == 0.0 and "not compared within 0.5 s" in first.text
    monkeypatch.setattr(math_check._math, "_ask", None)  # nobody is asked a second time
    assert asyncio.run(correct(task("3"), bomb)) == first


def test_a_checker_works_in_threads_starts_again_and_is_gone_at_stop():
    def in_thread(found):
        found.append(asyncio.run(math_check.equal("x+1", "1+x")))

    found = []
    thread = threading.Thread(
        target=in_thread, args=(found,)
    )  # where math-verify's own time-out raises
    thread.start()
    thread.join()
    child = math_check._math._scorer.process
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    in_thread(found)
    assert found == [True, True] and math_check._math._scorer.process.pid != child.pid
    last = math_check._math._scorer.process
    math_check._math.stop()
    assert last.poll() is not None


@pytest.mark.slow
def test_a_checker_that_dies_at_work_is_an_error_and_the_next_answer_is_compared():
    async def both():
        await math_check.equal("x", "y")
        dying = asyncio.create_task(math_check.equal("3", "9^{9^{9^{9}}}"))
        await asyncio.sleep(0.2)
        os.kill(math_check._math._scorer.process.pid, signal.SIGKILL)
        with pytest.raises(math_check.CheckerError, match="the math checker ended"):
            await dying
        return await math_check.equal("x+1", "1+x")

    math_check._math._slow.clear()
    assert asyncio.run(both())


def test_python_values_survive_the_way_to_the_checker():
    value = {"a": (1, [2, (3.5, None)]), 7: {(1, 2): {"x"}}, "b": True}
    assert unplain(json.loads(json.dumps(plain(value)))) == value


@pytest.mark.slow
def test_tasks_of_reasoning_gym_are_scored_by_their_set():
    pytest.importorskip("reasoning_gym")
    (one,) = load_tasks("reasoning-gym:countdown", limit=1)

    async def all_of(*outputs):
        return [(await correct(one, said(o)), await graded(one, said(o))) for o in outputs]

    right, boxed, wrong, nothing = asyncio.run(
        all_of(one.answer, rf"I get \boxed{{{one.answer}}}", "1 + 1", "")
    )
    assert [r.value for r in (*right, *boxed)] == [1, 1, 1, 1]
    assert wrong[0].value == 0 and 0 < wrong[1].value < 1 and nothing[1].value == 0


@pytest.mark.slow
def test_every_set_of_reasoning_gym_accepts_its_own_answer():
    pytest.importorskip("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    async def own_answers():
        low = {}
        for name in sorted(
            set(DATASETS) - {"composite"}
        ):  # composite is made of others, named in its settings
            (one,) = load_tasks(f"reasoning-gym:{name}", limit=1)
            if one.answer is not None:
                reward = await graded(one, said(one.answer))
                low |= {name: reward} if reward.value < 1 else {}
        return low

    assert asyncio.run(own_answers()) == {}


# the other rewards


def test_exact_format_and_length():
    assert [exact(task("4"), said(o)) for o in (" 4\n", "4.0", None)] == [1.0, 0.0, 0.0]
    texts = (r"\boxed{4}", "Answer: 4", "The final answer is: 4", "#### 4", "4", "I answer 4", "")
    assert [format_ok(task("4"), said("4", text)).value for text in texts] == [1, 1, 1, 1, 0, 0, 0]
    assert (
        format_ok(task("4"), said("4")).value == 0.0
        and format_ok(task("4"), said("4", "Answer: 1", "4")).value == 0.0
    )
    assert length(task("4"), said("4", "12345", "678")) == -0.008


def test_rewards_of_turns():
    async def brevity(one, turn):
        return 1.0 / len(turn.text)

    found = scored([per_turn(brevity, "brief")], "4", "4", "yes", "y")
    assert [(r.name, r.value, r.agent, r.turn) for r in found] == [
        ("brief", 1 / 3, "a", 0),
        ("brief", 1.0, "b", 1),
    ]


# scoring


def test_what_a_reward_may_return():
    async def later(one, episode):
        return 0.5

    def two(one, episode):
        return [Reward("x", 1), Reward("y", 2, agent="a")]

    def flag(one, episode):
        return True

    def scalar(one, episode):
        return numpy.bool_(True)

    found = scored([later, two, flag, scalar])
    assert found == (
        Reward("later", 0.5),
        Reward("x", 1.0),
        Reward("y", 2.0, agent="a"),
        Reward("flag", 1.0),
        Reward("scalar", 1.0),
    )
    assert all(type(r.value) is float for r in found)


def raises(one, episode):
    raise KeyError("gone")


async def raises_later(one, episode):
    raise OSError("no judge")


def nothing(one, episode):
    return None


def text(one, episode):
    return "good"


def mixed(one, episode):
    return [Reward("x", 1.0), 2.0]


def not_a_number(one, episode):
    return Reward("quality", math.nan, "why")


def infinite(one, episode):
    return -math.inf


@pytest.mark.parametrize(
    ("reward", "name", "told"),
    [
        (raises, "raises", "reward 'raises' failed: KeyError: 'gone'"),
        (raises_later, "raises_later", "reward 'raises_later' failed: OSError: no judge"),
        (
            nothing,
            "nothing",
            (
                "reward 'nothing' failed: TypeError: expected a Reward, several, a number or a"
                " bool, got None"
            ),
        ),
        (text, "text", "got 'good'"),
        (mixed, "mixed", "expected a Reward, several, a number or a bool, got [Reward("),
        (not_a_number, "quality", "reward 'not_a_number' gave nan: why"),
        (infinite, "infinite", "reward 'infinite' gave -inf"),
        (
            graded,
            "graded",
            "reward 'graded' failed: ValueError: task 't' is not of a reasoning-gym set",
        ),
        (correct, "correct", "reward 'correct' failed: ValueError: task 't' has no answer"),
    ],
)
def test_a_reward_that_fails_makes_the_episode_unscorable_and_says_why(reward, name, told):
    answer = None if reward is correct else "4"
    bad, good = scored([reward, length], answer=answer)
    assert bad.name == name and math.isnan(bad.value) and told in bad.text
    assert good == Reward("length", -0.0)  # the others still count, so nothing is lost


def test_every_turn_is_compared_with_the_answer_or_given_to_a_verifier():
    one, episode = Task("t", "2+2", "4"), said("4", "4", "it is 5", "Answer: 4")
    rewards = asyncio.run(score(one, episode, resolve_rewards(["right", "verified(calculator)"])))
    told = [(r.name, r.agent, r.turn, r.value) for r in rewards]
    values = [("a", 0, 1.0), ("b", 1, 0.0), ("c", 2, 1.0)]
    assert told == [("right", *v) for v in values] + [("verifier", *v) for v in values]
    assert math.isnan(episode.reward())  # none of them is the team's
    (blind,) = asyncio.run(
        score(Task("t", "Who?", "4"), said("4", "4"), resolve_rewards("verified(calculator)"))
    )
    assert math.isnan(blind.value) and "no arithmetic expression" in blind.text


def test_a_made_reward_has_a_name_that_makes_it_again():
    name = reward_name(resolve_rewards("verified(calculator)")[0])
    assert name == "marlora.rollouts.rewards.builtin:verified(calculator)"
    assert reward_name(resolve_rewards(name)[0]) == name
    with pytest.raises(SettingError, match="verifier 'calc': no such verifier"):
        resolve_rewards("verified(calc)")
    with pytest.raises(SettingError, match=r"reward 'verified': expected brackets.*\(VERIFIER\)"):
        resolve_rewards(["correct", "verified"])


def test_cancelling_is_not_a_failure_of_the_reward():
    async def hangs(one, episode):
        await asyncio.sleep(60)

    async def cancelled():
        running = asyncio.create_task(score(task("4"), said("4"), [hangs]))
        await asyncio.sleep(0)
        running.cancel()
        await running

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())


def test_names_from_settings(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_rewards", sys.modules[__name__])
    assert resolve_rewards(["correct", "my_rewards:text", infinite]) == [correct, text, infinite]
    assert {name: fn.__name__ for name, fn in REWARDS.items()} == {name: name for name in REWARDS}
    for name, message in (
        ("corect", "reward 'corect': no such reward; did you mean 'correct'"),
        ("my_rewards:absent", "cannot be imported"),
        ("my_rewards:REWARDS", "expected a function, found a dict"),
    ):
        with pytest.raises(SettingError, match=message):
            resolve_rewards([name])
