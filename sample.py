"""Use a model: ask it, --chat with it, --compare the stages, run the code that it wrote, rank its answers.

    python sample.py --prompt "Who likes tea?" --input "Anna likes tea. Ben lives in Oslo." --num-samples 5
    python sample.py --prompt "请生成一个函数，用于计算两个矩阵的乘积" --execute
    python sample.py --rank mine.jsonl --prompts asked.jsonl --num-samples 4 --temperature 1"""
import runpy, sys
from config import UserError, parse     # before torch: see there
import data, sandbox, training, world
from model import load_gpt2
from training import say

SHOWN = (*((prompt, "") for prompt in world.SHOWN),     # and a question that its text does not answer
         ("What is Nick's job? Use only the text.", "Nick likes grapes. Nick has a heavy frog."))

def encode(tokenizer, stage, instruction, input="", history=()):
    """A prompt as this stage reads it -> ids. A base knows no turns: it continues the text."""
    if stage != "base":
        return data.encode_prompt(tokenizer, instruction, input, history)
    return [tokenizer.end] + tokenizer.encode(" ".join((*sum(history, ()), instruction, input)).strip())

def answers(model, tokenizer, prompt, n, config, cast, turn=0, **options):
    """n answers to one encoded prompt -> list of str. Each turn of a chat has a seed of its own."""
    if len(prompt) >= model.config.block_size:
        raise UserError(f"the prompt has {len(prompt)} tokens, the context only {model.config.block_size}")
    how = config.max_new_tokens, config.temperature, config.seed + turn, cast
    options |= {"top_k": config.top_k, "top_p": config.top_p}
    return [answer.text for answer in training.respond(model, tokenizer, [prompt] * n, *how, **options)]

def execute(answer, stdin):
    """Run an answer as Python and show what happens."""
    code, _ = world.strip_habits(answer)
    result = sandbox.run(code, stdin)
    say("--- it runs: " + ("yes" if result.ok else result.error))
    nothing = " nothing" + " (it defines a function)" * ("def " in code)
    say("--- it prints" + (f":\n{result.stdout.rstrip()}" if result.stdout else nothing))
    if result.error and result.error.startswith("EOFError"):
        say("--- it wants input: pipe it in, one line each, as in  seq 100 | python sample.py ... --execute")

def tool(name):
    """The function of this name in the file of this name: what few readers need stands in benchmarks/."""
    return runpy.run_path(f"{data.BENCHMARKS}/{name}.py")[name]

def main():
    config, _ = parse("sample", description=__doc__)
    if config.prompt or config.num_samples > 9 if config.rank else config.prompts:
        raise UserError("--rank OUT.jsonl takes --prompts FILE (no --prompt) and --num-samples 2 to 9")
    folder, (device, cast, _) = training.run_path(config), training.compute(config)
    stages = [stage for stage in training.MADE_BY if training.finished(folder, stage)] or ["base"]
    stages = ["base"] if config.init else stages if config.compare else [config.stage or stages[-1]]
    tokenizer = data.Tokenizer.published(config.init) if config.init else None
    models = ({"base": (load_gpt2(config.init, tokenizer.size).to(device), tokenizer, {})} if config.init else
              {stage: training.load_model(folder, stage, device) for stage in stages})
    for stage, (model, tokenizer, _) in models.items():
        say(f"{config.init or f'{folder / stage}.pt'}, {model.num_params():,} parameters, "
            f"temperature {config.temperature:g}, seed {config.seed}")
    if config.export:
        return tool("export")(model, tokenizer, config.export)
    if config.chat:
        return tool("chat")(model, tokenizer, stage, config, cast)
    if config.rank:
        return tool("rank")(model, tokenizer, stage, config, cast, folder)
    questions = [(config.prompt, config.input)] if config.prompt else SHOWN if config.compare else []
    if not questions:
        raise UserError("nothing to answer: --prompt \"...\" asks once, --chat begins a conversation")
    piped = sys.stdin.read() if config.execute and not sys.stdin.isatty() else ""   # for all that it runs
    for stage, question in ((stage, question) for question in questions for stage in stages):
        (model, tokenizer, _), text = models[stage], " ".join(question).strip()
        prompt = encode(tokenizer, stage, *question)
        if config.compare:
            say(f"\n=== {stage}: {text}")
        for i, answer in enumerate(answers(model, tokenizer, prompt, config.num_samples, config, cast), 1):
            say(f"[{i}] {answer}" if config.num_samples > 1 else answer)
            if config.execute:
                execute(answer, piped)

if __name__ == "__main__":
    training.command(main)
