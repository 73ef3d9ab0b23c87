# SPDX-License-Identifier: Apache-2.0
"""A contract for import-linter: the only modules that may import a package of others."""

from __future__ import annotations

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class OnlyImporters(Contract):
    """Modules of ``package`` outside this project may be imported by ``importers`` and what is
    below them only.

    import-linter's own ``forbidden`` contract takes whole external packages, while our package is
    a part of the namespace of the one that is meant here.
    """

    package = fields.StringField()
    importers = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        root = self.session_options["root_packages"][0]
        allowed = tuple(self.importers)
        external = sorted(
            module
            for module in graph.modules
            if graph.is_module_squashed(module) and f"{module}.".startswith(f"{self.package}.")
        )
        broken = sorted(
            f"{importer} -> {module}"
            for module in external
            for importer in graph.find_modules_that_directly_import(module)
            if not any(f"{importer}.".startswith(f"{name}.") for name in allowed)
        )
        return ContractCheck(kept=not broken, metadata={"broken": broken, "root": root})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for line in check.metadata["broken"]:
            output.print_error(f"{line}: only {', '.join(self.importers)} may")
