"""Chooses the demonstrations and their order."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from engine.errors import ConfigError, did_you_mean
from flexgen_helm.data_wrangling.datasets import Dataset
from flexgen_helm.data_wrangling.demonstrations import manual_demonstrations
from flexgen_helm.data_wrangling.rows import Example

SELECTIONS = ("manual", "random", "cluster")
DEFAULT_K = 10
"""Demonstrations where they are taken from the train split, as in the paper."""


def num_demonstrations(dataset: Dataset, selection: str, k: int | None, seed: int) -> int:
    """The number of demonstrations of a prompt; `ConfigError` for an invalid argument."""
    if selection not in SELECTIONS:
        raise ConfigError(f"data_wrangling: no selection {selection!r}{did_you_mean(selection, SELECTIONS)}")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"data_wrangling: seed={seed} is not a whole number from 0 to 2**32 - 1")
    most = len(manual_demonstrations(dataset)) if selection == "manual" else None
    if k is None:
        return DEFAULT_K if most is None else most
    if not isinstance(k, int) or k < 0:
        raise ConfigError(f"data_wrangling: k={k} is not a number of demonstrations; write 0 or more")
    if most is not None and k > most:
        raise ConfigError(f"data_wrangling: {dataset.name} has {most} written demonstrations, not k={k}; select others")
    return k


def rotated(examples: Sequence[Example]) -> list[Example]:
    """The examples as they are, then beginning with the second, and so on: HELM's further trials each take the next."""
    return [examples[(first + i) % len(examples)] for first in range(len(examples)) for i in range(len(examples))]


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """The examples in an order that `seed` decides."""
    return random.Random(seed).sample(examples, len(examples))


def by_cluster(examples: Sequence[Example], k: int, seed: int, *, by_answer: bool) -> list[Example]:
    """All distinct examples, ordered so that the first `k` represent `k` clusters of similar questions.

    Questions are TF-IDF vectors of their character trigrams, in k-means clusters. The question nearest to each
    cluster's centre comes first, then the second nearest of each, and so on. With `by_answer`, each answer has its
    share of the clusters and answers alternate, the most frequent first: most pairs do not match, and a prompt that
    shows only one answer teaches nothing. The same arguments give the same order.
    """
    distinct = list(dict.fromkeys(examples))
    groups: dict[str, list[Example]] = {}
    for example in distinct:
        groups.setdefault(example.answer if by_answer else "", []).append(example)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    ranked = [
        _ranked(group, num_clusters=len(range(first, k, len(ordered))), seed=seed)
        for first, (_, group) in enumerate(ordered)
    ]
    return [example for turn in itertools.zip_longest(*ranked) for example in turn if example is not None]


def _ranked(examples: Sequence[Example], num_clusters: int, seed: int) -> list[Example]:
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]
    from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]

    if not 0 < num_clusters < len(examples):
        return list(examples)
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 3)).fit_transform(e.question for e in examples)
    kmeans = KMeans(num_clusters, random_state=seed, n_init=4)
    distances = kmeans.fit_transform(vectors)
    members: dict[int, list[int]] = {}  # in the order of their first examples
    for index, cluster in enumerate(kmeans.labels_):
        members.setdefault(int(cluster), []).append(index)
    for cluster, indices in members.items():
        indices.sort(key=lambda index: (float(distances[index, cluster]), index))
    turns = itertools.zip_longest(*members.values())
    return [examples[index] for turn in turns for index in turn if index is not None]
