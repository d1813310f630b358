"""The benchmarks run, on shapes that take no time; what they measure is never a test."""

import re
import sys
import time

import pytest
import torch

from img_minimal.bench import __main__ as bench
from img_minimal.bench.aligner import aligner_costs
from img_minimal.bench.injection import injection_costs
from img_minimal.bench.measure import in_turn, matmul_rate
from img_minimal.bench.startup import startup_costs

CPU = torch.device("cpu")


def table(text: str) -> dict[str, list[str]]:
    """The rows of a Markdown table by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {name: cells for name, *cells in rows[2:]}


def test_calls_are_made_in_turn_and_ratios_are_taken_within_a_round():
    order = []
    calls = {name: lambda n=name, s=s: (order.append(n), time.sleep(s)) for name, s in (("a", 0.001), ("b", 0.02))}
    found = in_turn(calls, rounds=3)
    assert order == ["a", "b"] * 4
    assert found["a"].ratio == 1 and found["b"].low <= found["b"].ratio <= found["b"].high
    assert found["b"].ratio > 2
    assert matmul_rate(CPU, 64, 1) > 0


def test_the_aligner_is_compared_with_a_formula_that_gives_the_same_numbers():
    said = aligner_costs(CPU, rounds=1, width=64, guidance_width=32)
    rows = table(said)
    assert len(rows) == 6 and all(float(cells[0]) > 0 for cells in rows.values())
    assert re.search(r"runs at \d+% of this machine's matmul rate", said)


def test_injection_is_compared_with_diffusers_own():
    rows = table(injection_costs(CPU, 1, ((64, 2, 8),), (128, 2, 4)))
    kinds = ("plain", "ours", "diffusers")
    assert list(rows) == [
        f"{block}, {kind}" for block in ("SDXL block of 64", "FLUX double block of 128") for kind in kinds
    ]


def test_start_up_is_measured_with_processes_of_their_own():
    assert list(table(startup_costs(rounds=1, only=1))) == ["python, nothing imported"]


@pytest.mark.parametrize("what", ["memory"])
def test_the_command_prints_a_table(what, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", what])
    assert bench.main() == 0
    assert "| " in capsys.readouterr().out
