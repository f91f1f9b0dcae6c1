//! NF4 and FP4: quantize, dequantize, multiply. The format is described in [`crate::layout`].

#[cfg(feature = "cuda")]
pub mod cuda;

pub mod cpu;
#[cfg(target_arch = "x86_64")]
pub(crate) mod cpu_avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod cpu_avx512;
pub(crate) mod cpu_lanes;
mod cpu_matmul;
mod cpu_scales;
pub mod reference;
pub mod search;
#[cfg(target_arch = "x86_64")]
mod search_avx2;

pub use search::{quantize_search, quantize_search_into};

use crate::codebook::{Kind, Map, dynamic_map};
use crate::device;
use crate::eight_bit::{self, Rounding};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::layout::{Absmax, NESTED_BLOCK, Nested, block_count, check_four_bit_block, packed_len};

/// How to quantize.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Spec {
    /// The code.
    pub kind: Kind,
    /// Weights to a scale: one of [`crate::layout::FOUR_BIT_BLOCKS`].
    pub block: usize,
    /// Whether to quantize the scales as well.
    pub double_quant: bool,
}

impl Default for Spec {
    /// NF4 in blocks of 64 with plain scales.
    fn default() -> Self {
        Self { kind: Kind::Nf4, block: crate::layout::DEFAULT_BLOCK, double_quant: false }
    }
}

/// A quantized tensor on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    /// How it was quantized.
    pub spec: Spec,
    /// Number of weights.
    pub len: usize,
    /// Two codes a byte, `packed_len(len)` bytes.
    pub packed: Vec<u8>,
    /// The scales.
    pub absmax: OwnedAbsmax,
}

/// Scales of a tensor's blocks, owned. [`OwnedAbsmax::view`] lends them to the operations.
#[derive(Debug, Clone, PartialEq)]
pub enum OwnedAbsmax {
    /// One fp32 a block.
    Plain(Vec<f32>),
    /// Double quantization: with the signed dynamic map, in blocks of [`NESTED_BLOCK`].
    Nested {
        /// One code a block.
        codes: Vec<u8>,
        /// One scale for each [`NESTED_BLOCK`] codes.
        absmax: Vec<f32>,
        /// The mean of the scales.
        offset: f32,
    },
}

impl OwnedAbsmax {
    /// The scales as the operations take them.
    pub fn view(&self) -> Absmax<'_> {
        match self {
            Self::Plain(absmax) => Absmax::Plain(absmax),
            Self::Nested { codes, absmax, offset } => {
                Absmax::Nested(Nested { codes, absmax, map: nested_map(), offset: *offset, block: NESTED_BLOCK })
            }
        }
    }
}

fn nested_map() -> &'static Map {
    dynamic_map(true)
}

/// Quantizes weights.
///
/// ```
/// use halfbyte::four_bit::{self, Spec};
/// let weights = [0.5f32, -1.0, 0.0, 0.25];
/// let q = four_bit::quantize(&weights, Spec::default())?;
/// let mut again = [0f32; 4];
/// four_bit::dequantize_into(&q.packed, q.absmax.view(), q.spec.kind, q.spec.block, &mut again)?;
/// assert_eq!(again[1..3], [-1.0, 0.0]);
/// # Ok::<(), halfbyte::Error>(())
/// ```
pub fn quantize<T: Element>(a: &[T], spec: Spec) -> Result<Quantized> {
    quantize_with(a, spec, false, &mean)
}

/// [`quantize`], or [`quantize_search`] where `search` says so, with an `offset` of the scales for double quantization other than
/// [`mean`]: the mean that another library sums in another order has other last bits.
pub fn quantize_with<T: Element>(
    a: &[T],
    spec: Spec,
    search: bool,
    offset: &dyn Fn(&[f32]) -> f32,
) -> Result<Quantized> {
    check_four_bit_block(spec.block)?;
    let mut packed = vec![0; packed_len(a.len())];
    let mut plain = vec![0.0; block_count(a.len(), spec.block)];
    let quantize_into = if search { quantize_search_into } else { quantize_into };
    quantize_into(a, spec.kind, spec.block, &mut packed, &mut plain)?;
    let absmax = if spec.double_quant { nest(&plain, offset(&plain))? } else { OwnedAbsmax::Plain(plain) };
    if search && spec.double_quant {
        search::encode_into(a, absmax.view(), spec.kind, spec.block, &mut packed)?;
    }
    Ok(Quantized { spec, len: a.len(), packed, absmax })
}

/// The mean of scales, summed in fp64: what is subtracted from them in double quantization.
pub fn mean(scales: &[f32]) -> f32 {
    let sum: f64 = scales.iter().map(|&v| f64::from(v)).sum();
    (sum / scales.len().max(1) as f64) as f32
}

/// Quantizes scales, rounded as bitsandbytes does on the CPU so that its bytes come out.
fn nest(plain: &[f32], offset: f32) -> Result<OwnedAbsmax> {
    let mut codes = vec![0; plain.len()];
    let mut absmax = vec![0.0; block_count(plain.len(), NESTED_BLOCK)];
    eight_bit::quantize_into(plain, nested_map(), NESTED_BLOCK, offset, Rounding::Grid, &mut codes, &mut absmax)?;
    Ok(OwnedAbsmax::Nested { codes, absmax, offset })
}

/// Quantizes `a` into buffers of the caller: `packed` of at least `packed_len(a.len())` bytes (those beyond stay as they
/// are) and `absmax` of one scale a block.
///
/// A block with a NaN gets NaN as its scale and so decodes to NaN; one with an infinity decodes to infinities and NaN.
pub fn quantize_into<T: Element>(
    a: &[T],
    kind: Kind,
    block: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    cpu::quantize(device::cpu::level(), a, kind, block, packed, absmax)
}

/// Dequantizes `out.len()` weights: `out[i] = value(code[i]) · absmax[i / block]` in fp32, rounded once to nearest even.
pub fn dequantize_into<T: Element>(
    packed: &[u8],
    absmax: Absmax,
    kind: Kind,
    block: usize,
    out: &mut [T],
) -> Result<()> {
    cpu::dequantize(device::cpu::level(), packed, absmax, kind, block, out)
}

/// `out[m, n] = Σ_k x[m, k] · w[n, k] + bias[n]`, all row by row, `w` quantized of `n · k` weights.
///
/// `x` and `w` are fp32 inside, so is the sum; it is rounded once, to the type of `out`.
pub fn matmul_into<T: Element>(
    x: &[T],
    shape: (usize, usize, usize),
    packed: &[u8],
    absmax: Absmax,
    kind: Kind,
    block: usize,
    bias: Option<&[T]>,
    out: &mut [T],
) -> Result<()> {
    cpu::matmul(device::cpu::level(), x, shape, packed, absmax, kind, block, bias, out)
}

/// `out[s, n] = Σ_k x[s, k] · w[e, n, k] + bias[e, n]` for the rows `s` of each expert `e`, which are `offsets[e]` up to
/// `offsets[e + 1]`; zeros for the rows of `x` before the first expert's and after the last one's.
///
/// `shape` is (S, E, N, K); `w` are E matrices quantized as one tensor of `e · n · k` weights. Only those of experts that have
/// rows are read.
pub fn matmul_experts_into<T: Element>(
    x: &[T],
    offsets: &[i32],
    shape: (usize, usize, usize, usize),
    packed: &[u8],
    absmax: Absmax,
    kind: Kind,
    block: usize,
    bias: Option<&[T]>,
    out: &mut [T],
) -> Result<()> {
    cpu::matmul_experts(device::cpu::level(), x, offsets, shape, packed, absmax, kind, block, bias, out)
}

/// The checks of [`quantize_into`].
fn check_quantize(n: usize, block: usize, packed: usize, absmax: usize) -> Result<()> {
    check_four_bit_block(block)?;
    check_packed(n, packed)?;
    let blocks = block_count(n, block);
    if absmax != blocks {
        return Err(Error::shape("absmax", format!("[{blocks}]"), format!("[{absmax}]")));
    }
    Ok(())
}

/// The checks of [`dequantize_into`].
fn check_dequantize(n: usize, block: usize, packed: usize, absmax: &Absmax) -> Result<()> {
    check_four_bit_block(block)?;
    check_packed(n, packed)?;
    absmax.check(block_count(n, block))
}

fn check_packed(n: usize, packed: usize) -> Result<()> {
    let bytes = packed_len(n);
    if packed < bytes {
        return Err(Error::shape("packed", format!("at least [{bytes}] bytes for {n} weights"), format!("[{packed}]")));
    }
    Ok(())
}

/// The checks of [`matmul_into`].
fn check_matmul(
    (m, n, k): (usize, usize, usize),
    x: usize,
    packed: usize,
    absmax: &Absmax,
    block: usize,
    bias: Option<usize>,
    out: usize,
) -> Result<()> {
    check_size("x", &[m, k], x)?;
    check_size("out", &[m, n], out)?;
    check_dequantize(size("packed", &[n, k])?, block, packed, absmax)?;
    bias.map_or(Ok(()), |bias| check_size("bias", &[n], bias))
}

/// The checks of [`matmul_experts_into`].
fn check_experts(
    (s, e, n, k): (usize, usize, usize, usize),
    x: usize,
    offsets: &[i32],
    packed: usize,
    absmax: &Absmax,
    block: usize,
    bias: Option<usize>,
    out: usize,
) -> Result<()> {
    check_size("x", &[s, k], x)?;
    check_size("out", &[s, n], out)?;
    check_size("offsets", &[e.saturating_add(1)], offsets.len())?;
    check_dequantize(size("packed", &[e, n, k])?, block, packed, absmax)?;
    if offsets[0] < 0 || offsets[e] as usize > s || !offsets.is_sorted() {
        let got = format!("{} numbers from {} to {}", offsets.len(), offsets[0], offsets[e]);
        return Err(Error::value("offsets", format!("numbers from 0 to {s} that do not fall"), got));
    }
    bias.map_or(Ok(()), |bias| check_size("bias", &[e, n], bias))
}

/// Elements of a tensor.
fn size(argument: &'static str, shape: &[usize]) -> Result<usize> {
    let too_large = || Error::shape(argument, "fewer than 2^64 elements", format!("{shape:?}"));
    shape.iter().try_fold(1usize, |size, &n| size.checked_mul(n)).ok_or_else(too_large)
}

fn check_size(argument: &'static str, shape: &[usize], got: usize) -> Result<()> {
    let expected = size(argument, shape)?;
    if got == expected {
        return Ok(());
    }
    Err(Error::shape(argument, format!("{shape:?} = [{expected}]"), format!("[{got}]")))
}
