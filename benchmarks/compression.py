"""The accuracy of compressed weights and caches: `python -m benchmarks.compression --model DIR --texts FILE …`.

Scores real texts with a real model uncompressed and with each compression, and prints how much log-probabilities
change: the mean change of a token (the change of the perplexity's logarithm), the mean and the 99th percentile of its
absolute value, and how often the text's token is the most likely one both before and after, or neither (a hit). The
first tokens of a text, which attend to few others, are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from engine import Engine, Job
from flexgen_helm.planning.record import write_record

ROOT = Path(__file__).resolve().parent.parent
_BEYOND = 32
"""Number of first tokens of each text that are left out."""
SETTINGS: dict[str, dict[str, int]] = {
    "as it is": {},
    "weights 8": {"compress-weight": 8},
    "weights 4": {"compress-weight": 4},
    "cache 8": {"compress-cache": 8},
    "cache 4": {"compress-cache": 4},
    "both 8": {"compress-weight": 8, "compress-cache": 8},
    "both 4": {"compress-weight": 4, "compress-cache": 4},
}


def passages(files: list[Path], count: int, characters: int) -> list[str]:
    """Return `count` pieces of `characters` each, spread evenly over the files' text."""
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    if len(text) < count * characters:
        raise SystemExit(f"{len(text)} characters of text are fewer than {count} x {characters}")
    step = len(text) // count
    return [text[first : first + characters] for first in range(0, step * count, step)]


def score(model: str, policy: dict[str, Any], texts: list[str], window: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Score texts: log-probabilities beyond `_BEYOND`, whether tokens are the likeliest, and bytes of the weights."""
    with Engine.from_pretrained(model, policy=policy) as engine:
        prompts = [engine.tokenizer(text)["input_ids"][:window] for text in texts]
        done = engine.run([Job(prompt=prompt, max_new_tokens=0, prompt_logprobs=True) for prompt in prompts])
        stored = sum(sum(tiers.values()) for tiers in engine.parts.weights.placed_bytes().values())
    for completion in done:
        if completion.error is not None:
            raise SystemExit(str(completion.error))
    logprobs = [value for completion in done for value in (completion.prompt_logprobs or ())[_BEYOND:]]
    greedy = [value for completion in done for value in (completion.prompt_greedy or ())[_BEYOND:]]
    return np.array(logprobs, dtype=float), np.array(greedy), stored


def compare(before: np.ndarray, greedy: np.ndarray, after: np.ndarray, greedy_after: np.ndarray) -> dict[str, float]:
    """Compute the changes per token, in nats."""
    change = np.abs(after - before)
    return {
        "mean_logprob": float(after.mean()),
        "mean_logprob_change": float((after - before).mean()),
        "mean_size_of_change": float(change.mean()),
        "percentile_99_of_change": float(np.percentile(change, 99)),
        "hits": float(greedy_after.mean()),
        "hits_unchanged": float((greedy == greedy_after).mean()),
    }


def main() -> None:
    """Score, compare, print a table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a model")
    parser.add_argument("--model-name", help="what the record calls it (default: its directory)")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="text files")
    parser.add_argument("--count", type=int, default=64, help="passages")
    parser.add_argument("--characters", type=int, default=2000, help="of a passage")
    parser.add_argument("--window", type=int, default=512, help="most tokens of a passage")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default="compression", help="name of the record")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    texts = passages(options.texts, options.count, options.characters)
    base: tuple[np.ndarray, np.ndarray] | None = None
    rows: dict[str, dict[str, float]] = {}
    print(f"{'':10} {'weights':>9} {'log p':>9} {'change':>9} {'|change|':>9} {'99 %':>9} {'same hit':>9}")
    for name, settings in SETTINGS.items():
        logprobs, greedy, stored = score(options.model, {"device": options.device, **settings}, texts, options.window)
        base = base or (logprobs, greedy)
        row = rows[name] = {**compare(*base, logprobs, greedy), "weight_bytes": stored}
        print(
            f"{name:10} {stored / 1e6:7.1f}MB {row['mean_logprob']:9.4f} {row['mean_logprob_change']:9.4f} "
            f"{row['mean_size_of_change']:9.4f} {row['percentile_99_of_change']:9.4f} {row['hits_unchanged']:9.2%}",
            flush=True,
        )
    content = {
        "model": options.model_name or Path(options.model).name,
        "texts": [file.name for file in options.texts],
        "passages": len(texts),
        "tokens": 0 if base is None else len(base[0]),
        "tokens_left_out_of_each": _BEYOND,
        "settings": rows,
    }
    print(write_record(options.name, content, options.out))


if __name__ == "__main__":
    main()
