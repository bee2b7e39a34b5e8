"""``qnext serve``: its options, and what they make of a server."""

import argparse
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qnext.errors import RequestError

if TYPE_CHECKING:
    from qnext.llm import LLM


def add_options(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """The options of the command that are about serving."""
    group = parser.add_argument_group("serving")
    group.add_argument("--host", default="127.0.0.1", help="address to bind (default: %(default)s)")
    group.add_argument(
        "--port", type=_port, default=8000, help="0 chooses a free one (%(default)s)"
    )
    group.add_argument(
        "--served-model-name", action="append", default=[], metavar="NAME",
        help="what clients call the model; repeatable (default: the name of its folder)",
    )  # fmt: skip
    group.add_argument(
        "--max-num-seqs", type=positive, default=16, metavar="N",
        help="requests that run at the same time (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--max-batch-tokens", type=positive, default=2048, metavar="N",
        help="tokens of one step, prompts and answers together (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--background-prefill", action=argparse.BooleanOptionalAction, default=True,
        help="while nothing else is to do, prepare the next turn of conversations (default: yes)",
    )  # fmt: skip
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max-waiting", type=_count, default=256, metavar="N",
        help="requests that may wait; further ones are refused for now (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--max-body", default="8MiB", metavar="AMOUNT",
        help="largest body of a request (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--timeout", type=_seconds, metavar="SECONDS",
        help="time for one answer (default: no limit)",
    )  # fmt: skip
    group.add_argument(
        "--keep-alive", type=_seconds, default=15.0, metavar="SECONDS",
        help="a stream that is silent for so long sends a comment; 0 for never (default: 15)",
    )  # fmt: skip
    group.add_argument(
        "--keep-responses", type=_count, default=1000, metavar="N",
        help="answers of /v1/responses that a later request may go on from (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--drain", type=_seconds, default=30.0, metavar="SECONDS",
        help="time for running answers when the server is stopped (default: 30)",
    )  # fmt: skip
    group = parser.add_argument_group("access")
    group.add_argument(
        "--api-key-file", metavar="FILE",
        help="keys, one per line; the variable QNEXT_API_KEYS may hold some too, by commas",
    )  # fmt: skip
    group.add_argument(
        "--allow-origin", action="append", default=[], metavar="ORIGIN", type=_origin,
        help="web site whose pages may use the server, such as https://example.org; repeatable",
    )  # fmt: skip
    group.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="name the server goes by, where it asks for no key; repeatable",
    )  # fmt: skip
    group = parser.add_argument_group("log")
    group.add_argument(
        "--log-format", choices=("text", "json"),
        help="lines on stderr (default: text on a terminal, else json)",
    )  # fmt: skip
    group.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info",
        help="(default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--log-prompts", action="store_true", help="write what is asked into the log"
    )


def serve(arguments: argparse.Namespace, load: Callable[..., "LLM"]) -> int:
    """Serve a model and a chat page over HTTP until interrupted."""
    try:
        from qnext.serve.app import Limits
        from qnext.serve.gate import Rules, log_to_stderr, read_keys
        from qnext.serve.server import Serving, is_loopback, listen
        from qnext.serve.server import serve as run
    except ModuleNotFoundError as error:
        raise RequestError(
            f"qnext serve needs the package {error.name}, which is not installed. Install it with "
            "pip install 'qnext[serve]', or run `make serve`."
        ) from error
    keys = read_keys(arguments.api_key_file)
    limits = Limits(
        max_body_bytes=_bytes(arguments.max_body),
        max_waiting=arguments.max_waiting,
        timeout_s=arguments.timeout,
        keep_alive_s=arguments.keep_alive or None,
        max_kept=arguments.keep_responses,
    )
    options: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("max_num_seqs", "max_batch_tokens", "background_prefill")
    }
    log_to_stderr(
        arguments.log_format or ("text" if sys.stderr.isatty() else "json"), arguments.log_level
    )
    # The port is taken before the model is loaded: a busy port is said at once.
    with listen(arguments.host, arguments.port) as socket:
        # Beyond this machine names vary, and the warning about missing keys has been given.
        hosts = [name.lower() for name in arguments.allow_host]
        rules = Rules(
            keys=keys,
            hosts=hosts if is_loopback(socket) or hosts else None,
            log_prompts=arguments.log_prompts,
        )
        if arguments.log_prompts:
            logging.getLogger("qnext.serve").warning("what is asked is written into this log")
        serving = Serving(
            limits=limits,
            rules=rules,
            names=arguments.served_model_name,
            origins=arguments.allow_origin,
            drain_s=arguments.drain,
        )
        return run(load(arguments, **options), socket, serving)


def _bytes(text: str) -> int:
    from qnext.engine.sizes import parse_bytes

    return parse_bytes(text, name="--max-body")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, found {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, found {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e7:
        raise argparse.ArgumentTypeError(f"expected seconds, found {text!r}")
    return value


def _origin(text: str) -> str:
    scheme, _, host = text.partition("://")
    if text != "*" and (scheme not in ("http", "https") or not host or "/" in host):
        raise argparse.ArgumentTypeError(
            f"expected an origin such as https://example.org, found {text!r}"
        )
    return text
