"""Every number of the project, on one page: what a command can be told, and what the presets tell it.

A step's config is a frozen dataclass; its fields are its flags (`--pretrain-steps 500`, or with underscores). A value
comes from the command line, else from the preset (`--config tiny`), else from the default that stands here.
"""
import argparse
import difflib
import sys
from dataclasses import dataclass, fields


class UserError(Exception):
    """What the user can mend: one plain line, printed without a traceback; the exit code is 2."""


@dataclass(frozen=True)
class CommandConfig:
    """What every command understands."""
    config: str = "tiny"        # the preset: tiny, small or gpt2
    seed: int = 1               # data, weights and sampling follow from it
    out: str = ""               # the run's folder; by default runs/<config>, with own data runs/<config>-<file>
    data: str = ""              # your own file instead of the built-in world
    device: str = "auto"        # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"         # auto: bf16 where a probe finds it faster; or fp32, bf16
    threads: int = 0            # of the CPU; 0 = all that this process may use. Results depend on it, bit by bit


@dataclass(frozen=True)
class TrainConfig(CommandConfig):
    """What every training step understands."""
    resume: bool = False        # insist on continuing an interrupted run (it is continued anyway, if there is one)
    fresh: bool = False         # begin anew, even where a finished or an interrupted run is there


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Step 0, pretraining, and step 1, supervised fine-tuning."""
    init: str = ""              # a checkpoint (.pt) to fine-tune instead of the run's own base
    # the model
    tokenizer: str = "bpe"      # bpe: trained on the data; gpt2: tiktoken's
    vocab_size: int = 2048      # of the trained tokenizer, its 4 special tokens included
    block_size: int = 256       # tokens of context
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    flash: str = "auto"         # the fused attention kernel: auto (see model.by_hand_is_faster), yes or no
    init_std: float = 0.08      # of the weights at the start, about 1/sqrt(n_embd)
    wave_std: float = 0.2       # positions start as sinusoids of this amplitude
    # step 0
    recital_steps: int = 400    # optimiser steps on recitals, in windows of 64 tokens, before the documents
    pretrain_steps: int = 3000  # optimiser steps in all
    pretrain_batch: int = 2048  # tokens an optimiser step
    pretrain_lr: float = 2e-3   # of AdamW: embeddings, norms, biases
    pretrain_matrix_lr: float = 0.008    # of Muon: the blocks' matrices
    pretrain_docs: int = 4_000_000   # tokens of different text to make; more steps than that read it again
    # step 1
    demonstrations: int = 16_000     # how many the labelers write
    epochs: int = 3
    steps: int = 0              # optimiser steps of step 1; 0 = by epochs
    batch_size: int = 32        # demonstrations an optimiser step
    lr: float = 1.5e-3
    matrix_lr: float = 0.003
    ptx_share: float = 0.1      # pretraining sequences among the fine-tuning ones (InstructGPT C.3: 10 %)
    sft_dropout: float = 0.0    # residual dropout in step 1 (the paper's baseline: 0.2, over 16 epochs)
    # both
    accumulate: int = 1         # micro-batches an optimiser step
    weight_decay: float = 0.1
    warmup: int = 50            # optimiser steps until the peak of the learning rate
    clip: float = 1.0           # the largest norm of the gradient
    eval_every: int = 500       # optimiser steps between two evaluations


@dataclass(frozen=True)
class SampleConfig(CommandConfig):
    """Using a trained model."""
    stage: str = ""             # base, sft, ppo ...; by default the furthest that the run has
    prompt: str = ""            # the instruction
    input: str = ""             # the text that it is about, if any
    num_samples: int = 1        # answers to the prompt
    max_new_tokens: int = 160
    temperature: float = 0.7    # 1: as the model believes; 0: always its first choice
    top_k: int = 0              # 0 = off
    top_p: float = 1.0          # 1 = off
    chat: bool = False          # a conversation
    execute: bool = False       # run the Python that it wrote, in the sandbox


@dataclass(frozen=True)
class EvaluateConfig(CommandConfig):
    """Measuring the stages of a run."""
    per_category: int = 120     # test prompts of each category
    batch_size: int = 256       # prompts answered side by side


PRESETS = {     # preset -> step -> what it changes
    "tiny": {},                 # minutes on a laptop CPU
    "small": {                  # 11 M parameters: an hour of a GPU
        "sft": dict(init_std=0.05, vocab_size=4096, block_size=512, n_layer=6, n_head=6, n_embd=384, pretrain_steps=5000,
                    pretrain_batch=32_768, pretrain_lr=1e-3, pretrain_docs=20_000_000, demonstrations=60_000, lr=5e-4)},
    "gpt2": {                   # GPT-2's shape and tokenizer, 124 M parameters: for your own data and a GPU
        "sft": dict(init_std=0.02, wave_std=0.0, tokenizer="gpt2", block_size=1024, n_layer=12, n_head=12,
                    n_embd=768, pretrain_steps=20_000, pretrain_batch=131_072, accumulate=4, pretrain_lr=6e-4,
                    pretrain_docs=20_000_000, lr=1e-4, warmup=500)}}
CONFIGS = {"sft": SFTConfig, "sample": SampleConfig, "evaluate": EvaluateConfig}


def nearest(word, words):
    """" Did you mean ...?", or nothing where no word is near."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""


def _boolean(text):
    if text.lower() not in ("1", "0", "true", "false", "yes", "no"):
        raise ValueError
    return text.lower() in ("1", "true", "yes")


class _Parser(argparse.ArgumentParser):
    def error(self, message):       # argparse's own would print a page of usage
        raise UserError(f"{message}. `python {self.prog} --help` lists all flags.")


def parse(step, argv=None, description=""):
    """The config of a step from its command line -> (config, {field: where its value comes from})."""
    cls = CONFIGS[step]
    parser = _Parser(f"{step}.py", description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(cls):
        more = dict(nargs="?", const="yes") if field.type is bool else {}
        parser.add_argument("--" + field.name.replace("_", "-"), metavar=field.type.__name__.upper(),
                            help=f"default {field.default!r}", **more)
    # both --pretrain-steps and --pretrain_steps
    argv = [("--" + a[2:].partition("=")[0].replace("_", "-") + "".join(a[2:].partition("=")[1:]))
            if a.startswith("--") else a for a in (sys.argv[1:] if argv is None else argv)]
    flags = ["--" + field.name.replace("_", "-") for field in fields(cls)]
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}.{nearest(unknown[0].partition('=')[0], flags)} "
                        f"`python {step}.py --help` lists them all.")
    return resolve(step, vars(known))


def resolve(step, given):
    """given: {field: text or value} from the command line. Preset and defaults fill in the rest."""
    cls, preset = CONFIGS[step], given.get("config", "tiny")
    if preset not in PRESETS:
        raise UserError(f"unknown --config {preset}: the presets are {', '.join(PRESETS)}.{nearest(preset, PRESETS)}")
    changes, values, origin = PRESETS[preset].get(step, {}), {}, {}
    for field in fields(cls):
        values[field.name] = changes.get(field.name, field.default)
        origin[field.name] = "preset" if field.name in changes else "default"
        if field.name in given:
            text, convert = given[field.name], _boolean if field.type is bool else field.type
            try:
                values[field.name] = convert(str(text).replace("_", "") if convert is int else str(text))
            except ValueError:
                flag = "--" + field.name.replace("_", "-")
                raise UserError(f"{flag} takes a value of type {field.type.__name__}, not {text!r}") from None
            origin[field.name] = "command line"
    config = cls(**values)
    validate(config)
    return config, origin


def validate(config):
    """UserError for values that cannot work, before anything is computed."""
    for field in fields(config):
        value = getattr(config, field.name)
        low = 0 if field.name in ("threads", "steps", "seed", "warmup", "recital_steps", "top_k") else 1
        if field.type is int and value < low:
            raise UserError(f"--{field.name.replace('_', '-')} must be at least {low}, not {value}")
        if field.type is float and not 0 <= value < 1e6:
            raise UserError(f"--{field.name.replace('_', '-')} must be between 0 and 1e6, not {value}")
        if field.name in ("ptx_share", "sft_dropout") and value >= 1:
            raise UserError(f"--{field.name.replace('_', '-')} is a share: from 0 to below 1, not {value}")
        if field.name == "top_p" and not 0 < value <= 1:
            raise UserError(f"--top-p must be above 0 and at most 1 (which is off), not {value}")
    if getattr(config, "resume", False) and config.fresh:
        raise UserError("--resume goes on and --fresh begins anew: give one of them")
    choices = {"dtype": ("auto", "fp32", "bf16"), "tokenizer": ("bpe", "gpt2"), "flash": ("auto", "yes", "no")}
    for name, allowed in choices.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise UserError(f"--{name} must be one of {', '.join(allowed)}, not {value}.{nearest(value, allowed)}")
    if hasattr(config, "n_embd") and config.n_embd % config.n_head:
        raise UserError(f"--n-embd {config.n_embd} does not divide into --n-head {config.n_head} equal heads")


def show(config, origin):
    """The resolved config on a few lines, by where its values come from."""
    lines = []
    for source in ("command line", "preset", "default"):
        words = [f"{name}={getattr(config, name)}" for name, o in origin.items()
                 if o == source and getattr(config, name) not in ("", False)]
        line = f"  {source}:"
        for word in words:
            if len(line) + len(word) > 110:
                lines.append(line)
                line = " " * 10
            line += " " + word
        if words:
            lines.append(line)
    return "\n".join(lines)
