"""The firmware-upload class of Linux for one node, as a state machine: what its files accept and show.

Source: Linux, drivers/base/firmware_loader/sysfs.c and sysfs_upload.c. A write is a `store_...` method that returns a
`Stored`; a read is a `show_...` method. The worker of an upload calls `prepare`, `transfer`, `wrote`, `program`, `free`
and `finish`; what is written to the device, and how long that takes, is the caller's affair. The image's bytes are too:
here is only their number.
"""

from __future__ import annotations

import enum
import re
from errno import EBUSY, EINVAL, EIO, ENODEV, ENOMEM, ENOSPC, ENXIO

import msgspec

from seamldr.image import VERSION_1, VERSION_2

FEATURE_TD_PRESERVING = 1 << 1
"""Bit of TDX_FEATURES0: the module can be updated while TDs run."""


class Support(msgspec.Struct, frozen=True):
    """What decides whether the driver shows upload nodes and P-SEAMLDR's attributes, when it is loaded.

    `sysinfo`: TDX is initialized. `features0`: TDX_FEATURES0 of the running module. `erratum`: SEAMRET invalidates the
    current VMCS on this CPU, and the kernel minds.
    """

    sysinfo: bool
    features0: int
    erratum: bool

    @property
    def update_supported(self) -> bool:
        """tdx_supports_runtime_update() of Linux, on a CPU without the erratum."""
        return self.sysinfo and bool(self.features0 & FEATURE_TD_PRESERVING) and not self.erratum


class LoadState(enum.Enum):
    """State of the load: of what `loading` controls."""

    NONE = "none"
    LOADING = "loading"
    DONE = "done"


class UploadProgress(enum.Enum):
    """Stage of the upload; the values are what `status` shows."""

    IDLE = "idle"
    RECEIVING = "receiving"
    PREPARING = "preparing"
    TRANSFERRING = "transferring"
    PROGRAMMING = "programming"


class UploadError(enum.Enum):
    """Why an upload ended; the values are what `error` shows after the stage."""

    NONE = "none"
    HW_ERROR = "hw-error"
    TIMEOUT = "timeout"
    CANCELED = "user-abort"
    BUSY = "device-busy"
    INVALID_SIZE = "invalid-file-size"
    RW_ERROR = "read-write-error"
    WEAROUT = "flash-wearout"
    FW_INVALID = "firmware-invalid"


class NodeProfile(msgspec.Struct, frozen=True):
    """How one version of the TDX host driver behaves.

    `image_version` is the container it reads. `errors` maps an errno of the install, positive, to what `error` says;
    the others are `FW_INVALID`. `cancels`: its `cancel` does something. `checks_first`: it looks for remaining updates
    and offline CPUs before it begins. `readers` are the names of P-SEAMLDR's attributes, its version and the number of
    updates that remain; `reader_mode` is their mode, `reader_errno` what reading them returns, positive, when
    SEAMLDR.INFO fails; 0 for the errno of the call itself.
    """

    node: str
    image_version: int
    errors: dict[int, UploadError]
    cancels: bool
    checks_first: bool
    readers: tuple[str, str]
    reader_mode: int
    reader_errno: int

    def upload_error(self, errno: int) -> UploadError:
        """What the driver makes of an install that returned `errno`, 0 or negative."""
        return self.errors.get(-errno, UploadError.FW_INVALID) if errno else UploadError.NONE


MERGED = NodeProfile(
    "tdx_module",
    VERSION_2,
    {},
    cancels=False,
    checks_first=False,
    readers=("seamldr_version", "num_remaining_updates"),
    reader_mode=0o400,
    reader_errno=0,
)
"""As in the kernel: `tdx_module`; P-SEAMLDR's attributes for root alone."""
V3 = NodeProfile(
    "seamldr_upload",
    VERSION_1,
    {
        EBUSY: UploadError.BUSY,
        EIO: UploadError.HW_ERROR,
        ENOSPC: UploadError.WEAROUT,
        ENOMEM: UploadError.RW_ERROR,
    },
    cancels=True,
    checks_first=True,
    readers=("seamldr/version", "seamldr/num_remaining_updates"),
    reader_mode=0o444,
    reader_errno=ENXIO,
)
"""As in version 3 of the series, which the released client was written for."""
PROFILES = (MERGED, V3)


class Stored(msgspec.Struct, frozen=True):
    """What a write did. `errno` is 0 or negative; `started`: an upload begins; `log`: the kernel's line, or empty."""

    errno: int = 0
    started: bool = False
    log: str = ""


ACCEPTED = Stored()


class Upload:
    """One upload node."""

    def __init__(self, profile: NodeProfile = MERGED) -> None:
        self.profile = profile
        self.load = LoadState.NONE
        self.size = 0
        self.progress = UploadProgress.IDLE
        self.remaining = 0
        self.error = UploadError.NONE
        self.error_progress = UploadProgress.IDLE
        self.cancelled = False

    # What user space writes

    def store_loading(self, text: str) -> Stored:
        """1 starts a load, 0 hands the data to the driver, -1 discards it. Once a load is done, all are ignored."""
        if self.load is LoadState.DONE:
            return ACCEPTED
        value = _simple_strtol(text)
        if value == 1:
            self.load, self.size = LoadState.LOADING, 0
            return ACCEPTED
        if value == 0 and self.load is LoadState.LOADING:
            return self._start()
        self._reset()
        return ACCEPTED if value == -1 else Stored(log=f"firmware_loading_store: unexpected value ({value})")

    def store_data(self, offset: int, count: int) -> Stored:
        """`count` bytes at `offset`: the buffer grows. -ENODEV while an upload has the data."""
        if self.load is LoadState.DONE:
            return Stored(-ENODEV)
        self.size = max(self.size, offset + count)
        return ACCEPTED

    def store_cancel(self, text: str) -> Stored:
        """Only a true value; -ENODEV if nothing runs. What it does is up to the driver: nothing, as merged."""
        if not _kstrtobool(text):
            return Stored(-EINVAL)
        self.cancelled = self.profile.cancels
        return Stored(-ENODEV) if self.progress is UploadProgress.IDLE else ACCEPTED

    def _start(self) -> Stored:
        if self.size == 0:
            self._reset()
            return ACCEPTED
        if self.progress is not UploadProgress.IDLE:
            self._reset()
            return Stored(-EBUSY)
        self.load = LoadState.DONE
        self.progress = UploadProgress.RECEIVING
        self.error, self.remaining = UploadError.NONE, self.size
        return Stored(started=True)

    def _reset(self) -> None:
        self.load, self.size = LoadState.NONE, 0

    # What user space reads

    def show_loading(self) -> str:
        """Whether data is wanted."""
        return f"{int(self.load is LoadState.LOADING)}\n"

    def show_status(self) -> str:
        """The stage."""
        return f"{self.progress.value}\n"

    def show_error(self) -> str | None:
        """The last upload's stage and error, empty if it had none; None for -EBUSY, while one runs."""
        if self.progress is not UploadProgress.IDLE:
            return None
        if self.error is UploadError.NONE:
            return ""
        return f"{self.error_progress.value}:{self.error.value}\n"

    def show_remaining_size(self) -> str:
        """Bytes not yet written; left as it is by an error."""
        return f"{self.remaining}\n"

    @property
    def data_is_accessible(self) -> bool:
        """`data` can be read and written: False is -ENODEV."""
        return self.load is not LoadState.DONE

    # The worker

    def prepare(self) -> None:
        """The driver prepares: it forgets a cancel of before."""
        self.progress = UploadProgress.PREPARING
        self.cancelled = False

    def transfer(self) -> bool:
        """The driver is to be handed the data; False if a cancel came in time."""
        self.progress = UploadProgress.TRANSFERRING
        if self.cancelled:
            self.fail(UploadError.CANCELED)
        return not self.cancelled

    def wrote(self, count: int, error: UploadError = UploadError.NONE) -> bool:
        """The driver took `count` bytes or met an error; False if the upload has failed."""
        if error is UploadError.NONE and count == 0:
            error = UploadError.RW_ERROR
        if error is not UploadError.NONE:
            self.fail(error)
            return False
        self.remaining -= count
        return True

    def program(self) -> None:
        """All data is written: the driver completes."""
        self.progress = UploadProgress.PROGRAMMING

    def fail(self, error: UploadError) -> None:
        """The upload failed in its present stage."""
        self.error, self.error_progress = error, self.progress

    def free(self) -> None:
        """The worker drops the data; the load may begin anew."""
        self._reset()

    def finish(self) -> None:
        """The worker has ended."""
        self.progress = UploadProgress.IDLE


def _simple_strtol(text: str) -> int:
    """What the kernel reads from the beginning of `text`: 0 if there is no number."""
    number = re.match(r"-?[0-9]+", text)
    return int(number[0]) if number else 0


def _kstrtobool(text: str) -> bool:
    """True for y, Y, t, T, 1, on; False for anything else."""
    return text[:1] in set("yYtT1") or text[:2].lower() == "on"
