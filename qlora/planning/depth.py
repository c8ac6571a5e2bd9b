"""From a few layers to all of them.

Each layer adds the same to every storage that is alive at a given moment, so the peak of a phase is affine in the number of
whole periods of layers, once there are enough of them for the peak to lie at the same moment. Two shallow models give
the line; what is chosen with it is simulated at full depth before it is promised.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence


def depths_to_simulate(layers: Sequence[Hashable]) -> tuple[int, int] | None:
    """Numbers of layers to simulate, the second one period deeper; None where the model is too short or too irregular.

    Args:
        layers: what each layer is, equal for layers that are alike.
    """
    num_layers = len(layers)
    for period in range(1, num_layers // 2 + 1):
        if all(layers[i] == layers[i + period] for i in range(num_layers - period)):
            # The first depth leaves a whole number of periods, and has two layers at least: first and last differ.
            first = num_layers % period + period
            first += period if first < 2 else 0
            return (first, first + period) if first + period < num_layers else None
    return None


def extend(
    shallow: Mapping[str, int], deeper: Mapping[str, int], depths: tuple[int, int], num_layers: int
) -> dict[str, int]:
    """Values at `num_layers` on the line through two depths, by key; what only one of them has counts as 0 in the other."""
    factor = (num_layers - depths[0]) / (depths[1] - depths[0])
    keys = [*shallow, *(key for key in deeper if key not in shallow)]
    return {key: round(shallow.get(key, 0) + (deeper.get(key, 0) - shallow.get(key, 0)) * factor) for key in keys}
