//! What a checkpoint holds.

use std::path::Path;

use super::plan::float;
use super::source::Source;
use super::weight::{self, Found};
use crate::element::Dtype;
use crate::error::Result;

/// A tensor of a checkpoint, or a quantized weight with its statistics.
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    /// Its name.
    pub name: String,
    /// `nf4`, `fp4`, `int8`, or the dtype of a tensor that is not quantized: `bfloat16`, or as safetensors calls it.
    pub scheme: String,
    /// Weights to a scale; of int8 the length of a row. `None` for what is not quantized.
    pub block: Option<usize>,
    /// Whether its scales are quantized as well.
    pub double_quant: bool,
    /// Shape and dtype before quantization. int8 does not tell its dtype.
    pub shape: Vec<usize>,
    /// See `shape`.
    pub dtype: Option<Dtype>,
    /// Number of weights.
    pub elements: u64,
    /// Bytes with all statistics.
    pub bytes: u64,
}

impl Weight {
    /// Whether it is quantized.
    pub fn is_quantized(&self) -> bool {
        self.block.is_some()
    }

    fn quantized(name: &str, found: &Found) -> Self {
        let (scheme, block, double_quant) = match found.four_bit {
            Some((kind, block, nested)) => (kind.name(), block, nested),
            None => ("int8", found.shape[1], false),
        };
        Self {
            name: name.to_owned(),
            scheme: scheme.to_owned(),
            block: Some(block),
            double_quant,
            shape: found.shape.clone(),
            dtype: found.dtype,
            elements: found.elements(),
            bytes: found.parts.iter().map(|t| t.bytes).sum(),
        }
    }
}

/// What the checkpoint at `path`, a file or a folder, holds: weights in the order of their files.
///
/// # Errors
/// Those of [`Source::open`], and [`crate::Error::Checkpoint`] for a quantized weight whose parts do not fit together.
pub fn inspect(path: &Path) -> Result<Vec<Weight>> {
    let source = Source::open(path)?;
    let found = weight::find(&source)?;
    let weights = source.tensors().iter().filter(|t| !found.is_part(&t.name)).map(|tensor| {
        found.get(&tensor.name).map_or_else(
            || Weight {
                name: tensor.name.clone(),
                scheme: float(tensor.dtype).map_or_else(|| tensor.dtype.to_string(), |d| d.name().to_owned()),
                block: None,
                double_quant: false,
                shape: tensor.shape.clone(),
                dtype: float(tensor.dtype),
                elements: tensor.elements(),
                bytes: tensor.bytes,
            },
            |found| Weight::quantized(&tensor.name, found),
        )
    });
    Ok(weights.collect())
}
