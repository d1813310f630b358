"""A folder of drawn images that an evaluation can leave and come back to.

Images are named by prompt, seed and arm, and written whole or not at all. `settings.json` says what drew them, so that
images of two runs never mix.
"""

import json
from pathlib import Path

from PIL import Image
from torch import Tensor

from img_minimal.evaluate.prompt_files import FilePrompt
from img_minimal.runtime.atomic import file_print, write_whole
from img_minimal.runtime.errors import UserError
from img_minimal.runtime.images import png, to_pil
from img_minimal.runtime.json_files import read_json

NEW_SEED = 1_000_000  # added to a seed for the control that spends IMG's compute on another try
FIRST_SEED = 100_000  # times the run's seed plus one: images of two runs share none
ARMS = {
    "base": "base model",
    "new_seed": "same compute, new seed",
    "no_guidance": "second pass, the image's own tokens",
    "img": "IMG",
}
Batch = list[FilePrompt]


class ImageFolder:
    """Which images there should be of some prompts, which ones there are, and where."""

    def __init__(self, folder: Path, prompts: list[FilePrompt], seed: int, batch_size: int):
        self.folder, self.prompts, self.seed = folder, prompts, seed
        # Always the same batches: in another batch, sums are rounded otherwise, and a resumed run would differ.
        self.batches = [prompts[k : k + batch_size] for k in range(0, len(prompts), batch_size)]

    def seeds(self, batch: Batch, arm: str = "base") -> list[int]:
        """Of the images of an arm: the same in every arm but the one that is about seeds."""
        offset = FIRST_SEED * (self.seed + 1) + (NEW_SEED if arm == "new_seed" else 0)
        return [offset + prompt.index for prompt in batch]

    def path(self, prompt: FilePrompt, arm: str) -> Path:
        """Where that image is, or will be."""
        return self.folder / f"p{prompt.index:05d}-s{self.seeds([prompt], arm)[0]}-{arm}.png"

    def lacks(self, batch: Batch, *arms: str) -> bool:
        """Whether any image of the batch is still to be drawn."""
        return not all(self.path(prompt, arm).exists() for prompt in batch for arm in arms)

    def save(self, batch: Batch, arm: str, images: Tensor) -> None:
        """Keep images (B, 3, H, W) in [0, 1]."""
        for prompt, image in zip(batch, to_pil(images), strict=True):
            write_whole(self.path(prompt, arm), png(image))

    def load(self, batch: Batch, *arms: str) -> list[Image.Image]:
        """Images of a batch: prompt after prompt, arm after arm. Raises UserError if one is damaged."""
        images = []
        for path in (self.path(prompt, arm) for prompt in batch for arm in arms):
            try:
                images.append(Image.open(path).convert("RGB"))
            except (OSError, SyntaxError):  # Pillow has both for a damaged PNG
                raise UserError(f"{path}: damaged image; delete it and run again to have it drawn again") from None
        return images

    def claim(self, settings: dict) -> None:
        """Make the folder that of a run with these settings. Raises UserError if it holds another run's images."""
        note, settings = self.folder / "settings.json", json.loads(json.dumps(settings))
        unknown = "so its images have no known origin; choose another --output"
        kept = read_json(note, dict, unknown) if note.exists() else {}
        if not any(self.folder.glob("p*-s*-*.png")):
            kept = settings  # nothing was drawn: there is nothing to mix with
        for name in differing(kept, settings):
            raise UserError(
                f"{self.folder} holds a run with another {name} ({_short(kept.get(name))}; now "
                f"{_short(settings.get(name))}); repeat that run's options, or choose another --output"
            )
        write_whole(note, json.dumps(settings, indent=1))


def differing(kept: dict, settings: dict) -> list[str]:
    """Names of the settings in which two runs differ, one of which may lack some."""
    return [name for name in sorted(settings.keys() | kept.keys()) if kept.get(name) != settings.get(name)]


def content(value: object) -> object:
    """What files at a location hold, in short, so that a retrained model is another one; anything else as it is."""
    return file_print(Path(value)) if isinstance(value, str) and value and Path(value).exists() else value


def _short(value: object) -> str:
    words = json.dumps(value)
    return words if len(words) <= 60 else f"{words[:40]}... of {len(words)} characters"
