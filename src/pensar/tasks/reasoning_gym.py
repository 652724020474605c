"""Problems of the reasoning-gym package as plain documents: the question, then the answer."""

from collections.abc import Iterator

FAMILIES = (
    "basic_arithmetic",
    "chain_sum",
    "count_bits",
    "decimal_chain_sum",
    "gcd",
    "largest_island",
    "leg_counting",
    "letter_counting",
    "number_sequence",
    "number_sorting",
    "prime_factorization",
    "products",
    "simple_equations",
    "syllogism",
    "word_sorting",
)
"""Families with short questions and an answer of their own; each is deterministic by (seed, index)."""


def texts(num: int, seed: int) -> Iterator[tuple[str, str]]:
    """`num` documents of every family as (id, text); ImportError when the package is not installed."""
    import reasoning_gym  # slow to import and optional

    for family in FAMILIES:
        dataset = reasoning_gym.create_dataset(family, size=num, seed=seed)
        for index in range(num):
            item = dataset[index]
            yield f"gym-{family}-{index:06d}", f"{item['question'].strip()}\n{item['answer']}"
