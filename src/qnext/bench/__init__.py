"""``qnext bench``: how fast this machine runs a model, and how near its limits that is."""
