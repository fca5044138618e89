"""`python data.py FILE`: what a file is, what is left out, and, token by token, what is learnt from it."""
import gzip
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, benchmark

import data

preview = benchmark("preview")
GOOD = {"instruction": "q", "input": "x", "output": "猫!"}
FILES = {       # name -> (records or a text, the kind that is said, the first example, the next command)
    "d.jsonl": ([GOOD], "1 demonstrations", "<|user|>q\n\nx<|assistant|>⟦猫!<|endoftext|>⟧", "sft.py"),
    "turns.json": ([{"messages": [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd")]}],
                   "1 demonstrations", "<|user|>a<|assistant|>b<|endoftext|><|user|>c<|assistant|>⟦d<|endoftext|>⟧", "sft.py"),
    "c.jsonl": ([{"prompt": "q", "output": "o", "chosen": "b", "rejected": "a"}], "1 comparisons of 2 answers",
                "rank 0: <|user|>q<|assistant|>⟦b<|endoftext|>⟧\nrank 1: <|user|>q<|assistant|>⟦a<|endoftext|>⟧",
                "reward.py --out runs/tiny"),
    "k.json": ([{"prompt": "q", "responses": ["b", "c", "d"], "ranks": [1, 0, 1]}], "1 comparisons of 3 answers",
               "rank 0: <|user|>q<|assistant|>⟦c<|endoftext|>⟧\nrank 1: <|user|>q<|assistant|>⟦b<|endoftext|>⟧\n"
               "rank 1: <|user|>q<|assistant|>⟦d<|endoftext|>⟧", "reward.py --out runs/tiny"),
    "p.jsonl": ([{"prompt": "q"}], "1 prompts", "<|user|>q<|assistant|>", "ppo.py --out runs/tiny"),
    "r.jsonl": ([{"text": "one"}, {"text": "two"}], "2 text", "⟦one<|endoftext|>⟧", "sft.py"),
    "l.jsonl": ([{"text": "one", "response": "a label"}], "1 text", "⟦one<|endoftext|>⟧", "sft.py"),
    "t.txt": ("one\n\n\ntwo", "2 text", "⟦one<|endoftext|>⟧", "sft.py"),
    "t.txt.gz": ("one", "1 text", "⟦one<|endoftext|>⟧", "sft.py"),
}


def put(name, folder, content):
    text = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
    text = json.dumps(content) if name.endswith(".json") else text
    (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return folder / name


@pytest.mark.parametrize("name", FILES)
def test_every_kind(name, run, tmp_path, monkeypatch):
    """Usual mistakes: the mask is off by one, so that a model learns to write <|assistant|> and never to stop; the
    whole prompt is learnt; "rejected" is shown as the better one; a preference file is taken for demonstrations."""
    monkeypatch.chdir(tmp_path)         # where there is no tokenizer
    content, kind, example, command = FILES[name]
    done = run(preview, put(name, tmp_path, content))
    assert done.code == 0, done.out
    assert f"{name}: {kind}; skipped: none\n" in done.out and f"\n--- 1\n{example}\n" in done.out, done.out
    assert done.out.endswith(f"\nNext: python {command} --data {tmp_path / name}\n")


def test_the_command_that_is_named_takes_the_file(run, tmp_path):
    """What is said to be next must not end in "not JSON" there, nor in a folder without a model."""
    path = put("d.jsonl", tmp_path, [GOOD] * 40)
    command = re.search("Next: python (.*)", run(preview, path).out)[1].split()
    assert command[0] == "sft.py" and command[-1] == str(path)
    tiny = "--n-layer 1 --n-embd 16 --n-head 1 --vocab-size 300 --pretrain-steps 1 --pretrain-docs 2000 --steps 1 --dtype fp32"
    done = run("sft", *command[1:], *tiny.split(), "--out", tmp_path / "run")
    assert done.code == 0, done.out


def test_what_is_shown_is_what_is_trained_on(run, tmp_path, monkeypatch):
    """Not a second opinion: the ids and the mask are those of encode_example, whatever it returns."""
    monkeypatch.chdir(tmp_path)         # where there is no tokenizer
    monkeypatch.setattr(preview.data, "encode_example", lambda tokenizer, *parts: (tokenizer.encode("abc"), [True, False, True]))
    assert "\n--- 1\n⟦a⟧b⟦c⟧\n" in run(preview, put("d.jsonl", tmp_path, [GOOD])).out


def test_what_is_skipped_and_why(run, tmp_path):
    pair = {"prompt": "q", "chosen": "b", "rejected": "a"}
    done = run(preview, put("c.jsonl", tmp_path, [pair, {**pair, "rejected": "b"}, pair, {**pair, "chosen": "a"}]))
    assert "2 comparisons of 2 answers; skipped: 2 with equal texts" in done.out


def test_lengths_and_three_examples(run, tmp_path, monkeypatch):
    """In characters, special tokens not counted, or in tokens; the first, the middle and the last, cut in the middle only."""
    monkeypatch.chdir(tmp_path)
    texts = ["猫猫", "b" * 90, "c" * 5, "d" * 5, "start " + "e" * 5000 + " end"]
    path = put("p.jsonl", tmp_path, [{"prompt": text} for text in texts])
    characters = run(preview, path).out
    assert "lengths: mean 1,022, longest 5,010 characters" in characters
    assert re.findall("--- (.*)", characters) == ["1", "3", "5"]
    assert "<|user|>start eee" in characters and "eee end<|assistant|>" in characters and "eee [...] eee" in characters
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    for at, size, flags in (("mine.json", 258, ["--tokenizer", "mine.json"]), ("runs/tiny/tokenizer.json", 259, [])):
        tokenizer = data.Tokenizer(data.train_bpe(["eeeeeeee " * 9], size))
        tokenizer.save(at)
        longest = len(data.encode_prompt(tokenizer, texts[-1]))
        assert f"longest {longest:,} tokens" in run(preview, path, *flags).out and longest < 3000


BAD = {"missing.json": None, "latin1.txt": "é".encode("latin1"), "cut.jsonl": b'{"prompt": "q"', "empty.txt": b"", "none.json": b"[]",
       "lacks.jsonl": b'{"prompt": "q", "completion": "a"}\n{"prompt": "q"}\n', "other.jsonl": b'{"question": "q"}'}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_file_is_one_line(name, run, tmp_path):
    if BAD[name] is not None:
        (tmp_path / name).write_bytes(BAD[name])
    done = run(preview, tmp_path / name)
    assert done.code == 2 and done.out.startswith("error: ") and name in done.out and done.out.count("\n") == 1, done.out


@pytest.mark.parametrize("argv", [[], ["--halp"], ["a", "b"], ["a", "--tokeniser", "b"], ["--tokenizer", "b"],
                                  ["a", "--tokenizer", "missing.json"]])
def test_a_wrong_command_is_one_line(argv, run):
    done = run(preview, *argv)
    assert done.code == 2 and done.out.startswith("error: ") and done.out.count("\n") == 1 and "tokenizer" in done.out


def test_as_a_process(tmp_path):
    """Through no other script: it brings its own exit code, and a reader that leaves early costs no traceback."""
    def python(path, tail=""):
        return subprocess.run(f'"{sys.executable}" data.py "{path}" {tail}', shell=True, cwd=ROOT, capture_output=True, text=True)
    broken = python(tmp_path / "missing.jsonl")
    assert broken.returncode == 2 and broken.stdout.count("\n") == 1 and not broken.stderr
    answers = [f"{i}" + "ha " * 300 for i in range(9)]
    path = put("my file.jsonl", tmp_path, [{"prompt": "q" * 900, "responses": answers, "ranks": [*range(9)]}] * 3)
    assert f"--data '{path}'" in python(path).stdout          # it can be pasted
    head = python(path, "| head -1")
    assert head.stdout.count("\n") == 1 and not head.stderr


def test_all_of_a_long_text_is_counted(run, tmp_path, monkeypatch):
    """A text comes in parts. Usual mistake: what is said of it is true of its first part alone."""
    monkeypatch.setattr(data, "PART", 64)
    (tmp_path / "book.txt").write_text("".join(f"This is line {i}.\n\n\n\n" for i in range(53)))
    done = run(preview, tmp_path / "book.txt")
    assert done.code == 0 and "53 text" in done.out, done.out
