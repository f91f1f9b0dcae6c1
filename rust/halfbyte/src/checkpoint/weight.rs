//! One weight: from floats to what a checkpoint holds of it, and back.

use std::collections::{HashMap, HashSet};

use half::f16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype as Stored, View};

use super::header::brief;
use super::plan::float;
use super::source::{Source, Tensor};
use super::{QuantizeOptions, Scheme};
use crate::codebook::Kind;
use crate::element::{Dtype, Element};
use crate::error::{Error, Result};
use crate::four_bit;
use crate::int8;
use crate::layout::packed_len;
use crate::state::{Header, JSON_KEY, QuantState, SIDECARS};
use crate::with_type;

// Tensors of a file are little-endian, and taken as they lie.
const _: () = assert!(cfg!(target_endian = "little"));

/// Weights of int8 rows that are converted at a time: less than a whole tensor, which need not be in memory twice.
const PIECE: usize = 1 << 22;

/// Bytes that are aligned for every element type, to be read into once and again.
#[derive(Default)]
pub(super) struct Buffer {
    words: Vec<u64>,
    len: usize,
}

impl Buffer {
    /// Its first `len` bytes, to be filled.
    pub(super) fn bytes_mut(&mut self, len: usize) -> &mut [u8] {
        self.len = len;
        let words = len.div_ceil(8);
        if self.words.len() < words {
            // Not grown in place: what is in it need not be kept, and would be copied.
            self.words = Vec::new();
            self.words = vec![0; words];
        }
        // SAFETY: the words are that many bytes at least, and any byte may be written to one.
        unsafe { std::slice::from_raw_parts_mut(self.words.as_mut_ptr().cast(), len) }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: as above; every byte of a word is initialized.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), self.len) }
    }

    /// The same as elements.
    pub(super) fn elements<T: Element>(&self) -> &[T] {
        let count = self.len / size_of::<T>();
        // SAFETY: the words are aligned to 8 bytes and at least that many elements; `Element` is sealed, and each of its types takes
        // any bits.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), count) }
    }
}

/// Elements as the bytes that a file holds.
pub(super) fn bytes_of<T: Element>(elements: &[T]) -> &[u8] {
    // SAFETY: the types of `Element` have no padding, and bytes may be read of anything.
    unsafe { std::slice::from_raw_parts(elements.as_ptr().cast(), size_of_val(elements)) }
}

pub(super) fn cast<A: Element, B: Element>(from: &[A]) -> Vec<B> {
    from.iter().map(|v| B::from_f32(v.to_f32())).collect()
}

/// Rows for columns: `[rows, columns]` becomes `[columns, rows]`, in tiles that stay in the cache.
pub(super) fn transpose<T: Element>(from: &[T], rows: usize, columns: usize) -> Vec<T> {
    const TILE: usize = 32;
    let mut to = vec![T::default(); from.len()];
    for top in (0..rows).step_by(TILE) {
        for left in (0..columns).step_by(TILE) {
            for row in top..rows.min(top + TILE) {
                for column in left..columns.min(left + TILE) {
                    to[column * rows + row] = from[row * columns + column];
                }
            }
        }
    }
    to
}

/// What an int8 weight of this shape has in a file, as [`crate::state::Outline::tensors`] gives it.
pub(super) fn int8_outline(shape: &[usize]) -> Vec<(String, Stored, Vec<usize>, bool)> {
    vec![
        (String::new(), Stored::I8, shape.to_vec(), false),
        ("SCB".into(), Stored::F32, vec![shape[0]], false),
        ("weight_format".into(), Stored::U8, Vec::new(), false),
    ]
}

/// Quantizes a weight. `put` gets the bytes of each tensor with its number in the outline.
pub(super) fn encode<T: Element>(
    weights: &[T],
    shape: &[usize],
    options: &Encoding,
    offset: &dyn Fn(&[f32]) -> f32,
    mut put: impl FnMut(usize, &[u8]) -> Result<()>,
) -> Result<()> {
    match options.scheme {
        Scheme::FourBit(spec) => {
            let quantized = four_bit::quantize_with(weights, spec, options.scale_search, offset)?;
            let state = QuantState {
                kind: spec.kind,
                block: spec.block,
                dtype: T::DTYPE,
                shape: shape.to_vec(),
                scales: quantized.absmax.into(),
                packed: quantized.packed,
                storage: options.storage,
            };
            // The name is not used: entries come in their order.
            let tensors = state.to_tensors("")?;
            tensors.iter().enumerate().try_for_each(|(i, (_, tensor))| put(i, &tensor.data()))
        }
        Scheme::Int8 => {
            let (rows, columns) = (shape[0], shape[1]);
            let mut scales = vec![0.0; rows];
            let at_once = (PIECE / columns).max(1);
            for (weights, scales) in weights.chunks(at_once * columns).zip(scales.chunks_mut(at_once)) {
                // Through fp16, as bitsandbytes does.
                let mut codes = vec![0; weights.len()];
                int8::quantize_rows_into(&cast::<T, f16>(weights), columns, 0.0, &mut codes, scales, None)?;
                put(0, &codes.into_iter().map(|q| q as u8).collect::<Vec<u8>>())?;
            }
            put(1, bytes_of(&scales))?;
            put(2, &[0])
        }
    }
}

/// How weights are encoded: what of the options counts while a conversion runs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Encoding {
    scheme: Scheme,
    scale_search: bool,
    storage: Stored,
}

impl Encoding {
    pub(super) fn new(options: &QuantizeOptions<'_>) -> Self {
        Self { scheme: options.scheme, scale_search: options.scale_search, storage: options.storage }
    }
}

/// A quantized weight of a checkpoint.
#[derive(Debug, Clone)]
pub(super) struct Found {
    /// Its 4-bit kind, block size and whether its scales are nested; none of int8.
    pub(super) four_bit: Option<(Kind, usize, bool)>,
    /// Shape and dtype before quantization. int8 does not tell its dtype.
    pub(super) shape: Vec<usize>,
    pub(super) dtype: Option<Dtype>,
    /// Its tensors, the weight first.
    pub(super) parts: Vec<Tensor>,
}

impl Found {
    pub(super) fn elements(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product()
    }
}

/// The quantized weights of a checkpoint.
pub(super) struct Weights {
    by_name: HashMap<String, Found>,
    parts: HashSet<String>,
}

impl Weights {
    pub(super) fn get(&self, name: &str) -> Option<&Found> {
        self.by_name.get(name)
    }

    /// Whether a tensor is a statistic of a weight.
    pub(super) fn is_part(&self, name: &str) -> bool {
        self.parts.contains(name)
    }
}

/// Finds the quantized weights: those that have a state, or scales of int8 rows beside them.
///
/// # Errors
/// [`Error::Checkpoint`] if the parts of one do not fit together by name, dtype and size.
pub(super) fn find(source: &Source) -> Result<Weights> {
    let mut weights = Weights { by_name: HashMap::new(), parts: HashSet::new() };
    for tensor in source.tensors() {
        let found = if let Some((prefix, kind)) = tensor.name.rsplit_once(JSON_KEY) {
            let Some(name) = prefix.strip_suffix('.') else { continue };
            Some((name, four_bit_weight(source, name, kind, tensor)?))
        } else if let Some(module) = tensor.name.strip_suffix(".SCB") {
            int8_weight(source, module, tensor)?
        } else {
            None
        };
        let Some((name, found)) = found else { continue };
        weights.parts.extend(found.parts[1..].iter().map(|t| t.name.clone()));
        if weights.by_name.insert(found.parts[0].name.clone(), found).is_some() {
            return Err(Error::checkpoint(brief(name), "one quantization state", "two of them"));
        }
    }
    // Statistics without what says how to read them: a file is missing.
    for tensor in source.tensors().iter().filter(|t| !weights.is_part(&t.name)) {
        for part in SIDECARS {
            let weight = tensor.name.strip_suffix(part).and_then(|name| name.strip_suffix('.'));
            if let Some(weight) = weight.filter(|weight| source.get(weight).is_some()) {
                let expected = format!("`{}.{JSON_KEY}nf4` or `…fp4` beside it", brief(weight));
                return Err(Error::checkpoint(brief(&tensor.name), expected, "no such tensor"));
            }
        }
    }
    Ok(weights)
}

fn four_bit_weight(source: &Source, name: &str, kind: &str, state: &Tensor) -> Result<Found> {
    /// What a state may have of text: `QuantState` writes some 200 bytes.
    const MOST: u64 = 1 << 16;
    let key = brief(&state.name);
    let wrong = |expected: &str, got: String| Error::checkpoint(&key, expected, got);
    if state.dtype != Stored::U8 || state.shape.len() != 1 || state.bytes > MOST {
        return Err(wrong("U8 [_]", format!("{:?} of {} bytes", state.dtype, state.bytes)));
    }
    let header = Header::parse(&source.read_all(state)?, &key)?;
    if header.kind.name() != kind {
        return Err(wrong(&format!("`quant_type` to be {}", brief(kind)), header.kind.name().into()));
    }
    let n = header.shape.iter().product();
    let packed =
        source.get(name).ok_or_else(|| Error::checkpoint(brief(name), "the packed weight", "no such tensor"))?;
    let bits = packed.dtype.bitsize();
    if bits % 8 != 0 || packed.bytes != packed_len(n).next_multiple_of(bits / 8) as u64 {
        let expected = format!("{} bytes, as `{key}` says", packed_len(n));
        return Err(Error::checkpoint(brief(name), expected, format!("{} bytes", packed.bytes)));
    }
    let mut parts = vec![packed.clone()];
    parts.extend(SIDECARS.iter().filter_map(|part| source.get(&format!("{name}.{part}")).cloned()));
    parts.push(state.clone());
    Ok(Found {
        four_bit: Some((header.kind, header.block, header.nested.is_some())),
        shape: header.shape,
        dtype: Some(header.dtype),
        parts,
    })
}

fn int8_weight<'a>(source: &Source, module: &'a str, scales: &Tensor) -> Result<Option<(&'a str, Found)>> {
    let Some(weight) = source.get(&format!("{module}.weight")).filter(|t| t.dtype == Stored::I8) else {
        return Ok(None);
    };
    if weight.shape.len() != 2 || scales.dtype != Stored::F32 || scales.shape != [weight.shape[0]] {
        let expected = format!(
            "F32 scales for the rows of `{}.weight`, {:?}",
            brief(module),
            &weight.shape[..weight.shape.len().min(2)]
        );
        return Err(Error::checkpoint(
            brief(&scales.name),
            expected,
            format!("{:?} of {} bytes", scales.dtype, scales.bytes),
        ));
    }
    let mut parts = vec![weight.clone(), scales.clone()];
    if let Some(format) = source.get(&format!("{module}.weight_format")) {
        let row_by_row = format.dtype == Stored::U8 && format.bytes == 1 && source.read_all(format)? == [0];
        if !row_by_row {
            return Err(Error::checkpoint(brief(&format.name), "0, for rows", "another layout"));
        }
        parts.push(format.clone());
    }
    Ok(Some((module, Found { four_bit: None, shape: weight.shape.clone(), dtype: None, parts })))
}

/// Decodes the weight with these parts.
pub(super) fn decode<T: Element>(source: &Source, parts: &[Tensor], shape: &[usize], is_int8: bool) -> Result<Vec<T>> {
    let data = parts.iter().map(|tensor| source.read_all(tensor)).collect::<Result<Vec<_>>>()?;
    if is_int8 {
        let mut out = vec![T::default(); data[0].len()];
        let scales: Vec<f32> = data[1].as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        let columns = shape[1].max(1);
        let at_once = (PIECE / columns).max(1);
        let pieces =
            data[0].chunks(at_once * columns).zip(scales.chunks(at_once)).zip(out.chunks_mut(at_once * columns));
        for ((codes, scales), out) in pieces {
            let codes: Vec<i8> = codes.iter().map(|&q| q as i8).collect();
            int8::dequantize_into(&codes, columns, scales, out)?;
        }
        return Ok(out);
    }
    let name = &parts[0].name;
    let views = parts.iter().zip(&data).map(|(tensor, data)| {
        let part = tensor.name[name.len()..].trim_start_matches('.').to_owned();
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), data);
        view.map(|view| (part, view)).map_err(|e| Error::checkpoint(brief(&tensor.name), "a tensor", e))
    });
    let state = QuantState::from_parts(&brief(name), views.collect::<Result<Vec<_>>>()?)?;
    drop(data);
    state.dequantize()
}

/// Bytes of floats in another dtype.
pub(super) fn cast_bytes(from: Stored, to: Dtype, buffer: &Buffer) -> Vec<u8> {
    let from = float(from).expect("only floats are cast");
    with_type!(from, A => with_type!(to, B => bytes_of(&cast::<A, B>(buffer.elements())).to_vec()))
}
