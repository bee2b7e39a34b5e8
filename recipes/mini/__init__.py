"""What the recipe of qnext-mini (``recipes/qnext_mini.py``) is made of.

``corpora``      every source with its licence: what is read, what is made by rule
``sources``      the corpus files; ``documents`` turns their rows into texts and talks
``lessons``      conversations for fine-tuning, in both modes
``model_card``   the card of a trained model, and its head for the README
"""
