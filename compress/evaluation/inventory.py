"""What a serialised model holds, read without running any of it: the counts of the 2.5M-parameter task.

A serialised model is two numbers of 8 bytes (the bytes of the pickle, the number of storages), the size of each storage in
8 bytes, the pickle, and the storages one after the other. The file runs in the sandbox's child before any foreign code
does, imports only the standard library, and is loaded by its path. Nothing in the pickle is looked up, called or hashed: a
name, a call and an object each become a record of what the pickle says. Time and memory grow with the number of bytes, and
the process has limits for both.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections.abc import Iterator
from typing import Any

HEADER = struct.Struct("<QQ")
UNPICKLER: Any = pickle._Unpickler  # the one in Python, whose opcodes can be replaced
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
NORMS = ("torch.nn.modules.batchnorm.", "torch.nn.modules.instancenorm.")
WIDTHS = {"float64": 8, "complex64": 8, "complex128": 16, "float16": 2, "bfloat16": 2, "int64": 8}  # else 4 bytes
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Record:
    """What a pickle says of an object: the name of a global, or what was called, with what, and what was added later."""

    __slots__ = ("added", "given", "name", "pairs", "states")

    def __init__(self, name: Any, given: Any = ()) -> None:
        self.name, self.given = name, given
        self.states: list[Any] = []
        self.pairs: list[tuple[Any, Any]] = []
        self.added: list[Any] = []

    def append(self, item: Any) -> None:
        """Keep an item that the pickle appends."""
        self.added.append(item)

    def parts(self) -> Iterator[Any]:
        """Yield all that the record holds."""
        yield self.name
        yield self.given
        yield from self.states
        yield from self.added
        for pair in self.pairs:
            yield from pair

    def called(self) -> str:
        """Return the name of the global that was called, or an empty text."""
        return self.name.name if isinstance(self.name, Record) and isinstance(self.name.name, str) else ""


class Storage:
    """A reference to one of the storages behind the pickle."""

    __slots__ = ("dtype", "index")

    def __init__(self, index: int, dtype: str) -> None:
        self.index, self.dtype = index, dtype


class Reading(UNPICKLER):  # type: ignore[misc]
    """Python's own unpickler in Python, with a record in the place of everything that it would look up, call or hash.

    Args:
        stream: the pickle.
        storages: how many storages there are.
    """

    def __init__(self, stream: bytes, storages: int) -> None:
        super().__init__(io.BytesIO(stream))
        self.storages = storages
        self.made: list[Record] = []

    def find_class(self, module: str, name: str) -> Any:
        """Return a record of the name. Nothing is imported."""
        return Record(f"{module}.{name}")

    def get_extension(self, code: int) -> None:
        """Put a record in the place of an extension code."""
        self.append(Record(f"extension {code}"))

    def persistent_load(self, pid: Any) -> Any:
        """Return a reference to a storage."""
        if not (isinstance(pid, tuple) and len(pid) == 3 and pid[0] == "storage" and type(pid[2]) is int
                and 0 <= pid[2] < self.storages):
            raise pickle.UnpicklingError("a storage that is not there")
        return Storage(pid[2], str(pid[1]))

    def _make(self, name: Any, given: Any = ()) -> None:
        record = Record(name, given)
        self.made.append(record)
        self.append(record)

    def load_call(self) -> None:
        """Record a call: REDUCE and NEWOBJ."""
        given, name = self.stack.pop(), self.stack.pop()
        self._make(name, given)

    def load_call_with_names(self) -> None:
        """Record a call with arguments by name: NEWOBJ_EX."""
        names, given, name = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self._make(name, (given, names))

    def load_old_call(self) -> None:
        """Record a call in the oldest protocol: OBJ."""
        name, *given = self.pop_mark()
        self._make(name, tuple(given))

    def load_old_instance(self) -> None:
        """Record an instance in the oldest protocol: INST."""
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        self._make(Record(f"{module}.{name}"), tuple(self.pop_mark()))

    def load_state(self) -> None:
        """Record an object's state: BUILD."""
        state = self.stack.pop()
        self._top().states.append(state)

    def load_collection(self) -> None:
        """Begin a dict or a set; its elements are not hashed."""
        self._make("collection")

    def load_full_dict(self) -> None:
        """Record a dict with its items: DICT."""
        items = self.pop_mark()
        self._make("collection")
        self._pair(items)

    def load_full_set(self) -> None:
        """Record a frozenset with its elements."""
        items = self.pop_mark()
        self._make("collection", items)

    def load_item(self) -> None:
        """Record one item of a dict: SETITEM."""
        value, key = self.stack.pop(), self.stack.pop()
        self._pair([key, value])

    def load_items(self) -> None:
        """Record items of a dict: SETITEMS."""
        self._pair(self.pop_mark())

    def load_elements(self) -> None:
        """Record elements of a list or set: APPENDS and ADDITEMS."""
        elements, top = self.pop_mark(), self.stack[-1]
        (top if isinstance(top, list) else self._top().added).extend(elements)

    def _pair(self, items: list[Any]) -> None:
        self._top().pairs.extend(zip(items[::2], items[1::2], strict=True))

    def _top(self) -> Record:
        top = self.stack[-1]
        if not isinstance(top, Record):
            raise pickle.UnpicklingError("a state or items of something that has none")
        return top

    dispatch = UNPICKLER.dispatch | {
        pickle.REDUCE[0]: load_call, pickle.NEWOBJ[0]: load_call, pickle.NEWOBJ_EX[0]: load_call_with_names,
        pickle.OBJ[0]: load_old_call, pickle.INST[0]: load_old_instance, pickle.BUILD[0]: load_state,
        pickle.EMPTY_DICT[0]: load_collection, pickle.EMPTY_SET[0]: load_collection, pickle.DICT[0]: load_full_dict,
        pickle.FROZENSET[0]: load_full_set, pickle.SETITEM[0]: load_item, pickle.SETITEMS[0]: load_items,
        pickle.APPENDS[0]: load_elements, pickle.ADDITEMS[0]: load_elements}


def cut(content: bytes) -> tuple[bytes, list[int], int]:
    """Return the pickle in a serialised model, the sizes of the storages, and where the storages begin.

    Raises:
        ValueError: the sizes do not add up to the bytes that are there.
    """
    if len(content) < HEADER.size:
        raise ValueError("the serialised model has no header")
    length, count = HEADER.unpack_from(content)
    start = HEADER.size + 8 * count
    if start + length > len(content):
        raise ValueError("the serialised model is cut short")
    sizes = list(struct.unpack_from(f"<{count}Q", content, HEADER.size))
    if start + length + sum(sizes) != len(content):
        raise ValueError("the serialised model's sizes do not add up")
    return content[start:start + length], sizes, start + length


def take_inventory(content: bytes) -> dict[str, int]:
    """Return what a serialised model holds.

    Returns:
        `trainable`: the numbers in distinct trainable parameters of the modules in the model's tree, by the public rule.
        `trainable_bytes`: what these take. `elsewhere`, `elsewhere_bytes`: trainable parameters outside the tree.
        `statistics`: numbers in the running statistics of torch's own batch norms. `statistics_bytes`: what these take.
        `storage_bytes`: all storages. `other_bytes`: the pickle and all that is left.

    Raises:
        ValueError, pickle.UnpicklingError, and whatever else a damaged or hostile pickle causes.
    """
    stream, sizes, _ = cut(content)
    reading = Reading(stream, len(sizes))
    root = reading.load()
    in_tree, statistics = _tree(root)
    known = {id(record) for record in in_tree}
    others = [record for record in reading.made if record.called() in PARAMETERS and id(record) not in known]
    left = dict(enumerate(sizes))  # bytes of each storage that no tensor has been given yet
    facts: dict[str, int] = {}
    for name, records in (("trainable", [r for r in in_tree if _requires_grad(r)]),
                          ("elsewhere", [r for r in others if _requires_grad(r)]), ("statistics", statistics)):
        numbers = taken = 0
        for record in records:
            count, size = _claim(record, left)
            numbers, taken = numbers + count, taken + size
        facts |= {name: numbers, f"{name}_bytes": taken}
    return facts | {"storage_bytes": sum(sizes), "other_bytes": len(content) - sum(sizes)}


def _tree(root: Any) -> tuple[list[Record], list[Record]]:
    """Return the distinct parameters of the modules that the root leads to, and the running statistics of batch norms."""
    parameters: dict[int, Record] = {}
    statistics: dict[int, Record] = {}
    waiting, seen = [root], set()
    while waiting:
        module = waiting.pop()
        if not isinstance(module, Record) or id(module) in seen:
            continue
        seen.add(id(module))
        for state in (*module.states, *(module.given if isinstance(module.given, tuple) else ())):
            for key, value in state.pairs if isinstance(state, Record) else ():
                held = [item for _, item in value.pairs] if isinstance(value, Record) else []
                if key == "_modules":
                    waiting += held
                elif key == "_parameters":
                    parameters |= {id(item): item for item in held if isinstance(item, Record)}
                elif key == "_buffers" and module.called().startswith(NORMS):
                    statistics |= {id(item): item for name, item in value.pairs if name in STATISTICS
                                   and isinstance(item, Record)} if isinstance(value, Record) else {}
    return list(parameters.values()), list(statistics.values())


def _requires_grad(parameter: Record) -> bool:
    given = parameter.given
    return isinstance(given, tuple) and len(given) > 1 and given[1] is True


def _claim(record: Record, left: dict[int, int]) -> tuple[int, int]:
    """Return the numbers in a parameter or tensor, and how many bytes of its storage are its own. These are then taken."""
    tensor = record.given[0] if record.called() in PARAMETERS and record.given else record
    if not isinstance(tensor, Record) or tensor.called() not in TENSORS or not isinstance(tensor.given, tuple):
        return 0, 0
    storage, _, shape = tensor.given[:3]
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not all(
            type(size) is int and 0 <= size < 2**40 for size in shape):
        return 0, 0
    count = math.prod(shape)
    taken = min(left[storage.index], WIDTHS.get(storage.dtype, 4) * count)
    left[storage.index] -= taken
    return count, taken
