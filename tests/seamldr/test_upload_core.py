"""The firmware-upload state machine: each rule of the class's files, the errors of both drivers, what always holds."""

from __future__ import annotations

from errno import EBUSY, EINVAL, EIO, ENODEV, ENOMEM, ENOSPC

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from seamldr.upload import MERGED, V3, LoadState, Stored, Upload, UploadError, UploadProgress

STAGES = [stage.value for stage in UploadProgress]
UNEXPECTED = "firmware_loading_store: unexpected value"


def upload(state: str) -> Upload:
    """A node in the given state: idle, holding (data without a load), loading, running, failed, or done."""
    core = Upload()
    if state == "holding":
        core.store_data(0, 100)
    if state in ("loading", "running", "failed", "done"):
        core.store_loading("1")
        core.store_data(0, 8192)
    if state in ("running", "failed", "done"):
        assert core.store_loading("0").started
        core.prepare()
        assert core.transfer()
    if state in ("failed", "done"):
        if core.wrote(8192, UploadError.FW_INVALID if state == "failed" else UploadError.NONE):
            core.program()
        core.free()
        core.finish()
    return core


LOADING_WRITES = [
    ("r1-start", "idle", "1\n", Stored(), LoadState.LOADING, 0),
    ("r1-start-drops-old-data", "holding", "1", Stored(), LoadState.LOADING, 0),
    ("r1-restart-drops-old-data", "loading", "1", Stored(), LoadState.LOADING, 0),
    ("r2-start-while-running", "running", "1", Stored(), LoadState.DONE, 8192),
    ("r3-conclude", "loading", "0\n", Stored(started=True), LoadState.DONE, 8192),
    ("r4-conclude-without-load", "idle", "0", Stored(log=f"{UNEXPECTED} (0)"), LoadState.NONE, 0),
    ("r4-conclude-data-without-load", "holding", "0", Stored(log=f"{UNEXPECTED} (0)"), LoadState.NONE, 0),
    ("r4-conclude-while-running", "running", "0", Stored(), LoadState.DONE, 8192),
    ("r5-abort", "loading", "-1\n", Stored(), LoadState.NONE, 0),
    ("r5-abort-while-running", "running", "-1", Stored(), LoadState.DONE, 8192),
    ("r6-other", "loading", "7", Stored(log=f"{UNEXPECTED} (7)"), LoadState.NONE, 0),
    ("r6-other-while-idle", "idle", "-2", Stored(log=f"{UNEXPECTED} (-2)"), LoadState.NONE, 0),
    ("r6-not-a-number-is-0", "idle", "on", Stored(log=f"{UNEXPECTED} (0)"), LoadState.NONE, 0),
]


@pytest.mark.parametrize(
    ("state", "text", "stored", "load", "size"),
    [row[1:] for row in LOADING_WRITES],
    ids=[row[0] for row in LOADING_WRITES],
)
def test_a_write_to_loading(state: str, text: str, stored: Stored, load: LoadState, size: int) -> None:
    """Each value, in each state, does what the class says, and is accepted even where it means nothing."""
    core = upload(state)
    assert core.store_loading(text) == stored
    assert (core.load, core.size) == (load, size)


@pytest.mark.parametrize("state", ["idle", "holding", "loading", "running", "failed", "done"])
def test_loading_reads_1_only_while_data_is_wanted(state: str) -> None:
    """`loading` reads 1 in the state loading, else 0."""
    assert upload(state).show_loading() == ("1\n" if state == "loading" else "0\n")


@pytest.mark.parametrize("state", ["idle", "holding", "loading", "running", "failed", "done"])
def test_data_is_refused_only_while_an_upload_has_it(state: str) -> None:
    """`data` takes bytes in every state but done, where it is -ENODEV."""
    core = upload(state)
    running = state == "running"
    assert core.data_is_accessible is not running
    assert core.store_data(0, 10).errno == (-ENODEV if running else 0)


def test_data_grows_by_writes_at_any_offset() -> None:
    """The image is as long as the furthest byte ever written."""
    core = upload("idle")
    core.store_loading("1")
    for offset, count in ((8000, 192), (0, 4096), (4096, 10)):
        core.store_data(offset, count)
    core.store_loading("0")
    assert core.show_remaining_size() == "8192\n"


def test_no_data_starts_nothing() -> None:
    """A load of 0 bytes goes back to idle: no upload, no error."""
    core = upload("idle")
    core.store_loading("1")
    assert core.store_loading("0") == Stored()
    assert (core.load, core.show_status(), core.show_error()) == (LoadState.NONE, "idle\n", "")


def test_a_start_before_the_worker_has_left_is_busy() -> None:
    """Between the release of the data and the end of the worker a new upload is -EBUSY, and its load is dropped."""
    core = upload("running")
    core.wrote(8192)
    core.program()
    core.free()
    core.store_loading("1")
    core.store_data(0, 5)
    assert core.store_loading("0") == Stored(-EBUSY)
    assert (core.load, core.progress) == (LoadState.NONE, UploadProgress.PROGRAMMING)


def test_the_start_is_seen_at_once() -> None:
    """The write of 0 itself leaves `receiving`, no error and all bytes remaining; idle afterwards means over."""
    core = upload("failed")
    core.store_loading("1")
    core.store_data(0, 4096)
    core.store_loading("0")
    assert (core.show_status(), core.show_error(), core.show_remaining_size()) == ("receiving\n", None, "4096\n")


def test_a_good_upload_shows_every_stage_in_order() -> None:
    """`status` is receiving, preparing, transferring, programming, idle; then no error, nothing remaining, no data."""
    core = upload("loading")
    core.store_loading("0")
    seen = [core.show_status()]
    core.prepare()
    seen.append(core.show_status())
    assert core.transfer()
    seen.append(core.show_status())
    assert core.wrote(8000) and core.show_remaining_size() == "192\n"
    assert core.wrote(192)
    core.program()
    seen.append(core.show_status())
    core.free()
    core.finish()
    seen.append(core.show_status())
    assert seen == ["receiving\n", "preparing\n", "transferring\n", "programming\n", "idle\n"]
    assert (core.show_error(), core.show_remaining_size(), core.size, core.load) == ("", "0\n", 0, LoadState.NONE)


@pytest.mark.parametrize("stage", [UploadProgress.PREPARING, UploadProgress.TRANSFERRING, UploadProgress.PROGRAMMING])
@pytest.mark.parametrize("error", [error for error in UploadError if error is not UploadError.NONE])
def test_error_names_the_stage_and_the_error(stage: UploadProgress, error: UploadError) -> None:
    """`error` is -EBUSY while an upload runs, then `stage:error`, until the next upload starts."""
    core = upload("loading")
    core.store_loading("0")
    core.prepare()
    if stage is not UploadProgress.PREPARING:
        core.transfer()
    if stage is UploadProgress.PROGRAMMING:
        core.wrote(8192)
        core.program()
    core.fail(error)
    assert core.show_error() is None
    core.free()
    core.finish()
    assert core.show_error() == f"{stage.value}:{error.value}\n"
    core.store_loading("1")
    core.store_data(0, 1)
    core.store_loading("0")
    assert core.show_error() is None and core.error is UploadError.NONE


def test_remaining_size_stays_after_a_failure() -> None:
    """It is 0 after a success and where it stood after a failure."""
    assert upload("done").show_remaining_size() == "0\n"
    assert upload("failed").show_remaining_size() == "8192\n"


def test_a_write_of_no_bytes_is_an_error() -> None:
    """A driver that takes nothing and reports no error is a read-write-error."""
    core = upload("running")
    assert not core.wrote(0)
    core.free()
    core.finish()
    assert core.show_error() == "transferring:read-write-error\n"


@pytest.mark.parametrize("text", ["1", "1\n", "y", "Y", "true", "T", "on", "ON\n", "yes"])
def test_cancel_takes_true_values(text: str) -> None:
    """A true value is accepted while an upload runs, -ENODEV while none does."""
    assert upload("running").store_cancel(text) == Stored()
    assert upload("idle").store_cancel(text) == Stored(-ENODEV)


@pytest.mark.parametrize("text", ["0", "n", "off", "", "\n", "2", "-1", "o", "cancel"])
def test_cancel_refuses_other_values(text: str) -> None:
    """Anything that is not true is -EINVAL."""
    assert upload("running").store_cancel(text) == Stored(-EINVAL)
    assert upload("idle").store_cancel(text) == Stored(-EINVAL)


@pytest.mark.parametrize(("profile", "goes_on"), [(MERGED, True), (V3, False)], ids=["merged", "v3"])
def test_what_cancel_does(profile: object, goes_on: bool) -> None:
    """As merged it does nothing; in version 3 one that comes before the install ends the upload with user-abort."""
    core = Upload(V3 if profile is V3 else MERGED)
    core.store_loading("1")
    core.store_data(0, 1)
    core.store_loading("0")
    core.store_cancel("1")
    core.prepare()
    core.store_cancel("1")
    assert core.transfer() is goes_on
    core.free()
    core.finish()
    assert core.show_error() == ("" if goes_on else "transferring:user-abort\n")


def test_prepare_forgets_a_cancel_of_before() -> None:
    """In version 3 a cancel that nobody wanted does not end the next upload."""
    core = Upload(V3)
    assert core.store_cancel("1") == Stored(-ENODEV)
    core.store_loading("1")
    core.store_data(0, 1)
    core.store_loading("0")
    core.prepare()
    assert core.transfer()


ERRNOS = [
    ("r1", 0, UploadError.NONE, UploadError.NONE),
    ("r2", -EBUSY, UploadError.BUSY, UploadError.FW_INVALID),
    ("r3", -EIO, UploadError.HW_ERROR, UploadError.FW_INVALID),
    ("r4", -ENOSPC, UploadError.WEAROUT, UploadError.FW_INVALID),
    ("r5", -ENOMEM, UploadError.RW_ERROR, UploadError.FW_INVALID),
    ("r6", -EINVAL, UploadError.FW_INVALID, UploadError.FW_INVALID),
    ("r6", -ENODEV, UploadError.FW_INVALID, UploadError.FW_INVALID),
]


@pytest.mark.parametrize(("row", "errno", "v3", "merged"), ERRNOS, ids=[f"{row[0]}-errno{row[1]}" for row in ERRNOS])
def test_errno_of_the_install_as_an_upload_error(row: str, errno: int, v3: UploadError, merged: UploadError) -> None:
    """Version 3 tells causes apart; as merged every failure is firmware-invalid."""
    assert (V3.upload_error(errno), MERGED.upload_error(errno)) == (v3, merged)


class AnyOrder(RuleBasedStateMachine):
    """Clients and worker in any order; the stages seen and the data of the running upload are kept beside."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Upload(V3)
        self.seen = ["idle"]
        self.running = 0
        self.step = 0

    @rule(text=st.sampled_from(["1", "0", "-1", "7", "x"]))
    def write_loading(self, text: str) -> None:
        """A client writes `loading`."""
        if self.core.store_loading(text).started:
            assert self.running == 0, "I47: a second upload started"
            self.running, self.step = self.core.size, 0
            self.seen = ["idle"]

    @rule(offset=st.integers(0, 9000), count=st.integers(1, 5000))
    def write_data(self, offset: int, count: int) -> None:
        """A client writes `data`; an upload that still has it is not touched."""
        before = self.core.size
        if self.core.store_data(offset, count).errno:
            assert self.running and self.core.size == before

    @rule(text=st.sampled_from(["1", "0", ""]))
    def write_cancel(self, text: str) -> None:
        """A client writes `cancel`."""
        self.core.store_cancel(text)

    @precondition(lambda self: self.running and self.step == 0)
    @rule()
    def work_prepare(self) -> None:
        """The worker begins."""
        self.core.prepare()
        self.step = 1

    @precondition(lambda self: self.step == 1)
    @rule()
    def work_transfer(self) -> None:
        """The worker goes on unless it was cancelled."""
        self.step = 2 if self.core.transfer() else 4

    @precondition(lambda self: self.step == 2)
    @rule(part=st.integers(0, 5000), error=st.sampled_from([UploadError.NONE, UploadError.HW_ERROR]))
    def work_write(self, part: int, error: UploadError) -> None:
        """The driver takes a part, or fails."""
        if not self.core.wrote(min(part, self.core.remaining), error):
            self.step = 4
        elif self.core.remaining == 0:
            self.step = 3

    @precondition(lambda self: self.step == 3)
    @rule()
    def work_program(self) -> None:
        """All is written."""
        self.core.program()
        self.step = 4

    @precondition(lambda self: self.step == 4)
    @rule()
    def work_free(self) -> None:
        """The data goes."""
        self.core.free()
        self.step = 5

    @precondition(lambda self: self.step == 5)
    @rule()
    def work_finish(self) -> None:
        """The worker leaves."""
        self.core.finish()
        self.running = self.step = 0

    @invariant()
    def i45_stages_go_forward(self) -> None:
        """I45: what `status` shows during an upload goes forward through the stages, back to idle at its end."""
        status = self.core.show_status().strip()
        if status != self.seen[-1]:
            self.seen.append(status)
        order = [STAGES.index(stage) for stage in self.seen if stage != "idle"]
        assert order == sorted(set(order))
        assert "idle" not in self.seen[1:] or not self.running

    @invariant()
    def i46_error_is_busy_or_well_formed(self) -> None:
        """I46: `error` is -EBUSY iff an upload runs, else empty or a stage and an error that the class knows."""
        shown = self.core.show_error()
        assert (shown is None) == (self.core.progress is not UploadProgress.IDLE) == bool(self.running)
        if shown:
            stage, _, error = shown.strip().partition(":")
            assert stage in STAGES[1:] and error in {error.value for error in UploadError} - {"none"}

    @invariant()
    def i47_data_belongs_to_the_upload(self) -> None:
        """I47: from its start until the worker drops it, the data of an upload cannot be changed."""
        if self.running and self.step < 5:
            assert not self.core.data_is_accessible and self.core.size == self.running


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
