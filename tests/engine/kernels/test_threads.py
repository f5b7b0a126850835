"""Protects: torch computes with no more threads than control groups grant the time of."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from models import save_model
from real_groups import made_group, run_in

from engine.kernels.threads import one_thread
from engine.memory.cores import usable_cores

_RUN = """
from engine import Engine, Job, Policy
import torch
found = [torch.get_num_threads()]
with Engine.from_pretrained(sys.argv[2], Policy(device="cpu")) as engine:
    engine.observer = lambda timing: found.append(torch.get_num_threads())
    engine.run([Job(prompt=[3, 4, 5], max_new_tokens=1)])
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(usable_cores() < 2, reason="there is but one core")
def test_an_engine_keeps_to_a_quota_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in the engine's own thread."""
    model = str(save_model(tmp_path, "llama"))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    with made_group("cpu", {"cpu.cfs_quota_us": "90000", "cpu.max": "90000 100000"}) as group:
        before, *threads = run_in(group, _RUN, model)
        assert before == len(os.sched_getaffinity(0))
        assert set(threads) == {1}
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert set(run_in(group, _RUN, model)) == {2}


def test_several_that_want_one_thread_leave_as_many_as_there_were() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    inside, left = threading.Event(), threading.Event()

    def second() -> int:
        inside.wait(10)
        with one_thread():
            assert left.is_set()
        return torch.get_num_threads()

    try:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(second)
            with one_thread():
                inside.set()
                time.sleep(0.1)  # the other one would enter meanwhile
                left.set()
            assert torch.get_num_threads() == asked.result(10) == 3
    finally:
        torch.set_num_threads(before)
