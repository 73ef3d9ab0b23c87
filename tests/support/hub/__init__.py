# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as published configurations describe them, written without this package's code."""
