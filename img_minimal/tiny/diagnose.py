"""Why does the tiny base model fail, and can its judge be trusted?

    python -m img_minimal.tiny.diagnose                    all of it, a minute
    python -m img_minimal.tiny.diagnose --sheet drawn.png  60 pictures of the base with verdicts, to look at

The oracle reads right scenes, before and after the VAE, and pictures that a person has read by eye. CLIP is shown a
correct picture with its caption and a *foil*, a caption that differs in one respect, and should find the caption more
alike. What the embedding does not tell apart, it cannot tell the UNet.
"""

import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from img_minimal.cli import PICTURES, option, parse, quiet_libraries, run, writable_file
from img_minimal.files import to_pil
from img_minimal.mllm import MLLM
from img_minimal.presets import find_preset
from img_minimal.tiny.grammar import COLOURS, FORMS, Prompt, benchmark, sample_prompt
from img_minimal.tiny.oracle import FIGURE, judge
from img_minimal.tiny.readings import agreement, readings
from img_minimal.tiny.world import place, render

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass
class Config:
    """The command line."""

    sheet: str | None = option(None, "draw 60 pictures of the base, judged, into this file, and nothing else")


def foil(prompt: Prompt, kind: str, rng: random.Random) -> Prompt:
    """A caption that is wrong for the picture in one respect: colour, count, binding or position."""
    first, *rest = prompt.groups
    if kind == "colour":
        used = {g.colour for g in prompt.groups}
        return replace(prompt, groups=(replace(first, colour=rng.choice([c for c in COLOURS if c not in used])), *rest))
    if kind == "count":
        return replace(prompt, groups=(replace(first, count=first.count + (1 if first.count < 4 else -1)), *rest))
    if kind == "binding":
        second = rest[0]
        return replace(prompt, groups=(replace(first, colour=second.colour), replace(second, colour=first.colour)))
    return replace(prompt, relation=OPPOSITE[prompt.relation])


@torch.no_grad()
def clip_against_foils(count: int = 500, seed: int = 0) -> dict[str, float]:
    """Share of pictures of unseen prompts whose caption scores above its foil; 0.5 is chance."""
    preset, rng, shares = find_preset("tiny-sdxl"), random.Random(seed), {}
    vision = CLIPVisionModelWithProjection.from_pretrained(preset.image_encoder, dtype=torch.float32)
    text = CLIPTextModelWithProjection.from_pretrained(f"{preset.base}/text_encoder_2", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(f"{preset.base}/tokenizer_2")

    def embed(prompts: list[Prompt]) -> Tensor:
        """Normalised text embeddings (B, D)."""
        tokens = tokenizer([str(p) for p in prompts], padding="max_length", return_tensors="pt").input_ids
        return F.normalize(text(tokens).text_embeds, dim=-1)

    for kind, category in (("colour", "two"), ("count", "counting"), ("binding", "two"), ("position", "position")):
        prompts = []
        while len(prompts) < count:
            prompt = sample_prompt(rng, category, "test")
            if kind != "binding" or len({g.colour for g in prompt.groups}) == len({g.form for g in prompt.groups}) == 2:
                prompts.append(prompt)
        images = F.normalize(vision(render([place(p, rng) for p in prompts]) * 2 - 1).image_embeds, dim=-1)
        right, wrong = embed(prompts), embed([foil(p, kind, rng) for p in prompts])
        shares[kind] = ((images * right).sum(-1) > (images * wrong).sum(-1)).float().mean().item()
    return shares


@torch.no_grad()
def oracle_accuracy(count: int = 1000, seed: int = 0) -> dict[str, float]:
    """Share of correct scenes of evaluation prompts that the oracle calls right.

    As rendered, after the VAE's round trip, and the latter apart for prompts without and with a held-out pair: the VAE
    has never seen a blue triangle, and that limits what anything behind it can draw.
    """
    rng, prompts = random.Random(seed), benchmark(count, seed=seed)
    images = render([place(p, rng) for p in prompts])
    vae = AutoencoderKL.from_pretrained(f"{find_preset('tiny-sdxl').base}/vae", dtype=torch.float32)
    rebuilt = torch.cat(
        [vae.decode(vae.encode(x * 2 - 1).latent_dist.mode()).sample / 2 + 0.5 for x in images.split(50)]
    )
    after = [v.strict for v in judge(rebuilt, prompts)]
    seen = [right for right, p in zip(after, prompts) if not p.held_out]
    held_out = [right for right, p in zip(after, prompts) if p.held_out]
    return {
        "as rendered": sum(v.strict for v in judge(images, prompts)) / count,
        "after the VAE": sum(after) / count,
        "after the VAE, seen pairs": sum(seen) / len(seen),
        "after the VAE, held-out pairs": sum(held_out) / len(held_out),
    }


@torch.no_grad()
def pooled_probe(encoder: str, count: int = 3000, seed: int = 0) -> dict[str, float]:
    """What a linear map reads from the one vector that an image encoder makes of a picture, on pictures apart.

    Shares of right answers about pictures of a single shape (colour, form) and of several alike (count); for pictures
    of two or three shapes, the share of variance explained of where a red one lies (place).
    """
    rng = random.Random(seed)
    vision = CLIPVisionModelWithProjection.from_pretrained(encoder, dtype=torch.float32)

    def embed(prompts: list[Prompt]) -> tuple[Tensor, list]:
        """Embeddings (B, W), with a constant, and the scenes."""
        scenes = [place(p, rng) for p in prompts]
        parts = [vision(x * 2 - 1).image_embeds for x in render(scenes).split(250)]
        x = F.layer_norm(torch.cat(parts), [vision.config.projection_dim])
        return torch.cat([x, torch.ones(len(x), 1)], dim=1), scenes

    def answers(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Ridge regression on two thirds; what it says of the others, and what is true."""
        cut = 2 * len(x) // 3
        gram = x[:cut].T @ x[:cut] + torch.eye(x.shape[1])
        return x[cut:] @ torch.linalg.solve(gram, x[:cut].T @ y[:cut]), y[cut:]

    def share(x: Tensor, labels: list[int]) -> float:
        """Right answers of a probe for classes."""
        said, true = answers(x, F.one_hot(torch.tensor(labels)).float())
        return (said.argmax(1) == true.argmax(1)).float().mean().item()

    x, scenes = embed([sample_prompt(rng, "single") for _ in range(count)])
    shares = {
        "colour": share(x, [COLOURS.index(scene[0].colour) for scene in scenes]),
        "form": share(x, [FORMS.index(scene[0].form) for scene in scenes]),
    }
    x, scenes = embed([sample_prompt(rng, "counting") for _ in range(count)])
    shares["count"] = share(x, [len(scene) for scene in scenes])
    several: list[Prompt] = []
    while len(several) < count:
        prompt = sample_prompt(rng, rng.choice(("two", "position", "complex")))
        if [colour for colour, _ in prompt.kinds].count("red") == 1:
            several.append(prompt)
    x, scenes = embed(several)
    where = torch.tensor([next((s.x, s.y) for s in scene if s.colour == "red") for scene in scenes])
    said, true = answers(x, where)
    shares["place"] = 1 - ((said - true).square().mean() / (true - where.mean(0)).square().mean()).item()
    return shares


@torch.no_grad()
def sight(mllm: MLLM, count: int = 300, seed: int = 0) -> dict[str, float]:
    """Does an MLLM know where things are?

    "seen" and "projected": of a patch's row and column, the share of variance that a linear map reads at patches with
    a shape, from the vision encoder's features and from what the projector makes of them. "told": how often a picture
    that is right for a relation satisfies the MLLM more than the same one with its two shapes exchanged; .5 is chance.
    """
    rng = random.Random(seed)
    prompts = [sample_prompt(rng, "position") for _ in range(count)]
    right = [place(p, rng) for p in prompts]
    wrong = [(replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)) for a, b in right]
    images, captions = render(right), [str(p) for p in prompts]
    scores = [mllm.satisfaction(to_pil(x), captions, range(count)) for x in (images, render(wrong))]
    inner = mllm.model.model
    states = inner.vision_tower(images * 2 - 1, output_hidden_states=True).hidden_states[-2][:, 1:]
    side = int(states.shape[1] ** 0.5)
    drawn = (images - images[..., :1, :1]).abs().sum(1, keepdim=True) > FIGURE
    covered = F.avg_pool2d(drawn.float(), images.shape[-1] // side).flatten(1) > 0.3
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double().expand(count, -1, -1)
    found = {"told": sum(a > b for a, b in zip(*scores)) / count}
    for name, features in (("seen", states), ("projected", inner.multi_modal_projector(states))):
        x, y = F.pad(features, (0, 1), value=1.0).double(), places
        cut = 2 * count // 3
        weights = torch.linalg.lstsq(x[:cut].flatten(0, 1), y[:cut].flatten(0, 1)).solution
        said, true = (x[cut:] @ weights)[covered[cut:]], y[cut:][covered[cut:]]
        found[name] = 1 - ((said - true).square().mean() / (true - true.mean(0)).square().mean()).item()
    return found


def sheet(path: str, count: int = 60) -> None:
    """A picture of what the base draws for validation prompts, with the oracle's verdicts; none is chosen."""
    from img_minimal.load import load_backbone
    from img_minimal.plots import labelled_grid

    prompts = benchmark(count, "validation")
    images = load_backbone(find_preset("tiny-sdxl")).draw([str(p) for p in prompts], [*range(count)], progress="draw")
    verdicts = judge(images, prompts)
    cells = [
        (picture, f'"{prompt}"\n{"right" if verdict.strict else verdict.words}')
        for picture, prompt, verdict in zip(to_pil(images), prompts, verdicts)
    ]
    right, unclear = (sum(getattr(v, kind) for v in verdicts) for kind in ("strict", "unclear"))
    title = f"{right} of {count} right; {unclear} hold a shape that nobody could name"
    labelled_grid([cells[k : k + 10] for k in range(0, count, 10)], path, title)


def main() -> None:
    """Print everything, or draw the sheet."""
    config = parse(Config, __doc__)
    quiet_libraries()
    if config.sheet:
        writable_file(config.sheet, "--sheet", PICTURES)
        sheet(config.sheet)
        return
    for name, share in oracle_accuracy().items():
        print(f"correct scenes the oracle calls right, {name:30} {share:.3f} (n 1000)")
    pictures = readings()
    for title, some in (("all", pictures), ("fresh", [p for p in pictures if p.fresh])):
        said = ", ".join(f"{name} {share:.3f}" for name, share in agreement(some).items())
        print(f"drawn pictures that the oracle and a person call alike, {title}: {said} (n {len(some)})")
    for kind, share in clip_against_foils().items():
        print(f"CLIP prefers the caption to one with a wrong {kind:24} {share:.3f} (n 500, chance 0.5)")
    for name in ("tiny-sdxl", "tiny-flux"):
        found = pooled_probe(find_preset(name).image_encoder)
        said = ", ".join(f"{kind} {share:.3f}" for kind, share in found.items())
        print(f"a linear map reads from the one pooled vector of {name}'s encoder: {said} (place: share of variance)")
    for name, folder in (("stock", find_preset("tiny-sdxl").stock_mllm), ("finetuned", find_preset("tiny-sdxl").mllm)):
        found = sight(MLLM.from_pretrained(folder))
        print(
            "the {} MLLM: a patch's place is in its vision features to {seen:.2f} of the variance, after its projector "
            "to {projected:.2f};\n  it prefers the right picture of a relation in {told:.2f} (chance 0.5)".format(
                name, **found
            )
        )


if __name__ == "__main__":
    run(main)
