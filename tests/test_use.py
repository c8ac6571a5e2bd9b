"""What is done with an adapter that is there: loaded on its base, talked to, measured; from a folder and from a Hub."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from fake_terminal import conversation

from qlora.adapted import load_adapted
from qlora.comparing import compare
from qlora.errors import ModelError
from qlora.hub.fetch import find_adapter
from qlora.recipe import build_recipe

ID = "tester/adapter"
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = "the cat sat on the mat and the dog ran to the red house".split()
    lines = [
        {"messages": [{"role": "user", "content": f"say {i}"},
                      {"role": "assistant", "content": " ".join(words[(i * 3 + j) % len(words)] for j in range(1 + i % 7))}]}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def runs(small_model, rows, tmp_path_factory):
    """A function that trains a short run of a type of numbers, once."""
    from qlora.training.run import train

    made = {}

    def run(dtype="bf16"):
        if dtype not in made:
            made[dtype] = train(build_recipe(
                model={"base": str(small_model), "dtype": dtype}, data={"path": str(rows), "validation": 0.2},
                train={"max_steps": 10, "batch": 8, "learning_rate": 1e-2, "sample_rows": 5}, memory={"device": "cpu"},
                output=str(tmp_path_factory.mktemp("runs") / dtype),
            ))
        return made[dtype]

    return run


@pytest.fixture(scope="module")
def adapted(runs):
    """The adapter of the run, loaded once for all that only look."""
    return load_adapted(find_adapter(str(runs().folder)))


@pytest.fixture
def pushed(hub, runs, small_model):
    """The files of the run as a push leaves them, its base named as a folder of another machine."""
    folder = runs().folder
    files = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}
    config = {**json.loads(files["adapter_config.json"]), "base_model_name_or_path": "/home/somebody/small-model"}
    files["adapter_config.json"] = json.dumps(config).encode()
    hub.add_repo(ID, files, private=True)
    return hub


def qlora(hub, home, *words, typed=None, token="read"):
    done = subprocess.run([sys.executable, "-m", "qlora", *map(str, words)], input=typed, capture_output=True, text=True,
                          timeout=120, env=hub.environment(home, token))
    return done.returncode, done.stdout, done.stderr


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# --- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_logits_are_those_of_plain_peft(runs, small_model, dtype):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qlora import _compat

    compute = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    base = AutoModelForCausalLM.from_pretrained(
        small_model, quantization_config=quantisation, dtype=compute, device_map={"": "cpu"}
    )
    _compat.use_plain_cpu_kernels(base)
    bare = logits(base)
    theirs = PeftModel.from_pretrained(base, runs(dtype).adapter, autocast_adapter_dtype=False).eval()
    ours = load_adapted(find_adapter(str(runs(dtype).folder)))
    assert ours.precision.compute == dtype  # as the run was given, not as this machine would choose
    assert torch.equal(logits(ours.model), logits(theirs))
    with ours.without_adapter():
        assert torch.equal(logits(ours.model), bare)
    assert not torch.equal(bare, logits(ours.model))


def test_logits_from_the_hub_are_those_from_the_folder(pushed, adapted, small_model, tmp_path):
    script = (
        "import sys, torch\nfrom qlora.adapted import load_adapted\nfrom qlora.hub.fetch import find_adapter\n"
        "found = load_adapted(find_adapter(sys.argv[1], base=sys.argv[2]))\n"
        "with torch.no_grad(): torch.save(found.model(torch.arange(3, 40)[None]).logits, sys.argv[3])\n"
        "print(found.tokenizer.chat_template)"
    )
    done = subprocess.run([sys.executable, "-c", script, ID, str(small_model), str(tmp_path / "logits.pt")],
                          capture_output=True, text=True, env=pushed.environment(tmp_path / "home", "read"), timeout=120)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(adapted.model))
    assert done.stdout.rstrip("\n") == adapted.tokenizer.chat_template
    assert not pushed.leaks()


def copied(runs, tmp_path, **config):
    folder = tmp_path / "copy"
    shutil.copytree(runs().adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def test_an_adapter_of_another_base_is_refused(runs, small_model, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    def base(name, **changes):
        config = LlamaConfig.from_pretrained(small_model, **changes)
        shutil.copytree(small_model, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    folder = copied(runs, tmp_path)
    for other, word in ((base("wider", hidden_size=128), "size mismatch"),
                        (base("shallower", num_hidden_layers=1), "which the base has not"),
                        (base("deeper", num_hidden_layers=3), "which its config names"), (str(folder), "full model"),
                        (str(tmp_path / "nothing"), "no folder")):
        with pytest.raises(ModelError) as caught:
            load_adapted(find_adapter(str(folder), base=other))
        assert "--base MODEL" in caught.value.fix and (word in str(caught.value) or word == "full model"), caught.value


def test_weights_that_are_cut_are_refused(runs, tmp_path):
    folder = copied(runs, tmp_path)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged"):
        load_adapted(find_adapter(str(folder)))


def test_a_tokenizer_that_is_missing_is_the_base_s(runs, tmp_path):
    folder = copied(runs, tmp_path)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}!{% endfor %}")
    found = load_adapted(find_adapter(str(folder)))
    assert found.tokenizer.chat_template.endswith("!{% endfor %}") and len(found.tokenizer) == 288


def test_more_tokens_than_embeddings_are_told(runs, tmp_path):
    folder = copied(runs, tmp_path)
    found = load_adapted(find_adapter(str(folder)))
    assert found.notes == ()
    found.tokenizer.add_tokens([f"<new {i}>" for i in range(40)])  # 288 and 40; the model has 320 embeddings
    found.tokenizer.save_pretrained(folder)
    assert "328 tokens" in load_adapted(find_adapter(str(folder))).notes[0]


# --- from the Hub ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_chat_and_eval_from_the_hub_do_as_from_the_folder(pushed, adapted, rows, small_model, tmp_path):
    home = tmp_path / "home"
    code, answers, told = qlora(pushed, home, "chat", f"{ID}@main", "--base", small_model, "--device", "cpu", "--max-tokens", 8,
                                typed="say 3\n/base\nsay 3\n")
    assert code == 0 and "Fetching" in told and "Without the adapter" in told, told
    _, fake = conversation(adapted, "say 3", "/base", "say 3", max_tokens=8, interactive=False)
    assert answers == "".join(fake.seen)  # and no prompts
    code, printed, told = qlora(pushed, home, "eval", ID, "--base", small_model, "--data", rows, "--rows", 10, "--json")
    document = json.loads(printed)
    assert code == 0 and document["revision"] == pushed.commits(ID)[0].oid and document["data"]["num_rows"] == 10
    same = compare(adapted.adapter, data=str(rows), num_rows=10).to_json()["results"]
    assert document["results"] == [same[0], {**same[1], "name": "adapter"}]


def test_what_stops_the_verbs_is_said_without_a_traceback(pushed, tmp_path):
    cases = (
        (("eval", ID), "read", "--base MODEL"), (("chat", ID), None, "private"), (("chat", "/nothing"), None, "folder"),
        (("eval", ID, "--rows", "0"), None, "whole number"), (("chat", ID, "--temperature", "hot"), None, "0 to 10"),
    )
    for words, token, word in cases:
        code, printed, told = qlora(pushed, tmp_path / "home", *words, token=token, typed="")
        assert code == 2 and word in told and "Traceback" not in told and printed == ""
    assert not pushed.leaks()


# --- measuring ---------------------------------------------------------------------------------------------------------


def test_figures_agree_with_the_report(runs):
    run = runs()
    found = compare(find_adapter(str(run.folder)))
    assert found.held_out and found.num_rows == 8 and found.notes == ()
    for candidate, reported in zip(found.candidates, (run.summary.before, run.summary.after), strict=True):
        measured = candidate.evaluation
        assert measured.loss == pytest.approx(reported.loss, rel=2e-3)
        assert (measured.num_tokens, measured.num_answers) == (reported.num_tokens, reported.num_answers)
        assert measured.exact_match == reported.exact_match
    assert found.candidates[1].evaluation.loss < found.candidates[0].evaluation.loss
