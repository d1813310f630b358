"""Compute what the public models take at true size, without a GPU, a download, or a weight.

    python -m img_minimal.bench memory --model flux --mllm llava-7b

Models are built on PyTorch's meta device, where tensors have shapes and no values, by sizes.json:
the public config.json files, without what equals the libraries' defaults. Their weights are
counted. Activations are the largest sum of tensors alive at once: in a decoding (a denoising step
takes less), in a batch of the image encoder, and in a training step. Attention counts as fused,
without attention maps. CUDA, cuDNN and the allocator need more; `usable` leaves room for them.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from unittest.mock import patch
from weakref import WeakKeyDictionary

import diffusers
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from img_minimal import flux, sdxl
from img_minimal.aligner import ImplicitAligner
from img_minimal.bench.plan import PUBLIC_HEADS
from img_minimal.devices import LARGE, count_parameters
from img_minimal.presets import find_preset

Calls = dict[str, Callable[[], object]]

SIZES = json.loads(Path(__file__).with_name("sizes.json").read_text())
GIB, CARDS = 2**30, (12, 16, 24, 40, 80)
MLLM_TOKENS = 640  # 576 of the image, the rest of the question
TRAIN = "train the aligner"
TEXT = "text_encoder", "text_encoder_2"
OTHERS = ("image_encoder", "head"), ("mllm",), ("aligner",)
# What is on the GPU together; with --offload, one group at a time.
GROUPS = {
    "sdxl": (("unet", "branch", "vae", *TEXT), *OTHERS),
    "flux": (("transformer", "branch", "vae"), TEXT, *OTHERS),
}
FP32 = {  # whatever the run's dtype
    "sdxl": ("vae", "head", "aligner"),
    "flux": ("vae", "head", "aligner", "image_encoder"),
}


def build(model: str, mllm: str, device: torch.device | str = "meta") -> dict[str, nn.Module]:
    """Build everything that a command uses; on another device than meta with random weights."""
    with torch.device(device):
        parts = {name: from_settings(settings) for name, settings in SIZES[model].items()}
        encoder = parts["image_encoder"].config
        if model == "sdxl":
            width = parts["unet"].config.cross_attention_dim
            parts["branch"] = sdxl.new_branch(parts["unet"])
            parts["head"] = sdxl.Resampler(encoder.hidden_size, width)
        else:
            width = parts["transformer"].config.joint_attention_dim
            parts["branch"] = flux.new_branch(parts["transformer"])
            parts["head"] = flux.ImageProjection(encoder.projection_dim, width, flux.TOKENS)
        parts["mllm"] = from_settings(SIZES[mllm])
        guidance_width = parts["mllm"].config.get_text_config().hidden_size
        parts["aligner"] = ImplicitAligner(width, guidance_width)
    return parts


models = cache(build)  # on the meta device; takes seconds and no memory


def from_settings(settings: dict) -> nn.Module:
    """Build a model from its config.json, in diffusers' or transformers' form."""
    if "_class_name" in settings:
        return getattr(diffusers, settings["_class_name"]).from_config(settings)
    cls = getattr(transformers, settings["architectures"][0])
    return cls(cls.config_class(**settings))


def weights(model: str, mllm: str, size: int, layers: bool = False) -> dict[str, int]:
    """Compute the bytes of each part, `size` bytes a number where it need not be in fp32.

    With `layers`, only two layers of a large model count, as with `--offload layers`.
    """
    found = {}
    for name, part in models(model, mllm).items():
        count = count_parameters(part)
        if layers and count >= LARGE:
            own = (sum(p.numel() for p in m.parameters(recurse=False)) for m in part.modules())
            count = 2 * max(own)
        found[name] = count * (4 if name in FP32[model] else size)
    return found


class Alive(TorchDispatchMode):
    """Measure the `peak` of the bytes of tensors that are made within this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.made = 0, WeakKeyDictionary()  # storages that are alive, with their bytes

    def __torch_dispatch__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Compute as usual, and count the storages that are new in the result."""
        given = storages((args, kwargs))
        result = function(*args, **(kwargs or {}))
        for storage in storages(result) - given:
            self.made[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self.made.values()))
        return result


def storages(tree: object) -> set[torch.UntypedStorage]:
    """Collect the storages of all tensors in nested containers."""
    return {leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def peak_of(call: Callable[[], object]) -> int:
    """Run a call on the meta device; return its peak of activations. Attention is fused."""
    attention = "torch.nn.functional.scaled_dot_product_attention"
    fused = patch(attention, lambda query, *_, **__: query.new_empty(query.shape))
    with torch.device("meta"), fused, Alive() as alive:
        call()
    return alive.peak


@cache
def activations(model: str, mllm: str) -> dict[str, float]:
    """Compute peaks in bytes in fp32, by part; a `look` is of a batch without answers."""
    parts, preset, empty = models(model, mllm), find_preset(model), torch.empty
    text, (_, tokens) = parts["mllm"].config.get_text_config(), PUBLIC_HEADS[model]
    batch, vae = preset.training.batch_size, parts["vae"]

    def train() -> None:
        guidance = empty(batch, MLLM_TOKENS, text.hidden_size)
        parts["aligner"](guidance, empty(batch, *tokens)).sum().backward()

    def encode() -> None:
        pixels = empty(preset.models.encode_batch, 3, 224, 224)
        parts["image_encoder"](pixels, output_hidden_states=model == "sdxl")

    peaks = {"training": peak_of(train)}
    with torch.no_grad():
        peaks["image_encoder"] = peak_of(encode)
        latents = 1, vae.config.latent_channels, 128, 128
        peaks["vae"] = peak_of(lambda: vae.decode(empty(latents)))
    # The MLLM's layers follow each other: one's inner features and the sequence are alive.
    look = 4 * MLLM_TOKENS * 3 * (text.hidden_size + text.intermediate_size)
    cached = text.hidden_size * text.num_key_value_heads // text.num_attention_heads
    peaks["mllm"] = look + 4 * MLLM_TOKENS * 2 * text.num_hidden_layers * cached
    return peaks | {"look": preset.models.mllm_batch * look}


def needs(model: str, mllm: str) -> dict[tuple[str, str], tuple[float, float]]:
    """Compute bytes of weights and activations, by run and dtype."""
    found, fp32 = {}, activations(model, mllm)
    for dtype, size in (("fp32", 4), ("fp16, bf16", 2)):
        half = {"mllm", "look", "image_encoder"}.difference(FP32[model])
        peaks = fp32 | {name: fp32[name] * size / 4 for name in half}
        busy = max(peaks[name] for name in ("image_encoder", "look", "training"))
        for offload in ("", " --offload layers"):
            held, groups = weights(model, mllm, size, bool(offload)), []
            for names in GROUPS[model]:
                active = max(peaks.get(name, 0) for name in names)
                groups.append((sum(held[name] for name in names), active))
            found[f"sample{offload or ' --offload'}", dtype] = max(groups, key=sum)
            if not offload:
                total, active = zip(*groups)
                found["sample", dtype] = sum(total), max(active)
            # Weights, reference and two moments in fp32; gradients are among the activations.
            training = 4 * held["aligner"]
            frozen = held["image_encoder"] + held["head"] + held["mllm"]
            found[f"{TRAIN}, features as they come{offload}", dtype] = training + frozen, busy
    found[f"{TRAIN}, features from a cache", "fp32"] = training, fp32["training"]
    return found


def usable(card: int) -> float:
    """Return the bytes that tensors can take on a card of so many GB: 95 % minus 1 GiB."""
    return (0.95 * card - 1) * GIB


def table(model: str, mllm: str) -> str:
    """Format two Markdown tables: the models, and the smallest card that holds each run."""
    fp32, half, title = weights(model, mllm, 4), weights(model, mllm, 2), f"{model} with {mllm}"
    sizes, runs = [], []
    for name, size in fp32.items():
        gib = f"{size / GIB:.2f}", f"{half[name] / GIB:.2f}"
        sizes.append((name, f"{size / 4e6:,.1f}", *gib))
    for run, needed in sorted(needs(model, mllm).items()):
        total = sum(needed)
        card = next((f"{card} GB" for card in CARDS if total <= usable(card)), "–")
        runs.append((*run, *(f"{size / GIB:.1f}" for size in (*needed, total)), card))
    header = title, "million parameters", "GiB, fp32", "GiB, fp16 or bf16"
    run_header = title, "dtype", "weights", "activations", "GiB", "smallest card"
    return f"{markdown(header, sizes)}\n\n{markdown(run_header, runs)}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
