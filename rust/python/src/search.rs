//! `encode_4bit`: codes for given scales.

#[cfg(feature = "cuda")]
use halfbyte::four_bit;
use halfbyte::four_bit::search;
use halfbyte::layout::{block_count, check_four_bit_block};
use pyo3::prelude::*;

use crate::dlpack::{Place, TensorRef};
use crate::errors::raise;
use crate::four_bit::{Scales, expect_packed, parse_kind, with_type};
use crate::{check_together, detached};

/// Chooses the codes in `packed` again, for the scales given.
#[pyfunction]
#[pyo3(signature = (a, packed, absmax, quant_type, blocksize, nested_absmax=None, nested_code=None, nested_offset=None, nested_blocksize=256))]
pub(crate) fn encode_4bit(
    py: Python<'_>,
    a: &Bound<'_, PyAny>,
    packed: &Bound<'_, PyAny>,
    absmax: &Bound<'_, PyAny>,
    quant_type: &str,
    blocksize: usize,
    nested_absmax: Option<&Bound<'_, PyAny>>,
    nested_code: Option<&Bound<'_, PyAny>>,
    nested_offset: Option<&Bound<'_, PyAny>>,
    nested_blocksize: usize,
) -> PyResult<()> {
    let kind = parse_kind(quant_type).map_err(raise)?;
    check_four_bit_block(blocksize).map_err(raise)?;
    let a = TensorRef::new("a", a)?;
    let packed = TensorRef::new("packed", packed)?;
    let scales = Scales::new(absmax, nested_absmax, nested_code, nested_offset, nested_blocksize)?;
    let checked = || {
        let dtype = a.float()?;
        let place = a.place()?;
        check_together(place, &[&a, &packed])?;
        packed.expect_writable()?;
        expect_packed(&packed, a.len())?;
        scales.check(place, block_count(a.len(), blocksize))?;
        Ok((dtype, place))
    };
    let (dtype, place) = checked().map_err(raise)?;
    match place {
        Place::Cpu => with_type!(dtype, T => {
            // SAFETY: place, types, sizes and layout are checked; the caller keeps others from writing.
            let (a, packed, absmax) = unsafe { (a.slice::<T>(), packed.bytes_mut(), scales.host()) };
            detached(py, a.len(), || search::encode_into(a, absmax, kind, blocksize, packed))
        })
        .map_err(raise),
        #[cfg(feature = "cuda")]
        Place::Cuda(device) => {
            let stream = crate::stream_of(&a, device)?;
            let (source, n, packed) = ((a.address() as u64, dtype), a.len(), packed.address() as u64);
            // SAFETY: sizes and device are checked; torch keeps the memory for as long as its stream needs it.
            unsafe { four_bit::cuda::encode(&stream, source, n, kind, blocksize, packed, scales.device()) }
                .map_err(raise)
        }
        #[cfg(not(feature = "cuda"))]
        Place::Cuda(_) => Err(raise(crate::no_cuda())),
    }
}
