"""Every error the program raises on purpose, in one tree.

A message says what was set or found and why it cannot work, then what to change. Users' mistakes are one of these (the
command line prints them without a traceback and exits with `exit_code`); mistakes of the program are assertions.
Each class is also the standard-library error that a script would expect to catch.
"""


class QloraError(Exception):
    """Base of the tree.

    Args:
        problem: what was set or found, and why it cannot work.
        fix: the edit or command that helps; printed on its own line.
    """

    exit_code = 2

    def __init__(self, problem: str, fix: str = ""):
        self.problem = problem
        self.fix = fix
        super().__init__(f"{problem}\n{fix}" if fix else problem)


class RecipeError(QloraError, ValueError):
    """A recipe, or a value given on the command line, that cannot be used."""


class DataError(QloraError, ValueError):
    """Rows that cannot be read, or that hold nothing to train on."""


class ModelError(QloraError, ValueError):
    """A model, configuration or tokenizer that cannot be found or built."""


class NeedsLoaderError(ModelError):
    """Weights that only the library's own loader brings into the model's form; who reads them directly falls back to it."""


class HardwareError(QloraError, RuntimeError):
    """A device that is asked for but not there, or too small."""


class DoesNotFitError(HardwareError):
    """A plan that needs more than the budget, with the least that its recipe allows. Nothing has been written.

    Attributes:
        needed_bytes, budget_bytes: of device memory.
    """

    def __init__(self, problem: str, fix: str, needed_bytes: int, budget_bytes: int):
        super().__init__(problem, fix)
        self.needed_bytes, self.budget_bytes = needed_bytes, budget_bytes


class OutputError(QloraError, OSError):
    """A run folder that cannot be written."""


class StoreError(QloraError, OSError):
    """A quantised base in the cache that is damaged, or cannot be read."""


class BusyError(OutputError):
    """A run folder that another process is working in."""


class ResumeError(QloraError, RuntimeError):
    """A run that cannot be gone on with: no checkpoint of it is good, or its data or settings have changed."""


class VerificationError(QloraError, RuntimeError):
    """What was built differs from what was planned. Nothing has been trained when this is raised."""


class DivergedError(QloraError, ArithmeticError):
    """A loss or gradient that is not finite. Raised before the optimizer step, so the weights are the last good ones."""

    exit_code = 4


class HubError(QloraError, OSError):
    """The Hub cannot be reached, does not let us, or holds something else than was expected."""


class UnreachableError(HubError):
    """The Hub did not answer, or only with errors that pass, for longer than was to be waited."""


class PushError(HubError):
    """The run is finished and on disk, but did not reach the Hub. Ctrl-C in the middle of a push has exit code 130."""

    exit_code = 3

    def __init__(self, problem: str, fix: str = "", *, exit_code: int = 3):
        super().__init__(problem, fix)
        self.exit_code = exit_code


class InterruptedRun(QloraError):
    """The run was stopped from outside: Ctrl-C (exit code 130), or a signal, whose exit code is 128 and its number."""

    exit_code = 130

    def __init__(self, problem: str, fix: str = "", *, exit_code: int = 130):
        super().__init__(problem, fix)
        self.exit_code = exit_code
