"""SEAMLDR.INSTALL: a session over all LPs, of which the last does the work.

Source: Intel P-SEAMLDR (tdx-loader 1.5.02), seamldr_install.c. Only the last LP's RCX is looked at. Up to the wipe
of the module range an error is recoverable (RDX=0): the old module is callable again. After it (RDX=1) there is none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from bus.memory import PhysicalMemory
from seamldr import elf, range_writer
from seamldr.entropy import Entropy, RdrandUse, SeamopsStatus
from seamldr.identity import identity_of
from seamldr.image import MAX_MODULE_PAGES
from seamldr.manifest import ManifestContext, check_manifest
from seamldr.platform import MAX_ADDRESSABLE_LPS, MAX_PACKAGES, PAGE, LoaderProfile, Platform
from seamldr.range_layout import HANDOFF_HEADER_SIZE, LinearBases, RangeLayout, handoff_pa, plan_range
from seamldr.range_writer import Handoff
from seamldr.sigstruct import SIGSTRUCT_SIZE, SigStruct
from seamldr.state import InstalledModule, PSeamldrState
from seamldr.status import Fatal, Flow, Scenario, SeamldrStatus
from seamldr.structures import PARAMS_SIZE, SeamldrParams

SEAMDB_ATTEMPTS = 5


class InstallError(Exception):
    """A check of INSTALL failed; `status` goes to RAX."""

    def __init__(self, status: SeamldrStatus) -> None:
        super().__init__(status.name)
        self.status = status


class Installer:
    """The INSTALL leaf over a loader's state and memory."""

    def __init__(
        self, platform: Platform, memory: PhysicalMemory, state: PSeamldrState, entropy: Entropy
    ) -> None:
        self.platform = platform
        self.memory = memory
        self.state = state
        self.entropy = entropy
        self._wiped = False

    def call(self, lp: int, rcx: int) -> tuple[SeamldrStatus, int]:
        """One LP's SEAMLDR.INSTALL: status and RDX. Raises Fatal."""
        refusal = self._join(lp)
        if refusal:
            return refusal, 0
        if len(self.state.update_bitmap) < self.platform.num_lps:
            return SeamldrStatus.SUCCESS, 0
        self.state.init_done = True
        self._wiped = False
        try:
            self._install(rcx)
        except InstallError as error:
            self._close_session()
            return error.status, int(self._wiped)
        self._close_session()
        return SeamldrStatus.SUCCESS, 0

    def _join(self, lp: int) -> SeamldrStatus:
        """Session rules, and what the first LP does: from here on the module refuses SEAMCALLs."""
        state = self.state
        if lp >= MAX_ADDRESSABLE_LPS:
            return SeamldrStatus.EUNSPECERR
        if state.current_flow not in (Flow.READY, Flow.INSTALL) or lp in state.update_bitmap:
            return SeamldrStatus.EBADCALL
        if not state.update_bitmap:
            state.seamextend_snapshot = state.seamextend
            state.seamextend = state.seamextend.with_ready(0)
            state.current_flow = Flow.INSTALL
        state.update_bitmap.add(lp)
        package = self.platform.package_of(lp)
        if package >= MAX_PACKAGES:
            raise Fatal(f"package {package} in INSTALL")
        if not state.init_done and not state.max_pkg_lps[package]:
            state.max_pkg_lps[package] = self.platform.lps_per_package
        return SeamldrStatus.SUCCESS

    def _close_session(self) -> None:
        self.state.update_bitmap = set()
        self.state.current_flow = Flow.READY

    def _install(self, rcx: int) -> None:
        """The last LP's work; any failure but a late SEAMDB one leaves SEAMEXTEND as the snapshot says."""
        try:
            module = self._verify_and_place(rcx)
        except InstallError:
            if self._wiped:
                self._forget_module()
            self.state.seamextend = self.state.seamextend_snapshot
            raise
        self._publish(*module)

    def _forget_module(self) -> None:
        self.state.seamextend_snapshot = self.state.seamextend_snapshot.without_module(keep_se_svn=True)
        self.state.installed = None

    def _verify_and_place(self, rcx: int) -> tuple[SigStruct, InstalledModule]:
        params = self._read_params(rcx)
        scenario = Scenario(params.scenario)
        sigstruct = SigStruct.decode(self._read(params.sigstruct_pa, SIGSTRUCT_SIZE))
        pages = params.num_module_pages
        self._check_manifest(sigstruct, scenario, pages)
        rdrand = self.entropy.rdrand(RdrandUse.ASLR)
        if rdrand is None:
            raise InstallError(SeamldrStatus.ENOENTROPY)
        layout = plan_range(self.platform, sigstruct, pages)
        if layout.available < layout.minimum:
            raise InstallError(SeamldrStatus.ENOMEM)
        keep = self._prepare_wipe(scenario, sigstruct)
        self._wipe(layout, keep)
        self._map(layout)
        image = b"".join(self._read(pa, PAGE) for pa in params.pages[:pages])
        self._place(layout, sigstruct, image, LinearBases.randomize(rdrand))
        return sigstruct, self._describe(sigstruct, image)

    # Before the point of no return

    def _read(self, pa: int, size: int) -> bytes:
        return self.memory.read(self.platform.strip_keyid(pa), size)

    def _read_params(self, rcx: int) -> SeamldrParams:
        if not self.platform.hpa_ok(rcx, PAGE):
            raise InstallError(SeamldrStatus.EBADPARAM)
        params = SeamldrParams.decode(self._read(rcx, PARAMS_SIZE))
        if not all(self._params_rules(params)):
            raise InstallError(SeamldrStatus.EBADPARAM)
        return params

    def _params_rules(self, params: SeamldrParams) -> Iterator[bool]:
        """In the loader's order, though all fail alike."""
        fewest = 0 if self.platform.profile is LoaderProfile.P10 else 1
        pages = params.num_module_pages
        yield params.version == 0
        yield not any(params.reserved)
        yield params.scenario in (Scenario.LOAD, Scenario.UPDATE)
        yield fewest <= pages <= MAX_MODULE_PAGES
        yield all(self.platform.hpa_ok(pa, PAGE) for pa in params.pages[:pages])
        yield self.platform.hpa_ok(params.sigstruct_pa, PAGE)
        yield params.scenario == Scenario.LOAD or bool(self.state.seamextend_snapshot.seam_ready)

    def _check_manifest(self, sigstruct: SigStruct, scenario: Scenario, pages: int) -> None:
        snapshot = self.state.seamextend_snapshot
        context = ManifestContext(
            platform=self.platform,
            scenario=scenario,
            image_size=pages * PAGE,
            current_svn=snapshot.svn_major << 8 | snapshot.svn_minor,
            dirty=self.state.dirty,
        )
        status = check_manifest(sigstruct, context)
        if status:
            raise InstallError(status)

    def _prepare_wipe(self, scenario: Scenario, sigstruct: SigStruct) -> tuple[int, int]:
        """The [start, end) bytes that the wipe must spare: the handoff data of an UPDATE."""
        if self.platform.profile is LoaderProfile.P10:
            return 0, 0
        if scenario is Scenario.LOAD:
            clear_seamdb(self.platform, self.state, self.entropy)
            return 0, 0
        if self.state.num_remaining_updates == 0:
            raise InstallError(SeamldrStatus.EBADCALL)
        start = handoff_pa(self.platform)
        handoff = Handoff.decode(self.memory.read(start, HANDOFF_HEADER_SIZE))
        room = (range_writer.running_handoff_pages(self.platform, self.memory) + 1) * PAGE
        if not (
            handoff.valid
            and handoff.size + HANDOFF_HEADER_SIZE <= room
            and sigstruct.min_update_hv <= handoff.hv <= sigstruct.module_hv
        ):
            raise InstallError(SeamldrStatus.EBADHANDOFF)
        return start, start + HANDOFF_HEADER_SIZE + handoff.size

    # After it

    def _wipe(self, layout: RangeLayout, keep: tuple[int, int]) -> None:
        for start, end in self.state.range_in_use:
            range_writer.zero(self.memory, start, end, keep)
        self.state.range_in_use = layout.extents
        self._wiped = True

    def _map(self, layout: RangeLayout) -> None:
        """Count page tables; the order is code, data, stacks, SYS_INFO_TABLE, then the keyholes, which may not fail."""
        if layout.spare_table_pages < layout.tables_before_keyhole:
            raise InstallError(SeamldrStatus.ENOMEM)
        if layout.spare_table_pages < layout.tables:
            raise Fatal("no page for the page tables of the keyhole ranges")

    def _place(self, layout: RangeLayout, sigstruct: SigStruct, image: bytes, bases: LinearBases) -> None:
        self.memory.write(layout.code_pa, image)
        if hashlib.sha384(image).digest() != sigstruct.seamhash:
            raise InstallError(SeamldrStatus.EBADHASH)
        if self.platform.profile is not LoaderProfile.P10:
            self._relocate(layout, sigstruct, image, bases)
        range_writer.write_sys_info_table(self.platform, self.memory, sigstruct, layout, bases)
        range_writer.write_transfer_vmcss(self.memory, sigstruct, layout, bases)

    def _relocate(self, layout: RangeLayout, sigstruct: SigStruct, image: bytes, bases: LinearBases) -> None:
        relocated = bytearray(image)
        try:
            elf.relocate(relocated, bases.code)
        except elf.ElfError:
            raise InstallError(SeamldrStatus.EBADPARAM) from None
        if sigstruct.gdt_idt_offset:
            range_writer.patch_idt(relocated, sigstruct, bases.code)
        self.memory.write(layout.code_pa, bytes(relocated))

    def _describe(self, sigstruct: SigStruct, image: bytes) -> InstalledModule:
        return InstalledModule(
            identity=identity_of(sigstruct, image),
            seamhash=sigstruct.seamhash,
            seamsvn=sigstruct.seamsvn,
            module_hv=sigstruct.module_hv,
            min_update_hv=sigstruct.min_update_hv,
            no_downgrade=bool(sigstruct.no_downgrade),
            num_handoff_pages=sigstruct.num_handoff_pages,
            generation=self.state.generation + 1,
        )

    def _publish(self, sigstruct: SigStruct, module: InstalledModule) -> None:
        """Record the module in SEAMDB, then make it callable."""
        state = self.state
        new = state.seamextend_snapshot.with_module(sigstruct.svn_minor, sigstruct.svn_major, sigstruct.seamhash)
        state.seamextend = new
        state.installed = None
        if self.platform.profile is not LoaderProfile.P10:
            self._insert_seamdb()
            range_writer.write_handoff_fields(self.platform, self.memory, sigstruct)
            state.num_remaining_updates -= 1
            for package, lps in enumerate(state.max_pkg_lps):
                state.key_dirty[package] = state.cache_dirty[package] = bool(lps)
            state.next_kid = [0] * len(state.next_kid)
            state.next_block = [0] * len(state.next_block)
        state.seamextend = new.with_ready(1)
        state.installed = module
        state.generation = module.generation

    def _insert_seamdb(self) -> None:
        if self.state.seamdb_entries >= self.platform.seamdb_size:
            raise Fatal("SEAMDB_INSERT into a full database")
        for _ in range(SEAMDB_ATTEMPTS):
            status = self.entropy.seamdb_insert()
            if status is SeamopsStatus.SUCCESS:
                self.state.seamdb_entries += 1
                return
            if status is not SeamopsStatus.ENTROPY_ERROR:
                raise Fatal(f"SEAMDB_INSERT returned {status.name}")
        raise InstallError(SeamldrStatus.ENOENTROPY)


def clear_seamdb(platform: Platform, state: PSeamldrState, entropy: Entropy) -> None:
    """SEAMDB_CLEAR: empty the module history and remember that it has all its room."""
    state.seamdb_entries = 0
    state.seamdb_nonce = entropy.seamdb_nonce()
    state.num_remaining_updates = platform.seamdb_size


def remaining_updates(platform: Platform, state: PSeamldrState) -> int:
    """What SEAMDB_GETREF says about free entries."""
    return platform.seamdb_size - state.seamdb_entries
