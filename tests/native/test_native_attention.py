"""Native paged attention equals its references: norms, rotation, pages, softmax and gate."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext.ops import Segments
from qnext.ops.attention import attention_paged_reference
from qnext.ops.norm import rms_norm_zero_centred_reference
from qnext.ops.rope import apply_rope_reference

EPS = 1e-6


@dataclass(frozen=True)
class Heads:
    """N query heads, G heads of keys, H values each, Y of them rotated."""

    N: int
    G: int
    H: int
    Y: int
    gated: bool = True
    normed: bool = True


@dataclass
class Layer:
    """One attention layer with random inputs; the caches hold `before` random positions."""

    heads: Heads
    tokens: list[int]
    before: list[int]
    first: list[int] | None = None
    dtype: torch.dtype = torch.float32
    page_size: int = 64
    seed: int = 0
    layers: int = 2
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        x, h = torch.Generator().manual_seed(self.seed), self.heads
        P = sum(self.tokens)
        widths = {"q": h.N * h.H * (2 if h.gated else 1), "k": h.G * h.H, "v": h.G * h.H}
        for name, width in widths.items():
            self.inputs[name] = torch.randn(P, width, generator=x)
        for name in ("q_norm", "k_norm"):
            self.inputs[name] = torch.randn(h.H, generator=x) * 0.2
        angles = torch.randn(P, h.Y // 2, generator=x).repeat(1, 2)
        self.inputs["cos"], self.inputs["sin"] = angles.cos(), angles.sin()
        self.first = self.first or [0] * len(self.tokens)
        lengths = [t + b for t, b in zip(self.tokens, self.before, strict=True)]
        pages = [-(-length // self.page_size) for length in lengths]
        order = torch.randperm(sum(pages) + 3, generator=x)
        self.table = torch.full((len(pages), max(pages) + 1), -1)
        shape = (len(order), self.layers, 2, self.page_size, h.G, h.H)
        # Whatever no sequence has written must never be read.
        self.cache = torch.full(shape, float("nan"), dtype=self.dtype)
        taken = 0
        for b, count in enumerate(pages):
            self.table[b, :count] = order[taken : taken + count]
            taken += count
            for at in range(self.first[b], self.before[b]):
                page = self.table[b, at // self.page_size]
                old = torch.randn(2, h.G, h.H, generator=x).to(self.dtype)
                self.cache[page, self.layers - 1, :, at % self.page_size] = old
            self.table[b, : self.first[b] // self.page_size] = -1

    def native(self, kernels: Any) -> tuple[Tensor, Tensor]:
        """The result of the kernels, and the cache after."""
        x, h = {name: value.clone() for name, value in self.inputs.items()}, self.heads
        out = torch.full((sum(self.tokens), h.N * h.H), float("nan"))
        cache = self.cache.clone()
        starts = [sum(self.tokens[:b]) for b in range(len(self.tokens))]
        kernels.attention(
            x["q"], x["k"], x["v"],
            1 + x["q_norm"] if h.normed else None, 1 + x["k_norm"] if h.normed else None, EPS,
            x["cos"], x["sin"], h.H**-0.5, cache, self.layers - 1, self.table,
            torch.tensor(starts), torch.tensor(self.tokens), torch.tensor(self.before),
            torch.tensor(self.first), h.gated, out,
        )  # fmt: skip
        return out, cache

    def reference(self, written: Tensor) -> tuple[Tensor, Tensor]:
        """The same from the plain operations; attention reads the cache the kernels have written.

        (A last bit of a norm may tip the rounding of a key to bf16.)
        """
        x, h = self.inputs, self.heads
        q = x["q"].unflatten(-1, (h.N, -1))
        q, gate = q[..., : h.H], q[..., h.H :]
        k, v = (x[name].unflatten(-1, (h.G, h.H)) for name in "kv")
        if h.normed:
            q = rms_norm_zero_centred_reference(x=q, weight=x["q_norm"], eps=EPS)
            k = rms_norm_zero_centred_reference(x=k, weight=x["k_norm"], eps=EPS)
        q = apply_rope_reference(x=q, cos=x["cos"], sin=x["sin"])
        k = apply_rope_reference(x=k, cos=x["cos"], sin=x["sin"])
        cache, row = self.cache.clone(), 0
        for b, count in enumerate(self.tokens):
            for at in range(self.before[b], self.before[b] + count):
                page = cache[self.table[b, at // self.page_size], self.layers - 1]
                page[0, at % self.page_size] = k[row].to(self.dtype)
                page[1, at % self.page_size] = v[row].to(self.dtype)
                row += 1
        assert self.first is not None
        # The reference gathers pages before the first position as well; any will do.
        out = attention_paged_reference(
            q=q, pages=written[:, self.layers - 1].float(), page_table=self.table.clamp(min=0),
            before=tuple(self.before), first=tuple(self.first), scale=h.H**-0.5,
            segments=Segments.of(self.tokens),
        )  # fmt: skip
        if h.gated:
            out = out * gate.sigmoid()
        return out.flatten(-2), cache


def assert_equal_to_reference(kernels: Any, layer: Layer) -> None:
    got, cache = layer.native(kernels)
    want, want_cache = layer.reference(cache)
    assert got.isfinite().all()
    # One row at a time: a wrong row must not hide behind many right ones.
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    by_pairs = layer.dtype == torch.bfloat16 and kernels.isa() == "avx512"
    assert error.max() < (6e-3 if by_pairs else 5e-6), error.max()
    written, expected = cache.float(), want_cache.float()
    assert torch.equal(written.isnan(), expected.isnan())
    step = 2**-7 if layer.dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(written, expected, rtol=step, atol=2e-6, equal_nan=True)


HEADS = [
    Heads(N=8, G=1, H=8, Y=4),
    Heads(N=2, G=2, H=20, Y=20, gated=False),
    Heads(N=4, G=2, H=64, Y=64, gated=False, normed=False),
    Heads(N=3, G=1, H=128, Y=128, gated=False),
    Heads(N=16, G=2, H=256, Y=64),
    Heads(N=14, G=2, H=36, Y=2),
]
BATCHES = {
    "one token": ([1], [0]),
    "second token": ([1], [1]),
    "one after many": ([1], [1000]),
    "few tokens": ([1, 2, 3, 5], [63, 64, 65, 1000]),
    "ragged": ([16, 0, 17, 1, 3], [0, 1, 63, 511, 512]),
    "prompts": ([64, 65, 130], [0, 0, 0]),
    "chunks": ([130, 65], [1000, 64]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("heads", HEADS, ids=lambda h: f"{h.N}x{h.G}x{h.H}")
def test_equals_the_reference(kernels, heads, batch, dtype):
    tokens, before = BATCHES[batch]
    assert_equal_to_reference(kernels, Layer(heads, tokens, before, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_positions_before_the_first_do_not_exist(kernels, dtype):
    layer = Layer(
        Heads(N=8, G=2, H=32, Y=16), [1, 3, 70, 2, 1], [1, 66, 700, 1300, 5],
        first=[1, 65, 600, 1024, 5], dtype=dtype,
    )  # fmt: skip
    assert_equal_to_reference(kernels, layer)


@pytest.mark.parametrize("page_size", [1, 16, 48, 256])
def test_pages_of_any_size(kernels, page_size):
    layer = Layer(Heads(N=4, G=2, H=16, Y=8), [3, 70], [140, 30], page_size=page_size)
    assert_equal_to_reference(kernels, layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("tokens", "before"),
    [([1], [1500]), ([1, 3, 200, 2], [1500, 600, 900, 0]), ([700], [0])],
    ids=["decode", "mixed", "prefill"],
)
def test_the_number_of_threads_changes_no_bit(kernels, tokens, before, dtype):
    layer = Layer(Heads(N=16, G=2, H=40, Y=10), tokens, before, dtype=dtype)
    outs = []
    for threads in (1, 2, 3, 7):
        kernels.set_threads(threads)
        outs.append(layer.native(kernels)[0])
    for other in outs[1:]:
        assert torch.equal(outs[0], other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_chunks_and_company_change_no_bit(kernels, dtype):
    heads, length = Heads(N=8, G=2, H=40, Y=20), 1100
    whole = Layer(heads, [length], [0], dtype=dtype)
    want, _ = whole.native(kernels)
    # The same sequence in three steps, beside another one, its pages elsewhere.
    cuts, cache = [0, 1, 600, 602, length], None
    for begin, end in pairwise(cuts):
        step = Layer(heads, [5, end - begin], [90, begin], dtype=dtype)
        for name in ("q", "k", "v", "cos", "sin"):
            step.inputs[name][5:] = whole.inputs[name][begin:end]
        step.inputs["q_norm"], step.inputs["k_norm"] = (
            whole.inputs["q_norm"], whole.inputs["k_norm"],
        )  # fmt: skip
        pages = -(-length // 64)
        step.table = torch.full((2, pages), -1)
        step.table[0, :2] = torch.tensor([pages, pages + 1])
        step.table[1] = torch.arange(pages).flip(0)
        shape = (pages + 2, *step.cache.shape[1:])
        if cache is None:
            cache = torch.full(shape, float("nan"), dtype=dtype)
            cache[pages:] = 0.5
        step.cache = cache
        got, cache = step.native(kernels)
        assert torch.equal(got[5:], want[begin:end]), (begin, end)


def test_a_nan_is_seen_by_later_tokens_alone(kernels):
    for dtype in (torch.float32, torch.bfloat16):
        layer = Layer(Heads(N=4, G=1, H=16, Y=16), [40], [100], dtype=dtype)
        layer.inputs["k"][20, 3] = float("nan")
        got, _ = layer.native(kernels)
        assert got[:20].isfinite().all()
        assert got[20:].isnan().all()


def test_large_scores_do_not_overflow(kernels):
    for dtype in (torch.float32, torch.bfloat16):
        layer = Layer(
            Heads(N=2, G=1, H=16, Y=16, normed=False), [3, 20], [600, 0], dtype=dtype, seed=3
        )
        layer.inputs["q"][:, :16] *= 300
        got, _ = layer.native(kernels)
        assert got.isfinite().all()


def test_what_does_not_fit_is_refused(kernels):
    layer = Layer(Heads(N=4, G=2, H=16, Y=8), [2], [10])
    layer.table[0, 0] = 99
    with pytest.raises(ValueError, match="no such page"):
        layer.native(kernels)
    layer = Layer(Heads(N=4, G=2, H=16, Y=8), [2], [10])
    layer.cache = layer.cache.double()
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        layer.native(kernels)
    layer = Layer(Heads(N=4, G=2, H=16, Y=8), [2], [10])
    layer.first = [11]
    with pytest.raises(ValueError, match=r"0 \.\.\. before"):
        layer.native(kernels)
    layer = Layer(Heads(N=4, G=2, H=16, Y=8), [2], [10])
    layer.inputs["v"] = layer.inputs["v"][:, 1:].contiguous()
    with pytest.raises(ValueError, match="do not agree"):
        layer.native(kernels)
