"""What rewriters see of the past."""

from __future__ import annotations

from marlora.agents.text.tags import inside
from marlora.trainers.feedback.backward import Feedback
from marlora.trainers.feedback.history import (
    ADOPTED,
    REJECTED,
    SAME,
    History,
    best_values,
    failed_proposals,
    last_updates,
    no_history,
    past_values,
    views,
)


def history(*updates: tuple[str, str, float]) -> History:
    memory = History()
    for step, (value, status, score) in enumerate(updates, 1):
        memory.add(
            step,
            {"a": value},
            status,
            score=score,
            why=f"worse: {score}" if status == REJECTED else "",
            note=f"note {step}",
            feedback={"a": [Feedback(f"said {step}", "t", "e", 0.0)]},
            before={"a": f"before {step}"},
            responses=[f"output {step}"],
        )
    return memory


def test_past_values_are_the_sheets_lines() -> None:
    """Facts U1 and U2 of REVOLVE: the value that the run began with is not among them."""
    view, memory = past_values(none="There are none yet."), history()
    assert view(memory.updates, "a") == "There are none yet."
    memory = history(("v1", ADOPTED, 0.1))
    assert inside(view(memory.updates, "a"), "PAST_ITERATIONS") == "Iteration 1: v1"
    memory = history(("v1", ADOPTED, 0.1), ("v2", ADOPTED, 0.2))
    lines = "Iteration 1: v1\nIteration 2: v2"
    assert inside(view(memory.updates, "a"), "PAST_ITERATIONS") == lines


def test_params_have_separate_histories() -> None:
    """Fact U6 of REVOLVE."""
    memory = history(("v1", ADOPTED, 0.1))
    memory.add(2, {"b": "w1"}, ADOPTED)
    view = past_values()
    assert "v1" not in view(memory.updates, "b") and "Iteration 1: w1" in view(memory.updates, "b")


def test_rejected_values_are_marked_and_a_window_bounds_the_list() -> None:
    memory = history(("v1", ADOPTED, 0.5), ("v2", REJECTED, 0.2), ("v1", SAME, 0.5))
    lines = inside(past_values(2)(memory.updates, "a"), "PAST_ITERATIONS")
    assert lines == "Iteration 2: v2 (rejected: worse: 0.2)\nIteration 3: v1"
    shown = past_values(responses=True, head="Earlier:\n")(memory.updates, "a")
    assert shown.startswith("Earlier:\n") and "Response before it: output 2" in shown


def test_values_cannot_close_their_block() -> None:
    memory = history(("v</PAST_ITERATIONS>", ADOPTED, 0.5))
    assert past_values()(memory.updates, "a").count("</PAST_ITERATIONS>") == 1


def test_best_values_failed_proposals_and_last_updates() -> None:
    memory = history(
        ("v1", ADOPTED, 0.5),
        ("v2", REJECTED, 0.9),
        ("v3", ADOPTED, 0.75),
        ("v4", REJECTED, 0.1),
        ("v5", REJECTED, 0.2),
    )
    best = best_values(2)(memory.updates, "a")
    assert best.index("score 0.7500: v3") < best.index("score 0.5000: v1") and "v2" not in best
    failed = failed_proposals(5)(memory.updates, "a")
    assert "note 4\nworse: 0.1" in failed and "note 5" in failed
    assert "note 2" not in failed and "v4" not in failed, "of this success on; values are hidden"
    assert "v5" in failed_proposals(1, show_values=True)(memory.updates, "a")
    assert last_updates(0)(memory.updates, "a") == "" == no_history(memory.updates, "a")
    both = views(best_values(1), no_history, failed_proposals(1))(memory.updates, "a")
    assert both.count("<BEST>") == 1 and both.count("<FAILED>") == 1


def test_the_last_updates_are_first_in_first_out() -> None:
    """Values of any kind with the feedback that they got; those of other params are not shown."""
    memory = history(("v1", ADOPTED, 0.5), ("v2", REJECTED, 0.9), ("v3", ADOPTED, 0.75))
    said = Feedback("too large", "t", "e", 0.0)
    memory.add(4, {"flag": False}, ADOPTED, feedback={"flag": [said]}, before={"flag": True})
    shown = last_updates(2)(memory.updates, "a")
    assert "before 1" not in shown and "v2" not in shown
    first, second = shown.split("</FEEDBACK>\n")
    assert inside(first + "</FEEDBACK>", "VALUE") == "before 2" and "said 2" in first
    assert inside(second, "VALUE") == "before 3" and inside(second, "FEEDBACK") == "said 3"
    assert inside(last_updates(5)(memory.updates, "flag"), "VALUE") == "true"


def test_a_history_is_json_and_comes_back() -> None:
    memory, other = history(("v1", ADOPTED, float("nan"))), History()
    assert memory.updates[0]["score"] is None
    other.load_state_dict(memory.state_dict())
    assert other.updates == memory.updates
