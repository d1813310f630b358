"""Models by name: where their files are and which numbers go with them. Presets differ in nothing else."""

from dataclasses import dataclass, replace
from pathlib import Path

from img_minimal.runtime.errors import UserError

TINY = Path(__file__).parent / "tiny" / "twins"


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """How `train.py --stage mllm` makes a detector of misalignment from the stock MLLM."""

    steps: int
    batch_size: int
    micro_batch: int  # samples at once; gradients of a batch are accumulated
    lr: float
    warmup: int  # steps
    constant_share: float  # of the steps at full rate, then linear to zero
    weight_decay: float
    lora_rank: int  # 0: all weights but the vision encoder's are trained
    optimizer: str = "adamw"  # or "muon", see img_minimal/runtime/optimizer.py
    chunk: int  # triplets of a stream that are at hand at once; 0 = all
    save_every: int  # steps between checkpoints


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Locations, and the settings of sampling and of training an aligner.

    A location is a local folder or file, or a place on the Hugging Face hub, see img_minimal/files/hub.py.
    """

    name: str
    backbone: str = "sdxl"  # a folder of img_minimal/backbones
    base: str  # diffusers pipeline folder
    unet: str | None = None  # instead of the base's own, which is then not loaded
    image_encoder: str  # CLIP vision model of the image prompt
    ip_adapter: str  # IP-Adapter Plus file: Resampler, and keys and values of every cross-attention
    resampler: str | None = None  # file that replaces the Resampler in the IP-Adapter file
    mllm: str  # LLaVA finetuned to see misalignment
    stock_mllm: str  # the same LLaVA before finetuning, for the ablation
    questions: str = "own"  # phrasings that the MLLM is asked in: "own", "released", or a JSON file
    aligner: str
    stock_aligner: str  # trained on the stock MLLM's features, for the ablation
    text_aligner: str  # trained on text embeddings instead of an MLLM's features, for the ablation
    pairs: str  # preference pairs, parquet with Pick-a-Pic's columns
    max_pairs: int  # how many of them an aligner is trained on by default; 0 = all
    world: str | None  # "tiny" where the exact oracle can judge
    # sampling
    sampling_steps: int
    guidance_scale: float
    true_cfg_scale: float = 1.0  # FLUX's classifier-free guidance, beside the embedding that guidance_scale is there
    negative_prompt: str | None = None  # None: as the model was made, for SDXL zeros and for FLUX the empty prompt
    height: int | None = None  # of the images, in pixels; None: the model's own
    width: int | None = None
    scale: float  # of the image tokens in the second pass, at its first step
    scale_end: float = 1.0  # share of it that is left at the last step, linear in between; 1 = constant
    passes: int  # applications of the aligner
    dtype: str | None = None  # fp32, bf16, fp16, mixed; None: by device, see img_minimal/runtime/devices.py
    offload: bool = False  # one big model on the GPU at a time
    draw_batch: int  # images drawn at once
    mllm_batch: int  # images the MLLM sees at once
    encode_batch: int  # images the CLIP encoder sees at once
    # training
    train_steps: int
    batch_size: int
    lr: float
    constant_share: float  # of the steps at full rate, then linear to zero; 1 = constant, as in the paper
    weight_decay: float
    preference_weight: float  # lambda
    norm: str  # of the squared distances, "mean" or "sum"
    identity_share: float  # at most so many more samples, in which a winner is its own target; 0 in the paper
    depth: int
    heads: int
    head_dim: int = 64
    optimizer: str = "adamw"  # or "muon", see img_minimal/runtime/optimizer.py
    round_steps: int  # of a later round, and the prompts that it draws to make pairs of
    round_prompts: int
    save_every: int  # steps between checkpoints
    cache_dir: str  # where frozen features are kept; "none": they are computed as pairs stream by
    chunk_pairs: int  # pairs of a stream that are at hand at once; 0 = all
    triplets: str  # for finetuning the MLLM: images, prompts and edit instructions in InstructPix2Pix's columns
    finetuning: Finetuning

    def guide(self, kind: str) -> str:
        """Where the model that guides is: "mllm", the finetuned one, "stock", or the base whose "text" is embedded."""
        return {"mllm": self.mllm, "stock": self.stock_mllm, "text": self.base}[kind]


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
        max_pairs=0,
        world="tiny",
        sampling_steps=10,
        guidance_scale=4.0,
        scale=1.6,
        scale_end=0.05,
        passes=1,
        dtype="mixed",
        draw_batch=64,
        mllm_batch=64,
        encode_batch=250,
        train_steps=2000,
        batch_size=64,
        lr=2e-3,
        constant_share=0.4,
        weight_decay=1e-4,
        preference_weight=1.0,
        norm="sum",
        identity_share=0.15,
        depth=4,
        heads=4,
        head_dim=32,
        optimizer="muon",
        round_steps=300,
        round_prompts=1000,
        save_every=200,
        cache_dir="outputs/features",
        chunk_pairs=8192,
        triplets=str(TINY / "triplets.parquet"),
        finetuning=Finetuning(
            steps=2000,
            batch_size=64,
            micro_batch=64,
            lr=2e-3,
            optimizer="muon",
            warmup=100,
            constant_share=0.3,
            weight_decay=0.02,
            lora_rank=0,
            chunk=0,
            save_every=200,
        ),
    ),
    # What the authors released, with the settings of their sampler and of the paper's training.
    "sdxl": Preset(
        name="sdxl",
        base="stabilityai/stable-diffusion-xl-base-1.0",
        image_encoder="shi-labs/IMG/image_encoder",
        ip_adapter="shi-labs/IMG/ip-adapter-plus_sdxl_vit-h.bin",
        resampler="shi-labs/IMG/resampler.pth",
        mllm="shi-labs/IMG/llava",
        stock_mllm="llava-hf/llava-1.5-13b-hf",
        questions="released",
        aligner="shi-labs/IMG/aligner_sdxl.pth",
        stock_aligner="outputs/sdxl-stock/aligner.safetensors",
        text_aligner="outputs/sdxl-text/aligner.safetensors",
        pairs="data-is-better-together/open-image-preferences-v1-binarized",  # Pick-a-Pic is gone from the hub
        max_pairs=0,
        world=None,
        sampling_steps=50,
        guidance_scale=7.5,
        scale=0.2,
        passes=3,
        draw_batch=1,
        mllm_batch=8,
        encode_batch=32,
        train_steps=100_000,
        batch_size=8,
        lr=1e-4,
        constant_share=1.0,
        weight_decay=1e-4,
        preference_weight=1.0,
        norm="sum",
        identity_share=0.0,
        depth=4,
        heads=20,
        round_steps=5000,
        round_prompts=4000,
        save_every=1000,
        cache_dir="none",
        chunk_pairs=512,
        triplets="timbrooks/instructpix2pix-clip-filtered",
        # LLaVA's published settings for LoRA; one epoch of 313 K triplets.
        finetuning=Finetuning(
            steps=2446,
            batch_size=128,
            micro_batch=8,
            lr=2e-4,
            warmup=73,
            constant_share=0.0,
            weight_decay=0.0,
            lora_rank=128,
            chunk=2048,
            save_every=50,
        ),
    ),
}
# The aligner belongs to the base's IP-Adapter, not to its UNet, so a finetuned UNet shares it.
PRESETS["tiny-sdxl-dpo"] = replace(PRESETS["tiny-sdxl"], name="tiny-sdxl-dpo", unet=str(TINY / "unet-dpo"))
PRESETS["sdxl-dpo"] = replace(PRESETS["sdxl"], name="sdxl-dpo", unet="mhdang/dpo-sdxl-text2image-v1/unet")


PRESETS["flux"] = replace(
    PRESETS["sdxl"],
    name="flux",
    backbone="flux",
    base="black-forest-labs/FLUX.1-dev",
    image_encoder="openai/clip-vit-large-patch14",
    ip_adapter="XLabs-AI/flux-ip-adapter/ip_adapter.safetensors",
    resampler=None,
    aligner="shi-labs/IMG/aligner_flux.pth",
    stock_aligner="outputs/flux-stock/aligner.safetensors",
    text_aligner="outputs/flux-text/aligner.safetensors",
    sampling_steps=30,
    guidance_scale=3.5,
    true_cfg_scale=3.5,
    dtype="bf16",  # T5 overflows in fp16
)


# The twin shares the world, the MLLM and the pairs of the other one.
PRESETS["tiny-flux"] = replace(
    PRESETS["tiny-sdxl"],
    name="tiny-flux",
    backbone="flux",
    base=str(TINY / "flux"),
    image_encoder=str(TINY / "flux_image_encoder"),
    ip_adapter=str(TINY / "flux_ip_adapter.safetensors"),
    aligner=str(TINY / "aligner-flux.safetensors"),
    stock_aligner=str(TINY / "aligner-flux-stock.safetensors"),
    text_aligner=str(TINY / "aligner-flux-text.safetensors"),
    sampling_steps=12,
    guidance_scale=3.5,
    true_cfg_scale=3.5,
    height=64,
    width=64,
)


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises UserError naming the known ones."""
    if name not in PRESETS:
        raise UserError(f"unknown model {name!r}; this version has: {', '.join(PRESETS)}")
    return PRESETS[name]


def with_overrides(preset: Preset, **values: object) -> Preset:
    """The preset with those of `values` that are not None."""
    return replace(preset, **{key: value for key, value in values.items() if value is not None})
