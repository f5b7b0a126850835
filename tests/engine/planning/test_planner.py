"""Protects: a plan stays within the memory it was made for; what does not fit is refused with what does."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine import Policy
from engine.errors import CapacityError
from engine.planning.hardware import Memory
from engine.planning.limits import Limits
from engine.planning.model_shape import ModelShape
from engine.planning.planner import Plan, make_plan
from engine.planning.sharing import Sharing
from engine.policy import Share
from engine.reading import parse_bytes

GB = 10**9
OPT_30B = ModelShape(
    unit_bytes=(1_233_000_000,) * 48 + (720_000_000,),
    embedding_bytes=0,
    outer_bytes=30_000_000,
    cache_row_bytes=48 * 2 * 7168 * 2,
    cache_layer_row_bytes=2 * 7168 * 2,
    hidden_row_bytes=7168 * 2,
    work_row_bytes=2 * (6 * 7168 + 3 * 4 * 7168 + 4 * 7168),
)
T4 = Memory(device=15 * GB, host=200 * GB, disk=0)


def used(plan: Plan, shape: ModelShape) -> dict[str, float]:
    """Bytes that a plan takes on each tier, reckoned anew."""
    rows = plan.limits.rows_per_sweep * shape.hidden_row_bytes / 100
    device = shape.weight_bytes * plan.weights.gpu / 100 + plan.activations.gpu * rows + plan.cache_budgets["device"]
    device += plan.limits.rows_per_batch * shape.work_row_bytes
    device += plan.limits.waiting_rows * shape.waiting_row_bytes
    device += shape.expanded_bytes if plan.expands_whole else shape.least_expanded_bytes
    if plan.weights.gpu < 100:  # two layers in transit, or what of them passes at once, and what is copied for good
        device += 2 * (shape.apart_bytes if plan.experts_apart else max(shape.unit_bytes)) + shape.outer_bytes
    host = shape.weight_bytes * plan.weights.cpu / 100 + plan.activations.cpu * rows + plan.cache_budgets["host"]
    host += plan.read_ahead_bytes
    disk = shape.weight_bytes * plan.weights.disk / 100 + plan.activations.disk * rows + plan.cache_budgets["disk"]
    return {"device": device, "host": host, "disk": disk}


def test_advice_holds_where_experts_are_expanded_otherwise_than_they_were() -> None:
    """With 100 % on the device its experts come by themselves; with the 24 % that have room then, two layers pass."""
    layer, count, row, kept = 94439186, 39, 16384, 28672
    shape = ModelShape(
        unit_bytes=(layer,) * count + (91192900,),
        expanded_bytes=6 * layer,
        least_expanded_bytes=layer // 2,
        apart_bytes=layer,
        waiting_row_bytes=row * 15,
        embedding_bytes=100000000,
        outer_bytes=row * 100,
        cache_row_bytes=kept * count,
        cache_layer_row_bytes=kept,
        hidden_row_bytes=row,
        work_row_bytes=row * 25,
    )
    memory = Memory(device=1464518409, host=1036010505, disk=10_000 * GB)
    for share in (Share(gpu=100, cpu=0), Share(gpu=24, cpu=26, disk=50)):
        policy = Policy(weights=share, offload_dir="/disk")
        with pytest.raises(CapacityError) as refused:
            make_plan(shape, policy, memory, on_cpu=False)
        heeded = heed(str(refused.value), policy, memory)
        assert heeded is not None
        assert_fits(make_plan(shape, heeded[0], memory, on_cpu=False), shape, memory)


def assert_fits(plan: Plan, shape: ModelShape, memory: Memory) -> None:
    taken, slack = used(plan, shape), 64
    assert taken["device"] <= memory.device + slack
    assert taken["host"] <= memory.host + slack
    assert taken["disk"] <= memory.disk + slack
    if memory.shared:  # each of the two is rounded
        assert taken["device"] + taken["host"] <= memory.host + 2 * slack
    assert min(plan.cache_budgets.values()) >= 0
    assert plan.limits.rows_per_sweep >= 1
    assert plan.limits.rows_per_batch >= 1
    assert plan.limits.cached_rows_per_batch >= 1


shapes = st.builds(
    lambda layer, count, head, embedding, row, kv, encoded: ModelShape(
        unit_bytes=(layer,) * count + (head,),
        expanded_bytes=[0, 6 * layer, 6 * layer][encoded],  # not, as matrices, and as experts for the greater part
        least_expanded_bytes=[0, 6 * layer, layer // 2][encoded],
        apart_bytes=[0, 0, max(head, layer // 10)][encoded],
        waiting_row_bytes=[0, 0, row * 15][encoded],
        embedding_bytes=embedding,
        outer_bytes=row * 100,
        cache_row_bytes=kv * count,
        cache_layer_row_bytes=kv,
        hidden_row_bytes=row,
        work_row_bytes=row * 25,
    ),
    layer=st.integers(10**6, 2 * GB),
    count=st.integers(1, 80),
    head=st.integers(10**6, GB),
    embedding=st.sampled_from([0, 10**8]),
    row=st.sampled_from([1024, 16384]),
    kv=st.sampled_from([512, 28672]),
    encoded=st.sampled_from([0, 1, 2]),
)
percents = st.integers(0, 100).flatmap(lambda gpu: st.tuples(st.just(gpu), st.integers(0, 100 - gpu)))
shares = percents.map(lambda two: Share(gpu=two[0], cpu=two[1], disk=100 - two[0] - two[1]))
memories = st.builds(
    lambda device, host, disk, shared: Memory(
        device=min(device, host) if shared else device, host=host, disk=disk, shared=shared
    ),
    device=st.integers(GB // 2, 80 * GB),
    host=st.integers(GB, 300 * GB),
    disk=st.sampled_from([0, 10 * GB, 10_000 * GB]),
    shared=st.booleans(),
)


@settings(deadline=None, max_examples=300)
@given(
    shape=shapes,
    memory=memories,
    weights=st.none() | shares,
    kv_cache=st.none() | shares,
    activations=st.none() | shares,
    on_cpu=st.booleans(),
)
def test_a_plan_fits_or_is_refused_with_one_that_does(
    shape: ModelShape,
    memory: Memory,
    weights: Share | None,
    kv_cache: Share | None,
    activations: Share | None,
    on_cpu: bool,
) -> None:
    policy = Policy(
        weights=weights, kv_cache=kv_cache, activations=activations, offload_dir="/disk" if memory.disk else None
    )
    assume(memory.disk or not policy.uses_disk)
    try:
        plan = make_plan(shape, policy, memory, on_cpu=on_cpu)
    except CapacityError as error:
        message = str(error)
    else:
        assert_fits(plan, shape, memory)
        for asked, given_ in ((weights, plan.weights), (kv_cache, plan.kv_cache), (activations, plan.activations)):
            assert asked is None or asked == given_
        return
    assert "\n" not in message
    assert re.search(r"\d GB|\d MB", message)
    heeded = heed(message, policy, memory)
    if heeded is None:
        return
    try:
        assert_fits(make_plan(shape, heeded[0], heeded[1], on_cpu=on_cpu), shape, heeded[1])
    except CapacityError as error:  # a larger device alone may not help; but it is large enough then
        if "raise gpu-memory" not in message or "device memory" in str(error):
            raise


def heed(message: str, policy: Policy, memory: Memory) -> tuple[Policy, Memory] | None:
    """The policy and memory that a refusal asks for; None where it says that nothing fits."""
    if match := re.search(r"weights: \{gpu: ([\d.]+), cpu: ([\d.]+), disk: ([\d.]+)\}", message):
        gpu, cpu, disk = map(float, match.groups())
        assert gpu + cpu + disk == pytest.approx(100)
        if disk:
            assert policy.offload_dir or "offload-dir" in message
            policy, memory = replace(policy, offload_dir="/disk"), replace(memory, disk=memory.disk or 10_000 * GB)
        return replace(policy, weights=Share(gpu=gpu, cpu=cpu, disk=disk)), memory
    if match := re.search(r"raise gpu-memory to ([\d.]+ [GM]B)", message):
        device = parse_bytes(match[1], "gpu-memory")
        return policy, replace(memory, device=device)
    if memory.shared and "of host memory that this process may still take; free" in message:
        return None
    if "set offload-dir" in message:
        return replace(policy, offload_dir="/disk"), replace(memory, disk=10_000 * GB)
    assert "all tiers together hold" in message
    return None


def test_too_little_host_memory_is_called_so_on_a_cpu() -> None:
    """Its device tier is host memory: no gpu-memory would make it more."""
    little = Memory(device=GB // 5, host=GB // 5, disk=0, shared=True)
    small = replace(OPT_30B, unit_bytes=(200_000_000,) * 2)
    cases = {
        Policy(): r"exceed the 0.2 GB of host memory that this process may still take; free 0\.\d GB, or raise",
        Policy(cpu_memory=GB): r"exceed the 0.2 GB that cpu-memory 1.0 GB leaves .* add 0\.\d GB to it",
        Policy(gpu_memory=GB // 5): r"exceed the 0.2 GB of device memory; raise gpu-memory to 0\.\d GB",
    }
    for policy, told in cases.items():
        with pytest.raises(CapacityError, match=told):
            make_plan(small, policy, little, on_cpu=True)


def test_a_cpu_that_weights_fill_nearly_has_room_for_sequences() -> None:
    """Logits take a part of what weights leave, so that the cache holds prompts of 1,200 tokens."""
    shape = ModelShape(
        unit_bytes=(11_800_000,) * 6 + (204_800_000,),
        embedding_bytes=0,
        outer_bytes=2048,
        cache_row_bytes=6 * 2 * 256 * 4,
        cache_layer_row_bytes=2 * 256 * 4,
        hidden_row_bytes=2048,
        work_row_bytes=4 * (6 * 512 + 3 * 1408 + 8 * 256),
    )
    memory = Memory(device=430_000_000, host=430_000_000, disk=0, shared=True)
    plan = make_plan(shape, Policy(), memory, on_cpu=True)
    assert_fits(plan, shape, memory)
    assert plan.weights.gpu == 100
    assert plan.cache_budgets["device"] > 2 * 1200 * shape.cache_row_bytes


def test_a_published_policy_fits_its_machine() -> None:
    plan = make_plan(OPT_30B, Policy.load("opt-30b-t4"), T4, on_cpu=False)
    assert_fits(plan, OPT_30B, T4)
    assert plan.weights == Share(gpu=20, cpu=80, disk=0)
    assert (plan.limits.sequences_per_batch, plan.limits.batches) == (48, 3)
    assert plan.cache_budgets["host"] > 70 * GB


def test_auto_fills_the_device_first_then_the_host_then_the_disk() -> None:
    def weights(memory: Memory, offload_dir: str | None = None) -> Share:
        plan = make_plan(OPT_30B, Policy(offload_dir=offload_dir), memory, on_cpu=False)
        assert_fits(plan, OPT_30B, memory)
        return plan.weights

    assert weights(Memory(device=80 * GB, host=200 * GB, disk=0)) == Share(gpu=100, cpu=0, disk=0)
    small = weights(T4)
    assert 5 < small.gpu < 25
    assert small.disk == 0
    tiny = weights(Memory(device=15 * GB, host=20 * GB, disk=1000 * GB), "/disk")
    assert tiny.gpu == small.gpu
    assert 20 < tiny.cpu < 34
    assert tiny.disk > 40


def test_auto_without_room_asks_for_a_disk() -> None:
    with pytest.raises(CapacityError, match=r"offload-dir.*%"):
        make_plan(OPT_30B, Policy(), Memory(device=15 * GB, host=20 * GB, disk=0), on_cpu=False)


def test_a_refusal_names_weights_and_memory() -> None:
    with pytest.raises(CapacityError, match=r"weights 59\.9 GB x 100 %.*15\.0 GB of device memory") as caught:
        make_plan(OPT_30B, Policy(weights=Share(gpu=100, cpu=0)), T4, on_cpu=False)
    assert "nearest that fits" in str(caught.value)
    with pytest.raises(CapacityError, match=r"59\.9 GB x 100 % = 59\.9 GB exceed the 30\.0 GB of host memory"):
        make_plan(OPT_30B, Policy(weights=Share(gpu=0, cpu=100)), replace(T4, host=30 * GB), on_cpu=False)
    disk = Policy(weights=Share(gpu=0, cpu=0, disk=100), offload_dir="/disk")
    with pytest.raises(CapacityError, match=r"59\.9 GB exceed the 20\.0 GB free in offload-dir /disk"):
        make_plan(OPT_30B, disk, replace(T4, disk=20 * GB), on_cpu=False)


def test_on_the_cpu_both_tiers_are_one_memory() -> None:
    memory = Memory(device=64 * GB, host=64 * GB, disk=0, shared=True)
    for activations in (Share(gpu=100, cpu=0), Share(gpu=50, cpu=50)):
        for cache in (Share(gpu=100, cpu=0), Share(gpu=0, cpu=100), Share(gpu=50, cpu=50), None):
            policy = Policy(weights=Share(gpu=0, cpu=100), kv_cache=cache, activations=activations)
            assert_fits(make_plan(OPT_30B, policy, memory, on_cpu=True), OPT_30B, memory)


def test_sizes_of_the_policy_are_upper_bounds() -> None:
    policy = Policy(gpu_batch_size=7, num_gpu_batches=2)
    limits = make_plan(OPT_30B, policy, T4, on_cpu=False).limits
    assert (limits.sequences_per_batch, limits.batches) == (7, 2)


def test_drafts_ride_where_the_link_sets_the_pace() -> None:
    """Rows are free while their arithmetic hides behind the transfer; on a T4, 5,400 do when all weights are sent."""

    def free_rows(gpu: float, *, on_cpu: bool = False) -> int:
        policy = Policy(weights=Share(gpu=gpu, cpu=100 - gpu))
        return make_plan(OPT_30B, policy, replace(T4, device=80 * GB), on_cpu=on_cpu).limits.free_rows

    assert 3000 <= free_rows(0) <= 5400
    assert free_rows(50) == free_rows(0) // 2
    assert 0 < free_rows(100) <= 200
    assert free_rows(0, on_cpu=True) == 0


def test_prompts_are_let_in_by_what_crosses_the_link() -> None:
    """For as many bytes as all 16-bit weights have, the same rows, whatever crosses; none are held back elsewhere."""

    def limits(policy: Policy, shape: ModelShape = OPT_30B, *, on_cpu: bool = False, disk: int = 0) -> Limits:
        return make_plan(shape, policy, replace(T4, device=80 * GB, disk=disk), on_cpu=on_cpu).limits

    half = limits(Policy(weights=Share(gpu=50, cpu=50)))
    assert half.admission is not None
    rows = 2 * half.admission.rows_beside_weights
    per_row = OPT_30B.cache_row_bytes / OPT_30B.weight_bytes
    assert half.admission.rows_beside_cached_row == pytest.approx(rows * per_row)
    coded = replace(OPT_30B, coded_layer_row_bytes=OPT_30B.cache_layer_row_bytes // 4)
    fewer = limits(Policy(weights=Share(gpu=50, cpu=50)), coded).admission
    assert fewer is not None
    assert fewer.rows_beside_cached_row == pytest.approx(rows * per_row / 4)
    assert fewer.rows_beside_weights == half.admission.rows_beside_weights
    weights_of_a_layer = OPT_30B.weight_bytes / 2 / len(OPT_30B.unit_bytes)
    assert half.rows_between_fetches is not None
    assert half.rows_between_fetches * 2 * weights_of_a_layer == pytest.approx(2.5e12, rel=1e-3)
    huge = replace(OPT_30B, unit_bytes=tuple(3 * size for size in OPT_30B.unit_bytes))
    assert limits(Policy(weights=Share(gpu=0, cpu=100)), huge).rows_between_fetches == 1024
    mixture = limits(Policy(weights=Share(gpu=0, cpu=100)), replace(huge, cpu_work_row_bytes=huge.work_row_bytes))
    assert mixture.rows_between_fetches == mixture.rows_per_batch > 1024
    on_host = limits(Policy(cpu_cache_compute=True, weights=Share(gpu=50, cpu=50)))
    assert on_host.rows_between_fetches is None
    assert on_host.admission is not None
    assert (on_host.admission.most_rows(10**6), on_host.admission.hidden_rows(10**6)) == (None, rows / 2)
    plain = replace(OPT_30B, is_plain=True)
    assert limits(Policy(cpu_cache_compute=True), plain).reads_on_host
    assert not limits(Policy(), plain).reads_on_host
    assert not on_host.reads_on_host  # the family's own attention gathers
    on_cpu = limits(Policy(), on_cpu=True)
    assert (on_cpu.admission, on_cpu.rows_between_fetches) == (None, None)
    from_disk = limits(Policy(weights=Share(gpu=0, cpu=50, disk=50), offload_dir="there"), disk=80 * GB)
    assert from_disk.admission is None


def test_a_longer_prompt_than_memory_is_kept_for_is_computed_in_pieces() -> None:
    """Of 30 % of what weights leave: as many rows as have room, on the CPU up to 4096 of a single prompt."""
    card = make_plan(OPT_30B, Policy(), T4, on_cpu=False).limits
    assert card.rows_per_piece == card.rows_per_batch
    layer = replace(OPT_30B, unit_bytes=(GB,), work_row_bytes=10**6, outer_bytes=0)
    rows = []
    for left in (1, 4, 20):
        memory = Memory(device=(1 + left) * GB, host=(1 + left) * GB, disk=0, shared=True)
        rows.append(make_plan(layer, Policy(), memory, on_cpu=True).limits.rows_per_piece)
    assert rows == [300, 1200, 4096]


def test_what_attention_gathers_is_reckoned_with_its_copies() -> None:
    """By hand: four staging buffers, numbers for what is encoded, and what is collected where it is not in place."""
    row, coded = OPT_30B.cache_layer_row_bytes, 8064
    shapes = {
        4 * row: replace(OPT_30B, reads_in_place=True),
        5 * row: OPT_30B,
        4 * coded + row: replace(OPT_30B, reads_in_place=True, coded_layer_row_bytes=coded),
        4 * coded + 2 * row: replace(OPT_30B, coded_layer_row_bytes=coded),
    }
    limits = {size: make_plan(shape, Policy(), T4, on_cpu=False).limits for size, shape in shapes.items()}
    taken = [size * each.cached_rows_per_batch for size, each in limits.items()]
    assert max(taken) - min(taken) <= max(limits)  # but for what is no whole row
    assert [each.gap_rows for each in limits.values()] == [18, 18, 65, 65]  # of 512 KiB


def test_hidden_states_that_the_device_has_no_room_for_are_on_the_host() -> None:
    """The device keeps them as long as it holds those of a micro-batch; a policy that says where is obeyed."""
    memory = Memory(device=16 * GB, host=100 * GB, disk=0)

    def plan(gpu: int, activations: Share | None = None) -> Plan | None:
        policy = Policy(weights=Share(gpu=gpu, cpu=100 - gpu), activations=activations)
        try:
            return make_plan(OPT_30B, policy, memory, on_cpu=False)
        except CapacityError:
            return None

    plans = [each for each in map(plan, range(100)) if each is not None]
    assert 10 < len(plans) < 40
    places = [each.activations.gpu for each in plans]
    assert places == sorted(places, reverse=True)
    assert set(places) == {0, 100}
    assert all(each.limits.rows_per_sweep >= each.limits.rows_per_batch for each in plans)
    assert max(each.limits.rows_per_sweep for each in plans) <= 1 << 17
    half = Policy(weights=Share(gpu=len(plans) - 1, cpu=50, disk=51 - len(plans)), offload_dir="there")
    full = replace(memory, host=int(0.5 * OPT_30B.weight_bytes), disk=1000 * GB)
    assert make_plan(OPT_30B, half, full, on_cpu=False).activations.gpu == 100  # the host has still less room
    said = plan(len(plans) - 1, Share(gpu=100, cpu=0))
    assert said is not None
    assert said.activations.gpu == 100
    assert said.limits.rows_per_sweep < said.limits.rows_per_batch


@pytest.mark.parametrize("megabytes", [400, 560, 1000, 3000])
def test_a_plan_for_the_cpu_holds_all_that_a_sweep_takes(megabytes: int) -> None:
    """Beside what every device holds, four chunks of logits, made in float32, and 2 KB of answers and tables a row.

    A model of 0.15 GB, and prompts of 1,200 tokens.
    """
    row = 4 * 512
    shape = ModelShape(
        unit_bytes=(10 * 10**6,) * 2 + (65 * 10**6,),
        embedding_bytes=65 * 10**6,
        outer_bytes=10**4,
        cache_row_bytes=2 * 2 * row,
        cache_layer_row_bytes=2 * row,
        hidden_row_bytes=row,
        work_row_bytes=20 * row,
    )
    memory = Memory(device=megabytes * 10**6, host=megabytes * 10**6, disk=0, shared=True)
    plan = make_plan(shape, Policy(), memory, on_cpu=True)
    limits = plan.limits
    taken = shape.weight_bytes + 4 * limits.logits_bytes + 1200 * shape.work_row_bytes
    taken += limits.rows_per_sweep * (row + 2048)
    taken += plan.cache_budgets["device"] + plan.cache_budgets["device"] // 2  # one of two layers, copied as it grows
    assert taken <= memory.host
    assert plan.cache_budgets["device"] >= 1208 * shape.cache_row_bytes
    assert limits.logits_bytes == min(128 << 20, (memory.device - shape.weight_bytes) // 16)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_weights_of_several_engines_lie_in_host_memory_once(count: int) -> None:
    """Each plans as one alone does that has the weights and its part of the rest."""
    policy, weights = Policy(weights=Share(gpu=10, cpu=90)), round(0.9 * OPT_30B.weight_bytes)
    host = weights + count * 40 * GB
    together = make_plan(OPT_30B, policy, replace(T4, host=host), on_cpu=False, sharing=Sharing(count=count))
    assert together == make_plan(OPT_30B, policy, replace(T4, host=weights + 40 * GB), on_cpu=False)


@pytest.mark.parametrize("count", [2, 4])
def test_engines_that_gather_hold_a_part_of_the_weights_each(count: int) -> None:
    """Device memory by hand: a part of each layer, three whole ones in transit, and the (tied) table as alone."""
    layer, table = OPT_30B.unit_bytes[0], OPT_30B.unit_bytes[-1]
    transit = 3 * layer + OPT_30B.outer_bytes
    own = (48 * layer / count + table + OPT_30B.outer_bytes) * 0.4
    sharing = Sharing(count=count, gather=True)
    enough = Memory(device=int(own + transit + 4 * GB), host=200 * GB, disk=0)
    policy = Policy(weights=Share(gpu=40, cpu=60))
    make_plan(OPT_30B, policy, enough, on_cpu=False, sharing=sharing)
    with pytest.raises(CapacityError, match=r"exceed the .* of device memory; the nearest that fits"):
        make_plan(OPT_30B, policy, replace(enough, device=int(own + transit)), on_cpu=False, sharing=sharing)
    greedy = make_plan(OPT_30B, Policy(), T4, on_cpu=False, sharing=sharing).weights.gpu
    assert greedy > 0.8 * count * make_plan(OPT_30B, Policy(), T4, on_cpu=False).weights.gpu


@settings(max_examples=100)
@given(shapes, memories, st.integers(2, 4), st.booleans())
def test_engines_that_share_weights_stay_within_memory_together(
    shape: ModelShape, memory: Memory, count: int, gather: bool
) -> None:
    try:
        plan = make_plan(shape, Policy(), memory, on_cpu=memory.shared, sharing=Sharing(count=count, gather=gather))
    except CapacityError:
        assume(False)
    assume(not plan.is_tight)
    rows = plan.limits.rows_per_sweep * shape.hidden_row_bytes / 100
    for_all = shape.weight_bytes * plan.weights.cpu / 100
    for_each = plan.activations.cpu * rows + plan.cache_budgets["host"] + plan.read_ahead_bytes
    if memory.shared:
        own = shape.weight_bytes * plan.weights.gpu / 100
        for_all += own if not gather else own - count
        for_each += plan.activations.gpu * rows + plan.cache_budgets["device"]
    assert for_all + count * for_each <= memory.host + 64 * count


def test_small_layers_on_the_device_are_computed_in_larger_micro_batches() -> None:
    """A host that asks for them one by one would be slower than a card that computes them."""
    small = replace(OPT_30B, unit_bytes=(7_000_000,) * 30 + (57_000_000,), work_row_bytes=40_000)
    card, resident = Memory(device=140 * GB, host=100 * GB, disk=0), Share(gpu=100, cpu=0)

    def rows(shape: ModelShape, weights: Share, memory: Memory = card) -> int:
        return make_plan(shape, Policy(weights=weights), memory, on_cpu=False).limits.rows_per_batch

    assert rows(small, resident) == 32768
    assert rows(small, Share(gpu=50, cpu=50)) == rows(OPT_30B, resident) == 8192
    assert rows(small, resident, replace(card, device=3 * GB)) == 16384
    assert rows(replace(small, unit_bytes=(1_000_000_000,) * 30), resident) == 8192


EXPERTS = ModelShape(
    unit_bytes=(11_500_000_000,) * 61 + (1_850_000_000,),
    embedding_bytes=1_850_000_000,
    outer_bytes=10**6,
    cache_row_bytes=61 * 2 * 128 * 320,
    cache_layer_row_bytes=2 * 128 * 320,
    hidden_row_bytes=7168 * 2,
    work_row_bytes=2 * (6 * 7168 + 3 * 18432 * 8 + 2 * 128 * 640),
    stored_part=0.5,
    expanded_bytes=23_000_000_000 * 3 // 2,
    least_expanded_bytes=1_000_000_000,
    apart_bytes=1_850_000_000,
    waiting_row_bytes=2 * (5 * 7168 + 8 * (7168 + 2048)),
)
"""DeepSeek-V3 in float8."""


def experts_plan(device: int, policy: Policy, **others: Any) -> Plan:
    return make_plan(EXPERTS, policy, Memory(device=device * GB, host=900 * GB, disk=0), on_cpu=False, **others)


def test_experts_are_expanded_and_brought_as_there_is_room() -> None:
    policy = Policy(weights=Share(gpu=0, cpu=100))
    plans = {device: experts_plan(device, policy) for device in (16, 80, 140)}
    found = {device: (plan.expands_whole, plan.experts_apart) for device, plan in plans.items()}
    assert found == {16: (False, True), 80: (False, False), 140: (True, False)}
    assert plans[140].limits.waiting_rows == 0  # nothing is expanded twice
    assert 0 < plans[16].limits.rows_per_sweep == plans[16].limits.waiting_rows < plans[80].limits.waiting_rows
    assert plans[80].limits.rows_per_sweep > plans[80].limits.waiting_rows


def test_where_few_could_wait_for_experts_none_do() -> None:
    """A sweep of as few rows as that would bring all weights for next to nothing."""
    policy = Policy(weights=Share(gpu=0, cpu=100))
    for megabytes in range(7_000, 12_000, 50):
        memory = Memory(device=megabytes * 10**6, host=900 * GB, disk=0)
        with suppress(CapacityError):
            limits = make_plan(EXPERTS, policy, memory, on_cpu=False).limits
            assert limits.waiting_rows == 0 or limits.waiting_rows >= 2 * limits.rows_per_batch
            assert limits.rows_per_sweep >= 2 * limits.rows_per_batch
    host = replace(policy, cpu_cache_compute=True)
    assert experts_plan(80, host).limits.waiting_rows == 0


def test_experts_come_with_their_layer_where_nothing_waits() -> None:
    """Each micro-batch would have them brought anew; and where each engine has a part of every layer."""
    streamed = Policy(weights=Share(gpu=0, cpu=100))
    for policy, others in (
        (replace(streamed, batch_invariant=True), {}),
        (streamed, {"sharing": Sharing(count=2, gather=True)}),
    ):
        with pytest.raises(CapacityError, match="layers and some experts of one expanded"):
            experts_plan(16, policy, **others)
        plan = experts_plan(60, policy, **others)
        assert (plan.expands_whole, plan.experts_apart) == (False, False)
        assert (plan.limits.waiting_rows > 0) is not policy.batch_invariant


def test_a_greedy_plan_lets_rows_wait_before_weights_stay() -> None:
    """The sizes of GPT-OSS-120B."""
    row, experts = 2880, 4
    packed = ModelShape(
        unit_bytes=(1_750_000_000,) * 36 + (1_160_000_000,),
        embedding_bytes=1_160_000_000,
        outer_bytes=6000,
        cache_row_bytes=36 * 2048,
        cache_layer_row_bytes=2048,
        hidden_row_bytes=2 * row,
        work_row_bytes=163_000,
        cpu_work_row_bytes=279_000,
        stored_part=0.27,
        expanded_bytes=9_640_000_000,
        least_expanded_bytes=482_000_000,
        apart_bytes=1_160_000_000,
        waiting_row_bytes=2 * (5 * row + experts * 2 * row),
    )
    plan = make_plan(packed, Policy(), Memory(device=16 * GB, host=200 * GB, disk=0), on_cpu=False)
    assert not plan.expands_whole
    assert plan.limits.waiting_rows >= 32768
    assert plan.limits.rows_per_sweep >= 104_000  # ten runs of 100 requests of 100 tokens behind 400
    assert plan.activations.gpu == 100
    assert 0 < plan.weights.gpu < 11  # what 6 % of the memory, kept for keys and values alone, would allow


def test_states_are_counted_and_a_policy_that_holds_none_is_refused_with_numbers() -> None:
    """Half of OPT-30B's layers with 2 MB of state each, of 48 MB a sequence."""
    shape = replace(OPT_30B, state_bytes=48_000_000, state_layer_bytes=2_000_000, continues=False)
    without = make_plan(OPT_30B, Policy.load("opt-30b-t4"), T4, on_cpu=False)
    plan = make_plan(shape, Policy.load("opt-30b-t4"), T4, on_cpu=False)
    assert without.limits.free_rows > 0
    assert plan.limits.free_rows == 0  # no drafts
    assert (without.limits.most_states, without.limits.continues) == (0, True)
    assert not plan.limits.continues
    work = plan.limits.rows_per_batch * OPT_30B.work_row_bytes + 3 * plan.limits.logits_bytes
    assert (
        plan.limits.most_states == work // 2 // (11 * 2_000_000) == 10
    )  # four in buffers, seven while one is taken on
    little = replace(shape, state_bytes=300 * GB)
    with pytest.raises(
        CapacityError, match=r"states of one sequence and a token's .* take 300\.0 GB, .*host 1[0-9.]+ GB"
    ):
        make_plan(little, Policy.load("opt-30b-t4"), T4, on_cpu=False)


OPT_1B = ModelShape(
    unit_bytes=(100_000_000,) * 24 + (206_000_000,),
    embedding_bytes=0,
    outer_bytes=10_000_000,
    cache_row_bytes=24 * 2 * 2048 * 2,
    cache_layer_row_bytes=2 * 2048 * 2,
    hidden_row_bytes=2048 * 2,
    work_row_bytes=2 * (6 * 2048 + 3 * 4 * 2048 + 4 * 2048),
    is_plain=True,
    reads_in_place=True,
)


@given(
    share=st.sampled_from([None, Share(gpu=0, cpu=100), Share(gpu=30, cpu=70)]),
    cache=st.sampled_from([None, Share(gpu=100, cpu=0), Share(gpu=0, cpu=100)]),
    device=st.integers(4 * GB, 90 * GB),
    on_cpu=st.booleans(),
)
def test_a_model_and_its_draft_fit_the_device_together(
    share: Share | None, cache: Share | None, device: int, on_cpu: bool
) -> None:
    host = 120 * GB
    memory = Memory(device=host if on_cpu else device, host=host, disk=0, shared=on_cpu)
    policy = Policy(weights=None if on_cpu else share, kv_cache=None if on_cpu else cache)
    try:
        plan = make_plan(OPT_30B, policy, memory, on_cpu=on_cpu, draft=OPT_1B)
    except CapacityError:
        return
    draft = plan.draft
    assert draft is not None
    both = used(plan, OPT_30B)["device"] + used(draft, OPT_1B)["device"]
    assert both <= memory.device + 128
    assert draft.weights.gpu == draft.activations.gpu == 100
    assert draft.cache_budgets["host"] == draft.cache_budgets["disk"] == 0
    if (
        not on_cpu and share is not None and cache is not None and cache.gpu == 100
    ):  # as many tokens as the model's, by their bytes
        tokens = [
            each.cache_budgets["device"] / shape.cache_row_bytes for each, shape in ((plan, OPT_30B), (draft, OPT_1B))
        ]
        # What the draft takes may make the model's micro-batches smaller, which leaves its cache more than was shared.
        assert 0.4 * tokens[0] <= tokens[1] <= 1.2 * tokens[0] + 200
        if device > 40 * GB:
            assert tokens[1] == pytest.approx(tokens[0], rel=0.1)


def test_a_draft_without_room_is_refused_with_the_numbers() -> None:
    policy = Policy(weights=Share(gpu=0, cpu=100))
    memory = replace(T4, device=5 * GB)
    make_plan(OPT_30B, policy, memory, on_cpu=False)
    with pytest.raises(
        CapacityError, match=r"^draft-model: its weights 2\.6 GB, .* exceed the .* GB that the model leaves"
    ):
        make_plan(OPT_30B, policy, memory, on_cpu=False, draft=OPT_1B)
    with pytest.raises(CapacityError) as alone:
        make_plan(OPT_30B, policy, replace(memory, device=GB), on_cpu=False)
    with pytest.raises(CapacityError) as both:
        make_plan(OPT_30B, policy, replace(memory, device=GB), on_cpu=False, draft=OPT_1B)
    assert str(both.value) == str(alone.value)
