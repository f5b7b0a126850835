"""The scenario: finds or fetches the data, and gives HELM demonstrations and test instances."""

from __future__ import annotations

from pathlib import Path

from helm.benchmark.scenarios.scenario import (
    CORRECT_TAG,
    TEST_SPLIT,
    TRAIN_SPLIT,
    Input,
    Instance,
    Output,
    Reference,
    Scenario,
    ScenarioMetadata,
)
from helm.common.general import ensure_file_downloaded

from engine.errors import ConfigError
from flexgen_helm.data_wrangling.datasets import find_dataset
from flexgen_helm.data_wrangling.demonstrations import manual_demonstrations
from flexgen_helm.data_wrangling.rows import Example, read_examples
from flexgen_helm.data_wrangling.selection import by_cluster, rotated, shuffled

ARCHIVE = "https://fm-data-tasks.s3.us-west-1.amazonaws.com/datasets.tar.gz"
"""The authors' data sets: github.com/HazyResearch/fm_data_tasks, README."""


class DataWranglingScenario(Scenario):
    """Entity matching, data imputation, error detection and schema matching of Narayan et al. 2022.

    Train instances are the demonstrations: those written for the data set (`manual`), or the train split, in an order
    that `seed` decides (`random`: HELM's adapter samples from it, each answer in turn), or with representatives of `k`
    clusters first (`cluster`: HELM's adapter takes the first k as they come). Test instances are the test split, all
    of it, in its order.

    HELM's own `entity_matching` and `entity_data_imputation` are not this: they take other copies of the data, draw
    splits or samples of their own, show every column (for restaurants, the number that gives matches away), and have
    neither written nor clustered demonstrations.
    """

    name = "data_wrangling"
    description = "Entity matching, data imputation, error detection and schema matching on tables"

    def __init__(self, dataset: str, selection: str, k: int, seed: int = 0, data: str | None = None) -> None:
        super().__init__()
        self.tags = ["data_wrangling", "structured_reasoning"]
        self.dataset = find_dataset(dataset)
        self.selection, self.k, self.seed, self.data = selection, k, seed, data

    def get_instances(self, output_path: str) -> list[Instance]:
        """Demonstrations, then test instances; `ConfigError` for data that is not there or not as it should be."""
        root = self._root(Path(output_path))
        test = read_examples(self.dataset, root, "test")
        demonstrations = [_instance(example, TRAIN_SPLIT) for example in self._demonstrations(root)]
        return demonstrations + [_instance(example, TEST_SPLIT) for example in test]

    def get_metadata(self) -> ScenarioMetadata:
        """What HELM's pages say of the scenario."""
        return ScenarioMetadata(
            name=self.name,
            display_name="Data wrangling",
            description=f"{self.description} [(Narayan et al., 2022)](https://arxiv.org/abs/2205.09911).",
            main_metric="yes_f1" if self.dataset.task.is_binary else "quasi_exact_match",
            main_split="test",
        )

    def _demonstrations(self, root: Path) -> list[Example]:
        if self.k == 0:
            return []
        if self.selection == "manual":
            return rotated(manual_demonstrations(self.dataset)[: self.k])
        train = read_examples(self.dataset, root, "train")
        if self.selection == "random":
            return shuffled(train, self.seed)
        return by_cluster(train, self.k, self.seed, by_answer=self.dataset.task.is_binary)

    def _root(self, output_path: Path) -> Path:
        folder = Path(self.data).expanduser() if self.data is not None else output_path / "data"
        if self.data is None:
            try:
                ensure_file_downloaded(source_url=ARCHIVE, target_path=str(folder), unpack=True)
            except OSError as error:
                raise ConfigError(
                    f"{ARCHIVE} cannot be fetched ({' '.join(str(error).split())}); "
                    f"unpack it as {folder}, or name its folder with data=DIR"
                ) from None
        elif not folder.is_dir():
            raise ConfigError(
                f"data={self.data}: no such directory; name the folder that holds {self.dataset.task.folder}"
            )
        return folder / "datasets" if (folder / "datasets").is_dir() else folder


def _instance(example: Example, split: str) -> Instance:
    return Instance(
        input=Input(text=example.question),
        references=[Reference(Output(text=example.answer), tags=[CORRECT_TAG])],
        split=split,
    )
