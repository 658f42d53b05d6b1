"""The timing of peers in turns. No time is asserted."""

from __future__ import annotations

from zerotuning.bench import timing


def test_ratios_are_to_the_first_peer_and_every_peer_is_called_in_turn() -> None:
    calls: list[str] = []
    figures = timing.take_turns({name: (lambda name=name: calls.append(name)) for name in "ab"}, seconds=0.0)
    assert calls == ["a", "a", "b", "b"] * 5  # in each turn one warm-up call and one timed call
    assert figures["a"]["ratio"] == 1.0
    assert figures["b"]["ms"] > 0
