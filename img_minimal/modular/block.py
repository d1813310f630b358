"""IMG as a block of diffusers' Modular Diffusers, for SDXL.

It turns first images and their prompt into the embeddings of diffusers' own IP-Adapter, and so
combines with other blocks, such as ControlNet and inpainting. This folder is all that a repository
on the hub needs for `ModularPipelineBlocks.from_pretrained(repository, trust_remote_code=True)`.
"""

from diffusers import ModularPipeline, ModularPipelineBlocks
from diffusers.modular_pipelines import ComponentSpec, InputParam, OutputParam, PipelineState
from torch import nn

from img_minimal.cli import check
from img_minimal.pipeline import IMG


class IMGBlock(ModularPipelineBlocks):
    """Look at the images `seen`, one per prompt, and let the UNet attend to their aligned tokens.

    Without `seen`, the UNet draws as if it had no IP-Adapter. Scale and passes are those of `img`;
    the question for the first image is drawn from `seed`.
    """

    model_name = "stable-diffusion-xl"
    expected_components = [ComponentSpec("img", IMG)]
    inputs = [InputParam("prompt"), InputParam("seen"), InputParam("seed", default=0)]
    intermediate_outputs = [
        OutputParam("ip_adapter_embeds"),
        OutputParam("negative_ip_adapter_embeds"),
    ]

    def __call__(self, pipe: ModularPipeline, state: PipelineState) -> tuple:
        """Add the embeddings, (B, 1, N, D) each, to the state. Raises UserError."""
        block, img = self.get_block_state(state), pipe.img
        loaded = img and pipe.unet.encoder_hid_proj
        check(loaded, "missing: pipe.update_components(img=IMG(...)) or pipe.load_ip_adapter(...)")
        sampling = img.backbone.sampling
        check(sampling.scale_end == 1, "a block cannot lower the scale: open IMG with scale_end=1")

        negative = img.backbone.negative_tokens().to(pipe._execution_device, pipe.unet.dtype)
        tokens, scale = negative, 0.0
        if block.seen is not None:
            tokens, scale = img.align(block.seen, block.prompt, block.seed), sampling.scale
        # diffusers repeats prompts and embeddings in different orders.
        alone = len(tokens) == 1 or state.get("num_images_per_prompt") in (None, 1)
        check(alone, "for several images of several prompts, repeat the prompts instead")
        pipe.set_ip_adapter_scale(scale)
        # Both kinds of tokens are projected already, each in its own way.
        loaded.image_projection_layers = nn.ModuleList([nn.Identity()])
        tokens = tokens.to(negative)[:, None]
        block.ip_adapter_embeds = [tokens]
        block.negative_ip_adapter_embeds = [negative[:, None].expand_as(tokens)]
        self.set_block_state(state, block)
        return pipe, state
