"""`write_report`: a suite's report, from Python."""

from flexgen_helm.commands.report import write_report

__all__ = ["write_report"]
