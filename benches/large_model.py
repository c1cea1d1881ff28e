#!/usr/bin/env python3
"""Writes a synthetic float model of any size: a chain of MatMuls with the shapes of a language model's layers.

    python benches/large_model.py big.onnx --gigabytes 3
    python benches/large_model.py big.onnx --gigabytes 3 --single

The weights are in `big.onnx.data` beside the model. With --single they are in the model file itself, also above the 2 GB
that protobuf's own libraries write: the wire format is written here. Memory holds one tensor at a time. The same
arguments give the same bytes. Whoever makes such files deletes them.
"""

import argparse
import os

import numpy

# Input and output width of one block of layers: attention at 2048, then the two halves of its feed-forward network.
BLOCK = [(2048, 2048), (2048, 2048), (2048, 4096), (4096, 4096), (4096, 2048)]
FLOAT = 1


def varint(number):
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def number(field, value):
    return varint(field << 3) + varint(value)


def header(field, length):
    return varint(field << 3 | 2) + varint(length)


def data(field, value):
    value = value.encode() if isinstance(value, str) else value
    return header(field, len(value)) + value


def shapes(size):
    """Layers of `size` bytes in all, to the nearest one above."""
    found, total = [], 0
    while total < size:
        shape = BLOCK[len(found) % len(BLOCK)]
        found.append(shape)
        total += 4 * shape[0] * shape[1]
    return found


def weights(shape, seed):
    """Columns of different spread, as trained layers have them."""
    random = numpy.random.default_rng(seed)
    values = random.standard_normal(shape, dtype=numpy.float32)
    values *= random.uniform(0.5, 1.5, shape[1]).astype(numpy.float32) / numpy.float32(shape[0] ** 0.5)
    return values


def value_info(name, width):
    dims = data(1, data(2, "rows")) + data(1, number(1, width))
    return data(1, name) + data(2, data(1, number(1, FLOAT) + data(2, dims)))


def write(path, size, single):
    layers = shapes(size)
    nodes, tensors = [], []
    offset = 0
    location = os.path.basename(path) + ".data"
    for index, (rows, columns) in enumerate(layers):
        weight = f"layers.{index}.weight"
        node = data(1, f"h{index}") + data(1, weight) + data(2, f"h{index + 1}")
        nodes.append(data(1, node + data(3, f"layers.{index}") + data(4, "MatMul")))
        head = number(1, rows) + number(1, columns) + number(2, FLOAT) + data(8, weight)
        length = 4 * rows * columns
        if single:
            tensors.append((head + header(9, length), length))
            continue
        entries = {"location": location, "offset": str(offset), "length": str(length)}
        head += b"".join(data(13, data(1, key) + data(2, value)) for key, value in entries.items())
        tensors.append((head + number(14, 1), 0))
        offset += -(-length // 4096) * 4096
    ends = data(11, value_info("h0", layers[0][0])) + data(12, value_info(f"h{len(layers)}", layers[-1][1]))
    before = b"".join(nodes) + data(2, "chain")
    length = len(before) + len(ends)
    length += sum(len(header(5, len(head) + body)) + len(head) + body for head, body in tensors)
    with open(path, "wb") as model:
        model.write(number(1, 10) + data(2, "large_model") + header(7, length) + before)
        for index, (head, body) in enumerate(tensors):
            model.write(header(5, len(head) + body) + head)
            if single:
                weights(layers[index], index).tofile(model)
        model.write(ends + data(8, number(2, 21)))
    if single:
        return
    with open(path + ".data", "wb") as file:
        for index, shape in enumerate(layers):
            file.write(b"\0" * (-file.tell() % 4096))
            weights(shape, index).tofile(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of 2^30 bytes")
    parser.add_argument("--single", action="store_true", help="one file, however large")
    args = parser.parse_args()
    write(args.path, int(args.gigabytes * 2**30), args.single)


if __name__ == "__main__":
    main()
