"""Recipes: what is misspelt is named, and nothing is taken for something else."""

from pathlib import Path

import pytest
from tests.train.tiny_runs import Counting, tiny_recipe

from qnext.errors import RecipeError
from qnext.train.recipe import Guard, Optimiser, Rope, Schedule, changed, load_recipe


def test_settings_are_changed_by_their_dotted_names() -> None:
    made = changed(
        tiny_recipe(),
        ["seed=7", "stages.S1.tokens=2e3", "stages.*.schedule.peak=0.5", "model.num_experts=8",
         "dtype=bfloat16", "optimiser.betas=[0.8, 0.9]", "stages.S2.objectives.mtp_weights=[]",
         "tokenizer=some/folder", "stages.S2.rope.theta=1e6", "start=null"],
    )  # fmt: skip
    assert made.seed == 7
    assert [stage.tokens for stage in made.stages] == [2000, 384]
    assert [stage.schedule.peak for stage in made.stages] == [0.5, 0.5]
    assert made.model["num_experts"] == 8
    assert made.dtype == "bfloat16"
    assert made.optimiser.betas == (0.8, 0.9)
    assert made.stages[1].objectives.mtp_weights == ()
    assert made.tokenizer == "some/folder"
    assert made.stages[1].rope is not None
    assert made.stages[1].rope.theta == 1e6


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sead=1", "Recipe has no 'sead'. Did you mean 'seed'?"),
        ("stages.S1.row_token=4", "Stage has no 'row_token'. Did you mean 'row_tokens'?"),
        ("stages.S3.tokens=4", "no stage 'S3'. Did you mean 'S"),
        ("stages.S1=4", "name a setting of the stage"),
        ("stages.S1.schedule.peek=1", "Schedule has no 'peek'. Did you mean 'peak'?"),
        ("model.num_expert=4", "config.json has no key 'num_expert'. Did you mean 'num_experts'?"),
        ("seed=many", "expected int, found 'many'"),
        ("seed=1.5", "expected int, found 1.5"),
        ("checkpointing=1", "expected bool, found 1"),
        ("dtype=float8", "expected one of bfloat16, float32, found 'float8'"),
        ("optimiser=adamw", "name one of its settings"),
        ("optimiser.kind=muen", "expected one of muon, adamw"),
        ("stages.S1.optimiser.kind=adamw", "optimiser is not set in this recipe"),
        ("seed", "expected key=value"),
    ],
)
def test_wrong_settings_are_refused(setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match="--set") as caught:
        changed(tiny_recipe(), [setting])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Recipe(nam='x')", "Recipe has no key 'nam'. Did you mean 'name'?"),
        ("Schedule(peak=1, warm_up=0.1)", "Schedule has no key 'warm_up'. Did you mean 'warmup'?"),
        ("Stage(name='S1')", "Stage needs 'data', 'tokens', and 'schedule'"),
        ("Optimiser(kind='mion')", "expected one of muon, adamw, found 'mion'. Did you mean"),
        ("3", "returned a int; expected a Recipe"),
    ],
)
def test_wrong_keys_in_a_recipe_file_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(
        "from qnext.train.recipe import *\nfrom qnext.train.recipe import Optimiser\n"
        f"def recipe():\n    return {line}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file))
    assert message in str(caught.value)


def test_other_errors_of_a_recipe_are_not_disguised(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text("def recipe():\n    return len(3)\n")
    with pytest.raises(TypeError, match="len"):
        load_recipe(str(file))


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not there"):
        load_recipe(str(tmp_path / "none.py"))
    with pytest.raises(RecipeError, match="cannot be loaded"):
        load_recipe("no_such_module_at_all")
    with pytest.raises(RecipeError, match="has no function 'tiny_recip'"):
        load_recipe("tests/train/tiny_runs.py:tiny_recip")
    assert load_recipe("tests/train/tiny_runs.py:tiny_recipe").name == "tiny"
    assert load_recipe("tests.train.tiny_runs:tiny_recipe").name == "tiny"


def test_contradictions_are_refused() -> None:
    with pytest.raises(RecipeError, match="row_tokens <= micro_tokens <= batch_tokens"):
        changed(tiny_recipe(), ["stages.S1.row_tokens=4000"])
    with pytest.raises(RecipeError, match="cannot fall"):
        Schedule(peak=1, warmup=0.5, shape="linear", decay_from=0.1)
    with pytest.raises(RecipeError, match="share from 0 to 1"):
        Schedule(peak=1, warmup=3)
    with pytest.raises(RecipeError, match="betas"):
        Optimiser(betas=(0.9, 1.0))
    with pytest.raises(RecipeError, match="at least 1"):
        Guard(window=0)
    with pytest.raises(RecipeError, match="sharpness: expected more than 0"):
        Rope(sharpness=0.0)
    stage = tiny_recipe().stages[0]
    with pytest.raises(RecipeError, match="two have the name 'S1'"):
        tiny_recipe(stages=(stage, stage))
    with pytest.raises(RecipeError, match="at least one"):
        tiny_recipe(stages=())


def test_the_digest_tells_any_two_recipes_apart() -> None:
    one = tiny_recipe()
    assert one.digest() == tiny_recipe().digest()
    others = [
        changed(one, ["stages.S2.schedule.final=0.2"]),
        changed(one, ["model.hidden_size=32"]),
        tiny_recipe(data=Counting(wild=(3,))),
    ]
    assert len({one.digest(), *(other.digest() for other in others)}) == 4
