"""Numbers that divide others, and the sentence for those that do not."""

from __future__ import annotations

from math import isqrt


def divisors(number: int) -> list[int]:
    """All divisors in ascending order."""
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def does_not_divide(divisor: int, number: int, what: str) -> str:
    """`48 does not divide 256 experts; 32 and 64 do`: the nearest divisors below and above."""
    below = [d for d in divisors(number) if d < divisor][-1:]
    above = [d for d in divisors(number) if d > divisor][:1]
    near = " and ".join(str(d) for d in below + above)
    verb = "do" if below and above else "does"
    return f"{divisor} does not divide {number} {what}; {near} {verb}"


# --- the machine ---------------------------------------------------------------------------------
