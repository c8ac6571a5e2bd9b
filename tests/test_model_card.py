"""The model card, and what a run tells others: true, valid, readable, and nothing of the rows, the machine or its secrets."""

import json
import shlex
from dataclasses import replace

import pytest

from qlora.data import Finding, LengthStats, prepare
from qlora.evaluation import Evaluation
from qlora.hardware import Device
from qlora.planning.plan import Decision
from qlora.recipe import build_recipe
from qlora.results.facts import DataFacts, ModelFacts, RunSummary, Sample, TemplateFacts, TrainingFacts
from qlora.results.licence import Licence, licence_of_base, licence_of_card, licence_of_folder
from qlora.results.model_card import is_unedited, render_card, write_card
from qlora.results.report import PLOTS, load_report, render_markdown
from qlora.results.sharing import document_for_others, for_others

HOSTILE = [
    "a | b || c", "`x` and ```\nfenced\n```", "<script>alert(1)</script>", "**b** _i_ # h", "[link](http://x) ![i](y)", "--- ",
    "x\n---\nlicense: evil\n---\n", "\x1b[31mred\x00\u202e", "tags:\n- evil", "a: b # c", "{{ jinja }} $x$", "<!-- c -->",
    "한국어 \ud800",
]
TOKEN = "hf_" + "a1B2c3D4e5" * 3
SECTIONS = ["Use it", "Chat template", "Limits", "Data", "Settings", "What it took", "How it was made", "Licence"]
MARKER = "zebra-crossing"


def make_summary(**changes):
    summary = RunSummary(
        name="sample", folder="/srv/people/alice/runs/sample", command="qlora train /srv/people/alice/recipe.yaml lora.r=24",
        finished_at="2030-01-02T03:04:05+0000",
        before=Evaluation(4.125, 1201, 0.125, 16, (MARKER,)), after=Evaluation(2.25, 1202, 0.75, 17, (MARKER,)),
        samples=(Sample(MARKER, MARKER, MARKER, MARKER),),
        model=ModelFacts("Qwen/Qwen3-0.6B", "abc123", "qwen3", 28, 1024, 151936, 596049920, 440401920, 196, 197, 10092544),
        data=DataFacts(
            files=("/srv/people/alice/rows.jsonl",), sha256="5f" * 32, format="messages", num_rows=400, num_train=350,
            num_validation=41, max_length=512, size_bytes=123456,
            lengths=LengthStats(p50=61, p95=122, p99=183, max=204, mean=66.5, histogram=[(0, 64, 3)]),
            findings=(Finding("warning", "few-rows", "Only 400 rows.", "Add some."),),
            template=TemplateFacts("chatml", "the tokenizer has none", "<|im_start|>user\nQ<|im_end|>\n", ("<|im_end|>", "</s>")),
        ),
        training=TrainingFacts(num_steps=22, epochs=3.0, tokens=12345, trained_tokens=4567, tokens_per_second=950.5),
        peak_bytes=3 * 2**30, budget_bytes=4 * 2**30, seconds={"load": 3.4, "train": 65.2},
        settings={
            "model.base": Decision("Qwen/Qwen3-0.6B", "given", "given"), "model.dtype": Decision("fp16", "rule", "no bf16"),
            "data.path": Decision("/srv/people/alice/rows.jsonl", "given", "given"), "lora.r": Decision(24, "given", "given"),
            "output.dir": Decision("/srv/people/alice/runs/sample", "given", "given"),
        },
        device=Device("cuda", "Card X", 8 * 2**30, 7 * 2**30, 32 * 2**30, 20 * 2**30, 12, True, (8, 6)),
        versions={"torch": "2.13.0"}, notes=("A note on /srv/people/alice/rows.jsonl:3, as it is.",),
        planned_phases={"train": 2**30}, measured_phases={"train": 2**30 + 2**20},
    )
    return replace(summary, **changes)


def card(summary=None, repo="me/adapter", licence=Licence("apache-2.0"), **more):
    return render_card(summary or make_summary(), repo=repo, licence=licence, plots=list(PLOTS), **more)


def parsed(text):
    from huggingface_hub import ModelCard

    return ModelCard(text).data.to_dict()


def headings(text):
    """Headings as a Markdown renderer finds them, without the front matter."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("\n---\n", 1)[1])
    return [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open" and token.tag == "h2"]


def visible(text):
    """What a renderer shows as text outside code blocks."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("\n---\n", 1)[1])
    return "\n".join("".join(child.content for child in token.children if child.type in ("text", "text_special", "code_inline"))
                     for token in tokens if token.type == "inline")


def with_base(base, **changes):
    summary = make_summary()
    return replace(summary, model=replace(summary.model, base=base, **changes))


# --- the card ---------------------------------------------------------------------------------------------------------


def test_metadata_is_what_the_hub_reads():
    found = parsed(card())
    assert found == {
        "base_model": "Qwen/Qwen3-0.6B", "base_model_relation": "adapter", "library_name": "peft", "license": "apache-2.0",
        "pipeline_tag": "text-generation", "tags": ["lora", "qlora", "4-bit", "nf4", "sft", "trl"],
    }
    licence = Licence("other", "Some: licence, 'v2'", "LICENSE.txt")
    found = parsed(card(licence=licence))
    assert (found["license"], found["license_name"]) == ("other", "Some: licence, 'v2'")
    assert found["license_link"] == "https://huggingface.co/Qwen/Qwen3-0.6B/blob/main/LICENSE.txt"


def test_every_section_is_there_and_says_its_figures():
    text = card()
    assert headings(text) == SECTIONS
    shown = visible(text)
    for wanted in ("me/adapter", "rank 24", "350 rows", "4.125", "2.250", "75.0 %", "abc123", "rows.jsonl", "5f" * 32,
                   "123,456 bytes", "400 read; 350 to train on, 41 held out", "<|im_end|>, </s>", "Only 400 rows.", "Card X",
                   "1.00 GiB", "-0.10 %", "torch 2.13.0", "1 min 09 s", "apache-2.0", "no bf16"):
        assert wanted in shown, wanted
    assert "](https://huggingface.co/Qwen/Qwen3-0.6B/tree/abc123)" in text
    for name in ("run/plots/loss.png", "run/plots/memory.png", "run/report.md", "run/resolved.json", "run/plan.json"):
        assert f"]({name})" in text
    local = card(repo=None)
    assert headings(local) == SECTIONS and "run/" not in local and "](plots/loss.png)" in local and '"adapter"' in local


def test_pictures_that_are_not_there_are_not_shown():
    assert "![" not in render_card(make_summary(), repo="me/a", licence=None)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_stay_text(text):
    summary = make_summary()
    template = TemplateFacts(text, text, text, (text,))
    data = replace(summary.data, files=(text,), template=template, findings=(Finding("warning", "x", text, text),))
    summary = replace(summary, name=text, notes=(text,), data=data, command="", versions={text: text}, finished_at=text,
                      device=replace(summary.device, name=text), model=replace(summary.model, revision=text))
    for repo in ("me/adapter", None):
        shown = card(summary, repo=repo)
        assert parsed(shown) == parsed(card()), text
        assert headings(shown) == SECTIONS and is_unedited(shown)
        assert shown.encode("utf-8").decode() == shown and not set(shown) & set("\x1b\x00\u202e\r")
        report = render_markdown(for_others(summary, repo=repo, samples=False))
        assert [line for line in report.splitlines() if line.startswith("# ")] == [report.splitlines()[0]]


@pytest.mark.parametrize("base, changes, shown", [
    ("builtin:tiny", {}, "tiny_folder()"), ("/srv/models/my base", {"is_folder": True}, '"path/to/my base"'),
    ("models/mine", {"is_folder": True}, '"path/to/mine"'), ("../../models/mine", {}, '"path/to/mine"'),
    ("a--b/c", {}, '"a--b/c"'),
])
def test_a_base_that_is_not_on_the_hub_is_not_claimed_to_be(base, changes, shown):
    text = card(with_base(base, revision=None, **changes), licence=None)
    found = parsed(text)
    assert "base_model" not in found and "base_model_relation" not in found and shown in text
    assert "/srv" not in text and "../models" not in text and "models/mine" not in text
    assert found.get("license") == ("apache-2.0" if base == "builtin:tiny" else None)


def test_a_folder_may_stand_for_a_model_of_the_hub():
    text = card(with_base("/srv/models/qwen", is_folder=True, revision="abc123"), base="Qwen/Qwen3-0.6B")
    assert parsed(text)["base_model"] == "Qwen/Qwen3-0.6B" and "qwen\"" not in text and "abc123" not in text


@pytest.mark.parametrize("files, wanted", [
    (("me/rows:main[train]",), ["me/rows"]), (("squad[train]",), ["squad"]), (("/srv/x/rows.jsonl",), None),
    (("data/rows.jsonl",), None), (("a--b/c[train]",), None),
])
def test_only_data_sets_of_the_hub_are_named_as_such(files, wanted):
    summary = make_summary()
    text = card(replace(summary, data=replace(summary.data, files=files)))
    assert parsed(text).get("datasets") == wanted
    assert ("/datasets/" in text) == (wanted is not None) and "/srv" not in text


@pytest.mark.parametrize("loss, starts", [
    (5.0, "The model got worse"), (float("nan"), "After training, the loss"), (2.0, "The model got better"),
])
def test_a_bad_verdict_comes_first(loss, starts):
    summary = make_summary()
    text = card(replace(summary, after=replace(summary.after, loss=loss)))
    first = text.split("\n# me/adapter\n\n", 1)[1].splitlines()[0]
    assert f"**{starts}" in first
    assert first.startswith("> **Warning.**") == (loss != 2.0)


def test_same_run_same_bytes():
    assert card() == card() == card(RunSummary.from_json(json.loads(json.dumps(make_summary().to_json()))))


def test_unknown_licence_is_said():
    text = card(licence=None)
    assert "license" not in parsed(text) and "not known" in text.split("## Licence")[1]
    assert "https://huggingface.co/Qwen/Qwen3-0.6B" in text.split("## Licence")[1]


# --- how to load ------------------------------------------------------------------------------------------------------


def blocks(text, language):
    return [part.split("\n```")[0] for part in text.split(f"```{language}\n")[1:]]


@pytest.mark.parametrize("repo", ["me/adapter", None])
@pytest.mark.parametrize("base", ["Qwen/Qwen3-0.6B", "builtin:tiny"])
def test_code_is_code(repo, base):
    python = blocks(card(with_base(base), repo=repo), "python")
    assert len(python) == 3
    for block in python:
        compile(block, "card", "exec")


@pytest.mark.parametrize("rank, wanted", [(1, "8"), (8, "8"), (24, "32"), (300, "320"), (512, "512"), (513, None)])
def test_vllm_gets_a_rank_that_it_takes(rank, wanted):
    summary = make_summary()
    text = card(replace(summary, settings={**summary.settings, "lora.r": Decision(rank, "given", "")}))
    commands = [shlex.split(block) for block in blocks(text, "sh") if block.startswith("vllm")]
    if wanted is None:
        assert not commands and "ranks up to 512" in text
        return
    (words,) = commands
    assert words[:3] == ["vllm", "serve", "Qwen/Qwen3-0.6B"] and words[words.index("--max-lora-rank") + 1] == wanted
    assert words[words.index("--lora-modules") + 1] == "adapter=me/adapter"
    # The chat template is not the base's own here, so the adapter's tokenizer is served, at its own revision.
    assert words[words.index("--tokenizer") + 1] == "me/adapter" and words[words.index("--tokenizer-revision") + 1] == "main"


# --- edited or not ----------------------------------------------------------------------------------------------------


def test_edits_are_seen_and_line_ends_are_none():
    text = card()
    for same in (text, text.replace("\n", "\r\n"), text.rstrip("\n"), text.replace("\n", "\r\n").rstrip(), "\ufeff" + text):
        assert is_unedited(same)
    for edited in (text.replace("350", "351"), text + "more", "my own\n" + text,
                   text.replace("## Limits\n\n", "## Limits\n\nNone.\n\n"), "", "# my card", text[: text.rindex("<!--")], text + text, text.replace(" -->", "")):
        assert not is_unedited(edited), edited[-200:]


def test_a_card_that_somebody_edited_stays(tmp_path):
    path = write_card(make_summary(), tmp_path)
    first = path.read_bytes()
    assert is_unedited(first.decode())
    write_card(make_summary(name="other"), tmp_path)
    assert path.read_bytes() != first and is_unedited(path.read_text(encoding="utf-8"))
    for edited in (first.replace(b"350", b"351"), b"\xff\xfe mine"):
        path.write_bytes(edited)
        write_card(make_summary(), tmp_path)
        assert path.read_bytes() == edited


# --- what others may know ---------------------------------------------------------------------------------------------


def test_rows_are_told_only_if_asked_for():
    summary = make_summary()
    for shared in (for_others(summary, repo="me/a", samples=False), for_others(load(summary), repo="me/a", samples=False)):
        assert MARKER not in json.dumps(shared.to_json()) + repr(shared) + render_markdown(shared)
        assert render_markdown(shared).count("were left out of this report") == 1
    assert MARKER not in card() and MARKER in card(samples=True) and "were left out" not in card()
    asked = for_others(summary, repo="me/a", samples=True)
    assert asked.samples == summary.samples and "were left out" not in render_markdown(asked)
    assert "were left out" not in render_markdown(for_others(replace(summary, samples=()), repo="me/a", samples=False))


def load(summary):
    return RunSummary.from_json(json.loads(json.dumps(summary.to_json())))


def test_telling_twice_tells_the_same():
    once = for_others(make_summary(), repo="me/a", samples=False)
    assert for_others(once, repo="me/a", samples=False) == once and card(once) == card()


def test_findings_do_not_quote_rows(tmp_path, small_model):
    """What the real checks say of a file whose bad rows hold the marker."""
    from transformers import AutoTokenizer

    path = tmp_path / f"{MARKER[:5]}.jsonl"
    good = [{"messages": [{"role": "user", "content": f"say {i} <|im_end|>"}, {"role": "assistant", "content": "no"}]}
            for i in range(30)]
    bad = [{"messages": [{"role": MARKER, "content": "x"}]}, {"messages": [{"role": "user", "content": {MARKER: 1}}]}]
    path.write_text("\n".join(json.dumps(row) for row in bad + good), encoding="utf-8")
    found = prepare(str(path), AutoTokenizer.from_pretrained(small_model), on_bad_row="skip").findings
    assert {"skipped_rows", "special_tokens_in_content"} <= {finding.code for finding in found}
    assert any(MARKER in finding.text for finding in found)
    summary = make_summary()
    summary = replace(summary, samples=(), data=replace(summary.data, findings=tuple(found)))
    shared = for_others(summary, repo="me/a", samples=False)
    text = json.dumps(shared.to_json())
    assert MARKER not in text and str(tmp_path) not in text
    assert path.name not in json.dumps([finding.text for finding in shared.data.findings])
    assert "2 rows could not be used and were left out." in text
    assert "rows have special tokens written in the text, which act" in text
    assert not [f for f in shared.data.findings if f.code == "files"]


def test_neither_paths_nor_secrets_are_told(tmp_path, monkeypatch):
    home = tmp_path / "home" / "alice smith"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("MY_API_KEY", "correct horse battery")
    places = [f"{home}/a b/rows.jsonl", "C:\\Users\\alice\\rows.jsonl", "\\\\alice\\share\\rows.jsonl", "~/alice/rows.jsonl",
              "../../alice/rows.jsonl", "/srv/alice/rows.jsonl"]
    base = make_summary()
    for place in places:
        text = f"{place}:3 says correct horse battery and {TOKEN}."
        summary = replace(
            base, command=shlex.join(["qlora", "train", place, f"data.path={place}"]), folder=place,
            notes=(text, f"See {place}."), samples=(Sample(TOKEN, "", "", ""),),
            settings={**base.settings, "data.path": Decision(place, "given", f"from {place}")},
            data=replace(base.data, files=(place,), findings=(Finding("warning", "x", text, text),)),
            model=replace(base.model, base=place, is_folder=True),
        )
        document = document_for_others({"recipe": {"data": {"path": place}}, "notes": [text], "n": 1, "ok": None}, home / "runs")
        shared = for_others(summary, repo="me/a", samples=True)
        texts = [json.dumps(document), json.dumps(shared.to_json()), render_markdown(shared), card(summary, samples=True),
                 card(summary, repo=None)]
        for told in texts:
            assert "alice" not in told and "correct horse" not in told and TOKEN not in told, (place, told)
            assert "rows.jsonl" in told
    assert document["n"] == 1 and document["ok"] is None and document["recipe"]["data"]["path"] == "rows.jsonl"


def test_a_path_with_spaces_is_one_path():
    place, base = "/srv/of alice/x y/my rows.jsonl", make_summary()
    command = shlex.join(["qlora", "train", "/srv/of alice/r.yaml", f"data.path={place}", "lora.targets=[q_proj, v_proj]"])
    settings = {**base.settings, "data.path": Decision(place, "given", "given")}
    shared = for_others(replace(base, command=command, settings=settings), repo="me/a", samples=False)
    assert shared.command == "qlora train r.yaml 'data.path=my rows.jsonl' 'lora.targets=[q_proj, v_proj]'"
    assert shared.settings["data.path"].value == "my rows.jsonl"
    assert document_for_others({"path": place}, "/srv/x") == {"path": "my rows.jsonl"}


def test_what_is_no_path_stays():
    texts = ["Answers end at </s> and [/INST].", "See https://huggingface.co/a/b/c.", "about 3/4 of 12 GB/s", "Qwen/Qwen3-0.6B",
             "auto"]
    assert document_for_others({"texts": texts}, "/srv/x") == {"texts": texts}
    inside = document_for_others({"a": "/srv/x/checkpoints/c-1", "b": "see /srv/x/plots/a.png."}, "/srv/x")
    assert inside == {"a": "checkpoints/c-1", "b": "see plots/a.png."}


def test_the_report_for_others_links_to_nothing_that_is_not_there():
    text = render_markdown(for_others(make_summary(), repo="me/a", samples=False), ["loss.png"])
    assert 'from_pretrained(base, "me/a")' in text and "adapter/)" not in text and "run folder" not in text
    assert "](../README.md)" in text and "](plots/loss.png)" in text


# --- licences ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("front, wanted", [
    ("license: apache-2.0", Licence("apache-2.0")),
    ("license: [mit]", Licence("mit")),
    ("license: other\nlicense_name: llama3.1\nlicense_link: LICENSE", Licence("other", "llama3.1", "LICENSE")),
    ("license: other\nlicense_name: 'a  b'\nlicense_link: https://x.org/l?a=b", Licence("other", "a b", "https://x.org/l?a=b")),
    ("license: other\nlicense_name: [x]\nlicense_link: javascript:alert(1)", Licence("other")),
    ("license: 'x) [y](z'", None), ("license: [mit, apache-2.0]", None), ("license: 3", None), ("tags: [a]", None),
    ("license: [", None), ("- license", None), ("license: !!python/object/apply:os.system [ls]", None), ("a: &a [*a]", None),
])
def test_licence_is_what_the_card_says(front, wanted, tmp_path):
    for text in (f"---\n{front}\n---\n# Base\n", f"\ufeff---\r\n{front}\r\n---\r\n".replace("\n", "\r\n").replace("\r\r", "\r")):
        assert licence_of_card(text) == wanted
    assert licence_of_card(f"# no front matter\n---\n{front}\n---\n") is None
    assert licence_of_folder(tmp_path) is None
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n", encoding="utf-8")
    assert licence_of_folder(tmp_path) == wanted


def test_licence_of_a_base_is_looked_for_on_this_machine_alone(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--me--base" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    assert licence_of_base("me/base", "a" * 40) == licence_of_base(str(snapshot)) == Licence("mit")
    for base, revision in (("me/base", "b" * 40), ("me/other", None), ("a//b", None), (str(tmp_path), None)):
        assert licence_of_base(base, revision) is None


# --- a real run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(small_model, tmp_path_factory):
    """The folder of a short real run."""
    from qlora.training.run import train

    folder = tmp_path_factory.mktemp("card")
    words = "the cat sat on the mat and the dog ran to the red house".split()
    rows = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": " ".join(words[i % 7:][:3])}]}
            for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = build_recipe(
        model=str(small_model), data={"path": str(folder / "rows.jsonl"), "validation": 0.2}, memory={"device": "cpu"},
        train={"max_steps": 2, "batch": 4, "learning_rate": 5e-3, "sample_rows": 2}, output=str(folder / "run"),
    )
    return train(recipe).folder


def test_a_run_leaves_a_card_before_its_report(run, small_model):
    text = (run / "README.md").read_text(encoding="utf-8")
    assert is_unedited(text) and headings(text) == SECTIONS and parsed(text)["library_name"] == "peft"
    assert (run / "README.md").stat().st_mtime_ns <= (run / "report.json").stat().st_mtime_ns
    assert "<|im_start|>user\nthe question<|im_end|>" in text and str(run.parent) not in text and str(small_model) not in text
    summary = load_report(run)
    assert summary.model.is_folder and summary.data.size_bytes == (run.parent / "rows.jsonl").stat().st_size
    assert summary.data.template.stop_tokens == ("<|im_end|>",)


def test_what_a_pushed_run_says_names_no_place_of_this_machine(run):
    shared = for_others(load_report(run), repo="me/a", samples=False)
    documents = [document_for_others(json.loads((run / name).read_text(encoding="utf-8")), run)
                 for name in ("resolved.json", "plan.json")]
    told = json.dumps([shared.to_json(), *documents]) + render_markdown(shared) + card(shared)
    assert str(run.parent) not in told and str(run.parent.parent) not in told and "say 1" not in told
    assert documents[0]["data"]["files"] == ["rows.jsonl"] and documents[0]["settings"]["lora.r"]["reason"]


def test_the_code_of_the_card_loads_the_adapter(run, small_model, monkeypatch):
    """PEFT and Transformers come to the same numbers, and those are not the base's."""
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(run)
    text = (run / "README.md").read_text(encoding="utf-8").replace(f'"path/to/{small_model.name}"', json.dumps(str(small_model)))
    with_peft, in_four_bits, with_transformers = blocks(text, "python")
    (base_line,) = [line for line in with_peft.splitlines() if line.startswith("base =")]
    ids, found = torch.arange(3, 20)[None], {}
    in_four_bits = with_peft.replace(base_line, in_four_bits)
    for name, code in (("peft", with_peft), ("transformers", with_transformers), ("4-bit", in_four_bits)):
        names = {}
        exec(compile(code.replace("max_new_tokens=256", "max_new_tokens=8"), name, "exec"), names)
        found[name] = names["model"].eval()(ids).logits.float()
        assert names["tokenizer"].chat_template
    base = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.bfloat16)(ids).logits.float()
    # PEFT computes the adapter in 32 bits, Transformers in 16.
    moved = (found["peft"] - base).abs().mean()
    assert moved > 0 and (found["transformers"] - found["peft"]).abs().mean() < moved / 2
    assert torch.nn.functional.cosine_similarity(found["4-bit"], found["peft"], dim=-1).mean() > 0.7  # random weights round badly
    assert any(type(module).__name__ == "Linear4bit" for module in names["model"].modules())
