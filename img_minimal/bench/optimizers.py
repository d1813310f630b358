"""What a step of Muon costs when its products are in fp32 and in bf16, on this machine."""

import torch

from img_minimal.aligner import ImplicitAligner
from img_minimal.bench.measure import in_turn, rows
from img_minimal.optimizer import new_optimizer
from img_minimal.presets import find_preset


def optimizers(device: torch.device, rounds: int = 7) -> str:
    """One step of the twin's aligner with Muon in either dtype and with AdamW, in turn, as ratios to the first."""
    preset = find_preset("tiny-sdxl")
    torch.manual_seed(0)
    aligner = ImplicitAligner(128, 160, preset.depth, preset.heads, preset.head_dim).to(device)
    for parameter in aligner.parameters():
        parameter.grad = torch.randn_like(parameter)
    kinds = {"Muon, fp32": ("muon", torch.float32), "Muon, bf16": ("muon", torch.bfloat16), "AdamW": ("adamw", None)}
    made = {
        title: new_optimizer(name, aligner.parameters(), lr=1e-4, weight_decay=0.0, dtype=dtype)
        for title, (name, dtype) in kinds.items()
    }
    return rows("a step of the twin's aligner", in_turn({t: o.step for t, o in made.items()}, rounds))
