"""What more time buys: the whole recipe at a fraction of its work, win rate against minutes.

    python benchmarks/budgets.py [--fractions 0.25 0.5 1 2] [--seeds 3] [--out runs/budgets]

At a fraction f every step has f times its optimiser steps, demonstrations, prompts and iterations; all else stays.
Runs what is missing (a stopped run goes on), prints a table in Markdown and draws <out>/budgets.png. Minutes
are the wall time of the three steps here: on a busy machine they are more.
"""
import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import PPOConfig, RewardConfig, SFTConfig, flag  # noqa: E402  (before torch: see there)

import evaluate  # noqa: E402
import training  # noqa: E402
from commands import python  # noqa: E402
from seeds import merge  # noqa: E402

SCALED = {"sft": (SFTConfig, "pretrain_steps", "demonstrations"), "reward": (RewardConfig, "prompts"),
          "ppo": (PPOConfig, "iterations", "prompts")}


def flags(stage, fraction):
    """("sft", 0.5) -> ["--pretrain-steps", "2000", ...]"""
    config, *names = SCALED[stage]
    return [word for name in names for word in (flag(name), str(round(fraction * getattr(config, name))))]


def run(folder, seed, fraction):
    """-> {"minutes", "preferred" to its own SFT model, "accuracy" of SFT and PPO, "gold"}"""
    common, times = ("--seed", seed, "--out", folder), folder / "minutes.json"
    minutes = json.loads(times.read_text()) if times.exists() else {}
    for stage in SCALED:
        if not training.finished(folder, stage):
            began = time.perf_counter()
            python(f"{stage}.py", *common, *flags(stage, fraction))
            minutes[stage] = (time.perf_counter() - began) / 60
            training.save_atomically(minutes, times)
    if not (folder / "evaluation.json").exists():
        python("evaluate.py", "--best-of", 1, *common)
    report = json.loads((folder / "evaluation.json").read_text(encoding="utf8"))
    return {"minutes": sum(minutes.values()),
            "preferred": report["win_rate"]["ppo_vs_sft"]["overall"]["mean"],
            **{f"{stage} {key}": report[key][stage]["overall"]["mean"] for key in ("accuracy", "gold")
               for stage in ("sft", "ppo")}, "made up by sft": report["hallucination"]["sft"]["mean"],
            "made up by ppo": report["hallucination"]["ppo"]["mean"], "KL": report["kl"]["ppo"]["mean"]}


def draw(rows, path):
    """Gold score of SFT and PPO, and the win rate between them, against minutes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    minutes = [row["minutes"]["mean"] for row in rows]
    for axes, key, colour, label in ((left, "sft gold", "tab:blue", "SFT"), (left, "ppo gold", "tab:red", "PPO-ptx"),
                                     (right, "preferred", "tab:red", "")):
        mean, low, high = ([row[key][part] for row in rows] for part in ("mean", "low", "high"))
        axes.errorbar(minutes, mean, [[m - a for m, a in zip(mean, low)], [b - m for m, b in zip(mean, high)]],
                      fmt="o-", color=colour, label=label, capsize=3)
    for axes, label in ((left, "gold score, held-out prompts"), (right, "PPO-ptx preferred to its SFT model")):
        axes.set(xscale="log", xlabel="minutes for all three steps", ylabel=label)
        axes.set_xticks(minutes, [f"{m:.0f}" for m in minutes], minor=False)
        axes.minorticks_off()
    left.legend(frameon=False)
    right.axhline(0.5, color="grey", lw=0.8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.25, 0.5, 1, 2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/budgets"))
    args = parser.parse_args()
    out, rows = args.out.resolve(), {}
    for fraction in args.fractions:
        found = [run(out / f"{fraction:g}" / f"seed{seed}", seed, fraction) for seed in range(1, args.seeds + 1)]
        rows[f"{fraction:g}"] = merge([{k: {"mean": v, "low": v, "high": v} for k, v in one.items()} for one in found])
    training.save_atomically(rows, out / "budgets.json")
    scale = {"minutes": (1, 1), "KL": (1, 2), "sft gold": (1, 3), "ppo gold": (1, 3)}
    print("\n" + evaluate.markdown("work", [*next(iter(rows.values()))], {
        f"× {f}": [evaluate.cell(e, *scale.get(key, (100, 1))) for key, e in row.items()] for f, row in rows.items()}))
    draw([*rows.values()], out / "budgets.png")
    print(f"\nmean (lowest to highest) of {args.seeds} seeds; drawn: {out / 'budgets.png'}")


if __name__ == "__main__":
    training.command(main)
