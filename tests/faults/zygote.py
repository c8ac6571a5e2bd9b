"""One warm process that runs of the program are forked from: importing the libraries takes longer than a small run.

It has imported what a run imports, but has started no thread and no parallel region, so a fork of it is a program that has just
started. It is told on stdin what to do, one JSON object a line, and answers each on stdout:

    {"do": "start", "argv": [...], "cwd": ..., "env": {...}, "out": file, "err": file, "faults": [[name, {...}]]} -> {"pid": 7}
    {"do": "wait", "pid": 7, "seconds": 2.5} -> {"code": 0}, negative for a signal, null while it still runs

When stdin ends, the runs that are left are killed.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

_MODULES = (
    "qlora.cli", "qlora.console", "qlora.views", "qlora.results.summary", "qlora.training.run", "qlora.training.trainer",
    "qlora.training.probe", "qlora.training.summary", "qlora.training.simulator", "qlora.training.preflight", "qlora.model.adapt",
    "qlora.model.build", "qlora.model.exact", "qlora.model.meta", "qlora.planning.receipts", "qlora.planning.search",
    "qlora.results.plots", "qlora.results.plan_plots", "qlora.results.report", "qlora.generation", "qlora.redact",
    "datasets", "peft", "trl", "bitsandbytes", "bitsandbytes.optim", "accelerate", "safetensors.torch", "torch._dynamo",
    "transformers.models.llama.modeling_llama", "transformers.integrations.bitsandbytes",
    "transformers.quantizers.quantizer_bnb_4bit",
    "qlora.training.cpu_memory", "qlora.training.packing", "qlora.training.watch", "peft.tuners.lora.bnb",
    "packaging.requirements", "torch.profiler._cupti_monitor", "torch.utils.serialization.config",
    "matplotlib.patheffects", "matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.font_manager",
    "PIL.PngImagePlugin",
)


def main() -> None:
    """Serve until stdin ends."""
    _warm_up()
    # The pipe to the tests is nobody else's: what a run prints goes to its own files.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answers.write(json.dumps({"ready": os.getpid()}) + "\n")
    answers.flush()
    children: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "start":
            pid = _fork(request)
            children.add(pid)
            answer = {"pid": pid}
        else:
            answer = {"code": _wait(request["pid"], request["seconds"])}
            if answer["code"] is not None:
                children.discard(request["pid"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _warm_up() -> None:
    from qlora import _compat

    _compat.prepare_environment()
    _compat.quieten_libraries()
    for name in _MODULES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:  # not there (yet) is a run that starts a little slower; half there is a fault
                raise
    num_threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    assert num_threads == 1, f"{num_threads} threads: a fork would have only one of them"
    gc.collect()
    gc.freeze()  # what is shared with the children stays shared


def _wait(pid: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.002)


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        _become(request)
        code = _run(request)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
    raise AssertionError


def _become(request: dict[str, Any]) -> None:
    """What a process has when it starts: its own streams, folder, environment, words, and signals as the system delivers them."""
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, request["out"], os.O_WRONLY), (2, request["err"], os.O_WRONLY)):
        opened = os.open(path, flags | (os.O_CREAT | os.O_TRUNC if number else 0), 0o644)
        os.dup2(opened, number)
        os.close(opened)
    os.closerange(3, 256)
    sys.stdin = os.fdopen(0, "r", encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    sys.argv = ["qlora", *request["argv"]]


def _run(request: dict[str, Any]) -> int:
    from faults import injections
    from qlora.cli import main as qlora

    for name, values in request["faults"]:
        getattr(injections, name)(**values)
    try:
        code = qlora(request["argv"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    main()
