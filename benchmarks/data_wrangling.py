"""FlexLLMGen's table of data wrangling on random weights: input and output tokens per second for each data set.

    python -m benchmarks.data_wrangling --shape opt-30b --gpu-memory 16GB

The numbers and lengths of requests are those of FlexLLMGen's README, with every prompt as long as the longest. Prompts
of a data set begin with the same demonstrations, which FlexLLMGen computed again for each request; here they are a
shared prefix. The row with nothing shared is the like-for-like figure; a row with part of the prompt shared is what
such prompts cost. Both rates count all tokens of all prompts. FlexLLMGen's figures are printed as published: they were
measured on another GPU, and nothing of them was run here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen_helm.commands.bench import bench_policy, rates_of, time_row
from flexgen_helm.planning.dummy import open_dummy
from flexgen_helm.planning.record import write_record
from flexgen_helm.planning.roofline import Workload
from flexgen_helm.terminal.errors import RunFailed

if TYPE_CHECKING:
    from engine import Engine
    from flexgen_helm.planning.roofline import Rates

ROOT = Path(__file__).resolve().parent.parent
SHARES = (0.0, 0.46)
SHARES_SAY = (
    "demonstrations written for a data set are 46 to 91 % of the tokens of FlexLLMGen's prompts, by its own prefixes "
    "(apps/data_wrangle/utils/constants.py); the default is the least of them"
)
SOURCE = "FMInference/FlexLLMGen, flexllmgen/apps/data_wrangle/README.md: one T4 of 16 GB, 200 GB of host memory"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the published table."""

    dataset: str
    samples: int
    """Requests in the data set; FlexLLMGen did not run those left over from whole batches."""
    input: int
    """Tokens of each padded prompt."""
    output: int
    published: dict[str, tuple[float, float]]
    """(seconds, input tokens per second, output tokens per second), by the model's shape."""

    def workload(self, share: float, samples: int | None) -> Workload:
        """Make the workload of a row; `share` of each prompt's tokens is the same in all prompts."""
        shared = int(self.input * share)
        return Workload(1, min(samples or self.samples, self.samples), shared, self.input - shared, self.output)

    def published_for(self, shape: str) -> dict[str, Any] | None:
        """The table's figures for `shape`, and how many requests its time and rate correspond to.

        That is less than `samples` if the last requests filled no batch. The only number that is not whole (opt-6.7b,
        DBLP-GoogleScholar) corresponds to 200 requests with DBLP-ACM's 1274 + 3 tokens: that rate counts 5 % too many
        tokens.
        """
        if shape not in self.published:
            return None
        seconds, tokens_s = self.published[shape]
        requests = round(seconds * tokens_s / (self.input + self.output), 1)
        return {"seconds": seconds, "tokens_s": tokens_s, "requests": requests, "source": SOURCE}


def _row(dataset: str, samples: int, lengths: tuple[int, int], *published: tuple[float, float]) -> Row:
    shapes = dict(zip(("opt-6.7b", "opt-30b"), published, strict=True))
    return Row(dataset=dataset, samples=samples, input=lengths[0], output=lengths[1], published=shapes)


ROWS = (
    _row("Fodors-Zagats", 189, (744, 3), (109.556, 1281.871), (541.550, 248.287)),
    _row("Beer", 91, (592, 3), (42.087, 1272.360), (238.58, 224.450)),
    _row("iTunes-Amazon", 109, (529, 3), (59.467, 966.178), (267.639, 198.775)),
    _row("Walmart-Amazon", 200, (748, 3), (126.538, 1186.992), (682.635, 220.030)),
    _row("Amazon-Google", 200, (876, 3), (144.593, 1215.828), (799.514, 219.884)),
    _row("DBLP-ACM", 200, (1274, 3), (207.513, 1230.767), (1119.272, 228.184)),
    _row("DBLP-GoogleScholar", 200, (1209, 3), (232.65, 1097.78), (1271.534, 190.636)),
    _row("Restaurant", 86, (123, 5), (10.397, 984.865), (60.310, 169.790)),
    _row("Buy", 65, (488, 10), (43.077, 739.876), (185.882, 160.747)),
    _row("Hospital", 200, (200, 3), (30.137, 1347.203), (158.329, 256.429)),
)


def time_rows(
    engine: Engine, rows: Iterable[Row], shares: Iterable[float], samples: int | None, shape: str, rates: Rates
) -> list[dict[str, Any]]:
    """Time each row with each share, and print it; the result of a row that fails is its error."""
    timed = []
    for row in rows:
        for share in shares:
            load = row.workload(share, samples)
            result: dict[str, Any] = {"dataset": row.dataset, "share": share, "published": row.published_for(shape)}
            try:
                result |= time_row(engine, load, rates)
                result["tokens_s"] = load.num_requests * (row.input + row.output) / result["seconds"]
            except RunFailed as error:
                result |= {"row": str(load), "error": str(error)}
            timed.append(result)
            print(table_line(result), flush=True)
    return timed


def table_line(result: dict[str, Any]) -> str:
    """Format one row of the printed table."""
    told = f"{result['dataset']:20} {result['share']:4.0%} shared  {result['row']:>18}"
    if "error" in result:
        return f"{told}  {result['error']}"
    published = result["published"]
    beside = f"; published {published['tokens_s']:.0f}" if published else ""
    return (
        f"{told}  {result['seconds']:8.2f} s, {result['fraction']:.0%} of the limit by {result['bound']}, "
        f"{result['tokens_s']:.0f} tokens/s{beside}"
    )


def main() -> None:
    """Time the table for a shape and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-30b")
    parser.add_argument("--datasets", nargs="+", choices=[row.dataset for row in ROWS], metavar="NAME")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="shares of a prompt shared by all")
    parser.add_argument("--samples", type=int, help="most requests of a row (default: the table's)")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--gpu-memory")
    parser.add_argument("--percent", nargs=6, type=int)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    if not all(0 <= share < 1 for share in options.shares) or (options.samples or 1) < 1:
        parser.error("--shares are from 0 to below 1, --samples at least 1")
    policy = bench_policy(options.policy, options.gpu_memory, options.percent)
    rates = rates_of(policy, options.shape)
    rows = [row for row in ROWS if options.datasets is None or row.dataset in options.datasets]
    with open_dummy(options.shape, policy) as engine:
        content = {
            "shape": options.shape,
            "policy": policy.as_mapping(),
            "plan": asdict(engine.plan),
            "rates": asdict(rates),
            "shares": SHARES_SAY,
            "rows": time_rows(engine, rows, options.shares, options.samples, options.shape, rates),
        }
    name = "-".join(
        filter(
            None,
            ("data-wrangling", Path(options.shape).stem if "/" in options.shape else options.shape, options.gpu_memory),
        )
    )
    print(write_record(name, content, options.out))


if __name__ == "__main__":
    main()
