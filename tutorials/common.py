"""What every tutorial begins and ends with: its flags, the models, and a picture that says what it was made of."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that `python tutorials/01_misalignment.py` just works

from img_minimal.flags import ModelFlags  # noqa: E402
from img_minimal.presets import PRESETS, Preset, find_preset  # noqa: E402
from img_minimal.runtime.cli import check, option, parse, quiet_libraries, run, writable_folder  # noqa: E402
from img_minimal.runtime.errors import UserError  # noqa: E402

__all__ = ["Options", "begin", "chosen_preset", "oracle_preset", "option", "parse", "run", "save"]


@dataclass
class Options(ModelFlags):
    """Flags of every tutorial; inherit to add some."""

    model: str = option("tiny-sdxl", "which models", choices=list(PRESETS))
    seed: int = option(0, "draws the prompts and numbers the images")
    quick: bool = option(False, "the same lines on a few samples: shows that it runs, and nothing more")
    output: str = option("outputs/tutorials", "folder for the picture")


Chosen = TypeVar("Chosen", bound=Options)


def begin(kind: type[Chosen], doc: str) -> Chosen:
    """Read the command line, print the question the tutorial answers, prove that its picture can be written."""
    options = parse(kind, doc)
    check(options.seed >= 0, f"--seed is {options.seed}, expected 0 or more")
    writable_folder(options.output)
    quiet_libraries()
    print(doc.strip().splitlines()[0] + (" (quick mode: too few samples to mean anything)" if options.quick else ""))
    return options


def chosen_preset(options: Options) -> Preset:
    """The preset of --model, with what other flags change."""
    return options.applied_to(find_preset(options.model))


def oracle_preset(options: Options) -> Preset:
    """The same, where the exact oracle is needed. Raises UserError for models whose images it cannot judge."""
    preset = chosen_preset(options)
    if preset.world != "tiny":
        raise UserError(
            f"this tutorial needs the exact oracle, which cannot judge images of {preset.name}; for real images, see "
            f"python -m img_minimal.evaluate --model {preset.name} --prompt-file prompts.txt"
        )
    return preset


def save(figure: Any, options: Options, name: str, caption: str) -> Path:
    """Save a matplotlib figure as a PNG under `caption`, which states sample size and seed, and quick mode."""
    import matplotlib.pyplot as plt

    note = "QUICK MODE, too few samples to mean anything. " if options.quick else ""
    figure.supxlabel(note + caption, fontsize=8, color="#D55E00" if options.quick else "#7F7F7F")
    path = Path(options.output) / f"{name}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"saved to {path}")
    return path
