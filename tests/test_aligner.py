"""The Implicit Aligner computes Figs. 9 and 10, starts at the identity, and survives its file."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from safetensors.torch import save_file

from img_minimal.aligner import ImplicitAligner, align
from img_minimal.hub.weights import write_weights
from img_minimal.run import Run

WIDTH, GUIDANCE, HEADS, DEPTH = 48, 40, 2, 2
B, L, N = 2, 7, 3


def new_aligner(**sizes: int) -> ImplicitAligner:
    """Build an aligner whose every part shows: gains of 1 and biases of 0 would hide mistakes."""
    torch.manual_seed(0)
    aligner = ImplicitAligner(WIDTH, GUIDANCE, **({"depth": DEPTH, "heads": HEADS} | sizes))
    for p in aligner.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return aligner


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw guidance (B, L, H), tokens (B, N, D), and a mask (B, L) that hides some of the last."""
    torch.manual_seed(1)
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[1, 4:] = False
    return torch.randn(B, L, GUIDANCE), torch.randn(B, N, WIDTH), mask


def reference(
    state: dict[str, torch.Tensor], guidance: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Compute Figs. 9 and 10 for one sample, head by head: guidance (L, H), tokens (N, D)."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    context, x = linear("proj_in", guidance), tokens
    for i in range(DEPTH):
        attention, mlp = f"layers.{i}.0", f"layers.{i}.1"
        queries = norm(f"{attention}.norm2", x)
        seen = torch.cat([norm(f"{attention}.norm1", context), queries])
        q = linear(f"{attention}.to_q", queries).chunk(HEADS, 1)
        kv = linear(f"{attention}.to_kv", seen).chunk(2 * HEADS, 1)
        heads = []
        for h in range(HEADS):
            weights = (q[h] @ kv[h].T / 64**0.5).softmax(-1)
            heads.append(weights @ kv[HEADS + h])
        x = x + linear(f"{attention}.to_out", torch.cat(heads, 1))
        x = x + linear(f"{mlp}.3", F.gelu(linear(f"{mlp}.1", norm(f"{mlp}.0", x))))
    return tokens + linear("zero_linear", norm("norm_out", linear("proj_out", x)))


@torch.no_grad()
def test_the_aligner_computes_figures_9_and_10_in_float64():
    aligner, (guidance, tokens, mask) = new_aligner(), inputs()
    state = {key: value.double() for key, value in aligner.state_dict().items()}
    got = aligner(guidance, tokens, mask)
    for b in range(B):
        # Padding is left out instead of masked.
        expected = reference(state, guidance[b][mask[b]].double(), tokens[b].double())
        assert (got[b] - expected).abs().max() < 2e-5 * expected.abs().max()


@torch.no_grad()
def test_attention_maps_sum_to_one_and_leave_padding_out():
    guidance, tokens, mask = inputs()
    maps = []
    new_aligner()(guidance, tokens, mask, maps=maps)
    weights = torch.stack(maps)
    assert weights.shape == (DEPTH, B, HEADS, N, L + N) and weights.dtype == torch.float32
    assert torch.allclose(weights.sum(-1), torch.ones(DEPTH, B, HEADS, N))
    assert weights[:, 1, ..., 4:L].eq(0).all()


def test_an_untrained_aligner_is_the_identity_but_learns():
    guidance, tokens, mask = inputs()
    aligner = ImplicitAligner(WIDTH, GUIDANCE, depth=1, heads=1)
    out = aligner(guidance, tokens, mask, passes=3)
    assert torch.equal(out, tokens)
    out.square().sum().backward()
    assert aligner.zero_linear.weight.grad.abs().max() > 0


@torch.no_grad()
def test_masked_guidance_changes_nothing_and_none_at_all_is_no_nan():
    aligner, (guidance, tokens, mask) = new_aligner(), inputs()
    padded = torch.cat([guidance, 1e3 * torch.randn(B, 5, GUIDANCE)], 1)
    visible = torch.arange(L + 5).expand(B, -1) < L
    expected = aligner(guidance, tokens)
    assert torch.allclose(aligner(padded, tokens, visible), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(aligner(padded, tokens), expected, rtol=1e-2)
    assert aligner(guidance, tokens, torch.zeros_like(mask)).isfinite().all()


@torch.no_grad()
def test_three_passes_are_one_pass_three_times():
    aligner, (guidance, tokens, mask) = new_aligner(), inputs()
    once = tokens
    for _ in range(3):
        once = aligner(guidance, once, mask)
    assert torch.equal(aligner(guidance, tokens, mask, passes=3), once)


@torch.no_grad()
def test_batches_give_what_one_call_gives_and_a_nan_is_refused_with_the_number_of_its_image():
    aligner, (guidance, tokens, mask) = new_aligner(), inputs()
    expected = aligner(guidance, tokens, mask, passes=2)
    got = align(aligner, tokens, guidance, mask, passes=2, batch_size=1)
    assert torch.allclose(got, expected, atol=1e-4)
    guidance[1, 0, 0] = torch.nan
    with refused("the aligned features of image 1 is not finite"):
        align(aligner, tokens, guidance, mask, passes=1)


def test_guidance_or_tokens_of_another_width_are_refused_with_what_to_use():
    with torch.device("meta"):
        aligner = ImplicitAligner(48, 5120, depth=1, heads=1)
        with refused("trained for an MLLM of width 5120", "width 4096", "LLaVA-1.5-7B"):
            aligner(torch.empty(1, 2, 4096), torch.empty(1, 3, 48))
        with refused("image tokens of width 48", "width 47", "IP-Adapter"):
            aligner(torch.empty(1, 2, 5120), torch.empty(1, 3, 47))


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": (1, N, WIDTH)},  # would broadcast
        {"tokens": (N, WIDTH)},
        {"tokens": (B, 1, N, WIDTH)},
        {"guidance": (B + 1, L, GUIDANCE)},
        {"guidance": (L, GUIDANCE)},
        {"mask": (1, L)},
        {"mask": (B, L - 1)},
        {"mask": (B, L, 1)},
        {"mask": torch.zeros(B, L)},  # additive
        {"mask": torch.full((B, L), torch.nan)},
        {"mask": torch.ones(B, L, dtype=torch.long)},
        {"tokens": torch.ones(B, N, WIDTH, dtype=torch.long)},
        {"guidance": torch.ones(B, L, GUIDANCE, dtype=torch.bool)},
        {"passes": 0},
        {"passes": 1.5},
    ],
)
@torch.no_grad()
def test_inputs_that_do_not_belong_together_are_refused_with_both_shapes(change):
    aligner, values = new_aligner(), dict(zip(("guidance", "tokens", "mask"), inputs()))
    [(name, value)] = change.items()
    if isinstance(value, tuple):
        value = torch.ones(value, dtype=values[name].dtype)
    values |= {"passes": 1, name: value}
    said = [str(tuple(value.shape)), "expected"] if isinstance(value, torch.Tensor) else ["passes"]
    if name != "passes":
        said.append(str(tuple(values["guidance"].shape)[:2])[:-1])
    for door in (aligner, partial(align, aligner)):
        with pytest.raises(ValueError) as caught:
            door(**values)
        assert all(word in str(caught.value) for word in said), caught.value


@pytest.mark.parametrize("head_dim", [64, 16])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_a_saved_aligner_keeps_its_sizes_its_bytes_and_its_readers(tmp_path, name, head_dim):
    (tmp_path / "plain").touch()
    aligner = new_aligner(head_dim=head_dim)
    aligner.save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    again = ImplicitAligner.from_file(tmp_path / name)
    assert torch.equal(again(*inputs()), aligner(*inputs()))
    again.save(tmp_path / name)
    assert (tmp_path / name).read_bytes() == whole
    assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode
    if name == "a.pth":  # a plain state dict, as the authors load it
        assert torch.load(tmp_path / name).keys() == aligner.state_dict().keys()


@pytest.mark.parametrize("head_dim", [16, 32])
def test_an_aligner_in_a_checkpoint_or_another_file_brings_the_width_of_its_heads(
    tmp_path, head_dim
):
    aligner = new_aligner(heads=128 // head_dim, head_dim=head_dim)
    state = aligner.state_dict()
    torch.save(state, tmp_path / "plain.bin")
    torch.save({"ema": {"module": state}, "step": 3}, tmp_path / "nested.pt")
    torch.save(torch.nn.ModuleDict({"module": aligner}).state_dict(), tmp_path / "wrapped.pth")
    run = Run(tmp_path / "run", {})
    run.save({"aligner": state, "optimizer": {"state": {0: state}}})
    run.lock.close()
    aligner.save(tmp_path / "own.safetensors")
    (tmp_path / "own.json").write_text('{"head_dim": 8}')  # beside a file, and not of it
    for name in ("plain.bin", "nested.pt", "wrapped.pth", "run/checkpoint.pt", "own.safetensors"):
        again = ImplicitAligner.from_file(tmp_path / name)
        assert again.head_dim == head_dim
        assert torch.equal(again(*inputs()), aligner(*inputs()))


@pytest.mark.parametrize("head_dim", [48, 0, -16, 1024, "wide"])
def test_a_width_of_heads_that_does_not_fit_is_refused(tmp_path, head_dim):
    write_weights(tmp_path / "a.pth", new_aligner().state_dict(), {"head_dim": str(head_dim)})
    with refused("a.pth: cannot be opened as a trained aligner"):
        ImplicitAligner.from_file(tmp_path / "a.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_in_the_released_layout_opens_whatever_it_is_wrapped_in(tmp_path, suffix):
    aligner, path = new_aligner(), tmp_path / f"aligner{suffix}"
    state = {f"module.{key}": value for key, value in aligner.state_dict().items()}
    wrapped = [state]
    if suffix == ".pth":
        wrapped += [{"state_dict": state}, {"step": 3, "model": {"module": state}}]
    for content in wrapped:
        (torch.save if suffix == ".pth" else save_file)(content, path)
        assert torch.equal(ImplicitAligner.from_file(path)(*inputs()), aligner(*inputs()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers.*": None}, "a.pth: cannot be opened as"),
        ({"zero_linear.bias": None}, "a.pth: cannot be opened as a ImplicitAligner"),
        ({"proj_out.weight": (1, 1)}, "size mismatch for proj_out.weight"),
        ({"surprise": (1,)}, 'Unexpected key(s) in state_dict: "surprise"'),
        ({"layers.0.0.to_q.weight": (80, WIDTH)}, "heads of width 64 do not fit"),
    ],
)
def test_a_file_of_something_else_is_named_in_one_line(tmp_path, changes, words):
    state = dict(new_aligner().state_dict())
    for name, shape in changes.items():
        for key in [key for key in state if key.startswith(name.rstrip("*"))]:
            del state[key]
        if shape:
            state[name] = torch.zeros(shape)
    torch.save(state, tmp_path / "a.pth")
    with refused(words):
        ImplicitAligner.from_file(tmp_path / "a.pth")
