"""Rebuild the twins from nothing: `python -m img_minimal.tiny.build` for all, or name parts.

    python -m img_minimal.tiny.build vae clip          # two parts
    python -m img_minimal.tiny.build --list            # what there is, in order

Every part has a fixed seed and goes on where it was stopped.
"""

import argparse
from importlib import import_module
from pathlib import Path

from img_minimal.cli import run
from img_minimal.presets import TWINS

# The module of each part, which has a function `build_PART(workdir, target)`, and a description.
PARTS = {
    "vae": ("encoders", "pictures <-> latents"),
    "clip": ("encoders", "text encoders and vision encoder, contrastively"),
    "scenes": ("sdxl", "the base model's training data, as features"),
    "resampler": (
        "image_tokens",
        "image features -> 16 image tokens, as an autoencoder of latents",
    ),
    "unet": ("sdxl", "UNet and image branch together"),
    "stock": ("llava", "LLaVA that describes pictures"),
    "drawings": ("tables", "24,000 images of the base"),
    "pairs": ("tables", "preference pairs from them"),
    "dpo": ("sdxl", "the UNet finetuned on these pairs with Diffusion-DPO"),
    "triplets": (
        "tables",
        "picture, prompt of the edited scene, edit instruction: of these drawings, and of "
        "rendered scenes",
    ),
    "detector": ("llava", "LLaVA finetuned on the triplets"),
    "aligner": ("fit", "three aligners: guided by the detector, the stock LLaVA, text"),
    "flux-encoder": (
        "image_tokens",
        "FLUX's image encoder, whose one vector a picture must suffice to rebuild it",
    ),
    "flux": ("flux", "FLUX's transformer, T5 and image branch together"),
    "flux-aligner": ("fit", "three aligners for it, on the shipped pairs"),
}


def main() -> None:
    """Build the named parts, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ", ".join(PARTS)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of: {known} (default: all)")
    folder = "outputs/tiny-build"
    parser.add_argument("--workdir", default=folder, help="checkpoints and intermediate data")
    parser.add_argument("--target", default=TWINS, help="where the finished twins go")
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    options = parser.parse_args()
    if options.list:
        for part, (_, text) in PARTS.items():
            print(f"{part:10} {text}")
        return
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}; known: {known}")
    workdir, target = Path(options.workdir), Path(options.target)
    workdir.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    for part in options.parts or PARTS:
        module, text = PARTS[part]
        print(f"== {part}: {text}", flush=True)
        # Imported only now: torch takes seconds.
        module = import_module(f"img_minimal.tiny.build.{module}")
        getattr(module, f"build_{part.replace('-', '_')}")(workdir, target)
        import_module("img_minimal.tiny.build.fit").forget_paths(target)


if __name__ == "__main__":
    run(main)
