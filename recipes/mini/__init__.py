"""The recipe of qnext-mini, the small model that ships inside the package.

    python -m recipes.mini.data      corpora -> tokenizer -> packed shards in .data/mini
    python -m recipes.mini.train     shards -> checkpoint in runs/mini
    python -m recipes.mini.export    checkpoint -> model folder
    python -m recipes.mini.evaluate  model folder -> measured numbers and samples
    python -m recipes.mini.card      everything above -> model card

Run from the repository root. The corpora are read from ``--data`` and are not part of the
repository.
"""
