# SPDX-License-Identifier: Apache-2.0
"""Checkpoint formats, one file each. They know configurations and layouts, no kernels, no vLLM."""
