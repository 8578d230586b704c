"""`marlora report --follow`: the report of a running run, served on loopback.

The address holds a token, and everything without it is a 404: other users of the machine, and pages
in the same browser, cannot read what the models wrote. The page asks every two seconds whether
files of the run have changed and then loads again; episodes that it does not hold are fetched by
name. Thumbs that people give to training episodes are kept in the run's `thumbs.jsonl`.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..episodes.store import Store
from ..episodes.thumbs import give_thumb, read_thumbs
from .episode_index import MAX_EPISODES, EpisodeIndex, Pieces, read_learned
from .report import build, read_runs

if TYPE_CHECKING:
    from aiohttp import web

WATCHED = (
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "proofs.json",
    "warnings.log",
    "learned.jsonl",
    "evaluations.json",
)
MAX_THUMB = 4096  # bytes of a thumb's request
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class LiveReport:
    """Serves the report of these runs. `await start(port)` gives the address; `await close()` ends
    it."""

    def __init__(
        self,
        folders: Sequence[Path],
        pieces: Pieces | None = None,
        max_episodes: int = MAX_EPISODES,
    ) -> None:
        self.folders, self.pieces, self.max_episodes = list(folders), pieces, max_episodes
        self.token = secrets.token_urlsafe(24)
        self._runner: web.AppRunner | None = None
        self._page: tuple[str, str] = ("", "")  # version, page
        self._judgeable: set[str] = set()  # names of the episodes that may have a thumb
        self._building = asyncio.Lock()

    def version(self) -> str:
        """Changes whenever a run has written something."""
        files = [run / name for run in self.folders for name in WATCHED]
        for run in self.folders:
            files += Store(run / "episodes").files()
            files += sorted(run.glob("checkpoints/step-*/system.json"))
        return " ".join(
            f"{s.st_size}.{s.st_mtime_ns}"
            for s in (path.stat() for path in files if path.is_file())
        )

    async def start(self, port: int = 0) -> str:
        """The address, on loopback; port 0 takes a free one."""
        from aiohttp import web

        app = web.Application(client_max_size=MAX_THUMB)
        app.router.add_get("/{token}/", self._guarded(self.report))
        app.router.add_get("/{token}/version", self._guarded(self.tell_version))
        app.router.add_get("/{token}/episode", self._guarded(self.episode))
        app.router.add_get("/{token}/thumbs", self._guarded(self.thumbs))
        app.router.add_post("/{token}/thumb", self._guarded(self.thumb))
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}/{self.token}/"

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    def _guarded(self, handler: web.Handler) -> web.Handler:  # type: ignore[name-defined]
        from aiohttp import web

        async def guarded(request: web.Request) -> web.StreamResponse:
            if not hmac.compare_digest(request.match_info["token"].encode(), self.token.encode()):
                raise web.HTTPNotFound()
            response = await handler(request)
            response.headers.update(HEADERS)
            return response

        return guarded

    async def report(self, request: web.Request) -> web.Response:
        """The page, made anew if something has changed."""
        from aiohttp import web

        async with self._building:
            now = self.version()
            if self._page[0] != now:
                self._page = (now, await asyncio.to_thread(self._built))
        return web.Response(
            body=self._page[1].encode(errors="replace"), content_type="text/html", charset="utf-8"
        )

    def _built(self) -> str:
        runs = read_runs(self.folders)
        self._judgeable = {
            f"{number}:{row.id}"
            for number, run in enumerate(runs)
            for row in run.episodes
            if row.trains and "f" not in row.marks
        }
        return build(runs, self.pieces, self.max_episodes, True)[0]

    async def tell_version(self, request: web.Request) -> web.Response:
        from aiohttp import web

        return web.Response(text=self.version())

    async def episode(self, request: web.Request) -> web.Response:
        """One episode by the name the list has for it, `RUN:ID`, with its texts."""
        from aiohttp import web

        number, _, episode_id = request.query.get("name", "").partition(":")
        if not number.isdecimal() or int(number) >= len(self.folders):
            raise web.HTTPNotFound()
        run = self.folders[int(number)]
        index = EpisodeIndex(self.pieces or (lambda policy, ids: None))

        def read() -> dict[str, object] | None:
            learned = read_learned(run / "learned.jsonl", {episode_id}).get(episode_id, {})
            episode = next(iter(Store(run / "episodes").read(id=episode_id)), None)
            if episode is None:
                return None
            return {"episode": index.pack(episode, learned), "strings": list(index.strings)}

        data = await asyncio.to_thread(read)
        if data is None:
            raise web.HTTPNotFound()
        return web.json_response(data)

    async def thumbs(self, request: web.Request) -> web.Response:
        """The thumbs of all runs, 1 or -1 by the name of the episode."""
        from aiohttp import web

        return web.json_response(await asyncio.to_thread(self._thumbs))

    def _thumbs(self) -> dict[str, int]:
        return {
            f"{number}:{episode}": thumb
            for number, run in enumerate(self.folders)
            for episode, thumb in read_thumbs(run).items()
        }

    async def thumb(self, request: web.Request) -> web.Response:
        """Keep a thumb, `{"name": "RUN:ID", "thumb": 1}`, and give all of them back. A 400 for what
        is none, and for an episode that a page does not offer: what is held out, failed or played
        for another one is not learnt from."""
        from aiohttp import web

        if request.content_type != "application/json":
            raise web.HTTPBadRequest(text="a thumb is JSON")
        try:
            data = await request.json()
        except ValueError as error:
            raise web.HTTPBadRequest(text="a thumb is JSON") from error
        fields = data if isinstance(data, dict) else {}
        name, thumb = fields.get("name"), fields.get("thumb")
        offered = isinstance(name, str) and name in self._judgeable
        if type(thumb) is not int or thumb not in (1, -1, 0) or not offered:
            raise web.HTTPBadRequest(text="no thumb of a training episode of this page")
        number, _, episode = str(name).partition(":")
        await asyncio.to_thread(give_thumb, self.folders[int(number)], episode, thumb)
        return await self.thumbs(request)
