"""The memory engine in the normal run: what it does for memory changes no number.

Streamed layers are computed by the very operations of the plain run, on the same micro-batches, and gradients are added in the same
order; so on one thread losses, norms, gradients and adapters are compared with `torch.equal`, in bf16 as in fp32. What cannot be equal
is in the second part, with its bound and the reason.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.lab import Outcome, refused, sealed
from faults.parameters import in_long
from safetensors.torch import load_file
from tiny_shapes import NUM_LAYERS, SHAPES, save_shape
from transformers import TrainerCallback

from qlora.engine import shelf
from qlora.engine.placement import Placement
from qlora.engine.schedule import Schedule
from qlora.errors import VerificationError
from qlora.planning.plan import Decision
from qlora.progress import Progress
from qlora.recipe import build_recipe
from qlora.training import run as flow
from qlora.training.session import Clock, make_session
from qlora.training.setup import prepare

pytest_plugins = ["faults.fixtures"]

NUM_STEPS = 10


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """On several, torch shares products among them in ways that may change bits from one call to the next."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Conversations of 1 to 30 words: rows of a micro-batch are never as long as each other."""
    words = "the cat sat on the mat and the dog ran to the red house".split()
    lines = []
    for i in range(44):
        answer = " ".join(words[(i * 3 + j) % len(words)] for j in range(1 + i * 7 % 30))
        lines.append({"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": answer}]})
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shapes(small_model, tmp_path_factory):
    home = tmp_path_factory.mktemp("shapes")
    return {name: save_shape(name, home / name, small_model) for name in SHAPES}


@dataclass
class Seen:
    """What a run came to.

    Attributes:
        gradients: of each step, after clipping.
        micro_batches: how many each step had.
        loads: of all layers, before the first step and up to the end of each.
    """

    rows: list = field(default_factory=list)
    gradients: list = field(default_factory=list)
    loads: list = field(default_factory=list)
    micro_batches: list = field(default_factory=list)
    adapter: dict = field(default_factory=dict)
    folder: Path | None = None
    trainer: Any = None

    def differences(self, other: Seen) -> list[str]:
        """Names of what is not the same, to the last bit."""
        found = [f"{key} of step {mine['step']}: {mine.get(key)}, not {theirs.get(key)}"
                 for mine, theirs in zip(self.rows, other.rows, strict=True) for key in ("step", "loss", "grad_norm", "eval_loss")
                 if mine.get(key) != theirs.get(key)]
        for step, (mine, theirs) in enumerate(zip(self.gradients, other.gradients, strict=True), 1):
            found += [f"the gradient of {name} in step {step}" for name in theirs if not torch.equal(mine[name], theirs[name])]
        assert self.adapter.keys() == other.adapter.keys()
        return found + [f"the adapter's {name}" for name, tensor in other.adapter.items() if not torch.equal(self.adapter[name], tensor)]


def relative_error(found, expected):
    """Of all tensors together."""
    distance = sum((found[name].double() - tensor.double()).square().sum() for name, tensor in expected.items())
    return float((distance / sum(tensor.double().square().sum() for tensor in expected.values())).sqrt())


class Watch(TrainerCallback):
    """Notes gradients before each optimizer step, and how many layers have been brought until then."""

    def __init__(self, trainer, seen):
        self.trainer, self.seen = trainer, seen

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.loads.append(sum(self.trainer.engine.stream.num_loads))
        self.seen.trainer = self.trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.seen.gradients.append({n: p.grad.clone() for n, p in self.trainer.model.named_parameters() if p.requires_grad})
        self.seen.loads.append(sum(self.trainer.engine.stream.num_loads))
        self.seen.micro_batches.append(self.trainer.step.micro_batches)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs a prepared setup with a placement, without the trial before it and the report after it."""
    seen, assemble = [], flow.assemble

    def watched(*args, **kwargs):
        trainer = assemble(*args, **kwargs)
        trainer.add_callback(Watch(trainer, seen[-1]))
        return trainer

    monkeypatch.setattr(flow, "assemble", watched)
    monkeypatch.setattr(flow, "try_out", lambda *args: None)
    monkeypatch.setattr(flow, "write_results", lambda *args: None)

    def start(setup, placement=None, *, cached=False):
        placement = placement or Placement()
        settings = {**placement.to_settings(setup.architecture.num_layers), "memory.cache_base": cached or placement.streams}
        decisions = {**setup.plan.decisions, **{key: Decision(value, "given", "given") for key, value in settings.items()}}
        placed = replace(setup, plan=replace(setup.plan, decisions=decisions))
        folder = tmp_path / f"run-{len(seen)}"
        folder.mkdir()
        seen.append(Seen(folder=folder))
        result = flow.run(make_session(placed, folder, None, Clock(), Progress()))
        found = seen[-1]
        found.rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        found.adapter = load_file(result.adapter / "adapter_model.safetensors")
        return found

    start.seen = seen
    return start


@pytest.fixture(scope="session")
def prepared(shapes, rows):
    """A function that decides all settings of a run but what the engine does. They come from one plan, whatever the shape, because
    planning takes longer than the run; tests of plans are elsewhere.
    """

    def recipe_for(shape, *, packing=False, accumulation=3, dtype="bf16", **data):
        return build_recipe(
            model={"base": str(shapes[shape]), "dtype": dtype}, lora={"r": 8, "dropout": 0},
            data={"path": str(rows), "validation": 0.0, "packing": packing, **({"max_length": 64} if packing else {}), **data},
            train={"max_steps": NUM_STEPS, "micro_batch": 1 if accumulation == 8 else 2, "accumulation": accumulation,
                   "optimizer": "adamw", "learning_rate": 5e-3, "eval_every": 0, "save_every": 0, "sample_rows": 0},
            memory={"device": "cpu", "checkpointing": True}, output="unused",
        )

    one_for_all = prepare(recipe_for("llama")).plan

    @cache
    def make(shape, **choices):
        recipe = recipe_for(shape, **choices)
        given = {f"{section}.{name}": getattr(getattr(recipe, section), name) for section, name in (
            ("data", "packing"), ("train", "micro_batch"), ("train", "accumulation"))}
        given |= {"train.batch": recipe.train.micro_batch * recipe.train.accumulation}
        if recipe.data.packing:
            given["data.max_length"] = recipe.data.max_length
        decisions = {**one_for_all.decisions, **{key: Decision(value, "given", "given") for key, value in given.items()}}
        return prepare(recipe, plan=replace(one_for_all, decisions=decisions))

    return make


def streamed(resident, **more):
    return Placement(resident_layers=resident, **more)


# --- equal to the last bit -------------------------------------------------------------------------------------------------

# Each shape, padding and packing, both types, each accumulation and each number of resident layers is in some of them.
_CASES = [
    ("llama", False, 3, "bf16", (streamed(0), "cached")),
    ("qwen3", True, 1, "fp32", (streamed(1, stream_from="ram"),)),
    ("gemma3", False, 8, "fp32", (streamed(0, stream_from="ram", dequantise_once=True),)),
    pytest.param("gemma3", True, 3, "bf16", (streamed(1),), marks=pytest.mark.long),
    ("gpt2", False, 8, "bf16", (streamed(2, dequantise_once=True, offload_adapters=True), streamed(0, visit_micro_batches=3))),
]


@pytest.mark.parametrize(("shape", "packing", "accumulation", "dtype", "placements"), _CASES,
                         ids=lambda value: str(value) if isinstance(value, (str, int)) else "")
def test_streamed_equals_resident(run, prepared, shape, packing, accumulation, dtype, placements):
    check_equal(run, prepared(shape, packing=packing, accumulation=accumulation, dtype=dtype), placements)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("accumulation", [1, 3, 8])
@pytest.mark.parametrize("packing", [False, True], ids=["padding", "packing"])
@pytest.mark.parametrize("shape", SHAPES)
def test_streamed_equals_resident_in_every_combination(run, prepared, shape, packing, accumulation, dtype):
    setup = prepared(shape, packing=packing, accumulation=accumulation, dtype=dtype)
    check_equal(run, setup, [streamed(0), streamed(1), streamed(2, stream_from="ram"), "cached"])


def check_equal(run, setup, placements):
    plain = run(setup)
    assert len(plain.gradients) == NUM_STEPS
    assert any(tensor.any() for name, tensor in plain.adapter.items() if "lora_B" in name)  # it was not all zeros that was equal
    for placement in placements:
        found = run(setup, cached=True) if placement == "cached" else run(setup, placement)
        assert not found.differences(plain), placement
        if placement != "cached":
            check_loads(found, NUM_LAYERS - placement.resident_layers, placement.visit_micro_batches)


def check_loads(seen, num_streamed, at_once, num_slots=2):
    """Twice for each round through the layers, less what is in the slots at its two turns; and one round a step, unless fewer
    micro-batches are to go through at once. Before the first round there was no turn, but the check of the base before it may have
    left the layers that it begins with.
    """
    kept, rounds = min(num_slots, num_streamed), [-(-number // (at_once or number)) for number in seen.micro_batches]
    first, *later = (after - before for before, after in zip(seen.loads, seen.loads[1:], strict=False))
    expected, *others = (2 * (num_streamed - kept) * number for number in rounds)
    assert later == others
    assert expected <= first <= expected + kept


# --- through the command ---------------------------------------------------------------------------------------------------

_EXACT = ("lora.dropout=0",)
_STREAMED = ("memory.streaming=true", "memory.resident_layers=0")


@pytest.fixture(scope="session")
def deep(shapes):
    """More layers than slots, so that a run reads from the store in every step."""
    return f"model.base={shapes['llama']}"


@pytest.fixture(scope="session")
def base_used_last(zygote):
    """The folder of the quantised base that a run used last."""
    from faults.runner import environment

    home = Path(environment()["QLORA_CACHE"])
    return lambda: max(home.rglob(shelf.MANIFEST), key=lambda path: path.stat().st_mtime_ns).parent


def test_a_streamed_run_comes_to_what_the_plain_one_does(lab, deep):
    """With the trial, evaluations on the way, and answers that streamed layers write."""
    plain, streamed = (lab.reference(deep, *_EXACT, *words) for words in ((), _STREAMED))
    assert not streamed.differences(plain)
    assert any("eval_loss" in row for row in plain.rows) and plain.judged["after"]["num_answers"] > 0


@pytest.mark.parametrize("damage", ["flipped", *in_long("none", "shorter")])
def test_killed_and_gone_on_with_it_is_uninterrupted(lab, deep, base_used_last, damage):
    """Also when the store has been damaged meanwhile: it is made anew."""
    words, folder = (deep, *_EXACT, *_STREAMED), lab.folder()
    lab.reference(*words)
    assert lab.run(folder, *words, faults=[("at_step", {"step": 5, "action": "die"})]).code < 0
    assert sealed(folder) == [2, 4]
    store = base_used_last()
    if damage == "flipped":
        spoil(store / shelf.LAYERS)
    elif damage == "shorter":
        os.truncate(store / shelf.LAYERS, os.path.getsize(store / shelf.LAYERS) - 1)
    done = lab.run(folder, *words)
    if damage == "flipped":  # found out when that layer is read
        refused(done, 2, "damaged", "repairs")
        done = lab.run(folder, *words)
    assert done.code == 0, done.told
    assert not Outcome.of(folder).differences(lab.reference(*words))


def test_a_disk_that_fails_in_the_middle(lab, deep):
    """One error, no traceback, and the same result when the disk is back."""
    words, folder = (deep, *_EXACT, *_STREAMED, "memory.stream_from=disk"), lab.folder()
    done = lab.run(folder, *words, faults=[("fail_to_read", {"step": 6})])
    refused(done, 2, "cannot be read", os.strerror(errno.EIO), "goes on from the last checkpoint")
    assert sealed(folder) == [2, 4]
    lab.finish(folder, *words, said=["step 4"], like=lab.reference(deep, *_EXACT))


# --- faults inside a step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["backward", *in_long("forward")])
def test_a_streamed_step_that_runs_out_of_memory_is_run_again_in_parts(run, prepared, monkeypatch, where):
    """In fp32 rows come to the same gradients alone as together, padding kept (see `qlora.model.exact`)."""
    setup = prepared("llama", dtype="fp32")
    plain = run(setup)
    compute, failed, sizes = Schedule._compute, [], []

    def sometimes(self, number, each, hidden):
        seen = run.seen[-1]
        sizes.append((len(seen.gradients), len(hidden)))
        if not failed and len(seen.gradients) == 2 and number == 1 and hidden.requires_grad == (where == "backward"):
            failed.append(number)
            raise torch.OutOfMemoryError("injected")
        return compute(self, number, each, hidden)

    monkeypatch.setattr(Schedule, "_compute", sometimes)
    found = run(setup, streamed(0))
    assert failed
    assert {rows for step, rows in sizes if step < 2} == {2} and {rows for step, rows in sizes if step > 2} == {1}
    changed = [each for each in found.differences(plain) if not each.startswith("loss")]  # a sum of two numbers, rounded
    assert not changed
    assert [row["loss"] for row in found.rows] == pytest.approx([row["loss"] for row in plain.rows], rel=1e-6)


@pytest.mark.parametrize("place", ["resident", *in_long("ram", "disk")])
def test_a_base_that_changed_on_the_way_is_noticed(run, prepared, base_used_last, monkeypatch, place):
    """One bit of one layer, in memory or on the disk, after the first step."""

    def spoil_layer(self, args, state, control, **kwargs):
        plain(self, args, state, control, **kwargs)
        stream = self.trainer.engine.stream
        if state.global_step == 1 and place == "resident":
            stream.blocks[-1][100] ^= 1
        elif state.global_step == 1 and place == "ram":
            stream._source._blocks[0][100] ^= 1
        elif state.global_step == 1:
            newest = base_used_last() / shelf.LAYERS
            before.append((newest, newest.read_bytes()))
            spoil(newest)

    before = []
    plain = Watch.on_pre_optimizer_step
    monkeypatch.setattr(Watch, "on_pre_optimizer_step", spoil_layer)
    placement = streamed(1) if place == "resident" else streamed(0, stream_from=place)
    try:
        with pytest.raises(VerificationError, match="changed during training"):
            run(prepared("llama"), placement)
    finally:
        for path, content in before:
            path.write_bytes(content)


def spoil(path):
    """Another bit in the middle of the first layer."""
    with open(path, "r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))


# --- the engine's other parts ----------------------------------------------------------------------------------------------

_EQUAL = {
    "offload_activations": Placement(offload_activations=True), "offload_adapters": Placement(offload_adapters=True),
    "embedding_device": Placement(embedding_device="host"), "dequantise_once": Placement(dequantise_once=True),
    "all that is exact": streamed(1, offload_activations=True, offload_adapters=True, embedding_device="host",
                                  dequantise_once=True),
}
# The adapter after ten steps against the plain one, relative, and the losses. Measured on one core with AVX-512 (torch 2.13); bounds
# are ten times that. In fp32 what rounds in another order moves the last bits, and Adam's first steps, which are as long for
# a small gradient as for a large one, make more of them; int8 and nf4 heads are other heads.
_CLOSE = {
    "fused_lora": (Placement(fused_lora=True), 1e-5, 2e-6),
    "mlp_tile": (Placement(mlp_tile_tokens=16), 1e-5, 2e-6),
    "loss_chunk": (Placement(loss_chunk_bytes=2**20), 1e-5, 2e-6),
    "streamed head": (Placement(loss_chunk_bytes=2**20, head_format="streamed"), 1e-5, 2e-6),
    "int8 head": (Placement(loss_chunk_bytes=2**20, head_format="int8"), 0.2, 0.01),
    "nf4 head": (Placement(loss_chunk_bytes=2**20, head_format="nf4"), 0.6, 0.1),
    "all of it": (streamed(0, fused_lora=True, mlp_tile_tokens=16, loss_chunk_bytes=2**20, head_format="streamed",
                           embedding_device="host", offload_activations=True, offload_adapters=True, dequantise_once=True),
                  1e-5, 2e-6),
}


@pytest.fixture(scope="module")
def kept():
    """What plain runs came to."""
    return {}


@pytest.mark.parametrize("name", ["all that is exact", *in_long(*(name for name in _EQUAL if name != "all that is exact"))])
def test_what_is_exact_changes_nothing(run, prepared, kept, name):
    setup = prepared("llama")
    plain = kept.setdefault("bf16", kept.get("bf16") or run(setup))
    assert not run(setup, _EQUAL[name], cached=True).differences(plain)


@pytest.mark.parametrize("name", ["all of it", "int8 head", *in_long(*(n for n in _CLOSE if n not in ("all of it", "int8 head")))])
def test_what_rounds_in_another_order_stays_close(run, prepared, kept, shapes, name):
    setup = prepared("llama", dtype="fp32")
    plain = kept.setdefault("fp32", kept.get("fp32") or run(setup))
    placement, of_adapter, of_loss = _CLOSE[name]
    found = run(setup, placement, cached=True)
    error = relative_error(found.adapter, plain.adapter)
    losses = [[row["loss"] for row in each.rows] for each in (found, plain)]
    worst = max(abs(mine / theirs - 1) for mine, theirs in zip(*losses, strict=True))
    first = relative_error(found.gradients[0], plain.gradients[0])
    print(f"{name}: adapter {error:.2e}, losses {worst:.2e}, first gradient {first:.2e}")
    assert error <= of_adapter and worst <= of_loss
    assert found.differences(plain)  # else there was nothing to bound: the placement was not in effect
    loads_with_peft(shapes["llama"], found)


def loads_with_peft(base, found):
    """With nothing of ours, on the plain base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), found.folder / "adapter")
    loaded = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    assert loaded.keys() == found.adapter.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in found.adapter.items())
