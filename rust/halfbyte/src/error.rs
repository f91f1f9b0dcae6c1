//! The one error type of the crate.

/// What can go wrong. Every variant names the argument (or the checkpoint key), what it got and what it wants, and is
/// returned before anything is written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value outside its domain: a block size that does not exist, an unknown quantization type.
    #[error("{argument}: expected {expected}, got {got}")]
    Value {
        /// Name of the argument as the caller knows it.
        argument: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What was passed.
        got: String,
    },
    /// A tensor of the wrong element type.
    #[error("{argument}: expected dtype {expected}, got {got}")]
    Dtype {
        /// Name of the argument as the caller knows it.
        argument: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What was passed.
        got: String,
    },
    /// Lengths or shapes that do not fit together.
    #[error("{argument}: expected shape {expected}, got {got}")]
    Shape {
        /// Name of the argument as the caller knows it.
        argument: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What was passed.
        got: String,
    },
    /// Tensors of one call on different devices, or on one that cannot do it.
    #[error("{argument}: expected device {expected}, got {got}")]
    Device {
        /// Name of the argument as the caller knows it.
        argument: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What was passed.
        got: String,
    },
    /// A checkpoint that is truncated, contradicts itself or is not one of ours.
    #[error("checkpoint entry `{key}`: expected {expected}, got {got}")]
    Checkpoint {
        /// The tensor or JSON key at fault.
        key: String,
        /// What the format asks for.
        expected: String,
        /// What the file has.
        got: String,
    },
    /// A file or folder that cannot be read, written or begun.
    #[error("cannot {action} `{path}`: {message}")]
    File {
        /// What was tried: `read`, `write`, and so on.
        action: &'static str,
        /// Which file or folder.
        path: String,
        /// What the system says, or what stands in the way.
        message: String,
    },
    /// CUDA was asked for where there is no driver, no GPU, or no CUDA support in this build.
    #[error("CUDA is not available: {reason}")]
    CudaUnavailable {
        /// Why, and what would help.
        reason: String,
    },
    /// A GPU that none of the kernel images serves, or a driver too old for them.
    #[error("no kernel image for this GPU: {reason}")]
    UnsupportedGpu {
        /// The compute capability or driver version found and what is needed.
        reason: String,
    },
    /// A CUDA driver call failed.
    #[error("{call} failed: {message}")]
    Cuda {
        /// The driver function.
        call: &'static str,
        /// The driver's name and text of the error.
        message: String,
    },
}

/// Shorthand used through the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

#[expect(clippy::needless_pass_by_value, reason = "callers pass what they have: text, numbers, format!()")]
impl Error {
    pub(crate) fn value(argument: &'static str, expected: impl ToString, got: impl ToString) -> Self {
        Self::Value { argument, expected: expected.to_string(), got: got.to_string() }
    }

    pub(crate) fn shape(argument: &'static str, expected: impl ToString, got: impl ToString) -> Self {
        Self::Shape { argument, expected: expected.to_string(), got: got.to_string() }
    }

    pub(crate) fn file(action: &'static str, path: impl ToString, message: impl ToString) -> Self {
        Self::File { action, path: path.to_string(), message: message.to_string() }
    }

    pub(crate) fn checkpoint(key: impl ToString, expected: impl ToString, got: impl ToString) -> Self {
        Self::Checkpoint { key: key.to_string(), expected: expected.to_string(), got: got.to_string() }
    }
}
