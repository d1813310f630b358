"""Presets hold the published numbers; each is a flag that changes it and nothing else."""

from dataclasses import asdict, dataclass, fields

import pytest
from refusals import refused

from img_minimal.cli import option, parse
from img_minimal.presets import PRESETS, Models, Sampling, find_preset

SDXL = find_preset("sdxl")


@dataclass
class Config:
    model: str = option("sdxl", "which models", choices=list(PRESETS))


def differences(one: dict, other: dict) -> dict:
    return {name: value for name, value in other.items() if one[name] != value}


def changed(*arguments: str) -> dict:
    """Return what a command line changes in the preset's models and sampling."""
    _, changes = parse(Config, "a command", Models, Sampling, argv=list(arguments))
    preset = SDXL.changed(**changes)
    models = differences(asdict(SDXL.models), asdict(preset.models))
    return models | differences(asdict(SDXL.sampling), asdict(preset.sampling))


def test_sdxl_has_the_released_samplers_and_the_papers_training_settings():
    sampling, training = SDXL.sampling, SDXL.training
    assert (sampling.steps, sampling.guidance_scale, sampling.passes) == (50, 7.5, 3)
    assert (sampling.scale, sampling.scale_end) == (0.2, 1.0)
    assert sampling.draw_batch == 1, "more would change an image with the number of images"
    assert (training.steps, training.batch_size) == (100_000, 8)
    assert (training.lr, training.weight_decay, training.constant_share) == (1e-4, 1e-4, 1.0)
    assert (training.preference_weight, training.depth, training.heads) == (1.0, 4, 20)
    assert (SDXL.data.identity_share, SDXL.data.max_pairs) == (0.0, 0)
    assert (SDXL.world, SDXL.models.dtype, SDXL.models.offload) == (None, None, "none")


def test_sdxl_dpo_shares_everything_with_sdxl_but_its_unet():
    dpo = find_preset("sdxl-dpo")
    assert differences(asdict(SDXL), asdict(dpo)).keys() == {"name", "models"}
    unet = "mhdang/dpo-sdxl-text2image-v1/unet"
    assert differences(asdict(SDXL.models), asdict(dpo.models)) == {"unet": unet}


def test_every_field_with_a_help_line_is_a_flag_that_changes_it_alone():
    assert changed() == {}
    values = {"int": "48", "float": "0.5", "bool": None}
    for field in (*fields(Models), *fields(Sampling)):
        if not field.metadata.get("help"):
            continue
        value = values.get(str(getattr(field.type, "__name__", "")), "48")
        if choices := field.metadata.get("choices"):
            value = choices[-1]
        flag = f"--{field.name.replace('_', '-')}"
        found = changed(flag) if value is None else changed(flag, value)
        assert found.keys() == {field.name} and str(found[field.name]) in (value, "True")


@pytest.mark.parametrize(
    ("arguments", "offload"),
    [
        (["--offload"], "models"),
        (["--offload", "--steps", "48"], "models"),
        (["--offload", "layers"], "layers"),
    ],
)
def test_offload_alone_means_models_and_python_takes_true_and_false(arguments, offload):
    assert changed(*arguments).get("offload", "none") == offload
    assert SDXL.changed(offload=offload == "models").models.offload in (offload, "none")
    with refused("--offload is 'half'", "none, models, layers, auto"):
        SDXL.changed(offload="half")


def test_an_empty_resampler_keeps_the_one_in_the_adapter_file_and_a_scale_of_zero_is_a_value():
    assert changed("--resampler", "", "--scale", "0") == {"resampler": "", "scale": 0.0}


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--steps", "0"), ("--passes", "1000000000"), ("--width", "-8")),
        *(("--scale", "-1"), ("--scale", "inf"), ("--scale-end", "nan"), ("--height", "9" * 400)),
        *(("--dtype", "int8"), ("--model", "sd3"), ("--step", "3")),
    ],
)
def test_values_out_of_a_fields_bounds_and_unknown_flags_end_with_one_line_and_code_2(
    capsys, flag, value
):
    with pytest.raises(SystemExit) as ended:
        changed(flag, value)
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "error: " in last and flag in last


def test_an_unknown_preset_is_refused_with_the_known_names():
    with refused("sd3", "tiny-sdxl"):
        find_preset("sd3")
