"""What does it cost? `python -m img_minimal.bench WHAT`

    memory        which card holds sampling and training, computed from shapes (--model, --mllm)
    aligner       one and three passes and a training step at true size, beside the formula written plainly
    injection     what image tokens add to a block of SDXL and of FLUX, beside diffusers' own IP-Adapter
    optimizers    Muon in fp32 and in bf16, and AdamW, a step each
    startup       help, imports, a first picture, a first training step

Times are of this machine, and every comparison is between things done in turn in one run: read the ratios. Keep the
machine idle meanwhile.
"""

import argparse

from img_minimal.runtime.cli import run

WHAT = ("memory", "aligner", "injection", "optimizers", "startup")
MLLMS = ("llava-13b", "llava-7b", "qwen2.5-vl-7b")


def torch_threads() -> int:
    """How many threads torch computes with."""
    import torch

    return torch.get_num_threads()


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
    if options.what == "startup":
        from img_minimal.bench.startup import startup_costs

        print(startup_costs())
        return 0
    from img_minimal.runtime.devices import Precision, best_device

    device = best_device()
    print(Precision.named("fp32", device).described(device) + f"; {torch_threads()} threads\n", flush=True)
    if options.what == "aligner":
        from img_minimal.bench.aligner import aligner_costs

        print(aligner_costs(device))
    elif options.what == "injection":
        from img_minimal.bench.injection import injection_costs

        print(injection_costs(device))
    else:
        from img_minimal.bench.optimizers import optimizers

        print(optimizers(device))
    return 0


if __name__ == "__main__":
    run(main)
