"""Numbers, sizes and times as a person reads them on a page, and tolerant access to data of unknown shape."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

MISSING = "–"
_SPACE = "\u00a0"  # between a number and its unit: no line ends there
_SCALES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def finite(value: Any) -> float | None:
    """The value as a finite float, or None for anything else (booleans, text, NaN, infinities)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: Any) -> list[Any]:
    """The value as a list if it is a list or tuple, else an empty one."""
    return list(value) if isinstance(value, (list, tuple)) else []


def pair(value: Any) -> tuple[float | None, float | None]:
    """The two numbers of a [before, after] list; None for what is missing."""
    items = sequence(value)
    return (finite(items[0]), finite(items[1])) if len(items) == 2 else (None, None)


def significant(value: Any, digits: int = 4) -> str:
    """A number to so many significant digits, without an exponent between 0.0001 and a million."""
    number = finite(value)
    if number is None:
        return MISSING
    if number == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(number)))
    if not -5 < magnitude < 6:
        mantissa, exponent = f"{number:.{max(0, digits - 2)}e}".split("e")
        return _minus(f"{mantissa}e{int(exponent)}")
    return _minus(f"{number:,.{max(0, digits - 1 - magnitude)}f}")


def alike(values: Iterable[Any], spreads: Iterable[Any] = (), digits: int = 3) -> Callable[[Any], str]:
    """How the numbers of one column are written, so that they can be compared by eye: equally many decimals.

    As many as give the median value `digits` significant digits, less those that are 0 in every value and spread. A
    column from 100,000 on, or of numbers more than four orders of magnitude apart, has each by itself.
    """
    numbers = [abs(number) for value in values if (number := finite(value))]
    if not numbers or max(numbers) >= 1e5:
        return lambda value: si(value) if abs(finite(value) or 0) >= 1e5 else significant(value, digits)
    if max(numbers) > 1e4 * min(numbers):
        return lambda value: significant(value, digits)
    decimals = min(max(0, digits - 1 - math.floor(math.log10(statistics.median(numbers)))), 6)
    numbers += [abs(number) for spread in spreads if (number := finite(spread))]
    while decimals and all(f"{number:.{decimals}f}".endswith("0") for number in numbers):
        decimals -= 1

    def write(value: Any) -> str:
        number = finite(value)
        if number is None:
            return MISSING
        lost = number != 0 and round(number, decimals) == 0
        return significant(number, 1) if lost else _minus(f"{number:,.{decimals}f}")

    return write


def hundredths(value: Any) -> str:
    """A number with two decimals, as the paper's tables give changes in per cent."""
    number = finite(value)
    return MISSING if number is None else _minus(f"{number:.2f}")


def si(value: Any, unit: str = "", digits: int = 3) -> str:
    """A count with an SI prefix: 3.66 M, 331 MFLOPs."""
    number = finite(value)
    if number is None:
        return MISSING
    for scale, prefix in _SCALES:
        if abs(number) >= scale:
            return f"{significant(number / scale, digits)}{_SPACE}{prefix}{unit}"
    return f"{significant(number, digits)}{_SPACE}{unit}".rstrip()


def count(value: Any) -> str:
    """A whole number with its thousands apart."""
    number = finite(value)
    return MISSING if number is None else _minus(f"{number:,.0f}")


def percent(fraction: Any, digits: int = 3) -> str:
    """A share as per cent: 0.0416 %."""
    number = finite(fraction)
    return MISSING if number is None else f"{significant(100 * number, digits)}{_SPACE}%"


def change(fraction: Any) -> str:
    """A relative change as per cent with its sign, two digits after the point as in the paper's tables."""
    number = finite(fraction)
    if number is None:
        return MISSING
    text = f"{100 * number:+.2f}"
    return f"{_minus(text)}{_SPACE}%" if float(text) else f"0{_SPACE}%"


def relative(before: Any, after: Any) -> float | None:
    """(after - before) / before, or None."""
    old, new = finite(before), finite(after)
    return (new - old) / old if old and new is not None else None


def ratio(value: Any) -> str:
    """A quotient: 1.15×."""
    number = finite(value)
    return MISSING if number is None else f"{significant(number, 3)}×"


def duration(seconds: Any) -> str:
    """A time: 0.8 s, 48 s, 2 min 57 s, 3 h 05 min."""
    number = finite(seconds)
    if number is None or number < 0:
        return MISSING
    if number < 9.95:
        return f"{number:.1f}{_SPACE}s"
    whole = round(number)
    if whole < 60:
        return f"{whole}{_SPACE}s"
    if whole < 3600:
        return f"{whole // 60}{_SPACE}min{_SPACE}{whole % 60:02}{_SPACE}s"
    return f"{whole // 3600:,}{_SPACE}h{_SPACE}{whole // 60 % 60:02}{_SPACE}min"


def ranges(layers: Iterable[Any]) -> str:
    """Layer numbers, runs shortened and an even stride named: 0–3, 7; 1, 3, …, 27."""
    numbers = sorted({layer for layer in layers if isinstance(layer, int) and not isinstance(layer, bool)})
    if len(numbers) > 6:
        steps = {b - a for a, b in itertools.pairwise(numbers)}
        if len(steps) == 1 and steps != {1}:
            return f"{numbers[0]}, {numbers[1]}, …, {numbers[-1]}"
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    words = [f"{part[0]}–{part[-1]}" if len(part) > 2 else ", ".join(map(str, part)) for part in parts]
    return ", ".join(words)


def unbroken(text: str) -> str:
    """Text in which a number keeps its per cent sign: no line ends between the two."""
    return text.replace(" %", f"{_SPACE}%")


def _minus(text: str) -> str:
    return text.replace("-", "−")
