"""What the experiments of this folder share: a way to run the project's commands, one after the other."""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def python(*words):
    """`python words` in the project's folder; where it fails the experiment stops, to go on from there another time."""
    words = [*map(str, words)]
    print("\n$ python " + " ".join(words), flush=True)
    if subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
        sys.exit(f"error: python {' '.join(words)} failed. The same command goes on from there")
