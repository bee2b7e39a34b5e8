"""The command line: ``qnext generate | chat | serve | info | doctor | bench | ...``.

Parsing and dispatch only. Heavy imports stand inside the commands, so that ``--help`` and mistakes
in arguments are answered at once. An error meant for the user is its message on stderr and exit
status 2; ``QNEXT_TRACEBACK=1`` shows where it came from.
"""

import argparse
import io
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnext import __version__, serve_command
from qnext.errors import QnextError, RequestError
from qnext.imports import import_engine

if TYPE_CHECKING:
    from qnext.engine.request import SamplingParams
    from qnext.llm import LLM
    from qnext.quantization import Bits

EMBEDDED = "qnext-mini"
SMALL_MODEL = 50_000_000
"""Models with fewer active parameters run on one thread unless --threads says otherwise."""
FAILED, INTERRUPTED = 2, 128 + signal.SIGINT


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return FAILED
    try:
        status = COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
    except QnextError as error:
        if os.environ.get("QNEXT_TRACEBACK") == "1":
            raise
        print(_in_options(str(error), arguments), file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`qnext info | head`). Python would complain again when it flushes
        # at exit, so what is left goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


# -- commands ----------------------------------------------------------------------------------


def generate(arguments: argparse.Namespace) -> int:
    """Continue a prompt."""
    prompt = _read_prompt(arguments)
    with _load(arguments) as llm:
        params = _sampling(llm, arguments, max_tokens=arguments.max_tokens)
        if arguments.json:
            [completion] = llm.generate(prompt, params)
            result = {
                "text": completion.text,
                "token_ids": list(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "usage": completion.usage.as_dict(),
            }
            print(json.dumps(result, ensure_ascii=False))
            return 0
        for delta in llm.stream(prompt, params):
            print(delta.text, end="", flush=True)
        print()
    return 0


def chat(arguments: argparse.Namespace) -> int:
    """Talk with a model in the terminal."""
    import_engine()
    from qnext.prompt_history import PromptHistory, default_file
    from qnext.terminal_chat import TerminalChat

    given = arguments.history_file
    file = Path(given) if given else default_file()
    history = PromptHistory(file) if arguments.history and file is not None else None
    with _load(arguments) as llm:
        talk = TerminalChat(
            llm,
            _sampling(llm, arguments, max_tokens=arguments.max_tokens),
            system=arguments.system,
            enable_thinking=arguments.thinking,
            history=history,
        )
        if isinstance(sys.stdin, io.TextIOWrapper):
            # Some locales would let undecodable bytes through, for the tokenizer to stumble over.
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")
        try:
            return talk.run(sys.stdin, sys.stdout)
        except UnicodeDecodeError as error:
            raise RequestError(
                f"standard input is not UTF-8 text ({error.reason} at byte {error.start}). "
                "Convert it, for instance with iconv -t UTF-8."
            ) from error


def serve(arguments: argparse.Namespace) -> int:
    """Serve a model and a chat page over HTTP."""
    import_engine()
    return serve_command.serve(arguments, _load)


def info(arguments: argparse.Namespace) -> int:
    """Print what a model is made of and what it costs."""
    from qnext.info import describe, read_model, render

    found = describe(*read_model(arguments.model), arguments.dtype)
    print(json.dumps(found, indent=2) if arguments.json else render(found))
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Print what this machine offers and what is in the way."""
    from qnext.doctor import as_json, examine, is_fine, render

    checks = examine()
    print(json.dumps(as_json(checks), indent=2) if arguments.json else render(checks))
    return 0 if is_fine(checks) else 1


def quantize(arguments: argparse.Namespace) -> int:
    """Pack a model into 8 or 4 bits, with a certificate."""
    from qnext.certificate import quantize_with_certificate

    written = quantize_with_certificate(
        arguments.source,
        arguments.target,
        _bits(arguments),
        calibration=arguments.calibrate,
        text=arguments.text,
        forward=arguments.forward,
    )
    print(written)
    return 0


def synth(arguments: argparse.Namespace) -> int:
    """Write a random checkpoint of a config."""
    from qnext.config import read_json
    from qnext.weights.synth import cut_config, synthesise

    raw = cut_config(
        read_json(arguments.config),
        layers=arguments.layers,
        experts=arguments.experts,
        vocab_size=arguments.vocab_size,
        mtp=arguments.mtp,
    )
    folder = synthesise(
        raw,
        arguments.target,
        _bits(arguments),
        router_skew=arguments.router_skew,
        seed=arguments.seed,
    )
    print(folder)
    return 0


def _bits(arguments: argparse.Namespace) -> "Bits":
    from qnext.quantization import Bits

    parts = ("shared", "attention", "head", "embedding", "mtp")
    given = {name: getattr(arguments, f"{name}_bits") for name in parts}
    return Bits.all(arguments.bits, **{k: v for k, v in given.items() if v is not None})


def cache(arguments: argparse.Namespace) -> int:
    """Explain what was reused, or look into a folder of prefixes."""
    from qnext import cache_command

    if arguments.cache_action == "explain":
        found = cache_command.fetch_explanations(arguments.url, arguments.request_id)
        text = cache_command.render_explanations
    else:
        found = cache_command.describe_folder(arguments.folder)
        text = cache_command.render_folder
    print(json.dumps(found, indent=2) if arguments.json else text(found))  # type: ignore[arg-type]
    return 0


def bench(arguments: argparse.Namespace) -> int:
    """Measure how fast this machine runs a model."""
    from qnext.bench.report import render, run

    report = run(arguments)
    if arguments.plot:
        from qnext.bench.plots import draw

        draw(report, Path(arguments.plot))
    print(json.dumps(report, indent=2) if arguments.json else render(report))
    return 0


def data(arguments: argparse.Namespace) -> int:
    """Prepare training data."""
    from qnext import data_command

    return data_command.run(arguments)


def evaluate(arguments: argparse.Namespace) -> int:
    """Score a model."""
    from qnext import eval_command

    return eval_command.run(arguments)


def train(arguments: argparse.Namespace) -> int:
    """Run a training recipe, draw its curves, or export its model."""
    from qnext import train_command

    return train_command.train(arguments)


COMMANDS = {
    "generate": generate, "chat": chat, "serve": serve, "info": info, "doctor": doctor,
    "cache": cache, "quantize": quantize, "synth": synth, "bench": bench,
    "train": train, "data": data, "eval": evaluate,
}  # fmt: skip


_OPTIONS = {
    "max_model_len": "max_context", "speculative_tokens": "speculative", "max_tokens": "max_tokens",
    "max_num_seqs": "max_num_seqs", "max_batch_tokens": "max_batch_tokens",
    "batch_invariant": "batch_invariant", "cache_dir": "cache_dir",
}  # fmt: skip
"""Parameters of the library, and the attributes of their options on the command line."""


def _in_options(message: str, arguments: argparse.Namespace) -> str:
    """An error of the library with its remedies in terms of this command's options."""
    message = re.sub(r"([Rr]aise) (the memory budget|memory)\b", r"\1 --memory", message)
    message = re.sub(r"^memory: ", "--memory: ", message)
    message = message.replace("dtype='float32'", "--dtype float32")
    for name, attribute in _OPTIONS.items():
        if hasattr(arguments, attribute):
            option = "--" + attribute.replace("_", "-")
            message = re.sub(rf"(?<![\w-]){name}=(?=\w)", option + " ", message)
            message = re.sub(rf"(?<![\w-]){name}\b", option, message)
        else:
            # What this command has no option for cannot be its remedy.
            message = re.sub(rf" or (lower|raise) {name}\b", "", message)
    return message


# -- models and prompts ------------------------------------------------------------------------


def _load(arguments: argparse.Namespace, **options: Any) -> "LLM":
    import_engine()
    import torch

    from qnext.llm import LLM

    if arguments.cache_dir is not None and arguments.command != "serve":
        # What was said is written to the folder on the way out; the server has its own way.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    threads = arguments.threads or _threads_for(arguments.model)
    if threads is not None:
        torch.set_num_threads(threads)
    return LLM(
        arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        backend=arguments.backend,
        quantization=arguments.quantization,
        threads=threads,
        memory=arguments.memory,
        max_model_len=arguments.max_context,
        speculative_tokens=arguments.speculative,
        prefix_cache=arguments.prefix_cache,
        batch_invariant=arguments.batch_invariant,
        cache_dir=arguments.cache_dir,
        cache_disk_limit=arguments.cache_disk_limit,
        **options,
    )


def _threads_for(model: str) -> int | None:
    """One thread for a small model, None (the library's choice) for others.

    Products of a few thousand numbers are done before a second thread has started; waiting for it
    costs more than it brings, and many times more on a machine that is busy with something else.
    """
    from qnext.config import ModelConfig
    from qnext.cost import active_parameters
    from qnext.weights.checkpoint import resolve_model

    config = ModelConfig.from_file(resolve_model(model))
    return 1 if active_parameters(config) < SMALL_MODEL else None


def _sampling(
    llm: "LLM", arguments: argparse.Namespace, *, max_tokens: int | None
) -> "SamplingParams":
    """The checkpoint's own settings, with those that were given on the command line."""
    given = {
        name: getattr(arguments, name)
        for name in ("temperature", "top_p", "top_k", "min_p", "seed")
        if getattr(arguments, name) is not None
    }
    return llm.default_params(max_tokens=max_tokens, stop=tuple(arguments.stop), **given)


def _read_prompt(arguments: argparse.Namespace) -> str:
    source = arguments.prompt_file
    if arguments.prompt is not None and arguments.prompt != "-":
        try:
            arguments.prompt.encode()
        except UnicodeEncodeError as error:
            raise RequestError("--prompt: the text is not UTF-8. Convert it.") from error
        return arguments.prompt
    try:
        if arguments.prompt == "-" or source == "-":
            source = "standard input"
            raw = sys.stdin.buffer.read()
        else:
            raw = Path(source).read_bytes()
        return raw.decode("utf-8")
    except OSError as error:
        raise RequestError(f"--prompt-file {source}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{source}: the prompt is not UTF-8 text ({error}).") from error


# -- arguments ---------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="qnext", description="Qwen3-Next, complete: run it, serve it, look into it."
    )
    parser.add_argument("--version", action="version", version=f"qnext {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    one = _command(commands, "generate", "continue a prompt")
    _add_loading(one)
    prompt = one.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue; - reads stdin")
    prompt.add_argument("--prompt-file", metavar="FILE", help="file to continue; - reads stdin")
    _add_sampling(one, max_tokens=256)
    one.add_argument("--json", action="store_true", help="print one JSON object, when finished")

    one = _command(commands, "chat", "talk with a model in the terminal")
    _add_loading(one)
    one.add_argument("--system", metavar="TEXT", help="system message")
    one.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="let the model think before it answers, or not (default: as the model does)",
    )
    one.add_argument(
        "--history", action=argparse.BooleanOptionalAction, default=True,
        help="keep the lines typed at the prompt for the next run (default: yes)",
    )  # fmt: skip
    one.add_argument(
        "--history-file", metavar="FILE",
        help="where (default: qnext/chat_history in XDG_STATE_HOME, or in ~/.local/state)",
    )  # fmt: skip
    _add_sampling(one, max_tokens=None)

    one = _command(commands, "serve", "serve a model and a chat page over HTTP")
    _add_loading(one)
    serve_command.add_options(one, _positive)

    one = _command(commands, "info", "what a model is made of and what it costs")
    _add_model(one, "model folder, config.json, or embedded name")
    one.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32", "fp8", "int8", "int4"),
        help="dtype the bytes are counted for (default: %(default)s)",
    )
    one.add_argument("--json", action="store_true", help="print one JSON object")

    one = _command(commands, "quantize", "pack a model into 8 or 4 bits, with a certificate")
    one.add_argument("source", metavar="SRC", help="model folder or embedded name")
    one.add_argument("target", metavar="DST", help="new folder, or one that was interrupted")
    _add_bits(one, choices=(4, 8), default=4)
    one.add_argument(
        "--calibrate", metavar="TEXT",
        help="text file; weights are rounded for the inputs they see on it",
    )  # fmt: skip
    one.add_argument(
        "--text", metavar="TEXT",
        help="text file the certificate is measured on (default: one that comes with qnext)",
    )  # fmt: skip
    one.add_argument(
        "--forward", action=argparse.BooleanOptionalAction,
        help="run both models for the certificate (default: if the source fits into memory)",
    )  # fmt: skip

    one = _command(commands, "synth", "write a random checkpoint of a config, to measure speed")
    one.add_argument("config", metavar="CONFIG.json", help="config.json, or the folder it is in")
    one.add_argument("target", metavar="DST", help="new folder")
    _add_bits(one, choices=(4, 8, 16), default=16)
    one.add_argument("--layers", type=_positive, metavar="N", help="only the first N layers")
    one.add_argument("--experts", type=_positive, metavar="N", help="only N experts a layer")
    one.add_argument("--vocab-size", type=_positive, metavar="N", help="a smaller vocabulary")
    one.add_argument(
        "--mtp", action=argparse.BooleanOptionalAction, default=True,
        help="the multi-token-prediction head, if the config has one (default: yes)",
    )  # fmt: skip
    one.add_argument(
        "--router-skew", type=_share, default=0.0, metavar="S",
        help="the expert of rank r is chosen about r^-S as often as the first (default: 0)",
    )  # fmt: skip
    one.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")

    one = _command(commands, "cache", "what was reused of prompts, and what is kept on disk")
    actions = one.add_subparsers(dest="cache_action", metavar="ACTION", required=True)
    action = _command(actions, "explain", "why a running server reused what it did and no more")
    action.add_argument("request_id", nargs="?", metavar="REQUEST_ID", help="of an answer (its id)")
    action.add_argument(
        "--url",
        default="http://127.0.0.1:8000",
        help="address of the server (default: %(default)s)",
    )
    action.add_argument("--json", action="store_true", help="print one JSON object")
    action = _command(actions, "info", "what a folder given with --cache-dir holds")
    action.add_argument("folder", metavar="DIR")
    action.add_argument("--json", action="store_true", help="print JSON")

    from qnext import data_command, eval_command

    data_command.add_parser(commands)
    eval_command.add_parser(commands)

    one = _command(commands, "bench", "how fast this machine runs a model, and its limits")
    one.add_argument(
        "what", choices=("decode", "verify", "prefill", "batch", "kernels"),
        help="answers, checking drafts, prompts, several sequences at once, or single products",
    )  # fmt: skip
    _add_model(one, "model folder (packed or not) or embedded name")
    _add_bench(one)

    one = _command(commands, "train", "run a training recipe, draw its curves, export its model")
    _add_training(one)

    one = _command(commands, "doctor", "what this machine offers and what is in the way")
    one.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_training(parser: argparse.ArgumentParser) -> None:
    from qnext.train_command import add_arguments

    add_arguments(parser)


def _command(commands: Any, name: str, help_text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=help_text, description=help_text.capitalize() + ".")


def _add_model(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "model", nargs="?", default=EMBEDDED, metavar="MODEL", help=f"{what} (default: {EMBEDDED})"
    )


def _add_bits(parser: argparse.ArgumentParser, *, choices: tuple[int, ...], default: int) -> None:
    group = parser.add_argument_group("bits", "16 leaves a part as it is")
    group.add_argument(
        "--bits", type=int, choices=choices, default=default,
        help="routed experts, and every part not named here (default: %(default)s)",
    )  # fmt: skip
    for name, what in (
        ("shared", "shared experts and dense feed-forward layers"),
        ("attention", "projections of attention and Gated DeltaNet"),
        ("head", "output head"),
        ("embedding", "embedding (default: 16; tied to the head: as the head)"),
        ("mtp", "multi-token-prediction head"),
    ):
        group.add_argument(f"--{name}-bits", type=int, choices=(4, 8, 16), help=what)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, "model folder or embedded name")
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="dtype of the weights in memory (default: as config.json says)",
    )
    group.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    group.add_argument(
        "--backend", default="auto", choices=("auto", "native", "torch"),
        help="kernels: native, torch, or the fastest that fit (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--quantization", choices=("int8", "int4"),
        help="pack the weights while they are read (default: as the folder has them)",
    )  # fmt: skip
    group.add_argument(
        "--threads", type=_threads, metavar="N",
        help="threads of the CPU (default: one for a small model, else one per core)",
    )  # fmt: skip
    group.add_argument(
        "--memory", default="1GiB", metavar="AMOUNT",
        help="room for keys, values and states, such as 512MiB (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--max-context", type=_positive, metavar="N",
        help="tokens of prompt and answer together (default: the model's limit)",
    )  # fmt: skip
    group.add_argument(
        "--speculative", type=_drafts, default=0, metavar="K",
        help="tokens the MTP head drafts per step, 0 to 4 or auto; the tokens stay the same, "
        "on PyTorch up to rounding (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--prefix-cache", action=argparse.BooleanOptionalAction, default=True,
        help="start prompts where earlier ones were (default: yes)",
    )  # fmt: skip
    group.add_argument(
        "--cache-dir", metavar="DIR",
        help="folder where prefixes survive a restart; it will hold what was said",
    )  # fmt: skip
    group.add_argument(
        "--cache-disk-limit", default="10GiB", metavar="AMOUNT",
        help="room of that folder, per model (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--batch-invariant",
        action="store_true",
        help="the same bits whatever else runs on PyTorch too (float32, bfloat16; slower), and a "
        "check at the start; the native kernels always give them",
    )


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=_threads, metavar="N", help="threads (default: one per core)"
    )
    parser.add_argument(
        "--context", type=_count, nargs="+", default=[0], metavar="N",
        help="tokens a sequence has already; several are measured one after another (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=_positive, nargs="+", metavar="N",
        help="tokens of a prompt (default: 512), or rows of a verifying step (default: 3)",
    )  # fmt: skip
    parser.add_argument(
        "--sequences", type=_positive, nargs="+", default=[8], metavar="N",
        help="sequences of a batch (default: 8)",
    )  # fmt: skip
    parser.add_argument(
        "--repetitions", type=_positive, default=7, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the results (needs matplotlib)")
    group = parser.add_argument_group("comparing", "the other program runs in turn with qnext")
    group.add_argument(
        "--against", choices=("llama.cpp", "transformers"),
        help="needs the package llama-cpp-python and gguf, or transformers",
    )  # fmt: skip
    group.add_argument(
        "--gguf-format", action="append", choices=("Q4_0", "Q4_K_M", "Q8_0", "BF16"),
        help="format for llama.cpp; repeatable (default: those with as many bits)",
    )  # fmt: skip
    group.add_argument(
        "--gguf", metavar="DIR",
        help="folder the GGUF files are written to and looked for in (default: MODEL-gguf)",
    )  # fmt: skip


def _add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    group = parser.add_argument_group("sampling", "left out: what generation_config.json says")
    left_out = "until the context is full" if max_tokens is None else str(max_tokens)
    group.add_argument(
        "--max-tokens", type=_positive, default=max_tokens, metavar="N",
        help=f"most tokens to generate (default: {left_out})",
    )  # fmt: skip
    group.add_argument("--temperature", type=float, metavar="X", help="0 takes the likeliest token")
    group.add_argument("--top-p", type=float, metavar="X")
    group.add_argument("--top-k", type=int, metavar="N")
    group.add_argument("--min-p", type=float, metavar="X")
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same text")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, found {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 4:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 4, found {text!r}")
    return value


def _threads(text: str) -> int:
    most = 4 * (os.cpu_count() or 1)
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 1 to {most}, four per core, found {text!r}"
        )
    return int(text)


def _drafts(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) > 4:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 4 or auto, found {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
