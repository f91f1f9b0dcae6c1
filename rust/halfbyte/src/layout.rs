//! The formats as data: blocks, nibbles and sizes.
//!
//! A tensor is flattened row by row and cut into blocks of `blocksize` elements, across row borders; the last block may be
//! shorter. Each block has one fp32 scale, its largest magnitude (*absmax*).
//!
//! ```text
//! 4-bit:  byte j =  q[2j] << 4 | q[2j+1]          the even element in the high nibble
//!         n odd:   the last low nibble is the code of zero
//! 8-bit:  byte j =  q[j]
//!
//! bits a weight at block 64:   4 + 32/64           = 4.5     plain
//!                              4 + 8/64 + 32/16384 = 4.127   nested (double quantization)
//! ```
//!
//! *Nested* statistics are absmax quantized in turn: their mean (the *offset*) is subtracted, the rest goes to 8 bits with
//! the signed dynamic map in blocks of [`NESTED_BLOCK`]: `absmax[i] = map[codes[i]] * nested_absmax[i / 256] + offset`.

use crate::codebook::Map;
use crate::error::{Error, Result};

/// Block size of nested statistics.
pub const NESTED_BLOCK: usize = 256;

/// The block sizes of the 4-bit formats.
pub const FOUR_BIT_BLOCKS: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// Block size where none is given.
pub const DEFAULT_BLOCK: usize = 64;

/// Blocks that `n` elements make.
pub const fn block_count(n: usize, block: usize) -> usize {
    n.div_ceil(block)
}

/// Bytes that `n` 4-bit codes take.
pub const fn packed_len(n: usize) -> usize {
    n.div_ceil(2)
}

/// An error unless `block` is one of the 4-bit block sizes.
pub fn check_four_bit_block(block: usize) -> Result<()> {
    if FOUR_BIT_BLOCKS.contains(&block) {
        return Ok(());
    }
    Err(Error::value("blocksize", "one of 32, 64, 128, 256, 512, 1024, 2048, 4096", block))
}

/// Scales of a tensor's blocks, borrowed.
#[derive(Debug, Clone, Copy)]
pub enum Absmax<'a> {
    /// One fp32 a block.
    Plain(&'a [f32]),
    /// Double quantization.
    Nested(Nested<'a>),
}

/// Scales that are themselves quantized to 8 bits.
#[derive(Debug, Clone, Copy)]
pub struct Nested<'a> {
    /// One code a block.
    pub codes: &'a [u8],
    /// One scale for each `block` codes.
    pub absmax: &'a [f32],
    /// What the codes stand for.
    pub map: &'a Map,
    /// Added to each decoded scale: the mean of the scales.
    pub offset: f32,
    /// Codes to a nested scale, [`NESTED_BLOCK`] in every file known.
    pub block: usize,
}

impl Absmax<'_> {
    /// Number of blocks that there are scales for.
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(absmax) => absmax.len(),
            Self::Nested(nested) => nested.codes.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The scale of block `i`.
    #[inline(always)]
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Self::Plain(absmax) => absmax[i],
            Self::Nested(n) => n.map[n.codes[i] as usize] * n.absmax[i / n.block] + n.offset,
        }
    }

    /// An error unless there is exactly one scale for each of `blocks` blocks.
    pub fn check(&self, blocks: usize) -> Result<()> {
        if self.len() != blocks {
            return Err(Error::shape("absmax", format!("[{blocks}]"), format!("[{}]", self.len())));
        }
        if let Self::Nested(n) = self {
            if n.block == 0 {
                return Err(Error::value("nested_blocksize", "a positive number", 0));
            }
            let want = block_count(blocks, n.block);
            if n.absmax.len() != want {
                return Err(Error::shape("nested_absmax", format!("[{want}]"), format!("[{}]", n.absmax.len())));
            }
        }
        Ok(())
    }
}
