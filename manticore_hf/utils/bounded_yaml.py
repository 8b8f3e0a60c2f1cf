"""YAML of strangers, read with the library's safe loader within bounds that no recipe and no card needs."""

from typing import Any

import yaml

from manticore_hf.modeling.bounds_manticore import show

_MOST_BITS = 2048
_ODD = ("binary", "omap", "pairs", "set")  # which neither JSON nor the library's own writer has


class BoundedLoader(yaml.SafeLoader):
    """YAML's safe loader, which alone follows any depth and any repetition of aliases (a billion from ten lines).

    Args:
        text: The YAML.
        values: Most values, aliases written out.
        depth: Most levels of nesting.
        length: Most characters of one text.
    """

    def __init__(self, text: str, values: int = 5_000, depth: int = 16, length: int = 10_000):
        super().__init__(text)
        self.most, self.deepest, self.longest = values, depth, length
        self.depth, self.sizes = 0, {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """As in the library; too much of anything is a YAMLError, as soon as it is there."""
        event = self.peek_event()
        alias, mark = isinstance(event, yaml.AliasEvent), event.start_mark
        self.depth += 1
        if self.depth > self.deepest:
            raise yaml.MarkedYAMLError(problem=f"more than {self.deepest} levels of nesting", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if not alias:  # else it has been counted, unless it is inside itself
            parts = node.value if not isinstance(node, yaml.ScalarNode) else ()
            parts = [one for pair in parts for one in pair] if isinstance(node, yaml.MappingNode) else parts
            self.sizes[id(node)] = 1 + sum(self.sizes[id(one)] for one in parts)
        if max(self.sizes.get(id(node), self.most + 1), len(self.sizes)) > self.most:
            problem = f"more than {self.most} values, aliases written out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        if isinstance(node, yaml.ScalarNode) and len(node.value) > self.longest:
            problem = f"a text of more than {self.longest} characters"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        return node

    def construct_yaml_int(self, node: yaml.Node) -> int:
        """As in the library, but for integers that cannot be printed."""
        value = super().construct_yaml_int(node)
        if value.bit_length() > _MOST_BITS:
            raise ValueError(f"an integer of {value.bit_length()} bits")
        return value

    def construct(self, node: yaml.Node | None) -> Any:
        """The values of a document that was composed.

        Raises:
            ValueError: A date or number that is none, or a tag on what is none.
        """
        try:
            return None if node is None else self.construct_document(node)
        except yaml.YAMLError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as err:
            # The library's constructors do not check.
            raise ValueError(show(f"{type(err).__name__}: {err}")) from err


_NAME = "tag:yaml.org,2002:{}"
BoundedLoader.add_constructor(_NAME.format("int"), BoundedLoader.construct_yaml_int)
for _kind in _ODD:
    BoundedLoader.add_constructor(_NAME.format(_kind), yaml.SafeLoader.construct_undefined)


def load_yaml(text: str, **bounds: int) -> Any:
    """The values of a YAML document.

    Args:
        text: The document.
        bounds: As BoundedLoader takes them.

    Raises:
        ValueError: It is none, is beyond the bounds, or has a value that is not of its type.
    """
    try:
        loader = BoundedLoader(text, **bounds)
        return loader.construct(loader.get_single_node())
    except yaml.YAMLError as err:
        raise ValueError(" ".join(str(err).split())) from err
