"""Weight formats as numbers: w = (sum over planes and digits) - offset, packed into 32-bit words.

A row of K integer weights becomes planes * ceil(K / digits) int32 words; word index = chunk * planes + plane.
Digit j of a word of radix r is worth r**j within its byte: `digits_a_byte` digits lie in each byte, so that one byte
is one index into a table (ternary: 5 trits, 3**5 = 243; see shared notes on decoding without 64-bit arithmetic).
With several planes, plane p holds bit p of the code.
"""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Format:
    """One weight format; `low` and `high` are the codes that quantizers emit (kernels take the whole range)."""

    name: str
    radix: int
    digits_a_byte: int
    planes: int
    offset: int
    high: int

    @property
    def low(self) -> int:
        return -self.high

    @property
    def digits(self) -> int:
        """Digits in a 32-bit word."""
        return 4 * self.digits_a_byte

    @property
    def levels(self) -> int:
        """Number of codes a weight can hold."""
        return self.radix**self.planes

    @property
    def bits(self) -> float:
        """Stored bits a weight, padding aside."""
        return 32 * self.planes / self.digits

    @property
    def title(self) -> str:
        return self.name.capitalize()

    def limited(self, bits: int | None) -> "Format":
        """The same words with codes of `bits` bits at most; None: all that quantizers emit."""
        return self if bits is None else replace(self, high=min(self.high, 2 ** (bits - 1) - 1))

    def words(self, k: int) -> int:
        """Words of a row of `k` weights."""
        return self.planes * -(-k // self.digits)


TERNARY = Format("ternary", radix=3, digits_a_byte=5, planes=1, offset=1, high=1)
INT3 = Format("int3", radix=2, digits_a_byte=8, planes=3, offset=4, high=3)
INT4 = Format("int4", radix=16, digits_a_byte=2, planes=1, offset=8, high=7)
INT8 = Format("int8", radix=256, digits_a_byte=1, planes=1, offset=128, high=127)
FORMATS = (TERNARY, INT3, INT4, INT8)


def by_name(name: str) -> Format:
    """The format of that name; KeyError names the known ones."""
    for fmt in FORMATS:
        if fmt.name == name:
            return fmt
    raise KeyError(f"unknown weight format {name!r}; known: {', '.join(fmt.name for fmt in FORMATS)}")


def pack(codes: np.ndarray, fmt: Format) -> np.ndarray:
    """Packs integer weights [N, K] into int32 words [N, fmt.words(K)].

    Raises ValueError for a weight outside of the format's range.
    """
    n, k = codes.shape
    digits = codes.astype(np.int32) + fmt.offset
    if digits.size and (digits.min() < 0 or digits.max() >= fmt.levels):
        raise ValueError(f"{fmt.name} holds {-fmt.offset}..{fmt.levels - 1 - fmt.offset}")
    chunks = -(-k // fmt.digits)
    digits = np.pad(digits, ((0, 0), (0, chunks * fmt.digits - k)))
    digits = digits.reshape(n, chunks, 1, 4, fmt.digits_a_byte)
    planes = np.arange(fmt.planes, dtype=np.int32).reshape(1, 1, -1, 1, 1)
    if fmt.planes > 1:
        digits = (digits >> planes) & 1
    weights = fmt.radix ** np.arange(fmt.digits_a_byte, dtype=np.int32)
    octets = (digits * weights).sum(-1).astype(np.uint8)  # [N, chunks, planes, 4]
    return np.ascontiguousarray(octets).reshape(n, -1).view("<i4").astype(np.int32, copy=False)


def unpack(words: np.ndarray, fmt: Format, k: int) -> np.ndarray:
    """The integer weights [N, k] as int16 (int8 would not hold 255 - offset on the way)."""
    n = words.shape[0]
    octets = np.ascontiguousarray(words, dtype="<i4").view(np.uint8).reshape(n, -1, fmt.planes, 4)
    digits = digit_table(fmt)[octets].astype(np.int16)  # [N, chunks, planes, 4, digits a byte]
    places = (1 << np.arange(fmt.planes, dtype=np.int16)).reshape(1, 1, -1, 1, 1)
    codes = (digits * places).sum(2, dtype=np.int16) if fmt.planes > 1 else digits[:, :, 0]
    return codes.reshape(n, -1)[:, :k] - np.int16(fmt.offset)


def digit_table(fmt: Format) -> np.ndarray:
    """uint8 [256, digits a byte]: the digits of every byte (bytes that no packing emits included)."""
    octets = np.arange(256).reshape(-1, 1)
    return (octets // fmt.radix ** np.arange(fmt.digits_a_byte) % fmt.radix).astype(np.uint8)
