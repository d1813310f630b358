"""IMG from end to end (Fig. 2): draw, look, align, draw again with the same seed.

    prompt --backbone--> image --MLLM--> h  \\
                           |                 aligner --> tokens --backbone, same prompt and seed--> better image
                           +--image prompt--> c_l /

Nothing here knows which text-to-image model draws, where files are, or what a command line is.
"""

from collections.abc import Sequence

from PIL.Image import Image
from torch import Tensor

from img_minimal.aligner import ImplicitAligner, align
from img_minimal.backbones import Backbone
from img_minimal.mllm import Guide, guidance_features
from img_minimal.runtime.images import to_pil


class IMG:
    """The whole method: `img = load_img("tiny-sdxl")`, then `img(["a red circle"], [0])`."""

    def __init__(
        self, backbone: Backbone, guide: Guide, aligner: ImplicitAligner, passes: int = 1, mllm_batch: int = 64
    ):
        """`passes`: applications of the aligner; `mllm_batch`: images that the MLLM sees at once."""
        self.backbone = backbone
        self.guide = guide
        self.aligner = aligner.eval()
        self.passes = passes
        self.mllm_batch = mllm_batch
        self.placement = backbone.placement
        self.placement.add("aligner", aligner)
        if hasattr(guide, "model"):
            self.placement.add("mllm", guide.model)

    def _bring_guide(self) -> None:
        if hasattr(self.guide, "model"):  # guidance by text has no model of its own
            self.placement.bring("mllm", self.guide.model)

    def guidance(
        self, images: list[Image], prompts: list[str], seeds: Sequence[int], progress: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Step 2: guidance features h (B, L, H) and their mask (B, L). An image's seed draws the question about it."""
        self._bring_guide()
        return guidance_features(self.guide, images, prompts, seeds, self.mllm_batch, progress)

    def correct(self, tokens: Tensor, features: Tensor, mask: Tensor, passes: int | None = None) -> Tensor:
        """Step 3: f(h, c), tokens (B, N, D) -> aligned tokens (B, N, D)."""
        self.placement.bring("aligner", self.aligner)
        return align(self.aligner, tokens, features, mask, passes or self.passes)

    def align(self, images: Tensor, prompts: list[str], seeds: Sequence[int], passes: int | None = None) -> Tensor:
        """Steps 2 and 3: images (B, 3, H, W) -> aligned tokens (B, N, D)."""
        pictures = to_pil(images)
        features, mask = self.guidance(pictures, prompts, seeds)
        return self.correct(self.backbone.tokens(pictures), features, mask, passes)

    def explain(self, images: list[Image], prompts: list[str], seeds: Sequence[int]) -> list[str]:
        """What the MLLM answers in words; needed by people, not by the method."""
        self._bring_guide()
        return self.guide.explain(images, prompts, seeds)

    def satisfaction(self, images: list[Image], prompts: list[str], seeds: Sequence[int]) -> list[float]:
        """Log-probability that the MLLM says "nothing" is wrong, of each image."""
        self._bring_guide()
        return self.guide.satisfaction(images, prompts, seeds, self.mllm_batch)

    def better(self, first: list[Image], second: list[Image], prompts: list[str], seeds: Sequence[int]) -> list[bool]:
        """Of each pair of images, whether the MLLM is more content with the second one. Costs no drawing."""
        scores = (self.satisfaction(images, prompts, seeds) for images in (first, second))
        return [after > before for before, after in zip(*scores)]

    def __call__(
        self, prompts: list[str], seeds: list[int], *, rounds: int = 1, progress: bool = False
    ) -> list[Tensor]:
        """Initial images and those of each round, `rounds + 1` tensors (B, 3, H, W) in [0, 1].

        Every round looks at the latest images and draws again from the same seeds.
        """
        images = [self.backbone.draw(prompts, seeds, progress="initial" if progress else None)]
        for k in range(rounds):
            tokens = self.align(images[-1], prompts, [seed + k for seed in seeds])
            title = f"round {k + 1}" if progress else None
            images.append(self.backbone.draw(prompts, seeds, tokens, progress=title))
        return images
