"""qnext-mini: the small model that ships with the package, from corpora to a model that talks.

    qnext data tokenizer --recipe recipes/qnext_mini.py --data ../shared/data --policy +cdla \\
        --vocab-size 6144 --out /root/mini2/tokenizer
    qnext data prepare --recipe recipes/qnext_mini.py --data ../shared/data --policy +cdla \\
        --tokenizer /root/mini2/tokenizer --out /root/mini2/data
"""

from pathlib import Path

from recipes.mini import corpora

from qnext.data.prepare import Plan


def plan(data: Path) -> Plan:
    """The data: what is read, under which licence, and what is made by rule."""
    return corpora.plan(data)
