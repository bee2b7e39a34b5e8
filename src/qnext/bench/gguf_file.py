"""A model folder as a GGUF file that llama.cpp loads: the same weights under its names.

Written for measuring, so the vocabulary is a stand-in: 256 bytes and numbered fillers. Where the
formats differ: llama.cpp wants norms with their 1 added, ``-exp(A_log)``, and the rows of
``in_proj_qkvz`` as all queries, all keys, all values, then the gates in a matrix of their own.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qnext.config import ModelConfig
from qnext.errors import CheckpointError, RequestError
from qnext.weights.folder import resolve_model
from qnext.weights.formats import PackedExperts, unpack, unpack_expert_into
from qnext.weights.packed import PackedModel, is_packed, open_packed
from qnext.weights.source import SourceReader

ARCHITECTURE = "qwen3next"
_MOSTLY_BF16 = 32


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the file: its name, shape and where its values come from."""

    name: str
    shape: tuple[int, ...]
    is_float32: bool
    """Norms, routers and small tensors are float32, matrices bfloat16."""
    values: Callable[[], Iterator[Tensor]]
    """Pieces along the first axis, so that a stack of experts is never in memory at once."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * (4 if self.is_float32 else 2)


def gguf_package() -> Any:
    """The package that writes GGUF. Raises RequestError when it is not installed."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise RequestError(
            "--against llama.cpp needs the package gguf, which is not installed. Install it with "
            "pip install 'qnext[bench]'."
        ) from error
    return gguf


def write_gguf(name_or_path: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Write a model folder, packed or not, as a bfloat16 GGUF file; returns its path.

    Packed weights are unpacked. Memory: one expert or one matrix. Raises RequestError for a model
    llama.cpp's architecture of this name cannot hold.
    """
    gguf_package()
    from gguf import GGMLQuantizationType, GGUFWriter

    read, config = published(name_or_path)
    _check(config)
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    writer = GGUFWriter(part, ARCHITECTURE)
    _describe(writer, config, path.stem)
    tensors = list(tensors_of(config, read))
    for tensor in tensors:
        if tensor.is_float32:
            size = np.dtype(np.float32)
            writer.add_tensor_info(tensor.name, tensor.shape, size, tensor.nbytes)
        else:
            in_bytes = (*tensor.shape[:-1], 2 * tensor.shape[-1])
            writer.add_tensor_info(
                tensor.name, in_bytes, np.dtype(np.uint8), tensor.nbytes,
                raw_dtype=GGMLQuantizationType.BF16,
            )  # fmt: skip
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_values(writer, tensors)
    finally:
        writer.close()
    # Only a whole file gets the name: an interrupted one is not taken for it later.
    part.replace(path)
    return path


def _write_values(writer: Any, tensors: list[GgufTensor]) -> None:
    """Values in the order of the header, every tensor padded to the alignment of the file."""
    stream = writer.fout[0]
    writer.write_padding(stream, stream.tell())
    for tensor in tensors:
        written = 0
        for piece in tensor.values():
            ready = piece.float() if tensor.is_float32 else piece.to(torch.bfloat16)
            data = ready.contiguous().view(torch.uint8).numpy()
            data.tofile(stream)
            written += data.nbytes
        assert written == tensor.nbytes, (tensor.name, written, tensor.nbytes)
        writer.write_padding(stream, written)


def _check(config: ModelConfig) -> None:
    problem = None
    if not config.is_hybrid:
        problem = "it is not a hybrid of Gated DeltaNet and attention"
    elif any(not config.is_sparse(i) for i in range(config.num_hidden_layers)):
        problem = "it has dense layers"
    elif not config.shared_expert_intermediate_size:
        problem = "it has no shared expert"
    elif config.linear_key_head_dim != config.linear_value_head_dim:
        problem = "linear_key_head_dim and linear_value_head_dim differ"
    elif config.attention_bias:
        problem = "its attention has biases"
    if problem is not None:
        raise RequestError(
            f"--against llama.cpp: its {ARCHITECTURE} architecture cannot hold this model: "
            f"{problem}. Compare with transformers instead."
        )


# -- where values come from ----------------------------------------------------------------------

Read = Callable[[str], Tensor]


def published(name_or_path: str | os.PathLike[str]) -> tuple[Read, ModelConfig]:
    """(tensor by published name, config) of a folder, packed or not."""
    folder = resolve_model(name_or_path)
    if is_packed(ModelConfig.from_file(folder)):
        packed = open_packed(folder)
        return partial(_unpacked, packed), packed.config
    reader = SourceReader(folder)
    return reader.read, reader.config


def _unpacked(packed: PackedModel, name: str) -> Tensor:
    """One published tensor of a packed folder, in float32 if it was packed."""
    if name in packed:
        weight = packed[name]
        return weight if isinstance(weight, Tensor) else unpack(weight)
    prefix, _, last = name.removesuffix(".weight").rpartition(".")
    before, _, expert = prefix.rpartition(".experts.")
    index = int(expert) if before else 0
    stem = f"{before}.experts." if before else f"{prefix}."
    if last == "down_proj":
        weight = packed[f"{stem}down_proj"]
    else:
        weight = packed[f"{stem}gate_up_proj" + ("" if before else ".weight")]
    if not isinstance(weight, PackedExperts):
        raise CheckpointError(f"{packed.folder} holds no weight {name}.")
    out = torch.empty((weight.rows, weight.cols))
    unpack_expert_into(out, weight, index)
    if last == "down_proj":
        return out
    gate, up = out.chunk(2)
    return gate if last == "gate_proj" else up


def tensors_of(config: ModelConfig, read: Read) -> Iterator[GgufTensor]:
    """Every tensor of the main model under llama.cpp's names."""
    D, V = config.hidden_size, config.vocab_size

    def one(name: str, source: str, shape: tuple[int, ...]) -> GgufTensor:
        return GgufTensor(name, shape, False, lambda: iter([read(source).view(shape)]))

    def small(
        name: str, source: str, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]
    ) -> GgufTensor:
        return GgufTensor(
            name, shape, True, lambda: iter([change(read(source).float()).view(shape)])
        )

    yield one("token_embd.weight", "model.embed_tokens.weight", (V, D))
    yield small("output_norm.weight", "model.norm.weight", (D,), _one_added)
    if not config.tie_word_embeddings:
        yield one("output.weight", "lm_head.weight", (V, D))
    for i, kind in enumerate(config.layer_types):
        here, there = f"model.layers.{i}.", f"blk.{i}."
        for name, source in (
            ("attn_norm", "input_layernorm"),
            ("post_attention_norm", "post_attention_layernorm"),
        ):
            yield small(f"{there}{name}.weight", f"{here}{source}.weight", (D,), _one_added)
        if kind == "full_attention":
            H = config.head_dim
            queries, keys = config.num_attention_heads * H, config.num_key_value_heads * H
            mixer = f"{here}self_attn."
            yield one(f"{there}attn_q.weight", f"{mixer}q_proj.weight", (2 * queries, D))
            yield one(f"{there}attn_k.weight", f"{mixer}k_proj.weight", (keys, D))
            yield one(f"{there}attn_v.weight", f"{mixer}v_proj.weight", (keys, D))
            yield one(f"{there}attn_output.weight", f"{mixer}o_proj.weight", (D, queries))
            for letter in "qk":
                name = f"{there}attn_{letter}_norm.weight"
                yield small(name, f"{mixer}{letter}_norm.weight", (H,), _one_added)
        else:
            yield from _delta(config, read, f"{here}linear_attn.", there, one, small)
        yield from _feed_forward(config, read, f"{here}mlp.", there, one, small)


def _one_added(weight: Tensor) -> Tensor:
    return 1.0 + weight


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _delta(  # type: ignore[no-untyped-def]
    config: ModelConfig, read: Read, mixer: str, there: str, one, small
) -> Iterator[GgufTensor]:
    D, channels = config.hidden_size, config.conv_channels
    heads, values = config.linear_num_value_heads, config.delta_value_dim
    G, K = config.linear_num_key_heads, config.linear_key_head_dim
    own = values // G  # values of the value heads that share a key head

    def part(wanted: str) -> Iterator[Tensor]:
        # Rows come per key head: its query, its key, the values and gates of its value heads.
        grouped = read(f"{mixer}in_proj_qkvz.weight").view(G, 2 * K + 2 * own, D)
        q, k, v, z = grouped.split([K, K, own, own], dim=1)
        for piece in (z,) if wanted == "gates" else (q, k, v):
            yield piece.reshape(-1, D)

    yield GgufTensor(f"{there}attn_qkv.weight", (channels, D), False, partial(part, "inputs"))
    yield GgufTensor(f"{there}attn_gate.weight", (values, D), False, partial(part, "gates"))
    yield one(f"{there}ssm_ba.weight", f"{mixer}in_proj_ba.weight", (2 * heads, D))
    taps = (channels, config.linear_conv_kernel_dim)
    yield small(f"{there}ssm_conv1d.weight", f"{mixer}conv1d.weight", taps, _as_it_is)
    yield small(f"{there}ssm_a", f"{mixer}A_log", (heads,), lambda a: -torch.exp(a))
    yield small(f"{there}ssm_dt.bias", f"{mixer}dt_bias", (heads,), _as_it_is)
    width = (config.linear_value_head_dim,)
    yield small(f"{there}ssm_norm.weight", f"{mixer}norm.weight", width, _as_it_is)
    yield one(f"{there}ssm_out.weight", f"{mixer}out_proj.weight", (D, values))


def _feed_forward(  # type: ignore[no-untyped-def]
    config: ModelConfig, read: Read, mlp: str, there: str, one, small
) -> Iterator[GgufTensor]:
    D, E, F = config.hidden_size, config.num_experts, config.moe_intermediate_size
    S = config.shared_expert_intermediate_size
    yield small(f"{there}ffn_gate_inp.weight", f"{mlp}gate.weight", (E, D), _as_it_is)
    gate = f"{mlp}shared_expert_gate.weight"
    yield small(f"{there}ffn_gate_inp_shexp.weight", gate, (D,), _as_it_is)

    def experts(name: str) -> Iterator[Tensor]:
        for e in range(E):
            yield read(f"{mlp}experts.{e}.{name}_proj.weight")

    for name in ("gate", "up", "down"):
        shared = (D, S) if name == "down" else (S, D)
        source = f"{mlp}shared_expert.{name}_proj.weight"
        yield one(f"{there}ffn_{name}_shexp.weight", source, shared)
        stack = (E, D, F) if name == "down" else (E, F, D)
        yield GgufTensor(f"{there}ffn_{name}_exps.weight", stack, False, partial(experts, name))


# -- the header ----------------------------------------------------------------------------------


def _describe(writer: Any, config: ModelConfig, name: str) -> None:
    add = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.rotary_dim,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.delta_value_dim,
        "full_attention_interval": _interval(config),
    }
    writer.add_name(name)
    for key, value in add.items():
        writer.add_uint32(f"{ARCHITECTURE}.{key}", value)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.rope_theta)
    writer.add_file_type(_MOSTLY_BF16)
    tokens = _byte_names()[: config.vocab_size]
    tokens += [f"filler{i}" for i in range(len(tokens), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(False)


def _interval(config: ModelConfig) -> int:
    """Every so many layers one attends; RequestError if they do not stand at equal distances."""
    places = config.attention_layers
    every = places[0] + 1 if places else config.num_hidden_layers + 1
    expected = tuple(range(every - 1, config.num_hidden_layers, every))
    if tuple(places) != expected:
        raise RequestError(
            f"--against llama.cpp: its {ARCHITECTURE} architecture wants attention layers at equal "
            f"distances, found them at {list(places)}. Compare with transformers instead."
        )
    return every


def _byte_names() -> list[str]:
    """The 256 bytes as a byte-level vocabulary names them: printable ones as themselves."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(rest)) for b in range(256)]
