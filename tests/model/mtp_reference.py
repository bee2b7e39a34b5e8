"""The multi-token-prediction head twice more, each written without a look at ``qnext.model``.

transformers drops these tensors when it loads a Qwen3-Next checkpoint, so there is nothing to call
for comparison. ``by_equations`` follows the published equations and tensor names with plain loops
over tokens, heads and experts in float64. ``by_transformers`` puts the tensors into the generic
MTP classes of transformers, which were written for other families.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """Mistakes that have been made with such heads, each of which a test must notice."""

    hidden_first: bool = False
    """The projection reads [hidden ; embedding] instead of [embedding ; hidden]."""
    output_norm_missing: bool = False
    """The head's logits are taken before ``mtp.norm``."""


def by_equations(
    tensors: Mapping[str, Array],
    raw: Mapping[str, Any],
    tokens: list[int],
    hidden: Array,
    wrong: Wrong | None = None,
) -> tuple[Array, Array]:
    """Rows after ``mtp.norm`` [n, D] and logits [n, V] in float64.

    Row t reads ``tokens[t]``, which stands at sequence index t + 1, and ``hidden[t]``, what the
    model (or, when drafting further, this head) put out at index t.
    """
    wrong = wrong or Wrong()
    w = {name: value.astype(np.float64) for name, value in tensors.items()}
    eps = raw["rms_norm_eps"]
    rows = []
    for t, token in enumerate(tokens):
        e = _norm(w["model.embed_tokens.weight"][token], w["mtp.pre_fc_norm_embedding.weight"], eps)
        c = _norm(hidden[t].astype(np.float64), w["mtp.pre_fc_norm_hidden.weight"], eps)
        pair = np.concatenate([c, e] if wrong.hidden_first else [e, c])
        rows.append(w["mtp.fc.weight"] @ pair)
    layer = {
        name.removeprefix("mtp.layers.0."): value
        for name, value in w.items()
        if name.startswith("mtp.layers.0.")
    }
    normed = [_norm(row, layer["input_layernorm.weight"], eps) for row in rows]
    rows = [row + y for row, y in zip(rows, _attention(layer, raw, normed), strict=True)]
    outs = []
    for row in rows:
        row = row + _mixture(layer, raw, _norm(row, layer["post_attention_layernorm.weight"], eps))
        outs.append(row if wrong.output_norm_missing else _norm(row, w["mtp.norm.weight"], eps))
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return np.stack(outs), np.stack([head @ u for u in outs])


def _norm(x: Array, weight: Array, eps: float) -> Array:
    return x / math.sqrt(float(np.mean(x * x)) + eps) * (1.0 + weight)


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def _attention(w: Mapping[str, Array], raw: Mapping[str, Any], rows: list[Array]) -> list[Array]:
    """Gated attention, one query of one head at a time."""
    heads, kv_heads, dim = (
        raw["num_attention_heads"], raw["num_key_value_heads"], raw["head_dim"],
    )  # fmt: skip

    def project(name: str, row: Array) -> Array:
        return w[f"self_attn.{name}.weight"] @ row + w.get(f"self_attn.{name}.bias", 0.0)

    keys, values = [], []
    for position, row in enumerate(rows):
        k, v = project("k_proj", row), project("v_proj", row)
        for kv_head in range(kv_heads):
            part = slice(kv_head * dim, (kv_head + 1) * dim)
            normed = _norm(k[part], w["self_attn.k_norm.weight"], raw["rms_norm_eps"])
            keys.append(_rotate(normed, position, raw))
            values.append(v[part])
    outs = []
    for position, row in enumerate(rows):
        q = project("q_proj", row)
        joined = []
        for head in range(heads):
            query = q[2 * head * dim : (2 * head + 1) * dim]
            gate = q[(2 * head + 1) * dim : (2 * head + 2) * dim]
            query = _norm(query, w["self_attn.q_norm.weight"], raw["rms_norm_eps"])
            query = _rotate(query, position, raw)
            kv_head = head // (heads // kv_heads)
            seen = [j * kv_heads + kv_head for j in range(position + 1)]
            scores = np.array([float(query @ keys[j]) for j in seen]) / math.sqrt(dim)
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            read = sum(share * values[j] for share, j in zip(shares, seen, strict=True))
            joined.append(read * _sigmoid(gate))
        outs.append(project("o_proj", np.concatenate(joined)))
    return outs


def _rotate(x: Array, position: int, raw: Mapping[str, Any]) -> Array:
    rotated = int(raw["head_dim"] * raw.get("partial_rotary_factor", 0.25))
    y = x.copy()
    for i in range(rotated // 2):
        angle = position * raw["rope_theta"] ** (-2 * i / rotated)
        a, b = x[i], x[i + rotated // 2]
        y[i] = a * math.cos(angle) - b * math.sin(angle)
        y[i + rotated // 2] = b * math.cos(angle) + a * math.sin(angle)
    return y


def _swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    opened = gate @ x
    return down @ (opened * _sigmoid(opened) * (up @ x))


def _mixture(w: Mapping[str, Array], raw: Mapping[str, Any], x: Array) -> Array:
    if raw["num_experts"] == 0:
        return _swiglu(x, *(w[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
    logits = w["mlp.gate.weight"] @ x
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    chosen = sorted(range(len(shares)), key=lambda expert: -shares[expert])
    chosen = chosen[: raw["num_experts_per_tok"]]
    total = sum(shares[expert] for expert in chosen) if raw["norm_topk_prob"] else 1.0
    y = np.zeros_like(x)
    for expert in chosen:
        both = w["mlp.experts.gate_up_proj"][expert]
        width = both.shape[0] // 2
        routed = _swiglu(x, both[:width], both[width:], w["mlp.experts.down_proj"][expert])
        y += shares[expert] / total * routed
    shared = (w[f"mlp.shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down"))
    opening = _sigmoid(w["mlp.shared_expert_gate.weight"][0] @ x)
    return y + opening * _swiglu(x, *shared)


RENAMED = {
    "fc.weight": "layers.0.eh_proj.weight",
    "pre_fc_norm_embedding.weight": "layers.0.enorm.weight",
    "pre_fc_norm_hidden.weight": "layers.0.hnorm.weight",
    "norm.weight": "layers.0.post_norm.weight",
}
"""Names of the head's own tensors in the generic classes; the layer goes under ``mtp_block``."""


class ByTransformers:
    """The generic MTP model around a Qwen3-Next model of transformers, fed step by step."""

    def __init__(self, theirs: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
        theirs = copy.deepcopy(theirs)
        theirs.config.num_mtp_layers = 1
        theirs.config.mtp_layer_types = ["full_attention"]
        theirs.config.use_cache = True
        self.head = MtpModel(theirs, num_mtp_layers=1).eval()
        renamed = {}
        for name, value in tensors.items():
            if name.startswith("mtp."):
                own = name.removeprefix("mtp.")
                layer = own.replace("layers.0.", "layers.0.mtp_block.")
                renamed[RENAMED.get(own, layer)] = value
        missing, unexpected = self.head.load_state_dict(renamed, strict=False)
        assert not unexpected, unexpected
        assert all(name.startswith(("embed_tokens.", "shared_head.")) for name in missing), missing
        self.cache = MtpCache(config=self.head.config)
        self.length = 0

    @torch.no_grad()
    def step(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Append tokens [n] and hidden rows [n, D]; rows [n, D] and logits [n, V] of the head."""
        # Their positions are those of the tokens, one more than those of the hidden rows.
        positions = torch.arange(self.length, self.length + len(tokens)) + 1
        self.length += len(tokens)
        rows = self.head.forward_layer(
            0, hidden[None], positions[None], self.cache, input_ids=tokens[None]
        )
        return rows[0], self.head.shared_head(rows[0])
