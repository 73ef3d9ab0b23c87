# SPDX-License-Identifier: Apache-2.0
"""Checkpoint formats, one file each. They depend on neither kernels nor vLLM."""
