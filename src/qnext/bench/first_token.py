"""How long a start takes and how much memory a run needs, seen from outside.

A process of its own loads the model as the server does, answers 16 tokens, then reads a prompt of
512 tokens, which touches every expert of a model of usual size. Its parent takes the time from
starting it to its first token; the process reports the most memory it ever held.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from qnext import cost
from qnext.errors import BackendError
from qnext.imports import import_engine

CACHE_BYTES = 256 << 20
SHORT, LONG = 16, 512


def measure_start(folder: Path, *, threads: int) -> dict[str, Any]:
    """Start a process on a model folder: seconds to the first token, peak bytes, and their limit.

    ``expected_bytes`` are weights and caches. Raises BackendError when the process fails.
    """
    command = [sys.executable, "-m", "qnext.bench.first_token", str(folder), str(threads)]
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        seconds = time.perf_counter() - start
        rest, said = process.communicate()
    if process.returncode or first != "token\n":
        raise BackendError(f"a process that loads {folder} failed: {said.strip()[-500:]}")
    found = json.loads(rest)
    return {
        "first_token_seconds": round(seconds, 3),
        **found,
        "peak_share": round(found["peak_bytes"] / found["expected_bytes"], 4),
    }


def main() -> None:
    """Be that process: print "token" at the first token, then one JSON object."""
    import_engine()
    from qnext import native
    from qnext.config import ModelConfig
    from qnext.engine.engine import Engine
    from qnext.engine.request import Request, SamplingParams
    from qnext.weights.decoder import load_decoder
    from qnext.weights.folder import resolve_model
    from qnext.weights.packed import is_packed, open_packed

    folder, threads = sys.argv[1], int(sys.argv[2])
    native.load().set_threads(threads)
    model = load_decoder(folder, backend="native")
    config = model.config
    engine = Engine(
        model, max_num_seqs=1, memory_bytes=CACHE_BYTES, prefix_cache=False,
        max_model_len=min(LONG + SHORT, config.max_position_embeddings),
    )  # fmt: skip

    def answer(name: str, prompt: int) -> None:
        ids = tuple((7 * i + 3) % config.vocab_size for i in range(prompt))
        params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        engine.add(Request(id=name, prompt_ids=ids, params=params))
        while engine.has_work:
            if any(event.token_ids for event in engine.step()) and name == "short":
                print("token", flush=True)
                name = "said"

    answer("short", SHORT)
    answer("long", min(LONG, config.max_position_embeddings - SHORT))
    is_quantised = is_packed(ModelConfig.from_file(resolve_model(folder)))
    bits = open_packed(folder).bits if is_quantised else None
    weights = cost.weight_bytes(config, bits or config.dtype)
    expected = weights + engine.runner.cache.nbytes
    print(json.dumps({"peak_bytes": peak_bytes(), "expected_bytes": expected}), flush=True)


def peak_bytes() -> int:
    """The most memory this process ever held, mapped files that were read included."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    main()
