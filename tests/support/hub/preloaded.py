# SPDX-License-Identifier: Apache-2.0
"""What each process that makes a row of the tables needs, imported once by their fork server."""

import vllm.model_executor.models.registry

import tests.support.hub.table  # noqa: F401
import vllm.compressed_linear.commands.explain.meta_model  # noqa: F401
