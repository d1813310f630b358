"""What does it cost? `python -m img_minimal.bench WHAT`

    memory        which card holds sampling and training, computed from shapes (--model, --mllm)
    aligner       one and three passes and a training step at true size, beside the formula written plainly
    attention     fused attention beside the plain formula, with and without the backward pass
    injection     what image tokens add to a block of SDXL and of FLUX, beside diffusers' own IP-Adapter
    features      pairs on their way to features: read, decode, image tokens, MLLM (--model, --mllm)
    sampling      IMG's steps beside the base's drawing: the twin's measured, true size computed (--model, --mllm)
    growth        passes, guidance length, images, pairs: how cost grows, as a picture (--output)
    optimizers    Muon in fp32 and in bf16, and AdamW, a step each
    startup       help, imports, a first picture, a first training step

`python -m img_minimal.bench.true_size --model sdxl` runs everything at true size, with random weights, on a GPU.

Times are of this machine, and every comparison is between things done in turn in one run: read the ratios. Keep the
machine idle meanwhile.
"""

import argparse
from importlib import import_module

from img_minimal.cli import PICTURES, quiet_libraries, run, writable_file

# Of each subject, which is a file beside this one: the function that gives its table, and what it wants to know.
SUBJECTS = {
    "memory": ("table", ("model", "mllm")),
    "aligner": ("aligner_costs", ("device",)),
    "attention": ("attention_costs", ("device",)),
    "injection": ("injection_costs", ("device",)),
    "features": ("feature_costs", ("model", "mllm")),
    "sampling": ("sampling_costs", ("model", "mllm")),
    "growth": ("growth", ("device", "output")),
    "optimizers": ("optimizers", ("device",)),
    "startup": ("startup_costs", ()),
}
MLLMS = ("llava-13b", "llava-7b", "qwen2.5-vl-7b")


def main() -> int:
    """Print one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=SUBJECTS, help="which cost")
    parser.add_argument("--mllm", default="llava-13b", choices=MLLMS, help="of what is computed (default: llava-13b)")
    parser.add_argument("--model", default="sdxl", choices=("sdxl", "flux"), help="of what is computed (default: sdxl)")
    parser.add_argument("--output", default="growth.png", help="where growth is drawn (default: growth.png)")
    options = vars(parser.parse_args())
    name, wanted = SUBJECTS[options["what"]]
    writable_file(options["output"] if "output" in wanted else None, "--output", PICTURES)
    function = getattr(import_module(f"img_minimal.bench.{options['what']}"), name)  # takes seconds, after --help
    if options["what"] != "memory":
        import torch

        from img_minimal.devices import Precision, best_device

        quiet_libraries()
        options["device"] = device = best_device()
        print(f"{Precision.named('fp32', device).described(device)}; {torch.get_num_threads()} threads\n", flush=True)
    print(function(*(options[key] for key in wanted)))
    return 0


if __name__ == "__main__":
    run(main)
