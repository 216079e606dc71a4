"""Does a checkpoint fit a model?  Answered before any weight is read, in words that tell what to do."""

import difflib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

_LISTED = 5  # names per kind of misfit; a wrong prefix would list every name of the model


class CheckpointMismatchError(RuntimeError):
    """A checkpoint lacks tensors of the model, has others, or has them in another shape.

    Attributes:
        missing: Names that the model has and the checkpoint lacks.
        unexpected: Names that the checkpoint has and the model lacks.
        mismatched: Names whose shape differs.
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


def check_fit(model: nn.Module, source: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Raise unless *source* has exactly the tensors that *model* loads.

    torch itself is the judge, so that modules which rename or add entries while they load are heard: the
    model loads stand-ins that cost nothing, which are its own tensors where it has the name.

    Args:
        model: Its parameters may be on ``meta``.  It is left as it was.
        source: The checkpoint, in the model's names; asked for ``info(name)`` where it offers that.
        aliases: From `tie_aliases`.

    Raises:
        CheckpointMismatchError: names or shapes differ.
    """
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    own.update(model.named_buffers(remove_duplicate=False))
    mismatched: dict[str, str] = {}
    stand_ins: dict[str, object] = {}
    for name in {**dict.fromkeys(source), **aliases}:
        shape = _shape(source, aliases.get(name, name))
        if shape is None:  # a module's extra state, which need not be a tensor
            stand_ins[name] = source[name]
        elif name not in own or nn.parameter.is_lazy(own[name]):
            stand_ins[name] = torch.empty(shape, device="meta")
        else:
            stand_ins[name] = own[name]
            expected = tuple(own[name].shape)
            if shape != expected and (shape, expected) != ((1,), ()):  # torch takes one value for a scalar
                mismatched[name] = f"{shape}, but {expected} in the model"
    missing, unexpected = model.load_state_dict(stand_ins, strict=False)
    if missing or unexpected or mismatched:
        text = _describe(model, len(source), missing, unexpected, mismatched)
        raise CheckpointMismatchError(text, missing, unexpected, list(mismatched))


def _shape(source: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    info = getattr(source, "info", None)
    tensor = source[name] if info is None else info(name)
    shape = getattr(tensor, "shape", None)
    return None if shape is None else tuple(shape)


def _describe(
    model: nn.Module, found: int, missing: list[str], unexpected: list[str], mismatched: Mapping[str, str]
) -> str:
    computed = {name for name, _ in model.named_buffers()}

    def why_unexpected(name: str) -> str:
        return "the model computes it itself" if name in computed else _closest(name, missing)

    lines = [
        f"the checkpoint does not fit {type(model).__name__}; it has {found:,} tensors:",
        *_section("missing", missing, lambda name: _closest(name, unexpected)),
        *_section("unexpected", unexpected, why_unexpected),
        *_section("of another shape", list(mismatched), mismatched.__getitem__),
        "Pass the config= of this checkpoint, or a state_dict_converter= that renames or drops tensors.",
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
