"""One loss, two masks: recipe rows P1, P2, S1, S2, S4, S5; and sft.py as it is used, killed and started again."""
import contextlib
import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, killed_at, same_weights, subprocess_of

import data
import sft
import training
from config import SFTConfig, UserError
from model import GPT, GPTConfig

B, T, V = 3, 11, 23
PLAIN = contextlib.nullcontext()


def tokens_and_labels(seed=0, B=B, T=T):
    g = torch.Generator().manual_seed(seed)
    labels = torch.rand(B, T, generator=g) < 0.6
    labels[:, -1] = True
    return torch.randint(V, (B, T), generator=g), None, labels


class Oracle(torch.nn.Module):
    """Knows that the token after x is x + 1: its logits there are high, at every position."""
    def __init__(self):
        super().__init__()
        self.high = torch.nn.Parameter(torch.tensor(50.0))

    def hidden(self, tokens, mask=None, segments=None):
        return self.high * torch.nn.functional.one_hot((tokens + 1) % V, V).float()

    def unembed(self, x):
        return x


class Table(torch.nn.Module):
    """Logits that are parameters, so that the gradient of each can be looked at: (B,T-1,V), uniform at first."""
    def __init__(self, B=B, T=T, V=V):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(B, T - 1, V, dtype=torch.float64))

    def hidden(self, tokens, mask=None, segments=None):
        return self.logits[:len(tokens)]

    def unembed(self, x):
        return x


# ---------------------------------------------------------------- P1

def test_uniform_logits_give_ln_v():
    """P1: and not ln V times a share of the mask, whatever the mask."""
    for seed in range(3):
        tokens, _, labels = tokens_and_labels(seed)
        for value in (0.0, 7.0):
            loss = sft.next_token_loss(torch.full((B, T, V), value, dtype=torch.float64), tokens, labels)
            assert loss.item() == pytest.approx(math.log(V), rel=1e-12)
    nothing = torch.zeros(B, T, dtype=torch.bool)
    assert sft.next_token_loss(torch.zeros(B, T, V), tokens, nothing).item() == 0, "no target: no loss, and no NaN"


def test_the_loss_is_its_definition():
    """- mean of log softmax at the target, over the unmasked targets, one by one."""
    tokens, _, labels = tokens_and_labels()
    logits = torch.randn(B, T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slow = [-(logits[b, t, tokens[b, t]] - logits[b, t].logsumexp(0)).item() for b in range(B) for t in range(T) if labels[b, t]]
    assert sft.next_token_loss(logits, tokens, labels).item() == pytest.approx(sum(slow) / len(slow), rel=1e-12)
    assert sft.next_token_loss(logits, tokens, labels, "sum").item() == pytest.approx(sum(slow), rel=1e-12)
    assert sft.next_token_loss(logits, tokens, labels.long()).item() == pytest.approx(sum(slow) / len(slow), rel=1e-12)


def test_the_loss_is_at_least_fp32():
    """Logits of autocast are bf16: their softmax is not, and float64 stays float64."""
    tokens, _, labels = tokens_and_labels()
    logits = 3 * torch.randn(B, T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    low = logits.bfloat16()
    assert torch.equal(sft.next_token_loss(low, tokens, labels), sft.next_token_loss(low.float(), tokens, labels))
    assert [sft.next_token_loss(x, tokens, labels).dtype for x in (low, logits)] == [torch.float32, torch.float64]


def test_the_shift_is_made_once():
    """P1, the usual mistake: no shift (the model learns to copy its input), or two (it learns the token after next)."""
    tokens = (torch.arange(T) + torch.arange(B)[:, None] * 5) % V
    batch = (tokens, None, torch.ones(B, T, dtype=torch.bool))
    assert sft.accumulate(Oracle(), [batch], PLAIN) < 1e-6
    assert sft.held_out_loss(Oracle(), [batch], PLAIN) < 1e-6
    wrong = (tokens * 2 % V, None, batch[2])
    assert sft.held_out_loss(Oracle(), [wrong], PLAIN) > 10


# ---------------------------------------------------------------- P2

def test_accumulation_is_one_big_batch():
    """P2: micro-batches of 3, 17 and 9 targets give the gradient of all 29 together.

    The usual mistake is the mean of the micro-batches' means: there a target of the first one weighs six times as much.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(V, T, n_layer=1, n_head=2, n_embd=14)).double()
    tokens, _, labels = tokens_and_labels(B=7)
    labels[:] = False
    for row, n in zip(range(7), (1, 2, 9, 8, 4, 4, 1)):
        labels[row, 1:1 + n] = True
    assert [int(part.sum()) for part in labels.split([2, 2, 3])] == [3, 17, 9]

    def gradient(batches):
        model.zero_grad()
        loss = sft.accumulate(model, batches, PLAIN)
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()])
    loss, whole = gradient([(tokens, None, labels)])
    parts_loss, parts = gradient([(t, None, m) for t, m in zip(tokens.split([2, 2, 3]), labels.split([2, 2, 3]))])
    means = sum(gradient([(t, None, m)])[1] for t, m in zip(tokens.split([2, 2, 3]), labels.split([2, 2, 3]))) / 3
    assert parts_loss == pytest.approx(loss, rel=1e-12)
    assert torch.allclose(parts, whole, rtol=1e-10, atol=1e-14)
    assert (means - whole).abs().max() > 0.01 * whole.abs().max(), "the mistake would be seen"


def test_the_held_out_loss_does_not_depend_on_its_batches():
    model, (tokens, _, labels) = Table(B=7), tokens_and_labels(B=7)
    torch.nn.init.normal_(model.logits)
    whole = sft.held_out_loss(model, [(tokens, None, labels)], PLAIN)
    assert whole == pytest.approx(sft.next_token_loss(model.logits, tokens[:, 1:], labels[:, 1:]).item(), rel=1e-12)
    assert model.training and model.logits.grad is None


# ---------------------------------------------------------------- S1, S2

@pytest.fixture(scope="module")
def tokenizer():
    return data.Tokenizer(data.train_bpe([""], 256))


def test_prompts_have_no_gradient_and_the_eos_has(tokenizer):
    """S1, S2: the logits that predict the response and its EOS get a gradient, all others exactly none.

    The last token of the prompt predicts the first one of the response: a mask that is not shifted with its targets
    shows here, at both ends.
    """
    examples = [data.encode_example(tokenizer, "ask " * n, "", "x" * m) for n, m in ((2, 7), (5, 1), (1, 3))]
    tokens, real, labels = data.collate(examples, tokenizer.end)
    model = Table(*tokens.shape, tokenizer.size)
    sft.accumulate(model, [(tokens, real, labels)], PLAIN)
    grad = model.logits.grad
    learns = grad.abs().sum(-1) > 0                              # (B,T-1)
    for row, (ids, mask) in enumerate(examples):
        first = mask.index(True)                                        # of the response
        expected = [first - 1 <= t < len(ids) - 1 for t in range(tokens.shape[1] - 1)]
        assert learns[row].tolist() == expected
        assert ids[-1] == tokenizer.end and grad[row, len(ids) - 2, tokenizer.end] < 0, "the EOS is pulled up"


def test_every_example_that_was_learnt_from_ends_with_a_learnt_eos(tiny_run):
    """S1, S2 in the run itself, on all batches that sft.py gave to the model."""
    tokenizer = data.Tokenizer.load(tiny_run.folder / "tokenizer.json")
    seen = 0
    for micro in tiny_run.steps["sft"]:
        for tokens, real, labels in micro:
            assert not (labels & ~real).any()
            for row in range(len(tokens)):
                if tokens[row, 0] == tokenizer.user:                    # a demonstration
                    last = int(real[row].sum()) - 1
                    answer = int((tokens[row] == tokenizer.assistant).nonzero()[-1]) + 1
                    assert tokens[row, last] == tokenizer.end and labels[row, answer:last + 1].all()
                    assert not labels[row, :answer].any()
                    seen += 1
    assert seen == 2 * 200


# ---------------------------------------------------------------- S4, S5, and what is learnt from

def test_pretraining_text_is_mixed_in(tiny_run):
    """S4: one row in ten is a window of step 0's text, every token of it a target."""
    (corpus,) = tiny_run.folder.glob("corpus-*.bin")
    tokenizer = data.Tokenizer.load(tiny_run.folder / "tokenizer.json")
    text = " ".join(map(str, np.fromfile(corpus, tokenizer.dtype).tolist()))
    rows = windows = 0
    for micro in tiny_run.steps["sft"]:
        for tokens, real, labels in micro:
            rows += len(tokens)
            for row in (labels[:, 1:].all(1)).nonzero().flatten().tolist():
                windows += 1
                assert tokenizer.user not in tokens[row].tolist()
                assert " ".join(map(str, tokens[row].tolist())) in text
    assert rows == 400 + windows and windows / rows == pytest.approx(0.1, abs=0.03)


def test_step_0_learns_every_token(tiny_run):
    assert len(tiny_run.steps["base"]) == 12
    for micro in tiny_run.steps["base"]:
        targets = sum(tokens[:, 1:].numel() for tokens, *_ in micro)
        assert 512 < targets <= 1024, "--pretrain-batch counts tokens, whatever the length of the windows"
        assert all(labels.all() and tokens.shape[1] <= 257 for tokens, _, labels in micro)
    assert tiny_run.steps["base"][-1][0][0].shape[1] == 257, "in the end the windows fill the context"


@pytest.mark.parametrize("block_size, widths", [(256, (64, 128, 256)), (32, (32, 16, 32)), (1, (1, 1, 1))])
def test_the_curriculum(block_size, widths):
    """Recitals first, in short windows; then documents in half the context, and from 70 % on in the whole."""
    config = SFTConfig(recital_steps=5, pretrain_steps=20, block_size=block_size)
    recited, half, whole = widths
    both, own = {"documents": "d", "recitals": "r"}, {"documents": "d"}
    assert [sft.curriculum(config, step, both) for step in range(20)] == (
        [("r", recited)] * 5 + [("d", half)] * 9 + [("d", whole)] * 6)
    assert [sft.curriculum(config, step, own) for step in range(20)] == [("d", half)] * 14 + [("d", whole)] * 6


def test_the_run_follows_the_curriculum(tiny_run):
    """And what it recites stands in no document, what it reads later in the documents' file."""
    windows = [micro[0][0] for micro in tiny_run.steps["base"]]
    assert [w.shape[1] - 1 for w in windows] == [64] * 4 + [128] * 5 + [256] * 3
    (corpus,) = tiny_run.folder.glob("corpus-*.bin")
    text = " ".join(map(str, np.fromfile(corpus, data.Tokenizer.load(tiny_run.folder / "tokenizer.json").dtype).tolist()))
    for step, rows in enumerate(windows):
        assert [" ".join(map(str, row)) in text for row in rows.tolist()] == [step >= 4] * len(rows)


def test_own_text_sees_no_recitals(tokenizer, tmp_path):
    """Nothing of the built-in world: the corpus is the user's text, and another part of it is held out."""
    own = "\n".join(f"line {i} of my own book" for i in range(300))
    (tmp_path / "book.txt").write_text(own)
    config = SFTConfig(block_size=64, data=f"{tmp_path}/book.txt")
    corpus, held_out = sft.make_corpus(config, tmp_path / "run", tokenizer, config.data)
    assert set(corpus) == {"documents"} and set(held_out) == {"text"}
    (kept,) = (tmp_path / "run").iterdir()      # for the pretraining gradient of step 3: without what is held out
    assert kept.match("corpus-*.bin") and np.fromfile(kept, tokenizer.dtype).tolist() == corpus["documents"].tolist()
    assert tokenizer.decode(np.concatenate([corpus["documents"], held_out["text"]]).tolist()).strip() == own


def test_what_does_not_fit_is_dropped_and_counted(tokenizer, capsys):
    """S5: an example is dropped whole and counted; none is cut, and so none loses its EOS."""
    own = [(f"ask{i}", "", "x" * n) for i, n in enumerate((3, 300, 5, 7, 400, 9))]
    train, val = sft.make_examples(SFTConfig(block_size=64), tokenizer, data.hold_out(own))
    assert [len(ids) for ids, _ in train + val] == [7 + n for n in (5, 7, 9, 3)]
    assert all(ids[-1] == tokenizer.end and mask[-1] for ids, mask in train + val)
    said = capsys.readouterr().out
    assert "2 of 5 train demonstrations exceed --block-size 64: dropped" in said
    with pytest.raises(UserError, match="--block-size 8"):
        sft.make_examples(SFTConfig(block_size=8), tokenizer, data.hold_out(own))


# ---------------------------------------------------------------- the command

def test_what_a_run_leaves(tiny_run):
    """Weights that load without running code, facts that a person can read, one row a step; and nothing half-done."""
    names = sorted(p.name for p in tiny_run.folder.iterdir() if not p.name.startswith("corpus-"))
    assert names == ["base.json", "base.jsonl", "base.pt", "sft.json", "sft.jsonl", "sft.pt", "tokenizer.json"]
    for stage, steps in (("base", 12), ("sft", 14)):
        facts = json.loads((tiny_run.folder / f"{stage}.json").read_text())
        assert facts["steps"] == steps and facts["config"]["n_embd"] == 32 and facts["seconds"] >= 0 and "torch" in facts["versions"]
        rows = [json.loads(line) for line in (tiny_run.folder / f"{stage}.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        model, tokenizer, _ = training.load_model(tiny_run.folder, stage)
        assert model.num_params() == sum(p.numel() for p in model.parameters()) and tokenizer.size == 400
    assert json.loads((tiny_run.folder / "sft.json").read_text())["parent"] == "base"


def test_the_first_loss_is_ln_v_and_the_last_one_lower(tiny_run):
    """A model that knows nothing is uniform; a first loss far above ln V is a broken init."""
    losses = [json.loads(line)["loss"] for line in (tiny_run.folder / "base.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(math.log(400), rel=0.1) and losses[-1] < losses[0] - 0.2


def test_it_says_what_it_will_do_before_it_does_it(tiny_run):
    lines = tiny_run.out.splitlines()
    assert lines[0].startswith("sft.py: config tiny") and "with 2 threads" in lines[0]
    assert [line.split(":")[0] for line in lines if line.startswith("step ")] == ["step 0", "step 1"]
    assert "command line: " in tiny_run.out and "n_embd=32" in tiny_run.out
    assert any("base 12: held-out loss documents" in line for line in lines)
    assert sum("      -> " in line for line in lines) == 3, "the fixed prompts are answered"


def test_a_finished_base_is_kept(tiny_run, tmp_path, run):
    """Started again, sft.py goes straight to step 1. And: same seed, same weights, bit by bit."""
    for name in ("tokenizer.json", "base.pt", "base.json", *(p.name for p in tiny_run.folder.glob("corpus-*"))):
        (tmp_path / name).write_bytes((tiny_run.folder / name).read_bytes())
    done = run("sft", *TINY, "--out", tmp_path)
    assert done.code == 0 and "is there and is kept" in done.out and "base 1/" not in done.out
    assert same_weights(tmp_path, tiny_run.folder, "sft")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_in_each_step_and_started_again(tiny_run, tmp_path):
    """kill -9 in step 0 and in step 1, in processes of their own: the weights of the undisturbed run, bit by bit."""
    for name in ("tokenizer.json", *(p.name for p in tiny_run.folder.glob("corpus-*"))):    # saves three seconds
        (tmp_path / name).write_bytes((tiny_run.folder / name).read_bytes())
    for stage, nth in (("base", 5), ("sft", 3)):
        killed = killed_at(nth, "sft", stage, *TINY, "--out", tmp_path)
        assert killed.returncode == -9, killed.stderr
        assert training.load(tmp_path / f"{stage}.state")["step"] == nth - 1
        assert not (tmp_path / f"{stage}.pt").exists()
    assert "base: an interrupted run is there; going on after step 4 of 12" in killed.stdout
    assert same_weights(tmp_path, tiny_run.folder, "base")
    last = subprocess_of("import sft, training; training.command(sft.main)", *TINY, "--out", tmp_path)
    assert last.returncode == 0 and "sft: an interrupted run is there; going on after step 2 of 14" in last.stdout
    assert same_weights(tmp_path, tiny_run.folder, "sft")
    for stage in ("base", "sft"):
        assert (tmp_path / f"{stage}.jsonl").read_text() == (tiny_run.folder / f"{stage}.jsonl").read_text()
    assert not list(tmp_path.glob("*.state"))


def test_resume_goes_on_into_the_next_step(tiny_run, tmp_path, run, monkeypatch):
    """`--resume` after an interruption in step 0 finishes step 0 and then begins step 1."""
    for name in ("tokenizer.json", *(p.name for p in tiny_run.folder.glob("corpus-*"))):
        (tmp_path / name).write_bytes((tiny_run.folder / name).read_bytes())
    update, count = training.Stage.update, []

    def interrupted(*args):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return update(*args)
    monkeypatch.setattr(training.Stage, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(training.Stage, "update", interrupted)
    assert run("sft", *TINY, "--out", tmp_path).code == 130
    done = run("sft", *TINY, "--out", tmp_path, "--resume")
    assert done.code == 0, done.out.splitlines()[-1]
    assert same_weights(tmp_path, tiny_run.folder, "sft")


def test_the_first_line_comes_at_once(tmp_path):
    """Seconds after the start the user knows that it runs, and with which numbers: before anything is computed.

    The goal is 5 s; what is measured is the processor's time, which other jobs on the machine hardly change.
    """
    code = ("import os, sys, sft, training\ndef stop(*args):\n    print('spent', sum(os.times()[:2]), flush=True)\n"
            "    os._exit(0)\nsft.make_tokenizer = stop\ntraining.command(sft.main)")
    done = subprocess_of(code, *TINY, "--out", tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("sft.py: config tiny") and "default:" in done.stdout, done.stdout + done.stderr
    assert lines[-1].startswith("spent") and float(lines[-1].split()[1]) < 10, lines[-1]
    assert not list(tmp_path.iterdir()), "nothing was made before"


def test_own_text(tmp_path, run):
    """--data book.txt: its own tokenizer and base, then it stops; real held-out losses; the next command is named."""
    book = tmp_path / "book.txt"
    book.write_text("\n".join(f"It was on day {i} that the ship number {i * 7} sailed; 猫 saw it." for i in range(900)))
    done = run("sft", *TINY, "--block-size", 64, "--data", book, "--out", tmp_path / "run")
    assert done.code == 0 and "held-out loss text" in done.out
    assert done.out.endswith(f"Next:\n  python sample.py --prompt \"...\" --out {tmp_path / 'run'}\n"
                             f"  python sft.py --data DEMONSTRATIONS --out {tmp_path / 'run'}\n")
    assert "reward.py" not in done.out, "what knows no turns cannot be ranked by its answers"
    assert (tmp_path / "run/base.pt").exists() and not (tmp_path / "run/sft.pt").exists()
    loss = json.loads((tmp_path / "run/base.json").read_text())["losses"]["text"]
    assert 0.5 < loss < 6
    book.write_text("too short")
    done = run("sft", *TINY, "--data", book, "--out", tmp_path / "short")
    assert done.code == 2 and "book.txt" in done.out.splitlines()[-1] and "--block-size 256" in done.out


@pytest.mark.parametrize("losses, said", [((3.0, 2.0, 2.5), True), ((3.0, 2.0, 2.015), False), ((3.0, 2.0, 1.9), False)])
def test_a_text_that_is_learnt_by_heart_is_said(losses, said, tmp_path, run, monkeypatch):
    """4,000 steps read 1 MB of text twenty times, and end above the held-out loss of the middle: a line names the remedy."""
    (book := tmp_path / "book.txt").write_text("\n".join(f"On day {i} the ship number {i * 7} sailed." for i in range(400)))
    found = iter(losses)
    monkeypatch.setattr(sft, "held_out_loss", lambda *args: next(found))
    done = run("sft", *TINY, "--eval-every", 4, "--block-size", 64, "--data", book, "--out", tmp_path / "run")
    assert done.code == 0 and ("lowest after 8 steps, text 2.000;" in done.out) == said, done.out
    assert ("--fresh --pretrain-steps 8" in done.out) == said


def test_own_demonstrations(tiny_run, tmp_path, run):
    """--data mine.json: fine-tunes the run's base on them; every twentieth is held out; what is too long is counted."""
    own = [{"instruction": f"Count to {i}", "output": " ".join(map(str, range(1, i % 9 + 2)))} for i in range(60)]
    own[7]["output"] = "x " * 400
    (tmp_path / "mine.json").write_text(json.dumps(own))
    for name in ("tokenizer.json", "base.pt", "base.json", *(p.name for p in tiny_run.folder.glob("corpus-*"))):
        (tmp_path / name).write_bytes((tiny_run.folder / name).read_bytes())
    done = run("sft", *TINY, "--steps", 4, "--data", tmp_path / "mine.json", "--out", tmp_path)
    assert done.code == 0, done.out
    assert "1 of 57 train demonstrations exceed --block-size 256: dropped" in done.out
    assert "Count to 20\n      -> " in done.out, "it answers the user's own prompts, not the world's"
    facts = json.loads((tmp_path / "sft.json").read_text())
    assert facts["steps"] == 4 and 0 < facts["losses"]["demonstrations"] < 10
    (tmp_path / "mine.json").write_text(json.dumps(own[7:8]))
    done = run("sft", *TINY, "--data", tmp_path / "mine.json", "--out", tmp_path)
    assert done.code == 2 and "mine.json: no train demonstration fits --block-size 256" in done.out.splitlines()[-1]
