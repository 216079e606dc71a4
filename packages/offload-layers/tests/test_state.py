import itertools

import pytest
from offload_layers import IllegalTransitionError, State
from offload_layers._state import check_legal

ALLOWED = {
    ("OFFLOAD", "ONLOAD"),
    ("ONLOAD", "OFFLOAD"),
    ("ONLOAD", "PREPARING"),
    ("PREPARING", "ONLOAD"),
    ("PREPARING", "OFFLOAD"),
}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(State, State)), ids=lambda s: s.name)
def test_exactly_the_documented_transitions_are_legal(before: State, after: State) -> None:
    if (before.name, after.name) in ALLOWED:
        check_legal(before, after, layer="x")
    else:
        with pytest.raises(IllegalTransitionError):
            check_legal(before, after, layer="x")


def test_the_refusal_names_the_layer_and_the_way() -> None:
    with pytest.raises(IllegalTransitionError) as caught:
        check_legal(State.OFFLOAD, State.PREPARING, layer="blocks.3")
    assert str(caught.value) == (
        'layer "blocks.3" cannot go OFFLOAD -> PREPARING; from OFFLOAD only ONLOAD is legal. '
        "Call onload() on the layer first."
    )
