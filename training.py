"""Plumbing without an equation: device and dtype, optimiser, schedule, checkpoints and resume, progress.

A run is a folder. Each stage of it (base, sft, ...) leaves <stage>.pt (weights), <stage>.json (config, time)
and <stage>.jsonl (an object a step); while it trains, <stage>.state holds all that is needed to go on. Resume
is exact (same machine and threads): a step depends on weights, optimiser and (seed, stage, step) alone."""
import collections, contextlib, ctypes, dataclasses, datetime, functools, json, math, os, re, resource, sys, time
import timeit, zlib
from pathlib import Path
import numpy as np
import torch
from config import YES_NO, UserError, parse, show
from data import Tokenizer, checksum, encode_prompt
from model import GPT, GPTConfig, generate, learnt, load_gpt2, merge_lora

Answer = collections.namedtuple("Answer", "ids text ended")     # ended: by itself, not by the limit or the context
adamw = functools.partial(torch.optim.AdamW, betas=(0.9, 0.95), eps=1e-8, fused=True)     # β as in InstructGPT
MADE_BY = {"base": "sft.py", "sft": "sft.py", "dpo": "reward.py --objective dpo",    # stage -> command, in order
           "grpo": "ppo.py --advantage group", "ppo_no_ptx": "ppo.py --ptx-coef 0", "ppo": "ppo.py"}
PARENT = {"base": "", "sft": "base"}        # the stage that a stage starts from; of all others it is sft

def pick_device(name):
    """"auto" or a device's name -> torch.device. UserError where it is not there."""
    try:
        auto = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        return torch.zeros(1, device=auto if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} does not work here: {str(error).splitlines()[0]}") from None

def pick_dtype(name, device):
    """"auto", "fp32" or "bf16" -> (torch.dtype, why). auto: bf16 where its products are 1.5 times as fast."""
    if name != "auto" or device.type == "mps":
        return torch.bfloat16 if name == "bf16" else torch.float32, "as asked" if name != "auto" else "mps"
    def speed(dtype):                           # GFLOP/s of a product of this model family's size
        a, b = (torch.randn(shape, device=device, dtype=dtype) for shape in ((1024, 256), (256, 1024)))
        return 2 * 1024 * 256 * 1024e-9 / min(timeit.repeat(lambda: (a @ b).sum().item(), number=1, repeat=8))
    a, b = speed(torch.float32), speed(torch.bfloat16)
    return torch.bfloat16 if b > 1.5 * a else torch.float32, f"probe: fp32 {a:.0f}, bf16 {b:.0f} GFLOP/s"

def compute(config):
    """-> (device, autocast, both in words). In bf16 are the forward passes alone: weights, optimiser stay fp32."""
    torch.set_num_threads(config.threads or torch.get_num_threads())    # by default what OpenMP finds
    # glibc is to keep freed memory: zeroed pages cost a third of a step (`tiny`, bf16: 26.6k, not 42.0k tokens/s)
    with contextlib.suppress(OSError, AttributeError):              # macOS and musl have no mallopt
        for option, size in ((-3, 1 << 30), (-1, (1 << 31) - 1)):   # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, size)
    device = pick_device(config.device)
    dtype, why = pick_dtype(config.dtype, device)
    cast = torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)
    return device, cast, f"{device} with {torch.get_num_threads()} threads, {str(dtype).split('.')[1]} ({why})"

def begin(step, description):
    """What every training command does first -> (when it began, config, folder, device, autocast); says them."""
    started, (config, origin) = time.perf_counter(), parse(step, description=description)
    folder, (device, cast, found) = run_folder(config), compute(config)
    dtype = "bf16" if cast.fast_dtype == torch.bfloat16 else "fp32"         # as found: with it alone a run goes on
    config = dataclasses.replace(config, dtype=dtype, threads=torch.get_num_threads())
    say(f"{step}.py: config {config.config}, run {folder}, {found}\n" + show(config, origin))
    return started, config, folder, device, cast

def cosine(step, steps, warmup, floor=0.1):
    """The learning rate of a step as a fraction of its peak: linear warm-up, then a cosine to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

def set_lr(optimizers, fraction):
    """Every learning rate to this fraction of its peak -> the first one."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = fraction * group.setdefault("peak", group["lr"])
    return optimizers[0].param_groups[0]["lr"]

def muon_and_adamw(model, matrix_lr, lr, weight_decay):
    """AdamW for embeddings, norms and biases, Muon (Jordan 2024) for the blocks' matrices -> [adamw, muon].
    Muon steps by (about) the nearest orthogonal matrix to the momentum: a rare direction learns as fast as a
    common one. Random lists of 128 words, repeated, are copied after 250 steps, by AdamW not after 400."""
    matrices = [p for name, p in model.named_parameters() if "h." in name and p.dim() == 2]
    others = [p for name, p in model.named_parameters() if not ("h." in name and p.dim() == 2)]
    groups = [{"params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0}]  # norms, biases (RECIPE A8)
    muon = torch.optim.Muon(matrices, lr=matrix_lr, momentum=0.95, weight_decay=weight_decay, ns_steps=3)
    return [adamw(groups, lr=lr), muon]

# ------------------------------------------------------------------------ files, and what the user sees
def save_atomically(value, path):
    """Write beside, then rename: whenever the power goes, the file is whole, the old one or the new one.
    By the name's ending: .json, .jsonl (a list of rows), .pt and .state (by torch.save); else a str, or arrays."""
    path, beside = Path(path), Path(f"{path}.tmp")
    if path.suffix in (".json", ".jsonl"):
        rows, indent = ([value], 1) if path.suffix == ".json" else (value, None)
        value = "".join(json.dumps(row, indent=indent, ensure_ascii=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            parts = [value.encode()] if isinstance(value, str) else value
            torch.save(value, file) if path.suffix in (".pt", ".state") else file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:    # torch's zip writer wraps a full disk in a RuntimeError
        with contextlib.suppress(OSError):
            beside.unlink()
        why = getattr(error, "strerror", None) or str(error).partition("\n")[0] + " (is the disk full?)"
        raise UserError(f"cannot write to {path}: {why}. --out names another folder") from None

def load(path, device="cpu"):
    """A file of tensors; weights_only: it cannot run code. UserError where it is broken."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise UserError(f"cannot read {path}: {type(error).__name__}. Remove it, repeat its step") from None

def run_path(config):
    """Where the run is: --out, or runs/<config>, or with own data runs/<config>-<stem of its first file>."""
    own = config.data or getattr(config, "init", "")
    stem = re.sub(r"[^\w.-]+", "-", Path(own.split(",")[0].removesuffix(".gz")).stem).strip("-.") or "data"
    return Path(config.out or f"runs/{config.config}" + (f"-{stem}" if own else ""))

def run_folder(config):
    """The folder of the run, made and proved writable before anything is computed."""
    folder = run_path(config)
    save_atomically(" " * 65536, probe := folder / ".writable")
    probe.unlink()
    if config.resume and not list(folder.glob("*.state")):
        raise UserError(f"nothing to resume: {folder} holds no interrupted run. Run it without --resume")
    return folder

def say(text, end="\n"):
    """One line that stays."""
    print("\r\x1b[K" * sys.stdout.isatty() + text, end=end, flush=True)

def progress(text, always=False):
    """One line that the next one replaces; in a file, a line like others every ten seconds."""
    now, terminal = time.perf_counter(), sys.stdout.isatty()
    if terminal or always or now - getattr(progress, "shown", -99) > 10:
        say(text, end="" if terminal else "\n")
        progress.shown = now

def clock(seconds):
    """75 -> "1:15"; 4000 -> "1:06:40"."""
    return re.sub("^0:0?", "", str(datetime.timedelta(seconds=int(seconds))))

def command(main):
    """Runs a script's main: what the user can mend is one line, Ctrl-C a line that says how to go on."""
    try:
        main()
    except BrokenPipeError:                     # python sample.py ... | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        say("interrupted. Without --fresh the same command goes on from the last state; every 15 s one is kept.")
        sys.exit(130)
    except (UserError, OSError) as error:       # OSError: a full disk, say
        file = f"{error.filename or 'a file'}: {error.strerror}" if isinstance(error, OSError) else ""
        say(f"error: {file or error}")
        sys.exit(2)

# ------------------------------------------------------------------------ a stage, and the model it leaves
def seed_of(*parts):
    """A seed from (seed, stage, step, ...): the same in every process."""
    return zlib.crc32(" ".join(map(str, parts)).encode())

class Stage:
    """The files, step numbers, progress line of a stage. The loop stays in the script: `for step in stage` goes on
    where an interrupted run stopped. parts: all that has a state_dict and changes; history: the rows so far."""
    SAVE_EVERY = 15.0                       # seconds between two states; one costs milliseconds at `tiny`

    def __init__(self, folder, name, config, steps, **parts):
        self.name, self.config, self.steps, self.parts = name, config, steps, parts
        self.path, self.state_path = f"{folder}/{name}", Path(f"{folder}/{name}.state")
        self.began = self.saved = time.perf_counter()
        self.step, self.tokens, self.history = 0, 0, []
        self.made_of, self.content = made_of(folder, name), checksum(config.files)
        self.pinned = {k: v for k, v in vars(config).items() if k not in ("resume", "fresh", "out")} | {
            "tokenizer or earlier step": self.made_of, "content of --data": self.content}
        if config.fresh:
            self.state_path.unlink(missing_ok=True)
        if self.state_path.exists():
            state = load(self.state_path)
            if changed := [k for k, v in self.pinned.items() if state["config"].get(k) != v]:
                raise UserError(f"{self.state_path}: interrupted with another {', '.join(changed)}. "
                                "Go on with the same values, or begin anew with --fresh")
            for part in parts:
                parts[part].load_state_dict(state["parts"][part])
            self.step, self.tokens, self.history = state["step"], state["tokens"], state["history"]
            self.began -= state["seconds"]
            say(f"  {name}: an interrupted run is there; going on after step {self.step} of {steps}")

    def __iter__(self):
        """The numbers of the steps that remain, 0-based; all random numbers are seeded anew at each."""
        for step in range(self.step, self.steps):
            torch.manual_seed(seed_of(self.config.seed, self.name, step))
            yield step
            self.step = step + 1
            if time.perf_counter() - self.saved > self.SAVE_EVERY and self.step < self.steps:
                self.save()

    def save(self):
        save_atomically(self.history, f"{self.path}.jsonl")
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        save_atomically({"parts": parts, "step": self.step, "tokens": self.tokens, "history": self.history,
                         "seconds": time.perf_counter() - self.began, "config": self.pinned}, self.state_path)
        self.saved = time.perf_counter()

    def update(self, optimizers, loss, clip):
        """Clip the accumulated gradient and step -> its norm. UserError where loss or norm is not finite."""
        params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(params, clip).item()
        if not math.isfinite(loss + norm):
            raise UserError(f"{self.name}, step {self.step + 1}: loss {loss}, gradient's norm {norm}. "
                            f"Try a lower learning rate or --dtype fp32. Last good state: {self.state_path}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return norm

    def log(self, tokens=0, shown=None, **metrics):
        """The current step's row, and the line of progress, which shows the metrics named `shown`, or all."""
        self.tokens += tokens
        self.history.append({"step": self.step + 1, **metrics})
        done, spent = self.step + 1, time.perf_counter() - self.began
        found = "  ".join(f"{k} {metrics[k]:.3f}" for k in shown or metrics if k in metrics and k != "lr")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
        progress(f"  {self.name} {done}/{self.steps}  {found}  {self.tokens / spent:,.0f} tokens/s  "
                 f"{peak:.2f} GB  {clock(spent / done * (self.steps - done))} left", done in (1, self.steps))

    def finish(self, trained, **facts):
        """<stage>.pt: the weights, <stage>.json: the facts; then the state has served. <stage>.lora.pt: adapters
        alone, kilobytes; in <stage>.pt they are merged, so that each stage is a plain model."""
        save_atomically(self.history, f"{self.path}.jsonl")
        Path(f"{self.path}.lora.pt").unlink(missing_ok=True)        # of an earlier time
        if len(adapters := learnt(trained)) < len(trained.state_dict()):
            save_atomically(adapters, f"{self.path}.lora.pt")
        save_atomically(merge_lora(trained).state_dict(), f"{self.path}.pt")
        facts |= {"weights": zlib.crc32(np.memmap(f"{self.path}.pt", np.uint8, "r")), "made_of": self.made_of,
                  "content": self.content, "parent": PARENT.get(self.name, "sft"), "steps": self.steps,
                  "seconds": round(time.perf_counter() - self.began, 1),
                  "versions": {"python": sys.version.split()[0], "torch": torch.__version__}}
        save_atomically({"config": vars(self.config)} | facts, f"{self.path}.json")
        self.state_path.unlink(missing_ok=True)

def build(config, vocab_size):
    """A fresh GPT of the config's shape, its weights drawn from the config's seed."""
    torch.manual_seed(seed_of(config.seed, "init"))
    shape = {name: value for name, value in vars(config).items() if name in GPTConfig.__annotations__}
    return GPT(GPTConfig(**shape | {"vocab_size": vocab_size, "flash": YES_NO.get(config.flash)}))

def made_of(folder, stage):
    """Checksums of what a stage of this run is made of now: its tokenizer, its parent -> {name: number}"""
    tokenizer, parent = Path(folder, "tokenizer.json"), Path(folder, PARENT.get(stage, "sft") + ".json")
    found = {"tokenizer": zlib.crc32(tokenizer.read_bytes())} if tokenizer.exists() else {}
    return found | ({parent.stem: json.loads(parent.read_bytes()).get("weights")} if parent.exists() else {})

def finished(folder, stage):
    """Is this stage of the run complete, and are the tokenizer and its parent still those that it was made of?"""
    if not all(Path(folder, f"{stage}.{ending}").exists() for ending in ("pt", "json")):
        return False
    with contextlib.suppress(ValueError, LookupError, TypeError):       # damaged: load_model says so
        before = json.loads(Path(folder, f"{stage}.json").read_bytes())["made_of"]
        return before.items() >= {k: v for k, v in made_of(folder, stage).items() if k in before}.items()
    return True

def load_model(folder, stage, device="cpu"):
    """The model of a finished stage -> (GPT, Tokenizer, what <stage>.json says)."""
    script, path = MADE_BY.get(stage), Path(folder, f"{stage}.json")
    if not script or not finished(folder, stage):
        remedy = f"Make it first: python {script} --out {folder}" if script else f"Stages: {', '.join(MADE_BY)}"
        raise UserError(f"{folder} has no finished {stage}{', up to date' * path.exists()}. {remedy}")
    try:
        facts = json.loads(path.read_text(encoding="utf8"))
        model = GPT(GPTConfig(**facts["model"]))
        model.load_state_dict(load(path.with_suffix(".pt")))
    except (ValueError, LookupError, TypeError, ArithmeticError, RuntimeError):
        raise UserError(f"{path} is damaged. Remove it, then: python {script}") from None
    return model.to(device), Tokenizer.load(path.with_name("tokenizer.json")), facts

def load_sft(config, folder, device):
    """What steps 2 and 3 start from, as load_model gives it. With --init a new run gets GPT-2 as its stage sft."""
    if config.init and not finished(folder, "sft") and not any(folder.glob("base.*")):
        tokenizer = Tokenizer.published(config.init)
        model = load_gpt2(config.init, tokenizer.size)
        say(f"{config.init}, {model.num_params():,} parameters, instead of steps 0 and 1")
        tokenizer.save(folder / "tokenizer.json")
        Stage(folder, "sft", config, 0).finish(model, model=vars(model.config))
    model, tokenizer, facts = load_model(folder, "sft", device)
    if config.init not in ("", facts["config"].get("init")):
        raise UserError(f"{folder} has an SFT model that is not {config.init}. Name another --out, or no --init")
    return model, tokenizer, facts

def that_fit(tokenizer, records, size):
    """The records whose question leaves room for an answer; the others are counted. UserError where none does."""
    fitting = [record for record in records if len(encode_prompt(tokenizer, *record[:3])) < size]
    if dropped := len(records) - len(fitting):
        say(f"  {dropped} of {len(records)} prompts leave no room for an answer in {size} tokens: left out")
    if not fitting:
        raise UserError(f"no prompt leaves room for an answer in {size} tokens: sft.py --block-size makes more")
    return fitting

def respond(model, tokenizer, prompts, max_new_tokens, temperature, seed, cast, batch_size=256, **options):
    """One Answer to each prompt, short ones first: little padding. options: others of model.generate."""
    options |= {"generator": torch.Generator(model.wte.weight.device).manual_seed(seed), "eos": tokenizer.end}
    order, found = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}
    for part in (order[start:start + batch_size] for start in range(0, len(order), batch_size)):
        cut = [prompts[i][1 - model.config.block_size:] for i in part]    # too long: the beginning goes
        with cast:
            found |= zip(part, generate(model, cut, max_new_tokens, temperature=temperature, **options).responses)
    return [Answer(ids, tokenizer.decode(ids), ids[-1:] == [tokenizer.end]) for _, ids in sorted(found.items())]
