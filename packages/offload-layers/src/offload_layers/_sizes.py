"""Sizes as people write them, and back: ``"7.5 GiB"`` to bytes, bytes to ``"8.05 GB"``."""

import operator
import re
from decimal import Decimal

from offload_layers._errors import ConfigError

_ACCEPTED = 'write a number with a unit, like "8GB", "500 MB" or "7.5 GiB", or pass bytes as an int'
_NUMBER_AND_UNIT = re.compile(r"(-?)(\d+\.?\d*|\.\d+)\s*([a-z]*)", re.IGNORECASE | re.ASCII)

_DECIMAL = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BINARY = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS = _DECIMAL | _BINARY

_SHOWN = ("B", "kB", "MB", "GB", "TB", "PB", "EB")


def parse_size(value: str | int | float, *, what: str) -> int:
    """Return *value* in bytes.

    Args:
        value: ``"8GB"`` is ``8 * 10**9`` bytes, ``"7.5 GiB"`` is ``7.5 * 2**30``; case and a space before the
            unit do not matter, and parts of a byte are left out. A number is bytes already, and whole.
        what: What the size is of, as errors are to name it.

    Raises:
        ConfigError: *value* is no such size. Neither is ``"8Gb"``, which would be gigabits, nor ``"8G"``,
            which means one thing to some programs and another to others.
    """
    if isinstance(value, str):
        return _parse_text(value, what)
    nbytes = None if isinstance(value, bool) else _whole(value)
    if nbytes is None:
        raise ConfigError(f"{what}={value!r} is no size; {_ACCEPTED}")
    if nbytes < 0:
        raise ConfigError(f"{what}={value!r} is negative; {_ACCEPTED}")
    return nbytes


def format_size(nbytes: int) -> str:
    """Return *nbytes* for people: in powers of 1000, with three significant digits at most."""
    amount = float(nbytes)
    for unit in _SHOWN[:-1]:
        text = f"{amount:.3g}"
        if abs(float(text)) < 1000:  # 999.7 would be shown as 1e+03: it is one of the next unit
            return f"{text} {unit}"
        amount /= 1000
    return f"{amount:.3g} {_SHOWN[-1]}"


def _whole(value: object) -> int | None:
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    try:
        return operator.index(value)  # type: ignore[arg-type]  # that is the question
    except TypeError:
        return None


def _parse_text(text: str, what: str) -> int:
    match = _NUMBER_AND_UNIT.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{what}={text!r} is no size; {_ACCEPTED}")
    sign, number, unit = match.groups()
    if not unit:
        raise ConfigError(f'{what}={text!r} has no unit; write "{number}GB", or "{number}B" for bytes')
    if unit == "b" or (unit[0].isupper() and unit.endswith("b")):
        in_bytes = unit[:-1] + "B"
        raise ConfigError(f'{what}={text!r} is in bits ("b"); write "{number}{in_bytes}" for bytes ("B")')
    factor = _UNITS.get(unit.lower())
    if factor is None:
        raise ConfigError(f"{what}={text!r} has the unknown unit {unit!r}; {_hint(number, unit)}")
    if sign == "-":
        raise ConfigError(f"{what}={text!r} is negative; {_ACCEPTED}")
    return int(Decimal(number) * factor)


def _hint(number: str, unit: str) -> str:
    if unit.lower() in ("k", "m", "g", "t"):
        prefix = unit.upper()
        return (
            f'write "{number}{"k" if prefix == "K" else prefix}B" for powers of 1000 or "{number}{prefix}iB" '
            "for powers of 1024"
        )
    return f"known are {', '.join([*_SHOWN[:5], 'KiB', 'MiB', 'GiB', 'TiB'])}"
