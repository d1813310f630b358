"""Measure everything at true size with random weights, which needs no download.

    python -m img_minimal.bench.true_size --model sdxl
    python -m img_minimal.bench.true_size --model flux --mllm llava-7b --offload

The images are noise; what they cost is not. Prints the tables of `python -m img_minimal.bench` (the
aligner, features of the twin's pairs, IMG and its steps on four images), with the GPU's memory, and
writes them as JSON. Compare with what `python -m img_minimal.bench memory` computes.
"""

import json
from dataclasses import asdict, dataclass

from img_minimal.cli import option, parse, quiet_libraries, run, writable_file


@dataclass
class Config:
    """Flags of this command."""

    model: str = option("sdxl", "whose shapes", choices=["sdxl", "flux"])
    mllm: str = option("llava-13b", "which MLLM", choices=["llava-13b", "llava-7b"])
    offload: str = option(
        "none",
        "what waits in RAM, as for sample.py",
        choices=["none", "models", "layers", "auto"],
        bare="models",
    )
    dtype: str = option("bf16", "precision of the big models", choices=["fp32", "bf16", "fp16"])
    json: str = option("true-size.json", "where the numbers go")


if __name__ == "__main__":
    parse(Config, __doc__)  # answers --help before torch is imported, which takes seconds

import torch
from transformers import CLIPImageProcessorPil
from transformers.modeling_utils import local_torch_dtype

from img_minimal.bench.__main__ import MEASURES, measure
from img_minimal.bench.memory import FP32, build
from img_minimal.bench.plan import TEXT_STATES
from img_minimal.devices import Precision, Turns, best_device
from img_minimal.files import write_whole
from img_minimal.hub.mllms import fit_llava
from img_minimal.mllm import MLLM
from img_minimal.pipeline import IMG
from img_minimal.presets import Preset, find_preset


def random_img(preset: Preset, mllm: str) -> IMG:
    """Build the whole method at true size, with the twins' scheduler, tokenizers and processor."""
    name, turns = preset.backbone, Turns(best_device(), preset.models.offload)
    precision = Precision.named(preset.models.dtype, turns.device)
    torch.manual_seed(0)
    with local_torch_dtype(precision.weights):  # no copy in fp32 comes first
        parts = build(name, mllm, turns.home)
    for part, module in parts.items():
        module.eval().requires_grad_(False)
        if part in FP32[name]:
            module.float()
    twin = IMG(preset=f"tiny-{name}")
    old, prompt, processor = twin.backbone.pipe, twin.backbone.image_prompt, twin.guide.processor
    old.tokenizer.model_max_length = TEXT_STATES["sdxl"]
    old.tokenizer_2.model_max_length = TEXT_STATES[name]
    encoder, model = parts.pop("image_encoder"), parts["mllm"].to(precision.mllm)
    own = {part: parts[part] for part in old.components.keys() & parts}
    pipe = type(old)(**(old.components | own))
    pipe.set_progress_bar_config(disable=True)
    prompt = type(prompt)(encoder, CLIPImageProcessorPil(), parts["head"], precision)
    fit_llava(processor, model.config)
    model.config.image_token_id = processor.image_token_id
    backbone = type(twin.backbone)(pipe, prompt, parts["branch"], preset, turns)
    return IMG(backbone, MLLM(model, processor), parts["aligner"])


def main() -> int:
    """Measure, print, write."""
    config, _ = parse(Config, __doc__)
    quiet_libraries()
    writable_file(config.json, "--json", (".json",))
    preset = find_preset(config.model).changed(offload=config.offload, dtype=config.dtype)
    img = random_img(preset, config.mllm)
    compute = img.backbone.precision.described(img.turns.device)
    print(f"{compute}\n", flush=True)
    results = asdict(config) | {"compute": compute, "rows": measure(img, MEASURES, rounds=1)}
    write_whole(config.json, json.dumps(results, indent=1) + "\n")
    print(f"saved to {config.json}")
    return 0


if __name__ == "__main__":
    run(main)
