"""Where models are and how precisely they compute: device, dtype, and one big model on the GPU at a time."""

from dataclasses import dataclass

import torch
from torch import nn

from img_minimal.errors import UserError


def best_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Precision:
    """Dtypes of a run. Resampler and aligner are small and always compute in fp32; so does SDXL's VAE, see `draw`."""

    weights: torch.dtype  # of the base model and of the image encoder
    mllm: torch.dtype
    autocast: bool = False  # draw and encode images in bf16 with fp32 weights

    @classmethod
    def named(cls, name: str | None, device: torch.device) -> "Precision":
        """fp32, bf16, fp16, or mixed; None is what the authors' sampler uses on a GPU, and fp32 on a CPU.

        The authors' is fp16 for diffusion, whose public files are fp16, and bf16 for the MLLM, whose activations are
        large. mixed is fp32 weights under bf16 autocast, and the MLLM in bf16.
        Raises UserError for another name.
        """
        full, half, brain = torch.float32, torch.float16, torch.bfloat16
        known = {
            "fp32": cls(full, full),
            "bf16": cls(brain, brain),
            "fp16": cls(half, half),
            "mixed": cls(full, brain, autocast=True),
            None: cls(half, brain) if device.type == "cuda" else cls(full, full),
        }
        if name not in known:
            raise UserError(f"unknown dtype {name!r}; expected {', '.join(k for k in known if k)}")
        return known[name]


class Placement:
    """Which models are on the device: all of them, or with `offload` only the one that was brought last.

    A sampling run then moves diffusion -> image prompt -> MLLM -> aligner -> diffusion through the GPU; the rest waits
    in the computer's memory. On a CPU the same moves lead nowhere.
    """

    def __init__(self, device: torch.device | None = None, offload: bool = False):
        self.device, self.offload = device or best_device(), offload
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

    def bring(self, name: str) -> None:
        """Have this part on the device before it is used; what was there makes room first."""
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
