"""Train: the one loss, the optimisers, the loop and its checkpoints."""
