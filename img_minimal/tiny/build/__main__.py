"""Rebuild the twins from nothing: `python -m img_minimal.tiny.build` for all, or name parts.

    python -m img_minimal.tiny.build vae clip          # two parts
    python -m img_minimal.tiny.build --list            # what there is, in order

Every part has a fixed seed and goes on where it was stopped. Times are for two cores.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from img_minimal.cli import run
from img_minimal.presets import TINY, find_preset

PARTS = {
    "vae": "pictures <-> latents",
    "clip": "text encoders and vision encoder, contrastively",
    "scenes": "the base model's training data, as features",
    "resampler": "image features -> 16 image tokens, as an autoencoder of latents",
    "unet": "UNet and image branch together",
    "stock": "LLaVA that describes pictures",
    "drawings": "24,000 images of the base",
    "pairs": "preference pairs from them",
    "dpo": "the UNet finetuned on these pairs with Diffusion-DPO",
    "triplets": "picture, prompt of the edited scene, edit instruction: of these drawings, and of rendered scenes",
    "detector": "LLaVA finetuned on the triplets",
    "aligner": "three aligners: guided by the detector, the stock LLaVA, text",
    "flux-encoder": "FLUX's image encoder, whose one vector a picture must suffice to rebuild it",
    "flux": "FLUX's transformer, T5 and image branch together",
    "flux-aligner": "three aligners for it, on the shipped pairs",
}


def train_aligners(workdir: Path, target: Path) -> None:
    """Run train.py on 110 K pairs once for each kind of guidance, and keep the weights. The features take 15 GB."""
    from img_minimal.aligner import ImplicitAligner
    from img_minimal.tiny.build.loop import run_train

    data = ("--pairs", workdir / "pairs.parquet", "--max-pairs", 110_000, "--cache-dir", workdir / "features")
    steps = ("--steps", 6000, "--save-every", 500, "--eval-prompts", 0)
    for guidance, name in (("mllm", "aligner"), ("stock", "aligner-stock"), ("text", "aligner-text")):
        folder = workdir / name
        run_train(folder, "--guidance", guidance, *data, "--preference-weight", 0, *steps)
        ImplicitAligner.from_file(folder / "aligner.safetensors").half().save(target / f"{name}.safetensors")


def train_flux_aligners(workdir: Path, target: Path) -> None:
    """The same for FLUX, on the pairs that the repository ships: all bases learn from the same, as in the paper."""
    from img_minimal.aligner import ImplicitAligner
    from img_minimal.tiny.build.loop import run_train

    data = ("--model", "tiny-flux", "--max-pairs", 0, "--cache-dir", workdir / "features")
    steps = ("--steps", 2000, "--save-every", 500, "--eval-prompts", 0)
    for guidance, name in (("mllm", "aligner-flux"), ("stock", "aligner-flux-stock"), ("text", "aligner-flux-text")):
        folder = workdir / name
        run_train(folder, "--guidance", guidance, *data, "--preference-weight", 0, *steps)
        ImplicitAligner.from_file(folder / "aligner.safetensors").half().save(target / f"{name}.safetensors")


def main() -> None:
    """Build the named parts, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--workdir", default="outputs/tiny-build", help="checkpoints and intermediate data")
    parser.add_argument("--target", default=str(TINY), help="where the finished twins go")
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{name:10} {text}" for name, text in PARTS.items()))
        return
    unknown = [p for p in options.parts if p not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    # Only now what takes seconds to import.
    from img_minimal.tiny.build import (
        clip,
        dpo,
        drawings,
        flux,
        flux_encoder,
        llava,
        pairs,
        resampler,
        scenes,
        triplets,
        unet,
        vae,
    )  # fmt: skip
    from img_minimal.tiny.build.loop import forget_paths

    workdir, target = Path(options.workdir), Path(options.target)
    workdir.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    here = {
        "base": str(target / "sdxl"),
        "image_encoder": str(target / "image_encoder"),
        "ip_adapter": str(target / "ip_adapter.safetensors"),
    }
    build = {
        "vae": lambda: vae.build(workdir, target / "sdxl" / "vae"),
        "clip": lambda: clip.build(workdir, target),
        "scenes": lambda: scenes.build(workdir, target),
        "resampler": lambda: resampler.build(workdir, target),
        "unet": lambda: unet.build(workdir, target),
        "stock": lambda: llava.build_stock(workdir, target),
        "drawings": lambda: drawings.draw(workdir, replace(find_preset("tiny-sdxl"), **here)),
        "pairs": lambda: pairs.build(workdir, target),
        "dpo": lambda: dpo.build(workdir, target),
        "triplets": lambda: triplets.build(workdir, target),
        "detector": lambda: llava.build_detector(workdir, target),
        "aligner": lambda: train_aligners(workdir, target),
        "flux-encoder": lambda: flux_encoder.build(workdir, target),
        "flux": lambda: flux.build(workdir, target),
        "flux-aligner": lambda: train_flux_aligners(workdir, target),
    }
    for part in options.parts or PARTS:
        print(f"== {part}: {PARTS[part]}", flush=True)
        build[part]()
        forget_paths(target)


if __name__ == "__main__":
    run(main)
