"""A curve as text."""

from maxpretrain.plan.curve import draw


def test_levels_and_labels():
    assert draw([0.0, 0.25, 0.5, 0.75, 1.0], height=2, labels=("1", "0"), below=("a", "b")).splitlines() == [
        "1 │   ▄█",
        "0 │ ▄███",
        "  └─────",
        "   a   b",
    ]


def test_a_small_value_shows_and_nothing_but_zeros_is_flat():
    assert draw([1e-6, 1.0], height=1, labels=("", ""), below=("", "")).splitlines()[0] == " │▁█"
    assert draw([0.0, 0.0], height=1, labels=("", ""), below=("", "")).splitlines()[0] == " │"
