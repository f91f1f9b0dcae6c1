//! 4-bit and 8-bit quantization of weights, and computing with them.
//!
//! NF4 and FP4 with double quantization, blockwise 8-bit, LLM.int8(), on the CPU (AVX2 and AVX-512 chosen at run time) and on CUDA
//! (feature `cuda`; the driver is found at run time). Bytes are those of bitsandbytes. No Python and no torch here.

pub mod checkpoint;
pub mod codebook;
pub mod device;
pub mod eight_bit;
mod element;
mod error;
pub mod four_bit;
pub mod int8;
pub mod layout;
pub mod optim;
pub mod state;

pub use codebook::Kind;
pub use element::{Dtype, Element};
pub use error::{Error, Result};
pub use half::{bf16, f16};
pub use state::QuantState;
