"""From a host and a port to a running server: the socket, the banner, uvicorn."""

import asyncio
import errno
import ipaddress
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import uvicorn

from qnext import cost
from qnext.errors import RequestError
from qnext.llm import LLM
from qnext.serve.app import Limits, create_app
from qnext.serve.gate import Rules
from qnext.serve.worker import Worker

BACKLOG = 1024
DRAIN_S = 30.0
"""Answers that are being written when the server is told to stop get this long to end."""
SHUTDOWN_S = 5
"""Time for what is left after that: to say why answers ended, and to close connections."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 chooses a free one.

    Connections are accepted from here on and answered once the model is loaded. Raises
    RequestError when the address cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise RequestError(
            f"--host {host}: {error.strerror}. Give a name or an address of this machine, such as "
            "127.0.0.1, or 0.0.0.0 for all of them."
        ) from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # Lets a server start again at once after it was stopped; a running one still refuses.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise RequestError(
                f"port {port} on {host} is in use by another program. Stop that one, or choose "
                "another port with --port (0 for any free one)."
            ) from error
        remedy = "Give --host an address of this machine, such as 127.0.0.1."
        if error.errno == errno.EACCES:
            remedy = "Ports below 1024 need privileges: choose a higher one with --port."
        raise RequestError(
            f"cannot listen on {host} port {port}: {error.strerror}. {remedy}"
        ) from error
    return listener


class _Server(uvicorn.Server):
    """Lets running answers end before it closes connections.

    While it waits, new requests are told to come back later. What is not done after ``drain_s``
    ends at the engine's next step, and its client is told so.
    """

    def __init__(self, config: uvicorn.Config, worker: Worker, drain_s: float) -> None:
        super().__init__(config)
        self._worker, self._drain_s = worker, drain_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.draining = True
        await self._idle(self._drain_s)
        self._worker.end_all()
        await self._idle(SHUTDOWN_S)
        self._worker.ask_to_stop()
        await super().shutdown(sockets)

    async def _idle(self, limit_s: float) -> None:
        """Return when no request is left, the time is over, or Ctrl-C was pressed again."""
        end = time.monotonic() + limit_s
        worker = self._worker
        while worker.unfinished and worker.is_alive and not self.force_exit:
            if time.monotonic() > end:
                return
            await asyncio.sleep(0.02)


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """How a server behaves; everything but the model."""

    limits: Limits = field(default_factory=Limits)
    rules: Rules = field(default_factory=Rules)
    names: Sequence[str] = ()
    origins: Sequence[str] = ()
    drain_s: float = DRAIN_S


def serve(llm: LLM, listener: socket.socket, serving: Serving | None = None) -> int:
    """Serve until interrupted; returns the exit status."""
    serving = serving or Serving()
    app = create_app(
        llm,
        limits=serving.limits,
        rules=serving.rules,
        names=serving.names,
        origins=serving.origins,
    )
    config = uvicorn.Config(
        app,
        log_config=None,  # one line per request is written by the gate
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    server = _Server(config, app.state.worker, serving.drain_s)
    print(banner(llm, listener, serving), flush=True)
    server.run(sockets=[listener])
    return 0 if server.started else 1


def banner(llm: LLM, listener: socket.socket, serving: Serving | None = None) -> str:
    """What is served, where, with which kernels, and what was chosen."""
    serving = serving or Serving()
    url = address(listener)
    parameters = cost.parameters(llm.config).total
    kernels = [line.partition(":") for line in llm.model.kernels]
    by_backend: dict[str, list[str]] = {}
    for op, _, backend in kernels:
        by_backend.setdefault(backend.strip(), []).append(op)
    engine = llm.engine
    tokens = engine.pool.num_pages * engine.scheduler.page_size
    drafts = engine.policy.setting
    names = ", ".join(serving.names) or llm.name
    count = len(serving.rules.keys)
    keys = "none asked for" if not count else f"{count} key{'s' * (count > 1)}"
    timeout = serving.limits.timeout_s
    lines = [
        f"qnext serves {names} at {url}",
        "",
        f"  model     {parameters / 1e6:,.1f} M parameters, "
        f"{str(llm.model.dtype).removeprefix('torch.')} on {llm.model.device}",
        f"  context   {llm.max_model_len:,} tokens; the cache holds {tokens:,} tokens of up to "
        f"{engine.scheduler.num_slots} requests, and {engine.prefix.num_slots} prefixes",
        *(
            f"  weights   {name}" if ops == ["weights"] else f"  kernels   {name}: {', '.join(ops)}"
            for name, ops in by_backend.items()
        ),
        f"  drafting  {'none' if drafts == 0 else f'{drafts} tokens per step of the MTP head'}",
        f"  limits    {serving.limits.max_waiting} requests may wait; "
        + ("no time limit" if timeout is None else f"{timeout:g} s per answer"),
        f"  access    {keys}; "
        + (f"pages of {', '.join(serving.origins)}" if serving.origins else "no other web sites"),
        f"  page      {url}/",
        f"  API       {url}/v1 (chat/completions, completions, responses, messages, models)",
        f"            {url}/openapi.json, {url}/health, {url}/metrics",
        "",
        "Ctrl-C stops it.",
    ]
    if not is_loopback(listener) and not serving.rules.keys:
        print(
            "Warning: the server is reachable from other machines and asks for no key. Give it one "
            "with --api-key-file, or use --host 127.0.0.1 to keep it to this one.",
            file=sys.stderr,
        )
    return "\n".join(lines)


def address(listener: socket.socket) -> str:
    """URL of a listening socket as a browser on this machine needs it."""
    host, port = listener.getsockname()[:2]
    parsed = ipaddress.ip_address(host.partition("%")[0])
    if parsed.is_unspecified:
        host = "127.0.0.1" if parsed.version == 4 else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    """Whether only programs on this machine reach it."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback
