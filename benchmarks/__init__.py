# SPDX-License-Identifier: Apache-2.0
"""Measurements: one linear layer (``linear``), whole servers (``serve``), and their inputs."""
