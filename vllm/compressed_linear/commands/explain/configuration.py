# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint's quantization configuration is, and what vLLM needs to be told to use it."""

from __future__ import annotations

from vllm.compressed_linear.checkpoint.completeness import Severity
from vllm.compressed_linear.commands.explain.checkpoint import MODELOPT_FILE, Checkpoint
from vllm.compressed_linear.commands.explain.explanation import Explanation
from vllm.compressed_linear.commands.explain.findings import About
from vllm.compressed_linear.formats.base import Format, quant_method_of
from vllm.compressed_linear.integration.config import NAME
from vllm.compressed_linear.machine.platform import Platform

FLAG = f"--quantization {NAME}"


def say_of_configuration(
    found: Explanation, checkpoint: Checkpoint, read_by: Format | None, platform: Platform
) -> None:
    """Add what is to be said of a configuration that is in a file of its own or missing, and of the
    flag with which vLLM uses this package. ``read_by``: None if vLLM reads it with its own code."""
    separate = checkpoint.separate_file
    if separate == MODELOPT_FILE:
        found.say(
            Severity.NOTE,
            About.CHECKPOINT,
            f"config.json has no quantization_config; vLLM reads {separate} instead",
        )
    if read_by is None:
        return
    if quant_method_of(checkpoint.quantization):
        if platform.device != "cpu":
            found.say(
                Severity.NOTE,
                About.SERVING,
                f"on a GPU vLLM uses this package only with {FLAG}; without it, its own code "
                "loads this checkpoint",
            )
        return
    if method := quant_method_of(read_by.config):
        found.quant_method = method
        found.say(
            Severity.WARNING,
            About.CHECKPOINT,
            f"config.json has no quantization_config, and vLLM by itself does not read {separate} "
            f"({method}): it takes the model for an unquantized one and fails at the first packed "
            f"tensor. Pass {FLAG}, as is shown here, or copy {separate} into config.json as its "
            "quantization_config",
        )
        return
    if codes := checkpoint.modules_with_codes():
        module = codes[0]
        held = ", ".join(sorted(checkpoint.headers.modules[module]))
        found.say(
            Severity.ERROR,
            About.CHECKPOINT,
            f"the files hold quantized weights ({module} has {held}; {len(codes)} such modules), "
            "but neither config.json nor a file next to it says how to read them: vLLM takes the "
            "model for an unquantized one and fails. Download the checkpoint again with all of its "
            "json files, or put its quantization_config into config.json",
        )
        return
    found.say(
        Severity.NOTE,
        About.SERVING,
        f"the model is not quantized: vLLM uses this package only with {FLAG}",
    )
