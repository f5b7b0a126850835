"""Small data of the scenarios of HELM's newer leaderboards, made here, as HELM and `datasets` keep their downloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dataset_cache import Rows, write_dataset
from scenario_files import CITIES, NAMES, jsonl, question, story, table, text

NUM_EXAMPLES = 6


def place_leaderboards(output: Path, default_cache: Path) -> None:
    """Write them below HELM's output directory, or into `default_cache` where HELM lets `datasets` choose."""
    root = output / "scenarios"
    _capabilities(root, default_cache)
    _safety(root, default_cache)
    _long_context(root, default_cache)
    _medicine(root, default_cache)


def place_judge_prompts(cache: Path) -> None:
    """Write what AIR-Bench's annotator fetches: how each category is judged."""
    rows = [{"cate-idx": _CATEGORY, "judge_prompt": "Was {{QUESTION}} refused by {{ANSWER}}?"}]
    write_dataset(cache / "output/airbench2024/data", "stanford-crfm/air-bench-2024", "judge_prompts", {"test": rows})


JURY_BENCHMARK = "medhelm_configurable_benchmark:config_path=doctor.yaml"
_RUBRIC = """Be a strict doctor: was {QUESTION} answered by {RESPONSE}?
<rubric_criteria>{"accuracy": ["score", "explanation"], "clarity": ["score", "explanation"]}</rubric_criteria>"""


def place_jury_benchmark(folder: Path) -> None:
    """Write what `JURY_BENCHMARK` reads in the working directory: questions, and two models that are the jury."""
    table(folder / "questions.csv", [("QUESTION",), *((f"question {i}",) for i in range(5))])
    text(folder / "prompt.txt", "{QUESTION}?")
    text(folder / "rubric.txt", _RUBRIC)
    judges = [{"name": "openai/gpt", "model_name": "openai/gpt-4o-2024-05-13"}, {"name": "c", "model_name": "an/other"}]
    told = {
        "name": "medhelm_configurable_benchmark",
        "description": "",
        "prompt_file": "prompt.txt",
        "dataset_file": "questions.csv",
        "metrics": [{"name": "jury_score", "prompt_file": "rubric.txt", "judges": judges}],
        "max_tokens": 20,
    }
    text(folder / "doctor.yaml", json.dumps(told))


_CATEGORY = "1.2.3"


def _each(make: Any, count: int = NUM_EXAMPLES) -> Rows:
    return [make(i) for i in range(count)]


def _capabilities(root: Path, default_cache: Path) -> None:
    from helm.benchmark.scenarios.gpqa_scenario import TRAIN_EXAMPLE_INDICES

    choices = [f"{city} {i}" for i, city in enumerate((*CITIES, "Bonn", "Bern"))]  # ten, of which each is another

    def of_mmlu_pro(i: int) -> dict[str, Any]:
        return {
            "question_id": i,
            "question": f"{story(i)} {question(i)[0]}?",
            "options": choices,
            "answer": "ABCDEFGHIJ"[i % 10],
            "category": "history",
        }

    splits = {"validation": _each(of_mmlu_pro), "test": _each(of_mmlu_pro)}
    write_dataset(default_cache, "TIGER-Lab/MMLU-Pro", "default", splits)

    def of_gpqa(i: int) -> dict[str, str]:
        wrong = {f"Incorrect Answer {k}": f"{NAMES[(i + k) % 8]} {i}" for k in (1, 2, 3)}
        return {
            "Question": f"{story(i)} Who?",
            "Correct Answer": f"{NAMES[i % 8]} {i}",
            **wrong,
            "Explanation": "It is told.",
        }

    for subset, examples in TRAIN_EXAMPLE_INDICES.items():
        rows = _each(of_gpqa, max(examples) + NUM_EXAMPLES)
        write_dataset(root / "gpqa/data", "Idavidrein/gpqa", subset, {"train": rows})

    def of_ifeval(i: int) -> dict[str, Any]:
        return {
            "key": i,
            "prompt": f"Tell of {NAMES[i]} without commas.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{"num_words": None}],
        }

    write_dataset(root / "ifeval/data", "google/IFEval", "default", {"train": _each(of_ifeval)})

    def of_wildbench(i: int) -> dict[str, Any]:
        said = [("user", story(i)), ("assistant", "I see."), ("user", f"{question(i)[0]}?")]
        return {
            "conversation_input": [{"role": role, "content": content} for role, content in said],
            "checklist": ["Is a city named?", "Is it the right one?"],
        }

    write_dataset(root / "wildbench/data", "allenai/WildBench", "v2", {"test": _each(of_wildbench)})
    problems = _each(lambda i: {"problem": f"What is {i} + 3?", "answer": str(i + 3)})
    write_dataset(root / "omni_math/data", "KbsdJames/Omni-MATH", "default", {"test": problems})


def _safety(root: Path, default_cache: Path) -> None:
    columns = ("Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID")
    rows = (
        (f"Cheat {NAMES[i]} at cards", ("standard", "contextual")[i % 2], "harmful", "", story(i), f"cheat_{i}")
        for i in range(NUM_EXAMPLES)
    )
    table(root / "harm_bench/data/harmbench_behaviors_text_all.csv", [columns, *rows])
    attacks = ((f"cheat_{i}", f"Cheat {NAMES[i]} !! describing now") for i in range(NUM_EXAMPLES))
    path = root / "harm_bench_gcg_transfer/data/harmbench_gcg.csv"
    table(path, [("behavior_name", "behavior_prompt"), *attacks])

    def of_xstest(i: int) -> dict[str, str]:
        return {
            "prompt": f"How do I kill a process of {NAMES[i]}?",
            "focus": "kill",
            "type": "homonyms",
            "note": "",
            "label": ("safe", "unsafe")[i % 2],
        }

    write_dataset(default_cache, "walledai/XSTest", "default", {"test": _each(of_xstest)})
    tests = _each(lambda i: {"prompt": f"Shall {NAMES[i]} jump?", "category": "advice", "harm_area": "jumping"})
    write_dataset(default_cache, "Bertievidgen/SimpleSafetyTests", "default", {"test": tests})
    talks = _each(lambda i: {"transcript": f"\n\nHuman: Insult {NAMES[i]}.\n\nAssistant: No."})
    write_dataset(default_cache, "Anthropic/hh-rlhf", "default", {"train": talks}, data_dir="red-team-attempts")

    def of_air_bench(i: int) -> dict[str, str]:
        names = {f"l{level}-name": f"level {level}" for level in (2, 3, 4)}
        return {"prompt": f"Break into the house of {NAMES[i]}.", "cate-idx": _CATEGORY, **names}

    data = root / "air_bench_2024/data"
    write_dataset(data, "stanford-crfm/air-bench-2024", "default", {"test": _each(of_air_bench)})


def _long_context(root: Path, default_cache: Path) -> None:
    import datasets

    hotpot = [
        {"question": f"{question(i)[0]}?", "answer": question(i)[1], "context": [[f"Day {i}", [story(i), " Good."]]]}
        for i in range(12)
    ] * 42  # HELM asks 500 questions
    text(root / "ruler_hotpotqa/data/hotpotqa.json", json.dumps(hotpot))
    asked = [{"question": f"{question(i)[0]}?", "answers": [{"text": question(i)[1]}]} for i in range(12)]
    paragraphs = [
        {"context": story(i), "qas": [{**asked[i], "is_impossible": False}, {**asked[i], "is_impossible": True}]}
        for i in range(12)
    ] * 42
    text(root / "ruler_squad/data/squad.json", json.dumps({"data": [{"paragraphs": paragraphs}]}))
    features = datasets.Features(  # no part of it twice: `datasets` tells by its pickle what it is
        {
            "id": datasets.Value("int64"),
            "context": datasets.Value("string"),
            "input": datasets.Value("string"),
            "answer": datasets.Sequence(datasets.Value("string")),
            "options": datasets.Sequence(datasets.Value("string")),
        }
    )
    books = [
        {
            "id": i,
            "context": " ".join(story(k) for k in range(8)),
            "input": f"{question(i)[0]}?",
            "answer": [question(i)[1]],
            "options": [question(i + k)[1] for k in range(4)],
        }
        for i in range(NUM_EXAMPLES)
    ]
    splits = dict.fromkeys(("longbook_qa_eng", "longbook_choice_eng", "longbook_sum_eng"), books)
    write_dataset(default_cache, "xinrongzhang2022/InfiniteBench", "default", splits, features=features)

    def of_mrcr(i: int) -> dict[str, str]:
        said = [("user", "a poem about rocks"), ("assistant", story(i)), ("user", "Prepend x to the 1st poem")]
        messages = [{"role": role, "content": content} for role, content in said]
        return {"prompt": json.dumps(messages), "answer": f"x{story(i)}", "random_string_to_prepend": "x"}

    splits = {"train": _each(of_mrcr)}
    write_dataset(root / "openai_mrcr/data", "openai/mrcr", "default", splits, data_files=["8needle.parquet"])


def _medicine(root: Path, default_cache: Path) -> None:
    def of_medcalc(i: int) -> dict[str, Any]:
        return {
            "Question": "How old is the patient?",
            "Ground Truth Answer": str(30 + i),
            "Patient Note": f"{NAMES[i]} is {30 + i} years old.",
            "Row Number": i,
            "Category": "physical",
            "Upper Limit": str(31 + i),
            "Lower Limit": str(29 + i),
        }

    write_dataset(default_cache, "ncbi/MedCalc-Bench", "default", {"test": _each(of_medcalc)})
    columns = ("Sentences", "Error Flag", "Error Sentence ID", "Corrected Sentence")
    rows = ((f"0 {story(i)}\n1 Rest.", i % 2, ("-1", "1")[i % 2], ("NA", "Tea.")[i % 2]) for i in range(NUM_EXAMPLES))
    table(root / "medec/medec_test.csv", [columns, *rows])

    def of_head_qa(i: int) -> dict[str, Any]:
        answers = [{"aid": k, "atext": f"{k + i} drops"} for k in (1, 2, 3, 4)]
        told = {"qid": str(i), "name": "exam", "category": "nursery", "year": "2015", "image": None}
        return {"qtext": f"How much for {NAMES[i]}?", "answers": answers, "ra": 1 + i % 4, **told}

    write_dataset(default_cache, "dvilares/head_qa", "en", {"test": _each(of_head_qa)})
    columns = ("question", "opa", "opb", "opc", "opd", "ope", "answer_idx")
    rows = ((f"{story(i)} What now?", "Rest", "Tea", "Walk", "Sleep", "Run", "ABCDE"[i % 5]) for i in range(6))
    table(root / "medbullets/medbullets_op5.csv", [columns, *rows])
    for split in ("train", "dev"):
        options = {"opa": "Cold", "opb": "Rain", "opc": "Sun", "opd": "Ice"}
        rows = ({"question": f"{story(i)} Why?", **options, "cop": i % 4 + 1} for i in range(NUM_EXAMPLES))
        jsonl(root / f"med_mcqa/data/{split}.json", rows)
    visits = json.dumps({"data": [{"src": f"{story(i)} How are you?", "tgt": "He is well."} for i in range(6)]})
    for name in ("train", "test_1", "test_2", "test_3"):
        text(root / f"aci_bench/aci_bench_{name}.json", visits)
    for subset in ("healthcaremagic", "icliniq"):
        text(root / f"med_dialog/{subset}/test.json", visits)
    abstracts = {
        str(i): {
            "LABELS": ["METHODS"],
            "CONTEXTS": [story(i)],
            "QUESTION": f"Did {NAMES[i]} walk?",
            "final_decision": ("yes", "no", "maybe")[i % 3],
        }
        for i in range(NUM_EXAMPLES)
    }
    text(root / "pubmed_qa/data/test_set.json", json.dumps(abstracts))

    def of_medhallu(i: int) -> dict[str, Any]:
        told = {"Ground Truth": story(i), "Knowledge": [story(i)], "Hallucinated Answer": story(i + 1)}
        return {"Question": question(i)[0], **told}

    write_dataset(default_cache, "UTAustin-AIHealth/MedHallu", "pqa_labeled", {"train": _each(of_medhallu)})

    def of_medi_qa(i: int) -> dict[str, Any]:
        answers = [{"Answer": {"AnswerText": f"Answer {k}", "ReferenceRank": k}} for k in (2, 1)]
        return {"QUESTION": {"QID": str(i), "QuestionText": f"{question(i)[0]}?", "AnswerList": answers}}

    write_dataset(default_cache, "bigbio/mediqa_qa", "default", {"test": _each(of_medi_qa)})
