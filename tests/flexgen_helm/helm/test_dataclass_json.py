"""Protects: our JSON of HELM's dataclasses is HELM's, byte for byte."""

from __future__ import annotations

import json
from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from helm.benchmark.metrics.metric_name import MetricName
from helm.benchmark.metrics.statistic import Stat
from helm.common.general import asdict_without_nones
from hypothesis import given
from hypothesis import strategies as st

from flexgen_helm.helm.dataclass_json import dumps


@dataclass
class Thing:
    value: Any
    nothing: Any = None
    more: list[Any] = field(default_factory=list)


Pair = namedtuple("Pair", "left right")
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.integers() | st.booleans() | st.none() | st.floats(), inner, max_size=3)
        | st.builds(Thing, inner, st.none() | inner, st.lists(inner, max_size=2))
        | st.tuples(inner, inner)
    ),
    max_leaves=12,
)


def helms(content: Any) -> str:
    return json.dumps(asdict_without_nones(content), indent=2)


@given(VALUES)
def test_any_value(value: Any) -> None:
    thing = Thing(value)
    assert dumps(thing) == helms(thing)
    assert dumps([thing, thing]) == json.dumps([asdict_without_nones(thing)] * 2, indent=2)


@pytest.mark.parametrize(
    "value",
    [np.float64(0.1), 1e-7, float("nan"), -float("inf"), Pair(1, None), "é\u2028\ud800", True, -0.0, (),
     {1: {2.5: None}}, Thing(None, None), 10**30],
)  # fmt: skip
def test_values_that_are_special(value: Any) -> None:
    assert dumps(Thing(value)) == helms(Thing(value))


def test_what_helm_cannot_write_is_refused_too() -> None:
    for value in (np.int64(1), {1, 2}, object()):
        with pytest.raises(TypeError, match="not JSON serializable"):
            dumps(Thing(value))


def test_stats() -> None:
    stat = Stat(MetricName("exact_match", split="test")).add(1).add(0.5)
    assert dumps([stat]) == json.dumps([asdict_without_nones(stat)], indent=2)
    assert dumps([]) == "[]"
