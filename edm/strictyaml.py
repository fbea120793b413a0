"""YAML text to plain values, without YAML's surprises."""

import re

import yaml

from edm.errors import UserError


class StrictLoader(yaml.SafeLoader):
    """No aliases, which can grow without bound, no tags, no key twice; numbers are decimal, and what is neither a number nor
    null, true, false or inf is a word: so are no, off, 010, 1:30 and dates."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (YAML 1.1's, which would also take 1e-4 for a word)

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", self.peek_event().start_mark)
        if getattr(self.peek_event(), "tag", None) is not None:
            raise yaml.constructor.ConstructorError(None, None, "tags are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                problem = f"{key.value!r} is given twice" if isinstance(key, yaml.ScalarNode) else "a key must be a plain word"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for kind, pattern, first in (
    ("null", r"(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"[-+]?(0|[1-9]\d*)$", list("-+0123456789")),
    ("float", r"([-+]?(\d+\.\d*|\.\d+|(\d+\.?\d*|\.\d+)[eE][-+]?\d+)|[-+]?\.?inf|\.nan)$", list("-+.0123456789i")),
):
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(pattern, re.ASCII), first)


def parse_yaml(text: str, where: str) -> object:
    """Plain values from YAML text.

    Raises:
        UserError: not YAML, with the line at fault.
    """
    try:
        return yaml.load(text, StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:  # PyYAML's, for odd scalars
        raise UserError(f"{where}: not valid YAML: {type(error).__name__}") from None
