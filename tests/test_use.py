"""What is done with an adapter that is there: loaded on its base, talked to, measured; from a folder and from a Hub."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from qlora.adapted import load_adapted
from qlora.chatting import Conversation, Terminal, shown, talk
from qlora.comparing import compare, measure
from qlora.errors import DataError, ModelError
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


# --- talking -----------------------------------------------------------------------------------------------------------


class Fake:
    """A terminal: the lines that are typed, and what was seen."""

    def __init__(self, *lines, interactive=True, stop_after=None):
        self.lines, self.seen, self.notes, self.stop_after = list(lines), [], [], stop_after
        self.terminal = Terminal(self.read, self.write, self.notes.append, interactive)

    def read(self, prompt):
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    def write(self, text):
        self.seen.append(text)
        if self.stop_after is not None and len(self.seen) > self.stop_after:
            self.stop_after = None
            raise KeyboardInterrupt


def conversation(adapted, *lines, max_tokens=12, stop_after=None, interactive=True):
    fake = Fake(*lines, stop_after=stop_after, interactive=interactive)
    talked = Conversation(adapted, max_tokens=max_tokens)
    talk(talked, fake.terminal)
    return talked, fake


def greedy(adapted, turns, max_tokens=12):
    """The same answer by the way that training takes."""
    from qlora.generation import answer

    text = adapted.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = adapted.tokenizer(text, add_special_tokens=False).input_ids
    stop_ids = [adapted.tokenizer.eos_token_id]
    return answer(adapted.model, adapted.tokenizer, [ids], max_new_tokens=max_tokens, stop_ids=stop_ids)[0]


def test_a_chat_answers_with_its_history(adapted):
    talked, fake = conversation(adapted, "say 3", "", "and 4")
    roles = [turn["role"] for turn in talked.turns]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert talked.turns[1]["content"].strip() == greedy(adapted, talked.turns[:1])
    assert talked.turns[3]["content"].strip() == greedy(adapted, talked.turns[:3])
    assert "".join(fake.seen) == shown(talked.turns[1]["content"]) + "\n" + shown(talked.turns[3]["content"]) + "\n"


def test_commands(adapted):
    lines = ("say 3", "/base", "say 3", "/reset", "/help", "/nothing", "/etc/passwd is a file", "/quit", "say 5")
    talked, fake = conversation(adapted, *lines)
    assert not talked.with_adapter and [turn["content"] for turn in talked.turns][0] == "/etc/passwd is a file"
    assert len(talked.turns) == 2
    assert any("/reset" in note for note in fake.notes) and any("no /nothing" in note for note in fake.notes)
    with_adapter, base = conversation(adapted, "say 3")[0].turns[1], conversation(adapted, "/base", "say 3")[0].turns[1]
    assert with_adapter != base
    with adapted.without_adapter():
        assert base["content"].strip() == greedy(adapted, [{"role": "user", "content": "say 3"}])


def test_ctrl_c_stops_the_answer_and_not_the_chat(adapted):
    talked, fake = conversation(adapted, "/base", "say 3", KeyboardInterrupt, "say 4", stop_after=0, max_tokens=40)
    first, second = talked.turns[1]["content"], talked.turns[3]["content"]
    assert 0 < len(first) < len(conversation(adapted, "/base", "say 3", max_tokens=40)[0].turns[1]["content"]) and second
    assert any("Ctrl-D" in note for note in fake.notes)
    with pytest.raises(KeyboardInterrupt):
        conversation(adapted, "say 3", stop_after=0, max_tokens=40, interactive=False)


def test_a_long_conversation_forgets_its_begin(adapted):
    talked = Conversation(adapted, max_tokens=20)
    for number in range(12):
        talked.answer("the cat sat on the mat", lambda text: None)
        assert [turn["role"] for turn in talked.turns] == ["user", "assistant"] * (len(talked.turns) // 2)
    assert 4 <= len(talked.turns) < 24
    talked, fake = conversation(adapted, "house " * 400, "say 3")
    assert any("tokens long" in note for note in fake.notes) and talked.turns[0]["content"] == "say 3"


def test_an_answer_ends_where_the_model_does(adapted):
    """At 256 tokens, prompt and answer; the base would go on."""
    passes = []
    hook = adapted.model.get_base_model().register_forward_pre_hook(lambda *_: passes.append(1))
    Conversation(adapted, max_tokens=10_000, with_adapter=False).answer("say 3", lambda text: None)
    hook.remove()
    assert 200 < len(passes) < 256


def test_without_a_template_lines_are_gone_on_with(runs, tmp_path):
    from qlora.generation import answer

    folder = copied(runs, tmp_path)
    (folder / "chat_template.jinja").unlink()
    found = load_adapted(find_adapter(str(folder)))
    assert found.tokenizer.chat_template is None
    talked, fake = conversation(found, "the cat", "the cat")
    ids = found.tokenizer("the cat", add_special_tokens=False).input_ids
    expected = answer(found.model, found.tokenizer, [ids], max_new_tokens=12, stop_ids=[2])[0]
    seen = "".join(fake.seen)
    half = len(seen) // 2
    assert seen[:half] == seen[half:] and seen[:half].strip() == shown(expected) and talked.turns == []


def test_what_steers_a_terminal_is_not_shown(adapted):
    assert shown("a\x1b[2J\r\x07b\n\tc é 猫") == "a\ufffd[2J\ufffd\ufffdb\n\tc é 猫"
    seen = []
    raw = Conversation(adapted, max_tokens=200, with_adapter=False).answer("say 3", seen.append)
    assert shown(raw) == "".join(seen) != raw  # the base writes anything


def test_chat_and_eval_from_the_hub_do_as_from_the_folder(pushed, adapted, rows, small_model, tmp_path):
    home = tmp_path / "home"
    code, answers, told = qlora(pushed, home, "chat", f"{ID}@main", "--base", small_model, "--device", "cpu", "--max-tokens", 8,
                                typed="say 3\n/base\nsay 3\n")
    assert code == 0 and "Fetching" in told and "Without the adapter" in told, told
    _, fake = conversation(adapted, "say 3", "/base", "say 3", max_tokens=8)
    assert answers == "".join(fake.seen)  # and no prompts
    code, printed, told = qlora(pushed, home, "eval", ID, "--base", small_model, "--data", rows, "--rows", 10, "--json")
    document = json.loads(printed)
    assert code == 0 and document["revision"] == pushed.commits(ID)[0].oid and document["data"]["num_rows"] == 10
    same = compare(adapted.adapter, data=str(rows), num_rows=10).to_json()["results"]
    assert document["results"] == [same[0], {**same[1], "name": ID}]


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


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-3)])
def test_figures_agree_with_the_report(runs, dtype, tolerance):
    run = runs(dtype)
    found = compare(find_adapter(str(run.folder)))
    assert found.held_out and found.num_rows == 8 and found.notes == ()
    for candidate, reported in zip(found.candidates, (run.summary.before, run.summary.after), strict=True):
        measured = candidate.evaluation
        assert measured.loss == pytest.approx(reported.loss, rel=tolerance)
        assert (measured.num_tokens, measured.num_answers) == (reported.num_tokens, reported.num_answers)
        assert measured.exact_match == reported.exact_match
        if dtype == "fp32":
            assert measured.answers == reported.answers
    assert found.candidates[1].evaluation.loss < found.candidates[0].evaluation.loss


def test_the_chunked_loss_is_the_loss_of_the_logits(adapted):
    from qlora.data import TokenRow

    ids = torch.randint(3, 300, (5, 60), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [TokenRow(row, [-100] * (7 * i) + row[7 * i :], None) for i, row in enumerate(ids)]
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            scores = adapted.model(torch.tensor([row.input_ids])).logits[0, :-1].float()
        labels = torch.tensor(row.labels[1:])
        total += torch.nn.functional.cross_entropy(scores, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    found = measure(adapted, rows)
    assert found.num_tokens == count and found.loss == pytest.approx(total / count, rel=1e-5)


def test_rows_are_the_run_s_or_named(runs, rows, tmp_path):
    folder = copied(runs, tmp_path)
    with pytest.raises(DataError) as caught:
        compare(find_adapter(str(folder)))
    assert "--data FILE" in caught.value.fix
    moved = tmp_path / "run"
    shutil.copytree(runs().folder, moved)
    document = json.loads((moved / "resolved.json").read_text())

    def write():
        (moved / "resolved.json").write_text(json.dumps(document))

    document["recipe"]["data"]["path"] = str(tmp_path / "gone.jsonl")
    write()
    with pytest.raises(DataError) as caught:
        compare(find_adapter(str(moved)))
    assert "gone.jsonl" in caught.value.problem and "--data FILE" in caught.value.fix
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(rows.read_text().splitlines(keepends=True)[3:]))
    document["recipe"]["data"]["path"] = str(changed)
    write()
    found = compare(find_adapter(str(moved)), num_rows=2)
    assert not found.held_out and found.num_rows == 2 and "trained on" in found.notes[0]
    named = compare(find_adapter(str(moved)), data=str(rows), num_rows=7)
    assert not named.held_out and named.num_rows == 7 and named.candidates[1].evaluation.num_answers == 7


def test_the_table_shows_both_and_which_is_better(runs):
    from rich.console import Console

    from qlora.views.comparison import comparison_view

    found = compare(find_adapter(str(runs().folder)), num_rows=3)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(comparison_view(found))
    text = console.export_text()
    assert "3 held-out rows" in text and "base" in text and "✓ better" in text
    assert f"{found.candidates[0].evaluation.loss:.4f}" in text
    assert json.loads(json.dumps(found.to_json()))["results"][0]["name"] == "base"
