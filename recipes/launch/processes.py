"""Starts the ranks that `accelerate launch --cpu --num_processes N` leaves to mpirun."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence

from marlora.agents.types import SettingError

LAUNCHERS = ("accelerate-launch", "accelerate.commands.launch")


def meant(environ: Mapping[str, str], launcher: Sequence[str]) -> int:
    """How many processes the user asked for of an `accelerate launch` that started this one alone;
    1 if it is as it should be.

    Args:
        environ: this process's environment. accelerate names a meeting place for several processes
            (MASTER_PORT) on a CPU, but no WORLD_SIZE, which mpirun, torchrun and its own multi-GPU
            launcher all set.
        launcher: the parent's command line, which accelerate's own parser reads.

    Raises `SettingError` for several machines: they need a launcher on each.
    """
    alone = "MASTER_PORT" in environ and "WORLD_SIZE" not in environ
    if not alone or environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true"):
        return 1
    words = list(launcher)
    start = next(
        (i + 1 for i, word in enumerate(words) if word == "launch" or word.endswith(LAUNCHERS)),
        None,
    )
    if start is None:  # MASTER_PORT was set by hand: one process is what was asked for
        return 1
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    args = launch_command_parser().parse_args(words[start:])
    if args.num_processes is None:  # then it stands in accelerate's own configuration file
        args = _validate_launch_command(args)[0]
    if (args.num_machines or 1) > 1:
        raise SettingError(
            "accelerate launch --cpu with several machines: start torchrun on each of them, or use"
            " mpirun"
        )
    return int(args.num_processes or 1)


def start_all() -> None:
    """Become torchrun with as many processes as were asked for, if accelerate started this one
    alone. Else do nothing."""
    if "MASTER_PORT" not in os.environ or "WORLD_SIZE" in os.environ:
        return
    import psutil

    count = meant(os.environ, psutil.Process().parent().cmdline())
    if count > 1:
        program = sys.orig_argv[1:]
        print(
            f"accelerate has started one of {count} processes; starting all of them by torchrun",
            file=sys.stderr,
            flush=True,
        )
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        if (
            signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        ):  # torchrun would end at the hang-up that `nohup` has it outlive
            os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
        os.execv(sys.executable, [sys.executable, *run, *program])
