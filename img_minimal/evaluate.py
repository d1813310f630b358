"""Does IMG help? Every arm on the same prompts and seeds, judged by the tiny world's oracle.

    python -m img_minimal.evaluate                       256 prompts of the test split
    python -m img_minimal.evaluate --prompts 640 --json results.json
    python -m img_minimal.evaluate --prompt-file x.txt   prompts of your own, judged by CLIP models: compare.py

Arms: the base model; the same compute spent on a new seed; the better of two seeds as picked by the MLLM, or by the
oracle (which cheats); a second pass with the tokens of a correct picture (no aligner can do better); and the second
pass with the image's own tokens (no guidance), or aligned with text, stock MLLM, or the finetuned MLLM (IMG).
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from img_minimal.aligner import ImplicitAligner
from img_minimal.cli import check, option, parse, quiet_libraries, run
from img_minimal.errors import UserError
from img_minimal.images import to_pil
from img_minimal.judging.compare import CompareOptions, compare
from img_minimal.judging.image_folder import FIRST_SEED, NEW_SEED
from img_minimal.mllm import MLLM
from img_minimal.painter import Guidance
from img_minimal.pictures import labelled_grid
from img_minimal.pipeline import IMG
from img_minimal.presets import PRESETS, ModelFlags, find_preset, with_overrides
from img_minimal.statistics import mean_interval, win_rate
from img_minimal.tiny.edits import correct
from img_minimal.tiny.grammar import CATEGORIES, Prompt, benchmark
from img_minimal.tiny.oracle import Verdict, judge
from img_minimal.tiny.world import render

TITLES = {
    "base": "base model",
    "new_seed": "same compute, new seed",
    "best_of_two_mllm": "best of two seeds, picked by the MLLM",
    "best_of_two_oracle": "best of two seeds, picked by the oracle (cheats)",
    "perfect_tokens": "tokens of a correct picture (ceiling)",
    "no_guidance": "second pass, the image's own tokens",
    "text": "second pass, guided by text",
    "stock_mllm": "second pass, guided by the stock MLLM",
    "img": "IMG",
}


@dataclass
class Config(ModelFlags, CompareOptions):
    """The command line."""

    model: str = option("tiny-sdxl", "which model", choices=list(PRESETS))
    prompts: int | None = option(None, "how many prompts; default: 256 of the twin's, or all of the --prompt-file")
    seed: int = option(0, "draws the prompts and numbers the images")
    split: str = option("test", "test for reporting, validation for choosing", choices=["test", "validation"])
    aligner: str | None = option(None, "another aligner file; default: the preset's")
    scale: float | None = option(None, "scale of the image tokens; default: the preset's")
    scale_end: float | None = option(None, "share of it that is left at the last step; default: the preset's")
    passes: int | None = option(None, "applications of the aligner; default: the preset's")
    only_img: bool = option(False, "leave out the arms of text and stock MLLM")
    json: str | None = option(None, "also write the results to this file")
    picture: str | None = option(None, "also draw before and after, of the first prompts that the base gets wrong")


class Bench:
    """One set of prompts and seeds, the base model's images of it, and what every arm shares."""

    def __init__(self, img: IMG, prompts: list[Prompt], seed: int, progress: bool = True):
        self.img, self.prompts, self.progress = img, prompts, progress
        self.captions = [str(p) for p in prompts]
        self.seed, self.seeds = seed, [FIRST_SEED * (seed + 1) + k for k in range(len(prompts))]
        self.base = self._draw("base")
        self.pictures = to_pil(self.base)
        self.own = img.painter.tokens(self.pictures)
        self.verdicts: dict[str, list[Verdict]] = {"base": judge(self.base, prompts)}

    def _draw(self, name: str, tokens: Tensor | None = None, offset: int = 0) -> Tensor:
        seeds = [s + offset for s in self.seeds]
        return self.img.painter.draw(self.captions, seeds, tokens, progress=name if self.progress else None)

    def second_pass(self, name: str, tokens: Tensor) -> Tensor:
        """Draw again with tokens (B, N, D), from the same seeds, and judge it as arm `name`."""
        images = self._draw(name, tokens)
        self.verdicts[name] = judge(images, self.prompts)
        return images

    def aligned(self, name: str, guide: Guidance, aligner: ImplicitAligner) -> Tensor:
        """The second pass of an aligner with its guide."""
        img = IMG(self.img.painter, guide, aligner)
        return self.second_pass(name, img.align(self.base, self.captions, self.seed))

    def new_seed(self) -> Tensor:
        """The same compute spent on another try, judged as arm `new_seed`."""
        again = self._draw("new_seed", offset=NEW_SEED)
        self.verdicts["new_seed"] = judge(again, self.prompts)
        return again

    def controls(self, mllm: MLLM) -> None:
        """The arms that need no aligner."""
        again = self.new_seed()
        tries = list(zip(self.verdicts["base"], self.verdicts["new_seed"]))
        first = mllm.satisfaction(self.pictures, self.captions, random.Random(self.seed))
        second = mllm.satisfaction(to_pil(again), self.captions, random.Random(self.seed))
        self.verdicts["best_of_two_mllm"] = [t[int(b > a)] for t, a, b in zip(tries, first, second)]
        self.verdicts["best_of_two_oracle"] = [max(pair, key=lambda v: (v.strict, v.soft)) for pair in tries]
        perfect = [correct(v.found, p)[1] for v, p in zip(self.verdicts["base"], self.prompts)]
        self.second_pass("perfect_tokens", self.img.painter.tokens(to_pil(render(perfect))))
        self.second_pass("no_guidance", self.own)

    def results(self) -> dict:
        """Scores of every arm, overall and by category, and IMG against every other, with intervals."""
        groups = {c: [p.category == c for p in self.prompts] for c in CATEGORIES}
        groups["seen"] = [not p.held_out for p in self.prompts]
        groups["held_out"] = [p.held_out for p in self.prompts]
        strict = {name: np.array([v.strict for v in verdicts]) for name, verdicts in self.verdicts.items()}
        soft = {name: np.array([v.soft for v in verdicts]) for name, verdicts in self.verdicts.items()}
        arms = {
            name: {
                "strict": strict[name].mean().item(),
                "soft": soft[name].mean().item(),
                "n": len(self.prompts),
                "interval": mean_interval(strict[name], self.captions),
                "by_category": {c: strict[name][np.array(m)].mean().item() for c, m in groups.items() if any(m)},
            }
            for name in TITLES
            if name in self.verdicts
        }
        others = [name for name in arms if name != "img"]
        return {
            "arms": arms,
            "win_rate": {f"img_vs_{name}": win_rate(soft["img"], soft[name], self.captions) for name in others},
            "difference": {
                f"img_minus_{name}": mean_interval(1.0 * strict["img"] - strict[name], self.captions) for name in others
            },
        }


def print_results(results: dict) -> None:
    """The table of arms, and the paired comparisons."""
    groups = list(results["arms"]["img"]["by_category"])
    print(f"{'strict':>56} soft  " + " ".join(f"{g[:8]:>8}" for g in groups))
    for name, arm in results["arms"].items():
        row = " ".join(f"{arm['by_category'][g]:8.2f}" for g in groups)
        print(f"{TITLES[name]:48} {arm['strict']:7.3f} {arm['soft']:5.3f} {row}")
    print("\nIMG against                                      strict, difference       win rate without ties")
    for name in results["arms"]:
        if name != "img":
            d, w = results["difference"][f"img_minus_{name}"], results["win_rate"][f"img_vs_{name}"]
            print(
                f"{TITLES[name]:48} {d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
                f"   {w['value']:.3f} [{w['low']:.3f}, {w['high']:.3f}] of {w['decided']}"
            )


def print_comparison(img: IMG, count: int, picture: Path) -> None:
    """Base against IMG on validation prompts: what a training run ends with. Also saves a grid of samples."""
    if img.painter.preset.world != "tiny":
        return
    bench = Bench(img, benchmark(count, "validation"), seed=0)
    images = bench.aligned("img", img.mllm, img.aligner)
    results = bench.results()
    base, ours = (results["arms"][name]["strict"] for name in ("base", "img"))
    rate = results["win_rate"]["img_vs_base"]
    print(
        f"strict alignment on {count} validation prompts: base {base:.3f}, IMG {ours:.3f}; win rate without ties "
        f"{rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}] of {rate['decided']}"
    )
    before_and_after(bench, images, picture)


def before_and_after(bench: Bench, images: Tensor, path: Path | str, count: int = 6) -> None:
    """The first prompts whose base image is wrong: both images, what the MLLM said, what the oracle says now."""
    chosen = [k for k, verdict in enumerate(bench.verdicts["base"]) if not verdict.strict][:count]
    pictures, captions = [bench.pictures[k] for k in chosen], [bench.captions[k] for k in chosen]
    said = ["(guided by text: no MLLM looked)"] * len(chosen)
    if isinstance(bench.img.mllm, MLLM):
        said = bench.img.mllm.explain(pictures, captions, random.Random(bench.seed))
    cells = []
    for k, words in zip(chosen, said):
        verdict = bench.verdicts["img"][k]
        now = "right" if verdict.strict else f"still wrong: {verdict.words}"
        cells.append([(bench.pictures[k], f'"{bench.captions[k]}"\nMLLM: {words}')])
        cells[-1].append((to_pil(images[k : k + 1])[0], f"IMG, same seed\noracle: {now}"))
    rows = [[cell for pair in cells[k : k + 3] for cell in pair] for k in range(0, len(cells), 3)]
    if rows:
        note = f"the first {len(chosen)} of {len(bench.prompts)} prompts that the base draws wrong, seed {bench.seed}"
        labelled_grid(rows, path, caption=f"{bench.img.painter.preset.name}: {note}; not chosen by result")


def ablations(bench: Bench) -> None:
    """The arms guided by text and by the stock MLLM, each with an aligner of its own; left out where there is none."""
    painter, preset = bench.img.painter, bench.img.painter.preset
    for name, kind, path in (("text", "text", preset.text_aligner), ("stock_mllm", "stock", preset.stock_aligner)):
        if Path(path).exists():
            bench.aligned(name, painter.guide(kind), ImplicitAligner.from_file(path))
        else:
            print(f"left out: {TITLES[name]}; {path} is not there, train it with: python train.py --guidance {kind}")


def main() -> int:
    """All arms, the table, the JSON."""
    config = parse(Config, __doc__)
    preset = config.applied_to(find_preset(config.model))
    preset = with_overrides(preset, scale=config.scale, scale_end=config.scale_end, passes=config.passes)
    check(config.prompts is None or config.prompts >= 5, f"--prompts is {config.prompts}, expected 5 or more")
    check(config.seed >= 0, f"--seed is {config.seed}, expected 0 or more")
    for option_name, path in (("--json", config.json), ("--picture", config.picture)):
        if path:
            try:
                Path(path).touch()  # learn now, not after the work, that it cannot be written
            except OSError as error:
                raise UserError(f"{path}: cannot be written ({error.strerror}); choose another {option_name}") from None
    quiet_libraries()
    if config.prompt_file or preset.world is None:
        compare(config, preset, count=config.prompts, seed=config.seed, aligner=config.aligner, json_path=config.json,
                picture=config.picture)  # fmt: skip
        return 0
    count = config.prompts or 256
    img = IMG.from_preset(preset, config.aligner)
    bench = Bench(img, benchmark(count, config.split, config.seed), config.seed)
    bench.controls(img.mllm)
    if not config.only_img:
        ablations(bench)
    images = bench.aligned("img", img.mllm, img.aligner)
    if config.picture:
        before_and_after(bench, images, config.picture)
    results = bench.results()
    results["settings"] = {"model": preset.name, "split": config.split, "seed": config.seed, "prompts": count,
                           "scale": preset.scale, "scale_end": preset.scale_end, "passes": preset.passes,
                           "torch": torch.__version__}  # fmt: skip
    print_results(results)
    if config.json:
        Path(config.json).write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    run(main)
