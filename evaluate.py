"""What each step bought: the stages of a run answer held-out prompts, and the exact judge decides.

    python evaluate.py --config tiny                  the stages that the run has, and best-of-4 of SFT
    python evaluate.py --config tiny --best-of 64     and best-of-16 and best-of-64
    python evaluate.py --config tiny --full           and the experiments of benchmarks/ on one run
    python evaluate.py --config tiny --seeds 3        the recipe three times, mean and range
    python evaluate.py --config headline              an aligned model against one a hundred times its size

Prints Markdown, writes <run>/evaluation.json; an estimate is {"mean", "low", "high", "n"}, its 95 % interval.
Temperature 1, but in keys that end in _greedy. `base_few_shot`: the base, after three examples of the category."""
import itertools, json, math, subprocess, sys
from config import PPOConfig, parse     # before torch: see there
import torch
import data, training, world
from ppo import make_reward, sequence_kl
from sft import held_out_loss, held_out_text, held_out_windows
from training import say

SETS = {"test_phrasing": "_unseen_phrasing", "test_combination": "_unseen_combination", "test": ""}
SHOTS = {"base": 0, "base_few_shot": 3}     # the examples that a base is shown; other stages are asked in turns

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

def respond(model, tokenizer, tasks, shots, temperature, config, cast):
    """-> [Answer]: one to every task; shots None: in turns; 0 to 3: as a document, after so many examples."""
    prompts = [data.encode_prompt(tokenizer, *t.parts) for t in tasks]
    if shots is not None:
        n, shown = model.config.block_size, world.tasks(9 * len(world.CATEGORIES), "train", config.seed + 1)
        prompts = [few_shot_prompt(tokenizer, t, [s for s in shown if s.category == t.category][i % 3::3][:shots],
                                   max(n - 64, n // 2)) for i, t in enumerate(tasks)]
    found = training.respond(model, tokenizer, prompts, 100, temperature, config.seed, cast)
    if shots is not None:                       # a base goes on with the next question: its answer ends there
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

def best_of(config, folder, sft, tokenizer, tasks, device, cast):
    """Best of n = 4, 16, 64 by the reward model -> {best_of_n: verdicts}; scores and gold of all answers (M,N)."""
    score, _ = make_reward(PPOConfig(), folder, sft, tokenizer, cast, device)
    training.progress(f"  best of {config.best_of}: {len(tasks) * config.best_of:,} answers", always=True)
    many = [task for task in tasks for _ in range(config.best_of)]
    found = respond(sft, tokenizer, many, None, 1.0, config, cast)
    verdicts = world.judge_many(many, [a.text for a in found], [a.ended for a in found])
    proxy = torch.tensor(score(many, [a.text for a in found])).view(len(tasks), -1)             # (M,N)
    picked = {f"best_of_{n}": [verdicts[i * config.best_of + k] for i, k in enumerate(
        proxy[:, :n].argmax(1).tolist())] for n in (4, 16, 64) if n <= config.best_of}
    return picked, proxy, torch.tensor([v.score for v in verdicts]).view(len(tasks), -1)

def win_rate(a, b):
    """P(a better) + ½ P(equal), prompt by prompt: two lists of verdicts -> [0, ½ or 1]"""
    return [(x.score > y.score) + 0.5 * (x.score == y.score) for x, y in zip(a, b)]

def measure(config, folder, stages, device, cast):
    """Everything about the stages of one run -> what evaluation.json holds."""
    report = {key: {} for key in "seconds kl pretraining_loss win_rate win_rate_greedy".split()}
    sets = {name: world.tasks(config.per_category * len(world.CATEGORIES), name) for name in SETS}
    models, verdicts, texts, test = {}, {"": {}, "_greedy": {}}, None, sets["test"]
    report |= {"seed": config.seed, "answers": [{"prompt": task.prompt} for task in test[:10]]}
    for stage, label in ((stage, label) for stage in stages for label in (SHOTS if stage == "base" else [stage])):
        model, tokenizer, facts = training.load_model(folder, stage, device)
        for (name, tasks), (temperature, greedy) in itertools.product(sets.items(), ((0.0, "_greedy"), (1.0, ""))):
            training.progress(f"  {label}: {name}{greedy}")
            found = respond(model, tokenizer, tasks, SHOTS.get(label), temperature, config, cast)
            judged = world.judge_many(tasks, [a.text for a in found], [a.ended for a in found])
            for key, value in tabulate(tasks, judged).items():
                report.setdefault(key + SETS[name] + greedy, {})[label] = value
            verdicts[greedy][label] = judged        # of the last set, test
            if name == "test" and greedy:
                report["answers"] = [row | {label: a.text} for row, a in zip(report["answers"], found)]
        models[stage], report["seconds"][stage] = model, facts["seconds"]
        texts = texts or held_out_text(tokenizer, 0)        # the stages of a run share their tokenizer
        report["pretraining_loss"][label] = {text: held_out_loss(model, held_out_windows(
            ids, model.config.block_size, 64), cast) for text, ids in texts.items()}    # InstructGPT 4.2
        if stage not in ("base", "sft"):        # found: the last set's, test at temperature 1
            prompts = [data.encode_prompt(tokenizer, *task.parts) for task in test]
            report["kl"][stage] = estimate(sequence_kl(model, models["sft"], prompts, found, tokenizer.pad, cast))
    if training.finished(folder, "reward"):
        report["reward_model"] = json.loads((folder / "reward.json").read_text(encoding="utf8"))["measured"]
        if config.best_of > 1:
            for label, judged in best_of(config, folder, models["sft"], tokenizer, test, device, cast)[0].items():
                verdicts[""][label] = judged
                for key, value in tabulate(test, judged).items():
                    report[key][label] = value
    for (greedy, of), b in itertools.product(verdicts.items(), ("base_few_shot", "sft", "best_of_4")):
        for a in of if b in of else ():
            if a != b:
                report[f"win_rate{greedy}"][f"{a}_vs_{b}"] = by_group(test, win_rate(of[a], of[b]))
    return report

def cell(value, scale=100.0, digits=1, interval=True):
    """An estimate or a number as text: "74.9 (73.1–76.7)"."""
    e = value if isinstance(value, dict) else {"mean": value}
    mean, *ends = (f"{scale * e[key]:.{digits}f}" for key in ("mean", "low", "high") if key in e)
    return f"{mean} ({'–'.join(ends)})" if ends and interval else mean

COLUMNS = {"gold": (1, 3), "plain": (100, 0), "kept": (100, 0), "stopped": (100, 0), "hallucination": (100, 0),
           "accuracy_unseen_phrasing": (100, 1), "accuracy_unseen_combination": (100, 1), "kl": (1, 2)}

def tables(report):
    """The report as tables -> [(title, columns, {row: [str]})]"""
    for key in ("accuracy", "accuracy_greedy", "win_rate", "win_rate_greedy"):
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
        wanted = "accuracy_gold right_against_wrong style accuracy_labelers ceiling agreement".split()
        every = {k: measured[k] for k in ("accuracy", *wanted) if k in measured} | measured.get("categories", {})
        yield "reward model, held-out prompts", ["%"], {k: [cell(e)] for k, e in every.items() if e is not None}

def markdown(title, columns, rows):
    lines = [[title, *columns], ["---"] * (len(columns) + 1), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |".replace("_", " ") for line in lines)

def benchmark(experiment, *args):
    """Runs an experiment of benchmarks/ to its end; exits as it does where it fails."""
    name, *more = experiment.split()
    if code := subprocess.run([sys.executable, data.BENCHMARKS / f"{name}.py", *map(str, args), *more]).returncode:
        sys.exit(code)

def main():
    config, _ = parse("evaluate", description=__doc__)
    folder = training.run_path(config)
    if config.config == "headline":
        return benchmark("headline", "--seed", config.seed, "--out", folder)
    if config.seeds > 1:
        return benchmark("seeds", "--config", config.config, "--seeds", config.seeds, "--out", folder)
    device, cast, _ = training.compute(config)
    stages = [s for s in training.MADE_BY if training.finished(folder, s)] or ["base"]
    path, made = folder / "evaluation.json", {p.name: p.stat().st_mtime_ns for p in sorted(folder.glob("*.pt"))}
    before = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
    kept = before if before.get("made_of") == made else {}      # of the same weights: what --full has added stays
    report = kept | measure(config, folder, stages, device, cast) | {"made_of": made}
    training.save_atomically(report, path)
    for table in tables(report):
        say("\n" + markdown(*table))
    if config.full:
        benchmark("full", folder)
    say(f"\n95 % intervals; all numbers: {folder / 'evaluation.json'}; drawn by: python benchmarks/report.py")

if __name__ == "__main__":
    training.command(main)
