"""A large model that is streamed to the device, with a small draft model and without.

    python -m benchmarks.model_drafts [--shape S] [--draft-shape S] [--gpu-memory SIZE] [--tiny] [--out DIR]

Both models have random weights, those of the large one in 4 bits. Its choices are made to agree with the first `FORCED`
drafted tokens of each step; drafting, checking and rollback run as they are. Two workloads of 512 + 32 tokens are run:
as many requests as the draft's KV cache holds, with most of the model's own keys and values on the host, and as many as
both caches hold on the device. Then the same requests run without a draft, under the policy that the planner makes for
that: device memory that the draft would occupy holds weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.policy import Policy, Share
from flexgen_helm.commands.bench import rates_of, timed
from flexgen_helm.planning.dummy import open_dummy, random_model, write_model_directory
from flexgen_helm.planning.model_sizes import sizes_of
from flexgen_helm.planning.record import write_record
from flexgen_helm.planning.roofline import Workload

if TYPE_CHECKING:
    from engine import Engine
    from engine.executor import Answer
    from engine.schedule.segment import Segment
    from engine.schedule.timing import SweepTiming

ROOT = Path(__file__).resolve().parent.parent
FORCED = 3
"""Drafted tokens of each step that the model is made to choose."""
LLAMA_1B = {
    "shape": "llama-3-8b",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
"""Llama-3.2-1B's shape."""
TINY = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
}


def written(folder: Path, name: str, content: dict[str, Any]) -> str:
    """Write a file that names a shape and its changes."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return str(file)


def write_draft(shape: str, folder: Path) -> None:
    """Write a model of `shape` with random weights."""
    model = random_model(shape)
    model.save_pretrained(folder)
    write_model_directory(shape, folder)


@contextmanager
def forced(engine: Engine) -> Iterator[None]:
    """Make each step's first `FORCED` choices agree with the draft, and no more, whatever the logits say."""
    executor = engine.parts.lanes[0].executor
    sweep, vocabulary = executor.sweep, engine.parts.model.vocab_size

    def agreeing(batches: list[list[Segment]]) -> list[Answer]:
        answers = sweep(batches)
        for index, (one, following) in enumerate(pairwise(answers)):
            drafted, number = following.ask.drafted, len(one.ask.drafted)
            if following.ask.span is not one.ask.span or number >= len(drafted):
                continue
            if number < FORCED:
                answers[index] = one._replace(token=drafted[-1])
            elif one.token == drafted[-1]:
                answers[index] = one._replace(token=(one.token + 1) % vocabulary)
        return answers

    executor.__dict__["sweep"] = agreeing
    try:
        yield
    finally:
        del executor.__dict__["sweep"]


def measure(engine: Engine, load: Workload) -> dict[str, Any]:
    """Time `load` after a rehearsal with drafts, in which the passes of the draft are recorded."""
    drafts = None if engine.parts.draft is None else engine.parts.draft.drafts
    new = 2 if drafts is None else min(load.new, 16)
    rehearsal_s, _ = timed(engine, replace(load, own=load.own + load.new - new, new=new), seed=1)
    sweeps: list[SweepTiming] = []
    engine.observer = sweeps.append
    came = (0, 0) if drafts is None else (drafts.num_came, drafts.num_tried)
    seconds, num_sweeps = timed(engine, load)
    engine.observer = None
    found: dict[str, Any] = {
        "rows": str(load),
        "plan": asdict(engine.plan),
        "rehearsal_s": rehearsal_s,
        "seconds": seconds,
        "sweeps": num_sweeps,
        "new_tokens_s": load.num_requests * load.new / seconds,
        "each": [asdict(each) for each in sweeps],
    }
    decoding = [each for each in sweeps if not each.prefill_rows]
    found["decoding_s"] = sum(each.host_s + each.sweep_s for each in decoding)
    found["drafting_s"] = sum(each.host_s for each in decoding)
    if drafts is not None:
        found["came"], found["tried"] = drafts.num_came - came[0], drafts.num_tried - came[1]
        found["acceptance"] = drafts.pace.acceptance
        found["draft_pass_s"] = drafts.pace.steps.at(load.num_requests)
    print(
        f"  {found['rows']} in {found['seconds']:.2f} s, {found['sweeps']} sweeps, "
        f"{found['new_tokens_s']:.1f} tokens/s; decoding {found['decoding_s']:.2f} s, {found['drafting_s']:.2f} s "
        "of them between sweeps" + (f"; {found['came']} of {found['tried']} came" if "came" in found else ""),
        flush=True,
    )
    return found


def loads_of(engine: Engine, load: Workload) -> list[Workload]:
    """As many requests as the draft's cache holds, and as many as the model's holds on the device as well."""
    draft = engine.parts.draft
    assert draft is not None
    held = [
        room.budgets["device"] // (load.kept * room.row_bytes["device"])
        for room in (draft.cache.room, engine.parts.lanes[0].cache.room)
    ]
    return [replace(load, num_jobs=max(1, min(load.num_jobs, held[0], count))) for count in held]


def main(arguments: Sequence[str] | None = None) -> None:
    """Time and record both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-70b")
    parser.add_argument("--draft-shape", help="in place of Llama-3.2-1B's")
    parser.add_argument("--gpu-memory", default="16GB")
    parser.add_argument("--most", type=int, default=512, help="requests at most")
    parser.add_argument("--tiny", action="store_true", help="small shapes, and short requests")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args(arguments)
    begun = time.perf_counter()

    def told(what: str) -> None:
        print(f"{time.perf_counter() - begun:7.1f} s  {what}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape, draft_shape = options.shape, options.draft_shape or written(folder, "draft", LLAMA_1B)
        load = Workload(1, options.most, 0, 512, 32)
        if options.tiny:
            shape = written(folder, "tiny", {"shape": shape, **TINY})
            draft_shape = written(folder, "tiny-draft", {**LLAMA_1B, **TINY, "num_hidden_layers": 2})
            load = Workload(1, min(6, options.most), 0, 24, 12)
        write_draft(draft_shape, folder / "draft")
        told("the draft is written")
        base = Policy.from_mapping(
            {"compress-weight": 4} | ({} if options.tiny else {"gpu-memory": options.gpu_memory})
        )
        rates = rates_of(base, shape)
        told("  ".join(f"{key} {value:.4g}" for key, value in asdict(rates).items()))
        record: dict[str, Any] = {"forced": FORCED, "policy": base.as_mapping(), "rates": asdict(rates)}
        record |= {"shape": options.shape, "draft": LLAMA_1B if options.draft_shape is None else draft_shape}
        drafted = replace(base, draft_model=str(folder / "draft"), weights=Share(gpu=0, cpu=100))
        with open_dummy(shape, drafted) as engine:
            told("filled")
            loads = loads_of(engine, load)
            record["sizes"] = asdict(sizes_of(engine))
            with forced(engine):
                record["drafted"] = [measure(engine, each) for each in loads]
        write_record("model-drafts", record, options.out)
        told("measured with a draft")
        with open_dummy(shape, base) as engine:
            told(f"filled again, {engine.plan.weights}")
            record["plain_sizes"] = asdict(sizes_of(engine))
            record["plain"] = [measure(engine, each) for each in loads]
        pairs = zip(record["plain"], record["drafted"], strict=True)
        record["gains"] = [plain["seconds"] / drafted["seconds"] for plain, drafted in pairs]
        told(", ".join(f"{gain:.2f} x as fast" for gain in record["gains"]) + " with a draft")
        print(write_record("model-drafts", record, options.out))


if __name__ == "__main__":
    main()
