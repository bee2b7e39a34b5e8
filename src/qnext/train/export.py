"""From a run's last checkpoint to a model folder that other programs read."""

import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from qnext.config import ModelConfig
from qnext.errors import CheckpointError, TrainingError
from qnext.model.model import CausalLM
from qnext.text.tokenizer import Tokenizer
from qnext.train import state as checkpoints
from qnext.train.trainer import TOKENIZER
from qnext.weights.checkpoint import save_model
from qnext.weights.layout import FLOAT32_PARAMETERS

DTYPES = ("bfloat16", "float16", "float32")
_TEMPLATE = "chat_template.jinja"


def export_run(
    run: Path, target: Path, *, dtype: str = "bfloat16", say: Callable[[str], None]
) -> Path:
    """Write the newest checkpoint of a run as a Hugging Face folder, MTP head included.

    Masters are rounded to ``dtype``; decay terms keep float32. With the run's tokenizer go its
    ids for beginning, end and padding, the chat template, and generation_config.json with what the
    recipe says. Raises TrainingError when the run has no checkpoint, CheckpointError when the
    target cannot be written.
    """
    if not checkpoints.checkpoint_paths(run):
        raise TrainingError(
            f"{run} holds no checkpoint. Give the folder of a run (--run of qnext train)."
        )
    found = checkpoints.newest(run, say)
    if found is None:
        raise TrainingError(f"{run}: every checkpoint is damaged; there is nothing to export.")
    if not found.state["finished"]:
        at = found.state["position"]
        say(f"the run is not finished: exporting step {found.step} of {sum(at['plan'])}.")
    tokenizer = run / TOKENIZER
    ids = _special_ids(tokenizer) if tokenizer.is_dir() else {}
    raw = {**found.state["config"], **ids, "dtype": dtype}
    model = _trained(found, ModelConfig.from_dict(raw), getattr(torch, dtype))
    save_model(model, target)
    if tokenizer.is_dir():
        _write_text_files(tokenizer, target, ids, found.state["recipe"]["generation"])
    return target


@torch.no_grad()
def _trained(found: checkpoints.Checkpoint, config: ModelConfig, dtype: torch.dtype) -> CausalLM:
    model = CausalLM(config).float()
    found.read({f"master/{name}": p for name, p in model.named_parameters()})
    for name, parameter in model.named_parameters():
        if not name.endswith(FLOAT32_PARAMETERS):
            parameter.data = parameter.data.to(dtype)
    return model


def _special_ids(folder: Path) -> dict[str, int]:
    """Ids of beginning, end and padding, as config.json names them."""
    tokenizer = Tokenizer.from_folder(folder)
    found = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    # The family begins a document with the token that pads.
    found["bos_token_id"] = found["pad_token_id"]
    return {name: id for name, id in found.items() if id is not None}


def _write_text_files(
    tokenizer: Path, target: Path, ids: dict[str, int], generation: dict[str, Any]
) -> None:
    try:
        for file in sorted(tokenizer.iterdir()):
            shutil.copyfile(file, target / file.name)
        if not (tokenizer / _TEMPLATE).is_file():
            built_in = files("qnext.text").joinpath("templates/qwen3.jinja")
            (target / _TEMPLATE).write_text(built_in.read_text(encoding="utf-8"), encoding="utf-8")
        ends = [ids[name] for name in ("eos_token_id", "pad_token_id") if name in ids]
        settings = {**ids, **({"eos_token_id": list(dict.fromkeys(ends))} if ends else {})}
        text = json.dumps({**settings, **generation}, indent=2)
        (target / "generation_config.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"{target} could not be written: {error.strerror or error}. Free some space or choose "
            "another path."
        ) from error
