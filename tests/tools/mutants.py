"""Small changes that break a module: other operators, axes, guards and registrations."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).parents[2] / "jax_lnfold"
SILENT = (ast.Assert, ast.Raise, ast.JoinedStr)  # say what cannot happen, or why
SWAPS = {"ALL": "FREE", "FREE": "ALL", "all": "any", "any": "all", "min": "max", "max": "min"}
OPPOSITES: list[tuple[type[ast.AST], type[ast.AST]]] = [
    *[(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn)],
    *[(ast.Is, ast.IsNot), (ast.Add, ast.Sub), (ast.BitOr, ast.BitAnd), (ast.Mult, ast.FloorDiv)],
]
OPPOSITE = dict(chain.from_iterable(((a, b), (b, a)) for a, b in OPPOSITES))


class Mutant(NamedTuple):
    """The node at ``field[index]`` of `parent` replaced by `new`.

    `statement` is the line of the statement around it, 0 outside of functions; `word` the
    primitive that it is about, if any.
    """

    module: str
    function: str
    line: int
    statement: int
    change: str
    word: str
    parent: ast.AST
    field: str
    index: int | None
    new: ast.AST

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.module, self.function, self.change)

    def __str__(self) -> str:
        return f"jax_lnfold/{self.module}.py:{self.line} {self.function}: {self.change}"

    def install(self) -> ast.Module:
        """The tree of the module, changed for good."""
        if self.index is None:
            setattr(self.parent, self.field, self.new)
        else:
            getattr(self.parent, self.field)[self.index] = self.new
        return ast.fix_missing_locations(tree(self.module))


def path_of(module: str) -> Path:
    return PACKAGE / f"{module}.py"


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text())


def like(node: Any, **fields: Any) -> Any:
    """A copy of a node with some fields replaced."""
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def pair(a: ast.AST, b: ast.AST, names: bool = True) -> bool:
    """Two names or two numbers that may well be mistaken for each other."""
    kinds = (ast.Name, ast.Constant) if names else (ast.Constant,)
    return type(a) is type(b) and isinstance(a, kinds) and ast.dump(a) != ast.dump(b)


def expressions(node: ast.AST) -> Iterator[ast.AST]:
    """What an expression is replaced by."""
    match node:
        case ast.BoolOp(values=[a, b]):
            yield from (a, b)
        case ast.BoolOp(values=values):
            yield from (like(node, values=[v for v in values if v is not x]) for x in values)
        case ast.IfExp(_, body, orelse):
            yield like(node, body=orelse, orelse=body)
        case ast.Compare(ops=[op]) if type(op) in OPPOSITE:
            yield like(node, ops=[OPPOSITE[type(op)]()])
        case ast.BinOp(left, op) if type(op) in OPPOSITE and not isinstance(left, ast.List):
            yield like(node, op=OPPOSITE[type(op)]())
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield ast.Constant({0: 1, 1: 0}.get(value, value + 1))
        case ast.Name(name) if name in SWAPS:
            yield like(node, id=SWAPS[name])
        case ast.UnaryOp(ast.Not(), operand):
            yield operand
        case ast.Tuple([a, b], ctx) if pair(a, b, names=isinstance(ctx, ast.Store)):
            yield like(node, elts=[b, a])
        case ast.DictComp(a, b) if pair(a, b):
            yield like(node, key=b, value=a)
        case ast.Call(ast.Attribute(value, "free" | "widened"), _):
            yield value
        case ast.Call(ast.Name("zip" | "Rule"), [a, b]) if pair(a, b):
            yield like(node, args=[b, a])
        case ast.comprehension(ifs=[test]):
            yield like(node, ifs=[])
            yield like(node, ifs=[ast.UnaryOp(ast.Not(), test)])


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """What a statement is replaced by."""
    match node:
        case ast.If(test, [*_, last], orelse):
            if not any(True for _ in expressions(test)):  # else these say as much
                yield like(node, test=ast.UnaryOp(ast.Not(), test))
            if isinstance(last, ast.Return | ast.Raise | ast.Continue) and not orelse:
                yield ast.Pass()
        case ast.AugAssign() | ast.Continue() | ast.Break() | ast.Expr(ast.Call()):
            yield ast.Pass()
        case ast.Assign([ast.Subscript()]):
            yield ast.Pass()


def words_of(node: ast.AST) -> list[str]:
    """Names of primitives in a string that is split, or in a registration."""
    match node:
        case ast.Call(ast.Attribute(ast.Constant(str(text)), "split")):
            return text.split()
        case ast.Call(ast.Name("register"), [ast.Constant(str(text)), _]):
            return text.split()
    return []


def registrations(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Names that lose their rule or get the rule of a sum."""
    for word in words_of(node):
        new = copy.deepcopy(node)
        for part in ast.walk(new):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                part.value = " ".join(w for w in part.value.split() if w != word)
        yield new, word
    match node:
        case ast.Call(ast.Name("register"), [ast.Name("NONLINEAR"), rule]):
            known = tree("program/primitives").body
            (named,) = (s for s in known if ast.unparse(s).startswith("NONLINEAR ="))
            for word in chain.from_iterable(words_of(n) for n in ast.walk(named)):
                linear = f"register('{word}', Rule(_pull_sum, _push_sum))"
                rest = f"register(NONLINEAR - {{'{word}'}}, {ast.unparse(rule)})"
                yield ast.parse(f"({linear}, {rest})", mode="eval").body, word


def brief(node: ast.AST) -> str:
    first, *more = ast.unparse(node).split("\n")
    return f"{first} {more[0].strip()}" if more else first


def mutants(module: str) -> Iterator[Mutant]:
    """Every mutant of a module, in the order of its lines."""

    def inside(node: ast.AST, function: str, statement: int, topic: str) -> Iterator[Mutant]:
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "returns", "decorator_list"):
                for i in range(len(value)) if isinstance(value, list) else [None]:
                    yield from at(node, field, i, function, statement, topic)

    def at(
        parent: ast.AST, field: str, i: int | None, function: str, statement: int, topic: str
    ) -> Iterator[Mutant]:
        node = getattr(parent, field) if i is None else getattr(parent, field)[i]
        if not isinstance(node, ast.AST) or isinstance(node, SILENT):
            return
        if isinstance(node, ast.keyword) and node.arg == "strict":
            return
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}".lstrip(".")
        elif isinstance(node, ast.stmt) and (statement or isinstance(parent, ast.FunctionDef)):
            statement = node.lineno
        line = getattr(node, "lineno", statement)
        topic = next(iter(words_of(node)), topic)
        plain = ((new, "") for new in chain(expressions(node), statements(node)))
        for new, word in chain(plain, registrations(node)):
            change = f"{brief(node)}  ->  {word or brief(new)}"
            if isinstance(node, ast.Constant | ast.Name):
                change += f"  in  {brief(parent)}"
            about = word or topic
            yield Mutant(module, function, line, statement, change, about, parent, field, i, new)
        yield from inside(node, function, statement, topic)

    yield from inside(tree(module), "", 0, "")
