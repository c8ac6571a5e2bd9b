"""Nothing that others hand over runs code or leads outside its folder, and no secret is written down."""

import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from qlora.architecture import find_config
from qlora.cli import main
from qlora.errors import ModelError, RecipeError
from qlora.hardware import find_device
from qlora.model.build import build_base, load_tokenizer
from qlora.model.safe_files import refuse_unsafe_files
from qlora.planning.plan import Plan
from qlora.precision import choose_precision
from qlora.progress import Progress
from qlora.recipe import build_recipe, load_recipe
from qlora.redact import redact, redact_values
from qlora.results.frozen import frozen_recipe
from qlora.results.report import reproduce_command
from qlora.training.run_folder import find_run
from qlora.training.setup import check, prepare

# In the form of real ones, and belonging to nobody. The long middle is what must never be seen, however it is escaped.
HUB_BODY, OTHER_BODY = "AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh", "0123456789abcdef0123456789abcdef01234567"
HUB_TOKEN = f"hf_{HUB_BODY}"


class Noting(Progress):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@pytest.fixture
def bomb(tmp_path):
    """An object whose pickle writes a file when it is loaded, and that file."""
    mark = tmp_path / "code-has-run"

    class Bomb:
        def __reduce__(self):
            return open, (str(mark), "w")

    return Bomb(), mark


@pytest.fixture
def copy_of_model(small_model, tmp_path):
    """A base of one's own to spoil."""
    return shutil.copytree(small_model, tmp_path / "base")


def recipe_for(base, rows_file, **settings):
    return build_recipe(model={"base": str(base), **settings}, data=str(rows_file), memory={"device": "cpu"},
                        train={"max_steps": 2, "batch": 8, "sample_rows": 2})


# --- secrets in text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"401 for token {HUB_TOKEN}.", "401 for token ***."),
        (f"api_org_{HUB_BODY}", "***"),
        ("hf_oauth_eyJhbGciOi.eyJzdWIiOi-x.sig_nature", "***"),
        ("https://me:p@ssword@example.org/rows?x=1", "https://***@example.org/rows?x=1"),
        (f"https://{HUB_TOKEN}@huggingface.co/me/it", "https://***@huggingface.co/me/it"),
        ("https://cdn/x?a=1&X-Amz-Signature=00ff&b=2", "https://cdn/x?a=1&X-Amz-Signature=***&b=2"),
        ("{'authorization': 'Bearer abc.def'}", "{'authorization': '***'}"),
        ("Authorization: Basic bWU6aXQ= sent", "Authorization: *** sent"),
        ("sent Bearer abcdefghijklmnop", "sent Bearer ***"),
    ],
)
def test_secrets_are_taken_out(text, shown):
    assert redact(text) == shown
    assert redact(shown) == shown  # what has been through once may go through again


@pytest.mark.parametrize("text", [
    "me/hf_transformers is not on this machine", "hf_hub_download failed", "hf://datasets/me/rows@main/train.jsonl",
    "https://huggingface.co/me/it/resolve/main/model.safetensors", "mail me@example.org", "train.learning_rate=0.0002",
    "the bearer of this", "2,048 tokens at most, api_org_ and hf_", "C:\\models\\it", "",
])
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


@pytest.mark.parametrize("name", [
    "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "GITHUB_TOKEN_2", "my_secret", "X_APIKEY",
])
def test_values_of_secret_variables_are_taken_out(name, monkeypatch):
    monkeypatch.setenv(name, "p w/d+16=long")
    assert redact("it is p w/d+16=long, or p%20w%2Fd%2B16%3Dlong in a URL") == "it is ***, or *** in a URL"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "a long value"), ("HF_TOKEN_PATH", "/home/me/token"), ("MAX_TOKENS", "123456789"),
        ("HF_TOKEN", "short"),
    ],
)
def test_values_of_other_variables_stay(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert redact(f"found {value} here") == f"found {value} here"


def test_no_piece_is_left_of_a_secret_within_a_secret(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "inner-secret")
    monkeypatch.setenv("B_TOKEN", "outer-inner-secret-outer")
    assert redact("outer-inner-secret-outer and inner-secret") == "*** and ***"


def test_documents_keep_their_shape(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", OTHER_BODY)
    document = {"steps": 3, "lines": ["x", ("y", f"key {OTHER_BODY}")], "none": None, "on": True}
    assert redact_values(document) == {"steps": 3, "lines": ["x", ["y", "key ***"]], "none": None, "on": True}


# --- secrets in a real run ---------------------------------------------------------------------------------------------


@pytest.fixture
def secrets(monkeypatch):
    """What this process and its children have in their environment."""
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", OTHER_BODY)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def assert_no_secret(*texts):
    for text in texts:
        assert HUB_BODY not in text and OTHER_BODY not in text


@pytest.fixture
def leaking_recipe(tmp_path, small_model, rows_file):
    """A recipe whose rows hold the tokens, as rows made from logs do; a report shows some of its rows."""
    text = rows_file.read_text(encoding="utf-8")
    rows_file.write_text(text.replace("say ", f"log in with {HUB_TOKEN} or {OTHER_BODY} and say "), encoding="utf-8")
    path = tmp_path / "leaky.yaml"
    path.write_text(f"model: {small_model}\ndata: {rows_file}\nmemory: {{device: cpu}}\noutput: {tmp_path / 'out'}\n"
                    "train: {max_steps: 1, batch: 8, sample_rows: 2}\n")
    return path


def test_a_run_writes_no_secret_down(leaking_recipe, tmp_path, secrets):
    """A real process, with all the libraries' own messages on."""
    done = subprocess.run([sys.executable, "-m", "qlora", "train", leaking_recipe, "--debug"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_no_secret(done.stdout, done.stderr)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"report.md", "report.json", "resolved.json", "metrics.jsonl"} <= {path.name for path in files}
    for path in files:
        assert_no_secret(path.read_bytes().decode("latin-1"))
    assert "log in with" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")  # or there was nothing to hide


@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["plain", "debug"])
def test_an_error_shows_no_secret(leaking_recipe, secrets, capsys, debug):
    words = ["train", str(leaking_recipe), *debug, f"model=https://me:p-{OTHER_BODY}@example.org/{HUB_TOKEN}"]
    assert main(words) == 2
    shown = capsys.readouterr()
    assert_no_secret(shown.out, shown.err)
    assert "https://***@example.org/***" in shown.err
    assert ("Traceback" in shown.err) == bool(debug)


def test_a_fault_of_ours_shows_no_secret(leaking_recipe, monkeypatch, capsys):
    import qlora.recipe

    def fail(*_):
        raise AssertionError(f"sent {HUB_TOKEN}")

    monkeypatch.setattr(qlora.recipe, "load_recipe", fail)
    assert main(["train", str(leaking_recipe)]) == 1
    shown = capsys.readouterr().err
    assert "AssertionError: sent ***" in shown
    assert_no_secret(shown)


def test_commands_are_written_down_without_secrets(tmp_path):
    words = ("mine.yaml", f"model.revision={HUB_TOKEN}")
    assert reproduce_command(words[0], words[1:]) == "qlora train mine.yaml model.revision=***"
    plan = Plan(model="me/it", device="card", kind="cuda", budget_bytes=2, fits=True, phases={"train": 1}, parts={"base": 1},
                reserved_bytes=1, host_peak_bytes=1, disk_bytes=1, decisions={}, num_steps=None)
    text = frozen_recipe(plan, tmp_path / "mine.yaml", command=f"qlora plan {' '.join(words)}")
    assert "qlora plan mine.yaml model.revision=***" in text
    assert_no_secret(text)


# --- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [
    "!!python/object/apply:os.system ['touch {mark}']", "!!python/name:os.system", "!!python/module:os", "!include {mark}",
    "!!python/object/new:subprocess.Popen [['touch', '{mark}']]",
])
def test_tags_in_a_recipe_build_nothing(tmp_path, value):
    mark = tmp_path / "code-has-run"
    path = tmp_path / "evil.yaml"
    path.write_text(f"model: {value.format(mark=mark)}\ndata: rows.jsonl\n")
    with pytest.raises(RecipeError, match="evil.yaml:1: not valid YAML"):
        load_recipe(path)
    assert not mark.exists()
    with pytest.raises(RecipeError):
        build_recipe(overrides=[f"lora.r={value.format(mark=mark)}"], model="builtin:tiny", data="rows.jsonl")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../../out", "a/b", "..", ".", "", "/etc/x", "..\\out", "C:\\x", "a\0b", "..yaml", "~"])
def test_no_name_of_a_recipe_leads_out_of_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = find_run(build_recipe(name, model="builtin:tiny", data="rows.jsonl"))
    assert not found.unfinished
    assert found.path.resolve().parent == (tmp_path / "runs").resolve()
    assert re.fullmatch(r"[^/\\\0:]+", found.path.name) and found.path.name not in (".", "..")


# --- code that comes with a model --------------------------------------------------------------------------------------


@pytest.fixture
def with_code(copy_of_model, tmp_path):
    """A model whose config is a class of its own, and the file that shows that it was run."""
    mark = tmp_path / "code-has-run"
    config = json.loads((copy_of_model / "config.json").read_text())
    (copy_of_model / "config.json").write_text(json.dumps(
        {**config, "model_type": "own", "auto_map": {"AutoConfig": "own_config.OwnConfig"}}
    ))
    (copy_of_model / "own_config.py").write_text(
        f"from transformers import LlamaConfig\nopen({str(mark)!r}, 'w').close()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    return copy_of_model, mark


def test_code_of_a_model_is_not_run_unasked(with_code, rows_file):
    base, mark = with_code
    notes = Noting()
    with pytest.raises(ModelError, match="not run unasked.*\n.*trust_remote_code"):
        prepare(recipe_for(base, rows_file), notes)
    assert not mark.exists() and not any("trust_remote_code" in line for line in notes.lines)


def test_code_that_is_trusted_is_announced_before_it_runs(with_code, rows_file, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base, mark = with_code
    seen = []

    class Watching(Progress):
        def note(self, text):
            if "trust_remote_code" in text:
                seen.append((text, mark.exists()))

    with pytest.raises(ModelError):  # it brings no model class, which is found out after its config class
        prepare(recipe_for(base, rows_file, trust_remote_code=True), Watching())
    assert mark.exists()
    [(text, had_run)] = seen
    assert str(base) in text and not had_run


def test_nothing_is_announced_where_no_model_is_loaded(small_model, rows_file):
    notes = Noting()
    check(recipe_for(small_model, rows_file, trust_remote_code=True), notes, data_only=True)
    assert not any("trust_remote_code" in line for line in notes.lines)


# --- weights -----------------------------------------------------------------------------------------------------------


def load_base(folder):
    """The 4-bit base, as a run builds it."""
    device = find_device("cpu")
    return build_base(str(folder), find_config(str(folder)), device=device, precision=choose_precision("auto", device))


@pytest.fixture
def pickled_model(copy_of_model):
    """The same weights as pickle."""
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(copy_of_model / "model.safetensors"), copy_of_model / "pytorch_model.bin")
    (copy_of_model / "model.safetensors").unlink()
    return copy_of_model


def test_pickled_weights_are_refused_with_a_command_that_converts_them(
    pickled_model, small_model, rows_file, tmp_path, monkeypatch
):
    with pytest.raises(ModelError, match=r"as pickle \(pytorch_model.bin\)") as caught:
        prepare(recipe_for(pickled_model, rows_file))
    [command] = [line.strip() for line in caught.value.fix.splitlines() if line.startswith("  ")]
    words = shlex.split(command)
    assert words[:2] == ["python", "-c"] and len(words) == 3
    monkeypatch.chdir(tmp_path)
    exec(words[2], {})
    assert caught.value.fix.endswith("set model.base to the folder base-safetensors.")
    refuse_unsafe_files("base-safetensors")
    assert load_tokenizer("base-safetensors").chat_template
    assert load_base("base-safetensors").num_parameters() == load_base(small_model).num_parameters()


def test_what_a_trainer_left_is_not_taken_for_weights(copy_of_model):
    (copy_of_model / "training_args.bin").write_bytes(b"")
    refuse_unsafe_files(str(copy_of_model))
    (copy_of_model / "model.safetensors").unlink()
    refuse_unsafe_files(str(copy_of_model))  # no weights at all: enough for a plan


@pytest.mark.parametrize("shard", [
    "pytorch_model-00001-of-00001.bin", "../base/model.safetensors", "/etc/model.safetensors", "sub/model.safetensors",
    "..\\model.safetensors", "C:model.safetensors", "model.safetensors\n.bin", 7, None,
])
def test_an_index_names_only_safetensors_files_beside_it(copy_of_model, rows_file, shard):
    (copy_of_model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": shard}}
    (copy_of_model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="index.json names .*only safetensors files in the model's own folder"):
        prepare(recipe_for(copy_of_model, rows_file))


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', '{"weight_map": ', "[" * 100_000])
def test_an_index_that_is_none_is_refused(copy_of_model, rows_file, text):
    (copy_of_model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="cannot be read as a list of weights"):
        prepare(recipe_for(copy_of_model, rows_file))


def test_an_honest_index_is_loaded(small_model, tmp_path):
    from transformers import AutoModelForCausalLM

    base = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(small_model).save_pretrained(base, max_shard_size="100KB")
    assert (base / "model.safetensors.index.json").is_file()
    load_base(base)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "adapter_model.bin", "weights.pt"])
def test_a_config_names_no_other_weights(copy_of_model, rows_file, name):
    config = json.loads((copy_of_model / "config.json").read_text())
    (copy_of_model / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    with pytest.raises(ModelError, match="config.json names"):
        prepare(recipe_for(copy_of_model, rows_file))


def test_a_pickle_under_another_name_does_not_run(copy_of_model, bomb):
    """The name says safetensors; the content decides nothing but that it is none."""
    item, mark = bomb
    (copy_of_model / "model.safetensors").write_bytes(pickle.dumps(item))
    with pytest.raises(ModelError, match="cannot be loaded: .*header"):
        load_base(copy_of_model)
    assert not mark.exists()
    pickle.loads((copy_of_model / "model.safetensors").read_bytes())
    assert mark.exists()  # it would have


def test_an_adapter_beside_the_weights_is_refused(copy_of_model, rows_file, tmp_path):
    """transformers puts it onto the base without a word, and PEFT imports the module that `auto_mapping` names."""
    mark = tmp_path / "code-has-run"
    (tmp_path / "evil_module.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    (copy_of_model / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "base_model_name_or_path": "../../elsewhere",
        "auto_mapping": {"base_model_class": "x", "parent_library": "evil_module"},
    }))
    with pytest.raises(ModelError, match="holds an adapter"):
        prepare(recipe_for(copy_of_model, rows_file))
    (copy_of_model / "config.json").unlink()
    with pytest.raises(ModelError, match="holds an adapter, not a base"):
        prepare(recipe_for(copy_of_model, rows_file))
    assert not mark.exists()


@pytest.fixture
def hub_cache(tmp_path, small_model, monkeypatch):
    """A function that puts a model into the Hub's cache as its client does; `missing` is what the Hub said not to have."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "a" * 40

    def put(files, missing=()):
        repo = tmp_path / "models--me--it"
        for folder in ("refs", f"snapshots/{commit}", f".no_exist/{commit}"):
            (repo / folder).mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(small_model / name, repo / "snapshots" / commit / name)
        for name, text in files.items():
            (repo / "snapshots" / commit / name).write_text(text)
        for name in missing:
            (repo / ".no_exist" / commit / name).touch()
        return "me/it"

    return put


@pytest.mark.parametrize(
    ("files", "missing", "problem"),
    [
        ({"adapter_config.json": '{"base_model_name_or_path": "me/other"}'}, (), "me/it holds an adapter"),
        ({"model.safetensors.index.json": '{"weight_map": {"x": "../x.safetensors"}}'}, (), "names '../x.safetensors'; only"),
        ({"model.safetensors.index.json": '{"weight_map": {"x": "x.bin"}}'}, ("adapter_config.json",), "names 'x.bin'; only"),
        ({}, ("adapter_config.json", "model.safetensors", "model.safetensors.index.json"), "me/it holds its weights as pickle"),
    ],
)
def test_a_model_on_the_hub_is_held_to_the_same(hub_cache, files, missing, problem):
    with pytest.raises(ModelError) as caught:
        load_base(hub_cache(files, missing))
    assert problem in caught.value.problem
    if "pickle" in problem:
        assert '"me/it", "it-safetensors"' in caught.value.fix
