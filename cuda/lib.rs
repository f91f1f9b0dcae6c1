//! The CUDA kernels of halfbyte, as PTX text that the driver compiles when it loads it.
//!
//! `build.py` writes the PTX and `ptx/manifest.toml`; nothing is compiled when this crate is. Sources are in `src/`.

/// One PTX image: a family of kernels for one virtual architecture.
#[derive(Debug)]
pub struct Image {
    /// Kernels that belong together, named after their source.
    pub family: &'static str,
    /// Virtual architecture times ten: 80 for `compute_80`.
    pub capability: u32,
    /// Whether it runs on exactly that capability (`compute_90a`) and on no newer one.
    pub specific: bool,
    /// Lowest PTX version that it needs, which decides the oldest driver that loads it.
    pub ptx_version: &'static str,
    /// PTX text, ending in NUL.
    pub ptx: &'static str,
}

include!("ptx/images.rs");
