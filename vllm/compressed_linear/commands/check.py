# SPDX-License-Identifier: Apache-2.0
"""Say what is wrong with a checkpoint, from its configuration and headers alone.

The findings are those of ``explain``, of which this shows nothing else.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from vllm.compressed_linear.checkpoint.completeness import Severity
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.commands.explain.checkpoint import ExplainError, PickledError
from vllm.compressed_linear.commands.explain.explain import explain
from vllm.compressed_linear.commands.explain.explanation import Explanation
from vllm.compressed_linear.commands.explain.findings import About, Finding
from vllm.compressed_linear.commands.explain.layers import TensorParallelError
from vllm.compressed_linear.commands.text import alike, size
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.machine.platform import Platform

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: ""}


@dataclass
class Report:
    """What was looked at in the checkpoint ``model`` and what was found, errors first.

    ``examined``: whether its weights are in files whose headers can be read.
    """

    model: str
    platform: str
    looked_at: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    examined: bool = True

    def of(self, severity: Severity) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity is severity]

    @property
    def loads(self) -> bool:
        """Whether nothing was found with which loading must fail."""
        return not self.of(Severity.ERROR)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if not self.examined:
            return "The weights were not examined, so whether they load is not known."
        about = {finding.about for finding in self.of(Severity.ERROR)}
        if About.CHECKPOINT in about:
            return "The checkpoint is damaged or contradicts itself; loading it fails."
        if about:
            return (
                "Nothing is wrong with the files as far as headers and configuration tell, but "
                f"loading them fails on {self.platform}."
            )
        if self.of(Severity.WARNING):
            return "The checkpoint should load; mind the warnings."
        return "Nothing is wrong with it as far as headers and configuration tell."

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "model": self.model,
            "platform": self.platform,
            "looked_at": self.looked_at,
            "examined": self.examined,
            "loads": self.loads if self.examined else None,
            "verdict": self.verdict,
            "findings": [asdict(finding) for finding in self.findings],
        }


def check(model: str, *, platform: Platform, tp_size: int = 1, dtype: str = "auto") -> Report:
    """Examine a local checkpoint. Raises nothing because of it."""
    report = Report(model, platform.name)
    try:
        found = explain(model, platform=platform, tp_size=tp_size, dtype=dtype)
    except TensorParallelError as error:
        report.findings = [Finding(Severity.ERROR, About.SERVING, str(error))]
    except PickledError as error:
        report.findings = [Finding(Severity.NOTE, About.CHECKPOINT, str(error))]
        report.examined = False
    except (ExplainError, ConfigError, CheckpointError) as error:
        report.findings = [Finding(Severity.ERROR, About.CHECKPOINT, str(error))]
    else:
        report.looked_at = _looked_at(found)
        report.findings = found.findings
    if Path(model).is_dir():
        report.looked_at.insert(0, _files(Path(model)))
    return report


def _files(directory: Path) -> str:
    kinds = Counter(file.suffix for file in directory.iterdir() if file.is_file())
    return ", ".join(f"{count} {kind or 'other'} files" for kind, count in sorted(kinds.items()))


def _looked_at(found: Explanation) -> list[str]:
    tensors = f"the headers of {found.tensors} tensors, {size(found.file_bytes)} in all"
    model = f"the configuration ({found.architecture}, quantization {found.quant_method})"
    if not found.model_class:
        return [tensors, model]
    ranks = f", split among {found.tp_size} ranks" if found.tp_size > 1 else ""
    layers = len(found.layers) + len(found.left)
    built = (
        f"vLLM's {found.model_class}, built without weights: {layers} linear layers, tables and "
        f"mixtures of experts{ranks}"
    )
    return [tensors, model, built]


def print_report(report: Report, console: Console) -> None:
    """Write what was looked at, the findings and the verdict to ``console``."""
    console.print(Text(report.model, style="bold"))
    for what in report.looked_at:
        console.print(Text(f"Read: {what}"))
    for severity in Severity:
        for message in alike([finding.message for finding in report.of(severity)]):
            console.print(Text(f"{severity.capitalize()}: {message}", style=_STYLES[severity]))
    console.print(Text(report.verdict, style="bold"))
