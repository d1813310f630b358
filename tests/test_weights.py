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
        (None, "No such file"),
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
