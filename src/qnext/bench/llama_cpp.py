"""llama.cpp as a contestant, through the C interface of the package llama-cpp-python.

The GGUF files hold the same weights (``gguf_file.py``), quantised by llama.cpp itself. Tokens fed
are random and the likeliest next token is computed, as qnext does. Where a case starts with a
context, 64 tokens are run and the saved state is stretched to the length: its keys and values are
those 64 again and again. Flash attention is tried on and off there; both are reported.
"""

import ctypes
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qnext.bench.cases import Case
from qnext.bench.gguf_file import gguf_package, write_gguf
from qnext.bench.ours import Subject
from qnext.errors import BackendError, RequestError

FORMATS = {"Q4_0": 2, "Q4_K_M": 15, "Q8_0": 7, "BF16": None}
"""Name -> number llama.cpp has for it (its ``llama_ftype``); None for what the writer writes."""
LIKE = {"q4": ("Q4_0", "Q4_K_M"), "q8": ("Q8_0",)}
SEED_TOKENS = 64
WARM_TOKENS = 512
ROWS = (512, 2048)
"""Rows of a prompt llama.cpp computes at a time: its default, and as many as qnext."""
_STEP_TOKENS = 2048
_AUTO, _OFF, _ON = -1, 0, 1


def library() -> ModuleType:
    """The C interface. Raises RequestError when the package is not installed."""
    try:
        from llama_cpp import llama_cpp  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise RequestError(
            f"--against llama.cpp needs the package {error.name}, which is not installed. Install "
            "it with pip install llama-cpp-python (it is built on the spot, which takes a C++ "
            "compiler and half an hour on two cores)."
        ) from error
    return llama_cpp


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _quiet(level: int, text: bytes, data: int) -> None:
    """Swallow llama.cpp's log."""


def open_peers(
    subject: Subject, *, formats: Sequence[str] | None, folder: str | None
) -> Iterator["LlamaPeer"]:
    """A peer per format, its file written and quantised first where it is not there yet."""
    library()
    gguf_package()
    chosen = tuple(formats or LIKE.get(subject.format, ("BF16",)))
    where = Path(folder) if folder else subject.folder.with_name(f"{subject.folder.name}-gguf")
    files = [gguf_file(subject.folder, where, name) for name in chosen]
    for name, file in zip(chosen, files, strict=True):
        yield LlamaPeer(name, file, threads=subject.threads)


def gguf_file(model: Path, folder: Path, format: str) -> Path:
    """The file of a format, made if it is missing; its bfloat16 parent is removed again."""
    path = folder / f"{model.name}-{format}.gguf"
    if path.is_file():
        return path
    plain = folder / f"{model.name}-BF16.gguf"
    had_it = plain.is_file()
    if not had_it:
        write_gguf(model, plain)
    if format != "BF16":
        part = path.with_name(path.name + ".part")
        quantise(plain, part, format)
        part.replace(path)
    return path


def quantise(source: Path, target: Path, format: str) -> None:
    """Let llama.cpp quantise a bfloat16 file. Raises BackendError when it refuses."""
    lib = library()
    lib.llama_log_set(_quiet, None)
    params = lib.llama_model_quantize_default_params()
    params.ftype = FORMATS[format]
    params.nthread = 0
    status = lib.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    if status:
        raise BackendError(f"llama.cpp could not quantise {source} to {format} (status {status}).")


class LlamaModel:
    """A GGUF file, loaded."""

    def __init__(self, path: Path, *, threads: int) -> None:
        self.lib, self.path, self.threads = library(), path, threads
        self.lib.llama_log_set(_quiet, None)
        self.lib.llama_backend_init()
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.handle = self.lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise BackendError(f"llama.cpp could not load {path}.")
        vocabulary = self.lib.llama_model_get_vocab(self.handle)
        self.vocabulary = int(self.lib.llama_vocab_n_tokens(vocabulary))
        self._contexts: list[LlamaContext] = []

    def context(
        self, length: int, *, sequences: int = 1, flash: int = _AUTO, rows: int = 512
    ) -> "LlamaContext":
        """A cache for ``sequences`` of ``length`` tokens each; ``rows`` are computed at a time."""
        context = LlamaContext(self, length, sequences, flash, rows)
        self._contexts.append(context)
        return context

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits [n, V] of all tokens of one sequence."""
        context = self.context(len(ids))
        return context.run([(token, i, 0) for i, token in enumerate(ids)], wanted=range(len(ids)))

    def free_contexts(self) -> None:
        for context in self._contexts:
            self.lib.llama_free(context.handle)
        self._contexts.clear()

    def close(self) -> None:
        """Free everything."""
        self.free_contexts()
        if self.handle:
            self.lib.llama_model_free(self.handle)
            self.handle = None


class LlamaContext:
    """A cache of a loaded model and the calls that fill it."""

    def __init__(
        self, model: LlamaModel, length: int, sequences: int, flash: int, rows: int
    ) -> None:
        self.model, self.lib = model, model.lib
        lib = self.lib
        params = lib.llama_context_default_params()
        # Caches are counted in blocks of 256 tokens.
        params.n_ctx = sequences * -(-(length + 1) // 256) * 256
        params.n_seq_max = sequences
        params.n_batch, params.n_ubatch = _STEP_TOKENS, rows
        params.n_threads = params.n_threads_batch = model.threads
        params.flash_attn_type = flash
        params.offload_kqv = params.op_offload = False
        params.no_perf = True
        self.handle = lib.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise BackendError(f"llama.cpp could not make a context of {params.n_ctx} tokens.")
        self.memory = lib.llama_get_memory(self.handle)
        self._batch = lib.llama_batch_init(_STEP_TOKENS, 0, 1)

    def run(self, tokens: Sequence[tuple[int, int, int]], wanted: Sequence[int]) -> np.ndarray:
        """Run (token, position, sequence) rows; logits [len(wanted), V] of the wanted rows."""
        batch, chosen = self._batch, set(wanted)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i in chosen
        status = self.lib.llama_decode(self.handle, batch)
        if status:
            raise BackendError(f"llama.cpp could not run a step (status {status}).")
        size = self.model.vocabulary
        rows = [
            np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.handle, i), (size,))
            for i in wanted
        ]
        return np.stack(rows) if rows else np.empty((0, size), dtype=np.float32)

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.memory, False)

    def state(self) -> bytes:
        """The saved state of sequence 0."""
        size = self.lib.llama_state_seq_get_size(self.handle, 0)
        room = (ctypes.c_uint8 * size)()
        got = self.lib.llama_state_seq_get_data(self.handle, room, size, 0)
        return bytes(room[:got]) if got < size else bytes(room)

    def load(self, state: bytes, sequence: int) -> None:
        """Put a saved state into a sequence. Raises BackendError when llama.cpp refuses it."""
        room = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if not self.lib.llama_state_seq_set_data(self.handle, room, len(state), sequence):
            raise BackendError("llama.cpp refused a state that was stretched to the context.")

    def length(self, sequence: int) -> int:
        """Tokens a sequence has."""
        return int(self.lib.llama_memory_seq_pos_max(self.memory, sequence)) + 1


# -- states --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Reader:
    data: memoryview
    at: int = 0

    def take(self, size: int) -> bytes:
        piece = self.data[self.at : self.at + size]
        if len(piece) != size:
            raise BackendError(_LAYOUT)
        self.at += size
        return bytes(piece)

    def number(self, kind: str) -> int:
        return int(np.frombuffer(self.take(np.dtype(kind).itemsize), kind)[0])


_LAYOUT = (
    "the saved state of this version of llama.cpp has another layout than qnext bench knows, so it "
    "cannot be stretched to a context. Measure without --context, or with llama-cpp-python 0.3.36."
)


def stretch(state: bytes, length: int) -> bytes:
    """A saved state of n tokens as one of ``length``: keys and values repeat, the rest stays.

    The layout: a header; streams, and of each that is not empty: cells; position and sequences of
    each; whether values are transposed;
    layers; per layer type, bytes of a row and the keys; per layer the values likewise, or per
    column if transposed; then the recurrent part, of one cell whose position is the last token's.
    Raises BackendError for a state of another layout.
    """
    read = _Reader(memoryview(state))
    out = [read.take(8)]
    streams = read.number("<u4")
    out.append(np.array([streams], "<u4").tobytes())
    last = -1
    for _ in range(streams):
        cells = read.number("<u4")
        if not cells:
            out.append(np.array([0], "<u4").tobytes())
            continue
        out += _stretched_cells(read, cells, length)
        last = cells - 1
    if read.number("<u4") != 1 or read.number("<i4") != last:
        raise BackendError(_LAYOUT)
    out.append(np.array([1, length - 1], "<i4").tobytes())
    return b"".join([*out, read.take(len(state) - read.at)])


def _stretched_cells(read: _Reader, cells: int, length: int) -> list[bytes]:
    ids = []
    for i in range(cells):
        if read.number("<i4") != i:
            raise BackendError(_LAYOUT)
        ids.append(read.take(4 * read.number("<u4")))
    out = [np.array([length], "<u4").tobytes()]
    for i in range(length):
        out.append(np.array([i, len(ids[0]) // 4], "<i4").tobytes() + ids[0])
    times = -(-length // cells)
    is_transposed, layers = read.number("<u4"), read.number("<u4")
    out.append(np.array([is_transposed, layers], "<u4").tobytes())
    for _ in range(layers):
        out += _stretched_rows(read, cells, length)
    for _ in range(layers):
        if not is_transposed:
            out += _stretched_rows(read, cells, length)
            continue
        head = read.take(12)
        size, columns = (int(n) for n in np.frombuffer(head[4:], "<u4"))
        values = np.frombuffer(read.take(cells * size * columns), np.uint8)
        wide = np.tile(values.reshape(columns, cells * size), times)[:, : length * size]
        out += [head, wide.tobytes()]
    return out


def _stretched_rows(read: _Reader, cells: int, length: int) -> list[bytes]:
    head = read.take(12)
    row = int(np.frombuffer(head[4:], "<u8")[0])
    times = -(-length // cells)
    return [head, (read.take(cells * row) * times)[: length * row]]


# -- the contestant ------------------------------------------------------------------------------


class LlamaPeer:
    """A GGUF file in the race."""

    def __init__(self, format: str, path: Path, *, threads: int) -> None:
        self.format, self.name = format, f"llama.cpp {format}"
        self.model = LlamaModel(path, threads=threads)
        self._sizes = tensor_bytes(path)
        # A prompt that reaches every expert: no timed step waits for the disk.
        warm = LlamaSession(self.model, Case(kind="prefill", rows=WARM_TOKENS, steps=1), _AUTO)
        warm.reset()
        warm.step()
        self.model.free_contexts()

    def open(self, case: Case) -> Mapping[str, "LlamaSession"]:
        """One session at an empty context; with one, flash attention on and off.

        Of long prompts it computes 512 rows at a time, its default, or 2,048, whichever was faster
        in one try.
        """
        self.model.free_contexts()
        if case.kind == "prefill" and case.rows > ROWS[0] and not case.context:
            tried = {rows: LlamaSession(self.model, case, _AUTO, rows) for rows in ROWS}
            best = min(ROWS, key=lambda rows: tried[rows].trial())
            return {f"{self.name}, {best} rows at a time": tried[best]}
        if not case.context:
            return {self.name: LlamaSession(self.model, case, _AUTO)}
        return {
            f"{self.name}, flash attention {word}": LlamaSession(self.model, case, flash)
            for word, flash in (("on", _ON), ("off", _OFF))
        }

    def bytes_per_step(self, case: Case, experts: float | None) -> float | None:
        """Weights a decode step reads of this file; keys and values in 16 bits, states as ours.

        Routed experts are counted by the number qnext read: both feed random tokens.
        """
        if case.kind == "prefill" or experts is None:
            return None
        sizes = self._sizes
        middle = case.context + case.steps * case.rows // 2
        layers, per_expert = sizes["layers"], sizes["expert"]
        return (
            sizes["dense"]
            + per_expert * experts / layers
            + case.sequences * (sizes["kv"] * middle + sizes["state"])
        )

    def about(self) -> dict[str, Any]:
        """Version, system and file."""
        import llama_cpp  # pyright: ignore[reportMissingImports]

        system = self.model.lib.llama_print_system_info()
        return {
            "name": self.name,
            "package": f"llama-cpp-python {llama_cpp.__version__}",
            "system": system.decode(errors="replace").strip(),
            "file_gigabytes": round(self.model.path.stat().st_size / 1e9, 3),
        }

    def close(self) -> None:
        """Free the model."""
        self.model.close()


def tensor_bytes(path: Path) -> dict[str, float]:
    """Bytes of a GGUF file a decode step reads, by kind; ``expert`` is one of every layer."""
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def number(key: str) -> int:
        field = reader.fields[f"qwen3next.{key}"]
        return int(field.parts[field.data[0]][0])

    count, layers = number("expert_count"), number("block_count")
    dense = expert = 0.0
    has_head = any(tensor.name == "output.weight" for tensor in reader.tensors)
    for tensor in reader.tensors:
        if tensor.name == "token_embd.weight" and has_head:
            dense += int(tensor.n_bytes) / int(tensor.shape[1])
        elif "_exps." in tensor.name:
            expert += int(tensor.n_bytes) / count
        else:
            dense += int(tensor.n_bytes)
    attending = sum(tensor.name.endswith("attn_k.weight") for tensor in reader.tensors)
    keys = number("attention.head_count_kv") * number("attention.key_length")
    channels = 2 * number("ssm.state_size") * number("ssm.group_count") + number("ssm.inner_size")
    state = number("ssm.inner_size") * number("ssm.state_size")
    state += channels * (number("ssm.conv_kernel") - 1)
    return {
        "dense": dense,
        "expert": expert,
        "layers": float(layers),
        "kv": 2.0 * 2 * keys * attending,
        # Read and written, in float32.
        "state": 2.0 * 4 * state * (layers - attending),
    }


class LlamaSession:
    """One case on one context."""

    def __init__(self, model: LlamaModel, case: Case, flash: int, rows: int = ROWS[0]) -> None:
        self.case = case
        self.context = model.context(case.length, sequences=case.sequences, flash=flash, rows=rows)
        self._random = np.random.Generator(np.random.PCG64(0))
        self._state = b""
        if case.context:
            self.context.run(
                [(int(token), i, 0) for i, token in enumerate(self._tokens(SEED_TOKENS))], []
            )
            self._state = stretch(self.context.state(), case.context)
        self._done = 0
        self._ids = self._tokens(0)

    @property
    def experts(self) -> float | None:
        """llama.cpp does not say which experts it reads."""
        return None

    def trial(self) -> float:
        """Seconds of one repetition."""
        self.reset()
        start = time.perf_counter()
        for _ in range(self.case.steps):
            self.step()
        return time.perf_counter() - start

    def reset(self) -> None:
        self.context.clear()
        if self._state:
            for sequence in range(self.case.sequences):
                self.context.load(self._state, sequence)
                assert self.context.length(sequence) == self.case.context
        self._ids = self._tokens(self.case.tokens)
        self._done = 0

    def step(self) -> None:
        case = self.case
        rows = case.sequences * case.rows
        ids = self._ids[self._done * rows % len(self._ids) :][:rows].tolist()
        start = case.context + self._done * case.rows
        self._done += 1
        tokens = [
            (ids[sequence * case.rows + i], start + i, sequence)
            for sequence in range(case.sequences)
            for i in range(case.rows)
        ]
        if case.kind != "prefill":
            self.context.run(tokens, range(len(tokens))).argmax(-1)
            return
        for first in range(0, len(tokens), _STEP_TOKENS):
            piece = tokens[first : first + _STEP_TOKENS]
            is_last = first + len(piece) == len(tokens)
            self.context.run(piece, [len(piece) - 1] if is_last else []).argmax(-1)

    def _tokens(self, count: int) -> np.ndarray:
        return self._random.integers(0, self.context.model.vocabulary, count)
