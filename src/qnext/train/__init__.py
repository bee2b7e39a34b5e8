"""Training: batches with their document borders, losses, optimisers, and the loop.

Nothing here is needed to run or serve a model.
"""
