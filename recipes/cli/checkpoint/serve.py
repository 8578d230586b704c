"""`marlora serve`: the adapters of a checkpoint on a vLLM server, for any client."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal

from marlora.agents.concurrency import run_steadily
from marlora.agents.types import SettingError
from marlora.recipes.cli.checkpoint.team import chosen, engine_config, say, with_team
from marlora.rollouts.checkpoints.team import LoadedTeam
from marlora.rollouts.engines.factory import choose_engine
from marlora.rollouts.engines.vllm.engine import VLLMEngine


def cmd_serve(args: argparse.Namespace) -> None:
    """Serve a checkpoint's adapters on a guarded vLLM server until Ctrl-C; each adapter is a model
    by name."""
    if choose_engine(engine_config(args))[0] != "vllm":
        raise SettingError(
            "serve: needs vLLM, the transformers engine has no address; install the extra (make"
            " setup) and give --engine vllm"
        )
    if args.server_urls or args.endpoints:
        raise SettingError(
            "serve: starts a server of its own; leave --server_urls and --endpoints out"
        )

    async def work(team: LoadedTeam) -> None:
        if not team.engines:
            raise SettingError(
                f"{args.checkpoint}: every agent is a model asked over the network, so there is"
                " nothing to serve here"
            )
        on = chosen(team, args.adapters)
        for engine in team.engines:
            assert isinstance(engine, VLLMEngine)
            for replica in engine.replicas.values():
                assert replica.server is not None
                print(
                    f"url {replica.url}\nkey_file {replica.server.key_file}\nmodel {replica.base}"
                    " (base)"
                )
        for policy, version in on.versions.items():
            print(f"model {version} (policy {policy})")
        print(
            'ask: POST URL/v1/chat/completions or /v1/completions with "Authorization: Bearer $(cat'
            ' KEY_FILE)"; ready, Ctrl-C ends',
            flush=True,
        )
        # clusters send SIGTERM; a served team ends the same way by either signal
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ended.set)
        await ended.wait()

    with contextlib.suppress(KeyboardInterrupt):  # while it was starting
        run_steadily(with_team(args, work))
    say("stopped")
