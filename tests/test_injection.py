"""Injected image tokens act as in diffusers' own IP-Adapter, and leave no trace behind."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from release_folder import UNET
from torch import nn

from img_minimal.bench.memory import SIZES
from img_minimal.sdxl import Resampler, cross_attentions, inject, new_branch

B, N, D = 2, 4, 32
TOKENS = torch.randn(B, N, D, generator=torch.Generator().manual_seed(2))
SMALL = {**UNET, "cross_attention_dim": D}
NARROW = ("sample_size", "cross_attention_dim", "norm_num_groups", "addition_time_embed_dim")
NARROW += ("projection_class_embeddings_input_dim",)
# The attention map of the true SDXL, with narrow layers.
TRUE_MAP = (
    SIZES["sdxl"]["unet"]
    | {key: SMALL[key] for key in NARROW}
    | {"block_out_channels": (40, 80, 160)}
)


def new_unet(config: dict) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(config).eval()


def lively_branch(unet: UNet2DConditionModel) -> nn.ModuleDict:
    """Build a branch that differs from the text's, so that a mix-up shows."""
    branch = new_branch(unet)
    torch.manual_seed(1)
    for p in branch.parameters():
        nn.init.normal_(p, std=0.3)
    return branch


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return new_unet(SMALL)


@pytest.fixture
def branch(unet) -> nn.ModuleDict:
    return lively_branch(unet)


def noise(
    unet: UNet2DConditionModel, batch: int = B, masked: bool = False, **added
) -> torch.Tensor:
    """Predict the noise of always the same input."""
    random = torch.Generator().manual_seed(3)
    latents = torch.randn(batch, 4, 8, 8, generator=random)
    text, pooled = (torch.randn(batch, *shape, generator=random) for shape in ((6, D), (24,)))
    added |= {"text_embeds": pooled, "time_ids": torch.ones(batch, 6)}
    mask = torch.arange(6).expand(batch, -1) < 4 if masked else None
    return unet(latents, 7, text, encoder_attention_mask=mask, added_cond_kwargs=added).sample


@torch.no_grad()
@pytest.mark.parametrize(("config", "scale"), [(SMALL, 1.0), (SMALL, -0.7), (TRUE_MAP, 0.2)])
def test_injection_equals_diffusers_own_loader_of_a_public_adapter(config, scale):
    unet = new_unet(config)
    branch, plain = lively_branch(unet), noise(unet)
    with inject(unet, branch, TOKENS, scale):
        ours = noise(unet)

    resampler = Resampler(16, D, tokens=N, width=64, depth=4, heads=1).state_dict()
    adapter = {"image_proj": resampler, "ip_adapter": branch.state_dict()}
    unet._load_ip_adapter_weights([adapter])
    for layer in cross_attentions(unet).values():
        layer.processor.scale = [scale]
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([nn.Identity()])
    theirs = noise(unet, image_embeds=[TOKENS[:, None]])
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - plain).abs().max() > 1e-3, "the tokens do matter"


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_at_scale_zero_and_after_the_context_the_unet_is_bitwise_untouched(unet, branch, masked):
    before = noise(unet, masked=masked)
    for scale in (0.0, torch.zeros(B)):  # left alone, and multiplied by zero
        with inject(unet, branch, TOKENS, scale):
            assert torch.equal(noise(unet, masked=masked), before)
    with inject(unet, branch, TOKENS, 1.0):
        assert not torch.equal(noise(unet, masked=masked), before)
    assert torch.equal(noise(unet, masked=masked), before)


@torch.no_grad()
def test_a_scale_may_differ_between_samples_and_change_between_calls(unet, branch):
    plain, images = noise(unet), {}
    for scale in (0.2, 0.7):
        with inject(unet, branch, TOKENS, scale):
            images[scale] = noise(unet)
    with inject(unet, branch, TOKENS, torch.tensor([0.0, 0.7])):
        both = noise(unet)
    assert torch.allclose(both[0], plain[0], atol=1e-6)
    assert torch.allclose(both[1], images[0.7][1], atol=1e-6)

    scale = torch.tensor(0.0)
    with inject(unet, branch, TOKENS, scale):
        for value, image in images.items():
            scale.fill_(value)
            assert torch.equal(noise(unet), image)


def test_processors_are_put_back_after_an_error_and_those_of_others_stay(unet, branch):
    layer = next(iter(cross_attentions(unet).values()))
    # A module, which diffusers registers as a child of its layer.
    layer.set_processor(IPAdapterAttnProcessor2_0(32, D, num_tokens=(N,)))
    before, children = unet.attn_processors, list(layer.named_children())
    with pytest.raises(KeyError), inject(unet, branch, TOKENS, 1.0):
        during = unet.attn_processors
        raise KeyError
    moved = {name for name in before if during[name] is not before[name]}
    assert moved == {name for name in before if "attn2" in name}
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())
    assert list(layer.named_children()) == children


def test_tokens_scales_and_branches_that_do_not_fit_are_explained(unet, branch):
    before = list(unet.attn_processors.values())
    doubled = pytest.raises(ValueError, match="batch of 4.*tokens for 2.*cat")
    with doubled, inject(unet, branch, TOKENS, 1.0):
        noise(unet, batch=4)
    for tokens, scale, message in (
        (torch.zeros(B, N, D + 1), 1.0, f"expected \\(batch, tokens, {D}\\)"),
        (TOKENS, torch.ones(B + 1), "one per sample"),
    ):
        with pytest.raises(ValueError, match=message), inject(unet, branch, tokens, scale):
            pass
    del branch["3"]
    with pytest.raises(ValueError, match="made for this UNet"), inject(unet, branch, TOKENS, 1.0):
        pass
    assert list(unet.attn_processors.values()) == before


def test_gradients_reach_the_tokens_and_every_projection(unet, branch):
    unet.requires_grad_(False)
    tokens = TOKENS.clone().requires_grad_()
    with inject(unet, branch, tokens, torch.tensor([1.0, 0.0])):
        noise(unet).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in branch.parameters())
    assert tokens.grad[0].abs().max() > 0 and tokens.grad[1].eq(0).all()


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, torch.ones(B)])
def test_injection_works_under_autocast_and_with_a_branch_of_another_dtype(unet, branch, scale):
    with inject(unet, branch, TOKENS, scale):
        exact = noise(unet)
    with torch.autocast("cpu", torch.bfloat16), inject(unet, branch, TOKENS, scale):
        assert torch.allclose(noise(unet).float(), exact, atol=0.1)
    with inject(unet, branch.to(torch.bfloat16), TOKENS, scale):
        assert torch.allclose(noise(unet), exact, atol=0.1)


def test_a_new_branch_copies_the_text_branch_where_the_widths_agree(unet):
    branch, wider = new_branch(unet), new_branch(unet, token_width=48)
    for number, layer in cross_attentions(unet).items():
        for name, text in (("to_k_ip", layer.to_k), ("to_v_ip", layer.to_v)):
            copy = branch[number][name].weight
            assert torch.equal(copy, text.weight) and copy is not text.weight
            assert wider[number][name].weight.shape == (text.out_features, 48)
