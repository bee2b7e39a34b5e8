"""From files to shards to packed batches, and back to the same tokens."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest

from qnext.cli import main
from qnext.data.chats import Chat, ChatEncoder
from qnext.data.licences import Licence
from qnext.data.prepare import Document, Plan, Source, prepare
from qnext.data.shards import Shard, open_shards
from qnext.errors import DataError
from qnext.text.chat import ChatTemplate
from qnext.text.parse import STOP_THINKING
from qnext.text.tokenizer import Tokenizer
from qnext.train.mixture import Mixture, PackedMixture, Piece, pack
from qnext.weights.folder import resolve_model

OWN = Licence(kind="own", text="own", attribution="")


@pytest.fixture(scope="module")
def mini() -> Path:
    return resolve_model("qnext-mini")


@pytest.fixture(scope="module")
def encoder(mini: Path) -> ChatEncoder:
    return ChatEncoder(ChatTemplate.from_folder(mini), Tokenizer.from_folder(mini))


def made(count: int, seed: int, longest: int = 400) -> list[str]:
    rng = Random(seed)
    return [
        " ".join(f"w{rng.randrange(10_000)}" for _ in range(rng.randint(1, longest)))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, mini: Path) -> Path:
    def source(name: str, texts: list[str]) -> Source:
        def documents():  # type: ignore[no-untyped-def]
            for number, text in enumerate(texts):
                yield Document(id=f"{name}/{number}", item=text)

        return Source(name=name, licence=OWN, documents=documents)

    def chats():  # type: ignore[no-untyped-def]
        for number, text in enumerate(made(300, 3, 60)):
            messages = ({"role": "user", "content": text}, {"role": "assistant", "content": "Yes."})
            yield Document(id=f"chat/{number}", item=Chat(messages=messages))

    folder = tmp_path_factory.mktemp("prepared")
    plan = Plan(
        sources=(
            source("a", made(120, 1)), source("b", made(60, 2)),
            Source(name="c", licence=OWN, documents=chats),
        ),
        held_out=20,
    )  # fmt: skip
    prepare(plan, mini, folder, policy="permissive", progress=False)
    return folder


def mixture(folder: Path, **options: object) -> PackedMixture:
    class Need:
        seed, stage, vocab_size = 5, 1, 6144
        row_tokens, micro_tokens, batch_tokens = 256, 1024, 4096

    for key, value in options.items():
        setattr(Need, key, value)
    shares = {"a": 0.5, "b": 0.2, "c": 0.3}
    return Mixture(folder=str(folder / "train"), shares=shares, whole=("c",)).open(Need())  # type: ignore[arg-type]


def test_a_mixture_tells_whether_its_data_are_the_same(prepared: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    assert mixture(copy).digest() == mixture(prepared).digest()
    shutil.rmtree(copy / "train" / "a")
    shutil.copytree(copy / "train" / "b", copy / "train" / "a")
    description = copy / "train" / "a" / "shard.json"
    told = json.loads(description.read_text(encoding="utf-8"))
    description.write_text(json.dumps({**told, "name": "a"}), encoding="utf-8")
    assert mixture(copy).digest() != mixture(prepared).digest()


# -- shards --------------------------------------------------------------------------------------


def test_shards_hold_the_documents_and_notice_damage(prepared: Path, mini: Path) -> None:
    tokenizer = Tokenizer.from_folder(mini)
    shards = open_shards(prepared / "train")
    ids, weights = shards["a"].document(0)
    end = tokenizer.id_of("<|endoftext|>")
    assert ids[0] == ids[-1] == end
    assert weights[0] == 0
    assert set(weights[1:].tolist()) == {1}
    held = (prepared / "held-out" / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(held) + len(shards["a"]) == 120
    assert len(held) > 0
    file = prepared / "train" / "b" / "ids.bin"
    data = file.read_bytes()
    file.write_bytes(data[:-2])
    with pytest.raises(DataError, match="was cut short or changed"):
        Shard.open(file.parent)
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(DataError, match="checksum differs"):
        Shard.open(file.parent)
    file.write_bytes(data)
    Shard.open(file.parent)


def test_nothing_is_left_when_a_source_fails(tmp_path: Path, mini: Path) -> None:
    def documents():  # type: ignore[no-untyped-def]
        yield Document(id="1", item="one text")
        raise DataError("the second row is broken")

    plan = Plan(sources=(Source(name="x", licence=OWN, documents=documents),), held_out=0)
    with pytest.raises(DataError, match="second row"):
        prepare(plan, mini, tmp_path / "out", policy="research", progress=False)
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert not list((tmp_path / "out" / "train").iterdir())


def test_a_licence_outside_the_policy_is_refused_before_work_begins(
    tmp_path: Path, mini: Path
) -> None:
    shared = Licence(kind="CC BY-SA", text="CC BY-SA 4.0", attribution="somebody")
    source = Source(name="wiki", licence=shared, documents=lambda: iter(()))
    with pytest.raises(DataError, match=r"does not allow: wiki \(CC BY-SA 4.0\)"):
        prepare(Plan(sources=(source,)), mini, tmp_path / "out", policy="+cdla")
    assert not (tmp_path / "out").exists()


def test_the_command_prepares_files(tmp_path: Path, mini: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    rows = [{"text": text} for text in made(50, 4)]
    rows.append({"messages": [{"role": "user", "content": "Hi"},
                              {"role": "assistant", "content": "Hello!"}]})  # type: ignore[dict-item] # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokens, out = str(tmp_path / "tokenizer"), str(tmp_path / "out")
    assert main(["data", "tokenizer", str(file), "--vocab-size", "400", "--out", tokens]) == 0
    assert main(["data", "prepare", str(file), "--tokenizer", tokens, "--out", out,
                 "--held-out", "0"]) == 0  # fmt: skip
    assert main(["data", "stats", out, "--verify"]) == 0
    assert main(["data", "stats", out, "--show", "rows", "--tokenizer", tokens]) == 0
    assert "1 shards: sizes and checksums are right" in capsys.readouterr().out
    file.write_text('{"text": "cut', encoding="utf-8")
    assert main(["data", "prepare", str(file), "--tokenizer", tokens, "--out", out + "2"]) == 2
    assert "cut short" in capsys.readouterr().err
    assert not list(Path(out + "2").rglob("*.bin"))


# -- packing -------------------------------------------------------------------------------------


def test_batches_are_a_function_of_the_step_alone(prepared: Path) -> None:
    one, other = mixture(prepared), mixture(prepared)
    for step in (0, 7, 40, 3):
        for x, y in zip(one.micro_batches(step), other.micro_batches(step), strict=True):
            assert x.ids.tolist() == y.ids.tolist()
            assert x.weight_P.tolist() == y.weight_P.tolist()
            assert x.cu_seqlens == y.cu_seqlens
    different = mixture(prepared, stage=2).micro_batches(0)[0]
    assert different.ids.tolist() != one.micro_batches(0)[0].ids.tolist()


def test_data_prepared_again_does_not_reach_an_open_run(prepared: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    expected = [batch.ids.tolist() for batch in mixture(copy).micro_batches(1)]
    opened = mixture(copy)
    for name in "abc":
        shutil.rmtree(copy / "train" / name)
        shutil.copytree(prepared / "train" / "c", copy / "train" / name)
    assert [batch.ids.tolist() for batch in opened.micro_batches(1)] == expected


def test_an_epoch_holds_every_token_of_a_source_once(prepared: Path) -> None:
    found = mixture(prepared).streams["a"]
    seen = np.zeros(found.total, dtype=np.int64)
    starts = found.shard.ends - found.lengths
    at = 0
    while at < found.total:
        for piece in found.between(at, min(at + 777, found.total), whole=False):
            begin = int(starts[piece.document])
            seen[begin + piece.start : begin + piece.stop] += 1
        at += 777
    assert set(seen.tolist()) == {1}


def test_padding_is_under_half_a_percent_and_shares_are_kept(prepared: Path) -> None:
    data = mixture(prepared)
    padded = total = 0
    counts = dict.fromkeys("abc", 0)
    for step in range(16):
        for batch in data.micro_batches(step):
            assert batch.ids.shape[0] == 1024
            padded += batch.padding
            total += 1024
            starts = batch.cu_seqlens
            for name, low, high in zip(batch.sources, starts, starts[1:], strict=False):
                counts[name] += high - low
                assert high - low <= (1024 if name == "c" else 256)
    assert padded / total < 0.005
    for name, share in (("a", 0.5), ("b", 0.2), ("c", 0.3)):
        assert counts[name] / total == pytest.approx(share, abs=0.02)


def test_conversations_are_never_cut(prepared: Path) -> None:
    data = mixture(prepared)
    whole = {tuple(data.shards["c"].document(n)[0].tolist()) for n in range(len(data.shards["c"]))}
    for batch in data.micro_batches(2):
        starts = batch.cu_seqlens
        for name, low, high in zip(batch.sources, starts, starts[1:], strict=False):
            if name == "c":
                assert tuple(batch.ids[low:high].tolist()) in whole


def test_conversations_that_are_too_long_leave_no_hole(prepared: Path) -> None:
    data = mixture(prepared, micro_tokens=256)
    assert data.dropped["c"] > len(data.shards["c"]) // 6, "the test wants many left out"
    total = mine = padded = 0
    for step in range(8):
        for batch in data.micro_batches(step):
            starts = batch.cu_seqlens
            for name, low, high in zip(batch.sources, starts, starts[1:], strict=False):
                mine += (high - low) * (name == "c")
            total += 256
            padded += batch.padding
    # Whole conversations leave gaps, but nothing like the third that is theirs.
    assert mine / total == pytest.approx(0.3, abs=0.08)
    assert padded / total < 0.08
    with pytest.raises(DataError, match=r"c: all .* conversations are longer than a micro-batch"):
        mixture(prepared, micro_tokens=16, row_tokens=16)


def test_packing_carries_remainders() -> None:
    pieces = [Piece("a", n, 0, 700) for n in range(10)]
    packed = pack(pieces, 7, 1000)
    assert [sum(map(len, content)) for content in packed] == [1000] * 7
    parts = sorted((p.document, p.start, p.stop) for content in packed for p in content)
    for document in range(10):
        mine = [(start, stop) for d, start, stop in parts if d == document]
        assert mine[0][0] == 0
        assert mine[-1][1] == 700
        assert all(x[1] == y[0] for x, y in pairwise(mine))


def test_data_that_does_not_fit_the_model_is_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vocabulary holds 100"):
        mixture(prepared, vocab_size=100)
    with pytest.raises(DataError, match="no shards"):
        mixture(tmp_path)


# -- conversations -------------------------------------------------------------------------------


def judged(encoder: ChatEncoder, chat: Chat) -> list[str]:
    found = []
    for sample in encoder.samples(chat):
        kept = [t for t, w in zip(sample.ids, sample.weights, strict=True) if w]
        found.append(encoder.tokenizer.decode(kept))
    return found


ASK = {"role": "user", "content": "2 + 3?"}
SAY = {"role": "assistant", "content": "5.", "reasoning_content": "two and three"}


def test_loss_falls_on_what_the_assistant_writes(encoder: ChatEncoder) -> None:
    assert judged(encoder, Chat(messages=(ASK, SAY))) == [
        "<think>\ntwo and three\n</think>\n\n5.<|im_end|>"
    ]
    assert judged(encoder, Chat(messages=(ASK, SAY), drop_thinking=True)) == [
        "<think>\n\n</think>\n\n5.<|im_end|>"
    ]
    bare = {"role": "assistant", "content": "5."}
    assert judged(encoder, Chat(messages=(ASK, bare), enable_thinking=False)) == ["5.<|im_end|>"]


def test_rewritten_history_makes_one_sample_per_turn(encoder: ChatEncoder) -> None:
    chat = Chat(messages=(ASK, SAY, ASK, SAY))
    assert judged(encoder, chat) == ["<think>\ntwo and three\n</think>\n\n5.<|im_end|>"] * 2
    first, second = encoder.samples(chat)
    text = encoder.tokenizer.decode(second.ids)
    assert text.count("two and three") == 1
    assert len(first.ids) < len(second.ids)
    assert len(judged(encoder, Chat(messages=chat.messages, turns="last"))) == 1


def test_tool_calls_and_the_answer_after_them_share_a_sample(encoder: ChatEncoder) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = (
        ASK,
        {"role": "assistant", "content": "", "reasoning_content": "use f", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "It is 5.", "reasoning_content": "done"},
    )
    [text] = judged(encoder, Chat(messages=messages))
    assert text == (
        '<think>\nuse f\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n'
        "</tool_call><|im_end|><think>\ndone\n</think>\n\nIt is 5.<|im_end|>"
    )


def test_a_cut_think_block_teaches_the_answer_only(encoder: ChatEncoder) -> None:
    chat = Chat(
        messages=(ASK, {"role": "assistant", "content": "5."}),
        cut_thinking="two and",
        learn="answer",
    )
    [sample] = encoder.samples(chat)
    assert judged(encoder, chat) == ["5.<|im_end|>"]
    text = encoder.tokenizer.decode(sample.ids)
    assert text.endswith("<think>\ntwo and" + STOP_THINKING + "5.<|im_end|>")


def test_everything_said_can_be_judged(encoder: ChatEncoder) -> None:
    chat = Chat(messages=(ASK, {"role": "assistant", "content": "5."}), learn="everything")
    assert judged(encoder, chat) == ["2 + 3?<|im_end|><think>\n\n</think>\n\n5.<|im_end|>"]


def test_prompts_are_those_of_serving(encoder: ChatEncoder) -> None:
    for options in ({}, {"enable_thinking": False}):
        [sample] = encoder.samples(Chat(messages=(ASK, SAY), drop_thinking=True, **options))  # type: ignore[arg-type]
        prompt = encoder.template.encode([ASK], encoder.tokenizer, **options)
        assert sample.ids[: len(prompt)] == prompt
        assert sample.weights == [0] * len(prompt) + [1] * (len(sample.ids) - len(prompt))
