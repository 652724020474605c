"""Inference: the engine that serves users and makes rollouts, its cache, its sampling and its thinking budget."""
