"""Small data of HELM's scenarios, made here, in the files and formats in which HELM keeps its downloads."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

from question_data import QUESTIONS
from scenario_files import CITIES, NAMES, jsonl, question, story, table, text
from wrangling_data import data_wrangling

LM_ENTRY = {  # task of the entries: subtasks, each a file
    "bigger_number": ["bigger_number"],
    "first_letter": ["first_letter"],
    "rhyming_word": [
        "rhyming_word",
        "rhyming_word_orthographically_similar",
        "rhyming_word_orthographically_different",
    ],
}


def place(output: Path) -> None:
    """Write all of it into HELM's output directory; what HELM fetches with `datasets` is `dataset_cache`'s."""
    for write in (*QUESTIONS, *OTHERS):
        write(output / "scenarios")
    text(output / "perturbations/dialect/SAE_to_AAVE_mapping.json", json.dumps({"is": ["be"], "isn't": ["ain't"]}))
    races = zip(NAMES, ("white_american", "black_american") * 4, ("female", "male") * 4, strict=True)
    names = "".join(f"{name.lower()},first_name,race,{race},gender,{gender}\n" for name, race, gender in races)
    text(output / "perturbations/person_name/data/person_names.txt", names)


def place_punkt(nltk_data: Path) -> None:
    """Write parameters of NLTK's sentence tokenizer that know no abbreviations: what HELM's F1, BLEU and bias need."""
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        text(nltk_data / "tokenizers" / "punkt_tab" / "english" / name, "")


# Ranking, summaries, translation


def msmarco(root: Path) -> None:
    data = root / "msmarco/data"
    table(data / "documents.tsv", ((i, story(i)) for i in range(40)), "\t")
    for name, queries, depth in (("train", range(6), 20), ("regular", range(6, 9), 31), ("trec", range(9, 12), 31)):
        table(data / f"{name}_queries.tsv", ((i, question(i)[0]) for i in queries), "\t")
        relevance = 3 if name == "trec" else 1
        table(data / f"{name}_qrels.tsv", ((i, 0, i, relevance) for i in queries), " " if name == "trec" else "\t")
        table(data / f"{name}_topk.tsv", ((i, (i + k) % 40, k + 1) for i in queries for k in range(depth)), "\t")


def place_by_hand(folder: Path) -> None:
    """Write what HELM expects its users to put below the directory that it is run from."""

    def sample(i: int) -> dict[str, object]:
        passage, city = story(i), CITIES[i % 8]
        span = {"s": 0, "e": passage.index(" ")}
        other = [{"sourcerAnswers": [span]}, {"sourcerAnswers": [{"noAnswer": True}]}]
        consensus = {"noAnswer": True} if i % 4 == 3 else span
        asked = {"q": f"Who is it, in {city}?", "consensus": consensus, "answers": other, "isQuestionBad": 0.0}
        return {"text": passage, "type": "train" if i < 8 else "dev", "questions": [asked]}

    content = json.dumps({"data": [sample(i) for i in range(12)]})
    text(folder / "restricted/newsqa/combined-newsqa-data-v1.json", content)


def summarization(root: Path) -> None:
    def document(i: int) -> str:
        return " ".join(story(5 * i + j) for j in range(4))  # HELM takes examples of 50 to 150 words

    splits = (("train", 12), ("validation", 4), ("test", 4))
    for name, keys in (("xsum-sampled", ("document", "summary")), ("cnndm", ("article", "highlights"))):
        rows = {
            split: [dict(zip(keys, (document(i), f"{NAMES[i % 8]} bought apples."), strict=True)) for i in range(count)]
            for split, count in splits
        }
        path = root / f"summarization/data/{name}.pk"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(rows))


# Labels


def imdb(root: Path) -> None:
    data = root / "imdb/data"
    order: dict[str, dict[str, list[str]]] = {}
    for split, folder in (("train", "train"), ("valid", "test")):
        order[split] = {label: [f"{i}_{label}.txt" for i in range(4)] for label in ("pos", "neg")}
        for label, files in order[split].items():
            for i, file in enumerate(files):
                text(data / folder / label / file, f"In part {i} of the {split} film {story(i)} It was {label}itive.")
    text(data / "imdb_scenario_pinned_file_order.json", json.dumps(order))
    for split in ("test", "dev"):
        for kind, label in (("original", "Positive"), ("contrast", "Negative")):
            numbers = range(2) if split == "test" else range(2, 3)
            word = "positive" if kind == "original" else "negative"
            lines = [f"{label}\tIn part {i} of the valid film {story(i)} It was {word}." for i in numbers]
            text(data / f"{split}_{kind}.tsv", "\n".join(["Sentiment\tText", *lines]) + "\n")


def civil_comments(root: Path) -> None:
    groups = ("male", "female", "LGBTQ", "christian", "muslim", "other_religions", "black", "white")
    rows = (
        (i, f"{story(i)} {'I hate it!' if i % 2 else 'Good.'}", i % 2, ("train", "val", "test")[i % 3], *[1] * 8)
        for i in range(24)
    )
    path = root / "civil_comments/wilds_civil_comments.csv"
    table(path, [("", "comment_text", "toxicity", "split", *groups), *rows])


def entity_matching(root: Path) -> None:
    for dataset in ("Beer", "Abt_Buy", "Dirty_iTunes_Amazon"):
        data = root / "entity_matching/data" / dataset
        for side in "AB":
            rows = ((i, f"{NAMES[i % 8]} ale {i}{side}", f"{i + 2} dollars") for i in range(12))
            table(data / f"table{side}.csv", [("id", "name", "price"), *rows])
        for split in ("train", "valid", "test"):
            pairs = ((i, i if i % 3 == 0 else 11 - i, int(i % 3 == 0)) for i in range(12))
            table(data / f"{split}.csv", [("ltable_id", "rtable_id", "label"), *pairs])
    text(root / "entity_matching/entity_matching_scenario_fixed_random_state.json", "{}")


def entity_data_imputation(root: Path) -> None:
    data = root / "entity_data_imputation/data"
    rows = ((i, f"radio {i}", f"a radio of {i} watts", CITIES[i % 8], i + 9) for i in range(40))
    table(data / "Buy/Buy.csv", [("id", "name", "description", "manufacturer", "price"), *rows])
    names = ("name", "addr", "city", "phone", "type", "class")
    head = "@relation places\n" + "".join(f"@attribute {name} string\n" for name in names) + "@data\n"
    lines = (f'"{NAMES[i % 8]} grill {i}","{i} Hill St","{CITIES[i % 8]}","55-{i:02d}","grill",{i}' for i in range(40))
    text(data / "Restaurant/fz.arff", head + "\n".join(lines) + "\n")


# Plain text


def wikitext_103(root: Path) -> None:
    documents = (
        f" \n = Title {number} = \n \n"
        + "".join(f" The river number {number} flows past the town {i} . \n" for i in range(5 + 30 * (number % 2)))
        for number in range(60)  # as many as HELM expects
    )
    text(root / "wikitext_103/data/wiki.test.raw", "".join(documents))


def the_pile(root: Path) -> None:
    books = ({"text": f"Chapter {i}. {story(i)} The end.", "meta": {"pile_set_name": "BookCorpus2"}} for i in range(4))
    jsonl(root / "the_pile/data", books)


def twitter_aae(root: Path) -> None:
    for demographic in ("aa", "white"):
        table(root / f"twitter_aae/{demographic}_tweets.csv", ((f"{story(i)} {demographic}",) for i in range(4)))


def blimp(root: Path) -> None:
    from helm.benchmark.scenarios.blimp_scenario import BLiMPScenario

    for phenomenon in ("anaphor_agreement", "island_effects"):
        for paradigm in BLiMPScenario(phenomenon).phenomenon_to_paradigms[phenomenon]:
            rows = (
                {"sentence_good": f"The {i} cats sleep.", "sentence_bad": f"The {i} cats sleeps."} for i in range(2)
            )
            jsonl(root / f"blimp/data/data/{paradigm}.jsonl", rows)


# Facts and reasoning


def wikifact(root: Path) -> None:
    from helm.benchmark.scenarios.wikifact_scenario import NAME_TO_PID

    for split, numbers in (("train", range(6)), ("dev", range(6, 8)), ("test", range(8, 12))):
        rows = [
            {
                "property": NAME_TO_PID[relation],
                "template": f"Town {i} of {relation} is",
                "result_names": [[CITIES[i % 8]]],
            }
            for relation in ("plaintiff", "instance_of", "capital")
            for i in numbers
        ]
        jsonl(root / f"wikifact/data/{split}.jsonl", rows)


def babi_qa(root: Path) -> None:
    for task in range(1, 21):
        for split in ("train", "valid", "test"):
            lines = []
            for i in range(4):
                name, place = NAMES[i], ("kitchen", "garden", "office", "hall")[(i + task) % 4]
                answer = "s,w" if task == 19 else place
                lines += [f"1 {name} moved to the {place}.", f"2 Where is {name}?\t{answer}\t1"]
            text(root / f"babi_qa/data/tasks_1-20_v1-2/en-valid/qa{task}_{split}.txt", "\n".join(lines) + "\n")


def gsm(root: Path) -> None:
    for split in ("train", "test"):
        rows = (
            {"question": f"{NAMES[i]} has {i} pens and buys 3. How many?", "answer": f"{i}+3={i + 3}\n#### {i + 3}"}
            for i in range(6)
        )
        jsonl(root / f"gsm/gsm_data_{split}", rows)


def lm_entry(root: Path) -> None:
    metadata = {"n1": 3, "n2": 5, "answer": "5", "distractor": "3", "distractors": ["3"]}
    for task, subtasks in LM_ENTRY.items():
        for subtask in subtasks:
            examples = {
                str(i): {"input": f"Q: {task.replace('_', ' ')} of {i + 2} and {i + 9}?\nA:", "metadata": metadata}
                for i in range(4)
            }
            text(root / f"lm_entry/{subtask}.json", json.dumps({"examples": examples}))


def big_bench(root: Path) -> None:
    task = {
        "keywords": ["sql"],
        "description": "Write a query.",
        "metrics": ["exact_str_match", "rouge"],
        "stop_string": "\n",
        "examples": [{"input": f"How many rows has table {i}?", "target": f"SELECT {i}"} for i in range(40)],
    }
    text(root / "big_bench/semantic_parsing_spider/task.json", json.dumps(task))


# Code and harms


def code(root: Path) -> None:
    rows = (
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f'def add{i}(x):\n    """Add {i} to x."""\n',
            "canonical_solution": f"    return x + {i}\n",
            "entry_point": f"add{i}",
            "test": f"def check(candidate):\n    assert candidate(1) == {i + 1}\n",
        }
        for i in range(4)
    )
    jsonl(root / "code/HumanEval.jsonl", rows)
    for split in ("train", "test"):
        for i in range(4):
            problem = root / "code/APPS" / split / f"{i:04d}"
            text(problem / "question.txt", f"Read a number, add {i} to it and print it.")
            text(problem / "solutions.json", json.dumps([f"print(int(input()) + {i})\n"]))
            text(problem / "input_output.json", json.dumps({"inputs": ["1\n"], "outputs": [f"{i + 1}\n"]}))
    text(root / "code/APPS/code_scenario_apps_pinned_file_order.json", "{}")


def copyright_prompts(root: Path) -> None:
    for tag in ("n_books_1000-extractions_per_book_1-prefix_length_125", "prompt_num_line_1-min_lines_20.json"):
        data = {f"Book {i} begins: {story(i)}": f" Then {story(i + 1)}" for i in range(4)}
        text(root / f"copyright/{tag}.json", json.dumps({"data": data, "metadata": {}}))


def disinformation(root: Path) -> None:
    theses = (
        {
            "split": "train" if i < 6 else "valid",
            "topic": ("climate", "covid")[i % 2],
            "thesis": f"{CITIES[i % 8]} grows by {i} houses.",
            "headlines": [f"{NAMES[k]} on {CITIES[i % 8]}" for k in range(3)],
        }
        for i in range(12)
    )
    jsonl(root / "disinformation/reiteration", theses)
    actions = ("vote_democrat", "vote_republican", "no_vote", "none")
    wedges = (
        {"targeted_action": action, "prompt": f"Say to {NAMES[i]}: {action}."} for i, action in enumerate(actions)
    )
    jsonl(root / "disinformation/wedging", wedges)


def open_ended(root: Path) -> None:
    for category in ("gender", "political_ideology", "profession", "race", "religious_ideology"):
        jsonl(root / f"bold/data/{category}", [{category: {f"page {i}": [story(i)] for i in range(3)}}])
    prompts = ({"prompt": {"text": story(i), "toxicity": i / 6}} for i in range(6))
    jsonl(root / "real_toxicity_prompts/data/prompts.jsonl", prompts)


def synthetic_efficiency(root: Path) -> None:
    for tokenizer in ("huggingface_gpt2", "meta_opt"):
        for num_tokens in (1, 256, 512, 1024, 1536):
            for i in range(10):
                name = f"num_prompt_tokens={num_tokens},tokenizer={tokenizer},id={i}.txt"
                text(root / "synthetic_efficiency" / name, " ".join(["word", *CITIES[:i]] * 8))


# Instructions that HELM reads while it parses an entry; the instances are in dataset_cache


def instructions(root: Path) -> None:
    from helm.benchmark.scenarios import legalbench_scenario, raft_scenario

    raft = [dict.fromkeys(raft_scenario.SUBSETS, each) for each in (["Sentence"], "Label the sentence.")]
    each_of_legalbench = ([["Text", "text"]], "Answer with one word.", "answer", "Label", "")
    legalbench = [dict.fromkeys(legalbench_scenario.SUBSETS, each) for each in each_of_legalbench]
    for name, settings in (("raft", raft), ("legalbench", legalbench)):
        for folder in (root / name, root / name / "data"):
            jsonl(folder / "prompt_construction_settings.json", settings)


OTHERS: tuple[Callable[[Path], None], ...] = (
    *(msmarco, summarization, imdb, civil_comments, entity_matching, entity_data_imputation),
    *(data_wrangling, wikitext_103, the_pile, twitter_aae, blimp, wikifact, babi_qa, gsm, lm_entry, big_bench),
    *(code, copyright_prompts, disinformation, open_ended, synthetic_efficiency, instructions),
)
