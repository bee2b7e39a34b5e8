"""From a host and a port to a running server: the socket, the banner, uvicorn."""

import errno
import ipaddress
import socket
import sys

import uvicorn

from qnext import cost
from qnext.errors import RequestError
from qnext.llm import LLM
from qnext.serve.app import create_app
from qnext.serve.worker import Worker

BACKLOG = 128
SHUTDOWN_S = 5
"""Answers that are still being written when the server is told to stop get this long."""


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
    """Ends the engine before it waits for connections, so that every client is told why."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.ask_to_stop()
        await super().shutdown(sockets)


def serve(llm: LLM, listener: socket.socket) -> int:
    """Serve until interrupted; returns the exit status."""
    # The ready-made logging of uvicorn prints a line per request; warnings and errors are enough.
    app = create_app(llm)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    server = _Server(config, app.state.worker)
    print(banner(llm, listener), flush=True)
    server.run(sockets=[listener])
    return 0 if server.started else 1


def banner(llm: LLM, listener: socket.socket) -> str:
    """What is served, where, and with which kernels."""
    url = address(listener)
    parameters = cost.parameters(llm.config).total
    kernels = [line.partition(":") for line in llm.model.kernels]
    by_backend: dict[str, list[str]] = {}
    for op, _, backend in kernels:
        by_backend.setdefault(backend.strip(), []).append(op)
    pool = llm.engine.pool
    tokens = pool.num_pages * llm.engine.scheduler.page_size
    lines = [
        f"qnext serves {llm.name} at {url}",
        "",
        f"  model     {parameters / 1e6:,.1f} M parameters, "
        f"{str(llm.model.dtype).removeprefix('torch.')} on {llm.model.device}",
        f"  context   {llm.max_model_len:,} tokens; the cache holds {tokens:,} tokens of up to "
        f"{llm.engine.scheduler.num_slots} requests",
        *(f"  kernels   {name}: {', '.join(ops)}" for name, ops in by_backend.items()),
        f"  page      {url}/",
        f"  API       {url}/v1 (chat/completions, completions, models), {url}/health",
        "",
        "Ctrl-C stops it.",
    ]
    if not _is_loopback(listener):
        print(
            "Warning: the server is reachable from other machines and asks for no key. "
            "Use --host 127.0.0.1 to keep it to this one.",
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


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback
