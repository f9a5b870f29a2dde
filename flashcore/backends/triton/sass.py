"""Look for registers that a Hopper kernel writes while an asynchronous product still reads them. For tests and tuning.

An ``HGMMA`` whose first operand lies in registers reads them some time after it was issued, and no scoreboard guards
them: they belong to it until a ``WARPGROUP.DEPBAR`` has waited for its group. A kernel that writes one of them before
that is right or wrong by timing. See docs/log/0009.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", re.MULTILINE)
_UNCONDITIONAL_EXIT = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+EXIT", re.MULTILINE)
_CONDITIONAL = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+@", re.MULTILINE)
_READS_REGISTERS = re.compile(r"HGMMA\S* R\d+, R(\d+)")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
_BRANCH = re.compile(r"BRA\S* .*?(0x[0-9a-f]+)")
_DESTINATION = re.compile(r"(\S+) (?:U?P\w+, )*R(\d+)\b")
_WIDTH = re.compile(r"\.(64|128)\b|\.WIDE")


def disassemble(cubin: bytes) -> str:
    """SASS, by the tool that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def overwritten_operands(sass: str) -> list[str]:
    """A line for each instruction that writes what a product in flight reads; none if the kernel is right.

    Follows every path from each product to the wait that covers it, over back edges too.
    """
    code = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(sass)]
    exits = {int(address, 16) for address in _UNCONDITIONAL_EXIT.findall(sass)}
    conditional = {int(address, 16) for address in _CONDITIONAL.findall(sass)}
    index = {address: i for i, (address, _) in enumerate(code)}
    follows = [_successors(i, code, index, exits, conditional) for i in range(len(code))]
    found = {}
    for i, (address, product) in enumerate(code):
        operand = _READS_REGISTERS.match(product)
        if operand is None:
            continue
        read = set(range(int(operand[1]), int(operand[1]) + 4))
        # Where the product is still in flight: (instruction, its group is complete, groups issued after it).
        todo = [(j, "gsb0" in product, 0) for j in follows[i]]
        seen = set(todo)
        while todo:
            j, complete, later = todo.pop()
            text = code[j][1]
            wait = _WAIT.match(text)
            if wait and complete and later >= int(wait[1], 16):
                continue
            if j != i and read & _written(text):
                found[j, i] = f"{code[j][0]:x}: {text} | in flight: {address:x}: {product}"
            if text.startswith("HGMMA") and "gsb0" in text:
                complete, later = True, later + complete
            new = {(k, complete, min(later, 8)) for k in follows[j]} - seen
            seen |= new
            todo += new
    return [found[key] for key in sorted(found)]


def _successors(i: int, code: list, index: dict, exits: set, conditional: set) -> list[int]:
    address, text = code[i]
    branch = _BRANCH.match(text)
    targets = [index[int(branch[1], 16)]] if branch else []
    if address not in exits and (not branch or address in conditional) and i + 1 < len(code):
        targets.append(i + 1)
    return targets


def _written(text: str) -> set[int]:
    """The registers that an instruction writes."""
    destination = _DESTINATION.match(text)
    if destination is None or "SETP" in text or text.startswith(("VOTE", "PLOP3", "BAR", "R2")):
        return set()
    operation, first = destination[1], int(destination[2])
    if operation.startswith("HGMMA"):
        count = int(operation.split("x")[1]) // 2
    elif operation.startswith("LDSM"):
        count = int(operation[-1])
    elif operation.startswith("CS2R"):
        count = 1 if operation.endswith(".32") else 2
    else:
        width = _WIDTH.search(operation)
        count = 1 if width is None else 4 if width[1] == "128" else 2
    return set(range(first, first + count))
