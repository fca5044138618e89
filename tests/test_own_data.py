"""A user's own files in all three steps: what is held out of them, and how several are mixed."""
import collections
import contextlib
import gzip
import json
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import TINY
from test_ppo import SMALL as PPO
from test_reward import SMALL as REWARD

import config
import data
import ppo
import reward
import sft
import training
from config import SFTConfig, UserError, parse
from model import GPT, GPTConfig


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf8")
    return path


# ---------------------------------------------------------------- what is held out
def records(*prompts):
    """[(instruction, input, output, history)], no two alike"""
    return [(prompt, "", f"answer {i}", []) for i, prompt in enumerate(prompts)]


def test_every_twentieth_prompt_or_a_file_of_its_own():
    """Usual mistake: what is measured on is learnt too."""
    mine = records(*map(str, range(43)))
    train, held_out = data.hold_out(mine)
    assert held_out == [mine[0], mine[20], mine[40]] and sorted(train + held_out) == sorted(mine)
    assert data.hold_out(mine[:3], mine[7:9]) == (mine[:3], mine[7:9])
    assert data.hold_out(mine[:1]) == (mine[:1], mine[:1])      # better than nothing at all


def test_a_prompt_with_several_answers_is_on_one_side():
    """Usual mistake: every twentieth record, so that a prompt of many comparisons, or of a file named twice, is on both."""
    mine = records(*"abcdefghijklmnopqrstuvwxyz" * 3)
    train, held_out = data.hold_out(mine)
    assert [record[0] for record in held_out] == [*"auauau"] and len(train) == 72
    assert not {record[:2] for record in train} & {record[:2] for record in held_out}


def test_the_flag_needs_data():
    with pytest.raises(UserError, match="--data-eval"):
        parse("reward", ["--data-eval", "x.jsonl"])


@pytest.fixture
def based(tiny_run, tmp_path):
    """A run that has a base, to be fine-tuned on own files."""
    (folder := tmp_path / "run").mkdir()
    for path in (*tiny_run.folder.glob("base.*"), *tiny_run.folder.glob("corpus-*"), tiny_run.folder / "tokenizer.json"):
        shutil.copy(path, folder)
    return folder


def test_each_step_measures_on_the_file(based, run, tmp_path, monkeypatch):
    """sft.py, reward.py, ppo.py: all records of --data are learnt, those of --data-eval measured on, and not learnt."""
    seen = {}

    def spy(module, name, place):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: seen.setdefault(place, original(*args)))
    spy(sft, "make_examples", "sft")
    spy(ppo, "prompts_of", "ppo")
    mine = write(tmp_path / "mine.jsonl", [{"prompt": f"Say {i}", "completion": str(i)} for i in range(23)])
    other = write(tmp_path / "other.jsonl", [{"prompt": f"Count {i}", "completion": str(i)} for i in range(7)])
    done = run("sft", *TINY, "--steps", 3, "--data", mine, "--data-eval", other, "--out", based)
    assert done.code == 0, done.out
    assert done.out.endswith(f"  python reward.py --data RANKINGS --out {based}\n"), "the built-in world has other prompts"
    tokenizer = training.load_model(based, "sft")[1]
    texts = [[tokenizer.decode(ids) for ids, _ in side] for side in seen["sft"]]
    assert [len(side) for side in texts] == [23, 7]
    assert all(t.startswith("Say") for t in texts[0]) and all(t.startswith("Count") for t in texts[1])

    pairs = [{"prompt": f"Say {i}", "chosen": str(i), "rejected": "no"} for i in range(23)]
    done = run("reward", *REWARD, "--data", write(tmp_path / "pairs.jsonl", pairs), "--data-eval",
               write(tmp_path / "held.jsonl", pairs[:7]), "--out", based)
    assert done.code == 0 and json.loads((based / "reward.json").read_text())["measured"]["pairs"] == 7, done.out
    assert "23 prompts" in done.out and done.out.endswith(f"Next: python ppo.py --data PROMPTS --out {based}\n")

    done = run("ppo", *PPO, "--data", mine, "--data-eval", other, "--out", based)
    assert done.code == 0, done.out
    assert done.out.endswith(f"  python sample.py --compare --out {based}\n"), "evaluate.py knows the built-in tasks alone"
    assert [len(side) for side in seen["ppo"]] == [23, 7] and seen["ppo"][1][0].prompt == "Count 0"


def test_what_own_rankings_change(based):
    """Fewer rankings and other answers: little likelihood, learnt quickly, several times; a preset's or the user's word weighs more.

    Usual mistake: the built-in world's recipe for a user's file; of 1,094 comparisons it orders 52 % of held-out pairs.
    """
    world, own = parse("reward", [])[0], parse("reward", ["--data", "mine.jsonl"])[0]
    changes = config.OWN_DATA["reward"]
    assert {k for k, v in vars(own).items() if v != getattr(world, k)} == {"data", *changes}
    assert world.likelihood > own.likelihood > 0 and own.lr > world.lr and own.epochs > world.epochs == 1
    assert parse("reward", ["--data", "mine.jsonl"])[1]["lr"] == "preset"       # so that the run says it
    assert parse("reward", ["--data", "mine.jsonl", "--lr", "0.5"])[0].lr == 0.5
    gpt2 = parse("reward", ["--config", "gpt2", "--data", "mine.jsonl"])[0]
    assert (gpt2.lr, gpt2.likelihood, gpt2.epochs) == (config.PRESETS["gpt2"]["reward"]["lr"], 0, own.epochs)
    assert parse("reward", [])[0] == world and "lr" not in config.OWN_DATA.get("sft", {})


@pytest.mark.parametrize("likelihood, lr", [(0, 0.03), (0.3, 0.03), (0, 1e-5)])
def test_own_rankings_have_the_unit_of_the_built_in_ones(likelihood, lr, based, run, tmp_path):
    """The scores of held-out answers have a spread of 1 or less within their prompts, and the best of these are 0 on average: β
    and --unfinished-score then weigh against any file's scores as they do in the built-in world.

    Usual mistakes: scores of ± 20, against which a KL penalty is nothing and an answer without end (-1) is above the mean;
    the noise of a model that has learnt nothing yet, made as large as that.
    """
    done = run("sft", *TINY, "--steps", 3, "--data", write(tmp_path / "mine.jsonl", [{"prompt": "a", "completion": "b"}]),
               "--out", based)
    assert done.code == 0, done.out
    mine = [{"prompt": f"Say {i}", "responses": [f"{i}", "no", f"{i} times no", "sorry"], "ranks": [0, 1, 1, 2]}
            for i in range(47)]
    mine = write(tmp_path / "ranks.jsonl", mine)
    done = run("reward", *REWARD, "--epochs", 7, "--lr", lr, "--matrix-lr", lr, "--likelihood", likelihood, "--data", mine, "--out", based)
    assert done.code == 0, done.out
    measured = json.loads((based / "reward.json").read_text())["measured"]
    assert not 0.7 < measured["spread"] < 1.3, "measured before; near 1 it would show nothing"
    assert "gold" not in done.out and " accuracy\n" in done.out and "preference, predicted and observed" in done.out
    assert json.loads((based / "reward.json").read_text())["steps"] == 7 * -(-44 // 5)

    sft, tokenizer, _ = training.load_model(based, "sft")
    model = reward.RewardModel(sft)
    model.load_state_dict(training.load(based / "reward.pt"))
    assert model.answer_after == (tokenizer.assistant if likelihood else -1)
    assert (model.w * max(1, measured["spread"])).item() == pytest.approx(likelihood or 0, abs=0.15), "it began there"
    _, held_out = data.hold_out(data.read_comparisons(mine)[0])
    ids = [reward.encode(tokenizer, parts, answers) for *parts, answers, _ in held_out]
    scores = reward.score_many(model, ids, tokenizer.pad, contextlib.nullcontext())
    assert len(held_out) == 3 and scores[:, 0].mean().item() == pytest.approx(0, abs=1e-3)
    spread = (scores - scores.mean(1, keepdim=True)).flatten().std().item()
    assert spread == pytest.approx(min(1, measured["spread"]), rel=1e-2)
    if measured["spread"] > 1:
        assert (scores[:, 0] > scores[:, 1:3].amax(1)).all() and (scores[:, 3] < scores[:, 1:3].amin(1)).all()


def test_every_epoch_has_all_rankings_in_another_order(monkeypatch):
    """`reward.py --epochs 3`"""
    seen = []
    monkeypatch.setattr(reward, "score_groups", lambda model, ids, *_: seen.append(ids) or model(torch.tensor([[1.0, -1.0]])))
    groups = [((f"{i}", "-"), (0, 1)) for i in range(13)]
    monkeypatch.setattr(training.Stage, "SAVE_EVERY", 1e9)
    own = parse("reward", ["--epochs", "3", "--batch-prompts", "1"])[0]
    torch.manual_seed(0)
    reward.train(own, "nowhere", torch.nn.Sequential(collections.OrderedDict(h=torch.nn.Sequential(torch.nn.Linear(2, 2)))),
                 groups, 0, None)
    epochs = [[ids[0][0] for ids in seen[i:i + 13]] for i in (0, 13, 26)]
    assert len(seen) == 39 and all(sorted(epoch) == sorted(epochs[0]) and len({*epoch}) == 13 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_own_text_is_measured_on_the_file(run, tmp_path):
    book, other = tmp_path / "book.txt", tmp_path / "other.txt"
    book.write_text("\n".join(f"It was on day {i} that the ship number {i * 7} sailed." for i in range(400)))
    other.write_text("\n".join(f"On day {i} nothing sailed." for i in range(200)))
    done = run("sft", *TINY, "--block-size", 64, "--data", book, "--data-eval", other, "--out", tmp_path / "run")
    assert done.code == 0, done.out
    (corpus,) = (tmp_path / "run").glob("corpus-*.bin")
    tokenizer = training.load_model(tmp_path / "run", "base")[1]
    ids = np.fromfile(corpus, tokenizer.dtype).tolist()
    assert tokenizer.decode(ids) == book.read_text()            # all of it, and nothing else


def test_later_steps_mix_in_the_text_that_the_base_has_read(run, tmp_path, monkeypatch):
    """Own text, own demonstrations, PPO: the pretraining gradient is the user's own text's, in a context of 32 tokens, too.

    Usual mistakes: the built-in text is made, and mixed in, for a base that never saw it; the newest file is taken.
    """
    book, mine, seen = tmp_path / "book.txt", tmp_path / "mine.jsonl", []
    book.write_text("\n".join(f"It was on day {i} that the ship number {i * 7} sailed." for i in range(400)))
    write(mine, [{"prompt": f"Say {i}", "completion": f"It was {i}"} for i in range(23)])
    out = tmp_path / "run"
    assert run("sft", *TINY, "--block-size", 32, "--data", book, "--out", out).code == 0
    (text,) = out.glob("corpus-*.bin")
    shutil.copy(text, out / "corpus-newer.bin")
    original = data.windows
    monkeypatch.setattr(data, "windows", lambda ids, *rest: seen.append(ids) or original(ids, *rest))
    monkeypatch.setattr(sft.world, "documents", lambda *args: pytest.fail("the built-in text was made"))
    done = run("sft", *TINY, "--steps", 3, "--data", mine, "--out", out)
    assert done.code == 0 and len(seen) == 3, done.out
    (tmp_path / "score.py").write_text("def score(prompts, responses):\n    return [len(r) for r in responses]\n")
    done = run("ppo", *PPO, "--ptx-window", 128, "--ptx-tokens", 256, "--reward", f"{tmp_path / 'score.py'}:score", "--data", mine,
               "--out", out)
    assert done.code == 0 and len(seen) > 3, done.out
    assert {(ids.filename, len(ids)) for ids in seen} == {(text, text.stat().st_size // seen[0].itemsize)}
    text.unlink()
    done = run("ppo", *PPO, "--reward", f"{tmp_path / 'score.py'}:score", "--data", mine, "--out", out, "--fresh")
    assert done.code == 2 and "has no text of sft.py's to mix in" in done.out.splitlines()[-1]


def test_a_broken_file_is_said_before_anything_is_computed(run, tmp_path):
    mine = write(tmp_path / "mine.jsonl", [{"prompt": "a", "completion": "b"}])
    done = run("sft", *TINY, "--data", mine, "--data-eval", write(tmp_path / "bad.jsonl", [{"prompt": "a"}]),
               "--out", tmp_path / "run")
    assert done.code == 2 and "bad.jsonl, line 1" in done.out and "step 0" not in done.out
    done = run("sft", *TINY, "--data", mine, "--data-eval", tmp_path / "none.jsonl", "--out", tmp_path / "run")
    assert done.code == 2 and "none.jsonl" in done.out and "step 0" not in done.out
    long = write(tmp_path / "long.jsonl", [{"prompt": "a", "completion": "b " * 300}])
    done = run("sft", *TINY, "--data", mine, "--data-eval", long, "--out", tmp_path / "run")
    assert done.code == 2 and "long.jsonl: no val demonstration fits" in done.out and "step 0" not in done.out


# ---------------------------------------------------------------- several files, mixed
def test_a_file_that_is_named_twice_counts_twice(tmp_path):
    """So three times a and once b is a mix of 3 to 1; a glob is named once for all its files."""
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [{"prompt": name}])
    a, every = tmp_path / "a.jsonl", tmp_path / "*.jsonl"
    assert [p for p, _, _ in data.read_prompts(f"{a},{a},{every}")] == ["a", "a", "a", "b"]


# ---------------------------------------------------------------- several demonstrations in a row
LENGTHS = 5, 3, 11, 2, 7, 13, 3


def examples():
    """[(ids, mask)] of prime sizes, no token twice in an example."""
    r = torch.Generator().manual_seed(3)
    return [(torch.randperm(31, generator=r)[:n].tolist(), [i >= n // 2 for i in range(n)]) for n in LENGTHS]


def gradient(batch, dtype=torch.float64):
    torch.manual_seed(5)
    gpt = GPT(GPTConfig(37, 17, 2, 2, 10, init_std=0.4)).to(dtype)
    loss = sft.accumulate(gpt, [batch], contextlib.nullcontext())
    return loss, torch.cat([p.grad.flatten() for p in gpt.parameters()])


def test_packed_rows_hold_every_example_once():
    tokens, which, labels = data.collate(examples(), 36, 17)
    assert tokens.shape[1] <= 17 and tokens.shape[0] < len(LENGTHS)
    found = [(row[of == n].tolist(), mask[of == n].tolist()) for row, of, mask in zip(tokens, which, labels)
             for n in range(1, int(of.max()) + 1)]
    assert found == [(ids, [False, *(bool(m) for m in mask[1:])]) for ids, mask in examples()]
    assert (tokens[which == 0] == 36).all() and not labels[which == 0].any()


def test_packed_is_unpacked():
    """Loss and gradient, in float64. Usual mistakes: an example sees the one before it, its positions do not begin at 0,
    or its first token is the target of the one before."""
    for size in (13, 17):
        loss, moved = gradient(data.collate(examples(), 36, size))
        want, way = gradient(data.collate(examples(), 36))
        assert abs(loss - want) < 1e-12
        torch.testing.assert_close(moved, way, rtol=0, atol=1e-12)


def test_step_1_packs(based, run, monkeypatch):
    """A whole step with pretraining windows beside the packed rows: the same number of optimiser steps, fewer rows."""
    packed, original = [], data.collate

    def collate(examples, pad, size=0):
        batch = original(examples, pad, size)
        if size:
            packed.append(len(batch[0]) / len(examples))
        return batch
    monkeypatch.setattr(data, "collate", collate)
    done = run("sft", *TINY, "--packing", "--out", based)
    assert done.code == 0 and "sft 14/14" in done.out, done.out
    assert len(packed) == 14 and np.mean(packed) < 0.5


# ---------------------------------------------------------------- a text that does not fit into memory
@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(data, "PART", 64)


def book(path, lines=97, ending="\n"):
    path.write_bytes("".join(f"ligne {i}: l'été, 猫{ending}" for i in range(lines)).encode())
    return path


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["book.txt", "book.txt.gz"])
def test_a_text_comes_in_parts_that_end_with_a_line(tmp_path, small_parts, name, ending):
    """Usual mistakes: a part ends within a character, within \\r\\n, or the last one is lost."""
    path = book(tmp_path / name, ending=ending)
    whole = path.read_bytes()
    if name.endswith("gz"):
        path.write_bytes(gzip.compress(whole))
    parts = [text for (text,) in data.read_text(path)]
    assert len(parts) > 29 and all(part.endswith("\n") and len(part.encode()) < 64 + 29 for part in parts)
    assert "".join(parts) == whole.decode().replace("\r\n", "\n")


def test_records_come_in_parts_too(tmp_path, small_parts):
    """JSONL part by part, an array as a whole. Usual mistakes: a record is cut, or its line is counted from its part on."""
    records = [{"text": f"{i}"} for i in range(31)]
    parts = [*data.read_text(write(tmp_path / "texts.jsonl", records))]
    assert 1 < len(parts) < 31 and sum(parts, []) == [f"{i}" for i in range(31)]
    (tmp_path / "array.jsonl").write_text("\ufeff" + json.dumps(records, indent=1), encoding="utf8")
    assert [*data.read_text(tmp_path / "array.jsonl")] == [sum(parts, [])]
    bad = write(tmp_path / "bad.jsonl", [*records[:23], {"text": 5}])
    with pytest.raises(UserError, match="bad.jsonl, line 24"):
        [*data.read_text(bad)]
    bad.write_text("\n" * 97 + '{"text": "a"}\n\n{"text" "b"}\n')
    with pytest.raises(UserError, match="bad.jsonl, line 100: not JSON"):
        [*data.read_text(bad)]


def test_a_fault_in_a_later_part_is_named_by_its_line(tmp_path, small_parts):
    path = book(tmp_path / "book.txt")
    path.write_bytes(path.read_bytes() + "caf\xe9\n".encode("latin1"))
    with pytest.raises(UserError, match="line 98: not UTF-8"):
        [*data.read_text(path)]


def test_the_corpus_is_mapped_and_made_once(tmp_path, tiny_run, monkeypatch):
    """Token for token the text, without what is held out of its first part; kept by its content."""
    tokenizer = training.load_model(tiny_run.folder, "base")[1]
    monkeypatch.setattr(data, "PART", 2000)
    config = SFTConfig(block_size=16, data=str(book(tmp_path / "book.txt", 311)))
    corpus, held_out = sft.make_corpus(config, tmp_path, tokenizer, config.data)
    assert isinstance(corpus["documents"], np.memmap)
    parts = [data.pack(tokenizer, part) for part in data.read_text(config.data)]
    cut = len(parts[0]) - len(held_out["text"])
    assert len(parts) > 3 and 0 < len(held_out["text"]) < len(parts[0]) / 5
    assert np.array_equal(corpus["documents"], np.concatenate([parts[0][:cut], *parts[1:]]))
    assert np.array_equal(held_out["text"], parts[0][cut:])
    packed = []
    monkeypatch.setattr(data, "pack", lambda *args: packed.append(args) or parts[0])
    again, _ = sft.make_corpus(config, tmp_path, tokenizer, config.data)
    assert len(packed) == 1 and np.array_equal(again["documents"], corpus["documents"])     # what is held out, no more
    book(tmp_path / "book.txt", 313)
    sft.make_corpus(config, tmp_path, tokenizer, config.data)
    assert len(packed) > 3 and len([*tmp_path.glob("corpus-*")]) == 2


def test_memory_does_not_grow_with_the_text(tmp_path, tiny_run, monkeypatch):
    """16 MB of text in parts of 128 KB: less than a quarter of it is ever held. Usual mistake: a list of all parts."""
    tokenizer = training.load_model(tiny_run.folder, "base")[1]
    monkeypatch.setattr(data, "PART", 1 << 17)
    path = tmp_path / "book.txt"
    path.write_bytes(("It was a long day, and the ship sailed on. " * 24 + "\n").encode() * 16_000)
    tracemalloc.start()
    corpus, _ = sft.make_corpus(SFTConfig(block_size=16, data=str(path)), tmp_path, tokenizer, str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 16e6 and peak < 4e6 and len(corpus["documents"]) > 2e6, peak
