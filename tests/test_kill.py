"""kill -9 in steps 2 and 3 (0 and 1: test_sft.py), while the state is written; again; the weights of an undisturbed run."""
import shutil
import signal
import sys

import pytest
from conftest import killed_at, same_weights
from test_ppo import REWARD
from test_ppo import SMALL as PPO

FLAGS = {"reward": REWARD, "ppo": PPO}


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("script", FLAGS)
def test_killed_and_started_again(script, tiny_run, run, tmp_path):
    """Usual mistakes: the state is written over the old one; the generator of random numbers or the order of the batches
    is not restored; Adam's moments, the EMA or the value model begin anew."""
    undisturbed, folder = shutil.copytree(tiny_run.folder, tmp_path / "undisturbed"), tmp_path / "killed"
    if script == "ppo":
        assert run("reward", *FLAGS["reward"], "--out", undisturbed).code == 0
    shutil.copytree(undisturbed, folder)
    assert run(script, *FLAGS[script], "--out", undisturbed).code == 0
    died = killed_at(2, script, script, *FLAGS[script], "--out", folder)
    assert died.returncode == -signal.SIGKILL, died.stdout + died.stderr
    assert (folder / f"{script}.state").exists() and not (folder / f"{script}.pt").exists()
    done = killed_at(0, script, script, *FLAGS[script], "--out", folder)
    assert done.returncode == 0 and "going on after step 1 of" in done.stdout, done.stdout + done.stderr
    assert same_weights(undisturbed, folder, script)
    assert len({(at / f"{script}.jsonl").read_text().count("\n") for at in (undisturbed, folder)}) == 1
    assert not [*folder.glob("*.state")]
