"""Write pages that read without running anything: text and code, what was printed, the picture.

python tutorials/pages.py            all of them; lessons are run in full, which takes an hour
python tutorials/pages.py 01 04      some lessons, and the method in its files' own words
python tutorials/pages.py --text     text and code alone: what was printed and drawn stays
"""

import argparse
import re
import shutil
import subprocess
import sys
from importlib import import_module
from inspect import getsource
from operator import attrgetter
from pathlib import Path
from textwrap import dedent

import common  # noqa: F401 - finds img_minimal from anywhere

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
LESSONS = {path.stem[:2]: path for path in sorted(FOLDER.glob("[0-9]*.py"))}
# What the method's page shows, in this order. What it leaves out opens, checks and saves.
METHOD = {
    "img_minimal.pipeline": "IMG.stages IMG._look IMG.guidance IMG.correct",
    "img_minimal.mllm": "MLLM.guidance MLLM.run",
    "img_minimal.aligner": "ImplicitAligner.__init__ ImplicitAligner.forward "
    "PerceiverLayers.forward PerceiverAttention",
    "img_minimal.preference": "preference_loss ReferenceRefresh",
    "img_minimal.sdxl": "ImagePrompt.features Resampler.__init__ Resampler.forward "
    "DecoupledAttention inject",
    "train": "train",
}
CELL = re.compile(r"(?m)^# %%(.*)\n((?:(?!# %%).*\n)*)")
# What each cell of code has printed, on a page or while it runs, and what of that differs by run.
SHOWN = re.compile(r"(?m)^```python\n(?:.*\n)*?```\n\n(?:```text\n\n*((?:.*\n)*?)(?=```))?")
CHANGES = re.compile(r"(?m)^(?:saved to |[\d.]+ s\b).*\n")
# Docstrings, and comments that head a block of code; then what marks them.
PROSE = re.compile(r'(?m)(^ *"""(?s:.*?)""".*\n|(?:\A|(?<=\n\n)|(?<=:\n))(?:^ *#.*\n)+)')
MARKS = re.compile(r'(?m)^ *# ?|"""(?:  # noqa.*)?')


def prose(part: str) -> str:
    """Turn a docstring or comments into a part of a page."""
    return dedent(MARKS.sub("", part)).strip() + "\n\n"


def fenced(code: str) -> str:
    """Turn code into a part of a page, if there is any."""
    code = code.strip("\n")
    return f"```python\n{code}\n```\n\n" if code else ""


def run(script: Path) -> str:
    """Run a lesson as its reader does, save its picture, and return what its cells print."""
    marked = re.sub("(?m)^# %%$", r"print('```python\\n```\\n\\n```text')", script.read_text())
    output = ROOT / "outputs" / "tutorials"
    command = [sys.executable, "-c", marked, "--output", output]
    printed = subprocess.check_output(command, cwd=FOLDER, text=True)
    picture = FOLDER / "pictures" / f"{script.stem[:2]}.png"
    shutil.copyfile(output / f"{script.stem}.png", picture)
    return CHANGES.sub("", printed.replace(f"{ROOT}/", "")) + "```"


def lesson_page(script: Path, shown: str) -> str:
    """Make a lesson's page from its script and from what its cells `run` or an old page shows."""
    page = ""
    printed = iter(SHOWN.findall(shown))
    for kind, text in CELL.findall(script.read_text()):
        if kind:
            page += prose(text)
            continue
        page += fenced(text)
        if output := next(printed):
            page += f"```text\n{output}```\n\n"
        if "\nsave(" in text:
            page += f"![The picture of {script.name}](pictures/{script.stem[:2]}.png)\n\n"
    return page + f"From [{script.name}]({script.name}), by `python tutorials/pages.py`.\n"


def method_page() -> str:
    """Make the method's page from docstrings, comments and code of its files."""
    page = "# The method, in its files' own words\n\n"
    for name, members in METHOD.items():
        module = import_module(name)
        file = Path(module.__file__).relative_to(ROOT)
        page += f"## [{file}](../{file})\n\n" + prose(PROSE.split(getsource(module))[1])
        for member in members.split():
            page += f"### `{member}`\n\n"
            code = dedent(getsource(attrgetter(member)(module)))
            for k, part in enumerate(PROSE.split(code)):
                page += prose(part) if k % 2 else fenced(part)
    return page + "By `python tutorials/pages.py`.\n"


def main() -> None:
    """Write the method's page, and those of the lessons that are asked for."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("numbers", nargs="*", default=LESSONS)
    parser.add_argument("--text", action="store_true")
    options = parser.parse_args()
    (FOLDER / "00_method.md").write_text(method_page())
    for number in options.numbers:
        script = LESSONS[number]
        page = script.with_suffix(".md")
        shown = page.read_text() if options.text else run(script)
        page.write_text(lesson_page(script, shown))


if __name__ == "__main__":
    main()
