"""What every section of settings is made of: a frozen pydantic model that refuses unknown keys, and common types."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]


class Section(BaseModel):
    """A group of settings: unknown keys are refused, values do not change after parsing."""

    model_config = ConfigDict(extra="forbid", frozen=True)
