"""A process that tries out a grammar, so that one that never ends takes only this process with it.

Reads JSON from standard input and writes what is wrong with the grammar to standard output, nothing if it can be used.
It stands on its own: the caller starts the file, with limits on processor time and memory.
"""

import json
import random
import sys

NUM_BYTES = 256
STEPS = 32
"""Bytes of an answer that are tried, each drawn from those that the grammar allows there."""


class ByteTokens:
    """A vocabulary of single bytes, in the form that the library asks for."""

    eos_token_id = NUM_BYTES
    bos_token_id = None
    special_token_ids = (NUM_BYTES,)
    tokens = (*(bytes([value]) for value in range(NUM_BYTES)), b"<end>")

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def main() -> None:
    """Compiles the grammar and walks a little way into it."""
    import llguidance

    asked = json.load(sys.stdin)
    _limit(asked["cpu_seconds"], asked["memory_bytes"])
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(ByteTokens()))
    limits = llguidance.LLParserLimits(**asked["limits"])
    matcher = llguidance.LLMatcher(tokenizer, asked["source"], log_level=0, limits=limits)
    dice = random.Random(0)
    for _ in range(STEPS):
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(NUM_BYTES) if mask[token // 8] >> (token % 8) & 1]
        if matcher.is_error() or not allowed:
            break
        matcher.consume_token(dice.choice(allowed))
    sys.stdout.write(matcher.get_error())


def _limit(cpu_seconds: int, memory_bytes: int) -> None:
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
