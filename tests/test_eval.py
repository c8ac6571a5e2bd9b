"""`qlora eval`: adapters beside their base on the same rows, how sure the figures are, and that memory does not run out."""

import json
import math
import random
import shutil

import pytest
import torch

from qlora.adapted import load_adapted, short_names
from qlora.comparing import compare, intervals
from qlora.comparing.figures import Measured
from qlora.comparing.measuring import row_losses
from qlora.comparing.rows import trained_bytes
from qlora.engine.placement import Placement
from qlora.errors import DataError, HardwareError, ModelError
from qlora.evaluation import normalised
from qlora.hub.fetch import find_adapter
from qlora.recipe import build_recipe
from qlora.training.evaluating import EvaluationPlan, plan_evaluation

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(3, 90)[None]
WORDS = "the cat sat on the mat and the dog ran to the red house".split()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"say {i}"},
                      {"role": "assistant", "content": " ".join(WORDS[(i * 3 + j) % len(WORDS)] for j in range(1 + i % 7))}]}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def run(small_model, rows, tmp_path_factory):
    """A short run in fp32, with one of two layers streamed."""
    from qlora.training.run import train

    return train(build_recipe(
        model={"base": str(small_model), "dtype": "fp32"}, data={"path": str(rows), "validation": 0.2},
        memory={"device": "cpu", "streaming": True, "resident_layers": 1, "checkpointing": True}, lora={"r": 8},
        train={"max_steps": 8, "batch": 8, "micro_batch": 4, "optimizer": "adamw", "learning_rate": 1e-2, "sample_rows": 5},
        output=str(tmp_path_factory.mktemp("runs") / "run"),
    ))


@pytest.fixture(scope="module")
def folders(small_model, tmp_path_factory):
    """Adapters of different ranks, scales and targets, with numbers in them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank, alpha, targets) in enumerate([
        ("qv", 4, 8, ["q_proj", "v_proj"]), ("all", 8, 8, "all-linear"), ("mlp", 3, 7, ["gate_proj", "up_proj", "down_proj"]),
    ]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(small_model), config).save_pretrained(root / name)
    return root


def with_settings(run, folder, memory):
    """A copy of a run folder, as if the recipe had said this of memory."""
    shutil.copytree(run.folder, folder)
    document = json.loads((folder / "resolved.json").read_text())
    document["recipe"]["memory"] = memory
    (folder / "resolved.json").write_text(json.dumps(document))
    return find_adapter(str(folder))


def found_in(folders, *names):
    return [find_adapter(str(folders / name)) for name in names]


# --- switching --------------------------------------------------------------------------------------------------------


def logits(adapted):
    with adapted.computing():
        return adapted.model(IDS, use_cache=False).logits


@pytest.mark.parametrize("placement", [
    Placement(), Placement(fused_lora=True, mlp_tile_tokens=32, loss_chunk_bytes=2**16),
    Placement(resident_layers=1, offload_adapters=True, fused_lora=True, loss_chunk_bytes=2**16, embedding_device="host",
              head_format="streamed"),
], ids=["plain", "fused", "streamed"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_switch_gives_what_a_fresh_load_gives(folders, placement, dtype):
    names, plan, alone = ("qv", "all", "mlp"), EvaluationPlan(placement), {}
    for name in names:
        fresh = load_adapted(found_in(folders, name), device="cpu", dtype=dtype, plan=plan)
        alone[name] = logits(fresh)
        fresh.use(None)
        assert torch.equal(alone.setdefault(None, logits(fresh)), logits(fresh))  # the base is the base, whatever lies beside it
        fresh.close()
    assert len({float(found.sum()) for found in alone.values()}) == 4
    many = load_adapted(found_in(folders, *names), device="cpu", dtype=dtype, plan=plan)
    assert many.active == "qv" and torch.equal(logits(many), alone["qv"])
    for name in ("all", None, "mlp", "qv", None, None, "all", "all", "mlp"):
        many.use(name)
        assert many.active == name and torch.equal(logits(many), alone[name]), name
    with many.using("qv"), many.using(None):
        assert torch.equal(logits(many), alone[None])
    assert many.active == "mlp" and torch.equal(logits(many), alone["mlp"])
    with pytest.raises(ModelError, match="nobody"):
        many.use("nobody")
    assert many.active == "mlp"
    many.close()


def test_names_are_short_and_unique(folders, tmp_path):
    shutil.copytree(folders / "qv", tmp_path / "base")
    adapters = [*found_in(folders, "qv", "qv"), find_adapter(str(tmp_path / "base")), *found_in(folders, "all")]
    assert short_names(adapters) == ["qv", "qv-2", "base-2", "all"]


def test_adapters_of_different_bases_are_refused(folders, small_model, tmp_path):
    shutil.copytree(small_model, tmp_path / "copy")
    one, other = find_adapter(str(folders / "qv")), find_adapter(str(folders / "all"), base=str(tmp_path / "copy"))
    for refused in (lambda: load_adapted([one, other]), lambda: compare([one, other], data="nothing.jsonl")):
        with pytest.raises(ModelError) as caught:
            refused()
        assert str(small_model) in caught.value.problem and "copy" in caught.value.problem and "--base MODEL" in caught.value.fix
    same = [find_adapter(str(folders / name), base=str(tmp_path / "copy")) for name in ("qv", "all")]
    assert load_adapted(same, device="cpu", plan=EvaluationPlan()).active == "qv"


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_agree_with_the_report(run):
    found = compare(find_adapter(str(run.folder)), device="cpu")
    assert found.held_out and found.num_rows == 8 and found.notes == () and found.machine["plan"]["streamed"]
    for candidate, reported in zip(found.candidates, (run.summary.before, run.summary.after), strict=True):
        measured = candidate.evaluation
        assert measured.loss == pytest.approx(reported.loss, rel=1e-5)
        assert (measured.num_tokens, measured.num_answers) == (reported.num_tokens, reported.num_answers)
        assert measured.exact_match == reported.exact_match and measured.answers == reported.answers
    assert found.candidates[1].evaluation.loss < found.candidates[0].evaluation.loss


def test_streamed_figures_are_resident_ones_within_the_plan(run, rows, tmp_path):
    """From the run folder layers are streamed, as the run was told to; a copy says nothing of that."""
    from qlora.training.cpu_memory import TensorMeter

    with_settings(run, tmp_path / "copy", {})
    found = {}
    for folder in (run.folder, tmp_path / "copy"):
        meter = TensorMeter()
        with meter.watching(), meter.during("all"):
            adapter = find_adapter(str(folder))
            found[folder] = compare(adapter, data=str(rows), num_answers=12, device="cpu")
        plan = found[folder].machine["plan"]
        assert plan["streamed"] == (folder == run.folder) and plan["rows_at_once"] > 1
        assert meter.allocated["all"] <= 1.02 * max(plan["planned_bytes"].values())
    for streamed, resident in zip(*(each.candidates for each in found.values()), strict=True):
        assert streamed.measured.losses == resident.measured.losses and streamed.measured.answers == resident.measured.answers


def test_answers_take_what_is_planned(folders):
    """Short answers share a batch with many others, which has more logits than a few long ones."""
    from qlora.generation import answer
    from qlora.hardware import find_device
    from qlora.precision import choose_precision
    from qlora.training.cpu_memory import TensorMeter

    device, adapters, meter = find_device("cpu"), found_in(folders, "all"), TensorMeter()
    plan = plan_evaluation(adapters, device, choose_precision("bf16", device), max_length=64, prompt_tokens=30, answer_tokens=10,
                           num_answers=20)
    with meter.watching():
        adapted = load_adapted(adapters, device="cpu", dtype="bf16", plan=plan)
        with meter.during("generate"), adapted.computing():
            answer(adapted.model, adapted.tokenizer, [[5] * 30 for _ in range(20)], max_new_tokens=10, stop_ids=[],
                   tokens_per_batch=plan.generation_tokens)
        del adapted
    assert -0.005 <= plan.phases["generate"] / meter.allocated["generate"] - 1 <= 0.05


def test_a_plan_for_training_knows_the_answers_of_its_rows(small_model, rows):
    from transformers import AutoTokenizer

    from qlora.progress import Progress
    from qlora.training.setup import read_data, rows_of

    recipe = build_recipe(model={"base": str(small_model)}, data={"path": str(rows), "validation": 0.2}, train={"sample_rows": 5})
    data = read_data(recipe, AutoTokenizer.from_pretrained(small_model), 256, Progress())
    found = rows_of(recipe, data)
    assert found.num_answers == 5
    assert found.prompt_tokens == max(len(sample.prompt_ids) for sample in data.samples) < data.max_length
    assert 8 < found.answer_tokens < 60


def token_rows():
    from qlora.data import TokenRow

    made = torch.randint(3, 300, (7, 60), generator=torch.Generator().manual_seed(0)).tolist()
    return [TokenRow(ids[: 60 - 5 * i], [-100] * (7 * i) + ids[7 * i : 60 - 5 * i], None) for i, ids in enumerate(made[:5])]


def true_losses(adapted, rows):
    found = []
    for row in rows:
        with adapted.computing():
            scores = adapted.model(torch.tensor([row.input_ids])).logits[0, :-1].float()
        wanted = torch.tensor(row.labels[1:])
        found.append(torch.nn.functional.cross_entropy(scores, wanted, ignore_index=-100, reduction="sum").item())
    return found


@pytest.mark.parametrize("placement", [
    Placement(loss_chunk_bytes=2**13), Placement(), Placement(resident_layers=0, loss_chunk_bytes=2**13, head_format="streamed"),
], ids=["chunked", "plain", "streamed"])
def test_the_loss_of_each_row_is_that_of_its_logits(folders, placement):
    rows, found = token_rows(), {}
    for at_once in (1, 2, 5):
        adapted = load_adapted(found_in(folders, "all"), device="cpu", dtype="fp32", plan=EvaluationPlan(placement, at_once, 4))
        found[at_once], used = row_losses(adapted, rows)
        assert used == (at_once if placement.loss_chunk_bytes else 1)
        assert found[at_once] == pytest.approx(true_losses(adapted, rows), rel=1e-5)
        adapted.close()


@pytest.mark.parametrize("streamed", [False, True])
def test_memory_that_runs_out_makes_batches_smaller(folders, streamed):
    placement = Placement(resident_layers=0 if streamed else None, loss_chunk_bytes=2**16)
    adapted = load_adapted(found_in(folders, "all"), device="cpu", dtype="fp32", plan=EvaluationPlan(placement, 4, 4))
    rows, told, room = token_rows(), [], 2
    expected, _ = row_losses(adapted, rows)
    layer = adapted.model.get_base_model().model.layers[0].mlp

    def run_out(module, args):
        if len(args[0]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    layer.register_forward_pre_hook(run_out)
    found, at_once = row_losses(adapted, rows, tell=told.append)
    assert found == pytest.approx(expected, rel=1e-5) and at_once == 2 and len(told) == 1 and "2 rows at once" in told[0]
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        row_losses(adapted, rows)


def test_bytes_are_those_of_the_trained_text(small_model):
    from transformers import AutoTokenizer

    from qlora.data.rows import Row
    from qlora.data.tokenise import tokenise

    tokenizer = AutoTokenizer.from_pretrained(small_model)
    answer, text = "the café costs 5 €, 猫 \N{GRINNING FACE}", "thé cat"
    made = [Row(None, "say:\n", answer, None, None, "f", 1), Row(None, None, None, text, None, "f", 2)]
    prompt_row, text_row = tokenise(made, tokenizer)

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    assert trained_bytes(prompt_row, decode) == len(answer.encode())  # and none for the token that ends it
    first = len(decode(text_row.input_ids[:1]).encode())
    assert trained_bytes(text_row, decode) == len(text.encode()) - first  # nothing predicts the first token
    flipped = [-100 if label != -100 else token for token, label in zip(prompt_row.input_ids, prompt_row.labels, strict=True)]
    other = type(prompt_row)(prompt_row.input_ids, flipped, prompt_row.row)
    whole = len(decode(prompt_row.input_ids).encode()) - len(decode(prompt_row.input_ids[:1]).encode())
    assert trained_bytes(prompt_row, decode) + trained_bytes(other, decode) == whole
    measured = Measured("m", (math.log(2) * 10,), (4,), (5,))
    figures = measured.figures
    assert figures["bits_per_byte"].value == pytest.approx(2.0) and figures["byte_perplexity"].value == pytest.approx(4)


@pytest.mark.parametrize(("answer", "reference", "same"), [
    ("The Cat!", "cat", True), (" an  Eiffel   Tower.", "eiffel tower", True), ("1,000", "1000", True), ("1.50", "1.5", True),
    ("1.5", "15", False), ("-5", "5", False), ("$1,234.50.", "1234.5", True), ("(42)", "42", True), ("1,00", "1", False),
    ("007", "7", True), ("9" * 40, "9" * 39 + "8", False), ("Straße", "STRASSE", True), ("cat", "dog", False),
    ("a", "the", False),
    ("...", "", False), ("", "", True), ("U.S.A", "usa", True), ("“yes”", "Yes", True),
])
def test_normalised_answers(answer, reference, same):
    assert (normalised(answer) == normalised(reference)) == same
    assert normalised(normalised(answer)) == normalised(answer)


# --- how sure ---------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_the_books():
    for freedom, value in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (1000, 1.9623)):
        assert intervals.student_t(freedom) == pytest.approx(value, rel=3e-3)
    none, all_of_them = intervals.of_share(0, 10), intervals.of_share(10, 10)
    assert (none.low, none.high, all_of_them.low, all_of_them.high) == pytest.approx((0, 0.2775, 0.7225, 1), abs=1e-4)
    half = intervals.of_share(5, 10)
    assert (half.low, half.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert intervals.of_share(0, 0) is None and intervals.of_ratio([1.0], [2]) is None and intervals.of_ratio([], []) is None
    assert intervals.of_paired_shares([], []) is None and intervals.of_paired_shares([True], [True]) is None
    assert intervals.of_ratio([math.inf, 1.0], [1, 1]) is None
    exact = intervals.of_ratio([2.0, 4.0, 6.0], [1, 2, 3])  # every row has the same ratio
    assert (exact.low, exact.high) == pytest.approx((2, 2))


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Tokens of a row go together: an interval that took them for independent ones would be several times too narrow."""
    draw, held, too_narrow, tries = random.Random(0), 0, 0, 1500
    for _ in range(tries):
        sizes = [draw.randint(3, 30) for _ in range(60)]
        parts = [size * (2 + draw.gauss(0, 0.5)) for size in sizes]
        found = intervals.of_ratio(parts, sizes)
        held += found.low <= 2 <= found.high
        middle, half = sum(parts) / sum(sizes), 1.96 * 0.5 / math.sqrt(sum(sizes))
        too_narrow += abs(middle - 2) <= half
    assert 0.93 <= held / tries <= 0.97 and too_narrow / tries < 0.6


def test_better_is_said_where_mcnemar_says_it():
    for gained in range(0, 12):
        for lost in range(0, 12):
            now = [True] * gained + [False] * lost + [True] * 5
            before = [False] * gained + [True] * lost + [True] * 5
            found = intervals.of_paired_shares(now, before)
            if gained + lost == 0:
                assert found is None
                continue
            apart, less = gained + lost, min(gained, lost)
            p_value = min(1.0, 2 * sum(math.comb(apart, k) for k in range(less + 1)) / 2**apart)
            assert found.excludes_zero == (p_value < 0.05) and found.low <= (gained - lost) / len(now) <= found.high


def test_a_difference_is_taken_row_by_row():
    draw = random.Random(1)
    base = [draw.uniform(5, 50) for _ in range(30)]
    same = Measured("base", tuple(base), (10,) * 30, (40,) * 30)
    lower = Measured("a", tuple(loss - 0.5 + draw.gauss(0, 0.2) for loss in base), (10,) * 30, (40,) * 30)
    noise = Measured("b", tuple(loss + draw.gauss(0, 0.2) for loss in base), (10,) * 30, (40,) * 30)
    assert lower.figures["loss"].interval.low < same.figures["loss"].value < lower.figures["loss"].interval.high
    assert lower.beside(same)["loss"].outcome == lower.beside(same)["bits_per_byte"].outcome == "better"
    assert same.beside(lower)["loss"].outcome == "worse" and noise.beside(same)["loss"].outcome == "no difference seen"
    assert same.beside(same)["loss"].outcome == "no difference seen"
    with pytest.raises(AssertionError, match="same rows"):
        lower.beside(Measured("c", tuple(base), (11,) * 30, (40,) * 30))


# --- what is shown ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four(folders, rows):
    """Three adapters and one of them once more, beside their base."""
    return compare(found_in(folders, "qv", "all", "mlp", "qv"), data=str(rows), num_rows=9, num_answers=4, device="cpu")


def text_of(found, width=80, **options):
    from rich.console import Console

    from qlora.views.comparison import comparison_view

    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(comparison_view(found, **options))
    return console.export_text()


def test_the_table_holds_four_adapters_in_eighty_columns(four):
    text = text_of(four)
    lines = text.splitlines()
    assert [each.name for each in four.candidates] == ["base", "qv", "all", "mlp", "qv-2"]
    assert max(len(line.rstrip()) for line in lines) <= 80 and "on 9 rows" in text
    assert any(line.split() == ["base", "qv", "all", "mlp", "qv-2"] for line in lines)
    for each in four.candidates:
        assert f"{each.evaluation.loss:.4f}" in text
    assert text.count("? unclear") + text.count("✓ better") + text.count("✗ worse") == 4 * 6
    assert four.candidates[1].measured.losses == four.candidates[4].measured.losses  # switched away and back
    assert "in the data" in text and text_of(four, num_samples=0).count("in the data") == 0


def test_one_object_has_everything(four):
    document = json.loads(json.dumps(four.to_json(per_row=True), allow_nan=False))
    assert [each["name"] for each in document["results"]] == ["base", "qv", "all", "mlp", "qv-2"]
    machine = document["machine"]
    assert len(document["data"]["sha256"]) == 64 and machine["versions"]["torch"] and machine["plan"]["rows_at_once"]
    assert len(document["samples"]) == 4 and set(document["samples"][0]["answers"]) == {"base", "qv", "all", "mlp", "qv-2"}
    base = document["results"][0]
    assert "beside_base" not in base
    for each in document["results"]:
        assert each["num_rows"] == 9 and each["num_answers"] == 4 and len(each["rows"]) == 9
        assert sum(row["loss"] for row in each["rows"]) / each["num_tokens"] == pytest.approx(each["loss"])
        for name, (low, high) in each["intervals"].items():
            assert low <= each[name] <= high
        assert each["bits_per_byte"] == pytest.approx(each["loss"] * each["num_tokens"] / each["num_bytes"] / math.log(2))
    for each in document["results"][1:]:
        assert each["beside_base"]["loss"]["value"] == pytest.approx(each["loss"] - base["loss"])
    assert "rows" not in four.to_json()["results"][0]


def test_one_row_and_no_answers(folders, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "the cat sat on the mat"}\n')
    found = compare(found_in(folders, "qv"), data=str(path), device="cpu")
    figures = found.candidates[1].measured.figures
    assert set(figures) == {"loss", "perplexity", "bits_per_byte", "byte_perplexity"}
    assert all(figure.interval is None for figure in figures.values()) and any("plain text" in note for note in found.notes)
    assert "? unclear" in text_of(found) and json.dumps(found.to_json(), allow_nan=False)


def test_what_steers_a_terminal_is_not_shown(four):
    from dataclasses import replace

    answers = {name: "\x1b]0;x\x07" for name in four.samples[0].answers}
    text = text_of(replace(four, samples=(replace(four.samples[0], prompt="\x1b[2J", reference="a\rb", answers=answers),)))
    assert "\x1b" not in text and "\r" not in text and "\x07" not in text


def test_adapters_with_other_templates_are_held_against_their_own_base(folders, small_model, rows, tmp_path):
    from transformers import AutoTokenizer

    shutil.copytree(folders / "all", tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    tokenizer.chat_template = ("{% for message in messages %}{{ message.role }}: {{ message.content }}<|im_end|>{% endfor %}"
                               "{% if add_generation_prompt %}assistant: {% endif %}")
    tokenizer.save_pretrained(tmp_path / "other")
    found = compare([*found_in(folders, "qv"), find_adapter(str(tmp_path / "other"))], data=str(rows), num_rows=5, num_answers=2,
                    device="cpu")
    assert [each.name for each in found.candidates] == ["base", "base for other", "qv", "other"]
    base, base_for_other, _, other = found.candidates
    assert other.base is base_for_other.measured and any("another chat template" in note for note in found.notes)
    assert base.measured.tokens != base_for_other.measured.tokens
    assert max(len(line.rstrip()) for line in text_of(found).splitlines()) <= 80


# --- rows and mistakes ------------------------------------------------------------------------------------------------


def test_rows_are_the_run_s_or_named(run, rows, tmp_path):
    shutil.copytree(run.adapter, tmp_path / "copy")
    with pytest.raises(DataError) as caught:
        compare(find_adapter(str(tmp_path / "copy")))
    assert "--data FILE" in caught.value.fix
    moved = tmp_path / "run"
    shutil.copytree(run.folder, moved)
    document = json.loads((moved / "resolved.json").read_text())

    def write(path):
        document["recipe"]["data"]["path"] = str(path)
        (moved / "resolved.json").write_text(json.dumps(document))

    write(tmp_path / "gone.jsonl")
    with pytest.raises(DataError) as caught:
        compare(find_adapter(str(moved)))
    assert "gone.jsonl" in caught.value.problem and "--data FILE" in caught.value.fix
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(rows.read_text().splitlines(keepends=True)[3:]))
    write(changed)
    found = compare(find_adapter(str(moved)), num_rows=2, num_answers=1)
    assert not found.held_out and found.num_rows == 2 and "trained on" in found.notes[0]
    named = compare([find_adapter(str(moved)), find_adapter(str(tmp_path / "copy"))], data=str(rows), num_rows=7, num_answers=7)
    assert not named.held_out and named.num_rows == 7 and named.candidates[1].evaluation.num_answers == 7
    assert any("rows of the same file" in note and note.startswith("run:") for note in named.notes)


@pytest.mark.parametrize(("content", "name", "word"), [
    ("", "rows.jsonl", "the file is empty"), ("{nonsense\n", "rows.jsonl", "rows.jsonl:1"),
    ('{"question": 3}\n', "rows.jsonl", "rows.jsonl"),
    ("x", "rows.xyz", "rows.xyz"), ('{"messages": [{"role": "user", "content": "hi"}]}\n', "rows.jsonl", ""),
])
def test_rows_that_cannot_be_used_are_refused(folders, tmp_path, capsys, content, name, word):
    from qlora.cli import main

    (tmp_path / name).write_text(content)
    assert main(["eval", str(folders / "qv"), "--data", str(tmp_path / name), "--device", "cpu"]) == 2
    printed, told = capsys.readouterr()
    assert word in told and "Traceback" not in told and printed == ""


def test_sources_that_are_none_are_refused(run, folders, rows, tmp_path, capsys):
    from qlora.cli import main

    unfinished = tmp_path / "unfinished"
    shutil.copytree(run.folder, unfinished, ignore=shutil.ignore_patterns("adapter", "report*"))
    for words, word in (
        ([tmp_path / "nowhere"], "nowhere"), ([unfinished], "same `qlora train` command again"),
        ([folders / "qv", tmp_path], "no adapter"), ([folders / "qv", "--data", tmp_path / "gone.jsonl"], "gone.jsonl"),
        ([folders / "qv", folders / "all", "--revision", "v1"], "@v1"),
        ([folders / "qv", "--data", rows, "--base", tmp_path], "--base MODEL"),
    ):
        assert main(["eval", *map(str, words), "--device", "cpu"]) == 2
        told = capsys.readouterr().err
        assert word in told and "Traceback" not in told, told


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_plan_follows_what_there_is(run, tmp_path):
    """Less memory means fewer rows at once, and in the end a refusal with the numbers; longer rows need more."""
    from qlora.hardware import find_device
    from qlora.precision import choose_precision

    device = find_device("cpu")
    precision = choose_precision("fp32", device)

    def plan(budget, length=200):
        adapter = with_settings(run, tmp_path / f"{budget}-{length}", {"budget": budget, "streaming": False})
        return plan_evaluation([adapter], device, precision, max_length=length, prompt_tokens=40, answer_tokens=20, num_answers=4)

    plenty = plan("1GiB")
    assert plan("1GiB", 100).phases["eval"] < plenty.phases["eval"] and plenty.rows_at_once == 16 and not plenty.placement.streams
    assert plenty.phases["eval"] > max(plenty.phases["load"], plenty.phases["generate"])
    less = plan(f"{plenty.phases['eval'] // 2048}KiB")
    assert less.rows_at_once < 16 and less.budget_bytes >= max(less.phases.values())
    with pytest.raises(HardwareError) as caught:
        plan("100KiB")
    assert "100 KiB" in caught.value.problem and "--device cpu" in caught.value.fix


def test_answers_are_greedy_whatever_the_base_recommends(small_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora.generation import answer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(small_model), AutoTokenizer.from_pretrained(small_model)

    def written():
        return answer(model, tokenizer, [IDS[0].tolist()], max_new_tokens=12, stop_ids=[])

    plain = written()
    model.generation_config.repetition_penalty, model.generation_config.no_repeat_ngram_size = 5.0, 1
    assert written() == plain and plain[0]
