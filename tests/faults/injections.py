"""Faults, put into a run from outside before it begins. The program knows nothing of them.

Each function is called once, by name, in the process of the run (see `faults.zygote`). Two kinds of moments are known: operations
on files, which Python tells its audit hooks before it does them, and micro-batches, by the trainer's own count of steps.
"""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

# --- operations on files -----------------------------------------------------------------------------------------------


def at_operation(pattern: str, count: int, action: str, kinds: str = "", then_below: str = "", **values: Any) -> None:
    """Do `action` right before the `count`-th operation whose path matches the pattern.

    Args:
        pattern: a regular expression, searched in the absolute path; of a rename, in both paths with a blank between.
        kinds: only these, separated by blanks: open (to write), mkdir, fsync, rename, remove, rmdir, truncate.
        then_below: and before every operation below this folder from then on.
        action: a function of this module that takes (path, **values).
    """
    seen = 0

    def notice(kind: str, path: str) -> None:
        nonlocal seen
        matches = re.search(pattern, path) and (not kinds or kind in kinds.split())
        again = seen >= count and then_below and path.startswith(then_below)
        seen += bool(matches)
        if again or (matches and seen == count):
            globals()[action](path, **values)

    _on_operations(notice)


def list_operations(into: str, below: str) -> None:
    """Write "kind path" of every operation below a folder, one a line."""
    file = os.open(into, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _on_operations(lambda kind, path: os.write(file, f"{kind} {path}\n".encode()) if path.startswith(below) else None)


def _on_operations(notice: Callable[[str, str], Any]) -> None:
    busy = False  # what a fault itself does is no operation of the program

    def tell(kind: str, *paths: str) -> None:
        nonlocal busy
        if not busy:
            busy = True
            try:
                notice(kind, " ".join(paths))
            finally:
                busy = False

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if event == "open" and values[2] & _WRITING and not isinstance(values[0], int):
            tell("open", _absolute(values[0]))
        elif event in ("os.mkdir", "os.remove", "os.rmdir"):
            tell(event[3:], _absolute(values[0], values[-1]))
        elif event == "os.rename":
            tell("rename", _absolute(values[0], values[2]), _absolute(values[1], values[3]))
        elif event == "os.truncate":
            tell("truncate", _absolute(values[0]))

    sys.addaudithook(hook)
    fsync = os.fsync

    def told(file: Any) -> None:
        tell("fsync", _absolute(file if isinstance(file, int) else file.fileno()))
        fsync(file)

    os.fsync = told


def _absolute(path: Any, folder: int = -1) -> str:
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    base = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else os.getcwd()
    return os.path.join(base, os.fsdecode(path))


# --- what can happen there ---------------------------------------------------------------------------------------------


def die(path: str) -> None:
    """kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_within_a_file(path: str, num_bytes: int) -> None:
    """Be killed while writing the first file that grows beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def fail(path: str, code: str) -> None:
    """The operation fails with this error of the operating system, by its name."""
    number = getattr(errno, code)
    raise OSError(number, os.strerror(number), path.split(" ")[0])


def limit_files(path: str, num_bytes: int) -> None:
    """From now on no file can grow beyond so many bytes: writing more fails with EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def fill_disk(path: str, ballast: str) -> None:
    """From now on the file system that holds `ballast` is full."""
    file = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    for size in (2**20, 2**12, 1):
        try:
            while True:
                os.write(file, bytes(size))
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
    os.close(file)


def interrupt(path: str, number: int) -> None:
    """Be sent a signal."""
    os.kill(os.getpid(), number)


def lose_power(below: str, pattern: str, count: int, seed: int) -> None:
    """The power goes right before the `count`-th operation that matches: what had not been fsynced is lost.

    Of a file, what was written since its last fsync is cut off at random; a folder's new name is gone if the folder that it is
    in had not been fsynced since. Both are what file systems may do, and some do.
    """
    chance = random.Random(seed)
    synced: dict[str, tuple[int, int]] = {}
    renamed: dict[str, tuple[str, str]] = {}
    seen = 0

    def notice(kind: str, path: str) -> None:
        nonlocal seen
        if not path.startswith(below):
            return
        if re.search(pattern, path):
            seen += 1
            if seen == count:
                lose()
        if kind == "fsync":
            state = os.stat(path)
            synced[path] = (state.st_mtime_ns, state.st_size)
            for new in [new for new in renamed if os.path.dirname(new) == path]:
                del renamed[new]
        elif kind == "rename":
            old, new = path.split(f" {below}", 1)
            new = f"{below}{new}"
            if os.path.isdir(old):
                renamed[new] = (old, new)
                for inner in [inner for inner in synced if inner.startswith(f"{old}/")]:
                    synced[f"{new}{inner[len(old):]}"] = synced.pop(inner)
            elif old in synced:
                synced[new] = synced.pop(old)

    def lose() -> None:
        for old, new in reversed(renamed.values()):
            if os.path.isdir(new) and not os.path.exists(old) and chance.random() < 0.5:
                os.rename(new, old)
                for inner in [inner for inner in synced if inner.startswith(f"{new}/")]:
                    synced[f"{old}{inner[len(new):]}"] = synced.pop(inner)
        for file in sorted(_files(Path(below))):
            state = file.stat()
            if synced.get(str(file)) != (state.st_mtime_ns, state.st_size):
                known = synced.get(str(file), (0, 0))[1]
                os.truncate(file, chance.randint(min(known, state.st_size), state.st_size))
        die("")

    _on_operations(notice)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


# --- moments of training -----------------------------------------------------------------------------------------------


def at_step(step: int, action: str, micro_batch: int = 1, **values: Any) -> None:
    """Do `action` right before a micro-batch of an optimizer step (both from 1) of the training itself."""

    def notice(now: int, micro: int) -> None:
        if (now, micro) == (step, micro_batch):
            globals()[action]("", **values)

    _on_micro_batches(notice)


def wait_at_step(step: int, for_file: str) -> None:
    """Do nothing before that step until a file is there."""

    def notice(now: int, micro: int) -> None:
        while now == step and not os.path.exists(for_file):
            time.sleep(0.01)

    _on_micro_batches(notice)


def fail_to_read(step: int, code: str = "EIO") -> None:
    """From that step on, reads at a place of a file, as streamed layers come, fail with this error of the operating system."""

    def refuse(*_: Any) -> int:
        fail("a block of a file", code)
        raise AssertionError("unreachable")

    def notice(now: int, micro: int) -> None:
        if now >= step:
            os.preadv = refuse

    _on_micro_batches(notice)


def poke_weight(step: int) -> None:
    """Right after the optimizer has taken that step, one number of the adapter is not one any more."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    now = 0

    def notice(number: int, micro: int) -> None:
        nonlocal now
        now = number

    def poke(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if now == step and not _inside("probe.py"):
            with torch.no_grad():
                optimizer.param_groups[0]["params"][-1].view(-1)[7] = float("nan")

    _on_micro_batches(notice)
    register_optimizer_step_post_hook(poke)


def _on_micro_batches(notice: Callable[[int, int], Any]) -> None:
    """Tell the step and the micro-batch, both from 1, before each. A step that is done again is counted on."""
    from transformers import Trainer

    plain, last = Trainer.training_step, (0, 0)

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal last
        if not _inside("probe.py"):
            step = self.state.global_step + 1
            last = (step, last[1] + 1 if last[0] == step else 1)
            notice(*last)
        return plain(self, *args, **kwargs)

    Trainer.training_step = training_step


# --- what goes wrong inside the model ----------------------------------------------------------------------------------


def not_a_number(where: str, step: int, micro_batch: int = 1) -> None:
    """`where` is loss or gradient: of that micro-batch, it is not a number."""
    now = (0, 0)

    def notice(*moment: int) -> None:
        nonlocal now
        now = moment

    def spoil(phase: str, ids: Any, hidden: Any) -> Any:
        if phase != "train" or now != (step, micro_batch):
            return hidden
        if where == "loss":
            return hidden * float("nan")
        hidden.register_hook(lambda gradient: gradient * float("nan"))
        return hidden

    _on_micro_batches(notice)
    _on_forward(spoil)


def run_out_of_memory(
    phase: str, where: str = "forward", step: int = 0, rows: int = 0, tokens: int = 0, times: int = 1_000_000
) -> None:
    """The device is too small.

    Args:
        phase: train, eval or generate, or trial- and one of these; several with blanks between.
        where: forward, or backward.
        step: from this step on (training alone).
        rows: only for batches of more rows than this.
        tokens: only for rows of at least so many tokens.
        times: so often.
    """
    import torch

    phases, now, left = phase.split(), 0, times

    def notice(number: int, micro: int) -> None:
        nonlocal now
        now = number

    def refuse(*_: Any) -> None:
        nonlocal left
        left -= 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 4.00 GiB.")

    def limit(phase: str, ids: Any, hidden: Any) -> Any:
        due = phase in phases and left > 0 and ids.shape[0] > rows and ids.shape[1] >= tokens
        if not due or (phase == "train" and now < step):
            return hidden
        if where == "forward":
            refuse()
        hidden.register_hook(refuse)
        return hidden

    _on_micro_batches(notice)
    _on_forward(limit)


def run_out_of_memory_in_save(times: int = 1) -> None:
    """Serialising the optimizer's state needs memory that is not there."""
    import torch

    plain, left = torch.save, times

    def save(*args: Any, **kwargs: Any) -> None:
        nonlocal left
        if left > 0:
            left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        plain(*args, **kwargs)

    torch.save = save


def _on_forward(change: Callable[[str, Any, Any], Any]) -> None:
    """Let `change(phase, input ids, hidden states)` give the hidden states of every forward pass."""
    from transformers.models.llama.modeling_llama import LlamaModel

    plain = LlamaModel.forward

    def forward(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, input_ids, *args, **kwargs)
        if input_ids is None or input_ids.device.type == "meta":  # the plan's simulation is no run
            return found
        phase = "generate" if _inside("generation.py") else "train" if self.training else "eval"
        if _inside("probe.py"):
            phase = f"trial-{phase}"
        found.last_hidden_state = change(phase, input_ids, found.last_hidden_state)
        return found

    LlamaModel.forward = forward


# --- other --------------------------------------------------------------------------------------------------------------


def pretend_versions(versions: dict[str, str]) -> None:
    """Other versions of libraries than those that are there."""
    from qlora.training import setup

    plain = setup.library_versions

    def library_versions() -> dict[str, str]:
        return {**plain(), **versions}

    for module in [module for name, module in sys.modules.items() if name.startswith("qlora.training")]:
        if getattr(module, "library_versions", None) is plain:
            module.library_versions = library_versions


def draw_nothing() -> None:
    """Plots are empty files: drawing them takes a third of a small run, and other tests look at them."""
    from matplotlib.figure import Figure

    def savefig(self: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        Path(path).write_bytes(b"")

    Figure.savefig = savefig


def note_trainer(into: str) -> None:
    """Write what the trainer was made with, as JSON, when training begins."""
    from transformers import Trainer

    plain = Trainer.train

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _inside("probe.py"):
            Path(into).write_text(self.args.to_json_string(), encoding="utf-8")
        return plain(self, *args, **kwargs)

    Trainer.train = train


def _inside(name: str) -> bool:
    """Whether a function of this file of the program is under way."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(f"{os.sep}{name}") and "qlora" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
