"""The numbers that are reported: intervals that cover, answers beside their own questions, and the report as a whole."""
import contextlib
import functools
import json
import math
import random
import shutil
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, benchmark, run_command

import data
import evaluate
import training
import world
from config import EvaluateConfig

KEYS = ("accuracy", "gold")
ROWS = ("base", "base_few_shot", "sft")


# ---------------------------------------------------------------- the estimates

def test_the_interval_of_a_proportion():
    """Wilson's, on paper: 5 of 10 -> (0.237, 0.763), 10 of 10 -> (0.722, 1). Never outside [0, 1], never of no width."""
    for right, n, low, high in ((5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1), (0, 10, 0, 0.2775), (1, 1, 0.2065, 1)):
        found = evaluate.estimate([1.0] * right + [0.0] * (n - right))
        assert (found["mean"], found["n"]) == (right / n, n)
        assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-4)
        assert -1e-12 <= found["low"] < found["high"] <= 1 + 1e-12
    assert evaluate.estimate([]) == {"mean": 0.0, "low": 0.0, "high": 1.0, "n": 0}


@pytest.mark.parametrize("n", [20, 120])
def test_wilson_covers_at_95_percent(n):
    """Exactly, over all outcomes: 95 % on average over the true rates, and nowhere far below.

    Usual mistake: mean ± 1.96 standard errors, which covers 63 % at a rate of 0.95 and n = 20.
    """
    intervals = [evaluate.estimate([1.0] * k + [0.0] * (n - k)) for k in range(n + 1)]
    covered = [sum(math.comb(n, k) * p ** k * (1 - p) ** (n - k) for k, e in enumerate(intervals) if e["low"] <= p <= e["high"])
               for p in (i / 200 for i in range(2, 199))]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.01) and min(covered) > 0.83


def test_the_interval_of_a_mean_covers_at_95_percent():
    """Scores as the judge gives them, drawn 2,000 times."""
    r, scores, weights = random.Random(0), (0.2, 0.35, 0.8, 0.95, 1.0), (2, 3, 1, 2, 4)
    truth = sum(s * w for s, w in zip(scores, weights)) / sum(weights)
    found = [evaluate.estimate(r.choices(scores, weights, k=100)) for _ in range(2000)]
    assert sum(e["low"] <= truth <= e["high"] for e in found) / 2000 == pytest.approx(0.95, abs=0.015)
    assert sum(e["mean"] for e in found) / 2000 == pytest.approx(truth, abs=0.003)


# ---------------------------------------------------------------- questions and answers

@pytest.fixture(scope="module")
def bytewise():
    return data.Tokenizer(data.train_bpe([""], 256))


@pytest.fixture(scope="module")
def tasks():
    """Prompts of all lengths, in an order of its own."""
    found = world.tasks(45, "test")
    random.Random(0).shuffle(found)
    return found


@pytest.mark.parametrize("few_shot", [False, True], ids=["bare", "few-shot"])
def test_every_answer_belongs_to_its_question(few_shot, bytewise, tasks, monkeypatch):
    """Prompts are answered sorted by length, in batches. Usual mistake: the answers come back in that order."""
    answer_to = {t.prompt: t.output for t in tasks}
    bare = {tuple(data.encode_prompt(bytewise, t.instruction, t.input, t.history)): t.output for t in tasks}
    sizes, temperatures = [], set()

    def perfect(model, prompts, n, *, temperature, eos, generator):
        sizes.append([len(p) for p in prompts])
        temperatures.add(temperature)
        if few_shot:    # it goes on with a question of its own, and never ends
            asked = [bytewise.decode(p).rpartition("Question: ")[2].rpartition("\nAnswer:")[0] for p in prompts]
            return SimpleNamespace(responses=[bytewise.encode(answer_to[a] + "\n\nQuestion: and?\nAnswer: ha") for a in asked])
        return SimpleNamespace(responses=[bytewise.encode(bare[tuple(p)]) + [eos] for p in prompts])
    monkeypatch.setattr(training, "generate", perfect)
    monkeypatch.setattr(training, "respond", functools.partial(training.respond, batch_size=8))
    model = SimpleNamespace(config=SimpleNamespace(block_size=4000), wte=SimpleNamespace(weight=torch.zeros(1)))
    answers = evaluate.respond(model, bytewise, tasks, 3 if few_shot else None, 0.3, EvaluateConfig(), contextlib.nullcontext())
    assert [a.text for a in answers] == [t.output for t in tasks] and all(a.ended for a in answers)
    assert list(map(len, sizes)) == [8, 8, 8, 8, 8, 5] and temperatures == {0.3}
    assert sum(sizes, []) == sorted(sum(sizes, [])), "equal lengths together"
    run_many = world.sandbox.run_many       # patient, as a busy machine lets a trivial program wait for two seconds
    monkeypatch.setattr(world.sandbox, "run_many", lambda programs: run_many(programs, timeout=30.0))
    table = evaluate.tabulate(tasks, world.judge_many(tasks, [a.text for a in answers], [a.ended for a in answers]))
    for category in ("overall", *world.CATEGORIES):
        n = 45 if category == "overall" else 5
        assert (table["accuracy"][category]["mean"], table["accuracy"][category]["n"]) == (1, n)
    assert table["hallucination"]["mean"] == 0 and table["hallucination"]["n"] == sum(not t.answerable for t in tasks)


def test_an_answer_that_does_not_end_is_not_stopped(bytewise, tasks, monkeypatch):
    monkeypatch.setattr(training, "generate", lambda model, prompts, *a, **k: SimpleNamespace(
        responses=[bytewise.encode("ha ha") for _ in prompts]))
    model = SimpleNamespace(config=SimpleNamespace(block_size=4000), wte=SimpleNamespace(weight=torch.zeros(1)))
    answers = evaluate.respond(model, bytewise, tasks, None, 1.0, EvaluateConfig(), contextlib.nullcontext())
    assert [a.text for a in answers] == ["ha ha"] * 45 and not any(a.ended for a in answers)
    table = evaluate.tabulate(tasks, world.judge_many(tasks, [a.text for a in answers], [a.ended for a in answers]))
    assert table["accuracy"]["overall"]["mean"] == 0 == table["stopped"]["mean"]


@pytest.mark.parametrize("few_shot", [False, True], ids=["bare", "few-shot"])
@pytest.mark.parametrize("context", [16, 64, 100])
def test_a_short_context_is_no_error(context, few_shot, bytewise, tasks, monkeypatch):
    """Prompts longer than the context are measured too, without their beginning. Usual mistake: a traceback."""
    sizes = []

    def recording(model, prompts, *args, **kwargs):
        sizes.extend(map(len, prompts))
        return SimpleNamespace(responses=[[] for _ in prompts])
    monkeypatch.setattr(training, "generate", recording)
    model = SimpleNamespace(config=SimpleNamespace(block_size=context), wte=SimpleNamespace(weight=torch.zeros(1)))
    evaluate.respond(model, bytewise, tasks, 3 if few_shot else None, 1.0, EvaluateConfig(), contextlib.nullcontext())
    assert len(sizes) == 45 and 0 < min(sizes) and max(sizes) < context


def test_few_shot_prompts_fit_and_show_no_tested_answer(bytewise, tasks):
    """Three examples where they fit, else fewer, always whole; the question itself comes last."""
    examples = world.tasks(3, "train", categories=("chat",))
    task = next(t for t in tasks if t.category == "chat")
    seen = set()
    for room in range(4000, 40, -20):
        ids = evaluate.few_shot_prompt(bytewise, task, examples, room)
        assert len(ids) <= room
        text = bytewise.decode(ids)
        if text.startswith("Question: "):
            seen.add(text.count("Question: ") - 1)
            assert text.endswith(f"Question: {task.prompt}\nAnswer: ") and ids[0] == bytewise.end
            assert all(f"\nAnswer: {t.output}\n\n" in text for t in examples[:text.count("Question: ") - 1])
    assert seen == {0, 1, 2, 3}


# ---------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def evaluated(tiny_run, tmp_path_factory):
    """evaluate.py on the tiny run -> (evaluation.json, what was printed, the folder)."""
    from conftest import run_command
    folder = tmp_path_factory.mktemp("evaluated")
    for name in ("tokenizer.json", "base.pt", "base.json", "sft.pt", "sft.json"):
        (folder / name).write_bytes((tiny_run.folder / name).read_bytes())
    done = run_command("evaluate", "--out", folder, "--per-category", 2, "--dtype", "fp32", "--threads", 2)
    assert done.code == 0, done.out
    return json.loads((folder / "evaluation.json").read_text()), done.out, folder


def test_the_report(evaluated):
    """key[row][category] is an estimate, for every set of prompts, sampled and greedy."""
    report, _, _ = evaluated
    for key in (k + unseen + greedy for k in KEYS for unseen in evaluate.SETS.values() for greedy in ("", "_greedy")):
        assert tuple(report[key]) == ROWS, key
        for row in ROWS:
            assert set(report[key][row]) == {"overall", *world.CATEGORIES}
            for category, e in report[key][row].items():
                assert set(e) == {"mean", "low", "high", "n"} and e["n"] == (18 if category == "overall" else 2)
                assert e["low"] <= e["mean"] <= e["high"]
    assert report["stopped"]["sft"]["n"] == 18 and set(report["seconds"]) == {"base", "sft"}
    assert report["hallucination"]["sft"]["n"] == report["hallucination"]["base_few_shot"]["n"], "the same prompts"


def test_win_rates_at_both_temperatures(evaluated):
    """The same pairs, each of its own answers. Usual mistake: the greedy rate is made of the sampled answers."""
    report, _, _ = evaluated
    assert set(report["win_rate"]) == set(report["win_rate_greedy"]) == {
        "sft_vs_base_few_shot", "base_few_shot_vs_sft", "base_vs_sft", "base_vs_base_few_shot"}
    for greedy in ("", "_greedy"):
        rates = [report[f"win_rate{greedy}"][key]["overall"] for key in ("sft_vs_base_few_shot", "base_few_shot_vs_sft")]
        assert rates[0]["mean"] + rates[1]["mean"] == pytest.approx(1) and rates[0]["n"] == report["gold"]["sft"]["overall"]["n"]


def test_a_base_is_asked_without_and_with_examples(evaluated, monkeypatch):
    """Two rows of one model. Usual mistake: both rows are few-shot."""
    _, _, folder = evaluated
    asked, tasks = {}, world.tasks(9, "test")
    monkeypatch.setattr(evaluate.training, "respond", lambda model, tokenizer, prompts, *rest, **more: asked.update(
        {tokenizer.decode(p): 1 for p in prompts}) or [training.Answer([], "", True) for _ in prompts])
    model, tokenizer, _ = training.load_model(folder, "base")
    for label, shots in evaluate.SHOTS.items():
        asked.clear()
        evaluate.respond(model, tokenizer, tasks, shots, 1.0, EvaluateConfig(), contextlib.nullcontext())
        assert len(asked) == 9 and max(text.count("Question:") for text in asked) == (1 if label == "base" else 4)


def in_this_process(module, words):
    """`python words` -> its exit code, and what it prints is printed here."""
    done = run_command(module, *words[2:])
    print(done.out)
    return SimpleNamespace(returncode=int(done.code != 0))


def test_what_full_added_stays_until_a_stage_is_made_anew(evaluated, run, monkeypatch, tmp_path):
    """--full goes on where it was stopped; of other weights everything is measured anew."""
    folder = shutil.copytree(evaluated[2], tmp_path / "run")
    path, flags, ran, failing = folder / "evaluation.json", ("--out", folder, "--dtype", "fp32", "--threads", 2), [], ["tax"]
    monkeypatch.setattr(evaluate, "measure", lambda *given: dict(evaluated[0]))
    full = benchmark("full")
    key_of = {experiment.split()[-1] if " " in experiment else experiment: key for experiment, (key, _) in full.FULL.items()}

    def pretend(words, **_):
        name = Path(words[1]).stem
        if name == "full":
            return in_this_process(full, words)
        ran.append(words[-1] if name == "sweep" else name)
        if ran[-1] in failing:
            return SimpleNamespace(returncode=failing.pop() == "tax")
        path.write_text(json.dumps(json.loads(path.read_text()) | {key_of[ran[-1]]: f"by {ran[-1]}"}))
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(evaluate.subprocess, "run", pretend)
    assert run("evaluate", *flags, "--full").code == 1 and ran == ["over_optimisation", "instructions", "tax"]
    done = run("evaluate", *flags, "--full")
    assert done.code == 0 and ran[3:] == ["tax", "folds", "0", "16", "report"], ran
    assert "30 with what follows" in done.out           # minutes: tax 1, folds 8, the sweeps 5 and 15, the page 1
    assert run("evaluate", *flags).code == 0 and json.loads(path.read_text())["gold_proxy"] == "by over_optimisation"
    (folder / "sft.pt").touch()
    assert run("evaluate", *flags).code == 0 and "gold_proxy" not in json.loads(path.read_text())


def test_the_tables(evaluated):
    """Markdown, as it stands in the README: a row for each stage; nothing half-written is left."""
    report, printed, folder = evaluated
    assert printed.count("\n| base few shot |") == printed.count("\n| sft |") >= 3
    assert "evaluation.json" in printed and not list(folder.glob("*.tmp"))
    line = next(line for line in printed.splitlines() if line.startswith("| sft |"))
    assert [float(cell.split()[0]) for cell in line.strip("| ").split(" | ")[1:]] == pytest.approx(
        [100 * report["accuracy"]["sft"][c]["mean"] for c in ("overall", *world.CATEGORIES)], abs=0.51)


def test_the_page_needs_nothing_else(evaluated):
    """benchmarks/report.py: a figure inside the file, ten prompts with their answers, escaped."""
    pytest.importorskip("matplotlib")
    report, (found, _, _) = benchmark("report"), evaluated
    text = report.page(found)
    assert 'src="data:image/png;base64,' in text and "http" not in text
    more = {"few_shot_tasks": {"base": found["accuracy"]["sft"]}, "labeler_folds": [{"own_labelers": 0.7}, {"own_labelers": 0.72}]}
    whole = report.page(found | more)
    assert "few-shot tasks" not in text and "few-shot tasks" in whole and "71.0 (" in whole and "own labelers" in whole
    assert len(found["answers"]) == 10 and all(set(row) == {"prompt", *ROWS} for row in found["answers"])
    answers = [{**row, "sft": "<script>alert(1)</script>"} for row in found["answers"]]
    text = report.page(found | {"answers": answers})
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_the_weights_of_table_1():
    """Generation is nearly half of what the paper's users asked for. Usual mistake: weights that do not add up to one."""
    pytest.importorskip("matplotlib")
    weighted = benchmark("report").weighted
    row = {c: {"mean": 0.6, "low": 0.5, "high": 0.7, "n": 120} for c in world.CATEGORIES}
    assert weighted(row)["mean"] == pytest.approx(0.6) and weighted(row)["n"] == 120 * len(row)
    assert 0.04 < weighted(row)["high"] - 0.6 < 0.1                 # independent categories: narrower than one of them
    row["generation"] = {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 120}
    assert weighted(row)["mean"] == pytest.approx(0.6 + 0.4 * 45.6 / 96.4, abs=1e-9)


def test_nothing_to_measure(tmp_path, run):
    done = run("evaluate", "--out", tmp_path)
    assert done.code == 2 and done.out.count("\n") == 1 and "python sft.py" in done.out


# ---------------------------------------------------------------- best of n, and what it costs in KL

over = benchmark("over_optimisation")


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    """Usual mistake: the best of the first n, which throws samples away, or n draws with replacement."""
    g = torch.Generator().manual_seed(n)
    proxy, values = torch.randn(2, 5, 7, generator=g, dtype=torch.float64)
    for p, v, found in zip(proxy.tolist(), values.tolist(), over.best_of_n(proxy, values, n).tolist()):
        winners = [v[max(subset, key=p.__getitem__)] for subset in combinations(range(7), n)]
        assert found == pytest.approx(sum(winners) / len(winners), abs=1e-12)


def test_the_kl_of_best_of_n():
    """Of n draws the best: the density of its quantile u is n u^(n-1), whose KL from uniform is ln n - (n-1)/n."""
    for n in (1, 2, 4, 64):
        us = (torch.arange(1, 200_001, dtype=torch.float64) - 0.5) / 200_000
        density = n * us ** (n - 1)
        assert over.kl_of_best_of_n(n) == pytest.approx(torch.xlogy(density, density).mean().item(), abs=1e-4)


@pytest.mark.parametrize("rl", [False, True])
def test_the_fit_recovers_alpha_and_beta(rl):
    """Gao et al. Eq. 1 with known coefficients. Usual mistake: KL itself for its square root."""
    kl = [0.1, 0.5, 1.3, 2.9, 7.1]
    gains = [math.sqrt(k) * (0.7 - 0.2 * (math.log(math.sqrt(k)) if rl else math.sqrt(k))) for k in kl]
    assert over.fit(kl, gains, rl) == pytest.approx([0.7, 0.2], abs=1e-9)


def test_a_win_rate_is_antisymmetric():
    """Ties are half a win: of two models the rates add up to one, and against itself a model wins half."""
    tasks = world.tasks(18, "val")
    good, bad = (world.judge_many(tasks, answers) for answers in ([t.output for t in tasks], ["?"] * 18))
    mixed = good[:11] + bad[11:]
    for a, b in ((good, bad), (mixed, good), (bad, mixed)):
        assert [x + y for x, y in zip(evaluate.win_rate(a, b), evaluate.win_rate(b, a))] == [1] * 18
        assert evaluate.win_rate(a, a) == [0.5] * 18
    assert evaluate.win_rate(mixed, good) == [0.5] * 11 + [0] * 7


def test_no_trick_beats_the_judge():
    """Policies without any skill score below 0.51; an SFT model scores 0.79 (README)."""
    tasks = world.tasks(180, "test")
    longest = max((t.output for t in tasks), key=len)
    every = {c: ", ".join({t.output for t in tasks if t.category == c}) for c in world.CATEGORIES}
    tricks = {"nothing": lambda t: "", "the longest answer": lambda t: longest, "the prompt": lambda t: t.prompt,
              "a refusal": lambda t: world.REFUSAL[t.language], "all answers": lambda t: every[t.category],
              "the text": lambda t: t.input or t.instruction, "a dot": lambda t: "."}
    for name, trick in tricks.items():
        verdicts = world.judge_many(tasks, [trick(t) for t in tasks])
        assert sum(v.score for v in verdicts) / len(tasks) < 0.55 and sum(v.right for v in verdicts) < 0.1 * len(tasks), name


def test_seeds_give_mean_and_range(tmp_path, monkeypatch):
    """Only what is missing is run, in order; the summary holds mean, lowest and highest, not a pooled interval."""
    seeds, ran = benchmark("seeds"), []

    def pretend(words, cwd):
        ran.append(words[1])
        folder = tmp_path / f"seed{words[words.index('--seed') + 1]}"
        folder.mkdir(exist_ok=True)
        stage = {"sft.py": "sft", "reward.py": "reward"}.get(words[1], "ppo_no_ptx" if "--ptx-coef" in words else "ppo")
        if words[1] == "evaluate.py":
            mean = [0.7, 0.5, 0.9][int(folder.name[-1]) - 1]
            estimate = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 120}
            made = {"accuracy": {"sft": {"overall": estimate}}, "kl": {}, "loss": mean, "answers": []}
            (folder / "evaluation.json").write_text(json.dumps(made))
        else:
            for ending in ("pt", "json"):
                (folder / f"{stage}.{ending}").touch()
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(seeds.commands.subprocess, "run", pretend)
    (tmp_path / "seed2").mkdir()
    for ending in ("pt", "json"):
        (tmp_path / "seed2" / f"sft.{ending}").touch()
    found = seeds.merge([seeds.run("tiny", seed, tmp_path / f"seed{seed}") for seed in (1, 2, 3)])
    assert found["accuracy"]["sft"]["overall"] == pytest.approx({"mean": 0.7, "low": 0.5, "high": 0.9, "n": 3})
    assert found["loss"] == found["accuracy"]["sft"]["overall"]
    whole = ["sft.py", "reward.py", "ppo.py", "ppo.py", "evaluate.py"]
    assert ran == whole + whole[1:] + whole


@pytest.mark.parametrize("flags, wanted", [
    (["--config", "headline", "--seed", 5], [["headline.py", "--seed", "5", "--out", "FOLDER"]]),
    (["--seeds", 3], [["seeds.py", "--config", "tiny", "--seeds", "3", "--out", "FOLDER"]]),
    (["--full"], [*([f"{name}.py", "FOLDER"] for name in ("over_optimisation", "instructions", "tax", "folds")),
                  ["sweep.py", "FOLDER", "ppo.py", "--ptx-coef", "0"],
                  ["sweep.py", "FOLDER", "sft.py", "--epochs", "1", "2", "4", "8", "16"], ["report.py", "FOLDER"]])])
def test_the_experiments_that_it_runs(flags, wanted, evaluated, run, monkeypatch):
    """Each on the folder that was asked for; --full after the evaluation, whose file the experiments add to."""
    (report, _, folder), ran = evaluated, []

    def pretend(words, **_):
        assert (ROOT / words[1]).exists() and (folder / "evaluation.json").exists()
        if Path(words[1]).stem == "full":
            return in_this_process(benchmark("full"), words)
        ran.append([Path(words[1]).name, *words[2:]])
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(evaluate.subprocess, "run", pretend)
    monkeypatch.setattr(evaluate, "measure", lambda *given: report)
    done = run("evaluate", "--out", folder, "--threads", 2, "--dtype", "fp32", *flags)
    assert done.code == 0 and ran == [[word.replace("FOLDER", str(folder)) for word in words] for words in wanted], done.out
    monkeypatch.setattr(evaluate.subprocess, "run", lambda words: SimpleNamespace(returncode=3))
    assert run("evaluate", "--out", folder, "--threads", 2, "--dtype", "fp32", *flags).code == 3    # a failure is not hidden


def test_what_full_runs_is_there():
    for experiment in benchmark("full").FULL:
        assert callable(benchmark(experiment.split()[0]).main)
