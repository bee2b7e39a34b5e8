"""Recipe: everything a training run is made of, as one value.

A recipe is a Python function without arguments that returns a ``Recipe``. This file says what a
recipe consists of, reads one from a file, and changes single settings of it (``--set``). What
the settings do stands where they are used: ``optim.py``, ``losses.py``, ``guard.py``,
``trainer.py``. Nothing here imports torch.
"""

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args, get_origin

from qnext.errors import RecipeError

if TYPE_CHECKING:
    from qnext.model.model import CausalLM
    from qnext.train.batch import DataSource

SHAPES = ("constant", "linear", "cosine", "sqrt")
"""Ways from the peak rate to the final one."""


# -- data ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What a stage asks of its data."""

    seed: int
    """The recipe's."""
    stage: int
    """Number of the stage, from 0: two stages on the same data see it in different orders."""
    row_tokens: int
    """Longest piece of a document."""
    batch_tokens: int
    """Tokens of one step, all micro-batches together."""
    micro_tokens: int
    """Tokens of one micro-batch at most."""
    vocab_size: int


class Data(Protocol):
    """What a stage trains on: a frozen dataclass of plain values, written into the run's record."""

    def open(self, need: Need) -> "DataSource":
        """Find the files and check them. Raises DataError."""
        ...

    def tokenizer_digest(self) -> str | None:
        """``tokenizer_digest`` of the tokenizer that made the ids; None for ids made without."""
        ...


class Report(Protocol):
    """A measurement of the model around a stage: a frozen dataclass of plain values."""

    def measure(self, model: "CausalLM", tokenizer: Path | None) -> Mapping[str, float]:
        """Figures by name, such as how many needles were found; they go into the log.

        ``model`` computes with the working weights and is not to be changed; ``tokenizer`` is the
        recipe's folder.
        """
        ...


def tokenizer_digest(folder: str | Path) -> str:
    """SHA-256 of a folder's tokenizer.json. Raises RecipeError when it is not there."""
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise RecipeError(f"tokenizer: {file} is not there. Give a folder that holds it.")
    return hashlib.sha256(file.read_bytes()).hexdigest()


# -- settings --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Learning rate of one stage: up to the peak, level, and down to the final rate."""

    peak: float
    warmup: float = 0.0
    """Share of the stage in which the rate rises linearly from ``start``."""
    start: float = 0.0
    """Share of the peak at the first step, if there is a warm-up."""
    shape: str = "constant"
    """How it falls: constant (not at all), linear, cosine, or sqrt (1 - sqrt(progress))."""
    decay_from: float = 0.0
    """Share of the stage at which it begins to fall; warm-up, level and fall make WSD."""
    final: float = 0.0
    """Share of the peak at the end of the fall."""

    def __post_init__(self) -> None:
        _one_of("schedule.shape", self.shape, SHAPES)
        _at_least("schedule.peak", self.peak, 0.0)
        for name in ("warmup", "start", "decay_from", "final"):
            _share(f"schedule.{name}", getattr(self, name))
        if self.shape != "constant" and self.decay_from < self.warmup:
            raise RecipeError(
                f"schedule: the rate cannot fall from {self.decay_from} while it rises until "
                f"{self.warmup}. Set decay_from to the end of the warm-up or later."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Objectives:
    """What is minimised: next-token loss plus these. One denominator serves all token losses."""

    mtp_weights: tuple[float, ...] = (0.3,)
    """Weight of the MTP loss at depth 1, 2, ...; empty leaves the head out of the step."""
    balance: float = 1e-3
    """Weight of the expert balance, which is 1 at an even load."""
    balance_scope: Literal["lagged", "micro"] = "lagged"
    """Whose loads it uses: the whole previous step's, or the micro-batch's own."""
    z: float = 0.0
    """Weight of the mean squared log-sum-exp of the router logits."""

    def __post_init__(self) -> None:
        _one_of("objectives.balance_scope", self.balance_scope, ("lagged", "micro"))
        for name in ("balance", "z"):
            _at_least(f"objectives.{name}", getattr(self, name), 0.0)
        for weight in self.mtp_weights:
            _at_least("objectives.mtp_weights", weight, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimiser:
    """AdamW for everything, or Muon for the matrices and AdamW for the rest."""

    kind: Literal["muon", "adamw"] = "muon"
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    momentum: float = 0.95
    """Of Muon, with Nesterov's correction."""
    weight_decay: float = 0.1
    """Multiplied by the learning rate."""
    norm_decay: Literal["all", "qk", "none"] = "all"
    """Zero-centred norms that decay, towards a gain of 1: all, those of queries and keys, none."""
    embedding_rate: float = 3.0
    """Multiplier of the learning rate of the embedding."""
    head_rate: float = 1.0
    """Multiplier of the learning rate of the output head."""
    embedding_decay: float = 0.0
    """Weight decay of embedding and output head."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0 for no limit."""

    def __post_init__(self) -> None:
        _one_of("optimiser.kind", self.kind, ("muon", "adamw"))
        _one_of("optimiser.norm_decay", self.norm_decay, ("all", "qk", "none"))
        for name in ("epsilon", "weight_decay", "embedding_rate", "head_rate", "embedding_decay"):
            _at_least(f"optimiser.{name}", getattr(self, name), 0.0)
        for value in (*self.betas, self.momentum):
            if not 0 <= value < 1:
                raise RecipeError(f"optimiser: betas and momentum lie in [0, 1), found {value}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary settings from a stage on; None keeps what was there."""

    theta: float | None = None
    """Base of the rotation."""
    yarn_factor: float | None = None
    """Context extension; the trained length is the model's limit so far."""
    max_position_embeddings: int | None = None
    sharpness: float | None = None
    """Factor on the gains of the query norms, once, when the stage begins: what a query looks for
    then keeps its weight among more keys than rows have."""

    def __post_init__(self) -> None:
        if self.sharpness is not None and not 0 < self.sharpness < math.inf:
            raise RecipeError(f"rope.sharpness: expected more than 0, found {self.sharpness}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One part of a run: its data, its length, and what is minimised how fast."""

    name: str
    data: Data
    tokens: int
    """Length in tokens."""
    schedule: Schedule
    elastic: bool = False
    """Under a budget of time or tokens, this stage takes what the others leave."""
    row_tokens: int = 1024
    batch_tokens: int = 8192
    micro_tokens: int = 4096
    objectives: Objectives = field(default_factory=Objectives)
    optimiser: Optimiser | None = None
    """None: the recipe's. Momenta start anew when the kind changes."""
    rope: Rope | None = None
    report: Report | None = None
    """Measured before the stage begins (and its rope is in force) and after it."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise RecipeError(
                f"stage name {self.name!r}: expected letters, digits, '-', '_' and '.'; it becomes "
                "part of file names."
            )
        for name in ("tokens", "row_tokens", "batch_tokens", "micro_tokens"):
            _at_least(f"stages.{self.name}.{name}", getattr(self, name), 1)
        if self.row_tokens > self.micro_tokens or self.micro_tokens > self.batch_tokens:
            raise RecipeError(
                f"stages.{self.name}: expected row_tokens <= micro_tokens <= batch_tokens, found "
                f"{self.row_tokens}, {self.micro_tokens}, {self.batch_tokens}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """When a step counts as broken or suspicious, and what follows."""

    window: int = 128
    """Steps whose losses and gradient norms are remembered."""
    warmup: int = 32
    """Steps before anything counts as suspicious."""
    deviations: float = 6.0
    """Suspicious: loss above median + this many median absolute deviations."""
    norm_factor: float = 10.0
    """Suspicious: gradient norm above this many times the median."""
    in_a_row: int = 2
    """So many suspicious steps one after another are rolled back,"""
    recent: int = 3
    """and so many within ``recent_steps``."""
    recent_steps: int = 50
    roll_backs: int = 3
    """So many roll-backs within ``roll_back_steps`` end the run."""
    roll_back_steps: int = 1000

    def __post_init__(self) -> None:
        for item in fields(self):
            _at_least(f"guard.{item.name}", getattr(self, item.name), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A complete run."""

    name: str
    model: Mapping[str, Any]
    """Keys of config.json."""
    stages: tuple[Stage, ...]
    start: str | None = None
    """Model folder the weights are taken from; None draws them."""
    tokenizer: str | None = None
    """Folder with tokenizer.json; it must be the one the data was made with, and is exported."""
    generation: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Keys of the exported generation_config.json beside the token ids."""
    seed: int = 1
    optimiser: Optimiser = field(default_factory=Optimiser)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Working copies of the weights; masters are float32 in any case."""
    router_init: Literal["normalised", "plain"] = "normalised"
    checkpointing: bool = False
    """Compute the layers' activations again in the backward pass instead of keeping them."""
    device: str = "cpu"
    workers: int = 0
    """Micro-batches computed side by side, each on its share of the threads; 0: one per core."""
    save_every: int = 200
    """Steps between checkpoints; a roll-back goes to the last of them."""
    keep: int = 2
    """Checkpoints that stay, ends of stages not counted."""
    probe_every: int = 50
    """Steps between looks inside the model (activations, attention, gates)."""
    guard: Guard = field(default_factory=Guard)

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, ("bfloat16", "float32"))
        _one_of("router_init", self.router_init, ("normalised", "plain"))
        for name, least in (("workers", 0), ("save_every", 1), ("keep", 1), ("probe_every", 0)):
            _at_least(name, getattr(self, name), least)
        if not self.stages:
            raise RecipeError("stages: expected at least one.")
        names = [stage.name for stage in self.stages]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise RecipeError(f"stages: two have the name {min(twice)!r}. Give each its own.")

    def optimiser_of(self, stage: int) -> Optimiser:
        """The settings in force in a stage."""
        own = self.stages[stage].optimiser
        return self.optimiser if own is None else own

    def as_dict(self) -> dict[str, Any]:
        """The whole recipe as JSON values, data included."""
        return cast("dict[str, Any]", _as_json(self))

    def digest(self) -> str:
        """Short name of exactly these settings."""
        text = json.dumps(self.as_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# -- reading and changing --------------------------------------------------------------------------


def load_recipe(name: str) -> Recipe:
    """The recipe of ``FILE.py``, ``FILE.py:function`` or ``module:function``.

    Without a function, the one called ``recipe``. Raises RecipeError.
    """
    place, _, function = name.partition(":")
    function = function or "recipe"
    try:
        module = _import(place)
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"recipe {place!r} cannot be loaded: {error}. Expected a file such as "
            "recipes/mini/recipe.py, or the name of a module."
        ) from error
    except SyntaxError as error:
        raise RecipeError(f"recipe {place!r} is not valid Python: {error}.") from error
    make = getattr(module, function, None)
    if not callable(make):
        here = [n for n, v in vars(module).items() if inspect.isfunction(v) and n[0] != "_"]
        raise RecipeError(f"{place} has no function {function!r}.{nearest(function, here)}")
    try:
        made = make()
    except TypeError as error:
        raise _explained(error) from error
    if not isinstance(made, Recipe):
        raise RecipeError(
            f"{place}:{function} returned a {type(made).__name__}; expected a Recipe."
        )
    return made


def changed(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with ``key=value`` settings applied, such as ``stages.S1.tokens=1e6``.

    Keys are the fields' names joined by dots; a stage is named, ``*`` means all of them; keys of
    ``model`` are those of config.json. Values are JSON, or text. Raises RecipeError, naming the
    nearest key for one that is unknown.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {setting}: expected key=value, such as seed=2.")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        recipe = cast("Recipe", _with(recipe, key.strip().split("."), value, key.strip()))
    return recipe


def nearest(word: str, known: Sequence[str]) -> str:
    """A sentence with the known word that looks most like ``word``, or with all of them."""
    found = difflib.get_close_matches(word, known, 1, 0.5)
    if found:
        return f" Did you mean {found[0]!r}?"
    return f" Known are {', '.join(sorted(known))}." if known else ""


def _import(place: str) -> types.ModuleType:
    if not place.endswith(".py"):
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(place)
    file = Path(place).resolve()
    if not file.is_file():
        raise RecipeError(f"recipe {place} is not there.")
    here = Path.cwd().resolve()
    if file.is_relative_to(here):
        # As a module of its package, so that recipes can import each other.
        dotted = ".".join(file.relative_to(here).with_suffix("").parts)
        if all(part.isidentifier() for part in dotted.split(".")):
            if str(here) not in sys.path:
                sys.path.insert(0, str(here))
            return importlib.import_module(dotted)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None, file
    assert spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def _explained(error: TypeError) -> Exception:
    """A wrong keyword of a settings class as a message with the nearest right one."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    kinds = (Recipe, Stage, Schedule, Objectives, Optimiser, Rope, Guard)
    known = {kind.__name__: kind for kind in kinds}
    if found and found[1] in known:
        names = [item.name for item in fields(known[found[1]])]
        return RecipeError(f"{found[1]} has no key {found[2]!r}.{nearest(found[2], names)}")
    missing = re.search(r"(\w+)\.__init__\(\) missing \d+ required keyword.*: (.*)", str(error))
    if missing and missing[1] in known:
        return RecipeError(f"{missing[1]} needs {missing[2]}. Set it in the recipe.")
    return error


def _with(node: Any, path: list[str], value: Any, key: str) -> Any:
    """``node`` with the setting at ``path`` replaced."""
    name, rest = path[0], path[1:]
    if isinstance(node, tuple):
        stages = cast("tuple[Stage, ...]", node)
        names = [stage.name for stage in stages]
        if name != "*" and name not in names:
            raise RecipeError(f"--set {key}: no stage {name!r}.{nearest(name, names)}")
        if not rest:
            raise RecipeError(f"--set {key}: name a setting of the stage, such as {key}.tokens.")
        return tuple(_with(s, rest, value, key) if name in ("*", s.name) else s for s in stages)
    if isinstance(node, Mapping):
        known = cast("Mapping[str, Any]", node)
        if not key.startswith("model."):
            return {**known, ".".join(path): value}
        if name not in known and name not in _model_keys():
            hint = nearest(name, sorted({*known, *_model_keys()}))
            raise RecipeError(f"--set {key}: config.json has no key {name!r}.{hint}")
        return {**known, ".".join(path): value}
    names = [item.name for item in fields(node)]
    if name not in names:
        raise RecipeError(f"--set {key}: {type(node).__name__} has no {name!r}."
                          f"{nearest(name, names)}")  # fmt: skip
    old = getattr(node, name)
    if rest:
        if old is None:
            raise RecipeError(f"--set {key}: {name} is not set in this recipe.")
        if not (is_dataclass(old) or isinstance(old, (tuple, Mapping))):
            raise RecipeError(f"--set {key}: {name} has no settings of its own.")
        return dataclasses.replace(node, **{name: _with(old, rest, value, key)})
    if is_dataclass(old) or (old and isinstance(old, tuple) and is_dataclass(old[0])):
        raise RecipeError(f"--set {key}: name one of its settings, such as {key}.NAME.")
    hints = typing.get_type_hints(type(node), _names(type(node)))
    return dataclasses.replace(node, **{name: _fitted(value, hints[name], key)})


def _names(kind: type) -> dict[str, Any]:
    return {**vars(sys.modules[kind.__module__]), "DataSource": object, "CausalLM": object}


def _fitted(value: Any, hint: Any, key: str) -> Any:
    """A JSON value as the type a field asks for."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        [hint] = [choice for choice in choices if choice is not type(None)][:1]
        return _fitted(value, hint, key)
    if origin is Literal:
        if value not in choices:
            said = ", ".join(map(str, choices))
            raise RecipeError(f"--set {key}: expected one of {said}, found {value!r}.")
        return value
    if origin is tuple and isinstance(value, list):
        kind = choices[0]
        return tuple(_fitted(one, kind, key) for one in cast("list[Any]", value))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int and is_number and value == int(value):
        return int(value)
    if hint is float and is_number:
        return float(value)
    if hint is str and not isinstance(value, (list, dict)):
        return value if isinstance(value, str) else json.dumps(value)
    plain: type = origin or hint
    if plain not in (int, float, str) and isinstance(plain, type) and isinstance(value, plain):
        return value
    said = getattr(hint, "__name__", str(hint))
    raise RecipeError(f"--set {key}: expected {said}, found {value!r}.")


def _model_keys() -> set[str]:
    from qnext.config import ModelConfig

    also = {"rope_theta", "rope_scaling", "partial_rotary_factor", "full_attention_interval"}
    return {item.name for item in fields(ModelConfig)} | also | {"num_nextn_predict_layers"}


def _as_json(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        inside = {item.name: _as_json(getattr(value, item.name)) for item in fields(value)}
        return {"kind": type(value).__name__, **inside} if _is_data(value) else inside
    if isinstance(value, Mapping):
        return {str(k): _as_json(v) for k, v in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(one) for one in cast("Sequence[Any]", value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise RecipeError(
        f"a recipe is made of plain values; found {value!r}, which is a {type(value).__name__}."
    )


def _is_data(value: object) -> bool:
    return callable(getattr(value, "open", None)) or callable(getattr(value, "measure", None))


def _one_of(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise RecipeError(
            f"{name}: expected one of {', '.join(known)}, found {value!r}."
            + (nearest(value, known) if isinstance(value, str) else "")
        )


def _at_least(name: str, value: float, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
        raise RecipeError(f"{name}: expected a number of at least {least}, found {value!r}.")


def _share(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise RecipeError(f"{name}: expected a share from 0 to 1, found {value!r}.")


__all__ = [
    "Data", "Guard", "Need", "Objectives", "Optimiser", "Recipe", "Report", "Rope", "Schedule",
    "Stage", "changed", "load_recipe", "nearest", "tokenizer_digest",
]  # fmt: skip
