//! Driver errors to ours.

use cudarc::driver::result::DriverError;

use crate::error::{Error, Result};

/// Names the driver function that failed.
pub(super) trait Named<T> {
    fn named(self, call: &'static str) -> Result<T>;
}

impl<T> Named<T> for std::result::Result<T, DriverError> {
    fn named(self, call: &'static str) -> Result<T> {
        self.map_err(|error| {
            let text = |found: std::result::Result<&std::ffi::CStr, _>| {
                found.map_or_else(|_: DriverError| "unknown".to_owned(), |s| s.to_string_lossy().into_owned())
            };
            Error::Cuda { call, message: format!("{} ({})", text(error.error_name()), text(error.error_string())) }
        })
    }
}
