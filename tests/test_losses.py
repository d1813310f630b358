"""The losses of the default training are those that were committed, for either optimizer.

A slip in the loss, the refresh, an optimizer or the schedule shows as another loss. After a change
that is meant to move them, write them anew: python tests/test_losses.py
"""

import json
import platform
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from feature_sets import Data

import train as script
from img_minimal.backbone import open_image_prompt
from img_minimal.data.features import Features
from img_minimal.data.pairs import pair_stream
from img_minimal.devices import Precision
from img_minimal.plots import read_rows
from img_minimal.presets import find_preset
from img_minimal.run import Run

COMMITTED = Path(__file__).parent / "losses.json"
# A fast AdamW would enlarge rounding errors, and other computers could not be held to 1e-4.
RATES = {"muon": 2e-3, "adamw": 1e-4}
PAIRS, STEPS, LENGTH, WIDTH = 16, 100, 12, 160


def kind_of_computer() -> list[str]:
    """Describe what the bits of a result depend on, with one thread."""
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in lines.splitlines() if "model name" in line]
    capability = torch.backends.cpu.get_cpu_capability()
    return [torch.__version__, capability, platform.machine(), *names[:1]]


def some_pairs() -> Data:
    """Encode the first pairs that are shipped; their guidance is random."""
    preset = find_preset("tiny-sdxl")
    [chunk] = pair_stream(preset.data.pairs, limit=PAIRS).chunks()
    encoder = open_image_prompt(preset.backbone, preset.models)
    winner, loser = (
        encoder.tokens([getattr(pair, side) for pair in chunk.items]).float()
        for side in ("winner", "loser")
    )
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (PAIRS,), generator=generator)
    guidance = torch.randn(int(lengths.sum()), WIDTH, generator=generator).bfloat16()
    longest = torch.full((PAIRS,), LENGTH)
    none = torch.zeros(PAIRS, dtype=torch.bool)
    return Data(Features(guidance, lengths, longest, loser, winner, none, none))


def losses(data: Data, optimizer: str) -> list[float]:
    """Train as by default, in fp32, with the preference term, two layers and small batches."""
    settings = find_preset("tiny-sdxl").training
    settings = replace(
        settings,
        steps=STEPS,
        batch_size=4,
        depth=2,
        preference_weight=1.0,
        optimizer=optimizer,
        lr=RATES[optimizer],
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        run = Run(folder, {})
        script.train(run, data, settings, Precision.named("fp32", torch.device("cpu")))
        run.lock.close()
        rows = read_rows(run.metrics)
    torch.set_num_threads(threads)
    assert rows[-1]["refreshes"] > 0
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def data() -> Data:
    return some_pairs()


@pytest.mark.parametrize("optimizer", RATES)
def test_the_losses_of_a_default_training_are_the_committed_ones(data, optimizer):
    committed = json.loads(COMMITTED.read_text())
    found, expected = losses(data, optimizer), committed[optimizer]
    assert found == pytest.approx(expected, rel=1e-4)
    if committed["computer"] == kind_of_computer():
        assert found == expected, "to the bit on this kind of computer"


if __name__ == "__main__":
    pairs = some_pairs()
    found = {"computer": kind_of_computer()} | {name: losses(pairs, name) for name in RATES}
    lines = [f'"{name}": {json.dumps(value)}' for name, value in found.items()]
    COMMITTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
