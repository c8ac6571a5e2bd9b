"""`qlora chat`: several adapters on one base, the same answer again, what it says of itself, and bad input."""

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time

import pytest
import torch
from fake_terminal import Fake, conversation

from qlora.adapted import load_adapted
from qlora.chatting import Conversation, about_streaming, shown, talk
from qlora.chatting.commands import COMMANDS, find_name, help_text, split_command
from qlora.chatting.memory import cache_bytes_at, measure_memory, memory_lines
from qlora.chatting.terminal import completions
from qlora.chatting.text import Streamer, cache_bytes
from qlora.errors import ModelError
from qlora.hub.fetch import find_adapter

SAY = {"role": "user", "content": "say 3"}


@pytest.fixture(scope="module")
def folders(small_model, tmp_path_factory):
    """Adapters with nothing learned: `ann` and `bob` differ in rank, alpha, targets and template, and `plain` has none."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = tmp_path_factory.mktemp("adapters")
    made = {}
    for seed, (name, rank, alpha, targets) in enumerate([
        ("ann", 4, 4, ["q_proj", "v_proj"]), ("bob", 8, 16, "all-linear"), ("plain", 2, 2, ["up_proj"]),
    ]):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(small_model)
        model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM"))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(root / name)
        tokenizer = AutoTokenizer.from_pretrained(small_model)
        if name == "bob":
            tokenizer.chat_template = ("{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
                                       "{% if add_generation_prompt %}assistant:{% endif %}")
        if name == "plain":
            tokenizer.chat_template = None
        tokenizer.save_pretrained(root / name)
        made[name] = root / name
    return made


@pytest.fixture(scope="module")
def load(folders):
    """A function that loads adapters by name, freshly."""
    return lambda *names, **options: load_adapted([find_adapter(str(folders[name])) for name in names], **options)


@pytest.fixture(scope="module")
def adapted(load):
    """All of them on one base, loaded once."""
    return load("ann", "bob", "plain")


def greedy(adapted, turns, max_tokens=12):
    """The same answer by the way that training takes."""
    from qlora.generation import answer

    tokenizer = adapted.tokenizer
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return answer(adapted.model, tokenizer, [ids], max_new_tokens=max_tokens, stop_ids=[tokenizer.eos_token_id])[0]


def first_read(adapted, act):
    """The text that the model is given first while something is done."""
    read = []
    hook = adapted.model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    try:
        act()
    finally:
        hook.remove()
    return adapted.tokenizer.decode(read[0][0])


def quiet(text):
    """For pieces that nobody watches."""


# --- turns -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interactive", [True, False])
def test_a_chat_answers_with_its_history(adapted, interactive):
    talked, fake = conversation(adapted, "say 3", "", "and 4", interactive=interactive)
    assert [turn["role"] for turn in talked.turns] == ["user", "assistant", "user", "assistant"]
    assert talked.turns[1]["content"].strip() == greedy(adapted, talked.turns[:1])
    assert talked.turns[3]["content"].strip() == greedy(adapted, talked.turns[:3])
    assert fake.answers == shown(talked.turns[1]["content"]) + "\n" + shown(talked.turns[3]["content"]) + "\n"
    assert len(fake.asides) == (2 if interactive else 0)  # nothing but answers in a pipe


def test_ctrl_c_stops_the_answer_and_not_the_chat(adapted):
    talked, fake = conversation(adapted, "say 3", KeyboardInterrupt, "say 4", stop_after=0, max_tokens=40)
    first, second = talked.turns[1]["content"], talked.turns[3]["content"]
    assert 0 < len(first) < len(conversation(adapted, "say 3", max_tokens=40)[0].turns[1]["content"]) and second
    assert any("Ctrl-D" in note for note in fake.notes)
    with pytest.raises(KeyboardInterrupt):
        conversation(adapted, "say 3", stop_after=0, max_tokens=40, interactive=False)


def test_a_long_conversation_forgets_its_begin_and_says_so_once(adapted):
    talked, fake = conversation(adapted, *["the cat sat on the mat"] * 12, max_tokens=20)
    assert [turn["role"] for turn in talked.turns] == ["user", "assistant"] * (len(talked.turns) // 2)
    assert 4 <= len(talked.turns) < 24
    assert sum("256 tokens: its oldest turns" in note for note in fake.notes) == 1


def test_a_line_that_is_too_long_leaves_the_conversation_as_it_was(adapted):
    talked, fake = conversation(adapted, "say 3", "house " * 17_000)
    assert "tokens long, and the model takes 256" in fake.notes[-2]
    assert talked.turns == conversation(adapted, "say 3")[0].turns


def test_an_answer_ends_where_the_model_does(adapted):
    """At 256 tokens, prompt and answer; or with what the base says that ends its texts."""
    full = Conversation(adapted, max_tokens=10_000, bare=True).answer("say 3", quiet)
    assert full.num_prompt_tokens + full.num_tokens == 256 and not full.is_whole
    config = adapted.model.generation_config
    before, config.eos_token_id = config.eos_token_id, adapted.tokenizer(full.text, add_special_tokens=False).input_ids[1]
    try:
        ended = Conversation(adapted, bare=True).answer("say 3", quiet)
    finally:
        config.eos_token_id = before
    assert ended.is_whole and 0 < ended.num_tokens < full.num_tokens and full.text.startswith(ended.text)


def test_without_a_template_lines_are_gone_on_with(adapted):
    talked, fake = conversation(adapted, "say 3", "/use plain", "the cat", "the cat")
    with adapted.using("plain"):
        from qlora.generation import answer

        ids = adapted.tokenizer("the cat", add_special_tokens=False).input_ids
        expected = answer(adapted.model, adapted.tokenizer, [ids], max_new_tokens=12, stop_ids=[2])[0]
    assert talked.last.text.strip() == expected
    assert talked.turns == conversation(adapted, "say 3")[0].turns  # what was said to the others waits
    assert "Each line is a text" in conversation(adapted, adapter="plain")[1].notes[0]


# --- several adapters --------------------------------------------------------------------------------------------------


def test_after_use_there_and_back_the_answer_is_the_same_and_that_of_a_fresh_chat(adapted, load):
    lines, alone = ("say 3", "and 4"), {name: load(name) for name in ("ann", "bob")}
    for how in ({}, {"temperature": 1.5, "seed": 7}):
        ann, bob, base = (conversation(adapted, f"/use {name}", *lines, **how)[0].turns for name in ("ann", "bob", "base"))
        assert ann != bob != base != ann
        there = ("/use bob", *lines, "/reset", "/use ann", *lines, "/reset", "/base", *lines, "/reset", "/base")
        assert conversation(adapted, *there, *lines, **how)[0].turns == ann
        for name, turns in (("ann", ann), ("bob", bob)):
            assert conversation(alone[name], *lines, **how)[0].turns == turns


def test_each_reads_the_conversation_in_its_own_template(adapted):
    talked = conversation(adapted, "say 3")[0]
    said = talked.turns[1]["content"]
    talked.adapter = "bob"
    read = first_read(adapted, lambda: talked.answer("and 4", quiet))
    assert read == f"user: say 3\nassistant: {said}\nuser: and 4\nassistant:"
    talked.adapter = "ann"
    assert first_read(adapted, lambda: talked.answer("and 5", quiet)).startswith("<|im_start|>user\nsay 3<|im_end|>\n")
    talked.adapter, talked.bare = "bob", True
    read = first_read(adapted, lambda: talked.answer("and 6", quiet))
    assert read.startswith("user: say 3\n")  # the base, as bob would be asked


def test_use_lists_who_there_is_and_finds_names(adapted):
    notes = conversation(adapted, "/use", "/use b", "/use", "/use base", "/use")[1].notes[1:]
    assert [note[0] for note in notes[:4]] == ["*", " ", " ", " "]
    assert "ann" in notes[0] and "rank 4" in notes[0] and "KiB" in notes[0] and str(adapted.adapters["ann"].name) in notes[0]
    assert notes[6].startswith("* bob") and notes[13].startswith("* base")
    names = ["poet-1", "poet-2", "Clerk"]
    assert find_name("clerk", names) == find_name("Cl", names) == "Clerk" and find_name("poet-1", names) == "poet-1"
    for word, told in (("poet", "poet-1 or poet-2"), ("ptoe-1", "Did you mean poet-1?"), ("\x1b[2J", "/use lists")):
        with pytest.raises(ModelError) as caught:
            find_name(word, names)
        assert told in str(caught.value) and "\x1b" not in str(caught.value)


def test_both_and_all_ask_one_line_of_several(adapted):
    def alone(*lines):
        return conversation(adapted, *lines)[0].turns

    talked, fake = conversation(adapted, "say 3", "/both and 4")
    base = conversation(adapted, "say 3", "/base", "and 4")[0].turns[-1]
    assert talked.turns == alone("say 3", "and 4")  # the conversation goes on with the one in use
    assert fake.notes[1:] == ["base:", "ann:"] and [aside.split(" ·")[0] for aside in fake.asides] == ["ann", "base", "ann"]
    assert shown(base["content"]) in fake.answers
    talked, fake = conversation(adapted, "/all", "say 3", "/use bob", "/all")  # the last line, by all
    assert "no line to answer" in fake.notes[1] and fake.notes[3:] == ["base:", "ann:", "bob:", "plain:"]
    assert talked.turns == alone("/use bob", "say 3") and talked.speaker == "bob"
    first, fake = conversation(adapted, "say 3", max_tokens=40)
    stopped, fake = conversation(adapted, "say 3", "/both and 4", stop_after=len(fake.seen) - 1, max_tokens=40)
    assert fake.notes[1:] == ["base:"] and stopped.turns == first.turns
    seeds = conversation(adapted, "/both say 3", temperature=1.0)[1].asides
    assert len({aside.split("seed ")[1] for aside in seeds}) == 1  # what differs is the adapter, not the dice


# --- how it answers ----------------------------------------------------------------------------------------------------


def test_the_seed_makes_sampled_answers_repeatable_and_touches_no_other_random_numbers(adapted):
    state = torch.get_rng_state()
    first = conversation(adapted, "/temperature 1.5", "/seed 7", "say 3")[0].turns
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert conversation(adapted, "say 5", "/reset", "say 3", "/again", temperature=1.5, seed=7)[0].turns == first
    assert conversation(adapted, "say 3", temperature=1.5, seed=8)[0].turns != first
    free = Conversation(adapted, 12, temperature=1.5)
    drawn = [free.answer("say 3", quiet)] + [free.again(quiet) for _ in range(3)]
    assert len({each.text for each in drawn}) > 1
    assert Conversation(adapted, 12, temperature=1.5, seed=drawn[0].seed).answer("say 3", quiet).text == drawn[0].text


def test_settings_tell_what_they_do(adapted):
    talked, fake = conversation(adapted, "/seed", "/seed 5", "/temperature 0.7", "/seed", "/seed off", "/tokens 3", "say 3",
                                "/tokens", "/temperature", "/SEED 2")
    told = fake.notes[1:]
    assert "differ" in told[0] and "no effect at temperature 0" in told[1] and "all words" in told[2]
    assert "same answer" in told[3] and "differ" in told[4] and "3 tokens" in told[5] == told[6] and told[7] == told[2]
    assert talked.seed == 2 and talked.last.num_tokens <= 3
    assert "no effect" in conversation(adapted, seed=5)[1].notes[1]
    assert "no effect" in conversation(adapted, seed=5, interactive=False)[1].notes[0]
    config = adapted.model.generation_config
    config.top_p, config.top_k = 0.8, 20
    try:
        assert "top_p 0.8, top_k 20, as the base recommends" in conversation(adapted, temperature=0.7)[1].notes[1]
    finally:
        config.top_p = config.top_k = None


def test_sampling_follows_the_base_s_recommendation_and_greedy_does_not(load):
    adapted = load("ann", dtype="fp32")  # in which no two words are equally probable
    plain = conversation(adapted, "say 3")[0].turns
    config = adapted.model.generation_config
    config.repetition_penalty, config.top_k = 5.0, 1
    try:
        assert conversation(adapted, "say 3")[0].turns == plain
        config.repetition_penalty = None
        assert conversation(adapted, "say 3", temperature=5.0)[0].turns == plain  # of one word, the most probable one
    finally:
        config.repetition_penalty = config.top_k = None
    assert conversation(adapted, "say 3", temperature=5.0, seed=1)[0].turns != plain
    talked = Conversation(adapted, temperature=1.0)
    assert talked._config(5, [2]).top_k == 0  # transformers would take 50


def test_again_takes_the_place_of_the_answer(adapted):
    talked, fake = conversation(adapted, "/again", "say 3", "and 4", "/use bob", "/again")
    assert "no line to answer" in fake.notes[1]
    two = conversation(adapted, "say 3", "/use bob", "and 4")[0]
    assert talked.turns == two.turns and talked.last.speaker == "bob"
    kept = list(talked.turns)
    with pytest.raises(KeyboardInterrupt):
        talked.again(Fake(stop_after=-1).write)  # stopped with its first piece: that much it has said
    assert len(talked.turns) == 4 and kept[3]["content"].startswith(talked.turns[3]["content"]) and talked.turns != kept
    kept, talked.system = list(talked.turns), "x " * 300
    with pytest.raises(ModelError):
        talked.again(quiet)
    assert talked.turns == kept


def test_a_system_text_goes_before_the_turns(adapted, load):
    talked = conversation(adapted, "/system Be brief.", "say 3")[0]
    read = first_read(adapted, lambda: talked.answer("and 4", quiet))
    assert read.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nsay 3")
    assert talked.turns[0] == SAY and conversation(adapted, "say 3")[0].turns != talked.turns[:2]
    off, fake = conversation(adapted, "/system Be brief.", "/system", "/system off", "say 3", "/use plain", "/system Be brief.")
    assert off.turns == conversation(adapted, "say 3")[0].turns
    assert fake.notes[1:4] == ["System text: Be brief.", "System text: Be brief.", "There is no system text."]
    assert "no chat template that takes a system text" in fake.notes[-2]
    tokenizer = adapted.tokenizer_of("bob")
    before = tokenizer.chat_template
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + before
    try:
        talked, fake = conversation(adapted, "/system Be brief.", "/use bob", "say 3", "/system off", "say 3")
    finally:
        tokenizer.chat_template = before
    assert "bob takes no system text" in fake.notes[3] and "cannot write" in fake.notes[4] and len(talked.turns) == 2


# --- what it takes -----------------------------------------------------------------------------------------------------


def test_memory_is_what_is_there(adapted):
    talked, fake = conversation(adapted, "say 3", "/memory")
    found = measure_memory(talked)
    for name, rank, of_peft in (("ann", 4, "default"), ("bob", 8, None), ("plain", 2, None)):
        of_peft = of_peft or list(adapted.model.peft_config)[list(adapted.adapters).index(name)]
        parts = [p for n, p in adapted.model.named_parameters() if "lora_" in n and of_peft in n.split(".")]
        assert found.adapters[name] == sum(p.numel() * p.element_size() for p in parts) > 0
        assert {min(p.shape) for p in parts} == {rank}
    frozen = [p for n, p in adapted.model.named_parameters() if "lora_" not in n]
    least = sum(p.numel() * p.element_size() for p in frozen)
    packed = sum(p.numel() for p in frozen if p.dtype == torch.uint8)
    assert least + packed * 2 // 64 < found.base < 1.2 * least  # with the scales: one byte for 64 weights, and a few more
    adapted.model.register_buffer("again", adapted.model.get_input_embeddings().weight.data)  # as where the head is tied to it
    try:
        assert measure_memory(talked).base == found.base
    finally:
        del adapted.model.again
    last = talked.last
    assert found.tokens == last.num_prompt_tokens + last.num_tokens and found.cache == last.cache_bytes
    assert found.cache == cache_bytes_at(adapted.model.config, found.tokens - 1, 2) == found.token * (found.tokens - 1)
    assert 0 < found.room == 256 - found.tokens and found.process > 50 * 2**20 and found.free > 0 and found.allocated is None
    shown_lines = memory_lines(talked)
    assert [line.split("  ")[0].strip() for line in shown_lines] == [
        "base", "adapter ann", "adapter bob", "adapter plain", "conversation", "room", "process"]
    assert any("256 in all" in note for note in fake.notes)
    talked.reset()
    assert measure_memory(talked).tokens == 0 and measure_memory(talked).cache == 0


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "qwen3"])
def test_the_formula_of_the_cache_is_what_transformers_keeps(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
             "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    more = {"mistral-window": {"sliding_window": 8}, "gemma3": {"sliding_window": 8, "head_dim": 16}, "qwen3": {"head_dim": 12}}
    kind = {"llama": "llama", "mistral-window": "mistral", "gemma3": "gemma3_text", "qwen3": "qwen3"}[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **more.get(name, {})))
    for length in (5, 20):
        out = model.generate(torch.full((1, length), 3), max_new_tokens=4, min_new_tokens=4, do_sample=False,
                             return_dict_in_generate=True)
        assert cache_bytes(out.past_key_values) == cache_bytes_at(model.config, length + 3, 4)


def test_a_base_that_streams_answers_the_same(load):
    from qlora.engine.placement import Placement
    from qlora.training.evaluating import EvaluationPlan

    lines = ("say 3", "/use bob", "and 4", "/base", "and 5", "/memory")
    whole = conversation(load("ann", "bob"), *lines)[0]
    streamed = load("ann", "bob", plan=EvaluationPlan(Placement(resident_layers=0)))
    try:
        talked, fake = conversation(streamed, *lines)
        assert talked.turns == whole.turns
        assert "2 of 2 layers come from" in about_streaming(streamed)
        assert measure_memory(talked).streamed > 0 and any("come in turns" in note for note in fake.notes)
    finally:
        streamed.close()


# --- text --------------------------------------------------------------------------------------------------------------


def test_pieces_make_up_the_text(adapted, shared):
    from transformers import AutoTokenizer

    numbers = torch.Generator().manual_seed(0)
    for tokenizer in (adapted.tokenizer, AutoTokenizer.from_pretrained(shared / "models" / "stories260K")):
        text = "if so:\n    one()\n\n        two  spaces \u732b \U0001f600 e\u0301"
        code = tokenizer(text, add_special_tokens=False).input_ids
        # Single bytes that make no character turn those around them into none as well; no text has them.
        least = 259 if tokenizer is not adapted.tokenizer else 0
        for ids in (code, *torch.randint(least, len(tokenizer), (8, 40), generator=numbers).tolist()):
            pieces = []
            streamer = Streamer(tokenizer, pieces.append)
            for value in (torch.tensor([[1, 2, 3]]), *torch.tensor(ids)[:, None]):
                streamer.put(value)
            streamer.end()
            whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert "".join(pieces) == whole and streamer.num_tokens == len(ids)
        pieces = []
        streamer = Streamer(tokenizer, pieces.append)
        for value in (torch.tensor([[1]]), *torch.tensor(code)[:, None]):
            streamer.put(value)
        assert len(pieces) > 8 and not any("\ufffd" in piece for piece in pieces)  # at once, and no halves of characters


def test_what_steers_a_terminal_is_not_shown(adapted):
    assert shown("a\x1b[2J\r\x07b\n\tc \xe9 \u732b") == "a\ufffd[2J\ufffd\ufffdb\n\tc \xe9 \u732b"
    seen = []
    raw = Conversation(adapted, 200, bare=True).answer("say 3", seen.append).text
    assert shown(raw) == "".join(seen) != raw  # the base writes anything


def test_completion():
    commands, names = ["/use", "/base", "/both"], ["poet", "poem", "clerk", "base"]
    for line, expected in (
        ("/", commands), ("/b", ["/base", "/both"]), ("/use", ["/use"]), ("/use ", names), ("/use po", names[:2]), ("", []),
        ("po", []), ("say po", []), ("/both po", []), ("/use poet c", []), ("/x", []),
    ):
        assert completions(line, commands, names) == expected, line


# --- bad input ---------------------------------------------------------------------------------------------------------


def test_what_is_a_command():
    assert split_command("/use  poet ") == ("use", "poet") and split_command("/Reset") == ("reset", "")
    assert split_command("/both a\nb") == ("both", "a\nb")
    for line in ("/etc/passwd is a file", "//use", "/", "/ use", "say /use", "/7", ""):
        assert split_command(line) is None, line
    assert all(line.startswith("/") for line in help_text().splitlines())
    assert all(f"/{name}" == command.usage.split(" ")[0] for name, command in COMMANDS.items())


def test_bad_lines_are_answered_with_a_word_and_the_chat_goes_on(adapted):
    lines = ("/bse", "/xyzzy 1", "/use stranger", "/use \x1b[31mbob", "/seed x", "/seed -1", "/seed 99999999999999999999",
             "/seed \u0663", "/temperature hot", "/temperature -1", "/temperature nan", "/tokens 0", "/tokens 1.5",
             "/tokens " + "9" * 5000, "", "   ", "\t")
    talked, fake = conversation(adapted, *lines)
    told = "\n".join(fake.notes)
    assert talked.turns == [] and talked.speaker == "ann" and fake.answers == "" and "\x1b" not in told
    assert (talked.seed, talked.temperature, talked.max_tokens) == (None, 0.0, 12)
    for word in ("mean /base?", "There is no /xyzzy", "called stranger", "x is no seed", "hot is no temp", "0 is no number"):
        assert word in told, word
    assert max(map(len, fake.notes)) < 250
    talked, fake = conversation(adapted, "\x1b[31m\x00 \ud800 \u202e say", "//use bob", "/etc/passwd is a file", "/quit", "say 5")
    assert [turn["content"] for turn in talked.turns[2::2]] == ["/use bob", "/etc/passwd is a file"] and len(talked.turns) == 6


def test_the_end_of_input_ends_the_chat_wherever_it_comes(adapted):
    for interactive in (True, False):
        _, fake = conversation(adapted, interactive=interactive)
        assert "".join(fake.seen) == ("\n" if interactive else "")


def test_memory_that_runs_out_ends_the_answer_and_not_the_chat(adapted):
    class Full(Conversation):
        def _write(self, *given):
            if self.line == "say 3":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super()._write(*given)

    fake, talked = Fake("say 3", "say 4"), Full(adapted, 12)
    talk(talked, fake.terminal)
    assert any("Memory ran out" in note for note in fake.notes) and talked.turns[0]["content"] == "say 4"


def test_what_stops_the_verb_is_said_before_anything_is_loaded(folders, tmp_path, capsys):
    from qlora.cli import main

    unfinished, other = tmp_path / "unfinished", tmp_path / "other"
    unfinished.mkdir()
    (unfinished / "resolved.json").write_text("{}")
    shutil.copytree(folders["ann"], other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "builtin:tiny"}))
    ann = str(folders["ann"])
    for words, told in (
        ([str(tmp_path / "gone")], "folder"), ([ann, str(unfinished)], "not finished"), ([ann, str(other)], "builtin:tiny"),
        ([ann, ann, "--revision", "v2"], "@v2"), ([ann, "--seed", "-1"], "--seed"), ([], "SOURCE"),
    ):
        try:
            code = main(["chat", *words])
        except SystemExit as stopped:
            code = stopped.code
        found = capsys.readouterr()
        assert code == 2 and told in found.err and "Traceback" not in found.err and found.out == "", (words, found.err)


@pytest.mark.long
def test_on_a_terminal(folders):
    """The whole of it, as somebody types it: completion, the dim line after an answer, Ctrl-D."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    words = ["chat", folders["ann"], folders["bob"], "--max-tokens", "8", "--device", "cpu"]
    chat = subprocess.Popen([sys.executable, "-m", "qlora", *words], stdin=slave, stdout=slave, stderr=slave, env=environment,
                            start_new_session=True)
    os.close(slave)
    seen = b""

    def until(word):
        """Read on, and go behind this word."""
        nonlocal seen
        end = time.monotonic() + 120
        while word not in seen:
            assert select.select([master], [], [], max(0, end - time.monotonic()))[0], seen
            try:
                piece = os.read(master, 4096)
            except OSError:  # Linux says so when the other end is closed
                piece = b""
            assert piece, seen
            seen += piece
        seen = seen.partition(word)[2]

    try:
        until(b"> ")
        os.write(master, b"/us\tbo\t\n")
        until(b"With the adapter bob.")
        until(b"> ")
        os.write(master, b"say 3\n")
        until(b"tokens/s")
        until(b"> ")
        os.write(master, b"\x04")
        assert chat.wait(timeout=120) == 0, seen
    finally:
        chat.kill()
        chat.wait()
        os.close(master)
