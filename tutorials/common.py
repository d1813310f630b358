"""What every tutorial begins and ends with: its flags, its clock, and a picture that says what it was made of.

A tutorial is a script to be read from top to bottom. Its `# %%` marks are the cells of a notebook:
`jupytext --to notebook tutorials/01_misalignment.py` makes one, and so do editors that know the marks. How its picture
is drawn is beside it, in tutorials/figures/.
"""

import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

NOTEBOOK = "ipykernel" in sys.modules
sys.path.insert(0, str(Path.cwd().parent if NOTEBOOK else Path(__file__).parent.parent))  # so that it just works

from img_minimal.flags import ModelFlags  # noqa: E402
from img_minimal.presets import PRESETS, Preset, find_preset  # noqa: E402
from img_minimal.runtime import cli  # noqa: E402
from img_minimal.cli import check, option  # noqa: E402
from img_minimal.cli import UserError  # noqa: E402

__all__ = ["Options", "begin", "check", "chosen_preset", "option", "oracle_preset", "save", "step"]
_clock: Any = None  # that of `begin`; what it imports takes seconds


@dataclass
class Options(ModelFlags):
    """Flags of every tutorial; inherit to add some."""

    model: str = option("tiny-sdxl", "which models", choices=list(PRESETS))
    seed: int = option(0, "draws the prompts and numbers the images")
    quick: bool = option(False, "the same lines on a few samples: shows that it runs, and nothing more")
    output: str = option("outputs/tutorials", "folder for the picture")


Chosen = TypeVar("Chosen", bound=Options)


def begin(kind: type[Chosen], doc: str) -> Chosen:
    """Read the command line, print the question the tutorial answers, prove that its picture can be written.

    In a notebook all options have their defaults; change them in the cell that calls this.
    """
    if not NOTEBOOK:
        cli.end_scripts_in_one_line()
    options = cli.parse(kind, doc, [] if NOTEBOOK else None)
    check(options.seed >= 0, f"--seed is {options.seed}, expected 0 or more")
    cli.writable_folder(options.output)
    cli.quiet_libraries()
    from img_minimal.files import Clock

    global _clock
    _clock = Clock()
    if not NOTEBOOK:  # which shows it above
        note = " (quick mode: too few samples to mean anything)" if options.quick else ""
        print(doc.strip().splitlines()[0] + note)
    return options


def step(name: str) -> AbstractContextManager[None]:
    """The time within this context counts for a step; `save` prints the seconds of all."""
    return _clock(name)


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
    """Save a matplotlib figure as a PNG under `caption`, which states sample size and seed, and quick mode.

    Also prints what the steps of the tutorial have cost.
    """
    import matplotlib.pyplot as plt

    note = "QUICK MODE, too few samples to mean anything. " if options.quick else ""
    figure.supxlabel(note + caption, fontsize=8, color="#D55E00" if options.quick else "#7F7F7F")
    path = Path(options.output) / f"{name}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    total = sum(_clock.seconds.values()) or 1.0
    steps = (f"{name} {seconds:.1f} s ({seconds / total:.0%})" for name, seconds in _clock.seconds.items())
    print(f"{total:.0f} s: " + ", ".join(steps))
    print(f"saved to {path}")
    if NOTEBOOK:
        from IPython.display import Image, display

        display(Image(path))
    return path
