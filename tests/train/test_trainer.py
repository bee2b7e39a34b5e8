"""The loop: stages, resume, guard, damaged and refused checkpoints."""

import json
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train.tiny_runs import Counting, events, losses, tiny_recipe

from qnext.config import ModelConfig
from qnext.errors import DataError, RecipeError, TokenizerError, TrainingError
from qnext.train import state
from qnext.train.plan import Budget
from qnext.train.recipe import Guard, Recipe, changed
from qnext.train.start import start_config
from qnext.train.step import StepResult
from qnext.train.telemetry import read_log
from qnext.train.trainer import Trainer
from qnext.weights.folder import resolve_model
from qnext.weights.shards import checksum


def train(recipe: Recipe, folder: Path, **options: Any) -> tuple[Trainer, list[str]]:
    said: list[str] = []
    trainer = Trainer(recipe, folder, say=said.append, **options)
    assert trainer.run()
    return trainer, said


class StopAfter:
    """Asks the trainer to stop when a step has been logged."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.trainer: Trainer | None = None

    def __call__(self, line: Any) -> None:
        if "event" not in line and line["step"] == self.step:
            assert self.trainer is not None
            self.trainer.request_stop()

    def close(self) -> None:
        pass


def stopped(recipe: Recipe, folder: Path, step: int, **options: Any) -> Trainer:
    reader = StopAfter(step)
    trainer = Trainer(recipe, folder, readers=[reader], **options)
    reader.trainer = trainer
    assert not trainer.run()
    return trainer


def weights(folder: Path) -> dict[str, bytes]:
    last = state.checkpoint_paths(folder)[-1]
    return {file.name: file.read_bytes() for file in last.glob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run, not interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny_recipe(), folder)
    return folder


# -- stages ----------------------------------------------------------------------------------------


def test_both_stages_run_and_the_rope_changes_between_them(whole: Path) -> None:
    assert sorted(losses(whole)) == list(range(1, 13))
    assert [e["stage"] for e in events(whole, "stage")] == ["S1", "S2"]
    borders = {path.name: json.loads((path / "state.json").read_text())["config"]
               for path in state.checkpoint_paths(whole)}  # fmt: skip
    # The checkpoint at the border belongs to the second stage already.
    assert borders["step-00000006"]["rope_theta"] == 50000.0
    assert borders["step-00000012"]["max_position_embeddings"] == 128


def border_gains(run: Path) -> dict[str, torch.Tensor]:
    """Query gains, 1 + weight, at the border between the stages."""
    weights = load_file(run / "checkpoints" / "step-00000006" / "masters.safetensors")
    return {n: 1 + w for n, w in weights.items() if n.endswith("self_attn.q_norm.weight")}


def test_attention_is_sharpened_once_where_a_stage_begins(tmp_path: Path, whole: Path) -> None:
    recipe = changed(tiny_recipe(), ["stages.S2.rope.sharpness=2.5"])
    train(recipe, tmp_path / "sharp")
    plain, sharp = border_gains(whole), border_gains(tmp_path / "sharp")
    assert len(plain) == 2, "one full-attention layer and the MTP head's"
    for name, gain in plain.items():
        factor = 1.0 if "mtp." in name else 2.5
        torch.testing.assert_close(sharp[name], factor * gain)
    found, before = losses(tmp_path / "sharp"), losses(whole)
    assert [found[step] == before[step] for step in range(1, 8)] == 6 * [True] + [False]
    stopped(recipe, tmp_path / "run", 6)
    train(recipe, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == found
    assert weights(tmp_path / "run") == weights(tmp_path / "sharp")


def test_the_loss_falls(tmp_path: Path) -> None:
    recipe = changed(tiny_recipe(), ["stages.*.tokens=1280", "stages.*.schedule.peak=0.05"])
    train(recipe, tmp_path / "run")
    found = [float.fromhex(x) for x in losses(tmp_path / "run").values()]
    assert found[-1] < 0.8 * found[0]


@pytest.mark.parametrize("step", [1, 5, 6, 7, 11])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, whole: Path, step: int) -> None:
    folder = tmp_path / "run"
    stopped(tiny_recipe(), folder, step)
    train(tiny_recipe(), folder, resume=True)
    assert losses(folder) == losses(whole)
    assert weights(folder) == weights(whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_adamw_and_checkpointing_resume_exactly_too(tmp_path: Path, dtype: str) -> None:
    recipe = changed(
        tiny_recipe(dtype=dtype, checkpointing=True),
        ["optimiser.kind=adamw", "stages.*.tokens=256"],
    )
    train(recipe, tmp_path / "whole")
    stopped(recipe, tmp_path / "run", 3)
    train(recipe, tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_workers_give_the_same_result_as_one(tmp_path: Path, whole: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(tiny_recipe(workers=2), tmp_path / "run")
    finally:
        torch.set_num_threads(threads)
    assert losses(tmp_path / "run") == losses(whole)


def test_checkpointing_changes_nothing_but_memory(tmp_path: Path, whole: Path) -> None:
    train(tiny_recipe(checkpointing=True), tmp_path / "run")
    found, expected = losses(tmp_path / "run"), losses(whole)
    for step, value in expected.items():
        assert float.fromhex(found[step]) == pytest.approx(float.fromhex(value), rel=1e-5), step


def test_nothing_that_a_step_changes_is_left_out_of_the_state(tmp_path: Path) -> None:
    trainer, _ = train(tiny_recipe(), tmp_path)
    in_checkpoints = {"position", "guard", "optimiser", "counts_LE", "loads", "model", "config"}
    made_anew = {"log", "writer", "pool", "flagged", "peak_flops", "_stop", "_drifted"}
    never_changed = {"recipe", "folder", "budget", "resume", "allow_drift", "say", "clock",
                     "sources", "workers", "threads", "_readers"}  # fmt: skip
    assert set(vars(trainer)) == in_checkpoints | made_anew | never_changed
    saved = state.verify(state.checkpoint_paths(tmp_path)[-1]).state
    assert {field.name for field in fields(trainer.position)} == set(saved["position"])
    remembered = {field.name for field in fields(trainer.guard)} - {"settings"}
    assert remembered == set(saved["guard"])


# -- what a checkpoint survives --------------------------------------------------------------------


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A run that was stopped after eleven of twelve steps."""
    stopped(tiny_recipe(), tmp_path / "run", 11)
    return tmp_path / "run"


def damage(path: Path, kind: str) -> str:
    file = path / "moments.safetensors"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return "is truncated"
    if kind == "altered":
        raw = bytearray(file.read_bytes())
        raw[-3] ^= 1
        file.write_bytes(bytes(raw))
        return "is damaged: its SHA-256"
    if kind == "missing":
        file.unlink()
        return "moments.safetensors is missing"
    (path / "MANIFEST.json").write_text('{"step": 11, "fi')
    return "MANIFEST.json is damaged"


@pytest.mark.parametrize("kind", ["truncated", "altered", "missing", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(unfinished: Path, whole: Path, kind: str) -> None:
    newest = state.checkpoint_paths(unfinished)[-1]
    said_why = damage(newest, kind)
    _, said = train(tiny_recipe(), unfinished, resume=True)
    assert len(said) == 1
    assert said_why in said[0]
    assert "step-00000011.damaged" in said[0]
    assert losses(unfinished) == losses(whole)
    assert weights(unfinished) == weights(whole)


def test_a_run_without_any_sound_checkpoint_does_not_start_over(unfinished: Path) -> None:
    for path in state.checkpoint_paths(unfinished):
        damage(path, "altered")
    log = (unfinished / "log.jsonl").read_bytes()
    with pytest.raises(TrainingError, match="every checkpoint is damaged"):
        Trainer(tiny_recipe(), unfinished, resume=True).run()
    assert (unfinished / "log.jsonl").read_bytes() == log


def test_a_folder_with_a_run_is_not_overwritten(unfinished: Path) -> None:
    with pytest.raises(TrainingError, match=r"holds a run at step 11\. Go on with --resume"):
        Trainer(tiny_recipe(), unfinished).run()


def test_what_was_written_after_the_checkpoint_is_cut_off(unfinished: Path, whole: Path) -> None:
    with (unfinished / "log.jsonl").open("a") as stream:
        stream.write('{"step": 12, "loss": 7.0, "stage": "S2"}\n{"step": 13, "lo')
    train(tiny_recipe(), unfinished, resume=True)
    assert losses(unfinished) == losses(whole)


def test_resume_without_a_run_begins_one(tmp_path: Path, whole: Path) -> None:
    train(tiny_recipe(), tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(whole)


def test_a_finished_run_stays_finished(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    train(tiny_recipe(), tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(whole)


def test_another_recipe_or_machine_is_refused_unless_allowed(unfinished: Path) -> None:
    other = changed(tiny_recipe(), ["stages.S2.schedule.peak=0.5"])
    with pytest.raises(TrainingError, match=r"stages.S2.schedule.peak was 0.005, is 0.5") as caught:
        Trainer(other, unfinished, resume=True).run()
    assert "--allow-drift" in str(caught.value)
    with pytest.raises(RecipeError, match=r"another model: model.hidden_size was 16, is 32"):
        Trainer(changed(tiny_recipe(), ["model.hidden_size=32"]), unfinished, resume=True).run()
    newest = state.checkpoint_paths(unfinished)[-1] / "state.json"
    raw = json.loads(newest.read_text())
    raw["fingerprint"] |= {"threads": 64, "data of S1": "abc"}
    newest.write_text(json.dumps(raw))
    manifest = json.loads((newest.parent / "MANIFEST.json").read_text())
    manifest["files"]["state.json"] = {
        "bytes": newest.stat().st_size, "sha256": checksum(newest)
    }  # fmt: skip
    (newest.parent / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(TrainingError, match="data of S1 was 'abc', is None; threads was 64, is 1"):
        Trainer(tiny_recipe(), unfinished, resume=True).run()
    _, said = train(other, unfinished, resume=True, allow_drift=True)
    assert "going on with differences" in said[0]
    assert events(unfinished, "drift")


def test_a_stage_made_longer_on_the_way_is_longer(unfinished: Path) -> None:
    longer = changed(tiny_recipe(), ["stages.S2.tokens=960"])
    with pytest.raises(TrainingError, match=r"stages.S2.tokens was \d+, is 960"):
        Trainer(longer, unfinished, resume=True).run()
    train(longer, unfinished, resume=True, allow_drift=True)
    before = events(unfinished, "start")[0]["plan"]
    assert max(losses(unfinished)) == before[0] + 15 != sum(before)


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    first = Trainer(tiny_recipe(), tmp_path)
    with first._lock(), pytest.raises(TrainingError, match="another process is training"):
        Trainer(tiny_recipe(), tmp_path).run()


def test_old_checkpoints_go_and_ends_of_stages_stay(tmp_path: Path) -> None:
    recipe = changed(tiny_recipe(save_every=2, keep=1), ["stages.*.tokens=640"])
    train(recipe, tmp_path)
    assert [p.name[-2:] for p in state.checkpoint_paths(tmp_path)] == ["10", "20"]


# -- budgets ---------------------------------------------------------------------------------------


def test_a_budget_of_tokens_sets_the_length(tmp_path: Path) -> None:
    train(tiny_recipe(), tmp_path, budget=Budget(tokens=64 * 10))
    assert events(tmp_path, "start")[0]["plan"] == [4, 6]
    assert max(losses(tmp_path)) == 10


def test_a_budget_of_time_is_planned_from_measured_speed_and_resumes(tmp_path: Path) -> None:
    """The clock ticks 10 ms at every look, so speeds and plan are the same each time."""
    ticks = iter(range(10**6))

    def clock() -> float:
        return next(ticks) * 0.01

    recipe = tiny_recipe()
    budget = Budget(seconds=0.6)
    trainer = stopped(recipe, tmp_path, 3, budget=budget, clock=clock)
    plan = events(tmp_path, "start")[0]["plan"]
    # Gradients and update take one tick each: two ticks per step, 58.2 in the budget.
    assert plan == [23, 6]
    assert trainer.position.speeds == pytest.approx([64 / 0.02, 64 / 0.02])
    train(recipe, tmp_path, budget=budget, clock=clock, resume=True)
    replanned = events(tmp_path, "plan")[0]["plan"]
    assert replanned[0] == 23
    assert max(losses(tmp_path)) == sum(replanned)


# -- the guard in the loop -------------------------------------------------------------------------


class Poisoned(Trainer):
    """A trainer whose gradients are spoilt at some steps, as a broken kernel would do."""

    poison: tuple[int, ...] = ()
    where = "model.layers.0.mlp.experts.down_proj"

    def _compute(self, *args: Any) -> StepResult:
        result = super()._compute(*args)
        if self.position.step in self.poison:
            names = [name for name, _ in self.model.named_parameters()]
            grad = result.grads[names.index(self.where)]
            assert grad is not None
            grad[2, 0, 0] = float("nan")
        return result


def test_a_spoilt_gradient_is_named_and_the_run_is_as_if_the_batch_were_absent(
    tmp_path: Path,
) -> None:
    trainer = Poisoned(tiny_recipe(), tmp_path / "run")
    trainer.poison = (4,)
    assert trainer.run()
    [event] = events(tmp_path / "run", "skip")
    assert event["where"] == "gradient of model.layers.0.mlp.experts.down_proj[2]"
    assert event["step"] == 5
    assert event["sources"] == ["counting"]

    class Leaving(Trainer):
        def _build(self) -> None:
            super()._build()
            self.guard.skipped.add((0, 4))

    assert Leaving(tiny_recipe(), tmp_path / "absent").run()
    assert losses(tmp_path / "run") == losses(tmp_path / "absent")
    assert 5 not in losses(tmp_path / "run")


def test_a_spoilt_weight_sends_the_run_back(tmp_path: Path, whole: Path) -> None:
    class Struck(Trainer):
        struck = False

        def _compute(self, *args: Any) -> StepResult:
            if self.position.step == 6 and not self.struck:
                self.struck = True
                with torch.no_grad():
                    self.model.model.layers[1].mlp.experts.gate_up_proj[1, 0] = float("nan")
            return super()._compute(*args)

    assert Struck(tiny_recipe(), tmp_path).run()
    [skip] = events(tmp_path, "skip")
    assert skip["where"] == "weight model.layers.1.mlp.experts.gate_up_proj"
    [back] = events(tmp_path, "rolled back")
    # Step 6 is the border of the stages, which is a snapshot.
    assert (back["came_from"], back["step"]) == (7, 6)
    assert back["left_out"] == [[1, 0], [1, 1]]
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5, 6, 9, 10, 11, 12]
    assert {s: v for s, v in losses(tmp_path).items() if s < 7} == {
        s: v for s, v in losses(whole).items() if s < 7
    }


def test_wild_batches_are_left_out_and_a_resumed_run_leaves_out_the_same(tmp_path: Path) -> None:
    recipe = changed(
        tiny_recipe(data=Counting(wild=(8, 9)), guard=Guard(warmup=6, deviations=5.0)),
        ["stages.S1.tokens=384", "stages.S2.tokens=896"],
    )
    train(recipe, tmp_path / "whole")
    [back] = events(tmp_path / "whole", "rolled back")
    assert back["left_out"] == [[1, 8], [1, 9]]
    # Between the first suspicious step and the second: what is remembered decides.
    stopped(recipe, tmp_path / "run", 15)
    train(recipe, tmp_path / "run", resume=True)
    assert events(tmp_path / "run", "rolled back") == [back]
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_run_that_keeps_going_back_ends_with_a_report(tmp_path: Path) -> None:
    trainer = Poisoned(tiny_recipe(), tmp_path)
    trainer.poison = tuple(range(5, 12))
    with pytest.raises(TrainingError, match="was rolled back 3 times") as caught:
        trainer.run()
    assert "Lower the rate" in str(caught.value)
    assert state.newest(tmp_path, print) is not None


def test_an_id_outside_the_vocabulary_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"document 1 \(from counting\): token id \d+ is outside"):
        Trainer(tiny_recipe(data=Counting(foreign=(3,))), tmp_path).run()
    assert max(losses(tmp_path)) == 3


# -- what is refused before anything is written ----------------------------------------------------


def test_data_of_another_tokenizer_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = changed(
        tiny_recipe(data=Counting(digest="0" * 64), tokenizer=str(tiny_folder)),
        ["model.vocab_size=448"],
    )
    with pytest.raises(RecipeError, match="made with another tokenizer"):
        Trainer(recipe, tmp_path / "run")
    with pytest.raises(RecipeError, match=r"tokenizer.json is not there"):
        Trainer(tiny_recipe(tokenizer=str(tmp_path)), tmp_path / "run")
    with pytest.raises(TokenizerError, match="vocab_size is 48"):
        Trainer(tiny_recipe(tokenizer=str(tiny_folder)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(TrainingError, match="could not be written: Not a directory"):
        Trainer(tiny_recipe(), tmp_path / "file" / "run").run()


def test_an_mtp_loss_without_a_head_is_refused(tmp_path: Path) -> None:
    recipe = changed(tiny_recipe(), ["model.num_nextn_predict_layers=0"])
    with pytest.raises(RecipeError, match="needs an MTP head"):
        Trainer(recipe, tmp_path / "run")
    train(changed(recipe, ["stages.*.objectives.mtp_weights=[]"]), tmp_path / "run")


def test_model_and_start_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the weights come from the folder in start"):
        Trainer(tiny_recipe(start="qnext-mini"), tmp_path / "run")


def test_a_run_can_start_from_a_model_folder(tmp_path: Path, tiny_folder: Path, tiny_model) -> None:
    from qnext.model.model import CausalLM

    recipe = changed(
        tiny_recipe(model={}, start=str(tiny_folder)), ["stages.*.schedule.peak=0", "keep=1"]
    )
    trainer, _ = train(recipe, tmp_path)
    assert isinstance(trainer.model, CausalLM)
    for (name, mine), theirs in zip(
        trainer.model.named_parameters(), tiny_model.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name


def test_a_run_that_starts_from_a_packed_model_is_not_packed() -> None:
    recipe = tiny_recipe(model={}, start=str(resolve_model("qnext-mini")))
    assert "quantization_config" in ModelConfig.from_file(str(recipe.start)).to_dict()
    assert "quantization_config" not in start_config(recipe).to_dict()


# -- reports around stages -------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """Measures something that training changes."""

    def measure(self, model: Any, tokenizer: Path | None) -> dict[str, float]:
        return {
            "norm": float(model.model.norm.weight.norm()),
            "theta": model.config.rope.rope_theta,
        }


def test_stages_are_measured_before_and_after(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    stages = (recipe.stages[0], replace(recipe.stages[1], report=Norm()))
    train(replace(recipe, stages=stages), tmp_path)
    before, after = events(tmp_path, "report")
    assert (before["when"], before["stage"], before["step"]) == ("before", "S2", 6)
    assert (after["when"], after["step"]) == ("after", 12)
    assert before["figures"]["theta"] == after["figures"]["theta"] == 50000.0
    assert before["figures"]["norm"] != after["figures"]["norm"]


def test_every_line_is_plain_json_with_the_promised_figures(whole: Path) -> None:
    lines = [line for line in read_log(whole) if "event" not in line]
    wanted = {"loss", "mtp_1", "balance", "z", "hit_main", "hit_mtp_1", "lse_max", "rate",
              "grad_norm", "grad_norms", "router_load_max", "router_entropy", "dead_experts",
              "tokens_per_second", "mfu", "seconds", "resident_bytes", "tokens"}  # fmt: skip
    assert all(wanted <= line.keys() for line in lines)
    probes = [line["step"] for line in lines if "probe" in line]
    assert probes == [1, 6, 11]
    probe = lines[0]["probe"]
    assert len(probe["activation_max"]) == 2
    assert len(probe["first_token_mass"]) == 1
    assert 0.4 < probe["gate_open"][0] < 0.6
    assert len(lines[0]["router_load_max"]) == 3


@pytest.mark.slow
def test_bfloat16_with_masters_learns_like_float32(tmp_path: Path) -> None:
    """After 200 steps the two differ by less than two seeds do."""

    def final(name: str, **options: Any) -> float:
        recipe = changed(tiny_recipe(**options), ["stages.*.tokens=6400"])
        train(recipe, tmp_path / name)
        last = list(losses(tmp_path / name).values())[-20:]
        return sum(map(float.fromhex, last)) / 20

    wide, narrow = final("wide"), final("narrow", dtype="bfloat16")
    others = [final(f"seed{seed}", seed=seed) for seed in (4, 5, 6)]
    assert abs(wide - narrow) < max(*others, wide) - min(*others, wide)
