"""The OpenAI-compatible server over one engine: wire types, streaming, tools and thinking, health, metrics."""
