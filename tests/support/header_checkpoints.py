# SPDX-License-Identifier: Apache-2.0
"""Complete checkpoints of full size as headers alone: what the transformers library would save.

A class of the library is built on the meta device from its default configuration, and the names of
its tensors are converted back to those of published files, as when it saves them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from tests.support.architectures import wrapped_classes_uncompiled
from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.spec.elements import dtype_name


@cache
def _model_types() -> dict[str, str]:
    """Architecture → type of model, for those of vLLM that the transformers library has too."""
    import transformers.models.auto.modeling_auto as mappings
    from vllm.model_executor.models.registry import ModelRegistry

    found: dict[str, str] = {}
    for name, mapping in vars(mappings).items():
        if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES"):
            for model_type, classes in mapping.items():
                for architecture in [classes] if isinstance(classes, str) else classes:
                    found.setdefault(architecture, model_type)
    return {
        name: found[name] for name in sorted(set(ModelRegistry.get_supported_archs()) & set(found))
    }


def default_config(architecture: str) -> dict[str, Any]:
    """The configuration of a class of the transformers library that vLLM has too.

    Raises ``LookupError`` if one of them does not have it, and whatever the library raises if it
    has no defaults.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    if architecture not in _model_types():
        raise LookupError(f"the transformers library and vLLM do not both have {architecture}")
    # The language model of a larger one shares its type and has a configuration of its own.
    cls = getattr(getattr(transformers, architecture, None), "config_class", None)
    config = (cls or CONFIG_MAPPING[_model_types()[architecture]])().to_dict()
    return config | {"architectures": [architecture]}


def default_configs() -> dict[str, dict[str, Any]]:
    """Architecture → configuration, for all with which that succeeds."""
    configs = {}
    for architecture in _model_types():
        try:
            configs[architecture] = default_config(architecture)
        except Exception:  # no defaults, or a library that is not installed
            continue
    return configs


def saved_headers(architecture: str, config: dict[str, Any]) -> Headers:
    """Headers of what ``save_pretrained`` writes for a configuration of ``default_configs``.

    Raises whatever the library raises if it cannot build the class.
    """
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    cls = getattr(transformers, architecture)
    described = cls.config_class.from_dict(config)
    with wrapped_classes_uncompiled(described), torch.device("meta"):
        model = cls(described)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    tensors = {name: t for name, t in model.state_dict().items() if name not in tied}
    saved = revert_weight_conversion(model, tensors)
    return Headers(
        {
            name: TensorHeader(dtype_name(tensor.dtype), tuple(tensor.shape), 0, "model")
            for name, tensor in saved.items()
        }
    )
