"""Scripts of a text: a histogram over code points, and which Chinese characters it uses."""

from functools import cache

import numpy as np
import numpy.typing as npt

OTHER = "Zyyy"
RANGES = (
    (0x0000, OTHER),
    (0x0041, "Latn"),
    (0x005B, OTHER),
    (0x0061, "Latn"),
    (0x007B, OTHER),
    (0x00AA, "Latn"),
    (0x00AB, OTHER),
    (0x00C0, "Latn"),
    (0x02B0, OTHER),
    (0x0370, "Grek"),
    (0x0400, "Cyrl"),
    (0x0530, "Armn"),
    (0x0590, "Hebr"),
    (0x0600, "Arab"),
    (0x0700, OTHER),
    (0x0750, "Arab"),
    (0x0780, OTHER),
    (0x0870, "Arab"),
    (0x0900, "Deva"),
    (0x0980, "Beng"),
    (0x0A00, "Guru"),
    (0x0A80, "Gujr"),
    (0x0B00, "Orya"),
    (0x0B80, "Taml"),
    (0x0C00, "Telu"),
    (0x0C80, "Knda"),
    (0x0D00, "Mlym"),
    (0x0D80, "Sinh"),
    (0x0E00, "Thai"),
    (0x0E80, "Laoo"),
    (0x0F00, "Tibt"),
    (0x1000, "Mymr"),
    (0x10A0, "Geor"),
    (0x1100, "Hang"),
    (0x1200, OTHER),
    (0x1780, "Khmr"),
    (0x1800, OTHER),
    (0x1C90, "Geor"),
    (0x1CC0, OTHER),
    (0x1E00, "Latn"),
    (0x1F00, "Grek"),
    (0x2000, OTHER),
    (0x3040, "Kana"),
    (0x3100, OTHER),
    (0x3130, "Hang"),
    (0x3190, OTHER),
    (0x3400, "Hani"),
    (0x4DC0, OTHER),
    (0x4E00, "Hani"),
    (0xA000, OTHER),
    (0xAC00, "Hang"),
    (0xD7B0, OTHER),
    (0xF900, "Hani"),
    (0xFB00, "Latn"),
    (0xFB13, OTHER),
    (0xFB1D, "Hebr"),
    (0xFB50, "Arab"),
    (0xFE00, OTHER),
    (0xFE70, "Arab"),
    (0xFEFF, OTHER),
    (0xFF66, "Kana"),
    (0xFFA0, OTHER),
    (0x20000, "Hani"),
    (0x32000, OTHER),
)
"""Where each block of a script begins (Unicode blocks, ISO 15924 names)."""
MIN_KANA_SHARE = 0.05


def script_histogram(text: str) -> dict[str, float]:
    """Share of each script among the characters that have one."""
    starts, names = _blocks()
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    blocks = np.bincount(np.searchsorted(starts, codes, side="right") - 1, minlength=len(names))
    totals: dict[str, int] = {}
    for name, count in zip(names, blocks.tolist(), strict=True):
        if count and name != OTHER:
            totals[name] = totals.get(name, 0) + count
    size = sum(totals.values())
    return {name: count / size for name, count in totals.items()}


def dominant_script(histogram: dict[str, float]) -> str:
    """The script that most characters have; Han with kana among it is Japanese (`Jpan`)."""
    if not histogram:
        return OTHER
    kana = histogram.get("Kana", 0.0)
    han = histogram.get("Hani", 0.0)
    rest = max((share for name, share in histogram.items() if name not in {"Kana", "Hani"}), default=0.0)
    if han + kana >= rest and kana >= MIN_KANA_SHARE:
        return "Jpan"
    return max(sorted(histogram), key=lambda name: histogram[name])


def han_variant(text: str) -> str:
    """`Hans` or `Hant`: which national character set, GB 2312 or Big5, alone holds more of the text's characters."""
    votes = sum(_variant_vote(character) for character in text if "\u3400" <= character <= "\u9fff")
    return "Hant" if votes > 0 else "Hans"


def _variant_vote(character: str) -> int:
    return _encodes(character, "big5") - _encodes(character, "gb2312")


def _encodes(character: str, charset: str) -> int:
    try:
        character.encode(charset)
    except UnicodeEncodeError:
        return 0
    return 1


@cache
def _blocks() -> tuple[npt.NDArray[np.uint32], tuple[str, ...]]:
    return np.array([start for start, _ in RANGES], np.uint32), tuple(name for _, name in RANGES)
