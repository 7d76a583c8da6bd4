"""What would become of a module image: every rule of the kernel and of P-SEAMLDR, and a table of what is in it.

For a person at a command line. The rules are those that the loader itself runs; here also those behind the first that
fails are shown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import msgspec

from seamldr import elf
from seamldr.identity import UNKNOWN_VERSION, identity_of
from seamldr.image import FRAMING_RULES, PAGE, VERSION_1, Framing, ImageError, ModuleImage, checksum, parse
from seamldr.manifest import ManifestContext, verdicts
from seamldr.platform import LoaderProfile, Platform
from seamldr.range_layout import plan_range
from seamldr.sigstruct import PRODUCTION_SIGNER, SIGSTRUCT_SIZE, SigStruct, signer_hash, verify_signature
from seamldr.status import Scenario, SeamldrStatus

OK = "ok"
EINVAL = "-EINVAL"
UD2 = "UD2"


class Finding(msgspec.Struct, frozen=True):
    """One rule: who applies it, what it demands, and "ok" or the code that a breach gives."""

    rule: str
    title: str
    outcome: str

    @property
    def ok(self) -> bool:
        """Whether the image obeys."""
        return self.outcome == OK

    @property
    def by_kernel(self) -> bool:
        """Whether the kernel applies this rule, to the container; else P-SEAMLDR does."""
        return self.rule.startswith("kernel")


class ImageReport(msgspec.Struct, frozen=True):
    """The findings in the order in which the machine would come to them, and what they take for granted."""

    findings: tuple[Finding, ...]
    assumed: str

    @property
    def first_failure(self) -> Finding | None:
        """What the machine would stop at."""
        return next((finding for finding in self.findings if not finding.ok), None)

    @property
    def first_loader_failure(self) -> Finding | None:
        """What P-SEAMLDR would stop at, whatever the kernel thinks of the container."""
        return next((finding for finding in self.findings if not (finding.ok or finding.by_kernel)), None)

    @property
    def reframable(self) -> bool:
        """Whether only the container is wrong: a version 1 file, whose pages P-SEAMLDR could be given all the same."""
        stop = self.first_failure
        return stop is not None and stop.by_kernel and not all(finding.by_kernel for finding in self.findings)

    @property
    def accepted(self) -> bool:
        """Whether the kernel and P-SEAMLDR would take the image."""
        return self.first_failure is None


def verify_image(
    blob: bytes,
    platform: Platform,
    scenario: Scenario = Scenario.LOAD,
    running: ModuleImage | None = None,
) -> ImageReport:
    """Judge a file for a platform. `running` is the module that an UPDATE replaces, after a good TDH.SYS.SHUTDOWN.

    Raises nothing: a file that is no image at all has one failed finding.
    """
    findings = list(_framing(blob))
    image = _sections(blob)
    if image is not None:
        findings += _params(image, scenario, running)
        findings += _loader(image, platform, scenario, running)
    return ImageReport(tuple(findings), _assumptions(platform, scenario, running))


def _assumptions(platform: Platform, scenario: Scenario, running: ModuleImage | None) -> str:
    """What platform and module the findings are about, as a sentence."""
    where = f"P-SEAMLDR {platform.profile} on CPU {' and '.join(f'{fms:X}H' for fms in platform.fms)}"
    if scenario is Scenario.LOAD:
        return f"{where}, a LOAD with no module before it"
    if running is None:
        return f"{where}, an UPDATE with no module to replace"
    old = SigStruct.decode(running.sigstruct)
    version = identity_of(old, running.module).version
    name = "an unknown module" if version == UNKNOWN_VERSION else f"module {version}"
    svn = f"SVN {old.svn_major}.{old.svn_minor}"
    return f"{where}, an UPDATE of {name} with {svn}, shut down with handoff version {old.module_hv}"


def _finding(rule: str, title: str, holds: bool, code: str | SeamldrStatus) -> Finding:
    name = code.name if isinstance(code, SeamldrStatus) else code
    return Finding(rule, title, OK if holds else name)


def _framing(blob: bytes) -> Iterator[Finding]:
    complete = len(blob) >= PAGE
    yield _finding("kernel 1", "the file holds at least a header page", complete, EINVAL)
    if complete:
        framing = Framing.decode(blob)
        # The kernel's second rule is that memory for SEAMLDR_PARAMS can be had.
        for number, (title, holds) in enumerate(FRAMING_RULES, start=3):
            yield _finding(f"kernel {number}", title, holds(framing), EINVAL)


def _sections(blob: bytes) -> ModuleImage | None:
    try:
        return parse(blob, with_checksum=False)
    except ImageError:
        return None


def _params(image: ModuleImage, scenario: Scenario, running: ModuleImage | None) -> Iterator[Finding]:
    yield _finding("params", "NUM_MODULE_PAGES is not 0", bool(image.module), SeamldrStatus.EBADPARAM)
    callable_ = scenario is Scenario.LOAD or running is not None
    yield _finding("params", "an UPDATE replaces a module that is ready", callable_, SeamldrStatus.EBADPARAM)
    yield _finding("params", "there is a sigstruct page", bool(image.sigstruct), SeamldrStatus.EBADSIG)


def _loader(
    image: ModuleImage, platform: Platform, scenario: Scenario, running: ModuleImage | None
) -> Iterator[Finding]:
    if not image.sigstruct or not image.module:
        return
    sigstruct = SigStruct.decode(image.sigstruct)
    old = SigStruct.decode(running.sigstruct) if running else None
    context = ManifestContext(platform, scenario, len(image.module), old.seamsvn if old else 0)
    for rule, status in verdicts(sigstruct, context):
        yield Finding(f"manifest {rule.number}", rule.title, status.name if status else OK)
    layout = plan_range(platform, sigstruct, image.module_pages)
    yield _finding("size", "the module range is large enough", layout.available >= layout.minimum, SeamldrStatus.ENOMEM)
    if old and scenario is Scenario.UPDATE and platform.profile is not LoaderProfile.P10:
        fits = sigstruct.min_update_hv <= old.module_hv <= sigstruct.module_hv
        yield _finding("handoff", "the new module takes the old one's handoff data", fits, SeamldrStatus.EBADHANDOFF)
    spare = layout.spare_table_pages
    room = spare >= layout.tables_before_keyhole
    yield _finding("mapping", "page tables of code, data and stacks fit", room, SeamldrStatus.ENOMEM)
    yield _finding("mapping", "page tables of the keyhole ranges fit", spare >= layout.tables, UD2)
    same = hashlib.sha384(image.module).digest() == sigstruct.seamhash
    yield _finding("hash", "SHA-384 of the module is SEAMHASH", same, SeamldrStatus.EBADHASH)
    if platform.profile is not LoaderProfile.P10:
        yield _elf(image.module)


def _elf(module: bytes) -> Finding:
    try:
        elf.relocate(bytearray(module), 0)
    except elf.ElfError as error:
        return Finding("elf", str(error), SeamldrStatus.EBADPARAM.name)
    return Finding("elf", "ELF64 with RELATIVE relocations only", OK)


Row = tuple[str, str, str]


def describe_image(blob: bytes) -> tuple[Row, ...]:
    """(field, value, meaning) rows of a file of either version. Raises ImageError if it cannot be taken apart."""
    image = parse(blob, with_checksum=False)
    return (*_container_rows(blob, image), *_manifest_rows(image), *_identity_rows(image))


def _container_rows(blob: bytes, image: ModuleImage) -> Iterator[Row]:
    first = image.version == VERSION_1
    yield "container", f"{image.version:#06x}", "the shipped form, not read by Linux" if first else "read by Linux"
    total = checksum(blob)
    yield "checksum", blob[2:4][::-1].hex(), "16-bit words add up to 0" if total == 0 else f"words add up to {total:#x}"
    yield "sigstruct pages", str(len(image.sigstruct) // PAGE), ""
    yield "module pages", str(image.module_pages), f"{len(image.module)} bytes"


def _manifest_rows(image: ModuleImage) -> Iterator[Row]:
    if not image.sigstruct:
        return
    s = SigStruct.decode(image.sigstruct)
    for field, value in zip(s.__struct_fields__, msgspec.structs.astuple(s), strict=True):
        yield field.upper(), _show(value), _meaning(field, s, image)
    rest = any(image.sigstruct[SIGSTRUCT_SIZE:])
    yield "rest of the page", "not zero" if rest else "zero", "never read"


def _show(value: int | bytes) -> str:
    if isinstance(value, int):
        return f"{value:#x}"
    if not any(value):
        return f"{len(value)} zero bytes"
    return value.rstrip(b"\0").hex() if len(value) <= 48 else f"{value[:16].hex()}... ({len(value)} bytes)"


def _meaning(field: str, s: SigStruct, image: ModuleImage) -> str:
    match field:
        case "module_type":
            return "debug-signed" if s.debug_signed else "production-signed"
        case "date":
            return f"{s.date >> 16:04x}-{s.date >> 8 & 0xFF:02x}-{s.date & 0xFF:02x}"
        case "modulus":
            signer = signer_hash(s)
            return f"signer {signer}, " + ("Intel's" if signer == PRODUCTION_SIGNER else "not Intel's")
        case "signature":
            return "holds" if verify_signature(s) else "does not hold"
        case "seamhash":
            same = hashlib.sha384(image.module).digest() == s.seamhash
            return "SHA-384 of the module" if same else "not the SHA-384 of the module"
        case "svn_major" | "svn_minor":
            return f"SEAMSVN {s.svn_major}.{s.svn_minor}"
        case "cpuid_table":
            return " ".join(f"{entry:X}" for entry in s.cpuid_entries)
    if field.startswith("num_") and field.endswith("_pages"):
        return f"{getattr(s, field) + 1} pages"
    return ""


def _identity_rows(image: ModuleImage) -> Iterator[Row]:
    if not image.sigstruct:
        return
    identity = identity_of(SigStruct.decode(image.sigstruct), image.module)
    yield "module version", identity.version, "unknown to this program" if identity.version == UNKNOWN_VERSION else ""
    yield "module profile", identity.profile, f"handoff version {identity.module_hv}"
    yield "TDX_FEATURES0", f"{identity.tdx_features0:#x}", "runtime update" if identity.tdx_features0 & 2 else ""
