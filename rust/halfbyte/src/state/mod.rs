//! A quantized weight with all that is needed to decode it, and its form in a safetensors checkpoint.
//!
//! The checkpoint form is that of bitsandbytes: beside the packed weight `W` stand
//!
//! | key                                  | dtype, shape                                   | there            |
//! |--------------------------------------|------------------------------------------------|------------------|
//! | `W`                                  | any whole-byte dtype, `[packed bytes / size, 1]` | always         |
//! | `W.absmax`                           | F32 `[blocks]`; U8 `[blocks]` when nested      | always           |
//! | `W.quant_map`                        | F32 `[16]`                                     | always           |
//! | `W.nested_absmax`                    | F32 `[ceil(blocks / nested block)]`            | nested           |
//! | `W.nested_quant_map`                 | F32 `[256]`                                    | nested           |
//! | `W.quant_state.bitsandbytes__nf4`, `…__fp4` | U8, the text of a JSON object           | always           |
//!
//! ```
//! use halfbyte::{Kind, QuantState, four_bit::Spec};
//!
//! let weights: Vec<f32> = (0..640).map(|i| (i as f32).sin()).collect();
//! let state = QuantState::quantize(&weights, &[10, 64], Spec { kind: Kind::Nf4, block: 64, double_quant: true })?;
//! let file = safetensors::serialize(state.to_tensors("layer.weight")?, None).unwrap();
//!
//! let file = safetensors::SafeTensors::deserialize(&file).unwrap();
//! let again = QuantState::from_safetensors(&file, "layer.weight")?;
//! assert_eq!(state, again);
//! assert_eq!(again.dequantize::<f32>()?.len(), 640);
//! # Ok::<(), halfbyte::Error>(())
//! ```

mod json;
mod read;
mod write;

pub(crate) use json::Header;
pub use read::quantized_weights;
pub(crate) use read::{JSON_KEY, SIDECARS};
pub(crate) use write::Outline;
pub use write::StateTensor;

use crate::codebook::{Kind, Map, dynamic_map};
use crate::element::{Dtype, Element};
use crate::error::{Error, Result};
use crate::four_bit::{self, OwnedAbsmax, Quantized, Spec};
use crate::layout::{self, Absmax, NESTED_BLOCK, Nested};

/// A 4-bit weight: packed codes, scales, and what they were made from.
///
/// The fields may be set freely; whoever reads them ([`QuantState::dequantize`], [`QuantState::to_tensors`]) checks first
/// that they fit together.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantState {
    /// Which 4-bit code.
    pub kind: Kind,
    /// Weights to a scale.
    pub block: usize,
    /// Element type of the weight before quantization, and the natural one to decode to.
    pub dtype: Dtype,
    /// Shape of the weight before quantization.
    pub shape: Vec<usize>,
    /// One scale a block.
    pub scales: Scales,
    /// Two codes a byte, the even element in the high nibble; `layout::packed_len(numel)` bytes.
    pub packed: Vec<u8>,
    /// The dtype under which a checkpoint stores the packed bytes. The bytes are the same under each.
    pub storage: safetensors::Dtype,
}

/// Scales of a tensor's blocks, owned.
#[derive(Debug, Clone, PartialEq)]
pub enum Scales {
    /// One fp32 a block.
    Plain(Vec<f32>),
    /// Double quantization.
    Nested(NestedScales),
}

/// Scales that are themselves quantized to 8 bits: `map[codes[i]] * absmax[i / block] + offset`.
#[derive(Debug, Clone, PartialEq)]
pub struct NestedScales {
    /// One code a block of weights.
    pub codes: Vec<u8>,
    /// One scale for each `block` codes.
    pub absmax: Vec<f32>,
    /// What the codes stand for: the signed dynamic map, in the values that the file gives.
    pub map: Box<Map>,
    /// Added to each decoded scale.
    pub offset: f32,
    /// Codes to a nested scale: [`NESTED_BLOCK`] in every file known.
    pub block: usize,
}

impl Scales {
    /// The scales as the operations take them.
    pub fn view(&self) -> Absmax<'_> {
        match self {
            Self::Plain(absmax) => Absmax::Plain(absmax),
            Self::Nested(n) => Absmax::Nested(Nested {
                codes: &n.codes,
                absmax: &n.absmax,
                map: &n.map,
                offset: n.offset,
                block: n.block,
            }),
        }
    }
}

impl From<OwnedAbsmax> for Scales {
    fn from(absmax: OwnedAbsmax) -> Self {
        match absmax {
            OwnedAbsmax::Plain(absmax) => Self::Plain(absmax),
            OwnedAbsmax::Nested { codes, absmax, offset } => {
                let map = Box::new(*dynamic_map(true));
                Self::Nested(NestedScales { codes, absmax, map, offset, block: NESTED_BLOCK })
            }
        }
    }
}

impl QuantState {
    /// Quantizes a weight of the given shape.
    ///
    /// # Errors
    /// [`Error::Shape`] if `shape` does not have `weights.len()` elements, [`Error::Value`] for a block size that does not exist.
    pub fn quantize<T: Element>(weights: &[T], shape: &[usize], spec: Spec) -> Result<Self> {
        if numel(shape) != Some(weights.len()) {
            return Err(Error::shape("shape", format!("{} elements", weights.len()), format!("{shape:?}")));
        }
        let Quantized { packed, absmax, .. } = four_bit::quantize(weights, spec)?;
        Ok(Self {
            kind: spec.kind,
            block: spec.block,
            dtype: T::DTYPE,
            shape: shape.to_vec(),
            scales: absmax.into(),
            packed,
            storage: safetensors::Dtype::U8,
        })
    }

    /// The weights, row by row, each `value[code] * scale` in fp32 rounded once to `T` (which need not be [`QuantState::dtype`]).
    ///
    /// # Errors
    /// Those of [`QuantState::check`].
    pub fn dequantize<T: Element>(&self) -> Result<Vec<T>> {
        let n = self.check()?;
        let mut out = vec![T::default(); n]; // at most two for each packed byte there is
        four_bit::dequantize_into(&self.packed, self.scales.view(), self.kind, self.block, &mut out)?;
        Ok(out)
    }

    /// Whether the fields fit together; the number of weights if so.
    ///
    /// # Errors
    /// [`Error::Value`] or [`Error::Shape`] naming the field at fault.
    pub fn check(&self) -> Result<usize> {
        layout::check_four_bit_block(self.block)?;
        let n = numel(&self.shape)
            .ok_or_else(|| Error::value("shape", "at most usize::MAX elements", format!("{:?}", self.shape)))?;
        if self.packed.len() != layout::packed_len(n) {
            return Err(Error::shape(
                "packed",
                format!("[{}]", layout::packed_len(n)),
                format!("[{}]", self.packed.len()),
            ));
        }
        if !self.storage.bitsize().is_multiple_of(8) {
            return Err(Error::value("storage", "a dtype of whole bytes", format!("{:?}", self.storage)));
        }
        self.scales.view().check(layout::block_count(n, self.block))?;
        Ok(n)
    }
}

/// Elements of a tensor of this shape; `None` beyond `usize`.
fn numel(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
}
