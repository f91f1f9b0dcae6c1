//! Blockwise 8-bit quantization with any rising map of 256 entries: nested statistics, optimizer states.

#[cfg(feature = "cuda")]
pub mod cuda;

pub(crate) mod carry;
pub mod cpu;
#[cfg(target_arch = "x86_64")]
mod cpu_avx2;
mod nearest;
pub mod reference;

use crate::codebook::Map;
use crate::device;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::layout::block_count;

/// How a scaled value finds its code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// The nearest entry of the map, the lower one of two as near.
    Nearest,
    /// By way of 65,536 even levels, as bitsandbytes does on the CPU: small values land some entries off.
    Grid,
}

/// Quantizes `a − offset`: `codes` gets one byte a value, `absmax` one scale for each `block` (any positive number) values.
///
/// `map` must rise. A block with a NaN gets NaN as its scale and so decodes to NaN (bitsandbytes drops the NaN on the CPU).
pub fn quantize_into<T: Element>(
    a: &[T],
    map: &Map,
    block: usize,
    offset: f32,
    rounding: Rounding,
    codes: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    cpu::quantize(device::cpu::level(), a, map, block, offset, rounding, codes, absmax)
}

/// Dequantizes: `out[i] = map[codes[i]] · absmax[i / block] + offset` in fp32, rounded once to nearest even.
pub fn dequantize_into<T: Element>(
    codes: &[u8],
    map: &Map,
    absmax: &[f32],
    block: usize,
    offset: f32,
    out: &mut [T],
) -> Result<()> {
    cpu::dequantize(device::cpu::level(), codes, map, absmax, block, offset, out)
}

/// The checks that both directions share.
fn check(n: usize, block: usize, codes: usize, absmax: usize) -> Result<()> {
    if block == 0 {
        return Err(Error::value("blocksize", "a positive number", block));
    }
    if codes != n {
        return Err(Error::shape("codes", format!("[{n}]"), format!("[{codes}]")));
    }
    let blocks = block_count(n, block);
    if absmax != blocks {
        return Err(Error::shape("absmax", format!("[{blocks}]"), format!("[{absmax}]")));
    }
    Ok(())
}

/// An error unless `map` rises (equal neighbours allowed, as in maps padded with zeros); NaN does not.
fn check_map(map: &Map) -> Result<()> {
    let Some(i) = map.windows(2).position(|pair| !pair[0].le(&pair[1])) else { return Ok(()) };
    Err(Error::value("code", "256 rising values", format!("{} followed by {} at {i}", map[i], map[i + 1])))
}
