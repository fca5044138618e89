"""kill -9 in steps 2 and 3 (0 and 1: test_sft.py), while the state is written; again; the weights of an undisturbed run."""
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_ppo import REWARD
from test_ppo import SMALL as PPO

# The process kills itself at its n-th state: the new file is half there, the old one not replaced. No handler runs.
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import config, training, {script}
training.Stage.SAVE_EVERY, seen, replace = 0.0, [], os.replace
def dying(source, target):
    if str(target).endswith("{script}.state"):
        seen.append(target)
        if len(seen) == {n}:
            os.truncate(source, 99)
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = dying
sys.argv = sys.argv[1:]
training.command({script}.main)
"""


FLAGS = {"reward": REWARD, "ppo": PPO}


def start(script, folder, n=0):
    """The script as a process that dies at its n-th state; 0: that lives."""
    words = [f"{script}.py", *FLAGS[script], "--out", str(folder)]
    code = KILLED.format(root=str(ROOT), script=script, n=n)
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("script, n", [("reward", 2), ("ppo", 2)])
def test_killed_and_started_again(script, n, tiny_run, run, tmp_path):
    """Usual mistakes: the state is written over the old one; the generator of random numbers or the order of the batches
    is not restored; Adam's moments, the EMA or the value model begin anew."""
    undisturbed, folder = shutil.copytree(tiny_run.folder, tmp_path / "undisturbed"), tmp_path / "killed"
    if script == "ppo":
        assert run("reward", *FLAGS["reward"], "--out", undisturbed).code == 0
    shutil.copytree(undisturbed, folder)
    assert run(script, *FLAGS[script], "--out", undisturbed).code == 0
    died = start(script, folder, n)
    assert died.returncode == -signal.SIGKILL, died.stdout + died.stderr
    assert (folder / f"{script}.state").exists() and not (folder / f"{script}.pt").exists()
    done = start(script, folder)
    assert done.returncode == 0 and "going on after step 1 of" in done.stdout, done.stdout + done.stderr
    a, b = (torch.load(at / f"{script}.pt", weights_only=True) for at in (undisturbed, folder))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert len({(at / f"{script}.jsonl").read_text().count("\n") for at in (undisturbed, folder)}) == 1
    assert not [*folder.glob("*.state")]
