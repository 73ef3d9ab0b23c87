# SPDX-License-Identifier: Apache-2.0
"""Small models whose weights are stored as floats of few bits, in the variants that no checkpoint
of a tool at hand has, and what each of their layers computes by ``float_definitions``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.support import float_definitions as definitions
from tests.support.architectures import Family
from tests.support.architectures import write as write_twins
from tests.support.model_loading import LoadedModel
from tests.support.synthetic import Model, Quant

Prepared = Callable[[np.ndarray[Any, np.dtype[np.float32]]], definitions.Floats]
"""x [M, K] → x̂."""


@dataclass(frozen=True)
class Stored:
    """One weight: its tensors by the last component of their names, what it means (float64 [N, K]),
    and what is done to x, and to y. ``step``: what y may differ by after that."""

    tensors: dict[str, torch.Tensor]
    meaning: definitions.Floats
    prepare: Prepared = lambda x: x.astype(np.float64)
    finish: Callable[[definitions.Floats], definitions.Floats] = lambda y: y
    step: float = 0.0


UNLIKE = {"q_proj": 1.0, "k_proj": 1 / 16, "v_proj": 8.0, "gate_proj": 1 / 16, "up_proj": 4.0}


def unlike_factor(module: str) -> float:
    """For the scales of a store that is ``unlike``, by the last component of the module's name."""
    return UNLIKE.get(module.rpartition(".")[2], 1.0)


Store = Callable[[str, int, int, torch.Generator], Stored | None]
"""(module, N, K, random numbers) → its weight; None leaves it as it is."""


@dataclass
class FloatModel:
    """``store`` for each linear layer of ``shape``; ``config``: its quantization_config."""

    config: dict[str, Any]
    store: Store
    shape: Model = field(default_factory=lambda: Model(Quant("gptq")))
    tied: bool = False
    head: bool = False
    """Whether the head is stored so, too."""


@dataclass(frozen=True)
class Written:
    """``stored``: module → its weight, also of those that stay as they are. ``input_ids``, and fp32
    ``logits`` of the transformers library with the weights' meanings and what is done to x."""

    path: Path
    stored: dict[str, Stored]
    input_ids: torch.Tensor
    logits: torch.Tensor


def write(model: FloatModel, path: Path) -> Written:
    from transformers import AutoConfig, AutoModelForCausalLM

    generator = torch.Generator().manual_seed(model.shape.seed)
    torch.manual_seed(model.shape.seed)
    hf_config = model.shape.hf_config | {"tie_word_embeddings": model.tied}
    ideal = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config))
    ideal = ideal.to(torch.float32).eval()
    tensors: dict[str, torch.Tensor] = {}
    stored: dict[str, Stored] = {}
    with torch.no_grad():
        for name, parameter in ideal.named_parameters():
            module, _, kind = name.rpartition(".")
            linear = module.endswith("_proj") or (model.head and module == "lm_head")
            found = None
            if linear and kind == "weight":
                found = model.store(module, *parameter.shape, generator)
            if found is not None:
                stored[module] = found
                parameter.copy_(torch.from_numpy(found.meaning))
                tensors |= {f"{module}.{key}": value for key, value in found.tensors.items()}
                continue
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            elif kind == "bias":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            tensors[name] = parameter.detach().clone()
            if linear and kind == "weight":
                stored[module] = Stored({}, parameter.double().numpy())
        input_ids = torch.randint(3, model.shape.vocab, (2, 12), generator=generator)
        for module, weight in stored.items():
            ideal.get_submodule(module).register_forward_pre_hook(_prepared(weight))
        logits = ideal(input_ids).logits.float()
    path.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(hf_config | {"quantization_config": model.config}))
    return Written(path, stored, input_ids, logits)


def _prepared(weight: Stored) -> Callable[[Any, tuple[torch.Tensor]], tuple[torch.Tensor]]:
    def hook(module: Any, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        x = given[0]
        flat = weight.prepare(x.reshape(-1, x.shape[-1]).numpy())
        return (torch.from_numpy(flat).float().reshape(x.shape),)

    return hook


def assert_near(ours: torch.Tensor, reference: torch.Tensor, *, exact: bool) -> None:
    """Log-probabilities of two logits are equal. Unless ``exact``, where rounding x turns the last
    bit of an intermediate result into a step of it now and then, at most tokens."""
    ours = ours[..., : reference.shape[-1]]
    error = torch.log_softmax(ours, -1) - torch.log_softmax(reference, -1)
    worst = error.abs().amax(-1).flatten()
    assert float(worst.max()) <= (1e-4 if exact else 0.5)
    assert float(worst.quantile(0.7)) <= 1e-3


SMALL: dict[str, Any] = {"quant": Quant("gptq"), "hidden": 128, "intermediate": 256}
"""Sizes of a ``Model``; its own quantization is replaced."""


def layers_of(
    model: LoadedModel, stored: dict[str, Stored]
) -> Iterator[tuple[str, Any, list[Stored]]]:
    """(name, layer, the members of which it consists) of the model's layers that are stored so."""
    for name, layer in model.model.named_modules():
        parent, _, last = name.rpartition(".")
        packed = getattr(model.model, "packed_modules_mapping", {})
        members = [f"{parent}.{m}" for m in packed.get(last, ())] or [name]
        if all(member in stored for member in members):
            yield name, layer, [stored[member] for member in members]


def assert_computes(
    layer: Any, name: str, members: list[Stored], x: torch.Tensor, tolerance: float = 1e-5
) -> None:
    """``layer`` gives for fp32 ``x`` [M, K] what its members mean, within ``tolerance`` of the sum
    of magnitudes."""
    bias = getattr(layer, "bias", None)
    found = layer.quant_method.apply(layer, x, bias).double().numpy()
    parts, sizes = [], []
    for member in members:
        prepared = member.prepare(x.numpy())
        parts.append(prepared @ member.meaning.T)
        sizes.append(np.abs(prepared) @ np.abs(member.meaning).T)
    magnitude = np.concatenate(sizes, 1)
    offset = np.zeros(magnitude.shape[1])
    if bias is not None:
        offset = bias.double().numpy()[: len(offset)]
        magnitude = magnitude + np.abs(offset)
    ends = np.cumsum([part.shape[1] for part in parts])
    offsets = np.split(offset, ends[:-1])
    expected = np.concatenate(
        [m.finish(part + own) for m, part, own in zip(members, parts, offsets, strict=True)], 1
    )
    error = np.abs(found[:, : expected.shape[1]] - expected)
    steps = np.concatenate(
        [np.full(p.shape[1], m.step) for m, p in zip(members, parts, strict=True)]
    )
    # A rounded y is a step away now and then, where its last bit decides.
    if steps.any():
        assert float((error > 1e-5 + tolerance * magnitude).mean()) <= 0.01
    assert (error <= tolerance * magnitude + steps * 1.0001 + 1e-9).all(), (
        f"{name}: {float((error / (magnitude + 1e-30)).max()):.3g} of the sum of magnitudes"
    )


def assert_every_layer_computes(model: LoadedModel, stored: dict[str, Stored]) -> list[str]:
    """``assert_computes`` of every layer that is stored so; their names."""
    found = list(layers_of(model, stored))
    for name, layer, members in found:
        assert_computes(layer, name, members, some_input(members[0].meaning.shape[1]))
    return [name for name, *_ in found]


def some_input(k: int, tokens: int = 5) -> torch.Tensor:
    """fp32 [tokens, K] with tokens and channels of very different sizes, and a token of zeros."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(tokens, k, generator=generator)
    x *= torch.exp(torch.randn(tokens, 1, generator=generator) * 2)
    x *= torch.exp(torch.randn(k, generator=generator))
    x[-1] = 0
    return x


@dataclass(frozen=True)
class Twins:
    """Directories of a checkpoint and of its dequantized twin, and what is stored in the former."""

    quantized: Path
    ideal: Path
    stored: dict[str, Stored]


def write_family(family: Family, config: dict[str, Any], store: Store, path: Path) -> Twins:
    """A checkpoint of another family, whose linear weights ``store`` gives, and its twin."""
    twins = write_twins(family, Quant("gptq"), path, reference=False)
    generator = torch.Generator().manual_seed(1)
    ideal = load_file(twins.ideal / "model.safetensors")
    stored: dict[str, Stored] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in sorted(ideal.items()):
        module = name.removesuffix(".weight")
        found = None
        if module in twins.modules:
            found = store(module, *weight.shape, generator)
        if found is None:
            tensors[name] = weight
            continue
        stored[module] = found
        ideal[name] = torch.from_numpy(found.meaning).to(weight.dtype)
        tensors |= {f"{module}.{key}": value for key, value in found.tensors.items()}
    save_file(ideal, twins.ideal / "model.safetensors", {"format": "pt"})
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, twins.quantized / "model.safetensors"
    )
    described = json.loads((twins.ideal / "config.json").read_text())
    described["quantization_config"] = config
    (twins.quantized / "config.json").write_text(json.dumps(described))
    return Twins(twins.quantized, twins.ideal, stored)
