# SPDX-License-Identifier: Apache-2.0
"""What ``benchmarks.serve`` is made of.

Fetching, converting, quantizing and serving Gemma is what ``examples/gemma`` does; its modules are
imported from there.
"""

import sys

from benchmarks.machine import ROOT

sys.path.append(str(ROOT / "examples" / "gemma"))
