"""The thread that loads weights while the first sweep is already running."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence

import torch

from engine.memory import accelerator
from engine.weights.store import WeightStore


class Loader:
    """Loads weights, a parameter at each step; an error is raised to everyone who waits for weights."""

    def __init__(
        self,
        loading: Iterator[None],
        stores: Sequence[WeightStore],
        device: torch.device,
        explained: Callable[[BaseException], BaseException],
    ) -> None:
        """Start. loading: the steps, which load into `stores`. explained: converts any exception to an engine error."""
        self._loading, self._stores, self._device, self._explained = loading, stores, device, explained
        self._is_closing = False
        self.loaded = math.inf
        """When all weights were in place, by `time.perf_counter`."""
        self._thread = threading.Thread(target=self._load, name="flexgen-load", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop loading; returns when the thread has ended."""
        self._is_closing = True
        self._thread.join()

    def _load(self) -> None:
        try:
            accelerator.make_current(self._device)
            for _ in self._loading:
                if self._is_closing:
                    return
            self.loaded = min(self.loaded, time.perf_counter())
        except BaseException as error:
            fault = self._explained(error)
            for store in self._stores:
                store.give_up(fault)
                if store.digest is not None:  # `loading` fails the digest itself, unless it has not begun
                    store.digest.give_up(fault)
        finally:
            if isinstance(self._loading, Generator):  # it may still be writing encoded weights
                self._loading.close()
