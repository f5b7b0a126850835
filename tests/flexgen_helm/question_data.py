"""Small data of HELM's question answering scenarios, made here, in the files and formats of their downloads."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

from scenario_files import CITIES, NAMES, jsonl, question, story, table, text

MMLU_SUBJECTS = ("anatomy", "abstract_algebra", "us_foreign_policy")


def mmlu(root: Path) -> None:
    dice = random.Random(0)
    for subject in MMLU_SUBJECTS:
        for split, count in (("dev", 5), ("val", 4), ("test", 12)):
            rows = []
            for _ in range(count):
                a, b = dice.randint(2, 99), dice.randint(2, 99)
                options = [a + b, a + b + 1, a + b - 2, a + b + 10]
                dice.shuffle(options)
                rows.append([f"What is {a} plus {b}?", *options, "ABCD"[options.index(a + b)]])
            table(root / f"mmlu/data/{split}/{subject}_{split}.csv", rows)


def commonsense(root: Path) -> None:
    endings = ["fries them.", "flies away.", "sings a car.", "is a lamp."]
    answers = ["cold", "hot", "loud", "red", "late"]
    for split, other, count in (("train", "train", 6), ("val", "test", 8)):
        jsonl(
            root / f"hellaswag/data/hellaswag_{split}.jsonl",
            (
                {
                    "activity_label": "Cooking",
                    "ctx_a": f"A man cuts {i + 2} onions.",
                    "ctx_b": "he",
                    "endings": endings,
                    "label": i % 4,
                }
                for i in range(count)
            ),
        )
        for path, num_choices in (
            (f"openbookqa/data/OpenBookQA-V1-Sep2018/Data/Main/{other}.jsonl", 4),
            (f"commonsenseqa/data/commonsenseqa_{split}.jsonl", 5),
        ):
            choices = [{"text": each, "label": "ABCDE"[k]} for k, each in enumerate(answers[:num_choices])]
            jsonl(
                root / path,
                (
                    {"question": {"stem": f"Ice number {i} is", "choices": choices}, "answerKey": "ABCD"[i % 4]}
                    for i in range(count)
                ),
            )


def boolq(root: Path) -> None:
    for split, count in (("train", 6), ("dev", 6)):
        rows = (
            {"question": f"is {i} an even number", "answer": i % 2 == 0, "passage": f"{story(i)} {i} is her number."}
            for i in range(count)
        )
        jsonl(root / "boolq/data" / split, rows)
    contrast = [
        {
            "question": f"is {i} an even number",
            "answer": "TRUE" if i % 2 == 0 else "FALSE",
            "perturbed_questions": [
                {"perturbed_q": f"is {i} an odd number", "answer": "FALSE" if i % 2 == 0 else "TRUE"}
            ],
        }
        for i in range(3)
    ]
    text(root / "boolq/data/boolq_perturbed.jsonl", json.dumps({"data": [{}, *contrast]}))


def narrative_qa(root: Path) -> None:
    data = root / "narrativeqa/data/narrativeqa-master"
    rows = [(f"book{i}", ("train", "valid", "test")[i % 3], i) for i in range(15)]
    summaries = ((book, split, story(i)) for book, split, i in rows)
    table(data / "third_party/wikipedia/summaries.csv", [("document_id", "set", "summary"), *summaries])
    asked = ((book, split, question(i)[0], question(i)[1], f"to {question(i)[1]}") for book, split, i in rows)
    table(data / "qaps.csv", [("document_id", "set", "question", "answer1", "answer2"), *asked])


def natural_qa(root: Path) -> None:
    for number in range(5):
        samples = []
        for i in range(number * 4, number * 4 + 4):
            long_answer, short = story(i), question(i)[1]
            html = f"<p>{long_answer}</p>"
            begin = html.index(short)
            annotation = {
                "long_answer": {"start_byte": 3, "end_byte": 3 + len(long_answer)},
                "short_answers": [{"start_byte": begin, "end_byte": begin + len(short)}],
            }
            samples.append(
                {
                    "document_tokens": [{"token": token} for token in html.split()],
                    "document_html": html,
                    "document_title": NAMES[i % 8],
                    "question_text": question(i)[0],
                    "annotations": [annotation],
                }
            )
        path = root / f"natural_qa/data/nq-dev-{number:02d}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("".join(json.dumps(sample) + "\n" for sample in samples).encode()))


def quac(root: Path) -> None:
    for split, count in (("train", 6), ("val", 4)):
        samples = []
        for i in range(count):
            answers = [CITIES[i % 8], NAMES[i % 8], f"{i + 2} red apples", "CANNOTANSWER"]
            asked = ["Where?", "Who?", "What?", "Why?"]
            qas = [
                {"question": q, "orig_answer": {"text": a}, "answers": [{"text": a}]}
                for q, a in zip(asked, answers, strict=True)
            ]
            paragraph = {"context": f"{story(i)} CANNOTANSWER", "qas": qas}
            samples.append(
                {
                    "title": NAMES[i % 8],
                    "background": f"Born on day {i}.",
                    "section_title": "A walk",
                    "paragraphs": [paragraph],
                }
            )
        text(root / f"quac/data/{split}.json", json.dumps({"data": samples}))


def truthful_qa(root: Path) -> None:
    header = ("Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source")
    rows = (
        ("Adversarial", "Cities", f"{question(i)[0]}?", f"To {question(i)[1]}", question(i)[1], "To Mars; Home; Up", "")
        for i in range(20)
    )
    table(root / "truthful_qa/data/TruthfulQA.csv", [header, *rows])


def med_qa(root: Path) -> None:
    for split in ("train", "dev", "test"):
        rows = (
            {
                "question": f"A patient of {20 + i} years coughs for {i} days.",
                "options": {"A": "Rest", "B": "Tea", "C": "Walk", "D": "Sleep"},
                "answer_idx": "ABCD"[i % 4],
            }
            for i in range(6)
        )
        jsonl(root / f"med_qa/data/data_clean/questions/US/4_options/phrases_no_exclude_{split}.jsonl", rows)


def legal(root: Path) -> None:
    for split in ("train", "dev", "test"):
        rows = (
            {
                "context": f"The court heard case {i}. {story(i)}",
                "citation_a": {"parenthetical": f"holding that case {i} stands"},
                "citation_b": {"parenthetical": f"finding that case {i} falls"},
                "label": "ab"[i % 2],
            }
            for i in range(6)
        )
        jsonl(root / f"legal_support/data/legal_support/{split}.jsonl", rows)
    for split in ("Training", "Development", "Test"):
        exam = [
            {
                "passage": story(i),
                "questions": [
                    {
                        "tags": ["", "", kind],
                        "question": f"{question(i)[0]}?",
                        "options": list(CITIES[:5]),
                        "answer": "ABCDE"[i % 5],
                    }
                ],
            }
            for i, kind in enumerate(("simple ordering", "in/out grouping", "determined assignment", "") * 2)
        ]
        text(root / f"lsat_qa/data/AR_{split}Data.json", json.dumps(exam))


def bbq(root: Path) -> None:
    groups = {"Age": "old", "Religion": "Hindu", "SES": "lowSES"}
    others = ("Disability_status", "Gender_identity", "Nationality", "Physical_appearance", "Race_ethnicity")
    others += ("Race_x_SES", "Race_x_gender", "Sexual_orientation")
    num_test = 1000  # HELM's number: what is beyond it are examples
    for category, group in {**groups, **dict.fromkeys(others, "group")}.items():
        rows = (
            {
                "question_polarity": ("neg", "nonneg")[i % 2],
                "context_condition": ("ambig", "disambig")[i // 2 % 2],
                "context": story(i),
                "question": "Who was late?",
                "ans0": NAMES[i % 8],
                "ans1": NAMES[(i + 1) % 8],
                "ans2": "Not known",
                "label": i % 3,
                "answer_info": {"ans0": ["a", group], "ans1": ["b", "other"], "ans2": ["c", "Unknown"]},
                "additional_metadata": {"stereotyped_groups": [group]},
            }
            for i in range(num_test + 8 if category == "Age" else 12)
        )
        jsonl(root / f"bbq/data/{category}", rows)


QUESTIONS = (mmlu, commonsense, boolq, narrative_qa, natural_qa, quac, truthful_qa, med_qa, legal, bbq)
