"""What a config entry may be: its choices and bounds stand beside it, in its dataclass field's metadata."""

import dataclasses
import math
import operator
import types
import typing

from edm.errors import UserError, brief, nearest

LARGEST = 2**63 - 1  # of all numbers but inf: what PyTorch's integers hold
BOUNDS = {"above": operator.gt, "at_least": operator.ge, "at_most": operator.le, "below": operator.lt}


def one_of(default: str, *names: str):
    return dataclasses.field(default=default, metadata={"choices": names})


def number(default, **bounds: float):
    """A number or a list of them, `above`, `at_least`, `at_most` or `below` its bounds; finite unless at_most is infinite."""
    return dataclasses.field(default=default, metadata=bounds)


def read_section(section: str, kind: type, entries: dict):
    """Check the entries {key: (value, source)} of one section and make its dataclass."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    checked = {}
    for key, (value, source) in entries.items():
        key = key if isinstance(key, str) else brief(key)
        where = f"{source}: {section}.{key}"
        if key not in fields:
            raise UserError(f"{where}: unknown key; {nearest(f'{section}.{key}', (f'{section}.{name}' for name in fields))}")
        checked[key] = check(value, hints[key], fields[key].metadata, where)
    return kind(**checked)


def check(value: object, kind: type, bounds: dict, where: str):
    """The value as its type, or a `UserError` that says what is allowed."""
    if isinstance(kind, types.UnionType):  # float | None
        return None if value is None else check(value, typing.get_args(kind)[0], bounds, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: must be a list of whole numbers, such as [2, 2, 2], not {brief(value)}")
        return tuple(check(item, int, bounds, where) for item in value)
    if kind is str:
        if isinstance(value, bool) and "true" in bounds.get("choices", ()):
            value = str(value).lower()  # YAML's true and false, where they are two of several choices
        if not isinstance(value, str) or not value:
            raise UserError(f"{where}: must be text, not {brief(value)}")
        choices = bounds.get("choices")
        if choices and value not in choices:
            raise UserError(f"{where}: unknown choice {brief(value)}; {nearest(value, choices)}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and value != value // 1):
        raise UserError(f"{where}: must be a {'whole ' if kind is int else ''}number, not {brief(value)}")
    inside = all(BOUNDS[bound](value, limit) for bound, limit in bounds.items())
    unlimited = isinstance(value, float) and math.isinf(value) and bounds.get("at_most") == math.inf
    if not inside or not (unlimited or -LARGEST <= value <= LARGEST):  # nor is nan
        allowed = " and ".join(f"{bound.replace('_', ' ')} {limit:,}" for bound, limit in bounds.items()) or "less large"
        raise UserError(f"{where}: {brief(value)} is out of range; it must be {allowed}")
    return kind(value)
