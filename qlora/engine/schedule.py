"""The layer-major schedule: in an optimizer step every layer is visited once forward and once backward, for all micro-batches.

Gradient accumulation usually goes through the whole model for one micro-batch after the other, so a layer that does not live on the
device would have to come there twice for each of them. Here it comes twice in all, however many there are. What is computed is the
same to the last bit: the same operations on the same numbers, and each layer's gradients are added in the order of the micro-batches.

The model's own code stays in charge of all that is not a layer. It is run twice for each micro-batch:

1. *Recording*, up to the last layer, with every layer noting what it was called with (positions, masks) and computing nothing.
2. The layers, by this schedule, without a graph; only their inputs are kept.
3. *Replaying*, from the last layer's output: the final norm, the head, the loss, and its gradient back to that output.
4. The layers once more, last first: each is computed again, this time with a graph, and its gradient taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, MutableSet, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import torch

from qlora.engine.boundaries import OnDevice
from qlora.engine.dense import DenseVisit
from qlora.engine.host_adapters import HostAdapters
from qlora.engine.stream import Stream
from qlora.errors import ModelError

_Result = TypeVar("_Result")


class Schedule:
    """Takes the place of a model's loop over its layers.

    Args:
        layers: of the decoder, in order. Each takes the hidden states, (rows, tokens, width), as its first argument and returns them.
        stream: brings their weights.
        kept: where hidden states wait.
        autocast: entered around each layer, as the trainer's is around the model.
        adapters: where adapters live in host memory.
        dense: dequantise a layer's weights once a visit.
        at_once: micro-batches that go through each visit; None is all of a step. One is what layers that live on the device want.
    """

    def __init__(
        self, layers: Sequence[torch.nn.Module], stream: Stream, *, kept: Any = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext, adapters: HostAdapters | None = None, dense: bool = False,
        at_once: int | None = None,
    ):
        self.layers, self.stream = list(layers), stream
        self.autocast, self.at_once = autocast, at_once
        self._kept = kept or OnDevice()
        self._adapters, self._dense = adapters, dense
        self._originals = [layer.forward for layer in self.layers]
        self._recording: Pass | None = None
        self._random: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._replaying: torch.Tensor | None = None
        for number, layer in enumerate(self.layers):
            layer.forward = self._stand_in(number, layer.forward)

    def remove(self) -> None:
        """Give the model its own loop back."""
        for layer in self.layers:
            del layer.forward

    def step(self, calls: Sequence[Callable[[], _Result]]) -> list[_Result]:
        """Forward and backward of some micro-batches.

        Args:
            calls: each runs the model on its micro-batch and the backward pass of the loss that follows. It is called twice, and
                left by an exception of ours the first time.

        Returns:
            What the calls returned.
        """
        at_once = self.at_once or len(calls)
        return [result for i in range(0, len(calls), at_once) for result in self._step(calls[i : i + at_once])]

    def forward(self, calls: Sequence[Callable[[], _Result]]) -> list[_Result]:
        """The forward pass of some batches, without gradients; see `step`."""
        num_layers = len(self.layers)
        with self._clean_end(), torch.no_grad(), closing(self.stream.walk(range(num_layers))) as visits:
            passes = [self._record(position, call) for position, call in enumerate(calls)]
            for number in visits:
                with self._visit(number, train=False):
                    self._go_forward(number, passes, self._kept.take)
            return [self._replay(position, call) for position, call in enumerate(calls)]

    def _step(self, calls: Sequence[Callable[[], _Result]]) -> list[_Result]:
        forward = range(len(self.layers))
        with self._clean_end(), closing(self.stream.walk([*forward, *reversed(forward)])) as visits:
            passes = [self._record(position, call) for position, call in enumerate(calls)]
            for number in islice(visits, len(forward)):
                with self._visit(number, train=False), torch.no_grad():
                    self._go_forward(number, passes, self._kept.look)
            results = [self._replay(position, call) for position, call in enumerate(calls)]
            for number in visits:
                with self._visit(number, train=True):
                    self._go_backward(number, passes)
        return results

    # --- the model's own code, around the layers ---------------------------------------------------------------------------

    def _stand_in(self, number: int, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """What a layer does when the model calls it."""

        @functools.wraps(original)
        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            is_last = number + 1 == len(self.layers)
            if self._recording is not None:
                self._recording.note(hidden, args, kwargs)
                if is_last:
                    raise _Recorded
                return hidden
            if self._replaying is not None:
                return self._replaying if is_last else hidden
            return self._alone(number, original, hidden, *args, **kwargs)

        return forward

    def _record(self, position: int, call: Callable[[], Any]) -> Pass:
        """What each layer is called with for a micro-batch."""
        self._recording = recorded = Pass()
        try:
            with torch.no_grad():
                call()
        except _Recorded:
            self._kept.keep((0, position), recorded.hidden)
            recorded.like, recorded.hidden = (recorded.hidden.shape, recorded.hidden.dtype), None
            return recorded
        finally:
            self._recording = None
        raise AssertionError("the model ran without its layers")

    def _replay(self, position: int, call: Callable[[], _Result]) -> _Result:
        """The rest of the model, from the last layer's output on, and the gradient of the loss with respect to that."""
        hidden = self._kept.take((len(self.layers), position)).detach()
        self._replaying = hidden.requires_grad_(torch.is_grad_enabled())
        try:
            result = call()
        finally:
            self._replaying = None
        if hidden.requires_grad:
            self._kept.keep(("gradient", position), _gradient_of(hidden))
        return result

    def _alone(self, number: int, original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """A layer in a forward pass of the model's own, as in generation."""
        assert not torch.is_grad_enabled(), "gradients of scheduled layers are made by Schedule.step"
        behind = [*range(number + 1, len(self.layers)), *range(number + 1)]
        with self.stream.visit(number, behind), self._visit(number, train=False):
            return original(*args, **kwargs)

    # --- the layers --------------------------------------------------------------------------------------------------------

    def _go_forward(self, number: int, passes: Sequence[Pass], get: Callable[[Any], torch.Tensor]) -> None:
        """All micro-batches through a layer, without a graph."""
        for position, each in enumerate(passes):
            hidden = get((number, position))
            self._kept.soon((number, position + 1))
            each.random.append(self._random_now(hidden.device))
            shared = _sizes_of_containers(each.arguments[number])
            output = self._compute(number, each, hidden)
            _refuse_shared_state(shared, _sizes_of_containers(each.arguments[number]))
            self._kept.keep((number + 1, position), output)

    def _go_backward(self, number: int, passes: Sequence[Pass]) -> None:
        """All micro-batches through a layer once more, and back."""
        for position, each in enumerate(passes):
            # What comes before the first layer is frozen: nobody asks for that gradient.
            hidden = self._kept.take((number, position)).detach().requires_grad_(number > 0)
            gradient = self._kept.take(("gradient", position))
            for key in ((number, position + 1), ("gradient", position + 1)):
                self._kept.soon(key)
            with torch.enable_grad(), _random_numbers(each.random[number], hidden.device):
                output = self._compute(number, each, hidden)
            if output.requires_grad:
                torch.autograd.backward(output, gradient)
            del output, gradient
            if number > 0:
                self._kept.keep(("gradient", position), _gradient_of(hidden))

    def _compute(self, number: int, each: Pass, hidden: torch.Tensor) -> torch.Tensor:
        """One micro-batch through one layer, as the model would call it."""
        args, kwargs = each.arguments[number]
        with self.autocast():
            return self._originals[number](hidden, *args, **kwargs)

    def _random_now(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The state of the random numbers: the tensors of last time where nobody has drawn any since, because a state has 5 kB and there
        is one for each layer and micro-batch.
        """
        now = _random_state(device)
        same = self._random is not None and all(
            mine is theirs is None or (mine is not None and theirs is not None and torch.equal(mine, theirs))
            for mine, theirs in zip(self._random, now, strict=True)
        )
        if not same:
            self._random = now
        return self._random

    @contextmanager
    def _visit(self, number: int, *, train: bool) -> Iterator[None]:
        """A layer whose weights are there gets its adapters too, and its weights in 16 bits where that is asked for."""
        with ExitStack() as held:
            if self._adapters is not None:
                self._adapters.enter(number, train)
                held.callback(self._adapters.leave, number)
            if self._dense:
                held.enter_context(DenseVisit(self.layers[number]))
            yield

    @contextmanager
    def _clean_end(self) -> Iterator[None]:
        """Nothing of a step stays when it ends early."""
        try:
            yield
        except BaseException:
            self._kept.clear()
            raise


# --- what is kept of a micro-batch -------------------------------------------------------------------------------------------


class _Recorded(Exception):
    """The last layer has been called; the model is left here."""


@dataclass
class Pass:
    """One micro-batch: what each layer is called with beside the hidden states, and the random numbers' state at its forward pass.

    Attributes:
        hidden: what goes into the first layer, until the schedule keeps it; `like` is its shape and type.
        is_phantom: in a rehearsal, one that is not computed; see `qlora.engine.rehearsed`.
    """

    hidden: torch.Tensor | None = None
    like: tuple[torch.Size, torch.dtype] | None = None
    is_phantom: bool = False
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    random: list[Any] = field(default_factory=list)

    def note(self, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A layer was called.

        Raises:
            ModelError: the model does something to the hidden states between its layers.
        """
        if self.arguments and hidden is not self.hidden:
            raise ModelError(
                "This model computes something between its layers, so they cannot be visited by themselves.",
                "Set memory.streaming: false and memory.offload_activations: false.",
            )
        self.hidden = hidden
        self.arguments.append((args, kwargs))


def _gradient_of(hidden: torch.Tensor) -> torch.Tensor:
    """Zeros where nothing depends on it."""
    return hidden.grad if hidden.grad is not None else torch.zeros_like(hidden)


def _sizes_of_containers(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> list[tuple[str, int]]:
    """Of what a layer is called with, all that it could put something into; transformers' own kinds are not all of them dicts."""
    args, kwargs = arguments
    named = [*((f"argument {number}", value) for number, value in enumerate(args, 2)), *kwargs.items()]
    return [(name, len(value)) for name, value in named if isinstance(value, MutableMapping | MutableSequence | MutableSet)]


def _refuse_shared_state(before: list[tuple[str, int]], after: list[tuple[str, int]]) -> None:
    """
    Raises:
        ModelError: a layer left something for later layers, whose gradient would be lost.
    """
    shared = [name for (name, size), (_, now) in zip(before, after, strict=True) if size != now]
    if shared:
        raise ModelError(
            f"This model's layers hand {shared[0]} to later ones beside the hidden states, so they cannot be visited by themselves.",
            "Set memory.streaming: false and memory.offload_activations: false.",
        )


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _random_numbers(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> Iterator[None]:
    """The same random numbers as in the forward pass; after it those that were to come anyway."""
    before = _random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(before, device)


def _set_random_state(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
