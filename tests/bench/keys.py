"""The synthetic bucket of the bench: any number of keys that nobody has to keep, as Python, as XML and as SQL.

A key has 40 bytes, the last 12 of them `00000000.png`; or it is `d0007/00000123.png`, where there are folders. Other
`names` are those of hashes (32 random hex digits) and long ones, of which all but the end is the same. The entries of a
listing differ in four places only, in two of them by thousands, so that a page is put together by one `join`. `Keys`
and `SQL_OBJECTS` give the same objects the same keys and ETags, where names are plain: a checkpoint can be made that
knows all.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from functools import lru_cache
from random import Random

BLOCK = 1000  # entries that share all but the last three digits of their number
ONE_FOLDER = "photos-from-the-mobile-apps/"
PLAIN, HASHES, LONG = NAMES = ("plain", "hashes", "long")
HASH_FOLDERS = 16**3  # keys that begin with the same three digits are a folder without a slash
LONG_BEGINNING = f"archive-of-the-mobile-apps/{'exports-of-the-warehouse/' * 6}"
MOST_IN_A_FOLDER = 10**8
MOST_FOLDERS = 10**4
LAST_CHARACTER = "\U0010ffff"
MODIFIED = "2026-01-02T03:04:05.000Z"
# Multipliers of Knuth and of xxHash: they spread small numbers over 32 bits, and fit into SQLite's 64.
SPREAD = (2654435761, 2246822519, 3266489917, 668265263)

SQL_OBJECTS = """
    WITH RECURSIVE numbers(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM numbers WHERE i + 1 < :count),
    places(i, folder, n) AS (SELECT i, i / :per_folder, i % :per_folder FROM numbers),
    stamps(i, folder, n, stamp, low) AS (SELECT i, folder, n, folder * 100000 + n / 1000, n % 1000 FROM places)
    SELECT i AS number,
        CASE WHEN :folders THEN printf('d%04d/%08d', folder, n) ELSE printf(:one_folder || '%08d', n) END AS stem,
        printf('%08x%08x%08x%08x', stamp * 2654435761 % 4294967296, stamp * 2246822519 % 4294967296,
               low * 3266489917 % 4294967296, low * 668265263 % 4294967296) AS etag
    FROM stamps
"""


def spread(number: int, *multipliers: int) -> str:
    """Eight hex digits for each multiplier."""
    return "".join(f"{number * multiplier % 2**32:08x}" for multiplier in multipliers)


class Keys:
    """All keys of the bucket in the order of a listing; none of them is kept."""

    def __init__(self, count: int, folders: int = 0, size: int = 20_000, names: str = PLAIN) -> None:
        self.count, self.folders, self.size, self._names = count, folders, size, names
        self.per_folder = max(1, -(-count // folders)) if folders else max(1, count)
        most = BLOCK if names == HASHES else MOST_IN_A_FOLDER
        if folders > MOST_FOLDERS or self.per_folder > most:
            raise ValueError(f"at most {MOST_FOLDERS} folders of {most} keys")
        # What keys end with, by the last three digits of their place in the folder.
        self._ends = [f"{low:03d}" for low in range(BLOCK)]
        if names == HASHES:
            random = Random(count)
            self._ends[: self.per_folder] = sorted(f"{random.getrandbits(116):029x}" for _ in range(self.per_folder))
        self._numbers = range(count)
        # The numbers of the first key that begins with a prefix, and of the first one after them.
        self.range_of = lru_cache(4096)(self._range_of)
        # Five pieces an entry; the second and the fourth are the block's and are filled in for each page.
        rest = (
            f"&quot;</ETag><ChecksumAlgorithm>CRC64NVME</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType>"
            f"<Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        )
        pieces: list[bytes] = []
        for low in range(BLOCK):
            middle = f"{self._ends[low]}.png</Key><LastModified>{MODIFIED}</LastModified><ETag>&quot;"
            end = f"{spread(low, *SPREAD[2:])}{rest}"
            pieces += [b"<Contents><Key>", b"", middle.encode(), b"", end.encode()]
        self._pieces = pieces

    def key(self, number: int) -> str:
        """The key of an object."""
        folder, place = divmod(number, self.per_folder)
        high, low = divmod(place, BLOCK)
        return f"{self._beginning(folder, high)}{self._ends[low]}.png"

    def _beginning(self, folder: int, high: int) -> str:
        """What all keys of a block begin with."""
        if self._names == HASHES:
            return f"{folder:03x}"
        if self._names == LONG:
            years, days = divmod(folder, 12 * 28)
            return f"{LONG_BEGINNING}year-{2020 + years}/month-{days // 28 + 1:02d}/day-{days % 28 + 1:02d}/{high:05d}"
        return f"d{folder:04d}/{high:05d}" if self.folders else f"{ONE_FOLDER}{high:05d}"

    def etag(self, number: int) -> str:
        """The ETag of an object, without quotes."""
        folder, place = divmod(number, self.per_folder)
        high, low = divmod(place, BLOCK)
        return spread(folder * 100_000 + high, *SPREAD[:2]) + spread(low, *SPREAD[2:])

    def number_of(self, key: str) -> int | None:
        """The number of a key, None if there is no such object."""
        number = bisect_left(self._numbers, key, key=self.key)
        return number if number < self.count and self.key(number) == key else None

    def after(self, key: str) -> int:
        """The number of the first key behind this one, which need not exist."""
        return bisect_right(self._numbers, key, key=self.key)

    def _range_of(self, prefix: str) -> tuple[int, int]:
        return bisect_left(self._numbers, prefix, key=self.key), self.after(prefix + LAST_CHARACTER)

    def xml(self, first: int, end: int) -> list[bytes]:
        """The entries of a listing, from one number up to another."""
        found = []
        while first < end:
            folder, place = divmod(first, self.per_folder)
            high, low = divmod(place, BLOCK)
            many = min(end - first, BLOCK - low, self.per_folder - place)
            pieces = self._pieces[5 * low : 5 * (low + many)]
            pieces[1::5] = [self._beginning(folder, high).encode()] * many
            pieces[3::5] = [spread(folder * 100_000 + high, *SPREAD[:2]).encode()] * many
            found.append(b"".join(pieces))
            first += many
        return found
