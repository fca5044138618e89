"""Use a model: ask it once or several times, chat with it, compare the stages, run the code it wrote.

    python sample.py --prompt "What is the capital of France?" --num-samples 5
    python sample.py --prompt "Who likes tea?" --input "Anna likes tea. Ben lives in Oslo."
    python sample.py --prompt "请生成一个函数，用于计算两个矩阵的乘积" --execute
    python sample.py --compare
    python sample.py --chat
"""
import contextlib
import sys

from config import UserError, parse     # before torch: see there
import data
import sandbox
import training
import world
from training import say

STAGES = ("base", "sft", "ppo_no_ptx", "ppo")       # the furthest last
SHOWN = (*((prompt, "") for prompt in world.SHOWN),     # and a question that its text does not answer
         ("What is Nick's job? Use only the text.", "Nick likes grapes. Nick has a heavy frog."))


def answers(model, tokenizer, prompt, n, config, cast, turn=0, **options):
    """n answers to one encoded prompt -> list of str. Each turn of a chat has a seed of its own."""
    if len(prompt) >= model.config.block_size:
        raise UserError(f"the prompt has {len(prompt)} tokens, the context only {model.config.block_size}")
    found = training.respond(model, tokenizer, [prompt] * n, config.max_new_tokens, config.temperature,
                             config.seed + turn, cast, top_k=config.top_k, top_p=config.top_p, **options)
    return [answer.text for answer in found]


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
        say("--- it wants input: pipe it in, one line each, as in  seq 100 | python sample.py ... --execute")


class Stream:
    """Prints an answer while it is made; a character whose bytes are not all there yet waits for them."""
    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], ""

    def __call__(self, new):
        self.ids += [i for i in new if i is not None]
        before, self.shown = self.shown, self.tokenizer.decode(self.ids).rstrip("\ufffd")
        print(self.shown[len(before):], end="", flush=True)


def chat(model, tokenizer, config, cast):
    """Turn by turn, until an empty line or Ctrl-D. Ctrl-C stops the answer, not the program."""
    say("Chat. An empty line ends it; Ctrl-C stops an answer.")
    history, room = [], model.config.block_size // 2
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        for turn, question in enumerate(iter(lambda: input("you> ").strip(), "")):
            while len(prompt := data.encode_prompt(tokenizer, question, "", history)) > room and history:
                history.pop(0)                      # the oldest turn goes: an answer needs room
            stream = Stream(tokenizer)
            print("model> ", end="", flush=True)
            try:
                answers(model, tokenizer, prompt, 1, config, cast, turn, on_token=stream)
            except (KeyboardInterrupt, UserError) as why:
                print(f" [{str(why) or 'stopped'}]", end="")
            print()
            history.append((question, stream.shown))
    say("bye")


def main():
    config, _ = parse("sample", description=__doc__)
    training.set_up_cpu(config.threads)
    folder, device = training.run_path(config), training.pick_device(config.device)
    cast = training.autocast(device, training.pick_dtype(config.dtype.replace("auto", "fp32"), device)[0])
    stages = [stage for stage in STAGES if training.finished(folder, stage)]
    if not stages:
        raise UserError(f"{folder} holds no model yet. Train one first: python sft.py --config tiny")
    stages = stages if config.compare else [config.stage or stages[-1]]
    models = {stage: training.load_model(folder, stage, device) for stage in stages}
    for stage, (model, tokenizer, _) in models.items():
        say(f"{folder / stage}.pt, {model.num_params():,} parameters, temperature {config.temperature:g}, "
            f"seed {config.seed}")
    if config.chat:
        return chat(model, tokenizer, config, cast)
    questions = [(config.prompt, config.input)] if config.prompt else SHOWN if config.compare else []
    if not questions:
        raise UserError("nothing to answer: --prompt \"...\" asks once, --chat begins a conversation")
    piped = sys.stdin.read() if config.execute and not sys.stdin.isatty() else ""   # for all that it runs
    for stage, question in ((stage, question) for question in questions for stage in stages):
        (model, tokenizer, _), text = models[stage], " ".join(question).strip()
        prompt = (data.encode_prompt(tokenizer, *question) if stage != "base" else
                  [tokenizer.end] + tokenizer.encode(text))     # a base knows no turns: it continues the text
        if config.compare:
            say(f"\n=== {stage}: {text}")
        for i, answer in enumerate(answers(model, tokenizer, prompt, config.num_samples, config, cast), 1):
            say(f"[{i}] {answer}" if config.num_samples > 1 else answer)
            if config.execute:
                execute(answer, piped)


if __name__ == "__main__":
    training.command(main)
