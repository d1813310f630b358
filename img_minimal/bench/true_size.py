"""Everything at true size with random weights, which needs no download: seconds and peaks of sampling and training.

    python -m img_minimal.bench.true_size --model sdxl
    python -m img_minimal.bench.true_size --model flux --mllm llava-7b --offload

What is drawn is noise; what it costs is not. One image (draw, look, align, draw again), features of some pairs, 20
steps of train.py on them, three LoRA steps of the MLLM. Prints a table and writes it as JSON, with the card's name and
the memory that `python -m img_minimal.bench memory` computes for the same.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from img_minimal.cli import quiet_libraries, run, writable_file

MLLMS = ("llava-13b", "llava-7b")
PROMPT = "a red circle above a blue square"


def flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sdxl", choices=("sdxl", "flux"), help="whose shapes (default: sdxl)")
    parser.add_argument("--mllm", default="llava-13b", choices=MLLMS, help="which MLLM (default: llava-13b)")
    parser.add_argument("--offload", action="store_true", help="one big model on the GPU at a time")
    parser.add_argument("--dtype", default=None, choices=("fp32", "bf16", "fp16"), help="default: the preset's")
    parser.add_argument("--json", default=None, help="where the numbers go (default: true-size-MODEL.json)")
    return parser.parse_args()


if __name__ == "__main__":
    flags()  # answers --help before torch is imported, which takes seconds

import torch
from PIL import Image

from img_minimal.aligner import ImplicitAligner
from img_minimal.backbone import true_size
from img_minimal.bench.measure import matmul_rate, seconds
from img_minimal.bench.memory import needs
from img_minimal.bench.sampling import true_size_operations
from img_minimal.bench.true_sizes import build_mllm
from img_minimal.data.features import Batches, Encoder, Features, Part
from img_minimal.data.pairs import Pair, Triplet
from img_minimal.detector import Detector, DetectorState, Examples, train_detector
from img_minimal.devices import Placement, Precision, best_device
from img_minimal.files import peak_bytes, write_whole
from img_minimal.hub.mllms import FAMILIES, square
from img_minimal.mllm import MLLM
from img_minimal.pipeline import IMG, sampling_of
from img_minimal.presets import TINY, Preset, find_preset
from img_minimal.run import Trainer


@contextmanager
def built_in(dtype: torch.dtype) -> Iterator[None]:
    """Within this context new models are of that type, so that no copy in fp32 comes first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_mllm(name: str, dtype: torch.dtype, device: torch.device) -> MLLM:
    """An MLLM of true size, with the few words of the twin's and pictures of its own size."""
    twin = MLLM.from_pretrained(TINY / "llava-stock")
    with built_in(dtype), torch.device(device):
        model = build_mllm(name)
    model.config.image_token_id = twin.processor.image_token_id
    vision = model.config.vision_config
    twin.processor.patch_size = vision.patch_size
    images = twin.processor.image_processor
    images.size, images.crop_size = square(vision.image_size).values()
    return MLLM(model, twin.processor, FAMILIES["llava"])


def random_img(preset: Preset, mllm: str, offload: bool) -> IMG:
    """The whole method at true size."""
    placement = Placement(best_device(), offload)
    precision = Precision.named(preset.dtype, placement.device)
    shapes = true_size(preset.backbone)
    torch.manual_seed(0)
    with built_in(precision.weights):
        parts = shapes.parts(placement.waiting)
    for name, part in parts.items():
        part.eval().requires_grad_(False)
        if name in shapes.ALWAYS_FP32:
            part.float()
    # The twin's tokenizers stand for the public ones.
    backbone = shapes.backbone(parts, TINY / preset.backbone, sampling_of(preset), precision, placement)
    guide = random_mllm(mllm, precision.mllm, placement.waiting)
    with torch.device(placement.waiting):
        aligner = ImplicitAligner(backbone.token_shape[1], guide.width, preset.depth, preset.heads, preset.head_dim)
    return IMG(backbone, guide, aligner, preset.passes, preset.mllm_batch)


class Table:
    """Rows of what was done: seconds, and the most memory at once."""

    def __init__(self):
        self.rows: dict[str, dict[str, float]] = {}

    def measure(self, name: str, call: Callable[[], object]) -> float:
        """Do it once, and note what it took."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        took = seconds(call)
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes()
        self.rows[name] = {"seconds": took, "peak_gib": peak / 2**30}
        print(f"| {name} | {took:.2f} | {peak / 2**30:.1f} |", flush=True)
        return took


def pictures(count: int, side: int = 512) -> list[Image.Image]:
    """Noise."""
    noise = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [Image.fromarray(image.numpy()) for image in noise]


def measure(preset: Preset, mllm: str, offload: bool, steps: int = 20, pairs: int = 160) -> dict:
    """Everything in turn; the dictionary that becomes JSON."""
    table, made = Table(), {}
    print("| what | s | GiB at the most |\n|---|---|---|")
    table.measure("build", lambda: made.update(img=random_img(preset, mllm, offload)))
    img: IMG = made["img"]
    for name in ("one image, the first time", "one image"):
        table.measure(name, lambda: img.stages([PROMPT], [0]))
    images = pictures(2 * pairs)
    facts = train_steps(img, preset, table, images, steps)
    if preset.finetuning.lora_rank:
        lora_steps(img, preset, table, images[:16])
    length = facts.pop("tokens")
    look = true_size_operations(preset.name, mllm)["look"]
    rate = matmul_rate(img.placement.device, 4096, 3, img.guide.model.dtype)
    took = table.rows[f"features of {pairs} pairs"]["seconds"]
    facts = {"tokens_per_second": length / took, "share_of_matmul_rate": pairs * look / took / rate}
    device = img.placement.device
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"model": preset.name, "mllm": mllm, "offload": offload, "card": card, "rows": table.rows} | facts


def train_steps(img: IMG, preset: Preset, table: Table, images: list[Image.Image], steps: int) -> dict[str, float]:
    """Features of pairs, and steps of train.py on them; {"tokens": how many went through the MLLM}."""
    from train import train  # the command's own loop

    pairs = [Pair(f"{PROMPT} {k}", a, b) for k, (a, b) in enumerate(zip(images[::2], images[1::2]))]
    encoder = Encoder(img.backbone.image_prompt, img.guide, 0.0, 0, preset.encode_batch, preset.mllm_batch)
    made: dict[str, Features] = {}

    def features() -> None:
        """Training holds image encoder and MLLM on the GPU together, and nothing that draws."""
        img.backbone.image_prompt.to(img.placement.device)
        img.guide.model.to(img.placement.device)
        made["all"] = encoder(pairs)

    table.measure(f"features of {len(pairs)} pairs", features)
    data = made["all"]
    trainer = Trainer.new(replace(preset, train_steps=steps), encoder.widths, 10, 0)
    batches = Batches(lambda place: iter([Part(data, torch.arange(len(data)))]), preset.batch_size, 0)
    with TemporaryDirectory() as folder:
        table.measure(
            f"{steps} steps of train.py, batch {preset.batch_size}",
            lambda: train(trainer, batches, data[:8], preset, Path(folder), steps=steps, save_every=steps),
        )
    return {"tokens": int(data.mask.sum())}


def lora_steps(img: IMG, preset: Preset, table: Table, images: list[Image.Image], steps: int = 3) -> None:
    """Steps of `train.py --stage mllm`, each of one micro-batch."""
    size = min(preset.finetuning.micro_batch, len(images))
    settings = replace(preset.finetuning, steps=steps, save_every=steps, batch_size=size)
    detector = Detector(img.guide, settings.lora_rank, img.backbone.precision)
    triplets = [Triplet(image, PROMPT, "change the red circle to a red square") for image in images]
    examples = detector.encode(triplets, size)
    data = Examples(examples, torch.zeros(len(examples), dtype=torch.bool))
    batches = Batches(lambda place: iter([Part(data, torch.arange(len(data)))]), size, 0)
    state = DetectorState(detector, settings)
    with TemporaryDirectory() as folder:
        table.measure(
            f"{steps} LoRA steps of the MLLM, batch {size}",
            lambda: train_detector(state, batches, examples[:2], settings, Path(folder)),
        )


def main() -> int:
    """Measure, compare with what is computed, write."""
    options = flags()
    quiet_libraries()
    preset = find_preset(options.model)
    preset = replace(preset, dtype=options.dtype or preset.dtype, offload=options.offload)
    path = options.json or f"true-size-{options.model}.json"
    writable_file(path, "--json", (".json",))
    found = measure(preset, options.mllm, options.offload)
    found["computed_gib"] = {f"{n.run}, {n.dtype}": n.total / 2**30 for n in needs(options.model, options.mllm)}
    print(f"\n{found['card']}: {found['tokens_per_second']:,.0f} tokens per second through the MLLM, "
          f"{found['share_of_matmul_rate']:.0%} of the card's own matmul rate; computed, to compare:")  # fmt: skip
    print("\n".join(f"  {size:5.1f} GiB  {name}" for name, size in found["computed_gib"].items()))
    write_whole(Path(path), json.dumps(found, indent=1) + "\n")
    print(f"saved to {path}")
    return 0


if __name__ == "__main__":
    run(main)
