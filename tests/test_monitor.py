"""Looks at a run: what they measure, that they change nothing, and advice on runs made to diverge, swing, stall and overfit."""

import json
import math
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from faults.parameters import in_long
from qlora.engine.placement import Placement
from qlora.errors import DivergedError
from qlora.guidance import ADVICE, LEARNING_RATE_BAND, calmer, effective_learning_rate, quicker
from qlora.planning.plan import Decision
from qlora.progress import Progress
from qlora.recipe import build_recipe, load_recipe
from qlora.training.advice import RULES, Advice, Situation, advise


class Notes(Progress):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@dataclass
class Looked:
    """A run of the training loop alone."""

    rows: list[dict[str, Any]]
    told: list[str]
    model: Any
    norms: Any
    monitor: Any

    @property
    def looks(self):
        return [row["monitor"] for row in self.rows if "monitor" in row]

    @property
    def rules(self):
        return [(row["step"], row["advice"]["rule"]) for row in self.rows if "advice" in row]

    @property
    def losses(self):
        return [row["loss"] for row in self.rows if "loss" in row]

    def adapters(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}


def train_setup(setup, folder, *, placement=None, prepare_model=lambda model: None, **changes):
    """The run's own loop, without what comes before and after; `changes` are settings of the section train."""
    from qlora.training.building import build_model
    from qlora.training.run import frozen_norms, watch_adapters
    from qlora.training.stages import assemble, verify

    decisions = dict(setup.plan.decisions)
    settings = {f"train.{name}": value for name, value in changes.items()}
    if placement is not None:
        settings |= placement.to_settings(setup.architecture.num_layers)
        settings["memory.cache_base"] = placement.streams
    for key, value in settings.items():
        decisions[key] = Decision(value, "given", "given")
    steps = decisions["train.max_steps"].value or setup.plan.num_steps
    setup = replace(setup, plan=replace(setup.plan, decisions=decisions, num_steps=steps))
    model, engine = build_model(setup, Progress())
    prepare_model(model)
    norms, rows, notes = frozen_norms(setup, model), [], Notes()
    verify(setup, model, engine, norms.beside)
    trainer = assemble(setup, model, engine, folder, on_row=rows.append)
    watch_adapters(setup, trainer, norms, rows, notes.note)
    trainer.train()
    engine.close()
    return Looked(rows, notes.lines, model, norms, trainer.row_writer.monitor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("monitor")


def setup_of(folder, base, rows, **sections):
    from qlora.training.setup import prepare

    path = folder / f"{len(list(folder.glob('*.jsonl')))}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train = {"sample_rows": 0, **sections.pop("train", {})}
    return prepare(build_recipe(model={"base": str(base), **sections.pop("model", {})}, memory={"device": "cpu"}, train=train,
                                data={"path": str(path), **sections.pop("data", {})}, output=str(folder / "run"), **sections))


def said(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def small(folder, small_model):
    """Two layers with random weights, in fp32; dropout, so that a look that drew a random number would show."""
    words = "the cat sat on the mat and the dog ran to the red house".split()
    rows = [said(f"say {i}", " ".join(words[(3 * i + j) % 13] for j in range(1 + i % 7))) for i in range(40)]
    return setup_of(folder, small_model, rows, model={"dtype": "fp32"}, lora={"dropout": 0.1, "r": 4, "alpha": 8},
                    train={"batch": 4, "micro_batch": 2, "max_steps": 4, "learning_rate": 5e-3}, data={"validation": 0.2})


@pytest.fixture(scope="module")
def shop(folder, root):
    """The embedded base and the quickstart's rows."""
    lines = (root / "recipes" / "data" / "quickstart.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    return setup_of(folder, "builtin:tiny", map(json.loads, lines), data={"validation": 0.1},
                    train={"batch": 4, "learning_rate": 3e-3, "max_steps": 20, "monitor_every": 10, "eval_every": 0})


# --- what is measured --------------------------------------------------------------------------------------------------

_PLACES = {
    "plain": Placement(),
    "fused": Placement(fused_lora=True),
    "fused and tiled": Placement(fused_lora=True, mlp_tile_tokens=8),
    "tiled": Placement(mlp_tile_tokens=8),
    "visited": Placement(offload_activations=True, offload_adapters=True, dequantise_once=True, loss_chunk_bytes=2**20),
    "streamed": Placement(resident_layers=0, fused_lora=True, stream_from="ram", loss_chunk_bytes=2**20),
}

_IN_LONG = ("fused", "tiled")


@pytest.fixture(scope="module")
def without_dropout(small):
    lora = {**small.plan.decisions, "lora.dropout": Decision(0.0, "given", "given")}
    return replace(small, plan=replace(small.plan, decisions=lora))


@pytest.fixture(scope="module")
def plainly(without_dropout, folder):
    return train_setup(without_dropout, folder, monitor_every=1)


@pytest.mark.parametrize("name", [*(name for name in _PLACES if name not in _IN_LONG), *in_long(*_IN_LONG)])
def test_looking_changes_nothing_and_sees_the_same_on_every_path(without_dropout, small, plainly, folder, name):
    """The same bits without looks. Hand-written passes, tiles, visits and streaming all show what the plain model shows."""
    setup = without_dropout if Placement.from_settings({}) != _PLACES[name] else small
    watched, alone = (train_setup(setup, folder, placement=_PLACES[name], monitor_every=every) for every in (1, 0))
    assert watched.losses == alone.losses and len(watched.looks) == 4 and not alone.looks
    mine, theirs = watched.adapters(), alone.adapters()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    if setup is without_dropout:
        for look, expected in zip(watched.looks, plainly.looks, strict=True):
            assert look.keys() == expected.keys()
            for group in look:
                assert look[group] == pytest.approx(expected[group], rel=2e-3), group


def test_gradients_are_those_before_clipping(without_dropout, plainly, folder):
    """Together they are the row's norm, whatever it was clipped to."""
    clipped = train_setup(without_dropout, folder, monitor_every=1, max_grad_norm=0.01, max_steps=1)
    assert clipped.looks[0] == {group: pytest.approx(found, rel=1e-4) for group, found in plainly.looks[0].items()}
    for row in plainly.rows[:2] + clipped.rows[:1]:
        if "monitor" in row:
            parts = [found[kind] for found in row["monitor"].values() for kind in ("grad_a", "grad_b")]
            assert math.hypot(*parts) == pytest.approx(row["grad_norm"], rel=1e-4)
    assert all(found["grad_a"] == 0 < found["grad_b"] for found in plainly.looks[0].values())  # B is zero before the first step
    assert all(found["update_ratio"] == found["path_ratio"] == 0 for found in plainly.looks[0].values())


def test_norms_of_weights_and_updates_are_those_of_the_matrices(plainly):
    import bitsandbytes as bnb

    from qlora.training.monitor import figures, product_norm

    for name, modules in plainly.norms.groups.items():
        weights = [module.layer.get_base_layer().weight for module in modules]
        dense = [bnb.functional.dequantize_4bit(weight.data, weight.quant_state) for weight in weights]
        assert plainly.norms.of(name) == pytest.approx(math.hypot(*(float(w.double().norm()) for w in dense)), rel=1e-5)
        for module in modules:
            a, b = module.halves
            assert product_norm(a, b).item() == pytest.approx(float((b @ a).detach().norm()), rel=1e-4)
        update = math.hypot(*(2 * float((b @ a).detach().norm()) for a, b in (module.halves for module in modules)))
        assert figures(modules)["update"].item() == pytest.approx(update, rel=1e-4)


def test_the_path_is_what_the_layer_adds_to_the_base(plainly):
    """Held against the layer itself, with its adapter on and off."""
    from qlora.training.monitor import path_ratio

    layer = plainly.norms.groups["mlp 1"][0].layer.eval()
    x, tokens = torch.randn(2, 9, layer.in_features, generator=torch.Generator().manual_seed(0)), [1, 4, 8]
    with torch.no_grad():
        both = layer(x)[0, tokens]
        layer.enable_adapters(False)
        base = layer(x)[0, tokens]
        layer.enable_adapters(True)
    assert path_ratio(layer, x, tokens).item() == pytest.approx(float((both - base).norm() / base.norm()), rel=1e-3)
    assert path_ratio(layer, x[0], tokens) is None and path_ratio(layer, x, [9]) is None  # no rows of tokens, another batch


def test_tokens_are_of_the_first_row_and_never_padding():
    from qlora.training.monitor import spread_tokens

    ids = torch.zeros(2, 100, dtype=torch.long)
    right = torch.cat([torch.ones(2, 40), torch.zeros(2, 60)], dim=1)
    assert max(spread_tokens({"input_ids": ids, "attention_mask": right})) < 40
    assert min(spread_tokens({"input_ids": ids, "attention_mask": right.flip(1)})) >= 60
    positions = torch.cat([torch.arange(7), torch.arange(93)])[None]
    assert spread_tokens({"input_ids": ids[:1], "position_ids": positions}) == list(range(7))
    every = spread_tokens({"input_ids": ids})
    assert len(set(every)) == len(every) == 32 and every[0] < 4 and every[-1] > 95


@pytest.mark.parametrize(("num_layers", "names"), [
    (1, ["0"]), (2, ["0", "1"]), (3, ["0", "1", "2"]), (30, ["0-9", "10-19", "20-29"]), (4, ["0-1", "2", "3"]),
])
def test_groups_are_kinds_and_thirds(num_layers, names):
    from tiny_shapes import shape_config

    from qlora.architecture import describe, select_targets
    from qlora.model.adapt import add_adapters
    from qlora.model.meta import build_base_on_meta
    from qlora.precision import Precision
    from qlora.training.monitor import find_groups

    config = shape_config("gpt2", num_layers)
    selection = select_targets(describe(config), "all")
    base = build_base_on_meta(config, precision=Precision("fp32", "fp32", False, "for a test"))
    groups = find_groups(add_adapters(base, selection, r=2, alpha=2, seed=0, dtype=torch.float32), selection)
    assert list(groups) == [f"{kind} {layers}" for kind in ("attention", "mlp") for layers in names]
    assert sum(map(len, groups.values())) == selection.num_modules
    assert all(each.layer.lora_A for modules in groups.values() for each in modules)


@pytest.mark.long
def test_a_look_takes_no_memory_that_the_plan_does_not_have(without_dropout, folder):
    """Tensors at their highest in training, counted by torch, are the same with a look in every step."""
    from qlora.training.cpu_memory import TensorMeter

    def peak(every):
        meter = TensorMeter()
        with meter.watching(), meter.during("train"):
            train_setup(without_dropout, folder, monitor_every=every, max_steps=1)
        return meter.allocated["train"]

    assert peak(1) <= peak(0) * 1.001


def test_every_row_has_the_effective_rate_and_perplexity(plainly):
    rows = [row for row in plainly.rows if "loss" in row]
    assert all(row["effective_learning_rate"] == pytest.approx(2 * row["learning_rate"]) for row in rows)  # alpha is 2 r
    assert all(row["perplexity"] == pytest.approx(math.exp(row["loss"])) for row in rows)


# --- advice on runs made to go wrong -----------------------------------------------------------------------------------


def runs_as_overrides(folder, override):
    """What is advised can be added to the command."""
    path = folder / "any.yaml"
    path.write_text("model: builtin:tiny\ndata: rows.jsonl\n", encoding="utf-8")
    return load_recipe(path, override.split())


def test_a_run_that_diverges(shop, folder):
    found = train_setup(shop, folder, learning_rate=0.1, max_steps=10)
    assert found.rules == [(10, "diverging")]
    advice = next(row["advice"] for row in found.rows if "advice" in row)
    assert advice["override"] == f"train.learning_rate={LEARNING_RATE_BAND[1]:g}"
    assert runs_as_overrides(folder, advice["override"]).train.learning_rate == LEARNING_RATE_BAND[1]
    (line,) = found.told
    assert "step 10, rule diverging" in line and line.endswith(advice["override"]) and "\n" not in line


@pytest.mark.long
def test_a_run_that_swings(shop, folder):
    found = train_setup(shop, folder, learning_rate=3e-2, batch=8, accumulation=1, micro_batch=8, schedule="constant")
    assert "oscillating" in [rule for _, rule in found.rules], found.losses


def test_a_run_that_stalls(shop, folder):
    found = train_setup(shop, folder, learning_rate=1e-6)
    assert found.rules == [(20, "too slow")]
    assert found.rows[-1]["advice"]["override"] == f"train.learning_rate={LEARNING_RATE_BAND[0]:g}"


def test_adapters_that_never_move(shop, folder):
    found = train_setup(shop, folder, learning_rate=1e-30, max_steps=10, monitor_every=5)
    assert found.rules == [(10, "dead adapters")] and "all layers" in found.told[0]
    assert found.rows[-1]["advice"]["override"] == f"train.learning_rate={LEARNING_RATE_BAND[0]:g}"


@pytest.mark.long
def test_adapters_that_no_gradient_reaches(shop, folder):
    """An MLP whose output is multiplied by nothing, as a pruned one."""
    def prune(model):
        for layer in model.get_base_model().model.layers:
            layer.mlp.register_forward_hook(lambda module, args, output: output * 0)

    found = train_setup(shop, folder, max_steps=10, monitor_every=5, prepare_model=prune)
    assert found.rules == [(10, "dead adapters")]
    assert "mlp 0, mlp 1, mlp 2" in found.told[0] and found.rows[-1]["advice"]["override"] == "lora.targets=attention"


def test_a_healthy_run_is_told_nothing(shop, folder):
    found = train_setup(shop, folder)
    assert found.losses[-1] < found.losses[0] / 5 and len(found.looks) == 2
    assert not found.rules and not found.told


def test_a_run_that_learns_by_heart(folder, small_model):
    """Through the whole command: held-out rows of which nothing can be known. Rows, report and plots say it."""
    from qlora.results.report import load_report
    from qlora.training.run import train

    chance, notes, path = random.Random(1), Notes(), folder / "codes.jsonl"
    rows = [said(f"room {chance.randrange(1000)}", "".join(chance.choices("abcdefghij", k=6))) for _ in range(32)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = train(build_recipe(
        model=str(small_model), data={"path": str(path), "validation": 0.5}, memory={"device": "cpu"},
        output=str(folder / "codes"),
        train={"learning_rate": 1e-2, "epochs": 20, "batch": 8, "schedule": "constant", "eval_every": 4, "sample_rows": 0},
    ), notes)
    found = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    (fired,) = [row for row in found if "advice" in row]
    evaluations = {row["step"]: row["eval_loss"] for row in found if "eval_loss" in row}
    best = min((step for step in evaluations if step <= fired["step"]), key=evaluations.__getitem__)
    assert fired["advice"]["rule"] == "overfitting" and f"step {best}" in fired["advice"]["text"] and fired["step"] >= best + 8
    recipe = runs_as_overrides(folder, fired["advice"]["override"])
    assert recipe.train.epochs == pytest.approx(best / 2, abs=0.01) and recipe.lora.r == 8
    assert [line for line in notes.lines if "rule overfitting" in line and fired["advice"]["override"] in line]
    monitor = load_report(result.folder).monitor
    assert [(each.step, each.rule) for each in monitor.advice] == [(fired["step"], "overfitting")] and monitor.num_looks == 4
    text = (result.folder / "report.md").read_text()
    assert "## Monitor" in text and fired["advice"]["override"] in text and "plots/adapters.png" in text
    assert {"gradients.png", "adapters.png"} <= {path.name for path in (result.folder / "plots").iterdir()}


def test_a_loss_that_is_no_number_names_the_rule_too(small, folder):
    with pytest.raises(DivergedError, match=r"(?s)Rule diverging .*train\.learning_rate=0\.0005"):
        train_setup(small, folder, learning_rate=1e30)


# --- the rules, on rows ------------------------------------------------------------------------------------------------

PLAIN = Situation(learning_rate=2e-4, r=16, alpha=16, num_steps=300, warmup_steps=9, epochs=3.0, max_steps=None, keep="best",
                  dtype="bf16", num_rows=3000, targets={"attention": ("q_proj",), "mlp": ("gate_proj", "up_proj")})


def rows_of(losses, every=10, **groups):
    groups = groups or {"attention": {"grad_a": 0.1, "grad_b": 0.2, "update_ratio": 5e-3, "path_ratio": 1e-2}}
    rows = [{"step": i, "epoch": i / 100, "loss": loss, "grad_norm": 1.0} for i, loss in enumerate(losses, 1)]
    for row in rows[every - 1 :: every]:
        row["monitor"] = groups
    return rows


def told_over(rows, situation=PLAIN):
    """Rules as a run would hear of them, look after look."""
    seen, rules = [], []
    for row in rows:
        row = dict(row)
        if "monitor" in row or "eval_loss" in row:
            advice = advise([*seen, row], situation)
            if advice:
                row["advice"] = advice.to_row()
                rules.append((row["step"], advice))
        seen.append(row)
    return rules


@pytest.mark.parametrize(("level", "spread"), [(2.0, 0.8), (1.5, 0.2), (1.0, 0.05), (0.02, 1.0)])
def test_noise_alone_fires_nothing(level, spread):
    """Losses of batches of one row differ several times over, and mean nothing by it."""
    fired = []
    for seed in range(8):
        chance = random.Random(seed)
        losses = [level * (1 - 0.1 * n / 300) * chance.lognormvariate(0, spread) for n in range(300)]
        fired += [advice.rule for _, advice in told_over(rows_of(losses))]
    assert not fired


def test_the_loss_above_its_beginning_and_back_again():
    chance = random.Random(0)
    up = [1.5 + 0.05 * max(0, n - 50) + chance.gauss(0, 0.1) for n in range(150)]
    ((step, advice),) = told_over(rows_of(up))
    assert advice.rule == "diverging" and 60 <= step <= 90
    back = [3 * math.exp(-n / 20) + 0.1 + 0.01 * max(0, n - 100) + chance.gauss(0, 0.03) for n in range(200)]
    ((step, advice),) = told_over(rows_of(back))
    assert advice.rule == "diverging" and step > 110 and "had fallen" in advice.text


def test_swings_without_a_trend():
    chance = random.Random(0)
    swinging = [1.5 - 0.006 * min(n, 50) + (0.6 * math.sin(n / 2.5) if n > 60 else 0) + chance.gauss(0, 0.05) for n in range(140)]
    rules = told_over(rows_of(swinging))
    assert [advice.rule for _, advice in rules] == ["oscillating"] and rules[0][1].override == "train.learning_rate=0.00016"


def test_too_slow_only_where_there_is_room_in_the_band():
    chance = random.Random(0)
    flat = [1.5 + chance.gauss(0, 0.05) for _ in range(120)]
    still = {"attention": {"grad_a": 0.1, "grad_b": 0.2, "update_ratio": 1e-4, "path_ratio": 1e-4}}
    ((step, advice),) = told_over(rows_of(flat, **still))
    assert (step, advice.rule, advice.override) == (90, "too slow", "lora.alpha=32 train.learning_rate=0.0002")
    assert not told_over(rows_of(flat))  # the adapters have changed a lot: there is nothing to learn
    assert not told_over(rows_of(flat, **still), replace(PLAIN, learning_rate=LEARNING_RATE_BAND[1]))
    falling = [loss * (1 - 0.1 * n / 120) for n, loss in enumerate(flat)]
    assert not told_over(rows_of(falling, **still))


def with_evaluations(losses, evaluations, every=20):
    rows = []
    for row in rows_of(losses):
        rows.append(row)
        if row["step"] % every == 0 and row["step"] // every <= len(evaluations):
            rows.append({"step": row["step"], "epoch": row["epoch"], "eval_loss": evaluations[row["step"] // every - 1]})
    return rows


@pytest.mark.parametrize(("evaluations", "fires"), [
    ((2.0, 1.5, 1.6, 1.7), True), ((2.0, 1.5, 1.7, 1.6), False), ((2.0, 1.5, 1.505, 1.51), False),
    ((0.004, 0.002, 0.003, 0.004), False), ((2.0, 1.8, 1.7, 1.8), False),
])
def test_overfitting_is_a_rise_twice_in_a_row_that_counts(evaluations, fires):
    losses = [2 * math.exp(-n / 40) for n in range(100)]
    rules = told_over(with_evaluations(losses, evaluations), replace(PLAIN, keep="last", num_rows=500))
    expected = [(80, "train.keep=best train.epochs=0.4 lora.r=8")] if fires else []
    assert [(step, advice.override) for step, advice in rules] == expected
    flat = [2.0] * 100  # the training loss rises as well: that is not learning by heart
    assert not [advice for _, advice in told_over(with_evaluations(flat, evaluations)) if advice.rule == "overfitting"]


@pytest.mark.parametrize(("dead", "dtype", "override"), [
    (("mlp 0", "mlp 1"), "bf16", "lora.targets=attention"), (("attention 0",), "bf16", "lora.targets=[gate_proj,up_proj]"),
    (("mlp 0",), "bf16", "model.dtype=fp32"), (("attention 0", "mlp 0", "mlp 1"), "fp16", "model.dtype=fp32"),
])
def test_dead_groups_are_named_and_left_out(dead, dtype, override, folder):
    alive, gone = {"grad_a": 0.1, "grad_b": 0.2, "update_ratio": 1e-2}, {"grad_a": 0.0, "grad_b": 0.0, "update_ratio": 0.0}
    groups = {name: gone if name in dead else alive for name in ("attention 0", "mlp 0", "mlp 1")}
    losses = [2 * math.exp(-n / 40) for n in range(40)]
    ((step, advice),) = told_over(rows_of(losses, **groups), replace(PLAIN, dtype=dtype))
    assert (step, advice.rule, advice.override) == (20, "dead adapters", override)
    runs_as_overrides(folder, override)


def test_advice_is_a_function_of_the_rows_and_each_rule_speaks_once():
    """So a run that is gone on with hears what it would have heard."""
    chance = random.Random(0)
    rows = rows_of([1.5 + 0.05 * max(0, n - 50) + chance.gauss(0, 0.1) for n in range(150)])
    ((step, advice),) = told_over(rows)
    at = next(i for i, row in enumerate(rows) if row["step"] == step)
    assert advise(rows[: at + 1], PLAIN) == advice == Advice(**advice.to_row())
    assert advise([*rows[:at], {**rows[at], "advice": advice.to_row()}, *rows[at + 1 :]], PLAIN) is None
    assert advise([], PLAIN) is None and all(rule([], PLAIN) is None for rule in RULES.values())


@pytest.mark.parametrize("rate", [1e-6, 1e-4, 2e-4, 3e-4, 4.5e-4, 5e-4, 1e-3, 1.0])
@pytest.mark.parametrize("alpha", [8, 16, 64])
def test_what_is_tried_next_never_leaves_the_band_upwards(rate, alpha):
    r, (low, high) = 16, LEARNING_RATE_BAND
    before = effective_learning_rate(rate, r, alpha)

    def after(settings):
        return effective_learning_rate(settings.get("train.learning_rate", rate), r, settings.get("lora.alpha", alpha))

    assert after(calmer(rate, r, alpha)) < before and after(calmer(rate, r, alpha)) <= high * 1.001
    assert calmer(rate, r, alpha).get("lora.alpha", alpha) == min(alpha, r) or alpha < r
    faster = quicker(rate, r, alpha)
    assert before < after(faster) <= high * 1.001 if faster else before >= high * 0.999
    assert not faster or after(faster) >= low * 0.999
    assert {"unstable", "slow", "overfitting", "dead"} <= ADVICE.keys()


@pytest.mark.parametrize("num_steps", [5, 60, 499, 500, 1234, 100_000])
def test_looks_are_few_and_enough(num_steps):
    from qlora.planning.choose import _looks

    every, _, reason = _looks(num_steps)
    assert every >= 10 and num_steps / every <= 50 and (num_steps / every > 24 or every == 10) and reason
    assert _looks(None)[0] == 0
