# SPDX-License-Identifier: Apache-2.0
"""Reload of a running model's weights: all of the new weights, or all of the old ones.

vLLM reloads layer by layer and copies the tensors of each layer over the old ones as soon as the
layer is complete. An error then leaves a model of which some layers are new and the others have no
tensors. Here the old tensors are set aside until every layer of the new weights is loaded, prepared
and checked on every rank. Then they are overwritten in place, because compiled graphs hold their
addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch

from vllm.compressed_linear.checkpoint.parameter import CheckpointParameter
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.integration import compat, compat_loading, compat_weights
from vllm.compressed_linear.integration.given_weights import given_to
from vllm.compressed_linear.integration.whole_model import allows_missing, is_ours, method_of
from vllm.compressed_linear.machine import memory

logger = compat.logger(__name__)

_OPEN: WeakKeyDictionary[torch.nn.Module, Reload] = WeakKeyDictionary()

_MODULE_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")

_ROOM = 1.1
"""Room that two sets of weights need, relative to one: the layer in preparation on top."""


class ReloadRefusedError(ValueError):
    """New weights were refused; the model has its old ones."""


@cache
def guard_reloads() -> None:
    """Make reloads of our models complete or without effect, in this process."""
    if compat_weights.wrap_reload(_initialize, _finalize, _reload_weights):
        compat_weights.end_of_weight_update(_abandon)


class _Layer:
    """One layer during a reload: what it was before, and vLLM's record of what arrives."""

    def __init__(self, name: str, layer: torch.nn.Module) -> None:
        self.name = name
        self.layer = layer
        self.record = compat_weights.LayerRecord(layer)
        self.non_persistent = set(layer._non_persistent_buffers_set)
        # Methods keep more than tensors: executors, or handles of packed copies (oneDNN).
        self._attributes = [
            (owner, dict(vars(owner)))
            for owner in (layer, getattr(layer, "quant_method", None))
            if owner is not None and hasattr(owner, "__dict__")
        ]
        self.tensors: compat_weights.Tensors | None = None
        self.arrivals: list[tuple[str, Any]] = []
        self._written: list[tuple[torch.Tensor, torch.Tensor]] = []

    def take(self) -> None:
        """Set the running tensors aside. vLLM leaves some on the layer (biases) and writes to them
        directly; of these, keep copies."""
        self.tensors = self.record.take_running_tensors()
        self.arrivals = self.record.arrivals()
        parameters, buffers = self.tensors or ({}, {})
        for name, old in (parameters | buffers).items():
            now = getattr(self.layer, name, None)
            if now is old:
                self._written.append((old, old.detach().clone()))
            elif isinstance(now, CheckpointParameter):
                now.record.arrivals.clear()  # of a reload that was refused half way
        if compat_weights.is_deferred_attention(
            self.layer
        ):  # its scales are overwritten at the end
            self._written += [(old, old.detach().clone()) for old in parameters.values()]

    def take_again(self) -> None:
        self.record.take_running_tensors()

    def give(self) -> None:
        """Let vLLM have the running tensors back: to place them, or to write to them itself."""
        self.record.give_running_tensors(self.tensors)

    def arrived(self) -> list[tuple[str, Any]]:
        """Name of the parameter and shard id of each load of this reload."""
        return [
            (name, bound.arguments.get("loaded_shard_id", bound.arguments.get("shard_id")))
            for name, bound in self.arrivals
        ]

    def forget_arrivals(self) -> None:
        """Clear records of loads, which outlive a refused reload."""
        for parameter in self.layer._parameters.values():
            if isinstance(parameter, CheckpointParameter):
                parameter.record.arrivals.clear()

    def pairs(self) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """(name, old tensor, new tensor) of each tensor to be overwritten. Raises ``ValueError`` if
        one has another shape."""
        assert self.tensors is not None
        parameters, buffers = self.tensors
        arrived = {name for name, _ in self.arrivals}
        names = list(parameters)
        for name in buffers:
            if name in self.layer._buffers and (name not in self.non_persistent or name in arrived):
                names.append(name)
        out = []
        for name in names:
            old, new = (parameters | buffers)[name], getattr(self.layer, name, None)
            if new is old:
                continue
            if new is None or not _fits(new.shape, old.shape):
                found = "absent" if new is None else f"{new.dtype} {list(new.shape)}"
                raise ValueError(
                    f"{self.name}: tensor {name} is {found} in the reloaded layer, but the running "
                    f"one has {old.dtype} {list(old.shape)}; restart to load these weights"
                )
            out.append((name, old, new))
        return out

    def commit(self, pairs: Iterable[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
        """Overwrite the old tensors with the new, keep what they held, and place them."""
        for _, old, new in pairs:
            before = old.detach().clone()
            old.data.copy_(new)
            if new.shape == old.shape and new.dtype == old.dtype:
                before = new.data.copy_(before)
            self._written.append((old, before))
        self.place()

    def place(self) -> None:
        if self.tensors is not None:
            self.record.place(self.tensors, self.non_persistent)

    def restore(self) -> None:
        """Back to what the layer was before the reload."""
        for old, before in reversed(self._written):
            old.data.copy_(before)
        self._written.clear()
        self.forget_arrivals()
        self.place()
        for owner, attributes in self._attributes:
            state = vars(owner)
            kept = {name: state[name] for name in _MODULE_STATE if name in state}
            state.clear()
            state.update(attributes | kept)


def _fits(new: torch.Size, old: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(new, old) == old
    except RuntimeError:
        return False


class Reload:
    """One reload. ``whole``: the new weights are a whole checkpoint, and every rank reloads it in
    one call; else a trainer sends what it has changed."""

    def __init__(self, model: torch.nn.Module, *, whole: bool, every_rank: bool) -> None:
        self.model = model
        self.whole = whole
        self.every_rank = every_rank
        self.layers: list[_Layer] = []
        self.keeps_both = True

    def begin(self, initialize: Callable[..., Any]) -> None:
        """vLLM's own beginning; then set the running tensors aside."""
        layers = [_Layer(name, layer) for name, layer in self.model.named_modules()]
        try:
            initialize(self.model)
        finally:
            self.layers = [layer for layer in layers if layer.record.is_open]
            for layer in self.layers:
                layer.take()
        self.keeps_both = self._has_room()
        if not self.keeps_both:
            for layer in self.layers:
                layer.give()

    def _has_room(self) -> bool:
        storages: dict[int, int] = {}
        for layer in self.layers:
            for tensors in layer.tensors or ():
                for tensor in tensors.values():
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        needed, free = int(sum(storages.values()) * _ROOM), memory.available_bytes()
        if needed <= free:
            return True
        logger.warning(
            "Reload of weights: %.1f GiB are needed to keep the old weights until all of the new "
            "are accepted, but %.1f GiB are available. Layers are overwritten one by one; an error "
            "half way would leave a model of old and new layers.",
            needed / 2**30,
            free / 2**30,
        )
        return False

    def finish(self, finalize: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Prepare what waits, check all layers of all ranks, then overwrite."""
        for layer in self.layers:
            record = layer.record
            if not record.is_open:
                continue
            if compat_weights.is_deferred_attention(layer.layer):
                layer.give()
            elif record.elements_loaded:
                self._check_arrivals(layer)
                record.process()
            else:
                if self.whole:
                    self._check_unloaded(layer)
                layer.give()
        retied = [layer for layer in self.layers if self._retie(layer)]
        if self.keeps_both:
            accepted = [(layer, layer.pairs()) for layer in self._processed()]
            self._agree(None)
            for layer, pairs in accepted:
                layer.commit(pairs)
        for layer in retied:
            layer.commit(layer.pairs())
        return finalize(self.model, *args, **kwargs)

    def _processed(self) -> list[_Layer]:
        return [
            layer for layer in self.layers if not layer.record.is_open and layer.tensors is not None
        ]

    def _retie(self, layer: _Layer) -> bool:
        """Prepare a head anew whose weight is that of a reloaded table."""
        method = method_of(layer.layer)
        table = None if method is None else method.plain_table
        if method is None or table is None or table.weight.is_meta or not layer.record.is_open:
            return False
        layer.take_again()
        del layer.layer.weight
        layer.layer.weight = table.weight
        layer.layer.quant_method.process_weights_after_loading(layer.layer)  # type: ignore[union-attr, operator]
        return True

    def _check_arrivals(self, layer: _Layer) -> None:
        """Raise ``CheckpointError`` for a part of one of our layers that has not arrived."""
        method = method_of(layer.layer)
        if method is not None and (absent := method.absent(layer.layer, layer.arrived())):
            raise CheckpointError(
                f"{layer.name}: the new weights have no tensor {layer.name}.{absent}"
            )

    def _check_unloaded(self, layer: _Layer) -> None:
        """Raise ``CheckpointError`` for a layer of which nothing has arrived, although a checkpoint
        has to have it: with its old weights it would be a stranger among new ones."""
        if layer.record.elements_expected and method_of(layer.layer) is not None:
            self._check_arrivals(layer)
            return
        loaded = {
            tensor.data_ptr()
            for other in self.layers
            if other.record.elements_loaded or not other.record.is_open
            for tensor in (other.tensors or ({}, {}))[0].values()
        }
        for name, tensor in (layer.tensors or ({}, {}))[0].items():
            tied = tensor.data_ptr() in loaded
            if tensor.numel() and not tied and not compat_loading.fills_itself(layer.layer, name):
                raise CheckpointError(
                    f"{layer.name}: the new weights have no tensor for {layer.name}.{name}, or "
                    f"vLLM's {type(self.model).__name__} writes it in a way that its reload does "
                    "not follow; restart to load these weights"
                )

    def _agree(self, error: BaseException | None) -> None:
        """Tell the other ranks whether this one accepts; raise if another one does not."""
        if not self.every_rank:
            return
        self.every_rank = False  # one vote
        said = "" if error is None else f"{type(error).__name__}: {error}"
        votes = compat.gather_from_all_ranks(said)
        refused = [(rank, vote) for rank, vote in enumerate(votes) if vote]
        if refused and error is None:
            rank, reason = refused[0]
            raise ReloadRefusedError(f"refused on rank {rank}: {reason}")

    def undo(self, error: BaseException | None = None) -> None:
        """Back to the old weights."""
        for layer in self.layers:
            layer.restore()
        if isinstance(error, Exception):
            with suppress(RuntimeError):  # of a group whose other ranks have died
                self._agree(error)

    def refusal(self, error: Exception) -> ReloadRefusedError:
        """What to tell the user."""
        if self.keeps_both:
            end = "The model serves with its old weights"
        else:
            end = (
                "There was not enough memory to keep the old weights, so some layers may hold new "
                "ones: reload a whole checkpoint, or restart"
            )
        return ReloadRefusedError(f"Reload refused. {end}. {error}")


@contextmanager
def _undone_on_error(model: torch.nn.Module) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        reload = _OPEN.pop(model, None)
        if reload is None:  # undone further in
            raise
        reload.undo(error)
        if isinstance(error, Exception):
            raise reload.refusal(error) from error
        raise


def _initialize(original: Callable[..., Any], model: torch.nn.Module) -> None:
    """Wrapper of vLLM's ``initialize_layerwise_reload``."""
    reload = _OPEN.get(model)
    if reload is None or reload.layers:
        _abandon(model)  # a trainer began an update and died
        if not is_ours(model):
            original(model)
            return
        reload = _OPEN[model] = Reload(model, whole=False, every_rank=False)
        if (given := given_to(model)) is not None:
            given.read_from(None)
    with _undone_on_error(model):
        reload.begin(original)


def _finalize(
    original: Callable[..., Any], model: torch.nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """Wrapper of vLLM's ``finalize_layerwise_reload``."""
    reload = _OPEN.get(model)
    if reload is None:
        return original(model, *args, **kwargs)
    with _undone_on_error(model):
        result = reload.finish(original, *args, **kwargs)
    del _OPEN[model]
    return result


def _reload_weights(
    original: Callable[..., Any],
    vllm_config: Any,
    model: torch.nn.Module,
    weights_iterator: Any,
    weights_path: str | None,
    is_checkpoint_format: bool,
) -> Any:
    """Wrapper of vLLM's ``reload_weights``."""
    if not is_ours(model):
        return original(vllm_config, model, weights_iterator, weights_path, is_checkpoint_format)
    _abandon(model)
    source = compat_weights.named_source(vllm_config.model_config)
    if is_checkpoint_format:
        whole = weights_iterator is None and not allows_missing(model)
        _OPEN[model] = Reload(model, whole=whole, every_rank=True)
    try:
        with _undone_on_error(model):
            if (given := given_to(model)) is not None and is_checkpoint_format:
                given.read_from(None if weights_iterator is not None else weights_path or "")
            return original(
                vllm_config, model, weights_iterator, weights_path, is_checkpoint_format
            )
    except BaseException:
        for name, value in source.items():
            setattr(vllm_config.model_config, name, value)
        raise


def _abandon(model: torch.nn.Module) -> None:
    """Undo an update that has neither finished nor failed in our sight."""
    reload = _OPEN.pop(model, None)
    if reload is not None and reload.layers:
        reload.undo()
        logger.warning("An update of weights ended before it was complete: old weights serve.")
