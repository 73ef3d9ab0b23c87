# SPDX-License-Identifier: Apache-2.0
"""Every private name of vLLM's kernel classes, by family: which there are, what they say, how they
are built. ``tables`` lists them, ``operators`` what they call, ``process`` where they run."""
