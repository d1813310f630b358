"""Where the time goes while pairs become features: read, decode, image tokens, MLLM; and what padding costs."""

from img_minimal.bench.measure import seconds
from img_minimal.bench.sampling import true_size_operations
from img_minimal.data.features import Features, compute_guidance, compute_tokens
from img_minimal.data.pairs import pair_stream
from img_minimal.load import load_encoder
from img_minimal.presets import find_preset


def stages(pairs: int) -> tuple[dict[str, float], Features]:
    """Seconds of every stage for so many of the twin's pairs, one chunk, and what came of them."""
    preset = find_preset("tiny-sdxl")
    encoder = load_encoder(preset, "mllm", 0)
    table = pair_stream(preset.pairs, pairs, pairs, 0).table
    made: dict = {}

    def read() -> None:
        """Rows, images still encoded."""
        for number, _ in enumerate(table.read(0, 0), start=1):
            if number == pairs:
                break

    def decode() -> None:
        """Rows again, and images, several at once."""
        [chunk] = pair_stream(preset.pairs, pairs, pairs, 0).chunks()
        made["pairs"] = chunk.items

    def tokens() -> None:
        """CLIP and Resampler, each image once."""
        made["tokens"] = compute_tokens(made["pairs"], encoder.tokenizer, [], encoder.encode_batch)

    def guidance() -> None:
        """The MLLM on each pair's loser."""
        made["guidance"] = compute_guidance(made["pairs"], encoder.guide, [], 0, encoder.mllm_batch)

    seconds(read)  # the file's first reading is the disk's
    found = {name: seconds(call) for name, call in
             (("read", read), ("decode", decode), ("image tokens", tokens), ("MLLM", guidance))}  # fmt: skip
    found["decode"] -= found["read"]
    return found, Features(**made["tokens"], **made["guidance"])


def feature_costs(model: str, mllm: str, pairs: int = 2048) -> str:
    """The twin's stages measured, and the shares of the two that are left at true size, computed."""
    found, features = stages(pairs)
    total = sum(found.values())
    lines = [f"| {pairs} pairs of the twin | s | pairs per second | share |", "|---|---|---|---|"]
    for name, time in (found | {"all": total}).items():
        lines.append(f"| {name} | {time:.2f} | {pairs / time:,.0f} | {time / total:.1%} |")
    padding = 1 - features.mask.float().mean().item()
    computed = true_size_operations(model, mllm)
    see, think = 2 * computed["image tokens"], computed["look"]  # an image of each side
    lines += [
        f"\nPadding is {padding:.1%} of the guidance features.",
        f"{model} with {mllm}, computed: {think / 1e12:.1f} TFLOP a pair in the MLLM, {see / 1e12:.2f} in the image "
        f"encoder; the MLLM's are {think / (see + think):.1%} of them.",
    ]
    return "\n".join(lines)
