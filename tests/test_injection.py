"""Injected image tokens act as in diffusers' own IP-Adapter, and nothing of them remains afterwards."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from release_folder import UNET
from torch import nn

from img_minimal.sdxl import DecoupledAttention, ImageBranch, cross_attentions, inject

B, N, D = 2, 4, 32
TINY = UNET | {"cross_attention_dim": D}


def new_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**TINY).eval()


def new_branch(unet: UNet2DConditionModel) -> ImageBranch:
    """A branch that differs from the text's, so that a mix-up shows."""
    branch = ImageBranch.for_unet(unet)
    torch.manual_seed(1)
    for p in branch.parameters():
        nn.init.normal_(p, std=0.3)
    return branch


def tokens(batch: int = B) -> torch.Tensor:
    return torch.randn(batch, N, D, generator=torch.Generator().manual_seed(2))


def draw(unet: UNet2DConditionModel, batch: int = B, masked: bool = False, **added) -> torch.Tensor:
    random = torch.Generator().manual_seed(3)
    latents = torch.randn(batch, 4, 8, 8, generator=random)
    text, pooled = torch.randn(batch, 6, D, generator=random), torch.randn(batch, 24, generator=random)
    conditions = {"text_embeds": pooled, "time_ids": torch.ones(batch, 6), **added}
    mask = torch.arange(6).expand(batch, -1) < 4 if masked else None
    return unet(latents, 7, text, encoder_attention_mask=mask, added_cond_kwargs=conditions).sample


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.2, 1.0, -0.7])
def test_injection_equals_diffusers_own_ip_adapter(scale):
    unet = new_unet()
    branch = new_branch(unet)
    with inject(unet, branch, tokens(), scale):
        ours = draw(unet)

    processors = unet.attn_processors
    for i, name in enumerate(list(processors)):
        if "attn2" in name:
            k, v = branch[str(i)]["to_k_ip"].weight, branch[str(i)]["to_v_ip"].weight
            processors[name] = IPAdapterAttnProcessor2_0(k.shape[0], k.shape[1], num_tokens=(N,), scale=[scale])
            processors[name].load_state_dict({"to_k_ip.0.weight": k, "to_v_ip.0.weight": v})
    plain = draw(unet)
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([nn.Identity()])
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    theirs = draw(unet, image_embeds=[tokens()[:, None]])
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - plain).abs().max() > 1e-3  # the tokens do matter


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_at_scale_zero_and_after_the_context_the_unet_is_bitwise_untouched(masked):
    unet = new_unet()
    branch, before = new_branch(unet), draw(unet, masked=masked)
    with inject(unet, branch, tokens(), 0.0):
        assert torch.equal(draw(unet, masked=masked), before)
    with inject(unet, branch, tokens(), torch.zeros(B)):  # installed, but multiplied by zero
        assert torch.equal(draw(unet, masked=masked), before)
    with inject(unet, branch, tokens(), 1.0):
        assert not torch.equal(draw(unet, masked=masked), before)
    assert torch.equal(draw(unet, masked=masked), before)


@torch.no_grad()
def test_each_sample_can_have_its_own_scale():
    unet = new_unet()
    branch = new_branch(unet)
    with inject(unet, branch, tokens(), torch.tensor([0.0, 0.5])):
        both = draw(unet)
    with inject(unet, branch, tokens(), 0.5):
        half = draw(unet)
    assert torch.allclose(both[0], draw(unet)[0], atol=1e-6) and torch.allclose(both[1], half[1], atol=1e-6)


def test_processors_are_put_back_even_after_an_error_and_others_never_move():
    unet = new_unet()
    own = next(iter(cross_attentions(unet).values()))
    own.set_processor(IPAdapterAttnProcessor2_0(32, D, num_tokens=(N,)))  # a module: diffusers registers it as a child
    before, children = unet.attn_processors, list(own._modules)
    with pytest.raises(KeyError), inject(unet, new_branch(unet), tokens(), 1.0):
        during = unet.attn_processors
        raise KeyError
    assert all(isinstance(p, DecoupledAttention) for name, p in during.items() if "attn2" in name)
    assert all(p is before[name] for name, p in during.items() if "attn1" in name)
    after = unet.attn_processors
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert list(own._modules) == children


@torch.no_grad()
def test_contexts_nest():
    unet = new_unet()
    branch = new_branch(unet)
    with inject(unet, branch, tokens(), 1.0):
        outer = draw(unet)
        with inject(unet, branch, -tokens(), 1.0):
            assert not torch.equal(draw(unet), outer)
        assert torch.equal(draw(unet), outer)


def test_a_batch_that_guidance_doubled_is_explained():
    unet = new_unet()
    doubled = pytest.raises(ValueError, match="batch of 4.*tokens for 2.*cat")
    with doubled as caught, inject(unet, new_branch(unet), tokens(), 1.0):
        draw(unet, batch=4)
    assert "\n" not in str(caught.value)
    assert all(isinstance(p, AttnProcessor2_0) for p in unet.attn_processors.values())


def test_what_does_not_fit_is_refused_before_anything_is_installed():
    unet = new_unet()
    branch = new_branch(unet)
    for bad_tokens, scale, message in [
        (torch.zeros(B, N, D + 1), 1.0, f"expected \\(batch, tokens, {D}\\)"),
        (tokens(), torch.ones(B + 1), "one per sample"),
    ]:
        with pytest.raises(ValueError, match=message), inject(unet, branch, bad_tokens, scale):
            pass
    del branch["3"]
    with pytest.raises(ValueError, match="made for this UNet"), inject(unet, branch, tokens(), 1.0):
        pass


def test_keys_and_values_are_projected_once_without_gradients_and_each_time_with_them():
    unet = new_unet()
    branch, calls = new_branch(unet), []
    branch["1"]["to_k_ip"].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), inject(unet, branch, tokens(), 1.0):
        draw(unet), draw(unet)
    assert len(calls) == 1
    with inject(unet, branch, tokens(), 1.0):
        draw(unet), draw(unet)
    assert len(calls) == 3


@torch.no_grad()
def test_a_scale_of_no_dimensions_acts_like_the_number_and_may_change_between_calls():
    unet = new_unet()
    branch, scale = new_branch(unet), torch.tensor(0.2)
    with inject(unet, branch, tokens(), scale):
        first = draw(unet)
        scale.fill_(0.7)
        second = draw(unet)
    for number, ours in ((0.2, first), (0.7, second)):
        with inject(unet, branch, tokens(), number):
            assert torch.equal(draw(unet), ours)


def test_gradients_reach_the_tokens_and_every_projection():
    unet = new_unet().requires_grad_(False)
    branch, c = new_branch(unet), tokens().requires_grad_()
    with inject(unet, branch, c, torch.tensor([1.0, 0.0])):
        draw(unet).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in branch.parameters())
    assert c.grad[0].abs().max() > 0 and c.grad[1].eq(0).all()
    assert all(p.grad is None for p in unet.parameters())


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, torch.ones(B)])
def test_injection_works_under_autocast_and_with_a_branch_of_another_dtype(scale):
    unet = new_unet()
    branch = new_branch(unet)
    with inject(unet, branch, tokens(), scale):
        exact = draw(unet)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(draw(unet).float(), exact, atol=0.1)
    with inject(unet, branch.to(torch.bfloat16), tokens(), scale):
        assert torch.allclose(draw(unet), exact, atol=0.1)


def test_a_new_branch_copies_the_text_branch_where_the_widths_agree():
    unet = new_unet()
    branch, wider = ImageBranch.for_unet(unet), ImageBranch.for_unet(unet, token_width=48)
    for key, attn in cross_attentions(unet).items():
        assert torch.equal(branch[key]["to_k_ip"].weight, attn.to_k.weight)
        assert torch.equal(branch[key]["to_v_ip"].weight, attn.to_v.weight)
        assert branch[key]["to_k_ip"].weight.data_ptr() != attn.to_k.weight.data_ptr()  # a copy: the text stays frozen
        assert wider[key]["to_k_ip"].weight.shape == (32, 48)
