"""Run everything at true size with random weights, which needs no download: seconds and memory.

    python -m img_minimal.bench.true_size --model sdxl
    python -m img_minimal.bench.true_size --model flux --mllm llava-7b --offload

The images are noise; what they cost is not. Measures one image (draw, look, align, draw again),
features of the twin's pairs, steps of train.py on them, and LoRA steps of the MLLM. Prints a table
and writes it as JSON, with the card's name and what `python -m img_minimal.bench memory` computes.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from tempfile import TemporaryDirectory

from img_minimal.cli import option, parse, quiet_libraries, run, writable_file

PROMPT = "a red circle above a blue square"


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
    dtype: str | None = option(None, "default: the preset's", choices=["fp32", "bf16", "fp16"])
    json: str | None = option(None, "where the numbers go (default: true-size-MODEL.json)")


if __name__ == "__main__":
    parse(Config, __doc__)  # answers --help before torch is imported, which takes seconds

import torch
from transformers import CLIPImageProcessorPil

from img_minimal.backbone import backbone_class
from img_minimal.bench.memory import (
    ALWAYS_FP32,
    GIB,
    build,
    matmul_rate,
    needs,
    operations,
)
from img_minimal.data.features import Encoder, StreamedData
from img_minimal.data.pairs import pair_stream, triplet_stream
from img_minimal.detector import Detector, detector_data, train_detector
from img_minimal.devices import Precision, Turns, best_device
from img_minimal.files import Clock, peak_bytes, write_whole
from img_minimal.mllm import MLLM
from img_minimal.pipeline import IMG
from img_minimal.presets import TWINS, Preset, find_preset
from img_minimal.run import Run
from train import train


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build models in this type within the context, so that no copy in fp32 comes first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_img(preset: Preset, mllm: str) -> IMG:
    """Build the whole method at true size, with the twins' scheduler and tokenizers."""
    name, turns = preset.backbone, Turns(best_device(), preset.models.offload)
    kind, precision = backbone_class(name), Precision.named(preset.models.dtype, turns.device)
    torch.manual_seed(0)
    with default_dtype(precision.weights):
        built = build(mllm, name, turns.home)
    for part, module in built.items():
        module.eval().requires_grad_(False)
        if part in ALWAYS_FP32[name]:
            module.float()
    branch, encoder = built.pop("branch"), built.pop("image_encoder")
    aligner, model = built.pop("aligner"), built.pop("mllm")
    head = built.pop("resampler" if name == "sdxl" else "projection")
    twin = kind.open_pipe(find_preset(f"tiny-{name}").models, precision)
    pipe = type(twin)(**(twin.components | built))
    pipe.set_progress_bar_config(disable=True)
    pipe.tokenizer.model_max_length = 77
    pipe.tokenizer_2.model_max_length = 77 if name == "sdxl" else 512
    image_prompt = kind.image_prompts(encoder, CLIPImageProcessorPil(), head, precision)

    processor = MLLM.from_pretrained(TWINS / "llava-stock").processor
    vision, images = model.config.vision_config, processor.image_processor
    side, processor.patch_size = vision.image_size, vision.patch_size
    images.size = {"shortest_edge": side}
    images.crop_size = {"height": side, "width": side}
    model.config.image_token_id = processor.image_token_id
    guide = MLLM(model.to(precision.mllm), processor)
    return IMG(kind(pipe, image_prompt, branch, preset, turns), guide, aligner)


@contextmanager
def measuring(rows: dict[str, dict[str, float]], name: str) -> Iterator[None]:
    """Add seconds and peak memory of this context as a row, and print it."""
    clock, on_gpu = Clock(), torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with clock(name):
        yield
    took = clock.seconds[name]
    peak = (torch.cuda.max_memory_allocated() if on_gpu else peak_bytes()) / GIB
    rows[name] = {"seconds": took, "peak_gib": peak}
    print(f"| {name} | {took:.2f} | {peak:.1f} |", flush=True)


def measure(preset: Preset, mllm: str, steps: int = 20, pairs: int = 160) -> dict:
    """Measure everything in turn; return what becomes JSON."""
    rows: dict[str, dict[str, float]] = {}
    print("| measured | s | GiB at most |\n|---|---|---|")
    with measuring(rows, "build"):
        img = random_img(preset, mllm)
    for name in ("one image, the first time", "one image"):
        with measuring(rows, name):
            img.stages([PROMPT], [0])

    # Training holds image encoder and MLLM on the GPU together, and nothing that draws.
    prompt, precision, models = img.backbone.image_prompt, img.backbone.precision, preset.models
    img.turns.bring(prompt, img.guide.model)
    encoder = Encoder(prompt, img.guide, 0.0, 0, models.encode_batch, models.mllm_batch)
    stream = pair_stream(TWINS / "pairs.parquet", pairs, pairs)
    items = next(stream.chunks()).items
    feature_row = f"features of {pairs} pairs"
    with measuring(rows, feature_row):
        features = encoder(items)
    data = StreamedData(stream, lambda items, number: features)
    data.widths = encoder.widths
    settings = replace(preset.training, steps=steps, save_every=steps)
    name = f"{steps} steps of train.py, batch {settings.batch_size}"
    with TemporaryDirectory() as folder, measuring(rows, name):
        train(Run(folder, {}), data, settings, precision)

    size = preset.finetuning.micro_batch
    settings = replace(preset.finetuning, steps=3, save_every=3, batch_size=size)
    if img.turns.offload != "layers":  # finetuning needs the whole MLLM
        detector = Detector(img.guide, settings.lora_rank, precision)
        triplets = triplet_stream(TWINS / "triplets.parquet", 2 * size)
        data = detector_data(triplets)
        name = f"3 LoRA steps of the MLLM, batch {size}"
        with TemporaryDirectory() as folder, measuring(rows, name):
            train_detector(Run(folder, {}), detector, data, settings)

    device, took = img.turns.device, rows[feature_row]["seconds"]
    rate = pairs * operations(preset.name, mllm)["look"] / took
    return {
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "rows": rows,
        "tokens_per_second": len(features.guidance) / took,
        "share_of_matmul_rate": rate / matmul_rate(device, 4096, precision.mllm),
    }


def main() -> int:
    """Measure, compare with what is computed, write."""
    config, _ = parse(Config, __doc__)
    quiet_libraries()
    path = config.json or f"true-size-{config.model}.json"
    writable_file(path, "--json", (".json",))
    preset = find_preset(config.model)
    dtype = config.dtype or preset.models.dtype
    results = measure(preset.changed(offload=config.offload, dtype=dtype), config.mllm)
    print(
        f"\n{results['card']}: {results['tokens_per_second']:,.0f} tokens per second through the "
        f"MLLM, {results['share_of_matmul_rate']:.0%} of the card's own matmul rate; computed:"
    )
    computed = {}
    for need in needs(config.model, config.mllm):
        name, gib = f"{need.run}, {need.dtype}", need.total / GIB
        computed[name] = gib
        print(f"  {gib:5.1f} GiB  {name}")
    results |= asdict(config) | {"computed_gib": computed}
    write_whole(path, json.dumps(results, indent=1) + "\n")
    print(f"saved to {path}")
    return 0


if __name__ == "__main__":
    run(main)
