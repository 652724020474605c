"""Evaluate: benchmarks on held-out problems, the stage table, the budget curve, and their intervals."""
