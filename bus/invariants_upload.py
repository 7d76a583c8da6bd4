"""Invariants about the user's interface of the update: I39, I42, I45, I46, I47, I48."""

from __future__ import annotations

from bus.invariant import Invariant
from bus.records import Record
from bus.shadow import Shadow

ENXIO, EBUSY = 6, 16
DEVICE = "devices/faux/tdx_host"
NODES = f"{DEVICE}/firmware/"
IDLE = "idle"
UPLOAD_STAGES = (IDLE, "receiving", "preparing", "transferring", "programming")
"""What `status` may show, in the order of an upload."""
UPLOAD_ERRORS = (
    "hw-error",
    "timeout",
    "user-abort",
    "device-busy",
    "invalid-file-size",
    "read-write-error",
    "flash-wearout",
    "firmware-invalid",
)
"""What `error` may show after the stage."""
FEATURE_TD_PRESERVING = 1 << 1
"""Bit of TDX_FEATURES0."""


def upload_file(record: Record) -> tuple[str, str]:
    """Name of the upload node and of its file that a `sysfs_read` or `sysfs_write` is about; empty if of none."""
    path = record["path"]
    name, _, file = path.removeprefix(NODES).partition("/")
    return (name, file) if path.startswith(NODES) else ("", "")


def stage_of(shadow: Shadow, name: str) -> str:
    """Where the upload of a node is."""
    last = shadow.uploads.get(name)
    return last["stage"] if last else IDLE


class VersionIsTrue(Invariant):
    """Judged at each read of `version`. What it is at boot, the first read tells."""

    id = "I39"
    slug = "version-is-true"
    sentence = "`version` reads as the version of the running module, and cannot be read while TDX is not initialized."
    source = "kernel tdx-host.c, version_show()"
    broken_by = "a version that is kept while the module changes"

    def __init__(self) -> None:
        super().__init__()
        self._known: tuple[str, Record] | None = None

    def on_module_init_flag(self, record: Record, shadow: Shadow) -> None:
        self._known = (record["version"] if record["initialized"] else "", record)

    def on_sysfs_read(self, record: Record, shadow: Shadow) -> None:
        if record["path"] != f"{DEVICE}/version":
            return
        if self._known is None and record["errno"] in (0, -ENXIO):
            self._known = (record["value"], record)
        version, since = self._known or ("", None)
        if (record["value"], record["errno"]) != (version, 0 if version else -ENXIO):
            what = f"{version} runs" if version else "TDX is not initialized"
            read = record["value"] or f"errno {record['errno']}"
            self.violated(f"version reads {read} while {what}", ("since", since), ("read", record))


class UpdatesCounted(Invariant):
    """Judged where SEAMLDR.INFO answers, if no update was under way between its request and its answer.

    A failed update may have counted or not; then counting begins anew. A KVM process that was started again numbers its
    requests anew, and is not judged.
    """

    id = "I42"
    slug = "updates-counted"
    sentence = "num_remaining_updates goes down by one with each update that succeeds, and stays with each refused one."
    source = "P-SEAMLDR: one SEAMDB entry for each SEAMLDR.INSTALL session"
    broken_by = "an installation that is counted twice or not at all"

    def __init__(self) -> None:
        super().__init__()
        self._changes = 0
        self._open: set[int] = set()
        self._begun: dict[int, int] = {}
        self._refused: set[str] = set()
        self._succeeded = 0
        self._last: tuple[int, int, Record] | None = None

    def on_request(self, record: Record, shadow: Shadow) -> None:
        if record["kind"] == "install":
            self._changes += 1
            self._open.add(record["request"])
        else:
            self._begun[record["request"]] = self._changes

    def on_update_refused(self, record: Record, shadow: Shadow) -> None:
        self._refused.add(record["node"])

    def on_admin_end(self, record: Record, shadow: Shadow) -> None:
        if record["kind"] != "install":
            return
        self._changes += 1
        self._open.discard(record["request"])
        refused = record["node"] in self._refused
        self._refused.discard(record["node"])
        if record["errno"] == 0:
            self._succeeded += 1
        elif not refused:
            self._last = None

    def on_seamldr_info(self, record: Record, shadow: Shadow) -> None:
        begun = self._begun.pop(record["request"], None)
        if record["errno"] or self._open or begun != self._changes or record["node"] in shadow.dead:
            return
        if self._last is not None:
            remaining, succeeded, before = self._last
            expected = remaining - (self._succeeded - succeeded)
            if record["remaining"] != expected:
                why = f"{record['remaining']} updates remain, not {expected}"
                self.violated(why, ("before", before), ("now", record))
        self._last = (record["remaining"], self._succeeded, record)


class UploadStages(Invariant):
    """Judged where an upload node changes, and at each read of `status`."""

    id = "I45"
    slug = "upload-stages"
    sentence = (
        "`status` tells the stage of the upload: idle, receiving, preparing, transferring, programming, in this order, "
        "and idle again."
    )
    source = "Linux sysfs_upload.c, fw_upload_main()"
    broken_by = "a worker that goes back; a second upload that begins during the first"

    def on_fw_upload(self, record: Record, shadow: Shadow) -> None:
        name, before, now = record["name"], stage_of(shadow, record["name"]), record["stage"]
        if now not in UPLOAD_STAGES:
            self.violated(f"the upload of {name} is {now}", ("now", record))
        elif now != IDLE and UPLOAD_STAGES.index(now) < UPLOAD_STAGES.index(before):
            why = f"the upload of {name} went from {before} to {now}"
            self.violated(why, ("before", shadow.uploads.get(name)), ("now", record))

    def on_sysfs_read(self, record: Record, shadow: Shadow) -> None:
        name, file = upload_file(record)
        if file == "status" and record["value"] != stage_of(shadow, name):
            why = f"status of {name} reads {record['value']} while it is {stage_of(shadow, name)}"
            self.violated(why, ("since", shadow.uploads.get(name)), ("read", record))


class UploadErrors(Invariant):
    """Judged where an upload node changes, and at each read of `error`."""

    id = "I46"
    slug = "upload-errors"
    sentence = (
        "`error` cannot be read (-EBUSY) while an upload runs; else it is empty, or the stage and the word of what "
        "went wrong."
    )
    source = "Linux sysfs_upload.c, error_show()"
    broken_by = "an error of before that is still there; a word that the ABI does not have"

    def on_fw_upload(self, record: Record, shadow: Shadow) -> None:
        name, error = record["name"], record["error"]
        if (error == "EBUSY") != (record["stage"] != IDLE):
            self.violated(f"error of {name} is {error or 'empty'} while it is {record['stage']}", ("now", record))
        elif error not in ("", "EBUSY") and not _is_known(error):
            self.violated(f"error of {name} is {error}", ("now", record))

    def on_sysfs_read(self, record: Record, shadow: Shadow) -> None:
        name, file = upload_file(record)
        if file != "error":
            return
        last = shadow.uploads.get(name)
        expected = last["error"] if last else ""
        if ("EBUSY" if record["errno"] == -EBUSY else record["value"]) != expected:
            read, is_ = record["value"] or "empty", expected or "empty"
            self.violated(f"error of {name} reads {read} while it is {is_}", ("since", last), ("read", record))


def _is_known(error: str) -> bool:
    stage, _, word = error.partition(":")
    return stage in UPLOAD_STAGES[1:] and word in UPLOAD_ERRORS


class OneUpload(Invariant):
    """Judged where an upload node changes, at each write to `data`, and where an update begins."""

    id = "I47"
    slug = "one-upload"
    sentence = "A node has at most one upload at a time, whose data cannot be written; and updates do not overlap."
    source = "Linux sysfs_upload.c, fw_upload_start(), and sysfs.c, firmware_data_write()"
    broken_by = "an upload that starts without a look at the one before"

    def on_fw_upload(self, record: Record, shadow: Shadow) -> None:
        name, before = record["name"], stage_of(shadow, record["name"])
        if record["stage"] == "receiving" and before not in (IDLE, "receiving"):
            why = f"an upload of {name} began while one was {before}"
            self.violated(why, ("before", shadow.uploads.get(name)), ("now", record))
        if record["data"] and record["stage"] != IDLE:
            self.violated(f"data of {name} can be written while it is {record['stage']}", ("now", record))

    def on_sysfs_write(self, record: Record, shadow: Shadow) -> None:
        name, file = upload_file(record)
        if file == "data" and not record["errno"] and stage_of(shadow, name) != IDLE:
            why = f"data of {name} was written while it was {stage_of(shadow, name)}"
            self.violated(why, ("since", shadow.uploads.get(name)), ("written", record))

    def on_update_begin(self, record: Record, shadow: Shadow) -> None:
        update = shadow.open_update()
        if update is not None and not shadow.dead:
            why = f"update {record['update']} began before update {update.begin['update']} had ended"
            self.violated(why, ("before", update.begin), ("now", record))


class UploadVisible(Invariant):
    """Judged when the files are there."""

    id = "I48"
    slug = "upload-visible"
    sentence = (
        "Upload nodes and what would call P-SEAMLDR are visible if and only if TDX is initialized, its module can be "
        "updated (TDX_FEATURES0 bit 1) and the CPU has no erratum that the kernel minds."
    )
    source = "kernel tdx-host.c, is_visible of the attributes"
    broken_by = "a driver that does not look"

    def on_sysfs_tree(self, record: Record, shadow: Shadow) -> None:
        supported = record["sysinfo"] and record["features0"] & FEATURE_TD_PRESERVING and not record["erratum"]
        others = [path for path in record["files"] if path != f"{DEVICE}/version"]
        if bool(others) != bool(supported):
            what = f"{others[0]} is visible" if others else "no upload node is visible"
            self.violated(f"{what} although updates are {'' if supported else 'not '}supported", ("seen", record))


UPLOAD_INVARIANTS: tuple[type[Invariant], ...] = (
    VersionIsTrue,
    UpdatesCounted,
    UploadStages,
    UploadErrors,
    OneUpload,
    UploadVisible,
)
