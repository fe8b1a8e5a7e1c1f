"""Analyses a compiled program: what its instructions compute, move and copy.

XLA's own cost analysis is empty for GPU programs, and counts a write in place as a write of the
whole array.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import jax

# Instructions without work of their own: they only refer to existing arrays or computations.
_NAMES = {
    "bitcast", "constant", "get-tuple-element", "opt-barrier", "parameter", "tuple",
    "conditional", "while", "call", "copy-done", "slice-done", "async-done",
}  # fmt: skip
_IN_PLACE = {"scatter", "dynamic-update-slice"}
_PICKING = {"gather", "dynamic-slice"}
_SIZES = {"pred": 1, "bf16": 2}

_HEAD = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True, slots=True)
class Array:
    """An array that an instruction produces.

    Attributes:
      dtype: dtype in XLA's notation.
      shape: size of each axis.
      near: whether the array is in a core's fast memory.
    """

    dtype: str
    shape: tuple[int, ...]
    near: bool

    @property
    def bytes(self) -> int:
        """Bytes, without padding."""
        bits = re.search(r"\d+", self.dtype)
        width = _SIZES.get(self.dtype) or (max(1, int(bits[0]) // 8) if bits else 0)
        return math.prod(self.shape) * width

    @property
    def size(self) -> int:
        """Bytes in the device's memory; 0 for an array in fast memory."""
        return 0 if self.near else self.bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction, which is one line of a compiled program's text.

    Attributes:
      name: name of the instruction.
      opcode: XLA's name of its operation.
      arrays: the arrays that it produces.
      operands: names of the instructions in its computation whose results it reads.
      rest: the text of its operands and attributes.
      is_root: whether it produces the result of its computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    def called(self, attribute: str) -> str | None:
        """Returns the name of the computation under an attribute such as "calls" or "body"."""
        found = re.search(rf"\b{attribute}=%([^\s,}}]+)", self.rest)
        return found and found[1]

    def axes(self, attribute: str) -> list[int]:
        """Returns the axes under an attribute such as "lhs_contracting_dims"."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.rest)
        return [int(axis) for axis in found[1].split(",") if axis] if found else []


class Program:
    """The instructions of a compiled program.

    The body of a loop counts once, however often it runs. Branches of conditionals do not count,
    because programs use them for work that a round rarely needs.
    """

    def __init__(self, compiled: jax.stages.Compiled):
        """Parses the program's text.

        Raises:
          ValueError: the program has no text, or this version of jaxlib cannot read it.
        """
        try:
            text = compiled.as_text() or ""
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"compiled: {error}") from error
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._entry = ""
        here: dict[str, Instruction] = {}
        for line in text.splitlines():
            if head := _HEAD.match(line):
                here = self._computations[head[2]] = {}
                self._entry = head[2] if head[1] else self._entry
            elif found := _LINE.match(line):
                root, name, arrays, opcode, rest = found.groups()
                here[name] = Instruction(
                    name, opcode, _arrays(arrays), _operands(rest), rest, root is not None
                )
        if not self._entry:
            raise ValueError("compiled: its text has no entry")

    def executed(self) -> Iterator[tuple[Instruction, dict[str, Instruction]]]:
        """Yields each instruction that the device executes, and its computation's instructions."""
        names = [self._entry]
        while names:
            computation = self._computations[names.pop()]
            for instruction in computation.values():
                yield instruction, computation
                if instruction.opcode in ("while", "call"):
                    inner = instruction.called("body") or instruction.called("to_apply")
                    names += [inner] if inner else []

    def kernels(self) -> list[Instruction]:
        """Returns the Mosaic kernels. XLA does not know what they compute."""
        return [
            instruction
            for instruction, _ in self.executed()
            if instruction.opcode == "custom-call"
            and re.search(r'custom_call_target="(mosaic_gpu|tpu_custom_call)', instruction.rest)
        ]

    def made(self, shape: tuple[int, ...]) -> list[Instruction]:
        """Returns the instructions that create an array of at least the size of `shape`.

        Instructions that write in place are left out.
        """
        numbers = math.prod(shape)
        return [
            instruction
            for instruction, _ in self.executed()
            if instruction.opcode not in _NAMES
            and any(math.prod(array.shape) >= numbers for array in instruction.arrays)
            and not self._writes_in_place(instruction)
        ]

    def products(self) -> int:
        """Counts the operations of all matrix products, two for each pair of numbers."""
        total = 0
        for instruction, computation in self.executed():
            total += self._products(instruction, computation)
        return total

    def bytes_moved(self) -> int:
        """Counts the bytes that instructions other than Mosaic kernels read and write.

        Each instruction reads its operands from memory and writes its results to memory. If it only
        gathers rows from an array, or only writes rows to it, only these rows count.
        """
        kernels = {kernel.name for kernel in self.kernels()}
        total = 0
        for instruction, computation in self.executed():
            if instruction.opcode in _NAMES or instruction.name in kernels:
                continue
            inner = self._computations.get(instruction.called("calls") or "")
            if instruction.opcode == "fusion" and inner:
                total += _moved_by_fusion(instruction, inner)
            else:
                total += _moved(instruction, computation)
        return total

    def _writes_in_place(self, instruction: Instruction) -> bool:
        inner = self._computations.get(instruction.called("calls") or "", {})
        return instruction.opcode in _IN_PLACE or (
            instruction.opcode == "fusion"
            and any(inside.is_root and inside.opcode in _IN_PLACE for inside in inner.values())
        )

    def _products(self, instruction: Instruction, computation: dict[str, Instruction]) -> int:
        if instruction.opcode == "dot":
            first = computation[instruction.operands[0]].arrays[0].shape
            contracted = [first[axis] for axis in instruction.axes("lhs_contracting_dims")]
            return 2 * math.prod(instruction.arrays[0].shape) * math.prod(contracted)
        if instruction.opcode == "convolution":  # on TPUs, products are convolutions of width one
            found = re.search(r"dim_labels=(\w+)_\w+->", instruction.rest)
            first = computation[instruction.operands[0]].arrays[0].shape
            contracted = first[found[1].index("f")] if found else 0
            return 2 * math.prod(instruction.arrays[0].shape) * contracted
        inner = self._computations.get(instruction.called("calls") or "", {})
        return sum(self._products(inside, inner) for inside in inner.values())


def _moved(instruction: Instruction, computation: dict[str, Instruction]) -> int:
    """Counts the bytes that an instruction other than a fusion moves."""
    taken = [computation[name] for name in instruction.operands if name in computation]
    given = sum(array.size for array in instruction.arrays)
    if instruction.opcode in _PICKING:
        return 2 * given
    if instruction.opcode in _IN_PLACE:
        return 2 * sum(array.size for array in taken[-1].arrays)
    if instruction.opcode == "slice-start":
        part = instruction.arrays[1]  # arrays[0] is the array that it is a part of
        return part.bytes + part.size
    if instruction.opcode.endswith("-start"):
        given = sum(array.size for array in instruction.arrays[:1])
    return given + sum(array.size for operand in taken for array in operand.arrays)


def _moved_by_fusion(instruction: Instruction, inner: dict[str, Instruction]) -> int:
    total = 0
    for inside in inner.values():
        uses = [other for other in inner.values() if inside.name in other.operands]
        if inside.opcode == "parameter":
            if uses and all(_of_first(use, inside, _PICKING | _IN_PLACE) for use in uses):
                picked = [use for use in uses if use.opcode in _PICKING]
                total += sum(array.size for use in picked for array in use.arrays)
            else:
                total += sum(array.size for array in inside.arrays)
        if inside.is_root and inside.opcode in _IN_PLACE:
            place = -1 if inside.opcode == "scatter" else 1
            total += 2 * sum(array.size for array in inner[inside.operands[place]].arrays)
        elif inside.is_root:
            total += sum(array.size for array in instruction.arrays)
    return total


def _of_first(use: Instruction, operand: Instruction, opcodes: set[str]) -> bool:
    return use.opcode in opcodes and use.operands[0] == operand.name


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), near="S(1)" in (layout or ""))
        for dtype, shape, layout in _ARRAY.findall(text)
    )


def _operands(rest: str) -> tuple[str, ...]:
    """Returns the names before the parenthesis that closes the operands."""
    depth = 1
    for end, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return tuple(re.findall(r"%([^\s,()]+)", rest[:end]))
    return ()
