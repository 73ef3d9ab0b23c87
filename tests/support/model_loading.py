# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint into vLLM's model class in this process, without the engine.

An engine takes 20 to 40 seconds to start; this takes one or two after vLLM is imported.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# Layers of 256 channels are faster without a second thread to wait for.
torch.set_num_threads(1)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def init_distributed(
    rank: int = 0, size: int = 1, port: int | None = None, *, pipeline: bool = False
) -> None:
    """One tensor-parallel group, or one ``pipeline``, of ``size`` ranks on loopback (gloo)."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        init_distributed_environment,
        initialize_model_parallel,
        model_parallel_is_initialized,
    )

    if model_parallel_is_initialized():
        return
    # As vLLM's CPU worker does: its library for AVX-512 names shared memory of the ranks by it.
    if size > 1:
        os.environ.setdefault("VLLM_DIST_IDENT", str(port))
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(
            world_size=size,
            rank=rank,
            local_rank=rank,
            distributed_init_method=f"tcp://127.0.0.1:{port or free_port()}",
            backend="gloo",
        )
        initialize_model_parallel(
            tensor_model_parallel_size=1 if pipeline else size,
            pipeline_model_parallel_size=size if pipeline else 1,
        )


@dataclass
class LoadedModel:
    """A model with its vLLM config, ready for ``logits``."""

    model: Any
    config: Any


def engine_args(path: Path, dtype: str = "float32", **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    options = {"max_model_len": 64, "load_format": "safetensors"} | options
    return EngineArgs(model=str(path), dtype=dtype, enforce_eager=True, **options)


@contextmanager
def loaded(path: Path, dtype: str = "float32", **options: Any) -> Iterator[LoadedModel]:
    """Build and load the model at ``path`` as a vLLM worker does."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.model_loader import get_model

    from vllm.compressed_linear.integration.preparation import PROCESS_PLAN

    # Models share rotary embeddings; a reload that was refused leaves them without data.
    rotary_embedding._ROPE_DICT.clear()
    # vLLM collects garbage for every model; what is imported by now need not be looked at again.
    gc.freeze()
    if not torch.accelerator.is_available():
        # vLLM's CPU worker does the same before it loads a model.
        torch.accelerator.empty_cache = lambda: None
    init_distributed()
    config = engine_args(path, dtype, **options).create_engine_config()
    PROCESS_PLAN.reset()
    with set_current_vllm_config(config):
        model = get_model(vllm_config=config)
        # Else the plan is never written, and nothing says what was chosen.
        assert not PROCESS_PLAN.is_open, "vLLM processed no model"
        assert PROCESS_PLAN.prepared == PROCESS_PLAN.expected, (
            "a layer was announced and never prepared"
        )
        yield LoadedModel(model, config)


@torch.inference_mode()
def logits(
    loaded_model: LoadedModel, input_ids: torch.Tensor, *, gathered_on_rank_0: bool = False
) -> Any:
    """fp32 [batch, tokens, vocabulary]: a plain prefill of every prompt, no KV cache kept.

    ``gathered_on_rank_0``: other ranks may get None, as vLLM gathers logits.

    vLLM's attention layers need a scheduler's metadata, so attention itself is computed here, in
    fp32, from the q, k and v that the model's own (quantized) projections give; everything else is
    the model's code.
    """
    from vllm.forward_context import set_forward_context

    out = []
    with set_forward_context(None, loaded_model.config), plain_attention(loaded_model.model):
        for prompt in input_ids:
            positions = torch.arange(len(prompt))
            hidden = loaded_model.model(prompt, positions)
            out.append(loaded_model.model.compute_logits(hidden))
    if gathered_on_rank_0 and any(part is None for part in out):
        return None
    return torch.stack(out).to(torch.float32)


@contextmanager
def plain_attention(model: torch.nn.Module) -> Iterator[None]:
    """Replace ``forward`` of every attention layer by a causal softmax over the prompt."""
    from vllm.model_executor.layers.attention import Attention

    layers = [module for module in model.modules() if isinstance(module, Attention)]
    for layer in layers:
        layer.forward = _attention_of(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _attention_of(layer: Any) -> Any:
    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        tokens = query.shape[0]
        q = query.view(tokens, layer.num_heads, layer.head_size).transpose(0, 1).float()
        k = key.view(tokens, layer.num_kv_heads, layer.head_size).transpose(0, 1).float()
        v = value.view(tokens, layer.num_kv_heads, -1).transpose(0, 1).float()
        groups = layer.num_heads // layer.num_kv_heads
        out = torch.nn.functional.scaled_dot_product_attention(
            q,
            k.repeat_interleave(groups, 0),
            v.repeat_interleave(groups, 0),
            is_causal=True,
            scale=layer.impl.scale,
        )
        return out.transpose(0, 1).reshape(tokens, -1).to(query.dtype)

    return forward
