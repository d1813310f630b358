"""What the tutorials look through: opened attention is the attention that was computed, and marks are what they say."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from img_minimal.aligner import ImplicitAligner
from img_minimal.sdxl import ImageBranch, cross_attentions, inject
from img_minimal.evaluate.intervals import paired_shares, ranking_interval
from img_minimal.load import load_backbone
from img_minimal.mllm import MLLM
from img_minimal.presets import find_preset
from img_minimal.files import to_pil

TWIN = find_preset("tiny-sdxl")


def test_opened_branches_add_up_to_what_the_layer_returns():
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(f"{TWIN.base}/unet", torch_dtype=torch.float32)
    tokens, scale = torch.randn(2, 16, 128), 0.3
    [attn, *_] = cross_attentions(unet).values()
    hidden, text = torch.randn(2, 64, attn.to_q.in_features), torch.randn(2, 16, attn.to_k.in_features)
    branch = ImageBranch.for_unet(unet, token_width=128).requires_grad_(False)
    with torch.no_grad(), inject(unet, branch, tokens, scale):
        both = attn.processor.attend(attn, hidden, text)
        returned = attn(hidden, encoder_hidden_states=text)
    for output, weights in both.values():
        assert output.shape == hidden.shape
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    expected = attn.to_out[0](both["text"][0] + scale * both["image"][0])
    assert torch.allclose(returned, expected, atol=1e-5)


def test_attention_maps_of_the_aligner_sum_to_one_and_leave_out_what_is_masked():
    torch.manual_seed(0)
    aligner = ImplicitAligner(16, 24, depth=3, heads=2, head_dim=8)
    mask = torch.tensor([[True] * 5 + [False] * 2] * 2)
    maps = aligner.attention_maps(torch.randn(2, 7, 24), torch.randn(2, 4, 16), mask)
    assert maps.shape == (3, 2, 2, 4, 7 + 4)
    assert torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-5)
    assert maps[..., 5:7].abs().max() == 0


def test_places_of_image_tokens_are_maps_over_the_patches_that_sum_to_one():
    maps = load_backbone(TWIN).image_prompt.places(_pictures(2))
    assert maps.shape == (2, 16, 8, 8)
    assert torch.allclose(maps.sum((2, 3)), torch.ones(()), atol=1e-5)


def test_words_of_the_guidance_name_a_word_for_every_feature_and_none_for_patches():
    mllm = MLLM.from_pretrained(TWIN.mllm)
    [picture] = _pictures(1)
    words = mllm.words(picture, "how to correct the image so that it fits the caption: a red circle")
    inputs = mllm.inputs([picture], ["how to correct the image so that it fits the caption: a red circle"])
    assert len(words) == inputs["input_ids"].shape[1]
    assert words.count(None) == 64
    assert [w for w in words if w in ("red", "circle")] == ["red", "circle"]


def _pictures(count: int) -> list:
    return to_pil(torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


def test_paired_shares_count_both_ways():
    ours, theirs = np.array([1, 1, 0, 1, 0]), np.array([1, 0, 1, 0, 0])
    found = paired_shares(ours, theirs, list("abcde"))
    assert (found["fixed"], found["broken"]) == (2, 1)
    assert found["difference"]["value"] == pytest.approx(0.2)
    assert found["share"]["value"] == pytest.approx(0.6)


def test_a_ranking_is_the_share_of_right_and_wrong_pairs_in_order_with_ties_as_halves():
    scores, right = np.array([3.0, 1.0, 2.0, 1.0]), np.array([True, True, False, False])
    found = ranking_interval(scores, right, list("abcd"))
    assert found["value"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert found["low"] <= found["value"] <= found["high"]
    perfect = ranking_interval(np.arange(8.0), np.arange(8) > 3, list("abcdefgh"))
    assert (perfect["value"], perfect["low"], perfect["high"]) == (1, 1, 1)
    assert np.isnan(ranking_interval(scores, np.ones(4), list("abcd"))["value"])
