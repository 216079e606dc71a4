"""How each torch function that a constructor may call is answered while a block is open.

Inside a block the tensors that constructors make are *pending*: meta tensors whose value is written down as a
list of operations and computed only if somebody needs it. The tables say which functions can be answered
without the value. Whatever is in no table is either deferred after asking the meta device for its result, or
computed for real, so that a missing entry costs time, never correctness.
"""

import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[..., Any]


class Kind(enum.Enum):
    """What the fast path does with a function."""

    METADATA = enum.auto()  # needs shape, dtype, flags or hooks only: a meta tensor answers truly
    FACTORY = enum.auto()  # makes a tensor: answer with a pending one
    INITIALIZER = enum.auto()  # of torch.nn.init, overwrites its first argument: write it down
    FILL = enum.auto()  # the same, a tensor's method
    DEVICE = enum.auto()  # must be answered as a plain construction would


def _functions(owner: object, names: str) -> list[Function]:
    """Those of *names* that *owner* has in the installed torch."""
    return [getattr(owner, name) for name in names.split() if hasattr(owner, name)]


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


def _getters(names: str) -> list[Function]:
    return [getattr(Tensor, name).__get__ for name in names.split() if hasattr(Tensor, name)]


def _setters(names: str) -> list[Function]:
    return [getattr(Tensor, name).__set__ for name in names.split() if hasattr(Tensor, name)]


#: the initializers of torch; libraries wrap them under the same names
INITIALIZERS = frozenset(name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_"))

KINDS: dict[Function, Kind] = {
    function: kind
    for kind, functions in {
        Kind.METADATA: [
            *_functions(
                Tensor,
                "dim size numel nelement ndimension stride storage_offset is_contiguous"
                " is_floating_point is_complex is_signed is_inference is_conj is_neg is_same_size"
                " element_size has_names __len__ __hash__ requires_grad_ retain_grad register_hook"
                " register_post_accumulate_grad_hook _is_view",
            ),
            *_getters(
                "shape ndim dtype layout requires_grad is_leaf grad grad_fn retains_grad output_nr"
                " names nbytes itemsize is_sparse is_sparse_csr is_quantized is_nested is_mkldnn"
                " _version _backward_hooks _post_accumulate_grad_hooks name"
            ),
            *_setters("requires_grad grad _backward_hooks _post_accumulate_grad_hooks"),
            *_functions(
                torch,
                "numel is_floating_point is_complex is_same_size is_inference is_signed result_type"
                " _has_compatible_shallow_copy_type",
            ),
            torch._C._set_grad_enabled,
        ],
        Kind.FACTORY: _functions(torch, "empty zeros ones rand randn full"),
        Kind.INITIALIZER: [getattr(nn.init, name) for name in INITIALIZERS],
        Kind.FILL: _functions(Tensor, "uniform_ normal_ fill_ zero_"),
        Kind.DEVICE: [*_getters("device is_meta is_cpu is_cuda"), Tensor.get_device],
    }.items()
    for function in functions
}

#: the types of arguments that cannot change between a call and the time when it is run
PLAIN = frozenset({bool, int, float, str, type(None), torch.memory_format})

#: arguments of a factory that say nothing about what the storage would hold
DEFERRABLE_ARGUMENTS = frozenset({"size", "dtype", "device", "requires_grad", "memory_format", "fill_value"})

#: functions that make a tensor shaped like a pending one, and the factory that they come down to
LIKE: dict[Function, Function] = {
    getattr(owner, spelling): getattr(torch, name)
    for name in ("empty", "zeros", "ones", "full", "rand", "randn")
    for owner, spelling in ((torch, f"{name}_like"), (Tensor, f"new_{name}"))
    if hasattr(owner, spelling)
}

LIKE[Tensor.new] = torch.empty  # if it is given sizes

#: functions of one tensor and numbers whose result has that tensor's shape, strides and floating dtype
ELEMENTWISE = _names(
    "add sub mul div true_divide neg abs sqrt exp log sin cos tanh sigmoid clamp clip __add__"
    " __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __neg__ rsub reciprocal"
)
#: the same, in place; nothing but the values changes
ELEMENTWISE_IN_PLACE = _names(
    "add_ sub_ mul_ div_ neg_ abs_ sqrt_ exp_ log_ clamp_ clip_ erfinv_ tanh_ sigmoid_ __iadd__"
    " __isub__ __imul__ __itruediv__ uniform_ normal_ fill_ zero_ exponential_ log_normal_ cauchy_"
    " trunc_normal_ constant_"
)
CASTS: dict[str, torch.dtype] = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
#: pure views: nothing to write down
VIEWS = _names(
    "__get__ __getitem__ detach view view_as t transpose permute unsqueeze squeeze narrow select"
    " chunk split unbind expand expand_as diagonal flatten unflatten swapaxes movedim"
)

#: views that autograd does not follow
UNTRACKED: frozenset[Function] = frozenset({Tensor.data.__get__, Tensor.data.__set__, Tensor.detach})  # type: ignore[attr-defined]

#: functions that draw random numbers and take a ``generator``
RANDOM_WITH_GENERATOR = _names(
    "rand randn randint randperm normal bernoulli multinomial poisson binomial uniform_ normal_"
    " random_ exponential_ geometric_ log_normal_ cauchy_ bernoulli_ trunc_normal_ orthogonal_ sparse_"
    " kaiming_uniform_ kaiming_normal_ xavier_uniform_ xavier_normal_"
)
#: functions that draw random numbers from the global generator only (in some versions of torch)
RANDOM_WITHOUT_GENERATOR = _names(
    "rand_like randn_like randint_like dropout alpha_dropout feature_alpha_dropout feature_dropout dropout_"
    " dropout1d dropout2d dropout3d rrelu rrelu_ gumbel_softmax native_dropout"
)
RANDOM = RANDOM_WITH_GENERATOR | RANDOM_WITHOUT_GENERATOR
