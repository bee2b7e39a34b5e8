"""What a model costs, from its configuration alone: parameters, arithmetic, bytes.

Everything is a sum over one inventory of weights, so that no two figures can disagree. Nothing is
loaded and torch is not imported. FLOPs count a multiply-add as two. The figures of the published
models (technical report and model cards of Qwen3 and Qwen3-Next) are reproduced by the tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod

from qnext.config import ModelConfig
from qnext.errors import ConfigError
from qnext.quantization import Bits, format_of, matrix_bytes

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
"""Bytes of one number. ``fp8`` is not here: it keeps part of the weights in bfloat16."""
PACKED = {"int8": Bits.all(8), "int4": Bits.all(4)}
"""Names of weights packed alike in every part; a ``Bits`` says it for each part."""
FP8_BLOCK = 128
"""Rows and columns that share one scale in the published FP8 checkpoints."""
CHUNK = 64
"""Tokens the chunked delta rule solves at once."""
MTP = "mtp"


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """Some tensors of one shape in one component of the model."""

    component: str
    shape: tuple[int, ...]
    stored: int = 1
    """How many of them the checkpoint holds."""
    used: int = 1
    """How many of them one token is multiplied with (or, for vectors, passes through)."""
    is_matrix: bool = True
    """Whether it enters a matrix product; norms, decay terms and convolutions do not."""
    has_fp8: bool = False
    """Whether the published FP8 checkpoints store it in FP8."""
    part: str | None = None
    """The field of ``Bits`` that decides how it is packed; None: it never is."""

    @property
    def size(self) -> int:
        """Numbers in one of the tensors."""
        return prod(self.shape)

    def is_packed(self, bits: Bits | None) -> bool:
        """Whether a model of these bits packs it (None: nothing is packed)."""
        if bits is None or self.part is None:
            return False
        return format_of(getattr(bits, self.part)) is not None

    def nbytes(self, dtype: str | Bits) -> float:
        """Bytes of one of the tensors in a checkpoint of this dtype, scales and padding included.

        Stacks of packed experts are padded to 4,096 bytes besides, which is not counted: at the
        published sizes it is nothing.
        """
        bits = dtype if isinstance(dtype, Bits) else PACKED.get(dtype)
        if bits is not None:
            format = None if self.part is None else format_of(getattr(bits, self.part))
            if format is None:
                return self.size * number_bytes("bfloat16")
            return matrix_bytes(format, self.shape[0], self.shape[1])
        assert isinstance(dtype, str)
        if dtype != "fp8":
            return self.size * number_bytes(dtype)
        if not self.has_fp8:
            return self.size * number_bytes("bfloat16")
        return self.size + 4 * prod(-(-n // FP8_BLOCK) for n in self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Stored parameters by component."""

    embedding: int
    lm_head: int
    """0 when the head is the embedding."""
    delta_layers: int
    """Gated DeltaNet mixers: projections, convolution, decay terms, gated norm."""
    attention_layers: int
    """Attention mixers, the norms of queries and keys included."""
    routed_experts: int
    shared_experts: int
    routers: int
    shared_gates: int
    dense_mlps: int
    norms: int
    """The two norms of every layer and the final one."""
    mtp: int
    """The multi-token-prediction head, which the published sizes leave out."""

    @property
    def total(self) -> int:
        """The main model, without the MTP head."""
        return sum(getattr(self, item.name) for item in fields(self)) - self.mtp

    def as_dict(self) -> dict[str, int]:
        """Component -> parameters, in the order a token meets them."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def number_bytes(dtype: str) -> float:
    """Bytes of one number. Raises ConfigError for a dtype that is not in ``BYTES``."""
    if dtype not in BYTES:
        raise ConfigError(f"dtype {dtype!r} is not known; expected one of {', '.join(BYTES)}.")
    return BYTES[dtype]


def cache_dtype(dtype: str | Bits) -> str:
    """Dtype of keys and values beside such weights: fp8 and packed ones keep bfloat16."""
    if isinstance(dtype, Bits) or dtype == "fp8" or dtype in PACKED:
        return "bfloat16"
    return dtype


# -- parameters --------------------------------------------------------------------------------


def inventory(config: ModelConfig) -> tuple[Weight, ...]:
    """Every weight of the model, equal shapes grouped."""
    D, V = config.hidden_size, config.vocab_size
    weights = [
        Weight(
            component="embedding",
            shape=(V, D),
            used=0,
            is_matrix=False,
            part="head" if config.tie_word_embeddings else "embedding",
        ),
        # A tied head is stored as the embedding and still multiplies every token.
        Weight(
            component="lm_head",
            shape=(V, D),
            stored=0 if config.tie_word_embeddings else 1,
            part="head",
        ),
        Weight(component="norms", shape=(D,), is_matrix=False),
    ]
    for i, kind in enumerate(config.layer_types):
        delta = kind == "linear_attention"
        weights += _delta(config) if delta else _attention(config, "attention_layers")
        weights += _feed_forward(config, sparse=config.is_sparse(i))
        weights += [Weight(component="norms", shape=(D,), is_matrix=False)] * 2
    for _ in range(config.num_mtp_layers):
        weights += _mtp(config)
    return tuple(weights)


def parameters(config: ModelConfig) -> Parameters:
    """Stored parameters by component."""
    counts = dict.fromkeys((item.name for item in fields(Parameters)), 0)
    for weight in inventory(config):
        counts[weight.component] += weight.stored * weight.size
    return Parameters(**counts)


def active_parameters(config: ModelConfig, *, embedding: bool = False, lm_head: bool = True) -> int:
    """Parameters one token uses in the main model.

    Published figures differ in what they include; the default counts the output head and not the
    embedding, of which a token reads one row. A tied matrix is counted once.
    """
    total = 0
    for weight in _main(config):
        if weight.component == "embedding":
            counted = embedding and not (lm_head and config.tie_word_embeddings)
            total += weight.size if counted else 0
        elif weight.component != "lm_head" or lm_head:
            total += weight.used * weight.size
    return total


def mtp_active_parameters(config: ModelConfig) -> int:
    """Parameters one drafted token uses in the MTP head; the shared lm_head comes on top."""
    return sum(w.used * w.size for w in inventory(config) if w.component == MTP)


# -- arithmetic --------------------------------------------------------------------------------


def matmul_flops(config: ModelConfig) -> int:
    """FLOPs per token in products with weights: projections, experts, router, output head."""
    return sum(2 * w.used * w.size for w in _main(config) if w.is_matrix)


def attention_flops(config: ModelConfig) -> int:
    """FLOPs per token and per token of context: scores and weighted sum of all attention layers."""
    heads = config.num_attention_heads * config.head_dim
    return 4 * heads * len(config.attention_layers)


def delta_flops(config: ModelConfig, *, chunked: bool = False) -> int:
    """FLOPs per token of the delta rule in all layers, independent of the context length.

    Step by step a state element costs 7: decay, prediction, update and read-out. In chunks of C
    tokens the rule becomes matrix products: key and query Gram matrices, the inverse of one C by C
    triangle, its two products, and three products with the state.
    """
    K, M, C = config.linear_key_head_dim, config.linear_value_head_dim, CHUNK
    per_head = 6 * K * M + C * (6 * K + 4 * M) + C * C if chunked else 7 * K * M
    return per_head * config.linear_num_value_heads * len(config.delta_layers)


def decode_flops(config: ModelConfig, context: int) -> int:
    """FLOPs of one decoded token that sees ``context`` tokens."""
    return matmul_flops(config) + attention_flops(config) * context + delta_flops(config)


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs of a prompt of so many tokens, the head run on every one of them.

    Token t sees t + 1 tokens; the delta rule runs in chunks.
    """
    seen = tokens * (tokens + 1) // 2
    each = matmul_flops(config) + delta_flops(config, chunked=True)
    return each * tokens + attention_flops(config) * seen


def training_flops(config: ModelConfig, lengths: Sequence[int], *, mtp_depths: int = 0) -> int:
    """FLOPs of forward and backward over packed documents of these lengths.

    Backward costs two forwards; attention is counted causally, experts as they are used, and what
    checkpointing computes twice once. ``mtp_depths`` MTP passes come on top, each with the head.
    """
    forward = sum(prefill_flops(config, length) for length in lengths)
    if mtp_depths:
        layer = sum(2 * w.used * w.size for w in inventory(config) if w.component == MTP)
        layer += 2 * config.vocab_size * config.hidden_size
        pairs = 4 * config.num_attention_heads * config.head_dim
        for depth in range(1, mtp_depths + 1):
            for length in lengths:
                rows = max(0, length - 1 - depth)
                forward += layer * rows + pairs * (rows * (rows + 1) // 2)
    return 3 * forward


# -- bytes -------------------------------------------------------------------------------------


def weight_bytes(config: ModelConfig, dtype: str | Bits = "bfloat16", *, mtp: bool = True) -> int:
    """Bytes of a checkpoint in this dtype: float32, bfloat16, float16, fp8, or packed.

    Packed ones (``int8``, ``int4`` or the ``Bits`` of every part) keep the rest in bfloat16.

    ``fp8`` is the published layout: the large matrices in 8 bits with one float32 scale for each
    128 by 128 block, the rest in bfloat16.
    """
    chosen = inventory(config) if mtp else _main(config)
    return round(sum(w.stored * w.nbytes(dtype) for w in chosen))


def kv_bytes_per_token(
    config: ModelConfig, dtype: str = "bfloat16", *, layers: int | None = None
) -> int:
    """Bytes of keys and values one token leaves in the main model's attention layers.

    ``layers`` replaces their number, for instance 1 for the cache of the MTP head.
    """
    if layers is None:
        layers = len(config.attention_layers)
    return round(2 * config.num_key_value_heads * config.head_dim * layers * number_bytes(dtype))


def mtp_kv_bytes_per_token(config: ModelConfig, dtype: str = "bfloat16") -> int:
    """Bytes of keys and values one token leaves in the MTP head; 0 without one."""
    return kv_bytes_per_token(config, dtype, layers=config.num_mtp_layers)


def state_bytes_per_sequence(config: ModelConfig, dtype: str = "float32") -> int:
    """Bytes of recurrent state one sequence keeps, whatever its length."""
    per_head = config.linear_key_head_dim * config.linear_value_head_dim
    heads = config.linear_num_value_heads * len(config.delta_layers)
    return round(per_head * heads * number_bytes(dtype))


def conv_bytes_per_sequence(config: ModelConfig, dtype: str = "bfloat16") -> int:
    """Bytes of the convolution windows one sequence keeps: all taps but the current token's."""
    window = config.conv_channels * (config.linear_conv_kernel_dim - 1)
    return round(window * len(config.delta_layers) * number_bytes(dtype))


def slot_bytes(config: ModelConfig, dtype: str = "bfloat16") -> int:
    """Bytes a sequence or a snapshot keeps beside its pages, whatever its length.

    Recurrent state in float32, convolution windows, and the last hidden row for the MTP head.
    """
    return round(
        state_bytes_per_sequence(config)
        + conv_bytes_per_sequence(config, dtype)
        + config.hidden_size * number_bytes(dtype)
    )


def pending_bytes(
    config: ModelConfig, dtype: str = "bfloat16", *, tokens: int, rollback: str = "snapshots"
) -> int:
    """Bytes a sequence needs while it is open how many of ``tokens`` new tokens stay.

    With "snapshots" the recurrent state after each of them, with "replay" the inputs of the delta
    rule instead (keys, values, decay and write strength), with "deferred" what it would add (keys,
    corrections, decay) in float32; with all of them the convolution inputs.
    """
    layers = len(config.delta_layers)
    inputs = config.conv_channels * number_bytes(dtype)
    if rollback == "snapshots":
        return round(tokens * (layers * inputs + state_bytes_per_sequence(config)))
    if rollback == "deferred":
        added = config.delta_key_dim + config.delta_value_dim + config.linear_num_value_heads
        return round(tokens * layers * (inputs + added * number_bytes("float32")))
    rule = (config.delta_key_dim + config.delta_value_dim) * number_bytes(dtype)
    gates = 2 * config.linear_num_value_heads * number_bytes("float32")
    return round(tokens * layers * (inputs + rule + gates))


def backlog_bytes(config: ModelConfig, dtype: str = "bfloat16", *, tokens: int) -> int:
    """Bytes of the hidden rows of tokens that the MTP head has not read yet."""
    return round(tokens * config.hidden_size * number_bytes(dtype))


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeBytes:
    """Memory traffic of one decoded token of one sequence."""

    weights: int
    """Read: every weight the token uses, and one row of the embedding."""
    kv: int
    """Read: keys and values of the context."""
    state: int
    """Read and written: recurrent state in float32 and convolution windows."""

    @property
    def total(self) -> int:
        """All of it; at low batch, tokens per second are at most bandwidth / total."""
        return self.weights + self.kv + self.state


def decode_bytes(
    config: ModelConfig, dtype: str | Bits = "bfloat16", *, context: int
) -> DecodeBytes:
    """Memory traffic of one decoded token."""
    weights = sum(w.used * w.nbytes(dtype) for w in _main(config))
    cache = cache_dtype(dtype)
    weights += config.hidden_size * number_bytes(cache)
    state = state_bytes_per_sequence(config) + conv_bytes_per_sequence(config, cache)
    return DecodeBytes(
        weights=round(weights),
        kv=kv_bytes_per_token(config, cache) * context,
        state=2 * state,
    )


# -- steps -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """What one step of the main model moves and computes at least."""

    weights: float
    """Bytes read: every matrix once, of the routed experts those that were chosen."""
    kv: float
    """Bytes read: keys and values of the contexts."""
    state: float
    """Bytes read and written: recurrent states and convolution windows."""
    integer_operations: float
    """Operations (an addition is one, a product is one) with packed weights."""
    float_operations: float
    """Operations with other weights, in attention and in the delta rule."""

    @property
    def bytes(self) -> float:
        """All that has to pass through memory."""
        return self.weights + self.kv + self.state

    def seconds(self, *, bandwidth: float, integers: float, floats: float) -> float:
        """The limit: the larger of byte time and operation time, given what there is per second."""
        operations = self.integer_operations / integers + self.float_operations / floats
        return max(self.bytes / bandwidth, operations)


def step_cost(
    config: ModelConfig,
    dtype: str = "bfloat16",
    *,
    bits: Bits | None = None,
    contexts: Sequence[int],
    rows: int = 1,
    logit_rows: int | None = None,
    experts: float | None = None,
) -> StepCost:
    """One step of ``len(contexts)`` sequences with ``rows`` new tokens each.

    ``contexts`` are the tokens each sequence has already. ``logit_rows`` counts tokens the head is
    run on (all, if left out). ``experts`` counts the distinct routed experts that were read, summed
    over the layers; left out, those of a single token. Recurrent states are read and written once
    per sequence, keys and values read once, however many rows there are.
    """
    cache = cache_dtype(dtype)
    tokens = rows * len(contexts)
    logit_rows = tokens if logit_rows is None else logit_rows
    weights = integers = floats = 0.0
    for weight in _main(config):
        size = weight.nbytes(bits or dtype)
        if weight.component == "embedding":
            weights += tokens * size / weight.shape[0]
            continue
        read = float(weight.used)
        if weight.component == "routed_experts" and experts is not None:
            # The two kinds of matrices of an expert, of all sparse layers, share one count.
            layers = sum(config.is_sparse(i) for i in range(config.num_hidden_layers))
            read *= experts / layers / config.num_experts_per_tok
        weights += read * size
        if weight.is_matrix:
            count = logit_rows if weight.component == "lm_head" else tokens
            operations = 2.0 * weight.used * weight.size * count
            if weight.is_packed(bits):
                integers += operations
            else:
                floats += operations
    seen = sum(rows * context + rows * (rows + 1) // 2 for context in contexts)
    floats += attention_flops(config) * seen
    # Token by token: the native kernels run prompts so too, with the fewer operations.
    floats += delta_flops(config) * tokens
    state = state_bytes_per_sequence(config) + conv_bytes_per_sequence(config, cache)
    return StepCost(
        weights=weights,
        kv=float(kv_bytes_per_token(config, cache) * sum(contexts)),
        state=2.0 * state * len(contexts),
        integer_operations=integers,
        float_operations=floats,
    )


# -- shapes ------------------------------------------------------------------------------------


def _main(config: ModelConfig) -> tuple[Weight, ...]:
    return tuple(w for w in inventory(config) if w.component != MTP)


def _delta(config: ModelConfig) -> list[Weight]:
    D, name = config.hidden_size, "delta_layers"
    heads, values = config.linear_num_value_heads, config.delta_value_dim
    projected = 2 * config.delta_key_dim + 2 * values
    taps = (config.conv_channels, config.linear_conv_kernel_dim)
    return [
        Weight(component=name, shape=(projected, D), has_fp8=True, part="attention"),
        Weight(component=name, shape=(2 * heads, D)),
        Weight(component=name, shape=(D, values), has_fp8=True, part="attention"),
        Weight(component=name, shape=taps, is_matrix=False),
        Weight(component=name, shape=(heads,), stored=2, used=2, is_matrix=False),
        Weight(component=name, shape=(config.linear_value_head_dim,), is_matrix=False),
    ]


def _attention(config: ModelConfig, name: str) -> list[Weight]:
    D, H = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * H, config.num_key_value_heads * H
    projected = 2 * queries if config.is_hybrid else queries
    part = MTP if name == MTP else "attention"
    weights = [
        Weight(component=name, shape=(projected, D), has_fp8=True, part=part),
        Weight(component=name, shape=(keys, D), stored=2, used=2, has_fp8=True, part=part),
        Weight(component=name, shape=(D, queries), has_fp8=True, part=part),
        Weight(component=name, shape=(H,), stored=2, used=2, is_matrix=False),
    ]
    if config.attention_bias:
        biases = projected + 2 * keys + D
        weights.append(Weight(component=name, shape=(biases,), is_matrix=False))
    return weights


def _feed_forward(config: ModelConfig, *, sparse: bool, mtp: bool = False) -> list[Weight]:
    D = config.hidden_size

    def name(component: str) -> str:
        return MTP if mtp else component

    def mlp(component: str, width: int, stored: int, used: int) -> list[Weight]:
        routed = "experts" if component == "routed_experts" else "shared"
        part = MTP if mtp else routed
        into, back = (width, D), (D, width)
        kind = name(component)
        return [
            Weight(
                component=kind, shape=into, stored=2 * stored, used=2 * used, has_fp8=True,
                part=part,
            ),
            Weight(
                component=kind, shape=back, stored=stored, used=used, has_fp8=True, part=part
            ),
        ]  # fmt: skip

    if not sparse:
        return mlp("dense_mlps", config.intermediate_size, 1, 1)
    weights = mlp(
        "routed_experts",
        config.moe_intermediate_size,
        config.num_experts,
        config.num_experts_per_tok,
    )
    weights.append(Weight(component=name("routers"), shape=(config.num_experts, D)))
    if config.shared_expert_intermediate_size:
        weights += mlp("shared_experts", config.shared_expert_intermediate_size, 1, 1)
        weights.append(Weight(component=name("shared_gates"), shape=(1, D)))
    return weights


def _mtp(config: ModelConfig) -> list[Weight]:
    D = config.hidden_size
    return [
        Weight(component=MTP, shape=(D, 2 * D), part=MTP),
        *_attention(config, MTP),
        *_feed_forward(config, sparse=config.num_experts > 0, mtp=True),
        Weight(component=MTP, shape=(D,), stored=5, used=5, is_matrix=False),
    ]
