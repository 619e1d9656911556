"""Files that would run code, or take all memory or time, are refused before they do."""

from __future__ import annotations

import builtins
import codecs
import io
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from jpc_files import FIXTURES, hmm_nodes, oracle_nodes, random_hmm, write

from codd_hf.conversion import convert_jpc
from codd_hf.conversion.pickles import read_array, unpickle

DAMAGED = r"cannot be converted: damaged \("
MEMORY = 100 << 20
"""No refusal may take more bytes than this and twice the file's."""


def refused(path: Path, match: str) -> None:
    """The file is refused for this reason, in bounded memory."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match) as caught:
            convert_jpc(path)
        assert tracemalloc.get_traced_memory()[1] < MEMORY + 2 * path.stat().st_size
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1500


class Call:
    """Pickled, it is a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def calls(marker: Path) -> dict[str, tuple[object, str]]:
    """Pickles that leave the marker behind when they are run, and what they ask for."""
    name, inert = str(marker), "no array"
    return {
        "posix": (Call(os.mkdir, name), "posix.mkdir"),
        "eval": (Call(eval, f"__import__('os').mkdir({name!r})"), "eval"),
        "getattr": (Call(getattr, Call(__import__, "os"), "mkdir"), "getattr|__import__"),
        "loads": (Call(pickle.loads, pickle.dumps(Call(os.mkdir, name))), "pickle.loads"),
        "codecs": (Call(codecs.lookup, "latin1"), "_codecs.lookup"),
        "encode": (Call(codecs.encode, "ab", "rot13"), "_codecs.encode"),
        "bytearray": (Call(bytearray, 1 << 40), "bytearray"),
        "numpy.ones": (Call(np.ones, (1 << 40,)), "numpy.*ones"),
        "numpy.memmap": (Call(np.memmap, name, "u1", "w+", 0, 8), "memmap"),
        "ndarray": (Call(np.ndarray, (1 << 40,)), inert),
        "dtype": (Call(np.dtype, "O"), inert),
        "objects": (np.array([Call(os.mkdir, name)]), "posix.mkdir"),
        "fields": (np.zeros(2, dtype=[("a", "f4")]), "elements"),
        "text": (np.zeros(2, dtype="U4"), "elements"),
        "set": ({1, 2}, "EMPTY_SET|builtins.set|__builtin__.set"),
        "type": (Call(builtins.type, "X", (), {}), "type"),
    }


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("kind", calls(Path("marker")))
def test_a_call_is_refused_and_not_made(kind, protocol, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "circuit.jpc"
    hostile, reason = calls(marker)[kind]
    nodes = hmm_nodes(*random_hmm())
    nodes[2]["params"] = hostile
    refused(write(path, nodes, protocol), reason)
    nodes = hmm_nodes(*random_hmm())
    nodes[1]["dist"] = pickle.dumps(hostile, protocol)
    refused(write(path, nodes), f"{reason}|node 1 has a distribution that is none over tokens")
    refused(write(path, hostile, protocol), f"{reason}|{DAMAGED}")
    assert not marker.exists()


def test_the_calls_are_real(tmp_path):
    for kind in ("posix", "eval", "loads", "objects"):
        marker = tmp_path / kind
        pickle.loads(pickle.dumps(calls(marker)[kind][0]))
        assert marker.is_dir()


CAT = b"\x8c'pyjuice.nodes.distributions.categorical\x8c\x0bCategorical\x93"
ARRAY = b"\x8c\x16numpy._core.multiarray\x8c\x0c_reconstruct\x93\x8c\x05numpy\x8c\x07ndarray\x93"
ARRAY += b"K\x00\x85C\x01b\x87R"
F4 = b"\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02f4\x89\x88\x87R"
PLAIN = b"(K\x03\x8c\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
CUT = f"exhausted|remain|{DAMAGED}"


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def array(shape: bytes, data: bytes = b"\x89C\x04abcd", dtype: bytes = F4 + PLAIN) -> bytes:
    """The state of an array; `shape` pushes a tuple."""
    return b"(K\x01" + shape + dtype + data + b"tb"


BY_HAND = {
    "an empty file": (b"", CUT),
    "no pickle": (b"PK\x03\x04 a zip archive", "no newline found"),
    "two values": (b"\x80\x04]].", DAMAGED),
    "no value": (b"\x80\x04.", DAMAGED),
    "an open mark": (b"\x80\x04(].", DAMAGED),
    "instance": (b"\x80\x04(cos\nsystem\no.", "no circuit needs the opcode GLOBAL"),
    "persistent id": (b"\x80\x04Pmarker\n.", "no circuit needs the opcode PERSID"),
    "unknown opcode": (b"\x80\x04\xff.", "unknown"),
    "empty stack": (b"\x80\x04\x93.", DAMAGED),
    "no mark": (b"\x80\x04]e.", DAMAGED),
    "append to a dictionary": (b"\x80\x04}Na.", DAMAGED),
    "a key that is no text": (b"\x80\x04}K\x01Ns.", DAMAGED),
    "half an item": (b"\x80\x04}(\x8c\x01au.", DAMAGED),
    "a value never kept": (b"\x80\x04h\x05.", DAMAGED),
    "a name that is a number": (b"\x80\x04K\x01K\x01\x93.", DAMAGED),
    "a name that is no UTF-8": (b"\x80\x04\x8c\x01\xff.", "utf-8"),
    "bytes beyond the end": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", CUT),
    "text beyond the end": (b"\x80\x04X\xff\0\0\0.", CUT),
    "a class rewritten": (b"\x80\x04" + CAT + b"}b.", DAMAGED),
    "a far place to keep a value": (b"\x80\x04Nr\xff\xff\xff\xff.", "no circuit needs the opcode"),
    "a call of a value": (b"\x80\x04N)R.", DAMAGED),
}
ARRAYS = {
    "a billion numbers": array(number(10**9) + b"\x85"),
    "a huge shape": array(3 * number(1 << 62) + b"\x87"),
    "no order of elements": array(b"K\x01\x85", dtype=F4),
    "objects": array(b"K\x01\x85", b"\x89]", F4.replace(b"f4", b"O8") + PLAIN),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_what_no_circuit_needs_is_refused(kind, tmp_path):
    raw, reason = BY_HAND[kind]
    path = tmp_path / "circuit.jpc"
    path.write_bytes(raw)
    refused(path, reason)


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_that_is_none_of_numbers_in_the_file_is_refused(kind):
    raw = b"\x80\x04" + ARRAY + ARRAYS[kind] + b"."
    with pytest.raises(ValueError, match=r"array|elements|shape|bytes|dimension"):
        read_array(unpickle(io.BytesIO(raw)), "<f4")


def bombs() -> dict[str, tuple[bytes, str]]:
    """Small files that would become large or slow."""
    laughs = b"\x80\x04]\x94(" + b"".join(b"](" + b"h%c" % i * 9 + b"e\x94" for i in range(99))
    laughs += b"e."
    return {
        "a billion laughs": (laughs, DAMAGED),
        "a list in itself": (b"\x80\x04]\x94h\x00a.", DAMAGED),
        "many names": (b"\x80\x04(" + b"\x8c\x01a" * (1 << 14) + b"t.", "more than 10,000 steps"),
        "many marks": (b"\x80\x04" + b"(" * (1 << 20) + b".", "more than 10,000 steps"),
        "deep lists": (b"\x80\x04" + b"]" * 4000 + b"a" * 3999 + b".", DAMAGED),
        "deep tuples as a key": (b"\x80\x04})" + b"\x85" * 9000 + b"Ns.", DAMAGED),
        "deep arguments": (b"\x80\x04" + CAT + b")" + b"\x85" * 9000 + b"R.", DAMAGED),
    }


@pytest.mark.parametrize("kind", bombs())
def test_small_files_do_not_become_large_or_slow(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("codd_hf.conversion.pickles.MAX_STEPS", 10_000)
    raw, reason = bombs()[kind]
    path = tmp_path / "circuit.jpc"
    path.write_bytes(raw)
    refused(path, reason)


def test_many_nodes_that_name_the_same_arrays_are_checked_once(tmp_path):
    """Half a million places of tiles that a thousand nodes share: minutes if each were checked."""
    blocks = 700
    law = np.full((blocks, blocks), 1 / blocks, np.float32)
    nodes = hmm_nodes(law[0], [law], [law[:, :1]], 1000, num_blocks=blocks)
    shared = {}
    for node in nodes:
        if "edge_ids" in node:
            node["edge_ids"] = shared.setdefault(node["edge_ids"].shape, node["edge_ids"])
    path = write(tmp_path / "circuit.jpc", nodes)
    assert convert_jpc(path).config.window_length == 1000


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_truncated_file_is_refused_wherever_it_ends(protocol, tmp_path):
    raw = pickle.dumps(oracle_nodes("cat_hmm"), protocol)
    path = tmp_path / "circuit.jpc"
    for end in (*range(0, len(raw), 64), len(raw) - 1):
        path.write_bytes(raw[:end])
        with pytest.raises(ValueError, match=r"circuit.jpc` cannot be converted"):
            convert_jpc(path)


def test_a_damaged_file_is_refused_or_is_a_circuit(tmp_path):
    """Any byte may change: what comes back is a circuit, or the one kind of error."""
    raw = (FIXTURES / "cat_hmm.jpc").read_bytes()
    draw = np.random.default_rng(0)
    path = tmp_path / "circuit.jpc"
    refusals = 0
    for _ in range(200):
        damaged = bytearray(raw)
        for place in draw.integers(len(raw), size=3):
            damaged[place] = draw.integers(256)
        path.write_bytes(damaged)
        try:
            convert_jpc(path)
        except ValueError:
            refusals += 1
    assert refusals > 50


def test_the_machine_reads_what_pythons_own_reads():
    """The same values, where both can read them."""
    value = [{"a": (1, -1, 300, 70000, -(1 << 62)), "b": [True, False, None, ()]}, ["x", {}, []]]
    value.append(value[0])
    for protocol in (4, 5):
        raw = pickle.dumps(value, protocol)
        assert unpickle(io.BytesIO(raw)) == pickle.loads(raw)
