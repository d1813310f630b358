"""Named presets: file locations and hyperparameters of every supported model.

Presets differ in nothing else. A field with a help line is also a command-line flag that overrides
this one value.
"""

from dataclasses import MISSING as REQUIRED
from dataclasses import dataclass, fields, replace
from pathlib import Path

from img_minimal.cli import check, check_value, option

TWINS = Path(__file__).parent / "tiny" / "twins"


class Settings:
    """Values that are checked alike, whether they come from a command line or from Python."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if "bare" in field.metadata and isinstance(value, bool):
                value = field.metadata["bare"] if value else field.default
                object.__setattr__(self, field.name, value)
            check_value(field, value)


@dataclass(frozen=True, kw_only=True)
class Models(Settings):
    """Frozen models: local folders or files, or places on the Hugging Face hub (hub/where.py)."""

    base: str = option(REQUIRED, "base model: diffusers pipeline, folder or hub id")
    unet: str | None = option(
        None, "UNet that replaces the base's, e.g. mhdang/dpo-sdxl-text2image-v1/unet"
    )
    image_encoder: str = option(REQUIRED, "CLIP vision model of the image prompt")
    ip_adapter: str = option(REQUIRED, "IP-Adapter file (.bin, .safetensors)")
    resampler: str | None = option(
        None, "file that replaces the adapter's Resampler; '' keeps the adapter's own"
    )
    mllm: str = option(REQUIRED, "MLLM that sees misalignment, folder or hub id")
    stock_mllm: str  # the same MLLM before finetuning
    questions: str = option("own", "phrasings of the question: own, released, or a JSON list")
    dtype: str | None = option(
        None,
        "precision of the big models (default: by device)",
        choices=["fp32", "bf16", "fp16", "mixed"],
    )
    offload: str = option(
        "none",
        "what waits in RAM: models that are not in use (a bare --offload), of large ones all layers"
        " but the one in use, or what the GPU's free memory asks for",
        choices=["none", "models", "layers", "auto"],
        bare="models",
    )
    encode_batch: int  # images that the vision encoder sees at once
    mllm_batch: int  # images that the MLLM sees at once


@dataclass(frozen=True, kw_only=True)
class Sampling(Settings):
    """Settings of drawing and aligning."""

    aligner: str = option(REQUIRED, "aligner file, e.g. outputs/train/aligner.safetensors")
    stock_aligner: str  # trained on the stock MLLM's features, for the ablation
    text_aligner: str  # trained on text embeddings instead of an MLLM's features
    steps: int = option(REQUIRED, "denoising steps", least=1, most=10_000)
    guidance_scale: float = option(
        REQUIRED, "classifier-free guidance scale (FLUX: embedded)", most=1000
    )
    true_cfg_scale: float = 1.0  # FLUX's classifier-free guidance, on top of the embedded one
    authors_sampler: bool = True  # FLUX: the authors' shift, and true guidance from step 1 on
    negative_prompt: str | None = option(
        None, "what not to draw (default: zeros for SDXL, the empty prompt for FLUX)"
    )
    passes: int = option(REQUIRED, "times the aligner is applied", least=1, most=100)
    scale: float = option(REQUIRED, "weight of the image tokens at the first step", most=1000)
    scale_end: float = option(1.0, "fraction of --scale left at the last step, linear", most=1000)
    draft_steps: int | None = option(
        None, "denoising steps of pictures that only the MLLM sees (default: all)", least=1
    )
    only_wrong: bool = option(False, "correct only the pictures that the MLLM finds wrong")
    height: int | None = option(
        None, "image height in pixels (default: the model's)", least=1, most=8192
    )
    width: int | None = option(
        None, "image width in pixels (default: the model's)", least=1, most=8192
    )
    draw_batch: int  # images drawn at once

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = (self.draft_steps or 1) <= self.steps
        check(fits, f"--draft-steps is {self.draft_steps}, above the {self.steps} of --steps")


@dataclass(frozen=True, kw_only=True)
class Data(Settings):
    """Training data, and where its features are kept."""

    pairs: str = option(REQUIRED, "preference pairs: hub id, folder or table file")
    max_pairs: int = option(0, "number of pairs to use, 0 for all")
    triplets: str = option(REQUIRED, "--stage mllm: edit triplets, hub id, folder or table file")
    identity_share: float = 0.0  # share of extra samples whose winner is its own target; paper: 0
    cache_dir: str = option("none", "folder that caches features; none: recompute as pairs stream")


@dataclass(frozen=True, kw_only=True)
class Training(Settings):
    """Settings of training an aligner or, with `--stage mllm`, of finetuning the MLLM."""

    steps: int = option(REQUIRED, "training steps", least=1, most=10**9)
    batch_size: int = option(REQUIRED, "samples per step", least=1, most=100_000)
    micro_batch: int = 8  # samples of the MLLM's forward pass; gradients are accumulated
    optimizer: str = "adamw"  # or "muon"
    lr: float = option(REQUIRED, "learning rate", least=1e-12, most=1000)
    warmup: int = 1  # steps
    constant_share: float  # of the steps at full rate, then linear to zero; the paper: 1
    weight_decay: float
    chunk: int = 0  # rows of a stream in memory at once; 0 = all
    save_every: int = option(REQUIRED, "steps between checkpoints", least=1)
    # of an aligner
    preference_weight: float = option(1.0, "lambda, the weight of the preference term")
    norm: str = option(
        "sum", "average or sum squared distances over elements", choices=["mean", "sum"]
    )
    depth: int = 4
    heads: int = 20
    head_dim: int = 64
    round_steps: int = option(5000, "training steps of a later round", least=1, most=10**9)
    round_prompts: int = option(4000, "prompts drawn in a later round", least=1, most=100_000)
    # of an MLLM
    lora_rank: int = 0  # 0 trains everything but the vision encoder


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Everything that distinguishes one supported model from another."""

    name: str
    backbone: str = "sdxl"  # or "flux"
    world: str | None = None  # "tiny" where the exact oracle can judge
    models: Models
    sampling: Sampling
    data: Data
    training: Training
    finetuning: Training

    def guide(self, guidance: str) -> str:
        """Locate what guides: the "mllm", the "stock" one, or the base, whose "text" is used."""
        models = self.models
        guides = {"mllm": models.mllm, "stock": models.stock_mllm, "text": models.base}
        known = ", ".join(guides)
        check(guidance in guides, f"unknown guidance {guidance!r}; expected one of: {known}")
        return guides[guidance]

    def guided_by(self, guidance: str) -> "Preset":
        """Copy the preset with the MLLM and the aligner that belong to a guidance."""
        self.guide(guidance)  # raises UserError for an unknown one
        if guidance == "text":
            return self.changed(aligner=self.sampling.text_aligner)
        if guidance == "stock":
            stock = {"mllm": self.models.stock_mllm, "aligner": self.sampling.stock_aligner}
            return self.changed(**stock)
        return self

    def changed(
        self, parts: tuple[str, ...] = ("models", "sampling"), **changes: object
    ) -> "Preset":
        """Copy the preset with other values for fields of these parts.

        Raises UserError for a name that none of the parts has.
        """
        copies, unknown = {}, set(changes)
        for name in parts:
            part = getattr(self, name)
            own = {f.name: changes[f.name] for f in fields(part) if f.name in changes}
            unknown -= own.keys()
            copies[name] = replace(part, **own)
        check(not unknown, f"unknown setting {min(unknown, default='')!r}; see presets.py")
        return replace(self, **copies)


def twin(**places: str) -> dict[str, str]:
    """Complete the paths of files in the twins' folder."""
    return {name: str(TWINS / place) for name, place in places.items()}


TINY_SDXL = Preset(
    name="tiny-sdxl",
    world="tiny",
    models=Models(
        **twin(
            base="sdxl",
            image_encoder="image_encoder",
            ip_adapter="ip_adapter.safetensors",
            mllm="llava-detector",
            stock_mllm="llava-stock",
        ),
        dtype="mixed",
        encode_batch=250,
        mllm_batch=64,
    ),
    sampling=Sampling(
        **twin(
            aligner="aligner.safetensors",
            stock_aligner="aligner-stock.safetensors",
            text_aligner="aligner-text.safetensors",
        ),
        steps=10,
        guidance_scale=4.0,
        passes=1,
        # Early steps decide where things are, late ones which colour they have exactly, and that
        # the text knows better: a falling scale beats the best constant one.
        scale=1.6,
        scale_end=0.05,
        draw_batch=64,
    ),
    data=Data(
        **twin(pairs="pairs.parquet", triplets="triplets.parquet"),
        max_pairs=8192,
        identity_share=0.15,
        cache_dir="outputs/features",
    ),
    training=Training(
        steps=1000,
        batch_size=64,
        optimizer="muon",
        lr=5e-3,
        constant_share=0.4,
        weight_decay=1e-4,
        chunk=8192,
        save_every=200,
        # The preference term lengthens the correction, which does not pay here: b* is 1
        # (preference.py). For real models it is the paper's 1.
        preference_weight=0.0,
        heads=4,
        head_dim=32,
        round_steps=300,
        round_prompts=1000,
    ),
    finetuning=Training(
        steps=2000,
        batch_size=64,
        micro_batch=64,
        optimizer="muon",
        lr=2e-3,
        warmup=100,
        constant_share=0.3,
        weight_decay=0.02,
        save_every=200,
    ),
)
# The authors' release, with their sampler's settings and the paper's training settings.
SDXL = Preset(
    name="sdxl",
    models=Models(
        base="stabilityai/stable-diffusion-xl-base-1.0",
        image_encoder="shi-labs/IMG/image_encoder",
        ip_adapter="shi-labs/IMG/ip-adapter-plus_sdxl_vit-h.bin",
        resampler="shi-labs/IMG/resampler.pth",
        mllm="shi-labs/IMG/llava",
        stock_mllm="llava-hf/llava-1.5-13b-hf",
        questions="released",
        encode_batch=32,
        mllm_batch=8,
    ),
    sampling=Sampling(
        aligner="shi-labs/IMG/aligner_sdxl.pth",
        stock_aligner="outputs/sdxl-stock/aligner.safetensors",
        text_aligner="outputs/sdxl-text/aligner.safetensors",
        steps=50,
        guidance_scale=7.5,
        passes=3,
        scale=0.2,
        draw_batch=1,
    ),
    data=Data(
        # Pick-a-Pic, the paper's data, has been removed from the hub.
        pairs="data-is-better-together/open-image-preferences-v1-binarized",
        triplets="timbrooks/instructpix2pix-clip-filtered",
    ),
    training=Training(
        steps=100_000,
        batch_size=8,
        lr=1e-4,
        constant_share=1.0,
        weight_decay=1e-4,
        chunk=512,
        save_every=1000,
    ),
    # LLaVA's published LoRA settings; one epoch of 313 K triplets.
    finetuning=Training(
        steps=2446,
        batch_size=128,
        lr=2e-4,
        warmup=73,
        constant_share=0.0,
        weight_decay=0.0,
        chunk=2048,
        save_every=50,
        lora_rank=128,
    ),
)
FLUX = SDXL.changed(
    base="black-forest-labs/FLUX.1-dev",
    image_encoder="openai/clip-vit-large-patch14",
    ip_adapter="XLabs-AI/flux-ip-adapter/ip_adapter.safetensors",
    resampler=None,
    dtype="bf16",  # T5 overflows in fp16
    aligner="shi-labs/IMG/aligner_flux.pth",
    stock_aligner="outputs/flux-stock/aligner.safetensors",
    text_aligner="outputs/flux-text/aligner.safetensors",
    steps=30,
    guidance_scale=3.5,
    true_cfg_scale=3.5,
)
# The FLUX twin shares the world, the MLLM and the pairs of the SDXL twin.
TINY_FLUX = TINY_SDXL.changed(
    **twin(
        base="flux",
        image_encoder="flux_image_encoder",
        ip_adapter="flux_ip_adapter.safetensors",
        aligner="aligner-flux.safetensors",
        stock_aligner="aligner-flux-stock.safetensors",
        text_aligner="aligner-flux-text.safetensors",
    ),
    steps=12,
    guidance_scale=3.5,
    true_cfg_scale=3.5,
    height=64,
    width=64,
)
# An aligner belongs to the base's IP-Adapter, not to its UNet, so a finetuned UNet shares it.
TINY_SDXL_DPO = TINY_SDXL.changed(**twin(unet="unet-dpo"))
SDXL_DPO = SDXL.changed(unet="mhdang/dpo-sdxl-text2image-v1/unet")

PRESETS = {
    "tiny-sdxl": TINY_SDXL,
    "sdxl": SDXL,
    "tiny-sdxl-dpo": replace(TINY_SDXL_DPO, name="tiny-sdxl-dpo"),
    "sdxl-dpo": replace(SDXL_DPO, name="sdxl-dpo"),
    "flux": replace(FLUX, name="flux", backbone="flux"),
    "tiny-flux": replace(TINY_FLUX, name="tiny-flux", backbone="flux"),
}


def find_preset(name: str | Preset) -> Preset:
    """Look up a preset by its name. Raises UserError listing the known names."""
    if isinstance(name, Preset):
        return name
    check(name in PRESETS, f"unknown model {name!r}; this version has: {', '.join(PRESETS)}")
    return PRESETS[name]
