"""SEAM_SIGSTRUCT, the signed manifest of a TDX module: fields, signed message, signer, signature.

Layout: Intel P-SEAMLDR (tdx-loader 1.5.02), seam_sigstruct.h. 2048 bytes, packed, little endian; all page counts but
the image's are counts minus one.
"""

from __future__ import annotations

import functools
import hashlib
import struct

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

SIGSTRUCT_SIZE = 2048
MAX_CPUID_ENTRIES = 255
RSA_EXPONENT = 0x10001
KEY_BYTES = 384
PRODUCTION_SIGNER = (
    "c8572f548869a0beca19376b81c2dffc2a23b5a5f71da0b87579b43f408daa1a33bad9c149eb56c634f883737968a34c"
)
"""SHA-384 of Intel's modulus as stored, little endian."""

_LAYOUT = struct.Struct("<10I 88s 384s I 384s 48s 2B Q I 2B 2H 5H 6s 2H 2B H 2I 24s I 1020s")


class SigStruct(msgspec.Struct, frozen=True):
    """The fields in file order, named as in the document; integers unsigned, `bytes` as stored."""

    header_type: int = 6
    header_length: int = 0xE1
    header_version: int = 0x1_0000
    module_type: int = 0
    module_vendor: int = 0x8086
    date: int = 0x20240725
    size: int = 0x200
    key_size: int = 0x60
    modulus_size: int = 0x60
    exponent_size: int = 1
    reserved0: bytes = bytes(88)
    modulus: bytes = bytes(KEY_BYTES)
    exponent: int = RSA_EXPONENT
    signature: bytes = bytes(KEY_BYTES)
    seamhash: bytes = bytes(48)
    svn_minor: int = 7
    svn_major: int = 1
    attributes: int = 0
    rip_offset: int = 0
    num_stack_pages: int = 1
    num_tls_pages: int = 1
    num_keyhole_pages: int = 0x7F
    num_global_data_pages: int = 0x15
    max_tdmrs: int = 0
    max_rsvd_per_tdmr: int = 0
    pamt_entry_size_4k: int = 0
    pamt_entry_size_2m: int = 0
    pamt_entry_size_1g: int = 0
    reserved1: bytes = bytes(6)
    module_hv: int = 0
    min_update_hv: int = 0
    no_downgrade: int = 0
    reserved2: int = 0
    num_handoff_pages: int = 0x0D
    gdt_idt_offset: int = 0
    fault_wrapper_offset: int = 0
    reserved3: bytes = bytes(24)
    cpuid_table_size: int = 0
    cpuid_table: bytes = bytes(4 * MAX_CPUID_ENTRIES)

    @classmethod
    def decode(cls, data: bytes) -> SigStruct:
        """From the first 2048 bytes of `data`. Raises ValueError if it is shorter; every content decodes."""
        if len(data) < SIGSTRUCT_SIZE:
            raise ValueError(f"SEAM_SIGSTRUCT needs {SIGSTRUCT_SIZE} bytes, not {len(data)}")
        return cls(*_LAYOUT.unpack_from(data))

    def encode(self) -> bytes:
        """The 2048 bytes."""
        return _LAYOUT.pack(*msgspec.structs.astuple(self))

    @property
    def seamsvn(self) -> int:
        """u16, major in the high byte."""
        return self.svn_major << 8 | self.svn_minor

    @property
    def cpuid_entries(self) -> tuple[int, ...]:
        """The CPUID.1.EAX values in use; none if the table claims more than it can hold."""
        if self.cpuid_table_size > MAX_CPUID_ENTRIES:
            return ()
        return struct.unpack_from(f"<{self.cpuid_table_size}I", self.cpuid_table)

    @property
    def debug_signed(self) -> bool:
        """MODULE_TYPE bit 31."""
        return bool(self.module_type >> 31)


def pack_cpuid_table(entries: tuple[int, ...]) -> bytes:
    """CPUID_TABLE as stored, 1020 bytes. Raises ValueError for more than 255 entries."""
    if len(entries) > MAX_CPUID_ENTRIES:
        raise ValueError(f"a CPUID table holds {MAX_CPUID_ENTRIES} entries, not {len(entries)}")
    return struct.pack(f"<{len(entries)}I", *entries).ljust(4 * MAX_CPUID_ENTRIES, b"\0")


def signed_message(encoded: bytes) -> bytes:
    """The 1276 bytes that the signature covers: all but modulus, exponent and signature."""
    return encoded[:128] + encoded[900:SIGSTRUCT_SIZE]


def signer_hash(sigstruct: SigStruct) -> str:
    """SHA-384 of the modulus as stored, in hex: what a loader compares with its built-in signer."""
    return hashlib.sha384(sigstruct.modulus).hexdigest()


@functools.lru_cache(maxsize=16)
def _public_key(modulus: bytes) -> rsa.RSAPublicKey | None:
    try:
        return rsa.RSAPublicNumbers(RSA_EXPONENT, int.from_bytes(modulus, "little")).public_key()
    except ValueError:
        return None


def verify_signature(sigstruct: SigStruct) -> bool:
    """Whether RSASSA-PKCS1-v1_5 with SHA-384 holds over the signed message, under the modulus inside."""
    key = _public_key(sigstruct.modulus)
    if key is None:
        return False
    try:
        key.verify(
            sigstruct.signature[::-1], signed_message(sigstruct.encode()), padding.PKCS1v15(), hashes.SHA384()
        )
    except InvalidSignature:
        return False
    return True


def new_key() -> rsa.RSAPrivateKey:
    """A fresh RSA-3072 signing key."""
    return rsa.generate_private_key(RSA_EXPONENT, 8 * KEY_BYTES)


def load_key(pem: bytes) -> rsa.RSAPrivateKey:
    """An RSA-3072 key with exponent 65537 from unencrypted PEM. Raises ValueError for anything else."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError as error:
        raise ValueError("the key is encrypted") from error
    if not isinstance(key, rsa.RSAPrivateKey) or key.key_size != 8 * KEY_BYTES:
        raise ValueError("a module is signed with an RSA-3072 key")
    if key.public_key().public_numbers().e != RSA_EXPONENT:
        raise ValueError(f"the public exponent must be {RSA_EXPONENT}")
    return key


def sign(sigstruct: SigStruct, key: rsa.RSAPrivateKey) -> SigStruct:
    """The same manifest with `key`'s modulus and signature in it."""
    modulus = key.public_key().public_numbers().n.to_bytes(KEY_BYTES, "little")
    signature = key.sign(signed_message(sigstruct.encode()), padding.PKCS1v15(), hashes.SHA384())
    return msgspec.structs.replace(sigstruct, modulus=modulus, signature=signature[::-1])
