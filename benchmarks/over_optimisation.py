"""Over-optimisation: what reward model (proxy) and judge (gold) gain over SFT, at which KL, along best-of-n and
along PPO (Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization").

    python benchmarks/over_optimisation.py runs/tiny [--best-of 64]

Adds "gold_proxy" to the run's evaluation.json: {"best_of" and "ppo": [{"kl", "proxy", "gold"}], "fit"}. PPO's
points are those that ppo.py measured on its held-out prompts while it trained.
"""
import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import PPOConfig, parse  # noqa: E402  (before torch: see there)

import numpy as np  # noqa: E402
import torch  # noqa: E402

import commands  # noqa: E402
import evaluate  # noqa: E402
import ppo  # noqa: E402
import training  # noqa: E402
import world  # noqa: E402


def best_of_n(proxy, values, n):
    """Mean value of the best of n by proxy, over all subsets: proxy, values (M,N), n <= N -> (M,).

    Unbiased (Nakano et al. 2021): of the C(N, n) subsets the i-th lowest proxy wins C(i-1, n-1).
    """
    N = proxy.shape[1]
    share = torch.tensor([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)], dtype=torch.float64)
    return values.double().gather(1, proxy.argsort(1)) @ share


def kl_of_best_of_n(n):
    """KL(best-of-n policy, the policy itself) in nats, at most (Stiennon et al. 2020, G.3)."""
    return math.log(n) - (n - 1) / n


def fit(kl, gain, rl):
    """[α, β] by least squares, d = sqrt(KL): best of n gains d (α - β d), RL d (α - β log d).   Gao et al. 2023"""
    d = np.sqrt(np.asarray(kl, dtype=float))
    slopes = np.stack([d, -d * (np.log(d) if rl else d)], axis=1)
    return np.linalg.lstsq(slopes, np.asarray(gain, dtype=float), rcond=None)[0].tolist()


def along_ppo(folder, sft, tokenizer, device, cast):
    """-> [{"kl", "proxy", "gold"}], gains over the SFT model on the same held-out prompts."""
    config = commands.stored_config(folder, "ppo", PPOConfig)
    score, _ = ppo.make_reward(config, folder, sft, tokenizer, cast, device)
    _, tasks = ppo.prompts_of(config, tokenizer, sft.config.block_size)
    start = ppo.held_out(sft, sft, tokenizer, tasks, score, config, cast)
    rows = map(json.loads, (folder / "ppo.jsonl").read_text(encoding="utf8").splitlines())
    return [{"kl": row["held_out_kl"], **{name: row[name] - start[name] for name in ("proxy", "gold")}}
            for row in rows if "held_out_kl" in row]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--best-of", type=int, default=64)
    args = parser.parse_args()
    config, _ = parse("evaluate", ["--out", str(args.run), "--best-of", str(args.best_of)])
    device, cast, _ = training.compute(config)
    sft, tokenizer, _ = training.load_model(args.run, "sft", device)
    tasks = world.tasks(config.per_category * len(world.CATEGORIES), "test")
    _, proxy, gold = evaluate.best_of(config, args.run, sft, tokenizer, tasks, device, cast)
    curves = {"best_of": [{"n": n, "kl": kl_of_best_of_n(n)} | {
        name: (best_of_n(proxy, x, n).mean() - x.double().mean()).item()
        for name, x in (("proxy", proxy), ("gold", gold))} for n in (2, 4, 8, 16, 32, 64) if n <= args.best_of]}
    if training.finished(args.run, "ppo"):
        curves["ppo"] = along_ppo(args.run, sft, tokenizer, device, cast)
    curves["fit"] = {path: {name: fit([p["kl"] for p in points], [p[name] for p in points], path == "ppo")
                            for name in ("proxy", "gold")} for path, points in curves.items() if len(points) > 2}
    commands.add_to_evaluation(args.run, gold_proxy=curves)
    for way in ("best_of", "ppo"):
        for p in curves.get(way, []):
            print(f"{way:8} KL {p['kl']:5.2f}   proxy {p['proxy']:+.3f}   gold {p['gold']:+.3f}")
    print(f"fits [alpha, beta]: {json.dumps(curves['fit'])}\n  python benchmarks/report.py {args.run}      draws it")


if __name__ == "__main__":
    training.command(main)
