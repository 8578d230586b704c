"""Demonstrations from turns: which are taken, in which sets they stand, and what the sheet of DSPy
says of their numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from marlora.agents.types import Message, SettingError, Task, Turn
from marlora.rollouts.types import Episode
from marlora.trainers.methods.prompts.bootstrapping.demos import (
    Demo,
    Demos,
    DemoSets,
    DemoTemplate,
    bootstrap_sets,
    candidate_name,
    candidate_numbers,
    demo_values,
    demos_of,
    drawn_size,
    drawn_tasks,
    one_call,
    without_task,
    worked_example,
)

TASKS = [Task(f"t{n}", f"question {n}", f"answer {n}") for n in range(20)]
SYSTEM, ASKED, SAID = Message("system", "s"), Message("user", "shown"), Message("assistant", "so")


def chat(*texts: str) -> tuple[Message, ...]:
    return tuple(
        Message("assistant" if n % 2 else "user", text)  # type: ignore[arg-type]
        for n, text in enumerate(texts)
    )


def made(*tasks: int, agent: str = "a") -> list[Demos]:
    """Bootstrapped demonstrations of these tasks."""
    return [{agent: Demo(TASKS[n].id, TASKS[n].prompt, chat(f"q{n}", f"b{n}"))} for n in tasks]


# from a turn


def test_a_demonstration_is_the_chat_after_the_opening_and_the_answer() -> None:
    opening = (SYSTEM, ASKED, SAID)
    turn = Turn(0, "a", (*opening, *chat("q")), text="r")
    assert worked_example(turn, opening) == chat("q", "r")
    longer = Turn(1, "a", (*opening, *chat("q", "r", "again")), text="r2")
    assert worked_example(longer, opening) == chat("q", "r", "again", "r2")
    assert worked_example(Turn(0, "a", chat("q"), text="r"), ()) == chat("q", "r")


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ((SYSTEM, *chat("q")), "  "),  # an empty answer
        ((SYSTEM, *chat("q", "r")), "x"),  # ends with the agent's own words
        ((SYSTEM, Message("tool", "q")), "x"),  # no user
        ((SYSTEM,), "x"),
        ((SYSTEM, ASKED, SAID, *chat("x: shown")), "so"),  # its task stood in the opening
    ],
)
def test_what_is_no_worked_example_is_left_out(messages: tuple[Message, ...], text: str) -> None:
    opening = tuple(m for m in messages if m in (SYSTEM, ASKED, SAID))
    assert worked_example(Turn(0, "a", messages, text=text), opening, "shown") is None
    same_question = Turn(0, "a", (SYSTEM, ASKED, SAID, *chat("shown")), text="so")
    assert worked_example(same_question, (SYSTEM, ASKED, SAID), "another task") is not None


def test_an_agent_called_three_times_gives_one_demonstration() -> None:
    """Fact 7: one for few-shot (and three lessons for fine-tuning, see test_bootstrap_finetune)."""
    turns = tuple(Turn(n, "a", chat(f"q{n}"), text=f"r{n}") for n in range(3))
    episode = Episode("e", "g", TASKS[0], turns=(*turns, Turn(3, "b", chat("q"), text="r")))
    kept = {("e", n, 0) for n in range(4)}
    found = demos_of(episode, kept, {})
    assert list(found) == ["a", "b"]
    assert found["a"].messages in [chat(f"q{n}", f"r{n}") for n in range(3)]
    assert found == demos_of(episode, kept, {}), "drawn by content, so always the same"
    assert demos_of(episode, {("e", 1, 0)}, {})["a"].messages == chat("q1", "r1")


def test_half_of_the_calls_drawn_are_the_last() -> None:
    """1/2 the last of three, 1/4 each of the two earlier: 2000 runs, four standard errors."""
    counts: Counter[str] = Counter()
    for run in range(2000):
        calls = [Demo("t", "p", chat(f"{run} {n}", str(n))) for n in range(3)]
        counts[one_call("a", calls).messages[-1].content] += 1
    assert abs(counts["2"] / 2000 - 0.5) < 0.045
    assert abs(counts["0"] / 2000 - 0.25) < 0.04 and abs(counts["1"] / 2000 - 0.25) < 0.04


# bootstrapping


def test_tasks_are_tried_in_order_until_enough_have_succeeded() -> None:
    """Even tasks succeed: for 4 of them tasks 0 to 6 are tried, as one after the other would."""
    tried: list[list[str]] = []

    def attempt(tasks: Sequence[Task], number: int) -> list[Demos]:
        tried.append([task.id for task in tasks])
        return [made(int(t.id[1:]))[0] if int(t.id[1:]) % 2 == 0 else {} for t in tasks]

    (found,) = bootstrap_sets([(TASKS, 4)], 1, attempt)
    assert [run["a"].task for run in found] == ["t0", "t2", "t4", "t6"]
    assert tried == [["t0", "t1", "t2", "t3"], ["t4", "t5"], ["t6"]]


def test_a_failed_task_is_tried_again_up_to_the_rounds() -> None:
    """Task n succeeds at its n-th try: with 3 rounds tasks 0, 1, 2 give demonstrations, 3 none."""
    tries: Counter[str] = Counter()

    def attempt(tasks: Sequence[Task], number: int) -> list[Demos]:
        tries.update(task.id for task in tasks)
        return [made(int(t.id[1:]))[0] if int(t.id[1:]) == number else {} for t in tasks]

    (found,) = bootstrap_sets([(TASKS[:4], 4)], 3, attempt)
    assert [run["a"].task for run in found] == ["t0", "t1", "t2"]
    assert tries == {"t0": 1, "t1": 2, "t2": 3, "t3": 3}
    assert bootstrap_sets([(TASKS[:4], 4)], 1, lambda tasks, number: [{}] * len(tasks)) == [[]]


def test_several_orders_go_on_side_by_side() -> None:
    """Even tasks succeed: each order finds what it finds alone, and no task is tried for it that
    would not be then; a task of two orders is tried once at a time."""
    tried: list[list[str]] = []

    def attempt(tasks: Sequence[Task], number: int) -> list[Demos]:
        tried.append([task.id for task in tasks])
        return [made(int(t.id[1:]))[0] if int(t.id[1:]) % 2 == 0 else {} for t in tasks]

    orders = [(TASKS, 2), (TASKS[2:], 1), (TASKS[1:4], 3), (TASKS, 0)]
    found = bootstrap_sets(orders, 1, attempt)
    assert [[run["a"].task for run in own] for own in found] == [["t0", "t2"], ["t2"], ["t2"], []]
    assert tried == [["t0", "t1", "t2", "t3"], ["t2"]]


# sets


def sets(max_labeled: int = 16, agents: Sequence[str] = ("a", "b"), seed: int = 0) -> DemoSets:
    return DemoSets(agents, {agent: DemoTemplate() for agent in agents}, max_labeled, seed)


def test_bootstrapped_demonstrations_first_then_labelled_ones_of_other_tasks() -> None:
    found = [*made(3), *made(5), *made(7)]
    filled = sets(max_labeled=6).filled(found, TASKS, 2)
    assert [d.task for d in filled["a"]][:2] == ["t3", "t5"], "the first max_bootstrapped"
    assert len(filled["a"]) == 6 and len(filled["b"]) == 6
    labelled = [d.task for d in filled["a"][2:]] + [d.task for d in filled["b"]]
    assert not {"t3", "t5", "t7"} & set(labelled), "no task twice"
    assert filled["a"][2].messages == chat(
        f"question {filled['a'][2].task[1:]}", f"answer {filled['a'][2].task[1:]}"
    )


def test_every_agent_draws_from_all_labelled_tasks() -> None:
    """The authors' code reassigns the pool, so a second module draws among the first one's few."""
    filled = sets(max_labeled=3).filled([], TASKS, 4)
    assert {d.task for d in filled["a"]} != {d.task for d in filled["b"]}
    few = sets(max_labeled=16, agents=("a", "b", "c")).filled(made(0), TASKS[:4], 4)
    assert [len(few[agent]) for agent in "abc"] == [1 + 3, 3, 3]


def test_more_bootstrapped_than_labelled_demonstrations_may_stand_in_a_set() -> None:
    filled = sets(max_labeled=2).filled([*made(1), *made(2), *made(3)], TASKS, 3)
    assert [d.task for d in filled["a"]] == ["t1", "t2", "t3"] and len(filled["b"]) == 2


def test_an_agent_without_a_template_gets_no_labelled_demonstrations() -> None:
    some = DemoSets(("a", "b"), {"a": DemoTemplate()}, 16)
    assert {agent: len(d) for agent, d in some.labeled(TASKS).items()} == {"a": 16}
    assert len(some.filled([], TASKS, 4)["b"]) == 0


def test_which_tasks_are_labelled_follows_from_the_seed() -> None:
    def drawn(seed: int) -> list[str]:
        return [demo.task for demo in sets(4, seed=seed).labeled(TASKS)["a"]]

    assert drawn(0) == drawn(0) != drawn(1)


def test_a_template_quotes_the_task_and_its_meta() -> None:
    task = Task("t", "2+3", "5", meta={"a": 2, "_steps": [5]})
    demo = DemoTemplate("{a} of {prompt}", "{answer} by {_steps}").demo("x", task)
    assert demo.messages == chat("2 of 2+3", "5 by [5]")
    with pytest.raises(SettingError, match=r"labeled_demos.x.user: unknown field \{b\} for task"):
        DemoTemplate("{b}").demo("x", task)


def test_a_run_is_not_shown_its_own_task() -> None:
    all_of_it = sets().labeled(TASKS)
    twin = Task("other id", "question 4")
    for task in (TASKS[4], twin):
        left = without_task(all_of_it, task)
        assert not any(demo.task == "t4" for own in left.values() for demo in own)
    assert sum(map(len, left.values())) == sum(map(len, all_of_it.values())) - sum(
        demo.task == "t4" for own in all_of_it.values() for demo in own
    )


def test_values_are_messages_of_user_and_assistant() -> None:
    values = demo_values({"a": [run["a"] for run in made(1, 2)], "b": []})
    assert values == {
        "a.demos": [
            {"role": "user", "content": "q1"},
            {"role": "assistant", "content": "b1"},
            {"role": "user", "content": "q2"},
            {"role": "assistant", "content": "b2"},
        ],
        "b.demos": [],
    }


# candidates


def test_sixteen_programs_are_nineteen_candidates() -> None:
    """Fact 6: C = 16 evaluates 19; restricted to the seeds 0 and 1 it evaluates 2. Six: -3 to 5."""
    every = ["zero-shot", "labeled", "unshuffled", "shuffled"]
    assert candidate_numbers(every, 16) == list(range(-3, 16))
    assert len(candidate_numbers(every, 16)) == 19
    assert candidate_numbers(["shuffled"], 2) == [0, 1]
    assert candidate_numbers(every, 6) == list(range(-3, 6)) and candidate_numbers(
        ["unshuffled"], 16
    ) == [-1]
    names = [candidate_name(n) for n in candidate_numbers(every, 2)]
    assert names == ["zero-shot", "labeled", "unshuffled", "shuffled 0", "shuffled 1"]


def test_shuffled_candidates_draw_their_order_and_size() -> None:
    assert drawn_tasks(TASKS, -1, 0) == TASKS and drawn_size(4, -1, 0) == 4
    orders = [tuple(t.id for t in drawn_tasks(TASKS, n, 0)) for n in range(5)]
    assert len(set(orders)) == 5 and all(sorted(o) == sorted(orders[0]) for o in orders)
    sizes = Counter(drawn_size(4, n, 0) for n in range(1000))
    assert set(sizes) == {1, 2, 3, 4} and all(abs(n - 250) < 55 for n in sizes.values())
    assert drawn_tasks(TASKS, 0, 0) == drawn_tasks(TASKS, 0, 0) != drawn_tasks(TASKS, 0, 1)
