"""Minibatches and what they did together, by hand."""

from __future__ import annotations

from marlora.trainers.update.minibatches import merge_results, minibatches
from marlora.trainers.update.optimizer_step import UpdateResult


def test_every_item_once_per_epoch_in_an_order_of_its_own() -> None:
    found = list(minibatches(range(7), 3, epochs=2, seed=1))
    assert [len(batch) for batch in found] == [3, 3, 1, 3, 3, 1]
    first, second = [[item for batch in found[i : i + 3] for item in batch] for i in (0, 3)]
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
    assert (
        found
        == list(minibatches(range(7), 3, epochs=2, seed=1))
        != list(minibatches(range(7), 3, epochs=2, seed=2))
    )


def test_rows_of_several_updates_are_joined_by_policy() -> None:
    one = UpdateResult({"loss": 2.0}, 0.5, 10, 2, 1e-3, grad_norm=1.0, moved=0.1)
    two = UpdateResult(
        {"loss": 1.0}, 0.7, 5, 1, 1e-3, grad_norm=2.0, applied=False, problem="loss nan"
    )
    assert merge_results([{"a": one}, {"a": two, "b": one}]) == {
        "a": UpdateResult(
            {"loss": 1.0},
            0.5,
            15,
            3,
            1e-3,
            grad_norm=2.0,
            applied=False,
            problem="loss nan",
            moved=0.1,
        ),
        "b": one,
    }
    assert merge_results([]) == {}
