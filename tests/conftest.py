"""Fixtures of all rooms."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live_server import Live, SharedServer, start

# pytest-xdist gives workers a terminal of 80 columns; tables in tests are as wide as in a file.
os.environ.pop("COLUMNS", None)


# The files that take longest, begun first, so that no worker waits for the other at the end. Minutes
# on a quiet machine: 6 and more, 6, 4, 3, then 2.
LONGEST = (
    "tests/recipes/test_demos.py",
    "tests/test_slurm.py",
    "tests/trainers/testbeds/world/test_model.py",
    "tests/test_tutorials.py",
    "tests/recipes/test_own_program.py",
    "tests/trainers/methods/workflow_search/test_trained_proposer.py",
    "tests/trainers/distributed/test_ranks.py",
    "tests/trainers/testbeds/test_experts.py",
)


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a file stay on one worker, for they share fixtures; those of the server all on one,
    for there is one server. The longest files come first."""
    for item in items:
        group = "server" if item.get_closest_marker("server") else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
    place = {file: index for index, file in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(LONGEST)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to begin where pytest-xdist did not take the groups: two workers would run halves of
    a file, such as the demos, in one folder."""
    if getattr(session.config.option, "loadgroup", False):
        torn = [item.nodeid for item in session.items if "@" not in item.nodeid]
        if torn:
            raise pytest.UsageError(
                f"--dist loadgroup without groups, for {len(torn)} tests (first: {torn[0]}):"
                " this pytest and this pytest-xdist do not go together; make setup installs two"
                " that do"
            )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread: the order of sums, and so the last bits, depend on how many there
    are."""
    from marlora.trainers.testbeds import pretraining

    with pretraining.one_thread():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model that has learnt nothing."""
    from marlora.trainers.testbeds.tiny import tiny_random_model

    return tiny_random_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The one real vLLM server of a test run, on a small random model; tests stay apart by the
    names of their adapters."""
    if importlib.util.find_spec("vllm") is None:
        pytest.fail(
            "vLLM is not installed here, so the server tests cannot run: make setup installs it"
        )
    live = start(tmp_path_factory.mktemp("server"))
    yield live
    assert isinstance(live.server, SharedServer)
    live.server.end()
