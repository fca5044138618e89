"""What one number is worth: a step of a finished run again, with each of several values, evaluated side by side.

    python benchmarks/sweep.py runs/tiny ppo.py --ptx-coef 0 0.1 0.3 1 3
    python benchmarks/sweep.py runs/tiny ppo.py --reward execution
    python benchmarks/sweep.py runs/tiny sft.py --epochs 1 2 4 8 16

Each value has a folder of its own beside the run, runs/tiny-ptx-coef-0.1, with copies of what the step starts from;
seed and preset are the run's. Goes on where it was stopped. Adds "sweep_ptx_coef", say, to the run's evaluation.json, and
prints it in Markdown: the stage that the step makes,
and first the run's SFT model. "code" is the share of code tasks whose programs do what was asked, "RM score" the mean
score that the run's own reward model gives to the answers to held-out prompts, "demonstrations" their held-out loss.
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import PPOConfig, parse  # noqa: E402  (before torch: see there)

import commands  # noqa: E402
import evaluate  # noqa: E402
import training  # noqa: E402
import world  # noqa: E402
from ppo import make_reward  # noqa: E402

STARTS_FROM = {"sft.py": ["base"], "reward.py": ["base", "sft"], "ppo.py": ["base", "sft", "reward"]}
COLUMNS = ("preferred to SFT, %", "accuracy, %", "gold", "RM score", "code, %", "made up, %", "KL, nats",
           "demonstrations", "documents loss", "prose loss", "seconds")


def prepare(run, folder, script):
    """A folder with copies of what the step starts from; begun anew where the run has other weights by now."""
    names = [f"{stage}.*" for stage in STARTS_FROM[script]] + ["tokenizer.json", "corpus-*.bin"]
    found = [path for name in names for path in run.glob(name)]
    if any(not (copy := folder / path.name).exists() or copy.stat().st_mtime < path.stat().st_mtime for path in found):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in found:
            shutil.copy2(path, folder)


def code_tasks(n=300):
    """Held-out tasks whose answer is a program."""
    tasks = world.tasks(8 * n + 100, "test", 7, ("generation",))       # about one in six is code
    return [task for task in tasks if task.check[0] in ("python", "game")][:n]


def measure(run, folder, stage):
    """-> (the share of code tasks solved, the mean score by the reward model of `run`), at temperature 1; estimates"""
    config, _ = parse("evaluate", ["--out", str(folder)])
    (device, cast, _), code = training.compute(config), code_tasks()
    model, tokenizer, _ = training.load_model(folder, stage, device)
    found = evaluate.respond(model, tokenizer, code, None, 1.0, config, cast)
    verdicts = world.judge_many(code, [a.text for a in found], [a.ended for a in found])
    scores = []
    if training.finished(run, "reward"):
        judge, tasks = training.load_model(run, "sft", device)[0], world.tasks(540, "test")
        score, _ = make_reward(PPOConfig(), run, judge, tokenizer, cast, device)
        scores = score(tasks, [a.text for a in evaluate.respond(model, tokenizer, tasks, None, 1.0, config, cast)])
    return evaluate.estimate([v.right for v in verdicts]), evaluate.estimate(scores)


def row(report, stage, code, scores, facts):
    """The cells of one stage of an evaluation.json; facts: what <stage>.json says."""
    wins, kl = report["win_rate"].get(f"{stage}_vs_sft"), report["kl"].get(stage)
    loss, own = report["pretraining_loss"][stage], facts.get("losses", {}).get("demonstrations")
    return [evaluate.cell(wins["overall"]) if wins else "", evaluate.cell(report["accuracy"][stage]["overall"]),
            evaluate.cell(report["gold"][stage]["overall"], 1, 3), evaluate.cell(scores, 1, 2) if scores["n"] else "",
            evaluate.cell(code), evaluate.cell(report["hallucination"][stage], 100, 0),
            evaluate.cell(kl, 1, 2) if kl else "", evaluate.cell(own, 1, 3) if own else "",
            evaluate.cell(loss["documents"], 1, 3), evaluate.cell(loss["prose"], 1, 3), str(round(facts["seconds"]))]


def table(name, rows):
    """The rows of a sweep -> (title, columns, rows), a table of the page, too"""
    return f"each with another {name}", COLUMNS, rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("script", choices=STARTS_FROM)
    args, (flag, *values) = parser.parse_known_args()
    said = json.loads((args.run / "sft.json").read_text(encoding="utf8"))["config"]
    common, rows = ("--seed", said["seed"], "--config", said["config"]), {}
    for value in values:
        folder = args.run.resolve().with_name(f"{args.run.name}{flag.replace('--', '-')}-{value.replace('/', '-')}")
        prepare(args.run, folder, args.script)
        earlier = STARTS_FROM[args.script]
        def made():
            return [s for s in training.MADE_BY if s not in earlier and training.finished(folder, s)]
        if not made():
            commands.python(args.script, *common, "--out", folder, flag, value)
        if not (folder / "evaluation.json").exists():
            commands.python("evaluate.py", *common, "--best-of", 1, "--out", folder)
        report = json.loads((folder / "evaluation.json").read_text(encoding="utf8"))
        for stage in (["sft"] if "sft" in earlier and not rows else []) + made():
            facts = json.loads((folder / f"{stage}.json").read_text(encoding="utf8"))
            name = stage if stage in earlier else f"{stage}, {flag[2:]} {value}"
            rows[name] = row(report, stage, *measure(args.run, folder, stage), facts)
    name = flag[2:].replace("-", "_")
    commands.add_to_evaluation(args.run, **{f"sweep_{name}": rows})
    print("\n" + evaluate.markdown(*table(name, rows)))


if __name__ == "__main__":
    training.command(main)
