"""Where models compute and how precisely, decided in this one place; and one big model on the GPU at a time.

bf16 pays where the hardware multiplies it: on a plain AVX2 CPU the same product takes 30 to 70 times as long as in
fp32. So nothing else in this package chooses a dtype to compute in.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from img_minimal.runtime.errors import UserError

DTYPES = ("fp32", "bf16", "fp16", "mixed")


def best_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def known_device(name: str) -> torch.device:
    """The device of that name. Raises UserError if this computer has none such."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        there = ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
        raise UserError(f"--mllm-device is {name!r}, expected one of: {', '.join(there)}") from None
    return device


def bf16_is_fast(device: torch.device) -> bool:
    """Does this device multiply matrices in bf16 faster than in fp32?

    True for a GPU with bf16, and for a CPU with AVX-512-BF16, AMX or Arm's BF16 that torch's kernels may use.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    units = torch.cpu.get_capabilities()
    has_units = any(units.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    # The second question respects ONEDNN_MAX_CPU_ISA, which makes a CPU compute like a lesser one.
    return has_units and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@dataclass(frozen=True)
class Precision:
    """Dtypes of a run on one device. Resampler, aligner and SDXL's VAE are small or sensitive and stay in fp32."""

    weights: torch.dtype  # of the base model and of the image encoder
    mllm: torch.dtype
    compute: torch.dtype  # of matrix products where weights are fp32 but need not be multiplied so: all training
    mixed: bool = False  # draw and encode images like that, too

    @classmethod
    def named(cls, name: str | None, device: torch.device) -> "Precision":
        """fp32, bf16, fp16 or mixed; None is what the authors' sampler uses on a GPU, and fp32 on a CPU.

        The authors' is fp16 for diffusion, whose public files are fp16, and bf16 for the MLLM, whose activations are
        large. mixed is fp32 weights that compute in bf16, and the MLLM in bf16; both only where bf16 is fast.
        Raises UserError for another name.
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

    @property
    def fp32_weights(self) -> bool:
        """Is the base model held in fp32?"""
        return self.weights == torch.float32

    def training(self, device: torch.device) -> AbstractContextManager:
        """The context of a training step's forward pass: fp32 weights, products in `compute`."""
        return torch.autocast(device.type, self.compute, enabled=self.compute != torch.float32)

    def sampling(self, device: torch.device) -> AbstractContextManager:
        """The context in which images are drawn and encoded: as the weights are, or mixed."""
        mixed = self.mixed and self.compute != torch.float32
        return torch.autocast(device.type, self.compute, enabled=mixed)

    def described(self, device: torch.device) -> str:
        """For the plan and config.json: "products in fp32 on cpu (AVX2, no bf16 units)"."""
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        units = "with fast bf16" if bf16_is_fast(device) else "without fast bf16"
        return f"products in {dtype_name(self.compute)} on {device.type} ({kind}, {units})"


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bf16"."""
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def parameters(module: nn.Module) -> int:
    """How many numbers a model has."""
    return sum(p.numel() for p in module.parameters())


class Placement:
    """Which models are on the device: all of them, or with `offload` only the one that was brought last.

    A sampling run then moves diffusion -> image prompt -> MLLM -> aligner -> diffusion through the GPU; the rest waits
    in the computer's memory. On a CPU the same moves lead nowhere. (accelerate's offload hooks follow `forward` of one
    module; here an image branch computes inside the UNet, and an MLLM is entered below its own forward.)
    """

    def __init__(self, device: torch.device | None = None, offload: bool = False):
        self.device = device or best_device()
        self.offload = offload
        self.parts: dict[str, tuple[nn.Module, ...]] = {}
        self.resident: str | None = None

    @property
    def waiting(self) -> torch.device:
        """Where a model is loaded to: the CPU if it has to wait for its turn, else the device."""
        return torch.device("cpu") if self.offload else self.device

    def add(self, name: str, *modules: nn.Module) -> None:
        """Take charge of modules that are used together; another part of that name is forgotten."""
        if self.resident == name:
            self._move(name, away=True)
            self.resident = None
        self.parts[name] = modules
        self._move(name, away=self.offload)

    def bring(self, name: str, *modules: nn.Module) -> None:
        """Have this part on the device before it is used; what was there makes room first.

        `modules`, if given, are the part's from now on.
        """
        if modules and self.parts.get(name) != modules:
            self.add(name, *modules)
        if not self.offload or self.resident == name:
            return
        if self.resident:
            self._move(self.resident, away=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        self.resident = name
        self._move(name, away=False)

    def _move(self, name: str, away: bool) -> None:
        for module in self.parts[name]:
            module.to("cpu" if away else self.device)
