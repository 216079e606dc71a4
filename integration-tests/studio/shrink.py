"""Small instances of model classes whose constructors have their sizes written in them."""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

Sizes = Mapping[int | str, Any]  #: a number, or the name of a setting -> what stands there instead


class _Replace(ast.NodeTransformer):
    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if type(node.value) is int and node.value in self._sizes:
            return ast.copy_location(ast.Constant(self._sizes[node.value]), node)
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        if node.arg in self._sizes:
            node.value = self._literal(node.arg)
        return self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        for i, key in enumerate(node.keys):
            if isinstance(key, ast.Constant) and isinstance(key.value, str) and key.value in self._sizes:
                node.values[i] = self._literal(key.value)
        return self.generic_visit(node)

    def visit_arguments(self, node: ast.arguments) -> ast.AST:
        named = node.args[len(node.args) - len(node.defaults) :]
        node.defaults = [
            self._literal(argument.arg) if argument.arg in self._sizes else default
            for argument, default in zip(named, node.defaults, strict=True)
        ]
        return self.generic_visit(node)

    def _literal(self, name: str) -> ast.expr:
        return ast.parse(repr(self._sizes[name]), mode="eval").body


def _with_sizes(owner: type, sizes: Sizes) -> FunctionType:
    """Return the constructor of *owner* with other sizes, compiled from its own source."""
    original = owner.__dict__["__init__"]
    tree = _Replace(sizes).visit(ast.parse(textwrap.dedent(inspect.getsource(original))))
    outer = ast.parse("def outer(__class__):\n    return __init__").body[0]  # super() asks for __class__
    assert isinstance(outer, ast.FunctionDef)
    outer.body.insert(0, tree.body[0])
    namespace: dict[str, Any] = {}
    module = ast.fix_missing_locations(ast.Module([outer], []))
    exec(compile(module, inspect.getsourcefile(original) or "", "exec"), original.__globals__, namespace)
    function = namespace["outer"](owner)
    assert isinstance(function, FunctionType)
    return function


@contextmanager
def shrunk(module: ModuleType, sizes: Mapping[str, Sizes]) -> Iterator[None]:
    """Let the classes of *module* that *sizes* names be constructed small, while the block lasts."""
    patches = []
    for name, mapping in sizes.items():
        owner = getattr(module, name)
        patches.append(patch.object(owner, "__init__", _with_sizes(owner, mapping)))
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()
