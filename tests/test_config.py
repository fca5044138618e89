"""The command line is made from the dataclasses; what cannot work is said in one line, before anything is computed."""
import json
from dataclasses import fields

import pytest

import config
from config import UserError, parse

FIRST = [("sft", "--pretrain-steps", "17"), ("sample", "--num-samples", "5"), ("evaluate", "--per-category", "23")]


@pytest.mark.parametrize("step, flag, value", FIRST)
def test_where_a_value_comes_from(step, flag, value):
    """Command line before preset before default, and `origin` says which it was."""
    name = flag[2:].replace("-", "_")
    found, origin = parse(step, [flag, value])
    assert getattr(found, name) == int(value) and origin[name] == "command line"
    default, origin = parse(step, [])
    assert getattr(default, name) == next(f.default for f in fields(default) if f.name == name)
    assert origin["seed"] == "default"


def test_a_preset_changes_defaults_and_yields_to_the_command_line():
    for preset, steps in config.PRESETS.items():
        for step, changes in steps.items():
            found, origin = parse(step, ["--config", preset])
            assert all(getattr(found, k) == v and origin[k] == "preset" for k, v in changes.items())
            parse(step, [f"{config.flag(k)}={v}" for k, v in changes.items()])      # and all of it is allowed
    found, origin = parse("sft", ["--config", "gpt2", "--n-layer", "3"])
    assert found.n_layer == 3 and origin["n_layer"] == "command line" and found.n_embd == 768


def test_a_later_step_goes_on_with_the_runs_preset(tmp_path):
    """Usual mistake: reward.py --out runs/mine takes the rates of `tiny` for a model of GPT-2's size, and ruins it."""
    out = ["--out", str(tmp_path)]
    (tmp_path / "base.json").write_text(json.dumps({"config": {"config": "gpt2"}}))
    for step in ("sft", "reward", "ppo"):
        found, origin = parse(step, out)
        assert (found.config, found.lr, origin["lr"]) == ("gpt2", config.PRESETS["gpt2"][step]["lr"], "preset")
        assert parse(step, [*out, "--config", "tiny"])[0].lr == parse(step, [])[0].lr       # the user's word weighs more
    for step in ("sample", "evaluate"):         # they have no presets; evaluate.py --config headline is another command
        assert parse(step, out)[0].config == "tiny"
    (tmp_path / "sft.json").write_text(json.dumps({"config": {"config": "small"}}))
    assert parse("ppo", out)[0].config == "gpt2"        # what began the run
    (tmp_path / "base.json").unlink()                   # as with reward.py --init: there is no step 0
    assert parse("ppo", out)[0].config == "small"
    for damaged in ("", "[]", "{}", '{"config": {"config": "huge"}}', '{"config": 5}'):
        (tmp_path / "sft.json").write_text(damaged)
        assert parse("ppo", out)[0].config == "tiny"


@pytest.mark.parametrize("step", ["sft", "reward", "ppo"])
def test_published_weights_bring_their_preset(step):
    """--init is a model of GPT-2's size. Usual mistake: the learning rates of `tiny`, ten to a hundred times as high."""
    found, origin = parse(step, ["--init", "gpt2/"])
    assert found.config == "gpt2" and found.lr == config.PRESETS["gpt2"][step]["lr"] and origin["config"] == "preset"
    assert parse(step, ["--init", "gpt2/", "--config", "tiny"])[0].lr == parse(step, [])[0].lr


@pytest.mark.parametrize("argv", [["--pretrain-steps", "7"], ["--pretrain_steps", "7"], ["--pretrain-steps=7"],
                                  ["--pretrain_steps=7"], ["--pretrain-steps", "7", "--seed", "3"]])
def test_snake_and_kebab_case(argv):
    assert parse("sft", argv)[0].pretrain_steps == 7


def test_underscores_are_changed_in_flags_only():
    """A path keeps its underscores, also after "="; a number may have them."""
    found, _ = parse("sft", ["--out=my_run/a_b", "--data", "some_file.txt", "--pretrain_docs", "1_000_000"])
    assert (found.out, found.data, found.pretrain_docs) == ("my_run/a_b", "some_file.txt", 1_000_000)


def test_switches():
    assert parse("sft", ["--resume"])[0].resume is True
    assert parse("sft", ["--resume", "no"])[0].resume is False
    assert parse("sample", ["--chat", "--seed", "2"])[0].chat is True


@pytest.mark.parametrize("step, argv, field, value", [
    ("reward", ["--from", "sft,ppo"], "from_", "sft,ppo"),          # `from` is a word of Python, the flag is not
    ("reward", ["--min-k", "2", "--max-k", "2"], "max_k", 2),
    ("ppo", ["--unfinished-score", "-2.5"], "unfinished_score", -2.5),      # a penalty, so below zero
    ("ppo", ["--ema", "0.9999"], "ema", 0.9999),
    ("sample", ["--top-p=1"], "top_p", 1.0),
    ("sample", ["--prompt", "-- what a day"], "prompt", "-- what a day"),   # a text, not a flag
    ("sample", ["--prompt=--x"], "prompt", "--x"),
    ("sample", ["--prompt", "a=b_c"], "prompt", "a=b_c"),
])
def test_what_is_unusual_but_works(step, argv, field, value):
    assert getattr(parse(step, argv)[0], field) == value


@pytest.mark.parametrize("step, argv, words", [
    ("sft", ["--pretrain-step", "5"], ["--pretrain-step", "--pretrain-steps"]),     # names the nearest flag
    ("sft", ["--batchsize", "5"], ["--batch-size"]),
    ("sample", ["--temprature", "1"], ["--temperature", "python sample.py --help"]),
    ("sft", ["tiny"], ["tiny"]),
    ("sft", ["--data", "a.jsonl", "b.jsonl"], ["b.jsonl", "one word with commas, or a glob in quotes"]),    # as the shell spells *
    ("sft", ["--config", "tinny"], ["tinny", "tiny, headline, small, gpt2", "Did you mean tiny?"]),
    ("sft", ["--config"], ["--config"]),                                            # no value
    ("sft", ["--pretrain-steps", "many"], ["--pretrain-steps", "int", "many"]),
    ("sft", ["--lr", "fast"], ["--lr", "float"]),
    ("sft", ["--lr", "nan"], ["--lr"]),
    ("sft", ["--lr=-1"], ["--lr"]),
    ("sft", ["--n-layer", "0"], ["--n-layer", "from 1"]),
    ("sft", ["--epochs", "0"], ["--epochs"]),
    ("sft", ["--accumulate", "0"], ["--accumulate"]),
    ("sft", ["--n-embd", "30"], ["--n-embd 30", "--n-head 4"]),
    ("sft", ["--dtype", "fp16"], ["--dtype", "auto, fp32, bf16"]),
    ("sft", ["--tokenizer", "gpt-2"], ["bpe, gpt2", "Did you mean gpt2?"]),
    ("sft", ["--ptx-share", "1"], ["--ptx-share"]),         # 1 would leave no demonstrations
    ("sft", ["--ptx-share", "1.5"], ["--ptx-share"]),
    ("sft", ["--resume", "perhaps"], ["--resume", "bool"]),
    ("sft", ["--resume", "--fresh"], ["--resume", "--fresh"]),
    ("sample", ["--top-p", "0"], ["--top-p"]),
    ("sample", ["--top-p", "1.5"], ["--top-p"]),
    ("sample", ["--num-samples", "0"], ["--num-samples"]),
    ("sample", ["--chat", "--sed", "3"], ["--sed", "Did you mean --seed?"]),                # no value of --chat
    ("sft", ["--out", "--seed", "3"], ["--out needs a value"]),                             # --out $UNSET_VARIABLE
    ("sft", ["--threads=-1"], ["--threads", "from 0"]),
    ("reward", ["--min-k", "1"], ["--min-k", "from 2 to 9"]),       # one answer compares nothing
    ("reward", ["--max-k", "10"], ["--max-k", "from 2 to 9"]),
    ("reward", ["--min-k", "6", "--max-k", "5"], ["--min-k 6", "--max-k 5"]),
    ("reward", ["--from"], ["--from needs a value"]),
    ("reward", ["--from_", "sft"], ["--from_", "Did you mean --from?"]),
    ("ppo", ["--unfinished-score", "nan"], ["--unfinished-score"]),
    ("ppo", ["--advantage", "groups"], ["gae, group", "Did you mean group?"]),
    ("ppo", ["--group", "1"], ["--group", "from 2 to 64"]),         # one answer is its own mean
    ("reward", ["--objective", "ppo"], ["reward, dpo"]),
    ("evaluate", ["--best-of", "65"], ["--best-of", "from 1 to 64"]),
    ("ppo", ["--beta=-0.1"], ["--beta", "from 0"]),
    ("sft", ["--fresh="], ["--fresh", "bool"]), ("sft", ["--fresh", ""], ["--fresh", "bool"]),   # an empty variable of a shell script
    ("ppo", ["--ema", "1"], ["--ema"]),                     # 1 would keep the weights of the start
])
def test_what_cannot_work_is_one_line(step, argv, words):
    """One line that names the flag and the remedy; never a traceback, never a page of usage."""
    with pytest.raises(UserError) as error:
        parse(step, argv)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_through_the_command_line(run):
    """Exit code 2 and one line."""
    for script, argv in (("sft", ["--pretrain-step", "5"]), ("sample", ["--config", "tinny"]), ("evaluate", ["--seed", "x"])):
        done = run(script, *argv)
        assert done.code == 2 and done.out.startswith("error: ") and done.out.count("\n") == 1, done.out


@pytest.mark.parametrize("step", config.CONFIGS)
def test_help_lists_every_flag_with_its_default(step, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(step, ["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for field in fields(config.CONFIGS[step]):
        line = next(line for line in shown.splitlines() if line.split()[:1] == [config.flag(field.name)])
        assert line.endswith(f"default {field.default!r}")
        about = line.split(maxsplit=2)[2].removesuffix(f"default {field.default!r}")
        assert len(about) > 4, f"{step}: nothing on the page says what {field.name} is"
        assert field.name != "dtype" or ("no probe" in about) == (step == "sample")      # a step's own word comes last
        unset = field.type is bool or field.default == ""      # and what it lists, it takes
        assert unset or parse(step, [config.flag(field.name), str(field.default)])[1][field.name] == "command line"


def test_a_config_cannot_be_changed_by_accident():
    with pytest.raises(AttributeError):
        parse("sft", [])[0].lr = 1.0


def test_what_is_shown_is_complete():
    """The resolved config is printed once; of what is at work nothing is left out."""
    found, origin = parse("ppo", ["--ptx-coef", "0", "--fresh", "no"])
    asked, rest = config.show(found, origin).split("default:")      # what was asked for, also where it is off
    assert "ptx_coef=0.0" in asked and "fresh=False" in asked and "resume" not in rest
    found, origin = parse("sft", ["--config", "small", "--lr", "0.25"])
    shown = config.show(found, origin)
    assert "lr=0.25" in shown.split("preset:")[0] and "n_embd=384" in shown.split("preset:")[1].split("default:")[0]
    for field in fields(found):
        if getattr(found, field.name) not in ("", False):
            assert f" {field.name}={getattr(found, field.name)}" in shown
    assert max(map(len, shown.splitlines())) <= 120
