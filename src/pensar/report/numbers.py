"""Numbers as people read them: shares, times, sizes, counts, and sentences about several of them."""

from collections.abc import Sequence

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
DASH = "–"
NARROW_SPACE = "\u202f"
MINUS = "\u2212"
SHORT = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))


def percent(share: float, digits: int = 1) -> str:
    """0.983 -> `98.3%`; nothing less than all is `100%`, nothing more than none `0%`."""
    text = _trimmed(share * 100, digits)
    least = 10.0**-digits
    if text == "100" and share < 1:
        return f">{_trimmed(100 - least, digits)}%"
    if text == "0" and share > 0:
        return f"<{_trimmed(least, digits)}%"
    return f"{text}%"


def bare_percent(share: float, digits: int = 1) -> str:
    """`percent` for table cells, where the column says that it is one."""
    return f"{share * 100:.{digits}f}"


def points(difference: float, digits: int = 1) -> str:
    """A difference of shares in percentage points, with its sign."""
    return signed(f"{difference * 100:+.{digits}f}")


def signed(text: str) -> str:
    """With the typographic minus; a difference that rounds to zero has no sign."""
    if not text.strip("+-0."):
        return text.lstrip("+-")
    return text.replace("-", MINUS)


def interval(low: float | None, high: float | None, digits: int = 1) -> str:
    """`97.2–99.1` in percent; empty when there is none."""
    if low is None or high is None:
        return ""
    return f"{low * 100:.{digits}f}{DASH}{high * 100:.{digits}f}"


def count(number: float) -> str:
    """`12,345`."""
    return f"{round(number):,}"


def short(number: float) -> str:
    """`12.3K`, `4.1M`; three digits that matter."""
    for limit, suffix in SHORT:
        if abs(number) >= limit * 0.9995:
            return f"{significant(number / limit)}{suffix}"
    return significant(number)


def significant(number: float, digits: int = 3) -> str:
    """So many digits that matter, never in exponents; whole numbers stay whole."""
    if number == 0 or (float(number).is_integer() and abs(number) < 1e6):
        return f"{number:.0f}"
    rounded = float(f"{number:.{digits}g}")
    whole = len(str(int(abs(rounded)))) if abs(rounded) >= 1 else 0
    decimals = max(0, digits - whole) if whole else digits + _leading_zeros(rounded)
    return _trimmed(rounded, decimals) if not whole else f"{rounded:.{decimals}f}"


def duration(seconds: float) -> str:
    """`0.42 s`, `8.2 s`, `3 min 07 s`, `1 h 04 min`."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(num_bytes: float) -> str:
    """`812 MiB`, `1.4 GiB`."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power:
            value = num_bytes / 1024**power
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def scientific(number: float) -> str:
    """`3.2 × 10¹²`."""
    if number == 0:
        return "0"
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa}{NARROW_SPACE}×{NARROW_SPACE}10{str(int(exponent)).translate(SUPERSCRIPTS)}"


def multiple(ratio: float) -> str:
    """A ratio as a multiple: `1/9.4` below one, `2.1×` above."""
    if ratio == 0:
        return "0"
    if abs(ratio - 1) < 0.005:
        return "1"
    return f"1/{significant(1 / ratio, 2)}" if ratio < 1 else f"{significant(ratio, 2)}×"


def plural(number: int, singular: str, many: str | None = None) -> str:
    """`1 document`, `2,301 documents`."""
    return f"{count(number)} {singular if number == 1 else many or singular + 's'}"


def listing(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def words(name: str) -> str:
    """A name from the code as words: `near_duplicate` -> `near duplicate`."""
    return name.replace("_", " ")


def _trimmed(number: float, digits: int) -> str:
    text = f"{number:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _leading_zeros(number: float) -> int:
    exponent = int(f"{abs(number):e}".split("e")[1])
    return -exponent - 1
