"""GPT-2's published weights: read, written, refused. The files and the reference forward are made here, by hand."""
import json
import math
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import benchmark, subprocess_of

import data
import training
from config import UserError
from model import GPT, GPTConfig, generate, load_gpt2, save_gpt2

V, BLOCK, L, H, C = 23, 13, 3, 2, 10


def published(seed=0, V=V, BLOCK=BLOCK, L=L, C=C):
    """GPT-2's tensors under their published names, Conv1D's as (in,out), of random numbers: {name: float64}"""
    r = np.random.default_rng(seed)
    block = {"ln_1.weight": (C,), "ln_1.bias": (C,), "attn.c_attn.weight": (C, 3 * C), "attn.c_attn.bias": (3 * C,),
             "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,), "ln_2.weight": (C,), "ln_2.bias": (C,),
             "mlp.c_fc.weight": (C, 4 * C), "mlp.c_fc.bias": (4 * C,), "mlp.c_proj.weight": (4 * C, C), "mlp.c_proj.bias": (C,)}
    shapes = {f"h.{i}.{name}": shape for i in range(L) for name, shape in block.items()}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,), "wpe.weight": (BLOCK, C), "wte.weight": (V, C)}
    return {name: r.normal(0, 0.4, shape) for name, shape in shapes.items()}


def as_bytes(x, dtype):
    if dtype == "BF16":         # the upper half of a float32
        return (x.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return x.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8", "BOOL": "?"}[dtype]).tobytes()


def write(path, tensors, dtype="F32", dtypes={}, change=lambda header: None, size=None):
    """A .safetensors file as the format says. change: lies to tell in the header; size: the length to claim for it."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, x in tensors.items():
        kind = dtypes.get(name, dtype)
        data = as_bytes(x, kind)
        header[name] = {"dtype": kind, "shape": list(x.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    change(header)
    text = json.dumps(header).encode()          # of any length: what follows may stand at an odd address
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + body)
    return path


def stored(path):
    """The format read once more, in five lines, as float64 -> {name: array}"""
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = {name.removeprefix("transformer."): entry for name, entry in json.loads(raw[8:8 + n]).items()}
    kinds = {"F32": lambda b: np.frombuffer(b, "<f4"), "F16": lambda b: np.frombuffer(b, "<f2"), "BOOL": lambda b: np.frombuffer(b, "?"),
             "BF16": lambda b: (np.frombuffer(b, "<u2").astype("<u4") << 16).view("<f4")}
    return {name: kinds[e["dtype"]](raw[8 + n + e["data_offsets"][0]:8 + n + e["data_offsets"][1]]).reshape(e["shape"]).astype(float)
            for name, e in header.items() if name != "__metadata__"}


def forward(w, tokens, n_head):
    """GPT-2 in NumPy, float64, one sequence: tokens (T,) -> logits (T,V). x @ W, as Conv1D has it."""
    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def conv1d(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    T, n_layer = len(tokens), sum(name.endswith("ln_1.weight") for name in w)
    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    for i in range(n_layer):
        q, k, v = np.split(conv1d(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, -1)
        heads = []
        for q, k, v in zip(*(np.split(part, n_head, -1) for part in (q, k, v))):
            scores = np.where(np.tri(T, dtype=bool), q @ k.T / math.sqrt(q.shape[1]), -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(p / p.sum(-1, keepdims=True) @ v)
        x = x + conv1d(np.concatenate(heads, -1), f"h.{i}.attn.c_proj")
        u = conv1d(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
        x = x + conv1d(u, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


TOKENS = np.random.default_rng(1).integers(0, V, BLOCK)


def same_logits(gpt, weights, n_head=H):
    got = gpt(torch.from_numpy(TOKENS)[None]).detach()[0].double().numpy()
    np.testing.assert_allclose(got[:, :V], forward(weights, TOKENS, n_head), rtol=0, atol=1e-4)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "model.safetensors", published())
    (tmp_path / "config.json").write_text(json.dumps({"n_head": H, "model_type": "gpt2"}))
    return tmp_path


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_logits_are_those_of_an_independent_forward(folder, dtype, prefix):
    """Usual mistakes: Conv1D's matrices not transposed (attn.c_proj is square: no shape tells), q k v split otherwise."""
    tensors = {prefix + name: x for name, x in published().items()}
    masks = {f"{prefix}h.{i}.attn.{name}": x for i in range(L) for name, x in
             (("bias", np.tri(BLOCK)[None, None]), ("masked_bias", np.array(-1e4)))}
    tensors = dict(sorted((tensors | masks | {"lm_head.weight": tensors[f"{prefix}wte.weight"]}).items()))
    path = write(folder / "model.safetensors", tensors, dtype, {name: "BOOL" for name in masks})
    gpt = load_gpt2(folder)
    same_logits(gpt, stored(path))
    assert {p.dtype for p in gpt.parameters()} == {torch.float32} and all(p.requires_grad for p in gpt.parameters())
    assert all(p.is_contiguous() and not p.is_meta for p in gpt.parameters())
    gpt(torch.from_numpy(TOKENS)[None]).sum().backward()                            # and it can be trained
    assert len(generate(gpt, [[1, 2]], 3).responses[0]) == 3


def test_all_sizes_are_the_files_own(tmp_path):
    """Without config.json heads have 64 channels, as in all four of GPT-2; a file may be given as well as its folder."""
    path = write(tmp_path / "any.safetensors", published(L=2, C=192))
    gpt = load_gpt2(str(path))
    assert gpt.config == GPTConfig(vocab_size=V, block_size=BLOCK, n_layer=2, n_head=3, n_embd=192)
    same_logits(gpt, stored(path), n_head=3)


def test_a_sharded_index_is_read_as_a_whole(folder):
    tensors = published()
    files = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        write(folder / file, {name: x for name, x in tensors.items() if files[name] == file})
    whole = load_gpt2(folder)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    for path in (folder, index):
        assert all(torch.equal(p, q) for p, q in zip(load_gpt2(path).parameters(), whole.parameters(), strict=True))
    name = sorted(tensors)[0]
    write(folder / files[name], {n: x for n, x in tensors.items() if files[n] == files[name] and n != name})
    with pytest.raises(UserError, match=name):
        load_gpt2(folder)
    index.write_text(json.dumps({"weight_map": {name: "../other.safetensors"}}))    # nothing outside the folder is read
    with pytest.raises(UserError, match="Invalid name"):
        load_gpt2(folder)


def test_added_tokens_leave_the_old_ones_alone(folder):
    """The old rows keep every bit, and so do the old tokens' logits; the new rows are near the mean, and all different."""
    old, new = load_gpt2(folder), load_gpt2(folder, V + 4)
    assert new.config.vocab_size == V + 4 and load_gpt2(folder, V - 1).config == old.config
    assert torch.equal(new.wte.weight[:V], old.wte.weight)
    same_logits(new, stored(folder / "model.safetensors"))
    added = new.wte.weight[V:] - old.wte.weight.mean(0)
    assert 0.005 < added.std() < 0.05 and len(added.unique(dim=0)) == 4


def change_of(name, **entries):
    return lambda header: header[name].update(entries)


WRONG = [       # what the file holds instead -> what the error must name
    (dict(drop="h.1.mlp.c_fc.weight"), "h.1.mlp.c_fc.weight"), (dict(drop="wte.weight"), "wte.weight"),
    (dict(drop="wpe.weight"), "wpe.weight"), (dict(drop="h.2.ln_1.weight"), "h.2.ln_1.weight"),
    (dict(put={"h.1.attn.c_attn.weight": np.zeros((3 * C, C))}), "h.1.attn.c_attn.weight"),    # as nn.Linear has it
    (dict(put={"wpe.weight": np.zeros((BLOCK, C + 1))}), "wpe.weight"), (dict(put={"wte.weight": np.zeros(V)}), "wte.weight"),
    (dict(put={"h.0.ln_2.bias": np.zeros(())}), "h.0.ln_2.bias"), (dict(put={"h.0.mlp.c_fc.weight": np.zeros((C, 4, C))}), "h.0.mlp.c_fc.weight"),
    (dict(put={"lm_head.weight": np.zeros((V, C))}), "lm_head.weight"), (dict(put={"h.0.extra.weight": np.zeros(3)}), "h.0.extra.weight"),
    (dict(dtypes={"ln_f.bias": "F64"}), "ln_f.bias .*F64"), (dict(change=change_of("ln_f.bias", shape=[C + 1])), "ln_f.bias"),
    (dict(change=change_of("ln_f.bias", dtype="F16")), "ln_f.bias"), (dict(change=change_of("ln_f.bias", shape=[-1, -C])), "shape dimension")]


def refused(path, match=None):
    with pytest.raises(UserError, match=match) as error:
        load_gpt2(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("wrong, named", WRONG, ids=[str(named) + str(i) for i, (_, named) in enumerate(WRONG)])
def test_a_tensor_that_does_not_belong_is_named(folder, wrong, named):
    tensors = published() | wrong.get("put", {})
    tensors.pop(wrong.get("drop"), None)
    write(folder / "model.safetensors", tensors, **{key: x for key, x in wrong.items() if key not in ("put", "drop")})
    refused(folder, named)


@pytest.mark.parametrize("config", ["{", "[]", '{"n_layer": 3}', '{"n_head": "two"}', '{"n_head": 3}', '{"n_head": 0}', '"' * 9])
def test_a_wrong_config_json_is_one_clear_line(folder, config):
    (folder / "config.json").write_text(config)
    refused(folder)


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_is_not_executed(tmp_path):
    """Whatever its name: as pickle.dump and as torch.save write it. The usual mistake is torch.load."""
    trap, path = tmp_path / "trap", tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps({"wte.weight": Evil(trap)}))
    refused(path)
    torch.save({"wte.weight": Evil(trap)}, path)
    refused(path)
    assert not trap.exists()
    torch.load(path.rename(tmp_path / "model.pt"), weights_only=False)
    assert trap.exists()                                                            # the trap does work


def test_a_truncated_file_is_refused(folder):
    """Wherever it was cut, and also with something behind its end."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    n = int.from_bytes(whole[:8], "little")
    for cut in (0, 5, 8, 9, 8 + n // 2, 8 + n, 8 + n + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(path)
    path.write_bytes(whole + b"\0")
    refused(path)


LIES = [[0, 4 * C + 4], [4, 4 * C + 4], [0, 10 ** 15], [-4, 4 * C - 4], [4 * C, 0], [0.0, 4.0 * C], [0, None], [0], "ab", None, {}]


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_offsets_that_lie_are_refused(folder, lie):
    """Overlapping, past the end, negative, backwards, not whole numbers: none may reach memory that is not its own."""
    for name in ("h.0.ln_1.weight", "h.0.attn.c_proj.bias", "wte.weight"):          # the first, one between, the last
        refused(write(folder / "model.safetensors", published(), change=change_of(name, data_offsets=lie)))


@pytest.mark.parametrize("size", [0, 1, 99, 10 ** 9, 2 ** 64 - 1])
def test_a_header_of_another_length_is_refused(folder, size):
    refused(write(folder / "model.safetensors", published(), size=size))


@pytest.mark.parametrize("text", [b"", b"[]", b"1", b"null", b"{}", b'{"a": 1}', b'{"wte.weight": []}', b"[" * 10 ** 5, b"\xff\xfe{}"])
def test_a_header_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    refused(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(OSError, match="model.safetensors"):
        load_gpt2(tmp_path)


# ---------------------------------------------------------------- and back
def test_what_is_saved_is_gpt2_as_published(tmp_path):
    """By the reader and the forward of this file: names, Conv1D's orientation, F32. And it loads back bit by bit."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=V, block_size=BLOCK, n_layer=L, n_head=H, n_embd=C, init_std=0.4))
    save_gpt2(gpt, tmp_path / "new" / "folder")
    path = tmp_path / "new" / "folder" / "model.safetensors"
    assert {name: x.shape for name, x in stored(path).items()} == {name: x.shape for name, x in published().items()}
    same_logits(gpt, stored(path))
    back = load_gpt2(path.parent)
    assert back.config.n_head == H
    assert all(torch.equal(p, q) for p, q in zip(back.parameters(), gpt.parameters(), strict=True))
    raw, config = path.read_bytes(), json.loads(path.with_name("config.json").read_text())
    n = int.from_bytes(raw[:8], "little")
    assert n % 8 == 0 and json.loads(raw[8:8 + n])["__metadata__"] == {"format": "pt"}     # others insist on both
    wanted = dict(model_type="gpt2", n_head=H, n_layer=L, n_embd=C, n_positions=BLOCK, vocab_size=V, activation_function="gelu_new")
    assert wanted.items() <= config.items()
    save_gpt2(gpt.double(), tmp_path)                                               # of whatever dtype it is
    assert (tmp_path / "model.safetensors").read_bytes() == raw
    for size in (7, 101, 1009, 10007):                                              # the tensors are aligned
        save_gpt2(GPT(GPTConfig(size, BLOCK, 1, H, C)), tmp_path)
        assert int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") % 8 == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the kernel's own count of this process's memory")
def test_weights_are_in_memory_once(tmp_path):
    """At any time at most 1.2 times their size, mapped pages included. The usual mistake: the file AND the model, 2."""
    code = """if True:
        import re, sys, torch, model
        torch.set_num_threads(1)
        def memory(what): return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
        model.load_gpt2(sys.argv[1])                        # what is imported on the way does not count
        before = memory("VmRSS")
        gpt = model.load_gpt2(sys.argv[2])
        print((memory("VmHWM") - before) / (4 * gpt.num_params()))"""
    small = write(tmp_path / "small.safetensors", published(C=64))
    big = write(tmp_path / "big.safetensors", published(V=30011, C=512))
    done = subprocess_of(code, small, big)
    assert done.returncode == 0, done.stderr
    assert 0.8 < float(done.stdout) < 1.2, done.stdout


# ---------------------------------------------------------------- --init, and the tokenizer beside the weights
MERGES = ["t h", "i n", "th e", "Ġ the", "Ġ w", "Ġw in", "Ã ©"]


def letters():
    """The character by which GPT-2's files write each byte: itself where it can be seen, else one from U+0100 on."""
    seen = [b for b in range(256) if chr(b).isprintable() and b != 32]
    return {b: chr(b) for b in seen} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in seen)}


def write_tokenizer(folder):
    tokens = [*sorted(letters().values(), key=lambda c: (ord(c) > 255, ord(c))), *(m.replace(" ", "") for m in MERGES)]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf8")
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate([*tokens, "<|endoftext|>"])}), encoding="utf8")
    return {token: i for i, token in enumerate(tokens)}


@pytest.fixture
def gpt2(tmp_path):
    """A folder as GPT-2 is published: weights, config, vocabulary of 256 bytes, 7 merges and the end of a text."""
    ids = write_tokenizer(tmp_path)
    write(tmp_path / "model.safetensors", published(V=len(ids) + 1, BLOCK=96, L=1, C=16))
    (tmp_path / "config.json").write_text(json.dumps({"n_head": 2}))
    return tmp_path


def test_the_published_tokenizer(gpt2):
    """Merges in their order, a word's first space its own character, é two bytes; the turns stand behind the end."""
    ids, tokenizer = write_tokenizer(gpt2), data.Tokenizer.published(gpt2)
    want = [ids[s] for s in ("the", "Ġwin", "Ġthe", "Ã©", "t", "r", "e", "Ġ", "th", "x", "x")]
    assert tokenizer.encode("the win theétre thxx") == want
    assert tokenizer.decode(want) == "the win theétre thxx"
    assert tokenizer.end == len(ids) and tokenizer.size == len(ids) + 4
    (gpt2 / "merges.txt").write_text("#version: 0.2\ni n\nt h\n")           # read anew: no stale copy
    with pytest.raises(UserError, match="merges.txt or vocab.json"):
        data.Tokenizer.published(gpt2)


def test_sample_with_no_training(gpt2, run, tmp_path, monkeypatch):
    """`sample.py --init` answers from the published weights as a base: the prompt is a text, and it goes on."""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    done = run("sample", "--init", gpt2, "--prompt", "the thin", "--temperature", 0, "--max-new-tokens", 5)
    assert done.code == 0 and sorted(tmp_path.iterdir()) == before, done.out        # nothing is written
    gpt, tokenizer = load_gpt2(gpt2), data.Tokenizer.published(gpt2)
    prompt = [tokenizer.end, *tokenizer.encode("the thin")]
    want = generate(gpt, [prompt], 5, temperature=0, eos=tokenizer.end).responses[0]
    assert done.out.rstrip("\n").endswith(tokenizer.decode(want))


def test_all_steps_from_published_weights_on_own_data(gpt2, run, tmp_path):
    """sft, reward and ppo from a GPT-2 folder on a user's files, on its tokenizer and in its context."""
    demos, pairs, asked, out = (tmp_path / name for name in ("d.jsonl", "p.jsonl", "asked.txt", "out"))
    rows = [{"prompt": f"say {i}", "completion": "the win", "chosen": f"the win {i}", "rejected": "in"} for i in range(23)]
    rows[7]["completion"] = "the win " * 60       # longer than GPT-2's context, whatever --block-size says
    demos.write_text("\n".join(json.dumps({k: r[k] for k in ("prompt", "completion")}) for r in rows))
    pairs.write_text("\n".join(json.dumps({k: r[k] for k in ("prompt", "chosen", "rejected")}) for r in rows))
    asked.write_text("\n".join(r["prompt"] for r in rows))
    for script, *flags in (("sft", "--init", gpt2, "--data", demos, "--block-size", 4096, "--pretrain-docs", 20000, "--batch-size", 5, "--epochs", 1),
                           ("reward", "--data", pairs, "--batch-prompts", 5),
                           ("ppo", "--data", asked, "--iterations", 1, "--episodes", 16, "--max-new-tokens", 9, "--minibatches", 2, "--ptx-tokens", 64,
                            "--ptx-window", 32)):
        done = run(script, "--dtype", "fp32", "--threads", 2, *flags, "--out", out)
        assert done.code == 0 and ("1 of 21 train demonstrations exceed --block-size 96" in done.out) == (script == "sft"), done.out
    whole = load_gpt2(gpt2)
    models = {stage: training.load_model(out, stage)[0] for stage in ("base", "sft", "ppo")}
    assert all(model.config.block_size == 96 for model in models.values())
    assert torch.equal(models["base"].wte.weight[:len(whole.wte.weight)], whole.wte.weight)
    assert not torch.equal(models["sft"].wte.weight, models["base"].wte.weight)


def test_own_text_goes_on_from_published_weights(gpt2, run, tmp_path):
    """`--init` and a text: pretraining continues, from GPT-2's loss and not from ln V; and then it stops."""
    (tmp_path / "book.txt").write_text("the win in the thin win. " * 400)
    done = run("sft", "--dtype", "fp32", "--threads", 2, "--init", gpt2, "--data", tmp_path / "book.txt", "--block-size", 32, "--pretrain-steps", 3,
               "--pretrain-batch", 64, "--pretrain-lr", 0, "--pretrain-matrix-lr", 0, "--weight-decay", 0, "--out", tmp_path / "out")
    assert done.code == 0 and "step 1" not in done.out, done.out
    kept, whole = torch.load(tmp_path / "out" / "base.pt", weights_only=True), load_gpt2(gpt2)
    assert all(torch.equal(kept[name][:len(p)], p) for name, p in whole.state_dict().items())


def pairs_file(path, n=23):
    path.write_text("\n".join(json.dumps({"prompt": f"say {i}", "chosen": f"the win {i}", "rejected": "in"}) for i in range(n)))
    return path


REWARD = "--dtype fp32 --threads 2 --epochs 1 --batch-prompts 5".split()
PPO = ("--dtype fp32 --threads 2 --iterations 1 --episodes 16 --minibatches 2 --max-new-tokens 9 --ptx-coef 0").split()


def test_steps_2_and_3_from_published_weights(gpt2, run, tmp_path):
    """`reward.py --init` and `ppo.py --init` in a new run: no steps 0 and 1, GPT-2 as published is what they start from.

    Ziegler et al. 2019 did so; and a user may have fine-tuned elsewhere. What they need of the run is then in it.
    """
    out, pairs, asked = tmp_path / "out", pairs_file(tmp_path / "p.jsonl"), tmp_path / "asked.txt"
    asked.write_text("\n".join(f"say {i}" for i in range(23)))
    done = run("reward", *REWARD, "--init", gpt2, "--data", pairs, "--out", out)
    assert done.code == 0 and "config gpt2" in done.out and "instead of steps 0 and 1" in done.out, done.out
    whole, (sft, tokenizer, _) = load_gpt2(gpt2), training.load_model(out, "sft")
    assert torch.equal(sft.wte.weight[:-3], whole.wte.weight) and len(sft.wte.weight) == tokenizer.size
    assert all(torch.equal(p, q) for p, q in zip(sft.h.parameters(), whole.h.parameters(), strict=True))
    before = (out / "sft.pt").stat().st_mtime_ns
    done = run("ppo", *PPO, "--data", asked, "--out", out)                  # its preset is the run's
    assert done.code == 0 and "config gpt2" in done.out, done.out
    done = run("ppo", *PPO, "--data", asked, "--init", gpt2, "--fresh", "--out", out)       # the same again does no harm
    assert done.code == 0 and (out / "sft.pt").stat().st_mtime_ns == before, done.out
    (tmp_path / "mine.py").write_text("def score(prompts, responses):\n    return [len(r) for r in responses]\n")
    done = run("ppo", *PPO, "--init", gpt2, "--data", asked, "--reward", f"{tmp_path / 'mine.py'}:score", "--out", tmp_path / "new")
    assert done.code == 0 and training.finished(tmp_path / "new", "ppo_no_ptx"), done.out


def test_init_does_not_replace_a_model_that_is_there(gpt2, tiny_run, run, tmp_path):
    """Usual mistakes: --init is silently ignored, or the run's own model is lost."""
    folder, pairs = shutil.copytree(tiny_run.folder, tmp_path / "run"), pairs_file(tmp_path / "p.jsonl")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = run("reward", *REWARD, "--init", gpt2, "--data", pairs, "--out", folder)
    assert done.code == 2 and f"error: {folder} has an SFT model that is not {gpt2}" in done.out, done.out
    (folder / "sft.json").unlink()              # a base alone: its tokenizer must stay
    done = run("reward", *REWARD, "--init", gpt2, "--data", pairs, "--out", folder)
    assert done.code == 2 and "has no finished sft" in done.out and before.items() >= {
        path.name: path.read_bytes() for path in folder.iterdir()}.items()


# ---------------------------------------------------------------- and back, with the tokenizer
def test_export_is_a_folder_that_init_reads(gpt2, run, tmp_path):
    """`sample.py --export`: weights, shape, vocabulary. Usual mistakes: the vocabulary is missing, a merge has other parts."""
    out, mine = tmp_path / "out", tmp_path / "mine"
    assert run("reward", *REWARD, "--init", gpt2, "--data", pairs_file(tmp_path / "p.jsonl"), "--out", out).code == 0
    done = run("sample", "--out", out, "--export", mine)
    assert done.code == 0 and "vocab.json" in done.out.splitlines()[-1], done.out
    for name in ("vocab.json", "merges.txt"):
        assert (mine / name).read_text(encoding="utf8") == (gpt2 / name).read_text(encoding="utf8")
    model, tokenizer, _ = training.load_model(out, "sft")
    added = json.loads((mine / "added_tokens.json").read_text())
    assert added == {"<|pad|>": tokenizer.pad, "<|user|>": tokenizer.user, "<|assistant|>": tokenizer.assistant}
    back = load_gpt2(mine, data.Tokenizer.published(mine).size)
    assert back.config.n_head == 2 and all(torch.equal(p, q) for p, q in zip(back.parameters(), model.parameters(), strict=True))
    said = [run("sample", *flags, "--prompt", "the thin", "--stage", stage, "--temperature", 0).out.splitlines()[-1]
            for flags, stage in ((("--init", mine), "base"), (("--init", gpt2), "base"))]
    assert said[0] == said[1]


@pytest.mark.parametrize("text", ["the win in the thin win theory. ", "été à l'été, naïf 猫猫犬。\n\n"])
def test_the_vocabulary_of_any_merges(text):
    """What export writes is what was learnt, whatever the bytes: by tiktoken's own reader of these files."""
    ranks = data.train_bpe([text * 7], 293)
    order = [bytes([b]) for b in letters()]                                 # GPT-2 numbers the visible bytes first
    order += [bytes([b]) for b in range(256) if bytes([b]) not in order] + sorted(ranks, key=ranks.get)[256:]
    tokenizer = data.Tokenizer({token: i for i, token in enumerate(order)}, data.GPT2_PATTERN)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in benchmark("export").vocabulary(tokenizer).items():
            Path(folder, name).write_text(content, encoding="utf8")
        assert data.Tokenizer.published(folder).ranks == tokenizer.ranks and len(order) > 265


def test_a_tokenizer_of_the_runs_own_is_said(tiny_run, run, tmp_path):
    done = run("sample", "--out", tiny_run.folder, "--stage", "sft", "--export", tmp_path / "mine")
    assert done.code == 0 and "no vocab.json" in done.out.splitlines()[-1], done.out
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"model.safetensors", "config.json"}
    (tmp_path / "taken").write_text("")
    done = run("sample", "--out", tiny_run.folder, "--stage", "sft", "--export", tmp_path / "taken")
    assert done.code == 2 and "taken" in done.out.splitlines()[-1] and "Traceback" not in done.out


@pytest.mark.parametrize("script", ["sft", "reward", "ppo", "sample"])
def test_init_that_is_none_is_one_line(script, run, gpt2, tmp_path):
    """A missing folder, broken weights, a missing or broken vocabulary: one line, exit code 2."""
    more, out = (["--prompt", "hi"] if script == "sample" else ["--dtype", "fp32"]), tmp_path / "out"

    def said(path, *words):
        done = run(script, "--init", path, "--out", out, "--threads", 2, *more)
        last = done.out.strip().splitlines()[-1]
        assert done.code == 2 and last.startswith("error") and all(word in last for word in words), done.out

    said(tmp_path / "nowhere", "nowhere")
    vocabulary = (gpt2 / "vocab.json").read_text()
    (gpt2 / "vocab.json").write_text("[")
    said(gpt2, "vocab.json")
    (gpt2 / "vocab.json").unlink()
    said(gpt2, "vocab.json")
    (gpt2 / "vocab.json").write_text(vocabulary)
    weights = (gpt2 / "model.safetensors").read_bytes()
    (gpt2 / "model.safetensors").write_bytes(weights[:-1])
    said(gpt2, "model.safetensors", "cut off")


def test_a_base_that_is_there_is_kept(gpt2, tiny_run, run, tmp_path):
    """And its tokenizer: the usual mistake swaps the tokenizer under a model of another. --fresh takes GPT-2's."""
    folder = shutil.copytree(tiny_run.folder, tmp_path / "run")
    before = [(folder / name).read_bytes() for name in ("base.pt", "tokenizer.json")]
    few = [*tiny_run.flags, "--init", gpt2, "--out", folder, "--demonstrations", 40, "--epochs", 1]
    done = run("sft", *few)
    assert done.code == 0 and "is kept (--fresh makes it anew)" in done.out, done.out
    assert before == [(folder / name).read_bytes() for name in ("base.pt", "tokenizer.json")]
    done = run("sft", *few, "--fresh")
    assert done.code == 0 and "instead of pretraining" in done.out, done.out
    assert training.load_model(folder, "base")[0].config.block_size == 96
    assert data.Tokenizer.load(folder / "tokenizer.json").ranks == data.Tokenizer.published(gpt2).ranks
