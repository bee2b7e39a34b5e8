"""From a run's checkpoint to the model folder that ships: weights in bfloat16, tokenizer, settings.

python -m recipes.mini.export --run runs/mini --out src/qnext/models/qnext-mini
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import torch
from recipes.mini import optim
from safetensors import safe_open

import qnext
from qnext.config import ModelConfig
from qnext.errors import DataError
from qnext.model.model import CausalLM

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
"""A small model wanders at the family's usual 0.7."""


def read_state(path: Path) -> dict:
    """What a checkpoint says about its run. Raises DataError if there is no checkpoint."""
    if not path.is_file():
        raise DataError(f"{path} is not there. Run `python -m recipes.mini.train` first.")
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["state"])


@torch.no_grad()
def trained_model(path: Path, token_ids: Mapping[str, int]) -> CausalLM:
    """The model of a checkpoint, masters rounded to bfloat16, decay terms kept in float32."""
    settings = {**read_state(path)["config"], "dtype": "bfloat16", **token_ids}
    model = CausalLM(ModelConfig.from_dict(settings))
    with safe_open(path, framework="pt") as file:
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"master/{name}"))
            if not name.endswith(optim.DECAY_TERMS):
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def export(run: Path, shards: Path, out: Path) -> None:
    """Write weights, config, tokenizer, chat template and generation settings into ``out``."""
    tokenizer = shards / "tokenizer"
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids = {entry["content"]: int(i) for i, entry in settings["added_tokens_decoder"].items()}
    end_of_text, end_of_turn = ids["<|endoftext|>"], ids["<|im_end|>"]
    token_ids = {
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_turn,
        "pad_token_id": end_of_text,
    }
    model = trained_model(run / "state.safetensors", token_ids)
    out.mkdir(parents=True, exist_ok=True)
    qnext.save_model(model, out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, out / name)
    template = files("qnext.text").joinpath("templates/qwen3.jinja").read_text(encoding="utf-8")
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    generation = {
        "bos_token_id": end_of_text,
        "eos_token_id": [end_of_turn, end_of_text],
        "pad_token_id": end_of_text,
        **SAMPLING,
    }
    text = json.dumps(generation, indent=2)
    (out / "generation_config.json").write_text(text + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.mini.export", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/mini"))
    parser.add_argument("--shards", type=Path, default=Path(".data/mini"))
    parser.add_argument("--out", type=Path, default=Path("src/qnext/models/qnext-mini"))
    options = parser.parse_args(arguments)
    export(options.run, options.shards, options.out)
    size = sum(path.stat().st_size for path in options.out.iterdir())
    print(f"{options.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
