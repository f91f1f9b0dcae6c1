//! `quantize_4bit`, `dequantize_4bit`, `matmul_4bit`.

use halfbyte::codebook::Map;
use halfbyte::four_bit;
use halfbyte::layout::{Absmax, Nested, block_count, check_four_bit_block, packed_len};
use halfbyte::{Dtype, Error, Kind};
use pyo3::prelude::*;

use crate::dlpack::{Place, TensorRef};
use crate::errors::raise;
#[cfg(feature = "cuda")]
use crate::scratch::Scratch;
use crate::{check_together, detached, expect_len, shape_error};
#[cfg(feature = "cuda")]
use four_bit::cuda::Gate;

pub(crate) fn parse_kind(name: &str) -> Result<Kind, Error> {
    Kind::from_name(name).ok_or_else(|| Error::Value {
        argument: "quant_type",
        expected: "'nf4' or 'fp4'".into(),
        got: format!("'{name}'"),
    })
}

/// The 16 values of a 4-bit code, in code order.
#[pyfunction]
pub(crate) fn code_values(quant_type: &str) -> PyResult<[f32; 16]> {
    parse_kind(quant_type).map(|kind| *kind.values()).map_err(raise)
}

pub(crate) use halfbyte::with_type;

/// The scales of a quantized tensor, plain or nested: then with absmax, map, offset and block size of the codes.
pub(crate) struct Scales {
    pub(crate) absmax: TensorRef,
    pub(crate) nested: Option<(TensorRef, TensorRef, TensorRef, usize)>,
}

impl Scales {
    pub(crate) fn new(
        absmax: &Bound<'_, PyAny>,
        nested_absmax: Option<&Bound<'_, PyAny>>,
        nested_code: Option<&Bound<'_, PyAny>>,
        nested_offset: Option<&Bound<'_, PyAny>>,
        nested_blocksize: usize,
    ) -> PyResult<Self> {
        let absmax = TensorRef::new("absmax", absmax)?;
        let nested = match (
            TensorRef::optional("nested_absmax", nested_absmax)?,
            TensorRef::optional("nested_code", nested_code)?,
            TensorRef::optional("nested_offset", nested_offset)?,
        ) {
            (None, None, None) => None,
            (Some(a), Some(c), Some(o)) => Some((a, c, o, nested_blocksize)),
            _ => {
                return Err(raise(Error::Value {
                    argument: "nested_absmax",
                    expected: "nested_absmax, nested_code and nested_offset together".into(),
                    got: "some of them".into(),
                }));
            }
        };
        Ok(Self { absmax, nested })
    }

    /// All that can be checked without looking into the tensors.
    pub(crate) fn check(&self, place: Place, blocks: usize) -> Result<(), Error> {
        check_together(place, &[&self.absmax])?;
        let Some((absmax, code, offset, block)) = &self.nested else {
            self.absmax.expect_dtype(Dtype::F32)?;
            return expect_len(&self.absmax, blocks);
        };
        self.absmax.expect_u8()?;
        expect_len(&self.absmax, blocks)?;
        check_together(place, &[absmax, code, offset])?;
        for tensor in [absmax, code, offset] {
            tensor.expect_dtype(Dtype::F32)?;
        }
        if !block.is_power_of_two() {
            return Err(Error::Value {
                argument: "nested_blocksize",
                expected: "a power of two".into(),
                got: block.to_string(),
            });
        }
        expect_len(absmax, block_count(blocks, *block))?;
        expect_len(code, 256)?;
        expect_len(offset, 1)
    }

    /// # Safety
    /// After [`Scales::check`] with [`Place::Cpu`], and while nobody writes to the tensors.
    pub(crate) unsafe fn host(&self) -> Absmax<'_> {
        // SAFETY: types, sizes and place are checked; the caller vouches for the rest.
        unsafe {
            match &self.nested {
                None => Absmax::Plain(self.absmax.slice()),
                Some((absmax, code, offset, block)) => Absmax::Nested(Nested {
                    codes: self.absmax.slice(),
                    absmax: absmax.slice(),
                    map: <&Map>::try_from(code.slice::<f32>()).expect("256 entries were checked"),
                    offset: offset.slice::<f32>()[0],
                    block: *block,
                }),
            }
        }
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn device(&self) -> halfbyte::device::cuda::Absmax {
        use halfbyte::device::cuda::Absmax;
        match &self.nested {
            None => Absmax::Plain(self.absmax.address() as u64),
            Some((absmax, code, offset, block)) => Absmax::Nested {
                codes: self.absmax.address() as u64,
                absmax: absmax.address() as u64,
                map: code.address() as u64,
                offset: offset.address() as u64,
                log2_block: block.trailing_zeros(),
            },
        }
    }
}

pub(crate) fn expect_packed(packed: &TensorRef, weights: usize) -> Result<(), Error> {
    if packed.byte_len() >= packed_len(weights) {
        return Ok(());
    }
    Err(shape_error("packed", format!("at least {} bytes for {weights} weights", packed_len(weights)), packed))
}

/// Quantizes `a` into `packed` and `absmax`, whose sign counts with `scale_search`.
#[pyfunction]
#[pyo3(signature = (a, packed, absmax, quant_type, blocksize, scale_search=false))]
pub(crate) fn quantize_4bit(
    py: Python<'_>,
    a: &Bound<'_, PyAny>,
    packed: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
    quant_type: &str,
    blocksize: usize,
    scale_search: bool,
) -> PyResult<()> {
    let kind = parse_kind(quant_type).map_err(raise)?;
    check_four_bit_block(blocksize).map_err(raise)?;
    let a = TensorRef::new("a", a)?;
    let packed = TensorRef::new("packed", packed)?;
    let absmax = TensorRef::new("absmax", absmax)?;
    let checked = || {
        let dtype = a.float()?;
        absmax.expect_dtype(Dtype::F32)?;
        let place = a.place()?;
        check_together(place, &[&a, &packed, &absmax])?;
        packed.expect_writable()?;
        absmax.expect_writable()?;
        expect_packed(&packed, a.len())?;
        expect_len(&absmax, block_count(a.len(), blocksize))?;
        Ok((dtype, place))
    };
    let (dtype, place) = checked().map_err(raise)?;
    match place {
        Place::Cpu => with_type!(dtype, T => {
            // SAFETY: place, types, sizes and layout are checked; the caller keeps others from writing.
            let (a, packed, absmax) = unsafe { (a.slice::<T>(), packed.bytes_mut(), absmax.slice_mut::<f32>()) };
            let quantize = if scale_search { four_bit::quantize_search_into } else { four_bit::quantize_into };
            detached(py, a.len(), || quantize(a, kind, blocksize, packed, absmax))
        })
        .map_err(raise),
        #[cfg(feature = "cuda")]
        Place::Cuda(device) => {
            let stream = crate::stream_of(&a, device)?;
            let (source, n) = ((a.address() as u64, dtype), a.len());
            let (packed, absmax) = (packed.address() as u64, absmax.address() as u64);
            let quantize = if scale_search { four_bit::cuda::quantize_search } else { four_bit::cuda::quantize };
            // SAFETY: sizes and device are checked; torch keeps the memory for as long as its stream needs it.
            unsafe { quantize(&stream, source, n, kind, blocksize, packed, absmax) }.map_err(raise)
        }
        #[cfg(not(feature = "cuda"))]
        Place::Cuda(_) => Err(raise(crate::no_cuda())),
    }
}

/// Dequantizes `packed` into `out`.
#[pyfunction]
#[pyo3(signature = (packed, absmax, out, quant_type, blocksize, nested_absmax=None, nested_code=None, nested_offset=None, nested_blocksize=256))]
pub(crate) fn dequantize_4bit(
    py: Python<'_>,
    packed: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    quant_type: &str,
    blocksize: usize,
    nested_absmax: Option<&Bound<'_, PyAny>>,
    nested_code: Option<&Bound<'_, PyAny>>,
    nested_offset: Option<&Bound<'_, PyAny>>,
    nested_blocksize: usize,
) -> PyResult<()> {
    let kind = parse_kind(quant_type).map_err(raise)?;
    let packed = TensorRef::new("packed", packed)?;
    let out = TensorRef::new("out", out)?;
    let scales = Scales::new(absmax, nested_absmax, nested_code, nested_offset, nested_blocksize)?;
    dequantize(py, &packed, &scales, &out, kind, blocksize)
}

/// Checks everything, then dequantizes.
pub(crate) fn dequantize(
    py: Python<'_>,
    packed: &TensorRef,
    scales: &Scales,
    out: &TensorRef,
    kind: Kind,
    blocksize: usize,
) -> PyResult<()> {
    let checked = || {
        check_four_bit_block(blocksize)?;
        let dtype = out.float()?;
        let place = out.place()?;
        check_together(place, &[out, packed])?;
        out.expect_writable()?;
        expect_packed(packed, out.len())?;
        scales.check(place, block_count(out.len(), blocksize))?;
        Ok((dtype, place))
    };
    let (dtype, place) = checked().map_err(raise)?;
    match place {
        Place::Cpu => with_type!(dtype, T => {
            // SAFETY: place, types, sizes and layout are checked; the caller keeps others from writing.
            let (packed, absmax, out) = unsafe { (packed.bytes(), scales.host(), out.slice_mut::<T>()) };
            detached(py, out.len(), || four_bit::dequantize_into(packed, absmax, kind, blocksize, out))
        })
        .map_err(raise),
        #[cfg(feature = "cuda")]
        Place::Cuda(device) => {
            let stream = crate::stream_of(out, device)?;
            let target = (out.address() as u64, dtype);
            let packed = packed.address() as u64;
            // SAFETY: sizes and device are checked; torch keeps the memory for as long as its stream needs it.
            unsafe { four_bit::cuda::dequantize(&stream, packed, scales.device(), kind, blocksize, target, out.len()) }
                .map_err(raise)
        }
        #[cfg(not(feature = "cuda"))]
        Place::Cuda(_) => Err(raise(crate::no_cuda())),
    }
}

/// `out = x · wᵀ + bias` from packed weights; N and K are the last sizes of `out` and `x`.
///
/// False, and nothing written, where dequantizing the weight and a dense product is the better way.
#[pyfunction]
#[pyo3(signature = (x, packed, absmax, out, quant_type, blocksize, bias=None, nested_absmax=None, nested_code=None, nested_offset=None, nested_blocksize=256))]
pub(crate) fn matmul_4bit(
    x: &Bound<'_, PyAny>,
    packed: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    quant_type: &str,
    blocksize: usize,
    bias: Option<&Bound<'_, PyAny>>,
    nested_absmax: Option<&Bound<'_, PyAny>>,
    nested_code: Option<&Bound<'_, PyAny>>,
    nested_offset: Option<&Bound<'_, PyAny>>,
    nested_blocksize: usize,
) -> PyResult<bool> {
    let kind = parse_kind(quant_type).map_err(raise)?;
    let nested = [nested_absmax, nested_code, nested_offset];
    let of = Operands::new([x, packed, absmax, out], bias, nested, nested_blocksize)?;
    matmul(x, &of.x, &of.packed, &of.scales, of.bias.as_ref(), &of.out, kind, blocksize)
}

/// Checks everything, then multiplies; false, and nothing written, as [`matmul_4bit`]. `like` is what `x` is a view of.
pub(crate) fn matmul(
    like: &Bound<'_, PyAny>,
    x: &TensorRef,
    packed: &TensorRef,
    scales: &Scales,
    bias: Option<&TensorRef>,
    out: &TensorRef,
    kind: Kind,
    blocksize: usize,
) -> PyResult<bool> {
    let (dtype, place, shape) = check_product(x, packed, scales, bias, out, blocksize, 1).map_err(raise)?;
    match place {
        Place::Cpu => with_type!(dtype, T => {
            // SAFETY: place, types, sizes and layout are checked; the caller keeps others from writing.
            let (x, packed, absmax, out) =
                unsafe { (x.slice::<T>(), packed.bytes(), scales.host(), out.slice_mut::<T>()) };
            // SAFETY: as above.
            let bias = bias.map(|bias| unsafe { bias.slice::<T>() });
            let work = shape.1.saturating_mul(shape.2);
            detached(like.py(), work, || four_bit::matmul_into(x, shape, packed, absmax, kind, blocksize, bias, out))
        })
        .map_err(raise)?,
        #[cfg(feature = "cuda")]
        Place::Cuda(device) => {
            if !four_bit::cuda::fused(device, dtype, shape, blocksize).map_err(raise)? {
                return Ok(false);
            }
            let bytes = four_bit::cuda::scratch_bytes(device, dtype, shape, blocksize).map_err(raise)?;
            let scratch = Scratch::beside(like, place, bytes)?;
            let memory = scratch.as_ref().map(Scratch::address);
            let stream = crate::stream_of(x, device)?;
            let bias = bias.map(|bias| bias.address() as u64);
            let (x, packed, out) = (x.address() as u64, packed.address() as u64, out.address() as u64);
            let absmax = scales.device();
            // SAFETY: sizes and device are checked; torch keeps the memory for as long as its stream needs it.
            unsafe {
                four_bit::cuda::matmul(&stream, dtype, x, shape, packed, absmax, kind, blocksize, bias, out, memory)
            }
            .map_err(raise)?;
        }
        #[cfg(not(feature = "cuda"))]
        Place::Cuda(_) => return Err(raise(crate::no_cuda())),
    }
    Ok(true)
}

/// The tensors of a product as Python gives them.
struct Operands {
    x: TensorRef,
    packed: TensorRef,
    scales: Scales,
    out: TensorRef,
    bias: Option<TensorRef>,
}

impl Operands {
    fn new(
        [x, packed, absmax, out]: [&Bound<'_, PyAny>; 4],
        bias: Option<&Bound<'_, PyAny>>,
        [nested_absmax, nested_code, nested_offset]: [Option<&Bound<'_, PyAny>>; 3],
        nested_blocksize: usize,
    ) -> PyResult<Self> {
        Ok(Self {
            x: TensorRef::new("x", x)?,
            packed: TensorRef::new("packed", packed)?,
            out: TensorRef::new("out", out)?,
            bias: TensorRef::optional("bias", bias)?,
            scales: Scales::new(absmax, nested_absmax, nested_code, nested_offset, nested_blocksize)?,
        })
    }

    #[cfg(feature = "cuda")]
    fn check(&self, blocksize: usize, rows: usize) -> PyResult<Product> {
        let Self { x, packed, scales, out, bias } = self;
        check_product(x, packed, scales, bias.as_ref(), out, blocksize, rows).map_err(raise)
    }
}

/// Type, place and (M, N, K).
type Product = (Dtype, Place, (usize, usize, usize));

/// What a product is, whose tensors all fit together; each column of `out` is made of `rows` rows of the weight.
fn check_product(
    x: &TensorRef,
    packed: &TensorRef,
    scales: &Scales,
    bias: Option<&TensorRef>,
    out: &TensorRef,
    blocksize: usize,
    rows: usize,
) -> Result<Product, Error> {
    check_four_bit_block(blocksize)?;
    let dtype = x.float()?;
    let place = x.place()?;
    check_together(place, &[x, packed, out])?;
    out.expect_dtype(dtype)?;
    out.expect_writable()?;
    let shape = product_shape(x, out)?;
    let (_, n, k) = shape;
    let weights = n.checked_mul(rows).and_then(|rows| rows.checked_mul(k));
    let weights = weights.ok_or_else(|| shape_error("out", "fewer than 2^64 weights".into(), out))?;
    expect_packed(packed, weights)?;
    scales.check(place, block_count(weights, blocksize))?;
    check_bias(bias, place, dtype, n * rows)?;
    Ok((dtype, place, shape))
}

pub(crate) fn check_bias(bias: Option<&TensorRef>, place: Place, dtype: Dtype, len: usize) -> Result<(), Error> {
    let Some(bias) = bias else { return Ok(()) };
    check_together(place, &[bias])?;
    bias.expect_dtype(dtype)?;
    expect_len(bias, len)
}

/// [`matmul_4bit`] by the CUDA kernel for many rows, whatever M; for tests and measurements. `tokens` of a tile and `blocks` of threads that
/// have the tiles are the plan's where 0. False, and nothing written, where the kernel does not fit.
#[cfg(feature = "cuda")]
#[pyfunction]
#[pyo3(signature = (x, packed, absmax, out, quant_type, blocksize, bias=None, nested_absmax=None, nested_code=None, nested_offset=None, nested_blocksize=256, tokens=0, blocks=0))]
pub(crate) fn matmul_4bit_large(
    x: &Bound<'_, PyAny>,
    packed: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    quant_type: &str,
    blocksize: usize,
    bias: Option<&Bound<'_, PyAny>>,
    nested_absmax: Option<&Bound<'_, PyAny>>,
    nested_code: Option<&Bound<'_, PyAny>>,
    nested_offset: Option<&Bound<'_, PyAny>>,
    nested_blocksize: usize,
    tokens: u32,
    blocks: u32,
) -> PyResult<bool> {
    let kind = parse_kind(quant_type).map_err(raise)?;
    let nested = [nested_absmax, nested_code, nested_offset];
    let of = Operands::new([x, packed, absmax, out], bias, nested, nested_blocksize)?;
    let (dtype, place, shape) = of.check(blocksize, 1)?;
    let Place::Cuda(device) = place else { return Ok(false) };
    let stream = crate::stream_of(&of.x, device)?;
    let set = |value: u32| (value != 0).then_some(value);
    let choice = four_bit::cuda::LargeChoice { tokens: set(tokens), blocks: set(blocks) };
    let bytes = four_bit::cuda::large_scratch_bytes(device, shape, choice).map_err(raise)?;
    let scratch = Scratch::beside(x, place, bytes)?;
    let memory = scratch.as_ref().map(Scratch::address);
    let bias = of.bias.map(|bias| bias.address() as u64);
    let (x, packed, out) = (of.x.address() as u64, of.packed.address() as u64, of.out.address() as u64);
    let absmax = of.scales.device();
    // SAFETY: sizes and device are checked; torch keeps the memory for as long as its stream needs it.
    unsafe {
        four_bit::cuda::matmul_by_large(
            &stream, dtype, x, shape, packed, absmax, kind, blocksize, bias, out, memory, choice,
        )
    }
    .map_err(raise)
}

#[cfg(feature = "cuda")]
fn parse_gate(name: &str) -> Result<Gate, Error> {
    Gate::from_name(name).ok_or_else(|| Error::Value {
        argument: "gate",
        expected: "'silu' or 'gelu_tanh'".into(),
        got: format!("'{name}'"),
    })
}

/// `out = gate(x · aᵀ) · (x · bᵀ)` for a packed weight whose rows are a's and then b's; N and K are the last sizes of `out` and `x`.
///
/// False, and nothing written, where a product and then the gate is the better way.
#[cfg(feature = "cuda")]
#[pyfunction]
#[pyo3(signature = (x, packed, absmax, out, quant_type, blocksize, gate, bias=None, nested_absmax=None, nested_code=None, nested_offset=None, nested_blocksize=256))]
pub(crate) fn matmul_4bit_gated(
    x: &Bound<'_, PyAny>,
    packed: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    quant_type: &str,
    blocksize: usize,
    gate: &str,
    bias: Option<&Bound<'_, PyAny>>,
    nested_absmax: Option<&Bound<'_, PyAny>>,
    nested_code: Option<&Bound<'_, PyAny>>,
    nested_offset: Option<&Bound<'_, PyAny>>,
    nested_blocksize: usize,
) -> PyResult<bool> {
    let kind = parse_kind(quant_type).map_err(raise)?;
    let gate = parse_gate(gate).map_err(raise)?;
    let nested = [nested_absmax, nested_code, nested_offset];
    let of = Operands::new([x, packed, absmax, out], bias, nested, nested_blocksize)?;
    let (dtype, place, shape) = of.check(blocksize, 2)?;
    let Place::Cuda(device) = place else { return Ok(false) };
    let stream = crate::stream_of(&of.x, device)?;
    let bias = of.bias.map(|bias| bias.address() as u64);
    let (x, packed, out) = (of.x.address() as u64, of.packed.address() as u64, of.out.address() as u64);
    let absmax = of.scales.device();
    // SAFETY: sizes and device are checked; torch keeps the memory for as long as its stream needs it.
    unsafe { four_bit::cuda::matmul_gated(&stream, dtype, x, shape, packed, absmax, kind, blocksize, bias, gate, out) }
        .map_err(raise)
}

/// `out = gate(a[..., :N]) · a[..., N:]` on CUDA, for `a` [..., 2N] and `out` [..., N] of one float type.
#[cfg(feature = "cuda")]
#[pyfunction]
pub(crate) fn gate(a: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>, gate: &str) -> PyResult<()> {
    let gate = parse_gate(gate).map_err(raise)?;
    let a = TensorRef::new("a", a)?;
    let out = TensorRef::new("out", out)?;
    let checked = || {
        let dtype = a.float()?;
        let place = a.place()?;
        check_together(place, &[&a, &out])?;
        out.expect_dtype(dtype)?;
        out.expect_writable()?;
        let (m, n, both) = product_shape(&a, &out)?;
        if n.checked_mul(2) != Some(both) {
            return Err(shape_error("out", format!("half of the {both} columns of a"), &out));
        }
        let Place::Cuda(device) = place else {
            return Err(Error::Device { argument: "a", expected: "a CUDA device".into(), got: "the CPU".into() });
        };
        Ok((dtype, device, (m, n)))
    };
    let (dtype, device, shape) = checked().map_err(raise)?;
    let stream = crate::stream_of(&a, device)?;
    // SAFETY: sizes and device are checked; torch keeps the memory for as long as its stream needs it.
    unsafe { four_bit::cuda::gate(&stream, dtype, a.address() as u64, shape, gate, out.address() as u64) }
        .map_err(raise)
}

/// Says that nothing writes the weight at `packed` and its scales any more, or takes it back.
#[cfg(feature = "cuda")]
#[pyfunction]
pub(crate) fn settle_4bit(packed: u64, settled: bool) {
    four_bit::cuda::settle(packed, settled);
}

/// What products with the weight at `packed` fetch for the one after them, at most `most` bytes: (address, rows, bytes of a row) of its packed
/// weights and of its scales. None forgets it.
#[cfg(feature = "cuda")]
#[pyfunction]
pub(crate) fn read_next_4bit(packed: u64, following: Option<[(u64, usize, usize); 2]>, most: usize) -> PyResult<()> {
    let read = |(address, rows, row_bytes)| four_bit::cuda::NextRead { address, rows, row_bytes };
    four_bit::cuda::read_next(packed, following.map(|tensors| tensors.map(read)), most).map_err(raise)
}

/// (M, N, K) of `x` [..., K] and `out` [..., N].
pub(crate) fn product_shape(x: &TensorRef, out: &TensorRef) -> Result<(usize, usize, usize), Error> {
    let (Some((&k, rows)), Some((&n, out_rows))) = (x.shape().split_last(), out.shape().split_last()) else {
        return Err(shape_error("x", "at least one dimension for x and out".into(), x));
    };
    if rows != out_rows {
        return Err(shape_error("out", format!("{rows:?} and then N, as x is {:?}", x.shape()), out));
    }
    Ok((rows.iter().map(|&size| size as usize).product(), n as usize, k as usize))
}
