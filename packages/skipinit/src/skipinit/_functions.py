"""What is known of the functions of torch: which need no values, which draw.

torch tells a function mode of methods as ``Tensor.method``, and of attributes as what reads or writes them:
``Tensor.attribute.__get__`` or ``Tensor.attribute.__set__``.
"""

from collections.abc import Iterable
from types import GetSetDescriptorType
from typing import Any

import torch
from torch import Tensor


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def functions(called: Iterable[str]) -> frozenset[Any]:
    """The functions and methods that are *called* so, and what reads and writes such attributes."""
    found: set[Any] = set()
    for part in (getattr(owner, name, None) for name in called for owner in (torch, Tensor)):
        found |= {part.__get__, part.__set__} if isinstance(part, GetSetDescriptorType) else {part}
    return frozenset(found)


_DEVICE = names(
    "device get_device is_cpu is_cuda is_ipu is_maia is_meta is_mps is_mtia is_vulkan is_xla is_xpu"
)
#: attributes that are tensors
_VIEWS = names("data T H mT mH real imag _base")
_ATTRIBUTES = {name for name in dir(Tensor) if isinstance(getattr(Tensor, name), GetSetDescriptorType)}
#: what asks where a tensor is, to be answered as in a plain construction
DEVICE = functions(_DEVICE)
#: what needs shape, dtype, flags or hooks only: a meta tensor answers truly
METADATA = functions(
    (_ATTRIBUTES - _DEVICE - _VIEWS)
    | names(
        "dim size numel nelement ndimension stride storage_offset is_contiguous is_floating_point is_complex"
        " is_signed is_inference is_conj is_neg is_same_size element_size has_names __len__ __hash__ _is_view"
        " requires_grad_ retain_grad register_hook register_post_accumulate_grad_hook result_type"
        " _has_compatible_shallow_copy_type"
    )
) | {torch._C._set_grad_enabled}

#: functions that draw; some take a ``generator``, which depends on the version of torch
RANDOM = names(
    "rand randn randint randperm normal bernoulli multinomial poisson binomial rand_like randn_like"
    " randint_like dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout"
    " feature_dropout native_dropout rrelu rrelu_ gumbel_softmax uniform_ normal_ random_ exponential_"
    " geometric_ log_normal_ cauchy_ bernoulli_ trunc_normal_ orthogonal_ sparse_ kaiming_uniform_"
    " kaiming_normal_ xavier_uniform_ xavier_normal_ reset_linear"
)

# Rules. Without them these calls would be put off nevertheless, but the first ``mul`` or ``normal_`` on the
# meta device makes torch import 800 modules.

#: functions of one floating tensor and numbers whose result has that tensor's shape, strides and dtype
ELEMENTWISE = names("add sub mul div true_divide neg rsub __rsub__ __rdiv__")
#: functions of one floating tensor and numbers that change nothing but its values
IN_PLACE = names(
    "add_ sub_ mul_ div_ neg_ clamp_ uniform_ normal_ fill_ zero_ exponential_ log_normal_ cauchy_ constant_"
    " ones_ zeros_ trunc_normal_"
)
#: the same, for tensors of at least two dimensions (they raise for others)
IN_PLACE_2D = names("xavier_uniform_ xavier_normal_ kaiming_uniform_ kaiming_normal_ orthogonal_")
#: the types of arguments that cannot change between a call and the time when it is run
PLAIN = frozenset({bool, int, float, str, type(None)})
