"""How fast is this model, measured against what this machine can do?

    python benchmarks/speed.py [--threads 2] [--rounds 7]

Everything that is compared runs in ONE process, in turns, round after round; the numbers are
medians. On a shared machine believe the ratios, never an absolute time. Work is counted as the
multiply-adds (2 FLOPs each) of all matrix products, forward and backward, attention included at
the causal half that it needs; nothing else counts, not even the embedding.

Axes: B batch, T tokens, V vocabulary, C channels, H heads, D head size.
"""
import argparse
import functools
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from config import SFTConfig, parse  # noqa: E402  (before torch: see there)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import data  # noqa: E402
import ppo  # noqa: E402
import reward  # noqa: E402
import sft  # noqa: E402
import training  # noqa: E402
import world  # noqa: E402
from attention import attention  # noqa: E402
from model import GPT, GPTConfig, generate  # noqa: E402

B, T, V, C, L, H = 16, 256, 1024, 256, 4, 4
CONFIG = GPTConfig(vocab_size=V, block_size=T, n_layer=L, n_head=H, n_embd=C)
FP32, BF16 = torch.float32, torch.bfloat16


def in_turns(rounds, **routes):
    """Each function once a round, after one round to warm up -> {name: median seconds}."""
    times = {name: [] for name in routes}
    for _ in range(rounds + 1):
        for name, run in routes.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def core_seconds():
    """Seconds that our cores were busy so far, for anyone; 0 where that cannot be known."""
    ours = {f"cpu{i}" for i in os.sched_getaffinity(0)}
    rows = [line.split() for line in open("/proc/stat")] if os.path.exists("/proc/stat") else []
    ticks = sum(sum(map(int, row[1:4] + row[6:9])) for row in rows if row[0] in ours)
    return ticks / os.sysconf("SC_CLK_TCK")


def gemm(m, k, n, dtype):
    a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
    return lambda: a @ b


def peaks(rounds):
    """Prints GFLOP/s of plain products -> the fp32 peak in FLOP/s."""
    print("\nmatrix products, GFLOP/s         fp32    bf16")
    best = 0
    for m, k, n in [(2048, 2048, 2048), (B * T, C, 3 * C), (B * T, C, 4 * C), (B * T, 4 * C, C),
                    (64, C, 4 * C)]:                                # the last: decoding 64 rows
        seconds = in_turns(rounds, fp32=gemm(m, k, n, FP32), bf16=gemm(m, k, n, BF16))
        rate = {name: 2 * m * k * n / s for name, s in seconds.items()}
        print(f"  {f'{m} x {k} x {n}':28} {rate['fp32'] / 1e9:6.0f}  {rate['bf16'] / 1e9:6.0f}")
        best = max(best, rate["fp32"])
    return best


def training_flops():
    """Of one step: forward, and twice that backward."""
    per_token = 12 * L * C * C + C * V      # c_attn, c_proj, c_fc, c_proj; the head
    per_token += L * 2 * C * T / 2          # QKᵀ and weights·V, half of which causality needs
    return 3 * 2 * per_token * B * T


def trainer(route):
    """A whole training step; "bf16 weights" computes with a bf16 copy of the fp32 weights."""
    torch.manual_seed(0)
    gpt, tokens = GPT(CONFIG), torch.randint(V, (B, T + 1))
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-4, fused=True)

    def step():
        weights = dict(gpt.named_parameters())
        if route == "bf16 weights":  # .to() is part of the graph: gradients arrive in fp32
            weights = {name: p.to(BF16) for name, p in weights.items()}
        with torch.autocast("cpu", BF16, enabled=route == "bf16 autocast"):
            logits = torch.func.functional_call(gpt, weights, tokens[:, :-1])
        F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def training_step(rounds, peak):
    seconds = in_turns(rounds, **{r: trainer(r) for r in ("fp32", "bf16 autocast", "bf16 weights")})
    print(f"\ntraining step, {L} layers, C={C}, B·T={B}·{T}, V={V}: "
          f"{training_flops() / 1e9:.0f} GFLOP")
    print("                               ms   tok/s   GFLOP/s  of the fp32 GEMM peak   x fp32")
    for name, s in seconds.items():
        rate = training_flops() / s
        print(f"  {name:24} {s * 1e3:8.0f} {B * T / s:7.0f} {rate / 1e9:9.0f} {rate / peak:17.0%}"
              f" {seconds['fp32'] / s:16.2f}")


def attention_both_ways(rounds):
    print(f"\ncausal attention, forward + backward, B·T={B * T}, ms      by hand   flash")
    for dtype in (FP32, BF16):
        for t in (128, 256, 512, 1024):
            q, k, v = (torch.randn(B * T // t, H, t, C // H, dtype=dtype, requires_grad=True)
                       for _ in range(3))

            def run(flash):
                return lambda: attention(q, k, v, causal=True, flash=flash).sum().backward()
            ms = in_turns(rounds, hand=run(False), flash=run(True))
            print(f"  {str(dtype)[6:]:9} T={t:<40} {ms['hand'] * 1e3:8.1f}"
                  f" {ms['flash'] * 1e3:7.1f}")


@torch.no_grad()
def textbook(gpt, prompts, new):
    """Generation as one first writes it: the whole text through the model for each new token."""
    tokens = torch.tensor(prompts)
    for _ in range(new):
        probs = gpt(tokens)[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probs, 1)], 1)


def generation(batch=64, prompt=64, new=128):
    fp32, bf16 = (GPT(CONFIG).to(dtype).eval() for dtype in (FP32, BF16))
    prompts = torch.randint(V, (batch, prompt)).tolist()
    seconds = in_turns(1, **{                                       # the textbook takes a minute
        "textbook loop, fp32": lambda: textbook(fp32, prompts, new),
        "cache, fp32": lambda: generate(fp32, prompts, new),
        "cache, bf16": lambda: generate(bf16, prompts, new)})
    print(f"\ngeneration, C={C}, batch {batch}, prompt {prompt}, {new} new tokens     tok/s"
          "   x textbook")
    for name, s in seconds.items():
        print(f"  {name:52} {batch * new / s:7.0f} {seconds['textbook loop, fp32'] / s:12.1f}")


@functools.cache
def documents():
    """-> (20,000 of the built-in documents, a tokenizer)"""
    texts = list(itertools.islice(world.documents(5), 20_000))
    return texts, data.Tokenizer(data.train_bpe(texts[:2000], 2044))


def fine_tuning_step(size, examples, n=64):
    """A step of step 1 at `tiny`'s shape, n demonstrations: packed in rows of `size` tokens, or 0, one a row."""
    torch.manual_seed(0)
    gpt, cast = GPT(GPTConfig(2048, T, 4, 4, 128)), torch.autocast("cpu", BF16)
    order = itertools.cycle(data.epoch_batches([len(ids) for ids, _ in examples], n, 0))

    def step():
        sft.accumulate(gpt, [data.collate([examples[i] for i in next(order)], 1, size)], cast)
        gpt.zero_grad()
    return step


def packing(rounds):
    demonstrations = world.demonstrations(2000, "train", 0)
    examples = [data.encode_example(documents()[1], *t.parts[:2], answer, t.history) for t, answer in demonstrations]
    seconds = in_turns(10 * rounds, padded=fine_tuning_step(0, examples), packed=fine_tuning_step(T, examples))
    print(f"\nfine-tuning, 64 demonstrations a step, n_embd 128, bf16: padded {seconds['padded'] * 1e3:.0f} ms, "
          f"packed in rows of {T} tokens {seconds['packed'] * 1e3:.0f} ms")


def reading(rounds):
    """Your own text, your own comparisons: from the file to ids, to records."""
    texts, tokenizer = documents()
    with tempfile.TemporaryDirectory() as folder:
        text, pairs = Path(folder, "text.txt"), Path(folder, "pairs.jsonl")
        text.write_text("\n\n\n".join(texts), encoding="utf8")
        pairs.write_text("".join(json.dumps({"prompt": f"{i}: {a[:200]}", "chosen": a[-300:], "rejected": b[-300:]}) + "\n"
                                 for i, (a, b) in enumerate(zip(texts * 5, texts[1:] * 5))), encoding="utf8")
        long = f"{text}," * 19 + str(text)

        def corpus():
            for path in Path(folder).glob("corpus-*"):
                path.unlink()
            sft.make_corpus(SFTConfig(data=long), Path(folder), tokenizer, long)
        routes = {"tiktoken's encode_ordinary_batch, from memory": (1, lambda: tokenizer.encoding.encode_ordinary_batch(texts)),
                  "ours, from a file to an array":
                      (1, lambda: [data.pack(tokenizer, part) for part in data.read_text(text)]),
                  "ours, twenty files to a memory-mapped corpus": (20, corpus)}
        size = text.stat().st_size / 1e6
        seconds = in_turns(min(rounds, 3), **{name: run for name, (_, run) in routes.items()})
        start = time.perf_counter()
        n, spent = len(data.read_comparisons(pairs)[0]), time.perf_counter() - start
        print(f"\nreading text                                           MB/s\n" + "\n".join(
            f"  {name:50} {times * size / seconds[name]:6.1f}" for name, (times, _) in routes.items()))
        print(f"reading {n:,} comparisons, {pairs.stat().st_size / 1e6:.0f} MB: {spent:.1f} s")


def ppo_update(rounds, episodes=64, prompt=48, answer=16):
    """One minibatch of PPO against the same tokens in plain training of policy and value model."""
    config, _ = parse("ppo", [])
    gpt = GPT(GPTConfig(vocab_size=2048, block_size=256, n_layer=4, n_head=4, n_embd=128))
    policy, value, cast = gpt, reward.RewardModel(gpt, answer_after=3), torch.autocast("cpu", BF16)
    prompts, answers = (torch.randint(4, 2048, (episodes, n)).tolist() for n in (prompt - 1, answer))
    minibatch = [(list(range(episodes)), ppo.Episodes([p + [3] for p in prompts], answers, 1, "cpu"))]
    old, _, values, mask, _ = ppo.assess(policy, policy, value, [minibatch], cast)
    advantages, e = torch.randn_like(old), minibatch[0][1]
    labels = torch.cat([torch.zeros(episodes, prompt, dtype=torch.bool), mask.bool()], 1)

    def plain():
        sft.accumulate(policy, [(e.tokens, e.real, labels)], cast)
        ((e.values(value, cast) - values) ** 2).mean().backward()
    seconds = in_turns(rounds, plain=plain, ppo=lambda: ppo.update(
        policy, value, minibatch, old, advantages, values, values, mask, config, cast))
    print(f"\nPPO update, {episodes} episodes of {prompt} + {answer} tokens, n_embd 128, bf16: "
          f"{seconds['ppo'] * 1e3:.0f} ms, plain training of policy and value model {seconds['plain'] * 1e3:.0f} ms, "
          f"{seconds['ppo'] / seconds['plain']:.2f} x")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    training.compute(parse("evaluate", ["--threads", str(args.threads)])[0])    # threads and memory as in the scripts
    flags = open("/proc/cpuinfo").read() if os.path.exists("/proc/cpuinfo") else ""
    print(f"PyTorch {torch.__version__}, {args.threads} threads,",
          *(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags),
          f"- load average at the start {os.getloadavg()[0]:.1f}")
    start, busy, own = time.perf_counter(), core_seconds(), time.process_time()
    peak = peaks(args.rounds)
    training_step(args.rounds, peak)
    attention_both_ways(args.rounds)
    packing(args.rounds)
    ppo_update(args.rounds)
    reading(args.rounds)
    generation()
    foreign = core_seconds() - busy - (time.process_time() - own)
    part = max(0, foreign / (time.perf_counter() - start) / args.threads)
    print(f"\nforeign load on our cores: {part:.0%}"
          + (" - WARNING: others were at work, do not trust these numbers" if part > 0.05 else ""))


if __name__ == "__main__":
    training.command(main)
