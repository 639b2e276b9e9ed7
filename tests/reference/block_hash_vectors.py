"""Prints the vectors in crates/kv/src/hash.rs.

    pip install cbor2==6.3.0
    python tests/reference/block_hash_vectors.py
"""
import hashlib

import cbor2


def sha256_cbor(value) -> bytes:
    return hashlib.sha256(cbor2.dumps(value, canonical=True)).digest()


root = sha256_cbor("0")
first = sha256_cbor((root, tuple(range(16)), None))
second = sha256_cbor((first, (23, 24, 255, 256, 65535, 65536, 49151, 2**32 - 1), None))
salted = sha256_cbor((root, (1, 2, 3), ("tenant-a",)))
for name, value in dict(root=root, first=first, second=second, salted=salted).items():
    print(name, value.hex())
