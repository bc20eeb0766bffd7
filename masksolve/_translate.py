"""Translate kernels to LLVM IR: plain loops over numbers and arrays, written as Python, compiled in milliseconds.

Numba takes ten seconds to compile what calls the vector code of the default method, nearly all of it to find types in
Python. The functions that are translated here are few, and keep to so little of the language that their types are
plain to see: numbers that keep their type, arrays, tuples and named tuples of them, `if`, `while`, `for ... in range`,
calls of each other, which are written out where they stand. Everything else is refused with a `TranslationError`, when
tests run. Each of these functions is compiled by Numba too, under MASKSOLVE_PLAIN_NUMBA=1, and means the same there:
int64, float32, float64 and bool, a number with a decimal point being a float64.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import operator
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from llvmlite import ir

from masksolve._machine_code import pointer_to

_BOOL, _BYTE, _INT32, _INT = (ir.IntType(bits) for bits in (1, 8, 32, 64))
_FLOAT32, _FLOAT = ir.FloatType(), ir.DoubleType()
# What lies in memory, by NumPy's names.
_ELEMENTS: dict[str, ir.Type] = {
    "b1": _BYTE, "i1": _BYTE, "i4": _INT32, "i8": _INT, "f4": _FLOAT32, "f8": _FLOAT
}  # fmt: skip
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_COMPARISONS: dict[type, tuple[str, Callable[[Any, Any], bool]]] = {
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
    ast.Eq: ("==", operator.eq),
    ast.NotEq: ("!=", operator.ne),
}
_INTEGER_OPERATIONS = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.LShift: "shl",
    ast.RShift: "ashr",
    ast.BitAnd: "and_",
    ast.BitOr: "or_",
    ast.BitXor: "xor",
}
_FLOAT_OPERATIONS = {ast.Add: "fadd", ast.Sub: "fsub", ast.Mult: "fmul", ast.Div: "fdiv"}
_BITWISE = (ast.BitAnd, ast.BitOr, ast.BitXor)


class TranslationError(Exception):
    """A kernel holds something that cannot be translated; the message says what, and where."""


class Intrinsic:
    """A function that is machine code: `emit(builder, *arguments)` writes it, and returns its value or None."""

    def __init__(self, emit: Callable[..., ir.Value | None]) -> None:
        self.emit = emit


class ArrayType(NamedTuple):
    """An array's elements, by NumPy's name such as "f4", its dimensions, and whether it lies there without gaps."""

    element: str
    dimensions: int
    contiguous: bool


class _Array(NamedTuple):
    """Elements, where they begin, the shape, elements from one to the next, and whether there are no gaps."""

    element: str
    pointer: ir.Value
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]
    contiguous: bool


class _Address(NamedTuple):
    """An array's `ctypes`, as kernels use it."""

    data: ir.Value


class _Variable(NamedTuple):
    place: ir.Value
    kind: ir.Type


class _Frame:
    """A function that is being written out, and what its names stand for."""

    def __init__(self, function: Any, tree: ast.FunctionDef, after: ir.Block) -> None:
        self.function, self.after = function, after
        self.names: dict[str, Any] = {}
        names = [each.id for each in ast.walk(tree) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)]
        self.assignments = Counter(names)
        returns = [each for each in ast.walk(tree) if isinstance(each, ast.Return)]
        self.returns_once = len(returns) <= 1 and all(each is tree.body[-1] for each in returns)
        self.result: Any = None
        self.has_result = False
        self.loops: list[tuple[ir.Block, ir.Block]] = []
        # Of the statements that are written, how many branches and loops stand around them.
        self.depth = 0


def translate(function: Callable[..., Any], signature: tuple[Any, ...], name: str) -> str:
    """Return LLVM IR of a function of this name, which takes one address: of its arguments, and of its results.

    Parameters
    ----------
    function
        The kernel. What it calls is found where Python would find it.
    signature
        Of each argument, int, float, bool, an `ArrayType`, or a tuple of these. They lie at the address, eight bytes
        for each number; an array is its address, its shape, and, with gaps, its strides in bytes. The results follow,
        as integers.
    """
    module = ir.Module()
    main = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer_to(_BYTE)]), name)
    writer = _Writer(main)
    arguments = tuple(writer.argument(kind) for kind in signature)
    result = writer.inline(function, arguments)
    for number in () if result is None else result if isinstance(result, tuple) else (result,):
        writer.write_result(number)
    writer.finish()
    return str(module)


def _is_constant(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _kind_of(value: Any) -> ir.Type:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return _INT
    if isinstance(value, float):
        return _FLOAT
    if isinstance(value, ir.Value):
        return value.type
    raise TranslationError(f"{value!r} is not a number")


class _Writer:
    """Writes a function, from its arguments to its results."""

    def __init__(self, main: ir.Function) -> None:
        # Variables have their place in a block of their own, which LLVM turns into registers.
        self.places = ir.IRBuilder(main.append_basic_block("places"))
        self.begin = main.append_basic_block("begin")
        self.builder = ir.IRBuilder(self.begin)
        self.block = main.args[0]
        self.slots = 0
        self.frames: list[_Frame] = []
        self.line = 0

    def finish(self) -> None:
        self.builder.ret_void()
        self.places.branch(self.begin)

    def refuse(self, why: str) -> NoReturn:
        function = self.frames[-1].function
        line = function.__code__.co_firstlineno + self.line - 1
        raise TranslationError(f"{function.__code__.co_filename}:{line}: {function.__name__}: {why}")

    # Arguments and results

    def next_slot(self, kind: ir.Type) -> ir.Value:
        place = self.builder.gep(self.block, [_INT(8 * self.slots)], source_etype=_BYTE)
        self.slots += 1
        return self.builder.bitcast(place, pointer_to(kind))

    def argument(self, kind: Any) -> Any:
        if isinstance(kind, ArrayType):
            address = self.argument(int)
            shape = tuple(self.argument(int) for _ in range(kind.dimensions))
            if kind.contiguous:
                strides = self.contiguous_strides(shape)
            else:
                size = np.dtype(kind.element).itemsize
                strides = tuple(self.binary(ast.FloorDiv, self.argument(int), size) for _ in range(kind.dimensions))
            pointer = self.builder.inttoptr(address, pointer_to(_ELEMENTS[kind.element]))
            return _Array(kind.element, pointer, shape, strides, kind.contiguous)
        if isinstance(kind, tuple):
            return tuple(self.argument(each) for each in kind)
        if kind is float:
            return self.builder.load(self.next_slot(_FLOAT), align=8, typ=_FLOAT)
        number = self.builder.load(self.next_slot(_INT), align=8, typ=_INT)
        return self.truth(number) if kind is bool else number

    def contiguous_strides(self, shape: Sequence[Any]) -> tuple[Any, ...]:
        strides: list[Any] = [1]
        for length in reversed(shape[1:]):
            strides.insert(0, self.binary(ast.Mult, strides[0], length))
        return tuple(strides[: len(shape)])

    def write_result(self, number: Any) -> None:
        self.builder.store(self.as_kind(number, _INT), self.next_slot(_INT), align=8)

    # Functions

    def inline(self, function: Any, arguments: Sequence[Any]) -> Any:
        function = getattr(function, "py_func", function)
        if function in [frame.function for frame in self.frames]:
            self.refuse(f"{function.__name__} calls itself")
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        if not isinstance(tree, ast.FunctionDef):
            self.refuse(f"{function.__name__} is not a function")
        parameters = [each.arg for each in tree.args.args]
        if len(parameters) != len(arguments):
            self.refuse(f"{function.__name__} takes {len(parameters)} arguments, and gets {len(arguments)}")
        frame = _Frame(function, tree, self.builder.append_basic_block("after"))
        outer_line = self.line
        self.frames.append(frame)
        for name, value in zip(parameters, arguments, strict=True):
            if name in frame.assignments and not isinstance(value, tuple):
                frame.assignments[name] += 1
                self.assign(name, value)
            else:
                frame.names[name] = value
        self.statements(tree.body)
        if not self.builder.block.is_terminated:
            self.builder.branch(frame.after)
        self.builder.position_at_end(frame.after)
        self.frames.pop()
        self.line = outer_line
        return frame.result if frame.returns_once else self.loaded(frame.result)

    def loaded(self, result: Any) -> Any:
        if isinstance(result, _Variable):
            return self.builder.load(result.place, typ=result.kind)
        return None if result is None else tuple(self.loaded(each) for each in result)

    # Statements

    def statements(self, body: Sequence[ast.stmt]) -> None:
        for statement in body:
            if self.builder.block.is_terminated:
                break
            self.line = statement.lineno
            write = getattr(self, f"write_{type(statement).__name__.lower()}", None)
            if write is None:
                self.refuse(f"a statement of type {type(statement).__name__}")
            write(statement)

    def nested(self, body: Sequence[ast.stmt]) -> None:
        self.frames[-1].depth += 1
        self.statements(body)
        self.frames[-1].depth -= 1

    def write_pass(self, statement: ast.Pass) -> None:
        pass

    def write_expr(self, statement: ast.Expr) -> None:
        if not isinstance(statement.value, ast.Constant):  # as a docstring is
            self.value(statement.value)

    def write_assign(self, statement: ast.Assign) -> None:
        value = self.value(statement.value)
        for target in statement.targets:
            self.assign_to(target, value)

    def write_annassign(self, statement: ast.AnnAssign) -> None:
        if statement.value is not None:
            self.assign_to(statement.target, self.value(statement.value))

    def write_augassign(self, statement: ast.AugAssign) -> None:
        target = statement.target
        if isinstance(target, ast.Subscript):
            place, element = self.place(target)
            old = self.load_element(place, element)
            self.store_element(self.binary(type(statement.op), old, self.value(statement.value)), place, element)
        else:
            assert isinstance(target, ast.Name)
            old = self.name(target.id)
            self.assign(target.id, self.binary(type(statement.op), old, self.value(statement.value)))

    def assign_to(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.assign(target.id, value)
        elif isinstance(target, ast.Tuple):
            if not isinstance(value, tuple) or len(value) != len(target.elts):
                self.refuse(f"{len(target.elts)} names for {value!r}")
            for each, part in zip(target.elts, value, strict=True):
                self.assign_to(each, part)
        elif isinstance(target, ast.Subscript):
            if isinstance(target.slice, ast.Slice):
                self.fill(self.value(target), value)
            else:
                place, element = self.place(target)
                self.store_element(value, place, element)
        else:
            self.refuse(f"an assignment to {ast.unparse(target)}")

    def assign(self, name: str, value: Any) -> None:
        frame = self.frames[-1]
        is_number = _is_constant(value) or isinstance(value, ir.Value)
        if not is_number or (_is_constant(value) and frame.assignments[name] == 1):
            if frame.depth > 0 and frame.assignments[name] > 1:
                self.refuse(f"{name} stands for several things that are not numbers")
            frame.names[name] = value
            return
        variable = frame.names.get(name)
        if not isinstance(variable, _Variable):
            variable = frame.names[name] = self.new_variable(_kind_of(value))
        self.store(value, variable)

    def new_variable(self, kind: ir.Type) -> _Variable:
        return _Variable(self.places.alloca(kind), kind)

    def store(self, value: Any, variable: _Variable) -> None:
        """Store a number in a variable, which may be wider, but loses nothing."""
        kinds = [_BOOL, _INT, _FLOAT32, _FLOAT]
        kind = _kind_of(value)
        if kinds.index(kind) > kinds.index(variable.kind) or (kind == _INT and variable.kind == _FLOAT32):
            self.refuse(f"{kind} for what is {variable.kind}")
        self.builder.store(self.as_kind(value, variable.kind), variable.place)

    def write_return(self, statement: ast.Return) -> None:
        frame = self.frames[-1]
        value = None if statement.value is None else self.value(statement.value)
        if frame.returns_once:
            frame.result = value
        else:
            if not frame.has_result:
                frame.result = self.variables_for(value)
                frame.has_result = True
            self.store_all(value, frame.result)
        self.builder.branch(frame.after)

    def variables_for(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self.variables_for(each) for each in value)
        return None if value is None else self.new_variable(_kind_of(value))

    def store_all(self, value: Any, variables: Any) -> None:
        if isinstance(variables, _Variable):
            self.store(value, variables)
        elif variables is not None:
            for each, variable in zip(value, variables, strict=True):
                self.store_all(each, variable)

    def write_if(self, statement: ast.If) -> None:
        condition = self.truth(self.value(statement.test))
        if isinstance(condition, bool):
            self.statements(statement.body if condition else statement.orelse)
            return
        builder = self.builder
        then, other, after = (builder.append_basic_block() for _ in range(3))
        builder.cbranch(condition, then, other)
        for block, body in ((then, statement.body), (other, statement.orelse)):
            builder.position_at_end(block)
            self.nested(body)
            if not builder.block.is_terminated:
                builder.branch(after)
        builder.position_at_end(after)

    def write_while(self, statement: ast.While) -> None:
        if statement.orelse:
            self.refuse("else after a loop")
        builder = self.builder
        test, body, after = (builder.append_basic_block() for _ in range(3))
        builder.branch(test)
        builder.position_at_end(test)
        condition = self.truth(self.value(statement.test))
        builder.cbranch(self.as_kind(condition, _BOOL), body, after)
        builder.position_at_end(body)
        self.loop_body(statement.body, test, after)
        builder.branch(test) if not builder.block.is_terminated else None
        builder.position_at_end(after)

    def loop_body(self, body: Sequence[ast.stmt], following: ir.Block, after: ir.Block) -> None:
        self.frames[-1].loops.append((following, after))
        self.nested(body)
        self.frames[-1].loops.pop()

    def write_for(self, statement: ast.For) -> None:
        call = statement.iter
        is_range = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "range"
        if not is_range or statement.orelse or not isinstance(statement.target, ast.Name):
            self.refuse("a loop over anything but a range")
        assert isinstance(call, ast.Call)
        limits = [self.value(each) for each in call.args]
        first, stop = (0, limits[0]) if len(limits) == 1 else limits[:2]
        step = limits[2] if len(limits) == 3 else 1
        if isinstance(step, int) and step <= 0:
            self.refuse("a step that is not positive")
        builder = self.builder
        counter = self.new_variable(_INT)
        self.store(first, counter)
        stop = self.as_kind(stop, _INT)
        test, body, following, after = (builder.append_basic_block() for _ in range(4))
        builder.branch(test)
        builder.position_at_end(test)
        count = builder.load(counter.place, typ=_INT)
        builder.cbranch(builder.icmp_signed("<", count, stop), body, after)
        builder.position_at_end(body)
        self.assign(statement.target.id, count)
        self.loop_body(statement.body, following, after)
        if not builder.block.is_terminated:
            builder.branch(following)
        builder.position_at_end(following)
        count = builder.load(counter.place, typ=_INT)
        builder.store(builder.add(count, self.as_kind(step, _INT), flags=["nsw"]), counter.place)
        builder.branch(test)
        builder.position_at_end(after)

    def write_break(self, statement: ast.Break) -> None:
        self.builder.branch(self.frames[-1].loops[-1][1])

    def write_continue(self, statement: ast.Continue) -> None:
        self.builder.branch(self.frames[-1].loops[-1][0])

    # Values

    def value(self, node: ast.expr) -> Any:
        """Return what an expression stands for: a constant, a number that is to be computed, or what holds these."""
        read = getattr(self, f"read_{type(node).__name__.lower()}", None)
        if read is None:
            self.refuse(f"an expression of type {type(node).__name__}")
        return read(node)

    def read_constant(self, node: ast.Constant) -> Any:
        return node.value

    def read_name(self, node: ast.Name) -> Any:
        return self.name(node.id)

    def name(self, name: str) -> Any:
        frame = self.frames[-1]
        if name in frame.names:
            value = frame.names[name]
            return self.builder.load(value.place, typ=value.kind) if isinstance(value, _Variable) else value
        if name in frame.assignments:
            self.refuse(f"{name} is read before it is assigned")
        for scope in (frame.function.__globals__, vars(builtins)):
            if name in scope:
                value = scope[name]
                return value.item() if isinstance(value, np.generic) else value
        return self.refuse(f"{name} is not defined")

    def read_tuple(self, node: ast.Tuple) -> tuple[Any, ...]:
        return tuple(self.value(each) for each in node.elts)

    def read_attribute(self, node: ast.Attribute) -> Any:
        owner = self.value(node.value)
        if not isinstance(owner, _Array):
            return getattr(owner, node.attr)
        if node.attr == "shape":
            return owner.shape
        if node.attr == "itemsize":
            return np.dtype(owner.element).itemsize
        if node.attr == "ctypes":
            return _Address(self.builder.ptrtoint(owner.pointer, _INT))
        if node.attr == "T":
            return owner._replace(shape=owner.shape[::-1], strides=owner.strides[::-1], contiguous=False)
        return self.refuse(f"an array's {node.attr}")

    def read_unaryop(self, node: ast.UnaryOp) -> Any:
        value = self.value(node.operand)
        if isinstance(node.op, ast.Not):
            truth = self.truth(value)
            return not truth if isinstance(truth, bool) else self.builder.not_(truth)
        if _is_constant(value):
            return -value if isinstance(node.op, ast.USub) else ~value
        if isinstance(node.op, ast.Invert):
            return self.builder.not_(self.as_kind(value, _INT))
        if isinstance(node.op, ast.USub):
            if _kind_of(value) in (_FLOAT32, _FLOAT):
                return self.builder.fneg(value)
            return self.binary(ast.Sub, 0, value)
        return self.refuse(f"the operator in {ast.unparse(node)}")

    def read_binop(self, node: ast.BinOp) -> Any:
        return self.binary(type(node.op), self.value(node.left), self.value(node.right))

    def binary(self, operation: type, a: Any, b: Any) -> Any:
        if _is_constant(a) and _is_constant(b):
            return _OPERATORS[operation](a, b)
        builder = self.builder
        if operation in _BITWISE and _kind_of(a) == _kind_of(b) == _BOOL:
            return getattr(builder, _INTEGER_OPERATIONS[operation])(self.as_kind(a, _BOOL), self.as_kind(b, _BOOL))
        kind = self.common_kind(a, b)
        if operation is ast.Div and kind == _INT:
            kind = _FLOAT
        a, b = self.as_kind(a, kind), self.as_kind(b, kind)
        if kind != _INT:
            if operation not in _FLOAT_OPERATIONS:
                self.refuse(f"{operation.__name__} of floats")
            return getattr(builder, _FLOAT_OPERATIONS[operation])(a, b)
        if operation in (ast.FloorDiv, ast.Mod):
            return self.divided(operation is ast.Mod, a, b)
        if operation not in _INTEGER_OPERATIONS:
            self.refuse(f"{operation.__name__} of integers")
        return getattr(builder, _INTEGER_OPERATIONS[operation])(a, b)

    def divided(self, remainder: bool, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return floor(a / b), or what that leaves, for b > 0."""
        builder = self.builder
        left = builder.srem(a, b)
        is_below = builder.icmp_signed("<", left, _INT(0))
        if remainder:
            return builder.select(is_below, builder.add(left, b), left)
        return builder.sub(builder.sdiv(a, b), builder.zext(is_below, _INT))

    def common_kind(self, *values: Any) -> ir.Type:
        kinds = {_kind_of(value) for value in values}
        # As for NumPy, which knows no float32 that holds all int64.
        if _FLOAT in kinds or (_FLOAT32 in kinds and kinds != {_FLOAT32}):
            return _FLOAT
        return _FLOAT32 if _FLOAT32 in kinds else _INT

    def as_kind(self, value: Any, kind: ir.Type) -> ir.Value:
        """Return a number as another kind, rounded where it has to be."""
        if _is_constant(value):
            return ir.Constant(kind, float(value) if kind in (_FLOAT32, _FLOAT) else int(value))
        have, builder = value.type, self.builder
        if have == kind:
            return value
        if have == _BOOL:
            return builder.zext(value, kind) if kind == _INT else builder.uitofp(value, kind)
        if have == _INT and kind in (_FLOAT32, _FLOAT):
            return builder.sitofp(value, kind)
        if have in (_FLOAT32, _FLOAT) and kind == _INT:
            return builder.fptosi(value, kind)
        if kind == _FLOAT:
            return builder.fpext(value, kind)
        if kind == _FLOAT32:
            return builder.fptrunc(value, kind)
        return self.refuse(f"{have} as {kind}")

    def truth(self, value: Any) -> Any:
        if _is_constant(value):
            return bool(value)
        return value if value.type == _BOOL else self.compared("!=", value, 0)

    def compared(self, sign: str, a: Any, b: Any) -> ir.Value:
        kind = self.common_kind(a, b)
        a, b = self.as_kind(a, kind), self.as_kind(b, kind)
        if kind == _INT:
            return self.builder.icmp_signed(sign, a, b)
        return (self.builder.fcmp_unordered if sign == "!=" else self.builder.fcmp_ordered)(sign, a, b)

    def read_compare(self, node: ast.Compare) -> Any:
        result: Any = True
        left = self.value(node.left)
        for operation, each in zip(node.ops, node.comparators, strict=True):
            right = self.value(each)
            sign, compare = _COMPARISONS[type(operation)]
            is_so: Any
            if _is_constant(left) and _is_constant(right):
                is_so = compare(left, right)
            else:
                is_so = self.compared(sign, left, right)
            result = is_so if result is True else self.binary(ast.BitAnd, result, is_so)
            left = right
        return result

    def read_boolop(self, node: ast.BoolOp) -> Any:
        """Write the operands one after the other, each where those before it leave the result open."""
        is_and, builder = isinstance(node.op, ast.And), self.builder
        result, after = None, builder.append_basic_block()
        for number, each in enumerate(node.values):
            truth = self.truth(self.value(each))
            is_last = number == len(node.values) - 1
            if isinstance(truth, bool) and truth == is_and and not is_last:
                continue
            if isinstance(truth, bool) and result is None and (truth != is_and or is_last):
                builder.branch(after)
                builder.position_at_end(after)
                return truth
            if result is None:
                result = self.new_variable(_BOOL)
            self.store(truth, result)
            if is_last:
                builder.branch(after)
                break
            following = builder.append_basic_block()
            truth = self.as_kind(truth, _BOOL)
            builder.cbranch(truth, *((following, after) if is_and else (after, following)))
            builder.position_at_end(following)
        builder.position_at_end(after)
        assert result is not None
        return builder.load(result.place, typ=_BOOL)

    def read_ifexp(self, node: ast.IfExp) -> Any:
        condition = self.truth(self.value(node.test))
        if isinstance(condition, bool):
            return self.value(node.body if condition else node.orelse)
        builder = self.builder
        then, other, after = (builder.append_basic_block() for _ in range(3))
        builder.cbranch(condition, then, other)
        found, ends = [], []
        for block, each in ((then, node.body), (other, node.orelse)):
            builder.position_at_end(block)
            found.append(self.value(each))
            ends.append(builder.block)
        result = self.variables_for_both(*found)
        for end, value in zip(ends, found, strict=True):
            builder.position_at_end(end)
            self.store_all(value, result)
            builder.branch(after)
        builder.position_at_end(after)
        loaded = self.loaded(result)
        return type(found[0])(*loaded) if hasattr(found[0], "_fields") else loaded

    def variables_for_both(self, a: Any, b: Any) -> Any:
        if isinstance(a, tuple):
            return tuple(self.variables_for_both(*both) for both in zip(a, b, strict=True))
        is_bool = _kind_of(a) == _kind_of(b) == _BOOL
        return self.new_variable(_BOOL if is_bool else self.common_kind(a, b))

    # Arrays

    def read_subscript(self, node: ast.Subscript) -> Any:
        owner = self.value(node.value)
        if isinstance(owner, _Array):
            if isinstance(node.slice, ast.Slice):
                return self.sliced(owner, node.slice)
            part = self.part(owner, self.indices(node.slice))
            return part if part.shape else self.load_element(part.pointer, part.element)
        index = self.value(node.slice)
        if not isinstance(index, int):
            self.refuse(f"{ast.unparse(node)}: an index that is not a constant")
        return owner[index]

    def indices(self, node: ast.expr) -> list[Any]:
        return [self.value(each) for each in node.elts] if isinstance(node, ast.Tuple) else [self.value(node)]

    def part(self, array: _Array, indices: Sequence[Any]) -> _Array:
        offset: Any = 0
        for index, length, stride in zip(indices, array.shape, array.strides, strict=False):
            if _is_constant(index) and index < 0:
                index = self.binary(ast.Add, length, index)
            offset = self.binary(ast.Add, offset, self.binary(ast.Mult, index, stride))
        pointer = self.moved(array, offset)
        rest = slice(len(indices), None)
        return array._replace(pointer=pointer, shape=array.shape[rest], strides=array.strides[rest])

    def moved(self, array: _Array, offset: Any) -> ir.Value:
        kind = _ELEMENTS[array.element]
        return self.builder.gep(array.pointer, [self.as_kind(offset, _INT)], inbounds=True, source_etype=kind)

    def sliced(self, array: _Array, node: ast.Slice) -> _Array:
        if node.step is not None:
            self.refuse("a slice with a step")
        start = 0 if node.lower is None else self.value(node.lower)
        stop = array.shape[0] if node.upper is None else self.value(node.upper)
        pointer = self.moved(array, self.binary(ast.Mult, start, array.strides[0]))
        return array._replace(pointer=pointer, shape=(self.binary(ast.Sub, stop, start), *array.shape[1:]))

    def place(self, node: ast.Subscript) -> tuple[ir.Value, str]:
        array = self.value(node.value)
        part = self.part(array, self.indices(node.slice))
        if part.shape:
            self.refuse(f"an assignment to the whole of {ast.unparse(node)}")
        return part.pointer, part.element

    def load_element(self, place: ir.Value, element: str) -> ir.Value:
        kind = _ELEMENTS[element]
        value = self.builder.load(place, align=np.dtype(element).itemsize, typ=kind)
        if element == "b1":
            return self.builder.icmp_unsigned("!=", value, kind(0))
        return self.builder.sext(value, _INT) if element in ("i1", "i4") else value

    def store_element(self, value: Any, place: ir.Value, element: str) -> None:
        kind, builder = _ELEMENTS[element], self.builder
        if element == "b1":
            number = builder.zext(self.as_kind(self.truth(value), _BOOL), kind)
        elif element in ("i1", "i4"):
            number = builder.trunc(self.as_kind(value, _INT), kind)
        else:
            number = self.as_kind(value, kind)
        builder.store(number, place, align=np.dtype(element).itemsize)

    def fill(self, array: _Array, value: Any) -> None:
        if not array.contiguous:
            self.refuse("an assignment to all of an array with gaps")
        builder = self.builder
        count: Any = 1
        for length in array.shape:
            count = self.binary(ast.Mult, count, length)
        counter = self.new_variable(_INT)
        self.store(0, counter)
        test, body, after = (builder.append_basic_block() for _ in range(3))
        builder.branch(test)
        builder.position_at_end(test)
        index = builder.load(counter.place, typ=_INT)
        builder.cbranch(builder.icmp_signed("<", index, self.as_kind(count, _INT)), body, after)
        builder.position_at_end(body)
        self.store_element(value, self.moved(array, index), array.element)
        builder.store(builder.add(index, _INT(1), flags=["nsw"]), counter.place)
        builder.branch(test)
        builder.position_at_end(after)

    # Calls

    def read_call(self, node: ast.Call) -> Any:
        if node.keywords:
            self.refuse(f"{ast.unparse(node)}: arguments by name")
        arguments: list[Any] = []
        for each in node.args:
            if isinstance(each, ast.Starred):
                arguments += self.value(each.value)
            else:
                arguments.append(self.value(each))
        if isinstance(node.func, ast.Attribute):
            owner = self.value(node.func.value)
            if isinstance(owner, _Array):
                return self.call_of_array(owner, node.func.attr, arguments)
        function = self.value(node.func)
        if isinstance(function, Intrinsic):
            return function.emit(self.builder, *[self.as_number(each) for each in arguments])
        if isinstance(function, type) and issubclass(function, tuple):
            return function(*arguments)
        if function in _CALLS:
            return _CALLS[function](self, *arguments)
        return self.inline(function, arguments)

    def as_number(self, value: Any) -> ir.Value:
        if isinstance(value, _Array):
            return self.builder.ptrtoint(value.pointer, _INT)
        return self.as_kind(value, _kind_of(value)) if _is_constant(value) else value

    def call_of_array(self, array: _Array, name: str, arguments: list[Any]) -> _Array:
        if name == "view":
            element = np.dtype(arguments[0]).str[1:]
            ratio = np.dtype(element).itemsize // np.dtype(array.element).itemsize
            if ratio == 0 or (ratio > 1 and len(array.shape) > 1):
                self.refuse("a view of smaller numbers, or of wider ones in several dimensions")
            pointer = self.builder.bitcast(array.pointer, pointer_to(_ELEMENTS[element]))
            shape = (*array.shape[:-1], self.binary(ast.FloorDiv, array.shape[-1], ratio))
            return _Array(element, pointer, shape, array.strides, array.contiguous)
        if name == "reshape" and array.contiguous:
            shape = arguments[0] if isinstance(arguments[0], tuple) else tuple(arguments)
            if -1 in [each for each in shape if isinstance(each, int)]:
                known: Any = 1
                for each in shape:
                    known = known if isinstance(each, int) and each == -1 else self.binary(ast.Mult, known, each)
                shape = tuple(
                    self.binary(ast.FloorDiv, array.shape[0], known) if isinstance(each, int) and each == -1 else each
                    for each in shape
                )
            return _Array(array.element, array.pointer, shape, self.contiguous_strides(shape), contiguous=True)
        return self.refuse(f"an array's {name}")

    def least_or_largest(self, sign: str, *values: Any) -> Any:
        result = values[0]
        for value in values[1:]:
            if _is_constant(result) and _is_constant(value):
                result = min(result, value) if sign == "<" else max(result, value)
                continue
            kind = self.common_kind(result, value)
            result, value = self.as_kind(result, kind), self.as_kind(value, kind)
            result = self.builder.select(self.compared(sign, value, result), value, result)
        return result

    def absolute(self, value: Any) -> Any:
        if _is_constant(value):
            return abs(value)
        if _kind_of(value) in (_FLOAT32, _FLOAT):
            return self.library("llvm.fabs." + ("f32" if value.type == _FLOAT32 else "f64"), value.type, value)
        return self.least_or_largest(">", value, self.binary(ast.Sub, 0, value))

    def library(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        module = self.builder.module
        if name not in module.globals:
            ir.Function(module, ir.FunctionType(result, [each.type for each in arguments]), name)
        return self.builder.call(module.globals[name], arguments)

    def length(self, value: Any) -> Any:
        return value.shape[0] if isinstance(value, _Array) else len(value)

    def converted(self, kind: ir.Type, value: Any) -> Any:
        if _is_constant(value) and kind != _FLOAT32:
            return {_INT: int, _FLOAT: float, _BOOL: bool}[kind](value)
        return self.truth(value) if kind == _BOOL else self.as_kind(value, kind)

    def rounded(self, value: Any) -> ir.Value:
        return self.library("llvm.rint.f64", _FLOAT, self.as_kind(value, _FLOAT))

    def power_of_two_times(self, number: Any, exponent: Any) -> ir.Value:
        exponent = self.builder.trunc(self.as_kind(exponent, _INT), _INT32)
        return self.library("ldexp", _FLOAT, self.as_kind(number, _FLOAT), exponent)

    def quotient_and_rest(self, a: Any, b: Any) -> tuple[Any, Any]:
        return self.binary(ast.FloorDiv, a, b), self.binary(ast.Mod, a, b)


_CALLS: dict[Any, Callable[..., Any]] = {
    min: lambda writer, *values: writer.least_or_largest("<", *values),
    max: lambda writer, *values: writer.least_or_largest(">", *values),
    abs: _Writer.absolute,
    len: _Writer.length,
    divmod: _Writer.quotient_and_rest,
    int: lambda writer, value: writer.converted(_INT, value),
    float: lambda writer, value: writer.converted(_FLOAT, value),
    bool: lambda writer, value: writer.converted(_BOOL, value),
    np.int64: lambda writer, value: writer.converted(_INT, value),
    np.float64: lambda writer, value: writer.converted(_FLOAT, value),
    np.float32: lambda writer, value: writer.converted(_FLOAT32, value),
    np.rint: _Writer.rounded,
    np.ldexp: _Writer.power_of_two_times,
}
