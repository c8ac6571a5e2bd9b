"""The record of a sweep: an Optuna study in a journal file, to which a point is added as a whole when it has been measured.

A trial is one line of the journal, so a sweep that is killed leaves finished points and nothing else. `optuna.load_study`, or
Optuna's dashboard, reads the file as any other study.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.errors import OutputError
from qlora.sweeping.results import Point
from qlora.sweeping.space import Range, Space, Values

if TYPE_CHECKING:
    import optuna

STUDY = "study.journal"
_NAME = "sweep"
_FACTS, _POINT = "facts", "point"


class Study:
    """An open study. To be used by one process at a time, which the lock of the sweep's folder sees to.

    Raises:
        OutputError: the journal cannot be read or written.
    """

    def __init__(self, folder: Path, seed: int):
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        path, self._seed = folder / STUDY, seed
        try:
            _mend(path)
            backend = JournalFileBackend(str(path), JournalFileOpenLock(str(path)))
            self._study = optuna.create_study(storage=JournalStorage(backend), study_name=_NAME, load_if_exists=True)
            self._points = [Point.from_json(trial.user_attrs[_POINT]) for trial in self._study.get_trials(deepcopy=False)]
        except OSError as error:
            raise OutputError(f"{path} cannot be read or written: {error.strerror or error}.",
                              "Make the folder writable, or name another with --out.") from error
        except Exception as error:  # Optuna's reading of a damaged journal may end in any
            raise OutputError(f"{path} is damaged, or no record of a sweep: {type(error).__name__}: {str(error)[:200]}",
                              "Name another folder with --out, or remove that file: the runs beside it are read again."
                              ) from error

    @property
    def facts(self) -> dict[str, Any] | None:
        """What the sweep was begun with; None for a new one."""
        return self._study.user_attrs.get(_FACTS)

    def begin(self, facts: dict[str, Any]) -> None:
        """Write down what the sweep is begun with."""
        self._study.set_user_attr(_FACTS, facts)

    @property
    def points(self) -> tuple[Point, ...]:
        """Those that have been measured, in order."""
        return tuple(self._points)

    def find(self, name: str) -> Point | None:
        """The point of that name, if it has been measured."""
        return next((point for point in self._points if point.name == name), None)

    def add(self, point: Point, space: Space) -> None:
        """A point that has been measured. One without a result counts as pruned: worse than any other."""
        import optuna

        state = optuna.trial.TrialState
        self._study.add_trial(optuna.trial.create_trial(
            state=state.COMPLETE if point.good else state.PRUNED, value=point.loss if point.good else None,
            params=point.values, distributions=_distributions(space), user_attrs={_POINT: point.to_json()},
        ))
        self._points.append(point)

    def propose(self, space: Space, number: int, num_known: int) -> Values:
        """The point to try as the `number`-th, from the first `num_known` that were measured (fewer, where one was proposed
        twice). It follows from the seed and from those, however often the program was started.

        It is drawn in memory, so that the file never holds a point that is not finished.
        """
        import optuna

        scratch = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=self._seed + number))
        scratch.add_trials(self._study.get_trials(deepcopy=False)[:num_known])
        asked = scratch.ask(_distributions(space))
        return {key: _short(asked.params[key], values) for key, values in space.items()}


def _short(value: Any, values: tuple[Any, ...] | Range) -> Any:
    """Three digits of a number that was drawn from a range: nobody can tell it from its neighbours, and it is easier to write."""
    if not isinstance(values, Range) or values.whole:
        return value
    return min(max(float(f"{value:.3g}"), values.low), values.high)


def _distributions(space: Space) -> dict[str, optuna.distributions.BaseDistribution]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def of(values: tuple[Any, ...] | Range) -> optuna.distributions.BaseDistribution:
        if not isinstance(values, Range):
            return CategoricalDistribution(values)
        if values.whole:
            return IntDistribution(values.low, values.high)
        return FloatDistribution(values.low, values.high, log=values.low > 0)

    return {key: of(values) for key, values in space.items()}


def _mend(path: Path) -> None:
    """A power cut can leave half a line at the end, and Optuna (5.0, storages/journal/_file.py) would write the next one behind
    it; a process that was killed in the middle of writing leaves its lock.
    """
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
