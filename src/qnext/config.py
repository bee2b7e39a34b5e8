"""ModelConfig: what a checkpoint's ``config.json`` says, checked once and never changed.

Field names are the keys of the published files. Both spellings of the rotary settings are read
(flat ``rope_theta`` / ``rope_scaling`` and nested ``rope_parameters``), as are ``dtype`` /
``torch_dtype`` and ``layer_types`` / ``full_attention_interval``. Keys this file does not know are
kept and written back. Tensor shapes follow from here; parameter counts and bytes: ``cost.py``.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from qnext.errors import ConfigError

MODEL_TYPES = {
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
LAYER_TYPES = ("linear_attention", "full_attention")
DTYPES = ("bfloat16", "float16", "float32")
ROPE_TYPES = ("default", "linear", "yarn")


def read_json(path: str | Path) -> dict[str, Any]:
    """The keys of a ``config.json``, given the file or its folder. Raises ConfigError."""
    return _read(path)[0]


def _read(path: str | Path) -> tuple[dict[str, Any], Path]:
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"{file} is not there. Give a model folder that holds config.json, or that file."
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file} is not valid JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(raw).__name__}.")
    return cast("dict[str, Any]", raw), file


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position settings of the full-attention layers."""

    rope_type: str = "default"
    """default, linear, or yarn."""
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    """Share of each head's dimensions that is rotated; the rest carries no position."""
    factor: float = 1.0
    """Context extension factor of linear and yarn."""
    original_max_position_embeddings: int | None = None
    """Context length the model was trained at; yarn interpolates beyond it."""
    attention_factor: float | None = None
    """Multiplier of cos and sin under yarn; None derives 0.1 ln(factor) + 1."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ConfigError(
                f"config.json: rope_type {self.rope_type!r} is not supported; "
                f"expected one of {', '.join(ROPE_TYPES)}."
            )
        if not 0.0 < self.partial_rotary_factor <= 1.0:
            raise ConfigError(
                "config.json: partial_rotary_factor must lie in (0, 1], "
                f"found {self.partial_rotary_factor}."
            )
        if self.rope_theta <= 0 or self.factor <= 0:
            raise ConfigError(
                "config.json: rope_theta and the rope factor must be positive, "
                f"found {self.rope_theta} and {self.factor}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shapes and constants of one model. Raises ConfigError when they contradict each other."""

    model_type: str
    """qwen3_next, qwen3 (dense) or qwen3_moe: the same layers, configured differently."""
    vocab_size: int
    """Rows of the embedding; the tokenizer may define fewer ids."""
    hidden_size: int
    num_hidden_layers: int
    """Decoder layers, the multi-token-prediction layer not counted."""
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    """Width of the dense feed-forward; unused in layers that route to experts."""
    layer_types: tuple[str, ...]
    """One of LAYER_TYPES for each layer."""
    rope: RopeConfig
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    hidden_act: str = "silu"
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    num_experts: int = 0
    """Routed experts of a sparse layer; 0 makes every layer dense."""
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    """Width of the shared expert; 0 for none (Qwen3-MoE)."""
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001
    num_mtp_layers: int = 0
    """Multi-token-prediction layers. The loader sets it from the tensors that are present."""
    dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    source: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)
    """The file as it was read; ``to_dict`` writes its keys back, unknown ones included."""

    # -- reading and writing ---------------------------------------------------------------------

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Read a ``config.json`` or the folder that holds it."""
        raw, file = _read(path)
        try:
            return cls.from_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{file}: {str(error).removeprefix('config.json: ')}") from None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Parse the keys of ``config.json``; absent ones take the defaults of the family."""
        read = _Reader(raw)
        model_type = read.model_type()
        hybrid, moe = model_type == "qwen3_next", model_type != "qwen3"
        layers = read.integer("num_hidden_layers", None)
        heads = read.integer("num_attention_heads", None)
        experts = read.integer(
            "num_experts", read.integer("num_local_experts", 512 if hybrid else 128)
        )
        return cls(
            model_type=model_type,
            vocab_size=read.integer("vocab_size", None),
            hidden_size=read.integer("hidden_size", None),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=read.integer("num_key_value_heads", 2 if hybrid else heads),
            head_dim=read.head_dim(model_type, heads),
            intermediate_size=read.integer("intermediate_size", 5632 if hybrid else None),
            layer_types=read.layer_types(layers, hybrid),
            rope=read.rope(0.25 if hybrid else 1.0),
            max_position_embeddings=read.integer("max_position_embeddings", 32768),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            initializer_range=read.number("initializer_range", 0.02),
            tie_word_embeddings=read.boolean("tie_word_embeddings", False),
            attention_bias=read.boolean("attention_bias", False),
            hidden_act=str(raw.get("hidden_act", "silu")),
            linear_num_key_heads=read.integer("linear_num_key_heads", 16),
            linear_num_value_heads=read.integer("linear_num_value_heads", 32),
            linear_key_head_dim=read.integer("linear_key_head_dim", 128),
            linear_value_head_dim=read.integer("linear_value_head_dim", 128),
            linear_conv_kernel_dim=read.integer("linear_conv_kernel_dim", 4),
            num_experts=experts if moe else 0,
            num_experts_per_tok=read.integer("num_experts_per_tok", 10 if hybrid else 8)
            if moe
            else 0,
            moe_intermediate_size=read.integer("moe_intermediate_size", 512 if hybrid else 768)
            if moe
            else 0,
            shared_expert_intermediate_size=read.integer("shared_expert_intermediate_size", 512)
            if hybrid
            else 0,
            norm_topk_prob=read.boolean("norm_topk_prob", hybrid),
            decoder_sparse_step=read.integer("decoder_sparse_step", 1),
            mlp_only_layers=read.integers("mlp_only_layers"),
            router_aux_loss_coef=read.number("router_aux_loss_coef", 0.001),
            num_mtp_layers=read.mtp_layers(1 if hybrid else 0),
            dtype=read.dtype(),
            bos_token_id=read.token_id("bos_token_id"),
            eos_token_id=read.token_ids("eos_token_id"),
            pad_token_id=read.token_id("pad_token_id"),
            source=dict(raw),
        )

    def to_dict(self) -> dict[str, Any]:
        """The keys of ``config.json``: those that were read, verbatim, plus what changed since."""
        mine = self._as_json()
        if not self.source:
            return mine
        then = ModelConfig.from_dict(self.source)._as_json()
        out = dict(self.source)
        changed = {key for key in mine if mine[key] != then[key]}
        if changed & {"rope_theta", "partial_rotary_factor", "rope_scaling"}:
            # Nested values win when a file is read, so the flat spelling needs the other one gone.
            out.pop("rope_parameters", None)
            changed |= {"rope_theta", "partial_rotary_factor", "rope_scaling"}
        if "dtype" in changed:
            out.pop("torch_dtype", None)
        if "num_nextn_predict_layers" in changed:
            out.pop("mtp_num_hidden_layers", None)
        if "num_experts" in changed:
            out.pop("num_local_experts", None)
        out.update({key: mine[key] for key in mine if key in changed})
        return out

    def _as_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"architectures": [MODEL_TYPES[self.model_type]]}
        for item in fields(self):
            if item.name not in ("rope", "source", "num_mtp_layers"):
                value = getattr(self, item.name)
                if isinstance(value, tuple):
                    value = list(cast("tuple[Any, ...]", value))
                out[item.name] = value
        rope = self.rope
        out["rope_theta"] = rope.rope_theta
        out["partial_rotary_factor"] = rope.partial_rotary_factor
        out["rope_scaling"] = None
        if rope.rope_type != "default":
            optional = {
                key: getattr(rope, key)
                for key in (
                    "original_max_position_embeddings",
                    "attention_factor",
                    "mscale",
                    "mscale_all_dim",
                )
                if getattr(rope, key) is not None
            }
            out["rope_scaling"] = {
                "rope_type": rope.rope_type,
                "factor": rope.factor,
                "beta_fast": rope.beta_fast,
                "beta_slow": rope.beta_slow,
                "truncate": rope.truncate,
                **optional,
            }
        if self.model_type == "qwen3_next":
            out["num_nextn_predict_layers"] = self.num_mtp_layers
        return out

    # -- derived values --------------------------------------------------------------------------

    @property
    def is_hybrid(self) -> bool:
        """Whether this is Qwen3-Next: zero-centred norms, gated attention, delta layers."""
        return self.model_type == "qwen3_next"

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def delta_key_dim(self) -> int:
        """Width of all delta queries (or keys) of one token."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def delta_value_dim(self) -> int:
        """Width of all delta values of one token."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: queries, keys and values."""
        return 2 * self.delta_key_dim + self.delta_value_dim

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the full-attention layers."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "full_attention")

    @property
    def delta_layers(self) -> tuple[int, ...]:
        """Indices of the Gated DeltaNet layers."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "linear_attention")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Token ids that end a sequence; empty when the file names none."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    def is_sparse(self, layer: int) -> bool:
        """Whether the feed-forward of this layer routes to experts."""
        return (
            self.num_experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    # -- checks ----------------------------------------------------------------------------------

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise ConfigError(
                f"config.json: model_type {self.model_type!r} is not supported; "
                f"expected one of {', '.join(MODEL_TYPES)}."
            )
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings",
            "decoder_sparse_step",
        ):  # fmt: skip
            self._positive(name)
        self._multiple("num_attention_heads", "num_key_value_heads")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ConfigError(
                f"config.json: layer_types has {len(self.layer_types)} entries, "
                f"num_hidden_layers says {self.num_hidden_layers}."
            )
        for i, kind in enumerate(self.layer_types):
            if kind not in LAYER_TYPES:
                raise ConfigError(
                    f"config.json: layer_types[{i}] is {kind!r}; "
                    f"expected one of {', '.join(LAYER_TYPES)}."
                )
        if self.delta_layers:
            if not self.is_hybrid:
                raise ConfigError(
                    f"config.json: layer_types[{self.delta_layers[0]}] is linear_attention, "
                    f"which model_type {self.model_type} does not have."
                )
            for name in (
                "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
                "linear_value_head_dim",
            ):  # fmt: skip
                self._positive(name)
            self._multiple("linear_num_value_heads", "linear_num_key_heads")
            if self.linear_conv_kernel_dim < 2:
                raise ConfigError(
                    "config.json: linear_conv_kernel_dim must be at least 2, "
                    f"found {self.linear_conv_kernel_dim}."
                )
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ConfigError(
                f"config.json: head_dim ({self.head_dim}) times partial_rotary_factor "
                f"({self.rope.partial_rotary_factor}) must give an even number of rotated "
                f"dimensions, found {self.rotary_dim}."
            )
        if any(self.is_sparse(i) for i in range(self.num_hidden_layers)) or self.num_mtp_layers:
            self._check_experts()
        if self.hidden_act != "silu":
            raise ConfigError(
                f"config.json: hidden_act {self.hidden_act!r} is not supported; expected 'silu'."
            )
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"config.json: dtype {self.dtype!r} is not supported; "
                f"expected one of {', '.join(DTYPES)}."
            )
        if self.num_mtp_layers not in (0, 1):
            raise ConfigError(
                f"config.json: {self.num_mtp_layers} multi-token-prediction layers are not "
                "supported; expected 0 or 1."
            )

    def _check_experts(self) -> None:
        if self.num_experts == 0:
            return
        self._positive("moe_intermediate_size")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"config.json: num_experts_per_tok ({self.num_experts_per_tok}) must lie between "
                f"1 and num_experts ({self.num_experts})."
            )
        if self.is_hybrid:
            self._positive("shared_expert_intermediate_size")

    def _positive(self, name: str) -> None:
        value = getattr(self, name)
        if value < 1:
            raise ConfigError(f"config.json: {name} must be at least 1, found {value}.")

    def _multiple(self, whole: str, part: str) -> None:
        a, b = getattr(self, whole), getattr(self, part)
        if a % b:
            raise ConfigError(f"config.json: {whole} ({a}) is not a multiple of {part} ({b}).")


class _Reader:
    """Typed access to a parsed ``config.json``; every error names the key."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def model_type(self) -> str:
        found = self.raw.get("model_type")
        if found is None:
            by_class = {name: kind for kind, name in MODEL_TYPES.items()}
            architectures = self.raw.get("architectures") or [None]
            found = by_class.get(str(architectures[0]))
        if found not in MODEL_TYPES:
            raise ConfigError(
                f"config.json: model_type {found!r} (architectures "
                f"{self.raw.get('architectures')}) is not supported; "
                f"expected one of {', '.join(MODEL_TYPES)}."
            )
        return cast("str", found)

    def integer(self, key: str, default: int | None) -> int:
        value = self.raw.get(key, default)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"config.json: {key} is missing; expected an integer.")
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"config.json: {key} must be an integer, found {value!r}.")
        return value

    def head_dim(self, model_type: str, heads: int) -> int:
        # Qwen3-MoE alone has no default of its own: without the key, heads share the hidden size.
        if model_type == "qwen3_moe" and heads > 0:
            default = self.integer("hidden_size", None) // heads
        else:
            default = 256 if model_type == "qwen3_next" else 128
        return self.integer("head_dim", default)

    def optional_number(self, key: str) -> float | None:
        return None if self.raw.get(key) is None else self.number(key, 0.0)

    def number(self, key: str, default: float) -> float:
        value = self.raw.get(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ConfigError(f"config.json: {key} must be a finite number, found {value!r}.")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"config.json: {key} must be true or false, found {value!r}.")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        value: Any = self.raw.get(key) or []
        if not isinstance(value, list) or any(
            not isinstance(item, int) for item in cast("list[Any]", value)
        ):
            raise ConfigError(f"config.json: {key} must be a list of integers, found {value!r}.")
        return tuple(cast("list[int]", value))

    def token_ids(self, key: str) -> int | tuple[int, ...] | None:
        value = self.raw.get(key)
        if isinstance(value, list):
            return self.integers(key)
        return self.token_id(key)

    def token_id(self, key: str) -> int | None:
        value = self.raw.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(f"config.json: {key} must be a token id, found {value!r}.")
        return value

    def dtype(self) -> str:
        value = self.raw.get("dtype") or self.raw.get("torch_dtype") or "float32"
        return str(value).removeprefix("torch.")

    def mtp_layers(self, default: int) -> int:
        key = "num_nextn_predict_layers"
        return self.integer(key, self.integer("mtp_num_hidden_layers", default))

    def layer_types(self, layers: int, hybrid: bool) -> tuple[str, ...]:
        given = self.raw.get("layer_types")
        if given is not None:
            if not isinstance(given, list):
                raise ConfigError(f"config.json: layer_types must be a list, found {given!r}.")
            return tuple(str(item) for item in cast("list[Any]", given))
        if not hybrid:
            if self.raw.get("use_sliding_window"):
                raise ConfigError(
                    "config.json: use_sliding_window is true; "
                    "sliding-window attention is not supported."
                )
            return ("full_attention",) * layers
        interval = self.integer("full_attention_interval", 4)
        if interval < 1:
            raise ConfigError(
                f"config.json: full_attention_interval must be at least 1, found {interval}."
            )
        return tuple(
            "full_attention" if (i + 1) % interval == 0 else "linear_attention"
            for i in range(layers)
        )

    def rope(self, default_partial: float) -> RopeConfig:
        flat = {k: self.raw[k] for k in ("rope_theta", "partial_rotary_factor") if k in self.raw}
        merged = {**flat, **self._rope_settings()}
        read = _Reader(merged)
        kind = str(merged.get("rope_type") or "default")
        original, factor = None, read.optional_number("factor")
        if kind == "yarn":
            longest = self.integer("max_position_embeddings", 32768)
            original = read.integer("original_max_position_embeddings", longest)
            if original < 1:
                raise ConfigError(
                    "config.json: original_max_position_embeddings must be at least 1, "
                    f"found {original}."
                )
            factor = factor if factor is not None else longest / original
        return RopeConfig(
            rope_type=kind,
            rope_theta=read.number("rope_theta", 10000.0),
            partial_rotary_factor=read.number("partial_rotary_factor", default_partial),
            factor=factor if factor is not None else 1.0,
            original_max_position_embeddings=original,
            attention_factor=read.optional_number("attention_factor"),
            beta_fast=read.optional_number("beta_fast") or 32.0,
            beta_slow=read.optional_number("beta_slow") or 1.0,
            mscale=read.optional_number("mscale"),
            mscale_all_dim=read.optional_number("mscale_all_dim"),
            truncate=read.boolean("truncate", True),
        )

    def _rope_settings(self) -> dict[str, Any]:
        """``rope_scaling`` and ``rope_parameters`` in one; they must not disagree."""
        older, newer = self._object("rope_scaling"), self._object("rope_parameters")
        for settings in (older, newer):
            if "type" in settings:
                settings.setdefault("rope_type", settings.pop("type"))
        for key in older.keys() & newer.keys():
            if older[key] != newer[key]:
                raise ConfigError(
                    f"config.json: rope_scaling says {key} {older[key]!r}, rope_parameters says "
                    f"{newer[key]!r}. Keep one of the two objects."
                )
        return {**older, **newer}

    def _object(self, key: str) -> dict[str, Any]:
        value = self.raw.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise ConfigError(f"config.json: {key} must be an object, found {value!r}.")
        return dict(cast("dict[str, Any]", value))
