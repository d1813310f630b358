"""How long a user waits: for help, for imports, for a first picture, for the first step of a training."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from img_minimal.bench.measure import Timing, in_turn, rows

ROOT = Path(__file__).parent.parent.parent


def commands(folder: str) -> dict[str, list[str]]:
    """Command lines by what they show; the first is what all others are compared with."""
    sample = ["sample.py", "--num-images", "1", "--output", f"{folder}/sample"]
    train = ["train.py", "--steps", "1", "--max-pairs", "200", "--eval-prompts", "0", "--cache-dir", "none",
             "--output-dir", f"{folder}/train", "--overwrite"]  # fmt: skip
    return {
        "python, nothing imported": ["-c", "pass"],
        "import torch": ["-c", "import torch"],
        "import torch, diffusers and transformers' parts that are used": ["-c", "import img_minimal.load"],
        "sample.py --help": ["sample.py", "--help"],
        "sample.py, one image of the twin": sample,
        "train.py, one step on 200 pairs": train,
    }


def startup_costs(rounds: int = 3, only: int | None = None) -> str:
    """Each command as a process of its own."""
    with TemporaryDirectory() as folder:

        def start(words: list[str]) -> None:
            """Run it; what it says is not of interest."""
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)

        lines = list(commands(folder).items())[:only]
        timings: dict[str, Timing] = in_turn({name: lambda w=words: start(w) for name, words in lines}, rounds)
    return rows("a command", timings)
