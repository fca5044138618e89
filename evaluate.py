"""What each step bought: the stages of a run answer held-out prompts, and the exact judge decides.

    python evaluate.py --config tiny                  the stages that the run has, and best-of-4 of SFT
    python evaluate.py --config tiny --best-of 64     reward model and judge against KL, up to best-of-64
    python evaluate.py --config tiny --seeds 3        the whole recipe with three seeds, what is missing of it

Prints tables in Markdown and writes <run>/evaluation.json; an estimate is always {"mean", "low", "high", "n"},
with its 95 % interval, over several seeds with the lowest and the highest. Temperature 1, except in the keys
that end in _greedy. `base_few_shot` is the pretrained model, shown three examples of the category before each
question; the others read the bare prompt."""
import json
import math
import subprocess
import sys
from itertools import product

from config import PPOConfig, UserError, parse     # before torch: see there

import numpy as np
import torch

import data
import training
import world
from ppo import held_out, make_reward, prompts_of, sequence_kl
from sft import held_out_loss, held_out_text, held_out_windows
from training import say

SETS = {"test_phrasing": "_unseen_phrasing", "test_combination": "_unseen_combination", "test": ""}
STAGES, FEW_SHOT = ("base", "sft", "dpo", "grpo", "ppo_no_ptx", "ppo"), "base_few_shot"


def estimate(values):
    """The mean of n numbers with its 95 % interval: Wilson's for a proportion, the normal one otherwise."""
    n, z = len(values), 1.96
    if not n:                                   # nothing was measured, so nothing is excluded
        return {"mean": 0.0, "low": 0.0, "high": 1.0, "n": 0}
    mean = middle = sum(values) / n
    half = z * math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)
    if all(v in (0, 1) for v in values):        # stays inside [0, 1], also where all are right
        middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"mean": mean, "low": middle - half, "high": middle + half, "n": n}


def few_shot_prompt(tokenizer, task, examples, room):
    """Worked examples and then the question, as a document -> ids; fewer examples where room is short."""
    texts = [f"Question: {t.prompt}\nAnswer: {'' if t is task else t.output}" for t in (*examples, task)]
    for n in range(len(examples), -1, -1):
        ids = [tokenizer.end, *tokenizer.encode("\n\n".join(texts[:n] + texts[-1:]))]
        if len(ids) <= room:
            break
    return ids[-room:]


def respond(model, tokenizer, tasks, few_shot, temperature, config, cast):
    """-> [Answer]: one to every task."""
    prompts = [data.encode_prompt(tokenizer, *t.parts) for t in tasks]
    if few_shot:                                # three examples each
        n, shown = model.config.block_size, world.tasks(9 * len(world.CATEGORIES), "train", config.seed + 1)
        prompts = [few_shot_prompt(tokenizer, t, [s for s in shown if s.category == t.category][i % 3::3],
                                   max(n - 64, n // 2)) for i, t in enumerate(tasks)]
    found = training.respond(model, tokenizer, prompts, 100, temperature, config.seed, cast,
                             config.batch_size)
    if few_shot:                                # a base goes on with the next question: its answer ends there
        cut = [a.text.split("\n\nQuestion:") for a in found]
        found = [a._replace(text=parts[0], ended=a.ended or len(parts) > 1) for a, parts in zip(found, cut)]
    return found


def by_group(tasks, values):
    """{"overall" and each category: estimate} of one value a task."""
    of = {c: [v for v, task in zip(values, tasks) if task.category == c] for c in world.CATEGORIES}
    return {name: estimate(members) for name, members in {"overall": values, **of}.items()}


def tabulate(tasks, verdicts):
    """The estimates of one stage on one set of prompts -> {name: estimate, or {category: estimate}}."""
    unsupported = [not v.supported for task, v in zip(tasks, verdicts) if not task.answerable]
    return {"accuracy": by_group(tasks, [v.right for v in verdicts]),
            "gold": by_group(tasks, [v.score for v in verdicts]), "hallucination": estimate(unsupported),
            **{name: estimate([getattr(v, name) for v in verdicts]) for name in ("stopped", "plain", "kept")}}


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


def over_optimisation(config, folder, sft, tokenizer, tasks, device, cast):
    """What reward model (proxy) and judge (gold) gain over SFT at which KL, along best-of-n and along PPO
    -> {"best_of" and "ppo": [{"kl", "proxy", "gold"}], "fit"}, {best_of_n: its verdicts}. Gao et al. 2023"""
    score, _ = make_reward(PPOConfig(), folder, sft, tokenizer, cast, device)
    training.progress(f"  best of {config.best_of}: {len(tasks) * config.best_of:,} answers", always=True)
    many = [task for task in tasks for _ in range(config.best_of)]
    found = respond(sft, tokenizer, many, False, 1.0, config, cast)
    verdicts = world.judge_many(many, [a.text for a in found], [a.ended for a in found])
    values = torch.tensor([score(many, [a.text for a in found]), [v.score for v in verdicts]])
    both = dict(zip(("proxy", "gold"), values.view(2, len(tasks), -1)))             # each (M,N)
    picked = {f"best_of_{n}": [verdicts[i * config.best_of + k] for i, k in enumerate(
        both["proxy"][:, :n].argmax(1).tolist())] for n in (4, 16, 64) if n <= config.best_of}
    curves = {"best_of": [{"n": n, "kl": kl_of_best_of_n(n)} | {
        name: (best_of_n(both["proxy"], x, n).mean() - x.double().mean()).item() for name, x in both.items()}
        for n in (2, 4, 8, 16, 32, 64) if n <= config.best_of]}
    facts = json.loads((folder / "ppo.json").read_text(encoding="utf8")) if training.finished(folder, "ppo") else {}
    if facts and facts["config"]["reward"] == "model" and not facts["config"]["data"]:
        ppo = PPOConfig(**facts["config"])      # on PPO's own held-out prompts; where it began on them:
        start = held_out(sft, sft, tokenizer, prompts_of(ppo)[1], score, ppo, cast)
        rows = [json.loads(line) for line in (folder / "ppo.jsonl").read_text(encoding="utf8").splitlines()]
        curves["ppo"] = [{"kl": row["held_out_kl"]} | {name: row[name] - start[name] for name in both}
                         for row in rows if "held_out_kl" in row]
    curves["fit"] = {path: {name: fit([p["kl"] for p in points], [p[name] for p in points], path == "ppo")
                            for name in both} for path, points in curves.items() if len(points) > 2}
    return curves, picked


def win_rate(a, b):
    """P(a better) + ½ P(equal), prompt by prompt: two lists of verdicts -> [0, ½ or 1]"""
    return [(x.score > y.score) + 0.5 * (x.score == y.score) for x, y in zip(a, b)]


def measure(config, folder, stages, device, cast):
    """Everything about the stages of one run -> what evaluation.json holds."""
    report = {"seed": config.seed, "seconds": {}, "kl": {}, "pretraining_loss": {}, "win_rate": {}}
    sets = {name: world.tasks(config.per_category * len(world.CATEGORIES), name) for name in SETS}
    models, verdicts, texts, test = {}, {}, None, sets["test"]
    report["answers"] = [{"prompt": task.prompt} for task in test[:10]]
    for stage in stages:
        model, tokenizer, facts = training.load_model(folder, stage, device)
        label = FEW_SHOT if stage == "base" else stage
        for (name, tasks), (temperature, greedy) in product(sets.items(), ((0.0, "_greedy"), (1.0, ""))):
            training.progress(f"  {label}: {name}{greedy}")
            found = respond(model, tokenizer, tasks, stage == "base", temperature, config, cast)
            judged = world.judge_many(tasks, [a.text for a in found], [a.ended for a in found])
            for key, value in tabulate(tasks, judged).items():
                report.setdefault(key + SETS[name] + greedy, {})[label] = value
            if name == "test" and greedy:
                report["answers"] = [row | {label: a.text} for row, a in zip(report["answers"], found)]
        models[stage], verdicts[label], report["seconds"][stage] = model, judged, facts["seconds"]
        texts = texts or held_out_text(tokenizer, 0)        # the stages of a run share their tokenizer
        report["pretraining_loss"][label] = {text: held_out_loss(model, held_out_windows(
            ids, model.config.block_size, 64), cast) for text, ids in texts.items()}    # InstructGPT 4.2
        if stage.startswith("ppo"):             # found: the last set's, test at temperature 1
            report["kl"][stage] = estimate(sequence_kl(model, models["sft"], tokenizer, test, found, cast))
    if training.finished(folder, "reward"):
        report["reward_model"] = json.loads((folder / "reward.json").read_text(encoding="utf8"))["measured"]
        if config.best_of > 1:
            report["gold_proxy"], picked = over_optimisation(
                config, folder, models["sft"], tokenizer, test, device, cast)
            for label, judged in picked.items():
                verdicts[label] = judged
                for key, value in tabulate(test, judged).items():
                    report[key][label] = value
    for a, b in product(verdicts, (FEW_SHOT, "sft", "best_of_4")):
        if a != b and b in verdicts:
            report["win_rate"][f"{a}_vs_{b}"] = by_group(test, win_rate(verdicts[a], verdicts[b]))
    return report


def over_seeds(config, folder):
    """The whole recipe with seeds 1, 2, ..., what is missing of it -> one report: mean, lowest, highest."""
    reports = []
    for seed in range(1, config.seeds + 1):
        out = folder / f"seed{seed}"
        for stage, script, *more in (("sft", "sft.py"), ("reward", "reward.py"), ("ppo", "ppo.py"),
                                     ("ppo_no_ptx", "ppo.py", "--ptx-coef", "0"), ("", "evaluate.py")):
            if not training.finished(out, stage):
                words = script, "--config", config.config, "--seed", str(seed), "--out", str(out), *more
                say("\n$ python " + " ".join(words))
                if subprocess.run([sys.executable, *words]).returncode:
                    raise UserError(f"python {' '.join(words)} failed. The same command goes on from there")
        reports.append(json.loads((out / "evaluation.json").read_text(encoding="utf8")))
    def merge(values):
        first = values[0]
        if isinstance(first, dict) and "low" not in first:
            return {key: merge([v[key] for v in values]) for key in first if all(key in v for v in values)}
        numbers = [v["mean"] if isinstance(v, dict) else v for v in values]
        if not all(isinstance(n, (int, float)) for n in numbers):
            return first                        # answers and curves: the first seed's
        n = len(numbers)
        return {"mean": sum(numbers) / n, "low": min(numbers), "high": max(numbers), "n": n}
    return merge(reports)


# ------------------------------------------------------------------------ what is printed
def cell(value, scale=100.0, digits=1, interval=True):
    """An estimate or a number as text: "74.9 (73.1–76.7)"."""
    e = value if isinstance(value, dict) else {"mean": value}
    mean, *ends = (f"{scale * e[key]:.{digits}f}" for key in ("mean", "low", "high") if key in e)
    return f"{mean} ({'–'.join(ends)})" if ends and interval else mean


COLUMNS = {"gold": (1, 3), "plain": (100, 0), "kept": (100, 0), "stopped": (100, 0), "hallucination": (100, 0),
           "accuracy_unseen_phrasing": (100, 1), "accuracy_unseen_combination": (100, 1), "kl": (1, 2)}


def tables(report):
    """The report as tables -> [(title, columns, {row: [str]})]"""
    for key in ("accuracy", "accuracy_greedy", "win_rate"):
        yield key + ", %", ("overall", *world.CATEGORIES), {
            row: [cell(e, 100, int(name == "overall"), name == "overall") for name, e in found.items()]
            for row, found in report[key].items()}
    shown = {key: {row: cell(e.get("overall", e), *how) for row, e in report[key].items()}
             for key, how in COLUMNS.items()}
    for text in ("documents", "prose"):
        shown[f"{text} loss"] = {row: cell(e[text], 1, 3) for row, e in report["pretraining_loss"].items()}
    yield ("% of all answers; KL from SFT in nats an answer; held-out loss in nats a token", shown,
           {row: [rows.get(row, "") for rows in shown.values()] for row in report["gold"]})
    if measured := report.get("reward_model"):
        wanted = [k for k in measured if "accuracy" in k] + ["right_against_wrong", "style", "ceiling", "agreement"]
        every = {k: measured[k] for k in wanted} | measured["categories"]
        yield "reward model, held-out prompts", ["%"], {k: [cell(e)] for k, e in every.items() if e is not None}


def markdown(title, columns, rows):
    lines = [[title, *columns], ["---"] * (len(columns) + 1), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |".replace("_", " ") for line in lines)


def main():
    config, _ = parse("evaluate", description=__doc__)
    folder, device = training.run_path(config), training.pick_device(config.device)
    training.set_up_cpu(config.threads)
    cast = training.autocast(device, training.pick_dtype(config.dtype, device)[0])
    if config.seeds > 1:
        report = over_seeds(config, folder)
    else:
        stages = [s for s in STAGES if training.finished(folder, s)]
        if not stages:
            raise UserError(f"{folder} holds no model yet. Train one first: python sft.py --config tiny")
        report = measure(config, folder, stages, device, cast)
    training.save_atomically(report, folder / "evaluation.json")
    for table in tables(report):
        say("\n" + markdown(*table))
    n = report["accuracy"]["sft"]["overall"]["n"]
    how = f"lowest to highest of {n} seeds" if config.seeds > 1 else f"95 % intervals, {n} prompts a set"
    say(f"\nmean and {how}. All numbers: {folder / 'evaluation.json'}\n"
        f"  python benchmarks/report.py {folder}      draws them, with ten prompts and their answers")


if __name__ == "__main__":
    training.command(main)
