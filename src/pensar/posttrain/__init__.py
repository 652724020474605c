"""Post-training: cold start, reasoning RL, mode fusion, general RL and strong-to-weak distillation."""
