"""What a run starts from: configuration, weights, and the data of every stage, checked together."""

from dataclasses import replace

import torch

from qnext.config import ModelConfig, RopeConfig
from qnext.errors import RecipeError
from qnext.model.model import CausalLM, initialise
from qnext.ops import OpSpec, select
from qnext.text.tokenizer import Tokenizer
from qnext.train.batch import DataSource
from qnext.train.recipe import Need, Recipe, Rope, tokenizer_digest
from qnext.weights.checkpoint import load_model

_ROUTER_WIDTH = 2048
"""Width at which a normalised router starts with rows as long as plainly drawn ones."""


def start_config(recipe: Recipe) -> ModelConfig:
    """The configuration a run begins with. Raises RecipeError, ConfigError."""
    if recipe.start is None:
        if not recipe.model:
            raise RecipeError("model: expected keys of config.json, or a model folder in start.")
        return ModelConfig.from_dict({**recipe.model, "dtype": recipe.dtype})
    if recipe.model:
        raise RecipeError(
            "model: the weights come from the folder in start, and so does the configuration. "
            "Leave model empty, or leave start out."
        )
    found = ModelConfig.from_file(recipe.start)
    # Packed weights are unpacked to be trained; what comes out is not packed.
    source = {key: value for key, value in found.source.items() if key != "quantization_config"}
    return replace(found, dtype=recipe.dtype, source=source)


def start_model(recipe: Recipe, config: ModelConfig) -> CausalLM:
    """Fresh or loaded weights in float32, on the recipe's device."""
    ops = select(OpSpec(device=recipe.device, dtype=getattr(torch, recipe.dtype), grad=True))
    if recipe.start is not None:
        model = load_model(recipe.start, dtype="float32", ops=ops).train()
        model.config = config = replace(config, num_mtp_layers=model.config.num_mtp_layers)
        return model.to(recipe.device)
    model = CausalLM(config, ops=ops).float()
    initialise(model, recipe.seed)
    if recipe.router_init == "normalised":
        normalise_routers(model)
    return model.to(recipe.device)


@torch.no_grad()
def normalise_routers(model: CausalLM) -> None:
    """Give every expert the same chance at the start: rows of equal length that sum to zero.

    Their length is that of rows drawn with the model's initializer_range at a width of 2,048, so
    that inputs of unit size give logits of the same variance whatever the width.
    """
    length = model.config.initializer_range * _ROUTER_WIDTH**0.5
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight") and parameter.shape[0] > 1:
            centred = parameter - parameter.mean(0, keepdim=True)
            parameter.copy_(centred * (length / centred.norm(dim=1, keepdim=True)))


def open_sources(recipe: Recipe, config: ModelConfig) -> list[DataSource]:
    """The data of every stage.

    Raises RecipeError for data of another tokenizer, TokenizerError for a tokenizer that does not
    fit the model, DataError.
    """
    wanted = None
    if recipe.tokenizer is not None:
        wanted = tokenizer_digest(recipe.tokenizer)
        # Raises TokenizerError when the tokenizer has more ids than the model has rows.
        Tokenizer.from_folder(recipe.tokenizer).undefined_ids(config.vocab_size)
    sources: list[DataSource] = []
    for number, stage in enumerate(recipe.stages):
        made_with = stage.data.tokenizer_digest()
        if made_with is not None and wanted is not None and made_with != wanted:
            raise RecipeError(
                f"stages.{stage.name}: its data was made with another tokenizer than the one in "
                f"{recipe.tokenizer} (SHA-256 {made_with[:12]} and {wanted[:12]}). Prepare the "
                "data again with that tokenizer, or name the right folder."
            )
        need = Need(
            seed=recipe.seed,
            stage=number,
            row_tokens=stage.row_tokens,
            batch_tokens=stage.batch_tokens,
            micro_tokens=stage.micro_tokens,
            vocab_size=config.vocab_size,
        )
        sources.append(stage.data.open(need))
    return sources


def with_rope(config: ModelConfig, change: Rope) -> ModelConfig:
    """A configuration with a stage's rotary settings."""
    rope: RopeConfig = config.rope
    if change.theta is not None:
        rope = replace(rope, rope_theta=change.theta)
    if change.yarn_factor is not None:
        trained = rope.original_max_position_embeddings or config.max_position_embeddings
        rope = replace(
            rope,
            rope_type="yarn",
            factor=change.yarn_factor,
            original_max_position_embeddings=trained,
        )
    limit = change.max_position_embeddings or config.max_position_embeddings
    return replace(config, rope=rope, max_position_embeddings=limit)


@torch.no_grad()
def sharpen(model: CausalLM, factor: float) -> None:
    """Multiply the gains of the query norms of all layers before the MTP head, in place.

    Logits of attention grow by the same factor. Raises RecipeError for a model whose queries have
    no norm.
    """
    gains = [
        parameter
        for name, parameter in model.named_parameters()
        if name.startswith("model.") and name.endswith("self_attn.q_norm.weight")
    ]
    if not gains:
        raise RecipeError("rope.sharpness: this model has no query norms. Leave it out.")
    # The gain is 1 + weight where norms are zero-centred.
    offset = 1.0 if model.config.is_hybrid else 0.0
    for gain in gains:
        gain.add_(offset).mul_(factor).sub_(offset)
