"""InstructGPT's headline in small: an aligned model against pretrained ones a hundred times its size.

    python evaluate.py --config headline [--out runs/headline] [--seed 1]

Trains what is missing (every command resumes; about an hour on two cores): a small model through all three
steps, and a big one through steps 0 and 1. Then all of them answer the same held-out prompts, and the exact
judge compares. Control rows, to keep it honest: the big base without and with examples, the big base after SFT,
the small base, parameters and pretraining tokens of each. Prints Markdown, writes <out>/headline.json.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import parse  # noqa: E402  (before torch: see there)

import commands  # noqa: E402
import evaluate  # noqa: E402
import training  # noqa: E402
import world  # noqa: E402

# 0.12 M (a preset of config.py) and 12.4 M parameters, embeddings included. The small one is cheap, so it
# reads more; the big one has the learning rates of its width.
SMALL = "--config", "headline"
BIG = ("--n-embd 400 --n-layer 6 --n-head 8 --init-std 0.05 --pretrain-steps 3000 --pretrain-lr 1e-3 "
       "--pretrain-matrix-lr 0.004 --batch-size 64 --lr 7e-4 --matrix-lr 0.0014").split()


def answer(folder, stage, shots, tasks, config, device, cast):
    """-> (verdicts, parameters, tokens of pretraining) of one model."""
    model, tokenizer, _ = training.load_model(folder, stage, device)
    base = training.load_model(folder, "base", device)[2]
    found = evaluate.respond(model, tokenizer, tasks, shots, 1.0, config, cast)
    verdicts = world.judge_many(tasks, [a.text for a in found], [a.ended for a in found])
    return verdicts, model.num_params(), base["steps"] * base["config"]["pretrain_batch"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/headline"))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    small, big = (args.out.resolve() / name for name in ("small", "big"))
    for folder, flags in ((small, SMALL), (big, BIG)):
        if not training.finished(folder, "sft"):
            commands.python("sft.py", "--seed", args.seed, "--out", folder, *flags)
    for stage in ("reward", "ppo"):
        if not training.finished(small, stage):
            commands.python(f"{stage}.py", "--seed", args.seed, "--out", small)

    config, _ = parse("evaluate", ["--seed", str(args.seed)])
    device, cast, _ = training.compute(config)
    tasks = world.tasks(config.per_category * len(world.CATEGORIES), "test")
    rows = {"small, PPO-ptx": (small, "ppo", None), "small, SFT": (small, "sft", None),
            "small base, few-shot": (small, "base", 3), "big base, no examples": (big, "base", 0),
            "big base, few-shot": (big, "base", 3), "big, SFT": (big, "sft", None)}
    found = {name: answer(*how, tasks, config, device, cast) for name, how in rows.items()}
    aligned, report = found["small, PPO-ptx"][0], {}
    for name, (verdicts, parameters, tokens) in found.items():
        report[name] = {"parameters": parameters, "pretraining_tokens": tokens,
                        "accuracy": evaluate.estimate([v.right for v in verdicts]),
                        "gold": evaluate.estimate([v.score for v in verdicts]),
                        "small_ppo_wins": evaluate.by_group(tasks, evaluate.win_rate(aligned, verdicts))}
    training.save_atomically(report, args.out / "headline.json")
    print("\n| model | parameters | pretraining tokens | accuracy, % | gold | small PPO-ptx preferred, % | "
          + " | ".join(world.CATEGORIES).replace("_", " ") + " |\n" + "|---" * (6 + len(world.CATEGORIES)) + "|")
    for name, row in report.items():
        wins = row["small_ppo_wins"]
        print(f"| {name} | {row['parameters'] / 1e6:.2f} M | {row['pretraining_tokens'] / 1e6:.1f} M | "
              f"{evaluate.cell(row['accuracy'])} | {evaluate.cell(row['gold'], 1, 3)} | {evaluate.cell(wins['overall'])} | "
              + " | ".join(evaluate.cell(wins[c], 100, 0, False) for c in world.CATEGORIES) + " |")


if __name__ == "__main__":
    training.command(main)
