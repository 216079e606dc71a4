"""State-dict converters: a function from the names of a checkpoint to the names of a model.

The converter is called once with ``{name: name}``.  What it returns says, for every new name, from which
stored tensor it comes; two names may come from one tensor.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from safemap._errors import ConverterError

StateDictConverter = Callable[[Any], Mapping[str, Any]]


def rename(names: Iterable[str], converter: StateDictConverter) -> dict[str, str]:
    """Return new name -> stored name.

    Raises:
        ConverterError: the converter computes with tensors, or returns something else than a mapping of
            names.
    """
    known = {name: name for name in names}
    label = converter_name(converter)
    try:
        result = converter(dict(known))
    except Exception as error:
        raise ConverterError(
            f"the state_dict_converter {label} failed on names ({type(error).__name__}: {error}). It is "
            "called with {name: name} instead of tensors, so it can only rename, drop and repeat tensors. "
            "Convert the file once with this converter, or load it whole."
        ) from error
    if not isinstance(result, Mapping):
        raise ConverterError(
            f"the state_dict_converter {label} must return a dict; got {type(result).__name__}"
        )
    for name, source in result.items():
        if not isinstance(name, str) or not isinstance(source, str) or source not in known:
            raise ConverterError(
                f"the state_dict_converter {label} gives {source!r:.80} for {name!r:.80}, which is no name "
                "of a stored tensor. It is called with {name: name} and must pass the values on as they are."
            )
    return dict(result)


def converter_name(converter: object) -> str:
    """Return the name by which a message can speak of *converter*."""
    module, name = getattr(converter, "__module__", None), getattr(converter, "__qualname__", None)
    return f"{module}.{name}" if module and name else repr(converter)
