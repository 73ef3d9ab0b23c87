# SPDX-License-Identifier: Apache-2.0
"""A reload that is refused leaves the old weights serving: the whole model, no layer of the new."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.messages import saying
from tests.support.model_loading import LoadedModel, loaded, logits
from tests.support.reloading import (
    Tensors,
    addresses,
    reload,
    rewrite,
    weight_update,
    worst_error,
)
from tests.support.synthetic import Model, Quant, write
from tests.support.table_models import Bits, TableModel
from tests.support.table_models import write as write_table_model

MODEL = Model(
    Quant("gptq", symmetric=False),
    overrides={"q_proj": None, "k_proj": None, "v_proj": None},
    layers=2,
    bias=True,
)
LAST = "model.layers.1"


def _remove(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for key in [key for key in tensors if key.startswith(name)]:
            del tensors[key]

    return change


def _put(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = value(tensors[name]).contiguous()

    return change


DAMAGES: dict[str, tuple[Callable[[Tensors], None], tuple[object, ...]]] = {
    "missing-tensor": (
        _remove(f"{LAST}.mlp.down_proj.scales"),
        (f"{LAST}.mlp.down_proj.scales", "[8 x 128]"),
    ),
    "missing-part-of-a-fused-layer": (
        _remove(f"{LAST}.mlp.up_proj"),
        (re.compile(r"up_proj\.\w+ is not in the checkpoint"),),
    ),
    "missing-layer": (_remove(f"{LAST}.self_attn.o_proj"), (f"{LAST}.self_attn.o_proj", "qweight")),
    "missing-part-of-a-dense-layer": (_remove(f"{LAST}.self_attn.k_proj.weight"), ("part 2 of 3",)),
    "missing-norm": (_remove("model.norm"), ("model.norm.weight",)),
    "missing-norm-of-a-layer": (
        _remove(f"{LAST}.input_layernorm"),
        (f"{LAST}.input_layernorm.weight",),
    ),
    "missing-table": (_remove("model.embed_tokens"), ("model.embed_tokens.weight",)),
    "missing-head": (_remove("lm_head"), ("lm_head", "weight")),
    "other-shape": (
        _put(f"{LAST}.mlp.down_proj.qweight", lambda t: t[:, :64]),
        (f"{LAST}.mlp.down_proj.qweight", 64),
    ),
    "other-shape-of-a-dense-layer": (_put("lm_head.weight", lambda t: t[:, :64]), ()),
    "other-shape-of-a-norm": (_put("model.norm.weight", lambda t: t[:64]), ()),
    "other-shape-of-a-bias": (_put(f"{LAST}.self_attn.o_proj.bias", lambda t: t[:64]), ()),
    "other-dtype": (
        _put(f"{LAST}.mlp.down_proj.qweight", lambda t: t.float()),
        (f"{LAST}.mlp.down_proj.qweight", "float32", "int32"),
    ),
    "damaged-scales": (
        _put(f"{LAST}.mlp.down_proj.scales", lambda t: t * float("nan")),
        (f"{LAST}.mlp.down_proj.scales",),
    ),
    "damaged-order": (
        _put(f"{LAST}.mlp.down_proj.g_idx", lambda t: t + 1000),
        (f"{LAST}.mlp.down_proj.g_idx", 1000),
    ),
    "another-plan": (
        _put(f"{LAST}.mlp.down_proj.g_idx", lambda t: t.flip(0)),
        (f"{LAST}.mlp.down_proj", "reordered K", "restart"),
    ),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors, Path, Tensors]:
    path = tmp_path_factory.mktemp("reload")
    first = write(MODEL, path / "first")
    second = write(replace(MODEL, seed=1), path / "second")
    return path / "first", first, path / "second", second


@pytest.fixture(scope="module")
def running(two: tuple[Path, Tensors, Path, Tensors]) -> Iterator[LoadedModel]:
    """One model for all refusals: each leaves it as it was."""
    with loaded(two[0], skip_tokenizer_init=True) as model:
        yield model


def _copy(two: tuple[Path, Tensors, Path, Tensors], to: Path) -> Path:
    to.mkdir()
    for file in two[2].iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def _check_refused(
    running: LoadedModel,
    two: tuple[Path, Tensors, Path, Tensors],
    path: Path | None,
    *parts: object,
    weights: Any = None,
) -> None:
    """Refused, and the very same numbers as before; then a good reload works, and back."""
    first_path, first, second_path, second = two
    before, where = logits(running, first["input_ids"]), addresses(running)
    assert worst_error(before, first) <= 1e-4
    with pytest.raises(ValueError, match=saying("old weights", *parts)):
        reload(running, path, weights)
    assert running.config.model_config.model == str(first_path)
    assert torch.equal(logits(running, first["input_ids"]), before)
    reload(running, second_path)
    assert worst_error(logits(running, second["input_ids"]), second) <= 1e-4
    reload(running, first_path)
    assert torch.equal(logits(running, first["input_ids"]), before)
    assert addresses(running) == where


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_leaves_the_old_weights(
    damage: str, running: LoadedModel, two: tuple[Path, Tensors, Path, Tensors], tmp_path: Path
) -> None:
    change, parts = DAMAGES[damage]
    path = _copy(two, tmp_path / "damaged")
    rewrite(path, change)
    _check_refused(running, two, path, *parts)


def test_a_truncated_file_leaves_the_old_weights(
    running: LoadedModel, two: tuple[Path, Tensors, Path, Tensors], tmp_path: Path
) -> None:
    path = _copy(two, tmp_path / "damaged")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 3 // 4])
    _check_refused(running, two, path)


def test_a_path_that_does_not_exist_leaves_the_old_weights(
    running: LoadedModel, two: tuple[Path, Tensors, Path, Tensors], tmp_path: Path
) -> None:
    _check_refused(running, two, tmp_path / "nowhere")


def test_a_sender_that_fails_leaves_the_old_weights(
    running: LoadedModel, two: tuple[Path, Tensors, Path, Tensors]
) -> None:
    def sent() -> Iterator[tuple[str, torch.Tensor]]:
        tensors = sorted(load_file(two[2] / "model.safetensors").items())
        yield from tensors[: len(tensors) * 3 // 4]
        raise ConnectionError("the trainer hung up")

    _check_refused(running, two, None, "the trainer hung up", weights=sent())


def test_wrong_numbers_of_a_backend_leave_the_old_weights(
    running: LoadedModel,
    two: tuple[Path, Tensors, Path, Tensors],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.compressed_linear.prepare import layer

    check = layer.self_check

    def wrong_at_the_end(name: str, method: Any, tensors: Any, weights: Any) -> None:
        if name == f"{LAST}.mlp.down_proj":
            tensors = dict(tensors)
            codes = max(tensors, key=lambda key: tensors[key].nbytes)
            tensors[codes] = tensors[codes].flip(0)
        check(name, method, tensors, weights)

    with monkeypatch.context() as patched:
        patched.setattr(layer, "self_check", wrong_at_the_end)
        with pytest.raises(ValueError, match=saying("old weights", f"{LAST}.mlp.down_proj")):
            reload(running, two[2])
    _check_refused(running, two, two[0].parent / "nowhere")


def test_an_interrupt_leaves_the_old_weights(
    running: LoadedModel, two: tuple[Path, Tensors, Path, Tensors]
) -> None:
    def sent() -> Iterator[tuple[str, torch.Tensor]]:
        yield from sorted(load_file(two[2] / "model.safetensors").items())[:20]
        raise KeyboardInterrupt

    before = logits(running, two[1]["input_ids"])
    with pytest.raises(KeyboardInterrupt):
        reload(running, None, sent())
    assert torch.equal(logits(running, two[1]["input_ids"]), before)


def test_without_room_for_both_the_message_says_that_layers_may_be_mixed(
    running: LoadedModel,
    two: tuple[Path, Tensors, Path, Tensors],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from vllm.compressed_linear.machine import memory

    path = _copy(two, tmp_path / "damaged")
    rewrite(path, DAMAGES["damaged-scales"][0])
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(ValueError, match=saying("may hold new ones", "reload", "down_proj.scales")):
        reload(running, path)
    reload(running, two[0])  # without room as well: layer by layer, as vLLM does
    assert worst_error(logits(running, two[1]["input_ids"]), two[1]) <= 1e-4


TABLES = {
    "quantized-tied-table": TableModel("llama", table=Bits(8, 32, False), vocabulary=501),
    "quantized-table-and-head": TableModel("llama", tied=False, head=Bits(6, 64)),
    "unquantized-tied-table": TableModel("gemma3", table=None),
    "unquantized-untied-table": TableModel("qwen2-qkv-bias", tied=False, table=None),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_and_tied_heads_keep_their_old_weights(name: str, tmp_path: Path) -> None:
    first = write_table_model(TABLES[name], tmp_path / "first")
    second = write_table_model(replace(TABLES[name], seed=1), tmp_path / "second")
    write_table_model(replace(TABLES[name], seed=1), tmp_path / "damaged")
    # The last tensor that vLLM loads is damaged, so the table and its head were loaded before.
    rewrite(tmp_path / "damaged", _put("model.norm.weight", lambda t: t[:1].expand(3)))
    with loaded(tmp_path / "first", skip_tokenizer_init=True) as model:
        before, where = logits(model, first["input_ids"]), addresses(model)
        with pytest.raises(ValueError, match=saying("old weights")):
            reload(model, tmp_path / "damaged")
        assert torch.equal(logits(model, first["input_ids"]), before)
        reload(model, tmp_path / "second")
        assert worst_error(logits(model, second["input_ids"]), second) <= 1e-4
        reload(model, tmp_path / "first")
        assert torch.equal(logits(model, first["input_ids"]), before)
        assert addresses(model) == where


def _chunks(path: Path) -> list[list[tuple[str, torch.Tensor]]]:
    """The tensors as a trainer sends them: a module at a time."""
    modules: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        modules.setdefault(name.rpartition(".")[0], []).append((name, tensor))
    return list(modules.values())


def test_a_trainer_s_update_is_applied_when_it_is_finished(
    running: LoadedModel, two: tuple[Path, Tensors, Path, Tensors]
) -> None:
    before = logits(running, two[1]["input_ids"])
    for path, reference in ((two[2], two[3]), (two[0], two[1])):
        update = weight_update(running)
        update.start_weight_update()
        for chunk in _chunks(path):
            update.update_weights(chunk)
        update.finish_weight_update()
        update.reset_weight_update_target()
        assert worst_error(logits(running, reference["input_ids"]), reference) <= 1e-4
    assert torch.equal(logits(running, two[1]["input_ids"]), before)


@pytest.mark.parametrize("end", ["failed", "died", "unfinished"])
def test_a_trainer_s_update_that_ends_early_leaves_the_old_weights(
    end: str, running: LoadedModel, two: tuple[Path, Tensors, Path, Tensors]
) -> None:
    before, where = logits(running, two[1]["input_ids"]), addresses(running)
    update = weight_update(running)
    update.start_weight_update()
    for chunk in _chunks(two[2])[:-4]:
        update.update_weights(chunk)
    if end == "failed":
        name, tensor = _chunks(two[2])[-1][0]
        with pytest.raises((ValueError, AssertionError, RuntimeError)):
            update.update_weights([(name, tensor.flatten()[:1].expand(7, 7))])
        update.reset_weight_update_target()  # as vLLM's worker does on any error
    elif end == "died":
        update.reset_weight_update_target()
    else:  # the next update finds the remains of this one
        update.start_weight_update()
        update.reset_weight_update_target()
    assert torch.equal(logits(running, two[1]["input_ids"]), before)
    assert addresses(running) == where


def test_a_model_that_is_not_ours_reloads_as_vllm_does(
    two: tuple[Path, Tensors, Path, Tensors], running: LoadedModel, tmp_path: Path
) -> None:
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )

    model = torch.nn.Sequential(RMSNorm(8))
    record_metadata_for_reloading(model)
    weight = model[0].weight
    initialize_layerwise_reload(model)
    model[0].weight.weight_loader(model[0].weight, torch.full((8,), 2.0))
    assert torch.equal(weight, torch.full((8,), 2.0)), "written as soon as it is loaded"
    finalize_layerwise_reload(model, running.config.model_config)
    assert model[0].weight is weight
