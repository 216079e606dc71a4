"""The states in which a layer rests, and which may follow which.

    OFFLOAD --onload--> ONLOAD --prepare--> PREPARING
    OFFLOAD <--offload-- ONLOAD <--demote-- PREPARING
    OFFLOAD <--offload--------------------- PREPARING

The fourth state of the documentation, computation, is no resting state: it is the time during which a
layer's ``forward`` runs, entered from any of these three and left for the same one.
"""

from enum import Enum

from offload_layers._errors import IllegalTransitionError


class State(Enum):
    """Where a layer's weights rest while the layer does not compute."""

    OFFLOAD = "offload"
    ONLOAD = "onload"
    PREPARING = "preparing"


LEGAL = frozenset(
    {
        (State.OFFLOAD, State.ONLOAD),
        (State.ONLOAD, State.OFFLOAD),
        (State.ONLOAD, State.PREPARING),
        (State.PREPARING, State.ONLOAD),
        (State.PREPARING, State.OFFLOAD),
    }
)


def check_legal(before: State, after: State, *, layer: str) -> None:
    """Refuse a change of state that skips ONLOAD on the way up."""
    if (before, after) not in LEGAL:
        following = " or ".join(b.name for a, b in sorted(LEGAL, key=str) if a is before)
        raise IllegalTransitionError(
            f'layer "{layer}" cannot go {before.name} -> {after.name}; from {before.name} only {following} '
            "is legal. Call onload() on the layer first."
        )
