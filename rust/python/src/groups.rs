//! Several weights at once: `matmul_4bit_group`, `matmul_4bit_experts`, and what experts need around it.

use halfbyte::four_bit;
use halfbyte::layout::{block_count, check_four_bit_block};
use halfbyte::{Dtype, Error};
use pyo3::prelude::*;

use crate::dlpack::{Place, TensorRef};
use crate::errors::raise;
use crate::four_bit::{Scales, check_bias, expect_packed, parse_kind, product_shape, with_type};
#[cfg(feature = "cuda")]
use crate::scratch::Scratch;
use crate::{check_together, detached, expect_len, shape_error};

/// A weight of a group: packed, absmax, out, bias, and the four of nested scales.
type Piece<'py> = (
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Option<Bound<'py, PyAny>>,
    Option<Bound<'py, PyAny>>,
    Option<Bound<'py, PyAny>>,
    Option<Bound<'py, PyAny>>,
    usize,
);

/// `out = x · wᵀ + bias` for each piece. False, with nothing written, where each product for itself is the better way.
#[pyfunction]
#[expect(clippy::needless_pass_by_value, reason = "Python's list becomes this Vec")]
pub(crate) fn matmul_4bit_group(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    pieces: Vec<Piece<'_>>,
    quant_type: &str,
    blocksize: usize,
) -> PyResult<bool> {
    let kind = parse_kind(quant_type).map_err(raise)?;
    check_four_bit_block(blocksize).map_err(raise)?;
    #[cfg(feature = "cuda")]
    let like = x;
    let x = TensorRef::new("x", x)?;
    let (dtype, place) = x.float().and_then(|dtype| Ok((dtype, x.place()?))).map_err(raise)?;
    let mut checked = Vec::with_capacity(pieces.len());
    for (packed, absmax, out, bias, nested_absmax, nested_code, nested_offset, nested_blocksize) in &pieces {
        let packed = TensorRef::new("packed", packed)?;
        let out = TensorRef::new("out", out)?;
        let bias = TensorRef::optional("bias", bias.as_ref())?;
        let scales = Scales::new(
            absmax,
            nested_absmax.as_ref(),
            nested_code.as_ref(),
            nested_offset.as_ref(),
            *nested_blocksize,
        )?;
        let check = || {
            check_together(place, &[&x, &packed, &out])?;
            out.expect_dtype(dtype)?;
            out.expect_writable()?;
            let shape = product_shape(&x, &out)?;
            let (_, n, k) = shape;
            let weights = n.checked_mul(k).ok_or_else(|| shape_error("out", "fewer than 2^64 weights".into(), &out))?;
            expect_packed(&packed, weights)?;
            scales.check(place, block_count(weights, blocksize))?;
            check_bias(bias.as_ref(), place, dtype, n)?;
            Ok(shape)
        };
        let shape = check().map_err(raise)?;
        checked.push((packed, scales, bias, out, shape));
    }
    match place {
        Place::Cpu => with_type!(dtype, T => {
            let work = checked.iter().map(|(.., (_, n, k))| n.saturating_mul(*k)).fold(0, usize::saturating_add);
            // SAFETY: place, types, sizes and layout are checked; the caller keeps others from writing.
            let x = unsafe { x.slice::<T>() };
            // SAFETY: as above.
            let parts: Vec<_> = checked.iter().map(|(packed, scales, bias, out, shape)| unsafe {
                let bias = bias.as_ref().map(|bias| bias.slice::<T>());
                (packed.bytes(), scales.host(), bias, out.slice_mut::<T>(), *shape)
            }).collect();
            detached(py, work, || {
                parts.into_iter().try_for_each(|(packed, absmax, bias, out, shape)| {
                    four_bit::matmul_into(x, shape, packed, absmax, kind, blocksize, bias, out)
                })
            })
        })
        .map(|()| true)
        .map_err(raise),
        #[cfg(feature = "cuda")]
        Place::Cuda(device) => {
            let stream = crate::stream_of(&x, device)?;
            let pieces: Vec<_> = checked
                .iter()
                .map(|(packed, scales, bias, out, (_, n, _))| four_bit::cuda::GroupPiece {
                    n: *n,
                    packed: packed.address() as u64,
                    absmax: scales.device(),
                    bias: bias.as_ref().map(|bias| bias.address() as u64),
                    out: out.address() as u64,
                })
                .collect();
            let (m, _, k) = checked.first().map_or((0, 0, 0), |(.., shape)| *shape);
            let mut most = 0;
            for piece in &pieces {
                let bytes = four_bit::cuda::scratch_bytes(device, dtype, (m, piece.n, k), blocksize).map_err(raise)?;
                most = most.max(bytes);
            }
            let scratch = Scratch::beside(like, place, most)?;
            let memory = scratch.as_ref().map(Scratch::address);
            let x = x.address() as u64;
            // SAFETY: sizes and device are checked; torch keeps the memory for as long as its stream needs it.
            unsafe { four_bit::cuda::matmul_group(&stream, dtype, x, (m, k), &pieces, kind, blocksize, memory) }
                .map_err(raise)
        }
        #[cfg(not(feature = "cuda"))]
        Place::Cuda(_) => Err(raise(crate::no_cuda())),
    }
}

fn expect_i32(tensor: &TensorRef, len: usize) -> Result<(), Error> {
    tensor.expect_i32()?;
    expect_len(tensor, len)
}

/// `out[s] = x[s] · w[e]ᵀ + bias[e]` for rows `offsets[e]` up to `offsets[e + 1]`; E is the length of `offsets` less one.
#[pyfunction]
#[pyo3(signature = (x, offsets, packed, absmax, out, quant_type, blocksize, bias=None, nested_absmax=None, nested_code=None, nested_offset=None, nested_blocksize=256))]
pub(crate) fn matmul_4bit_experts(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    offsets: &Bound<'_, PyAny>,
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
) -> PyResult<()> {
    let kind = parse_kind(quant_type).map_err(raise)?;
    check_four_bit_block(blocksize).map_err(raise)?;
    let x = TensorRef::new("x", x)?;
    let offsets = TensorRef::new("offsets", offsets)?;
    let packed = TensorRef::new("packed", packed)?;
    let out = TensorRef::new("out", out)?;
    let bias = TensorRef::optional("bias", bias)?;
    let scales = Scales::new(absmax, nested_absmax, nested_code, nested_offset, nested_blocksize)?;
    let checked = || {
        let dtype = x.float()?;
        let place = x.place()?;
        check_together(place, &[&x, &offsets, &packed, &out])?;
        out.expect_dtype(dtype)?;
        out.expect_writable()?;
        let (s, n, k) = product_shape(&x, &out)?;
        let Some(e) = offsets.len().checked_sub(1) else {
            return Err(shape_error("offsets", "at least 1 element".into(), &offsets));
        };
        expect_i32(&offsets, e + 1)?;
        let weights = e.checked_mul(n).and_then(|rows| rows.checked_mul(k));
        let weights = weights.ok_or_else(|| shape_error("out", "fewer than 2^64 weights".into(), &out))?;
        expect_packed(&packed, weights)?;
        scales.check(place, block_count(weights, blocksize))?;
        check_bias(bias.as_ref(), place, dtype, e * n)?;
        Ok((dtype, place, (s, e, n, k)))
    };
    let (dtype, place, shape) = checked().map_err(raise)?;
    match place {
        Place::Cpu => with_type!(dtype, T => {
            // SAFETY: place, types, sizes and layout are checked; the caller keeps others from writing.
            let (x, offsets, packed, absmax, out) = unsafe {
                (x.slice::<T>(), offsets.slice::<i32>(), packed.bytes(), scales.host(), out.slice_mut::<T>())
            };
            // SAFETY: as above.
            let bias = bias.as_ref().map(|bias| unsafe { bias.slice::<T>() });
            let (s, _, n, k) = shape;
            let work = s.saturating_mul(n).saturating_mul(k);
            detached(py, work, || {
                four_bit::matmul_experts_into(x, offsets, shape, packed, absmax, kind, blocksize, bias, out)
            })
        })
        .map_err(raise),
        #[cfg(feature = "cuda")]
        Place::Cuda(device) => {
            let stream = crate::stream_of(&x, device)?;
            let bias = bias.as_ref().map(|bias| bias.address() as u64);
            let (x, offsets, packed) = (x.address() as u64, offsets.address() as u64, packed.address() as u64);
            let (absmax, out) = (scales.device(), out.address() as u64);
            // SAFETY: sizes and device are checked; torch keeps the memory for as long as its stream needs it. Kernels stay within
            // bounds whatever `offsets` holds.
            unsafe {
                four_bit::cuda::matmul_experts(
                    &stream, dtype, x, offsets, shape, packed, absmax, kind, blocksize, bias, out,
                )
            }
            .map_err(raise)
        }
        #[cfg(not(feature = "cuda"))]
        Place::Cuda(_) => Err(raise(crate::no_cuda())),
    }
}

/// Sorts rows by expert on CUDA: `index` int64 or int32 [S]; `offsets` int32 [E + 1], `order` and `inverse` int32 [S].
#[pyfunction]
pub(crate) fn route_experts(
    index: &Bound<'_, PyAny>,
    offsets: &Bound<'_, PyAny>,
    order: &Bound<'_, PyAny>,
    inverse: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let index = TensorRef::new("index", index)?;
    let offsets = TensorRef::new("offsets", offsets)?;
    let order = TensorRef::new("order", order)?;
    let inverse = TensorRef::new("inverse", inverse)?;
    let checked = || {
        let place = index.place()?;
        check_together(place, &[&index, &offsets, &order, &inverse])?;
        let wide = index.wide_integer()?;
        for (tensor, len) in [(&offsets, offsets.len().max(1)), (&order, index.len()), (&inverse, index.len())] {
            expect_i32(tensor, len)?;
            tensor.expect_writable()?;
        }
        Ok((place, wide))
    };
    let (place, wide) = checked().map_err(raise)?;
    match place {
        Place::Cpu => Err(raise(Error::Device {
            argument: "index",
            expected: "a CUDA device".into(),
            got: "the CPU, where torch sorts".into(),
        })),
        #[cfg(feature = "cuda")]
        Place::Cuda(device) => {
            let stream = crate::stream_of(&index, device)?;
            let (s, e) = (index.len(), offsets.len() - 1);
            let (offsets, order, inverse) =
                (offsets.address() as u64, order.address() as u64, inverse.address() as u64);
            // SAFETY: types, sizes and device are checked; torch keeps the memory for as long as its stream needs it.
            unsafe {
                four_bit::cuda::route_experts(&stream, (index.address() as u64, wide), (s, e), offsets, order, inverse)
            }
            .map_err(raise)
        }
        #[cfg(not(feature = "cuda"))]
        Place::Cuda(_) => Err(raise(crate::no_cuda())),
    }
}

/// Writes zeros to the rows of `out` [S, N] (16-bit, CUDA) that are no expert's.
#[pyfunction]
pub(crate) fn clear_expert_rows(offsets: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<()> {
    let offsets = TensorRef::new("offsets", offsets)?;
    let out = TensorRef::new("out", out)?;
    let checked = || {
        let place = out.place()?;
        check_together(place, &[&offsets, &out])?;
        expect_i32(&offsets, offsets.len().max(1))?;
        out.expect_writable()?;
        match (out.float()?, out.shape()) {
            (Dtype::F32, _) => {
                Err(Error::Dtype { argument: "out", expected: "a 16-bit float".into(), got: "float32".into() })
            }
            (_, [s, n]) => Ok((place, *s as usize, *n as usize)),
            _ => Err(shape_error("out", "[S, N]".into(), &out)),
        }
    };
    let (place, s, n) = checked().map_err(raise)?;
    match place {
        Place::Cpu => Err(raise(Error::Device {
            argument: "out",
            expected: "a CUDA device".into(),
            got: "the CPU, which writes them itself".into(),
        })),
        #[cfg(feature = "cuda")]
        Place::Cuda(device) => {
            let stream = crate::stream_of(&out, device)?;
            let e = offsets.len() - 1;
            // SAFETY: types, sizes and device are checked; torch keeps the memory for as long as its stream needs it.
            unsafe { four_bit::cuda::clear_rows(&stream, offsets.address() as u64, out.address() as u64, (s, e, n)) }
                .map_err(raise)
        }
        #[cfg(not(feature = "cuda"))]
        Place::Cuda(_) => Err(raise(crate::no_cuda())),
    }
}

/// The number of the capture that a stream is in, 0 for none; no two captures of a process have the same.
#[pyfunction]
pub(crate) fn capture_of(device: i32, stream: usize) -> PyResult<u64> {
    #[cfg(feature = "cuda")]
    {
        use halfbyte::device::cuda::{Stream, capture_of};
        capture_of(&Stream { device, handle: stream as *mut _ }).map_err(raise)
    }
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (device, stream);
        Err(raise(crate::no_cuda()))
    }
}
