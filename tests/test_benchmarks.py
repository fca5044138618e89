"""The experiments of benchmarks/: what they ask, what they leave alone, and that they go on where they stopped."""
import functools
import json
import os
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, benchmark

import world
from config import UserError

tax, folds, sweep, budgets, instructions = map(benchmark, ("tax", "folds", "sweep", "budgets", "instructions"))


# ---------------------------------------------------------------- few-shot tasks, as the documents are written
ASKED = functools.cache(tax.questions)


def test_a_passage_is_cut_before_its_answer():
    """Usual mistake: the answer stands in the prompt already, and every model that copies is right."""
    asked = ASKED()
    assert len({text for _, text, _ in asked}) == len(asked) > 900
    for task, text, answer in asked:
        begin = task.note[:task.note.rfind(answer)]
        assert task.split == "test" and text.endswith("\n" + begin.rstrip(" ")), text
        assert begin and (begin + answer) == task.note[:len(begin + answer)] and not begin.rstrip().endswith(answer)


def test_examples_are_training_passages_of_the_same_family():
    train = {task.note: task for task in world.tasks(1500, "train", 17)}
    for task, text, _ in ASKED()[::7]:
        families = [train[note].family for note in train if note and note in text and train[note].language == task.language]
        assert families.count(task.family) >= tax.EXAMPLES - 1, text        # two may be the same text


def test_only_a_right_answer_goes_on_right():
    """The reference does, whatever stands behind it; so does another that the judge accepts; a wrong one does not."""
    asked = ASKED()
    assert all(tax.right(asked, [f" {answer} and so on" for _, _, answer in asked]))
    assert all(tax.right(asked, [f"{answer}\nThe next document" for _, _, answer in asked]))
    wrong = tax.right(asked, ["xyz"] * len(asked))
    assert not any(ok for ok, (task, _, _) in zip(wrong, asked))
    lists = [one for one in asked if one[0].category == "brainstorming" and "\n" not in one[2] and one[0].language == "en"][:5]
    backwards = [", ".join(reversed(answer.split(", "))) for _, _, answer in lists]
    assert lists and all(tax.right(lists, backwards))


# ---------------------------------------------------------------- does an answer do what it was told?
TESTS = functools.cache(functools.partial(world.tasks, 900, "test"))


@pytest.mark.parametrize("opener", ["", "Sure! ", "当然！"])
def test_what_the_labelers_write_attempts_the_task(opener):
    """The reference, with a habit or without, and where a text leaves the question open the refusal and the invention."""
    for task in TESTS():
        assert instructions.attempts(task, opener + task.output), task
        assert task.answerable or instructions.attempts(task, opener + task.check[1]), task


def test_a_wrong_answer_of_the_right_kind_is_an_attempt():
    """Another capital for a capital, another job for a job, the other label. Usual mistake: it counts as another task."""
    asked = {"fact_question": 0, "follow_up": 0, "remember": -1}        # which word of the combination names it
    same = {}
    for task in TESTS():
        if task.family in ("sentiment", "topic", *asked):
            what = task.combinations[0].split()[asked[task.family]] if task.family in asked else ""
            same.setdefault((task.family, task.language, what), []).append(task)
    assert sum(map(len, same.values())) > 250
    for tasks in same.values():
        for task, other in zip(tasks, tasks[1:]):
            assert instructions.attempts(task, other.output), (task, other.output)


def test_the_answer_to_another_task_does_not_attempt_this_one():
    """Of nine families out of ten; the rest share their words, as a summary tells what a question about a text asks."""
    tests, taken, drawn = TESTS(), 0, 0
    for i, task in enumerate(tests):
        for other in tests[i + 1:i + 12]:
            if other.family != task.family and other.language == task.language:
                taken, drawn = taken + instructions.attempts(task, other.output), drawn + 1
    assert drawn > 2000 and taken / drawn < 0.1, taken / drawn


@pytest.mark.parametrize("family, answer", [
    ("translation", "Hello."), ("list_function", "The list has two numbers."), ("fact_question", "def f(x): return x"),
    ("brainstorm", "Red, house"), ("sentiment", "food"), ("topic", "positive"), ("fact_question", "The text does not say."),
    ("matrix_function", "g = int(input())\ndef f(a): return a"), ("summary", "Anna."), ("sentence", ""), ("reading", "")])
def test_another_kind_of_answer_is_no_attempt(family, answer):
    task = next(t for t in TESTS() if t.family == family and t.language == "en" and "Anna" not in t.prompt
                and "colours" not in t.prompt)
    assert not instructions.attempts(task, answer), task


# ---------------------------------------------------------------- folds over labelers
@pytest.mark.parametrize("people", [5, 6, 7, 11])
def test_everyone_is_held_out_once_and_never_trains_there(people):
    """InstructGPT 3.5. Usual mistake: the labelers held out are among those who train."""
    made = folds.folds(range(people))
    assert len(made) == 5 and sorted(x for _, outside in made for x in outside) == [*range(people)]
    assert all(sorted(inside + outside) == [*range(people)] for inside, outside in made)


# ---------------------------------------------------------------- one number, several values
def some_run(tmp_path):
    run = tmp_path / "tiny"
    run.mkdir()
    for name in ("base.pt", "base.json", "sft.pt", "sft.json", "reward.pt", "reward.json", "ppo.pt", "ppo.json",
                 "tokenizer.json", "corpus-1.bin", "evaluation.json", "comparisons-1.jsonl"):
        (run / name).write_text(json.dumps({"config": {"seed": 7, "config": "tiny"}}))
    return run


@pytest.mark.parametrize("script, has, lacks", [("ppo.py", "sft.pt reward.pt corpus-1.bin tokenizer.json", "ppo.pt evaluation.json"),
                                                ("reward.py", "sft.pt base.pt", "reward.pt ppo.pt comparisons-1.jsonl"),
                                                ("sft.py", "base.pt corpus-1.bin", "sft.pt reward.pt")])
def test_a_value_starts_from_the_steps_before_and_from_nothing_else(tmp_path, script, has, lacks):
    """Usual mistakes: the run itself is changed, or the step finds its own result there and is not run at all."""
    run, folder = some_run(tmp_path), tmp_path / "tiny-x-1"
    before = {path: path.read_bytes() for path in run.iterdir()}
    sweep.prepare(run, folder, script)
    names = {path.name for path in folder.iterdir()}
    assert names >= {*has.split()} and not names & {*lacks.split()}
    (folder / "sft.pt").write_text("begun")
    sweep.prepare(run, folder, script)                      # a second time nothing is overwritten
    assert (folder / "sft.pt").read_text() == "begun" and before == {path: path.read_bytes() for path in run.iterdir()}
    os.utime(run / "base.pt", (4e9, 4e9))                   # the run was made anew
    sweep.prepare(run, folder, script)
    names = {path.name for path in folder.iterdir()}
    assert names >= {*has.split()} and not names & {*lacks.split()}


def test_a_sweep_stands_in_the_report(tmp_path, monkeypatch, capsys):
    """A row for each value, in the run's evaluation.json beside what is there, and on the page."""
    run = some_run(tmp_path)
    (run / "evaluation.json").write_text('{"seed": 7}')
    e = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    facts = {"seconds": 3, "losses": {"demonstrations": 0.25}, "config": {"seed": 7, "config": "tiny"}}
    report = {"win_rate": {}, "kl": {}, "hallucination": {"sft": e}, "pretraining_loss": {"sft": {"documents": 1.5, "prose": 2.5}},
              **{key: {"sft": {"overall": e}} for key in ("accuracy", "gold")}}

    def pretend(script, *words):
        folder = next(word for word in words if isinstance(word, Path))
        for name, content in (("sft.pt", facts), ("sft.json", facts)) if script == "sft.py" else (("evaluation.json", report),):
            (folder / name).write_text(json.dumps(content))
    monkeypatch.setattr(sweep.commands, "python", pretend)
    monkeypatch.setattr(sweep, "measure", lambda *given: (e, {**e, "n": 0}))
    monkeypatch.setattr("sys.argv", ["sweep.py", str(run), "sft.py", "--epochs", "1", "16"])
    sweep.main()
    kept = json.loads((run / "evaluation.json").read_text())
    assert kept["seed"] == 7 and [*kept["sweep_epochs"]] == ["sft, epochs 1", "sft, epochs 16"]
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "tiny-epochs-1", "tiny-epochs-16"}
    page = benchmark("report")
    (title, columns, rows), = [t for t in page.experiments({"win_rate": {}} | kept) if "epochs" in t[0]]
    assert len(columns) == len(rows["sft, epochs 16"]) and "| sft, epochs 16 |" in capsys.readouterr().out


def test_code_tasks_are_held_out_programs():
    tasks = sweep.code_tasks(29)
    assert len(tasks) == 29 and {t.split for t in tasks} == {"test"} and {t.check[0] for t in tasks} == {"python", "game"}


# ---------------------------------------------------------------- more time
def test_a_fraction_scales_the_work_and_nothing_else():
    assert budgets.flags("sft", 0.25) == ["--pretrain-steps", "1000", "--demonstrations", "4000"]
    assert budgets.flags("reward", 2) == ["--prompts", "12000"]
    assert budgets.flags("ppo", 0.5) == ["--iterations", "20", "--prompts", "3000"]


def test_budgets_run_what_is_missing_and_keep_its_minutes(tmp_path, monkeypatch):
    """A second call runs nothing and gives the same minutes. Usual mistake: they are those of the second call, about 0."""
    ran, clock = [], iter(range(0, 10 ** 6, 90))
    estimate = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    report = {"win_rate": {"ppo_vs_sft": {"overall": estimate}}, "kl": {"ppo": estimate},
              **{key: {stage: {"overall": estimate} for stage in ("sft", "ppo")} for key in ("accuracy", "gold")},
              "hallucination": {"sft": estimate, "ppo": estimate}}

    def pretend(script, *words):
        ran.append(script)
        for ending in ("pt", "json"):
            (tmp_path / f"{script.removesuffix('.py')}.{ending}").touch()
        if script == "evaluate.py":
            (tmp_path / "evaluation.json").write_text(json.dumps(report))
    monkeypatch.setattr(budgets, "python", pretend)
    monkeypatch.setattr(budgets, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    for ending in ("pt", "json"):
        (tmp_path / f"sft.{ending}").touch()
    (tmp_path / "minutes.json").write_text('{"sft": 4.5}')
    first = budgets.run(tmp_path, 1, 0.5)
    assert ran == ["reward.py", "ppo.py", "evaluate.py"] and first["minutes"] == 4.5 + 1.5 + 1.5
    assert budgets.run(tmp_path, 1, 0.5) == first and len(ran) == 3


def test_the_budgets_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    keys = ("minutes", "preferred", "sft gold", "ppo gold")
    rows = [{key: {"mean": m, "low": 0.9 * m, "high": 1.1 * m} for key in keys} for m in (0.3, 0.6)]
    budgets.draw(rows, tmp_path / "budgets.png")
    assert (tmp_path / "budgets.png").read_bytes()[:4] == b"\x89PNG"


# ---------------------------------------------------------------- footnote 5
def test_every_ranked_pair_is_a_row():
    """Usual mistakes: ties become pairs, or the loser stands first."""
    groups = [((["a"], ["b"], ["c"]), (1, 0, 1)), ((["d"], ["e"]), (0, 1))]
    assert benchmark("shuffled_pairs").pairs_of(groups) == [
        ((["b"], ["a"]), (0, 1)), ((["b"], ["c"]), (0, 1)), ((["d"], ["e"]), (0, 1))]


# ---------------------------------------------------------------- as commands
EXPERIMENTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def main(" in path.read_text(encoding="utf8"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_ends_in_one_line(name):
    """What the user can mend, and Ctrl-C, are one line as in the scripts. Usual mistake: a bare main(), and a traceback."""
    assert (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf8").endswith("\n    training.command(main)\n")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_says_what_it_is(name, monkeypatch, capsys):
    """--help shows the docstring. Usual mistake: a function named as a module that the last line needs."""
    path = ROOT / "benchmarks" / f"{name}.py"
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert benchmark(name).__doc__.split("\n")[0] in capsys.readouterr().out + str(end.value.code)


@pytest.mark.parametrize("name", ["folds", "instructions", "over_optimisation", "report", "tax"])
def test_a_run_that_is_not_there_is_one_line(name, run, tmp_path):
    """The file or the folder is named; no traceback."""
    module = benchmark(name)
    module.__name__ = name
    done = run(module, tmp_path / "none")
    assert done.code in (1, 2) or isinstance(done.code, str), done.code
    said = done.code if isinstance(done.code, str) else done.out.strip().splitlines()[-1]
    assert "none" in said and "Traceback" not in done.out, done.out


# ---------------------------------------------------------------- how many rankings it takes
rankings = benchmark("rankings")


def test_rankings_are_learnt_or_measured_never_both():
    """A prompt with several records is on one side; what is few is part of what is more."""
    records = [(f"q{i % 53}", "", [], ["a", f"b{i}"], [0, 1]) for i in range(97)]
    held_out, sets = rankings.split(records, 7, (5, 11), 3)
    asked = {record[0] for record in held_out}
    assert len(held_out) >= 7 and [*map(len, sets.values())] == [5, 11] and sets[5] == sets[11][:5]
    assert not asked & {record[0] for record in sets[11]}
    assert rankings.split(records, 7, (5, 11), 4) != (held_out, sets) == rankings.split(records, 7, (5, 11), 3)


def test_more_rankings_than_there_are():
    """Usual mistake: a column of 1,000 that learnt ten."""
    with pytest.raises(UserError, match="10 comparisons are left beside those held out: --counts asks for 11"):
        rankings.split([(f"q{i}", "", [], ["a", "b"], [0, 1]) for i in range(17)], 7, (5, 11), 3)


def test_a_reward_model_for_each_number_and_seed(tmp_path, monkeypatch, capsys):
    """It learns the one file and is measured on the other, beside a copy of the run's SFT model; the run stays as it is."""
    for name in ("sft.pt", "sft.json", "tokenizer.json", "reward.pt"):
        (tmp_path / name).write_text("")
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{i}", "chosen": "yes", "rejected": "no"}) + "\n" for i in range(47)))
    before, ran = sorted(tmp_path.iterdir()), []

    def pretend(*words):
        of = dict(zip(words[1::2], words[2::2]))
        learn, measure = ([json.loads(line) for line in Path(of[name]).read_text().splitlines()] for name in ("--data", "--data-eval"))
        assert len(measure) == 13 and learn[0]["responses"] == ["yes", "no"] and learn[0]["ranks"] == [0, 1]
        folder = Path(of["--out"])
        assert {path.name for path in folder.iterdir()} == {"sft.pt", "sft.json", "tokenizer.json", "learn.jsonl", "measure.jsonl"}
        ran.append((of["--seed"], len(learn), of["--epochs"]))
        (folder / "reward.json").write_text(json.dumps({"measured": {"accuracy": 0.5 + len(learn) / 100 + of["--seed"] / 50}}))
    monkeypatch.setattr(rankings.commands, "python", pretend)
    monkeypatch.setattr("sys.argv", ["rankings.py", str(tmp_path), str(file), "--counts", "5", "11", "--held-out", "13", "--seeds", "2",
                                     "--epochs", "10"])
    rankings.main()
    assert ran == [(1, 5, "10"), (1, 11, "10"), (2, 5, "10"), (2, 11, "10")] and sorted(tmp_path.iterdir()) == before
    assert "| --epochs 10 | 58 (57–59) | 64 (63–65) |" in capsys.readouterr().out
