"""Plumbing without an equation: device and dtype, optimiser, schedule, checkpoints and resume, metrics, progress.

A run is a folder. Each stage of it (base, sft, ...) leaves <stage>.pt (weights), <stage>.json (config, parent, versions,
seconds) and <stage>.jsonl (one object a step); while it trains, <stage>.state holds all that is needed to go on.

Resume is exact because a step depends on nothing but the weights, the optimiser and (seed, stage, step): the loop asks
for its batch by the step's number, and all random numbers are seeded anew at each step. So nothing else is saved, and a
run that was killed ends with the very weights of one that was not (same machine, same number of threads).
"""
import contextlib
import ctypes
import json
import math
import os
import platform
import resource
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from config import UserError
from data import Tokenizer
from model import GPT, GPTConfig, decay_groups

# ------------------------------------------------------------------------ machine


def pick_device(name):
    """"auto" or a device's name -> torch.device. UserError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} does not work here: {str(error).splitlines()[0]}") from None
    return device


def probe_gemm(device, dtype, seconds=0.02):
    """GFLOP/s of a product of this model family's size: one warm-up, then as many as fit into the time."""
    a, b = torch.randn(1024, 256, device=device, dtype=dtype), torch.randn(256, 1024, device=device, dtype=dtype)
    (a @ b).sum().item()
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        (a @ b).sum().item()
        n += 1
    return n * 2 * 1024 * 256 * 1024 / (time.perf_counter() - start) / 1e9


def pick_dtype(name, device):
    """"auto", "fp32" or "bf16" -> (torch.dtype, why). auto: bf16 where its products are 1.5 times as fast."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[name], "as asked"
    if device.type == "mps":
        return torch.float32, "the default on mps"
    fp32, bf16 = (probe_gemm(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    chosen = torch.bfloat16 if bf16 > 1.5 * fp32 else torch.float32
    return chosen, f"probe: fp32 {fp32:.0f}, bf16 {bf16:.0f} GFLOP/s"


def set_up_cpu(n):
    """The number of CPU threads; by default as many as this process may use (a container may give fewer than exist)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(n or min(cores, torch.get_num_threads()))
    keep_memory()
    return torch.get_num_threads()


def keep_memory():
    """Tell glibc to keep freed memory instead of returning it to the kernel at every step.

    A step allocates the same large tensors again and again; fetching and zeroing their pages anew costs as much as a
    third of it (`tiny`, bf16, two cores: 26.6k tokens/s without this line, 42.0k with it).
    """
    with contextlib.suppress(OSError, AttributeError):              # macOS and musl have no mallopt
        libc, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = ctypes.CDLL(None), -1, -3
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def autocast(device, dtype):
    """Forward passes in bf16, weights and optimiser in fp32; nothing where dtype is fp32."""
    return torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()


def memory():
    """The most memory this process has used, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


# ------------------------------------------------------------------------ optimiser

def cosine(step, steps, warmup, floor=0.1):
    """The learning rate of a step as a fraction of its peak: linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def set_lr(optimizers, fraction):
    """Every learning rate to this fraction of its peak -> the first one."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = fraction * group.setdefault("peak", group["lr"])
    return optimizers[0].param_groups[0]["lr"]


def adamw(groups, lr):
    """AdamW with the moments of GPT-3 and InstructGPT, β = (0.9, 0.95)."""
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def muon_and_adamw(model, matrix_lr, lr, weight_decay):
    """Muon (Jordan 2024) for the blocks' matrices, AdamW for embeddings, norms and biases -> [adamw, muon].

    Muon steps by (about) the nearest orthogonal matrix to the momentum, so that a rare direction learns as fast as a common
    one: random lists of 128 words, repeated, are copied after 250 steps, which AdamW had not begun to do after 400.
    """
    blocks = {id(p) for p in model.h.parameters() if p.dim() == 2}
    groups = [{**g, "params": [p for p in g["params"] if id(p) not in blocks]} for g in decay_groups(model, weight_decay)]
    matrices = [p for p in model.parameters() if id(p) in blocks]
    return [adamw(groups, lr), torch.optim.Muon(matrices, lr=matrix_lr, momentum=0.95, weight_decay=weight_decay,
                                                      ns_steps=3)]


# ------------------------------------------------------------------------ files

def save_atomically(value, path):
    """Write beside, then rename: whenever the power goes, the file is whole, the old one or the new one.

    value: tensors and plain values for torch.save, or one NumPy array for a .npy file.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            np.save(file, value) if isinstance(value, np.ndarray) else torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}. Choose another folder with --out") from None
    except RuntimeError as error:       # torch's zip writer wraps a full disk in this
        beside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]} (is the disk full?)") from None


def save_json(value, path):
    """What a person wants to read, written beside and then renamed."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf8")
    os.replace(beside, path)


def load(path, device="cpu"):
    """A file of tensors; weights_only: it cannot run code. UserError where it is broken."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}). "
                        "Remove it, and run its step again.") from None


def run_path(config):
    """Where the run is: --out, or runs/<config>, or with own data runs/<config>-<file stem>."""
    return Path(config.out or Path("runs") / (config.config + (f"-{Path(config.data).stem}" if config.data else "")))


def run_folder(config):
    """The folder of the run, made and proved writable before anything is computed."""
    folder = run_path(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"\0" * 65536)
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}. Choose another folder with --out") from None
    if config.resume and not list(folder.glob("*.state")):
        raise UserError(f"nothing to resume: {folder} holds no interrupted run. Run it without --resume")
    return folder


# ------------------------------------------------------------------------ what the user sees

_line, _last = 0, 0.0       # how many characters of a progress line stand on the terminal; when the last one was shown


def say(text=""):
    """One line that stays."""
    global _line
    if _line:
        sys.stdout.write("\r" + " " * _line + "\r")
        _line = 0
    print(text, flush=True)


def progress(text):
    """One line that the next one replaces; where the output is no terminal, now and then a line like any other."""
    global _line, _last
    if not sys.stdout.isatty():
        if time.perf_counter() - _last > 5:
            _last = time.perf_counter()
            print(text, flush=True)
        return
    sys.stdout.write("\r" + text.ljust(_line))
    sys.stdout.flush()
    _line = len(text)


def clock(seconds):
    """75 -> "1:15"; 4000 -> "1:06:40"."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def command(main):
    """Runs a script's main: a UserError is one line and exit code 2, Ctrl-C a line that says how to go on."""
    try:
        main()
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)
    except BrokenPipeError:                     # python sample.py ... | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:                    # a full disk, say
        say(f"error: {error.filename or 'a file'}: {error.strerror}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("interrupted. The last state is kept: the same command goes on from there.")
        sys.exit(130)


# ------------------------------------------------------------------------ a stage

def seed_of(*parts):
    """A seed from (seed, stage, step, ...): the same in every process."""
    return zlib.crc32(" ".join(map(str, parts)).encode())


def fingerprint(config):
    """What must agree for a run to go on with its result unchanged."""
    return {k: v for k, v in asdict(config).items() if k not in ("resume", "fresh", "out")}


class Stage:
    """The files, the step numbers and the progress line of one stage. The loop itself stays in the script:

        stage = Stage(folder, "base", config, steps, model=model, optimizer=optimizer)
        for step in stage:                  # goes on where an interrupted run stopped
            ...
            stage.log(tokens=n, loss=loss)  # one object in base.jsonl
        stage.finish(model)                 # base.pt, base.json

    parts: whatever has state_dict() and load_state_dict() and changes from step to step.
    """
    SAVE_EVERY = 15.0                       # seconds between two states; one costs milliseconds at `tiny`

    def __init__(self, folder, name, config, steps, **parts):
        self.name, self.config, self.steps, self.parts = name, config, steps, parts
        self.folder, self.rows, self.step, self.seconds, self.tokens = Path(folder), [], 0, 0.0, 0
        self.state_path, self.log_path = self.folder / f"{name}.state", self.folder / f"{name}.jsonl"
        if config.fresh:
            self.state_path.unlink(missing_ok=True)
        if self.state_path.exists():
            self._resume()
        else:
            self.log_path.write_text("")
        self.first, self.began = self.step, time.perf_counter()
        self.saved, self.shown = self.began, 0.0

    def _resume(self):
        state = load(self.state_path)
        mine = fingerprint(self.config)
        if state["config"] != mine:
            changed = [key for key in mine if state["config"].get(key) != mine[key]]
            raise UserError(f"{self.state_path} belongs to an interrupted run with another {', '.join(changed)}. Go on "
                            "with the same values, or begin anew with --fresh")
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.step, self.seconds = state["step"], state["seconds"]
        rows = self.log_path.read_text(encoding="utf8").splitlines() if self.log_path.exists() else []
        rows = [row for row in rows if row.endswith("}") and json.loads(row)["step"] <= self.step]
        self.log_path.write_text("".join(row + "\n" for row in rows), encoding="utf8")
        say(f"  {self.name}: an interrupted run is there; going on after step {self.step} of {self.steps}")

    def __iter__(self):
        """The numbers of the steps that remain, 0-based; all random numbers are seeded anew at each."""
        for step in range(self.step, self.steps):
            torch.manual_seed(seed_of(self.config.seed, self.name, step))
            yield step
            self.step = step + 1
            if time.perf_counter() - self.saved > self.SAVE_EVERY and self.step < self.steps:
                self.save()

    def elapsed(self):
        """Seconds of work so far, those before an interruption included."""
        return self.seconds + time.perf_counter() - self.began

    def save(self):
        self._write_rows()
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        save_atomically({"parts": parts, "step": self.step, "seconds": self.elapsed(),
                         "config": fingerprint(self.config)}, self.state_path)
        self.saved = time.perf_counter()

    def update(self, optimizers, loss, clip):
        """Clip the accumulated gradient and step -> its norm. UserError where the loss or the norm is not finite."""
        params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(params, clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._write_rows()
            kept = f"the last good state is {self.state_path}" if self.state_path.exists() else "no state was saved yet"
            raise UserError(f"{self.name}, step {self.step + 1}: the loss is {loss}, the gradient's norm {norm}; {kept}. "
                            "Try a lower learning rate, or --dtype fp32")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def log(self, tokens=0, **metrics):
        """The current step's row, and the progress line. tokens: how many were trained on."""
        self.tokens += tokens
        self.rows.append({"step": self.step + 1, **metrics})
        now, done = time.perf_counter(), self.step + 1 - self.first
        if now - self.shown > (0.5 if sys.stdout.isatty() else 15.0) or self.step + 1 == self.steps:
            self.shown, spent = now, now - self.began
            shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name != "lr")
            progress(f"  {self.name} {self.step + 1}/{self.steps}  {shown}  {self.tokens / spent:,.0f} tokens/s  "
                     f"{memory():.2f} GB  {clock(spent / done * (self.steps - self.step - 1))} left")

    def _write_rows(self):
        with open(self.log_path, "a", encoding="utf8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)
        self.rows = []

    def finish(self, weights, **facts):
        """<stage>.pt with the weights, <stage>.json with the facts; then the state has served."""
        self._write_rows()
        save_atomically(weights, self.folder / f"{self.name}.pt")
        facts = {"config": asdict(self.config), **facts, "steps": self.steps, "seconds": round(self.elapsed(), 1),
                 "versions": {"python": platform.python_version(), "torch": torch.__version__}}
        save_json(facts, self.folder / f"{self.name}.json")
        self.state_path.unlink(missing_ok=True)


# ------------------------------------------------------------------------ models of a run

def build(config, vocab_size):
    """A fresh GPT of the config's shape, its weights drawn from the config's seed."""
    torch.manual_seed(seed_of(config.seed, "init"))
    flash = {"auto": None, "yes": True, "no": False}[config.flash]
    return GPT(GPTConfig(vocab_size, config.block_size, config.n_layer, config.n_head, config.n_embd, flash=flash,
                         init_std=config.init_std, wave_std=config.wave_std))


def finished(folder, stage):
    """Is this stage of the run complete?"""
    return (Path(folder) / f"{stage}.pt").exists() and (Path(folder) / f"{stage}.json").exists()


def load_model(folder, stage, device="cpu"):
    """The model of a finished stage -> (GPT, Tokenizer, what <stage>.json says)."""
    folder = Path(folder)
    try:
        facts = json.loads((folder / f"{stage}.json").read_text(encoding="utf8"))
    except (OSError, ValueError):
        step = "sft" if stage == "base" else stage
        raise UserError(f"{folder} has no finished {stage}. Make it first: python {step}.py") from None
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    model = GPT(GPTConfig(**facts["model"])).to(device)
    model.load_state_dict(load(folder / f"{stage}.pt", device))
    return model, tokenizer, facts
