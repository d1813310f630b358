"""Decide where models compute and in which precision, and share one GPU between big models.

bf16 pays off only where the hardware multiplies it: on a plain AVX2 CPU a bf16 product takes 30 to
70 times as long as an fp32 one. No other module chooses a dtype to compute in.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from torch import nn

from img_minimal.cli import UserError, check

DTYPES = ("fp32", "bf16", "fp16", "mixed")
LARGE = 4_000_000_000  # parameters; LLaVA, FLUX's transformer and T5 have more, all others less
WITHOUT_MEMORY = ("cpu",)  # devices that compute where models wait anyway
# Bytes to leave free beside a large model, computed by bench/memory.py: in drawing 3 GiB of
# activations, FLUX's branch and VAE; in training FLUX's aligner with gradients and moments.
DRAWING, TRAINING = 6 * 2**30, 14 * 2**30


def best_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def known_device(name: str) -> torch.device:
    """Return the device of that name. Raises UserError if this machine has no such device."""
    known = ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
    fits = name in known or name == "cuda" and len(known) > 1
    check(fits, f"--mllm-device is {name!r}, expected one of: {', '.join(known)}")
    return torch.device(name)


def bf16_is_fast(device: torch.device) -> bool:
    """Return True if the device multiplies bf16 matrices faster than fp32 ones.

    True for GPUs with bf16, and for CPUs with AVX-512-BF16, AMX or Arm's BF16 that torch may use.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    units = torch.cpu.get_capabilities()
    has_units = any(units.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    # The second call respects ONEDNN_MAX_CPU_ISA, which makes a CPU compute like an older one.
    return has_units and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@dataclass(frozen=True)
class Precision:
    """Hold the dtypes of a run. Resampler, aligner and SDXL's VAE always stay in fp32."""

    weights: torch.dtype  # of the base model and the image encoder
    mllm: torch.dtype
    compute: torch.dtype  # of matrix products with fp32 weights, in all training
    mixed: bool = False  # draw and encode images in `compute`, too

    @classmethod
    def named(cls, name: str | None, device: torch.device) -> "Precision":
        """Look up fp32, bf16, fp16 or mixed.

        None means fp32 on a CPU, and on a GPU what the authors' sampler uses: fp16 for diffusion,
        whose public files are fp16, and bf16 for the MLLM, whose activations are large. "mixed" is
        fp32 weights that compute in bf16, where bf16 is fast. Raises UserError for another name.
        """
        fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
        fast = bf16 if bf16_is_fast(device) else fp32
        known = {
            "fp32": cls(fp32, fp32, fp32),
            "bf16": cls(bf16, bf16, bf16),
            "fp16": cls(fp16, fp16, fast),
            "mixed": cls(fp32, fast, fast, mixed=True),
            None: cls(fp16, bf16, fast) if device.type == "cuda" else cls(fp32, fp32, fp32),
        }
        if name not in known:
            raise UserError(f"unknown dtype {name!r}; expected {', '.join(DTYPES)}")
        return known[name]

    def training(self, device: torch.device) -> AbstractContextManager:
        """Return the autocast context of a training step: fp32 weights, products in `compute`."""
        return torch.autocast(device.type, self.compute, enabled=self.compute != torch.float32)

    def sampling(self, device: torch.device) -> AbstractContextManager:
        """Return the autocast context for drawing and encoding images."""
        return self.training(device) if self.mixed else nullcontext()

    def described(self, device: torch.device) -> str:
        """Describe the run: "products in fp32 on cpu (AVX2, without fast bf16)"."""
        if device.type == "cuda":
            kind = torch.cuda.get_device_name(device)
        else:
            kind = torch.backends.cpu.get_cpu_capability()
        units = "with fast bf16" if bf16_is_fast(device) else "without fast bf16"
        return f"products in {dtype_name(self.compute)} on {device.type} ({kind}, {units})"


def dtype_name(dtype: torch.dtype) -> str:
    """Shorten a dtype: torch.bfloat16 -> "bf16"."""
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def count_parameters(module: nn.Module) -> int:
    """Count the parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def compute_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype that a module computes in; quantized weights may be stored in another."""
    stored = [module.dtype, *(p.dtype for p in module.parameters())]
    computing = (torch.float32, torch.float16, torch.bfloat16)
    return next((dtype for dtype in stored if dtype in computing), torch.float32)


class Turns:
    """Share the device between models.

    `offload` is "none": all stay there; "models": only the ones in use, so that sampling moves
    diffusion -> image prompt -> MLLM -> aligner -> diffusion through the GPU; "layers": likewise,
    but large models stay in RAM and their layers pass through; or "auto", see `settle`.
    """

    def __init__(self, device: torch.device, offload: str = "none"):
        """Raise UserError for "layers" on a device without memory of its own."""
        if device.type in WITHOUT_MEMORY:
            advice = "--offload layers needs a GPU, and torch finds none on this computer"
            check(offload != "layers", f"{advice}; leave it out")
            offload = "none" if offload == "auto" else offload
        self.device, self.offload = device, offload
        # Where models wait.
        self.home = device if offload == "none" else torch.device("cpu")
        self.resident: tuple[nn.Module | DiffusionPipeline, ...] = ()

    def settle(self, *models: nn.Module | DiffusionPipeline, room: float = DRAWING) -> None:
        """Choose for "auto", by the GPU's free memory, once all models are loaded.

        `room` bytes are for activations, and for small models that are there with a large one.
        """
        if self.offload != "auto":
            return
        modules = []
        for model in models:
            parts = model.components.values() if hasattr(model, "components") else [model]
            modules += [part for part in parts if isinstance(part, nn.Module)]
        sizes = [sum(p.nbytes for p in module.parameters()) for module in modules]
        free = torch.cuda.mem_get_info(self.device)[0] - room
        self.offload = "models" if max(sizes) <= free else "layers"
        if sum(sizes) <= free:
            self.offload = "none"
        if self.offload == "none":
            self.home = self.device
            self._move(modules, self.device)

    def bring(self, *modules: nn.Module | DiffusionPipeline) -> None:
        """Move modules that are used together to the device; the previous ones make room first."""
        if self.offload == "none" or self.resident == modules:
            return
        self._move(self.resident, self.home)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.resident = modules
        self._move(modules, self.device)

    def _move(self, modules: Sequence[nn.Module | DiffusionPipeline], device: torch.device) -> None:
        # On a GPU the next layer comes while one computes. Hooks sit on the innermost layers, since
        # a block of FLUX holds processors of IMG's own while it draws with image tokens.
        layers = dict(offload_type="leaf_level", use_stream=self.device.type == "cuda")
        for module in modules:
            whole = isinstance(module, DiffusionPipeline) or getattr(module, "is_quantized", False)
            if self.offload != "layers" or whole or count_parameters(module) < LARGE:
                module.to(device)
            elif not any(hasattr(layer, "_diffusers_hook") for layer in module.modules()):
                apply_group_offloading(module, self.device, **layers)
