"""What the README and its pages say is true of the repository: lines, files, commands, and numbers."""

import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from img_minimal.evaluate.arms import TITLES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "tutorials").glob("*.md"))}
ALL = "\n".join([README, *PAGES.values()])
BLOCKS = re.findall(r"```bash\n(.*?)```", ALL, re.S)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
OURS = sorted({m.group() for c in COMMANDS for m in re.finditer(r"python (-m img_minimal\.[\w.]+|\w+\.py)", c)})


def section(title: str) -> str:
    """The text under a heading, up to the next one of the same level."""
    return ALL.split(f"## {title}\n")[1].split("\n## ")[0]


def test_every_equation_is_found_by_what_its_line_says():
    rows = re.findall(r"\[([\w/.]+)\]\(([\w/.]+)\) \| `(.*)` \|", section("From equation to line"))
    assert len(rows) > 15
    for path, target, reads in rows:
        found = [line for line in (ROOT / path).read_text().splitlines() if reads in line]
        assert len(found) == 1 and target == f"../{path}", f"{path}: {len(found)} lines say {reads!r}"


def test_the_readme_is_short_and_no_section_stands_twice():
    assert len(README.encode()) <= 10_000
    titles = re.findall(r"^## .*$", ALL, re.MULTILINE)
    assert len(titles) > 10 and sorted(titles) == sorted(set(titles))


def test_every_page_is_linked_and_every_link_leads_somewhere():
    assert [name for name in PAGES if f"](tutorials/{name}.md" not in README] == []
    for place, text in [(ROOT, README), *((ROOT / "tutorials", page) for page in PAGES.values())]:
        for target, heading in re.findall(r"\]\((?!http)([^)#]*)(#[^)]*)?\)", text):
            assert (place / target).exists(), target
            if heading:
                page = (place / target).read_text() if target else text
                titles = re.findall(r"^##+ (.+)$", page, re.MULTILINE)
                assert heading[1:] in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles], heading


def test_every_path_that_the_readme_names_is_there():
    paths = re.findall(r"`((?:img_minimal|tutorials|tests)/[\w/.-]*)`", ALL)
    assert len(paths) > 25
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_top_level_is_what_the_readme_describes_and_nothing_else():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    if not any(tracked):
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in tracked if name and not name.startswith(".")}
    expected = {
        "img_minimal",
        "tutorials",
        "tests",
        "train.py",
        "sample.py",
        "requirements.txt",
        "README.md",
        "LICENSE",
    }
    assert top == expected


def test_every_module_of_the_package_is_named_or_lies_in_a_folder_that_is():
    files = sorted(p.name for p in (ROOT / "img_minimal").glob("*.py") if p.name != "__init__.py")
    assert [name for name in files if name not in README] == []
    folders = [p.name for p in (ROOT / "img_minimal").iterdir() if (p / "__init__.py").exists()]
    assert [name for name in folders if f"`img_minimal/{name}/`" not in README] == []


@pytest.mark.parametrize("command", OURS)
def test_every_flag_of_a_command_in_the_readme_exists(command, monkeypatch, capsys):
    flags = {f for c in COMMANDS if command in c for f in re.findall(r"(--[\w-]+)", c.split(command)[1])}
    name = command.split()[-1].removesuffix(".py")
    package = (ROOT / name.replace(".", "/")).is_dir()
    module = importlib.import_module(f"{name}.__main__" if package else name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        module.main()
    said = capsys.readouterr().out
    assert [flag for flag in sorted(flags) if flag not in said] == []


def result_row(arm: str, results: dict) -> str:
    """A row of the README's table of results, from the file that the evaluation wrote."""
    part, groups = results["arms"][arm], ("single", "counting", "two", "position", "complex", "seen", "held_out")
    cells = [TITLES[arm].replace("(ceiling)", "(ceiling of any aligner)")]
    cells.append("{:.3f} [{low:.3f}, {high:.3f}]".format(part["strict"], **part["interval"]))
    cells += [f"{part['soft']:.3f}"] + [f"{part['by_category'][g]:.2f}" for g in groups]
    if arm == "img":
        return " | ".join(["**IMG**", *cells[1:], "—", "—"])
    cells.append("{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**results["difference"][f"img_minus_{arm}"]))
    cells.append("{value:.2f} [{low:.2f}, {high:.2f}]".format(**results["win_rate"][f"img_vs_{arm}"]))
    return " | ".join(cells)


@pytest.mark.parametrize("file", ["evaluation.json", "evaluation-flux.json"])
def test_the_table_of_results_is_what_the_evaluation_wrote(file):
    results = json.loads((ROOT / "img_minimal/tiny/twins" / file).read_text())
    missing = [arm for arm in results["arms"] if f"| {result_row(arm, results)} |" not in PAGES["results"]]
    assert missing == []


@pytest.mark.parametrize("file", ["evaluation.json", "evaluation-flux.json"])
def test_the_steps_of_the_papers_order_lead_from_no_guidance_to_img(file):
    results = json.loads((ROOT / "img_minimal/tiny/twins" / file).read_text())
    steps = [(name.split("_minus_"), step["value"]) for name, step in results["order"].items()]
    assert [worse for (_, worse), _ in steps] == ["no_guidance", "base", "text", "stock_mllm"]
    for (better, worse), value in steps:
        assert value == pytest.approx(results["arms"][better]["strict"] - results["arms"][worse]["strict"])
    assert steps[-1][0][0] == "img"


def test_every_tutorial_is_in_the_readme_with_the_question_it_opens_with():
    listed = dict(re.findall(r"\| `tutorials/(\d\d_\w+)\.py` \| ([^|]+) \|", section("Tutorials")))
    for path in sorted((ROOT / "tutorials").glob("[0-9]*.py")):
        question = path.read_text().split('"""')[1].strip().splitlines()[0]
        assert listed[path.stem].strip() == question, path.name
    assert len(listed) == len(list((ROOT / "tutorials").glob("[0-9]*.py")))


def ablation_rows(monkeypatch, tmp_path) -> list[str]:
    """The rows of the README's table of ablations, from the results that the tutorial keeps."""
    monkeypatch.syspath_prepend(str(ROOT / "tutorials"))
    monkeypatch.setattr(sys, "argv", ["08_ablations", "--output", str(tmp_path)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    tutorial = runpy.run_path(str(ROOT / "tutorials" / "08_ablations.py"))
    lines = []
    for title, row in tutorial["summary"].items():
        share, difference = row["share"], row["difference"]
        cells = ["{value:.3f} [{low:.3f}, {high:.3f}]".format(**share), " ".join(f"{s:.3f}" for s in row["seeds"])]
        cells.append("{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**difference))
        lines.append(f"| {title} | " + " | ".join(cells) + f" | {tutorial['ROWS'][title].paper or '–'} |")
    ended = tutorial["trainings"](tutorial["results"], tutorial["shown"])
    return lines + [f"| {title} | " + " | ".join(ranges) + " |" for title, ranges in ended.items()]


def test_the_table_of_ablations_is_what_the_tutorial_made(monkeypatch, tmp_path):
    assert [line for line in ablation_rows(monkeypatch, tmp_path) if line not in section("Ablations")] == []
