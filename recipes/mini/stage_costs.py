"""What each stage of a recipe costs: tokens, arithmetic, and minutes at a given speed.

python -m recipes.mini.stage_costs recipes/qnext_mini.py --gflops 200
"""

import argparse

from qnext.config import ModelConfig
from qnext.cost import training_flops
from qnext.train.recipe import load_recipe


def stage_costs(recipe_name: str, gflops: float) -> list[tuple[str, int, float, float]]:
    """(stage, tokens, millions of operations per token, minutes) at the stages' own lengths."""
    recipe = load_recipe(recipe_name)
    config = ModelConfig.from_dict(dict(recipe.model))
    found = []
    for stage in recipe.stages:
        depths = len(stage.objectives.mtp_weights)
        # Rows of half the longest piece: what attention sees on average.
        row = stage.row_tokens // 2
        per_token = training_flops(config, [row], mtp_depths=depths) / row
        minutes = stage.tokens * per_token / (gflops * 1e9) / 60
        found.append((stage.name, stage.tokens, per_token / 1e6, minutes))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.mini.stage_costs", description=__doc__)
    parser.add_argument("recipe", nargs="?", default="recipes/qnext_mini.py")
    parser.add_argument("--gflops", type=float, default=200.0, help="effective speed")
    options = parser.parse_args(arguments)
    costs = stage_costs(options.recipe, options.gflops)
    for name, tokens, each, minutes in costs:
        print(f"{name:10}{tokens:>12,} tokens{each:>8.1f} MFLOP each{minutes:>8.1f} min")
    total = sum(minutes for *_, minutes in costs)
    print(f"{'all':10}{sum(t for _, t, *_ in costs):>12,} tokens{'':>19}{total:>8.1f} min")


if __name__ == "__main__":
    main()
