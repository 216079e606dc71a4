"""`nn.Linear` initializes itself with six torch functions, each of which the mode is told of; here with none.

Most parameters of a large model belong to linear layers, and being told costs more than what is done about
it. Between the registration of its weight and its own call of ``reset_parameters``, the constructor of
`nn.Linear` runs no code of others. For that time the new layer gets a ``reset_parameters`` of its own, which
removes itself when it is called, and puts the initialization off as one call. No class is touched.
"""

import functools
import sys
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from ._call import Call
from ._log import Log
from ._tensors import storage_address

_CONSTRUCTOR = nn.Linear.__init__.__code__
_RESET = nn.Linear.reset_parameters
_INITIALIZERS = nn.init.kaiming_uniform_, nn.init.uniform_


def expect_reset(module: Any, weight: nn.Parameter, log: Log) -> None:
    """Prepare the *module* whose *weight* is being registered; called by the hook for registrations."""
    # frames: 0 this, 1 the hook, 2 register_parameter, 3 __setattr__, 4 whose statement registers it
    if sys._getframe(4).f_code is _CONSTRUCTOR and type(module).reset_parameters is _RESET:
        module.__dict__["reset_parameters"] = functools.partial(_put_reset_off, module, weight, log)


def _put_reset_off(module: nn.Linear, weight: nn.Parameter, log: Log) -> None:
    del module.__dict__["reset_parameters"]
    bias = module._parameters["bias"]
    parameters = [weight] if bias is None else [weight, bias]
    storages = [s for p in parameters if (s := log.storages.get(storage_address(p))) and s.value is None]
    if (
        len(storages) == len(parameters)
        and module._parameters["weight"] is weight  # hooks of others may have replaced it, or read one
        and (nn.init.kaiming_uniform_, nn.init.uniform_) == _INITIALIZERS  # as some libraries do with these
    ):
        log.write(Call(reset_linear, (module.in_features, *storages)), storages)
    else:
        module.reset_parameters()


def reset_linear(in_features: int, weight: Tensor, bias: Tensor | None = None) -> None:
    """What ``nn.Linear.reset_parameters`` does, for the flat storages of a layer."""
    _RESET(SimpleNamespace(weight=weight.view(-1, in_features), bias=bias))  # type: ignore[arg-type]
