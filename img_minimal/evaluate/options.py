"""Flags of the evaluation over a prompt file; importing them costs nothing."""

from dataclasses import dataclass

from img_minimal.runtime.cli import option

MODELS = {  # where each scorer was published
    "pickscore": "yuvalkirstain/PickScore_v1",
    "hpsv2": "adams-story/HPSv2-hf",
    "clipscore": "openai/clip-vit-large-patch14",
}


@dataclass
class CompareOptions:
    """The part of the command line that is about prompt files and scorers."""

    prompt_file: str | None = option(
        None, "judge images of these prompts with CLIP models: .txt, .jsonl, .tsv or .json"
    )
    judges: str = option(",".join(MODELS), "scorers for a prompt file, separated by commas")
    output: str = option("outputs/evaluate", "folder that keeps the images and scores of a prompt file")
    pickscore_model: str | None = option(None, f"hub id or folder; default: {MODELS['pickscore']}")
    hpsv2_model: str | None = option(None, f"hub id or folder in CLIPModel's layout; default: {MODELS['hpsv2']}")
    clipscore_model: str | None = option(None, f"hub id or folder; default: {MODELS['clipscore']}")
    judge_processor: str | None = option(None, "tokenizer and image processor of the scorers; default: each one's own")
