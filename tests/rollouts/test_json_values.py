"""Plain Python values through JSON and back, and the copy of the reader inside the sandbox."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from marlora.rollouts.json_values import plain, unplain
from marlora.rollouts.sandbox import scorer

KEYS = st.none() | st.booleans() | st.integers() | st.text() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS, inner)
        | st.sets(st.integers())
    ),
    max_leaves=12,
)


@given(VALUES)
def test_values_survive_and_the_sandbox_reads_them_alike(value: Any) -> None:
    data = json.loads(json.dumps(plain(value)))
    assert unplain(data) == value
    assert repr(scorer.unplain(data)) == repr(unplain(data))


def test_a_value_of_another_type_is_its_text() -> None:
    assert unplain(plain({"a": [1j]})) == {"a": ["1j"]} == scorer.unplain(plain({"a": [1j]}))
