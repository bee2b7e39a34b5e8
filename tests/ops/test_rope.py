"""Rotary positions: the published frequencies, YaRN's numbers, and the rotation itself."""

import math

import pytest
import torch
from torch import Tensor

from qnext.ops.rope import (
    apply_rope_reference,
    rope_frequencies,
    rope_table,
    yarn_attention_factor,
    yarn_frequencies,
)

OP = "apply_rope"
OFFICIAL = {"rotary_dim": 64, "theta": 1e7}
YARN = {
    **OFFICIAL,
    "factor": 4.0,
    "trained_length": 262144,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
}


class TestFrequencies:
    def test_published_values(self):
        got = rope_frequencies(**OFFICIAL)
        assert got.shape == (32,)
        want = torch.tensor([1.0, 0.60429639, 0.36517414, 0.22067340, 0.13335215])
        assert torch.allclose(got[:5], want, rtol=2e-7, atol=0)
        assert float(got[-1]) == pytest.approx(1.6548171e-07, rel=1e-6)

    def test_definition(self):
        got = rope_frequencies(rotary_dim=10, theta=500.0)
        want = [500.0 ** (-2 * i / 10) for i in range(5)]
        assert torch.allclose(got, torch.tensor(want))


class TestYarn:
    def ratios(self, **changes: object) -> list[float]:
        base = rope_frequencies(**OFFICIAL)
        return (base / yarn_frequencies(**{**YARN, **changes})).tolist()

    def test_ratios_to_the_plain_frequencies(self):
        ratios = self.ratios()
        ramp = [1, 1.1034483, 1.2307693, 1.3913043, 1.6, 1.8823530, 2.2857143, 2.9090908, 4]
        assert ratios[:14] == pytest.approx([1.0] * 14, rel=1e-6)
        assert ratios[14:23] == pytest.approx(ramp, rel=1e-6)
        assert ratios[23:] == pytest.approx([4.0] * 9, rel=1e-6)

    def test_ramp_ends_without_rounding(self):
        """Without truncation it runs from 14.24096 to 21.12165: 1 / ratio is linear in between."""
        ratios = self.ratios(truncate=False)
        shares = [(1 - 1 / ratio) / (1 - 1 / 4) for ratio in ratios]
        assert shares[:15] == pytest.approx([0.0] * 15, abs=1e-6)
        assert shares[22:] == pytest.approx([1.0] * 10, abs=1e-6)
        low, high = 14.24096, 21.12165
        want = [(i - low) / (high - low) for i in range(15, 22)]
        assert shares[15:22] == pytest.approx(want, abs=1e-5)

    def test_ramp_follows_the_betas(self):
        """corr(n) = Y ln(L0 / 2 pi n) / (2 ln theta) is where the ramp begins and ends."""

        def corr(turns: float) -> float:
            return 64 * math.log(262144 / (2 * math.pi * turns)) / (2 * math.log(1e7))

        assert corr(32) == pytest.approx(14.24096, abs=1e-5)
        assert corr(1) == pytest.approx(21.12165, abs=1e-5)
        shares = [(1 - 1 / r) / 0.75 for r in self.ratios(beta_fast=8.0, beta_slow=2.0)]
        low, high = math.floor(corr(8)), math.ceil(corr(2))
        want = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(32)]
        assert shares == pytest.approx(want, abs=1e-5)

    def test_borders_are_clamped_and_never_equal(self):
        """A trained length so short that every dimension turns less than once."""
        ratios = self.ratios(trained_length=4)
        assert all(math.isfinite(ratio) for ratio in ratios)
        assert ratios[1:] == pytest.approx([4.0] * 31, rel=1e-5)

    @pytest.mark.parametrize("factor", [1.0, 2.0, 4.0, 16.0])
    def test_attention_factor(self, factor):
        got = yarn_attention_factor(factor=factor, mscale=None, mscale_all_dim=None)
        assert got == pytest.approx(0.1 * math.log(factor) + 1)

    def test_published_attention_factor(self):
        got = yarn_attention_factor(factor=4.0, mscale=None, mscale_all_dim=None)
        assert got == pytest.approx(1.1386294, abs=1e-7)
        # Queries and keys both carry it, so scores of the rotated part grow by its square.
        assert got**2 == pytest.approx(1.2964769, abs=1e-6)

    def test_both_mscales_give_a_quotient(self):
        got = yarn_attention_factor(factor=8.0, mscale=1.3, mscale_all_dim=0.6)
        want = (0.13 * math.log(8) + 1) / (0.06 * math.log(8) + 1)
        assert got == pytest.approx(want)

    @pytest.mark.parametrize(("mscale", "all_dim"), [(1.3, None), (None, 0.6), (0.0, 0.6)])
    def test_one_mscale_alone_is_ignored(self, mscale, all_dim):
        got = yarn_attention_factor(factor=8.0, mscale=mscale, mscale_all_dim=all_dim)
        assert got == pytest.approx(0.1 * math.log(8) + 1)


def table(P: int, rotary_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    frequencies = rope_frequencies(rotary_dim=rotary_dim, theta=100.0)
    return rope_table(
        positions=torch.arange(P), frequencies=frequencies, multiplier=1.0, dtype=dtype
    )


def draw(P: int, N: int, H: int) -> Tensor:
    return torch.randn(P, N, H, generator=torch.Generator().manual_seed(0))


class TestRotation:
    @pytest.mark.parametrize("rotary_dim", [2, 6, 16])
    @pytest.mark.parametrize("tokens", [0, 1, 65])
    def test_equals_reference(self, backend, tokens, rotary_dim, assert_equals_reference):
        cos, sin = table(tokens, rotary_dim)
        inputs = {"x": draw(tokens, 3, 16), "cos": cos, "sin": sin}
        assert_equals_reference(OP, backend, inputs)

    def test_pairs_are_half_the_rotated_width_apart(self, backend):
        x = draw(5, 2, 8)
        cos, sin = table(5, 6)
        got = backend.load()(x=x, cos=cos, sin=sin)
        for position in range(5):
            for i in range(3):
                angle = position * 100.0 ** (-2 * i / 6)
                turn = torch.tensor(
                    [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
                )
                want = turn @ x[position][:, [i, i + 3]].T
                assert torch.allclose(got[position][:, [i, i + 3]].T, want, atol=1e-6)
        assert torch.equal(got[..., 6:], x[..., 6:])

    def test_only_relative_positions_matter(self, backend):
        q, k = draw(1, 1, 8).expand(40, 1, 8), draw(2, 1, 8)[1:].expand(40, 1, 8)
        cos, sin = table(40, 8)
        q, k = (backend.load()(x=x, cos=cos, sin=sin)[:, 0] for x in (q, k))
        scores = q @ k.T
        for offset in (0, 1, 7):
            diagonal = scores.diagonal(-offset)
            assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)

    def test_multiplier_scales_the_rotated_part_only(self):
        frequencies = rope_frequencies(rotary_dim=4, theta=100.0)
        cos, sin = rope_table(
            positions=torch.arange(3), frequencies=frequencies, multiplier=1.5, dtype=torch.float32
        )
        plain_cos, plain_sin = table(3, 4)
        x = draw(3, 2, 8)
        got = apply_rope_reference(x=x, cos=cos, sin=sin)
        plain = apply_rope_reference(x=x, cos=plain_cos, sin=plain_sin)
        assert torch.allclose(got[..., :4], 1.5 * plain[..., :4])
        assert torch.equal(got[..., 4:], x[..., 4:])

    def test_angles_are_float32_whatever_the_dtype(self):
        """Position 100 001 is not a bfloat16 number; its angle must not be that of a neighbour."""
        positions = torch.tensor([100_001])
        frequencies = torch.tensor([1.0])
        cos, _ = rope_table(
            positions=positions, frequencies=frequencies, multiplier=1.0, dtype=torch.bfloat16
        )
        assert cos.dtype == torch.bfloat16
        assert float(cos[0, 0]) == pytest.approx(math.cos(100_001), abs=0.01)
