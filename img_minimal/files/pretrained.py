"""Folders of transformers models: read shard by shard, with every weight accounted for."""

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from img_minimal.files.hub import fetch_file
from img_minimal.files.weights import WeightsError, opening, read_weights
from img_minimal.runtime.cli import warn
from img_minimal.runtime.devices import parameters
from img_minimal.runtime.json_files import read_json

Model = TypeVar("Model", bound=PreTrainedModel)

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order of preference; shards have an index beside them


def read_config(folder: Path) -> dict:
    """The folder's config.json. Raises WeightsError if it is missing or damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder}: has no config.json, so it holds no model; check the path, or download it again")
    return read_json(path, dict, "download it again", WeightsError)


def read_settings(location: str, flag: str) -> dict:
    """A model's config.json, of a local folder or on the hub. Raises UserError if it cannot be had."""
    folder = Path(location)
    return read_config(folder if folder.is_dir() else fetch_file(f"{location}/config.json", flag).parent)


def read_shards(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, on the CPU, mapped from the files: memory is touched only where a tensor is read.

    As transformers does, a whole file is preferred to shards, and safetensors to torch files; if a folder has both, a
    warning says which is read. Raises WeightsError naming the file that is missing or damaged.
    """
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            shards = {name}
            if index.is_file():
                warn(f"{folder}: holds {name} and {index.name}; the whole file is read, as transformers does")
        elif index.is_file():
            listed = read_json(index, dict, "download it again", WeightsError, lambda x: x["weight_map"].values())
            shards = set(map(str, listed["weight_map"].values()))
        else:
            continue
        state = {}
        for shard in sorted(shards):
            state |= read_weights(folder / shard)
        return state
    raise WeightsError(f"{folder}: has neither {' nor '.join(WEIGHTS)}, whole or in shards; download it again")


def build(
    cls: type[Model], config: PreTrainedConfig, state: dict[str, Tensor], what: str | Path, dtype: torch.dtype,
    device: torch.device | str,
) -> Model:  # fmt: skip
    """A model of `config` with the weights `state`, in `dtype` on `device`; no second copy is made on the CPU.

    Names of older transformers are understood, and tables that old files hold and models now compute (`inv_freq`,
    `position_ids`) are passed over. `what` names the source in messages. Raises WeightsError naming a key that is
    missing, unknown or of another shape.
    """
    quantized = getattr(config, "quantization_config", None) or any(".quant_state." in key for key in state)
    if quantized:
        raise WeightsError(f"{what}: is quantized, which changes its features; use the same model in bf16 or fp16")
    with (
        opening(what, cls.__name__),
        torch.device("meta"),
    ):  # weights that no file has would be made up, and fill memory
        expected = parameters(cls(config))
    if expected > 1.5 * sum(value.numel() for value in state.values()):
        raise WeightsError(
            f"{what}: its config.json asks for {expected:,} weights, the files hold fewer; download both"
        )
    model, report = cls.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, device_map={"": device}, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    for fault, how in (("missing_keys", "lacks"), ("unexpected_keys", "has unknown keys:")):
        if keys := sorted(report[fault]):
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise WeightsError(
                f"{what}: {how} {keys[0]!r}{more}, so it is not the {cls.__name__} that its config.json says; "
                "download it again"
            )
    for key, found, right in report["mismatched_keys"]:
        raise WeightsError(
            f"{what}: {key!r} has shape {tuple(found)}, its config.json says {tuple(right)}; download both again"
        )
    return model
