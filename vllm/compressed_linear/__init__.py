# SPDX-License-Identifier: Apache-2.0
"""Compressed linear layers: any quantized checkpoint format on any kernel."""
