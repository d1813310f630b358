"""Weight files: what is written is read back, and a bad file is explained in one line."""

import pytest
import torch
from refusals import refused
from torch import nn

from img_minimal.hub.weights import fill, read_metadata, read_weights, write_weights


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_tensors_and_notes_that_are_written_are_read_back(tmp_path, name):
    path = tmp_path / "new" / "folder" / name
    state = {"a": torch.randn(2, 3).T, "b": torch.ones(1).half()}
    write_weights(path, state, {"head_dim": "32"})
    again = read_weights(path)
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)
    assert again["b"].dtype == torch.half and read_metadata(path)["head_dim"] == "32"
    assert [p.name for p in path.parent.iterdir()] == [name]


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    path, shared = tmp_path / "w.safetensors", torch.ones(2)
    write_weights(path, {"a": shared})
    with pytest.raises(RuntimeError):  # safetensors refuses memory that two names share
        write_weights(path, {"a": shared, "b": shared})
    assert torch.equal(read_weights(path)["a"], shared)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_torch_files_lose_the_prefix_of_distributed_training(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").keys() == {"a", "b"}


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, name, share):
    path = tmp_path / name
    write_weights(path, {"a": torch.randn(64, 64)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with refused(str(path), "download it again"):
        read_weights(path)


class Trap:
    """Runs code where a pickle is loaded without care."""

    def __reduce__(self):
        return (print, ("the trap was sprung",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS"),
        ({"a": Trap()}, "could run code, refused"),
        ([torch.ones(1)], "expected a state dict, found list"),
        (None, "no such file"),
    ],
)
def test_a_file_that_holds_no_weights_is_refused(tmp_path, content, words):
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    with refused(str(path), words):
        read_weights(path)


def test_fill_replaces_meta_parameters_and_keeps_the_dtype():
    with torch.device("meta"):
        layer = nn.Linear(2, 2, bias=False)
    fill(layer, {"weight": torch.eye(2).bfloat16()}, "here")
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.requires_grad
    assert torch.equal(layer.weight.float(), torch.eye(2))
