"""What does it cost? `python -m img_minimal.bench WHAT`

    memory        which card holds sampling and training, computed from shapes (--model, --mllm)
    passes        the true-size aligner: three passes in one call against three calls
    optimizers    Muon in fp32 and in bf16, and AdamW, a step each

Times are of this machine, and every comparison is between things done in turn in one run: read the ratios.
"""

import argparse

from img_minimal.runtime.cli import run

WHAT = ("memory", "passes", "optimizers")
MLLMS = ("llava-13b", "llava-7b", "qwen2.5-vl-7b")


def main() -> int:
    """Print one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WHAT, help="which cost")
    parser.add_argument("--mllm", default="llava-13b", choices=MLLMS, help="for memory (default: llava-13b)")
    parser.add_argument("--model", default="sdxl", choices=("sdxl", "flux"), help="for memory (default: sdxl)")
    options = parser.parse_args()
    if options.what == "memory":
        from img_minimal.bench.memory import table

        print(table(options.model, options.mllm))
        return 0
    from img_minimal.runtime.devices import best_device

    device = best_device()
    if options.what == "passes":
        from img_minimal.bench.passes import passes

        for images in (1, 4):  # sample.py draws four by default
            print(passes(device, images))
    else:
        from img_minimal.bench.optimizers import optimizers

        print(optimizers(device))
    return 0


if __name__ == "__main__":
    run(main)
