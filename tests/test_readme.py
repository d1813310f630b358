"""Check that what the README and its pages say is true: links, quotations, commands, tables."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from img_minimal.evaluate.arms import TITLES

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tutorials"
README = (ROOT / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.md"))}
ALL = "\n".join([README, *PAGES.values()])
COMMAND = re.compile(r"(-m img_minimal[\w.]*|(?:tutorials/)?\w+\.py)\b(.*)", re.S)


def find_commands() -> dict[str, set[str]]:
    """Collect our commands from code blocks and code spans, each with its flags, if it has any."""
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", ALL, re.S):
        lines += [line.split("#")[0] for line in block.splitlines()]
    without_blocks = re.sub(r"```.*?```", "", ALL, flags=re.S)
    lines += re.findall(r"`([^`]+)`", without_blocks)
    commands: dict[str, set[str]] = {}
    for line in lines:
        found = COMMAND.search(line)
        if found and (found[1].startswith("-m") or (ROOT / found[1]).is_file()):
            commands.setdefault(found[1], set()).update(re.findall(r"--[\w-]+", found[2]))
    return {command: flags for command, flags in commands.items() if flags}


COMMANDS = find_commands()
# A lesson of two cells of code.
LESSON = '''\
# %% [markdown]
"""# Is it shown?

    code
"""

# %%
print("first")

# %% [markdown]
# ## 1. Title
#
# See [08](08_ablations.py).

# %%
def save(name):
    print(f"12.3 s: load 100%\\nsaved to {name}\\n\\nIt is.")

save("x.png")
'''
PAGE = """\
# Is it shown?

    code

```python
print("first")
```

```text
first
```

## 1. Title

See [08](08_ablations.py).

```python
def save(name):
    print(f"12.3 s: load 100%\\nsaved to {name}\\n\\nIt is.")

save("x.png")
```

```text
It is.
```

![The picture of 07_lesson.py](pictures/07.png)

From [07_lesson.py](07_lesson.py), by `python tutorials/pages.py`.
"""


def section(title: str) -> str:
    """Return the text under a heading, up to the next one of the same level."""
    return ALL.split(f"## {title}\n")[1].split("\n## ")[0]


def cells(row: str) -> list[str]:
    """Split a row of a Markdown table."""
    return [cell.strip() for cell in row.strip("|").split("|")]


def run(*command: str) -> str:
    """Run a command of this repository and return what it prints."""
    program = [sys.executable, *command]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


@pytest.fixture
def pages(monkeypatch) -> ModuleType:
    """The script that writes the lessons' pages."""
    monkeypatch.syspath_prepend(ROOT / "tutorials")
    return import_module("pages")


def test_a_lessons_page_shows_what_its_cells_print_but_no_times(pages, monkeypatch, tmp_path):
    for name in ("ROOT", "FOLDER"):
        monkeypatch.setattr(pages, name, tmp_path)
    for folder in ("pictures", "outputs/tutorials"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "outputs/tutorials/07_lesson.png").write_bytes(b"picture")
    script = tmp_path / "07_lesson.py"
    script.write_text(LESSON)
    assert pages.lesson_page(script, pages.run(script)) == PAGE
    assert (tmp_path / "pictures/07.png").read_bytes() == b"picture"
    assert pages.lesson_page(script, PAGE) == PAGE, "as with --text"


def test_pages_are_made_of_the_scripts_and_of_the_methods_files(pages):
    written = {path.with_suffix(".py"): path.read_text() for path in FOLDER.glob("[0-9]*.md")}
    for script, page in written.items():
        number = script.stem[:2]
        made = pages.lesson_page(script, page) if number != "00" else pages.method_page()
        assert page == made, "python tutorials/pages.py --text"
        assert number == "00" or (FOLDER / f"pictures/{number}.png").exists()
    files = [*FOLDER.glob("*.md"), *FOLDER.glob("pictures/*")]
    assert sum(path.stat().st_size for path in files) < 6e6


def test_the_torch_for_laptops_is_the_one_that_is_required():
    [named] = re.findall(r"pip install (torch==\S+) --index-url", README)
    assert named in (ROOT / "requirements.txt").read_text().splitlines()


def test_links_lead_somewhere_and_every_page_is_linked():
    assert [name for name in PAGES if f"](tutorials/{name}.md" not in README] == []
    folders = [(ROOT, README), *((FOLDER, page) for page in PAGES.values())]
    for folder, text in folders:
        text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        text = re.sub(r'<img src="([^"]*)"', r"](\1)", text)
        for target, heading in re.findall(r"\]\((?!http)([^)#]*)(#[^)]*)?\)", text):
            assert (folder / target).exists(), target
            page = (folder / target).read_text() if heading and target else text
            titles = re.findall(r"^##+ (.+)$", page, re.M)
            anchors = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
            assert not heading or heading[1:] in anchors, heading


def test_files_that_are_named_exist():
    paths = re.findall(r"`((?:img_minimal|tiny|tutorials|tests)/[\w/.-]*)`", ALL)
    assert len(paths) > 15
    for path in paths:
        folder = ROOT / "img_minimal" if path.startswith("tiny/") else ROOT
        assert (folder / path).exists(), path


def test_the_reading_order_is_short_and_the_readme_names_every_other_module():
    assert len(README.encode()) <= 10_000
    order = re.findall(r"^\| `([\w/]+\.py)` \|", README, re.M)
    lines = sum(len((ROOT / file).read_text().splitlines()) for file in order)
    [stated] = re.findall(r"about ([\d,]+) lines", README)
    assert lines <= 1750 and abs(lines - int(stated.replace(",", ""))) < 100
    for path in (ROOT / "img_minimal").iterdir():
        name = f"{path.name}/" if (path / "__init__.py").exists() else path.name
        if name.endswith(("/", ".py")) and name != "__init__.py":
            assert name in README


def test_every_equation_is_found_by_its_quotation():
    rows = re.findall(r"\[([\w/.]+)\]\(([\w/.]+)\) \| `(.*)` \|", section("From equation to line"))
    assert len(rows) > 15
    for path, target, quotation in rows:
        found = [line for line in (ROOT / path).read_text().splitlines() if quotation in line]
        assert len(found) == 1 and target == f"../{path}", f"{path}: {found} for {quotation!r}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_a_command_exists(command):
    known = re.findall(r"--[\w-]+", run(*command.split(), "--help"))
    assert COMMANDS[command] - set(known) == set()


def test_every_tutorial_is_listed_with_the_question_it_opens_with():
    listed = {}
    for link, question in re.findall(
        r"\[\d\d\]\((tutorials/\d\d_\w+\.\w+)\) \| ([^|]+) \|", README
    ):
        listed[ROOT / link] = question
    for script in FOLDER.glob("[0-9]*.py"):
        page = script.with_suffix(".md")
        question = script.read_text().split('"""')[1].split("\n\n")[0].removeprefix("# ")
        assert listed.pop(page if page.exists() else script) == " ".join(question.split())
    assert not listed


def interval(numbers: dict, sign: str = "") -> str:
    """Format a value with its interval as the tables do."""
    form = "{value:S.3f} [{low:S.3f}, {high:S.3f}]".replace("S", sign)
    return form.format(**numbers)


def arm_row(arm: str, results: dict) -> str:
    """Format the row of an arm in the table of results."""
    scores = results["arms"][arm]
    title = TITLES[arm].replace("(ceiling)", "(ceiling of any aligner)")
    row = [title, interval(scores["interval"]), f"{scores['soft']:.3f}"]
    row += [f"{share:.2f}" for share in scores["by_category"].values()]
    if arm == "img":
        row[0] = f"**{title}**"
        row += ["—", "—"]
    else:
        wins = results["win_rate"][f"img_vs_{arm}"]
        row.append(interval(results["difference"][f"img_minus_{arm}"], "+"))
        row.append("{value:.2f} [{low:.2f}, {high:.2f}]".format(**wins))
    return f"| {' | '.join(row)} |"


@pytest.mark.parametrize("file", ["evaluation.json", "evaluation-flux.json"])
def test_results_are_those_that_the_evaluation_wrote(file):
    results = json.loads((ROOT / "img_minimal/tiny/twins" / file).read_text())
    for arm in results["arms"]:
        assert arm_row(arm, results) in PAGES["results"]
    for step in results["order"].values():
        assert re.sub(r"\b0\.", ".", interval(step, "+")) in PAGES["results"].replace("\n", " ")


def test_ablations_are_those_that_the_tutorial_prints(tmp_path):
    printed = run("tutorials/08_ablations.py", "--output", str(tmp_path)).splitlines()
    numbers = [line for line in printed if " [" in line]
    assert [line for line in numbers if line not in PAGES["08_ablations"]] == []
    rows = [cells(row) for row in section("Ablations").splitlines() if row.startswith("|")]
    rows = [row for row in rows if row[0] != "row" and set(row[0]) != {"-"}]
    assert len(rows) >= 20
    for title, *numbers in rows:
        shown = [number for number in numbers if number != "–"]
        lines = [line for line in printed if line.startswith(title)]
        assert any(all(number in line for number in shown) for line in lines), title
