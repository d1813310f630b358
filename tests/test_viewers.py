"""Views for tutorials: opened attention is what was computed, and statistics are as defined."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from img_minimal.backbone import open_image_prompt
from img_minimal.evaluate.intervals import paired_shares
from img_minimal.files import to_pil
from img_minimal.presets import find_preset
from img_minimal.sdxl import cross_attentions, inject, new_branch

TWIN = find_preset("tiny-sdxl")
PICTURES = to_pil(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


@torch.no_grad()
def test_opened_branches_add_up_to_what_the_layer_returns():
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(f"{TWIN.models.base}/unet", dtype=torch.float32)
    tokens, scale = torch.randn(2, 16, 128), 0.3
    [attn, *_] = cross_attentions(unet).values()
    hidden, text = torch.randn(2, 64, attn.to_q.in_features), torch.randn(2, 16, 128)
    with inject(unet, new_branch(unet, token_width=128), tokens, scale):
        both = attn.processor.attend(attn, hidden, text)
        returned = attn(hidden, encoder_hidden_states=text)
    for _, weights in both.values():
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    expected = attn.to_out[0](both["text"][0] + scale * both["image"][0])
    assert torch.allclose(returned, expected, atol=1e-5)


def test_maps_of_image_tokens_over_the_patches_sum_to_one():
    maps = open_image_prompt(TWIN.backbone, TWIN.models).token_maps(PICTURES)
    assert maps.shape == (2, 16, 8, 8)
    assert torch.allclose(maps.sum((2, 3)), torch.ones(()), atol=1e-5)


def test_paired_shares_count_both_ways():
    ours, theirs = np.array([1, 1, 0, 1, 0]), np.array([1, 0, 1, 0, 0])
    result = paired_shares(ours, theirs, list("abcde"))
    assert (result["fixed"], result["broken"]) == (2, 1)
    assert result["difference"]["value"] == pytest.approx(0.2)
    assert result["share"]["value"] == pytest.approx(0.6)


def test_a_ranking_is_the_share_of_right_and_wrong_pairs_in_order_with_ties_as_halves(
    monkeypatch,
):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "tutorials")
    ranking_interval = import_module("common").ranking_interval
    scores, right = np.array([3.0, 1.0, 2.0, 1.0]), np.array([True, True, False, False])
    result = ranking_interval(scores, right, list("abcd"))
    assert result["value"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert result["low"] <= result["value"] <= result["high"]
    perfect = ranking_interval(np.arange(8.0), np.arange(8) > 3, list("abcdefgh"))
    assert perfect == {"value": 1, "low": 1, "high": 1}
    assert np.isnan(ranking_interval(scores, np.ones(4), list("abcd"))["value"])
