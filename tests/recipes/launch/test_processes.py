"""How many processes a launch was meant to have."""

from __future__ import annotations

import pytest

from marlora.agents.types import SettingError
from marlora.recipes.launch.processes import meant

ALONE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "True"}
RECIPE = ["recipes/grpo_team.py", "--max_steps", "2"]


@pytest.mark.parametrize(
    "launcher",
    [
        ["python", "/bin/accelerate", "launch", "--cpu", "--num_processes", "3", *RECIPE],
        ["/bin/accelerate-launch", "--cpu", "--num_processes=3", *RECIPE],
        [
            "python",
            "-m",
            "accelerate.commands.launch",
            "--cpu",
            "--num_processes",
            "3",
            "-m",
            "marlora.recipes.grpo_team",
        ],
    ],
)
def test_the_number_is_read_as_accelerate_reads_it(launcher: list[str]) -> None:
    assert meant(ALONE, launcher) == 3


@pytest.mark.parametrize(
    "environ",
    [
        {},  # python recipe.py, or accelerate with one process
        {**ALONE, "WORLD_SIZE": "3"},  # started by torchrun: this is one of them
        {**ALONE, "ACCELERATE_USE_CPU": "False"},  # GPUs: accelerate starts them itself
    ],
)
def test_one_where_nothing_is_missing(environ: dict[str, str]) -> None:
    assert meant(environ, ["accelerate", "launch", "--cpu", "--num_processes", "3", *RECIPE]) == 1


def test_a_meeting_place_set_by_hand_means_nothing() -> None:
    assert meant(ALONE, ["bash", "job.sh"]) == 1


def test_several_machines_are_refused() -> None:
    address = [
        "--num_machines",
        "2",
        "--main_process_ip",
        "10.0.0.1",
        "--main_process_port",
        "29500",
    ]
    with pytest.raises(SettingError, match="start torchrun on each"):
        meant(ALONE, ["accelerate", "launch", "--cpu", "--num_processes", "4", *address, *RECIPE])
