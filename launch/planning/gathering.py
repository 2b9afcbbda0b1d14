r"""What ZeRO-3 gathers, how often, and how much of it is alive at once.

ZeRO-3 walks the modules in the order in which a step uses them. Before a module runs, its weights are all-gathered if
they are not there; after it, they are released unless they are small (persistent) or come again soon (reuse distance);
and while it runs, the next ones are prefetched. This file walks the same way over :class:`WeightGroup` s, by the rules
of ``deepspeed/runtime/zero/partitioned_param_coordinator.py``, so that bytes and live weights come from one place.

The walk of one micro-batch, with R = recomputed (checkpointed) prelude and coda blocks::

    embed, prelude blocks, norm, core of each scale, fusion, coda blocks, norm, head          forward
    the same backwards; an R block is walked forward once more before it is walked backward

A core is a leaf: one group, walked once forward and once backward however often it loops. Recomputation inside it
gathers nothing. A recomputation ends when its last saved tensor is there, in the block's last module, whose weights
stay until that module's backward: it is not gathered a third time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from launch.planning.engine_settings import EngineSettings
from launch.planning.weights import ModelWeights, Weight, WeightGroup, model_weights

if TYPE_CHECKING:
    from model.config import IceConfig


@dataclass(frozen=True)
class Placement:
    """Which ranks share a weight: all of them, or for routed experts those that hold the same ones.

    Attributes:
        ranks: N, of the whole run.
        expert_parallel_size: Ranks over which the experts of a layer are spread; divides N.
    """

    ranks: int
    expert_parallel_size: int = 1

    def local_elements(self, weight: Weight) -> int:
        """Numbers of ``weight`` a rank has once it is gathered."""
        return weight.elements // self.expert_parallel_size if weight.expert else weight.elements

    def owners(self, weight: Weight) -> int:
        """Ranks over which ZeRO shards it."""
        return self.ranks // self.expert_parallel_size if weight.expert else self.ranks

    def shard_elements(self, weight: Weight) -> int:
        """Numbers of ``weight`` a rank owns, padded to equal shards."""
        return -(-self.local_elements(weight) // self.owners(weight))


@dataclass(frozen=True)
class Use:
    """A group's turn in the walk; ``phase`` names it for the reader."""

    group: WeightGroup
    phase: str


@dataclass
class Gathering:
    """The walk's account, of one micro-batch in the steady state.

    ``gathered``: elements of each weight's all-gathers, padding included, by ranks that take part. ``calls`` of them.
    ``live_elements``: gathered and held at each use, by its phase and group; weights whose one owner is this rank are
    used in place and not counted.
    """

    gathered: dict[int, int] = field(default_factory=dict)
    calls: int = 0
    live_elements: dict[tuple[str, str], int] = field(default_factory=dict)


def walk(weights: ModelWeights, *, recompute_once: bool, extra_reads: int = 0, probes: int = 0) -> list[Use]:
    """The uses of one micro-batch.

    Args:
        weights: The model's.
        recompute_once: Prelude and coda blocks are checkpointed.
        extra_reads: Depths read besides the last, each by another pass through coda and head.
        probes: More such passes, without a backward.
    """
    once = [WeightGroup("embed", weights.embedding.weights)]
    blocks: list[tuple[WeightGroup, ...]] = [(group,) for group in once]
    blocks += list(weights.prelude)
    blocks += [(weights.prelude_norm,), *((core,) for core in weights.cores)]
    blocks += [(group,) for group in weights.fusion]
    head = weights.head if weights.head.weights else WeightGroup("head", weights.embedding.weights)
    read_out = [*weights.coda, (weights.norm,), (head,)]
    for _ in range(1 + extra_reads):
        blocks += read_out
    checkpointed = set(weights.prelude) | set(weights.coda)
    uses = [Use(group, "forward") for block in blocks for group in block]
    if probes:
        blocks += [(group,) for group in weights.depth_heads]
        uses += [Use(group, "forward") for group in weights.depth_heads]
        uses += [Use(group, "forward") for _ in range(probes) for block in read_out for group in block]
    for block in reversed(blocks):
        if recompute_once and block in checkpointed:
            uses.append(Use(block[-1], "backward"))
            uses += [Use(group, "recompute") for group in block[:-1]]
            uses += [Use(group, "backward") for group in reversed(block[:-1])]
        else:
            uses += [Use(group, "backward") for group in reversed(block)]
    return uses


@functools.lru_cache(maxsize=1024)
def walked(
    config: IceConfig,
    placement: Placement,
    settings: EngineSettings,
    recompute_once: bool,
    extra_reads: int = 0,
    probes: int = 0,
) -> Gathering:
    """The account of a model's micro-batch, remembered: a search asks for the same one many times."""
    uses = walk(model_weights(config), recompute_once=recompute_once, extra_reads=extra_reads, probes=probes)
    return gather(uses, placement, settings)


def gather(uses: list[Use], placement: Placement, settings: EngineSettings) -> Gathering:
    """Follow ``uses`` as the engine does in a step after the one in which it learnt them."""
    account = Gathering()
    available: dict[str, int] = {}
    persistent = {
        weight.name
        for use in uses
        for weight in use.group.weights
        if placement.local_elements(weight) <= settings.param_persistence_threshold
    }
    available.update(dict.fromkeys(persistent, 0))
    upcoming = [(turn, weight) for turn, use in enumerate(uses) for weight in use.group.weights]
    fetched_for = dict.fromkeys((weight.name for _, weight in upcoming), -1)
    persistent_elements = sum(
        placement.local_elements(weight)
        for name, weight in {weight.name: weight for _, weight in upcoming}.items()
        if name in persistent and placement.owners(weight) > 1
    )
    live, cursor = persistent_elements, 0

    def fetch(wanted: list[Weight]) -> None:
        nonlocal live
        by_owners: dict[tuple[int, bool], int] = {}  # routed experts have a process group of their own
        for weight in wanted:
            owners = placement.owners(weight)
            available[weight.name] = placement.local_elements(weight) if owners > 1 else 0
            live += available[weight.name]
            if owners > 1:
                key = owners, weight.expert
                by_owners[key] = by_owners.get(key, 0) + placement.shard_elements(weight) * owners
        for (owners, _), elements in by_owners.items():
            account.gathered[owners] = account.gathered.get(owners, 0) + elements
            account.calls += 1

    for turn, use in enumerate(uses):
        fetch([weight for weight in use.group.weights if weight.name not in available])
        while cursor < len(upcoming) and upcoming[cursor][0] <= turn:
            fetched_for[upcoming[cursor][1].name] = upcoming[cursor][0]
            cursor += 1
        room = min(settings.max_live_parameters - live, settings.prefetch_bucket_size)
        ahead: list[Weight] = []
        while cursor < len(upcoming) and sum(map(placement.local_elements, ahead)) < room:
            next_turn, weight = upcoming[cursor]
            if weight.name not in available and weight not in ahead:
                ahead.append(weight)
            fetched_for[weight.name] = next_turn
            cursor += 1
        fetch(ahead)
        key = (use.phase, use.group.name)
        account.live_elements[key] = max(live, account.live_elements.get(key, 0))
        leaving = [w for w in use.group.weights if w.name not in persistent and fetched_for[w.name] <= turn]
        soon = set(_within(uses[turn + 1 :], placement, settings.max_reuse_distance)) if leaving else set()
        for weight in leaving:
            if weight.name not in soon:
                live -= available.pop(weight.name)
    return account


def _within(later: list[Use], placement: Placement, distance: int) -> Iterator[str]:
    """Names of the weights used within ``distance`` elements."""
    passed = 0
    for use in later:
        if passed >= distance:
            return
        for weight in use.group.weights:
            yield weight.name
            passed += placement.local_elements(weight)


def persistent_gather(weights: ModelWeights, placement: Placement, settings: EngineSettings) -> dict[int, int]:
    """Elements gathered once after each optimizer step, for the small parameters that stay: by ranks that take part."""
    gathered: dict[int, int] = {}
    for weight in weights.weights():
        owners = placement.owners(weight)
        if placement.local_elements(weight) <= settings.param_persistence_threshold and owners > 1:
            gathered[owners] = gathered.get(owners, 0) + placement.shard_elements(weight) * owners
    return gathered
