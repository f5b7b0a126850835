"""The thread that brings weights to their places behind the first sweep."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence

import torch

from engine.memory import accelerator
from engine.weights.store import WeightStore


class Loader:
    """Brings weights, a parameter at each step; whoever waits for some is told if they cannot be brought."""

    def __init__(
        self,
        loading: Iterator[None],
        stores: Sequence[WeightStore],
        device: torch.device,
        explained: Callable[[BaseException], BaseException],
    ) -> None:
        """loading: the steps, for `stores`. explained: makes an error of the engine of any. Begins at once."""
        self._loading, self._stores, self._device, self._explained = loading, stores, device, explained
        self._is_closing = False
        self.loaded = math.inf
        """When all weights were in place, by `time.perf_counter`."""
        self._thread = threading.Thread(target=self._load, name="flexgen-load", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Bring no more; returns when the thread has ended."""
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
                if store.digest is not None:  # `loading`, which ends it otherwise, may not have begun
                    store.digest.give_up(fault)
        finally:
            if isinstance(self._loading, Generator):  # it may be writing down encoded weights, out of memory that goes
                self._loading.close()
