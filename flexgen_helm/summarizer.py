"""The name under which `helm-summarize --summarizer-class-name` knows our summarizer of judged suites."""

from flexgen_helm.judging.judged_tables import JudgedSummarizer

__all__ = ["JudgedSummarizer"]
