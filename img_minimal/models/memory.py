"""How much GPU memory a run needs, computed without a GPU, a download, or a weight.

    python -m img_minimal.models.memory --model sdxl
    python -m img_minimal.models.memory --model sdxl --mllm llava-7b

Weights: the models are built on PyTorch's meta device (shapes without numbers) from their public settings, and their
parameters counted. Activations: one forward pass, and for training one backward pass, is made on that device,
and the largest sum of tensors alive at once is noted. Fused attention keeps no attention maps on a GPU, so they are
left out here. Not in the numbers: what CUDA, cuDNN and the allocator need for themselves; `usable` allows for that.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from img_minimal.cli import option, parse, run
from img_minimal.models.true_sizes import MLLMS, models, parameters
from img_minimal.presets import find_preset

GIB = 2**30
CARDS = (16, 24, 40, 80)
MLLM_TOKENS = 640  # length of LLaVA's sequence: 576 of the image, the rest of the question
ALWAYS_FP32 = ("vae", "resampler", "aligner")


class Alive(TorchDispatchMode):
    """Within this mode, `peak` is the largest sum of bytes of tensors that were made and not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()  # storages that are counted already, or came from outside

    def __torch_dispatch__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        """Compute as usual, and count what is new."""
        self.known |= {storage._cdata for storage in _storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _fused(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@contextmanager
def counting() -> Iterator[Alive]:
    """Count activations of what is computed on meta tensors, with attention as if it were fused."""
    fused = patch("torch.nn.functional.scaled_dot_product_attention", _fused)
    with torch.device("meta"), fused, Alive() as alive:
        yield alive


@dataclass(frozen=True)
class Need:
    """Bytes of one run."""

    run: str
    dtype: str
    weights: float
    activations: float

    @property
    def total(self) -> float:
        """All bytes."""
        return self.weights + self.activations


def usable(card: int) -> float:
    """Bytes of a card of so many GB that tensors can take: 95 % less 1 GiB for CUDA, cuDNN and fragmentation."""
    return (0.95 * card - 1) * GIB


@cache
def activations(mllm: str) -> dict[str, float]:
    """Bytes alive at the peak in fp32: of one image; for `encode` and `train` of the preset's batches."""
    m, preset = models(mllm), find_preset("sdxl")
    language, width = MLLMS[mllm], MLLMS[mllm]["hidden_size"]
    heads, kept = language["num_attention_heads"], language.get("num_key_value_heads", language["num_attention_heads"])
    found = {}
    with counting() as alive, torch.no_grad():  # twice the images: with and without text
        added = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
        latents, text = torch.empty(2, 4, 128, 128), torch.empty(2, 77, 2048)
        m["unet"](latents, torch.empty(1), text, added_cond_kwargs=added)
    found["unet"] = alive.peak
    with counting() as alive, torch.no_grad():
        m["vae"].decode(torch.empty(1, 4, 128, 128))
    found["vae"] = alive.peak
    with counting() as alive, torch.no_grad():
        m["image_encoder"](torch.empty(preset.encode_batch, 3, 224, 224), output_hidden_states=True)
    found["encode"] = alive.peak
    # Layers follow each other, so one layer's inner features and the sequence itself are what is alive.
    found["look"] = 4 * MLLM_TOKENS * (3 * width + 3 * language["intermediate_size"])
    found["answer"] = found["look"] + 4 * MLLM_TOKENS * 2 * language["num_hidden_layers"] * width * kept // heads
    with counting() as alive:
        guidance, tokens = torch.empty(preset.batch_size, MLLM_TOKENS, width), torch.empty(preset.batch_size, 16, 2048)
        m["aligner"](guidance, tokens).sum().backward()
    found["train"] = alive.peak
    m["aligner"].zero_grad(set_to_none=True)
    return found


def needs(mllm: str) -> list[Need]:
    """What sampling and training need, by dtype: UNet, text and image encoders and MLLM in it, the rest in fp32."""
    count = {name: parameters(module) for name, module in models(mllm).items()}
    peak, rows, batch = activations(mllm), [], find_preset("sdxl").look_batch
    for dtype, size in (("fp32", 4), ("fp16, bf16", 2)):
        part = size / 4
        parts = {
            "diffusion": (
                size * sum(count[k] for k in ("unet", "branch", "text_encoder", "text_encoder_2")) + 4 * count["vae"],
                max(part * peak["unet"], peak["vae"]),
            ),
            "image prompt": (size * count["image_encoder"] + 4 * count["resampler"], part * peak["encode"]),
            "mllm": (size * count["mllm"], part * peak["answer"]),
            "aligner": (4 * count["aligner"], 0),
        }
        rows.append(Need("sample", dtype, sum(w for w, _ in parts.values()), max(a for _, a in parts.values())))
        rows.append(Need("sample --offload", dtype, *max(parts.values(), key=sum)))
        # Aligner, its reference and AdamW's two moments; gradients are among the activations.
        training = 4 * 4 * count["aligner"]
        frozen = parts["image prompt"][0] + parts["mllm"][0]
        alive = max(part * peak["encode"], part * batch * peak["look"], peak["train"])
        rows.append(Need("train the aligner, features as they come", dtype, training + frozen, alive))
    rows.append(Need("train the aligner, features from a cache", "fp32", training, peak["train"]))
    return sorted(rows, key=lambda row: row.run)  # keeps fp32 before half


def table(mllm: str) -> str:
    """Both tables as Markdown: the models, and what fits where."""
    lines = ["| model | million parameters | GiB, fp32 run | GiB, half-precision run |", "|---|---|---|---|"]
    for name, module in models(mllm).items():
        n, half = parameters(module), 4 if name in ALWAYS_FP32 else 2
        title = mllm if name == "mllm" else name.replace("_", " ")
        lines.append(f"| {title} | {n / 1e6:,.1f} | {4 * n / GIB:.2f} | {half * n / GIB:.2f} |")
    cards = " | ".join(f"{card} GB" for card in CARDS)
    lines += ["", f"| with {mllm} | dtype | weights | activations | GiB | {cards} |", "|---" * (5 + len(CARDS)) + "|"]
    for row in needs(mllm):
        fits = " | ".join("fits" if row.total <= usable(card) else "–" for card in CARDS)
        numbers = " | ".join(f"{n / GIB:.1f}" for n in (row.weights, row.activations, row.total))
        lines.append(f"| {row.run} | {row.dtype} | {numbers} | {fits} |")
    return "\n".join(lines)


@dataclass
class Config:
    """The command line."""

    model: str = option(
        "sdxl", "which models; a finetuned UNet takes as much as the base's", choices=["sdxl", "sdxl-dpo"]
    )
    mllm: str = option("llava-13b", "which multimodal LLM", choices=list(MLLMS))


def main() -> int:
    """Print the tables."""
    config = parse(Config, __doc__)
    print(table(config.mllm))
    return 0


if __name__ == "__main__":
    run(main)
