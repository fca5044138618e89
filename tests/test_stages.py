"""A stage knows what it was made of: nothing of an earlier tokenizer, model or file is used as if it were of this one."""
import dataclasses
import json
import shutil

import pytest
import torch
from conftest import TINY, same_weights

import data
import evaluate
import ppo
import reward
import sft
import training
from config import RewardConfig, SFTConfig, UserError, parse
from model import GPT, GPTConfig

TOKENIZER = data.Tokenizer(data.train_bpe([""], 256))


def make(folder, *stages, seed=0, config=SFTConfig()):
    """These stages of a run, of random weights that follow from the seed."""
    TOKENIZER.save(folder / "tokenizer.json")
    for stage in stages:
        torch.manual_seed(seed)
        gpt = GPT(GPTConfig(TOKENIZER.size, 13, 1, 2, 10))
        training.Stage(folder, stage, config, 0).finish(gpt, model=vars(gpt.config))


def those_finished(folder):
    return [stage for stage in ("base", "sft", "reward", "ppo") if training.finished(folder, stage)]


ALL = ["base", "sft", "reward", "ppo"]


def test_a_stage_of_another_parent_is_not_finished(tmp_path):
    """sft.py again, with another result: reward model and policy are of a model that is no more. The same result changes nothing."""
    make(tmp_path, *ALL)
    make(tmp_path, "sft")
    assert those_finished(tmp_path) == ALL, "the same weights again"
    make(tmp_path, "sft", seed=1)
    assert those_finished(tmp_path) == ["base", "sft"]
    with pytest.raises(UserError, match=f"no finished ppo, up to date. Make it first: python ppo.py --out {tmp_path}"):
        training.load_model(tmp_path, "ppo")
    make(tmp_path, "sft")
    assert those_finished(tmp_path) == ALL, "and it is back"
    make(tmp_path, "base", seed=1)
    assert "sft" not in those_finished(tmp_path)


def test_a_stage_of_another_tokenizer_is_not_finished(tmp_path):
    """sft.py --fresh was interrupted: its tokenizer is there, and the weights of the old one. Usual mistake: an IndexError, or nonsense."""
    make(tmp_path, *ALL)
    data.Tokenizer(data.train_bpe(["the the the"], 259)).save(tmp_path / "tokenizer.json")
    assert those_finished(tmp_path) == []


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """Its stages do not say what they were made of. Usual mistake: a KeyError."""
    make(tmp_path, "base", "sft")
    for stage in ("base", "sft"):
        facts = json.loads((tmp_path / f"{stage}.json").read_text())
        (tmp_path / f"{stage}.json").write_text(json.dumps({"config": facts["config"], "model": facts["model"], "seconds": 1}))
    assert those_finished(tmp_path) == ["base", "sft"]
    make(tmp_path, "reward")
    assert those_finished(tmp_path) == ["base", "sft", "reward"] and training.load_model(tmp_path, "sft")


def test_a_model_can_be_given_away_without_its_parents(tmp_path):
    make(tmp_path, *ALL)
    (tmp_path / "gift").mkdir()
    for name in ("ppo.pt", "ppo.json", "tokenizer.json"):
        shutil.copy(tmp_path / name, tmp_path / "gift")
    assert training.load_model(tmp_path / "gift", "ppo")[2]["parent"] == "sft"


def test_a_reward_model_of_another_sft_model_is_refused(tmp_path):
    make(tmp_path, *ALL)
    make(tmp_path, "sft", seed=1)
    with pytest.raises(UserError, match="no reward model that fits its SFT model: python reward.py"):
        ppo.make_reward(parse("ppo", [])[0], tmp_path, None, None, None, None)


@pytest.mark.parametrize("change, named", [("file", "content of --data"), ("parent", "tokenizer or earlier step"),
                                           ("threads", "threads"), ("dtype", "dtype")])
def test_an_interrupted_step_goes_on_with_the_same_only(change, named, tmp_path):
    """The same flags are not enough. Usual mistake: a file that grew in between gives the later steps other batches, silently."""
    (mine := tmp_path / "mine.jsonl").write_text('{"prompt": "q", "chosen": "b", "rejected": "c"}\n')
    make(tmp_path, "base", "sft")
    config = RewardConfig(data=str(mine), dtype="fp32", threads=2)
    training.Stage(tmp_path, "reward", config, 9).save()
    assert training.Stage(tmp_path, "reward", config, 9).step == 0                  # it goes on
    if change == "file":
        mine.write_text(mine.read_text() * 2)
    elif change == "parent":
        make(tmp_path, "sft", seed=1)
    else:
        config = dataclasses.replace(config, **{"threads": {"threads": 1}, "dtype": {"dtype": "bf16"}}[change])
    with pytest.raises(UserError, match=f"reward.state: interrupted with another {named}. Go on with the same"):
        training.Stage(tmp_path, "reward", config, 9)


def test_a_run_is_kept_with_what_was_found(tmp_path, monkeypatch):
    """`auto` is no number: another core, another probe, and the same command would go on otherwise."""
    monkeypatch.setattr("sys.argv", ["sft.py", "--out", str(tmp_path)])
    monkeypatch.setattr(training, "pick_dtype", lambda *args: (torch.bfloat16, "as this test wants"))
    assert training.begin("sft", "")[1].dtype == "bf16"
    monkeypatch.setattr(training, "pick_dtype", lambda *args: (torch.float32, "as this test wants"))
    config = training.begin("sft", "")[1]
    assert (config.dtype, config.threads) == ("fp32", torch.get_num_threads())


@pytest.mark.parametrize("change", [("--seed", 2), ("--pretrain-lr", 0.001)])      # another tokenizer; the same one
def test_an_interrupted_fresh_run_goes_on_without_the_flag(change, tiny_run, run, tmp_path, monkeypatch):
    """With it, as it says, the command begins anew. Usual mistake: the old base is kept, under the new one's tokenizer."""
    folder, accumulate, calls = shutil.copytree(tiny_run.folder, tmp_path / "run"), sft.accumulate, []
    other = [*TINY, *change, "--epochs", 1, "--out"]
    assert run("sft", *other, tmp_path / "undisturbed").code == 0

    def stopping(*args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return accumulate(*args)
    monkeypatch.setattr(training.Stage, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(sft, "accumulate", stopping)
    done = run("sft", *other, folder, "--fresh")
    assert done.code == 130 and "Without --fresh the same command goes on" in done.out
    done = run("sft", *other, folder)
    assert done.code == 0 and "going on after step 6 of 12" in done.out and "is kept" not in done.out, done.out
    assert "byte-pair" not in done.out, "the tokenizer is there"
    assert all(same_weights(folder, tmp_path / "undisturbed", stage) for stage in ("base", "sft"))


def test_a_base_of_another_text_is_said(run, tmp_path):
    """The same text again: the base is there. Another: usual mistake, "done in 0:00", and it was never read."""
    (book := tmp_path / "book.txt").write_text("\n".join(f"On day {i} the ship number {i * 7} sailed." for i in range(400)))
    flags = [*TINY, "--block-size", 64, "--data", book, "--out", tmp_path / "run"]
    assert run("sft", *flags).code == 0
    done = run("sft", *flags)
    assert done.code == 0 and "is there and is kept" in done.out
    book.write_text(book.read_text() + "And that was all.\n")
    done = run("sft", *flags)
    assert done.code == 2 and "has a base of another text: --fresh" in done.out.splitlines()[-1]


# ---------------------------------------------------------------- prompts that leave no room
def test_prompts_that_leave_no_room_are_left_out_and_counted(tmp_path, capsys):
    """Usual mistake: PPO cuts them from the left, user token and all, and learns from one token of an answer."""
    asked = ["word " * 30] + [f"q{i}" for i in range(43)]
    (mine := tmp_path / "asked.txt").write_text("\n".join(asked))
    config = parse("ppo", ["--data", str(mine)])[0]
    pool, test = ppo.prompts_of(config, TOKENIZER, 101)
    assert len(pool) + len(test) == 43 and "  1 of 44 prompts leave no room for an answer in 101 tokens: left out\n" in capsys.readouterr().out
    assert max(len(data.encode_prompt(TOKENIZER, *task.parts)) for task in pool + test) < 101
    with pytest.raises(UserError, match="no prompt leaves room for an answer in 3 tokens"):
        ppo.prompts_of(config, TOKENIZER, 3)


def test_one_long_question_does_not_stop_step_2(tiny_run, run, tmp_path):
    """The first of up to twenty prompts is held out. Usual mistake: it is too long, and "no comparison fits"."""
    rows = [{"prompt": "word " * 300 * (i == 0) + f"Say {i}", "chosen": "yes", "rejected": "no"} for i in range(15)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = shutil.copytree(tiny_run.folder, tmp_path / "run")
    done = run("reward", "--dtype", "fp32", "--threads", 2, "--batch-prompts", 5, "--data", tmp_path / "pairs.jsonl", "--out", folder)
    assert done.code == 0 and "1 of 15 prompts leave no room" in done.out and "  13 prompts;" in done.out, done.out


# ---------------------------------------------------------------- other things that went on silently, or in a traceback
@pytest.mark.parametrize("flags, words", [
    (["--reward", "executoin"], ["executoin", "model, FILE.py:FUNCTION"]), (["--reward", "mine.py"], ["mine.py", "FILE.py:FUNCTION"]),
    (["--reward", "execution", "--data", "asked.txt"], ["without --data, execution"])])
def test_a_reward_that_is_none_is_said(flags, words, tmp_path):
    """Usual mistake: anything without a colon is the reward model."""
    make(tmp_path, "base", "sft", "reward")
    with pytest.raises(UserError) as error:
        ppo.make_reward(parse("ppo", flags)[0], tmp_path, None, None, None, None)
    assert all(word in str(error.value) for word in words)


def test_a_reward_that_leaves_the_program(tmp_path):
    """Usual mistake: sys.exit() in the user's function ends PPO with exit code 0."""
    (tmp_path / "mine.py").write_text("import sys\ndef score(prompts, responses):\n    sys.exit(0)\n")
    score = ppo.own_reward(f"{tmp_path / 'mine.py'}:score")
    with pytest.raises(UserError, match="SystemExit"):
        score(ppo.prompts_of(parse("ppo", [])[0], TOKENIZER, 99)[1][:2], ["a", "b"])


def test_the_tables_of_a_run_with_own_rankings():
    """Its reward model was measured on the user's pairs alone: no judge, no categories. Usual mistake: a KeyError at the very end."""
    empty = dict.fromkeys(("accuracy", "accuracy_greedy", "win_rate", "win_rate_greedy", "pretraining_loss", *evaluate.COLUMNS), {})
    *_, (title, _, rows) = evaluate.tables(empty | {"reward_model": {"accuracy": 0.926, "pairs": 54, "spread": 8.1}})
    assert title == "reward model, held-out prompts" and rows == {"accuracy": ["92.6"]}


def test_accuracy_is_taken_on_the_cpu():
    """In float64, which Apple's GPUs lack. Usual mistake: the scores are converted where they are."""
    class Elsewhere(torch.Tensor):
        def double(self):
            raise TypeError("no float64 on this device")

        def cpu(self):
            return self.as_subclass(torch.Tensor)
    scores = torch.tensor([[2.0, 1.0]]).as_subclass(Elsewhere)
    assert reward.accuracy(scores, reward.preferred(torch.tensor([[0, 1]]))) == 1
