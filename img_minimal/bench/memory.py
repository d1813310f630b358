"""How much GPU memory a run needs, computed without a GPU, a download, or a weight.

    python -m img_minimal.bench memory
    python -m img_minimal.bench memory --model flux --mllm llava-7b

Weights: the models are built on PyTorch's meta device (shapes without numbers) from their public settings, and their
parameters counted. Activations: one forward pass, and for training one backward pass, is made on that device,
and the largest sum of tensors alive at once is noted. Fused attention keeps no attention maps on a GPU, so they are
left out here. Not in the numbers: what CUDA, cuDNN and the allocator need for themselves; `usable` allows for that.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from img_minimal.backbone import true_size
from img_minimal.bench.true_sizes import MLLMS, models
from img_minimal.devices import parameters
from img_minimal.presets import find_preset

GIB = 2**30
CARDS = (16, 24, 40, 80)
MLLM_TOKENS = 640  # length of LLaVA's sequence: 576 of the image, the rest of the question


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


def _fused(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


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
def activations(model: str, mllm: str) -> dict[str, float]:
    """Bytes alive at the peak in fp32: of one image; for `encode` and `train` of the preset's batches."""
    preset = find_preset(model)
    shapes = true_size(preset.backbone)
    built = models(mllm, preset.backbone)
    found = {}
    for name, call in shapes.activations(built, preset.encode_batch).items():
        with counting() as alive, torch.no_grad():
            call()
        found[name] = alive.peak
    # Layers follow each other, so one layer's inner features and the sequence itself are what is alive.
    language = MLLMS[mllm]
    width = language["hidden_size"]
    heads = language["num_attention_heads"]
    key_heads = language.get("num_key_value_heads", heads)
    found["look"] = 4 * MLLM_TOKENS * (3 * width + 3 * language["intermediate_size"])
    cached = 4 * MLLM_TOKENS * 2 * language["num_hidden_layers"] * width * key_heads // heads
    found["answer"] = found["look"] + cached
    with counting() as alive:
        guidance = torch.empty(preset.batch_size, MLLM_TOKENS, width)
        built["aligner"](guidance, torch.empty(preset.batch_size, *shapes.TOKEN_SHAPE)).sum().backward()
    found["train"] = alive.peak
    built["aligner"].zero_grad(set_to_none=True)
    return found


def always_fp32(backbone: str) -> tuple[str, ...]:
    """Parts that are in fp32 in every run."""
    return (*true_size(backbone).ALWAYS_FP32, "aligner")


def groups(backbone: str, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Which of the parts `names` are on the GPU together with --offload."""
    shapes = true_size(backbone)
    texts = getattr(shapes, "ENCODES_TEXT", ())  # where the text's encoders make room for what draws
    found = {"diffusion": shapes.DRAWS, "text": texts, "mllm": ("mllm",), "aligner": ("aligner",)}
    elsewhere = {name for parts in found.values() for name in parts}
    found["image prompt"] = tuple(name for name in names if name not in elsewhere)
    return {name: parts for name, parts in found.items() if parts}


def needs(model: str, mllm: str) -> list[Need]:
    """What sampling and training need, by dtype; what is always in fp32 stays so."""
    preset = find_preset(model)
    count = {name: parameters(module) for name, module in models(mllm, preset.backbone).items()}
    peak, members, rows = activations(model, mllm), groups(preset.backbone, count), []
    always = always_fp32(preset.backbone)
    training = 4 * 4 * count["aligner"]  # weights, reference, two moments; gradients are among the activations
    for dtype, size in (("fp32", 4), ("fp16, bf16", 2)):
        share = size / 4
        weights = {
            name: sum(count[part] * (4 if part in always else size) for part in parts)
            for name, parts in members.items()
        }
        alive = {"diffusion": max(share * peak["draw"], peak["decode"]), "image prompt": share * peak["encode"],
                 "mllm": share * peak["answer"]}  # fmt: skip
        rows.append(Need("sample", dtype, sum(weights.values()), max(alive.values())))
        apart = [(weights[name], alive.get(name, 0)) for name in members]
        rows.append(Need("sample --offload", dtype, *max(apart, key=sum)))
        frozen = weights["image prompt"] + weights["mllm"]
        busy = max(share * peak["encode"], share * preset.mllm_batch * peak["look"], peak["train"])
        rows.append(Need("train the aligner, features as they come", dtype, training + frozen, busy))
    rows.append(Need("train the aligner, features from a cache", "fp32", training, peak["train"]))
    return sorted(rows, key=lambda row: row.run)  # keeps fp32 before half


def table(model: str, mllm: str) -> str:
    """Both tables as Markdown: the models, and what fits where."""
    backbone = find_preset(model).backbone
    always = always_fp32(backbone)
    lines = ["| model | million parameters | GiB, fp32 run | GiB, half-precision run |", "|---|---|---|---|"]
    for name, module in models(mllm, backbone).items():
        n, half = parameters(module), 4 if name in always else 2
        title = mllm if name == "mllm" else name.replace("_", " ")
        lines.append(f"| {title} | {n / 1e6:,.1f} | {4 * n / GIB:.2f} | {half * n / GIB:.2f} |")
    cards = " | ".join(f"{card} GB" for card in CARDS)
    lines += ["", f"| with {mllm} | dtype | weights | activations | GiB | {cards} |", "|---" * (5 + len(CARDS)) + "|"]
    for row in needs(model, mllm):
        fits = " | ".join("fits" if row.total <= usable(card) else "–" for card in CARDS)
        numbers = " | ".join(f"{n / GIB:.1f}" for n in (row.weights, row.activations, row.total))
        lines.append(f"| {row.run} | {row.dtype} | {numbers} | {fits} |")
    return "\n".join(lines)
