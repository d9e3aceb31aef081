"""A parallel loop in compiled code: what `prange` does for a loop that calls one function, compiled in half the time.

    @njit(cache=True)
    def kernel(x, y):
        parallel_for(len(x), row, (x, y))              # row(i, x, y) for each i

Of a loop with prange Numba makes a function, of that a ufunc, of that a wrapper, and at last the kernel; at each step
LLVM optimises once more all that the loop calls, and writes machine code for it. Here the loop is one call in the
kernel itself. It runs on Numba's threads as prange does (threads.limit() has started them), and meanwhile Python's
lock is free.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils, errors
from numba.extending import intrinsic

INT, BYTES = ir.IntType(64), ir.IntType(8).as_pointer()
TASK = ir.FunctionType(ir.VoidType(), [BYTES.as_pointer(), INT.as_pointer(), INT.as_pointer(), BYTES])


@intrinsic
def parallel_for(typing_context, count, function, arguments):
    """function(i, *arguments) for each i in range(count), spread over the threads that numba.set_num_threads allows.

    `function` is an @njit function that returns nothing. Numbers reach it as numbers, literal or not, so that it is
    compiled once. An exception in it becomes a RuntimeError here, after the loop.
    """
    kinds_fit = isinstance(types.unliteral(count), types.Integer) and isinstance(arguments, types.BaseTuple)
    if not kinds_fit or not isinstance(function, types.Dispatcher):
        expected = "an integer, an @njit function, (arguments)"
        raise errors.TypingError(f"parallel_for({expected}), not {count}, {function}, {arguments}")
    kinds = [_plain(kind) for kind in arguments.types]
    called = function.get_call_type(typing_context, (types.intp, *kinds), {})
    if len(called.args) != 1 + len(kinds):
        raise errors.TypingError(f"{function} takes {len(called.args)} arguments, parallel_for gives {1 + len(kinds)}")
    if called.return_type != types.none:
        raise errors.TypingError(f"a function for parallel_for returns nothing, this one {called.return_type}")

    def generate(context, builder, signature, values):
        given = [
            context.cast(builder, builder.extract_value(values[2], i), kind, wanted)
            for i, (kind, wanted) in enumerate(zip(arguments.types, called.args[1:], strict=True))
        ]
        failed = cgutils.alloca_once_value(builder, ir.Constant(INT, 0))
        shared = cgutils.pack_struct(builder, [failed, *given])  # what all tasks read
        place = cgutils.alloca_once_value(builder, shared)
        task = ir.Function(builder.module, TASK, builder.module.get_unique_name("task"))
        _define(task, context, function, called, shared.type)
        nothing = builder.icmp_signed("<", values[0], INT(0))
        _launch(context, builder, task, builder.select(nothing, INT(0), values[0]), place)
        with cgutils.if_unlikely(builder, builder.icmp_signed("!=", builder.load(failed), INT(0))):
            context.call_conv.return_user_exc(builder, RuntimeError, ("a call by parallel_for has failed",))
        return context.get_dummy_value()

    return types.none(types.intp, function, arguments), generate


def _plain(kind):
    """A type without literal numbers: a function would be compiled anew for each of them."""
    if isinstance(kind, types.BaseTuple) and not isinstance(kind, types.BaseNamedTuple):
        return types.BaseTuple.from_types([_plain(k) for k in kind.types])
    return types.unliteral(kind)


def _define(task, context, function, called, layout):
    """What Numba's threads call for a run of items: where the first one lies, how many they are, and what all read."""
    task.linkage = "internal"
    builder = ir.IRBuilder(task.append_basic_block())
    places, counts, _, data = task.args
    first, count = builder.ptrtoint(builder.load(places), INT), builder.load(counts)
    failed, *given = cgutils.unpack_tuple(builder, builder.load(builder.bitcast(data, layout.as_pointer())))
    given = [_borrowed(context, builder, *pair) for pair in zip(called.args[1:], given, strict=True)]
    overload = function.dispatcher.overloads[called.args]
    context.add_linking_libs([overload.library])
    with cgutils.for_range(builder, count) as loop:
        item = builder.add(first, loop.index)
        status, _ = context.call_internal_no_propagate(builder, overload.fndesc, called, [item, *given])
        with cgutils.if_unlikely(builder, status.is_error):
            builder.store(INT(1), failed)
    builder.ret_void()


def _borrowed(context, builder, kind, value):
    """Arrays as nobody's: the kernel that waits keeps them alive, and threads need not count who else does."""
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = array.parent = ir.Constant(BYTES, None)
        return array._getvalue()
    if isinstance(kind, types.BaseTuple):
        parts = [_borrowed(context, builder, k, builder.extract_value(value, i)) for i, k in enumerate(kind.types)]
        return context.make_tuple(builder, kind, parts)
    return value


def _launch(context, builder, task, count, place):
    """Call Numba's loop over threads, as its ufuncs do, with one "array": at address 0, of items of one byte, so that
    an item's address is its number."""

    def known(name, result, *arguments):
        return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)

    def slot(number):
        return builder.bitcast(cgutils.alloca_once_value(builder, number), BYTES)

    threads = builder.call(known("get_num_threads", INT), [])
    loop = known("numba_parallel_for", ir.VoidType(), *[BYTES] * 5, *[INT] * 3)
    first, size, step = slot(ir.Constant(BYTES, None)), slot(count), slot(INT(1))
    python = context.get_python_api(builder)
    lock = python.gil_ensure()
    thread = python.save_thread()
    task, place = builder.bitcast(task, BYTES), builder.bitcast(place, BYTES)
    builder.call(loop, [task, first, size, step, place, INT(0), INT(1), threads])
    python.restore_thread(thread)
    python.gil_release(lock)
