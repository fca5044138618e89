"""Use a model: ask it once or several times, chat with it, run the code it wrote.

    python sample.py --prompt "What is the capital of France?" --num-samples 5
    python sample.py --prompt "Who likes tea?" --input "Anna likes tea. Ben lives in Oslo."
    python sample.py --prompt "请生成一个函数，用于计算两个矩阵的乘积" --execute
    python sample.py --chat
"""
import sys

import torch

import data
import sandbox
import training
import world
from config import UserError, parse
from model import generate
from training import say

STAGES = ("ppo", "ppo_no_ptx", "sft", "base")       # the furthest first


def pick_stage(folder, stage):
    """The stage asked for, or the furthest that the run has. UserError where there is none."""
    found = [name for name in STAGES if training.finished(folder, name)]
    if stage and not training.finished(folder, stage):
        raise UserError(f"{folder} has no finished {stage}; it has: {', '.join(found) or 'nothing'}")
    if not found:
        raise UserError(f"{folder} holds no model yet. Train one first: python sft.py --config tiny")
    return stage or found[0]


def answers(model, tokenizer, prompt, n, config):
    """n answers to one encoded prompt -> list of str."""
    if len(prompt) >= model.config.block_size:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model's context only {model.config.block_size}")
    generator = torch.Generator(model.wte.weight.device).manual_seed(config.seed)
    generation = generate(model, [prompt] * n, config.max_new_tokens, temperature=config.temperature, top_k=config.top_k,
                          top_p=config.top_p, eos=tokenizer.end, generator=generator)
    return [tokenizer.decode(response) for response in generation.responses]


def execute(answer, stdin):
    """Run an answer as Python and show what happens."""
    code, _ = world.strip_habits(answer)
    result = sandbox.run(code, stdin)
    say("--- it runs: " + ("yes" if result.ok else result.error))
    if result.stdout:
        say("--- it prints:\n" + result.stdout.rstrip())
    elif result.ok:
        say("--- it prints nothing" + (" (it defines a function)" if "def " in code else ""))
    if result.error and result.error.startswith("EOFError"):
        say("--- the program wants input: pipe it in, one line each, as in  seq 100 | python sample.py ... --execute")


class Stream:
    """Prints an answer while it is being made; a character whose bytes are not all there yet waits for them."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], ""

    def __call__(self, new):
        self.ids += [i for i in new if i is not None]
        text = self.tokenizer.decode(self.ids).rstrip("\ufffd")
        print(text[len(self.shown):], end="", flush=True)
        self.shown = text


def chat(model, tokenizer, config):
    """Turn by turn, until an empty line or Ctrl-D. Ctrl-C stops the answer, not the program."""
    say("Chat. An empty line ends it; Ctrl-C stops an answer.")
    history, turn = [], 0
    while True:
        try:
            question = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            question = ""
        if not question:
            say("bye")
            return
        prompt = data.encode_prompt(tokenizer, question, "", history)
        while history and len(prompt) > model.config.block_size // 2:
            history.pop(0)                      # the oldest turn goes, so that there is room for an answer
            prompt = data.encode_prompt(tokenizer, question, "", history)
        stream = Stream(tokenizer)
        print("model> ", end="", flush=True)
        try:
            generator = torch.Generator(model.wte.weight.device).manual_seed(config.seed + turn)
            generate(model, [prompt], config.max_new_tokens, temperature=config.temperature, top_k=config.top_k,
                     top_p=config.top_p, eos=tokenizer.end, generator=generator, on_token=stream)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except ValueError as error:
            print(f"[{error}]", end="")
        print()
        history, turn = history + [(question, stream.shown)], turn + 1


def main():
    config, _ = parse("sample", description=__doc__)
    training.set_up_cpu(config.threads)
    folder = training.run_path(config)
    stage = pick_stage(folder, config.stage)
    device = training.pick_device(config.device)
    model, tokenizer, facts = training.load_model(folder, stage, device)
    cast = training.autocast(device, torch.bfloat16 if config.dtype == "bf16" else torch.float32)
    say(f"{folder / stage}.pt, {model.num_params():,} parameters, temperature {config.temperature:g}, seed {config.seed}")
    if not config.prompt and not config.chat:
        raise UserError("nothing to answer: --prompt \"...\" asks once, --chat begins a conversation")
    with cast:
        if config.chat:
            return chat(model, tokenizer, config)
        if stage == "base":                     # a base knows no turns: it continues the text
            prompt = [tokenizer.end] + tokenizer.encode(f"{config.prompt} {config.input}".strip())
        else:
            prompt = data.encode_prompt(tokenizer, config.prompt, config.input)
        # what is piped into sample.py is the input of every program that it runs
        piped = sys.stdin.read() if config.execute and not sys.stdin.isatty() else ""
        for i, answer in enumerate(answers(model, tokenizer, prompt, config.num_samples, config), 1):
            say(f"[{i}] {answer}" if config.num_samples > 1 else answer)
            if config.execute:
                execute(answer, piped)


if __name__ == "__main__":
    training.command(main)
