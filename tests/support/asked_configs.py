# SPDX-License-Identifier: Apache-2.0
"""Places in vLLM's sources that ask a quantization config for its class, its name or a field, from
their syntax trees: there the class of this package is none of those that are asked for."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

OWN = (
    "model_executor/layers/quantization/",
    "model_executor/kernels/",
    "model_executor/layers/fused_moe/",
)
"""Folders of code that only layers reach that are left to vLLM, with a config of its own."""
LONGEST = 80
"""Characters of an expression that are told."""
_CONFIG = re.compile(r"(^|[._])quant_config$")


def asked_configs(package: Path) -> Iterator[tuple[str, str]]:
    """(file, expression) of each such place in the directory of vLLM's package."""
    for file in sorted(package.rglob("*.py")):
        where = str(file.relative_to(package))
        if where.startswith(OWN) or where.startswith("compressed_linear/"):
            continue
        text = file.read_text()
        if "quant" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if _asks(node):
                yield where, ast.unparse(node)[:LONGEST]


def _asks(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
        asked = node.func.id in ("isinstance", "getattr", "hasattr")
        return asked and _CONFIG.search(ast.unparse(node.args[0])) is not None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return (
            node.func.attr == "get_name"
            and _CONFIG.search(ast.unparse(node.func.value)) is not None
        )
    if isinstance(node, ast.Compare):
        return any(
            isinstance(side, ast.Attribute) and side.attr == "quantization" and not _is_none(node)
            for side in (node.left, *node.comparators)
        )
    return False


def _is_none(node: ast.Compare) -> bool:
    return any(isinstance(side, ast.Constant) and side.value is None for side in node.comparators)


KNOWN: dict[str, dict[str, list[str]]] = {
    "the file decides what is quantized, so nothing depends on the answer": {
        "model_executor/models/bailing_moe_v3_vl.py": ["isinstance(quant_config, Fp8Config)"],
        "model_executor/models/cohere2_vision.py": ["isinstance(quant_config, AutoAWQConfig)"],
        "model_executor/models/internvl.py": ["isinstance(quant_config, AutoAWQConfig)"],
        "model_executor/models/kimi_k25.py": [
            "isinstance(quant_config, compressed_tensors.CompressedTensorsConfig)"
        ],
        "model_executor/models/nemotron_vl.py": ["isinstance(quant_config, AutoAWQConfig)"],
        "model_executor/models/openpangu_vl.py": ["isinstance(quant_config, AutoGPTQConfig)"],
        "model_executor/models/qianfan_ocr.py": ["isinstance(quant_config, Fp8Config)"],
        "model_executor/models/qwen3_5_mtp.py": ["quant_config.get_name()"],
        "model_executor/models/qwen3_next_mtp.py": ["quant_config.get_name()"],
        "model_executor/models/skyworkr1v.py": ["isinstance(quant_config, AutoAWQConfig)"],
        "models/kimi_k3/amd/model.py": [
            "isinstance(quant_config, compressed_tensors.CompressedTensorsConfig)"
        ],
        "models/kimi_k3/nvidia/model.py": [
            "isinstance(quant_config, compressed_tensors.CompressedTensorsConfig)"
        ],
        "models/qwen4_exp/amd/model.py": ["quant_config.get_name()"],
        "models/qwen4_exp/nvidia/model.py": ["quant_config.get_name()"],
    },
    "the default that holds for other packages' configs too": {
        "model_executor/model_loader/weight_cache/protocol.py": [
            "hasattr(quant_config, 'to_dict')"
        ],
        "model_executor/models/bailing_moe_v3.py": ["isinstance(hf_quant_config, dict)"],
        "model_executor/models/config.py": ["isinstance(quant_config, dict)"],
    },
    "vLLM's quantization at load, of models without ours": {
        "model_executor/model_loader/base_loader.py": [
            "getattr(quant_config, 'online_quantization_config', None)",
            "isinstance(quant_config, OnlineQuantizationConfig)",
        ],
        "model_executor/model_loader/utils.py": [
            "isinstance(quant_config, OnlineQuantizationConfig)"
        ],
        "model_executor/model_loader/weight_utils.py": [
            "model_config.quantization in _ONLINE_SHORTHANDS"
        ],
        "model_executor/models/qianfan_ocr.py": [
            "isinstance(quant_config, OnlineQuantizationConfig)"
        ],
    },
    "of methods that this package does not read, or that ours are found before": {
        "config/model.py": [
            "self.quantization != quant_method",
            "self.quantization == 'humming'",
            "self.quantization in me_quant.DEPRECATED_QUANTIZATION_METHODS",
            "self.quantization not in supported_quantization",
        ],
        "model_executor/model_loader/default_loader.py": [
            "hasattr(quant_config, 'is_checkpoint_torchao_serialized')",
            "model_config.quantization == 'torchao'",
        ],
        "model_executor/model_loader/utils.py": ["model_config.quantization == 'torchao'"],
        "model_executor/model_loader/weight_utils.py": [
            "model_config.quantization == 'fp8'",
            "model_config.quantization == 'modelopt_mixed'",
            "model_config.quantization in ('modelopt', 'modelopt_mixed')",
        ],
        "model_executor/models/exaone_moe.py": ["quant_config.get_name()"],
        "model_executor/models/llama4_eagle.py": ["isinstance(quant_config, TorchAOConfig)"],
        "model_executor/models/transformers/base.py": ["self.quant_config.get_name()"],
    },
    "of vLLM's own kernels, or padding for them, on GPUs or ROCm; ours need neither": {
        "model_executor/layers/linear.py": ["getattr(quant_config, 'weight_block_size', None)"],
        "model_executor/layers/mamba/gdn/qwen_gdn_linear_attn.py": [
            "isinstance(quant_config, (AutoAWQConfig, AutoGPTQConfig, INCConfig))"
        ],
        "models/deepseek_v4/amd/model.py": [
            "getattr(quant_config, 'ignored_layers', None)",
            "getattr(quant_config, 'is_checkpoint_fp8_serialized', False)",
            "getattr(quant_config, 'is_scale_e8m0', False)",
            "getattr(quant_config, 'moe_quant_algo', '')",
            "getattr(quant_config, 'weight_block_size', None)",
            "quant_config.get_name()",
        ],
        "models/deepseek_v4/nvidia/dspark.py": [
            "getattr(self.quant_config, 'weight_block_size', None)"
        ],
        "models/deepseek_v4/nvidia/model.py": [
            "getattr(quant_config, 'weight_block_size', None)",
            "getattr(self.quant_config, 'weight_block_size', None)",
        ],
        "models/deepseek_v4/nvidia/mtp.py": [
            "getattr(self.quant_config, 'weight_block_size', None)"
        ],
        "models/deepseek_v41/amd/dspark.py": [
            "getattr(self.quant_config, 'weight_block_size', None)"
        ],
        "models/deepseek_v41/amd/model.py": [
            "getattr(quant_config, 'weight_block_size', None)",
            "getattr(self.quant_config, 'weight_block_size', None)",
            "getattr(vllm_config.quant_config, 'weight_block_size', None)",
        ],
        "models/deepseek_v41/nvidia/dspark.py": [
            "getattr(self.quant_config, 'weight_block_size', None)"
        ],
        "models/deepseek_v41/nvidia/model.py": [
            "getattr(quant_config, 'weight_block_size', None)",
            "getattr(self.quant_config, 'weight_block_size', None)",
            "getattr(vllm_config.quant_config, 'weight_block_size', None)",
        ],
        "models/dots3_note/nvidia/model.py": ["getattr(quant_config, 'weight_block_size', None)"],
        "models/dots3_note/nvidia/mtp.py": [
            "getattr(self.quant_config, 'weight_block_size', None)"
        ],
        "models/flint/model.py": ["isinstance(quant_config, ModelOptNvFp4Config)"],
        "models/kimi_k3/nvidia/kda.py": [
            "isinstance(self.quant_config, ModelOptMixedPrecisionConfig)"
        ],
    },
    "what sees may be built without quantization: ``unasked`` asks for it": {
        "model_executor/models/diffusion_gemma.py": ["quant_config.get_name()"],
        "model_executor/models/embedding_gemma2.py": ["quant_config.get_name()"],
        "model_executor/models/gemma4_mm.py": ["quant_config.get_name()"],
        "model_executor/models/siglip.py": ["quant_config.get_name()"],
    },
    "``CompressedLinearConfig`` has this field": {
        "model_executor/layers/attention/attention.py": [
            "getattr(quant_config, 'kv_cache_scheme', None)"
        ],
        "models/qwen4_exp/amd/qsa.py": ["getattr(quant_config, 'kv_cache_scheme', None)"],
        "models/qwen4_exp/nvidia/qsa.py": ["getattr(quant_config, 'kv_cache_scheme', None)"],
    },
    "of experts, which have vLLM's own config": {
        "models/inkling/amd/moe.py": ["getattr(quant_config, 'quant_config', {})"],
        "models/muse_spark/amd/muse_moe_runner.py": [
            "isinstance(quant_config, (MuseSparkUnquantizedMoEQuantConfig, MuseSparkQuarkFp8M",
            "isinstance(quant_config, MuseSparkQuarkOCPMXMoEQuantConfig)",
            "isinstance(quant_config, QuarkConfig)",
            "quant_config.get_name()",
        ],
        "models/muse_spark/nvidia/model.py": ["isinstance(quant_config, ModelOptNvFp4Config)"],
        "models/muse_spark/nvidia/muse_moe_runner.py": [
            "isinstance(quant_config, ModelOptNvFp4Config)",
            "isinstance(quant_config, MuseSparkNvFp4MoEQuantConfig)",
        ],
        "models/step5/nvidia/mega_moe.py": [
            "isinstance(quant_config, Fp8Config)",
            "isinstance(quant_config, ModelOptNvFp4Config)",
        ],
    },
    "of a drafter's names, which ``drafter`` knows": {
        "model_executor/models/qwen3_dflash.py": ["getattr(quant_config, 'exclude_modules', None)"],
        "model_executor/models/utils.py": [
            "getattr(quant_config, 'exclude_modules', None)",
            "isinstance(quant_config, ModelOptQuantConfigBase)",
        ],
        "models/qwen4_exp/amd/mtp.py": [
            "getattr(draft_quant_config, 'exclude_modules', None)",
            "getattr(draft_quant_config, 'ignored_layers', None)",
            "getattr(draft_quant_config, 'quantized_layers', None)",
        ],
        "models/qwen4_exp/nvidia/mtp.py": [
            "getattr(draft_quant_config, 'exclude_modules', None)",
            "getattr(draft_quant_config, 'ignored_layers', None)",
            "getattr(draft_quant_config, 'quantized_layers', None)",
        ],
    },
    "another name of a layer for vLLM's own reading of entries; ours gets that of the files": {
        "model_executor/models/glm4_1v.py": [
            "isinstance(quant_config, compressed_tensors.CompressedTensorsConfig)"
        ],
    },
    "``Fp8.unsupported`` leaves experts of another kind to vLLM; ours may begin inside a block": {
        "model_executor/models/bailing_moe_v3.py": [
            "getattr(quant_config, 'weight_block_size', None)",
            "isinstance(quant_config, Fp8Config)",
        ],
    },
    "not mended: scales of a drafter's experts keep their names, so nothing fills them: an error": {
        "models/hy_v4/nvidia/mtp.py": [
            "getattr(quant_config, 'is_scale_e8m0', False)",
            "getattr(quant_config, attr, None)",
            "isinstance(quant_config, Fp8Config)",
        ],
    },
    "``compat.cut_by_model`` leaves the fused weight to vLLM": {
        "model_executor/models/mimo_v2.py": ["getattr(quant_config, 'weight_block_size', None)"],
    },
    "vLLM refuses any config but its own, by name": {
        "models/muse_spark/amd/model.py": [
            "isinstance(vllm_config.quant_config, self.supported_quantization_configs)",
            "vllm_config.quant_config.get_name()",
        ],
        "models/muse_spark/nvidia/model.py": [
            "isinstance(vllm_config.quant_config, self.supported_quantization_configs)",
            "vllm_config.quant_config.get_name()",
        ],
    },
    "not mended: tables without quantization on GPUs, unless the model's config names a dtype": {
        "models/qwen4_exp/common/ngram_embedding.py": [
            "isinstance(quant_config, CompressedTensorsConfig)",
            "isinstance(quant_config, Fp8Config)",
            "isinstance(quant_config, INCConfig)",
            "isinstance(quant_config, ModelOptMixedPrecisionConfig)",
            "isinstance(quant_config, ModelOptQuantConfigBase)",
            "isinstance(quant_config, QuarkConfig)",
        ],
    },
    "entries under names of Mistral's files: those that match nothing are a warning": {
        "model_executor/models/voxtral.py": [
            "hasattr(quant_config, 'config_groups')",
            "hasattr(quant_config, 'ignore')",
        ],
    },
    "compiled operators of vLLM's own, by which only speed differs": {
        "config/model.py": [
            "self.quantization == 'compressed-tensors'",
            "self.quantization == 'modelopt_mixed'",
            "self.quantization in ('modelopt_fp4',)",
        ],
        "config/vllm.py": [
            "hasattr(self.quant_config, 'has_blocked_weights')",
            "hasattr(self.quant_config, 'use_deep_gemm')",
            "hasattr(self.quant_config, 'weight_block_size')",
        ],
    },
}
"""Why it does not matter, or what was done → file of vLLM 0.32 or 0.33 → what is asked there."""


def unknown_places(package: Path) -> list[tuple[str, str]]:
    """Those in the directory of vLLM's package that are not in ``KNOWN``."""
    known = {(file, asked) for of in KNOWN.values() for file, all_ in of.items() for asked in all_}
    return sorted(set(asked_configs(package)) - known)
