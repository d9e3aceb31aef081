"""Vectors of the host's width as values in Numba code.

LLVM vectorises many loops by itself, but a micro-kernel needs to say which numbers stay in registers. Here a vector
(16, 8 or 4 floats; half as many doubles) is a value like any other:

    @njit(cache=True)
    def axpy(a, x, y):                                 # y += a x, 1-D and contiguous
        n = lanes(x)                                   # 16 with AVX-512, 8 with AVX2, 4 with NEON or SSE; a constant
        for i in range(0, x.size - n + 1, n):
            store(y, i, fma(splat(a, x), load(x, i), load(y, i)))
        i = x.size // n * n
        store(y, i, a * load(x, i, x.size - i) + load(y, i, x.size - i), x.size - i)      # the tail, by masks

Below, x is a C-contiguous array of float32 or float64 and of any rank, i counts elements from its first one and is not
checked (nothing here is: an offset beyond the array reads or writes what lies there), and `like` is anything that has
the dtype in question: an array, a vector or a number.

| load(x, i)  load(x, i, count)        | a vector of x; beyond `count` lanes memory is not touched and lanes are 0
| store(x, i, v)  store(x, i, v, count)| likewise; v may be a number. A count may be 0, negative or more than the lanes
| stream(x, i, v)                      | a store past the caches, of a whole vector to an aligned address
| broadcast(x, i)  splat(s, like)      | one number of x, or the number s, in all lanes
| zeros(like)  lanes(like)             | all lanes 0; how many lanes there are
| + - * /  += and so on,  -v           | lane by lane; a number beside a vector is spread, and takes the vector's dtype
| fma(a, b, c)                         | a b + c, rounded once where the machine has a fused multiply-add
| maximum(a, b)  minimum(a, b)         | b where either is NaN or both are equal, as x86 has it; also of numbers
| > >= < <= == !=                      | a mask, one bit a lane; with a NaN all are false, only != is true
| select(mask, a, b)                   | a where the mask is set, b elsewhere
| total(v)                             | the sum of the lanes, added in pairs
| transpose(rows)                      | a tuple of as many vectors as each has lanes: the square, transposed
| prefetch(x, i)                       | asks for the cache line of x[i] ahead of time
| distance(x, y)                       | where y lies, counted in elements of x: one address for two arrays

Masks cost nothing extra with AVX-512, little with AVX2; SSE and NEON have none, and take the lanes one by one. So a
kernel keeps the whole vectors and the tail apart, as axpy does. A vector lives in compiled code only: a function that
takes or returns one can be called from @njit code, not from Python.

**Python that runs while compiling.** A register tile is many vectors, and writing 24 accumulators out by hand reads
badly. A function marked `@unrolled` is ordinary Python that runs once, while Numba compiles its caller, on symbols
instead of numbers. Its loops leave no loop behind, its lists live in registers; what it returns (nested tuples) is what
the caller gets:

    @unrolled
    def rank_one(tile, a, i, stride, b, j):            # tile += column of a times row of b, all in registers
        row = [load(b, j + k * lanes(b)) for k in range(len(tile[0]))]
        return [[fma(broadcast(a, i + r * stride), v, t) for v, t in zip(row, tile[r])] for r in range(len(tile))]

| the caller passes                    | the function gets
| a number, a vector, a mask           | a symbol, with the operators of the table
| an array                             | a symbol to load from; x[i] is its element number i, which may be an integer
| a tuple                              | a tuple of these
| a named tuple                        | an instance of its class: methods and class attributes are there
| a literal (8, True, "rows"), None,   |
|   or nothing, where a default exists | that Python value

Every function of the first table is an `@unrolled` function itself, so one spelling serves both worlds. The value of a
symbol is not known yet: `if`, `while` and range() cannot depend on one, and say so; select() and the caller's own
`if` can. What an @unrolled function reads from its module is a constant of the compiled code. `cache=True` works as
ever, and as ever does not notice when a helper changes.

The machine is what Numba compiles for: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES choose another one. WIDTH (bytes of a
vector), REGISTERS, HAS_FMA and ISA say which it is. This file needs Numba and nothing else of its folder.
"""

from __future__ import annotations

import contextlib
import inspect
import numbers
import operator
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.core.extending import _Intrinsic
from numba.extending import models, overload, register_model

# ------------------------------------------------------------------ the machine


def target_features() -> frozenset[str]:
    """Names of the instruction sets that Numba compiles for: the host's, or what NUMBA_CPU_FEATURES says."""
    words = config.CPU_FEATURES  # type: ignore[attr-defined]
    words = get_host_cpu_features() if words is None else words
    names = {word[1:] for word in words.split(",") if word.startswith("+")}
    if platform.machine().lower() in ("arm64", "aarch64"):
        names.add("neon")  # which every such processor has; LLVM knows nothing about some of them
    return frozenset(names)


FEATURES = target_features()
WIDTH = 64 if "avx512f" in FEATURES else 32 if "avx2" in FEATURES else 16  # bytes of a vector register
REGISTERS = 32 if "avx512f" in FEATURES or "neon" in FEATURES else 16
HAS_FMA = bool(FEATURES & {"fma", "neon", "avx512f"})
ISA = "AVX-512" if WIDTH == 64 else "AVX2" if WIDTH == 32 else "NEON" if "neon" in FEATURES else "SSE2"


# ------------------------------------------------------------------ the types that Numba sees

I32, I64, I1 = ir.IntType(32), ir.IntType(64), ir.IntType(1)
ELEMENTS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
Kind = Any  # a Numba type: Numba's own hints do not know its attributes


class VectorType(types.Type):
    """Some lanes of float32 or float64."""

    def __init__(self, dtype: types.Float, count: int):
        self.dtype, self.count = dtype, count
        super().__init__(name=f"{dtype}x{count}")


class MaskType(types.Type):
    """One bit a lane: what a comparison of vectors gives."""

    def __init__(self, count: int):
        self.count = count
        super().__init__(name=f"maskx{count}")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(ELEMENTS[kind.dtype], kind.count))


@register_model(MaskType)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(I1, kind.count))


def vector_of(dtype: Kind) -> VectorType:
    """The vector type of the machine's width for a Numba dtype."""
    if dtype not in ELEMENTS:
        raise TypeError(f"a vector holds float32 or float64, not {dtype}")
    return VectorType(dtype, WIDTH // (dtype.bitwidth // 8))


# ------------------------------------------------------------------ symbols: what an @unrolled function computes with

_compiling = False  # whether Numba is at work, so that symbols mean something
_builder: Any = None  # an ir.IRBuilder; None while it infers types: then symbols carry a type and no value


@contextlib.contextmanager
def _working(builder: ir.IRBuilder | None) -> Iterator[None]:
    global _compiling, _builder
    before = _compiling, _builder
    _compiling, _builder = True, builder
    try:
        yield
    finally:
        _compiling, _builder = before


class Symbol:
    """A number, vector, mask or array in the code being compiled: its Numba type and its LLVM value."""

    def __init__(self, kind: Kind, value: Any = None):
        self.kind, self.value = kind, value

    def __add__(self, other):
        return _arithmetic("add", self, other)

    def __radd__(self, other):
        return _arithmetic("add", other, self)

    def __sub__(self, other):
        return _arithmetic("sub", self, other)

    def __rsub__(self, other):
        return _arithmetic("sub", other, self)

    def __mul__(self, other):
        return _arithmetic("mul", self, other)

    def __rmul__(self, other):
        return _arithmetic("mul", other, self)

    def __truediv__(self, other):
        return _arithmetic("div", self, other)

    def __rtruediv__(self, other):
        return _arithmetic("div", other, self)

    def __neg__(self):
        return _arithmetic("mul", self, -1)

    def __getitem__(self, i):
        """Element `i` of an array, counted like an offset."""
        kind = _element(self)
        if kind in ELEMENTS:
            return _emit(kind, lambda b: b.load(_address(self, i, kind), align=ALIGN))
        if not isinstance(kind, types.Integer):
            raise TypeError(f"an element of an array of floats or integers was expected, not of {self.kind}")

        def make(b):
            number = b.load(_address(self, i, kind), align=ALIGN)
            return (b.sext if kind.signed else b.zext)(number, I64)

        return _emit(types.intp, make)

    def __gt__(self, other):
        return _comparison(">", self, other)

    def __ge__(self, other):
        return _comparison(">=", self, other)

    def __lt__(self, other):
        return _comparison("<", self, other)

    def __le__(self, other):
        return _comparison("<=", self, other)

    def __eq__(self, other):
        return _comparison("==", self, other)

    def __ne__(self, other):
        return _comparison("!=", self, other)

    __hash__ = object.__hash__

    def __bool__(self):
        raise TypeError(f"{self.kind} is not known while compiling: use select(), or `if` in @njit code")

    def __index__(self):
        raise TypeError(f"{self.kind} is not known while compiling: range() and indices of tuples need a literal")

    def __iter__(self):
        raise TypeError(f"{self.kind}: no tuple, there is nothing to iterate over")


def _emit(kind: Kind, make: Callable[[ir.IRBuilder], Any]) -> Symbol:
    return Symbol(kind, None if _builder is None else make(_builder))


def _llvm(kind: Kind) -> ir.Type:
    if isinstance(kind, VectorType):
        return ir.VectorType(ELEMENTS[kind.dtype], kind.count)
    return ELEMENTS.get(kind) or ir.IntType(kind.bitwidth)


def _name(x: Any) -> str:
    return str(x.kind) if isinstance(x, Symbol) else repr(x)


def _as(kind: Kind, x: Any) -> Symbol:
    """`x` as `kind`: a Python number becomes a constant, a scalar is spread over a vector's lanes."""
    spread, real = isinstance(kind, VectorType), kind in ELEMENTS
    if isinstance(x, Symbol):
        if x.kind == kind:
            return x
        if spread and (x.kind in ELEMENTS or x.kind == types.intp):
            number = _as(kind.dtype, x)
            return _emit(kind, lambda b: _spread(b, number.value, kind.count))
        if real and x.kind in ELEMENTS:
            wider = kind.bitwidth > x.kind.bitwidth
            return _emit(kind, lambda b: (b.fpext if wider else b.fptrunc)(x.value, _llvm(kind)))
        if real and x.kind == types.intp:
            return _emit(kind, lambda b: b.sitofp(x.value, _llvm(kind)))
    elif isinstance(x, numbers.Real) and not isinstance(x, bool):
        if spread or real:
            constant = [float(x)] * kind.count if spread else float(x)
            return _emit(kind, lambda b: ir.Constant(_llvm(kind), constant))
        if kind == types.intp and isinstance(x, numbers.Integral):
            return _emit(kind, lambda b: ir.Constant(I64, int(x)))
    raise TypeError(f"expected {kind}, got {_name(x)}")


def _spread(b: ir.IRBuilder, number: ir.Value, count: int) -> ir.Value:
    """An LLVM number in all lanes of a vector."""
    nothing = ir.Constant(ir.VectorType(number.type, count), ir.Undefined)
    first = b.insert_element(nothing, number, ir.Constant(I32, 0))
    return b.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(I32, count), [0] * count))


def _common(*operands: Any) -> Kind:
    """The type in which operands meet: a vector's, else the wider float's, else an integer's."""
    kinds = [x.kind for x in operands if isinstance(x, Symbol)]
    for kind in kinds:
        if isinstance(kind, VectorType):
            return kind
    floats = [kind for kind in kinds if kind in ELEMENTS]
    if floats:
        return max(floats, key=lambda kind: kind.bitwidth)
    return types.float64 if any(isinstance(x, float) for x in operands) else types.intp


def _arithmetic(name: str, a: Any, b: Any) -> Symbol:
    kind = _common(a, b)
    a, b = _as(kind, a), _as(kind, b)
    if kind == types.intp and name == "div":
        raise TypeError("integers are not divided with / in an @unrolled function")
    return _emit(kind, lambda build: getattr(build, name if kind == types.intp else "f" + name)(a.value, b.value))


def _comparison(sign: str, a: Any, b: Any) -> Symbol:
    kind = _common(a, b)
    if not isinstance(kind, VectorType):
        raise TypeError(f"{sign} in an @unrolled function compares vectors: numbers are not known while compiling")
    a, b = _as(kind, a), _as(kind, b)
    compare = "fcmp_unordered" if sign == "!=" else "fcmp_ordered"  # true, or false, where either is NaN
    return _emit(MaskType(kind.count), lambda build: getattr(build, compare)(sign, a.value, b.value))


# ------------------------------------------------------------------ between Numba's values and symbols


def _to_symbols(kind: Kind, value: Any, context: Any = None) -> Any:
    """What an @unrolled function gets for an argument of Numba type `kind` and LLVM value `value`."""
    if isinstance(kind, types.NoneType):
        return None
    if isinstance(kind, types.Omitted):
        return kind.value
    if isinstance(kind, types.Literal):
        return kind.literal_value
    if isinstance(kind, types.Array):
        if kind.layout != "C":
            raise TypeError(f"expected a C-contiguous array, got {kind}: pass np.ascontiguousarray of it")
        data = None if _builder is None else cgutils.create_struct_proxy(kind)(context, _builder, value).data
        return Symbol(kind, data)
    if isinstance(kind, types.BaseTuple):
        parts = [
            _to_symbols(k, None if _builder is None else _builder.extract_value(value, i), context)
            for i, k in enumerate(kind.types)  # type: ignore[attr-defined]
        ]
        named = getattr(kind, "instance_class", None)
        return named(*parts) if named else tuple(parts)
    if isinstance(kind, types.Boolean):
        raise TypeError("an @unrolled function takes no boolean but a literal one: it is not known while compiling")
    if isinstance(kind, types.Integer):
        wide = None if _builder is None else context.cast(_builder, value, kind, types.intp)
        return Symbol(types.intp, wide)
    return Symbol(kind, value)


def _kind_of(result: Any) -> Kind:
    """The Numba type of what an @unrolled function returns."""
    if result is None:
        return types.none
    if isinstance(result, list | tuple):
        kinds = [_kind_of(r) for r in result]
        named = type(result) if hasattr(result, "_fields") else None
        if named and kinds and all(kind == kinds[0] for kind in kinds):
            return types.NamedUniTuple(kinds[0], len(kinds), named)
        return types.NamedTuple(kinds, named) if named else types.Tuple(kinds)
    if isinstance(result, Symbol) and not isinstance(result.kind, types.Array):
        return result.kind
    if isinstance(result, numbers.Real) and not isinstance(result, bool):
        return types.intp if isinstance(result, numbers.Integral) else types.float64
    raise TypeError(f"an @unrolled function returns numbers, vectors, masks and tuples of them, not {_name(result)}")


def _to_value(result: Any, context: Any) -> Any:
    if result is None:
        return context.get_dummy_value()
    if isinstance(result, list | tuple):
        return context.make_tuple(_builder, _kind_of(result), [_to_value(r, context) for r in result])
    return result.value if isinstance(result, Symbol) else _as(_kind_of(result), result).value


class Unrolled(_Intrinsic):  # type: ignore[misc]
    """What `@unrolled` makes: an intrinsic for Numba, and still a Python function for other `@unrolled` functions."""

    function: Callable
    __qualname__: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _compiling:
            raise TypeError(f"{self._name}() works in @njit code and in @unrolled functions, not in plain Python")
        return self.function(*args, **kwargs)

    def __reduce__(self) -> Any:
        """Pickled by name where it has one, so that Numba's cache knows it again in another process."""
        found = getattr(sys.modules.get(self.__module__), self.__qualname__, None)
        return self.__qualname__ if found is self else super().__reduce__()


def unrolled(function: Callable) -> Unrolled:
    """Mark a Python function to run while Numba compiles its caller, on symbols; see the head of this file."""
    of_function = inspect.signature(function)
    parameters = list(of_function.parameters.values())
    if any(p.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters):
        raise TypeError(f"{function.__name__}{of_function}: an @unrolled function has plain parameters, no * and no /")

    def definition(typing_context, *kinds, **named):
        given = of_function.bind(*kinds, **named)
        given.apply_defaults()
        kinds = [k if isinstance(k, types.Type) else types.Omitted(k) for k in given.arguments.values()]
        with _working(None):
            signature = _kind_of(function(*(_to_symbols(k, None) for k in kinds)))(*kinds)

        def generate(context, builder, signature, values):
            with _working(builder):
                symbols = [_to_symbols(k, v, context) for k, v in zip(signature.args, values, strict=True)]
                return _to_value(function(*symbols), context)

        return signature, generate

    context = inspect.Parameter("typing_context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    definition.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    definition.__name__, definition.__doc__ = function.__name__, function.__doc__
    made = Unrolled(function.__name__, definition, prefer_literal=True)
    made.function = function
    made.__module__, made.__qualname__ = function.__module__, function.__qualname__
    made._register()
    return made


# ------------------------------------------------------------------ memory


ALIGN = 1  # bytes: no array promises more, and loads that assume less cost nothing


def _element(x: Any) -> Kind:
    """The dtype of the array `x`."""
    if not (isinstance(x, Symbol) and isinstance(x.kind, types.Array)):
        raise TypeError(f"expected an array, got {_name(x)}")
    return x.kind.dtype


def _like(like: Any) -> VectorType:
    """The vector type for the dtype of an array, a vector or a number."""
    if not isinstance(like, Symbol):
        raise TypeError(f"expected an array, a vector or a number of known dtype, got {_name(like)}")
    return vector_of(getattr(like.kind, "dtype", like.kind))


def _address(x: Symbol, i: Any, kind: Kind):
    b, i = _builder, _as(types.intp, i)
    return b.bitcast(b.gep(x.value, [i.value]), _llvm(kind).as_pointer())


def _first(count: Any, kind: Kind) -> Symbol:
    """The mask of the first `count` lanes: of none if it is negative, of all if it is large."""
    count = _one_of("<", _one_of(">", _as(types.intp, count), 0), kind.count)

    def make(b):
        lane = ir.IntType(kind.dtype.bitwidth)  # compared as wide as the data: what a masked move of AVX2 reads
        counts = _spread(b, b.trunc(count.value, lane), kind.count)
        return b.icmp_signed("<", ir.Constant(counts.type, list(range(kind.count))), counts)

    return _emit(MaskType(kind.count), make)


def _masked(name: str, kind: Kind, result: ir.Type, arguments: list[ir.Type]):
    lane = "f32" if kind.dtype == types.float32 else "f64"
    signature = ir.FunctionType(result, arguments)
    return cgutils.get_or_insert_function(_builder.module, signature, f"llvm.masked.{name}.v{kind.count}{lane}.p0")


@unrolled
def load(x, i, count=None):
    """The vector of `x` that begins at element `i`; with `count`, only its first lanes, the others 0."""
    kind = vector_of(_element(x))
    if count is None:
        return _emit(kind, lambda b: b.load(_address(x, i, kind), align=ALIGN))
    mask = _first(count, kind)

    def make(b):
        vector, pointer = _llvm(kind), _llvm(kind).as_pointer()
        function = _masked("load", kind, vector, [pointer, I32, ir.VectorType(I1, kind.count), vector])
        zero = ir.Constant(vector, [0.0] * kind.count)
        return b.call(function, [_address(x, i, kind), ir.Constant(I32, ALIGN), mask.value, zero])

    return _emit(kind, make)


@unrolled
def store(x, i, v, count=None):
    """Write `v` to `x` from element `i` on; with `count`, only its first lanes."""
    kind = vector_of(_element(x))
    if not x.kind.mutable:
        raise TypeError(f"cannot store to a read-only array: {x.kind}")
    v = _as(kind, v)
    if count is None:
        _emit(types.none, lambda b: b.store(v.value, _address(x, i, kind), align=ALIGN))
        return
    mask = _first(count, kind)

    def make(b):
        vector, pointer = _llvm(kind), _llvm(kind).as_pointer()
        signature = [vector, pointer, I32, ir.VectorType(I1, kind.count)]
        function = _masked("store", kind, ir.VoidType(), signature)
        return b.call(function, [v.value, _address(x, i, kind), ir.Constant(I32, ALIGN), mask.value])

    _emit(types.none, make)


@unrolled
def stream(x, i, v):
    """Write `v` to `x` from element `i` on, past the caches. The address must be a multiple of the vector's bytes.

    An ordinary store first reads the line that it is about to overwrite. For a result that is larger than the caches,
    and so will have to be read from memory anyway, that is a third of all traffic of a pass that reads one array and
    writes another. Other threads may see it late: when this one has passed a barrier, such as the end of a prange.
    """
    kind = vector_of(_element(x))
    v = _as(kind, v)

    def make(b):
        written = b.store(v.value, _address(x, i, kind), align=WIDTH)
        return written.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))

    _emit(types.none, make)


@unrolled
def broadcast(x, i):
    """Element `i` of `x` in all lanes."""
    kind = vector_of(_element(x))
    return _as(kind, x[i])


@unrolled
def distance(x, y):
    """How many elements `y` lies beyond `x` in memory, so that load(x, distance(x, y)) reads y: x and y of one dtype.

    So one table of offsets can point into several arrays. Their distance must be whole elements, and whoever uses it
    keeps `y` alive: Numba does not know that `y` is read through `x`.
    """
    if _element(x) != _element(y):
        raise TypeError(f"distance counts elements of one dtype, got {x.kind} and {y.kind}")
    size = ir.Constant(I64, x.kind.dtype.bitwidth // 8)
    return _emit(types.intp, lambda b: b.sdiv(b.sub(b.ptrtoint(y.value, I64), b.ptrtoint(x.value, I64)), size))


@unrolled
def prefetch(x, i):
    """Ask for the cache line of element `i` of `x` ahead of time."""
    kind = _element(x)

    def make(b):
        pointer = ir.IntType(8).as_pointer()
        signature = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        function = cgutils.get_or_insert_function(b.module, signature, "llvm.prefetch.p0")
        address = b.bitcast(_address(x, i, kind), pointer)
        return b.call(function, [address, *(ir.Constant(I32, n) for n in (0, 3, 1))])  # to read; keep; data

    _emit(types.none, make)


# ------------------------------------------------------------------ registers


@unrolled
def lanes(like):
    """How many numbers of the dtype of `like`, an array or a vector, fit into a vector."""
    return _like(like).count


@unrolled
def splat(s, like):
    """The number `s` in all lanes."""
    return _as(_like(like), s)


@unrolled
def zeros(like):
    """All lanes 0."""
    return _as(_like(like), 0.0)


@unrolled
def fma(a, b, c):
    """a b + c, rounded once where the machine has a fused multiply-add."""
    kind = _common(a, b, c)
    a, b, c = _as(kind, a), _as(kind, b), _as(kind, c)
    if not HAS_FMA or kind == types.intp:
        return a * b + c

    def make(build):
        number = kind.dtype if isinstance(kind, VectorType) else kind
        vector = f"v{kind.count}" if isinstance(kind, VectorType) else ""
        signature = ir.FunctionType(_llvm(kind), [_llvm(kind)] * 3)
        name = f"llvm.fma.{vector}f{number.bitwidth}"
        return build.call(cgutils.get_or_insert_function(build.module, signature, name), [a.value, b.value, c.value])

    return _emit(kind, make)


@unrolled
def select(mask, a, b):
    """a where the mask is set, b elsewhere."""
    kind = _common(a, b)
    if not isinstance(kind, VectorType):
        raise TypeError("select needs at least one vector")
    if not (isinstance(mask, Symbol) and mask.kind == MaskType(kind.count)):
        raise TypeError(f"select between vectors of {kind.count} lanes needs a mask of as many, got {_name(mask)}")
    a, b = _as(kind, a), _as(kind, b)
    return _emit(kind, lambda build: build.select(mask.value, a.value, b.value))


@unrolled
def maximum(a, b):
    """The larger of each pair; b where either is NaN or both are equal (0 and -0 are), as the x86 instruction does."""
    return _one_of(">", a, b)


@unrolled
def minimum(a, b):
    """The smaller of each pair; b where either is NaN or both are equal."""
    return _one_of("<", a, b)


def _one_of(sign: str, a: Any, b: Any) -> Symbol:
    """a where a `sign` b, else b; of vectors lane by lane, of numbers once."""
    kind = _common(a, b)
    a, b = _as(kind, a), _as(kind, b)
    integers = kind == types.intp

    def make(build):
        holds = build.icmp_signed(sign, a.value, b.value) if integers else build.fcmp_ordered(sign, a.value, b.value)
        return build.select(holds, a.value, b.value)

    return _emit(kind, make)


@unrolled
def equal(a, b):
    """a == b as a mask."""
    return _comparison("==", a, b)


def _vectors(them: Any) -> VectorType:
    """The one type of all vectors of a tuple."""
    kinds = {x.kind if isinstance(x, Symbol) else x for x in them} if isinstance(them, list | tuple) else {}
    if len(kinds) != 1 or not isinstance(kind := next(iter(kinds)), VectorType):
        raise TypeError(f"expected vectors of one type, got {', '.join(map(_name, them)) if kinds else _name(them)}")
    return kind


def _shuffle(a: Symbol, b: Symbol, order: list[int]) -> Symbol:
    """Lanes of a (numbered from 0) and b (numbered after a's) in the given order."""
    kind = a.kind
    pattern = ir.Constant(ir.VectorType(I32, kind.count), order)
    return _emit(kind, lambda build: build.shuffle_vector(a.value, b.value, pattern))


@unrolled
def total(v):
    """The sum of the lanes, in log2(lanes) halvings."""
    _vectors([v])
    n, half = v.kind.count, v.kind.count // 2
    while half:
        v = v + _shuffle(v, v, [(lane + half) % n for lane in range(n)])
        half //= 2
    return _emit(v.kind.dtype, lambda b: b.extract_element(v.value, ir.Constant(I32, 0)))


@unrolled
def transpose(rows):
    """A square of as many vectors as each has lanes, transposed by log2(lanes) rounds of exchanges.

    Round s swaps, between rows r and r + s, the lanes in which bit s of row and lane differ (Eklundh 1972).
    """
    rows, n = list(rows), _vectors(rows).count
    if len(rows) != n:
        raise TypeError(f"transpose needs {n} vectors of {n} lanes, got {len(rows)}")
    s = n // 2
    while s:
        for r in range(n):
            if not r & s:
                low = [lane if not lane & s else n + (lane & ~s) for lane in range(n)]
                high = [lane | s if not lane & s else n + lane for lane in range(n)]
                a, b = rows[r], rows[r | s]
                rows[r], rows[r | s] = _shuffle(a, b, low), _shuffle(a, b, high)
        s //= 2
    return rows


# ------------------------------------------------------------------ operators in @njit code

_add = unrolled(lambda a, b: a + b)
_sub = unrolled(lambda a, b: a - b)
_mul = unrolled(lambda a, b: a * b)
_div = unrolled(lambda a, b: a / b)
_gt = unrolled(lambda a, b: a > b)
_ge = unrolled(lambda a, b: a >= b)
_lt = unrolled(lambda a, b: a < b)
_le = unrolled(lambda a, b: a <= b)
_ne = unrolled(lambda a, b: a != b)
_neg = unrolled(lambda a: -a)


def _attach(sign: Callable, function: Unrolled) -> None:
    @overload(sign)
    def typed(a, b):
        if isinstance(a, VectorType) or isinstance(b, VectorType):
            return lambda a, b: function(a, b)
        return None


for _sign, _function in (
    (operator.add, _add),
    (operator.iadd, _add),
    (operator.sub, _sub),
    (operator.isub, _sub),
    (operator.mul, _mul),
    (operator.imul, _mul),
    (operator.truediv, _div),
    (operator.itruediv, _div),
    (operator.gt, _gt),
    (operator.ge, _ge),
    (operator.lt, _lt),
    (operator.le, _le),
    (operator.eq, equal),
    (operator.ne, _ne),
):
    _attach(_sign, _function)


@overload(operator.neg)
def _negative(a):
    if isinstance(a, VectorType):
        return lambda a: _neg(a)
    return None
