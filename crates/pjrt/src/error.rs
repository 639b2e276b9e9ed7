//! What can go wrong on the way to a plugin, inside it, or before it is asked.

use crate::DType;
use std::fmt;
use std::path::PathBuf;

/// The result of anything that talks to a plugin.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure of this crate or of the plugin behind it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The plugin refused a call, or work that it had begun failed later.
    #[error("{call}: {code}: {message}")]
    Call {
        /// Name of the C function, as in the PJRT header.
        call: &'static str,
        /// What kind of failure.
        code: Code,
        /// The plugin's own words.
        message: String,
    },
    /// The plugin is too old for this function, or leaves it out.
    #[error("plugin has no {0}")]
    Unsupported(&'static str),
    /// The shared library cannot be loaded.
    #[error("cannot load {}", path.display())]
    Load {
        /// The file asked for.
        path: PathBuf,
        /// The loader's words.
        #[source]
        source: libloading::Error,
    },
    /// The shared library is no PJRT plugin.
    #[error("{} is not a PJRT plugin: it has no GetPjrtApi", path.display())]
    NotAPlugin {
        /// The file asked for.
        path: PathBuf,
    },
    /// The plugin's API version is one this crate cannot speak.
    #[error("plugin speaks PJRT {major}.{minor}, not 0.{floor} or a later 0.x", floor = crate::MIN_MINOR)]
    Version {
        /// The plugin's major version.
        major: i32,
        /// The plugin's minor version.
        minor: i32,
    },
    /// The plugin broke its contract.
    #[error("plugin is malformed: {0}")]
    Malformed(&'static str),
    /// A handle of one client was given to another client.
    #[error("{0} belongs to another client")]
    Foreign(&'static str),
    /// Host memory is not as large as the array.
    #[error("host memory has {got} bytes, the array {needed}")]
    HostSize {
        /// Bytes the array takes on the host.
        needed: usize,
        /// Bytes given.
        got: usize,
    },
    /// The array has another element type than asked for.
    #[error("array has elements of type {got}, not {expected}")]
    ElementType {
        /// The type asked for.
        expected: DType,
        /// The array's type.
        got: DType,
    },
    /// An element type without a place in [`DType`].
    #[error("unknown element type {0}")]
    UnknownElementType(i32),
    /// Dimensions that no array can have.
    #[error("dimensions {0:?} are negative, too many, or too large")]
    Dimensions(Vec<i64>),
    /// The devices of one launch got argument lists of different lengths, or not one list each.
    #[error("{lists} argument lists for {devices} devices, or of unequal lengths")]
    Arguments {
        /// Lists given.
        lists: usize,
        /// Devices the program runs on.
        devices: usize,
    },
}

impl Error {
    /// The plugin's code, where the plugin was the one to fail.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Call { code, .. } => Some(*code),
            _ => None,
        }
    }
}

/// The canonical status codes that plugins answer with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Code {
    /// The work was cancelled.
    Cancelled,
    /// No better code fits.
    Unknown,
    /// The caller's arguments are wrong, a program that does not parse included.
    InvalidArgument,
    /// It took too long.
    DeadlineExceeded,
    /// Something named does not exist.
    NotFound,
    /// Something to be made exists already.
    AlreadyExists,
    /// The caller may not do this.
    PermissionDenied,
    /// Memory or another resource ran out.
    ResourceExhausted,
    /// The state does not allow it.
    FailedPrecondition,
    /// The work was given up.
    Aborted,
    /// Beyond a valid range.
    OutOfRange,
    /// The plugin does not implement it.
    Unimplemented,
    /// A fault inside the plugin.
    Internal,
    /// The device cannot be reached now.
    Unavailable,
    /// Data are lost or corrupted.
    DataLoss,
    /// The caller is not known.
    Unauthenticated,
}

impl Code {
    pub(crate) fn from_raw(code: i32) -> Self {
        match code {
            1 => Self::Cancelled,
            3 => Self::InvalidArgument,
            4 => Self::DeadlineExceeded,
            5 => Self::NotFound,
            6 => Self::AlreadyExists,
            7 => Self::PermissionDenied,
            8 => Self::ResourceExhausted,
            9 => Self::FailedPrecondition,
            10 => Self::Aborted,
            11 => Self::OutOfRange,
            12 => Self::Unimplemented,
            13 => Self::Internal,
            14 => Self::Unavailable,
            15 => Self::DataLoss,
            16 => Self::Unauthenticated,
            _ => Self::Unknown,
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cancelled => "cancelled",
            Self::Unknown => "unknown",
            Self::InvalidArgument => "invalid argument",
            Self::DeadlineExceeded => "deadline exceeded",
            Self::NotFound => "not found",
            Self::AlreadyExists => "already exists",
            Self::PermissionDenied => "permission denied",
            Self::ResourceExhausted => "resource exhausted",
            Self::FailedPrecondition => "failed precondition",
            Self::Aborted => "aborted",
            Self::OutOfRange => "out of range",
            Self::Unimplemented => "unimplemented",
            Self::Internal => "internal",
            Self::Unavailable => "unavailable",
            Self::DataLoss => "data loss",
            Self::Unauthenticated => "unauthenticated",
        })
    }
}
