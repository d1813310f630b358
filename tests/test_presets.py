"""Presets hold the published numbers; flags change one of them and nothing else."""

from dataclasses import asdict, dataclass, fields

import pytest

from img_minimal.flags import ModelFlags, SamplingFlags
from img_minimal.presets import PRESETS, find_preset, with_overrides
from img_minimal.cli import option, parse
from img_minimal.cli import UserError


@dataclass
class Command(ModelFlags):
    model: str = option("sdxl", "which models", choices=list(PRESETS))


def flags(*arguments: str) -> Command:
    return parse(Command, "a command", list(arguments))


def changed(*arguments: str) -> dict:
    preset = find_preset("sdxl")
    before, after = asdict(preset), asdict(flags(*arguments).applied_to(preset))
    return {name: value for name, value in after.items() if value != before[name]}


def test_sdxl_has_the_released_samplers_and_the_papers_training_settings():
    preset = find_preset("sdxl")
    assert (preset.sampling_steps, preset.guidance_scale, preset.scale, preset.passes) == (50, 7.5, 0.2, 3)
    assert preset.scale_end == 1.0, "the release's sampler does not change the scale"
    assert (preset.train_steps, preset.batch_size, preset.lr, preset.weight_decay) == (100_000, 8, 1e-4, 1e-4)
    assert (preset.preference_weight, preset.constant_share) == (1.0, 1.0)
    assert (preset.identity_share, preset.max_pairs) == (0.0, 0)
    assert (preset.depth, preset.heads, preset.world, preset.dtype, preset.offload) == (4, 20, None, None, False)
    assert preset.draw_batch == 1, "more at once would change an image with the number of images"


def test_sdxl_dpo_shares_everything_with_sdxl_but_its_unet():
    one, other = asdict(find_preset("sdxl")), asdict(find_preset("sdxl-dpo"))
    assert {name for name in one if one[name] != other[name]} == {"name", "unet"}
    assert other["unet"] == "mhdang/dpo-sdxl-text2image-v1/unet" and one["unet"] is None


def test_every_location_and_how_to_compute_can_be_given_by_a_flag():
    assert changed() == {}
    for field in fields(ModelFlags):
        flag = "--" + field.name.replace("_", "-")
        value = {"dtype": "bf16", "offload": True}.get(field.name, "owner/name/elsewhere")
        arguments = [flag] if value is True else [flag, value]
        assert changed(*arguments) == {field.name: value}


def test_an_empty_resampler_keeps_the_one_in_the_adapter_file():
    assert find_preset("sdxl").resampler and not flags("--resampler", "").applied_to(find_preset("sdxl")).resampler


def test_an_unknown_dtype_and_an_unknown_model_are_refused(capsys):
    for arguments in (["--dtype", "int8"], ["--model", "sd3"]):
        with pytest.raises(SystemExit) as ended:
            flags(*arguments)
        assert ended.value.code == 2 and arguments[1] in capsys.readouterr().err
    with pytest.raises(UserError, match="sd3.*tiny-sdxl"):
        find_preset("sd3")


def test_overrides_that_are_none_leave_the_preset_as_it_is():
    preset = find_preset("tiny-sdxl")
    assert with_overrides(preset, scale=None, passes=None) == preset
    assert with_overrides(preset, scale=0.0).scale == 0.0


def test_numbers_of_drawing_that_cannot_be_are_refused():
    preset = find_preset("sdxl")
    assert SamplingFlags(steps=3, scale=0.0, height=512).applied_to(preset).sampling_steps == 3
    large = [{"passes": 10**9}, {"scale": float("inf")}, {"scale_end": float("nan")}]
    for wrong in [*large, {"steps": 0}, {"scale": -1.0}, {"width": -8}]:
        [name] = wrong
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is .*, expected"):
            SamplingFlags(**wrong).applied_to(preset)
