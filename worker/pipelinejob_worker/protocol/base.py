"""The base of every model that crosses between user, operator and worker."""

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class Wire(BaseModel):
    """camelCase JSON outside, snake_case inside; immutable; unknown fields are ignored, so newer peers may add some."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")

    def to_json(self) -> str:
        """Render as JSON with camelCase names, without members that are None."""
        return self.model_dump_json(by_alias=True, exclude_none=True)
