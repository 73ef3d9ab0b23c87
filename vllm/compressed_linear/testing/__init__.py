# SPDX-License-Identifier: Apache-2.0
"""Conformance kit: test a backend against exact results and its numerical contract.

Usage::

    from vllm.compressed_linear.testing import check_backend

    report = check_backend(MyBackend)
    print(report)               # declined cases with reasons, passed cases, error / bound
    report.raise_if_failed()

or one pytest test per case::

    @pytest.mark.parametrize("case", conformance_cases(), ids=str)
    def test_my_backend(case):
        check_case(MyBackend, case).raise_if_failed()

or from a shell: ``python -m vllm.compressed_linear.testing my_package:MyBackend``.
"""

from vllm.compressed_linear.testing.check import check_backend, check_case
from vllm.compressed_linear.testing.oracle import Case, Problem
from vllm.compressed_linear.testing.report import CaseResult, ConformanceError, Failure, Report
from vllm.compressed_linear.testing.suite import conformance_cases

__all__ = [
    "Case",
    "CaseResult",
    "ConformanceError",
    "Failure",
    "Problem",
    "Report",
    "check_backend",
    "check_case",
    "conformance_cases",
]
