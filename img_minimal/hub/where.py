"""Where models come from: one string names a local file or folder, or a place on the Hugging Face hub.

    outputs/train/aligner.safetensors             a local file
    stabilityai/stable-diffusion-xl-base-1.0      a repository: owner/name
    mhdang/dpo-sdxl-text2image-v1/unet            a folder in a repository
    shi-labs/IMG/aligner_sdxl.pth                 a file in a repository

A folder's headers are checked as soon as it is here, so that mistakes show before the first model is loaded.
"""

import re
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from img_minimal.cli import UserError
from img_minimal.devices import Precision, best_device
from img_minimal.files import read_json
from img_minimal.hub.weights import WeightsError
from img_minimal.presets import Preset

SINGLE_FILES = ("ip_adapter", "resampler", "aligner")  # the other locations are folders
WEIGHTS = re.compile(
    r"(model|pytorch_model|diffusion_pytorch_model)(-\d+-of-\d+)?(?P<fp16>\.fp16)?(-\d+-of-\d+)?\.(?P<kind>safetensors|bin)"
)


def fetch(preset: Preset, *names: str) -> Preset:
    """Copy the preset with local paths for the named locations, downloaded where necessary.

    fp16 files are preferred where a repository has both and the preset's dtype is half precision.
    Raises UserError if a location cannot be had, WeightsError if its files are damaged.
    """
    half = Precision.named(preset.models.dtype, best_device()).weights != torch.float32
    locations = {}
    for name in names:
        location = getattr(preset.sampling if name == "aligner" else preset.models, name)
        if location:
            locations[name] = location
            split_hub_id(location, flag_of(name))  # finds a mistyped path before any download
    found = {}
    for name, location in locations.items():
        if name in SINGLE_FILES:
            found[name] = str(fetch_file(location, flag_of(name)))
        else:
            without = ("unet",) if name == "base" and preset.models.unet else ()
            found[name] = str(fetch_folder(location, flag_of(name), half, without))
    return preset.changed(**found)


def flag_of(name: str) -> str:
    """Return the command-line flag of a preset field."""
    return "--" + name.replace("_", "-")


def fetch_file(location: str, flag: str) -> Path:
    """A local path of one file; `flag` is named in messages. Raises UserError if it cannot be had."""
    place = split_hub_id(location, flag)
    if place is None:
        return Path(location).expanduser()
    repo, inside = place
    if not inside:
        raise UserError(
            f"{location}: is a repository, {flag} needs a file in it, as in {location}/file.safetensors"
        )
    path = _download(location, repo, [inside], flag) / inside
    if not path.is_file():
        raise UserError(
            f"{location}: the repository {repo} has no such file; check the path after its name"
        )
    return path


def fetch_folder(
    location: str, flag: str, half: bool = False, without: tuple[str, ...] = ()
) -> Path:
    """A local path of a model's or pipeline's folder with its settings and weights, less the subfolders `without`."""
    place = split_hub_id(location, flag)
    if place is None:
        path = Path(location).expanduser()
    else:
        repo, inside = place
        prefix = f"{inside}/" if inside else ""
        small = [f"{prefix}*.{kind}" for kind in ("json", "txt", "model", "jinja")]
        path = _download(location, repo, small, flag) / inside
        try:
            names = [
                f.path.removeprefix(prefix)
                for f in get_cached_repo_tree(repo)
                if f.path.startswith(prefix)
            ]
        except (
            CachedRepoTreeNotFoundError
        ):  # offline, and the cache is older than this kind of listing
            names = []
        if wanted := [prefix + name for name in chosen(path, names, half, without)]:
            _download(location, repo, wanted, flag)
    _check_folder(path, location, flag, half, without)
    return path


def chosen(path: Path, names: list[str], half: bool, without: tuple[str, ...] = ()) -> list[str]:
    """The weight files of a folder that are to be loaded, of all its file names (relative to it).

    In the folder itself, or in the parts that its model_index.json lists: fp16 safetensors if `half`, else plain
    ones, else torch files, else fp16.
    """
    index, parts = path / "model_index.json", [""]
    if index.is_file():
        listed = read_json(index, dict, "download it again", WeightsError)
        parts = [
            f"{k}/"
            for k, v in listed.items()
            if isinstance(v, list) and any(v) and k not in without
        ]
    found = []
    for part in parts:
        here = {
            n: m
            for n in names
            if n.startswith(part) and (m := WEIGHTS.fullmatch(n.removeprefix(part)))
        }
        kinds = [("safetensors", False), ("bin", False), ("safetensors", True)]
        for kind in [("safetensors", True), *kinds] if half else kinds:
            if files := [n for n, m in here.items() if (m["kind"], bool(m["fp16"])) == kind]:
                found += files
                break
    return sorted(found)


def variant(path: str | Path, dtype: torch.dtype) -> str | None:
    """What to pass as `variant` when loading a local folder: "fp16" if such files are there and suit the dtype."""
    path = Path(path)
    return (
        "fp16"
        if any(".fp16" in name for name in chosen(path, _names(path), dtype != torch.float32))
        else None
    )


def split_hub_id(location: str, flag: str) -> tuple[str, str] | None:
    """(repository, path inside) if the location is no local one. Raises UserError if it can be neither."""
    if Path(location).expanduser().exists():
        return None
    pieces = location.split("/")
    # A folder that happens to be called like an owner hides no repository; one that holds the next name is a path.
    is_file = len(pieces) == 2 and location.endswith((".safetensors", ".bin", ".pth", ".pt"))
    if is_file or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)+", location) or Path(*pieces[:2]).exists():
        raise WeightsError(
            f"{location}: no such file or folder; check {flag} (a path, or owner/name on the hub)"
        )
    return "/".join(pieces[:2]), "/".join(pieces[2:])


class _Bar(tqdm):
    """The hub's progress bar, only where there is something to wait for."""

    def __init__(self, *arguments: object, **named: object):
        super().__init__(*arguments, **(named | {"delay": 1, "leave": False}))


def _download(location: str, repo: str, patterns: list[str], flag: str) -> Path:
    """The repository's folder in the hub's cache, with the files that match; else say in one line why not."""
    instead = f"or download it elsewhere and name the local copy with {flag}"
    try:
        with suppress(LocalEntryNotFoundError, CachedRepoTreeNotFoundError):
            root = snapshot_download(repo, allow_patterns=patterns, local_files_only=True)
            get_cached_repo_tree(
                repo
            )  # only with this listing does the line above know that nothing is missing
            return Path(root)
        # Unlike hf_hub_download it falls back on its cache at once when there is no network.
        return Path(snapshot_download(repo, allow_patterns=patterns, tqdm_class=_Bar))
    except HFValidationError:
        raise UserError(
            f"{location}: neither a local path nor owner/name on the hub; check {flag}"
        ) from None
    except Exception as error:  # HTTP errors of several libraries, and the disk's
        status = _status(error)
        if isinstance(error, GatedRepoError) or status == 403:
            raise UserError(
                f"{location}: access is restricted; accept the terms on https://huggingface.co/{repo} and log in with "
                f"`hf auth login`, {instead}"
            ) from None
        if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
            raise UserError(
                f"{location}: not a local path, and the hub has no such model or does not show it to you; check the "
                f"name, log in with `hf auth login` if it is private, {instead}"
            ) from None
        if status is None and getattr(error, "errno", None) is not None:
            raise  # the disk's fault: full, or not writable
        raise UserError(
            f"{location}: not a local path, not (wholly) in the hub's cache, and the hub cannot be reached "
            f"({type(error).__name__}); go online, unset HF_HUB_OFFLINE, {instead}"
        ) from None


def _status(error: BaseException | None) -> int | None:
    """The HTTP status at the root of an error, if a server answered at all."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return response.status_code
        error = error.__cause__ or error.__context__
    return None


def _check_folder(
    path: Path, location: str, flag: str, half: bool, without: tuple[str, ...]
) -> None:
    """Settings and weights are there, and every safetensors header fits its file: milliseconds, even for 26 GB."""
    if (path / "adapter_config.json").is_file() or (path / "non_lora_trainables.bin").is_file():
        raise WeightsError(
            f"{location}: is a LoRA adapter and no whole model; merge it into its base model (peft's "
            f"merge_and_unload) and name the merged folder with {flag}"
        )
    if not (path / "config.json").is_file() and not (path / "model_index.json").is_file():
        inner = ", ".join(sorted(p.parent.name for p in path.glob("*/config.json")))
        hint = f"; perhaps one of its subfolders is meant: {inner}" if inner else f"; check {flag}"
        raise WeightsError(f"{location}: holds no config.json, so no model{hint}")
    names = _names(path)
    weights = chosen(path, names, half, without)
    if not weights and not any(name.endswith((".safetensors", ".bin")) for name in names):
        raise WeightsError(
            f"{location}: holds settings but no weights; download it again, or check {flag}"
        )
    shards = [re.sub(r"-\d+-of-", "-*-of-", name) for name in weights]
    for name in set(shards):
        total = re.search(r"-of-(\d+)", name)
        if total and shards.count(name) != int(total[1]):
            raise WeightsError(
                f"{location}: has {shards.count(name)} of {int(total[1])} files {name}; download the others"
            )
    for name in weights:
        if name.endswith(".safetensors"):
            try:
                with safe_open(path / name, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise WeightsError(
                    f"{path / name}: unreadable ({type(error).__name__}); it is cut short or a Git LFS pointer: "
                    "download it again"
                ) from None


def _names(path: Path) -> list[str]:
    return [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
