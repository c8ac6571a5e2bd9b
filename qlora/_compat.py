"""Every upstream quirk that the project works around, with the reason and what lets it go. Nothing here changes another
library's code: these are settings and corrections of our own objects.
"""

from __future__ import annotations

import ctypes
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any

from qlora.hardware.driver import on_windows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def prepare_environment() -> None:
    """Settings that count only before the libraries are imported; a value that the user has set stays.

    - GOMP_SPINCOUNT: threads that wait for work spin for a fraction of a millisecond, which is longer than it is from one operator
      of a training step to the next, and sleep then. Ones that sleep at once (OMP_WAIT_POLICY=PASSIVE) have to be woken for
      each operator; ones that spin for as long as libgomp lets them by itself spin against other programs, and against
      bitsandbytes' pool where that is not torch's. `OMP_WAIT_POLICY=PASSIVE scripts/compare --only qlora` shows the difference.
    - TOKENIZERS_PARALLELISM: silences the warning about forks; rows are tokenised before any worker starts.
    - PYTORCH_ALLOC_CONF: segments that grow, so that little of a small card is lost between blocks; torch has them off. Not on
      Windows and WSL, where they are missing or slow. The plan simulates what is set here (`expandable_segments`).
    - THP_MEM_ALLOC_ENABLE: on Linux torch (2.11 to 2.13) then asks for large pages for tensors in RAM, not by itself.
      4-bit weights are dequantised into new memory each time, and two thirds of that was the handing out of small pages: 66 ms
      of a CPU's time became 20 ms for 4096 x 14336 numbers (AMD EPYC), beside a product that takes 280 ms for 512 tokens.
    - DISABLE_SAFETENSORS_CONVERSION: transformers (5.17 to 5.23) asks a Space of the Hub to convert a model that has only pickled
      weights, from a thread of its own; such a model is refused, and nobody asked for the request.
    - HF_HUB_DISABLE_TELEMETRY: TRL (1.14 to 1.16, trainer/base_trainer.py) tells the Hub of every trainer that is made, often in a run.
      Nothing leaves this machine that nobody asked for.
    - CUDA_VISIBLE_DEVICES: one card, the fastest or the first that the user names. transformers' trainer takes every card
      it sees, and TRL (1.14 to 1.16, `SFTTrainer.__init__`) refuses to run on several from one process.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if not on_windows() and _allocator_settings() is None:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def give_back_freed_memory() -> None:
    """Return what malloc keeps of freed memory to the system, where it is glibc's: small tensors that come and go leave holes
    (0.17 GiB of 1.07 after two steps of four layers of an 8B, torch 2.13 and glibc 2.36).
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)


def expandable_segments(*, windows: bool) -> bool:
    """Whether torch's allocator has segments that grow in a run on a machine of this kind."""
    wanted = _allocator_settings()
    return not windows and (wanted is None or "expandable_segments:true" in wanted.lower().replace(" ", ""))


def _allocator_settings() -> str | None:
    """What the user, or `prepare_environment`, has set for torch's allocator; the second name is the older one."""
    return os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")


def use_plain_cpu_kernels(model: PreTrainedModel) -> None:
    """Keep 4-bit layers on the dequantise-and-multiply path in evaluation on CPUs.

    On processors with AVX512-BF16, bitsandbytes 0.50 repacks a layer's weight at its first forward in evaluation mode
    and asserts out_features % 32 == 0, which real models break. The plain path is also the one that training takes, so
    losses of the two agree. Goes when the repacked kernel takes any shape (bitsandbytes, nn/modules.py, Linear4bit).
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def set_start_values(model: PreTrainedModel, is_left: Callable[[torch.Tensor], bool]) -> None:
    """Give parameters and buffers the values that the model's class starts with, but for those that `is_left` is true of.

    transformers (5.17 to 5.23) decides by a mark on each tensor, which its own loader sets on those it has read; so tables of
    positions and the like come out as they do there. Goes when there is a public way to say which tensors have their values.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = is_left(tensor)
    model.initialize_weights()


def checkpoint_names(
    model: PreTrainedModel, keys: Iterable[str], key_mapping: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """The model's own name of each tensor of a checkpoint, and the tensors that must be split, merged or turned for it.

    These are the functions by which transformers' loader renames (5.17 to 5.23, core_model_loading.py); PEFT uses them too.
    Goes when the loader can be asked for the names alone.

    Args:
        keys: names in the checkpoint.
        key_mapping: patterns and replacements that come before those that transformers has for the model's family.
    """
    from transformers import conversion_mapping, core_model_loading

    conversions = conversion_mapping.get_model_conversion_mapping(model, dict(key_mapping))
    renamings = [entry for entry in conversions if isinstance(entry, core_model_loading.WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, core_model_loading.WeightConverter)]
    # Not state_dict(), which a 4-bit weight on meta cannot give.
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    names, converted = {}, []
    for key in keys:
        prefix, known = model.base_model_prefix, state
        name, pattern = core_model_loading.rename_source_key(key, renamings, converters, prefix, known)
        if name not in state and key in state:  # as the loader has it: a name that is right already
            name, pattern = core_model_loading.rename_source_key(key, [], [], prefix, known)
        names[key] = name
        if pattern is not None:
            converted.append(key)
    return names, converted


def restore_adapter_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Undo SFTTrainer's cast of a quantised model's trainable weights to bf16, whatever precision was asked for.

    Cards without bf16 need fp32 adapters (see `qlora.precision`). TRL 1.14 to 1.16, `SFTTrainer.__init__`; goes when the
    constructor looks at `args.bf16` (https://github.com/huggingface/peft/issues/2889 is the cause that TRL names).
    Must run before the optimizer is made. Values lose nothing that matters: B is zero, and A is random.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def limit_requests(seconds: float, *, before: Callable[[], None], after: Callable[[Any], None]) -> None:
    """Give every request of the Hub's client a time-out, and have one function called before each, and one with each answer.

    huggingface_hub (1.31 to 2.4, utils/_http.py, `default_client_factory`) makes its HTTP client without any: an upload to a
    server that takes the connection and never answers hangs for ever. Goes when uploads have a time-out of their own. Whoever has
    set a client factory whose clients have time-outs keeps those.
    """
    from huggingface_hub import get_session, set_client_factory

    def ask(request: Any) -> None:
        before()
        if (request.extensions.get("timeout") or {}).get("read") is None:  # some calls, as model_info, ask for none expressly
            request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), seconds)

    def heard(response: Any) -> None:
        after(response)

    session = get_session()
    for name, hook in (("request", ask), ("response", heard)):
        hook.of_qlora = True
        kept = [each for each in session.event_hooks[name] if not hasattr(each, "of_qlora")]
        session.event_hooks = {**session.event_hooks, name: [*kept, hook]}
    if session.timeout.read is None or hasattr(session, "of_qlora"):
        kind, hooks = type(session), session.event_hooks

        def factory() -> Any:  # the client makes a new session after a failed connection
            made = kind(event_hooks=hooks, follow_redirects=True, timeout=seconds)
            made.of_qlora = True
            return made

        set_client_factory(factory)


def transport_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library beneath the Hub's client raises when a connection fails: httpx for huggingface_hub 1, httpx2 for 2.
    The client lets these through as they are.
    """
    library = _http_library()
    return (library.TimeoutException, library.NetworkError, library.RemoteProtocolError)


def request_errors() -> tuple[type[Exception], ...]:
    """All that it raises, connections that fail included: an address that is none, too many redirects, refusals of the server."""
    library = _http_library()
    return (library.HTTPError, library.InvalidURL)


def _http_library() -> Any:
    import importlib

    from huggingface_hub import get_session

    return importlib.import_module(type(get_session()).__module__.partition(".")[0])


def quieten_libraries() -> None:
    """Leave the terminal to our own lines: libraries' progress bars, advice and notices are off unless --debug is given.

    Errors still come through, as exceptions.
    """
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for name in ("bitsandbytes", "accelerate", "peft", "trl", "huggingface_hub", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def silence_profiler() -> None:
    """Two lines that torch's profiler writes to stderr at each start and stop ("USDT: ... profiler_start", seen with torch 2.13).
    Goes when they are no longer above its own level for errors.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def hide_loading_bars() -> None:
    """The weight loader's own bar, which would be drawn into ours. Downloads keep theirs."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def without_gguf_bar() -> Iterator[None]:
    """Keep off the screen what the GGUF loader draws there: it asks tqdm itself, not transformers' logging (5.17 to 5.23,
    modeling_gguf_pytorch_utils.py: load_gguf_checkpoint). Goes when `hide_loading_bars` reaches it."""
    with redirect_stderr(io.StringIO()):
        yield


@contextmanager
def pretend_device(
    functions: Mapping[str, Callable[..., Any]], *, triton: bool, autocast: torch.dtype | None = None
) -> Iterator[None]:
    """Make library code that runs on meta tensors choose what it would choose on the device that is simulated.

    Undone on leaving; nothing is computed inside, so nothing can come out wrong. Four choices look at the device and not
    at the operator, so a recorder of operators does not reach them:

    - `functions` stand in for those of torch.nn.functional that pick a kernel: scaled_dot_product_attention on meta takes
      the composed form, which stores all scores. Goes when torch can be asked which kernel a device would take.
    - torch.is_autocast_enabled and get_autocast_dtype: raise for meta (torch 2.13, "unknown device type for autocast"); TRL
      and PEFT ask them. `autocast` is the answer; None is no.
    - torch.optim.AdamW: its fused kernel runs on meta, but the optimizer refuses devices that have none.
    - TRL's fused output head (trl.kernels.chunked_logprob, 1.15 and later) runs Triton kernels on CUDA and torch
      operators elsewhere, which take several tiles more. The kernels take nothing and write in place.
    """
    import importlib
    from importlib.util import find_spec

    import torch
    import torch.nn.functional as F
    import torch.optim.adam as adam

    def autocast_enabled(device_type: str | None = None) -> bool:
        return autocast is not None

    def autocast_dtype(device_type: str) -> torch.dtype:
        return autocast or torch.float16  # asked of even where it is off

    replaced: list[tuple[Any, str, Any]] = [(F, name, value) for name, value in functions.items()]
    replaced += [(torch, "is_autocast_enabled", autocast_enabled), (torch, "get_autocast_dtype", autocast_dtype)]

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    replaced.append((adam, "_device_dtype_check_for_fused", nothing))
    if triton:
        chosen = {"trainer.utils": {"_use_triton": lambda device: True},
                  "kernels.chunked_logprob": dict.fromkeys(("_forward_tile", "_backward_tile", "_addmm_fp32"), nothing)}
        for place, values in chosen.items():
            home = importlib.import_module(f"trl.{place}") if find_spec(f"trl.{place}") else None  # TRL 1.14 has neither
            replaced += [(home, name, value) for name, value in values.items() if hasattr(home, name)]
    before = [(home, name, getattr(home, name)) for home, name, _ in replaced]
    try:
        for home, name, value in replaced:
            setattr(home, name, value)
        yield
    finally:
        for home, name, value in before:
            setattr(home, name, value)

