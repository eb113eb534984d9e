"""A small language for LLVM vector code inside numba functions. Used by the other kernel files.

`@emitted` turns a Python function over these values into something a numba function can call:
it runs once, when numba compiles, and writes the instructions. numba itself knows no vectors, and
its loops over floats are only vectorized where the compiler may reorder sums; ours must not be, for
a token's result shall not depend on how the loop around it was compiled.

Addresses are int64. A vector has 16 lanes of 32 bits; LLVM cuts it for narrower processors.
"""

import contextlib
import functools
import inspect
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvrelay.engine.shapes import LINE_BYTES

LANES = 16
_HALF_MAX = 65504.0
_NAN_BITS = 0x7FC00000
_X86 = binding.get_default_triple().startswith("x86_64")

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F32 = ir.FloatType()
_HALF = ir.HalfType()
F32 = ir.VectorType(_F32, LANES)
I32 = ir.VectorType(_I32, LANES)
BYTES = ir.VectorType(_I8, LINE_BYTES)


Emitter = Callable[..., Any]


class Int:
    """A 64-bit integer of the running program: an address, a count, an index."""

    def __init__(self, code: "Code", value: Any) -> None:
        self.code, self.value = code, value

    def __add__(self, other: "Int | int") -> "Int":
        return Int(self.code, self.code.builder.add(self.value, self.code.number(other).value))

    def __sub__(self, other: "Int | int") -> "Int":
        return Int(self.code, self.code.builder.sub(self.value, self.code.number(other).value))

    def __mul__(self, other: "Int | int") -> "Int":
        return Int(self.code, self.code.builder.mul(self.value, self.code.number(other).value))

    __radd__, __rmul__ = __add__, __mul__


class Vec:
    """16 floats."""

    def __init__(self, code: "Code", value: Any) -> None:
        self.code, self.value = code, value

    def _with(self, other: "Vec | float", operation: str) -> "Vec":
        emit = getattr(self.code.builder, operation)
        return Vec(self.code, emit(self.value, self.code.floats(other).value))

    def __add__(self, other: "Vec | float") -> "Vec":
        return self._with(other, "fadd")

    def __sub__(self, other: "Vec | float") -> "Vec":
        return self._with(other, "fsub")

    def __mul__(self, other: "Vec | float") -> "Vec":
        return self._with(other, "fmul")

    def __truediv__(self, other: "Vec | float") -> "Vec":
        return self._with(other, "fdiv")


class Variable:
    """A vector that changes as the program runs; LLVM keeps it in a register."""

    def __init__(self, code: "Code", start: Any) -> None:
        self._code, self._kind = code, type(start)
        self._slot = cgutils.alloca_once(code.builder, start.value.type)
        self.set(start)

    def get(self) -> Any:
        return self._kind(self._code, self._code.builder.load(self._slot))

    def set(self, value: Any) -> None:
        self._code.builder.store(value.value, self._slot)


class Ints:
    """16 integers of 32 bits."""

    def __init__(self, code: "Code", value: Any) -> None:
        self.code, self.value = code, value

    def __add__(self, other: "Ints") -> "Ints":
        return Ints(self.code, self.code.builder.add(self.value, other.value))


class Code:
    """Writes instructions at one place of a numba function."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    # ---- values

    def number(self, value: "Int | int") -> Int:
        return value if isinstance(value, Int) else Int(self, ir.Constant(_I64, value))

    def floats(self, value: "Vec | float") -> Vec:
        """The same float in all lanes."""
        if isinstance(value, Vec):
            return value
        exact = struct.unpack("f", struct.pack("f", value))[0]
        return Vec(self, ir.Constant(F32, [ir.Constant(_F32, exact)] * LANES))

    def ints(self, value: Any) -> Ints:
        """The same int32, given as a Python int or an Int, in all lanes."""
        if isinstance(value, Int):
            return Ints(self, self._splat(self.builder.trunc(value.value, _I32), I32))
        return Ints(self, ir.Constant(I32, [value] * LANES))

    def lane_numbers(self) -> Ints:
        return Ints(self, ir.Constant(I32, list(range(LANES))))

    def variable(self, start: Any) -> Variable:
        return Variable(self, start)

    def _splat(self, scalar: Any, vector: Any) -> Any:
        empty = ir.Constant(vector, ir.Undefined)
        first = self.builder.insert_element(empty, scalar, ir.Constant(_I32, 0))
        lanes = ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count)
        return self.builder.shuffle_vector(first, empty, lanes)

    # ---- memory

    def _pointer(self, address: Int, kind: Any) -> Any:
        return self.builder.inttoptr(address.value, kind.as_pointer())

    def _load(self, address: Int, kind: Any, align: int) -> Any:
        value = self.builder.load(self._pointer(address, kind))
        value.align = align
        return value

    def load(self, address: Int) -> Vec:
        return Vec(self, self._load(address, F32, 4))

    def load_bytes(self, address: Int) -> Any:
        """64 of them, from an address that is a multiple of 64."""
        return self._load(address, BYTES, LINE_BYTES)

    def load_line(self, address: Int) -> Vec:
        """As `load`, from an address that is a multiple of 64."""
        return Vec(self, self._load(address, F32, LINE_BYTES))

    def load_ints(self, address: Int) -> Ints:
        """From an address that is a multiple of 64."""
        return Ints(self, self._load(address, I32, LINE_BYTES))

    def load_half(self, address: Int) -> Vec:
        halves = self._load(address, ir.VectorType(_HALF, LANES), 2)
        return Vec(self, self.builder.fpext(halves, F32))

    def load_bfloat(self, address: Int) -> Vec:
        words = self.builder.zext(self._load(address, ir.VectorType(_I16, LANES), 2), I32)
        high = self.builder.shl(words, ir.Constant(I32, [16] * LANES))
        return Vec(self, self.builder.bitcast(high, F32))

    def spread(self, address: Int) -> Vec:
        """The float at `address` in all lanes."""
        return Vec(self, self._splat(self._load(address, _F32, 4), F32))

    def spread_ints(self, address: Int) -> Ints:
        return Ints(self, self._splat(self._load(address, _I32, 4), I32))

    def store(self, address: Int, value: Vec) -> None:
        self._store(address, value.value, 4)

    def store_past_caches(self, address: Int, value: Vec) -> None:
        """To an address that is a multiple of 64. `finish_stores` must follow."""
        self._store(address, value.value, LINE_BYTES)
        hint = self.builder.module.add_metadata([ir.Constant(_I32, 1)])
        self.builder.block.instructions[-1].set_metadata("nontemporal", hint)

    def finish_stores(self) -> None:
        """All that was stored is seen by others before whatever comes next."""
        if _X86:
            self.call("llvm.x86.sse.sfence", ir.VoidType())
        else:
            self.builder.fence("seq_cst")

    def store_half(self, address: Int, value: Vec) -> None:
        """What is too large becomes the largest: infinity would spoil whoever gives it weight 0."""
        low = self.select_less(value, -_HALF_MAX, -_HALF_MAX, value)
        inside = self.select_less(self.floats(_HALF_MAX), low, _HALF_MAX, low)
        self._store(address, self.builder.fptrunc(inside.value, ir.VectorType(_HALF, LANES)), 2)

    def store_bfloat(self, address: Int, value: Vec) -> None:
        """Rounds to nearest, ties to even."""
        b, sixteen = self.builder, ir.Constant(I32, [16] * LANES)
        bits = b.bitcast(value.value, I32)
        odd = b.and_(b.lshr(bits, sixteen), ir.Constant(I32, [1] * LANES))
        rounded = b.add(b.add(bits, ir.Constant(I32, [0x7FFF] * LANES)), odd)
        is_nan = b.fcmp_unordered("uno", value.value, value.value)
        rounded = b.select(is_nan, ir.Constant(I32, [_NAN_BITS] * LANES), rounded)
        words = b.trunc(b.lshr(rounded, sixteen), ir.VectorType(_I16, LANES))
        self._store(address, words, 2)

    def store_int8(self, address: Int, value: Ints) -> None:
        self._store(address, self.builder.trunc(value.value, ir.VectorType(_I8, LANES)), 1)

    def store_ints(self, address: Int, value: Ints) -> None:
        self._store(address, value.value, 4)

    def store_bytes(self, address: Int, value: Any) -> None:
        """64 of them, to an address that is a multiple of 64."""
        self._store(address, value, LINE_BYTES)

    def store_first(self, address: Int, value: Vec) -> None:
        """One float: lane 0."""
        self._store(address, self._lane(value.value, 0), 4)

    def store_first_int(self, address: Int, value: Ints) -> None:
        self._store(address, self._lane(value.value, 0), 4)

    def prefetch(self, address: Int) -> None:
        """Asks for the line at `address`; any address will do."""
        place = self._pointer(address, _I8)
        read, level_2, data = (ir.Constant(_I32, n) for n in (0, 2, 1))
        self.call("llvm.prefetch.p0", ir.VoidType(), place, read, level_2, data)

    def _store(self, address: Int, value: Any, align: int) -> None:
        self.builder.store(value, self._pointer(address, value.type)).align = align

    def _lane(self, vector: Any, lane: int) -> Any:
        return self.builder.extract_element(vector, ir.Constant(_I32, lane))

    # ---- arithmetic

    def call(self, name: str, result: Any, *values: Any) -> Any:
        """An LLVM intrinsic, by its full name."""
        module = self.builder.module
        function = module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(result, [value.type for value in values])
            function = ir.Function(module, kind, name)
        return self.builder.call(function, values)

    def fma(self, a: Vec, b: Vec, c: Vec) -> Vec:
        """a * b + c, rounded once."""
        return Vec(self, self.call("llvm.fma.v16f32", F32, a.value, b.value, c.value))

    def maximum(self, a: Vec, b: Vec) -> Vec:
        """NaN if either is."""
        return Vec(self, self.call("llvm.maximum.v16f32", F32, a.value, b.value))

    def larger(self, a: Vec, b: Vec) -> Vec:
        """One instruction; b where either is NaN."""
        greater = self.builder.fcmp_ordered(">", a.value, b.value)
        return Vec(self, self.builder.select(greater, a.value, b.value))

    def largest(self, parts: Sequence[Vec]) -> Vec:
        """Of all lanes of parts, the largest absolute value, in all lanes; NaN if any is NaN."""
        b = self.builder

        def more(x: Ints, y: Ints) -> Ints:  # without a sign, floats are in the order of their bits
            return Ints(self, b.select(b.icmp_signed(">", x.value, y.value), x.value, y.value))

        bits = [Ints(self, b.bitcast(self.absolute(part).value, I32)) for part in parts]
        found = self._fold(functools.reduce(more, bits), more)
        return self.first_lane(Vec(self, b.bitcast(found.value, F32)))

    def first_lane(self, a: Vec) -> Vec:
        """Lane 0 in all lanes. Of what a is made of, no more than that lane is computed then."""
        return Vec(self, self._splat(self._lane(a.value, 0), F32))

    def absolute(self, a: Vec) -> Vec:
        return Vec(self, self.call("llvm.fabs.v16f32", F32, a.value))

    def to_float(self, a: Ints) -> Vec:
        return Vec(self, self.builder.sitofp(a.value, F32))

    def rounded(self, a: Vec) -> Ints:
        """To the nearest integer, ties to even."""
        whole = self.call("llvm.rint.v16f32", F32, a.value)
        return Ints(self, self.builder.fptosi(whole, I32))

    def select_less(self, a: Vec, b: "Vec | float", yes: "Vec | float", no: Vec) -> Vec:
        """yes where a < b, else no; no where either is NaN."""
        less = self.builder.fcmp_ordered("<", a.value, self.floats(b).value)
        return Vec(self, self.builder.select(less, self.floats(yes).value, no.value))

    def select_between(self, low: Ints, x: Ints, high: Ints, yes: Vec, no: Vec) -> Vec:
        """yes where low <= x <= high."""
        b = self.builder
        inside = b.and_(
            b.icmp_signed(">=", x.value, low.value), b.icmp_signed("<=", x.value, high.value)
        )
        return Vec(self, b.select(inside, yes.value, no.value))

    def is_less(self, a: "Int | int", b: "Int | int") -> Int:
        """1 when a < b."""
        less = self.builder.icmp_signed("<", self.number(a).value, self.number(b).value)
        return Int(self, self.builder.zext(less, _I64))

    def differs(self, a: Vec, b: Vec) -> Int:
        """1 when the first lanes are not equal, or not numbers."""
        unequal = self.builder.fcmp_unordered("!=", self._lane(a.value, 0), self._lane(b.value, 0))
        return Int(self, self.builder.zext(unequal, _I64))

    def square_root(self, x: Vec) -> Vec:
        return Vec(self, self.call("llvm.sqrt.v16f32", F32, x.value))

    def sum_lanes(self, a: Vec) -> Vec:
        """The sum of all lanes, in all lanes; always added up in the same order."""
        return self._fold(a, lambda x, y: x + y)

    def maximum_lanes(self, a: Vec) -> Vec:
        return self._fold(a, self.maximum)

    def larger_lanes(self, a: Vec) -> Vec:
        return self._fold(a, self.larger)

    def sum_int_lanes(self, a: Ints) -> Ints:
        return self._fold(a, lambda x, y: x + y)

    def _fold(self, a: Any, join: Callable[[Any, Any], Any]) -> Any:
        distance = LANES // 2
        while distance:
            lanes = [(lane ^ distance) for lane in range(LANES)]
            a = join(a, type(a)(self, self.shuffle(a.value, a.value, lanes)))
            distance //= 2
        return a

    def shuffle(self, a: Any, b: Any, lanes: Sequence[int]) -> Any:
        """Lane i of the result is lane lanes[i] of a and b put one after the other."""
        chosen = ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes))
        return self.builder.shuffle_vector(a, b, chosen)

    def dot_bytes(self, total: Ints, unsigned: Any, signed: Any, vnni: bool) -> Ints:
        """Each lane of total plus the dot product of its four u8 with its four s8.

        Either is Ints, or 64 bytes."""
        unsigned, quads = (
            self.builder.bitcast(side.value, BYTES) if isinstance(side, Ints) else side
            for side in (unsigned, signed)
        )
        if vnni:
            name = "llvm.x86.avx512.vpdpbusd.512"
            return Ints(self, self.call(name, I32, total.value, unsigned, quads))
        b, words = self.builder, ir.VectorType(_I16, 2 * LANES)
        eight, sixteen = ir.Constant(words, [8] * 2 * LANES), ir.Constant(I32, [16] * LANES)
        low_byte = ir.Constant(words, [255] * 2 * LANES)
        x, y = b.bitcast(unsigned, words), b.bitcast(quads, words)
        even = b.mul(b.and_(x, low_byte), b.ashr(b.shl(y, eight), eight))
        odd = b.mul(b.lshr(x, eight), b.ashr(y, eight))
        for products in (even, odd):  # 32,640 at most, in 16 bits
            pair = b.bitcast(products, I32)
            low = b.ashr(b.shl(pair, sixteen), sixteen)
            total += Ints(self, b.add(low, b.ashr(pair, sixteen)))
        return total

    # ---- control

    @contextlib.contextmanager
    def each(self, count: Int, step: int = 1) -> Iterator[Int]:
        """The block runs for 0, step, 2 * step ... below count."""
        start, stride = self.number(0).value, self.number(step).value
        with cgutils.for_range_slice(self.builder, start, count.value, stride) as (index, _):
            yield Int(self, index)

    @contextlib.contextmanager
    def when(self, condition: Int) -> Iterator[None]:
        """The block runs when condition is not 0."""
        taken = self.builder.icmp_signed("!=", condition.value, self.number(0).value)
        with self.builder.if_then(taken):
            yield

    def cases(self, value: Int, emit: Callable[[int], None], choices: Sequence[int]) -> None:
        """Runs what emit wrote for the choice that value is; nothing for another value."""
        b = self.builder
        after = b.append_basic_block("after")
        switch = b.switch(value.value, after)
        for choice in choices:
            block = b.append_basic_block(f"case{choice}")
            switch.add_case(ir.Constant(_I64, choice), block)
            b.position_at_end(block)
            emit(choice)
            b.branch(after)
        b.position_at_end(after)


def emitted(emit: Emitter) -> Any:
    """Makes `emit(code, ...)` callable in numba functions, with int64 arguments.

    It answers nothing, or an Int.
    """
    names = list(inspect.signature(emit).parameters)[1:]
    gives = inspect.signature(emit).return_annotation is Int

    def typing(context: Any, *arguments: Any) -> Any:
        result = types.int64 if gives else types.void

        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            code = Code(builder)
            answer = emit(code, *(Int(code, value) for value in values))
            return answer.value if gives else context.get_dummy_value()

        return result(*[types.int64] * len(names)), codegen

    typing.__name__ = typing.__qualname__ = emit.__name__
    typing.__module__, typing.__doc__ = emit.__module__, emit.__doc__
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("context", *names)]
    typing.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return intrinsic(typing)
