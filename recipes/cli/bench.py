"""`marlora bench`: suites that measure speed and memory."""

from __future__ import annotations

import argparse
from dataclasses import replace

from marlora.agents.types import SettingError, nearest
from marlora.recipes.cli.checkpoint.team import add_json, show, write_json
from marlora.recipes.launch.tables import table


def add_bench(command: argparse.ArgumentParser) -> None:
    """Arguments of `marlora bench`."""
    command.add_argument(
        "suite",
        help=(
            "update, agents, serve, publish, loop, rollout, sandbox, proxy, ahead, fleet, store or"
            " gpu"
        ),
    )
    add_json(command)
    command.add_argument("--repeats", type=int, default=3, help="interleaved repeats")
    command.add_argument(
        "--size",
        default="135m",
        help=(
            "geometry of the model: tiny, 135m, or on a GPU qwen3-0.6b, qwen3-1.7b, qwen3-4b,"
            " qwen3-8b"
        ),
    )
    command.add_argument(
        "--engine",
        default="",
        choices=("", "transformers", "vllm"),
        help="of publish and loop; all that are here if not given",
    )
    command.add_argument(
        "--device", default="", help="of update and agents: cpu or cuda; the GPU if there is one"
    )
    command.add_argument(
        "--rho",
        nargs="*",
        type=float,
        default=[],
        help="of update: only these shares of raw over unique tokens",
    )
    command.add_argument(
        "--opponents",
        nargs="*",
        default=[],
        choices=("padded", "per_turn", "trl", "trl_compact_head", "comlrl"),
        help=(
            "of update: only these; of loop: comlrl, which a checkout's script first installs into"
            " a temporary folder"
        ),
    )
    command.add_argument(
        "--ranks",
        nargs="*",
        type=int,
        default=[],
        help="of rollout: also with so many ranks that play, one launch each",
    )


def cmd_bench(args: argparse.Namespace) -> None:
    """Measure speed and memory, interleaved in one run; every ratio requires equal results."""
    from marlora.trainers.bench.geometry import check_size
    from marlora.trainers.bench.measure import Options
    from marlora.trainers.bench.suites import SUITES
    from marlora.trainers.errors import RunError

    if args.suite not in SUITES:
        raise SettingError(f"bench {args.suite!r}: no such suite; {nearest(args.suite, SUITES)}")
    if args.repeats < 1:
        raise SettingError(f"--repeats: expected at least 1, got {args.repeats}")
    options = Options(
        args.repeats,
        args.size,
        args.engine,
        tuple(args.opponents),
        tuple(args.rho),
        *([args.device] if args.device else []),
    )
    options = replace(options, json=args.json, ranks=tuple(args.ranks))
    check_size(args.size)
    result = SUITES[args.suite](options)
    failed = result.pop("failed", [])
    show(args.json, table(result.pop("title"), result.pop("columns"), result.pop("rows")))
    given = [
        f"--{name} {value}"
        for name in ("size", "repeats", "engine", "device")
        if (value := getattr(args, name))
    ]
    given += [f"--rho {' '.join(f'{rho:g}' for rho in args.rho)}"] if args.rho else []
    given += [f"--opponents {' '.join(args.opponents)}"] if args.opponents else []
    given += [f"--ranks {' '.join(map(str, args.ranks))}"] if args.ranks else []
    write_json(
        args.json,
        {
            "command": " ".join(["marlora bench", args.suite, *given]),
            "repeats": args.repeats,
            **result,
        },
    )
    if failed:
        raise RunError(f"bench {args.suite}: {', '.join(failed)} failed; the others stand as shown")
