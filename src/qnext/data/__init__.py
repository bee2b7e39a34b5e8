"""Data for training: files are read, cleaned, deduplicated, tokenised and kept as shards.

Reading and cleaning are here, packing and mixing in ``train``. Nothing here imports torch.
"""
