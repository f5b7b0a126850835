"""An engine on many hosts, with the interface of an engine in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.asking.front import Front
from engine.asking.pending import Call
from engine.errors import EngineError, UnsupportedError
from engine.hosts.driver import Driver
from engine.hosts.expected import Expected
from engine.hosts.host import Supply
from engine.hosts.messages import HostOpened, Opening
from engine.job import Completion, Job
from engine.planning.planner import Plan
from engine.schedule.timing import SweepTiming
from engine.workers.handing_out.sharing_out import Room

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HostsEngine(Front):
    """Runs jobs like `engine.Engine`, on hosts that join and leave (see `Driver`).

    Safe to use from several threads; a context manager.
    """

    def __init__(
        self, opening: Opening, supply: Supply, expected: Expected, *, path: str, digest: Callable[[], str | None]
    ) -> None:
        """Open a model on the hosts of `supply`; returns when the first host has opened it, or raises why none has.

        `path` is the model's directory on this machine; `digest` computes the digest of its weight files, in a thread
        of its own.
        """
        self.policy = opening.policy
        self.observer: Callable[[SweepTiming], None] | None = None
        """Called after each sweep, before its completions are delivered, in a thread of a host; never concurrently."""
        self.num_sweeps = 0
        """Sweeps so far, of all hosts together."""
        self._observing = threading.Lock()
        self._path = path
        self._digest: str | None = None
        self._digest_error: BaseException | None = None
        self._driver = Driver(opening, supply, expected=expected, observe=self._observe)
        self._digesting = threading.Thread(target=self._find_digest, args=(digest,), name="flexgen-digest", daemon=True)
        self._digesting.start()
        try:
            self._opened = self._driver.wait_until_open()
        except BaseException:
            self._driver.close(wait_s=0)
            raise

    @property
    def parts(self) -> Any:
        """Raises `UnsupportedError`: the parts are on other hosts."""
        raise UnsupportedError("an engine on other hosts has no parts here; open the model on one device")

    @property
    def opened(self) -> HostOpened:
        """What the first host has reported about its engine."""
        return self._opened

    @property
    def hosts(self) -> tuple[tuple[str, HostOpened], ...]:
        """The hosts that are open now: their names and what they have reported."""
        return self._driver.hosts

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the devices in use, as "host/device"."""
        return tuple(f"{name}/{device}" for name, opened in self.hosts for device in opened.devices)

    @property
    def sweep(self) -> Room:
        """The work that fills a sweep of the smallest host."""
        sweeps = [opened.sweep for _, opened in self.hosts] or [self._opened.sweep]
        return Room(rows=min(each.rows for each in sweeps), jobs=min(each.jobs for each in sweeps))

    @property
    def window(self) -> int | None:
        """Most positions of a sequence; None if the model sets no limit."""
        return self._opened.window

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._opened.vocab_size

    @property
    def pad_token(self) -> int:
        """The padding token: the model's, else its end-of-text token."""
        return self._opened.pad_token

    @property
    def plans(self) -> Mapping[str, Plan]:
        """The plan of each device's placement, by name of the hosts that are open now."""
        return {name: opened.plan for name, opened in self.hosts if opened.plan is not None}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        from engine.checkpoint.tokenizer import load_tokenizer  # it imports transformers, which few callers need

        return load_tokenizer(Path(self._path))

    @property
    def deaths(self) -> Sequence[str]:
        """How each host was lost."""
        return tuple(self._driver.deaths)

    @property
    def given_up(self) -> Mapping[str, str]:
        """Hosts that are not replaced: name -> why."""
        return dict(self._driver.given_up)

    def weights_digest(self) -> str | None:
        """See `Engine.weights_digest`; the weights of this machine, which every host that answers has too."""
        self._digesting.join()
        if self._digest_error is not None:
            raise self._digest_error.with_traceback(None)
        return self._digest

    def compare_with_stock(
        self,
        jobs: Sequence[Job],
        completions: Sequence[Completion],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Any:
        """Raises `UnsupportedError`: comparing with stock layers needs the whole model in one process."""
        raise UnsupportedError("comparing with stock layers needs the model on this machine; leave --ray out")

    def close(self) -> None:
        """End the hosts after the current sweep, whose completions are delivered; calls that still wait fail."""
        self._driver.close()

    def _find_digest(self, digest: Callable[[], str | None]) -> None:
        try:
            self._digest = digest()
        except BaseException as error:
            self._digest_error = error if isinstance(error, EngineError) else EngineError(str(error))
            self._driver.fail(self._digest_error)
        else:
            self._driver.trust(self._digest)

    def _submit(self, call: Call) -> None:
        self._driver.submit(call)

    def _abandon(self, call: Call) -> None:
        self._driver.abandon(call)

    def _observe(self, timing: SweepTiming) -> None:
        with self._observing:
            self.num_sweeps += 1
            if self.observer is not None:
                self.observer(timing)
