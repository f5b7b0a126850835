"""Protects: the data_wrangling entries ask what the files hold, with the demonstrations chosen, and score every row."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wrangling_data
from fake_engine import FakeEngine
from helm.benchmark.adaptation.adapters.generation_adapter import GenerationAdapter
from sklearn.metrics import precision_recall_fscore_support
from stats import read, stats_of, texts_of
from tiny_models import ours, write_entries
from wrangling_data import NUM_TEST, NUM_TRAIN

import flexgen_helm.plugin  # noqa: F401 - registers our run entries
from engine import Completion, Job
from engine.errors import ConfigError
from flexgen_helm.data_wrangling.datasets import DATASETS, NO, TASKS, YES
from flexgen_helm.data_wrangling.demonstrations import manual_demonstrations
from flexgen_helm.data_wrangling.metrics import YesNoMetric
from flexgen_helm.data_wrangling.rows import Example, read_examples
from flexgen_helm.data_wrangling.run_specs import get_data_wrangling_spec
from flexgen_helm.data_wrangling.scenario import ARCHIVE, DataWranglingScenario
from flexgen_helm.data_wrangling.selection import by_cluster, rotated

RUNNER = "flexgen_helm.runner.FlexGenRunner"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    wrangling_data.write_archive(tmp_path / "archive")
    return tmp_path / "archive"


def questions(name: str, root: Path, split: str = "test") -> list[tuple[str, str]]:
    return [(example.question, example.answer) for example in read_examples(DATASETS[name], root, split)]


class TestQuestions:
    """Row 12 is the first of each test split, row 13 the second; 12 is a match, and clean."""

    def test_of_a_pair(self, archive: Path) -> None:
        first, second, *others = questions("Beer", archive)
        assert first == (
            "Beer A: name: beer_name Eva 12 A. factory: brew_factory_name Eva 12 A\n"
            "Beer B: name: beer_name Eva 12 B. factory: brew_factory_name Eva 12 B",
            "Yes",
        )
        assert "Beer B: name: beer_name Gus 6 B." in second[0]
        assert [answer for _, answer in (second, *others)] == ["No", "No", "Yes", "No", "No", "Yes"]

    def test_an_empty_cell_is_written_empty(self, archive: Path) -> None:
        assert questions("Amazon-Google", archive)[1][0].splitlines()[0].endswith("manufacturer Finn 13 A. price:")

    def test_restaurants_do_not_show_the_number_that_gives_matches_away(self, archive: Path) -> None:
        assert all("class" not in question for question, _ in questions("Fodors-Zagats", archive))

    def test_of_a_missing_value(self, archive: Path) -> None:
        assert questions("Restaurant", archive)[0] == (
            "name: name Eva 12. addr: addr Eva 12. phone: phone Eva 12. type: type Eva 12",
            "Kyoto",
        )
        assert questions("Buy", archive)[0] == ("name: name Eva 12. description: description Eva 12", "Kyoto")

    def test_of_a_cell(self, archive: Path) -> None:
        assert questions("Hospital", archive)[:2] == [("City: city 12", "No"), ("Score: score x13", "Yes")]
        row = "age: age x13. workclass: workclass x13. income: income x13"
        assert questions("Adult", archive)[1] == (f"{row}\nCell: workclass: workclass x13", "Yes")

    def test_of_two_columns(self, archive: Path) -> None:
        assert questions("Synthea", archive)[0] == ("A: person-Eva\nB: patients-12", "Yes")

    def test_a_cell_of_several_lines_is_one_line(self, archive: Path) -> None:
        path = archive / "data_imputation/Buy/test.csv"
        path.write_text('name,description,manufacturer\n"a\n b",c,"d\te"\n')
        assert questions("Buy", archive) == [("name: a b. description: c", "d e")]

    @pytest.mark.parametrize("name", DATASETS)
    def test_every_row_of_a_file_is_one(self, archive: Path, name: str) -> None:
        for split, count in (("train", NUM_TRAIN), ("test", NUM_TEST)):
            with (archive / DATASETS[name].folder / f"{split}.csv").open() as stream:
                assert len(list(csv.DictReader(stream))) == count
            assert len(questions(name, archive, split)) == count


class TestBadData:
    def refused(self, name: str, root: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            read_examples(DATASETS[name], root, "test")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_missing_files_are_named(self, archive: Path) -> None:
        folder = archive / "entity_matching/structured/Beer"
        (folder / "tableB.csv").unlink()
        (folder / "test.csv").unlink()
        assert f"{folder} lacks tableB.csv, test.csv;" in self.refused("Beer", archive)

    def test_missing_columns_are_named_and_so_are_those_present(self, archive: Path) -> None:
        path = archive / "entity_matching/structured/Beer/tableA.csv"
        path.write_text("id,Brew_Factory_Name,ABV\n0,b,c\n")
        said = f"{path} lacks the columns Beer_Name; it has id, Brew_Factory_Name, ABV"
        assert self.refused("Beer", archive) == said

    @pytest.mark.parametrize(
        ("name", "file", "content", "says"),
        [
            ("Beer", "test.csv", "ltable_id,rtable_id,label\n0,99,1\n", "row 0: rtable_id '99' is not in tableB.csv"),
            ("Beer", "test.csv", "ltable_id,rtable_id,label\n0,1,true\n", "row 0: label is 'true'; it must be 0 or 1"),
            ("Beer", "test.csv", "ltable_id,rtable_id,label\n", "has no rows"),
            ("Hospital", "test.csv", "row_id,col_name,is_clean\n0,City,1\n50,City,1\n", "row 1: row_id '50' is not in"),
            ("Hospital", "test.csv", "row_id,col_name,is_clean\n0,Town,1\n", "no cell of column 'Town' in row 0"),
            ("Adult", "table.csv", "col_name,age,workclass,income\n" + "age,1,2,3\n" * 19, "no cell of column"),
            ("Synthea", "test.csv", "omop,table\na,b\n", "lacks the columns label; it has omop, table"),
        ],
    )
    def test_rows_that_cannot_be_meant(self, archive: Path, name: str, file: str, content: str, says: str) -> None:
        (archive / DATASETS[name].folder / file).write_text(content)
        said = self.refused(name, archive)
        assert says in said
        assert file in said

    def test_bytes_that_are_no_text(self, archive: Path) -> None:
        (archive / "data_imputation/Buy/test.csv").write_bytes(b"name\xff\n")
        assert "test.csv cannot be read" in self.refused("Buy", archive)


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ({"dataset": "Beeer"}, "no dataset 'Beeer'; did you mean 'Beer'?"),
            ({}, "no dataset ''; known: Adult, Amazon-Google"),
            (
                {"dataset": "Beer", "task": "entity_machting"},
                "no task 'entity_machting'; did you mean 'entity_matching'?",
            ),
            ({"dataset": "Beer", "task": "data_imputation"}, "is of task entity_matching, not data_imputation"),
            ({"dataset": "Beer", "selection": "clusters"}, "no selection 'clusters'; did you mean 'cluster'?"),
            ({"dataset": "Beer", "k": 7}, "Beer has 6 written demonstrations, not k=7"),
            ({"dataset": "Beer", "k": -1}, "k=-1 is not a number of demonstrations"),
            ({"dataset": "Beer", "k": "all"}, "k=all is not a number"),
            ({"dataset": "Beer", "seed": -1}, "seed=-1 is not a whole number"),
        ],
    )
    def test_those_that_cannot_be_meant_are_one_line_before_any_data_is_fetched(
        self, arguments: dict[str, Any], says: str
    ) -> None:
        with pytest.raises(ConfigError, match="data_wrangling") as caught:
            get_data_wrangling_spec(**arguments)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_the_task_follows_from_the_dataset(self) -> None:
        for name, dataset in DATASETS.items():
            assert get_data_wrangling_spec(name) == get_data_wrangling_spec(name, dataset.task_name)
        assert {dataset.task_name for dataset in DATASETS.values()} == set(TASKS)

    def test_runs_that_differ_have_names_that_differ(self) -> None:
        changes: list[dict[str, Any]] = [{}, {"k": 3}, {"selection": "random"}, {"selection": "random", "seed": 1}]
        changes += [{"selection": "cluster"}, {"data": "here"}]
        assert len({get_data_wrangling_spec("Beer", **change).name for change in changes}) == len(changes)

    def test_yes_or_no_has_few_tokens_and_both_stop_at_the_end_of_a_line(self) -> None:
        beer, buy = (get_data_wrangling_spec(name).adapter_spec for name in ("Beer", "Buy"))
        assert (beer.max_tokens, buy.max_tokens) == (5, 10)
        assert beer.stop_sequences == buy.stop_sequences == ["\n"]


def flavours() -> list[Example]:
    """Four kinds of question, 5 of each, told apart by their words; every other one is a match."""
    words = ("stout porter dark malt", "cd album song track", "laptop sleeve computer bag", "noodle soup kitchen")
    return [Example(f"{text} {text} {i}", (YES, NO)[i % 2]) for i in range(5) for text in words]


def kinds(examples: list[Example]) -> set[str]:
    return {example.question.split()[0] for example in examples}


class TestSelection:
    def test_the_first_of_a_cluster_selection_are_of_different_clusters(self) -> None:
        chosen = by_cluster(flavours(), 4, 0, by_answer=False)
        assert kinds(chosen[:4]) == {"stout", "cd", "laptop", "noodle"}
        assert kinds(chosen[4:8]) == kinds(chosen[:4])  # and of a further trial
        assert sorted(map(repr, chosen)) == sorted(map(repr, flavours()))

    def test_answers_alternate_and_each_has_its_clusters(self) -> None:
        chosen = by_cluster(flavours(), 8, 0, by_answer=True)[:8]
        assert [example.answer for example in chosen] == [YES, NO] * 4  # three of five are Yes
        assert kinds(chosen[::2]) == kinds(chosen[1::2]) == {"stout", "cd", "laptop", "noodle"}
        assert len(set(chosen)) == 8

    def test_a_representative_is_the_nearest_to_the_centre(self) -> None:
        texts = [
            "dark malt beer quince pear plum",
            "dark malt beer",
            "dark malt beer ale",
            "laptop sleeve",
            "laptop bag",
        ]
        chosen = by_cluster([Example(text, "") for text in texts], 2, 0, by_answer=False)
        assert chosen[0].question == "dark malt beer"

    @pytest.mark.parametrize("k", [1, 3, 7])
    def test_the_same_arguments_choose_the_same_and_nothing_twice(self, k: int) -> None:
        examples = flavours() * 2
        first, again = (by_cluster(examples, k, 5, by_answer=True)[:k] for _ in range(2))
        assert first == again
        assert len(set(first)) == k
        assert len(by_cluster(examples, k, 5, by_answer=True)) == len(flavours())

    def test_fewer_examples_than_demonstrations_are_all_taken(self) -> None:
        assert set(by_cluster(flavours()[:3], 8, 0, by_answer=True)) == set(flavours()[:3])

    def test_further_trials_of_written_ones_begin_with_the_next(self) -> None:
        one, two, three = (Example(word, word) for word in ("one", "two", "three"))
        assert rotated([one, two, three]) == [one, two, three, two, three, one, three, one, two]

    @pytest.mark.parametrize("name", DATASETS)
    def test_written_ones_are_distinct_and_show_both_answers(self, name: str) -> None:
        written = manual_demonstrations(DATASETS[name])
        assert len(set(written)) == len(written) == 6
        if DATASETS[name].task.is_binary:
            answers = [example.answer for example in written]
            assert answers.count(YES) == answers.count(NO) == 3

    def test_written_ones_are_serialized_as_the_rows_are(self, archive: Path) -> None:
        for name, dataset in DATASETS.items():
            asked = questions(name, archive)[0][0]
            written = manual_demonstrations(dataset)[0].question
            if name in ("Hospital", "Adult"):  # columns are the table's own
                assert written.count("\n") == asked.count("\n")
            elif name != "Synthea":
                for attribute in dataset.columns.values():
                    assert written.count(f"{attribute}:") == asked.count(f"{attribute}:") > 0


def prompts(archive: Path, name: str, *, trial: int = 0, **arguments: Any) -> list[str]:
    """The prompts that HELM's adapter makes of the scenario."""
    run_spec = get_data_wrangling_spec(name, data=str(archive), **arguments)
    instances = DataWranglingScenario(**run_spec.scenario_spec.args).get_instances("unused")
    adapter = GenerationAdapter.__new__(GenerationAdapter)
    adapter.adapter_spec = run_spec.adapter_spec
    adapter.window_service = SimpleNamespace(fits_within_context_window=lambda **_: True,  # type: ignore[assignment]
                                             truncate_from_right=lambda text, _: text)  # fmt: skip
    states = adapter._adapt_trial_index(
        [each for each in instances if each.split == "train"],
        trial,
        [each for each in instances if each.split == "test"],
        1,
    )
    return [state.request.prompt for state in states]


def written_out(name: str, examples: list[Example]) -> str:
    dataset = DATASETS[name]
    shown = "".join(f"\n{e.question}\n{dataset.output_noun}: {e.answer}\n" for e in examples)
    return f"{dataset.instructions}\n{shown}\n"


class TestPrompts:
    @pytest.mark.parametrize("name", DATASETS)
    def test_the_written_demonstrations_are_the_prefix_of_all(self, archive: Path, name: str) -> None:
        prefix = written_out(name, manual_demonstrations(DATASETS[name]))
        asked = [f"{question}\n{DATASETS[name].output_noun}:" for question, _ in questions(name, archive)]
        assert prompts(archive, name) == [prefix + each for each in asked]

    def test_k_takes_the_first_ones_written(self, archive: Path) -> None:
        prefix = written_out("Beer", manual_demonstrations(DATASETS["Beer"])[:2])
        assert all(prompt.startswith(prefix) for prompt in prompts(archive, "Beer", k=2))
        turned = written_out("Beer", manual_demonstrations(DATASETS["Beer"])[1::-1])
        assert all(prompt.startswith(turned) for prompt in prompts(archive, "Beer", k=2, trial=1))
        bare = written_out("Beer", [])
        assert prompts(archive, "Beer", k=0)[0] == f"{bare}{questions('Beer', archive)[0][0]}\nSame beer:"

    @pytest.mark.parametrize("name", ["Beer", "Buy"])
    def test_those_of_clusters_are_what_was_chosen_in_its_order(self, archive: Path, name: str) -> None:
        train = read_examples(DATASETS[name], archive, "train")
        chosen = by_cluster(train, 4, 3, by_answer=name == "Beer")
        for trial in (0, 1):
            prefix = written_out(name, chosen[4 * trial : 4 * trial + 4])
            asked = prompts(archive, name, selection="cluster", k=4, seed=3, trial=trial)
            assert len(asked) == NUM_TEST
            assert all(prompt.startswith(prefix) for prompt in asked)

    def test_random_ones_are_of_the_train_split_and_follow_the_seed(self, archive: Path) -> None:
        def shown(**arguments: Any) -> list[str]:
            (prefix,) = {p.rsplit("\n\n", 1)[0] for p in prompts(archive, "Beer", selection="random", k=4, **arguments)}
            return prefix.split("\n\n")[1:]

        train = {f"{question}\nSame beer: {answer}" for question, answer in questions("Beer", archive, "train")}
        assert len(set(shown())) == 4
        assert set(shown()) <= train
        assert {tuple(each.endswith("Yes") for each in shown(seed=seed)) for seed in range(4)} == {
            (False, True, False, True)  # HELM takes each answer in turn, the most frequent first
        }
        assert shown() == shown(seed=0)
        assert len({tuple(shown(seed=seed)) for seed in range(4)} | {tuple(shown(trial=1))}) == 5


def states(pairs: list[tuple[str, str]]) -> list[Any]:
    """Request states, as far as the metric looks, of (completion, right answer)."""

    def state(text: str, right: str) -> Any:
        reference = SimpleNamespace(output=SimpleNamespace(text=right))
        result = SimpleNamespace(completions=[SimpleNamespace(text=text)])
        return SimpleNamespace(result=result, instance=SimpleNamespace(all_correct_references=[reference]))

    return [state(*pair) for pair in pairs]


def scores(pairs: list[tuple[str, str]]) -> dict[str, float]:
    return {stat.name.name: stat.mean for stat in YesNoMetric().evaluate_instances(states(pairs), "")}


class TestScores:
    ANSWERED: list[tuple[str, str]] = [  # noqa: RUF012
        (" Yes", YES),
        ("yes, the same", YES),
        ("YES", NO),
        ("No", YES),
        ("Maybe", YES),
        (" no.", NO),
        ("", NO),
    ]

    def test_by_hand(self) -> None:
        assert scores(self.ANSWERED) == pytest.approx(
            {
                "yes_precision": 2 / 3,
                "yes_recall": 2 / 4,
                "yes_f1": 2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2),
                "yes_no_accuracy": 3 / 7,
                "yes_no_neither": 2 / 7,
            }
        )

    @pytest.mark.parametrize("seed", range(5))
    def test_beside_scikit_learn(self, seed: int) -> None:
        import random

        draw = random.Random(seed)
        pairs = [(draw.choice(["Yes", "No", "what"]), draw.choice([YES, NO, NO])) for _ in range(41)]
        expected = precision_recall_fscore_support(
            [right == YES for _, right in pairs], [text == "Yes" for text, _ in pairs], average="binary"
        )
        found = scores(pairs)
        assert [found[name] for name in ("yes_precision", "yes_recall", "yes_f1")] == pytest.approx(expected[:3])

    @pytest.mark.parametrize("pairs", [[("No", NO)], [("No", YES)], [("Yes", NO)]])
    def test_nothing_found_scores_nothing(self, pairs: list[tuple[str, str]]) -> None:
        found = scores(pairs)
        assert (found["yes_precision"], found["yes_recall"], found["yes_f1"]) == (0, 0, 0)

    def test_each_has_a_description(self) -> None:
        assert {each.name for each in YesNoMetric().get_metadata()} == set(scores(self.ANSWERED))


class Oracle(FakeEngine):
    """Answers the questions of one data set by what `answers` says for each, and goes on with the next question."""

    answers: dict[str, str]

    def answer(self, job: Job) -> Completion:
        asked = self.tokenizer.decode(job.prompt).rsplit("\n\n", 1)[1].rsplit("\n", 1)[0]
        text = f" {self.answers[asked]}\nBeer A:"
        stops = [text.index(stop) for stop in job.stop if isinstance(stop, str) and stop in text]
        tokens = self.tokenizer.encode(text[: min(stops, default=len(text))])
        return Completion(
            text=self.tokenizer.decode(tokens),
            tokens=tuple(tokens),
            logprobs=(-0.5,) * len(tokens),
            finish_reason="stop" if stops else "length",
        )


class TestRuns:
    @pytest.fixture
    def run(
        self, helm_run: Callable[..., Path], tiny_llama: Path, tmp_path: Path, fake_engines: list[FakeEngine],
        monkeypatch: pytest.MonkeyPatch,
    ) -> Callable[..., Path]:  # fmt: skip
        def run(entry: str, answers: dict[str, str], *arguments: str) -> Path:
            monkeypatch.setattr(FakeEngine, "answers", answers, raising=False)
            monkeypatch.setattr(FakeEngine, "answer", Oracle.answer)
            write_entries(tmp_path / "prod_env", "local/wrangler", tiny_llama, ours=ours(tiny_llama))
            deployment = "model=local/wrangler,model_deployment=ours/wrangler"
            flags = ("--runner-class-name", RUNNER, "--disable-cache", "--exit-on-error", *arguments)
            (made,) = helm_run("-r", f"{entry},{deployment}", *flags, suite=tmp_path.name).glob("data_wrangling*")
            return made

        return run

    def test_every_row_is_asked_and_scored(self, run: Callable[..., Path], archive: Path) -> None:
        said = ["Yes", "yes indeed", "No", "Perhaps", "No", "No", "Yes"]  # right: Yes No No Yes No No Yes
        rows = questions("Beer", archive)
        answers = {question: text for (question, _), text in zip(rows, said, strict=True)}
        made = run(f"data_wrangling:dataset=Beer,k=2,data={archive}", answers, "-m", "1000")
        assert texts_of(made) == [f" {text}" for text in said]  # cut where the line ends
        found = {stat["name"]["name"]: stat for stat in read(made, "stats.json")}
        assert found["yes_precision"]["mean"] == pytest.approx(2 / 3)
        assert found["yes_recall"]["mean"] == pytest.approx(2 / 3)
        assert found["yes_f1"]["mean"] == pytest.approx(2 / 3)
        assert found["yes_no_accuracy"]["mean"] == pytest.approx(5 / 7)
        assert found["yes_no_neither"]["mean"] == pytest.approx(1 / 7)
        assert found["num_instances"]["sum"] == NUM_TEST
        assert found["num_train_instances"]["mean"] == 2

    def test_imputed_values_are_right_but_for_case_and_punctuation(
        self, run: Callable[..., Path], archive: Path, helm_data: Path
    ) -> None:
        rows = questions("Buy", archive)
        said = [f"{right.upper()}." if i % 2 else "elsewhere" for i, (_, right) in enumerate(rows)]
        answers = {question: text for (question, _), text in zip(rows, said, strict=True)}
        made = run(
            "data_wrangling:task=data_imputation,dataset=Buy", answers, "-m", "1000"
        )  # where HELM keeps its data
        found = {stat["name"]["name"]: stat["mean"] for stat in read(made, "stats.json") if "mean" in stat}
        assert found["quasi_exact_match"] == pytest.approx(3 / 7)
        assert found["exact_match"] == 0
        assert not any("yes_f1" in name for name in stats_of(made, left_out=[]))

    def test_further_trials_have_demonstrations_too(self, run: Callable[..., Path], archive: Path) -> None:
        answers = dict(questions("Beer", archive))
        made = run(f"data_wrangling:dataset=Beer,k=2,data={archive}", answers, "-m", "3", "-t", "2")
        told = read(made, "scenario_state.json")["request_states"]
        assert [state["num_train_instances"] for state in told] == [2] * 6
        heads = {state["request"]["prompt"].split("\n\n")[1] for state in told}
        assert len(heads) == 2


class TestData:
    def test_without_a_network_the_cure_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import urllib.error
        import urllib.request

        def refuse(*_: Any, **__: Any) -> None:
            raise urllib.error.URLError("no route")

        monkeypatch.setattr(urllib.request, "urlretrieve", refuse)
        with pytest.raises(ConfigError) as caught:
            DataWranglingScenario("Beer", "manual", 6).get_instances(str(tmp_path))
        assert f"{ARCHIVE} cannot be fetched" in str(caught.value)
        assert "no route" in str(caught.value)
        assert f"unpack it as {tmp_path / 'data'}, or name its folder with data=DIR" in str(caught.value)

    def test_the_archive_is_unpacked_where_it_is_looked_for(
        self, tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import urllib.request

        packed = tmp_path / "packed"
        shutil.copytree(archive, packed / "datasets")
        made = shutil.make_archive(str(tmp_path / "datasets"), "gztar", packed, "datasets")

        def fetch(url: str, path: str) -> None:
            assert url == ARCHIVE
            shutil.copy(made, path)

        monkeypatch.setattr(urllib.request, "urlretrieve", fetch)
        output = tmp_path / "output"
        output.mkdir()
        instances = DataWranglingScenario("Beer", "manual", 6).get_instances(str(output))
        assert [instance.split for instance in instances].count("test") == NUM_TEST

    def test_a_folder_may_be_the_archives_own_or_the_one_above(self, tmp_path: Path, archive: Path) -> None:
        shutil.copytree(archive, tmp_path / "above" / "datasets")
        for folder in (archive, tmp_path / "above"):
            assert DataWranglingScenario("Beer", "manual", 6, data=str(folder)).get_instances("unused")

    def test_a_folder_that_is_not_there(self) -> None:
        with pytest.raises(ConfigError, match=r"data=nowhere: no such directory; .*entity_matching/structured"):
            DataWranglingScenario("Beer", "manual", 6, data="nowhere").get_instances("unused")


def test_the_main_score_is_f1_where_answers_are_yes_or_no() -> None:
    for dataset in DATASETS.values():
        scenario = DataWranglingScenario(dataset.name, "manual", 6)
        expected = "quasi_exact_match" if dataset.task_name == "data_imputation" else "yes_f1"
        assert scenario.get_metadata().main_metric == expected
