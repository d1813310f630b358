"""The house stands: what may import what, what is named where, and that help costs nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "img_minimal"

# Each room and the rooms that it may import from, always further down. "method" is the ground floor, file by file
# below; tiny's world (grammar, scenes, oracle) stands apart, and its build uses everything.
MAY_IMPORT = {
    "runtime": set(),
    "files": {"runtime"},
    "tiny": {"runtime"},
    "method": {"files", "runtime"},
    "backbones": {"method", "files", "runtime"},
    "around": {"backbones", "method", "files", "runtime"},
    "pipeline": {"around", "backbones", "method", "files", "runtime"},
    "data": {"backbones", "method", "files", "runtime"},
    "training": {"data", "method", "runtime"},
    "load": {"data", "pipeline", "around", "backbones", "method", "files", "runtime"},
    "finetuning": {"training", "data", "method", "files", "runtime"},
    "plots": {"runtime"},
    "serve": {"pipeline", "runtime"},
    "evaluate": {"load", "data", "pipeline", "method", "files", "runtime", "tiny"},
    "rounds": {"evaluate", "training", "load", "data", "pipeline", "method", "files", "runtime", "tiny"},
    "bench": {
        "load",
        "finetuning",
        "training",
        "data",
        "pipeline",
        "around",
        "backbones",
        "method",
        "files",
        "runtime",
    },
    "tiny/build": {"load", "finetuning", "training", "backbones", "data", "method", "files", "runtime", "tiny"},
}
METHOD = {"aligner", "attention", "flags", "mllm", "places", "preference", "presets", "questions"}
# Of the twin, for whoever measures it: it opens the models that it diagnoses.
MAY_IMPORT["tiny/diagnose"] = {"load", "method", "runtime", "tiny"}


def room(module: tuple[str, ...]) -> str:
    """The room of a module's path below img_minimal."""
    if module[0] == "tiny":
        return "tiny/" + module[1] if len(module) > 1 and module[1] in ("build", "diagnose") else "tiny"
    return "method" if module[0] in METHOD else module[0]


def imports(path: Path) -> set[tuple[str, ...]]:
    """Modules of this package that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("img_minimal."):
            found.add(tuple(node.module.split(".")[1:]))
        elif isinstance(node, ast.ImportFrom) and node.module == "img_minimal":
            found |= {(alias.name,) for alias in node.names}
    return found


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_runs_upwards(path):
    place = path.relative_to(PACKAGE).with_suffix("").parts
    here = room(place)
    climbs = {".".join(m) for m in imports(path) if room(m) != here and room(m) not in MAY_IMPORT[here]}
    assert climbs == set()


def test_the_table_of_rooms_has_no_circle():
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {name for name, below in MAY_IMPORT.items() if name not in done and below <= done}
        assert ready, f"a circle among {set(MAY_IMPORT) - done}"
        done |= ready


def test_the_method_knows_no_backbone_but_by_its_protocol():
    words = re.compile(r"\b(unet|attn2|cross_attention_dim|scaling_factor|text_encoder|StableDiffusion\w*)\b", re.I)
    allowed = {"backbones", "tiny"}
    for path in FILES:
        if path.relative_to(PACKAGE).parts[0] not in allowed and path != PACKAGE / "bench" / "injection.py":
            tree = ast.parse(path.read_text())
            names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
            names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
            names_locations = path.name in ("places.py", "presets.py", "flags.py")  # one of which is called so
            known = {"unet"} if names_locations else set()
            assert {n for n in names if words.fullmatch(n)} <= known, path


def test_nothing_but_devices_names_a_dtype_to_compute_in():
    for path in [*FILES, ROOT / "train.py", ROOT / "sample.py"]:
        if path.name != "devices.py":
            assert "torch.autocast" not in path.read_text(), path


COMMANDS = ["sample.py", "train.py", "-m img_minimal.evaluate", "-m img_minimal.bench", "-m img_minimal.tiny.build"]
COMMANDS += ["-m img_minimal.plots"]
COMMANDS += [f"tutorials/{path.name}" for path in sorted((ROOT / "tutorials").glob("[0-9]*.py"))]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_there_before_torch_is(command):
    program = [sys.executable, "-X", "importtime", *command.split(), "--help"]
    said = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert said.returncode == 0 and "usage:" in said.stdout, said.stderr[-500:]
    assert not re.search(r"\| +(torch|diffusers|transformers|matplotlib)$", said.stderr, re.M)


def test_the_package_gives_the_method_by_name_and_says_what_it_has_not():
    import img_minimal
    from img_minimal import IMG, ImplicitAligner, load_img

    assert (IMG.__name__, ImplicitAligner.__name__, load_img.__name__) == tuple(img_minimal.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Painter'"):
        img_minimal.Painter  # noqa: B018


def test_the_examples_of_the_readme_run():
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(examples) == 2
    for example in examples:
        names: dict = {}
        exec(example, names)
        out = names["out"]
        assert out.initial[0].size == out.images[0].size == (64, 64) and out.said[0]
    assert names["tokens"].shape == (1, 16, 128)
