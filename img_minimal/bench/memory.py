"""Compute what the public models take at true size, without a GPU, a download, or a weight.

    python -m img_minimal.bench memory --model flux --mllm llava-7b

Models are built on PyTorch's meta device, where tensors have shapes and no values. Weights are
counted. Activations are the largest sum of tensors alive at once during a forward pass and, for
training, a backward pass. Attention counts as fused, without attention maps. CUDA, cuDNN and the
allocator need more; `usable` leaves room for them.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from img_minimal import flux, sdxl
from img_minimal.aligner import ImplicitAligner
from img_minimal.devices import LARGE, count_parameters
from img_minimal.files import Clock
from img_minimal.presets import find_preset

Calls = dict[str, Callable[[], object]]

GIB, CARDS = 2**30, (12, 16, 24, 40, 80)
MLLM_TOKENS = 640  # 576 of the image, the rest of the question
TOKENS = {"sdxl": (16, 2048), "flux": (4, 4096)}  # (N, D) of an image
OTHERS = {"mllm": ("mllm",), "aligner": ("aligner",)}
# What is on the GPU together; with --offload, one group at a time.
GROUPS = {
    "sdxl": {
        "diffusion": ("unet", "branch", "text_encoder", "text_encoder_2", "vae"),
        "image prompt": ("image_encoder", "resampler"),
        **OTHERS,
    },
    "flux": {
        "diffusion": ("transformer", "branch", "vae"),
        "text": ("text_encoder", "text_encoder_2"),
        "image prompt": ("image_encoder", "projection"),
        **OTHERS,
    },
}
TRAIN = "train the aligner"
OWN = "**IMG's own steps**, of both drawings"
DRAFT = 0.3  # of the denoising steps, in the rows of drafts
ALWAYS_FP32 = {
    "sdxl": ("vae", "resampler", "aligner"),
    "flux": ("vae", "image_encoder", "projection", "aligner"),
}


# The public models' settings, where they differ from the libraries' defaults


def sizes(width: int, inner: int, layers: int, heads: int, **more: int) -> dict[str, int]:
    """Name the sizes of a transformer as the settings of CLIP and Llama do."""
    return dict(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **more,
    )


SDXL_UNET = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=2,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
    use_linear_projection=True,
)
FLUX_TRANSFORMER = dict(guidance_embeds=True)
SDXL_VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
)
FLUX_VAE = dict(
    **SDXL_VAE,
    latent_channels=16,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
CLIP_L = sizes(768, 3072, 12, 12)
BIG_G = sizes(1280, 5120, 32, 20, projection_dim=1280)
T5_XXL = dict(
    d_model=4096,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)
SDXL_VISION = sizes(1280, 5120, 32, 16, projection_dim=1024, patch_size=14)
FLUX_VISION = sizes(1024, 4096, 24, 16, projection_dim=768, patch_size=14)
LLAVA_VISION = FLUX_VISION | {"image_size": 336}
QWEN_VISION = dict(depth=32, hidden_size=1280, num_heads=16, out_hidden_size=3584)
MLLMS = {
    "llava-13b": sizes(5120, 13824, 40, 40),
    "llava-7b": sizes(4096, 11008, 32, 32),
    "qwen2.5-vl-7b": sizes(3584, 18944, 28, 28, num_key_value_heads=4),
}


def build(
    mllm: str, backbone: str = "sdxl", device: torch.device | str = "meta"
) -> dict[str, nn.Module]:
    """Build everything that a command uses; on another device than meta with random weights."""
    text, width = MLLMS[mllm], TOKENS[backbone][1]
    with torch.device(device):
        if backbone == "sdxl":
            unet = UNet2DConditionModel(**SDXL_UNET)
            built = {
                "unet": unet,
                "branch": sdxl.new_branch(unet),
                "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
                "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**BIG_G)),
                "vae": AutoencoderKL(**SDXL_VAE),
                "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**SDXL_VISION)),
                "resampler": sdxl.Resampler(SDXL_VISION["hidden_size"], width),
            }
        else:
            transformer = FluxTransformer2DModel(**FLUX_TRANSFORMER)
            pooled = FLUX_VISION["projection_dim"]
            built = {
                "transformer": transformer,
                "branch": flux.new_branch(transformer),
                "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
                "text_encoder_2": T5EncoderModel(T5Config(**T5_XXL)),
                "vae": AutoencoderKL(**FLUX_VAE),
                "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**FLUX_VISION)),
                "projection": flux.ImageProjection(pooled, width, flux.TOKENS),
            }
        built["aligner"] = ImplicitAligner(width, text["hidden_size"])
        if mllm.startswith("qwen"):
            settings = {"text_config": text, "vision_config": QWEN_VISION}
            config = Qwen2_5_VLConfig(**settings, tie_word_embeddings=False)
            built["mllm"] = Qwen2_5_VLForConditionalGeneration(config)
        else:
            llama, vision = LlamaConfig(vocab_size=32064, **text), CLIPVisionConfig(**LLAVA_VISION)
            config = LlavaConfig(text_config=llama, vision_config=vision)
            built["mllm"] = LlavaForConditionalGeneration(config)
    return built


models = cache(build)  # on the meta device; takes seconds and no memory


def one_step(built: dict[str, nn.Module], encode_batch: int) -> Calls:
    """Return calls for the meta device: a denoising step, a decoding, a batch of the encoder.

    The image is 1024 x 1024. The step computes both halves of classifier-free guidance.
    """
    empty, vae, is_sdxl = torch.empty, built["vae"], "unet" in built

    def step() -> None:
        if is_sdxl:
            added = {"text_embeds": empty(2, 1280), "time_ids": empty(2, 6)}
            inputs = empty(2, 4, 128, 128), empty(1), empty(2, 77, 2048)
            built["unet"](*inputs, added_cond_kwargs=added)
        else:
            text, pooled = empty(2, 512, 4096), empty(2, 768)
            inputs = empty(2, 4096, 64), text, pooled, empty(2), empty(4096, 3), empty(512, 3)
            built["transformer"](*inputs, guidance=empty(2))

    def decode() -> None:
        vae.decode(empty(1, vae.config.latent_channels, 128, 128))

    def encode() -> None:
        pixels = empty(encode_batch, 3, 224, 224)
        built["image_encoder"](pixels, output_hidden_states=is_sdxl)

    return {"step": step, "decode": decode, "image tokens": encode}


# Memory


class Alive(TorchDispatchMode):
    """Track the bytes of tensors that are made within this mode: `now`, and at the `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()  # storages that are counted already, or came from outside

    def __torch_dispatch__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Compute as usual, and count the storages that are new in the result."""
        self.known |= {storage._cdata for storage in storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in storages(result):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def storages(tree: object) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of all tensors in nested containers."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()


@contextmanager
def counting() -> Iterator[Alive]:
    """Compute on the meta device in this context, counting activations; attention is fused."""

    def fused(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    attention = patch("torch.nn.functional.scaled_dot_product_attention", fused)
    with torch.device("meta"), attention, Alive() as alive:
        yield alive


@cache
def activations(model: str, mllm: str) -> dict[str, float]:
    """Compute peaks in bytes in fp32, for one image or for a batch of the preset's size."""
    preset, language = find_preset(model), MLLMS[mllm]
    built, peaks = models(mllm, preset.backbone), {}
    for name, call in one_step(built, preset.models.encode_batch).items():
        with counting() as alive, torch.no_grad():
            call()
        peaks[name] = alive.peak

    # Layers follow each other, so one layer's inner features and the sequence are alive.
    width, heads = language["hidden_size"], language["num_attention_heads"]
    peaks["look"] = 4 * MLLM_TOKENS * (3 * width + 3 * language["intermediate_size"])
    cached_width = width * language.get("num_key_value_heads", heads) // heads
    cache_size = 4 * MLLM_TOKENS * 2 * language["num_hidden_layers"] * cached_width
    peaks["answer"] = peaks["look"] + cache_size

    aligner, batch = built["aligner"], preset.training.batch_size
    with counting() as alive:
        guidance = torch.empty(batch, MLLM_TOKENS, width)
        aligner(guidance, torch.empty(batch, *TOKENS[preset.backbone])).sum().backward()
    peaks["train"] = alive.peak
    aligner.zero_grad(set_to_none=True)
    return peaks


@dataclass(frozen=True)
class Need:
    """Bytes of one kind of run."""

    run: str
    dtype: str
    weights: float
    activations: float

    @property
    def total(self) -> float:
        """Sum of weights and activations."""
        return self.weights + self.activations


def parameters_in_layers(model: nn.Module) -> int:
    """Count what is on the GPU with `--offload layers`: of a large model two of its layers."""
    count = count_parameters(model)
    if count < LARGE:
        return count
    return 2 * max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())


def needs(model: str, mllm: str) -> list[Need]:
    """Compute what sampling and training need, in fp32 and in half precision."""
    preset, peaks = find_preset(model), activations(model, mllm)
    built = models(mllm, preset.backbone)
    counts = {name: count_parameters(module) for name, module in built.items()}
    in_layers = {name: parameters_in_layers(module) for name, module in built.items()}
    # Weights, reference and two moments in fp32; gradients are among the activations.
    training, look = 16 * counts["aligner"], preset.models.mllm_batch * peaks["look"]
    rows, exact = [], ALWAYS_FP32[preset.backbone]
    for dtype, share in (("fp32", 1.0), ("fp16, bf16", 0.5)):
        shares = {name: 1.0 if name in exact else share for name in counts}
        alive = {
            "diffusion": max(share * peaks["step"], peaks["decode"]),
            "image prompt": shares["image_encoder"] * peaks["image tokens"],
            "mllm": share * peaks["answer"],
        }
        busy = max(alive["image prompt"], share * look, peaks["train"])
        for offload, on_gpu in (("", counts), (" --offload layers", in_layers)):
            parts = {}  # weights and activations of what is on the GPU together
            for group, names in GROUPS[preset.backbone].items():
                weights = sum(4 * on_gpu[name] * shares[name] for name in names)
                parts[group] = weights, alive.get(group, 0.0)
            at_most = max(parts.values(), key=sum)
            frozen = parts["image prompt"][0] + parts["mllm"][0]
            rows += [
                Need(f"sample{offload or ' --offload'}", dtype, *at_most),
                Need(f"{TRAIN}, features as they come{offload}", dtype, training + frozen, busy),
            ]
            if not offload:
                every_weight = sum(weights for weights, _ in parts.values())
                rows.append(Need("sample", dtype, every_weight, max(alive.values())))
    rows.append(Need(f"{TRAIN}, features from a cache", "fp32", training, peaks["train"]))
    return sorted(rows, key=lambda row: row.run)  # keeps fp32 before half


def usable(card: int) -> float:
    """Return the bytes that tensors can take on a card of so many GB: 95 % minus 1 GiB."""
    return (0.95 * card - 1) * GIB


def table(model: str, mllm: str) -> str:
    """Format two Markdown tables: the models, and which card holds which run."""
    lines = [
        "| model | million parameters | GiB, fp32 run | GiB, half-precision run |",
        "|---|---|---|---|",
    ]
    backbone = find_preset(model).backbone
    for name, module in models(mllm, backbone).items():
        count, half = count_parameters(module), 4 if name in ALWAYS_FP32[backbone] else 2
        title = mllm if name == "mllm" else name.replace("_", " ")
        gib = f"{4 * count / GIB:.2f} | {half * count / GIB:.2f}"
        lines.append(f"| {title} | {count / 1e6:,.1f} | {gib} |")
    cards = " | ".join(f"{card} GB" for card in CARDS)
    lines.append(f"\n| with {mllm} | dtype | weights | activations | GiB | {cards} |")
    lines.append("|---" * (5 + len(CARDS)) + "|")
    for need in needs(model, mllm):
        cells = [need.run, need.dtype]
        cells += [f"{n / GIB:.1f}" for n in (need.weights, need.activations, need.total)]
        cells += ["fits" if need.total <= usable(card) else "–" for card in CARDS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# Operations


def operations(model: str, mllm: str) -> dict[str, float]:
    """Count FLOP per step of one image at 1024 x 1024, with the preset's steps and passes."""
    preset, width = find_preset(model), MLLMS[mllm]["hidden_size"]
    built, empty = models(mllm, preset.backbone), torch.empty
    states, language = (1, MLLM_TOKENS, width), built["mllm"].model.language_model

    def look() -> None:
        # The mask is given whole: transformers cannot look into a shorter one without values.
        mask = empty(1, 1, MLLM_TOKENS, MLLM_TOKENS)
        language(inputs_embeds=empty(states), attention_mask=mask, use_cache=False)
        if mllm.startswith("llava"):  # Qwen's vision encoder costs little in comparison
            built["mllm"].model.vision_tower(empty(1, 3, 336, 336))

    def align() -> None:
        tokens = empty(1, *TOKENS[preset.backbone])
        built["aligner"](empty(states), tokens, passes=preset.sampling.passes)

    flop = {}
    for name, call in (one_step(built, 1) | {"look": look, "align": align}).items():
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        flop[name] = counter.get_total_flops()
    steps, step, decode = preset.sampling.steps, flop.pop("step"), flop.pop("decode")
    draft = round(DRAFT * steps)
    return {"draw": steps * step + decode, "draft": draft * step + decode} | flop


def operations_table(model: str, mllm: str) -> str:
    """Format the operations as a Markdown table, with what IMG adds to drawing."""
    flop, sampling = operations(model, mllm), find_preset(model).sampling
    draw, draft, encode, look, align = flop.values()
    added = encode + look + align
    counts = flop | {
        "draw again": draw,
        OWN: added,
        "IMG": 2 * draw + added,
        f"IMG, draft of {DRAFT:.0%} of the steps": draft + draw + added,
        "IMG, one look at the draft for four images": draw + (draft + added) / 4,
    }
    lines = [f"| {model}, {mllm}: a step, computed | TFLOP | of a drawing |", "|---|---|---|"]
    for name, count in counts.items():
        share = count / (2 * draw if name == OWN else draw)
        lines.append(f"| {name} | {count / 1e12:,.1f} | {share:.1%} |")
    # Of a training pair, the image encoder sees both images and the MLLM the loser.
    share = look / (look + 2 * encode)
    lines.append(
        f"\n{sampling.steps} denoising steps, passes of the aligner: {sampling.passes}. The MLLM "
        f"takes {share:.1%} of the features of a training pair."
    )
    return "\n".join(lines)


def seconds(call: Callable[[], object]) -> float:
    """Measure the seconds of a call, on a GPU until it has finished."""
    clock = Clock()
    with clock("call"):
        call()
    return clock.seconds["call"]


def matmul_rate(
    device: torch.device, size: int = 2048, dtype: torch.dtype = torch.float32
) -> float:
    """Measure FLOP per second of a square product: the best this machine can do."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(8))
