"""qnext-mini: the small model that ships with the package, from corpora to a model that talks.

    qnext data tokenizer --recipe recipes/qnext_mini.py --data ../shared/data --policy +cdla \\
        --vocab-size 6144 --out .data/qnext-mini/tokenizer
    qnext data prepare --recipe recipes/qnext_mini.py --data ../shared/data --policy +cdla \\
        --tokenizer .data/qnext-mini/tokenizer --out .data/qnext-mini/data
    qnext train recipes/qnext_mini.py

Four stages: S1 general text (the MTP head joins after three tenths), S2 knowledge and worked
problems, S3 long documents and needles under YaRN, which stays, SFT lessons in both modes. No row
is longer than 4,096 tokens; YaRN is to carry the model to four times as many.
``--set stages.*.data.folder=DIR`` and ``--set tokenizer=DIR`` name other folders.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from recipes.mini import corpora

from qnext.data.prepare import Plan
from qnext.eval.needles import NeedleReport
from qnext.train.mixture import Mixture
from qnext.train.recipe import Objectives, Optimiser, Recipe, Rope, Schedule, Stage

FOLDER = ".data/qnext-mini"
VOCABULARY = 6144

MODEL = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "intermediate_size": 512,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "num_experts": 32,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
"""34.8 M parameters, 6.1 M active for a token and 2.2 M more in the MTP head."""

S1 = {
    "tinystories": 5, "picture_books": 8, "children_classics": 13, "template_stories": 1,
    "fiction": 12, "essays": 3, "textbooks": 14, "science_textbooks": 7, "maths_textbooks": 3,
    "self_dialogue": 13, "topical_chat": 6, "fairytale_qa": 5, "wordnet": 1, "factbook": 1,
    "recall": 1, "copies": 1, "short_needles": 4, "sums": 5, "worked": 1,
}  # fmt: skip
"""Parts of the tokens."""
S2 = {
    "maths_textbooks": 7, "science_textbooks": 8, "textbooks": 6, "factbook": 2, "wordnet": 2,
    "gsm8k": 4, "worked": 14, "problems": 10, "sums": 11, "tinystories": 4, "children_classics": 6,
    "picture_books": 4, "fiction": 4, "self_dialogue": 8, "topical_chat": 3, "short_needles": 6,
    "copies": 1, "recall": 2,
}  # fmt: skip
S3 = {
    "children_classics": 15, "fiction": 16, "essays": 5, "textbooks": 16, "science_textbooks": 5,
    "needles": 28, "worked": 4, "sums": 4, "self_dialogue": 5, "problems": 3,
}  # fmt: skip
REPLAY = {
    "children_classics": 7, "fiction": 5, "textbooks": 5, "self_dialogue": 6, "picture_books": 3,
    "topical_chat": 2, "tinystories": 2, "fairytale_qa": 2, "needles": 3,
}  # fmt: skip
LESSONS = {
    "sums_thinking_chat": 16, "problems_thinking_chat": 8, "small_thinking_chat": 4,
    "several_sums_chat": 2, "sums_direct_chat": 16, "problems_direct_chat": 2,
    "template_stories_chat": 3, "tinystories_chat": 5, "picture_books_chat": 1,
    "smalltalk_chat": 4, "self_dialogue_chat": 3, "factbook_chat": 1, "wordnet_chat": 1,
    "fairytale_qa_chat": 2, "instructions_chat": 1, "tools_chat": 7, "recall_chat": 1,
    "needles_chat": 3, "long_needles_chat": 32,
}  # fmt: skip

LONG = {
    **LESSONS, **{name: 2 * share for name, share in REPLAY.items()}, "long_needles_chat": 40,
}  # fmt: skip


def plan(data: Path) -> Plan:
    """The data: what is read, under which licence, and what is made by rule."""
    return corpora.plan(data)


def _mixture(shares: Mapping[str, float]) -> Mixture:
    return Mixture(
        folder=f"{FOLDER}/data/train",
        shares=dict(shares),
        whole=tuple(name for name in shares if name.endswith("_chat")),
    )


def recipe() -> Recipe:
    """The whole run."""
    heads = Objectives(mtp_weights=(0.3,), balance=1e-2)
    rate = 4e-3
    return Recipe(
        name="qnext-mini",
        model=MODEL,
        tokenizer=f"{FOLDER}/tokenizer",
        generation={"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20},
        seed=20261121,
        optimiser=Optimiser(kind="muon", weight_decay=0.1),
        save_every=100,
        stages=(
            Stage(
                name="S1-text",
                data=_mixture(S1),
                tokens=3_300_000,
                elastic=True,
                schedule=Schedule(peak=rate, warmup=0.06, start=0.02),
                row_tokens=512,
                objectives=Objectives(mtp_weights=(), balance=2e-2),
            ),
            Stage(
                name="S1",
                data=_mixture(S1),
                tokens=19_700_000,
                elastic=True,
                schedule=Schedule(peak=rate, shape="linear", decay_from=0.3, final=0.75),
                objectives=heads,
            ),
            Stage(
                name="S2",
                data=_mixture(S2),
                tokens=4_500_000,
                elastic=True,
                schedule=Schedule(peak=0.75 * rate, shape="linear", final=0.6),
                objectives=heads,
            ),
            Stage(
                name="S3",
                data=_mixture(S3),
                tokens=3_000_000,
                schedule=Schedule(peak=0.45 * rate, shape="linear", final=0.8),
                row_tokens=4096,
                objectives=heads,
                rope=Rope(yarn_factor=4.0, max_position_embeddings=16_384),
                report=NeedleReport(lengths=(1024, 4096)),
            ),
            Stage(
                name="SFT",
                data=_mixture({**LESSONS, **REPLAY}),
                tokens=12_640_000,
                elastic=True,
                schedule=Schedule(peak=0.36 * rate, shape="linear", final=0.02),
                row_tokens=4096,
                objectives=Objectives(mtp_weights=(0.1,), balance=2e-3),
            ),
            _long(),
        ),
    )


def extension() -> Recipe:
    """The last stage alone, on a model that has been through the others; name it with
    ``--set start=FOLDER``. The one that ships has been through this stage too.
    """
    return replace(
        recipe(), model={}, start="src/qnext/models/qnext-mini", stages=(_long(),), save_every=50
    )


def _long() -> Stage:
    """Sharper attention, learnt on rows of the trained length: a softmax over four times as many
    keys still picks the one that is asked for.
    """
    return Stage(
        name="LONG",
        data=_mixture(LONG),
        tokens=4_200_000,
        schedule=Schedule(peak=6e-4, warmup=0.04, shape="linear", decay_from=0.04, final=0.02),
        row_tokens=4096,
        objectives=Objectives(mtp_weights=(0.1,), balance=2e-3),
        rope=Rope(sharpness=2.0),
        report=NeedleReport(lengths=(4096, 16384)),
    )
