# SPDX-License-Identifier: Apache-2.0
"""Drafters of speculative decoding: which model is being built, and its names in its own files.

vLLM builds a drafter inside of its target's configuration. It puts ``draft_model.`` in front of the
names of a draft model, numbers the layers of the others after those of the target, and gives their
configurations no ``packed_modules_mapping``. Their files have other names: ``midlayer.self_attn``,
``layers.0.self_attn`` or ``model.mtp_layers.0.self_attn`` for vLLM's ``model.layers.32.self_attn``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.compressed_linear.checkpoint.headers import last_word
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.integration import compat_loading

DRAFT_MODEL = "draft_model"
"""vLLM's method, and its prefix for names, of a drafter that is a model like any other."""

_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""For classes of vLLM's drafters that do not say what their layers fuse."""


@dataclass(frozen=True)
class Drafter:
    """The drafter that vLLM is building. ``target_layers``: number of its target's layers."""

    method: str
    model: str
    target_layers: int
    model_config: Any
    load_config: Any

    @property
    def is_draft_model(self) -> bool:
        """Whether it is a model like any other, which takes nothing from its target."""
        return self.method == DRAFT_MODEL

    def packed_modules(self, file: FileView) -> dict[str, list[str]]:
        """What the layers of its class fuse: as the class says, or as usual if ``file`` has it."""
        from vllm.model_executor.model_loader.utils import get_model_cls

        if found := getattr(get_model_cls(self.model_config), "packed_modules_mapping", None):
            return dict(found)
        on_disk = {last_word(module) for module in file.modules}
        return {fused: members for fused, members in _FUSED.items() if on_disk & set(members)}

    def own_config(self) -> Any:
        """The quantization config of its own checkpoint; None if that is not quantized."""
        from vllm.config import VllmConfig

        return VllmConfig.get_quantization_config(self.model_config, self.load_config)

    def named(
        self, file: FileView, parent: str, members: Sequence[str], taken: Collection[str]
    ) -> FileView:
        """``file`` with vLLM's names for the modules ``members`` in ``parent``, if it has them
        under others. ``taken``: modules that were found before, such as the target's."""
        front = f"{parent}." if parent else ""
        if any(f"{front}{member}" in file.modules for member in members):
            return file
        if self.is_draft_model:
            renamed = any(module.startswith(f"{DRAFT_MODEL}.") for module in file.modules)
            return file if renamed else file.renamed(lambda name: f"{DRAFT_MODEL}.{name}")
        found = parent_on_disk(parent, members, file.modules, self.target_layers, taken)
        if found is None:
            return file
        old = f"{found}." if found else ""

        def rename(name: str) -> str | None:
            rest = name.removeprefix(old)
            ours = name.startswith(old) and rest.partition(".")[0] in members
            return f"{front}{rest}" if ours else None

        return file.renamed(rename)


def drafter_being_built() -> Drafter | None:
    """None while vLLM builds a target, or nothing."""
    loading = compat_loading.being_loaded()
    if loading is None:
        return None
    speculative = getattr(loading.vllm_config, "speculative_config", None)
    own = loading.model_config
    if speculative is None or own is not speculative.draft_model_config:
        return None
    target = speculative.target_model_config
    layers = getattr(target, "get_total_num_hidden_layers", lambda: 0)()
    return Drafter(str(speculative.method), str(own.model), layers, own, loading.load_config)


def parent_on_disk(
    parent: str,
    members: Sequence[str],
    modules: Mapping[str, Any],
    target_layers: int,
    taken: Collection[str] = (),
) -> str | None:
    """The file's name of the module that vLLM calls ``parent``; None if the file does not tell.

    ``members``: last components of the modules in it. ``modules``: those of the file. ``taken``:
    names that the target has, whose file this may be.
    """
    number, inside = _split(parent)
    found: dict[str, int | None] = {}
    for module in modules:
        above, _, last = module.rpartition(".")
        other, words = _split(above)
        if (
            last in members
            and module not in taken
            and _alike(words, inside)
            and (number is not None or other is None)
        ):
            found[above] = other
    for wanted in () if number is None else (number - target_layers, number):
        exact = [above for above, other in found.items() if other == wanted]
        if len(exact) == 1:
            return exact[0]
    return next(iter(found)) if len(found) == 1 else None


def _split(parent: str) -> tuple[int | None, list[str]]:
    """The last number in a dotted name and the words after it; without one, all words except those
    that vLLM puts in front."""
    words = parent.split(".") if parent else []
    for index in reversed(range(len(words))):
        if words[index].isdigit():
            return int(words[index]), words[index + 1 :]
    return None, [word for word in words if word not in ("model", DRAFT_MODEL)]


def _alike(words: list[str], others: list[str]) -> bool:
    """Whether both are equal, but for words in front of one of them: models wrap their layers."""
    shorter, longer = sorted((words, others), key=len)
    return shorter == longer[len(longer) - len(shorter) :] and bool(shorter or not longer)
