//! To a checkpoint: the keys, the dtypes and the bytes that bitsandbytes writes.

use std::borrow::Cow;

use safetensors::{Dtype as Stored, View};

use super::json::{Header, NestedHeader};
use super::read::JSON_KEY;
use super::{QuantState, Scales};
use crate::element::Dtype;
use crate::error::Result;
use crate::four_bit::Spec;
use crate::layout::{NESTED_BLOCK, block_count, packed_len};

/// One tensor of a checkpoint: give it to `safetensors::serialize`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateTensor<'a> {
    dtype: Stored,
    shape: Vec<usize>,
    data: Cow<'a, [u8]>,
}

impl View for StateTensor<'_> {
    fn dtype(&self) -> Stored {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

impl QuantState {
    /// The weight as tensors of a checkpoint, with their names; `prefix` is that of the weight itself.
    ///
    /// Where the packed bytes do not fill the last element of [`QuantState::storage`], zeros follow them.
    ///
    /// # Errors
    /// Those of [`QuantState::check`].
    pub fn to_tensors(&self, prefix: &str) -> Result<Vec<(String, StateTensor<'_>)>> {
        self.check()?;
        let mut tensors = vec![(prefix.to_owned(), self.packed_tensor())];
        // Both zeros of FP4 are stored as +0.
        let quant_map = self.kind.values().map(|value| value + 0.0);
        let mut add = |name: &str, tensor| tensors.push((format!("{prefix}.{name}"), tensor));
        let nested = match &self.scales {
            Scales::Plain(absmax) => {
                add("absmax", fp32(absmax));
                add("quant_map", fp32(&quant_map));
                None
            }
            Scales::Nested(nested) => {
                add("absmax", bytes(Cow::Borrowed(&nested.codes)));
                add("quant_map", fp32(&quant_map));
                add("nested_absmax", fp32(&nested.absmax));
                add("nested_quant_map", fp32(&nested.map[..]));
                Some(NestedHeader { block: nested.block, offset: nested.offset })
            }
        };
        let Self { kind, block, dtype, .. } = *self;
        let header = Header { kind, block, dtype, shape: self.shape.clone(), nested };
        add(&format!("{JSON_KEY}{}", kind.name()), bytes(Cow::Owned(header.to_text().into_bytes())));
        Ok(tensors)
    }

    fn packed_tensor(&self) -> StateTensor<'_> {
        let size = self.storage.bitsize() / 8;
        let mut data = Cow::Borrowed(&self.packed[..]);
        if data.len() % size != 0 {
            let padded = data.len().next_multiple_of(size);
            data.to_mut().resize(padded, 0);
        }
        StateTensor { dtype: self.storage, shape: vec![data.len() / size, 1], data }
    }
}

/// What [`QuantState::to_tensors`] gives for a weight that is not quantized yet.
pub(crate) struct Outline<'a> {
    pub(crate) spec: Spec,
    pub(crate) storage: Stored,
    pub(crate) dtype: Dtype,
    pub(crate) shape: &'a [usize],
}

impl Outline<'_> {
    /// Name after that of the weight and a dot (of the packed bytes: nothing), dtype, shape, and whether it is the JSON text, whose
    /// size is known only when the weight is quantized; the shape is then the largest that it can have.
    pub(crate) fn tensors(&self) -> Vec<(String, Stored, Vec<usize>, bool)> {
        /// A float of fp32 has fewer characters in Python.
        const LONGEST_FLOAT: usize = 25;
        let Spec { kind, block, double_quant } = self.spec;
        let n: usize = self.shape.iter().product();
        let blocks = block_count(n, block);
        let absmax = if double_quant { Stored::U8 } else { Stored::F32 };
        let packed = packed_len(n).div_ceil(self.storage.bitsize() / 8);
        let mut tensors = vec![
            (String::new(), self.storage, vec![packed, 1], false),
            ("absmax".into(), absmax, vec![blocks], false),
            ("quant_map".into(), Stored::F32, vec![16], false),
        ];
        let mut nested = None;
        if double_quant {
            tensors.push(("nested_absmax".into(), Stored::F32, vec![block_count(blocks, NESTED_BLOCK)], false));
            tensors.push(("nested_quant_map".into(), Stored::F32, vec![256], false));
            nested = Some(NestedHeader { block: NESTED_BLOCK, offset: 0.0 });
        }
        let header = Header { kind, block, dtype: self.dtype, shape: self.shape.to_vec(), nested };
        let text = header.to_text().len() + if double_quant { LONGEST_FLOAT } else { 0 };
        tensors.push((format!("{JSON_KEY}{}", kind.name()), Stored::U8, vec![text], true));
        tensors
    }
}

fn fp32(values: &[f32]) -> StateTensor<'static> {
    let data = values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    StateTensor { dtype: Stored::F32, shape: vec![values.len()], data: data.into() }
}

fn bytes(data: Cow<'_, [u8]>) -> StateTensor<'_> {
    StateTensor { dtype: Stored::U8, shape: vec![data.len()], data }
}
