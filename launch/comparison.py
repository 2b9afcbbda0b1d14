"""Members of a comparison made equal: in parameters, in training FLOPs of the executed loops, or in KV-cache bytes.

    {
      "name": "parameters",
      "config": "configs/ice_tiny.json",
      "equal": "parameters",
      "reference": "looped_moe",
      "members": {
        "looped_moe": {},
        "dense": {"set": {"model.n_experts": 0}, "free": "model.ffn_dim", "multiple_of": 8}
      }
    }

A member may leave one setting free. It gets the value, a multiple of ``multiple_of``, that brings the member nearest to
the reference; more of it must mean more of the quantity. Whoever is then farther away than ``tolerance`` is refused:
what is called a comparison at equal budget is one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PositiveInt, StringConstraints, model_validator
from rich.table import Table

from launch.budget import Budget, budget_of, steps_for_flops
from launch.settings import (
    BadInputError,
    SettingError,
    apply_overrides,
    as_overrides,
    load_settings,
    parse_settings,
    read_json_object,
)

if TYPE_CHECKING:
    from pretrain.config import TrainingConfig

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Key = Annotated[str, StringConstraints(pattern=r"^[a-z_]+(\.[a-z0-9_]+)+$")]
Settings = dict[Key, JsonValue]
Quantity = Literal["parameters", "training_flops", "kv_bytes"]

STEPS = "schedule.steps"
_OPEN_END = 2**31 - 1
_LARGEST = 2**24  # of a free setting


class Member(BaseModel):
    """One side: settings over the comparison's, and the one that may be chosen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    set: Settings = Field(default_factory=dict)
    free: Key | None = Field(None, description="the setting that makes it equal, such as model.ffn_dim, schedule.steps")
    multiple_of: PositiveInt = 1


class Comparison(BaseModel):
    """Members, and in what they must be equal."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Name
    config: str = Field(description="the base configuration's file")
    set: Settings = Field(default_factory=dict, description="settings of every member")
    equal: Quantity
    reference: Name = Field(description="the member that the others are made equal to")
    tolerance: float = Field(0.01, gt=0, lt=1, description="relative to the reference")
    members: dict[Name, Member] = Field(min_length=2)

    @model_validator(mode="after")
    def _reference_is_fixed(self) -> Comparison:
        if self.reference not in self.members:
            raise SettingError("reference", self.reference, f"is no member; accepted: {', '.join(self.members)}")
        free = self.members[self.reference].free
        if free is not None:
            raise SettingError(f"members.{self.reference}.free", free, "the reference is fixed; remove it")
        for name, member in self.members.items():
            if member.free == STEPS and self.equal != "training_flops":
                raise SettingError(f"members.{name}.free", STEPS, f"steps do not change {self.equal}")
        return self


def load_comparison(path: Path) -> Comparison:
    """The comparison in ``path``; ``BadInputError`` says what is wrong."""
    return load_settings(Comparison, path)


def solve(comparison: Comparison, source: Path) -> dict[str, Settings]:
    """The settings of each member over the comparison's own, the free one chosen; see :func:`solved_budgets`."""
    return {name: settings for name, (settings, _) in solved_budgets(comparison, source).items()}


def solved_budgets(comparison: Comparison, source: Path) -> dict[str, tuple[Settings, Budget]]:
    """Settings and budget of each member of the comparison in ``source``.

    Raises ``BadInputError`` when a member cannot be made equal within the tolerance.
    """
    base = read_json_object(Path(comparison.config))
    apply_overrides(base, as_overrides(comparison.set))
    reference = comparison.members[comparison.reference].set
    wanted = quantity(_budget(base, reference, f"{source}: member {comparison.reference}"), comparison.equal)
    solved: dict[str, tuple[Settings, Budget]] = {}
    for name, member in comparison.members.items():
        settings = _choose(base, member, comparison.equal, wanted, f"{source}: member {name}")
        solved[name] = (settings, _budget(base, settings, f"{source}: member {name}"))
    check_equal(comparison, {name: budget for name, (_, budget) in solved.items()}, source)
    return solved


def _choose(base: dict[str, Any], member: Member, equal: Quantity, wanted: float, place: str) -> Settings:
    """The member's settings, with the value of the free one that brings it nearest to ``wanted``."""
    if member.free is None:
        return member.set
    if member.free == STEPS:
        open_ended = _configuration(base, {**member.set, STEPS: _OPEN_END}, place)
        return {**member.set, STEPS: steps_for_flops(open_ended, wanted, place)}
    free = member.free

    def measure(value: int) -> float:
        return quantity(_budget(base, {**member.set, free: value}, place), equal)

    return {**member.set, free: _nearest(measure, wanted, member.multiple_of)}


def _configuration(base: dict[str, Any], settings: Settings, place: str) -> TrainingConfig:
    from pretrain.config import TrainingConfig

    values = copy.deepcopy(base)
    apply_overrides(values, as_overrides(settings))
    return parse_settings(TrainingConfig, values, place)


def _budget(base: dict[str, Any], settings: Settings, place: str) -> Budget:
    return budget_of(_configuration(base, settings, place), place)


def check_equal(comparison: Comparison, budgets: dict[str, Budget], source: Path) -> None:
    """``BadInputError`` naming the first member that is farther from the reference than the tolerance."""
    wanted = quantity(budgets[comparison.reference], comparison.equal)
    for name, budget in budgets.items():
        got = quantity(budget, comparison.equal)
        if abs(got - wanted) > comparison.tolerance * wanted:
            free = comparison.members[name].free
            remedy = f"{free} cannot bring it nearer" if free else "name a setting that may change with free"
            raise BadInputError(
                f"{source}: members.{name}: {comparison.equal} = {got:.6g} is {got / wanted - 1:+.1%} from "
                f"{comparison.reference}'s {wanted:.6g}, beyond tolerance = {comparison.tolerance:g}; {remedy}"
            )


def quantity(budget: Budget, name: Quantity) -> float:
    """The number of ``budget`` that is compared."""
    return float(getattr(budget, name))


def budget_table(comparison: Comparison, members: dict[str, tuple[Settings, Budget]]) -> Table:
    """The members' budgets, and what was chosen for them."""
    title = f"{comparison.name}: equal {comparison.equal} within {comparison.tolerance:.1%} of {comparison.reference}"
    table = Table(title=title, title_justify="left")
    for column in ("member", "chosen"):
        table.add_column(column)
    for column in ("parameters", "active", "tokens", "loops", "training FLOPs", "KV bytes", "difference"):
        table.add_column(column, justify="right")
    wanted = quantity(members[comparison.reference][1], comparison.equal)
    for name, (settings, budget) in members.items():
        free = comparison.members[name].free
        table.add_row(
            name,
            "" if free is None else f"{free} = {settings[free]}",
            f"{budget.parameters:,}",
            f"{budget.active_parameters:,}",
            f"{budget.tokens:,}",
            f"{budget.executed_loops:.2f}",
            f"{budget.training_flops:.4g}",
            f"{budget.kv_bytes:,}",
            f"{quantity(budget, comparison.equal) / wanted - 1:+.2%}",
        )
    return table


def _nearest(measure: Callable[[int], float], wanted: float, step: int) -> int:
    """The multiple of ``step`` whose measure, which rises with it, is nearest to ``wanted``."""
    low, high = 0, 1
    while measure(high * step) < wanted:
        low, high = high, 2 * high
        if high * step > _LARGEST:
            return low * step
    while high - low > 1:
        middle = (low + high) // 2
        if measure(middle * step) < wanted:
            low = middle
        else:
            high = middle
    if low and wanted - measure(low * step) <= measure(high * step) - wanted:
        return low * step
    return high * step
