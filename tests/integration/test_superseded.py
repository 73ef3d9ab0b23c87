# SPDX-License-Identifier: Apache-2.0
"""Files that hold more than one version of a weight: the one that counts is loaded, or none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.messages import saying, says
from tests.support.model_loading import loaded, logits
from tests.support.reloading import worst_error
from tests.support.synthetic import Model, Quant, write
from vllm.compressed_linear.checkpoint.headers import INDEX
from vllm.compressed_linear.integration import completeness

FORMS = {"gptq": Quant("gptq"), "awq": Quant("awq", symmetric=False), "ct": Quant("ct")}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(
        completeness.logger, "warning", lambda text, *args: lines.append(text % args)
    )
    return lines


def split(path: Path, files: Mapping[str, Mapping[str, torch.Tensor]], *, index: bool) -> None:
    """Replace the checkpoint's file by ``files``; the index means the first one of each tensor."""
    (path / "model.safetensors").unlink()
    meant: dict[str, str] = {}
    for file, tensors in files.items():
        save_file(dict(tensors), path / file, {"format": "pt"})
        meant = dict.fromkeys(tensors, file) | meant
    if index:
        (path / INDEX).write_text(json.dumps({"weight_map": meant}))


def other_values(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", ["a.safetensors", "z.safetensors"])
def test_the_index_decides_which_copy_is_loaded(
    form: str, first: str, tmp_path: Path, warnings: list[str]
) -> None:
    reference = write(Model(FORMS[form]), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    copied = {name: t for name, t in tensors.items() if ".mlp." in name or name == "lm_head.weight"}
    copies = other_values(copied) | {"lm_head.extra": torch.zeros(1)}
    split(tmp_path, {first: tensors, "m.safetensors": copies}, index=True)
    with loaded(tmp_path, skip_tokenizer_init=True) as model:
        assert worst_error(logits(model, reference["input_ids"]), reference) <= 1e-4
    assert says(warnings[0], tmp_path / "m.safetensors", "index", tmp_path / first)
    assert len(warnings) == 2  # the other one is about lm_head.extra


def test_two_copies_without_an_index_are_an_error_that_names_both(tmp_path: Path) -> None:
    write(Model(FORMS["gptq"]), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    split(tmp_path, {"a.safetensors": tensors, "b.safetensors": tensors}, index=False)
    both = saying(tmp_path / "a.safetensors", tmp_path / "b.safetensors", INDEX)
    with pytest.raises(ValueError, match=both), loaded(tmp_path, skip_tokenizer_init=True):
        pass


def test_a_copy_that_the_index_does_not_know_is_an_error(tmp_path: Path) -> None:
    write(Model(FORMS["gptq"]), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    files = {
        "a.safetensors": tensors | {"extra": torch.ones(2)},
        "b.safetensors": {"other": torch.ones(2), "extra": torch.ones(2)},
    }
    split(tmp_path, files, index=True)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["extra"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with (
        pytest.raises(ValueError, match=saying("a.safetensors", "b.safetensors", "extra")),
        loaded(tmp_path, skip_tokenizer_init=True),
    ):
        pass


@pytest.mark.parametrize("form", FORMS)
def test_a_plain_weight_beside_codes_is_not_loaded(
    form: str, tmp_path: Path, warnings: list[str]
) -> None:
    reference = write(Model(FORMS[form]), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {f"{Q}.weight": torch.ones(128, 128)}, tmp_path / "model.safetensors")
    with loaded(tmp_path, skip_tokenizer_init=True) as model:
        assert worst_error(logits(model, reference["input_ids"]), reference) <= 1e-4
    (line,) = warnings
    assert says(line, "plain weights", f"{Q}.weight")


def test_plain_weights_beside_those_of_another_meaning_stay(tmp_path: Path) -> None:
    """Where a scheme calls its codes ``weight``, or leaves a member unquantized."""
    mixed = Model(FORMS["ct"], overrides={"k_proj": None})
    reference = write(mixed, tmp_path)
    with loaded(tmp_path, skip_tokenizer_init=True) as model:
        assert worst_error(logits(model, reference["input_ids"]), reference) <= 1e-4
