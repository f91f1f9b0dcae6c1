//! `quantize_blockwise`, `dequantize_blockwise`, `dynamic_map`.

use halfbyte::codebook::Map;
use halfbyte::eight_bit::{self, Rounding};
use halfbyte::layout::block_count;
use halfbyte::{Dtype, Error};
use pyo3::prelude::*;

use crate::dlpack::{Place, TensorRef};
use crate::errors::raise;
use crate::four_bit::with_type;
use crate::{check_together, detached, expect_len};

/// The 256 values of the dynamic map.
#[pyfunction]
pub(crate) fn dynamic_map(signed: bool) -> Vec<f32> {
    halfbyte::codebook::dynamic_map(signed).to_vec()
}

/// What both directions check: `values` float, `codes` uint8, the map and one scale a block, all in one place.
fn check(
    values: &TensorRef,
    code: &TensorRef,
    codes: &TensorRef,
    absmax: &TensorRef,
    offset: Option<&TensorRef>,
    blocksize: usize,
) -> Result<(Dtype, Place), Error> {
    if blocksize == 0 {
        return Err(Error::Value { argument: "blocksize", expected: "a positive number".into(), got: "0".into() });
    }
    let dtype = values.float()?;
    let place = values.place()?;
    check_together(place, &[values, code, codes, absmax])?;
    codes.expect_u8()?;
    for tensor in [code, absmax] {
        tensor.expect_dtype(Dtype::F32)?;
    }
    expect_len(code, 256)?;
    expect_len(codes, values.len())?;
    expect_len(absmax, block_count(values.len(), blocksize))?;
    if let Some(offset) = offset {
        check_together(place, &[offset])?;
        offset.expect_dtype(Dtype::F32)?;
        expect_len(offset, 1)?;
    }
    Ok((dtype, place))
}

/// # Safety
/// `code` must be a contiguous fp32 tensor of 256 on the CPU that nobody writes to.
unsafe fn host_map(code: &TensorRef) -> &Map {
    // SAFETY: the caller's promise.
    unsafe { code.slice::<f32>() }.try_into().expect("256 entries were checked")
}

/// # Safety
/// `offset` must be a contiguous fp32 tensor of one element on the CPU.
unsafe fn host_offset(offset: Option<&TensorRef>) -> f32 {
    // SAFETY: the caller's promise.
    offset.map_or(0.0, |offset| unsafe { offset.slice::<f32>() }[0])
}

/// Quantizes `a - offset` into `codes` and `absmax`.
#[pyfunction]
#[pyo3(signature = (a, code, codes, absmax, blocksize, offset=None, grid=false))]
pub(crate) fn quantize_blockwise(
    py: Python<'_>,
    a: &Bound<'_, PyAny>,
    code: &Bound<'_, PyAny>,
    codes: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
    blocksize: usize,
    offset: Option<&Bound<'_, PyAny>>,
    grid: bool,
) -> PyResult<()> {
    let a = TensorRef::new("a", a)?;
    let code = TensorRef::new("code", code)?;
    let codes = TensorRef::new("codes", codes)?;
    let absmax = TensorRef::new("absmax", absmax)?;
    let offset = TensorRef::optional("offset", offset)?;
    let checked = || {
        codes.expect_writable()?;
        absmax.expect_writable()?;
        check(&a, &code, &codes, &absmax, offset.as_ref(), blocksize)
    };
    let (dtype, place) = checked().map_err(raise)?;
    match place {
        Place::Cpu => with_type!(dtype, T => {
            // SAFETY: place, types, sizes and layout are checked; the caller keeps others from writing.
            let (a, codes, absmax) = unsafe { (a.slice::<T>(), codes.slice_mut::<u8>(), absmax.slice_mut::<f32>()) };
            // SAFETY: as above.
            let (map, offset) = unsafe { (host_map(&code), host_offset(offset.as_ref())) };
            let rounding = if grid { Rounding::Grid } else { Rounding::Nearest };
            detached(py, a.len(), || eight_bit::quantize_into(a, map, blocksize, offset, rounding, codes, absmax))
        })
        .map_err(raise),
        #[cfg(feature = "cuda")]
        Place::Cuda(device) => {
            let stream = crate::stream_of(&a, device)?;
            let offset = offset.as_ref().map(|offset| offset.address() as u64);
            let (source, n) = ((a.address() as u64, dtype), a.len());
            let (map, codes, absmax) = (code.address() as u64, codes.address() as u64, absmax.address() as u64);
            // SAFETY: sizes and device are checked; torch keeps the memory for as long as its stream needs it.
            unsafe { eight_bit::cuda::quantize(&stream, source, n, map, blocksize, offset, codes, absmax) }
                .map_err(raise)
        }
        #[cfg(not(feature = "cuda"))]
        Place::Cuda(_) => Err(raise(crate::no_cuda())),
    }
}

/// Dequantizes `codes` into `out`, adding `offset`.
#[pyfunction]
#[pyo3(signature = (codes, code, absmax, out, blocksize, offset=None))]
pub(crate) fn dequantize_blockwise(
    py: Python<'_>,
    codes: &Bound<'_, PyAny>,
    code: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    blocksize: usize,
    offset: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let codes = TensorRef::new("codes", codes)?;
    let code = TensorRef::new("code", code)?;
    let absmax = TensorRef::new("absmax", absmax)?;
    let out = TensorRef::new("out", out)?;
    let offset = TensorRef::optional("offset", offset)?;
    let checked = || {
        out.expect_writable()?;
        check(&out, &code, &codes, &absmax, offset.as_ref(), blocksize)
    };
    let (dtype, place) = checked().map_err(raise)?;
    match place {
        Place::Cpu => with_type!(dtype, T => {
            // SAFETY: place, types, sizes and layout are checked; the caller keeps others from writing.
            let (codes, absmax, out) = unsafe { (codes.slice::<u8>(), absmax.slice::<f32>(), out.slice_mut::<T>()) };
            // SAFETY: as above.
            let (map, offset) = unsafe { (host_map(&code), host_offset(offset.as_ref())) };
            detached(py, out.len(), || eight_bit::dequantize_into(codes, map, absmax, blocksize, offset, out))
        })
        .map_err(raise),
        #[cfg(feature = "cuda")]
        Place::Cuda(device) => {
            let stream = crate::stream_of(&out, device)?;
            let offset = offset.as_ref().map(|offset| offset.address() as u64);
            let (target, n) = ((out.address() as u64, dtype), out.len());
            let (codes, map, absmax) = (codes.address() as u64, code.address() as u64, absmax.address() as u64);
            // SAFETY: sizes and device are checked; torch keeps the memory for as long as its stream needs it.
            unsafe { eight_bit::cuda::dequantize(&stream, codes, map, absmax, blocksize, offset, target, n) }
                .map_err(raise)
        }
        #[cfg(not(feature = "cuda"))]
        Place::Cuda(_) => Err(raise(crate::no_cuda())),
    }
}
