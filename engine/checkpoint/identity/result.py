"""The parts of a model and a policy that can change a result, for cache keys, and the comparison of two of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from engine.checkpoint.config import read_config
from engine.checkpoint.description import ModelDescription, describe
from engine.checkpoint.gguf.index import GGUF_INDEX
from engine.checkpoint.identity.modelling_source import source_digest, source_files
from engine.checkpoint.identity.sampled import sampled_fingerprint
from engine.checkpoint.identity.weight_digest import weights_digest
from engine.checkpoint.opened_weights import OpenedWeights
from engine.checkpoint.quantized.declared import declared_quantization
from engine.checkpoint.side_files import MAX_SIDE_BYTES, found_side_files
from engine.checkpoint.weight_files import all_weight_files
from engine.errors import CheckpointError
from engine.planning.hardware import resolve_device, resolve_dtype
from engine.policy import Policy
from engine.reading import find_file, read_bytes

NUMERICS_VERSION = 4
"""Raised by hand whenever a change of the engine can change results beyond rounding."""

Identity = dict[str, str | int | None]

_DIGESTS = {
    "weights": "weights",
    "files": "configuration, tokenizer or chat template files",
    "source": "transformers' source of the family",
}
"""A description of each digest in an identity."""
_SHOWN = 12
"""The number of characters of a digest in messages."""


def result_identity(model: str, policy: Policy) -> Identity:
    """The parts of model and policy that can change a result; reads the weight files unless their digest is stored.

    Placement, batch sizes, device and package versions are not part of it, so results carry over from one policy to
    another and from one machine to another.
    """
    path = Path(describe(model).path)
    source = OpenedWeights(path)
    try:
        return {"weights": weights_digest(path, source), **identity_beside_weights(model, policy)}
    finally:
        source.close()


def identity_beside_weights(model: str, policy: Policy) -> Identity:
    """`result_identity` without the digest of the weight files (see `WeightDigest`), so that it is known at once."""
    description = describe(model)
    path = Path(description.path)
    return {
        "files": _side_digest(path),
        "source": source_digest(read_config(path)),
        **result_settings(description, policy),
        **_left_unrounded(path),
    }


def _left_unrounded(path: Path) -> Identity:
    """What a quantized checkpoint's format rounds and the engine does not; present only if there is such a thing."""
    config = read_config(path)
    if declared_quantization(path, config.get("quantization_config")) is None:
        return {}
    from engine.checkpoint.quantized.methods import left_unrounded  # loads torch

    found = left_unrounded(path, config)
    return {} if found is None else {"left_unrounded": found}


def check_beside_weights(earlier: Identity, model: str, policy: Policy) -> None:
    """Raise `CheckpointError` if `identity_beside_weights` differs from its `earlier` value."""
    now = identity_beside_weights(model, policy)
    if now != earlier:
        raise CheckpointError(f"{model} has other {differences(earlier, now)} than when it was opened; start again")


def result_settings(description: ModelDescription, policy: Policy) -> Identity:
    """The part of an identity that is not a digest: settings of the policy, and the engine's own version."""
    return {
        "dtype": resolve_dtype(policy.dtype, description.dtype, resolve_device(policy.device)),
        "compress_weight": policy.weight_bits,
        "compress_cache": policy.compress_cache,
        "numerics": NUMERICS_VERSION,
        # Only where it is: answers of releases that did not have it keep their keys.
        **({"batch_invariant": 1} if policy.batch_invariant else {}),
    }


def sampled_identity(model: str, policy: Policy) -> Identity:
    """`result_identity` as earlier releases defined it: by samples of the weights, without the family's source.

    Empty for models that they could not run.
    """
    description = describe(model)
    weights = sampled_fingerprint(Path(description.path))
    return {} if weights is None else {"weights": weights, **result_settings(description, policy)}


def last_change(model: str) -> float:
    """The time of the latest write or replacement of a file that the identity covers, in seconds since the Epoch.

    An answer that was computed later comes from exactly these weights, files and source.
    """
    path = Path(describe(model).path)
    files = [path, *all_weight_files(path), *found_side_files(path), *source_files(read_config(path)).values()]
    return max(max(file.stat().st_ctime, file.lstat().st_ctime) for file in files)  # of links, and what they lead to


def differences(earlier: Mapping[str, object], now: Mapping[str, object]) -> str:
    """The differences between two identities in words, with both digests: "weights (sha256 1f2e… then, 3d4c… now)"."""
    told = [
        f"{_DIGESTS[key]} (sha256 {str(earlier[key])[:_SHOWN]} then, {str(now[key])[:_SHOWN]} now)"
        if key in _DIGESTS
        else f"{key} ({earlier.get(key)} then, {now.get(key)} now)"
        for key in dict.fromkeys([*now, *earlier])
        if earlier.get(key) != now.get(key) and (key not in _DIGESTS or (key in earlier and key in now))
    ]
    return " and ".join(told)


def _side_digest(path: Path) -> str:
    """The hex digest of all files that hold no weights and can change token ids, prompts or results."""
    digest = hashlib.sha256()
    index = path / GGUF_INDEX  # tells in which order rows of the weights are taken
    for file in (*found_side_files(path), *([index] if find_file(index, CheckpointError) else [])):
        content = read_bytes(file, CheckpointError, limit=MAX_SIDE_BYTES)
        digest.update(file.relative_to(path).as_posix().encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()
