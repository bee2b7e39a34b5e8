"""``qnext info``: what a model is made of and what it costs, without loading it.

The figures come from ``cost.py``; here they are gathered for a program (``describe``) or laid out
for a reader (``render``).
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qnext import cost
from qnext.config import MODEL_TYPES, ModelConfig
from qnext.errors import CheckpointError

CONTEXTS = (4_096, 32_768, 131_072, 262_144, 1_048_576)
"""Context lengths a cost is shown at, as far as the model reaches."""

_LABELS = {
    "embedding": "embedding",
    "lm_head": "output head",
    "delta_layers": "Gated DeltaNet layers",
    "attention_layers": "attention layers",
    "routed_experts": "routed experts",
    "shared_experts": "shared experts",
    "routers": "routers",
    "shared_gates": "shared-expert gates",
    "dense_mlps": "dense feed-forward",
    "norms": "norms",
}
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".index.json")


def read_model(name_or_path: str) -> tuple[str, ModelConfig, dict[str, Any] | None]:
    """Name, configuration, and what is on disk, of a folder, a config.json or an embedded model.

    With weights, the number of MTP layers follows the tensors that are present and the last item
    says how they are stored. Without, the configuration is taken at its word, which for Qwen3-Next
    means one MTP layer, and the last item is None. Raises ConfigError and CheckpointError.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file() and path.suffix == ".json":
        return name_or_path, ModelConfig.from_file(path), None
    from qnext.weights.folder import checkpoint_index, resolve_model
    from qnext.weights.layout import count_mtp_layers

    folder = resolve_model(name_or_path)
    config = ModelConfig.from_file(folder)
    if not any(file.name.endswith(_WEIGHT_FILES) for file in folder.iterdir()):
        return folder.name, config, None
    infos = checkpoint_index(folder)
    if not infos:
        raise CheckpointError(f"{folder}: the weight files hold no tensors. Download them again.")
    by_dtype: dict[str, int] = {}
    for info in infos.values():
        by_dtype[info.dtype] = by_dtype.get(info.dtype, 0) + info.num_bytes
    stored = {
        "files": len({info.file for info in infos.values()}),
        "tensors": len(infos),
        "bytes": sum(by_dtype.values()),
        "bytes_by_dtype": dict(sorted(by_dtype.items(), key=lambda item: -item[1])),
    }
    return folder.name, replace(config, num_mtp_layers=count_mtp_layers(infos)), stored


def describe(
    name: str, config: ModelConfig, stored: dict[str, Any] | None, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """All figures as JSON-ready values.

    Bytes of weights and cache are those of ``dtype``: float32, bfloat16, float16, or fp8, int8 and
    int4 (with a bfloat16 cache).
    """
    found, cache = cost.parameters(config), cost.cache_dtype(dtype)
    contexts = [n for n in CONTEXTS if n <= config.max_position_embeddings]
    contexts = contexts or [config.max_position_embeddings]
    decode = [cost.decode_bytes(config, dtype, context=n) for n in contexts]
    sparse = sum(config.is_sparse(i) for i in range(config.num_hidden_layers))
    return {
        "model": name,
        "architecture": MODEL_TYPES[config.model_type],
        "model_type": config.model_type,
        "dtype": dtype,
        "cache_dtype": cache,
        "num_layers": config.num_hidden_layers,
        "num_delta_layers": len(config.delta_layers),
        "num_attention_layers": len(config.attention_layers),
        "num_sparse_layers": sparse,
        "num_mtp_layers": config.num_mtp_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "parameters": found.as_dict(),
        "total_parameters": found.total,
        "active_parameters": cost.active_parameters(config),
        "active_parameters_without_lm_head": cost.active_parameters(config, lm_head=False),
        "active_parameters_with_embedding": cost.active_parameters(config, embedding=True),
        "mtp_parameters": found.mtp,
        "mtp_active_parameters": cost.mtp_active_parameters(config),
        "matmul_flops_per_token": cost.matmul_flops(config),
        "attention_flops_per_context_token": cost.attention_flops(config),
        "delta_flops_per_token": cost.delta_flops(config),
        "weight_bytes": cost.weight_bytes(config, dtype),
        "kv_bytes_per_token": cost.kv_bytes_per_token(config, cache),
        "mtp_kv_bytes_per_token": cost.mtp_kv_bytes_per_token(config, cache),
        "state_bytes_per_sequence": cost.state_bytes_per_sequence(config),
        "conv_bytes_per_sequence": cost.conv_bytes_per_sequence(config, cache),
        "bytes_per_token": [
            {
                "context": n,
                "weights": one.weights,
                "kv": one.kv,
                "state": one.state,
                "total": one.total,
                "flops": cost.decode_flops(config, n),
            }
            for n, one in zip(contexts, decode, strict=True)
        ],
        "stored": stored,
    }


def render(found: dict[str, Any]) -> str:
    """The same figures as text for a terminal."""
    total = found["total_parameters"]
    head = "without the embedding"
    if found["tie_word_embeddings"]:
        head = "the tied output head included"
    parts = [
        [(label, f"{found['parameters'][key]:,}", _share(found["parameters"][key], total))
         for key, label in _LABELS.items() if found["parameters"][key]],
        [("total", f"{total:,}", "without the MTP head" if found["mtp_parameters"] else ""),
         ("active per token", f"{found['active_parameters']:,}",
          f"{_share(found['active_parameters'], total).strip()}, {head}")],
    ]  # fmt: skip
    if found["mtp_parameters"]:
        draft = f"{found['mtp_active_parameters']:,} active per drafted token"
        parts[1].append(("MTP head", f"{found['mtp_parameters']:,}", draft))
    elif found["architecture"].startswith("Qwen3Next"):
        parts[1].append(("MTP head", "none", ""))
    dtype, cache = found["dtype"], found["cache_dtype"]
    memory = [("weights", readable_bytes(found["weight_bytes"]), dtype + _with_mtp(found))]
    if found["stored"]:
        stored = found["stored"]
        kinds = ", ".join(stored["bytes_by_dtype"])
        where = f"{stored['tensors']:,} tensors in {stored['files']} file(s), {kinds}"
        memory.append(("weights on disk", readable_bytes(stored["bytes"]), where))
    draft = ""
    if found["mtp_kv_bytes_per_token"]:
        draft = f", and {readable_bytes(found['mtp_kv_bytes_per_token'])} for the MTP head"
    memory.append(
        ("keys and values, per token", readable_bytes(found["kv_bytes_per_token"]), cache + draft)
    )
    if found["num_delta_layers"]:
        memory += [
            ("recurrent state, per sequence",
             readable_bytes(found["state_bytes_per_sequence"]), "float32"),
            ("convolution windows, per sequence",
             readable_bytes(found["conv_bytes_per_sequence"]), cache),
        ]  # fmt: skip
    work = [
        ("products with weights", _flops(found["matmul_flops_per_token"]), "per token"),
        ("attention", _flops(found["attention_flops_per_context_token"]),
         "per token and token of context"),
    ]  # fmt: skip
    if found["num_delta_layers"]:
        work.append(("delta rule", _flops(found["delta_flops_per_token"]), "per token"))
    widths = _widths(row for rows in (*parts, memory, work) for row in rows)
    lines = [f"{found['model']}: {found['architecture']}", *_sentences(found), "", "Parameters"]
    lines += [*_rows(parts[0], widths), "", *_rows(parts[1], widths)]
    lines += ["", "Memory", *_rows(memory, widths), "", "Arithmetic", *_rows(work, widths)]
    lines += ["", f"Bytes moved for one decoded token of one sequence ({dtype})"]
    return "\n".join([*lines, *_traffic(found)])


def _sentences(found: dict[str, Any]) -> list[str]:
    attention, delta = found["num_attention_layers"], found["num_delta_layers"]
    layers = f"{attention} attention layers"
    if delta:
        layers = f"{found['num_layers']} layers, {delta} Gated DeltaNet and {attention} attention"
    experts = "dense feed-forward"
    if found["num_sparse_layers"]:
        experts = f"{found['num_experts_per_tok']} of {found['num_experts']} experts per token"
        if found["num_sparse_layers"] < found["num_layers"]:
            experts += f" in {found['num_sparse_layers']} of {found['num_layers']} layers"
    return [
        f"{layers}; {experts}",
        f"hidden size {found['hidden_size']:,}, vocabulary {found['vocab_size']:,}, "
        f"context {found['max_position_embeddings']:,} tokens",
    ]


def _traffic(found: dict[str, Any]) -> list[str]:
    delta = found["num_delta_layers"] > 0
    header = ["context", "weights", "keys, values", *(["state"] if delta else []), "total", "work"]
    rows = [header]
    for one in found["bytes_per_token"]:
        moved = [one["weights"], one["kv"], *([one["state"]] if delta else []), one["total"]]
        rows.append(
            [f"{one['context']:,}", *(readable_bytes(n) for n in moved), _flops(one["flops"])]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return ["  " + "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]


def _widths(rows: Iterable[tuple[str, str, str]]) -> tuple[int, int]:
    several = list(rows)
    return max(len(row[0]) for row in several), max(len(row[1]) for row in several)


def _rows(rows: list[tuple[str, str, str]], widths: tuple[int, int]) -> list[str]:
    """Label, right-aligned figure, remark."""
    first, second = widths
    return [f"  {a.ljust(first)}  {b.rjust(second)}  {c}".rstrip() for a, b, c in rows]


def _with_mtp(found: dict[str, Any]) -> str:
    return ", the MTP head included" if found["mtp_parameters"] else ""


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:5.1f} %"


def _flops(count: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000 or unit == "T":
            break
        count /= 1000
    return f"{count:.4g} {unit}FLOP"


def readable_bytes(count: float) -> str:
    """Bytes with a binary unit and at most one decimal: ``72 MiB``, ``1.7 MiB``, ``512 B``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    text = f"{count:,.1f}"
    return f"{text.removesuffix('.0')} {unit}"
