"""What calls raise. Every error is an :class:`Error`; its text says what was wrong, with its values, and what to do."""


class Error(Exception):
    """Any error of this library."""


class UsageError(Error):
    """The caller's mistake: nothing has happened, and the same call will fail again."""


class ArgumentError(UsageError, ValueError):
    """An index, a name, a text or a layout of memory that cannot be."""


class ShapeError(UsageError, ValueError):
    """An array of another shape or length."""


class DtypeError(UsageError, TypeError):
    """An array of another type."""


class ClosedError(UsageError):
    """An object that was closed or released before."""


class ForkedError(UsageError):
    """An object of the parent process, used in a child after fork."""


class ConcurrentError(UsageError):
    """A sequence that another thread is changing, or using while it was to be changed."""


class InUseError(UsageError):
    """A sequence whose rows are being looked at: views of them are alive."""


class UnsupportedError(UsageError):
    """Something that this session, or this method, does not offer."""


class NoRoomError(UsageError):
    """Positions that the sequence has no room for: reserve."""


class RefusedError(Error):
    """The daemon refused, for a reason that is none of the others."""


class NotAllowedError(RefusedError):
    """The daemon does not serve this user."""


class BackpressureError(RefusedError):
    """Memory, tables, sequences or sessions are used up."""


class QuotaError(RefusedError):
    """A quota of this user is reached."""


class ImageError(RefusedError):
    """An image that cannot be written or read."""


class ConnectError(Error, ConnectionError):
    """Nobody listens at the socket, or it may not be used."""


class VersionError(Error):
    """The daemon speaks another version of the protocol."""


class GoneError(Error, ConnectionError):
    """The daemon has gone. The session's own rows can still be read."""


class DeadlineError(Error, TimeoutError):
    """The answer did not come in time; it was given up."""


class NotReadyError(Error):
    """The request was answered without rows."""


class BusyError(Error):
    """As many answers are held or under way as the session's ring_slots."""


class SpilledError(Error):
    """Rows that lie on disk: fetch their layer first."""


class LostError(Error):
    """Rows that are lost: truncate the sequence there, and compute them again."""


class DeviceError(Error):
    """A GPU that is missing or failed."""


class ProtocolError(Error):
    """The daemon broke the protocol."""


class SystemCallError(Error, OSError):
    """The operating system refused something."""
