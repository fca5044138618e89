"""Every number of the project, on one page. A config's fields are a step's flags (`--pretrain-steps 500`); a
value comes from the command line, else from the preset (`--config tiny`), else from the default here."""
import contextlib, difflib, inspect, json, math, os, re, sys, textwrap
from dataclasses import dataclass, fields
from pathlib import Path

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "200")    # kernels kept; 1,024 take another 0.3 GB
if "OMP_WAIT_POLICY" not in os.environ:     # how often an idle thread looks for work before it sleeps:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")     # libgomp's own: a tenth faster, but not beside a job

class UserError(Exception):
    """What the user can mend: one plain line, printed without a traceback; the exit code is 2."""

@dataclass(frozen=True)
class CommandConfig:            # what every command understands
    config: str = "tiny"        # tiny, headline, small or gpt2; else of --out's run, with --init gpt2, or this
    seed: int = 1               # data, weights and sampling follow from it
    out: str = ""               # the run's folder; by default runs/<config>, with --data runs/<config>-<file>
    data: str = ""              # your own file instead of the built-in world
    device: str = "auto"        # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"         # auto: bf16 where a probe finds it faster; or fp32, bf16
    threads: int = 0            # of the CPU; 0 = all that this process may use. Results depend on it

@dataclass(frozen=True)
class TrainConfig(CommandConfig):  # what every training step understands
    resume: bool = False        # an interrupted run is continued anyway; insist that there is one
    fresh: bool = False         # begin anew, even where a finished or an interrupted run is there
    data_eval: str = ""         # your own held-out file; without it every twentieth prompt of --data is held out
    clip: float = 1.0           # the largest norm of the gradient
    init: str = ""              # start from GPT-2's published weights: a folder, a .safetensors file, its index
    lora_rank: int = 0          # steps 1 to 3: above 0 only adapters of this rank learn (LoRA); 0 = all weights
    files = property(lambda self: [name for name in (self.data, self.data_eval) if name])

@dataclass(frozen=True)
class SFTConfig(TrainConfig):   # step 0, pretraining, and step 1, supervised fine-tuning
    tokenizer: str = "bpe"      # the model: bpe, trained on the data; gpt2: tiktoken's
    vocab_size: int = 2048      # of the trained tokenizer, its 4 special tokens included
    block_size: int = 256       # tokens of context
    n_layer: int = 4            # blocks
    n_head: int = 4             # attention heads
    n_embd: int = 128           # channels: the width of the model
    flash: str = "auto"         # the fused attention kernel: auto (see model.by_hand_is_faster), yes or no
    init_std: float = 0.08      # of the weights at the start, about 1/sqrt(n_embd)
    wave_std: float = 0.2       # positions start as sinusoids of this amplitude
    recital_steps: int = 400    # step 0: optimiser steps on recitals, in windows of 64 tokens, come first
    pretrain_steps: int = 4000  # optimiser steps in all
    pretrain_batch: int = 2048  # tokens an optimiser step
    pretrain_lr: float = 2e-3   # of AdamW: embeddings, norms, biases
    pretrain_matrix_lr: float = 0.008    # of Muon: the blocks' matrices
    pretrain_docs: int = 4_000_000   # tokens of different text to make; more steps than that read it again
    demonstrations: int = 16_000     # step 1: how many the labelers write
    epochs: int = 5             # how often each demonstration is learnt
    steps: int = 0              # optimiser steps of step 1; 0 = by epochs
    batch_size: int = 64        # demonstrations an optimiser step
    packing: bool = False       # several demonstrations share a row of block_size tokens: less padding
    lr: float = 2e-3            # step 1, as in step 0: of AdamW ...
    matrix_lr: float = 0.004    # ... and of Muon
    ptx_share: float = 0.1      # pretraining sequences among the fine-tuning ones (InstructGPT C.3: 10 %)
    accumulate: int = 1         # both: micro-batches an optimiser step
    weight_decay: float = 0.1   # of matrices and embeddings
    warmup: int = 50            # optimiser steps until the peak of the learning rate
    eval_every: int = 500       # optimiser steps between two evaluations

@dataclass(frozen=True)
class RewardConfig(TrainConfig):  # step 2: comparisons, and the reward model
    from_: str = "sft"          # whose answers are ranked: stages, with commas between them
    objective: str = "reward"   # reward: a reward model; dpo: no such model, a policy from the same rankings
    dpo_beta: float = 0.3       # β of DPO: price of a nat of KL
    dpo_rate: float = 0.3       # DPO's learning rates as a share of these below: it moves a policy, and further
    prompts: int = 6000         # prompts whose answers are ranked
    min_k: int = 4              # answers to a prompt, from so many ... (InstructGPT: 4 to 9)
    max_k: int = 9              # ... to so many
    max_new_tokens: int = 100   # of an answer
    epochs: int = 1             # more overfits (InstructGPT C.2), but of few rankings one is too little
    steps: int = 0              # optimiser steps; 0 = by epochs
    batch_prompts: int = 24     # prompts an optimiser step, with all their answers
    likelihood: float = 0.2     # w to begin with, of the answer's log-likelihood in the score; 0 = not part of it
    lr: float = 3e-4            # of AdamW: embedding, head, norms, biases
    matrix_lr: float = 6e-4     # of Muon: the blocks' matrices
    weight_decay: float = 0.1   # of matrices and embeddings
    warmup: int = 20            # optimiser steps until the peak of the learning rate
    eval_prompts: int = 600     # held-out prompts to measure on

@dataclass(frozen=True)
class PPOConfig(TrainConfig):   # step 3: PPO with the pretraining gradient mixed in
    reward: str = "model"       # model: step 2's; execution: the exact check; FILE.py:function: your own
    advantage: str = "gae"      # gae: by the value model; group: GRPO, against other answers to the prompt
    group: int = 4              # answers to one prompt with --advantage group
    iterations: int = 40        # rounds of answering, scoring and learning
    episodes: int = 512         # answers an iteration, each used once
    minibatches: int = 8        # optimiser steps an iteration
    accumulate: int = 2         # micro-batches a minibatch
    prompts: int = 6000         # different prompts that the episodes are drawn from
    max_new_tokens: int = 100   # of an answer
    lr: float = 2e-4            # of AdamW: the policy's ...
    gain_lr: float = 0.04       # ... and of the gain of its last norm, in effect its temperature
    value_lr: float = 1e-3      # of the value model
    warmup: int = 10            # iterations from 0.1 of the peak learning rates to the peak
    beta: float = 0.1           # price of a nat of KL, in units of the score
    ptx_coef: float = 1.0       # γ: weight of the pretraining gradient; 0 makes the stage ppo_no_ptx
    ptx_tokens: int = 2048      # pretraining tokens an optimiser step ...
    ptx_window: int = 128       # ... in windows of so many
    gamma: float = 1.0          # discount: none
    lam: float = 0.95           # λ of GAE
    clip_ratio: float = 0.2     # ε of PPO's clipped policy loss
    clip_value: float = 0.2     # and of its clipped value loss
    ema: float = 0.992          # of the weights that are kept
    unfinished_score: float = -1.0      # replaces the score of an answer that does not end
    eval_every: int = 5         # iterations between two evaluations on held-out prompts
    eval_prompts: int = 270     # held-out prompts to measure on

@dataclass(frozen=True)
class SampleConfig(CommandConfig):  # using a trained model
    dtype: str = "fp32"         # no probe: for one answer it would not pay
    stage: str = ""             # base, sft, ppo ...; by default the furthest that the run has
    init: str = ""              # or GPT-2's published weights, without any training
    prompt: str = ""            # the instruction
    input: str = ""             # the text that it is about, if any
    num_samples: int = 1        # answers to the prompt
    max_new_tokens: int = 160   # of an answer
    temperature: float = 0.5    # 1: as the model believes; 0: always its first choice
    top_k: int = 0              # 0 = off
    top_p: float = 1.0          # 1 = off
    chat: bool = False          # a conversation
    execute: bool = False       # run the Python that it wrote, in the sandbox
    compare: bool = False       # all stages of the run answer, side by side: the prompt, or a few fixed ones
    rank: str = ""              # rank answers yourself; the rankings are appended to this JSONL file
    prompts: str = ""           # with --rank: a file of prompts whose answers are ranked
    export: str = ""            # write the model as GPT-2 is published, into this folder
    serve: bool = False         # with --rank: on a page in a browser of this machine, not at the keyboard

@dataclass(frozen=True)
class EvaluateConfig(CommandConfig):  # measuring the stages of a run
    per_category: int = 120     # test prompts of each category
    best_of: int = 4            # best-of-n of the SFT model by the reward model, up to this n; 1 = off
    full: bool = False          # over-optimisation, few-shot tasks, folds over labelers, a page, as well
    seeds: int = 1              # the whole recipe with so many seeds, what is missing of it

PRESETS = {"tiny": {},          # preset -> step -> what it changes; tiny: minutes on a laptop CPU
    "headline": {"sft": dict(n_embd=32, init_std=0.15, pretrain_steps=8000)},   # 0.12 M parameters
    "small": {"sft": dict(      # 11 M parameters: an hour of a GPU
        init_std=0.05, vocab_size=4096, block_size=512, n_layer=6, n_head=6, n_embd=384, pretrain_steps=5000,
        pretrain_batch=32_768, pretrain_lr=1e-3, pretrain_docs=20_000_000, demonstrations=60_000, lr=5e-4)},
    "gpt2": {"sft": dict(tokenizer="gpt2", lr=1e-4, matrix_lr=2e-4,     # GPT-2's shape, 124 M: own data, a GPU
        init_std=0.02, wave_std=0.0, block_size=1024, n_layer=12, n_head=12, n_embd=768, pretrain_steps=20_000,
        pretrain_batch=131_072, accumulate=4, pretrain_lr=6e-4, pretrain_docs=20_000_000, warmup=500),
        "reward": dict(lr=2e-5, matrix_lr=4e-5, likelihood=0.0),        # Ziegler et al. 2019; not tried here
        "ppo": dict(lr=1e-5, gain_lr=1e-4, value_lr=2e-5)}}
OWN_DATA = {"reward": dict(epochs=3, batch_prompts=8, likelihood=0.03, lr=1e-3, matrix_lr=2e-3, dpo_rate=0.05)}
CONFIGS = dict(sft=SFTConfig, reward=RewardConfig, ppo=PPOConfig, sample=SampleConfig, evaluate=EvaluateConfig)
ALLOWED = {     # field -> its words, or its least and greatest value; of other numbers by their type
    "config": (*PRESETS,), "tokenizer": ("bpe", "gpt2"), "advantage": ("gae", "group"), "best_of": (1, 64),
    "flash": ("auto", "yes", "no"), "objective": ("reward", "dpo"), "dtype": ("auto", "fp32", "bf16"),
    "unfinished_score": (-1e6, 1e6), "top_p": (1e-6, 1), "ptx_share": (0, 0.999_999), "ema": (0, 0.999_999),
    "group": (2, 64), "min_k": (2, 9), "max_k": (2, 9), int: (1, math.inf), float: (0, 1e6),
    **dict.fromkeys("threads steps seed warmup recital_steps top_k lora_rank".split(), (0, math.inf))}
NOT_ABOVE = {"min_k": "max_k", "minibatches": "episodes", "group": "episodes", "ptx_window": "ptx_tokens"}
YES_NO = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}

def nearest(word, words):
    """" Did you mean ...?", or nothing where no word is near."""
    return "".join(f" Did you mean {near}?" for near in difflib.get_close_matches(word, words, 1, 0.5))

def flag(name):
    """"pretrain_steps" -> "--pretrain-steps"; from_ is written so as `from` is a word of Python."""
    return "--" + name.rstrip("_").replace("_", "-")

def preset_of(folder):
    """The preset that the run in this folder was begun with, for its later steps; None where there is no run."""
    for stage in ("base", "sft") if folder else ():
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):      # not there, or damaged
            name = json.loads(Path(folder, f"{stage}.json").read_text(encoding="utf8"))["config"]["config"]
            return name if name in PRESETS else None

def parse(step, argv=None, description=""):
    """A step's command line -> (config, {field: where its value comes from}). UserError if it cannot work."""
    words, given = list(sys.argv[1:] if argv is None else argv), {}
    flags = {flag(field.name): field for field in fields(CONFIGS[step])}
    if "--help" in words or "-h" in words:
        about = {}      # what stands beside a field on this page; the step's own word after a base class's
        for kind in CONFIGS[step].__mro__[-2::-1]:
            about |= re.findall(r"^    (\w+): .*?# (.*)", inspect.getsource(kind), re.M)
        rows = [f"  {name:23}{f.type.__name__.upper():6}{about[f.name]}; default {f.default!r}"
                for name, f in flags.items()]
        print(description.strip(), "", *rows, sep="\n")
        sys.exit(0)
    while words:
        name, equals, value = words.pop(0).partition("=")
        field = flags.get(name.replace("_", "-"))       # --pretrain_steps will do
        if field is None:
            files = "" if name.startswith("-") else " Several files: one word with commas, or a glob in quotes."
            raise UserError(f"unknown argument {name}.{files or nearest(name, flags)} See python {step}.py --help")
        alone = not equals and (not words or words[0].startswith("--") and " " not in words[0])  # a flag next
        if alone and field.type is not bool:
            raise UserError(f"{name} needs a value")
        value = value if equals else "yes" if alone else words.pop(0)
        allowed = ALLOWED.get(field.name, ALLOWED.get(field.type))
        try:                            # what cannot work is said before anything is computed
            given[field.name] = found = YES_NO[value.lower()] if field.type is bool else field.type(value)
        except (ValueError, KeyError):
            raise UserError(f"{name} takes a value of type {field.type.__name__}, not {value!r}") from None
        if field.type is str and allowed and found not in allowed:
            raise UserError(f"{name} is one of {', '.join(allowed)}, not {found}.{nearest(found, allowed)}")
        if field.type in (int, float) and not allowed[0] <= found <= allowed[1]:
            raise UserError(f"{name} must be from {allowed[0]} to {allowed[1]}, not {found}")
    run = issubclass(CONFIGS[step], TrainConfig) and preset_of(given.get("out"))
    name = given.get("config") or run or ("gpt2" if given.get("init") else "tiny")
    own = OWN_DATA.get(step, {}) if given.get("data") else {}         # few rankings, other answers
    preset = {"config": name} | own | PRESETS[name].get(step, {})           # the preset's word weighs more
    config = CONFIGS[step](**preset | given)
    if isinstance(config, TrainConfig) and config.resume and config.fresh:
        raise UserError("--resume goes on and --fresh begins anew: give one of them")
    if isinstance(config, TrainConfig) and config.data_eval and not config.data:
        raise UserError("--data-eval measures what --data teaches: give both")
    if isinstance(config, SFTConfig) and config.n_embd % config.n_head:
        raise UserError(f"--n-embd {config.n_embd} does not divide into --n-head {config.n_head} equal heads")
    for less, more in NOT_ABOVE.items():
        if (a := getattr(config, less, 0)) > (b := getattr(config, more, 0)):       # not every step has them
            raise UserError(f"{flag(less)} {a} is more than {flag(more)} {b}")
    return config, {name: "command line" if name in given else "preset" if name in preset else "default"
                    for name in vars(config)}

def show(config, origin):
    """The resolved config, by where its values come from; of the defaults, what is off is left out."""
    page = textwrap.TextWrapper(110, "", " " * 10, break_long_words=False, break_on_hyphens=False)
    said = {source: [f"{name}={value}" for name, value in vars(config).items() if origin[name] == source
                     and (value or source != "default")] for source in ("command line", "preset", "default")}
    return "\n".join(page.fill(f"  {source}: {' '.join(words)}") for source, words in said.items() if words)
