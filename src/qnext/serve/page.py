"""The web page: files of ``ui/``, served as they are.

Nothing is built and nothing is loaded from elsewhere. The content security policy forbids whatever
the page does not need, so that nothing a model writes can run, load or send anything.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

_UI = Path(__file__).resolve().parent / "ui"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_routes() -> dict[str, Callable[[Request], Awaitable[Response]]]:
    """Path -> handler for the page at ``/`` and its parts under ``/ui/``."""
    found = {}
    for file in sorted(_UI.iterdir()):
        path = "/" if file.name == "index.html" else f"/ui/{file.name}"
        found[path] = _handler(file.read_bytes(), _TYPES[file.suffix])
    return found


def _handler(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    async def page(http: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return page
