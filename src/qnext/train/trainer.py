"""The one loop: from a recipe and a folder to a trained model, through all stages.

A step is: batches by number, gradients, the guard's verdict, the update, one line in the log. All
that a step changes is in ``Trainer._state`` and ``Trainer._groups``, which a checkpoint holds, so a
run that was stopped at any moment goes on as if it had not been.
"""

import fcntl
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any, cast

import torch
from torch import Tensor

from qnext.config import ModelConfig
from qnext.cost import training_flops
from qnext.errors import RecipeError, TrainingError
from qnext.model.model import CausalLM
from qnext.train import state as checkpoints
from qnext.train.batch import TrainBatch
from qnext.train.guard import FirstBad, GuardState, Verdict, bad_place, bad_weight
from qnext.train.losses import fractions, router_count
from qnext.train.optim import GradientNorms, OptimiserState, rate_at
from qnext.train.plan import Budget, planned_again, steps_of
from qnext.train.probe import MASSIVE, look
from qnext.train.recipe import Recipe, Stage
from qnext.train.start import open_sources, sharpen, start_config, start_model, with_rope
from qnext.train.step import StepResult, compute
from qnext.train.telemetry import (
    Loads,
    Log,
    Reader,
    peak_flops,
    resident_bytes,
    router_figures,
)

RECIPE, TOKENIZER, LOCK = "recipe.json", "tokenizer", "lock"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_DEAD_AFTER = 2_000_000
"""Tokens after which a dead expert is worth a warning."""


@dataclass(slots=True)
class Position:
    """Where a run stands."""

    step: int = 0
    """Steps done, left-out ones included."""
    stage: int = 0
    stage_step: int = 0
    entered: bool = False
    """Whether the stage has been announced and its report made."""
    tokens: int = 0
    """Without padding."""
    seconds: float = 0.0
    """Time spent in steps."""
    plan: list[int] = field(default_factory=list[int])
    """Steps of each stage."""
    speeds: list[float] = field(default_factory=list[float])
    """Tokens per second of each stage the plan was made with; empty without a budget of time."""


class Trainer:
    """A run in a folder. ``run`` does the work; ``request_stop`` ends it after the current step."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        budget: Budget | None = None,
        resume: bool = False,
        allow_drift: bool = False,
        say: Callable[[str], None] = lambda line: None,
        readers: Sequence[Reader] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Check everything that can be wrong; nothing is written yet.

        ``say`` gets one line about everything unusual. Raises RecipeError, ConfigError, DataError,
        CheckpointError.
        """
        self.recipe, self.folder, self.budget = recipe, folder, budget
        self.resume, self.allow_drift = resume, allow_drift
        self.say, self.clock = say, clock
        self.config = start_config(recipe)
        self.sources = open_sources(recipe, self.config)
        for stage in recipe.stages:
            if stage.objectives.mtp_weights and not self.config.num_mtp_layers:
                raise RecipeError(
                    f"stages.{stage.name}: an MTP loss needs an MTP head. Set the model's "
                    "num_nextn_predict_layers to 1, or objectives.mtp_weights to []."
                )
        cores = torch.get_num_threads()
        side_by_side = min(stage.batch_tokens // stage.micro_tokens for stage in recipe.stages)
        self.workers = recipe.workers or (
            1 if recipe.device != "cpu" else max(1, min(cores, side_by_side))
        )
        self.threads = max(1, cores // self.workers)
        self.position = Position()
        self.peak_flops = 0.0
        self.flagged = False
        self._readers = tuple(readers)
        self._stop = Event()
        self._drifted = False

    def make_model(self) -> CausalLM:
        """The model before the first step, in float32; experiments may alter it here."""
        return start_model(self.recipe, self.config)

    # -- the run -----------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Finish the step, save, and let ``run`` return."""
        self._stop.set()

    def run(self) -> bool:
        """Train to the end; False if stopped on request (everything is saved then).

        Raises TrainingError when the run cannot go on; what was saved stays.
        """
        existing = checkpoints.checkpoint_paths(self.folder)
        if existing and not self.resume:
            raise TrainingError(
                f"{self.folder} holds a run at step {checkpoints.step_of(existing[-1])}. Go on "
                "with --resume, or choose another folder with --run."
            )
        self._make_folder()
        with (
            self._lock(),
            self._settings(),
            ThreadPoolExecutor(self.workers, thread_name_prefix="train") as self.pool,
        ):
            self._build()
            self.writer = checkpoints.Writer(self.folder, keep=self.recipe.keep)
            self.log = Log(self.folder, self._readers)
            try:
                return self._run(had_some=bool(existing))
            finally:
                self.log.close()
                self.writer.close()

    def _run(self, *, had_some: bool) -> bool:
        dtype = getattr(torch, self.recipe.dtype)
        cores = self.threads * self.workers
        self.peak_flops = peak_flops(dtype, self.recipe.device, cores, self.clock)
        found = checkpoints.newest(self.folder, self.say)
        if found is None and had_some:
            raise TrainingError(
                f"{self.folder}: every checkpoint is damaged, so there is nothing to go on from. "
                "What is left of them was set aside; start again in another folder with --run."
            )
        if found is None:
            self._begin()
        else:
            self._continue(found)
        while self.position.stage < len(self.recipe.stages):
            if not self._run_stage():
                self._save(wait=True)
                return False
        self._note(self.writer.finish())
        return True

    def _run_stage(self) -> bool:
        at, stage = self.position, self.recipe.stages[self.position.stage]
        if at.stage_step == 0 and not at.entered:
            self._event("stage", stage=stage.name, steps=at.plan[at.stage], tokens=at.tokens)
            self._report("before")
            at.entered = True
        while at.stage_step < at.plan[at.stage]:
            if self._stop.is_set():
                return False
            self._step()
            # After a roll-back this is another object.
            at = self.position
            if self.recipe.stages[at.stage] is not stage:
                return True
            at_end = at.stage_step == at.plan[at.stage]
            if at.step % self.recipe.save_every == 0 and not self.flagged and not at_end:
                self._save()
        self._report("after")
        self._next_stage()
        return True

    def _next_stage(self) -> None:
        """Go over to the next stage, or to the end, and save at the border."""
        at = self.position
        done = self.recipe.stages[at.stage]
        at.stage, at.stage_step, at.entered = at.stage + 1, 0, False
        self.flagged = False
        if at.stage < len(self.recipe.stages):
            self._apply_stage(begins=True)
            self.optimiser.change(self.recipe.optimiser_of(at.stage))
            # Another mixture has another loss: what was usual there says nothing here.
            self.guard.losses, self.guard.norms, self.guard.flagged = [], [], []
            self._plan_again()
        else:
            self._event("end", tokens=at.tokens, seconds=round(at.seconds, 1))
        self._save(mark=done.name, wait=at.stage == len(self.recipe.stages))

    # -- one step ----------------------------------------------------------------------------------

    def _step(self) -> None:
        at, stage = self.position, self.recipe.stages[self.position.stage]
        place = (at.stage, at.stage_step)
        if place in self.guard.skipped:
            self.flagged = False
            self._advance()
            self._event("left out", stage=stage.name, batch=place[1])
            return
        begin = self.clock()
        batches = self.sources[at.stage].micro_batches(at.stage_step)
        fetched = self.clock()
        result = self._compute(stage, batches)
        norms = self.optimiser.norms(result.grads)
        verdict = self.guard.judge(at.step + 1, place, _judged_loss(result), norms.total)
        computed = self.clock()
        self.flagged = verdict != "fine"
        at.seconds += computed - begin
        if verdict != "fine":
            self._say_verdict(verdict, stage, batches, result, norms)
        if verdict == "roll back":
            self._go_back()
            return
        if verdict == "skip":
            self._advance()
            return
        probing = bool(self.recipe.probe_every) and at.step % self.recipe.probe_every == 0
        line = {"step": at.step + 1, "stage": stage.name, "stage_step": at.stage_step + 1}
        # The middle of the step: neither the first nor the last one is wasted on a rate of 0.
        share = (at.stage_step + 0.5) / at.plan[at.stage]
        rate = rate_at(stage.schedule, share)
        ratios = self.optimiser.update(
            result.grads, norms.total, rate, self.pool, want_ratios=probing
        )
        self.counts_LE = result.counts_LE
        self.loads.update(result.counts_LE, result.tokens)
        at.tokens += result.tokens
        ended = self.clock()
        self._advance()
        line |= self._figures(stage, result, norms, rate)
        line |= self._speed(stage, result, begin, fetched, computed, ended)
        if probing:
            line["update_ratio"] = _rounded(ratios)
            line["probe"] = look(self.model, batches[0].to(self.model.device))
            self._warn(line)
        self.log.write(line)
        at.seconds += self.clock() - computed

    def _compute(self, stage: Stage, batches: Sequence[TrainBatch]) -> StepResult:
        lagged = fractions(self.counts_LE) if int(self.counts_LE.sum()) else None
        return compute(
            self.model,
            batches,
            wanted=stage.objectives,
            fractions_LE=lagged,
            recompute=self.recipe.checkpointing,
            pool=self.pool,
        )

    def _advance(self) -> None:
        self.position.step += 1
        self.position.stage_step += 1

    def _figures(
        self, stage: Stage, result: StepResult, norms: GradientNorms, rate: float
    ) -> dict[str, Any]:
        hits = {f"hit_{name}": rate for name, rate in result.hit_rates().items()}
        slots = self.config.num_experts_per_tok
        dead = self.loads.dead()
        out = {
            "tokens": self.position.tokens,
            "loss": result.losses["main"],
            "total": result.total,
            **{name: value for name, value in result.losses.items() if name != "main"},
            **_rounded(hits),
            "lse_max": result.lse_max,
            "rate": rate,
            "grad_norm": norms.total,
            "grad_norms": _rounded(norms.families),
        }
        if self.config.num_experts:
            out |= router_figures(result.counts_LE, result.entropy_L, slots)
            out["dead_experts"] = [len(numbers) for numbers in dead]
        return out

    def _speed(
        self, stage: Stage, result: StepResult, begin: float, fetched: float, computed: float,
        ended: float,
    ) -> dict[str, Any]:  # fmt: skip
        seconds = max(1e-9, ended - begin)
        depths = len(stage.objectives.mtp_weights)
        flops = training_flops(self.config, result.lengths, mtp_depths=depths)
        parts = {"data": fetched - begin, "gradients": computed - fetched,
                 "update": ended - computed}  # fmt: skip
        return {
            "tokens_per_second": round(result.tokens / seconds, 1),
            "mfu": round(flops / seconds / self.peak_flops, 4),
            "seconds": _rounded(parts),
            "resident_bytes": resident_bytes(),
        }

    def _warn(self, line: Mapping[str, Any]) -> None:
        ratios = cast("dict[str, list[float]]", line["probe"])["activation_ratio"]
        if max(ratios) > MASSIVE:
            at = ratios.index(max(ratios))
            self.say(
                f"step {line['step']}: layer {at} has an activation {max(ratios):.0f} times its "
                "median."
            )
        if self.position.tokens >= _DEAD_AFTER and self.config.num_experts:
            for router, numbers in enumerate(self.loads.dead()):
                if numbers:
                    named = ", ".join(map(str, numbers[:5]))
                    self.say(
                        f"step {line['step']}: router {router} hardly uses {len(numbers)} experts "
                        f"({named}). A larger objectives.balance spreads the load."
                    )

    # -- the guard's verdicts ----------------------------------------------------------------------

    def _say_verdict(
        self,
        verdict: Verdict,
        stage: Stage,
        batches: Sequence[TrainBatch],
        result: StepResult,
        norms: GradientNorms,
    ) -> None:
        finite = math.isfinite(result.total) and math.isfinite(norms.total)
        sources = sorted({name for batch in batches for name in batch.sources})
        self._event(
            verdict,
            step=self.position.step + 1,
            stage=stage.name,
            batch=self.position.stage_step,
            loss=_judged_loss(result),
            grad_norm=norms.total,
            where=None if finite else self._culprit(stage, batches, result, norms),
            sources=sources[:8],
        )
        if verdict == "stop":
            raise TrainingError(
                f"step {self.position.step + 1} of {stage.name}: the run was rolled back "
                f"{len(self.guard.rolled_back)} times (at steps "
                f"{', '.join(map(str, self.guard.rolled_back))}) and is not stable: loss "
                f"{_judged_loss(result):.4g}, gradient norm {norms.total:.4g}. Lower the rate "
                f"(schedule.peak) or look at the batches in {self.log.file}. Checkpoints stay."
            )

    @torch.no_grad()
    def _culprit(
        self,
        stage: Stage,
        batches: Sequence[TrainBatch],
        result: StepResult,
        norms: GradientNorms,
    ) -> str:
        """The first tensor that is not finite: a weight, an output in forward order, a gradient."""
        weight = bad_weight(self.model)
        if weight is not None:
            return f"weight {weight}"
        for number in result.bad[:1]:
            with FirstBad(self.model) as found:
                self._compute_quietly(stage, batches[number])
            return found.name or "the loss"
        assert norms.first_bad is not None, (result.total, norms)
        names = [name for name, _ in self.model.named_parameters()]
        grad = result.grads[names.index(norms.first_bad)]
        assert grad is not None, norms.first_bad
        return bad_place(norms.first_bad, grad)

    def _compute_quietly(self, stage: Stage, batch: TrainBatch) -> None:
        hidden = self.model.run(batch.to(self.model.device).tokens)
        if stage.objectives.mtp_weights:
            self.model.run_mtp(batch.tokens, batch.shifted_ids(1), hidden)

    def _go_back(self) -> None:
        """Load the last snapshot; what the guard learnt since then stays."""
        learnt, left = self.guard, self.position.step
        self._note(self.writer.finish())
        found = checkpoints.newest(self.folder, self.say, only_snapshots=True)
        if found is None:
            raise TrainingError(
                f"step {left}: the loss left its usual range and {self.folder} has no checkpoint "
                "to go back to. Lower the rate (schedule.peak) and start again."
            )
        self._restore(found)
        self.guard = learnt.went_back(self.guard)
        self.flagged = False
        self._event("rolled back", came_from=left, left_out=sorted(self.guard.skipped))

    # -- beginning and going on --------------------------------------------------------------------

    def _build(self) -> None:
        """Model and optimiser with fresh weights, before the first step."""
        torch.manual_seed(self.recipe.seed)
        if hasattr(self, "model"):
            # Those that speeds were measured with; there is not always room for both.
            del self.model, self.optimiser
        self.config = start_config(self.recipe)
        self.position = Position()
        self.model = self.make_model()
        self.optimiser = OptimiserState(self.model, self.recipe.optimiser_of(0), self.config)
        self.optimiser.cast_working(getattr(torch, self.recipe.dtype))
        routers, experts = router_count(self.model), self.config.num_experts
        self.counts_LE = torch.zeros(routers, experts, dtype=torch.int64)
        self.loads = Loads(routers, experts)
        self.guard = GuardState(self.recipe.guard)

    def _begin(self) -> None:
        speeds: list[float] = []
        if self.budget is not None and self.budget.seconds is not None:
            speeds = [self._measured_speed(i) for i in range(len(self.recipe.stages))]
            self._build()
        at = self.position
        at.speeds = speeds
        at.plan = steps_of(self.recipe.stages, self.budget, speeds, self.say)
        self.log.cut(0)
        self._write_recipe()
        self._apply_stage(begins=True)
        self._event(
            "start",
            plan=at.plan,
            stages=[stage.name for stage in self.recipe.stages],
            parameters=sum(p.numel() for p in self.model.parameters()),
            peak_flops=round(self.peak_flops),
            kernels=list(self.model.kernels),
            **self._fingerprint(),
        )
        # Nothing may be lost later that this disk could have told at the start.
        self._save(wait=True)

    def _continue(self, found: checkpoints.Checkpoint) -> None:
        self._check_same(found)
        self._restore(found)
        self.log.cut(int(found.state["log_bytes"]))
        at = self.position
        if self._drifted and self.budget is None:
            # This stage and those to come are as long as the recipe says now.
            at.plan[at.stage :] = steps_of(self.recipe.stages, None, [], self.say)[at.stage :]
        tell = {"step": at.step, "plan": at.plan, "stage": at.stage}
        for reader in self._readers:
            reader({"event": "resume", **tell})
        if self.budget is not None and self.budget.as_dict() != found.state["budget"]:
            self.say("the budget was fixed when the run began; the new one is not used.")
        if self._drifted:
            self._write_recipe()
            self._event("drift", now=self._fingerprint())

    def _check_same(self, found: checkpoints.Checkpoint) -> None:
        """Refuse a run of another recipe, machine or version, unless drift is allowed."""
        then = cast("dict[str, Any]", found.state["recipe"])
        now = self.recipe.as_dict()
        changed = checkpoints.differences(_flat(then), _flat(now))
        for key in ("model", "start", "tokenizer"):
            if then[key] != now[key]:
                raise RecipeError(
                    f"{self.folder} is a run of another {key}: "
                    f"{'; '.join(c for c in changed if c.startswith(key))[:300]}. "
                    "Choose another folder with --run."
                )
        if [s["name"] for s in then["stages"]] != [s["name"] for s in now["stages"]]:
            raise RecipeError(
                f"{self.folder} is a run of other stages. Choose another folder with --run."
            )
        changed += checkpoints.differences(found.state["fingerprint"], self._fingerprint())
        if changed and not self.allow_drift:
            raise TrainingError(
                f"{self.folder} cannot go on exactly as it would have: {'; '.join(changed[:5])}"
                f"{' and more' if len(changed) > 5 else ''}. Restore that, or accept another "
                "result with --allow-drift."
            )
        if changed:
            self._drifted = True
            self.say(f"going on with differences: {'; '.join(changed)}.")

    def _measured_speed(self, number: int) -> float:
        """Tokens per second of a stage, from a few micro-batches and one update of the optimiser.

        The weights are spoilt; they are drawn again afterwards.
        """
        stage = self.recipe.stages[number]
        self.position.stage = number
        self._apply_stage()
        batches = self.sources[number].micro_batches(0)
        some = batches[: 2 * self.workers]
        self._compute(stage, batches[: self.workers])
        begin = self.clock()
        result = self._compute(stage, some)
        middle = self.clock()
        self.optimiser.update(result.grads, 1.0, 0.0, self.pool)
        end = self.clock()
        whole = (middle - begin) * len(batches) / len(some) + end - middle
        return sum(batch.real_tokens for batch in batches) / max(1e-9, whole)

    def _plan_again(self) -> None:
        """Under a budget of time, give the remaining stages the time that is left."""
        at = self.position
        if self.budget is None or self.budget.seconds is None or not at.speeds:
            return
        rest = slice(at.stage, None)
        planned = sum(
            steps * stage.batch_tokens / speed
            for steps, stage, speed in zip(
                at.plan[: at.stage], self.recipe.stages, at.speeds, strict=False
            )
        )
        slower = at.seconds / max(1e-9, planned)
        left = self.budget.seconds - at.seconds
        speeds = [speed / slower for speed in at.speeds[rest]]
        at.plan[rest] = planned_again(
            self.recipe.stages[rest], at.plan[rest], left, speeds, self.say
        )
        self._event("plan", plan=at.plan, slower=round(slower, 3))

    def _apply_stage(self, *, begins: bool = False) -> None:
        """Put a stage's rope into force; where it ``begins`` also what it does to weights once."""
        rope = self.recipe.stages[self.position.stage].rope
        if rope is not None:
            self.config = with_rope(self.config, rope)
            self.model.config = self.config
            if begins and rope.sharpness is not None:
                sharpen(self.model, rope.sharpness)

    def _report(self, when: str) -> None:
        stage = self.recipe.stages[self.position.stage]
        if stage.report is None:
            return
        tokenizer = None if self.recipe.tokenizer is None else Path(self.recipe.tokenizer)
        with torch.no_grad():
            figures = stage.report.measure(self.model, tokenizer)
        self._event("report", stage=stage.name, when=when, figures=dict(figures))

    # -- state -------------------------------------------------------------------------------------

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor that a step changes or depends on."""
        found = self.optimiser.tensors()
        return {
            "masters": {n: t for n, t in found.items() if n.startswith("master/")},
            "moments": {n: t for n, t in found.items() if not n.startswith("master/")},
            "extra": {
                "routing/counts": self.counts_LE,
                "routing/loads": self.loads.share_LE,
                "random": torch.get_rng_state(),
            },
        }

    def _state(self) -> dict[str, Any]:
        """Every other value that a step changes or depends on."""
        return {
            "position": asdict(self.position),
            "finished": self.position.stage == len(self.recipe.stages),
            "guard": self.guard.as_dict(),
            "ages": self.optimiser.ages(),
            "config": self.config.to_dict(),
            "log_bytes": self.log.sync(),
            "recipe": self.recipe.as_dict(),
            "budget": None if self.budget is None else self.budget.as_dict(),
            "fingerprint": self._fingerprint(),
        }

    def _save(self, *, mark: str | None = None, wait: bool = False) -> None:
        at = self.position
        snapshot = mark is not None or (at.step % self.recipe.save_every == 0 and not self.flagged)
        self._note(
            self.writer.save(
                at.step, self._groups(), self._state(), mark=mark, snapshot=snapshot, wait=wait
            )
        )

    def _restore(self, found: checkpoints.Checkpoint) -> None:
        raw = found.state
        self.position = Position(**raw["position"])
        self.guard = GuardState.from_dict(self.recipe.guard, raw["guard"])
        self.config = replace(ModelConfig.from_dict(raw["config"]), dtype=self.config.dtype)
        self.model.config = self.config
        last = len(self.recipe.stages) - 1
        self.optimiser.change(self.recipe.optimiser_of(min(self.position.stage, last)))
        groups = self._groups()
        random = groups["extra"]["random"]
        found.read({name: t for group in groups.values() for name, t in group.items()})
        torch.set_rng_state(random)
        self.optimiser.refresh(raw["ages"])

    def _fingerprint(self) -> dict[str, Any]:
        machine = checkpoints.fingerprint(workers=self.workers, device=self.recipe.device)
        stages = zip(self.recipe.stages, self.sources, strict=True)
        return machine | {f"data of {stage.name}": source.digest() for stage, source in stages}

    # -- the folder --------------------------------------------------------------------------------

    def _make_folder(self) -> None:
        with self._writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / LOCK).touch()

    def _write_recipe(self) -> None:
        text = json.dumps(self.recipe.as_dict(), indent=1)
        with self._writing(self.folder / RECIPE):
            scratch = self.folder / f"{RECIPE}.partial"
            scratch.write_text(text + "\n", encoding="utf-8")
            scratch.replace(self.folder / RECIPE)
        if self.recipe.tokenizer is None:
            return
        target = self.folder / TOKENIZER
        with self._writing(target):
            target.mkdir(exist_ok=True)
            for name in TOKENIZER_FILES:
                file = Path(self.recipe.tokenizer) / name
                if file.is_file():
                    shutil.copyfile(file, target / name)

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{path} could not be written: {error.strerror or error}. Free some space or "
                "choose another folder with --run."
            ) from error

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One process per folder; the system lets go of it however the process ends."""
        with (self.folder / LOCK).open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise TrainingError(
                    f"another process is training in {self.folder}. Stop it first, or choose "
                    "another folder with --run."
                ) from error
            yield

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """Threads and determinism as a run needs them; as they were afterwards."""
        threads = torch.get_num_threads()
        strict = torch.are_deterministic_algorithms_enabled()
        only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
        fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        torch.set_num_threads(self.threads)
        # On a GPU, fast kernels add in whatever order they finish; only a CPU promises bits.
        torch.use_deterministic_algorithms(self.recipe.device == "cpu")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
            torch.use_deterministic_algorithms(strict, warn_only=only_warn)
            torch.set_num_threads(threads)

    def _event(self, kind: str, **values: Any) -> None:
        self.log.write({"event": kind, "step": self.position.step, **values})

    def _note(self, line: str | None) -> None:
        if line is not None:
            self.say(line)
            self._event("not saved", why=line)


def _judged_loss(result: StepResult) -> float:
    """The next-token loss, which keeps its scale through a stage; NaN if any objective is."""
    return result.losses["main"] if math.isfinite(result.total) else result.total


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in values.items()}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested JSON as dotted keys; stages by their names."""
    if isinstance(value, dict):
        pairs = [(str(k), v) for k, v in cast("dict[str, Any]", value).items()]
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        stages = cast("list[dict[str, Any]]", value)
        pairs = [(str(one.get("name", i)), one) for i, one in enumerate(stages)]
    else:
        return {prefix: value}
    out: dict[str, Any] = {}
    for name, inside in pairs:
        out |= _flat(inside, f"{prefix}.{name}" if prefix else name)
    return out
