"""Figures of a run are what they say they are."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.train.test_trainer import train
from tests.train.tiny_runs import tiny_recipe

from qnext.config import ModelConfig
from qnext.cost import prefill_flops, training_flops
from qnext.errors import RequestError
from qnext.model.batch import TokenBatch
from qnext.model.model import CausalLM, Taps, initialise
from qnext.train.batch import TrainBatch
from qnext.train.probe import look
from qnext.train.start import normalise_routers
from qnext.train.telemetry import Loads, Log, TensorBoard, Terminal, read_log, router_figures


def batch(lengths: list[int]) -> TrainBatch:
    rng = np.random.default_rng(0)
    return TrainBatch.pack([(rng.integers(0, 512, n), np.ones(n)) for n in lengths])


def test_the_mass_on_the_first_token_is_that_of_the_attention(tiny_model) -> None:
    packed = batch([30, 90, 5])
    found = look(tiny_model, packed)
    taps = Taps(want_attentions=True)
    with torch.no_grad():
        tiny_model.run(TokenBatch.pack([packed.ids[30:120]]), taps=taps)
    [[weights]] = taps.attentions
    assert found["first_token_mass"] == [pytest.approx(float(weights[:, 64:, 0].mean()), abs=1e-6)]


def test_gates_and_decays_are_those_of_the_layers(tiny_model) -> None:
    found = look(tiny_model, batch([40]))
    assert [len(found[name]) for name in ("gate_open", "delta_keep", "activation_max")] == [1, 3, 4]
    assert all(0 < keep < 1 for keep in found["delta_keep"])
    with torch.no_grad():
        wide = CausalLM(tiny_model.config)
        wide.load_state_dict(tiny_model.state_dict())
        attention = wide.model.layers[3].self_attn
        attention.q_proj.weight.unflatten(0, (-1, 2, 16))[:, 1] = 0
        assert look(wide, batch([40]))["gate_open"] == [0.5]
        for layer in wide.model.layers[:3]:
            layer.linear_attn.A_log.fill_(-20.0)
        assert look(wide, batch([40]))["delta_slow"] == [1.0] * 3


def test_the_largest_activation_is_found(tiny_model) -> None:
    packed = batch([20])
    taps = Taps(want_hidden_states=True)
    with torch.no_grad():
        tiny_model.run(packed.tokens, taps=taps)
    # Outputs of the layers but the last, whose next entry is after the final norm.
    expected = [float(h.abs().max()) for h in taps.hidden_states[1:4]]
    assert look(tiny_model, packed)["activation_max"][:3] == pytest.approx(expected, rel=1e-5)


def test_a_look_changes_nothing(tiny_model) -> None:
    before = {name: p.clone() for name, p in tiny_model.named_parameters()}
    look(tiny_model, batch([20]))
    assert all(torch.equal(p, before[name]) for name, p in tiny_model.named_parameters())
    assert not any(m._forward_hooks for m in tiny_model.modules())


def test_loads_of_an_even_and_of_a_one_sided_router() -> None:
    counts = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [0, 0, 0, 0]])
    even = math.log(4)
    figures = router_figures(counts, torch.tensor([10 * even, 0.0, 0.0]), slots=2)
    assert figures["router_load_max"] == [1.0, 4.0]
    assert figures["router_load_entropy"] == [1.0, 0.0]
    assert figures["router_entropy"] == [1.0, 0.0]


def test_an_expert_is_dead_when_a_million_tokens_passed_it_by() -> None:
    loads = Loads(2, 4)
    for _ in range(30):
        loads.update(torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]]), tokens=100_000)
    assert loads.dead() == [[3], []]
    assert float(loads.share_LE[0].sum()) == pytest.approx(1.0)
    # The second router has not run and keeps what it had.
    assert loads.share_LE[1].tolist() == [0.25] * 4


def test_training_costs_three_forwards_and_mtp_on_top(tiny_config: ModelConfig) -> None:
    plain = training_flops(tiny_config, [7, 100])
    assert plain == 3 * (prefill_flops(tiny_config, 7) + prefill_flops(tiny_config, 100))
    one, two = (training_flops(tiny_config, [7, 100], mtp_depths=d) for d in (1, 2))
    assert 0 < two - one < one - plain
    assert training_flops(tiny_config, [2], mtp_depths=3) == 3 * prefill_flops(tiny_config, 2)


def test_normalised_routers_start_more_even_than_drawn_ones(tiny_config: ModelConfig) -> None:
    config = replace(tiny_config, num_experts=128)
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    x = x / x.square().mean(-1, keepdim=True).sqrt()

    def spread(normalise: bool) -> float:
        model = CausalLM(config)
        initialise(model, 5)
        if normalise:
            normalise_routers(model)
        router = model.model.layers[0].mlp.gate.weight.detach()
        # At 32 wide, drawn rows are so short that only their direction can be compared.
        router = router / router.norm(dim=1).mean() * 0.905
        chosen = (x @ router.T).topk(2).indices
        counts = torch.bincount(chosen.flatten(), minlength=128).float()
        return float(counts.std() / counts.mean())

    assert spread(True) < 0.8 * spread(False)
    model = CausalLM(config)
    initialise(model, 5)
    normalise_routers(model)
    router = model.model.layers[0].mlp.gate.weight.detach()
    torch.testing.assert_close(router.norm(dim=1), torch.full((128,), 0.02 * 2048**0.5))
    entropy = torch.distributions.Categorical(logits=x @ router.T).entropy().mean()
    assert float(entropy) > 0.9 * math.log(128)


def test_the_log_cuts_back_and_says_what_json_cannot(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.write({"step": 1, "loss": 1.25})
    length = log.sync()
    log.write({"event": "skip", "loss": math.nan, "more": [math.inf, {"x": -math.inf}]})
    assert list(read_log(tmp_path))[1] == {
        "event": "skip", "loss": "nan", "more": ["inf", {"x": "-inf"}]
    }  # fmt: skip
    log.cut(length)
    log.write({"step": 2, "loss": 0.1})
    log.close()
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]
    json.loads((tmp_path / "log.jsonl").read_text().splitlines()[1])


def test_a_terminal_that_nobody_watches_gets_a_line_a_minute(capsys) -> None:
    now = [0.0]
    reader = Terminal(clock=lambda: now[0])
    reader({"event": "start", "step": 0, "plan": [3, 4]})
    line = {"step": 1, "stage": "S1", "loss": 2.5, "grad_norm": 1.0, "rate": 0.001,
            "tokens_per_second": 1234.5, "mfu": 0.5, "hit_mtp_1": 0.25}  # fmt: skip
    for second in (0, 30, 61):
        now[0] = float(second)
        reader({**line, "step": 1 + second})
    reader({"event": "rolled back", "step": 40, "came_from": 62})
    reader.close()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        "step 1/7 S1 loss 2.500, mtp 25%, norm 1.00, rate 1.0e-03, 1,234 tok/s, mfu 50%"
    )
    assert said[1].startswith("step 62/7")
    assert said[2] == "rolled back: step 40, came_from 62"


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train(tiny_recipe(), run, readers=[TensorBoard(run)])
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    lines = [line for line in read_log(run) if "event" not in line]
    found = {event.step: event.value for event in events.Scalars("loss")}
    assert found == {line["step"]: pytest.approx(line["loss"]) for line in lines}
    assert "grad_norms/experts" in events.Tags()["scalars"]


def test_tensorboard_that_is_not_installed_is_said(tmp_path: Path, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(RequestError, match="needs the package tensorboard"):
        TensorBoard(tmp_path)
