"""The image branch numbers the cross-attentions of the true SDXL as the public IP-Adapter files do."""

import torch
from diffusers import UNet2DConditionModel

from img_minimal.injection import ImageBranch, cross_attentions

SDXL = {  # the public configuration of the base model's UNet
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


def test_sdxl_has_70_cross_attentions_numbered_down_up_middle():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    layers = cross_attentions(unet)
    assert len(unet.attn_processors) == 140
    assert [int(key) for key in layers] == list(range(1, 140, 2))
    names = {module: name for name, module in unet.named_modules()}
    blocks = [".".join(names[layer].split(".")[:2]) for layer in layers.values()]
    places = {block: (2 * blocks.index(block) + 1, blocks.count(block)) for block in blocks}
    assert places == {
        "down_blocks.1": (1, 4),
        "down_blocks.2": (9, 20),
        "up_blocks.0": (49, 30),
        "up_blocks.1": (109, 6),
        "mid_block.attentions": (121, 10),
    }
    state = ImageBranch.for_unet(unet).state_dict()
    assert len(state) == 140
    assert state["1.to_k_ip.weight"].shape == (640, 2048) and state["139.to_v_ip.weight"].shape == (1280, 2048)
