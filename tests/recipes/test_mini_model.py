"""The embedded model as it ships: it answers, it stops, its MTP head and its card are right."""

import json

import pytest
import torch
from recipes.mini import corpora, sources

import qnext
from qnext.engine.request import SamplingParams
from qnext.eval.text_tasks import teacher_forced
from qnext.model.batch import TokenBatch
from qnext.weights.checkpoint import embedded_models

MAX_BYTES = 40_000_000

# Written for this test and in no corpus.
HELD_OUT = (
    "Once upon a time, there was a small goat who lived next to a windmill. Every morning the "
    "goat went to the well to drink some water. One day the well was dry. The goat was very "
    "thirsty and sad. She asked the miller for help, and he gave her a big cup of milk. The "
    'goat was happy and said, "Thank you! You are my best friend." After that, they went to the'
    ' well together and looked inside. At the bottom there was a little frog. The frog said, "I'
    ' am sorry. I was so hot that I drank all the water." The goat laughed. She was not angry '
    "any more, and she helped the frog to come out. In the evening it began to rain, and the "
    "well was full again."
)


@pytest.fixture(scope="module")
def folder():
    models = embedded_models()
    assert "qnext-mini" in models, "src/qnext/models/qnext-mini is part of the repository"
    return models["qnext-mini"]


@pytest.fixture(scope="module")
def llm(folder):
    return qnext.LLM("qnext-mini", memory="64MiB")


@pytest.fixture(scope="module")
def model():
    return qnext.load_model("qnext-mini")


def test_mtp_predicts_the_token_after_next_from_the_hidden_rows(llm, model):
    ids = llm.tokenizer.encode(HELD_OUT)
    found = teacher_forced(model, [ids])
    assert found["right"] > 0.2
    assert found["same_as_main_head"] > 0.45
    # With the hidden rows of other positions little is left.
    batch = TokenBatch.pack([torch.tensor(ids)])
    with torch.no_grad():
        hidden_PD = model.run(batch)
        next_ids = torch.cat((batch.ids[1:], batch.ids.new_zeros(1)))
        misled = model.lm_logits(model.run_mtp(batch, next_ids, hidden_PD.roll(7, 0)))
    right = (misled[:-2].argmax(-1) == batch.ids[2:]).float().mean()
    assert float(right) < 0.7 * found["right"]


def test_held_out_text_is_likelier_than_its_words_in_reverse(llm, model):
    def loss(text: str) -> float:
        ids = torch.tensor([llm.tokenizer.encode(text)])
        with torch.no_grad():
            logits = model(ids).logits[0].float()
        return float(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]))

    backwards = " ".join(reversed(HELD_OUT.split()))
    assert loss(HELD_OUT) < loss(backwards) - 1.0


@pytest.mark.parametrize(
    "prompt", ["Hello!", "Who are you?", "Tell me a story about a little robot."]
)
def test_greedy_answers_are_sentences_that_stop(llm, prompt):
    params = SamplingParams(temperature=0.0, max_tokens=400)
    answer = llm.chat([{"role": "user", "content": prompt}], params)
    assert answer.finish_reason == "stop"
    text = answer.text.strip()
    assert len(text.split()) >= 2
    assert text[-1] in '.!?"'
    assert "<" not in text


def test_thinking_can_be_switched_off(llm):
    params = SamplingParams(temperature=0.0, max_tokens=60)
    question = [{"role": "user", "content": "What is 2 + 3?"}]
    thinking = llm.chat(question, params)
    plain = llm.chat(question, params, enable_thinking=False)
    assert thinking.reasoning
    assert plain.reasoning is None
    assert plain.finish_reason == "stop"


def test_folder_is_complete_and_small_enough(folder):
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
        "curves.png",
        "thinking_budget.png",
        "needles.png",
        "evaluation.json",
        "training.json",
        "certificate.md",
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_BYTES


def test_every_architectural_part_is_present(llm):
    config = llm.config
    assert config.model_type == "qwen3_next"
    assert len(config.delta_layers) == 3 * len(config.attention_layers)
    assert config.num_experts > config.num_experts_per_tok > 1
    assert config.shared_expert_intermediate_size
    assert config.rotary_dim < config.head_dim
    assert llm.model.has_mtp


def test_model_card_names_every_source_licence_and_attribution(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    for entry in (*sources.SOURCES, *corpora.EXTRA.values()):
        assert entry.name in card
        assert entry.licence in card
        assert entry.attribution in card


def test_the_card_and_the_record_tell_the_same(folder):
    record = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{record['results']['pairs']['accuracy']['share']:.1%}" in card
    assert f"{record['results']['drafts']['share']:.1%}" in card
    assert not record["skipped"]
