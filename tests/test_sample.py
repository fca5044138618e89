"""Using a model: which one, how often, in whole characters, with its code run; and what cannot be asked of it."""
import contextlib

import pytest
import torch

from conftest import benchmark

import data
import sample
import training
import world
from config import SampleConfig
from model import Generation

chat = benchmark("chat")

@pytest.fixture(scope="module")
def bytewise():
    """No merges: every token is one byte, so every Chinese character comes in three."""
    return data.Tokenizer(data.train_bpe([""], 256))


def test_five_samples_are_reproducible(tiny_run, run):
    """The same seed, the same five answers; another seed, others. The five differ from one another."""
    ask = ["--out", tiny_run.folder, "--prompt", "Hello", "--num-samples", 5, "--max-new-tokens", 12, "--temperature", 1]
    first, again, other = (run("sample", *ask, "--seed", seed) for seed in (3, 3, 4))
    assert first.code == 0, first.out
    assert first.out == again.out and first.out.splitlines()[1:] != other.out.splitlines()[1:]
    answers = [part.split("] ", 1)[-1] for part in first.out.split("\n[")[1:]]
    assert len(answers) == 5 and len(set(answers)) > 2
    assert all(f"[{i}] " in first.out for i in range(1, 6))


def test_the_furthest_stage_is_used(tiny_run, run, tmp_path):
    """Without --stage the last step that the run has; a missing one is named together with those that are there."""
    ask = ["--prompt", "Hello", "--max-new-tokens", 3]
    assert "sft.pt" in run("sample", "--out", tiny_run.folder, *ask).out
    assert "base.pt" in run("sample", "--out", tiny_run.folder, *ask, "--stage", "base").out
    missing = run("sample", "--out", tiny_run.folder, *ask, "--stage", "ppo")
    assert missing.code == 2 and missing.out.count("\n") == 1
    assert "no finished ppo" in missing.out and "python ppo.py" in missing.out
    nothing = run("sample", "--out", tmp_path, *ask)
    assert nothing.code == 2 and "python sft.py" in nothing.out and nothing.out.count("\n") == 1


def test_what_cannot_be_asked(tiny_run, run):
    nothing = run("sample", "--out", tiny_run.folder)
    assert nothing.code == 2 and "--prompt" in nothing.out and "--chat" in nothing.out
    long = run("sample", "--out", tiny_run.folder, "--prompt", "ha " * 400)
    assert long.code == 2 and "256" in long.out.splitlines()[-1] and "Traceback" not in long.out


def test_the_input_is_part_of_the_prompt(tiny_run, run, monkeypatch):
    seen, generate = [], training.generate

    def recording(model, prompts, *args, **kwargs):
        seen.append(prompts)
        return generate(model, prompts, *args, **kwargs)
    monkeypatch.setattr(training, "generate", recording)
    tokenizer = data.Tokenizer.load(tiny_run.folder / "tokenizer.json")
    ask = ["--out", tiny_run.folder, "--prompt", "Who?", "--input", "Anna likes tea.", "--max-new-tokens", 2]
    run("sample", *ask, "--num-samples", 2)
    run("sample", *ask, "--stage", "base")
    assert seen == [[data.encode_prompt(tokenizer, "Who?", "Anna likes tea.")] * 2,
                    [[tokenizer.end, *tokenizer.encode("Who? Anna likes tea.")]]]      # a base knows no turns


def test_the_stages_side_by_side(tiny_run, run, monkeypatch):
    """--compare: one labelled block for each stage that the run has and each prompt, the same prompt for all."""
    monkeypatch.setattr(sample, "answers", lambda model, tokenizer, prompt, *rest: [tokenizer.decode(prompt)])
    ask = ["--out", tiny_run.folder, "--compare"]
    one = run("sample", *ask, "--prompt", "Who?", "--input", "Anna.")
    assert one.code == 0, one.out
    assert one.out.endswith("\n\n=== base: Who? Anna.\nWho? Anna.\n\n=== sft: Who? Anna.\nWho?\n\nAnna.\n")
    fixed = run("sample", *ask)
    labels = [line for line in fixed.out.splitlines() if line.startswith("=== ")]
    assert [label.split()[1] for label in labels] == ["base:", "sft:"] * len(sample.SHOWN)
    assert all(fixed.out.count(" ".join(question).strip()) >= 2 for question in sample.SHOWN)
    real = run("sample", *ask, "--stage", "ppo", "--max-new-tokens", 2)
    assert real.code == 0 and "=== sft" in real.out, "a stage that is missing is not compared"


def test_the_fixed_question_is_not_trained_on():
    instruction, text = sample.SHOWN[-1]
    task = world.Task("closed_qa", instruction, text, "The text does not say.", ("refuse", "Nick is a driver."))
    assert task.split == "test"


# ---------------------------------------------------------------- the stream and the chat

@pytest.mark.parametrize("text", ["猫 and 🐱!", "é" * 5, "plain", "", "a\ufffdb", "👩‍👩‍👧猫"])
def test_whole_characters_only(text, bytewise, capsys):
    """A character whose bytes are not all there waits for them; what was shown is never taken back."""
    pieces, shown = [], ""
    stream = chat.stream(bytewise, pieces)
    for i in bytewise.encode(text):
        stream([i])
        new = capsys.readouterr().out
        assert len(new) <= 2
        shown += new
        assert text.startswith(shown)
    assert shown == text == "".join(pieces)


def test_broken_bytes_do_not_stop_the_stream(bytewise, capsys):
    """A model may sample half a character and then another one: that half is shown as such, and the rest goes on."""
    stream = chat.stream(bytewise, [])
    for i in [ord("a"), 0xE7, 0x8C, ord("b"), 0xFF, *"猫".encode(), bytewise.end]:
        stream([i])
    stream([None])
    assert capsys.readouterr().out == "a\ufffdb\ufffd猫"


def talk(monkeypatch, capsys, folder, questions, answers=None, stage="sft", **changes):
    """A chat with these questions -> (the prompts that the model got, what was printed)."""
    model, tokenizer, _ = training.load_model(folder, "sft")
    lines, prompts, generate = iter(questions), [], training.generate

    def ask(prompt):
        try:
            line = next(lines)
        except StopIteration:
            raise EOFError from None
        if isinstance(line, type):
            raise line
        return line

    def recording(model, prompt, *args, on_token, **kwargs):
        prompts.append(prompt[0])
        if answers is None:
            return generate(model, prompt, *args, on_token=on_token, **kwargs)
        for i in tokenizer.encode(answers[len(prompts) - 1]):
            on_token([i])
        if answers[len(prompts) - 1].endswith("^C"):
            raise KeyboardInterrupt
        return Generation([tokenizer.encode(answers[len(prompts) - 1])], None)
    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(training, "generate", recording)
    chat.chat(model, tokenizer, stage, SampleConfig(**{"max_new_tokens": 5, **changes}), contextlib.nullcontext())
    return tokenizer, prompts, capsys.readouterr().out


def test_every_turn_has_its_own_seed(tiny_run, monkeypatch, capsys):
    """The usual mistake: one seed for the whole chat, and the same question gets the same answer word for word."""
    seeds, generator = [], torch.Generator

    class Recording(generator):
        def manual_seed(self, seed):
            seeds.append(seed)
            return super().manual_seed(seed)
    monkeypatch.setattr(torch, "Generator", Recording)
    talk(monkeypatch, capsys, tiny_run.folder, ["again", "again", "again"], seed=7)
    assert seeds == [7, 8, 9]


def test_a_chat_remembers(tiny_run, monkeypatch, capsys):
    """Every turn stands in the prompt of the next, ended as the model's own answers are. An empty line ends the chat."""
    tokenizer, prompts, shown = talk(monkeypatch, capsys, tiny_run.folder, ["I am Anna.", "Who am I?", ""], ["Hi!", "Anna."])
    assert prompts == [data.encode_prompt(tokenizer, "I am Anna."),
                       data.encode_prompt(tokenizer, "Who am I?", history=[("I am Anna.", "Hi!")])]
    assert "model> Hi!\n" in shown and "model> Anna.\n" in shown and shown.endswith("bye\n")


def test_the_oldest_turn_is_dropped_when_the_context_is_full(tiny_run, monkeypatch, capsys):
    """Not the question, and not half a turn; there is always room for an answer."""
    questions = [f"question {i} " + "word " * 9 for i in range(9)]
    tokenizer, prompts, _ = talk(monkeypatch, capsys, tiny_run.folder, questions, ["an answer"] * 9)
    assert max(map(len, prompts)) <= 128 < sum(map(len, prompts[:3]))
    for i, prompt in enumerate(prompts):
        turns = prompt.count(tokenizer.user) - 1
        history = [(q.strip(), "an answer") for q in questions[i - turns:i]]
        assert prompt == data.encode_prompt(tokenizer, questions[i].strip(), history=history)
    assert 0 < prompts[-1].count(tokenizer.user) - 1 < 8


def test_a_base_is_not_asked_in_turns(tiny_run, monkeypatch, capsys):
    """--chat with GPT-2 as published: it continues what was said. Usual mistake: the rows of turn tokens that nobody trained."""
    tokenizer, prompts, _ = talk(monkeypatch, capsys, tiny_run.folder, ["I am Anna.", "And"], ["Hi!", "."], stage="base")
    assert prompts == [[tokenizer.end, *tokenizer.encode("I am Anna.")], [tokenizer.end, *tokenizer.encode("I am Anna. Hi! And")]]


def test_ctrl_c_stops_the_answer_and_not_the_chat(tiny_run, monkeypatch, capsys):
    _, prompts, shown = talk(monkeypatch, capsys, tiny_run.folder, ["one", "two"], ["never endi^C", "fine"])
    assert "never endi^C [stopped]\n" in shown and "model> fine" in shown and len(prompts) == 2
    _, prompts, shown = talk(monkeypatch, capsys, tiny_run.folder, [KeyboardInterrupt], [])
    assert shown.endswith("bye\n") and not prompts


def test_a_question_that_does_not_fit_does_not_end_the_chat(tiny_run, monkeypatch, capsys):
    _, prompts, shown = talk(monkeypatch, capsys, tiny_run.folder, ["ha " * 400, "short"])
    assert "[" in shown and "256" in shown and len(prompts) == 1 and shown.endswith("bye\n")


def test_a_chat_through_the_command_line(tiny_run, run):
    done = run("sample", "--out", tiny_run.folder, "--chat", "--max-new-tokens", 4, stdin="hello\nand you?\n")
    assert done.code == 0 and done.out.count("model> ") == 2 and done.out.endswith("bye\n")


# ---------------------------------------------------------------- running what it wrote

GAME = "n = 3\nwhile True:\n    g = int(input())\n    if g == n:\n        print('right')\n        break\n    print('no')"


@pytest.mark.parametrize("answer, stdin, words", [
    ("print(6 * 7)", "", ["it runs: yes", "it prints:\n42"]),
    ("Sure! print(6 * 7)", "", ["it runs: yes", "42"]),                     # the habit is no part of the program
    ("def f(a, b):\n    return a", "", ["it runs: yes", "it prints nothing (it defines a function)"]),
    ("1 / 0", "", ["it runs: ZeroDivisionError"]),
    ("le chat rouge", "", ["it runs: SyntaxError"]),
    (GAME, "", ["it runs: EOFError", "seq 100 | python sample.py"]),
    (GAME, "1\n2\n3\n", ["it runs: yes", "no\nno\nright"]),
])
def test_code_is_shown_and_run(answer, stdin, words, tiny_run, run, monkeypatch):
    monkeypatch.setattr(sample, "answers", lambda *args, **kwargs: [answer])
    done = run("sample", "--out", tiny_run.folder, "--prompt", "code", "--execute", stdin=stdin)
    assert done.code == 0 and answer in done.out and all(word in done.out for word in words), done.out


def test_every_sample_gets_the_input(tiny_run, run, monkeypatch):
    """The usual mistake: the first program reads all of stdin, and the other four find it empty."""
    monkeypatch.setattr(sample, "answers", lambda *args, **kwargs: [GAME] * 3)
    done = run("sample", "--out", tiny_run.folder, "--prompt", "game", "--execute", "--num-samples", 3, stdin="3\n")
    assert done.out.count("it runs: yes") == 3


def test_nothing_runs_unasked(tiny_run, run, monkeypatch):
    monkeypatch.setattr(sample, "answers", lambda *args, **kwargs: ["print('ran' * 3)"])
    assert "ranranran" not in run("sample", "--out", tiny_run.folder, "--prompt", "code").out
