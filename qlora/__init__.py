"""Fine-tune large language models on one small GPU.

    from qlora import load_recipe, train

    result = train(load_recipe("recipes/quickstart.yaml", ["train.epochs=2"]))
    print(result.after["exact_match"], result.adapter)

Names are loaded at their first use, so `import qlora` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora.architecture import describe, find_config
    from qlora.console import ConsoleProgress
    from qlora.errors import QloraError
    from qlora.hub.push import push_run
    from qlora.planning.plan import Plan
    from qlora.progress import Progress
    from qlora.recipe import Recipe, build_recipe, load_recipe
    from qlora.training.planner import plan_model, plan_recipe
    from qlora.training.run import RunResult, train
    from qlora.training.setup import prepare

__version__ = "0.1.0"

_HOMES = {
    "Recipe": "qlora.recipe",
    "build_recipe": "qlora.recipe",
    "load_recipe": "qlora.recipe",
    "prepare": "qlora.training.setup",
    "plan_recipe": "qlora.training.planner",
    "plan_model": "qlora.training.planner",
    "Plan": "qlora.planning.plan",
    "train": "qlora.training.run",
    "push_run": "qlora.hub.push",
    "RunResult": "qlora.training.run",
    "find_config": "qlora.architecture",
    "describe": "qlora.architecture",
    "Progress": "qlora.progress",
    "ConsoleProgress": "qlora.console",
    "QloraError": "qlora.errors",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qlora' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
