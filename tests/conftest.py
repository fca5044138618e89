"""What several tests share: one tiny run of sft.py, a way to run a command, and what must not depend on the process."""
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))       # so that plain `pytest` works too
import config  # noqa: E402, F401   before torch: see there

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(2)

# A whole run of sft.py in seconds: too small to learn anything, big enough to go through every line.
TINY = ("--dtype fp32 --threads 2 --n-layer 1 --n-embd 32 --n-head 2 --vocab-size 400 --warmup 3 --eval-every 100 "
        "--pretrain-steps 12 --recital-steps 4 --pretrain-batch 1024 --pretrain-docs 20000 --demonstrations 200 --epochs 2 "
        "--batch-size 32").split()


def run_command(script, *args, stdin=""):
    """`python script.py args` in this process -> its exit code, and all that it printed. script: a name, or a module."""
    import training
    module, out = __import__(script) if isinstance(script, str) else script, io.StringIO()
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = [f"{module.__name__}.py", *map(str, args)], io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                training.command(module.main)
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
    finally:
        sys.argv, sys.stdin = before
    return SimpleNamespace(code=code, out=out.getvalue())


def subprocess_of(code, *args, **environment):
    """`python -c code args` in the repository -> the finished process."""
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "PYTHONIOENCODING": "utf8", **environment})


# The process kills itself at its n-th state of a stage: the new file is half there, the old one not replaced. No handler runs.
KILLED = """
import os, signal, sys
script, stage, nth = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
import config, training
replace, count = os.replace, 0
def dying(beside, path):
    global count
    count += str(path).endswith(stage + ".state")
    if nth and count == nth:
        os.truncate(beside, 99)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(beside, path)
training.Stage.SAVE_EVERY, os.replace = 0.0, dying
training.command(__import__(script).main)
"""


def killed_at(nth, script, stage, *args):
    """`python script.py args`, which a kill -9 ends while it writes the stage's nth state (0: which lives) -> the process."""
    return subprocess_of(KILLED, script, stage, nth, *args)


def same_weights(one, other, stage):
    """Have both runs the same weights of a stage, bit by bit?"""
    a, b = (torch.load(folder / f"{stage}.pt", weights_only=True) for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def benchmark(name):
    """A file of benchmarks/ as a module."""
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.fixture(scope="session")
def run():
    return run_command


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """One undisturbed run of sft.py, and every batch that it learnt from: .steps["base"], .steps["sft"]."""
    import sft
    folder, calls, accumulate = tmp_path_factory.mktemp("run"), [], sft.accumulate

    def recording(model, batches, *rest):
        calls.append([tuple(None if x is None else x.clone() for x in batch) for batch in batches])
        return accumulate(model, batches, *rest)

    sft.accumulate = recording
    try:
        finished = run_command("sft", *TINY, "--out", folder)
    finally:
        sft.accumulate = accumulate
    assert finished.code == 0, finished.out
    return SimpleNamespace(folder=folder, flags=TINY, out=finished.out, steps={"base": calls[:12], "sft": calls[12:]})


def digests():
    """A hash of everything that a seed must fix, whatever process it is made in."""
    import data
    import world

    def digest(value):
        return hashlib.sha256(repr(value).encode()).hexdigest()[:16]

    texts = list(islice(world.documents(1), 300))
    return {"tasks": digest(world.tasks(300, "train", 2)), "documents": digest(texts),
            "demonstrations": digest(world.demonstrations(300, "train", 3)),
            "bpe": digest(list(data.train_bpe(texts, 400).items())),
            "epoch_batches": digest(data.epoch_batches([i % 17 for i in range(101)], 8, (1, 0)))}


@pytest.fixture(scope="session")
def other_process():
    """The digests as a process with another hash seed finds them."""
    code = "import sys; sys.path.insert(0, 'tests'); import conftest, json; print(json.dumps(conftest.digests()))"
    found = subprocess_of(code, PYTHONHASHSEED="4711")
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)
