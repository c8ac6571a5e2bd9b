"""What tests share: the folder of real test material where it is there, and a cache of the embedded base."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loopback_hub import LoopbackHub

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two workers share the cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plans and receipts of tests are none of the user's; the embedded base, which takes long to build, is shared."""
    from qlora.home import cache_home

    base = tmp_path_factory.getbasetemp()
    # Workers share one, so that what takes long is made once.
    users, own = cache_home(), (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    own.mkdir(exist_ok=True)
    for folder in users.glob("builtin-tiny-*"):
        with contextlib.suppress(FileExistsError):
            (own / folder.name).symlink_to(folder)
    before = os.environ.get("QLORA_CACHE")
    os.environ["QLORA_CACHE"] = str(own)
    yield
    os.environ.pop("QLORA_CACHE") if before is None else os.environ.update(QLORA_CACHE=before)
    for folder in own.glob("builtin-tiny-*"):
        if folder.is_dir() and not folder.is_symlink() and not (users / folder.name).exists():
            users.mkdir(parents=True, exist_ok=True)
            shutil.copytree(folder, users / folder.name, dirs_exist_ok=True)


@pytest.fixture(autouse=True)
def nothing_found_out(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in one test takes nothing over from that in another: each has its own trial and its own look at the bare base."""
    from qlora import home

    folder = tmp_path_factory.getbasetemp() / "starts" / uuid.uuid4().hex
    monkeypatch.setattr(home, "starts_home", lambda: folder)


# Files that take longest, first, so that no worker is left with one at the end.
_LONGEST = (
    "test_faults.py", "test_exactness.py", "test_quickstart.py", "test_training.py", "test_t4.py", "test_budgets.py",
    "test_cpu_truth.py", "test_simulator.py", "test_engine.py", "test_hub_faults.py", "test_hub_push.py", "test_use.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of files, not that of the tests in one."""
    items.sort(key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On several, torch shares products among them in ways that may change bits from one call to the next."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data sets and a real 260K-parameter model, kept beside the checkout; not shipped with the project."""
    folder = Path(os.environ.get("QLORA_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no folder of shared test material at {folder}")
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained two-layer Llama and a byte-level tokenizer: everything a real model folder has."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("small-model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        ["the cat sat on the mat and the dog ran to the red house"] * 20,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=2, pad_token_id=0, bos_token_id=None,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Forty conversations of different lengths."""
    import json

    path = tmp_path / "rows.jsonl"
    words = "the cat sat on the mat and the dog ran to the red house".split()
    lines = []
    for i in range(40):
        answer = " ".join(words[(i * 3 + j) % len(words)] for j in range(1 + i % 7))
        lines.append({"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": answer}]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def hub() -> Iterator["LoopbackHub"]:
    """A Hub on the loopback interface; see loopback_hub/server.py. Its own mistakes fail the test."""
    from loopback_hub import LoopbackHub

    with LoopbackHub() as running:
        yield running
    assert not running.mistakes
