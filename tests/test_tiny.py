"""The embedded base: built once, deterministically, never half; and the quickstart that teaches it something."""

import random
import subprocess
import sys
import threading

import pytest

from qlora.model import tiny_text
from qlora.model.tiny import TinySettings, tiny_folder

SHORT = TinySettings(num_steps=3, rows_per_step=4)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_two_builds_give_the_same_bytes(tmp_path, monkeypatch):
    files = []
    for name in ("one", "two"):
        monkeypatch.setenv("QLORA_CACHE", str(tmp_path / name))
        folder = tiny_folder(settings=SHORT)
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert files[0] == files[1] and "model.safetensors" in files[0]


def test_the_second_call_builds_nothing(cache):
    folder = tiny_folder(settings=SHORT)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny_folder(settings=SHORT) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_finding_a_built_base_needs_no_torch():
    script = ("import sys; from qlora.home import cache_home\n"
              "from qlora.model.tiny import tiny_folder, TinySettings, _digest\n"
              "s = TinySettings(); f = cache_home() / f'builtin-tiny-{_digest(s)}'; f.mkdir(parents=True)\n"
              "[(f / n).write_text('') for n in ('config.json', 'model.safetensors', 'tokenizer.json')]; tiny_folder(); print('torch' in sys.modules)")
    import tempfile

    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={"QLORA_CACHE": empty})
    assert done.stdout.strip() == "False", done.stderr


def test_a_build_that_was_killed_is_done_again(cache, monkeypatch):
    from qlora.model import tiny

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tiny, "_pretrain", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny_folder(settings=SHORT)
    assert not list(cache.glob("builtin-tiny-*/config.json"))
    (cache / f"builtin-tiny-{tiny._digest(SHORT)}.part").mkdir()  # what a build that died later leaves
    assert (tiny_folder(settings=SHORT) / "model.safetensors").is_file()


def test_a_base_that_lost_a_file_is_made_again(cache):
    folder = tiny_folder(settings=SHORT)
    (folder / "model.safetensors").unlink()
    assert (tiny_folder(settings=SHORT) / "model.safetensors").is_file()


def test_two_at_once_build_once(cache, monkeypatch):
    from qlora.model import tiny

    built, plain = [], tiny._build
    monkeypatch.setattr(tiny, "_build", lambda *arguments: (built.append(1), plain(*arguments)))
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(tiny_folder(settings=SHORT))) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(built) == 1 and len(set(folders)) == 1


def test_a_changed_setting_gives_another_folder(cache):
    assert tiny_folder(settings=SHORT) != tiny_folder(settings=TinySettings(num_steps=3, rows_per_step=4, seed=1))


def test_the_tokenizer_is_a_real_one(cache):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_folder(settings=SHORT)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("The lamp came broken.", '{"a": [1, 2]}', "안녕하세요", "naïve 🙂", "\ttab\n"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids, clean_up_tokenization_spaces=False) == text
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert 2e6 <= model.num_parameters() <= 5e6
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_base_never_reads_the_form_that_the_quickstart_teaches():
    rng = random.Random(0)
    texts = [tiny_text.document(rng, ["a", "b"]) for _ in range(3000)]
    assert not [text for text in texts if "; mood:" in text or "; urgent:" in text]


def test_the_shipped_rows_are_those_that_the_script_writes(root, tmp_path, monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_quickstart_data", root / "scripts" / "make_quickstart_data.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "recipes" / "data").mkdir(parents=True)
    monkeypatch.setattr(script, "__file__", str(tmp_path / "scripts" / "make_quickstart_data.py"))
    script.main()
    assert (tmp_path / "recipes/data/quickstart.jsonl").read_bytes() == (root / "recipes/data/quickstart.jsonl").read_bytes()
