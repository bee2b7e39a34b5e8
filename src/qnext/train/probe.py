"""A look inside the model on a few documents: activations, attention to the first token, gates.

Nothing is trained and nothing of the run changes. Published figures to compare with (gated
attention, arXiv 2505.06708): without the output gate the first token takes 46.7 % of the attention
and activations reach 1,053; with it 4.8 % and 94.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qnext.model.attention import GatedAttention
from qnext.model.batch import TokenBatch
from qnext.model.block import DecoderLayer
from qnext.model.deltanet import GatedDeltaNet
from qnext.model.layers import Taps
from qnext.model.model import CausalLM
from qnext.train.batch import TrainBatch

TOKENS = 1024
"""Tokens of documents that are looked at."""
EARLY = 64
"""Queries before this position are left out of the mass on the first token."""
MASSIVE = 1000.0
"""Ratio of largest to median activation that is worth a warning."""
_SLOW = 0.999


@torch.no_grad()
def look(model: CausalLM, batch: TrainBatch) -> dict[str, Any]:
    """Figures of the main model on the longest documents of a batch, lists by layer.

    ``activation_max``, ``activation_rms`` and ``activation_ratio`` (largest over median) of every
    layer's output; ``first_token_mass`` of every full-attention layer, averaged over heads and over
    queries from 64 on; ``gate_open``, the mean of its output gate; ``delta_keep`` and
    ``delta_write``, the means of decay and write strength of every delta layer, and
    ``delta_slow``, the share of heads that forget less than a thousandth per token;
    ``router_margin``, the probability of the first expert less that of the second.
    """
    found: dict[str, list[float]] = {}

    def add(name: str, value: Tensor | float) -> None:
        found.setdefault(name, []).append(float(value))

    def layer_output(module: object, inputs: object, output: Tensor) -> None:
        size = output.detach().float().abs().flatten()
        largest = size.max()
        add("activation_max", largest)
        add("activation_rms", size.square().mean().sqrt())
        # Every seventh number is enough for a median, and 7 shares no factor with common widths.
        add("activation_ratio", largest / size[::7].median().clamp_min(1e-12))

    def gates(module: GatedAttention) -> Any:
        def hook(projection: object, inputs: object, output: Tensor) -> None:
            _, gate = output.unflatten(-1, (-1, 2 * module.head_dim)).chunk(2, dim=-1)
            add("gate_open", torch.sigmoid(gate.float()).mean())

        return hook

    def decays(module: GatedDeltaNet) -> Any:
        def hook(projection: object, inputs: object, output: Tensor) -> None:
            b, a = output.float().unflatten(-1, (module.key_heads, -1)).chunk(2, dim=-1)
            rate = module.A_log.float().exp()
            keep = torch.exp(-rate * F.softplus(a.flatten(-2) + module.dt_bias.float()))
            add("delta_keep", keep.mean())
            add("delta_write", torch.sigmoid(b).mean())
            add("delta_slow", (keep.mean(0) > _SLOW).float().mean())

        return hook

    handles: list[Any] = []
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        handles.append(layer.register_forward_hook(layer_output))
        if layer.kind == "linear_attention":
            mixer = layer.linear_attn
            handles.append(mixer.in_proj_ba.register_forward_hook(decays(mixer)))
        elif layer.self_attn.gated:
            mixer = layer.self_attn
            handles.append(mixer.q_proj.register_forward_hook(gates(mixer)))
    taps = Taps(want_attentions=True, want_router_logits=True)
    try:
        model.run(_longest(batch, model.device), taps=taps)
    finally:
        for handle in handles:
            handle.remove()
    for per_document in taps.attentions:
        add("first_token_mass", _first_token_mass(per_document))
    for logits_PE in taps.router_logits:
        if logits_PE.shape[-1] > 1:
            first, second = logits_PE.float().softmax(-1).topk(2, dim=-1).values.unbind(-1)
            add("router_margin", (first - second).mean())
    return {name: [round(value, 6) for value in values] for name, values in found.items()}


def _first_token_mass(documents: list[Tensor]) -> float:
    """Mean over heads and late queries of the weight on position 0, [N, T, T] per document."""
    longest = max(weights.shape[-1] for weights in documents)
    from_query = EARLY if longest > EARLY else longest // 2
    late = [w[:, from_query:, 0].flatten() for w in documents if w.shape[-1] > from_query]
    return float(torch.cat(late).mean()) if late else float("nan")


def _longest(batch: TrainBatch, device: torch.device) -> TokenBatch:
    """The longest documents, together about ``TOKENS`` tokens."""
    starts = batch.cu_seqlens
    spans = [(starts[i], starts[i + 1]) for i in range(batch.documents)]
    spans.sort(key=lambda span: span[0] - span[1])
    picked: list[Tensor] = []
    room = TOKENS
    for start, end in spans:
        end = min(end, start + room)
        picked.append(batch.ids[start:end])
        room -= end - start
        if room <= 0:
            break
    return TokenBatch.pack(picked, device=device)
