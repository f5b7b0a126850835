"""Protects: what is said of a comparison layer by layer agrees with its numbers."""

from __future__ import annotations

import re

import torch

from engine.verification.difference import Meter, StageDifference
from engine.verification.layerwise import Findings
from flexgen_helm.fidelity.layers import Layers

KINDS = ("prefix", "prompt", "decode")


def stage(name: str, num_wrong: int, kind: int = 1, *, may_reroute: bool = True) -> StageDifference:
    """400 prompt rows and 4 decode rows, some of one kind wrong by 0.3 of what the others are off by 0.01."""
    theirs = torch.ones(404, 8)
    ours = theirs + 0.02
    kinds = torch.tensor([1] * 400 + [2] * 4)
    ours[(kinds == kind).nonzero()[:num_wrong, 0]] = 1.6
    meter = Meter(0.03, torch.device("cpu"), KINDS)
    meter.add(ours, theirs, None, kinds)
    return meter.stage(name, may_reroute=may_reroute)


def layers(*stages: StageDifference) -> Layers:
    return Layers(
        model="local/mixture",
        reason="its weights are too large",
        dtype="bfloat16",
        alike=None,
        findings=Findings(
            stages=list(stages),
            scored=[],
            unencoded=None,
            attention="sdpa",
            tolerance=0.03,
            has_compared_weights=True,
            num_passes=1,
        ),
    )


def test_the_verdict_says_how_many_rows_are_excused_and_why() -> None:
    found = layers(stage("layer 0", 0), stage("layer 1", 2), stage("layer 2", 1))
    assert not found.has_drifted
    told = found.verdict()
    assert "\n" not in told
    (most,) = re.findall(r"does most, by (\S+) of its scale \(limit 0.03", told)
    assert float(most) <= 0.03  # what the sentence says of the limit is so
    assert (
        "but for 3 of 808 rows of layer 1, layer 2, by up to 3.0e-01 in layer 1: these are tolerated, because" in told
    )


def test_the_verdict_excuses_nothing_where_nothing_is_beyond() -> None:
    told = layers(stage("layer 0", 0)).verdict()
    assert told == (
        "no layer of local/mixture differs from stock sdpa attention by more than rounding: layer 0 does most, by "
        "1.0e-02 of its scale (limit 0.03 in bfloat16)"
    )


def test_drift_names_the_kinds_of_rows() -> None:
    found = layers(stage("layer 0", 2), stage("layer 1", 4, kind=2))
    assert found.has_drifted
    assert found.drift().startswith(
        "drift in layer 1 of local/mixture: 4 of 4 decode rows differ from stock sdpa attention, by up to 0.3 of"
    )
