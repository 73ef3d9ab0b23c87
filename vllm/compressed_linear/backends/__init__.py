# SPDX-License-Identifier: Apache-2.0
"""The backends that come with this package. They know descriptors and layouts, never formats.

Entry points in pyproject.toml name them, as those of other packages do; see ``registry``.
"""
