"""The module images of a run: the one that firmware boots, one for each update, and more as they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from bus.files import read_file_within
from seamldr.commands import signer_beside
from seamldr.identity import make_identity
from seamldr.image import MAX_FILE, ImageError, ModuleImage, build_v1, build_v2, parse
from seamldr.module_maker import make_module
from seamldr.sigstruct import SigStruct, new_key, signer_hash

BOOT = {"1.5": ((1, 5, 8), (1, 4)), "2.0": ((2, 0, 4), (3, 4))}
"""By series, version and SEAMSVN of the module that the machine starts with."""
MODULE_PAGES = 16
HIGHEST_SVN = 204
IMAGES_TO_UPLOAD = 3
"""Images made at least, as both container versions, where the user may upload some."""


class ModuleFileError(ValueError):
    """A file is no module image; the message says why."""


class Images:
    """Images under `directory`, signed by one new key. Each is one update version above the one before.

    `given` is an image file that all planned updates use instead of new ones. The machine starts with a module of the
    series that its P-SEAMLDR (`loader`) is made for: 2.0 under P20, unless an image of another series is given. Raises
    `ModuleFileError`.
    """

    def __init__(
        self, directory: Path, *, planned: int, profile: Literal["A", "B"], loader: str, fms: int, given: str | None,
        upload: bool,
    ) -> None:  # fmt: skip
        image = None if given is None else read_module(given)[0]
        self._series = "2.0" if loader == "P20" and (image is None or _svn_major(image) > 1) else "1.5"
        self._directory = directory
        self._profile = profile
        self._fms = fms
        self._key = new_key()
        self._made = 0
        directory.mkdir()
        first = self._make(0)
        self.boot = self._keep(first, "boot.bin")
        self.signers: tuple[str, ...] = (signer_hash(SigStruct.decode(first.sigstruct)),)
        if image is not None and given is not None:
            self.planned: tuple[str, ...] = (self._keep(image, "given.bin"),) * planned
            self.signers += _signer_of(given)
            return
        made = [str(self.next()) for _ in range(max(planned, IMAGES_TO_UPLOAD) if upload else planned)]
        self.planned = tuple(made[:planned])
        if upload:
            for path in made:
                old = Path(path).with_suffix(".v1.bin")
                old.write_bytes(build_v1(parse(Path(path).read_bytes())))

    def next(self) -> Path:
        """A new image, one version up."""
        self._made += 1
        return Path(self._keep(self._make(self._made), f"update-{self._made}.bin"))

    def _make(self, number: int) -> ModuleImage:
        (major, minor, update), (svn_major, svn_minor) = BOOT[self._series]
        identity = make_identity(f"{major}.{minor}.{update + number:02}", self._profile)
        svn = (svn_major, min(svn_minor + number, HIGHEST_SVN))
        return make_module(identity, key=self._key, svn=svn, pages=MODULE_PAGES, cpuid_table=(self._fms,))

    def _keep(self, image: ModuleImage, name: str) -> str:
        path = self._directory / name
        path.write_bytes(build_v2(image))
        return str(path)


def _svn_major(image: ModuleImage) -> int:
    return SigStruct.decode(image.sigstruct).svn_major if image.sigstruct else 0


def _signer_of(path: str) -> tuple[str, ...]:
    try:
        return signer_beside(path)
    except OSError as error:
        raise ModuleFileError(f"the signer of module {path} cannot be read: {error.strerror}") from None


def read_module(path: str) -> tuple[ModuleImage, bool]:
    """A module image file of either container version, and whether it has to be reframed for the kernel.

    Raises `ModuleFileError` if it is neither.
    """
    try:
        image = parse(read_file_within(path, MAX_FILE))
    except OSError as error:
        raise ModuleFileError(f"module {path} cannot be read: {error.strerror}") from None
    except ImageError as error:
        raise ModuleFileError(f"module {path} is not a TDX module image: {error}") from None
    return image, image.version == 0x100
