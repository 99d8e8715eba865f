"""Which faults `mutation_testing.py` can make in a module, and which it leaves out.

Nodes are parso's, as cosmic-ray wants them; what is left out is found with `ast`.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast  # type: ignore[import-untyped]
from cosmic_ray.mutating import mutate_code  # type: ignore[import-untyped]
from cosmic_ray.plugins import get_operator  # type: ignore[import-untyped]
from parso.python.tree import Name

Position = tuple[int, int]  # line from 1, column from 0

BINARY = "Add_Sub Sub_Add Mul_Div Mul_Add Div_Mul FloorDiv_Mul FloorDiv_Div Mod_FloorDiv Mod_Mul Pow_Mul"
COMPARISON = "Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Is_IsNot IsNot_Is"
COSMIC_RAY = (  # those that shift a bound or turn a sign; its many others, such as + by <<, crash at once
    *(f"ReplaceBinaryOperator_{name}" for name in BINARY.split()),
    *(f"ReplaceComparisonOperator_{name}" for name in COMPARISON.split()),
    *(f"ReplaceUnaryOperator_Delete_{name}" for name in ("Not", "USub", "Invert")),
    *("AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ZeroIterationForLoop"),
    *("ExceptionReplacer", "NumberReplacer", "RemoveDecorator"),
)
SIGNS = {"+=": "-=", "-=": "+=", "*=": "/=", "/=": "*=", "|=": "&=", "&=": "|="}
LEFT = ("min", "minimum", "argmin", "clamp_min", "any", "floor", "zeros", "zeros_like", "bisect_left")
RIGHT = ("max", "maximum", "argmax", "clamp_max", "all", "ceil", "ones", "ones_like", "bisect_right")
CALLS = dict(zip(LEFT + RIGHT, RIGHT + LEFT, strict=True)) | {"sorted": "list"}
SYMMETRIC = ("min", "max", "minimum", "maximum", "equal", "array_equal", "isclose", "allclose")
ORDERED = ("isinstance", "issubclass", "hasattr", "getattr", "cast")  # the other order can only crash
ARITHMETIC = {"arith_expr", "term", "power"}  # parents of a binary operator; a lone * of a signature has another
KEYWORDS = {"strict", "frozen", "slots", "kw_only", "repr", "stacklevel"}  # of `zip`, `dataclass`, `field` and `warn`
DECORATORS = (
    *("abstractmethod", "classmethod", "contextmanager", "dataclass", "override", "property", "setter"),
    *("staticmethod", "wraps"),
)


class Own(NamedTuple):
    """An operator for cosmic-ray from a function: the text in a node's place, None where it stays as it is."""

    text: Callable[[Any], str | None]

    def mutation_positions(self, node: Any) -> Iterator[tuple[Position, Position]]:
        if self.text(node) is not None:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        return Name(str(self.text(node)), node.start_pos, node.get_first_leaf().prefix)


def delete_statement(node: Any) -> str | None:
    """A call, a `raise`, a `del`, `x += y` or `x.y = z` becomes `pass`.

    Plain names stay assigned, and so do attributes in constructors: what reads them would only crash.
    """
    if node.parent is None or node.parent.type != "simple_stmt":
        return None
    if node.type == "expr_stmt" and getattr(node.children[1], "value", "") == "=":
        function = node.search_ancestor("funcdef")
        constructor = function is not None and function.name.value in ("__init__", "__post_init__")
        return "pass" if node.children[0].type == "atom_expr" and not constructor else None
    if node.type == "expr_stmt":
        return "pass" if node.children[1].type == "operator" else None  # else it is an annotation
    call = node.type == "atom_expr" and node.children[-1].get_first_leaf().value == "("
    return "pass" if call or node.type in ("raise_stmt", "del_stmt") else None


def return_none(node: Any) -> str | None:
    """`return x` becomes `return None`."""
    found = node.type == "return_stmt" and node.children[1].get_code().strip() != "None"
    return "return None" if found else None


def swap_arguments(node: Any) -> str | None:
    """`f(x, y)` becomes `f(y, x)`, unless the order of the two cannot matter or only one is possible."""
    if node.type != "arglist" or node.parent.type != "trailer" or len(node.children) < 3:
        return None
    first, comma, second, *others = node.children
    if node.parent.get_previous_leaf().value in (*ORDERED, *SYMMETRIC) or "argument" in (first.type, second.type):
        return None
    a, b = (argument.get_code(include_prefix=False) for argument in (first, second))
    return "".join((b, comma.get_code(), second.get_first_leaf().prefix, a, *(other.get_code() for other in others)))


def swap_word(node: Any) -> str | None:
    """`in` and `not in`, `+=` and `-=`, and functions such as `min` and `max` take each other's place."""
    if node.type == "comp_op":
        return "in" if node.get_code().split() == ["not", "in"] else None
    if node.type == "keyword":
        return "not in" if node.value == "in" and node.parent.type == "comparison" else None
    if node.type == "operator":
        return SIGNS.get(node.value)
    if node.type != "name" or node.parent.type == "funcdef" or node.get_next_leaf().value != "(":
        return None
    return CALLS.get(node.value)


OPERATORS: dict[str, Any] = {name: get_operator(f"core/{name}")() for name in COSMIC_RAY} | {
    "DeleteStatement": Own(delete_statement),
    "ReturnNone": Own(return_none),
    "SwapArguments": Own(swap_arguments),
    "SwapWord": Own(swap_word),
}


def left_out(tree: ast.Module) -> Iterator[Any]:
    """Parts in which a fault changes nothing that a test should look at. No operator changes texts."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name="__repr__") | ast.Assign(targets=[ast.Name(id="__all__")]) | ast.Assert():
                yield node
            case ast.FunctionDef(returns=ast.expr() as part) | ast.Raise(exc=ast.expr() as part):
                yield part
            case ast.arg(annotation=ast.expr() as part) | ast.AnnAssign(annotation=part):
                yield part
            case ast.If(test=ast.Name(id="TYPE_CHECKING") as test, body=body):
                yield from (test, *body)
            case ast.keyword(arg=str() as name) if name in KEYWORDS:
                yield node
            case ast.Call(func=ast.Name(id="cast" | "TypeVar" | "NewType")):
                yield node


def trivial(operator: str, node: Any) -> bool:
    """Whether a mutation says the same as another operator's, or breaks the module for sure."""
    if operator == "AddNot":
        condition = node.children[2 if node.type == "test" else 1]
        return condition.type in ("comparison", "not_test")  # those are negated by themselves
    if operator == "RemoveDecorator":
        return node.children[1].get_code().split("(")[0].split(".")[-1].strip() in DECORATORS
    return operator.startswith("ReplaceBinaryOperator") and node.parent.type not in ARITHMETIC


class Mutation(NamedTuple):
    """A fault that a module allows: the operator, which of its mutations of the module it is, and where."""

    operator: str
    occurrence: int
    line: int
    column: int


def mutations(source: str) -> Iterator[Mutation]:
    """All faults of a module."""
    lines = source.splitlines()
    parts = [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in left_out(ast.parse(source))]
    occurrences: Counter[str] = Counter()
    for node in ast_nodes(get_ast(source)):
        for name, operator in OPERATORS.items():
            for (line, column), _ in operator.mutation_positions(node):
                mutation = Mutation(name, occurrences[name], line, column)
                occurrences[name] += 1
                place = line, len(lines[line - 1][:column].encode())  # `ast` counts bytes, parso characters
                if not trivial(name, node) and not any(start <= place < end for start, end in parts):
                    yield mutation


def mutate(source: str, mutation: Mutation) -> str:
    """The module with one fault."""
    mutated: str = mutate_code(source, OPERATORS[mutation.operator], mutation.occurrence)
    return mutated
