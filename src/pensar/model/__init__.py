"""The model: Qwen3, dense or mixture of experts, its sizes, its counts and its files."""
