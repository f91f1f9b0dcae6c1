//! Checkpoints from float to quantized and back, without the model's class and without the memory for it.
//!
//! A safetensors checkpoint (one file, or a folder with one or with shards) is converted weight by weight: one is in memory at a
//! time. Which tensors are weights of linear layers is told by their names and shapes ([`Why`] says what is not). The result is
//! what transformers writes with bitsandbytes, `config.json` and index included, and loads there and in vLLM.
//!
//! ```
//! use halfbyte::checkpoint::{Conversion, DequantizeOptions, QuantizeOptions, inspect};
//! # use safetensors::{Dtype, tensor::TensorView};
//! # let folder = std::env::temp_dir().join(format!("halfbyte-doc-{}", std::process::id()));
//! # std::fs::create_dir_all(folder.join("model"))?;
//! # let weights: Vec<u8> = (0..64 * 128).flat_map(|i| (i as f32).sin().to_le_bytes()).collect();
//! # let view = TensorView::new(Dtype::F32, vec![64, 128], &weights)?;
//! # std::fs::write(folder.join("model/model.safetensors"), safetensors::serialize([("a.q_proj.weight", view)], None)?)?;
//! let options = QuantizeOptions { shard_size: 2 << 30, ..QuantizeOptions::default() };
//! let mut conversion = Conversion::quantize(&folder.join("model"), &folder.join("quantized"), &options)?;
//! conversion.run(|done, items| eprintln!("{done} of {}", items.len()))?;
//!
//! let weights = inspect(&folder.join("quantized"))?;
//! assert_eq!((&weights[0].name[..], &weights[0].scheme[..]), ("a.q_proj.weight", "nf4"));
//! let back = folder.join("back");
//! Conversion::dequantize(&folder.join("quantized"), &back, &DequantizeOptions::default())?.run(|_, _| ())?;
//! # std::fs::remove_dir_all(folder)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! **Interruptions.** Every file of the result appears under its name when it is whole and on disk, `config.json` last. Until
//! then the folder has a `.halfbyte` with a journal in it, and [`Existing::Resume`] goes on behind the last whole file; the
//! result has the same bytes as without the interruption.
//!
//! **Untrusted input.** Headers, indices and states are checked against the files before anything is allocated or written by
//! what they say; nothing is ever written outside the folder given.

mod config;
mod convert;
mod files;
mod header;
mod inspect;
mod names;
mod plan;
mod source;
mod weight;

use std::path::Path;

pub use convert::{Conversion, Part, Summary};
pub use inspect::{Weight, inspect};
pub use names::Why;
pub use plan::{Action, Item};
pub use source::{Source, Tensor};

use crate::element::Dtype;
use crate::error::Error;
use crate::four_bit::Spec;

/// What weights are quantized to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// NF4 or FP4.
    FourBit(Spec),
    /// Rows of int8, as LLM.int8() stores them.
    Int8,
}

impl Default for Scheme {
    /// NF4 in blocks of 64 with plain scales.
    fn default() -> Self {
        Self::FourBit(Spec::default())
    }
}

/// What to do where the folder to write to exists and has something in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Existing {
    /// That is an error.
    #[default]
    Refuse,
    /// Go on with the same conversion where it was interrupted, or begin it in an empty folder.
    Resume,
    /// Replace the checkpoint in it. Other files stay.
    Overwrite,
}

/// How to quantize a checkpoint.
pub struct QuantizeOptions<'a> {
    /// To what.
    pub scheme: Scheme,
    /// Whether scales are chosen by least squared error ([`crate::four_bit::quantize_search`]).
    pub scale_search: bool,
    /// The dtype that packed bytes are stored under: U8, I8, F16, BF16 or F32.
    pub storage: safetensors::Dtype,
    /// A dtype that every float has before it is quantized or kept. Without it each stays as it is.
    pub dtype: Option<Dtype>,
    /// What `config.json` has readers compute in. Without it the dtype that most weights are quantized from.
    pub compute_dtype: Option<Dtype>,
    /// Which modules (`model.layers.0.self_attn.q_proj`) stay whole, beside those that do anyway.
    pub skip: &'a dyn Fn(&str) -> bool,
    /// Whether stacked experts (3-D parameters) are quantized to 4 bits as well, which transformers with bitsandbytes does not read.
    pub stacked_experts: bool,
    /// Bytes that a file of the result has at most, unless a single weight has more.
    pub shard_size: u64,
    /// What to do where there is something already.
    pub existing: Existing,
    /// Who computes, if not this crate: a result is only resumed by the one that began it.
    pub device: &'a str,
}

impl Default for QuantizeOptions<'_> {
    fn default() -> Self {
        Self {
            scheme: Scheme::default(),
            scale_search: false,
            storage: safetensors::Dtype::U8,
            dtype: None,
            compute_dtype: None,
            skip: &|_| false,
            stacked_experts: false,
            shard_size: DEFAULT_SHARD,
            existing: Existing::Refuse,
            device: "cpu",
        }
    }
}

/// How to decode a quantized checkpoint.
#[derive(Debug, Clone)]
pub struct DequantizeOptions {
    /// The dtype that every float of the result has. Without it weights get the one that they were quantized from, and others stay
    /// as they are.
    pub dtype: Option<Dtype>,
    /// Bytes that a file of the result has at most.
    pub shard_size: u64,
    /// What to do where there is something already.
    pub existing: Existing,
}

impl Default for DequantizeOptions {
    fn default() -> Self {
        Self { dtype: None, shard_size: DEFAULT_SHARD, existing: Existing::Refuse }
    }
}

/// What transformers takes as well.
const DEFAULT_SHARD: u64 = 5_000_000_000;

/// The name that torch has for a dtype which packed bytes may be stored under.
fn storage_name(storage: safetensors::Dtype) -> Option<&'static str> {
    use safetensors::Dtype as Stored;
    match storage {
        Stored::U8 => Some("uint8"),
        Stored::I8 => Some("int8"),
        other => plan::float(other).map(Dtype::name),
    }
}

fn path_text(path: &Path) -> String {
    path.display().to_string()
}

fn file_error(action: &'static str, path: impl ToString, error: &std::io::Error) -> Error {
    Error::file(action, path, error)
}
