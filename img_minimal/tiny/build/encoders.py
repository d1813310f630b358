"""Tokenizer, VAE and CLIP of the twins, which all later parts stand on.

CLIP's batches are random, so a caption rarely meets its twin with the relation reversed, and the
text encoders do not learn to tell the two apart (`python -m img_minimal.tiny.diagnose`). Real CLIP
has the same weakness, for the same reason.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from einops import rearrange
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerBase,
)

from img_minimal.tiny.build.fit import autocast, fit
from img_minimal.tiny.grammar import (
    COLOURS,
    FORMS,
    NUMBERS,
    PLURALS,
    RELATIONS,
    Prompt,
    sample_prompt,
)
from img_minimal.tiny.world import SIZE, place, render

WORDS = sorted(
    {
        *("an", "and", ","),
        *(*COLOURS, *FORMS, *PLURALS.values(), *NUMBERS.values()),
        *" ".join(RELATIONS).split(),
    }
)
LETTERS = "abcdefghijklmnopqrstuvwxyz,.!?'-0123456789"
TEXT_LENGTH = 16  # tokens; the longest caption takes 13
WIDTH, TEXT_WIDTH = 128, 64
PATCH, SIDE = 8, 8  # pixels of a patch; patches along an edge
SQUARE = {  # settings of image processors: 64 pixels, [-1, 1]
    "size": {"shortest_edge": SIZE},
    "crop_size": {"height": SIZE, "width": SIZE},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


# Data


def random_pictures(count: int, seed: int) -> tuple[list[Prompt], Tensor]:
    """Render random training prompts: (prompts, uint8 (count, 3, 64, 64))."""
    rng = random.Random(seed)
    prompts = [sample_prompt(rng) for _ in range(count)]
    pictures = []
    for prompt in prompts:
        pictures.append((render([place(prompt, rng)]) * 255).round().byte())
    return prompts, torch.cat(pictures)


def normalized(pictures: Tensor) -> Tensor:
    """Map uint8 pictures to [-1, 1]."""
    return pictures.float() / 127.5 - 1


@torch.no_grad()
def in_batches(encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Encode N inputs without gradients, a batch at a time."""
    with autocast():
        return torch.cat([encode(batch) for batch in tqdm(inputs.split(250), leave=False)])


def clip_tokenizer() -> CLIPTokenizer:
    """Build a CLIP tokenizer whose byte-pair merges make each word of the grammar one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    # The end of text must not get id 2: CLIPTextModel takes it for an old file and pools elsewhere.
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=list(LETTERS),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    words = [word for word in WORDS for _ in range(5)]
    bpe.train_from_iterator([*words, *LETTERS * 5], trainer)
    model = json.loads(bpe.to_str())["model"]
    return CLIPTokenizer(
        vocab=model["vocab"],
        merges=list(map(tuple, model["merges"])),
        unk_token="<|endoftext|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=TEXT_LENGTH,
    )


def token_ids(tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> Tensor:
    """Tokenize captions: (N, L)."""
    return tokenizer(captions, padding="max_length", return_tensors="pt").input_ids


def image_processor() -> CLIPImageProcessorPil:
    """Build CLIP's image processor at 64 pixels."""
    return CLIPImageProcessorPil(**SQUARE)


# VAE


def new_vae() -> AutoencoderKL:
    """Build SDXL's kind of VAE, 64 x 64 x 3 <-> 8 x 8 x 4: 0.5 M parameters, no attention."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
        force_upcast=False,
    )


def encode_latents(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Encode uint8 pictures to latents (N, 4, 8, 8), scaled to a deviation of 1."""

    def encode(batch: Tensor) -> Tensor:
        return vae.encode(normalized(batch)).latent_dist.mode()

    return in_batches(encode, pictures).float() * vae.config.scaling_factor


def build_vae(workdir: Path, target: Path, steps: int = 1600, count: int = 20_000) -> None:
    """Train the VAE and save it below `target`."""
    torch.manual_seed(0)
    vae = new_vae().to(memory_format=torch.channels_last)
    _, pictures = random_pictures(count, seed=1)

    def loss_of_step(step: int) -> Tensor:
        x = normalized(pictures[torch.randint(count, (24,))])
        x = x.contiguous(memory_format=torch.channels_last)
        with autocast():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        return F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 1e-6 * posterior.kl().float().mean()

    modules = nn.ModuleDict({"vae": vae})
    fit(workdir / "vae", modules, loss_of_step, steps, lr=2.5e-3, weight_decay=0.0)
    latents = encode_latents(vae, pictures[:1000]) / vae.config.scaling_factor
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.to(torch.bfloat16).save_pretrained(target / "sdxl/vae")


# CLIP


def sine_positions(width: int, side: int) -> Tensor:
    """Encode rows and columns by sines and cosines that a linear layer tells apart.

    Returns (side * side, width).
    """
    frequency = 1.5 / 40 ** (torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, width / 2)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, width)


class CLIP(nn.Module):
    """Two text encoders (the second with a projection) and a vision encoder, trained by contrast.

    `project_1`, `pixels` and `scales` are used in training only.
    """

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        image = CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=PATCH,
            projection_dim=WIDTH,
        )
        self.vision = CLIPVisionModelWithProjection(image)
        self.text_1, self.text_2 = CLIPTextModel(text), CLIPTextModelWithProjection(text)
        # The default start is noise, from which 1,000 steps never make a map, and later parts need
        # positions.
        with torch.no_grad():
            positions = self.vision.vision_model.embeddings.position_embedding.weight
            positions[1:] = 0.3 * sine_positions(WIDTH, SIDE)
        self.project_1 = nn.Linear(TEXT_WIDTH, WIDTH, bias=False)
        self.pixels = nn.Linear(WIDTH, 48)
        self.scales = nn.Parameter(torch.full((2,), 2.6))

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of pixels (B, 3, 64, 64) and captions (B, L), and its parts."""
        with autocast():
            vision = self.vision(x, output_hidden_states=True)
            text_1 = self.project_1(self.text_1(tokens).pooler_output)
            text_2 = self.text_2(tokens).text_embeds
            drawn = self.pixels(vision.hidden_states[-2][:, 1:]).float()
        same = (tokens[:, None] == tokens[None]).all(-1).fill_diagonal_(False)
        loss_1, accuracy_1 = contrast(vision.image_embeds, text_1, self.scales[0], same)
        loss_2, accuracy_2 = contrast(vision.image_embeds, text_2, self.scales[1], same)
        # A patch's feature also has to know its own pixels (4 x 4 of them), a dense task that keeps
        # positions in the features: (B, 64, 48).
        small = F.avg_pool2d(x, PATCH // 4)
        pixels = rearrange(small, "b c (y i) (x j) -> b (y x) (c i j)", i=4, j=4)
        unexplained = F.mse_loss(drawn, pixels) / pixels.var()
        parts = {"accuracy_1": accuracy_1, "accuracy_2": accuracy_2, "unexplained": unexplained}
        return loss_1 + loss_2 + 3 * unexplained, parts


def contrast(images: Tensor, texts: Tensor, scale: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Compute CLIP's symmetric loss and the accuracy within the batch.

    `same` (B, B) marks other samples with the same caption, which do not count.
    """
    images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    logits = (scale.exp() * images @ texts.T).masked_fill(same, -1e4)
    target = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, (logits.argmax(1) == target).float().mean()


def open_vision(folder: Path) -> CLIPVisionModelWithProjection:
    """Load a vision encoder in fp32."""
    return CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32)


def build_clip(
    workdir: Path, target: Path, steps: int = 1000, batch_size: int = 160, count: int = 24_000
) -> None:
    """Train text encoders and vision encoder; save them, with tokenizers, below `target`."""
    torch.manual_seed(10)
    tokenizer = clip_tokenizer()
    clip = CLIP(tokenizer)
    prompts, pictures = random_pictures(count, seed=11)
    tokens = token_ids(tokenizer, list(map(str, prompts)))

    def random_batch() -> tuple[Tensor, dict[str, Tensor]]:
        i = torch.randint(count, (batch_size,))
        return clip(normalized(pictures[i]), tokens[i])

    def loss_of_step(step: int) -> Tensor:
        loss, _ = random_batch()
        return loss

    @torch.no_grad()
    def measure() -> dict[str, float]:
        _, parts = random_batch()
        return {name: value.item() for name, value in parts.items()}

    fit(
        workdir / "clip",
        nn.ModuleDict({"clip": clip}),
        loss_of_step,
        steps,
        lr=1.2e-3,
        weight_decay=0.02,
        hold=0.4,
        measure=measure,
        save_every=100,
        seed=12,
    )
    clip.to(torch.bfloat16)
    clip.text_1.save_pretrained(target / "sdxl/text_encoder")
    clip.text_2.save_pretrained(target / "sdxl/text_encoder_2")
    clip.vision.save_pretrained(target / "image_encoder")
    tokenizer.save_pretrained(target / "sdxl/tokenizer")
    tokenizer.save_pretrained(target / "sdxl/tokenizer_2")
    image_processor().save_pretrained(target / "image_encoder")
