"""The arithmetic of limits, without running anything."""

from dataclasses import replace

import pytest
from tests.test_cost import NEXT_80B

from qnext import cost
from qnext.bench.cases import (
    Case,
    Limits,
    Repetition,
    Spread,
    case_cost,
    chunks,
    ratios,
    shares,
)
from qnext.quantization import Bits, expert_bytes, matrix_bytes

SHAPE_M = replace(
    NEXT_80B, num_hidden_layers=4, layer_types=NEXT_80B.layer_types[:4], vocab_size=32768
)
LIMITS = Limits(bandwidth=50e9, integers=2000e9, floats=1000e9)


def test_a_decode_step_in_bf16_costs_what_decode_bytes_says():
    step = cost.step_cost(NEXT_80B, contexts=[1000])
    old = cost.decode_bytes(NEXT_80B, context=1000)
    assert step.weights == pytest.approx(old.weights)
    assert (step.kv, step.state) == (old.kv, old.state)
    assert step.integer_operations == 0
    # The row of a token sees itself too.
    assert step.float_operations == cost.decode_flops(NEXT_80B, 1001)


def test_four_bits_of_shape_m_counted_by_hand():
    """Every matrix of a decode step, from the layouts of csrc/linear.h."""
    delta = matrix_bytes("q4", 12288, 2048) + matrix_bytes("q4", 2048, 4096)
    delta += 2 * (64 * 2048 + 8192 * 4 + 2 * 32 + 128)
    attention = matrix_bytes("q4", 8192, 2048) + 2 * matrix_bytes("q4", 512, 2048)
    attention += matrix_bytes("q4", 2048, 4096) + 2 * 2 * 256
    feed_forward = 11 * expert_bytes("q4", 512, 2048)[1] + 2 * (512 * 2048 + 2048)
    norms = 2 * 2048 * (2 * 4 + 1)
    head = matrix_bytes("q4", 32768, 2048) + 2 * 2048
    by_hand = 3 * delta + attention + 4 * feed_forward + norms + head
    step = cost.step_cost(SHAPE_M, bits=Bits.all(4), contexts=[0])
    assert step.weights == pytest.approx(by_hand)
    assert 190e6 < step.weights < 210e6


def test_distinct_experts_are_what_a_batch_reads():
    few = cost.step_cost(SHAPE_M, bits=Bits.all(4), contexts=[0] * 8, experts=4 * 10)
    many = cost.step_cost(SHAPE_M, bits=Bits.all(4), contexts=[0] * 8, experts=4 * 75)
    used = expert_bytes("q4", 512, 2048)[1]
    assert many.weights - few.weights == pytest.approx(4 * 65 * used)
    assert many.integer_operations == few.integer_operations


def test_rows_of_one_sequence_read_its_state_and_context_once():
    one = cost.step_cost(SHAPE_M, contexts=[4096], rows=1)
    three = cost.step_cost(SHAPE_M, contexts=[4096], rows=3)
    batch = cost.step_cost(SHAPE_M, contexts=[4096] * 3)
    assert (three.kv, three.state) == (one.kv, one.state)
    assert (batch.kv, batch.state) == (3 * one.kv, 3 * one.state)
    assert three.float_operations > 2.9 * one.float_operations


def test_the_limit_is_the_larger_of_byte_time_and_operation_time():
    step = cost.StepCost(
        weights=80e6, kv=15e6, state=5e6, integer_operations=1e9, float_operations=1e9
    )
    assert step.bytes == 100e6
    assert step.seconds(bandwidth=50e9, integers=2e12, floats=1e12) == pytest.approx(2e-3)
    assert step.seconds(bandwidth=500e9, integers=2e12, floats=1e12) == pytest.approx(1.5e-3)


@pytest.mark.parametrize(("slower", "share"), [(1.0, 1.0), (1.25, 0.8), (4.0, 0.25)])
def test_shares_of_repetitions_that_take_known_multiples_of_their_limit(slower, share):
    case = Case(kind="decode", steps=10)
    step = case_cost(SHAPE_M, Bits.all(4), "bfloat16", case, None)
    least = step.bytes / LIMITS.bandwidth
    times = [Repetition(10 * least * slower, LIMITS) for _ in range(3)]
    row = shares(case, times, [step] * 3)
    assert row["limited_by"] == "bytes"
    assert row["bandwidth_share"] == pytest.approx(share, rel=1e-3)
    assert row["limit_share"]["median"] == pytest.approx(share, rel=1e-3)
    assert row["tokens_per_second"]["median"] == pytest.approx(1 / least / slower, rel=1e-3)
    assert row["gigabytes_per_second"] == pytest.approx(50 * share, rel=1e-3)


def test_a_prompt_is_limited_by_operations():
    case = Case(kind="prefill", rows=4096, steps=1)
    assert chunks(4096) == [2048, 2048]
    assert sum(chunks(5000)) == 5000
    step = case_cost(SHAPE_M, Bits.all(4), "bfloat16", case, experts=2 * 4 * 512)
    per_token = step.integer_operations / 4096
    # 2 operations for each weight a token uses, the head's left out.
    packed = 3 * (12288 + 4096) * 2048 + (8192 + 1024 + 4096) * 2048 + 4 * 11 * 3 * 512 * 2048
    assert per_token == pytest.approx(2 * packed, rel=1e-3)
    row = shares(case, [Repetition(10.0, LIMITS)], [step])
    assert row["limited_by"] == "operations"
    assert row["limit_share"]["median"] > row["bandwidth_share"]


def test_ratios_stand_side_by_side():
    fast = [Repetition(s, LIMITS) for s in (1.0, 2.0, 1.0)]
    slow = [Repetition(s, LIMITS) for s in (2.0, 4.0, 3.0)]
    assert ratios(fast, slow) == Spread(2.0, 2.0, 3.0)


def test_weight_bytes_of_packed_parts():
    everything = cost.weight_bytes(SHAPE_M, Bits.all(4), mtp=False)
    assert 3.8e9 < everything < 4.0e9
    assert cost.weight_bytes(SHAPE_M, Bits.all(16), mtp=False) == cost.weight_bytes(
        SHAPE_M, mtp=False
    )
    head = cost.weight_bytes(SHAPE_M, Bits.all(4, head=8), mtp=False)
    gained = matrix_bytes("q8", 32768, 2048) - matrix_bytes("q4", 32768, 2048)
    assert head - everything == gained
