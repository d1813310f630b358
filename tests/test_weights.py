"""Weight files: what is written is read back, and a bad file is explained in one line."""

import pytest
import torch
from torch import nn

from img_minimal.hub.weights import WeightsError, fill, read_metadata, read_weights, write_safetensors


def refused(path) -> str:
    with pytest.raises(WeightsError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_what_is_written_is_read_back_with_its_notes(tmp_path):
    path, state = tmp_path / "new" / "folder" / "w.safetensors", {"a": torch.randn(2, 3).T, "b": torch.ones(1).half()}
    write_safetensors(path, state, {"head_dim": "32"})
    again = read_weights(path)
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)
    assert again["b"].dtype == torch.half
    assert read_metadata(path)["head_dim"] == "32"
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"a": torch.ones(2)})
    shared = torch.ones(2)
    with pytest.raises(RuntimeError):  # safetensors refuses memory that two names share
        write_safetensors(path, {"a": shared, "b": shared})
    assert torch.equal(read_weights(path)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_torch_files_lose_the_prefix_of_distributed_training(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").keys() == {"a", "b"}
    assert read_metadata(tmp_path / "w.pth") == {}


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
@pytest.mark.parametrize("kept", [0, 5, 0.5, 0.99])
def test_a_truncated_file_is_refused_in_one_line(tmp_path, name, kept):
    state, path = {"a": torch.randn(64, 64)}, tmp_path / name
    if path.suffix == ".bin":
        torch.save(state, path)
    else:
        write_safetensors(path, state)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    assert "download it again" in refused(path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_file_that_is_no_weight_file_is_refused(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "Git LFS" in refused(tmp_path / name)


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "absent.safetensors")
    refused(tmp_path)


def test_a_torch_file_cannot_run_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("the trap was sprung",))

    torch.save({"a": Trap()}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth")


def test_a_file_of_no_state_dict_is_refused(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "w.pth")
    assert "expected a state dict, found list" in refused(tmp_path / "w.pth")


def test_fill_replaces_meta_parameters_and_keeps_the_dtype():
    with torch.device("meta"):
        layer = nn.Linear(2, 2, bias=False)
    fill(layer, {"weight": torch.eye(2).bfloat16()}, "here")
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight.float(), torch.eye(2))
    assert layer.weight.requires_grad
