"""Does a checkpoint fit a model?  Answered before any weight is read, in words that tell what to do."""

import copy
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffsynth_core_vram._rehearse import rehearse, stand_in

_EXTRA_STATE = "_extra_state"  # how torch names what ``get_extra_state`` of a module gives
_LISTED = 5  # names per kind of misfit; a wrong prefix would list every name of the model


class CheckpointMismatchError(RuntimeError):
    """A checkpoint lacks tensors of the model, has others, or has them in another shape.

    Attributes:
        missing: Names that the model has and the checkpoint lacks.
        unexpected: Names that the checkpoint has and the model lacks.
        mismatched: Names whose shape differs, or whose imaginary part the model has no place for.
    """

    def __init__(
        self,
        message: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.missing = list(missing)
        self.unexpected = list(unexpected)
        self.mismatched = list(mismatched)


def tie_aliases(model: nn.Module, source: Mapping[str, Tensor]) -> dict[str, str]:
    """Say under which name *source* has each parameter that *model* holds under several.

    Such a parameter is often saved under one of its names only.

    Raises:
        CheckpointMismatchError: it is saved under more than one, with different values.
    """
    names_saved = frozenset(source)  # asking the source itself may read the tensor
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    aliases = {}
    for names in groups.values():
        saved = [name for name in names if name in names_saved]
        if len(names) == 1 or not saved:
            continue
        for other in saved[1:]:
            if not torch.equal(source[saved[0]], source[other]):
                raise CheckpointMismatchError(
                    f'{type(model).__name__} ties "{saved[0]}" and "{other}", but the checkpoint has '
                    "different values for them. Build the model without the tie (often "
                    "tie_word_embeddings=False), or drop one with a state_dict_converter=."
                )
        aliases.update(dict.fromkeys(names, saved[0]))
    return aliases


def check_fit(
    model: nn.Module, source: Mapping[str, Tensor], aliases: Mapping[str, str], *, casts: bool
) -> None:
    """Raise unless *source* has exactly the tensors that *model* loads.

    A checkpoint in the names and shapes of the model fits. Of any other torch is the judge, so that modules
    which rename, add or reshape entries while they load are heard: a copy of the model, which has its
    structure and no memory, loads stand-ins that cost nothing. Where that fails, as it does for modules that
    cannot be copied or that need values, the answer is left to the load itself, unless no module has a say.

    Args:
        model: Its parameters may be on ``meta``.  It is left as it was, and none of its hooks runs on it.
        source: The checkpoint, in the model's names; asked for ``info(name)`` where it offers that.  The
            extra state of modules, which is no weight, may be read.
        aliases: From `tie_aliases`.
        casts: What is loaded becomes a dtype that is real, so that complex values would lose a part.

    Raises:
        CheckpointMismatchError: names or shapes differ, or a complex tensor would become a real parameter.
    """
    own = {name: tensor for name, tensor in _own_tensors(model).items() if not nn.parameter.is_lazy(tensor)}
    expected = _expected(model)
    stored = {name: _stored(source, aliases.get(name, name)) for name in {**dict.fromkeys(source), **aliases}}
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    mismatched = {
        name: f"{found.described()}, but {tuple(own[name].shape)} in the model"
        for name, found in stored.items()
        if name in own and not found.fills(tuple(own[name].shape))
    }
    halved = _halved(own, {name: found.dtype for name, found in stored.items()}) if casts else {}
    if missing or unexpected or mismatched or halved:
        honest = {name: _honest(source, name, found) for name, found in stored.items()}
        try:
            copied, missing, unexpected = rehearse(model, honest)
            mismatched = {}
            loaded = {name: tensor.dtype for name, tensor in _own_tensors(copied).items()}
            halved = _halved(own, loaded) if casts else {}
        except Exception:  # a wrong shape, or anything that modules do without values
            fitting = {name: stand_in(own[name]) if name in own else honest[name] for name in stored}
            try:
                _, missing, unexpected = rehearse(model, fitting)
            except Exception:
                if _has_a_say(model):
                    return
    if missing or unexpected or mismatched or halved:
        text = _describe(model, len(source), missing, unexpected, mismatched, halved)
        raise CheckpointMismatchError(text, missing, unexpected, [*mismatched, *halved])


class _Stored(NamedTuple):
    """What a checkpoint has under a name; no shape: something that is no tensor."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None

    def described(self) -> str:
        return "no tensor" if self.shape is None else str(self.shape)

    def fills(self, shape: tuple[int, ...]) -> bool:
        return self.shape == shape or (self.shape, shape) == ((1,), ())  # torch takes one value for a scalar


def _stored(source: Mapping[str, Tensor], name: str) -> _Stored:
    info = getattr(source, "info", None)
    try:
        found = source[name] if info is None else info(name)
    except TypeError:  # a map of files describes tensors alone
        return _Stored(None, None)
    shape, dtype = getattr(found, "shape", None), getattr(found, "dtype", None)
    return _Stored(None if shape is None else tuple(shape), dtype if isinstance(dtype, torch.dtype) else None)


def _honest(source: Mapping[str, Any], name: str, found: _Stored) -> Any:
    """Return what stands for *name* in the checkpoint, or the extra state itself, which has no likeness."""
    if name.rpartition(".")[2] == _EXTRA_STATE and name in source:
        return copy.deepcopy(source[name])  # the module may change it
    return None if found.shape is None else torch.empty(found.shape, dtype=found.dtype, device="meta")


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _expected(model: nn.Module) -> dict[str, None]:
    """Return the names in a state dict of *model*, in its order, if no module has a say."""
    names: dict[str, None] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        computed = module._non_persistent_buffers_set
        held = [name for name, parameter in module._parameters.items() if parameter is not None]
        held += [name for name, b in module._buffers.items() if b is not None and name not in computed]
        if type(module).set_extra_state is not nn.Module.set_extra_state:
            held.append(_EXTRA_STATE)
        names.update(dict.fromkeys(f"{prefix}.{name}" if prefix else name for name in held))
    return names


def _has_a_say(model: nn.Module) -> bool:
    """Say whether *model* or a module of it decides what to load."""
    own_way = ("load_state_dict", "_load_from_state_dict", "set_extra_state")
    return any(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or any(getattr(type(module), name) is not getattr(nn.Module, name) for name in own_way)
        or any(name in module.__dict__ for name in own_way)
        or None in module._modules.values()  # torch takes any entries for it
        for module in model.modules()
    )


def _halved(own: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype | None]) -> dict[str, str]:
    """Say which tensors are complex where those of the model are real."""
    found = {name: dtype for name, dtype in dtypes.items() if dtype is not None and dtype.is_complex}
    return {
        name: f"{_word(dtype)}, but {_word(own[name].dtype)} in the model"
        for name, dtype in found.items()
        if name in own and not own[name].is_complex()
    }


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(
    model: nn.Module,
    found: int,
    missing: list[str],
    unexpected: list[str],
    mismatched: Mapping[str, str],
    halved: Mapping[str, str],
) -> str:
    computed = {name for name, _ in model.named_buffers()}

    def why_unexpected(name: str) -> str:
        return "the model computes it itself" if name in computed else _closest(name, missing)

    lines = [
        f"the checkpoint does not fit {type(model).__name__}; it has {found:,} tensors:",
        *_section("missing", missing, lambda name: _closest(name, unexpected)),
        *_section("unexpected", unexpected, why_unexpected),
        *_section("of another shape", list(mismatched), mismatched.__getitem__),
        *_section("complex, which a real dtype would halve", list(halved), halved.__getitem__),
        "Pass the config= of this checkpoint, or a state_dict_converter= that renames or drops tensors.",
        *(["Complex values are kept where no dtype is asked for."] if halved else []),
    ]
    return "\n    ".join(lines)


def _section(title: str, names: Sequence[str], note: Callable[[str], str]) -> list[str]:
    listed = [f'"{name}"' + (f" ({text})" if (text := note(name)) else "") for name in names[:_LISTED]]
    if len(names) > _LISTED:
        listed.append(f"and {len(names) - _LISTED:,} more")
    return [f"{len(names):,} {title}: {', '.join(listed)}"] if names else []


def _closest(name: str, others: list[str]) -> str:
    same_end = [other for other in others if other.endswith(f".{name}") or name.endswith(f".{other}")]
    near = same_end or difflib.get_close_matches(name, others, 1)
    return f'is it "{near[0]}"?' if near else ""
