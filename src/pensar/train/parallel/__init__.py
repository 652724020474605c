"""Training spread over a mesh of ranks: sharded weights, split heads, split contexts, split experts, split depth."""
