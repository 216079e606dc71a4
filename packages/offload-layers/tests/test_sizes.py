"""Sizes as people write them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offload_layers import ConfigError
from offload_layers._sizes import format_size, parse_size

WRITE = 'write a number with a unit, like "8GB", "500 MB" or "7.5 GiB", or pass bytes as an int'


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        ("8GB", 8 * 10**9),
        ("7.5 GiB", 7.5 * 2**30),
        ("500MB", 500 * 10**6),
        ("1.5TB", 15 * 10**11),
        ("300 kB", 300_000),
        ("300KB", 300_000),
        ("8gb", 8 * 10**9),
        ("8 GIB", 8 * 2**30),
        ("  2 MiB ", 2 * 2**20),
        ("1 KiB", 1024),
        (".5TiB", 2**39),
        ("12B", 12),
        ("0GB", 0),
        ("0.1 GB", 10**8),  # exactly, although 0.1 is no binary fraction
        ("0.3 KiB", 307),
        (8_000_000_000, 8 * 10**9),
        (0, 0),
        (8e9, 8 * 10**9),
        (torch.tensor(7), 7),
    ],
)
def test_sizes_are_read(value, nbytes: int) -> None:
    result = parse_size(value, what="vram")
    assert result == nbytes
    assert type(result) is int


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("8", 'vram=\'8\' has no unit; write "8GB", or "8B" for bytes'),
        ("", f"vram='' is no size; {WRITE}"),
        ("auto", f"vram='auto' is no size; {WRITE}"),
        ("nan GB", f"vram='nan GB' is no size; {WRITE}"),
        ("1,5GB", f"vram='1,5GB' is no size; {WRITE}"),
        ("8 GB VRAM", f"vram='8 GB VRAM' is no size; {WRITE}"),
        ("٨GB", f"vram='٨GB' is no size; {WRITE}"),
        ("-8GB", f"vram='-8GB' is negative; {WRITE}"),
        ("8Gb", 'vram=\'8Gb\' is in bits ("b"); write "8GB" for bytes ("B")'),
        ("8 Gib", 'vram=\'8 Gib\' is in bits ("b"); write "8GiB" for bytes ("B")'),
        ("8b", 'vram=\'8b\' is in bits ("b"); write "8B" for bytes ("B")'),
        (
            "8G",
            "vram='8G' has the unknown unit 'G'; "
            'write "8GB" for powers of 1000 or "8GiB" for powers of 1024',
        ),
        (
            "8k",
            "vram='8k' has the unknown unit 'k'; "
            'write "8kB" for powers of 1000 or "8KiB" for powers of 1024',
        ),
        (
            "8 gigabytes",
            "vram='8 gigabytes' has the unknown unit 'gigabytes'; "
            "known are B, kB, MB, GB, TB, KiB, MiB, GiB, TiB",
        ),
        (-1, f"vram=-1 is negative; {WRITE}"),
        (-8e9, f"vram=-8000000000.0 is negative; {WRITE}"),
        (7.5, f"vram=7.5 is no size; {WRITE}"),
        (float("nan"), f"vram=nan is no size; {WRITE}"),
        (float("inf"), f"vram=inf is no size; {WRITE}"),
        (True, f"vram=True is no size; {WRITE}"),
        (None, f"vram=None is no size; {WRITE}"),
        (b"8GB", f"vram=b'8GB' is no size; {WRITE}"),
    ],
)
def test_what_is_no_size_is_refused(value, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_size(value, what="vram")
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (7_500_000_000, "7.5 GB"),
        (8 * 2**30, "8.59 GB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),  # not 1000 kB
        (123_456_789, "123 MB"),
        (1_500_000_000_000, "1.5 TB"),
        (-2_000_000_000, "-2 GB"),
        (10**18, "1 EB"),
    ],
)
def test_sizes_are_shown(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@given(st.integers(0, 10**14))
def test_what_is_shown_is_read_again(nbytes: int) -> None:
    assert parse_size(format_size(nbytes), what="shown") == pytest.approx(nbytes, rel=0.0051)
