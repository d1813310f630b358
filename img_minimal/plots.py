"""Curves of several runs over each other: `python -m img_minimal.plots outputs/a outputs/b`

Reads metrics.jsonl of run folders (of train.py, both stages) and draws a panel for every number that at least one of
them has: one colour a run. `--only error nearer` chooses panels; `--tensorboard FOLDER` writes the same numbers for
TensorBoard, if it is installed.
"""

import argparse
import json
from pathlib import Path

from img_minimal.runtime.cli import PICTURES, check, run, warn, writable_file


def read_metrics(folder: str) -> list[dict]:
    """The rows of a run; a cut or damaged one is left out with a warning. Raises UserError if there are none."""
    path = Path(folder) / "metrics.jsonl"
    check(path.is_file(), f"{path}: not there; name the folder of a run, as --output-dir had it")
    rows, damaged = [], 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            rows.append({"step": int(row["step"])} | row)
        except (ValueError, TypeError, LookupError, RecursionError):
            damaged += 1
    if damaged:
        warn(f"{path}: {damaged} damaged rows are left out")
    check(bool(rows), f"{path}: holds no rows yet")
    return rows


def numbers(rows: list[dict]) -> list[str]:
    """The names of all numbers that rows have, besides the step."""
    names = {name: None for row in rows for name, value in row.items() if isinstance(value, (int, float))}
    return [name for name in names if name != "step"]


def draw(runs: dict[str, list[dict]], names: list[str], path: str) -> None:
    """One panel a number, one colour a run."""
    from img_minimal.runtime.plots import COLOURS, line, plt

    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 2.9 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for name, axis in zip(names, axes.flat):
        for k, (label, rows) in enumerate(runs.items()):
            there = [row for row in rows if isinstance(row.get(name), (int, float))]
            mark = None if len(there) > len(rows) / 2 else "o"  # what only some steps have is drawn as it is
            if there:
                line(axis, there, name, label, COLOURS[k % len(COLOURS)], mark)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel("step", fontsize=8)
    axes.flat[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    """Read, draw, say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help="run folders")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="numbers to draw (default: all)")
    parser.add_argument("--output", default="outputs/curves.png", help="the picture (default: outputs/curves.png)")
    parser.add_argument("--tensorboard", metavar="FOLDER", help="also write the numbers there for TensorBoard")
    options = parser.parse_args()
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    writable_file(options.output, "--output", PICTURES)
    runs = {str(Path(folder)): read_metrics(folder) for folder in options.runs}
    there = numbers([row for rows in runs.values() for row in rows])
    unknown = [name for name in options.only or () if name not in there]
    check(not unknown, f"--only {' '.join(unknown)}: no run has that; they have {', '.join(there)}")
    draw(runs, options.only or there, options.output)
    print(f"saved to {options.output}")
    if options.tensorboard:
        to_tensorboard(runs, options.tensorboard)
        print(f"written; look with: tensorboard --logdir {options.tensorboard}")
    return 0


def to_tensorboard(runs: dict[str, list[dict]], folder: str) -> None:
    """Every number of every run as a scalar. Raises UserError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        check(False, "--tensorboard needs the package tensorboard: pip install tensorboard")
    for label, rows in runs.items():
        with SummaryWriter(str(Path(folder) / Path(label).name)) as writer:
            for row in rows:
                for name in numbers([row]):
                    writer.add_scalar(name, row[name], row["step"])


if __name__ == "__main__":
    run(main)
