"""What each step bought: the stages of a run answer held-out prompts, and the exact judge decides.

    python evaluate.py --config tiny

Prints the tables and writes them to <run>/evaluation.json, nested objects; an estimate is always {"mean",
"low", "high", "n"}, with its 95 % interval. Temperature 1, except in the keys that end in _greedy. The row
`base_few_shot` is the pretrained model, shown three examples of the category before each question; the
others read the bare prompt. A win rate is P(a > b) + ½ P(a = b) by the judge's score of both answers.
"""
import json
import math
import time
from itertools import islice, product

import torch

import data
import training
import world
from config import UserError, parse
from ppo import Episodes, kl_estimates
from sft import held_out_loss, held_out_windows
from training import say

SETS = {"test": "", "test_phrasing": "_unseen_phrasing", "test_combination": "_unseen_combination"}
FEW_SHOT = "base_few_shot"


def estimate(values):
    """The mean of n numbers with its 95 % interval: Wilson's for a proportion, the normal one otherwise."""
    n, mean = len(values), sum(values) / max(1, len(values))
    if not n:                                   # nothing was measured, so nothing is excluded
        return {"mean": 0.0, "low": 0.0, "high": 1.0, "n": 0}
    z = 1.96
    if all(v in (0, 1) for v in values):        # stays inside [0, 1], also where all are right
        middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    else:
        middle, half = mean, z * math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)
    return {"mean": mean, "low": middle - half, "high": middle + half, "n": n}


def few_shot_prompt(tokenizer, task, examples, room):
    """Three worked examples of the category and then the question, as a document -> ids; fewer where room is short."""
    def text(t, answer):
        return f"Question: {t.prompt}\nAnswer: {answer}"
    for n in range(len(examples), -1, -1):
        ids = [tokenizer.end] + tokenizer.encode("\n\n".join([text(t, t.output) for t in examples[:n]] + [text(task, "")]))
        if len(ids) <= room:
            return ids
    return ids[-room:]


def prompts_of(tokenizer, tasks, few_shot, config, context):
    """What the model reads of each task; what is longer than the context loses its beginning."""
    if not few_shot:
        return [data.encode_prompt(tokenizer, *t.parts)[1 - context:] for t in tasks]
    shown = world.tasks(9 * len(world.CATEGORIES), "train", config.seed + 1)
    by_category = {c: [t for t in shown if t.category == c] for c in world.CATEGORIES}
    room = max(context - 64, context // 2)
    return [few_shot_prompt(tokenizer, t, by_category[t.category][i % 3::3], room) for i, t in enumerate(tasks)]


def respond(model, tokenizer, tasks, few_shot, temperature, config, cast):
    """-> [Answer]: one to every task."""
    prompts = prompts_of(tokenizer, tasks, few_shot, config, model.config.block_size)
    answers = training.respond(model, tokenizer, prompts, 100, temperature, config.seed, cast, config.batch_size)
    if few_shot:                                # a base goes on with the next question: its answer ends before it
        cut = [a.text.split("\n\nQuestion:") for a in answers]
        answers = [a._replace(text=parts[0], ended=a.ended or len(parts) > 1) for a, parts in zip(answers, cut)]
    return answers


def by_group(tasks, values):
    """{"overall" and each category: estimate} of one value a task."""
    groups = {"overall": values} | {c: [v for v, t in zip(values, tasks) if t.category == c] for c in world.CATEGORIES}
    return {name: estimate(members) for name, members in groups.items()}


def tabulate(tasks, verdicts):
    """The estimates of one stage on one set of prompts -> {name: estimate, or {category: estimate}}."""
    of = {name: [float(getattr(v, name)) for v in verdicts] for name in ("right", "score", "stopped", "plain", "kept")}
    unanswerable = [float(not v.supported) for t, v in zip(tasks, verdicts) if not t.answerable]
    return {"accuracy": by_group(tasks, of["right"]), "gold": by_group(tasks, of["score"]),
            **{name: estimate(of[name]) for name in ("stopped", "plain", "kept")}, "hallucination": estimate(unanswerable)}


def win_rate(tasks, ours, theirs):
    """How often one stage's verdicts beat another's on the same prompts, by group; equal scores are half a win."""
    return by_group(tasks, [(a.score > b.score) + 0.5 * (a.score == b.score) for a, b in zip(ours, theirs)])


def kl(policy, reference, tokenizer, prompts, answers, cast):
    """KL(π‖π_ref) in nats an answer, from answers sampled of π: the mean of Σ_t k1."""
    found, device = [], policy.wte.weight.device
    with torch.no_grad():
        for i in range(0, len(prompts), 64):
            e = Episodes(prompts[i:i + 64], [a.ids for a in answers[i:i + 64]], tokenizer.pad, device)
            k1, _, _ = kl_estimates(e.logprobs(policy, cast), e.logprobs(reference, cast))
            found += (k1 * e.mask).sum(1).tolist()
    return estimate(found)


def pretraining_loss(model, tokenizer, cast):
    """Held-out loss of step 0, in nats a token: what the alignment costs (InstructGPT 4.2, the alignment tax)."""
    texts = {"documents": list(islice(world.documents(0, "val"), 600)), "prose": world.prose("val")}
    return {name: held_out_loss(model, held_out_windows(data.pack(tokenizer, text), model.config.block_size, 64), cast)
            for name, text in texts.items()}


def show(title, columns, rows):
    """A table: columns [name], rows {stage: [estimate]}, in percent."""
    say(f"\n{title}\n" + " " * 24 + "".join(f"{name:>11}" for name in columns))
    for stage, estimates in rows.items():
        say(f"{stage:24}" + "".join(f"{100 * e['mean']:10.1f}%" for e in estimates))


def answer_sets(model, tokenizer, few_shot, sets, config, cast, label, report):
    """All sets answered at both temperatures, into the report -> (answers, verdicts) of the test set at temperature 1."""
    kept = None
    for (name, tasks), (temperature, greedy) in product(sets.items(), ((1.0, ""), (0.0, "_greedy"))):
        training.progress(f"  {label}: {name}{greedy}")
        answers = respond(model, tokenizer, tasks, few_shot, temperature, config, cast)
        verdicts = world.judge_many(tasks, [a.text for a in answers], [a.ended for a in answers])
        for key, value in tabulate(tasks, verdicts).items():
            report.setdefault(key + SETS[name] + greedy, {})[label] = value
        kept = kept or (answers, verdicts)
    return kept


def main():
    config, _ = parse("evaluate", description=__doc__)
    started, folder = time.perf_counter(), training.run_path(config)
    training.set_up_cpu(config.threads)
    device = training.pick_device(config.device)
    cast = training.autocast(device, training.pick_dtype(config.dtype, device)[0])
    stages = [s for s in ("base", "sft", "ppo_no_ptx", "ppo") if training.finished(folder, s)]
    if not stages:
        raise UserError(f"{folder} holds no model yet. Train one first: python sft.py --config tiny")
    report = {"seed": config.seed, "seconds": {}, "kl": {}, "pretraining_loss": {}, "win_rate": {}}
    sets = {name: world.tasks(config.per_category * len(world.CATEGORIES), name) for name in SETS}
    test, models, verdicts = sets["test"], {}, {}
    for stage in stages:
        models[stage], tokenizer, facts = training.load_model(folder, stage, device)
        report["seconds"][stage] = facts["seconds"]
        label = FEW_SHOT if stage == "base" else stage
        answers, verdicts[label] = answer_sets(models[stage], tokenizer, stage == "base", sets, config, cast, label, report)
        report["pretraining_loss"][label] = pretraining_loss(models[stage], tokenizer, cast)
        if stage.startswith("ppo"):
            prompts = prompts_of(tokenizer, test, False, config, models[stage].config.block_size)
            report["kl"][stage] = kl(models[stage], models["sft"], tokenizer, prompts, answers, cast)
            for other in ("sft", FEW_SHOT):
                if other in verdicts:
                    report["win_rate"][f"{stage}_vs_{other}"] = win_rate(test, verdicts[stage], verdicts[other])
    if training.finished(folder, "reward"):
        report["reward_model"] = json.loads((folder / "reward.json").read_text(encoding="utf8"))["measured"]

    rows, columns = list(report["accuracy"]), ("overall", *world.CATEGORIES)
    names = [name.replace("tion", ".").replace("ing", ".")[:10] for name in columns]
    for title, key in (("accuracy at temperature 1", "accuracy"), ("accuracy, greedy", "accuracy_greedy"), ("win rate", "win_rate")):
        show(title, names, {row: [found[c] for c in columns] for row, found in report[key].items()})
    keys = {"accuracy": "accuracy", "phrasing": "accuracy_unseen_phrasing", "combinat.": "accuracy_unseen_combination",
            "gold": "gold", "greedy": "gold_greedy"}
    more = {"plain": "plain", "stopped": "stopped", "made up": "hallucination"}
    show("overall: accuracy, also on unseen phrasings and combinations; gold (mean score), also greedy; habits and ends",
         [*keys, *more], {row: [report[key][row]["overall"] for key in keys.values()]
                          + [report[key][row] for key in more.values()] for row in rows})
    say("\nheld-out pretraining loss, nats a token (documents, prose), and KL from the SFT model, nats an answer")
    for row, losses in report["pretraining_loss"].items():
        moved = f"{report['kl'][row]['mean']:10.2f}" if row in report["kl"] else ""
        say(f"{row:24}{losses['documents']:10.3f}{losses['prose']:10.3f}{moved}")
    training.save_atomically(report, folder / "evaluation.json")
    say(f"\n{len(test)} prompts a set; all numbers with their 95 % intervals are in {folder / 'evaluation.json'} "
        f"({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    training.command(main)
