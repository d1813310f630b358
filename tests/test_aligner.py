"""The Implicit Aligner computes its formula, starts as the identity, ignores padding, and survives its file."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.special import erf

from img_minimal.aligner import ImplicitAligner
from img_minimal.aligner import PerceiverAttention
from img_minimal.hub.weights import WeightsError

WIDTH, GUIDANCE, HEADS, DEPTH = 48, 40, 2, 2
B, L, N = 2, 7, 3


def new_aligner(trained: bool = True) -> ImplicitAligner:
    torch.manual_seed(0)
    aligner = ImplicitAligner(WIDTH, GUIDANCE, depth=DEPTH, heads=HEADS)
    if trained:  # LayerNorms at 1 and 0, and the zero linear at 0, would hide mistakes
        for p in aligner.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return aligner


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[1, 4:] = False
    return torch.randn(B, L, GUIDANCE), torch.randn(B, N, WIDTH), mask


def layer_norm(x: np.ndarray, state: dict, name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: np.ndarray, state: dict, name: str) -> np.ndarray:
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)


def reference(state: dict, guidance: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Figs. 9 and 10 in float64 numpy, for one sample: guidance (L, H), tokens (N, D)."""
    context, x = linear(guidance, state, "proj_in"), tokens
    for i in range(DEPTH):
        at, mlp = f"layers.{i}.0", f"layers.{i}.1"
        queries = layer_norm(x, state, f"{at}.norm2")
        seen = np.concatenate([layer_norm(context, state, f"{at}.norm1"), queries])
        q, kv = linear(queries, state, f"{at}.to_q"), linear(seen, state, f"{at}.to_kv")
        read = []
        for h in range(HEADS):
            part = slice(64 * h, 64 * (h + 1))
            scores = q[:, part] @ kv[:, : 64 * HEADS][:, part].T / np.sqrt(64)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            read.append(weights / weights.sum(1, keepdims=True) @ kv[:, 64 * HEADS :][:, part])
        x = x + linear(np.concatenate(read, 1), state, f"{at}.to_out")
        wide = linear(layer_norm(x, state, f"{mlp}.0"), state, f"{mlp}.1")
        gelu = wide * (1 + erf(torch.from_numpy(wide / np.sqrt(2))).numpy()) / 2
        x = x + linear(gelu, state, f"{mlp}.3")
    return tokens + linear(layer_norm(linear(x, state, "proj_out"), state, "norm_out"), state, "zero_linear")


@torch.no_grad()
def test_the_aligner_computes_figures_9_and_10():
    aligner, (guidance, tokens, mask) = new_aligner(), inputs()
    state = {key: value.double().numpy() for key, value in aligner.state_dict().items()}
    got = aligner(guidance, tokens, mask)
    for b in range(B):
        valid = guidance[b][mask[b]].double().numpy()  # padding is left out instead of masked
        expected = reference(state, valid, tokens[b].double().numpy())
        assert np.abs(got[b].numpy() - expected).max() < 2e-5 * np.abs(expected).max()


@torch.no_grad()
def test_fused_attention_agrees_with_the_written_out_one():
    torch.manual_seed(0)
    layer, (_, tokens, mask) = PerceiverAttention(WIDTH, HEADS, head_dim=16), inputs()
    context = torch.randn(B, L, WIDTH)
    out, weights = layer.attend(tokens, layer.keys_values(context), mask)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (HEADS, 16)).transpose(1, 2)

    queries = layer.norm2(tokens)
    keys, values = layer.to_kv(torch.cat([layer.norm1(context), queries], 1)).chunk(2, -1)
    sees = torch.cat([mask, torch.ones(B, N, dtype=torch.bool)], 1)[:, None, None]
    fused = F.scaled_dot_product_attention(heads(layer.to_q(queries)), heads(keys), heads(values), attn_mask=sees)
    assert torch.allclose(out, layer.to_out(fused.transpose(1, 2).flatten(2)), atol=1e-6)
    assert weights.shape == (B, HEADS, N, L + N) and weights.dtype == torch.float32
    assert torch.allclose(weights.sum(-1), torch.ones(B, HEADS, N))
    assert weights[1, ..., 4:L].eq(0).all()


def test_an_untrained_aligner_is_the_identity_but_learns():
    aligner, (guidance, tokens, mask) = new_aligner(trained=False), inputs()
    out = aligner(guidance, tokens, mask, passes=3)
    assert torch.equal(out, tokens)
    out.square().sum().backward()
    assert aligner.zero_linear.weight.grad.abs().max() > 0


@torch.no_grad()
def test_masked_guidance_changes_nothing():
    aligner, (guidance, tokens, _) = new_aligner(), inputs()
    padded = torch.cat([guidance, 1e3 * torch.randn(B, 5, GUIDANCE)], 1)
    mask = torch.arange(L + 5).expand(B, -1) < L
    expected = aligner(guidance, tokens)
    assert torch.allclose(aligner(padded, tokens, mask), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(aligner(padded, tokens), expected, rtol=1e-2)


@torch.no_grad()
def test_tokens_without_any_valid_guidance_still_see_themselves():
    aligner, (guidance, tokens, mask) = new_aligner(), inputs()
    assert aligner(guidance, tokens, torch.zeros_like(mask)).isfinite().all()


@torch.no_grad()
def test_three_passes_are_one_pass_three_times():
    aligner, (guidance, tokens, mask) = new_aligner(), inputs()
    once = tokens
    for _ in range(3):
        once = aligner(guidance, once, mask)
    assert torch.equal(aligner(guidance, tokens, mask, passes=3), once)


@torch.no_grad()
def test_inputs_in_half_precision_are_computed_in_the_aligners_own():
    aligner, (guidance, tokens, mask) = new_aligner(), inputs()
    half = aligner(guidance.half(), tokens.half(), mask)
    assert half.dtype == torch.float32
    assert torch.equal(half, aligner(guidance.half().float(), tokens.half().float(), mask))


def test_guidance_of_another_mllm_is_refused_in_one_line():
    with torch.device("meta"):
        aligner = ImplicitAligner(48, 5120, depth=1, heads=1)
        guidance, tokens = torch.empty(1, 2, 4096), torch.empty(1, 3, 48)
    with pytest.raises(ValueError, match="trained for an MLLM of width 5120.*width 4096") as caught:
        aligner(guidance, tokens)
    assert "\n" not in str(caught.value)


def test_tokens_of_another_image_prompt_are_refused():
    with pytest.raises(ValueError, match="image tokens of width 48.*width 47"):
        new_aligner()(torch.zeros(1, 2, GUIDANCE), torch.zeros(1, 3, 47))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_sizes_are_deduced_from_the_file(tmp_path, prefix, suffix):
    aligner, path = new_aligner(), tmp_path / f"aligner{suffix}"
    aligner.save(tmp_path / "saved.safetensors")
    state = {prefix + key: value for key, value in load_file(tmp_path / "saved.safetensors").items()}
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    again = ImplicitAligner.from_file(path)
    assert (again.width, again.guidance_width, len(again.layers)) == (WIDTH, GUIDANCE, DEPTH)
    assert again.layers[0][0].heads == HEADS
    assert torch.equal(again(*inputs()), aligner(*inputs()))


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_a_saved_aligner_remembers_its_head_width(tmp_path, name):
    torch.manual_seed(0)
    aligner = ImplicitAligner(WIDTH, GUIDANCE, depth=1, heads=4, head_dim=16)
    aligner.save(tmp_path / name)
    assert ImplicitAligner.from_file(tmp_path / name).layers[0][0].heads == 4
    (tmp_path / "a.json").unlink()  # every file is complete without it
    assert ImplicitAligner.from_file(tmp_path / name).layers[0][0].heads == 4


def test_a_file_that_leaves_the_width_of_a_head_open_is_asked_about_or_refused(tmp_path):
    state = ImplicitAligner(WIDTH, GUIDANCE, depth=1, heads=5, head_dim=16).state_dict()
    torch.save(dict(state), tmp_path / "a.pth")  # as somebody else would
    with pytest.raises(WeightsError, match="heads of width 64 do not make its 80; restore a.json"):
        ImplicitAligner.from_file(tmp_path / "a.pth")
    (tmp_path / "a.json").write_text('{"head_dim": 16}')
    assert ImplicitAligner.from_file(tmp_path / "a.pth").layers[0][0].heads == 5
    for text in ("{}", "[]", '{"head_dim": "many"}', '{"head_dim": 0}', '{"head_dim": -16}', '{"head_dim": 7}', "nul"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(WeightsError, match="restore|unreadable"):
            ImplicitAligner.from_file(tmp_path / "a.pth")


def test_the_same_weights_are_the_same_bytes_however_often_they_are_saved(tmp_path):
    aligner = new_aligner()
    for k in range(4):
        aligner.save(tmp_path / f"{k}.safetensors")
    assert len({(tmp_path / f"{k}.safetensors").read_bytes() for k in range(4)}) == 1


def test_a_saved_aligner_may_be_read_by_whom_other_files_may_be_read(tmp_path):
    (tmp_path / "plain").touch()
    for name in ("a.safetensors", "a.pth"):
        ImplicitAligner(WIDTH, GUIDANCE, depth=1, heads=4, head_dim=16).save(tmp_path / name)
        assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("damage", ["no layers", "no zero_linear", "wrong shape", "unknown key"])
def test_a_file_of_something_else_is_named_in_one_line(tmp_path, damage):
    state = new_aligner().state_dict()
    if damage == "no layers":
        state = {key: value for key, value in state.items() if not key.startswith("layers.")}
    elif damage == "no zero_linear":
        del state["zero_linear.bias"]
    elif damage == "wrong shape":
        state["proj_out.weight"] = torch.zeros(1, 1)
    else:
        state["surprise"] = torch.zeros(1)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="a.pth") as caught:
        ImplicitAligner.from_file(tmp_path / "a.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("width", "millions"), [(2048, 195.1), (4096, 675.4)])
def test_the_published_sizes_have_the_published_parameter_counts(width, millions):
    with torch.device("meta"):
        aligner = ImplicitAligner(width, guidance_width=5120)
    assert round(sum(p.numel() for p in aligner.parameters()) / 1e6, 1) == millions
