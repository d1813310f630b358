"""CLIP: two small text encoders and one vision encoder, trained contrastively on pictures and captions.

Batches are random, so a caption rarely meets its twin with the relation reversed, and the text encoders do not learn to
tell the two apart (`python -m img_minimal.tiny.diagnose`). Real CLIP has the same weakness, for the same reason.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from img_minimal.tiny.build.loop import autocast, fit
from img_minimal.tiny.build.tokenizers import TEXT_LENGTH, clip_tokenizer
from img_minimal.tiny.build.vae import random_pictures

WIDTH, TEXT_WIDTH, PATCH, SIDE = 128, 64, 8, 8  # SIDE: patches along an edge


def sine_position_2d(width: int, side: int) -> Tensor:
    """Sines and cosines of row and column, (side * side, width): places a linear attention layer can tell apart."""
    frequency = 1.5 / 40 ** (torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, width / 2)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, width)


def new_models() -> nn.ModuleDict:
    """Untrained encoders: text_1 (SDXL's first), text_2 (with projection), vision."""
    tokenizer = clip_tokenizer()
    text = dict(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=TEXT_LENGTH, projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=64,
            patch_size=PATCH,
            projection_dim=WIDTH,
        )  # fmt: skip
    )
    with torch.no_grad():
        # The default start is noise, from which 1,000 steps never make a map; attention downstream must find places.
        vision.vision_model.embeddings.position_embedding.weight[1:] = 0.3 * sine_position_2d(WIDTH, SIDE)
    return nn.ModuleDict(
        {
            "text_1": CLIPTextModel(CLIPTextConfig(**text)),
            "text_2": CLIPTextModelWithProjection(CLIPTextConfig(**text)),
            "vision": vision,
        }
    )


def image_processor() -> CLIPImageProcessorPil:
    """64 pixels, [-1, 1]."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def contrast(images: Tensor, texts: Tensor, scale: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's symmetric loss and in-batch accuracy; `same` marks other rows with the very same caption."""
    logits = scale.exp() * F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
    logits = logits.masked_fill(same, -1e4)
    target = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, (logits.argmax(1) == target).float().mean()


def build(workdir: Path, target: Path, steps: int = 1000, batch: int = 160, count: int = 24_000) -> None:
    """Train; save text_encoder, text_encoder_2, tokenizers and image_encoder below `target`."""
    torch.manual_seed(10)
    models = new_models()
    models["extra"] = nn.ModuleDict(  # used in training only
        {"project_1": nn.Linear(TEXT_WIDTH, WIDTH, bias=False), "pixels": nn.Linear(WIDTH, 48)}
    )
    models["extra"].register_parameter("scales", nn.Parameter(torch.full((2,), 2.6)))
    prompts, pictures = random_pictures(count, seed=11)
    tokens = clip_tokenizer()([str(p) for p in prompts], padding="max_length", return_tensors="pt").input_ids
    accuracy = torch.zeros(2)
    dense = torch.zeros(1)

    def loss_of_step(step: int) -> Tensor:
        """The loss of a random batch."""
        i = torch.randint(len(pictures), (batch,))
        x, t = pictures[i].float() / 127.5 - 1, tokens[i]
        same = (t[:, None] == t[None]).all(-1) & ~torch.eye(batch, dtype=torch.bool)
        with autocast():
            vision = models["vision"](x, output_hidden_states=True)
            text_1 = models["extra"]["project_1"](models["text_1"](t).pooler_output)
            text_2 = models["text_2"](t).text_embeds
            drawn = models["extra"]["pixels"](vision.hidden_states[-2][:, 1:])
        loss_1, acc_1 = contrast(vision.image_embeds, text_1, models["extra"].scales[0], same)
        loss_2, acc_2 = contrast(vision.image_embeds, text_2, models["extra"].scales[1], same)
        # A patch's feature should also know its own pixels (4 x 4 of them): a dense task keeps places in the features.
        pixels = rearrange(F.avg_pool2d(x, PATCH // 4), "b c (y i) (x j) -> b (y x) (c i j)", i=4, j=4)  # (B, 64, 48)
        dense.copy_(F.mse_loss(drawn.float(), pixels).detach() / pixels.var())
        accuracy.lerp_(torch.stack([acc_1, acc_2]), 0.05)
        return loss_1 + loss_2 + 3 * F.mse_loss(drawn.float(), pixels) / pixels.var()

    def watch(step: int) -> str:
        """Accuracy in the last batch, and what the dense loss leaves unexplained."""
        return f"in-batch accuracy {accuracy[0]:.3f} and {accuracy[1]:.3f}, pixels unexplained {dense.item():.3f}"

    fit("clip", models, loss_of_step, steps, workdir, lr=1.2e-3, weight_decay=0.02, hold=0.4, watch=watch,
        watch_every=100, seed=12)  # fmt: skip
    for name, folder in (
        ("text_1", "sdxl/text_encoder"),
        ("text_2", "sdxl/text_encoder_2"),
        ("vision", "image_encoder"),
    ):
        models[name].to(torch.bfloat16).save_pretrained(target / folder)
    for folder in ("sdxl/tokenizer", "sdxl/tokenizer_2"):
        clip_tokenizer().save_pretrained(target / folder)
    image_processor().save_pretrained(target / "image_encoder")
