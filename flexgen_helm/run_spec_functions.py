"""Run entries of ours, beside HELM's: registered with HELM by the plugin, so that `helm-run` has them too."""

from __future__ import annotations

import dataclasses

from helm.benchmark.run_spec import RunSpec, run_spec_function


@run_spec_function("summarization_xsum_rouge")
def get_xsum_rouge_spec() -> RunSpec:
    """HELM's summarization_xsum_sampled with no metrics but the generic ones, ROUGE-1, -2 and -L among them.

    Same instances, prompts and sampling. HELM's own summarization metrics, of which ROUGE is a part and computed by
    the same function, need packages that do not install everywhere (`crfm-helm[summarization]`). An entry's
    `temperature=` is no argument of this: HELM sets it on any run spec.
    """
    from helm.benchmark.metrics.common_metric_specs import get_basic_metric_specs
    from helm.benchmark.run_specs.classic_run_specs import get_xsum_sampled_summarization_spec

    return dataclasses.replace(
        get_xsum_sampled_summarization_spec(),
        name="summarization_xsum_rouge",
        metric_specs=get_basic_metric_specs(["rouge_1", "rouge_2", "rouge_l"]),
    )
