"""The dtype codes of the safetensors format and the torch dtypes that hold them.

Source: the enumeration ``Dtype`` of safetensors 0.8 and the dtypes under which its torch binding returns
    them.
"""

import torch

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",  # torch >= 2.7
    "F4": "float4_e2m1fn_x2",  # torch >= 2.8; two values in one element
}

#: code -> torch dtype, as far as the installed torch has it
TORCH_DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _TORCH_NAMES.items() if hasattr(torch, name)
}

#: code -> bits of one element, for every code of the format
BITS: dict[str, int] = {
    **{code: dtype.itemsize * 8 for code, dtype in TORCH_DTYPES.items()},
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}

#: torch dtype -> code, for writing
CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in TORCH_DTYPES.items()}


def pack_shape(code: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape of the torch tensor that holds *shape* elements, or None if there is none."""
    if code != "F4":
        return shape
    if not shape or shape[-1] % 2:
        return None
    return (*shape[:-1], shape[-1] // 2)


def unpack_shape(code: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape to write in a header for a torch tensor of *shape*: the inverse of ``pack_shape``."""
    return (*shape[:-1], shape[-1] * 2) if code == "F4" else shape
