"""The recipe of the embedded model, on a tiny model and text made on the spot."""

import itertools
import json
import lzma
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from recipes.mini import (
    arithmetic,
    batches,
    chats,
    data,
    documents,
    losses,
    optim,
    smalltalk,
    sources,
    story_chats,
    tokenizer,
    train,
)

from qnext.config import ModelConfig
from qnext.data.generate import stories
from qnext.errors import DataError
from qnext.model.model import CausalLM, initialise
from qnext.text.chat import ChatTemplate

LINES = [
    "The cat sat on the mat, and the dog didn't like it.",
    "Once upon a time there was a little bird who could not sing 123 songs.",
    "\n\nIt rained  all day.\r\nBen stayed at home; he read a book!\n",
]
TINY = {
    **train.MODEL,
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "intermediate_size": 32,
}


@pytest.fixture(scope="module")
def coder():
    """A tokenizer of 512 ids."""
    rng = Random(0)
    made = [stories.story(rng)[2] for _ in range(40)]
    return tokenizer.train_tokenizer([*LINES, *made], vocab_size=512)


@pytest.fixture(scope="module")
def shards_dir(coder, tmp_path_factory):
    """Shards of three generated sources, as data.build lays them out."""
    folder = tmp_path_factory.mktemp("shards")
    for name in ("arithmetic", "smalltalk", "template_stories"):
        entry = sources.source(name)
        texts = documents.pretraining(entry, [], seed=1)
        talks = documents.finetuning(entry, [], seed=1)
        first = [document.item for document, _ in zip(texts, range(60), strict=False)]
        second = [document.item for document, _ in zip(talks, range(60), strict=False)]
        data.write_shard(folder / "pretraining", name, first, coder, every_turn=True)
        data.write_shard(folder / "finetuning", name, second, coder)
    return folder


@pytest.fixture(scope="module")
def template():
    return ChatTemplate.builtin()


def some_chats() -> list[chats.Chat]:
    rng = Random(5)
    makers = (arithmetic.arithmetic_chat, smalltalk.smalltalk_chat, story_chats.story_chat)
    return [make(rng) for make in makers for _ in range(60)]


def rendered(chat: chats.Chat, template: ChatTemplate) -> str:
    """What the chat template makes of the same turns."""
    messages = [{"role": role, "content": content} for role, content in chat.messages]
    if chat.reasoning:
        messages[-1]["reasoning_content"] = chat.reasoning
    return template.render(messages, add_generation_prompt=False)


# ---------------------------------------------------------------- tokenizer


@pytest.mark.parametrize(
    "text", [*LINES, "naïve café 日本語 🙂", "a   b    ", "<|im_start|>user\nHi"]
)
def test_tokenizer_gives_back_what_it_read(coder, text):
    assert coder.decode(coder.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_cuts_numbers_into_digits(coder):
    assert [piece.lstrip("Ġ") for piece in coder.encode("10 345").tokens] == [*"10", "", *"345"]


def test_tokenizer_puts_added_tokens_last_and_leaves_spare_rows(coder):
    ids = [coder.token_to_id(text) for text, _ in tokenizer.ADDED_TOKENS]
    assert ids == list(range(coder.get_vocab_size() - 26, coder.get_vocab_size()))
    assert coder.get_vocab_size() <= 512 - tokenizer.SPARE_ROWS


def test_tokenizer_files_are_read_by_the_package(coder, tmp_path):
    from qnext.text.tokenizer import Tokenizer

    tokenizer.save_tokenizer(coder, tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    text = "<|im_start|>user\nThe cat 12<|im_end|>"
    assert ours.encode(text) == coder.encode(text).ids
    assert (ours.eos_token, ours.pad_token) == ("<|im_end|>", "<|endoftext|>")


# ---------------------------------------------------------------- chats


def test_chats_are_written_like_the_template_writes_them(template):
    for chat in some_chats():
        assert chats.render(chat) == rendered(chat, template)


def test_encoding_in_pieces_equals_encoding_the_whole(coder):
    newline = coder.encode("\n").ids
    for chat in some_chats():
        assert chats.encode(chat, coder)[0] + newline == coder.encode(chats.render(chat)).ids


def test_loss_falls_on_assistant_tokens_and_nowhere_else(coder):
    for chat in some_chats():
        ids, judged = chats.encode(chat, coder)
        text = coder.decode([i for i, j in zip(ids, judged, strict=True) if j], False)
        final = chat.messages[-1][1] + "<|im_end|>"
        block = "" if chat.forced_block else f"<think>\n{chat.reasoning}\n</think>\n\n"
        expected = ""
        for role, content in chat.messages[:-1]:
            if role == "assistant":
                # The first token of an earlier turn has no loss.
                turn = coder.encode(content + "<|im_end|>").ids
                expected += coder.decode(turn[1:], False)
        assert text == expected + block + final


def test_every_turn_is_judged_in_pretraining_but_not_the_headers(coder):
    chat = chats.Chat(
        messages=(("user", "Hi cat"), ("assistant", "Hello"), ("user", "Sit"), ("assistant", "No"))
    )
    ids, judged = chats.encode(chat, coder, every_turn=True)
    left = coder.decode([i for i, j in zip(ids, judged, strict=True) if not j], False)
    first = coder.decode(coder.encode("Hello").ids[:1])
    assert left == (
        f"<|im_start|>user\n\n<|im_start|>assistant\n{first}\n<|im_start|>user\n\n<|im_start|>assistant\n"
    )


# ---------------------------------------------------------------- generators


@pytest.mark.parametrize(
    "make",
    [arithmetic.arithmetic_chat, smalltalk.smalltalk_chat, story_chats.story_chat],
    ids=lambda make: make.__name__,
)
def test_generators_repeat_with_the_same_seed(make):
    first, second, third = (
        [make(rng) for _ in range(30)] for rng in (Random(3), Random(3), Random(4))
    )
    assert first == second
    assert first != third


def test_sums_differences_and_products_are_right():
    rng = Random(11)
    for _ in range(300):
        a, b = rng.randint(0, 999), rng.randint(0, 999)
        big, small = max(a, b), min(a, b)
        for work, value in (
            (arithmetic.addition(a, b), a + b),
            (arithmetic.subtraction(big, small), big - small),
            (arithmetic.product(a % 100, b % 10), (a % 100) * (b % 10)),
        ):
            assert work.answer == f"{work.question} = {value}."
            assert work.trace.rstrip(".").split()[-1] == str(value)


def test_every_step_of_a_trace_is_a_true_equation():
    rng = Random(12)
    for _ in range(300):
        a, b = rng.randint(0, 999), rng.randint(0, 999)
        for work in (arithmetic.addition(a, b), arithmetic.subtraction(max(a, b), min(a, b))):
            body = work.trace.split(": ", 1)[1]
            steps = [part for part in body.replace(";", ",").split(",") if "=" in part]
            assert steps
            for step in steps:
                left, right = step.split("=")
                assert eval(left, {"__builtins__": {}}) == int(right.split(".")[0])


def test_held_out_pairs_are_never_generated():
    rng = Random(13)
    for _ in range(1500):
        work = arithmetic.calculation(rng)
        numbers = [
            int(n)
            for n in work.answer.split(" = ")[0].replace("x", "-").split(" - ")
            if "+" not in n
        ] or [int(n) for n in work.answer.split(" = ")[0].split(" + ")]
        assert not arithmetic.is_held_out(*numbers), work


def test_about_one_pair_in_ten_is_held_out():
    pairs = [(a, b) for a in range(10, 100) for b in range(a)]
    share = sum(arithmetic.is_held_out(a, b) for a, b in pairs) / len(pairs)
    assert 0.07 < share < 0.13


def test_a_story_is_about_the_hero_that_was_asked_for():
    rng = Random(2)
    for _ in range(50):
        hero, name, text = stories.story(rng)
        assert hero.kind in text
        assert name in text


# ---------------------------------------------------------------- sources


def test_share_alike_and_unclear_sources_are_not_in_the_table():
    for entry in sources.SOURCES:
        assert "SA" not in entry.licence.replace("CDLA-Sharing", "")
        assert entry.attribution
        assert not any(
            word in entry.file for word in ("sgd", "trivia", "dolly", "wikipedia", "gpteacher")
        )
        assert not entry.file.startswith("evals")


def test_a_missing_corpus_is_one_clear_message(tmp_path):
    with pytest.raises(DataError, match=r"tinystories_sample.jsonl.xz is not there.*--data"):
        sources.read_rows(sources.source("tinystories"), tmp_path)


def test_validation_stories_are_never_read(tmp_path):
    entry = sources.source("tinystories")
    path = tmp_path / entry.file
    path.parent.mkdir(parents=True)
    rows = [{"id": "tinystories-v2/1", "text": "a"}, {"id": "tinystories-val/1", "text": "b"}]
    with lzma.open(path, "wt", encoding="utf-8") as lines:
        lines.write("\n".join(map(json.dumps, rows)))
    assert [row["id"] for row in sources.read_rows(entry, tmp_path)] == ["tinystories-v2/1"]


def test_a_story_is_held_out_with_all_its_parts():
    names = [f"tinystories-v2/{i}" for i in range(2000)]
    out = [name for name in names if documents.is_held_out(name)]
    assert 5 <= len(out) <= 40
    assert all(documents.is_held_out(f"{name}#{part}") for name in out for part in range(3))


# ---------------------------------------------------------------- losses


def compare(ours, reference, inputs, tolerance):
    """Same outputs and same gradients of a random weighting."""
    results = []
    for function in (ours, reference):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves).float()
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        (out * weight).sum().backward()
        results.append((out.detach(), [x.grad for x in leaves]))
    (out_a, grads_a), (out_b, grads_b) = results
    torch.testing.assert_close(out_a, out_b, rtol=tolerance, atol=tolerance)
    for mine, other in zip(grads_a, grads_b, strict=True):
        torch.testing.assert_close(
            mine, other, rtol=tolerance, atol=tolerance * float(other.abs().max()) + 1e-6
        )


def test_blocked_cross_entropy_equals_the_plain_one(monkeypatch):
    monkeypatch.setattr(losses, "BLOCK_ROWS", 4)
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(10, 6, generator=random), torch.randn(7, 6, generator=random)
    labels = torch.randint(0, 7, (10,), generator=random)
    plain = torch.nn.functional.cross_entropy

    compare(
        lambda x, w: losses.linear_cross_entropy(x, w, labels),
        lambda x, w: plain(x @ w.T, labels, reduction="sum"),
        (x, weight),
        1e-5,
    )


def test_targets_never_cross_a_document_border():
    ids = torch.arange(9)
    sequence = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    judged = torch.tensor([1, 1, 1, 1, 1, 0, 1, 1, 1])
    one = losses.Targets.ahead(ids, judged, sequence, 1)
    two = losses.Targets.ahead(ids, judged, sequence, 2)
    assert one.rows.tolist() == [0, 1, 3, 5, 7]
    assert one.labels.tolist() == [1, 2, 4, 6, 8]
    assert two.rows.tolist() == [0, 4]
    assert two.labels.tolist() == [2, 6]


def test_expert_balance_is_one_for_an_even_load_and_more_otherwise():
    assert float(losses.expert_balance([torch.eye(4)], 1)) == pytest.approx(1.0)
    lopsided = torch.zeros(4, 4)
    lopsided[:, 0] = 3.0
    assert float(losses.expert_balance([lopsided], 1)) > 2.0


def test_orthogonal_update_has_singular_values_near_one_and_keeps_zero():
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(optim.orthogonal(matrices))
    assert 0.5 < float(values.min()) < float(values.max()) < 1.4
    assert float(optim.orthogonal(torch.zeros(2, 4, 4)).abs().max()) == 0.0


# ---------------------------------------------------------------- loop


def tiny_run(shards_dir, folder, **options) -> train.Run:
    plan = replace(train.Plan(), batch_tokens=400, mtp_from=0.0, finetune_from=0.6)
    return train.Run(
        ModelConfig.from_dict(TINY), plan, shards_dir, folder, seconds=1e9, seed=1, **options
    )


def test_workers_together_make_the_same_step_as_one(shards_dir, tmp_path):
    runs = [tiny_run(shards_dir, tmp_path / str(n), dtype=torch.float32, workers=n) for n in (1, 2)]
    # The balance of experts is taken per part; everything else must agree.
    for run in runs:
        run.plan = replace(run.plan, balance=0.0, balance_late=0.0)
    one, two = ([run.step() for _ in range(2)] for run in runs)
    for key in ("loss", "mtp_loss", "grad_norm"):
        assert [line[key] for line in one] == pytest.approx([line[key] for line in two], rel=2e-3)


@pytest.mark.parametrize("use_muon", [True, False], ids=["muon", "adamw"])
def test_loss_falls_within_a_few_steps(shards_dir, tmp_path, use_muon):
    run = tiny_run(shards_dir, tmp_path, use_muon=use_muon)
    run.elapsed = 0.1 * run.seconds  # past the warm-up
    lines = [run.step() for _ in range(30)]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.8
    assert lines[-1]["mtp_loss"] < lines[0]["mtp_loss"] - 0.4


def test_both_stages_and_the_replay_are_drawn(shards_dir, tmp_path):
    run = tiny_run(shards_dir, tmp_path)
    run.documents()
    assert sum(run.mixtures["finetuning"].taken.values()) == 0
    run.elapsed = 0.7 * run.seconds
    before = sum(run.mixtures["pretraining"].taken.values())
    run.documents()
    assert sum(run.mixtures["finetuning"].taken.values()) > 300
    assert sum(run.mixtures["pretraining"].taken.values()) > before


def test_a_stopped_run_goes_on_with_the_same_batches_and_weights(shards_dir, tmp_path, monkeypatch):
    # The learning rate follows the clock: every step takes the same time here.
    ticks = itertools.count()
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(ticks)))
    whole = tiny_run(shards_dir, tmp_path / "whole", dtype=torch.float32)
    for _ in range(3):
        whole.step()
    part = tiny_run(shards_dir, tmp_path / "part", dtype=torch.float32)
    for _ in range(2):
        part.step()
    part.save()
    again = tiny_run(shards_dir, tmp_path / "part", dtype=torch.float32)
    assert again.resume()
    again.step()
    assert (again.steps, again.tokens) == (whole.steps, whole.tokens)
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_of_another_model_is_refused(shards_dir, tmp_path):
    tiny_run(shards_dir, tmp_path).save()
    wider = {**TINY, "moe_intermediate_size": 24}
    other = train.Run(
        ModelConfig.from_dict(wider), train.Plan(), shards_dir, tmp_path, seconds=1.0, seed=1
    )
    with pytest.raises(DataError, match="another model configuration"):
        other.resume()


def test_mixture_keeps_the_shares_of_tokens(shards_dir):
    shards = data.open_shards(shards_dir / "finetuning")
    mixture = batches.Mixture(
        shards, {"arithmetic": 0.5, "smalltalk": 0.3, "template_stories": 0.2}, 0
    )
    mixture.documents(40_000, limit=1024)
    total = sum(mixture.taken.values())
    assert mixture.taken["arithmetic"] / total == pytest.approx(0.5, abs=0.02)
    assert mixture.taken["template_stories"] / total == pytest.approx(0.2, abs=0.02)


def test_long_documents_are_cut_and_nothing_is_lost(coder, tmp_path):
    text = " ".join(LINES) * 3
    data.write_shard(tmp_path, "x", [text], coder)
    shard = data.open_shards(tmp_path)["x"]
    mixture = batches.Mixture({"x": shard}, {"x": 1.0}, 0)
    pieces = mixture.documents(len(shard.ids), limit=50)
    assert max(len(ids) for ids, _ in pieces) <= 50
    joined = np.concatenate([ids for ids, _ in pieces])
    assert len(shard.ids) - len(joined) <= 8  # a last crumb may be dropped
    assert joined.tolist() == shard.ids[: len(joined)].tolist()


def test_the_schedule_rises_stays_and_ends_decayed():
    plan = train.Plan()
    assert plan.rate(0.0) < 0.1 * plan.peak_rate
    assert plan.rate(0.3) == plan.peak_rate
    assert plan.rate(1.0) == pytest.approx(plan.final_rate * plan.peak_rate)
    assert plan.mtp(0.0) == 0.0 < plan.mtp(0.99)


def test_the_full_configuration_has_every_part_and_fits_the_size():
    config = ModelConfig.from_dict(train.MODEL)
    model = CausalLM(config)
    initialise(model, 0)
    assert set(config.layer_types) == {"linear_attention", "full_attention"}
    assert model.mtp is not None
    assert sum(p.numel() for p in model.parameters()) < 18_000_000
