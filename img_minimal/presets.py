"""Models by name: where their files are and which numbers go with them. Presets differ in nothing else."""

from dataclasses import dataclass, replace
from pathlib import Path

from img_minimal.errors import UserError

TINY = Path(__file__).parent / "tiny" / "twins"


@dataclass(frozen=True)
class Preset:
    """Paths (local folders or files), and the settings of sampling and of training an aligner."""

    name: str
    base: str  # diffusers pipeline folder
    image_encoder: str  # CLIP vision model of the image prompt
    ip_adapter: str  # IP-Adapter Plus file: Resampler, and keys and values of every cross-attention
    mllm: str  # LLaVA finetuned to see misalignment
    stock_mllm: str  # the same LLaVA before finetuning, for the ablation
    aligner: str
    stock_aligner: str  # trained on the stock MLLM's features, for the ablation
    text_aligner: str  # trained on text embeddings instead of an MLLM's features, for the ablation
    pairs: str  # preference pairs, parquet with Pick-a-Pic's columns
    max_pairs: int  # how many of them an aligner is trained on by default; 0 = all
    world: str | None  # "tiny" where the exact oracle can judge
    # sampling
    sampling_steps: int
    guidance_scale: float
    scale: float  # of the image tokens in the second pass
    passes: int  # applications of the aligner
    # training
    train_steps: int
    batch_size: int
    lr: float
    constant_share: float  # of the steps at full rate, then linear to zero; 1 = constant, as in the paper
    weight_decay: float
    weight: float  # lambda
    norm: str  # of the squared distances, "mean" or "sum"
    keep_share: float  # share of samples in which the winner is its own target; 0 in the paper
    depth: int
    heads: int


PRESETS = {
    "tiny-sdxl": Preset(
        name="tiny-sdxl",
        base=str(TINY / "sdxl"),
        image_encoder=str(TINY / "image_encoder"),
        ip_adapter=str(TINY / "ip_adapter.safetensors"),
        mllm=str(TINY / "llava-detector"),
        stock_mllm=str(TINY / "llava-stock"),
        aligner=str(TINY / "aligner.safetensors"),
        stock_aligner=str(TINY / "aligner-stock.safetensors"),
        text_aligner=str(TINY / "aligner-text.safetensors"),
        pairs=str(TINY / "pairs.parquet"),
        max_pairs=10_000,
        world="tiny",
        sampling_steps=10,
        guidance_scale=4.0,
        scale=0.5,
        passes=1,
        train_steps=1200,
        batch_size=64,
        lr=1e-3,
        constant_share=0.4,
        weight_decay=1e-4,
        weight=1.0,
        norm="sum",
        keep_share=0.25,
        depth=4,
        heads=2,
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises UserError naming the known ones."""
    if name not in PRESETS:
        raise UserError(f"unknown model {name!r}; this version has: {', '.join(PRESETS)}")
    return PRESETS[name]


def with_overrides(preset: Preset, **values: object) -> Preset:
    """The preset with those of `values` that are not None."""
    return replace(preset, **{key: value for key, value in values.items() if value is not None})
