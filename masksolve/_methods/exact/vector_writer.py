"""Write LLVM IR of explicit vectors: what every writer of it needs, whatever its vectors hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from masksolve import _networks

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)


class VectorWriter:
    """Writes code where the builder stands."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def constant(self, kind: ir.Type, value: float, count: int) -> ir.Value:
        return ir.Constant(ir.VectorType(kind, count), [value] * count)

    def splat(self, scalar: ir.Value, count: int) -> ir.Value:
        undefined = ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined)
        one = self.builder.insert_element(undefined, scalar, _I32(0))
        return self.picked(one, one, [0] * count)

    def picked(self, a: ir.Value, b: ir.Value, order: Sequence[int]) -> ir.Value:
        """Return the elements of two vectors, numbered through, in this order."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(order)), list(order)))

    def joined(self, vectors: Sequence[ir.Value]) -> ir.Value:
        """Return the elements of a power of two of vectors, one after the other."""
        whole = list(vectors)
        while len(whole) > 1:
            count = 2 * whole[0].type.count
            whole = [self.picked(a, b, range(count)) for a, b in zip(whole[::2], whole[1::2], strict=True)]
        return whole[0]

    def filled_up(self, value: ir.Value, count: int) -> ir.Value:
        """Return a vector with zeros at its end."""
        have = value.type.count
        if have == count:
            return value
        zeros = ir.Constant(value.type, [0 if isinstance(value.type.element, ir.IntType) else 0.0] * have)
        return self.picked(value, zeros, [k if k < have else have for k in range(count)])

    def for_each(self, count: int | ir.Value, body: Callable[[ir.Value], None]) -> None:
        """Write a loop over 0 ... count - 1; it runs at least once."""
        builder = self.builder
        before = builder.block
        loop, after = builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        index = builder.phi(_I64)
        index.add_incoming(_I64(0), before)
        body(index)
        following = builder.add(index, _I64(1))
        index.add_incoming(following, builder.block)
        stop = _I64(count) if isinstance(count, int) else count
        builder.cbranch(builder.icmp_unsigned("<", following, stop), loop, after)
        builder.position_at_end(after)

    def larger(self, a: ir.Value, b: ir.Value, is_max: bool = True) -> ir.Value:
        """Return max or min of integers or of floats, in the form that is a single packed instruction."""
        compare = self.builder.icmp_signed if isinstance(a.type.element, ir.IntType) else self.builder.fcmp_ordered
        return self.builder.select(compare(">" if is_max else "<", a, b), a, b)

    def best_two(self, values: Sequence[ir.Value], n: int) -> tuple[ir.Value, ir.Value]:
        """Return the n-th and the (n+1)-th largest."""
        network = _networks.selection_network(n, len(values))
        wires = list(values)
        for is_max, a, b in network.steps:
            wires.append(self.larger(wires[a], wires[b], is_max))
        return wires[network.nth], wires[network.following]

    def transposed(self, vectors: list[ir.Value]) -> list[ir.Value]:
        """Exchange the number of a vector, of a power of two, with the place in each as many of its elements."""
        places, width = len(vectors), 1
        while width < places:
            # Vectors hold `width` vectors' elements each, of the `places // width` next to each other.
            after: list[ir.Value] = []
            for first in range(0, places, 2 * width):
                for k in range(width):
                    low, high = vectors[first + k], vectors[first + width + k]
                    after += [self.interleaved(low, high, width, start, places) for start in (0, places // 2)]
            vectors = after
            width *= 2
        return vectors

    def interleaved(self, a: ir.Value, b: ir.Value, width: int, start: int, places: int) -> ir.Value:
        """Return elements from `start` on of each `places` of a and b, half of each: `width` of a, `width` of b, ..."""
        lanes = a.type.count
        order: list[int] = []
        for group in range(start, lanes, places):
            for k in range(group, group + places // 2, width):
                order += [*range(k, k + width), *range(lanes + k, lanes + k + width)]
        return self.picked(a, b, order)
