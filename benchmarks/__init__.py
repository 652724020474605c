"""Benchmarks: each module measures one claim against a peer and prints one JSON object a line."""
