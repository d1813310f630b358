"""Find models: a location is a local file or folder, or a place on the Hugging Face hub.

    outputs/train/aligner.safetensors             a local file
    stabilityai/stable-diffusion-xl-base-1.0      a repository: owner/name
    mhdang/dpo-sdxl-text2image-v1/unet            a folder in a repository
    shi-labs/IMG/aligner_sdxl.pth                 a file in a repository

The headers of a folder's files are checked as soon as it is found or downloaded, so that mistakes
show before the first model is loaded.
"""

import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import safe_open

from img_minimal.cli import AnyPath, UserError, causes, check, flag_name
from img_minimal.devices import Precision, Turns, best_device
from img_minimal.files import read_json
from img_minimal.hub.weights import WEIGHT_FILE, opening
from img_minimal.presets import Preset

SINGLE_FILES = ("ip_adapter", "resampler", "aligner")  # the other locations are folders
SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja")  # of a model, beside its weights
STEM, SHARD = r"(model|pytorch_model|diffusion_pytorch_model)", r"(-\d+-of-\d+)?"
PLAIN, TORCH, FP16 = r"\.safetensors", r"\.bin", rf"\.fp16{SHARD}\.safetensors"


def fetch(preset: Preset, *names: str, inspect: Callable[[Preset], object] = id) -> Preset:
    """Copy the preset with local paths for the named locations, downloaded where necessary.

    `inspect` gets such a copy when single files and all settings are there, and may refuse what
    does not fit before the weights of folders, which take gigabytes, are downloaded. fp16 files
    are preferred where a repository has both and the preset's dtype is half precision. Raises
    UserError if a location cannot be had or its files are damaged.
    """
    Turns(best_device(), preset.models.offload)  # refuses, before a download, what cannot be
    half = Precision.named(preset.models.dtype, best_device()).weights != torch.float32
    fields = vars(preset.models) | vars(preset.sampling)
    names = [name for name in names if fields[name]]
    for name in names:
        split_hub_id(fields[name], flag_name(name))  # finds a mistyped path before any download
    found = {}
    for name in names:
        location, flag = fields[name], flag_name(name)
        if name in SINGLE_FILES:
            found[name] = str(fetch_file(location, flag))
        else:
            found[name] = str(fetch_folder(location, flag, half, weights=False))
    inspect(preset.changed(**found))
    for name in names:
        if name not in SINGLE_FILES:
            without = ("unet",) if name == "base" and preset.models.unet else ()
            found[name] = str(fetch_folder(fields[name], flag_name(name), half, without))
    return preset.changed(**found)


def fetch_file(location: str, flag: str) -> Path:
    """Return the local path of a file, downloaded if necessary. Raises UserError naming `flag`."""
    hub_id = split_hub_id(location, flag)
    if hub_id is None:
        return Path(location).expanduser()
    repo, inside = hub_id
    check(
        inside,
        f"{location}: is a repository, {flag} needs a file in it, as in "
        f"{location}/file.safetensors",
    )
    path = _download(location, repo, [inside], flag) / inside
    check(
        path.is_file(),
        f"{location}: the repository {repo} has no such file; check the path after its name",
    )
    return path


def fetch_folder(
    location: str,
    flag: str,
    half: bool = False,
    without: tuple[str, ...] = (),
    weights: bool = True,
) -> Path:
    """Return the local folder of a model or pipeline, downloaded if necessary.

    Only settings and, with `weights`, the chosen ones are downloaded, nothing of the subfolders
    `without`. Raises UserError if the folder cannot be had or its files are damaged.
    """
    hub_id = split_hub_id(location, flag)
    if hub_id is None:
        path = Path(location).expanduser()
    else:
        repo, inside = hub_id
        prefix = f"{inside}/" if inside else ""
        settings = [prefix + pattern for pattern in SETTINGS]
        path = _download(location, repo, settings, flag) / inside
        if not weights:
            return path
        names = []
        # Missing offline if the cache is older than this kind of listing.
        with suppress(CachedRepoTreeNotFoundError):
            for file in get_cached_repo_tree(repo):
                if file.path.startswith(prefix):
                    names.append(file.path.removeprefix(prefix))
        files = [prefix + name for name in chosen(path, names, half, without)]
        if files:
            _download(location, repo, files, flag)
    _check_folder(path, location, flag, half, without)
    return path


def chosen(path: Path, names: list[str], half: bool, without: tuple[str, ...] = ()) -> list[str]:
    """Choose the weight files to load among the names of a folder's files, relative to it.

    They are in the folder itself, or in the parts that its model_index.json lists. In each, fp16
    safetensors come first if `half`, then plain ones, torch files, and fp16.
    """
    parts = [""]
    if (path / "model_index.json").is_file():
        index = read_json(path / "model_index.json", dict, "download it again")
        parts = []
        for part, classes in index.items():
            if isinstance(classes, list) and any(classes) and part not in without:
                parts.append(f"{part}/")
    kinds = (FP16, PLAIN, TORCH) if half else (PLAIN, TORCH, FP16)
    files = []
    for part in parts:
        for kind in kinds:
            pattern = re.compile(re.escape(part) + STEM + SHARD + kind)
            matching = [name for name in names if pattern.fullmatch(name)]
            if matching:
                files += matching
                break
    return sorted(files)


def variant(path: AnyPath, dtype: torch.dtype) -> str | None:
    """Return the `variant` to load a local folder with: "fp16" if such files are chosen."""
    path = Path(path)
    files = chosen(path, _names(path), dtype != torch.float32)
    return "fp16" if any(".fp16" in name for name in files) else None


def split_hub_id(location: str, flag: str) -> tuple[str, str] | None:
    """Split a location on the hub into repository and path inside; None for a local path.

    Raises UserError if it can be neither.
    """
    if Path(location).expanduser().exists():
        return None
    pieces = location.split("/")
    is_file = len(pieces) == 2 and location.endswith((".safetensors", ".bin", ".pth", ".pt"))
    is_hub_id = re.fullmatch(r"(?!.*(--|\.\.))\w[\w.-]*(/[\w.-]+)+", location)
    # A local folder that is named like an owner hides no repository; owner/name there does.
    fits = is_hub_id and not is_file and not Path(*pieces[:2]).exists()
    check(
        fits, f"{location}: no such file or folder; check {flag} (a path, or owner/name on the hub)"
    )
    return "/".join(pieces[:2]), "/".join(pieces[2:])


def _download(location: str, repo: str, patterns: list[str], flag: str) -> Path:
    """Return the cached snapshot of a repository, completed by the files that match.

    Raises UserError that says why it cannot be had and what to do.
    """
    try:
        with suppress(LocalEntryNotFoundError, CachedRepoTreeNotFoundError):
            root = snapshot_download(repo, allow_patterns=patterns, local_files_only=True)
            # Only with this listing does the line above know that no file is missing.
            get_cached_repo_tree(repo)
            return Path(root)
        # Unlike hf_hub_download it falls back on its cache at once when there is no network.
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:  # HTTP errors of several libraries, and the disk's
        status = None
        for cause in causes(error):
            status = status or getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(error, GatedRepoError) or status == 403:
            reason = (
                f"access is restricted; accept the terms on https://huggingface.co/{repo} and log "
                "in with `hf auth login`"
            )
        elif isinstance(error, RepositoryNotFoundError) or status in (401, 404):
            reason = (
                "not a local path, and the hub has no such model or does not show it to you; "
                "check the name, log in with `hf auth login` if it is private"
            )
        elif status is None and getattr(error, "errno", None) is not None:
            raise  # the disk is full or not writable
        else:
            reason = (
                "not a local path, not (wholly) in the hub's cache, and the hub cannot be reached "
                f"({type(error).__name__}); go online, unset HF_HUB_OFFLINE"
            )
        raise UserError(
            f"{location}: {reason}, or download it elsewhere and name the local copy with {flag}"
        ) from None


def _check_folder(
    path: Path, location: str, flag: str, half: bool, without: tuple[str, ...]
) -> None:
    """Check that settings and weights exist and every safetensors header fits its file.

    Takes milliseconds, even for 26 GB. Raises UserError.
    """
    names = _names(path)
    weights = chosen(path, names, half, without)
    problem = None
    if "adapter_config.json" in names or "non_lora_trainables.bin" in names:
        problem = (
            "is a LoRA adapter and no whole model; merge it into its base model (peft's "
            f"merge_and_unload) and name the merged folder with {flag}"
        )
    elif "config.json" not in names and "model_index.json" not in names:
        inner = ", ".join(sorted(file.parent.name for file in path.glob("*/config.json")))
        problem = f"holds no config.json, so no model; check {flag} (subfolders: {inner or 'none'})"
    shards = Counter(re.sub(r"-\d+-of-", "-*-of-", name) for name in weights)
    for name, count in shards.items():
        total = re.search(r"-of-(\d+)", name)
        if total and count != int(total[1]):
            problem = f"has {count} of {int(total[1])} files {name}; download the others"
    check(not problem, f"{location}: {problem}")
    for name in names:
        if Path(name).name == "config.json":
            check_depth(path / name)
    for name in weights:
        if name.endswith(".safetensors"):
            with opening(path / name, WEIGHT_FILE), safe_open(path / name, framework="pt"):
                pass


def check_depth(path: Path) -> None:
    """Raise UserError for a config.json that asks for so many layers that it takes minutes."""
    text = path.read_text(errors="replace")
    many = re.search(r'"\w*((layers|depth)"[\s\[\d,:]*\d{4}|per_block"[\s\[\d,:]*\d{3})', text)
    if many:
        raise UserError(
            f"{path}: asks for too many layers ({' '.join(many[0].split())[:80]}...); download it "
            "again"
        )


def _names(path: Path) -> list[str]:
    return [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
