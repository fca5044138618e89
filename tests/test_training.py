"""The plumbing: the schedule, which optimiser gets what, files that are whole or not there, and exact resume."""
import errno
import json
import math
import os
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

import training
from config import SFTConfig, UserError
from model import GPT, GPTConfig

CONFIG = SFTConfig(n_layer=1, n_head=2, n_embd=14, vocab_size=23, block_size=11, seed=5)
STEPS = 7


def tiny(dropout=0.3, seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(23, 11, n_layer=2, n_head=2, n_embd=14, dropout=dropout))


# ---------------------------------------------------------------- P3, A8: schedule and optimisers

def test_the_cosine():
    """P3: the whole peak after the warm-up, 0.55 of it half-way, 10 % at the end; never below."""
    assert training.cosine(0, 1000, 0) == 1
    assert training.cosine(500, 1000, 0) == pytest.approx(0.55)
    assert training.cosine(1000, 1000, 0) == pytest.approx(0.1)
    assert training.cosine(5000, 1000, 0) == pytest.approx(0.1)
    assert training.cosine(300, 500, 100) == pytest.approx(0.55)        # half-way between the warm-up and the end
    fractions = [training.cosine(step, 1000, 100) for step in range(1000)]
    assert fractions[:3] == pytest.approx([0.01, 0.02, 0.03]) and fractions[99] == fractions[100] == 1
    assert fractions[100:] == sorted(fractions[100:], reverse=True)
    assert fractions[-1] == pytest.approx(0.1, abs=1e-5)


@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 50), (5, 50), (50, 50)])
def test_the_cosine_of_short_runs(steps, warmup):
    for step in range(steps):
        assert 0 < training.cosine(step, steps, warmup) <= 1


@pytest.mark.parametrize("stage, peak", [("base", "pretrain_lr"), ("sft", "lr")])
def test_the_horizon_is_the_run(stage, peak, tiny_run):
    """P3, the usual mistake: a horizon that is not the run's length. Then the last step is not near 10 %."""
    rows = [json.loads(line) for line in (tiny_run.folder / f"{stage}.jsonl").read_text().splitlines()]
    facts = json.loads((tiny_run.folder / f"{stage}.json").read_text())
    steps, peak = facts["steps"], facts["config"][peak]
    assert len(rows) == steps and max(row["lr"] for row in rows) == pytest.approx(peak)
    assert 0.1 < rows[-1]["lr"] / peak < 0.15


def test_fractions_do_not_compound():
    """The peak is remembered: half of it, asked for twice, is half of it."""
    both = training.muon_and_adamw(tiny(), 0.02, 3e-3, 0.1)
    for _ in range(3):
        assert training.set_lr(both, 0.5) == pytest.approx(1.5e-3)
    assert [g["lr"] for g in both[1].param_groups] == pytest.approx([0.01])
    assert training.set_lr(both, 1.0) == pytest.approx(3e-3)


def test_each_parameter_has_one_optimiser_and_norms_do_not_decay():
    """A8: matrices and embeddings decay, norms and biases do not; nothing is forgotten, nothing is updated twice."""
    model = tiny()
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for optimizer in training.muon_and_adamw(model, 0.02, 3e-3, 0.17):
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert names[id(p)] not in found
                found[names[id(p)]] = (type(optimizer).__name__, group["weight_decay"])
    assert set(found) == set(names.values())
    for name, p in model.named_parameters():
        kind, decay = found[name]
        assert decay == (0.17 if p.dim() >= 2 else 0), name
        assert kind == ("Muon" if name.startswith("h.") and p.dim() == 2 else "AdamW"), name


# ---------------------------------------------------------------- files

def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    """The usual mistake: torch.save straight onto the checkpoint. A full disk then costs the old one too."""
    path = tmp_path / "x.pt"
    training.save_atomically({"a": torch.arange(3)}, path)

    def full_disk(value, file):
        file.write(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="x.pt.*No space left.*--out"):
        training.save_atomically({"a": torch.zeros(3)}, path)
    assert training.load(path)["a"].tolist() == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_a_full_disk_as_torch_reports_it(tmp_path, monkeypatch):
    def full_disk(value, file):
        raise RuntimeError("[enforce fail at inline_container.cc:603] . PytorchStreamWriter failed writing file data/0\nmore")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError) as error:
        training.save_atomically({}, tmp_path / "x.pt")
    assert "x.pt" in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_what_a_file_holds_follows_from_its_name(tmp_path):
    """Usual mistake: a page of text that torch.save pickles, and a row that JSON wraps over several lines."""
    value = [{"a": "é", "b": [1, 2]}, {"a": None}]
    for name in ("x.json", "x.jsonl", "x.pt"):
        training.save_atomically(value, tmp_path / name)
    training.save_atomically("<p>é\n", tmp_path / "x.html")
    assert (tmp_path / "x.html").read_bytes() == "<p>é\n".encode()
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf8")) == training.load(tmp_path / "x.pt") == value
    assert [json.loads(line) for line in (tmp_path / "x.jsonl").read_text(encoding="utf8").split("\n")[:-1]] == value


class Evil:
    """A pickle is a program: to load one is to run it."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["torch.save", "pickle", "cut", "text", "missing"])
def test_a_checkpoint_cannot_run_code(how, tmp_path):
    """weights_only: what is no tensor is refused, in one line that says what to do."""
    path, marker = tmp_path / "base.pt", tmp_path / "it ran"
    if how == "torch.save":
        torch.save({"w": Evil(marker)}, path)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Evil(marker)))
    elif how == "cut":
        torch.save({"w": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:1500])
    elif how == "text":
        path.write_text("hello")
    with pytest.raises(UserError) as error:
        training.load(path)
    assert not marker.exists() and "base.pt" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_an_unwritable_folder_is_said_first(out, tmp_path, run):
    """Before anything is computed, not after minutes of training."""
    (tmp_path / "file").write_text("")
    done = run("sft", *TINY, "--out", tmp_path / out)
    assert done.code == 2 and done.out.count("\n") == 1 and "cannot write to" in done.out and "--out" in done.out


def test_a_full_disk_is_said_first(tmp_path, monkeypatch, run):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("os.fsync", full)
    done = run("sft", *TINY, "--out", tmp_path / "run")
    assert not list((tmp_path / "run").iterdir()), "nothing was made before"
    assert done.code == 2 and "No space left on device" in done.out and done.out.count("\n") == 1


def test_where_a_run_is():
    assert str(training.run_path(SFTConfig())) == os.path.join("runs", "tiny")
    assert str(training.run_path(SFTConfig(data="some/book.txt"))) == os.path.join("runs", "tiny-book")
    assert str(training.run_path(SFTConfig(data="some/book.txt", out="here"))) == "here"


@pytest.mark.parametrize("given, name", [
    ("a/b.jsonl", "b"), ("a/b.jsonl.gz", "b"), ("a/b.jsonl,c.jsonl", "b"), ("a/b-*.jsonl", "b"), ("x/*.json", "data"),
    ("my file (1).txt", "my-file-1"), ("b[0-9]?.json", "b-0-9"), ("v1.2_猫.txt", "v1.2_猫"), ("..", "data"), ("a/b.txt/", "b"),
])
def test_a_run_of_your_data_has_a_sane_name(given, name):
    """Usual mistake: the stem as it stands, and the folder is called tiny-*.jsonl, which the next shell expands."""
    assert str(training.run_path(SFTConfig(data=given))) == os.path.join("runs", f"tiny-{name}")


def test_devices_that_are_not_there():
    for name in ("cuda:99", "toaster"):
        with pytest.raises(UserError, match=f"--device {name}"):
            training.pick_device(name)
    assert training.pick_device("cpu").type == "cpu"


def test_the_probe_says_why():
    dtype, why = training.pick_dtype("auto", torch.device("cpu"))
    assert dtype in (torch.float32, torch.bfloat16) and "GFLOP/s" in why
    assert training.pick_dtype("bf16", torch.device("cpu")) == (torch.bfloat16, "as asked")


# ---------------------------------------------------------------- a stage, interrupted

def train(folder, stop=None, config=CONFIG, steps=STEPS):
    """A stage as the scripts run it, with dropout; interrupted in step `stop` by an exception, after the backward pass."""
    model = tiny()
    adamw, muon = both = training.muon_and_adamw(model, 0.02, 3e-3, 0.1)
    stage, seen = training.Stage(folder, "base", config, steps, model=model, adamw=adamw, muon=muon), []
    for step in stage:
        lr = training.set_lr(both, training.cosine(step, steps, 2))
        tokens = torch.randint(23, (3, 11), generator=torch.Generator().manual_seed(step))
        loss = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        if step == stop:
            raise KeyboardInterrupt
        norm = stage.update(both, loss.item(), 1.0)
        stage.log(tokens=30, loss=loss.item(), norm=norm, lr=lr)
        seen.append(step)
    stage.finish(model, model={})
    return seen


def result(folder):
    rows = [json.loads(line) for line in (folder / "base.jsonl").read_text().splitlines()]
    return training.load(folder / "base.pt"), rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder)
    return result(folder)


@pytest.mark.parametrize("stops", [[0], [1], [4], [6], [2, 2, 5]])
def test_an_interrupted_run_ends_with_the_same_weights(stops, undisturbed, tmp_path, monkeypatch):
    """Bit by bit, wherever it was interrupted: the weights, the moments, the schedule, the data, and dropout's numbers.

    The usual mistakes: a fresh optimiser, a random generator that begins anew, a learning rate that starts over.
    """
    monkeypatch.setattr(training.Stage, "SAVE_EVERY", 0.0)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, stop)
    left = train(tmp_path)
    assert left == list(range(stops[-1], STEPS))
    weights, rows = result(tmp_path)
    assert rows == undisturbed[1] and [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert weights.keys() == undisturbed[0].keys()
    assert all(torch.equal(weights[k], undisturbed[0][k]) for k in weights)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.json", "base.jsonl", "base.pt"]


def test_an_older_state_does_as_well(undisturbed, tmp_path, monkeypatch):
    """States are written now and then: from the last one on, the steps are made again, and their rows written once."""
    monkeypatch.setattr(training.Stage, "SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 3)
    monkeypatch.setattr(training.Stage, "SAVE_EVERY", 1e9)
    with open(tmp_path / "base.jsonl", "a") as log:         # a row beyond the state, and half a row
        log.write('{"step": 4, "loss": 9.0}\n{"step": 5, "lo')
    assert train(tmp_path) == [3, 4, 5, 6]
    weights, rows = result(tmp_path)
    assert rows == undisturbed[1] and all(torch.equal(weights[k], undisturbed[0][k]) for k in weights)


def test_another_seed_is_another_run(undisturbed, tmp_path):
    train(tmp_path, config=replace(CONFIG, seed=6))         # the same data and start here: dropout alone differs
    assert result(tmp_path)[1][1:] != undisturbed[1][1:]


def test_what_an_interrupted_run_refuses(tmp_path, monkeypatch):
    """Going on with other numbers would give a run that no config describes."""
    monkeypatch.setattr(training.Stage, "SAVE_EVERY", 0.0)
    insist = replace(CONFIG, resume=True, out=str(tmp_path))
    with pytest.raises(UserError, match="nothing to resume.*without --resume"):
        training.run_folder(insist)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 3)
    assert training.run_folder(insist) == tmp_path
    with pytest.raises(UserError, match="another seed, lr.*--fresh"):
        train(tmp_path, config=replace(CONFIG, lr=0.5, seed=6))
    assert train(tmp_path, config=replace(CONFIG, resume=True, out="elsewhere")) == [3, 4, 5, 6]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 3)
    assert train(tmp_path, config=replace(CONFIG, fresh=True)) == list(range(STEPS))


def test_a_broken_state_is_one_line(tmp_path):
    (tmp_path / "base.state").write_bytes(b"PK broken")
    with pytest.raises(UserError, match="base.state.*Remove it"):
        train(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"model": 5}', '{"model": {"n_layer": "two"}}', "\xff", "shape"])
def test_damaged_facts_are_one_line(text, tiny_run, tmp_path, run):
    """<stage>.json cut short, edited by hand, or of another model: named, with what to do, and no traceback."""
    for name in ("sft.pt", "sft.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny_run.folder / name).read_bytes())
    if text == "shape":
        text = (tmp_path / "sft.json").read_text().replace('"n_layer": 1', '"n_layer": 2')
    (tmp_path / "sft.json").write_bytes(text.encode("latin1"))
    done = run("sample", "--out", tmp_path, "--prompt", "Hello")
    assert done.code == 2 and done.out.count("\n") == 1
    assert "sft.json is damaged" in done.out and "python sft.py" in done.out


@pytest.mark.parametrize("stage, script", [("sft", "sft.py"), ("grpo", "ppo.py --advantage group"),
                                           ("dpo", "reward.py --objective dpo")])
def test_a_stage_that_is_missing_names_its_command(stage, script, tmp_path):
    with pytest.raises(UserError, match=f"no finished {stage}. Make it first: python {script} --out {tmp_path}$"):
        training.load_model(tmp_path, stage)
    for ending in ("pt", "json"):
        (tmp_path / f"reward.{ending}").touch()
    with pytest.raises(UserError, match="no finished reward.* Stages: base, sft, .*ppo$"):   # no model that answers
        training.load_model(tmp_path, "reward")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_the_run(bad, where, tmp_path, monkeypatch):
    """Named with its step, before it reaches a weight; the last good state is kept and named."""
    monkeypatch.setattr(training.Stage, "SAVE_EVERY", 0.0)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = training.adamw([weight], 0.1)
    part = SimpleNamespace(state_dict=lambda: {"w": weight.detach().clone()}, load_state_dict=None)
    stage, before = training.Stage(tmp_path, "base", CONFIG, STEPS, model=part), []
    with pytest.raises(UserError) as error:
        for step in stage:
            before.append(weight.detach().clone())
            weight.grad = torch.full((3,), bad if step == 4 and where == "gradient" else 1.0)
            stage.update([optimizer], bad if step == 4 and where == "loss" else 1.0, 1.0)
            stage.log(loss=1.0)
    message = str(error.value)
    assert "base, step 5" in message and "base.state" in message and "lower learning rate" in message
    assert torch.equal(weight, before[4]) and training.load(stage.state_path)["step"] == 4


def test_the_gradient_is_clipped_over_all_optimisers(tmp_path):
    """One norm over everything, reported as it was before."""
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    optimizers = [torch.optim.SGD([a], lr=1.0), torch.optim.SGD([b], lr=1.0)]
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    stage = training.Stage(tmp_path, "base", CONFIG, STEPS)
    assert stage.update(optimizers, 1.0, clip=1.0) == pytest.approx(5)
    assert torch.cat([a, b]).tolist() == pytest.approx([-0.6, 0, 0, -0.8], rel=1e-4)
    assert a.grad is None and b.grad is None


def test_ctrl_c_says_how_to_go_on(capsys):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        training.command(main)
    assert stop.value.code == 130 and "the same command goes on" in capsys.readouterr().out


def test_a_disk_that_fails_on_the_way_is_one_line(capsys):
    """Also where no code of ours writes: one line that names the file, and exit code 2."""
    def main():
        raise OSError(errno.ENOSPC, "No space left on device", "runs/tiny/base.jsonl")
    with pytest.raises(SystemExit) as stop:
        training.command(main)
    assert stop.value.code == 2 and capsys.readouterr().out == "error: runs/tiny/base.jsonl: No space left on device\n"


def test_a_bug_is_no_user_error():
    """Only what the user can mend is one line; our own mistakes keep their traceback."""
    def main():
        raise ValueError("ours")
    with pytest.raises(ValueError):
        training.command(main)


def test_build_follows_the_config():
    """Usual mistake: a flag that is parsed, shown, and never reaches the model."""
    changes = dict(n_layer=1, n_head=2, n_embd=14, block_size=11, init_std=0.3, wave_std=0.7, flash="no")
    found = training.build(SFTConfig(**changes), 23).config
    assert found == GPTConfig(23, **{**changes, "flash": False})
    one, same, other = (training.build(replace(CONFIG, seed=seed), 23).wte.weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_clock():
    assert [training.clock(s) for s in (0, 75.9, 3599, 4000)] == ["0:00", "1:15", "59:59", "1:06:40"]
