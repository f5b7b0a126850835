"""The modules for making and finishing runs, imported by the server from which `HelmSideThere` processes are forked."""

from __future__ import annotations

import gc
import threading

import helm.benchmark.adaptation.adapter_spec
import helm.benchmark.metrics.basic_metrics
import helm.benchmark.metrics.common_metric_specs
import helm.clients.auto_client  # noqa: F401
from tqdm import tqdm

# Any model's configuration and tokenizer import what takes seconds, whichever they are.
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast  # noqa: F401, TID253

import flexgen_helm.helm.requests.known_tokens
import flexgen_helm.sweeps.beside.helm_side  # noqa: F401
from flexgen_helm.workers.helper_program import outlive_signals

outlive_signals()
tqdm.set_lock(threading.RLock())  # its own one is a system semaphore, which a killed process leaves behind
gc.collect()
gc.freeze()  # memory that the garbage collector never touches stays shared
